"""The inventory against megatron-core itself: full-size models on the meta device, and odd small ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.architecture import Architecture, architecture
from harness.arguments import resolve
from harness.build import build_model, compare_parameters, parameter_shapes
from harness.inventory import activations, counts, parameters
from harness.layout import Layout
from harness.preset import PresetFile, discover, load_preset
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world

PRESETS = discover(Path(__file__).parent.parent / "presets")
CPU = torch.device("cpu")


def of_preset(file: PresetFile) -> Architecture:
    arguments = load_preset(file).arguments
    assert arguments is not None
    return architecture(arguments)


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


def built_shapes(full: Architecture) -> dict[str, tuple[int, ...]]:
    with captured(), installed(CPU), open_world(Layout(), CPU):
        return parameter_shapes(build_model(full, Layout(), CPU))


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
    assert expected == built_shapes(full)
    assert counts(full).total == sum(torch.Size(shape).numel() for shape in expected.values())


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_full_size_parameters_are_megatrons_on_the_meta_device(file: PresetFile) -> None:
    full = of_preset(file)
    with captured(), installed(CPU), open_world(Layout(), CPU), torch.device("meta"):
        actual = parameter_shapes(build_model(full, Layout(), torch.device("meta")))
    assert compare_parameters(parameters(full), actual) == ()


def test_active_parameters_count_the_top_k_experts() -> None:
    full = small(**{**VARIANTS["experts"], "moe_router_topk": 2})
    expert = 2 * 64 * 48
    assert counts(full).total - counts(full).active == 3 * 2 * expert


def test_activations_name_modules_of_the_built_model() -> None:
    full = small(**VARIANTS["shared-expert"], qk_layernorm=True)
    with captured(), installed(CPU), open_world(Layout(), CPU):
        modules = {name for name, _ in build_model(full, Layout(), CPU).named_modules()}
    assert set(activations(full, sequence_length=8, batch_size=2)) <= modules
