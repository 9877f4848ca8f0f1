"""Exported: the checkpoint that ModelOpt wrote, read back -> where it is not what is expected.

Names, shapes and types against ``expected.py``; numbers and scales against Megatron's fake-quantized model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from harness.finding import Finding
from harness.parity import stored
from harness.parity.counterparts import held
from harness.parity.expected import Expected, finding
from harness.parity.stored import Kind
from harness.proofs.packing import Stored

# A fake-quantized weight is rounded to bf16, of eight significant bits, once; decoding rounds nothing.
_BF16_ROUNDING = 2.0**-8
# How far from halfway between two neighbours, in steps of the format, a number may be rounded to either, as
# dividing by a scale is not multiplying by its inverse: what rounding to bf16 moves the fake-quantized one
# by, of so many steps. FP8 has 16; and its quotient the exporter rounds to bf16 too (torch keeps bf16 under
# a scale without dimensions), by 2**-5 steps, which counts twice: nearer to one, farther from the other.
_HALFWAY = {
    Kind.FP8: 2.0**-4 + 2 * 2.0**-5,
    Kind.FP8_ROWS: 2.0**-4,
    Kind.NVFP4: 2.0**-6,
    Kind.NVFP4_WEIGHTS: 2.0**-6,
    Kind.INT4: 2.0**-5,
    Kind.INT8: 0.5,
    Kind.INT8_WEIGHTS: 0.5,
}
# Numbers of a matrix that are looked at, in pairs of rows evenly over it: weights are random, so that a wrong
# layout, order or scale shows in any of them.
_LOOKED_AT = 1 << 16
# Two divisions of float32.
_SCALE_ROUNDING = 2.0**-22


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An exported folder: its tensors by name, the file that the index has for each, its two configs.

    ``quantization`` is what ``hf_quant_config.json`` says, None where there is none; ``config`` is
    ``config.json``.
    """

    tensors: Mapping[str, torch.Tensor]
    files: Mapping[str, str]
    index: Mapping[str, str]
    quantization: Mapping[str, Any] | None
    config: Mapping[str, Any]


def read(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``. Raises OSError or ValueError where a file is missing or no JSON."""
    from safetensors import safe_open

    tensors, files = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensors[name], files[name] = opened.get_tensor(name), file.name
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    beside = folder / "hf_quant_config.json"
    quantization = json.loads(beside.read_bytes())["quantization"] if beside.is_file() else None
    return Checkpoint(tensors, files, index, quantization, json.loads((folder / "config.json").read_bytes()))


def check_tensors(checkpoint: Checkpoint, expecteds: Sequence[Expected]) -> Iterator[Finding]:
    """Findings where a tensor is missing, is not expected, has another shape or type, or is not indexed."""
    known: set[str] = set()
    for one in expecteds:
        known.update(one.stored)
        for name, wanted in one.stored.items():
            found = checkpoint.tensors.get(name)
            module = one.counterpart.modules[0]
            if found is None:
                yield finding(name, f"is missing, expected {wanted}", str(wanted), None, module)
            elif not _same_shape(found, wanted) or found.dtype != wanted.dtype:
                actual = str(Stored(tuple(found.shape), found.dtype))
                yield finding(name, f"is {actual}, expected {wanted}", str(wanted), actual, module)
    for name, found in checkpoint.tensors.items():
        if name not in known:
            actual = str(Stored(tuple(found.shape), found.dtype))
            yield finding(name, f"is {actual}, and no such tensor is expected", None, actual)
    for name in sorted(checkpoint.files.keys() | checkpoint.index.keys()):
        file, indexed = checkpoint.files.get(name), checkpoint.index.get(name)
        if file != indexed:
            what = f"stands in {file or 'no file'}, and the index has {indexed or 'nothing of it'}"
            yield finding(name, what, file, indexed)


def _same_shape(found: torch.Tensor, wanted: Stored) -> bool:
    if not wanted.shape:
        return found.numel() == 1
    return tuple(found.shape) == wanted.shape


def check_numbers(
    checkpoint: Checkpoint, expecteds: Sequence[Expected], model: torch.nn.Module
) -> Iterator[Finding]:
    """Findings where numbers or scales are not the model's. Of tensors that are there as expected alone."""
    weights, modules = dict(held(model)), dict(model.named_modules())

    @cache
    def values(parameter: str) -> torch.Tensor:
        return weights[parameter].detach().cpu()

    @cache
    def rounded(parameter: str) -> torch.Tensor:
        quantizer: Any = modules[parameter.rpartition(".")[0]].weight_quantizer
        with torch.no_grad():
            fake: torch.Tensor = quantizer(weights[parameter].detach())
        return fake.cpu()

    for one in expecteds:
        if any(
            name not in checkpoint.tensors
            or not _same_shape(checkpoint.tensors[name], wanted)
            or checkpoint.tensors[name].dtype != wanted.dtype
            for name, wanted in one.stored.items()
            if not name.endswith("pre_quant_scale")
        ):
            continue
        found = {
            part: checkpoint.tensors[name].cpu()
            for part, name in one.parts.items()
            if name in checkpoint.tensors
        }
        module = one.counterpart.modules[0]
        if one.weight is None:
            wanted = one.counterpart.of(values).to(found["weight"].dtype).reshape(one.shape)
            wrong = int((wanted != found["weight"]).sum())
            if wrong:
                what = f"differs from Megatron's weight in {wrong} of {wanted.numel()} places"
                yield finding(one.counterpart.name, what, 0, wrong, module)
            continue
        original = one.counterpart.of(values)
        # All experts of a packed tensor share the largest scale, so that each is rounded anew.
        fake = original if one.counterpart.packed else one.counterpart.of(rounded)
        yield from _check_weight(one, found, original, fake)
        yield from _check_scales(one, found, modules)


def _check_weight(
    one: Expected, found: Mapping[str, torch.Tensor], original: torch.Tensor, fake: torch.Tensor
) -> Iterator[Finding]:
    assert one.weight is not None
    rows = _some_rows(original)
    found = stored.rows_of(one.weight, found, rows)
    original, fake = original[..., rows, :], fake[..., rows, :]
    numbers = stored.decoded(one.weight, found)
    # What is equal in bf16, mostly all, needs no closer look.
    differs = numbers.to(torch.bfloat16) != fake
    if not differs.any():
        return
    # At a power of two, rounding to bf16 may leave one of the two where the steps are half as long.
    step = stored.step(one.weight, torch.maximum(numbers.abs(), fake.float().abs()), found)[differs]
    numbers, first, rounded = numbers[differs], original[differs].float(), fake[differs].float()
    halfway = _HALFWAY[one.weight.kind]
    if one.counterpart.packed:
        right = (numbers - first).abs() <= step * (0.5 + halfway)
    else:
        apart = (numbers - rounded).abs()
        either = ((numbers - first).abs() - (rounded - first).abs()).abs() <= halfway * step
        right = (apart <= _BF16_ROUNDING * rounded.abs()) | (either & (apart <= step * (1 + halfway)))
    # A number that is none compares as false.
    wrong = int((~right).sum())
    if wrong:
        what = "decodes to other numbers than the fake-quantized weight"
        what += f" in {wrong} of {fake.numel()} places looked at"
        yield finding(one.counterpart.name, what, 0, wrong, one.counterpart.modules[0])


def _some_rows(weight: torch.Tensor) -> torch.Tensor:
    """Indices of rows of [..., rows, columns], two by two as int4 packs them, all where they are few."""
    rows, columns = weight.shape[-2:]
    pairs = max(1, _LOOKED_AT // (2 * columns))
    first = 2 * torch.linspace(0, max(rows // 2 - 1, 0), min(pairs, max(rows // 2, 1))).long()
    return torch.stack((first, first + 1), 1).flatten() if rows > 1 else first


def _check_scales(
    one: Expected, found: Mapping[str, torch.Tensor], modules: Mapping[str, Any]
) -> Iterator[Finding]:
    assert one.weight is not None
    for part, wanted in _scales(one, [modules[path] for path in one.counterpart.modules]).items():
        actual = found.get(part)
        if actual is None:
            continue
        actual = actual.float()
        wanted = wanted.float().cpu().reshape(actual.shape)
        wrong = int((~((actual - wanted).abs() <= _SCALE_ROUNDING * wanted.abs())).sum())
        if not wrong:
            continue
        if wanted.numel() == 1:
            what = f"is {actual.item():.6g}, and calibration comes to {wanted.item():.6g}"
            values: tuple[float, float] = (wanted.item(), actual.item())
        else:
            what = f"is not what calibration comes to in {wrong} of {wanted.numel()} places"
            values = (0, wrong)
        yield finding(one.parts[part], what, *values, one.counterpart.modules[0])


def _scales(one: Expected, modules: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What the scales should be, by part, from the amax of the quantizers of ``modules``.

    Of a packed tensor, the largest of all experts.
    """
    assert one.weight is not None
    scales: dict[str, list[torch.Tensor]] = {}
    for module in modules:
        amax = module.weight_quantizer.amax.detach()
        if amax.numel() > 1 and "2" not in stored.weight_scale(one.weight, amax)[0]:
            rows = module.weight.shape[0]
            amax = one.counterpart.part(amax.reshape(rows, -1))
        name, value = stored.weight_scale(one.weight, amax)
        scales.setdefault(name, []).append(value)
        if "input_scale" in one.parts and one.weight.inputs is not None:
            given = module.input_quantizer.amax.detach()
            scales.setdefault("input_scale", []).append(stored.input_scale(one.weight.inputs, given))
        if "pre_quant_scale" in one.parts:
            scales.setdefault("pre_quant_scale", []).append(module.input_quantizer.pre_quant_scale.detach())
    return {name: torch.stack(each).amax(0) for name, each in scales.items()}
