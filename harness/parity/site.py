"""Site: the parts of a layer at which two models are compared, and where each stands on both sides.

One table names them: the path below a Megatron layer, and the paths below a Hugging Face layer that hold
the same part in one family or another. What is no module's output (queries after their rotation, routes)
``recording.py`` takes where it passes by.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """A part of the model, in the words of a report."""

    EMBEDDING = "embedding"
    ROTARY = "rotary frequencies"
    INPUT_NORM = "input norm"
    PROJECTION = "query, key and value projections"
    QUERY_DOWN = "query latent"
    QUERY_UP = "queries before rotation"
    KV_DOWN = "key and value latent"
    KV_UP = "keys and values from the latent"
    QUERY_NORM = "query norm"
    KEY_NORM = "key norm"
    KV_NORM = "key and value latent norm"
    QUERIES = "queries of attention"
    KEYS = "keys of attention"
    VALUES = "values of attention"
    CORE = "attention core"
    ATTENTION = "attention output"
    MLP_NORM = "norm before the feed-forward"
    ROUTER = "router"
    SHARED = "shared expert"
    MLP = "feed-forward"
    MAMBA_IN = "Mamba projection in"
    MAMBA_NORM = "Mamba gated norm"
    MAMBA = "Mamba mixer"
    DELTA = "gated delta net"
    LAYER = "layer output"
    FINAL_NORM = "final norm"
    LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class Row:
    """One part as a module of a layer: its path in Megatron's layer, and in Hugging Face's (any of them).

    ``norm`` marks a part that is a norm and nothing else, so that it can be tried out by itself.
    """

    part: Part
    megatron: str
    hf: tuple[str, ...]
    norm: bool = False


ROWS: tuple[Row, ...] = (
    Row(Part.INPUT_NORM, "input_layernorm", ("input_layernorm", "norm"), norm=True),
    Row(Part.INPUT_NORM, "norm", ("norm",), norm=True),
    Row(Part.QUERY_DOWN, "self_attention.linear_q_down_proj", ("self_attn.q_a_proj",)),
    Row(
        Part.QUERY_NORM,
        "self_attention.q_layernorm",
        ("self_attn.q_norm", "self_attn.q_a_layernorm"),
        norm=True,
    ),
    Row(Part.QUERY_UP, "self_attention.linear_q_up_proj", ("self_attn.q_b_proj",)),
    Row(Part.QUERY_UP, "self_attention.linear_q_proj", ("self_attn.q_proj",)),
    Row(Part.KEY_NORM, "self_attention.k_layernorm", ("self_attn.k_norm",), norm=True),
    Row(Part.KV_DOWN, "self_attention.linear_kv_down_proj", ("self_attn.kv_a_proj_with_mqa",)),
    Row(Part.KV_NORM, "self_attention.kv_layernorm", ("self_attn.kv_a_layernorm",), norm=True),
    Row(Part.KV_UP, "self_attention.linear_kv_up_proj", ("self_attn.kv_b_proj",)),
    Row(Part.ATTENTION, "self_attention", ("self_attn", "mixer")),
    Row(Part.MLP_NORM, "pre_mlp_layernorm", ("post_attention_layernorm", "norm"), norm=True),
    Row(
        Part.SHARED,
        "mlp.shared_experts",
        ("mlp.shared_experts", "mlp.shared_expert", "feed_forward.shared_expert", "mixer.shared_experts"),
    ),
    Row(Part.MLP, "mlp", ("mlp", "feed_forward", "block_sparse_moe", "mixer")),
    Row(Part.MAMBA_IN, "mixer.in_proj", ("mixer.in_proj",)),
    Row(Part.MAMBA_NORM, "mixer.norm", ("mixer.norm",)),
    Row(Part.MAMBA, "mixer", ("mixer",)),
    Row(Part.LAYER, "", ("",)),
)


@dataclass(frozen=True, slots=True)
class Site:
    """One part of one layer: where it is on both sides, and by how much it differs.

    ``relative`` is the largest difference over the largest published value, infinite where the shapes
    differ or a number is none. ``layer`` counts from 0, None outside the layers. ``alone`` marks a part
    that was tried by itself, on the same input on both sides.
    """

    name: str
    hf: str
    megatron: str
    relative: float
    part: Part
    layer: int | None
    alone: bool = False
