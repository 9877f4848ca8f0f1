"""Effective: Megatron's arguments -> what of them the model that they build depends on.

``idle.py`` has the flags that mean nothing beside others; here are those whose default means nothing, and
the values that have two spellings (a factor of one, and none). Read off megatron-core 0.19 and Megatron-LM's
ModelOpt builder (``megatron/post_training/model_builder.py`` of core_v0.19.0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from harness.architecture import PER_LAYER, NotAModel, layer_symbols
from harness.arguments.idle import IDLE
from harness.arguments.kinds import has_layer, is_hybrid, rotary
from harness.arguments.values import Arguments

Values = Mapping[str, Any]


class NoEffect(Enum):
    """In place of a value that changes nothing in the model."""

    NO_EFFECT = "no effect"


NO_EFFECT = NoEffect.NO_EFFECT


def effective(arguments: Arguments, dest: str, num_layers: int | None = None) -> Any:
    """The value of ``dest``, patterns layer by layer; ``NO_EFFECT`` where the model does not depend on it.

    ``num_layers`` stands in for the argument's, so that a wrong one does not make every pattern wrong.
    """
    values = arguments.values
    if not all(depends(values) for depends in _DEPENDS.get(dest, ())):
        return NO_EFFECT
    value = values[dest]
    if dest in PER_LAYER:
        layers = values["num_layers"] if num_layers is None else num_layers
        return _by_layer(PER_LAYER[dest], value, layers)
    normal = _NORMAL.get(dest)
    return value if normal is None else normal(values, value)


# What an argument depends on


def _grouped(v: Values) -> bool:
    """Whether any layer has grouped-query attention."""
    return has_layer(v, "attention") and not _latent(v)


def _latent(v: Values) -> bool:
    return bool(v["multi_latent_attention"]) and not is_hybrid(v)


def _scales_scores(v: Values) -> bool:
    """Latent attention scales its softmax by these even where it does not scale its positions."""
    return rotary(v) == "yarn" or _rope_type(v, v["rope_type"]) == "yarn" or bool(v["mscale_all_dim"])


def _stretches(v: Values) -> bool:
    """The scales are taken times the logarithm of the factor, which is nothing for a factor of one."""
    return bool(v["rotary_scaling_factor"] > 1)


_OTHERS: tuple[tuple[str, Callable[[Values], bool]], ...] = (
    ("num_query_groups kv_channels add_qkv_bias", _grouped),
    # Megatron takes the L2 norm where both are set; latent attention knows this one alone.
    ("qk_layernorm", lambda v: _latent(v) or not v["export_qk_l2_norm"]),
    # YaRN rotates whole heads.
    ("rotary_percent", lambda v: rotary(v) != "yarn"),
    ("rope_scaling_factor", lambda v: bool(v["use_rope_scaling"])),
    ("rotary_scaling_factor", _scales_scores),
    ("mscale mscale_all_dim", _stretches),
    ("moe_layer_freq", lambda v: not is_hybrid(v)),
    ("moe_latent_size", lambda v: bool(v["num_experts"])),
    ("hybrid_layer_pattern", is_hybrid),
)


def _dependences() -> Mapping[str, tuple[Callable[[Values], bool], ...]]:
    """Of each argument, what must all hold for it to count."""
    found: dict[str, tuple[Callable[[Values], bool], ...]] = {}
    for dests, depends in (*((row.dests, row.used) for row in IDLE), *_OTHERS):
        for dest in dests.split():
            found[dest] = (*found.get(dest, ()), depends)
    # Idle in ModelOpt's builder alone, others pass it on; and for grouped-query attention Megatron refuses
    # all types but one.
    del found["rotary_seq_len_interpolation_factor"], found["rope_type"]
    return found


_DEPENDS = _dependences()


# Values with two spellings


def _rope_type(v: Values, value: Any) -> str:
    """Latent attention's own default is YaRN, which with a factor of one is plain rope."""
    if not v["multi_latent_attention"]:
        return value or "rope"
    return "rope" if value == "rope" or v["rotary_scaling_factor"] == 1 else "yarn"


def _positions(v: Values, value: Any) -> Any:
    """Latent attention rotates by itself, whatever the model around it is told, a table aside."""
    return "rope" if _latent(v) and value == "none" else value


def _one_is_none(v: Values, value: Any) -> Any:
    return None if not value or value == 1 else value


def _limiting(v: Values, value: Any) -> Any:
    """Groups of experts, of which all are chosen, limit nothing."""
    groups = v["moe_router_num_groups"]
    return None if groups == 1 or groups == v["moe_router_group_topk"] else value


_NORMAL: Mapping[str, Callable[[Values, Any], Any]] = {
    "position_embedding_type": _positions,
    "rope_type": _rope_type,
    "rotary_seq_len_interpolation_factor": _one_is_none,
    "moe_router_topk_scaling_factor": _one_is_none,
    "moe_router_num_groups": _limiting,
    "moe_router_group_topk": _limiting,
    "moe_shared_expert_intermediate_size": lambda v, value: value or None,
    "hybrid_layer_pattern": lambda v, value: layer_symbols(value),
}


# Patterns


def _by_layer(pattern: Callable[[Any, int], tuple[bool, ...]], value: Any, num_layers: int) -> Any:
    """1 for each layer that has it and 0 for the others; the value as it is where it gives no pattern."""
    try:
        return tuple(map(int, pattern(value, num_layers)))
    except NotAModel:
        return value
