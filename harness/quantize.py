"""Quantize: a recipe and a model -> what ModelOpt quantized, how well, and what it missed.

``mtq.quantize`` inserts quantizers, calibrates them and leaves a model that fakes the format in every
forward pass. It tells little when it misses something, so each check here looks for itself: which
matrices there are comes from the model before ModelOpt saw it, and what each should become from the
recipe table.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.build import by, short
from harness.finding import Finding, Severity
from harness.recipes import Format, Recipe
from harness.rounding import check_off, check_output, products, relative_error
from harness.routing import TokenCount, forward_along, forward_and_routes
from harness.standins.output import captured, import_foreign
from harness.trace import BATCH_SIZE, sequence_length, token_ids
from harness.world import simulated

import_foreign()

import modelopt.torch.quantization as mtq  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.moe import moe_layer  # noqa: E402
from modelopt.torch.quantization.nn import (  # noqa: E402
    QuantModuleRegistry,
    SequentialQuantizer,
    TensorQuantizer,
)

if TYPE_CHECKING:
    from harness.architecture import Architecture

# Calibration tokens that each expert sees on average, tried in this order until every one sees
# LEAST_TOKENS: routing by random weights is uneven, and an algorithm that searches, as AWQ does, runs
# every matrix many times on all of them.
TOKENS_PER_EXPERT = (4, 8, 16, 32, 64)
LEAST_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Quantization:
    """What happened to one model. Errors are relative, of the logits, and None where not measured.

    ``matrices`` are the module paths that the recipe means to quantize, ``quantizers`` counts those
    that are on, ``sequences`` those it was calibrated with; ``output`` is what the quantized model gives
    for the first of them, and ``log`` what ModelOpt said.
    """

    recipe: str
    matrices: tuple[str, ...]
    quantizers: int
    sequences: int
    output: torch.Tensor = field(repr=False, compare=False)
    error: float | None
    error_when_off: float | None
    findings: tuple[Finding, ...]
    log: str


def quantize(
    model: nn.Module,
    recipe: Recipe,
    architecture: Architecture,
    device: torch.device,
    seed: int = 1234,
    config: Mapping[str, Any] | None = None,
    length: int | None = None,
    sequences: int | None = None,
) -> Quantization:
    """Quantize ``model`` in place and check every part of the result.

    ``config`` is the ModelOpt config to apply, the recipe's own unless given. Calibration runs over so many
    ``sequences`` of ``length`` tokens, where they are given; ranks that are to agree need the same. Where the
    other ranks are simulated, only what does not hang on their numbers is checked: formats, that every
    quantizer saw data, shapes. What ModelOpt raises comes through. Nothing reaches the terminal.
    """
    seen, real = TokenCount(model), not simulated()
    with captured() as log:
        calibration = calibration_tokens(model, architecture, device, seed, length, sequences)
        # Calibration has seen what is measured: a value beyond the calibrated range would be clipped,
        # and the error would say more about the draw of tokens than about the recipe.
        tokens = calibration[:BATCH_SIZE]
        before, routes = forward_and_routes(model, tokens)
        own = getattr(mtq, recipe.config_name)
        matrices = expected_matrices(model, own)
        unknown = unknown_matrices(model)
        mtq.quantize(
            model, copy.deepcopy(dict(config or own)), lambda model: seen.forward(model, calibration)
        )
        after = forward_along(model, tokens, routes)
        with quantizers_off(model):
            off = forward_along(model, tokens, routes)
    findings = [
        *check_unknown(unknown),
        *check_matrices(model, recipe, matrices),
        *check_amax(model, values=real),
        *check_scales(model, recipe, matrices, values=real),
    ]
    if real:
        findings.extend(check_experts(seen.by_expert, calibration.numel()))
    measured = real and bool(model.post_process)  # hidden states of a pipeline stage have no bound
    if measured:
        findings.extend(check_output(recipe, products(architecture), before, after))
        findings.extend(check_off(recipe, products(architecture), before, off))
    else:
        findings.extend(check_same_shape(before, after))
    return Quantization(
        recipe=recipe.name,
        matrices=matrices,
        quantizers=sum(quantizer.is_enabled for _, quantizer in _quantizers(model)),
        sequences=len(calibration),
        output=after,
        error=relative_error(before, after) if measured else None,
        error_when_off=relative_error(before, off) if measured else None,
        findings=tuple(findings),
        log=log.getvalue(),
    )


def calibration_tokens(
    model: nn.Module,
    architecture: Architecture,
    device: torch.device,
    seed: int,
    length: int | None = None,
    sequences: int | None = None,
) -> torch.Tensor:
    """Token ids, [batch, sequence], of which every expert of the unquantized model sees a few."""
    length, experts = length or sequence_length(architecture), architecture.moe
    if sequences is not None:
        return token_ids(architecture.padded_vocab_size, sequences, length, device, seed)
    share = experts.num_experts / experts.moe_router_topk if experts else 0
    for times in TOKENS_PER_EXPERT:
        batch = max(BATCH_SIZE, math.ceil(times * share / length))
        tokens = token_ids(architecture.padded_vocab_size, batch, length, device, seed)
        count = TokenCount(model)
        if experts is None:
            break
        with torch.no_grad():
            count.forward(model, tokens)
        # A pipeline stage may hold dense layers only.
        if min(count.by_expert.values(), default=LEAST_TOKENS) >= LEAST_TOKENS:
            break
    return tokens


def expected_matrices(model: nn.Module, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Module paths of every matrix in the decoder layers that ``config`` means, in model order.

    That is every linear of Megatron's (experts included) unless a pattern of the config turns it off;
    the router and the output layer are not among them.
    """
    return tuple(
        name
        for name, module in _linears(model)
        if _is_known(module) and _is_on(config, f"{name}.weight_quantizer")
    )


def unknown_matrices(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the linears in the decoder layers of which ModelOpt has no quantized form."""
    return tuple(name for name, module in _linears(model) if not _is_known(module))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds: tuple[type[nn.Module], ...] = (*_megatrons(), nn.Linear)
    for name, module in model.named_modules():
        if name.startswith("decoder.layers.") and isinstance(module, kinds):
            yield name, module


def _megatrons() -> tuple[type[nn.Module], ...]:
    """Megatron's own linears; TELinear where Transformer Engine, or its stand-in, is there."""
    te_linear = moe_layer.TELinear
    return (ColumnParallelLinear, RowParallelLinear, *((te_linear,) if te_linear else ()))


def _is_known(module: nn.Module) -> bool:
    # Of Megatron's linears ModelOpt must know all; whether it knows torch's depends on their forward.
    return isinstance(module, _megatrons()) or type(module) in QuantModuleRegistry


def _is_on(config: Mapping[str, Any], quantizer: str) -> bool:
    """Whether ModelOpt's ``config`` leaves a quantizer of a linear on: the last pattern that fits decides."""
    on = False
    for entry in config["quant_cfg"]:
        if "parent_class" not in entry and fnmatchcase(quantizer, entry["quantizer_name"]):
            on = entry.get("enable", True)
    return on


def check_unknown(matrices: Sequence[str]) -> tuple[Finding, ...]:
    """One warning for all matrices that stay as they are because ModelOpt does not know their class."""
    if not matrices:
        return ()
    message = (
        f"{short(matrices[0])}  stays in bf16, one of {len(matrices)} such matrices: ModelOpt has no "
        "quantized form of the plain Linear that Megatron makes them of, whatever the recipe says"
    )
    return (Finding("quantize", Severity.WARNING, message, module=matrices[0], actual=len(matrices)),)


def _quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Every quantizer with its path; a container's members, not the container."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield name, module


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Every quantizer disabled for a while."""
    enabled = [quantizer for _, quantizer in _quantizers(model) if quantizer.is_enabled]
    for quantizer in enabled:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enable()


def check_experts(by_expert: Mapping[str, int], tokens: int) -> tuple[Finding, ...]:
    """A finding for every expert that calibration gave no token."""
    return tuple(
        _finding(name, f"saw none of the {tokens} calibration tokens", "at least one token", count)
        for name, count in by_expert.items()
        if count == 0
    )


def check_matrices(model: nn.Module, recipe: Recipe, matrices: Sequence[str]) -> tuple[Finding, ...]:
    """Findings where a matrix is not quantized as the recipe says, and where anything else is quantized."""
    return (*_unlike_the_recipe(model, recipe, matrices), *_beyond_the_recipe(model, recipe, matrices))


def _unlike_the_recipe(model: nn.Module, recipe: Recipe, matrices: Sequence[str]) -> Iterator[Finding]:
    inputs = (recipe.inputs,) if recipe.inputs else ()
    if not matrices:
        yield _finding(None, "the model has no matrix to quantize", "at least one", 0)
    for name in matrices:
        module = model.get_submodule(name)
        for attribute, expected in (("weight_quantizer", recipe.weights), ("input_quantizer", inputs)):
            actual = formats(getattr(module, attribute, None))
            if actual != expected:
                what = f"{attribute} is {_spelt(actual)}, {recipe.name} makes it {_spelt(expected)}"
                yield _finding(name, what, expected, actual)


def _beyond_the_recipe(model: nn.Module, recipe: Recipe, matrices: Sequence[str]) -> Iterator[Finding]:
    known = {f"{name}.{side}_quantizer" for name in matrices for side in ("weight", "input")}
    for name, quantizer in _quantizers(model):
        module, attribute = _place(name)
        if quantizer.is_enabled and f"{module}.{attribute}" not in known:
            yield _finding(module, f"{attribute} is on, {recipe.name} leaves it off", "off", "on")


def formats(quantizer: nn.Module | None) -> tuple[Format, ...]:
    """What a quantizer does, stage by stage, in the recipe table's words; nothing where it is off."""
    if quantizer is None:
        return ()
    stages = list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]
    return tuple(
        _format(stage) for stage in stages if stage.is_enabled and stage._if_quant and stage.fake_quant
    )


def _format(quantizer: TensorQuantizer) -> Format:
    blocks = quantizer.block_sizes
    if blocks is None:
        return Format(quantizer.num_bits, axis=quantizer.axis)
    # ModelOpt keeps an axis beside blocks too, for its own reshaping.
    return Format(quantizer.num_bits, blocks.get(-1), blocks.get("type") == "dynamic")


def _spelt(stages: Sequence[Format]) -> str:
    return ", then ".join(map(str, stages)) or "off"


def check_amax(model: nn.Module, values: bool = True) -> tuple[Finding, ...]:
    """A finding for every quantizer that is on, needs calibration and has no finite positive amax.

    Without ``values`` any amax will do.
    """
    return tuple(_bad_amax(model, values))


def _bad_amax(model: nn.Module, values: bool) -> Iterator[Finding]:
    for name, quantizer in _quantizers(model):
        if not quantizer.is_enabled or not _needs_amax(quantizer):
            continue
        module, attribute = _place(name)
        amax = getattr(quantizer, "_amax", None)
        if amax is None:
            yield _finding(module, f"{attribute} has no amax: it never saw data", "a positive amax", None)
        elif values:
            yield from _not_positive(module, f"{attribute} amax", amax)


def _needs_amax(quantizer: TensorQuantizer) -> bool:
    constant = quantizer._use_constant_amax or quantizer._constant_amax is not None
    return not (quantizer.is_mx_format or quantizer._dynamic or constant)


def check_scales(
    model: nn.Module, recipe: Recipe, matrices: Sequence[str], values: bool = True
) -> tuple[Finding, ...]:
    """Findings where a recipe that folds scales left a matrix without one per input, finite and positive.

    Without ``values`` any number will do.
    """
    return tuple(_bad_scales(model, matrices, values)) if recipe.folds_scales else ()


def _bad_scales(model: nn.Module, matrices: Sequence[str], values: bool) -> Iterator[Finding]:
    for name in matrices:
        module = model.get_submodule(name)
        scale = getattr(getattr(module, "input_quantizer", None), "pre_quant_scale", None)
        weight = module.get_parameter("weight")
        expected = (weight.shape[-1],)
        if scale is None:
            yield _finding(name, f"has no pre_quant_scale, expected {by(expected)}", expected, None)
        elif scale.numel() != expected[0]:
            what = f"pre_quant_scale is {by(tuple(scale.shape))}, expected {by(expected)}"
            yield _finding(name, what, expected, tuple(scale.shape))
        elif values:
            yield from _not_positive(name, "pre_quant_scale", scale)


def check_same_shape(before: torch.Tensor, after: torch.Tensor) -> tuple[Finding, ...]:
    """A finding where the quantized model's output has another shape than the unquantized one's."""
    expected, actual = tuple(before.shape), tuple(after.shape)
    if expected == actual:
        return ()
    what = f"the quantized model's output is {by(actual)}, expected {by(expected)}"
    return (_finding(None, what, expected, actual),)


def _not_positive(module: str | None, what: str, values: torch.Tensor) -> Iterator[Finding]:
    wrong = values.detach().flatten().float()
    wrong = wrong[~(torch.isfinite(wrong) & (wrong > 0))]
    if len(wrong):
        count = f" in {len(wrong)} of {values.numel()} places" if values.numel() > 1 else ""
        first = float(wrong[0])
        message = f"{what} is {first:g}{count}, expected a finite positive number"
        yield _finding(module, message, "finite and positive", first)


def _place(quantizer: str) -> tuple[str, str]:
    """Module path and attribute of a quantizer path; a container's member counts as the container."""
    parts = quantizer.split(".")
    index = next(i for i, part in enumerate(parts) if part.endswith("_quantizer"))
    return ".".join(parts[:index]), parts[index]


def _finding(module: str | None, what: str, expected: Any, actual: Any) -> Finding:
    message = f"{short(module)}  {what}" if module else what
    return Finding("quantize", Severity.ERROR, message, module=module, expected=expected, actual=actual)
