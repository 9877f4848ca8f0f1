"""Messages: findings and case reports -> the text that people read.

Where, what is, what should be, and what to do. ``width`` is that of the terminal, or None where the text
goes to a file or a pipe and nothing is wrapped. Messages are never cut, and a command line is never
broken over lines.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from harness.case import CaseReport, Mismatch, Outcome, Size, StandInReport
from harness.finding import Finding
from harness.report import stand_ins

# With less room than this beside the other columns, the last one goes below them.
_NARROW = 30

# The end of a log says most: the exception comes last.
_LOG_LINES = 20


def shown_path(path: str | Path) -> str:
    """A path as a user would type it: relative to the working directory where it lies below it."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> list[str]:
    """Rows under a header in columns two spaces apart; the headers named in ``right`` align right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    to_right = [name in right.split() for name in header]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, to_right, strict=True)
        return "  ".join(cell.rjust(w) if end else cell.ljust(w) for cell, w, end in cells).rstrip()

    return [line(row) for row in table]


def summary_table(reports: Sequence[CaseReport], width: int | None) -> str:
    """One row per case; what a case did not pass for goes last, or below where there is no room."""
    header = ("preset", "recipe", "layout", "device", "outcome", "seconds")
    rows = [
        (r.case.preset, r.case.recipe, str(r.case.layout), r.case.device, str(r.outcome), f"{r.seconds:.1f}")
        for r in reports
    ]
    head, *lines = aligned(header, rows, right="seconds")
    indent = len(head) + 2
    beside = width is None or width - indent >= _NARROW
    text = [f"{head}  what" if beside else head]
    for line, report in zip(lines, reports, strict=True):
        what = what_happened(report)
        if not beside:
            text.append(line)
            if report.outcome is not Outcome.PASSED:
                text.extend(_wrapped(what, width, "    "))
            continue
        first, *rest = _wrapped(what, width, " " * indent) or [""]
        text.extend([f"{line.ljust(indent)}{first.strip()}".rstrip(), *rest])
    return "\n".join(text)


def _wrapped(text: str, width: int | None, indent: str) -> list[str]:
    if width is None:
        return [indent + text] if text else []
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def what_happened(report: CaseReport) -> str:
    """One line on a case: its reason, its first error, or what its last stage saw."""
    if report.reason:
        return report.reason.splitlines()[0]
    errors = distinct_errors(report)
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        return finding_text(errors[0], report.case.path) + more
    return next((stage.detail for stage in reversed(report.stages) if stage.detail), "")


def distinct_errors(report: CaseReport) -> list[Finding]:
    """The errors of a case, less those that repeat without a place what an earlier stage said of a flag."""
    found: list[Finding] = []
    for finding in report.findings:
        repeated = not finding.flag and any(finding.message == other.message for other in found)
        if finding.is_error and not repeated:
            found.append(finding)
    return found


def finding_text(finding: Finding, path: str) -> str:
    """``--num-query-groups 10 (presets/Qwen/Qwen3-8B.sh:22): 8 published``."""
    message = " ".join(finding.message.splitlines())
    place = f"{shown_path(path)}:{finding.line}" if finding.line else ""
    if not finding.flag or (finding.flag in message and not message.startswith(finding.flag)):
        return f"{place}: {message}" if place else message
    subject, colon, rest = message.partition(": ")
    if not message.startswith(finding.flag) or not colon:
        subject, rest = finding.flag, message.removeprefix(finding.flag).lstrip()
    return f"{subject} ({place}): {rest}" if place else f"{subject}: {rest}"


def lint_line(finding: Finding, path: str) -> str:
    """``presets/Qwen/Qwen3-8B.sh:22:5: error: --num-query-groups 10: 8 published``, as editors read it."""
    place = ":".join(str(part) for part in (shown_path(path), finding.line, finding.column) if part)
    message = " ".join(finding.message.splitlines())
    flag = f"{finding.flag}: " if finding.flag and finding.flag not in message else ""
    return f"{place}: {finding.severity}: {flag}{message}"


def lint_text(reports: Sequence[CaseReport]) -> str:
    """Every finding of these presets, a line each, and how many there were."""
    found = [(finding, r.case.path) for r in reports for finding in (*distinct_errors(r), *_warnings(r))]
    lines = [lint_line(finding, path) for finding, path in found]
    errors = sum(finding.is_error for finding, _ in found)
    counted = ((len(reports), "preset"), (errors, "error"), (len(found) - errors, "warning"))
    presets, *rest = (f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in counted)
    return "\n".join([*lines, f"{presets}: {', '.join(rest)}"])


def _warnings(report: CaseReport) -> list[Finding]:
    return [finding for finding in report.findings if not finding.is_error]


def failure_text(report: CaseReport) -> str:
    """Where, what is, what should be, and what to do, for one case that did not pass."""
    return "\n".join([*_body(report), f"  again: {report.case.repro}"])


def failures_text(reports: Iterable[CaseReport]) -> str:
    """A block for everything that went wrong; cases that went wrong in the same way share one."""
    blocks: dict[tuple[str, ...], list[str]] = {}
    for report in reports:
        if report.outcome in (Outcome.FAILED, Outcome.ERROR):
            blocks.setdefault(tuple(_body(report)), []).append(f"  again: {report.case.repro}")
    return "\n\n".join("\n".join([*body, *again]) for body, again in blocks.items())


def _body(report: CaseReport) -> Iterator[str]:
    """The first finding on a module heads the block, as it says what broke; flags say why."""
    preset, path = report.case.preset, report.case.path
    errors = distinct_errors(report)
    headline = None if report.reason else next((finding for finding in errors if finding.module), None)
    if headline is not None:
        yield f"{preset}  {headline.message}"
    else:
        stages = ", ".join(dict.fromkeys(finding.stage for finding in errors))
        yield f"{preset}  {report.reason or f'failed in {stages}'}"
    yield from (f"  {finding_text(finding, path)}" for finding in errors if finding is not headline)
    if report.mismatch is not None:
        yield from _mismatch(report.mismatch, path)
    if report.outcome is Outcome.ERROR and report.log:
        yield from (f"  | {line}".rstrip() for line in report.log.splitlines()[-_LOG_LINES:])


def _mismatch(mismatch: Mismatch, path: str) -> Iterator[str]:
    """The module, its shapes a line each, and the sizes around it, those that are wrong first."""
    wrong = any("published" in text or "expected" in text for _, text in mismatch.shapes)
    yield f"  {'shapes part at' if wrong else 'at'} {mismatch.module.removeprefix('decoder.')}"
    width = max((len(word) for word, _ in mismatch.shapes), default=0)
    yield from (f"    {word.ljust(width)}  {text}" for word, text in mismatch.shapes)
    sizes = sorted(mismatch.sizes, key=lambda size: size.published is None)
    yield from (f"    {_size(size, path)}" for size in sizes)


def _size(size: Size, path: str) -> str:
    """``--num-query-groups 4 (presets/Qwen/Qwen3-8B.sh:23), 8 published``."""
    place = f" ({shown_path(path)}:{size.line})" if size.line else ""
    small = f", {size.small} in the tiny model" if size.small is not None else ""
    published = f", {size.published} published" if size.published is not None else ""
    return f"{size.flag} {size.value}{place}{small}{published}"


def skipped_text(reports: Iterable[CaseReport]) -> str:
    """Every skipped case with its reason."""
    return "\n".join(
        f"{report.case.name}  skipped: {report.reason or 'no reason was given'}"
        for report in reports
        if report.outcome is Outcome.SKIPPED
    )


def unsupported_text(reports: Iterable[CaseReport]) -> str:
    """Whose limits these are and their words, each once, with the cases that meet it."""
    cases: dict[str, list[str]] = {}
    for report in reports:
        if report.outcome is Outcome.UNSUPPORTED:
            cases.setdefault(report.reason, []).append(f"  {report.case.name}")
    return "\n".join("\n".join([reason, *names]) for reason, names in cases.items())


def not_proved_text(reports: Iterable[CaseReport]) -> str:
    """What was asked of cases that passed and could not be proved: the reason once, and the cases."""
    cases: dict[str, list[str]] = {}
    for report in reports:
        if report.outcome is not Outcome.PASSED:
            continue
        for check in (check for stage in report.stages for check in stage.checks):
            if check.name in report.case.prove and check.outcome in (Outcome.UNSUPPORTED, Outcome.SKIPPED):
                said = f"{check.name} {check.outcome}: {check.detail}"
                cases.setdefault(said, []).append(f"  {report.case.name}")
    return "\n".join("\n".join([said, *names]) for said, names in cases.items())


def warnings_text(reports: Iterable[CaseReport]) -> str:
    """Every warning, once per preset however many cases found it."""
    return _each_once(reports, _warnings)


def errors_text(reports: Iterable[CaseReport]) -> str:
    """Every error, once per preset, a line each: for reports that are not of cases to run again."""
    return _each_once(reports, distinct_errors)


def _each_once(reports: Iterable[CaseReport], chosen: Callable[[CaseReport], list[Finding]]) -> str:
    lines = (
        f"{report.case.preset}  {finding_text(finding, report.case.path)}"
        for report in reports
        for finding in chosen(report)
    )
    return "\n".join(dict.fromkeys(lines))


def stand_ins_text(records: Iterable[StandInReport]) -> str:
    """What stood in for what, and why."""
    return "\n".join(f"{record.target}: {record.replacement}. {record.reason}" for record in records)


def stages_text(report: CaseReport) -> str:
    """Every stage of one case: outcome, seconds and what it saw; its named checks below it."""
    rows = []
    for stage in report.stages:
        rows.append((stage.name, str(stage.outcome), f"{stage.seconds:.2f}", stage.detail))
        rows.extend((f"  {check.name}", str(check.outcome), "", check.detail) for check in stage.checks)
    return "\n".join(aligned(("stage", "outcome", "seconds", "what"), rows, right="seconds"))


def summary_line(reports: Sequence[CaseReport], seconds: float | None = None) -> str:
    """``12 cases: 10 passed, 2 failed in 34.1 s``."""
    counted = Counter(report.outcome for report in reports)
    parts = ", ".join(f"{counted[outcome]} {outcome}" for outcome in Outcome if counted[outcome])
    took = "" if seconds is None else f" in {seconds:.1f} s"
    return f"{len(reports)} case{'' if len(reports) == 1 else 's'}: {parts or 'nothing ran'}{took}"


def full_text(reports: Sequence[CaseReport], width: int | None, seconds: float | None = None) -> str:
    """The table, then what failed, was skipped, is unsupported, was not proved, was warned of and stood in; a
    line on it all."""
    sections = (
        ("", summary_table(reports, width)),
        ("", failures_text(reports)),
        ("skipped\n", skipped_text(reports)),
        ("unsupported\n", unsupported_text(reports)),
        ("not proved\n", not_proved_text(reports)),
        ("warnings\n", warnings_text(reports)),
        ("stand-ins on this machine\n", stand_ins_text(stand_ins(reports))),
        ("", summary_line(reports, seconds)),
    )
    return "\n\n".join(
        title + (textwrap.indent(text, "  ") if title else text) for title, text in sections if text
    )
