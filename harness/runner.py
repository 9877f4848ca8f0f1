"""Runner: many cases -> their reports, over workers that take one case after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from multiprocessing.connection import wait
from time import monotonic
from typing import Any

from harness import pipeline
from harness.case import Case, CaseReport, Outcome
from harness.devices import Share, worker_shares
from harness.errors import Interrupted
from harness.processes import PRELOAD, fork_server
from harness.selection import DEFAULT_TIMEOUT
from harness.worker import Check, Worker, safely

__all__ = ["run_cases", "safely", "spread"]


def spread(cases: Sequence[Case]) -> list[int]:
    """Indices in the order of running: a preset's cases apart, as those of a large one all take long.

    And each preset begins with another of its cases, so that recipes are apart as well: those that wait
    for a compiler or take long are not in hand all at once.
    """
    of_preset: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        of_preset.setdefault(case.preset, []).append(index)
    rows = []
    for number, own in enumerate(of_preset.values()):
        first = number % len(own)
        rows.append(own[first:] + own[:first])
    return [index for turn in zip_longest(*rows) for index in turn if index is not None]


def run_cases(
    cases: Sequence[Case],
    jobs: int | Sequence[Share],
    timeout: float | None = DEFAULT_TIMEOUT,
    on_done: Callable[[CaseReport], None] = lambda report: None,
    check: Check = pipeline.check,
    preload: Sequence[str] = PRELOAD,
) -> list[CaseReport]:
    """Run every case and return the reports in the order of ``cases``.

    ``jobs`` is a number of workers, or the share of each, as ``devices.worker_shares`` plans them.
    ``timeout`` is in seconds per case, None for no limit. ``on_done`` is called with each report as it
    comes. ``check`` (``pipeline.check``) must be importable by name, as the workers look it up.
    Interrupted goes through with what was done until then, and a skip for each case that was not, as its
    ``reports``. Raises UsageError where so many workers do not fit.
    """
    if not cases:
        return []
    if isinstance(jobs, int):
        jobs = worker_shares(cases[0].device, max(1, min(jobs, len(cases))))
    context = fork_server(preload)
    pool = _Pool(cases, timeout, on_done, [Worker(context, check, share) for share in jobs[: len(cases)]])
    try:
        pool.run()
    except Interrupted as interrupted:
        interrupted.reports = tuple(pool.so_far(f"interrupted by {interrupted}"))
        raise
    finally:
        pool.close()
    return [pool.reports[index] for index in range(len(cases))]


class _Pool:
    """The workers of one run, the cases still to do, and the reports so far."""

    def __init__(
        self,
        cases: Sequence[Case],
        timeout: float | None,
        on_done: Callable[[CaseReport], None],
        workers: Sequence[Worker],
    ) -> None:
        self.cases, self.timeout, self.on_done, self.workers = cases, timeout, on_done, workers
        self.waiting = deque(spread(cases))
        self.busy: dict[int, Worker] = {}  # by the case in hand
        self.reports: dict[int, CaseReport] = {}
        self._shared: dict[object, Any] = {}

    def run(self) -> None:
        while len(self.reports) < len(self.cases):
            for worker in self.workers:
                if worker.case is None and self.waiting:
                    index = self.waiting.popleft()
                    self.busy[index] = worker
                    worker.hand(self.cases[index], self.timeout)
            self._attend()

    def close(self) -> None:
        for worker in self.workers:
            worker.end()

    def so_far(self, why: str) -> list[CaseReport]:
        """A report of every case; those that have none yet are skipped."""
        missing = [CaseReport(case, Outcome.SKIPPED, 0.0, reason=why) for case in self.cases]
        return [self.reports.get(index, report) for index, report in enumerate(missing)]

    def _attend(self) -> None:
        """Wait for a message, a death or a time limit, and deal with what there is."""
        deadlines = [worker.deadline for worker in self.busy.values() if worker.deadline is not None]
        limit = max(0.0, min(deadlines) - monotonic()) if deadlines else None
        ready = set(wait([handle for worker in self.busy.values() for handle in worker.handles], limit))
        for index, worker in list(self.busy.items()):
            report = worker.attend(ready)
            if report is None:
                continue
            del self.busy[index]
            self.reports[index] = self._lean(report)
            self.on_done(report)
            if not self.waiting:
                worker.end()

    def _lean(self, report: CaseReport) -> CaseReport:
        """The report with what other cases of its preset say as well in common: all are kept to the end."""
        stand_ins = self._shared.setdefault(report.stand_ins, report.stand_ins)
        shrink = self._shared.setdefault((report.case.path, report.case.layout), report.shrink)
        same = shrink == report.shrink
        return replace(report, stand_ins=stand_ins, shrink=shrink if same else report.shrink)
