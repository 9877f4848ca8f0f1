"""HF layers: a plan and the publisher's lists -> the published layer that each tiny layer stands for.

The plan says how many layers of which kinds there are by the preset; what each of them *is* in the twin,
the published lists say at the index that it stands for. Where the lists and the preset disagree anywhere,
a layer about which they disagree is kept, so that the twin differs there from the Megatron model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.architecture import Architecture, layer_symbols
from harness.families.items import Config, Expectation, layer_count
from harness.families.patterns import moe_pattern, symbols
from harness.families.positions import no_rope_pattern, windows
from harness.families.rows import Family, MoELayers, Windows
from harness.layers import Attention, MoE
from harness.parity.no_twin import NoTwin
from harness.shrink import ShrinkPlan
from harness.shrink.invariants import layer_kinds

# What a step costs: onward to the next published layer nothing, to a later one less than to an earlier one.
_ONWARD, _LATER, _BACK = 0, 1, 3
# A layer on whose kind the preset and the publisher disagree outweighs any number of steps.
_DISPUTED = -1000
# Places looked at for each kind, those in dispute first: more than any published model has.
_MOST = 256

_SLIDING, _FULL = "sliding_attention", "full_attention"
_MIXERS = {"G": "linear_attention", "*": _FULL}


@dataclass(frozen=True, slots=True)
class Kind:
    """What one published layer is: its symbol in a hybrid, else experts, window and rotary positions."""

    symbol: str = ""
    moe: bool = False
    window: bool = False
    rope: bool = True


def published_kinds(family: Family, config: Config) -> tuple[Kind, ...]:
    """The kind of each published layer of Megatron's model, in order. Raises NoTwin where none says."""
    if family.hybrid:
        pattern, key = symbols(family, config)
        if not pattern:
            raise NoTwin(f"{key}, which names the layers, is not published")
        return tuple(Kind(symbol) for symbol in pattern)
    count = layer_count(config)
    if count is None:
        raise NoTwin("num_hidden_layers is not published")
    none: Sequence[int] = (0,) * count
    moe, key = moe_pattern(family, config) if family.experts is not None else (none, "")
    if moe is None:
        raise NoTwin(f"{key}: which layers hold experts is not published")
    window = _windowed(family, config, count)
    skips, key = no_rope_pattern(family, config) if family.no_rope_interval else (none, "")
    if skips is None:
        raise NoTwin(f"{key}: which layers have rotary positions is not published")
    return tuple(
        Kind("", bool(experts), bool(windowed), not skipped)
        for experts, windowed, skipped in zip(moe, window, skips, strict=True)
    )


def _windowed(family: Family, config: Config, count: int) -> Sequence[int]:
    for item in windows(family, config):
        if isinstance(item, Expectation) and item.dest == "window_attn_skip_freq":
            return tuple(item.value)
    return (0,) * count


def kept_layers(plan: ShrinkPlan, kinds: Sequence[Kind]) -> tuple[int, ...]:
    """The published layer of each tiny one; one more or fewer where the preset's number is wrong.

    Neighbours stay neighbours where they can, so that a boundary that is off by one layer shows.
    """
    by_preset = layer_kinds(plan.before, plan.before)
    wanted = [kind for kind in layer_kinds(plan.before, plan.after) if kind is not None]
    places: dict[int, list[int]] = defaultdict(list)
    for index, kind in enumerate(by_preset):
        if kind is not None and index < len(kinds):
            places[kind].append(index)
    for kind in wanted:
        if not places[kind]:
            raise NoTwin(f"the publisher has {len(kinds)} layers, the preset's kinds of layers begin later")
    disputed = {
        index
        for index, (ours, theirs) in enumerate(zip(_by_preset(plan.before), kinds, strict=False))
        if ours != theirs
    }
    ways = {
        kind: sorted(at, key=lambda index: (index not in disputed, index))[:_MOST]
        for kind, at in places.items()
    }
    kept = _cheapest(wanted, ways, disputed)
    if len(kinds) > plan.before.num_layers:
        return (*kept, len(kinds) - 1)
    return kept[:-1] if len(kinds) < plan.before.num_layers and len(kept) > 1 else kept


def _by_preset(model: Architecture) -> list[Kind]:
    if model.hybrid:
        return [Kind(symbol) for symbol in layer_symbols(model.pattern)]
    found = []
    for layer in model.layers:
        attention = layer.mixer if isinstance(layer.mixer, Attention) else None
        windowed = attention is not None and attention.window is not None
        found.append(Kind("", isinstance(layer.mlp, MoE), windowed, attention is None or attention.rope))
    return found


def _cheapest(
    wanted: Sequence[int], places: Mapping[int, Sequence[int]], disputed: Collection[int]
) -> tuple[int, ...]:
    """An index for each wanted kind so that the steps between them cost least; the lowest of equals."""

    def own(index: int) -> int:
        return _DISPUTED if index in disputed else 0

    best: dict[int, tuple[int, tuple[int, ...]]] = {
        index: (own(index), (index,)) for index in places[wanted[0]]
    }
    for kind in wanted[1:]:
        onward = {}
        for index in places[kind]:
            cost, path = min((cost + _step(last, index), path) for last, (cost, path) in best.items())
            onward[index] = (cost + own(index), (*path, index))
        best = onward
    return min(best.values())[1]


def _step(last: int, index: int) -> int:
    return _ONWARD if index == last + 1 else _LATER if index >= last else _BACK


def layer_keys(
    family: Family, config: Config, kinds: Sequence[Kind], kept: Sequence[int]
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The keys that say what the kept layers are, and the published decoder layers that they are."""
    if family.delta_net:
        return _delta_keys(kinds, kept)
    tiny = [kinds[index] for index in kept]
    keys: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if family.hybrid:
        return keys | {"hybrid_override_pattern": "".join(kind.symbol for kind in tiny)}, tuple(kept)
    if family.experts is not None:
        keys |= _moe_keys(family.experts.layers, [kind.moe for kind in tiny])
    if family.no_rope_interval:
        keys["no_rope_layers"] = [int(kind.rope) for kind in tiny]
        if "layer_types" in config:
            keys["layer_types"] = _cut(config, "layer_types", kept)
    if family.windows in (Windows.TYPED, Windows.LATE):
        keys["layer_types"] = [_SLIDING if kind.window else _FULL for kind in tiny]
    return keys, tuple(kept)


def _cut(config: Config, key: str, kept: Sequence[int]) -> list[Any]:
    published = config[key]
    if not isinstance(published, list) or len(published) <= max(kept):
        raise NoTwin(f"{key} is published, but not for every layer")
    return [published[index] for index in kept]


def _moe_keys(rule: MoELayers, moe: Sequence[bool]) -> dict[str, Any]:
    dense = [index for index, experts in enumerate(moe) if not experts]
    match rule:
        case MoELayers.STEP:
            return {"decoder_sparse_step": 1, "mlp_only_layers": dense}
        case MoELayers.AFTER_DENSE:
            if dense != list(range(len(dense))):
                raise NoTwin(
                    "a layer without experts comes after one with them: no key of this family says so"
                )
            return {"first_k_dense_replace": len(dense), "moe_layer_freq": 1}
        case MoELayers.INTERLEAVED:
            return {"moe_layers": [index for index, experts in enumerate(moe) if experts]}
    return {}


def _delta_keys(kinds: Sequence[Kind], kept: Sequence[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Two of Megatron's layers, a mixer and a feed-forward, are one decoder layer; the last may be half."""
    mixers, others = kept[::2], kept[1::2]
    paired = all(b == a + 1 for a, b in zip(mixers, others, strict=False))
    if not paired or any(index % 2 for index in mixers):
        raise NoTwin(
            "the layers of the plan are not whole decoder layers, a mixer and then a feed-forward each"
        )
    last = kinds[mixers[-1] + 1] if len(others) < len(mixers) else None
    symbols_after = [kinds[index].symbol for index in others] + ([last.symbol] if last else [])
    return {
        "num_hidden_layers": len(mixers),
        "layer_types": [_MIXERS[kinds[index].symbol] for index in mixers],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, symbol in enumerate(symbols_after) if symbol == "-"],
    }, tuple(index // 2 for index in mixers)
