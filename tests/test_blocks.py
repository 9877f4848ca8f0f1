"""Which matrices blocks do not divide: every one that is there, and none that is not."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from broken import TREE
from published import changed, named, of_preset
from small_models import MODELS, model_of

from harness.architecture import Architecture
from harness.blocks import Misfit, misfit_findings, misfits, module_path
from harness.dimensions import dimensions
from harness.layout import Layout
from harness.preset import PresetFile, discover
from harness.rank import UnevenStages, ranks
from harness.recipes import Recipe, find_recipe, recipes
from harness.sharding import UnevenSplit, rank_parameters

# Recipes that put every matrix in blocks, each in another way, and those that leave some out.
BLOCKED = tuple(
    map(
        find_recipe,
        (
            "nvfp4",
            "int4_awq",
            "mxfp8",
            "fp8_2d_blockwise_weight_only",
            "nvfp4_mlp_weight_only",
            "nvfp4_fp8_mha",
            "nvfp4_experts_only",
            "mamba_moe_nvfp4_conservative",
            "w4a8_awq_beta",
            "nvfp4_w4a4_weight_local_hessian",
        ),
    )
)


def found(model: Architecture, layout: str, recipe: str) -> tuple[Misfit, ...]:
    return misfits(model, Layout.parse(layout), find_recipe(recipe))


Fault = tuple[str, int, int, int]


def at_fault(model: Architecture, layout: Layout, recipe: Recipe) -> set[Fault]:
    """(matrix, dimension, its size on a rank, block) of all that blocks of ``recipe`` do not divide.

    From the shapes of the first and the last rank, and from what the recipe says of each path.
    """
    kinds = replace(model, layers=tuple(dict.fromkeys(model.layers)))
    found = set()
    for rank in (ranks(layout)[0], ranks(layout)[-1]):
        for name, shape in rank_parameters(kinds, layout, rank).items():
            if len(shape) != 2 or not name.endswith(".weight") or _LEFT_ALONE.search(name):
                continue
            path = name.removesuffix(".weight")
            parent = "nn.Embedding" if "position" in path else None
            for which in ("weight", "input"):
                for entry in recipe.formats(path, which, parent):
                    for axis, size in entry.partial_blocks:
                        if shape[axis] % size:
                            found.add((within_layer(path), axis, shape[axis], size))
    return found


# Of what ModelOpt has no quantized form, and what of a convolution no forward pass takes in blocks.
_LEFT_ALONE = re.compile(r"(router|conv1d|linear_q_down_proj|linear_kv_down_proj|word_embeddings)\b")


def within_layer(path: str) -> str:
    return re.sub(r"\.local_experts\.\d+", "", re.sub(r"decoder\.layers\.\d+\.", "", path))


def said(model: Architecture, layout: Layout, recipe: Recipe) -> set[Fault]:
    return {
        (matrix, misfit.dimension.axis, misfit.dimension.per_rank, misfit.block)
        for misfit in misfits(model, layout, recipe)
        if misfit.dimension.what != "heads"
        for matrix in misfit.dimension.matrices
    }


def assert_exactly_the_misfits(model: Architecture, layout: Layout) -> None:
    for recipe in BLOCKED:
        assert said(model, layout, recipe) == at_fault(model, layout, recipe), recipe.name


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp4", "tp8", "tp8,etp1", "ep2", "etp4"])
@pytest.mark.parametrize("file", discover(TREE), ids=lambda file: file.name)
def test_every_misfit_is_real_and_none_is_missed(file: PresetFile, layout: str) -> None:
    model, sizes = of_preset(file), Layout.parse(layout)
    try:
        at_fault(model, sizes, BLOCKED[0])
    except UnevenSplit:
        # No rank has such a matrix; what the layout does divide is compared at the other layouts.
        return
    assert_exactly_the_misfits(model, sizes)


@pytest.mark.parametrize("off", [8, 16, 64])
@pytest.mark.parametrize("name", MODELS)
def test_every_size_of_every_kind_of_layer_by_itself(name: str, off: int) -> None:
    """Each size in turn is made uneven: the misfits follow it, and only it."""
    model = model_of(MODELS[name])
    for dest in _SIZES:
        size = model.arguments[dest]
        if isinstance(size, int) and size > 0:
            assert_exactly_the_misfits(changed(model, **{dest: size + off}), Layout())


_SIZES = """
    hidden_size ffn_hidden_size kv_channels moe_ffn_hidden_size moe_shared_expert_intermediate_size
    moe_latent_size q_lora_rank kv_lora_rank v_head_dim qk_head_dim mamba_head_dim mamba_state_dim
    linear_value_head_dim linear_key_head_dim padded_vocab_size
""".split()


@pytest.mark.parametrize("name", MODELS)
def test_small_models_on_two_ranks(name: str) -> None:
    try:
        assert_exactly_the_misfits(model_of(MODELS[name]), Layout(tp=2, etp=2))
    except (UnevenSplit, UnevenStages) as error:
        pytest.fail(f"every small model divides by two: {error}")


def test_a_matrix_left_out_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = named("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"), Layout(tp=8, etp=8)
    assert_exactly_the_misfits(model, layout)
    monkeypatch.setattr("harness.dimensions._of_experts", lambda moe, layout: iter(()))
    with pytest.raises(AssertionError):
        assert_exactly_the_misfits(model, layout)


# What is said


def test_the_dimension_at_fault_and_why() -> None:
    model = named("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    texts = [misfit.text(model) for misfit in found(model, "tp8", "nvfp4")]
    assert "--moe-ffn-hidden-size 1856 / 8 = 232, not a multiple of 16" in texts


def test_a_width_of_heads_is_a_product() -> None:
    model = changed(named("Qwen3-8B"), num_attention_heads=20, num_query_groups=4, kv_channels=100)
    (misfit,) = found(model, "tp2", "int4_awq")
    assert misfit.text(model) == (
        "--num-attention-heads 20 x --kv-channels 100 = 2000 / 2 = 1000, not a multiple of 128"
    )


@pytest.mark.parametrize(
    ("recipe", "size", "layout", "words"),
    [
        (
            "int4_awq",
            12352,
            "tp1",
            "ModelOpt pads its last block with zeros without a word, and the export refuses it",
        ),
        (
            "nvfp4",
            12296,
            "tp1",
            "the kernel reads zeros past its end without a word, and the export refuses it",
        ),
        (
            "int4_awq",
            12288,
            "tp64",
            "ModelOpt pads its last block with zeros without a word, and its blocks are not those of the "
            "whole matrix at the export",
        ),
    ],
    ids=["static", "dynamic", "only-on-a-rank"],
)
def test_what_then_happens(recipe: str, size: int, layout: str, words: str) -> None:
    (misfit,) = (
        one
        for one in found(changed(named("Qwen3-8B"), ffn_hidden_size=size), layout, recipe)
        if one.dimension.factors == ("ffn_hidden_size",)
    )
    assert misfit.consequence == words


def test_a_finding_has_all_of_it() -> None:
    model = changed(named("Qwen3-8B"), ffn_hidden_size=12296)
    (finding,) = misfit_findings(model, Layout(), find_recipe("nvfp4"))
    assert finding.message == (
        "--ffn-hidden-size 12296, not a multiple of 16, as nvfp4 wants of the inputs of mlp.linear_fc2: "
        "the kernel reads zeros past its end without a word, and the export refuses it"
    )
    assert (finding.flag, finding.actual, finding.expected) == (
        "--ffn-hidden-size",
        12296,
        "a multiple of 16",
    )
    assert not finding.is_error


def test_what_a_layout_does_not_divide_is_no_misfit() -> None:
    model = changed(named("Qwen3-8B"), ffn_hidden_size=12290)
    assert [misfit.dimension.factors for misfit in found(model, "tp4", "nvfp4")] == []
    assert [misfit.dimension.factors for misfit in found(model, "tp2", "nvfp4")] == [("ffn_hidden_size",)]


def recipe_with(*entries: dict[str, Any]) -> Recipe:
    return Recipe.of({"quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries]}, "mine")


def test_a_block_of_the_inputs_alone_counts() -> None:
    blocks = {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
    only_inputs = recipe_with({"quantizer_name": "*input_quantizer", "cfg": blocks})
    model = changed(named("Qwen3-8B"), ffn_hidden_size=12304)
    (misfit,) = misfits(model, Layout(), only_inputs)
    assert misfit.block == 32
    assert misfit.consequence.startswith("the kernel")


def test_down_projections_are_not_quantized() -> None:
    matrices = {
        matrix for dimension in dimensions(named("DeepSeek-R1"), Layout()) for matrix in dimension.matrices
    }
    assert not [matrix for matrix in matrices if "down" in matrix]
    assert "self_attention.linear_q_up_proj" in matrices


def test_only_the_matrices_that_a_recipe_quantizes_are_at_fault() -> None:
    model = changed(named("Qwen3-8B"), hidden_size=4100)
    (misfit,) = found(model, "tp1", "nvfp4_mlp_only")
    assert misfit.dimension.matrices == ("mlp.linear_fc1",)
    assert found(model, "tp1", "nvfp4_experts_only") == ()


def test_a_pattern_of_some_layers_is_of_the_layers_that_are_there() -> None:
    blocks = {"num_bits": 4, "block_sizes": {-1: 128}}
    model = changed(named("Qwen3-8B"), ffn_hidden_size=12296)
    for pattern, times in (("*layers.35.*weight_quantizer", 1), ("*layers.36.*weight_quantizer", 0)):
        recipe = recipe_with({"quantizer_name": pattern, "cfg": blocks})
        assert recipe.by_layer
        assert len(misfits(model, Layout(), recipe)) == times


def test_matrices_of_different_formats_are_told_apart() -> None:
    static, dynamic = {-1: 16, "scale_bits": (4, 3)}, {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    recipe = recipe_with(
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (2, 1), "block_sizes": dynamic}},
        {"quantizer_name": "*linear_qkv.weight*", "cfg": {"num_bits": (2, 1), "block_sizes": static}},
        {"quantizer_name": "*output_layer*", "enable": False},
    )
    first, second = misfits(changed(named("Qwen3-8B"), hidden_size=4100), Layout(), recipe)
    assert (first.dimension.matrices, first.format.dynamic) == (("self_attention.linear_qkv",), False)
    assert (second.dimension.matrices, second.format.dynamic) == (("mlp.linear_fc1",), True)


@pytest.mark.parametrize(
    ("recipe", "size", "words"),
    [
        (
            "fp8_2d_blockwise_weight_only",
            12352,
            "ModelOpt pads its last block with zeros without a word, and so does the export",
        ),
        (
            "mxfp4",
            12304,
            "the kernel reads zeros past its end without a word, and the export lets its blocks run over "
            "the ends of rows",
        ),
        ("mxfp8", 12304, "the kernel reads zeros past its end without a word, and the export refuses it"),
        (
            "mxfp6",
            12304,
            "the kernel reads zeros past its end without a word, and ModelOpt exports no such format",
        ),
        (
            "nvfp4_mlp_weight_only",
            12304,
            "the kernel takes blocks of 16 in their place without a word, and the export refuses it",
        ),
        (
            "nvfp4_mlp_weight_only",
            12296,
            "the kernel reads zeros past its end without a word, and the export refuses it",
        ),
        (
            "nvfp4_four_over_six",
            12296,
            "ModelOpt pads its last block with zeros without a word, and the export refuses it",
        ),
    ],
    ids=str,
)
def test_what_then_happens_to_other_formats(recipe: str, size: int, words: str) -> None:
    model = changed(named("Qwen3-8B"), ffn_hidden_size=size)
    one = next(one for one in found(model, "tp1", recipe) if one.dimension.what == "inputs")
    assert one.consequence == words


def test_rows_of_two_dimensional_blocks() -> None:
    texts = {
        misfit.text(named("Qwen3-8B")): misfit.dimension.matrices
        for misfit in found(named("Qwen3-8B"), "tp32", "fp8_2d_blockwise_weight_only")
    }
    assert texts[
        "--num-attention-heads 32, --num-query-groups 8, --kv-channels 128 make 6144 / 32 = 192, "
        "not a multiple of 128"
    ] == ("self_attention.linear_qkv",)
    model = changed(named("Qwen3-8B"), ffn_hidden_size=12300)
    (gate_and_up,) = (
        misfit.text(model)
        for misfit in found(model, "tp1", "fp8_2d_blockwise_weight_only")
        if misfit.dimension.what == "outputs"
    )
    assert gate_and_up == "2 x --ffn-hidden-size 12300 = 24600, not a multiple of 128"


def test_heads_of_a_cache_in_blocks() -> None:
    model = changed(named("Qwen3-8B"), kv_channels=72)
    (misfit,) = (one for one in found(model, "tp1", "nvfp4_experts_only+nvfp4_kv"))
    assert misfit.text(model) == "--kv-channels 72, not a multiple of 16"
    assert misfit.dimension.matrices == ("self_attention.core_attention",)
    assert misfit.consequence == "the kernel reads zeros past its end without a word"
    (finding,) = misfit_findings(model, Layout(), find_recipe("nvfp4_experts_only+nvfp4_kv"))
    assert (
        "as nvfp4_experts_only+nvfp4_kv wants of the heads of self_attention.core_attention:"
        in finding.message
    )
    latent = changed(named("DeepSeek-R1"), qk_pos_emb_head_dim=72, v_head_dim=136)
    keys, values = (
        one for one in found(latent, "tp1", "nvfp4_experts_only+nvfp4_kv") if one.dimension.what == "heads"
    )
    assert keys.text(latent) == "--qk-head-dim 128, --qk-pos-emb-head-dim 72 make 200, not a multiple of 16"
    assert values.text(latent) == "--v-head-dim 136, not a multiple of 16"


def test_paths_in_the_model() -> None:
    assert (
        module_path("mlp.experts.linear_fc1", 3) == "decoder.layers.3.mlp.experts.local_experts.0.linear_fc1"
    )
    assert module_path("mlp.shared_experts.linear_fc1") == "decoder.layers.0.mlp.shared_experts.linear_fc1"
    assert module_path("output_layer", 3) == "output_layer"


def test_every_recipe_without_blocks_fits_everything() -> None:
    model = changed(named("Qwen3-8B"), hidden_size=4097, ffn_hidden_size=12289)
    without = [recipe for recipe in recipes() if not recipe.has_blocks]
    assert {recipe.name for recipe in without} >= {"fp8", "int8", "int8_smoothquant", "fp8_kv"}
    assert all(misfits(model, Layout(), recipe) == () for recipe in without)
