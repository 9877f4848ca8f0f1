"""Small model: the stages that shrink a model, build it, run it and quantize it, or compare it.

On one rank everything is checked. Of a layout of more ranks those that the case names are simulated, one
after the other, or all are run at once, each in a process of its own (``real_ranks.py``). torch is imported
where a stage needs it.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING

from harness.architecture import Architecture
from harness.case import COVERAGE, EXPORT, PARITY, REAL, Case, Check, Outcome, StandInReport
from harness.errors import UnsupportedModel, UsageError
from harness.finding import Finding, Severity, has_errors
from harness.inventory import counts
from harness.layout import Layout
from harness.rank import Rank, UnevenStages, ranks_named, stages_of
from harness.recipes import Recipe
from harness.shrink import NoPlan, ShrinkPlan, shrink
from harness.stages import Run

if TYPE_CHECKING:
    import torch

    from harness.facts import Facts

# Parameters of a plan per rank: a preset is untrusted, and one with an absurd size must not eat the
# machine. The plans of published models have less than a tenth of it.
MOST_PARAMETERS = 1 << 30

# For a user who has the package, and for one who has its source tree.
INSTALL_PARITY = "pip install 'preset-harness[parity]', or uv sync --extra parity"


def shrink_stage(run: Run, full: Architecture | None, layout: Layout) -> ShrinkPlan | None:
    """The plan for this layout, None where there is none to be had or a stage before failed."""
    plan = None
    if run.can("shrink"):
        with run.stage("shrink") as stage:
            assert full is not None
            try:
                # Uneven stages have layers by the dozen; ``layout_of_plan`` finds some for the plan's few,
                # of which there must be more than stages.
                more = int(bool(layout.first or layout.last) and layout.pp < full.num_layers)
                plan = shrink(full, replace(layout, first=None, last=None, pp=layout.pp + more))
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

    An uneven first or last stage stays uneven where it can, and holds about the share that was asked of it.
    """
    layers = plan.after.num_layers

    def choices(size: int | None) -> list[int | None]:
        if size is None:
            return [None]
        share = size / plan.before.num_layers * layers
        nearest_first: list[int] = sorted(
            range(1, layers + 1), key=lambda count: (count * layout.pp == layers, abs(count - share))
        )
        return [*nearest_first]

    for first, last in product(choices(layout.first), choices(layout.last)):
        candidate = replace(layout, first=first, last=last)
        try:
            stages_of(plan.after, candidate)
        except UnevenStages:
            continue
        return candidate
    return layout


class SmallModel:
    """config, shrink, and build, forward and quantize of one case, or parity.

    ``recipe`` is None for parity. ``limit`` says whose limit it is that the model cannot be quantized or
    compared, ``skipped`` why it was not compared; each is empty where it is none.
    """

    def __init__(
        self,
        run: Run,
        case: Case,
        recipe: Recipe | None,
        full: Architecture | None,
        facts: Facts | None = None,
        full_width: bool = False,
    ) -> None:
        self.run, self.case, self.recipe, self.full, self.facts = run, case, recipe, full, facts
        self.full_width = full_width
        self.plan: ShrinkPlan | None = None
        self.stand_ins: tuple[StandInReport, ...] = ()
        self.limit = self.skipped = ""
        self.log = ""
        self.quantize_log = ""

    def run_stages(self) -> None:
        if self.full is None or "audit" in self.run.blocked:
            self._can_not("config")
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
                if self.full_width and self.plan is not None:
                    self.plan = self._widened(self.plan)
                if self.recipe is None:
                    self._parity(device)
                    return
                self._in_world(self.recipe, device)
                self._ask_control(self.recipe, device)
                if EXPORT in self.case.prove:
                    self._export(self.recipe, device)
                # A recipe of ModelOpt's that cannot name in Megatron's model what it means is not applied.
                self.limit = self.limit or self.run.limits.get(COVERAGE, "")
            finally:
                self.log = log.getvalue() + self.quantize_log

    def _can_not(self, first: str) -> None:
        """Report the stages from ``first`` on as skipped."""
        stages = self.case.stages
        for name in stages[stages.index(first) :]:
            self.run.can(name)

    def _widened(self, plan: ShrinkPlan) -> ShrinkPlan:
        """The plan with the real sizes in its few layers. Raises UsageError where they do not fit."""
        from harness.reproduction.full_width import fitting

        if self.recipe is None:
            raise UsageError("--full-width: parity compares models of the plan's sizes, and no others")
        wide, said = fitting(plan, layout_of_plan(plan, self.case.layout), self.case.device)
        with self.run.stage("shrink") as stage:
            stage.detail = said
        return wide

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

    def _parity(self, device: torch.device) -> None:
        if self.plan is None or "config" in self.run.blocked:
            self._can_not(PARITY)
            return
        self.skipped = self._why_not_compared()
        if self.facts is None or self.skipped:
            self.run.skip(PARITY, self.skipped)
            return
        from harness.parity.stage import prove_parity

        with self.run.stage(PARITY) as stage:
            parity = prove_parity(self.plan, self.facts, device)
            stage.findings.extend(parity.findings)
            stage.detail, stage.limit = parity.limit or parity.detail, parity.limit
        self.limit = parity.limit

    def _why_not_compared(self) -> str:
        if self.facts is None:
            return "nothing published is there to compare with"
        if find_spec("transformers") is None:
            return f"transformers is not installed: {INSTALL_PARITY}"
        return ""

    def _export(self, recipe: Recipe, device: torch.device) -> None:
        """The proof that was asked for, of a model of its own: the one that was proved may be packed."""
        reason = self._why_not_compared()
        if self.plan is None or self.run.blocked or has_errors(self.run.findings):
            reason = "the model is not quantized as it should be"
        elif self.case.layout.world_size > 1:
            reason = "an export is made on one rank"
        with self.run.stage(PARITY) as stage:
            if self.plan is None or self.facts is None or reason:
                stage.checks.append(Check(EXPORT, Outcome.SKIPPED, reason))
                return
            from harness.parity.exporting import export_of

            exported = export_of(self.plan, self.facts, recipe, device)
            stage.findings.extend(replace(finding, check=EXPORT) for finding in exported.findings)
            outcome = Outcome.UNSUPPORTED if exported.limit else Outcome.PASSED
            outcome = Outcome.FAILED if has_errors(exported.findings) else outcome
            stage.checks.append(Check(EXPORT, outcome, exported.limit or exported.detail))

    def _in_world(self, recipe: Recipe, device: torch.device) -> None:
        if self.plan is None or "config" in self.run.blocked:
            self._can_not("build")
            return
        import torch

        from harness.rank_model import Job, run_rank
        from harness.trace import sequence_length
        from harness.world import SIMULATED_RANKS, open_world

        small, layout = self.plan.after, layout_of_plan(self.plan, self.case.layout)
        length = sequence_length(small, layout)
        proofs = tuple(name for name in self.case.prove if name != EXPORT)
        job = Job(small, recipe, layout, Rank(0), torch.bfloat16, length, prove=proofs)
        if self.case.ranks == REAL and layout.world_size > 1:
            from harness.real_ranks import compare_ranks

            self.quantize_log = compare_ranks(self.run, job, device)
            return
        if layout.world_size == 1:
            with open_world(layout, device):
                self.quantize_log = run_rank(self.run, job, device).log
            return
        self.stand_ins = (*self.stand_ins, SIMULATED_RANKS)
        parts: dict[int, Run] = {}
        try:
            for rank in ranks_named(self.case.ranks, layout):
                parts[rank.number] = part = self.run.part()
                with open_world(layout, device, rank=rank):
                    outputs = run_rank(part, replace(job, rank=rank), device)
                self.quantize_log += outputs.log
        finally:
            self.run.add(parts, layout)

    def _ask_control(self, recipe: Recipe, device: torch.device) -> None:
        """Where ModelOpt raised: whether that is its limit, so that no preset is at fault."""
        raised = self.run.raised.get("quantize")
        if self.plan is None or raised is None or raised.owner is None or raised.on_gpu:
            return
        from harness.control import ask

        answer = ask(self.plan.after, recipe, device, raised)
        if answer.same:
            self.limit = "\n".join(filter(None, (f"{raised.text}; {answer.text}", raised.rest)))
            self.run.unsupported("quantize")
