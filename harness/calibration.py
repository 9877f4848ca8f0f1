"""Calibration: a model -> the tokens that it is calibrated with, enough for every expert to see some.

Routing by random weights is uneven, so how many that takes shows only in forward passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, inf
from typing import TYPE_CHECKING

import torch
from torch import nn

from harness.routing import Pass, counting
from harness.trace import BATCH_SIZE, forward, sequence_length, token_ids

if TYPE_CHECKING:
    from harness.architecture import Architecture

# Tokens that each expert sees on average, tried in this order until every one has seen LEAST_TOKENS: an
# algorithm that searches, as AWQ does, runs every matrix many times on all of them.
TOKENS_PER_EXPERT = (4, 16, 32, 64)
LEAST_TOKENS = 2


class Calibration:
    """Runs a model over calibration tokens, as often as an algorithm asks, the same ones each time.

    ``tokens`` are ids, [sequences, length]. ``seen`` counts by path what each expert was given in a round,
    the most of all rounds; empty before the first, as where ModelOpt has no need to run the model.
    """

    def __init__(
        self,
        architecture: Architecture,
        device: torch.device,
        seed: int = 1234,
        length: int | None = None,
        sequences: int | None = None,
    ) -> None:
        """As many ``sequences`` of ``length`` tokens as are given; else as many as ``suffice``."""
        length = length or sequence_length(architecture)
        self._sizes = [sequences] if sequences else _sizes(architecture, length)
        self.tokens = token_ids(architecture.padded_vocab_size, self._sizes[-1], length, device, seed)
        self.seen: Mapping[str, int] = {}

    @property
    def first(self) -> torch.Tensor:
        """The sequences that every calibration begins with, [BATCH_SIZE, length]."""
        return self.tokens[:BATCH_SIZE]

    def suffice(self, model: nn.Module, first: Pass) -> None:
        """Keep no more sequences than it takes for every expert to see LEAST_TOKENS.

        ``first`` is the unquantized model's pass over the first ones.
        """
        seen, done = dict(first.seen), len(first.tokens)
        for size in self._sizes:
            if size > done:
                with counting(model) as more:
                    forward(model, self.tokens[done:size])
                seen, done = {path: count + more[path] for path, count in seen.items()}, size
            if min(seen.values(), default=inf) >= LEAST_TOKENS:
                break
        self.tokens = self.tokens[:size]

    def __call__(self, model: nn.Module) -> None:
        """One round, in one batch: AWQ's search for clips takes a batch of which an expert sees nothing for
        one that it does well on. What ModelOpt calls its forward loop."""
        with counting(model) as seen:
            forward(model, self.tokens)
        self.seen = {path: max(count, self.seen.get(path, 0)) for path, count in seen.items()}


def _sizes(architecture: Architecture, length: int) -> list[int]:
    experts = architecture.moe
    share = experts.num_experts / experts.moe_router_topk if experts else 0
    return sorted({max(BATCH_SIZE, ceil(times * share / length)) for times in TOKENS_PER_EXPERT})
