"""Reports as JSON, and the words that people read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness import messages, report
from harness.case import (
    Case,
    CaseReport,
    Check,
    Mismatch,
    Outcome,
    ShrinkReport,
    Size,
    StageReport,
    StandInReport,
)
from harness.errors import ReportError
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.shrink.invariants import Invariant
from harness.step_summary import summary_markdown, write_step_summary

CASE = Case("Qwen/Qwen3-8B", "presets/Qwen/Qwen3-8B.sh", "fp8", Layout(), "cpu")
GROUPS = Finding(
    "reference",
    Severity.ERROR,
    "--num-query-groups 10: 8 published; 32 heads / 10 groups is not whole",
    "--num-query-groups",
    22,
    5,
    expected=8,
    actual=10,
)
SHAPE = Finding(
    "build",
    Severity.ERROR,
    "layers.0.self_attention.linear_qkv  weight is 1280 x 128, expected 1024 x 128",
    module="decoder.layers.0.self_attention.linear_qkv",
    expected=[1024, 128],
    actual=[1280, 128],
)
PADDED = Finding("audit", Severity.WARNING, "linear_fc2 takes 896 inputs", "--ffn-hidden-size", 18)
NORM = StandInReport("TE RMSNorm", "torch", "Transformer Engine is not installed.")
FAILED = CaseReport(
    CASE,
    Outcome.FAILED,
    1.25,
    stages=(
        StageReport("parse", Outcome.PASSED, 0.01, "28 flags"),
        StageReport("build", Outcome.FAILED, 0.5),
        StageReport("forward", Outcome.SKIPPED, 0.0, "build gave nothing to go on with"),
    ),
    findings=(SHAPE, GROUPS, PADDED),
    stand_ins=(NORM,),
    shrink=ShrinkReport(
        {"num_layers": 36}, {"num_layers": 2}, (Invariant("S6", "layers", "36 layers", "2 layers", True),)
    ),
    log="WARNING megatron: something\n",
)
PASSED = CaseReport(
    replace(CASE, recipe="nvfp4"),
    Outcome.PASSED,
    0.5,
    stages=(
        StageReport(
            "quantize",
            Outcome.PASSED,
            0.4,
            "8 matrices, 16 quantizers",
            (Check("coverage", Outcome.PASSED, "all"), Check("weights", Outcome.UNSUPPORTED, "ModelOpt: no")),
        ),
    ),
    findings=(PADDED,),
    stand_ins=(NORM,),
)
SKIPPED = CaseReport(replace(CASE, recipe="mxfp8"), Outcome.SKIPPED, 0.0, reason="no kernel for it here")
UNSUPPORTED = CaseReport(
    replace(CASE, recipe="nvfp4_svdquant", prove=("state", "weights")),
    Outcome.UNSUPPORTED,
    0.7,
    stages=(StageReport("quantize", Outcome.UNSUPPORTED, 0.2, "ModelOpt: TypeError: no"),),
    reason="ModelOpt: TypeError: no; a model of plain sizes raises the same\nand more words",
)
BROKEN = CaseReport(
    replace(CASE, recipe="int4_awq"),
    Outcome.ERROR,
    3.0,
    reason="the harness failed: KeyError: 'x'",
    log="Traceback (most recent call last):\nKeyError: 'x'\n",
)
ALL = (FAILED, PASSED, SKIPPED, UNSUPPORTED, BROKEN)


# ---- JSON ----


def test_a_document_reads_back_as_the_same_reports() -> None:
    document = json.loads(json.dumps(report.to_json(ALL), allow_nan=False))
    assert report.from_json(document) == ALL


def test_a_document_has_the_keys_of_the_contract() -> None:
    document = report.to_json([FAILED])
    assert list(document) == ["schema", "environment", "stand_ins", "results"]
    assert document["schema"] == 1
    assert document["stand_ins"] == [
        {"target": "TE RMSNorm", "replacement": "torch", "reason": "Transformer Engine is not installed."}
    ]
    (result,) = document["results"]
    contract = "preset recipe layout device outcome seconds stages findings shrink repro reason log"
    assert set(contract.split()) <= set(result)
    assert result["repro"] == "harness check Qwen/Qwen3-8B --recipe fp8 --layout tp1 --device cpu"
    assert set("stage severity flag line expected actual message".split()) <= set(result["findings"][0])
    assert set(result["shrink"]) == {"before", "after", "invariants"}


def test_values_that_json_has_no_word_for_become_text() -> None:
    odd = replace(GROUPS, expected=(float("nan"), {1: Outcome.PASSED}), actual=object)
    (result,) = report.to_json([replace(FAILED, findings=(odd,))])["results"]
    assert result["findings"][0]["expected"] == ["nan", {"1": "passed"}]
    assert result["findings"][0]["actual"] == "<class 'object'>"


def test_the_environment_names_versions_without_importing_them() -> None:
    code = (
        "import json, sys; from harness.report import environment; "
        "print(json.dumps([environment(), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    environment, torch_imported = json.loads(done.stdout)
    assert not torch_imported
    assert set(environment) == {"python", "platform", "packages", "devices"}
    known = {"torch", "megatron-core", "nvidia-modelopt", "transformer-engine", "transformers"}
    assert set(environment["packages"]) == known
    assert environment["packages"]["megatron-core"].startswith("0.19")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a harness report: it is not JSON"),
        ("[]", "is not a harness report: it has no 'results'"),
        ('{"results": []}', "has schema None, and this harness reads schema 1"),
        ('{"schema": 1, "results": []}', "is not a harness report: stand_ins: no 'stand_ins'"),
        (
            '{"schema": 1, "stand_ins": [], "results": [{}]}',
            "is not a harness report: results[0]: no 'shrink'",
        ),
        ('{"schema": 1, "stand_ins": [], "results": 3}', "is not a harness report: 'results' is no list"),
    ],
)
def test_a_file_that_is_no_report_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportError) as raised:
        report.read_report(path)
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)


def test_a_missing_report_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read: No such file or directory"):
        report.read_report(tmp_path / "none.json")


def test_writing_replaces_a_report_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    path.chmod(0o640)
    report.write_report(path, report.to_json([PASSED], env={}))
    assert report.read_report(path) == (PASSED,)
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["report.json"]


def test_writing_follows_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    report.write_report(link, {"schema": 1})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"schema": 1}


def test_a_document_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReportError, match="cannot be written: No space left on device"):
        report.write_report(path, {})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_device_file_is_written_to_and_not_replaced() -> None:
    report.write_report(Path("/dev/null"), {})
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    ("where", "why"), [("", "it is a directory"), ("no/report.json", "there is no directory")]
)
def test_a_place_that_cannot_hold_a_report_says_why(tmp_path: Path, where: str, why: str) -> None:
    with pytest.raises(ReportError, match=f"cannot be written: {why}"):
        report.write_report(tmp_path / where, {})


@pytest.mark.parametrize(
    ("reports", "code"),
    [
        ([PASSED], 0),
        ([PASSED, SKIPPED], 0),
        ([PASSED, FAILED], 1),
        ([FAILED, BROKEN], 2),
        ([], 2),
        ([SKIPPED], 2),
        ([PASSED, UNSUPPORTED], 0),
        ([UNSUPPORTED], 2),
        ([FAILED, UNSUPPORTED], 1),
    ],
    ids=[
        "passed",
        "passed-skipped",
        "failed",
        "error",
        "nothing",
        "only-skipped",
        "passed-unsupported",
        "only-unsupported",
        "failed-unsupported",
    ],
)
def test_exit_codes(reports: list[CaseReport], code: int) -> None:
    assert report.exit_code(reports) == code


# ---- text ----


def test_what_was_asked_and_could_not_be_proved_is_said_once() -> None:
    wanted = replace(PASSED.case, prove=("weights", "export"))
    limit = Check("export", Outcome.UNSUPPORTED, "ModelOpt: the exporter has no rules for Qwen4")
    skipped = Check("weights", Outcome.SKIPPED, "simulated rank: shapes only")
    other = Check("coverage", Outcome.UNSUPPORTED, "not asked for")
    stage = StageReport("quantize", Outcome.PASSED, 0.0, "", (limit, skipped, other))
    entry = replace(PASSED, case=wanted, stages=(stage,))
    second = replace(entry, case=replace(wanted, recipe="nvfp4"), stages=(replace(stage, checks=(limit,)),))
    expected = [
        "export unsupported: ModelOpt: the exporter has no rules for Qwen4",
        f"  {entry.case.name}",
        f"  {second.case.name}",
        "weights skipped: simulated rank: shapes only",
        f"  {entry.case.name}",
    ]
    assert messages.not_proved_text([entry, second]).splitlines() == expected
    assert "not proved\n  export unsupported" in messages.full_text([entry], None)
    assert messages.not_proved_text([replace(entry, outcome=Outcome.FAILED), PASSED]) == ""


def test_a_failure_says_where_what_is_what_should_be_and_what_to_do() -> None:
    assert messages.failure_text(FAILED) == (
        "Qwen/Qwen3-8B  layers.0.self_attention.linear_qkv  weight is 1280 x 128, expected 1024 x 128\n"
        "  --num-query-groups 10 (presets/Qwen/Qwen3-8B.sh:22): "
        "8 published; 32 heads / 10 groups is not whole\n"
        "  again: harness check Qwen/Qwen3-8B --recipe fp8 --layout tp1 --device cpu"
    )


def test_a_failure_without_a_model_is_headed_by_its_stages() -> None:
    assert messages.failure_text(replace(FAILED, findings=(GROUPS,))) == (
        "Qwen/Qwen3-8B  failed in reference\n"
        "  --num-query-groups 10 (presets/Qwen/Qwen3-8B.sh:22): "
        "8 published; 32 heads / 10 groups is not whole\n"
        "  again: harness check Qwen/Qwen3-8B --recipe fp8 --layout tp1 --device cpu"
    )


def test_an_error_is_headed_by_its_reason_and_shows_its_log() -> None:
    assert messages.failure_text(BROKEN) == (
        "Qwen/Qwen3-8B  the harness failed: KeyError: 'x'\n"
        "  | Traceback (most recent call last):\n"
        "  | KeyError: 'x'\n"
        "  again: harness check Qwen/Qwen3-8B --recipe int4_awq --layout tp1 --device cpu"
    )


def test_cases_that_fail_alike_share_a_block() -> None:
    text = messages.failures_text([FAILED, replace(FAILED, case=PASSED.case)])
    assert text.count("weight is 1280 x 128") == 1
    assert text.splitlines()[-2:] == [
        "  again: harness check Qwen/Qwen3-8B --recipe fp8 --layout tp1 --device cpu",
        "  again: harness check Qwen/Qwen3-8B --recipe nvfp4 --layout tp1 --device cpu",
    ]


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (GROUPS, "--num-query-groups 10 (p.sh:22): 8 published; 32 heads / 10 groups is not whole"),
        (replace(GROUPS, message="10 is odd"), "--num-query-groups (p.sh:22): 10 is odd"),
        (replace(GROUPS, message="no flag --num-query-groups"), "p.sh:22: no flag --num-query-groups"),
        (
            replace(GROUPS, line=None, message="--num-query-groups is not set: 8"),
            "--num-query-groups is not set: 8",
        ),
        (replace(GROUPS, flag=None, message="a pipe"), "p.sh:22: a pipe"),
        (replace(GROUPS, flag=None, line=None, message="one\ntwo"), "one two"),
    ],
    ids=["flag-first", "flag-absent", "flag-within", "no-line", "no-flag", "no-place"],
)
def test_a_finding_names_its_flag_and_place_once(finding: Finding, text: str) -> None:
    assert messages.finding_text(finding, "p.sh") == text


def test_a_lint_line_reads_as_a_compiler_writes_it() -> None:
    assert (
        messages.lint_line(PADDED, "p.sh")
        == "p.sh:18: warning: --ffn-hidden-size: linear_fc2 takes 896 inputs"
    )
    assert messages.lint_line(GROUPS, "p.sh").startswith(
        "p.sh:22:5: error: --num-query-groups 10: 8 published"
    )


def test_an_error_that_a_later_stage_repeats_without_a_place_appears_once() -> None:
    flagged = replace(GROUPS, stage="parse", message="32 heads / 10 groups is not whole")
    repeated = replace(flagged, stage="audit", flag=None, line=None, column=None)
    assert messages.lint_text([replace(FAILED, findings=(flagged, repeated))]).splitlines() == [
        "presets/Qwen/Qwen3-8B.sh:22:5: error: --num-query-groups: 32 heads / 10 groups is not whole",
        "1 preset: 1 error, 0 warnings",
    ]


def test_the_whole_text_when_piped() -> None:
    failure = "layers.0.self_attention.linear_qkv  weight is 1280 x 128, expected 1024 x 128 (and 1 more)"
    limit = "ModelOpt: TypeError: no; a model of plain sizes raises the same"
    fault = "the harness failed: KeyError: 'x'"
    assert messages.full_text(ALL, None, 5.0).splitlines() == [
        "preset         recipe          layout  device  outcome      seconds  what",
        f"Qwen/Qwen3-8B  fp8             tp1     cpu     failed           1.2  {failure}",
        "Qwen/Qwen3-8B  nvfp4           tp1     cpu     passed           0.5  8 matrices, 16 quantizers",
        "Qwen/Qwen3-8B  mxfp8           tp1     cpu     skipped          0.0  no kernel for it here",
        f"Qwen/Qwen3-8B  nvfp4_svdquant  tp1     cpu     unsupported      0.7  {limit}",
        f"Qwen/Qwen3-8B  int4_awq        tp1     cpu     error            3.0  {fault}",
        "",
        *messages.failure_text(FAILED).splitlines(),
        "",
        *messages.failure_text(BROKEN).splitlines(),
        "",
        "skipped",
        "  Qwen/Qwen3-8B-mxfp8-tp1-cpu  skipped: no kernel for it here",
        "",
        "unsupported",
        f"  {limit}",
        "  and more words",
        "    Qwen/Qwen3-8B-nvfp4_svdquant-tp1-cpu",
        "",
        "warnings",
        "  Qwen/Qwen3-8B  --ffn-hidden-size (presets/Qwen/Qwen3-8B.sh:18): linear_fc2 takes 896 inputs",
        "",
        "stand-ins on this machine",
        "  TE RMSNorm: torch. Transformer Engine is not installed.",
        "",
        "5 cases: 1 passed, 1 failed, 1 skipped, 1 unsupported, 1 error in 5.0 s",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal_and_cuts_nothing(width: int) -> None:
    lines = messages.summary_table(ALL, width).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for word in "weight is 1280 x 128, expected 1024 x 128 (and 1 more)".split():
        assert word in words
    assert "…" not in " ".join(lines)


def test_at_80_columns_what_went_wrong_stands_below() -> None:
    assert messages.summary_table([PASSED, SKIPPED], 80).splitlines() == [
        "preset         recipe  layout  device  outcome  seconds",
        "Qwen/Qwen3-8B  nvfp4   tp1     cpu     passed       0.5",
        "Qwen/Qwen3-8B  mxfp8   tp1     cpu     skipped      0.0",
        "    no kernel for it here",
    ]


def test_a_case_that_proves_more_says_so_in_its_document_and_command() -> None:
    (result,) = report.to_json([UNSUPPORTED])["results"]
    assert result["prove"] == ["state", "weights"]
    assert result["repro"].endswith("--device cpu --prove state,weights")
    (passed,) = report.to_json([PASSED])["results"]
    assert passed["stages"][0]["checks"][1] == {
        "name": "weights",
        "outcome": "unsupported",
        "detail": "ModelOpt: no",
    }


def test_the_checks_of_a_stage_stand_below_it() -> None:
    assert messages.stages_text(PASSED).splitlines() == [
        "stage       outcome      seconds  what",
        "quantize    passed          0.40  8 matrices, 16 quantizers",
        "  coverage  passed                all",
        "  weights   unsupported           ModelOpt: no",
    ]


# ---- where shapes part ----

MISMATCH = Mismatch(
    "decoder.layers.0.self_attention.linear_qkv",
    (("weight", "5120 x 4096, 6144 x 4096 published"), ("takes", "s x b x 4096")),
    (Size("--hidden-size", 19, "4096", "1024"), Size("--num-query-groups", 23, "4", None, "8")),
)


def mismatched() -> CaseReport:
    case = Case("Qwen/Qwen3-8B", "a.sh", "fp8", Layout(), "cpu")
    finding = Finding(
        "reference", Severity.ERROR, "--num-query-groups 4: 8 published", "--num-query-groups", 23
    )
    return CaseReport(case, Outcome.FAILED, 1.0, findings=(finding,), mismatch=MISMATCH)


def test_where_shapes_part_is_shown_with_the_flags_behind_the_sizes() -> None:
    assert messages.failure_text(mismatched()).splitlines() == [
        "Qwen/Qwen3-8B  failed in reference",
        "  --num-query-groups 4 (a.sh:23): 8 published",
        "  shapes part at layers.0.self_attention.linear_qkv",
        "    weight  5120 x 4096, 6144 x 4096 published",
        "    takes   s x b x 4096",
        "    --num-query-groups 4 (a.sh:23), 8 published",
        "    --hidden-size 4096 (a.sh:19), 1024 in the tiny model",
        "  again: harness check Qwen/Qwen3-8B --recipe fp8 --layout tp1 --device cpu",
    ]


def test_a_mismatch_reads_back() -> None:
    document = json.loads(json.dumps(report.to_json([mismatched()], env={})))
    assert report.from_json(document) == (mismatched(),)
    del document["results"][0]["mismatch"]  # as an earlier version wrote it
    assert report.from_json(document)[0].mismatch is None


# ---- GitHub's step summary ----


def test_a_summary_lists_what_did_not_pass_and_every_failure_in_full() -> None:
    fine = replace(mismatched(), outcome=Outcome.PASSED, findings=(), mismatch=None)
    text = summary_markdown([fine, mismatched()], 2.0)
    head, rows, block = text.split("\n\n")
    assert head == "### Presets: 2 cases: 1 passed, 1 failed in 2.0 s"
    assert len(rows.splitlines()) == 3
    assert rows.splitlines()[2].startswith(
        "| Qwen/Qwen3-8B | fp8 | tp1 | cpu | failed | --num-query-groups 4"
    )
    assert block == f"```\n{messages.failures_text([mismatched()])}\n```\n"


def test_what_a_preset_says_cannot_break_out_of_a_summary() -> None:
    finding = Finding("parse", Severity.ERROR, "no flag | <img> `x` [a](b)\n```\n# title")
    bad = replace(mismatched(), findings=(finding,), mismatch=None)
    text = summary_markdown([bad])
    (row,) = [line for line in text.splitlines() if line.startswith("| Qwen")]
    assert row.endswith(r"no flag \| \<img\> \`x\` \[a\](b) \`\`\` # title |")
    assert text.rstrip().endswith("````")


def test_a_summary_is_added_where_github_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    write_step_summary([mismatched()])
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    write_step_summary([mismatched()])
    assert summary.read_text() == "before\n" + summary_markdown([mismatched()])
