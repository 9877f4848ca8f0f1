"""Linear stand-ins: what Megatron takes from Transformer Engine for projections that no rank splits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from harness.standins.patching import patched


@cache
def te_linear() -> type[Any]:
    """Megatron's ColumnParallelLinear on one rank, called as TELinear is.

    ModelOpt looks a class up by its ``forward``: as this one's is ColumnParallelLinear's, the projections
    are quantized, as those of the real TELinear are.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    class TELinear(ColumnParallelLinear):  # type: ignore[misc]
        def __init__(
            self,
            input_size: int,
            output_size: int,
            *,
            parallel_mode: str | None,
            tp_group: Any = None,
            **more: Any,
        ) -> None:
            super().__init__(input_size, output_size, gather_output=False, tp_group=tp_group, **more)
            if self.tp_group.size() > 1:
                raise NotImplementedError(f"{parallel_mode} projections on {self.tp_group.size()} ranks")

    return TELinear


@contextmanager
def install_latent_moe() -> Iterator[None]:
    from megatron.core.transformer.moe import moe_layer

    with ExitStack() as stack:
        stack.enter_context(patched(moe_layer, "HAVE_TE", True))
        stack.enter_context(patched(moe_layer, "TELinear", te_linear()))
        yield


@contextmanager
def install_latent_attention() -> Iterator[None]:
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer import multi_latent_attention

    with patched(multi_latent_attention, "Linear", Linear):
        yield
