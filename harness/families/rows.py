"""Rows: the families, one for each ``model_type``: what its modeling code fixes and no key tells.

Every source is transformers' modeling file of the family; the configuration file beside it has the
defaults of keys that are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class QKNorms(StrEnum):
    """How a family norms queries and keys."""

    NONE = "none"
    HEADS = "heads"  # learned, head by head
    WIDTH = "width"  # learned, over all heads together
    L2 = "L2"  # head by head without weights, on the layers that have rotary positions
    LATENTS = "latents"  # learned, on the latents of multi-latent attention


class Windows(StrEnum):
    """Which layers a published ``sliding_window`` is for."""

    NONE = "none"
    ALL = "all"
    SWITCHED = "switched"  # all, where use_sliding_window
    LATE = "late"  # from max_window_layers on, where use_sliding_window
    TYPED = "typed"  # by layer_types


class MoELayers(StrEnum):
    """Which layers hold experts."""

    EVERY = "every"
    STEP = "step"  # decoder_sparse_step, mlp_only_layers
    AFTER_DENSE = "after dense"  # first_k_dense_replace
    INTERLEAVED = "interleaved"  # moe_layers, interleave_moe_layer_step
    PATTERN = "pattern"  # the hybrid pattern names them


class Groups(StrEnum):
    """How a router that first picks groups of experts scores a group."""

    NONE = "none"
    TOP_TWO = "top two"  # sum of its two best experts
    METHOD = "method"  # topk_method says: none, its best expert, or the sum of its two best


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a family. A text is the key that decides, a bool is fixed by its code.

    ``shared_size`` holds the width of the shared expert, ``shared_count`` how many experts wide it is.
    """

    count: str
    size: str
    layers: MoELayers
    score: str
    renormalised: bool | str
    bias: bool | str = False
    scaling: str = ""
    groups: Groups = Groups.NONE
    shared_size: str = ""
    shared_count: str = ""
    shared_gate: bool = False
    latent: str = ""
    on_input: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """What the modeling code of one ``model_type`` does whatever the config says.

    Biases name the config key that decides, or are fixed. ``gated`` doubles the first feed-forward
    matrix, ``clamped`` makes it the clamped gate with offset of gpt-oss; ``zero_centered`` norms
    multiply by one plus their weight. ``qk_norm_key`` switches the q/k norm. ``head_dim_divides``:
    where head_dim is absent it is hidden_size / num_attention_heads. ``rotary_share`` is the rotated
    part of a head where no key says. ``delta_net``: a hybrid of gated delta nets and attention, each
    layer with a feed-forward. ``unused`` keys are published and never read by the code.
    """

    model_type: str
    source: str
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: QKNorms = QKNorms.NONE
    qk_norm_key: str = ""
    latent: bool = False
    hybrid: bool = False
    normalization: str = "RMSNorm"
    zero_centered: bool = False
    epsilon: tuple[str, ...] = ("rms_norm_eps",)
    activation: str = "hidden_act"
    gated: bool = True
    clamped: bool = False
    dense_size: str = "intermediate_size"
    head_dim: tuple[str, ...] = ("head_dim",)
    head_dim_divides: bool = False
    rotary: bool = True
    interleaved: bool = False
    rotary_share: float = 1.0
    no_rope_interval: int = 0
    windows: Windows = Windows.NONE
    sinks: bool = False
    output_gate: bool = False
    delta_net: bool = False
    experts: Experts | None = None
    unused: frozenset[str] = frozenset()


_QWEN3 = Family(
    "qwen3",
    "models/qwen3/modeling_qwen3.py",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm=QKNorms.HEADS,
    windows=Windows.LATE,
)
_LLAMA = Family(
    "llama",
    "models/llama/modeling_llama.py",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    head_dim_divides=True,
)
_MISTRAL = Family("mistral", "models/mistral/modeling_mistral.py", head_dim_divides=True, windows=Windows.ALL)
# head_dim is the rotated part in these, which has a key of its own.
_DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "models/deepseek_v3/modeling_deepseek_v3.py",
    output_bias="attention_bias",
    qk_norm=QKNorms.LATENTS,
    latent=True,
    experts=Experts(
        "n_routed_experts",
        "moe_intermediate_size",
        MoELayers.AFTER_DENSE,
        score="sigmoid",
        renormalised="norm_topk_prob",
        bias=True,
        scaling="routed_scaling_factor",
        groups=Groups.METHOD,
        shared_count="n_shared_experts",
    ),
    unused=frozenset({"num_key_value_heads", "head_dim", "qk_head_dim"}),
)
_DEEPSEEK_V2 = replace(
    _DEEPSEEK_V3,
    model_type="deepseek_v2",
    source="models/deepseek_v2/modeling_deepseek_v2.py",
    experts=Experts(
        "n_routed_experts",
        "moe_intermediate_size",
        MoELayers.AFTER_DENSE,
        score="softmax",
        renormalised="norm_topk_prob",
        scaling="routed_scaling_factor",
        groups=Groups.METHOD,
        shared_count="n_shared_experts",
    ),
)
_LLAMA4 = Family(
    "llama4_text",
    "models/llama4/modeling_llama4.py",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm=QKNorms.L2,
    qk_norm_key="use_qk_norm",
    dense_size="intermediate_size_mlp",
    interleaved=True,
    no_rope_interval=4,
    experts=Experts(
        "num_local_experts",
        "intermediate_size",
        MoELayers.INTERLEAVED,
        score="sigmoid",
        renormalised=False,
        shared_size="intermediate_size",
        on_input=True,
    ),
    unused=frozenset({"for_llm_compressor"}),
)
_NEMOTRON_H = Family(
    "nemotron_h",
    "models/nemotron_h/modeling_nemotron_h.py",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    hybrid=True,
    epsilon=("layer_norm_epsilon", "rms_norm_eps", "norm_eps"),
    activation="mlp_hidden_act",
    gated=False,
    head_dim=("head_dim", "attention_head_dim"),
    rotary=False,
    experts=Experts(
        "n_routed_experts",
        "moe_intermediate_size",
        MoELayers.PATTERN,
        score="sigmoid",
        renormalised="norm_topk_prob",
        bias=True,
        scaling="routed_scaling_factor",
        groups=Groups.TOP_TWO,
        shared_size="moe_shared_expert_intermediate_size",
        latent="moe_latent_size",
    ),
    unused=frozenset(
        """
        rope_theta partial_rotary_factor rope_scaling rope_parameters num_hidden_layers sliding_window
        expand chunk_size mamba_ssm_cache_dtype num_logits_to_keep rescale_prenorm_residual
        residual_in_fp32 time_step_floor time_step_min time_step_max time_step_rank use_mamba_kernels
        moe_shared_expert_overlap n_shared_experts mtp_hybrid_override_pattern mtp_layers_block_type
        norm_eps rms_norm_eps mamba_state_dim mamba_num_groups
        """.split()
    ),
)

FAMILIES = (
    Family(
        "qwen2",
        "models/qwen2/modeling_qwen2.py",
        qkv_bias=True,
        head_dim_divides=True,
        windows=Windows.LATE,
    ),
    _QWEN3,
    replace(
        _QWEN3,
        model_type="qwen3_moe",
        source="models/qwen3_moe/modeling_qwen3_moe.py",
        windows=Windows.SWITCHED,
        experts=Experts(
            "num_experts",
            "moe_intermediate_size",
            MoELayers.STEP,
            score="softmax",
            renormalised="norm_topk_prob",
        ),
        unused=frozenset({"max_window_layers", "qkv_bias", "use_qk_norm", "shared_expert_intermediate_size"}),
    ),
    replace(
        _QWEN3,
        model_type="qwen3_next",
        source="models/qwen3_next/modeling_qwen3_next.py",
        hybrid=True,
        zero_centered=True,
        rotary_share=0.25,
        windows=Windows.NONE,
        output_gate=True,
        delta_net=True,
        experts=Experts(
            "num_experts",
            "moe_intermediate_size",
            MoELayers.STEP,
            score="softmax",
            renormalised="norm_topk_prob",
            shared_size="shared_expert_intermediate_size",
            shared_gate=True,
        ),
        unused=frozenset({"use_sliding_window", "sliding_window", "max_window_layers"}),
    ),
    _LLAMA,
    _LLAMA4,
    replace(_LLAMA4, model_type="llama4"),
    Family(
        "phi3",
        "models/phi3/modeling_phi3.py",
        head_dim_divides=True,
        windows=Windows.ALL,
        unused=frozenset({"attention_bias"}),
    ),
    Family(
        "nemotron",
        "models/nemotron/modeling_nemotron.py",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        normalization="LayerNorm",
        zero_centered=True,
        epsilon=("norm_eps",),
        gated=False,
        head_dim_divides=True,
    ),
    _NEMOTRON_H,
    _MISTRAL,
    replace(
        _MISTRAL,
        model_type="mixtral",
        source="models/mixtral/modeling_mixtral.py",
        experts=Experts(
            "num_local_experts", "intermediate_size", MoELayers.EVERY, score="softmax", renormalised=True
        ),
    ),
    _DEEPSEEK_V2,
    _DEEPSEEK_V3,
    replace(_DEEPSEEK_V3, model_type="kimi_k2"),
    Family(
        "gpt_oss",
        "models/gpt_oss/modeling_gpt_oss.py",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=True,
        clamped=True,
        windows=Windows.TYPED,
        sinks=True,
        experts=Experts(
            "num_local_experts", "intermediate_size", MoELayers.EVERY, score="softmax", renormalised=True
        ),
        unused=frozenset({"initial_context_length", "experts_per_token"}),
    ),
    Family(
        "minimax_m2",
        "models/minimax_m2/modeling_minimax_m2.py",
        qk_norm=QKNorms.WIDTH,
        qk_norm_key="use_qk_norm",
        experts=Experts(
            "num_local_experts",
            "intermediate_size",
            MoELayers.EVERY,
            score="sigmoid",
            renormalised=True,
            bias="use_routing_bias",
            shared_size="shared_intermediate_size",
        ),
        unused=frozenset({"use_mtp", "mtp_transformer_layers"}),
    ),
    Family(
        "glm4_moe",
        "models/glm4_moe/modeling_glm4_moe.py",
        qkv_bias="attention_bias",
        qk_norm=QKNorms.HEADS,
        qk_norm_key="use_qk_norm",
        rotary_share=0.5,
        experts=Experts(
            "n_routed_experts",
            "moe_intermediate_size",
            MoELayers.AFTER_DENSE,
            score="sigmoid",
            renormalised="norm_topk_prob",
            bias=True,
            scaling="routed_scaling_factor",
            groups=Groups.TOP_TWO,
            shared_count="n_shared_experts",
        ),
    ),
)
_BY_TYPE = {family.model_type: family for family in FAMILIES}

# Keys of any family that change nothing in what the model computes.
INERT_KEYS = frozenset(
    """
    _name_or_path architectures auto_map model_type transformers_version torch_dtype dtype use_cache
    bos_token_id eos_token_id pad_token_id initializer_range attention_dropout output_router_logits
    router_aux_loss_coef router_jitter_noise pretraining_tp quantization_config
    output_attentions output_hidden_states return_dict embd_pdrop resid_pdrop
    original_max_position_embeddings kv_channels ep_size aux_loss_alpha seq_aux
    image_token_index boi_token_index eoi_token_index image_token_id boi_token_id eoi_token_id
    """.split()
)


def find_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a published config by its ``model_type``, None where the harness knows none."""
    return _BY_TYPE.get(str(config.get("model_type")))
