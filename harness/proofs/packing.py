"""Packing: a ModelOpt config and a matrix's shape -> the bytes and scales of the matrix in real low bits.

By arithmetic alone, from the plain values of the config and from the formats' definitions: E4M3 and int8
take a byte a number, E2M1 and int4 half of one. Nothing here asks ModelOpt's classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

_E4M3, _E8M0 = (4, 3), (8, 0)  # (exponent, mantissa) bits, as ModelOpt writes them
# Largest number, and the step between the smallest ones: of E4M3, and of E2M1 (OCP 8-bit and MX formats).
_LARGEST = {(4, 3): 448.0, (2, 1): 6.0}
_SMALLEST_STEP = {(4, 3): 2.0**-9, (2, 1): 0.5}
# A scale and a product are rounded to bf16, of eight significant bits, once each.
_BF16_ROUNDING = 2.0**-8


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What a config makes of a weight: bits of a number, and which numbers share a scale.

    ``rows`` and ``columns`` are the size of a block; None is the whole matrix. ``scale_bits`` is None for a
    scale in the weight's own type.
    """

    num_bits: int | tuple[int, int]
    rows: int | None
    columns: int | None
    scale_bits: tuple[int, int] | None = None

    @property
    def bits(self) -> int:
        return self.num_bits if isinstance(self.num_bits, int) else 1 + sum(self.num_bits)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor's shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape)) or "one number"
        return f"{shape} of {str(self.dtype).removeprefix('torch.')}"


def weight_format(config: Mapping[str, Any], matrix: str) -> WeightFormat | None:
    """What ModelOpt's ``config`` packs the weight of the module path ``matrix`` into; None where it is off.

    Of formats in a row the first: it is the one that the numbers are stored in. The last entry that fits
    decides; one without a format switches the one before on or off.
    """
    # What no entry matches ModelOpt leaves on, int8 with a scale a row.
    found: Mapping[str, Any] = {"num_bits": 8, "axis": 0}
    on = True
    for entry in config["quant_cfg"]:
        if "parent_class" in entry or not fnmatchcase(f"{matrix}.weight_quantizer", entry["quantizer_name"]):
            continue
        settings = entry.get("cfg")
        if settings is not None:
            found = settings[0] if isinstance(settings, list) else settings
        on = entry.get("enable", True)
    return _format(found) if on else None


def _format(settings: Mapping[str, Any]) -> WeightFormat:
    blocks = settings.get("block_sizes") or {}
    num_bits = settings.get("num_bits", 8)
    num_bits = num_bits if isinstance(num_bits, int) else tuple(num_bits)
    if blocks:
        scale = blocks.get("scale_bits")
        rows, columns = blocks.get(-2, blocks.get(0, 1)), blocks.get(-1, blocks.get(1))
        return WeightFormat(num_bits, rows, columns, tuple(scale) if scale else None)
    # Axis 0 gives each row a scale of its own.
    return WeightFormat(num_bits, 1 if settings.get("axis") in (0, (0,), [0]) else None, None)


def packed(form: WeightFormat, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
    """What stands for a weight of ``shape`` and ``dtype``: ``weight``, ``_scale``, maybe ``_double_scale``.

    A scale's shape is that of its blocks, or one number; [blocks, 1] counts as the same as [rows, blocks
    of a row].
    """
    rows, columns = shape
    numbers = (rows, columns if form.bits == 8 else math.ceil(columns * form.bits / 8))
    number_type = torch.uint8
    if form.bits == 8:
        number_type = torch.int8 if isinstance(form.num_bits, int) else torch.float8_e4m3fn
    blocks = (_blocks(rows, form.rows), _blocks(columns, form.columns))
    scales = blocks if (form.rows, form.columns) != (None, None) else ()
    stored = {"weight": Stored(numbers, number_type)}
    if form.scale_bits == _E8M0:
        stored["_scale"] = Stored(scales, torch.uint8)
    elif form.scale_bits == _E4M3:
        stored["_scale"] = Stored(scales, torch.float8_e4m3fn)
        stored["_double_scale"] = Stored((), torch.float32)
    else:
        stored["_scale"] = Stored(scales, dtype)
    return stored


def _blocks(size: int, block: int | None) -> int:
    return 1 if block is None else math.ceil(size / block)


def step(form: WeightFormat, weight: torch.Tensor) -> torch.Tensor:
    """How far a number of ``weight`` [rows, columns], rounded to ``form``, may be from another rounding.

    One step of the format, as both lie on its grid, and what rounding scales and products to bf16 adds.
    """
    magnitude, largest = weight.float().abs(), _largest_of_block(form, weight.float())
    if isinstance(form.num_bits, int):
        apart = largest / (2 ** (form.num_bits - 1) - 1)
    else:
        relative = math.ldexp(1.0, -form.num_bits[1])
        lowest = largest * (_SMALLEST_STEP[form.num_bits] / _LARGEST[form.num_bits])
        apart = torch.maximum(magnitude * relative, lowest)
    bound: torch.Tensor = apart * (1 + 4 * _BF16_ROUNDING) + 4 * _BF16_ROUNDING * magnitude
    return bound


def _largest_of_block(form: WeightFormat, weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each number's block, [rows, columns]."""
    rows, columns = weight.shape
    height, width = form.rows or rows, form.columns or columns
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % width, 0, -rows % height))
    blocks = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
    largest: torch.Tensor = blocks.amax((1, 3), keepdim=True).expand_as(blocks)
    whole: torch.Tensor = largest.reshape(padded.shape)
    return whole[:rows, :columns]
