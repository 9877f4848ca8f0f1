"""Counterparts: a tensor of a Hugging Face checkpoint -> the parameter of Megatron's model that it is of, and
which part of that.

Both sides' names are their modeling code's. Megatron has the queries, keys and values of attention in one
matrix, group by group, and the two halves of a gated feed-forward in another; some checkpoints have all
experts in one tensor, transposed. Nothing here asks ModelOpt's importer or exporter, which are to be checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from harness.layers import Attention

if TYPE_CHECKING:
    from harness.architecture import Architecture

Part = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Counterpart:
    """``parameters`` are one, or those of every expert where the checkpoint has all in one tensor.

    ``part`` takes from a parameter [rows, ...] the rows that the tensor holds, in the tensor's layout.
    """

    name: str
    parameters: tuple[str, ...]
    part: Part
    packed: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that hold the parameters."""
        return tuple(parameter.rpartition(".")[0] for parameter in self.parameters)

    def of(self, values: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The tensor, made of what ``values`` has for each parameter."""
        parts = [self.part(values(parameter)) for parameter in self.parameters]
        return torch.stack(parts) if self.packed else parts[0]


def counterpart(
    name: str, architecture: Architecture, names: Collection[str], parameters: Collection[str]
) -> Counterpart | None:
    """What the tensor ``name`` of a checkpoint with ``names`` is of; None where no rule knows such a name.

    ``parameters`` are those that Megatron's model has. Where it has none of those that the tensor may be of,
    the first of them stands for all.
    """
    layer = _LAYER.fullmatch(name)
    if layer is None:
        for pattern, found in _ENDS:
            if re.fullmatch(pattern, name):
                return Counterpart(name, (_first(found, parameters),), _whole)
        return None
    number, rest = layer["number"], layer["rest"]
    for pattern, choices in _ROWS:
        match = re.fullmatch(pattern, rest)
        if match is None:
            continue
        made = [
            _made(name, f"decoder.layers.{number}.{path}", kind, match, architecture, names)
            for path, kind in choices
        ]
        return next((one for one in made if set(one.parameters) <= set(parameters)), made[0])
    return None


def _first(found: tuple[str, ...], parameters: Collection[str]) -> str:
    return next((path for path in found if path in parameters), found[0])


def _made(
    name: str, path: str, kind: str, match: re.Match[str], architecture: Architecture, names: Collection[str]
) -> Counterpart:
    path = path.format(**match.groupdict())
    if kind == "packed":
        moe = architecture.moe
        count = moe.num_experts if moe else 0
        # gpt-oss takes the gates and what they gate in turn, and has biases beside the matrices.
        mixed = f"{name.removesuffix('_bias')}_bias" in names and "gate_up" in name
        part = partial(_packed, mixed=mixed)
        paths = tuple(path.replace("#", str(expert)) for expert in range(count))
        return Counterpart(name, paths, part, packed=True)
    if kind in ("q", "k", "v"):
        layer = architecture.layers[int(path.split(".")[2])]
        mixer = layer.mixer if isinstance(layer.mixer, Attention) else architecture.attention
        return Counterpart(name, (path,), partial(_heads, mixer, "qkv".index(kind)))
    if kind in ("gate", "up"):
        gated = re.sub(r"\bup_proj", "gate_proj", name) in names
        return Counterpart(name, (path,), partial(_half, kind == "up") if gated else _whole)
    return Counterpart(name, (path,), _whole)


def _whole(values: torch.Tensor) -> torch.Tensor:
    return values


def _half(second: bool, values: torch.Tensor) -> torch.Tensor:
    return values.chunk(2)[second]


def _heads(mixer: Attention | None, which: int, values: torch.Tensor) -> torch.Tensor:
    """Of rows that hold, group after group, the query heads of a group, its key and its value."""
    if mixer is None:
        return values
    groups = mixer.num_query_groups
    queries = mixer.query_width // groups * (2 if mixer.output_gate else 1)
    ends = [0, queries, queries + mixer.kv_channels, queries + 2 * mixer.kv_channels]
    if len(values) != groups * ends[-1]:
        return values
    each = values.reshape(groups, ends[-1], *values.shape[1:])
    return each[:, ends[which] : ends[which + 1]].reshape(-1, *values.shape[1:])


def _packed(values: torch.Tensor, mixed: bool) -> torch.Tensor:
    """An expert's matrix [out, in] as [in, out], or its bias; in turn, row by row of both halves."""
    if mixed:
        values = torch.stack(values.chunk(2), 1).flatten(0, 1)
    return values.T if values.dim() == 2 else values


_LAYER = re.compile(
    r"(language_model\.model\.|model\.language_model\.|model\.|backbone\.)layers\.(?P<number>\d+)\.(?P<rest>.+)"
)
_ROOT = r"(language_model\.model\.|model\.language_model\.|model\.|backbone\.)"
_ENDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_ROOT + r"(embed_tokens|embeddings)\.weight", ("embedding.word_embeddings.weight",)),
    (_ROOT + r"norm(_f)?\.weight", ("decoder.final_layernorm.weight", "decoder.final_norm.weight")),
    (_ROOT + r"norm(_f)?\.bias", ("decoder.final_layernorm.bias", "decoder.final_norm.bias")),
    (r"(language_model\.)?lm_head\.weight", ("output_layer.weight",)),
    (r"(language_model\.)?lm_head\.bias", ("output_layer.bias",)),
)
_KIND = r"(?P<kind>weight|bias)"
_ATTENTION, _FEED = r"(self_attn|mixer)\.", r"(mlp|feed_forward|mixer)\."
_EXPERT = _FEED + r"experts\.(?P<expert>\d+)\."
_LOCAL = "mlp.experts.local_experts.{expert}."
_SHARED = _FEED + r"shared_experts?\."

# Names below a layer, each with the parameters that it may be of: the first that the model has.
_ROWS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (rf"input_layernorm\.{_KIND}", (("input_layernorm.{kind}", ""),)),
    (rf"post_attention_layernorm\.{_KIND}", (("pre_mlp_layernorm.{kind}", ""),)),
    # A Nemotron-H layer has one norm, whatever stands in it.
    (
        rf"norm\.{_KIND}",
        (("norm.{kind}", ""), ("input_layernorm.{kind}", ""), ("pre_mlp_layernorm.{kind}", "")),
    ),
    (
        rf"{_ATTENTION}q_proj\.{_KIND}",
        # Latent attention without a latent for queries has them in a matrix of their own.
        (("self_attention.linear_qkv.{kind}", "q"), ("self_attention.linear_q_proj.{kind}", "")),
    ),
    (rf"{_ATTENTION}k_proj\.{_KIND}", (("self_attention.linear_qkv.{kind}", "k"),)),
    (rf"{_ATTENTION}v_proj\.{_KIND}", (("self_attention.linear_qkv.{kind}", "v"),)),
    (rf"{_ATTENTION}o_proj\.{_KIND}", (("self_attention.linear_proj.{kind}", ""),)),
    (rf"{_ATTENTION}q_norm\.{_KIND}", (("self_attention.q_layernorm.{kind}", ""),)),
    (rf"{_ATTENTION}k_norm\.{_KIND}", (("self_attention.k_layernorm.{kind}", ""),)),
    (rf"{_ATTENTION}sinks", (("self_attention.core_attention.softmax_offset", ""),)),
    # Latent attention
    (rf"self_attn\.q_a_proj\.{_KIND}", (("self_attention.linear_q_down_proj.{kind}", ""),)),
    (rf"self_attn\.q_a_layernorm\.{_KIND}", (("self_attention.q_layernorm.{kind}", ""),)),
    (rf"self_attn\.q_b_proj\.{_KIND}", (("self_attention.linear_q_up_proj.{kind}", ""),)),
    (rf"self_attn\.kv_a_proj_with_mqa\.{_KIND}", (("self_attention.linear_kv_down_proj.{kind}", ""),)),
    (rf"self_attn\.kv_a_layernorm\.{_KIND}", (("self_attention.kv_layernorm.{kind}", ""),)),
    (rf"self_attn\.kv_b_proj\.{_KIND}", (("self_attention.linear_kv_up_proj.{kind}", ""),)),
    # Mamba
    (rf"mixer\.in_proj\.{_KIND}", (("mixer.in_proj.{kind}", ""),)),
    (rf"mixer\.out_proj\.{_KIND}", (("mixer.out_proj.{kind}", ""),)),
    (rf"mixer\.norm\.{_KIND}", (("mixer.norm.{kind}", ""),)),
    (rf"mixer\.conv1d\.{_KIND}", (("mixer.conv1d_{kind}", ""), ("mixer.conv1d.{kind}", ""))),
    (r"mixer\.(?P<own>A_log|D|dt_bias)", (("mixer.{own}", ""),)),
    # Feed-forward
    (rf"{_FEED}gate_proj\.{_KIND}", (("mlp.linear_fc1.{kind}", "gate"),)),
    (rf"{_FEED}up_proj\.{_KIND}", (("mlp.linear_fc1.{kind}", "up"),)),
    (rf"{_FEED}down_proj\.{_KIND}", (("mlp.linear_fc2.{kind}", ""),)),
    (rf"{_EXPERT}gate_proj\.{_KIND}", ((_LOCAL + "linear_fc1.{kind}", "gate"),)),
    (rf"{_EXPERT}up_proj\.{_KIND}", ((_LOCAL + "linear_fc1.{kind}", "up"),)),
    (rf"{_EXPERT}down_proj\.{_KIND}", ((_LOCAL + "linear_fc2.{kind}", ""),)),
    (rf"{_FEED}experts\.gate_up_proj", (("mlp.experts.local_experts.#.linear_fc1.weight", "packed"),)),
    (rf"{_FEED}experts\.gate_up_proj_bias", (("mlp.experts.local_experts.#.linear_fc1.bias", "packed"),)),
    (rf"{_FEED}experts\.down_proj", (("mlp.experts.local_experts.#.linear_fc2.weight", "packed"),)),
    (rf"{_FEED}experts\.down_proj_bias", (("mlp.experts.local_experts.#.linear_fc2.bias", "packed"),)),
    (rf"{_SHARED}gate_proj\.{_KIND}", (("mlp.shared_experts.linear_fc1.{kind}", "gate"),)),
    (rf"{_SHARED}up_proj\.{_KIND}", (("mlp.shared_experts.linear_fc1.{kind}", "up"),)),
    (rf"{_SHARED}down_proj\.{_KIND}", (("mlp.shared_experts.linear_fc2.{kind}", ""),)),
    (rf"{_FEED}(gate|router)\.{_KIND}", (("mlp.router.{kind}", ""),)),
    (rf"{_FEED}gate\.e_score_correction_bias", (("mlp.router.expert_bias", ""),)),
    (rf"mixer\.(?P<side>fc[12]_latent_proj)\.{_KIND}", (("mlp.{side}.{kind}", ""),)),
)


def held(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of Megatron's model, and each router's expert bias, which is a buffer."""
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".expert_bias"))
