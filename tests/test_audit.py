"""Parameter counts of the real models, to the last one, and blocks that do not fit."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from broken import FACTS, MOE, PRESETS, TEXTS, TREE, edit, line_of, write_copy
from published import of_preset

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
            "--hidden-size 4160, not a multiple of 128, as int4_awq wants of the inputs of "
            "self_attention.linear_qkv, mlp.linear_fc1: ModelOpt pads its last block with zeros without a "
            "word, and the export refuses it",
            id="hidden",
        ),
        pytest.param(
            {"--kv-channels": "100"},
            "int4_awq",
            "tp1",
            "--kv-channels",
            "--num-attention-heads 20 x --kv-channels 100 = 2000, not a multiple of 128",
            id="heads",
        ),
        pytest.param(
            {"--ffn-hidden-size": "12296"},
            "nvfp4",
            "tp1",
            "--ffn-hidden-size",
            "--ffn-hidden-size 12296, not a multiple of 16, as nvfp4 wants",
            id="ffn-and-16",
        ),
        pytest.param(
            {"--ffn-hidden-size": "12352"},
            "int4_awq",
            "tp1",
            "--ffn-hidden-size",
            "12352, not a multiple of 128",
            id="ffn-and-128",
        ),
        pytest.param(
            {},
            "int4_awq",
            "tp64",
            "--ffn-hidden-size",
            "--ffn-hidden-size 12288 / 64 = 192, not a multiple of 128",
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
    assert (
        "1000, not a multiple of 128, as int4_awq wants of the inputs of mlp.shared_experts.linear_fc2"
        in finding.message
    )


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
        (
            "Qwen2.5-0.5B-Instruct",
            "tp4",
            "--num-attention-heads",
            "Megatron: 14 attention heads / tp4 is not whole",
        ),
        ("Qwen3-8B", "tp3", "--num-query-groups", "Megatron: 8 query groups / tp3 is not whole"),
        ("Qwen3-8B", "pp5", "--num-layers", "Megatron: 36 layers / 5 pipeline stages is not whole"),
        ("Qwen3-8B", "pp3,first5", "--num-layers", "Megatron: 31 other layers / 2 other pipeline stages"),
        ("Qwen3-30B-A3B", "ep3", "--num-experts", "Megatron: 128 experts / ep3 is not whole"),
        (
            "Qwen3-30B-A3B",
            "etp5",
            "--moe-ffn-hidden-size",
            "Megatron: 768 channels of an expert / etp5 is not whole",
        ),
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
    full = of_preset(file)
    result = audit(full, params, Layout(), None)
    if not {"total", "text_total"} & set(params):
        (finding,) = result.findings
        assert finding.severity is Severity.WARNING
        assert finding.message.startswith("no parameter count is published")
        return
    assert result.findings == ()
    counted, buffers = counts(full), counts(full).buffers if full.moe and full.moe.expert_bias else 0
    for key, count in (("total", counted.total), ("active", counted.active)):
        published = params.get(f"text_{key}", params.get(key, count + buffers))
        assert published == count + buffers
    assert result.with_buffers == tuple(key for key in ("total", "active") if buffers and key in params)


def named(name: str) -> PresetFile:
    return find_presets([name], TREE)[0]


# Counts with parts that a preset leaves out


def test_expert_biases_in_a_published_count_are_named() -> None:
    result = audit(of_preset(named("DeepSeek-R1")), {"total": 671_026_419_200}, Layout(), None)
    assert result.findings == ()
    assert result.with_buffers == ("total",)
    assert result.detail == (
        "671,026,404,352 parameters, 37,552,282,624 active; the published total includes 14,848 expert "
        "biases (buffers)"
    )


def test_a_count_without_the_expert_biases_is_as_good() -> None:
    result = audit(of_preset(named("DeepSeek-R1")), {"total": 671_026_404_352}, Layout(), None)
    assert (result.findings, result.with_buffers) == ((), ())
    assert "buffers" not in result.detail


@pytest.mark.parametrize("off", [-1, 1, 14_847, 14_849])
def test_a_count_off_by_anything_else_than_the_biases_is_an_error(off: int) -> None:
    params = {"total": 671_026_404_352 + off}
    (finding,) = audit(of_preset(named("DeepSeek-R1")), params, Layout(), None).findings
    assert finding.is_error
    assert finding.message.endswith(f"({-off:+,}), and 14,848 expert biases (buffers)")


def test_a_preset_without_the_biases_that_are_published_is_an_error() -> None:
    full = of_preset(named("DeepSeek-R1"))
    full = architecture(full.arguments.replaced({"moe_router_enable_expert_bias": False}))
    (finding,) = audit(full, {"total": 671_026_419_200}, Layout(), None).findings
    assert "(-14,848)" in finding.message


@pytest.mark.parametrize("key", ["total", "active"])
def test_of_a_multimodal_model_the_text_part_counts(key: str) -> None:
    full = of_preset(named("Llama-4-Scout-17B-16E-Instruct"))
    counted = {"total": counts(full).total, "active": counts(full).active}
    params = {"total": 1 + counted["total"], "active": 1 + counted["active"]} | {
        f"text_{name}": count for name, count in counted.items()
    }
    assert audit(full, params, Layout(), None).findings == ()
    (finding,) = audit(full, params | {f"text_{key}": 7}, Layout(), None).findings
    assert finding.message.startswith(f"{key} parameters: 7 published")


def test_prediction_layers_are_not_counted() -> None:
    params = {"total": 120_668_707_840, "mtp": 2_942_325_248}
    full = of_preset(named("NVIDIA-Nemotron-3-Super-120B-A12B-BF16"))
    assert audit(full, params, Layout(), None).findings == ()


# Latent attention, Mamba, delta nets and latent experts


@pytest.mark.parametrize(
    ("name", "changes", "layout", "flag", "message"),
    [
        pytest.param(
            "DeepSeek-R1",
            {"--q-lora-rank": "1544"},
            "tp1",
            "--q-lora-rank",
            "--q-lora-rank 1544, not a multiple of 128, as int4_awq wants of the inputs of "
            "self_attention.linear_q_up_proj:",
            id="query-latent",
        ),
        pytest.param(
            "DeepSeek-R1",
            {"--kv-lora-rank": "520"},
            "tp1",
            "--kv-lora-rank",
            "520, not a multiple of 128, as int4_awq wants of the inputs of self_attention.linear_kv_up_proj",
            id="key-value-latent",
        ),
        pytest.param(
            "DeepSeek-R1",
            {"--v-head-dim": "99"},
            "tp2",
            "--v-head-dim",
            "--num-attention-heads 128 x --v-head-dim 99 = 12672 / 2 = 6336, not a multiple of 128",
            id="value-heads",
        ),
        pytest.param(
            "DeepSeek-V2-Lite",
            {"--hidden-size": "2056"},
            "tp1",
            "--hidden-size",
            "2056, not a multiple of 128, as int4_awq wants of the inputs of self_attention.linear_q_proj,",
            id="hidden-of-latent-attention",
        ),
        pytest.param(
            "Nemotron-H-8B-Base-8K",
            {"--mamba-head-dim": "65"},
            "tp2",
            "--mamba-head-dim",
            "--mamba-num-heads 128 x --mamba-head-dim 65 = 8320 / 2 = 4160, not a multiple of 128",
            id="mamba",
        ),
        pytest.param(
            "Qwen3-Next-80B-A3B-Instruct",
            {"--linear-value-head-dim": "130"},
            "tp1",
            "--linear-value-head-dim",
            "--linear-num-value-heads 32 x --linear-value-head-dim 130 = 4160, not a multiple of 128",
            id="delta-net",
        ),
        pytest.param(
            "NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
            {"--moe-latent-size": "1000"},
            "tp1",
            "--moe-latent-size",
            "1000, not a multiple of 128, as int4_awq wants of the inputs of mlp.experts.linear_fc1, mlp.",
            id="expert-latent",
        ),
    ],
)
def test_a_block_that_does_not_fit_other_layers(
    name: str, changes: dict[str, str], layout: str, flag: str, message: str, tmp_path: Path
) -> None:
    text = named(name).path.read_text()
    for one, value in changes.items():
        text = edit(text, one, value)
    path = tmp_path / f"{name}.sh"
    path.write_text(text)
    findings = audit(of_preset(preset_at(path)), None, Layout.parse(layout), find_recipe("int4_awq")).findings
    (finding,) = (found for found in findings if found.flag == flag and not found.is_error)
    assert message in finding.message
    assert (finding.severity, finding.line) == (Severity.WARNING, line_of(text, flag))


@pytest.mark.parametrize(
    ("symbols", "matrix"),
    [("M", "mixer.in_proj"), ("*", "self_attention.linear_qkv"), ("-", "mlp.linear_fc1")],
)
def test_hidden_size_is_what_the_only_matrix_takes(symbols: str, matrix: str) -> None:
    full = of_preset(named("Nemotron-H-8B-Base-8K"))
    changes = {"hybrid_layer_pattern": symbols, "num_layers": 1, "hidden_size": 4100}
    full = architecture(full.arguments.replaced(changes))
    found = audit(full, None, Layout(), find_recipe("nvfp4")).findings
    assert [one.message.split(":")[0] for one in found if one.flag == "--hidden-size"] == [
        f"--hidden-size 4100, not a multiple of 16, as nvfp4 wants of the inputs of {matrix}"
    ]


@pytest.mark.parametrize(
    ("name", "changes", "layout", "flag", "message"),
    [
        (
            "DeepSeek-R1",
            {},
            "tp3,etp1",
            "--num-attention-heads",
            "Megatron: 128 attention heads / tp3 is not whole",
        ),
        (
            "Nemotron-H-8B-Base-8K",
            {},
            "tp16",
            "--mamba-num-groups",
            "Megatron: 8 Mamba groups / tp16 is not whole",
        ),
        (
            "Nemotron-H-8B-Base-8K",
            {"mamba_num_heads": 104},
            "tp16",
            "--mamba-num-heads",
            "Megatron: 104 Mamba heads / tp16",
        ),
        (
            "Nemotron-H-8B-Base-8K",
            {},
            "pp3",
            "--hybrid-layer-pattern",
            "Megatron: 52 layers / 3 pipeline stages",
        ),
        (
            "Nemotron-H-8B-Base-8K",
            {"hybrid_layer_pattern": "M-|M*", "num_layers": 4},
            "pp4",
            "--hybrid-layer-pattern",
            "Megatron: the pattern has 2 stages, the layout pp4",
        ),
        (
            "Qwen3-Next-80B-A3B-Instruct",
            {},
            "tp32,etp1",
            "--linear-num-key-heads",
            "Megatron: 16 linear key heads / tp32",
        ),
        (
            "Qwen3-Next-80B-A3B-Instruct",
            {},
            "tp64,etp1",
            "--linear-num-value-heads",
            "Megatron: 32 linear value heads / tp64",
        ),
        (
            "Qwen3-Next-80B-A3B-Instruct",
            {},
            "tp2,cp16",
            "--linear-num-key-heads",
            "Megatron: 16 linear key heads / tp x cp = 32",
        ),
    ],
)
def test_what_a_layout_does_not_divide_of_other_layers(
    name: str, changes: dict[str, object], layout: str, flag: str, message: str
) -> None:
    full = of_preset(named(name))
    full = architecture(full.arguments.replaced(changes))
    found = audit(full, None, Layout.parse(layout), None).findings
    assert any(one.flag == flag and one.is_error and one.message.startswith(message) for one in found)


@pytest.mark.parametrize(
    ("name", "layout", "refused"),
    [
        ("Qwen3-30B-A3B", "tp2,ep2", True),
        ("Qwen3-30B-A3B", "tp2,ep2,etp1", True),
        ("Qwen3-30B-A3B", "tp2", False),
        ("Qwen3-30B-A3B", "ep2", False),
        ("Qwen3-8B", "tp2,ep2", False),
    ],
)
def test_tensor_and_expert_parallelism_at_once_are_refused(name: str, layout: str, refused: bool) -> None:
    found = audit(of_preset(named(name)), None, Layout.parse(layout), None).findings
    assert [one.message for one in found if "QuantSequentialMLP" in one.message and one.is_error] == (
        [
            "ModelOpt: tp2 beside ep2 is refused for experts one by one (TP+EP is not supported by "
            "QuantSequentialMLP): take tp1 or ep1"
        ]
        if refused
        else []
    )


@pytest.mark.parametrize("layout", ["tp8", "pp61", "ep8"])
def test_deepseek_r1_fits_common_layouts(layout: str) -> None:
    assert audit(of_preset(named("DeepSeek-R1")), None, Layout.parse(layout), None).findings == ()
