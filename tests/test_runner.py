"""Cases over worker processes: order, faults, time limits, and nothing left behind.

The checks here are small functions of this module, which the workers import by name; no torch.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from harness import worker
from harness.case import Case, CaseReport, Outcome, ShrinkReport, StandInReport
from harness.devices import MPS, Share, worker_shares
from harness.errors import Interrupted, UsageError
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.processes import pin_threads
from harness.runner import run_cases, safely, spread

ROOT = Path(__file__).parent.parent


def case(preset: str, recipe: str = "fp8") -> Case:
    return Case(preset, f"presets/{preset}.sh", recipe, Layout(), "cpu")


class Odd:
    """A value that only the worker can make sense of."""

    def __str__(self) -> str:
        return "odd"

    def __reduce__(self) -> str:
        raise TypeError("this value does not cross processes")


KEPT: list[object] = []


def planned(preset: str) -> ShrinkReport:
    return ShrinkReport({"hidden_size": len(preset), "preset": preset}, {}, ())


def play(case: Case) -> CaseReport:
    """Do what the preset's name says."""
    _, _, action = case.preset.partition("/")
    if action == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if action == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "exit":
        os._exit(7)
    if action == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(600)
    if action == "raise":
        raise KeyError("x")
    if action == "usage":
        raise UsageError("device cuda:9 is not on this machine")
    if action == "print":
        print("from python")
        os.write(1, b"from C\n")
        os._exit(3)
    if action == "slow":
        time.sleep(0.3)
    if action == "grow":
        KEPT.append(b"x" * (64 << 20))
    if action == "memory":
        while True:  # reserved and never touched: only a limit stops it
            KEPT.append(mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    if action == "closed":
        os.closerange(1, 3)
        time.sleep(0.5)
    if action == "held":  # a process that outlives the worker has its pipes
        if not os.fork():
            time.sleep(30)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    finding = Finding("audit", Severity.WARNING, "seen", expected=Odd(), actual=(1, 2))
    pid = StandInReport(f"pid {os.getpid()}", "", os.environ["OMP_NUM_THREADS"])
    shrink = planned(case.preset)
    return CaseReport(case, Outcome.PASSED, 0.1, findings=(finding,), stand_ins=(pid,), shrink=shrink)


def run(*presets: str, jobs: int = 2, timeout: float | None = 60.0) -> list[CaseReport]:
    return run_cases([case(f"Org/{preset}") for preset in presets], jobs, timeout, check=play, preload=())


def test_reports_come_in_the_order_of_the_cases() -> None:
    done: list[str] = []
    cases = [case(f"Org/{name}", recipe) for name in ("slow", "a", "b") for recipe in ("fp8", "nvfp4")]
    reports = run_cases(
        cases, 2, 60.0, on_done=lambda report: done.append(report.case.name), check=play, preload=()
    )
    assert [report.case for report in reports] == cases
    assert sorted(done) == sorted(report.case.name for report in reports)
    assert {report.outcome for report in reports} == {Outcome.PASSED}


def test_what_cases_have_in_common_is_kept_once() -> None:
    first, again, other = run("a", "a", "b", jobs=1)
    assert first.stand_ins is again.stand_ins is other.stand_ins  # of one worker
    assert first.shrink is again.shrink
    assert (first.shrink, other.shrink) == (planned("Org/a"), planned("Org/b"))


def test_what_does_not_cross_processes_becomes_text() -> None:
    (report,) = run("a")
    (finding,) = report.findings
    assert (finding.expected, finding.actual) == ("odd", [1, 2])


def test_one_worker_takes_one_case_after_the_other() -> None:
    reports = run("a", "b", "c", jobs=1)
    pids = {report.stand_ins[0].target for report in reports}
    assert len(pids) == 1
    assert pids != {f"pid {os.getpid()}"}


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many of these workers fit is no matter of what this machine does else; they are small."""
    monkeypatch.setattr("harness.host.free_memory", lambda: 16 << 30)


@pytest.mark.parametrize("jobs", [1, 2])
def test_workers_share_the_cores(jobs: int) -> None:
    threads = {report.stand_ins[0].reason for report in run("a", "b", jobs=jobs)}
    assert threads == {str(share.threads) for share in worker_shares("cpu", jobs)}


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("segfault", "the worker was killed by SIGSEGV"),
        ("killed", "the worker was killed by SIGKILL, as happens when memory runs out"),
        ("exit", "the worker exited with code 7"),
        ("raise", "the harness failed: KeyError: 'x'"),
        ("usage", "device cuda:9 is not on this machine"),
    ],
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_worker_that_dies_costs_its_case_and_no_other(action: str, reason: str, jobs: int) -> None:
    reports = run("a", action, "b", "c", jobs=jobs)
    assert [report.outcome for report in reports] == ["passed", "error", "passed", "passed"]
    assert reports[1].reason == reason


def test_every_case_of_a_worker_that_always_dies_is_reported() -> None:
    assert [report.reason for report in run("exit", "exit", "exit")] == ["the worker exited with code 7"] * 3


def test_a_case_beyond_its_time_is_ended_and_its_neighbours_pass() -> None:
    start = time.monotonic()
    reports = run("a", "hang", "b", "c", timeout=1.0)
    assert [report.outcome for report in reports] == ["passed", "error", "passed", "passed"]
    assert reports[1].reason == "timed out after 1 s"
    assert 1.0 <= reports[1].seconds < 5.0
    assert time.monotonic() - start < 20


def test_where_a_case_hangs_is_the_end_of_its_log() -> None:
    (report,) = run("hang", timeout=0.5)
    assert "Timeout (0:00:00.5" in report.log
    assert "(most recent call last):" in report.log
    place = report.log.splitlines()[-1]
    assert place.startswith(f'  File "{__file__}"')
    assert place.endswith(" in play")


def test_a_process_that_keeps_the_pipes_of_a_dead_worker_holds_up_nobody() -> None:
    start = time.monotonic()
    reports = run("held", "a", jobs=1)
    assert [report.outcome for report in reports] == ["error", "passed"]
    assert time.monotonic() - start < 25


def test_a_case_that_closes_its_output_costs_no_processor_time() -> None:
    before = time.process_time()
    (report,) = run("closed")
    assert report.outcome is Outcome.PASSED
    assert time.process_time() - before < 0.3


def test_memory_beyond_what_is_free_is_the_reason_of_the_case_and_of_no_other() -> None:
    cases = [case(f"Org/{name}") for name in ("a", "memory", "b")]
    reports = run_cases(cases, [Share(1, 256 << 20)], 60.0, check=play, preload=())
    assert [report.outcome for report in reports] == ["passed", "error", "passed"]
    assert reports[1].reason.startswith("out of memory: ")
    assert len({report.stand_ins[0].target for report in (reports[0], reports[2])}) == 1


def test_a_worker_that_grows_without_end_is_replaced() -> None:
    cases = [case(name) for name in ("Org/a", "Org/grow", "Org/b", "Org/c", "Other/grow", "Org/d", "Org/e")]
    reports = run_cases(cases, 1, 60.0, check=play_in_a_small_process, preload=())
    pids = [report.stand_ins[0].target for report in reports]
    assert pids[0] == pids[1] != pids[2]
    assert pids[2] == pids[3] == pids[4] != pids[5]
    assert len(set(pids)) == 3


def play_in_a_small_process(case: Case) -> CaseReport:
    """As ``play``, in a worker that may grow by little."""
    worker._MOST_GROWTH["cpu"] = 32 << 20
    return play(case)


class Faulty(ModuleType):
    """As much of torch as is asked whether a GPU had a fault."""

    class cuda:
        @staticmethod
        def is_initialized() -> bool:
            return True

        @staticmethod
        def synchronize() -> None:
            raise RuntimeError("CUDA error: device-side assert triggered\nSearch for it")


def play_with_a_gpu(case: Case) -> CaseReport:
    if case.preset == "Org/fault":
        sys.modules["torch"] = Faulty("torch")
        raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")
    return play(case)


def test_a_gpu_fault_is_the_reason_and_its_worker_left_behind() -> None:
    cases = [case(name) for name in ("Org/a", "Org/fault", "Other/b", "Other/c")]
    reports = run_cases(cases, 1, 60.0, check=play_with_a_gpu, preload=())
    by_name = {report.case.preset: report for report in reports}
    fault = by_name.pop("Org/fault")
    assert fault.reason == "a fault on the GPU: RuntimeError: CUDA error: device-side assert triggered"
    assert "CUBLAS_STATUS_EXECUTION_FAILED" in fault.log
    pids = {name: report.stand_ins[0].target for name, report in by_name.items()}
    before, after = pids["Org/a"], {pids["Other/b"], pids["Other/c"]}
    assert len(after) == 1 and before not in after, pids


def play_beside_others(case: Case) -> CaseReport:
    """As ``play``; ``fault`` fails where it shares the GPU, as its neighbour's fault has it fail there."""
    shares = os.environ.get(MPS) != os.devnull
    with Path(case.path).open("a", encoding="utf-8") as runs:
        runs.write(f"{case.preset} {'shares' if shares else 'apart'}\n")
    if case.preset == "Org/fault" and shares:
        raise RuntimeError("CUDA error: unspecified launch failure")
    return play(case)


def run_beside_others(log: Path, *presets: str) -> tuple[list[CaseReport], list[str]]:
    """The reports, and each time that a case was begun."""
    cases = [replace(case(preset), path=str(log), device="cuda:0") for preset in presets]
    reports = run_cases(cases, [Share(1, 1 << 30)], 20.0, check=play_beside_others, preload=())
    return reports, log.read_text(encoding="utf-8").splitlines()


def test_an_error_where_all_share_a_gpu_is_looked_at_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "control").touch()
    monkeypatch.setenv(MPS, str(tmp_path))
    presets = ("Org/fault", "Other/b", "Third/segfault", "Fourth/d")
    reports, runs = run_beside_others(tmp_path / "runs", *presets)
    assert [report.outcome for report in reports] == ["passed", "passed", "error", "passed"]
    assert reports[2].reason == "the worker was killed by SIGSEGV"
    assert runs == [
        "Org/fault shares",
        "Org/fault apart",
        "Other/b shares",
        "Third/segfault shares",
        "Third/segfault apart",
        "Fourth/d shares",
    ]


def test_an_error_on_a_gpu_that_processes_take_turns_on_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MPS, str(tmp_path))
    reports, runs = run_beside_others(tmp_path / "runs", "Org/fault")
    assert reports[0].reason == "the harness failed: RuntimeError: CUDA error: unspecified launch failure"
    assert runs == ["Org/fault shares"]


# A library that initialises CUDA when the fork server imports it, as far as workers can tell.
USES_CUDA = """
import sys
from types import ModuleType
sys.modules["harness.preload"] = ModuleType("harness.preload")
sys.modules["harness.preload"].HAS_CUDA = True
"""

TELLS = """
import os, sys
from harness import worker
from harness.case import Case, CaseReport, Outcome
from harness.devices import Share
from harness.layout import Layout
from harness.runner import run_cases

worker.PRELOAD = ("uses_cuda",)  # all that a worker has to import

def tell(case):
    parent = "run" if os.getppid() == int(os.environ["RUN"]) else "server"
    if case.preset == "killed":
        os.kill(os.getpid(), 9)
    return CaseReport(case, Outcome.PASSED, 0.0, reason=f"{parent} {'uses_cuda' in sys.modules}")

if __name__ == "__main__":
    os.environ["RUN"] = str(os.getpid())
    presets = ("a", "killed", "b", "c")
    cases = [Case(preset, "a.sh", "fp8", Layout(), sys.argv[1]) for preset in presets]
    reports = run_cases(cases, [Share(1, 1 << 30)], 20.0, check=tell, preload=("uses_cuda",))
    print(*(report.reason for report in reports), sep="\\n")
"""


@pytest.mark.parametrize(("device", "parent"), [("cpu", "server"), ("cuda:0", "run")])
def test_where_forked_processes_cannot_use_the_gpu_workers_are_not_forked(
    tmp_path: Path, device: str, parent: str
) -> None:
    (tmp_path / "uses_cuda.py").write_text(USES_CUDA)
    (tmp_path / "tells.py").write_text(TELLS)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(tmp_path / "tells.py"), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    killed = "the worker was killed by SIGKILL, as happens when memory runs out"
    assert done.stdout.splitlines() == [f"{parent} True", killed, f"{parent} True", f"{parent} True"]
    assert done.stderr == ""


UNGUARDED = """
from harness.case import Case
from harness.layout import Layout
from harness.runner import run_cases

(report,) = run_cases([Case("a", "a.sh", "fp8", Layout(), "cpu")], 1, 20.0, preload=())
print(report.reason)
"""


def test_a_worker_that_never_began_says_so(tmp_path: Path) -> None:
    """As where a script runs cases whenever it is imported, by its own workers too."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "the worker exited with code 1, before the case began\n"


def test_the_time_limit_is_per_case() -> None:
    reports = run("slow", "slow", "slow", "slow", jobs=1, timeout=0.9)
    assert {report.outcome for report in reports} == {Outcome.PASSED}


def test_what_a_dead_worker_had_to_say_is_its_log(capfd: pytest.CaptureFixture[str]) -> None:
    (report,) = run("print")
    assert report.log.endswith("from C\n")
    assert capfd.readouterr() == ("", "")


def test_the_place_of_a_segmentation_fault_is_in_the_log() -> None:
    (report,) = run("segfault")
    assert "Fatal Python error: Segmentation fault" in report.log
    assert "in play" in report.log


def test_no_worker_outlives_the_run() -> None:
    reports = run("a", "b", "slow", "c")
    pids = [int(report.stand_ins[0].target.removeprefix("pid ")) for report in reports]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_an_exception_in_on_done_ends_the_workers() -> None:
    def stop(report: CaseReport) -> None:
        pids.append(int(report.stand_ins[0].target.removeprefix("pid ")))
        raise RuntimeError("stop")

    pids: list[int] = []
    with pytest.raises(RuntimeError, match="stop"):
        run_cases([case("Org/a"), case("Org/hang")], 2, None, on_done=stop, check=play, preload=())
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_no_cases_are_no_reports() -> None:
    assert run() == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_was_done_before_an_interrupt_is_kept(jobs: int) -> None:
    def stop(report: CaseReport) -> None:
        if report.case.preset == "Org/b":
            raise Interrupted(signal.SIGTERM)

    cases = [case(f"Org/{name}") for name in ("a", "b", "hang", "hang", "c")]
    with pytest.raises(Interrupted) as caught:
        run_cases(cases, jobs, None, on_done=stop, check=play, preload=())
    assert caught.value.exit_code == 143
    reports = caught.value.reports
    assert [report.case for report in reports] == cases
    assert [report.outcome for report in reports[1:]] == ["passed", "skipped", "skipped", "skipped"]
    assert {report.reason for report in reports[2:]} == {"interrupted by SIGTERM"}


def test_cases_of_one_preset_are_spread_and_those_of_one_recipe() -> None:
    cases = [case(preset, recipe) for preset in ("a", "b") for recipe in ("1", "2", "3")]
    cases.append(case("c", "1"))
    order = [cases[index] for index in spread(cases)]
    assert " ".join(c.preset + c.recipe for c in order) == "a1 b2 c1 a2 b3 a3 b1"


def test_pinning_threads_imports_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    pin_threads(3)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "torch" not in sys.modules


def test_a_check_that_cannot_run_is_an_error_with_its_traceback() -> None:
    report = safely(play, case("Org/raise"))
    assert (report.outcome, report.reason) == (Outcome.ERROR, "the harness failed: KeyError: 'x'")
    assert "in play" in report.log
