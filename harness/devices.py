"""Devices: which device a case runs on, and how many workers this machine carries, each with its share.

Nothing here initialises CUDA but ``torch_device``, which a case calls in the process that runs it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import host
from harness.errors import DeviceUnavailable, UsageError
from harness.gpus import GIB, VISIBLE, Gpu, visible_gpus

if TYPE_CHECKING:
    import torch

# What a worker is given where there is enough, and what it cannot do without: torch, Megatron and ModelOpt
# resident, and a tiny model of the largest kind, on the host; a CUDA context and the model, on a GPU.
WORKER_BYTES, LEAST_BYTES = 4 * GIB, 2 * GIB
GPU_WORKER_BYTES, GPU_LEAST_BYTES = 6 * GIB, 2 * GIB
# Of a process' share of a GPU, what its CUDA context and libraries take; torch does not count it.
CONTEXT_BYTES = GIB // 2
# A rank shares what is imported with the process that it was forked from.
RANK_BYTES = GIB
# The matrices of a tiny model keep no more threads busy than these.
MOST_THREADS = 8

# The share of its GPU's memory that a worker may allocate, as a number above 0 and up to 1.
FRACTION = "HARNESS_CUDA_MEMORY_FRACTION"

# Where CUDA looks for the daemon of its Multi-Process Service (MPS), and where it does by default.
MPS, MPS_DIRECTORY = "CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"


def has_mps() -> bool:
    """Whether the processes of a GPU run at once, through MPS. A fault of one is then a fault of all."""
    return Path(os.environ.get(MPS, MPS_DIRECTORY), "control").exists()


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker may use: CPU threads, bytes of host memory, and of one GPU where it has one.

    ``entry`` is its ``CUDA_VISIBLE_DEVICES``, None where that stays as it is, and ``fraction`` the part of
    the memory of that GPU that it may allocate. One without ``mps`` takes turns on the GPU with all others.
    """

    threads: int
    host_bytes: int
    entry: str | None = None
    fraction: float | None = None
    mps: bool = True

    @property
    def environment(self) -> dict[str, str]:
        """Variables to set in the worker, or in what starts it, before it touches CUDA."""
        variables = {"OMP_NUM_THREADS": str(self.threads)}
        if self.entry is not None:
            variables[VISIBLE] = self.entry
        if self.fraction is not None:
            variables[FRACTION] = f"{self.fraction:.6f}"
        if not self.mps:
            variables[MPS] = os.devnull
        return variables


# ---- which device ----


def resolve_device(text: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> ``cpu`` or ``cuda:N``. Raises UsageError.

    ``auto`` is CUDA where the driver shows a GPU. That torch can use it is found out in the case.
    """
    text = wanted_device(text)
    return "cuda:0" if text == "cuda" else text


def wanted_device(text: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> ``cpu``, ``cuda`` (any GPU) or ``cuda:N``.

    N counts the GPUs that are visible, as CUDA does. Raises UsageError.
    """
    text = text.strip().lower()
    if text == "cpu":
        return "cpu"
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", text)
    if match is None and text != "auto":
        raise UsageError(f"device {text!r} is not auto, cpu, cuda or cuda:N")
    visible = visible_gpus()
    if match is None:
        return "cuda" if visible.gpus else "cpu"
    available = len(visible.gpus)
    if int(match[1] or 0) >= available:
        seen = f"{available} visible GPU{'s' if available > 1 else ''}" if available else "no GPU"
        note = f" ({visible.note})" if visible.note else ""
        raise DeviceUnavailable(f"device {text} is not on this machine: NVML shows {seen}{note}")
    return f"cuda:{int(match[1])}" if match[1] else "cuda"


def torch_device(name: str) -> torch.device:
    """The torch device of a resolved name, its memory limited to this worker's share.

    A worker that is pinned to a GPU sees that one alone, whatever number it has for others. Raises
    DeviceUnavailable where torch cannot use it.
    """
    import torch

    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise DeviceUnavailable(
            f"device {name}: this torch ({torch.__version__}) cannot use CUDA here; run with --device cpu"
        )
    is_pinned = len(os.environ.get(VISIBLE, ",").split(",")) == 1
    device = torch.device("cuda:0" if is_pinned else name)
    if text := os.environ.get(FRACTION):
        torch.cuda.set_per_process_memory_fraction(_fraction(text), device)
    return device


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0.0 < fraction <= 1.0:
        raise UsageError(f"{FRACTION}={text!r} is no number above 0 and up to 1")
    return fraction


# ---- how many workers, and what each may use ----


def worker_shares(
    device: str, count: int | None = None, ranks: int = 1, most: int | None = None
) -> list[Share]:
    """The shares of ``count`` workers, or of as many as this machine carries, and ``most`` at the most.

    ``device`` is as ``wanted_device`` gives it: ``cuda`` spreads the workers over every visible GPU.
    ``ranks`` are the processes that each of them starts; on CUDA they take every GPU between them.
    Raises UsageError where ``count`` do not fit, or not one does.
    """
    wanted = wanted_device(device)
    gpus: Sequence[Gpu] = () if wanted == "cpu" else visible_gpus().gpus
    if ":" in wanted:
        gpus = [gpus[int(wanted.partition(":")[2])]]
    return plan_shares(gpus, host.cores(), host.free_memory(), count, ranks, most)


def plan_shares(
    gpus: Sequence[Gpu],
    cores: int,
    host_bytes: int,
    count: int | None = None,
    ranks: int = 1,
    most: int | None = None,
) -> list[Share]:
    """``worker_shares`` for these GPUs (none for the CPU), cores and free bytes of host memory.

    A worker for each core and each ``WORKER_BYTES``, on GPUs for each ``GPU_WORKER_BYTES`` of one of them,
    the next always where it gets most. What remains of cores and memory is divided between the workers.
    """
    number = count or max(1, min(cores, host_bytes // WORKER_BYTES))
    if ranks > 1:
        number = count or (1 if gpus else max(1, number // ranks))
    number = min(number, most or number)
    if number > (fit := host_bytes // LEAST_BYTES):
        free = f"{host_bytes / GIB:.1f} GiB of this machine's memory are free"
        raise UsageError(_too_little(number, fit, free, LEAST_BYTES))
    if not gpus or ranks > 1:
        return [Share(threads, host_bytes // number) for threads in _divided(cores, number, ranks)]
    homes = _homes(gpus, number, GPU_LEAST_BYTES if count else GPU_WORKER_BYTES)
    homes = homes or _homes(gpus, 1, GPU_LEAST_BYTES)
    if len(homes) < (number if count else 1):
        fit = sum(gpu.free // GPU_LEAST_BYTES for gpu in gpus)
        raise UsageError(_too_little(number, fit, "; ".join(map(str, gpus)), GPU_LEAST_BYTES))
    each = host_bytes // len(homes)
    return [
        Share(threads, each, gpus[home].entry, _fraction_of(gpus[home], homes.count(home)))
        for threads, home in zip(_divided(cores, len(homes)), homes, strict=True)
    ]


def _homes(gpus: Sequence[Gpu], number: int, least: int) -> list[int]:
    """The GPU of each of up to ``number`` workers, so that each has ``least`` bytes or more."""
    homes: list[int] = []
    while len(homes) < number:
        shares = [gpu.free // (homes.count(index) + 1) for index, gpu in enumerate(gpus)]
        best = max(range(len(gpus)), key=lambda index: shares[index])
        if shares[best] < least:
            break
        homes.append(best)
    return homes


def _fraction_of(gpu: Gpu, workers: int) -> float:
    """The part of a GPU's whole memory that each of its workers may allocate: together what is free."""
    return (gpu.free // workers - CONTEXT_BYTES) / gpu.total


def _divided(cores: int, workers: int, ranks: int = 1) -> list[int]:
    """Threads for each process of each worker: every core has one as far as ``MOST_THREADS`` allows."""
    each, over = divmod(cores, workers)
    return [max(1, min(MOST_THREADS, (each + (index < over)) // ranks)) for index in range(workers)]


def _too_little(count: int, fit: int, free: str, least: int) -> str:
    if fit:
        asked, remedy = f"{count} workers do not fit, {fit} would", "ask for fewer"
    else:
        asked, remedy = "not one worker fits", "choose another device with --device"
    return f"{asked}: {free}, and each needs {least / GIB:.1f} GiB. Free some, or {remedy}"


def worker_count(device: str, ranks: int = 1) -> int:
    """Workers for ``--jobs auto`` and ``-n auto``. Raises UsageError where not one fits."""
    return len(worker_shares(device, ranks=ranks))


def gpu_count() -> int:
    """GPUs that workers started here may use, within ``CUDA_VISIBLE_DEVICES``."""
    return len(visible_gpus().gpus)


def rank_count(device: str) -> int:
    """Real ranks of one layout that this machine carries: a GPU each, or memory for each on the CPU."""
    if not device.startswith("cuda"):
        return max(2, host.free_memory() // RANK_BYTES)
    gpus = visible_gpus().gpus
    # CUDA shows a process no more than one MIG device.
    return 1 if any(gpu.is_mig for gpu in gpus) else len(gpus)
