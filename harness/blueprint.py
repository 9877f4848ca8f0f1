"""Blueprint: a preset's architecture and shrink plan -> what ``harness list``, ``show`` and ``audit`` print.

Full size beside shrunken, then invariant by invariant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from harness.architecture import Architecture, NotAModel, architecture
from harness.arguments import flag_for
from harness.audit import audit
from harness.case import CaseReport
from harness.invariants import SIZE_ARGUMENTS
from harness.inventory import counts
from harness.layout import Layout
from harness.messages import aligned, lint_line
from harness.pipeline import with_vocabulary
from harness.preset import PresetFile, load_preset
from harness.recipes import Recipe
from harness.reference import facts_beside
from harness.shrink import ShrinkPlan

_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def human(number: int) -> str:
    """``8190735360`` -> ``8.19B``."""
    for unit, letter in _UNITS:
        if number >= unit:
            return f"{number / unit:.3g}{letter}" if number / unit < 999.5 else f"{number / unit:.0f}{letter}"
    return str(number)


def full_size(file: PresetFile) -> Architecture | None:
    """The architecture that a preset describes, None where it describes none."""
    arguments = load_preset(file).arguments
    if arguments is None:
        return None
    try:
        return architecture(with_vocabulary(arguments, facts_beside(file.path)[0])[0])
    except NotAModel:
        return None


def summary(file: PresetFile) -> dict[str, Any]:
    """One preset in one record: what ``harness list`` shows and its JSON holds."""
    facts: dict[str, Any] = {"preset": file.name, "kind": None}
    facts["reference"] = facts_beside(file.path)[0] is not None
    full = full_size(file)
    if full is None:
        return facts
    counted, attention, moe = counts(full), full.attention, full.moe
    return facts | {
        "kind": full.kind,
        "parameters": counted.total,
        "active_parameters": counted.active,
        "num_layers": full.num_layers,
        "hidden_size": full.hidden_size,
        "num_attention_heads": attention.num_attention_heads,
        "num_query_groups": attention.num_query_groups,
        "num_experts": moe.num_experts if moe else None,
        "moe_router_topk": moe.moe_router_topk if moe else None,
    }


def list_text(entries: Sequence[dict[str, Any]]) -> str:
    """The table of ``harness list``."""
    header = ("preset", "kind", "size", "parameters", "layers", "hidden", "heads", "experts", "reference")
    return "\n".join(aligned(header, map(_row, entries), right="size parameters layers hidden heads experts"))


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    reference = "yes" if entry["reference"] else "no"
    if entry["kind"] is None:
        return (entry["preset"], "unreadable", "", "", "", "", "", "", reference)
    experts = f"{entry['num_experts']}:{entry['moe_router_topk']}" if entry["num_experts"] else "-"
    return (
        entry["preset"],
        entry["kind"],
        human(entry["parameters"]),
        f"{entry['parameters']:,}",
        str(entry["num_layers"]),
        str(entry["hidden_size"]),
        f"{entry['num_attention_heads']}:{entry['num_query_groups']}",
        experts,
        reference,
    )


def audit_text(files: Sequence[PresetFile], layouts: Sequence[Layout], recipes: Sequence[Recipe]) -> str:
    """Parameter counts, and per recipe how many input dimensions it pads, at full size."""
    header = ("preset", "layout", "parameters", "active", *(recipe.name for recipe in recipes))
    rows = []
    for file in files:
        full = full_size(file)
        for layout in layouts:
            if full is None:
                cells = ["unreadable", ""] + [""] * len(recipes)
            else:
                counted = counts(full)
                cells = [f"{counted.total:,}", f"{counted.active:,}"]
                cells += [_padded(full, layout, recipe) for recipe in recipes]
            rows.append((file.name, str(layout), *cells))
    return "\n".join(aligned(header, rows, right="parameters active"))


def _padded(full: Architecture, layout: Layout, recipe: Recipe) -> str:
    padded = len(audit(full, None, layout, recipe).findings)
    return f"{padded} padded" if padded else "ok"


def show_text(report: CaseReport, plan: ShrinkPlan | None) -> str:
    """Sizes full beside shrunken, invariants S1 to S12, then the findings if there are any."""
    blocks = [[f"{report.case.preset}  {report.case.layout}  {report.case.path}"]]
    if plan is None:
        blocks.append(["no shrink plan: " + _why_not(report)])
    else:
        blocks.append(aligned(("", "full", "shrunken"), _sizes(plan), right="full shrunken"))
        rows = [
            (entry.name, entry.title, entry.before, entry.after, "yes" if entry.holds else "NO")
            for entry in plan.invariants
        ]
        blocks.append(aligned(("", "invariant", "full", "shrunken", "kept"), rows))
    if report.findings:
        blocks.append([lint_line(finding, report.case.path) for finding in report.findings])
    return "\n\n".join("\n".join(block) for block in blocks)


def _why_not(report: CaseReport) -> str:
    return next((stage.detail for stage in report.stages if stage.name == "shrink"), "") or "see below"


def _sizes(plan: ShrinkPlan) -> Iterator[tuple[str, str, str]]:
    full, small = counts(plan.before), counts(plan.after)
    yield "parameters", f"{full.total:,}", f"{small.total:,}"
    yield "active parameters", f"{full.active:,}", f"{small.active:,}"
    yield "layers", _kinds(plan.before), _kinds(plan.after)
    left, right = plan.before.arguments, plan.after.arguments
    for dest in sorted(SIZE_ARGUMENTS):
        absent = left[dest] is None or (dest.startswith("moe_") and plan.before.moe is None)
        if not absent:
            yield flag_for(dest), _value(left[dest]), _value(right[dest])


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _kinds(architecture: Architecture) -> str:
    names = [layer.kind for layer in architecture.layers]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
