"""What each family alone has: its figures changed, what no flag can make, what its model depends on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from broken import TREE, edit, errors, line_of

from harness.arguments import resolve
from harness.arguments.effective import NO_EFFECT, effective
from harness.facts import Facts, facts_beside
from harness.families import FAMILIES, INERT_KEYS, Expectation, Limit, expectations
from harness.finding import Finding, Severity
from harness.flags import parse_flags
from harness.pipeline import lint
from harness.preset import PresetFile, discover, find_presets, load_preset, preset_at
from harness.reference import compare
from harness.shell import Word

PRESETS = {file.path.stem: file for file in discover(TREE)}


def facts_of(name: str) -> Facts:
    facts, _ = facts_beside(PRESETS[name].path)
    assert facts is not None
    return facts


def compared(name: str, **config: Any) -> tuple[Finding, ...]:
    """Reference findings of a preset as it stands, with other published figures."""
    facts = facts_of(name)
    arguments = load_preset(PRESETS[name]).arguments
    assert arguments is not None
    changed = {key: value for key, value in {**facts.config, **config}.items() if value is not ...}
    return compare(arguments, replace(facts, config=changed))


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


@pytest.mark.parametrize("file", PRESETS.values(), ids=lambda file: file.name)
def test_the_catalogue_has_no_error(file: PresetFile) -> None:
    report = lint(file)
    assert errors(report.findings) == []
    assert report.stages[1].detail.startswith("compared with ")


def test_every_family_is_one_of_the_catalogue() -> None:
    rows = {family.model_type for family in FAMILIES}
    presets = {facts_of(name).config["model_type"] for name in PRESETS}
    # Two names without a preset: a text model's outer one, and one that Mixtral and Phi are written after.
    assert rows - presets == {"llama4", "mistral"}
    assert presets <= rows


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_an_empty_config_is_no_guess(family: Any) -> None:
    """What is expected with nothing published comes from the modeling code alone."""
    for item in expectations(family, {}):
        if isinstance(item, Expectation):
            assert item.source


# Messages


MESSAGES = [
    pytest.param(
        "DeepSeek-R1",
        {"first_k_dense_replace": 1},
        "--moe-layer-freq [0]*3+[1]*58: [0]*1+[1]*60 published (first_k_dense_replace, moe_layer_freq)",
        id="dense-first",
    ),
    pytest.param(
        "Llama-4-Maverick-17B-128E-Instruct",
        {"interleave_moe_layer_step": 3},
        "--moe-layer-freq ([0]*1+[1]*1)*24: ([0]*2+[1]*1)*16 published (interleave_moe_layer_step)",
        id="interleaved-experts",
    ),
    pytest.param(
        "Llama-4-Maverick-17B-128E-Instruct",
        {"no_rope_layers": [1, 0] * 24},
        "--no-rope-freq ([0]*3+[1]*1)*12: ([0]*1+[1]*1)*24 published (no_rope_layers)",
        id="layers-without-positions",
    ),
    pytest.param(
        "gpt-oss-20b",
        {"sliding_window": 129},
        "--window-size 127,0: 128,0 published (sliding_window)",
        id="window",
    ),
    pytest.param(
        "gpt-oss-20b",
        {"layer_types": ["full_attention", "sliding_attention"] * 12},
        "--window-attn-skip-freq ([1]*1+[0]*1)*12: ([0]*1+[1]*1)*12 published (layer_types)",
        id="windowed-layers",
    ),
    pytest.param(
        "gpt-oss-20b",
        {"swiglu_limit": 8.0},
        "--activation-func-clamp-value 7.0: 8.0 published (swiglu_limit)",
        id="clamp",
    ),
    pytest.param(
        "Nemotron-H-8B-Base-8K",
        {"hybrid_override_pattern": "M-M-*-M" + "-M" * 22 + "-"},
        "--hybrid-layer-pattern: layer 4 is M (Mamba), * (attention) published (hybrid_override_pattern)",
        id="first-other-layer",
    ),
    pytest.param(
        "Nemotron-H-8B-Base-8K",
        {"hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M"},
        "--hybrid-layer-pattern: 52 layers, 51 published (hybrid_override_pattern)",
        id="layers-too-many",
    ),
    pytest.param(
        "Qwen3-Next-80B-A3B-Instruct",
        {"full_attention_interval": 3},
        "--hybrid-layer-pattern: layer 4 is G (a gated delta net), * (attention) published "
        "(full_attention_interval)",
        id="two-layers-for-one",
    ),
    pytest.param(
        "DeepSeek-R1",
        {"n_shared_experts": 2},
        "--moe-shared-expert-intermediate-size 2048: 4096 published (n_shared_experts x "
        "moe_intermediate_size)",
        id="shared-experts",
    ),
    pytest.param(
        "DeepSeek-V2-Lite",
        {"q_lora_rank": 1536},
        "--q-lora-rank is not set and Megatron's default is none: 1536 published (q_lora_rank)",
        id="query-latent",
    ),
    pytest.param(
        "Nemotron-H-8B-Base-8K",
        {"ssm_state_size": 256},
        "--mamba-state-dim 128: 256 published (ssm_state_size)",
        id="mamba-state",
    ),
    pytest.param(
        "MiniMax-M2",
        {"rotary_dim": 128},
        "--rotary-percent 0.5: 1.0 published (rotary_dim / head_dim)",
        id="rotated-channels",
    ),
    pytest.param(
        "Qwen3-8B",
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0},
        "--window-size is not set and Megatron's default is none: 4095,0 published (sliding_window)",
        id="window-missing",
    ),
    pytest.param(
        "DeepSeek-R1",
        {"topk_method": "other"},
        "topk_method other published, and the harness does not model it: nothing here says whether the "
        "preset means the same",
        id="other-method",
    ),
]


@pytest.mark.parametrize(("name", "config", "message"), MESSAGES)
def test_a_difference_is_named(name: str, config: dict[str, Any], message: str) -> None:
    (finding,) = errors(compared(name, **config))
    assert finding.message == message


LIMITS = [
    pytest.param("DeepSeek-R1", {"norm_topk_prob": False}, "norm_topk_prob off", id="scores-as-they-are"),
    pytest.param("DeepSeek-R1", {"attention_bias": True}, "attention_bias on", id="bias-of-latents"),
    pytest.param("DeepSeek-R1", {"rope_interleave": False}, "rope_interleave off", id="halves-rotated"),
    pytest.param(
        "DeepSeek-R1", {"num_experts_per_tok": 4}, "groups of experts chosen by the sum of", id="groups"
    ),
    pytest.param("DeepSeek-R1", {"rms_norm_eps": 1e-5}, "epsilon 1e-06 in the norms", id="latent-epsilon"),
    pytest.param("Kimi-K2-Instruct", {}, "beta_fast 1.0", id="beta-fast"),
    pytest.param("MiniMax-M2", {}, "one norm of queries and one of keys over all heads", id="norm-of-heads"),
    pytest.param("Llama-4-Scout-17B-16E-Instruct", {}, "an L2 norm on the layers with", id="l2-norm"),
    pytest.param("Llama-4-Scout-17B-16E-Instruct", {}, "attention in chunks of 8192", id="chunks"),
    pytest.param("Llama-4-Scout-17B-16E-Instruct", {}, "attn_scale 0.1 by position", id="temperature"),
    pytest.param(
        "Llama-4-Scout-17B-16E-Instruct", {"num_experts_per_tok": 2}, "norm_topk_prob off", id="two-experts"
    ),
    pytest.param("Nemotron-H-8B-Base-8K", {"conv_kernel": 8}, "conv_kernel 8", id="convolution"),
    pytest.param("Nemotron-H-8B-Base-8K", {"use_conv_bias": False}, "use_conv_bias off", id="no-bias"),
    pytest.param("Nemotron-H-8B-Base-8K", {"use_bias": True}, "use_bias on", id="mamba-bias"),
    pytest.param("Nemotron-H-8B-Base-8K", {"mamba_hidden_act": "gelu"}, "mamba_hidden_act gelu", id="act"),
    pytest.param(
        "Nemotron-H-8B-Base-8K", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06", id="mixer-epsilon"
    ),
    pytest.param(
        "Nemotron-H-8B-Base-8K", {"time_step_limit": [0.0, 1.0]}, "time steps between 0.0 and 1.0", id="steps"
    ),
    pytest.param("Qwen3-Next-80B-A3B-Instruct", {}, "plain weights in the output norm", id="delta-norm"),
    pytest.param("Qwen3-8B", {"attention_bias": True}, "biases on in the output of attention", id="one-bias"),
    pytest.param("Qwen3-30B-A3B", {"num_experts_per_tok": 1}, "norm_topk_prob on", id="one-expert"),
    pytest.param(
        "gpt-oss-20b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5", id="share-of-yarn"
    ),
]


@pytest.mark.parametrize(("name", "config", "published"), LIMITS)
def test_what_no_flag_can_make_is_said(name: str, config: dict[str, Any], published: str) -> None:
    found = [finding for finding in compared(name, **config) if finding.message.startswith(published)]
    (finding,) = found
    assert (finding.severity, finding.flag) == (Severity.WARNING, None)
    assert ", which no flag can make: Megatron builds " in finding.message


@pytest.mark.parametrize(
    ("name", "config", "published"),
    [
        pytest.param(
            "Kimi-K2-Instruct", {"rope_scaling": {"type": "yarn", "factor": 32.0}}, "beta", id="yarn"
        ),
        pytest.param("MiniMax-M2", {"use_qk_norm": False}, "one norm", id="no-norm"),
        pytest.param(
            "Llama-4-Scout-17B-16E-Instruct", {"attention_chunk_size": None}, "attention", id="whole"
        ),
        pytest.param(
            "Llama-4-Scout-17B-16E-Instruct", {"attn_temperature_tuning": False}, "attn_scale", id="untuned"
        ),
        pytest.param(
            "Llama-4-Scout-17B-16E-Instruct", {"no_rope_layers": [1] * 48}, "an L2 norm", id="all-rotated"
        ),
        pytest.param("Nemotron-H-8B-Base-8K", {"time_step_limit": [0.0, 1e308]}, "time steps", id="no-limit"),
    ],
)
def test_a_limit_is_decided_by_the_figures(name: str, config: dict[str, Any], published: str) -> None:
    assert not [finding for finding in compared(name, **config) if finding.message.startswith(published)]


def test_a_limit_never_stands_for_a_wrong_flag() -> None:
    for name in PRESETS:
        facts = facts_of(name)
        assert facts.family is not None
        limits = [item for item in expectations(facts.family, facts.config) if isinstance(item, Limit)]
        assert all(item.published and item.source and item.built and item.effect for item in limits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DeepSeek-R1", "the published multi-token prediction (num_nextn_predict_layers 1) is left out: "),
        ("MiniMax-M2", "the published multi-token prediction (num_mtp_modules 3) is left out: "),
    ],
)
def test_what_is_left_out_is_said_once(name: str, message: str) -> None:
    (finding,) = [finding for finding in compared(name) if "left out" in finding.message]
    assert finding.message == message + "the next token does not depend on it"
    assert finding.severity is Severity.WARNING


def test_a_vision_encoder_is_left_out() -> None:
    found = compared("Llama-4-Maverick-17B-128E-Instruct", vision_config={"hidden_size": 1408})
    assert (
        "the published vision encoder (vision_config) is left out: the next token does not depend on it"
        in {finding.message for finding in found}
    )


# Where the figures come from


def write(folder: Path, name: str, suffix: str, text: str) -> Facts | None:
    path = folder / "Nobody" / f"{name}.sh"
    path.parent.mkdir(exist_ok=True)
    path.with_name(name + suffix).write_text(text)
    return facts_beside(path)[0]


def test_recalled_figures_are_never_used(tmp_path: Path) -> None:
    text = '[config]\nmodel_type = "qwen3"\n[recalled]\nrms_norm_eps = 1e-6\nhead_dim = 128\n'
    facts = write(tmp_path, "M", ".toml", text)
    assert facts is not None and dict(facts.config) == {"model_type": "qwen3"}


def test_figures_that_change_are_read_again_and_others_are_not(tmp_path: Path) -> None:
    old, new = "[config]\nhidden_size = 64\n", "[config]\nhidden_size = 65\n"
    first = write(tmp_path, "M", ".toml", old)
    assert first is not None and write(tmp_path, "M", ".toml", old) is first
    again = write(tmp_path, "M", ".toml", new)
    assert again is not None
    assert (first.config["hidden_size"], again.config["hidden_size"]) == (64, 65)


def test_what_the_code_fixes_fills_in_and_prose_does_not(tmp_path: Path) -> None:
    text = """
        [config]
        rope_theta = 1
        [config.rope_scaling]
        null_keys = ["factor"]
        [architecture]
        rope_theta = 2
        partial_rotary_factor = 0.5
        attention_qkv_bias = true
        sliding_window = "128, every other layer"
        confidence = "read"
        read_from = "transformers models/glm4_moe"
        [derived]
        head_dim = 64
        tie_word_embeddings = false
        how = "by the exact count"
    """
    facts = write(tmp_path, "M", ".toml", text)
    assert facts is not None
    assert dict(facts.config) == {
        "rope_theta": 1,
        "rope_scaling": {"factor": None},
        "partial_rotary_factor": 0.5,
        "attention_qkv_bias": True,
        "attention_bias": True,
        "model_type": "glm4_moe",
        "tie_word_embeddings": False,
    }
    assert facts.published == {"rope_theta", "rope_scaling"}


def test_code_of_two_families_names_none(tmp_path: Path) -> None:
    text = '[config]\nx = 1\n[architecture]\nread_from = "models/qwen2, and models/qwen3"\n'
    facts = write(tmp_path, "M", ".toml", text)
    assert facts is not None and facts.family is None


def as_json(name: str, *, transformers_5: bool) -> str:
    """The catalogue's figures as Hugging Face's file has them, of a part of a model in its own table."""
    config = dict(facts_of(name).config)
    if transformers_5:
        scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
        moved = {key: config.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in config}
        config["rope_parameters"] = {**scaling, **moved}
        config["dtype"] = config.pop("torch_dtype", config.get("dtype"))
    if config["model_type"] == "llama4_text":
        config = {"model_type": "llama4", "text_config": config, "vision_config": {"hidden_size": 1408}}
    return json.dumps(config)


@pytest.mark.parametrize("transformers_5", [False, True], ids=["config.json", "transformers-5"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_publishers_json_says_the_same(name: str, transformers_5: bool, tmp_path: Path) -> None:
    facts = write(tmp_path, name, ".config.json", as_json(name, transformers_5=transformers_5))
    arguments = load_preset(PRESETS[name]).arguments
    assert facts is not None and arguments is not None
    ours = [finding for finding in compared(name) if "does not say" not in finding.message]
    theirs = [finding for finding in compare(arguments, facts) if "does not say" not in finding.message]
    extra = {finding.message for finding in theirs} - {finding.message for finding in ours}
    # Keys that fill in for the publisher's are the publisher's here, and said where nothing reads them.
    assert all("the harness does not read" in text or "vision encoder" in text for text in extra)
    assert {finding.message for finding in ours} <= {finding.message for finding in theirs}
    assert errors(tuple(theirs)) == []


# Every published key


SILENT = {  # families and keys whose change alters nothing in these models, and why
    ("gpt_oss", "hidden_act"): "its code has one activation",
    ("qwen2", "use_sliding_window"): "no layer lies beyond max_window_layers",
    ("qwen2", "sliding_window"): "switched off",
    ("qwen2", "max_window_layers"): "switched off",
    ("qwen3", "use_sliding_window"): "no width is published",
    ("qwen3", "sliding_window"): "switched off",
    ("qwen3", "max_window_layers"): "switched off",
    ("qwen3_moe", "use_sliding_window"): "no width is published",
    ("qwen3_moe", "sliding_window"): "switched off",
    ("deepseek_v2", "n_group"): "greedy",
    ("deepseek_v2", "topk_group"): "greedy",
    ("kimi_k2", "topk_group"): "one group",
    ("nemotron_h", "topk_group"): "one group",
}


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return value[1:] or [0]
    return {str: "other", dict: {}, type(None): 3}[type(value)]


@pytest.mark.parametrize("name", PRESETS)
def test_no_published_figure_is_overlooked(name: str) -> None:
    """Each published key changed, also those of the scaling: the preset no longer agrees with it."""
    facts = facts_of(name)
    family = facts.family
    assert family is not None
    before = compared(name)
    read = facts.published - INERT_KEYS - family.unused
    changes = {key: {key: another(facts.config[key])} for key in read}
    scaling = facts.config.get("rope_scaling") if family.rotary else None
    for key, value in (scaling or {}).items():
        changes[f"rope_scaling.{key}"] = {
            "rope_scaling": {**facts.config["rope_scaling"], key: another(value)}
        }
    overlooked = {key for key, change in changes.items() if compared(name, **change) == before}
    assert overlooked <= {key for model_type, key in SILENT if model_type == family.model_type}


STRANGE = (
    None,
    0,
    -1,
    True,
    "36",
    "a b",
    [[]],
    [None],
    {"a": []},
    float("inf"),
    float("nan"),
    10**9,
    10**400,
)


@pytest.mark.parametrize("name", {facts_of(name).config["model_type"]: name for name in PRESETS}.values())
def test_strange_figures_never_raise(name: str) -> None:
    facts = facts_of(name)
    others = ("layer_types", "no_rope_layers", "moe_layers", "rope_parameters", "scoring_func", "rotary_dim")
    for key in {*facts.config, *others} - INERT_KEYS:
        for value in STRANGE:
            compared(name, **{key: value})
    for key in facts.config:
        compared(name, **{key: ...})
    for key in facts.config.get("rope_scaling") or ():
        for value in STRANGE:
            compared(name, rope_scaling={**facts.config["rope_scaling"], key: value})


# What the model depends on


def arguments_of(*words: str) -> Any:
    flags, _ = parse_flags([Word(word, 1, 1, quoted=False) for word in words])
    return resolve(flags)[0]


BASE = ("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4")
ROPE = ("--position-embedding-type", "rope")
MLA = ("--multi-latent-attention", *ROPE)
MOE = ("--num-experts", "8")


@pytest.mark.parametrize(
    ("words", "dest"),
    [
        pytest.param(MLA, "kv_channels", id="head-size-of-latent-attention"),
        pytest.param(MLA, "num_query_groups", id="groups-of-latent-attention"),
        pytest.param(("--position-embedding-type", "none"), "rotary_base", id="base-without-positions"),
        pytest.param((), "rotary_base", id="base-with-a-learned-table"),
        pytest.param(ROPE, "mscale", id="scale-of-plain-positions"),
        pytest.param(MLA, "mscale", id="scale-times-nothing"),
        pytest.param((), "window_attn_skip_freq", id="skipped-windows-without-one"),
        pytest.param((), "moe_router_topk", id="top-k-without-experts"),
        pytest.param(("--squared-relu",), "glu_linear_offset", id="offset-without-a-gate"),
        pytest.param(("--export-qk-l2-norm", "--qk-layernorm"), "qk_layernorm", id="beside-the-l2-norm"),
        pytest.param(
            (*MOE, "--moe-router-score-function", "sigmoid"), "moe_router_pre_softmax", id="no-softmax"
        ),
    ],
)
def test_what_the_model_does_not_depend_on(words: tuple[str, ...], dest: str) -> None:
    assert effective(arguments_of(*BASE, *words), dest) is NO_EFFECT


@pytest.mark.parametrize(
    ("words", "dest", "value"),
    [
        pytest.param(MLA, "rope_type", "rope", id="yarn-by-one"),
        pytest.param((*MLA, "--rotary-scaling-factor", "40"), "rope_type", "yarn", id="latent-default"),
        pytest.param(ROPE, "rope_type", "rope", id="grouped-default"),
        pytest.param(
            (*MLA[:1], "--position-embedding-type", "none"), "position_embedding_type", "rope", id="own"
        ),
        pytest.param((), "position_embedding_type", "learned_absolute", id="table"),
        pytest.param(
            (*MOE, "--moe-router-topk-scaling-factor", "1.0"),
            "moe_router_topk_scaling_factor",
            None,
            id="scaled-by-one",
        ),
        pytest.param(
            (*MOE, "--moe-router-num-groups", "1", "--moe-router-group-topk", "1"),
            "moe_router_num_groups",
            None,
            id="one-group",
        ),
        pytest.param(
            (*MOE, "--moe-router-num-groups", "4", "--moe-router-group-topk", "2"),
            "moe_router_group_topk",
            2,
            id="two-of-four-groups",
        ),
        pytest.param((*ROPE, "--no-rope-freq", "2"), "no_rope_freq", (0, 1, 0, 1), id="every-second"),
        pytest.param(
            (*MOE, "--moe-layer-freq", "2"), "moe_layer_freq", (1, 0, 1, 0), id="moe-from-the-first"
        ),
    ],
)
def test_what_it_depends_on(words: tuple[str, ...], dest: str, value: object) -> None:
    assert effective(arguments_of(*BASE, *words), dest) == value
