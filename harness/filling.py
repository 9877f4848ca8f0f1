"""Filling: a model and a seed -> every parameter and expert bias set, the same on every device and rank.

Megatron's own initialization depends on the device and hides mistakes: with a spread of 0.02 a shrunken
layer hardly shows in the output, and an error in it would not either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harness.sharding import Share

# Centre and spread by the last part of a parameter's name. Time steps of about a twentieth and decays of
# about a third per step leave a recurrent mixer a memory of some tokens, neither none nor all; sinks weigh as
# much as a key does.
KNOWN = {
    "A_log": (1.0, 0.5),
    "dt_bias": (-3.0, 0.5),
    "D": (1.0, 0.1),
    "softmax_offset": (0.0, 1.0),
}
# Enough to turn the choice of experts where two are close, too little to starve one.
_EXPERT_BIAS_SPREAD = 0.02


def fill(model: nn.Module, seed: int, shares: Mapping[str, Share]) -> None:
    """Set every parameter, and every router's expert bias (in float32), from its name and ``seed``.

    ``shares`` says what of the whole model's tensors those of this rank are, so that the ranks of any layout
    hold one model between them; what is not in it is taken to be whole.

    Matrices and convolutions are normal with variance 1 / inputs, embeddings normal with variance 1, so
    that each layer moves the residual stream about as much as it holds, whatever the width. Norm factors
    are spread around one and biases around zero, so that leaving one out shows.
    """
    centred: bool = model.config.layernorm_zero_centered_gamma  # type: ignore[assignment, union-attr]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            share = _share(name, parameter, shares)
            parameter.copy_(_taken(_values(share.name, share.whole, seed, centred), share))
        for name, buffer in _expert_biases(model):
            share = _share(name, buffer, shares)
            values = _normal(share.name, share.whole, seed) * _EXPERT_BIAS_SPREAD
            # Float16Module rounded it; Megatron keeps it in float32 from the first forward pass on.
            buffer.data = values.to(buffer.device)


def _share(name: str, tensor: torch.Tensor, shares: Mapping[str, Share]) -> Share:
    """What ``tensor`` is of the whole; itself where it has another shape, which the build stage reports."""
    shape = tuple(tensor.shape)
    share = shares.get(name)
    return share if share is not None and share.shape == shape else Share(name, shape)


def _taken(whole: torch.Tensor, share: Share) -> torch.Tensor:
    axis = share.axis
    if axis is None:
        return whole
    return torch.cat([whole.narrow(axis, part.start, len(part)) for part in share.ranges], axis)


def _expert_biases(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, buffer in model.named_buffers():
        if name.endswith(".expert_bias"):
            yield name, buffer


def _values(name: str, shape: tuple[int, ...], seed: int, centred: bool) -> torch.Tensor:
    values, last = _normal(name, shape, seed), name.rpartition(".")[2]
    if last in KNOWN:
        centre, spread = KNOWN[last]
        return values * spread + centre
    if len(shape) == 1:
        return values * 0.1 + _norm_factor(name, centred)
    if name.startswith("embedding."):
        return values
    return values / math.sqrt(shape[-1])


def _norm_factor(name: str, centred: bool) -> float:
    """What a vector is spread around: one for norm factors, unless they are stored less one."""
    if not name.endswith("norm.weight"):
        return 0.0
    # A Mamba mixer's own norm never is.
    return 0.0 if centred and not name.endswith(".mixer.norm.weight") else 1.0


def _normal(name: str, shape: Any, seed: int) -> torch.Tensor:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.randn(shape, generator=generator)
