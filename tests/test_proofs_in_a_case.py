"""Each proof broken on purpose, through every stage of a preset: exactly that one fails, module named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import PRESETS, TREE
from small_models import MODELS, model_of

from harness import calibration, errors, quantize, stages
from harness.build import build_model
from harness.case import PROOFS, Case, CaseReport, Check, Outcome
from harness.layout import Layout
from harness.pipeline import check
from harness.proofs import state, weights
from harness.recipes import find_recipe
from harness.report import from_json, to_json
from harness.standins import installed
from harness.standins.kv_cache import quantized_attention
from harness.standins.output import captured
from harness.world import open_world, receiving

CASE = Case("Qwen/Qwen3-0.6B", str(PRESETS["Qwen3-0.6B"].path), "fp8", Layout(), "cpu")
SPARSE = replace(CASE, preset="Qwen/Qwen3-30B-A3B", path=str(PRESETS["Qwen3-30B-A3B"].path))
FC1 = "decoder.layers.0.mlp.linear_fc1"
CPU = torch.device("cpu")
ALWAYS = ("coverage", "calibration", "effect", "blocks")


def checks(report: CaseReport) -> Mapping[str, Check]:
    return {check.name: check for stage in report.stages for check in stage.checks}


def failed(report: CaseReport) -> list[str]:
    """The checks that failed, in order; every error must be one of theirs."""
    names = [check.name for check in checks(report).values() if check.outcome is Outcome.FAILED]
    assert {finding.check for finding in report.findings if finding.is_error} == set(names)
    assert report.outcome is (Outcome.FAILED if names else Outcome.PASSED)
    return names


def modules(report: CaseReport) -> set[str | None]:
    return {finding.module for finding in report.findings if finding.is_error}


def broken_by(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """``change`` the model right after ModelOpt has quantized it."""
    original = quantize.mtq.quantize

    def changed(model: Any, config: Any, loop: Any) -> Any:
        original(model, config, loop)
        change(model)

    monkeypatch.setattr("harness.quantize.mtq.quantize", changed)


def test_every_proof_of_a_sound_case_passes() -> None:
    report = check(replace(CASE, prove=PROOFS))
    assert failed(report) == []
    assert list(checks(report)) == [*ALWAYS, "backward", "state", "sharded state", "weights", "export"]
    assert all(each.outcome is Outcome.PASSED and each.detail for each in checks(report).values())
    assert report.case.repro.endswith("--device cpu --prove state,weights,backward,export")
    assert from_json(to_json([report]))[0].stages == report.stages


def test_what_costs_much_is_proved_on_request_only() -> None:
    assert list(checks(check(CASE))) == [*ALWAYS]
    assert list(checks(check(replace(CASE, prove=("backward",))))) == [*ALWAYS, "backward"]


def test_a_gradient_step_that_megatron_cannot_take_is_unsupported_and_fails_nothing() -> None:
    """Megatron adds an expert's bias in place, to what its reduction of one rank returns: a view."""
    path = str(TREE / "openai" / "gpt-oss-20b.sh")
    report = check(replace(CASE, preset="openai/gpt-oss-20b", path=path, prove=("backward",)))
    assert failed(report) == []
    proof = checks(report)["backward"]
    assert proof.outcome is Outcome.UNSUPPORTED
    assert proof.detail.startswith("Megatron: RuntimeError: Output 0 of _ReduceFromModelParallelRegion")


def test_a_proof_that_modelopt_cannot_give_is_unsupported_and_fails_nothing() -> None:
    report = check(replace(CASE, recipe="w4a8_awq_beta", prove=("weights",)))
    assert failed(report) == []
    proof = checks(report)["weights"]
    assert proof.outcome is Outcome.UNSUPPORTED
    assert proof.detail.startswith("ModelOpt: its stages in a row give the matrix product")


def test_simulated_ranks_prove_what_hangs_on_no_numbers() -> None:
    report = check(replace(CASE, layout=Layout.parse("tp2"), prove=("state",)))
    assert failed(report) == []
    assert checks(report)["state"].outcome is Outcome.SKIPPED
    assert checks(report)["sharding"].detail.startswith("rank 0 of tp2: ")


# Broken on purpose


def test_a_quantizer_left_off(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_by(monkeypatch, lambda model: model.get_submodule(FC1).weight_quantizer.disable())
    report = check(CASE)
    assert (failed(report), modules(report)) == (["coverage"], {FC1})


def test_a_quantizer_of_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: Any) -> None:
        model.get_submodule(FC1).weight_quantizer.num_bits = 8

    broken_by(monkeypatch, change)
    report = check(CASE)
    assert (failed(report), modules(report)) == (["coverage"], {FC1})


def test_a_starved_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a calibration batch that is too small."""
    monkeypatch.setattr(calibration, "TOKENS_PER_EXPERT", (1,))
    report = check(SPARSE)
    assert failed(report) == ["calibration"]
    assert modules(report)
    for finding in report.findings:
        if finding.is_error:
            assert finding.module is not None and ".local_experts." in finding.module
            assert "saw none of the 72 calibration tokens" in finding.message


def test_an_amax_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last forward pass, so that it shows nowhere else."""
    off = quantize.quantizers_off

    @contextmanager
    def zeroing(model: Any) -> Iterator[None]:
        with off(model):
            yield
        model.get_submodule(FC1).input_quantizer._amax.zero_()

    monkeypatch.setattr(quantize, "quantizers_off", zeroing)
    report = check(CASE)
    assert (failed(report), modules(report)) == (["calibration"], {FC1})


def test_a_weight_that_calibration_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: Any) -> None:
        with torch.no_grad():
            model.get_submodule(FC1).weight[3, 5] += 1

    broken_by(monkeypatch, change)
    report = check(CASE)
    assert failed(report) == ["effect"]
    assert "with every quantizer off" in report.findings[0].message


def test_blocks_that_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: Any) -> None:
        sizes = {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}
        model.get_submodule(FC1).weight_quantizer.block_sizes = sizes

    broken_by(monkeypatch, change)
    report = check(replace(CASE, recipe="nvfp4"))
    # What the quantizer was told and what it did are two questions.
    assert (failed(report), modules(report)) == (["coverage", "blocks"], {FC1})


def test_a_block_misaligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a quantizer that is set as the recipe says, and does otherwise."""

    def with_blocks_of(size: int) -> Callable[..., None]:
        def set_blocks(quantizer: Any, *args: Any) -> None:
            quantizer.block_sizes[-1] = size

        return set_blocks

    def change(model: Any) -> None:
        quantizer = model.get_submodule(FC1).weight_quantizer
        quantizer.register_forward_pre_hook(with_blocks_of(48))
        quantizer.register_forward_hook(with_blocks_of(16))

    broken_by(monkeypatch, change)
    report = check(replace(CASE, recipe="nvfp4"))
    assert (failed(report), modules(report)) == (["blocks"], {FC1})
    assert "weight_quantizer used blocks of 48, nvfp4 gives it blocks of 16" in report.findings[0].message


def test_a_pattern_misspelt(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    entries = ["{quantizer_name: '*', enable: false}"]
    entries += ["{quantizer_name: '*weight_quantizer', cfg: {num_bits: e4m3}}"]
    entries += ["{quantizer_name: '*linear_qvk.input_quantizer', cfg: {num_bits: e4m3}}"]
    path.write_text("quant_cfg:\n" + "".join(f"  - {entry}\n" for entry in entries) + "algorithm: max\n")
    report = check(replace(CASE, recipe=str(path)))
    assert failed(report) == ["coverage"]
    assert modules(report) == {"decoder.layers.0.self_attention.linear_qkv"}
    (finding,) = (finding for finding in report.findings if finding.is_error)
    assert f"{path}:4: pattern '*linear_qvk.input_quantizer'" in finding.message


def test_a_scale_that_no_checkpoint_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = state.sharded

    def dropping(model: Any, only: str = "") -> Any:
        return {
            name: entry for name, entry in whole(model, only).items() if f"{FC1}.input_quantizer" not in name
        }

    monkeypatch.setattr(state, "sharded", dropping)
    report = check(replace(CASE, layout=Layout(tp=2)))
    assert (failed(report), modules(report)) == (["sharding"], {FC1})
    assert failed(check(replace(CASE, prove=("state",)))) == ["sharded state"], "on one rank nothing is split"


def test_scales_of_the_cache_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention stand-in must keep extra state, as Transformer Engine's does."""
    case = replace(CASE, recipe="fp8+fp8_kv", prove=("state",))
    assert failed(check(case)) == []
    monkeypatch.delattr(quantized_attention(), "get_extra_state")
    report = check(case)
    assert failed(report) == ["sharded state"]
    assert all(module and module.endswith("core_attention") for module in modules(report))


def test_a_state_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    save = state.save

    def dropping(model: Any) -> Any:
        saved = save(model)
        name = f"{FC1}.input_quantizer._amax"
        return replace(saved, tensors={key: value for key, value in saved.tensors.items() if key != name})

    monkeypatch.setattr(state, "save", dropping)
    report = check(replace(CASE, prove=("state",)))
    assert (failed(report), modules(report)) == (["state"], {FC1})
    assert checks(report)["sharded state"].outcome is Outcome.PASSED


def test_a_weight_that_was_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.mtq, "compress", lambda model: None)
    report = check(replace(CASE, prove=("weights",)))
    assert failed(report) == ["weights"]
    assert FC1 in modules(report)


def test_a_gradient_that_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_by(monkeypatch, lambda model: model.get_submodule(FC1).weight.register_hook(torch.zeros_like))
    report = check(replace(CASE, prove=("backward",)))
    assert (failed(report), modules(report)) == (["backward"], {FC1})


def test_nothing_costly_is_proved_of_what_is_not_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_by(monkeypatch, lambda model: model.get_submodule(FC1).weight_quantizer.disable())
    report = check(replace(CASE, prove=PROOFS))
    assert failed(report) == ["coverage"]
    assert {checks(report)[name].outcome for name in PROOFS} == {Outcome.SKIPPED}
    assert checks(report)["state"].detail == "the model is not quantized as it should be"


def test_how_a_stand_in_is_split_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt splits the scales of the class that stands in for TELinear, whose weight no rank splits."""
    small, layout, recipe = (
        model_of(MODELS["Mamba and latent experts"]),
        Layout.parse("tp2"),
        find_recipe("int8"),
    )

    def found() -> set[str]:
        with captured(), installed(CPU, small), open_world(layout, CPU), receiving():
            model = build_model(small, layout, CPU)
            result = quantize.quantize(model, recipe, small, CPU, layout=layout)
        (proof,) = (proof for proof in result.proofs if proof.name == "sharding")
        names = [str(each.module) for each in proof.findings if each.is_error]
        return {name.rpartition(".")[2] for name in names}

    assert found() == set()
    monkeypatch.setattr("harness.proofs.sharding._stands_in", lambda module: False)
    assert found() == {"fc1_latent_proj", "fc2_latent_proj"}


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")
@pytest.mark.parametrize(
    "recipe", ["fp8", "nvfp4", "int4_awq", "mxfp8", "int8", "fp8_2d_blockwise_weight_only"]
)
@pytest.mark.parametrize("case", [CASE, SPARSE], ids=["dense", "MoE"])
def test_cuda_gives_every_proof_the_verdict_of_the_cpu(case: Case, recipe: str) -> None:
    case = replace(case, recipe=recipe, prove=PROOFS)
    cpu, cuda = check(case), check(replace(case, device="cuda:0"))
    assert cuda.outcome == cpu.outcome
    assert [finding.message for finding in cuda.findings] == [finding.message for finding in cpu.findings]
    assert {name: each.outcome for name, each in checks(cuda).items()} == {
        name: each.outcome for name, each in checks(cpu).items()
    }


# ---- no memory, or a fault on the GPU, wherever it comes up: no limit, which would leave the run green ----

PLACES = {
    "state": ("state", "harness.proofs.state.mto.restore_from_modelopt_state"),
    "sharded state": ("state", "harness.proofs.state.sharded"),
    "sharding": ("", "harness.proofs.state.sharded"),
    "weights": ("weights", "harness.proofs.weights.QTensorWrapper"),
    "backward": ("backward", "harness.proofs.backward._loss"),
    "export": ("export", "modelopt.torch.export.export_mcore_gpt_to_hf"),
    "control": ("", "harness.control.quantize"),
    "a control that is built": ("", "harness.control.build_model"),
}


@pytest.mark.parametrize("on_gpu", [False, True], ids=["memory", "fault"])
@pytest.mark.parametrize("place", PLACES)
def test_what_says_nothing_of_a_preset_is_no_limit(
    place: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof, target = PLACES[place]
    fault = RuntimeError("CUDA error: device-side assert triggered\nSearch for it")
    raised = []

    def stop(*_: Any, **__: Any) -> None:
        if on_gpu:
            for module in (errors, stages):
                monkeypatch.setattr(module, "gpu_fault", lambda: fault)
        raised.append(target)
        raise RuntimeError("of the next call" if on_gpu else "CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(target, stop)
    case = replace(CASE, prove=(proof,)) if proof else CASE
    if place == "sharding":
        case = replace(CASE, layout=Layout(tp=2))
    if "control" in place:
        case = replace(CASE, recipe="nvfp4_svdquant")
    report = check(case)
    assert raised == [target]
    if on_gpu:
        # Where Megatron or ModelOpt was at work it is a finding, which names the module.
        assert report.outcome in (Outcome.FAILED, Outcome.ERROR)
        said = [report.reason, *(finding.message for finding in report.findings)]
        assert any("CUDA error: device-side assert triggered" in words for words in said)
    else:
        assert report.outcome is Outcome.ERROR
        assert report.reason.startswith("out of memory: RuntimeError: CUDA out of memory")
    assert not [check for check in checks(report).values() if check.outcome is Outcome.UNSUPPORTED]
