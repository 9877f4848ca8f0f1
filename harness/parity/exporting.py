"""Exporting: a plan, its Hugging Face twin and a recipe -> the tiny model quantized, exported by ModelOpt and
read back, and where the checkpoint is not what the recipe and the published names say.

The model is in bf16 and its export as in production (Megatron-LM's ``examples/post_training/modelopt``).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.build import build_model
from harness.calibration import Calibration
from harness.errors import is_no_verdict
from harness.finding import Finding
from harness.layout import Layout
from harness.layout_rules import Owner
from harness.parity import checkpoint as published
from harness.parity.expected import counterparts, expected, published_shapes
from harness.parity.exported import check_numbers, check_tensors, read
from harness.parity.exporter_limits import divided
from harness.parity.quantization_config import check_config, check_sizes
from harness.parity.stored import NotKnown
from harness.parity.twin import NoTwin, Twin, twin
from harness.quantize import without_folders
from harness.routing import forward_and_routes
from harness.stages import Raised
from harness.standins.output import captured
from harness.world import open_world

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.facts import Facts
    from harness.parity.expected import Expected
    from harness.recipes import Recipe
    from harness.shrink import ShrinkPlan

_DTYPE = torch.bfloat16
_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class Exported:
    """What came of it. ``limit`` says what ModelOpt cannot export, or does wrong for every model, and why;
    empty where nothing is so. ``detail`` is a line on what was compared."""

    findings: tuple[Finding, ...]
    limit: str
    detail: str


def export_of(plan: ShrinkPlan, facts: Facts, recipe: Recipe, device: torch.device) -> Exported:
    """``export_round_trip`` with the twin that ``facts`` make; a limit where they make none."""
    try:
        return export_round_trip(plan, twin(facts, plan), recipe, device)
    except NoTwin as error:
        return Exported((), f"no small Hugging Face model: {error}", "nothing exported")


def export_round_trip(
    plan: ShrinkPlan, small: Twin, recipe: Recipe, device: torch.device, folder: Path | None = None
) -> Exported:
    """Quantize the plan's small model, export it, and compare what was written.

    ``folder`` is the twin's checkpoint, where it is saved already. Call it inside ``standins.installed`` and
    outside any world.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "published"
            folder.mkdir()
            published.save(published.build(small), small, folder)
        # A model must be gone before its world is closed.
        with open_world(Layout(), device):
            return _round_trip(plan.after, small.architecture, recipe, device, folder, Path(scratch) / "out")


def _round_trip(
    small: Architecture, name: str, recipe: Recipe, device: torch.device, source: Path, target: Path
) -> Exported:
    from modelopt.torch.export import export_mcore_gpt_to_hf
    from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_export_mapping

    if name not in all_mcore_hf_export_mapping:
        return Exported((), f"{Owner.MODELOPT}: the exporter has no rules for {name}", "nothing exported")
    model = build_model(small, Layout(), device, dtype=_DTYPE)
    shapes = published_shapes(source)
    found, findings = counterparts(shapes, small, model)
    if findings:
        # The exporter would stop at, or leave out, what one side does not have.
        return Exported(tuple(findings), "", f"{len(found)} of {len(shapes)} tensors have a place")
    router = _ROUTER_DTYPES.get(str(model.config.moe_router_dtype), _DTYPE)
    try:
        expecteds = expected(found, shapes, recipe, _DTYPE, router)
    except NotKnown as error:
        return Exported((), f"harness: how {error} is stored is not known here", "nothing exported")
    target.mkdir()
    try:
        with captured():
            _quantize(model, recipe, small, device)
            export_mcore_gpt_to_hf(
                model,
                str(source),
                dtype=_DTYPE,
                export_dir=str(target),
                moe_router_dtype=model.config.moe_router_dtype,
            )
    except Exception as error:
        raised = Raised.of(error)
        if raised.owner is None or is_no_verdict(error):
            raise
        words = raised.text.replace(str(source), "the published checkpoint")
        return Exported((), words.replace(str(target), "the exported one"), "nothing exported")
    return judged(source, target, expecteds, model, small)


def _quantize(model: Any, recipe: Recipe, small: Architecture, device: torch.device) -> None:
    """As the quantize stage does it, which proves more than an export needs."""
    import modelopt.torch.quantization as mtq

    calibration = Calibration(small, device)
    calibration.suffice(model, forward_and_routes(model, calibration.first))
    mtq.quantize(model, without_folders(recipe.to_config()), calibration)


def judged(
    source: Path, target: Path, expecteds: list[Expected], model: Any, small: Architecture
) -> Exported:
    """Findings and limits of the checkpoint in ``target``, exported from ``model``, that of
    ``small``; ``source`` is the published one."""
    checkpoint = read(target)
    findings = [
        *check_tensors(checkpoint, expecteds),
        *check_numbers(checkpoint, expecteds, model),
        *check_config(checkpoint, expecteds),
        *check_sizes(source, target),
    ]
    left, limit = divided(findings, expecteds, small)
    quantized = sum(one.weight is not None for one in expecteds)
    detail = f"{len(checkpoint.tensors)} tensors exported, {quantized} weights quantized"
    return Exported(left, limit, detail)
