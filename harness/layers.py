"""Layers: the kinds of layer that the harness models, and their sizes.

Sizes have the names of Megatron's arguments; derived widths are properties, so that a shrunken layer
cannot contradict itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Norm(StrEnum):
    RMS = "RMSNorm"
    LAYER = "LayerNorm"


class QKNorm(StrEnum):
    """How queries and keys are normed, head by head, before their scores are taken."""

    NONE = "none"
    LEARNED = "learned"  # of the kind that Norm names, with weights
    L2 = "L2"  # without weights


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query self attention; MHA has as many groups as heads.

    ``window`` is tokens (before, after) that a query sees, None for all; ``rope`` is off where a layer
    skips the rotary positions that the model has; ``sinks`` adds one learned logit per head to the
    softmax; ``output_gate`` doubles the queries.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    qkv_bias: bool
    output_bias: bool
    qk_norm: QKNorm = QKNorm.NONE
    window: tuple[int, int] | None = None
    rope: bool = True
    sinks: bool = False
    output_gate: bool = False

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_query_groups * self.kv_channels

    @property
    def qkv_width(self) -> int:
        """Rows of the fused projection: queries, their gates if any, keys and values."""
        return self.query_width * (2 if self.output_gate else 1) + 2 * self.kv_width


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-latent attention (MLA): keys and values, and queries if ``q_lora_rank``, come from a latent.

    A query and key head is ``qk_head_dim`` unrotated and ``qk_pos_emb_head_dim`` rotated channels.
    """

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    output_bias: bool

    @property
    def query_width(self) -> int:
        """Rows of the query (up-)projection."""
        return self.num_attention_heads * (self.qk_head_dim + self.qk_pos_emb_head_dim)

    @property
    def value_width(self) -> int:
        """Width of the attention output, which ``linear_proj`` takes."""
        return self.num_attention_heads * self.v_head_dim

    @property
    def kv_down_width(self) -> int:
        """Rows of the key and value down-projection: the latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_pos_emb_head_dim

    @property
    def kv_up_width(self) -> int:
        """Rows of the key and value up-projection."""
        return self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class Mamba:
    """A Mamba-2 mixer."""

    mamba_num_heads: int
    mamba_head_dim: int
    mamba_state_dim: int
    mamba_num_groups: int

    @property
    def inner_width(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_parts(self) -> tuple[int, ...]:
        """Channels of the convolution: x, B and C."""
        states = self.mamba_num_groups * self.mamba_state_dim
        return (self.inner_width, states, states)

    @property
    def conv_width(self) -> int:
        return sum(self.conv_parts)

    @property
    def in_proj_parts(self) -> tuple[int, ...]:
        """Rows of the in-projection: z, x, B, C and one time step per head."""
        return (self.inner_width, *self.conv_parts, self.mamba_num_heads)

    @property
    def in_proj_width(self) -> int:
        return sum(self.in_proj_parts)


@dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """A gated delta net mixer: linear attention with its own key and value heads."""

    linear_num_key_heads: int
    linear_key_head_dim: int
    linear_num_value_heads: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    @property
    def key_width(self) -> int:
        """Width of the keys, and of the queries."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_width(self) -> int:
        """Width of the values, and of their gates."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_parts(self) -> tuple[int, ...]:
        """Channels of the convolution: queries, keys and values."""
        return (self.key_width, self.key_width, self.value_width)

    @property
    def conv_width(self) -> int:
        return sum(self.conv_parts)

    @property
    def in_proj_parts(self) -> tuple[int, ...]:
        """Rows of the in-projection: queries, keys, values, gates, and two numbers per value head."""
        heads = self.linear_num_value_heads
        return (*self.conv_parts, self.value_width, heads, heads)

    @property
    def in_proj_width(self) -> int:
        return sum(self.in_proj_parts)


@dataclass(frozen=True, slots=True)
class Dense:
    """A feed-forward layer; ``gated`` doubles the first matrix (swiglu, quick_geglu)."""

    ffn_hidden_size: int
    gated: bool
    bias: bool

    @property
    def fc1_parts(self) -> tuple[int, ...]:
        """Rows of the first matrix: the gates, where there are any, and what they gate."""
        return (self.ffn_hidden_size,) * (2 if self.gated else 1)

    @property
    def fc1_width(self) -> int:
        return sum(self.fc1_parts)


@dataclass(frozen=True, slots=True)
class MoE:
    """Routed experts, each a ``Dense``, and the optional shared expert beside them.

    With ``latent_size`` the routed experts work in a latent between two projections; router and shared
    expert stay at the hidden size. ``expert_bias`` is a buffer per expert, not a parameter.
    """

    num_experts: int
    moe_router_topk: int
    expert: Dense
    shared: Dense | None
    shared_gate: bool
    router_bias: bool
    num_groups: int | None
    group_topk: int | None
    expert_bias: bool = False
    latent_size: int | None = None


Mixer = Attention | LatentAttention | Mamba | GatedDeltaNet


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: what mixes the tokens, then a feed-forward; a hybrid model's layers have one of the two.

    Layers that compare equal are of one kind.
    """

    mixer: Mixer | None
    mlp: Dense | MoE | None

    @property
    def kind(self) -> str:
        """What the layer is, in words, whatever its sizes: ``moe``, ``dense, no rope``, ``mamba``."""
        mlp = {Dense: "dense", MoE: "moe"}.get(type(self.mlp), "")
        mixer, extras = self.mixer, []
        if isinstance(mixer, Attention):
            if mixer.window is not None:
                extras.append(f"window {mixer.window[0]},{mixer.window[1]}")
            if not mixer.rope:
                extras.append("no rope")
        # In a transformer layer attention goes without saying; a hybrid's lone mixer is its name.
        name = mlp or {Attention: "attention", LatentAttention: "attention"}.get(type(mixer), "")
        if isinstance(mixer, Mamba | GatedDeltaNet):
            name = "mamba" if isinstance(mixer, Mamba) else "delta net"
        return ", ".join([name, *extras])
