"""Stacks: what Python's faulthandler dumps of a process that crashed or hangs -> text read from its end.

A log is shown by its last lines. faulthandler writes the innermost frame first, and after a crash the names
of every extension module; turned round, the last lines are where it happened.
"""

from __future__ import annotations

import re
from itertools import groupby

_HEAD = "(most recent call first):"
_FRAME = re.compile(r'  File ".*", line (\d+|\?\?\?) in ')
# At exit glibc and faulthandler say what is of no use to a reader: hundreds of module names.
_MODULES = "Extension modules: "


def recent_last(log: str) -> str:
    """The log with the frames of each dumped stack in a traceback's order, the innermost one last."""
    lines: list[str] = []
    kept = [line for line in log.splitlines(keepends=True) if not line.startswith(_MODULES)]
    for is_frame, group in groupby(kept, key=lambda line: bool(_FRAME.match(line))):
        block = list(group)
        lines += reversed(block) if is_frame else block
    return "".join(lines).replace(_HEAD, "(most recent call last):")


def has_stack(log: bytes) -> bool:
    """Whether a stack was dumped into the log."""
    return _HEAD.encode() in log
