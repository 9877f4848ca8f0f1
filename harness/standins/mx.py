"""Block format stand-in: what ModelOpt's CUDA extension (``fused_amax_convert``) computes, in plain torch.

Each block of the last dimension shares a scale and its numbers are rounded to a small format, ties to even.
In the MX formats the scale is the least power of two under which the largest number of the block fits, as
NVIDIA computes it; OCP's rule would saturate instead. Where a tensor has a calibrated amax, the scale is
rounded to a format of its own under one scale per tensor. The extension reads past the end of a row as
zeros, so a partial last block is quantized as if padded.

Two things differ. The extension is compiled with fast division: where a block's amax over the largest
number of the format is within two units in the last place of a power of two, its scale may be twice or half
of this one. And it makes a number of what is not one; here it stays NaN, for the checks to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from harness.standins.patching import patched

BLOCK_SIZES = (8, 16, 32)
_SCALE_EXPONENTS = (-127, 127)


@dataclass(frozen=True, slots=True)
class SmallFormat:
    """A format's largest number, the exponent below which its numbers are evenly spaced, and its mantissa."""

    largest: float
    least_exponent: int
    mantissa_bits: int


# By (bits, exponent bits), as ModelOpt's operator takes them; the integer has the spacing of one binade.
FORMATS: Mapping[tuple[int, int], SmallFormat] = {
    (8, 4): SmallFormat(448.0, -6, 3),
    (8, 5): SmallFormat(57344.0, -14, 2),
    (6, 3): SmallFormat(28.0, -2, 2),
    (6, 2): SmallFormat(7.5, 0, 3),
    (4, 2): SmallFormat(6.0, 0, 1),
    (4, 1): SmallFormat(3.5, 1, 2),
    (8, 0): SmallFormat(127.0, 6, 6),
}
_E8M0 = (9, 8)  # ModelOpt counts a sign bit that the format does not have.


def fake_quantize(
    inputs: torch.Tensor,
    block_size: int,
    numbers: SmallFormat,
    scales: SmallFormat | None = None,
    amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """``inputs`` [..., width] with each block rounded to ``numbers``, same shape and dtype.

    ``scales`` and ``amax``, one number, go together; without them the scale is a power of two. Raises
    ValueError, as the extension does, for a block size that it was not compiled for.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError("Blocksize for fused call must be one of {8, 16, 32}")
    width = inputs.shape[-1]
    padded = torch.nn.functional.pad(inputs, (0, -width % block_size)).float()
    blocks = padded.reshape(-1, block_size)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(max=torch.finfo(torch.float32).max)
    if scales is None or amax is None:
        unscale = _power_of_two(largest, numbers)
    else:
        unscale = _two_level(largest, amax, numbers, scales)
    # A block of zeros has a scale of one; one whose scale was rounded to zero becomes zeros.
    unscale = torch.where(largest > 0, unscale, 1.0)
    rounded = round_to(blocks / torch.where(unscale > 0, unscale, 1.0), numbers) * unscale
    return rounded.view(padded.shape).to(inputs.dtype)[..., :width]


def round_to(values: torch.Tensor, numbers: SmallFormat) -> torch.Tensor:
    """Float32 ``values`` rounded to the nearest number of the format, ties to even; beyond, its largest."""
    values = values.clamp(-numbers.largest, numbers.largest)
    # What is left of a float32 without its sign and mantissa is the power of two below it.
    binade = (values.view(torch.int32) & 0x7F80_0000).view(torch.float32)
    step = binade.clamp_(min=2.0**numbers.least_exponent).mul_(2.0**-numbers.mantissa_bits)
    return (values / step).round_().mul_(step)


def _power_of_two(largest: torch.Tensor, numbers: SmallFormat) -> torch.Tensor:
    mantissa, exponent = torch.frexp(largest / numbers.largest)
    # frexp's mantissa is from one half on: of a power of two it is one half exactly.
    return _two_to((exponent - (mantissa == 0.5).int()).clamp(*_SCALE_EXPONENTS))


def _two_to(exponent: torch.Tensor) -> torch.Tensor:
    # In float64 the least powers of two that float32 knows are no special case.
    return torch.pow(2.0, exponent.double()).float()


def _two_level(
    largest: torch.Tensor, amax: torch.Tensor, numbers: SmallFormat, scales: SmallFormat
) -> torch.Tensor:
    tensor_scale = scales.largest * (numbers.largest / amax.float()).double()
    rounded = round_to((largest / numbers.largest * tensor_scale).float(), scales)
    usable = torch.isfinite(amax) & (amax > 0)
    return torch.where(usable, (rounded / tensor_scale).float(), 1.0)


def _instead_of(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``kernel``, except for formats of the extension on tensors that it cannot take."""

    def dynamic_block_quantize(
        inputs: torch.Tensor,
        block_size: int,
        amax: torch.Tensor | None,
        num_bits: int,
        exponent_bits: int,
        scale_num_bits: int,
        scale_exponent_bits: int,
    ) -> torch.Tensor:
        numbers = FORMATS.get((num_bits, exponent_bits))
        scale_bits = (scale_num_bits, scale_exponent_bits)
        scales = FORMATS.get(scale_bits)
        if inputs.is_cuda or numbers is None or (scale_bits != _E8M0 and (scales is None or amax is None)):
            return kernel(inputs, block_size, amax, num_bits, exponent_bits, *scale_bits)
        if scale_bits == _E8M0 or amax is None:
            return fake_quantize(inputs, block_size, numbers)
        return fake_quantize(inputs, block_size, numbers, scales, amax.amax())

    return dynamic_block_quantize


@contextmanager
def install() -> Iterator[None]:
    from modelopt.torch.quantization import tensor_quant

    seam: Any = tensor_quant
    with patched(seam, "dynamic_block_quantize_op", _instead_of(seam.dynamic_block_quantize_op)):
        yield
