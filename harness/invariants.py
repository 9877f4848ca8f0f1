"""Invariants S1-S12: what a shrunken architecture must keep of the real one, each proved on a pair.

The search in ``shrink.py`` proposes; this module judges, from the two architectures alone, so that a
fault in the search cannot hide itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from math import gcd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from harness.architecture import Architecture
    from harness.layout import Layout

BLOCK = 128  # the largest block size of ModelOpt's formats
FP4_BLOCK = 16  # the smallest, and the unit of a head dimension

# The arguments that shrinking may change; S11 holds every other one fixed.
SIZE_ARGUMENTS = frozenset(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_experts
    moe_router_topk moe_router_num_groups moe_router_group_topk moe_ffn_hidden_size
    moe_shared_expert_intermediate_size moe_layer_freq padded_vocab_size
    """.split()
)


@dataclass(frozen=True, slots=True)
class Invariant:
    """One invariant on one plan: what it says of each side and whether it holds."""

    name: str
    title: str
    before: str
    after: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Dimension:
    """One matrix dimension: its size, and the unit whose common divisor with it must be kept (S4)."""

    size: int
    unit: int


def dimensions(architecture: Architecture, layout: Layout) -> dict[str, Dimension]:
    """Every width that a weight matrix has, by name; expert widths are split by ``etp``."""
    attention, dense, moe = architecture.attention, architecture.dense, architecture.moe
    unit, expert_unit = BLOCK * layout.tp, BLOCK * layout.etp
    widths = {
        "hidden": Dimension(architecture.hidden_size, unit),
        "query": Dimension(attention.query_width, unit),
        "key/value": Dimension(attention.kv_width, unit),
        "vocabulary": Dimension(architecture.padded_vocab_size, unit),
    }
    if dense is not None:
        widths["ffn"] = Dimension(dense.ffn_hidden_size, unit)
    if moe is not None:
        widths["expert ffn"] = Dimension(moe.expert.ffn_hidden_size, expert_unit)
        if moe.shared is not None:
            widths["shared ffn"] = Dimension(moe.shared.ffn_hidden_size, unit)
    return widths


def _fused(architecture: Architecture) -> dict[str, int]:
    """Row counts of the fused matrices, which are widths too: a square one hides a transpose."""
    attention, dense, moe = architecture.attention, architecture.dense, architecture.moe
    fused = {"qkv": attention.query_width + 2 * attention.kv_width}
    if dense is not None:
        fused["fc1"] = dense.fc1_width
    if moe is not None:
        fused["expert fc1"] = moe.expert.fc1_width
        if moe.shared is not None:
            fused["shared fc1"] = moe.shared.fc1_width
    return fused


def check_invariants(before: Architecture, after: Architecture, layout: Layout) -> tuple[Invariant, ...]:
    """S1 to S12 on one pair, in order."""
    return tuple(Invariant(name, title, *rule(before, after, layout)) for name, title, rule in _INVARIANTS)


def group_split(num_query_groups: int, tp: int) -> str:
    """How query groups fall on tensor ranks."""
    if num_query_groups % tp == 0:
        return "whole groups per rank"
    return "one group shared by ranks" if tp % num_query_groups == 0 else "neither whole nor shared"


def _ratio(*sizes: int) -> str:
    divisor = gcd(*sizes)
    return " : ".join(f"{size // divisor}" for size in sizes)


def _order(left: int, right: int) -> str:
    return "<" if left < right else ">" if left > right else "="


Judgement = tuple[str, str, bool]


def _heads(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def describe(architecture: Architecture) -> tuple[str, object]:
        a = architecture.attention
        heads, groups = a.num_attention_heads, a.num_query_groups
        ratio, split = _ratio(heads, groups), group_split(groups, layout.tp)
        key = (ratio, split, heads % layout.tp == 0, heads == groups, groups > 1)
        return f"{heads} : {groups} = {ratio}, {split}", key

    (left, one), (right, other) = describe(before), describe(after)
    return left, right, one == other


def _experts(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def describe(architecture: Architecture) -> tuple[str, object]:
        moe = architecture.moe
        if moe is None:
            return "no experts", None
        sizes = [moe.num_experts, moe.moe_router_topk]
        text = f"{moe.num_experts} : {moe.moe_router_topk} = {_ratio(*sizes)}"
        if moe.num_groups and moe.group_topk:
            sizes = [moe.num_experts, moe.num_groups, moe.group_topk, moe.moe_router_topk]
            text = f"{text}, grouped {_ratio(*sizes)}"
        key = (
            _ratio(*sizes),
            moe.moe_router_topk == 1,
            moe.num_experts % layout.ep == 0,
            moe.num_groups is None,
        )
        return text, key

    (left, one), (right, other) = describe(before), describe(after)
    return left, right, one == other


def _attention_width(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def describe(architecture: Architecture) -> tuple[str, str]:
        query, hidden = architecture.attention.query_width, architecture.hidden_size
        return f"{query} : {hidden} = {_ratio(query, hidden)}", _order(query, hidden)

    (left, one), (right, other) = describe(before), describe(after)
    return left, right, one == other


def _divisibility(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def classes(architecture: Architecture) -> dict[str, int]:
        found = {
            name: gcd(dimension.size, dimension.unit)
            for name, dimension in dimensions(architecture, layout).items()
        }
        found["head"] = gcd(architecture.attention.kv_channels, FP4_BLOCK)
        return found

    left, right = classes(before), classes(after)
    return _classes(left), _classes(right), left == right


def _classes(found: Mapping[str, int]) -> str:
    by_class: dict[int, list[str]] = {}
    for name, divisor in found.items():
        by_class.setdefault(divisor, []).append(name)
    return "; ".join(f"{divisor}: {', '.join(names)}" for divisor, names in sorted(by_class.items())[::-1])


def _equality(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    left, right = named_sizes(before, layout), named_sizes(after, layout)
    return _equal_pairs(left), _equal_pairs(right), same_equalities(left, right)


def named_sizes(architecture: Architecture, layout: Layout) -> dict[str, int]:
    """The sizes among which S5 keeps equal and different ones apart."""
    sizes = {name: dimension.size for name, dimension in dimensions(architecture, layout).items()}
    sizes.update(_fused(architecture))
    sizes["head"] = architecture.attention.kv_channels
    if architecture.moe is not None:
        sizes["experts"] = architecture.moe.num_experts
    return sizes


# A head dimension or an expert count that happens to equal a width is a coincidence of the real model:
# it need not be kept, but none may arise.
_COINCIDENTAL = frozenset({"head", "experts"})


def same_equalities(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """Whether equal sizes stayed equal and different ones different."""
    for one, other in combinations(before, 2):
        was, now = before[one] == before[other], after[one] == after[other]
        if now != was and not (was and {one, other} & _COINCIDENTAL):
            return False
    return True


def _equal_pairs(sizes: Mapping[str, int]) -> str:
    by_size: dict[int, list[str]] = {}
    for name, size in sizes.items():
        by_size.setdefault(size, []).append(name)
    equal = [" = ".join(names) for names in by_size.values() if len(names) > 1]
    return ", ".join(equal) or "all different"


def _layers(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def describe(architecture: Architecture) -> tuple[str, object]:
        kinds = layer_kinds(before, architecture)
        key = (kinds[0], kinds[-1], set(kinds), set(pairwise(kinds)))
        names = [layer.kind for layer in architecture.layers]
        counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
        return f"{len(kinds)} layers: {counts}", key

    (left, one), (right, other) = describe(before), describe(after)
    enough = layout.pp <= after.num_layers <= before.num_layers
    return left, right, one == other and enough


def layer_kinds(before: Architecture, architecture: Architecture) -> list[int]:
    """Layers as numbers of their kind, in the order in which the kinds first appear."""
    order: dict[str, int] = {}
    for layer in before.layers:
        order.setdefault(layer.kind, len(order))
    return [order[layer.kind] for layer in architecture.layers]


def _vocabulary(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def describe(architecture: Architecture) -> tuple[str, object]:
        size = architecture.padded_vocab_size
        whole = size % layout.tp == 0
        text = f"{size}, {'a multiple' if whole else 'no multiple'} of tp{layout.tp}"
        order = _order(size, architecture.hidden_size)
        return f"{text}, {order} hidden", (whole, order, gcd(size, BLOCK * layout.tp))

    (left, one), (right, other) = describe(before), describe(after)
    return left, right, one == other


def _feed_forward(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    left, right = _ffn_sizes(before), _ffn_sizes(after)
    holds = left.keys() == right.keys() and all(
        ffn_ratio_kept(left[name], before.hidden_size, right[name], after.hidden_size) for name in left
    )

    def describe(sizes: Mapping[str, int], hidden: int) -> str:
        return ", ".join(f"{name} {size / hidden:.3g} x hidden" for name, size in sizes.items())

    return describe(left, before.hidden_size), describe(right, after.hidden_size), holds


def _ffn_sizes(architecture: Architecture) -> dict[str, int]:
    """Every feed-forward width, that of ``--ffn-hidden-size`` also where no layer uses it."""
    sizes = {"ffn": int(architecture.arguments["ffn_hidden_size"])}
    if architecture.moe is not None:
        sizes["expert ffn"] = architecture.moe.expert.ffn_hidden_size
        if architecture.moe.shared is not None:
            sizes["shared ffn"] = architecture.moe.shared.ffn_hidden_size
    return sizes


def ffn_ratio_kept(ffn: int, hidden: int, small_ffn: int, small_hidden: int) -> bool:
    """S8: the same order, and the ratio within a factor of two."""
    cross, small_cross = ffn * small_hidden, small_ffn * hidden
    return _order(ffn, hidden) == _order(small_ffn, small_hidden) and (
        cross <= 2 * small_cross and small_cross <= 2 * cross
    )


def _absent(what: str) -> Callable[[Architecture, Architecture, Layout], Judgement]:
    return lambda before, after, layout: (what, what, True)


def _unchanged(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    left, right = before.arguments.values, after.arguments.values
    changed = [
        dest
        for dest in sorted(left.keys() | right.keys())
        if dest not in SIZE_ARGUMENTS and left.get(dest) != right.get(dest)
    ]
    count = len(left.keys() - SIZE_ARGUMENTS)
    return f"{count} arguments", ", ".join(changed) or f"{count} arguments, unchanged", not changed


def _degenerate(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def smallest(architecture: Architecture) -> tuple[int, str]:
        return min((dim.size, name) for name, dim in dimensions(architecture, layout).items())

    pairs = _paired(before, after, layout)
    holds = all(small >= min(large, 2 * FP4_BLOCK) for large, small in pairs)
    (left, one), (right, other) = smallest(before), smallest(after)
    return f"smallest {left} ({one})", f"smallest {right} ({other})", holds


def _paired(before: Architecture, after: Architecture, layout: Layout) -> Iterator[tuple[int, int]]:
    small = dimensions(after, layout)
    for name, dimension in dimensions(before, layout).items():
        yield dimension.size, small[name].size


_INVARIANTS: tuple[tuple[str, str, Callable[[Architecture, Architecture, Layout], Judgement]], ...] = (
    ("S1", "heads : query groups", _heads),
    ("S2", "experts : top-k", _experts),
    ("S3", "attention width : hidden", _attention_width),
    ("S4", "divisibility", _divisibility),
    ("S5", "equal dimensions", _equality),
    ("S6", "layers", _layers),
    ("S7", "vocabulary", _vocabulary),
    ("S8", "ffn : hidden", _feed_forward),
    ("S9", "latent attention", _absent("none")),
    ("S10", "Mamba", _absent("none")),
    ("S11", "everything else", _unchanged),
    ("S12", "no degenerate dimension", _degenerate),
)
