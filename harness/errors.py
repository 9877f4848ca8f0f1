"""The exception tree. A wrong preset is a Finding, never one of these.

HarnessError
  UsageError            the command line asks for something that cannot be: exit code 2
    UnknownPreset       no preset of that name, or more than one
    UnknownRecipe
    UnknownLayout
    DeviceUnavailable
  UnsupportedModel      a kind of model that the harness cannot build yet: a finding on its flag
  RankLost              the process of one rank of a case died or hangs: the case is an error
  ReportError           a report file cannot be read or written: exit code 2

Interrupted             SIGINT or SIGTERM: exit code 130 or 143
"""

from __future__ import annotations

import errno
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.case import CaseReport


class HarnessError(Exception):
    """Base of everything that the harness raises on purpose."""


class UsageError(HarnessError):
    """The caller asked for something that cannot be done."""


class UnknownPreset(UsageError):
    """No preset has that name, or several do."""


class UnknownRecipe(UsageError):
    """No recipe has that name."""


class UnknownLayout(UsageError):
    """A layout that cannot be read or cannot exist."""


class DeviceUnavailable(UsageError):
    """The device asked for is not on this machine."""


class UnsupportedModel(HarnessError):
    """A kind of model that the harness cannot build yet; ``dest`` is the argument that asks for it."""

    def __init__(self, message: str, dest: str) -> None:
        super().__init__(message)
        self.dest = dest


class RankLost(HarnessError):
    """The process of one rank died or hangs, or the harness failed in it; ``log`` is what there is of it."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class ReportError(HarnessError):
    """A report that cannot be read or written."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; no ``except Exception`` on the way may keep it.

    ``reports`` are of the cases of the run that it ended, where there were any.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum
        self.reports: tuple[CaseReport, ...] = ()


# The words of torch's allocators and of CUDA's libraries where there is no memory, in a RuntimeError.
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that this machine has no more memory, which is no fault of a preset."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


# CUDA's own: with 1 each call waits for the GPU, so that a fault comes out of the call that caused it.
BLOCKING = "CUDA_LAUNCH_BLOCKING"


def gpu_fault() -> RuntimeError | None:
    """What is wrong with this process' CUDA context since a fault on the GPU; None while it is of use.

    A fault is told by whatever call comes next, in the words of that call; this one's are CUDA's own.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as fault:
        return fault
    return None


def is_no_verdict(error: BaseException) -> bool:
    """Whether what was raised says nothing of a preset: no memory, or a fault on the GPU, after which every
    call raises. Whoever takes an exception of Megatron's or ModelOpt's for a result lets these through.
    """
    return out_of_memory(error) or gpu_fault() is not None


def reason_of(error: Exception) -> str:
    """Why a case has no verdict, when this came out of it: no memory, a GPU, or the harness' own fault."""
    if out_of_memory(error):
        why = "out of memory"
    elif (fault := gpu_fault()) is not None:
        return f"a fault on the GPU: {type(fault).__name__}: {fault}".splitlines()[0]
    else:
        why = "the harness failed"
    return f"{why}: {type(error).__name__}: {error}".removesuffix(": ")
