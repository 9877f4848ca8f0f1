"""Layout rules: an architecture and a layout -> what of it would not run, and whose limit that is.

Read off megatron-core 0.19 and ModelOpt 0.47; a rule names where. Nothing is built to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from harness.finding import Finding, Severity
from harness.rank import UnevenStages, stages_of

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layout import Layout


class Owner(StrEnum):
    """Whose limit it is."""

    MEGATRON = "Megatron"
    MODELOPT = "ModelOpt"


@dataclass(frozen=True, slots=True)
class Limit:
    """One thing that a layout asks of a model and that does not go.

    ``rule`` names the rule in words; ``dest`` is the argument at fault, None where the layout alone is.
    ``impossible`` says that the layout has no meaning for such a model, whatever its sizes: the user asked
    for something else than was meant.
    """

    rule: str
    owner: Owner
    text: str
    dest: str | None = None
    expected: object = None
    actual: object = None
    impossible: bool = False

    @property
    def message(self) -> str:
        return f"{self.owner}: {self.text}"


def broken_limits(architecture: Architecture, layout: Layout) -> tuple[Limit, ...]:
    """Every limit that ``layout`` breaks for this model, in a fixed order; none where it can be run."""
    return tuple(limit for rule in _RULES for limit in rule(architecture, layout))


def why_impossible(architecture: Architecture, layout: Layout) -> str | None:
    """Why ``layout`` has no meaning for this model: more stages than layers, or ep without experts.

    None where it has one, even if something refuses it.
    """
    return next((limit.message for limit in broken_limits(architecture, layout) if limit.impossible), None)


def limit_findings(architecture: Architecture, limits: Iterable[Limit]) -> Iterator[Finding]:
    """An error for each of the broken ``limits``, at the flag that sets the size at fault."""
    for limit in limits:
        if limit.dest is None:
            yield Finding(
                "audit", Severity.ERROR, limit.message, expected=limit.expected, actual=limit.actual
            )
        else:
            yield architecture.arguments.finding(
                limit.dest, limit.message, stage="audit", expected=limit.expected, actual=limit.actual
            )


def group_split(architecture: Architecture, layout: Layout) -> str | None:
    """How the query groups fall on the tensor ranks, in words; None without grouped attention.

    With fewer groups than ranks each rank computes the queries, keys and values of one whole group from
    gathered projections, and keeps its share of the group's heads (``core/transformer/attention.py``).
    """
    attention = architecture.attention
    if attention is None:
        return None
    groups, tp = attention.num_query_groups, layout.tp
    if groups % tp == 0:
        return f"{groups // tp} groups per rank" if groups // tp > 1 else "1 group per rank"
    if tp % groups == 0:
        return f"each group shared by {tp // groups} ranks"
    return f"{groups} groups do not fall on {tp} ranks"


# ---- the rules ----


def _uneven(rule: str, dest: str, what: str, size: int, parts: int, axis: str) -> Iterator[Limit]:
    """A limit where ``parts`` does not divide ``size``."""
    if size % parts:
        text = f"{size} {what} / {axis}{parts} is not whole"
        yield Limit(rule, Owner.MEGATRON, text, dest, f"a multiple of {parts}", size)


def _heads(architecture: Architecture, layout: Layout) -> Iterator[Limit]:
    """TransformerConfig asks this of attention heads also where no layer has any."""
    arguments, tp = architecture.arguments, layout.tp
    heads, groups = arguments["num_attention_heads"], arguments["num_query_groups"]
    yield from _uneven("attention heads", "num_attention_heads", "attention heads", heads, tp, "tp")
    if groups != heads and groups % tp and tp % groups:
        text = f"{groups} query groups / tp{tp} is not whole, nor is tp{tp} / {groups} groups"
        expected = f"a multiple or a divisor of {tp}"
        yield Limit("query groups", Owner.MEGATRON, text, "num_query_groups", expected, groups)


def _qkv(architecture: Architecture, layout: Layout) -> Iterator[Limit]:
    """Groups that ranks share are still split by rows in the fused projection (ColumnParallelLinear)."""
    attention, tp = architecture.attention, layout.tp
    if attention is not None and attention.num_attention_heads % tp == 0:
        what = "rows of linear_qkv"
        yield from _uneven("fused projection", "kv_channels", what, attention.qkv_width, tp, "tp")


def _vocabulary(architecture: Architecture, layout: Layout) -> Iterator[Limit]:
    size = architecture.padded_vocab_size
    yield from _uneven("vocabulary", "padded_vocab_size", "tokens", size, layout.tp, "tp")


def _mamba(architecture: Architecture, layout: Layout) -> Iterator[Limit]:
    """Asserts of MambaMixer and, for context parallel ranks, of MambaContextParallel."""
    mamba, tp, cp = architecture.mamba, layout.tp, layout.cp
    if mamba is None:
        return
    heads, groups = mamba.mamba_num_heads, mamba.mamba_num_groups
    axis = "tp" if cp == 1 else "tp x cp = "
    yield from _uneven("Mamba heads", "mamba_num_heads", "Mamba heads", heads, tp * cp, axis)
    yield from _uneven("Mamba groups", "mamba_num_groups", "Mamba groups", groups, tp, "tp")
    if groups % tp == 0 and groups // tp % cp and cp % (groups // tp):
        text = f"{groups // tp} Mamba groups per tensor rank / cp{cp} is not whole, nor is its inverse"
        expected = f"a multiple or a divisor of {cp}"
        yield Limit("Mamba groups", Owner.MEGATRON, text, "mamba_num_groups", expected, groups // tp)


def _delta(architecture: Architecture, layout: Layout) -> Iterator[Limit]:
    """Of GatedDeltaNet, which splits whole heads over tensor and context parallel ranks."""
    delta, ranks = architecture.delta, layout.tp * layout.cp
    if delta is None:
        return
    axis = "tp" if layout.cp == 1 else "tp x cp = "
    keys, values = delta.linear_num_key_heads, delta.linear_num_value_heads
    yield from _uneven("linear heads", "linear_num_key_heads", "linear key heads", keys, ranks, axis)
    yield from _uneven("linear heads", "linear_num_value_heads", "linear value heads", values, ranks, axis)


def _feed_forward(architecture: Architecture, layout: Layout) -> Iterator[Limit]:
    dense, moe, rule = architecture.dense, architecture.moe, "ffn"
    if dense is not None:
        what, size = "ffn channels", dense.ffn_hidden_size
        yield from _uneven(rule, "ffn_hidden_size", what, size, layout.tp, "tp")
    if moe is None:
        return
    what, size = "channels of an expert", moe.expert.ffn_hidden_size
    yield from _uneven("expert ffn", "moe_ffn_hidden_size", what, size, layout.etp, "etp")
    if moe.shared is not None:
        dest, size = "moe_shared_expert_intermediate_size", moe.shared.ffn_hidden_size
        what = "channels of the shared expert"
        yield from _uneven("shared expert ffn", dest, what, size, layout.tp, "tp")


def _experts(architecture: Architecture, layout: Layout) -> Iterator[Limit]:
    moe = architecture.moe
    if moe is not None:
        yield from _uneven("experts", "num_experts", "experts", moe.num_experts, layout.ep, "ep")
        if moe.expert.bias and layout.etp > 1:
            # TransformerConfig.__post_init__: "Bias in Moe is only supported when ETP==1".
            text = f"experts with biases go with etp1 only, not with etp{layout.etp}"
            dest = "add_bias_linear"
            yield Limit("expert biases", Owner.MEGATRON, text, dest, "etp1", f"etp{layout.etp}")
        if layout.tp > 1 and layout.ep > 1:
            # _MegatronSequentialMLP._setup in modelopt/torch/quantization/plugins/megatron.py.
            text = (
                f"tp{layout.tp} beside ep{layout.ep} is refused for experts one by one (TP+EP is not "
                "supported by QuantSequentialMLP): take tp1 or ep1"
            )
            yield Limit("tp with ep", Owner.MODELOPT, text, None, "tp1 or ep1", str(layout))
        return
    if layout.ep > 1:
        text = f"ep{layout.ep} needs experts, and the model has none"
        yield Limit("no experts", Owner.MEGATRON, text, "num_experts", "ep1", str(layout), impossible=True)
    if layout.etp not in (1, layout.tp):
        text = f"etp{layout.etp} needs experts, and the model has none"
        yield Limit("no experts", Owner.MEGATRON, text, "num_experts", "no etp", str(layout), impossible=True)


def _stages(architecture: Architecture, layout: Layout) -> Iterator[Limit]:
    """TransformerBlock's layers per stage, and select_pipeline_segment of a hybrid's pattern."""
    dest = "hybrid_layer_pattern" if architecture.hybrid else "num_layers"
    layers = architecture.num_layers
    if layers < layout.pp:
        text = f"{layers} layers cannot fill {layout.pp} pipeline stages"
        expected = f"at least {layout.pp}"
        yield Limit("stages", Owner.MEGATRON, text, dest, expected, layers, impossible=True)
        return
    try:
        stages_of(architecture, layout)
    except UnevenStages as error:
        yield Limit("stages", Owner.MEGATRON, str(error), dest, actual=layers)


def _sequence(architecture: Architecture, layout: Layout) -> Iterator[Limit]:
    """``validate_args`` in megatron/training/arguments.py."""
    length, parts = architecture.arguments["seq_length"], 2 * layout.cp
    if layout.cp > 1 and isinstance(length, int):
        yield from _uneven("sequence", "seq_length", "tokens of a sequence", length, parts, "2 x cp = ")


_RULES: tuple[Callable[[Architecture, Layout], Iterator[Limit]], ...] = (
    _heads,
    _qkv,
    _vocabulary,
    _mamba,
    _delta,
    _feed_forward,
    _experts,
    _stages,
    _sequence,
)
