"""Stages: what a case did and found so far, while its stages run one after the other.

What Megatron or ModelOpt raises is a finding of its stage; an exception of the harness's own goes through.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

from harness.case import STAGES, Outcome, StageReport
from harness.errors import UnsupportedModel, UsageError
from harness.finding import Finding, Severity, has_errors
from harness.layout import Layout

# The stages without whose result each stage has nothing to work on.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "parse": (),
    "reference": ("parse",),
    "audit": ("parse",),
    "config": ("audit",),
    "shrink": ("audit",),
    "build": ("config", "shrink"),
    "forward": ("build",),
    "quantize": ("forward",),
}


@dataclass
class Run:
    """One case while its stages run; becomes a CaseReport at the end."""

    stages: list[StageReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Run one stage; an exception out of it is the harness's own."""
        stage = Stage(name)
        start = perf_counter()
        yield stage
        self.findings.extend(stage.findings)
        outcome = Outcome.FAILED if has_errors(stage.findings) else Outcome.PASSED
        report = StageReport(name, outcome, perf_counter() - start, stage.detail)
        self.stages = merged([*self.stages, report])
        if not stage.usable:
            self.blocked.add(name)

    def can(self, name: str) -> bool:
        """Whether ``name`` can run; where it cannot, it is reported as skipped, with the reason."""
        for needed in _all_needs(name):
            if needed in self.blocked:
                reason = f"{needed} gave nothing to go on with"
                self.stages = merged([*self.stages, StageReport(name, Outcome.SKIPPED, 0.0, reason)])
                return False
        return True

    def part(self) -> Run:
        """For one of several ranks, which goes its own way from here on."""
        return Run(blocked=set(self.blocked))

    def add(self, parts: Mapping[int, Run], layout: Layout, at_once: bool = False) -> None:
        """Take over what ranks of ``layout`` did and found, by number; what several say is said once.

        ``at_once`` says that they ran beside each other, and not one after the other.
        """
        for name in STAGES:
            reports = {n: stage for n, part in parts.items() for stage in part.stages if stage.name == name}
            if not reports:
                continue
            details = _grouped([(number, report.detail) for number, report in reports.items()], str)
            seconds = [report.seconds for report in reports.values()]
            joined = StageReport(
                name,
                max((report.outcome for report in reports.values()), key=_FROM_GOOD_TO_BAD.index),
                max(seconds) if at_once else sum(seconds),
                "; ".join(f"{ranks_text(numbers, layout)}: {detail}" for detail, numbers in details),
            )
            self.stages = merged([*self.stages, joined])
        found = [(number, finding) for number, part in parts.items() for finding in part.findings]
        for finding, numbers in _grouped(found, _said):
            message = f"{finding.message} ({ranks_text(numbers, layout)})"
            self.findings.append(replace(finding, message=message))
        for part in parts.values():
            self.blocked |= part.blocked


def ranks_text(numbers: Sequence[int], layout: Layout) -> str:
    """``ranks 0-2, 5 of tp8``; the layout alone where it has one rank."""
    if layout.world_size == 1:
        return str(layout)
    if len(numbers) == 1:
        return f"rank {numbers[0]} of {layout}"
    rows: list[list[int]] = []
    for number in sorted(numbers):
        if rows and number == rows[-1][-1] + 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    spelt = [f"{row[0]}-{row[-1]}" if len(row) > 1 else str(row[0]) for row in rows]
    return f"ranks {', '.join(spelt)} of {layout}"


def _said(finding: Finding) -> tuple[object, ...]:
    """What two findings that say the same have in common; expected and actual may be anything."""
    return (finding.stage, finding.severity, finding.flag, finding.line, finding.module, finding.message)


def _grouped[T](pairs: Iterable[tuple[int, T]], key: Callable[[T], object]) -> Iterable[tuple[T, list[int]]]:
    """Values with the same key once, the first of them, each with the numbers that have it."""
    groups: dict[object, tuple[T, list[int]]] = {}
    for number, value in pairs:
        groups.setdefault(key(value), (value, []))[1].append(number)
    return groups.values()


def _all_needs(name: str) -> Iterator[str]:
    """What a stage needs, and what that needs, earliest stage first."""
    needs = set(NEEDS[name])
    while wider := {more for need in needs for more in NEEDS[need]} - needs:
        needs |= wider
    return (stage for stage in STAGES if stage in needs)


@dataclass
class Stage:
    name: str
    findings: list[Finding] = field(default_factory=list)
    detail: str = ""
    usable: bool = True

    @contextmanager
    def foreign(self) -> Iterator[None]:
        """Call Megatron or ModelOpt: what they raise is a finding, and the stage of no further use."""
        try:
            yield
        except (UsageError, UnsupportedModel):
            raise
        except Exception as error:
            self.findings.append(_raised(self.name, error))
            self.usable = False


def merged(stages: Sequence[StageReport]) -> list[StageReport]:
    """One report per stage, in order: the worst outcome, the times added up, what was seen in a row."""
    found: dict[str, StageReport] = {}
    for stage in stages:
        before = found.get(stage.name)
        if before is None:
            found[stage.name] = stage
            continue
        found[stage.name] = StageReport(
            stage.name,
            max(before.outcome, stage.outcome, key=_FROM_GOOD_TO_BAD.index),
            before.seconds + stage.seconds,
            "; ".join(filter(None, (before.detail, stage.detail))),
        )
    return [found[name] for name in STAGES if name in found]


_FROM_GOOD_TO_BAD = (Outcome.PASSED, Outcome.SKIPPED, Outcome.FAILED)


def _raised(stage: str, error: Exception) -> Finding:
    """What Megatron or ModelOpt raised, its type and text kept, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (in {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name})" if frames else ""
    kind = type(error).__name__
    return Finding(stage, Severity.ERROR, f"raised {kind}: {error}{where}", actual=f"{kind}: {error}")
