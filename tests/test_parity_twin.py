"""The twin: published facts and a plan -> the config of a tiny Hugging Face model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from harness.architecture import Architecture
from harness.facts import Facts, facts_beside
from harness.layers import Attention, MoE
from harness.layout import Layout
from harness.parity.corrections import corrections
from harness.parity.twin import NoTwin, Twin, twin
from harness.preset import discover, find_presets
from harness.shrink import ShrinkPlan, shrink
from tests.published import TREE, changed, of_preset

EVERY = [file.name for file in discover(TREE)]


@cache
def published(name: str) -> tuple[Facts, Architecture]:
    file = find_presets([name], TREE)[0]
    facts, wrong = facts_beside(file.path)
    assert facts is not None, wrong
    return facts, of_preset(file)


def plan_of(model: Architecture) -> ShrinkPlan:
    return shrink(model, Layout())


def twin_of(name: str, **changes: Any) -> Twin:
    """The twin of a preset of the catalogue, some of whose arguments are changed."""
    facts, model = published(name)
    return twin(facts, plan_of(changed(model, **changes)))


def twin_of_facts(name: str, without: tuple[str, ...] = (), **changes: Any) -> Twin:
    """The twin where the publisher says something else."""
    facts, model = published(name)
    config = {key: value for key, value in (facts.config | changes).items() if key not in without}
    told = replace(facts, config=config, published=facts.published | changes.keys())
    return twin(told, plan_of(model))


def test_a_twin_needs_no_torch() -> None:
    code = (
        "import sys, harness.parity.twin; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the whole catalogue ----


@pytest.mark.parametrize("name", EVERY)
def test_sizes_of_the_catalogue_are_those_of_the_plan(name: str) -> None:
    facts, model = published(name)
    plan = plan_of(model)
    made, after = twin(facts, plan).text_config, plan.after
    assert made["hidden_size"] == after.hidden_size
    assert made["vocab_size"] == after.padded_vocab_size
    if (attention := after.attention) is not None:
        assert made["num_attention_heads"] == attention.num_attention_heads
        assert made["num_key_value_heads"] == attention.num_query_groups
        assert (
            made.get("head_dim", made["hidden_size"] // made["num_attention_heads"]) == attention.kv_channels
        )
    if (latent := after.latent) is not None:
        assert made["q_lora_rank"] == latent.q_lora_rank
        assert made["kv_lora_rank"] == latent.kv_lora_rank
        assert made["qk_nope_head_dim"] == latent.qk_head_dim
    if (moe := after.moe) is not None:
        assert made["num_experts_per_tok"] == moe.moe_router_topk
        keys = {"num_experts", "num_local_experts", "n_routed_experts"} & made.keys()
        assert {made[key] for key in keys} == {moe.num_experts}
        if moe.shared is not None and "n_shared_experts" in made and not after.hybrid:
            assert made["n_shared_experts"] * made["moe_intermediate_size"] == moe.shared.ffn_hidden_size


@pytest.mark.parametrize("name", EVERY)
def test_layers_of_the_catalogue_are_of_the_kinds_that_the_preset_says(name: str) -> None:
    facts, model = published(name)
    plan = plan_of(model)
    assert kinds_of(twin(facts, plan)) == kinds_by_preset(plan.after)


def kinds_by_preset(after: Architecture) -> list[tuple[Any, ...]]:
    if after.hybrid:
        return [(symbol,) for symbol in after.pattern]
    return [
        (
            isinstance(layer.mlp, MoE),
            isinstance(layer.mixer, Attention) and layer.mixer.window is not None,
            not isinstance(layer.mixer, Attention) or layer.mixer.rope,
        )
        for layer in after.layers
    ]


def kinds_of(made: Twin) -> list[tuple[Any, ...]]:
    """Experts, window and rotary positions of each layer, or its symbol, by Hugging Face's own rules."""
    config = made.text_config
    count = config["num_hidden_layers"]
    if "hybrid_override_pattern" in config:
        return [(symbol,) for symbol in config["hybrid_override_pattern"]]
    if "linear_num_key_heads" in config:
        mixers = ["G" if kind == "linear_attention" else "*" for kind in config["layer_types"]]
        letters = [(letter,) for mixer in mixers for letter in (mixer, "E")]
        return letters[: len(letters) - bool(made.without)]
    moe = [False] * count
    if "moe_layers" in config:
        moe = [index in config["moe_layers"] for index in range(count)]
    elif "first_k_dense_replace" in config:
        moe = [index >= config["first_k_dense_replace"] for index in range(count)]
    elif "num_experts_per_tok" in config:
        moe = [index not in config.get("mlp_only_layers", []) for index in range(count)]
    types = config.get("layer_types", ["full_attention"] * count)
    rope = config.get("no_rope_layers", [1] * count)
    return [(moe[i], types[i] == "sliding_attention", bool(rope[i])) for i in range(count)]


# ---- the two sides are independent ----

SETTINGS: tuple[dict[str, Any], ...] = (
    {"layernorm_epsilon": 3e-4},
    {"rotary_base": 777},
    {"use_rope_scaling": True, "rope_scaling_factor": 3.0},
    {"rotary_scaling_factor": 5.0, "mscale": 2.0, "mscale_all_dim": 2.0, "yarn_beta_fast": 9.0},
    {"rotary_interleaved": True},
    {"untie_embeddings_and_output_weights": False},
    {"swiglu": False, "squared_relu": False},
    {"activation_func_clamp_value": 3.0, "glu_linear_offset": 0.5},
    {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True},
    {"moe_router_topk_scaling_factor": 9.0, "moe_router_enable_expert_bias": True},
    {"softmax_type": "learnable"},
    {"add_qkv_bias": True},
    {"qk_layernorm": True},
    {"rotary_percent": 0.5},
    {"window_size": (64, 0)},
    {"position_embedding_type": "learned_absolute"},
)


@pytest.mark.parametrize("wrong", SETTINGS, ids=lambda wrong: next(iter(wrong)))
@pytest.mark.parametrize(
    "name", ["Qwen3-8B", "Llama-3.1-8B-Instruct", "DeepSeek-R1", "gpt-oss-20b", "Qwen3-30B-A3B"]
)
def test_no_setting_of_the_preset_reaches_the_twin(name: str, wrong: dict[str, Any]) -> None:
    facts, model = published(name)
    plan = plan_of(model)
    other = replace(plan, before=changed(plan.before, **wrong), after=changed(plan.after, **wrong))
    assert twin(facts, other) == twin(facts, plan)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Qwen3-8B", "rms_norm_eps"),
        ("Llama-3.1-8B-Instruct", "rope_scaling"),
        ("DeepSeek-R1", "routed_scaling_factor"),
        ("gpt-oss-20b", "sliding_window"),
        ("Nemotron-Mini-4B-Instruct", "partial_rotary_factor"),
        ("Qwen3-30B-A3B", "norm_topk_prob"),
        ("Nemotron-H-56B-Base-8K", "layer_norm_epsilon"),
    ],
)
def test_a_published_setting_is_kept_as_it_is(name: str, key: str) -> None:
    assert twin_of(name).text_config[key] == published(name)[0].config[key]


# ---- a preset with a wrong size ----


@pytest.mark.parametrize(
    ("name", "wrong", "key", "dest"),
    [
        ("Qwen3-8B", {"ffn_hidden_size": 12800}, "intermediate_size", "ffn_hidden_size"),
        ("Qwen3-8B", {"num_query_groups": 4}, "num_key_value_heads", "num_query_groups"),
        ("Qwen3-8B", {"num_attention_heads": 16}, "num_attention_heads", "num_attention_heads"),
        ("Qwen3-8B", {"kv_channels": 64}, "head_dim", "kv_channels"),
        ("Qwen3-8B", {"hidden_size": 5120}, "hidden_size", "hidden_size"),
        ("Qwen3-8B", {"padded_vocab_size": 152064}, "vocab_size", "padded_vocab_size"),
        ("Llama-3.1-8B-Instruct", {"hidden_size": 5120}, "hidden_size", "hidden_size"),
        ("Qwen3-30B-A3B", {"num_experts": 64}, "num_experts", "num_experts"),
        ("Qwen3-30B-A3B", {"moe_router_topk": 4}, "num_experts_per_tok", "moe_router_topk"),
        ("Qwen3-30B-A3B", {"moe_ffn_hidden_size": 1536}, "moe_intermediate_size", "moe_ffn_hidden_size"),
        ("DeepSeek-R1", {"kv_lora_rank": 1024}, "kv_lora_rank", "kv_lora_rank"),
        ("DeepSeek-R1", {"q_lora_rank": None}, "q_lora_rank", "q_lora_rank"),
        ("DeepSeek-R1", {"v_head_dim": 192}, "v_head_dim", "v_head_dim"),
        ("Nemotron-H-56B-Base-8K", {"mamba_state_dim": 128}, "ssm_state_size", "mamba_state_dim"),
        ("Nemotron-H-56B-Base-8K", {"mamba_num_groups": 4}, "n_groups", "mamba_num_groups"),
        (
            "NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
            {"moe_latent_size": 2048},
            "moe_latent_size",
            "moe_latent_size",
        ),
    ],
)
def test_a_wrong_size_stays_wrong(name: str, wrong: dict[str, Any], key: str, dest: str) -> None:
    facts, model = published(name)
    plan = plan_of(changed(model, **wrong))
    made = twin(facts, plan).text_config
    assert made[key] != plan.after.arguments[dest]
    assert made["num_attention_heads"] % made["num_key_value_heads"] == 0


def test_a_shared_expert_of_the_wrong_size_stays_wrong() -> None:
    facts, model = published("DeepSeek-V2-Lite")
    plan = plan_of(changed(model, moe_shared_expert_intermediate_size=1408))
    made, shared = twin(facts, plan).text_config, plan.after.moe and plan.after.moe.shared
    assert shared is not None
    assert made["n_shared_experts"] * made["moe_intermediate_size"] != shared.ffn_hidden_size


@pytest.mark.parametrize(("size", "count"), [(512, 1), (1536, 3)])
def test_the_number_of_shared_experts_is_what_the_plan_makes_of_their_size(size: int, count: int) -> None:
    """Published are two of 1408; whatever their size became, they are as many experts of 512."""
    facts, model = published("DeepSeek-V2-Lite")
    plan = plan_of(model)
    other = replace(plan, after=changed(plan.after, moe_shared_expert_intermediate_size=size))
    assert twin(facts, other).text_config["n_shared_experts"] == count


def test_a_part_of_a_shared_expert_is_no_twin() -> None:
    facts, model = published("DeepSeek-V2-Lite")
    plan = plan_of(model)
    other = replace(plan, after=changed(plan.after, moe_shared_expert_intermediate_size=768))
    with pytest.raises(NoTwin, match=r"n_shared_experts: .* is not whole"):
        twin(facts, other)


@pytest.mark.parametrize("wrong", [{"moe_router_num_groups": None, "moe_router_group_topk": None}])
def test_published_groups_of_experts_stay_where_the_preset_has_none(wrong: dict[str, Any]) -> None:
    made = twin_of("DeepSeek-R1", **wrong).text_config
    assert (made["n_group"], made["topk_group"]) == (2, 1)
    assert made["n_routed_experts"] % made["n_group"] == 0


@pytest.mark.parametrize(("layers", "more"), [(35, 1), (37, -1)])
def test_a_wrong_number_of_layers_stays_wrong(layers: int, more: int) -> None:
    facts, model = published("Qwen3-8B")
    plan = plan_of(changed(model, num_layers=layers))
    assert len(twin(facts, plan).layers) == plan.after.num_layers + more


# ---- a preset with wrong layers ----


@pytest.mark.parametrize(
    ("name", "dest", "value"),
    [
        ("DeepSeek-R1", "moe_layer_freq", (0,) * 2 + (1,) * 59),
        ("DeepSeek-R1", "moe_layer_freq", (0,) * 4 + (1,) * 57),
        ("DeepSeek-R1", "moe_layer_freq", (0,) * 3 + (1,) * 57 + (0,)),
        ("gpt-oss-20b", "window_attn_skip_freq", (0, 1) * 12),
        ("gpt-oss-20b", "window_attn_skip_freq", (1, 0) * 11 + (1, 1)),
        ("gpt-oss-20b", "window_attn_skip_freq", (1, 1, 0) * 8),
        ("Llama-4-Scout-17B-16E-Instruct", "no_rope_freq", (0, 0, 1, 0) * 12),
        ("Llama-4-Scout-17B-16E-Instruct", "no_rope_freq", (0, 0, 0, 1) * 11 + (0, 0, 1, 0)),
        ("Llama-4-Maverick-17B-128E-Instruct", "moe_layer_freq", (1, 0) * 24),
        ("Nemotron-H-4B-Instruct", "hybrid_layer_pattern", "-M" * 26),
    ],
    ids=str,
)
def test_layers_of_the_wrong_kind_show(name: str, dest: str, value: Any) -> None:
    facts, model = published(name)
    plan = plan_of(changed(model, **{dest: value}))
    try:
        made = twin(facts, plan)
    except NoTwin as error:
        assert "layer" in str(error)
        return
    assert kinds_of(made) != kinds_by_preset(plan.after)


def test_a_boundary_is_kept_between_neighbours() -> None:
    assert twin_of("DeepSeek-R1").layers == (1, 2, 3, 4)


# ---- what is published in another way, or not at all ----


def test_kimi_is_deepseek_to_transformers_and_says_so() -> None:
    made = twin_of("Kimi-K2-Instruct")
    assert (made.architecture, made.config["model_type"]) == ("DeepseekV3ForCausalLM", "deepseek_v3")
    assert any("kimi_k2" in line for line in made.assumed)


def test_llama_4_is_nested_in_a_model_with_eyes() -> None:
    made = twin_of("Llama-4-Scout-17B-16E-Instruct")
    assert made.config["model_type"] == "llama4"
    assert made.text_config["model_type"] == "llama4_text"


def test_keys_are_spelled_as_transformers_reads_them() -> None:
    made = twin_of("NVIDIA-Nemotron-Nano-9B-v2").config
    assert made["layer_norm_epsilon"] == 1e-5
    assert not {"rms_norm_eps", "mamba_state_dim", "mamba_num_groups"} & made.keys()
    assert twin_of("MiniMax-M2").config["partial_rotary_factor"] == 0.5


def test_a_key_that_nobody_publishes_is_assumed_in_words() -> None:
    assert "rms_norm_eps is not published: transformers' own default" in twin_of("GLM-4.5").assumed
    assert twin_of("Qwen3-8B").assumed == ()


def test_parts_that_predict_later_tokens_are_left_out() -> None:
    made = twin_of("DeepSeek-R1")
    assert made.left_out == ("multi-token prediction (num_nextn_predict_layers 1)",)
    assert made.config["num_nextn_predict_layers"] == 0


def test_half_a_decoder_layer_is_left_out() -> None:
    made = twin_of("Qwen3-Next-80B-A3B-Instruct")
    assert made.layers == (2, 3, 4)
    assert made.without == ("model.layers.2.mlp.", "model.layers.2.post_attention_layernorm.")
    assert made.left_out == ("the feed-forward of layer 4, of which the plan has the mixer alone",)


def test_a_correction_of_transformers_is_declared() -> None:
    assert any("YaRN's mscale" in row.words for row in corrections(twin_of("DeepSeek-V2-Lite").text_config))
    assert not [*corrections(twin_of("DeepSeek-R1").text_config)]


# ---- no twin ----


@pytest.mark.parametrize(
    ("name", "changes", "without", "reason"),
    [
        ("Qwen3-8B", {"model_type": "mamba9"}, (), "model_type mamba9 is none that the harness knows"),
        ("Qwen3-8B", {}, ("num_hidden_layers",), "num_hidden_layers is not published"),
        (
            "Nemotron-H-4B-Instruct",
            {},
            ("hybrid_override_pattern",),
            "hybrid_override_pattern, which names the layers",
        ),
        ("DeepSeek-R1", {}, ("first_k_dense_replace",), "which layers hold experts is not published"),
        (
            "Llama-4-Scout-17B-16E-Instruct",
            {"no_rope_layers": [1, 0]},
            (),
            "which layers have rotary positions",
        ),
    ],
)
def test_no_twin_says_why(name: str, changes: dict[str, Any], without: tuple[str, ...], reason: str) -> None:
    with pytest.raises(NoTwin, match=reason):
        twin_of_facts(name, without, **changes)
