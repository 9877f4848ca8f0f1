from __future__ import annotations

import subprocess
import sys

import pytest

# What stays resident of 256 MiB that were used and freed: kept, and then given back.
RUN = """
import ctypes, sys
from harness.heap import give_back_memory, keep_freed_memory, resident_bytes

libc, size = ctypes.CDLL(None), 8 << 20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
if "keep" in sys.argv:
    keep_freed_memory()
before = resident_bytes()
blocks = [libc.malloc(size) for _ in range(32)]
for block in blocks:
    libc.memset(block, 1, size)
for block in blocks:
    libc.free(block)
print(resident_bytes() - before >> 20, give_back_memory() - before >> 20)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_freed_is_kept_until_it_is_given_back(keep: bool) -> None:
    command = [sys.executable, "-c", RUN, *["keep"] * keep]
    kept, left = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert kept >= 250 if keep else kept < 50
    assert left < 50
