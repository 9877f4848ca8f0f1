"""Arguments: the flags of a preset -> the values that Megatron-LM's parser and validation arrive at.

Megatron fills in what a preset leaves out, and some defaults depend on other flags
(``megatron/training/arguments.py``, ``validate_args``). This module arrives at the same values without
importing Megatron, remembers where each came from, and turns what Megatron would refuse into findings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from harness.finding import Finding, Severity
from harness.flags import Flag, defaults, flag_table


class How(StrEnum):
    GIVEN = "given"
    DEFAULT = "default"
    DERIVED = "derived"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an effective value comes from: a flag on a line, Megatron's default, or another flag.

    ``flag`` is the flag to change; for a default it is the flag that would set the value.
    """

    how: How
    flag: str
    line: int | None = None
    column: int | None = None
    because: str = ""


@dataclass(frozen=True)
class Arguments:
    """Megatron's effective arguments by argparse name (``hidden_size``), and where each came from."""

    values: Mapping[str, Any]
    origins: Mapping[str, Origin]

    def __repr__(self) -> str:
        """What differs from Megatron's defaults; all 800 would hide it."""
        standard = defaults()
        given = (f"{dest}={value!r}" for dest, value in self.values.items() if value != standard.get(dest))
        return f"Arguments({', '.join(given)})"

    def __getitem__(self, dest: str) -> Any:
        return self.values[dest]

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
        return Arguments(MappingProxyType({**self.values, **changes}), self.origins)


def flag_for(dest: str) -> str:
    """The flag that sets ``dest`` (``layernorm_epsilon`` -> ``--norm-epsilon``)."""
    for spec in flag_table().values():
        if spec.dest == dest:
            return spec.name
    return "--" + dest.replace("_", "-")


class _Resolution:
    """Values while the rules run over them; local to ``resolve``."""

    def __init__(self, flags: Sequence[Flag]) -> None:
        self.values: dict[str, Any] = dict(defaults())
        self.origins: dict[str, Origin] = {}
        self.findings: list[Finding] = []
        for flag in flags:
            self.values[flag.dest] = flag.value
            self.origins[flag.dest] = Origin(How.GIVEN, flag.name, flag.line, flag.column)

    def given(self, dest: str) -> bool:
        return dest in self.origins and self.origins[dest].how is How.GIVEN

    def derive(self, dest: str, value: Any, blame: str, because: str) -> None:
        """Set ``dest`` to what Megatron derives; ``blame`` is the argument to change if it is wrong."""
        self.values[dest] = value
        decided = self.origins.get(blame) or Origin(How.DEFAULT, flag_for(blame))
        self.origins[dest] = Origin(How.DERIVED, decided.flag, decided.line, decided.column, because)

    def report(
        self,
        dest: str,
        message: str,
        *,
        severity: Severity = Severity.ERROR,
        expected: Any = None,
        actual: Any = None,
    ) -> None:
        arguments = Arguments(self.values, self.origins)
        self.findings.append(
            arguments.finding(dest, message, severity=severity, expected=expected, actual=actual)
        )


_POSITIVE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "seq_length",
    "padded_vocab_size",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "micro_batch_size",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "rotary_base",
    "rotary_percent",
    "rotary_seq_len_interpolation_factor",
    "layernorm_epsilon",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_head_dim",
    "v_head_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_state_dim",
    "mamba_num_groups",
)

# Pairs that Megatron's validation refuses or of which it silently uses one.
_CONTRADICTIONS = (
    ("bf16", "fp16", "Megatron refuses both precisions at once"),
    ("swiglu", "squared_relu", "Megatron refuses both activations at once"),
    ("swiglu", "quick_geglu", "Megatron refuses both activations at once"),
    ("squared_relu", "quick_geglu", "Megatron uses squared ReLU and drops the other without a word"),
    ("multi_latent_attention", "group_query_attention", "they are mutually exclusive"),
    ("qk_layernorm", "export_qk_l2_norm", "the ModelOpt layer spec would use the L2 norm only"),
)


def _positive(r: _Resolution) -> None:
    for dest in _POSITIVE:
        value = r.values.get(dest)
        if r.given(dest) and isinstance(value, int | float) and value <= 0:
            r.report(dest, f"{r.origins[dest].flag} must be positive", expected="> 0", actual=value)


def _contradictions(r: _Resolution) -> None:
    for one, other, why in _CONTRADICTIONS:
        if r.values.get(one) and r.values.get(other):
            first = r.origins[one]
            r.report(other, f"contradicts {first.flag} on line {first.line}: {why}")


def _model_type(r: _Resolution) -> None:
    if r.values["export_model_type"] == "MambaModel":
        message = "--export-model-type MambaModel is deprecated: write HybridModel, which it means"
        r.report(
            "export_model_type",
            message,
            severity=Severity.WARNING,
            expected="HybridModel",
            actual="MambaModel",
        )
        r.derive("export_model_type", "HybridModel", "export_model_type", "MambaModel means HybridModel")


def _pattern(r: _Resolution) -> None:
    """The hybrid pattern decides the number of layers, and more, whatever other flags say."""
    if r.values["hybrid_override_pattern"] is not None:
        if r.given("hybrid_layer_pattern"):
            message = "Megatron refuses --hybrid-override-pattern together with --hybrid-layer-pattern"
            r.report("hybrid_override_pattern", message)
        else:
            because = "--hybrid-override-pattern, deprecated, is copied into --hybrid-layer-pattern"
            pattern = r.values["hybrid_override_pattern"]
            r.derive("hybrid_layer_pattern", pattern, "hybrid_override_pattern", because)
    pattern = r.values["hybrid_layer_pattern"]
    if pattern is None:
        return
    main, _, heads = pattern.partition("/")
    layers = len(main.replace("|", ""))
    if r.given("num_layers") and r.values["num_layers"] != layers:
        message = f"--num-layers has no effect: the layer pattern names {layers} layers"
        r.report("num_layers", message, expected=layers, actual=r.values["num_layers"])
    r.derive("num_layers", layers, "hybrid_layer_pattern", f"the layer pattern names {layers} layers")
    if set("+D") & set(main):
        because = "the layer pattern has latent attention"
        r.derive("multi_latent_attention", True, "hybrid_layer_pattern", because)
    if heads:
        depths = heads.count("/") + 1
        r.derive("mtp_num_layers", depths, "hybrid_layer_pattern", "the layer pattern ends in MTP layers")
    if r.values["export_model_type"] != "HybridModel":
        r.report(
            "hybrid_layer_pattern",
            "the layer pattern only gives the number of layers: without --export-model-type HybridModel "
            "Megatron-LM's ModelOpt builder makes a GPTModel, with attention in every layer",
            expected="HybridModel",
            actual=r.values["export_model_type"],
        )


def _mamba(r: _Resolution) -> None:
    hidden, head = r.values["hidden_size"], r.values["mamba_head_dim"]
    hybrid = r.values["export_model_type"] == "HybridModel"
    if hybrid and r.values["mamba_num_heads"] is None and hidden and head and head > 0:
        if 2 * hidden % head:
            message = f"twice --hidden-size {hidden} / --mamba-head-dim {head} is not whole"
            r.report("mamba_num_heads", message)
        because = "--mamba-num-heads is not set: twice --hidden-size / --mamba-head-dim"
        r.derive("mamba_num_heads", 2 * hidden // head, "mamba_num_heads", because)


def _yarn(r: _Resolution) -> None:
    """YaRN's constants: what the builder sets for gpt-oss, or Megatron's own where no flag gives one."""
    if r.values["enable_gpt_oss"]:
        for dest, value in _GPT_OSS_YARN.items():
            r.derive(dest, value, "enable_gpt_oss", "--enable-gpt-oss sets it, whatever other flags say")
        if r.values["position_embedding_type"] != "learned_absolute":
            # A learned table, Megatron's default, is added all the same.
            because = "--enable-gpt-oss sets it"
            r.derive("position_embedding_type", "yarn", "enable_gpt_oss", because)
    elif r.values["position_embedding_type"] == "yarn":
        for dest, value in _YARN.items():
            if r.values[dest] is None:
                r.derive(dest, value, dest, f"{flag_for(dest)} is not set")


# Megatron's argument_utils.py; and model_builder.py of core_v0.19.0, whatever the flags say.
_YARN = {
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
}
_GPT_OSS_YARN = {
    "rotary_scaling_factor": 32.0,
    "yarn_original_max_position_embeddings": 131072,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": False,
}


def _layers(r: _Resolution) -> None:
    if r.values["num_layers"] is None and r.values["encoder_num_layers"] is not None:
        r.derive(
            "num_layers", r.values["encoder_num_layers"], "encoder_num_layers", "--num-layers is not set"
        )
    elif r.given("num_layers") and r.given("encoder_num_layers"):
        r.report("encoder_num_layers", "Megatron refuses --encoder-num-layers together with --num-layers")


def _required(r: _Resolution) -> None:
    for dest in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if r.values[dest] is None:
            r.report(dest, f"{flag_for(dest)} is missing, and Megatron has no default for it")
    if r.values["micro_batch_size"] is None:
        r.report(
            "micro_batch_size",
            "--micro-batch-size is missing: Megatron refuses to start unless the run adds it",
            severity=Severity.WARNING,
        )


def _sequence(r: _Resolution) -> None:
    if r.values["seq_length"] is None:
        if r.values["encoder_seq_length"] is not None:
            r.derive(
                "seq_length", r.values["encoder_seq_length"], "encoder_seq_length", "--seq-length is not set"
            )
        else:
            r.report(
                "seq_length",
                "--seq-length is missing: Megatron refuses to start unless the run adds it",
                severity=Severity.WARNING,
            )
    length, positions = r.values["seq_length"], r.values["max_position_embeddings"]
    if length is not None and positions is not None and length > positions:
        r.report(
            "seq_length",
            f"--seq-length is larger than --max-position-embeddings ({positions}): Megatron refuses it",
            expected=f"<= {positions}",
            actual=length,
        )


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
            r.report(
                "kv_channels",
                f"--kv-channels is not set and --hidden-size {hidden} / --num-attention-heads {heads} "
                "is not whole: Megatron refuses it",
            )
        because = "--kv-channels is not set: --hidden-size / --num-attention-heads"
        r.derive("kv_channels", hidden // heads, "kv_channels", because)


def _groups(r: _Resolution) -> None:
    heads = r.values["num_attention_heads"]
    if not r.values["group_query_attention"]:
        if r.given("num_query_groups") and r.values["num_query_groups"] != heads:
            r.report(
                "num_query_groups",
                "has no effect without --group-query-attention: Megatron builds multi-head attention",
                expected="--group-query-attention",
                actual="not set",
            )
        because = "--group-query-attention is not set, so every head is its own group"
        r.derive("num_query_groups", heads, "group_query_attention", because)
        return
    groups = r.values["num_query_groups"]
    if heads and groups and groups > 0 and heads % groups:
        r.report(
            "num_query_groups",
            f"{heads} heads / {groups} groups is not whole",
            expected=f"a divisor of {heads}",
            actual=groups,
        )


def _biases(r: _Resolution) -> None:
    if r.values["add_bias_linear"]:
        r.derive("add_qkv_bias", True, "add_bias_linear", "no --disable-bias-linear adds every bias")


def _positions(r: _Resolution) -> None:
    if r.values["use_rotary_position_embeddings"]:
        r.derive(
            "position_embedding_type",
            "rope",
            "use_rotary_position_embeddings",
            "--use-rotary-position-embeddings",
        )
    if not r.values["add_position_embedding"] and r.values["position_embedding_type"] != "rope":
        r.report(
            "add_position_embedding",
            "Megatron refuses --no-position-embedding here; use --position-embedding-type",
        )


def _softmax(r: _Resolution) -> None:
    if r.values["apply_query_key_layer_scaling"]:
        r.derive(
            "attention_softmax_in_fp32",
            True,
            "apply_query_key_layer_scaling",
            "--apply-query-key-layer-scaling turns it on",
        )


def _experts(r: _Resolution) -> None:
    experts = r.values["num_experts"]
    if experts == 0:
        r.derive("num_experts", None, "num_experts", "0 means none")
        experts = None
    if experts is None:
        for dest in ("moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size"):
            if r.given(dest):
                r.report(dest, f"{r.origins[dest].flag} has no effect without --num-experts")
        return
    if experts < 0:
        r.report("num_experts", "--num-experts must be positive", expected="> 0", actual=experts)
    if r.values["moe_ffn_hidden_size"] is None:
        because = "--moe-ffn-hidden-size is not set, so --ffn-hidden-size is used"
        r.derive("moe_ffn_hidden_size", r.values["ffn_hidden_size"], "moe_ffn_hidden_size", because)
    topk = r.values["moe_router_topk"]
    if topk > experts > 0:
        r.report(
            "moe_router_topk",
            f"--moe-router-topk is larger than --num-experts ({experts})",
            expected=f"<= {experts}",
            actual=topk,
        )
    frequency, layers = r.values["moe_layer_freq"], r.values["num_layers"]
    if isinstance(frequency, int) and frequency < 1:
        r.report("moe_layer_freq", "--moe-layer-freq must be at least 1", expected=">= 1", actual=frequency)
    if isinstance(frequency, tuple | list) and layers is not None and len(frequency) != layers:
        r.report(
            "moe_layer_freq",
            f"the pattern has {len(frequency)} layers, --num-layers {layers}",
            expected=layers,
            actual=len(frequency),
        )


def _vocabulary(r: _Resolution) -> None:
    """``--vocab-size`` counts only where the tokenizer has no size of its own."""
    size, multiple = r.values["vocab_size"], r.values["make_vocab_size_divisible_by"]
    if r.values["padded_vocab_size"] is not None or size is None or multiple <= 0:
        return
    tokenizer = r.values["tokenizer_type"]
    if tokenizer is not None and not tokenizer.startswith("Null"):
        message = (
            f"--vocab-size has no effect with {tokenizer}, which has a size of its own; "
            "set --padded-vocab-size"
        )
        r.report("vocab_size", message, severity=Severity.WARNING, actual=size)
        return
    padded = -(-size // multiple) * multiple
    r.derive("padded_vocab_size", padded, "vocab_size", f"--vocab-size padded to a multiple of {multiple}")


def _rope_scaling(r: _Resolution) -> None:
    factor = r.values["rope_scaling_factor"]
    if not r.values["use_rope_scaling"]:
        if r.given("rope_scaling_factor"):
            message = "--rope-scaling-factor has no effect without --use-rope-scaling"
            r.report("rope_scaling_factor", message, severity=Severity.WARNING, actual=factor)
    elif factor != _BUILT_ROPE_SCALING_FACTOR:
        r.report(
            "rope_scaling_factor",
            f"--rope-scaling-factor {factor:g} does not reach the model: Megatron-LM's ModelOpt builder "
            f"passes on --use-rope-scaling alone, and the factor stays {_BUILT_ROPE_SCALING_FACTOR:g}",
            severity=Severity.WARNING,
            expected=_BUILT_ROPE_SCALING_FACTOR,
            actual=factor,
        )


# megatron/post_training/model_builder.py of core_v0.19.0 leaves GPTModel's own default.
_BUILT_ROPE_SCALING_FACTOR = 8.0


# Order matters where Megatron's does: the layer count and ffn size before what is derived from them.
_RULES: tuple[Callable[[_Resolution], None], ...] = (
    _positive,
    _contradictions,
    _model_type,
    _pattern,
    _layers,
    _required,
    _sequence,
    _ffn,
    _heads,
    _groups,
    _biases,
    _positions,
    _mamba,
    _yarn,
    _softmax,
    _experts,
    _rope_scaling,
    _vocabulary,
)


def resolve(flags: Sequence[Flag]) -> tuple[Arguments, tuple[Finding, ...]]:
    """Effective arguments of ``flags`` at tensor parallel size one, and what Megatron would refuse."""
    resolution = _Resolution(flags)
    for rule in _RULES:
        rule(resolution)
    arguments = Arguments(MappingProxyType(resolution.values), MappingProxyType(resolution.origins))
    return arguments, tuple(resolution.findings)
