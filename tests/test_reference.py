"""What the comparison with the publisher says, word by word, and facts that are not what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from broken import CONFIGS, FACTS, MOE, PRESETS, TEXTS, edit, errors, line_of, lint_copy, within, write_copy

from harness.case import Outcome
from harness.families import FAMILIES, Expectation, expectations
from harness.finding import Finding, Severity
from harness.pipeline import lint
from harness.preset import preset_at
from harness.reference import facts_beside

DENSE = TEXTS["Qwen3-8B"]


def reference(folder: Path, name: str, changes: dict[str, str | None], **config: Any) -> list[Finding]:
    """Reference findings of a preset with these changes; ``config`` changes the published figures."""
    text = TEXTS[name]
    for flag, value in changes.items():
        text = edit(text, flag, value)
    report = lint_copy(folder, name, text, CONFIGS[name] | config if config else None)
    return [finding for finding in report.findings if finding.stage == "reference"]


# Messages


@pytest.mark.parametrize(
    ("name", "flag", "value", "message"),
    [
        pytest.param(
            "Qwen3-8B",
            "--num-query-groups",
            "16",
            "--num-query-groups 16: 8 published (num_key_value_heads)",
            id="given",
        ),
        pytest.param(
            "Qwen3-8B",
            "--norm-epsilon",
            None,
            "--norm-epsilon is not set and Megatron's default is 1e-05: 1e-06 published (rms_norm_eps)",
            id="default",
        ),
        pytest.param(
            "Qwen3-30B-A3B",
            "--kv-channels",
            None,
            "kv_channels is 64 (--kv-channels is not set: --hidden-size / --num-attention-heads): "
            "128 published (head_dim)",
            id="derived",
        ),
        pytest.param(
            "Qwen3-8B",
            "--group-query-attention",
            None,
            "num_query_groups is 32 (--group-query-attention is not set, so every head is its own group): "
            "8 published (num_key_value_heads)",
            id="derived-from-another-flag",
        ),
        pytest.param(
            "Qwen3-8B",
            "--qk-layernorm",
            None,
            "--qk-layernorm is not set and Megatron's default is off: on published "
            "(models/qwen3/modeling_qwen3.py)",
            id="switch-missing",
        ),
        pytest.param(
            "Qwen2.5-7B-Instruct",
            "--qk-layernorm",
            "",
            "--qk-layernorm: off published (models/qwen2/modeling_qwen2.py)",
            id="switch-added",
        ),
        pytest.param(
            "Qwen3-8B",
            "--rotary-seq-len-interpolation-factor",
            "4",
            "--rotary-seq-len-interpolation-factor 4: none published (rope_scaling)",
            id="none",
        ),
        pytest.param(
            "Qwen3-30B-A3B",
            "--moe-layer-freq",
            "([0]*3+[1]*45)",
            "--moe-layer-freq [0]*3+[1]*45: [1]*48 published (decoder_sparse_step, mlp_only_layers)",
            id="pattern",
        ),
        pytest.param(
            "Qwen3-8B",
            "--max-position-embeddings",
            "32768",
            "--max-position-embeddings 32768: 40960 published (max_position_embeddings); "
            "rotary positions have no table, so this changes no logit",
            id="reason",
        ),
        pytest.param(
            "Qwen3-8B",
            "--window-size",
            "127,0",
            "--window-size 127,0: none published (use_sliding_window)",
            id="window",
        ),
        pytest.param(
            "Qwen3-30B-A3B",
            "--moe-layer-freq",
            "([0,1]*24)",
            "--moe-layer-freq ([0]*1+[1]*1)*24: [1]*48 published (decoder_sparse_step, mlp_only_layers)",
            id="repeated-pattern",
        ),
        pytest.param(
            "Qwen3-30B-A3B",
            "--ffn-hidden-size",
            "4096",
            "--ffn-hidden-size 4096: 6144 published (intermediate_size); no layer is dense, so nothing has "
            "this size",
            id="size-of-no-layer",
        ),
    ],
)
def test_message(name: str, flag: str, value: str | None, message: str, tmp_path: Path) -> None:
    (finding,) = reference(tmp_path, name, {flag: value})
    assert finding.message == message
    assert (finding.flag, finding.line) == (flag, line_of(edit(TEXTS[name], flag, value), flag))


def test_an_unmodelled_flag_says_that_nothing_vouches_for_it(tmp_path: Path) -> None:
    (finding,) = reference(tmp_path, "Qwen3-8B", {"--mtp-num-layers": "1"})
    assert finding.message.endswith(
        "and the harness does not model it: nothing here says whether its value is right"
    )
    assert (finding.severity, finding.actual) == (Severity.ERROR, 1)


def test_each_wrong_field_is_a_finding_of_its_own(tmp_path: Path) -> None:
    changes = {"--hidden-size": "2048", "--rotary-base": "10000", "--swiglu": None}
    found = reference(tmp_path, "Qwen3-8B", dict(changes))
    assert [finding.flag for finding in found] == list(changes)


# A vocabulary that is left to the tokenizer: 151936 is 1187 times 128, token ids go up to 151645


@pytest.mark.parametrize(
    ("multiple", "severity", "message"),
    [
        pytest.param("1187", None, "", id="1187-proves-it"),
        pytest.param("151936", None, "", id="its-own-size-proves-it"),
        pytest.param(
            "128",
            Severity.WARNING,
            "the vocabulary is left to the tokenizer and padded to a multiple of 128: it may come to "
            "anything from 151680 to 151936, 151936 published (vocab_size); set --padded-vocab-size",
            id="128-is-undecided",
        ),
        pytest.param("1", Severity.WARNING, "anything from 151646 to 151936", id="1-is-undecided"),
        pytest.param(
            "1188",
            Severity.ERROR,
            "a vocabulary padded to a multiple of 1188 cannot come to 151936 published (vocab_size)",
            id="1188-cannot",
        ),
        pytest.param("256", Severity.ERROR, "a multiple of 256 cannot come to 151936", id="256-cannot"),
        pytest.param("303872", Severity.ERROR, "cannot come to 151936", id="twice-its-size-cannot"),
    ],
)
def test_a_vocabulary_left_to_the_tokenizer(
    multiple: str, severity: Severity | None, message: str, tmp_path: Path
) -> None:
    flag = "--make-vocab-size-divisible-by"
    changes = {"--padded-vocab-size": None, flag: multiple}
    found = reference(tmp_path, "Qwen3-8B", changes)
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    for finding in found:
        assert message in finding.message
        assert (finding.flag, finding.expected) == (flag, 151936)
        assert finding.line is not None


def test_the_default_multiple_is_undecided_too(tmp_path: Path) -> None:
    (finding,) = reference(tmp_path, "Qwen3-8B", {"--padded-vocab-size": None})
    assert (finding.severity, finding.line) == (Severity.WARNING, None)
    assert finding.actual == "151680 to 151936"


@pytest.mark.parametrize(
    ("size", "multiple", "right"),
    [("151936", "128", True), ("151900", "128", True), ("151808", "128", False), ("151936", "256", False)],
)
def test_a_vocabulary_given_unpadded(size: str, multiple: str, right: bool, tmp_path: Path) -> None:
    changes = {
        "--tokenizer-type": "NullTokenizer",
        "--padded-vocab-size": None,
        "--vocab-size": size,
        "--make-vocab-size-divisible-by": multiple,
    }
    found = reference(tmp_path, "Qwen3-8B", changes)
    assert [(finding.flag, finding.severity) for finding in found] == (
        [] if right else [("--vocab-size", Severity.ERROR)]
    )


def test_a_vocabulary_that_the_tokenizer_overrides(tmp_path: Path) -> None:
    text = edit(edit(DENSE, "--padded-vocab-size", None), "--vocab-size", "151936")
    findings = lint_copy(tmp_path, "Qwen3-8B", text).findings
    assert [(finding.flag, finding.severity) for finding in findings] == [
        ("--vocab-size", Severity.WARNING),
        ("--make-vocab-size-divisible-by", Severity.WARNING),
    ]
    assert "--vocab-size has no effect with HuggingFaceTokenizer" in findings[0].message


# Facts that are missing or broken


def without_facts(folder: Path, text: str) -> Path:
    """A preset with no facts beside it, of a name that the catalogue does not have."""
    path = folder / "Nobody" / "Qwen3-8B.sh"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_without_facts_the_rest_is_still_checked(tmp_path: Path) -> None:
    path = without_facts(tmp_path, DENSE)
    report = lint(preset_at(path))
    assert report.outcome is Outcome.PASSED
    (finding,) = report.findings
    assert (finding.stage, finding.severity) == ("reference", Severity.WARNING)
    assert finding.message == (
        "no Qwen3-8B.toml or Qwen3-8B.config.json beside the preset, and the catalogue has none of that "
        "name: no value in it could be compared with what the publisher says, and the parameter counts "
        "could not be checked"
    )
    assert report.stages[2].detail == "8,190,735,360 parameters, 8,190,735,360 active"


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"--num-query-groups": "7"}, "--num-query-groups"),
        ({"--mtp-num-layers": "1"}, "--mtp-num-layers"),
        ({"--fp16": ""}, "--fp16"),
    ],
    ids=["refused", "not-modelled", "contradiction"],
)
def test_without_facts_a_contradiction_still_fails(change: dict[str, str], flag: str, tmp_path: Path) -> None:
    text = DENSE
    for name, value in change.items():
        text = edit(text, name, value)
    report = lint(preset_at(without_facts(tmp_path, text)))
    assert report.outcome is Outcome.FAILED
    assert flag in {finding.flag for finding in errors(report.findings)}


def test_without_facts_a_vocabulary_is_assumed_and_said(tmp_path: Path) -> None:
    path = without_facts(tmp_path, edit(DENSE, "--padded-vocab-size", None))
    found = lint(preset_at(path)).findings
    assert [finding.severity for finding in found] == [Severity.WARNING, Severity.WARNING]
    assert found[1].message == (
        "the vocabulary is left to the tokenizer and its size is not published: 131072 is assumed"
    )


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        pytest.param(".toml", b"[config\n", "Qwen3-8B.toml cannot be read: ", id="toml-syntax"),
        pytest.param(".toml", b"", "there is no [config] table", id="toml-empty"),
        pytest.param(
            ".toml", b"[params]\ntotal = 1\n", "there is no [config] table", id="toml-without-config"
        ),
        pytest.param(".toml", b"config = 3\n", "[config] is not a table", id="toml-config-number"),
        pytest.param(
            ".toml", b"params = 3\n[config]\nx = 1\n", "[params] is not a table", id="toml-params-number"
        ),
        pytest.param(".toml", b"\xff\xfe", "cannot be read", id="toml-not-utf-8"),
        pytest.param(".toml", b"#" * (2 << 20), "larger than", id="toml-huge"),
        pytest.param(".toml", b"[config]\nnull_keys = 3\n", "Qwen3-8B.toml", id="toml-null-keys-number"),
        pytest.param(".toml", b"[config]\nnull_keys = [[]]\n", "Qwen3-8B.toml", id="toml-null-keys-nested"),
        pytest.param(".toml", b"[config]\na=" + b"[" * 9999, "Qwen3-8B.toml cannot be read", id="toml-deep"),
        pytest.param(".config.json", b"{", "Qwen3-8B.config.json cannot be read: ", id="json-syntax"),
        pytest.param(".config.json", b"", "cannot be read", id="json-empty"),
        pytest.param(".config.json", b"[]", "it is not a JSON object", id="json-list"),
        pytest.param(".config.json", b"null", "it is not a JSON object", id="json-null"),
        pytest.param(".config.json", b"\xff", "cannot be read", id="json-not-utf-8"),
        pytest.param(".config.json", b'{"a":' + b"[" * 99999, "cannot be read", id="json-deep"),
        pytest.param(".config.json", b'{"a":' + b"1" * 9999 + b"}", "cannot be read", id="json-long-number"),
        pytest.param(".config.json", b"{}", "model_type None is a family", id="json-empty-object"),
    ],
)
def test_facts_that_cannot_be_read(suffix: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = write_copy(tmp_path, "Qwen3-8B", DENSE)
    path.with_suffix(".toml").unlink()
    path.with_suffix(suffix).write_bytes(content)
    with within(2.0):
        report = lint(preset_at(path))
    assert report.outcome is Outcome.FAILED
    (finding,) = errors(report.findings)
    assert finding.stage == "reference"
    assert message in finding.message
    assert report.stages[2].outcome is Outcome.PASSED, "the shapes are audited all the same"


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "Qwen3", "", None, 3, ["qwen3"], {"a": 1}], ids=repr)
def test_an_unknown_family_is_an_error(kind: object, tmp_path: Path) -> None:
    (finding,) = reference(tmp_path, "Qwen3-8B", {}, model_type=kind)
    assert finding.is_error
    assert finding.message == (
        f"Qwen3-8B.config.json: model_type {kind!r} is a family that the harness does not know: "
        "nothing could be compared with the publisher's figures"
    )


@pytest.mark.parametrize("folder", ["Qwen", "qwen", "QWEN"])
def test_facts_of_the_catalogue_serve_a_preset_of_another_tree(folder: str, tmp_path: Path) -> None:
    path = tmp_path / folder / "Qwen3-8B.sh"
    path.parent.mkdir()
    path.write_text(edit(DENSE, "--norm-epsilon", None))
    facts, findings = facts_beside(path)
    assert facts is not None and findings == ()
    assert facts.label == "the catalogue's Qwen/Qwen3-8B.toml"
    (finding,) = errors(lint(preset_at(path)).findings)
    assert finding.flag == "--norm-epsilon"


def test_facts_beside_a_preset_go_before_those_of_the_catalogue(tmp_path: Path) -> None:
    facts, _ = facts_beside(write_copy(tmp_path, "Qwen3-8B", DENSE))
    assert facts is not None and facts.label == "Qwen3-8B.toml"


@pytest.mark.parametrize("name", ["Qwen3-8B-Base", "Qwen3", "Qwen3-8B"])
def test_a_name_that_is_nearly_one_of_the_catalogue_has_no_facts(name: str, tmp_path: Path) -> None:
    (tmp_path / "Other").mkdir()
    facts, (finding,) = facts_beside(tmp_path / "Other" / f"{name}.sh")
    assert facts is None and finding.severity is Severity.WARNING


def test_a_toml_goes_before_a_json(tmp_path: Path) -> None:
    path = write_copy(tmp_path, "Qwen3-8B", DENSE)
    path.with_suffix(".config.json").write_text("{}")
    facts, findings = facts_beside(path)
    assert facts is not None and facts.path.name == "Qwen3-8B.toml"
    assert findings == ()


WITHOUT = {  # key that is left out, and the argument that cannot be checked then
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "padded_vocab_size",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "hidden_act": "swiglu",
    "attention_bias": "add_qkv_bias",
    "tie_word_embeddings": "untie_embeddings_and_output_weights",
    "num_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "norm_topk_prob": "moe_router_pre_softmax",
}


@pytest.mark.parametrize("key", WITHOUT)
def test_a_key_that_is_not_published_is_said(key: str, tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIGS["Qwen3-30B-A3B"].items() if name != key}
    report = lint_copy(tmp_path, "Qwen3-30B-A3B", TEXTS["Qwen3-30B-A3B"], config)
    assert report.outcome is Outcome.PASSED
    assert f"Qwen3-30B-A3B.config.json does not say {key}: {WITHOUT[key]} could not be checked" in {
        finding.message for finding in report.findings
    }


SILENT = {  # published keys that say nothing of the model's tensors or their arithmetic
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_window_layers",
    "output_router_logits",
    "router_aux_loss_coef",
    "transformers_version",
    "use_cache",
}


OTHERWISE: dict[str, dict[str, Any]] = {  # another value, where one more or the opposite will not do
    "hidden_act": {"hidden_act": "gelu"},
    "mlp_only_layers": {"mlp_only_layers": [0]},
    "model_type": {"model_type": "qwen2"},
    "rope_scaling": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "sliding_window": {"sliding_window": 4096, "use_sliding_window": True},
    "torch_dtype": {"torch_dtype": "float16"},
    "use_sliding_window": {"sliding_window": 4096, "use_sliding_window": True},
}


@pytest.mark.parametrize("key", sorted({*CONFIGS["Qwen3-30B-A3B"]} - SILENT))
def test_no_published_figure_is_overlooked(key: str, tmp_path: Path) -> None:
    """Each published key changed: the preset, which has the true value, no longer agrees."""
    value = CONFIGS["Qwen3-30B-A3B"][key]
    changed = OTHERWISE.get(key) or {key: not value if isinstance(value, bool) else value + 1}
    assert reference(tmp_path, "Qwen3-30B-A3B", {}, **changed)


def test_no_multi_head_attention_is_guessed_where_groups_are_null(tmp_path: Path) -> None:
    (finding,) = reference(tmp_path, "Qwen3-8B", {}, num_key_value_heads=None)
    assert (finding.flag, finding.expected, finding.actual) == ("--num-query-groups", 32, 8)


STRANGE = (None, 0, -1, True, "36", [[]], {"a": []}, float("inf"), float("nan"), 10**9, 10**400)


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    "key", sorted({*CONFIGS["Qwen3-30B-A3B"], "rope_parameters", "layer_types", "partial_rotary_factor"})
)
@pytest.mark.parametrize("name", ["Qwen2.5-7B-Instruct", "Qwen3-30B-A3B"])
def test_strange_facts_never_raise(name: str, key: str, value: object, tmp_path: Path) -> None:
    with within(2.0):
        reference(tmp_path, name, {}, **{key: value})


@pytest.mark.parametrize(
    "value", ["0", "-1", "true", "'many'", "[]", "1.5", "1" + "0" * 400], ids=lambda text: text[:9]
)
@pytest.mark.parametrize("key", ["total", "active"])
def test_strange_counts_never_raise(key: str, value: str, tmp_path: Path) -> None:
    path = write_copy(tmp_path, "Qwen3-30B-A3B", TEXTS["Qwen3-30B-A3B"])
    toml = path.with_suffix(".toml")
    toml.write_text(
        toml.read_text().replace(f"\n{key} = {FACTS['Qwen3-30B-A3B']['params'][key]}", f"\n{key} = {value}")
    )
    report = lint(preset_at(path))
    assert report.findings, "a count that is no count must not pass for the right one"


# Published features


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 8192
}
SCALED = {"--use-rope-scaling": "", "--rope-scaling-factor": "8.0"}


def test_llama_rope_scaling_that_both_have(tmp_path: Path) -> None:
    assert reference(tmp_path, "Qwen3-8B", dict(SCALED), rope_scaling=LLAMA3) == []


@pytest.mark.parametrize(
    ("changes", "scaling", "flag"),
    [
        pytest.param({}, LLAMA3, "--use-rope-scaling", id="not-set"),
        pytest.param(SCALED, LLAMA3 | {"factor": 32.0}, "--rope-scaling-factor", id="factor"),
    ],
)
def test_llama_rope_scaling_that_differs(
    changes: dict[str, str | None], scaling: dict[str, Any], flag: str, tmp_path: Path
) -> None:
    (finding,) = errors(tuple(reference(tmp_path, "Qwen3-8B", dict(changes), rope_scaling=scaling)))
    assert finding.flag == flag


@pytest.mark.parametrize(
    ("key", "value", "built"),
    [
        ("factor", 32.0, "8"),
        ("low_freq_factor", 2.0, "1"),
        ("high_freq_factor", 8.0, "4"),
        ("original_max_position_embeddings", 4096, "8192"),
    ],
)
def test_llama_rope_scaling_that_no_flag_can_make(key: str, value: float, built: str, tmp_path: Path) -> None:
    changes: dict[str, str | None] = {**SCALED, "--rope-scaling-factor": "32" if key == "factor" else "8"}
    (finding,) = reference(tmp_path, "Qwen3-8B", changes, rope_scaling=LLAMA3 | {key: value})[-1:]
    assert finding.severity is Severity.WARNING
    assert finding.message == (
        f"{key} {value} published (rope_scaling), which no flag can make: Megatron builds {built}, so the "
        "rotated queries and keys differ"
    )


def test_softmax_before_the_choice_where_probabilities_are_not_renormalised(tmp_path: Path) -> None:
    added: dict[str, str | None] = {"--moe-router-pre-softmax": ""}
    assert reference(tmp_path, "Qwen3-30B-A3B", added, norm_topk_prob=False) == []
    (finding,) = reference(tmp_path, "Qwen3-30B-A3B", {}, norm_topk_prob=False)
    assert (finding.flag, finding.expected, finding.actual) == ("--moe-router-pre-softmax", True, False)


@pytest.mark.parametrize(
    ("published", "pattern"),
    [
        ({"mlp_only_layers": [0, 1, 2]}, "([0]*3+[1]*45)"),
        ({"decoder_sparse_step": 2}, "([0,1]*24)"),
        ({"decoder_sparse_step": 4, "mlp_only_layers": [3]}, "([0]*7+[1]+[0,0,0,1]*10)"),
    ],
    ids=["dense-first", "every-second", "every-fourth-but-one"],
)
def test_which_layers_hold_experts(published: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    assert reference(tmp_path, "Qwen3-30B-A3B", {"--moe-layer-freq": pattern}, **published) == []
    (finding,) = reference(tmp_path, "Qwen3-30B-A3B", {}, **published)
    assert (finding.flag, finding.actual) == ("--moe-layer-freq", (1,) * 48)


def test_every_family_of_a_preset_is_a_row() -> None:
    assert {CONFIGS[name]["model_type"] for name in PRESETS} <= {family.model_type for family in FAMILIES}


@pytest.mark.parametrize("name", PRESETS)
def test_everything_published_is_checked(name: str) -> None:
    facts, _ = facts_beside(PRESETS[name].path)
    assert facts is not None and facts.family is not None
    items = list(expectations(facts.family, facts.config))
    assert all(isinstance(item, Expectation) for item in items)
    assert (facts.family.experts is not None) is (name in MOE)
    assert all(item.source for item in items if isinstance(item, Expectation))


def test_a_checkpoint_of_another_model_is_a_warning(tmp_path: Path) -> None:
    text = TEXTS["Qwen3-8B"].replace("HF_MODEL_CKPT=Qwen/Qwen3-8B", "HF_MODEL_CKPT=Qwen/Qwen3-8B-Base")
    report = lint(preset_at(write_copy(tmp_path, "Qwen3-8B", text)))
    (finding,) = report.findings
    assert (finding.severity, finding.flag, finding.line) == (Severity.WARNING, "HF_MODEL_CKPT", 4)
    assert finding.message == (
        "HF_MODEL_CKPT is Qwen/Qwen3-8B-Base, and the published figures are of Qwen/Qwen3-8B: other weights "
        "would be loaded"
    )


@pytest.mark.parametrize("checkpoint", ["/models/anything", "./Qwen3-8B", "Qwen/Qwen3-8B"])
def test_a_checkpoint_on_disk_may_be_anything(tmp_path: Path, checkpoint: str) -> None:
    text = TEXTS["Qwen3-8B"].replace("HF_MODEL_CKPT=Qwen/Qwen3-8B", f"HF_MODEL_CKPT={checkpoint}")
    assert lint(preset_at(write_copy(tmp_path, "Qwen3-8B", text))).findings == ()


@pytest.mark.parametrize("flag", ["--export-force-local-attention", "--export-te-mcore-model"])
def test_flags_that_choose_a_kernel_or_a_checkpoint_format_are_no_finding(tmp_path: Path, flag: str) -> None:
    text = TEXTS["Qwen3-8B"].replace("--bf16", f"--bf16 {flag}")
    assert lint(preset_at(write_copy(tmp_path, "Qwen3-8B", text))).findings == ()
