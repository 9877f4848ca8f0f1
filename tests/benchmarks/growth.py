"""Growth of memory over many cases: ``python tests/benchmarks/growth.py [CASES] [JOBS] [PRESET...]``.

Runs so many cases (300 unless given) of the default recipes over the presets (all of them unless named)
again and again on the CPU, over JOBS workers (2 unless given). Prints what is resident between cases in each
process, of every 20 cases, and how much of it is growth since the first 20, where it lives throughout. It is
the least that was seen when any case was done: a worker may be in the middle of one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

from harness.case import CaseReport
from harness.layout import Layout
from harness.preset import find
from harness.runner import run_cases
from harness.selection import cases_of, checks_named, default_tree

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Growth:
    """MiB resident, and threads, of this process and those below it, by process id."""

    every: int
    outcomes: list[str] = field(default_factory=list)
    _seen: list[dict[int, int]] = field(default_factory=list)
    resident: list[dict[int, int]] = field(default_factory=list)
    threads: list[dict[int, int]] = field(default_factory=list)

    def note(self, report: CaseReport) -> None:
        self.outcomes.append(str(report.outcome))
        found = [os.getpid(), *below(os.getpid())]
        self._seen.append({pid: value for pid in found if (value := _status(pid, "VmRSS") // 1024)})
        if len(self.outcomes) % self.every == 0:
            least = {
                pid: min(seen.get(pid, size) for seen in self._seen) for pid, size in self._seen[-1].items()
            }
            self.resident.append(least)
            self._seen.clear()
            self.threads.append({pid: value for pid in found if (value := _status(pid, "Threads"))})

    @property
    def ratios(self) -> dict[int, float]:
        """What is resident at the end by what was after the first cases, of each process there throughout."""
        first, *_, last = self.resident
        return {pid: last[pid] / first[pid] for pid in first if pid in last}


def below(pid: int) -> list[int]:
    """The processes that ``pid`` started, and those they did."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _status(int(entry.name), "PPid") == pid:
            found += [int(entry.name), *below(int(entry.name))]
    return found


def _status(pid: int, name: str) -> int:
    """A number of a process' status; 0 where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(lines[name].split()[0]) if name in lines else 0


def growth(
    count: int,
    jobs: int,
    presets: Sequence[str] = (),
    every: int = 20,
    show: Callable[[Growth], None] = lambda growth: None,
    recipes: Sequence[str] = (),
) -> Growth:
    """Run ``count`` cases and note the memory after ``every`` so many; ``show`` is called with each note."""
    files = find(presets, default_tree()).files
    cases = cases_of(files, checks_named(recipes), [Layout()], "cpu", None)
    noted = Growth(every)

    def on_done(report: CaseReport) -> None:
        noted.note(report)
        if len(noted.outcomes) % every == 0:
            show(noted)

    run_cases(list(islice(cycle(cases), count)), jobs, 1800.0, on_done)
    return noted


def main(words: Sequence[str]) -> None:
    count, jobs = (int(words[0]) if words else 300), (int(words[1]) if len(words) > 1 else 2)
    noted = growth(count, jobs, words[2:], show=_show)
    print("outcomes:", {name: noted.outcomes.count(name) for name in sorted(set(noted.outcomes))})
    print("end / first 20:", {pid: f"{ratio:.3f}" for pid, ratio in noted.ratios.items()})
    print(
        "processes that were replaced or replacements:",
        sorted(set(noted.resident[-1]) ^ set(noted.resident[0])),
    )


def _show(noted: Growth) -> None:
    print(f"{len(noted.outcomes)} cases: MiB", noted.resident[-1], "threads", noted.threads[-1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
