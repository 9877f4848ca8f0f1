"""Effect: logits before, after and with every quantizer off -> whether the recipe did what it does, no more.

The bounds follow from the recipe's formats (``rounding.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness.build import by
from harness.finding import Finding
from harness.proofs.proof import Proof, finding, judged
from harness.recipes import Recipe
from harness.rounding import largest_error, largest_error_when_off

if TYPE_CHECKING:
    from harness.architecture import Architecture

NAME = "effect"


def prove_effect(
    recipe: Recipe,
    architecture: Architecture,
    before: torch.Tensor,
    after: torch.Tensor,
    off: torch.Tensor,
) -> Proof:
    """The logits of one model unquantized, quantized, and with its quantizers off, the same tokens each."""
    bound, bound_off = largest_error(recipe, architecture), largest_error_when_off(recipe, architecture)
    findings = [*check_output(recipe, bound, before, after), *check_off(bound_off, before, off)]
    error, error_off = relative_error(before, after), relative_error(before, off)
    when_off = f"{error_off:.2g} of at most {bound_off:.2g}" if error_off else "bit for bit as before"
    moved = "nothing comparable" if error is None else f"{error:.3g}"
    return judged(NAME, findings, f"moved by {moved} of at most {bound:.3g}; quantizers off {when_off}")


def prove_shape(before: torch.Tensor, after: torch.Tensor) -> Proof:
    """Of an output whose numbers have no bound, or no meaning: that its shape is the same."""
    return judged(NAME, check_same_shape(before, after), "output of the same shape")


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float | None:
    """|actual - expected| / |expected|, over all tokens. None where the shapes differ."""
    if expected.shape != actual.shape:
        return None
    wanted, found = expected.float(), actual.float()
    return float((found - wanted).norm() / wanted.norm())


def check_same_shape(before: torch.Tensor, after: torch.Tensor) -> tuple[Finding, ...]:
    """A finding where the quantized model's output has another shape than the unquantized one's."""
    expected, actual = tuple(before.shape), tuple(after.shape)
    if expected == actual:
        return ()
    what = f"the quantized model's output is {by(actual)}, expected {by(expected)}"
    return (finding(None, what, expected, actual),)


def check_output(
    recipe: Recipe, bound: float, before: torch.Tensor, after: torch.Tensor
) -> tuple[Finding, ...]:
    """Findings where the quantized logits have another shape, are not finite, or are not about as far
    from the unquantized ones as the recipe makes them: neither the same nor beyond ``bound``."""
    if after.shape != before.shape:
        expected, actual = tuple(before.shape), tuple(after.shape)
        what = f"quantized logits are {by(actual)}, expected {by(expected)}"
        return (finding(None, what, expected, actual),)
    wrong = int((~torch.isfinite(after)).sum())
    if wrong:
        what = f"{wrong} of {after.numel()} quantized logits are not finite"
        return (finding(None, what, 0, wrong),)
    if torch.equal(before, after):
        return (finding(None, f"{recipe.name} changed no logit at all", "> 0", 0.0),)
    return _beyond(f"{recipe.name} moves the logits by", before, after, bound)


def check_off(bound: float, before: torch.Tensor, off: torch.Tensor) -> tuple[Finding, ...]:
    """A finding where the model with its quantizers off is not what it was before.

    Bit for bit where ``bound`` is 0.
    """
    if torch.equal(before, off):
        return ()
    if bound == 0:
        changed = int((before != off).sum()) if before.shape == off.shape else before.numel()
        message = f"with every quantizer off {changed} of {before.numel()} logits are not what they were"
        return (finding(None, message, 0, changed),)
    return _beyond("with every quantizer off the logits differ by", before, off, bound)


def _beyond(what: str, before: torch.Tensor, after: torch.Tensor, bound: float) -> tuple[Finding, ...]:
    error = relative_error(before, after)
    if error is not None and error <= bound:
        return ()
    amount = "nothing comparable" if error is None else f"{error:.2g} of their size"
    return (finding(None, f"{what} {amount}, expected at most {bound:.2g}", f"<= {bound:.2g}", error),)
