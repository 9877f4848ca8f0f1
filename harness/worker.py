"""Worker: one case after the other in a child process, which a fault costs and the caller never notices.

The child is forked from a server that has torch, Megatron and ModelOpt imported. One that dies or exceeds
the time limit is replaced by the next case; its own becomes an error with the reason, what it printed and
where it stood. Everything goes over pipes.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import TYPE_CHECKING, Any

from harness import host
from harness.case import Case, CaseReport, Outcome, StandInReport
from harness.devices import Share, has_mps
from harness.errors import UsageError, gpu_fault, reason_of
from harness.extensions import load_extensions
from harness.heap import give_back_memory, pages
from harness.processes import (
    PRELOAD,
    SERVER,
    afresh,
    can_fork_for,
    die_with_parent,
    how_it_ended,
    pin_threads,
    will_end_in,
)
from harness.report import result_from_json, result_to_json, stand_ins
from harness.stacks import has_stack, recent_last

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext
    from multiprocessing.process import BaseProcess

# Importing everything takes up to half a minute on a busy machine with cold disks, and ModelOpt's extensions
# a minute and more each, where they have to be compiled.
_STARTING_SECONDS = 900.0
# A child that hangs writes its stack when its time is up; one that cannot even do that gets no longer.
_STACK_SECONDS = 2.0
_QUIET_SECONDS = 0.1
# What a child says that cannot use the device of a case for having been forked.
_CANNOT = "cannot"
_LOG_BYTES = 1 << 16
# A child that holds so much more than after its first case is replaced, so that no number of cases fills the
# memory, whatever a library or a heap in pieces keeps of each. On the CPU it takes 0.3 s, once in some
# twenty cases; on a GPU a new CUDA context, which loads its kernels as they are used.
_MOST_GROWTH = {"cpu": 32 << 20, "cuda": 1 << 30}

Check = Callable[[Case], CaseReport]


# ---- the parent's side ----


class Worker:
    """A place for one child process, and the case that it has in hand."""

    def __init__(self, context: ForkServerContext, check: Check, share: Share) -> None:
        """``check`` must be importable by name, as the child looks it up."""
        self.case: Case | None = None
        self.deadline: float | None = None
        self._context: ForkServerContext | SpawnContext = context
        self._check, self._share, self._apart = check, share, False
        self._child: _Child | None = None
        self._timeout: float | None = None
        self._began: float | None = None

    def run(self, case: Case, timeout: float | None) -> CaseReport:
        """The report of one case, whatever becomes of the child.

        ``timeout`` is in seconds, None for no limit.
        """
        self.hand(case, timeout)
        report = None
        while report is None:
            limit = None if self.deadline is None else max(0.0, self.deadline - monotonic())
            report = self.attend(wait(self.handles, limit))
        return report

    def hand(self, case: Case, timeout: float | None) -> None:
        """Give the child a case, and the place a child where there is none."""
        self.case, self._timeout, self._began = case, timeout, None
        self.deadline = monotonic() + _STARTING_SECONDS
        if self._child is None or not self._child.send(case, timeout):
            self.end()
            self._child = _Child(self._context, self._check, replace(self._share, mps=not self._apart))
            self._child.send(case, timeout)  # where it is gone already, its sentinel says so

    @property
    def handles(self) -> list[Any]:
        """What to wait for while there is a case in hand."""
        return self._child.handles if self._child else []

    def attend(self, ready: Collection[Any]) -> CaseReport | None:
        """Deal with what is ready, or with time that is up; the report, where that ends the case."""
        child, case = self._child, self.case
        assert child is not None and case is not None
        child.drain()
        if child.messages in ready or (child.process.sentinel in ready and child.messages.poll()):
            try:
                message = json.loads(child.messages.recv_bytes())
            except (EOFError, OSError):
                return self._lost(case, child)
            if message == _CANNOT:
                self._context = afresh()
                self.end()
                self.hand(case, self._timeout)
                return None
            if message is not None:
                if message["spent"]:
                    self.end()
                return self._done(_received(message, case))
            self._began = monotonic()
            self.deadline = None if self._timeout is None else self._began + self._timeout
        elif child.process.sentinel in ready:
            return self._lost(case, child)
        elif self.deadline is not None and monotonic() >= self.deadline:
            return self._too_long(case, child)
        return None

    def end(self) -> None:
        """Kill the child, if there is one."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _lost(self, case: Case, child: _Child) -> CaseReport | None:
        child.process.join(1)  # its exit code comes a moment after its pipes have closed
        reason = how_it_ended(child.process.exitcode, "the worker")
        if self._began is None:
            reason += ", before the case began"
        self.end()
        return self._fault(case, reason, child)

    def _too_long(self, case: Case, child: _Child) -> CaseReport | None:
        if self._began is None:
            reason = f"no worker came up within {_STARTING_SECONDS:g} s"
        else:
            reason = f"timed out after {self._timeout:g} s"
            child.await_stack()
        self.end()
        return self._fault(case, reason, child)

    def _fault(self, case: Case, reason: str, child: _Child) -> CaseReport | None:
        log = recent_last(child.log.decode(errors="replace"))
        seconds = 0.0 if self._began is None else monotonic() - self._began
        return self._done(CaseReport(case, Outcome.ERROR, seconds, reason=reason, log=log))

    def _done(self, report: CaseReport) -> CaseReport | None:
        """None where the case is run once more, apart from others: what ended it may have been another's."""
        again = (
            report.outcome is Outcome.ERROR and report.case.device != "cpu" and not self._apart and has_mps()
        )
        if again or self._apart:
            self.end()
        self._apart = again
        if again:
            self.hand(report.case, self._timeout)
            return None
        self.case = self.deadline = None
        return report


class _Child:
    """One process, and the pipes to and from it."""

    def __init__(self, context: ForkServerContext | SpawnContext, check: Check, share: Share) -> None:
        self.messages, theirs = context.Pipe()
        self.output, their_output = context.Pipe(duplex=False)
        work = _work if context.get_start_method() == "forkserver" else _work_afresh
        self.process: BaseProcess = context.Process(target=work, args=(theirs, their_output, check, share))
        self.process.start()
        theirs.close()
        their_output.close()
        os.set_blocking(self.output.fileno(), False)
        self.log = b""
        self._silent = False

    @property
    def handles(self) -> list[Any]:
        return [self.messages, self.process.sentinel, *([] if self._silent else [self.output])]

    def send(self, case: Case, timeout: float | None) -> bool:
        """Whether the child was there to take it. What it printed before is none of the case's."""
        self.drain()
        self.log = b""
        try:
            self.messages.send((case, timeout))
        except OSError:
            return False
        return True

    def drain(self) -> bool:
        """Take what was written to the child's standard output and error; only the end is kept."""
        found = False
        while not self._silent:
            try:
                chunk = os.read(self.output.fileno(), _LOG_BYTES)
            except BlockingIOError:
                break
            self._silent = not chunk
            found = found or bool(chunk)
            self.log = (self.log + chunk)[-_LOG_BYTES:]
        return found

    def await_stack(self) -> None:
        """Wait until the child has written where it stands, but not long."""
        end = monotonic() + _STACK_SECONDS
        while not self._silent and (left := end - monotonic()) > 0:
            wait([self.output], _QUIET_SECONDS if has_stack(self.log) else left)
            if not self.drain() and has_stack(self.log):
                return

    def end(self) -> None:
        """Kill the process if it lives, and close what led to it."""
        self.process.kill()
        self.process.join()
        self.drain()
        self.process.close()
        self.messages.close()
        self.output.close()


def _received(message: dict[str, Any], case: Case) -> CaseReport:
    known = {entry[0]: StandInReport(*entry) for entry in message["stand_ins"]}
    return replace(result_from_json(message["result"], known), case=case)


# ---- the child's side ----


def _work_afresh(messages: Connection, output: Connection, check: Check, share: Share) -> None:
    """``_work`` in a process that nothing is imported in yet, nor done of what a fork server does."""
    os.environ.update(share.environment)  # before what is imported looks for GPUs
    for name in (SERVER, *PRELOAD):
        import_module(name)
    _work(messages, output, check, share, forked=False)


def _work(messages: Connection, output: Connection, check: Check, share: Share, forked: bool = True) -> None:
    """Take cases until the parent closes the pipe; what this process prints goes to ``output``."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    faulthandler.enable(output.fileno())  # a descriptor that no case knows of
    # Locks of this process are then its own, and have no name that is left behind when it is killed.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(share.environment)
    pin_threads(share.threads)
    first = 0
    for case, timeout in _received_cases(messages):
        if case.device == "cpu":  # CUDA's driver takes host memory as it likes
            # Few cases need much: one may have more than its share where the others leave it.
            limit_memory(max(share.host_bytes, host.free_memory()))
        if forked and not can_fork_for(case.device):
            messages.send_bytes(json.dumps(_CANNOT).encode())
            return
        if "modelopt" in sys.modules:
            load_extensions(case)
        messages.send_bytes(b"null")
        will_end_in(timeout)
        if timeout is not None:
            faulthandler.dump_traceback_later(timeout, file=output.fileno())
        report = safely(check, case)
        faulthandler.cancel_dump_traceback_later()
        # As JSON: a record may hold a value of torch's, and the parent has no torch.
        stood_in = [(r.target, r.replacement, r.reason) for r in stand_ins([report])]
        answer: dict[str, Any] = {"result": result_to_json(report), "stand_ins": stood_in}
        del report
        size = give_back_memory()
        first = first or size
        grown = size > first + _MOST_GROWTH[case.device.partition(":")[0]]
        answer["spent"] = grown or gpu_fault() is not None
        messages.send_bytes(json.dumps(answer).encode())


def _received_cases(messages: Connection) -> Iterator[tuple[Case, float | None]]:
    while True:
        try:
            yield messages.recv()
        except EOFError:
            return


def limit_memory(size: int) -> None:
    """Let this process have ``size`` bytes of data more than it has; the next ones raise in the case.

    The limit is of private writable memory, which torch allocates and Python too, not of address space,
    of which libraries reserve much that they never use.
    """
    limit = pages(5) + size
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def safely(check: Check, case: Case) -> CaseReport:
    """The report of a case, also where it could not be checked at all, or not with the memory there is."""
    try:
        return check(case)
    except UsageError as error:
        return CaseReport(case, Outcome.ERROR, 0.0, reason=str(error))
    except Exception as error:
        return CaseReport(case, Outcome.ERROR, 0.0, reason=reason_of(error), log=traceback.format_exc())
