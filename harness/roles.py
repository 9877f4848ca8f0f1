"""Roles: a module's path -> what the module is for in its layer, in the words of a report.

Paths are megatron-core's, below any prefix (``module.``), of a module or of a parameter or a quantizer in
it. Nothing here knows a model: a path says by itself what stands there, because Megatron calls the parts
of every kind of layer alike.
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import cache


class Role(StrEnum):
    """What a module does in a layer, or around the layers."""

    QKV = "qkv"  # queries, keys and values of attention at once, or the queries of latent attention
    PROJ = "proj"  # attention's output projection, latent attention's too
    LATENT_DOWN = "latent down"  # latent attention: hidden -> latent, of queries or of keys and values
    LATENT_UP = "latent up"  # latent attention: latent -> heads
    FC1 = "fc1"  # the dense feed-forward's
    FC2 = "fc2"
    EXPERT_FC1 = "expert fc1"
    EXPERT_FC2 = "expert fc2"
    SHARED_FC1 = "shared expert fc1"
    SHARED_FC2 = "shared expert fc2"
    SHARED_GATE = "shared expert gate"
    ROUTER = "router"
    EXPERT_LATENT_IN = "expert latent in"  # hidden -> the latent that the routed experts work in
    EXPERT_LATENT_OUT = "expert latent out"
    MAMBA_IN = "mamba in"
    MAMBA_OUT = "mamba out"
    DELTA_IN = "delta in"
    DELTA_OUT = "delta out"
    MAMBA_CONV = "mamba convolution"
    DELTA_CONV = "delta convolution"
    EMBEDDING = "embedding"
    POSITIONS = "positions"  # learned ones
    OUTPUT = "output"
    KV = "kv"  # the core of attention: what it is given are the keys and values of the cache

    @property
    def routed(self) -> bool:
        """Whether such a module stands in a routed expert: split over expert ranks, starved or not."""
        return self in (Role.EXPERT_FC1, Role.EXPERT_FC2)

    @property
    def convertible(self) -> bool:
        """Whether ModelOpt 0.47 has a quantized form of the class that Megatron's ModelOpt specs put there.

        It has none of the plain ``Linear`` of latent attention's down-projections, of a router, of the
        shared expert's gate, which is a bare parameter, of ``VocabParallelEmbedding``, nor of a Mamba
        mixer's convolution, whose weights are bare parameters too; a gated delta net's is torch's.
        """
        return self not in _NOT_CONVERTIBLE

    @property
    def parent_class(self) -> str | None:
        """ModelOpt's name of torch's own class of such a module, by which a config may address it."""
        return _TORCH_CLASSES.get(self)


_TORCH_CLASSES = {Role.POSITIONS: "nn.Embedding", Role.DELTA_CONV: "nn.Conv1d"}
_NOT_CONVERTIBLE = frozenset(
    {Role.LATENT_DOWN, Role.ROUTER, Role.SHARED_GATE, Role.EMBEDDING, Role.MAMBA_CONV}
)

# What a path must end in, after a dot or at its start. An expert's number stands after ``local_experts``,
# where each expert has its own matrices; a grouped module holds those of all experts under one name.
_ENDINGS: tuple[tuple[str, Role], ...] = (
    (r"experts(\.local_experts\.[^.]+)?\.linear_fc1", Role.EXPERT_FC1),
    (r"experts(\.local_experts\.[^.]+)?\.linear_fc2", Role.EXPERT_FC2),
    (r"shared_experts\.linear_fc1", Role.SHARED_FC1),
    (r"shared_experts\.linear_fc2", Role.SHARED_FC2),
    (r"shared_experts\.gate_weight", Role.SHARED_GATE),
    (r"router(\.gate)?", Role.ROUTER),
    (r"fc1_latent_proj", Role.EXPERT_LATENT_IN),
    (r"fc2_latent_proj", Role.EXPERT_LATENT_OUT),
    (r"linear_fc1", Role.FC1),
    (r"linear_fc2", Role.FC2),
    (r"linear_(qkv|q_proj)", Role.QKV),
    (r"linear_proj", Role.PROJ),
    (r"linear_(q|kv|qkv)_down_proj", Role.LATENT_DOWN),
    (r"linear_(q|kv)_up_proj", Role.LATENT_UP),
    (r"mixer\.in_proj", Role.MAMBA_IN),
    (r"mixer\.out_proj", Role.MAMBA_OUT),
    (r"self_attention\.in_proj", Role.DELTA_IN),
    (r"self_attention\.out_proj", Role.DELTA_OUT),
    (r"mixer\.conv1d(_weight|_bias)?", Role.MAMBA_CONV),
    (r"self_attention\.conv1d", Role.DELTA_CONV),
    (r"core_attention", Role.KV),
    (r"word_embeddings", Role.EMBEDDING),
    (r"position_embeddings", Role.POSITIONS),
    (r"output_layer", Role.OUTPUT),
)
_BELOW = r"(\.(weight|bias)\d*|\.\w*_quantizer(\.\w+)*)?"
_PATTERNS = tuple((re.compile(rf"(.*\.)?{ending}{_BELOW}"), role) for ending, role in _ENDINGS)


@cache
def role_of(path: str) -> Role | None:
    """The role of the module at ``path``, or of the one that holds this parameter or quantizer.

    None where it is none of these: a norm, a container, anything that Megatron gives another name.
    """
    for pattern, role in _PATTERNS:
        if pattern.fullmatch(path):
            return role
    return None


def is_part(name: str) -> bool:
    """Whether Megatron calls a part of some kind of layer so: the last word of a path."""
    return any(role_of(f"{place}{name}") for place in ("", "mixer.", "shared_experts."))


# What a pattern of a quantization recipe speaks of, the most special first: the words of Megatron's modules
# and of Hugging Face's, which many of ModelOpt's patterns are written for.
_EXPERTS = (Role.EXPERT_FC1, Role.EXPERT_FC2)
_SHARED = (Role.SHARED_FC1, Role.SHARED_FC2)
_SPOKEN_OF: tuple[tuple[str, tuple[Role, ...]], ...] = (
    (r"conv1d", (Role.MAMBA_CONV, Role.DELTA_CONV)),
    (r"shared_experts?_gate|gate_weight", (Role.SHARED_GATE,)),
    (r"router|\.gate\b", (Role.ROUTER,)),
    (r"latent_proj", (Role.EXPERT_LATENT_IN, Role.EXPERT_LATENT_OUT)),
    (r"shared?_?expert", _SHARED),
    (r"expert|moe", _EXPERTS),
    (r"linear_attn|delta", (Role.DELTA_IN, Role.DELTA_OUT)),
    (r"mixer\.(in|out)_proj|mamba|ssm", (Role.MAMBA_IN, Role.MAMBA_OUT)),
    (r"lm_head|output_layer", (Role.OUTPUT,)),
    (r"[kqv\]]_bmm", (Role.KV,)),
    (r"(q|kv)_(b|up)_proj", (Role.LATENT_UP,)),
    (r"(q|kv)_(a|down)_proj", (Role.LATENT_DOWN,)),
    (r"\bo_proj|linear_proj|attn.*out_proj", (Role.PROJ,)),
    (r"\b[qkv]_proj|qkv", (Role.QKV,)),
    (r"attn|attention", (Role.QKV, Role.PROJ, Role.LATENT_UP)),
    (r"gate_proj|gate_up|\bup_proj|fc1", (Role.FC1,)),
    (r"\bdown_proj|fc2", (Role.FC2,)),
    (r"mlp|ffn|feed_?forward", (Role.FC1, Role.FC2, *_EXPERTS, *_SHARED)),
)


def spoken_of(pattern: str) -> tuple[Role, ...]:
    """The roles that a pattern for quantizers means by its words, whether or not it fits any path.

    None for one that names no part of a model, as ``*weight_quantizer``.
    """
    place = re.sub(r"\w*_quantizer", lambda name: name[0] if "bmm" in name[0] else "", pattern.lower())
    return next((roles for words, roles in _SPOKEN_OF if re.search(words, place)), ())
