"""Pipeline: a case -> its report, stage by stage.

``check`` reads top to bottom in the order of the stages; a failure stops only the stages that depend
on it. What is wrong with a preset, and what Megatron or ModelOpt raises on it, becomes findings; an
exception out of the harness's own arithmetic is the harness's fault and makes the outcome an error.
torch is imported by the stages that need it, so that linting stays light.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from harness.activations import activations
from harness.architecture import Architecture, NotAModel, architecture
from harness.arguments import Arguments, How, Origin
from harness.arguments.modelled import unmodelled
from harness.audit import audit
from harness.case import (
    STAGES,
    Case,
    CaseReport,
    Outcome,
    ShrinkReport,
    StageReport,
    StandInReport,
)
from harness.errors import UnsupportedModel, UsageError
from harness.finding import Finding, Severity, has_errors
from harness.inventory import counts, parameters
from harness.layout import Layout
from harness.preset import PresetFile, load_preset
from harness.recipes import Recipe, find_recipe
from harness.reference import Facts, compare, compare_checkpoint, facts_beside
from harness.shrink import NoPlan, ShrinkPlan, shrink
from harness.shrink.invariants import SIZE_ARGUMENTS

if TYPE_CHECKING:
    import torch

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


# Parameters of a plan per rank: a preset is untrusted, and one with an absurd size must not eat the
# machine. The plans of published models have less than a tenth of it.
MOST_PARAMETERS = 1 << 30


@dataclass
class _Run:
    """One case while its stages run; becomes a CaseReport and never leaves this module."""

    stages: list[StageReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)

    @contextmanager
    def stage(self, name: str) -> Iterator[_Stage]:
        """Run one stage; an exception out of it is the harness's own."""
        stage = _Stage(name)
        start = perf_counter()
        yield stage
        self.findings.extend(stage.findings)
        outcome = Outcome.FAILED if has_errors(stage.findings) else Outcome.PASSED
        self.stages.append(StageReport(name, outcome, perf_counter() - start, stage.detail))
        if not stage.usable:
            self.blocked.add(name)

    def can(self, name: str) -> bool:
        """Whether ``name`` can run; where it cannot, it is reported as skipped, with the reason."""
        for needed in _all_needs(name):
            if needed in self.blocked:
                reason = f"{needed} gave nothing to go on with"
                self.stages.append(StageReport(name, Outcome.SKIPPED, 0.0, reason))
                return False
        return True


def _all_needs(name: str) -> Iterator[str]:
    """What a stage needs, and what that needs, earliest stage first."""
    needs = set(NEEDS[name])
    while wider := {more for need in needs for more in NEEDS[need]} - needs:
        needs |= wider
    return (stage for stage in STAGES if stage in needs)


@dataclass
class _Stage:
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


def lint(file: PresetFile, layout: Layout | None = None, recipe: Recipe | None = None) -> CaseReport:
    """The stages that need no torch and no GPU: parse, reference, audit."""
    start = perf_counter()
    run = _Run()
    _read(run, file, layout or Layout(), recipe)
    case = Case(file.name, str(file.path), recipe.name if recipe else "", layout or Layout(), "")
    return CaseReport(case, _outcome(run), perf_counter() - start, tuple(run.stages), tuple(run.findings))


def blueprint(file: PresetFile, layout: Layout) -> tuple[CaseReport, ShrinkPlan | None]:
    """What ``harness show`` prints: the torch-free stages and the shrink plan."""
    start = perf_counter()
    run = _Run()
    plan = _shrink(run, _read(run, file, layout, None), layout)
    case = Case(file.name, str(file.path), "", layout, "")
    report = CaseReport(case, _outcome(run), perf_counter() - start, tuple(run.stages), tuple(run.findings))
    return replace(report, shrink=_shrink_report(plan)), plan


def check(case: Case) -> CaseReport:
    """Every stage of one case, in this process. Raises UsageError for a device that is not there.

    An exception in the harness itself is reported with outcome ``error`` and its traceback as log.
    """
    start = perf_counter()
    run = _Run()
    try:
        report = _check(run, case)
    except UsageError:
        raise
    except Exception as error:
        reason = f"the harness failed: {type(error).__name__}: {error}"
        report = CaseReport(case, Outcome.ERROR, 0.0, tuple(run.stages), tuple(run.findings), reason=reason)
        report = replace(report, log=traceback.format_exc())
    return replace(report, seconds=perf_counter() - start)


def _check(run: _Run, case: Case) -> CaseReport:
    recipe = find_recipe(case.recipe)
    full = _read(run, PresetFile(case.preset, Path(case.path)), case.layout, recipe)
    model = _Model(run, case, recipe, full)
    model.run_stages()
    return CaseReport(
        case=case,
        outcome=_outcome(run),
        seconds=0.0,
        stages=tuple(run.stages),
        findings=tuple(run.findings),
        stand_ins=model.stand_ins,
        shrink=_shrink_report(model.plan),
        log=model.log if has_errors(run.findings) else "",
    )


# ---- the stages without torch ----


def _read(run: _Run, file: PresetFile, layout: Layout, recipe: Recipe | None) -> Architecture | None:
    """parse, reference and audit; the full-size architecture, where the file describes one."""
    with run.stage("parse") as stage:
        preset = load_preset(file)
        stage.findings.extend(preset.findings)
        stage.usable = preset.arguments is not None
        stage.detail = f"{len(preset.flags)} flags"
    arguments: Arguments | None = None
    full: Architecture | None = None
    facts: Facts | None = None
    if run.can("reference"):
        with run.stage("reference") as stage:
            assert preset.arguments is not None
            facts, unreadable = facts_beside(preset.path)
            stage.findings.extend(unreadable)
            stage.findings.extend(unmodelled(preset.flags))
            if facts is not None:
                stage.findings.extend(compare(preset.arguments, facts))
                stage.findings.extend(compare_checkpoint(preset.variables.get("HF_MODEL_CKPT"), facts))
                stage.detail = f"compared with {facts.label}"
            arguments, assumed = with_vocabulary(preset.arguments, facts)
            stage.findings.extend(assumed)
    if run.can("audit"):
        with run.stage("audit") as stage:
            assert arguments is not None
            try:
                full = architecture(arguments)
            except NotAModel as error:
                stage.findings.append(arguments.finding(error.dest, str(error), stage="audit"))
                stage.usable = False
            else:
                result = audit(full, facts.params if facts else None, layout, recipe)
                stage.findings.extend(result.findings)
                stage.detail = result.detail
    return full


# About what today's tokenizers have; what is built from it is shrunken anyway.
_ASSUMED_VOCABULARY = 1 << 17


def with_vocabulary(arguments: Arguments, facts: Facts | None) -> tuple[Arguments, tuple[Finding, ...]]:
    """Fill in the vocabulary size that a preset leaves to the tokenizer: the published one.

    With nothing published any size would do for the shapes; one is assumed, and said.
    """
    if arguments["padded_vocab_size"] is not None:
        return arguments, ()
    published = facts.config.get("vocab_size") if facts else None
    if isinstance(published, int) and published > 0:
        because = "left to the tokenizer; the published vocab_size is taken"
        return _assume(arguments, published, because), ()
    multiple = 128 * max(1, arguments["make_vocab_size_divisible_by"])
    size = -(-_ASSUMED_VOCABULARY // multiple) * multiple
    warning = arguments.finding(
        "padded_vocab_size",
        f"the vocabulary is left to the tokenizer and its size is not published: {size} is assumed",
        stage="reference",
        severity=Severity.WARNING,
        actual=size,
    )
    return _assume(arguments, size, "left to the tokenizer; assumed"), (warning,)


def _assume(arguments: Arguments, size: int, because: str) -> Arguments:
    origin = Origin(How.DERIVED, "--padded-vocab-size", because=because)
    replaced = arguments.replaced({"padded_vocab_size": size})
    return replace(replaced, origins={**replaced.origins, "padded_vocab_size": origin})


def _shrink(run: _Run, full: Architecture | None, layout: Layout) -> ShrinkPlan | None:
    plan = None
    if run.can("shrink"):
        with run.stage("shrink") as stage:
            assert full is not None
            try:
                plan = shrink(full, layout)
            except NoPlan as error:
                stage.findings.append(Finding("shrink", Severity.ERROR, str(error)))
                stage.usable = False
                return None
            total, most = counts(plan.after).total, MOST_PARAMETERS * layout.world_size
            if total > most:
                message = f"the smallest plan has {total:,} parameters, more than {most:,}: "
                message += "some size is out of proportion to the others"
                stage.findings.append(Finding("shrink", Severity.ERROR, message))
                stage.usable = False
                return None
            stage.detail = f"{total:,} parameters, S1 to S12 kept"
    return plan


def _shrink_report(plan: ShrinkPlan | None) -> ShrinkReport | None:
    if plan is None:
        return None

    def sizes(side: Architecture) -> dict[str, object]:
        found = {dest: side.arguments[dest] for dest in sorted(SIZE_ARGUMENTS)}
        return {**found, "parameters": counts(side).total, "active_parameters": counts(side).active}

    return ShrinkReport(sizes(plan.before), sizes(plan.after), plan.invariants)


# ---- the stages with torch ----


class _Model:
    """config, shrink, build, forward and quantize of one case."""

    def __init__(self, run: _Run, case: Case, recipe: Recipe, full: Architecture | None) -> None:
        self.run, self.case, self.recipe, self.full = run, case, recipe, full
        self.plan: ShrinkPlan | None = None
        self.stand_ins: tuple[StandInReport, ...] = ()
        self.log = ""
        self.quantize_log = ""

    def run_stages(self) -> None:
        if self.full is None:
            for name in STAGES[STAGES.index("config") :]:
                self.run.can(name)
            return
        from harness.devices import torch_device
        from harness.standins import installed
        from harness.standins.output import captured

        device = torch_device(self.case.device)
        with captured() as log, installed(device, self.full) as stand_ins:
            self.stand_ins = stand_ins
            try:
                self._config(device)
                self.plan = _shrink(self.run, self.full, self.case.layout)
                self._in_world(device)
            finally:
                self.log = log.getvalue() + self.quantize_log

    def _config(self, device: torch.device) -> None:
        from harness.build import transformer_config

        with self.run.stage("config") as stage:
            assert self.full is not None
            arguments = self.full.arguments
            try:
                with stage.foreign():
                    transformer_config(arguments.values, self.case.layout, device)
            except UnsupportedModel as error:
                stage.findings.append(arguments.finding(error.dest, str(error), stage="config"))
                stage.usable = False
            if stage.usable:
                stage.detail = "Megatron accepts the full size"

    def _in_world(self, device: torch.device) -> None:
        if self.plan is None or "config" in self.run.blocked:
            for name in ("build", "forward", "quantize"):
                self.run.can(name)
            return
        from harness.world import open_world

        with open_world(self.case.layout, device):
            self._build(device, self.plan.after)

    def _build(self, device: torch.device, small: Architecture) -> None:
        from harness.build import build_model, compare_parameters, parameter_shapes, refused

        model: Any = None
        with self.run.stage("build") as stage:
            expected = parameters(small)
            with stage.foreign():
                model = build_model(small, self.case.layout, device)
            stage.findings.extend(refused(small, self.case.layout, device))
            if stage.usable:
                stage.findings.extend(compare_parameters(expected, parameter_shapes(model)))
                stage.detail = f"{len(expected)} parameters as in the inventory"
        if self.run.can("forward"):
            self._forward(device, small, model)
        if self.run.can("quantize"):
            self._quantize(device, small, model)

    def _forward(self, device: torch.device, small: Architecture, model: Any) -> None:
        from harness import trace

        length = trace.sequence_length(small)
        tokens = trace.token_ids(small.padded_vocab_size, trace.BATCH_SIZE, length, device)
        with self.run.stage("forward") as stage:
            expected = activations(small, sequence_length=length, batch_size=trace.BATCH_SIZE)
            with stage.foreign(), trace.recording(model) as recorder:
                logits = trace.forward(model, tokens)
            # Where the pass raised, the trace up to there says first which shapes parted.
            stage.findings[:0] = trace.compare_trace(expected, recorder.trace())
            if stage.usable:
                stage.findings.extend(trace.check_logits(logits, tokens, small.padded_vocab_size))
                stage.detail = f"{len(expected)} modules as planned, logits finite"

    def _quantize(self, device: torch.device, small: Architecture, model: Any) -> None:
        from harness.quantize import quantize

        with self.run.stage("quantize") as stage:
            result = None
            with stage.foreign():
                result = quantize(model, self.recipe, small, device)
            if result is not None:
                stage.findings.extend(result.findings)
                error = "no error measured" if result.error is None else f"relative error {result.error:.3g}"
                stage.detail = f"{len(result.matrices)} matrices, {result.quantizers} quantizers, {error}"
                self.quantize_log = result.log


def _raised(stage: str, error: Exception) -> Finding:
    """What Megatron or ModelOpt raised, its type and text kept, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (in {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name})" if frames else ""
    kind = type(error).__name__
    return Finding(stage, Severity.ERROR, f"raised {kind}: {error}{where}", actual=f"{kind}: {error}")


def _outcome(run: _Run) -> Outcome:
    return Outcome.FAILED if has_errors(run.findings) else Outcome.PASSED
