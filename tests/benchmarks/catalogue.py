"""Wall time and memory of the whole catalogue: ``python tests/benchmarks/catalogue.py [RUNS]``.

Prints medians over RUNS runs (3 unless given) of ``harness check`` on the CPU at one and at two workers, the
ratio of the two, the largest resident size of any process, and the time of the commands that need no torch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

ROOT = Path(__file__).parent.parent.parent


def seconds(*arguments: str) -> float:
    start = perf_counter()
    subprocess.run(_command(*arguments), cwd=ROOT, check=True, capture_output=True)
    return perf_counter() - start


def peak_bytes(*arguments: str) -> int:
    """Largest resident size that any process of one run reached."""
    process = subprocess.Popen(
        _command(*arguments),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, *_resident(process.pid))
        sleep(0.2)
    return peak


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "harness", *arguments]


def _resident(session: int) -> list[int]:
    sizes = [0]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            status = (folder / "status").read_text()
        except OSError:
            continue  # it ended while we looked
        if int(fields[3]) == session and "VmHWM:" in status:
            sizes.append(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
    return sizes


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for command in (["list"], ["lint"], ["show", "Qwen3-235B-A22B"]):
        print(f"{' '.join(command):24} {median(seconds(*command) for _ in range(runs)):6.2f} s")
    times = {}
    for jobs in ("1", "2"):
        times[jobs] = median(seconds("check", "--device", "cpu", "--jobs", jobs) for _ in range(runs))
        print(f"check --jobs {jobs:11} {times[jobs]:6.1f} s")
    print(f"1 worker / 2 workers     {times['1'] / times['2']:6.2f}")
    peak = peak_bytes("check", "--device", "cpu", "--recipe", "all", "--jobs", "2")
    print(f"largest process          {peak / 2**30:6.2f} GiB, every recipe")


if __name__ == "__main__":
    main()
