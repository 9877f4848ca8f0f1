"""Preset files as test files, by runs of pytest in a process of its own.

``conftest.py`` of each run puts a check in place that needs no torch and does what the preset and recipe say.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.devices import worker_shares
from harness.pytest_plugin import is_preset

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent

CONFTEST = """
import os, sys, time
from harness import host, pipeline, pytest_workers
from harness.case import CaseReport, Outcome, StandInReport
from harness.finding import Finding, Severity

GROUPS = Finding("reference", Severity.ERROR, "--num-query-groups 10: 8 published", "--num-query-groups", 22)
PADDED = Finding("audit", Severity.WARNING, "linear_fc2 takes 896 inputs", "--ffn-hidden-size", 18)
NORM = StandInReport("TE RMSNorm", "torch", "Transformer Engine is not installed.")

def check(case):
    if "Hang" in case.preset:
        time.sleep(60)
    if case.recipe == "int4_awq":
        return CaseReport(case, Outcome.SKIPPED, 0.0, reason="no kernel for it here")
    if case.recipe == "mxfp8":
        return CaseReport(case, Outcome.UNSUPPORTED, 0.0, reason=f"ModelOpt: no {','.join(case.prove)}")
    if case.recipe == "int8_smoothquant":
        return CaseReport(case, Outcome.ERROR, 0.0, reason="the harness failed: KeyError: 'x'")
    if case.recipe == "w4a8_awq_beta":
        raise LookupError(os.environ["OMP_NUM_THREADS"])
    if "8B" in case.preset:
        found, log = (GROUPS, PADDED), "a word of Megatron"
        return CaseReport(case, Outcome.FAILED, 0.1, findings=found, stand_ins=(NORM,), log=log)
    return CaseReport(case, Outcome.PASSED, 0.1, findings=(PADDED,), stand_ins=(NORM,))

pipeline.check, pytest_workers.PRELOAD = check, ()
host.free_memory = lambda: 16 << 30  # whatever else this machine does

def pytest_sessionfinish(session):
    assert "torch" not in sys.modules, "torch was imported"
"""


# A machine with two GPUs, and a check that says what a child was given.
SHARED = """
from harness import devices, pytest_plugin
from harness.devices import Share

PLAN = [Share(3, 4 << 30, "GPU-aa", 0.5), Share(4, 4 << 30, "GPU-bb", 0.5)]

def given(case):
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", devices.FRACTION)
    raise KeyError(" ".join([case.device, *(os.environ[name].rstrip("0") for name in names)]))

pipeline.check = given
pytest_plugin.worker_shares = lambda *words: PLAN
pytest_plugin.resolve_device = lambda text: "cuda:0" if text != "cpu" else "cpu"
"""


@pytest.fixture
def tree(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """``presets/Qwen`` with two presets, a script beside them, and the check."""
    # What other plugins take to import is most of a run of this size.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest(CONFTEST)
    for name in ("presets/Qwen/Qwen3-8B.sh", "presets/Qwen/Qwen3-0.6B.sh", "scripts/build.sh"):
        path = pytester.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("MODEL_ARGS=' --num-layers 2'\n" if "presets" in name else "make\n")
    return pytester


def run(tree: pytest.Pytester, *arguments: str | Path, device: str = "cpu") -> pytest.RunResult:
    plugins = ["-p", "harness.pytest_plugin", "-p", "no:cacheprovider"]
    if "-n" in arguments:
        plugins += ["-p", "xdist"]
    return tree.runpytest_subprocess(*plugins, "--device", device, *arguments)


def ids(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if "::" in line and " " not in line]


# ---- collection ----


def test_a_preset_has_one_item_per_recipe(tree: pytest.Pytester) -> None:
    result = run(tree, "presets", "--collect-only", "-q")
    assert ids(result) == [
        f"presets/Qwen/{preset}.sh::{recipe}"
        for preset in ("Qwen3-0.6B", "Qwen3-8B")
        for recipe in ("fp8", "nvfp4", "int4_awq", "parity")
    ]


def test_with_several_layouts_an_item_names_its_own(tree: pytest.Pytester) -> None:
    options = ("--recipe", "fp8,parity", "--layout", "tp1", "--layout", "tp2,ep4")
    result = run(tree, "presets/Qwen/Qwen3-8B.sh", "--collect-only", "-q", *options)
    assert ids(result) == [
        "presets/Qwen/Qwen3-8B.sh::fp8-tp1",
        "presets/Qwen/Qwen3-8B.sh::fp8-tp2,ep4",
        "presets/Qwen/Qwen3-8B.sh::parity",
    ]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("Qwen3 and nvfp4", ["Qwen3-0.6B.sh::nvfp4", "Qwen3-8B.sh::nvfp4"]),
        ("8B and not nvfp4", ["Qwen3-8B.sh::fp8", "Qwen3-8B.sh::int4_awq", "Qwen3-8B.sh::parity"]),
        ("8B and parity", ["Qwen3-8B.sh::parity"]),
        ("qwen3-8b and tp1 and fp8", ["Qwen3-8B.sh::fp8"]),
    ],
)
def test_k_takes_words_of_preset_recipe_and_layout(
    tree: pytest.Pytester, expression: str, expected: list[str]
) -> None:
    result = run(tree, "presets", "--collect-only", "-q", "-k", expression)
    assert [line.removeprefix("presets/Qwen/") for line in ids(result)] == expected


def test_one_case_by_its_id(tree: pytest.Pytester) -> None:
    result = run(tree, "presets/Qwen/Qwen3-0.6B.sh::nvfp4")
    result.assert_outcomes(passed=1)


def test_scripts_are_no_presets_unless_named(tree: pytest.Pytester) -> None:
    everywhere = run(tree, "--collect-only", "-q", "--recipe", "fp8")
    assert ids(everywhere) == ["presets/Qwen/Qwen3-0.6B.sh::fp8", "presets/Qwen/Qwen3-8B.sh::fp8"]
    here = run(tree, ".", "--collect-only", "-q", "--recipe", "fp8")
    assert ids(here) == ids(everywhere)
    named = run(tree, "scripts/build.sh", "--collect-only", "-q", "--recipe", "fp8")
    assert ids(named) == ["scripts/build.sh::fp8"]


def test_what_is_a_preset(tmp_path: Path) -> None:
    script, preset = tmp_path / "build.sh", tmp_path / "model.sh"
    script.write_text("make\n")
    preset.write_text("MODEL_ARGS=''\n")
    assert not is_preset(preset, [])
    assert is_preset(script, [script])
    assert is_preset(preset, [tmp_path])
    assert not is_preset(script, [tmp_path])
    assert is_preset(Path("/x/presets/Org/model.sh"), [])
    assert not is_preset(Path("/x/presets/Org/model.toml"), [])


def conf(root: Path) -> Path:
    """A tree as Megatron-LM's conf/: a preset, a link to it, an overlay, a script, links to folders."""
    (root / "Org").mkdir(parents=True)
    (root / "Org" / "One.sh").write_text("MODEL_ARGS=' --num-layers 2'\n")
    (root / "Org" / "Two.sh").symlink_to("One.sh")
    (root / "Org" / "one_export.sh").write_text("HF_MODEL_CKPT=/x/Org/One\nPP=16\n")
    (root / "arguments.sh").write_text("source conf/$1.sh\n")
    (root / "org").symlink_to("Org")
    (root / "Org" / "up").symlink_to("..")
    return root


@pytest.mark.parametrize("folder", ["conf", "presets/more"])
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one", "xdist"])
def test_what_is_no_preset_of_a_tree_is_listed(
    tree: pytest.Pytester, folder: str, workers: tuple[str, ...]
) -> None:
    root = conf(tree.path / folder)
    result = run(tree, root, "--recipe", "fp8", *workers)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*= not checked =*"])
    for words in (
        f"  {folder}/Org/one_export.sh: an overlay: it sets HF_MODEL_CKPT, PP and no MODEL_ARGS",
        f"  {folder}/arguments.sh: a script: it sets no MODEL_ARGS",
        f"  {folder}/Org/up: a link to the folder .., whose files are read there",
        f"  {folder}/org: a link to the folder Org, whose files are read there",
    ):
        assert [line for line in result.outlines if line.startswith(words)], words


def test_an_overlay_is_a_test_file_where_it_is_named(tree: pytest.Pytester) -> None:
    root = conf(tree.path / "conf")
    result = run(tree, root / "Org" / "one_export.sh", "--collect-only", "-q", "--recipe", "fp8")
    assert ids(result) == ["conf/Org/one_export.sh::fp8"]


def test_a_folder_of_overlays_alone_is_never_a_pass(tree: pytest.Pytester) -> None:
    for folder, code in (
        ("over", pytest.ExitCode.NO_TESTS_COLLECTED),
        ("presets/over", pytest.ExitCode.USAGE_ERROR),
    ):
        (tree.path / folder).mkdir(parents=True)
        (tree.path / folder / "over.sh").write_text("TP=8\n")
        assert run(tree, folder).ret == code


def test_a_tree_elsewhere_needs_only_the_plugin(tree: pytest.Pytester, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere" / "models"
    outside.mkdir(parents=True)
    shutil.copy(tree.path / "presets" / "Qwen" / "Qwen3-8B.sh", outside / "Own-8B.sh")
    shutil.copy(tree.path / "conftest.py", outside)
    result = run(tree, outside.parent, "--recipe", "fp8")
    result.assert_outcomes(failed=1)
    again = f"  again: harness check models/Own-8B --recipe fp8 --layout tp1 --device cpu --presets {outside}"
    assert again in result.outlines


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one", "xdist"])
def test_a_preset_folder_without_presets_is_wrong_usage(
    tree: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    tree.makepyfile(test_other="def test_other(): pass")
    (tree.path / "presets" / "Empty").mkdir()
    result = run(tree, "test_other.py", "presets/Empty", *workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"no preset (*.sh) below {tree.path / 'presets' / 'Empty'}" in result.stderr.str()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["scripts"], pytest.ExitCode.NO_TESTS_COLLECTED), (["none.sh"], pytest.ExitCode.USAGE_ERROR)],
    ids=["no-preset-in-it", "no-such-file"],
)
def test_nothing_to_run_is_never_a_pass(
    tree: pytest.Pytester, arguments: list[str], code: pytest.ExitCode
) -> None:
    assert run(tree, *arguments).ret == code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "nvfp5"], "no recipe is called 'nvfp5'; did you mean nvfp4"),
        (["--layout", "tp"], "layout 'tp': 'tp' is not a size"),
        (["--layout", "cp2"], "context parallelism needs Transformer Engine's attention"),
        (["--layout", "tp2", "--ranks", "5"], "numbers below 2 for layout tp2"),
        (
            ["--prove", "nothing"],
            "no proof is called 'nothing'; known: state, weights, backward, export, all",
        ),
        (["--device", "cuda:77"], "device cuda:77 is not on this machine"),
    ],
    ids=["recipe", "layout", "layout that cannot be run", "ranks", "prove", "device"],
)
def test_wrong_options_are_wrong_usage(tree: pytest.Pytester, options: list[str], message: str) -> None:
    result = run(tree, "presets", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str()


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one", "xdist"])
def test_a_layout_that_cannot_be_is_wrong_usage(tree: pytest.Pytester, workers: tuple[str, ...]) -> None:
    own = Path(__file__).parent.parent / "presets" / "Qwen" / "Qwen3-0.6B.sh"
    preset = tree.path / "presets" / "Qwen" / "Qwen3-0.6B.sh"
    preset.write_text(own.read_text())
    result = run(tree, preset, "--layout", "ep2", *workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "ep2 needs experts, and the model has none" in result.stderr.str()


# ---- running ----


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one", "xdist"])
def test_outcomes_messages_and_the_summary(tree: pytest.Pytester, workers: tuple[str, ...]) -> None:
    result = run(tree, "presets", "-rs", "--recipe", "fp8,nvfp4,int4_awq", *workers)
    result.assert_outcomes(passed=2, failed=2, skipped=2)
    text = result.outlines
    starts = [number for number, line in enumerate(text) if line == "Qwen/Qwen3-8B  failed in reference"]
    for start, recipe in zip(starts, ["fp8", "nvfp4"] if not workers else [None, None], strict=True):
        place, again = text[start + 1 : start + 3]
        assert place == "  --num-query-groups 10 (presets/Qwen/Qwen3-8B.sh:22): 8 published"
        assert again.startswith(f"  again: harness check Qwen/Qwen3-8B --recipe {recipe or ''}")
    assert "a word of Megatron" in text
    result.stdout.fnmatch_lines(["SKIPPED * presets/Qwen/Qwen3-8B.sh*: no kernel for it here"])
    for preset in ("Qwen3-0.6B", "Qwen3-8B"):
        warning = f"(presets/Qwen/{preset}.sh:18): linear_fc2 takes 896 inputs"
        assert text.count(f"Qwen/{preset}  --ffn-hidden-size {warning}") == 1
    assert text.count("TE RMSNorm: torch. Transformer Engine is not installed.") == 1
    result.stdout.fnmatch_lines(["*= warnings in presets =*", "*= stand-ins on this machine =*"])


def test_what_is_unsupported_is_a_skip_that_says_so(tree: pytest.Pytester) -> None:
    options = ("--recipe", "mxfp8,fp8", "--prove", "weights,state")
    result = run(tree, "presets/Qwen/Qwen3-0.6B.sh", "-rs", *options)
    result.assert_outcomes(passed=1, skipped=1)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["SKIPPED * unsupported: ModelOpt: no state,weights"])


def test_a_fault_of_the_harness_fails_the_case(tree: pytest.Pytester) -> None:
    result = run(tree, "presets/Qwen/Qwen3-0.6B.sh", "--recipe", "int8_smoothquant")
    result.assert_outcomes(failed=1)
    assert "Qwen/Qwen3-0.6B  the harness failed: KeyError: 'x'" in result.outlines


@pytest.mark.parametrize("more", [(), ("--in-process",)], ids=["child", "in process"])
def test_a_case_beyond_its_time_fails_and_the_next_runs(tree: pytest.Pytester, more: tuple[str, ...]) -> None:
    (tree.path / "presets" / "Qwen" / "Hang.sh").write_text("")
    result = run(tree, "presets", "-k", "Hang or 0.6B", "--recipe", "fp8", "--case-timeout", "0.5", *more)
    result.assert_outcomes(passed=1, failed=1)
    assert "Qwen/Hang  timed out after 0.5 s" in result.outlines


def test_xdist_workers_share_the_cores(tree: pytest.Pytester) -> None:
    result = run(tree, "presets/Qwen/Qwen3-0.6B.sh", "--recipe", "w4a8_awq_beta", "-n", "2")
    threads = worker_shares("cpu", 2)[0].threads
    assert f"Qwen/Qwen3-0.6B  the harness failed: LookupError: {threads}" in result.outlines


def test_warnings_of_libraries_do_not_fail_a_case(tree: pytest.Pytester) -> None:
    with (tree.path / "conftest.py").open("a") as stream:
        stream.write(
            "\nimport warnings\ndef warned(case):\n    warnings.warn('old')\n    return check(case)\n"
        )
        stream.write("pipeline.check = warned\n")
    options = ("presets/Qwen/Qwen3-0.6B.sh", "--recipe", "fp8", "-W", "error")
    run(tree, *options).assert_outcomes(passed=1)
    run(tree, *options, "--in-process").assert_outcomes(passed=1, warnings=1)


def test_collecting_real_presets_imports_no_torch() -> None:
    code = (
        "import pytest, sys\n"
        "code = pytest.main(['presets', '--collect-only', '-q', '-p', 'no:cacheprovider'])\n"
        "print(int(code), 'torch' in sys.modules, 'megatron' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False False", done.stdout + done.stderr
    assert "presets/Qwen/Qwen3-8B.sh::fp8" in done.stdout


# ---- workers and devices ----


def test_each_worker_of_xdist_has_its_share_and_a_device_of_its_own(tree: pytest.Pytester) -> None:
    """What the plan says reaches the child, where CUDA is first touched, and what it says of a device too."""
    with (tree.path / "conftest.py").open("a") as stream:
        stream.write(SHARED)
    result = run(tree, "presets", "--recipe", "fp8,nvfp4", "-n", "2", "--dist", "each", "-rf", device="auto")
    faults = {line.partition("KeyError: ")[2] for line in result.outlines if "KeyError: " in line}
    assert faults == {repr(f"cuda:0 GPU-{name} {threads} 0.5") for name, threads in (("aa", 3), ("bb", 4))}


def test_workers_that_do_not_fit_are_wrong_usage(tree: pytest.Pytester) -> None:
    with (tree.path / "conftest.py").open("a") as stream:
        stream.write("\nfrom harness import host\nhost.free_memory = lambda: 3 << 30\n")
    result = run(tree, "presets", "--recipe", "fp8", "-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "2 workers do not fit, 1 would" in result.stderr.str()
    tree.makepyfile(test_other="def test_other(): pass")
    run(tree, "test_other.py", "-n", "2").assert_outcomes(passed=1)


def test_with_several_workers_one_server_is_asked_for_children(tree: pytest.Pytester) -> None:
    (tree.path / "slow.py").write_text(
        "import os, pathlib\nwith open('imported', 'a') as out:\n    print(os.getpid(), file=out)\n"
    )
    with (tree.path / "conftest.py").open("a") as stream:
        stream.write("\npytest_workers.PRELOAD = ('slow',)\n")
    run(tree, "presets", "-k", "0.6B", "--recipe", "fp8,nvfp4", "-n", "2").assert_outcomes(passed=2)
    assert len((tree.path / "imported").read_text().split()) == 1


def test_a_server_that_cannot_be_reached_is_replaced_by_one_of_its_own(tree: pytest.Pytester) -> None:
    for lost in ("{}", "{'server': 1 << 22, 'process': os.getpid(), 'alive': 1, 'address': 'gone'}"):
        with (tree.path / "conftest.py").open("a") as stream:
            stream.write(f"\npytest_workers.hand_over_fork_server = lambda: {lost}\n")
        run(tree, "presets", "-k", "0.6B", "--recipe", "fp8,nvfp4", "-n", "2").assert_outcomes(passed=2)


def test_in_process_no_child_is_started(tree: pytest.Pytester) -> None:
    with (tree.path / "conftest.py").open("a") as stream:
        stream.write("\ndef here(case):\n    raise KeyError(os.getpid() == int(os.environ['PYTEST_PID']))\n")
        stream.write("pipeline.check = here\nos.environ.setdefault('PYTEST_PID', str(os.getpid()))\n")
    one = ("presets/Qwen/Qwen3-0.6B.sh", "--recipe", "fp8")
    for options, own in ((one, False), ((*one, "--in-process"), True)):
        assert f"Qwen/Qwen3-0.6B  the harness failed: KeyError: {own}" in run(tree, *options).outlines


def test_n_auto_asks_the_harness(tree: pytest.Pytester) -> None:
    with (tree.path / "conftest.py").open("a") as stream:
        stream.write("\nfrom harness import pytest_plugin as plugin\n")
        stream.write("plugin.worker_count = lambda device, ranks=1: 3\n")
    result = run(tree, "presets", "--recipe", "fp8", "-n", "auto")
    result.stdout.fnmatch_lines(["*3 workers*"])
