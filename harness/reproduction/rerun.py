"""Rerun: one case of a report -> the same case again, in this process, and what there is to read of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import messages, pipeline
from harness.case import REAL, Case, CaseReport, Outcome
from harness.errors import BLOCKING, UsageError
from harness.reproduction.reduction import reduce, reduction_text
from harness.reproduction.shape_trace import trace_text
from harness.reproduction.subject import is_unsupported
from harness.reproduction.witness import Debugger, Witness
from harness.runner import run_cases, safely


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to do beside running the case again."""

    pdb: bool = False
    reduce: bool = False
    script: Path | None = None
    full_width: bool = False


def again(before: CaseReport, wanted: Wanted, width: int | None) -> tuple[CaseReport, str]:
    """The new report of a case and the text on it. Raises UsageError for what cannot be done with this case.

    Where its process died the last time, the script is written first, of what the report says.
    """
    case = before.case
    if wanted.full_width and (wanted.reduce or wanted.script):
        raise UsageError(
            "--full-width goes with --pdb alone: --reduce and --script work on the case as it is"
        )
    if wanted.pdb and case.ranks == REAL and case.layout.world_size > 1:
        raise UsageError(
            "--pdb: the ranks of --ranks real are processes of their own, out of a debugger's reach"
        )
    if case.device != "cpu":
        # Before CUDA is initialised; a case alone can wait for each call.
        os.environ.setdefault(BLOCKING, "1")
    texts = []
    script = wanted.script
    if script is not None and before.outcome is Outcome.ERROR:
        texts, script = [_script(before, script)], None
    failed_in = [stage.name for stage in before.stages if stage.outcome is Outcome.FAILED]
    witness = Debugger(failed_in[-1] if failed_in else "") if wanted.pdb else Witness()
    report = safely(partial(pipeline.check, watch=witness, full_width=wanted.full_width), case)
    texts += [messages.stages_text(report), *map(trace_text, witness.passes)]
    failed = report.outcome in (Outcome.FAILED, Outcome.ERROR)
    checks = [check for stage in report.stages for check in stage.checks]
    limited = report.outcome is Outcome.UNSUPPORTED or any(map(is_unsupported, checks))
    if script is not None and (failed or limited):
        texts.append(_script(report, script))
    if wanted.reduce and failed:
        texts.append(reduction_text(reduce(report, _one_trial(report))))
    if not failed and (wanted.reduce or (wanted.script and not limited)):
        texts.append("the case does not fail here: there is nothing to reduce or to write a script of")
    return report, "\n\n".join([*texts, messages.full_text([report], width)])


def _script(report: CaseReport, path: Path) -> str:
    from harness.reproduction.script import write_script

    return write_script(report, path)


def _one_trial(report: CaseReport) -> partial[CaseReport]:
    """In this process, which imports everything once; in another where the case may take that with it."""
    return partial(_apart if report.outcome is Outcome.ERROR else _here)


def _here(case: Case) -> CaseReport:
    return safely(pipeline.check, case)


def _apart(case: Case) -> CaseReport:
    (report,) = run_cases([case], 1)
    return report
