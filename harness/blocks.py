"""Blocks: an architecture, a layout and a recipe -> the matrices whose inputs the blocks do not divide.

By arithmetic alone. A forward pass does not show them: a partial block is filled up with zeros without a
word, by ModelOpt (static blocks) or by its kernel (dynamic ones).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.arguments import flag_for
from harness.finding import Finding, Severity

if TYPE_CHECKING:
    from harness.architecture import Architecture
    from harness.layers import MoE
    from harness.layout import Layout
    from harness.recipes import Format, Recipe


@dataclass(frozen=True, slots=True)
class Inputs:
    """One input dimension of quantized matrices: what sets it, and how many ranks share it.

    ``size`` is of the whole model, ``factors`` the arguments whose product it is, the one at fault first.
    ``matrices`` are module paths within a layer, the number of a routed expert left out.
    """

    factors: tuple[str, ...]
    size: int
    parts: int
    matrices: tuple[str, ...]

    @property
    def whole(self) -> bool:
        return self.size % self.parts == 0

    @property
    def per_rank(self) -> int:
        return self.size // self.parts


@dataclass(frozen=True, slots=True)
class Misfit:
    """Input dimensions that the blocks of ``format`` do not divide on a rank of a layout."""

    inputs: Inputs
    format: Format

    @property
    def block(self) -> int:
        assert self.format.block_size is not None
        return self.format.block_size

    def text(self, architecture: Architecture) -> str:
        """The dimension and why: ``--moe-ffn-hidden-size 1856 / 8 = 232, not a multiple of 16``."""
        inputs, arguments = self.inputs, architecture.arguments
        factors = sorted(inputs.factors, key=_order)
        said = " x ".join(f"{flag_for(dest)} {arguments[dest]}" for dest in factors)
        if len(inputs.factors) > 1:
            said += f" = {inputs.size}"
        if inputs.parts > 1:
            said += f" / {inputs.parts} = {inputs.per_rank}"
        return f"{said}, not a multiple of {self.block}"

    @property
    def consequence(self) -> str:
        """What then happens, in a forward pass and at the export.

        Static: ``TensorQuantizer._setup_for_blockquant`` pads, ``pack_int4_in_uint8`` refuses partial
        blocks. Dynamic: ``fp4_fake_quant_block`` reads zeros past a row's end, ``NVFP4QTensor`` refuses.
        Where only the part of a rank is uneven, the whole matrix is exported in blocks that no rank had.
        """
        who = "the kernel reads" if self.format.dynamic else "ModelOpt pads its last block with"
        zeros = "zeros past its end" if self.format.dynamic else "zeros"
        if self.inputs.size % self.block:
            return f"{who} {zeros} without a word, and the export refuses it"
        return f"{who} {zeros} without a word, and its blocks are not those of the whole matrix at the export"


def _order(dest: str) -> int:
    """Counts before the widths that they multiply."""
    return 0 if "num_" in dest else 1


def misfits(architecture: Architecture, layout: Layout, recipe: Recipe) -> tuple[Misfit, ...]:
    """Every input dimension, per rank, that a block of ``recipe`` does not divide.

    What the layout itself does not divide is not among them: no rank has such a matrix.
    """
    formats = recipe.blocked_formats
    if not formats:
        return ()
    return tuple(
        Misfit(inputs, entry)
        for inputs in quantized_inputs(architecture, layout)
        for entry in formats
        if inputs.whole and entry.block_size is not None and inputs.per_rank % entry.block_size
    )


def misfit_findings(architecture: Architecture, layout: Layout, recipe: Recipe) -> Iterator[Finding]:
    """A warning for each misfit, at the flag that sets the dimension."""
    for misfit in misfits(architecture, layout, recipe):
        message = f"{misfit.text(architecture)}, as {recipe.name} wants of the inputs of "
        message += f"{', '.join(misfit.inputs.matrices)}: {misfit.consequence}"
        yield architecture.arguments.finding(
            misfit.inputs.factors[0],
            message,
            stage="audit",
            severity=Severity.WARNING,
            expected=f"a multiple of {misfit.block}",
            actual=misfit.inputs.per_rank,
        )


def quantized_inputs(architecture: Architecture, layout: Layout) -> Iterator[Inputs]:
    """The input dimension of every matrix in the decoder layers that ModelOpt quantizes.

    Not latent attention's down-projections: ModelOpt has no quantized form of ``modelopt.layers.Linear``.
    Nor convolutions, the router, the embedding and the output layer.
    """
    tp = layout.tp
    takes_hidden = tuple(_taking_hidden(architecture))
    if takes_hidden:
        yield Inputs(("hidden_size",), architecture.hidden_size, 1, takes_hidden)
    yield from _of_mixers(architecture, tp)
    if architecture.dense is not None:
        size = architecture.dense.ffn_hidden_size
        yield Inputs(("ffn_hidden_size",), size, tp, ("mlp.linear_fc2",))
    if architecture.moe is not None:
        yield from _of_experts(architecture.moe, layout)


def _of_mixers(architecture: Architecture, tp: int) -> Iterator[Inputs]:
    attention, latent = architecture.attention, architecture.latent
    mamba, delta = architecture.mamba, architecture.delta
    proj = ("self_attention.linear_proj",)
    if attention is not None:
        yield Inputs(("kv_channels", "num_attention_heads"), attention.query_width, tp, proj)
    if latent is not None:
        if latent.q_lora_rank is not None:
            yield Inputs(("q_lora_rank",), latent.q_lora_rank, 1, ("self_attention.linear_q_up_proj",))
        yield Inputs(("kv_lora_rank",), latent.kv_lora_rank, 1, ("self_attention.linear_kv_up_proj",))
        yield Inputs(("v_head_dim", "num_attention_heads"), latent.value_width, tp, proj)
    if mamba is not None:
        factors = ("mamba_head_dim", "mamba_num_heads")
        yield Inputs(factors, mamba.inner_width, tp, ("mixer.out_proj",))
    if delta is not None:
        factors = ("linear_value_head_dim", "linear_num_value_heads")
        yield Inputs(factors, delta.value_width, tp, ("self_attention.out_proj",))


def _of_experts(moe: MoE, layout: Layout) -> Iterator[Inputs]:
    if moe.latent_size is not None:
        matrices = ("mlp.experts.linear_fc1", "mlp.fc2_latent_proj")
        yield Inputs(("moe_latent_size",), moe.latent_size, 1, matrices)
    size = moe.expert.ffn_hidden_size
    yield Inputs(("moe_ffn_hidden_size",), size, layout.etp, ("mlp.experts.linear_fc2",))
    if moe.shared is not None:
        dest, size = "moe_shared_expert_intermediate_size", moe.shared.ffn_hidden_size
        yield Inputs((dest,), size, layout.tp, ("mlp.shared_experts.linear_fc2",))


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
