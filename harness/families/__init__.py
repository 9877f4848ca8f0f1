"""Families: a Hugging Face ``config.json`` -> the Megatron arguments that mean the same model.

``rows.py`` has a row for each ``model_type``; each other module is a topic and says which published key
gives which argument, and what of it no flag of Megatron can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harness.families.blocks import (
    activation,
    attention,
    biases,
    embeddings,
    inert,
    latent_attention,
    left_out,
    norms,
    sizes,
)
from harness.families.experts import experts
from harness.families.hybrids import hybrids
from harness.families.items import (
    Config,
    Expectation,
    Item,
    LeftOut,
    Limit,
    NotModelled,
    Reads,
    Unknown,
)
from harness.families.positions import by_distance, no_rope, positions, windows
from harness.families.rows import FAMILIES, INERT_KEYS, Family, find_family

__all__ = [
    "FAMILIES",
    "INERT_KEYS",
    "Config",
    "Expectation",
    "Family",
    "Item",
    "LeftOut",
    "Limit",
    "NotModelled",
    "Reads",
    "Unknown",
    "expectations",
    "find_family",
]

_TOPICS: tuple[Callable[[Family, Config], Iterator[Item]], ...] = (
    hybrids,
    sizes,
    latent_attention,
    norms,
    biases,
    embeddings,
    positions,
    no_rope,
    windows,
    by_distance,
    attention,
    activation,
    experts,
    left_out,
    inert,
)


def expectations(family: Family, config: Config) -> Iterator[Item]:
    """Everything that the published ``config`` says of Megatron's arguments, topic by topic."""
    for topic in _TOPICS:
        yield from topic(family, config)
