"""Static NVFP4 stand-in: ModelOpt's kernels for weights with a calibrated amax per block, in plain torch.

``static_blockwise_fp4_fake_quant`` rounds each block to E2M1 under a scale that comes from the block's amax
and not from its numbers; the scale itself is rounded to E4M3 by ModelOpt's own ``scaled_e4m3_impl``, which
runs anywhere. What exceeds six scales saturates. ``static_blockwise_fp4_cast`` rounds without any scale.
Scale sweeps, local Hessians, GPTQ and four-over-six all search with these. The kernels make six of what is
not a number; here it stays NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from harness.standins.nvfp4 import E2M1_MAX, E4M3_MAX, round_to_e2m1
from harness.standins.patching import patched


def fake_quantize(
    x: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = E4M3_MAX,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x``, of as many equal blocks in a row as ``amax`` has numbers, rounded to NVFP4; same shape.

    ``global_amax`` is the largest amax unless given; ``fp8_max_for_normalization`` is 256 in four-over-six,
    where a block may have half again its scale. Raises ValueError where the blocks do not divide ``x``.
    """
    if x.numel() % amax.numel():
        raise ValueError(f"{x.numel()} numbers do not split into {amax.numel()} blocks")
    scale = amax.float() / E2M1_MAX
    if quantize_block_scales:
        from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl

        largest = (amax.amax() if global_amax is None else global_amax).float()
        scale = scaled_e4m3_impl(scale, largest * (E4M3_MAX / fp8_max_for_normalization) / E2M1_MAX)
    scale = scale.reshape(-1, 1)
    usable = torch.where((scale == 0) | ~torch.isfinite(scale), 1.0, scale)
    blocks = x.float().reshape(amax.numel(), -1)
    rounded = round_to_e2m1(blocks / usable).mul_(torch.where(scale == 0, 0.0, usable))
    return rounded.view(x.shape).to(out_dtype or x.dtype)


def cast(x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x`` rounded to the numbers of E2M1, same shape."""
    return round_to_e2m1(x.to(torch.float32, copy=True)).to(out_dtype or x.dtype)


@contextmanager
def install() -> Iterator[None]:
    from modelopt.torch.quantization import tensor_quant

    seam: Any = tensor_quant
    kernels = SimpleNamespace(
        IS_AVAILABLE=True,
        static_blockwise_fp4_fake_quant=fake_quantize,
        static_blockwise_fp4_cast=cast,
    )
    with patched(seam, "triton_kernel", kernels):
        yield
