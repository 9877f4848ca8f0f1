"""Real ranks: a layout -> one process for each of its ranks, and their logits beside those of one rank.

All ranks hold the weights of one model between them and are given the same tokens, so that what they say
together must be what tp1 says. gloo carries what they send each other on the CPU, NCCL between GPUs, one for
each rank.
"""

from __future__ import annotations

import faulthandler
import io
import math
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

import torch

from harness.errors import RankLost
from harness.finding import Finding, Severity
from harness.host import cores
from harness.layout import Layout
from harness.processes import (
    afresh,
    can_fork_for,
    die_with_parent,
    fork_server,
    how_it_ended,
    pin_threads,
    seconds_left,
)
from harness.rank import Rank, ranks
from harness.rank_model import Job, Outputs, run_rank
from harness.stacks import recent_last
from harness.stages import Run, Stage, ranks_text
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

# The same sums in another order. In float32 they differ by some 1e-7, enough to take a number that stands
# between two of a format to the other side, and with it everything after; in float64 by less than that
# ever meets. Transformer Engine's kernels know no float64.
_DTYPES = {"cpu": torch.float64, "cuda": torch.float32}
LARGEST_DIFFERENCE = 1e-4
# ModelOpt's max calibration brings every amax together over all ranks (model_calib.py). What the others
# choose follows from the losses and maxima of one rank's share of a matrix, or of the experts.
_TOGETHER = "max"
# A rank that stopped leaves the others waiting for it; those that are not, report within this.
_GRACE_SECONDS = 10.0
# Ranks that hang say where, so long before the time of the case is up; or in a tenth of what is left.
_STACKS_SECONDS = 3.0
_A_STACK_SECONDS = 1.0

RankMain = Callable[[Run, Job, torch.device], Outputs]


@dataclass(slots=True)
class _Answer:
    """What one rank sends back; ``fault`` is the traceback of an exception of the harness's own."""

    run: Run
    outputs: Outputs
    fault: str = ""


def compare_ranks(run: Run, job: Job, device: torch.device, main: RankMain = run_rank) -> str:
    """Run ``job`` on one rank, then on every rank of its layout, and compare; returns ModelOpt's log.

    What is found goes to ``run``. ``main`` is what a rank does, importable by name. Call it inside
    ``standins.installed``. Raises RankLost where a rank's process died or hangs.
    """
    alone, one = run.part(), replace(job, layout=Layout(), rank=Rank(0), dtype=_DTYPES[device.type])
    with open_world(one.layout, device):
        reference = run_rank(alone, one, device)
    run.add({0: alone}, one.layout)
    if not run.can("quantize"):
        return reference.log
    job = replace(one, layout=job.layout, sequences=reference.sequences)
    answers = _every_rank(job, run.part(), device, main)
    run.add({number: answer.run for number, answer in answers.items()}, job.layout, at_once=True)
    outputs = {number: answers[number].outputs for number in sorted(answers)}
    logits = {number: each.logits for number, each in outputs.items() if each.logits is not None}
    quantized = {number: each.quantized for number, each in outputs.items() if each.quantized is not None}
    if not run.can("quantize"):
        return _logs(reference, outputs)
    with run.stage("forward") as stage:
        stage.detail = f"as tp1 to {_compare(stage, reference.logits, logits, job.layout):.1g}"
    with run.stage("quantize") as stage:
        difference = _compare(stage, reference.quantized, quantized, job.layout)
        stage.detail = f"as tp1 to {difference:.1g}"
        if stage.findings and job.recipe.algorithm != _TOGETHER and difference < math.inf:
            stage.findings[:] = [_chosen_alone(job, difference)]
    return _logs(reference, outputs)


def _chosen_alone(job: Job, difference: float) -> Finding:
    message = (
        f"ModelOpt's {job.recipe.algorithm} chooses its scales on each rank alone: the quantized logits of "
        f"{job.layout} differ by {difference:.2g} of their size from those of tp1"
    )
    return Finding("quantize", Severity.WARNING, message, expected="the scales of tp1", actual=difference)


def _logs(reference: Outputs, outputs: Mapping[int, Outputs]) -> str:
    return reference.log + "".join(each.log for each in outputs.values())


def _compare(
    stage: Stage, wanted: torch.Tensor | None, found: Mapping[int, torch.Tensor], layout: Layout
) -> float:
    """The largest difference of a rank's logits from those of tp1, in numbers; findings where it is large."""
    assert wanted is not None
    differences = {number: _difference(wanted.cpu(), logits) for number, logits in found.items()}
    if not found:
        stage.findings.append(Finding(stage.name, Severity.ERROR, f"no rank of {layout} gave logits"))
    for number, difference in differences.items():
        if difference <= LARGEST_DIFFERENCE:
            continue
        message = (
            f"the logits of {ranks_text([number], layout)} differ by {difference:.2g} of their size from "
            f"those of tp1, expected at most {LARGEST_DIFFERENCE:g}"
        )
        expected = f"<= {LARGEST_DIFFERENCE:g}"
        stage.findings.append(
            Finding(stage.name, Severity.ERROR, message, expected=expected, actual=difference)
        )
    return max(differences.values(), default=math.inf)


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """|found - wanted| / |wanted|; infinite where the shapes differ or a number is none."""
    if wanted.shape != found.shape:
        return math.inf
    difference = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return difference if math.isfinite(difference) else math.inf


# ---- the processes ----


def _every_rank(job: Job, part: Run, device: torch.device, main: RankMain) -> dict[int, _Answer]:
    """What each rank of the layout says, by number; without those that waited for one that stopped."""
    context, own = fork_server() if can_fork_for(device.type) else afresh(), ranks(job.layout)
    # What this process may use, where it has a share, is each rank's already.
    threads = min(torch.get_num_threads(), max(1, cores() // len(own)))
    with tempfile.TemporaryDirectory(prefix="harness-") as folder, _ended() as processes:
        pipes: dict[int, Connection] = {}
        for rank in own:
            pipes[rank.number], theirs = context.Pipe(duplex=False)
            task = (theirs, replace(job, rank=rank), part, device, Path(folder, "meeting"), threads, main)
            process = context.Process(target=_work, args=task, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
        return _gather(pipes, processes, job.layout, Path(folder))


@contextmanager
def _ended() -> Iterator[list[BaseProcess]]:
    """A list of processes, none of which is left at the end."""
    processes: list[BaseProcess] = []
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _gather(
    pipes: Mapping[int, Connection], processes: Sequence[BaseProcess], layout: Layout, folder: Path
) -> dict[int, _Answer]:
    answers: dict[int, _Answer] = {}
    stopped: float | None = None
    left = seconds_left()
    end = math.inf if left is None else monotonic() + left - min(_STACKS_SECONDS, left / 10)
    while len(answers) < len(pipes):
        waiting = {pipe: number for number, pipe in pipes.items() if number not in answers}
        deadline = min(end, end if stopped is None else stopped + _GRACE_SECONDS)
        ready = wait(list(waiting), None if deadline == math.inf else max(0.0, deadline - monotonic()))
        if not ready and stopped is None:
            raise _hung({number: processes[number] for number in waiting.values()}, layout, folder)
        if not ready:
            break
        for pipe in ready:
            number = waiting[pipe]  # type: ignore[index]
            answers[number] = _received(pipes[number], processes[number], ranks_text([number], layout))
            if answers[number].run.blocked and stopped is None:
                stopped = monotonic()
    return answers


def _hung(late: Mapping[int, BaseProcess], layout: Layout, folder: Path) -> RankLost:
    """Where each of these ranks stands; those last that stand where the fewest do."""
    for process in late.values():
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    end = monotonic() + _A_STACK_SECONDS
    while not all(stacks := {number: _stack(folder, number) for number in late}.values()):
        if monotonic() > end:
            break
        sleep(0.05)
    numbers: dict[str, list[int]] = {}
    for number, stack in zip(late, stacks, strict=True):
        numbers.setdefault(stack or "stands nowhere that could be told\n", []).append(number)
    most_first = sorted(numbers.items(), key=lambda entry: -len(entry[1]))
    log = "".join(f"{ranks_text(alike, layout)}: {stack}" for stack, alike in most_first)
    return RankLost(f"timed out: {ranks_text([*late], layout)} not done", log)


def _stack(folder: Path, number: int) -> str:
    """What a rank wrote of where it stands; empty as long as it did not."""
    file = _stack_file(folder, number)
    return recent_last(file.read_text(encoding="utf-8")) if file.is_file() else ""


def _stack_file(folder: Path, number: int) -> Path:
    return folder / f"stack-{number}"


def _received(pipe: Connection, process: BaseProcess, name: str) -> _Answer:
    try:
        sent = io.BytesIO(pipe.recv_bytes())
    except (EOFError, OSError):
        process.join(1)  # its exit code comes a moment after its pipe has closed
        raise RankLost(how_it_ended(process.exitcode, name)) from None
    # Our own process wrote it.
    answer: _Answer = torch.load(sent, weights_only=False)
    if answer.fault:
        raise RankLost(f"the harness failed in {name}: {answer.fault.splitlines()[-1]}", answer.fault)
    return answer


# ---- a rank's side ----


def _work(
    pipe: Connection,
    job: Job,
    run: Run,
    device: torch.device,
    meeting: Path,
    threads: int,
    main: RankMain,
) -> None:
    """Run one rank and send what came of it; then wait to be ended.

    The world stays open: a rank that stopped early and left it would be what the others report.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stack = _stack_file(meeting.parent, job.rank.number).open("w", encoding="utf-8")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    pin_threads(threads)
    # gloo would look for an address of this machine's name, which need not have one.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device.type == "cuda":
        device = torch.device("cuda", job.rank.number)
    try:
        world = open_world(job.layout, device, rank=job.rank, meeting=meeting)
        with captured() as log, installed(device, job.small), world:
            outputs = main(run, job, device)
            outputs.log = log.getvalue() + outputs.log
            _send(pipe, _Answer(run, outputs))
            signal.pause()
    except Exception:
        _send(pipe, _Answer(run, Outputs(), traceback.format_exc()))


def _send(pipe: Connection, answer: _Answer) -> None:
    """As bytes: a tensor in a pipe would stay in the memory of its process."""
    outputs, buffer = answer.outputs, io.BytesIO()
    outputs.logits = None if outputs.logits is None else outputs.logits.cpu()
    outputs.quantized = None if outputs.quantized is None else outputs.quantized.cpu()
    torch.save(answer, buffer)
    pipe.send_bytes(buffer.getvalue())
