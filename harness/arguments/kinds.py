"""Kinds: effective arguments -> which kinds of layers and of positions their model has.

Asked of any arguments, wrong ones too; the layers themselves, with their sizes, are ``architecture.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SYMBOLS = {"mamba": "M", "delta": "G", "attention": "*", "dense": "-", "moe": "E"}


def is_hybrid(values: Mapping[str, Any]) -> bool:
    return bool(values["export_model_type"] == "HybridModel")


def main_pattern(values: Mapping[str, Any]) -> str:
    """The hybrid pattern without its multi-token prediction part, pipeline stages left in."""
    return (values["hybrid_layer_pattern"] or "").partition("/")[0]


def has_layer(values: Mapping[str, Any], kind: str) -> bool:
    """Whether a layer is ``mamba``, ``delta``, ``attention`` (plain or latent), ``dense`` or ``moe``."""
    if is_hybrid(values):
        return _SYMBOLS[kind] in main_pattern(values)
    if kind in ("dense", "moe"):
        frequency, experts = values["moe_layer_freq"], values["num_experts"] is not None
        holds = frequency if isinstance(frequency, list | tuple) else (1,) if frequency == 1 else (1, 0)
        return experts and any(holds) if kind == "moe" else not (experts and all(holds))
    return kind == "attention"


def rotary(values: Mapping[str, Any]) -> str | None:
    """The kind of rotary positions that attention gets: ``rope``, ``yarn``, ``latent`` (its own), or None."""
    if values["multi_latent_attention"]:
        return "latent"
    if values["enable_gpt_oss"] and not is_hybrid(values):
        return "yarn"
    kind = values["position_embedding_type"]
    return kind if kind in ("rope", "yarn") else None
