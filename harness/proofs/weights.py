"""Weights: a fake-quantized model -> the same in real low-bit weights, as ``mtq.compress`` packs them.

It runs last of all checks, on the model itself: packing throws the bf16 weights away, and a copy of a
model that ModelOpt has converted costs more than the packing. Whether ModelOpt can pack a format is asked
of a copy of one weight's quantizer for each format, before the model is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harness.errors import is_no_verdict
from harness.finding import Finding
from harness.layout_rules import Owner
from harness.proofs.packing import WeightFormat, packed, step, weight_format
from harness.proofs.proof import Proof, finding, judged, said, unsupported
from harness.standins.output import import_foreign

import_foreign()

import modelopt.torch.quantization as mtq  # noqa: E402
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer  # noqa: E402
from modelopt.torch.quantization.qtensor import BaseQuantizedTensor, QTensorWrapper  # noqa: E402

NAME = "weights"

# What a matrix is fake-quantized to, and in which format.
Rounded = Mapping[str, tuple[WeightFormat | None, torch.Tensor]]


def prove_weights(
    model: nn.Module,
    config: Mapping[str, Any],
    run: Callable[[nn.Module], torch.Tensor],
    after: torch.Tensor,
    bound: float,
) -> Proof:
    """Pack the weights of ``model``, in place, and compare bytes, scales and numbers with what is right.

    ``config`` is the one that ModelOpt quantized the model with, ``run`` gives a model's logits and
    ``after`` those before packing. ``bound`` is on the relative error of the logits: packed, they must be
    no farther from the fake-quantized ones than those may be from the unquantized. Each weight must be
    within one step of its format of the fake-quantized one. Unsupported, with ModelOpt's words, where a
    format has no real form; the model is then left as it was.
    """
    refusal = refused(model, config)
    if refusal is not None:
        return unsupported(NAME, Owner.MODELOPT, *refusal)
    before = rounded(model, config)
    if not before:
        return unsupported(NAME, Owner.MODELOPT, "no weight quantizer is on", "no weight to pack")
    mtq.compress(model)
    findings = [*check_packed(model, before)]
    if not findings:
        findings += check_output(after, run(model), bound)
    names = sorted({_name(form) for form, _ in before.values() if form})
    return judged(
        NAME, findings, f"{len(before)} weights packed into {', '.join(names) or 'what no one asked for'}"
    )


def refused(model: nn.Module, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """What ModelOpt says where it cannot pack a weight, or use it packed, and which that is; else None.

    One weight of each format is tried, on a copy of its quantizer, and each whose rows end in a partial
    block.
    """
    tried: set[str] = set()
    for path, module in _matrices(model):
        form = repr([each.extra_repr().partition("amax=")[0] for each in _stages(module.weight_quantizer)])
        if form not in tried:
            tried.add(form)
            words = _refusal(module)
            if words is not None:
                return words, f"{path} has no real form"
    for path, module in _matrices(model):
        meant = weight_format(config, path)
        if meant is not None and _runs_over(module, meant):
            words = "mtq.compress packs all rows as one, so that blocks of "
            words += f"{meant.columns} reach over rows of {module.weight.shape[-1]}"
            return words, f"{path} would share scales between rows"
        if _forgets(module):
            words = "mtq.compress takes the largest number of each block, whatever amax calibration chose"
            return words, f"{path} has amax that calibration chose"
    return None


def _packing(quantizer: Any) -> Any:
    """A copy that packs what it is given in place of rounding it."""
    trial = copy.deepcopy(quantizer)
    for stage in _stages(trial):
        stage._fake_quant = False
    return trial


def _refusal(module: Any) -> str | None:
    quantizer, weight = _packing(module.weight_quantizer), module.weight.detach()
    try:
        with torch.no_grad():
            real = _stages(quantizer)[0](weight)
            used = quantizer(QTensorWrapper(real))
    except Exception as error:
        if is_no_verdict(error):
            raise
        return said(error)
    if isinstance(used, BaseQuantizedTensor):
        # The next stage packs what the first has unpacked, and the product is given no tensor.
        return f"its stages in a row give the matrix product a {type(used).__name__} in place of a tensor"
    return None


def _runs_over(module: Any, form: WeightFormat) -> bool:
    """Whether rows end in a partial block, and the packed weight then is another than the fake-quantized."""
    weight = module.weight.detach()
    if form.columns is None or not weight.shape[-1] % form.columns:
        return False
    first = _stages(module.weight_quantizer)[0]
    packing = _packing(first)
    with torch.no_grad():
        found = packing(QTensorWrapper(packing(weight)))
        return bool(((found.float() - first(weight).float()).abs() > step(form, weight)).any())


def _forgets(module: Any) -> bool:
    """Whether blocks have an amax that is not their largest number, and packing does not look at it."""
    quantizer, weight = _stages(module.weight_quantizer)[0], module.weight.detach()
    amax = getattr(quantizer, "_amax", None)
    width = (quantizer.block_sizes or {}).get(-1) or weight.shape[-1]
    if amax is None or amax.numel() == 1 or weight.shape[-1] % width or _is_tiled(quantizer):
        return False
    largest = weight.float().abs().reshape(amax.numel(), -1).amax(1)
    if torch.allclose(amax.float().flatten(), largest, rtol=2.0**-7):
        return False
    scales = []
    for factor in (1, 2):
        trial = _packing(quantizer)
        trial._amax *= factor
        with torch.no_grad():
            trial(weight)
        scales.append(trial._scale)
    return torch.equal(scales[0].float(), scales[1].float())


def _is_tiled(quantizer: TensorQuantizer) -> bool:
    """Whether blocks reach over rows, so that they do not lie one after the other."""
    return len([axis for axis in quantizer.block_sizes or {} if isinstance(axis, int)]) > 1


def rounded(model: nn.Module, config: Mapping[str, Any]) -> Rounded:
    """Every weight that is quantized, by module path: its format by ``config``, and its fake-quantized self.

    Of stages in a row only the first rounds: packing leaves the others to be done anew.
    """
    with torch.no_grad():
        return {
            path: (weight_format(config, path), _stages(module.weight_quantizer)[0](module.weight.detach()))
            for path, module in _matrices(model)
        }


def _matrices(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled and isinstance(module.weight, torch.Tensor):
            yield path, module


def _stages(quantizer: nn.Module) -> list[TensorQuantizer]:
    return list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]


def check_packed(model: nn.Module, before: Rounded) -> Iterator[Finding]:
    """Findings where a weight is not packed as its format says, or unpacks to other numbers.

    ``before`` is what ``rounded`` gave before the weights were packed.
    """
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if path not in before and isinstance(weight, QTensorWrapper):
            yield finding(
                path, "weight is packed, and was not quantized before", "bf16", str(weight.data.dtype)
            )
    for path, (form, weight) in before.items():
        module = model.get_submodule(path)
        if form is None:
            yield finding(path, "weight is packed, though the config means no weight of it", "bf16", "packed")
        elif not isinstance(module.weight, QTensorWrapper):
            yield finding(path, f"weight is not packed, expected {_name(form)}", _name(form), "bf16")
        else:
            wrong = [*_otherwise_stored(path, module, form, weight)]
            yield from wrong or _other_numbers(path, module, form, weight)


def _otherwise_stored(path: str, module: Any, form: WeightFormat, weight: torch.Tensor) -> Iterator[Finding]:
    quantizer = _stages(module.weight_quantizer)[0]
    tensors = {"weight": module.weight.data}
    tensors |= {name: value for name, value in quantizer.named_buffers() if "scale" in name}
    tensors.pop("_pre_quant_scale", None)
    expected = packed(form, (weight.shape[0], weight.shape[1]), weight.dtype)
    for name in [*expected, *(name for name in tensors if name not in expected)]:
        wanted, found = expected.get(name), tensors.get(name)
        what = name if name == "weight" else f"weight_quantizer.{name}"
        if wanted is None or found is None:
            yield finding(path, f"{what} is {'missing' if wanted else 'there'}, {_name(form)}", wanted, found)
            continue
        same_shape = tuple(found.shape) == wanted.shape
        if name != "weight":
            # Scales of blocks may stand in a column, and one number as a list of one.
            same_shape = found.numel() == torch.Size(wanted.shape).numel()
        if not same_shape or found.dtype != wanted.dtype:
            actual = f"{' x '.join(map(str, found.shape)) or 'one number'} of {str(found.dtype)[6:]}"
            yield finding(path, f"{what} is {actual}, {_name(form)} makes it {wanted}", str(wanted), actual)


def _other_numbers(path: str, module: Any, form: WeightFormat, weight: torch.Tensor) -> Iterator[Finding]:
    with torch.no_grad():
        real = _stages(module.weight_quantizer)[0](module.weight)
    if real.shape != weight.shape or real.dtype != weight.dtype:
        yield finding(path, "weight unpacks to another shape or type", str(weight.shape), str(real.shape))
        return
    beyond = (real.float() - weight.float()).abs() > step(form, weight)
    # A number that is none compares as false.
    wrong = int((beyond | ~torch.isfinite(real)).sum())
    if wrong:
        what = (
            f"weight unpacks to numbers more than a step of {_name(form)} away in {wrong} of {real.numel()}"
        )
        yield finding(path, f"{what} places", 0, wrong)


def check_output(after: torch.Tensor, actual: torch.Tensor, bound: float) -> tuple[Finding, ...]:
    """A finding where the logits with packed weights are farther than ``bound`` from the fake-quantized."""
    error = float((actual.float() - after.float()).norm() / after.float().norm())
    if error <= bound:
        return ()
    what = f"packed weights move the logits by {error:.2g} of their size, expected at most {bound:.2g}"
    return (finding(None, what, f"<= {bound:.2g}", error),)


def _name(form: WeightFormat | None) -> str:
    if form is None:
        return "bf16"
    kind = f"int{form.num_bits}" if isinstance(form.num_bits, int) else "E{}M{}".format(*form.num_bits)
    sizes = [size for size in (form.rows, form.columns) if size is not None]
    if not sizes:
        return f"{kind} under one scale"
    if form.columns is None:
        return f"{kind} with a scale a row"
    return f"{kind} in blocks of {' x '.join(map(str, sizes))}"
