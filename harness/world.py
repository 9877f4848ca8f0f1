"""World: a layout and a device -> Megatron's process groups, opened and closed by one context manager.

Megatron keeps its groups and random states in module globals. They exist inside ``open_world`` only, so
that any number of cases can run in one process. A single rank needs nobody; real ranks meet through a file,
not a port. Where the other ranks of a layout are simulated, torch's fake process group holds this rank
alone, and what would come from the others is a copy of its own.
"""

from __future__ import annotations

import copy
import gc
import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from harness.case import StandInReport
from harness.errors import UsageError, gpu_fault
from harness.layout import Layout
from harness.standins.output import import_foreign
from harness.standins.patching import patched

if TYPE_CHECKING:
    from harness.rank import Rank

_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
# ModelOpt gathers an object of each quantizer, from one rank too. NCCL alone would do so by way of the GPU: a
# third of all that a case has it do, and it waits each time.
_BACKENDS_OF_ONE = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}

SIMULATED_RANKS = StandInReport(
    "torch.distributed's process groups of more than one rank",
    "torch's fake process group: collectives give shapes, and this rank's own numbers for the others'",
    "One process stands for every rank of the layout, one rank at a time.",
)


@contextmanager
def open_world(
    layout: Layout,
    device: torch.device,
    seed: int = 1234,
    rank: Rank | None = None,
    meeting: Path | None = None,
) -> Iterator[None]:
    """One rank of ``layout`` on ``device``, its random numbers set by ``seed``; closed at the end.

    ``rank`` is the first one unless given. In a layout of more than one rank the others are processes that
    open the same world with the same ``meeting``, a file that does not exist yet; without one they are
    simulated (``SIMULATED_RANKS``): shapes are right, numbers past the first collective are not. Enter it
    inside ``standins.installed(device)``. Raises UsageError where a world is open already.
    """
    import_foreign()
    from megatron.core import parallel_state

    if distributed.is_initialized():
        raise UsageError("a process group is open already in this process")
    backend = _backend(layout, device, alone=layout.world_size > 1 and meeting is None)
    with _collected(), _random_numbers(device), _reproducible(device):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        excepthook = sys.excepthook  # torch wraps it with each group, and never takes it back
        collectives = _init_process_group(backend, layout.world_size, rank.number if rank else 0, meeting)
        state = _globals(parallel_state)
        try:
            with collectives:
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


def _init_process_group(
    backend: str, world: int, rank: int, meeting: Path | None
) -> AbstractContextManager[None]:
    """torch's default group; what to hold open beside it."""
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group(backend, store=FakeStore(), rank=rank, world_size=world)
        return patched(distributed, "all_to_all_single", _all_to_all_of_one)
    hash_store, file_store = distributed.HashStore, distributed.FileStore  # type: ignore[attr-defined]
    store = file_store(str(meeting), world) if world > 1 else hash_store()
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    return patched(distributed, "new_group", _default_group) if world == 1 else nullcontext()


def _backend(layout: Layout, device: torch.device, alone: bool) -> str:
    """torch's name of what carries the collectives; ``alone`` is a rank whose others are simulated."""
    if alone:
        return "fake"
    return (_BACKENDS if layout.world_size > 1 else _BACKENDS_OF_ONE)[device.type]


def simulated() -> bool:
    """Whether the other ranks of the world that is open are simulated."""
    return distributed.get_backend() == "fake"


@contextmanager
def receiving() -> Iterator[None]:
    """While a model of a simulated rank runs: what other ranks would send is zeros where nothing comes.

    Megatron receives into empty tensors, and the fake group of some versions of torch leaves them as they
    were allocated: numbers of chance, which may be no numbers, and ModelOpt stops at those. Not while a model
    is built: zeros take memory that a full-size model's empty tensors do not.
    """
    with zeros_for_empty() if simulated() else nullcontext():
        yield


@contextmanager
def zeros_for_empty() -> Iterator[None]:
    """While it is open, what torch allocates for others to write to is zeros."""

    def zeroed(allocate: Any) -> Any:
        def zeros(*given: Any, **more: Any) -> torch.Tensor:
            made: torch.Tensor = allocate(*given, **more)
            return made.zero_()

        return zeros

    with (
        patched(torch, "empty", zeroed(torch.empty)),
        patched(torch, "empty_like", zeroed(torch.empty_like)),
        patched(torch.Tensor, "new_empty", zeroed(torch.Tensor.new_empty)),
    ):
        yield


def _all_to_all_of_one(output: torch.Tensor, input: torch.Tensor, *sizes: Any, **more: Any) -> None:
    """Fill ``output`` from this rank's own rows, over and over.

    The fake group leaves what goes beyond the input as it was allocated: numbers of chance, which may be
    no numbers, and ModelOpt stops at those.
    """
    if not len(input):
        output.zero_()
        return
    rows = torch.arange(len(output), device=input.device) % len(input)
    output.copy_(input[rows])


def _globals(module: ModuleType) -> dict[str, Any]:
    """The module's own variables, containers copied."""
    return {
        name: copy.copy(value)
        for name, value in vars(module).items()
        if name.startswith("_") and isinstance(value, int | float | str | list | dict | set | None)
    }


def _default_group(*given: Any, **more: Any) -> Any:
    """torch's default group for each of the twenty that Megatron makes of a single rank.

    They hold the same rank and say the same of it. Each that is used would have a communicator of NCCL's,
    and threads of gloo's, to be made and ended with every case.
    """
    return distributed.group.WORLD


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
        _forget_modules()
        gc.collect()
        gc.unfreeze()


def _forget_modules() -> None:
    """Empty what Megatron remembers by a module of a model: each would hold a group and its three threads."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        embedding.forward.cache_clear()


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
    with torch.random.fork_rng(devices=[]), _cuda_random_numbers(device):
        try:
            yield
        finally:
            random.setstate(python)
            megatron_random._CUDA_RNG_STATE_TRACKER = tracker
            megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = initialized


@contextmanager
def _cuda_random_numbers(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        # A fault on the GPU leaves a context that nothing can be set in, and nobody can use.
        if gpu_fault() is None:
            torch.cuda.set_rng_state(state, device)


def _seed(device: torch.device, seed: int) -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    torch.manual_seed(seed)
    if device.type == "cuda":
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
