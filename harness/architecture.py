"""Architecture: Megatron's effective arguments -> the typed dimensions and layer kinds they mean.

What the arithmetic side of the harness (inventory, audit, shrink, reference) reads. ``MODELLED`` lists
every argument that changes the model and that this side understands; a preset that sets any other
model flag away from its default is told so, never waved through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from harness.arguments import Arguments
from harness.finding import Finding, Severity
from harness.flags import Flag, Role


class Norm(StrEnum):
    RMS = "RMSNorm"
    LAYER = "LayerNorm"


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query self attention; MHA has as many groups as heads."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    qkv_bias: bool
    output_bias: bool
    qk_layernorm: bool

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_query_groups * self.kv_channels


@dataclass(frozen=True, slots=True)
class Dense:
    """A feed-forward layer; ``gated`` doubles the first matrix (swiglu)."""

    ffn_hidden_size: int
    gated: bool
    bias: bool

    @property
    def fc1_width(self) -> int:
        return self.ffn_hidden_size * (2 if self.gated else 1)


@dataclass(frozen=True, slots=True)
class MoE:
    """Routed experts, each a ``Dense``, and the optional shared expert beside them."""

    num_experts: int
    moe_router_topk: int
    expert: Dense
    shared: Dense | None
    shared_gate: bool
    router_bias: bool
    num_groups: int | None
    group_topk: int | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer. Layers that compare equal are of one kind."""

    attention: Attention
    mlp: Dense | MoE

    @property
    def kind(self) -> str:
        return "moe" if isinstance(self.mlp, MoE) else "dense"


@dataclass(frozen=True)
class Architecture:
    """The dimensions of one model at full size or shrunken, and the arguments they come from."""

    arguments: Arguments
    hidden_size: int
    padded_vocab_size: int
    max_position_embeddings: int
    learned_positions: bool
    tied_embeddings: bool
    normalization: Norm
    layers: tuple[Layer, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> Attention:
        return self.layers[0].attention

    @property
    def dense(self) -> Dense | None:
        """The feed-forward kind of the dense layers, None where every layer is MoE."""
        return next((layer.mlp for layer in self.layers if isinstance(layer.mlp, Dense)), None)

    @property
    def moe(self) -> MoE | None:
        return next((layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)), None)

    @property
    def kind(self) -> str:
        """``dense`` or ``moe``, as ``harness list`` prints it."""
        return "moe" if self.moe else "dense"


# Every argument that changes the model and that the reference, inventory and shrink stages understand,
# besides those that only take part in deriving another.
MODELLED = frozenset(
    """
    num_layers encoder_num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention
    num_query_groups kv_channels qk_layernorm add_bias_linear add_qkv_bias normalization
    layernorm_epsilon layernorm_zero_centered_gamma swiglu squared_relu position_embedding_type
    use_rotary_position_embeddings add_position_embedding rotary_base rotary_percent rotary_interleaved
    rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor max_position_embeddings
    seq_length encoder_seq_length padded_vocab_size vocab_size make_vocab_size_divisible_by
    untie_embeddings_and_output_weights num_experts moe_ffn_hidden_size moe_router_topk moe_layer_freq
    moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor
    moe_router_enable_expert_bias moe_router_num_groups moe_router_group_topk
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_dtype attention_dropout
    hidden_dropout bf16 apply_query_key_layer_scaling attention_softmax_in_fp32
    """.split()
)


class NotAModel(Exception):
    """The arguments lack a dimension without which no model can be described; ``dest`` names it."""

    def __init__(self, message: str, dest: str) -> None:
        super().__init__(message)
        self.dest = dest


def architecture(arguments: Arguments) -> Architecture:
    """The architecture that ``arguments`` mean. Raises NotAModel where a dimension is missing or absurd."""
    values = arguments.values
    for dest in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        _dimension(values, dest)
    if values["padded_vocab_size"] is None:
        raise NotAModel("the vocabulary size is not known: set --padded-vocab-size", "padded_vocab_size")
    attention = _attention(values)
    dense = Dense(_dimension(values, "ffn_hidden_size"), values["swiglu"], values["add_bias_linear"])
    moe = _moe(values) if values["num_experts"] else None
    return Architecture(
        arguments=arguments,
        hidden_size=values["hidden_size"],
        padded_vocab_size=_dimension(values, "padded_vocab_size"),
        max_position_embeddings=values["max_position_embeddings"],
        learned_positions=values["position_embedding_type"] == "learned_absolute",
        tied_embeddings=not values["untie_embeddings_and_output_weights"],
        normalization=Norm(values["normalization"]),
        layers=tuple(Layer(attention, mlp) for mlp in _feed_forward(values, dense, moe)),
    )


def _feed_forward(values: Mapping[str, Any], dense: Dense, moe: MoE | None) -> Iterator[Dense | MoE]:
    if moe is None:
        yield from [dense] * values["num_layers"]
        return
    for is_moe in moe_layers(values["moe_layer_freq"], values["num_layers"]):
        yield moe if is_moe else dense


def moe_layers(frequency: int | Sequence[int], num_layers: int) -> tuple[bool, ...]:
    """Which layers hold experts: every ``frequency``-th from the first, or the pattern as given."""
    if isinstance(frequency, int):
        if frequency < 1:
            raise NotAModel("--moe-layer-freq must be at least 1", "moe_layer_freq")
        return tuple(index % frequency == 0 for index in range(num_layers))
    if len(frequency) != num_layers:
        raise NotAModel(
            f"--moe-layer-freq names {len(frequency)} layers, --num-layers {num_layers}", "moe_layer_freq"
        )
    return tuple(bool(entry) for entry in frequency)


def unmodelled(flags: Sequence[Flag]) -> tuple[Finding, ...]:
    """An error for every flag that changes the model and that the harness does not model."""
    return tuple(
        Finding(
            "reference",
            Severity.ERROR,
            f"{flag.name} changes the model ({flag.spec.reason}), and the harness does not model it: "
            "nothing here says whether its value is right",
            flag.name,
            flag.line,
            flag.column,
            expected=flag.spec.default,
            actual=flag.value,
        )
        for flag in flags
        if flag.spec.role is Role.MODEL
        and flag.dest not in MODELLED
        and flag.value != flag.spec.default
        and not _is_inert(flag)
    )


# Values of unmodelled flags that change nothing in the model that the ModelOpt example builds.
_INERT: Mapping[str, frozenset[str]] = {
    "transformer_impl": frozenset({"transformer_engine"}),
    "export_model_type": frozenset({"GPTModel"}),
    # The others of its choices pick other experts than plain top-k.
    "moe_router_load_balancing_type": frozenset({"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}),
}


def _is_inert(flag: Flag) -> bool:
    values = flag.value if isinstance(flag.value, tuple) else (flag.value,)
    return set(values) <= _INERT.get(flag.dest, frozenset())


# Far beyond any model, and small enough that no loop over them takes long.
_LARGEST = {"num_layers": 10_000, "num_attention_heads": 2**16, "num_experts": 2**16, "kv_channels": 2**16}


def _dimension(values: Mapping[str, Any], dest: str) -> int:
    value = values[dest]
    if not isinstance(value, int) or not 0 < value <= _LARGEST.get(dest, 2**24):
        raise NotAModel(f"{dest} is {value!r}, which is no dimension of any model", dest)
    return value


def _attention(values: Mapping[str, Any]) -> Attention:
    heads, groups = _dimension(values, "num_attention_heads"), _dimension(values, "num_query_groups")
    if heads % groups:
        raise NotAModel(f"{heads} heads / {groups} groups is not whole", "num_query_groups")
    return Attention(
        heads,
        groups,
        _dimension(values, "kv_channels"),
        values["add_qkv_bias"],
        values["add_bias_linear"],
        values["qk_layernorm"],
    )


def _moe(values: Mapping[str, Any]) -> MoE:
    gated, bias = values["swiglu"], values["add_bias_linear"]
    shared = values["moe_shared_expert_intermediate_size"]
    if values["moe_router_topk"] > values["num_experts"]:
        raise NotAModel("--moe-router-topk is larger than --num-experts", "moe_router_topk")
    return MoE(
        num_experts=_dimension(values, "num_experts"),
        moe_router_topk=_dimension(values, "moe_router_topk"),
        expert=Dense(_dimension(values, "moe_ffn_hidden_size"), gated, bias),
        shared=Dense(shared, gated, bias) if shared else None,
        shared_gate=values["moe_shared_expert_gate"],
        router_bias=bias,
        num_groups=values["moe_router_num_groups"],
        group_topk=values["moe_router_group_topk"],
    )
