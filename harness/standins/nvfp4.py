"""NVFP4 stand-in: what ModelOpt's dynamic block kernel (``fp4_fake_quant_block``) computes, in plain torch.

Each block of the last dimension has a scale in E4M3 under one scale per tensor, amax / (6 x 448), and its
numbers are rounded to E2M1. ModelOpt's ``NVFP4QTensor``, which packs the format for export, gives the same
numbers, several times slower. The kernel reads past the end of a row as zeros, so a partial last block is
quantized as if padded, without a word; so it is here, and the audit reports the misfit.

The kernel is called without the block size of the recipe: it always takes 16, also where the recipe says 32
and an exported weight would have a scale for every 32. So does this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.standins.patching import patched

E2M1_MAX, E4M3_MAX = 6.0, 448.0
KERNEL_BLOCK_SIZE = 16


def fake_quantize(
    inputs: torch.Tensor, amax: torch.Tensor, block_size: int = KERNEL_BLOCK_SIZE
) -> torch.Tensor:
    """``inputs`` [..., width] rounded to NVFP4, same shape and dtype. ``amax`` is one number."""
    width = inputs.shape[-1]
    padded = torch.nn.functional.pad(inputs, (0, -width % block_size))
    tensor_scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    tensor_scale = torch.where(tensor_scale > 0, tensor_scale, 1e-12)  # as the kernel does
    blocks = padded.float().reshape(-1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * tensor_scale)
    scale = scale.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * tensor_scale
    scale = torch.where(scale >= 1e-5, scale, 1.0)
    return round_to_e2m1(blocks / scale).mul_(scale).view(padded.shape).to(inputs.dtype)[..., :width]


_FLOAT32_EXPONENT = 0x7F800000


def round_to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Float32 ``values`` rounded in place to the nearest number of E2M1, ties to even, beyond it to 6."""
    # With one bit of mantissa, steps are half of the power of two below a number, and below 1 half of 1; the
    # power of two is what the number's exponent bits say alone.
    step = values.abs().clamp_(1.0, E2M1_MAX)
    step.view(torch.int32).bitwise_and_(_FLOAT32_EXPONENT)
    step.mul_(0.5)
    # Halfway goes to the even multiple of the step: to the even mantissa.
    return values.div_(step).round_().mul_(step).clamp_(-E2M1_MAX, E2M1_MAX)


def _instead_of(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``kernel``, except for NVFP4 on tensors that it cannot take."""

    def dynamic_block_quantize(
        inputs: torch.Tensor,
        block_size: int,
        amax: torch.Tensor | None,
        num_bits: int,
        exponent_bits: int,
        scale_num_bits: int,
        scale_exponent_bits: int,
    ) -> torch.Tensor:
        formats = (num_bits, exponent_bits, scale_num_bits, scale_exponent_bits)
        if inputs.is_cuda or amax is None or formats != _NVFP4:
            return kernel(inputs, block_size, amax, *formats)
        return fake_quantize(inputs, amax.amax())

    return dynamic_block_quantize


# E2M1 in 4 bits under E4M3 in 8: (bits, exponent bits) of the numbers, then of the scales.
_NVFP4 = (4, 2, 8, 4)


@contextmanager
def install() -> Iterator[None]:
    from modelopt.torch.quantization import tensor_quant

    seam: Any = tensor_quant
    replacement = _instead_of(seam.dynamic_block_quantize_op)
    with patched(seam, "dynamic_block_quantize_op", replacement):
        yield
