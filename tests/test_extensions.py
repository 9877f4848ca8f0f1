"""ModelOpt's extensions: which a recipe needs, when they are compiled, and what a killed build leaves."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import devices, extensions, pytest_workers
from harness.case import PARITY, Case, CaseReport, Outcome
from harness.extensions import alone, is_open, load_extensions, needed
from harness.gpus import visible_gpus
from harness.layout import Layout
from harness.recipes import find_recipe
from harness.standins.output import import_foreign

ROOT = Path(__file__).parent.parent
CASE = Case("Org/a", "a.sh", "fp8", Layout(), "cuda:0")


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("fp8", "cuda_ext_fp8"),
        ("fp8_2d_blockwise_weight_only", "cuda_ext_fp8"),
        ("int8", "cuda_ext"),
        ("int4_awq", "cuda_ext"),
        ("w4a8_awq_beta", "cuda_ext cuda_ext_fp8"),
        ("mxfp8", "cuda_ext_mx"),
        ("mxint8", "cuda_ext_mx"),
        ("nvfp4", ""),
        ("nvfp4_awq_lite", ""),
        ("nvfp4+fp8_kv", "cuda_ext_fp8"),
    ],
)
def test_what_a_recipe_needs(recipe: str, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_has_nvfp4_kernel", lambda: True)
    assert needed(find_recipe(recipe)) == tuple(names.split())


def test_without_its_kernel_nvfp4_needs_an_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_has_nvfp4_kernel", lambda: False)
    assert needed(find_recipe("nvfp4")) == ("cuda_ext_mx",)


# ---- when ----


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Which of ModelOpt's extensions were asked for; none of them can be had."""
    import_foreign()
    from modelopt.torch.quantization import extensions as theirs

    names: list[str] = []

    def get(name: str) -> Any:
        def get(raise_if_failed: bool = False) -> None:
            print("Loading extension")
            names.append(name)
            raise RuntimeError("no compiler")

        return get

    for name in ("cuda_ext", "cuda_ext_fp8", "cuda_ext_mx"):
        monkeypatch.setattr(theirs, f"get_{name}", get(name))
    monkeypatch.setattr(devices, "torch_device", lambda name: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    extensions._load.cache_clear()
    return names


def test_what_cannot_be_had_is_left_to_the_case(asked: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    load_extensions(CASE)
    load_extensions(replace(CASE, recipe="w4a8_awq_beta"))  # the first once more, and another
    assert asked == ["cuda_ext_fp8", "cuda_ext"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"recipe": PARITY}, {"recipe": "no such recipe"}])
def test_what_needs_none_asks_for_none(asked: list[str], change: dict[str, str]) -> None:
    load_extensions(replace(CASE, **change))
    assert asked == []


def test_it_is_no_time_of_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest_workers, "load_extensions", lambda case: time.sleep(0.6))

    def check(case: Case) -> CaseReport:
        return CaseReport(case, Outcome.PASSED, 0.0)

    assert pytest_workers.run_here(check, CASE, 0.4, replaceable=False).outcome is Outcome.PASSED


SLOW = """
import time, types
from harness import worker
from harness.case import Case, CaseReport, Outcome
from harness.devices import Share
from harness.layout import Layout
from harness.runner import run_cases

worker.load_extensions = lambda case: time.sleep(1.5)

def check(case):
    if case.preset == "slow":
        time.sleep(30)
    return CaseReport(case, Outcome.PASSED, 0.0)

if __name__ == "__main__":
    cases = [Case(preset, "a.sh", "fp8", Layout(), "cuda:0") for preset in ("a", "slow")]
    for report in run_cases(cases, [Share(1, 1 << 30)], 1.0, check=check, preload=("modelopt",)):
        print(report.outcome, report.reason)
"""


def test_it_is_no_time_of_a_workers_case(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "modelopt.py").write_text("")  # what a worker that has everything imported has, too
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(tmp_path / "slow.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["passed ", "error timed out after 1 s"]


# ---- what a build that was killed leaves ----

HOLD = (
    "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(600)"
)


@contextmanager
def holding(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds torch's lock, as one that compiles does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holding(lock):
        assert is_open(lock)
        with alone(tmp_path):
            assert lock.exists()
    assert lock.exists() and not is_open(lock)
    with alone(tmp_path):
        assert not lock.exists()


def _enter(folder: Path, times: Any) -> None:
    with alone(folder):
        times.put(time.monotonic())
        time.sleep(0.3)


def test_one_process_at_a_time_is_in_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    times: Any = context.SimpleQueue()
    processes = [context.Process(target=_enter, args=(tmp_path, times)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    first, second = sorted([times.get(), times.get()])
    assert second - first >= 0.3


@pytest.mark.gpu
def test_a_real_extension_is_loaded_before_the_case() -> None:
    if not visible_gpus().gpus:
        pytest.skip("needs a CUDA device; none here")
    code = """
from harness.case import Case
from harness.extensions import load_extensions
from harness.layout import Layout
load_extensions(Case("Org/a", "a.sh", "fp8", Layout(), "cuda:0"))
from modelopt.torch.quantization import extensions
print(extensions.get_cuda_ext_fp8.extension.fake_e4m3fy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fake_e4m3fy" in done.stdout
