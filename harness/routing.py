"""Routing: which experts each token goes to - counted while a model calibrates, and held still.

A token whose scores nearly tie goes elsewhere after any rounding, and its output is then another
function's. Held to the routes of an earlier pass, the outputs differ by the rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.standins.output import import_foreign
from harness.trace import forward

import_foreign()

from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction  # noqa: E402

# Of each router in model order, the experts of every token: [tokens, top-k].
Routes = tuple[torch.Tensor, ...]


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, int]]:
    """The tokens that each expert is given in the forward passes made meanwhile, by module path.

    ModelOpt's amax does not show it: an expert without tokens gets the amax of its neighbours.
    """
    counts: dict[str, int] = {}
    handles = [expert.register_forward_pre_hook(_counting(counts, name)) for name, expert in experts(model)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every routed expert with its path, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, SequentialMLP):
            for index, expert in enumerate(module.local_experts):
                yield f"{name}.local_experts.{index}", expert


def _counting(counts: dict[str, int], name: str) -> Callable[[nn.Module, Any], None]:
    counts[name] = 0

    def hook(module: nn.Module, args: Any) -> None:
        counts[name] += args[0].shape[0]

    return hook


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass: token ids [batch, sequence], what ``trace.forward`` gave, where routers sent each
    token, and how many each expert saw, by path."""

    tokens: torch.Tensor
    output: torch.Tensor
    routes: Routes
    seen: Mapping[str, int]


def forward_and_routes(model: nn.Module, tokens: torch.Tensor) -> Pass:
    """A pass in which every token goes where the routers send it."""
    with _replays(model, RouterReplayAction.RECORD) as replays, counting(model) as seen:
        output = forward(model, tokens)
        return Pass(tokens, output, tuple(replay.get_recorded_indices() for replay in replays), seen)


def forward_along(model: nn.Module, first: Pass) -> torch.Tensor:
    """The output for the tokens of ``first``, each sent where it went then.

    The weights of its experts are what the routers now say.
    """
    with _replays(model, RouterReplayAction.REPLAY_FORWARD) as replays:
        for replay, indices in zip(replays, first.routes, strict=True):
            replay.set_target_indices(indices)
        return forward(model, first.tokens)


@contextmanager
def _replays(model: nn.Module, action: RouterReplayAction) -> Iterator[list[RouterReplay]]:
    """Megatron's own means of replaying routes, on every router for a while."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    known = RouterReplay.global_router_replay_instances[:]
    own = [router.router_replay for router in routers]
    replays = [RouterReplay() for _ in routers]
    RouterReplay.global_router_replay_instances[:] = known
    for router, replay in zip(routers, replays, strict=True):
        replay.set_router_replay_action(action)
        router.router_replay = replay
    try:
        yield replays
    finally:
        for router, before in zip(routers, own, strict=True):
            router.router_replay = before
