"""Ranks as processes of their own: together they say what one rank says, or it is found who does not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from small_models import DENSE, MODELS, SPARSE, model_of

from harness import processes, rank_model, real_ranks, sharding
from harness.architecture import Architecture
from harness.case import PROOFS, Outcome, StageReport
from harness.errors import RankLost
from harness.layout import Layout
from harness.rank import Rank
from harness.rank_model import Job, Outputs, run_rank
from harness.real_ranks import compare_ranks
from harness.recipes import find_recipe
from harness.stages import Run
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import sequence_length

CPU = torch.device("cpu")


def compared(
    small: Architecture,
    text: str,
    recipe: str = "fp8",
    main: Callable[[Run, Job, torch.device], Outputs] = run_rank,
    prove: tuple[str, ...] = (),
) -> Run:
    """What the ranks of a layout did and found, compared with one rank."""
    run, layout = Run(), Layout.parse(text)
    length = sequence_length(small, layout)
    job = Job(small, find_recipe(recipe), layout, Rank(0), torch.bfloat16, length, prove=prove)
    with captured(), installed(CPU, small):
        compare_ranks(run, job, CPU, main)
    return run


def messages(run: Run) -> list[str]:
    return [finding.message for finding in run.findings if finding.is_error]


def stage(run: Run, name: str) -> StageReport:
    (found,) = (stage for stage in run.stages if stage.name == name)
    return found


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
@pytest.mark.parametrize("text", ["tp2", "pp2", "ep2"])
def test_ranks_say_what_one_rank_says(text: str, recipe: str) -> None:
    run = compared(model_of(SPARSE), text, recipe)
    assert not messages(run)
    for name in ("forward", "quantize"):
        assert stage(run, name).outcome is Outcome.PASSED
        difference = float(stage(run, name).detail.rpartition("as tp1 to ")[2])
        assert difference < 1e-9  # float64: no more than the order of sums


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_kind_of_layer_is_split_over_two_ranks(name: str) -> None:
    """Fused matrices part by part, heads, groups and states: equal logits from equal weights."""
    small = model_of(MODELS[name])
    biased = small.moe is not None and small.moe.expert.bias
    run = compared(small, "tp2,etp1" if biased else "tp2")
    assert not messages(run)
    assert stage(run, "forward").detail.count("as tp1 to") == 1


def test_experts_split_by_their_own_tensor_ranks() -> None:
    for text in ("tp2,etp1,ep2", "tp1,etp2"):
        small = model_of(SPARSE)
        run = compared(small, text)
        assert stage(run, "forward").outcome is Outcome.PASSED, messages(run)


@pytest.mark.parametrize(
    ("text", "recipe", "algorithm"),
    [("tp2", "int4_awq", "awq_lite"), ("ep2", "int8_smoothquant", "smoothquant")],
)
def test_scales_chosen_on_each_rank_alone_are_a_warning(text: str, recipe: str, algorithm: str) -> None:
    run = compared(model_of(SPARSE), text, recipe)
    (warning,) = (finding for finding in run.findings if not finding.is_error)
    assert f"{algorithm} chooses its scales on each rank alone" in warning.message
    assert not messages(run)
    assert not compared(model_of(SPARSE), "pp2", recipe).findings


@pytest.mark.parametrize("text", ["tp2", "pp2", "ep2"])
def test_ranks_prove_what_they_are_asked_to(text: str) -> None:
    run = compared(model_of(SPARSE), text, prove=PROOFS)
    assert not messages(run)
    found = {check.name: check for check in stage(run, "quantize").checks}
    assert {"coverage", "sharding", "state", "sharded state", "weights", "backward"} < set(found)
    for name, check in found.items():
        # A gradient would have to cross the stages.
        skipped = (text, name) == ("pp2", "backward")
        assert check.outcome is (Outcome.SKIPPED if skipped else Outcome.PASSED), name
        assert f" of {Layout.parse(text)}: " in check.detail or skipped


# Broken on purpose, in the process of one rank


def other_weights(run: Run, job: Job, device: torch.device) -> Outputs:
    right = rank_model.build_model

    def build(
        small: Architecture, layout: Layout, device: torch.device, dtype: torch.dtype
    ) -> torch.nn.Module:
        model = right(small, layout, device, dtype=dtype)
        if job.rank.number == 1:
            model.get_submodule("decoder.layers.0.self_attention.linear_proj").weight.data.mul_(1.01)
        return model

    rank_model.build_model = build
    return run_rank(run, job, device)


def whole_matrices(run: Run, job: Job, device: torch.device) -> Outputs:
    sharding._parts = lambda layer, name: ()
    return run_rank(run, job, device)


def own_scale(run: Run, job: Job, device: torch.device) -> Outputs:
    """As if ModelOpt had not brought the ranks' amax together."""
    from harness import quantize

    right = quantize.mtq.quantize

    def apart(model: torch.nn.Module, *args: object) -> torch.nn.Module:
        result: torch.nn.Module = right(model, *args)
        quantizer = model.get_submodule("decoder.layers.0.self_attention.linear_qkv.input_quantizer")
        quantizer.amax = quantizer.amax * (1 + job.rank.number / 2)
        return result

    quantize.mtq.quantize = apart
    return run_rank(run, job, device)


def raising(run: Run, job: Job, device: torch.device) -> Outputs:
    from harness import routing

    right = routing.forward

    def forward(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        if job.rank.number == 1:
            raise ValueError("mat1 and mat2 shapes cannot be multiplied")
        return right(model, tokens)

    routing.forward = forward
    return run_rank(run, job, device)


def killed(run: Run, job: Job, device: torch.device) -> Outputs:
    if job.rank.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_rank(run, job, device)


def faulty(run: Run, job: Job, device: torch.device) -> Outputs:
    return Outputs() if job.rank.number else [][0]


def hanging(run: Run, job: Job, device: torch.device) -> Outputs:
    if job.rank.number == 1:
        time.sleep(600)
    return run_rank(run, job, device)


@pytest.mark.parametrize("main", [other_weights, whole_matrices])
def test_other_weights_are_found(main: Callable[[Run, Job, torch.device], Outputs]) -> None:
    run = compared(model_of(DENSE), "tp2", main=main)
    assert stage(run, "forward").outcome is Outcome.FAILED
    found = messages(run)
    assert found[0].startswith("the logits of rank 0 of tp2 differ by ")
    assert found[0].endswith("of their size from those of tp1, expected at most 0.0001")


def test_scales_that_part_are_found() -> None:
    run = compared(model_of(DENSE), "tp2", main=own_scale)
    assert stage(run, "forward").outcome is Outcome.PASSED
    assert stage(run, "quantize").outcome is Outcome.FAILED
    assert any("rank 1 of tp2 differ" in message for message in messages(run))


def test_what_one_rank_raises_is_reported_while_the_other_waits() -> None:
    run = compared(model_of(DENSE), "tp2", main=raising)
    assert [m for m in messages(run) if "mat1 and mat2" in m and m.endswith("(rank 1 of tp2)")]
    assert stage(run, "quantize").outcome is Outcome.SKIPPED


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankLost, match="rank 1 of tp2 was killed by SIGKILL"):
        compared(model_of(DENSE), "tp2", main=killed)


def test_a_fault_of_the_harness_in_a_rank_is_its_own() -> None:
    with pytest.raises(RankLost, match="the harness failed in rank 0 of tp2: IndexError") as lost:
        compared(model_of(DENSE), "tp2", main=faulty)
    assert "faulty" in lost.value.log


def test_where_ranks_hang_is_told_before_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_ranks, "seconds_left", lambda: 15.0)
    began = time.monotonic()
    with pytest.raises(RankLost, match="timed out: ranks 0-1 of tp2 not done") as lost:
        compared(model_of(DENSE), "tp2", main=hanging)
    assert time.monotonic() - began > 13
    waits, hangs = lost.value.log.split("rank 1 of tp2: ")
    assert waits.startswith("rank 0 of tp2: Stack (most recent call last):")
    assert hangs.splitlines()[-1].endswith("in hanging")


def test_the_time_of_a_case_is_known_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_end", None)
    assert processes.seconds_left() is None
    processes.will_end_in(60)
    left = processes.seconds_left()
    assert left is not None
    assert 50 < left <= 60
    processes.will_end_in(None)
    assert processes.seconds_left() is None
