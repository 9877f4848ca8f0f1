"""Effective arguments against Megatron's own parser and validation, and what Megatron would refuse."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.arguments import Arguments, How, resolve
from harness.finding import Severity
from harness.flags import Role, flag_table, parse_flags
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
    "quick-geglu": "--quick-geglu\n--no-bias-gelu-fusion",
    "kv-channels": "--kv-channels 128",
    "gqa": "--group-query-attention\n--num-query-groups 4",
    "gqa-without-groups": "--group-query-attention",
    "no-bias": "--disable-bias-linear",
    "no-bias-qkv-bias": "--disable-bias-linear\n--add-qkv-bias",
    "old-rope-flag": "--use-rotary-position-embeddings",
    "old-rope-flag-without-table": "--use-rotary-position-embeddings\n--no-position-embedding",
    "rope": "--position-embedding-type rope",
    "zero-experts": "--num-experts 0",
    "experts": "--num-experts 8\n--no-bias-gelu-fusion",
    "experts-with-ffn": (
        "--num-experts 8\n--moe-ffn-hidden-size 512\n--moe-layer-freq ([0]*1+[1]*3)\n--swiglu"
    ),
    "latent-experts": "--num-experts 8\n--moe-latent-size 256\n--swiglu",
    "query-key-scaling": "--apply-query-key-layer-scaling",
    "bf16": "--bf16",
    "latent-attention": "--multi-latent-attention\n--q-lora-rank 96\n--position-embedding-type rope",
    "latent-attention-rope": (
        "--multi-latent-attention\n--rope-type rope\n--position-embedding-type rope\n--no-rope-fusion"
    ),
    "windows": "--window-size 127,0\n--window-attn-skip-freq 2",
    "window-pattern": "--window-size 127,0\n--window-attn-skip-freq [1,1,1,0]",
    "no-rope": "--position-embedding-type rope\n--no-rope-freq 4",
    "yarn": "--position-embedding-type yarn\n--rotary-scaling-factor 32",
    "yarn-in-full": (
        "--position-embedding-type yarn\n--rotary-scaling-factor 32\n--yarn-beta-fast 16\n"
        "--yarn-original-max-position-embeddings 1024\n--no-yarn-correction-range-round-to-int"
    ),
    "gpt-oss": "--enable-gpt-oss\n--position-embedding-type rope\n--rotary-base 150000",
}

HYBRID_BASE = BASE.replace("--num-layers 4\n", "") + "--disable-bias-linear\n--position-embedding-type none\n"

# Layers by pattern, with --export-model-type HybridModel.
HYBRIDS = {
    "pattern": "--hybrid-layer-pattern M-M*",
    "experts": "--hybrid-layer-pattern MEM*\n--num-experts 4\n--swiglu",
    "pipes": "--hybrid-layer-pattern M-|M*\n--pipeline-model-parallel-size 2",
    "older-pattern": "--hybrid-override-pattern M-M*",
    "older-pattern-and-layers": "--hybrid-override-pattern M-M*\n--num-layers 4",
    "prediction": "--hybrid-layer-pattern M-M*/M*/M*",
    "older-prediction": (
        "--hybrid-override-pattern M-M*\n--mtp-hybrid-override-pattern M*\n--mtp-num-layers 2"
    ),
    "empty-prediction": "--hybrid-layer-pattern M-M*/",
    "latent": "--hybrid-layer-pattern M+M-",
    "number-of-layers-ignored": "--hybrid-layer-pattern M-M*\n--num-layers 7",
    "mamba-sizes": "--hybrid-layer-pattern M-M*\n--mamba-head-dim 32\n--mamba-state-dim 64",
}

# Megatron keeps these as it finds them: the harness resolves what they come to in the model.
RESOLVED_FURTHER = frozenset({"num_query_groups"})


def modelopt_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of Megatron-LM's post-training scripts, whose parser is not part of megatron-core."""
    known = {name for action in parser._actions for name in action.option_strings}
    for spec in {spec.name: spec for spec in flag_table().values()}.values():
        if spec.name in known:
            continue
        names = [spec.name, *spec.aliases]
        if spec.values == "0":
            value = spec.value_if_given(spec.name)
            parser.add_argument(
                *names, dest=spec.dest, action="store_const", const=value, default=spec.default
            )
        else:
            nargs = None if spec.values == "1" else spec.values
            parser.add_argument(*names, dest=spec.dest, nargs=nargs, type=spec.read, default=spec.default)
    return parser


def megatron(text: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Megatron's own parser and validation arrive at."""
    with captured():
        from megatron.training.arguments import parse_args, validate_args

        monkeypatch.setattr(sys, "argv", ["quantize.py", *text.split()])
        monkeypatch.setenv("WORLD_SIZE", "2" if "--pipeline-model-parallel-size 2" in text else "1")
        monkeypatch.setenv("RANK", "0")
        arguments = parse_args(extra_args_provider=modelopt_arguments)
        validate_args(arguments)
    return arguments


def config_of(text: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's transformer config, made as its ModelOpt builder makes it."""
    arguments = megatron(text, monkeypatch)
    with captured():
        from megatron.training.argument_utils import core_transformer_config_from_args

        return core_transformer_config_from_args(arguments)


def model_arguments(arguments: Arguments) -> dict[str, Any]:
    """What the parser and the validation decide; what is ``built`` only the builder knows."""
    dests = {spec.dest for spec in flag_table().values() if spec.role is Role.MODEL} - RESOLVED_FURTHER
    return {dest: arguments[dest] for dest in sorted(dests) if not arguments.origin(dest).built}


def normal(value: Any) -> Any:
    """Lists as tuples, one-element lists as their element: Megatron unwraps those it knows."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 1 else tuple(value)
    return value


def assert_same(text: str, arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = vars(megatron(text, monkeypatch))
    ours = model_arguments(arguments)
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
    assert_same(text, arguments, monkeypatch)


@pytest.mark.parametrize("variant", HYBRIDS.values(), ids=HYBRIDS.keys())
def test_hybrids_come_to_megatrons_values(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = HYBRID_BASE + "--export-model-type HybridModel\n" + variant
    assert_same(text, resolved(text)[0], monkeypatch)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_presets_come_to_megatrons_values(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = load_preset(file)
    assert preset.arguments is not None
    assert not [finding for finding in preset.findings if finding.is_error]
    text = " ".join(word for flag in preset.flags for word in (flag.name, *flag.words))
    assert_same(text, preset.arguments, monkeypatch)


# What the builder decides


@pytest.mark.parametrize("name", ["yarn", "yarn-in-full"])
def test_yarn_comes_to_the_constants_of_megatrons_config(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BASE + VARIANTS[name]
    arguments, _ = resolved(text)
    config = config_of(text, monkeypatch)
    prefixed = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
    dests = [dest for dest in arguments.values if dest.startswith("yarn_")]
    assert len(dests) == 4
    assert {dest: arguments[dest] for dest in dests} == {dest: getattr(config, dest) for dest in dests}
    assert [arguments[dest] for dest in prefixed] == [getattr(config, f"yarn_{dest}") for dest in prefixed]
    assert arguments.origin("yarn_beta_slow").built


def test_gpt_oss_overrides_every_flag_of_yarn() -> None:
    extra = "--enable-gpt-oss\n--position-embedding-type yarn\n--yarn-original-max-position-embeddings 4096"
    arguments, findings = resolved(BASE + extra)
    assert arguments["yarn_original_max_position_embeddings"] == 131072
    (error,) = [finding for finding in findings if finding.is_error]
    assert error.flag == "--yarn-original-max-position-embeddings"
    assert "--enable-gpt-oss overrides it with 131072" in error.message


def test_gpt_oss_leaves_the_learned_table_in() -> None:
    arguments, _ = resolved(BASE + "--enable-gpt-oss")
    assert arguments["position_embedding_type"] == "learned_absolute"
    arguments, _ = resolved(BASE + "--enable-gpt-oss\n--position-embedding-type rope")
    assert arguments["position_embedding_type"] == "yarn"


def test_mamba_heads_follow_from_the_hidden_size() -> None:
    text = HYBRID_BASE + "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*\n--mamba-head-dim 96"
    arguments, findings = resolved(text)
    assert not [finding for finding in findings if finding.is_error]
    assert arguments["mamba_num_heads"] == 2 * 768 // 96
    assert arguments.origin("mamba_num_heads").built


def test_the_older_name_of_the_hybrid_model_means_the_new_one() -> None:
    text = HYBRID_BASE + "--export-model-type MambaModel\n--hybrid-layer-pattern M-M*"
    arguments, (warning,) = resolved(text)
    assert arguments["export_model_type"] == "HybridModel"
    assert (warning.severity, warning.flag) == (Severity.WARNING, "--export-model-type")
    assert "write HybridModel" in warning.message


# Flags, the flag that the error names, words of the error. Megatron's parser, validation or config refuses.
REFUSED = {
    "bf16-and-fp16": ("--bf16\n--fp16", "--fp16", "contradicts --bf16 on line 9"),
    "two-activations": ("--swiglu\n--squared-relu", "--squared-relu", "contradicts --swiglu on line 9"),
    "two-layer-counts": (
        "--encoder-num-layers 4",
        "--encoder-num-layers",
        "contradicts --num-layers on line 1",
    ),
    "two-lengths": ("--encoder-seq-length 4", "--encoder-seq-length", "contradicts --seq-length on line 5"),
    "decoder-length": (
        "--decoder-seq-length 4096",
        "--decoder-seq-length",
        "larger than --max-position-embeddings (2048)",
    ),
    "no-position-embedding": (
        "--no-position-embedding",
        "--no-position-embedding",
        "use --position-embedding-type",
    ),
    "mrope": ("--position-embedding-type mrope", "--position-embedding-type", "without --mrope-section"),
    "rope-type": ("--rope-type yarn", "--rope-type", "write --position-embedding-type yarn"),
    "no-rope-frequency": (
        "--position-embedding-type rope\n--no-rope-freq 3",
        "--no-rope-freq",
        "--no-rope-freq 3 does not divide --num-layers 4",
    ),
    "no-rope-pattern": (
        "--position-embedding-type rope\n--no-rope-freq [0,1]",
        "--no-rope-freq",
        "the pattern has 2 layers, --num-layers 4",
    ),
    "latent-and-grouped": (
        "--multi-latent-attention\n--group-query-attention",
        "--group-query-attention",
        "contradicts --multi-latent-attention on line 9",
    ),
    "latent-and-interleaved": (
        "--multi-latent-attention\n--rotary-interleaved",
        "--rotary-interleaved",
        "contradicts --multi-latent-attention on line 9",
    ),
    "latent-and-gated": (
        "--multi-latent-attention\n--attention-output-gate",
        "--attention-output-gate",
        "contradicts --multi-latent-attention on line 9",
    ),
    "down-projection": (
        "--mla-down-proj-fusion",
        "--mla-down-proj-fusion",
        "without --multi-latent-attention",
    ),
    "offset-in-fused-swiglu": (
        "--swiglu\n--glu-linear-offset 1.0",
        "--glu-linear-offset",
        "add --no-bias-swiglu-fusion",
    ),
    "fused-squared-relu": ("--squared-relu", "--squared-relu", "add --no-bias-gelu-fusion"),
    "latent-and-fused-rope": (
        "--multi-latent-attention\n--position-embedding-type rope\n--rope-type rope",
        "--rope-type",
        "add --no-rope-fusion",
    ),
    "overlap-of-gathered-experts": (
        "--swiglu\n--disable-bias-linear\n--num-experts 4\n--moe-shared-expert-intermediate-size 8\n"
        "--moe-shared-expert-overlap",
        "--moe-shared-expert-overlap",
        "with --moe-token-dispatcher-type allgather",
    ),
    "no-layers-twice": ("--encoder-num-layers 0", "--encoder-num-layers", "contradicts --num-layers"),
    "latent-experts-without-experts": ("--moe-latent-size 8", "--moe-latent-size", "without --num-experts"),
    "latent-experts": (
        "--swiglu\n--num-experts 4\n--moe-latent-size 0",
        "--moe-latent-size",
        "must be positive",
    ),
    "experts": ("--swiglu\n--num-experts -4", "--num-experts", "must be positive"),
    "shared-expert": (
        "--swiglu\n--disable-bias-linear\n--num-experts 4\n--moe-shared-expert-intermediate-size 0",
        "--moe-shared-expert-intermediate-size",
        "must be positive",
    ),
    "softmax-of-one": (
        "--swiglu\n--num-experts 4\n--moe-router-topk 1",
        "--moe-router-topk",
        "add --moe-router-pre-softmax",
    ),
    "bias-of-softmax": (
        "--swiglu\n--num-experts 4\n--moe-router-enable-expert-bias",
        "--moe-router-enable-expert-bias",
        "only sigmoid has a bias",
    ),
    "padding-without-fp8": (
        "--swiglu\n--num-experts 4\n--moe-router-padding-for-fp8",
        "--moe-router-padding-for-fp8",
        "without --fp8-format",
    ),
    "coefficients": (
        "--swiglu\n--num-experts 4\n--moe-router-load-balancing-type aux_loss seq_aux_loss",
        "--moe-router-load-balancing-type",
        "one --moe-aux-loss-coeff for each kind",
    ),
    "group-top-k-without-groups": (
        "--swiglu\n--num-experts 8\n--moe-router-group-topk 2",
        "--moe-router-group-topk",
        "without --moe-router-num-groups",
    ),
    "experts-over-groups": (
        "--swiglu\n--num-experts 8\n--moe-router-num-groups 3\n--moe-router-group-topk 2",
        "--moe-router-num-groups",
        "8 experts / 3 groups is not whole",
    ),
    "group-top-k-above-groups": (
        "--swiglu\n--num-experts 8\n--moe-router-num-groups 2\n--moe-router-group-topk 4",
        "--moe-router-group-topk",
        "larger than --moe-router-num-groups (2)",
    ),
    "prediction-with-a-table": ("--mtp-num-layers 1", "--mtp-num-layers", "learned_absolute"),
    "prediction-with-yarn": (
        "--position-embedding-type yarn\n--mtp-num-layers 1",
        "--mtp-num-layers",
        "refuses multi-token prediction with --position-embedding-type yarn",
    ),
}

# The same, where only the layers of the model fail, or where they do something else in silence.
FAILS_LATER = {
    "kv-channels": ("--kv-channels 0", "--kv-channels", "must be positive"),
    "groups-not-whole": ("--group-query-attention\n--num-query-groups 5", "--num-query-groups", "not whole"),
    "groups-without-gqa": ("--num-query-groups 4", "--num-query-groups", "no effect without --group-query"),
    "negative-ffn": ("--ffn-hidden-size -1", "--ffn-hidden-size", "must be positive"),
    "whole-head": (
        "--position-embedding-type rope\n--rotary-percent 1.5",
        "--rotary-percent",
        "more than the whole of a head",
    ),
    "top-k-without-experts": ("--moe-router-topk 2", "--moe-router-topk", "no effect without --num-experts"),
    "top-k-above-experts": (
        "--swiglu\n--num-experts 4\n--moe-router-topk 8",
        "--moe-router-topk",
        "larger than --num-experts (4)",
    ),
    "pattern-length": (
        "--swiglu\n--num-experts 4\n--moe-layer-freq [0,1]",
        "--moe-layer-freq",
        "the pattern has 2 layers, --num-layers 4",
    ),
    "pattern-of-twos": (
        "--swiglu\n--num-experts 4\n--moe-layer-freq [0,1,2,1]",
        "--moe-layer-freq",
        "anything but 0 (dense) and 1 (experts)",
    ),
    "no-layer-with-experts": (
        "--swiglu\n--num-experts 4\n--moe-layer-freq [0]*4",
        "--num-experts",
        "no effect where --moe-layer-freq gives no layer experts",
    ),
    "biases-of-shared-experts": (
        "--swiglu\n--num-experts 4\n--moe-shared-expert-intermediate-size 8",
        "--moe-shared-expert-intermediate-size",
        "set --disable-bias-linear",
    ),
    "overlap-of-latent-experts": (
        "--swiglu\n--disable-bias-linear\n--num-experts 4\n--moe-latent-size 64\n"
        "--moe-shared-expert-intermediate-size 8\n--moe-shared-expert-overlap\n"
        "--moe-token-dispatcher-type alltoall",
        "--moe-shared-expert-overlap",
        "latent experts",
    ),
    "gate-of-no-shared-expert": (
        "--swiglu\n--num-experts 4\n--moe-shared-expert-gate",
        "--moe-shared-expert-gate",
        "no effect without --moe-shared-expert-intermediate-size",
    ),
    "weights-on-two-inputs": (
        "--swiglu\n--num-experts 4\n--export-moe-apply-probs-on-input",
        "--export-moe-apply-probs-on-input",
        "unless --moe-router-topk is 1",
    ),
    "groups-without-group-top-k": (
        "--swiglu\n--num-experts 8\n--moe-router-num-groups 2",
        "--moe-router-num-groups",
        "no effect without --moe-router-group-topk",
    ),
    "less-than-one-of-each-group": (
        "--swiglu\n--num-experts 8\n--moe-router-num-groups 4\n--moe-router-group-topk 4",
        "--moe-router-group-topk",
        "less than one expert of each",
    ),
    "too-few-in-the-groups": (
        "--swiglu\n--num-experts 8\n--moe-router-topk 5\n--moe-router-num-groups 4\n"
        "--moe-router-group-topk 2",
        "--moe-router-group-topk",
        "hold 4 experts, fewer than --moe-router-topk 5",
    ),
    "fused-gelu-of-experts": ("--num-experts 4", "--num-experts", "add --no-bias-gelu-fusion"),
    "fused-quick-geglu": ("--quick-geglu", "--quick-geglu", "add --no-bias-gelu-fusion"),
    "clamp-in-fused-swiglu": (
        "--swiglu\n--activation-func-clamp-value 7.0",
        "--activation-func-clamp-value",
        "does not clamp: add --no-bias-swiglu-fusion",
    ),
    "clamp-without-a-gate": (
        "--activation-func-clamp-value 7.0",
        "--activation-func-clamp-value",
        "no effect on an activation without a gate",
    ),
    "one-number-of-a-window": ("--window-size 128", "--window-size", "takes two numbers"),
    "window-ahead": ("--window-size 127,127", "--window-size", "sees no tokens after"),
    "window-of-nothing": ("--window-size=-1,-1", "--window-size", "no tokens before"),
    "windows-without-a-window": (
        "--window-attn-skip-freq 2",
        "--window-attn-skip-freq",
        "no effect without --window-size",
    ),
    "window-pattern": (
        "--window-size 127,0\n--window-attn-skip-freq [1,0]",
        "--window-attn-skip-freq",
        "the pattern has 2 layers",
    ),
    "window-frequency": (
        "--window-size 127,0\n--window-attn-skip-freq 0",
        "--window-attn-skip-freq",
        "must be at least 1",
    ),
    "rotary-base-of-a-table": (
        "--rotary-base 500000",
        "--rotary-base",
        "no effect on positions that are not rotary: write --position-embedding-type rope",
    ),
    "yarn-flags-on-rope": (
        "--position-embedding-type rope\n--rotary-scaling-factor 4",
        "--rotary-scaling-factor",
        "write --position-embedding-type yarn",
    ),
    "scaling-of-yarn": (
        "--position-embedding-type yarn\n--use-rope-scaling",
        "--use-rope-scaling",
        "no effect but on the plain rotary positions of a GPTModel",
    ),
    "interpolation": (
        "--position-embedding-type rope\n--rotary-seq-len-interpolation-factor 4",
        "--rotary-seq-len-interpolation-factor",
        "does not pass it on",
    ),
    "rotary-over-another": (
        "--use-rotary-position-embeddings\n--position-embedding-type none",
        "--position-embedding-type",
        "--use-rotary-position-embeddings overrides it",
    ),
    "latent-and-yarn": (
        "--multi-latent-attention\n--position-embedding-type yarn",
        "--position-embedding-type",
        "write --position-embedding-type rope, and --rope-type yarn",
    ),
    "latent-and-gpt-oss": (
        "--multi-latent-attention\n--position-embedding-type rope\n--enable-gpt-oss",
        "--enable-gpt-oss",
        "latent attention has rotary positions of its own",
    ),
    "latent-and-window": (
        "--multi-latent-attention\n--window-size 127,0",
        "--window-size",
        "does not model it beside --multi-latent-attention",
    ),
    "latent-sizes-without-it": ("--kv-lora-rank 64", "--kv-lora-rank", "without --multi-latent-attention"),
    "mamba-in-a-gpt-model": (
        "--mamba-num-heads 8",
        "--mamba-num-heads",
        "write --export-model-type HybridModel",
    ),
    "delta-net-in-a-gpt-model": (
        "--linear-num-key-heads 8",
        "--linear-num-key-heads",
        "--hybrid-layer-pattern with layers G",
    ),
}


def assert_one_error(text: str, flag: str, words: str) -> None:
    _, findings = resolved(text)
    line = next(
        n for n, row in enumerate(text.strip().splitlines(), 1) if row.split()[0].partition("=")[0] == flag
    )
    assert [(f.flag, f.line) for f in findings if f.is_error] == [(flag, line)]
    assert words in next(f.message for f in findings if f.is_error)


@pytest.mark.parametrize(("extra", "flag", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_megatron_refuses_is_an_error_on_its_line(
    extra: str, flag: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_error(BASE + extra, flag, words)
    with pytest.raises((AssertionError, ValueError, RuntimeError, NotImplementedError, ZeroDivisionError)):
        config_of(BASE + extra, monkeypatch)


@pytest.mark.parametrize(("extra", "flag", "words"), FAILS_LATER.values(), ids=FAILS_LATER.keys())
def test_what_the_model_fails_with_or_ignores_is_an_error_on_its_line(
    extra: str, flag: str, words: str
) -> None:
    assert_one_error(BASE + extra, flag, words)


IN_HYBRIDS = {
    "pattern-without-the-model": (
        "--hybrid-layer-pattern M-M*",
        "--hybrid-layer-pattern",
        "makes a GPTModel, with attention in every layer",
    ),
    "two-patterns": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*\n--hybrid-override-pattern M-M*",
        "--hybrid-override-pattern",
        "refuses --hybrid-override-pattern together with",
    ),
    "another-number-of-layers": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*\n--num-layers 5",
        "--num-layers",
        "the layer pattern names 4 layers",
    ),
    "experts-in-no-layer": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*\n--swiglu\n--num-experts 4",
        "--num-experts",
        "without a layer E in --hybrid-layer-pattern",
    ),
    "frequency-of-experts": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern MEM*\n--swiglu\n--num-experts 4\n"
        "--moe-layer-freq 2",
        "--moe-layer-freq",
        "--hybrid-layer-pattern says which layers have experts",
    ),
    "prediction": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*/M*\n--position-embedding-type none",
        "--hybrid-layer-pattern",
        "adds multi-token prediction layers, and the harness does not model them",
    ),
    "latent-attention": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*\n--multi-latent-attention",
        "--multi-latent-attention",
        "ModelOpt's hybrid layers have no latent attention",
    ),
    "mamba-heads": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*\n--mamba-head-dim 100",
        "--mamba-head-dim",
        "is not whole",
    ),
    "interleaved": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*\n--use-rotary-position-embeddings\n"
        "--rotary-interleaved",
        "--rotary-interleaved",
        "cannot have interleaved rotary positions",
    ),
    "rope-scaling": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*\n--use-rotary-position-embeddings\n"
        "--use-rope-scaling",
        "--use-rope-scaling",
        "no effect but on the plain rotary positions of a GPTModel",
    ),
    "gpt-oss": (
        "--export-model-type HybridModel\n--hybrid-layer-pattern M-M*\n--enable-gpt-oss",
        "--enable-gpt-oss",
        "no effect on a hybrid model",
    ),
}


@pytest.mark.parametrize(("extra", "flag", "words"), IN_HYBRIDS.values(), ids=IN_HYBRIDS.keys())
def test_what_goes_wrong_in_a_hybrid_is_an_error_on_its_line(extra: str, flag: str, words: str) -> None:
    text = HYBRID_BASE.replace("--position-embedding-type none\n", "") + extra
    assert_one_error(text, flag, words)


# Flags, the flag that the warning names, words of the warning.
IDLE = {
    "latent-kv-channels": (
        "--multi-latent-attention\n--kv-channels 64",
        "--kv-channels",
        "no effect on latent attention",
    ),
    "latent-yarn": (
        "--multi-latent-attention\n--yarn-beta-fast 1",
        "--yarn-beta-fast",
        "which reads no flag for it",
    ),
    "latent-share": (
        "--multi-latent-attention\n--rotary-percent 0.5",
        "--rotary-percent",
        "no effect on the YaRN positions of latent attention",
    ),
    "rope-type": ("--rope-type rope", "--rope-type", "without --multi-latent-attention"),
    "no-positions": (
        "--position-embedding-type none\n--rotary-base 500000",
        "--rotary-base",
        "on a model without positions",
    ),
    "scaling-factor": (
        "--position-embedding-type rope\n--rope-scaling-factor 4",
        "--rope-scaling-factor",
        "without --use-rope-scaling",
    ),
    "scaling-factor-of-the-builder": (
        "--position-embedding-type rope\n--use-rope-scaling\n--rope-scaling-factor 4",
        "--rope-scaling-factor",
        "the factor stays 8",
    ),
    "two-query-key-norms": (
        "--qk-layernorm\n--export-qk-l2-norm",
        "--qk-layernorm",
        "has no effect beside --export-qk-l2-norm on line 10",
    ),
    "pre-softmax-of-a-sigmoid": (
        "--swiglu\n--num-experts 4\n--moe-router-score-function sigmoid\n--moe-router-pre-softmax",
        "--moe-router-pre-softmax",
        "on scores that are no softmax",
    ),
}


@pytest.mark.parametrize(("extra", "flag", "words"), IDLE.values(), ids=IDLE.keys())
def test_what_changes_nothing_is_a_warning_on_its_line(extra: str, flag: str, words: str) -> None:
    text = BASE + extra
    _, findings = resolved(text)
    line = next(
        n for n, row in enumerate(text.strip().splitlines(), 1) if row.split()[0].partition("=")[0] == flag
    )
    assert [(f.severity, f.flag, f.line) for f in findings] == [(Severity.WARNING, flag, line)]
    assert words in findings[0].message


def test_a_pattern_in_pipeline_stages_is_a_warning() -> None:
    text = HYBRID_BASE + "--export-model-type HybridModel\n--hybrid-layer-pattern M-|M*"
    arguments, (warning,) = resolved(text)
    assert arguments["num_layers"] == 4
    assert (warning.severity, warning.flag) == (Severity.WARNING, "--hybrid-layer-pattern")
    assert "split into 2 pipeline stages" in warning.message


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
