"""Small model: the stages that shrink a model, build it, run it and quantize it.

On one rank everything is checked. Of a layout of more ranks the first rank of each pipeline stage is
simulated, and only what does not hang on the other ranks' numbers is: shapes, formats, what ran.
torch is imported where a stage needs it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from harness.activations import activations
from harness.architecture import Architecture
from harness.case import STAGES, Case, StandInReport
from harness.errors import UnsupportedModel
from harness.finding import Finding, Severity
from harness.inventory import counts
from harness.layout import Layout
from harness.rank import Rank, UnevenStages, rank_of, stages_of
from harness.recipes import Recipe
from harness.sharding import rank_parameters
from harness.shrink import NoPlan, ShrinkPlan, shrink
from harness.stages import Run

if TYPE_CHECKING:
    import torch

# What a stage says of a rank whose numbers mean nothing.
SHAPES_ONLY = "simulated rank: shapes only"

# Parameters of a plan per rank: a preset is untrusted, and one with an absurd size must not eat the
# machine. The plans of published models have less than a tenth of it.
MOST_PARAMETERS = 1 << 30


def shrink_stage(run: Run, full: Architecture | None, layout: Layout) -> ShrinkPlan | None:
    """The plan for this layout, None where there is none to be had or a stage before failed."""
    plan = None
    if run.can("shrink"):
        with run.stage("shrink") as stage:
            assert full is not None
            try:
                # Uneven stages have layers by the dozen; ``layout_of_plan`` finds some for the plan's few.
                plan = shrink(full, replace(layout, first=None, last=None))
            except NoPlan as error:
                stage.findings.append(Finding("shrink", Severity.ERROR, str(error)))
                stage.usable = False
                return None
            total, most = counts(plan.after).total, MOST_PARAMETERS * layout.world_size
            if total > most:
                message = f"the smallest plan has {total:,} parameters, more than {most:,}: "
                message += "some size is out of proportion to the others"
                stage.findings.append(Finding("shrink", Severity.ERROR, message))
                stage.usable = False
                return None
            stage.detail = f"{total:,} parameters, S1 to S12 kept"
    return plan


def layout_of_plan(plan: ShrinkPlan, layout: Layout) -> Layout:
    """``layout`` with stage sizes that the fewer layers of the plan have.

    An uneven first or last stage holds about the same share of the layers as it was asked to.
    """
    layers = plan.after.num_layers

    def choices(size: int | None) -> list[int | None]:
        if size is None:
            return [None]
        share = size / plan.before.num_layers * layers
        nearest_first: list[int] = sorted(range(1, layers + 1), key=lambda count: abs(count - share))
        return [*nearest_first]

    for first, last in product(choices(layout.first), choices(layout.last)):
        candidate = replace(layout, first=first, last=last)
        try:
            stages_of(plan.after, candidate)
        except UnevenStages:
            continue
        return candidate
    return layout


def first_ranks(layout: Layout) -> tuple[Rank, ...]:
    """The first rank of each pipeline stage."""
    per_stage = layout.world_size // layout.pp
    return tuple(rank_of(layout, stage * per_stage) for stage in range(layout.pp))


class SmallModel:
    """config, shrink, build, forward and quantize of one case."""

    def __init__(self, run: Run, case: Case, recipe: Recipe, full: Architecture | None) -> None:
        self.run, self.case, self.recipe, self.full = run, case, recipe, full
        self.plan: ShrinkPlan | None = None
        self.stand_ins: tuple[StandInReport, ...] = ()
        self.log = ""
        self.quantize_log = ""

    def run_stages(self) -> None:
        if self.full is None or "audit" in self.run.blocked:
            for name in STAGES[STAGES.index("config") :]:
                self.run.can(name)
            return
        from harness.devices import torch_device
        from harness.standins import installed
        from harness.standins.output import captured

        device = torch_device(self.case.device)
        with captured() as log, installed(device, self.full) as stand_ins:
            self.stand_ins = stand_ins
            try:
                self._config(device)
                self.plan = shrink_stage(self.run, self.full, self.case.layout)
                self._in_world(device)
            finally:
                self.log = log.getvalue() + self.quantize_log

    def _config(self, device: torch.device) -> None:
        from harness.build import transformer_config

        with self.run.stage("config") as stage:
            assert self.full is not None
            arguments = self.full.arguments
            try:
                with stage.foreign():
                    transformer_config(arguments.values, self.case.layout, device)
            except UnsupportedModel as error:
                stage.findings.append(arguments.finding(error.dest, str(error), stage="config"))
                stage.usable = False
            if stage.usable:
                stage.detail = "Megatron accepts the full size"

    def _in_world(self, device: torch.device) -> None:
        if self.plan is None or "config" in self.run.blocked:
            for name in ("build", "forward", "quantize"):
                self.run.can(name)
            return
        from harness.world import SIMULATED_RANKS, open_world

        small = self.plan.after
        layout = layout_of_plan(self.plan, self.case.layout)
        if layout.world_size == 1:
            with open_world(layout, device):
                self._build(self.run, device, small, layout, Rank(0))
            return
        self.stand_ins = (*self.stand_ins, SIMULATED_RANKS)
        for rank in first_ranks(layout):
            part = self.run.part()
            try:
                with open_world(layout, device, rank=rank):
                    self._build(part, device, small, layout, rank)
            finally:
                self.run.add(part, f"rank {rank.number} of {layout}")

    def _build(self, run: Run, device: torch.device, small: Architecture, layout: Layout, rank: Rank) -> None:
        from harness.build import build_model, compare_parameters, parameter_shapes, refused
        from harness.world import receiving

        model: Any = None
        with run.stage("build") as stage:
            expected = rank_parameters(small, layout, rank)
            with stage.foreign():
                model = build_model(small, layout, device)
            stage.findings.extend(refused(small, layout, device))
            if stage.usable:
                stage.findings.extend(compare_parameters(expected, parameter_shapes(model)))
                stage.detail = f"{len(expected)} parameters as in the inventory"
        with receiving(layout):
            if run.can("forward"):
                self._forward(run, device, small, layout, rank, model)
            if run.can("quantize"):
                self._quantize(run, device, small, layout, model)

    def _forward(
        self, run: Run, device: torch.device, small: Architecture, layout: Layout, rank: Rank, model: Any
    ) -> None:
        from harness import trace

        length, batch = trace.sequence_length(small, layout), trace.BATCH_SIZE
        tokens = trace.token_ids(small.padded_vocab_size, batch, length, device)
        with run.stage("forward") as stage:
            expected = activations(small, sequence_length=length, batch_size=batch, layout=layout, rank=rank)
            with stage.foreign(), trace.recording(model) as recorder:
                output = trace.forward(model, tokens)
            # Where the pass raised, the trace up to there says first which shapes parted.
            stage.findings[:0] = trace.compare_trace(expected, recorder.trace())
            if not stage.usable:
                return
            stage.detail = f"{len(expected)} modules as planned, "
            if layout.world_size == 1:
                stage.findings.extend(trace.check_logits(output, tokens, small.padded_vocab_size))
                stage.detail += "logits finite"
                return
            if rank.pp == layout.pp - 1:
                logits = (batch, length, small.padded_vocab_size)
                stage.findings.extend(trace.check_shape(output, logits, "logits"))
            else:
                states = (length // layout.tp, batch, small.hidden_size)
                stage.findings.extend(trace.check_shape(output, states, "hidden states"))
            stage.detail += SHAPES_ONLY

    def _quantize(
        self, run: Run, device: torch.device, small: Architecture, layout: Layout, model: Any
    ) -> None:
        from harness.quantize import quantize

        with run.stage("quantize") as stage:
            result = None
            with stage.foreign():
                result = quantize(model, self.recipe, small, device, layout=layout)
            if result is not None:
                stage.findings.extend(result.findings)
                error = "no error measured" if result.error is None else f"relative error {result.error:.3g}"
                if layout.world_size > 1:
                    error = SHAPES_ONLY
                stage.detail = f"{len(result.matrices)} matrices, {result.quantizers} quantizers, {error}"
                self.quantize_log += result.log
