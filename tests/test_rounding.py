from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from small_models import DENSE, MODELS, SPARSE, model_of

from harness.proofs.effect import relative_error
from harness.recipes import RECIPES, Format, Recipe, find_recipe
from harness.recipes.format import E2M1, E4M3, E8M0
from harness.rounding import (
    LARGEST_FOLDING_ERROR,
    in_squares,
    largest_error,
    largest_error_when_off,
    product_errors,
    rounding_error,
)
from harness.standins.mx import FORMATS
from harness.standins.mx import fake_quantize as mx
from harness.standins.nvfp4 import fake_quantize
from harness.standins.output import import_foreign

import_foreign()

FP8 = find_recipe("fp8")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("latent attention", 8),  # two layers: up-projections beside each other, out, and two of each expert
        ("sinks and windows", 8),
        ("Mamba and latent experts", 2 + 4 + 2 + 4),  # M E * E
        ("Mamba and MLP", 5 * 2),
        ("gated delta net", 4 * 2),
        ("LayerNorm less one", 8),
    ],
)
def test_products_in_a_row(name: str, count: int) -> None:
    assert len(product_errors(FP8, model_of(MODELS[name]))) == count


@pytest.mark.parametrize(
    ("recipe", "flags", "count"),
    [
        ("nvfp4_experts_only", SPARSE, 2 * 2),
        ("nvfp4_experts_only", DENSE, 0),
        ("nvfp4_mlp_only", DENSE, 2 * 2),
        ("fp8+fp8_kv", DENSE, 2 * (4 + 1)),  # each read of the cache is one more
        ("fp8_kv", DENSE, 2 * (4 + 1) + 1),  # and the output layer, by default
        ("mamba_moe_fp8_conservative", MODELS["Mamba and MLP"], 2 * 2),
    ],
)
def test_only_what_the_recipe_rounds_counts(recipe: str, flags: str, count: int) -> None:
    assert len(product_errors(find_recipe(recipe), model_of(flags))) == count


def numbers(seed: int) -> torch.Tensor:
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))


def per_tensor_fp8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().max() / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def int4_blocks(x: torch.Tensor) -> torch.Tensor:
    blocks = x.view(512, -1, 128)
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    return ((blocks / scale).round().clamp(-8, 7) * scale).view(512, 512)


def nvfp4(x: torch.Tensor) -> torch.Tensor:
    return fake_quantize(x, x.abs().max())


def int8(x: torch.Tensor, dim: tuple[int, ...] = (0, 1)) -> torch.Tensor:
    scale = x.abs().amax(dim, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127) * scale


E2M1_MX = Format(E2M1, 32, True, scale_bits=E8M0)
ROUNDED: dict[str, tuple[Format, Callable[[torch.Tensor], torch.Tensor]]] = {
    "e4m3": (Format(E4M3), per_tensor_fp8),
    "int4 in blocks": (Format(4, 128), int4_blocks),
    "nvfp4": (Format(E2M1, 16, True, scale_bits=E4M3), nvfp4),
    "mxfp4": (E2M1_MX, lambda x: mx(x, 32, FORMATS[4, 2])),
    "mxfp6": (Format((3, 2), 32, True, scale_bits=E8M0), lambda x: mx(x, 32, FORMATS[6, 3])),
    "mxfp8": (Format(E4M3, 32, True, scale_bits=E8M0), lambda x: mx(x, 32, FORMATS[8, 4])),
    "mxint8": (Format(8, 32, True, scale_bits=E8M0), lambda x: mx(x, 32, FORMATS[8, 0])),
    "int8 a row": (Format(8, axis=0), lambda x: int8(x, (1,))),
    "int8": (Format(8), int8),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_the_error_of_a_format_is_measured(name: str) -> None:
    form, rounded = ROUNDED[name]
    x = numbers(1)
    error = relative_error(x, rounded(x))
    # The table is on the safe side, and means something.
    assert error is not None and 0.6 * rounding_error(form) < error < 1.02 * rounding_error(form)


def test_errors_of_weights_and_inputs_add_up_in_squares() -> None:
    x, weight = numbers(1), numbers(2)
    product = x @ weight.T
    error = relative_error(product, nvfp4(x) @ int4_blocks(weight).T)
    alone = [
        relative_error(product, nvfp4(x) @ weight.T) or 0,
        relative_error(product, x @ int4_blocks(weight).T) or 0,
    ]
    assert error == pytest.approx(in_squares(alone), rel=0.02)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_has_a_bound_that_means_something(recipe: Recipe) -> None:
    small = model_of(SPARSE)
    assert 0 < largest_error(recipe, small) < 0.7
    assert largest_error(recipe, small) == pytest.approx(1.2 * in_squares(product_errors(recipe, small)))


def test_the_bound_grows_with_products_and_never_loses_its_meaning() -> None:
    two, eight = (model_of(DENSE.replace("--num-layers 2", f"--num-layers {n}")) for n in (2, 8))
    assert largest_error(FP8, eight) == pytest.approx(2 * largest_error(FP8, two))
    many = model_of(DENSE.replace("--num-layers 2", "--num-layers 400"))
    assert largest_error(find_recipe("nvfp4"), many) == 1.0


@pytest.mark.parametrize(
    ("recipe", "bound"),
    [
        ("fp8", 0.0),
        ("nvfp4_four_over_six", 0.0),
        ("nvfp4_awq_clip", 0.0),
        ("int4_awq", LARGEST_FOLDING_ERROR * math.sqrt(8)),
        ("fp8+fp8_kv", 0.0),
    ],
)
def test_off_is_exact_unless_more_than_quantizers_is_left(recipe: str, bound: float) -> None:
    assert largest_error_when_off(find_recipe(recipe), model_of(DENSE)) == pytest.approx(bound)


def test_weights_that_are_rewritten_and_rotations_are_left() -> None:
    small = model_of(DENSE)
    gptq, rotated = find_recipe("nvfp4_default-kv_none-gptq"), find_recipe("nvfp4_kv_rotate")
    assert largest_error_when_off(gptq, small) == largest_error(gptq, small)
    assert 0 < largest_error_when_off(rotated, small) < 0.05


def test_relative_error() -> None:
    ones = torch.ones(1, 3, 4)
    assert relative_error(ones, ones) == 0
    assert relative_error(ones, ones * 1.5) == pytest.approx(0.5)
    one_token_elsewhere = torch.cat([ones[:, :2], -ones[:, 2:]], dim=1)
    assert relative_error(ones, one_token_elsewhere) == pytest.approx(2 / 3**0.5)
    assert relative_error(ones, ones[:, :2]) is None
