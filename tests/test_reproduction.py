"""One failed case of every kind: its report names the flag, and repro, --reduce and --script act on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from broken import TREE, edit
from programs import alone

from harness import messages
from harness.case import PARITY, Case, CaseReport, Outcome
from harness.errors import UsageError
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.pipeline import check
from harness.reproduction import reduction, rerun
from harness.reproduction.changes import differences
from harness.reproduction.script import script_text, write_script
from harness.reproduction.subject import subject_of
from harness.reproduction.witness import Debugger, Witness

# A recipe of one's own with a mistake: Megatron calls these modules otherwise.
MISSPELT = """
metadata:
  recipe_type: ptq
quantize:
  algorithm: max
  quant_cfg:
    - quantizer_name: "*"
      enable: false
    - quantizer_name: "*linear_fc9.weight_quantizer"
      cfg: {num_bits: e4m3}
    - quantizer_name: "*linear_fc1.weight_quantizer"
      cfg: {num_bits: e4m3}
"""


@dataclass(frozen=True)
class Broken:
    """Edits of a preset; the stage that fails last, the flags to change, and how the program ends."""

    preset: str
    edits: tuple[tuple[str, str | None], ...]
    stage: str
    flags: tuple[str, ...]
    ending: str
    recipe: str = "fp8"
    layout: str = "tp1"


BROKEN = {
    "a flag that is none": Broken(
        "Qwen/Qwen3-8B",
        (("--qk-layernorm", None), ("--qk-layernorms", "")),
        "audit",
        ("--qk-layernorm", "--qk-layernorms"),
        "AssertionError: decoder.layers.0.self_attention.q_layernorm.weight is None, (128,) published",
    ),
    "a flag that is none and changes nothing": Broken(
        "Qwen/Qwen3-8B",
        (("--num-query-groop", "8"),),
        "parse",
        ("--num-query-groop",),
        "error: unrecognized arguments: --num-query-groop 8",
    ),
    "too few query groups": Broken(
        "Qwen/Qwen3-8B",
        (("--num-query-groups", "4"),),
        "audit",
        ("--num-query-groups",),
        "AssertionError: decoder.layers.0.self_attention.linear_qkv.weight is (5120, 4096), "
        "(6144, 4096) published",
    ),
    "groups that do not divide the heads": Broken(
        "Qwen/Qwen3-8B",
        (("--num-query-groups", "10"),),
        "audit",
        ("--num-query-groups",),
        "AssertionError: --num-query-groups is 10, 8 published",
    ),
    "a value without a shape": Broken(
        "Qwen/Qwen3-8B",
        (("--norm-epsilon", None),),
        "reference",
        ("--norm-epsilon",),
        "AssertionError: --norm-epsilon is 1e-05, 1e-06 published",
    ),
    "a latent rank": Broken(
        "deepseek-ai/DeepSeek-V2-Lite",
        (("--kv-lora-rank", "500"),),
        "audit",
        ("--kv-lora-rank",),
        "AssertionError: decoder.layers.0.self_attention.linear_kv_down_proj.weight is (564, 2048), "
        "(576, 2048) published",
        "nvfp4",
    ),
    "experts": Broken(
        "Qwen/Qwen3-30B-A3B",
        (("--num-experts", "127"),),
        "audit",
        ("--num-experts",),
        "AssertionError: decoder.layers.0.mlp.router.weight is (127, 2048), (128, 2048) published",
    ),
    "a Mamba head": Broken(
        "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
        (("--mamba-head-dim", "64"),),
        "audit",
        ("--mamba-head-dim",),
        "AssertionError: decoder.layers.0.mixer.in_proj.weight is (18560, 4480), (22656, 4480) published",
    ),
    "a vocabulary that ranks cannot split": Broken(
        "Qwen/Qwen3-8B",
        (("--padded-vocab-size", "151935"),),
        "audit",
        ("--padded-vocab-size",),
        "AssertionError: 151935 is not divisible by 2",
        layout="tp2",
    ),
    "what Megatron raises in a pass": Broken(
        "Qwen/Qwen3-8B",
        (("--kv-channels", "129"), ("--norm-epsilon", None)),
        "forward",
        ("--kv-channels", "--norm-epsilon"),
        "RuntimeError: The size of tensor a (129) must match the size of tensor b (130) at non-singleton "
        "dimension 3",
    ),
    "numbers that no shape shows": Broken(
        "Qwen/Qwen3-8B",
        (("--rotary-interleaved", ""),),
        "parity",
        ("--rotary-interleaved",),
        "AssertionError: the logits differ by ",
        PARITY,
    ),
}


def case_of(folder: Path, preset: str, edits: tuple[tuple[str, str | None], ...] = (), **more: str) -> Case:
    source, path = TREE / f"{preset}.sh", folder / f"{preset}.sh"
    text = source.read_text()
    for flag, value in edits:
        text = edit(text, flag, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    shutil.copy(source.with_suffix(".toml"), path.parent)
    recipe, layout = more.get("recipe", "fp8"), Layout.parse(more.get("layout", "tp1"))
    return Case(preset, str(path), recipe, layout, "cpu", str(folder))


def report_of(folder: Path, broken: Broken) -> CaseReport:
    more = {"recipe": broken.recipe, "layout": broken.layout}
    return check(case_of(folder, broken.preset, broken.edits, **more))


# ---- every kind of failure ----


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_failure_names_its_flag_is_reduced_to_it_and_becomes_a_program(
    broken: Broken, tmp_path: Path
) -> None:
    report = report_of(tmp_path, broken)
    failed = [stage.name for stage in report.stages if stage.outcome is Outcome.FAILED]
    assert failed[-1] == broken.stage
    text = messages.failure_text(report)
    assert all(flag in text for flag in broken.flags)
    reduced = reduction.reduce(report)
    assert reduced.found is not None
    assert sorted(change.flag for change in reduced.found) == sorted(broken.flags)
    write_script(report, tmp_path / "show.py")
    assert "harness" not in (tmp_path / "show.py").read_text().replace("preset-harness", "")
    done = alone(tmp_path / "show.py")
    # Megatron's own parser ends a program with 2.
    assert done.returncode == (2 if broken.stage == "parse" else 1)
    assert broken.ending in done.stderr


# ---- what was raised elsewhere than in a preset ----


def test_a_recipe_of_ones_own_that_fits_nothing_becomes_a_program(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(MISSPELT)
    report = check(case_of(tmp_path, "Qwen/Qwen3-0.6B", recipe=str(recipe)))
    assert report.outcome is Outcome.FAILED, report
    write_script(report, tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert "AssertionError: *linear_fc9.weight_quantizer matches no quantizer" in done.stderr
    # The flags are as published: nothing to change back, and that is said.
    assert "no flag differs from Qwen3-0.6B.toml" in reduction.reduction_text(reduction.reduce(report))


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> CaseReport:
    return check(case_of(tmp_path_factory.mktemp("presets"), "Qwen/Qwen3-0.6B"))


def failing(report: CaseReport, stage: str, finding: Finding) -> CaseReport:
    """A report as if ``finding`` had been made of it."""
    stages = tuple(
        replace(one, outcome=Outcome.FAILED) if one.name == stage else one for one in report.stages
    )
    return replace(report, outcome=Outcome.FAILED, stages=stages, findings=(finding,))


QKV = "decoder.layers.0.self_attention.linear_qkv"


@pytest.mark.parametrize(
    ("stage", "message", "expected", "ending"),
    [
        (
            "build",
            "layers.0.self_attention.linear_qkv  weight is 3 x 4, expected 5 x 6",
            [5, 6],
            "(5, 6) expected",
        ),
        (
            "forward",
            "layers.0.self_attention.linear_qkv  output is 3 x 4, expected 5 x 6",
            [5, 6],
            f"{QKV} output",
        ),
        (
            "quantize",
            "layers.0.self_attention.linear_qkv  weight_quantizer is on, fp8 means it off",
            "off",
            f"{QKV}.weight_quantizer is enabled: [True]",
        ),
    ],
)
def test_what_the_harness_found_is_asserted_on_the_same_model(
    passed: CaseReport, stage: str, message: str, expected: object, ending: str, tmp_path: Path
) -> None:
    finding = Finding(
        stage, Severity.ERROR, message, module=QKV, expected=expected, actual=None, check="coverage"
    )
    write_script(failing(passed, stage, finding), tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
    assert ending in done.stderr


def test_the_program_of_a_case_that_died_goes_through_every_stage(passed: CaseReport, tmp_path: Path) -> None:
    died = replace(passed, outcome=Outcome.ERROR, reason="the worker was killed by SIGSEGV", stages=())
    write_script(died, tmp_path / "show.py")
    done = alone(tmp_path / "show.py", fresh=True)
    assert done.returncode == 0, done.stderr


def test_the_program_of_a_right_preset_finds_no_difference(tmp_path: Path) -> None:
    """What the programs of wrong ones show is the preset's fault, and not the program's."""
    report = check(case_of(tmp_path, "Qwen/Qwen3-8B", recipe=PARITY))
    assert report.outcome is Outcome.PASSED
    finding = Finding("parity", Severity.ERROR, "made up")
    (tmp_path / "show.py").write_text(script_text(subject_of(failing(report, "parity", finding))))
    done = alone(tmp_path / "show.py")
    assert done.returncode == 0, done.stderr


def test_a_limit_of_modelopts_becomes_a_program_for_those_who_own_it(tmp_path: Path) -> None:
    report = check(case_of(tmp_path, "Qwen/Qwen3-0.6B", recipe="nvfp4_svdquant"))
    assert report.outcome is Outcome.UNSUPPORTED
    assert "can only concatenate tuple" in report.reason
    write_script(report, tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert 'TypeError: can only concatenate tuple (not "Tensor") to tuple' in done.stderr


def test_what_no_program_can_show_says_so(passed: CaseReport, tmp_path: Path) -> None:
    finding = Finding("quantize", Severity.ERROR, "no rule of this package has such words", check="blocks")
    with pytest.raises(UsageError, match="no program shows this"):
        write_script(failing(passed, "quantize", finding), tmp_path / "show.py")


# ---- reduction ----


def test_of_many_flags_that_differ_only_those_at_fault_remain(tmp_path: Path) -> None:
    edits = (("--kv-channels", "129"), ("--attention-dropout", "0.1"), ("--max-position-embeddings", "8192"))
    report = check(case_of(tmp_path, "Qwen/Qwen3-8B", edits))
    reduced = reduction.reduce(report)
    assert len(reduced.differences.changes) >= 3
    line = (tmp_path / "Qwen" / "Qwen3-8B.sh").read_text().splitlines().index("    --kv-channels 129 \\") + 1
    text = reduction.reduction_text(reduced)
    assert f"--kv-channels 129 ({tmp_path}/Qwen/Qwen3-8B.sh:{line}) back to 128 (head_dim)" in text
    assert "the smallest set that makes the case pass, 1 of" in text


def test_what_a_stage_needs_is_told_from_what_the_case_needs(tmp_path: Path) -> None:
    broken = BROKEN["what Megatron raises in a pass"]
    text = reduction.reduction_text(reduction.reduce(report_of(tmp_path, broken)))
    _, after = text.split("forward passes with no more than:\n")
    assert "--kv-channels" in after
    assert "--norm-epsilon" not in after


def test_without_a_reference_it_says_so(tmp_path: Path) -> None:
    case = case_of(tmp_path, "Qwen/Qwen3-8B", (("--kv-channels", "129"),))
    own = replace(case, preset="Mine/Own", path=str(tmp_path / "Mine" / "Own.sh"))
    Path(own.path).parent.mkdir()
    shutil.copy(case.path, own.path)
    text = reduction.reduction_text(reduction.reduce(check(own)))
    assert text.startswith("reduce: there is no reference")


def test_the_catalogues_preset_is_a_reference_where_nothing_is_published(tmp_path: Path) -> None:
    case = case_of(tmp_path, "Qwen/Qwen3-8B", (("--kv-channels", "129"),))
    own = replace(case, path=str(tmp_path / "Mine" / "Own.sh"))
    Path(own.path).parent.mkdir()
    shutil.copy(case.path, own.path)
    reduced = reduction.reduce(check(own))
    assert reduced.found is not None
    assert [change.flag for change in reduced.found] == ["--kv-channels"]
    assert reduced.found[0].source.endswith("presets/Qwen/Qwen3-8B.sh")


@pytest.mark.parametrize("every", [6, 9, 23])
@pytest.mark.parametrize("wanted", [{2}, {0, 5}, {1, 3, 4}])
def test_the_smallest_set_is_found_among_any_number(every: int, wanted: set[int]) -> None:
    found = reduction._smallest(tuple(range(every)), lambda chosen: wanted <= set(chosen))
    assert set(found) == wanted


def test_a_preset_written_anew_has_the_words_of_the_old(tmp_path: Path) -> None:
    for preset in sorted(TREE.rglob("*.sh")):
        case = Case(f"{preset.parent.name}/{preset.stem}", str(preset), "fp8", Layout(), "cpu")
        known = differences(case)
        copy = tmp_path / "copy.sh"
        copy.write_text(reduction.preset_text(known.with_changes(())))
        again = differences(replace(case, path=str(copy)))
        assert [word.text for word in again.words] == [word.text for word in known.words]


# ---- in this process ----


def test_the_trace_shows_every_module_and_where_the_pass_stopped(tmp_path: Path) -> None:
    report = report_of(tmp_path, BROKEN["what Megatron raises in a pass"])
    again, text = rerun.again(report, rerun.Wanted(), None)
    assert again.findings == report.findings
    assert "decoder.layers.0.self_attention.linear_qkv   out   24 x 3 x 6192" in text
    assert "raised inside decoder.layers.0.self_attention" in text


def test_the_trace_has_expected_beside_actual(passed: CaseReport, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import rank_model

    original = rank_model.activations

    def wrong(*args: object, **more: object) -> object:
        shapes = original(*args, **more)  # type: ignore[arg-type]
        other = replace(shapes[QKV], outputs=((1, 2, 3),))
        return {**shapes, QKV: other}

    monkeypatch.setattr(rank_model, "activations", wrong)
    _, text = rerun.again(passed, rerun.Wanted(), None)
    (line,) = [line for line in text.splitlines() if QKV in line and " out " in line]
    assert line.endswith("<-- expected 1 x 2 x 3")


def debugged(report: CaseReport, commands: str, stage: str = "") -> str:
    stdout = StringIO()
    check(report.case, watch=Debugger(stage, StringIO(commands), stdout))
    return stdout.getvalue()


def test_the_debugger_opens_at_the_exception(tmp_path: Path) -> None:
    report = report_of(tmp_path, BROKEN["what Megatron raises in a pass"])
    said = debugged(report, "p tuple(t.shape)\nq\n", "forward")
    assert "forward raised RuntimeError: The size of tensor a (129)" in said
    assert "_apply_rotary_pos_emb_bshd" in said
    assert "(24, 3, 32, 129)" in said


def test_the_debugger_opens_at_the_end_of_a_stage_with_the_model_at_hand(
    passed: CaseReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness import rank_model

    original: Callable[..., dict[str, tuple[int, ...]]] = rank_model.rank_parameters
    monkeypatch.setattr(
        rank_model, "rank_parameters", lambda *a: original(*a) | {"decoder.extra.weight": (2, 3)}
    )
    said = debugged(passed, "p type(model).__name__\nq\n", "build")
    assert "build: extra  weight is missing, expected 2 x 3" in said
    assert "'GPTModel'" in said


def test_quitting_the_debugger_runs_to_the_end(tmp_path: Path) -> None:
    report = report_of(tmp_path, BROKEN["what Megatron raises in a pass"])
    said = debugged(report, "q\n")
    assert said.count("(Pdb)") == 1


def test_what_modelopt_was_running_when_it_raised_is_traced(
    passed: CaseReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt.torch.quantization.nn import TensorQuantizer

    original = TensorQuantizer.forward

    def refuse(quantizer: TensorQuantizer, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.dim() == 3:
            raise RuntimeError("no more")
        return original(quantizer, inputs)

    monkeypatch.setattr(TensorQuantizer, "forward", refuse)
    witness = Witness()
    report = check(passed.case, watch=witness)
    # The same is raised whatever the sizes, so no preset is at fault.
    assert report.outcome is Outcome.UNSUPPORTED
    assert [seen.stage for seen in witness.passes] == ["forward", "quantize"]
    assert witness.passes[-1].trace.stopped_in == QKV


# ---- full width ----


def test_full_width_keeps_the_real_sizes_in_the_layers_of_the_plan(passed: CaseReport) -> None:
    report = check(passed.case, full_width=True)
    assert report.outcome is Outcome.PASSED
    assert report.shrink is not None
    before, after = report.shrink.before, report.shrink.after
    assert after["hidden_size"] == before["hidden_size"] == 1024
    assert passed.shrink is not None
    assert after["num_layers"] == passed.shrink.after["num_layers"]
    assert "of 28 layers at full width need" in next(s.detail for s in report.stages if s.name == "shrink")


def test_what_does_not_fit_is_refused_with_its_bytes(
    passed: CaseReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.reproduction.full_width.free_memory", lambda: 1 << 30)
    with pytest.raises(
        UsageError, match=r"--full-width: \d of 28 layers at full width need .* GiB, and 1\.0 GiB"
    ):
        check(passed.case, full_width=True)


def test_parity_has_no_full_width(passed: CaseReport) -> None:
    with pytest.raises(UsageError, match="--full-width: parity compares models of the plan's sizes"):
        check(replace(passed.case, recipe=PARITY), full_width=True)
