"""Hadamard stand-in: the transform of the package fast_hadamard_transform, by plain torch butterflies.

ModelOpt rotates keys and queries with it before it quantizes them, always in blocks of a power of two. The
real one is a CUDA kernel that also sums in float32; the order of its sums is its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

PACKAGE = "fast_hadamard_transform"


def hadamard_transform(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """``x`` [..., width] times Sylvester's Hadamard matrix and ``scale``, same shape and dtype.

    Raises ValueError unless the width is a power of two.
    """
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"the width of a Hadamard transform is a power of two, not {width}")
    y = x.float().reshape(-1, width)
    half = 1
    while half < width:
        first, second = y.reshape(-1, width // (2 * half), 2, half).unbind(2)
        y = torch.stack((first + second, first - second), 2).reshape(-1, width)
        half *= 2
    return (y * scale).reshape(x.shape).to(x.dtype)


@contextmanager
def install() -> Iterator[None]:
    from modelopt.torch.quantization.nn import functional

    module = ModuleType(PACKAGE)
    module.__spec__ = ModuleSpec(PACKAGE, None)
    module.hadamard_transform = hadamard_transform  # type: ignore[attr-defined]
    original = sys.modules.get(PACKAGE)
    sys.modules[PACKAGE] = module
    try:
        yield
    finally:
        if original is None:
            del sys.modules[PACKAGE]
            # ModelOpt imports the package on first use, into its own globals.
            vars(functional).pop(PACKAGE, None)
        else:
            sys.modules[PACKAGE] = original
