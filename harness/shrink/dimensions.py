"""Dimensions: an architecture -> the widths that its matrices have, by name.

What the invariants compare between a full-size and a shrunken architecture, one layer kind at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from harness.layers import Attention, GatedDeltaNet, LatentAttention, Mamba, Mixer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.architecture import Architecture
    from harness.layout import Layout

BLOCK = 128  # the largest block size of ModelOpt's formats
FP4_BLOCK = 16  # the smallest, and the unit of a head dimension


@dataclass(frozen=True, slots=True)
class Dimension:
    """One matrix dimension: its size, and the unit whose common divisor with it must be kept (S4)."""

    size: int
    unit: int


def dimensions(architecture: Architecture, layout: Layout) -> dict[str, Dimension]:
    """Every width whose divisibility counts, by name; expert widths are split by ``etp``."""
    unit, expert_unit = BLOCK * layout.tp, BLOCK * layout.etp
    found = {"hidden": Dimension(architecture.hidden_size, unit)}
    for mixer in mixers(architecture):
        found |= mixer_dimensions(mixer, layout.tp)
    found["vocabulary"] = Dimension(architecture.padded_vocab_size, unit)
    dense, moe = architecture.dense, architecture.moe
    if dense is not None:
        found["ffn"] = Dimension(dense.ffn_hidden_size, unit)
    if moe is not None:
        found["expert ffn"] = Dimension(moe.expert.ffn_hidden_size, expert_unit)
        if moe.latent_size is not None:
            found["expert latent"] = Dimension(moe.latent_size, unit)
        if moe.shared is not None:
            found["shared ffn"] = Dimension(moe.shared.ffn_hidden_size, unit)
    return found


def mixers(architecture: Architecture) -> tuple[Mixer, ...]:
    """One mixer of each class that the architecture has; those of one class share their sizes."""
    found = (architecture.attention, architecture.latent, architecture.mamba, architecture.delta)
    return tuple(mixer for mixer in found if mixer is not None)


def mixer_dimensions(mixer: Mixer, tp: int) -> dict[str, Dimension]:
    """The widths of a mixer whose divisibility counts, split over ``tp`` ranks."""
    found = {name: Dimension(size, BLOCK * tp) for name, size in _matrix_widths(mixer).items()}
    if isinstance(mixer, Attention):
        # No matrix has this width alone, but in the cache it is quantized by itself.
        found["key/value"] = Dimension(mixer.kv_width, FP4_BLOCK * tp)
    return found


def _matrix_widths(mixer: Mixer) -> dict[str, int]:
    match mixer:
        case Attention():
            return {"query": mixer.query_width, "qkv": mixer.qkv_width}
        case LatentAttention():
            ranks = {} if mixer.q_lora_rank is None else {"query latent": mixer.q_lora_rank}
            return {
                **ranks,
                "key/value latent": mixer.kv_lora_rank,
                "key/value down": mixer.kv_down_width,
                "query": mixer.query_width,
                "key/value up": mixer.kv_up_width,
                "value": mixer.value_width,
            }
        case Mamba():
            return {
                "mamba inner": mixer.inner_width,
                "mamba conv": mixer.conv_width,
                "mamba in": mixer.in_proj_width,
            }
        case GatedDeltaNet():
            return {
                "delta key": mixer.key_width,
                "delta value": mixer.value_width,
                "delta in": mixer.in_proj_width,
            }


def mixer_sizes(mixer: Mixer) -> dict[str, int]:
    """The sizes of a mixer that S5 compares."""
    found = _matrix_widths(mixer) | head_sizes(mixer)
    if isinstance(mixer, Attention):
        found["key/value"] = mixer.kv_width
    if isinstance(mixer, GatedDeltaNet):
        found["delta conv"] = mixer.conv_width
    return found


def head_sizes(mixer: Mixer) -> dict[str, int]:
    """The head and state dimensions of a mixer, by the argument that sets each."""
    match mixer:
        case Attention():
            return {"kv_channels": mixer.kv_channels}
        case LatentAttention():
            return {
                "qk_head_dim": mixer.qk_head_dim,
                "qk_pos_emb_head_dim": mixer.qk_pos_emb_head_dim,
                "v_head_dim": mixer.v_head_dim,
            }
        case Mamba():
            return {"mamba_head_dim": mixer.mamba_head_dim, "mamba_state_dim": mixer.mamba_state_dim}
        case GatedDeltaNet():
            return {
                "linear_key_head_dim": mixer.linear_key_head_dim,
                "linear_value_head_dim": mixer.linear_value_head_dim,
            }


def named_sizes(architecture: Architecture, layout: Layout) -> dict[str, int]:
    """The sizes among which S5 keeps equal and different ones apart: widths, fused ones too, and heads.

    A square fused matrix hides a transpose as any other.
    """
    sizes = {name: dimension.size for name, dimension in dimensions(architecture, layout).items()}
    for mixer in mixers(architecture):
        sizes |= mixer_sizes(mixer)
    dense, moe = architecture.dense, architecture.moe
    if dense is not None:
        sizes["fc1"] = dense.fc1_width
    if moe is not None:
        sizes["expert fc1"] = moe.expert.fc1_width
        if moe.shared is not None:
            sizes["shared fc1"] = moe.shared.fc1_width
        sizes["experts"] = moe.num_experts
    return sizes


# Sizes that are no width of a matrix, and the widths that each could be mistaken for. That they are equal
# in the real model is a coincidence that need not be kept, but none may arise.
COINCIDENTAL: Mapping[str, frozenset[str]] = {
    "experts": frozenset({"hidden"}),
    "kv_channels": frozenset({"hidden", "query", "key/value"}),
    **dict.fromkeys(
        ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"), frozenset({"hidden", "query", "value"})
    ),
    **dict.fromkeys(("mamba_head_dim", "mamba_state_dim"), frozenset({"hidden", "mamba inner"})),
    "linear_key_head_dim": frozenset({"hidden", "delta key"}),
    "linear_value_head_dim": frozenset({"hidden", "delta value"}),
}


def equality_kept(one: str, other: str, before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """S5 for two names: whether equal sizes stayed equal and different ones different."""
    was, now = before[one] == before[other], after[one] == after[other]
    if one not in COINCIDENTAL and other not in COINCIDENTAL:
        return was == now
    apart = other in COINCIDENTAL.get(one, ()) or one in COINCIDENTAL.get(other, ())
    return was or not now or not apart


def ratio(*sizes: int) -> str:
    """Sizes as a reduced ratio: ``8 : 1``."""
    divisor = gcd(*sizes)
    return " : ".join(f"{size // divisor}" for size in sizes)


def order(left: int, right: int) -> str:
    return "<" if left < right else ">" if left > right else "="
