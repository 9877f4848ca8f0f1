"""Audit table: presets, layouts and recipes -> what ``harness audit`` prints, and its JSON.

A row per preset and layout: the bytes of weights on the largest rank, in bf16 and by recipe, and the
verdict. Below it every limit and every dimension at fault, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.architecture import Architecture
from harness.arguments import flag_for
from harness.blocks import Misfit, misfits
from harness.inventory import counts
from harness.layout import Layout
from harness.layout_rules import Limit, Owner, broken_limits, group_split
from harness.memory import Weights
from harness.messages import aligned
from harness.recipes import Recipe

# What people run; each splits what the one before it did not.
DEFAULT_LAYOUTS = ("tp1", "tp2", "tp4", "tp8")

_GIB = 2**30


@dataclass(frozen=True)
class Row:
    """The audit of one preset at one layout.

    ``bytes_bf16`` and ``bytes_by_recipe`` are of the weights on the largest rank, None and empty where
    Megatron refuses the layout, so that no rank has any. ``full`` is the model, for the words of a finding.
    """

    preset: str
    layout: Layout
    full: Architecture
    parameters: int
    active: int
    bytes_bf16: int | None
    bytes_by_recipe: Mapping[str, int]
    limits: tuple[Limit, ...]
    misfits: Mapping[str, tuple[Misfit, ...]]

    @property
    def verdict(self) -> str:
        """In words: refused and by which rules, or which recipes' blocks do not fit, or ok."""
        broken = [limit for limit in self.limits if limit.impossible] or self.limits
        if broken:
            what = "impossible" if broken[0].impossible else "refused"
            rules = dict.fromkeys(f"{limit.rule} ({limit.owner})" for limit in broken)
            return f"{what}: {', '.join(rules)}"
        padded = [name for name, found in self.misfits.items() if found]
        words = [f"{', '.join(padded)}: blocks do not fit" if padded else "ok"]
        groups = group_split(self.full, self.layout)
        if groups and "shared" in groups:
            words.append(groups)
        return "; ".join(words)


def audit_rows(
    models: Mapping[str, Architecture], layouts: Sequence[Layout], recipes: Sequence[Recipe]
) -> tuple[Row, ...]:
    """The rows of every model, by its preset's name, at every layout."""
    return tuple(row for name, full in models.items() for row in _rows_of_model(name, full, layouts, recipes))


def _rows_of_model(
    name: str, full: Architecture, layouts: Sequence[Layout], recipes: Sequence[Recipe]
) -> Iterator[Row]:
    counted, weights = counts(full), Weights(full)
    for layout in layouts:
        limits = broken_limits(full, layout)
        bf16, by_recipe = None, {}
        if not any(limit.owner is Owner.MEGATRON for limit in limits):
            bf16 = weights.largest(layout)
            by_recipe = {recipe.name: weights.largest(layout, recipe) for recipe in recipes}
        found = {recipe.name: misfits(full, layout, recipe) for recipe in recipes}
        yield Row(name, layout, full, counted.total, counted.active, bf16, by_recipe, limits, found)


# ---- as text ----


def audit_text(rows: Sequence[Row], recipes: Sequence[Recipe], unreadable: Iterable[str] = ()) -> str:
    """The table, then what is refused, then the dimensions at fault; ``unreadable`` presets have no row."""
    names = [recipe.name for recipe in recipes]
    header = ("preset", "layout", "parameters", "active", "bf16", *names, "verdict")
    lines = [_cells(row, names) for row in rows]
    lines += [(name, *[""] * (len(header) - 2), "unreadable") for name in unreadable]
    title = "GiB of weights on the largest rank; * where blocks do not fit, see below"
    table = aligned(header, lines, right=" ".join(("parameters active bf16", *names)))
    return "\n\n".join(filter(None, ("\n".join([title, *table]), refused_text(rows), misfits_text(rows))))


def _cells(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    weights = [_gib(row.bytes_bf16)]
    for name in names:
        size = row.bytes_by_recipe.get(name)
        weights.append(("*" if row.misfits[name] and size is not None else "") + _gib(size))
    return (row.preset, str(row.layout), f"{row.parameters:,}", f"{row.active:,}", *weights, row.verdict)


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / _GIB:.2f}"


def refused_text(rows: Iterable[Row]) -> str:
    """Every limit that a layout breaks, a line each; empty where none is."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        for limit in row.limits:
            flag = "-" if limit.dest is None else flag_for(limit.dest)
            found.setdefault((row.preset, flag, limit.message), []).append(str(row.layout))
    if not found:
        return ""
    lines = [(preset, ", ".join(layouts), *rest) for (preset, *rest), layouts in found.items()]
    return "\n".join(["refused", *aligned(("preset", "layout", "flag", "limit"), lines)])


def misfits_text(rows: Iterable[Row]) -> str:
    """Every dimension that blocks do not divide, under what then happens; empty where all fit."""
    found: dict[str, dict[tuple[str, str, str], tuple[list[str], list[str]]]] = {}
    for row in rows:
        for recipe, misfit, text in _said(row):
            key = (row.preset, text, ", ".join(misfit.inputs.matrices))
            layouts, recipes = found.setdefault(misfit.consequence, {}).setdefault(key, ([], []))
            layouts.append(str(row.layout))
            recipes.append(recipe)
    return "\n\n".join(
        "\n".join([f"blocks that do not fit: {consequence}", *_misfit_lines(entries)])
        for consequence, entries in found.items()
    )


def _said(row: Row) -> Iterator[tuple[str, Misfit, str]]:
    for recipe, found in row.misfits.items():
        for misfit in found:
            yield recipe, misfit, misfit.text(row.full)


def _misfit_lines(entries: Mapping[tuple[str, str, str], tuple[list[str], list[str]]]) -> list[str]:
    lines = [
        (preset, ", ".join(dict.fromkeys(layouts)), ", ".join(dict.fromkeys(recipes)), text, matrices)
        for (preset, text, matrices), (layouts, recipes) in entries.items()
    ]
    return aligned(("preset", "layout", "recipe", "dimension at fault", "inputs of"), lines)


# ---- as JSON ----


def audit_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The same rows for a JSON document."""
    return [
        {
            "preset": row.preset,
            "layout": str(row.layout),
            "parameters": row.parameters,
            "active_parameters": row.active,
            "verdict": row.verdict,
            "bytes_per_rank": {"bf16": row.bytes_bf16, **row.bytes_by_recipe},
            "limits": [
                {
                    "rule": limit.rule,
                    "owner": limit.owner.value,
                    "flag": None if limit.dest is None else flag_for(limit.dest),
                    "message": limit.message,
                    "impossible": limit.impossible,
                }
                for limit in row.limits
            ],
            "misfits": [
                {
                    "recipe": recipe,
                    "flag": flag_for(misfit.inputs.factors[0]),
                    "block": misfit.block,
                    "inputs_per_rank": misfit.inputs.per_rank,
                    "matrices": list(misfit.inputs.matrices),
                    "message": f"{text}: {misfit.consequence}",
                }
                for recipe, misfit, text in _said(row)
            ],
        }
        for row in rows
    ]
