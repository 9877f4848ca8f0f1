"""Sessions of processes, as tests start them: what lives in one, until nothing does."""

from __future__ import annotations

import time
from pathlib import Path


def session(leader: int) -> list[str]:
    """The command lines of the processes of a session that live."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if entry.name.isdigit() and int(sid) == leader and state != "Z":
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def wait_until_empty(leader: int) -> list[str]:
    deadline = time.monotonic() + 10
    while (left := session(leader)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
