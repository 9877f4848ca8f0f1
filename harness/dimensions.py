"""Dimensions: an architecture and a layout -> every size that blocks of a quantizer may not divide.

Inputs of matrices, along which blocks of one dimension lie; outputs, for blocks of two; and the heads of
the keys and values of a cache. Of the decoder's layers and the output layer; a convolution's kernel is no
dimension here, and learned positions are as wide as the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from harness.arguments import flag_for
from harness.layers import Dense

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layers import MoE
    from harness.layout import Layout

INPUTS, OUTPUTS = -1, -2
_MATRIX = ("weight", "input")
# Of two dimensions only a weight's are a matrix's own; the other one of its inputs counts tokens.
_WEIGHT = ("weight",)
_CORE = ("self_attention.core_attention",)


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension of quantized tensors: what sets it, and how many ranks share it.

    ``size`` is of the whole model, ``factors`` the arguments that make it, the one at fault first.
    ``matrices`` are module paths within a layer, the number of a routed expert left out; ``axis`` is the
    dimension of theirs, ``quantizers`` those that see it.
    """

    factors: tuple[str, ...]
    size: int
    parts: int
    matrices: tuple[str, ...]
    axis: int = INPUTS
    quantizers: tuple[str, ...] = _MATRIX

    @property
    def whole(self) -> bool:
        return self.size % self.parts == 0

    @property
    def per_rank(self) -> int:
        return self.size // self.parts

    @property
    def what(self) -> str:
        """What of the matrices it is, in a word."""
        if self.quantizers not in (_MATRIX, _WEIGHT):
            return "heads"
        return "inputs" if self.axis == INPUTS else "outputs"

    def text(self, architecture: Architecture) -> str:
        """The size and why: ``--num-attention-heads 20 x --kv-channels 100 = 2000 / 2 = 1000``."""
        arguments = architecture.arguments
        factors = sorted(self.factors, key=_order)
        product = prod(arguments[dest] for dest in factors)
        said = " x ".join(f"{flag_for(dest)} {arguments[dest]}" for dest in factors)
        if product and product != self.size:
            times, rest = divmod(self.size, product)
            # Twice: gate and up in one matrix. A sum of several widths is only said.
            said = f"{times} x {said}" if not rest else said.replace(" x ", ", ")
            said += f" = {self.size}" if not rest else f" make {self.size}"
        elif len(factors) > 1:
            said += f" = {self.size}"
        return said + (f" / {self.parts} = {self.per_rank}" if self.parts > 1 else "")


def _order(dest: str) -> int:
    """Counts before the widths that they multiply."""
    return 0 if "num_" in dest else 1


def dimensions(architecture: Architecture, layout: Layout) -> Iterator[Dimension]:
    """Every dimension of what ModelOpt can quantize, on a rank of ``layout``.

    Not latent attention's down-projections: ModelOpt has no quantized form of ``modelopt.layers.Linear``.
    """
    yield from _inputs(architecture, layout)
    yield from _outputs(architecture, layout)
    yield from _heads(architecture)


# ---- inputs ----


def _inputs(architecture: Architecture, layout: Layout) -> Iterator[Dimension]:
    tp = layout.tp
    takes_hidden = tuple(_taking_hidden(architecture))
    if takes_hidden:
        yield Dimension(("hidden_size",), architecture.hidden_size, 1, takes_hidden)
    yield from _of_mixers(architecture, tp)
    if architecture.dense is not None:
        size = architecture.dense.ffn_hidden_size
        yield Dimension(("ffn_hidden_size",), size, tp, ("mlp.linear_fc2",))
    if architecture.moe is not None:
        yield from _of_experts(architecture.moe, layout)


def _of_mixers(architecture: Architecture, tp: int) -> Iterator[Dimension]:
    attention, latent = architecture.attention, architecture.latent
    mamba, delta = architecture.mamba, architecture.delta
    proj = ("self_attention.linear_proj",)
    if attention is not None:
        yield Dimension(("kv_channels", "num_attention_heads"), attention.query_width, tp, proj)
    if latent is not None:
        if latent.q_lora_rank is not None:
            yield Dimension(("q_lora_rank",), latent.q_lora_rank, 1, ("self_attention.linear_q_up_proj",))
        yield Dimension(("kv_lora_rank",), latent.kv_lora_rank, 1, ("self_attention.linear_kv_up_proj",))
        yield Dimension(("v_head_dim", "num_attention_heads"), latent.value_width, tp, proj)
    if mamba is not None:
        factors = ("mamba_head_dim", "mamba_num_heads")
        yield Dimension(factors, mamba.inner_width, tp, ("mixer.out_proj",))
    if delta is not None:
        factors = ("linear_value_head_dim", "linear_num_value_heads")
        yield Dimension(factors, delta.value_width, tp, ("self_attention.out_proj",))


def _of_experts(moe: MoE, layout: Layout) -> Iterator[Dimension]:
    if moe.latent_size is not None:
        matrices = ("mlp.experts.linear_fc1", "mlp.fc2_latent_proj")
        yield Dimension(("moe_latent_size",), moe.latent_size, 1, matrices)
    size = moe.expert.ffn_hidden_size
    yield Dimension(("moe_ffn_hidden_size",), size, layout.etp, ("mlp.experts.linear_fc2",))
    if moe.shared is not None:
        dest, size = "moe_shared_expert_intermediate_size", moe.shared.ffn_hidden_size
        yield Dimension((dest,), size, layout.tp, ("mlp.shared_experts.linear_fc2",))


def _taking_hidden(architecture: Architecture) -> Iterator[str]:
    moe, latent = architecture.moe, architecture.latent
    if architecture.attention is not None:
        yield "self_attention.linear_qkv"
    if latent is not None and latent.q_lora_rank is None:
        yield "self_attention.linear_q_proj"
    if architecture.mamba is not None:
        yield "mixer.in_proj"
    if architecture.delta is not None:
        yield "self_attention.in_proj"
    if architecture.dense is not None:
        yield "mlp.linear_fc1"
    if moe is not None:
        yield "mlp.experts.linear_fc1" if moe.latent_size is None else "mlp.fc1_latent_proj"
        if moe.shared is not None:
            yield "mlp.shared_experts.linear_fc1"
    if not architecture.tied_embeddings:
        yield "output_layer"
    if architecture.learned_positions:
        yield "embedding.position_embeddings"


# ---- outputs ----


def _outputs(architecture: Architecture, layout: Layout) -> Iterator[Dimension]:
    gives_hidden = tuple(_giving_hidden(architecture))
    if gives_hidden:
        yield _rows(("hidden_size",), architecture.hidden_size, 1, *gives_hidden)
    for factors, size, matrix in _split_rows(architecture):
        yield _rows(factors, size, layout.tp, matrix)
    moe = architecture.moe
    if moe is not None:
        yield _fc1("moe_ffn_hidden_size", moe.expert, layout.etp, "mlp.experts.linear_fc1")
        if moe.latent_size is not None:
            yield _rows(("moe_latent_size",), moe.latent_size, 1, "mlp.experts.linear_fc2")
            yield _rows(("moe_latent_size",), moe.latent_size, 1, "mlp.fc1_latent_proj")
        if moe.shared is not None:
            dest = "moe_shared_expert_intermediate_size"
            yield _fc1(dest, moe.shared, layout.tp, "mlp.shared_experts.linear_fc1")
    if architecture.dense is not None:
        yield _fc1("ffn_hidden_size", architecture.dense, layout.tp, "mlp.linear_fc1")
    if architecture.learned_positions:
        size = architecture.max_position_embeddings
        yield _rows(("max_position_embeddings",), size, 1, "embedding.position_embeddings")


def _rows(factors: tuple[str, ...], size: int, parts: int, *matrices: str) -> Dimension:
    return Dimension(factors, size, parts, matrices, OUTPUTS, _WEIGHT)


def _fc1(dest: str, mlp: Dense, parts: int, matrix: str) -> Dimension:
    return _rows((dest,), mlp.fc1_width, parts, matrix)


def _split_rows(architecture: Architecture) -> Iterator[tuple[tuple[str, ...], int, str]]:
    """(arguments, rows, matrix) of the column-parallel matrices around the feed-forward ones."""
    attention, latent = architecture.attention, architecture.latent
    mamba, delta = architecture.mamba, architecture.delta
    if attention is not None:
        factors = ("kv_channels", "num_attention_heads", "num_query_groups")
        yield factors, attention.qkv_width, "self_attention.linear_qkv"
    if latent is not None:
        factors = ("qk_head_dim", "qk_pos_emb_head_dim", "num_attention_heads")
        name = "linear_q_proj" if latent.q_lora_rank is None else "linear_q_up_proj"
        yield factors, latent.query_width, f"self_attention.{name}"
        factors = ("qk_head_dim", "v_head_dim", "num_attention_heads")
        yield factors, latent.kv_up_width, "self_attention.linear_kv_up_proj"
    if mamba is not None:
        names = "head_dim num_heads state_dim num_groups".split()
        yield tuple(f"mamba_{name}" for name in names), mamba.in_proj_width, "mixer.in_proj"
    if delta is not None:
        names = "value_head_dim num_value_heads key_head_dim num_key_heads".split()
        yield tuple(f"linear_{name}" for name in names), delta.in_proj_width, "self_attention.in_proj"
    if not architecture.tied_embeddings:
        yield ("padded_vocab_size",), architecture.padded_vocab_size, "output_layer"


def _giving_hidden(architecture: Architecture) -> Iterator[str]:
    moe = architecture.moe
    if architecture.attention is not None or architecture.latent is not None:
        yield "self_attention.linear_proj"
    if architecture.mamba is not None:
        yield "mixer.out_proj"
    if architecture.delta is not None:
        yield "self_attention.out_proj"
    if architecture.dense is not None:
        yield "mlp.linear_fc2"
    if moe is not None:
        yield "mlp.experts.linear_fc2" if moe.latent_size is None else "mlp.fc2_latent_proj"
        if moe.shared is not None:
            yield "mlp.shared_experts.linear_fc2"


# ---- heads ----


def _heads(architecture: Architecture) -> Iterator[Dimension]:
    """Queries, keys and values go into the core of attention head by head, each whole on its rank."""
    attention, latent = architecture.attention, architecture.latent
    if attention is not None:
        every = ("q_bmm", "k_bmm", "v_bmm")
        yield Dimension(("kv_channels",), attention.kv_channels, 1, _CORE, quantizers=every)
    if latent is not None:
        size = latent.qk_head_dim + latent.qk_pos_emb_head_dim
        factors = ("qk_head_dim", "qk_pos_emb_head_dim")
        yield Dimension(factors, size, 1, _CORE, quantizers=("q_bmm", "k_bmm"))
        yield Dimension(("v_head_dim",), latent.v_head_dim, 1, _CORE, quantizers=("v_bmm",))
