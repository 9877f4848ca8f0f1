"""Shrink: an architecture and a layout -> the smallest architecture that keeps every invariant.

A plan keeps the ratios of the real model and the divisibility of its dimensions, so that formats and
tensor splits succeed or fail on the tiny model exactly where they do on the real one. The search takes
the fewest layers and experts, then goes over hidden sizes and over what may stand beside each; it prefers
fewer matrix elements, and is deterministic. The plan is then judged by ``invariants.py``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harness.architecture import Architecture, architecture
from harness.layers import Dense, MoE
from harness.shrink.dimensions import COINCIDENTAL, equality_kept, head_sizes, named_sizes
from harness.shrink.frames import Frame, tiers
from harness.shrink.free_sizes import FreeSize, free_sizes
from harness.shrink.invariants import SIZE_ARGUMENTS, Invariant, check_invariants
from harness.shrink.layer_sizes import expert_choices, layer_changes
from harness.shrink.mixer_sizes import SmallMixer, matrix_elements

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from harness.layout import Layout

# Combinations of sizes looked at beside one hidden size, and in all. Real models need a few dozen.
_BESIDE_ONE = 4096
_COMBINATIONS = 1 << 15
# What the sizes to try beside one hidden size take to find, in combinations.
_A_FRAME = 32
# Plans that a worker meets again with other recipes: of the presets of a catalogue, at a few layouts.
_KEPT = 128


class NoPlan(Exception):
    """No shrunken architecture keeps every invariant; the text names those that fail."""


@dataclass(frozen=True)
class ShrinkPlan:
    """An architecture before and after, for one layout, and the invariants as judged on the pair."""

    before: Architecture
    after: Architecture
    layout: Layout
    invariants: tuple[Invariant, ...]

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Megatron arguments that differ, as (before, after)."""
        left, right = self.before.arguments, self.after.arguments
        return {
            dest: (left[dest], right[dest]) for dest in sorted(SIZE_ARGUMENTS) if left[dest] != right[dest]
        }


@lru_cache(maxsize=_KEPT)
def shrink(before: Architecture, layout: Layout) -> ShrinkPlan:
    """The smallest plan that keeps S1-S12 at ``layout``. Raises NoPlan."""
    after = _smallest(before, layout)
    invariants = check_invariants(before, after, layout)
    broken = [invariant for invariant in invariants if not invariant.holds]
    if broken:
        raise NoPlan("; ".join(f"{i.name} {i.title}: {i.before} became {i.after}" for i in broken))
    return ShrinkPlan(before, after, layout, invariants)


def _smallest(before: Architecture, layout: Layout) -> Architecture:
    layers = layer_changes(before, layout)
    search = _Search(before, layout, layers)
    for tier in tiers(before, layout):
        for experts in expert_choices(before.moe, layout):
            best = search.smallest(tier, experts)
            if best is not None:
                return best
    # The widths cannot be smaller; the layers and the experts alone may still be fewer.
    for experts in expert_choices(before.moe, layout):
        after = architecture(before.arguments.replaced({**layers, **experts}))
        if all(invariant.holds for invariant in check_invariants(before, after, layout)):
            return after
    return before


@dataclass(frozen=True, slots=True)
class _Choice:
    """Sizes of one part of the model: the arguments, the names of S5 they decide, and what they cost."""

    sizes: Mapping[str, Any]
    names: Mapping[str, int]
    elements: int


class _Search:
    """The smallest choice of mixers and free sizes, given the layers.

    Depth first over the parts of the model, with a bound: the elements of the matrices add up.
    """

    def __init__(self, before: Architecture, layout: Layout, layers: Mapping[str, Any]) -> None:
        self.before, self.layout, self.layers = before, layout, layers
        fewer = architecture(before.arguments.replaced(layers)).layers
        self.mixer_counts = Counter(type(layer.mixer) for layer in fewer)
        mlps = Counter(type(layer.mlp) for layer in fewer)
        self.mlp_counts = {"dense": mlps[Dense], "moe": mlps[MoE]}
        self.real = named_sizes(before, layout)
        self.left = _COMBINATIONS

    def smallest(self, frames: Sequence[Frame], experts: Mapping[str, int]) -> Architecture | None:
        """The smallest architecture on any of ``frames`` with so many experts, or None."""
        number = experts.get("num_experts", 0)
        if self.left <= 0:
            return None
        self.left -= _A_FRAME * len(frames)
        ready = [(frame, parts) for frame in frames if (parts := self._parts(frame, number)) is not None]
        ready.sort(key=lambda entry: (sum(part.least for part in entry[1]), entry[0].hidden))
        best: _Choice | None = None
        for frame, parts in ready:
            if best is not None and sum(part.least for part in parts) >= best.elements:
                break
            best = self._beside(frame, parts, number, best) or best
        if best is None:
            return None
        return architecture(self.before.arguments.replaced({**self.layers, **experts, **best.sizes}))

    def _parts(self, frame: Frame, experts: int) -> list[_MixerPart | _FreePart] | None:
        """The parts to choose, None where one has nothing to choose from."""
        free = [*free_sizes(self.before, self.layout, frame.hidden, self.mlp_counts, experts)]
        if not all(frame.mixers) or not all(size.candidates for size in free):
            return None
        floor = {size.dest: size.candidates[0] for size in free}
        mixed = [_MixerPart(options, frame.hidden, self.mixer_counts) for options in frame.mixers]
        return [*mixed, *(_FreePart(size, floor) for size in free)]

    def _beside(
        self,
        frame: Frame,
        parts: Sequence[_MixerPart | _FreePart],
        experts: int,
        bound: _Choice | None,
    ) -> _Choice | None:
        """The smallest choice of every part that keeps S5 and is smaller than ``bound``, or None."""
        rest = [sum(part.least for part in parts[index:]) for index in range(len(parts) + 1)]
        best, least_left = bound, self.left - _BESIDE_ONE

        def descend(chosen: _Choice, index: int) -> None:
            nonlocal best
            if index == len(parts):
                best = chosen
                return
            for choice in parts[index].choices(
                chosen.sizes, self._equal_to(parts[index].names, chosen.names)
            ):
                self.left -= 1
                elements = chosen.elements + choice.elements
                if self.left < max(0, least_left):
                    return
                if best is not None and elements + rest[index + 1] >= best.elements:
                    return
                if self._kept(choice.names, chosen.names):
                    sizes, names = {**chosen.sizes, **choice.sizes}, {**chosen.names, **choice.names}
                    descend(_Choice(sizes, names, elements), index + 1)

        names = {"hidden": frame.hidden}
        if experts:
            names["experts"] = experts
        if self._kept(names, {}):
            descend(_Choice({"hidden_size": frame.hidden}, names, 0), 0)
        return None if best is bound else best

    def _equal_to(self, names: Sequence[str], chosen: Mapping[str, int]) -> tuple[str, int] | None:
        """A name and the size it must have, because in the real model it equals one that is chosen (S5)."""
        for name in names:
            if name not in COINCIDENTAL:
                for other, size in chosen.items():
                    if other not in COINCIDENTAL and self.real[other] == self.real[name]:
                        return name, size
        return None

    def _kept(self, names: Mapping[str, int], chosen: Mapping[str, int]) -> bool:
        """Whether ``names`` are equal to each other and to those chosen where the real ones are (S5)."""
        both = {**chosen, **names}
        beside = [*chosen]
        for name in names:
            if not all(equality_kept(name, other, self.real, both) for other in beside):
                return False
            beside.append(name)
        return True


class _MixerPart:
    """The mixers of one class that may stand beside a hidden size, fewest elements first.

    Of the same elements, the wider head first, then the fewer heads.
    """

    def __init__(self, options: Sequence[SmallMixer], hidden: int, counts: Mapping[type, int]) -> None:
        layers = counts[type(options[0].mixer)]
        self.names = tuple(options[0].names)
        self._choices = [
            _Choice(option.sizes, option.names, layers * matrix_elements(option.mixer, hidden))
            for option in sorted(options, key=lambda option: _taste(option, hidden))
        ]
        self.least = self._choices[0].elements

    def choices(self, sizes: Mapping[str, Any], equal: tuple[str, int] | None) -> Iterator[_Choice]:
        """Those with the size that ``equal`` asks for."""
        for choice in self._choices:
            if equal is None or choice.names[equal[0]] == equal[1]:
                yield choice


def _taste(option: SmallMixer, hidden: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    heads = tuple(-size for size in head_sizes(option.mixer).values())
    return matrix_elements(option.mixer, hidden), heads, tuple(option.sizes.values())


class _FreePart:
    """The sizes that one argument may have beside a hidden size, smallest first."""

    def __init__(self, free: FreeSize, floor: Mapping[str, int]) -> None:
        self.free = free
        self.names = tuple(free.names)
        self.least = free.elements(floor) * free.candidates[0]

    def choices(self, sizes: Mapping[str, Any], equal: tuple[str, int] | None) -> Iterator[_Choice]:
        """Those with the size that ``equal`` asks for, whether or not it is among the first few."""
        free, candidates = self.free, self.free.candidates
        if equal is not None:
            size, rest = divmod(equal[1], free.names[equal[0]])
            candidates = (size,) if rest == 0 and free.keeps(size) else ()
        each = free.elements(sizes)
        for size in candidates:
            names = {name: size * times for name, times in free.names.items()}
            yield _Choice({free.dest: size}, names, each * size)
