"""Ranks and pipeline stages against megatron-core's own groups and splits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from harness.layout import Layout
from harness.rank import Rank, UnevenStages, rank_of, ranks, stages
from harness.standins import installed
from harness.standins.output import captured, import_foreign
from harness.world import open_world

import_foreign()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.hybrid.hybrid_layer_allocation import select_pipeline_segment  # noqa: E402
from megatron.core.transformer.transformer_block import get_num_layers_to_build  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402

CPU = torch.device("cpu")

LAYOUTS = (
    "tp1",
    "tp4",
    "pp3",
    "ep4",
    "cp2",
    "tp2,ep2",
    "tp2,ep2,etp1",
    "tp8,ep4,etp1,pp2",
    "tp2,cp2,pp2",
    "tp2,cp2,ep2,etp2,pp2",
    "tp2,ep8,etp1",
    "ep2,etp2",
    "tp3,ep2,etp1",
)


def of_megatron(layout: Layout, rank: Rank) -> Rank:
    with installed(CPU), open_world(layout, CPU, rank=rank):
        return Rank(
            number=torch.distributed.get_rank(),
            tp=parallel_state.get_tensor_model_parallel_rank(),
            cp=parallel_state.get_context_parallel_rank(),
            pp=parallel_state.get_pipeline_model_parallel_rank(),
            etp=parallel_state.get_expert_tensor_parallel_rank(),
            ep=parallel_state.get_expert_model_parallel_rank(),
        )


@pytest.mark.parametrize("text", LAYOUTS)
def test_every_rank_stands_where_megatron_puts_it(text: str) -> None:
    layout = Layout.parse(text)
    found = ranks(layout)
    assert found == tuple(of_megatron(layout, rank) for rank in found)
    assert len(found) == layout.world_size


def test_pipeline_before_tensor_would_be_seen() -> None:
    """The order of the axes is what the comparison above is about."""
    layout = Layout.parse("tp2,pp2")
    swapped = Rank(1, pp=1)
    assert rank_of(layout, 1) == of_megatron(layout, rank_of(layout, 1)) != swapped


@pytest.mark.parametrize("number", [-1, 4])
def test_no_rank_outside_the_world(number: int) -> None:
    with pytest.raises(IndexError, match=f"layout tp2,pp2 has ranks 0 to 3, not {number}"):
        rank_of(Layout.parse("tp2,pp2"), number)


def transformer_stages(num_layers: int, layout: Layout) -> tuple[range, ...]:
    with captured():
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=layout.pp,
            pipeline_dtype=torch.bfloat16,
            num_layers_in_first_pipeline_stage=layout.first,
            num_layers_in_last_pipeline_stage=layout.last,
        )
    found = []
    for stage in range(layout.pp):
        start = get_transformer_layer_offset(config, pp_rank=stage)
        found.append(range(start, start + get_num_layers_to_build(config, pp_rank=stage)))
    return tuple(found)


def hybrid_stages(pattern: str, layout: Layout) -> tuple[range, ...]:
    found = []
    for stage in range(layout.pp):
        rank = rank_of(layout, stage * (layout.world_size // layout.pp))
        with installed(CPU), open_world(layout, CPU, rank=rank):
            group = parallel_state.get_pipeline_model_parallel_group()
            symbols, start = select_pipeline_segment(
                pattern, group, None, first_stage_layers=layout.first, last_stage_layers=layout.last
            )
        found.append(range(start, start + len(symbols)))
    return tuple(found)


def megatron_stages(num_layers: int, layout: Layout, pattern: str | None) -> tuple[range, ...]:
    return transformer_stages(num_layers, layout) if pattern is None else hybrid_stages(pattern, layout)


EVERY_SPLIT = [
    f"pp{pp}{first}{last}"
    for pp in (1, 2, 3, 4)
    for first in ("", ",first1", ",first3", ",first5")
    for last in ("", ",last1", ",last4")
    if pp > 1 or not first + last
]


def refused(split: Callable[[], tuple[range, ...]], *errors: type[Exception]) -> bool:
    try:
        split()
    except errors:
        return True
    return False


@pytest.mark.parametrize("num_layers", [1, 4, 6, 8, 9, 12])
def test_transformer_layers_fall_as_in_megatron(num_layers: int) -> None:
    """Every split of every small model: the same layers, or refused by both."""
    shared = 0
    for text in EVERY_SPLIT:
        layout = Layout.parse(text)
        if (layout.first or 0) + (layout.last or 0) > num_layers:
            continue  # of which Megatron builds layers that the model lacks: see below
        if refused(lambda layout=layout: transformer_stages(num_layers, layout), ValueError, AssertionError):
            with pytest.raises(UnevenStages):
                stages(num_layers, layout)
        else:
            assert stages(num_layers, layout) == transformer_stages(num_layers, layout), text
            shared += 1
    assert shared


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("M*M-M*M-", "pp1"),
        ("M*M-M*M-", "pp2"),
        ("M*M-M*M-", "pp4"),
        ("M*M-M*M-", "tp2,pp2"),
        ("M*M-M*M-", "pp2,first3"),
        ("M*M-M*M-", "pp3,first2"),
        ("M*M-M*M-", "pp3,last4"),
        ("M*M-M*M-", "pp4,first1,last3"),
        ("M*|M-M*M-", "pp2"),
        ("M*|M-M*|M-", "pp3"),
        ("M|*M-M*M-", "tp2,pp2"),
    ],
)
def test_hybrid_layers_fall_as_in_megatron(pattern: str, text: str) -> None:
    layout = Layout.parse(text)
    assert stages(8, layout, pattern) == hybrid_stages(pattern, layout)


REFUSALS = [
    (9, "pp2", None, "9 layers / 2 pipeline stages is not whole"),
    (3, "pp4", None, "3 layers / 4 pipeline stages is not whole"),
    (9, "pp3,first2", None, "7 other layers / 2 other pipeline stages is not whole"),
    (9, "pp3,last2", None, "7 other layers / 2 other pipeline stages is not whole"),
    (9, "pp2,first2,last2", None, "the stages hold 4 layers, the model has 9"),
    (
        4,
        "pp3,first2,last2",
        None,
        "0 other layers / 1 other pipeline stages is not whole, or leaves one empty",
    ),
    (4, "pp2,first4", None, "0 other layers / 1 other pipeline stages is not whole, or leaves one empty"),
    (8, "pp3", "M*M-M*M-", "8 layers / 3 pipeline stages is not whole"),
    (8, "pp3,first1", "M*M-M*M-", "7 other layers / 2 other pipeline stages is not whole"),
    (8, "pp2,first2", "M*M-|M*M-", "the pattern names its stages with |"),
    (8, "pp2", "M*|M-M*|M-", "the pattern has 3 stages, the layout pp2"),
    (8, "pp4", "M*M-|M*M-", "the pattern has 2 stages, the layout pp4"),
]


@pytest.mark.parametrize(("num_layers", "text", "pattern", "message"), REFUSALS)
def test_what_megatron_refuses_is_uneven(
    num_layers: int, text: str, pattern: str | None, message: str
) -> None:
    layout = Layout.parse(text)
    with pytest.raises((ValueError, AssertionError)):
        megatron_stages(num_layers, layout, pattern)
    with pytest.raises(UnevenStages) as caught:
        stages(num_layers, layout, pattern)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["pp2,first6", "pp3,last6"])
def test_a_stage_of_more_layers_than_the_model_has_is_uneven(text: str) -> None:
    """Megatron builds them, and the other stages get layers of negative number or none."""
    layout = Layout.parse(text)
    assert any(part.start < 0 or len(part) > 4 or part.stop > 4 for part in transformer_stages(4, layout))
    with pytest.raises(UnevenStages):
        stages(4, layout)


def test_more_segments_than_stages_are_uneven() -> None:
    """Megatron would make them stages of a virtual pipeline, which ModelOpt's builder does not support."""
    layout, pattern = Layout.parse("pp2"), "M*|M-|M*|M-"
    assert sum(map(len, hybrid_stages(pattern, layout))) == 4
    with pytest.raises(UnevenStages, match="the pattern has 4 stages, the layout pp2"):
        stages(8, layout, pattern)


def test_marks_make_way_for_a_single_stage() -> None:
    assert stages(8, Layout(), "M*M-|M*M-") == (range(8),)
    assert stages(4, Layout.parse("pp2"), "M*|M-/MM/MM") == (range(2), range(2, 4))
