"""Calibration: a model -> the tokens that it is calibrated with, enough for every expert to see some.

Routing by random weights is uneven, so how many that takes shows only in the passes themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import nn

from harness.routing import TokenCount
from harness.trace import BATCH_SIZE, sequence_length, token_ids

if TYPE_CHECKING:
    from harness.architecture import Architecture

# Tokens that each expert sees on average, tried in this order until every one has seen LEAST_TOKENS: an
# algorithm that searches, as AWQ does, runs every matrix many times on all of them.
TOKENS_PER_EXPERT = (4, 8, 16, 32, 64)
LEAST_TOKENS = 2


class Calibration:
    """Runs a model over calibration tokens, as often as an algorithm asks, the same ones each time.

    ``tokens`` are ids, [sequences, length]; ``sequences`` counts those that were run, and is None before
    the first call. ``seen`` counts what each expert was given.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        device: torch.device,
        seed: int = 1234,
        length: int | None = None,
        sequences: int | None = None,
    ) -> None:
        """As many ``sequences`` of ``length`` tokens as are given; else as many as it takes."""
        length = length or sequence_length(architecture)
        # How many sequences have been run after each batch of the first round.
        self._sizes = [sequences] if sequences else _sizes(architecture, length)
        self.tokens = token_ids(architecture.padded_vocab_size, self._sizes[-1], length, device, seed)
        self.sequences: int | None = None
        self.seen = TokenCount(model)

    @property
    def first(self) -> torch.Tensor:
        """The sequences that every calibration begins with, [BATCH_SIZE, length]."""
        return self.tokens[:BATCH_SIZE]

    def __call__(self, model: nn.Module) -> None:
        """One round; what ModelOpt calls its forward loop."""
        with self.seen.of_one_round():
            for start, end in self._batches():
                self.seen.forward(model, self.tokens[start:end])
                if self.seen.least >= LEAST_TOKENS:
                    break
        self.sequences = end

    def _batches(self) -> Iterable[tuple[int, int]]:
        # Once it is known how many it takes, they go at once, as algorithms search anew for each batch.
        return pairwise((0, *([self.sequences] if self.sequences else self._sizes)))


def _sizes(architecture: Architecture, length: int) -> list[int]:
    experts = architecture.moe
    share = experts.num_experts / experts.moe_router_topk if experts else 0
    return sorted({max(BATCH_SIZE, ceil(times * share / length)) for times in TOKENS_PER_EXPERT})
