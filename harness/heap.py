"""Heap: what malloc keeps of freed memory, and when the system gets it back.

Of glibc's malloc; under another one nothing here does anything.
"""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

# https://man7.org/linux/man-pages/man3/mallopt.3.html
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have malloc keep what this process frees until ``give_back_memory``, and those forked from it.

    It otherwise maps a tensor of some MiB by itself and unmaps it when it goes, and the next one waits for
    the kernel to clear its pages: up to two thirds of a case's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def give_back_memory() -> int:
    """Return to the system what malloc keeps of a case for the next; the bytes that are then resident.

    A model of many small parts leaves malloc a heap of a gigabyte with little in use. This takes some
    hundredths of a second after a large model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return resident_bytes()


def resident_bytes() -> int:
    """What this process has in memory."""
    return pages(1)


def pages(field: int) -> int:
    """A field of this process' statm (1 is what is resident, 5 data and stack), in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[field]) * resource.getpagesize()
