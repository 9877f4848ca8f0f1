"""Coverage: what each recipe quantizes of each kind of model, by hand; every deviation, at its module."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from asserted import asserted

from harness.architecture import Architecture
from harness.build import build_model
from harness.finding import Finding
from harness.inventory import parameters
from harness.layout import Layout
from harness.layout_rules import Owner
from harness.proofs.coverage import parts, prove_coverage
from harness.proofs.patterns import misspelt, modelopts_words
from harness.proofs.proof import Outcome, Proof
from harness.rank import ranks_named
from harness.recipes import Recipe, find_recipe, names
from harness.roles import Role
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import forward, token_ids
from harness.world import open_world, receiving

import modelopt.torch.quantization as mtq  # isort: skip

CPU = torch.device("cpu")
MODELS = {**small_models.MODELS, "dense": small_models.DENSE, "MoE": small_models.SPARSE}
TIED = small_models.DENSE.replace("--untie-embeddings-and-output-weights ", "")
ATTENTION = {Role.QKV, Role.PROJ}
EXPERTS = {Role.EXPERT_FC1, Role.EXPERT_FC2}
SHARED = {Role.SHARED_FC1, Role.SHARED_FC2}
LATENT_EXPERTS = {Role.EXPERT_LATENT_IN, Role.EXPERT_LATENT_OUT}
MLP = {Role.FC1, Role.FC2}
MAMBA, DELTA = {Role.MAMBA_IN, Role.MAMBA_OUT}, {Role.DELTA_IN, Role.DELTA_OUT}

# Of each kind of model: every matrix that a plain recipe means, and what its feed-forward layers have.
EVERY = {
    "dense": ATTENTION | MLP,
    "MoE": ATTENTION | EXPERTS,
    "latent attention": {Role.PROJ, Role.LATENT_UP} | MLP | EXPERTS | SHARED,
    "Mamba and latent experts": ATTENTION | MAMBA | EXPERTS | SHARED | LATENT_EXPERTS,
    "gated delta net": ATTENTION | DELTA | EXPERTS | SHARED,
}
FEED_FORWARD = MLP | EXPERTS | SHARED | LATENT_EXPERTS
PLAIN = (
    "fp8",
    "nvfp4",
    "int4_awq",
    "w4a16_nvfp4",
    "int4_blockwise_weight_only",
    "fp8+fp8_kv",
    "nvfp4+nvfp4_kv",
)
WEIGHTS_ONLY = ("int4_awq", "w4a16_nvfp4", "int4_blockwise_weight_only", "nvfp4_mlp_weight_only")
EXPERTS_ONLY = ("nvfp4_experts_only", "nvfp4_experts_only-kv_fp8")
# Their patterns for attention's output projection are Hugging Face's: Megatron's keeps its numbers.
OMLP_ONLY = ("nvfp4_omlp_only", "nvfp4_omlp_only-kv_fp8")
MLP_ONLY = ("nvfp4_mlp_only", "nvfp4_mlp_weight_only", *OMLP_ONLY)
MAMBA_MOE = tuple(
    f"mamba_moe_{form}_{how}" for form in ("fp8", "nvfp4") for how in ("aggressive", "conservative")
)
WITH_CACHE = ("fp8+fp8_kv", "nvfp4+nvfp4_kv", "nvfp4_experts_only-kv_fp8", "nvfp4_omlp_only-kv_fp8")
RECIPES = (*PLAIN, *EXPERTS_ONLY, *MLP_ONLY, *MAMBA_MOE)
FC1 = "decoder.layers.1.mlp.linear_fc1"


def expected(kind: str, recipe: str) -> set[Role]:
    """The roles of which matrices are quantized."""
    every = EVERY[kind]
    if recipe in EXPERTS_ONLY:
        return every & EXPERTS
    if recipe in MLP_ONLY:
        return every & FEED_FORWARD
    if recipe in MAMBA_MOE:
        # They leave attention alone, by the names of its plain form, and the experts' latent projections.
        left = ATTENTION | LATENT_EXPERTS | (MAMBA if recipe.endswith("conservative") else set())
        return every - left
    return every


def model_of(kind: str) -> Architecture:
    return small_models.model_of(MODELS.get(kind, kind))


def quantized(kind: str, recipe: Recipe) -> Any:
    with installed(CPU), open_world(Layout(), CPU), captured():
        model = build_model(model_of(kind), Layout(), CPU, 1234)
        tokens = token_ids(320, 4, 24, CPU)
        mtq.quantize(model, recipe.to_config(), lambda model: forward(model, tokens))
    return model


def prove(kind: str, recipe: Recipe, spoil: Callable[[Any], None] = lambda model: None) -> Proof:
    model = quantized(kind, recipe)
    spoil(model)
    return prove_coverage(model, recipe, model_of(kind), Layout())


def errors(proof: Proof) -> list[Finding]:
    return [finding for finding in proof.findings if finding.is_error]


def of_patterns(proof: Proof) -> list[Finding]:
    return [finding for finding in proof.findings if "pattern " in finding.message]


def roles_on(detail: str) -> set[Role]:
    """The roles of which matrices the detail line says that they are quantized, all of each."""
    found: set[Role] = set()
    for part in detail.split("; "):
        match = re.fullmatch(r"weights(?: and inputs)? of (.*)", part)
        for said in re.findall(r"([a-z].*?) (\d+) of (\d+)", match[1]) if match else ():
            assert said[1] == said[2]
            found |= set(map(Role, said[0].split(", ")))
    return found


# What should go through


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", EVERY)
def test_roles(kind: str, recipe: str) -> None:
    if not expected(kind, recipe):
        with pytest.raises(RuntimeError, match="no weight quantizer is enabled"):
            quantized(kind, find_recipe(recipe))
        return
    proof = prove(kind, find_recipe(recipe))
    outcome = Outcome.UNSUPPORTED if recipe in OMLP_ONLY and Role.PROJ in EVERY[kind] else Outcome.PASSED
    assert (proof.name, proof.outcome, errors(proof)) == ("coverage", outcome, [])
    assert roles_on(proof.detail) == expected(kind, recipe)
    assert ("weights and inputs of" in proof.detail) == (recipe not in WEIGHTS_ONLY)
    assert ("keys and values of kv" in proof.detail) == (recipe in WITH_CACHE)


DETAILS = {
    ("dense", "fp8"): "weights and inputs of qkv, proj, fc1, fc2 2 of 2; output, kv off; embedding without a "
    "quantized form; 78.1 % of parameters",
    (
        "MoE",
        "fp8",
    ): "weights and inputs of qkv, proj 2 of 2, expert fc1, expert fc2 16 of 16; output, kv off; "
    "router, embedding without a quantized form; 91.3 % of parameters",
    (
        "MoE",
        "nvfp4_experts_only-kv_fp8",
    ): "weights and inputs of expert fc1, expert fc2 16 of 16; keys and values "
    "of kv 2 of 2; qkv, proj, output off; router, embedding without a quantized form; 81.1 % of parameters; "
    "nothing here is called block_sparse_moe",
    (
        "dense",
        "nvfp4_omlp_only",
    ): "weights and inputs of fc1, fc2 2 of 2; qkv, proj, output, kv off; embedding "
    "without a quantized form; 52.1 % of parameters; nothing here is called o_proj, mixer.up_proj, "
    "mixer.down_proj, block_sparse_moe",
}


@pytest.mark.parametrize(("kind", "recipe"), DETAILS)
def test_detail(kind: str, recipe: str) -> None:
    assert prove(kind, find_recipe(recipe)).detail == DETAILS[kind, recipe]


def test_share_of_parameters_by_hand() -> None:
    shapes = parameters(model_of("dense"))
    fc1, fc2 = 2 * 256 * 128, 128 * 256
    whole = sum(torch.Size(shape).numel() for shape in shapes.values())
    share = f"{100 * 2 * (fc1 + fc2) / whole:.1f} % of parameters"
    assert share in prove("dense", find_recipe("nvfp4_mlp_only")).detail


def test_a_tied_output_layer_has_quantizers_and_no_numbers() -> None:
    proof = prove(TIED, find_recipe("nvfp4_fp8_mha"))
    assert errors(proof) == []
    assert "output 1 of 1" in proof.detail


def test_local_attention_has_no_cache_quantizers() -> None:
    kind = small_models.DENSE + "--export-force-local-attention"
    proof = prove(kind, find_recipe("fp8+fp8_kv"))
    assert errors(proof) == []
    assert " kv" not in proof.detail


def test_what_is_meant_and_has_no_form_is_a_warning() -> None:
    (warning,) = prove("latent attention", find_recipe("fp8")).findings
    assert warning.module == "decoder.layers.0.self_attention.linear_q_down_proj"
    assert warning.message == (
        "layers.0.self_attention.linear_q_down_proj  stays in bf16, one of 4 such matrices (latent down): "
        "ModelOpt has no quantized form of the class that Megatron makes them of, though fp8 means them"
    )
    assert not warning.is_error


# Broken on purpose


def spoilt(attribute: str, enable: bool) -> Callable[[Any], None]:
    def spoil(model: Any) -> None:
        quantizer = getattr(model.get_submodule(FC1), attribute)
        (quantizer.enable if enable else quantizer.disable)()

    return spoil


@pytest.mark.parametrize(
    ("attribute", "enable", "message"),
    [
        ("weight_quantizer", False, "weight_quantizer is off, fp8 means it on"),
        ("input_quantizer", False, "input_quantizer is off, fp8 means it on"),
        ("output_quantizer", True, "output_quantizer is on, fp8 means it off"),
    ],
)
def test_a_quantizer_left_off_or_on(attribute: str, enable: bool, message: str) -> None:
    proof = prove("dense", find_recipe("fp8"), spoilt(attribute, enable))
    assert proof.outcome is Outcome.FAILED
    (wrong,) = proof.findings
    assert (wrong.module, wrong.message) == (FC1, f"layers.1.mlp.linear_fc1  {message}")
    program = asserted(proof.findings, "coverage")
    assert f"{FC1}.{attribute}" in program
    assert ("assert not any(on), " if enable else "assert on == [True], ") in program


def test_a_stage_of_two_left_off() -> None:
    def spoil(model: Any) -> None:
        model.get_submodule(FC1).weight_quantizer[1].disable()

    (wrong,) = prove("dense", find_recipe("w4a8_awq_beta"), spoil).findings
    assert (wrong.module, wrong.expected, wrong.actual) == (FC1, "on, then on", "on, then off")
    assert "assert on == [True, True], " in asserted([wrong], "coverage", "w4a8_awq_beta")


def test_a_quantizer_that_is_missing() -> None:
    def spoil(model: Any) -> None:
        del model.get_submodule(FC1).weight_quantizer

    (wrong,) = prove("dense", find_recipe("fp8"), spoil).findings
    assert wrong.message == "layers.1.mlp.linear_fc1  weight_quantizer is missing, fp8 means it on"


def test_a_cache_quantizer_left_off() -> None:
    core = "decoder.layers.0.self_attention.core_attention"
    recipe = find_recipe("fp8+fp8_kv")
    proof = prove("dense", recipe, lambda model: model.get_submodule(core).k_bmm_quantizer.disable())
    (wrong,) = proof.findings
    assert (wrong.module, "k_bmm_quantizer is off" in wrong.message) == (core, True)


def test_a_model_quantized_by_another_recipe() -> None:
    model = quantized("dense", find_recipe("nvfp4_mlp_only"))
    proof = prove_coverage(model, find_recipe("nvfp4"), model_of("dense"), Layout())
    modules = {finding.module for finding in proof.findings}
    assert modules == {
        f"decoder.layers.{layer}.self_attention.{name}"
        for layer in (0, 1)
        for name in ("linear_qkv", "linear_proj")
    }


# Patterns

USERS = """
quant_cfg:
  - quantizer_name: '*'
    enable: false
  - quantizer_name: '*weight_quantizer'
    cfg: {num_bits: e4m3}
  - quantizer_name: 'PATTERN'
    cfg: {num_bits: e4m3}
algorithm: max
"""


def users(folder: Path, pattern: str) -> Recipe:
    path = folder / "mine.yaml"
    path.write_text(USERS.replace("PATTERN", pattern))
    return find_recipe(str(path))


EXPERT = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1"
MISSPELT = {
    # A letter missing, too many, another, two swapped; case; a dot or star missing.
    "*.expert.*input_quantizer": ("*.expert*.*input_quantizer", EXPERT),
    "*.expertss.*input_quantizer": ("*.experts.*input_quantizer", EXPERT),
    "*.exports.*input_quantizer": ("*.experts.*input_quantizer", EXPERT),
    "*.epxerts.*input_quantizer": ("*.experts.*input_quantizer", EXPERT),
    "*.Experts.*input_quantizer": ("*.experts.*input_quantizer", EXPERT),
    "*MLP*input_quantizer": (
        "*mlp*input_quantizer",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1",
    ),
    "*linear_qvk*input_quantizer": (
        "*linear_qkv*input_quantizer",
        "decoder.layers.0.self_attention.linear_qkv",
    ),
    "*input_quantiser": ("*input_quantizer", "decoder.layers.0.self_attention.linear_qkv"),
    "mlp.experts.*input_quantizer": ("*mlp.experts.*input_quantizer", EXPERT),
    "*mlp.experts.linear_fc1.input_quantizer": ("*mlp.experts*.linear_fc1.input_quantizer", EXPERT),
    "*k_bmm_quantiser": ("*k_bmm_quantizer", "decoder.layers.0.self_attention.core_attention"),
}


@pytest.mark.parametrize("pattern", MISSPELT)
def test_a_misspelt_pattern(pattern: str, tmp_path: Path) -> None:
    recipe = users(tmp_path, pattern)
    meant, module = MISSPELT[pattern]
    (wrong,) = errors(prove("MoE", recipe))
    assert (wrong.module, wrong.expected, wrong.actual) == (module, meant, pattern)
    assert f"{tmp_path}/mine.yaml:7: pattern '{pattern}'" in wrong.message
    assert f"matches nothing, though the model has such modules; '{meant}' would match" in wrong.message


# Hugging Face's names of what the model has, and names of Megatron's put together wrongly.
BY_OTHER_NAMES = {
    "*block_sparse_moe*input_quantizer": ("expert fc1", EXPERT),
    "*experts_fc1*input_quantizer": ("expert fc1", EXPERT),
    "*lm_head*input_quantizer": ("output", "output_layer"),
    "*self_attn*input_quantizer": ("qkv", "decoder.layers.0.self_attention.linear_qkv"),
    "*.o_proj.input_quantizer": ("proj", "decoder.layers.0.self_attention.linear_proj"),
    "*self_attn.[kv]_bmm_quantizer": ("kv", "decoder.layers.0.self_attention.core_attention"),
}


@pytest.mark.parametrize("pattern", BY_OTHER_NAMES)
def test_a_pattern_for_what_the_model_has_by_another_name(pattern: str, tmp_path: Path) -> None:
    role, module = BY_OTHER_NAMES[pattern]
    (wrong,) = errors(prove("MoE", users(tmp_path, pattern)))
    assert (wrong.module, wrong.actual) == (module, pattern)
    assert wrong.message.endswith(
        f"{tmp_path}/mine.yaml:7: pattern '{pattern}' of {tmp_path}/mine.yaml matches nothing, though the "
        f"model has {role}, by Megatron's name {module.removeprefix('decoder.')}"
    )


def test_a_pattern_that_should_turn_off_what_the_model_has_by_another_name(tmp_path: Path) -> None:
    recipe = users(tmp_path, "*o_proj*")
    path = Path(recipe.name)
    path.write_text(
        path.read_text().replace("'*o_proj*'\n    cfg: {num_bits: e4m3}", "'*o_proj*'\n    enable: false")
    )
    (wrong,) = errors(prove("MoE", find_recipe(str(path))))
    assert wrong.module == "decoder.layers.0.self_attention.linear_proj"
    assert "pattern '*o_proj*'" in wrong.message


def test_one_of_two_names_is_enough(tmp_path: Path) -> None:
    recipe = users(tmp_path, "*mlp.experts*input_quantizer")
    path = Path(recipe.name)
    entry = "  - quantizer_name: '*block_sparse_moe*input_quantizer'\n    cfg: {num_bits: e4m3}\n"
    path.write_text(path.read_text().replace("algorithm", entry + "algorithm"))
    assert prove("MoE", find_recipe(str(path))).findings == prove("MoE", recipe).findings


def test_a_recipe_of_modelopts_for_other_names_is_its_limit() -> None:
    for name in OMLP_ONLY:
        proof = prove("dense", find_recipe(name))
        assert (proof.outcome, proof.owner, errors(proof)) == (Outcome.UNSUPPORTED, Owner.MODELOPT, [])
        assert proof.limit is not None
        assert (
            f"pattern '*o_proj*weight_quantizer' of {name} matches nothing, though the model has proj"
            in proof.limit
        )
        assert proof.limit.endswith("Megatron's name layers.0.self_attention.linear_proj (and 1 more such)")


def test_what_no_entry_names_is_a_warning() -> None:
    """A config for the cache alone: ModelOpt quantizes every matrix by its own default."""
    (warning,) = prove("dense", find_recipe("fp8_kv")).findings
    assert (warning.module, warning.is_error) == ("decoder.layers.0.self_attention.linear_qkv", False)
    assert "weights are in int8, one of 9 such matrices: fp8_kv says nothing of them" in warning.message
    assert prove("dense", find_recipe("fp8+fp8_kv")).findings == ()


OTHERS = (
    "*mixer.in_proj*input_quantizer",
    "*layers.87.mlp*input_quantizer",
    "*p_bmm_quantizer",
    "*shared_experts*input_quantizer",
    "*linear_q_proj*input_quantizer",
    "*linear_kv_up_proj*input_quantizer",
    "*shared_experts.gate_weight*",
)


@pytest.mark.parametrize("pattern", OTHERS)
def test_a_pattern_for_other_layers_is_none(pattern: str, tmp_path: Path) -> None:
    assert of_patterns(prove("MoE", users(tmp_path, pattern))) == []


@pytest.mark.parametrize("pattern", ["*x_proj*input_quantizer", "*hyper_network*"])
def test_words_that_no_one_else_has_are_a_warning(pattern: str, tmp_path: Path) -> None:
    (warning,) = of_patterns(prove("MoE", users(tmp_path, pattern)))
    assert not warning.is_error
    assert f"mine.yaml:7: pattern '{pattern}'" in warning.message
    assert warning.message.endswith("matches nothing, and no recipe of ModelOpt's has such a word")


@pytest.mark.parametrize("kind", MODELS)
def test_no_recipe_of_modelopts_is_misspelt(kind: str) -> None:
    small = model_of(kind)
    every = [
        name for part in parts(small, Layout(), parameters(small), last=True) for name in part.quantizers
    ]
    found = {
        (name, each.entry.pattern, each.meant)
        for name in names()
        for each in misspelt(find_recipe(name), every)
    }
    assert found == set()


def test_only_words_of_modelopts_own_are_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them, what NVFP4_FP8_MHA says of attention's probabilities would be a misspelling."""
    assert {"p_bmm_quantizer", "block_sparse_moe", "lm_head"} <= modelopts_words()
    monkeypatch.setattr("harness.proofs.patterns.modelopts_words", frozenset)
    (wrong,) = errors(prove("dense", find_recipe("nvfp4_fp8_mha")))
    assert wrong.actual == "*p_bmm_quantizer"


def test_patterns_need_no_torch() -> None:
    code = "import sys, harness.proofs.patterns; assert not {'torch', 'modelopt'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Layouts


@pytest.mark.parametrize("number", range(4))
def test_every_rank_of_a_layout_by_its_own_share(number: int) -> None:
    layout, small, recipe = Layout(tp=2, pp=2), model_of("MoE"), find_recipe("fp8")
    rank = ranks_named("all", layout)[number]
    with installed(CPU), open_world(layout, CPU, rank=rank), captured():
        model = build_model(small, layout, CPU, 1234)
        tokens = token_ids(320, 4, 24, CPU)
        with receiving():
            mtq.quantize(model, recipe.to_config(), lambda model: forward(model, tokens))
    proof = prove_coverage(model, recipe, small, layout, rank)
    assert proof.findings == ()
    assert "weights and inputs of qkv, proj 1 of 1, expert fc1, expert fc2 8 of 8" in proof.detail
    assert re.search(r"of the rank's parameters, 91.3 % of the model's", proof.detail)
    assert ("output" in proof.detail) == (rank.pp == 1)
    assert ("embedding" in proof.detail) == (rank.pp == 0)
