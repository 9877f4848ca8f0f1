"""Sharding: the inventory of a whole model -> the names and shapes on one rank of a layout.

A parameter is split along one axis over the tensor ranks, or over the experts' tensor ranks, or held
whole by every rank; which, its name says (``core/tensor_parallel/layers.py``, ``ssm/mamba_mixer.py``,
``transformer/moe``). Layers and experts are numbered anew on each rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from harness.inventory import Shape, parameters
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


class UnevenSplit(ValueError):
    """A size that the layout does not divide.

    ``name`` is the argument of what falls whole to one rank, or else the parameter's on the whole model.
    """

    def __init__(self, name: str, size: int, parts: int) -> None:
        super().__init__(f"{name}: {size} / {parts} is not whole")
        self.name, self.size, self.parts = name, size, parts


def rank_parameters(architecture: Architecture, layout: Layout, rank: Rank) -> dict[str, Shape]:
    """Every parameter's name and shape on ``rank``. Raises UnevenSplit, or UnevenStages of ``rank.py``."""
    for name, size, parts in units(architecture, layout):
        divided(name, size, parts)
    layers = stages_of(architecture, layout)[rank.pp]
    whole = parameters(architecture)
    first, last = rank.pp == 0, rank.pp == layout.pp - 1
    if last and not first and architecture.tied_embeddings:
        # The last stage has no embedding to share, and keeps a copy of the matrix as output layer.
        whole["output_layer.weight"] = whole["embedding.word_embeddings.weight"]
    return dict(_on_rank(whole, architecture, layout, rank, layers, first, last))


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
    whole: Mapping[str, Shape],
    architecture: Architecture,
    layout: Layout,
    rank: Rank,
    layers: range,
    first: bool,
    last: bool,
) -> Iterator[tuple[str, Shape]]:
    experts = range(0)
    if architecture.moe is not None:
        share = architecture.moe.num_experts // layout.ep
        experts = range(rank.ep * share, (rank.ep + 1) * share)
    for name, shape in whole.items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            if first if name.startswith("embedding.") else last:
                yield name, shard(name, shape, layout.tp)
        elif int(layer[1]) in layers:
            local = f"decoder.layers.{int(layer[1]) - layers.start}.{layer[2]}"
            expert = _EXPERT.fullmatch(local)
            if expert is None:
                yield local, shard(name, shape, layout.tp)
            elif int(expert[2]) in experts:
                number = int(expert[2]) - experts.start
                yield f"{expert[1]}.{number}.{expert[3]}", shard(name, shape, layout.etp)


def split_axis(name: str) -> int | None:
    """The axis along which a parameter is split over tensor ranks, None where every rank holds it whole."""
    if _ROWS.search(name):
        return 0
    return 1 if _COLUMNS.search(name) else None


def shard(name: str, shape: Shape, parts: int) -> Shape:
    """Shape of a parameter that is split over so many ranks, its own if it is split over none."""
    axis = split_axis(name)
    if axis is None:
        return shape
    return (*shape[:axis], divided(name, shape[axis], parts), *shape[axis + 1 :])


def divided(name: str, size: int, parts: int) -> int:
    """``size / parts``. Raises UnevenSplit where that is not whole."""
    if size % parts:
        raise UnevenSplit(name, size, parts)
    return size // parts
