"""Inventory: an architecture -> every parameter's name and shape, and how many numbers they hold.

By arithmetic alone, never by looking at a Megatron model: this is the independent side of the
comparison with the built one. Names are those of megatron-core's ModelOpt layer specs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from harness.architecture import Architecture
from harness.layers import (
    Attention,
    Dense,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    Mamba,
    Mixer,
    MoE,
    Norm,
    QKNorm,
)

Shape = tuple[int, ...]
Named = tuple[str, Shape]

# Width of a Mamba mixer's convolution, for which Megatron has no argument (MambaMixer's d_conv).
_MAMBA_CONV_WIDTH = 4


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters in total, and those that one token uses (top-k of the routed experts).

    ``buffers`` are numbers that are no parameters and that publishers may count all the same.
    """

    total: int
    active: int
    buffers: int = 0


def parameters(architecture: Architecture) -> dict[str, Shape]:
    """Every parameter's name and shape on the single rank of layout tp1."""
    shapes = dict(_outside_layers(architecture))
    for index, layer in enumerate(architecture.layers):
        for name, shape in _layer(architecture, layer):
            shapes[f"decoder.layers.{index}.{name}"] = shape
    return shapes


def buffers(architecture: Architecture) -> dict[str, Shape]:
    """State that a checkpoint holds and Megatron keeps as a buffer: the routers' expert biases, float32.

    Published models have them as weights (``e_score_correction_bias``).
    """
    return {
        f"decoder.layers.{index}.mlp.router.expert_bias": (layer.mlp.num_experts,)
        for index, layer in enumerate(architecture.layers)
        if isinstance(layer.mlp, MoE) and layer.mlp.expert_bias
    }


def counts(architecture: Architecture) -> Counts:
    """Total and active parameters, tied embeddings counted once.

    Active counts every weight outside the experts, embedding and output layer included, and
    ``moe_router_topk`` experts in each MoE layer.
    """
    total = active = _numbers(_outside_layers(architecture))
    for layer, times in Counter(architecture.layers).items():
        counted = _layer_counts(architecture, layer)
        total += times * counted.total
        active += times * counted.active
    return Counts(total, active, sum(map(prod, buffers(architecture).values())))


def _layer_counts(architecture: Architecture, layer: Layer) -> Counts:
    rest = _numbers(_outside_experts(architecture, layer))
    if not isinstance(layer.mlp, MoE):
        return Counts(rest, rest)
    expert = _numbers(_expert(architecture, layer.mlp))
    return Counts(rest + layer.mlp.num_experts * expert, rest + layer.mlp.moe_router_topk * expert)


def _numbers(shapes: Iterator[Named]) -> int:
    return sum(prod(shape) for _, shape in shapes)


def _outside_layers(architecture: Architecture) -> Iterator[Named]:
    vocabulary: Shape = (architecture.padded_vocab_size, architecture.hidden_size)
    yield "embedding.word_embeddings.weight", vocabulary
    if architecture.learned_positions:
        yield (
            "embedding.position_embeddings.weight",
            (architecture.max_position_embeddings, architecture.hidden_size),
        )
    yield from _norm(architecture, f"decoder.{final_norm(architecture)}", architecture.hidden_size)
    if not architecture.tied_embeddings:
        yield "output_layer.weight", vocabulary


def final_norm(architecture: Architecture) -> str:
    """The name of the decoder's last norm, which HybridModel and GPTModel call differently."""
    return "final_norm" if architecture.hybrid else "final_layernorm"


def _layer(architecture: Architecture, layer: Layer) -> Iterator[Named]:
    yield from _outside_experts(architecture, layer)
    if isinstance(layer.mlp, MoE):
        for expert in range(layer.mlp.num_experts):
            yield from prefixed(f"mlp.experts.local_experts.{expert}", _expert(architecture, layer.mlp))


def _outside_experts(architecture: Architecture, layer: Layer) -> Iterator[Named]:
    """A layer without its routed experts."""
    if layer.mixer is not None:
        yield from _norm(architecture, mixer_norm(layer.mixer), architecture.hidden_size)
        yield from prefixed(mixer_name(layer.mixer), _mixer(architecture, layer.mixer))
    if layer.mlp is None:
        return
    yield from _norm(architecture, "pre_mlp_layernorm", architecture.hidden_size)
    if isinstance(layer.mlp, MoE):
        yield from prefixed("mlp", _around_experts(layer.mlp, architecture.hidden_size))
    else:
        yield from prefixed("mlp", _dense(layer.mlp, architecture.hidden_size))


def mixer_name(mixer: Mixer) -> str:
    """What a layer calls its mixer; a gated delta net stands where attention would."""
    return "mixer" if isinstance(mixer, Mamba) else "self_attention"


def mixer_norm(mixer: Mixer) -> str:
    """What a layer calls the norm before its mixer."""
    return "norm" if isinstance(mixer, Mamba) else "input_layernorm"


def _mixer(architecture: Architecture, mixer: Mixer) -> Iterator[Named]:
    if isinstance(mixer, Attention):
        return _attention(architecture, mixer)
    if isinstance(mixer, LatentAttention):
        return _latent_attention(architecture, mixer)
    if isinstance(mixer, Mamba):
        return _mamba(architecture, mixer)
    return _delta(architecture, mixer)


def _attention(architecture: Architecture, attention: Attention) -> Iterator[Named]:
    hidden = architecture.hidden_size
    yield "linear_qkv.weight", (attention.qkv_width, hidden)
    if attention.qkv_bias:
        yield "linear_qkv.bias", (attention.qkv_width,)
    if attention.qk_norm is QKNorm.LEARNED:
        yield from _norm(architecture, "q_layernorm", attention.kv_channels)
        yield from _norm(architecture, "k_layernorm", attention.kv_channels)
    if attention.sinks:
        yield "core_attention.softmax_offset", (attention.num_attention_heads,)
    yield "linear_proj.weight", (hidden, attention.query_width)
    if attention.output_bias:
        yield "linear_proj.bias", (hidden,)


def _latent_attention(architecture: Architecture, latent: LatentAttention) -> Iterator[Named]:
    hidden = architecture.hidden_size
    if latent.q_lora_rank is None:
        yield "linear_q_proj.weight", (latent.query_width, hidden)
    else:
        yield "linear_q_down_proj.weight", (latent.q_lora_rank, hidden)
        yield from _norm(architecture, "q_layernorm", latent.q_lora_rank)
        yield "linear_q_up_proj.weight", (latent.query_width, latent.q_lora_rank)
    yield "linear_kv_down_proj.weight", (latent.kv_down_width, hidden)
    yield from _norm(architecture, "kv_layernorm", latent.kv_lora_rank)
    yield "linear_kv_up_proj.weight", (latent.kv_up_width, latent.kv_lora_rank)
    yield "linear_proj.weight", (hidden, latent.value_width)
    if latent.output_bias:
        yield "linear_proj.bias", (hidden,)


def _mamba(architecture: Architecture, mamba: Mamba) -> Iterator[Named]:
    """A mixer whose linears never have biases, and whose norm is an RMSNorm whatever the model's is."""
    yield "in_proj.weight", (mamba.in_proj_width, architecture.hidden_size)
    yield "conv1d_weight", (mamba.conv_width, 1, _MAMBA_CONV_WIDTH)
    yield "conv1d_bias", (mamba.conv_width,)
    for name in ("dt_bias", "A_log", "D"):
        yield name, (mamba.mamba_num_heads,)
    yield "norm.weight", (mamba.inner_width,)
    yield "out_proj.weight", (architecture.hidden_size, mamba.inner_width)


def _delta(architecture: Architecture, delta: GatedDeltaNet) -> Iterator[Named]:
    """A mixer without any biases, not even in the convolution."""
    yield "in_proj.weight", (delta.in_proj_width, architecture.hidden_size)
    yield "conv1d.weight", (delta.conv_width, 1, delta.linear_conv_kernel_dim)
    for name in ("dt_bias", "A_log"):
        yield name, (delta.linear_num_value_heads,)
    yield from _norm(architecture, "out_norm", delta.linear_value_head_dim)
    yield "out_proj.weight", (architecture.hidden_size, delta.value_width)


def _around_experts(moe: MoE, hidden: int) -> Iterator[Named]:
    yield "router.weight", (moe.num_experts, hidden)
    if moe.router_bias:
        yield "router.bias", (moe.num_experts,)
    if moe.latent_size is not None:
        for name, outputs, inputs in (
            ("fc1_latent_proj", moe.latent_size, hidden),
            ("fc2_latent_proj", hidden, moe.latent_size),
        ):
            yield f"{name}.weight", (outputs, inputs)
            if moe.expert.bias:
                yield f"{name}.bias", (outputs,)
    if moe.shared is not None:
        yield from prefixed("shared_experts", _dense(moe.shared, hidden))
        if moe.shared_gate:
            yield "shared_experts.gate_weight", (1, hidden)


def _expert(architecture: Architecture, moe: MoE) -> Iterator[Named]:
    return _dense(moe.expert, moe.latent_size or architecture.hidden_size)


def _dense(dense: Dense, hidden: int) -> Iterator[Named]:
    yield "linear_fc1.weight", (dense.fc1_width, hidden)
    if dense.bias:
        yield "linear_fc1.bias", (dense.fc1_width,)
    yield "linear_fc2.weight", (hidden, dense.ffn_hidden_size)
    if dense.bias:
        yield "linear_fc2.bias", (hidden,)


def _norm(architecture: Architecture, name: str, width: int) -> Iterator[Named]:
    yield f"{name}.weight", (width,)
    if architecture.normalization is Norm.LAYER:
        yield f"{name}.bias", (width,)


def prefixed[T](prefix: str, named: Iterator[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """The same, each name below ``prefix``."""
    for name, what in named:
        yield f"{prefix}.{name}", what
