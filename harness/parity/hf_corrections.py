"""HF corrections: where transformers' modeling code is not what the publisher's own code computes.

Each is declared in words by ``corrections`` and made by ``correct``; there is no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class _Correction:
    """``factor`` of a language model's config is 1 where there is nothing to correct."""

    model_type: str
    reason: str
    factor: Callable[[Mapping[str, Any]], float]


def _latent_scale(config: Mapping[str, Any]) -> float:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind, everywhere = scaling.get("rope_type", scaling.get("type")), scaling.get("mscale_all_dim")
    if kind != "yarn" or not everywhere or scaling["factor"] <= 1:
        return 1.0
    return float((0.1 * everywhere * math.log(scaling["factor"]) + 1.0) ** 2)


_ATTENTION_SCALES = (
    _Correction(
        "deepseek_v2",
        "transformers' DeepSeek-V2 leaves the square of YaRN's mscale out of the attention scale; the "
        "publisher's modeling_deepseek.py has it, and so has the twin",
        _latent_scale,
    ),
)


def corrections(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What ``correct`` changes in a model of ``config``, in words."""
    return tuple(row.reason for row in _ATTENTION_SCALES if _applies(row, config))


def correct(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Give the attentions of ``model`` the scale that the publisher's own code has."""
    for row in _ATTENTION_SCALES:
        if _applies(row, config):
            modules: Iterable[Any] = model.modules()
            for module in modules:
                if hasattr(module, "scaling") and hasattr(module, "kv_b_proj"):
                    module.scaling = module.scaling * row.factor(config)


def _applies(row: _Correction, config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == row.model_type and row.factor(config) != 1.0
