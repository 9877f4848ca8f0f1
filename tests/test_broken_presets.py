"""Every preset with one thing wrong: it fails, and the finding names the flag that was changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from broken import CONFIGS, FACTS, MOE, PRESETS, TEXTS, edit, errors, line_of, lint_copy, value_of

from harness.arguments.modelled import MODELLED
from harness.case import Outcome
from harness.flags import FlagSpec, Role, flag_table

# Flag and the published key that holds its value.
NUMBERS = {
    "--num-layers": "num_hidden_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "intermediate_size",
    "--num-attention-heads": "num_attention_heads",
    "--num-query-groups": "num_key_value_heads",
    "--kv-channels": "head_dim",
    "--padded-vocab-size": "vocab_size",
    "--rotary-base": "rope_theta",
    "--norm-epsilon": "rms_norm_eps",
    "--num-experts": "num_experts",
    "--moe-router-topk": "num_experts_per_tok",
    "--moe-ffn-hidden-size": "moe_intermediate_size",
}


class Break(NamedTuple):
    """One change, and what the finding must say; ``value`` None removes the flag."""

    title: str
    flag: str
    value: str | None
    expected: Any
    actual: Any


def true_value(name: str, flag: str) -> int | float:
    config = CONFIGS[name]
    if flag == "--kv-channels" and "head_dim" not in config:
        return config["hidden_size"] // config["num_attention_heads"]
    return config[NUMBERS[flag]]


def numbers(name: str) -> Iterator[Break]:
    """Each size halved, doubled, off by a little, and as it is in every other model."""
    for flag in NUMBERS:
        if value_of(TEXTS[name], flag) is None:
            continue
        if flag == "--ffn-hidden-size" and name in MOE:
            continue  # no layer is dense, so that a difference is only a warning
        true = true_value(name, flag)
        if flag == "--norm-epsilon":
            values = {"tenfold": 1e-5, "tenth": 1e-7, "doubled": 2e-6, "twelve": 1e-12}
        else:
            siblings = {
                f"as-{sibling}": int(true_value(sibling, flag))
                for sibling in PRESETS
                if value_of(TEXTS[sibling], flag)
            }
            values = {
                "halved": int(true) // 2,
                "doubled": int(true) * 2,
                "one-less": int(true) - 1,
                "one-more": int(true) + 1,
                "128-less": int(true) - 128,
                "128-more": int(true) + 128,
                "tenth": int(true) // 10,
                "swapped-digits": int(str(int(true))[::-1]),
            } | siblings
        taken = {true}
        for title, value in values.items():
            if value not in taken and value > 0:
                taken.add(value)
                yield Break(f"{flag[2:]}-{title}", flag, str(value), true, value)


def switches(name: str) -> Iterator[Break]:
    """Each flag that a model must have removed, and each that it must not have added."""
    text, config = TEXTS[name], CONFIGS[name]
    qwen2, moe = config["model_type"] == "qwen2", name in MOE
    layers = config["num_hidden_layers"]
    for flag, wanted in (
        ("--qk-layernorm", not qwen2),
        ("--add-qkv-bias", qwen2),
        ("--untie-embeddings-and-output-weights", not config["tie_word_embeddings"]),
    ):
        assert (line_of(text, flag) is not None) is wanted
        title = f"{flag[2:]}-{'removed' if wanted else 'added'}"
        yield Break(title, flag, None if wanted else "", wanted, not wanted)
    for flag in ("--apply-layernorm-1p", "--rotary-interleaved", "--use-rope-scaling"):
        yield Break(f"{flag[2:]}-added", flag, "", False, True)
    yield Break("squared-relu-added", "--squared-relu", "", False, True)
    yield Break("swiglu-removed", "--swiglu", None, True, False)
    yield Break("normalization-LayerNorm", "--normalization", "LayerNorm", "RMSNorm", "LayerNorm")
    yield Break("normalization-removed", "--normalization", None, "RMSNorm", "LayerNorm")
    yield Break("disable-bias-linear-removed", "--disable-bias-linear", None, False, True)
    yield Break(
        "group-query-attention-removed",
        "--group-query-attention",
        None,
        config["num_key_value_heads"],
        config["num_attention_heads"],
    )
    yield Break("num-query-groups-removed", "--num-query-groups", None, config["num_key_value_heads"], 1)
    yield Break("norm-epsilon-removed", "--norm-epsilon", None, 1e-6, 1e-5)
    yield Break("rotary-base-removed", "--rotary-base", None, 1000000, 10000)
    positions = "--position-embedding-type"
    yield Break("position-embedding-type-removed", positions, None, "rope", "learned_absolute")
    for kind in ("learned_absolute", "yarn", "mrope", "relative", "none"):
        yield Break(f"position-embedding-type-{kind}", positions, kind, "rope", kind)
    yield Break("rotary-percent-half", "--rotary-percent", "0.5", 1.0, 0.5)
    yield Break("rotary-interpolated", "--rotary-seq-len-interpolation-factor", "4", None, 4)
    derived = int(config["hidden_size"] * 8 / 3 / 64) * 64
    if not moe:
        yield Break(
            "ffn-hidden-size-removed", "--ffn-hidden-size", None, config["intermediate_size"], derived
        )
    head = config["hidden_size"] // config["num_attention_heads"]
    if true_value(name, "--kv-channels") != head:
        yield Break("kv-channels-removed", "--kv-channels", None, config["head_dim"], head)
    if not moe:
        yield Break("num-experts-added", "--num-experts", "8", None, 8)
        return
    experts, ffn = config["num_experts"], config["moe_intermediate_size"]
    yield Break("num-experts-removed", "--num-experts", None, experts, None)
    yield Break("moe-router-topk-removed", "--moe-router-topk", None, 8, 2)
    yield Break(
        "moe-ffn-hidden-size-removed", "--moe-ffn-hidden-size", None, ffn, config["intermediate_size"]
    )
    every, frequency = (1,) * layers, "--moe-layer-freq"
    yield Break("moe-every-second-layer", frequency, "2", every, (1, 0) * (layers // 2))
    first_dense = (0,) + (1,) * (layers - 1)
    yield Break("moe-first-layer-dense", frequency, f"([0]*1+[1]*{layers - 1})", every, first_dense)
    yield Break("moe-none", frequency, f"([0]*{layers})", every, (0,) * layers)
    for kind in ("sigmoid", "sqrtsoftplus"):
        yield Break(f"moe-router-{kind}", "--moe-router-score-function", kind, "softmax", kind)
    for flag in ("--moe-router-pre-softmax", "--moe-router-enable-expert-bias"):
        yield Break(f"{flag[2:]}-added", flag, "", False, True)
    yield Break("moe-shared-expert-added", "--moe-shared-expert-intermediate-size", str(ffn), None, ffn)
    yield Break("moe-router-scaled", "--moe-router-topk-scaling-factor", "2.5", None, 2.5)
    yield Break("moe-router-num-groups-added", "--moe-router-num-groups", "8", None, 8)
    yield Break("moe-router-group-topk-added", "--moe-router-group-topk", "4", None, 4)


BREAKS = [
    pytest.param(name, broken, id=f"{name}-{broken.title}")
    for name in PRESETS
    for broken in (*numbers(name), *switches(name))
]


@pytest.mark.parametrize("name", PRESETS)
def test_an_unmodified_copy_passes_without_findings(name: str, tmp_path: Path) -> None:
    report = lint_copy(tmp_path, name, TEXTS[name])
    assert (report.outcome, report.findings) == (Outcome.PASSED, ())
    assert [stage.name for stage in report.stages] == ["parse", "reference", "audit"]


@pytest.mark.parametrize(("name", "broken"), BREAKS)
def test_one_thing_wrong_is_named(name: str, broken: Break, tmp_path: Path) -> None:
    text = edit(TEXTS[name], broken.flag, broken.value)
    assert text != TEXTS[name]
    report = lint_copy(tmp_path, name, text)
    assert report.outcome is Outcome.FAILED
    found = errors(report.findings, "reference")
    assert (broken.flag, line_of(text, broken.flag), broken.expected, broken.actual) in [
        (finding.flag, finding.line, finding.expected, finding.actual) for finding in found
    ]
    assert {finding.flag for finding in found} == {broken.flag}


@pytest.mark.parametrize("flag", ["--num-layers", "--hidden-size", "--num-attention-heads"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_missing_size_is_named(name: str, flag: str, tmp_path: Path) -> None:
    report = lint_copy(tmp_path, name, edit(TEXTS[name], flag, None))
    assert report.outcome is Outcome.FAILED
    assert flag in {finding.flag for finding in errors(report.findings)}


@pytest.mark.parametrize("name", PRESETS)
def test_another_activation_names_both_flags(name: str, tmp_path: Path) -> None:
    text = TEXTS[name].replace("--swiglu", "--squared-relu")
    found = errors(lint_copy(tmp_path, name, text).findings, "reference")
    assert {(finding.flag, finding.line, finding.expected, finding.actual) for finding in found} == {
        ("--swiglu", None, True, False),
        ("--squared-relu", line_of(text, "--squared-relu"), False, True),
    }


@pytest.mark.parametrize("name", [name for name in PRESETS if "head_dim" not in CONFIGS[name]])
def test_a_head_dimension_that_megatron_derives_right_may_be_left_out(name: str, tmp_path: Path) -> None:
    assert lint_copy(tmp_path, name, edit(TEXTS[name], "--kv-channels", None)).findings == ()


@pytest.mark.parametrize(
    ("flag", "value"), [("--max-position-embeddings", "8192"), ("--hidden-dropout", "0.1")]
)
def test_what_changes_no_logit_is_a_warning(flag: str, value: str, tmp_path: Path) -> None:
    text = edit(TEXTS["Qwen3-8B"], flag, value)
    report = lint_copy(tmp_path, "Qwen3-8B", text)
    assert report.outcome is Outcome.PASSED
    assert [(finding.flag, finding.line) for finding in report.findings] == [(flag, line_of(text, flag))]


# The publisher's own file in place of the toml


def transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5 writes it."""
    moved = {"torch_dtype", "rope_theta", "rope_scaling"}
    return {key: value for key, value in config.items() if key not in moved} | {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": config["rope_theta"], "rope_type": "default"},
    }


@pytest.mark.parametrize("convert", [dict, transformers_5], ids=["config.json", "transformers-5"])
@pytest.mark.parametrize(("name", "broken"), BREAKS[::7])
def test_the_publishers_json_says_the_same(name: str, broken: Break, convert: Any, tmp_path: Path) -> None:
    text = edit(TEXTS[name], broken.flag, broken.value)
    (tmp_path / "json").mkdir()
    toml = lint_copy(tmp_path, name, text).findings
    json = lint_copy(tmp_path / "json", name, text, convert(CONFIGS[name])).findings
    assert errors(toml, "reference") == errors(json, "reference") != []


@pytest.mark.parametrize("convert", [dict, transformers_5], ids=["config.json", "transformers-5"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_publishers_json_passes(name: str, convert: Any, tmp_path: Path) -> None:
    report = lint_copy(tmp_path, name, TEXTS[name], convert(CONFIGS[name]))
    assert report.outcome is Outcome.PASSED
    (finding,) = report.findings
    assert "no parameter count is published" in finding.message


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, id="llama3"),
        pytest.param({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, id="yarn"),
        pytest.param({"rope_scaling": {"type": "linear", "factor": 2.0}}, id="linear"),
        pytest.param({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, id="dynamic"),
        pytest.param({"partial_rotary_factor": 0.5}, id="partial-rotary"),
        pytest.param({"hidden_act": "gelu"}, id="gelu"),
        pytest.param({"hidden_act": "relu2"}, id="squared-relu"),
        pytest.param({"attention_bias": True}, id="attention-bias"),
        pytest.param(
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, id="sliding-window"
        ),
        pytest.param(
            {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 36}, id="sliding-layer-types"
        ),
    ],
)
def test_a_published_feature_that_the_preset_lacks_is_an_error(
    change: dict[str, Any], tmp_path: Path
) -> None:
    report = lint_copy(tmp_path, "Qwen3-8B", TEXTS["Qwen3-8B"], CONFIGS["Qwen3-8B"] | change)
    assert report.outcome is Outcome.FAILED
    assert errors(report.findings, "reference")


# Every flag of the table that changes the model


MODEL_FLAGS = {spec.name: spec for spec in flag_table().values() if spec.role is Role.MODEL}
INERT = {  # flags of which a value away from the default leaves this model as it is, and why
    "--apply-query-key-layer-scaling": "scales the logits down and up again",
    "--attention-softmax-in-fp32": "precision of the run",
    "--make-vocab-size-divisible-by": "has no effect beside --padded-vocab-size",
    "--moe-router-dtype": "precision of the run",
    "--no-position-embedding": "rotary positions have no table",
    "--rope-scaling-factor": "has no effect without --use-rope-scaling",
    "--seq-length": "the length of the run",
    "--use-rotary-position-embeddings": "another word for --position-embedding-type rope",
    "--vocab-size": "has no effect beside --padded-vocab-size",
}


TRAINING_ONLY = {"aux_loss", "seq_aux_loss", "global_aux_loss"}  # kinds of load balancing


def another_value(spec: FlagSpec, present: str | None) -> str:
    """A value of the flag's type that is not the effective one."""
    if spec.values == "0":
        return ""
    if spec.choices:
        taken = {present or spec.default, *TRAINING_ONLY}
        return next(choice for choice in spec.choices if choice not in taken)
    if spec.type in ("int", "float", "int or list expression"):
        number = float(present or spec.default or 0)
        return str(number / 2 + 0.25) if spec.type == "float" else str(int(number) + 3)
    return "127,0" if spec.type == "comma-separated ints" else "other"


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        (name, flag)
        for name, models_all in (("Qwen3-8B", False), ("Qwen3-30B-A3B", True))
        for flag, spec in MODEL_FLAGS.items()
        if flag not in INERT and (models_all or spec.dest not in MODELLED)
    ],
)
def test_no_flag_that_changes_the_model_passes_silently(name: str, flag: str, tmp_path: Path) -> None:
    spec, text = MODEL_FLAGS[flag], TEXTS[name]
    if spec.values == "0" and line_of(text, flag) is not None:
        text = edit(text, flag, None)
    else:
        text = edit(text, flag, another_value(spec, value_of(text, flag)))
    assert text != TEXTS[name]
    report = lint_copy(tmp_path, name, text)
    assert flag in {finding.flag for finding in report.findings}
    if spec.dest not in MODELLED:
        assert report.outcome is Outcome.FAILED


@pytest.mark.parametrize("flag", [name for name in INERT if MODEL_FLAGS[name].dest not in ("vocab_size",)])
def test_a_flag_without_effect_is_not_an_error(flag: str, tmp_path: Path) -> None:
    text, spec = TEXTS["Qwen3-30B-A3B"], MODEL_FLAGS[flag]
    edited = edit(text, flag, another_value(spec, value_of(text, flag)))
    assert lint_copy(tmp_path, "Qwen3-30B-A3B", edited).outcome is Outcome.PASSED


def test_the_published_counts_are_a_second_witness(tmp_path: Path) -> None:
    text = edit(TEXTS["Qwen3-8B"], "--ffn-hidden-size", "12416")
    (finding,) = errors(lint_copy(tmp_path, "Qwen3-8B", text).findings, "audit")
    assert finding.expected == FACTS["Qwen3-8B"]["params"]["total"]
    assert finding.actual - finding.expected == 36 * 3 * 128 * 4096
    assert re.match(
        r"total parameters: 8,190,735,360 published, 8,247,358,464 in this preset", finding.message
    )
