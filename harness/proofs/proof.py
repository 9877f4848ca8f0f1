"""Proof: what one check of a quantized model came to, in a form that a report can hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from harness.build import short
from harness.finding import Finding, Severity, has_errors
from harness.layout_rules import Owner


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class Proof:
    """One check: its name, how it ended, and a line on what was looked at.

    Where it is ``unsupported``, ``owner`` is whose limit that is and ``limit`` the message of its owner,
    got by asking; findings are then at most warnings. A passed one may carry warnings too.
    """

    name: str
    outcome: Outcome
    detail: str
    findings: tuple[Finding, ...] = ()
    owner: Owner | None = None
    limit: str | None = None


def judged(name: str, findings: Iterable[Finding], detail: str) -> Proof:
    """Failed where a finding is an error, passed otherwise."""
    found = tuple(findings)
    return Proof(name, Outcome.FAILED if has_errors(found) else Outcome.PASSED, detail, found)


def unsupported(name: str, owner: Owner, limit: str, detail: str) -> Proof:
    return Proof(name, Outcome.UNSUPPORTED, detail, owner=owner, limit=limit)


def said(error: BaseException) -> str:
    """Type and text of what Megatron or ModelOpt raised, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def finding(
    module: str | None,
    what: str,
    expected: Any = None,
    actual: Any = None,
    severity: Severity = Severity.ERROR,
) -> Finding:
    """A finding of the quantize stage; ``module`` opens its message."""
    message = f"{short(module)}  {what}" if module else what
    return Finding("quantize", severity, message, module=module or None, expected=expected, actual=actual)
