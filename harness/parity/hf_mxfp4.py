"""HF MXFP4: matrices <-> the blocks and scales that gpt-oss is published in.

A block is 32 numbers along a matrix's input dimension: sixteen bytes of two E2M1 numbers each, the earlier
one in the low half, and one byte of scale, a power of two with a bias of 127 (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
_LARGEST, _BIAS = 6.0, 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the three lower bits; the fourth is the sign


def encode(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``matrices`` (.., out, in) as blocks (.., out, in / 32, 16) and scales (.., out, in / 32), both uint8.

    Exact for what ``decode`` gave; else the nearest. Raises ValueError where 32 does not divide the inputs.
    """
    *rows, inputs = matrices.shape
    if inputs % BLOCK:
        raise ValueError(f"{inputs} inputs are no whole blocks of {BLOCK}")
    blocks = matrices.reshape(*rows, inputs // BLOCK, BLOCK).float()
    largest = blocks.abs().amax(-1).clamp_min(2.0 ** (1 - _BIAS))
    exponents = torch.ceil(torch.log2(largest / _LARGEST))
    scaled = torch.ldexp(blocks, -exponents[..., None].to(torch.int32))
    between = [(low + high) / 2 for low, high in zip(_MAGNITUDES, _MAGNITUDES[1:], strict=False)]
    codes = torch.bucketize(scaled.abs(), torch.tensor(between)).to(torch.uint8)
    codes |= (scaled < 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + _BIAS).to(torch.uint8)


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """The float32 matrices (.., out, in) of ``blocks`` and ``scales``."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
    numbers = torch.tensor([*_MAGNITUDES, *(-size for size in _MAGNITUDES)])[codes]
    return torch.ldexp(numbers, scales[..., None].int() - _BIAS).flatten(-2)
