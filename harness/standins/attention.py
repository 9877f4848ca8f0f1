"""Attention stand-in: Megatron's own dot-product attention where Transformer Engine's cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harness.standins.patching import patched


@contextmanager
def install() -> Iterator[None]:
    from megatron.core.post_training.modelopt.gpt import model_specs
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    with patched(model_specs, "TEDotProductAttention", DotProductAttention):
        yield
