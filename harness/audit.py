"""Audit: the full-size architecture against the published parameter counts and the recipe's blocks.

By arithmetic alone. A forward pass never shows a dimension that a block size does not divide: ModelOpt
zero-pads it without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.architecture import Architecture
from harness.finding import Finding, Severity
from harness.inventory import Counts, counts
from harness.layout import Layout
from harness.recipes import Recipe


@dataclass(frozen=True, slots=True)
class Audit:
    """Parameter counts at full size, and what is wrong with them or with the recipe's blocks."""

    counts: Counts
    published: Mapping[str, int]
    findings: tuple[Finding, ...]


def audit(
    architecture: Architecture, params: Mapping[str, Any] | None, layout: Layout, recipe: Recipe | None
) -> Audit:
    """Audit one architecture. ``params`` are the published counts, None where nothing is published."""
    counted = counts(architecture)
    known = params or {}
    published = {key: known[key] for key in ("total", "active") if type(known.get(key)) is int}
    findings = [*_counts(counted, published, known, params is not None)]
    findings.extend(_splits(architecture, layout))
    if recipe is not None:
        findings.extend(_blocks(architecture, layout, recipe))
    return Audit(counted, published, tuple(findings))


def _counts(
    counted: Counts, published: Mapping[str, int], params: Mapping[str, Any], has_facts: bool
) -> Iterator[Finding]:
    for key, actual in (("total", counted.total), ("active", counted.active)):
        if key in published and published[key] != actual:
            difference = actual - published[key]
            yield Finding(
                "audit",
                Severity.ERROR,
                f"{key} parameters: {published[key]:,} published, {actual:,} in this preset "
                f"({difference:+,})",
                expected=published[key],
                actual=actual,
            )
        if key in params and key not in published:
            yield Finding(
                "audit",
                Severity.ERROR,
                f"the published count of {key} parameters is {params[key]!r}, which is no whole number",
                actual=params[key],
            )
    if has_facts and "total" not in published:
        yield Finding(
            "audit",
            Severity.WARNING,
            f"no parameter count is published: {counted.total:,} could not be checked",
            actual=counted.total,
        )


def _splits(architecture: Architecture, layout: Layout) -> Iterator[Finding]:
    """An error for each size that the layout does not divide, as Megatron would refuse it."""
    attention, dense, moe = architecture.attention, architecture.dense, architecture.moe
    sizes = [
        ("num_attention_heads", attention.num_attention_heads, layout.tp, "tp"),
        ("padded_vocab_size", architecture.padded_vocab_size, layout.tp, "tp"),
        ("num_layers", architecture.num_layers, layout.pp, "pp"),
    ]
    if layout.tp % attention.num_query_groups:
        sizes.append(("num_query_groups", attention.num_query_groups, layout.tp, "tp"))
    if dense is not None:
        sizes.append(("ffn_hidden_size", dense.ffn_hidden_size, layout.tp, "tp"))
    if moe is not None:
        sizes.append(("num_experts", moe.num_experts, layout.ep, "ep"))
        sizes.append(("moe_ffn_hidden_size", moe.expert.ffn_hidden_size, layout.etp, "etp"))
        if moe.shared is not None:
            size = moe.shared.ffn_hidden_size
            sizes.append(("moe_shared_expert_intermediate_size", size, layout.tp, "tp"))
    for dest, size, ranks, axis in sizes:
        if size % ranks:
            yield architecture.arguments.finding(
                dest,
                f"{size} / {axis}{ranks} is not whole: Megatron refuses layout {layout}",
                stage="audit",
                expected=f"a multiple of {ranks}",
                actual=size,
            )


def _blocks(architecture: Architecture, layout: Layout, recipe: Recipe) -> Iterator[Finding]:
    """A warning for each input dimension, per rank, that a block size of the recipe does not divide."""
    for dest, size, ranks, role in _input_dimensions(architecture, layout):
        for block in recipe.block_sizes:
            if size % ranks == 0 and size // ranks % block:
                per_rank = f"{size} / {ranks} = {size // ranks}" if ranks > 1 else f"{size}"
                yield architecture.arguments.finding(
                    dest,
                    f"{role} takes {per_rank} inputs, not a multiple of {block}: {recipe.name} pads its last "
                    "block with zeros, and the forward pass does not show it",
                    stage="audit",
                    severity=Severity.WARNING,
                    expected=f"a multiple of {block}",
                    actual=size // ranks,
                )


def _input_dimensions(architecture: Architecture, layout: Layout) -> Iterator[tuple[str, int, int, str]]:
    """(argument, full size, ranks it is split over, role) for every quantized matrix's inputs."""
    yield "hidden_size", architecture.hidden_size, 1, "linear_qkv"
    yield "kv_channels", architecture.attention.query_width, layout.tp, "linear_proj"
    dense, moe = architecture.dense, architecture.moe
    if dense is not None:
        yield "ffn_hidden_size", dense.ffn_hidden_size, layout.tp, "linear_fc2"
    if moe is not None:
        yield "moe_ffn_hidden_size", moe.expert.ffn_hidden_size, layout.etp, "an expert's linear_fc2"
        if moe.shared is not None:
            yield (
                "moe_shared_expert_intermediate_size",
                moe.shared.ffn_hidden_size,
                layout.tp,
                "the shared expert's linear_fc2",
            )
