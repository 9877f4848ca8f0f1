"""Preload: what every worker needs, imported once by the fork server they come from.

It must leave CUDA alone: a forked process cannot use a CUDA that its parent has touched.
"""

from __future__ import annotations

import contextlib
import importlib

_NAMES = (
    "harness.build",
    "harness.trace",
    "harness.world",
    "harness.quantize",
    "harness.small_model",
    "harness.rank_model",
    "harness.parity.stage",
)

# What cannot be imported here fails in the case that needs it, where it is reported.
for _name in _NAMES:
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
