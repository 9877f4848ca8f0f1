"""Quantize: a recipe and a model -> the model with its quantizers calibrated, and what proves that it is.

``mtq.quantize`` inserts quantizers, calibrates them and leaves a model that fakes the formats in every
forward pass. It tells little when it misses something, so every named check in ``harness/proofs`` looks for
itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.calibration import Calibration
from harness.finding import Finding
from harness.layout import Layout
from harness.proofs.blocks import observed, prove_blocks
from harness.proofs.calibration import prove_calibration
from harness.proofs.coverage import prove_coverage
from harness.proofs.effect import prove_effect, prove_shape, relative_error
from harness.proofs.proof import Proof, judged
from harness.proofs.quantizers import check_formats, expected_matrices, quantizers, quantizers_off
from harness.proofs.state import prove_sharding
from harness.rank import Rank
from harness.recipes import Recipe
from harness.roles import role_of
from harness.routing import Pass, forward_along, forward_and_routes
from harness.standins.output import captured, import_foreign
from harness.world import simulated

import_foreign()

import modelopt.torch.quantization as mtq  # noqa: E402

if TYPE_CHECKING:
    from harness.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Quantization:
    """What happened to one model. Errors are relative, of the logits, and None where not measured.

    ``matrices`` are the module paths whose weights the recipe means, ``quantizers`` counts those that are
    on, ``sequences`` those to calibrate with. ``first`` is the pass of the unquantized model, ``output`` what
    the quantized one gives for its tokens along its routes, and ``log`` what ModelOpt said.
    """

    recipe: str
    matrices: tuple[str, ...]
    quantizers: int
    sequences: int
    first: Pass = field(repr=False, compare=False)
    output: torch.Tensor = field(repr=False, compare=False)
    error: float | None
    error_when_off: float | None
    proofs: tuple[Proof, ...]
    log: str = field(repr=False, compare=False)  # modules that are imported on the way warn once a process

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(finding for proof in self.proofs for finding in proof.findings)


def quantize(
    model: nn.Module,
    recipe: Recipe,
    architecture: Architecture,
    device: torch.device,
    seed: int = 1234,
    config: Mapping[str, Any] | None = None,
    length: int | None = None,
    sequences: int | None = None,
    layout: Layout | None = None,
    rank: Rank | None = None,
    first: Pass | None = None,
) -> Quantization:
    """Quantize ``model`` in place, the part of ``rank`` of ``layout``, and prove every part of the result.

    ``config`` is the ModelOpt config to apply, the recipe's own unless given. Calibration runs over so many
    ``sequences`` of ``length`` tokens, where they are given; ranks that are to agree need the same. ``first``
    saves a pass, where it is one of the unquantized model over the first of the same tokens. Where the
    other ranks are simulated, only what does not hang on their numbers is checked: formats, that every
    quantizer saw data, shapes. What ModelOpt raises comes through. Nothing reaches the terminal.
    """
    real, layout, rank = not simulated(), layout or Layout(), rank or Rank(0)
    calibration = Calibration(architecture, device, seed, length, sequences)
    with captured() as log:
        # Calibration sees what is measured: a value beyond the calibrated range would be clipped, and the
        # error would say more about the draw of tokens than about the recipe.
        if first is None or not torch.equal(first.tokens, calibration.first):
            first = forward_and_routes(model, calibration.first)
        calibration.suffice(model, first)
        matrices = expected_matrices(model, recipe)
        applied = without_folders(copy.deepcopy(dict(config)) if config else recipe.to_config())
        mtq.quantize(model, applied, calibration)
        with observed(model) as used:
            after = forward_along(model, first)
        with quantizers_off(model):
            off = forward_along(model, first)
        proofs = [
            _coverage(model, recipe, architecture, layout, rank),
            # Without an algorithm, and for weights alone, ModelOpt need not run the model at all.
            prove_calibration(
                model,
                recipe,
                matrices,
                calibration.seen,
                calibration.tokens.numel(),
                passed_by=[path for path in matrices if path not in used.modules and not _is_routed(path)],
                values=real,
            ),
        ]
        # Hidden states of a pipeline stage have no bound.
        measured = real and bool(model.post_process)
        if measured:
            proofs.append(prove_effect(recipe, architecture, first.output, after, off))
        else:
            proofs.append(prove_shape(first.output, after))
        proofs.append(prove_blocks(model, recipe, architecture, layout, rank, used))
        if layout.world_size > 1:
            proofs.append(prove_sharding(model))
    return Quantization(
        recipe=recipe.name,
        matrices=matrices,
        quantizers=sum(quantizer.is_enabled for _, quantizer in quantizers(model)),
        sequences=len(calibration.tokens),
        first=first,
        output=after,
        error=relative_error(first.output, after) if measured else None,
        error_when_off=relative_error(first.output, off) if measured else None,
        proofs=tuple(proofs),
        log=log.getvalue(),
    )


def _is_routed(path: str) -> bool:
    role = role_of(path)
    return role is not None and role.routed


def _coverage(
    model: nn.Module, recipe: Recipe, architecture: Architecture, layout: Layout, rank: Rank
) -> Proof:
    """That the quantizers which are meant are on, and that each one does what is meant."""
    proof = prove_coverage(model, recipe, architecture, layout, rank)
    unlike = [*check_formats(model, recipe)]
    return judged(proof.name, (*proof.findings, *unlike), proof.detail) if unlike else proof


def without_folders(config: Any) -> Any:
    """A config that writes nothing to disk.

    Algorithms that go layer by layer keep what they have in ``checkpoint_dir``, below the working directory,
    and go on from what they find there, another model's too.
    """
    if isinstance(config, Mapping):
        return {key: without_folders(value) for key, value in config.items() if key != "checkpoint_dir"}
    return [without_folders(value) for value in config] if isinstance(config, list) else config
