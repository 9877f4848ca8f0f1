"""Bytes of weights per rank, against the shapes of every rank."""

from __future__ import annotations

import re
from dataclasses import replace
from math import ceil, prod

import pytest
from broken import TREE
from published import named, of_preset
from small_models import MODELS, model_of

from harness.architecture import Architecture
from harness.inventory import counts
from harness.layout import Layout
from harness.memory import QUANTIZED, Weights, weight_bytes
from harness.preset import PresetFile, discover
from harness.rank import UnevenStages, ranks
from harness.recipes import RECIPES, Recipe, find_recipe
from harness.sharding import UnevenSplit, rank_parameters

RECIPE_NAMES = [recipe.name for recipe in RECIPES]

# Bits of a number, and bytes of scales of a matrix of ``rows`` x ``inputs``, by recipe: said anew.
SAID = {
    "fp8": (8, lambda rows, inputs: 4),
    "int8_smoothquant": (8, lambda rows, inputs: 4 * rows),
    "int4_awq": (4, lambda rows, inputs: 4 * rows * ceil(inputs / 128)),
    "w4a8_awq_beta": (4, lambda rows, inputs: 4 * rows * ceil(inputs / 128) + 4),
    "nvfp4": (4, lambda rows, inputs: rows * ceil(inputs / 16) + 4),
}


def bytes_of(name: str, shape: tuple[int, ...], recipe: Recipe | None) -> int:
    plain = re.search(r"router|gate|conv1d|norm|_down_proj|embedding|output_layer|bias|A_log|D$|offset", name)
    if recipe is None or plain or len(shape) != 2:
        return 2 * prod(shape)
    bits, scales = SAID[recipe.name]
    return prod(shape) * bits // 8 + scales(*shape)


@pytest.mark.parametrize("file", discover(TREE), ids=lambda file: file.name)
def test_on_one_rank_two_bytes_a_parameter(file: PresetFile) -> None:
    model = of_preset(file)
    assert Weights(model).stage_bytes(Layout()) == (2 * counts(model).total,)


@pytest.mark.parametrize("recipe", [None, *RECIPES], ids=["bf16", *RECIPE_NAMES])
@pytest.mark.parametrize("layout", ["tp1", "tp2", "ep2", "pp2", "tp2,etp1"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer_on_every_rank(name: str, layout: str, recipe: Recipe | None) -> None:
    model, sizes = model_of(MODELS[name]), Layout.parse(layout)
    if model.num_layers % sizes.pp:
        with pytest.raises(UnevenStages):
            Weights(model).stage_bytes(sizes, recipe)
        return
    if model.moe is None:
        sizes = replace(sizes, ep=1)
    assert_as_one_by_one(model, sizes, recipe)


@pytest.mark.parametrize("layout", ["tp8", "tp4,etp1", "ep8", "tp2,pp2,first20"])
def test_experts_as_one_by_one(layout: str) -> None:
    for recipe in (None, find_recipe("nvfp4")):
        assert_as_one_by_one(named("Qwen3-30B-A3B"), Layout.parse(layout), recipe, first_rank_only=True)


def test_the_last_stage_keeps_a_copy_of_tied_embeddings() -> None:
    model = named("Qwen3-0.6B")
    assert model.tied_embeddings
    assert_as_one_by_one(model, Layout(pp=4), None)


def assert_as_one_by_one(
    model: Architecture, layout: Layout, recipe: Recipe | None, first_rank_only: bool = False
) -> None:
    stages = Weights(model).stage_bytes(layout, recipe)
    assert len(stages) == layout.pp
    for rank in ranks(layout)[: 1 if first_rank_only else None]:
        shapes = rank_parameters(model, layout, rank)
        total = sum(bytes_of(name, shape, recipe) for name, shape in shapes.items())
        assert stages[rank.pp] == total, rank
    assert Weights(model).largest(layout, recipe) == max(stages)


@pytest.mark.parametrize("recipe", RECIPES, ids=RECIPE_NAMES)
@pytest.mark.parametrize("shape", [(64, 256), (3, 40), (1, 16)], ids=str)
def test_a_matrix_with_its_scales(shape: tuple[int, int], recipe: Recipe) -> None:
    bits, scales = SAID[recipe.name]
    assert weight_bytes(shape, recipe) == prod(shape) * bits // 8 + scales(*shape)


def test_the_largest_rank_is_the_fullest_stage() -> None:
    model, layout = named("Qwen3-8B"), Layout(pp=2, first=20)
    first, last = Weights(model).stage_bytes(layout)
    assert first > last
    assert Weights(model).largest(layout) == first


@pytest.mark.parametrize(
    ("layout", "error"), [("tp5", UnevenSplit), ("pp5", UnevenStages), ("ep3", UnevenSplit)]
)
def test_what_does_not_divide_has_no_size(layout: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Weights(named("Qwen3-30B-A3B")).largest(Layout.parse(layout))


def test_what_modelopt_leaves_in_bf16() -> None:
    for name in (
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.self_attention.linear_kv_down_proj.weight",
        "decoder.layers.0.mixer.conv1d_weight",
        "decoder.layers.0.self_attention.conv1d.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "output_layer.weight",
        "embedding.word_embeddings.weight",
    ):
        assert not QUANTIZED.fullmatch(name)
    assert QUANTIZED.fullmatch("decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight")
