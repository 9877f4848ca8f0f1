"""HF MXFP4: matrices <-> the blocks and scales that gpt-oss is published in.

A block is 32 numbers along a matrix's input dimension: sixteen bytes of two E2M1 numbers each, the earlier
one in the low half, and one byte of scale, a power of two with a bias of 127 (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 32
_LARGEST, _BIAS = 6.0, 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the three lower bits; the fourth is the sign
# The code nearest to a number of as many quarters, which halfway between two is the larger.
_NEAREST = torch.tensor(
    [sum(quarters >= 2 * (low + high) for low, high in pairwise(_MAGNITUDES)) for quarters in range(25)],
    dtype=torch.uint8,
)


def encode(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``matrices`` (.., out, in) as blocks (.., out, in / 32, 16) and scales (.., out, in / 32), both uint8.

    Exact for what ``decode`` gave; else the nearest. Raises ValueError where 32 does not divide the inputs.
    """
    *rows, inputs = matrices.shape
    if inputs % BLOCK:
        raise ValueError(f"{inputs} inputs are no whole blocks of {BLOCK}")
    if len(rows) > 1:
        # One expert at a time: what is computed on the way is far larger than the result.
        each = [encode(matrix) for matrix in matrices]
        return torch.stack([blocks for blocks, _ in each]), torch.stack([scales for _, scales in each])
    blocks = matrices.reshape(*rows, inputs // BLOCK, BLOCK).float()
    mantissas, exponents = torch.frexp(blocks.abs().amax(-1).clamp_min(2.0 ** (1 - _BIAS)))
    # The smallest power of two with which the largest number is at most six: 0.75 is 6 / 8.
    exponents = exponents - 3 + (mantissas > _LARGEST / 8).int()
    scaled = blocks * torch.ldexp(torch.full(exponents.shape, 4.0), -exponents)[..., None]
    codes = _NEAREST[scaled.abs().int()]
    codes |= (scaled < 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + _BIAS).to(torch.uint8)


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """The float32 matrices (.., out, in) of ``blocks`` and ``scales``."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
    numbers = torch.tensor([*_MAGNITUDES, *(-size for size in _MAGNITUDES)])[codes]
    return torch.ldexp(numbers, scales[..., None].int() - _BIAS).flatten(-2)
