"""Parity: what passes, what is a limit and whose, and that what differs is blamed on its part and flag."""

from __future__ import annotations

from typing import Any

import pytest

from harness.finding import Severity
from harness.parity.compare import TOLERANCES
from harness.parity.site import Part
from tests.parity_models import parity, parity_of

# One preset of each family that ModelOpt or a mapping of ours imports, and parts that only it has.
FAMILIES: dict[str, set[Part]] = {
    "Qwen2.5-7B-Instruct": {Part.ROTARY, Part.PROJECTION, Part.QUERIES, Part.CORE, Part.MLP},
    "Qwen3-8B": {Part.QUERY_NORM, Part.KEY_NORM},
    "Llama-3.1-8B-Instruct": {Part.ROTARY, Part.KEYS, Part.VALUES},
    "Qwen3-30B-A3B": {Part.ROUTER, Part.QUERY_NORM},
    "DeepSeek-V2-Lite": {Part.KV_DOWN, Part.KV_NORM, Part.KV_UP, Part.SHARED, Part.ROUTER, Part.QUERIES},
    "Nemotron-H-8B-Base-8K": {Part.MAMBA_IN, Part.MAMBA_NORM, Part.MAMBA, Part.CORE, Part.MLP},
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": {Part.MAMBA, Part.ROUTER, Part.SHARED},
    "Nemotron-Mini-4B-Instruct": {Part.ROTARY, Part.MLP},
    "Mixtral-8x7B-v0.1": {Part.ROUTER, Part.MLP},
    "phi-4": {Part.PROJECTION, Part.MLP},
    "gpt-oss-20b": {Part.ROTARY, Part.CORE, Part.ROUTER},
}
EVERYWHERE = {Part.EMBEDDING, Part.LAYER, Part.FINAL_NORM, Part.LOGITS, Part.ATTENTION, Part.MLP}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_weights_give_the_same_logits(name: str) -> None:
    found = parity_of(name)
    assert found.passed, (found.findings, found.limit)
    assert found.relative is not None and found.relative < TOLERANCES["cpu"]
    assert FAMILIES[name] | EVERYWHERE <= {site.part for site in found.sites}
    assert max(site.relative for site in found.sites) < TOLERANCES["cpu"] / 5


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-30B-A3B"])
def test_nothing_is_assumed_where_all_is_published(name: str) -> None:
    assert parity_of(name).findings == ()
    assert "ours" not in parity_of(name).detail


def test_what_is_ours_is_said() -> None:
    detail = parity_of("Nemotron-Mini-4B-Instruct").detail
    assert "ours, as ModelOpt's importer has no such rule: word_embeddings from model.embed_" in detail
    assert "linear_fc1 from model.layers.{}.mlp.up_proj.*" in detail


# Silent bugs: a changed argument, the flag that is blamed, the part and the tiny layer that differ first.
BUGS: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("Qwen3-8B", {"layernorm_epsilon": 1e-5}, "--norm-epsilon", "layer 0, input norm alone"),
    ("Qwen3-8B", {"rotary_base": 500000}, "--rotary-base", "rotary frequencies"),
    ("Qwen3-8B", {"rotary_interleaved": True}, "--rotary-interleaved", "layer 0, queries of attention"),
    ("Llama-3.1-8B-Instruct", {"use_rope_scaling": False}, "--use-rope-scaling", "rotary frequencies"),
    ("Nemotron-Mini-4B-Instruct", {"rotary_percent": 1.0}, "--rotary-percent", "rotary frequencies"),
    (
        "Nemotron-Mini-4B-Instruct",
        {"squared_relu": False},
        "--squared-relu",
        "layer 0, feed-forward alone",
    ),
    (
        "Qwen3-30B-A3B",
        {"moe_router_pre_softmax": True},
        "--moe-router-pre-softmax",
        "layer 0, router",
    ),
    (
        "DeepSeek-V2-Lite",
        {"moe_router_pre_softmax": False},
        "--moe-router-pre-softmax",
        "layer 1, router",
    ),
    (
        "DeepSeek-V2-Lite",
        {"rotary_scaling_factor": 20.0},
        "--rotary-scaling-factor",
        "layer 0, rotary frequencies",
    ),
    ("gpt-oss-20b", {"window_size": (128, 0)}, "--window-size", "layer 0, attention core"),
    (
        "gpt-oss-20b",
        {"activation_func_clamp_value": 6.0},
        "--activation-func-clamp-value",
        "layer 0, feed-forward alone",
    ),
    ("gpt-oss-20b", {"yarn_beta_fast": 16.0}, "--yarn-beta-fast", "rotary frequencies"),
)


@pytest.mark.parametrize(("name", "change", "flag", "where"), BUGS, ids=lambda value: str(value)[:40])
def test_a_silent_bug_is_blamed_on_its_part_and_flag(
    name: str, change: dict[str, Any], flag: str, where: str
) -> None:
    found = parity(name, **change)
    (finding,) = (one for one in found.findings if one.is_error)
    assert finding.flag == flag and finding.stage == "parity"
    assert f"; {where} (" in finding.message
    assert not found.limit and not found.passed


# What the importer sees before any number is compared.
STRUCTURE: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    (
        "Qwen3-8B",
        {"qk_layernorm": False},
        "--qk-layernorm",
        "the checkpoint's model.layers.0.self_attn.k_norm.weight, model.layers.1.self_attn.k_norm.weight has",
    ),
    (
        "Llama-3.1-8B-Instruct",
        {"qk_layernorm": True},
        "--qk-layernorm",
        "the model of the preset has q_layernorm, k_layernorm, for which the importer of LlamaForCausalLM",
    ),
    (
        "Qwen3-8B",
        {"add_qkv_bias": True},
        "--add-qkv-bias",
        "the model of the preset has model.layers.0.self_attn.q_proj.bias, and the published checkpoint",
    ),
    ("Qwen2.5-7B-Instruct", {"add_qkv_bias": False}, "--add-qkv-bias", "has no place in the model"),
    (
        "Qwen3-8B",
        {"untie_embeddings_and_output_weights": False},
        "--untie-embeddings-and-output-weights",
        "the checkpoint's lm_head.weight has no place in the model of the preset",
    ),
    (
        "Qwen3-8B",
        {"position_embedding_type": "learned_absolute"},
        "--position-embedding-type",
        "the published checkpoint has nothing for embedding.position_embeddings.weight of the model",
    ),
    ("Qwen3-8B", {"ffn_hidden_size": 8192}, "--ffn-hidden-size", "over model.layers.0.mlp.up_proj.weight"),
    ("Qwen3-8B", {"num_query_groups": 4}, "--num-query-groups", "shape mismatch"),
    ("DeepSeek-V2-Lite", {"moe_layer_freq": 1}, "--moe-layer-freq", "model.layers.0.mlp.gate.weight"),
)


@pytest.mark.parametrize(("name", "change", "flag", "words"), STRUCTURE, ids=lambda value: str(value)[:40])
def test_what_does_not_import_is_blamed_on_its_flag(
    name: str, change: dict[str, Any], flag: str, words: str
) -> None:
    found = parity(name, **change)
    assert found.relative is None and not found.limit
    first = found.findings[0]
    assert first.is_error and first.flag == flag
    assert words in first.message


def test_a_message_says_the_setting_the_place_and_by_how_much() -> None:
    (finding,) = parity("Qwen3-8B", rotary_interleaved=True).findings
    start, _, rest = finding.message.partition(": by ")
    assert start == (
        "--rotary-interleaved on (Megatron's default): off published (models/qwen3/modeling_qwen3.py); "
        "layer 0, queries of attention (model.layers.0.self_attn in Hugging Face, "
        "decoder.layers.0.self_attention.core_attention in Megatron), layer 0 of the published model, is the "
        "first part that differs"
    )
    assert " of its largest value, while the " in rest
    assert "the logits differ by 0." in rest
    assert "cting there: " not in rest
    assert finding.module == "decoder.layers.0.self_attention.core_attention"
    assert (finding.expected, finding.actual) == (False, True)


def test_two_bugs_show_where_the_first_of_them_acts() -> None:
    (finding,) = parity("Qwen3-8B", rotary_base=500000, layernorm_epsilon=1e-5).findings
    assert finding.flag == "--norm-epsilon"


# Limits


def test_a_limit_of_megatron_is_named_and_the_rest_compared() -> None:
    found = parity_of("Llama-3.2-1B-Instruct")
    assert found.limit == (
        "Megatron: factor 32.0 published (rope_scaling), which no flag can make: it builds 8, so the rotated "
        "queries and keys differ (rotary frequencies: by 3 of its largest value)"
    )
    assert not found.findings and not found.passed
    assert found.relative is not None and found.relative < TOLERANCES["cpu"]


def test_two_limits_of_one_model() -> None:
    found = parity_of("Llama-4-Scout-17B-16E-Instruct")
    assert "Megatron: factor 16.0, high_freq_factor 1.0 published (rope_scaling)" in found.limit
    assert "it builds 8, 4, so" in found.limit
    assert "it norms queries and keys in every layer, the published model not in those" in found.limit
    assert found.relative is not None and found.relative < TOLERANCES["cpu"]


def test_what_is_too_far_off_to_show_is_a_warning() -> None:
    warnings = parity_of("Llama-4-Scout-17B-16E-Instruct").findings
    assert {warning.severity for warning in warnings} == {Severity.WARNING}
    chunks, temperature = (warning.message for warning in warnings)
    assert "attention_chunk_size" in chunks and "nothing of it shows in 40 tokens" in chunks
    assert "attn_temperature_tuning" in temperature


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"rotary_base": 12345}, "--rotary-base"),
        ({"no_rope_freq": None}, "--no-rope-freq"),
        ({"export_moe_apply_probs_on_input": False}, "--export-moe-apply-probs-on-input"),
        ({"layernorm_epsilon": 1e-6}, "--norm-epsilon"),
    ],
    ids=str,
)
def test_a_limit_excuses_nothing_else(change: dict[str, Any], flag: str) -> None:
    found = parity("Llama-4-Scout-17B-16E-Instruct", **change)
    assert not found.limit
    assert [finding.flag for finding in found.findings] == [flag]


def test_rules_that_the_importer_lacks_are_named() -> None:
    found = parity_of("Qwen3-Next-80B-A3B-Instruct")
    assert "ModelOpt: its importer has no rule for Qwen3NextForCausalLM at all" in found.limit
    assert not found.findings


def test_norms_that_megatron_has_not_are_a_limit_with_the_importers_words() -> None:
    found = parity_of("MiniMax-M2")
    assert found.limit.startswith("Megatron: it norms queries and keys head by head")
    assert "over model.layers.0.self_attn.q_norm.weight" in found.limit


def test_what_no_publisher_says_is_taken_from_the_preset_with_a_warning() -> None:
    found = parity_of("Qwen2.5-72B-Instruct")
    (warning,) = found.findings
    assert found.passed and warning.severity is Severity.WARNING
    assert warning.flag == "--norm-epsilon"
    assert warning.message.startswith("Qwen2.5-72B-Instruct.toml does not say rms_norm_eps: the published")
