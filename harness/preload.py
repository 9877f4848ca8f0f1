"""Preload: what every worker needs, imported once by the fork server they come from.

It must leave CUDA alone: a forked process cannot use a CUDA that its parent has touched.
"""

from __future__ import annotations

import contextlib
import importlib

# What cannot be imported here fails in the case that needs it, where it is reported.
with contextlib.suppress(Exception):
    for _name in ("harness.build", "harness.trace", "harness.world", "harness.quantize"):
        importlib.import_module(_name)
