"""The command line: what each command prints, its exit codes, and how it ends when it is killed.

Most tests call ``main`` in this process with checks that need no torch; one runs the real thing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sessions import session, wait_until_empty

from harness import cli, pipeline, runner
from harness.case import Case, CaseReport, Outcome, StageReport
from harness.errors import ReportError, UsageError
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.recipes import recipes
from harness.report import read_report, to_json, write_report

ROOT = Path(__file__).parent.parent
HARNESS = (sys.executable, "-m", "harness")

Invoke = Callable[..., "Done"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two real presets, one of them with 10 query groups."""
    folder = tmp_path / "tree" / "Qwen"
    folder.mkdir(parents=True)
    for name in ("Qwen3-8B", "Qwen3-0.6B"):
        for suffix in (".sh", ".toml"):
            shutil.copy(ROOT / "presets" / "Qwen" / (name + suffix), folder)
    broken = folder / "Qwen3-8B.sh"
    text = broken.read_text()
    assert "--num-query-groups 8 " in text
    broken.write_text(text.replace("--num-query-groups 8 ", "--num-query-groups 10 "))
    return folder.parent


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Invoke]:
    """Run one command line in this process."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def invoke(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    yield invoke
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def fake(case: Case, **_: object) -> CaseReport:
    """0.6B passes, 8B fails, and int4_awq is the harness's own fault."""
    if case.recipe == "int4_awq":
        return CaseReport(case, Outcome.ERROR, 0.1, reason="the harness failed: KeyError: 'x'")
    if "8B" in case.preset:
        finding = Finding("build", Severity.ERROR, "weight is 3 x 4, expected 4 x 4", module="x")
        return CaseReport(case, Outcome.FAILED, 0.1, findings=(finding,))
    return CaseReport(
        case, Outcome.PASSED, 0.1, stages=(StageReport("quantize", Outcome.PASSED, 0.1, "fine"),)
    )


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Replace the workers by ``fake``; the cases that were asked for."""
    asked: list[Case] = []

    def run(
        cases: tuple[Case, ...], jobs: int, timeout: float | None, on_done: Callable[[CaseReport], None]
    ) -> list[CaseReport]:
        asked.extend(cases)
        reports = [fake(case) for case in cases]
        for report in reports:
            on_done(report)
        return reports

    monkeypatch.setattr(runner, "run_cases", run)
    monkeypatch.setattr(pipeline, "check", fake)
    return asked


# ---- list, show, lint, audit ----


def test_list_shows_each_preset_on_a_line(invoke: Invoke) -> None:
    done = invoke("list", "--presets", ROOT / "presets")
    assert done.code == 0
    assert done.out.splitlines()[0].split() == (
        "preset kind size parameters layers hidden heads experts reference".split()
    )
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()[1:]}
    assert rows["Qwen/Qwen3-8B"] == ["dense", "8.19B", "8,190,735,360", "36", "4096", "32:8", "-", "yes"]
    moe = ["moe", "30.5B", "30,532,122,624", "48", "2048", "32:4", "128:8", "yes"]
    assert rows["Qwen/Qwen3-30B-A3B"] == moe


def test_list_keeps_a_preset_that_cannot_be_read(invoke: Invoke, tree: Path) -> None:
    (tree / "Qwen" / "Empty.sh").write_text("")
    done = invoke("list", "--presets", tree, "--json", "-")
    assert "Qwen/Empty       unreadable" in done.err
    presets = {entry["preset"]: entry for entry in json.loads(done.out)["presets"]}
    assert presets["Qwen/Empty"] == {"preset": "Qwen/Empty", "kind": None, "reference": False}
    assert presets["Qwen/Qwen3-0.6B"]["num_query_groups"] == 8


def test_show_puts_full_beside_shrunken(invoke: Invoke) -> None:
    done = invoke("show", "qwen3-30b-a3b", "--presets", ROOT / "presets")
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert ["parameters", "30,532,122,624"] in [line[:2] for line in lines]
    assert ["--num-experts", "128"] in [line[:2] for line in lines]
    names = [line[0] for line in lines if line[1:2] == ["yes"]]
    assert names == [f"S{number}" for number in range(1, 13)]


def test_show_of_a_preset_without_a_plan_says_why(invoke: Invoke, tree: Path) -> None:
    done = invoke("show", "Qwen3-8B", "--presets", tree)
    assert done.code == 1
    assert "no shrink plan: " in done.out
    assert "32 heads / 10 groups is not whole" in done.out


def test_lint_names_file_and_line(invoke: Invoke, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    line = 1 + (tree / "Qwen" / "Qwen3-8B.sh").read_text().splitlines().index("    --num-query-groups 10 \\")
    done = invoke("lint", ".")
    assert done.code == 1
    expected = f"Qwen/Qwen3-8B.sh:{line}:5: error: --num-query-groups 10: 8 published (num_key_value_heads)"
    assert expected in done.out.splitlines()
    assert done.out.splitlines()[-1].startswith("2 presets: ")


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "qwen/qwen3-0.6b", "tree/Qwen/Qwen3-0.6B.sh"])
def test_lint_takes_names_and_paths(
    invoke: Invoke, tree: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.parent)
    done = invoke("lint", name, "--presets", "tree")
    assert (done.code, done.out) == (0, "1 preset: 0 errors, 0 warnings\n")


def test_lint_writes_the_same_document_as_check(invoke: Invoke, tree: Path, tmp_path: Path) -> None:
    invoke("lint", "--presets", tree, "--json", tmp_path / "lint.json")
    reports = read_report(tmp_path / "lint.json")
    assert [report.case.preset for report in reports] == ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"]
    assert [report.outcome for report in reports] == [Outcome.PASSED, Outcome.FAILED]


# ---- a tree as Megatron-LM's conf/ ----

OVERLAY = "HF_MODEL_CKPT=/workspace/scratch/Qwen/Qwen3-0.6B\nTP=8\nMLM_EXTRA_ARGS=' --init-method-std 0.01'\n"


@pytest.fixture
def conf(tree: Path) -> Path:
    """The tree with a script, an overlay, links, and older ways to write a preset."""
    shutil.copy(ROOT / "presets" / "Qwen" / "Qwen3-8B.sh", tree / "Qwen" / "Qwen3-8B.sh")
    (tree / "arguments.sh").write_text("#!/bin/bash\nset -e\nsource ${SANDBOX_ENV_SETUP}\n")
    (tree / "Qwen" / "qwen3_0.6b.sh").write_text(OVERLAY)
    (tree / "Qwen" / "Qwen3-8B-Base.sh").symlink_to("Qwen3-8B.sh")
    (tree / "qwen").symlink_to("Qwen")
    old = tree / "older" / "Array.sh"
    old.parent.mkdir()
    text = (tree / "Qwen" / "Qwen3-8B.sh").read_text()
    text = text.replace('MODEL_ARGS=" \\', "MODEL_ARGS=( \\").replace('\n"\n', "\n    --is-hybrid-model )\n")
    old.write_text(text + "MLM_EXTRA_ARGS=' --exit-duration-in-mins 230 --tensor-model-parallel-size 8'\n")
    return tree


NOT_CHECKED = {
    "arguments.sh": "a script: it sets no MODEL_ARGS, and in line 3 the command `source` is refused",
    "Qwen/qwen3_0.6b.sh": "an overlay: it sets HF_MODEL_CKPT, MLM_EXTRA_ARGS, TP and no MODEL_ARGS",
    "qwen": "a link to the folder Qwen, whose files are read there",
}


@pytest.mark.parametrize("command", ["list", "lint", "audit", "check"])
def test_every_file_of_a_tree_is_checked_or_listed(
    command: str, invoke: Invoke, conf: Path, faked: list[Case]
) -> None:
    done = invoke(command, "--presets", conf, "--json", "-")
    document = json.loads(done.out)
    listed = {str(Path(one["path"]).relative_to(conf)): one["reason"] for one in document["not_checked"]}
    assert set(listed) == set(NOT_CHECKED)
    for path, reason in NOT_CHECKED.items():
        assert listed[path].startswith(reason)
        assert f"{conf / path}: {reason}" in done.err
    checked = {entry["preset"] for entry in document.get("results", document.get("presets"))}
    assert checked == {
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-8B",
        "Qwen/Qwen3-8B-Base",
        "older/Array",
    }


def test_older_ways_to_write_a_preset_are_warnings(invoke: Invoke, conf: Path) -> None:
    done = invoke("lint", conf / "older" / "Array.sh")
    for words in (
        "warning: an array: Megatron-LM's scripts expand ${MODEL_ARGS}",
        "warning: --is-hybrid-model is deprecated: write --hybrid-layer-pattern",
        "warning: --exit-duration-in-mins belongs to a run and not to a model",
        "warning: --tensor-model-parallel-size is baked into a model preset",
    ):
        assert words in done.out
    assert (done.code, ": error:" in done.out) == (0, False)


@pytest.mark.parametrize("name", ["qwen3_0.6b", "Qwen/qwen3_0.6b.sh"])
def test_an_overlay_is_applied_where_it_is_named(invoke: Invoke, conf: Path, name: str) -> None:
    done = invoke("lint", name, "--presets", conf)
    assert done.code == 0
    assert "an overlay: read with" in done.out
    assert "TP: the overlay asks for tp8" in done.out
    assert "not checked" not in done.out


def test_a_broken_link_fails_and_nothing_is_a_traceback(invoke: Invoke, conf: Path) -> None:
    (conf / "Qwen" / "Gone.sh").symlink_to("nowhere.sh")
    (conf / "Qwen" / "Loop.sh").symlink_to("Loop.sh")
    (conf / "Qwen" / "up").symlink_to("..")
    done = invoke("lint", "--presets", conf)
    assert done.code == 1
    assert "Gone.sh is a link to nowhere.sh, which leads to no file" in done.out
    assert "Loop.sh is a link to Loop.sh, which leads to no file" in done.out
    assert "up: a link to the folder .., whose files are read there" in done.out
    assert "Traceback" not in done.out + done.err


def test_a_tree_of_overlays_alone_is_no_tree(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "over.sh").write_text("TP=8\n")
    done = invoke("lint", "--presets", tmp_path)
    assert done.code == 2
    assert f"no preset (*.sh) below {tmp_path}" in done.err
    assert "over.sh: an overlay: it sets TP and no MODEL_ARGS" in done.err


def test_audit_marks_what_does_not_fit_each_recipe(invoke: Invoke, tree: Path) -> None:
    small = tree / "Qwen" / "Qwen3-0.6B.sh"
    small.write_text(small.read_text().replace("--ffn-hidden-size 3072", "--ffn-hidden-size 3080"))
    done = invoke("audit", "Qwen3-0.6B", "--recipe", "fp8,nvfp4", "--presets", tree)
    head, *rows = (line.split() for line in done.out.splitlines()[1:6])
    assert head == ["preset", "layout", "parameters", "active", "bf16", "fp8", "nvfp4", "verdict"]
    assert [row[:2] for row in rows] == [["Qwen/Qwen3-0.6B", f"tp{tp}"] for tp in (1, 2, 4, 8)]
    assert rows[0][4:8] == ["1.11", "0.70", "*0.52", "nvfp4:"]
    assert "--ffn-hidden-size 3080 / 8 = 385, not a multiple of 16" in done.out
    assert done.code == 1


@pytest.mark.parametrize("command", [["list"], ["show", "Qwen3-8B"], ["lint"], ["audit"]], ids=" ".join)
def test_the_light_commands_import_neither_torch_nor_rich(command: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['harness', *{command!r}]\n"
        "from harness.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'megatron', 'modelopt', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("plain", [False, True], ids=["colour", "NO_COLOR"])
def test_a_terminal_gets_colour_unless_it_asks_for_none(
    invoke: Invoke, tree: Path, faked: list[Case], monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    done = invoke("check", "--presets", tree, "--recipe", "fp8", "--device", "cpu")
    assert ("\x1b[" in done.out) is not plain
    again = f"  again: harness check Qwen/Qwen3-8B --recipe fp8 --layout tp1 --device cpu --presets {tree}"
    assert again in [line.removeprefix("\x1b[2m").removesuffix("\x1b[0m") for line in done.out.splitlines()]


# ---- check ----


def test_check_runs_every_preset_by_the_default_recipes(
    invoke: Invoke, tree: Path, faked: list[Case]
) -> None:
    done = invoke("check", "--presets", tree, "--device", "cpu")
    assert [(case.preset, case.recipe, str(case.layout)) for case in faked] == [
        (preset, recipe, "tp1")
        for preset in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")
        for recipe in ("fp8", "nvfp4", "int4_awq", "parity")
    ]
    assert done.out.splitlines()[-1].startswith("8 cases: 3 passed, 3 failed, 2 error in ")
    assert done.err.splitlines()[0] == "[1/8] passed  Qwen/Qwen3-0.6B fp8 tp1 cpu  0.1 s"


@pytest.mark.parametrize(
    ("options", "recipes"),
    [
        (["--recipe", "nvfp4", "--recipe", "FP8_DEFAULT_CFG"], ["nvfp4", "fp8"]),
        (["--recipe", "nvfp4,fp8,nvfp4"], ["nvfp4", "fp8"]),
        (["--recipe", "all"], [recipe.name for recipe in recipes()]),
        (["--recipe", "Parity,fp8"], ["fp8", "parity"]),
        (["--recipe", "parity"], ["parity"]),
        (["--recipe", "parity", "--layout", "tp2"], ["parity"]),
    ],
    ids=["repeated", "commas", "all", "parity-too", "parity-alone", "parity-at-tp1"],
)
def test_recipes(
    invoke: Invoke, tree: Path, faked: list[Case], options: list[str], recipes: list[str]
) -> None:
    invoke("check", "Qwen3-0.6B", "--presets", tree, "--device", "cpu", *options)
    assert [case.recipe for case in faked] == recipes


@pytest.mark.parametrize(
    ("options", "prove"),
    [
        ([], ()),
        (["--prove", "weights", "--prove", "state"], ("state", "weights")),
        (["--prove", "state,backward,state"], ("state", "backward")),
        (["--prove", "all"], ("state", "weights", "backward", "export")),
    ],
    ids=["none", "repeated", "commas", "all"],
)
def test_what_is_to_be_proved(
    invoke: Invoke, tree: Path, faked: list[Case], options: list[str], prove: tuple[str, ...]
) -> None:
    invoke("check", "Qwen3-0.6B", "--presets", tree, "--device", "cpu", "--recipe", "fp8", *options)
    assert [case.prove for case in faked] == [prove]


def test_an_unknown_proof_is_wrong_usage(invoke: Invoke, tree: Path, faked: list[Case]) -> None:
    result = invoke("check", "Qwen3-0.6B", "--presets", tree, "--device", "cpu", "--prove", "it")
    assert (result.code, faked) == (2, [])
    assert "no proof is called 'it'; known: state, weights, backward, export, all" in result.err


def test_a_layout_that_cannot_be_run_is_refused_before_anything_starts(
    invoke: Invoke, tree: Path, faked: list[Case]
) -> None:
    options = ("--device", "cpu", "--recipe", "fp8", "--layout", "tp1", "--layout", "tp2,cp2")
    result = invoke("check", "Qwen3-0.6B", "--presets", tree, *options)
    assert result.code == 2
    assert "layout tp2,cp2 has cp2: context parallelism needs Transformer Engine's attention" in result.err
    assert faked == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["Qwen3-0.6B", "--recipe", "fp8"], 0),
        (["Qwen3-8B", "--recipe", "fp8"], 1),
        (["--recipe", "fp8"], 1),
        (["Qwen3-0.6B", "--recipe", "int4_awq"], 2),
        (["--recipe", "fp8,int4_awq"], 2),
    ],
    ids=["passed", "failed", "passed-and-failed", "error", "error-and-failed"],
)
def test_exit_codes(
    invoke: Invoke, tree: Path, faked: list[Case], arguments: list[str], code: int, tmp_path: Path
) -> None:
    done = invoke("check", *arguments, "--presets", tree, "--device", "cpu", "--json", tmp_path / "r.json")
    assert done.code == code
    assert [report.case for report in read_report(tmp_path / "r.json")] == faked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Qwen3-9B"], "no preset is called 'Qwen3-9B'; did you mean "),
        (["--recipe", "nvfp5"], "no recipe is called 'nvfp5'; did you mean nvfp4"),
        (["--layout", "tp"], "layout 'tp': 'tp' is not a size"),
        (["--device", "tpu"], "device 'tpu' is not auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:77"], "device cuda:77 is not on this machine"),
        (["--jobs", "0"], "--jobs '0' is neither auto nor a number of at least 1"),
        (["--timeout", "-1"], "--timeout -1 is less than no time"),
        (
            ["--json", "/nowhere/r.json"],
            "report /nowhere/r.json cannot be written: there is no directory /nowhere",
        ),
        (["--presets", "/nowhere"], "/nowhere is not a directory of presets"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    invoke: Invoke, tree: Path, faked: list[Case], arguments: list[str], message: str
) -> None:
    done = invoke("check", *(["--presets", str(tree)] if "--presets" not in arguments else []), *arguments)
    assert (done.code, done.out, faked) == (2, "", [])
    (line,) = done.err.splitlines()
    assert line.startswith(f"harness: {message}")


@pytest.mark.parametrize("command", ["list", "lint", "audit", "check"])
def test_no_presets_is_exit_code_2(invoke: Invoke, command: str, tmp_path: Path) -> None:
    done = invoke(command, "--presets", tmp_path)
    assert (done.code, done.err) == (2, f"harness: no preset (*.sh) below {tmp_path}\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("tp2,ep2",),
            "layout tp2,ep2 cannot be for Qwen/Qwen3-0.6B, nor for 1 others: Megatron: ep2",
        ),
        (("tp4,etp2",), "Megatron: etp2 needs experts, and the model has none"),
        (("tp1", "--layout", "pp64"), "28 layers cannot fill 64 pipeline stages"),
        (("tp2", "--ranks", "2"), "numbers below 2 for layout tp2"),
        (("tp2", "--ranks", "every"), "write first, all, real, or numbers"),
        (("tp512,pp64", "--ranks", "real"), "has 32768 ranks, and --ranks real runs at most"),
    ],
)
def test_a_layout_that_cannot_be_is_wrong_usage(
    invoke: Invoke, faked: list[Case], options: tuple[str, ...], said: str
) -> None:
    done = invoke("check", "Qwen3-0.6B", "Qwen3-8B", "--device", "cpu", "--layout", *options)
    assert done.code == 2
    assert said in done.err
    assert not faked


def test_a_layout_that_can_be_for_one_model_runs_for_all(invoke: Invoke, faked: list[Case]) -> None:
    names = ("Qwen3-0.6B", "Qwen3-30B-A3B")
    done = invoke("check", *names, "--layout", "ep2", "--recipe", "fp8", "--device", "cpu")
    assert done.code == 0
    assert len(faked) == 2


def test_a_report_that_cannot_be_written_in_the_end_is_exit_code_2(
    invoke: Invoke, tree: Path, faked: list[Case], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(path: Path, document: object) -> None:
        raise ReportError(f"report {path} cannot be written: No space left on device")

    monkeypatch.setattr("harness.report.write_report", full)
    options = ("--recipe", "fp8", "--presets", tree, "--device", "cpu", "--json", tmp_path / "r.json")
    done = invoke("check", "Qwen3-0.6B", *options)
    assert done.code == 2
    assert "1 case: 1 passed" in done.out
    assert done.err.splitlines()[-1].endswith("cannot be written: No space left on device")


def test_a_fault_of_the_harness_is_a_traceback_and_exit_code_2(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "lint", lambda file: 1 / 0)
    done = invoke("lint", "--presets", ROOT / "presets")
    assert done.code == 2
    assert "ZeroDivisionError" in done.err


def test_json_to_standard_output_is_nothing_but_json(invoke: Invoke, tree: Path, faked: list[Case]) -> None:
    done = invoke("check", "--presets", tree, "--recipe", "fp8", "--device", "cpu", "--json", "-")
    assert [result["outcome"] for result in json.loads(done.out)["results"]] == ["passed", "failed"]
    assert "2 cases: 1 passed, 1 failed" in done.err


# ---- repro ----


@pytest.fixture
def reported(tree: Path, tmp_path: Path) -> Path:
    """A report of both presets by two recipes, the two cases of 8B failed."""
    cases = [
        Case(f"Qwen/{name}", str(tree / "Qwen" / f"{name}.sh"), recipe, Layout(), "cpu")
        for name in ("Qwen3-0.6B", "Qwen3-8B")
        for recipe in ("fp8", "nvfp4")
    ]
    path = tmp_path / "report.json"
    write_report(path, to_json([fake(case) for case in cases], env={}))
    return path


def test_repro_runs_the_case_that_is_named(invoke: Invoke, reported: Path, faked: list[Case]) -> None:
    done = invoke("repro", reported, "8b nvfp4")
    assert done.code == 1
    assert "Qwen/Qwen3-8B  weight is 3 x 4, expected 4 x 4" in done.out
    assert "again: harness check Qwen/Qwen3-8B --recipe nvfp4 --layout tp1 --device cpu" in done.out


def test_repro_takes_the_only_failure_by_itself(
    invoke: Invoke, reported: Path, faked: list[Case], tmp_path: Path
) -> None:
    one = tmp_path / "one.json"
    write_report(one, to_json(read_report(reported)[:3], env={}))
    done = invoke("repro", one, "--json", "-")
    assert [result["recipe"] for result in json.loads(done.out)["results"]] == ["fp8"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Qwen/Qwen3-8B-fp8-tp1-cpu", "Qwen/Qwen3-8B-fp8-tp1-cpu"),
        ("qwen3-8b nvfp4", "Qwen/Qwen3-8B-nvfp4-tp1-cpu"),
        ("0.6b fp8", "Qwen/Qwen3-0.6B-fp8-tp1-cpu"),
    ],
)
def test_a_case_is_named_in_full_or_by_words(reported: Path, words: str, name: str) -> None:
    assert cli.choose_case(read_report(reported), words, reported).case.name == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (None, "2 cases of r.json failed; name one of them:\n  Qwen/Qwen3-8B-fp8-tp1-cpu\n"),
        ("8b", "2 cases of r.json match '8b'; name one of them:\n  Qwen/Qwen3-8B-fp8-tp1-cpu\n"),
        ("mxfp8", "no case of r.json matches 'mxfp8'"),
    ],
)
def test_an_ambiguous_case_lists_what_there_is(reported: Path, words: str | None, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        cli.choose_case(read_report(reported), words, Path("r.json"))
    assert str(raised.value).startswith(message)


def test_a_report_without_failures_has_nothing_to_repeat(reported: Path) -> None:
    with pytest.raises(UsageError, match=r"^no case of r.json failed$"):
        cli.choose_case(read_report(reported)[:2], None, Path("r.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--full-width", "--reduce"), "--full-width goes with --pdb alone"),
        (("--script", "no/such/folder/show.py"), "there is no directory no/such/folder"),
    ],
)
def test_what_repro_cannot_do_is_wrong_usage(
    invoke: Invoke, reported: Path, faked: list[Case], options: tuple[str, ...], message: str
) -> None:
    done = invoke("repro", reported, "8b nvfp4", *options)
    assert done.code == 2
    assert message in done.err


def test_repro_of_a_case_that_passes_now_has_nothing_to_reduce(
    invoke: Invoke, reported: Path, faked: list[Case]
) -> None:
    done = invoke("repro", reported, "0.6b fp8", "--reduce")
    assert done.code == 0
    assert "the case does not fail here: there is nothing to reduce" in done.out


def test_check_adds_to_the_summary_of_a_github_step(
    invoke: Invoke, tree: Path, tmp_path: Path, faked: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    invoke("check", "--presets", tree, "--recipe", "fp8", "--device", "cpu")
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("### Presets: 2 cases: 1 passed, 1 failed in ")
    assert "weight is 3 x 4, expected 4 x 4" in text


def test_repro_of_a_preset_that_is_elsewhere_says_so(invoke: Invoke, reported: Path, tmp_path: Path) -> None:
    (report, *_) = read_report(reported)
    moved = replace(report, case=replace(report.case, path="gone.sh"), outcome=Outcome.FAILED)
    write_report(tmp_path / "moved.json", to_json([moved], env={}))
    done = invoke("repro", tmp_path / "moved.json")
    assert done.code == 2
    assert "there is no file gone.sh here; run this where" in done.err


# ---- processes ----

DRIVER = """
import functools, time
from harness import cli, runner
from harness.case import CaseReport, Outcome

def check(case):
    if case.recipe != "fp8":
        time.sleep(600)
    return CaseReport(case, Outcome.PASSED, 0.0)

if __name__ == "__main__":
    runner.run_cases = functools.partial(runner.run_cases, check=check, preload=())
    cli.main()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process in a session of its own; whatever a failing test leaves of it is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str | Path) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if session(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def only_child(process: subprocess.Popen[str], signum: int) -> None:
    process.send_signal(signum)


def whole_group(process: subprocess.Popen[str], signum: int) -> None:
    """As a terminal does on Ctrl-C."""
    os.killpg(process.pid, signum)


@pytest.mark.parametrize(
    ("signum", "send", "code", "message"),
    [
        (
            signal.SIGINT,
            only_child,
            130,
            "harness: interrupted by SIGINT; {done} of 8 cases were done; {report} says which\n",
        ),
        (
            signal.SIGINT,
            whole_group,
            130,
            "harness: interrupted by SIGINT; {done} of 8 cases were done; {report} says which\n",
        ),
        (
            signal.SIGTERM,
            only_child,
            143,
            "harness: interrupted by SIGTERM; {done} of 8 cases were done; {report} says which\n",
        ),
        (signal.SIGKILL, only_child, -9, ""),
    ],
    ids=["SIGINT", "ctrl-c", "SIGTERM", "SIGKILL"],
)
def test_killed_half_way_nothing_is_left(
    tree: Path,
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
    signum: int,
    send: Callable[[subprocess.Popen[str], int], None],
    code: int,
    message: str,
) -> None:
    driver, folder = tmp_path / "drive.py", tmp_path / "reports"
    driver.write_text(DRIVER)
    folder.mkdir()
    options: list[str | Path] = [
        "--presets",
        tree,
        "--device",
        "cpu",
        "--jobs",
        "2",
        "--json",
        folder / "report.json",
    ]
    process = start(sys.executable, driver, "check", *options)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("[1/8] passed")
    assert len(session(process.pid)) >= 4  # this one, the fork server, two workers
    send(process, signum)
    _, err = process.communicate(timeout=20)
    assert wait_until_empty(process.pid) == []
    assert process.returncode == code
    said = "".join(line for line in err.splitlines(True) if not line.startswith("["))
    if code < 0:
        assert (said, os.listdir(folder)) == (message, [])
        return
    reports = read_report(folder / "report.json")
    done = [report.outcome for report in reports].count(Outcome.PASSED)
    assert done in (1, 2)  # one for each worker; the next case of each takes for ever
    assert said == message.format(done=done, report=folder / "report.json")
    reasons = {report.reason for report in reports if report.outcome is Outcome.SKIPPED}
    assert reasons == {f"interrupted by {signal.Signals(signum).name}"}
    assert len(reports) == 8


def test_killed_while_everything_is_imported_nothing_is_left(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start(*HARNESS, "check", "Qwen3-0.6B", "--device", "cpu")
    deadline = time.monotonic() + 20
    while len(session(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.kill()
    process.wait()
    assert wait_until_empty(process.pid) == []


@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
def test_a_reader_who_leaves_ends_nothing(
    start: Callable[..., subprocess.Popen[str]], tree: Path, tmp_path: Path, streams: tuple[str, ...]
) -> None:
    """As ``| head`` does: the report is written, and the exit code is that of the cases."""
    driver, report = tmp_path / "driver.py", tmp_path / "report.json"
    driver.write_text(DRIVER)
    options = ["--recipe", "fp8", "--device", "cpu", "--jobs", "1"]
    process = start(sys.executable, driver, "check", "--presets", tree, *options, "--json", report)
    for name in streams:
        getattr(process, name).close()
    assert process.wait(60) == 0
    assert [entry.outcome for entry in read_report(report)] == [Outcome.PASSED, Outcome.PASSED]


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "Mödel\\udcff.sh: warning"), ("ascii", "M\\xf6del\\udcff.sh: warning")]
)
def test_a_path_that_the_terminal_cannot_show(tree: Path, encoding: str, shown: str) -> None:
    odd = tree / "Org" / os.fsdecode("Mödel".encode() + b"\xff.sh")
    odd.parent.mkdir(exist_ok=True)
    odd.write_text((ROOT / "presets" / "Qwen" / "Qwen3-0.6B.sh").read_text())
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [*HARNESS, "lint", odd]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert shown in done.stdout.decode(encoding)


@pytest.mark.parametrize("command", [["list"], ["lint"], ["audit"]], ids=lambda command: command[0])
def test_a_reader_who_leaves_a_light_command(
    start: Callable[..., subprocess.Popen[str]], tree: Path, tmp_path: Path, command: list[str]
) -> None:
    report = tmp_path / "report.json"
    process = start(*HARNESS, *command, "--presets", tree, "--json", report)
    assert process.stdout is not None
    process.stdout.close()
    whole = subprocess.run([*HARNESS, *command, "--presets", tree], capture_output=True, cwd=ROOT)
    assert process.wait(60) == whole.returncode
    assert report.stat().st_size > 100


def test_the_real_thing_end_to_end(tree: Path, tmp_path: Path) -> None:
    """Megatron and ModelOpt in a worker: a right preset passes, a wrong one fails, and no noise."""
    report = tmp_path / "report.json"
    options: list[str | Path] = [
        "--presets",
        tree,
        "--recipe",
        "fp8",
        "--device",
        "cpu",
        "--jobs",
        "1",
        "--json",
        report,
    ]
    done = subprocess.run([*HARNESS, "check", *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    good, bad = read_report(report)
    assert (good.outcome, bad.outcome) == (Outcome.PASSED, Outcome.FAILED)
    assert {stage.outcome for stage in good.stages} == {Outcome.PASSED}
    assert good.shrink is not None
    assert good.stand_ins
    assert "--num-query-groups 10 (" in done.stdout
    assert "stand-ins on this machine" in done.stdout
    assert all(line.startswith("[") for line in done.stderr.splitlines())
