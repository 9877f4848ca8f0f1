"""Compare: a Hugging Face model and a Megatron model of the same weights -> where they part.

Both run on the same tokens and every part is compared in the order in which Megatron computes it, so that
the first difference is where it arises and the later ones follow from it. Norms are tried by themselves too,
on inputs so small that their epsilon counts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.parity.checkpoint import decoder_layers, language_model, logits
from harness.parity.recording import (
    Key,
    Recorder,
    final_norm,
    first_tensor,
    megatron_values,
    published_final_norm,
    published_module,
    published_values,
    submodule,
    with_bias,
)
from harness.parity.site import ROWS, Part, Site
from harness.standins.output import import_foreign

# Largest difference of float32 sums in another order, over the largest value: some 1e-6 at the end of a few
# layers on a CPU. The kernels of CUDA add in blocks, and exponentials differ in their last bits: ten times
# that. A setting that is wrong shows from 1e-3 on.
TOLERANCES = {"cpu": 1e-4, "cuda": 1e-3}


@dataclass(frozen=True, slots=True)
class Comparison:
    """``relative``: largest difference of the logits over the largest published one. ``first`` is the first
    part beyond the tolerance, ``equal`` whether neither the logits nor any part is."""

    relative: float
    sites: tuple[Site, ...]
    first: Site | None
    equal: bool


def compare(
    published: Any, model: nn.Module, tokens: torch.Tensor, tolerance: float = TOLERANCES["cpu"]
) -> Comparison:
    """Run both on ``tokens`` [batch, sequence]. Call it inside the world that ``model`` was built in."""
    import_foreign()
    from harness.trace import forward

    layers, batch, sequence = decoder_layers(published), *tokens.shape
    inner = language_model(published)
    with torch.no_grad():
        with published_values(published, inner, layers, batch, sequence) as there:
            expected = logits(published, tokens)
        with megatron_values(model, batch, sequence) as here:
            actual = forward(model, tokens)
        for recorder, value, path in ((there, expected, "lm_head"), (here, actual, "output_layer")):
            recorder.add((None, Part.LOGITS), path, value, sequence_first=False)
        sites = (*_alone(published, inner, layers, model), *_sites(there, here))
    first = next((site for site in sites if not site.relative <= tolerance), None)
    return Comparison(relative(expected, actual), sites, first, first is None)


def _sites(there: Recorder, here: Recorder) -> Iterator[Site]:
    """The parts that both have, in the order of ``here``."""
    for key, value in here.values.items():
        published = _published_key(key, there)
        if published is None:
            continue
        difference = (
            relative_each(there.values[published], value)
            if key[1] is Part.ROTARY
            else relative(there.values[published], value)
        )
        yield _site(key, there.paths[published], here.paths[key], difference)


def _published_key(key: Key, there: Recorder) -> Key | None:
    """Latent attention of Megatron has its rotary embedding in each layer, Hugging Face one for all."""
    if key in there.values:
        return key
    return (None, Part.ROTARY) if key[1] is Part.ROTARY and (None, Part.ROTARY) in there.values else None


def _site(key: Key, hf: str, megatron: str, difference: float, alone: bool = False) -> Site:
    layer, part = key
    name = f"layer {layer}, {part}" if layer is not None else f"{part}"
    return Site(f"{name} alone" if alone else name, hf, megatron, difference, part, layer, alone)


def relative(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Largest difference over the largest expected value; infinite for other shapes and for no numbers."""
    if expected.shape != actual.shape:
        return math.inf
    largest = expected.abs().max().item()
    difference = (expected - actual).abs().max().item()
    if not math.isfinite(largest) or not math.isfinite(difference):
        return math.inf
    return difference / largest if largest else (math.inf if difference else 0.0)


def relative_each(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Largest of the differences each over its own expected value: small numbers count as much as large."""
    if expected.shape != actual.shape:
        return math.inf
    difference = (expected - actual).abs() / expected.abs()
    difference = torch.where(expected == actual, torch.zeros_like(difference), difference)
    return difference.max().item() if bool(torch.isfinite(difference).all()) else math.inf


# Root mean squares of the inputs that a norm is tried on: about those of the published epsilons' roots.
_SIZES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


def _alone(published: nn.Module, inner: nn.Module, layers: list[nn.Module], model: Any) -> Iterator[Site]:
    """Every norm that both sides have, and an expert or dense feed-forward of each layer, by itself."""
    names = {module: name for name, module in published.named_modules()}
    own = {module: name for name, module in model.named_modules()}
    for index, (there, here) in enumerate(zip(layers, model.decoder.layers, strict=False)):
        for row in ROWS:
            pair = published_module(there, row), submodule(here, row.megatron)
            if pair[0] is None or pair[1] is None:
                continue
            if row.norm:
                difference = _tried_norm(pair[0], pair[1])
            elif row.part is Part.MLP:
                tried = _tried_feed_forward(*pair)
                if tried is None:
                    continue
                difference = tried
            else:
                continue
            yield _site((index, row.part), names[pair[0]], own[pair[1]], difference, alone=True)
    norm = published_final_norm(inner)
    if norm is not None:
        path, last = final_norm(model)
        key = (None, Part.FINAL_NORM)
        yield _site(key, names[norm], path, _tried_norm(norm, last), alone=True)


def _tried_norm(there: nn.Module, here: nn.Module) -> float:
    """The largest difference on inputs of all ``_SIZES``; infinite where the widths differ."""
    weight, mine = next(there.parameters(), None), next(here.parameters(), None)
    width = len(weight) if weight is not None else _ANY_WIDTH
    if mine is not None and len(mine) != width:
        return math.inf
    plain = _plain(width, mine)
    return max(relative(there(plain * size), here(plain * size)) for size in _SIZES)


# What a norm without weights is tried on.
_ANY_WIDTH = 64
# Large enough that an activation's clamp is reached.
_LARGE = (1.0, 30.0)


def _tried_feed_forward(there: Any, here: Any) -> float | None:
    """The largest difference of the first expert, or of a dense feed-forward; None where none is callable
    by itself, because the experts are one operation for all tokens."""
    experts, own = submodule(there, "experts"), submodule(here, "experts.local_experts.0")
    if own is not None:
        if experts is None or len(inspect.signature(experts.forward).parameters) != _ROUTED:
            return None
        here = own
    elif experts is not None:
        return None
    weight = here.linear_fc1.weight
    plain = _plain(weight.shape[1], weight)
    found = []
    for size in _LARGE:
        tokens = plain * size
        if experts is None:
            expected = there(tokens)
        else:
            chosen = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
            expected = experts(tokens, chosen, tokens.new_ones(len(tokens), 1))
        found.append(relative(first_tensor(expected), with_bias(here(tokens))))
    return max(found)


# Tokens, the experts chosen for each, and their weights.
_ROUTED = 3


def _plain(width: int, like: torch.Tensor | None) -> torch.Tensor:
    """Four tokens [4, width] of normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randn((4, width), generator=generator).to("cpu" if like is None else like.device)
