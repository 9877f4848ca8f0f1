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

from harness.arguments import Arguments, resolve
from harness.arguments.modelled import INERT, MODELLED, unmodelled
from harness.finding import Finding, Severity
from harness.flags import Flag, FlagSpec, Role, defaults, flag_table, parse_flags
from harness.shell import Word

SPECS = tuple({spec.name: spec for spec in flag_table().values()}.values())


def words(text: str) -> list[Word]:
    """Split at white space, places kept; an open box is a blank within a word, two quotes an empty word."""
    return [
        Word(match[0].replace("\N{OPEN BOX}", " ").replace("''", ""), row, match.start() + 1, False)
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
    assert 2 <= len(spec.reason.split()) <= 30
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
        for dest in (
            "num_layers",
            "layernorm_epsilon",
            "rotary_base",
            "add_bias_linear",
            "cp_comm_type",
            "config_logger_dir",
        )
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
        --use-mup --spec --yaml-cfg --use-checkpoint-args --enable-gpt-oss --export-model-type
        --export-qk-l2-norm --export-moe-apply-probs-on-input
        --transformer-impl --heterogeneous-layers-config-path""",
    Role.LAYOUT: """--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size
        --expert-model-parallel-size --expert-tensor-parallel-size --sequence-parallel
        --decoder-first-pipeline-num-layers --pipeline-model-parallel-layout""",
    Role.RUNTIME: """--save-interval --micro-batch-size --tokenizer-type --use-mcore-models --no-rope-fusion
        --no-masked-softmax-fusion --no-bias-swiglu-fusion --moe-aux-loss-coeff --moe-grouped-gemm
        --moe-token-dispatcher-type --init-method-std --recompute-activations
        --distributed-timeout-minutes""",
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
        pytest.param(
            "--norm-epsilon=-1e-6", {"layernorm_epsilon": -1e-6}, id="negative exponent after an equals sign"
        ),
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
        pytest.param(
            "--exit-signal SIGTERM --sft", {"exit_signal": "SIGTERM", "sft": True}, id="signal name"
        ),
        pytest.param("--mrope-section 16 24 24", {"mrope_section": (16, 24, 24)}, id="one or more values"),
        pytest.param(
            "--moe-aux-loss-coeff=1e-3", {"moe_aux_loss_coeff": (1e-3,)}, id="one value where more may be"
        ),
        pytest.param("--spec --bf16", {"spec": (), "bf16": True}, id="no value where any number may be"),
        pytest.param("--spec local", {"spec": ("local",)}, id="any number of values"),
        pytest.param("--window-size 127,0", {"window_size": (127, 0)}, id="window"),
        pytest.param("--window-size (-1,0)", {"window_size": (-1, 0)}, id="window in brackets"),
        pytest.param("--window-attn-skip-freq 2", {"window_attn_skip_freq": 2}, id="frequency"),
        pytest.param(
            "--moe-layer-freq ([0]*3+[1]*5)", {"moe_layer_freq": (0,) * 3 + (1,) * 5}, id="list expression"
        ),
        pytest.param("--moe-layer-freq ([0,1]*2)", {"moe_layer_freq": (0, 1, 0, 1)}, id="repeated list"),
        pytest.param(
            "--no-rope-freq 2*[1]+[0]", {"no_rope_freq": (1, 1, 0)}, id="list on the right of the star"
        ),
        pytest.param(
            "--linear-attention-freq [1]*(1+2)", {"linear_attention_freq": (1, 1, 1)}, id="sum as a count"
        ),
        pytest.param("--chat-template -\N{OPEN BOX}a", {"chat_template": "- a"}, id="dash and a blank"),
        pytest.param("--hybrid-layer-pattern M-M*-", {"hybrid_layer_pattern": "M-M*-"}, id="pattern"),
    ],
)
def test_value(text: str, values: dict[str, object]) -> None:
    assert given_values(text) == values


def test_a_flag_knows_its_words_and_its_place() -> None:
    (_, flag), findings = parse("--bf16\n  --persistent-save-interval 100")
    assert not findings
    assert (flag.name, flag.dest, flag.value, flag.words) == (
        "--persistent-save-interval",
        "save_interval",
        100,
        ("100",),
    )
    assert (flag.line, flag.column, flag.spec.name) == (2, 3, "--save-interval")


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
    assert len(flags) == 30
    assert not findings


# Findings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "--num-layer 36", "no flag --num-layer (with 36): did you mean --num-layers?", id="misspelt"
        ),
        pytest.param(
            "-num-layers 36", "no flag -num-layers (with 36): did you mean --num-layers?", id="one dash"
        ),
        pytest.param("---bf16", "no flag ---bf16: did you mean --bf16?", id="three dashes"),
        pytest.param("--num_layers=36", "no flag --num_layers: did you mean --num-layers?", id="underscore"),
        pytest.param(
            "--Num-Layers 36", "no flag --Num-Layers (with 36): did you mean --num-layers?", id="capitals"
        ),
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
            "\N{EN DASH}num-layers 36 belongs to no flag: --bf16 before it takes no value; "
            "did you mean --num-layers?",
            id="typographic dash",
        ),
        pytest.param(
            "--swiglu=true",
            "--swiglu=true: --swiglu takes no value; write --swiglu alone",
            id="switch with an equals sign",
        ),
        pytest.param("--num-layers", "--num-layers takes one value, given none", id="no value at the end"),
        pytest.param(
            "--num-layers --bf16", "--num-layers takes one value, given none", id="no value before a flag"
        ),
        pytest.param(
            "--mrope-section", "--mrope-section takes one or more values, given none", id="no values"
        ),
        pytest.param(
            "--rampup-batch-size 1 2",
            "--rampup-batch-size takes 3 values, given 1 2",
            id="two of three values",
        ),
        pytest.param(
            "--window-size -1,0",
            "--window-size takes one value, given none: -1,0 starts with a dash and is read "
            "as a flag; write --window-size=-1,0",
            id="value with a dash",
        ),
        pytest.param(
            "--norm-epsilon -1e-6 --bf16",
            "--norm-epsilon takes one value, given none: -1e-6 starts with a dash and is "
            "read as a flag; write --norm-epsilon=-1e-6",
            id="negative exponent",
        ),
        pytest.param(
            "--rotary-base 1e6",
            "--rotary-base 1e6: expected a whole number; write 1000000",
            id="exponent for a whole number",
        ),
        pytest.param(
            "--rotary-base 10000.0",
            "--rotary-base 10000.0: expected a whole number; write 10000",
            id="point in a whole number",
        ),
        pytest.param(
            "--rotary-base 0.5",
            "--rotary-base 0.5: expected a whole number",
            id="fraction for a whole number",
        ),
        pytest.param("--num-layers ''", "--num-layers '': expected a whole number", id="empty text"),
        pytest.param(
            "--norm-epsilon 1e-6x", "--norm-epsilon 1e-6x: expected a finite number", id="no number"
        ),
        pytest.param("--norm-epsilon nan", "--norm-epsilon nan: expected a finite number", id="not a number"),
        pytest.param("--norm-epsilon inf", "--norm-epsilon inf: expected a finite number", id="infinite"),
        pytest.param(
            "--norm-epsilon=-inf", "--norm-epsilon -inf: expected a finite number", id="negative infinite"
        ),
        pytest.param(
            "--normalization rmsnorm",
            "--normalization rmsnorm: expected one of LayerNorm, RMSNorm; write RMSNorm",
            id="choice in small letters",
        ),
        pytest.param(
            "--timing-log-level 3", "--timing-log-level 3: expected one of 0, 1, 2", id="numeric choice"
        ),
        pytest.param(
            "--moe-router-load-balancing-type none some",
            "--moe-router-load-balancing-type some: expected one of aux_loss, seq_aux_loss, global_aux_loss, "
            "sinkhorn, quantile_balancing, none",
            id="one bad choice of several",
        ),
        pytest.param(
            "--window-size 1;2",
            "--window-size 1;2: expected whole numbers with commas between, such as 127,0",
            id="window",
        ),
        pytest.param(
            "--bf16 -- --fp16 x",
            "-- ends the flags: --fp16 x would belong to no flag; delete it",
            id="double dash",
        ),
        pytest.param("--bf16 --", "-- ends the flags; delete it", id="double dash at the end"),
        pytest.param("--bf16 -", "- belongs to no flag: --bf16 before it takes no value", id="lone dash"),
    ],
)
def test_fault(text: str, message: str) -> None:
    finding = only(text)
    assert finding.message == message
    assert finding.stage == "parse"
    assert finding.is_error


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("0.5", id="fraction"),
        pytest.param("__import__('os')", id="call without a list"),
        pytest.param("[__import__('os')]", id="call"),
        pytest.param("[0]*3-[1]", id="minus"),
        pytest.param("[0]*2**3", id="power"),
        pytest.param("[[0]*3]", id="nested list"),
        pytest.param("([0],[1])", id="tuple of lists"),
        pytest.param("[0]*3,", id="trailing comma"),
        pytest.param("[0][0]", id="element"),
        pytest.param("[0](1)", id="called list"),
        pytest.param("[0]+1", id="list and number"),
        pytest.param("[0]*[1]", id="list times list"),
        pytest.param("[0]*3+[1", id="open bracket"),
        pytest.param("[007]", id="leading zeros"),
        pytest.param("[0]*1001", id="too long"),
        pytest.param("[0]*1000*1000*1000*1000", id="far too long"),
        pytest.param("[0]*1000+[1]", id="too long by one"),
        pytest.param("[1001]", id="too large an entry"),
        pytest.param("[0]*(999999999*999999999)", id="too large a count"),
        pytest.param("[" * 500 + "]" * 500, id="deep"),
        pytest.param("[0]*(" + "1+" * 1500 + "1)", id="deep sum"),
        pytest.param("[" + "0," * 5000 + "]", id="too long a text"),
    ],
)
def test_list_expression_that_is_refused(text: str) -> None:
    _, (finding,) = parse_flags([Word("--moe-layer-freq", 1, 1, False), Word(text, 1, 18, False)])
    shown = text or "''"
    wanted = "a whole number, or a list of at most 1000 such as ([0]*3+[1]*45)"
    assert finding.message == f"--moe-layer-freq {shown}: expected {wanted}"


def test_blanks_in_a_list_expression() -> None:
    finding = only("--moe-layer-freq ([0]\N{OPEN BOX}*\N{OPEN BOX}3)")
    wanted = "a whole number, or a list of at most 1000 such as ([0]*3+[1]*45)"
    assert finding.message == f"--moe-layer-freq '([0] * 3)': expected {wanted}; write it without blanks"


def test_one_value_more_than_three() -> None:
    _, (_, finding) = parse("--rampup-batch-size 1 2 3 4")
    assert finding.message == "4 belongs to no flag: --rampup-batch-size before it takes 3 values"


def test_a_finding_says_where_and_what() -> None:
    finding = only("--bf16\n   --rotary-base 1e6")
    assert (finding.line, finding.column, finding.flag) == (2, 4, "--rotary-base")
    assert (finding.expected, finding.actual) == ("a whole number", "1e6")
    finding = only("--bf16\n   --swiglu   true")
    assert (finding.line, finding.column, finding.flag, finding.actual) == (2, 15, "--swiglu", "true")
    finding = only("--bf16\n   --num-layer 3")
    assert (finding.line, finding.column, finding.flag) == (2, 4, "--num-layer")
    assert (finding.expected, finding.actual) == ("--num-layers", "--num-layer 3")


def test_each_fault_is_one_finding_in_the_order_of_the_file() -> None:
    flags, findings = parse("--zzz 1 2\n--num-layers x\n--swiglu 3\n--bf16 --bf16\n--hidden-size")
    assert [flag.name for flag in flags] == ["--swiglu", "--bf16", "--bf16"]
    assert [finding.line for finding in findings] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "--num-layers 36\n--num-layers 48",
            "--num-layers 48 contradicts --num-layers 36 on line 1: Megatron keeps the last; delete one",
            id="one flag",
        ),
        pytest.param(
            "--save-interval 1\n--persistent-save-interval 2",
            "--persistent-save-interval 2 contradicts --save-interval 1 on line 1: Megatron "
            "keeps the last; delete one",
            id="an alias",
        ),
        pytest.param(
            "--yarn-correction-range-round-to-int\n--no-yarn-correction-range-round-to-int",
            "--no-yarn-correction-range-round-to-int contradicts "
            "--yarn-correction-range-round-to-int on line 1: "
            "Megatron keeps the last; delete one",
            id="opposite flags",
        ),
        pytest.param(
            "--rl-partial-rollouts\n--no-rl-partial-rollouts",
            "--no-rl-partial-rollouts contradicts --rl-partial-rollouts on line 1: Megatron "
            "keeps the last; delete one",
            id="both ways of a switch",
        ),
    ],
)
def test_contradiction(text: str, message: str) -> None:
    finding = only(text)
    assert finding.message == message
    assert (finding.severity, finding.line) == (Severity.ERROR, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "--num-layers 36\n--num-layers=36",
            "--num-layers is given twice with the same value, before on line 1; delete one",
            id="one flag",
        ),
        pytest.param(
            "--no-pad-vocab-size\n--disable-pad-vocab-size",
            "--disable-pad-vocab-size is given twice with the same value, before as "
            "--no-pad-vocab-size on line 1; delete one",
            id="an alias",
        ),
    ],
)
def test_repetition(text: str, message: str) -> None:
    finding = only(text)
    assert finding.message == message
    assert (finding.severity, finding.line) == (Severity.WARNING, 2)


def test_flags_for_different_things_do_not_contradict_each_other_here() -> None:
    assert not parse("--bf16 --fp16")[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "--hybrid-override-pattern M-M*-",
            "--hybrid-override-pattern is deprecated: write --hybrid-layer-pattern, which it is copied into; "
            "it still decides every layer of the model",
            id="deprecated",
        ),
        pytest.param(
            "--tensor-model-parallel-size 8",
            "--tensor-model-parallel-size is baked into a model preset (tensor-parallel "
            "size): give it to the run instead",
            id="layout",
        ),
        pytest.param(
            "--exit-duration-in-mins 220",
            "--exit-duration-in-mins belongs to a run and not to a model (when training "
            "ends): give it to the run instead",
            id="run",
        ),
        pytest.param(
            "--load /ckpt",
            "--load belongs to a run and not to a model (which checkpoint is read): give it "
            "to the run instead",
            id="path of a run",
        ),
    ],
)
def test_warning(text: str, message: str) -> None:
    finding = only(text)
    assert finding.message == message
    assert finding.severity is Severity.WARNING
    assert finding.actual == parse(text)[0][0].value


def test_what_megatron_refuses_outright_is_an_error() -> None:
    finding = only("--batch-size 4")
    assert finding.message == "--batch-size is refused by Megatron: write --micro-batch-size"
    assert finding.is_error


@pytest.mark.parametrize(
    "text", ["--tensor-model-parallel-size 1", "--cp-comm-type p2p"], ids=["size", "list"]
)
def test_a_layout_of_one_is_no_layout(text: str) -> None:
    assert not parse(text)[1]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_flag_alone(spec: FlagSpec) -> None:
    """Each row can be given, and earns the finding of its role and no other."""
    value = spec.choices[0] if spec.choices else "7"
    count = int(spec.values) if spec.values.isdigit() else 1
    flags, findings = parse(" ".join([spec.name, *[value] * count]))
    assert [flag.dest for flag in flags] == [spec.dest]
    severities = [finding.severity for finding in findings]
    if spec.reason.startswith("refused: "):
        assert severities == [Severity.ERROR]
    elif spec.role in (Role.DEPRECATED, Role.LAYOUT) or spec.reason.startswith("run: "):
        assert severities == [Severity.WARNING]
    else:
        assert not severities


# Against argparse itself, with a parser rebuilt from the table


class Rejected(Exception):
    pass


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Rejected(message)


def list_expression(text: str) -> Any:
    """What Python makes of it, as Megatron asks it to; only for the small texts that these tests make."""
    if "[" not in text:
        return int(text)
    if not re.fullmatch(r"[,0-9\[\]()+*]+", text) or "**" in text or len(text) > 40:
        raise ValueError(text)
    try:
        return eval(text)
    except (SyntaxError, TypeError, IndexError) as error:
        raise ValueError(text) from error


CONVERSIONS: dict[str, Any] = {
    "": str,
    "str": str,
    "enum name": str,
    "int": int,
    "float": float,
    "bool": bool,
    "int or list expression": list_expression,
    "comma-separated ints": lambda text: tuple(int(part) for part in text.strip("()").split(",")),
}


def rebuilt_parser() -> Parser:
    parser = Parser(allow_abbrev=False, add_help=False)
    for spec in SPECS:
        spellings = (spec.name, *spec.aliases)
        if spec.type in ("flag: true", "flag: false"):
            action = "store_true" if spec.type == "flag: true" else "store_false"
            parser.add_argument(*spellings, dest=spec.dest, action=action, default=spec.default)
        elif spec.values == "0":
            two_way = argparse.BooleanOptionalAction
            parser.add_argument(spec.name, dest=spec.dest, action=two_way, default=spec.default)
        else:
            convert = CONVERSIONS[spec.type]
            parser.add_argument(
                *spellings,
                dest=spec.dest,
                type=convert,
                nargs={"1": None, "3": 3}.get(spec.values, spec.values),
                choices=[convert(choice) for choice in spec.choices] or None,
                default=spec.default,
            )
    return parser


PARSER = rebuilt_parser()
# Rows of rare kinds come as often as the common ones.
KINDS: dict[tuple[object, ...], list[FlagSpec]] = {}
for row in SPECS:
    KINDS.setdefault((row.type, row.values, bool(row.choices)), []).append(row)
NUMBERS = st.one_of(
    st.integers(-20, 2000).map(str),
    st.floats(-9, 9).map(str),
    st.sampled_from(["1e6", "-1e-5", "-.5", "-5.", "+3", "1_0", " 5", "nan", "-inf", "0x1", "007", "1,000"]),
)
LISTS = st.lists(
    st.sampled_from(["[0]", "[1]", "[0,1]", "(", ")", "*", "+", "3", "12", "[", "]", ",", "([0]*3+[1]*2)"]),
    min_size=1,
    max_size=8,
).map("".join)
ODD = st.sampled_from(
    ["", "-", "--", "x", "-x", "--x", "-M*", "- 5", "--num-layers 3", "-1,0", "127,0", "(1,2)", "--x=1"]
)


@st.composite
def phrases(draw: st.DrawFn) -> list[str]:
    """A flag and values that mostly suit it."""
    spec = draw(st.sampled_from(draw(st.sampled_from(list(KINDS.values())))))
    name = draw(st.sampled_from((spec.name, *spec.aliases)))
    mangle = draw(st.integers(0, 11))
    if mangle == 0:
        name = draw(st.sampled_from([name[1:], name[2:], name.replace("-", "_"), name[:-1], name.upper()]))
    choices = st.sampled_from(spec.choices) if spec.choices else NUMBERS
    suiting = LISTS if "list" in spec.type else choices
    count = int(spec.values) if spec.values.isdigit() else draw(st.integers(1, 3))
    values = [draw(suiting) for _ in range(count)]
    if draw(st.integers(0, 5)) == 0:
        values = draw(st.lists(st.one_of(suiting, NUMBERS, LISTS, ODD, st.text(max_size=5)), max_size=4))
    if values and values[0] != "--" and draw(st.integers(0, 3)) == 0:
        return [f"{name}={values[0]}", *values[1:]]
    return [name, *values]


def is_stricter(finding: Finding) -> bool:
    """The faults that argparse lets through and we do not."""
    text = str(finding.actual)
    if " contradicts " in finding.message or " is refused by Megatron: " in finding.message:
        return True
    if finding.expected == "a finite number":
        return not math.isfinite(float(text))
    if "or a list of at most" in str(finding.expected):
        value = list_expression(text)
        return not (isinstance(value, list) and all(type(entry) is int and entry <= 1000 for entry in value))
    return False


@given(st.lists(phrases(), max_size=4).map(lambda parts: [word for part in parts for word in part]))
@example(["--moe-layer-freq", "[0]*3+[1]*58"])
@example(["--num-layers", "--", "3"])
@example(["--data-path", "a", "--", "b"])
@example(["--spec", "--bf16"])
@example(["--chat-template", "--num-layers 3"])
@example(["--rl-default-top-k", "-1"])
def test_accepts_what_argparse_accepts_with_the_same_values(texts: Sequence[str]) -> None:
    flags, findings = parse_flags(
        [Word(text, 1, column, False) for column, text in enumerate(texts, start=1)]
    )
    errors = [finding for finding in findings if finding.is_error]
    ours = {**defaults(), **{flag.dest: flag.value for flag in flags}}
    try:
        theirs = vars(PARSER.parse_args(list(texts)))
    except Rejected:
        assert errors
        return
    assert all(is_stricter(finding) for finding in errors)
    if not errors:
        assert ours == {
            dest: tuple(value) if isinstance(value, list) else value for dest, value in theirs.items()
        }


@st.composite
def list_expressions(draw: st.DrawFn) -> tuple[str, tuple[int, ...]]:
    """A sum of repeated lists, and the list that it is."""
    text: list[str] = []
    value: tuple[int, ...] = ()
    for _ in range(draw(st.integers(1, 4))):
        entries, times = draw(st.lists(st.integers(0, 1), min_size=1, max_size=4)), draw(st.integers(0, 60))
        listed = f"[{','.join(map(str, entries))}]"
        text.append(draw(st.sampled_from([f"{listed}*{times}", f"{times}*{listed}", f"({listed}*{times})"])))
        value += tuple(entries) * times
    return "+".join(text), value


@given(list_expressions())
def test_list_expressions_mean_what_python_means(made: tuple[str, tuple[int, ...]]) -> None:
    text, value = made
    assert given_values(f"--moe-layer-freq {text}") == {"moe_layer_freq": value}


@given(st.lists(st.text(max_size=8), max_size=6))
def test_no_words_are_too_odd(texts: Sequence[str]) -> None:
    _, findings = parse_flags([Word(text, 1, 1, False) for text in texts])
    assert len(findings) <= len(texts)
    assert bool(findings) is bool(texts)


# No flag of Megatron's is passed over


COMMON = """--hidden-size 512 --num-attention-heads 8 --max-position-embeddings 2048 --seq-length 1024
    --micro-batch-size 1 --padded-vocab-size 1024 --disable-bias-linear --bf16
    --ffn-hidden-size 1024"""
EXPERTS = """--num-experts 8 --moe-ffn-hidden-size 256 --moe-router-topk 2 --moe-router-num-groups 4
    --moe-router-group-topk 2 --moe-shared-expert-intermediate-size 256"""

# Models that together use every kind of layer; each must see every flag, or say that it does not.
MODELS = {
    "dense": f"""{COMMON} --swiglu --num-layers 4 --group-query-attention --num-query-groups 2
        --position-embedding-type rope --window-size 127,0""",
    "experts": f"""{COMMON} {EXPERTS} --swiglu --num-layers 4 --position-embedding-type yarn
        --rotary-scaling-factor 8""",
    "latent": f"""{COMMON} {EXPERTS} --swiglu --num-layers 4 --position-embedding-type rope
        --multi-latent-attention""",
    "hybrid": f"""{COMMON} {EXPERTS} --squared-relu --export-model-type HybridModel
        --hybrid-layer-pattern MG*-E --position-embedding-type none --group-query-attention
        --num-query-groups 2""",
    "table": f"{COMMON} --num-layers 4",
}


def without(flags: Sequence[Flag], dest: str) -> list[Flag]:
    return [flag for flag in flags if flag.dest != dest]


def another_value(spec: FlagSpec, default: object) -> tuple[str, ...]:
    """Words that make ``spec`` store something other than ``default``, and nothing that is known harmless."""
    if spec.values == "0":
        return ()
    if spec.choices:
        harmless = {default, spec.default, *INERT.get(spec.dest, ())}
        word = next(choice for choice in spec.choices if spec.read(choice) not in harmless)
    elif spec.type == "float":
        word = str(default / 2 if isinstance(default, int | float) and default else 0.25)
    elif spec.type == "int":
        word = str(default * 2 if isinstance(default, int) and default else 4)
    else:
        word = {"comma-separated ints": "63,0", "int or list expression": "2"}.get(spec.type, "other")
    return (word,) * (int(spec.values) if spec.values.isdigit() else 1)


def read(flags: Sequence[Flag]) -> tuple[Arguments, list[Finding]]:
    arguments, wrong = resolve(flags)
    return arguments, [*wrong, *unmodelled(flags)]


@pytest.mark.parametrize("model", MODELS)
def test_the_models_that_every_flag_is_tried_on_are_right(model: str) -> None:
    flags, wrong = parse(MODELS[model])
    assert not [*wrong, *read(flags)[1]]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_flag_is_passed_over(spec: FlagSpec) -> None:
    """Harmless with a reason, or it changes what the harness works with, or a finding names it."""
    for model, text in MODELS.items():
        base = without(parse(text)[0], spec.dest)
        before, _ = read(base)
        spelled = [spec.name, *(alias for alias in spec.aliases if spec.values == "0")]
        for name in spelled:
            given, wrong = parse(" ".join((name, *another_value(spec, before.values[spec.dest]))))
            if given and given[0].value in (spec.default, before[spec.dest]):
                continue  # the spelling that says what is so anyway
            after, findings = read([*base, *given])
            named = any(spec.name == finding.flag or name == finding.flag for finding in [*wrong, *findings])
            seen = any(after[dest] != before[dest] for dest in MODELLED)
            harmless = spec.role in (Role.RUNTIME, Role.LAYOUT) and spec.reason
            assert harmless or named or seen, f"{name} in {model}"
            assert spec.role is not Role.MODEL or named or spec.dest in MODELLED, f"{name} in {model}"


# What one flag alone cannot make right: the flags that it needs beside it.
BESIDE = {
    "activation_func_clamp_value": "--no-bias-swiglu-fusion",
    "glu_linear_offset": "--no-bias-swiglu-fusion",
    "export_moe_apply_probs_on_input": "--moe-router-topk 1 --moe-router-score-function sigmoid",
    "moe_router_enable_expert_bias": "--moe-router-score-function sigmoid",
    "moe_router_group_topk": "--moe-router-topk 4",
    "rope_type": "--no-rope-fusion",
}
# Values of modelled flags that the harness models, where the first of the choices is none of them.
VALUES = {"softmax_type": ("learnable",), "mamba_head_dim": ("32",)}
NEVER_WELCOME = {
    "encoder_num_layers": "Megatron refuses it beside --num-layers",
    "encoder_seq_length": "Megatron refuses it beside --seq-length",
    "rope_scaling_factor": "the ModelOpt builder does not pass it on",
    "rotary_seq_len_interpolation_factor": "the ModelOpt builder does not pass it on",
}


@pytest.mark.parametrize("dest", sorted(MODELLED - NEVER_WELCOME.keys()))
def test_every_modelled_flag_is_of_use_to_some_model(dest: str) -> None:
    """Without a complaint: the harness does not refuse what it claims to model."""
    spec = next(spec for spec in SPECS if spec.dest == dest and spec.role is Role.MODEL)
    welcome = []
    for text in MODELS.values():
        base = without(parse(text)[0], dest)
        words = VALUES.get(dest, another_value(spec, read(base)[0].values[dest]))
        given, _ = parse(" ".join((spec.name, *words, BESIDE.get(dest, ""))))
        _, findings = read([*base, *given])
        welcome.append(not any(finding.flag == spec.name for finding in findings))
    assert any(welcome)


def test_the_values_that_change_nothing_are_few() -> None:
    """Of flags that otherwise change the model; none of them is modelled."""
    assert set(INERT) == {"transformer_impl", "moe_router_load_balancing_type"}
    assert not MODELLED & set(INERT)
