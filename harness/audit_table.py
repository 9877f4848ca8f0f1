"""Audit table: presets, layouts and recipes -> what ``harness audit`` prints, and its JSON.

A row per preset and layout: the bytes of weights on the largest rank, in bf16 and by recipe, and the
verdict. Below it every limit and every dimension at fault, with the reason. Of many recipes those of which
all is the same in every row share a column, which then has a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.architecture import Architecture
from harness.arguments import flag_for
from harness.blocks import Misfit, misfits_among
from harness.dimensions import dimensions
from harness.inventory import counts
from harness.layout import Layout
from harness.layout_rules import Limit, Owner, broken_limits, group_split
from harness.memory import Weights
from harness.messages import aligned
from harness.recipes import Recipe

# What people run; each splits what the one before it did not.
DEFAULT_LAYOUTS = ("tp1", "tp2", "tp4", "tp8")

_GIB = 2**30

# More recipes than this have no column each.
_MOST_COLUMNS = 8


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
        return self.verdict_of([name for name, found in self.misfits.items() if found])

    def verdict_of(self, padded: Sequence[str]) -> str:
        """The verdict, with these names for the recipes whose blocks do not fit."""
        broken = [limit for limit in self.limits if limit.impossible] or self.limits
        if broken:
            what = "impossible" if broken[0].impossible else "refused"
            rules = dict.fromkeys(f"{limit.rule} ({limit.owner})" for limit in broken)
            return f"{what}: {', '.join(rules)}"
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
        known = tuple(dimensions(full, layout))
        found = {recipe.name: misfits_among(known, full, recipe) for recipe in recipes}
        yield Row(name, layout, full, counted.total, counted.active, bf16, by_recipe, limits, found)


# ---- as text ----


@dataclass(frozen=True, slots=True)
class Column:
    """Recipes that a table says the same of, and what stands at its head."""

    label: str
    names: tuple[str, ...]


def columns_of(rows: Sequence[Row], recipes: Sequence[Recipe]) -> tuple[Column, ...]:
    """A column for each recipe, or for those of many recipes that no row tells apart, with a number."""
    names = [recipe.name for recipe in recipes]
    if len(names) <= _MOST_COLUMNS:
        return tuple(Column(name, (name,)) for name in names)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        alike.setdefault(tuple(_said_of(row, name) for row in rows), []).append(name)
    return tuple(Column(f"[{number}]", tuple(found)) for number, found in enumerate(alike.values(), 1))


def _said_of(row: Row, name: str) -> tuple[Any, ...]:
    """All that the text says of a recipe in a row."""
    found = [(misfit.dimension, misfit.block, misfit.consequence) for misfit in row.misfits[name]]
    return (_gib(row.bytes_by_recipe.get(name)), tuple(found))


def audit_text(rows: Sequence[Row], recipes: Sequence[Recipe], unreadable: Iterable[str] = ()) -> str:
    """The table, then what is refused, then the dimensions at fault; ``unreadable`` presets have no row."""
    columns = columns_of(rows, recipes)
    labels = [column.label for column in columns]
    header = ("preset", "layout", "parameters", "active", "bf16", *labels, "verdict")
    lines = [_cells(row, columns) for row in rows]
    lines += [(name, *[""] * (len(header) - 2), "unreadable") for name in unreadable]
    title = "GiB of weights on the largest rank; * where blocks do not fit, see below"
    table = aligned(header, lines, right=" ".join(("parameters active bf16", *labels)))
    parts = ("\n".join([title, *table]), _legend(columns), refused_text(rows), misfits_text(rows, columns))
    return "\n\n".join(filter(None, parts))


def _legend(columns: Iterable[Column]) -> str:
    """What numbered columns stand for; empty where columns have the names of recipes."""
    lines = [(column.label, ", ".join(column.names)) for column in columns if column.names != (column.label,)]
    return "\n".join(aligned(("column", "recipes"), lines)) if lines else ""


def _cells(row: Row, columns: Sequence[Column]) -> tuple[str, ...]:
    weights = [_gib(row.bytes_bf16)]
    for column in columns:
        size = row.bytes_by_recipe.get(column.names[0])
        weights.append(("*" if row.misfits[column.names[0]] and size is not None else "") + _gib(size))
    padded = [column.label for column in columns if row.misfits[column.names[0]]]
    cells = (row.preset, str(row.layout), f"{row.parameters:,}", f"{row.active:,}", *weights)
    return (*cells, row.verdict_of(padded))


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


def misfits_text(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    """Every dimension that blocks do not divide, under what then happens; empty where all fit."""
    labels = {column.names[0]: column.label for column in columns}
    found: dict[str, dict[tuple[str, str, str], tuple[list[str], list[str]]]] = {}
    for row in rows:
        for recipe, misfit, text in _said(row):
            key = (row.preset, text, _whose(misfit))
            if recipe not in labels:
                continue  # said of the first recipe in its column
            layouts, recipes = found.setdefault(misfit.consequence, {}).setdefault(key, ([], []))
            layouts.append(str(row.layout))
            recipes.append(labels[recipe])
    return "\n\n".join(
        "\n".join([f"blocks that do not fit: {consequence}", *_misfit_lines(entries)])
        for consequence, entries in found.items()
    )


def _said(row: Row) -> Iterator[tuple[str, Misfit, str]]:
    for recipe, found in row.misfits.items():
        for misfit in found:
            yield recipe, misfit, misfit.text(row.full)


def _whose(misfit: Misfit) -> str:
    return f"{misfit.dimension.what} of {', '.join(misfit.dimension.matrices)}"


def _misfit_lines(entries: Mapping[tuple[str, str, str], tuple[list[str], list[str]]]) -> list[str]:
    lines = [
        (preset, ", ".join(dict.fromkeys(layouts)), ", ".join(dict.fromkeys(recipes)), text, matrices)
        for (preset, text, matrices), (layouts, recipes) in entries.items()
    ]
    return aligned(("preset", "layout", "recipe", "dimension at fault", "of"), lines)


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
                    "flag": flag_for(misfit.dimension.factors[0]),
                    "block": misfit.block,
                    f"{misfit.dimension.what}_per_rank": misfit.dimension.per_rank,
                    "matrices": list(misfit.dimension.matrices),
                    "message": f"{text}: {misfit.consequence}",
                }
                for recipe, misfit, text in _said(row)
            ],
        }
        for row in rows
    ]
