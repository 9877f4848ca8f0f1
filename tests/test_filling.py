from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import MODELS, model_of

from harness.build import build_model
from harness.layout import Layout
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import forward, token_ids
from harness.world import open_world

CPU = torch.device("cpu")
ROUTED = "latent attention"


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


def build(name: str, seed: int = 1234) -> Any:
    with captured():
        return build_model(model_of(MODELS[name]), Layout(), CPU, seed)


def logits(model: Any) -> torch.Tensor:
    with captured():
        return forward(model, token_ids(320, 3, 24, CPU))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_filled_so_that_it_shows(name: str) -> None:
    model = build(name)
    centred = model.config.layernorm_zero_centered_gamma
    for path, parameter in model.named_parameters():
        values, last = parameter.detach().float(), path.rpartition(".")[2]
        assert torch.isfinite(values).all(), path
        assert values.std() > 0, path
        if last in ("A_log", "dt_bias", "D", "softmax_offset"):
            continue
        if path.endswith("norm.weight"):
            factor = 0 if centred and ".mixer." not in path else 1
            assert abs(float(values.mean()) - factor) < 0.1, path
        elif path.startswith("embedding."):
            assert 0.9 < values.std() < 1.1, path
        elif parameter.ndim > 1:
            assert 0.8 < values.std() * parameter.shape[-1] ** 0.5 < 1.2, path


def test_a_recurrent_mixer_remembers_some_tokens() -> None:
    """A change of one token still shows many tokens later, and less with every token."""
    model = build("Mamba and MLP")
    mixer = model.decoder.layers[0].mixer
    step = torch.nn.functional.softplus(mixer.dt_bias.float())
    kept = torch.exp(-step * mixer.A_log.float().exp())
    assert (kept > 0.5).all() and (kept < 0.99).all()
    assert (mixer.D.float() - 1).abs().max() < 0.5


def test_a_mambas_own_norm_is_never_stored_less_one() -> None:
    small = model_of(MODELS["Mamba and MLP"])
    centred = small.arguments.replaced({"layernorm_zero_centered_gamma": True})
    with captured():
        model = build_model(dataclasses.replace(small, arguments=centred), Layout(), CPU)
    assert abs(float(model.decoder.layers[0].mixer.norm.weight.detach().float().mean()) - 1) < 0.1
    assert abs(float(model.decoder.layers[0].norm.weight.detach().float().mean())) < 0.1


# Two layers of experts: without either's bias some token goes elsewhere.
def test_expert_biases_are_float32_and_show() -> None:
    model = build(ROUTED)
    bias = model.decoder.layers[1].mlp.router.expert_bias
    assert bias.dtype == torch.float32
    assert float(bias.abs().min()) > 0 and float(bias.abs().max()) < 0.1
    assert torch.equal(bias, build(ROUTED).decoder.layers[1].mlp.router.expert_bias)
    before = logits(model)
    bias.zero_()
    assert not torch.equal(before, logits(model))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("sinks and windows", "decoder.layers.0.self_attention.core_attention.softmax_offset"),
        ("Mamba and MLP", "decoder.layers.0.mixer.A_log"),
        ("Mamba and MLP", "decoder.layers.0.mixer.dt_bias"),
        ("Mamba and MLP", "decoder.layers.0.mixer.D"),
        ("Mamba and MLP", "decoder.layers.0.mixer.conv1d_bias"),
        ("gated delta net", "decoder.layers.0.self_attention.A_log"),
        ("gated delta net", "decoder.layers.0.self_attention.dt_bias"),
        ("gated delta net", "decoder.layers.0.self_attention.conv1d.weight"),
        ("gated delta net", "decoder.layers.1.mlp.shared_experts.gate_weight"),
        ("sinks and windows", "decoder.layers.0.mlp.router.bias"),
    ],
)
def test_leaving_one_out_shows(name: str, path: str) -> None:
    model = build(name)
    before = logits(model).float()
    with torch.no_grad():
        model.get_parameter(path).zero_()
    assert (logits(model).float() - before).norm() > 0.01 * before.norm()


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build(ROUTED, seed=7).state_dict()
    torch.manual_seed(2)
    same, other = (build(ROUTED, seed).state_dict() for seed in (7, 8))
    weights = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    assert any(name.endswith("expert_bias") for name in weights)
    assert all(torch.equal(one[name], same[name]) for name in weights)
    assert not any(torch.equal(one[name], other[name]) for name in weights)
    assert not torch.equal(*(one[f"decoder.layers.{i}.self_attention.linear_proj.weight"] for i in (0, 1)))
