"""Gated delta net stand-ins: what Megatron takes from flash-linear-attention, in plain torch.

The delta rule itself is Megatron's own ``torch_chunk_gated_delta_rule``, which it keeps for
deterministic runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn import functional

from harness.standins.patching import patched


def l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(sum(x^2) + eps)"""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(dim, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Each channel of ``x`` [batch, length, channels] with its own ``weight`` [channels, width].

    Raises NotImplementedError for packed sequences and carried states, which no case has.
    """
    if initial_state is not None or output_final_state or cu_seqlens is not None:
        raise NotImplementedError("packed sequences and carried states")
    width, length = weight.shape[-1], x.shape[1]
    padded = functional.pad(x.float().transpose(1, 2), (width - 1, 0))
    y = functional.conv1d(
        padded,
        weight.float().unsqueeze(1),
        None if bias is None else bias.float(),
        groups=weight.shape[0],
    )
    assert y.shape[-1] == length
    if activation is not None:
        if activation not in ("silu", "swish"):
            raise NotImplementedError(f"activation {activation}")
        y = functional.silu(y)
    return y.transpose(1, 2).to(x.dtype), None


@contextmanager
def install() -> Iterator[None]:
    from megatron.core.ssm.gated_delta_net import common, gdn

    with ExitStack() as stack:
        stack.enter_context(patched(common, "HAVE_FLA", True))
        stack.enter_context(patched(common, "l2norm", l2norm))
        stack.enter_context(patched(gdn, "causal_conv1d", causal_conv1d))
        stack.enter_context(patched(gdn, "chunk_gated_delta_rule", gdn.torch_chunk_gated_delta_rule))
        yield
