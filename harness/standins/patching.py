"""Patching: one attribute, replaced for a while. The only way a stand-in touches foreign state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(target: Any, name: str, replacement: Any) -> Iterator[None]:
    """Set ``target.name`` to ``replacement`` and put the old value back at the end.

    Raises AttributeError where ``target`` has no such attribute: a stand-in for something that a new
    version renamed must not pass unnoticed.
    """
    original = getattr(target, name)
    setattr(target, name, replacement)
    try:
        yield
    finally:
        setattr(target, name, original)
