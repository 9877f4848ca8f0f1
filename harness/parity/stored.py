"""Stored: a recipe's formats and a matrix's shape -> the tensors that stand for it in an exported checkpoint,
and what they decode to.

By arithmetic alone, from the definitions of the formats: E4M3 and int8 take a byte a number, E2M1 and int4
half of one. ModelOpt's unified checkpoint keeps two columns of E2M1 in a byte, the first in the lower half,
and of int4 two rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from harness.proofs.packing import Stored
from harness.recipes import Format

E4M3_MAX, E2M1_MAX = 448.0, 6.0
_LARGEST = {(4, 3): E4M3_MAX, 8: 127.0, 4: 7.0}


class NotKnown(Exception):
    """A format that this module has no arithmetic for; the text says which."""


class Kind(StrEnum):
    """How a weight is stored, in the words of a checkpoint's ``quant_algo``."""

    FP8 = "FP8"
    FP8_ROWS = "FP8_PER_CHANNEL_PER_TOKEN"
    NVFP4 = "NVFP4"
    NVFP4_WEIGHTS = "W4A16_NVFP4"
    INT4 = "W4A16_AWQ"
    INT8 = "W8A8_SQ_PER_CHANNEL"
    INT8_WEIGHTS = "W8A16"


@dataclass(frozen=True, slots=True)
class Weight:
    """A quantized weight: its kind, the size of its blocks (0 where it has none), and what its inputs
    become, None where they stay as they are. ``scaled`` says that calibration moves a scale per input
    channel into it."""

    kind: Kind
    block: int
    inputs: Format | None
    scaled: bool = False


def weight_of(weights: tuple[Format, ...], inputs: tuple[Format, ...], scaled: bool) -> Weight | None:
    """What the formats of a module's weight and input make of it; None where its weight is not quantized.

    Raises NotKnown.
    """
    if not weights:
        return None
    form, given = weights[0], inputs[0] if inputs else None
    plain = not form.blocks and not form.more_blocks
    kind = None
    if len(weights) == 1 and len(inputs) <= 1:
        if form.num_bits == (4, 3) and plain and form.axis is None:
            kind = Kind.FP8
        elif form.num_bits == (4, 3) and plain and form.axis == 0:
            kind = Kind.FP8_ROWS
        elif form.is_nvfp4 and (given is None or given.is_nvfp4):
            kind = Kind.NVFP4 if given else Kind.NVFP4_WEIGHTS
        elif form.num_bits == 4 and form.block_size and given is None:
            kind = Kind.INT4
        elif form.num_bits == 8 and plain and form.axis == 0:
            kind = Kind.INT8 if given else Kind.INT8_WEIGHTS
    if kind is None:
        words = ", then ".join(map(str, weights)) + (f" with inputs {given}" if given else "")
        raise NotKnown(words)
    return Weight(kind, form.block_size or 0, given, scaled)


def tensors(weight: Weight, shape: tuple[int, ...]) -> dict[str, Stored]:
    """What stands for a matrix of ``shape`` [rows, columns], by the last part of its name.

    One number is a tensor without dimensions, or of one, which every reader takes for the same.
    """
    *more, rows, columns = shape
    number, kind, made = Stored((), torch.float32), weight.kind, {}
    if kind in (Kind.FP8, Kind.FP8_ROWS):
        made["weight"] = Stored(shape, torch.float8_e4m3fn)
        made["weight_scale"] = number if kind is Kind.FP8 else Stored((*more, rows), torch.float32)
    elif kind in (Kind.NVFP4, Kind.NVFP4_WEIGHTS):
        made["weight"] = Stored((*more, rows, columns // 2), torch.uint8)
        made["weight_scale"] = Stored((*more, rows, columns // weight.block), torch.float8_e4m3fn)
        made["weight_scale_2"] = number
    elif kind is Kind.INT4:
        made["weight"] = Stored((*more, rows // 2, columns), torch.uint8)
        made["weight_scale"] = Stored((*more, rows, columns // weight.block), torch.float32)
    else:
        made["weight"] = Stored(shape, torch.int8)
        made["weight_scale"] = Stored((*more, rows), torch.float32)
    if weight.inputs is not None and weight.inputs.needs_amax:
        made["input_scale"] = number
    if weight.scaled:
        made["pre_quant_scale"] = Stored((columns,), torch.bfloat16)
    return made


def rows_of(weight: Weight, found: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of some ``rows`` of the matrix, indices that go in pairs."""
    some = dict(found)
    packed = rows[::2] // 2 if weight.kind is Kind.INT4 else rows
    some["weight"] = found["weight"][..., packed, :]
    if weight.block:
        some["weight_scale"] = found["weight_scale"][..., rows, :]
    elif weight.kind is not Kind.FP8:
        some["weight_scale"] = found["weight_scale"][..., rows]
    return some


def decoded(weight: Weight, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The numbers [rows, columns] in float32 that stored tensors, of the shapes above, stand for."""
    packed, scale = found["weight"], found["weight_scale"].float()
    if weight.kind is Kind.FP8:
        return packed.float() * scale
    if weight.kind in (Kind.FP8_ROWS, Kind.INT8, Kind.INT8_WEIGHTS):
        return packed.float() * scale[..., None]
    halves = packed & 0xF, packed >> 4
    if weight.kind is Kind.INT4:
        numbers = torch.stack(halves, -2).flatten(-3, -2).float()
        numbers = torch.where(numbers > 7, numbers - 16, numbers)
    else:
        numbers = _e2m1(torch.stack(halves, -1).flatten(-2))
        scale = scale * found["weight_scale_2"].float()
    return numbers * scale.repeat_interleave(weight.block, -1)


def _e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The numbers of four bits: sign, two of exponent, one of mantissa."""
    exponent, mantissa = (codes >> 1) & 3, (codes & 1).float()
    normal = torch.exp2(exponent.float() - 1) * (1 + mantissa / 2)
    numbers = torch.where(exponent > 0, normal, mantissa / 2)
    return torch.where(codes > 7, -numbers, numbers)


def step(weight: Weight, numbers: torch.Tensor, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The distance between neighbours of the format at each of ``numbers`` [rows, columns]."""
    scale = found["weight_scale"].float()
    if weight.kind in (Kind.NVFP4, Kind.NVFP4_WEIGHTS):
        scale = scale * found["weight_scale_2"].float()
    if weight.block:
        scale = scale.repeat_interleave(weight.block, -1)
    elif weight.kind is not Kind.FP8:
        scale = scale[..., None]
    if weight.kind in (Kind.INT4, Kind.INT8, Kind.INT8_WEIGHTS):
        return scale.expand_as(numbers)
    smallest, mantissa = (2.0**-6, 3) if weight.kind in (Kind.FP8, Kind.FP8_ROWS) else (1.0, 1)
    power = torch.exp2(torch.floor(torch.log2((numbers.abs() / scale).clamp_min(smallest))))
    return power * 2.0**-mantissa * scale


def weight_scale(weight: Weight, amax: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Name and value of the scale that a calibrated ``amax`` of the whole matrix, of its rows or of its
    blocks comes to."""
    if weight.kind in (Kind.NVFP4, Kind.NVFP4_WEIGHTS):
        return "weight_scale_2", amax.float().amax() / (E2M1_MAX * E4M3_MAX)
    largest = _LARGEST[{Kind.FP8: (4, 3), Kind.FP8_ROWS: (4, 3), Kind.INT4: 4}.get(weight.kind, 8)]
    return "weight_scale", amax.float() / largest


def input_scale(form: Format, amax: torch.Tensor) -> torch.Tensor:
    """What a calibrated ``amax`` of inputs comes to: one number."""
    largest = E2M1_MAX * E4M3_MAX if form.is_nvfp4 else _LARGEST[form.num_bits]
    return amax.float().amax() / largest
