"""Quantize: a recipe and a model -> what ModelOpt quantized, how well, and what it missed.

``mtq.quantize`` inserts quantizers, calibrates them and leaves a model that fakes the format in every
forward pass. It tells little when it misses something, so each check here looks for itself: which
matrices there are comes from the model before ModelOpt saw it, and what each should become from the
recipe table.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.build import by, short
from harness.finding import Finding, Severity
from harness.recipes import Format, Recipe
from harness.standins.output import captured, import_foreign
from harness.trace import BATCH_SIZE, SEQUENCE_LENGTH, forward, token_ids

import_foreign()

import modelopt.torch.quantization as mtq  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer  # noqa: E402

if TYPE_CHECKING:
    from harness.architecture import Architecture

# Calibration tokens that each expert sees on average. Routing by random weights is uneven: the least
# used expert of ten models (8 and 32 experts, 2 to 6 layers) saw an eighth of its share or more.
TOKENS_PER_EXPERT = 48

# Largest relative error of the logits, for one layer; it grows with the square root of the layers.
# Measured over three seeds of ten models (dense and MoE, gated and squared-ReLU, 1 to 8 layers, width
# 256 to 768), in brackets, with a margin of a half: a wrong format or scale is off by a multiple.
LARGEST_ERROR: Mapping[str, float] = {
    "fp8": 0.1,  # 0.028 to 0.062
    "int8_smoothquant": 0.04,  # 0.010 to 0.023
    "int4_awq": 0.25,  # 0.086 to 0.162
    "w4a8_awq_beta": 0.26,  # 0.090 to 0.170
    "nvfp4": 0.27,  # 0.096 to 0.182
}
# An output that has nothing to do with the right one is off by about 1.4.
_NO_LONGER_SIMILAR = 1.0

# AWQ and SmoothQuant multiply weights by a scale and divide activations by it, which ModelOpt goes on
# doing with its quantizers off. In exact arithmetic nothing changes; in bf16 each product is rounded
# once more. Measured 0.0049 to 0.0072 for one layer.
LARGEST_FOLDING_ERROR = 0.012


@dataclass(frozen=True, slots=True)
class Quantization:
    """What happened to one model. Errors are relative, of the logits, and None where not measured.

    ``matrices`` are the module paths that the recipe means to quantize, ``quantizers`` counts those
    that are on, ``tokens`` those it was calibrated with; ``log`` is what ModelOpt said.
    """

    recipe: str
    matrices: tuple[str, ...]
    quantizers: int
    tokens: int
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
) -> Quantization:
    """Quantize ``model`` in place and check every part of the result.

    ``config`` is the ModelOpt config to apply, the recipe's own unless given. What ModelOpt raises
    comes through. Nothing reaches the terminal.
    """
    vocabulary, experts = architecture.padded_vocab_size, architecture.moe
    share = experts.num_experts / experts.moe_router_topk if experts else 0
    length = min(SEQUENCE_LENGTH, architecture.max_position_embeddings)
    batch = max(BATCH_SIZE, math.ceil(TOKENS_PER_EXPERT * share / length))
    calibration = token_ids(vocabulary, batch, length, device, seed)
    # Calibration has seen what is measured: a value beyond the calibrated range would be clipped,
    # and the error would say more about the draw of tokens than about the recipe.
    tokens = calibration[:BATCH_SIZE]
    seen = _TokenCount(model)
    with captured() as log:
        before = forward(model, tokens)
        matrices = expected_matrices(model)
        own = getattr(mtq, recipe.config_name)
        mtq.quantize(
            model, copy.deepcopy(dict(config or own)), lambda model: seen.forward(model, calibration)
        )
        after = forward(model, tokens)
        with quantizers_off(model):
            off = forward(model, tokens)
    findings = (
        *check_experts(seen.by_expert, calibration.numel()),
        *check_matrices(model, recipe, matrices),
        *check_amax(model),
        *check_scales(model, recipe, matrices),
        *check_output(recipe, architecture.num_layers, before, after),
        *check_off(recipe, architecture.num_layers, before, off),
    )
    return Quantization(
        recipe=recipe.name,
        matrices=matrices,
        quantizers=sum(quantizer.is_enabled for _, quantizer in _quantizers(model)),
        tokens=calibration.numel(),
        error=relative_error(before, after),
        error_when_off=relative_error(before, off),
        findings=findings,
        log=log.getvalue(),
    )


def expected_matrices(model: nn.Module) -> tuple[str, ...]:
    """Module paths of every matrix in the decoder layers, experts included, in model order.

    Every recipe in the table quantizes these; router and output layer are not among them.
    """
    return tuple(
        name
        for name, module in model.named_modules()
        if name.startswith("decoder.layers.") and isinstance(module, ColumnParallelLinear | RowParallelLinear)
    )


class _TokenCount:
    """Counts what each expert sees while calibration runs.

    ModelOpt's amax does not show it: an expert without tokens gets the amax of its neighbours.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_expert = {name: 0 for name, _ in _experts(model)}

    def forward(self, model: nn.Module, tokens: torch.Tensor) -> None:
        # An algorithm may run this more than once; each pass has the same tokens.
        counts = dict.fromkeys(self.by_expert, 0)
        handles = [
            expert.register_forward_pre_hook(_counting(counts, name)) for name, expert in _experts(model)
        ]
        try:
            forward(model, tokens)
        finally:
            for handle in handles:
                handle.remove()
        self.by_expert = {name: max(counts[name], self.by_expert[name]) for name in counts}


def _experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, SequentialMLP):
            for index, expert in enumerate(module.local_experts):
                yield f"{name}.local_experts.{index}", expert


def _counting(counts: dict[str, int], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        counts[name] += args[0].shape[0]

    return hook


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


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float | None:
    """Median over tokens of |actual - expected| / |expected|, for logits [batch, sequence, vocabulary].

    The median, because a router whose scores nearly tie may send a few tokens to another expert,
    and then those tokens say nothing about rounding. None where the shapes differ.
    """
    if expected.shape != actual.shape:
        return None
    wanted, found = expected.float(), actual.float()
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


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


def check_amax(model: nn.Module) -> tuple[Finding, ...]:
    """A finding for every quantizer that is on, needs calibration and has no finite positive amax."""
    return tuple(_bad_amax(model))


def _bad_amax(model: nn.Module) -> Iterator[Finding]:
    for name, quantizer in _quantizers(model):
        if not quantizer.is_enabled or not _needs_amax(quantizer):
            continue
        module, attribute = _place(name)
        amax = getattr(quantizer, "_amax", None)
        if amax is None:
            yield _finding(module, f"{attribute} has no amax: it never saw data", "a positive amax", None)
            continue
        yield from _not_positive(module, f"{attribute} amax", amax)


def _needs_amax(quantizer: TensorQuantizer) -> bool:
    constant = quantizer._use_constant_amax or quantizer._constant_amax is not None
    return not (quantizer.is_mx_format or quantizer._dynamic or constant)


def check_scales(model: nn.Module, recipe: Recipe, matrices: Sequence[str]) -> tuple[Finding, ...]:
    """Findings where a recipe that folds scales left a matrix without one per input, finite and positive."""
    return tuple(_bad_scales(model, matrices)) if recipe.folds_scales else ()


def _bad_scales(model: nn.Module, matrices: Sequence[str]) -> Iterator[Finding]:
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
        else:
            yield from _not_positive(name, "pre_quant_scale", scale)


def _not_positive(module: str | None, what: str, values: torch.Tensor) -> Iterator[Finding]:
    wrong = values.detach().flatten().float()
    wrong = wrong[~(torch.isfinite(wrong) & (wrong > 0))]
    if len(wrong):
        count = f" in {len(wrong)} of {values.numel()} places" if values.numel() > 1 else ""
        first = float(wrong[0])
        message = f"{what} is {first:g}{count}, expected a finite positive number"
        yield _finding(module, message, "finite and positive", first)


def check_output(
    recipe: Recipe, num_layers: int, before: torch.Tensor, after: torch.Tensor
) -> tuple[Finding, ...]:
    """Findings where the quantized logits have another shape, are not finite, or are not about as far
    from the unquantized ones as the recipe makes them: neither the same nor beyond its bound."""
    if after.shape != before.shape:
        expected, actual = tuple(before.shape), tuple(after.shape)
        what = f"quantized logits are {by(actual)}, expected {by(expected)}"
        return (_finding(None, what, expected, actual),)
    wrong = int((~torch.isfinite(after)).sum())
    if wrong:
        what = f"{wrong} of {after.numel()} quantized logits are not finite"
        return (_finding(None, what, 0, wrong),)
    if torch.equal(before, after):
        return (_finding(None, f"{recipe.name} changed no logit at all", "> 0", 0.0),)
    bound = min(LARGEST_ERROR[recipe.name] * math.sqrt(num_layers), _NO_LONGER_SIMILAR)
    return _beyond(f"{recipe.name} moves the logits by", before, after, bound)


def check_off(
    recipe: Recipe, num_layers: int, before: torch.Tensor, off: torch.Tensor
) -> tuple[Finding, ...]:
    """A finding where the model with its quantizers off is not what it was before.

    Bit for bit, except where the recipe folded scales into the weights (see LARGEST_FOLDING_ERROR).
    """
    what = "with every quantizer off the logits differ by"
    bound = LARGEST_FOLDING_ERROR * math.sqrt(num_layers) if recipe.folds_scales else 0.0
    if torch.equal(before, off):
        return ()
    if not recipe.folds_scales:
        changed = int((before != off).sum()) if before.shape == off.shape else before.numel()
        message = f"with every quantizer off {changed} of {before.numel()} logits are not what they were"
        return (_finding(None, message, 0, changed),)
    return _beyond(what, before, off, bound)


def _beyond(what: str, before: torch.Tensor, after: torch.Tensor, bound: float) -> tuple[Finding, ...]:
    error = relative_error(before, after)
    if error is not None and error <= bound:
        return ()
    amount = "nothing comparable" if error is None else f"{error:.2g} of their size"
    return (_finding(None, f"{what} {amount}, expected at most {bound:.2g}", f"<= {bound:.2g}", error),)


def _place(quantizer: str) -> tuple[str, str]:
    """Module path and attribute of a quantizer path; a container's member counts as the container."""
    parts = quantizer.split(".")
    index = next(i for i, part in enumerate(parts) if part.endswith("_quantizer"))
    return ".".join(parts[:index]), parts[index]


def _finding(module: str | None, what: str, expected: Any, actual: Any) -> Finding:
    message = f"{short(module)}  {what}" if module else what
    return Finding("quantize", Severity.ERROR, message, module=module, expected=expected, actual=actual)
