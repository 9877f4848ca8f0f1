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
# How far from halfway between two neighbours, in steps of the format, a number may be rounded to either.
# Dividing by a scale is not multiplying by its inverse; and for FP8 the exporter divides in bf16 (torch keeps
# bf16 under a scale without dimensions), which moves a quotient by up to 2**-9 of itself, that is 2**-5 steps.
_HALFWAY = {Kind.FP8: 2.0**-4}
_HALFWAY_OTHERWISE = 2.0**-6
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
                actual = Stored(tuple(found.shape), found.dtype)
                yield finding(name, f"is {actual}, expected {wanted}", str(wanted), str(actual), module)
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
    weights = dict(held(model))

    @cache
    def values(parameter: str) -> torch.Tensor:
        return weights[parameter].detach().cpu()

    @cache
    def rounded(parameter: str) -> torch.Tensor:
        module = model.get_submodule(parameter.rpartition(".")[0])
        quantizer: Any = module.weight_quantizer
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
        yield from _check_weight(one, found, one.counterpart.of(values), one.counterpart.of(rounded))
        yield from _check_scales(one, found, model)


def _check_weight(
    one: Expected, found: Mapping[str, torch.Tensor], original: torch.Tensor, fake: torch.Tensor
) -> Iterator[Finding]:
    assert one.weight is not None
    numbers = stored.decoded(one.weight, found)
    # What is equal in bf16, mostly all, needs no closer look.
    differs = numbers.to(torch.bfloat16) != fake
    if not differs.any():
        return
    step = stored.step(one.weight, fake, found)[differs]
    numbers, original, rounded = numbers[differs], original[differs].float(), fake[differs].float()
    halfway = _HALFWAY.get(one.weight.kind, _HALFWAY_OTHERWISE)
    if one.counterpart.packed:
        # All experts share the largest scale: each is rounded anew, to within half a step of that.
        right = (numbers - original).abs() <= step * (0.5 + halfway)
    else:
        apart = (numbers - rounded).abs()
        either = ((numbers - original).abs() - (rounded - original).abs()).abs() <= halfway * step
        right = (apart <= _BF16_ROUNDING * rounded.abs()) | (either & (apart <= step * (1 + halfway)))
    # A number that is none compares as false.
    wrong = int((~right).sum())
    if wrong:
        what = f"decodes to other numbers than the fake-quantized weight in {wrong} of {fake.numel()} places"
        yield finding(one.counterpart.name, what, 0, wrong, one.counterpart.modules[0])


def _check_scales(
    one: Expected, found: Mapping[str, torch.Tensor], model: torch.nn.Module
) -> Iterator[Finding]:
    assert one.weight is not None
    modules: list[Any] = [model.get_submodule(path) for path in one.counterpart.modules]
    for part, wanted in _scales(one, modules).items():
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


