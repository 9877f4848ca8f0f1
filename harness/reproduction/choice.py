"""Choice: a report and some words -> the one case that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.case import Case, CaseReport, Outcome
from harness.errors import UsageError


def choose_case(reports: Sequence[CaseReport], words: str | None, source: Path) -> CaseReport:
    """The report of the case that ``words`` name, or the only one that did not pass. Raises UsageError."""
    bad = [entry for entry in reports if entry.outcome in (Outcome.FAILED, Outcome.ERROR)]
    if words is None:
        found, what = bad, "failed"
    else:
        parts = words.lower().split()
        exact = [entry for entry in reports if entry.case.name.lower() == words.lower()]
        matching = [r for r in reports if all(part in r.case.name.lower() for part in parts)]
        found, what = exact or [entry for entry in matching if entry in bad] or matching, f"match {words!r}"
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"no case of {source} {'matches' if words else what}" + (f" {words!r}" if words else "")
        )
    listed = "\n".join(f"  {entry.case.name}" for entry in found)
    raise UsageError(f"{len(found)} cases of {source} {what}; name one of them:\n{listed}")


def require_file(case: Case, source: Path) -> None:
    """Raise UsageError where the preset of a case is not on this machine."""
    if not Path(case.path).is_file():
        raise UsageError(
            f"{case.preset}: there is no file {case.path} here; run this where {source} was made"
        )
