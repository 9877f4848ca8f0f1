"""GPUs: what NVML shows, and which of it CUDA would see within ``CUDA_VISIBLE_DEVICES``.

CUDA is never initialised here, so that a worker can still be pinned to one of them. The rules of the
variable are CUDA's (https://docs.nvidia.com/cuda/cuda-programming-guide/, Environment Variables), and where
that says nothing those that ``torch.cuda.device_count`` follows too.

An index is NVML's, that is nvidia-smi's: by PCI bus. CUDA counts so with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``,
and otherwise from the fastest, which is the same where all are of one kind. Where it may not be the same, an
index that the caller gave is passed on as it is, and any GPU of the machine may be behind it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.errors import DeviceUnavailable
from harness.host import free_memory

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a MIG device of one: bytes free and in all.

    ``entry`` is what names it, alone, in ``CUDA_VISIBLE_DEVICES``, and ``label`` is for people.
    ``capability`` is its compute capability, as (9, 0).
    """

    entry: str
    label: str
    free: int
    total: int
    is_mig: bool = False
    capability: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return f"{self.label}, {self.free / GIB:.1f} of {self.total / GIB:.1f} GiB free"


@dataclass(frozen=True, slots=True)
class Board:
    """A GPU as it is in the machine, whatever the variable says. ``is_split`` is whether it is in MIG mode.

    ``instances`` are its MIG devices: each with GPU instance and compute instance, as ``3/0``.
    """

    uuid: str
    gpu: Gpu
    name: str
    is_split: bool = False
    instances: tuple[tuple[str, Gpu], ...] = ()

    @property
    def usable(self) -> tuple[Gpu, ...]:
        """Whole, or its MIG devices, of which there may be none."""
        return tuple(gpu for _, gpu in self.instances) if self.is_split else (self.gpu,)


@dataclass(frozen=True, slots=True)
class Visible:
    """The GPUs that may be used, in CUDA's order, and what is to be said of those that may not."""

    gpus: tuple[Gpu, ...]
    note: str = ""


def visible_gpus(environ: Mapping[str, str] = os.environ) -> Visible:
    """What a CUDA process started here may use. Raises DeviceUnavailable where NVML fails."""
    return visible_of(read_boards(), environ.get(VISIBLE), environ.get(ORDER) == "PCI_BUS_ID")


# ---- the rules of the variable ----


def visible_of(boards: Sequence[Board], variable: str | None, by_bus: bool = False) -> Visible:
    """The GPUs that ``variable`` leaves. ``by_bus`` is whether CUDA counts as NVML does in any case.

    Unset is every GPU, and every MIG device: CUDA shows a process one MIG device, and each worker is a
    process. A list ends at the first entry that names nothing, and names nothing at all where it repeats a
    device.
    """
    if variable is None:
        return Visible(tuple(gpu for board in boards for gpu in board.usable))
    is_certain = by_bus or len({board.name for board in boards}) <= 1
    found: list[Gpu] = []
    seen: set[str] = set()
    entries = [entry.strip() for entry in variable.split(",")]
    kind = _kind(entries[0])
    for entry in entries:
        named = _named(boards, entry) if _kind(entry) == kind else None
        if named is None:
            reason = f"{VISIBLE}={variable!r} ends at {entry!r}, which names no GPU here"
            return Visible(tuple(found), "" if variable == "" else reason)
        identity, gpu = named
        if identity in seen:
            return Visible((), f"{VISIBLE}={variable!r} names a GPU twice, and CUDA shows none then")
        seen.add(identity)
        if kind == "" and not is_certain:
            every = [other for board in boards for other in board.usable]
            least, most = min(other.free for other in every), max(other.total for other in every)
            lowest = min(other.capability for other in every)
            gpu = replace(gpu, label=f"GPU {entry} of {VISIBLE}", free=least, total=most, capability=lowest)
        # The caller's own words: what they name is the caller's to say.
        found.append(replace(gpu, entry=entry))
    return Visible(tuple(found))


def _kind(entry: str) -> str:
    """A list holds one kind: ``GPU-`` and ``MIG-`` names, or indices."""
    return entry[:4] if entry.startswith(("GPU-", "MIG-")) else ""


def _named(boards: Sequence[Board], entry: str) -> tuple[str, Gpu] | None:
    """The device behind one entry, with what tells it from others; None where it names none, or several."""
    kind = _kind(entry)
    if kind == "MIG-":
        return _mig_named(boards, entry)
    if kind == "GPU-":
        matching = [board for board in boards if board.uuid.startswith(entry)]
    else:
        # CUDA reads the digits that an entry begins with.
        digits = re.match(r"\+?(\d+)", entry)
        matching = list(boards[int(digits.group(1)) :][:1]) if digits else []
    if len(matching) != 1 or not matching[0].usable:
        return None
    # Of a GPU that is split CUDA takes the first MIG device.
    return matching[0].uuid, matching[0].usable[0]


def _mig_named(boards: Sequence[Board], entry: str) -> tuple[str, Gpu] | None:
    """``MIG-<uuid>``, or ``MIG-GPU-<uuid>/<GPU instance>/<compute instance>`` as before driver R470."""
    old = re.fullmatch(r"MIG-(GPU-[^/]+)/(\d+)/(\d+)", entry)
    matching = [
        gpu
        for board in boards
        for place, gpu in board.instances
        if (old and board.uuid.startswith(old[1]) and place == f"{old[2]}/{old[3]}")
        or (not old and gpu.entry.startswith(entry))
    ]
    return (matching[0].entry, matching[0]) if len(matching) == 1 else None


# ---- what NVML shows ----


def read_boards() -> tuple[Board, ...]:
    """Every GPU of this machine, in NVML's order; none where there is no driver.

    Raises DeviceUnavailable where there is one that does not answer.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
            return ()
        raise _unavailable(error) from error
    try:
        return tuple(_board(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        raise _unavailable(error) from error
    finally:
        pynvml.nvmlShutdown()


def _unavailable(error: Exception) -> DeviceUnavailable:
    return DeviceUnavailable(f"NVML cannot say which GPUs there are: {error}; --device cpu does without")


def _board(nvml: Any, index: int) -> Board:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid, name = str(nvml.nvmlDeviceGetUUID(handle)), str(nvml.nvmlDeviceGetName(handle))
    major, minor = map(int, nvml.nvmlDeviceGetCudaComputeCapability(handle))
    whole = Gpu(uuid, f"GPU {index} ({name})", 0, 0, capability=(major, minor))
    if _is_split(nvml, handle):
        return Board(uuid, whole, name, True, tuple(_instances(nvml, handle, index, whole.capability)))
    free, total = _memory(nvml, handle)
    return Board(uuid, replace(whole, free=free, total=total), name)


def _is_split(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError_NotSupported:
        return False


def _instances(nvml: Any, handle: Any, index: int, capability: tuple[int, int]) -> list[tuple[str, Gpu]]:
    found = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError_NotFound:
            continue  # a place that no device takes
        place = f"{nvml.nvmlDeviceGetGpuInstanceId(part)}/{nvml.nvmlDeviceGetComputeInstanceId(part)}"
        label = f"MIG device {number} of GPU {index}"
        uuid = str(nvml.nvmlDeviceGetUUID(part))
        found.append((place, Gpu(uuid, label, *_memory(nvml, part), True, capability)))
    return found


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Bytes free and in all. A GPU without memory of its own has the machine's, and NVML does not say so."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        return free_memory(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(memory.free), int(memory.total)
