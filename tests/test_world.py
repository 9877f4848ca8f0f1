from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed import distributed_c10d

from harness import world
from harness.errors import UsageError
from harness.layout import Layout
from harness.rank import Rank, ranks
from harness.standins import installed
from harness.standins.output import import_foreign
from harness.world import open_world, receiving

import_foreign()

from megatron.core import parallel_state  # noqa: E402

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    with installed(CPU):
        yield


def draw(seed: int) -> tuple[torch.Tensor, float]:
    with open_world(Layout(), CPU, seed):
        return torch.rand(4), random.random()


def megatron_groups() -> dict[str, object]:
    names = [name for name in vars(parallel_state) if name.isupper() and "_GROUP" in name]
    return {name: vars(parallel_state)[name] for name in names if vars(parallel_state)[name] is not None}


def test_one_rank_of_every_group() -> None:
    with open_world(Layout(), CPU):
        assert distributed.get_world_size() == 1
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert parallel_state.get_expert_model_parallel_world_size() == 1
        assert parallel_state.is_pipeline_first_stage() and parallel_state.is_pipeline_last_stage()


def test_closing_leaves_nothing() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    before = megatron_groups()
    tracker = megatron_random._CUDA_RNG_STATE_TRACKER
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    with open_world(Layout(), CPU):
        assert megatron_groups().keys() > before.keys()
    assert megatron_groups() == before
    assert not distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert megatron_random._CUDA_RNG_STATE_TRACKER is tracker


def test_an_exception_closes_the_world() -> None:
    with pytest.raises(ZeroDivisionError), open_world(Layout(), CPU):
        1 / 0  # noqa: B018
    assert not distributed.is_initialized()
    assert gc.get_freeze_count() == 0


def test_the_seed_decides_the_random_numbers() -> None:
    (one, first), (same, second), (other, third) = draw(1), draw(1), draw(2)
    assert torch.equal(one, same) and first == second
    assert not torch.equal(one, other) and first != third


def test_many_worlds_in_one_process() -> None:
    before = len(os.listdir("/proc/self/task"))
    for _ in range(30):
        draw(1)
    assert len(os.listdir("/proc/self/task")) < before + 5  # gloo's end a moment after it
    assert not distributed.distributed_c10d._world.pg_map
    assert not distributed.distributed_c10d._world.pg_names


def test_what_was_made_inside_is_collected() -> None:
    def make() -> weakref.ref[torch.nn.Module]:
        module = torch.nn.Linear(2, 2)
        module.itself = module
        return weakref.ref(module)

    with open_world(Layout(), CPU):
        reference = make()
        assert reference() is not None
    assert reference() is None


def test_a_single_rank_has_one_group() -> None:
    new_group = distributed.new_group
    with open_world(Layout(), CPU):
        found = megatron_groups().values()
        groups = [group for group in found if isinstance(group, distributed.ProcessGroup)]
        assert len(groups) > 10 and set(groups) == {distributed.group.WORLD}
        assert len(distributed_c10d._world.pg_map) == 1
    assert distributed.new_group is new_group


def test_one_thread_on_the_cpu() -> None:
    threads = torch.get_num_threads()
    with open_world(Layout(), CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_world_at_a_time() -> None:
    with (
        open_world(Layout(), CPU),
        pytest.raises(UsageError, match="open already"),
        open_world(Layout(), CPU),
    ):
        pass
    assert not distributed.is_initialized()


@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2", "tp8,ep4,etp1,pp2", "tp2,cp2"])
def test_megatron_places_each_simulated_rank_as_we_do(layout: str) -> None:
    sizes = Layout.parse(layout)
    for rank in ranks(sizes):
        with open_world(sizes, CPU, rank=rank):
            assert distributed.get_world_size() == sizes.world_size
            assert (
                Rank(
                    distributed.get_rank(),
                    tp=parallel_state.get_tensor_model_parallel_rank(),
                    cp=parallel_state.get_context_parallel_rank(),
                    pp=parallel_state.get_pipeline_model_parallel_rank(),
                    etp=parallel_state.get_expert_tensor_parallel_rank(),
                    ep=parallel_state.get_expert_model_parallel_rank(),
                )
                == rank
            )


def test_a_simulated_world_leaves_nothing() -> None:
    before, exchange = megatron_groups(), distributed.all_to_all_single
    with open_world(Layout(tp=2, etp=2, pp=2), CPU, rank=Rank(3, tp=1, pp=1, etp=1)):
        assert distributed.all_to_all_single is not exchange
    assert distributed.all_to_all_single is exchange
    assert megatron_groups() == before
    assert not distributed.is_initialized()


def test_other_ranks_send_what_this_one_has() -> None:
    with open_world(Layout(tp=2, etp=2), CPU):
        group = parallel_state.get_tensor_model_parallel_group()
        own, gathered = torch.arange(3.0), torch.full((6,), torch.nan)
        distributed.all_gather_into_tensor(gathered, own, group=group)
        assert gathered.tolist() == [0, 1, 2, 0, 1, 2]
        exchanged = torch.full((5,), torch.nan)
        distributed.all_to_all_single(exchanged, own, [2, 3], [1, 2], group=group)
        assert exchanged.tolist() == [0, 1, 2, 0, 1]
        distributed.all_to_all_single(exchanged, own[:0], [2, 3], [0, 0], group=group)
        assert exchanged.tolist() == [0] * 5


def test_nothing_of_chance_is_received() -> None:
    empty, like, new = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with open_world(Layout(), CPU), receiving():
        assert torch.empty is empty
    with pytest.raises(ZeroDivisionError), open_world(Layout(tp=2, etp=2), CPU), receiving():
        torch.full((4096,), torch.nan)  # what an allocation of that size would find
        assert not torch.empty(4096).any()
        assert torch.empty(2, 3, dtype=torch.int64).tolist() == [[0] * 3] * 2
        assert not torch.empty_like(torch.full((4096,), torch.nan)).any()
        assert torch.ones(5).new_empty(size=[2]).tolist() == [0, 0]
        1 / 0  # noqa: B018
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == (empty, like, new)


# ---- on a GPU, in a process of its own: this one has the CPU's stand-ins ----


@pytest.mark.parametrize(
    ("layout", "device", "alone", "backend"),
    [
        (Layout(), "cpu", False, "gloo"),
        (Layout(), "cuda", False, "cpu:gloo,cuda:nccl"),
        (Layout(tp=2), "cpu", False, "gloo"),
        (Layout(tp=2), "cuda", False, "nccl"),
        (Layout(tp=2), "cuda", True, "fake"),
    ],
)
def test_backends(layout: Layout, device: str, alone: bool, backend: str) -> None:
    assert world._backend(layout, torch.device(device), alone) == backend


ON_GPU = """
import torch
from torch import distributed
from torch.distributed import distributed_c10d
from harness.layout import Layout
from harness.standins import installed
from harness.world import open_world

device = torch.device("cuda:0")
before = torch.cuda.get_rng_state(device)
with installed(device), open_world(Layout(), device):
    from megatron.core import parallel_state
    group, found, ones = parallel_state.get_expert_data_parallel_group(), [None], torch.ones(2, device=device)
    distributed.all_gather_object(found, {"a": 1}, group=group)
    distributed.all_reduce(ones, group=group)
    assert (found, ones.tolist()) == ([{"a": 1}], [1.0, 1.0])
    assert distributed_c10d._get_object_coll_device(group) == "cpu"
    torch.rand(4, device=device)
assert torch.equal(torch.cuda.get_rng_state(device), before)
"""

FAULT = """
import torch
from harness.errors import gpu_fault
from harness.layout import Layout
from harness.standins import installed
from harness.world import open_world

device = torch.device("cuda:0")
assert gpu_fault() is None
try:
    with installed(device), open_world(Layout(), device):
        torch.zeros(4, device=device)[torch.full((4,), 1 << 20, device=device)]
        raise KeyError("what comes through")
except KeyError:
    pass
assert "device-side assert" in str(gpu_fault())
"""


@pytest.mark.gpu
@pytest.mark.parametrize("code", [ON_GPU, FAULT], ids=["collectives", "fault"])
def test_a_world_on_a_gpu(code: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; none here")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
