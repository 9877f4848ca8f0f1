"""Blocks: an architecture, a layout and a recipe -> the dimensions that the recipe's blocks do not divide.

By arithmetic alone, matrix by matrix as the recipe says. A forward pass does not show them: a partial block
is filled up with zeros without a word, by ModelOpt (static blocks) or by its kernel (dynamic ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from harness.dimensions import Dimension, dimensions
from harness.finding import Finding, Severity
from harness.layers import Attention, Dense, GatedDeltaNet, Layer, Mamba, MoE

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layout import Layout
    from harness.recipes import Format, Recipe

_E4M3, _E2M1 = (4, 3), (2, 1)

# ``_dynamic_block_quantize_impl`` does not hand the config's block size on to ModelOpt's Triton kernel of
# NVFP4, which all GPUs from compute capability 8.9 on run: it takes its default.
_KERNEL_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Misfit:
    """A dimension that the blocks of ``format`` do not divide on a rank of a layout."""

    dimension: Dimension
    block: int
    format: Format

    def text(self, architecture: Architecture) -> str:
        """The dimension and why: ``--moe-ffn-hidden-size 1856 / 8 = 232, not a multiple of 16``."""
        return f"{self.dimension.text(architecture)}, not a multiple of {self.block}"

    @property
    def consequence(self) -> str:
        """What then happens, in a forward pass and at the export.

        Static: ``TensorQuantizer._setup_for_blockquant`` pads. Dynamic: ``fp4_fake_quant_block`` and
        ``fused_amax_convert`` read zeros past a row's end. Where only the part of a rank is uneven, the
        whole matrix is exported in blocks that no rank had.
        """
        said = "ModelOpt pads its last block with zeros without a word"
        if self.format.dynamic:
            said = "the kernel reads zeros past its end without a word"
            if (
                self.format.is_nvfp4
                and self.block != _KERNEL_BLOCK
                and not self.dimension.per_rank % _KERNEL_BLOCK
            ):
                said = f"the kernel takes blocks of {_KERNEL_BLOCK} in their place without a word"
        if self.dimension.what == "heads":
            return said
        if self.dimension.size % self.block:
            return f"{said}, and {_export(self.format)}"
        return f"{said}, and its blocks are not those of the whole matrix at the export"


def _export(entry: Format) -> str:
    """What ModelOpt's export and compression do with a partial block of such weights.

    ``pack_int4_in_uint8``, ``NVFP4QTensor`` and ``MXFP8QTensor`` refuse it, ``FP8QTensor`` pads,
    ``MXFP4QTensor`` takes its blocks from the matrix as one row; ``get_quantization_format`` knows no other
    MX format.
    """
    if entry.is_mx and entry.num_bits == _E2M1:
        return "the export lets its blocks run over the ends of rows"
    if entry.is_mx and entry.num_bits != _E4M3:
        return "ModelOpt exports no such format"
    if entry.num_bits == _E4M3 and not entry.is_mx:
        return "so does the export"
    return "the export refuses it"


def misfits(architecture: Architecture, layout: Layout, recipe: Recipe) -> tuple[Misfit, ...]:
    """Every dimension, per rank, that a block of ``recipe`` does not divide, with the matrices it is of.

    What the layout itself does not divide is not among them: no rank has such a matrix.
    """
    return misfits_among(tuple(dimensions(architecture, layout)), architecture, recipe)


def misfits_among(
    known: Sequence[Dimension], architecture: Architecture, recipe: Recipe
) -> tuple[Misfit, ...]:
    """The misfits among the dimensions of ``architecture`` on a layout, made once for all recipes."""
    if not recipe.has_blocks:
        return ()
    return tuple(
        misfit
        for dimension in known
        if dimension.whole
        for misfit in _of_dimension(architecture, dimension, recipe)
    )


def _of_dimension(architecture: Architecture, dimension: Dimension, recipe: Recipe) -> Iterator[Misfit]:
    """A misfit per block size and format; the matrices of each in their order."""
    found: dict[tuple[int, Format], list[str]] = {}
    for matrix in dimension.matrices:
        layers = _layers_with(architecture, matrix) if recipe.by_layer else (0,)
        sizes: dict[int, Format] = {}
        for layer in layers:
            for size, entry in _blocks_along(recipe, matrix, layer, dimension.axis, dimension.quantizers):
                sizes.setdefault(size, entry)
        for size, entry in sizes.items():
            if dimension.per_rank % size:
                found.setdefault((size, entry), []).append(matrix)
    for (size, entry), matrices in found.items():
        yield Misfit(replace(dimension, matrices=tuple(matrices)), size, entry)


@cache
def _blocks_along(
    recipe: Recipe, matrix: str, layer: int, axis: int, quantizers: tuple[str, ...]
) -> tuple[tuple[int, Format], ...]:
    """(size, format) of the blocks along one dimension, of a matrix in a layer; its weights' first."""
    path = module_path(matrix, layer)
    return tuple(
        (size, entry)
        for which in quantizers
        for entry in recipe.formats_of(path, which)
        for along, size in entry.partial_blocks
        if _from_the_end(along, which) == axis
    )


def _from_the_end(axis: int, which: str) -> int:
    """A matrix has two dimensions; how many a tensor of activations has, three or four, no config knows."""
    if axis < 0 or which != "weight":
        return axis
    return axis - 2


def module_path(matrix: str, layer: int = 0) -> str:
    """The path in the model of a matrix named within its layer; of the routed experts the first one's."""
    if matrix.startswith(("output_layer", "embedding.")):
        return matrix
    return f"decoder.layers.{layer}." + matrix.replace("mlp.experts.", "mlp.experts.local_experts.0.")


def _layers_with(architecture: Architecture, matrix: str) -> tuple[int, ...]:
    """The numbers of the layers that have such a matrix, as a model in one stage numbers them."""
    if not matrix.startswith(("self_attention.", "mixer.", "mlp.")):
        return (0,)
    return tuple(index for index, layer in enumerate(architecture.layers) if _has(layer, matrix))


def _has(layer: Layer, matrix: str) -> bool:
    if matrix.startswith("mlp."):
        return isinstance(layer.mlp, Dense if matrix.startswith("mlp.linear") else MoE)
    if matrix.startswith("mixer."):
        return isinstance(layer.mixer, Mamba)
    if matrix.endswith((".in_proj", ".out_proj")):
        return isinstance(layer.mixer, GatedDeltaNet)
    if matrix.endswith("linear_qkv"):
        return isinstance(layer.mixer, Attention)
    return layer.mixer is not None and not isinstance(layer.mixer, Mamba | GatedDeltaNet)


def misfit_findings(architecture: Architecture, layout: Layout, recipe: Recipe) -> Iterator[Finding]:
    """A warning for each misfit, at the flag that sets the dimension."""
    for misfit in misfits(architecture, layout, recipe):
        dimension = misfit.dimension
        message = f"{misfit.text(architecture)}, as {recipe.name} wants of the {dimension.what} of "
        message += f"{', '.join(dimension.matrices)}: {misfit.consequence}"
        yield architecture.arguments.finding(
            dimension.factors[0],
            message,
            stage="audit",
            severity=Severity.WARNING,
            expected=f"a multiple of {misfit.block}",
            actual=dimension.per_rank,
        )
