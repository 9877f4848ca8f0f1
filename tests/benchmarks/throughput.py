"""Wall time of catalogue x default recipes: ``python tests/benchmarks/throughput.py [NAME...]``.

``harness check`` on the CPU at one and at two workers, without parity: all of it, its start-up (until the
first case began), its cost per case, and the memory of each of its processes. Beside it

- the floor: one process that imports once and then makes only the calls of Megatron and ModelOpt
  (``cost.bare``), without planning, checking or reporting;
- one process per preset and recipe, which is what a script for each comes to: the same calls in a fresh
  process, measured on a sample of cases that are spread over the list, and extrapolated to all.

Planning the small models is in neither. Every preset, unless some are named. Measure on a machine that does
nothing else; the load before the start is printed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from time import perf_counter

ROOT = Path(__file__).parent.parent.parent
SAMPLE = 5
# What the project holds itself to.
BY_WORKERS, OVER_FLOOR, OVER_ALONE = 1.7, 1.3, 15.0
GIB = 1 << 30


# ---- harness check, from outside ----


@dataclass
class Run:
    """One run: seconds in all and until the first case began, seconds of every case, and peaks of memory."""

    jobs: int
    total: float
    start_up: float
    cases: list[float]
    resident: dict[str, int]
    proportional: int

    @property
    def working(self) -> float:
        return self.total - self.start_up


@dataclass
class Memory(threading.Thread):
    """Follows the processes of a session: the largest resident size of each, and of all at one time."""

    session: int
    peaks: dict[int, tuple[str, int]] = field(default_factory=dict)
    proportional: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        while not self.over.wait(2.0):  # looking holds up the process that is looked at
            together = 0
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    together += self._look(folder)
                except (OSError, ValueError):
                    continue  # it ended while we looked
            self.proportional = max(self.proportional, together)

    def _look(self, folder: Path) -> int:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        if int(fields[3]) != self.session:
            return 0
        pid, parent = int(folder.name), int(fields[1])
        status = (folder / "status").read_text()
        if "VmHWM:" not in status:
            return 0
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        self.peaks[pid] = (self._role(pid, parent, (folder / "cmdline").read_text()), peak)
        rollup = (folder / "smaps_rollup").read_text()
        return int(rollup.partition("\nPss:")[2].split()[0]) * 1024

    def _role(self, pid: int, parent: int, command: str) -> str:
        if pid == self.session:
            return "controller"
        if "resource_tracker" in command:
            return "resource tracker"
        return "fork server" if parent == self.session else "worker"

    def by_role(self) -> dict[str, int]:
        found: dict[str, int] = {}
        workers = itertools.count(1)
        for role, peak in sorted(self.peaks.values()):
            found[f"worker {next(workers)}" if role == "worker" else role] = peak
        return found


def measure(names: Sequence[str], jobs: int) -> Run:
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        arguments = ["--recipe", "default", "--device", "cpu", "--jobs", str(jobs), "--json", str(report)]
        start = perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "harness", "check", *names, *arguments],
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        memory = Memory(process.pid)
        memory.start()
        assert process.stderr is not None
        # ``[1/120] passed  Qwen/Qwen3-8B fp8 tp1 cpu  0.9 s`` as it is done.
        first = next(process.stderr)
        start_up = perf_counter() - start - float(first.split()[-2])
        rest = process.stderr.read()
        code, total = process.wait(), perf_counter() - start
        memory.over.set()
        memory.join()
        if code:
            raise SystemExit(f"harness check exited with code {code}:\n{first}{rest}")
        results = json.loads(report.read_text())["results"]
    seconds = [result["seconds"] for result in results]
    return Run(jobs, total, start_up, seconds, memory.by_role(), memory.proportional)


# ---- the bare calls, in a process of their own ----


def bare_main(cases: Sequence[tuple[str, str]]) -> None:
    """Print seconds of imports, of planning (no part of the floor), and of the bare calls of each case."""
    start = perf_counter()
    from cost import CPU, ONE, bare

    from harness.build import build_model
    from harness.calibration import Calibration
    from harness.pipeline import full_size
    from harness.preset import find_presets
    from harness.recipes import find_recipe
    from harness.routing import forward_and_routes
    from harness.shrink import shrink
    from harness.standins import installed
    from harness.standins.output import captured
    from harness.world import open_world

    imports = perf_counter() - start
    planned, tokens, times = {}, {}, []
    for name, recipe in cases:
        if name not in planned:
            (file,) = find_presets([name], ROOT / "presets")
            full = full_size(file)
            assert full is not None
            small = planned[name] = shrink(full, ONE).after
            with captured(), installed(CPU, small), open_world(ONE, CPU):
                model = build_model(small, ONE, CPU, 1234)
                calibration = Calibration(small, CPU)
                calibration.suffice(model, forward_and_routes(model, calibration.first))
                tokens[name] = calibration.tokens
                del model
        small = planned[name]
        with installed(CPU, small):
            begin = perf_counter()
            bare(small, find_recipe(recipe), tokens[name])
            times.append(perf_counter() - begin)
    planning = perf_counter() - start - imports - sum(times)
    print(json.dumps({"imports": imports, "planning": planning, "cases": times}))


def bare_process(cases: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Seconds of a process that makes the bare calls of these cases, without planning; and of the calls."""
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--bare", json.dumps(cases)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    whole, told = perf_counter() - start, json.loads(done.stdout.splitlines()[-1])
    return whole - told["planning"], sum(told["cases"])


# ---- the comparison ----


def main(names: Sequence[str]) -> None:
    from harness.preset import find_presets
    from harness.recipes import DEFAULT_RECIPES

    files = find_presets(list(names), ROOT / "presets")
    cases = [(file.name, recipe) for file in files for recipe in DEFAULT_RECIPES]
    size = f"{len(files)} presets x {len(DEFAULT_RECIPES)} recipes"
    print(f"{size}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    runs = [measure([file.name for file in files], jobs) for jobs in (1, 2)]
    floor, calls = bare_process(cases)
    sample = cases[:: max(1, len(cases) // SAMPLE)][:SAMPLE]
    alone = mean(bare_process([case])[0] for case in sample) * len(cases)
    print(f"\n{'':34} {'total s':>8} {'start-up':>8} {'per case':>8}")
    for run in runs:
        label = f"harness check --jobs {run.jobs}"
        print(f"{label:34} {run.total:8.1f} {run.start_up:8.1f} {run.working / len(cases):8.2f}")
    print(
        f"{'floor: one process, bare calls':34} {floor:8.1f} {floor - calls:8.1f} {calls / len(cases):8.2f}"
    )
    print(f"{f'a process per case, from {len(sample)}':34} {alone:8.1f} {'':8} {alone / len(cases):8.2f}")
    one, two = runs
    print(
        f"\nworkers  {one.working / two.working:6.2f}  of {BY_WORKERS} (1 worker / 2 workers, start-up aside)"
    )
    print(f"floor    {one.total / floor:6.2f}  of {OVER_FLOOR} at the most (1 worker / floor)")
    print(f"alone    {alone / two.total:6.2f}  of {OVER_ALONE} (a process per case / 2 workers)")
    # No harness can be faster than the bare calls over two workers at once.
    most = alone / (floor - calls + calls / 2)
    print(f"         {most:6.2f}  is what the floor, split in two, would reach")
    for run in runs:
        print(f"\nmemory at --jobs {run.jobs}: GiB resident at the most")
        print(f"  {'all, shared once':20} {run.proportional / GIB:6.2f}")
        for role, peak in run.resident.items():
            print(f"  {role:20} {peak / GIB:6.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        bare_main(json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
