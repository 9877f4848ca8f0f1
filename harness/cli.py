"""Command line: arguments -> one call of what does the work -> text, JSON and an exit code.

Nothing here imports torch, and rich only where a terminal shows progress or colour: ``list``, ``show`` and
``lint`` answer at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from harness import audit_table, blueprint, messages, pipeline, report
from harness.case import FIRST_RANKS, CaseReport
from harness.devices import resolve_device, worker_shares
from harness.errors import HarnessError, Interrupted, UsageError
from harness.preset import Found, find
from harness.reproduction.choice import choose_case, require_file
from harness.selection import (
    DEFAULT_TIMEOUT,
    cases_of,
    checks_named,
    default_tree,
    layouts_named,
    not_checked_json,
    not_checked_text,
    processes_per_case,
    proofs_named,
    recipes_named,
    runnable,
)
from harness.shards import cases_of_shard, shard_named
from harness.step_summary import write_step_summary

if TYPE_CHECKING:
    from types import FrameType

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Check Megatron-LM model presets: shrink, build, ModelOpt fake-quant forward.",
)

Names = Annotated[
    list[str] | None, typer.Argument(metavar="NAME", help="Org/Model, Model, a file or a folder")
]
Tree = Annotated[
    Path | None, typer.Option("--presets", metavar="DIR", help="tree of presets, instead of presets/")
]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="write the JSON document, - for stdout")
]
Recipes = Annotated[
    list[str] | None, typer.Option("--recipe", help="a recipe, several with commas, default or all")
]
Checks = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        help="a recipe, several with commas, default or all; parity compares with Hugging Face's model",
    ),
]
Layouts = Annotated[
    list[str] | None, typer.Option("--layout", help="parallel sizes: tp2, or tp8,ep4,etp1,pp2")
]
Prove = Annotated[
    list[str] | None,
    typer.Option(
        "--prove", help="checks that cost more: state, weights, backward, export, with commas, or all"
    ),
]
Ranks = Annotated[
    str,
    typer.Option(
        help="ranks to simulate: first (of each pipeline stage), all, or 0,5; or real: a process each"
    ),
]


def main() -> NoReturn:
    """The console entry. Exit code 0: all passed; 1: a preset has errors; 2: wrong usage or our own fault."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        # A path may hold bytes that are no text, or letters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except HarnessError as error:
        print(f"harness: {error}", file=sys.stderr)
    except Interrupted as interrupted:
        print(f"harness: interrupted by {interrupted}; no report was written", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    except Exception:
        traceback.print_exc()
    sys.exit(2)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


@app.command("list")
def list_(presets: Tree = None, json_: Json = None) -> None:
    """Every preset: kind, size, heads, experts, reference."""
    found = _find([], presets)
    entries = [blueprint.summary(file) for file in found.files]
    others = not_checked_json(found.not_checked)
    document = {"schema": report.SCHEMA, "presets": entries, "not_checked": others}
    _deliver(_with_others(blueprint.list_text(entries), found), document, json_)
    raise typer.Exit(0)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Org/Model, Model or a file")],
    layout: Annotated[str, typer.Option("--layout", help="parallel sizes the plan is made for")] = "tp1",
    presets: Tree = None,
    json_: Json = None,
) -> None:
    """The blueprint: full size beside shrunken, invariant by invariant."""
    (sizes,) = layouts_named([layout])
    found = _find([name], presets)
    shown = [pipeline.blueprint(file, sizes) for file in found.files]
    text = "\n\n".join(blueprint.show_text(*entry) for entry in shown)
    _finish(text, [case_report for case_report, _ in shown], json_, found)


@app.command()
def lint(
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH", help="files, folders or names")] = None,
    presets: Tree = None,
    json_: Json = None,
) -> None:
    """parse + reference + audit; no torch, for pre-commit."""
    found = _find(paths or [], presets)
    reports = [pipeline.lint(file) for file in found.files]
    _finish(messages.lint_text(reports), reports, json_, found)


@app.command()
def audit(
    names: Names = None,
    recipe: Recipes = None,
    layout: Layouts = None,
    presets: Tree = None,
    json_: Json = None,
) -> None:
    """Full-size table of layouts x recipes: weights per rank, what is refused, what blocks do not divide.

    What a layout refuses is an answer, no fault of the preset: it does not make the exit code 1.
    """
    recipes = recipes_named(recipe or ["all"])
    layouts = layouts_named(layout or audit_table.DEFAULT_LAYOUTS)
    found = _find(names or [], presets)
    reports = [pipeline.lint(file) for file in found.files]
    models = {file.name: pipeline.full_size(file) for file in found.files}
    readable = {name: full for name, full in models.items() if full is not None}
    rows = audit_table.audit_rows(readable, layouts, recipes)
    blocks = (
        audit_table.audit_text(rows, recipes, [name for name in models if name not in readable]),
        messages.errors_text(reports),
        messages.warnings_text(reports),
    )
    others = not_checked_json(found.not_checked)
    document = report.to_json(reports) | {"audit": audit_table.audit_json(rows), "not_checked": others}
    _deliver(_with_others("\n\n".join(filter(None, blocks)), found), document, json_)
    raise typer.Exit(report.exit_code(reports))


@app.command()
def check(
    names: Names = None,
    recipe: Checks = None,
    layout: Layouts = None,
    ranks: Ranks = FIRST_RANKS,
    prove: Prove = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    jobs: Annotated[str, typer.Option(help="worker processes, or auto")] = "auto",
    timeout: Annotated[
        float, typer.Option(help="seconds that one case may take; 0 for no limit")
    ] = DEFAULT_TIMEOUT,
    shard: Annotated[
        str | None, typer.Option(metavar="N/OF", help="one part of several, as 2/5, on each of 5 machines")
    ] = None,
    shard_durations: Annotated[
        str | None,
        typer.Option(metavar="REPORT", help="an earlier report, by whose durations shards take as long"),
    ] = None,
    presets: Tree = None,
    json_: Json = None,
) -> None:
    """Every stage of every case; no name means every preset."""
    from harness.runner import run_cases

    checks, chosen = checks_named(recipe or []), resolve_device(device)
    layouts, proofs = runnable(layouts_named(layout or []), ranks, chosen), proofs_named(prove or [])
    part, count = shard_named(shard, shard_durations), _jobs(jobs)
    found = _find(names or [], presets)
    pipeline.require_possible(found.files, layouts)
    cases = cases_of(found.files, checks, layouts, chosen, presets, ranks, proofs)
    cases = cases_of_shard(cases, part) if part else cases
    workers = worker_shares(device, count, processes_per_case(layouts, ranks), len(cases))
    if timeout < 0:
        raise UsageError(f"--timeout {timeout:g} is less than no time")
    if json_ not in (None, "-"):
        report.require_writable(Path(json_ or ""))
    start = perf_counter()
    interrupted = None
    with _progress(len(cases)) as on_done:
        try:
            reports = run_cases(cases, workers, timeout or None, on_done)
        except Interrupted as signalled:
            interrupted, reports = signalled, list(signalled.reports)
    seconds = perf_counter() - start
    write_step_summary(reports, seconds)
    text = messages.full_text(reports, _width(json_), seconds)
    if interrupted is None:
        _finish(text, reports, json_, found)
    document = report.to_json(reports) | {"not_checked": not_checked_json(found.not_checked)}
    _deliver(_with_others(text, found), document, json_)
    _write(f"harness: interrupted by {interrupted}; {_so_far(reports, json_)}", sys.stderr)
    raise typer.Exit(interrupted.exit_code)


@app.command()
def repro(
    path: Annotated[Path, typer.Argument(metavar="REPORT", help="a JSON report of check")],
    case: Annotated[
        str | None, typer.Argument(help="words of its name: preset, recipe, layout, device")
    ] = None,
    pdb: Annotated[bool, typer.Option("--pdb", help="stop in the debugger where a stage fails")] = False,
    reduce: Annotated[
        bool, typer.Option("--reduce", help="the fewest flags that, changed back, make it pass")
    ] = False,
    script: Annotated[
        Path | None,
        typer.Option("--script", metavar="FILE", help="write the failure as a program without the harness"),
    ] = None,
    full_width: Annotated[
        bool, typer.Option("--full-width", help="real sizes in the plan's few layers, where they fit")
    ] = False,
    json_: Json = None,
) -> None:
    """Run one case of a report again, alone, in this process, with the whole shape trace."""
    from harness.reproduction import rerun

    chosen = choose_case(report.read_report(path), case, path)
    require_file(chosen.case, path)
    if script is not None:
        report.require_writable(script)
    result, text = rerun.again(chosen, rerun.Wanted(pdb, reduce, script, full_width), _width(json_))
    _finish(text, [result], json_)


def _find(names: Sequence[str], tree: Path | None) -> Found:
    return find(names, tree or default_tree())


def _jobs(text: str) -> int | None:
    """A number of workers, None for as many as there is room for."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--jobs {text!r} is neither auto nor a number of at least 1")
    return int(text)


def _width(json_: str | None) -> int | None:
    """Columns of the terminal that the text goes to, None where it goes elsewhere."""
    stream = sys.stderr if json_ == "-" else sys.stdout
    return shutil.get_terminal_size().columns if stream.isatty() else None


def _so_far(reports: Sequence[CaseReport], json_: str | None) -> str:
    """What an interrupted run leaves: how far it came, and where that is written."""
    done = sum(not entry.reason.startswith("interrupted by ") for entry in reports)
    where = f"; {json_} says which" if json_ not in (None, "-") else ""
    return f"{done} of {len(reports)} cases were done{where}"


def _finish(
    text: str, reports: Sequence[CaseReport], json_: str | None, found: Found | None = None
) -> NoReturn:
    """Print, write the document if one is wanted, and leave with the exit code of these reports.

    ``found`` lists what stands in the same folders and is not checked.
    """
    others = found.not_checked if found else ()
    document = report.to_json(reports) | {"not_checked": not_checked_json(others)} if json_ else None
    _deliver(_with_others(text, found), document, json_)
    raise typer.Exit(report.exit_code(reports))


def _with_others(text: str, found: Found | None) -> str:
    """The text, then the other files of the same folders."""
    listed = not_checked_text(found.not_checked) if found else ""
    return "\n\n".join(filter(None, (text, listed)))


def _deliver(text: str, document: Any, json_: str | None) -> None:
    """Both, also where one of them cannot be written."""
    try:
        if json_ not in (None, "-"):
            report.write_report(Path(json_ or ""), document)
    finally:
        _print(text, sys.stderr if json_ == "-" else sys.stdout)
    if json_ == "-":
        _write(json.dumps(document, indent=2, allow_nan=False), sys.stdout)


def _print(text: str, stream: Any) -> None:
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        _write(text, stream)
        return
    from rich.console import Console
    from rich.text import Text

    coloured = Text(text)
    for pattern, style in _STYLES.items():
        coloured.highlight_regex(pattern, style)
    Console(file=stream).print(coloured, soft_wrap=True)


def _write(line: str, stream: Any) -> None:
    """Whoever reads may leave after a few lines, as ``head`` does: the run, its report and its exit code are
    not theirs to end."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


# Outcomes in a column, after a count or in a lint line; not the "relative error" of a case.
_STYLES = {
    r"((?<=  )|(?<=\d ))passed\b": "green",
    r"((?<=  )|(?<=\d )|(?<=: ))(failed|error|NO)\b": "bold red",
    r"((?<=  )|(?<=\d )|(?<=: ))(skipped|unsupported|warning)\b": "yellow",
    r"(?m)^  again: .*": "dim",
}


@contextmanager
def _progress(total: int) -> Iterator[Callable[[CaseReport], None]]:
    """Something to call with each report: a bar on a terminal, a line on anything else."""
    if not sys.stderr.isatty():
        done = iter(range(1, total + 1))
        yield lambda entry: _write(f"[{next(done)}/{total}] {_brief(entry)}", sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting workers", total=total)
        yield lambda entry: bar.update(task, advance=1, description=_brief(entry))


def _brief(entry: CaseReport) -> str:
    case = entry.case
    return f"{entry.outcome}  {case.preset} {case.recipe} {case.layout} {case.device}  {entry.seconds:.1f} s"
