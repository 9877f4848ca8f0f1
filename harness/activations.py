"""Activations: an architecture -> the shapes of the tensors that go into and come out of every module.

By arithmetic alone, as the inventory: the independent side of the comparison with a traced forward
pass, on the single rank of layout tp1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.architecture import Architecture
from harness.inventory import Shape, final_norm, mixer_name, mixer_norm
from harness.layers import (
    Attention,
    Dense,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    Mamba,
    Mixer,
    MoE,
    QKNorm,
)


@dataclass(frozen=True, slots=True)
class ModuleShapes:
    """Shapes of the tensors that go into and come out of one module, in order."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


NamedShapes = tuple[str, ModuleShapes]


def activations(
    architecture: Architecture, *, sequence_length: int, batch_size: int
) -> dict[str, ModuleShapes]:
    """Tensors into and out of every module whose shape follows from the architecture, by module path.

    Megatron's order is [sequence, batch, width]; logits are [batch, sequence, vocabulary] once the model
    has turned them round. Routed experts are left out: how many tokens each sees is the router's choice
    (their widths are held by the parameters).
    """
    tokens: Shape = (sequence_length, batch_size)
    hidden: Shape = (*tokens, architecture.hidden_size)
    shapes = dict(_ends(architecture, hidden))
    for index, layer in enumerate(architecture.layers):
        prefix = f"decoder.layers.{index}"
        shapes[prefix] = ModuleShapes((), (hidden,))
        for name, both in _layer(layer, hidden):
            shapes[f"{prefix}.{name}"] = both
    return shapes


def _ends(architecture: Architecture, hidden: Shape) -> Iterator[NamedShapes]:
    """Embeddings, the decoder as a whole, and the output layer."""
    sequence_length, batch_size, width = hidden
    embedded = ModuleShapes(((batch_size, sequence_length),), ((batch_size, sequence_length, width),))
    yield "embedding.word_embeddings", embedded
    if architecture.learned_positions:
        yield "embedding.position_embeddings", embedded
    yield "embedding", ModuleShapes((), (hidden,))
    yield f"decoder.{final_norm(architecture)}", _same(hidden)
    yield "decoder", ModuleShapes((), (hidden,))
    logits = (sequence_length, batch_size, architecture.padded_vocab_size)
    yield "output_layer", ModuleShapes((hidden,), (logits,))


def _same(shape: Shape) -> ModuleShapes:
    return ModuleShapes((shape,), (shape,))


def _layer(layer: Layer, hidden: Shape) -> Iterator[NamedShapes]:
    if layer.mixer is not None:
        yield mixer_norm(layer.mixer), _same(hidden)
        name = mixer_name(layer.mixer)
        yield name, ModuleShapes((), (hidden,))
        yield from _prefixed(name, _mixer(layer.mixer, hidden))
    if layer.mlp is not None:
        yield "pre_mlp_layernorm", _same(hidden)
        yield "mlp", _same(hidden)
        inside = _moe(layer.mlp, hidden) if isinstance(layer.mlp, MoE) else _dense(layer.mlp, hidden)
        yield from _prefixed("mlp", inside)


def _mixer(mixer: Mixer, hidden: Shape) -> Iterator[NamedShapes]:
    if isinstance(mixer, Attention):
        return _attention(mixer, hidden)
    if isinstance(mixer, LatentAttention):
        return _latent_attention(mixer, hidden)
    if isinstance(mixer, Mamba):
        return _mamba(mixer, hidden)
    return _delta(mixer, hidden)


def _attention(attention: Attention, hidden: Shape) -> Iterator[NamedShapes]:
    tokens = hidden[:-1]
    queries = (*tokens, attention.num_attention_heads, attention.kv_channels)
    keys = (*tokens, attention.num_query_groups, attention.kv_channels)
    out = (*tokens, attention.query_width)
    yield "linear_qkv", ModuleShapes((hidden,), ((*tokens, attention.qkv_width),))
    if attention.qk_norm is not QKNorm.NONE:
        yield "q_layernorm", _same(queries)
        yield "k_layernorm", _same(keys)
    yield "core_attention", ModuleShapes((queries, keys, keys), (out,))
    yield "linear_proj", ModuleShapes((out,), (hidden,))


def _latent_attention(latent: LatentAttention, hidden: Shape) -> Iterator[NamedShapes]:
    tokens, heads = hidden[:-1], latent.num_attention_heads
    wide, compressed = (*tokens, latent.query_width), (*tokens, latent.kv_lora_rank)
    if latent.q_lora_rank is None:
        yield "linear_q_proj", ModuleShapes((hidden,), (wide,))
    else:
        queries = (*tokens, latent.q_lora_rank)
        yield "linear_q_down_proj", ModuleShapes((hidden,), (queries,))
        yield "q_layernorm", _same(queries)
        yield "linear_q_up_proj", ModuleShapes((queries,), (wide,))
    yield "linear_kv_down_proj", ModuleShapes((hidden,), ((*tokens, latent.kv_down_width),))
    yield "kv_layernorm", _same(compressed)
    yield "linear_kv_up_proj", ModuleShapes((compressed,), ((*tokens, latent.kv_up_width),))
    key = (*tokens, heads, latent.qk_head_dim + latent.qk_pos_emb_head_dim)
    value, out = (*tokens, heads, latent.v_head_dim), (*tokens, latent.value_width)
    yield "core_attention", ModuleShapes((key, key, value), (out,))
    yield "linear_proj", ModuleShapes((out,), (hidden,))


def _mamba(mamba: Mamba, hidden: Shape) -> Iterator[NamedShapes]:
    tokens = hidden[:-1]
    inner = (*tokens, mamba.inner_width)
    yield "in_proj", ModuleShapes((hidden,), ((*tokens, mamba.in_proj_width),))
    yield "norm", _same(inner)
    yield "out_proj", ModuleShapes((inner,), (hidden,))


def _delta(delta: GatedDeltaNet, hidden: Shape) -> Iterator[NamedShapes]:
    sequence_length, batch_size, _ = hidden
    heads = sequence_length * batch_size * delta.linear_num_value_heads
    inner = (sequence_length, batch_size, delta.value_width)
    projected = (sequence_length, batch_size, delta.in_proj_width)
    yield "in_proj", ModuleShapes((hidden,), (projected,))
    yield "out_norm", _same((heads, delta.linear_value_head_dim))
    yield "out_proj", ModuleShapes((inner,), (hidden,))


def _moe(moe: MoE, hidden: Shape) -> Iterator[NamedShapes]:
    sequence_length, batch_size, _ = hidden
    scores = (sequence_length * batch_size, moe.num_experts)
    yield "router", ModuleShapes((hidden,), (scores, scores))
    if moe.latent_size is not None:
        latent = (sequence_length, batch_size, moe.latent_size)
        yield "fc1_latent_proj", ModuleShapes((hidden,), (latent,))
        yield "fc2_latent_proj", ModuleShapes((latent,), (hidden,))
    if moe.shared is not None:
        yield "shared_experts", _same(hidden)
        yield from _prefixed("shared_experts", _dense(moe.shared, hidden))


def _dense(dense: Dense, hidden: Shape) -> Iterator[NamedShapes]:
    tokens = hidden[:-1]
    yield "linear_fc1", ModuleShapes((hidden,), ((*tokens, dense.fc1_width),))
    yield "linear_fc2", ModuleShapes(((*tokens, dense.ffn_hidden_size),), (hidden,))


def _prefixed(prefix: str, shapes: Iterator[NamedShapes]) -> Iterator[NamedShapes]:
    for name, both in shapes:
        yield f"{prefix}.{name}", both
