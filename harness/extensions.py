"""Extensions: ModelOpt's CUDA kernels that are compiled on the machine, before a case's time runs.

ModelOpt compiles each when a quantizer first needs it, which takes a minute or more, once a machine; every
process that needs it meanwhile waits. That is no time of a case, and a case that is ended in it would leave
torch's lock behind, at which every later process waits forever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from harness.case import PARITY, Case
from harness.recipes import Recipe, find_recipe
from harness.recipes.format import E4M3, Format


def load_extensions(case: Case) -> None:
    """Load what the quantizers of the case call, on its device, compiled first where it is not yet.

    What cannot be compiled or loaded, or is not there, the case meets again, and reports.
    """
    if not case.device.startswith("cuda") or case.recipe == PARITY:
        return
    with contextlib.suppress(Exception):
        from harness.devices import torch_device
        from harness.standins.output import import_foreign

        import_foreign()
        torch_device(case.device)
        for name in needed(find_recipe(case.recipe)):
            _load(name)


@cache
def _load(name: str) -> None:
    """Once a process, also where it fails: a compiler that is no good takes as long as one that is."""
    from modelopt.torch.quantization import extensions
    from torch.utils.cpp_extension import _get_build_directory

    from harness.standins.output import captured

    folder = Path(_get_build_directory(f"modelopt_{name}", False))
    with captured(), contextlib.suppress(Exception), alone(folder):
        getattr(extensions, f"get_{name}")(raise_if_failed=True)


def needed(recipe: Recipe) -> tuple[str, ...]:
    """The extensions that ``modelopt.torch.quantization.tensor_quant`` calls for the recipe's formats."""
    formats = {
        each for entry in recipe.entries if entry.enable for each in entry.formats or () if not each.backend
    }
    return tuple(sorted({name for name in map(_extension, formats) if name}))


def _extension(format: Format) -> str | None:
    if format.is_nvfp4:
        return None if _has_nvfp4_kernel() or not format.dynamic else "cuda_ext_mx"
    if format.dynamic:
        return "cuda_ext_mx"
    if isinstance(format.num_bits, int):
        return "cuda_ext"
    return "cuda_ext_fp8" if format.num_bits == E4M3 else None


def _has_nvfp4_kernel() -> bool:
    """Triton's, which needs compute capability 8.9; without it the extension for MX formats does the same."""
    from modelopt.torch.kernels.quantization import gemm

    return hasattr(gemm, "fp4_fake_quant_block")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The harness' only process that builds in ``folder``; a lock of torch's that nobody holds is removed."""
    with (folder / "harness.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        lock = folder / "lock"
        if lock.exists() and not is_open(lock):
            lock.unlink(missing_ok=True)
        yield


def is_open(path: Path) -> bool:
    """Whether a process that can be looked into holds the file open; True where none can be."""
    path, looked = path.resolve(), False
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            for descriptor in (process / "fd").iterdir():
                looked = True
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor) == str(path):
                        return True
    return not looked
