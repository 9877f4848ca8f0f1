"""Layer sizes: an architecture -> the fewest layers and experts that keep S2 and S6, as arguments."""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Any

from harness.architecture import PER_LAYER, NotAModel, layer_symbols
from harness.layers import Attention, MoE
from harness.shrink.invariants import evenly_staged, layer_kinds, pipeline_stages
from harness.shrink.walk import shortest_walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from harness.architecture import Architecture
    from harness.layout import Layout

# A preset is untrusted: a size with ten digits must not keep the search busy. No plan of a published model
# has more query groups, heads or multiples of the fewest experts than this.
_MOST = 160


def few(most: int, limit: int = _MOST) -> Iterable[int]:
    """1 to ``most``, or as many of them as any real model needs, and ``most``."""
    return range(1, most + 1) if most <= limit else (*range(1, limit + 1), most)


def layer_changes(before: Architecture, layout: Layout) -> dict[str, Any]:
    """Arguments of the shortest sequence of layers that keeps S6; among those the fewest with experts."""
    kinds = [kind for kind in layer_kinds(before, before) if kind is not None]
    parts = pipeline_stages(before, layout)
    even = evenly_staged(len(kinds), layout)

    def fits(length: int) -> bool:
        enough = length >= min(layout.pp, len(kinds))
        return enough and (parts is not None or evenly_staged(length, layout) == even)

    walk = shortest_walk(kinds, fits, _kinds_with_experts(before, kinds))
    # The real layer that each of the fewer ones is like.
    models = [kinds.index(kind) for kind in walk]
    changes: dict[str, Any] = {"num_layers": len(walk)}
    if before.hybrid:
        symbols = layer_symbols(before.arguments["hybrid_layer_pattern"])
        pattern = "".join(symbols[index] for index in models)
        changes["hybrid_layer_pattern"] = _split(pattern, len(parts or [pattern]))
    for dest in PER_LAYER:
        if _READ_BY[dest](before):
            changes[dest] = _frequency(before, dest, models)
    return changes


def _kinds_with_experts(before: Architecture, kinds: Sequence[int]) -> set[int]:
    layers = zip(kinds, before.layers, strict=True)
    return {kind for kind, layer in layers if isinstance(layer.mlp, MoE)}


def _split(symbols: str, stages: int) -> str:
    """``symbols`` in as many pipeline stages, as even as may be."""
    cuts = [stage * len(symbols) // stages for stage in range(stages + 1)]
    return "|".join(symbols[start:end] for start, end in pairwise(cuts))


# The models that read each of the arguments in PER_LAYER.
_READ_BY: Mapping[str, Callable[[Architecture], bool]] = {
    "moe_layer_freq": lambda a: not a.hybrid and bool(a.arguments["num_experts"]),
    "window_attn_skip_freq": lambda a: a.arguments["window_size"] is not None,
    "no_rope_freq": lambda a: bool(a.arguments["no_rope_freq"]),
}


def _frequency(before: Architecture, dest: str, models: Sequence[int]) -> int | tuple[int, ...] | None:
    """The value of ``dest`` for the layers like ``models``: the real one where it says the same of them."""
    value, spread = before.arguments[dest], PER_LAYER[dest]
    real = spread(value, before.num_layers)
    wanted = tuple(real[index] for index in models)
    if isinstance(value, list | tuple):
        return tuple(map(int, wanted))
    # In a hybrid only attention layers have what windows and rotary positions are about.
    counts = [dest == "moe_layer_freq" or _has_attention(before, index) for index in models]
    try:
        now = spread(value, len(models))
    except NotAModel:
        return tuple(map(int, wanted))
    same = all(a == b for a, b, counted in zip(now, wanted, counts, strict=True) if counted)
    return value if same else tuple(map(int, wanted))


def _has_attention(before: Architecture, index: int) -> bool:
    return isinstance(before.layers[index].mixer, Attention)


def expert_choices(moe: MoE | None, layout: Layout) -> Iterator[dict[str, int]]:
    """Expert and top-k sizes in the real ratio (S2), fewest first, the real ones last."""
    if moe is None:
        yield {}
        return
    sizes = {"num_experts": moe.num_experts, "moe_router_topk": moe.moe_router_topk}
    if moe.num_groups and moe.group_topk:
        sizes["moe_router_num_groups"] = moe.num_groups
        sizes["moe_router_group_topk"] = moe.group_topk
    divisor = gcd(*sizes.values())
    for multiple in few(divisor):
        small = {dest: size // divisor * multiple for dest, size in sizes.items()}
        same_split = (small["num_experts"] % layout.ep == 0) == (moe.num_experts % layout.ep == 0)
        one = (small["moe_router_topk"] == 1) == (moe.moe_router_topk == 1)
        if same_split and one:
            yield small
