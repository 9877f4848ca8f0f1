"""Shrink: an architecture and a layout -> the smallest architecture that keeps every invariant.

A plan keeps the ratios of the real model and the divisibility of its dimensions, so that formats and
tensor splits succeed or fail on the tiny model exactly where they do on the real one. The search is
exhaustive over small candidate sets, prefers fewer parameters, and is deterministic; the plan is then
judged by ``invariants.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import gcd, log
from typing import Any

from harness.architecture import Architecture, Dense, MoE, architecture, moe_layers
from harness.inventory import counts
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
from harness.layout import Layout

# Where the exact ratio of attention width to hidden size (S3) needs a hidden size above this, per tensor
# rank, the nearest ratio is taken: the point is a model that runs in a second.
WIDTH_BUDGET = 1024

# Candidates looked at per feed-forward or vocabulary size; S5 rarely rules out more than two.
_CANDIDATES = 8


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
            dest: (left[dest], right[dest])
            for dest in sorted(SIZE_ARGUMENTS)
            if left[dest] != right[dest]
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
    fixed = {**_layer_changes(before, layout), **_expert_changes(before.moe, layout)}
    best: tuple[tuple[int, ...], Architecture] | None = None
    for widths in _attention_candidates(before, layout):
        candidate = _with_widths(before, layout, widths, fixed)
        if candidate is None:
            continue
        rank = (counts(candidate).total, widths.hidden, -widths.kv_channels, widths.heads)
        if best is None or rank < best[0]:
            best = (rank, candidate)
    if best is None:
        raise NoPlan("no attention and hidden sizes keep S1, S3, S4 and S12")
    return best[1]


# ---- layers (S6) ----


def _layer_changes(before: Architecture, layout: Layout) -> dict[str, Any]:
    kinds = shortest_walk(layer_kinds(before, before), layout.pp)
    changes: dict[str, Any] = {"num_layers": len(kinds)}
    if before.moe is None:
        return changes
    moe_kind = layer_kinds(before, before)[[layer.kind for layer in before.layers].index("moe")]
    pattern = tuple(int(kind == moe_kind) for kind in kinds)
    frequency = before.arguments["moe_layer_freq"]
    if isinstance(frequency, int) and moe_layers(frequency, len(kinds)) == tuple(map(bool, pattern)):
        return changes
    return {**changes, "moe_layer_freq": pattern}


def shortest_walk(kinds: Sequence[int], least: int) -> list[int]:
    """The shortest sequence with the first, the last and exactly the adjacent pairs of ``kinds``.

    At least ``least`` long where ``kinds`` is. Breadth first over (kind, pairs seen, length up to
    ``least``), kinds in numeric order, so the answer is always the same.
    """
    pairs = sorted(set(zip(kinds, kinds[1:], strict=False)))
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


def _expert_changes(moe: MoE | None, layout: Layout) -> dict[str, Any]:
    if moe is None:
        return {}
    sizes = {"num_experts": moe.num_experts, "moe_router_topk": moe.moe_router_topk}
    if moe.num_groups and moe.group_topk:
        sizes["moe_router_num_groups"] = moe.num_groups
        sizes["moe_router_group_topk"] = moe.group_topk
    divisor = gcd(*sizes.values())
    for multiple in range(1, divisor + 1):
        small = {dest: size // divisor * multiple for dest, size in sizes.items()}
        same_split = (small["num_experts"] % layout.ep == 0) == (moe.num_experts % layout.ep == 0)
        one = (small["moe_router_topk"] == 1) == (moe.moe_router_topk == 1)
        if same_split and one:
            return small
    raise AssertionError("the real sizes keep their own ratio")


# ---- attention and hidden size (S1, S3, S4, S12) ----


def _attention_candidates(before: Architecture, layout: Layout) -> list[_Widths]:
    attention = list(_attention_sizes(before, layout))
    hidden, query = before.hidden_size, before.attention.query_width
    budget = min(WIDTH_BUDGET * layout.tp, hidden)
    exact = [
        _Widths(heads, groups, channels, hidden * heads * channels // query)
        for heads, groups, channels in attention
        if hidden * heads * channels % query == 0
    ]
    exact = [widths for widths in exact if _same_class(hidden, widths.hidden, BLOCK * layout.tp)]
    small = [widths for widths in exact if widths.hidden <= budget]
    if small or query == hidden:
        return small or exact
    return _nearest(before, layout, attention, budget) or exact


def _attention_sizes(before: Architecture, layout: Layout) -> Iterator[tuple[int, int, int]]:
    """(heads, groups, kv_channels) that keep S1 and the divisibility of head, query and kv widths."""
    a, unit = before.attention, BLOCK * layout.tp
    per_group = a.num_attention_heads // a.num_query_groups
    rotary = before.arguments["rotary_percent"]
    step = gcd(a.kv_channels, FP4_BLOCK)
    for groups in range(1, a.num_query_groups + 1):
        heads = groups * per_group
        if (
            (groups == 1) != (a.num_query_groups == 1)
            or group_split(groups, layout.tp) != group_split(a.num_query_groups, layout.tp)
            or (heads % layout.tp == 0) != (a.num_attention_heads % layout.tp == 0)
        ):
            continue
        for channels in range(step, a.kv_channels + 1, step):
            if (
                channels >= min(a.kv_channels, 2 * FP4_BLOCK)
                and gcd(channels, FP4_BLOCK) == step
                and _whole_rotary(channels, rotary) == _whole_rotary(a.kv_channels, rotary)
                and _same_class(a.query_width, heads * channels, unit)
                and _same_class(a.kv_width, groups * channels, unit)
            ):
                yield heads, groups, channels


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
        for size in range(step, budget + 1, step):
            width = heads * channels
            if _same_class(hidden, size, unit) and (width < size) == (query < hidden) and width != size:
                distance = abs(log(width * hidden / (size * query)))
                found.append((round(distance, 9), _Widths(heads, groups, channels, size)))
    least = min((distance for distance, _ in found), default=0.0)
    return [widths for distance, widths in found if distance == least]


def _same_class(size: int, small: int, unit: int) -> bool:
    """S4 and S12 for one dimension."""
    return gcd(size, unit) == gcd(small, unit) and min(size, 2 * FP4_BLOCK) <= small <= size


# ---- feed-forward sizes and vocabulary (S4, S5, S7, S8) ----


def _with_widths(
    before: Architecture, layout: Layout, widths: _Widths, fixed: Mapping[str, Any]
) -> Architecture | None:
    """The smallest architecture with these attention and hidden sizes that keeps S5, or None."""
    sizes = dict(_free_sizes(before, layout, widths.hidden))
    base = {
        **fixed,
        "hidden_size": widths.hidden,
        "num_attention_heads": widths.heads,
        "num_query_groups": widths.groups,
        "kv_channels": widths.kv_channels,
    }
    left = named_sizes(before, layout)
    ranked = []
    # Parameters are linear in each size, so the sum weighted by the matrices it appears in ranks them.
    weight = _weights(before, fixed)
    for choice in product(*sizes.values()):
        cost = sum(weight[dest] * size for dest, size in zip(sizes, choice, strict=True))
        ranked.append((cost, sum(choice), choice))
    for _, _, choice in sorted(ranked):
        candidate = architecture(
            before.arguments.replaced({**base, **dict(zip(sizes, choice, strict=True))})
        )
        if same_equalities(left, named_sizes(candidate, layout)):
            return candidate
    return None


def _free_sizes(
    before: Architecture, layout: Layout, hidden: int
) -> Iterator[tuple[str, list[int]]]:
    moe = before.moe
    yield "ffn_hidden_size", _ffn_candidates(before, before.arguments["ffn_hidden_size"], hidden, layout.tp)
    if moe is not None:
        yield "moe_ffn_hidden_size", _ffn_candidates(before, moe.expert.ffn_hidden_size, hidden, layout.etp)
        if moe.shared is not None:
            yield (
                "moe_shared_expert_intermediate_size",
                _ffn_candidates(before, moe.shared.ffn_hidden_size, hidden, layout.tp),
            )
    unit = BLOCK * layout.tp
    size, step = before.padded_vocab_size, gcd(before.padded_vocab_size, unit)
    larger = size > before.hidden_size
    vocabulary = (
        small
        for small in range(step, size + 1, step)
        if _same_class(size, small, unit)
        and (small > hidden) == larger
        and (small == hidden) == (size == before.hidden_size)
    )
    yield "padded_vocab_size", list(islice(vocabulary, _CANDIDATES))


def _ffn_candidates(before: Architecture, ffn: int, hidden: int, ranks: int) -> list[int]:
    unit = BLOCK * ranks
    step = gcd(ffn, unit)
    sizes = (
        small
        for small in range(step, ffn + 1, step)
        if _same_class(ffn, small, unit) and ffn_ratio_kept(ffn, before.hidden_size, small, hidden)
    )
    return list(islice(sizes, _CANDIDATES))


def _weights(before: Architecture, fixed: Mapping[str, Any]) -> dict[str, int]:
    """How many matrix rows or columns of the hidden size each free size adds."""
    moe, layers = before.moe, fixed["num_layers"]
    pattern = moe_layers(fixed.get("moe_layer_freq", before.arguments["moe_layer_freq"]), layers)
    moe_count = sum(pattern) if moe is not None else 0
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
