"""Blocks: a quantized model's forward pass -> the blocks each quantizer used, what was padded, and the audit.

Watched where ModelOpt does it: a quantizer with static blocks keeps the shape that it reshaped to and the
zeros that it added; one with dynamic blocks hands its tensor and a block size to ModelOpt's operator, which
fills up a partial block by itself. The audit predicts by arithmetic alone, so each side checks the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.blocks import Misfit, misfits
from harness.build import by
from harness.finding import Finding, Severity
from harness.proofs.coverage import Part, parts
from harness.proofs.proof import Proof, finding, judged
from harness.proofs.quantizers import place
from harness.rank import Rank
from harness.recipes import Recipe
from harness.sharding import rank_parameters
from harness.standins.output import import_foreign
from harness.standins.patching import patched

import_foreign()

from modelopt.torch.quantization import tensor_quant  # noqa: E402
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer  # noqa: E402

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layout import Layout

_LAYER = re.compile(r"decoder\.layers\.\d+\.|(?<=experts\.)local_experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Use:
    """What one stage of a quantizer did along one dimension of a tensor, counted from its last: -1.

    ``padding`` counts the zeros that filled up the last block.
    """

    axis: int
    block: int
    padding: int


@dataclass
class Observed:
    """By path of a quantizer, members of a container as one: its uses of blocks; who runs at the moment."""

    uses: dict[str, set[Use]] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)  # with quantizers, and called

    def add(self, path: str, use: Use) -> None:
        self.uses.setdefault(".".join(place(path)), set()).add(use)


@contextmanager
def observed(model: nn.Module) -> Iterator[Observed]:
    """What the quantizers of ``model`` do with blocks in the forward passes made meanwhile."""
    seen = Observed()
    seam: Any = tensor_quant
    operator = seam.dynamic_block_quantize_op

    def watched(inputs: torch.Tensor, block_size: int, *more: Any) -> torch.Tensor:
        if seen.running:
            width = inputs.shape[-1]
            seen.add(seen.running[-1], Use(-1, block_size, -width % block_size))
        result: torch.Tensor = operator(inputs, block_size, *more)
        return result

    def enter(path: str) -> Any:
        return lambda *_: seen.running.append(path)

    def leave(path: str) -> Any:
        def left(quantizer: TensorQuantizer, *_: Any) -> None:
            seen.running.pop()
            if quantizer.is_static_block_quant:
                for use in _static(quantizer):
                    seen.add(path, use)

        return left

    def called(path: str) -> Any:
        def entered(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # Megatron gives an expert that no token was sent to an empty tensor.
            if args and args[0].numel():
                seen.modules.add(path)

        return entered

    hooks: list[Any] = []
    for path, module in model.named_modules():
        if isinstance(module, QuantModule):
            hooks.append(module.register_forward_pre_hook(called(path)))
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            hooks += [
                module.register_forward_pre_hook(enter(path)),
                module.register_forward_hook(leave(path)),
            ]
    try:
        with patched(seam, "dynamic_block_quantize_op", watched):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _static(quantizer: TensorQuantizer) -> Iterator[Use]:
    """Blocks and zeros as the quantizer keeps them from its last tensor.

    It reshapes every dimension with blocks to (number, size), the last one alone to (-1, size).
    """
    reshaped, padded = tuple(quantizer._block_reshape_size), tuple(quantizer._original_shape)
    # As ``torch.nn.functional.pad`` takes it: before and after, the last dimension first.
    padding = tuple(getattr(quantizer, "_padding", ()))
    zeros = [sum(padding[index : index + 2]) for index in range(0, len(padding), 2)]
    zeros += [0] * (len(padded) - len(zeros))
    if reshaped[0] == -1:
        yield Use(-1, reshaped[1], zeros[0])
        return
    position = 0
    for index, size in enumerate(padded):
        axis = index - len(padded)
        if (
            position + 1 < len(reshaped)
            and reshaped[position] * reshaped[position + 1] == size
            and _has(quantizer, index)
        ):
            yield Use(axis, reshaped[position + 1], zeros[-1 - axis])
            position += 2
        else:
            position += 1


def _has(quantizer: TensorQuantizer, index: int) -> bool:
    dimensions = len(quantizer._original_shape)
    sizes = quantizer.block_sizes
    return bool(sizes.get(index) or sizes.get(index - dimensions))


def prove_blocks(
    model: nn.Module,
    recipe: Recipe,
    architecture: Architecture,
    layout: Layout,
    rank: Rank | None = None,
    used: Observed | None = None,
) -> Proof:
    """Prove that the blocks of every quantizer are the recipe's, and that it pads where the audit says so.

    ``used`` is what a forward pass showed (``observed``); without it, only static blocks are known, which
    calibration left in their quantizers. ``architecture`` is the model's own. Each deviation is an error at
    its module. Raises UnevenSplit or UnevenStages for a rank that cannot be.
    """
    rank = rank or Rank(0)
    shapes = rank_parameters(architecture, layout, rank)
    own = parts(architecture, layout, shapes, last=rank.pp == layout.pp - 1)
    predicted, seen = misfits(architecture, layout, recipe), used or _kept(model)
    findings: list[Finding] = []
    idle: list[str] = []
    for part in own:
        if used is not None and part.path not in used.modules:
            # An expert may have seen no token; of anything else the weights alone may be taken.
            if not part.role.routed and any(any(part.meant(recipe, side)) for side in part.sides):
                idle.append(part.path)
            continue
        for side in part.sides:
            mine = seen.uses.get(f"{part.path}.{side}_quantizer", set())
            findings += _unlike_the_recipe(part, side, recipe, mine, complete=used is not None)
            findings += _unlike_the_audit(part, side, mine, predicted)
        findings += _beside_the_audit(part, seen, predicted, complete=used is not None)
    if idle:
        what = f"has quantizers that are on, one of {len(idle)} such, and nothing goes through it: Megatron "
        what += "takes its weight as it is"
        findings.append(finding(idle[0], what, actual=len(idle), severity=Severity.WARNING))
    return judged("blocks", findings, _detail(seen.uses))


def _kept(model: nn.Module) -> Observed:
    seen = Observed()
    for path, module in model.named_modules():
        if (
            isinstance(module, TensorQuantizer)
            and module.is_enabled
            and hasattr(module, "_block_reshape_size")
        ):
            for use in _static(module):
                seen.add(path, use)
    return seen


def _unlike_the_recipe(
    part: Part, side: str, recipe: Recipe, uses: set[Use], complete: bool
) -> Iterator[Finding]:
    """Findings where a quantizer's blocks are of another size than the recipe's, along any dimension."""
    formats = recipe.formats(part.path, side, part.role.parent_class)
    expected = {
        (_from_the_end(axis, side), size)
        for each in formats
        if complete or not each.dynamic
        for axis, size in each.partial_blocks
    }
    actual = {(use.axis, use.block) for use in uses}
    if actual == expected or not (complete or actual):
        return
    said = f"{side}_quantizer used {_blocks(actual)}, {recipe.name} gives it {_blocks(expected)}"
    yield finding(part.path, said, _blocks(expected), _blocks(actual))


def _from_the_end(axis: int, side: str) -> int:
    """A config may count a weight's two dimensions from the first; of activations it counts from the last."""
    return axis - 2 if axis >= 0 and side == "weight" else axis


def _blocks(sizes: set[tuple[int, int]]) -> str:
    return f"blocks of {by(tuple(size for _, size in sorted(sizes)))}" if sizes else "no blocks"


def _unlike_the_audit(
    part: Part, side: str, uses: set[Use], predicted: tuple[Misfit, ...]
) -> Iterator[Finding]:
    """Findings where a quantizer pads a dimension that the audit does not name, or the other way round."""
    named = {
        (each.dimension.axis, each.block)
        for each in _of(part, predicted)
        if side in each.dimension.quantizers
    }
    for use in sorted(uses, key=lambda use: (use.axis, use.block)):
        is_named = (use.axis, use.block) in named
        where = f"dimension {use.axis} in blocks of {use.block}"
        if use.padding and not is_named:
            what = f"{side}_quantizer pads {where} by {use.padding}, which the audit does not say"
            yield finding(part.path, what, 0, use.padding)
        elif is_named and not use.padding:
            what = f"{side}_quantizer pads nothing along {where}, though the audit says so"
            yield finding(part.path, what, "padding", 0)


def _of(part: Part, predicted: tuple[Misfit, ...]) -> Iterator[Misfit]:
    matrix = _LAYER.sub("", part.path)
    return (each for each in predicted if matrix in each.dimension.matrices)


def _beside_the_audit(
    part: Part, seen: Observed, predicted: tuple[Misfit, ...], complete: bool
) -> Iterator[Finding]:
    """Findings where the audit names blocks of a matrix of which no quantizer uses any."""
    if part.role.routed and not any(f"{part.path}.{side}_quantizer" in seen.uses for side in part.sides):
        return
    for each in _of(part, predicted):
        wanted = (each.dimension.axis, each.block)
        uses = [
            (use.axis, use.block)
            for side in each.dimension.quantizers
            for use in seen.uses.get(f"{part.path}.{side}_quantizer", ())
        ]
        if wanted not in uses and (complete or not each.format.dynamic):
            what = f"no quantizer uses blocks of {each.block} along dimension {each.dimension.axis}, "
            what += "which the audit says are padded"
            yield finding(part.path, what, each.block, None)


def _detail(uses: dict[str, set[Use]]) -> str:
    """``16 quantizers in blocks of 1 x 16, 2 padded``."""
    if not uses:
        return "no blocks"
    counts: dict[str, int] = {}
    for used in uses.values():
        words = _blocks({(use.axis, use.block) for use in used})
        counts[words] = counts.get(words, 0) + 1
    padded = sum(any(use.padding for use in used) for used in uses.values())
    said = ", ".join(f"{count} quantizers in {words}" for words, count in counts.items())
    return f"{said}; {padded} padded" if padded else f"{said}; none padded"
