"""Compilation stand-in: what Megatron decorated with ``torch.compile`` runs as plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def install() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield
