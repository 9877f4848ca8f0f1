"""Parameter counts of the real models, to the last one, and blocks that do not fit."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from broken import FACTS, MOE, PRESETS, TEXTS, TREE, edit, line_of, write_copy

from harness.architecture import architecture
from harness.audit import audit
from harness.finding import Finding, Severity
from harness.inventory import counts
from harness.layout import Layout
from harness.pipeline import lint
from harness.preset import PresetFile, discover, find_presets, load_preset, preset_at
from harness.recipes import RECIPES, find_recipe

COUNTS = {  # total and active
    "Qwen2.5-0.5B-Instruct": (494_032_768, 494_032_768),
    "Qwen2.5-7B-Instruct": (7_615_616_512, 7_615_616_512),
    "Qwen3-0.6B": (596_049_920, 596_049_920),
    "Qwen3-8B": (8_190_735_360, 8_190_735_360),
    "Qwen3-30B-A3B": (30_532_122_624, 3_353_032_704),
    "Qwen3-235B-A22B": (235_093_634_560, 22_190_763_520),
}


def audited(
    folder: Path, name: str, changes: dict[str, str], recipe: str, layout: str = "tp1"
) -> list[Finding]:
    """Block findings of a preset with these sizes, its published counts left aside."""
    text = TEXTS[name]
    for flag, value in changes.items():
        text = edit(text, flag, value)
    arguments = load_preset(preset_at(write_copy(folder, name, text))).arguments
    assert arguments is not None
    return list(audit(architecture(arguments), None, Layout.parse(layout), find_recipe(recipe)).findings)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_of_the_real_models(name: str) -> None:
    arguments = load_preset(PRESETS[name]).arguments
    assert arguments is not None
    result = audit(architecture(arguments), FACTS[name]["params"], Layout(), None)
    assert (result.counts.total, result.counts.active) == COUNTS[name]
    assert result.published == {
        key: count
        for key, count in zip(("total", "active"), COUNTS[name], strict=True)
        if key in FACTS[name]["params"]
    }
    assert result.published["total"] == COUNTS[name][0]
    assert result.findings == ()


def test_the_mixture_models_publish_their_active_count() -> None:
    assert MOE
    assert all("active" in FACTS[name]["params"] for name in MOE)


@pytest.mark.parametrize(
    ("key", "published", "message"),
    [
        (
            "total",
            30_532_122_625,
            "total parameters: 30,532,122,625 published, 30,532,122,624 in this preset (-1)",
        ),
        (
            "active",
            1_676_516_352,
            "active parameters: 1,676,516,352 published, 3,353,032,704 in this preset (+1,676,516,352)",
        ),
    ],
    ids=["total-by-one", "active-twice"],
)
def test_a_count_that_differs_by_any_amount(key: str, published: int, message: str) -> None:
    arguments = load_preset(PRESETS["Qwen3-30B-A3B"]).arguments
    assert arguments is not None
    params = FACTS["Qwen3-30B-A3B"]["params"] | {key: published}
    (finding,) = audit(architecture(arguments), params, Layout(), None).findings
    assert (finding.stage, finding.severity, finding.message) == ("audit", Severity.ERROR, message)
    assert finding.expected == published


@pytest.mark.parametrize("params", [{}, {"active": 8_190_735_360}], ids=["nothing", "active-only"])
def test_a_count_that_is_not_published_is_said(params: dict[str, object]) -> None:
    arguments = load_preset(PRESETS["Qwen3-8B"]).arguments
    assert arguments is not None
    (finding,) = audit(architecture(arguments), params, Layout(), None).findings
    assert finding.severity is Severity.WARNING
    assert finding.message == "no parameter count is published: 8,190,735,360 could not be checked"


@pytest.mark.parametrize("count", [None, "8B", True, 8.2e9, []], ids=repr)
def test_a_count_that_is_no_number_is_an_error(count: object) -> None:
    arguments = load_preset(PRESETS["Qwen3-8B"]).arguments
    assert arguments is not None
    finding, unchecked = audit(architecture(arguments), {"total": count}, Layout(), None).findings
    assert (finding.severity, finding.actual) == (Severity.ERROR, count)
    assert finding.message == (
        f"the published count of total parameters is {count!r}, which is no whole number"
    )
    assert unchecked.severity is Severity.WARNING


# Blocks


@pytest.mark.parametrize(
    ("changes", "recipe", "layout", "flag", "message"),
    [
        pytest.param(
            {"--hidden-size": "4160"},
            "int4_awq",
            "tp1",
            "--hidden-size",
            "linear_qkv takes 4160 inputs, not a multiple of 128: int4_awq pads its last block with zeros, "
            "and the forward pass does not show it",
            id="hidden",
        ),
        pytest.param(
            {"--kv-channels": "100"},
            "int4_awq",
            "tp1",
            "--kv-channels",
            "linear_proj takes 2000 inputs",
            id="heads",
        ),
        pytest.param(
            {"--ffn-hidden-size": "12296"},
            "nvfp4",
            "tp1",
            "--ffn-hidden-size",
            "linear_fc2 takes 12296 inputs, not a multiple of 16: nvfp4 pads",
            id="ffn-and-16",
        ),
        pytest.param(
            {"--ffn-hidden-size": "12352"},
            "int4_awq",
            "tp1",
            "--ffn-hidden-size",
            "12352 inputs",
            id="ffn-and-128",
        ),
        pytest.param(
            {},
            "int4_awq",
            "tp64",
            "--ffn-hidden-size",
            "linear_fc2 takes 12288 / 64 = 192 inputs, not a multiple of 128",
            id="per-rank",
        ),
    ],
)
def test_a_block_that_does_not_fit(
    changes: dict[str, str], recipe: str, layout: str, flag: str, message: str, tmp_path: Path
) -> None:
    if "--kv-channels" in changes:
        changes = changes | {"--num-attention-heads": "20", "--num-query-groups": "4"}
    found = [one for one in audited(tmp_path, "Qwen3-8B", changes, recipe, layout) if one.flag == flag]
    (finding,) = found
    assert (finding.stage, finding.severity) == ("audit", Severity.WARNING)
    assert message in finding.message
    assert finding.line == line_of(TEXTS["Qwen3-8B"], flag)


@pytest.mark.parametrize(
    ("layout", "misfits"),
    [("tp1", []), ("tp2", []), ("etp1,tp4", []), ("tp4", ["--moe-ffn-hidden-size"]), ("ep8,etp1", [])],
)
def test_experts_are_split_by_their_own_size(layout: str, misfits: list[str], tmp_path: Path) -> None:
    found = audited(tmp_path, "Qwen3-30B-A3B", {}, "int4_awq", layout)
    assert [finding.flag for finding in found] == misfits


def test_a_shared_expert_is_audited(tmp_path: Path) -> None:
    flag = "--moe-shared-expert-intermediate-size"
    (finding,) = audited(tmp_path, "Qwen3-30B-A3B", {flag: "1000"}, "int4_awq")
    assert (finding.flag, finding.actual, finding.expected) == (flag, 1000, "a multiple of 128")
    assert "the shared expert's linear_fc2 takes 1000 inputs" in finding.message


@pytest.mark.parametrize("recipe", ["fp8", "int8_smoothquant"])
def test_formats_without_blocks_fit_any_size(recipe: str, tmp_path: Path) -> None:
    assert (
        audited(tmp_path, "Qwen3-8B", {"--hidden-size": "4097", "--ffn-hidden-size": "12289"}, recipe) == []
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", PRESETS)
def test_blocks_fit_every_real_model_on_one_rank(name: str, recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert lint(PRESETS[name], Layout(), recipe).findings == ()


def test_a_misfit_does_not_fail_the_preset(tmp_path: Path) -> None:
    report = lint(PRESETS["Qwen3-30B-A3B"], Layout.parse("tp4"), find_recipe("int4_awq"))
    assert report.outcome == "passed"
    assert [finding.flag for finding in report.findings] == ["--moe-ffn-hidden-size"]


@pytest.mark.parametrize(
    ("name", "layout", "flag", "message"),
    [
        ("Qwen2.5-0.5B-Instruct", "tp4", "--num-attention-heads", "14 / tp4 is not whole"),
        ("Qwen3-8B", "tp3", "--num-query-groups", "8 / tp3 is not whole"),
        ("Qwen3-8B", "pp5", "--num-layers", "36 / pp5 is not whole"),
        ("Qwen3-30B-A3B", "ep3", "--num-experts", "128 / ep3 is not whole"),
        ("Qwen3-30B-A3B", "etp5", "--moe-ffn-hidden-size", "768 / etp5 is not whole"),
    ],
)
def test_what_a_layout_does_not_divide_is_an_error(name: str, layout: str, flag: str, message: str) -> None:
    report = lint(find_presets([name], TREE)[0], Layout.parse(layout))
    found = {f.flag: f.message for f in report.findings if f.is_error}
    assert found[flag].startswith(message)


@pytest.mark.parametrize("layout", ["tp8", "tp2,pp2", "ep8"])
def test_a_layout_that_fits_is_silent(layout: str) -> None:
    report = lint(find_presets(["Qwen3-30B-A3B"], TREE)[0], Layout.parse(layout))
    assert report.findings == ()


@pytest.mark.parametrize("file", discover(TREE), ids=lambda file: file.name)
def test_every_preset_has_the_published_number_of_parameters(file: PresetFile) -> None:
    params = tomllib.loads(file.path.with_suffix(".toml").read_text())["params"]
    arguments = load_preset(file).arguments
    assert arguments is not None
    counted = counts(architecture(arguments))
    assert counted.total == params["total"]
    assert counted.active == params.get("active", counted.total)
