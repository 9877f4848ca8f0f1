"""Exporting: a plan, its Hugging Face twin and a recipe -> the tiny model quantized, exported by ModelOpt and
read back, and where the checkpoint is not what the recipe and the published names say.

The model is in bf16 and its export as in production (Megatron-LM's ``examples/post_training/modelopt``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.build import build_model
from harness.finding import Finding
from harness.layout import Layout
from harness.layout_rules import Owner
from harness.parity import checkpoint as published
from harness.parity.expected import counterparts, expected, published_shapes
from harness.parity.exported import check_numbers, check_tensors, read
from harness.parity.quantization_config import check_config
from harness.parity.stored import Kind, NotKnown
from harness.quantize import quantize
from harness.stages import Raised
from harness.standins.output import captured
from harness.world import open_world

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.parity.expected import Expected
    from harness.parity.twin import Twin
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


@dataclass(frozen=True, slots=True)
class _Known:
    """A difference that ModelOpt's exporter makes whatever the preset, by its place in the exporter."""

    applies: Callable[[Finding, list[Expected]], bool]
    words: str


def _kinds(expecteds: list[Expected]) -> set[Kind]:
    return {one.weight.kind for one in expecteds if one.weight is not None}


# The kinds whose config ``GPTModelExporter.save_pretrained`` writes.
_SAID = {Kind.FP8, Kind.NVFP4, Kind.NVFP4_WEIGHTS}
_KNOWN = (
    _Known(
        lambda finding, expecteds: (
            finding.message.partition("  ")[0].endswith("pre_quant_scale") and finding.actual is None
        ),
        "the exporter leaves out pre_quant_scale, the scale per input channel that calibration moved into the "
        "weights, and without a word where inputs are not quantized (_get_quantized_state in "
        "unified_export_megatron.py): what is exported gives other outputs",
    ),
    _Known(
        lambda finding, expecteds: (
            finding.message.startswith("hf_quant_config.json  is missing") and not _kinds(expecteds) & _SAID
        ),
        "the exporter writes no quantization config for this format (save_pretrained in "
        "unified_export_megatron.py knows FP8 and NVFP4 alone): no reader can tell that weights are packed",
    ),
)


def export_round_trip(
    plan: ShrinkPlan, twin: Twin, recipe: Recipe, device: torch.device, folder: Path | None = None
) -> Exported:
    """Quantize the plan's small model, export it, and compare what was written.

    ``folder`` is the twin's checkpoint, where it is saved already. Call it inside ``standins.installed`` and
    outside any world.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "published"
            folder.mkdir()
            published.save(published.build(twin), twin, folder)
        # A model must be gone before its world is closed.
        with open_world(Layout(), device):
            return _round_trip(plan.after, twin.architecture, recipe, device, folder, Path(scratch) / "out")


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
    quantize(model, recipe, small, device)
    target.mkdir()
    try:
        with captured():
            export_mcore_gpt_to_hf(
                model,
                str(source),
                dtype=_DTYPE,
                export_dir=str(target),
                moe_router_dtype=model.config.moe_router_dtype,  # type: ignore[arg-type]
            )
    except Exception as error:
        return Exported((), Raised.of(error).text, "the exporter raised")
    return judged(target, expecteds, model)


def judged(folder: Path, expecteds: list[Expected], model: Any) -> Exported:
    """Findings and limits of the checkpoint in ``folder``, exported from ``model``."""
    checkpoint = read(folder)
    findings = [
        *check_tensors(checkpoint, expecteds),
        *check_numbers(checkpoint, expecteds, model),
        *check_config(checkpoint, expecteds),
    ]
    limits: list[str] = []
    left = []
    for finding in findings:
        known = next((one for one in _KNOWN if one.applies(finding, expecteds)), None)
        if known is None:
            left.append(finding)
        elif known.words not in limits:
            limits.append(known.words)
    quantized = sum(one.weight is not None for one in expecteds)
    limit = f"{Owner.MODELOPT}: {'; '.join(limits)}" if limits else ""
    detail = f"{len(checkpoint.tensors)} tensors exported, {quantized} weights quantized"
    return Exported(tuple(left), limit, detail)
