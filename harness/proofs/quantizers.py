"""Quantizers: a model -> its matrices and quantizers, what each one does, and what the recipe makes of it.

Which matrices there are comes from the model before ModelOpt saw it, and what each should become from the
recipe, path by path, as ModelOpt applies its entries; so nothing here believes what it checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from typing import Any

from torch import nn

from harness.finding import Finding
from harness.proofs.proof import finding
from harness.recipes import Format, Recipe
from harness.roles import role_of
from harness.standins.output import import_foreign

import_foreign()

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.moe import moe_layer  # noqa: E402
from modelopt.torch.quantization.nn import (  # noqa: E402
    QuantModuleRegistry,
    SequentialQuantizer,
    TensorQuantizer,
)

WEIGHT, INPUT = "weight_quantizer", "input_quantizer"


def expected_matrices(model: nn.Module, recipe: Recipe) -> tuple[str, ...]:
    """Module paths of every matrix whose weights ``recipe`` means to quantize, in model order.

    Those are Megatron's linears, experts included, and whatever else ModelOpt has a quantized form of.
    """
    return tuple(
        path
        for path, module in model.named_modules()
        if _has_form(module) and recipe.formats(path, WEIGHT, parent_class(path))
    )


def parent_class(path: str) -> str | None:
    """The name by which a config may address the class of the module at ``path``."""
    role = role_of(path)
    return role.parent_class if role else None


def _megatrons() -> tuple[type[nn.Module], ...]:
    """Megatron's own linears; TELinear where Transformer Engine, or its stand-in, is there."""
    te_linear = moe_layer.TELinear
    return (ColumnParallelLinear, RowParallelLinear, *((te_linear,) if te_linear else ()))


def _has_form(module: nn.Module) -> bool:
    # Of Megatron's linears ModelOpt must know all; of anything else with weights it knows what it registers.
    if isinstance(module, _megatrons()):
        return True
    return getattr(module, "weight", None) is not None and type(module) in QuantModuleRegistry


def quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Every quantizer with its path; a container's members, not the container."""
    for path, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield path, module


def place(quantizer: str) -> tuple[str, str]:
    """Module path and attribute of a quantizer path; a container's member counts as the container."""
    module, attribute = owner_of(quantizer)
    return module, attribute.partition(".")[0]


def owner_of(name: str) -> tuple[str, str]:
    """Module path and attribute of a tensor or quantizer path; all of a quantizer counts as attribute."""
    parts = name.split(".")
    quantizers = (index for index, part in enumerate(parts) if part.endswith("_quantizer"))
    index = next(quantizers, len(parts) - 1)
    return ".".join(parts[:index]), ".".join(parts[index:])


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Every quantizer disabled for a while."""
    enabled = [quantizer for _, quantizer in quantizers(model) if quantizer.is_enabled]
    for quantizer in enabled:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enable()


def check_formats(model: nn.Module, recipe: Recipe) -> Iterator[Finding]:
    """Findings where a quantizer that is on rounds to another format than ``recipe`` gives it, or not at all.

    Which quantizers are on is another check's (``coverage.py``).
    """
    for path, quantizer in _containers(model):
        module, attribute = place(path)
        planned = recipe.formats(module, attribute, parent_class(module))
        stages = [stage for stage in _stages(quantizer) if stage.is_enabled]
        if len(stages) != len(planned):
            continue
        idle = [stage for stage in stages if not stage._if_quant]
        expected = tuple(map(_compared, planned))
        actual = tuple(map(_along, expected, map(_compared, map(_format, stages))))
        if idle:
            what = f"{attribute} does not round, {recipe.name} makes it {_spelt(planned)}"
            yield finding(module, what, planned, ())
        elif actual != expected:
            what = f"{attribute} is {_spelt(formats(quantizer))}, {recipe.name} makes it {_spelt(planned)}"
            yield finding(module, what, expected, actual)


def _containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every quantizer that stands in a module by itself, one of several stages as a whole."""
    inside: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, SequentialQuantizer):
            inside.update(f"{path}.{name}" for name, _ in module.named_children())
        if isinstance(module, SequentialQuantizer | TensorQuantizer) and path not in inside:
            yield path, module


def formats(quantizer: nn.Module | None) -> tuple[Format, ...]:
    """What a quantizer does, stage by stage, in the recipe's words; nothing where it is off."""
    return tuple(_format(stage) for stage in _stages(quantizer) if stage.is_enabled and stage._if_quant)


def _stages(quantizer: nn.Module | None) -> list[TensorQuantizer]:
    if quantizer is None:
        return []
    return list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]


def _format(quantizer: TensorQuantizer) -> Format:
    attributes = {
        "num_bits": quantizer.num_bits,
        "axis": quantizer.axis,
        "block_sizes": _plain(quantizer.block_sizes),
        "unsigned": quantizer.unsigned,
        "narrow_range": quantizer.narrow_range,
        "fake_quant": quantizer.fake_quant,
        "backend": quantizer.backend,
        "bias": _plain(quantizer.bias),
        "rotate": _plain(quantizer._rotate),
        "type": "dynamic" if quantizer._dynamic else "static",
        "constant_amax": quantizer._constant_amax,
        "use_constant_amax": quantizer._use_constant_amax,
    }
    return Format.of(attributes)


def _plain(value: Any) -> Any:
    """A record of ModelOpt's as the mapping that a config would have in its place."""
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_unset=True)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return dict(value) if isinstance(value, Mapping) else value


def _compared(form: Format) -> Format:
    """The part of a format that a quantizer keeps.

    ModelOpt has an axis beside blocks too, for its own reshaping, and fills in how a bias is found and how
    numbers are rotated.
    """
    if not (form.other or form.bias or form.rotate or (form.blocks and form.axis is not None)):
        return form
    given = (("is", True),)
    return replace(
        form,
        axis=None if form.blocks else form.axis,
        bias=given if form.bias else (),
        rotate=given if form.rotate else (),
        other=(),
    )


def _along(expected: Format, actual: Format) -> Format:
    """``actual`` with a scale per index of other dimensions in the words of ``expected``.

    Blocks as long as a dimension ModelOpt turns into an axis when it first sees a tensor.
    """
    whole = expected.blocks and not expected.partial_blocks
    if whole and actual.axis is not None and not actual.blocks:
        return replace(actual, axis=None, more_blocks=expected.more_blocks, dynamic=expected.dynamic)
    return actual


def _spelt(stages: Sequence[Format]) -> str:
    return ", then ".join(map(str, stages)) or "off"
