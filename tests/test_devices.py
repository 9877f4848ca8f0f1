"""GPUs as NVML shows them, what CUDA would see of them, and the shares of workers.

No machine of ours has eight GPUs or a split one: ``Nvml`` stands for the library, and has its functions only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import typer

from harness import cli, gpus, host, runner
from harness.case import Case, CaseReport, Outcome
from harness.devices import (
    CONTEXT_BYTES,
    FRACTION,
    MOST_THREADS,
    Share,
    plan_shares,
    rank_count,
    resolve_device,
    torch_device,
    wanted_device,
    worker_count,
    worker_shares,
)
from harness.errors import DeviceUnavailable, UsageError
from harness.gpus import GIB, Gpu, visible_gpus
from harness.layout import Layout
from harness.runner import run_cases

ROOT = Path(__file__).parent.parent


@dataclass
class Card:
    """One GPU of a machine that does not exist: GiB, and the GiB of its MIG devices."""

    uuid: str
    free: float = 80
    total: float = 80
    name: str = "NVIDIA H100"
    mig: tuple[float, ...] | None = None
    shares_memory: bool = False
    capability: tuple[int, int] = (9, 0)


@dataclass
class Nvml:
    """The part of ``pynvml`` that is used."""

    cards: list[Card] = field(default_factory=list)
    error: int | None = None
    open: int = 0

    def nvmlInit(self) -> None:
        if self.error is not None:
            raise pynvml.NVMLError(self.error)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.open == 1
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[Card, int | None]:
        return self.cards[index], None

    def nvmlDeviceGetUUID(self, handle: tuple[Card, int | None]) -> str:
        card, part = handle
        return card.uuid if part is None else f"MIG-{card.uuid[4:]}-{part}"

    def nvmlDeviceGetName(self, handle: tuple[Card, int | None]) -> str:
        return handle[0].name

    def nvmlDeviceGetCudaComputeCapability(self, handle: tuple[Card, int | None]) -> tuple[int, int]:
        return handle[0].capability

    def nvmlDeviceGetMigMode(self, handle: tuple[Card, int | None]) -> list[int]:
        if "H100" not in handle[0].name:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(handle[0].mig is not None), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: tuple[Card, int | None]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(
        self, handle: tuple[Card, int | None], index: int
    ) -> tuple[Card, int | None]:
        assert handle[0].mig is not None
        if index >= len(handle[0].mig):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return handle[0], index

    def nvmlDeviceGetGpuInstanceId(self, handle: tuple[Card, int]) -> int:
        return handle[1] + 3

    def nvmlDeviceGetComputeInstanceId(self, handle: tuple[Card, int]) -> int:
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: tuple[Card, int | None]) -> SimpleNamespace:
        card, part = handle
        if card.shares_memory:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        if card.mig is not None:
            assert part is not None, "what a split GPU has free is nobody's"
            return SimpleNamespace(free=int(card.mig[part] * GIB), total=int(20 * GIB))
        return SimpleNamespace(free=int(card.free * GIB), total=int(card.total * GIB))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """A machine with 64 cores and 1 TiB, whose GPUs a test adds."""
    nvml = Nvml()
    for name in vars(Nvml):
        if name.startswith("nvml"):
            monkeypatch.setattr(pynvml, name, getattr(nvml, name))
    for name in (gpus.VISIBLE, gpus.ORDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host, "cores", lambda: 64)
    monkeypatch.setattr(host, "free_memory", lambda: 1024 * GIB)
    return nvml


PAIR = [Card("GPU-aa11"), Card("GPU-ab22", free=20)]
SPLIT = [Card("GPU-aa11", mig=(19.5, 9)), Card("GPU-ab22")]
UNLIKE = [Card("GPU-aa11", free=30, total=40, name="NVIDIA L40"), Card("GPU-ab22")]


# ---- what CUDA would see ----


@pytest.mark.parametrize(
    ("variable", "entries"),
    [
        (None, ["GPU-aa11", "GPU-ab22"]),
        ("", []),
        ("0", ["0"]),
        ("1,0", ["1", "0"]),
        (" 1 , 0 ", ["1", "0"]),
        ("-1", []),
        ("1,-1,0", ["1"]),
        ("1,2,0", ["1"]),
        ("1,,0", ["1"]),
        ("none", []),
        ("0gpu,1gpu", ["0gpu", "1gpu"]),
        ("0,0", []),
        ("1,0,1", []),
        ("GPU-ab22", ["GPU-ab22"]),
        ("GPU-ab,GPU-aa", ["GPU-ab", "GPU-aa"]),
        ("GPU-a", []),
        ("GPU-ab,GPU-ff,GPU-aa", ["GPU-ab"]),
        ("GPU-ab,GPU-ab22", []),
        ("GPU-ab,0", ["GPU-ab"]),
        ("0,GPU-ab", ["0"]),
        ("MIG-aa11-0", []),
    ],
)
def test_the_variable_is_read_by_cudas_rules(
    machine: Nvml, monkeypatch: pytest.MonkeyPatch, variable: str | None, entries: list[str]
) -> None:
    machine.cards = PAIR
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    visible = visible_gpus()
    assert [gpu.entry for gpu in visible.gpus] == entries
    # Each with its own memory, whatever it is called.
    assert [gpu.free == 20 * GIB for gpu in visible.gpus] == [("1" in e[:1]) or ("ab" in e) for e in entries]
    assert machine.open == 0


@pytest.mark.parametrize(
    ("variable", "free"),
    [
        # Each worker is a process of its own, and may have a MIG device of its own.
        (None, [19.5, 9, 80]),
        # CUDA takes the first MIG device of a GPU that is split.
        ("0,1", [19.5, 80]),
        ("GPU-aa11", [19.5]),
        ("MIG-aa11-1", [9]),
        ("MIG-aa11-1,MIG-aa11-0", [9, 19.5]),
        ("MIG-aa11-", []),
        ("MIG-GPU-aa11/4/0", [9]),
        ("MIG-GPU-aa11/4/0,MIG-GPU-aa11/3/0", [9, 19.5]),
        ("MIG-GPU-aa11/4/0,MIG-aa11-1", []),
        ("MIG-GPU-aa11/5/0", []),
        ("MIG-GPU-ab22/3/0", []),
    ],
)
def test_mig_devices(
    machine: Nvml, monkeypatch: pytest.MonkeyPatch, variable: str | None, free: list[float]
) -> None:
    machine.cards = SPLIT
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert [gpu.free / GIB for gpu in visible_gpus().gpus] == free


def test_a_split_gpu_without_devices_is_none(machine: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cards = [Card("GPU-aa11", mig=()), Card("GPU-ab22")]
    assert [gpu.entry for gpu in visible_gpus().gpus] == ["GPU-ab22"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_gpus().gpus == ()


def test_indices_may_mean_any_gpu_where_cuda_counts_from_the_fastest(
    machine: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cards = UNLIKE
    # By name there is no doubt, and unset every one is meant.
    assert [gpu.free // GIB for gpu in visible_gpus().gpus] == [30, 80]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (gpu,) = visible_gpus().gpus
    assert (gpu.entry, gpu.free // GIB, gpu.total // GIB) == ("1", 30, 80)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    (gpu,) = visible_gpus().gpus
    assert (gpu.entry, gpu.free // GIB) == ("1", 80)


def test_a_gpu_that_shares_the_machines_memory(machine: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cards = [Card("GPU-aa11", name="NVIDIA GB10", shares_memory=True)]
    monkeypatch.setattr(gpus, "free_memory", lambda: 7 * GIB)
    assert visible_gpus().gpus[0].free == 7 * GIB


@pytest.mark.parametrize(
    "error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED], ids=str
)
def test_without_a_driver_there_is_no_gpu(machine: Nvml, error: int) -> None:
    machine.error = error
    assert wanted_device("auto") == resolve_device("auto") == "cpu"
    with pytest.raises(DeviceUnavailable, match=r"device cuda is not on this machine: NVML shows no GPU$"):
        resolve_device("cuda")


def test_a_driver_that_does_not_answer_is_no_machine_without_gpus(machine: Nvml) -> None:
    machine.error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    with pytest.raises(DeviceUnavailable, match=r"NVML cannot say .* --device cpu does without"):
        wanted_device("auto")
    assert wanted_device("cpu") == "cpu"


def test_devices_by_name(machine: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cards = PAIR
    assert [wanted_device(text) for text in ("auto", "CUDA", "cuda:1", " cpu ")] == [
        "cuda",
        "cuda",
        "cuda:1",
        "cpu",
    ]
    assert [resolve_device(text) for text in ("auto", "cuda", "cuda:1")] == ["cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(UsageError, match="device 'gpu' is not auto, cpu, cuda or cuda:N"):
        wanted_device("gpu")
    with pytest.raises(DeviceUnavailable, match="device cuda:2 is not on this machine: NVML shows 2 visible"):
        wanted_device("cuda:2")


@pytest.mark.parametrize(
    ("variable", "note"),
    [
        ("0,0", "CUDA_VISIBLE_DEVICES='0,0' names a GPU twice, and CUDA shows none then"),
        ("7", "CUDA_VISIBLE_DEVICES='7' ends at '7', which names no GPU here"),
    ],
)
def test_why_a_device_cannot_be_seen(
    machine: Nvml, monkeypatch: pytest.MonkeyPatch, variable: str, note: str
) -> None:
    machine.cards = PAIR
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    with pytest.raises(DeviceUnavailable) as raised:
        wanted_device("cuda")
    assert str(raised.value) == f"device cuda is not on this machine: NVML shows no GPU ({note})"


# ---- workers ----


def whole(count: int, free: float = 80) -> list[Gpu]:
    return [
        Gpu(str(index), f"GPU {index} (NVIDIA H100)", int(free * GIB), 80 * GIB) for index in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "cores", "memory", "workers", "threads"),
    [
        (None, 2, 24, 2, {1}),
        (None, 64, 256, 64, {1}),
        (None, 64, 100, 25, {2, 3}),
        (None, 64, 9, 2, {MOST_THREADS}),
        (None, 1, 64, 1, {1}),
        (None, 2, 3, 1, {2}),
        (1, 2, 24, 1, {2}),
        (3, 2, 24, 3, {1}),
        (4, 16, 9, 4, {4}),
    ],
)
def test_workers_on_the_cpu(
    count: int | None, cores: int, memory: int, workers: int, threads: set[int]
) -> None:
    shares = plan_shares((), cores, memory * GIB, count)
    assert len(shares) == workers
    assert {share.threads for share in shares} == threads
    # Each core has a thread, unless there are more cores than the models can use.
    assert sum(share.threads for share in shares) == max(workers, min(cores, workers * MOST_THREADS))
    assert {share.host_bytes for share in shares} == {memory * GIB // workers}
    assert all(share.environment == {"OMP_NUM_THREADS": str(share.threads)} for share in shares)


@pytest.mark.parametrize(
    ("gpus", "count", "cores", "homes"),
    [
        (whole(1), None, 64, [13]),
        (whole(1, 7), None, 64, [1]),
        (whole(1, 5), None, 64, [1]),
        (whole(2), None, 64, [13, 13]),
        (whole(2), None, 8, [4, 4]),
        (whole(2), 3, 8, [2, 1]),
        (whole(8), None, 16, [2] * 8),
        (whole(8), None, 4, [1] * 4 + [0] * 4),
        ([*whole(1, 30), *whole(2, 12)[1:]], None, 64, [5, 2]),
        ([*whole(1, 1), *whole(2, 12)[1:]], None, 64, [0, 2]),
        ([*whole(1, 5), *whole(2, 5)[1:]], None, 64, [1, 0]),
        (whole(1, 9), 4, 4, [4]),
    ],
    ids=lambda value: f"{len(value)} GPUs" if isinstance(value, list) and isinstance(value[0], Gpu) else None,
)
def test_workers_on_gpus(gpus: list[Gpu], count: int | None, cores: int, homes: list[int]) -> None:
    shares = plan_shares(gpus, cores, 1024 * GIB, count)
    entries = [share.entry for share in shares]
    assert [entries.count(gpu.entry) for gpu in gpus] == homes
    for gpu in gpus:
        taken = [share.fraction for share in shares if share.entry == gpu.entry]
        assert all(fraction is not None and fraction > 0 for fraction in taken)
        together = sum(fraction or 0 for fraction in taken) * gpu.total + len(taken) * CONTEXT_BYTES
        assert together <= gpu.free + 1


def test_workers_take_the_gpus_in_turn() -> None:
    assert [share.entry for share in plan_shares(whole(2), 4, 64 * GIB)] == ["0", "1", "0", "1"]


def test_no_more_workers_than_cases() -> None:
    shares = plan_shares((), 16, 64 * GIB, most=3)
    assert [share.threads for share in shares] == [6, 5, 5]
    assert len(plan_shares((), 16, 64 * GIB, count=8, most=3)) == 3
    assert len(plan_shares(whole(2), 16, 64 * GIB, count=8, most=3)) == 3


def test_workers_that_start_ranks_are_fewer() -> None:
    assert [len(plan_shares((), 16, 1 << 50, ranks=ranks)) for ranks in (1, 2, 4, 64)] == [16, 8, 4, 1]
    assert plan_shares((), 16, 64 * GIB, ranks=4) == [Share(1, 16 * GIB)] * 4
    # On CUDA they take every GPU between them, so the worker sees what the caller does.
    assert plan_shares(whole(4), 16, 64 * GIB, ranks=4) == [Share(4, 64 * GIB)]


@pytest.mark.parametrize(
    ("gpus", "memory", "count", "message"),
    [
        (
            whole(1, 1),
            64,
            None,
            "not one worker fits: GPU 0 (NVIDIA H100), 1.0 of 80.0 GiB free, and each needs 2.0 GiB. "
            "Free some, or choose another device with --device",
        ),
        (
            whole(2, 5),
            64,
            9,
            "9 workers do not fit, 4 would: GPU 0 (NVIDIA H100), 5.0 of 80.0 GiB free; "
            "GPU 1 (NVIDIA H100), 5.0 of 80.0 GiB free, and each needs 2.0 GiB. Free some, or ask for fewer",
        ),
        (
            [],
            1,
            None,
            "not one worker fits: 1.0 GiB of this machine's memory are free, and each needs 2.0 GiB. "
            "Free some, or choose another device with --device",
        ),
        (
            [],
            9,
            5,
            "5 workers do not fit, 4 would: 9.0 GiB of this machine's memory are free, and each needs "
            "2.0 GiB. Free some, or ask for fewer",
        ),
    ],
    ids=["a full GPU", "too many for the GPUs", "a full machine", "too many for the machine"],
)
def test_what_does_not_fit_is_refused(gpus: list[Gpu], memory: int, count: int | None, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        plan_shares(gpus, 64, memory * GIB, count)
    assert str(raised.value) == message


def test_the_shares_of_this_machine(machine: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cards = PAIR
    assert worker_count("auto") == worker_count("cuda") == 13 + 3
    assert worker_count("cuda:1") == 3
    assert worker_count("cpu") == 64
    assert {share.entry for share in worker_shares("cuda:1")} == {"GPU-ab22"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    first = worker_shares("cuda", 2)[0]
    assert first.environment == {
        "OMP_NUM_THREADS": str(MOST_THREADS),
        "CUDA_VISIBLE_DEVICES": "1",
        FRACTION: f"{9.5 / 80:.6f}",
    }
    assert rank_count("cuda:0") == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert (rank_count("cuda:0"), rank_count("cpu")) == (2, 1024)
    machine.cards = SPLIT
    assert rank_count("cuda:0") == 1


# ---- workers with their shares ----


def tell(case: Case) -> CaseReport:
    """What a worker was given, by the name of each variable."""
    told = [os.environ.get(name, "-") for name in ("CUDA_VISIBLE_DEVICES", FRACTION, "OMP_NUM_THREADS")]
    return CaseReport(case, Outcome.PASSED, 0.0, reason=" ".join(told))


def cases(count: int) -> list[Case]:
    return [Case(f"Org/{number}", "a.sh", "fp8", Layout(), "cuda:0") for number in range(count)]


def test_two_gpus_are_both_used(machine: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cards = [Card("GPU-aa11"), Card("GPU-ab22", free=40.5)]
    monkeypatch.setattr(host, "cores", lambda: 4)
    reports = run_cases(cases(4), worker_shares("cuda", 2), 60.0, check=tell, preload=())
    given = {f"GPU-aa11 {79.5 / 80:.6f} 2", f"GPU-ab22 {40 / 80:.6f} 2"}
    assert {report.reason for report in reports} == given, [report.log for report in reports]


def test_check_plans_its_workers_over_every_gpu(machine: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.cards = [Card("GPU-aa11"), Card("GPU-ab22")]
    given: list[Sequence[Share]] = []

    def run(cases: Sequence[Case], jobs: Sequence[Share], *rest: object) -> list[CaseReport]:
        given.append(jobs)
        return [CaseReport(case, Outcome.PASSED, 0.0) for case in cases]

    monkeypatch.setattr(runner, "run_cases", run)
    for jobs, entries in (("auto", {"GPU-aa11", "GPU-ab22"}), ("1", {"GPU-aa11"})):
        with pytest.raises(typer.Exit) as ended:
            cli.check(["Qwen3-8B", "Qwen3-0.6B"], jobs=jobs, presets=ROOT / "presets")
        assert ended.value.exit_code == 0
        assert {share.entry for share in given[-1]} == entries
    with pytest.raises(UsageError, match="90 workers do not fit, 80 would"):
        cli.check(None, jobs="90", presets=ROOT / "presets")


# ---- the cap, in a case ----


def test_a_case_may_allocate_its_workers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    set_to: list[tuple[float, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: set_to.append((part, str(device)))
    )
    monkeypatch.delenv(FRACTION, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert str(torch_device("cuda:0")) == "cuda:0"
    assert set_to == []
    monkeypatch.setenv(FRACTION, "0.25")
    torch_device("cpu")
    assert set_to == []
    assert str(torch_device("cuda:1")) == "cuda:1"
    # A worker that is pinned to the GPU that the caller calls cuda:1 sees no other.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ab22")
    assert str(torch_device("cuda:1")) == "cuda:0"
    assert set_to == [(0.25, "cuda:1"), (0.25, "cuda:0")]
    for text in ("0", "1.5", "all"):
        monkeypatch.setenv(FRACTION, text)
        with pytest.raises(UsageError, match="is no number above 0 and up to 1"):
            torch_device("cuda:0")


COUNT = """
import ctypes
cuda, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
print(number.value if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)) else number.value)
"""


@pytest.fixture
def gpu() -> Gpu:
    """The first GPU of this machine."""
    found = visible_gpus().gpus
    if not found:
        pytest.skip("needs a CUDA device")
    return found[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "form", ["", "0", "-1", "0,0", "0,9", "9", "0gpu", ",0", "UUID", "UUI", "UUID,UUID", "no"]
)
def test_the_driver_reads_the_variable_as_we_do(gpu: Gpu, form: str) -> None:
    uuid = gpus.read_boards()[0].uuid
    variable = form.replace("UUID", uuid).replace("UUI", uuid[:-4])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": variable}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == len(visible_gpus(environment).gpus)


CAPPED = """
import torch
from harness.devices import torch_device
device = torch_device("cuda:0")
torch.empty(1 << 20, device=device)
try:
    torch.empty(torch.cuda.get_device_properties(device).total_memory // 4, dtype=torch.uint8, device=device)
except torch.cuda.OutOfMemoryError:
    print("capped")
"""


@pytest.mark.gpu
@pytest.mark.parametrize(("fraction", "told"), [("0.1", "capped"), ("0.9", "")])
def test_a_worker_cannot_take_more_than_its_share(gpu: Gpu, fraction: str, told: str) -> None:
    if gpu.free < gpu.total // 2:
        pytest.skip("needs a GPU that is half free")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu.entry, FRACTION: fraction}
    done = subprocess.run(
        [sys.executable, "-c", CAPPED], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == told


# What the fork server does, and what a worker then does.
FORKED = """
import json
import os
import harness.fork_server, harness.preload
from harness.devices import torch_device
import torch
from modelopt.torch.kernels.quantization import gemm
assert not torch.cuda.is_initialized()
assert hasattr(gemm, "fp4_fake_quant_block") == (CAPABILITY >= (8, 9))
if harness.preload.HAS_CUDA:
    raise SystemExit(7)
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
device = torch_device("cuda:0")
assert torch.cuda.get_device_capability(device) == CAPABILITY
torch.zeros(1, device=device).add_(1)
os._exit(0)
"""


@pytest.mark.gpu
def test_what_workers_are_forked_from_has_not_touched_cuda(gpu: Gpu) -> None:
    code = FORKED.replace("CAPABILITY", str(gpu.capability))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 7:
        pytest.skip("a library that is installed here initialises CUDA when it is imported")
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_that_a_process_has_initialised_cuda_is_seen(gpu: Gpu) -> None:
    code = (
        "import ctypes, torch; from harness.preload import has_cuda; "
        "ctypes.CDLL('libcuda.so.1').cuInit(0); print(has_cuda(), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["UUID", "0", ""])
def test_a_check_stays_within_the_variable(gpu: Gpu, form: str) -> None:
    """Workers on the GPU that it names; on the CPU where it names none."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": form.replace("UUID", gpu.entry)}
    command = ["-m", "harness", "check", "Qwen/Qwen3-0.6B", "--recipe", "fp8", "--json", "-"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    (found,) = json.loads(done.stdout)["results"]
    assert (found["outcome"], found["device"]) == ("passed", "cuda:0" if form else "cpu")


def test_asking_imports_no_torch() -> None:
    code = (
        "import sys; from harness.devices import worker_count; worker_count('auto'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---- the host ----


def tree(root: Path, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {100 * GIB // 1024} kB\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


GROUP = "sys/fs/cgroup"
HOSTS = {
    "no container": ({}, 16, 100),
    "v2 of its own": (
        {
            "proc/self/cgroup": "0::/",
            f"{GROUP}/memory.max": str(8 * GIB),
            f"{GROUP}/memory.current": str(5 * GIB),
            f"{GROUP}/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 7",
            f"{GROUP}/cpu.max": "250000 100000",
        },
        2,
        4,
    ),
    "v2 without limits": (
        {"proc/self/cgroup": "0::/", f"{GROUP}/memory.max": "max", f"{GROUP}/cpu.max": "max 100000"},
        16,
        100,
    ),
    "v2 limited further up": (
        {
            "proc/self/cgroup": "0::/jobs/mine",
            f"{GROUP}/jobs/mine/memory.max": "max",
            f"{GROUP}/jobs/memory.max": str(9 * GIB),
            f"{GROUP}/jobs/memory.current": str(2 * GIB),
            f"{GROUP}/jobs/mine/cpu.max": "50000 100000",
        },
        1,
        7,
    ),
    "v1": (
        {
            "proc/self/cgroup": "4:memory:/box\n2:cpuacct,cpu:/box\n1:name=systemd:/box",
            f"{GROUP}/memory/box/memory.limit_in_bytes": str(6 * GIB),
            f"{GROUP}/memory/box/memory.usage_in_bytes": str(3 * GIB),
            f"{GROUP}/memory/box/memory.stat": f"cache 5\ntotal_inactive_file {GIB}",
            f"{GROUP}/cpu/box/cpu.cfs_quota_us": "400000",
            f"{GROUP}/cpu/box/cpu.cfs_period_us": "100000",
        },
        4,
        4,
    ),
    "v1 told by a path outside the container": (
        {
            "proc/self/cgroup": "4:memory:/docker/f00\n2:cpu:/docker/f00",
            f"{GROUP}/memory/memory.limit_in_bytes": str(6 * GIB),
            f"{GROUP}/memory/memory.usage_in_bytes": str(7 * GIB),
            f"{GROUP}/cpu/cpu.cfs_quota_us": "-1",
            f"{GROUP}/cpu/cpu.cfs_period_us": "100000",
        },
        16,
        0,
    ),
}


@pytest.mark.parametrize(("files", "cores", "free"), HOSTS.values(), ids=HOSTS)
def test_a_container_has_what_its_limits_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int, free: int
) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(16)))
    root = tree(tmp_path, files)
    assert (host.cores(root), host.free_memory(root) // GIB) == (cores, free)


def test_this_machine() -> None:
    assert 1 <= host.cores() <= 4096
    assert GIB // 64 < host.free_memory() < 1 << 50
