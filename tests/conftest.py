"""Hypothesis for machines that are busy: a slow draw is no failure. And no threads of worlds long closed, no
models of tests long over, and nothing on the page of a run on GitHub."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from harness.heap import give_back_memory, keep_freed_memory, resident_bytes

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
keep_freed_memory()  # as where cases run

# Of one world that is open.
_MANY_THREADS = 100
# More than what is imported, and the two largest tiny models.
_MUCH_MEMORY = 6 << 30


@pytest.fixture(autouse=True)
def _no_step_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test checks or has checked is none of the results of the run that GitHub shows."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture(autouse=True)
def _no_models_left() -> Iterator[None]:
    """A model that a test still holds when its world closes keeps the threads of gloo's groups alive.

    They go with the model, which goes with a full collection; by itself that comes after thousands of them.
    """
    yield
    tasks = Path("/proc/self/task")
    count = len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
    if count > _MANY_THREADS or resident_bytes() > _MUCH_MEMORY:
        gc.collect()
        give_back_memory()
