"""Invariants S1-S12: what a shrunken architecture must keep of the real one, each proved on a pair.

The search in ``shrink.py`` proposes; this module judges, from the two architectures alone, so that a
fault in the search cannot hide itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import gcd
from typing import TYPE_CHECKING

from harness.rank import UnevenStages, stages
from harness.shrink.dimensions import (
    COINCIDENTAL,
    FP4_BLOCK,
    dimensions,
    equality_kept,
    head_sizes,
    mixers,
    named_sizes,
    order,
    ratio,
)
from harness.shrink.invariants_mixers import attention_width, heads, latent_attention, linear_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from harness.architecture import Architecture
    from harness.layout import Layout
    from harness.shrink.invariants_mixers import Judgement

# The arguments that shrinking may change; S11 holds every other one fixed.
SIZE_ARGUMENTS = frozenset(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_experts
    moe_router_topk moe_router_num_groups moe_router_group_topk moe_ffn_hidden_size
    moe_shared_expert_intermediate_size moe_latent_size padded_vocab_size
    q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    mamba_num_heads mamba_head_dim mamba_state_dim mamba_num_groups
    linear_num_key_heads linear_key_head_dim linear_num_value_heads linear_value_head_dim
    hybrid_layer_pattern moe_layer_freq window_attn_skip_freq no_rope_freq
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


def check_invariants(before: Architecture, after: Architecture, layout: Layout) -> tuple[Invariant, ...]:
    """S1 to S12 on one pair, in order."""
    return tuple(Invariant(name, title, *rule(before, after, layout)) for name, title, rule in _INVARIANTS)


# ---- experts (S2) ----


def _experts(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def describe(architecture: Architecture) -> tuple[str, object]:
        moe = architecture.moe
        if moe is None:
            return "no experts", None
        sizes = [moe.num_experts, moe.moe_router_topk]
        text = f"{moe.num_experts} : {moe.moe_router_topk} = {ratio(*sizes)}"
        if moe.num_groups and moe.group_topk:
            sizes = [moe.num_experts, moe.num_groups, moe.group_topk, moe.moe_router_topk]
            text = f"{text}, grouped {ratio(*sizes)}"
        key = (
            ratio(*sizes),
            moe.moe_router_topk == 1,
            moe.num_experts % layout.ep == 0,
            moe.num_groups is None,
        )
        return text, key

    (left, one), (right, other) = describe(before), describe(after)
    return left, right, one == other


# ---- divisibility, equality, smallest sizes (S4, S5, S12) ----


def _divisibility(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def classes(architecture: Architecture) -> dict[str, int]:
        found = {
            name: gcd(dimension.size, dimension.unit)
            for name, dimension in dimensions(architecture, layout).items()
        }
        for mixer in mixers(architecture):
            found |= {name: gcd(size, FP4_BLOCK) for name, size in head_sizes(mixer).items()}
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
    same = left.keys() == right.keys() and same_equalities(left, right)
    return _equal_pairs(left), _equal_pairs(right), same


def same_equalities(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """Whether equal sizes stayed equal and different ones different, of all in ``before``."""
    return all(equality_kept(one, other, before, after) for one, other in combinations(before, 2))


def _equal_pairs(sizes: Mapping[str, int]) -> str:
    by_size: dict[int, list[str]] = {}
    for name, size in sizes.items():
        if name not in COINCIDENTAL:
            by_size.setdefault(size, []).append(name)
    equal = [" = ".join(names) for names in by_size.values() if len(names) > 1]
    for name, apart in COINCIDENTAL.items():
        same = [other for other in apart if name in sizes and sizes.get(other) == sizes[name]]
        equal += [" = ".join([name, *sorted(same)])] if same else []
    return ", ".join(equal) or "all different"


def _degenerate(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def smallest(architecture: Architecture) -> tuple[int, str]:
        return min((dim.size, name) for name, dim in dimensions(architecture, layout).items())

    pairs = _paired(before, after, layout)
    holds = all(small >= min(large, 2 * FP4_BLOCK) for large, small in pairs)
    (left, one), (right, other) = smallest(before), smallest(after)
    return f"smallest {left} ({one})", f"smallest {right} ({other})", holds


def _paired(before: Architecture, after: Architecture, layout: Layout) -> Iterator[tuple[int, int]]:
    """Each dimension before and after; 0 for one that is gone."""
    small = dimensions(after, layout)
    for name, dimension in dimensions(before, layout).items():
        yield dimension.size, small[name].size if name in small else 0


# ---- layers (S6) ----


def _layers(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def describe(architecture: Architecture) -> tuple[str, object]:
        kinds = layer_kinds(before, architecture)
        key = (
            kinds[0],
            set(kinds),
            set(pairwise(kinds)),
            kinds.count(None),
            len(pipeline_stages(architecture, layout) or ()),
        )
        return f"{len(kinds)} layers: {counted_kinds(architecture)}", key

    (left, one), (right, other) = describe(before), describe(after)
    fits = min(layout.pp, before.num_layers) <= after.num_layers <= before.num_layers
    fits = fits and pipelined(before, layout) == pipelined(after, layout)
    return left, right, one == other and fits


def layer_kinds(before: Architecture, architecture: Architecture) -> list[int | None]:
    """Layers as numbers of their kind, in the order in which ``before`` has them first; None for no kind."""
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(x.kind for x in before.layers))}
    return [numbers.get(layer.kind) for layer in architecture.layers]


def counted_kinds(architecture: Architecture) -> str:
    """How many layers of each kind there are, in words: ``24 dense, 12 moe, 12 moe (no rope)``."""
    found = []
    for kind, count in Counter(layer.kind for layer in architecture.layers).items():
        name, _, details = kind.partition(", ")
        found.append(f"{count} {name} ({details})" if details else f"{count} {name}")
    return ", ".join(found)


def pipelined(architecture: Architecture, layout: Layout) -> bool:
    """Whether the layers fall on pipeline stages: as a hybrid's own split says, none empty, or by number."""
    parts = pipeline_stages(architecture, layout)
    return evenly_staged(architecture.num_layers, layout) if parts is None else all(parts)


def evenly_staged(num_layers: int, layout: Layout) -> bool:
    """Whether so many layers fall on the layout's pipeline stages, as many on each as it says."""
    try:
        return all(stages(num_layers, layout))
    except UnevenStages:
        return False


def pipeline_stages(architecture: Architecture, layout: Layout) -> list[str] | None:
    """The stages into which a hybrid's pattern is split by ``|``, where they are those of ``layout``.

    None without a split, and at a pipeline size to which the split does not belong.
    """
    parts = architecture.pattern.split("|")
    return parts if layout.pp > 1 and len(parts) == layout.pp else None


# ---- vocabulary and feed-forward (S7, S8) ----


def _vocabulary(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def describe(architecture: Architecture) -> tuple[str, object]:
        size = architecture.padded_vocab_size
        whole = size % layout.tp == 0
        text = f"{size}, {'a multiple' if whole else 'no multiple'} of tp{layout.tp}"
        place = order(size, architecture.hidden_size)
        vocabulary = dimensions(architecture, layout)["vocabulary"]
        return f"{text}, {place} hidden", (whole, place, gcd(size, vocabulary.unit))

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
    moe = architecture.moe
    if moe is not None:
        sizes["expert ffn"] = moe.expert.ffn_hidden_size
        if moe.shared is not None:
            sizes["shared ffn"] = moe.shared.ffn_hidden_size
        if moe.latent_size is not None:
            sizes["expert latent"] = moe.latent_size
    return sizes


def ffn_ratio_kept(ffn: int, hidden: int, small_ffn: int, small_hidden: int) -> bool:
    """S8: the same order, and the ratio within a factor of two."""
    cross, small_cross = ffn * small_hidden, small_ffn * hidden
    return order(ffn, hidden) == order(small_ffn, small_hidden) and (
        cross <= 2 * small_cross and small_cross <= 2 * cross
    )


# ---- everything else (S11) ----


def _unchanged(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    left, right = before.arguments.values, after.arguments.values
    one, other = ({dest: side[dest] for dest in side.keys() - SIZE_ARGUMENTS} for side in (left, right))
    count, dests = len(one), one.keys() | other.keys() if one != other else ()
    changed = sorted(dest for dest in dests if one.get(dest) != other.get(dest))
    return f"{count} arguments", ", ".join(changed) or f"{count} arguments, unchanged", not changed


_INVARIANTS: tuple[tuple[str, str, Callable[[Architecture, Architecture, Layout], Judgement]], ...] = (
    ("S1", "heads : query groups", heads),
    ("S2", "experts : top-k", _experts),
    ("S3", "attention width : hidden", attention_width),
    ("S4", "divisibility", _divisibility),
    ("S5", "equal dimensions", _equality),
    ("S6", "layers", _layers),
    ("S7", "vocabulary", _vocabulary),
    ("S8", "ffn : hidden", _feed_forward),
    ("S9", "latent attention", latent_attention),
    ("S10", "Mamba", linear_attention),
    ("S11", "everything else", _unchanged),
    ("S12", "no degenerate dimension", _degenerate),
)
