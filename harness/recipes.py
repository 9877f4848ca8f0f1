"""Recipe names -> what each recipe quantizes, and in what blocks.

A row restates one ModelOpt config as data, so that the audit can do arithmetic without importing torch;
``tests/test_recipes.py`` compares every row with the config that ModelOpt really holds. A recipe's name
is its config's, lower-case, without ``_DEFAULT`` and ``_CFG``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from harness.errors import UnknownRecipe


@dataclass(frozen=True, slots=True)
class Format:
    """One quantizer: what a number becomes, and which numbers share a scale.

    ``num_bits`` is ModelOpt's: an integer, or (exponent, mantissa). ``block_size`` counts elements of
    the last dimension (the input dimension of a weight); None means no blocks. A *static* block keeps
    a calibrated scale each, and its dimension is zero-padded to whole blocks; a *dynamic* one gets
    its scale from the data, under one calibrated scale per tensor. ``axis`` is the dimension that has
    a scale per index; None with no blocks means one scale per tensor.
    """

    num_bits: int | tuple[int, int]
    block_size: int | None = None
    dynamic: bool = False
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A ModelOpt quantization config by name.

    ``weights`` holds one format per stage: a weight may be quantized twice in a row. ``inputs`` is
    None where activations stay as they are. ``folds_scales`` says that calibration moves a scale per
    input channel from the activations into the weights (AWQ, SmoothQuant).
    """

    name: str
    config_name: str
    weights: tuple[Format, ...]
    inputs: Format | None
    algorithm: str
    folds_scales: bool
    source: str

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Sizes that the input dimension of a weight must be a multiple of, without repeats, ascending."""
        return tuple(sorted({f.block_size for f in self.blocked_formats if f.block_size is not None}))

    @property
    def blocked_formats(self) -> tuple[Format, ...]:
        """The formats of weights and inputs with blocks, each block size once, those of weights first."""
        formats = (*self.weights, *((self.inputs,) if self.inputs else ()))
        by_size: dict[int, Format] = {}
        for entry in formats:
            if entry.block_size is not None:
                by_size.setdefault(entry.block_size, entry)
        return tuple(by_size.values())


_E4M3 = Format((4, 3))
_INT4_BLOCKS = Format(4, block_size=128)
_NVFP4_BLOCKS = Format((2, 1), block_size=16, dynamic=True)
_SOURCE = "modelopt.torch.quantization.config"

RECIPES: tuple[Recipe, ...] = (
    Recipe("fp8", "FP8_DEFAULT_CFG", (_E4M3,), _E4M3, "max", False, _SOURCE),
    Recipe(
        "int8_smoothquant",
        "INT8_SMOOTHQUANT_CFG",
        (Format(8, axis=0),),
        Format(8),
        "smoothquant",
        True,
        _SOURCE,
    ),
    Recipe("int4_awq", "INT4_AWQ_CFG", (_INT4_BLOCKS,), None, "awq_lite", True, _SOURCE),
    Recipe("w4a8_awq_beta", "W4A8_AWQ_BETA_CFG", (_INT4_BLOCKS, _E4M3), _E4M3, "awq_lite", True, _SOURCE),
    Recipe("nvfp4", "NVFP4_DEFAULT_CFG", (_NVFP4_BLOCKS,), _NVFP4_BLOCKS, "max", False, _SOURCE),
)

# Per-tensor, dynamic blocks and static blocks: each takes a different path through ModelOpt.
DEFAULT_RECIPES = ("fp8", "nvfp4", "int4_awq")


def recipe_name(text: str) -> str:
    """The name that a config name or a user's spelling stands for (``NVFP4_DEFAULT_CFG`` -> ``nvfp4``)."""
    return re.sub(r"_default(?=_|$)|_cfg$", "", text.strip().lower().replace("-", "_"))


def find_recipe(text: str) -> Recipe:
    """The recipe of that name, upper or lower case, or of that config name. Raises UnknownRecipe."""
    known = {recipe.name: recipe for recipe in RECIPES}
    name = recipe_name(text)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
    raise UnknownRecipe(f"no recipe is called {text!r}; {hint}")
