"""Processes: how this program starts others, and how none of them survives it.

Everything comes from one fork server, which has torch, Megatron and ModelOpt imported and is started on
demand; a process forked from it may start a server of its own. Only where a library that was imported there
has initialised CUDA, which a forked process cannot use then, processes that need it are started afresh.
"""

from __future__ import annotations

import ctypes
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

PRELOAD = ("harness.preload",)
SERVER = "harness.fork_server"

_PR_SET_PDEATHSIG = 1


def fork_server(preload: Sequence[str] = PRELOAD) -> ForkServerContext:
    """The context whose processes are forked from a server with ``preload`` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([SERVER, *preload])
    return context


def afresh() -> SpawnContext:
    """The context whose processes are forked from none, and import everything themselves."""
    return multiprocessing.get_context("spawn")


def can_fork_for(device: str) -> bool:
    """Whether processes that are forked from where this one was can use the device."""
    preload = sys.modules.get("harness.preload")
    return device == "cpu" or preload is None or not preload.HAS_CUDA


def hand_over_fork_server() -> dict[str, Any]:
    """Start this process' fork server, and say where it is; plain values for ``join_fork_server``.

    Empty where this version of Python keeps it otherwise than is known here.
    """
    server = _server()
    server.ensure_running()
    names = {"server": "_forkserver_pid", "address": "_forkserver_address", "alive": "_forkserver_alive_fd"}
    place = {key: getattr(server, name, None) for key, name in names.items()}
    return {} if None in place.values() else {**place, "process": os.getpid()}


def join_fork_server(place: Mapping[str, Any]) -> bool:
    """Fork from the server of another process, which lives; whether that could be.

    Otherwise this process starts one of its own when it needs it. The server lives as long as any process
    holds the pipe by which it knows that it is needed.
    """
    server = _server()
    try:
        alive = os.open(f"/proc/{place['process']}/fd/{place['alive']}", os.O_WRONLY)
    except (OSError, KeyError):
        return False
    server._forkserver_address, server._forkserver_alive_fd = place["address"], alive
    start = server.ensure_running

    def ensure_running() -> None:
        """As the server's own, which waits for a child of this process, and this one is another's."""
        if not _lives(place["server"]):
            server._forkserver_address = server._forkserver_alive_fd = None
            server.ensure_running = start
            os.close(alive)
            start()

    server.ensure_running = ensure_running
    return True


def _server() -> Any:
    """The fork server of the module, whose methods are what the module exports."""
    return multiprocessing.forkserver._forkserver


def _lives(pid: int) -> bool:
    """Whether a process is there that has not ended; it need not be a child of this one."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it is gone (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


_end: float | None = None  # by the monotonic clock


def will_end_in(seconds: float | None) -> None:
    """Note that this process is ended in so many seconds if it is not done; None for never."""
    global _end
    _end = None if seconds is None else monotonic() + seconds


def seconds_left() -> float | None:
    """Seconds until this process is ended if it is not done, None where it is not."""
    return None if _end is None else max(0.0, _end - monotonic())


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
