"""Rounding: a recipe and an architecture -> how far the recipe may move the logits, from its formats alone.

Every number format has an error of its own. The errors of weights and of inputs of a matrix product add up
in squares, and so do those of the products that a token passes one after the other; so the bound means the
same for every recipe and every kind of layer. Nothing here knows a recipe by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.inventory import parameters
from harness.recipes import Format, Recipe
from harness.recipes.format import E2M1, E4M3, E8M0
from harness.roles import Role, role_of

if TYPE_CHECKING:
    from harness.architecture import Architecture

# Root mean square of the error, relative to the numbers, of normal numbers in floating-point formats with
# scales that use their range; by (exponent, mantissa) bits. Measured (tests/test_rounding.py).
_FLOATING = {(4, 3): 0.0267, (5, 2): 0.053, (3, 2): 0.053, (2, 3): 0.0267}
# Of E2M1, with its eight magnitudes, the scale of a block counts: E4M3 follows the block's largest number,
# E8M0 only to a power of two.
_E2M1 = {E4M3: 0.0951, E8M0: 0.1158}
# An integer's step is a share of the largest number that has the same scale. Of n normal numbers in a block
# that is about sqrt(2 ln n) standard deviations; of a whole row of weights, or of all, less than these.
_LARGEST_IN_ROW, _LARGEST_IN_WEIGHTS = 4.0, 5.5
# Activations have longer tails, by where they come from: out of a norm 4 to 5.5 standard deviations, out of
# attention 6 to 10, out of a product of two numbers or a square 15 to 18, and out of a mixer that multiplies
# by a gate what it has summed up over the sequence 22 to 37. A matrix has its inputs from one of these.
_LARGEST_FROM_NORM, _LARGEST_FROM_ATTENTION = 6.0, 10.0
_LARGEST_IN_INPUTS = {
    Role.PROJ: _LARGEST_FROM_ATTENTION,
    Role.FC2: 18.0,
    Role.EXPERT_FC2: 18.0,
    Role.SHARED_FC2: 18.0,
    Role.MAMBA_OUT: 32.0,
    Role.DELTA_OUT: 32.0,
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
# A rotation of queries and keys, which also goes on, cancels out in the same way; each side is rounded, and
# measured 0.004 to 0.007 for one attention.
LARGEST_ROTATION_ERROR = 0.012
# GPTQ puts what rounding one column lost into the columns after it: weights, not scales, are what it leaves.
_REWRITING = ("gptq",)

_INPUTS, _WEIGHTS = "input", "weight"
_CACHE = ("q_bmm", "k_bmm", "v_bmm")

# Which of a layer's matrices are passed one after the other; those with the same number stand beside each
# other, and the worst counts.
_TURN = {
    Role.QKV: 0,
    Role.LATENT_DOWN: 0,
    Role.LATENT_UP: 1,
    Role.MAMBA_IN: 0,
    Role.DELTA_IN: 0,
    Role.DELTA_CONV: 1,
    Role.PROJ: 2,
    Role.MAMBA_OUT: 2,
    Role.DELTA_OUT: 2,
    Role.EXPERT_LATENT_IN: 3,
    Role.FC1: 4,
    Role.EXPERT_FC1: 4,
    Role.SHARED_FC1: 4,
    Role.FC2: 5,
    Role.EXPERT_FC2: 5,
    Role.SHARED_FC2: 5,
    Role.EXPERT_LATENT_OUT: 6,
    Role.POSITIONS: 7,
    Role.OUTPUT: 8,
}


def rounding_error(form: Format, largest_input: float | None = None) -> float:
    """The relative error that ``form`` makes of normal numbers, root mean square.

    Those of a matrix, or activations of which the largest is so many standard deviations. An upper bound
    where a scale comes from more numbers than it must.
    """
    if isinstance(form.num_bits, int):
        return _of_integers(form, largest_input)
    if form.num_bits == E2M1:
        scale = form.scale_bits if isinstance(form.scale_bits, tuple) else E8M0
        return _E2M1.get(scale, max(_E2M1.values()))
    if isinstance(form.num_bits, str):
        return _NO_LONGER_SIMILAR  # only its backend knows
    if form.num_bits in _FLOATING:
        return _FLOATING[form.num_bits]
    return 0.212 * math.ldexp(1.0, -form.num_bits[1])


def _of_integers(form: Format, largest_input: float | None) -> float:
    assert isinstance(form.num_bits, int)
    steps = (1 << (form.num_bits - 1)) - 1
    size = math.prod(size for _, size in form.partial_blocks)
    if form.partial_blocks:
        largest = math.sqrt(2 * math.log(size))
        # A power of two leaves up to half of the range unused.
        largest *= math.sqrt(2) if form.scale_bits == E8M0 else 1
    elif largest_input is not None:
        largest = largest_input
    else:
        per_row = form.axis is not None or bool(form.blocks)
        largest = _LARGEST_IN_ROW if per_row else _LARGEST_IN_WEIGHTS
    return largest / (steps * math.sqrt(12))


def in_squares(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error * error for error in errors))


def product_errors(recipe: Recipe, architecture: Architecture) -> tuple[float, ...]:
    """The errors of the products, and of the reads of the cache, that a token passes one after the other.

    Those that the recipe rounds, from embedding to output layer.
    """
    turns: dict[tuple[str, int], float] = {}
    for layer, turn, error in _each(recipe, architecture):
        if error:
            turns[layer, turn] = max(turns.get((layer, turn), 0.0), error)
    return tuple(turns.values())


def _each(recipe: Recipe, architecture: Architecture) -> Iterator[tuple[str, int, float]]:
    for name in parameters(architecture):
        role, path = role_of(name), name.rpartition(".")[0]
        if role not in _TURN or not name.endswith(".weight"):
            continue
        layer = path[: path.find(".", len("decoder.layers.")) + 1] if path.startswith("decoder.") else path
        yield layer, _TURN[role], _of_matrix(recipe, path)
        if role is Role.PROJ:
            yield layer, len(Role), _of_cache(recipe, f"{path.rpartition('.')[0]}.core_attention")


def _of_matrix(recipe: Recipe, path: str) -> float:
    role = role_of(path)
    assert role is not None
    weights, inputs = recipe.formats_of(path, _WEIGHTS), recipe.formats_of(path, _INPUTS)
    largest = _LARGEST_IN_INPUTS.get(role, _LARGEST_FROM_NORM)
    return in_squares([*map(rounding_error, weights), *(rounding_error(each, largest) for each in inputs)])


def _of_cache(recipe: Recipe, path: str) -> float:
    # Values average as they are; an error of a query or a key moves a score of about one by as much.
    return in_squares(
        [
            rounding_error(each, _LARGEST_FROM_ATTENTION)
            for which in _CACHE
            for each in recipe.formats_of(path, which)
        ]
    )


def largest_error(recipe: Recipe, architecture: Architecture) -> float:
    """The bound on the relative error of the logits of such a model."""
    return min(_MARGIN * in_squares(product_errors(recipe, architecture)), _NO_LONGER_SIMILAR)


def largest_error_when_off(recipe: Recipe, architecture: Architecture) -> float:
    """The same with every quantizer off: 0 unless the recipe leaves more than quantizers in the model."""
    if any(algorithm.method in _REWRITING for algorithm in recipe.algorithms):
        return largest_error(recipe, architecture)
    products = len(product_errors(recipe, architecture)) if recipe.folds_scales else 0
    rotations = _rotations(recipe, architecture)
    return in_squares(
        [LARGEST_FOLDING_ERROR * math.sqrt(products), LARGEST_ROTATION_ERROR * math.sqrt(rotations)]
    )


def _rotations(recipe: Recipe, architecture: Architecture) -> int:
    """How many quantizers go on rotating what they no longer round."""
    paths = [name.rpartition(".")[0] for name in parameters(architecture) if name.endswith(".weight")]
    caches = {f"{path.rpartition('.')[0]}.core_attention" for path in paths if role_of(path) is Role.PROJ}
    quantizers = [*((path, which) for path in paths for which in (_WEIGHTS, _INPUTS))]
    quantizers += [(path, which) for path in caches for which in _CACHE]
    return sum(any(form.rotate for form in recipe.formats_of(path, which)) for path, which in quantizers)
