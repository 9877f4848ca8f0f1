"""Validation: effective arguments -> what Megatron would refuse, and what it would take and not use.

The checks of ``validate_args`` (``megatron/training/arguments.py``), of the config classes
(``transformer_config.py``) and of the layers themselves that depend on a preset's flags alone, each as a
finding at its flag, all at once: Megatron stops at its first. A flag that the described model has no use
for is an error where its author surely meant another model, else a warning. ``idle.py`` lists those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from harness.arguments.idle import idle
from harness.arguments.kinds import has_layer, is_hybrid, main_pattern
from harness.arguments.validation_moe import experts, groups_of_experts, routing
from harness.finding import Finding, Severity

if TYPE_CHECKING:
    from harness.arguments.values import Arguments

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
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "rotary_base",
    "rotary_percent",
    "rotary_seq_len_interpolation_factor",
    "rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "layernorm_epsilon",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_state_dim",
    "mamba_num_groups",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
)

# Pairs that Megatron refuses or of which it silently uses one.
_CONTRADICTIONS = (
    ("bf16", "fp16", "Megatron refuses both precisions at once"),
    ("swiglu", "squared_relu", "Megatron refuses both activations at once"),
    ("swiglu", "quick_geglu", "Megatron refuses both activations at once"),
    ("squared_relu", "quick_geglu", "Megatron uses squared ReLU and drops the other without a word"),
    ("multi_latent_attention", "group_query_attention", "they are mutually exclusive"),
    ("multi_latent_attention", "rotary_interleaved", "Megatron refuses it with latent attention"),
    ("multi_latent_attention", "attention_output_gate", "Megatron refuses it with latent attention"),
    ("num_layers", "encoder_num_layers", "Megatron refuses both at once"),
    ("seq_length", "encoder_seq_length", "Megatron refuses both at once"),
)


def faults(arguments: Arguments) -> tuple[Finding, ...]:
    """Everything wrong with ``arguments`` as a whole, topic by topic."""
    return tuple(finding for rule in _RULES for finding in rule(arguments))


def _positive(a: Arguments) -> Iterator[Finding]:
    for dest in _POSITIVE:
        value = a.values.get(dest)
        if a.given(dest) and isinstance(value, int | float) and value <= 0:
            yield a.finding(dest, f"{a.origin(dest).flag} must be positive", expected="> 0", actual=value)


def _contradictions(a: Arguments) -> Iterator[Finding]:
    for one, other, why in _CONTRADICTIONS:
        apart = a.origin(one).flag != a.origin(other).flag
        if _is_set(a[one]) and _is_set(a[other]) and a.given(other) and apart:
            yield a.finding(other, f"contradicts {_at(a, one)}: {why}")


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _at(a: Arguments, dest: str) -> str:
    origin = a.origin(dest)
    return f"{origin.flag} on line {origin.line}" if origin.line else origin.flag


def _required(a: Arguments) -> Iterator[Finding]:
    for dest in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if a[dest] is None:
            yield a.finding(dest, f"{a.origin(dest).flag} is missing, and Megatron has no default for it")
    for dest in ("micro_batch_size", "seq_length"):
        if a[dest] is None:
            flag = a.origin(dest).flag
            message = f"{flag} is missing: Megatron refuses to start unless the run adds it"
            yield a.finding(dest, message, severity=Severity.WARNING)


def _lengths(a: Arguments) -> Iterator[Finding]:
    positions = a["max_position_embeddings"]
    for dest in ("seq_length", "decoder_seq_length"):
        length = a[dest]
        if length is not None and positions is not None and length > positions:
            message = (
                f"{a.origin(dest).flag} is larger than --max-position-embeddings ({positions}): "
                "Megatron refuses it"
            )
            yield a.finding(dest, message, expected=f"<= {positions}", actual=length)


def _heads(a: Arguments) -> Iterator[Finding]:
    heads, groups = a["num_attention_heads"], a["num_query_groups"]
    if a["group_query_attention"] and heads and groups and groups > 0 and heads % groups:
        message = f"{heads} heads / {groups} groups is not whole"
        yield a.finding("num_query_groups", message, expected=f"a divisor of {heads}", actual=groups)


def _vocabulary(a: Arguments) -> Iterator[Finding]:
    """``--vocab-size`` counts only where the tokenizer has no size of its own."""
    tokenizer = a["tokenizer_type"]
    own = tokenizer is not None and not tokenizer.startswith("Null")
    if a["vocab_size"] is not None and a["padded_vocab_size"] is None and own:
        message = (
            f"--vocab-size has no effect with {tokenizer}, which has a size of its own; "
            "set --padded-vocab-size"
        )
        yield a.finding("vocab_size", message, severity=Severity.WARNING, actual=a["vocab_size"])


# ---- positions ----


def _positions(a: Arguments) -> Iterator[Finding]:
    kind, latent = a["position_embedding_type"], a["multi_latent_attention"]
    if not a["add_position_embedding"] and kind != "rope" and not a.origin("position_embedding_type").built:
        message = "Megatron refuses --no-position-embedding here; use --position-embedding-type"
        yield a.finding("add_position_embedding", message)
    if latent and (kind == "yarn" or a["enable_gpt_oss"]):
        dest = "enable_gpt_oss" if a["enable_gpt_oss"] else "position_embedding_type"
        message = (
            "latent attention has rotary positions of its own, and Megatron's model fails with these "
            "beside them: write --position-embedding-type rope, and --rope-type yarn"
        )
        yield a.finding(dest, message, expected="rope", actual=kind)
    if kind == "mrope" and a["mrope_section"] is None:
        yield a.finding("position_embedding_type", "Megatron refuses mrope without --mrope-section")
    if a["rope_type"] == "yarn" and not latent:
        message = (
            "Megatron refuses --rope-type yarn without --multi-latent-attention: write "
            "--position-embedding-type yarn"
        )
        yield a.finding("rope_type", message, expected="--position-embedding-type yarn", actual="yarn")
    percent = a["rotary_percent"]
    if a.given("rotary_percent") and percent > 1:
        yield a.finding("rotary_percent", "more than the whole of a head", expected="<= 1", actual=percent)


def _rope_scaling(a: Arguments) -> Iterator[Finding]:
    factor = a["rope_scaling_factor"]
    if not a["use_rope_scaling"]:
        if a.given("rope_scaling_factor"):
            message = "--rope-scaling-factor has no effect without --use-rope-scaling"
            yield a.finding("rope_scaling_factor", message, severity=Severity.WARNING, actual=factor)
    elif factor != _BUILT_ROPE_SCALING_FACTOR:
        message = (
            f"--rope-scaling-factor {factor:g} does not reach the model: Megatron-LM's ModelOpt builder "
            f"passes on --use-rope-scaling alone, and the factor stays {_BUILT_ROPE_SCALING_FACTOR:g}"
        )
        yield a.finding(
            "rope_scaling_factor",
            message,
            severity=Severity.WARNING,
            expected=_BUILT_ROPE_SCALING_FACTOR,
            actual=factor,
        )


# megatron/post_training/model_builder.py of core_v0.19.0 leaves GPTModel's own default.
_BUILT_ROPE_SCALING_FACTOR = 8.0


# ---- attention ----


def _per_layer(a: Arguments) -> Iterator[Finding]:
    """Patterns that name every layer, and frequencies over them."""
    layers = a["num_layers"]
    for dest in ("moe_layer_freq", "no_rope_freq", "window_attn_skip_freq"):
        value, flag = a[dest], a.origin(dest).flag
        if isinstance(value, list | tuple):
            if layers is not None and len(value) != layers:
                message = f"the pattern has {len(value)} layers, --num-layers {layers}"
                yield a.finding(dest, message, expected=layers, actual=len(value))
            if dest == "moe_layer_freq" and set(value) - {0, 1}:
                message = "Megatron refuses a pattern of anything but 0 (dense) and 1 (experts)"
                yield a.finding(dest, message, expected="0 and 1", actual=value)
        elif value is not None and value < 1 and not (dest == "no_rope_freq" and value == 0):
            yield a.finding(dest, f"{flag} must be at least 1", expected=">= 1", actual=value)
        elif dest == "no_rope_freq" and value and layers is not None and layers % value:
            message = f"Megatron refuses it: --no-rope-freq {value} does not divide --num-layers {layers}"
            yield a.finding(dest, message, expected=f"a divisor of {layers}", actual=value)


def _window(a: Arguments) -> Iterator[Finding]:
    window = a["window_size"]
    if window is None:
        return
    if len(window) != 2:
        message = "takes two numbers, tokens before and tokens after, such as 127,0"
        yield a.finding("window_size", message, expected="two numbers", actual=window)
    elif window[1] != 0 and tuple(window) != (-1, -1):
        message = "a causal model sees no tokens after: the second number must be 0"
        yield a.finding("window_size", message, expected=(window[0], 0), actual=window)
    elif window[0] < 0:
        message = "a window of no tokens before; leave --window-size out for a model without one"
        yield a.finding("window_size", message, expected=">= 0", actual=window)


def _latent(a: Arguments) -> Iterator[Finding]:
    if not a["multi_latent_attention"]:
        if a["mla_down_proj_fusion"]:
            yield a.finding("mla_down_proj_fusion", "Megatron refuses it without --multi-latent-attention")
        return
    if a["rope_type"] == "rope" and a["apply_rope_fusion"] and a["position_embedding_type"] == "rope":
        message = "Megatron refuses plain rotary positions of latent attention fused: add --no-rope-fusion"
        yield a.finding("rope_type", message, expected="--no-rope-fusion", actual="rope")
    beside = (("window_size", None), ("window_attn_skip_freq", None), ("softmax_type", "vanilla"))
    for dest, neutral in beside:
        if a[dest] != neutral:
            message = "the harness does not model it beside --multi-latent-attention: nothing here checks it"
            yield a.finding(dest, message, expected=neutral, actual=a[dest])
    if is_hybrid(a.values) and not set("+D") & set(main_pattern(a.values)):
        message = (
            "ModelOpt's hybrid layers have no latent attention: layers * of --hybrid-layer-pattern would be "
            "plain attention, without rotary positions"
        )
        yield a.finding("multi_latent_attention", message)


def _query_key_norms(a: Arguments) -> Iterator[Finding]:
    if a["qk_layernorm"] and a["export_qk_l2_norm"] and not a["multi_latent_attention"]:
        message = (
            f"has no effect beside {_at(a, 'export_qk_l2_norm')}: ModelOpt's layers take the L2 norm, "
            "which has no weights"
        )
        yield a.finding("qk_layernorm", message, severity=Severity.WARNING)


# ---- feed-forward ----


def _activation(a: Arguments) -> Iterator[Finding]:
    """What Megatron's fused activations refuse, and what they pass over in silence."""
    dense = has_layer(a.values, "dense")
    if a["swiglu"] and a["bias_swiglu_fusion"]:
        if a["glu_linear_offset"]:
            message = "Megatron refuses it with the fused --swiglu: add --no-bias-swiglu-fusion"
            yield a.finding("glu_linear_offset", message, actual=a["glu_linear_offset"])
        if a["activation_func_clamp_value"] is not None:
            message = "the fused --swiglu does not clamp: add --no-bias-swiglu-fusion"
            yield a.finding("activation_func_clamp_value", message, actual=a["activation_func_clamp_value"])
    # Without biases Megatron turns this fusion off by itself.
    if a["swiglu"] or not (a["bias_gelu_fusion"] and a["add_bias_linear"]):
        return
    if a["squared_relu"]:
        message = (
            "Megatron refuses it with the fused bias: add --no-bias-gelu-fusion or --disable-bias-linear"
        )
        yield a.finding("squared_relu", message)
    elif a["quick_geglu"] and dense:
        message = "Megatron's dense layers fail with it and the fused bias: add --no-bias-gelu-fusion"
        yield a.finding("quick_geglu", message)
    elif a["num_experts"] is not None and not a["quick_geglu"] and has_layer(a.values, "moe"):
        message = "Megatron's experts fail with plain GELU and the fused bias: add --no-bias-gelu-fusion"
        yield a.finding("num_experts", message)


# ---- hybrids ----


def _hybrid(a: Arguments) -> Iterator[Finding]:
    pattern, model = a["hybrid_layer_pattern"], a["export_model_type"]
    if a.origin("export_model_type").built:
        message = "--export-model-type MambaModel is deprecated: write HybridModel, which it means"
        yield a.finding("export_model_type", message, severity=Severity.WARNING, expected=model)
    if pattern is None:
        return
    if model != "HybridModel":
        message = (
            "the layer pattern only gives the number of layers: without --export-model-type HybridModel "
            "Megatron-LM's ModelOpt builder makes a GPTModel, with attention in every layer"
        )
        yield a.finding("hybrid_layer_pattern", message, expected="HybridModel", actual=model)
    main, _, heads = pattern.partition("/")
    if heads.strip("/"):
        message = (
            f"the part after the slash ({heads}) adds multi-token prediction layers, and the harness does "
            "not model them: nothing here checks them"
        )
        yield a.finding("hybrid_layer_pattern", message, expected=main, actual=pattern)
        if len(set(heads.split("/"))) > 1:
            message = "Megatron refuses prediction layers that differ from one another"
            yield a.finding("hybrid_layer_pattern", message, actual=heads)
    if (stages := main.count("|") + 1) > 1:
        message = (
            f"the pattern is split into {stages} pipeline stages (|), so it runs at no other pipeline size: "
            "leave the split to the run"
        )
        yield a.finding("hybrid_layer_pattern", message, severity=Severity.WARNING, actual=f"pp{stages}")


def _hybrid_layers(a: Arguments) -> Iterator[Finding]:
    if not is_hybrid(a.values):
        return
    if a["rotary_interleaved"] and a["position_embedding_type"] in ("rope", "yarn"):
        message = (
            "Megatron's HybridModel makes its rotary frequencies in halves whatever this says, and its "
            "attention would rotate neighbours by them: it cannot have interleaved rotary positions"
        )
        yield a.finding("rotary_interleaved", message)
    hidden, head = a["hidden_size"], a["mamba_head_dim"]
    if a.origin("mamba_num_heads").built and hidden and 2 * hidden % head and has_layer(a.values, "mamba"):
        message = f"twice --hidden-size {hidden} / --mamba-head-dim {head} is not whole"
        yield a.finding("mamba_head_dim", message, expected=f"a divisor of {2 * hidden}", actual=head)
    if a.given("moe_layer_freq") and a["num_experts"] is not None:
        frequency = a["moe_layer_freq"]
        severity = Severity.WARNING if frequency == 1 else Severity.ERROR
        message = "has no effect on a hybrid model: --hybrid-layer-pattern says which layers have experts"
        yield a.finding("moe_layer_freq", message, severity=severity, actual=frequency)


def _predictions(a: Arguments) -> Iterator[Finding]:
    kinds = ("rope", "none")
    if a["mtp_num_layers"] and a["position_embedding_type"] not in kinds:
        message = (
            f"Megatron refuses multi-token prediction with --position-embedding-type "
            f"{a['position_embedding_type']}"
        )
        yield a.finding("mtp_num_layers", message, expected=" or ".join(kinds))


_RULES: tuple[Callable[[Arguments], Iterator[Finding]], ...] = (
    _positive,
    _contradictions,
    _required,
    _lengths,
    _heads,
    _vocabulary,
    _positions,
    _rope_scaling,
    _per_layer,
    _window,
    _latent,
    _query_key_norms,
    _activation,
    experts,
    routing,
    groups_of_experts,
    _hybrid,
    _hybrid_layers,
    _predictions,
    idle,
)
