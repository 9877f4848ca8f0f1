"""Models of full size as Megatron builds them: on the meta device, one rank of a layout at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from harness import build
from harness.architecture import Architecture, architecture, layer_symbols
from harness.layers import Attention, MoE
from harness.layout import Layout
from harness.preset import discover
from harness.rank import rank_of
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world

Shape = tuple[int, ...]
PRESETS = discover(Path(__file__).parent.parent / "presets")
CPU, META = torch.device("cpu"), torch.device("meta")


@contextmanager
def megatron_model(full: Architecture, layout: Layout | None = None, rank: int = 0) -> Iterator[nn.Module]:
    """Megatron's model of rank number ``rank``, without storage."""
    layout = layout or Layout()
    world = open_world(layout, CPU, rank=rank_of(layout, rank))
    with captured(), installed(CPU), world:
        # Thousands of experts are hundreds of thousands of objects, none of them garbage yet.
        gc.disable()
        try:
            with META:
                model = build.build_model(full, layout, META)
        finally:
            gc.enable()
        yield model


def megatron_parameters(full: Architecture, layout: Layout | None = None, rank: int = 0) -> dict[str, Shape]:
    """Every parameter's name and shape on rank number ``rank``."""
    with megatron_model(full, layout, rank) as model:
        return build.parameter_shapes(model)


def one_of_each_kind(full: Architecture) -> Architecture:
    """The same model with the first layer of each kind alone, at full width."""
    kept = [index for index, layer in enumerate(full.layers) if layer not in full.layers[:index]]
    changes: dict[str, object] = {"num_layers": len(kept)}
    if full.hybrid:
        symbols = layer_symbols(full.arguments["hybrid_layer_pattern"])
        changes["hybrid_layer_pattern"] = "".join(symbols[index] for index in kept)
    layers = [full.layers[index] for index in kept]
    mixers = [layer.mixer for layer in layers if isinstance(layer.mixer, Attention)]
    if not full.hybrid and full.moe:
        changes["moe_layer_freq"] = tuple(int(isinstance(layer.mlp, MoE)) for layer in layers)
    if not full.hybrid and mixers:
        if full.arguments["window_size"] is not None:
            changes["window_attn_skip_freq"] = tuple(int(mixer.window is not None) for mixer in mixers)
        changes["no_rope_freq"] = tuple(int(not mixer.rope) for mixer in mixers)
    one = architecture(full.arguments.replaced(changes))
    assert one.layers == tuple(layers)
    return one


def eighth_of_experts(full: Architecture) -> Architecture:
    """The same model, every layer of it, with an eighth of its experts where it has more than 8."""
    if full.moe is None or full.moe.num_experts <= 8:
        return full
    return architecture(full.arguments.replaced({"num_experts": full.moe.num_experts // 8}))
