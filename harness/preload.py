"""Preload: what every worker needs, imported once by the fork server they come from.

It should leave CUDA alone: a forked process cannot use a CUDA that its parent has initialised. Where a
library does that all the same, ``HAS_CUDA`` says so, and workers for GPUs are started afresh.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.errors import DeviceUnavailable
from harness.gpus import visible_gpus
from harness.standins.patching import patched

_NAMES = (
    "harness.build",
    "harness.trace",
    "harness.world",
    "harness.quantize",
    "harness.small_model",
    "harness.rank_model",
    "harness.parity.stage",
)


@contextmanager
def told_by_nvml() -> Iterator[None]:
    """While libraries are imported they learn the GPU's compute capability without CUDA.

    ModelOpt asks for it, and has kernels or not. Where GPUs differ it is the lowest, whose kernels are there
    on all of them.
    """
    import torch

    try:
        capabilities = [gpu.capability for gpu in visible_gpus().gpus]
    except DeviceUnavailable:  # said where the device is chosen
        capabilities = []
    real, importing = torch.cuda.get_device_capability, bool(capabilities)

    def capability(device: Any = None) -> tuple[int, int]:
        # A library may keep this function.
        return min(capabilities) if importing else real(device)

    try:
        with patched(torch.cuda, "get_device_capability", capability):
            yield
    finally:
        importing = False


def has_cuda() -> bool:
    """Whether CUDA's driver has been initialised in this process, through torch or not."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0)


# What cannot be imported here fails in the case that needs it, where it is reported.
with told_by_nvml():
    for _name in _NAMES:
        with contextlib.suppress(Exception):
            importlib.import_module(_name)
HAS_CUDA = has_cuda()
