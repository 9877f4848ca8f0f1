"""Shrink: an architecture and a layout -> the smallest architecture that keeps every invariant.

A plan keeps the ratios of the real model and the divisibility of its dimensions, so that formats and
tensor splits succeed or fail on the tiny model exactly where they do on the real one. The search is
exhaustive over small candidate sets, prefers fewer parameters, and is deterministic; the plan is then
judged by ``invariants.py``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice, pairwise
from math import gcd, log
from typing import TYPE_CHECKING, Any

from harness.architecture import Architecture, architecture, moe_layers
from harness.invariants import (
    BLOCK,
    FP4_BLOCK,
    SIZE_ARGUMENTS,
    Invariant,
    check_invariants,
    ffn_ratio_kept,
    group_split,
    layer_kinds,
    named_sizes,
    same_equalities,
)
from harness.inventory import counts
from harness.layers import Dense, MoE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from harness.layout import Layout

# Where the exact ratio of attention width to hidden size (S3) needs a hidden size above this, per tensor
# rank, the nearest ratio is taken: the point is a model that runs in a second.
WIDTH_BUDGET = 1024

# Candidates looked at per feed-forward or vocabulary size; S5 rarely rules out more than two.
_CANDIDATES = 8

# A preset is untrusted: a size with ten digits must not keep the search busy. No published model has
# more query groups, head sizes in steps of 16 or expert multiples than this.
_MOST = 256
# Multiples looked at on either side of the nearest hidden size.
_NEAR = 16


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


def shrink(before: Architecture, layout: Layout) -> ShrinkPlan:
    """The smallest plan that keeps S1-S12 at ``layout``. Raises NoPlan."""
    after = _smallest(before, layout)
    invariants = check_invariants(before, after, layout)
    broken = [invariant for invariant in invariants if not invariant.holds]
    if broken:
        raise NoPlan("; ".join(f"{i.name} {i.title}: {i.before} became {i.after}" for i in broken))
    return ShrinkPlan(before, after, layout, invariants)


@dataclass(frozen=True, slots=True)
class _Widths:
    """Attention and hidden sizes of one candidate."""

    heads: int
    groups: int
    kv_channels: int
    hidden: int

    @property
    def query(self) -> int:
        return self.heads * self.kv_channels


def _smallest(before: Architecture, layout: Layout) -> Architecture:
    layers = _layer_changes(before, layout)
    for tier in _attention_tiers(before, layout):
        for experts in _expert_choices(before.moe, layout):
            best = _smallest_of(tier, before, layout, {**layers, **experts})
            if best is not None:
                return best
    raise NoPlan("no sizes keep S1, S3, S4, S5, S8 and S12, not even the real ones")


def _smallest_of(
    tier: Sequence[_Widths], before: Architecture, layout: Layout, fixed: Mapping[str, Any]
) -> Architecture | None:
    """The candidate with the fewest parameters; ties go to the wider head, then the fewer heads."""
    left = named_sizes(before, layout)
    searches = []
    for widths in tier:
        search = _Search.of(before, layout, widths, fixed)
        if search is not None:
            order = (search.bound, widths.hidden, -widths.kv_channels, widths.heads)
            searches.append((order, search))
    best: Architecture | None = None
    for (bound, *_), search in sorted(searches, key=lambda entry: entry[0]):
        if best is not None and bound >= counts(best).total:
            break
        found = search.run(left, layout)
        if found is not None and (best is None or counts(found).total < counts(best).total):
            best = found
    return best


# ---- layers (S6) ----


def _layer_changes(before: Architecture, layout: Layout) -> dict[str, Any]:
    kinds = shortest_walk(layer_kinds(before, before), layout.pp)
    moe = {
        kind
        for kind, layer in zip(layer_kinds(before, before), before.layers, strict=True)
        if layer.kind == "moe"
    }
    pattern = tuple(int(kind in moe) for kind in kinds)
    frequency = before.arguments["moe_layer_freq"]
    periodic = isinstance(frequency, int) and moe_layers(frequency, len(kinds)) == tuple(map(bool, pattern))
    if before.arguments["num_experts"] is None or periodic:
        return {"num_layers": len(kinds)}
    return {"num_layers": len(kinds), "moe_layer_freq": pattern}


def shortest_walk(kinds: Sequence[int], least: int) -> list[int]:
    """The shortest sequence with the first, the last and exactly the adjacent pairs of ``kinds``.

    At least ``least`` long where ``kinds`` is. Breadth first over (kind, pairs seen, length up to
    ``least``), kinds in numeric order, so the answer is always the same.
    """
    pairs = sorted(set(pairwise(kinds)))
    bit = {pair: 1 << index for index, pair in enumerate(pairs)}
    follows = {kind: [after for before, after in pairs if before == kind] for kind in kinds}
    everything, least = (1 << len(pairs)) - 1, min(least, len(kinds))
    start = (kinds[0], 0, min(1, least))
    reached: dict[tuple[int, int, int], tuple[int, int, int] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        kind, seen, length = state
        if kind == kinds[-1] and seen == everything and length >= least:
            return _unwind(reached, state)
        for successor in follows[kind]:
            step = (successor, seen | bit[kind, successor], min(length + 1, least))
            if step not in reached:
                reached[step] = state
                queue.append(step)
    raise AssertionError("the layers themselves are such a sequence")


def _unwind(
    reached: Mapping[tuple[int, int, int], tuple[int, int, int] | None], state: tuple[int, int, int]
) -> list[int]:
    walk: list[int] = []
    step: tuple[int, int, int] | None = state
    while step is not None:
        walk.append(step[0])
        step = reached[step]
    return walk[::-1]


# ---- experts (S2) ----


def _expert_choices(moe: MoE | None, layout: Layout) -> Iterator[dict[str, int]]:
    """Expert and top-k sizes in the real ratio, fewest first, the real ones last."""
    if moe is None:
        yield {}
        return
    sizes = {"num_experts": moe.num_experts, "moe_router_topk": moe.moe_router_topk}
    if moe.num_groups and moe.group_topk:
        sizes["moe_router_num_groups"] = moe.num_groups
        sizes["moe_router_group_topk"] = moe.group_topk
    divisor = gcd(*sizes.values())
    for multiple in _few(divisor):
        small = {dest: size // divisor * multiple for dest, size in sizes.items()}
        same_split = (small["num_experts"] % layout.ep == 0) == (moe.num_experts % layout.ep == 0)
        one = (small["moe_router_topk"] == 1) == (moe.moe_router_topk == 1)
        if same_split and one:
            yield small


# ---- attention and hidden size (S1, S3, S4, S12) ----


def _attention_tiers(before: Architecture, layout: Layout) -> Iterator[list[_Widths]]:
    """Exact ratios within the budget, then near ones, then exact ones of any width, the real one last."""
    attention = list(_attention_sizes(before, layout))
    hidden, query = before.hidden_size, before.attention.query_width
    budget = min(WIDTH_BUDGET * layout.tp, hidden)
    exact = [
        _Widths(heads, groups, channels, hidden * heads * channels // query)
        for heads, groups, channels in attention
        if hidden * heads * channels % query == 0
    ]
    exact = [widths for widths in exact if _same_class(hidden, widths.hidden, BLOCK * layout.tp)]
    yield [widths for widths in exact if widths.hidden <= budget]
    if query != hidden:
        yield _nearest(before, layout, attention, budget)
    yield exact


def _attention_sizes(before: Architecture, layout: Layout) -> Iterator[tuple[int, int, int]]:
    """(heads, groups, kv_channels) that keep S1 and the divisibility of head, query and kv widths."""
    a, unit = before.attention, BLOCK * layout.tp
    per_group = a.num_attention_heads // a.num_query_groups
    rotary = before.arguments["rotary_percent"]
    step = gcd(a.kv_channels, FP4_BLOCK)
    for groups in _few(a.num_query_groups):
        heads = groups * per_group
        if (
            (groups == 1) != (a.num_query_groups == 1)
            or group_split(groups, layout.tp) != group_split(a.num_query_groups, layout.tp)
            or (heads % layout.tp == 0) != (a.num_attention_heads % layout.tp == 0)
        ):
            continue
        for times in _few(a.kv_channels // step):
            channels = step * times
            if (
                channels >= min(a.kv_channels, 2 * FP4_BLOCK)
                and gcd(channels, FP4_BLOCK) == step
                and _whole_rotary(channels, rotary) == _whole_rotary(a.kv_channels, rotary)
                and _same_class(a.query_width, heads * channels, unit)
                and _same_class(a.kv_width, groups * channels, unit)
            ):
                yield heads, groups, channels


def _few(most: int) -> Iterable[int]:
    """1 to ``most``, or as many of them as any real model needs, and ``most``."""
    return range(1, most + 1) if most <= _MOST else (*range(1, _MOST + 1), most)


def _whole_rotary(channels: int, percent: float) -> bool:
    """Whether rotary embedding turns a whole, even number of channels."""
    return (channels * percent) % 2 == 0


def _nearest(
    before: Architecture, layout: Layout, attention: Sequence[tuple[int, int, int]], budget: int
) -> list[_Widths]:
    """Candidates within the budget whose ratio to the hidden size keeps its order and is nearest."""
    hidden, query, unit = before.hidden_size, before.attention.query_width, BLOCK * layout.tp
    step = gcd(hidden, unit)
    found: list[tuple[float, _Widths]] = []
    for heads, groups, channels in attention:
        width = heads * channels
        ideal = width * hidden // query // step
        for size in (step * times for times in range(max(1, ideal - _NEAR), ideal + _NEAR)):
            if size > budget:
                break
            if _same_class(hidden, size, unit) and (width < size) == (query < hidden) and width != size:
                distance = abs(log(width * hidden / (size * query)))
                found.append((round(distance, 9), _Widths(heads, groups, channels, size)))
    least = min((distance for distance, _ in found), default=0.0)
    return [widths for distance, widths in found if distance == least]


def _same_class(size: int, small: int, unit: int) -> bool:
    """S4 and S12 for one dimension."""
    return gcd(size, unit) == gcd(small, unit) and min(size, 2 * FP4_BLOCK) <= small <= size


# ---- feed-forward sizes and vocabulary (S4, S5, S7, S8) ----


@dataclass(frozen=True)
class _Search:
    """The feed-forward sizes and vocabularies to try under one choice of attention and hidden sizes."""

    before: Architecture
    fixed: Mapping[str, Any]
    sizes: Mapping[str, list[int]]
    bound: int  # parameters with the smallest of each, which S5 may rule out

    @classmethod
    def of(
        cls, before: Architecture, layout: Layout, widths: _Widths, fixed: Mapping[str, Any]
    ) -> _Search | None:
        sizes = dict(_free_sizes(before, layout, widths.hidden))
        if not all(sizes.values()):
            return None
        fixed = {
            **fixed,
            "hidden_size": widths.hidden,
            "num_attention_heads": widths.heads,
            "num_query_groups": widths.groups,
            "kv_channels": widths.kv_channels,
        }
        least = {dest: candidates[0] for dest, candidates in sizes.items()}
        smallest = architecture(before.arguments.replaced({**fixed, **least}))
        return cls(before, fixed, sizes, counts(smallest).total)

    def run(self, left: Mapping[str, int], layout: Layout) -> Architecture | None:
        """The smallest choice that keeps the equalities ``left`` (S5), or None.

        Depth first with a bound: parameters are linear in each size, so the sum weighted by the
        matrices it is in ranks the choices.
        """
        weight = _weights(self.before, self.fixed)
        least = {dest: candidates[0] for dest, candidates in self.sizes.items()}
        known = named_sizes(self._architecture(least), layout)
        named_by = {dest: _named_by(self.before, dest) for dest in self.sizes}
        free = {name for names in named_by.values() for name in names}
        known = {name: size for name, size in known.items() if name not in free}
        dests = list(self.sizes)
        best: tuple[tuple[int, int], dict[str, int]] | None = None

        def descend(chosen: dict[str, int], named: dict[str, int], rank: tuple[int, int]) -> None:
            nonlocal best
            if len(chosen) == len(dests):
                best = (rank, chosen)
                return
            dest = dests[len(chosen)]
            for size in self.sizes[dest]:
                step = (rank[0] + weight[dest] * size, rank[1] + size)
                if best is not None and step >= best[0]:
                    break
                more = {name: size * times for name, times in named_by[dest].items() if name in left}
                if same_equalities({name: left[name] for name in (*named, *more)}, {**named, **more}):
                    descend({**chosen, dest: size}, {**named, **more}, step)

        if same_equalities({name: left[name] for name in known}, known):
            descend({}, known, (0, 0))
        return None if best is None else self._architecture(best[1])

    def _architecture(self, sizes: Mapping[str, int]) -> Architecture:
        return architecture(self.before.arguments.replaced({**self.fixed, **sizes}))


def _named_by(before: Architecture, dest: str) -> dict[str, int]:
    """The names of S5 that a free size decides, and how many times it each is."""
    if dest == "padded_vocab_size":
        return {"vocabulary": 1}
    role = {"moe_ffn_hidden_size": "expert ", "moe_shared_expert_intermediate_size": "shared "}.get(dest, "")
    return {f"{role}ffn": 1, f"{role}fc1": 2 if before.arguments["swiglu"] else 1}


def _free_sizes(before: Architecture, layout: Layout, hidden: int) -> Iterator[tuple[str, list[int]]]:
    moe = before.moe
    yield "ffn_hidden_size", _ffn_candidates(before, before.arguments["ffn_hidden_size"], hidden, layout.tp)
    if moe is not None:
        yield "moe_ffn_hidden_size", _ffn_candidates(before, moe.expert.ffn_hidden_size, hidden, layout.etp)
        if moe.shared is not None:
            yield (
                "moe_shared_expert_intermediate_size",
                _ffn_candidates(before, moe.shared.ffn_hidden_size, hidden, layout.tp),
            )
    size = before.padded_vocab_size

    def keeps_order(small: int) -> bool:
        return (small > hidden, small == hidden) == (size > before.hidden_size, size == before.hidden_size)

    least = hidden if size >= before.hidden_size else 1
    yield "padded_vocab_size", _smallest_sizes(size, BLOCK * layout.tp, least, keeps_order)


def _ffn_candidates(before: Architecture, ffn: int, hidden: int, ranks: int) -> list[int]:
    least = ffn * hidden // (2 * before.hidden_size)
    return _smallest_sizes(
        ffn, BLOCK * ranks, least, lambda small: ffn_ratio_kept(ffn, before.hidden_size, small, hidden)
    )


def _smallest_sizes(size: int, unit: int, least: int, keeps: Callable[[int], bool]) -> list[int]:
    """The smallest few sizes that may replace ``size``, from about ``least`` on.

    The real size is among them where it may: with it S5 can always be kept.
    """
    step = gcd(size, unit)
    start = max(step, least // step * step)
    fitting = (
        small for small in range(start, size + 1, step) if _same_class(size, small, unit) and keeps(small)
    )
    found = list(islice(fitting, _CANDIDATES))
    return [*found, size] if found and size not in found and keeps(size) else found


def _weights(before: Architecture, fixed: Mapping[str, Any]) -> dict[str, int]:
    """How many matrix rows or columns of the hidden size each free size adds."""
    moe, layers = before.moe, fixed["num_layers"]
    moe_count = 0
    if moe is not None:
        frequency = fixed.get("moe_layer_freq", before.arguments["moe_layer_freq"])
        moe_count = sum(moe_layers(frequency, layers))
    matrices = {
        "ffn_hidden_size": (layers - moe_count) * _matrices(before.dense),
        "padded_vocab_size": 1 if before.tied_embeddings else 2,
    }
    if moe is not None:
        matrices["moe_ffn_hidden_size"] = moe_count * fixed["num_experts"] * _matrices(moe.expert)
        matrices["moe_shared_expert_intermediate_size"] = moe_count * _matrices(moe.shared)
    return matrices


def _matrices(dense: Dense | None) -> int:
    return 0 if dense is None else 3 if dense.gated else 2
