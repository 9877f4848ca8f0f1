"""Time of ``harness audit`` over the whole catalogue: ``python tests/benchmarks/audit.py [RUNS]``.

Prints medians over RUNS runs (3 unless given) of layouts tp1, tp2, tp4, tp8 and every recipe: wall time of
the command, and of the arithmetic alone in this process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from harness.audit_table import DEFAULT_LAYOUTS, audit_rows
from harness.blueprint import full_size
from harness.layout import Layout
from harness.preset import discover
from harness.recipes import RECIPES

ROOT = Path(__file__).parent.parent.parent


def command_seconds() -> float:
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "harness", "audit"], cwd=ROOT, capture_output=True, check=False
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr.decode())
    return perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"harness audit            {median(command_seconds() for _ in range(runs)):6.2f} s")
    models = {file.name: full for file in discover(ROOT / "presets") if (full := full_size(file)) is not None}
    layouts = [Layout.parse(text) for text in DEFAULT_LAYOUTS]
    times = []
    for _ in range(runs):
        start = perf_counter()
        rows = audit_rows(models, layouts, RECIPES)
        times.append(perf_counter() - start)
    print(f"the arithmetic alone     {median(times):6.2f} s, {len(rows)} rows of {len(RECIPES)} recipes")


if __name__ == "__main__":
    main()
