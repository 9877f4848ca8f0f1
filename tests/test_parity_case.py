"""The stage parity in a case: once a preset, skipped with a reason, and what it comes to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import TEXTS, edit, write_copy

from harness import small_model
from harness.case import PARITY, Case, CaseReport, Check, Outcome, StageReport
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.messages import what_happened
from harness.parity import exporting, stage
from harness.parity.exporting import Exported
from harness.parity.stage import Parity
from harness.pipeline import check
from harness.preset import find_presets
from harness.selection import cases_of, checks_named
from harness.small_model import INSTALL_PARITY

ROOT = Path(__file__).parent.parent
CASE = Case("Qwen/Qwen3-0.6B", str(ROOT / "presets/Qwen/Qwen3-0.6B.sh"), PARITY, Layout(), "cpu")


def parity_stage(report: CaseReport) -> StageReport:
    assert report.stages[-1].name == PARITY
    return report.stages[-1]


def test_one_case_a_preset_and_without_build_forward_and_quantize() -> None:
    files = find_presets(["Qwen3-0.6B", "Qwen3-8B"], ROOT / "presets")
    layouts = (Layout(), Layout.parse("tp2"))
    cases = cases_of(files, checks_named([]), layouts, "cpu", None)
    assert len(cases) == 2 * (3 * 2 + 1)
    parity = [case for case in cases if case.recipe == PARITY]
    assert [str(case.layout) for case in parity] == ["tp1", "tp1"]
    assert CASE.stages == ("parse", "reference", "audit", "config", "shrink", "parity")
    assert replace(CASE, recipe="fp8").stages[-1] == "quantize"


def test_the_catalogue_model_passes_every_stage() -> None:
    report = check(CASE)
    assert (report.outcome, report.findings, report.log) == (Outcome.PASSED, (), "")
    assert [entry.name for entry in report.stages] == list(CASE.stages)
    assert {entry.outcome for entry in report.stages} == {Outcome.PASSED}
    assert "logits agree to " in parity_stage(report).detail
    assert report.case.repro == "harness check Qwen/Qwen3-0.6B --recipe parity --layout tp1 --device cpu"


def test_a_silent_mistake_fails_in_parity_beside_reference(tmp_path: Path) -> None:
    path = write_copy(tmp_path, "Qwen3-0.6B", edit(TEXTS["Qwen3-0.6B"], "--norm-epsilon", "1e-4"))
    report = check(replace(CASE, path=str(path)))
    assert report.outcome is Outcome.FAILED
    failed = [entry.name for entry in report.stages if entry.outcome is Outcome.FAILED]
    assert failed == ["reference", "parity"]
    (found,) = [finding for finding in report.findings if finding.stage == PARITY]
    assert found.flag == "--norm-epsilon"
    assert found.line == next(
        n for n, text in enumerate(path.read_text().splitlines(), 1) if "epsilon" in text
    )


def test_without_the_extra_it_is_skipped_with_the_command_that_adds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = importlib.util.find_spec

    def none_of_transformers(name: str, *more: Any) -> Any:
        return None if name == "transformers" else known(name, *more)

    monkeypatch.setattr(small_model, "find_spec", none_of_transformers)
    report = check(CASE)
    assert report.outcome is Outcome.SKIPPED
    assert report.reason == f"transformers is not installed: {INSTALL_PARITY}"
    assert "pip install 'preset-harness[parity]'" in report.reason
    assert (parity_stage(report).outcome, parity_stage(report).detail) == (Outcome.SKIPPED, report.reason)


def test_without_published_facts_it_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "presets" / "Nobody" / "Unheard-Of.sh"
    path.parent.mkdir(parents=True)
    path.write_text(TEXTS["Qwen3-0.6B"].replace("Qwen/Qwen3-0.6B", "Nobody/Unheard-Of"))
    report = check(replace(CASE, preset="Nobody/Unheard-Of", path=str(path)))
    assert (report.outcome, report.reason) == (
        Outcome.SKIPPED,
        "nothing published is there to compare with",
    )


def test_what_cannot_be_read_is_not_compared(tmp_path: Path) -> None:
    report = check(replace(CASE, path=str(write_copy(tmp_path, "Qwen3-0.6B", "echo hello\n"))))
    assert report.outcome is Outcome.FAILED
    assert parity_stage(report).detail == "parse gave nothing to go on with"


WRONG = Finding(PARITY, Severity.ERROR, "layer 0 differs")


@pytest.mark.parametrize(
    ("parity", "outcome", "reason"),
    [
        (Parity((), "Megatron: has no such thing", ""), Outcome.UNSUPPORTED, "Megatron: has no such thing"),
        (Parity((WRONG,), "Megatron: has no such thing", ""), Outcome.FAILED, ""),
        (Parity((WRONG,), "", ""), Outcome.FAILED, ""),
    ],
    ids=["limit", "limit-and-error", "error"],
)
def test_a_limit_excuses_no_error(
    parity: Parity, outcome: Outcome, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "prove_parity", lambda *_: parity)
    report = check(CASE)
    assert (report.outcome, report.reason) == (outcome, reason)
    assert parity_stage(report).outcome is outcome


EXPORT_CASE = replace(CASE, recipe="fp8", prove=("export",))


def export(report: CaseReport) -> Check:
    (check,) = parity_stage(report).checks
    assert check.name == "export"
    return check


def test_an_export_is_proved_on_request() -> None:
    report = check(EXPORT_CASE)
    assert (report.outcome, report.findings) == (Outcome.PASSED, ())
    assert export(report).outcome is Outcome.PASSED
    assert "weights quantized" in export(report).detail
    assert "relative error" in what_happened(report)


@pytest.mark.parametrize(
    ("exported", "outcome"),
    [
        (Exported((), "ModelOpt: no rules", "nothing exported"), Outcome.UNSUPPORTED),
        (Exported((WRONG,), "ModelOpt: no rules", "nothing exported"), Outcome.FAILED),
        (Exported((WRONG,), "", "nothing exported"), Outcome.FAILED),
    ],
    ids=["limit", "limit-and-error", "error"],
)
def test_what_an_export_comes_to(
    exported: Exported, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "export_of", lambda *_: exported)
    report = check(EXPORT_CASE)
    assert export(report).outcome is outcome
    assert report.outcome is (Outcome.FAILED if exported.findings else Outcome.PASSED)
    assert [finding.check for finding in report.findings] == ["export"] * len(exported.findings)


def test_an_export_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = check(replace(EXPORT_CASE, layout=Layout.parse("tp2")))
    assert export(report) == Check("export", Outcome.SKIPPED, "an export is made on one rank")
    broken = write_copy(tmp_path, "Qwen3-0.6B", edit(TEXTS["Qwen3-0.6B"], "--norm-epsilon", "1e-4"))
    report = check(replace(EXPORT_CASE, path=str(broken)))
    assert export(report).detail == "the model is not quantized as it should be"
    monkeypatch.setattr(small_model, "find_spec", lambda name: None)
    assert export(check(EXPORT_CASE)).detail == f"transformers is not installed: {INSTALL_PARITY}"


def test_the_harness_own_exception_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Callable[..., Any]:
        raise LookupError("no such part")

    monkeypatch.setattr(stage, "prove_parity", broken)
    report = check(CASE)
    assert (report.outcome, report.reason) == (
        Outcome.ERROR,
        "the harness failed: LookupError: no such part",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "presets").rglob("*.sh")))
def test_cuda_gives_the_verdict_of_the_cpu(name: str) -> None:
    (file,) = find_presets([name], ROOT / "presets")
    on_cpu = Case(file.name, str(file.path), PARITY, Layout(), "cpu")
    cpu, cuda = check(on_cpu), check(replace(on_cpu, device="cuda:0"))
    assert (cuda.outcome, cuda.findings) == (cpu.outcome, cpu.findings)
