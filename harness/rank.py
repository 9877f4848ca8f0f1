"""Rank: one process of a layout, and what falls to it: its part of a split and its layers.

The order of ranks is Megatron's (``tp-cp-ep-dp-pp``, ``core/parallel_state.py``): tensor ranks lie next to
each other, pipeline stages farthest apart, and the experts' ranks are cut from the same row anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import UnknownLayout

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layout import Layout


@dataclass(frozen=True, slots=True)
class Rank:
    """Where rank ``number`` stands on each axis of its layout, each from zero."""

    number: int
    tp: int = 0
    cp: int = 0
    pp: int = 0
    etp: int = 0
    ep: int = 0


def rank_of(layout: Layout, number: int) -> Rank:
    """Coordinates of one rank of the layout's own world. Raises IndexError outside of it."""
    world = layout.world_size
    if not 0 <= number < world:
        raise IndexError(f"layout {layout} has ranks 0 to {world - 1}, not {number}")
    pp, within = divmod(number, world // layout.pp)
    return Rank(
        number,
        tp=within % layout.tp,
        cp=within // layout.tp % layout.cp,
        pp=pp,
        etp=within % layout.etp,
        ep=within // layout.etp % layout.ep,
    )


def ranks(layout: Layout) -> tuple[Rank, ...]:
    """Every rank of a layout, in order."""
    return tuple(rank_of(layout, number) for number in range(layout.world_size))


def ranks_named(text: str, layout: Layout) -> tuple[Rank, ...]:
    """Ranks of a layout as a user names them: ``first``, of each pipeline stage; ``all``; or ``0,5``.

    Raises UnknownLayout where the layout has no such rank.
    """
    world = layout.world_size
    if text == "all":
        return ranks(layout)
    if text == "first":
        return tuple(rank_of(layout, stage * (world // layout.pp)) for stage in range(layout.pp))
    numbers = [int(word) if word.strip().isdecimal() else world for word in text.split(",")]
    if max(numbers) >= world:
        raise UnknownLayout(
            f"ranks {text!r}: write first, all, real, or numbers below {world} for layout {layout}, as in 0,1"
        )
    return tuple(rank_of(layout, number) for number in sorted(set(numbers)))


class UnevenStages(ValueError):
    """The layers do not fall on the pipeline stages; the text says why."""


def stages(num_layers: int, layout: Layout, pattern: str | None = None) -> tuple[range, ...]:
    """The layers of each pipeline stage, by index.

    ``pattern`` is a hybrid model's, whose ``|`` decide where they are there; at pp1 they make way, and all
    layers are one stage. Raises UnevenStages where Megatron refuses (``get_num_layers_to_build``,
    ``TransformerConfig``, ``select_pipeline_segment``), and for a first or last stage of more layers than
    the model has, of which Megatron would build them all the same.
    """
    main = (pattern or "").partition("/")[0]
    if "|" in main and layout.pp > 1:
        return _marked(main, layout)
    sizes = _sizes(num_layers, layout)
    starts = [sum(sizes[:stage]) for stage in range(layout.pp)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def stages_of(architecture: Architecture, layout: Layout) -> tuple[range, ...]:
    """The layers of each pipeline stage of a model, by index. Raises UnevenStages as ``stages``."""
    return stages(architecture.num_layers, layout, architecture.pattern)


def _marked(main: str, layout: Layout) -> tuple[range, ...]:
    """Stages at the ``|`` of a pattern."""
    segments = main.split("|")
    if layout.first or layout.last:
        raise UnevenStages("the pattern names its stages with |, and the layout gives their sizes too")
    if len(segments) != layout.pp:
        raise UnevenStages(f"the pattern has {len(segments)} stages, the layout pp{layout.pp}")
    found, start = [], 0
    for segment in segments:
        found.append(range(start, start + len(segment)))
        start += len(segment)
    return tuple(found)


def _sizes(num_layers: int, layout: Layout) -> list[int]:
    given = [size for size in (layout.first, layout.last) if size is not None]
    rest, left = num_layers - sum(given), layout.pp - len(given)
    if left == 0 and rest:
        raise UnevenStages(f"the stages hold {sum(given)} layers, the model has {num_layers}")
    if rest < left or (left and rest % left):
        other = "other " if given else ""
        raise UnevenStages(
            f"{rest} {other}layers / {left} {other}pipeline stages is not whole, or leaves one empty"
        )
    sizes = [rest // left] * left if left else []
    return [
        *([layout.first] if layout.first is not None else []),
        *sizes,
        *([layout.last] if layout.last is not None else []),
    ]
