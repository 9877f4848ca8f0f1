"""Linear stand-ins: what Megatron takes from Transformer Engine for projections that no rank splits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from harness.standins.patching import patched


class _Alone:
    """A tensor parallel group of this rank only, of which Megatron asks no more than this."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@cache
def te_linear() -> type[Any]:
    """Megatron's ColumnParallelLinear that no rank splits, called as TELinear is.

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
            config: Any,
            tp_group: Any = None,
            **more: Any,
        ) -> None:
            if parallel_mode != "duplicated":
                raise NotImplementedError(f"a {parallel_mode} TELinear")
            # Every rank holds the whole weight and multiplies the tokens it has: as one rank alone.
            config = copy.copy(config)
            config.sequence_parallel = False
            super().__init__(
                input_size, output_size, config=config, gather_output=False, tp_group=_Alone(), **more
            )

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
