"""Corrections: where transformers' plain code computes something else than its own kernels, and made so.

A publisher's model runs through the kernels; on a machine without them transformers takes a path in plain
torch. Each row says in words what that path does wrong, and they go into the report. Corrections of what
the publisher's own code does otherwise stand in ``hf_corrections.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Correction:
    """Which modules are concerned, what is wrong with them, and how one is put right for a sequence."""

    concerns: Callable[[Any], bool]
    words: str
    correct: Callable[[Any, int], None]


def correct(published: nn.Module, sequence: int) -> tuple[str, ...]:
    """Put right what concerns ``published``, for sequences of so many tokens; the words of it."""
    return tuple(dict.fromkeys(_corrected(published, sequence)))


def _corrected(published: nn.Module, sequence: int) -> Iterator[str]:
    for module in published.modules():
        for row in CORRECTIONS:
            if row.concerns(module):
                row.correct(module, sequence)
                yield row.words


def _is_plain_mamba(module: Any) -> bool:
    return hasattr(module, "A_log") and hasattr(module, "chunk_size") and hasattr(module, "time_step_min")


def _one_chunk(module: Any, sequence: int) -> None:
    module.chunk_size = sequence


def _clamped_by_limit(module: Any, sequence: int) -> None:
    module.time_step_min = module.time_step_limit[0]


CORRECTIONS: tuple[Correction, ...] = (
    Correction(
        _is_plain_mamba,
        "transformers' plain Mamba scan adds the states of chunks up over the wrong axis: it has one chunk",
        _one_chunk,
    ),
    Correction(
        _is_plain_mamba,
        "transformers' plain Mamba scan keeps time steps above time_step_min, its kernels within "
        "time_step_limit: the limit holds",
        _clamped_by_limit,
    ),
)
