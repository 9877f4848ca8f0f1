from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from harness.architecture import Architecture, architecture
from harness.arguments import resolve
from harness.build import (
    OVERRIDES,
    build_model,
    compare_parameters,
    parameter_shapes,
    transformer_config,
)
from harness.errors import UnsupportedModel
from harness.finding import Severity
from harness.flags import parse_flags
from harness.inventory import parameters
from harness.layout import Layout
from harness.shell import Word
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world

CPU = torch.device("cpu")

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


def model_of(flags: str) -> Architecture:
    parsed, wrong = parse_flags([Word(word, 1, 1, False) for word in flags.split()])
    arguments, refused = resolve(parsed)
    assert not [finding for finding in (*wrong, *refused) if finding.is_error]
    return architecture(arguments)


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


def megatrons_own(flags: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What Megatron's parser and validation make of ``flags``, and the ModelOpt flags' defaults."""
    from megatron.training.arguments import parse_args, validate_args

    monkeypatch.setattr(sys, "argv", ["quantize.py", *flags.split(), "--tokenizer-model", "x"])
    with captured():
        arguments = parse_args()
        validate_args(arguments, {"no_load_rng": True, "no_load_optim": True})
    assert isinstance(arguments, argparse.Namespace)
    return arguments


@pytest.mark.parametrize("name", [*MODELS, "Qwen3-8B"])
def test_config_is_megatrons_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real parser and the real validation, but for the overrides."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    flags = {**MODELS, "Qwen3-8B": QWEN3_8B}[name]
    if "--micro-batch-size" not in flags:
        flags += " --micro-batch-size 1 --tokenizer-type HuggingFaceTokenizer"
    namespace = megatrons_own(flags, monkeypatch)
    for override in OVERRIDES:
        if override.applies(CPU):
            setattr(namespace, override.dest, override.value(Layout()))
    expected = core_transformer_config_from_args(namespace)
    actual = transformer_config(arguments_of(flags), Layout(), CPU)
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
    ("dest", "value"),
    [("multi_latent_attention", True), ("export_model_type", "HybridModel"), ("mtp_num_layers", 1)],
)
def test_kinds_of_model_that_cannot_be_built_yet(dest: str, value: object) -> None:
    with pytest.raises(
        UnsupportedModel, match=f"{dest} {value!r} makes a model that the harness cannot build yet"
    ):
        transformer_config({**arguments_of(MODELS["Qwen3"]), dest: value}, Layout(), CPU)


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
    assert kinds[layer + "self_attention.core_attention"] == "DotProductAttention"
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


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_filled_so_that_it_shows(name: str) -> None:
    model = build(MODELS[name])
    centred = model.config.layernorm_zero_centered_gamma
    for path, parameter in model.named_parameters():
        values = parameter.detach().float()
        assert torch.isfinite(values).all(), path
        assert values.std() > 0, path
        if path.endswith("norm.weight"):
            assert abs(float(values.mean()) - (0 if centred else 1)) < 0.1, path
        elif path.startswith("embedding."):
            assert 0.9 < values.std() < 1.1, path
        elif parameter.ndim == 2:
            assert 0.8 < values.std() * parameter.shape[-1] ** 0.5 < 1.2, path


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build(MODELS["Qwen3"], seed=7).state_dict()
    torch.manual_seed(2)
    same, other = (build(MODELS["Qwen3"], seed).state_dict() for seed in (7, 8))
    weights = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(one[name], same[name]) for name in weights)
    assert not any(torch.equal(one[name], other[name]) for name in weights)
    assert not torch.equal(*(one[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1)))


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
