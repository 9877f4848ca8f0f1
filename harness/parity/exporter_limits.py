"""Exporter limits: differences that ModelOpt's exporter makes whatever the preset, each tied to its place.

A row excuses the findings that it is tied to and no other; the export then is unsupported, in its words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.finding import Finding
from harness.layers import Dense, MoE
from harness.layout_rules import Owner
from harness.parity.stored import Kind

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.parity.expected import Expected

_FILE = "unified_export_megatron.py"
# The kinds whose config ``GPTModelExporter.save_pretrained`` writes.
_SAID = {Kind.FP8, Kind.NVFP4, Kind.NVFP4_WEIGHTS}


@dataclass(frozen=True, slots=True)
class Known:
    """``applies`` to a finding of an export of such tensors and such a model; ``words`` say what is wrong."""

    applies: Callable[[Finding, Sequence[Expected], Architecture], bool]
    words: str


def _without_scale(finding: Finding, expecteds: Sequence[Expected], small: Architecture) -> bool:
    return _subject(finding).endswith(".pre_quant_scale") and finding.actual is None


def _without_config(finding: Finding, expecteds: Sequence[Expected], small: Architecture) -> bool:
    kinds = {one.weight.kind for one in expecteds if one.weight is not None}
    return finding.message.startswith("hf_quant_config.json  is missing") and not kinds & _SAID


def _head_dim(finding: Finding, expecteds: Sequence[Expected], small: Architecture) -> bool:
    wrong = finding.message.startswith("config.json  head_dim is ")
    return wrong and small.latent is not None and finding.actual == small.arguments["kv_channels"]


def _expert_size(finding: Finding, expecteds: Sequence[Expected], small: Architecture) -> bool:
    wrong = finding.message.startswith(
        ("config.json  intermediate_size is ", "config.json  text_config.intermediate_size is ")
    )
    if not wrong:
        return False
    experts = {layer.mlp.expert.ffn_hidden_size for layer in small.layers if isinstance(layer.mlp, MoE)}
    dense = {layer.mlp.ffn_hidden_size for layer in small.layers if isinstance(layer.mlp, Dense)}
    published = finding.expected in experts - dense
    return published and finding.actual == small.arguments["ffn_hidden_size"]


KNOWN = (
    Known(
        _without_scale,
        "the exporter leaves out pre_quant_scale, the scale per input channel that calibration moved into "
        f"the weights, without a word where inputs are not quantized (_get_quantized_state in {_FILE}): what "
        "is exported gives other outputs",
    ),
    Known(
        _without_config,
        f"the exporter writes no quantization config for this format (save_pretrained in {_FILE} knows FP8 "
        "and NVFP4): no reader can tell that weights are packed",
    ),
    Known(
        _head_dim,
        f"the exporter writes --kv-channels as head_dim (GPTModelExporter in {_FILE}), which in latent "
        "attention is no size of anything; transformers rotates so many channels",
    ),
    Known(
        _expert_size,
        f"the exporter writes --ffn-hidden-size as intermediate_size (GPTModelExporter in {_FILE}), which in "
        "this family is the size of an expert",
    ),
)


def divided(
    findings: Iterable[Finding], expecteds: Sequence[Expected], small: Architecture
) -> tuple[tuple[Finding, ...], str]:
    """The findings that no row excuses, and the words of the rows that excuse others; empty where none."""
    left, words = [], []
    for finding in findings:
        known = next((one for one in KNOWN if one.applies(finding, expecteds, small)), None)
        if known is None:
            left.append(finding)
        elif known.words not in words:
            words.append(known.words)
    return tuple(left), f"{Owner.MODELOPT}: {'; '.join(words)}" if words else ""


def _subject(finding: Finding) -> str:
    """The tensor that the message begins with."""
    return finding.message.partition("  ")[0]
