"""Recording: a forward pass on either side -> the value of every part of every layer, in one form.

A value is [batch, sequence, numbers], whatever the order of its side: Megatron's tensors are
[sequence, batch, ...], Hugging Face's [batch, sequence, ...] or [batch x sequence, ...].
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.parity.site import ROWS, Part, Row
from harness.standins.patching import patched

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

# A part of a layer; None outside the layers.
Key = tuple[int | None, Part]


@dataclass
class Recorder:
    """The values by layer and part, in the order in which they came about, and where each came from.

    ``in_pairs``: the rotary embedding turns neighbouring channels, by complex numbers.
    """

    batch: int
    sequence: int
    values: dict[Key, torch.Tensor] = field(default_factory=dict)
    paths: dict[Key, str] = field(default_factory=dict)
    in_pairs: bool = False

    def add(self, key: Key, path: str, value: torch.Tensor, *, sequence_first: bool) -> None:
        """Keep ``value``; a part that ran twice in a pass is kept as it was last."""
        value = value.detach().clone()  # Megatron adds the residual in place
        if sequence_first and value.dim() > 2:
            value = value.transpose(0, 1)
        elif sequence_first:
            value = value.reshape(self.sequence, self.batch, -1).transpose(0, 1)
        self.values[key] = value.reshape(self.batch, self.sequence, -1)
        self.paths[key] = path

    def add_plain(self, key: Key, path: str, value: torch.Tensor) -> None:
        """Keep ``value`` as it is: it belongs to no token."""
        self.values[key] = value.detach().clone()
        self.paths[key] = path


def first_tensor(output: Any) -> torch.Tensor:
    """The value of a module that may also give a bias not yet added, weights or routes beside it."""
    value: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return value


def with_bias(output: Any) -> torch.Tensor:
    """Megatron's parallel layers leave their bias to whoever adds the residual."""
    value = first_tensor(output)
    bias = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    return value if bias is None else value + bias


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path``; None where there is none, or one that does nothing."""
    module: Any = root
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module):
            return None
    return None if type(module).__name__.startswith("Identity") else module


# Megatron's side


@contextmanager
def megatron_values(model: Any, batch: int, sequence: int) -> Iterator[Recorder]:
    """Record the passes of a Megatron model made meanwhile."""
    recorder = Recorder(batch, sequence)
    handles = list(_megatron_hooks(model, recorder))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _megatron_hooks(model: Any, recorder: Recorder) -> Iterator[RemovableHandle]:
    def hook(key: Key, path: str) -> Callable[..., None]:
        return lambda module, inputs, output: recorder.add(key, path, with_bias(output), sequence_first=True)

    yield model.embedding.register_forward_hook(hook((None, Part.EMBEDDING), "embedding"))
    if (rotary := submodule(model, "rotary_pos_emb")) is not None:
        yield _megatron_rotary(rotary, recorder, (None, Part.ROTARY), "rotary_pos_emb")
    for index, layer in enumerate(model.decoder.layers):
        base = f"decoder.layers.{index}"
        for row in ROWS:
            module = submodule(layer, row.megatron)
            if module is not None:
                path = f"{base}.{row.megatron}".rstrip(".")
                yield module.register_forward_hook(hook((index, row.part), path))
        yield from _megatron_inside(layer, index, base, recorder)
    final = final_norm(model)
    yield final[1].register_forward_hook(hook((None, Part.FINAL_NORM), final[0]))


def final_norm(model: Any) -> tuple[str, nn.Module]:
    for name in ("final_layernorm", "final_norm"):
        module = submodule(model.decoder, name)
        if module is not None:
            return f"decoder.{name}", module
    raise LookupError("the Megatron model has no final norm")


def _megatron_inside(
    layer: nn.Module, index: int, base: str, recorder: Recorder
) -> Iterator[RemovableHandle]:
    if (core := submodule(layer, "self_attention.core_attention")) is not None:
        path = f"{base}.self_attention.core_attention"

        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = [*inputs[:3], *(named[name] for name in ("query", "key", "value") if name in named)]
            for part, value in zip((Part.QUERIES, Part.KEYS, Part.VALUES), given, strict=False):
                recorder.add((index, part), path, value, sequence_first=True)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            recorder.add((index, Part.CORE), path, first_tensor(output), sequence_first=True)

        yield core.register_forward_pre_hook(before, with_kwargs=True)
        yield core.register_forward_hook(after)
    if (projection := submodule(layer, "self_attention.linear_qkv")) is not None:
        config: Any = layer.config
        sizes = config.num_attention_heads, config.num_query_groups, config.kv_channels

        def split(module: nn.Module, inputs: Any, output: Any) -> None:
            value = _split_groups(with_bias(output), *sizes)
            if value is not None:
                path = f"{base}.self_attention.linear_qkv"
                recorder.add((index, Part.PROJECTION), path, value, sequence_first=True)

        yield projection.register_forward_hook(split)
    if (rotary := submodule(layer, "self_attention.rotary_pos_emb")) is not None:
        yield _megatron_rotary(
            rotary, recorder, (index, Part.ROTARY), f"{base}.self_attention.rotary_pos_emb"
        )
    if (router := submodule(layer, "mlp.router")) is not None:

        def routed(module: nn.Module, inputs: Any, output: Any) -> None:
            recorder.add((index, Part.ROUTER), f"{base}.mlp.router", output[0], sequence_first=True)

        yield router.register_forward_hook(routed)


def _split_groups(value: torch.Tensor, heads: int, groups: int, width: int) -> torch.Tensor | None:
    """[sequence, batch, groups x (queries, key, value)] -> all queries, all keys, all values.

    None where the projection holds more than these (an output gate).
    """
    each = heads // groups
    if value.shape[-1] != groups * (each + 2) * width:
        return None
    grouped = value.view(*value.shape[:-1], groups, each + 2, width)
    parts = (grouped[..., :each, :], grouped[..., each : each + 1, :], grouped[..., each + 1 :, :])
    return torch.cat([part.flatten(-3) for part in parts], dim=-1)


def _megatron_rotary(rotary: nn.Module, recorder: Recorder, key: Key, path: str) -> RemovableHandle:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        recorder.add_plain(key, path, megatron_frequencies(module, output))

    return rotary.register_forward_hook(hook)


def megatron_frequencies(rotary: Any, output: Any) -> torch.Tensor:
    """The same of what Megatron's gave as ``published_frequencies`` of Hugging Face's."""
    angles, scale = output if isinstance(output, tuple) else (output, 1.0)
    row = angles[1].flatten().double()
    step = row[::2] if rotary.rotary_interleaved else row[: len(row) // 2]
    return torch.cat([step, step.new_tensor([scale])])


# Hugging Face's side


@contextmanager
def published_values(
    causal: Any, language_model: nn.Module, layers: list[nn.Module], batch: int, sequence: int
) -> Iterator[Recorder]:
    """Record the passes of a Hugging Face model made meanwhile."""
    recorder = Recorder(batch, sequence)
    names = {module: name for name, module in causal.named_modules()}
    with ExitStack() as stack:
        for handle in _published_hooks(language_model, layers, names, recorder):
            stack.callback(handle.remove)
        stack.enter_context(_attention_recorded(layers, names, recorder))
        yield recorder


def _published_hooks(
    language_model: nn.Module,
    layers: list[nn.Module],
    names: dict[nn.Module, str],
    recorder: Recorder,
) -> Iterator[RemovableHandle]:
    def hook(key: Key, module: nn.Module) -> RemovableHandle:
        path = names[module]
        return module.register_forward_hook(
            lambda module, inputs, output: recorder.add(key, path, first_tensor(output), sequence_first=False)
        )

    for part, options in _ENDS:
        for name in options:
            if (module := submodule(language_model, name)) is not None:
                yield hook((None, part), module)
    if (rotary := submodule(language_model, "rotary_emb")) is not None:
        yield _published_rotary(rotary, recorder, names[rotary])
    for index, layer in enumerate(layers):
        for row in ROWS:
            module = published_module(layer, row)
            if module is not None:
                yield hook((index, row.part), module)
        yield from _published_inside(layer, index, names, recorder)


_ENDS: tuple[tuple[Part, tuple[str, ...]], ...] = (
    (Part.EMBEDDING, ("embed_tokens", "embeddings")),
    (Part.FINAL_NORM, ("norm", "norm_f", "final_layernorm")),
)


def published_final_norm(language_model: nn.Module) -> nn.Module | None:
    """The norm after the last layer of a Hugging Face model."""
    names = dict(_ENDS)[Part.FINAL_NORM]
    return next((module for name in names if (module := submodule(language_model, name)) is not None), None)


def published_module(layer: nn.Module, row: Row) -> nn.Module | None:
    """The module of a Hugging Face layer that ``row`` means; None where the layer has none."""
    return next((module for path in row.hf if (module := submodule(layer, path)) is not None), None)


def _published_inside(
    layer: nn.Module, index: int, names: dict[nn.Module, str], recorder: Recorder
) -> Iterator[RemovableHandle]:
    attention = submodule(layer, "self_attn") or submodule(layer, "mixer")
    if attention is not None:
        yield from _published_projections(attention, index, names, recorder)
    for path in ("mlp.experts", "block_sparse_moe.experts", "mixer.experts", "feed_forward.experts"):
        experts = submodule(layer, path)
        if experts is None:
            continue

        def routed(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = [*inputs, *named.values()]
            if len(given) == 3:
                chosen, weights = given[1:]
                recorder.add(
                    (index, Part.ROUTER),
                    names[module].rpartition(".")[0],
                    _by_expert(chosen, weights, module),
                    sequence_first=False,
                )

        yield experts.register_forward_pre_hook(routed, with_kwargs=True)


def _by_expert(chosen: torch.Tensor, weights: torch.Tensor, experts: Any) -> torch.Tensor:
    """The weight of each expert for each token [tokens, experts], zero where it was not chosen."""
    if weights.shape != chosen.shape:
        return weights  # given by expert already
    dense = weights.new_zeros(len(weights), experts.num_experts)
    return dense.scatter(1, chosen, weights)


def _published_projections(
    attention: nn.Module, index: int, names: dict[nn.Module, str], recorder: Recorder
) -> Iterator[RemovableHandle]:
    """Queries, keys and values as projected, one after the other, whether one matrix gives them or three."""
    fused = submodule(attention, "qkv_proj")
    parts = [fused] if fused is not None else [submodule(attention, f"{letter}_proj") for letter in "qkv"]
    modules = [module for module in parts if module is not None]
    if len(modules) != len(parts):
        return
    found: dict[nn.Module, torch.Tensor] = {}

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        found[module] = output
        if len(found) == len(modules):
            value = torch.cat([found[module] for module in modules], dim=-1)
            recorder.add((index, Part.PROJECTION), names[attention], value, sequence_first=False)

    for module in modules:
        yield module.register_forward_hook(hook)


def _published_rotary(rotary: nn.Module, recorder: Recorder, path: str) -> RemovableHandle:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        recorder.in_pairs = isinstance(output, torch.Tensor)
        recorder.add_plain((None, Part.ROTARY), path, published_frequencies(output))

    return rotary.register_forward_hook(hook)


def published_frequencies(output: Any) -> torch.Tensor:
    """What a rotary embedding gave for positions from 0 on -> the angle of each pair of channels at
    position 1, and last the factor on cosines and sines.

    Cosines and sines [..., sequence, channels or half of them], or complex numbers [..., sequence, half].
    The angle at any position is that of the first times the position.
    """
    cos, sin = (output.real, output.imag) if isinstance(output, torch.Tensor) else output
    cos, sin = (table.reshape(-1, *table.shape[-2:])[0, 1].double() for table in (cos, sin))
    half = len(cos) // 2
    if torch.equal(cos[:half], cos[half:]) and torch.equal(sin[:half], sin[half:]):
        cos, sin = cos[:half], sin[:half]
    scale = torch.hypot(cos, sin)
    return torch.cat([torch.atan2(sin, cos), scale.mean().reshape(1)])


@contextmanager
def _attention_recorded(
    layers: list[nn.Module], names: dict[nn.Module, str], recorder: Recorder
) -> Iterator[None]:
    """Take queries, keys and values where the modeling code hands them to its eager attention."""
    places: dict[nn.Module, int] = {
        module: index for index, layer in enumerate(layers) for module in layer.modules()
    }
    modules = {sys.modules[type(layer).__module__] for layer in layers}
    with ExitStack() as stack:
        for modeling in modules:
            eager = modeling.eager_attention_forward
            replacement = _recorded(eager, places, names, recorder)
            stack.enter_context(patched(modeling, "eager_attention_forward", replacement))
        yield


def _in_halves(value: torch.Tensor, rotated: Any) -> torch.Tensor:
    """Sort the pairs among the last ``rotated`` channels into halves, as Megatron's latent attention does.

    On queries and keys alike it changes no score.
    """
    if not rotated:
        return value
    plain, turned = value[..., :-rotated], value[..., -rotated:]
    halves = turned.reshape(*turned.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)
    return torch.cat([plain, halves], dim=-1)


def _recorded(
    eager: Callable[..., Any],
    places: dict[nn.Module, int],
    names: dict[nn.Module, str],
    recorder: Recorder,
) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *rest: Any,
        **named: Any,
    ) -> Any:
        index, path = places[module], names[module]
        rotated = module.qk_rope_head_dim if recorder.in_pairs and hasattr(module, "qk_rope_head_dim") else 0
        for part, tensor in (
            (Part.QUERIES, _in_halves(query, rotated)),
            (Part.KEYS, _in_halves(key, rotated)),
            (Part.VALUES, value),
        ):
            recorder.add((index, part), path, tensor.transpose(1, 2), sequence_first=False)
        output = eager(module, query, key, value, *rest, **named)
        recorder.add((index, Part.CORE), path, output[0], sequence_first=False)
        return output

    return attention
