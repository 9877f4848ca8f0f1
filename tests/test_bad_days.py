"""Bad days: cases that crash, exit, hang, run out of memory or raise, among good ones, as users run them.

The good ones are checked by a check without torch too, as what matters here is the processes around them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from sessions import session, wait_until_empty

from harness.gpus import visible_gpus
from harness.report import read_report

ROOT = Path(__file__).parent.parent

# What a case does, by the name of its preset; importable as a module by every process of the run.
PLAY = """
import ctypes, mmap, os, sys, time
from pathlib import Path
from harness import host, pipeline, pytest_workers
from harness.case import CaseReport, Outcome

FILE = Path(__file__).with_name("imported")

def hang_in_c():
    ctypes.PyDLL(None).sleep(600)  # with the interpreter locked: no signal handler of Python's runs

def play(case):
    action = case.preset.partition("/")[2].partition("-")[0]
    if action == "segfault":
        ctypes.string_at(0)
    if action == "abort":
        os.abort()
    if action == "exit":
        os._exit(3)
    if action == "quit":
        sys.exit(4)
    if action == "killed":
        os.kill(os.getpid(), 9)
    if action == "hang":
        time.sleep(600)
    if action == "stuck":
        hang_in_c()
    if action == "memory":
        blocks = []
        while True:  # reserved and never touched: only a limit stops it, and nobody else has less
            blocks.append(mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    if action == "raise":
        raise KeyError("x")
    return CaseReport(case, Outcome.PASSED, 0.0)

pipeline.check, pytest_workers.PRELOAD = play, ("preloaded",)
host.free_memory = lambda: 16 << 30  # whatever else this machine does
"""

PRELOADED = """
import os
with open(os.path.join(os.path.dirname(__file__), "imported"), "a") as stream:
    stream.write(f"{os.getpid()}\\n")
"""

CONFTEST = """
import play, sys

def pytest_sessionfinish(session):
    assert "torch" not in sys.modules, "torch was imported"
"""

DRIVER = """
import functools
import play
from harness import cli, runner

if __name__ == "__main__":
    runner.run_cases = functools.partial(runner.run_cases, check=play.play, preload=("preloaded",))
    cli.main()
"""

REASONS = {
    "segfault": "the worker was killed by SIGSEGV",
    "abort": "the worker was killed by SIGABRT",
    "exit": "the worker exited with code 3",
    "quit": "the worker exited with code 4",
    "killed": "the worker was killed by SIGKILL, as happens when memory runs out",
    "hang": "timed out after 2 s",
    "stuck": "timed out after 2 s",
    "memory": "out of memory: OSError: [Errno 12] Cannot allocate memory",
    "raise": "the harness failed: KeyError: 'x'",
}
# Where the log must end: the place in the case.
PLACES = {"segfault": "in play", "abort": "in play", "hang": "in play", "stuck": "in hang_in_c"}
GOOD = [f"good-{number}" for number in range(2 * len(REASONS))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``presets/Org`` with every bad case between two good ones, and what plays them."""
    files = {"play.py": PLAY, "preloaded.py": PRELOADED, "conftest.py": CONFTEST, "drive.py": DRIVER}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    folder = tmp_path / "presets" / "Org"
    folder.mkdir(parents=True)
    for name in [*GOOD, *REASONS]:
        (folder / f"{name}.sh").write_text("MODEL_ARGS=' --num-layers 2'\n")
    return tmp_path


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a process in a session of its own; whatever a failing test leaves of it is ended."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", f"{tree}{os.pathsep}{ROOT}")
    started: list[subprocess.Popen[str]] = []

    def start(*command: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if session(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# nvfp4 needs none of ModelOpt's extensions, of which the first case on a machine waits for the compiler.
ON_CPU, ON_GPU = ["--recipe", "fp8", "--device", "cpu"], ["--recipe", "nvfp4", "--device", "cuda"]


def pytest_command(*more: str, where: Sequence[str] = ON_CPU, timeout: int = 2) -> list[str]:
    plugins = ["-p", "harness.pytest_plugin", "-p", "xdist", "-p", "no:cacheprovider"]
    return ["-m", "pytest", *plugins, "presets", *where, "--case-timeout", str(timeout), *more]


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one", "xdist"])
def test_under_pytest_each_bad_case_fails_alone_with_its_reason(
    start: Start, tree: Path, workers: tuple[str, ...]
) -> None:
    began = time.monotonic()
    process = start(*pytest_command(*workers, "-rfE"))
    out, _ = process.communicate(timeout=90)
    assert time.monotonic() - began < 60
    assert f"{len(REASONS)} failed, {len(GOOD)} passed" in out.splitlines()[-1]
    blocks = {name: out.partition(f"\nOrg/{name}  ")[2].partition("  again: ")[0] for name in REASONS}
    for name, reason in REASONS.items():
        lines = blocks[name].splitlines()
        assert lines[0] == reason
        if name in PLACES:
            assert any(line.endswith(PLACES[name]) for line in lines[-3:]), lines
    assert "node down" not in out  # no worker of xdist was lost
    assert wait_until_empty(process.pid) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_harness_check_reports_each_bad_case_with_its_reason(start: Start, tree: Path, jobs: int) -> None:
    began = time.monotonic()
    options = [*ON_CPU, "--timeout", "2", "--jobs", str(jobs)]
    process = start("drive.py", "check", "--presets", "presets", *options, "--json", "report.json")
    out, _ = process.communicate(timeout=90)
    assert time.monotonic() - began < 60
    assert process.returncode == 2, out
    reports = {report.case.preset.partition("/")[2]: report for report in read_report(tree / "report.json")}
    assert {name: reports[name].reason for name in REASONS} == REASONS
    for name, place in PLACES.items():
        assert any(line.endswith(place) for line in reports[name].log.splitlines()[-3:]), reports[name].log
    assert {reports[name].outcome for name in GOOD} == {"passed"}
    assert "leaked" not in out
    assert wait_until_empty(process.pid) == []


def test_what_is_slow_to_import_is_imported_once_a_machine(start: Start, tree: Path) -> None:
    process = start(*pytest_command("-n", "3", "-k", "good"))
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, out
    assert len((tree / "imported").read_text().splitlines()) == 1


# ---- the same, in the middle of Megatron's forward pass of real models ----

FAULTY = """
import ctypes, os, time
from pathlib import Path
from unittest.mock import patch
from harness import pipeline

def act(action):
    import torch
    if action == "segfault":
        ctypes.string_at(0)
    if action == "exit":
        os._exit(3)
    if action == "hang":
        time.sleep(600)
    if action == "memory":
        blocks = []
        while True:
            blocks.append(torch.empty(1 << 30))  # reserved and never touched
    if action == "raise":
        raise RuntimeError("shapes cannot be multiplied")
    if action == "assert":
        numbers = torch.zeros(4, device="cuda")
        numbers[torch.full((4,), 1 << 20, device="cuda")]
    if action == "full":
        torch.empty(1 << 42, dtype=torch.uint8, device="cuda")

def check(case, real=pipeline.check):
    from megatron.core.transformer.mlp import MLP

    action, forward = case.preset.partition("/")[2].partition("-")[0], MLP.forward

    def faulty(*args, **more):
        act(action)
        return forward(*args, **more)

    with patch.object(MLP, "forward", faulty):
        return real(case)

pipeline.check = check
"""

FAULTY_DRIVER = """
import functools
import faulty
from harness import cli, runner

if __name__ == "__main__":
    runner.run_cases = functools.partial(runner.run_cases, check=faulty.check)
    cli.main()
"""
# What the first line of the report begins with.
IN_MEGATRON = {
    "segfault": "the worker was killed by SIGSEGV",
    "exit": "the worker exited with code 3",
    "hang": "timed out after 20 s",
    "memory": "out of memory: RuntimeError: ",
    "raise": "raised RuntimeError: shapes cannot be multiplied",
}

# The same of a case on a GPU, where the host's memory has no limit.
IN_CUDA = {name: reason for name, reason in IN_MEGATRON.items() if name != "memory"} | {
    "assert": "raised AcceleratorError: CUDA error: device-side assert triggered",
    "full": "out of memory: OutOfMemoryError: CUDA out of memory",
}


@pytest.fixture
def models(tree: Path) -> Path:
    """The tree with real models in place of the played ones, bad among good."""
    return with_models(tree, IN_MEGATRON)


@pytest.fixture
def gpu_models(tree: Path) -> Path:
    if not visible_gpus().gpus:
        pytest.skip("needs a CUDA device; none here")
    return with_models(tree, IN_CUDA)


def with_models(tree: Path, bad: Iterable[str]) -> Path:
    shutil.rmtree(tree / "presets")
    (tree / "presets" / "Org").mkdir(parents=True)
    (tree / "faulty.py").write_text(FAULTY)
    (tree / "drive.py").write_text(FAULTY_DRIVER)
    (tree / "conftest.py").write_text("import faulty\n")
    source = ROOT / "presets" / "Qwen" / "Qwen3-0.6B.sh"
    for name in ["good-1", *bad, "good-2", "zood-3"]:
        shutil.copy(source, tree / "presets" / "Org" / f"{name}.sh")
    return tree


def test_models_that_fail_in_a_pass_leave_the_others_passing(start: Start, models: Path) -> None:
    options = [*ON_CPU, "--timeout", "20", "--jobs", "2"]
    process = start("drive.py", "check", "--presets", "presets", *options)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 2, out
    _each_its_own(out)
    assert "8 cases: 3 passed, 1 failed, 4 error" in out.splitlines()[-1]
    assert wait_until_empty(process.pid) == []


def test_models_that_fail_in_a_pass_leave_the_others_passing_under_pytest(start: Start, models: Path) -> None:
    process = start(*pytest_command("-n", "2", timeout=20))
    out, _ = process.communicate(timeout=300)
    _each_its_own(out)
    assert "5 failed, 3 passed" in out.splitlines()[-1]
    assert wait_until_empty(process.pid) == []


@pytest.mark.gpu
def test_models_that_fail_on_a_gpu_leave_the_others_passing(start: Start, gpu_models: Path) -> None:
    options = [*ON_GPU, "--timeout", "20", "--jobs", "2"]
    process = start("drive.py", "check", "--presets", "presets", *options)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 2, out
    _each_its_own(out, IN_CUDA)
    assert "9 cases: 3 passed, 2 failed, 4 error" in out.splitlines()[-1]
    assert wait_until_empty(process.pid) == []


@pytest.mark.gpu
def test_models_that_fail_on_a_gpu_leave_the_others_passing_under_pytest(
    start: Start, gpu_models: Path
) -> None:
    process = start(*pytest_command("-n", "2", where=ON_GPU, timeout=20))
    out, _ = process.communicate(timeout=300)
    _each_its_own(out, IN_CUDA)
    assert "6 failed, 3 passed" in out.splitlines()[-1]
    assert wait_until_empty(process.pid) == []


def _each_its_own(out: str, reasons: Mapping[str, str] = IN_MEGATRON) -> None:
    for name, reason in reasons.items():
        assert f"\nOrg/{name}  {reason}" in out, out
    raised = out.partition("\nOrg/raise  raised ")[2].partition("  again: ")[0].splitlines()
    assert " in layers.0.mlp, given " in raised[0]
    assert raised[1] == "  at layers.0.mlp"
