"""Blueprint: a preset's architecture and shrink plan -> what ``harness list`` and ``show`` print.

Full size beside shrunken, then invariant by invariant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from harness.architecture import Architecture
from harness.arguments import flag_for
from harness.case import CaseReport
from harness.facts import facts_beside
from harness.inventory import counts
from harness.messages import aligned, lint_line
from harness.pipeline import full_size
from harness.preset import PresetFile
from harness.shrink import ShrinkPlan
from harness.shrink.invariants import counted_kinds

_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def human(number: int) -> str:
    """``8190735360`` -> ``8.19B``."""
    for unit, letter in _UNITS:
        if number >= unit:
            return f"{number / unit:.3g}{letter}" if number / unit < 999.5 else f"{number / unit:.0f}{letter}"
    return str(number)


def summary(file: PresetFile) -> dict[str, Any]:
    """One preset in one record: what ``harness list`` shows and its JSON holds."""
    facts: dict[str, Any] = {"preset": file.name, "kind": None}
    facts["reference"] = facts_beside(file.path)[0] is not None
    full = full_size(file)
    if full is None:
        return facts
    counted, attention, latent, moe = counts(full), full.attention, full.latent, full.moe
    heads = attention or latent
    return facts | {
        "kind": full.kind,
        "parameters": counted.total,
        "active_parameters": counted.active,
        "num_layers": full.num_layers,
        "hidden_size": full.hidden_size,
        "attention": _attention_kind(full),
        "num_attention_heads": heads.num_attention_heads if heads else None,
        "num_query_groups": attention.num_query_groups if attention else None,
        "num_experts": moe.num_experts if moe else None,
        "moe_router_topk": moe.moe_router_topk if moe else None,
    }


def _attention_kind(full: Architecture) -> str | None:
    """``grouped``, ``multi-head`` or ``latent`` attention, or None."""
    if full.latent is not None:
        return "latent"
    if full.attention is None:
        return None
    grouped = full.attention.num_query_groups < full.attention.num_attention_heads
    return "grouped" if grouped else "multi-head"


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
        _heads(entry),
        experts,
        reference,
    )


def _heads(entry: dict[str, Any]) -> str:
    """``32:8`` heads to groups, ``128 latent``, or ``-`` where no layer has attention."""
    if entry["attention"] is None:
        return "-"
    if entry["attention"] == "latent":
        return f"{entry['num_attention_heads']} latent"
    return f"{entry['num_attention_heads']}:{entry['num_query_groups']}"


def show_text(report: CaseReport, plan: ShrinkPlan | None) -> str:
    """Sizes full beside shrunken, invariants S1 to S12, then the findings if there are any."""
    blocks = [[f"{report.case.preset}  {report.case.layout}  {report.case.path}"]]
    if plan is None:
        blocks.append(["no shrink plan: " + _why_not(report)])
    else:
        blocks.append(aligned(("", "full", "shrunken"), _sizes(plan), right="full shrunken"))
        blocks.append(aligned(("", "kept", "invariant", "full, then shrunken"), _invariants(plan)))
    if report.findings:
        blocks.append([lint_line(finding, report.case.path) for finding in report.findings])
    return "\n\n".join("\n".join(block) for block in blocks)


def _why_not(report: CaseReport) -> str:
    return next((stage.detail for stage in report.stages if stage.name == "shrink"), "") or "see below"


def _invariants(plan: ShrinkPlan) -> Iterator[tuple[str, str, str, str]]:
    """An invariant's two sides below each other, or once where they read the same."""
    for entry in plan.invariants:
        yield entry.name, "yes" if entry.holds else "NO", entry.title, entry.before
        if entry.after != entry.before:
            yield "", "", "", entry.after


def _sizes(plan: ShrinkPlan) -> Iterator[tuple[str, str, str]]:
    full, small = counts(plan.before), counts(plan.after)
    yield "parameters", f"{full.total:,}", f"{small.total:,}"
    yield "active parameters", f"{full.active:,}", f"{small.active:,}"
    yield "layers", counted_kinds(plan.before), counted_kinds(plan.after)
    left, right = plan.before.arguments, plan.after.arguments
    for dests, applies in _SHOWN:
        for dest in dests.split():
            if left[dest] is not None and applies(plan.before):
                yield flag_for(dest), compact(left[dest]), compact(right[dest])


# Size arguments in the order in which they are shown, and the models that they mean anything to.
_SHOWN: tuple[tuple[str, Callable[[Architecture], bool]], ...] = (
    ("num_layers", lambda a: not a.hybrid),
    ("hybrid_layer_pattern", lambda a: a.hybrid),
    ("moe_layer_freq", lambda a: a.moe is not None and not a.hybrid),
    ("window_attn_skip_freq", lambda a: a.arguments["window_size"] is not None),
    ("no_rope_freq", lambda a: bool(a.arguments["no_rope_freq"])),
    ("hidden_size", lambda a: True),
    ("num_attention_heads", lambda a: a.attention is not None or a.latent is not None),
    ("num_query_groups kv_channels", lambda a: a.attention is not None),
    ("q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim", lambda a: a.latent is not None),
    (
        "mamba_num_heads mamba_num_groups mamba_head_dim mamba_state_dim",
        lambda a: a.mamba is not None,
    ),
    (
        "linear_num_key_heads linear_key_head_dim linear_num_value_heads linear_value_head_dim",
        lambda a: a.delta is not None,
    ),
    ("ffn_hidden_size", lambda a: a.dense is not None),
    (
        "num_experts moe_router_topk moe_router_num_groups moe_router_group_topk moe_ffn_hidden_size "
        "moe_shared_expert_intermediate_size moe_latent_size",
        lambda a: a.moe is not None,
    ),
    ("padded_vocab_size", lambda a: True),
)

# Longer patterns are cut in ``show``; their layers are counted beside.
_PATTERN = 32


def compact(value: Any) -> str:
    """A size or a pattern in few characters: ``18,432``, ``3 x 0, 58 x 1``, ``24 x (0 1)``, ``MEM*E...``."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value if len(value) <= _PATTERN else value[:_PATTERN] + "..."
    period = next(
        length
        for length in range(1, len(value) + 1)
        if len(value) % length == 0 and value == value[:length] * (len(value) // length)
    )
    words = " ".join(map(str, value))
    if 1 < period <= _PATTERN // 2 and period < len(value):
        return f"{len(value) // period} x ({' '.join(map(str, value[:period]))})"
    if len(words) <= _PATTERN // 2:
        return words
    text = ", ".join(f"{len([*run])} x {entry}" for entry, run in groupby(value))
    return text if len(text) <= _PATTERN else f"{words[:_PATTERN]}..."
