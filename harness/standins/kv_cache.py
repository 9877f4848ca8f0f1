"""KV cache stand-in: ModelOpt's quantizers of queries, keys and values, in the attention stand-in.

ModelOpt knows the core attention only as Transformer Engine's class, and gives it three quantizers that act
after the rotary embedding. The stand-in of that class gets the same three; without them every pattern that
means the KV cache would match nothing, and no one would be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from harness.standins.attention import core_attention


@cache
def quantized_attention() -> type[Any]:
    """ModelOpt's form of a core attention, to be mixed into a class of that kind by its registry."""
    from megatron.core import parallel_state
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
    from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
    from modelopt.torch.utils.distributed import ParallelState

    class QuantCoreAttention(QuantModule):  # type: ignore[misc]
        def _setup(self) -> None:
            self.q_bmm_quantizer = TensorQuantizer()
            self.k_bmm_quantizer = TensorQuantizer()
            self.v_bmm_quantizer = TensorQuantizer()
            # Ranks with the same weights agree on one amax.
            self.parallel_state = ParallelState(
                parallel_state.get_data_parallel_group(with_context_parallel=True),
                parallel_state.get_tensor_model_parallel_group(),
            )

        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **more: Any
        ) -> Any:
            return super().forward(
                self.q_bmm_quantizer(query),
                self.k_bmm_quantizer(key),
                self.v_bmm_quantizer(value),
                *args,
                **more,
            )

        # torch asks a module for extra state where its class has these, as Transformer Engine's has; ModelOpt
        # then puts its own in their place on the instance, and keeps in it how the quantizers are set.
        def get_extra_state(self) -> Any:
            return None

        def set_extra_state(self, state: Any) -> None:
            pass

        def modelopt_post_restore(self, name: str = "") -> None:
            """Raises NotImplementedError for a bias per head and channel, as ModelOpt's own does."""
            quantizers = (self.q_bmm_quantizer, self.k_bmm_quantizer, self.v_bmm_quantizer)
            states = [state for quantizer in quantizers for state in quantizer.state_dict().values()]
            if any(state.numel() != 1 for state in states):
                raise NotImplementedError("Only scalar states are supported for KV Cache/BMM Quantizers")
            self.to(device=self.device, dtype=self.dtype)

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
        ) -> Any:
            state = self.state_dict(prefix="", keep_vars=True)
            return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)

    return QuantCoreAttention


@contextmanager
def install() -> Iterator[None]:
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    attention = core_attention()
    if attention in QuantModuleRegistry:
        yield
        return
    QuantModuleRegistry.register({attention: "stand-in for TEDotProductAttention"})(quantized_attention())
    try:
        yield
    finally:
        QuantModuleRegistry.unregister(attention)
