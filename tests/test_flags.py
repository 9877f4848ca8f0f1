from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.finding import Finding, Severity
from harness.flags import Flag, FlagSpec, Role, defaults, flag_table, parse_flags
from harness.shell import Word

SPECS = tuple({spec.name: spec for spec in flag_table().values()}.values())


def words(text: str) -> list[Word]:
    """Split at white space, lines and columns kept; ``_`` between quotes stands for a blank."""
    return [
        Word(match.group().strip("'").replace("_", " ") if "'" in match.group() else match.group(), row, match.start() + 1, False)
        for row, line in enumerate(text.splitlines(), start=1)
        for match in re.finditer(r"\S+", line)
    ]


def parse(text: str) -> tuple[tuple[Flag, ...], tuple[Finding, ...]]:
    return parse_flags(words(text))


def only(text: str) -> Finding:
    """The one finding of ``text``."""
    (finding,) = parse(text)[1]
    return finding


def given_values(text: str) -> dict[str, object]:
    flags, findings = parse(text)
    assert not [finding for finding in findings if finding.is_error]
    return {flag.dest: flag.value for flag in flags}


# The table


def test_every_flag_of_megatron_is_in_the_table_once() -> None:
    assert len(SPECS) == 828
    spellings = [name for spec in SPECS for name in (spec.name, *spec.aliases)]
    assert len(spellings) == len(set(spellings)) == len(flag_table())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_row(spec: FlagSpec) -> None:
    assert spec.role in Role
    assert 3 <= len(spec.reason.split()) <= 30
    assert not spec.reason.endswith(".")
    assert all(name.startswith("--") for name in (spec.name, *spec.aliases))
    assert re.fullmatch(r"[0-9]|\+|\*", spec.values)
    if spec.values == "0":
        assert isinstance(spec.value_if_given(spec.name), bool)
        assert not spec.choices
    for value in spec.default if isinstance(spec.default, tuple) else (spec.default,):
        if spec.values != "0" and value is not None:
            assert spec.read(str(value)) == value
    if spec.reason.startswith("run: "):
        assert spec.role is Role.RUNTIME
    if spec.reason.startswith("refused: "):
        assert spec.role is Role.DEPRECATED


def test_rows_that_share_a_destination_share_its_default() -> None:
    for spec in SPECS:
        assert defaults()[spec.dest] == spec.default, spec.name


def test_megatrons_own_defaults() -> None:
    assert {
        dest: defaults()[dest]
        for dest in ("num_layers", "layernorm_epsilon", "rotary_base", "add_bias_linear", "cp_comm_type", "config_logger_dir")
    } == {
        "num_layers": None,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 10000,
        "add_bias_linear": True,
        "cp_comm_type": ("p2p",),
        "config_logger_dir": "",
    }


ROLES = {
    Role.MODEL: """--num-layers --hidden-size --norm-epsilon --apply-layernorm-1p --rotary-base --no-rope-freq
        --use-rotary-position-embeddings --no-position-embedding --window-size --softmax-type --swiglu --bf16
        --fp8-format --attention-dropout --seq-length --padded-vocab-size --moe-router-topk --moe-router-dtype
        --moe-router-force-load-balancing --moe-input-jitter-eps --moe-expert-capacity-factor --kv-lora-rank
        --hybrid-layer-pattern --mamba-state-dim --linear-attention-freq --dsa-indexer-topk --mtp-num-layers
        --use-mup --spec --yaml-cfg --use-checkpoint-args --enable-gpt-oss --export-model-type --export-qk-l2-norm
        --export-moe-apply-probs-on-input --transformer-impl --heterogeneous-layers-config-path""",
    Role.LAYOUT: """--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size
        --expert-model-parallel-size --expert-tensor-parallel-size --sequence-parallel
        --decoder-first-pipeline-num-layers --pipeline-model-parallel-layout""",
    Role.RUNTIME: """--save-interval --micro-batch-size --tokenizer-type --use-mcore-models --no-rope-fusion
        --no-masked-softmax-fusion --no-bias-swiglu-fusion --moe-aux-loss-coeff --moe-grouped-gemm
        --moe-token-dispatcher-type --init-method-std --recompute-activations --distributed-timeout-minutes""",
    Role.DEPRECATED: "--batch-size --hybrid-override-pattern --moe-layer-recompute --use-dist-ckpt",
}


@pytest.mark.parametrize(
    ("name", "role"), [(name, role) for role, names in ROLES.items() for name in names.split()]
)
def test_role(name: str, role: Role) -> None:
    assert flag_table()[name].role is role


def test_the_table_is_read_without_torch_and_not_at_import() -> None:
    program = (
        "import sys, harness.flags as flags\n"
        "assert flags.flag_table.cache_info().currsize == 0, 'read at import'\n"
        "assert len(flags.flag_table()) > 828\n"
        "assert not {'torch', 'megatron', 'modelopt', 'tree_sitter'} & set(sys.modules), 'imports too much'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        pytest.param("--num-layers 36", {"num_layers": 36}, id="number"),
        pytest.param("--num-layers=36", {"num_layers": 36}, id="number after an equals sign"),
        pytest.param("--num-layers 1_000", {"num_layers": 1000}, id="number with an underscore"),
        pytest.param("--norm-epsilon 1e-6", {"layernorm_epsilon": 1e-6}, id="float"),
        pytest.param("--rl-default-top-k -1", {"rl_default_top_k": -1}, id="negative number"),
        pytest.param("--min-lr -.5", {"min_lr": -0.5}, id="negative number without a leading zero"),
        pytest.param("--norm-epsilon=-1e-6", {"layernorm_epsilon": -1e-6}, id="negative exponent after an equals sign"),
        pytest.param("--bf16", {"bf16": True}, id="switch on"),
        pytest.param("--disable-bias-linear", {"add_bias_linear": False}, id="switch off"),
        pytest.param("--no-pad-vocab-size", {"pad_vocab_size": False}, id="switch off by its first name"),
        pytest.param("--disable-pad-vocab-size", {"pad_vocab_size": False}, id="switch off by its alias"),
        pytest.param("--no-load-rng", {"no_load_rng": True}, id="switch on whose name starts with no"),
        pytest.param("--rl-partial-rollouts", {"rl_partial_rollouts": True}, id="two-way switch on"),
        pytest.param("--no-rl-partial-rollouts", {"rl_partial_rollouts": False}, id="two-way switch off"),
        pytest.param("--no-rl-skip-bos-token", {"rl_skip_bos_token": False}, id="two-way bool off"),
        pytest.param("--onnx-safe false", {"onnx_safe": True}, id="bool of a text"),
        pytest.param("--normalization RMSNorm", {"normalization": "RMSNorm"}, id="choice"),
        pytest.param("--flash-attention-version 3", {"flash_attention_version": 3}, id="numeric choice"),
        pytest.param("--attention-backend flash", {"attention_backend": "flash"}, id="enum name"),
        pytest.param("--exit-signal SIGTERM --sft", {"exit_signal": "SIGTERM", "sft": True}, id="signal name"),
        pytest.param("--mrope-section 16 24 24", {"mrope_section": (16, 24, 24)}, id="one or more values"),
        pytest.param("--moe-aux-loss-coeff=1e-3", {"moe_aux_loss_coeff": (1e-3,)}, id="one value where more may be"),
        pytest.param("--spec --bf16", {"spec": (), "bf16": True}, id="no value where any number may be"),
        pytest.param("--spec local", {"spec": ("local",)}, id="any number of values"),
        pytest.param("--window-size 127,0", {"window_size": (127, 0)}, id="window"),
        pytest.param("--window-size (-1,0)", {"window_size": (-1, 0)}, id="window in brackets"),
        pytest.param("--window-attn-skip-freq 2", {"window_attn_skip_freq": 2}, id="frequency"),
        pytest.param("--moe-layer-freq ([0]*3+[1]*5)", {"moe_layer_freq": (0,) * 3 + (1,) * 5}, id="list expression"),
        pytest.param("--moe-layer-freq ([0,1]*2)", {"moe_layer_freq": (0, 1, 0, 1)}, id="repeated list"),
        pytest.param("--no-rope-freq 2*[1]+[0]", {"no_rope_freq": (1, 1, 0)}, id="list on the right of the star"),
        pytest.param("--linear-attention-freq [1]*(1+2)", {"linear_attention_freq": (1, 1, 1)}, id="sum as a count"),
        pytest.param("--chat-template '-_a'", {"chat_template": "- a"}, id="dash and a blank"),
        pytest.param("--hybrid-layer-pattern M-M*-", {"hybrid_layer_pattern": "M-M*-"}, id="pattern"),
    ],
)  # fmt: skip
def test_value(text: str, values: dict[str, object]) -> None:
    assert given_values(text) == values


def test_a_flag_knows_its_words_and_its_place() -> None:
    (flag, _), findings = parse("--bf16\n  --persistent-save-interval 100"[7:] + "\n--fp16")
    assert not findings
    assert (flag.name, flag.dest, flag.value, flag.words) == ("--persistent-save-interval", "save_interval", 100, ("100",))
    assert (flag.line, flag.column, flag.spec.name) == (1, 3, "--save-interval")


PUBLISHED = """
    --save-interval 100000 --micro-batch-size 1 --bf16 --no-masked-softmax-fusion --disable-bias-linear
    --untie-embeddings-and-output-weights --position-embedding-type rope --no-rope-fusion
    --normalization RMSNorm --swiglu --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432
    --num-attention-heads 128 --kv-channels 128 --multi-latent-attention --kv-lora-rank 512
    --moe-layer-freq [0]*3+[1]*58 --moe-router-dtype fp32 --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-4 --moe-token-dispatcher-type alltoall --tokenizer-type HuggingFaceTokenizer
    --trust-remote-code --use-mcore-models --recompute-activations --window-size 127,0 --norm-epsilon 1e-6
    --distributed-timeout-minutes 60 --tensor-model-parallel-size 1
"""


def test_what_published_presets_carry_harmlessly_is_no_finding() -> None:
    flags, findings = parse(PUBLISHED)
    assert len(flags) == 31
    assert not findings


# Findings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("--num-layer 36", "no flag --num-layer (with 36): did you mean --num-layers?", id="misspelt"),
        pytest.param("-num-layers 36", "no flag -num-layers (with 36): did you mean --num-layers?", id="one dash"),
        pytest.param("---bf16", "no flag ---bf16: did you mean --bf16?", id="three dashes"),
        pytest.param("--num_layers=36", "no flag --num_layers: did you mean --num-layers?", id="underscore"),
        pytest.param("--Num-Layers 36", "no flag --Num-Layers (with 36): did you mean --num-layers?", id="capitals"),
        pytest.param("--zzz a b", "no flag --zzz (with a b): Megatron 0.19 refuses it", id="unknown"),
        pytest.param("36 --bf16", "36 belongs to no flag: it stands before any flag", id="stray first word"),
        pytest.param(
            "num-layers 36",
            "num-layers 36 belongs to no flag: it stands before any flag; did you mean --num-layers?",
            id="no dash",
        ),
        pytest.param(
            "--swiglu true",
            "true belongs to no flag: --swiglu before it takes no value",
            id="value for a switch",
        ),
        pytest.param(
            "--num-layers 36 48",
            "48 belongs to no flag: --num-layers before it takes one value",
            id="one value too many",
        ),
        pytest.param(
            "--bf16 \N{EN DASH}num-layers 36",
            "\N{EN DASH}num-layers 36 belongs to no flag: --bf16 before it takes no value; did you mean --num-layers?",
            id="typographic dash",
        ),
        pytest.param(
            "--rampup-batch-size 1 2 3 4",
            "4 belongs to no flag: --rampup-batch-size before it takes 3 values",
            id="fourth of three values",
        ),
        pytest.param("--swiglu=true", "--swiglu=true: --swiglu takes no value; write --swiglu alone", id="switch with an equals sign"),
        pytest.param("--num-layers", "--num-layers takes one value, given none", id="no value at the end"),
        pytest.param("--num-layers --bf16", "--num-layers takes one value, given none", id="no value before a flag"),
        pytest.param("--mrope-section", "--mrope-section takes one or more values, given none", id="no values"),
        pytest.param("--rampup-batch-size 1 2", "--rampup-batch-size takes 3 values, given 1 2", id="two of three values"),
        pytest.param(
            "--window-size -1,0",
            "--window-size takes one value, given none: -1,0 starts with a dash and is read as a flag; write --window-size=-1,0",
            id="value with a dash",
        ),
        pytest.param(
            "--norm-epsilon -1e-6 --bf16",
            "--norm-epsilon takes one value, given none: -1e-6 starts with a dash and is read as a flag; write --norm-epsilon=-1e-6",
            id="negative exponent",
        ),
        pytest.param("--rotary-base 1e6", "--rotary-base 1e6: expected a whole number; write 1000000", id="exponent for a whole number"),
        pytest.param("--rotary-base 10000.0", "--rotary-base 10000.0: expected a whole number; write 10000", id="point in a whole number"),
        pytest.param("--rotary-base 0.5", "--rotary-base 0.5: expected a whole number", id="fraction for a whole number"),
        pytest.param("--num-layers ''", "--num-layers '': expected a whole number", id="empty text"),
        pytest.param("--norm-epsilon 1e-6x", "--norm-epsilon 1e-6x: expected a finite number", id="no number"),
        pytest.param("--norm-epsilon nan", "--norm-epsilon nan: expected a finite number", id="not a number"),
        pytest.param("--norm-epsilon inf", "--norm-epsilon inf: expected a finite number", id="infinite"),
        pytest.param("--norm-epsilon=-inf", "--norm-epsilon -inf: expected a finite number", id="negative infinite"),
        pytest.param(
            "--normalization rmsnorm",
            "--normalization rmsnorm: expected one of LayerNorm, RMSNorm; write RMSNorm",
            id="choice in small letters",
        ),
        pytest.param("--timing-log-level 3", "--timing-log-level 3: expected one of 0, 1, 2", id="numeric choice"),
        pytest.param(
            "--moe-router-load-balancing-type none some",
            "--moe-router-load-balancing-type some: expected one of aux_loss, seq_aux_loss, global_aux_loss, "
            "sinkhorn, quantile_balancing, none",
            id="one bad choice of several",
        ),
        pytest.param("--window-size 1;2", "--window-size 1;2: expected whole numbers with commas between, such as 127,0", id="window"),
        pytest.param(
            "--moe-layer-freq __import__('os')",
            "--moe-layer-freq   import  ('os'): expected a whole number, or a list of at most 1000 such as ([0]*3+[1]*45)",
            id="program for a list",
            marks=pytest.mark.skip(reason="written out in test_list_expressions_that_are_refused"),
        ),
        pytest.param("--bf16 -- --fp16 x", "-- ends the flags: --fp16 x would belong to no flag; delete it", id="double dash"),
        pytest.param("--bf16 --", "-- ends the flags; delete it", id="double dash at the end"),
        pytest.param("--bf16 -", "- belongs to no flag: --bf16 before it takes no value", id="lone dash"),
    ],
)  # fmt: skip
def test_fault(text: str, message: str) -> None:
    finding = only(text)
    assert finding.message == message
    assert finding.stage == "parse"
    assert finding.is_error
