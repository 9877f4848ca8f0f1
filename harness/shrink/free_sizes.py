"""Free sizes: what the hidden size leaves open of a model -> feed-forward sizes and vocabularies to try.

Each keeps S4, S7, S8 and S12 beside one hidden size, smallest first; which of them S5 lets stand beside
the others is left to the search in ``shrink.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from math import gcd
from typing import TYPE_CHECKING, Any

from harness.layers import Dense, MoE
from harness.shrink.dimensions import BLOCK
from harness.shrink.invariants import ffn_ratio_kept
from harness.shrink.mixer_sizes import same_class

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from harness.architecture import Architecture
    from harness.layout import Layout

# Candidates looked at per size, S5 rarely rules out more than two; and sizes tried until there are as many.
_CANDIDATES = 8
_TRIED = 64


@dataclass(frozen=True, slots=True)
class FreeSize:
    """One argument, the sizes it may have, and the names of S5 that it decides, each a multiple of it.

    ``keeps`` judges any size, also one that is not among the first few; ``elements`` is what one more of it
    adds to the matrices, given the sizes chosen before.
    """

    dest: str
    names: Mapping[str, int]
    candidates: tuple[int, ...]
    keeps: Callable[[int], bool]
    elements: Callable[[Mapping[str, Any]], int]


def free_sizes(
    before: Architecture, layout: Layout, hidden: int, kinds: Mapping[str, int], experts: int
) -> Iterator[FreeSize]:
    """Every free size beside ``hidden``; ``kinds`` counts the layers left, ``experts`` those of each."""
    dense, moe, tp = before.dense, before.moe, layout.tp
    yield _feed_forward(
        "ffn_hidden_size",
        {} if dense is None else {"ffn": 1, "fc1": _rows(dense)},
        before.arguments["ffn_hidden_size"],
        (before.hidden_size, hidden),
        tp,
        lambda chosen: kinds["dense"] * hidden * _matrices(dense),
    )
    if moe is not None:
        yield from _experts(moe, before, layout, hidden, kinds["moe"], experts)
    size = before.padded_vocab_size

    def keeps_order(small: int) -> bool:
        kept = (small > hidden, small == hidden) == (size > before.hidden_size, size == before.hidden_size)
        return kept and same_class(size, small, BLOCK * tp)

    tables = 1 if before.tied_embeddings else 2
    least = hidden if size >= before.hidden_size else 1
    most = size if size > before.hidden_size else hidden
    candidates = _smallest(size, BLOCK * tp, least, most, keeps_order)
    yield FreeSize(
        "padded_vocab_size", {"vocabulary": 1}, candidates, keeps_order, lambda chosen: tables * hidden
    )


def _experts(
    moe: MoE, before: Architecture, layout: Layout, hidden: int, layers: int, experts: int
) -> Iterator[FreeSize]:
    real = (before.hidden_size, hidden)
    if moe.latent_size is not None:
        names = {"expert latent": 1}
        yield _feed_forward(
            "moe_latent_size", names, moe.latent_size, real, layout.tp, lambda chosen: layers * 2 * hidden
        )
    yield _feed_forward(
        "moe_ffn_hidden_size",
        {"expert ffn": 1, "expert fc1": _rows(moe.expert)},
        moe.expert.ffn_hidden_size,
        real,
        layout.etp,
        lambda chosen: layers * experts * chosen.get("moe_latent_size", hidden) * _matrices(moe.expert),
    )
    if moe.shared is not None:
        yield _feed_forward(
            "moe_shared_expert_intermediate_size",
            {"shared ffn": 1, "shared fc1": _rows(moe.shared)},
            moe.shared.ffn_hidden_size,
            real,
            layout.tp,
            lambda chosen: layers * hidden * _matrices(moe.shared),
        )


def _feed_forward(
    dest: str,
    names: Mapping[str, int],
    size: int,
    hidden: tuple[int, int],
    ranks: int,
    elements: Callable[[Mapping[str, Any]], int],
) -> FreeSize:
    """A size that keeps its ratio to the hidden size (S8); ``hidden`` is the real one and the small one."""
    large, small = hidden
    unit = BLOCK * ranks

    def keeps(candidate: int) -> bool:
        return ffn_ratio_kept(size, large, candidate, small) and same_class(size, candidate, unit)

    least, most = size * small // (2 * large), 2 * size * small // large
    if size == large:
        least = most = small
    return FreeSize(dest, names, _smallest(size, unit, least, most, keeps), keeps, elements)


def _smallest(size: int, unit: int, least: int, most: int, keeps: Callable[[int], bool]) -> tuple[int, ...]:
    """The smallest few sizes that may replace ``size``, from about ``least`` to ``most``, and itself.

    With the real size S5 can always be kept.
    """
    step = gcd(size, unit)
    start = max(step, least // step * step)
    tried = range(start, min(size, most) + 1, step)[:_TRIED]
    fitting = (small for small in tried if keeps(small))
    found = [*islice(fitting, _CANDIDATES)]
    if keeps(size) and size not in found:
        found.append(size)
    return tuple(found)


def _rows(dense: Dense) -> int:
    return 2 if dense.gated else 1


def _matrices(dense: Dense | None) -> int:
    return 0 if dense is None else 1 + _rows(dense)
