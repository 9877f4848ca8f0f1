"""Whole cases with the real Megatron and ModelOpt on the CPU: what passes, and what each failure says."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from broken import PRESETS, TEXTS, edit, errors, write_copy

from harness import pipeline, rank_model, small_model
from harness.case import STAGES, Case, CaseReport, Outcome
from harness.errors import DeviceUnavailable, UnknownRecipe
from harness.layout import Layout
from harness.pipeline import check
from harness.recipes import RECIPES
from harness.stages import NEEDS

CASE = Case("Qwen/Qwen3-0.6B", str(PRESETS["Qwen3-0.6B"].path), "fp8", Layout(), "cpu")
SPEC = "megatron.core.post_training.modelopt.gpt.model_specs.get_gpt_modelopt_spec"
CONFIG = "megatron.training.argument_utils.core_transformer_config_from_args"
MODEL = "megatron.core.models.gpt.GPTModel"


def broken_case(folder: Path, flag: str, value: str | None) -> Case:
    text = edit(TEXTS["Qwen3-0.6B"], flag, value)
    return replace(CASE, path=str(write_copy(folder, "Qwen3-0.6B", text)))


def outcomes(report: CaseReport) -> dict[str, str]:
    return {stage.name: str(stage.outcome) for stage in report.stages}


def after(name: str, *, failed: tuple[str, ...]) -> dict[str, str]:
    """Outcomes where the stages up to ``name`` ran, those in ``failed`` in vain, and the rest did not."""
    stages = CASE.stages
    ran = stages[: stages.index(name) + 1]
    return {
        stage: "failed" if stage in failed else "passed" if stage in ran else "skipped" for stage in stages
    }


def raising(error: Exception) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        raise error

    return replacement


@pytest.fixture(scope="module")
def passed() -> CaseReport:
    return check(CASE)


# A case that passes


def test_every_stage_passes_in_order(passed: CaseReport) -> None:
    assert [stage.name for stage in passed.stages] == list(CASE.stages)
    assert outcomes(passed) == dict.fromkeys(CASE.stages, "passed")
    assert (passed.outcome, passed.findings, passed.log, passed.reason) == (Outcome.PASSED, (), "", "")


def test_each_stage_says_what_it_saw(passed: CaseReport) -> None:
    assert passed.shrink is not None
    for stage, words in zip(
        passed.stages,
        (
            "27 flags",
            "compared with Qwen3-0.6B.toml",
            "596,049,920 parameters",
            "Megatron accepts the full size",
            f"{passed.shrink.after['parameters']:,} parameters, S1 to S12 kept",
            "parameters as in the inventory",
            "logits finite",
            "quantizers, relative error",
        ),
        strict=True,
    ):
        assert words in stage.detail
        assert 0 <= stage.seconds <= passed.seconds


def test_the_report_has_the_plan_and_the_stand_ins(passed: CaseReport) -> None:
    assert passed.shrink is not None
    assert passed.shrink.before["hidden_size"] == 1024
    assert [invariant.name for invariant in passed.shrink.invariants] == [f"S{n}" for n in range(1, 13)]
    assert all(invariant.holds for invariant in passed.shrink.invariants)
    assert passed.stand_ins
    assert all(record.target and record.replacement and record.reason for record in passed.stand_ins)


def test_nothing_is_printed(passed: CaseReport, capfd: pytest.CaptureFixture[str]) -> None:
    assert check(CASE).outcome is passed.outcome
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed_by_a_new_process() -> None:
    program = (
        "from harness.case import Case\n"
        "from harness.layout import Layout\n"
        "from harness.pipeline import check\n"
        f"raise SystemExit(check({CASE!r}).outcome != 'passed')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_case_says_the_same_twice(passed: CaseReport) -> None:
    again = check(CASE)
    assert [stage.detail for stage in again.stages] == [stage.detail for stage in passed.stages]


# The stages


def test_every_stage_but_the_first_needs_an_earlier_one() -> None:
    assert tuple(NEEDS) == STAGES
    assert [stage for stage, needed in NEEDS.items() if not needed] == ["parse"]
    for stage, needed in NEEDS.items():
        assert all(STAGES.index(one) < STAGES.index(stage) for one in needed)


def test_a_wrong_value_is_built_all_the_same(tmp_path: Path) -> None:
    report = check(broken_case(tmp_path, "--norm-epsilon", None))
    assert outcomes(report) == after("quantize", failed=("reference",))
    assert report.outcome is Outcome.FAILED
    assert [finding.flag for finding in report.findings] == ["--norm-epsilon"]


def test_a_wrong_size_is_built_all_the_same(tmp_path: Path) -> None:
    report = check(broken_case(tmp_path, "--num-query-groups", "4"))
    assert outcomes(report) == after("quantize", failed=("reference", "audit"))


def test_what_cannot_be_read_is_not_built(tmp_path: Path) -> None:
    path = write_copy(tmp_path, "Qwen3-0.6B", "echo hello\n")
    report = check(replace(CASE, path=str(path)))
    assert outcomes(report) == after("parse", failed=("parse",))
    assert {stage.detail for stage in report.stages[1:]} == {"parse gave nothing to go on with"}
    assert report.stand_ins == ()


def test_what_is_no_model_is_not_built(tmp_path: Path) -> None:
    report = check(broken_case(tmp_path, "--num-query-groups", "7"))
    assert outcomes(report) == after("audit", failed=("parse", "reference", "audit"))
    assert {stage.detail for stage in report.stages[3:]} == {"audit gave nothing to go on with"}
    assert {finding.flag for finding in errors(report.findings)} == {"--num-query-groups"}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--multi-latent-attention", ""),
        ("--spec", "other module"),
        ("--mtp-num-layers", "1"),
        ("--hybrid-layer-pattern", "M*M*"),
        ("--export-default-te-spec", ""),
    ],
)
def test_a_model_that_cannot_be_built_yet_is_a_finding(flag: str, value: str, tmp_path: Path) -> None:
    report = check(broken_case(tmp_path, flag, value))
    assert report.outcome is Outcome.FAILED
    assert flag in {finding.flag for finding in errors(report.findings)}
    assert list(outcomes(report)) == list(CASE.stages)


# A wrong model


def test_a_misshapen_parameter_is_named(monkeypatch: pytest.MonkeyPatch, passed: CaseReport) -> None:
    from megatron.core.post_training.modelopt.gpt import model_specs

    original = model_specs.get_gpt_modelopt_spec

    def wrong(config: Any, **kwargs: Any) -> Any:
        config.num_query_groups = config.num_attention_heads
        return original(config=config, **kwargs)

    monkeypatch.setattr(SPEC, wrong)
    report = check(CASE)
    assert report.outcome is Outcome.FAILED
    assert passed.shrink is not None
    size = {
        dest: int(str(value))
        for dest, value in passed.shrink.after.items()
        if dest != "moe_layer_freq" and value
    }
    heads, groups, channels, hidden = (
        size[dest] for dest in ("num_attention_heads", "num_query_groups", "kv_channels", "hidden_size")
    )
    expected, actual = (heads + 2 * groups) * channels, 3 * heads * channels
    finding = next(finding for finding in report.findings if finding.stage == "build")
    assert finding.module == "decoder.layers.0.self_attention.linear_qkv"
    assert (finding.expected, finding.actual) == ((expected, hidden), (actual, hidden))
    assert finding.message == (
        f"layers.0.self_attention.linear_qkv  weight is {actual} x {hidden}, expected {expected} x {hidden}"
    )
    assert "linear_qkv  output is" in " ".join(
        one.message for one in report.findings if one.stage == "forward"
    )
    assert outcomes(report)["quantize"] != "skipped", "a model of another shape still runs"
    assert report.case.repro == "harness check Qwen/Qwen3-0.6B --recipe fp8 --layout tp1 --device cpu"


def test_a_missing_and_an_unexpected_parameter_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rank_model.rank_parameters
    name = "decoder.layers.0.self_attention.q_layernorm.weight"

    def other(*args: Any) -> dict[str, tuple[int, ...]]:
        shapes = original(*args)
        return {key: shape for key, shape in shapes.items() if key != name} | {"decoder.extra.weight": (2, 3)}

    monkeypatch.setattr(rank_model, "rank_parameters", other)
    report = check(CASE)
    assert outcomes(report)["build"] == "failed"
    messages = [finding.message for finding in report.findings]
    assert messages[0] == "extra  weight is missing, expected 2 x 3"
    assert re.fullmatch(
        r"layers\.0\.self_attention\.q_layernorm  weight is \d+, and no such parameter is expected",
        messages[1],
    )


def test_a_case_carries_the_command_that_runs_it_again() -> None:
    command = "harness check Qwen/Qwen3-0.6B --recipe fp8 --layout tp1 --device cpu"
    assert CASE.repro == command
    assert replace(CASE, presets="my presets").repro in (
        f"{command} --presets 'my presets'",
        f'{command} --presets "my presets"',
    )


# What Megatron and ModelOpt raise


@pytest.mark.parametrize(
    ("target", "error", "last", "failed"),
    [
        pytest.param(CONFIG, ValueError("3 groups do not divide 16 heads"), "shrink", "config", id="config"),
        pytest.param(SPEC, NotImplementedError("no such spec"), "build", "build", id="spec"),
        pytest.param(f"{MODEL}.__init__", AssertionError(), "build", "build", id="build"),
        pytest.param(f"{MODEL}.forward", RuntimeError("3x4 and 5x6"), "forward", "forward", id="forward"),
        pytest.param(
            "modelopt.torch.quantization.quantize", KeyError("amax"), "quantize", "quantize", id="quantize"
        ),
    ],
)
def test_an_exception_is_a_finding_with_its_type_and_text(
    monkeypatch: pytest.MonkeyPatch, target: str, error: Exception, last: str, failed: str
) -> None:
    monkeypatch.setattr(target, raising(error))
    report = check(CASE)
    assert report.outcome is Outcome.FAILED
    assert outcomes(report) == after(last, failed=(failed,))
    (finding,) = errors(report.findings)
    assert finding.stage == failed
    assert finding.message.startswith(f"raised {type(error).__name__}: {error}")
    # What was patched stands in no file of Megatron's or ModelOpt's: the place is the one that called it.
    assert re.search(r" \(in \w+\.py:\d+, \w+\)$", finding.message)
    assert finding.actual == f"{type(error).__name__}: {error}"
    skipped = [stage.detail for stage in report.stages if stage.outcome is Outcome.SKIPPED]
    assert set(skipped) <= {f"{failed} gave nothing to go on with"}


def test_what_megatron_prints_before_it_raises_is_kept(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def talk(*args: Any, **kwargs: Any) -> Any:
        print("a word before the end")
        raise ValueError("the end")

    monkeypatch.setattr(SPEC, talk)
    report = check(CASE)
    assert "a word before the end" in report.log
    assert capfd.readouterr() == ("", "")


# What the harness itself raises


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (pipeline, "load_preset"),
        (pipeline, "compare"),
        (pipeline, "audit"),
        (small_model, "shrink"),
        (rank_model, "rank_parameters"),
        (rank_model, "activations"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_harness_own_exception_is_an_error_with_its_traceback(
    module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, raising(ZeroDivisionError("ours")))
    report = check(CASE)
    assert report.outcome is Outcome.ERROR
    assert report.reason == "the harness failed: ZeroDivisionError: ours"
    assert report.log.startswith("Traceback (most recent call last):")
    assert report.log.rstrip().endswith("ZeroDivisionError: ours")
    assert "in replacement" in report.log
    assert not errors(report.findings), "nothing is said against the preset"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["python", "cpu", "cuda", "cublas"],
)
@pytest.mark.parametrize("target", [f"{MODEL}.forward", "modelopt.torch.quantization.quantize"])
def test_that_memory_ran_out_is_said_and_is_no_fault_of_a_preset(
    monkeypatch: pytest.MonkeyPatch, target: str, error: Exception
) -> None:
    monkeypatch.setattr(target, raising(error))
    report = check(CASE)
    assert report.outcome is Outcome.ERROR
    assert report.reason.startswith(f"out of memory: {type(error).__name__}")
    assert not errors(report.findings)


def test_after_any_failure_the_next_case_passes(passed: CaseReport) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{MODEL}.forward", raising(RuntimeError("once")))
        assert check(CASE).outcome is Outcome.FAILED
    assert check(CASE).stages[-1].detail == passed.stages[-1].detail


def process_state() -> dict[str, Any]:
    """What a case might change in its process."""
    return {
        "excepthook": sys.excepthook,
        "log handlers": logging.root.handlers[:],
        "log level": logging.root.level,
        "warning filters": warnings.filters[:],
        "environment": dict(os.environ),
        "python's random numbers": random.getstate(),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "process groups": torch.distributed.is_initialized(),
        "signals": {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)},
        "directory": Path.cwd(),
    }


def test_the_process_is_left_as_it_was(passed: CaseReport, monkeypatch: pytest.MonkeyPatch) -> None:
    before = process_state()
    assert check(CASE).outcome is passed.outcome
    after_success = process_state()
    monkeypatch.setattr(f"{MODEL}.forward", raising(RuntimeError("on the way")))
    assert check(CASE).outcome is Outcome.FAILED
    assert after_success == before
    assert process_state() == before


def test_wrong_usage_raises() -> None:
    with pytest.raises(UnknownRecipe):
        check(replace(CASE, recipe="fp9"))
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailable):
            check(replace(CASE, device="cuda:0"))


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")
@pytest.mark.parametrize("recipe", [recipe.name for recipe in RECIPES])
@pytest.mark.parametrize("name", PRESETS)
def test_cuda_gives_the_verdicts_of_the_cpu(name: str, recipe: str) -> None:
    on_cpu = Case(f"Qwen/{name}", str(PRESETS[name].path), recipe, Layout(), "cpu")
    cpu, cuda = check(on_cpu), check(replace(on_cpu, device="cuda:0"))
    assert outcomes(cuda) == outcomes(cpu)
    assert [finding.message for finding in cuda.findings] == [finding.message for finding in cpu.findings]
