"""Host: the cores and the free memory that this process may use, in a container the container's.

A container is a control group with limits; the machine around it may have many times as much.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class _Names:
    """What a version of control groups calls its files: limits, use, and the cache that can be given back."""

    controllers: tuple[str, str]
    limit: str
    used: str
    cache: str


# https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html
_V2 = _Names(("", ""), "memory.max", "memory.current", "inactive_file")
_V1 = _Names(("memory", "cpu"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy: its affinity, and the quota of its container; one at least."""
    quotas = [quota for folder in _folders(root, 1) if (quota := _cpu_quota(folder)) is not None]
    return max(1, int(min([len(os.sched_getaffinity(0)), *quotas])))


def free_memory(root: Path = ROOT) -> int:
    """Bytes that can be had without swapping: the machine's, and no more than the container has left."""
    left = [room for folder in _folders(root, 0) if (room := _memory_left(folder)) is not None]
    return max(0, min([_available(root), *left]))


def _available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _folders(root: Path, which: int) -> Iterator[Path]:
    """The control groups that limit memory (0) or cores (1) of this process: its own and those above it.

    The path that the kernel tells may begin outside the container, where the folder that is mounted is it.
    """
    mount = root / "sys/fs/cgroup"
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = mount
        elif _V1.controllers[which] in controllers.split(","):
            base = mount / _V1.controllers[which]
        else:
            continue
        relative = Path(path.lstrip("/"))
        yield from (base / part for part in (relative, *relative.parents) if (base / part).is_dir())


def _memory_left(folder: Path) -> int | None:
    """Bytes below the limit of one control group, its cache counted as free; None without a limit."""
    for names in (_V2, _V1):
        limit = _text(folder / names.limit)
        if limit is None or limit == "max":
            continue
        used = int(_text(folder / names.used) or 0)
        entries = dict(line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
        return int(limit) - used + int(entries.get(names.cache, 0))
    return None


def _cpu_quota(folder: Path) -> float | None:
    """Cores that one control group may use on average; None without a limit."""
    if both := _text(folder / "cpu.max"):
        quota, period = both.split()
    else:
        quota, period = _text(folder / "cpu.cfs_quota_us") or "-1", _text(folder / "cpu.cfs_period_us") or "1"
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _text(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() else None
