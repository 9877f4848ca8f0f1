"""Recipes: names -> what each recipe quantizes, in what format and in what blocks.

Read from the files of the installed ModelOpt, without importing it: the configs of
``modelopt.torch.quantization.config.choices``, the PTQ recipes that ModelOpt ships, a user's own YAML.
``tests/test_recipes.py`` compares each with what ModelOpt itself makes of it.
"""

from __future__ import annotations

from harness.recipes.catalogue import (
    DEFAULT_RECIPES,
    config_names,
    find_recipe,
    names,
    recipe_name,
    recipes,
    shipped,
)
from harness.recipes.format import Format
from harness.recipes.recipe import Algorithm, Entry, Quantizer, Recipe, combined

__all__ = [
    "DEFAULT_RECIPES",
    "RECIPES",
    "Algorithm",
    "Entry",
    "Format",
    "Quantizer",
    "Recipe",
    "combined",
    "config_names",
    "find_recipe",
    "names",
    "recipe_name",
    "recipes",
    "shipped",
]

RECIPES: tuple[Recipe, ...]


def __getattr__(name: str) -> object:
    """``RECIPES``, every recipe that ``all`` means, read when it is first asked for."""
    if name == "RECIPES":
        return recipes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
