"""Calibration: a quantized model -> whether every quantizer has the scales that calibration owes it.

ModelOpt's own amax tells little: an expert that saw no token gets the amax of its neighbours. What each
expert saw is counted beside it (``routing.counting``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from harness.build import by
from harness.finding import Finding
from harness.proofs.proof import Proof, finding, judged
from harness.proofs.quantizers import INPUT, place, quantizers
from harness.recipes import Recipe
from harness.roles import role_of
from harness.standins.output import import_foreign

import_foreign()

from modelopt.torch.quantization.nn import TensorQuantizer  # noqa: E402

NAME = "calibration"


def prove_calibration(
    model: nn.Module,
    recipe: Recipe,
    matrices: Sequence[str],
    seen: Mapping[str, int],
    tokens: int,
    passed_by: Sequence[str] = (),
    values: bool = True,
) -> Proof:
    """Amax of every quantizer, scales of every matrix, and tokens of every expert.

    ``matrices`` are module paths, ``seen`` counts what each expert saw, by path, of so many calibration
    ``tokens``. ``passed_by`` are matrices that Megatron takes the weight of without calling the module, so
    that its quantizers see nothing: ``blocks`` warns of them. Without ``values`` only that something is
    there is checked: where other ranks are simulated, numbers mean nothing.
    """
    findings = [
        *(each for each in check_amax(model, recipe, values) if each.module not in passed_by),
        *check_scales(model, recipe, matrices, values),
    ]
    detail = "nothing to calibrate" if not calibrates(recipe) else f"{_with_amax(model)} amax"
    detail += f", scales of {recipe.algorithm}" if recipe.folds_scales else ""
    if values:
        findings.extend(check_experts(seen, tokens))
        detail += f", every expert saw {min(seen.values())} tokens or more" if seen else ""
    return judged(NAME, findings, detail)


def calibrates(recipe: Recipe) -> bool:
    """Whether the recipe has an algorithm at all; without one every amax is that of the tensor at hand."""
    return any(algorithm.method is not None for algorithm in recipe.algorithms)


def _with_amax(model: nn.Module) -> int:
    return sum(getattr(quantizer, "_amax", None) is not None for _, quantizer in quantizers(model))


def check_experts(seen: Mapping[str, int], tokens: int) -> tuple[Finding, ...]:
    """A finding for every expert that calibration gave no token."""
    return tuple(
        finding(path, f"saw none of the {tokens} calibration tokens", "at least one token", count)
        for path, count in seen.items()
        if count == 0
    )


def check_amax(model: nn.Module, recipe: Recipe, values: bool = True) -> tuple[Finding, ...]:
    """A finding for every quantizer that is on, is calibrated and has no finite positive amax.

    Without ``values`` any amax will do.
    """
    return tuple(_bad_amax(model, values)) if calibrates(recipe) else ()


def _bad_amax(model: nn.Module, values: bool) -> Iterator[Finding]:
    calibrated = [
        (path, quantizer, getattr(quantizer, "_amax", None))
        for path, quantizer in quantizers(model)
        if quantizer.is_enabled and _needs_amax(quantizer)
    ]
    sound = values and _all_positive([amax for *_, amax in calibrated if amax is not None])
    for path, quantizer, amax in calibrated:
        module, attribute = place(path)
        if amax is None:
            yield finding(module, f"{attribute} has no amax: it never saw data", "a positive amax", None)
            continue
        rows = _rows_of_amax(model.get_submodule(module), attribute, quantizer)
        if rows is not None and amax.numel() != rows:
            what = f"{attribute} has {amax.numel()} amax, expected {rows}"
            yield finding(module, what, rows, amax.numel())
        elif values and not sound:
            yield from not_positive(module, f"{attribute} amax", amax)


def _all_positive(values: Sequence[torch.Tensor]) -> bool:
    """Whether every number is finite and positive: one look at all, as most are small."""
    if not values:
        return True
    numbers = torch.cat([each.detach().flatten().float() for each in values])
    return bool((torch.isfinite(numbers) & (numbers > 0)).all())


def _rows_of_amax(module: nn.Module, attribute: str, quantizer: TensorQuantizer) -> int | None:
    """How many numbers the amax of a weight's or an input's quantizer must have; None where it hangs on
    more than the shape of the weight."""
    blocks = {axis: size for axis, size in (quantizer.block_sizes or {}).items() if isinstance(axis, int)}
    dynamic = (quantizer.block_sizes or {}).get("type") == "dynamic"
    if dynamic or (not blocks and quantizer.axis is None):
        return 1  # one scale over the dynamic ones, or one of all
    weight = getattr(module, "weight", None)
    if attribute != "weight_quantizer" or weight is None or weight.dim() != 2:
        return None
    rows, columns = weight.shape
    if not blocks:
        return int(rows) if quantizer.axis in (0, (0,)) else None
    height, width = blocks.get(-2, blocks.get(0, 1)), blocks.get(-1, blocks.get(1))
    if height is None or width is None:
        return None
    return int(-(-rows // height) * -(-columns // width))


def _needs_amax(quantizer: TensorQuantizer) -> bool:
    constant = quantizer._use_constant_amax or quantizer._constant_amax is not None
    return not (quantizer.is_mx_format or quantizer._dynamic or constant)


def check_scales(
    model: nn.Module, recipe: Recipe, matrices: Sequence[str], values: bool = True
) -> tuple[Finding, ...]:
    """Findings where a recipe that folds scales left a matrix without one per input, finite and positive.

    Without ``values`` any number will do.
    """
    return tuple(_bad_scales(model, recipe, matrices, values))


def _bad_scales(model: nn.Module, recipe: Recipe, matrices: Sequence[str], values: bool) -> Iterator[Finding]:
    for path in matrices:
        if not _folds(recipe, path):
            continue
        module = model.get_submodule(path)
        scale = getattr(getattr(module, INPUT, None), "pre_quant_scale", None)
        expected = (module.get_parameter("weight").shape[-1],)
        if scale is None:
            yield finding(path, f"has no pre_quant_scale, expected {by(expected)}", expected, None)
        elif scale.numel() != expected[0]:
            what = f"pre_quant_scale is {by(tuple(scale.shape))}, expected {by(expected)}"
            yield finding(path, what, expected, tuple(scale.shape))
        elif values:
            yield from not_positive(path, "pre_quant_scale", scale)


def _folds(recipe: Recipe, path: str) -> bool:
    """Whether the recipe leaves a scale per input channel of the matrix at ``path``."""
    # SmoothQuant moves the range of quantized inputs; where they are not quantized there is none to move.
    # The depthwise convolution of a mixer is no linear layer.
    if (role := role_of(path)) is not None and role.parent_class is not None:
        return False
    inputs = recipe.formats(path, INPUT)
    return any(
        algorithm.folds_scales
        and not algorithm.skips(path)
        and (algorithm.method != "smoothquant" or bool(inputs))
        for algorithm in recipe.algorithms
    )


def not_positive(module: str | None, what: str, values: torch.Tensor) -> Iterator[Finding]:
    """A finding where a number of ``values`` is not finite and positive."""
    wrong = values.detach().flatten().float()
    wrong = wrong[~(torch.isfinite(wrong) & (wrong > 0))]
    if len(wrong):
        count = f" in {len(wrong)} of {values.numel()} places" if values.numel() > 1 else ""
        first = float(wrong[0])
        message = f"{what} is {first:g}{count}, expected a finite positive number"
        yield finding(module, message, "finite and positive", first)
