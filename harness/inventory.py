"""Inventory: an architecture -> every parameter's name and shape, and every module's activations.

By arithmetic alone, never by looking at a Megatron model: this is the independent side of the
comparison with the built one. Names are those of megatron-core's ModelOpt layer specs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from harness.architecture import Architecture
from harness.layers import Attention, Dense, Layer, MoE, Norm, QKNorm

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModuleShapes:
    """Shapes of the tensors that go into and come out of one module, in order."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters in total, and those that one token uses (top-k of the routed experts)."""

    total: int
    active: int


def parameters(architecture: Architecture) -> dict[str, Shape]:
    """Every parameter's name and shape on the single rank of layout tp1."""
    shapes = dict(_outside_layers(architecture))
    for index, layer in enumerate(architecture.layers):
        for name, shape in _layer(architecture, layer):
            shapes[f"decoder.layers.{index}.{name}"] = shape
    return shapes


def counts(architecture: Architecture) -> Counts:
    """Total and active parameters, tied embeddings counted once.

    Active counts every weight outside the experts, embedding and output layer included, and
    ``moe_router_topk`` experts in each MoE layer.
    """
    total = active = sum(prod(shape) for _, shape in _outside_layers(architecture))
    per_kind = {layer: _layer_counts(architecture, layer) for layer in set(architecture.layers)}
    for layer in architecture.layers:
        total += per_kind[layer].total
        active += per_kind[layer].active
    return Counts(total, active)


def activations(
    architecture: Architecture, *, sequence_length: int, batch_size: int
) -> dict[str, ModuleShapes]:
    """Tensors into and out of every module whose shape follows from the architecture, on layout tp1.

    Megatron's order is [sequence, batch, width]; logits are [batch, sequence, vocabulary]. Routed
    experts are left out: how many tokens each sees is the router's choice (their widths are held
    by the parameters).
    """
    tokens = (sequence_length, batch_size)
    hidden: Shape = (*tokens, architecture.hidden_size)
    shapes: dict[str, ModuleShapes] = {
        "embedding.word_embeddings": ModuleShapes(
            ((batch_size, sequence_length),), ((batch_size, sequence_length, architecture.hidden_size),)
        ),
        "embedding": ModuleShapes((), (hidden,)),
        "decoder.final_layernorm": ModuleShapes((hidden,), (hidden,)),
        "decoder": ModuleShapes((), (hidden,)),
        "output_layer": ModuleShapes((hidden,), ((*tokens, architecture.padded_vocab_size),)),
    }
    for index, layer in enumerate(architecture.layers):
        prefix = f"decoder.layers.{index}"
        attention = f"{prefix}.self_attention"
        a = layer.mixer
        assert isinstance(a, Attention)
        query, qkv = (*tokens, a.query_width), (*tokens, a.query_width + 2 * a.kv_width)
        shapes[f"{prefix}.input_layernorm"] = ModuleShapes((hidden,), (hidden,))
        shapes[f"{attention}.linear_qkv"] = ModuleShapes((hidden,), (qkv,))
        if a.qk_norm is QKNorm.LEARNED:
            for name, heads in (("q", a.num_attention_heads), ("k", a.num_query_groups)):
                split = (*tokens, heads, a.kv_channels)
                shapes[f"{attention}.{name}_layernorm"] = ModuleShapes((split,), (split,))
        shapes[f"{attention}.core_attention"] = ModuleShapes((), (query,))
        shapes[f"{attention}.linear_proj"] = ModuleShapes((query,), (hidden,))
        shapes[f"{prefix}.pre_mlp_layernorm"] = ModuleShapes((hidden,), (hidden,))
        shapes[f"{prefix}.mlp"] = ModuleShapes((hidden,), (hidden,))
        if isinstance(layer.mlp, Dense):
            shapes.update(_dense_activations(f"{prefix}.mlp", layer.mlp, hidden))
        elif layer.mlp.shared is not None:
            shapes.update(_dense_activations(f"{prefix}.mlp.shared_experts", layer.mlp.shared, hidden))
    return shapes


def _dense_activations(prefix: str, dense: Dense, hidden: Shape) -> Iterator[tuple[str, ModuleShapes]]:
    tokens = hidden[:-1]
    yield f"{prefix}.linear_fc1", ModuleShapes((hidden,), ((*tokens, dense.fc1_width),))
    yield f"{prefix}.linear_fc2", ModuleShapes(((*tokens, dense.ffn_hidden_size),), (hidden,))


def _layer_counts(architecture: Architecture, layer: Layer) -> Counts:
    rest = sum(prod(shape) for _, shape in _attention_block(architecture, layer.mixer))
    if isinstance(layer.mlp, Dense):
        size = rest + sum(prod(shape) for _, shape in _dense(layer.mlp, architecture.hidden_size))
        return Counts(size, size)
    expert = sum(prod(shape) for _, shape in _dense(layer.mlp.expert, architecture.hidden_size))
    rest += sum(prod(shape) for _, shape in _around_experts(layer.mlp, architecture.hidden_size))
    return Counts(rest + layer.mlp.num_experts * expert, rest + layer.mlp.moe_router_topk * expert)


def _outside_layers(architecture: Architecture) -> Iterator[tuple[str, Shape]]:
    vocabulary: Shape = (architecture.padded_vocab_size, architecture.hidden_size)
    yield "embedding.word_embeddings.weight", vocabulary
    if architecture.learned_positions:
        yield (
            "embedding.position_embeddings.weight",
            (architecture.max_position_embeddings, architecture.hidden_size),
        )
    yield from _norm(architecture, "decoder.final_layernorm", architecture.hidden_size)
    if not architecture.tied_embeddings:
        yield "output_layer.weight", vocabulary


def _layer(architecture: Architecture, layer: Layer) -> Iterator[tuple[str, Shape]]:
    yield from _attention_block(architecture, layer.mixer)
    if isinstance(layer.mlp, Dense):
        yield from _prefixed("mlp", _dense(layer.mlp, architecture.hidden_size))
        return
    yield from _prefixed("mlp", _around_experts(layer.mlp, architecture.hidden_size))
    for expert in range(layer.mlp.num_experts):
        yield from _prefixed(
            f"mlp.experts.local_experts.{expert}", _dense(layer.mlp.expert, architecture.hidden_size)
        )


def _attention_block(architecture: Architecture, attention: Attention) -> Iterator[tuple[str, Shape]]:
    hidden, qkv = architecture.hidden_size, attention.query_width + 2 * attention.kv_width
    yield from _norm(architecture, "input_layernorm", hidden)
    yield "self_attention.linear_qkv.weight", (qkv, hidden)
    if attention.qkv_bias:
        yield "self_attention.linear_qkv.bias", (qkv,)
    if attention.qk_norm is QKNorm.LEARNED:
        yield from _norm(architecture, "self_attention.q_layernorm", attention.kv_channels)
        yield from _norm(architecture, "self_attention.k_layernorm", attention.kv_channels)
    yield "self_attention.linear_proj.weight", (hidden, attention.query_width)
    if attention.output_bias:
        yield "self_attention.linear_proj.bias", (hidden,)
    yield from _norm(architecture, "pre_mlp_layernorm", hidden)


def _around_experts(moe: MoE, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield "router.weight", (moe.num_experts, hidden)
    if moe.router_bias:
        yield "router.bias", (moe.num_experts,)
    if moe.shared is not None:
        yield from _prefixed("shared_experts", _dense(moe.shared, hidden))
        if moe.shared_gate:
            yield "shared_experts.gate_weight", (1, hidden)


def _dense(dense: Dense, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield "linear_fc1.weight", (dense.fc1_width, hidden)
    if dense.bias:
        yield "linear_fc1.bias", (dense.fc1_width,)
    yield "linear_fc2.weight", (hidden, dense.ffn_hidden_size)
    if dense.bias:
        yield "linear_fc2.bias", (hidden,)


def _norm(architecture: Architecture, name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if architecture.normalization is Norm.LAYER:
        yield f"{name}.bias", (width,)


def _prefixed(prefix: str, shapes: Iterator[tuple[str, Shape]]) -> Iterator[tuple[str, Shape]]:
    for name, shape in shapes:
        yield f"{prefix}.{name}", shape
