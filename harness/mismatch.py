"""Mismatch: what a case found -> the first module where shapes part, what goes in and comes out, and the
flags that make those sizes.

Where the small model is right by its own arithmetic, it is the real one that is compared: the preset's
parameters with those that the published figures make. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.activations import activations
from harness.architecture import Architecture, NotAModel, architecture
from harness.arguments import Arguments
from harness.arguments.effective import NO_EFFECT, effective
from harness.case import Mismatch, Size
from harness.families import Expectation, Reads, expectations
from harness.inventory import parameters
from harness.reference import same_value, shown_value

if TYPE_CHECKING:
    from harness.facts import Facts
    from harness.finding import Finding
    from harness.shrink import ShrinkPlan

# Larger than any real number of tokens or sequences, and no product of sizes: written as s and b.
_SEQUENCE, _BATCH = 1_000_003, 1_000_033
_LETTERS = {_SEQUENCE: "s", _BATCH: "b", _SEQUENCE * _BATCH: "s b"}

# By what a module's path has in it, the first that fits: the arguments that make its sizes.
_SIZES: tuple[tuple[str, str], ...] = (
    (r"^embedding\.position", "max_position_embeddings hidden_size"),
    (r"^embedding|^output_layer", "padded_vocab_size hidden_size"),
    (r"\.router", "hidden_size num_experts moe_router_topk moe_router_num_groups moe_router_group_topk"),
    (r"\.fc[12]_latent_proj", "hidden_size moe_latent_size"),
    (r"\.shared_experts", "hidden_size moe_shared_expert_intermediate_size"),
    (r"\.experts", "hidden_size moe_latent_size num_experts moe_ffn_hidden_size"),
    (r"\.mlp\b", "hidden_size ffn_hidden_size"),
    (r"\.mixer", "hidden_size mamba_num_heads mamba_head_dim mamba_num_groups mamba_state_dim"),
    (r"norm$", "hidden_size"),
)
_ATTENTION = "hidden_size num_attention_heads num_query_groups kv_channels"
_LATENT = (
    "hidden_size num_attention_heads q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim"
)
_DELTA = (
    "hidden_size linear_num_key_heads linear_key_head_dim linear_num_value_heads linear_value_head_dim "
    "linear_conv_kernel_dim"
)


def first_mismatch(
    findings: Sequence[Finding], full: Architecture | None, facts: Facts | None, plan: ShrinkPlan | None
) -> Mismatch | None:
    """None where no shape is wrong."""
    if full is None:
        return None
    published = published_values(full.arguments, facts)
    at = next((finding for finding in findings if finding.is_error and _has_place(finding)), None)
    if at is not None and at.module is not None and plan is not None:
        shown = [*_of_finding(at), *_sides(plan.after, None, at.module)]
        return Mismatch(at.module, tuple(shown), tuple(_sizes(at.module, full, published, plan.after)))
    return _against_published(full, published)


def _has_place(finding: Finding) -> bool:
    """Parity has told its own place in its message."""
    return bool(finding.module) and finding.stage in ("build", "forward", "quantize")


def published_values(arguments: Arguments, facts: Facts | None) -> dict[str, Any]:
    """What the publisher says of the arguments that the preset has otherwise."""
    found: dict[str, Any] = {}
    if facts is None or facts.family is None:
        return found
    for item in expectations(facts.family, Reads(facts.config)):
        if isinstance(item, Expectation):
            layers = len(item.value) if isinstance(item.value, tuple) else None
            actual = effective(arguments, item.dest, layers)
            if actual is not NO_EFFECT and not same_value(actual, item.value):
                found[item.dest] = item.value
    return found


def _against_published(full: Architecture, published: Mapping[str, Any]) -> Mismatch | None:
    try:
        wanted = architecture(full.arguments.replaced(published)) if published else full
    except NotAModel:
        return None
    mine, theirs = parameters(full), parameters(wanted)
    names = [name for name in theirs if mine.get(name) != theirs[name]]
    names += [name for name in mine if name not in theirs]
    if not names:
        return None
    module, _, parameter = names[0].rpartition(".")
    here, there = (by(side[names[0]]) if names[0] in side else "none" for side in (mine, theirs))
    lines = [(parameter, f"{here}, {there} published"), *_sides(full, wanted, module)]
    return Mismatch(module, tuple(lines), tuple(_sizes(module, full, published, None)))


def _of_finding(finding: Finding) -> Iterator[tuple[str, str]]:
    if isinstance(finding.expected, list | tuple) and isinstance(finding.actual, list | tuple):
        side = re.search(r"  (\w+(?: \d+)?) is ", finding.message)
        yield side[1] if side else "shape", f"{by(finding.actual)}, expected {by(finding.expected)}"


def _sides(model: Architecture, other: Architecture | None, module: str) -> Iterator[tuple[str, str]]:
    """What the module takes and gives by arithmetic, beside what it would in ``other``."""
    mine, theirs = (_activations(side).get(module) for side in (model, other))
    if mine is None:
        return
    for word, shapes, wanted in (
        ("takes", mine.inputs, theirs.inputs if theirs else mine.inputs),
        ("gives", mine.outputs, theirs.outputs if theirs else mine.outputs),
    ):
        if shapes:
            said = " and ".join(map(by, shapes))
            yield word, said if shapes == wanted else f"{said}, {' and '.join(map(by, wanted))} published"


def _activations(model: Architecture | None) -> Mapping[str, Any]:
    return activations(model, sequence_length=_SEQUENCE, batch_size=_BATCH) if model is not None else {}


def by(shape: Iterable[int]) -> str:
    """A shape as people write it, tokens as ``s``, sequences as ``b``: ``s x b x 4096``."""
    return " x ".join(_LETTERS.get(size, str(size)) for size in shape) or "one number"


# ---- sizes ----


def _sizes(
    module: str, full: Architecture, published: Mapping[str, Any], small: Architecture | None
) -> Iterator[Size]:
    arguments = full.arguments
    for dest in _dests(module, full):
        value, origin = arguments[dest], arguments.origin(dest)
        if value is None and dest not in published:
            continue
        tiny = small.arguments[dest] if small is not None else value
        yield Size(
            origin.flag,
            origin.line,
            shown_value(dest, value),
            shown_value(dest, tiny) if tiny != value else None,
            shown_value(dest, published[dest]) if dest in published else None,
        )


def _dests(module: str, full: Architecture) -> list[str]:
    """The arguments behind the sizes of a module."""
    if ".self_attention" in module:
        index = re.search(r"layers\.(\d+)\.", module)
        number = int(index[1]) if index else 0
        mixer = full.layers[number].mixer if number < len(full.layers) else None
        if full.latent is not None:
            return _LATENT.split()
        if full.delta is not None and (mixer == full.delta or module.endswith(("in_proj", "out_proj"))):
            return _DELTA.split()
        return _ATTENTION.split()
    return next((dests.split() for pattern, dests in _SIZES if re.search(pattern, module)), ["hidden_size"])
