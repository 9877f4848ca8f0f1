"""Bytes of weights per rank, against the shapes of every rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod

import pytest
import torch
from broken import TREE
from published import named, of_preset
from small_models import MODELS, model_of

from harness.architecture import Architecture
from harness.inventory import counts
from harness.layout import Layout
from harness.memory import Weights, calibration_bytes, weight_bytes
from harness.preset import PresetFile, discover
from harness.rank import UnevenStages, ranks
from harness.recipes import Format, Recipe, find_recipe, recipes
from harness.sharding import UnevenSplit, rank_parameters
from harness.standins.output import import_foreign

ALL = recipes()


def scales_of_blocks(size: int, scale: int, more: int) -> Callable[[int, int], int]:
    return lambda rows, inputs: scale * rows * ceil(inputs / size) + more


def one_scale(rows: int, inputs: int) -> int:
    return 4


def scale_per_row(rows: int, inputs: int) -> int:
    return 4 * rows


FP8 = (8, one_scale)
NVFP4 = (4, scales_of_blocks(16, 1, 4))
INT4 = (4, scales_of_blocks(128, 4, 0))
MAMBA_LEFT = r"latent_proj|linear_qkv|linear_proj|linear_q_proj"
NO_MLP = r"^(?!.*\.mlp\.)"
IN_AND_OUT = r"|mixer\.in_proj|mixer\.out_proj"
KV_ONLY = "fp8_kv fp8_affine_kv nvfp4_kv nvfp4_affine_kv nvfp4_kv_rotate".split()

# Bits of a number, and bytes of scales of a matrix of ``rows`` x ``inputs``, by recipe: said anew.
SAID = {
    "fp8": FP8,
    "fp8_2d_blockwise_weight_only": (8, lambda rows, inputs: 4 * ceil(rows / 128) * ceil(inputs / 128)),
    "fp8_per_channel_per_token": (8, scale_per_row),
    "int8": (8, scale_per_row),
    "int8_weight_only": (8, scale_per_row),
    "int8_smoothquant": (8, lambda rows, inputs: 4 * rows + 2 * inputs),
    "int4_blockwise_weight_only": INT4,
    "int4_awq": (4, lambda rows, inputs: INT4[1](rows, inputs) + 2 * inputs),
    "w4a8_awq_beta": (4, lambda rows, inputs: INT4[1](rows, inputs) + 4 + 2 * inputs),
    "mxfp4": (4, scales_of_blocks(32, 1, 0)),
    "mxfp6": (6, scales_of_blocks(32, 1, 0)),
    "mxfp8": (8, scales_of_blocks(32, 1, 0)),
    "mxint8": (8, scales_of_blocks(32, 1, 0)),
    "w4a8_mxfp4_fp8": (4, scales_of_blocks(32, 1, 0)),
    "mxfp4_mlp_weight_only": (4, scales_of_blocks(32, 1, 0)),
    "nvfp4_mlp_weight_only": (4, scales_of_blocks(32, 1, 4)),
    "w4a8_nvfp4_fp8": (4, scales_of_blocks(32, 1, 4)),
    **dict.fromkeys("mamba_moe_fp8_aggressive mamba_moe_fp8_conservative".split(), FP8),
    **dict.fromkeys(KV_ONLY, (8, scale_per_row)),
    **dict.fromkeys(
        "nvfp4 nvfp4_awq_clip nvfp4_four_over_six nvfp4_fp8_mha nvfp4_mlp_only nvfp4_omlp_only w4a16_nvfp4 "
        "nvfp4_experts_only mamba_moe_nvfp4_aggressive mamba_moe_nvfp4_conservative "
        "nvfp4_w4a4_weight_local_hessian nvfp4_w4a4_weight_mse_fp8_sweep".split(),
        NVFP4,
    ),
    **dict.fromkeys(
        "nvfp4_awq_full nvfp4_awq_lite".split(),
        (4, lambda rows, inputs: NVFP4[1](rows, inputs) + 2 * inputs),
    ),
    "nvfp4_svdquant": (
        4,
        lambda rows, inputs: (
            NVFP4[1](rows, inputs) + 2 * inputs + 2 * min(32, rows, inputs) * (rows + inputs)
        ),
    ),
}

# What a recipe leaves in bf16 of what ModelOpt could quantize.
OUTPUT = r"output_layer|position_embeddings"
POSITIONS = r"position_embeddings"
LEFT = {
    **dict.fromkeys(KV_ONLY, "$^"),
    "nvfp4_fp8_mha": "$^",
    "nvfp4_experts_only": r"^(?!.*\.experts\.)",
    **dict.fromkeys(
        "nvfp4_mlp_only nvfp4_omlp_only mxfp4_mlp_weight_only nvfp4_mlp_weight_only".split(), NO_MLP
    ),
    "mamba_moe_fp8_aggressive": f"{OUTPUT}|{MAMBA_LEFT}",
    "mamba_moe_nvfp4_aggressive": f"{OUTPUT}|{MAMBA_LEFT}",
    "mamba_moe_fp8_conservative": f"{OUTPUT}|{MAMBA_LEFT}{IN_AND_OUT}",
    "mamba_moe_nvfp4_conservative": f"{OUTPUT}|{MAMBA_LEFT}{IN_AND_OUT}",
}


def bytes_of(name: str, shape: tuple[int, ...], recipe: Recipe | None) -> int:
    never = re.search(r"router|gate|conv1d|norm|_down_proj|word_embeddings|bias|A_log|D$|offset", name)
    if recipe is None or never or len(shape) != 2 or re.search(LEFT.get(recipe.name, OUTPUT), name):
        return 2 * prod(shape)
    bits, scales = SAID[recipe.name]
    if recipe.name in KV_ONLY and "position" in name:  # the default of another class of module
        scales = one_scale
    return ceil(prod(shape) * bits / 8) + scales(*shape)


def test_every_recipe_is_said_anew() -> None:
    assert set(SAID) == {recipe.name for recipe in ALL}


@pytest.mark.parametrize("file", discover(TREE), ids=lambda file: file.name)
def test_on_one_rank_two_bytes_a_parameter(file: PresetFile) -> None:
    model = of_preset(file)
    assert Weights(model).stage_bytes(Layout()) == (2 * counts(model).total,)


@pytest.mark.parametrize("layout", ["tp1", "tp2", "ep2", "pp2", "tp2,etp1"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer_on_every_rank(name: str, layout: str) -> None:
    model, sizes = model_of(MODELS[name]), Layout.parse(layout)
    if model.num_layers % sizes.pp:
        with pytest.raises(UnevenStages):
            Weights(model).stage_bytes(sizes, ALL[0])
        return
    if model.moe is None:
        sizes = replace(sizes, ep=1)
    assert_as_one_by_one(model, sizes, None, *ALL)


@pytest.mark.parametrize("layout", ["tp8", "tp4,etp1", "ep8", "tp2,pp2,first20"])
def test_experts_as_one_by_one(layout: str) -> None:
    some = (None, find_recipe("nvfp4"), find_recipe("nvfp4_experts_only"))
    assert_as_one_by_one(named("Qwen3-30B-A3B"), Layout.parse(layout), *some, first_rank_only=True)


def test_the_last_stage_keeps_a_copy_of_tied_embeddings() -> None:
    model = named("Qwen3-0.6B")
    assert model.tied_embeddings
    with_output = find_recipe("nvfp4_fp8_mha")  # quantizes the output layer, where there is one
    assert_as_one_by_one(model, Layout(pp=4), None, with_output)


def assert_as_one_by_one(
    model: Architecture, layout: Layout, *recipes: Recipe | None, first_rank_only: bool = False
) -> None:
    weights = Weights(model)
    for rank in ranks(layout)[: 1 if first_rank_only else None]:
        shapes = rank_parameters(model, layout, rank)
        for recipe in recipes:
            stages = weights.stage_bytes(layout, recipe)
            assert len(stages) == layout.pp
            total = sum(bytes_of(name, shape, recipe) for name, shape in shapes.items())
            assert stages[rank.pp] == total, (rank, recipe and recipe.name)
            assert weights.largest(layout, recipe) == max(stages)


@pytest.mark.parametrize("shape", [(64, 256), (3, 40), (1, 16)], ids=str)
@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_a_matrix_with_its_scales(shape: tuple[int, int], recipe: Recipe) -> None:
    module = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1"
    bits, scales = SAID[recipe.name]
    found = weight_bytes(shape, recipe.formats(module)) + calibration_bytes(shape, recipe, module)
    assert found == ceil(prod(shape) * bits / 8) + scales(*shape)


def recipe_with(
    cfg: dict[str, object], pattern: str = "*weight_quantizer", algorithm: object = "max"
) -> Recipe:
    entries = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": pattern, "cfg": cfg}]
    return Recipe.of({"quant_cfg": entries, "algorithm": algorithm}, "mine")


def test_a_pattern_of_one_layer_counts_that_layer() -> None:
    """Layers are numbered anew on each stage, so that one of each is meant."""
    model = named("Qwen3-8B")
    one = recipe_with({"num_bits": 8}, "*layers.3.*weight_quantizer")
    every = recipe_with({"num_bits": 8}, "decoder.*weight_quantizer")
    whole, weights = Layout(), Weights(model)
    (bf16,), (first,), (all_of_them,) = (weights.stage_bytes(whole, each) for each in (None, one, every))
    assert 36 * (bf16 - first) == bf16 - all_of_them > 0
    assert [
        a - b
        for a, b in zip(
            weights.stage_bytes(Layout(pp=2)), weights.stage_bytes(Layout(pp=2), one), strict=True
        )
    ] == [bf16 - first] * 2


def test_a_backend_of_the_users_own_has_no_bits_that_are_known() -> None:
    recipe = recipe_with({"num_bits": "mine", "backend": "mine"})
    model = named("Qwen3-0.6B")
    assert Weights(model).stage_bytes(Layout(), recipe) == Weights(model).stage_bytes(Layout())


@pytest.mark.parametrize(
    ("method", "inputs", "expected"),
    [
        ("awq_lite", False, 2 * 256),
        ("awq_full", False, 2 * 256),
        ("awq_clip", False, 0),
        ("max", True, 0),
        (None, True, 0),
        ("smoothquant", True, 2 * 256),
        ("smoothquant", False, 0),
        ({"method": "svdquant", "lowrank": 8}, True, 2 * 256 + 2 * 8 * (64 + 256)),
        ({"method": "svdquant", "skip_layers": ["*fc1"]}, True, 0),
    ],
    ids=str,
)
def test_what_calibration_leaves(method: object, inputs: bool, expected: int) -> None:
    recipe = recipe_with({"num_bits": 8}, "*" if inputs else "*weight_quantizer", method)
    assert calibration_bytes((64, 256), recipe, "decoder.layers.0.mlp.linear_fc1") == expected


def test_packed_and_scales_as_modelopt_packs_them() -> None:
    """The classes that ``mtq.compress`` and the export pack with: bytes of numbers, and of their scales."""
    import_foreign()
    from modelopt.torch.quantization.qtensor import (
        FP8QTensor,
        INT8QTensor,
        MXFP4QTensor,
        MXFP8QTensor,
        NVFP4QTensor,
    )

    weight = torch.randn(64, 256, dtype=torch.bfloat16)
    packed = {
        "fp8": FP8QTensor.quantize(weight),
        "fp8_2d_blockwise_weight_only": FP8QTensor.quantize(weight, block_sizes={-1: 128, -2: 128}),
        "int8": INT8QTensor.quantize(weight, axis=0),
        "mxfp4": MXFP4QTensor.quantize(weight, 32),
        "mxfp8": MXFP8QTensor.quantize(weight),
        "nvfp4": NVFP4QTensor.quantize(weight, 16),
        "w4a8_nvfp4_fp8": NVFP4QTensor.quantize(weight, 32),
    }
    for name, (numbers, *scales) in packed.items():
        data = numbers._quantized_data
        stored = data.numel() * data.element_size()
        # Scales of one byte or float32: the classes may keep them in the weights' own type.
        small = (torch.uint8, torch.float8_e4m3fn)
        for scale in scales:
            stored += scale.numel() * (1 if scale.dtype in small else 4)
        assert stored == weight_bytes((64, 256), find_recipe(name).formats("")), name


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


def test_a_scale_over_a_whole_dimension_is_one() -> None:
    per_row = Format.of({"num_bits": (4, 3), "block_sizes": {-1: None}})
    assert weight_bytes((64, 256), (per_row,)) == 64 * 256 + 4 * 64
