from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from harness.errors import UnknownRecipe
from harness.recipes import DEFAULT_RECIPES, RECIPES, Format, Recipe, find_recipe, recipe_name
from harness.standins.output import import_foreign

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def config(recipe: Recipe) -> dict[str, Any]:
    import_foreign()
    import modelopt.torch.quantization as mtq

    found: dict[str, Any] = getattr(mtq, recipe.config_name)
    return found


def formats(recipe: Recipe, quantizer: str) -> tuple[Format, ...]:
    """The formats that ModelOpt's config gives a quantizer, the last entry for it deciding."""
    entries = [entry for entry in config(recipe)["quant_cfg"] if entry["quantizer_name"] == quantizer]
    cfg = entries[-1].get("cfg") if entries and entries[-1].get("enable", True) else None
    stages = cfg if isinstance(cfg, list) else [cfg] if cfg else []
    return tuple(
        Format(
            stage["num_bits"],
            (stage.get("block_sizes") or {}).get(-1),
            (stage.get("block_sizes") or {}).get("type") == "dynamic",
            stage.get("axis"),
        )
        for stage in stages
    )


@every_recipe
def test_row_is_what_modelopt_holds(recipe: Recipe) -> None:
    assert formats(recipe, "*weight_quantizer") == recipe.weights
    assert formats(recipe, "*input_quantizer") == ((recipe.inputs,) if recipe.inputs else ())
    algorithm = config(recipe)["algorithm"]
    assert (algorithm["method"] if isinstance(algorithm, dict) else algorithm) == recipe.algorithm
    assert recipe.folds_scales == recipe.algorithm.startswith(("awq", "smoothquant"))


@every_recipe
def test_modelopt_offers_the_config(recipe: Recipe) -> None:
    import_foreign()
    import modelopt.torch.quantization as mtq

    assert recipe.config_name in mtq.config.choices


@every_recipe
def test_found_by_every_spelling(recipe: Recipe) -> None:
    for text in (recipe.name, recipe.name.upper(), recipe.config_name, recipe.config_name.lower()):
        assert find_recipe(text) is recipe
    assert recipe_name(recipe.config_name) == recipe.name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVFP4_DEFAULT_CFG", "nvfp4"),
        ("NVFP4_SVDQUANT_DEFAULT_CFG", "nvfp4_svdquant"),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_2d_blockwise_weight_only"),
        (" int4-awq ", "int4_awq"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert recipe_name(text) == name


def test_default_recipes_are_recipes() -> None:
    assert [find_recipe(name).name for name in DEFAULT_RECIPES] == list(DEFAULT_RECIPES)


def test_block_sizes() -> None:
    assert {recipe.name: recipe.block_sizes for recipe in RECIPES} == {
        "fp8": (),
        "int8_smoothquant": (),
        "int4_awq": (128,),
        "w4a8_awq_beta": (128,),
        "nvfp4": (16,),
    }


def test_unknown_recipe_names_the_near_ones() -> None:
    with pytest.raises(UnknownRecipe) as raised:
        find_recipe("int4_aqw")
    assert str(raised.value) == "no recipe is called 'int4_aqw'; did you mean int4_awq?"


def test_unknown_recipe_near_nothing_lists_all() -> None:
    with pytest.raises(UnknownRecipe) as raised:
        find_recipe("zzz")
    assert str(raised.value) == (
        "no recipe is called 'zzz'; known: fp8, int8_smoothquant, int4_awq, w4a8_awq_beta, nvfp4"
    )


def test_imports_without_torch() -> None:
    code = "import sys, harness.recipes; assert not {'torch', 'modelopt'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
