"""What the README shows: its commands run, its report is what the tool prints, its tree is the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.case import PARITY, Outcome
from harness.report import read_report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def harness(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200, check=False)


def test_the_two_commands_come_first() -> None:
    assert BLOCKS[0].splitlines() == ["uv run harness check", "uv run pytest -n auto"]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    pattern = re.search(r"s/(\^.*?)/\\1/p", (ROOT / ".ci" / "run").read_text())
    assert pattern is not None
    line = re.compile(pattern.group(1).replace("\\(", "(").replace("\\)", ")"), re.MULTILINE)
    assert line.findall(README)[0] == "uv run pytest -n auto"


# What keeps the models from being compared part for part, and whose limit it is.
NO_PARITY = {
    "meta-llama/Llama-3.2-1B-Instruct": "Megatron: factor 32.0 published (rope_scaling), which no flag",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": "Megatron: factor 16.0, high_freq_factor 1.0 published",
    "moonshotai/Kimi-K2-Instruct": "Megatron: beta_fast 1.0 published (rope_scaling), which no flag can make",
    "MiniMaxAI/MiniMax-M2": "Megatron: it norms queries and keys head by head",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "ModelOpt: its importer has no rule for Qwen3NextForCausalLM at all",
}


def test_the_first_command_checks_every_preset(tmp_path: Path) -> None:
    *start, command = BLOCKS[0].splitlines()[0].split()
    assert (start, command) == (["uv", "run", "harness"], "check")
    # On the CPU, so that the verdicts are those of every machine.
    done = harness(command, "--device", "cpu", "--json", str(tmp_path / "report.json"), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = read_report(tmp_path / "report.json")
    presets = len(list((ROOT / "presets").rglob("*.sh")))
    assert len(reports) == 4 * presets
    others = {report.case.preset: report for report in reports if report.outcome is not Outcome.PASSED}
    assert others.keys() == NO_PARITY.keys(), done.stdout
    for preset, words in NO_PARITY.items():
        assert (others[preset].case.recipe, others[preset].outcome) == (PARITY, Outcome.UNSUPPORTED)
        assert words in others[preset].reason


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The presets with the mistakes that the README tells of."""
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    for name, cut, put in (
        ("Qwen/Qwen3-8B", "--num-query-groups 8", "--num-query-groups 4"),
        ("Qwen/Qwen3-8B", r".*--norm-epsilon.*\n", ""),
        ("Qwen/Qwen3-0.6B", "--kv-channels 128", "--kv-channels 127"),
        ("deepseek-ai/DeepSeek-V2-Lite", "--kv-lora-rank 512", "--kv-lora-rank 500"),
    ):
        preset = tmp_path / "presets" / f"{name}.sh"
        text, count = re.subn(cut, put, preset.read_text())
        assert count == 1
        preset.write_text(text)
    return tmp_path


def test_the_failure_reports_are_what_the_tool_prints(broken: Path) -> None:
    names = ("Qwen3-8B", "Qwen3-0.6B", "DeepSeek-V2-Lite")
    done = harness("check", *names, "--recipe", "fp8", "--device", "cpu", cwd=broken)
    assert done.returncode == 1
    shown = [block for block in BLOCKS if "  again: harness check" in block]
    assert len(shown) == len(names)
    for block in shown:
        assert block in done.stdout


def test_the_tree_names_every_file() -> None:
    tree = next(block for block in BLOCKS if block.startswith("harness/\n"))
    listed = set(re.findall(r"^  ([\w.]+/?)", tree, flags=re.MULTILINE))
    files = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "harness").iterdir()
        if path.name not in ("__init__.py", "__main__.py", "__pycache__")
    }
    assert listed == files


def test_the_commands_listed_exist() -> None:
    listed = re.findall(r"^harness (\w+)", README, flags=re.MULTILINE)
    done = harness("--help", cwd=ROOT)
    assert listed
    for command in listed:
        assert re.search(rf"^\W*{command}\b", done.stdout, flags=re.MULTILINE), command
