"""Arguments: the flags of a preset -> the values that Megatron-LM arrives at.

Megatron fills in what a preset leaves out, and some defaults depend on other flags
(``megatron/training/arguments.py``, ``validate_args``); some more are decided when the model is built
(``argument_utils.py``, ``megatron/post_training/model_builder.py`` and the layers of megatron-core), and
those say so. This module arrives at the same values without importing Megatron and remembers where each
came from; ``validation.py`` says what Megatron would refuse or pass over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import Any

from harness.arguments.validation import faults
from harness.finding import Finding, Severity
from harness.flags import Flag, defaults, flag_table


class How(StrEnum):
    GIVEN = "given"
    DEFAULT = "default"
    DERIVED = "derived"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an effective value comes from: a flag on a line, Megatron's default, or another flag.

    ``flag`` is the flag to change; for a default it is the flag that would set the value. ``line`` is None
    where the flag stands in no line of the preset. ``built`` marks what Megatron decides only when it builds
    the model: its parsed and validated arguments still hold what the flags said.
    """

    how: How
    flag: str
    line: int | None = None
    column: int | None = None
    because: str = ""
    built: bool = False


@dataclass(frozen=True)
class Arguments:
    """Megatron's effective arguments by argparse name (``hidden_size``), and where each came from."""

    values: Mapping[str, Any]
    origins: Mapping[str, Origin]

    def __hash__(self) -> int:
        """Read-only views have none. Of equal arguments the same; telling others apart is left to ``==``."""
        return hash(frozenset(self.origins))

    def __reduce__(self) -> tuple[Any, ...]:
        """Read-only views do not cross processes; what they show does."""
        return _arguments, (dict(self.values), dict(self.origins))

    def __repr__(self) -> str:
        """What differs from Megatron's defaults; all 800 would hide it."""
        standard = defaults()
        given = (f"{dest}={value!r}" for dest, value in self.values.items() if value != standard.get(dest))
        return f"Arguments({', '.join(given)})"

    def __getitem__(self, dest: str) -> Any:
        return self.values[dest]

    def given(self, dest: str) -> bool:
        """Whether a flag of the preset sets ``dest`` itself."""
        origin = self.origins.get(dest)
        return origin is not None and origin.how is How.GIVEN

    def origin(self, dest: str) -> Origin:
        """Origin of any value, Megatron's default where nothing set it."""
        return self.origins.get(dest) or Origin(How.DEFAULT, flag_for(dest))

    def finding(
        self,
        dest: str,
        message: str,
        *,
        stage: str = "parse",
        severity: Severity = Severity.ERROR,
        expected: Any = None,
        actual: Any = None,
    ) -> Finding:
        """A finding that stands where the value of ``dest`` was decided."""
        origin = self.origin(dest)
        return Finding(
            stage, severity, message, origin.flag, origin.line, origin.column, None, expected, actual
        )

    def replaced(self, changes: Mapping[str, Any]) -> Arguments:
        """The same arguments with some values changed, origins kept."""
        return _arguments({**self.values, **changes}, self.origins)


def _arguments(values: Mapping[str, Any], origins: Mapping[str, Origin]) -> Arguments:
    return Arguments(MappingProxyType(dict(values)), MappingProxyType(dict(origins)))


def flag_for(dest: str) -> str:
    """The flag that sets ``dest`` (``layernorm_epsilon`` -> ``--norm-epsilon``)."""
    return _flags().get(dest) or "--" + dest.replace("_", "-")


@cache
def _flags() -> Mapping[str, str]:
    """By the argument that it sets a flag's name, the table's first where several set it."""
    return {spec.dest: spec.name for spec in reversed(list(flag_table().values()))}


class _Resolution:
    """Values while the rules run over them; local to ``resolve``."""

    def __init__(self, flags: Sequence[Flag]) -> None:
        self.values: dict[str, Any] = dict(defaults())
        self.origins: dict[str, Origin] = {}
        self.findings: list[Finding] = []
        for flag in flags:
            self.values[flag.dest] = flag.value
            self.origins[flag.dest] = Origin(How.GIVEN, flag.name, flag.line or None, flag.column or None)

    def given(self, dest: str) -> bool:
        return dest in self.origins and self.origins[dest].how is How.GIVEN

    def derive(self, dest: str, value: Any, blame: str, because: str, *, built: bool = False) -> None:
        """Set ``dest`` to what Megatron derives; ``blame`` is the argument to change if it is wrong."""
        self.values[dest] = value
        decided = self.origins.get(blame) or Origin(How.DEFAULT, flag_for(blame))
        self.origins[dest] = Origin(How.DERIVED, decided.flag, decided.line, decided.column, because, built)

    def report(self, dest: str, message: str, severity: Severity = Severity.ERROR, **values: Any) -> None:
        """A finding about a value that is about to be replaced, which ``validation`` would not see."""
        arguments = Arguments(self.values, self.origins)
        self.findings.append(arguments.finding(dest, message, severity=severity, **values))


def _pattern(r: _Resolution) -> None:
    """The hybrid pattern decides the number of layers, and more, whatever other flags say."""
    _older_patterns(r)
    pattern = r.values["hybrid_layer_pattern"]
    if pattern is None:
        return
    main, _, heads = pattern.partition("/")
    layers = len(main.replace("|", ""))
    if r.given("num_layers") and r.values["num_layers"] != layers:
        message = f"--num-layers has no effect: the layer pattern names {layers} layers"
        r.report("num_layers", message, expected=layers, actual=r.values["num_layers"])
    r.derive("num_layers", layers, "hybrid_layer_pattern", f"the layer pattern names {layers} layers")
    if set("+D") & set(pattern):
        because = "the layer pattern has latent attention"
        r.derive("multi_latent_attention", True, "hybrid_layer_pattern", because)
    if heads.strip("/"):
        depths = heads.count("/") + 1
        r.derive("mtp_num_layers", depths, "hybrid_layer_pattern", "the layer pattern ends in MTP layers")


def _older_patterns(r: _Resolution) -> None:
    """--hybrid-override-pattern and --mtp-hybrid-override-pattern become parts of the one pattern."""
    older, heads, depths = (
        r.values[dest]
        for dest in ("hybrid_override_pattern", "mtp_hybrid_override_pattern", "mtp_num_layers")
    )
    if older is not None and r.given("hybrid_layer_pattern"):
        message = "Megatron refuses --hybrid-override-pattern together with --hybrid-layer-pattern"
        r.report("hybrid_override_pattern", message)
    elif older is not None:
        because = "--hybrid-override-pattern, deprecated, is copied into --hybrid-layer-pattern"
        r.derive("hybrid_layer_pattern", older, "hybrid_override_pattern", because)
    main = r.values["hybrid_layer_pattern"] or ""
    if heads is not None and depths is not None and depths > 0 and "/" not in main:
        because = "--mtp-hybrid-override-pattern, deprecated, is added to --hybrid-layer-pattern"
        pattern = "/".join([main, *[heads] * depths])
        r.derive("hybrid_layer_pattern", pattern, "mtp_hybrid_override_pattern", because)
        r.derive("mtp_hybrid_override_pattern", None, "mtp_hybrid_override_pattern", because)


def _layers(r: _Resolution) -> None:
    if r.values["num_layers"] is None and r.values["encoder_num_layers"] is not None:
        because = "--num-layers is not set"
        r.derive("num_layers", r.values["encoder_num_layers"], "encoder_num_layers", because)


def _sequence(r: _Resolution) -> None:
    if r.values["seq_length"] is None and r.values["encoder_seq_length"] is not None:
        because = "--seq-length is not set"
        r.derive("seq_length", r.values["encoder_seq_length"], "encoder_seq_length", because)


def _ffn(r: _Resolution) -> None:
    hidden = r.values["hidden_size"]
    if r.values["ffn_hidden_size"] is None and hidden is not None:
        if r.values["swiglu"]:
            # Megatron's int((4 * hidden * 2 / 3) / 64) * 64, in whole numbers of any size.
            size, how = 8 * hidden // 192 * 64, "8/3 of --hidden-size, a multiple of 64"
        else:
            size, how = 4 * hidden, "4 times --hidden-size"
        r.derive("ffn_hidden_size", size, "ffn_hidden_size", f"--ffn-hidden-size is not set: {how}")


def _heads(r: _Resolution) -> None:
    hidden, heads = r.values["hidden_size"], r.values["num_attention_heads"]
    if r.values["kv_channels"] is None and hidden and heads:
        if hidden % heads:
            message = (
                f"--kv-channels is not set and --hidden-size {hidden} / --num-attention-heads {heads} "
                "is not whole: Megatron refuses it"
            )
            r.report("kv_channels", message)
        because = "--kv-channels is not set: --hidden-size / --num-attention-heads"
        r.derive("kv_channels", hidden // heads, "kv_channels", because)


def _groups(r: _Resolution) -> None:
    heads = r.values["num_attention_heads"]
    if r.values["group_query_attention"]:
        return
    if r.given("num_query_groups") and r.values["num_query_groups"] != heads:
        r.report(
            "num_query_groups",
            "has no effect without --group-query-attention: Megatron builds multi-head attention",
            expected="--group-query-attention",
            actual="not set",
        )
    because = "--group-query-attention is not set, so every head is its own group"
    r.derive("num_query_groups", heads, "group_query_attention", because, built=True)


def _biases(r: _Resolution) -> None:
    if r.values["add_bias_linear"]:
        r.derive("add_qkv_bias", True, "add_bias_linear", "no --disable-bias-linear adds every bias")


def _positions(r: _Resolution) -> None:
    if r.values["use_rotary_position_embeddings"]:
        given, kind = r.given("position_embedding_type"), r.values["position_embedding_type"]
        if given and kind != "rope":
            message = "--use-rotary-position-embeddings overrides it"
            r.report("position_embedding_type", message, expected="rope", actual=kind)
        because = "--use-rotary-position-embeddings"
        r.derive("position_embedding_type", "rope", "use_rotary_position_embeddings", because)


def _softmax(r: _Resolution) -> None:
    if r.values["apply_query_key_layer_scaling"]:
        because = "--apply-query-key-layer-scaling turns it on"
        r.derive("attention_softmax_in_fp32", True, "apply_query_key_layer_scaling", because)


def _experts(r: _Resolution) -> None:
    if r.values["num_experts"] == 0:
        r.derive("num_experts", None, "num_experts", "0 means none")
    if r.values["num_experts"] is not None and r.values["moe_ffn_hidden_size"] is None:
        because = "--moe-ffn-hidden-size is not set, so --ffn-hidden-size is used"
        r.derive("moe_ffn_hidden_size", r.values["ffn_hidden_size"], "moe_ffn_hidden_size", because)


def _vocabulary(r: _Resolution) -> None:
    """``--vocab-size`` counts only where the tokenizer has no size of its own."""
    size, multiple = r.values["vocab_size"], r.values["make_vocab_size_divisible_by"]
    if r.values["padded_vocab_size"] is not None or size is None or multiple <= 0:
        return
    tokenizer = r.values["tokenizer_type"]
    if tokenizer is None or tokenizer.startswith("Null"):
        padded = -(-size // multiple) * multiple
        because = f"--vocab-size padded to a multiple of {multiple}"
        r.derive("padded_vocab_size", padded, "vocab_size", because, built=True)


# ---- what the builder decides ----


def _model_type(r: _Resolution) -> None:
    if r.values["export_model_type"] == "MambaModel":
        because = "MambaModel means HybridModel"
        r.derive("export_model_type", "HybridModel", "export_model_type", because, built=True)


def _mamba(r: _Resolution) -> None:
    """MambaMixer's own number of heads."""
    hidden, head = r.values["hidden_size"], r.values["mamba_head_dim"]
    hybrid = r.values["export_model_type"] == "HybridModel"
    if hybrid and r.values["mamba_num_heads"] is None and hidden and head and head > 0:
        because = "--mamba-num-heads is not set: twice --hidden-size / --mamba-head-dim"
        r.derive("mamba_num_heads", 2 * hidden // head, "mamba_num_heads", because, built=True)


def _yarn(r: _Resolution) -> None:
    """YaRN's constants: what the builder sets for gpt-oss, or Megatron's own where no flag gives one."""
    if r.values["export_model_type"] == "GPTModel" and r.values["enable_gpt_oss"]:
        because = "--enable-gpt-oss sets it, whatever other flags say"
        for dest, value in GPT_OSS_YARN.items():
            if r.given(dest) and r.values[dest] != value:
                message = f"--enable-gpt-oss overrides it with {value}: leave one of the two out"
                r.report(dest, message, expected=value, actual=r.values[dest])
            r.derive(dest, value, "enable_gpt_oss", because, built=True)
        if r.values["position_embedding_type"] != "learned_absolute":
            # A learned table, Megatron's default, is added all the same.
            r.derive("position_embedding_type", "yarn", "enable_gpt_oss", because, built=True)
    elif r.values["position_embedding_type"] == "yarn" and not r.values["multi_latent_attention"]:
        for dest, value in _YARN.items():
            if r.values[dest] is None:
                r.derive(dest, value, dest, f"{flag_for(dest)} is not set", built=True)


# Megatron's argument_utils.py; and model_builder.py of core_v0.19.0, whatever the flags say.
_YARN = {
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
}
GPT_OSS_YARN = {
    "rotary_scaling_factor": 32.0,
    "yarn_original_max_position_embeddings": 131072,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": False,
}


# Order matters where Megatron's does: the layer count and ffn size before what is derived from them.
_RULES: tuple[Callable[[_Resolution], None], ...] = (
    _pattern,
    _layers,
    _sequence,
    _ffn,
    _heads,
    _groups,
    _biases,
    _positions,
    _softmax,
    _experts,
    _vocabulary,
    _model_type,
    _mamba,
    _yarn,
)


def resolve(flags: Sequence[Flag]) -> tuple[Arguments, tuple[Finding, ...]]:
    """Effective arguments of ``flags`` at tensor parallel size one, and what is wrong with them.

    Wrong is what Megatron would refuse, and what it would take and do nothing with.
    """
    resolution = _Resolution(flags)
    for rule in _RULES:
        rule(resolution)
    arguments = _arguments(resolution.values, resolution.origins)
    return arguments, (*resolution.findings, *faults(arguments))
