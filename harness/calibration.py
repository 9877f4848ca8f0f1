"""Calibration: a model -> the tokens that it is calibrated with, enough for every expert to see some.

Routing by random weights is uneven, so how many that takes shows only in the passes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        self._sizes = _sizes(architecture, length, sequences)
        self._grows = sequences is None
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
                if self.sequences is None and self._grows and self.seen.least >= LEAST_TOKENS:
                    self.sequences = end
                    return
        self.sequences = self.sequences or self._sizes[-1]

    def _batches(self) -> Iterator[tuple[int, int]]:
        most = self.sequences or self._sizes[-1]
        return ((start, end) for start, end in pairwise((0, *self._sizes)) if end <= most)


def _sizes(architecture: Architecture, length: int, sequences: int | None) -> list[int]:
    """How many sequences have been run after each batch."""
    experts = architecture.moe
    share = experts.num_experts / experts.moe_router_topk if experts else 0
    sizes = sorted({max(BATCH_SIZE, ceil(times * share / length)) for times in TOKENS_PER_EXPERT})
    if sequences is None:
        return sizes
    return [*(size for size in sizes if size < sequences), sequences]
