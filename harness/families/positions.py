"""Positions: what the publisher says of rotary positions, their scaling, and which tokens a layer sees.

Scaling is as transformers' ``modeling_rope_utils.py`` reads it, whose defaults stand where a key of
``rope_scaling`` is left out; what Megatron fixes is in its ``rotary_pos_embedding.py``,
``yarn_rotary_pos_embedding.py`` and ``multi_latent_attention.py`` of megatron-core 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.families.items import (
    Config,
    Expectation,
    Item,
    Limit,
    NotModelled,
    Unknown,
    layer_count,
    number,
    whole,
)
from harness.families.rows import Family, Windows

# megatron-core's RotaryEmbedding scales with these, and Megatron-LM's ModelOpt builder passes no factor.
_BUILT_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# megatron-core's MLATransformerConfig, of which no flag reaches these.
_BUILT_LATENT_YARN = {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1}
_ROTATED = "the rotated queries and keys differ"


def positions(family: Family, config: Config) -> Iterator[Item]:
    if not family.rotary:
        yield Expectation("position_embedding_type", "none", family.source)
        return
    # transformers 5 moved these keys into rope_parameters.
    parameters = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    rope: Config = parameters if isinstance(parameters, Mapping) else config
    if isinstance(parameters, Mapping):
        scaling = parameters
    base = rope.get("rope_theta", config.get("rope_theta"))
    yield (
        Expectation("rotary_base", base, "rope_theta")
        if base is not None
        else Unknown("rotary_base", "rope_theta")
    )
    yield _interleaved(family, config)
    yield _share(family, config, rope)
    if scaling is not None and not isinstance(scaling, Mapping):
        yield NotModelled("use_rope_scaling", "rope_scaling", scaling)
    scaling = scaling if isinstance(scaling, Mapping) else {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    yield from _no_other_scaling(family, kind)
    if family.latent:
        yield from _latent(family, kind, scaling)
    elif kind == "yarn":
        yield Expectation("position_embedding_type", "yarn", "rope_scaling")
        yield from _yarn(family, config, scaling)
    else:
        yield Expectation("position_embedding_type", "rope", family.source)
        if kind == "llama3":
            yield from _llama3(family, scaling)
        elif kind != "default":
            yield NotModelled("use_rope_scaling", "rope_scaling", kind)


def _interleaved(family: Family, config: Config) -> Item:
    if family.latent and config.get("rope_interleave") is False:
        return Limit(
            "rope_interleave off", "rope_interleave", "the interleaved rotation of latent attention", _ROTATED
        )
    # Megatron's latent attention interleaves by itself, so that its flag stays off for it too.
    return Expectation("rotary_interleaved", family.interleaved, family.source)


def _share(family: Family, config: Config, rope: Config) -> Item:
    """The rotated part of a head; latent attention has channels of its own for it."""
    if family.latent:
        return Expectation("rotary_percent", 1.0, family.source)
    rotated, head = whole(config, "rotary_dim"), whole(config, "head_dim")
    if rotated is not None and head is not None:
        if rotated > head:
            return NotModelled("rotary_percent", "rotary_dim", rotated)
        return Expectation("rotary_percent", rotated / head, "rotary_dim / head_dim")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share is None:
        return Expectation("rotary_percent", family.rotary_share, "partial_rotary_factor")
    return Expectation("rotary_percent", share, "partial_rotary_factor")


def _no_other_scaling(family: Family, kind: Any) -> Iterator[Item]:
    if kind != "llama3":
        yield Expectation("rotary_seq_len_interpolation_factor", None, "rope_scaling")
    if kind in ("default", "yarn") and not family.latent:
        yield Expectation("use_rope_scaling", False, "rope_scaling")
    if not family.latent:
        # For grouped-query attention Megatron takes no other.
        yield Expectation("rope_type", "rope", family.source)


def _llama3(family: Family, scaling: Config) -> Iterator[Item]:
    if family.hybrid:
        yield Limit("llama3", "rope_scaling", "a hybrid model without rope scaling", _ROTATED)
        return
    yield Expectation("use_rope_scaling", True, "rope_scaling")
    yield Expectation("rope_scaling_factor", scaling.get("factor"), "rope_scaling.factor")
    for key, built in _BUILT_LLAMA3.items():
        if scaling.get(key) != built:
            yield Limit(f"{key} {scaling.get(key)}", "rope_scaling", f"{built:g}", _ROTATED)


def _latent(family: Family, kind: Any, scaling: Config) -> Iterator[Item]:
    yield Expectation("position_embedding_type", "rope", family.source)
    if kind == "default":
        yield Expectation("rope_type", "rope", "rope_scaling")
        yield Expectation("rotary_scaling_factor", 1.0, "rope_scaling")
        return
    if kind != "yarn":
        yield NotModelled("rope_type", "rope_scaling", kind)
        return
    yield Expectation("rope_type", "yarn", "rope_scaling")
    yield from _scales(scaling)
    for key, built in _BUILT_LATENT_YARN.items():
        published = scaling.get(key, _YARN_DEFAULTS.get(key))
        if published is None:
            yield Unknown("its effect on the rotary positions", f"rope_scaling.{key}")
        elif published != built:
            yield Limit(f"{key} {published}", "rope_scaling", f"{built}", _ROTATED)
    if scaling.get("truncate") is False:
        yield Limit("truncate off", "rope_scaling", "a ramp between whole numbers", _ROTATED)


def _yarn(family: Family, config: Config, scaling: Config) -> Iterator[Item]:
    yield from _scales(scaling)
    dest = "yarn_original_max_position_embeddings"
    key = "original_max_position_embeddings"
    published = scaling.get(key, config.get(key))
    yield (
        Unknown(dest, f"rope_scaling.{key}")
        if published is None
        else Expectation(dest, published, f"rope_scaling.{key}")
    )
    for key, default in _YARN_DEFAULTS.items():
        yield Expectation(f"yarn_{key}", scaling.get(key) or default, f"rope_scaling.{key}")
    truncate = scaling.get("truncate") is not False
    yield Expectation("yarn_correction_range_round_to_int", truncate, "rope_scaling.truncate")
    share = config.get("partial_rotary_factor", scaling.get("partial_rotary_factor", family.rotary_share))
    if share != 1.0:
        yield Limit(f"partial_rotary_factor {share}", "rope_scaling", "YaRN over whole heads", _ROTATED)


def _scales(scaling: Config) -> Iterator[Item]:
    """The factor, and the two numbers by which it scales the rotated channels and the softmax."""
    factor = scaling.get("factor")
    yield (
        Unknown("rotary_scaling_factor", "rope_scaling.factor")
        if factor is None
        else Expectation("rotary_scaling_factor", factor, "rope_scaling.factor")
    )
    if scaling.get("attention_factor") is not None:
        yield NotModelled("mscale", "rope_scaling.attention_factor", scaling["attention_factor"])
        return
    scale, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if bool(scale) is not bool(everywhere):
        yield NotModelled("mscale", "rope_scaling.mscale", f"{scale} beside mscale_all_dim {everywhere}")
        return
    yield Expectation("mscale", scale or 1.0, "rope_scaling.mscale")
    yield Expectation("mscale_all_dim", everywhere or 0.0, "rope_scaling.mscale_all_dim")


# Which layers


def no_rope(family: Family, config: Config) -> Iterator[Item]:
    """Layers without rotary positions: 1 in the argument's pattern."""
    if not family.rotary:
        return
    layers = layer_count(config)
    if not family.no_rope_interval:
        if layers is not None:
            yield Expectation("no_rope_freq", (0,) * layers, family.source)
        return
    skips, source = no_rope_pattern(family, config)
    if layers is None or skips is None:
        yield Unknown("no_rope_freq", "num_hidden_layers" if layers is None else source)
        return
    yield Expectation("no_rope_freq", skips, source)


def no_rope_pattern(family: Family, config: Config) -> tuple[tuple[int, ...] | None, str]:
    """1 for each layer without rotary positions, and the key that says so.

    The published list has it the other way round: 1 is a layer with them.
    """
    layers = layer_count(config)
    published = config.get("no_rope_layers")
    interval = config.get("no_rope_layer_interval", family.no_rope_interval)
    if published:
        rotated = _flags(published, layers)
        return rotated and tuple(1 - entry for entry in rotated), "no_rope_layers"
    source = "no_rope_layer_interval" if "no_rope_layer_interval" in config else family.source
    if layers is None or type(interval) is not int or interval < 1:
        return None, source
    return tuple(int((index + 1) % interval == 0) for index in range(layers)), source


def _flags(published: Any, layers: int | None) -> tuple[int, ...] | None:
    if layers is None or not isinstance(published, list) or len(published) < layers:
        return None
    flags = published[:layers]
    return tuple(map(int, flags)) if all(flag in (0, 1) for flag in flags) else None


def windows(family: Family, config: Config) -> Iterator[Item]:
    """Sliding windows: how wide, and which layers (1 in the argument's pattern).

    A published width counts the token itself, Megatron's the tokens before it.
    """
    types = config.get("layer_types")
    width, layers = config.get("sliding_window"), layer_count(config)
    switched, late = config.get("use_sliding_window"), config.get("max_window_layers")
    if family.windows in (Windows.SWITCHED, Windows.LATE) and not switched:
        width = width if _are_sliding(types) else None
    if family.windows is Windows.NONE:
        if _are_sliding(types):
            yield NotModelled("window_size", "layer_types", "sliding_attention")
        yield Expectation("window_size", None, family.source)
        return
    source = "use_sliding_window" if switched is False and not _are_sliding(types) else "sliding_window"
    if width is None and not _are_sliding(types):
        yield Expectation("window_size", None, source)
        return
    if type(width) is not int or width < 1:
        yield NotModelled("window_size", "sliding_window", width)
        return
    pattern, key = _window_pattern(family, types, layers, late)
    if pattern is not None and not any(pattern):
        yield Expectation("window_size", None, key)
        return
    yield Expectation("window_size", (width - 1, 0), "sliding_window")
    yield (
        Unknown("window_attn_skip_freq", key)
        if pattern is None
        else Expectation("window_attn_skip_freq", pattern, key)
    )


def _are_sliding(types: Any) -> bool:
    return isinstance(types, list) and "sliding_attention" in types


def _window_pattern(
    family: Family, types: Any, layers: int | None, late: Any
) -> tuple[tuple[int, ...] | None, str]:
    if layers is None:
        return None, "num_hidden_layers"
    if isinstance(types, list) and family.windows in (Windows.LATE, Windows.TYPED):
        known = len(types) == layers and all(
            kind in ("sliding_attention", "full_attention") for kind in types
        )
        return tuple(int(kind == "sliding_attention") for kind in types) if known else None, "layer_types"
    if family.windows is Windows.LATE:
        if type(late) is not int:
            return None, "max_window_layers"
        return tuple(int(index >= late) for index in range(layers)), "max_window_layers"
    if family.windows is Windows.TYPED:
        # Its configuration file alternates, beginning with a window.
        return tuple((index + 1) % 2 for index in range(layers)), family.source
    return (1,) * layers, "sliding_window"


def by_distance(family: Family, config: Config) -> Iterator[Item]:
    """Llama-4's chunks and temperature: neither can be said, and both change nothing in short texts."""
    if not family.no_rope_interval:
        return
    skips, _ = no_rope_pattern(family, config)
    chunk = config.get("attention_chunk_size")
    types = config.get("layer_types")
    chunked = types is None or (isinstance(types, list) and "chunked_attention" in types)
    if number(chunk) is not None and chunked:
        yield Limit(
            f"attention in chunks of {chunk}",
            "attention_chunk_size",
            "full attention",
            f"the model differs beyond {chunk} tokens",
        )
    # Left out, its configuration file has them on.
    tuned, floor = config.get("attn_temperature_tuning", True), config.get("floor_scale", 8192)
    scale = config.get("attn_scale", 0.1)
    if tuned and skips is not None and any(skips):
        yield Limit(
            f"attn_scale {scale} by position (floor_scale {floor})",
            "attn_temperature_tuning",
            "no scale of queries by position",
            f"the layers without rotary positions differ from token {floor} on",
        )
