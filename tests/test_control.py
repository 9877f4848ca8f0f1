"""Whose limit it is that a model cannot be quantized: asked of a model of plain sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from broken import PRESETS
from small_models import MODELS, model_of

from harness import control, messages, stages
from harness.build import build_model
from harness.case import Case, Outcome
from harness.control import WIDTH, plain
from harness.layout import Layout
from harness.layout_rules import Owner
from harness.pipeline import check
from harness.stages import Raised
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world

import modelopt.torch.quantization as mtq  # isort: skip

CPU = torch.device("cpu")
CASE = Case("Qwen/Qwen3-0.6B", str(PRESETS["Qwen3-0.6B"].path), "nvfp4_svdquant", Layout(), "cpu")


@pytest.mark.parametrize("name", MODELS)
def test_a_control_has_the_same_layers_in_plain_sizes(name: str) -> None:
    small = model_of(MODELS[name])
    control = plain(small)
    assert [layer.kind for layer in control.layers] == [layer.kind for layer in small.layers]
    widths = [control.hidden_size, *([control.moe.expert.ffn_hidden_size] if control.moe else [])]
    assert set(widths) == {WIDTH}
    assert control.padded_vocab_size == 512
    with installed(CPU, small), open_world(Layout(), CPU), captured():
        build_model(control, Layout(), CPU)


def test_what_no_model_can_do_is_unsupported() -> None:
    report = check(CASE)
    assert (report.outcome, report.findings, report.log) == (Outcome.UNSUPPORTED, (), "")
    assert report.reason == (
        'ModelOpt: TypeError: can only concatenate tuple (not "Tensor") to tuple '
        "(in quant_linear.py:160, forward); a model of plain sizes raises the same"
    )
    stage = report.stages[-1]
    assert (stage.name, stage.outcome) == ("quantize", Outcome.UNSUPPORTED)
    assert report.reason.startswith(stage.detail)
    assert report.reason in messages.full_text([report], None)


def test_what_the_kind_of_model_cannot_do_is_unsupported() -> None:
    report = check(replace(CASE, recipe="nvfp4_experts_only"))
    assert report.outcome is Outcome.UNSUPPORTED
    first, *rest = report.reason.splitlines()
    assert first.startswith("ModelOpt: RuntimeError: The quantization config asks for weight quantization")
    assert "*.experts.*weight_quantizer" in "\n".join(rest)


def test_what_a_plain_model_can_do_is_the_presets_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in ModelOpt's own code for one size, which the control does not have."""
    original = mtq.quantize

    def picky(model: Any, config: Any, loop: Any) -> Any:
        if model.config.kv_channels != WIDTH:
            return mtq.disable_quantizer(None, "*")
        return original(model, config, loop)

    monkeypatch.setattr("harness.quantize.mtq.quantize", picky)
    report = check(replace(CASE, recipe="fp8"))
    assert report.outcome is Outcome.FAILED
    (finding,) = report.findings
    assert finding.stage == "quantize" and finding.message.startswith("raised ")
    assert report.reason == ""


def test_what_is_raised_in_the_harness_is_no_ones_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise RuntimeError("our own")

    monkeypatch.setattr("harness.quantize.expected_matrices", failing)
    report = check(replace(CASE, recipe="fp8"))
    assert report.outcome is Outcome.FAILED
    assert [finding.message.partition(" (")[0] for finding in report.findings] == [
        "raised RuntimeError: our own"
    ]


def test_another_error_in_the_same_case_is_not_hidden(tmp_path: Any) -> None:
    from broken import TEXTS, edit, write_copy

    path = write_copy(tmp_path, "Qwen3-0.6B", edit(TEXTS["Qwen3-0.6B"], "--norm-epsilon", "1e-5"))
    report = check(replace(CASE, path=str(path)))
    assert report.outcome is Outcome.FAILED
    assert {finding.stage for finding in report.findings} == {"reference"}
    assert report.reason == ""


def raised(words: str, kind: str = "RuntimeError") -> Raised:
    return Raised(kind, words, "", Owner.MODELOPT)


def test_limits_are_the_same_whatever_their_numbers() -> None:
    assert raised("a (3) must match b (12)").same_as(raised("a (5) must match b (20)"))
    assert not raised("a (3) must match b (12)").same_as(raised("no such thing"))
    assert not raised("a").same_as(raised("a", "TypeError"))


def test_a_fault_on_the_gpu_is_told_in_cudas_words_and_as_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call came next has words of its own, and any model after it would raise as well."""
    fault = RuntimeError("CUDA error: device-side assert triggered\nSearch for it")
    monkeypatch.setattr(stages, "gpu_fault", lambda: fault)
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    with pytest.raises(Exception) as caught:
        mtq.disable_quantizer(None, "*")
    found = Raised.of(caught.value)
    assert found.on_gpu and found.actual == "RuntimeError: CUDA error: device-side assert triggered"
    message = found.finding("forward", "decoder.layers.0.mlp").message
    assert message.startswith("raised RuntimeError: CUDA error: device-side assert triggered (in ")
    late = (
        "; a GPU tells of it late, it may lie before: harness repro, or CUDA_LAUNCH_BLOCKING=1, shows where"
    )
    assert message.endswith(f") in layers.0.mlp{late}")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert found.finding("forward", "decoder.layers.0.mlp").message == message.removesuffix(late)


def test_after_a_fault_on_the_gpu_no_control_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*args: object, **more: object) -> None:
        monkeypatch.setattr(stages, "gpu_fault", lambda: RuntimeError("CUDA error: an illegal access"))
        raise RuntimeError("of the next call")

    monkeypatch.setattr(mtq, "quantize", faulty)
    monkeypatch.setattr(control, "ask", lambda *_: pytest.fail("a control was asked"))
    report = check(CASE)
    assert report.outcome is Outcome.FAILED
    assert any("CUDA error: an illegal access" in finding.message for finding in report.findings)


def test_whose_code_raised() -> None:
    def of(call: Any) -> Owner | None:
        with pytest.raises(Exception) as caught:
            call()
        return Raised.of(caught.value).owner

    assert of(lambda: mtq.disable_quantizer(None, "*")) is Owner.MODELOPT
    assert of(lambda: torch.ones(2).reshape(3)) is None
