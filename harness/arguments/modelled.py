"""Modelled: which of Megatron's arguments the arithmetic side of the harness understands.

A preset that sets any other model flag away from its default is told so, never waved through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.finding import Finding, Severity
from harness.flags import Flag, Role

# Every argument that changes the model and that the reference, inventory and shrink stages understand,
# besides those that only take part in deriving another.
MODELLED = frozenset(
    """
    num_layers encoder_num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention
    num_query_groups kv_channels qk_layernorm export_qk_l2_norm add_bias_linear add_qkv_bias normalization
    layernorm_epsilon layernorm_zero_centered_gamma swiglu squared_relu quick_geglu
    activation_func_clamp_value glu_linear_offset position_embedding_type
    use_rotary_position_embeddings add_position_embedding rotary_base rotary_percent rotary_interleaved
    rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor no_rope_freq rope_type
    rotary_scaling_factor mscale mscale_all_dim yarn_beta_fast yarn_beta_slow
    yarn_original_max_position_embeddings yarn_correction_range_round_to_int enable_gpt_oss
    max_position_embeddings seq_length encoder_seq_length padded_vocab_size vocab_size
    make_vocab_size_divisible_by untie_embeddings_and_output_weights
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    window_size window_attn_skip_freq softmax_type attention_output_gate
    num_experts moe_ffn_hidden_size moe_router_topk moe_layer_freq
    moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor
    moe_router_enable_expert_bias moe_router_num_groups moe_router_group_topk
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_dtype moe_latent_size
    export_moe_apply_probs_on_input hybrid_layer_pattern export_model_type
    mamba_num_heads mamba_head_dim mamba_state_dim mamba_num_groups
    linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
    linear_value_head_dim
    attention_dropout hidden_dropout bf16 apply_query_key_layer_scaling attention_softmax_in_fp32
    """.split()
)

# Of some modelled arguments, the values that are.
_MODELLED_VALUES: Mapping[str, frozenset[str]] = {
    "position_embedding_type": frozenset({"learned_absolute", "rope", "yarn", "none"}),
    "softmax_type": frozenset({"vanilla", "learnable"}),
}

# Values of unmodelled flags that change nothing in the model that the ModelOpt example builds.
INERT: Mapping[str, frozenset[str]] = {
    "transformer_impl": frozenset({"transformer_engine"}),
    # The others of its choices pick other experts than plain top-k.
    "moe_router_load_balancing_type": frozenset({"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}),
}

# Flags of Megatron's that a ModelOpt run takes and makes nothing of, and what to write.
_OVERWRITTEN: Mapping[str, str] = {
    "qk_l2_norm": "Megatron-LM's ModelOpt builder overwrites it with --export-qk-l2-norm: write that",
    "moe_apply_probs_on_input": (
        "Megatron-LM's ModelOpt builder overwrites it with --export-moe-apply-probs-on-input: write that"
    ),
    "experimental_attention_variant": (
        "ModelOpt's layers of a GPTModel are plain or latent attention whatever it says: write --export-"
        "model-type HybridModel, and gated delta nets as layers G of --hybrid-layer-pattern"
    ),
    "linear_attention_freq": (
        "ModelOpt's layers of a GPTModel are plain or latent attention whatever it says: write --export-"
        "model-type HybridModel, and gated delta nets as layers G of --hybrid-layer-pattern"
    ),
    "spec": "Megatron-LM's ModelOpt builder refuses it: leave it out",
}


def unmodelled(flags: Sequence[Flag]) -> tuple[Finding, ...]:
    """An error for every flag that changes the model and that the harness does not model."""
    return tuple(
        Finding(
            "reference",
            Severity.ERROR,
            _message(flag),
            flag.name,
            flag.line or None,
            flag.column or None,
            expected=flag.spec.default,
            actual=flag.value,
        )
        for flag in flags
        if flag.spec.role is Role.MODEL
        and not _is_modelled(flag)
        and flag.value != flag.spec.default
        and not _is_inert(flag)
    )


def _message(flag: Flag) -> str:
    if flag.dest in _OVERWRITTEN:
        return f"{flag.name} has no effect: {_OVERWRITTEN[flag.dest]}"
    what = flag.name
    if flag.dest in MODELLED:
        what = f"{flag.name} {flag.value}"
    return (
        f"{what} changes the model ({flag.spec.reason}), and the harness does not model it: "
        "nothing here says whether its value is right"
    )


def _is_modelled(flag: Flag) -> bool:
    return flag.dest in MODELLED and flag.value in _MODELLED_VALUES.get(flag.dest, (flag.value,))


def _is_inert(flag: Flag) -> bool:
    values = flag.value if isinstance(flag.value, tuple) else (flag.value,)
    return set(values) <= INERT.get(flag.dest, frozenset())
