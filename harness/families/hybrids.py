"""Hybrids: what the publisher says of models whose layers differ in kind: patterns, Mamba, delta nets.

Megatron says them as a HybridModel, one symbol for each layer of one mixer or one feed-forward; what it
fixes is in ``ssm/mamba_mixer.py`` and ``ssm/gated_delta_net`` of megatron-core 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from harness.families.items import Config, Expectation, Item, Limit, Unknown, from_key, number, on_off
from harness.families.patterns import symbols
from harness.families.rows import Family


def hybrids(family: Family, config: Config) -> Iterator[Item]:
    if not family.hybrid:
        yield Expectation("export_model_type", "GPTModel", family.source)
        return
    yield Expectation("export_model_type", "HybridModel", family.source)
    pattern, key = symbols(family, config)
    yield (
        Unknown("hybrid_layer_pattern", key)
        if pattern is None
        else Expectation("hybrid_layer_pattern", pattern, key)
    )
    if "M" in (pattern or ""):
        yield from _mamba(family, config)
    if "G" in (pattern or ""):
        yield from _delta(family, config)


def _mamba(family: Family, config: Config) -> Iterator[Item]:
    yield from_key(config, "mamba_num_heads", "mamba_num_heads")
    yield from_key(config, "mamba_head_dim", "mamba_head_dim")
    yield from_key(config, "mamba_state_dim", "ssm_state_size", "mamba_state_dim")
    yield from_key(config, "mamba_num_groups", "n_groups", "mamba_num_groups")
    yield from _mamba_limits(family, config)


def _mamba_limits(family: Family, config: Config) -> Iterator[Item]:
    epsilon = from_key(config, "layernorm_epsilon", *family.epsilon)
    if isinstance(epsilon, Expectation) and epsilon.value != _BUILT_EPSILON:
        built = f"{_BUILT_EPSILON} in the norm of a Mamba mixer"
        yield Limit(f"{epsilon.source} {epsilon.value}", epsilon.source, built, _MIXERS)
    for key, built in _BUILT_MAMBA.items():
        value = config.get(key)
        if value is not None and value != built:
            yield Limit(f"{key} {on_off(value)}", key, on_off(built), _MIXERS)
    limits = config.get("time_step_limit")
    if isinstance(limits, list) and limits and not _unlimited(limits):
        published = f"time steps between {limits[0]} and {limits[-1]}"
        yield Limit(published, "time_step_limit", "time steps without a limit", _MIXERS)


_BUILT_EPSILON = 1e-05
_BUILT_MAMBA: Mapping[str, Any] = {
    "conv_kernel": 4,
    "mamba_hidden_act": "silu",
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
}
_MIXERS = "the Mamba layers differ"


def _unlimited(limits: list[Any]) -> bool:
    """A time step is positive, and no smaller than the largest number that JSON was written with."""
    low, high = number(limits[0]), number(limits[-1])
    return low is not None and high is not None and low <= 0 and (math.isinf(high) or high >= 1e30)


def _delta(family: Family, config: Config) -> Iterator[Item]:
    for dest in (
        "linear_num_key_heads",
        "linear_key_head_dim",
        "linear_num_value_heads",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    ):
        yield from_key(config, dest, dest)
    if family.zero_centered:
        yield Limit(
            "plain weights in the output norm of a delta net",
            family.source,
            "weights around zero in every norm",
            "they must be loaded less one",
        )
