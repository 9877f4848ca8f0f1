"""Mamba stand-ins: mamba-ssm's gated norm and chunk scan in plain torch.

Both compute in float32 and round once, at the end, as the Triton kernels do. The scan is the one of the
Mamba-2 paper (section 6): within a chunk a masked matrix product, between chunks the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional

from harness.standins.patching import patched


class GatedRMSNorm(nn.Module):
    """RMSNorm of each group of ``group_size`` channels, gated by silu(z) before or after."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        wide = x.float()
        gate = None if z is None else functional.silu(z.float())
        if gate is not None and not self.norm_before_gate:
            wide = wide * gate
        groups = wide.reshape(*wide.shape[:-1], -1, self.group_size)
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        wide = groups.flatten(-2) * self.weight.float()
        if gate is not None and self.norm_before_gate:
            wide = wide * gate
        return wide.to(x.dtype)


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What ``mamba_chunk_scan_combined`` computes, chunk by chunk, with its names and shapes.

    For every head: state[t] = exp(dt A) state[t-1] + dt x[t] B[t]^T, y[t] = state[t] C[t] + D x[t],
    gated by silu(z). ``x`` and ``z`` are [batch, length, heads, head_dim], ``dt`` [batch, length, heads],
    ``B`` and ``C`` [batch, length, groups, state_dim], ``A`` and ``D`` [heads], states [batch, heads,
    head_dim, state_dim].
    """
    batch, length, heads, head_dim = x.shape
    wide, step = x.float(), dt.float()
    if dt_bias is not None:
        step = step + dt_bias.float()
    if dt_softplus:
        step = functional.softplus(step)
    per_group = heads // B.shape[2]
    inputs, outputs = (each.float().repeat_interleave(per_group, dim=2) for each in (B, C))
    state = (
        wide.new_zeros(batch, heads, head_dim, B.shape[-1])
        if initial_states is None
        else initial_states.float()
    )
    parts = []
    for start in range(0, length, chunk_size):
        chunk = slice(start, start + chunk_size)
        part, state = _chunk(
            wide[:, chunk], step[:, chunk], A.float(), inputs[:, chunk], outputs[:, chunk], state
        )
        parts.append(part)
    y = torch.cat(parts, dim=1)
    if D is not None:
        y = y + wide * D.float().unsqueeze(-1)
    if z is not None:
        y = y * functional.silu(z.float())
    return (y.to(x.dtype), state) if return_final_states else y.to(x.dtype)


def _chunk(
    x: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk's outputs [batch, length, heads, head_dim], and the state after it."""
    decay = (step * A).cumsum(1)  # log of what is left of the state, [batch, length, heads]
    length = x.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    between = decay.unsqueeze(2) - decay.unsqueeze(1)  # [batch, to, from, heads]
    kept = torch.where(causal[:, :, None], between, -torch.inf).exp()
    scores = torch.einsum("bihn,bjhn->bijh", outputs, inputs) * kept
    added = x * step.unsqueeze(-1)
    y = torch.einsum("bijh,bjhp->bihp", scores, added)
    y = y + torch.einsum("bihn,bhpn->bihp", outputs * decay.exp().unsqueeze(-1), state)
    left = (decay[:, -1:] - decay).exp().unsqueeze(-1)
    gained = torch.einsum("bjhn,bjhp->bhpn", inputs * left, added)
    return y, state * decay[:, -1].exp()[..., None, None] + gained


@contextmanager
def install() -> Iterator[None]:
    from megatron.core.ssm import mamba_mixer

    with ExitStack() as stack:
        for name, replacement in (
            ("HAVE_MAMBA_SSM", True),
            ("ExtendedRMSNorm", GatedRMSNorm),
            ("mamba_chunk_scan_combined", chunk_scan),
            # Without it Megatron convolves in plain torch.
            ("causal_conv1d_fn", None),
        ):
            stack.enter_context(patched(mamba_mixer, name, replacement))
        yield
