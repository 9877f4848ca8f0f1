"""Effective arguments against Megatron's own parser and validation, and what Megatron would refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from harness.arguments import How, resolve
from harness.finding import Severity
from harness.flags import parse_flags
from harness.preset import discover, load_preset
from harness.shell import Word
from harness.standins.output import captured

PRESETS = discover(Path(__file__).parent.parent / "presets")


def words(text: str) -> tuple[Word, ...]:
    """One line per flag, as in a preset."""
    return tuple(
        Word(word, line, 1, False)
        for line, row in enumerate(text.strip().splitlines(), start=1)
        for word in row.split()
    )


def resolved(text: str) -> tuple[Any, Any]:
    flags, wrong = parse_flags(words(text))
    assert not [finding for finding in wrong if finding.is_error]
    return resolve(flags)


BASE = """
--num-layers 4
--hidden-size 768
--num-attention-heads 12
--max-position-embeddings 2048
--seq-length 1024
--micro-batch-size 1
--tokenizer-type NullTokenizer
--vocab-size 1000
"""

VARIANTS = {
    "bare": "",
    "swiglu": "--swiglu",
    "swiglu-ffn": "--swiglu\n--ffn-hidden-size 2048",
    "quick-geglu": "--quick-geglu",
    "kv-channels": "--kv-channels 128",
    "gqa": "--group-query-attention\n--num-query-groups 4",
    "gqa-without-groups": "--group-query-attention",
    "no-bias": "--disable-bias-linear",
    "no-bias-qkv-bias": "--disable-bias-linear\n--add-qkv-bias",
    "old-rope-flag": "--use-rotary-position-embeddings",
    "rope": "--position-embedding-type rope",
    "zero-experts": "--num-experts 0",
    "experts": "--num-experts 8",
    "experts-with-ffn": "--num-experts 8\n--moe-ffn-hidden-size 512\n--moe-layer-freq ([0]*1+[1]*3)",
    "query-key-scaling": "--apply-query-key-layer-scaling",
    "bf16": "--bf16",
}

# Megatron keeps these as it finds them: the harness resolves what they come to in the model.
RESOLVED_FURTHER = frozenset({"num_query_groups"})


def megatron(text: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Megatron's own parser and validation arrive at."""
    with captured():
        from megatron.training.arguments import parse_args, validate_args

        monkeypatch.setattr(sys, "argv", ["quantize.py", *text.split()])
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("RANK", "0")
        arguments = parse_args()
        validate_args(arguments)
    return arguments


def model_arguments(values: Any) -> dict[str, Any]:
    from harness.flags import Role, flag_table

    dests = {spec.dest for spec in flag_table().values() if spec.role is Role.MODEL} - RESOLVED_FURTHER
    return {dest: values[dest] for dest in sorted(dests)}


def normal(value: Any) -> Any:
    """Lists as tuples, one-element lists as their element: Megatron unwraps those it knows."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 1 else tuple(value)
    return value


def assert_same(text: str, values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = vars(megatron(text, monkeypatch))
    ours = model_arguments(values)
    different = {
        dest: (value, theirs[dest])
        for dest, value in ours.items()
        if dest in theirs and normal(theirs[dest]) != normal(value) and dest not in _KNOWN
    }
    assert not different


_KNOWN = {
    "padded_vocab_size": "Megatron fills it in later, when it has the tokenizer",
    "encoder_num_layers": "a second name of num_layers, which Megatron sets to the same",
    "encoder_seq_length": "a second name of seq_length, which Megatron sets to the same",
    "mamba_inference_conv_states_dtype": "bf16 there is a torch dtype, here its name",
    "mamba_inference_ssm_states_dtype": "bf16 there is a torch dtype, here its name",
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_defaults_that_depend_on_flags_are_megatrons(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BASE + variant
    arguments, findings = resolved(text)
    assert not [finding for finding in findings if finding.is_error]
    assert_same(text, arguments.values, monkeypatch)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_presets_come_to_megatrons_values(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = load_preset(file)
    assert preset.arguments is not None
    text = " ".join(word for flag in preset.flags for word in (flag.name, *flag.words))
    assert_same(text, preset.arguments.values, monkeypatch)


REFUSED = {
    "bf16-and-fp16": ("--bf16\n--fp16", "--fp16", "contradicts --bf16 on line 9"),
    "two-activations": ("--swiglu\n--squared-relu", "--squared-relu", "contradicts --swiglu on line 9"),
    "groups-not-whole": ("--group-query-attention\n--num-query-groups 5", "--num-query-groups", "not whole"),
    "groups-without-gqa": ("--num-query-groups 4", "--num-query-groups", "no effect without --group-query"),
    "negative-ffn": ("--ffn-hidden-size -1", "--ffn-hidden-size", "must be positive"),
    "top-k-without-experts": ("--moe-router-topk 2", "--moe-router-topk", "no effect without --num-experts"),
    "top-k-above-experts": (
        "--num-experts 4\n--moe-router-topk 8",
        "--moe-router-topk",
        "larger than --num-experts (4)",
    ),
    "pattern-length": (
        "--num-experts 4\n--moe-layer-freq [0,1]",
        "--moe-layer-freq",
        "the pattern has 2 layers, --num-layers 4",
    ),
    "no-position-embedding": (
        "--no-position-embedding",
        "--no-position-embedding",
        "use --position-embedding-type",
    ),
}


@pytest.mark.parametrize(("extra", "flag", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_megatron_refuses_is_an_error_on_its_line(extra: str, flag: str, words: str) -> None:
    text = BASE + extra
    _, findings = resolved(text)
    line = next(n for n, row in enumerate(text.strip().splitlines(), 1) if row.split()[0] == flag)
    assert [(f.flag, f.line) for f in findings if f.is_error] == [(flag, line)]
    assert words in next(f.message for f in findings if f.is_error)


@pytest.mark.parametrize(
    "flag", ["--num-layers", "--hidden-size", "--num-attention-heads", "--max-position-embeddings"]
)
def test_a_missing_size_is_an_error(flag: str) -> None:
    text = "\n".join(row for row in BASE.splitlines() if not row.startswith(flag))
    _, findings = resolved(text)
    assert [f.flag for f in findings if f.is_error] == [flag]


@pytest.mark.parametrize("flag", ["--micro-batch-size", "--seq-length"])
def test_what_the_run_may_add_is_a_warning(flag: str) -> None:
    text = "\n".join(row for row in BASE.splitlines() if not row.startswith(flag))
    _, findings = resolved(text)
    assert [(f.flag, f.severity) for f in findings] == [(flag, Severity.WARNING)]


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    _, findings = resolved(BASE.replace("--seq-length 1024", "--seq-length 4096"))
    assert "larger than --max-position-embeddings (2048)" in findings[0].message


def test_origins_say_where_a_value_comes_from() -> None:
    arguments, _ = resolved(BASE + "--swiglu")
    assert (arguments.origin("hidden_size").how, arguments.origin("hidden_size").line) == (How.GIVEN, 2)
    assert arguments.origin("ffn_hidden_size").how is How.DERIVED
    assert arguments.origin("ffn_hidden_size").flag == "--ffn-hidden-size"
    assert arguments.origin("layernorm_epsilon").how is How.DEFAULT
    assert arguments.origin("layernorm_epsilon").flag == "--norm-epsilon"
    assert arguments.origin("add_qkv_bias").flag == "--disable-bias-linear"


def test_vocab_size_counts_only_without_a_tokenizer_of_its_own() -> None:
    arguments, _ = resolved(BASE)
    assert arguments["padded_vocab_size"] == 1024
    arguments, findings = resolved(BASE.replace("NullTokenizer", "HuggingFaceTokenizer"))
    assert arguments["padded_vocab_size"] is None
    assert "--vocab-size has no effect with HuggingFaceTokenizer" in findings[0].message
