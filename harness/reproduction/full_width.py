"""Full width: a plan -> the same few layers with the real sizes, where they fit in memory.

A plan keeps ratios and divisibility, so what fails on the tiny model fails here too; but the numbers in
every shape are those of the real one, which is what the words of an exception and a checkpoint speak of.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from harness.architecture import PER_LAYER, Architecture, architecture
from harness.errors import UsageError
from harness.host import free_memory
from harness.layout import Layout
from harness.rank import Rank
from harness.sharding import rank_parameters
from harness.shrink import ShrinkPlan

# What says how many layers there are and of which kind; everything else stays as the preset has it.
LAYERS = ("num_layers", "hybrid_layer_pattern", *PER_LAYER)
# The fewer experts of the plan, in the real ratio.
EXPERTS = ("num_experts", "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk")

_BF16_BYTES, _FLOAT32_BYTES = 2, 4
# A parameter is drawn in float32 and scaled into a second tensor before it is copied to its place.
_DRAWN = 2
# Activations of some hundred tokens, ModelOpt's copy of a weight while it is quantized, and what torch keeps.
_BESIDE_BYTES = 1 << 30


def widened(plan: ShrinkPlan) -> ShrinkPlan:
    """The plan's layers at the real width, every expert among them."""
    return _with(plan, LAYERS)


def with_fewer_experts(plan: ShrinkPlan) -> ShrinkPlan:
    """The plan's layers at the real width, and of the experts as many as the plan has."""
    return _with(plan, (*LAYERS, *EXPERTS))


def _with(plan: ShrinkPlan, dests: tuple[str, ...]) -> ShrinkPlan:
    arguments, small = plan.before.arguments, plan.after.arguments
    return replace(plan, after=architecture(arguments.replaced({dest: small[dest] for dest in dests})))


def bytes_needed(wide: Architecture, layout: Layout) -> int:
    """Bytes that the first rank's part of the model takes in bf16 while it is filled, run and quantized."""
    shapes = rank_parameters(wide, layout, Rank(0))
    largest = max(map(prod, shapes.values()), default=0) * layout.tp
    numbers = sum(map(prod, shapes.values()))
    return _BF16_BYTES * numbers + _DRAWN * _FLOAT32_BYTES * largest + _BESIDE_BYTES


def fitting(plan: ShrinkPlan, layout: Layout, device: str) -> tuple[ShrinkPlan, str]:
    """The plan at the real width, and a line on it. Raises UsageError where it does not fit in memory."""
    free = _free(device)
    for attempt in (widened, with_fewer_experts):
        wide = attempt(plan)
        needed = bytes_needed(wide.after, layout)
        if needed <= free:
            return wide, _said(wide, needed)
    raise UsageError(
        f"--full-width: {_said(wide, needed)}, and {_gib(free)} are free on {device}; "
        "leave it out, or choose a layout that splits the model over more ranks"
    )


def _free(device: str) -> int:
    if not device.startswith("cuda"):
        return free_memory()
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def _said(wide: ShrinkPlan, needed: int) -> str:
    layers, full = wide.after.num_layers, wide.before.num_layers
    text = f"{layers} of {full} layers at full width need {_gib(needed)}"
    experts, all_experts = wide.after.arguments["num_experts"], wide.before.arguments["num_experts"]
    return text if experts == all_experts else f"{text}, with {experts} of {all_experts} experts"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
