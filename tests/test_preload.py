"""The preload: what is imported before workers are forked learns of a GPU, and none is touched.

Each in a process of its own, as what is imported stays.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# torch as it is on a machine with two GPUs, as far as imports ask; what initialises CUDA ends the process.
WITH_GPU = """
import os
import harness.fork_server
import torch
from harness import gpus

def touched(*args, **more):
    os.write(os.open(os.environ["TOUCHED"], os.O_WRONLY | os.O_CREAT), b"CUDA was initialised")
    os._exit(9)

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda._lazy_init = touched
original = torch.cuda.get_device_capability
gpus.read_boards = lambda: (
    gpus.Board("GPU-aa", gpus.Gpu("GPU-aa", "GPU 0", 1, 1, capability=(9, 0)), "NVIDIA H100"),
    gpus.Board("GPU-bb", gpus.Gpu("GPU-bb", "GPU 1", 1, 1, capability=LOWEST), "NVIDIA other"),
)
import harness.preload
from modelopt.torch.kernels.quantization import gemm
assert gemm.IS_AVAILABLE
assert torch.cuda.get_device_capability is original
with open(os.environ["TOUCHED"], "w") as told:
    print(hasattr(gemm, "fp4_fake_quant_block"), harness.preload.HAS_CUDA, file=told)
"""


def ran(code: str, tmp_path: Path) -> tuple[int, str]:
    """The exit code, and what it said; it has no standard output."""
    told = tmp_path / "told"
    environment = {**os.environ, "TOUCHED": str(told)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=300)
    return done.returncode, told.read_text() if told.exists() else ""


@pytest.mark.parametrize(("lowest", "kernel"), [((8, 9), True), ((8, 0), False)])
def test_modelopt_has_the_kernels_of_the_lowest_gpu(
    tmp_path: Path, lowest: tuple[int, int], kernel: bool
) -> None:
    assert ran(WITH_GPU.replace("LOWEST", str(lowest)), tmp_path) == (0, f"{kernel} False\n")


def test_an_import_that_initialises_cuda_would_be_seen(tmp_path: Path) -> None:
    code = WITH_GPU.replace("LOWEST", "(8, 9)").replace(
        "import harness.preload\n", "import harness.preload\ntorch.cuda.init()\n"
    )
    assert ran(code, tmp_path) == (9, "CUDA was initialised")


KEPT = """
import sys, torch
from harness import gpus
from harness.preload import told_by_nvml
torch.cuda.get_device_capability = lambda device=None: (7, 5)
gpus.read_boards = lambda: (gpus.Board("GPU-aa", gpus.Gpu("GPU-aa", "", 1, 1, capability=(9, 0)), ""),)
with told_by_nvml():
    kept = torch.cuda.get_device_capability
    assert kept() == (9, 0)
assert kept("cuda:0") == torch.cuda.get_device_capability() == (7, 5)
"""


def test_what_a_library_keeps_is_torchs_own_afterwards(tmp_path: Path) -> None:
    assert ran(KEPT, tmp_path)[0] == 0


DRIVER = """
import ctypes, sys
from harness.preload import has_cuda

class Driver:
    def __init__(self, code):
        self.code = code
    def cuDeviceGetCount(self, count):
        return self.code

def missing(name):
    raise OSError(name)

found = []
for ctypes.CDLL in (missing, lambda name: Driver(3), lambda name: Driver(0)):
    found.append(has_cuda())
assert found == [False, False, True], found
"""


def test_that_the_driver_is_initialised_is_asked_of_the_driver(tmp_path: Path) -> None:
    assert ran(DRIVER, tmp_path)[0] == 0
