"""Devices: which device a case runs on, and how many workers this machine carries.

Asking about GPUs goes through NVML and never initialises CUDA, so that a worker can still be pinned.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from harness.errors import DeviceUnavailable, UsageError

if TYPE_CHECKING:
    import torch

# What one worker needs: torch, Megatron and ModelOpt resident, and a tiny model.
WORKER_BYTES = 4 << 30
GPU_WORKER_BYTES = 6 << 30
# A rank shares what is imported with the process that it was forked from.
RANK_BYTES = 1 << 30


def resolve_device(text: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> ``cpu`` or ``cuda:N``. Raises UsageError.

    ``auto`` is CUDA where the driver shows a GPU. That torch can use it is found out in the case.
    """
    text = text.strip().lower()
    if text == "cpu":
        return "cpu"
    if text == "auto":
        return "cuda:0" if gpu_count() else "cpu"
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", text)
    if match is None:
        raise UsageError(f"device {text!r} is not auto, cpu, cuda or cuda:N")
    index, available = int(match.group(1) or 0), gpu_count()
    if index >= available:
        seen = f"{available} visible GPU{'s' if available > 1 else ''}" if available else "no GPU"
        raise DeviceUnavailable(f"device {text} is not on this machine: NVML shows {seen}")
    return f"cuda:{index}"


def torch_device(name: str) -> torch.device:
    """The torch device of a resolved name. Raises DeviceUnavailable where torch cannot use it."""
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceUnavailable(
            f"device {name}: this torch ({torch.__version__}) cannot use CUDA here; run with --device cpu"
        )
    return torch.device(name)


def gpu_count() -> int:
    """GPUs that a CUDA process started here would see, within ``CUDA_VISIBLE_DEVICES``."""
    return len(free_gpu_memory())


def free_gpu_memory() -> tuple[int, ...]:
    """Free bytes of each visible GPU, in CUDA's order; empty where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        memory = [
            int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).free)
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(memory)
    chosen = []
    for entry in filter(None, (entry.strip() for entry in visible.split(","))):
        if not entry.isdigit():
            # A UUID or MIG name: CUDA resolves it; count it with the smallest memory there is.
            chosen.append(min(memory, default=0))
        elif int(entry) < len(memory):
            chosen.append(memory[int(entry)])
        else:
            break  # CUDA stops at the first entry that it does not know
    return tuple(chosen)


def worker_count(device: str, ranks: int = 1) -> int:
    """Workers for ``--jobs auto`` and ``-n auto``: by the memory of the device, and the cores.

    ``ranks`` are the processes that each of them starts; on CUDA they take every GPU between them.
    """
    if ranks > 1:
        return 1 if device.startswith("cuda") else max(1, worker_count(device) // ranks)
    cores = len(os.sched_getaffinity(0))
    by_memory = max(1, _free_memory() // WORKER_BYTES)
    if device.startswith("cuda"):
        free = free_gpu_memory()
        index = int(device.partition(":")[2] or 0)
        by_memory = min(by_memory, max(1, free[index] // GPU_WORKER_BYTES if index < len(free) else 1))
    return int(min(cores, by_memory))


def rank_count(device: str) -> int:
    """Real ranks of one layout that this machine carries: a GPU each, or memory for each on the CPU."""
    if device.startswith("cuda"):
        return gpu_count()
    return max(2, _free_memory() // RANK_BYTES)


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
