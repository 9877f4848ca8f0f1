"""What ``list`` and ``show`` print of models of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.blueprint import compact, list_text, show_text, summary
from harness.layout import Layout
from harness.pipeline import blueprint
from harness.preset import discover, find_presets, preset_at

TREE = Path(__file__).parents[1] / "presets"
FILES = {file.path.stem: file for file in discover(TREE)}


def shown(name: str) -> dict[str, str]:
    """Rows of ``show`` by their first word."""
    (file,) = find_presets([name], TREE)
    rows = [line.split(None, 1) for line in show_text(*blueprint(file, Layout())).splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.mark.parametrize(
    ("name", "there", "not_there"),
    [
        ("DeepSeek-R1", ["--q-lora-rank", "--v-head-dim"], ["--kv-channels", "--num-query-groups"]),
        ("DeepSeek-V2-Lite", ["--kv-lora-rank"], ["--q-lora-rank", "--mamba-num-heads"]),
        ("Qwen3-8B", ["--kv-channels", "--num-layers"], ["--num-experts", "--linear-key-head-dim"]),
        ("gpt-oss-120b", ["--window-attn-skip-freq"], ["--no-rope-freq", "--ffn-hidden-size"]),
        (
            "NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
            ["--hybrid-layer-pattern", "--moe-latent-size", "--mamba-state-dim"],
            ["--num-layers", "--moe-layer-freq", "--ffn-hidden-size"],
        ),
        ("Qwen3-Next-80B-A3B-Instruct", ["--linear-num-value-heads"], ["--mamba-num-heads"]),
    ],
)
def test_show_has_the_sizes_that_mean_something(name: str, there: list[str], not_there: list[str]) -> None:
    rows = shown(name)
    assert set(there) <= set(rows)
    assert not set(not_there) & set(rows)


@pytest.mark.parametrize("name", ["DeepSeek-R1", "NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "gpt-oss-120b"])
def test_show_is_narrow_above_the_invariants(name: str) -> None:
    (file,) = find_presets([name], TREE)
    sizes = show_text(*blueprint(file, Layout())).split("\n\n")[1]
    assert max(map(len, sizes.splitlines())) <= 110


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("DeepSeek-R1", "3 dense, 58 moe  2 dense, 2 moe"),
        (
            "NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
            "40 mamba, 40 moe, 8 attention  2 mamba, 2 moe, 1 attention",
        ),
        (
            "Llama-4-Scout-17B-16E-Instruct",
            "36 moe, 12 moe (no rope)  3 moe, 1 moe (no rope)",
        ),
        ("gpt-oss-20b", "12 moe (window 127,0), 12 moe  2 moe (window 127,0), 1 moe"),
    ],
)
def test_show_counts_the_kinds_of_layers(name: str, layers: str) -> None:
    assert shown(name)["layers"] == layers


def test_show_says_an_invariant_once_where_both_sides_read_the_same() -> None:
    (file,) = find_presets(["DeepSeek-V2-Lite"], TREE)
    lines = show_text(*blueprint(file, Layout())).splitlines()
    s9, s10, s11 = (
        next(i for i, line in enumerate(lines) if line.startswith(name)) for name in ("S9", "S10", "S11")
    )
    assert "no query latent, key/value latent 512 < hidden" in lines[s9]
    assert "no query latent, key/value latent 128 < hidden" in lines[s9 + 1]
    assert (s10 - s9, s11 - s10) == (2, 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (18432, "18,432"),
        ((0,) * 3 + (1,) * 58, "3 x 0, 58 x 1"),
        ((0, 1) * 24, "24 x (0 1)"),
        ((0, 0, 1, 1), "0 0 1 1"),
        ((1,) * 30, "30 x 1"),
        ((0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0) * 3 + (1,), "0 1 1 0 1 0 0 1 1 1 0 0 1 1 0 1 ..."),
        ("MEM*E", "MEM*E"),
        ("M-M*" * 20, "M-M*M-M*M-M*M-M*M-M*M-M*M-M*M-M*..."),
    ],
)
def test_patterns_are_shortened(value: Any, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("name", "heads"),
    [("DeepSeek-R1", "128 latent"), ("Qwen3-8B", "32:8"), ("Qwen3-Next-80B-A3B-Instruct", "16:2")],
)
def test_list_says_what_attention_there_is(name: str, heads: str) -> None:
    assert heads in list_text([summary(FILES[name])]).splitlines()[1]


def test_list_has_a_model_without_attention(tmp_path: Path) -> None:
    text = FILES["Nemotron-H-8B-Base-8K"].path.read_text()
    pattern = next(line.split()[1] for line in text.splitlines() if "--hybrid-layer-pattern" in line)
    path = tmp_path / "Mamba.sh"
    path.write_text(text.replace(pattern, "M-M-"))
    entry = summary(preset_at(path))
    assert (entry["attention"], entry["num_attention_heads"], entry["num_layers"]) == (None, None, 4)
    assert list_text([entry]).splitlines()[1].split()[1] == "hybrid"
    assert "no attention" in show_text(*blueprint(preset_at(path), Layout()))
