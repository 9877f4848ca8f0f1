"""pytest plugin: a preset file -> a test file, with one item per case.

``pytest presets -k "Qwen3 and nvfp4" -n auto``; elsewhere ``pytest /some/tree -p harness.pytest_plugin``.
Each case runs in a child process (``worker.py``), so that neither pytest nor a worker of xdist imports torch
or is ended by a case. What a case found travels to the terminal as an attribute of pytest's own report, also
from an xdist worker.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from harness.case import FIRST_RANKS, PARITY, Case, CaseReport, Outcome
from harness.devices import Share, resolve_device, wanted_device, worker_count, worker_shares
from harness.errors import HarnessError, UsageError
from harness.layout import Layout
from harness.messages import failure_text, stand_ins_text, warnings_text
from harness.pipeline import require_possible
from harness.preset import PresetFile
from harness.processes import pin_threads
from harness.pytest_workers import run_here, server_for_others, worker_in
from harness.report import from_json, stand_ins, to_json
from harness.selection import (
    DEFAULT_TIMEOUT,
    cases_of,
    checks_named,
    layouts_named,
    not_checked_text,
    processes_per_case,
    proofs_named,
    runnable,
)
from harness.shards import Shard, duration_name, shard_named
from harness.step_summary import write_step_summary
from harness.tree import Kind, NotChecked, leads_back, preset_at, survey, what_it_is
from harness.worker import Worker


@dataclass(frozen=True, slots=True)
class Wanted:
    """The options of one run. ``places`` are the files and folders named on the command line.

    ``checks`` are as in ``selection.cases_of``.
    """

    checks: tuple[str, ...]
    layouts: tuple[Layout, ...]
    ranks: str
    device: str
    timeout: float
    places: tuple[Path, ...]
    prove: tuple[str, ...] = ()
    in_process: bool = False
    shard: Shard | None = None


_WANTED = pytest.StashKey[Wanted]()
_REPORT = pytest.StashKey[CaseReport]()
_PLACE = pytest.StashKey[Worker]()


# ---- options, workers and devices ----


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("harness", "Megatron-LM model presets")
    group.addoption(
        "--recipe",
        action="append",
        default=[],
        help="a recipe, several with commas, default or all; parity compares with Hugging Face's model",
    )
    group.addoption("--layout", action="append", default=[], help="parallel sizes: tp2, or tp8,ep4,etp1,pp2")
    group.addoption(
        "--ranks",
        default=FIRST_RANKS,
        help="ranks of a layout to simulate: first, all, or 0,5; or real: a process each",
    )
    group.addoption(
        "--prove",
        action="append",
        default=[],
        help="checks that cost more: state, weights, backward, export, several with commas, or all",
    )
    group.addoption("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    # Not --timeout: that is pytest-timeout's.
    group.addoption(
        "--case-timeout", type=float, default=DEFAULT_TIMEOUT, metavar="SECONDS", help="0 for no limit"
    )
    group.addoption("--shard", metavar="N/OF", help="run one part of several, as 2/5, on each of 5 machines")
    group.addoption(
        "--shard-durations",
        metavar="REPORT",
        help="a JSON report of harness check, by whose durations the shards take about as long",
    )
    group.addoption(
        "--in-process",
        action="store_true",
        help="run cases in pytest's own process, for a debugger; a crash then ends pytest",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a CUDA device")
    try:
        config.stash[_WANTED] = _wanted(config)
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from error


def _wanted(config: pytest.Config) -> Wanted:
    device, layouts = config.getoption("device"), layouts_named(config.getoption("layout"))
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        device = _pin(device, Share(**worker["harness_share"]))
        places = tuple(map(Path, worker["harness_places"]))
    else:
        places = tuple(_places(config))
        require_possible(_presets(config, places), layouts)
    ranks, resolved = config.getoption("ranks"), resolve_device(device)
    return Wanted(
        checks_named(config.getoption("recipe")),
        tuple(runnable(layouts, ranks, resolved)),
        ranks,
        resolved,
        config.getoption("case_timeout"),
        places,
        proofs_named(config.getoption("prove")),
        config.getoption("in_process"),
        shard_named(config.getoption("shard"), config.getoption("shard_durations")),
    )


def _pin(device: str, share: Share) -> str:
    """Leave this xdist worker its share of the cores and one device; what that device is now called."""
    os.environ.update(share.environment)
    pin_threads(share.threads)
    return device if share.entry is None else "cuda:0"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist what is its share, and where the fork server is, which they have in common."""
    config, given = node.config, node.workerinput
    wanted = config.stash[_WANTED]
    try:
        share = _shares(config, given["workercount"])[int(given["workerid"].removeprefix("gw"))]
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    given["harness_places"] = list(map(str, wanted.places))
    given["harness_share"] = asdict(share)
    if _has_presets(config) and not (wanted.in_process or config.option.collectonly):
        given["harness_server"] = server_for_others()


def _shares(config: pytest.Config, workers: int) -> list[Share]:
    """What each of so many workers may use. Raises UsageError where they do not fit."""
    wanted = config.stash[_WANTED]
    processes = processes_per_case(wanted.layouts, wanted.ranks)
    try:
        return worker_shares(config.getoption("device"), workers, processes)
    except UsageError:
        if _has_presets(config):
            raise
        return [Share(1, 0)] * workers  # other tests are what they are


def _has_presets(config: pytest.Config) -> bool:
    return next(_presets(config, config.stash[_WANTED].places), None) is not None


@pytest.hookimpl(optionalhook=True, tryfirst=True)  # before xdist, whichever was loaded first
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    try:
        device = wanted_device(config.getoption("device"))
        layouts = layouts_named(config.getoption("layout"))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    return worker_count(device, processes_per_case(layouts, config.getoption("ranks")))


def pytest_report_header(config: pytest.Config) -> str:
    wanted = config.stash[_WANTED]
    shard = f"; shard {wanted.shard}" if wanted.shard else ""
    layouts = ", ".join(map(str, wanted.layouts))
    return f"harness: {', '.join(wanted.checks)}; {layouts}; {wanted.device}{shard}"


# ---- collection ----


def _places(config: pytest.Config) -> list[Path]:
    """Files and folders named on the command line. A preset folder without presets is a usage error."""
    here = config.invocation_params.dir
    named = _named(config)
    for place in named:
        if place.is_dir() and _in_presets(place) and not survey(place).presets:
            raise pytest.UsageError(f"no preset (*.sh) below {place}")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        return []
    # ``pytest .`` asks for what pytest finds here, not for every script.
    return [place for place in named if not here.is_relative_to(place)]


def _named(config: pytest.Config) -> list[Path]:
    """What pytest was asked to collect, the test paths of its configuration where nothing was said."""
    here = config.invocation_params.dir
    return [Path(os.path.abspath(here / argument.partition("::")[0])) for argument in config.args]


def _presets(config: pytest.Config, places: Sequence[Path]) -> Iterator[PresetFile]:
    """The presets that will be collected."""
    for place in _named(config):
        found = survey(place).presets if place.is_dir() else [preset_at(place)]
        yield from (file for file in found if is_preset(file.path, places))


def _in_presets(place: Path) -> bool:
    return "presets" in place.parts


def is_preset(path: Path, places: Sequence[Path]) -> bool:
    """A file that is named itself, or a preset below a folder called ``presets`` or below a named one."""
    if path.suffix != ".sh":
        return False
    if path in places:
        return True
    below = _in_presets(path) or any(place in path.parents for place in places)
    return below and what_it_is(path)[0] is Kind.PRESET


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Links that lead back into the tree: their files are collected where they stand."""
    if not collection_path.is_symlink() or not collection_path.is_dir():
        return None
    roots = [place for place in _named(config) if place in collection_path.parents]
    return True if leads_back(collection_path, [Path(os.path.realpath(root)) for root in roots]) else None


def _not_checked(config: pytest.Config) -> list[NotChecked]:
    """Shell files that stand in a collected tree of presets and are none."""
    wanted = config.stash[_WANTED].places
    trees = [(place, survey(place)) for place in _named(config) if place.is_dir()]
    return [
        other
        for place, tree in trees
        if tree.presets
        for other in tree.not_checked
        if place in wanted or _in_presets(other.path)
    ]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> PresetTests | None:
    if not is_preset(file_path, parent.config.stash[_WANTED].places):
        return None
    return PresetTests.from_parent(parent, path=file_path)


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = config.stash[_WANTED].shard
    if shard is None:
        return
    names = [duration_name(item.case) if isinstance(item, PresetCase) else item.nodeid for item in items]
    kept = shard.of(names)
    others = [item for item, name in zip(items, names, strict=True) if name not in kept]
    items[:] = [item for item, name in zip(items, names, strict=True) if name in kept]
    config.hook.pytest_deselected(items=others)


class PresetTests(pytest.File):
    """One preset file; its items are recipes x layouts."""

    def collect(self) -> Iterator[PresetCase]:
        wanted = self.config.stash[_WANTED]
        file = preset_at(self.path)
        layouts, ranks = wanted.layouts, wanted.ranks
        for case in cases_of([file], wanted.checks, layouts, wanted.device, None, ranks, wanted.prove):
            layout = f"-{case.layout}" if len(wanted.layouts) > 1 and case.recipe != PARITY else ""
            yield PresetCase.from_parent(self, name=f"{case.recipe}{layout}", case=case)


class PresetCase(pytest.Item):
    """One case."""

    def __init__(self, *, case: Case, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case
        self.extra_keyword_matches.update((case.preset, case.recipe, str(case.layout)))
        if case.device != "cpu":
            self.add_marker("gpu")

    def runtest(self) -> None:
        report = self.stash[_REPORT] = _run(self.case, self.config)
        if report.log and report.outcome is Outcome.FAILED:
            self.add_report_section("call", "log", report.log)
        if report.outcome is Outcome.SKIPPED:
            raise pytest.skip.Exception(report.reason, _use_item_location=True)
        if report.outcome is Outcome.UNSUPPORTED:
            raise pytest.skip.Exception(f"unsupported: {report.reason}", _use_item_location=True)
        if report.outcome is not Outcome.PASSED:
            raise CaseFailed(report)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CaseFailed):
            return failure_text(excinfo.value.report)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.case.name


def _run(case: Case, config: pytest.Config) -> CaseReport:
    from harness import pipeline

    wanted, given = config.stash[_WANTED], getattr(config, "workerinput", None)
    if wanted.in_process:
        return run_here(pipeline.check, case, wanted.timeout, replaceable=given is not None)
    try:
        if _PLACE not in config.stash:
            # Without xdist a case names its device itself, among all that are visible.
            share = Share(**given["harness_share"]) if given else replace(_shares(config, 1)[0], entry=None)
            server = given.get("harness_server") if given else None
            config.stash[_PLACE] = worker_in(share, pipeline.check, server)
    except UsageError as error:
        return CaseReport(case, Outcome.ERROR, 0.0, reason=str(error))
    return config.stash[_PLACE].run(case, wanted.timeout or None)


class CaseFailed(Exception):
    """A case that did not pass, on its way to pytest."""

    def __init__(self, report: CaseReport) -> None:
        super().__init__(failure_text(report))
        self.report = report


def pytest_unconfigure(config: pytest.Config) -> None:
    if _PLACE in config.stash:
        config.stash[_PLACE].end()


# ---- reporting ----


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call" and _REPORT in item.stash:
        # Plain values, which xdist can send.
        report.harness = to_json([item.stash[_REPORT]], env={})  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    documents = [
        entry.harness
        for entries in terminalreporter.stats.values()
        for entry in entries
        if hasattr(entry, "harness")
    ]
    reports = [report for document in documents for report in from_json(document)]
    for title, text in (
        ("warnings in presets", warnings_text(reports)),
        ("stand-ins on this machine", stand_ins_text(stand_ins(reports))),
    ):
        if text:
            terminalreporter.section(title)
            terminalreporter.write_line(text)
    if reports:
        write_step_summary(reports)
    if others := not_checked_text(_not_checked(terminalreporter.config)):
        terminalreporter.section("not checked")
        terminalreporter.write_line(others.partition("\n")[2])
