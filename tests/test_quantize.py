from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import small_models
import torch
from asserted import asserted

from harness.architecture import Architecture
from harness.build import build_model
from harness.calibration import Calibration
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.proofs.calibration import check_amax, check_experts, check_scales
from harness.proofs.effect import check_off, check_output
from harness.proofs.proof import Outcome
from harness.proofs.quantizers import check_formats, expected_matrices, quantizers_off
from harness.quantize import Quantization, quantize, without_folders
from harness.recipes import RECIPES, Recipe, find_recipe
from harness.rounding import largest_error, largest_error_when_off
from harness.routing import forward_and_routes
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import forward, token_ids
from harness.world import open_world

import modelopt.torch.quantization as mtq  # isort: skip
from modelopt.torch.quantization.nn import TensorQuantizer  # isort: skip

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")
# Each takes another way through ModelOpt: one scale, blocks with calibrated scales and with scales of their
# own, scales folded into weights, two formats in a row.
CHOSEN = tuple(map(find_recipe, ("fp8", "nvfp4", "int4_awq", "int8_smoothquant", "w4a8_awq_beta")))
# What ModelOpt cannot do with any model of Megatron's (tests/test_control.py).
RAISING = ("nvfp4_svdquant", "fp8_affine_kv", "nvfp4_affine_kv")
GOING = tuple(recipe for recipe in RECIPES if recipe.name not in RAISING)
chosen_recipe = pytest.mark.parametrize("recipe", CHOSEN, ids=lambda recipe: recipe.name)
every_recipe = pytest.mark.parametrize("recipe", GOING, ids=lambda recipe: recipe.name)

COMMON = (
    "--bf16 --no-masked-softmax-fusion --disable-bias-linear --position-embedding-type rope --no-rope-fusion "
    "--normalization RMSNorm --swiglu --seq-length 64 --max-position-embeddings 96 --rotary-base 1000000 "
    "--no-bias-swiglu-fusion --padded-vocab-size 320 --num-layers 2 --hidden-size 128 --ffn-hidden-size 384 "
    "--num-attention-heads 8 --group-query-attention --num-query-groups 2 --kv-channels 32 "
)
QWEN3 = COMMON + "--untie-embeddings-and-output-weights --qk-layernorm"
MODELS = {
    **small_models.MODELS,
    "Qwen3": QWEN3,
    "Qwen2.5": COMMON + "--add-qkv-bias",
    "Qwen3-MoE": QWEN3 + " --num-experts 8 --moe-ffn-hidden-size 128 --moe-router-topk 2 "
    "--moe-router-dtype fp32 --moe-token-dispatcher-type alltoall",
    "GPT-2": "--bf16 --seq-length 64 --max-position-embeddings 96 --num-layers 2 --hidden-size 128 "
    "--num-attention-heads 8 --padded-vocab-size 320",
}
QKV, PROJ = (f"decoder.layers.0.self_attention.linear_{name}" for name in ("qkv", "proj"))
FC1, FC2 = (f"decoder.layers.0.mlp.linear_{name}" for name in ("fc1", "fc2"))
FP8, NVFP4, AWQ, SMOOTHQUANT = map(find_recipe, ("fp8", "nvfp4", "int4_awq", "int8_smoothquant"))
NAN, INF = float("nan"), float("inf")
SMALL = small_models.model_of(QWEN3)
BOUND = largest_error(FP8, SMALL)


def model_of(name: str) -> Architecture:
    return small_models.model_of(MODELS[name])


def build(name: str, seed: int = 1234) -> Any:
    with captured():
        return build_model(model_of(name), Layout(), CPU, seed)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    """A small Qwen3, quantized with the test's ``recipe``, fp8 where it has none."""
    recipe = request.getfixturevalue("recipe") if "recipe" in request.fixturenames else FP8
    model = build("Qwen3")
    assert quantize(model, recipe, model_of("Qwen3"), CPU).findings == ()
    return model


def config_of(recipe: Recipe) -> dict[str, Any]:
    return recipe.to_config()


def logits(model: Any, seed: int = 3) -> torch.Tensor:
    with captured():
        return forward(model, token_ids(320, 3, 24, CPU, seed))


def messages(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.message for finding in findings]


def matrices_of(model: Any, recipe: Recipe = FP8) -> tuple[str, ...]:
    return expected_matrices(model, recipe)


# What should go through


def errors(result: Quantization) -> list[str]:
    return [finding.message for finding in result.findings if finding.is_error]


@chosen_recipe
@pytest.mark.parametrize("name", MODELS)
def test_recipe_goes_through(name: str, recipe: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    small = model_of(name)
    result = quantize(build(name), recipe, small, CPU)
    assert errors(result) == []
    assert result.quantizers == len(result.matrices) * (len(recipe.weights) + bool(recipe.inputs))
    assert result.error is not None and 0 < result.error < largest_error(recipe, small)
    # Some of the bound is used up: it means something for every kind of layer. Least by GPT-2 smoothed,
    # whose activation is no product.
    assert result.error > largest_error(recipe, small) / 7
    assert (result.error_when_off == 0) == (not recipe.folds_scales)
    assert "Inserted" in result.log
    assert capfd.readouterr() == ("", "")


@every_recipe
def test_every_recipe_goes_through(recipe: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    """On a model with experts, which no recipe leaves out."""
    small = model_of("Qwen3-MoE")
    result = quantize(build("Qwen3-MoE"), recipe, small, CPU)
    assert errors(result) == []
    assert result.error is not None
    assert largest_error(recipe, small) / 6 < result.error < largest_error(recipe, small)
    assert (result.error_when_off == 0) == (largest_error_when_off(recipe, small) == 0)
    assert [proof.name for proof in result.proofs] == [
        "coverage",
        "calibration",
        "effect",
        "blocks",
    ]
    # Its patterns for attention's output projection are Hugging Face's.
    unsupported = ["coverage"] if recipe.name == "nvfp4_omlp_only" else []
    assert [proof.name for proof in result.proofs if proof.outcome is not Outcome.PASSED] == unsupported
    assert capfd.readouterr() == ("", "")


def test_nothing_is_written_into_the_working_directory(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = find_recipe("nvfp4_default-kv_none-gptq")
    assert "checkpoint_dir" in repr(recipe.to_config())
    assert errors(quantize(build("Qwen3"), recipe, SMALL, CPU)) == []
    assert list(tmp_path.iterdir()) == []
    assert without_folders({"a": [{"checkpoint_dir": "x", "b": 1}]}) == {"a": [{"b": 1}]}


def test_a_cache_alone_leaves_modelopts_default_on_every_linear() -> None:
    """Its config turns nothing off first: int8 is then what it means, of the output layer too."""
    model = build("Qwen3")
    recipe = find_recipe("fp8_kv")
    result = quantize(model, recipe, SMALL, CPU)
    assert errors(result) == []
    assert len(result.matrices) == 2 * 4 + 1 and "output_layer" in result.matrices
    assert model.get_submodule(FC1).weight_quantizer.num_bits == 8
    assert quantize(build("Qwen3"), find_recipe("fp8+fp8_kv"), SMALL, CPU).quantizers == 2 * 8 + 2 * 2


@pytest.mark.parametrize(
    ("recipe", "count"),
    [("nvfp4_experts_only", 32), ("nvfp4_mlp_only", 32), ("nvfp4_mlp_weight_only", 32), ("nvfp4", 36)],
)
def test_which_matrices_a_recipe_means(recipe: str, count: int) -> None:
    assert len(matrices_of(build("Qwen3-MoE"), find_recipe(recipe))) == count


QUANTIZED = {
    "Qwen3": {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"},
    "latent attention": {
        "linear_q_up_proj",
        "linear_kv_up_proj",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    },
    "latent attention without query latent": {
        "linear_q_proj",
        "linear_kv_up_proj",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    },
    "Mamba and latent experts": {
        "in_proj",
        "out_proj",
        "linear_qkv",
        "linear_proj",
        "fc1_latent_proj",
        "fc2_latent_proj",
        "linear_fc1",
        "linear_fc2",
    },
    "gated delta net": {"in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"},
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_quantized(name: str) -> None:
    small = model_of(name)
    found = matrices_of(build(name))
    assert {path.rpartition(".")[2] for path in found} == QUANTIZED[name]
    if name == "Qwen3":
        assert len(found) == 2 * 4
    if small.moe is not None:
        experts = [path for path in found if ".local_experts." in path]
        layers = sum(layer.mlp == small.moe for layer in small.layers)
        assert len(experts) == 2 * layers * small.moe.num_experts
        assert sum("shared_experts" in path for path in found) == 2 * layers
    assert not any("router" in path or "conv1d" in path or "output_layer" in path for path in found)


def test_a_pattern_of_the_recipe_takes_matrices_out() -> None:
    config = config_of(FP8)
    config["quant_cfg"].append({"quantizer_name": "*linear_proj*", "enable": False})
    config["quant_cfg"].append({"quantizer_name": "*layers.1.*linear_proj*", "enable": True})
    assert {path for path in matrices_of(build("Qwen3")) if path.endswith("linear_proj")} == {
        f"decoder.layers.{layer}.self_attention.linear_proj" for layer in (0, 1)
    }
    left = expected_matrices(build("Qwen3"), Recipe.of(config, "own"))
    assert [path for path in left if path.endswith("linear_proj")] == [
        "decoder.layers.1.self_attention.linear_proj"
    ]


def test_matrices_that_modelopt_does_not_know_are_said_once() -> None:
    result = quantize(build("latent attention"), FP8, model_of("latent attention"), CPU)
    (warning,) = result.findings
    assert warning.severity is Severity.WARNING
    assert warning.message.startswith(
        "layers.0.self_attention.linear_q_down_proj  stays in bf16, one of 4 such matrices"
    )


def test_a_module_that_megatron_takes_the_weight_of_is_said_once() -> None:
    """The convolution of a gated delta net: on with ModelOpt's default, and never called."""
    result = quantize(
        build("gated delta net"), find_recipe("nvfp4_kv_rotate"), model_of("gated delta net"), CPU
    )
    assert errors(result) == []
    assert any(
        "conv1d" in finding.message and "nothing goes through" in finding.message
        for finding in result.findings
    )


def test_same_numbers_every_time() -> None:
    def run() -> Quantization:
        return quantize(build("Qwen3-MoE"), NVFP4, model_of("Qwen3-MoE"), CPU)

    first, second = run(), run()
    assert first == second
    assert torch.equal(first.output, second.output)


def test_calibration_grows_until_every_expert_sees_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantize(build("Qwen3"), FP8, model_of("Qwen3"), CPU).sequences == 3
    small, seen = model_of("Qwen3-MoE"), []
    for least in (1, 12, 10**6):
        monkeypatch.setattr("harness.calibration.LEAST_TOKENS", least)
        model = build("Qwen3-MoE")
        calibration = Calibration(small, CPU)
        with captured():
            calibration.suffice(model, forward_and_routes(model, calibration.first))
            calibration(model)
        seen.append((len(calibration.tokens), min(calibration.seen.values()) >= least))
    assert seen[0][1] and seen[1][1]
    assert seen[0][0] < seen[1][0] < seen[2][0] == 11  # 64 tokens x 8 experts / top-2, in sequences of 24


def test_every_round_of_calibration_has_the_same_tokens_in_one_batch() -> None:
    model, small = build("Qwen3-MoE"), model_of("Qwen3-MoE")
    calibration, batches = Calibration(small, CPU), []
    with captured():
        calibration.suffice(model, forward_and_routes(model, calibration.first))
        model.register_forward_pre_hook(lambda model, args: batches.append(args[0]))
        calibration(model)
        once = dict(calibration.seen)
        calibration(model)
    assert [torch.equal(batch, calibration.tokens) for batch in batches] == [True, True]
    assert torch.equal(calibration.tokens[:3], calibration.first)
    assert calibration.seen == once, "what a round saw, not all of them"


def test_a_number_of_sequences_is_kept_to() -> None:
    model, small = build("Qwen3-MoE"), model_of("Qwen3-MoE")
    for sequences in (3, 5):
        calibration = Calibration(small, CPU, sequences=sequences)
        with captured():
            calibration.suffice(model, forward_and_routes(model, calibration.first))
        assert len(calibration.tokens) == sequences


def test_every_expert_has_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ's search for them makes nothing of an expert that a batch passes by."""
    clip = find_recipe("nvfp4_awq_clip")
    assert errors(quantize(build("Qwen3-MoE"), clip, model_of("Qwen3-MoE"), CPU)) == []

    def token_by_token(calibration: Any, model: Any) -> None:
        for token in calibration.tokens.flatten():
            forward(model, token.view(1, 1))

    monkeypatch.setattr("harness.calibration.Calibration.__call__", token_by_token)
    wrong = errors(quantize(build("Qwen3-MoE"), clip, model_of("Qwen3-MoE"), CPU))
    assert any("local_experts" in message and "weight_quantizer amax is 0" in message for message in wrong)


def test_modelopt_is_left_as_it_was() -> None:
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.nn.modules import tensor_quantizer
    from modelopt.torch.quantization.plugins import custom

    def state() -> tuple[object, ...]:
        return (
            set(QuantModuleRegistry._registry),
            dict(tensor_quantizer._QUANT_FUNCTIONAL_BACKENDS),
            set(custom.CUSTOM_MODEL_PLUGINS),
            repr([getattr(mtq, recipe.config_name) for recipe in RECIPES]),
        )

    before = state()
    quantize(build("Qwen3-MoE"), AWQ, model_of("Qwen3-MoE"), CPU)
    assert state() == before


def test_expected_matrices_do_not_depend_on_modelopt() -> None:
    model = build("Qwen3-MoE")
    before = matrices_of(model)
    quantize(model, FP8, model_of("Qwen3-MoE"), CPU)
    assert matrices_of(model) == before


# A matrix that is not quantized


def test_fake_quantization_that_is_off_is_found(model: Any) -> None:
    model.get_submodule(FC2).input_quantizer.disable_quant()
    (finding,) = check_formats(model, FP8)
    assert finding.message.startswith(
        "layers.0.mlp.linear_fc2  input_quantizer does not round, fp8 makes it e4m3"
    )
    assert f"{FC2}.input_quantizer" in asserted([finding], "coverage")


@pytest.mark.parametrize("recipe", [NVFP4], ids=["nvfp4"])
def test_another_block_size_is_found(model: Any, recipe: Recipe) -> None:
    model.get_submodule(PROJ).weight_quantizer.block_sizes = {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}
    (finding,) = check_formats(model, NVFP4)
    assert finding.message == (
        "layers.0.self_attention.linear_proj  weight_quantizer is e2m1, dynamic blocks of 32 under e4m3, "
        "nvfp4 makes it e2m1, dynamic blocks of 16 under e4m3"
    )
    assert (finding.stage, finding.severity, finding.module) == ("quantize", Severity.ERROR, PROJ)
    program = asserted([finding], "coverage", "nvfp4")
    assert f"{PROJ}.weight_quantizer" in program and "assert found == [((2, 1), {-1: 16}, (4, 3), " in program


@pytest.mark.parametrize("recipe", [NVFP4], ids=["nvfp4"])
def test_another_format_of_the_scales_is_found(model: Any, recipe: Recipe) -> None:
    model.get_submodule(PROJ).weight_quantizer.block_sizes = {-1: 16, "type": "dynamic", "scale_bits": (8, 0)}
    (finding,) = check_formats(model, NVFP4)
    assert finding.module == PROJ and "under e8m0" in finding.message
    assert "{-1: 16}, (4, 3), True, None, " in asserted([finding], "coverage", "nvfp4")


def test_another_axis_is_found() -> None:
    model, recipe = build("Qwen3"), find_recipe("int8")
    quantize(model, recipe, SMALL, CPU)
    assert [*check_formats(model, recipe)] == []
    model.get_submodule(QKV).weight_quantizer.axis = 1
    (finding,) = check_formats(model, recipe)
    assert finding.message.endswith(
        "is int8, a scale per index of dimension 1, int8 makes it int8, a scale per index of dimension 0"
    )
    assert "(8, {}, None, False, 0, " in asserted([finding], "coverage", "int8")


def test_a_format_of_the_cache_is_found() -> None:
    model, recipe = build("Qwen3"), find_recipe("fp8+fp8_kv")
    quantize(model, recipe, SMALL, CPU)
    core = "decoder.layers.0.self_attention.core_attention"
    model.get_submodule(core).k_bmm_quantizer.num_bits = 8
    (finding,) = check_formats(model, recipe)
    assert finding.module == core and "k_bmm_quantizer is int8" in finding.message
    assert f"{core}.k_bmm_quantizer" in asserted([finding], "coverage", "fp8+fp8_kv")


def failed(result: Quantization) -> list[str]:
    return [proof.name for proof in result.proofs if proof.outcome is Outcome.FAILED]


def test_a_pattern_that_matches_only_some_is_found() -> None:
    config = config_of(FP8)
    config["quant_cfg"][1]["quantizer_name"] = "*linear_fc*weight_quantizer"
    result = quantize(build("Qwen3"), FP8, SMALL, CPU, config=config)
    assert failed(result) == ["coverage"]
    assert {finding.module for finding in result.findings} == {
        f"decoder.layers.{layer}.self_attention.{name}"
        for layer in (0, 1)
        for name in ("linear_proj", "linear_qkv")
    }


def test_a_pattern_that_matches_nothing_is_found() -> None:
    config = config_of(FP8)
    config["quant_cfg"][1]["quantizer_name"] = "*wieght_quantizer"
    config["quant_cfg"][2]["quantizer_name"] = "*inptu_quantizer"
    result = quantize(build("Qwen3"), FP8, SMALL, CPU, config=config)
    # ModelOpt raises only for patterns that name weight quantizers; a misspelt one passes in silence.
    assert failed(result) == ["coverage", "effect"]
    assert "fp8 changed no logit at all" in messages(result.findings)


def test_what_modelopt_raises_comes_through() -> None:
    config = config_of(FP8)
    config["quant_cfg"][1]["quantizer_name"] = "*transformer.h*weight_quantizer"
    with pytest.raises(RuntimeError, match="no weight quantizer is enabled"):
        quantize(build("Qwen3"), FP8, model_of("Qwen3"), CPU, config=config)


# Calibration


@pytest.mark.parametrize(
    ("value", "words"), [(NAN, "nan"), (INF, "inf"), (0.0, "0"), (-1.0, "-1")], ids=["nan", "inf", "0", "-1"]
)
@pytest.mark.parametrize("attribute", ["input_quantizer", "weight_quantizer"])
def test_amax_that_is_no_amax(model: Any, attribute: str, value: float, words: str) -> None:
    getattr(model.get_submodule(FC1), attribute)._amax.fill_(value)
    (finding,) = check_amax(model, FP8)
    assert finding.message == (
        f"layers.0.mlp.linear_fc1  {attribute} amax is {words}, expected a finite positive number"
    )
    assert finding.module == FC1
    program = asserted([finding], "calibration")
    assert f"{FC1}.{attribute}" in program and "(one.amax > 0)" in program


@pytest.mark.parametrize("recipe", [FP8, NVFP4, AWQ], ids=["fp8", "nvfp4", "int4_awq"])
def test_no_amax_at_all(model: Any, recipe: Recipe) -> None:
    quantizer = model.get_submodule(FC1).weight_quantizer
    del quantizer._amax
    (finding,) = check_amax(model, FP8)
    assert finding.message == "layers.0.mlp.linear_fc1  weight_quantizer has no amax: it never saw data"
    assert finding.actual is None
    assert "one.amax is not None" in asserted([finding], "calibration")


@pytest.mark.parametrize("recipe", [AWQ], ids=["int4_awq"])
def test_one_bad_block_among_many(model: Any, recipe: Recipe) -> None:
    model.get_submodule(QKV).weight_quantizer._amax.view(-1)[5] = NAN
    (finding,) = check_amax(model, FP8)
    assert finding.message == (
        "layers.0.self_attention.linear_qkv  weight_quantizer amax is nan in 1 of 384 places, "
        "expected a finite positive number"
    )


@pytest.mark.parametrize("recipe", [AWQ, SMOOTHQUANT], ids=["int4_awq", "int8_smoothquant"])
def test_scale_that_is_no_scale(model: Any, recipe: Recipe) -> None:
    model.get_submodule(FC2).input_quantizer._pre_quant_scale[7] = INF
    (finding,) = check_scales(model, recipe, matrices_of(model, recipe))
    assert finding.message == (
        "layers.0.mlp.linear_fc2  pre_quant_scale is inf in 1 of 384 places, "
        "expected a finite positive number"
    )
    assert "(scale > 0)" in asserted([finding], "calibration", recipe.name)


@pytest.mark.parametrize("recipe", [AWQ], ids=["int4_awq"])
def test_no_scale_at_all(model: Any, recipe: Recipe) -> None:
    del model.get_submodule(FC2).input_quantizer._pre_quant_scale
    (finding,) = check_scales(model, recipe, matrices_of(model, recipe))
    assert finding.message == "layers.0.mlp.linear_fc2  has no pre_quant_scale, expected 384"
    assert "scale is not None" in asserted([finding], "calibration", recipe.name)


@chosen_recipe
def test_starved_experts_are_found(recipe: Recipe) -> None:
    """Two opposite pairs of large router rows always win, and the other four experts see nothing.

    ModelOpt gives those an amax all the same, of their neighbours or of their weights alone.
    """
    model = build("Qwen3-MoE")
    router = model.decoder.layers[1].mlp.router
    with torch.no_grad():
        for row, other in ((0, 1), (2, 3)):
            router.weight[row] *= 1e4
            router.weight[other] = -router.weight[row]
    result = quantize(model, recipe, model_of("Qwen3-MoE"), CPU)
    starved = [finding for finding in result.findings if "calibration tokens" in finding.message]
    assert failed(result) == ["calibration"]
    assert messages(tuple(starved)) == [
        f"layers.1.mlp.experts.local_experts.{index}  saw none of the 264 calibration tokens"
        for index in (4, 5, 6, 7)
    ]
    assert starved[0].module == "decoder.layers.1.mlp.experts.local_experts.4"
    assert f"assert counts[{starved[0].module!r}]" in asserted(starved[:1], "calibration", recipe.name)
    assert check_amax(model, FP8) == ()


def test_experts_with_tokens_are_no_finding() -> None:
    assert check_experts({"decoder.layers.0.mlp.experts.local_experts.0": 1}, 72) == ()


# Output


@chosen_recipe
def test_output_that_did_not_change(recipe: Recipe) -> None:
    before = logits(build("Qwen3"))
    (finding,) = check_output(recipe, 0.1, before, before.clone())
    assert finding.message == f"{recipe.name} changed no logit at all"
    assert "not torch.equal(before, after)" in asserted([finding], "effect", recipe.name)


def test_output_of_another_shape_or_not_finite() -> None:
    before = torch.ones(2, 3, 5)
    (finding,) = check_output(FP8, 0.1, before, torch.ones(2, 3, 4))
    assert finding.message == "quantized logits are 2 x 3 x 4, expected 2 x 3 x 5"
    assert "after.shape == before.shape" in asserted([finding], "effect")
    (finding,) = check_output(FP8, 0.1, before, torch.full((2, 3, 5), NAN))
    assert finding.message == "30 of 30 quantized logits are not finite"
    assert "isfinite(after)" in asserted([finding], "effect")


@chosen_recipe
def test_output_beyond_its_bound(recipe: Recipe) -> None:
    """Another model's logits are as far off as anything; a format of half the bits is too far, too."""
    before, other = logits(build("Qwen3")), logits(build("Qwen3", seed=1))
    bound = largest_error(recipe, SMALL)
    (finding,) = check_output(recipe, bound, before, other)
    assert finding.message.startswith(f"{recipe.name} moves the logits by 1.4 of their size")
    assert finding.message.endswith(f"expected at most {bound:.2g}")
    assert f"assert error <= {bound:.2g}" in asserted([finding], "effect", recipe.name)
    assert check_output(recipe, bound, before, before * (1 + 0.9 * bound)) == ()


def test_four_bits_are_beyond_the_bound_of_eight() -> None:
    config = config_of(FP8)
    for entry in config["quant_cfg"][1:3]:
        entry["cfg"]["num_bits"] = 4
    result = quantize(build("Qwen3"), FP8, model_of("Qwen3"), CPU, config=config)
    assert any(message.startswith("fp8 moves the logits by") for message in messages(result.findings))


def test_an_amax_gone_wrong_is_beyond_the_bound(model: Any) -> None:
    before = logits(build("Qwen3"))
    assert check_output(FP8, BOUND, before, logits(model)) == ()
    model.get_submodule(FC1).input_quantizer._amax.mul_(0.1)
    (finding,) = check_output(FP8, BOUND, before, logits(model))
    assert finding.message.startswith("fp8 moves the logits by")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("latent attention", "decoder.layers.0.self_attention.linear_kv_up_proj"),
        ("Mamba and MLP", "decoder.layers.0.mixer.in_proj"),
        ("Mamba and latent experts", "decoder.layers.1.mlp.fc2_latent_proj"),
        ("gated delta net", "decoder.layers.0.self_attention.out_proj"),
        ("sinks and windows", "decoder.layers.0.self_attention.linear_qkv"),
    ],
)
def test_an_amax_gone_wrong_in_any_mixer_is_beyond_the_bound(name: str, path: str) -> None:
    model, bound = build(name), largest_error(FP8, model_of(name))
    before = logits(model)
    assert not [each for each in quantize(model, FP8, model_of(name), CPU).findings if each.is_error]
    model.get_submodule(path).input_quantizer._amax.mul_(0.05)
    (finding,) = check_output(FP8, bound, before, logits(model))
    assert finding.message.startswith("fp8 moves the logits by")


@chosen_recipe
def test_off_means_off(model: Any, recipe: Recipe) -> None:
    before, after = logits(build("Qwen3")), logits(model)
    bound = largest_error_when_off(recipe, SMALL)
    with quantizers_off(model):
        off = logits(model)
    assert check_off(bound, before, off) == ()
    assert torch.equal(logits(model), after)
    assert check_off(bound, before, after)


def test_a_weight_that_calibration_changed_is_found(model: Any) -> None:
    before = logits(build("Qwen3"))
    with torch.no_grad():
        model.get_submodule(FC1).weight[3, 5] += 1
    with quantizers_off(model):
        (finding,) = check_off(0.0, before, logits(model))
    assert finding.message.startswith("with every quantizer off ")
    assert finding.message.endswith(f" of {before.numel()} logits are not what they were")
    assert "(before != off)" in asserted([finding], "effect")


@pytest.mark.parametrize("recipe", [AWQ], ids=["int4_awq"])
def test_a_scale_that_was_not_folded_is_found(model: Any, recipe: Recipe) -> None:
    before = logits(build("Qwen3"))
    model.get_submodule(FC1).input_quantizer._pre_quant_scale.mul_(1.1)
    with quantizers_off(model):
        (finding,) = check_off(largest_error_when_off(AWQ, SMALL), before, logits(model))
    assert finding.message.startswith("with every quantizer off the logits differ by")
    assert "relative_error(before, off)" in asserted([finding], "effect", "int4_awq")


def test_every_quantizer_is_counted(model: Any) -> None:
    enabled = [m for m in model.modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
    assert len(enabled) == 2 * 8


# CUDA


@pytest.mark.gpu
@needs_cuda
@chosen_recipe
@pytest.mark.parametrize("name", MODELS)
def test_recipe_goes_through_on_cuda(name: str, recipe: Recipe) -> None:
    import subprocess
    import sys

    # Another process: this one has a world open on the CPU.
    code = f"""
import torch
from test_quantize import *
device = torch.device("cuda", 0)
with installed(device) as stand_ins, open_world(Layout(), device), captured():
    small = model_of({name!r})
    result = quantize(build_model(small, Layout(), device), find_recipe({recipe.name!r}), small, device)
assert not [finding for finding in result.findings if finding.is_error], result.findings
assert not any("NVFP4" in record.target for record in stand_ins)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rpartition("/")[0])
