"""Memory: an architecture on a layout -> the bytes that the weights of a rank take, in bf16 and by recipe.

By arithmetic alone, from the shapes of one layer of each kind: a rank's share is the same on every tensor
and expert rank, so that the pipeline stage decides which rank holds the most. Weights only: no
activations, no cache, no buffers, and not what ModelOpt's fake quantization needs besides, which keeps the
weights in bf16. Scales are as ModelOpt exports them: E4M3 for a block of NVFP4, else float32; the scale per
input channel that AWQ and SmoothQuant add is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from harness.inventory import Shape, parameters
from harness.layers import MoE
from harness.rank import stages_of
from harness.sharding import divided, shard

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layers import Layer
    from harness.layout import Layout
    from harness.recipes import Format, Recipe

_BF16_BYTES = 2
_FLOAT32_BYTES = 4

# The matrices of a decoder layer that ModelOpt quantizes; of them, latent attention's down-projections are
# none, nor convolutions, the router and the shared expert's gate.
QUANTIZED = re.compile(
    r"""
    decoder\.layers\.\d+\..*\.
    ( linear_qkv | linear_proj | linear_q_proj | linear_q_up_proj | linear_kv_up_proj
    | in_proj | out_proj | linear_fc1 | linear_fc2 | fc1_latent_proj | fc2_latent_proj
    )\.weight
    """,
    re.VERBOSE,
)
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


class Weights:
    """The weights of one architecture, from which the bytes of any rank follow.

    Made once for all layouts and recipes: it walks through one layer of each kind.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        outside = parameters(replace(architecture, layers=()))
        self._embedding = [_Weight(name, shape) for name, shape in outside.items() if _is_embedding(name)]
        self._output = [_Weight(name, shape) for name, shape in outside.items() if not _is_embedding(name)]
        self._layers: Mapping[Layer, list[_Weight]] = {
            layer: list(_weights_of(architecture, layer)) for layer in set(architecture.layers)
        }

    def stage_bytes(self, layout: Layout, recipe: Recipe | None = None) -> tuple[int, ...]:
        """Bytes on a rank of each pipeline stage, bf16 where ``recipe`` is None.

        Raises UnevenSplit of ``sharding.py``, or UnevenStages of ``rank.py``.
        """
        full = self._architecture
        per_kind = {layer: _bytes(weights, layout, recipe) for layer, weights in self._layers.items()}
        first, last = _bytes(self._embedding, layout, recipe), _bytes(self._output, layout, recipe)
        found = []
        for stage, layers in enumerate(stages_of(full, layout)):
            counted = Counter(full.layers[index] for index in layers)
            total = sum(times * per_kind[layer] for layer, times in counted.items())
            total += first if stage == 0 else 0
            total += last if stage == layout.pp - 1 else 0
            if stage == layout.pp - 1 and stage > 0 and full.tied_embeddings:
                # The last stage keeps a copy of the embedding as its output layer.
                copied = [weight for weight in self._embedding if "word_embeddings" in weight.name]
                total += _bytes(copied, layout, recipe)
            found.append(total)
        return tuple(found)

    def largest(self, layout: Layout, recipe: Recipe | None = None) -> int:
        """Bytes on the rank that holds the most; raises as ``stage_bytes``."""
        return max(self.stage_bytes(layout, recipe))


def weight_bytes(shape: Shape, recipe: Recipe) -> int:
    """Bytes of a quantized matrix, [outputs, inputs], with its scales; a last partial block counts as one."""
    # Of formats in a row the first is what is stored; the others only add their scales.
    return _number_bits(recipe.weights[0]) * prod(shape) // 8 + sum(
        _scale_bytes(entry, shape) for entry in recipe.weights
    )


def _number_bits(entry: Format) -> int:
    bits = entry.num_bits
    return bits if isinstance(bits, int) else 1 + sum(bits)


def _scale_bytes(entry: Format, shape: Shape) -> int:
    outputs, inputs = shape
    if entry.block_size is not None:
        blocks = outputs * -(-inputs // entry.block_size)
        # Scales of dynamic blocks are numbers of eight bits under one scale per tensor.
        return blocks + _FLOAT32_BYTES if entry.dynamic else blocks * _FLOAT32_BYTES
    return _FLOAT32_BYTES * (1 if entry.axis is None else shape[entry.axis])


def _bytes(weights: Iterable[_Weight], layout: Layout, recipe: Recipe | None) -> int:
    total = 0
    for weight in weights:
        shape, times = weight.on_rank(layout)
        if recipe is not None and QUANTIZED.fullmatch(weight.name):
            total += times * weight_bytes(shape, recipe)
        else:
            total += times * _BF16_BYTES * prod(shape)
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
