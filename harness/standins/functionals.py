"""Functionals: what ModelOpt replaces during a quantized forward pass, put back also when the pass raises.

A quantized linear replaces Megatron's linear function for as long as it runs. ModelOpt restores it only when
nothing went wrong; after an exception every other model of the process would run through the quantizers of
the one that failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from harness.standins.patching import patched

_NAME = "replace_function"


@contextmanager
def replace_function(
    package: Any, name: str, new_func: Callable[..., Any], og_func_cache_name: str | None = None
) -> Iterator[None]:
    """``package.name`` is ``new_func`` for a while, and the old one is at hand as ``og_func_cache_name``."""
    kept = og_func_cache_name or f"_{name}"
    original = getattr(package, name)
    setattr(package, name, new_func)
    setattr(package, kept, original)
    try:
        yield
    finally:
        setattr(package, name, original)
        delattr(package, kept)


@contextmanager
def install() -> Iterator[None]:
    from modelopt.torch.quantization.utils import core_utils

    original = getattr(core_utils, _NAME)
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("modelopt.") and vars(module).get(_NAME) is original
    ]
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(patched(module, _NAME, replace_function))
        yield
