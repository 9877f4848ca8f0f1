"""Patterns: which of the published layers hold experts, attention, Mamba or a delta net.

One entry or symbol for each layer of Megatron's model.
"""

from __future__ import annotations

from typing import Any

from harness.families.items import Config, layer_count
from harness.families.rows import Family, MoELayers

# transformers renamed two of these.
_SYMBOLS = {
    "mamba": "M",
    "attention": "*",
    "linear_attention": "M",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}


def symbols(family: Family, config: Config) -> tuple[str | None, str]:
    """One symbol per Megatron layer of a hybrid family, None where it is not published; and the key."""
    if family.delta_net:
        return _two_for_each(family, config)
    pattern, kinds = config.get("hybrid_override_pattern"), config.get("layers_block_type")
    if isinstance(kinds, list) and all(isinstance(kind, str) and kind in _SYMBOLS for kind in kinds):
        return "".join(_SYMBOLS[kind] for kind in kinds), "layers_block_type"
    if isinstance(pattern, str) and set(pattern) <= set(_SYMBOLS.values()):
        return pattern, "hybrid_override_pattern"
    return None, "hybrid_override_pattern"


def _two_for_each(family: Family, config: Config) -> tuple[str | None, str]:
    """A decoder layer of mixer and feed-forward is two layers of a hybrid model."""
    layers, kinds = layer_count(config), config.get("layer_types")
    interval = config.get("full_attention_interval", 4)  # as its configuration file has it
    if layers is None:
        return None, "num_hidden_layers"
    moe = _step(config, layers)
    if isinstance(kinds, list):
        known = len(kinds) == layers and all(kind in ("linear_attention", "full_attention") for kind in kinds)
        mixers = ["G" if kind == "linear_attention" else "*" for kind in kinds] if known else None
        key = "layer_types"
    elif type(interval) is int and interval > 0:
        mixers = ["G" if (index + 1) % interval else "*" for index in range(layers)]
        key = "full_attention_interval"
    else:
        mixers, key = None, "full_attention_interval"
    if mixers is None or moe is None:
        return None, key
    return "".join(mixer + "-E"[experts] for mixer, experts in zip(mixers, moe, strict=True)), key


def has_experts(family: Family, config: Config) -> bool:
    """Whether any layer holds experts; a family that can have them may leave them out of its pattern."""
    if family.experts is None:
        return False
    if family.hybrid:
        return "E" in (symbols(family, config)[0] or "E")
    return True


def has_dense_layers(family: Family, config: Config) -> bool:
    """Whether any layer has a dense feed-forward, whose size then counts."""
    if family.hybrid:
        return "-" in (symbols(family, config)[0] or "-")
    if family.experts is None:
        return True
    pattern, _ = moe_pattern(family, config)
    return pattern is None or 0 in pattern


def moe_pattern(family: Family, config: Config) -> tuple[tuple[int, ...] | None, str]:
    """1 for each layer with experts, 0 for the others; and the keys that say so."""
    layers = layer_count(config)
    if family.experts is None or layers is None:
        return None, "num_hidden_layers"
    match family.experts.layers:
        case MoELayers.STEP:
            return _step(config, layers), "decoder_sparse_step, mlp_only_layers"
        case MoELayers.AFTER_DENSE:
            return _after_dense(config, layers), "first_k_dense_replace, moe_layer_freq"
        case MoELayers.INTERLEAVED:
            return _interleaved(config, layers)
    return (1,) * layers, family.source


def _step(config: Config, layers: int) -> tuple[int, ...] | None:
    step, dense = config.get("decoder_sparse_step", 1), _indices(config.get("mlp_only_layers") or [])
    if dense is None:
        return None
    return tuple(
        int(index not in dense and isinstance(step, int) and step > 0 and (index + 1) % step == 0)
        for index in range(layers)
    )


def _after_dense(config: Config, layers: int) -> tuple[int, ...] | None:
    dense, every = config.get("first_k_dense_replace"), config.get("moe_layer_freq", 1)
    if type(dense) is not int or type(every) is not int or every < 1:
        return None
    return tuple(int(index >= dense and index % every == 0) for index in range(layers))


def _interleaved(config: Config, layers: int) -> tuple[tuple[int, ...] | None, str]:
    step, listed = config.get("interleave_moe_layer_step"), _indices(config.get("moe_layers"))
    if listed is not None:
        return tuple(int(index in listed) for index in range(layers)), "moe_layers"
    if type(step) is not int or step < 1:
        return None, "interleave_moe_layer_step"
    # The last of every step layers.
    return tuple(int((index + 1) % step == 0) for index in range(layers)), "interleave_moe_layer_step"


def _indices(listed: Any) -> frozenset[int] | None:
    return frozenset(index for index in listed if type(index) is int) if isinstance(listed, list) else None
