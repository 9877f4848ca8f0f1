"""Roles: every module that holds a matrix says by its path what it is for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from small_models import MODELS, model_of

from harness.build import build_model
from harness.inventory import parameters
from harness.layout import Layout
from harness.roles import Role, is_part, role_of, spoken_of
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world

PATHS = {
    "decoder.layers.0.self_attention.linear_qkv": Role.QKV,
    "decoder.layers.0.self_attention.linear_q_proj": Role.QKV,
    "decoder.layers.0.self_attention.linear_proj": Role.PROJ,
    "decoder.layers.0.self_attention.linear_q_down_proj": Role.LATENT_DOWN,
    "decoder.layers.0.self_attention.linear_kv_down_proj": Role.LATENT_DOWN,
    "decoder.layers.0.self_attention.linear_q_up_proj": Role.LATENT_UP,
    "decoder.layers.0.self_attention.linear_kv_up_proj": Role.LATENT_UP,
    "decoder.layers.0.self_attention.in_proj": Role.DELTA_IN,
    "decoder.layers.0.self_attention.out_proj": Role.DELTA_OUT,
    "decoder.layers.0.self_attention.conv1d": Role.DELTA_CONV,
    "decoder.layers.0.self_attention.core_attention": Role.KV,
    "decoder.layers.0.mixer.in_proj": Role.MAMBA_IN,
    "decoder.layers.0.mixer.out_proj": Role.MAMBA_OUT,
    "decoder.layers.0.mixer.conv1d_weight": Role.MAMBA_CONV,
    "decoder.layers.0.mlp.linear_fc1": Role.FC1,
    "decoder.layers.0.mlp.linear_fc2": Role.FC2,
    "decoder.layers.0.mlp.router": Role.ROUTER,
    "decoder.layers.0.mlp.fc1_latent_proj": Role.EXPERT_LATENT_IN,
    "decoder.layers.0.mlp.fc2_latent_proj": Role.EXPERT_LATENT_OUT,
    "decoder.layers.0.mlp.experts.local_experts.11.linear_fc1": Role.EXPERT_FC1,
    "decoder.layers.0.mlp.experts.local_experts.11.linear_fc2": Role.EXPERT_FC2,
    "decoder.layers.0.mlp.experts.linear_fc1": Role.EXPERT_FC1,
    "decoder.layers.0.mlp.shared_experts.linear_fc1": Role.SHARED_FC1,
    "decoder.layers.0.mlp.shared_experts.linear_fc2": Role.SHARED_FC2,
    "decoder.layers.0.mlp.shared_experts.gate_weight": Role.SHARED_GATE,
    "embedding.word_embeddings": Role.EMBEDDING,
    "embedding.position_embeddings": Role.POSITIONS,
    "output_layer": Role.OUTPUT,
    "decoder.layers.0.input_layernorm": None,
    "decoder.layers.0.mlp": None,
    "decoder.layers.0.mlp.experts": None,
    "decoder.layers.0.mlp.experts.local_experts.0": None,
    "decoder.layers.0.self_attention.q_layernorm": None,
    "decoder.layers.0.mixer.norm": None,
    "linear_fc1_of_something_else": None,
    "": None,
}


@pytest.mark.parametrize(("path", "role"), PATHS.items(), ids=str)
def test_role_of_a_module(path: str, role: Role | None) -> None:
    assert role_of(path) is role


@pytest.mark.parametrize("below", ("weight", "weight0", "weight_quantizer", "weight_quantizer.1._amax"))
def test_a_parameter_and_a_quantizer_have_their_modules_role(below: str) -> None:
    assert role_of(f"module.module.decoder.layers.3.mlp.linear_fc2.{below}") is Role.FC2


def test_a_cache_quantizer_is_of_the_core_of_attention() -> None:
    assert role_of("decoder.layers.0.self_attention.core_attention.k_bmm_quantizer") is Role.KV


def test_every_role_is_tested() -> None:
    assert set(Role) <= set(PATHS.values())


def test_only_routed_experts_are_routed() -> None:
    assert [role for role in Role if role.routed] == [Role.EXPERT_FC1, Role.EXPERT_FC2]


def test_no_torch() -> None:
    code = "import sys, harness.roles; assert not {'torch', 'modelopt'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_has_a_role(name: str) -> None:
    shapes = parameters(model_of(MODELS[name]))
    without = {path for path, shape in shapes.items() if len(shape) > 1 and role_of(path) is None}
    assert without == set()


@pytest.mark.parametrize("name", MODELS)
def test_modelopt_converts_what_the_role_says(name: str) -> None:
    """And nothing that holds a matrix is without a role, the core of attention apart."""
    cpu = torch.device("cpu")
    with installed(cpu), open_world(Layout(), cpu), captured():
        from modelopt.torch.quantization.nn import QuantModuleRegistry

        model = build_model(model_of(MODELS[name]), Layout(), cpu, 1)
        wrong = {
            path: role
            for path, module in model.named_modules()
            if (role := role_of(path)) is not None
            and role is not Role.KV
            and (type(module) in QuantModuleRegistry) != role.convertible
        }
        unnamed = {
            path
            for path, module in model.named_modules()
            if type(module) in QuantModuleRegistry and role_of(path) is None and holds_a_matrix(module)
        }
    assert (wrong, unnamed) == ({}, set())


def holds_a_matrix(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() > 1


SPOKEN = {
    "*mlp.experts*input_quantizer": Role.EXPERT_FC1,
    "*block_sparse_moe*weight_quantizer": Role.EXPERT_FC1,
    "*mlp.shared_expert.*": Role.SHARED_FC1,
    "*mlp.shared_expert_gate.*": Role.SHARED_GATE,
    "*mlp.gate.*": Role.ROUTER,
    "*mlp.gate_proj.weight_quantizer": Role.FC1,
    "*.mixer.down_proj.input_quantizer": Role.FC2,
    "*mixer.in_proj*weight_quantizer": Role.MAMBA_IN,
    "*linear_attn.in_proj_z*": Role.DELTA_IN,
    "*self_attn.kv_b_proj*weight_quantizer": Role.LATENT_UP,
    "*self_attn.q_a_proj*weight_quantizer": Role.LATENT_DOWN,
    "*self_attn.q_proj*weight_quantizer": Role.QKV,
    "*o_proj*weight_quantizer": Role.PROJ,
    "*self_attn*weight_quantizer": Role.QKV,
    "*[kv]_bmm_quantizer": Role.KV,
    "*lm_head*": Role.OUTPUT,
    "*layers.3.mlp*": Role.FC1,
    "*fc2_latent_proj*": Role.EXPERT_LATENT_IN,
    "*weight_quantizer": None,
    "*": None,
    "*vision_tower*": None,
}


@pytest.mark.parametrize(("pattern", "role"), SPOKEN.items(), ids=str)
def test_what_a_pattern_speaks_of(pattern: str, role: Role | None) -> None:
    assert next(iter(spoken_of(pattern)), None) is role


def test_names_of_parts() -> None:
    names = ("linear_qkv", "linear_kv_up_proj", "in_proj", "gate_weight", "experts", "x_proj", "linear_fc3")
    assert [name for name in names if is_part(name)] == [
        "linear_qkv",
        "linear_kv_up_proj",
        "in_proj",
        "gate_weight",
    ]
