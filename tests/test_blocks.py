"""Which matrices blocks do not divide: every one that is there, and none that is not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from broken import TREE
from published import changed, named, of_preset
from small_models import MODELS, model_of

from harness.architecture import Architecture
from harness.blocks import Misfit, misfit_findings, misfits, quantized_inputs
from harness.layout import Layout
from harness.preset import PresetFile, discover
from harness.rank import UnevenStages, ranks
from harness.recipes import RECIPES, Format, Recipe, find_recipe
from harness.sharding import UnevenSplit, rank_parameters

# What ModelOpt leaves alone: the router, the gate of the shared expert, convolutions and the
# down-projections of latent attention.
_LEFT_ALONE = re.compile(
    r"(router|gate_weight|conv1d|conv1d_weight|linear_q_down_proj|linear_kv_down_proj)\b"
)


def found(model: Architecture, layout: str, recipe: str) -> tuple[Misfit, ...]:
    return misfits(model, Layout.parse(layout), find_recipe(recipe))


def shapes_at_fault(model: Architecture, layout: Layout, block: int) -> set[tuple[str, int]]:
    """Matrices, and their inputs on a rank, that ``block`` does not divide: from the shapes of two ranks."""
    kinds = replace(model, layers=tuple(dict.fromkeys(model.layers)))
    return {
        (matrix, shape[1])
        for rank in (ranks(layout)[0], ranks(layout)[-1])
        for name, shape in rank_parameters(kinds, layout, rank).items()
        for matrix in matrix_names(name, shape)
        if shape[1] % block
    }


def matrix_names(name: str, shape: Sequence[int]) -> Iterator[str]:
    """The module within its layer, where ``name`` is a quantized matrix: the expert's number left out."""
    match = re.fullmatch(r"decoder\.layers\.\d+\.(.*)\.weight", name)
    if match and len(shape) == 2 and not _LEFT_ALONE.search(name):
        yield re.sub(r"\.local_experts\.\d+", "", match[1])


def named_at_fault(model: Architecture, layout: Layout, recipe: Recipe, block: int) -> set[tuple[str, int]]:
    return {
        (matrix, misfit.inputs.per_rank)
        for misfit in misfits(model, layout, recipe)
        if misfit.block == block
        for matrix in misfit.inputs.matrices
    }


def assert_exactly_the_misfits(model: Architecture, layout: Layout) -> None:
    for recipe in RECIPES:
        for block in recipe.block_sizes:
            expected = shapes_at_fault(model, layout, block)
            assert named_at_fault(model, layout, recipe, block) == expected, (recipe.name, block)
        if not recipe.block_sizes:
            assert misfits(model, layout, recipe) == ()


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp4", "tp8", "tp8,etp1", "ep2", "etp4"])
@pytest.mark.parametrize("file", discover(TREE), ids=lambda file: file.name)
def test_every_misfit_is_real_and_none_is_missed(file: PresetFile, layout: str) -> None:
    model, sizes = of_preset(file), Layout.parse(layout)
    try:
        shapes_at_fault(model, sizes, 1)
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
    monkeypatch.setattr("harness.blocks._of_experts", lambda moe, layout: iter(()))
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
        if one.inputs.factors == ("ffn_hidden_size",)
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
    assert [misfit.inputs.factors for misfit in found(model, "tp4", "nvfp4")] == []
    assert [misfit.inputs.factors for misfit in found(model, "tp2", "nvfp4")] == [("ffn_hidden_size",)]


def test_a_block_of_the_inputs_alone_counts() -> None:
    only_inputs = Recipe("x", "X_CFG", (Format((4, 3)),), Format((4, 3), 32, True), "max", False, "here")
    model = changed(named("Qwen3-8B"), ffn_hidden_size=12304)
    (misfit,) = misfits(model, Layout(), only_inputs)
    assert misfit.block == 32
    assert misfit.consequence.startswith("the kernel")


def test_down_projections_are_not_quantized() -> None:
    matrices = {
        matrix for inputs in quantized_inputs(named("DeepSeek-R1"), Layout()) for matrix in inputs.matrices
    }
    assert not [matrix for matrix in matrices if "down" in matrix]
    assert "self_attention.linear_q_up_proj" in matrices
