"""Idle: flags that Megatron takes and that the described model has no use for.

One flat table; a row says which flags, when they are of use, and why they are not otherwise. An error
where the author surely meant another model than the one that would be built, else a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.arguments.kinds import has_layer, is_hybrid, rotary
from harness.finding import Finding, Severity
from harness.flags import defaults

if TYPE_CHECKING:
    from harness.arguments.values import Arguments

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Idle:
    """``dests`` have an effect only where ``used``; ``why`` follows "has no effect"."""

    dests: str
    used: Callable[[Values], bool]
    why: str
    severity: Severity = Severity.ERROR


_MAMBA = "mamba_num_heads mamba_head_dim mamba_state_dim mamba_num_groups"
_DELTA = (
    "linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads "
    "linear_value_head_dim"
)
_YARN = (
    "yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int"
)
_ROTARY = "rotary_base rotary_percent rotary_interleaved no_rope_freq"


def _latent(values: Values) -> bool:
    return bool(values["multi_latent_attention"])


IDLE = (
    # experts
    Idle(
        "moe_ffn_hidden_size moe_router_topk moe_layer_freq moe_router_score_function "
        "moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_enable_expert_bias "
        "moe_router_num_groups moe_router_group_topk moe_shared_expert_intermediate_size "
        "moe_shared_expert_gate moe_router_dtype export_moe_apply_probs_on_input",
        lambda v: v["num_experts"] is not None,
        "without --num-experts",
    ),
    Idle(
        "num_experts",
        lambda v: v["num_experts"] is None or not is_hybrid(v) or has_layer(v, "moe"),
        "without a layer E in --hybrid-layer-pattern",
    ),
    Idle(
        "num_experts",
        lambda v: v["num_experts"] is None or is_hybrid(v) or has_layer(v, "moe"),
        "where --moe-layer-freq gives no layer experts",
    ),
    Idle(
        "moe_shared_expert_gate",
        lambda v: v["num_experts"] is None or v["moe_shared_expert_intermediate_size"] is not None,
        "without --moe-shared-expert-intermediate-size",
    ),
    Idle(
        "moe_router_pre_softmax",
        lambda v: v["moe_router_score_function"] == "softmax",
        "on scores that are no softmax (--moe-router-score-function)",
        Severity.WARNING,
    ),
    # feed-forward
    Idle(
        "glu_linear_offset activation_func_clamp_value",
        lambda v: bool(v["swiglu"] or v["quick_geglu"]),
        "on an activation without a gate",
    ),
    # latent attention
    Idle(
        "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim",
        _latent,
        "without --multi-latent-attention",
    ),
    Idle("rope_type", _latent, "without --multi-latent-attention", Severity.WARNING),
    Idle(
        "add_qkv_bias no_rope_freq export_qk_l2_norm",
        lambda v: not _latent(v),
        "on latent attention (--multi-latent-attention)",
    ),
    Idle(
        f"kv_channels {_YARN}",
        lambda v: not _latent(v),
        "on latent attention, which reads no flag for it",
        Severity.WARNING,
    ),
    Idle(
        "rotary_percent",
        lambda v: not _latent(v) or v["rope_type"] == "rope",
        "on the YaRN positions of latent attention",
        Severity.WARNING,
    ),
    # positions
    Idle(
        f"{_YARN} rotary_scaling_factor mscale mscale_all_dim",
        lambda v: rotary(v) in ("yarn", "latent"),
        "on positions that are not YaRN's: write --position-embedding-type yarn",
    ),
    Idle(
        _ROTARY,
        lambda v: rotary(v) is not None or v["position_embedding_type"] == "none",
        "on positions that are not rotary: write --position-embedding-type rope",
    ),
    Idle(
        _ROTARY,
        lambda v: rotary(v) is not None or v["position_embedding_type"] != "none",
        "on a model without positions (--position-embedding-type none)",
        Severity.WARNING,
    ),
    Idle(
        "use_rope_scaling",
        lambda v: rotary(v) == "rope" and not is_hybrid(v),
        "but on the plain rotary positions of a GPTModel",
    ),
    Idle(
        "rotary_seq_len_interpolation_factor",
        lambda v: v["rotary_seq_len_interpolation_factor"] in (None, 1),
        "on the model: Megatron-LM's ModelOpt builder does not pass it on",
    ),
    Idle("enable_gpt_oss", lambda v: not is_hybrid(v), "on a hybrid model"),
    # attention
    Idle("window_attn_skip_freq", lambda v: v["window_size"] is not None, "without --window-size"),
    Idle(
        "window_size softmax_type attention_output_gate qk_layernorm export_qk_l2_norm no_rope_freq",
        lambda v: has_layer(v, "attention") or _latent(v),
        "without a layer * in --hybrid-layer-pattern",
        Severity.WARNING,
    ),
    # mixers of hybrids
    Idle(
        _MAMBA,
        lambda v: is_hybrid(v) or has_layer(v, "mamba"),
        "on a GPTModel: write --export-model-type HybridModel and a --hybrid-layer-pattern with layers M",
    ),
    Idle(
        _MAMBA,
        lambda v: not is_hybrid(v) or has_layer(v, "mamba"),
        "without a layer M in --hybrid-layer-pattern",
        Severity.WARNING,
    ),
    Idle(
        _DELTA,
        lambda v: is_hybrid(v) or has_layer(v, "delta"),
        "on ModelOpt's layers of a GPTModel: write --export-model-type HybridModel and a "
        "--hybrid-layer-pattern with layers G",
    ),
    Idle(
        _DELTA,
        lambda v: not is_hybrid(v) or has_layer(v, "delta"),
        "without a layer G in --hybrid-layer-pattern",
        Severity.WARNING,
    ),
)


def idle(arguments: Arguments) -> Iterator[Finding]:
    """A finding for every flag of the preset that the model has no use for."""
    for row in IDLE:
        if row.used(arguments.values):
            continue
        for dest in row.dests.split():
            # What Megatron would do anyway is worth no warning.
            harmless = row.severity is Severity.WARNING and arguments[dest] == defaults()[dest]
            if arguments.given(dest) and not harmless:
                message = f"{arguments.origin(dest).flag} has no effect {row.why}"
                yield arguments.finding(dest, message, severity=row.severity, actual=arguments[dest])
