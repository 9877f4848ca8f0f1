"""Routing: which experts each token goes to - counted while a model calibrates, and held still.

A token whose scores nearly tie goes elsewhere after any rounding, and its output is then another
function's. Held to the routes of an earlier pass, the outputs differ by the rounding alone.
"""

from __future__ import annotations

import math
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


class TokenCount:
    """Counts what each expert sees in forward passes, by module path, and the passes.

    ModelOpt's amax does not show it: an expert without tokens gets the amax of its neighbours.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_expert: Mapping[str, int] = {name: 0 for name, _ in experts(model)}
        self.passes = 0
        self._round: dict[str, int] = {}

    @property
    def least(self) -> float:
        """What the expert that saw least has seen in this round; infinite where there are no experts."""
        return min(self._round.values(), default=math.inf)

    @contextmanager
    def of_one_round(self) -> Iterator[None]:
        """What an algorithm runs more than once counts once: the most that one of its rounds had."""
        self._round = dict.fromkeys(self.by_expert, 0)
        yield
        self.by_expert = {name: max(count, self._round[name]) for name, count in self.by_expert.items()}

    def forward(self, model: nn.Module, tokens: torch.Tensor) -> None:
        """One pass, counted in the round that is under way."""
        self.passes += 1
        handles = [
            expert.register_forward_pre_hook(_counting(self._round, name)) for name, expert in experts(model)
        ]
        try:
            forward(model, tokens)
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
    def hook(module: nn.Module, args: Any) -> None:
        counts[name] += args[0].shape[0]

    return hook


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass: token ids [batch, sequence], what ``trace.forward`` gave, and where routers sent each
    token."""

    tokens: torch.Tensor
    output: torch.Tensor
    routes: Routes


def forward_and_routes(model: nn.Module, tokens: torch.Tensor) -> Pass:
    """A pass in which every token goes where the routers send it."""
    with _replays(model, RouterReplayAction.RECORD) as replays:
        output = forward(model, tokens)
        return Pass(tokens, output, tuple(replay.get_recorded_indices() for replay in replays))


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
