"""The inventory against megatron-core itself: every preset on the meta device, odd small models."""

from __future__ import annotations

import tomllib

import pytest
import torch
from full_size import CPU, PRESETS, Shape, megatron_model
from published import of_preset
from small_models import MODELS, model_of
from torch import nn

from harness.activations import activations
from harness.architecture import Architecture, architecture
from harness.arguments import resolve
from harness.build import build_model, compare_parameters, parameter_shapes
from harness.inventory import Counts, buffers, counts, parameters
from harness.layout import Layout
from harness.preset import PresetFile
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world


def small(**changes: object) -> Architecture:
    arguments, _ = resolve(())
    base = {
        "num_layers": 3,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 32,
        "max_position_embeddings": 128,
        "padded_vocab_size": 192,
        "bf16": True,
    }
    return architecture(arguments.replaced({**base, **changes}))


def built(full: Architecture) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Names and shapes of Megatron's parameters and of its expert biases, of a small model."""
    with captured(), installed(CPU), open_world(Layout(), CPU):
        model = build_model(full, Layout(), CPU)
    return parameter_shapes(model), expert_biases(model)


def expert_biases(model: nn.Module) -> dict[str, Shape]:
    return {
        name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name.endswith("expert_bias")
    }


VARIANTS = {
    "biases-and-layernorm": {},
    "tied-rope": {"position_embedding_type": "rope"},
    "untied": {"untie_embeddings_and_output_weights": True},
    "rmsnorm-without-bias": {"normalization": "RMSNorm", "add_bias_linear": False, "add_qkv_bias": False},
    "qkv-bias-only": {"add_bias_linear": False, "add_qkv_bias": True},
    "swiglu": {"swiglu": True},
    "squared-relu": {"squared_relu": True, "bias_gelu_fusion": False, "add_bias_linear": False},
    "qk-layernorm": {"qk_layernorm": True},
    "multi-head": {"group_query_attention": False, "num_query_groups": 4},
    "experts": {"num_experts": 4, "moe_ffn_hidden_size": 48, "add_bias_linear": False, "add_qkv_bias": False},
    "dense-then-experts": {
        "num_experts": 4,
        "moe_ffn_hidden_size": 48,
        "moe_layer_freq": (0, 1, 1),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
    },
    "shared-expert": {
        "num_experts": 4,
        "moe_ffn_hidden_size": 48,
        "moe_shared_expert_intermediate_size": 80,
        "moe_shared_expert_gate": True,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_is_megatrons(changes: dict[str, object]) -> None:
    full = small(**changes)
    expected = parameters(full)
    assert expected == built(full)[0]
    assert counts(full).total == sum(torch.Size(shape).numel() for shape in expected.values())


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer_is_megatrons(name: str) -> None:
    full = model_of(MODELS[name])
    shapes, biases = built(full)
    assert parameters(full) == shapes
    assert buffers(full) == biases
    assert counts(full).total == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert counts(full).buffers == sum(torch.Size(shape).numel() for shape in biases.values())


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_full_size_is_megatrons_on_the_meta_device(file: PresetFile) -> None:
    """Every layer and every expert of every preset."""
    full = of_preset(file)
    with megatron_model(full) as model:
        assert compare_parameters(parameters(full), parameter_shapes(model)) == ()
        assert buffers(full) == expert_biases(model)


def published(file: PresetFile) -> dict[str, int]:
    facts = file.path.with_suffix(".toml")
    return tomllib.loads(facts.read_text()).get("params", {}) if facts.is_file() else {}


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_published_counts_are_parameters_and_expert_biases(file: PresetFile) -> None:
    """One rule for all publishers: their totals hold the expert biases, and every token uses them all."""
    counted, params = counts(of_preset(file)), published(file)
    if not {"total", "text_total"} & params.keys():
        pytest.skip("no exact count is published")
    assert params.get("text_total", params.get("total")) == counted.total + counted.buffers
    active = params.get("text_active", params.get("active"))
    if active is not None:
        assert active == counted.active + counted.buffers


def test_active_parameters_count_the_top_k_experts() -> None:
    full = small(**{**VARIANTS["experts"], "moe_router_topk": 2})
    expert = 2 * 64 * 48
    assert counts(full).total - counts(full).active == 3 * 2 * expert


def test_latent_experts_are_counted_in_the_latent() -> None:
    full = model_of(MODELS["Mamba and latent experts"])
    assert full.moe is not None
    experts_per_layer, latent, width = full.moe.num_experts, 64, 128
    expert = 2 * latent * width
    unused = 2 * (experts_per_layer - full.moe.moe_router_topk) * expert
    assert counts(full).total - counts(full).active == unused
    assert counts(full).buffers == 2 * experts_per_layer


def test_a_model_without_expert_bias_has_no_buffers() -> None:
    full = small(**VARIANTS["experts"])
    assert buffers(full) == {} and counts(full).buffers == Counts(1, 1).buffers == 0


@pytest.mark.parametrize("name", MODELS)
def test_activations_name_modules_of_the_built_model(name: str) -> None:
    full = model_of(MODELS[name])
    with captured(), installed(CPU), open_world(Layout(), CPU):
        modules = {name for name, _ in build_model(full, Layout(), CPU).named_modules()}
    assert set(activations(full, sequence_length=8, batch_size=2)) <= modules
