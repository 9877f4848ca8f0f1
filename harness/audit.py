"""Audit: the full-size architecture against the published parameter counts and the recipe's blocks.

By arithmetic alone. A forward pass never shows a dimension that a block size does not divide: ModelOpt
zero-pads it without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.architecture import Architecture
from harness.finding import Finding, Severity
from harness.inventory import Counts, counts
from harness.layout import Layout
from harness.rank import UnevenStages, stages
from harness.recipes import Recipe


@dataclass(frozen=True, slots=True)
class Audit:
    """Parameter counts at full size, and what is wrong with them or with the recipe's blocks.

    ``published`` holds the published ``total`` and ``active``, where there are any. ``with_buffers`` names
    those of the two that are the counted parameters and the experts' biases besides, which Megatron keeps
    as buffers.
    """

    counts: Counts
    published: Mapping[str, int]
    with_buffers: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def detail(self) -> str:
        """The counts in words, buffers named where a published count has them."""
        text = f"{self.counts.total:,} parameters, {self.counts.active:,} active"
        if self.with_buffers:
            which = " and ".join(self.with_buffers)
            verb = "includes" if len(self.with_buffers) == 1 else "include"
            text += f"; the published {which} {verb} {self.counts.buffers:,} expert biases (buffers)"
        return text


def audit(
    architecture: Architecture, params: Mapping[str, Any] | None, layout: Layout, recipe: Recipe | None
) -> Audit:
    """Audit one architecture. ``params`` are the published counts, None where nothing is published."""
    counted = counts(architecture)
    known = _of_the_text_model(params or {})
    published = {key: known[key] for key in ("total", "active") if type(known.get(key)) is int}
    actual = {"total": counted.total, "active": counted.active}
    with_buffers = tuple(
        key for key, count in published.items() if counted.buffers and count == actual[key] + counted.buffers
    )
    findings = [*_counts(counted, published, known, params is not None)]
    findings.extend(_splits(architecture, layout))
    if recipe is not None:
        findings.extend(_blocks(architecture, layout, recipe))
    return Audit(counted, published, with_buffers, tuple(findings))


def _of_the_text_model(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The counts of what a preset describes: of a multimodal model the text part, where it is published."""
    text = {key: params[f"text_{key}"] for key in ("total", "active") if f"text_{key}" in params}
    return {**params, **text}


def _counts(
    counted: Counts, published: Mapping[str, int], params: Mapping[str, Any], has_facts: bool
) -> Iterator[Finding]:
    for key, actual in (("total", counted.total), ("active", counted.active)):
        if key in published and published[key] not in (actual, actual + counted.buffers):
            difference = actual - published[key]
            besides = f", and {counted.buffers:,} expert biases (buffers)" if counted.buffers else ""
            yield Finding(
                "audit",
                Severity.ERROR,
                f"{key} parameters: {published[key]:,} published, {actual:,} in this preset "
                f"({difference:+,}){besides}",
                expected=published[key],
                actual=actual,
            )
        if key in params and key not in published:
            yield Finding(
                "audit",
                Severity.ERROR,
                f"the published count of {key} parameters is {params[key]!r}, which is no whole number",
                actual=params[key],
            )
    if has_facts and "total" not in published:
        yield Finding(
            "audit",
            Severity.WARNING,
            f"no parameter count is published: {counted.total:,} could not be checked",
            actual=counted.total,
        )


# ---- what a layout splits ----


def _splits(architecture: Architecture, layout: Layout) -> Iterator[Finding]:
    """An error for each size that the layout does not divide, as Megatron would refuse it."""
    for dest, size, ranks, axis in _split_sizes(architecture, layout):
        if size % ranks:
            yield architecture.arguments.finding(
                dest,
                f"{size} / {axis}{ranks} is not whole: Megatron refuses layout {layout}",
                stage="audit",
                expected=f"a multiple of {ranks}",
                actual=size,
            )
    dest = "hybrid_layer_pattern" if architecture.hybrid else "num_layers"
    try:
        stages(architecture.num_layers, layout, architecture.arguments["hybrid_layer_pattern"])
    except UnevenStages as error:
        yield architecture.arguments.finding(
            dest,
            f"{error}: Megatron refuses layout {layout}",
            stage="audit",
            actual=architecture.num_layers,
        )
    if architecture.moe is not None and layout.tp > 1 and layout.ep > 1:
        yield Finding(
            "audit",
            Severity.ERROR,
            f"layout {layout} has ep{layout.ep} beside tp{layout.tp}: ModelOpt refuses both at once for "
            "experts one by one (TP+EP is not supported by QuantSequentialMLP); take tp1 or ep1",
            expected="tp1 or ep1",
            actual=str(layout),
        )


def _split_sizes(architecture: Architecture, layout: Layout) -> Iterator[tuple[str, int, int, str]]:
    """(argument, size, ranks it is split over, axis) of everything that must be whole on each rank."""
    tp = layout.tp
    # Megatron asks this of attention heads also where no layer has any.
    heads, groups = (architecture.arguments[f"num_{name}"] for name in ("attention_heads", "query_groups"))
    yield "num_attention_heads", heads, tp, "tp"
    if groups != heads and tp % groups:
        yield "num_query_groups", groups, tp, "tp"
    yield "padded_vocab_size", architecture.padded_vocab_size, tp, "tp"
    mamba, delta = architecture.mamba, architecture.delta
    if mamba is not None:
        yield "mamba_num_heads", mamba.mamba_num_heads, tp, "tp"
        yield "mamba_num_groups", mamba.mamba_num_groups, tp, "tp"
    if delta is not None:
        axis = "tp" if layout.cp == 1 else "tp x cp = "
        yield "linear_num_key_heads", delta.linear_num_key_heads, tp * layout.cp, axis
        yield "linear_num_value_heads", delta.linear_num_value_heads, tp * layout.cp, axis
    dense, moe = architecture.dense, architecture.moe
    if dense is not None:
        yield "ffn_hidden_size", dense.ffn_hidden_size, tp, "tp"
    if moe is not None:
        yield "num_experts", moe.num_experts, layout.ep, "ep"
        yield "moe_ffn_hidden_size", moe.expert.ffn_hidden_size, layout.etp, "etp"
        if moe.shared is not None:
            yield "moe_shared_expert_intermediate_size", moe.shared.ffn_hidden_size, tp, "tp"


# ---- what a block size divides ----


def _blocks(architecture: Architecture, layout: Layout, recipe: Recipe) -> Iterator[Finding]:
    """A warning for each input dimension, per rank, that a block size of the recipe does not divide."""
    for dest, size, ranks, role in _input_dimensions(architecture, layout):
        for block in recipe.block_sizes:
            if size % ranks == 0 and size // ranks % block:
                per_rank = f"{size} / {ranks} = {size // ranks}" if ranks > 1 else f"{size}"
                yield architecture.arguments.finding(
                    dest,
                    f"{role} takes {per_rank} inputs, not a multiple of {block}: {recipe.name} pads its last "
                    "block with zeros, and the forward pass does not show it",
                    stage="audit",
                    severity=Severity.WARNING,
                    expected=f"a multiple of {block}",
                    actual=size // ranks,
                )


def _input_dimensions(architecture: Architecture, layout: Layout) -> Iterator[tuple[str, int, int, str]]:
    """(argument, full size, ranks it is split over, role) for every quantized matrix's inputs."""
    attention, latent = architecture.attention, architecture.latent
    mamba, delta = architecture.mamba, architecture.delta
    role = _takes_hidden(architecture)
    if role is not None:
        yield "hidden_size", architecture.hidden_size, 1, role
    if attention is not None:
        yield "kv_channels", attention.query_width, layout.tp, "linear_proj"
    if latent is not None:
        if latent.q_lora_rank is not None:
            yield "q_lora_rank", latent.q_lora_rank, 1, "linear_q_up_proj"
        yield "kv_lora_rank", latent.kv_lora_rank, 1, "linear_kv_up_proj"
        yield "v_head_dim", latent.value_width, layout.tp, "linear_proj"
    if mamba is not None:
        yield "mamba_head_dim", mamba.inner_width, layout.tp, "Mamba's out_proj"
    if delta is not None:
        yield "linear_value_head_dim", delta.value_width, layout.tp, "the delta net's out_proj"
    dense, moe = architecture.dense, architecture.moe
    if dense is not None:
        yield "ffn_hidden_size", dense.ffn_hidden_size, layout.tp, "linear_fc2"
    if moe is not None:
        if moe.latent_size is not None:
            yield "moe_latent_size", moe.latent_size, 1, "an expert's linear_fc1"
        yield "moe_ffn_hidden_size", moe.expert.ffn_hidden_size, layout.etp, "an expert's linear_fc2"
        if moe.shared is not None:
            yield (
                "moe_shared_expert_intermediate_size",
                moe.shared.ffn_hidden_size,
                layout.tp,
                "the shared expert's linear_fc2",
            )


def _takes_hidden(architecture: Architecture) -> str | None:
    """A quantized matrix whose input is the hidden size.

    Not latent attention's down-projections: ModelOpt does not quantize ``modelopt.layers.Linear``.
    """
    moe, latent = architecture.moe, architecture.latent
    matrices = (
        ("linear_qkv", architecture.attention is not None),
        ("linear_q_proj", latent is not None and latent.q_lora_rank is None),
        ("in_proj", architecture.mamba is not None or architecture.delta is not None),
        ("linear_fc1", architecture.dense is not None),
        ("an expert's linear_fc1", moe is not None and moe.latent_size is None),
        ("the shared expert's linear_fc1", moe is not None and moe.shared is not None),
    )
    return next((name for name, there in matrices if there), None)
