"""Time of every preset at full size on the meta device: ``python tests/benchmarks/full_size.py [LAYOUT...]``.

Prints, for the last rank of each layout (tp1 unless given), the seconds of processor time to build Megatron's
model, the seconds to work out the inventory, and how many parameters both have; two presets at a time. A
layout that does not divide a preset is printed with what is at fault. Exits with 1 where any differs.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter, process_time

sys.path.insert(0, str(Path(__file__).parent.parent))

from full_size import PRESETS, megatron_parameters
from published import of_preset

from harness.layout import Layout
from harness.layout_rules import Owner, broken_limits
from harness.rank import rank_of
from harness.sharding import rank_parameters


def line(index: int, text: str) -> str:
    full, layout = of_preset(PRESETS[index]), Layout.parse(text)
    for limit in broken_limits(full, layout):
        if limit.owner is Owner.MEGATRON:
            return limit.message
    last = layout.world_size - 1
    start = process_time()
    expected = rank_parameters(full, layout, rank_of(layout, last))
    arithmetic, start = process_time() - start, process_time()
    actual = megatron_parameters(full, layout, last)
    same = "equal" if expected == actual else "DIFFERENT"
    return f"{process_time() - start:7.2f} s  {arithmetic:6.3f} s  {len(actual):6} parameters  {same}"


def main() -> None:
    different = False
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["full_size"])
    for text in sys.argv[1:] or ["tp1"]:
        start = perf_counter()
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            lines = pool.map(line, range(len(PRESETS)), [text] * len(PRESETS))
            for file, shown in zip(PRESETS, lines, strict=True):
                print(f"{text:12} {file.name:45} {shown}", flush=True)
                different |= shown.endswith("DIFFERENT")
        print(f"{text:12} {perf_counter() - start:6.1f} s of clock, imports and all")
    sys.exit(different)


if __name__ == "__main__":
    main()
