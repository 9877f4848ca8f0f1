"""Rounding: how far a recipe may move a model's logits, and how far it did.

The bound follows from the recipe and the number of matrix products that a token passes, so that it means
the same for every kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from harness.build import by
from harness.finding import Finding, Severity
from harness.layers import MoE
from harness.recipes import Recipe

if TYPE_CHECKING:
    from harness.architecture import Architecture

# Relative error of one matrix product whose inputs and weights a recipe rounds, both normal; int8, whose
# step is the largest number's share, errs by more where activations have long tails (squared ReLU).
PRODUCT_ERROR: Mapping[str, float] = {
    "fp8": 0.0374,
    "int8_smoothquant": 0.0167,
    "int4_awq": 0.117,
    "w4a8_awq_beta": 0.119,
    "nvfp4": 0.134,
}
# Were nothing but rounded products in the way of a token, their errors would add up in squares. The residual
# stream, which no recipe rounds, keeps the sum below that: 0.4 to 0.95 of it in forty models of every kind
# of layer. A wrong format or scale is off by a multiple.
_MARGIN = 1.2
# An output that has nothing to do with the right one is off by about 1.4.
_NO_LONGER_SIMILAR = 1.0

# AWQ and SmoothQuant multiply weights by a scale and divide activations by it, which ModelOpt goes on
# doing with its quantizers off. In exact arithmetic nothing changes; in bf16 each product is rounded
# once more. Measured 0.0025 to 0.005 for one product.
LARGEST_FOLDING_ERROR = 0.006


def products(architecture: Architecture) -> int:
    """Quantized matrix products that a token passes one after the other, from embedding to output layer."""
    total = 0
    for layer in architecture.layers:
        if layer.mixer is not None:
            total += 2  # into the mixer and out of it; the down-projections of latent attention stay
        if layer.mlp is not None:
            latent = isinstance(layer.mlp, MoE) and layer.mlp.latent_size is not None
            total += 4 if latent else 2
    return total


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float | None:
    """|actual - expected| / |expected|, over all tokens. None where the shapes differ."""
    if expected.shape != actual.shape:
        return None
    wanted, found = expected.float(), actual.float()
    return float((found - wanted).norm() / wanted.norm())


def largest_error(recipe: Recipe, products: int) -> float:
    """The bound on the relative error of the logits of a model with so many products in a row."""
    return min(_MARGIN * PRODUCT_ERROR[recipe.name] * math.sqrt(products), _NO_LONGER_SIMILAR)


def check_output(
    recipe: Recipe, products: int, before: torch.Tensor, after: torch.Tensor
) -> tuple[Finding, ...]:
    """Findings where the quantized logits have another shape, are not finite, or are not about as far
    from the unquantized ones as the recipe makes them: neither the same nor beyond its bound."""
    if after.shape != before.shape:
        expected, actual = tuple(before.shape), tuple(after.shape)
        what = f"quantized logits are {by(actual)}, expected {by(expected)}"
        return (_finding(what, expected, actual),)
    wrong = int((~torch.isfinite(after)).sum())
    if wrong:
        what = f"{wrong} of {after.numel()} quantized logits are not finite"
        return (_finding(what, 0, wrong),)
    if torch.equal(before, after):
        return (_finding(f"{recipe.name} changed no logit at all", "> 0", 0.0),)
    bound = largest_error(recipe, products)
    return _beyond(f"{recipe.name} moves the logits by", before, after, bound)


def check_off(recipe: Recipe, products: int, before: torch.Tensor, off: torch.Tensor) -> tuple[Finding, ...]:
    """A finding where the model with its quantizers off is not what it was before.

    Bit for bit, except where the recipe folded scales into the weights (see LARGEST_FOLDING_ERROR).
    """
    what = "with every quantizer off the logits differ by"
    bound = LARGEST_FOLDING_ERROR * math.sqrt(products) if recipe.folds_scales else 0.0
    if torch.equal(before, off):
        return ()
    if not recipe.folds_scales:
        changed = int((before != off).sum()) if before.shape == off.shape else before.numel()
        message = f"with every quantizer off {changed} of {before.numel()} logits are not what they were"
        return (_finding(message, 0, changed),)
    return _beyond(what, before, off, bound)


def _beyond(what: str, before: torch.Tensor, after: torch.Tensor, bound: float) -> tuple[Finding, ...]:
    error = relative_error(before, after)
    if error is not None and error <= bound:
        return ()
    amount = "nothing comparable" if error is None else f"{error:.2g} of their size"
    return (_finding(f"{what} {amount}, expected at most {bound:.2g}", f"<= {bound:.2g}", error),)


def _finding(what: str, expected: Any, actual: Any) -> Finding:
    return Finding("quantize", Severity.ERROR, what, expected=expected, actual=actual)
