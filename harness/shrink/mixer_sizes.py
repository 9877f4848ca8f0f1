"""Mixer sizes: a mixer at full size -> the smaller ones that keep S1, S4, S9, S10 and S12.

What ties a mixer to the hidden size (S3, S10) is left to the search in ``plan.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from itertools import islice
from math import gcd
from typing import TYPE_CHECKING

from harness.layers import Attention, GatedDeltaNet, LatentAttention, Mamba, Mixer
from harness.shrink.dimensions import BLOCK, FP4_BLOCK, Dimension, mixer_dimensions, mixer_sizes
from harness.shrink.invariants import same_equalities
from harness.shrink.invariants_mixers import attention_split, delta_key, mamba_split, near, whole_per_rank
from harness.shrink.layer_sizes import few

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# Ranks tried beside each size of head; only S5 can rule one out.
_RANKS = 8
# Head dimensions tried, in steps of 16 or of what a head has in common with it; and states near each.
_HEAD_STEPS = 32
_STATES = 2


@dataclass(frozen=True, slots=True)
class SmallMixer:
    """A mixer that may replace the real one; ``off`` is how far S10's head : state ratio is from exact."""

    mixer: Mixer
    off: float = 0.0
    names: dict[str, int] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """As Megatron's arguments."""
        found = {name: getattr(self.mixer, name) for name in _ARGUMENTS[type(self.mixer)]}
        found = {name: size for name, size in found.items() if size is not None}
        if isinstance(self.mixer, LatentAttention):
            # Megatron asks that query groups divide over tensor ranks also where nothing has any.
            found["num_query_groups"] = self.mixer.num_attention_heads
        return found


_ARGUMENTS: dict[type[Mixer], tuple[str, ...]] = {
    Attention: ("num_attention_heads", "num_query_groups", "kv_channels"),
    LatentAttention: (
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
    ),
    Mamba: tuple(entry.name for entry in fields(Mamba)),
    GatedDeltaNet: (
        "linear_num_key_heads",
        "linear_key_head_dim",
        "linear_num_value_heads",
        "linear_value_head_dim",
    ),
}


def tied_width(mixer: Mixer) -> int | None:
    """The width whose ratio to the hidden size is kept (S3, S10), None where there is none."""
    match mixer:
        case Attention():
            return mixer.query_width
        case LatentAttention():
            return mixer.value_width
        case Mamba():
            return mixer.inner_width
        case GatedDeltaNet():
            return None


def matrix_elements(mixer: Mixer, hidden: int) -> int:
    """Elements of the mixer's matrices, what it costs to have one more layer of it."""
    match mixer:
        case Attention():
            return hidden * (mixer.qkv_width + mixer.query_width)
        case LatentAttention():
            rank = mixer.q_lora_rank
            query = hidden * mixer.query_width if rank is None else rank * (hidden + mixer.query_width)
            key_value = hidden * mixer.kv_down_width + mixer.kv_lora_rank * mixer.kv_up_width
            return query + key_value + hidden * mixer.value_width
        case Mamba():
            return hidden * (mixer.in_proj_width + mixer.inner_width)
        case GatedDeltaNet():
            return hidden * (mixer.in_proj_width + mixer.value_width)


def same_class(size: int, small: int, unit: int) -> bool:
    """S4 and S12 for one dimension."""
    return gcd(size, unit) == gcd(small, unit) and min(size, 2 * FP4_BLOCK) <= small <= size


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which smaller mixers to look at.

    At tensor parallel size ``tp``; ``rotary`` is the part of an attention head that is rotated, ``widest``
    bounds the width that is tied to the hidden size. ``whole_groups`` asks that keys by themselves divide
    as the real ones by the largest block; not ``exact``, of Mamba, for head : state ratios that are near.
    """

    tp: int
    rotary: float
    widest: int | None = None
    whole_groups: bool = True
    exact: bool = True


def small_mixers(mixer: Mixer, wanted: Wanted) -> Iterator[SmallMixer]:
    """Every smaller mixer that is wanted; unless bounded, the real one among them."""
    tp = wanted.tp
    match mixer:
        case Attention():
            found: Iterable[tuple[Mixer, float]] = ((one, 0.0) for one in _attentions(mixer, wanted))
        case LatentAttention():
            found = ((one, 0.0) for one in _latents(mixer, tp))
        case Mamba():
            found = _mambas(mixer, wanted)
        case GatedDeltaNet():
            found = ((one, 0.0) for one in _deltas(mixer, tp))
    real = mixer_sizes(mixer)
    for small, off in found:
        names = mixer_sizes(small)
        if same_equalities(real, names):
            yield SmallMixer(small, off, names)


def _widths_kept(real: Mapping[str, Dimension], small: Mixer, tp: int) -> bool:
    """S4 and S12 for every width of a mixer; ``real`` are those at full size."""
    after = mixer_dimensions(small, tp)
    return all(same_class(width.size, after[name].size, width.unit) for name, width in real.items())


def _heads(head: int, least: int) -> Iterator[int]:
    """Head dimensions up to ``head`` with the same gcd with 16, at least ``least`` unless the real one."""
    step = gcd(head, FP4_BLOCK)
    for times in few(head // step, _HEAD_STEPS):
        size = step * times
        if gcd(size, FP4_BLOCK) == step and size >= min(head, least):
            yield size


# ---- attention ----


def _attentions(a: Attention, wanted: Wanted) -> Iterator[Attention]:
    tp, rotary, real = wanted.tp, wanted.rotary, mixer_dimensions(a, wanted.tp)
    per_group = a.num_attention_heads // a.num_query_groups
    for groups in few(a.num_query_groups):
        grouped = replace(a, num_query_groups=groups, num_attention_heads=groups * per_group)
        if attention_split(grouped, tp) != attention_split(a, tp):
            continue
        for channels in _heads(a.kv_channels, 2 * FP4_BLOCK):
            small = replace(grouped, kv_channels=channels)
            same_rotary = _whole_rotary(channels, rotary) == _whole_rotary(a.kv_channels, rotary)
            whole = not wanted.whole_groups or same_class(a.kv_width, small.kv_width, BLOCK * tp)
            if same_rotary and whole and _widths_kept(real, small, tp):
                yield small


def _whole_rotary(channels: int, percent: float) -> bool:
    """Whether rotary embedding turns a whole, even number of channels."""
    return (channels * percent) % 2 == 0


# ---- latent attention (S9) ----


def _latents(a: LatentAttention, tp: int) -> Iterator[LatentAttention]:
    ranks = [*_ranks(a, tp)]
    for heads in few(a.num_attention_heads):
        one = (heads == 1) == (a.num_attention_heads == 1)
        if not one or whole_per_rank(heads, tp) != whole_per_rank(a.num_attention_heads, tp):
            continue
        for sized in _latent_heads(replace(a, num_attention_heads=heads), a, tp):
            fitting = (
                (query, key_value)
                for query, key_value in ranks
                if same_class(a.kv_down_width, key_value + sized.qk_pos_emb_head_dim, BLOCK * tp)
            )
            real = ranks[-1:] if sized.qk_pos_emb_head_dim == a.qk_pos_emb_head_dim else []
            for query, key_value in dict.fromkeys([*islice(fitting, _RANKS), *real]):
                yield replace(sized, q_lora_rank=query, kv_lora_rank=key_value)


def _ranks(a: LatentAttention, tp: int) -> Iterator[tuple[int | None, int]]:
    """Ranks of the latents in the real ratio, the real ones last."""
    unit, divisor = BLOCK * tp, gcd(a.q_lora_rank or 0, a.kv_lora_rank)
    for times in few(divisor):
        query = None if a.q_lora_rank is None else a.q_lora_rank // divisor * times
        key_value = a.kv_lora_rank // divisor * times
        same_query = query is None or same_class(a.q_lora_rank or 0, query, unit)
        if same_query and same_class(a.kv_lora_rank, key_value, unit):
            yield query, key_value


def _latent_heads(a: LatentAttention, real: LatentAttention, tp: int) -> Iterator[LatentAttention]:
    """``a`` with smaller heads whose three parts keep their ratio."""
    divisor = gcd(real.qk_head_dim, real.qk_pos_emb_head_dim, real.v_head_dim)
    for times in few(divisor):
        query, rotated, value = (
            size // divisor * times for size in (real.qk_head_dim, real.qk_pos_emb_head_dim, real.v_head_dim)
        )
        small = replace(a, qk_head_dim=query, qk_pos_emb_head_dim=rotated, v_head_dim=value)
        if (
            _head_kept(real.qk_head_dim, query, 2 * FP4_BLOCK)
            and _head_kept(real.v_head_dim, value, 2 * FP4_BLOCK)
            and _head_kept(real.qk_pos_emb_head_dim, rotated, FP4_BLOCK)
            and rotated % 2 == real.qk_pos_emb_head_dim % 2
            and same_class(real.query_width, small.query_width, BLOCK * tp)
            and same_class(real.kv_up_width, small.kv_up_width, BLOCK * tp)
            and same_class(real.value_width, small.value_width, BLOCK * tp)
        ):
            yield small


def _head_kept(head: int, small: int, least: int) -> bool:
    return gcd(head, FP4_BLOCK) == gcd(small, FP4_BLOCK) and small >= min(head, least)


# ---- Mamba and gated delta nets (S10) ----


def _mambas(m: Mamba, wanted: Wanted) -> Iterator[tuple[Mamba, float]]:
    tp, widest, unit = wanted.tp, wanted.widest, BLOCK * wanted.tp
    real = mixer_dimensions(m, tp)
    for head in _heads(m.mamba_head_dim, FP4_BLOCK):
        states = sorted(_states(m, head, wanted.exact), key=lambda state: state[1])[:_STATES]
        for heads in few(m.mamba_num_heads):
            inner = heads * head
            if widest is not None and inner > widest:
                break
            if not states or not same_class(m.inner_width, inner, unit):
                continue
            for groups in _divisors(heads, m.mamba_num_groups):
                for state, off in states:
                    small = Mamba(heads, head, state, groups)
                    if mamba_split(small, tp) == mamba_split(m, tp) and _widths_kept(real, small, tp):
                        yield small, off


def _states(m: Mamba, head: int, exact: bool) -> Iterator[tuple[int, float]]:
    """State dimensions for a head dimension: in the real ratio, or else near it, and how far off."""
    for state in _heads(m.mamba_state_dim, FP4_BLOCK):
        kept = head * m.mamba_state_dim == state * m.mamba_head_dim
        if exact and kept:
            yield state, 0.0
        elif not exact and not kept and near(m.mamba_head_dim, m.mamba_state_dim, head, state):
            yield state, distance(m.mamba_head_dim, m.mamba_state_dim, head, state)


def distance(left: int, right: int, small_left: int, small_right: int) -> float:
    """How far two ratios are from each other: 0 where equal, else the larger over the smaller, less one."""
    cross, small_cross = left * small_right, small_left * right
    return max(cross, small_cross) / min(cross, small_cross) - 1


def _divisors(number: int, most: int) -> Iterator[int]:
    return (divisor for divisor in few(min(number, most)) if number % divisor == 0)


def _deltas(d: GatedDeltaNet, tp: int) -> Iterator[GatedDeltaNet]:
    real = mixer_dimensions(d, tp)
    for keys, values in _scaled(d.linear_num_key_heads, d.linear_num_value_heads):
        counted = replace(d, linear_num_key_heads=keys, linear_num_value_heads=values)
        if delta_key(counted, tp) != delta_key(d, tp):
            continue
        for key, value in _scaled(d.linear_key_head_dim, d.linear_value_head_dim):
            small = replace(counted, linear_key_head_dim=key, linear_value_head_dim=value)
            if (
                _head_kept(d.linear_key_head_dim, key, FP4_BLOCK)
                and _head_kept(d.linear_value_head_dim, value, FP4_BLOCK)
                and _widths_kept(real, small, tp)
            ):
                yield small


def _scaled(left: int, right: int) -> Iterator[tuple[int, int]]:
    """Smaller pairs in the same ratio, the real pair last."""
    divisor = gcd(left, right)
    return ((left // divisor * times, right // divisor * times) for times in few(divisor))
