from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_models import model_of

from harness.build import (
    OVERRIDES,
    build_model,
    compare_parameters,
    parameter_shapes,
    refused,
    transformer_config,
)
from harness.errors import UnsupportedModel
from harness.finding import Severity
from harness.inventory import parameters
from harness.layout import Layout
from harness.preset import PresetFile, discover, load_preset
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world

CPU = torch.device("cpu")
PRESETS = discover(Path(__file__).parent.parent / "presets")

QWEN = (
    "--bf16 --no-masked-softmax-fusion --disable-bias-linear --position-embedding-type rope --no-rope-fusion "
    "--normalization RMSNorm --swiglu --seq-length 64 --max-position-embeddings 96 --rotary-base 1000000 "
    "--rotary-percent 1.0 --no-bias-swiglu-fusion --padded-vocab-size 320 --num-layers 2 --hidden-size 128 "
    "--num-attention-heads 8 --group-query-attention --num-query-groups 2 --kv-channels 32 "
)
QWEN3 = QWEN + "--untie-embeddings-and-output-weights --qk-layernorm --ffn-hidden-size 384 "
LAYERNORM = (
    "--bf16 --no-masked-softmax-fusion --seq-length 64 --max-position-embeddings 96 --num-layers 2 "
    "--hidden-size 128 --num-attention-heads 8 --padded-vocab-size 320 "
)
MODELS = {
    **small_models.MODELS,
    "Qwen3": QWEN3,
    "Qwen2.5": QWEN + "--add-qkv-bias --ffn-hidden-size 384",
    "Qwen3-MoE": QWEN3 + "--num-experts 8 --moe-ffn-hidden-size 96 --moe-router-topk 2 "
    "--moe-router-dtype fp32 --moe-aux-loss-coeff 1e-3 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss",
    "dense-then-MoE": QWEN3 + "--num-experts 4 --moe-ffn-hidden-size 96 --moe-router-topk 1 "
    "--moe-router-pre-softmax --moe-layer-freq [0,1] --moe-shared-expert-intermediate-size 160",
    "GPT-2": LAYERNORM,
    "Nemotron": LAYERNORM + "--disable-bias-linear --position-embedding-type rope --no-rope-fusion "
    "--normalization LayerNorm --apply-layernorm-1p --squared-relu --rotary-percent 0.5 "
    "--ffn-hidden-size 384 --untie-embeddings-and-output-weights",
}

# Qwen/Qwen3-8B as Megatron-LM's examples/post_training/modelopt/conf has it, with its vocabulary.
QWEN3_8B = (
    "--save-interval 100000 --micro-batch-size 1 --bf16 --no-masked-softmax-fusion --disable-bias-linear "
    "--untie-embeddings-and-output-weights --position-embedding-type rope --no-rope-fusion "
    "--normalization RMSNorm --swiglu --num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 "
    "--num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm "
    "--seq-length 4096 --max-position-embeddings 40960 --tokenizer-type HuggingFaceTokenizer "
    "--make-vocab-size-divisible-by 1187 --use-mcore-models --rotary-percent 1.0 --rotary-base 1000000 "
    "--no-bias-swiglu-fusion --padded-vocab-size 151936"
)


def arguments_of(flags: str) -> dict[str, Any]:
    return dict(model_of(flags).arguments.values)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


def build(flags: str, seed: int = 1234) -> Any:
    with captured():
        return build_model(model_of(flags), Layout(), CPU, seed)


# The config


def modelopt_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of Megatron-LM's post-training scripts, of which megatron-core has no parser."""
    for flag in ("--export-qk-l2-norm", "--export-moe-apply-probs-on-input"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--export-model-type", default="GPTModel")
    return parser


def megatrons_own(flags: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What Megatron's parser and validation make of ``flags``, and the ModelOpt flags' defaults."""
    from megatron.training.arguments import parse_args, validate_args

    monkeypatch.setattr(sys, "argv", ["quantize.py", *flags.split(), "--tokenizer-model", "x"])
    with captured():
        arguments = parse_args(extra_args_provider=modelopt_arguments)
        validate_args(arguments, {"no_load_rng": True, "no_load_optim": True})
    assert isinstance(arguments, argparse.Namespace)
    return arguments


@pytest.mark.parametrize("name", [*MODELS, "Qwen3-8B"])
def test_config_is_megatrons_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real parser and the real validation, but for the overrides."""
    flags = {**MODELS, "Qwen3-8B": QWEN3_8B}[name]
    if "--micro-batch-size" not in flags:
        flags += " --micro-batch-size 1 --tokenizer-type HuggingFaceTokenizer"
    assert_config(flags, arguments_of(flags), monkeypatch)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_full_size_config_of_a_preset_is_megatrons_own(
    file: PresetFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = load_preset(file).arguments
    assert arguments is not None
    script = 'source "$0"; printf %s "$MODEL_ARGS"'
    sourced = subprocess.run(
        ["bash", "-f", "-c", script, file.path], capture_output=True, text=True, check=True
    )
    assert_config(sourced.stdout, arguments.values, monkeypatch)


def assert_config(flags: str, arguments: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.argument_utils import core_transformer_config_from_args

    namespace = megatrons_own(flags, monkeypatch)
    for override in OVERRIDES:
        if override.applies(CPU):
            setattr(namespace, override.dest, override.value(Layout(), torch.bfloat16))
    expected = core_transformer_config_from_args(namespace)
    # As model_builder.py sets them on the config.
    expected.qk_l2_norm = namespace.export_qk_l2_norm
    expected.moe_apply_probs_on_input = namespace.export_moe_apply_probs_on_input
    if namespace.mamba_num_heads is None and namespace.export_model_type == "HybridModel":
        # As MambaMixer takes them where none are given.
        expected.mamba_num_heads = 2 * namespace.hidden_size // namespace.mamba_head_dim
    actual = transformer_config(arguments, Layout(), CPU)
    assert type(actual) is type(expected)
    assert fields(actual) == fields(expected)


def fields(config: Any) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    # A functools.partial equals itself only.
    return {
        name: (value.func, value.args, value.keywords) if hasattr(value, "func") else value
        for name, value in values.items()
    }


def test_overrides_change_only_what_they_say() -> None:
    reasons = [override.reason for override in OVERRIDES]
    assert all(len(reason.split()) > 3 for reason in reasons)
    assert len({override.dest for override in OVERRIDES}) == len(OVERRIDES)


def test_full_size_config_takes_no_time_and_no_memory() -> None:
    start = time.perf_counter()
    config = transformer_config(arguments_of(QWEN3_8B), Layout.parse("tp8,pp2"), CPU)
    assert time.perf_counter() - start < 1
    assert (config.num_layers, config.hidden_size, config.num_query_groups) == (36, 4096, 8)
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (8, 2)
    assert config.sequence_parallel


def test_what_megatron_refuses_comes_through() -> None:
    arguments = {**arguments_of(MODELS["Qwen3"]), "num_query_groups": 3}
    with pytest.raises(ValueError, match="num_query_groups"):
        transformer_config(arguments, Layout.parse("tp2"), CPU)


def test_llama4_and_gpt_oss_flags_reach_the_config() -> None:
    changes = {"export_qk_l2_norm": True, "export_moe_apply_probs_on_input": True, "enable_gpt_oss": True}
    config = transformer_config({**arguments_of(MODELS["Qwen3"]), **changes}, Layout(), CPU)
    assert config.qk_l2_norm and config.moe_apply_probs_on_input
    assert (config.position_embedding_type, config.yarn_rotary_scaling_factor) == ("yarn", 32.0)


def test_enumerations_may_be_given_by_name() -> None:
    config = transformer_config(
        {**arguments_of(MODELS["Qwen3"]), "attention_backend": "flash"}, Layout(), CPU
    )
    assert config.attention_backend.name == "flash"


@pytest.mark.parametrize(
    ("dest", "value", "why"),
    [
        ("mtp_num_layers", 1, "prediction heads are of Transformer Engine's layer specs, not of ModelOpt's"),
        ("heterogeneous_layers_config_path", "x", "its layers stand in another file, which is not read"),
        ("export_offline_model", True, "it builds the model without its layers"),
        ("export_default_te_spec", True, "it is pruning's; quantize.py builds from ModelOpt's layer specs"),
        ("spec", ("a", "b"), "Megatron-LM's ModelOpt builder refuses layer specs of one's own"),
    ],
)
def test_kinds_of_model_that_cannot_be_built(dest: str, value: object, why: str) -> None:
    with pytest.raises(UnsupportedModel) as raised:
        transformer_config({**arguments_of(MODELS["Qwen3"]), dest: value}, Layout(), CPU)
    assert str(raised.value) == f"{dest} {value!r} makes a model that the harness cannot build: {why}"
    assert raised.value.dest == dest


# The model


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_inventory(name: str) -> None:
    expected = parameters(model_of(MODELS[name]))
    assert compare_parameters(expected, parameter_shapes(build(MODELS[name]))) == ()


def test_model_is_made_of_modelopts_layer_specs() -> None:
    model = build(MODELS["Qwen3-MoE"])
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    layer = "decoder.layers.0."
    assert kinds[layer + "self_attention.linear_qkv"] == "ColumnParallelLinear"
    assert kinds[layer + "self_attention.core_attention"] == "CoreAttention"
    assert kinds[layer + "self_attention.q_layernorm"] == "RMSNorm"
    assert kinds[layer + "mlp.experts"] == "SequentialMLP"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_norms_have_the_presets_epsilon() -> None:
    model = build(MODELS["Qwen3"] + " --norm-epsilon 1e-6")
    found = {module.eps for module in model.modules() if hasattr(module, "zero_centered_gamma")}
    assert found == {1e-6}


def test_tied_embeddings_are_one_parameter() -> None:
    names = parameter_shapes(build(MODELS["Qwen2.5"]))
    assert "embedding.word_embeddings.weight" in names and "output_layer.weight" not in names


def test_hybrids_are_made_of_modelopts_layer_specs() -> None:
    model = build(MODELS["gated delta net"])
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["decoder"] == "HybridStack"
    assert kinds["decoder.layers.0.self_attention"] == "GatedDeltaNet"
    assert kinds["decoder.layers.0.self_attention.in_proj"] == "ColumnParallelLinear"
    assert kinds["decoder.layers.1.mlp.experts"] == "SequentialMLP"
    assert kinds["decoder.layers.2.self_attention.q_layernorm"] == "RMSNorm"
    assert kinds["decoder.final_norm"] == "RMSNorm"


def test_latent_attention_is_built_as_published() -> None:
    model = build(MODELS["latent attention"])
    layer = model.decoder.layers[0].self_attention
    assert type(layer).__name__ == "MLASelfAttention"
    assert layer.softmax_scale == pytest.approx((0.1 * 0.7 * math.log(40) + 1) ** 2 / 48**0.5)
    assert layer.core_attention.softmax_scale == layer.softmax_scale
    assert type(layer.linear_q_down_proj).__name__ == "Linear"


def test_pipeline_stages_of_a_pattern_make_way_for_the_layouts() -> None:
    flags = MODELS["Mamba and MLP"]
    staged = flags.replace("M-M*-", "M-|M*-")
    assert staged != flags
    assert parameter_shapes(build(staged)) == parameter_shapes(build(flags))


# What Megatron refuses


def test_latent_attention_without_query_latent_is_refused_and_built_all_the_same() -> None:
    with captured():
        (finding,) = refused(model_of(MODELS["latent attention without query latent"]), Layout(), CPU)
    assert (finding.stage, finding.severity, finding.flag) == ("build", Severity.WARNING, "--q-lora-rank")
    assert finding.message.startswith(
        "Megatron refuses latent attention without --q-lora-rank from ModelOpt's layer specs"
    )
    assert "is non-trivial, but `q_lora_rank is None`, meaning it will not be used." in finding.message
    assert finding.message.endswith("The harness builds it without that norm, as published")


@pytest.mark.parametrize("name", ["latent attention", "Qwen3", "Mamba and MLP"])
def test_what_megatron_takes_is_no_finding(name: str) -> None:
    assert refused(model_of(MODELS[name]), Layout(), CPU) == ()


def test_latent_attention_without_norms_is_still_refused() -> None:
    flags = MODELS["latent attention without query latent"].replace("--qk-layernorm ", "")
    arguments = {**arguments_of(MODELS["latent attention without query latent"]), "qk_layernorm": False}
    assert "--qk-layernorm" not in flags
    full = model_of(MODELS["latent attention without query latent"])
    without = dataclasses.replace(full, arguments=full.arguments.replaced(arguments))
    with captured(), pytest.raises(ValueError, match="q_lora_rank is None"):
        build_model(without, Layout(), CPU)


# The comparison


def test_a_wrong_number_of_query_groups_is_found() -> None:
    expected = parameters(model_of(MODELS["Qwen3"]))
    wrong = build(MODELS["Qwen3"].replace("--num-query-groups 2", "--num-query-groups 4"))
    findings = compare_parameters(expected, parameter_shapes(wrong))
    assert [finding.message for finding in findings] == [
        f"layers.{index}.self_attention.linear_qkv  weight is 512 x 128, expected 384 x 128"
        for index in (0, 1)
    ]
    first = findings[0]
    assert (first.stage, first.severity) == ("build", Severity.ERROR)
    assert first.module == "decoder.layers.0.self_attention.linear_qkv"
    assert (first.expected, first.actual) == ((384, 128), (512, 128))


def test_missing_and_unexpected_parameters_are_found() -> None:
    expected = parameters(model_of(MODELS["Qwen3"]))
    actual = dict(expected)
    del actual["decoder.layers.0.self_attention.q_layernorm.weight"]
    actual["decoder.layers.0.self_attention.linear_qkv.bias"] = (384,)
    assert [finding.message for finding in compare_parameters(expected, actual)] == [
        "layers.0.self_attention.q_layernorm  weight is missing, expected 32",
        "layers.0.self_attention.linear_qkv  bias is 384, and no such parameter is expected",
    ]
