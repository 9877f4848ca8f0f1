"""Step summary: case reports -> the Markdown that GitHub Actions shows on the page of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from harness.case import CaseReport, Outcome
from harness.messages import failures_text, summary_line, what_happened


def summary_markdown(reports: Sequence[CaseReport], seconds: float | None = None) -> str:
    """A table of what did not pass and every failure in full, as GitHub shows a step's summary.

    Cases that passed are counted and not listed: a summary may have a mebibyte, and many rows hide one.
    """
    others = [report for report in reports if report.outcome is not Outcome.PASSED]
    parts = [f"### Presets: {summary_line(reports, seconds)}"]
    if others:
        rows = [("preset", "recipe", "layout", "device", "outcome", "what"), ("---",) * 6]
        rows += [
            (c.preset, c.recipe, str(c.layout), c.device, str(r.outcome), what_happened(r))
            for r in others
            for c in (r.case,)
        ]
        parts.append("\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows))
    if failed := failures_text(reports):
        longest = max((len(run) for run in re.findall("`+", failed)), default=0)
        fence = "`" * max(3, longest + 1)
        parts.append(f"{fence}\n{failed}\n{fence}")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """On one line, and nothing in it that Markdown or HTML would read."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", " ".join(text.split()))


def write_step_summary(reports: Sequence[CaseReport], seconds: float | None = None) -> None:
    """Add the summary to the file that GitHub Actions names in ``GITHUB_STEP_SUMMARY``, where it does."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(summary_markdown(reports, seconds))
