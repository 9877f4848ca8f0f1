"""Lifting: a limit of Megatron, taken away for a while, so that everything behind it can be compared.

What Megatron cannot be told is put right in its pass by hand. A limit then excuses its own part and nothing
that comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from harness.parity.checkpoint import language_model
from harness.parity.recording import published_frequencies, submodule

# A published and a Megatron model -> the pass of the latter without the limit.
Lift = Callable[[Any, Any], AbstractContextManager[None]]


@contextmanager
def published_rotation(published: Any, model: Any) -> Iterator[None]:
    """Megatron turns queries and keys by the published frequencies, not by its own."""
    rotary = language_model(published).get_submodule("rotary_emb")
    parameter = next(published.parameters())
    positions = torch.arange(2, device=parameter.device).unsqueeze(0)
    found = published_frequencies(rotary(parameter.new_zeros(1, 2, 1), positions))
    handles = [
        module.register_forward_hook(_turning(found[:-1], found[-1].item()))
        for module in model.modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    ]
    with _removed(handles):
        yield


def _turning(step: torch.Tensor, scale: float) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        table = output[0] if isinstance(output, tuple) else output
        positions = torch.arange(len(table), device=table.device, dtype=torch.float64)
        angles = torch.outer(positions, step.to(table.device))
        both = torch.stack([angles, angles], dim=-1 if module.rotary_interleaved else 1)
        turned = both.flatten(1).to(table.dtype).reshape(len(table), 1, 1, -1)
        return (turned, scale) if isinstance(output, tuple) else turned

    return hook


@contextmanager
def no_norm_without_rotation(published: Any, model: Any) -> Iterator[None]:
    """Queries and keys of layers without rotary positions are not normed."""
    handles: list[RemovableHandle] = []
    skips = model.config.no_rope_freq
    for index, layer in enumerate(model.decoder.layers):
        if skips and skips[index]:
            for name in ("q_layernorm", "k_layernorm"):
                norm = submodule(layer, f"self_attention.{name}")
                if norm is not None:
                    handles.append(norm.register_forward_hook(lambda module, inputs, output: inputs[0]))
    with _removed(handles):
        yield


@contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    """Take the hooks out again at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
