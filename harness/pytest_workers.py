"""pytest workers: which process a case of pytest runs in.

Usually a child of the process that pytest, or a worker of xdist, is; all of them are forked from one server,
which the controller of xdist starts. For a debugger it is pytest's own process.
"""

from __future__ import annotations

import faulthandler
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.case import Case, CaseReport, Outcome
from harness.devices import Share
from harness.extensions import load_extensions
from harness.processes import PRELOAD, fork_server, hand_over_fork_server, join_fork_server
from harness.worker import Check, Worker, safely

if TYPE_CHECKING:
    from types import FrameType

# How long a worker that hangs in C code, where no signal handler runs, may outlive its time limit.
_GRACE_SECONDS = 30.0


# ---- in a child process ----


def server_for_others() -> dict[str, Any]:
    """Start the fork server, which is then importing while tests are collected; where it is."""
    fork_server(PRELOAD)
    return hand_over_fork_server()


def worker_in(share: Share, check: Check, server: Mapping[str, Any] | None = None) -> Worker:
    """The place for the child process in which this process' cases run, forked from ``server``.

    Where there is none, or it cannot be reached, this process starts one.
    """
    if server:
        join_fork_server(server)
    return Worker(fork_server(PRELOAD), check, share)


# ---- in this process ----


class _TimedOut(BaseException):
    """Not an Exception, so that no stage takes it for Megatron's."""


def run_here(check: Check, case: Case, seconds: float, replaceable: bool) -> CaseReport:
    """The report of a case in this process, where a debugger sees it; a crash is the end of it.

    A hang in C code outlasts the time limit, but in a process that is ``replaceable``.
    """
    try:
        # Warnings are errors to our own tests, and none of a preset's business.
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            load_extensions(case)
            with _time_limit(seconds, replaceable):
                return safely(check, case)
    except _TimedOut:
        return CaseReport(case, Outcome.ERROR, seconds, reason=f"timed out after {seconds:g} s")


@contextmanager
def _time_limit(seconds: float, replaceable: bool) -> Iterator[None]:
    """Raise _TimedOut after ``seconds``, and end a ``replaceable`` process that does not even notice."""
    if not seconds:
        yield
        return
    previous = signal.signal(signal.SIGALRM, _time_out)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if replaceable:
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if replaceable:
            faulthandler.cancel_dump_traceback_later()


def _time_out(signum: int, frame: FrameType | None) -> None:
    raise _TimedOut
