"""Processes: how this program starts others, and how none of them survives it.

Everything comes from one fork server, which has torch, Megatron and ModelOpt imported and is started on
demand; a process forked from it may start a server of its own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

PRELOAD = ("harness.preload",)

_PR_SET_PDEATHSIG = 1


def fork_server(preload: Sequence[str] = PRELOAD) -> ForkServerContext:
    """The context whose processes are forked from a server with ``preload`` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.fork_server", *preload])
    return context


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it is gone (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def pin_threads(threads: int) -> None:
    """Have this process compute on ``threads`` threads, also what torch has not started yet."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def how_it_ended(code: int | None, what: str) -> str:
    """What a process' exit code says; None where it still ran."""
    if code is None:
        return f"{what} closed its pipe and had to be killed"
    if code >= 0:
        return f"{what} exited with code {code}"
    name = signal.Signals(-code).name
    hint = ", as happens when memory runs out" if name == "SIGKILL" else ""
    return f"{what} was killed by {name}{hint}"
