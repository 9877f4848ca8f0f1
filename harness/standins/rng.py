"""Random number stand-in: Megatron's inference tracker where there is no CUDA generator to fork."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from harness.standins.patching import patched


@contextmanager
def install() -> Iterator[None]:
    from megatron.core.tensor_parallel import random

    with ExitStack() as stack:
        stack.enter_context(patched(random, "_CUDA_RNG_STATE_TRACKER", None))
        stack.enter_context(patched(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False))
        random.initialize_rng_tracker(inference_rng_tracker=True)
        yield
