"""Corrections: where transformers' code of a family is not what its publisher published, and made so.

Each row says in words what is corrected; the words go into the report of every comparison it acts in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.standins.patching import patched

if TYPE_CHECKING:
    from harness.facts import Facts
    from harness.families.items import Config


@dataclass(frozen=True, slots=True)
class Correction:
    """Whose code is corrected when, in words, and how it is put in place."""

    applies: Callable[[Facts], bool]
    words: str
    install: Callable[[Config], AbstractContextManager[None]]


@contextmanager
def corrected(facts: Facts) -> Iterator[tuple[str, ...]]:
    """Correct what has to be for a model of ``facts`` while it is built and runs; the words of it."""
    rows = [row for row in CORRECTIONS if row.applies(facts)]
    with ExitStack() as stack:
        for row in rows:
            stack.enter_context(row.install(facts.config))
        yield tuple(row.words for row in rows)


def _scaled_by_mscale(facts: Facts) -> bool:
    family, scaling = facts.family, facts.config.get("rope_scaling") or {}
    latent_v2 = family is not None and family.model_type == "deepseek_v2"
    return latent_v2 and bool(scaling.get("mscale_all_dim"))


@contextmanager
def _with_mscale(config: Config) -> Iterator[None]:
    """DeepSeek-V2's attention made with the factor of YaRN in its scale, squared.

    As its publisher's own code (modeling_deepseek.py beside the checkpoint) has it.
    """
    import math

    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as modeling

    scaling = config["rope_scaling"]
    factor = scaling["factor"]
    scale = 0.1 * scaling["mscale_all_dim"] * math.log(factor) + 1.0 if factor > 1 else 1.0
    attention: Any = modeling.DeepseekV2Attention
    original = attention.__init__

    def initialized(self: Any, *rest: Any, **named: Any) -> None:
        original(self, *rest, **named)
        self.scaling *= scale * scale

    with patched(attention, "__init__", initialized):
        yield


CORRECTIONS: tuple[Correction, ...] = (
    Correction(
        _scaled_by_mscale,
        "corrected in transformers: the attention scale of DeepSeek-V2 takes the square of YaRN's factor "
        "(mscale_all_dim), as in its publisher's own code",
        _with_mscale,
    ),
)
