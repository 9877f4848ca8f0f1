"""Stages: what a case did and found so far, while its stages run one after the other.

What Megatron or ModelOpt raises is a finding of its stage; an exception of the harness's own goes through.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from harness.case import STAGES, Check, Outcome, StageReport
from harness.errors import BLOCKING, UnsupportedModel, UsageError, gpu_fault, out_of_memory
from harness.finding import Finding, Severity, has_errors
from harness.layout import Layout
from harness.layout_rules import Owner

if TYPE_CHECKING:
    from harness.activations import ModuleShapes
    from harness.proofs.proof import Proof
    from harness.trace import Trace

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
    "parity": ("config", "shrink"),
}


@dataclass(frozen=True, slots=True)
class Raised:
    """What Megatron or ModelOpt raised: its type, its text, where, and whose code it was.

    ``owner`` is None where it came out of the harness's own code, which then is at fault. ``on_gpu`` is a
    fault on the GPU: it came out of whatever call came next, and no call after it can do better.
    """

    kind: str
    words: str
    where: str
    owner: Owner | None
    on_gpu: bool = False

    @classmethod
    def of(cls, error: Exception) -> Raised:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((frame for frame in reversed(frames) if _owner(frame.filename) != "torch"), None)
        where = f" (in {Path(last.filename).name}:{last.lineno}, {last.name})" if last else ""
        owners = [_owner(frame.filename) for frame in frames]
        # torch raises for whoever called it.
        name = next((owner for owner in reversed(owners) if owner != "torch"), "harness")
        owner = Owner(name) if name in set(Owner) else None
        fault = gpu_fault()
        if fault is None:
            return cls(type(error).__name__, str(error), where, owner)
        return cls(type(fault).__name__, str(fault).partition("\n")[0], where, owner, on_gpu=True)

    @property
    def actual(self) -> str:
        return f"{self.kind}: {self.words}"

    @property
    def text(self) -> str:
        """``ModelOpt: TypeError: can only concatenate ... (in quant_linear.py:160, forward)``."""
        owner = f"{self.owner}: " if self.owner else ""
        first, *_ = self.words.splitlines() or [""]
        return f"{owner}{self.kind}: {first}{self.where}"

    @property
    def rest(self) -> str:
        """The words after the first line, where there are more."""
        return "\n".join(self.words.splitlines()[1:])

    def finding(self, stage: str, module: str | None = None, given: str = "") -> Finding:
        """``module`` was at work, and ``given`` says on which tensors."""
        message = f"raised {self.kind}: {self.words}{self.where}"
        if module:
            message += f" in {module.removeprefix('decoder.')}{given}"
        if self.on_gpu and os.environ.get(BLOCKING) != "1":
            message += (
                f"; a GPU tells of it late, it may lie before: harness repro, or {BLOCKING}=1, shows where"
            )
        return Finding(stage, Severity.ERROR, message, module=module, actual=self.actual)

    def same_as(self, other: Raised) -> bool:
        """Whether both are one limit: the same type and the same words, whatever the numbers in them."""
        return self.kind == other.kind and _without_numbers(self.words) == _without_numbers(other.words)


def _at_work(error: Exception, model: Any) -> tuple[str | None, str]:
    """Path of the innermost module of ``model`` whose code was running, and the tensors that it was given."""
    if model is None:
        return None, ""
    names = {id(module): name for name, module in model.named_modules() if name}
    found: tuple[str | None, str] = None, ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code, local = frame.f_code, frame.f_locals
        name = names.get(id(local.get("self")))
        if name is not None and (name != found[0] or not found[1]):
            # torch's own call of a module has them in a tuple and a dictionary.
            named = [local.get(one) for one in code.co_varnames[1 : code.co_argcount]]
            tensors = [*named, *_items(local.get("args")), *_items(local.get("kwargs"))]
            given = [tuple(one.shape) for one in tensors if one is not None and hasattr(one, "shape")]
            shapes = [" x ".join(map(str, shape)) for shape in given]
            found = name, f", given {' and '.join(shapes)}" if shapes else ""
    return found


def _items(values: object) -> tuple[Any, ...]:
    if isinstance(values, Mapping):
        return tuple(values.values())
    return values if isinstance(values, tuple) else ()


def _without_numbers(words: str) -> str:
    return re.sub(r"\d+", "#", words)


def _owner(file: str) -> str:
    parts = Path(file).parts
    for package, owner in (("modelopt", Owner.MODELOPT), ("megatron", Owner.MEGATRON)):
        if package in parts:
            return owner
    return "harness" if Path(__file__).parent in Path(file).parents else "torch"


class Watch:
    """Looks on while the stages of a case run, in the same process. This one does nothing; those of
    ``reproduction`` remember what they see, or stop there."""

    def traced(self, stage: Stage, expected: Mapping[str, ModuleShapes], trace: Trace) -> None:
        """A pass of the unquantized model came to its end, or raised on the way."""

    def quantizing(self, model: object) -> AbstractContextManager[object]:
        """Open while ModelOpt works on the model."""
        return nullcontext()

    def raised(self, stage: Stage, error: Exception) -> None:
        """Megatron or ModelOpt raised; the error's frames are still there."""

    def ended(self, stage: Stage) -> None:
        """A stage is over; what it worked on is still there, in the frame that called it."""


@dataclass
class Run:
    """One case while its stages run; becomes a CaseReport at the end."""

    stages: list[StageReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)
    raised: dict[str, Raised] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)  # by check: what it cannot be made for, and whose
    watch: Watch = field(default_factory=Watch)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Run one stage; an exception out of it is the harness's own."""
        stage = Stage(name, watch=self.watch)
        start = perf_counter()
        yield stage
        self.watch.ended(stage)
        self.findings.extend(stage.findings)
        outcome = stage.outcome
        report = StageReport(name, outcome, perf_counter() - start, stage.detail, tuple(stage.checks))
        self.stages = merged([*self.stages, report])
        self.limits |= stage.limits
        if stage.raised is not None:
            self.raised[name] = stage.raised
        if not stage.usable:
            self.blocked.add(name)

    def skip(self, name: str, reason: str) -> None:
        """Report a stage that is not run, and why."""
        self.stages = merged([*self.stages, StageReport(name, Outcome.SKIPPED, 0.0, reason)])

    def unsupported(self, name: str) -> None:
        """Take back what was raised in a stage: it is no fault of the preset, and says so."""
        raised = self.raised.pop(name)
        self.findings = [finding for finding in self.findings if finding.actual != raised.actual]
        self.stages = [
            replace(stage, outcome=Outcome.UNSUPPORTED, detail=raised.text) if stage.name == name else stage
            for stage in self.stages
        ]

    def can(self, name: str) -> bool:
        """Whether ``name`` can run; where it cannot, it is reported as skipped, with the reason."""
        for needed in _all_needs(name):
            if needed in self.blocked:
                self.skip(name, f"{needed} gave nothing to go on with")
                return False
        return True

    def part(self) -> Run:
        """For one of several ranks, which goes its own way from here on."""
        return Run(blocked=set(self.blocked), watch=self.watch)

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
                _checks_of_ranks(reports, layout),
            )
            self.stages = merged([*self.stages, joined])
        found = [(number, finding) for number, part in parts.items() for finding in part.findings]
        for finding, numbers in _grouped(found, _said):
            message = f"{finding.message} ({ranks_text(numbers, layout)})"
            self.findings.append(replace(finding, message=message))
        for part in parts.values():
            self.blocked |= part.blocked
            self.raised = part.raised | self.raised
            self.limits = part.limits | self.limits


def _checks_of_ranks(reports: Mapping[int, StageReport], layout: Layout) -> tuple[Check, ...]:
    """Each check once, with the worst outcome of all ranks and what each of them said."""
    said = [(number, check) for number, report in reports.items() for check in report.checks]
    names = list(dict.fromkeys(check.name for _, check in said))
    said.sort(key=lambda pair: names.index(pair[1].name))
    return _merged_checks(
        replace(check, detail=f"{ranks_text(numbers, layout)}: {check.detail}")
        for check, numbers in _grouped(said, lambda check: check)
    )


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
    checks: list[Check] = field(default_factory=list)
    raised: Raised | None = None
    limits: dict[str, str] = field(default_factory=dict)
    limit: str = ""  # whose limit it is that the whole stage could not be made, and in which words
    watch: Watch = field(default_factory=Watch)

    @property
    def outcome(self) -> Outcome:
        if has_errors(self.findings):
            return Outcome.FAILED
        return Outcome.UNSUPPORTED if self.limit else Outcome.PASSED

    def proved(self, proof: Proof) -> None:
        """Take over a named check: its findings, its outcome and what it looked at."""
        self.findings.extend(replace(finding, check=proof.name) for finding in proof.findings)
        detail = proof.detail
        if proof.limit:
            self.limits[proof.name] = f"{proof.owner}: {proof.limit}"
            detail = f"{self.limits[proof.name]} ({detail})"
        self.checks.append(Check(proof.name, Outcome(str(proof.outcome)), detail))

    @contextmanager
    def foreign(self, model: Any = None) -> Iterator[None]:
        """Call Megatron or ModelOpt: what they raise is a finding, and the stage of no further use.

        That there is no more memory is none: it says nothing of the preset, and comes through.
        Of ``model``, where one is at work, the finding names the innermost module that was.
        """
        try:
            yield
        except (UsageError, UnsupportedModel):
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            self.watch.raised(self, error)
            self.raised = Raised.of(error)
            self.findings.append(self.raised.finding(self.name, *_at_work(error, model)))
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
            _merged_checks((*before.checks, *stage.checks)),
        )
    return [found[name] for name in STAGES if name in found]


def _merged_checks(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Each named check once: the worst outcome, what was seen in a row."""
    found: dict[str, Check] = {}
    for check in checks:
        before = found.get(check.name, Check(check.name, Outcome.PASSED))
        worst = max(before.outcome, check.outcome, key=_FROM_GOOD_TO_BAD.index)
        found[check.name] = Check(check.name, worst, "; ".join(filter(None, (before.detail, check.detail))))
    return tuple(found.values())


_FROM_GOOD_TO_BAD = (Outcome.PASSED, Outcome.UNSUPPORTED, Outcome.SKIPPED, Outcome.FAILED)
