"""NVFP4 stand-in: ModelOpt's ``NVFP4QTensor``, packed and unpacked, for its dynamic block kernel.

ModelOpt packs the format for export in plain torch, by other code than the CUDA kernel that fakes it
(``fp4_fake_quant_block``); both give each block of the last dimension a scale in E4M3 under one scale
per tensor, amax / (6 x 448), and round to E2M1. The kernel reads past the end of a row as zeros, so a
partial last block is quantized as if padded, without a word; so it is here, and the audit reports the
misfit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.standins.patching import patched

_E2M1_MAX, _E4M3_MAX = 6.0, 448.0


def fake_quantize(inputs: torch.Tensor, amax: torch.Tensor, block_size: int = 16) -> torch.Tensor:
    """``inputs`` [..., width] rounded to NVFP4, same shape and dtype. ``amax`` is one number."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    width = inputs.shape[-1]
    padded = torch.nn.functional.pad(inputs, (0, -width % block_size))
    tensor_scale = amax.float() / (_E2M1_MAX * _E4M3_MAX)
    tensor_scale = torch.where(tensor_scale > 0, tensor_scale, 1e-12)  # as the kernel does
    packed, scale, tensor_scale = NVFP4QTensor.quantize(
        padded, block_size, weights_scaling_factor_2=tensor_scale
    )
    rounded: torch.Tensor = packed.dequantize(
        dtype=inputs.dtype, scale=scale, double_scale=tensor_scale, block_sizes={-1: block_size}
    )
    return rounded[..., :width]


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
        return fake_quantize(inputs, amax.amax(), block_size)

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
