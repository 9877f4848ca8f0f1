"""What each family alone has: every such flag, changed or left out, is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from broken import TREE, edit, errors, line_of

from harness.pipeline import lint
from harness.preset import PresetFile, discover, find_presets, preset_at

CHANGES = [
    ("Llama-3.2-1B-Instruct", "--use-rope-scaling", None),
    ("Llama-3.2-1B-Instruct", "--rope-scaling-factor", "8.0"),
    ("Llama-3.1-8B-Instruct", "--use-rope-scaling", None),
    ("Llama-3.1-8B-Instruct", "--rotary-base", "10000"),
    ("Nemotron-Mini-4B-Instruct", "--apply-layernorm-1p", None),
    ("Nemotron-Mini-4B-Instruct", "--squared-relu", None),
    ("Nemotron-Mini-4B-Instruct", "--normalization", "RMSNorm"),
    ("Nemotron-Mini-4B-Instruct", "--rotary-percent", "1.0"),
    ("Nemotron-Mini-4B-Instruct", "--swiglu", ""),
    ("Mixtral-8x7B-v0.1", "--moe-router-pre-softmax", ""),
    ("Mixtral-8x7B-v0.1", "--moe-ffn-hidden-size", "4096"),
    ("Mixtral-8x7B-v0.1", "--moe-layer-freq", "2"),
    ("phi-4", "--rotary-base", "10000"),
    ("phi-4", "--qk-layernorm", ""),
    ("QwQ-32B", "--add-qkv-bias", None),
    ("Qwen3-Coder-480B-A35B-Instruct", "--num-query-groups", "4"),
]


@pytest.mark.parametrize(
    ("name", "flag", "value"), CHANGES, ids=[f"{name}{flag}-{value}" for name, flag, value in CHANGES]
)
def test_a_changed_flag_is_named(tmp_path: Path, name: str, flag: str, value: str | None) -> None:
    (file,) = find_presets([name], TREE)
    folder = tmp_path / file.path.parent.name
    folder.mkdir()
    shutil.copy(file.path.with_suffix(".toml"), folder)
    text = edit(file.path.read_text(), flag, value)
    (folder / file.path.name).write_text(text)
    found = {
        finding.flag: finding.line for finding in errors(lint(preset_at(folder / file.path.name)).findings)
    }
    assert flag in found
    assert found[flag] == line_of(text, flag)


@pytest.mark.parametrize("file", discover(TREE), ids=lambda file: file.name)
def test_the_catalogue_has_no_error(file: PresetFile) -> None:
    report = lint(file)
    assert errors(report.findings) == []
    assert report.stages[1].detail.startswith("compared with ")
