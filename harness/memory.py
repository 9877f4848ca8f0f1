"""Memory: an architecture on a layout -> the bytes that the weights of a rank take, in bf16 and by recipe.

By arithmetic alone, from the shapes of one layer of each kind: a rank's share is the same on every tensor
and expert rank, so that the pipeline stage decides which rank holds the most. Weights only: no
activations, no cache, no buffers, and not what ModelOpt's fake quantization needs besides, which keeps the
weights in bf16. Numbers are packed to their bits, scales are as ModelOpt exports them
(``export/quant_utils.py``): a byte for a block of NVFP4 or of an MX format, else float32. What calibration
leaves beside a matrix counts as well: AWQ's and SmoothQuant's scale per input channel, SVDQuant's pair of
thin matrices.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from harness.inventory import Shape, parameters
from harness.layers import MoE
from harness.rank import stages_of
from harness.roles import role_of
from harness.sharding import divided, shard

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layers import Layer
    from harness.layout import Layout
    from harness.recipes import Format, Recipe

_BF16_BYTES = 2
_FLOAT32_BYTES = 4

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter on the whole model, and how many of its like there are where it stands.

    ``expert`` weights are split over etp, and their number over ep.
    """

    name: str
    shape: Shape
    times: int = 1
    expert: bool = False

    def on_rank(self, layout: Layout) -> tuple[Shape, int]:
        """Shape and number on any rank of one stage. Raises UnevenSplit."""
        if self.expert:
            return shard(self.name, self.shape, layout.etp), divided(self.name, self.times, layout.ep)
        return shard(self.name, self.shape, layout.tp), self.times


class _Matrix(NamedTuple):
    """Matrices of a rank that a recipe may quantize: the module, the shape on the rank, and how many."""

    module: str
    shape: Shape
    times: int


@dataclass(frozen=True, slots=True)
class _Part:
    """A layer on a rank, or what stands before or after the layers: bytes in bf16, and its matrices."""

    bf16: int
    matrices: tuple[_Matrix, ...]


class Weights:
    """The weights of one architecture, from which the bytes of any rank follow.

    Made once for all layouts and recipes: it walks through one layer of each kind.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        outside = parameters(replace(architecture, layers=()))
        self._embedding = [_Weight(name, shape) for name, shape in outside.items() if _is_embedding(name)]
        self._output = [_Weight(name, shape) for name, shape in outside.items() if not _is_embedding(name)]
        # The last of several stages has no embedding to share, and keeps a copy as output layer.
        self._copied = [
            replace(weight, name="output_layer.weight")
            for weight in self._embedding
            if architecture.tied_embeddings and "word_embeddings" in weight.name
        ]
        self._layers: Mapping[Layer, list[_Weight]] = {
            layer: list(_weights_of(architecture, layer)) for layer in dict.fromkeys(architecture.layers)
        }
        self._parts: dict[Layout, Mapping[Layer | str, _Part]] = {}
        self._kept: dict[Layout, Sequence[Sequence[_Part]]] = {}

    def stage_bytes(self, layout: Layout, recipe: Recipe | None = None) -> tuple[int, ...]:
        """Bytes on a rank of each pipeline stage, bf16 where ``recipe`` is None.

        Raises UnevenSplit of ``sharding.py``, or UnevenStages of ``rank.py``.
        """
        parts = self._on_rank(layout)
        found = []
        for stage, layers in enumerate(self._stages(layout)):
            total = _layers_bytes(layers, recipe)
            total += _bytes(parts["embedding"], recipe) if stage == 0 else 0
            if stage == layout.pp - 1:
                total += _bytes(parts["output"], recipe) + (_bytes(parts["copied"], recipe) if stage else 0)
            found.append(total)
        return tuple(found)

    def largest(self, layout: Layout, recipe: Recipe | None = None) -> int:
        """Bytes on the rank that holds the most; raises as ``stage_bytes``."""
        return max(self.stage_bytes(layout, recipe))

    def _stages(self, layout: Layout) -> Sequence[Sequence[_Part]]:
        """The layers of each stage on a rank, in their order; kept, as every recipe asks for them."""
        if layout not in self._kept:
            parts, layers = self._on_rank(layout), self._architecture.layers
            self._kept[layout] = [
                [parts[layers[index]] for index in stage] for stage in stages_of(self._architecture, layout)
            ]
        return self._kept[layout]

    def _on_rank(self, layout: Layout) -> Mapping[Layer | str, _Part]:
        """Every kind of layer and what stands around them, on a rank."""
        if layout not in self._parts:
            parts: dict[Layer | str, _Part] = {
                layer: _part(weights, layout) for layer, weights in self._layers.items()
            }
            for name in ("embedding", "output", "copied"):
                parts[name] = _part(getattr(self, f"_{name}"), layout)
            self._parts[layout] = parts
        return self._parts[layout]


def _part(weights: Sequence[_Weight], layout: Layout) -> _Part:
    total, matrices = 0, []
    for weight in weights:
        shape, times = weight.on_rank(layout)
        total += times * _BF16_BYTES * prod(shape)
        role = role_of(weight.name)
        if len(shape) == 2 and role is not None and role.convertible:
            matrices.append(_Matrix(weight.name.removesuffix(".weight"), shape, times))
    return _Part(total, tuple(matrices))


def _layers_bytes(layers: Sequence[_Part], recipe: Recipe | None) -> int:
    if recipe is not None and recipe.by_layer:
        # Each stage numbers its layers anew, and a pattern sees that number.
        return sum(_bytes(part, recipe, number) for number, part in enumerate(layers))
    # Layers of a kind are one and the same part.
    kinds = {id(part): part for part in layers}
    times = Counter(map(id, layers))
    return sum(times[key] * _bytes(part, recipe) for key, part in kinds.items())


def _bytes(part: _Part, recipe: Recipe | None, number: int = 0) -> int:
    """Bytes of a part; of a layer as the one of that ``number`` on its stage."""
    if recipe is None:
        return part.bf16
    return part.bf16 + sum(
        times * _saved(recipe, _numbered(module, number), shape) for module, shape, times in part.matrices
    )


def _numbered(module: str, number: int) -> str:
    return module.replace("layers.0.", f"layers.{number}.", 1) if number else module


@cache
def _saved(recipe: Recipe, module: str, shape: Shape) -> int:
    """How many bytes more than in bf16 a matrix takes: less than none."""
    formats = recipe.formats_of(module)
    if not formats or isinstance(formats[0].num_bits, str):
        return 0  # left as it is, or packed by a backend that only its user knows
    return weight_bytes(shape, formats) + calibration_bytes(shape, recipe, module) - _BF16_BYTES * prod(shape)


@cache
def weight_bytes(shape: Shape, formats: tuple[Format, ...]) -> int:
    """Bytes of a matrix, [outputs, inputs], in these formats, with its scales.

    Of formats in a row the first is what is stored; the others only add their scales. A last partial
    block counts as one.
    """
    return -(-formats[0].bits * prod(shape) // 8) + sum(_scale_bytes(entry, shape) for entry in formats)


def _scale_bytes(entry: Format, shape: Shape) -> int:
    if entry.blocks:
        sizes = {axis % len(shape): size for axis, size in entry.blocks}
        blocks = 1
        for axis, length in enumerate(shape):
            size = sizes.get(axis, 1)
            blocks *= 1 if size is None else -(-length // size)
        if entry.scale_bits is None:
            return _FLOAT32_BYTES * blocks
        # Scales of few bits: a power of two needs no other, the others stand under one scale per tensor.
        return blocks * _scale_bits(entry) // 8 + (0 if entry.is_mx else _FLOAT32_BYTES)
    axes = () if entry.axis is None else (entry.axis,) if isinstance(entry.axis, int) else entry.axis
    return _FLOAT32_BYTES * prod(shape[axis] for axis in axes)


def _scale_bits(entry: Format) -> int:
    """Bits of a block's scale: E4M3 has a sign, E8M0, which is an exponent alone, has none."""
    bits = entry.scale_bits
    assert bits is not None
    return bits if isinstance(bits, int) else sum(bits) + (0 if entry.is_mx else 1)


def calibration_bytes(shape: Shape, recipe: Recipe, module: str) -> int:
    """Bytes that calibration leaves beside a quantized matrix [outputs, inputs], in the type of the weights.

    ``pre_quant_scale``, one number per input, which SmoothQuant only makes where inputs are quantized too;
    and SVDQuant's two matrices of its rank, which it does not make of the modules that it skips.
    """
    role = role_of(module)
    if not recipe.folds_scales or (role is not None and role.parent_class is not None):
        return 0
    outputs, inputs = shape
    total = 0
    for algorithm in recipe.algorithms:
        if not algorithm.folds_scales or algorithm.skips(module):
            continue
        if algorithm.method != "smoothquant" or recipe.formats_of(module, "input"):
            total = max(total, _BF16_BYTES * inputs)
        if algorithm.method == "svdquant":
            rank = min(algorithm.option("lowrank", 32), outputs, inputs)
            total += _BF16_BYTES * rank * (outputs + inputs)
    return total


def _weights_of(architecture: Architecture, layer: Layer) -> Iterator[_Weight]:
    """Every parameter of a layer, of its routed experts those of the first."""
    experts = layer.mlp.num_experts if isinstance(layer.mlp, MoE) else 0
    for name, shape in parameters(replace(architecture, layers=(layer,))).items():
        if not name.startswith("decoder.layers."):
            continue
        expert = _EXPERT.search(name)
        if expert is None:
            yield _Weight(name, shape)
        elif expert[1] == "0":
            yield _Weight(name, shape, experts, expert=True)


def _is_embedding(name: str) -> bool:
    return name.startswith("embedding.")
