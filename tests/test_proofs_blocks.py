"""Blocks: what every quantizer did with them in a forward pass, and what the audit said beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import small_models
import torch

from harness.architecture import Architecture
from harness.blocks import Misfit, misfits
from harness.build import build_model
from harness.layout import Layout
from harness.proofs import blocks
from harness.proofs.blocks import Observed, Use, observed, prove_blocks
from harness.proofs.proof import Outcome, Proof
from harness.rank import ranks_named
from harness.recipes import Recipe, find_recipe
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import forward, token_ids
from harness.world import open_world, receiving

import modelopt.torch.quantization as mtq  # isort: skip

CPU = torch.device("cpu")
MODELS = {
    **small_models.MODELS,
    "dense": small_models.DENSE,
    "MoE": small_models.SPARSE,
    # 200 is no multiple of 16, 32 or 128: of both layers' second feed-forward matrix.
    "uneven": small_models.DENSE.replace("--ffn-hidden-size 256", "--ffn-hidden-size 200"),
}
KINDS = ("dense", "uneven", "MoE", "latent attention", "Mamba and latent experts", "gated delta net")
# Dynamic blocks of 16 and 32, static ones in one dimension and in two, several stages, experts, the cache.
RECIPES = (
    "nvfp4", "mxfp8", "nvfp4_mlp_weight_only", "int4_blockwise_weight_only", "fp8_2d_blockwise_weight_only",
    "w4a8_nvfp4_fp8", "nvfp4_four_over_six", "fp8+nvfp4_kv",
)  # fmt: skip
FC1, FC2 = "decoder.layers.1.mlp.linear_fc1", "decoder.layers.1.mlp.linear_fc2"


def model_of(kind: str) -> Architecture:
    return small_models.model_of(MODELS.get(kind, kind))


def run(kind: str, recipe: Recipe, spoil: Callable[[Any], None] = lambda model: None) -> tuple[Any, Observed]:
    """A quantized model, spoilt after calibration, and what its forward pass showed."""
    with installed(CPU), open_world(Layout(), CPU), captured():
        model = build_model(model_of(kind), Layout(), CPU, 1234)
        tokens = token_ids(320, 4, 24, CPU)
        mtq.quantize(model, recipe.to_config(), lambda model: forward(model, tokens))
        spoil(model)
        with observed(model) as used:
            forward(model, tokens)
    return model, used


def prove(kind: str, name: str, spoil: Callable[[Any], None] = lambda model: None) -> Proof:
    recipe = find_recipe(name)
    model, used = run(kind, recipe, spoil)
    return prove_blocks(model, recipe, model_of(kind), Layout(), used=used)


# What should go through


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_recipes_and_the_audits(kind: str, name: str) -> None:
    proof = prove(kind, name)
    assert (proof.name, proof.outcome, proof.findings) == ("blocks", Outcome.PASSED, ())
    predicted = misfits(model_of(kind), Layout(), find_recipe(name))
    assert ("none padded" in proof.detail) == (not predicted)


DETAILS = {
    ("dense", "fp8"): "no blocks",
    ("dense", "nvfp4"): "16 quantizers in blocks of 16; none padded",
    ("uneven", "nvfp4"): "16 quantizers in blocks of 16; 4 padded",
    ("uneven", "mxfp4"): "16 quantizers in blocks of 32; 4 padded",
    ("uneven", "int4_awq"): "8 quantizers in blocks of 128; 2 padded",
    ("uneven", "fp8_2d_blockwise_weight_only"): "8 quantizers in blocks of 128 x 128; 4 padded",
    ("dense", "fp8+nvfp4_kv"): "4 quantizers in blocks of 16; none padded",
}


@pytest.mark.parametrize(("kind", "name"), DETAILS)
def test_detail(kind: str, name: str) -> None:
    assert prove(kind, name).detail == DETAILS[kind, name]


def test_uses_of_an_uneven_matrix() -> None:
    _, used = run("uneven", find_recipe("fp8_2d_blockwise_weight_only"))
    # 400 rows become 512 and 200 columns 256.
    assert used.uses[f"{FC1}.weight_quantizer"] == {Use(-2, 128, 112), Use(-1, 128, 0)}
    assert used.uses[f"{FC2}.weight_quantizer"] == {Use(-2, 128, 0), Use(-1, 128, 56)}
    _, used = run("uneven", find_recipe("nvfp4"))
    assert used.uses[f"{FC2}.weight_quantizer"] == used.uses[f"{FC2}.input_quantizer"] == {Use(-1, 16, 8)}


def test_static_blocks_are_known_without_a_forward_pass() -> None:
    recipe = find_recipe("int4_awq")
    model, _ = run("uneven", recipe)
    proof = prove_blocks(model, recipe, model_of("uneven"), Layout())
    assert (proof.findings, proof.detail) == ((), "8 quantizers in blocks of 128; 2 padded")


def test_watching_leaves_nothing_behind() -> None:
    from modelopt.torch.quantization import tensor_quant

    before = tensor_quant.dynamic_block_quantize_op
    model, _ = run("dense", find_recipe("nvfp4"))
    assert tensor_quant.dynamic_block_quantize_op is before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("number", range(2))
def test_a_rank_that_is_uneven_where_the_whole_is_not(number: int) -> None:
    """Of 16 x 15 columns a rank of two has 120: its blocks of 16 no longer fit."""
    layout, recipe = Layout(tp=2), find_recipe("nvfp4")
    small = small_models.model_of(MODELS["dense"].replace("--ffn-hidden-size 256", "--ffn-hidden-size 240"))
    rank = ranks_named("all", layout)[number]
    with installed(CPU), open_world(layout, CPU, rank=rank), captured():
        model = build_model(small, layout, CPU, 1234)
        tokens = token_ids(320, 4, 24, CPU)
        with receiving():
            mtq.quantize(model, recipe.to_config(), lambda model: forward(model, tokens))
            with observed(model) as used:
                forward(model, tokens)
    proof = prove_blocks(model, recipe, small, layout, rank, used)
    assert (proof.findings, proof.detail) == ((), "16 quantizers in blocks of 16; 4 padded")
    assert misfits(small, Layout(), recipe) == ()
    wrong = prove_blocks(model, recipe, small, Layout(), used=used)
    assert {finding.module for finding in wrong.findings} == {FC2, FC2.replace("1", "0", 1)}


def test_a_matrix_that_goes_past_its_quantizers_is_a_warning() -> None:
    (warning,) = prove("gated delta net", "nvfp4_fp8_mha").findings
    assert warning.module == "decoder.layers.0.self_attention.conv1d"
    assert "Megatron takes its weight as it is" in warning.message
    assert not warning.is_error


# Broken on purpose


def only(proof: Proof) -> tuple[str | None, str]:
    (finding,) = proof.findings
    assert proof.outcome is Outcome.FAILED
    return finding.module, finding.message


def test_another_block_size() -> None:
    def spoil(model: Any) -> None:
        model.get_submodule(FC1).weight_quantizer.block_sizes = {
            -1: 32, "type": "dynamic", "scale_bits": (4, 3)
        }  # fmt: skip

    assert only(prove("dense", "nvfp4", spoil)) == (
        FC1,
        "layers.1.mlp.linear_fc1  weight_quantizer used blocks of 32, nvfp4 gives it blocks of 16",
    )


def test_a_block_misaligned() -> None:
    """A quantizer in blocks of 48 pads 128 columns: unlike the recipe, and the audit knows nothing of it."""

    def spoil(model: Any) -> None:
        quantizer = model.get_submodule(FC1).weight_quantizer
        quantizer.block_sizes = {-1: 48}
        for name in ("_block_reshape_size", "_original_shape", "_padding", "_slices"):
            quantizer.__dict__.pop(name, None)
        quantizer._amax = torch.ones(512 * 3, 1)

    proof = prove("dense", "int4_blockwise_weight_only", spoil)
    assert [finding.message for finding in proof.findings] == [
        "layers.1.mlp.linear_fc1  weight_quantizer used blocks of 48, int4_blockwise_weight_only gives it "
        "blocks of 128",
        "layers.1.mlp.linear_fc1  weight_quantizer pads dimension -1 in blocks of 48 by 16, which the audit "
        "does not say",
    ]
    assert {finding.module for finding in proof.findings} == {FC1}


def test_a_quantizer_that_does_not_run() -> None:
    proof = prove("dense", "nvfp4", lambda model: model.get_submodule(FC1).weight_quantizer.disable())
    assert only(proof) == (
        FC1,
        "layers.1.mlp.linear_fc1  weight_quantizer used no blocks, nvfp4 gives it blocks of 16",
    )


@pytest.mark.parametrize("name", ["nvfp4", "int4_blockwise_weight_only"])
def test_padding_that_the_audit_does_not_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "misfits", lambda *_: ())
    proof = prove("uneven", name)
    assert {finding.module for finding in proof.findings} == {FC2, FC2.replace("1", "0", 1)}
    assert all("which the audit does not say" in finding.message for finding in proof.findings)


@pytest.mark.parametrize("name", ["nvfp4", "int4_blockwise_weight_only"])
def test_padding_that_only_the_audit_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the even model, the audit of the uneven one."""

    def of_the_uneven(_: Architecture, layout: Layout, recipe: Recipe) -> tuple[Misfit, ...]:
        return misfits(model_of("uneven"), layout, recipe)

    monkeypatch.setattr(blocks, "misfits", of_the_uneven)
    proof = prove("dense", name)
    assert {finding.module for finding in proof.findings} == {FC2, FC2.replace("1", "0", 1)}
    assert all("though the audit says so" in finding.message for finding in proof.findings)


def test_blocks_that_only_the_audit_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit of the uneven model under another block size, of which no quantizer has one."""

    def of_others(_: Architecture, layout: Layout, recipe: Recipe) -> tuple[Misfit, ...]:
        return tuple(
            dataclasses.replace(each, block=64) for each in misfits(model_of("uneven"), layout, recipe)
        )

    monkeypatch.setattr(blocks, "misfits", of_others)
    proof = prove("dense", "nvfp4")
    assert {finding.module for finding in proof.findings} == {FC2, FC2.replace("1", "0", 1)}
    assert all("no quantizer uses blocks of 64 along dimension -1" in each.message for each in proof.findings)
