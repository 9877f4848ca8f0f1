"""Attention stand-ins: Megatron's own dot-product attention where Transformer Engine's cannot run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from harness.standins.patching import patched


@cache
def core_attention() -> type[Any]:
    """Megatron's DotProductAttention, taking what Transformer Engine's takes besides: channels.

    Latent attention has keys and values of different widths, and neither is ``kv_channels``. What
    Megatron computes with them is the same; only the scale, where none is given, and the width of the
    output follow from its own idea of a head.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class CoreAttention(DotProductAttention):  # type: ignore[misc]
        def __init__(
            self,
            config: Any,
            *args: Any,
            softmax_scale: float | None = None,
            k_channels: int | None = None,
            v_channels: int | None = None,
            **more: Any,
        ) -> None:
            if softmax_scale is None and k_channels is not None:
                softmax_scale = 1 / math.sqrt(k_channels)
            super().__init__(config, *args, softmax_scale=softmax_scale, **more)
            if v_channels is not None:
                self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels

    return CoreAttention


@contextmanager
def install() -> Iterator[None]:
    from megatron.core.post_training.modelopt.gpt import model_specs as gpt
    from megatron.core.post_training.modelopt.hybrid import model_specs as hybrid

    with ExitStack() as stack:
        for module in (gpt, hybrid):
            stack.enter_context(patched(module, "TEDotProductAttention", core_attention()))
        yield


def query_projection(submodules: Any) -> dict[str, Any]:
    """The modules of a latent attention without query latent: no norm on the queries, as published."""
    from megatron.core.transformer.identity_op import IdentityOp

    return {
        "linear_q_proj": submodules.linear_q_proj,
        "linear_q_up_proj": IdentityOp,
        "linear_kv_up_proj": submodules.linear_kv_up_proj,
        "q_layernorm": IdentityOp,
        "kv_layernorm": submodules.kv_layernorm,
    }


@contextmanager
def install_query_projection() -> Iterator[None]:
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    resolve = MLASelfAttention._resolve_qk_norm_config

    def resolve_all(attention: Any, submodules: Any) -> Any:
        try:
            return resolve(attention, submodules)
        except ValueError:
            if attention.config.q_lora_rank is None and attention.config.qk_layernorm:
                return query_projection(submodules)
            raise

    with patched(MLASelfAttention, "_resolve_qk_norm_config", resolve_all):
        yield
