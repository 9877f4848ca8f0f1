"""The same failure, wherever it is read: the terminal, JUnit's XML, the JSON document and GitHub's page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from test_reproduction import case_of

from harness import messages
from harness.report import read_report

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a preset that has half the query groups, as pytest left it."""
    folder = tmp_path_factory.mktemp("reports")
    case_of(folder / "presets", "Qwen/Qwen3-0.6B", (("--num-query-groups", "4"),))
    command = [sys.executable, "-m", "pytest", "-p", "harness.pytest_plugin", "-p", "no:cacheprovider"]
    command += ["presets", "--recipe", "fp8", "--device", "cpu", "--junitxml", "junit.xml"]
    environment = os.environ | {"GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    (folder / "terminal.txt").write_text(done.stdout)
    assert done.returncode == 1, done.stdout + done.stderr
    return folder


FAILURE = """\
Qwen/Qwen3-0.6B  failed in reference, audit
  --num-query-groups 4 (presets/Qwen/Qwen3-0.6B.sh:23): 8 published (num_key_value_heads)
  total parameters: 596,049,920 published, 566,689,792 in this preset (-29,360,128)
  shapes part at layers.0.self_attention.linear_qkv
    weight  3072 x 1024, 4096 x 1024 published
    takes   s x b x 1024
    gives   s x b x 3072, s x b x 4096 published
    --num-query-groups 4 (presets/Qwen/Qwen3-0.6B.sh:23), 8 published
    --hidden-size 1024 (presets/Qwen/Qwen3-0.6B.sh:19)
    --num-attention-heads 16 (presets/Qwen/Qwen3-0.6B.sh:21)
    --kv-channels 128 (presets/Qwen/Qwen3-0.6B.sh:24)
"""


def test_the_terminal_shows_it(folder: Path) -> None:
    assert FAILURE in (folder / "terminal.txt").read_text()


def test_junit_has_it(folder: Path) -> None:
    (failure,) = ElementTree.parse(folder / "junit.xml").iter("failure")
    assert failure.text is not None
    assert FAILURE in failure.text


def test_githubs_page_has_it(folder: Path) -> None:
    summary = (folder / "summary.md").read_text()
    assert summary.startswith("### Presets: 1 case: 1 failed")
    assert FAILURE in summary
    assert re.search(
        r"^\| Qwen/Qwen3-0\.6B \| fp8 \| tp1 \| cpu \| failed \| --num-query-groups 4", summary, re.M
    )


def test_the_document_has_it_and_repro_reads_it(folder: Path) -> None:
    command = [sys.executable, "-m", "harness", "check", "Qwen3-0.6B", "--recipe", "fp8", "--device", "cpu"]
    document = folder / "report.json"
    done = subprocess.run(
        [*command, "--json", "report.json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert FAILURE in done.stdout
    (result,) = json.loads(document.read_text())["results"]
    assert result["mismatch"]["module"] == "decoder.layers.0.self_attention.linear_qkv"
    assert result["mismatch"]["sizes"][2] == {
        "flag": "--num-query-groups",
        "line": 23,
        "value": "4",
        "small": None,
        "published": "8",
    }
    (report,) = read_report(document)
    assert report.mismatch is not None
    assert messages.failure_text(report).count("8 published") == 2
    done = subprocess.run(
        [sys.executable, "-m", "harness", "repro", "report.json", "--reduce", "--script", "show.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "forward: every module in the order of the run" in done.stdout
    assert (
        "--num-query-groups 4 (presets/Qwen/Qwen3-0.6B.sh:23) back to 8 (num_key_value_heads)" in done.stdout
    )
    assert (folder / "show.py").is_file()
