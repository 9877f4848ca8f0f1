"""Pipeline: a case -> its report, stage by stage.

``check`` reads top to bottom in the order of the stages; a failure stops only the stages that depend
on it. What is wrong with a preset, and what Megatron or ModelOpt raises on it, becomes findings; an
exception out of the harness's own arithmetic is the harness's fault and makes the outcome an error.
torch is imported by the stages that need it, so that linting stays light.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from harness.architecture import Architecture, NotAModel, architecture
from harness.arguments import Arguments, How, Origin
from harness.arguments.modelled import unmodelled
from harness.audit import audit
from harness.case import PARITY, Case, CaseReport, Outcome, ShrinkReport
from harness.errors import RankLost, UnknownLayout, UsageError, reason_of
from harness.finding import Finding, Severity, has_errors
from harness.inventory import counts
from harness.layout import Layout
from harness.layout_rules import broken_limits, limit_findings, why_impossible
from harness.mismatch import first_mismatch
from harness.preset import PresetFile, load_preset
from harness.recipes import Recipe, find_recipe
from harness.reference import Facts, compare, compare_checkpoint, facts_beside
from harness.shrink import ShrinkPlan
from harness.shrink.invariants import SIZE_ARGUMENTS
from harness.small_model import SmallModel, shrink_stage
from harness.stages import Run, Watch


def lint(file: PresetFile, layout: Layout | None = None, recipe: Recipe | None = None) -> CaseReport:
    """The stages that need no torch and no GPU: parse, reference, audit."""
    start = perf_counter()
    run = Run()
    _read(run, file, layout or Layout(), recipe)
    case = Case(file.name, str(file.path), recipe.name if recipe else "", layout or Layout(), "")
    return CaseReport(case, _outcome(run), perf_counter() - start, tuple(run.stages), tuple(run.findings))


def blueprint(file: PresetFile, layout: Layout) -> tuple[CaseReport, ShrinkPlan | None]:
    """What ``harness show`` prints: the torch-free stages and the shrink plan."""
    start = perf_counter()
    run = Run()
    plan = shrink_stage(run, _read(run, file, layout, None)[0], layout)
    case = Case(file.name, str(file.path), "", layout, "")
    report = CaseReport(case, _outcome(run), perf_counter() - start, tuple(run.stages), tuple(run.findings))
    return replace(report, shrink=_shrink_report(plan)), plan


def full_size(file: PresetFile) -> Architecture | None:
    """The architecture that a preset describes, None where it describes none."""
    preset = load_preset(file)
    if preset.arguments is None:
        return None
    try:
        return architecture(with_vocabulary(preset.arguments, facts_beside(preset.path)[0])[0])
    except NotAModel:
        return None


def require_possible(files: Iterable[PresetFile], layouts: Iterable[Layout]) -> None:
    """Raises UnknownLayout for a layout that can be for none of these presets' models.

    ``files`` are looked at only where some layout may be such a one.
    """
    doubtful = [sizes for sizes in layouts if sizes.pp > 1 or sizes.ep > 1 or sizes.etp not in (1, sizes.tp)]
    known = list(files) if doubtful else []
    for layout in doubtful:
        reasons = []
        for file in known:
            full = full_size(file)
            reason = why_impossible(full, layout) if full is not None else None
            if reason is None:
                break
            reasons.append(reason)
        else:
            if reasons:
                others = f", nor for {len(reasons) - 1} others" if len(reasons) > 1 else ""
                raise UnknownLayout(f"layout {layout} cannot be for {known[0].name}{others}: {reasons[0]}")


def check(case: Case, watch: Watch | None = None, full_width: bool = False) -> CaseReport:
    """Every stage of one case, in this process. Raises UsageError for a device that is not there.

    ``watch`` looks on; ``full_width`` keeps the real sizes in the layers of the plan.

    An exception in the harness itself is reported with outcome ``error`` and its traceback as log.
    """
    start = perf_counter()
    run = Run(watch=watch or Watch())
    try:
        report = _check(run, case, full_width)
    except UsageError:
        raise
    except RankLost as lost:
        report = _error(run, case, str(lost), lost.log)
    except Exception as error:
        report = _error(run, case, reason_of(error), traceback.format_exc())
    return replace(report, seconds=perf_counter() - start)


def _error(run: Run, case: Case, reason: str, log: str) -> CaseReport:
    return CaseReport(
        case, Outcome.ERROR, 0.0, tuple(run.stages), tuple(run.findings), reason=reason, log=log
    )


def _check(run: Run, case: Case, full_width: bool) -> CaseReport:
    recipe = None if case.recipe == PARITY else find_recipe(case.recipe)
    full, facts = _read(run, PresetFile(case.preset, Path(case.path)), case.layout, recipe)
    if full is not None and (reason := _impossible(run, full, case.layout)):
        stages, findings = tuple(run.stages), tuple(run.findings)
        return CaseReport(case, Outcome.UNSUPPORTED, 0.0, stages, findings, reason=reason)
    model = SmallModel(run, case, recipe, full, facts, full_width)
    model.run_stages()
    failed = has_errors(run.findings)
    return CaseReport(
        case=case,
        outcome=_outcome(run, model),
        seconds=0.0,
        stages=tuple(run.stages),
        findings=tuple(run.findings),
        stand_ins=model.stand_ins,
        shrink=_shrink_report(model.plan),
        reason="" if failed else model.limit or model.skipped,
        log=model.log if failed else "",
        mismatch=first_mismatch(run.findings, full, facts, model.plan) if failed else None,
    )


def _impossible(run: Run, full: Architecture, layout: Layout) -> str | None:
    """Why a layout that cannot be for this model leaves nothing to check; no reason to pass over errors."""
    limits = [limit for limit in broken_limits(full, layout) if limit.impossible]
    own = list(limit_findings(full, limits))
    rest = [finding for finding in run.findings if finding not in own]
    if not limits or has_errors(rest):
        return None
    run.findings[:] = rest
    run.stages[:] = [
        replace(stage, outcome=Outcome.UNSUPPORTED) if stage.name == "audit" else stage
        for stage in run.stages
    ]
    return f"layout {layout} cannot be for this model: {limits[0].message}"


# ---- the stages without torch ----


def _read(
    run: Run, file: PresetFile, layout: Layout, recipe: Recipe | None
) -> tuple[Architecture | None, Facts | None]:
    """parse, reference and audit; the full-size architecture, where the file describes one, and what is
    published of it."""
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
                # What cannot run at this layout is not built, and its plan would be another model's.
                stage.usable = not result.limits
    return full, facts


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


def _shrink_report(plan: ShrinkPlan | None) -> ShrinkReport | None:
    if plan is None:
        return None

    def sizes(side: Architecture) -> dict[str, object]:
        found = {dest: side.arguments[dest] for dest in sorted(SIZE_ARGUMENTS)}
        counted = counts(side)
        return {**found, "parameters": counted.total, "active_parameters": counted.active}

    return ShrinkReport(sizes(plan.before), sizes(plan.after), plan.invariants)


def _outcome(run: Run, model: SmallModel | None = None) -> Outcome:
    if has_errors(run.findings):
        return Outcome.FAILED
    if model is not None and model.limit:
        return Outcome.UNSUPPORTED
    return Outcome.SKIPPED if model is not None and model.skipped else Outcome.PASSED
