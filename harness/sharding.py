"""Sharding: the inventory of a whole model -> what one rank of a layout holds of it, and under which name.

A parameter is split along one axis over the tensor ranks, or over the experts' tensor ranks, or held
whole by every rank; which, its name says (``core/tensor_parallel/layers.py``, ``ssm/mamba_mixer.py``,
``transformer/moe``). A matrix of several in one is split part by part. Layers and experts are numbered
anew on each rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.inventory import Shape, buffers, parameters
from harness.layers import Dense, GatedDeltaNet, Layer, Mamba, MoE
from harness.rank import Rank, stages_of

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layout import Layout

# Split along axis 0: rows of a column-parallel matrix and its bias, and what Megatron keeps per head.
_ROWS = re.compile(
    r"""
    ( word_embeddings | output_layer | linear_qkv | linear_q_proj | linear_q_up_proj | linear_kv_up_proj
    | linear_fc1 | mixer\.in_proj | self_attention\.in_proj | mixer\.norm | conv1d
    )\.(weight|bias)$
    | core_attention\.softmax_offset$
    | \.(conv1d_weight | conv1d_bias | dt_bias | A_log | D)$
    """,
    re.VERBOSE,
)
# Split along axis 1: columns of a row-parallel matrix, whose bias stays whole.
_COLUMNS = re.compile(r"(linear_proj|linear_fc2|out_proj)\.weight$")

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\.local_experts)\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of a tensor of the whole model.

    ``name`` and ``whole`` are the tensor's name and shape there. ``ranges`` are what the rank has of
    ``axis``, one after the other; no axis means all of it.
    """

    name: str
    whole: Shape
    axis: int | None = None
    ranges: tuple[range, ...] = ()

    @property
    def shape(self) -> Shape:
        """Shape of the tensor on the rank."""
        if self.axis is None:
            return self.whole
        size = sum(map(len, self.ranges))
        return (*self.whole[: self.axis], size, *self.whole[self.axis + 1 :])


class UnevenSplit(ValueError):
    """A size that the layout does not divide.

    ``name`` is the argument of what falls whole to one rank, or else the parameter's on the whole model.
    """

    def __init__(self, name: str, size: int, parts: int) -> None:
        super().__init__(f"{name}: {size} / {parts} is not whole")
        self.name, self.size, self.parts = name, size, parts


def rank_parameters(architecture: Architecture, layout: Layout, rank: Rank) -> dict[str, Shape]:
    """Every parameter's name and shape on ``rank``. Raises UnevenSplit, or UnevenStages of ``rank.py``."""
    if layout.world_size == 1:
        return parameters(architecture)
    return {name: share.shape for name, share in shares(architecture, layout, rank).items()}


def shares(architecture: Architecture, layout: Layout, rank: Rank) -> dict[str, Share]:
    """Every parameter of ``rank`` by its name there. Raises UnevenSplit, or UnevenStages of ``rank.py``."""
    for name, size, parts in units(architecture, layout):
        divided(name, size, parts)
    return dict(_on_rank(_whole(architecture, layout, rank), architecture, layout, rank))


def buffer_shares(architecture: Architecture, layout: Layout, rank: Rank) -> dict[str, Share]:
    """The same of the buffers in ``inventory.buffers``, which every rank holds whole."""
    return dict(_on_rank(_named(buffers(architecture)), architecture, layout, rank))


def _named(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, Shape]]:
    return {name: (name, shape) for name, shape in shapes.items()}


def _whole(architecture: Architecture, layout: Layout, rank: Rank) -> dict[str, tuple[str, Shape]]:
    """Names and shapes on the whole model, by the names they have there but for the last stage's own copy."""
    whole = _named(parameters(architecture))
    if 0 < rank.pp == layout.pp - 1 and architecture.tied_embeddings:
        # The last stage has no embedding to share, and keeps a copy of the matrix as output layer.
        whole["output_layer.weight"] = whole["embedding.word_embeddings.weight"]
    return whole


def units(architecture: Architecture, layout: Layout) -> Iterator[tuple[str, int, int]]:
    """(argument, how many, ranks they are dealt to) of all that falls whole to one rank.

    Megatron refuses a layout that does not divide these, even one that divides every matrix.
    """
    heads, groups = (architecture.arguments[f"num_{name}"] for name in ("attention_heads", "query_groups"))
    # TransformerConfig asks for both also where no layer has attention.
    yield "num_attention_heads", heads, layout.tp
    if layout.tp % groups:  # else each group is one rank's, or is shared by as many ranks as the others
        yield "num_query_groups", groups, layout.tp
    mamba, delta = architecture.mamba, architecture.delta
    if mamba is not None:
        yield "mamba_num_heads", mamba.mamba_num_heads, layout.tp
        yield "mamba_num_groups", mamba.mamba_num_groups, layout.tp
    if delta is not None:
        yield "linear_num_key_heads", delta.linear_num_key_heads, layout.tp * layout.cp
        yield "linear_num_value_heads", delta.linear_num_value_heads, layout.tp * layout.cp
    if architecture.moe is not None:
        yield "num_experts", architecture.moe.num_experts, layout.ep


def _on_rank(
    whole: Mapping[str, tuple[str, Shape]], architecture: Architecture, layout: Layout, rank: Rank
) -> Iterator[tuple[str, Share]]:
    layers = stages_of(architecture, layout)[rank.pp]
    first, last = rank.pp == 0, rank.pp == layout.pp - 1
    experts = range(0)
    if architecture.moe is not None:
        count = architecture.moe.num_experts // layout.ep
        experts = range(rank.ep * count, (rank.ep + 1) * count)
    for place, (name, shape) in whole.items():
        layer = _LAYER.fullmatch(place)
        if layer is None:
            if first if place.startswith("embedding.") else last:
                yield place, _share(name, shape, (), layout.tp, rank.tp)
        elif int(layer[1]) in layers:
            local = f"decoder.layers.{int(layer[1]) - layers.start}.{layer[2]}"
            parts = _parts(architecture.layers[int(layer[1])], name)
            expert = _EXPERT.fullmatch(local)
            if expert is None:
                yield local, _share(name, shape, parts, layout.tp, rank.tp)
            elif int(expert[2]) in experts:
                number = int(expert[2]) - experts.start
                local = f"{expert[1]}.{number}.{expert[3]}"
                yield local, _share(name, shape, parts, layout.etp, rank.etp)


def _share(name: str, shape: Shape, parts: tuple[int, ...], ranks: int, index: int) -> Share:
    """The share of rank ``index`` of so many; ``parts`` are the sizes of what is split apart, if any."""
    axis = split_axis(name)
    if axis is None or ranks == 1:
        return Share(name, shape)
    divided(name, shape[axis], ranks)
    ranges, start = [], 0
    for size in parts or (shape[axis],):
        each = divided(name, size, ranks)
        ranges.append(range(start + index * each, start + (index + 1) * each))
        start += size
    return Share(name, shape, axis, tuple(ranges))


def _parts(layer: Layer, name: str) -> tuple[int, ...]:
    """Sizes of the matrices that Megatron fuses into one and splits one by one; nothing for any other."""
    if isinstance(layer.mixer, Mamba | GatedDeltaNet):
        if ".in_proj." in name:
            return layer.mixer.in_proj_parts
        if ".conv1d" in name:
            return layer.mixer.conv_parts
    if ".linear_fc1." in name:
        mlp = layer.mlp
        if isinstance(mlp, MoE):
            mlp = mlp.shared if ".shared_experts." in name else mlp.expert
        assert isinstance(mlp, Dense)
        return mlp.fc1_parts
    return ()


def split_axis(name: str) -> int | None:
    """The axis along which a parameter is split over tensor ranks, None where every rank holds it whole."""
    if _ROWS.search(name):
        return 0
    return 1 if _COLUMNS.search(name) else None


def shard(name: str, shape: Shape, parts: int) -> Shape:
    """Shape of a parameter that is split over so many ranks, its own if it is split over none."""
    return _share(name, shape, (), parts, 0).shape


def divided(name: str, size: int, parts: int) -> int:
    """``size / parts``. Raises UnevenSplit where that is not whole."""
    if size % parts:
        raise UnevenSplit(name, size, parts)
    return size // parts
