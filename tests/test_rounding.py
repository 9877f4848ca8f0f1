from __future__ import annotations

import pytest
import torch
from small_models import MODELS, model_of

from harness.recipes import RECIPES, Recipe, find_recipe
from harness.rounding import PRODUCT_ERROR, largest_error, products, relative_error
from harness.standins.nvfp4 import fake_quantize
from harness.standins.output import import_foreign

import_foreign()


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
    assert products(model_of(MODELS[name])) == count


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


def untouched(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize(
    ("name", "inputs", "weights"),
    [
        ("fp8", per_tensor_fp8, per_tensor_fp8),
        ("int4_awq", untouched, int4_blocks),
        ("w4a8_awq_beta", per_tensor_fp8, int4_blocks),
        ("nvfp4", nvfp4, nvfp4),
        ("int8_smoothquant", int8, lambda x: int8(x, (1,))),
    ],
)
def test_the_error_of_one_product_is_the_formats(name: str, inputs: object, weights: object) -> None:
    assert callable(inputs) and callable(weights)
    x, weight = numbers(1), numbers(2)
    error = relative_error(x @ weight.T, inputs(x) @ weights(weight).T)
    margin = 0.3 if name == "int8_smoothquant" else 0.02  # int8 hangs on the largest number of all
    assert error == pytest.approx(PRODUCT_ERROR[name], rel=margin)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_bound_grows_with_products_and_never_loses_its_meaning(recipe: Recipe) -> None:
    one = largest_error(recipe, 1)
    assert one == pytest.approx(1.2 * PRODUCT_ERROR[recipe.name])
    assert largest_error(recipe, 4) == pytest.approx(2 * one)
    assert largest_error(recipe, 10_000) == 1.0


def test_every_recipe_has_an_error() -> None:
    assert PRODUCT_ERROR.keys() == {recipe.name for recipe in RECIPES}
    assert largest_error(find_recipe("fp8"), 8) < largest_error(find_recipe("nvfp4"), 8)


def test_relative_error() -> None:
    ones = torch.ones(1, 3, 4)
    assert relative_error(ones, ones) == 0
    assert relative_error(ones, ones * 1.5) == pytest.approx(0.5)
    one_token_elsewhere = torch.cat([ones[:, :2], -ones[:, 2:]], dim=1)
    assert relative_error(ones, one_token_elsewhere) == pytest.approx(2 / 3**0.5)
    assert relative_error(ones, ones[:, :2]) is None
