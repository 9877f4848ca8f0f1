"""Invariants of what mixes the tokens: attention (S1, S3), latent attention (S9), Mamba and delta nets (S10).

Each judges one pair of architectures and says what it sees on either side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.shrink.dimensions import order, ratio

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.architecture import Architecture
    from harness.layers import Attention, GatedDeltaNet, LatentAttention, Mamba
    from harness.layout import Layout

# What the invariant says of the full size, of the shrunken one, and whether it holds.
Judgement = tuple[str, str, bool]

# S10: how far a ratio may be off where no small model has it exactly.
NEAR = (5, 4)


def near(left: int, right: int, small_left: int, small_right: int) -> bool:
    """Whether two ratios have the same order (<, =, >) and are within a quarter of each other."""
    cross, small_cross, (most, least) = left * small_right, small_left * right, NEAR
    return order(left, right) == order(small_left, small_right) and (
        least * cross <= most * small_cross and least * small_cross <= most * cross
    )


def group_split(num_query_groups: int, tp: int) -> str:
    """How query groups fall on tensor ranks."""
    if num_query_groups % tp == 0:
        return "whole groups per rank"
    return "one group shared by ranks" if tp % num_query_groups == 0 else "neither whole nor shared"


def whole_per_rank(count: int, tp: int) -> str:
    return "whole per rank" if count % tp == 0 else "not whole per rank"


def heads(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    """S1."""

    def describe(architecture: Architecture) -> tuple[str, object]:
        plain, latent = architecture.attention, architecture.latent
        if latent is not None:
            count = latent.num_attention_heads
            split = whole_per_rank(count, layout.tp)
            return f"{count} heads, none grouped, {split}", ("latent", split, count > 1)
        if plain is None:
            return "no attention", None
        count, groups = plain.num_attention_heads, plain.num_query_groups
        split = group_split(groups, layout.tp)
        key = (ratio(count, groups), split, count % layout.tp == 0, count == groups, groups > 1)
        return f"{count} : {groups} = {ratio(count, groups)}, {split}", key

    return _same(describe, before, after)


def attention_width(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    """S3. The search prefers the exact ratio; here its order counts, and both are said."""

    def describe(architecture: Architecture) -> tuple[str, object]:
        plain, latent = architecture.attention, architecture.latent
        if plain is None and latent is None:
            return "no attention", None
        width = latent.value_width if latent is not None else plain.query_width if plain is not None else 0
        hidden = architecture.hidden_size
        return f"{width} : {hidden} = {ratio(width, hidden)}", order(width, hidden)

    return _same(describe, before, after)


def _same(
    describe: Callable[[Architecture], tuple[str, object]], before: Architecture, after: Architecture
) -> Judgement:
    (left, one), (right, other) = describe(before), describe(after)
    return left, right, one == other


def latent_attention(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    """S9."""

    def describe(architecture: Architecture) -> tuple[str, object]:
        latent = architecture.latent
        if latent is None:
            return "none", None
        return _latent(latent, architecture.hidden_size)

    return _same(describe, before, after)


def _latent(latent: LatentAttention, hidden: int) -> tuple[str, object]:
    query, key_value = latent.q_lora_rank, latent.kv_lora_rank
    head = (latent.qk_head_dim, latent.qk_pos_emb_head_dim, latent.v_head_dim)
    place = order(key_value, hidden)
    if query is None:
        ranks, query_key = f"no query latent, key/value latent {key_value} {place} hidden", ""
    else:
        ranks = (
            f"latents {query} : {key_value} = {ratio(query, key_value)}, "
            f"query {order(query, hidden)} hidden, key/value {place} hidden"
        )
        query_key = f"{ratio(query, key_value)}, {order(query, hidden)}"
    sizes = " : ".join(map(str, head))
    return f"{ranks}; head {sizes} = {ratio(*head)}", (query_key, place, ratio(*head), head[1] % 2)


def linear_attention(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    """S10: Mamba, and the gated delta net, which is its kin."""
    parts: list[Judgement] = []
    mamba, delta = before.mamba, before.delta
    if mamba is not None or after.mamba is not None:
        parts.append(_mamba(before, after, layout))
    if delta is not None or after.delta is not None:
        parts.append(_delta(before, after, layout))
    if not parts:
        return "none", "none", True
    lefts, rights, held = zip(*parts, strict=True)
    return "; ".join(lefts), "; ".join(rights), all(held)


def _mamba(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    one, other = before.mamba, after.mamba
    if one is None or other is None:
        return _mamba_text(before, layout), _mamba_text(after, layout), False
    hidden, small_hidden = before.hidden_size, after.hidden_size
    holds = (
        near(one.inner_width, hidden, other.inner_width, small_hidden)
        and near(one.mamba_head_dim, one.mamba_state_dim, other.mamba_head_dim, other.mamba_state_dim)
        and mamba_split(one, layout.tp) == mamba_split(other, layout.tp)
    )
    return _mamba_text(before, layout), _mamba_text(after, layout), holds


def mamba_split(mamba: Mamba, tp: int) -> tuple[str, str, bool, bool]:
    """How heads and groups fall on tensor ranks, and whether there is one of either, or one per other."""
    heads, groups = mamba.mamba_num_heads, mamba.mamba_num_groups
    return whole_per_rank(heads, tp), whole_per_rank(groups, tp), groups == 1, heads == groups


def _mamba_text(architecture: Architecture, layout: Layout) -> str:
    mamba, hidden = architecture.mamba, architecture.hidden_size
    if mamba is None:
        return "no Mamba"
    heads, groups = mamba.mamba_num_heads, mamba.mamba_num_groups
    head, state, inner = mamba.mamba_head_dim, mamba.mamba_state_dim, mamba.inner_width
    whole = "" if mamba_split(mamba, layout.tp)[:2] == ("whole per rank",) * 2 else ", not whole per rank"
    return (
        f"inner {inner} : hidden {hidden} = {ratio(inner, hidden)}, {heads} heads / {groups} groups{whole}, "
        f"head {head} : state {state} = {ratio(head, state)}"
    )


def _delta(before: Architecture, after: Architecture, layout: Layout) -> Judgement:
    def describe(architecture: Architecture) -> tuple[str, object]:
        delta = architecture.delta
        if delta is None:
            return "no delta net", None
        return _delta_text(delta, layout), delta_key(delta, layout.tp)

    return _same(describe, before, after)


def delta_key(delta: GatedDeltaNet, tp: int) -> tuple[str, str, str, str, bool]:
    """Ratios of heads and of their dimensions, how both fall on ranks, and whether one key head is all."""
    keys, values = delta.linear_num_key_heads, delta.linear_num_value_heads
    return (
        ratio(keys, values),
        ratio(delta.linear_key_head_dim, delta.linear_value_head_dim),
        whole_per_rank(keys, tp),
        whole_per_rank(values, tp),
        keys == 1,
    )


def _delta_text(delta: GatedDeltaNet, layout: Layout) -> str:
    keys, values = delta.linear_num_key_heads, delta.linear_num_value_heads
    key, value = delta.linear_key_head_dim, delta.linear_value_head_dim
    whole = keys % layout.tp == 0 and values % layout.tp == 0
    return (
        f"delta net {keys} key : {values} value heads = {ratio(keys, values)}"
        f"{'' if whole else ', not whole per rank'}, of {key} : {value} = {ratio(key, value)}"
    )


def attention_split(attention: Attention, tp: int) -> tuple[str, str, bool]:
    """How groups and heads fall on tensor ranks, and whether there is one group."""
    groups = attention.num_query_groups
    return group_split(groups, tp), whole_per_rank(attention.num_attention_heads, tp), groups == 1
