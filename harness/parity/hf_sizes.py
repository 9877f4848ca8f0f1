"""HF sizes: a plan and the published sizes -> those of the twin.

A published size that the preset has too becomes what the plan made of the preset's. One that differs from
the preset's is shrunk by the same share and stays different, so that the misfit shows when its weights are
imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, lcm
from typing import Any

from harness.families.items import Config, whole
from harness.families.rows import Family
from harness.parity.no_twin import NoTwin
from harness.shrink import ShrinkPlan

# Published keys and the Megatron argument that each is the size of, whatever the family.
_COMMON = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "attention_head_dim": "kv_channels",
    "kv_channels": "kv_channels",
    "vocab_size": "padded_vocab_size",
}
_LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
_MAMBA = {
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "ssm_state_size": "mamba_state_dim",
    "n_groups": "mamba_num_groups",
}
_DELTA = {
    key: key
    for key in (
        "linear_num_key_heads",
        "linear_key_head_dim",
        "linear_num_value_heads",
        "linear_value_head_dim",
    )
}
_EXPERTS = {
    "num_experts_per_tok": "moe_router_topk",
    "experts_per_token": "moe_router_topk",
}
# A size, and the number of parts that it is divided into.
_DIVIDED = (
    ("num_attention_heads", "num_key_value_heads"),
    ("mamba_num_heads", "n_groups"),
    ("linear_num_value_heads", "linear_num_key_heads"),
)
# Numbers of things; the others are widths, which stay whole blocks of what the real ones are blocks of.
_COUNTS = frozenset(
    """
    num_attention_heads num_query_groups num_experts moe_router_topk mamba_num_heads mamba_num_groups
    linear_num_key_heads linear_num_value_heads
    """.split()
)
_BLOCK = 64


def size_arguments(family: Family) -> dict[str, str]:
    """The keys of a family that are sizes, each with the Megatron argument of the same size."""
    keys = dict(_COMMON)
    keys[family.dense_size] = "ffn_hidden_size"
    if family.latent:
        # Its head_dim is the rotated part, which has a key of its own and which no weight is sized by.
        keys = {key: dest for key, dest in keys.items() if dest != "kv_channels"} | _LATENT
    if family.hybrid:
        keys |= _DELTA if family.delta_net else _MAMBA
    row = family.experts
    if row is not None:
        keys |= _EXPERTS
        keys[row.count] = "num_experts"
        if row.shared_size:
            keys[row.shared_size] = "moe_shared_expert_intermediate_size"
        if row.latent:
            keys[row.latent] = "moe_latent_size"
        # Where one key is the width of both, the routed experts and the shared one.
        keys[row.size] = "moe_ffn_hidden_size"
    return keys


def tiny_sizes(family: Family, config: Config, plan: ShrinkPlan) -> dict[str, Any]:
    """Every published size key with its value in the twin. Raises NoTwin."""
    wrong: set[str] = set()
    sizes: dict[str, Any] = {}
    for key, dest in size_arguments(family).items():
        published = config.get(key)
        if type(published) is not int or published < 1:
            continue  # absent, null or zero: as it is
        before, after = plan.before.arguments[dest], plan.after.arguments[dest]
        sizes[key] = after
        if published != before:
            wrong.add(key)
            unit = 1 if dest in _COUNTS else gcd(published, _BLOCK)
            sizes[key] = _another(published, before, after, unit, plan)
    _keep_divided(family, config, sizes, wrong)
    sizes |= dict(_groups_of_experts(family, config, plan, sizes))
    sizes |= dict(_shared_experts(family, config, plan, sizes))
    rotated, head = whole(config, "rotary_dim"), whole(config, "head_dim")
    if rotated is not None and head is not None:
        sizes["rotary_dim"] = _exact(rotated, sizes["head_dim"], head, "rotary_dim")
    return sizes


def _another(published: int, before: Any, after: Any, unit: int, plan: ShrinkPlan) -> int:
    """``published`` shrunk as the preset's value is, or as the hidden size where the preset has none."""
    if not isinstance(before, int) or not isinstance(after, int) or before < 1:
        share = plan.after.hidden_size / plan.before.hidden_size
        return max(unit, round(published * share / unit) * unit)
    return _nearest(published * after / before, unit, after)


def _nearest(wanted: float, unit: int, other: int) -> int:
    """The multiple of ``unit`` nearest to ``wanted`` that is not ``other``."""
    middle = round(wanted / unit)
    near = (unit * count for count in range(max(1, middle - 1), middle + 3))
    return min((size for size in near if size != other), key=lambda size: (abs(size - wanted), size))


def _keep_divided(family: Family, config: Config, sizes: dict[str, Any], wrong: set[str]) -> None:
    """Sizes that are in doubt moved so that they still divide as the modeling code asks."""
    for size, parts in _DIVIDED:
        if size in sizes and parts in sizes and sizes[size] % sizes[parts]:
            if parts in wrong:
                divisors = [part for part in range(1, sizes[size] + 1) if sizes[size] % part == 0]
                sizes[parts] = min(divisors, key=lambda part: (abs(part - sizes[parts]), part))
            else:
                sizes[size] = _nearest(sizes[size], sizes[parts], 0)
    derived = family.head_dim_divides and not isinstance(config.get("head_dim"), int)
    if derived and wrong & {"hidden_size", "num_attention_heads"} and "num_attention_heads" in sizes:
        # Heads of an even size, as rotary positions turn pairs of channels.
        sizes["hidden_size"] = _nearest(sizes["hidden_size"], lcm(2, 2 * sizes["num_attention_heads"]), 0)


def _groups_of_experts(
    family: Family, config: Config, plan: ShrinkPlan, sizes: dict[str, Any]
) -> Iterator[tuple[str, int]]:
    """Group-limited routing; where all groups are chosen there is nothing to keep."""
    groups, chosen = config.get("n_group"), config.get("topk_group")
    row = family.experts
    if row is None or type(groups) is not int or type(chosen) is not int or groups < 2 or chosen >= groups:
        return
    before, after = plan.before.arguments, plan.after.arguments
    if (groups, chosen) == (before["moe_router_num_groups"], before["moe_router_group_topk"]):
        yield "n_group", after["moe_router_num_groups"]
        yield "topk_group", after["moe_router_group_topk"]
        return
    experts, published = sizes.get(row.count), config.get(row.count)
    if not isinstance(experts, int) or not isinstance(published, int):
        raise NoTwin(f"{row.count} is not published, whose groups n_group counts")
    # As large as the real ones are by the experts, in groups of two at least, of which two are summed.
    ratio = groups // gcd(groups, chosen), chosen // gcd(groups, chosen)
    times = max(1, round(groups * experts / published / ratio[0]))
    while times > 1 and (experts % (ratio[0] * times) or experts // (ratio[0] * times) < 2):
        times -= 1
    if experts % (ratio[0] * times):
        raise NoTwin(f"{experts} experts cannot be in {ratio[0]} groups, of which n_group has {groups}")
    yield "n_group", ratio[0] * times
    yield "topk_group", ratio[1] * times


def _shared_experts(
    family: Family, config: Config, plan: ShrinkPlan, sizes: dict[str, Any]
) -> Iterator[tuple[str, int]]:
    """How many experts wide the shared one is, where a number says it."""
    row = family.experts
    if row is None or not row.shared_count:
        return
    count, size = whole(config, row.shared_count), whole(config, row.size)
    dest = "moe_shared_expert_intermediate_size"
    if count is None or size is None or plan.before.arguments[dest] != count * size:
        return
    yield row.shared_count, _exact(plan.after.arguments[dest], 1, sizes[row.size], row.shared_count)


def _exact(size: int, times: int, divisor: int, key: str) -> int:
    result, rest = divmod(size * times, divisor)
    if rest or not result:
        raise NoTwin(f"{key}: the plan has {size} x {times} / {divisor} of it, which is not whole")
    return result
