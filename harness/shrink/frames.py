"""Frames: an architecture -> small hidden sizes, each with the mixers that may stand beside it.

Attention and Mamba are tied to the hidden size by a ratio (S3, S10). Frames with the exact ratios come
first. Where those need a hidden size beyond the budget, near ratios come before exact ones of any width:
the point is a model that runs in a second.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import groupby, islice
from math import ceil, gcd
from typing import TYPE_CHECKING

from harness.layers import LatentAttention, Mamba, Mixer
from harness.shrink.dimensions import BLOCK, COINCIDENTAL, mixers, named_sizes, order
from harness.shrink.invariants_mixers import near
from harness.shrink.mixer_sizes import (
    SmallMixer,
    Wanted,
    distance,
    matrix_elements,
    same_class,
    small_mixers,
    tied_width,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from harness.architecture import Architecture
    from harness.layout import Layout

    # How far a frame is off, and its tied mixers.
    _Way = tuple["_Off", dict[Mixer, Sequence[SmallMixer]]]

# The largest hidden size, per tensor rank, of a plan that need not be larger.
WIDTH_BUDGET = 1024

# Hidden sizes tried that are equally far from the real ratios, smallest first, and how many distances.
_HIDDEN_SIZES = 128
_DISTANCES = 48

# Mixers beside one hidden size that nothing ties to it.
_LOOSE = 256


@dataclass(frozen=True, slots=True)
class Frame:
    """A hidden size and, for each class of mixers, those that may stand beside it."""

    hidden: int
    mixers: tuple[Sequence[SmallMixer], ...]


# How far a frame is from the real ratios: Mamba's inner : hidden and head : state, then attention : hidden.
_Off = tuple[float, float, float]
_EXACT: _Off = (0.0, 0.0, 0.0)


def tiers(before: Architecture, layout: Layout) -> Iterator[list[Frame]]:
    """Frames that are equally good, the best first; lazily, as mostly the first will do."""
    hidden, unit = before.hidden_size, BLOCK * layout.tp
    step, budget = gcd(hidden, unit), min(WIDTH_BUDGET * layout.tp, hidden)

    def sizes(least: int, most: int) -> list[int]:
        return [size for size in range(least, most + 1, step) if same_class(hidden, size, unit)]

    small = sizes(step, budget)
    larger = sizes(budget - budget % step + step, min(2 * budget, hidden))
    wanted = Wanted(layout.tp, before.arguments["rotary_percent"])
    # What no invariant asks of keys by themselves is kept where the model need not be larger for it.
    loose = replace(wanted, whole_groups=False)
    for within in (small, larger):
        for keys in (wanted, loose):
            if within:
                table = _Table(before, layout, within[-1], keys)
                yield [*islice(table.exact(within), _HIDDEN_SIZES)]
                yield from _near_tiers(table, within)
    wide = _Table(before, layout, None, loose)
    large = (size for size in wide.hidden_sizes() if size > budget and same_class(hidden, size, unit))
    yield [*islice(wide.exact(large), _HIDDEN_SIZES), *wide.exact([hidden])]


def _near_tiers(table: _Table, within: Sequence[int]) -> Iterator[list[Frame]]:
    if table.tied:
        framed = sorted(table.near(within), key=lambda entry: (entry[0], entry[1].hidden))
        for _, tier in islice(groupby(framed, key=lambda entry: entry[0]), _DISTANCES):
            yield [frame for _, frame in islice(tier, _HIDDEN_SIZES)]


class _Tied:
    """The smaller mixers of one class by the width that is tied to the hidden size."""

    def __init__(self, width: int, options: Iterable[SmallMixer]) -> None:
        self.width = width
        self.by_width: dict[int, list[SmallMixer]] = {}
        for option in options:
            self.by_width.setdefault(tied_width(option.mixer) or 0, []).append(option)
        self.widths = sorted(self.by_width)

    def exact(self, hidden: int, small: int) -> int | None:
        """The width that is to ``small`` as the real one is to ``hidden``, if there is one."""
        width, rest = divmod(self.width * small, hidden)
        return width if rest == 0 and width in self.by_width else None

    def nearest(self, hidden: int, small: int) -> int | None:
        """The width whose ratio to ``small`` is nearest to the real one and has its order, if any."""
        place = bisect_left(self.widths, self.width * small // hidden)
        beside = [
            width
            for width in self.widths[max(0, place - 2) : place + 2]
            if order(width, small) == order(self.width, hidden)
        ]
        return min(beside, key=lambda width: distance(self.width, hidden, width, small), default=None)


class _Table:
    """Every smaller mixer of an architecture at a layout, up to the width that belongs to a budget."""

    def __init__(self, before: Architecture, layout: Layout, budget: int | None, wanted: Wanted) -> None:
        self.hidden, self.budget, self.wanted = before.hidden_size, budget, wanted
        self.real = named_sizes(before, layout)
        self.mixers = mixers(before)
        self.tied: dict[Mixer, _Tied] = {}
        self.loose: dict[Mixer, list[SmallMixer]] = {}
        for mixer in self.mixers:
            width, options = tied_width(mixer), self._options(mixer, exact=True)
            if width is None:
                self.loose[mixer] = sorted(options, key=lambda one: matrix_elements(one.mixer, self.hidden))
            else:
                self.tied[mixer] = _Tied(width, options)

    def _options(self, mixer: Mixer, *, exact: bool) -> Iterator[SmallMixer]:
        width, widest = tied_width(mixer), None
        if self.budget is not None and width is not None:
            # Beyond half as much again no ratio to the hidden size is near.
            widest = 3 * width * self.budget // (2 * self.hidden)
        return small_mixers(mixer, replace(self.wanted, widest=widest, exact=exact))

    def hidden_sizes(self) -> list[int]:
        """Hidden sizes at which the first tied mixer has its exact ratio, ascending."""
        if not self.tied:
            return []
        first = next(iter(self.tied.values()))
        exact = (divmod(self.hidden * width, first.width) for width in first.widths)
        return [size for size, rest in exact if rest == 0]

    def exact(self, hidden_sizes: Iterable[int]) -> Iterator[Frame]:
        """The frames at which every tied mixer has its exact ratio."""
        for small in hidden_sizes:
            chosen: dict[Mixer, Sequence[SmallMixer]] = {}
            for mixer, tied in self.tied.items():
                width = tied.exact(self.hidden, small)
                if width is not None:
                    chosen[mixer] = tied.by_width[width]
            if len(chosen) == len(self.tied):
                yield self._frame(small, chosen)

    def near(self, hidden_sizes: Sequence[int]) -> Iterator[tuple[_Off, Frame]]:
        """The other frames, each with how far it is from the exact ratios."""
        mamba = next((mixer for mixer in self.tied if isinstance(mixer, Mamba)), None)
        attention = next((mixer for mixer in self.tied if not isinstance(mixer, Mamba)), None)
        if mamba is not None:
            width = self.tied[mamba].width
            other_states = _Tied(width, _fewest_off(self._options(mamba, exact=False)))
        for small in hidden_sizes:
            ways: list[_Way] = [(_EXACT, {})]
            if mamba is not None:
                found = _mamba_ways(self.hidden, self.tied[mamba], other_states, small)
                ways = [(off, {mamba: mixers}) for off, mixers in found]
            if attention is not None:
                ways = self._with_attention(attention, small, ways)
            yield from ((off, self._frame(small, chosen)) for off, chosen in ways if off != _EXACT)

    def _with_attention(self, attention: Mixer, small: int, ways: Sequence[_Way]) -> list[_Way]:
        """``ways`` with the attention of the exact or nearest width beside ``small``, if there is one."""
        tied = self.tied[attention]
        width = tied.exact(self.hidden, small) or tied.nearest(self.hidden, small)
        if width is None:
            return []
        off = _coarse(distance(tied.width, self.hidden, width, small))
        return [((*far[:2], off), {**chosen, attention: tied.by_width[width]}) for far, chosen in ways]

    def _frame(self, small: int, chosen: Mapping[Mixer, Sequence[SmallMixer]]) -> Frame:
        found = []
        for mixer in self.mixers:
            options = chosen.get(mixer)
            if options is None:
                options = self._loose(mixer, small)
            elif isinstance(mixer, LatentAttention):
                options = [option for option in options if self._ranks_in_order(option, small)]
            found.append(options)
        return Frame(small, tuple(found))

    def _loose(self, mixer: Mixer, small: int) -> list[SmallMixer]:
        """The smaller ones of a mixer that nothing but S5 ties to ``small``."""
        options = self.loose[mixer]
        equal = [
            name for name in options[0].names if self.real[name] == self.hidden and name not in COINCIDENTAL
        ]
        fitting = [option for option in options if all(option.names[name] == small for name in equal)]
        return [*fitting[:_LOOSE], *fitting[_LOOSE:][-1:]]

    def _ranks_in_order(self, option: SmallMixer, small: int) -> bool:
        """S9: whether the latents are as the real ones less or more than the hidden size."""
        return all(
            order(option.names[name], small) == order(self.real[name], self.hidden)
            for name in ("query latent", "key/value latent")
            if name in option.names
        )


def _mamba_ways(
    hidden: int, tied: _Tied, other: _Tied, small: int
) -> Iterator[tuple[_Off, Sequence[SmallMixer]]]:
    """Mamba mixers beside ``small``: of exact or near width, or of exact width and near states."""
    width = tied.exact(hidden, small)
    if width is not None:
        yield _EXACT, tied.by_width[width]
    nearest = tied.nearest(hidden, small)
    if width is None and nearest is not None and near(tied.width, hidden, nearest, small):
        off = distance(tied.width, hidden, nearest, small)
        yield (_coarse(off), 0.0, 0.0), tied.by_width[nearest]
    width = other.exact(hidden, small)
    if width is not None:
        yield (0.0, _coarse(other.by_width[width][0].off), 0.0), other.by_width[width]


def _coarse(off: float) -> float:
    """Twentieths, rounded up: within one the smaller model is worth more than the nearer ratio."""
    return ceil(round(off * 20, 6)) / 20


def _fewest_off(options: Iterator[SmallMixer]) -> Iterator[SmallMixer]:
    """Of each tied width only the mixers whose head : state ratio is nearest."""
    found: dict[int, list[SmallMixer]] = {}
    for option in options:
        beside = found.setdefault(tied_width(option.mixer) or 0, [])
        if beside and option.off < beside[0].off:
            beside.clear()
        if not beside or option.off == beside[0].off:
            beside.append(option)
    return (option for beside in found.values() for option in beside)
