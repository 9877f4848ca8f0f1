"""What a program asserts of findings that a test has just made, once they have been JSON.

The programs go by a finding's words, so each test that breaks something asks here, too, whether its words
are known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from harness.case import EXPORT, Case, CaseReport, Outcome
from harness.errors import UsageError
from harness.finding import Finding
from harness.inventory import Shape
from harness.layout import Layout
from harness.recipes import find_recipe
from harness.report import from_json, to_json
from harness.reproduction.compared import export
from harness.reproduction.quantized import shown


def asserted(findings: Iterable[Finding], check: str, recipe: str = "fp8") -> str:
    """The assertions, as text; empty where there are none, because no program shows such findings."""
    try:
        return "\n".join(shown(_of_check(findings, check), recipe, 1)[1])
    except UsageError:
        return ""


def asserted_of_export(findings: Iterable[Finding], recipe: str, model: dict[str, Shape]) -> str:
    """The same of an exported checkpoint; ``model`` has Megatron's shapes."""
    try:
        return "\n".join(export(_of_check(findings, EXPORT), find_recipe(recipe), model)[1])
    except UsageError:
        return ""


def _of_check(findings: Iterable[Finding], check: str) -> tuple[Finding, ...]:
    case = Case("made", "made.sh", "fp8", Layout(), "cpu")
    own = tuple(replace(finding, check=check) for finding in findings)
    return read_again(CaseReport(case, Outcome.FAILED, 0.0, (), own)).findings


def read_again(report: CaseReport) -> CaseReport:
    """What is read from the document that it is written to."""
    (again,) = from_json(json.loads(json.dumps(to_json([report]))))
    return again
