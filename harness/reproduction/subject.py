"""Subject: a failed case -> what a program must do to show the failure: which model, which steps, which end.

The stage that failed last decides. What Megatron or ModelOpt raised is shown by doing the same again; what
this package found is shown by an assertion on the same model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.architecture import Architecture, NotAModel, architecture
from harness.arguments import Arguments, flag_for
from harness.case import COVERAGE, EXPORT, PARITY, Case, CaseReport, Check, Outcome
from harness.errors import UsageError
from harness.facts import facts_beside
from harness.finding import Finding
from harness.inventory import parameters
from harness.layout import Layout
from harness.mismatch import published_values
from harness.pipeline import full_size, with_vocabulary
from harness.preset import PresetFile, load_preset
from harness.recipes import find_recipe
from harness.reference import shown_value
from harness.reproduction.quantized import MOST, shape, shown, steps_of
from harness.small_model import layout_of_plan, shrink_stage
from harness.stages import Run

if TYPE_CHECKING:
    from harness.reproduction.script_parity import Published
    from harness.shrink import ShrinkPlan

STEPS = ("parser", "config", "build", "forward", "quantize", PARITY, EXPORT)


@dataclass(frozen=True, slots=True)
class Subject:
    """``steps`` are done in order, on ``model`` where there is one; then every line of ``end`` is run.

    ``meta`` has it built without storage, as models of full size are. ``what`` says what is to be seen.
    """

    case: Case
    what: str
    arguments: Arguments
    layout: Layout
    steps: tuple[str, ...]
    end: tuple[str, ...] = ()
    model: Architecture | None = None
    meta: bool = False
    words: tuple[str, ...] = ()
    published: Published | None = None

    @property
    def dtype(self) -> str:
        """In which the model is built, as torch writes it."""
        return "torch.float32" if PARITY in self.steps else "torch.bfloat16"


def subject_of(report: CaseReport) -> Subject:
    """Raises UsageError where the failure is none that another program could show."""
    failed = [stage.name for stage in report.stages if stage.outcome is Outcome.FAILED]
    limited = [stage.name for stage in report.stages if stage.outcome is Outcome.UNSUPPORTED]
    if not failed and limited:
        return _limit(report, limited[-1], report.reason)
    unsupported = [(s.name, check) for s in report.stages for check in s.checks if is_unsupported(check)]
    if not failed and unsupported:
        stage, check = next((pair for pair in unsupported if _RAISED.search(pair[1].detail)), unsupported[0])
        return _limit(report, stage, check.detail, check.name)
    last = failed[-1] if failed else "quantize"
    errors = [finding for finding in report.findings if finding.is_error and finding.stage == last]
    if failed and not errors:
        raise UsageError(f"{report.case.name} failed in {last} without a finding to show")
    return _ENDS[last](report, errors)


def is_unsupported(check: Check) -> bool:
    return check.outcome is Outcome.UNSUPPORTED


# What a limit says that an exception came to, and what lets the importer raise one.
_RAISED = re.compile(r"\b[A-Z]\w*(Error|Exception)\b|its importer has no rule (?!for )")


def _limit(report: CaseReport, stage: str, words: str, check: str = "") -> Subject:
    """What Megatron or ModelOpt raises whatever the sizes are, in a stage or in one of its checks."""
    raises = stage in ("build", "forward", "quantize", PARITY) and check != COVERAGE
    if not raises or ((check or stage == PARITY) and not _RAISED.search(words)):
        raise UsageError(f"{words}: nothing was raised, so there is nothing to show")
    said = replace(report, reason=words)
    return _parity(said, ()) if stage == PARITY else _run(said, stage, (), (), steps_of(check))


def _steps(last: str) -> tuple[str, ...]:
    return STEPS[1 : STEPS.index(last) + 1]


def _arguments(case: Case) -> Arguments:
    preset = load_preset(PresetFile(case.preset, Path(case.path)))
    if preset.arguments is None:
        raise UsageError(f"{case.preset}: {preset.findings[0].message}; there is no model to show it with")
    return with_vocabulary(preset.arguments, facts_beside(preset.path)[0])[0]


def _small(case: Case) -> tuple[Architecture, Layout]:
    """The plan's model and the layout that its layers have."""
    plan = _plan(case)
    return plan.after, layout_of_plan(plan, case.layout)


def _plan(case: Case) -> ShrinkPlan:
    plan = shrink_stage(Run(), full_size(PresetFile(case.preset, Path(case.path))), case.layout)
    if plan is None:
        raise UsageError(f"{case.name}: there is no plan, and so no small model to show it with")
    return plan


# ---- what Megatron's parser refuses ----


def _parse(report: CaseReport, errors: Sequence[Finding]) -> Subject:
    from harness.reproduction.changes import words_of

    case, first = report.case, errors[0]
    # The flags of Megatron-LM's ModelOpt examples are added by a module that megatron-core does not have.
    words = [word.text for word in words_of(Path(case.path))]
    end = (f"raise AssertionError({first.message!r})",)
    return Subject(case, first.message, _arguments(case), case.layout, ("parser",), end, words=tuple(words))


# ---- what is not as published, or does not divide ----


def _full_size(report: CaseReport, errors: Sequence[Finding]) -> Subject:
    """The preset's model without storage beside the published shapes, else values of its config."""
    case, arguments = report.case, _arguments(report.case)
    placed = [f for f in report.findings if f.is_error and f.flag and f.stage in ("reference", "audit")]
    first = (placed or list(errors))[0]
    subject = Subject(case, first.message, arguments, case.layout, ("config",))
    published = published_values(arguments, facts_beside(Path(case.path))[0])
    values = tuple(_value(dest, arguments[dest], value) for dest, value in published.items())
    try:
        model = architecture(arguments)
    except NotAModel:
        return replace(subject, end=values or _said(first))
    subject = replace(subject, model=model, meta=True)
    if any(stage.name == "config" and stage.outcome is Outcome.SKIPPED for stage in report.stages):
        return replace(subject, steps=_steps("build"), end=_said(first))
    wrong = _parted(model, arguments, published)
    if wrong:
        one_rank = replace(subject, layout=Layout())
        return replace(one_rank, steps=_steps("build"), end=_shapes(wrong, "published"))
    return replace(subject, end=values or _said(first))


def _value(dest: str, actual: Any, value: Any) -> str:
    words = f"{flag_for(dest)} is {shown_value(dest, actual)}, {shown_value(dest, value)} published"
    return f"assert settings[{dest!r}] == {value!r}, {words!r}"


def _said(finding: Finding) -> tuple[str, ...]:
    return (f"raise AssertionError({finding.message!r})",)


def _parted(
    model: Architecture, arguments: Arguments, published: Mapping[str, Any]
) -> dict[str, tuple[int, ...] | None]:
    """The first parameters whose published shape is another, None for those that are not published."""
    try:
        wanted = parameters(architecture(arguments.replaced(published)))
    except NotAModel:
        return {}
    mine = parameters(model)
    names = [name for name in wanted if mine.get(name) != wanted[name]]
    names += [name for name in mine if name not in wanted]
    return {name: wanted.get(name) for name in names[:MOST]}


def _shapes(wanted: Mapping[str, tuple[int, ...] | None], word: str) -> tuple[str, ...]:
    return (
        "shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}",
        f"for name, shape in {dict(wanted)!r}.items():",
        f'    assert shapes.get(name) == shape, f"{{name}} is {{shapes.get(name)}}, {{shape}} {word}"',
    )


# ---- what was built, and ran ----


def _config(report: CaseReport, errors: Sequence[Finding]) -> Subject:
    first = errors[0]
    if first.flag:
        raise UsageError(f"{first.message}: that is the harness's limit, and nothing to report to Megatron")
    case = report.case
    return Subject(case, first.message, _arguments(case), case.layout, _steps("config"))


def _no_plan(report: CaseReport, errors: Sequence[Finding]) -> Subject:
    raise UsageError(f"{errors[0].message}: that is the harness's limit, and nothing to report to Megatron")


def _build(report: CaseReport, errors: Sequence[Finding]) -> Subject:
    wanted: dict[str, tuple[int, ...] | None] = {}
    for finding in errors:
        if finding.module:
            parameter = finding.message.partition("  ")[2].partition(" ")[0]
            wanted[f"{finding.module}.{parameter}"] = shape(finding.expected)
    return _run(report, "build", errors, _shapes(wanted, "expected"))


def _forward(report: CaseReport, errors: Sequence[Finding]) -> Subject:
    lines: list[str] = []
    for finding in errors[:MOST]:
        lines += _of_pass(finding)
    return _run(report, "forward", errors, tuple(lines))


_SIDE = re.compile(r"  (input|output)(?: (\d+))? is ")


def _of_pass(finding: Finding) -> Iterator[str]:
    side = _SIDE.search(finding.message)
    if finding.module and side:
        key, index = (finding.module, side[1]), int(side[2] or 0)
        seen = f"seen[{key!r}][{index}]"
        words = f"{finding.module} {side[0].strip()}"
        yield f'assert {seen} == {shape(finding.expected)!r}, f"{words} {{{seen}}}"'
    elif finding.module:
        yield f'assert ({finding.module!r}, "input") in seen, "{finding.module} never ran"'
    elif isinstance(finding.expected, list | tuple):
        yield f"assert tuple(logits.shape) == {shape(finding.expected)!r}, tuple(logits.shape)"
    elif "not finite" in finding.message:
        yield "assert bool(torch.isfinite(logits).all()), 'logits are not finite'"


def _quantize(report: CaseReport, errors: Sequence[Finding]) -> Subject:
    ranks = report.case.layout.world_size
    raised = any(_was_raised(finding) for finding in errors)
    more, lines = ((), ()) if raised else shown(errors, report.case.recipe, ranks)
    return _run(report, "quantize", errors, lines, more)


def _run(
    report: CaseReport,
    stage: str,
    errors: Sequence[Finding],
    end: tuple[str, ...],
    more: tuple[str, ...] = (),
) -> Subject:
    """The small model as far as ``stage``; nothing is asserted where that raises."""
    small, layout = _small(report.case)
    raised = next((finding for finding in errors if _was_raised(finding)), None)
    first = raised or (errors[0] if errors else None)
    what = first.message if first else report.reason
    if raised is None and errors and not end:
        raise UsageError(f"{what}: no program shows this: it is the harness's own arithmetic that sees it")
    ending = () if raised else end
    return Subject(report.case, what, small.arguments, layout, (*_steps(stage), *more), ending, small)


def _was_raised(finding: Finding) -> bool:
    return finding.message.startswith("raised ")


def _parity(report: CaseReport, errors: Sequence[Finding]) -> Subject:
    """The tiny Hugging Face model, and what ModelOpt imports of it or exports in its place."""
    from harness.reproduction.compared import comparison, export
    from harness.reproduction.script_parity import published_of

    case, what, plan = report.case, errors[0].message if errors else report.reason, _plan(report.case)
    model = plan.after
    published = published_of(case, plan, what)
    subject = Subject(case, what, model.arguments, Layout(), ("config", "build"), model=model)
    if case.recipe == PARITY:
        end = comparison(errors, case.device)
        return replace(subject, steps=(*subject.steps, PARITY), end=end, published=published)
    whole: tuple[str, ...] = ("quantize", EXPORT)
    more, end = export(errors, find_recipe(case.recipe), dict(parameters(model))) if errors else (whole, ())
    exported = published if EXPORT in more else None
    return replace(subject, steps=(*subject.steps, *more), end=end, published=exported)


_ENDS: Mapping[str, Callable[[CaseReport, Sequence[Finding]], Subject]] = {
    "parse": _parse,
    "reference": _full_size,
    "audit": _full_size,
    "config": _config,
    "shrink": _no_plan,
    "build": _build,
    "forward": _forward,
    "quantize": _quantize,
    "parity": _parity,
}
