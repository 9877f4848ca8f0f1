"""Cost of a case against the bare work in it: ``python tests/benchmarks/cost.py [RUNS] [RECIPE...]``.

Bare work is opening the process groups that Megatron needs, building the same small model, a forward
pass, ``mtq.quantize`` over the same calibration tokens and a forward pass; a case also reads, audits,
shrinks, checks and reports. Both in processor time of this process and its threads, the median of RUNS (3
unless given) after one that warms up. They run in turns, and the ratio is the median of each turn's: what
slows a turn, a busy machine or a heap in pieces, slows both. One dense, one MoE and one hybrid preset; every
recipe of the default set unless some are named, or ``all``. A case that does not pass has no cost: its
outcome is printed instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import process_time

import torch

from harness.architecture import Architecture
from harness.build import build_model
from harness.calibration import Calibration
from harness.case import Case, CaseReport, Outcome
from harness.heap import keep_freed_memory
from harness.layout import Layout
from harness.pipeline import check, full_size
from harness.preset import find_presets
from harness.quantize import without_folders
from harness.recipes import Recipe
from harness.routing import forward_and_routes
from harness.selection import recipes_named
from harness.shrink import shrink
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import BATCH_SIZE, forward
from harness.world import open_world

import modelopt.torch.quantization as mtq  # isort: skip

ROOT = Path(__file__).parent.parent.parent
PRESETS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "nvidia/Nemotron-H-8B-Base-8K")
MOST = 1.2
CPU, ONE = torch.device("cpu"), Layout()


def bare(small: Architecture, recipe: Recipe, tokens: torch.Tensor) -> None:
    """What anyone would run to try a recipe on a model. Call it where stand-ins are installed."""
    with captured(), open_world(ONE, CPU):
        _try(small, recipe, tokens)


def _try(small: Architecture, recipe: Recipe, tokens: torch.Tensor) -> None:
    """The model goes at the end of this function: whoever tries many pays for that, too."""
    model = build_model(small, ONE, CPU, 1234)
    first = tokens[:BATCH_SIZE]
    forward(model, first)
    mtq.quantize(model, without_folders(recipe.to_config()), lambda model: forward(model, tokens))
    forward(model, first)


def seconds(work: Callable[[], object]) -> float:
    start = process_time()
    work()
    return process_time() - start


Turn = tuple[float, float]  # of bare work and of a case, seconds of processor time


def measure(case: Case, small: Architecture, recipe: Recipe, runs: int) -> tuple[list[Turn], CaseReport]:
    """Every turn but the one that warms up, and the last report; no turns where the case does not pass."""
    turns: list[Turn] = []
    reports: list[CaseReport] = []
    with captured(), installed(CPU, small), open_world(ONE, CPU):
        model = build_model(small, ONE, CPU, 1234)
        calibration = Calibration(small, CPU)
        calibration.suffice(model, forward_and_routes(model, calibration.first))
        tokens = calibration.tokens
    for _ in range(runs + 1):
        whole = seconds(lambda: reports.append(check(case)))
        if reports[-1].outcome is not Outcome.PASSED:
            return [], reports[-1]
        with installed(CPU, small):
            turns.append((seconds(lambda: bare(small, recipe, tokens)), whole))
    return turns[1:], reports[-1]


def main(arguments: Sequence[str]) -> None:
    runs = int(arguments[0]) if arguments and arguments[0].isdecimal() else 3
    recipes = recipes_named([each for each in arguments if not each.isdecimal()])
    worst: list[float] = []
    keep_freed_memory()  # as where cases run
    print(f"{'preset':32} {'recipe':34} {'bare s':>7} {'case s':>7} {'ratio':>6}")
    for file in find_presets(PRESETS, ROOT / "presets"):
        full = full_size(file)
        assert full is not None
        small = shrink(full, ONE).after
        for recipe in recipes:
            case = Case(file.name, str(file.path), recipe.name, ONE, "cpu")
            turns, report = measure(case, small, recipe, runs)
            said = f"{report.outcome}: {report.reason[:60]}"
            if turns:
                least, whole = (median(each) for each in zip(*turns, strict=True))
                worst.append(median(of_case / of_bare for of_bare, of_case in turns))
                said = f"{least:7.2f} {whole:7.2f} {worst[-1]:6.2f}"
            print(f"{file.name:32} {recipe.name:34} {said}", flush=True)
    if worst:
        over = sum(ratio > MOST for ratio in worst)
        print(f"median {median(worst):.2f}, worst {max(worst):.2f}; {over} of {len(worst)} above {MOST}")


if __name__ == "__main__":
    main(sys.argv[1:])
