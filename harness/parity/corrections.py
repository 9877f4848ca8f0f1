"""Corrections: where transformers' plain code computes something else than the publisher's own, made right.

A publisher's model runs through kernels, or through modeling code of the publisher's; in plain torch
transformers has its own. Each row says in words what that does wrong, and they go into the report. There are
no other corrections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Correction:
    """Language models of which configs it ``concerns``, what is wrong there, and how a model is put right for
    a sequence of so many tokens. ``correct`` stands on its own, and may be called again."""

    concerns: Callable[[Mapping[str, Any]], bool]
    words: str
    correct: Callable[[Any, int], None]


def corrections(config: Mapping[str, Any]) -> Iterator[Correction]:
    """The rows that concern a language model of ``config``."""
    return (row for row in CORRECTIONS if row.concerns(config))


def correct(published: nn.Module, sequence: int) -> tuple[str, ...]:
    """Put right what concerns ``published``, for sequences of so many tokens; the words of it."""
    model: Any = published
    rows = tuple(corrections(model.config.get_text_config().to_dict()))
    for row in rows:
        row.correct(published, sequence)
    return tuple(row.words for row in rows)


def _has_mamba(config: Mapping[str, Any]) -> bool:
    return bool(config.get("mamba_num_heads"))


def one_chunk(published: nn.Module, sequence: int) -> None:
    modules: Any = published.modules()
    for module in modules:
        if hasattr(module, "A_log"):
            module.chunk_size = sequence


def clamped_by_limit(published: nn.Module, sequence: int) -> None:
    modules: Any = published.modules()
    for module in modules:
        if hasattr(module, "A_log"):
            module.time_step_min = module.time_step_limit[0]


def _has_latent_yarn(config: Mapping[str, Any]) -> bool:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    yarn = scaling.get("rope_type", scaling.get("type")) == "yarn"
    everywhere = bool(scaling.get("mscale_all_dim"))
    return config.get("model_type") == "deepseek_v2" and yarn and everywhere and scaling["factor"] > 1


def latent_scale(published: nn.Module, sequence: int) -> None:
    modules: Any = published.modules()
    for module in modules:
        if hasattr(module, "kv_b_proj"):
            scaling = module.config.rope_parameters
            mscale = 0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1.0
            module.scaling = module.qk_head_dim**-0.5 * mscale**2


CORRECTIONS: tuple[Correction, ...] = (
    Correction(
        _has_mamba,
        "transformers' plain Mamba scan adds the states of chunks up over the wrong axis: it has one chunk",
        one_chunk,
    ),
    Correction(
        _has_mamba,
        "transformers' plain Mamba scan keeps time steps above time_step_min, its kernels within "
        "time_step_limit: the limit holds",
        clamped_by_limit,
    ),
    Correction(
        _has_latent_yarn,
        "transformers' DeepSeek-V2 leaves the square of YaRN's mscale out of the attention scale; the "
        "publisher's modeling_deepseek.py has it, and so has the twin",
        latent_scale,
    ),
)
