"""The inventory of each rank against megatron-core itself.

Every preset on the meta device, small models on every rank.
"""

from __future__ import annotations

import re

import pytest
import torch
from full_size import CPU, PRESETS, Shape, eighth_of_experts, megatron_parameters, one_of_each_kind
from published import named, of_preset
from small_models import MODELS, model_of
from torch import nn

from harness import sharding
from harness.architecture import Architecture, architecture
from harness.build import build_model, compare_parameters
from harness.layout import Layout
from harness.layout_rules import Owner, broken_limits
from harness.preset import PresetFile
from harness.rank import UnevenStages, rank_of, ranks
from harness.sharding import UnevenSplit, rank_parameters, units
from harness.shrink import shrink
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world


def differences(full: Architecture, layout: Layout, rank: int) -> tuple[str, ...]:
    expected = rank_parameters(full, layout, rank_of(layout, rank))
    found = compare_parameters(expected, megatron_parameters(full, layout, rank))
    return tuple(finding.message for finding in found)


def refusal(full: Architecture, layout: Layout) -> str | None:
    """What Megatron refuses of a layout that is no matter of size, in its words."""
    moe = full.moe
    if moe is None and layout.ep > 1:
        return "num_moe_experts must be non None to use expert-parallel"
    if moe is not None and moe.expert.bias and layout.etp > 1:
        return "Bias in Moe is only supported when ETP==1"
    return None


# One of each kind: tensor, expert, both with whole experts, and pipeline stages even and uneven.
TENSOR_AND_EXPERT = ("tp2", "tp8", "ep8", "tp4,ep4,etp1")
PIPELINE = ("pp2", "pp2,first20", "pp4,last10", "tp2,ep2,etp1,pp2")


@pytest.mark.parametrize("text", TENSOR_AND_EXPERT)
@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_full_size_shards_are_megatrons(file: PresetFile, text: str) -> None:
    """Every preset at every layout, at full width and with all experts: equal, or refused by both.

    Of the layers the first of each kind, for time: that all layers are there, and every expert of theirs,
    is seen at tp1.
    """
    layout = Layout.parse(text)
    compare(one_of_each_kind(of_preset(file)), layout)


@pytest.mark.parametrize("text", PIPELINE)
@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_full_size_stages_are_megatrons(file: PresetFile, text: str) -> None:
    """Every preset with all its layers on first and last stage; of the experts, for time, an eighth."""
    layout = Layout.parse(text)
    compare(eighth_of_experts(of_preset(file)), layout)


def compare(full: Architecture, layout: Layout) -> None:
    last = layout.world_size - 1
    words = refusal(full, layout)
    limits = [limit.message for limit in broken_limits(full, layout) if limit.owner is Owner.MEGATRON]
    assert bool(limits) == (words is not None or refused(full, layout)), limits
    if too_large_a_stage(full, layout):
        with pytest.raises(UnevenStages):
            rank_parameters(full, layout, rank_of(layout, 0))
    elif refused(full, layout):
        with pytest.raises((ValueError, AssertionError)):
            megatron_parameters(full, layout, last)
    elif words is not None:
        with pytest.raises((ValueError, AssertionError), match=re.escape(words)):
            megatron_parameters(full, layout)
    else:
        assert differences(full, layout, 0) == differences(full, layout, last) == ()


def too_large_a_stage(full: Architecture, layout: Layout) -> bool:
    """Where Megatron builds layers that the model lacks, and the inventory refuses (``test_rank.py``)."""
    return (layout.first or 0) + (layout.last or 0) > full.num_layers


def refused(full: Architecture, layout: Layout) -> bool:
    try:
        rank_parameters(full, layout, rank_of(layout, 0))
    except (UnevenSplit, UnevenStages):
        return True
    return False


@pytest.mark.parametrize("text", ["tp2", "ep2", "pp2", "tp2,ep2,etp1,pp2", "tp2,ep2,pp2,first1"])
@pytest.mark.parametrize("name", MODELS)
def test_every_rank_of_a_small_model_is_megatrons(name: str, text: str) -> None:
    full, layout = model_of(MODELS[name]), Layout.parse(text)
    words = refusal(full, layout)
    if words is not None:
        with pytest.raises((ValueError, AssertionError), match=re.escape(words)):
            megatron_parameters(full, layout)
    elif refused(full, layout):
        with pytest.raises((ValueError, AssertionError)):
            megatron_parameters(full, layout, layout.world_size - 1)
    else:
        assert not any(differences(full, layout, rank.number) for rank in ranks(layout))


# What a layout does not divide


@pytest.mark.parametrize(
    ("name", "text", "unit", "size"),
    [
        ("Qwen2.5-7B-Instruct", "tp8", "num_attention_heads", 28),
        ("phi-4", "tp4", "num_query_groups", 10),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "tp16,etp1", "mamba_num_groups", 8),
        ("Mixtral-8x7B-v0.1", "ep16", "num_experts", 8),
    ],
)
def test_a_unit_that_a_layout_does_not_divide_is_refused_by_both(
    name: str, text: str, unit: str, size: int
) -> None:
    full, layout = one_of_each_kind(named(name)), Layout.parse(text)
    with pytest.raises(UnevenSplit) as caught:
        rank_parameters(full, layout, rank_of(layout, 0))
    assert (caught.value.name, caught.value.size) == (unit, size)
    assert str(caught.value) == f"{unit}: {size} / {caught.value.parts} is not whole"
    with pytest.raises((ValueError, AssertionError)):
        megatron_parameters(full, layout)


def test_a_matrix_that_a_layout_does_not_divide_is_refused_by_both() -> None:
    full = model_of(MODELS["LayerNorm less one"].replace("--ffn-hidden-size 384", "--ffn-hidden-size 385"))
    layout = Layout.parse("tp2")
    with pytest.raises(UnevenSplit, match=r"^decoder.layers.0.mlp.linear_fc1.weight: 385 / 2 is not whole"):
        rank_parameters(full, layout, rank_of(layout, 0))
    with pytest.raises((ValueError, AssertionError)):
        megatron_parameters(full, layout)


def test_delta_heads_are_asked_of_tensor_and_context_ranks() -> None:
    full, layout = model_of(MODELS["gated delta net"]), Layout.parse("tp2,cp2")
    assert ("linear_num_key_heads", 2, 4) in units(full, layout)
    with pytest.raises(UnevenSplit, match="linear_num_key_heads: 2 / 4 is not whole"):
        rank_parameters(full, layout, rank_of(layout, 0))


# Query groups that ranks share


@pytest.mark.parametrize(
    ("name", "groups"), [("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 2), ("Qwen3-30B-A3B", 4)]
)
def test_tp8_splits_shared_groups_by_rows_as_if_there_were_none(name: str, groups: int) -> None:
    """Each of the eight ranks holds an eighth of the rows of the fused matrix, wherever a group ends."""
    full, layout = one_of_each_kind(named(name)), Layout.parse("tp8,etp1")
    attention = full.attention
    assert attention is not None and attention.num_query_groups == groups < layout.tp
    qkv, proj = (
        next(shape for key, shape in megatron_parameters(full, layout, 5).items() if key.endswith(ending))
        for ending in ("linear_qkv.weight", "linear_proj.weight")
    )
    assert qkv == (attention.qkv_width // 8, full.hidden_size)
    assert proj == (full.hidden_size, attention.query_width // 8)
    assert not differences(full, layout, 5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "tp8,etp1"),
        ("Qwen3-30B-A3B", "tp8,etp1"),
        ("Qwen3-30B-A3B", "tp4"),
    ],
)
def test_each_rank_attends_with_its_own_heads_and_one_group(name: str, text: str) -> None:
    """Megatron gathers the rows again, and a rank takes its share of the heads and the group they belong to.

    So groups that ranks share cost each of them a gather and a whole key and value head, and nothing else.
    """
    layout = Layout.parse(text)
    small = shrink(named(name), layout).after
    attention = small.attention
    assert attention is not None and attention.num_query_groups <= layout.tp
    queries, keys = attention_inputs(small, layout, rank=layout.tp - 1)
    heads = attention.num_attention_heads // layout.tp
    assert queries[-2:] == (heads, attention.kv_channels)
    assert keys[-2:] == (1, attention.kv_channels)


def attention_inputs(small: Architecture, layout: Layout, rank: int) -> tuple[Shape, Shape]:
    """Shapes of the queries and keys that the first attention core of one simulated rank is given."""
    seen: list[tuple[Shape, Shape]] = []

    def see(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.append((tuple(args[0].shape), tuple(args[1].shape)))

    tokens = torch.arange(16).unsqueeze(0)
    with captured(), installed(CPU), open_world(layout, CPU, rank=rank_of(layout, rank)), torch.no_grad():
        model = build_model(small, layout, CPU)
        for name, module in model.named_modules():
            if name.endswith("self_attention.core_attention"):
                module.register_forward_pre_hook(see, with_kwargs=True)
        model(tokens, tokens, None)
    return seen[0]


# Broken on purpose: the comparison is what finds it


def test_a_matrix_split_along_the_wrong_axis_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str) -> int | None:
        return 0 if name.endswith("linear_proj.weight") else right(name)

    right = sharding.split_axis
    full, layout = one_of_each_kind(named("Qwen3-8B")), Layout.parse("tp2")
    assert not differences(full, layout, 0)
    monkeypatch.setattr(sharding, "split_axis", wrong)
    assert differences(full, layout, 0) == (
        "layers.0.self_attention.linear_proj  weight is 4096 x 2048, expected 2048 x 4096",
    )


def test_a_norm_that_is_split_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str) -> int | None:
        return 0 if name.endswith("layernorm.weight") else right(name)

    right = sharding.split_axis
    full, layout = one_of_each_kind(named("Llama-3.2-1B-Instruct")), Layout.parse("tp2")
    monkeypatch.setattr(sharding, "split_axis", wrong)
    assert "layers.0.input_layernorm  weight is 2048, expected 1024" in differences(full, layout, 1)


def test_a_missing_copy_of_the_tied_output_is_found() -> None:
    full, layout = one_of_each_kind(named("Llama-3.2-1B-Instruct")), Layout.parse("pp2")
    full = with_layers(full, 2)
    assert full.tied_embeddings
    expected = rank_parameters(full, layout, rank_of(layout, 1))
    copy = expected.pop("output_layer.weight")
    (finding,) = compare_parameters(expected, megatron_parameters(full, layout, 1))
    assert finding.module == "output_layer" and finding.actual == copy


def test_an_output_on_the_first_stage_is_found() -> None:
    full, layout = with_layers(one_of_each_kind(named("Qwen3-8B")), 2), Layout.parse("pp2")
    expected = rank_parameters(full, layout, rank_of(layout, 0))
    assert "output_layer.weight" not in expected
    expected["output_layer.weight"] = expected["embedding.word_embeddings.weight"]
    (finding,) = compare_parameters(expected, megatron_parameters(full, layout, 0))
    assert finding.module == "output_layer" and finding.actual is None


def test_experts_numbered_through_all_ranks_are_found() -> None:
    full, layout = model_of(MODELS["Mamba and latent experts"]), Layout.parse("ep2")
    expected = {
        re.sub(r"(?<=local_experts\.)\d+", lambda match: str(int(match[0]) + 4), name): shape
        for name, shape in rank_parameters(full, layout, rank_of(layout, 1)).items()
    }
    found = compare_parameters(expected, megatron_parameters(full, layout, 1))
    missing = {finding.module for finding in found if finding.actual is None}
    surplus = {finding.module for finding in found if finding.expected is None}
    assert {int(name.split(".")[6]) for name in missing} == {4, 5, 6, 7}
    assert {int(name.split(".")[6]) for name in surplus} == {0, 1, 2, 3}


def test_layers_numbered_through_all_stages_are_found() -> None:
    full, layout = model_of(MODELS["Mamba and MLP"]), Layout.parse("pp2,first2")
    expected = {
        re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + 2), name): shape
        for name, shape in rank_parameters(full, layout, rank_of(layout, 1)).items()
    }
    assert compare_parameters(expected, megatron_parameters(full, layout, 1))


def with_layers(full: Architecture, count: int) -> Architecture:
    """A model of ``count`` layers of the only kind that it has."""
    return architecture(full.arguments.replaced({"num_layers": count, "no_rope_freq": None}))
