"""Audit: the full-size architecture against the published counts, a layout's limits, a recipe's blocks.

By arithmetic alone: what no forward pass of a shrunken model on one rank shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.architecture import Architecture
from harness.blocks import misfit_findings
from harness.finding import Finding, Severity
from harness.inventory import Counts, counts
from harness.layout import Layout
from harness.layout_rules import Limit, broken_limits, limit_findings
from harness.recipes import Recipe


@dataclass(frozen=True, slots=True)
class Audit:
    """Parameter counts at full size, and what is wrong with them or with the recipe's blocks.

    ``published`` holds the published ``total`` and ``active``, where there are any. ``with_buffers`` names
    those of the two that are the counted parameters and the experts' biases besides, which Megatron keeps
    as buffers. ``limits`` are those of the layout that the model breaks: with any it cannot be built there.
    """

    counts: Counts
    published: Mapping[str, int]
    with_buffers: tuple[str, ...]
    limits: tuple[Limit, ...]
    findings: tuple[Finding, ...]

    @property
    def detail(self) -> str:
        """The counts in words, buffers named where a published count has them."""
        text = f"{self.counts.total:,} parameters, {self.counts.active:,} active"
        if self.with_buffers:
            which = " and ".join(self.with_buffers)
            verb = "includes" if len(self.with_buffers) == 1 else "include"
            text += f"; the published {which} {verb} {self.counts.buffers:,} expert biases (buffers)"
        return text


def audit(
    architecture: Architecture, params: Mapping[str, Any] | None, layout: Layout, recipe: Recipe | None
) -> Audit:
    """Audit one architecture. ``params`` are the published counts, None where nothing is published."""
    counted = counts(architecture)
    known = _of_the_text_model(params or {})
    published = {key: known[key] for key in ("total", "active") if type(known.get(key)) is int}
    actual = {"total": counted.total, "active": counted.active}
    with_buffers = tuple(
        key for key, count in published.items() if counted.buffers and count == actual[key] + counted.buffers
    )
    findings = [*_counts(counted, published, known, params is not None)]
    limits = broken_limits(architecture, layout)
    findings.extend(limit_findings(architecture, limits))
    if recipe is not None:
        findings.extend(misfit_findings(architecture, layout, recipe))
    return Audit(counted, published, with_buffers, limits, tuple(findings))


def _of_the_text_model(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The counts of what a preset describes: of a multimodal model the text part, where it is published."""
    text = {key: params[f"text_{key}"] for key in ("total", "active") if f"text_{key}" in params}
    return {**params, **text}


def _counts(
    counted: Counts, published: Mapping[str, int], params: Mapping[str, Any], has_facts: bool
) -> Iterator[Finding]:
    for key, actual in (("total", counted.total), ("active", counted.active)):
        if key in published and published[key] not in (actual, actual + counted.buffers):
            difference = actual - published[key]
            besides = f", and {counted.buffers:,} expert biases (buffers)" if counted.buffers else ""
            yield Finding(
                "audit",
                Severity.ERROR,
                f"{key} parameters: {published[key]:,} published, {actual:,} in this preset "
                f"({difference:+,}){besides}",
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
