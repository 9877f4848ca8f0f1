"""Expected: a published checkpoint, a recipe and Megatron's model -> the tensors of the exported one.

The names and shapes are the published checkpoint's own; what the recipe quantizes, and how that is stored,
comes from the recipe and the formats' definitions. ModelOpt's exporter is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harness.build import by
from harness.finding import Finding, Severity
from harness.parity import stored
from harness.parity.counterparts import Counterpart, counterpart, held
from harness.proofs.packing import Stored
from harness.roles import Role, role_of

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.recipes import Recipe

# An MXFP4 block in a published checkpoint: so many numbers in bytes of two.
_MXFP4_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor of the published checkpoint, and what should stand for it in the exported one.

    ``weight`` is None where it is not quantized. ``stored`` are the tensors by name, ``parts`` their names by
    what each is: ``weight``, ``weight_scale``, ``input_scale`` and so on.
    """

    counterpart: Counterpart
    shape: tuple[int, ...]
    weight: stored.Weight | None
    stored: Mapping[str, Stored]
    parts: Mapping[str, str]

    @property
    def module(self) -> str:
        """The Hugging Face module that holds it."""
        name = self.counterpart.name
        return name if self.counterpart.packed else name.rpartition(".")[0]


def published_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the checkpoint in ``folder``; MXFP4 blocks as the matrix they hold."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return dict(_unblocked(shapes))


def _unblocked(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in shapes.items():
        stem = name.removesuffix("_blocks")
        if stem != name and f"{stem}_scales" in shapes:
            experts, rows, blocks, _ = shape
            yield stem, (experts, blocks * _MXFP4_BLOCK, rows)
        elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in shapes):
            yield name, shape


def counterparts(
    shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, model: torch.nn.Module
) -> tuple[dict[str, Counterpart], list[Finding]]:
    """What each published tensor is of Megatron's model, and findings where one side has what the other
    has not."""
    parameters = dict(held(model))
    found: dict[str, Counterpart] = {}
    findings: list[Finding] = []
    covered: set[str] = set()
    for name, shape in shapes.items():
        made = counterpart(name, architecture, shapes, parameters)
        if made is None:
            findings.append(finding(name, "is a tensor that no rule gives a place in Megatron's model"))
            continue
        covered.update(made.parameters)
        missing = [parameter for parameter in made.parameters if parameter not in parameters]
        if missing:
            what = f"is published, and Megatron's model has no {missing[0]}"
            findings.append(finding(name, what, missing[0], module=missing[0].rpartition(".")[0]))
            continue
        actual = tuple(made.of(parameters.__getitem__).shape)
        if _flat(actual) != _flat(shape):
            what = f"is {by(shape)} as published, and {by(actual)} in Megatron's {made.parameters[0]}"
            findings.append(finding(name, what, shape, actual, made.modules[0]))
            continue
        found[name] = made
    for name in parameters:
        if name not in covered:
            what = f"{name} is Megatron's, and the published checkpoint has no tensor of it"
            findings.append(finding(name, what, module=name.rpartition(".")[0], named=False))
    return found, findings


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without dimensions of one: a convolution's may stand in it or not."""
    return tuple(size for size in shape if size != 1)


def expected(
    found: Mapping[str, Counterpart],
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    dtype: torch.dtype,
    router_dtype: torch.dtype,
) -> list[Expected]:
    """What should stand for each published tensor, in published order. Raises ``stored.NotKnown``."""
    return [_expected(one, shapes[name], recipe, dtype, router_dtype) for name, one in found.items()]


def _expected(
    one: Counterpart, shape: tuple[int, ...], recipe: Recipe, dtype: torch.dtype, router_dtype: torch.dtype
) -> Expected:
    module = one.modules[0]
    weight = None
    if one.parameters[0].endswith(".weight"):
        folded = recipe.folds_scales
        weight = stored.weight_of(
            recipe.formats_of(module, "weight"), recipe.formats_of(module, "input"), folded
        )
    if weight is None:
        kind = router_dtype if role_of(module) is Role.ROUTER else dtype
        return Expected(one, shape, None, {one.name: Stored(shape, kind)}, {"weight": one.name})
    stem = f"{one.name}_" if one.packed else one.name.removesuffix("weight")
    made = stored.tensors(weight, shape)
    parts = {part: one.name if part == "weight" else f"{stem}{part}" for part in made}
    return Expected(one, shape, weight, {parts[part]: made[part] for part in made}, parts)


def finding(
    name: str, what: str, expected: object = None, actual: object = None, module: str = "", named: bool = True
) -> Finding:
    """A finding of the parity stage; the tensor's name opens its message."""
    message = f"{name}  {what}" if named else what
    return Finding("parity", Severity.ERROR, message, module=module or None, expected=expected, actual=actual)
