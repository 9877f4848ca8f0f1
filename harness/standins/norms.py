"""Norm stand-ins: Transformer Engine's RMSNorm and LayerNorm in plain torch.

Like Transformer Engine they compute in float32 and round once, at the end; parameters have the
config's ``params_dtype``, and a zero-centred gamma is stored less one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from harness.standins.patching import patched

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class _Norm(nn.Module):
    """Normalizes the last dimension, of ``hidden_size``; the shape stays."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        gamma = 0.0 if self.zero_centered_gamma else 1.0
        shape, dtype = (hidden_size,), config.params_dtype
        self.weight = nn.Parameter(torch.full(shape, gamma, dtype=dtype, device=device))
        self._mark(self.weight, config)

    @staticmethod
    def _mark(parameter: nn.Parameter, config: TransformerConfig) -> None:
        # Megatron reads this off every norm parameter to know which gradients to reduce.
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def gamma(self) -> torch.Tensor:
        """The factor, in float32."""
        weight = self.weight.float()
        return weight + 1 if self.zero_centered_gamma else weight

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"


class RMSNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) * gamma"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.gamma()).to(x.dtype)


class LayerNorm(_Norm):
    """(x - mean(x)) / sqrt(variance(x) + eps) * gamma + beta"""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros_like(self.weight))
        self._mark(self.bias, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = nn.functional.layer_norm(
            x.float(), (self.hidden_size,), self.gamma(), self.bias.float(), self.eps
        )
        return wide.to(x.dtype)


_NORMS: dict[str, type[_Norm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


class Norm:
    """Stands where ``megatron.core.post_training.modelopt.layers.Norm`` does: a factory in a class."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> _Norm:
        if config.normalization not in _NORMS:
            raise ValueError(f"normalization {config.normalization!r} is not one of {sorted(_NORMS)}")
        return _NORMS[config.normalization](config, hidden_size, eps)


@contextmanager
def install() -> Iterator[None]:
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.post_training.modelopt import layers
    from megatron.core.post_training.modelopt.gpt import model_specs as gpt
    from megatron.core.post_training.modelopt.hybrid import model_specs as hybrid
    from megatron.core.transformer import attention

    with ExitStack() as stack:
        for module in (layers, gpt, hybrid):
            stack.enter_context(patched(module, "Norm", Norm))
        for module in (hybrid_block, attention):
            stack.enter_context(patched(module, "TENorm", Norm))
        yield
