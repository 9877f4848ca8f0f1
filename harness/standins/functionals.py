"""Functionals: what ModelOpt replaces during a quantized forward pass, put back also when the pass raises.

A quantized linear replaces Megatron's linear function for as long as it runs. ModelOpt restores it only when
nothing went wrong; after an exception every other model of the process would run through the quantizers of
the one that failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import ModuleType
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
    with ExitStack() as stack:
        for module in _users(len(sys.modules)):
            stack.enter_context(patched(module, _NAME, replace_function))
        yield


@lru_cache(maxsize=1)
def _users(loaded: int) -> tuple[ModuleType, ...]:
    """The modules of ModelOpt that have the function by name; looked up anew once others are loaded."""
    return tuple(
        module
        for name, module in list(sys.modules.items())
        if name.startswith("modelopt.") and _NAME in vars(module)
    )
