"""Activations: an architecture -> the shapes of the tensors that go into and come out of every module.

By arithmetic alone, as the inventory: the independent side of the comparison with a traced forward
pass, on any rank of a layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from harness.architecture import Architecture
from harness.inventory import Shape, final_norm, mixer_name, mixer_norm, prefixed
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
from harness.layout import Layout
from harness.rank import Rank, stages_of

_ONE_RANK, _FIRST = Layout(), Rank(0)


@dataclass(frozen=True, slots=True)
class ModuleShapes:
    """Shapes of the tensors that go into and come out of one module, in order."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


NamedShapes = tuple[str, ModuleShapes]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What every layer of one rank has in common: ``whole`` tokens (sequence, batch), split over ``tp``."""

    whole: Shape
    width: int
    tp: int

    @property
    def hidden(self) -> Shape:
        """Between layers; with tensor parallelism, sequence parallelism leaves each rank its tokens."""
        return (*self.own, self.width)

    @property
    def own(self) -> Shape:
        sequence_length, batch_size = self.whole
        return (sequence_length // self.tp, batch_size)

    def split(self, width: int) -> Shape:
        """All tokens, a part of ``width``: after a column-parallel matrix, before a row-parallel one."""
        return (*self.whole, width // self.tp)


def activations(
    architecture: Architecture,
    *,
    sequence_length: int,
    batch_size: int,
    layout: Layout = _ONE_RANK,
    rank: Rank = _FIRST,
) -> dict[str, ModuleShapes]:
    """Tensors into and out of every module whose shape follows from the architecture, by module path.

    Megatron's order is [sequence, batch, width]; logits are [batch, sequence, vocabulary] once the model
    has turned them round, and gathered. Routed experts are left out: how many tokens each sees is the
    router's choice (their widths are held by the parameters). ``sequence_length`` must be a multiple of
    the layout's tp. Layers are numbered from the first of the rank's pipeline stage. Raises UnevenStages.
    """
    layers = stages_of(architecture, layout)[rank.pp]
    sizes = _Sizes((sequence_length, batch_size), architecture.hidden_size, layout.tp)
    shapes: dict[str, ModuleShapes] = {}
    if rank.pp == 0:
        shapes.update(_embedding(architecture, sizes))
    shapes["decoder"] = ModuleShapes((), (sizes.hidden,))
    if rank.pp == layout.pp - 1:
        shapes.update(_output(architecture, sizes))
    for index, layer in enumerate(architecture.layers[layers.start : layers.stop]):
        prefix = f"decoder.layers.{index}"
        shapes[prefix] = ModuleShapes((), (sizes.hidden,))
        for name, both in _layer(layer, sizes):
            shapes[f"{prefix}.{name}"] = both
    return shapes


def _embedding(architecture: Architecture, sizes: _Sizes) -> Iterator[NamedShapes]:
    sequence_length, batch_size = sizes.whole
    tokens = (batch_size, sequence_length)
    looked_up = ModuleShapes((tokens,), ((*tokens, sizes.width),))
    if architecture.learned_positions:
        yield "embedding.word_embeddings", looked_up
        yield "embedding.position_embeddings", looked_up
    elif sizes.tp > 1:
        # Summed over the ranks and scattered along the sequence in one step.
        yield "embedding.word_embeddings", ModuleShapes((tokens,), (sizes.hidden,))
    else:
        yield "embedding.word_embeddings", looked_up
    yield "embedding", ModuleShapes((), (sizes.hidden,))


def _output(architecture: Architecture, sizes: _Sizes) -> Iterator[NamedShapes]:
    yield f"decoder.{final_norm(architecture)}", _same(sizes.hidden)
    logits = (*sizes.whole, architecture.padded_vocab_size)
    yield "output_layer", ModuleShapes((sizes.hidden,), (logits,))


def _same(shape: Shape) -> ModuleShapes:
    return ModuleShapes((shape,), (shape,))


def _layer(layer: Layer, sizes: _Sizes) -> Iterator[NamedShapes]:
    hidden = sizes.hidden
    if layer.mixer is not None:
        yield mixer_norm(layer.mixer), _same(hidden)
        name = mixer_name(layer.mixer)
        yield name, ModuleShapes((), (hidden,))
        yield from prefixed(name, _mixer(layer.mixer, sizes))
    if layer.mlp is not None:
        yield "pre_mlp_layernorm", _same(hidden)
        yield "mlp", _same(hidden)
        inside = _moe(layer.mlp, sizes) if isinstance(layer.mlp, MoE) else _dense(layer.mlp, sizes)
        yield from prefixed("mlp", inside)


def _mixer(mixer: Mixer, sizes: _Sizes) -> Iterator[NamedShapes]:
    if isinstance(mixer, Attention):
        return _attention(mixer, sizes)
    if isinstance(mixer, LatentAttention):
        return _latent_attention(mixer, sizes)
    if isinstance(mixer, Mamba):
        return _mamba(mixer, sizes)
    return _delta(mixer, sizes)


def _attention(attention: Attention, sizes: _Sizes) -> Iterator[NamedShapes]:
    # Ranks that share a group have its key and value each (``SelfAttention.get_query_key_value_tensors``).
    groups = max(1, attention.num_query_groups // sizes.tp)
    queries = (*sizes.whole, attention.num_attention_heads // sizes.tp, attention.kv_channels)
    keys = (*sizes.whole, groups, attention.kv_channels)
    out = sizes.split(attention.query_width)
    yield "linear_qkv", ModuleShapes((sizes.hidden,), (sizes.split(attention.qkv_width),))
    if attention.qk_norm is not QKNorm.NONE:
        yield "q_layernorm", _same(queries)
        yield "k_layernorm", _same(keys)
    yield "core_attention", ModuleShapes((queries, keys, keys), (out,))
    yield "linear_proj", ModuleShapes((out,), (sizes.hidden,))


def _latent_attention(latent: LatentAttention, sizes: _Sizes) -> Iterator[NamedShapes]:
    """Down-projections are whole on every rank, and see its own tokens only."""
    hidden, own, heads = sizes.hidden, sizes.own, latent.num_attention_heads // sizes.tp
    wide, compressed = sizes.split(latent.query_width), (*own, latent.kv_lora_rank)
    if latent.q_lora_rank is None:
        yield "linear_q_proj", ModuleShapes((hidden,), (wide,))
    else:
        queries = (*own, latent.q_lora_rank)
        yield "linear_q_down_proj", ModuleShapes((hidden,), (queries,))
        yield "q_layernorm", _same(queries)
        yield "linear_q_up_proj", ModuleShapes((queries,), (wide,))
    yield "linear_kv_down_proj", ModuleShapes((hidden,), ((*own, latent.kv_down_width),))
    yield "kv_layernorm", _same(compressed)
    yield "linear_kv_up_proj", ModuleShapes((compressed,), (sizes.split(latent.kv_up_width),))
    key = (*sizes.whole, heads, latent.qk_head_dim + latent.qk_pos_emb_head_dim)
    value, out = (*sizes.whole, heads, latent.v_head_dim), sizes.split(latent.value_width)
    yield "core_attention", ModuleShapes((key, key, value), (out,))
    yield "linear_proj", ModuleShapes((out,), (hidden,))


def _mamba(mamba: Mamba, sizes: _Sizes) -> Iterator[NamedShapes]:
    inner = sizes.split(mamba.inner_width)
    yield "in_proj", ModuleShapes((sizes.hidden,), (sizes.split(mamba.in_proj_width),))
    yield "norm", _same(inner)
    yield "out_proj", ModuleShapes((inner,), (sizes.hidden,))


def _delta(delta: GatedDeltaNet, sizes: _Sizes) -> Iterator[NamedShapes]:
    sequence_length, batch_size = sizes.whole
    heads = sequence_length * batch_size * delta.linear_num_value_heads // sizes.tp
    inner = sizes.split(delta.value_width)
    yield "in_proj", ModuleShapes((sizes.hidden,), (sizes.split(delta.in_proj_width),))
    yield "out_norm", _same((heads, delta.linear_value_head_dim))
    yield "out_proj", ModuleShapes((inner,), (sizes.hidden,))


def _moe(moe: MoE, sizes: _Sizes) -> Iterator[NamedShapes]:
    hidden = sizes.hidden
    scores = (prod(sizes.own), moe.num_experts)
    yield "router", ModuleShapes((hidden,), (scores, scores))
    if moe.latent_size is not None:
        latent = (*sizes.own, moe.latent_size)
        yield "fc1_latent_proj", ModuleShapes((hidden,), (latent,))
        yield "fc2_latent_proj", ModuleShapes((latent,), (hidden,))
    if moe.shared is not None:
        yield "shared_experts", _same(hidden)
        yield from prefixed("shared_experts", _dense(moe.shared, sizes))


def _dense(dense: Dense, sizes: _Sizes) -> Iterator[NamedShapes]:
    yield "linear_fc1", ModuleShapes((sizes.hidden,), (sizes.split(dense.fc1_width),))
    yield "linear_fc2", ModuleShapes((sizes.split(dense.ffn_hidden_size),), (sizes.hidden,))
