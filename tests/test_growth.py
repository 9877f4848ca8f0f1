"""Many cases in one run: no process that lives throughout grows."""

from __future__ import annotations

import os

from benchmarks.growth import growth

SMALL = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "meta-llama/Llama-3.2-1B-Instruct")
# ``tests/benchmarks/growth.py`` runs 300 over the whole catalogue.
CASES, FIRST = 48, 12


def test_no_process_that_lives_throughout_grows() -> None:
    noted = growth(CASES, 1, SMALL, every=FIRST, recipes=["fp8,nvfp4"])
    assert noted.outcomes == ["passed"] * CASES
    ratios = noted.ratios
    assert os.getpid() in ratios
    # The worker has torch, and the fork server if an earlier test started none without it.
    assert sum(noted.resident[-1][pid] > 300 for pid in ratios) in (1, 2), noted.resident
    assert all(ratio <= 1.05 for ratio in ratios.values()), (noted.resident, noted.threads)
    for pid in ratios:  # gloo's threads among them
        assert noted.threads[-1][pid] <= noted.threads[0][pid], noted.threads
