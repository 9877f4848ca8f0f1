from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import MODELS, model_of

from harness.build import build_model
from harness.layout import Layout
from harness.routing import counting, experts, forward_along, forward_and_routes
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import forward, token_ids
from harness.world import open_world

CPU = torch.device("cpu")
# Group-limited routing by biased sigmoid scores, softmax scores with a router bias, and top-1.
ROUTED = ("latent attention", "sinks and windows", "L2 norms and no rope", "gated delta net")


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


def build(name: str) -> Any:
    with captured():
        return build_model(model_of(MODELS[name]), Layout(), CPU)


def tokens() -> torch.Tensor:
    return token_ids(320, 3, 24, CPU)


def router_of(model: Any) -> Any:
    return next(layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router"))


@pytest.mark.parametrize("name", ROUTED)
def test_along_its_own_routes_a_model_gives_the_same(name: str) -> None:
    model = build(name)
    with captured():
        plain = forward(model, tokens())
        first = forward_and_routes(model, tokens())
        again = forward_along(model, first)
    small = model_of(MODELS[name])
    assert small.moe is not None
    layers = sum(layer.mlp == small.moe for layer in small.layers)
    assert [route.shape for route in first.routes] == [(72, small.moe.moe_router_topk)] * layers
    assert torch.equal(plain, first.output) and torch.equal(plain, again)


@pytest.mark.parametrize("name", ROUTED)
def test_a_router_that_changed_its_mind_is_held_to_the_routes(name: str) -> None:
    model = build(name)
    with captured():
        first = forward_and_routes(model, tokens())
        with torch.no_grad():
            weight = router_of(model).weight
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        free, held = forward(model, tokens()), forward_along(model, first)
    before = first.output
    assert not torch.equal(held, before)
    assert (held - before).float().norm() < 0.5 * (free - before).float().norm()


def test_nothing_is_left_behind() -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    model = build("latent attention")
    known = RouterReplay.global_router_replay_instances[:]
    with captured():
        first = forward_and_routes(model, tokens())
        with pytest.raises(ValueError, match="zip"):
            forward_along(model, replace(first, routes=first.routes[:-1]))
    assert router_of(model).router_replay is None
    assert RouterReplay.global_router_replay_instances == known


def test_a_model_without_experts_has_no_routes() -> None:
    model = build("Mamba and MLP")
    with captured():
        first = forward_and_routes(model, tokens())
        assert first.routes == () and list(experts(model)) == []
        assert torch.equal(forward_along(model, first), first.output)


@pytest.mark.parametrize("name", [*ROUTED, "Mamba and latent experts"])
def test_every_token_is_counted_at_each_of_its_experts(name: str) -> None:
    model, small = build(name), model_of(MODELS[name])
    with captured(), counting(model) as seen:
        forward(model, tokens())
    assert small.moe is not None
    layers = sum(layer.mlp == small.moe for layer in small.layers)
    assert len(seen) == layers * small.moe.num_experts
    assert sum(seen.values()) == layers * 72 * small.moe.moe_router_topk
    assert not any(module._forward_pre_hooks for module in model.modules())
