"""HF fill: a Hugging Face model and a seed -> every parameter set so that every part matters.

transformers' own initialization has norms of one, biases of zero and weights so small that a layer hardly
shows in the logits, and neither would a mistake in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from harness.parity import hf_mxfp4

# A parameter's values from a standard normal tensor of its shape, by the last part of its name.
# Decays of 1 to 16 and time steps of 0.001 to 0.1 are the range that Mamba-2 models are initialized in,
# and trained ones stay near; sinks weigh as much as a key does.
_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "A_log": lambda normal: torch.log(1 + 15 * _uniform(normal)),
    "dt_bias": lambda normal: _softplus_inverse(10 ** (-3 + 2 * _uniform(normal))),
    "D": lambda normal: 1 + 0.3 * normal,
    "sinks": lambda normal: normal,
    # Enough to turn the choice of experts where scores are close, too little to starve one.
    "e_score_correction_bias": lambda normal: 0.02 * normal,
}
# What the residual stream is made of is small, so that the epsilon of every norm that reads it counts:
# beside a variance of a thousandth 1e-5 shows, beside one of one it does not.
_SMALL = 0.03
_INTO_RESIDUAL = ("o_proj", "down_proj", "out_proj", "fc2_latent_proj")
# Queries and keys, so that attention attends to some tokens more than to others.
_SHARP = frozenset({"q_proj", "k_proj", "q_b_proj", "qkv_proj"})
_SHARPNESS = 1.5
# Router logits well apart, so that no rounding decides which experts are chosen.
_ROUTED = 2.0
# Of a sigmoid, whose best scores lie close together, less: the expert bias would outweigh them all.
_ROUTED_BY_SIGMOID = 1.0
# transformers' classes of norms that multiply by one more than their weight.
_STORED_LESS_ONE = frozenset({"NemotronLayerNorm1P", "Qwen3NextRMSNorm"})
# Models whose experts' matrices are (in, out) in memory.
_INPUTS_FIRST = frozenset({"gpt_oss", "llama4_text"})
_IN_MXFP4 = frozenset({"gpt_oss"})
_NORM_SPREAD = 0.2
_BIAS_SPREAD = 0.2


def fill(model: nn.Module, seed: int) -> None:
    """Set every parameter, and every expert bias, from its name, its shape and ``seed``."""
    kind = model.config.model_type  # type: ignore[union-attr]
    with torch.no_grad():
        for name, tensor in _tensors(model):
            if tensor.ndim == 3 and "conv" not in name:
                inputs_first = kind in _INPUTS_FIRST
                _fill_experts(name, tensor.mT if inputs_first else tensor, seed, kind in _IN_MXFP4)
                continue
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            values = _values(name, tensor, seed, 0.0 if owner in _STORED_LESS_ONE else 1.0)
            tensor.copy_(values * _scale(model, name, tensor))


def _fill_experts(name: str, tensor: Tensor, seed: int, packed: bool) -> None:
    """Set the matrices (experts, out, in) of all experts; ``packed``: to numbers that MXFP4 has.

    They are one, begun at another place for each expert: to draw them all would take most of the time that
    a model takes to build, and no two are alike.
    """
    experts, outputs, inputs = tensor.shape
    size = outputs * inputs
    drawn = normals(name, (2 * outputs, inputs), seed)
    scale = (_SMALL if "down_proj" in name else 1.0) / math.sqrt(inputs)
    if packed:
        drawn = hf_mxfp4.decode(*hf_mxfp4.encode(drawn))
        scale = 2.0 ** round(math.log2(scale))
    drawn = (drawn * scale).flatten()
    for expert in range(experts):
        start = expert * _STRIDE % size
        tensor[expert].copy_(drawn[start : start + size].view(outputs, inputs))


# No multiple of a width, so that neither rows nor columns line up; whole blocks of MXFP4.
_STRIDE = 32 * 251


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            yield name, buffer


def _values(name: str, tensor: Tensor, seed: int, centre: float) -> Tensor:
    """``centre`` is what norm factors are spread around."""
    normal, last = normals(name, tuple(tensor.shape), seed), name.rpartition(".")[2]
    if last in _KNOWN:
        return _KNOWN[last](normal)
    if tensor.ndim == 1 or last.endswith("bias"):
        return normal * _NORM_SPREAD + centre if last == "weight" else normal * _BIAS_SPREAD
    return normal if "embed" in name else normal / math.sqrt(math.prod(tensor.shape[1:]))


def _scale(model: nn.Module, name: str, tensor: Tensor) -> Tensor | float:
    """What the values are multiplied with, for all or row by row."""
    module, parent = name.split(".")[-2], name.rpartition(".")[0].rpartition(".")[0]
    if "embed" in name or any(part in name for part in _INTO_RESIDUAL):
        return _SMALL
    if is_router(name):
        return _ROUTED_BY_SIGMOID if _has_expert_bias(model) else _ROUTED
    if module in ("q_proj", "k_proj") and hasattr(model.get_submodule(parent), f"{module[0]}_norm"):
        return _SMALL  # the norm that follows undoes it, but for its epsilon
    if module == "q_a_proj":
        return _SMALL
    if module == "kv_a_proj_with_mqa":
        # The latent has a norm too, the rotated keys beside it have none.
        latent: Any = model.config.kv_lora_rank  # type: ignore[union-attr]
        return _rows(tensor, latent, _SMALL, _SHARPNESS)
    if module == "in_proj":
        # The gates, which come first: their products with the output are normed.
        inner: Any = model.get_submodule(parent).intermediate_size
        return _rows(tensor, inner, _SMALL, 1.0)
    return _SHARPNESS if module in _SHARP else 1.0


def _has_expert_bias(model: nn.Module) -> bool:
    return any(name.endswith("e_score_correction_bias") for name, _ in _tensors(model))


def _rows(tensor: Tensor, first: int, before: float, after: float) -> Tensor:
    scale = torch.full((tensor.shape[0],) + (1,) * (tensor.ndim - 1), after)
    scale[:first] = before
    return scale


def is_router(name: str) -> bool:
    """Whether a parameter of this name is a router's matrix."""
    return name.endswith((".gate.weight", ".router.weight"))


def normals(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal values that depend on the name, the shape and the seed alone; float32 on the CPU."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest) >> 1))


def _uniform(normal: Tensor) -> Tensor:
    """Standard normal values as uniform ones between 0 and 1."""
    return 0.5 * (1 + torch.erf(normal / math.sqrt(2)))


def _softplus_inverse(step: Tensor) -> Tensor:
    return step + torch.log(-torch.expm1(-step))
