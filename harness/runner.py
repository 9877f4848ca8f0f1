"""Runner: many cases -> their reports, over worker processes that outlive a case but not a fault.

Workers are forked from one server that has torch, Megatron and ModelOpt imported, and take one case after
the other. A worker that dies or exceeds the time limit is replaced: its case becomes an error with the
reason, and its neighbours go on. Everything goes over pipes; no process survives this one.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import TYPE_CHECKING, Any

from harness import pipeline
from harness.case import Case, CaseReport, Outcome, StandInReport
from harness.errors import UsageError
from harness.processes import PRELOAD, die_with_parent, fork_server, how_it_ended, pin_threads
from harness.report import result_from_json, result_to_json, stand_ins
from harness.selection import DEFAULT_TIMEOUT

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, ForkServerProcess

# Importing everything takes up to half a minute on a busy machine with cold disks.
_STARTING_SECONDS = 300.0
_LOG_BYTES = 1 << 16

Check = Callable[[Case], CaseReport]


# ---- the parent's side ----


def spread(cases: Sequence[Case]) -> list[int]:
    """Indices in the order of running: a preset's cases apart, as those of a large one all take long."""
    seen: Counter[str] = Counter()
    turn = []
    for case in cases:
        turn.append(seen[case.preset])
        seen[case.preset] += 1
    return sorted(range(len(cases)), key=lambda index: turn[index])


@dataclass
class _Worker:
    """One worker process and the case it has in hand."""

    process: ForkServerProcess
    messages: Connection
    output: Connection
    index: int | None = None
    began: float | None = None
    deadline: float | None = None
    log: bytes = b""

    def drain(self) -> None:
        """Take what the worker wrote to its standard output and error; only the end is kept."""
        try:
            while chunk := os.read(self.output.fileno(), _LOG_BYTES):
                self.log = (self.log + chunk)[-_LOG_BYTES:]
        except BlockingIOError:
            pass

    def end(self) -> None:
        """Kill the process if it lives, and close what led to it."""
        self.process.kill()
        self.process.join()
        self.drain()
        self.messages.close()
        self.output.close()


def run_cases(
    cases: Sequence[Case],
    jobs: int,
    timeout: float | None = DEFAULT_TIMEOUT,
    on_done: Callable[[CaseReport], None] = lambda report: None,
    check: Check = pipeline.check,
    preload: Sequence[str] = PRELOAD,
) -> list[CaseReport]:
    """Run every case and return the reports in the order of ``cases``.

    ``timeout`` is in seconds per case, None for no limit. ``on_done`` is called with each report as it
    comes. ``check`` (``pipeline.check``) must be importable by name, as the workers look it up.
    """
    jobs = max(1, min(jobs, len(cases)))
    context = fork_server(preload)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    pool = _Pool(cases, timeout, on_done, lambda: _start(context, check, threads))
    try:
        pool.run(jobs)
    finally:
        pool.close()
    return [pool.reports[index] for index in range(len(cases))]


def _start(context: ForkServerContext, check: Check, threads: int) -> _Worker:
    messages, theirs = context.Pipe()
    output, their_output = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, their_output, check, threads))
    process.start()
    theirs.close()
    their_output.close()
    os.set_blocking(output.fileno(), False)
    return _Worker(process, messages, output)


class _Pool:
    """The workers of one run, the cases still to do, and the reports so far."""

    def __init__(
        self,
        cases: Sequence[Case],
        timeout: float | None,
        on_done: Callable[[CaseReport], None],
        start: Callable[[], _Worker],
    ) -> None:
        self.cases, self.timeout, self.on_done, self.start = cases, timeout, on_done, start
        self.waiting = deque(spread(cases))
        self.workers: list[_Worker] = []
        self.reports: dict[int, CaseReport] = {}

    def run(self, jobs: int) -> None:
        while len(self.reports) < len(self.cases):
            while self.waiting and len(self.workers) < jobs:
                self.workers.append(self.start())
                self._hand_case(self.workers[-1])
            self._attend()

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers.clear()

    def _hand_case(self, worker: _Worker) -> None:
        worker.index, worker.log, worker.began = self.waiting.popleft(), b"", None
        worker.deadline = monotonic() + _STARTING_SECONDS
        worker.messages.send(self.cases[worker.index])

    def _attend(self) -> None:
        """Wait for a message, a death or a time limit, and deal with what there is."""
        deadlines = [worker.deadline for worker in self.workers if worker.deadline is not None]
        limit = max(0.0, min(deadlines) - monotonic()) if deadlines else None
        handles = [h for w in self.workers for h in (w.messages, w.output, w.process.sentinel)]
        ready = set(wait(handles, limit))
        for worker in self.workers[:]:
            if worker.output in ready:
                worker.drain()
            if worker.messages in ready or worker.process.sentinel in ready:
                self._listen(worker)
            elif worker.deadline is not None and monotonic() >= worker.deadline:
                self._replace(worker, self._too_long(worker))

    def _listen(self, worker: _Worker) -> None:
        try:
            message = json.loads(worker.messages.recv_bytes())
        except (EOFError, OSError):
            self._replace(worker, None)
            return
        if message is None:  # the case begins now
            worker.began = monotonic()
            worker.deadline = None if self.timeout is None else worker.began + self.timeout
            return
        assert worker.index is not None
        self._done(worker.index, _received(message, self.cases[worker.index]))
        worker.index = worker.deadline = None
        if self.waiting:
            self._hand_case(worker)
        else:
            self.workers.remove(worker)
            worker.end()

    def _too_long(self, worker: _Worker) -> str:
        if worker.began is None:
            return f"no worker came up within {_STARTING_SECONDS:g} s"
        return f"timed out after {self.timeout:g} s"

    def _replace(self, worker: _Worker, reason: str | None) -> None:
        """Give the worker's case its report, and the worker's place to a new one."""
        self.workers.remove(worker)
        if reason is None:
            worker.process.join(1)  # its exit code comes a moment after its pipes have closed
            reason = how_it_ended(worker.process.exitcode, "the worker")
        worker.end()
        if worker.index is not None:
            report = _error(self.cases[worker.index], reason, worker.log.decode(errors="replace"))
            seconds = 0.0 if worker.began is None else monotonic() - worker.began
            self._done(worker.index, replace(report, seconds=seconds))

    def _done(self, index: int, report: CaseReport) -> None:
        self.reports[index] = report
        self.on_done(report)


def _error(case: Case, reason: str, log: str) -> CaseReport:
    return CaseReport(case, Outcome.ERROR, 0.0, reason=reason, log=log)


def _received(message: dict[str, Any], case: Case) -> CaseReport:
    known = {entry[0]: StandInReport(*entry) for entry in message["stand_ins"]}
    return replace(result_from_json(message["result"], known), case=case)


# ---- the worker's side ----


def _work(messages: Connection, output: Connection, check: Check, threads: int) -> None:
    """Take cases until the parent closes the pipe; what this process prints goes to ``output``."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    faulthandler.enable(2)
    pin_threads(threads)
    for case in _received_cases(messages):
        messages.send_bytes(b"null")
        report = safely(check, case)
        # As JSON: a record may hold a value of torch's, and the parent has no torch.
        stood_in = [(r.target, r.replacement, r.reason) for r in stand_ins([report])]
        answer = {"result": result_to_json(report), "stand_ins": stood_in}
        messages.send_bytes(json.dumps(answer).encode())


def _received_cases(messages: Connection) -> Iterator[Case]:
    while True:
        try:
            yield messages.recv()
        except EOFError:
            return


def safely(check: Check, case: Case) -> CaseReport:
    """The report of a case, also where it could not be checked at all."""
    try:
        return check(case)
    except UsageError as error:
        return _error(case, str(error), "")
    except Exception as error:
        return _error(case, f"the harness failed: {type(error).__name__}: {error}", traceback.format_exc())
