"""World: a layout and a device -> Megatron's process groups, opened and closed by one context manager.

Megatron keeps its groups and random states in module globals. They exist inside ``open_world`` only, so
that any number of cases can run in one process. There is no TCP port: a single rank needs none.
"""

from __future__ import annotations

import copy
import gc
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import distributed

from harness.errors import UsageError
from harness.layout import Layout
from harness.standins.output import import_foreign

_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


@contextmanager
def open_world(layout: Layout, device: torch.device, seed: int = 1234) -> Iterator[None]:
    """One rank of ``layout`` on ``device``, its random numbers set by ``seed``; closed at the end.

    Enter it inside ``standins.installed(device)``. Raises UsageError for a layout of more than one
    rank and where a world is open already.
    """
    import_foreign()
    from megatron.core import parallel_state

    if layout.world_size > 1:
        raise UsageError(
            f"layout {layout} needs {layout.world_size} ranks; simulated ranks are not supported yet, "
            "only tp1"
        )
    if distributed.is_initialized():
        raise UsageError("a process group is open already in this process")
    with _collected(), _random_numbers(device), _reproducible(device):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        excepthook = sys.excepthook  # torch wraps it with each group, and never takes it back
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(_BACKENDS[device.type], store=store, rank=0, world_size=1)
        state = _globals(parallel_state)
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp,
                create_gloo_process_groups=False,
            )
            _seed(device, seed)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            # That forgets some groups; what they refer to is gone all the same.
            vars(parallel_state).update(state)
            distributed.destroy_process_group()
            sys.excepthook = excepthook


def _globals(module: ModuleType) -> dict[str, Any]:
    """The module's own variables, containers copied."""
    return {
        name: copy.copy(value)
        for name, value in vars(module).items()
        if name.startswith("_") and isinstance(value, int | float | str | list | dict | set | None)
    }


@contextmanager
def _collected() -> Iterator[None]:
    """Collect what was made inside, and only that.

    ModelOpt ties modules into cycles, so a model goes only with a collection, and a full one would
    look at the half million objects of the imported libraries.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Sums in one order, so that a model run twice gives the same bits.

    On the CPU one thread: the result must not depend on how many cores there are, and a tiny model's
    operations are too small to share. On CUDA the deterministic kernels, where there is one: the
    experts' outputs are otherwise added up in the order in which they happen to come.
    """
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the caller's random states, and Megatron's tracker, as they were."""
    from megatron.core.tensor_parallel import random as megatron_random

    python = random.getstate()
    tracker = megatron_random._CUDA_RNG_STATE_TRACKER
    initialized = megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python)
            megatron_random._CUDA_RNG_STATE_TRACKER = tracker
            megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = initialized


def _seed(device: torch.device, seed: int) -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    torch.manual_seed(seed)
    if device.type == "cuda":
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
