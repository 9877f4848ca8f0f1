"""Architecture: Megatron's effective arguments -> the typed dimensions and layer kinds they mean.

What the arithmetic side of the harness (inventory, audit, shrink, reference) reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.arguments import Arguments
from harness.arguments.kinds import main_pattern
from harness.layers import (
    Attention,
    Dense,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    Mamba,
    Mixer,
    MoE,
    Norm,
    QKNorm,
)


@dataclass(frozen=True)
class Architecture:
    """The dimensions of one model at full size or shrunken, and the arguments they come from.

    ``hybrid`` models are Megatron's HybridModel, of layers by pattern; the others its GPTModel.
    """

    arguments: Arguments
    hidden_size: int
    padded_vocab_size: int
    max_position_embeddings: int
    learned_positions: bool
    tied_embeddings: bool
    normalization: Norm
    hybrid: bool
    layers: tuple[Layer, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def pattern(self) -> str:
        """A hybrid's layers as symbols, its pipeline stages (``|``) left in; empty for the others."""
        return main_pattern(self.arguments.values) if self.hybrid else ""

    @cached_property
    def attention(self) -> Attention | None:
        """The first grouped-query attention; others differ from it in window and rope alone."""
        return self._first_mixer(Attention)

    @cached_property
    def latent(self) -> LatentAttention | None:
        return self._first_mixer(LatentAttention)

    @cached_property
    def mamba(self) -> Mamba | None:
        return self._first_mixer(Mamba)

    @cached_property
    def delta(self) -> GatedDeltaNet | None:
        return self._first_mixer(GatedDeltaNet)

    @cached_property
    def dense(self) -> Dense | None:
        """The feed-forward kind of the dense layers, None where no layer is dense."""
        return next((layer.mlp for layer in self.layers if isinstance(layer.mlp, Dense)), None)

    @cached_property
    def moe(self) -> MoE | None:
        return next((layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)), None)

    @cached_property
    def kind(self) -> str:
        """As ``harness list`` prints it: ``dense``, ``moe``, ``hybrid``, ``hybrid moe``."""
        return " ".join(
            word
            for word, said in (
                ("hybrid", self.hybrid),
                ("moe", self.moe is not None),
                ("dense", not self.hybrid and self.moe is None),
            )
            if said
        )

    def _first_mixer[M: Mixer](self, kind: type[M]) -> M | None:
        return next((layer.mixer for layer in self.layers if isinstance(layer.mixer, kind)), None)


class NotAModel(Exception):
    """The arguments lack a dimension without which no model can be described; ``dest`` names it."""

    def __init__(self, message: str, dest: str) -> None:
        super().__init__(message)
        self.dest = dest


def architecture(arguments: Arguments) -> Architecture:
    """The architecture that ``arguments`` mean. Raises NotAModel where a dimension is missing or absurd."""
    values = arguments.values
    hybrid = values["export_model_type"] == "HybridModel"
    for dest in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        _dimension(values, dest)
    if values["padded_vocab_size"] is None:
        raise NotAModel("the vocabulary size is not known: set --padded-vocab-size", "padded_vocab_size")
    return Architecture(
        arguments=arguments,
        hidden_size=values["hidden_size"],
        padded_vocab_size=_dimension(values, "padded_vocab_size"),
        max_position_embeddings=values["max_position_embeddings"],
        learned_positions=values["position_embedding_type"] == "learned_absolute",
        tied_embeddings=not values["untie_embeddings_and_output_weights"],
        normalization=Norm(values["normalization"]),
        hybrid=hybrid,
        layers=tuple(_hybrid_layers(values) if hybrid else _transformer_layers(values)),
    )


def _transformer_layers(values: Mapping[str, Any]) -> Iterator[Layer]:
    mixers: Iterable[Mixer] = _attentions(values)
    if values["multi_latent_attention"]:
        mixers = [_latent(values)] * values["num_layers"]
    dense = Dense(_dimension(values, "ffn_hidden_size"), _gated(values), values["add_bias_linear"])
    moe = _moe(values) if values["num_experts"] else None
    for mixer, mlp in zip(mixers, _feed_forward(values, dense, moe), strict=True):
        yield Layer(mixer, mlp)


def layer_symbols(pattern: str | None) -> str:
    """One symbol per layer of a hybrid pattern: without pipeline stages (``|``) and MTP (``/``)."""
    return (pattern or "").partition("/")[0].replace("|", "")


def _hybrid_layers(values: Mapping[str, Any]) -> Iterator[Layer]:
    dest = "hybrid_layer_pattern"
    symbols = layer_symbols(values[dest])
    if not symbols:
        raise NotAModel("a hybrid model needs --hybrid-layer-pattern, which names its layers", dest)
    kinds: dict[str, Layer] = {}
    attentions = list(_attentions(values)) if "*" in symbols else []
    for index, symbol in enumerate(symbols):
        if symbol == "*":
            yield Layer(attentions[index], None)
            continue
        if symbol not in kinds:
            kinds[symbol] = _hybrid_layer(symbol, values)
        yield kinds[symbol]


def _hybrid_layer(symbol: str, values: Mapping[str, Any]) -> Layer:
    if symbol == "M":
        return Layer(_mamba(values), None)
    if symbol == "G":
        return Layer(_delta(values), None)
    if symbol == "-":
        return Layer(
            None, Dense(_dimension(values, "ffn_hidden_size"), _gated(values), values["add_bias_linear"])
        )
    if symbol == "E":
        if not values["num_experts"]:
            raise NotAModel("layer E of --hybrid-layer-pattern needs --num-experts", "num_experts")
        return Layer(None, _moe(values))
    why = {
        "+": "ModelOpt's hybrid layers have no latent attention: Megatron would build nothing there",
        "D": "the harness does not model sparse attention",
    }.get(symbol, "Megatron knows M, G, *, -, E, + and D")
    raise NotAModel(f"layer {symbol!r} of --hybrid-layer-pattern: {why}", "hybrid_layer_pattern")


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


# Far beyond any model, and small enough that no loop over them takes long.
_LARGEST = {"num_layers": 10_000, "num_attention_heads": 2**16, "num_experts": 2**16, "kv_channels": 2**16}


def _dimension(values: Mapping[str, Any], dest: str) -> int:
    value = values[dest]
    if not isinstance(value, int) or not 0 < value <= _LARGEST.get(dest, 2**24):
        raise NotAModel(f"{dest} is {value!r}, which is no dimension of any model", dest)
    return value


def _gated(values: Mapping[str, Any]) -> bool:
    return bool(values["swiglu"] or values["quick_geglu"])


def _attentions(values: Mapping[str, Any]) -> Iterator[Attention]:
    """The grouped-query attention of every layer, in order."""
    heads, groups = _dimension(values, "num_attention_heads"), _dimension(values, "num_query_groups")
    if heads % groups:
        raise NotAModel(f"{heads} heads / {groups} groups is not whole", "num_query_groups")
    channels, layers = _dimension(values, "kv_channels"), values["num_layers"]
    norm = QKNorm.LEARNED if values["qk_layernorm"] else QKNorm.NONE
    norm = QKNorm.L2 if values["export_qk_l2_norm"] else norm
    window = values["window_size"]
    windowed = windowed_layers(values["window_attn_skip_freq"], layers) if window else [False] * layers
    for has_window, no_rope in zip(windowed, no_rope_layers(values["no_rope_freq"], layers), strict=True):
        yield Attention(
            heads,
            groups,
            channels,
            qkv_bias=values["add_qkv_bias"],
            output_bias=values["add_bias_linear"],
            qk_norm=norm,
            window=tuple(window) if has_window else None,
            rope=not no_rope,
            sinks=values["softmax_type"] == "learnable",
            output_gate=values["attention_output_gate"],
        )


def windowed_layers(skip_frequency: int | Sequence[int] | None, num_layers: int) -> tuple[bool, ...]:
    """Which layers have the sliding window: all but every n-th, the pattern as given, or all."""
    if skip_frequency is None:
        return (True,) * num_layers
    if isinstance(skip_frequency, int):
        if skip_frequency < 1:
            raise NotAModel("--window-attn-skip-freq must be at least 1", "window_attn_skip_freq")
        return tuple((index + 1) % skip_frequency != 0 for index in range(num_layers))
    return _per_layer(skip_frequency, num_layers, "window_attn_skip_freq")


def no_rope_layers(frequency: int | Sequence[int] | None, num_layers: int) -> tuple[bool, ...]:
    """Which layers skip the rotary embedding: every n-th, the pattern as given, or none."""
    if not frequency:
        return (False,) * num_layers
    if isinstance(frequency, int):
        if frequency < 1 or num_layers % frequency:
            raise NotAModel(
                f"--no-rope-freq {frequency} does not divide --num-layers {num_layers}", "no_rope_freq"
            )
        return tuple((index + 1) % frequency == 0 for index in range(num_layers))
    return _per_layer(frequency, num_layers, "no_rope_freq")


# Arguments that say of every layer whether it has something, and how their values are read.
PER_LAYER: Mapping[str, Callable[[Any, int], tuple[bool, ...]]] = {
    "moe_layer_freq": moe_layers,
    "window_attn_skip_freq": windowed_layers,
    "no_rope_freq": no_rope_layers,
}


def _per_layer(pattern: Sequence[int], num_layers: int, dest: str) -> tuple[bool, ...]:
    if len(pattern) != num_layers:
        flag = "--" + dest.replace("_", "-")
        raise NotAModel(f"{flag} names {len(pattern)} layers, --num-layers {num_layers}", dest)
    return tuple(map(bool, pattern))


def _latent(values: Mapping[str, Any]) -> LatentAttention:
    return LatentAttention(
        num_attention_heads=_dimension(values, "num_attention_heads"),
        q_lora_rank=None if values["q_lora_rank"] is None else _dimension(values, "q_lora_rank"),
        kv_lora_rank=_dimension(values, "kv_lora_rank"),
        qk_head_dim=_dimension(values, "qk_head_dim"),
        qk_pos_emb_head_dim=_dimension(values, "qk_pos_emb_head_dim"),
        v_head_dim=_dimension(values, "v_head_dim"),
        output_bias=values["add_bias_linear"],
    )


def _mamba(values: Mapping[str, Any]) -> Mamba:
    mamba = Mamba(
        mamba_num_heads=_dimension(values, "mamba_num_heads"),
        mamba_head_dim=_dimension(values, "mamba_head_dim"),
        mamba_state_dim=_dimension(values, "mamba_state_dim"),
        mamba_num_groups=_dimension(values, "mamba_num_groups"),
    )
    if mamba.mamba_num_heads % mamba.mamba_num_groups:
        message = f"{mamba.mamba_num_heads} Mamba heads / {mamba.mamba_num_groups} groups is not whole"
        raise NotAModel(message, "mamba_num_groups")
    return mamba


def _delta(values: Mapping[str, Any]) -> GatedDeltaNet:
    delta = GatedDeltaNet(
        linear_num_key_heads=_dimension(values, "linear_num_key_heads"),
        linear_key_head_dim=_dimension(values, "linear_key_head_dim"),
        linear_num_value_heads=_dimension(values, "linear_num_value_heads"),
        linear_value_head_dim=_dimension(values, "linear_value_head_dim"),
        linear_conv_kernel_dim=_dimension(values, "linear_conv_kernel_dim"),
    )
    keys, heads = delta.linear_num_key_heads, delta.linear_num_value_heads
    if heads % keys:
        message = f"{heads} linear value heads / {keys} key heads is not whole"
        raise NotAModel(message, "linear_num_key_heads")
    return delta


def _moe(values: Mapping[str, Any]) -> MoE:
    gated, bias = _gated(values), values["add_bias_linear"]
    shared, latent = values["moe_shared_expert_intermediate_size"], values["moe_latent_size"]
    if values["moe_router_topk"] > values["num_experts"]:
        raise NotAModel("--moe-router-topk is larger than --num-experts", "moe_router_topk")
    if shared and bias:
        message = "Megatron refuses biases in shared experts: set --disable-bias-linear"
        raise NotAModel(message, "moe_shared_expert_intermediate_size")
    return MoE(
        num_experts=_dimension(values, "num_experts"),
        moe_router_topk=_dimension(values, "moe_router_topk"),
        expert=Dense(_dimension(values, "moe_ffn_hidden_size"), gated, bias),
        shared=Dense(shared, gated, bias) if shared else None,
        shared_gate=values["moe_shared_expert_gate"],
        router_bias=bias,
        num_groups=values["moe_router_num_groups"],
        group_topk=values["moe_router_group_topk"],
        expert_bias=values["moe_router_enable_expert_bias"],
        latent_size=None if latent is None else _dimension(values, "moe_latent_size"),
    )
