"""Experts: what the publisher says of the routed and shared experts, and how tokens find them.

Megatron's side is ``topk_routing_with_score_function`` of megatron-core 0.19 (``moe_utils.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.families.items import (
    Config,
    Expectation,
    Item,
    Limit,
    NotModelled,
    Unknown,
    from_key,
    whole,
)
from harness.families.patterns import has_experts, moe_pattern
from harness.families.rows import Experts, Family, Groups


def experts(family: Family, config: Config) -> Iterator[Item]:
    if family.experts is None:
        yield Expectation("num_experts", None, f"{family.source}: no experts")
        return
    if not has_experts(family, config):
        yield Expectation("num_experts", None, "no layer of the pattern has experts")
        return
    row = family.experts
    yield from_key(config, "num_experts", row.count, "num_experts", "num_local_experts")
    yield from_key(config, "moe_router_topk", "num_experts_per_tok")
    yield from_key(config, "moe_ffn_hidden_size", row.size)
    if not family.hybrid:
        pattern, source = moe_pattern(family, config)
        yield (
            Unknown("moe_layer_freq", "which layers hold experts")
            if pattern is None
            else Expectation("moe_layer_freq", pattern, source)
        )
    yield from _scores(family, row, config)
    yield from _groups(family, row, config)
    yield from _shared(family, row, config)
    if row.latent:
        latent = config.get(row.latent)
        yield Expectation("moe_latent_size", latent, row.latent)
    else:
        yield Expectation("moe_latent_size", None, family.source)
    yield Expectation("export_moe_apply_probs_on_input", row.on_input, family.source)


# Routing


def _scores(family: Family, row: Experts, config: Config) -> Iterator[Item]:
    score, source = config.get("scoring_func", row.score), family.source
    if "scoring_func" in config:
        source = "scoring_func"
    yield Expectation("moe_router_score_function", score, source)
    yield from _normalisation(row, config, score)
    factor = config.get(row.scaling) if row.scaling else None
    if row.scaling and factor is None:
        yield Unknown("moe_router_topk_scaling_factor", row.scaling)
    else:
        yield Expectation(
            "moe_router_topk_scaling_factor",
            None if factor == 1 else factor,
            row.scaling or family.source,
        )
    bias = row.bias
    if isinstance(bias, str):
        published = config.get(bias, True)  # the key only takes away what the code has
        yield (
            Expectation("moe_router_enable_expert_bias", published, bias)
            if isinstance(published, bool)
            else Unknown("moe_router_enable_expert_bias", bias)
        )
    else:
        yield Expectation("moe_router_enable_expert_bias", bias, family.source)


def _normalisation(row: Experts, config: Config, score: Any) -> Iterator[Item]:
    """Whether the probabilities of the chosen experts are scaled to a sum of one.

    Megatron does so for a softmax by taking it over the chosen logits, for other scores always; not
    where a token goes to one expert.
    """
    key, renormalised = "norm_topk_prob", row.renormalised
    if isinstance(row.renormalised, str):
        key, renormalised = row.renormalised, config.get(row.renormalised, "")
    topk = whole(config, "num_experts_per_tok")
    softmax = score == "softmax"
    if not isinstance(renormalised, bool):
        what = "moe_router_pre_softmax" if softmax else "the sum of the routing probabilities"
        yield Unknown(what, key)
        return
    so = "the weights of the experts differ"
    if softmax and renormalised and topk == 1:
        yield Limit(f"{key} on", key, "the expert's own probability where moe_router_topk is 1", so)
    elif softmax:
        yield Expectation("moe_router_pre_softmax", not renormalised, key)
    elif renormalised and topk == 1:
        yield Limit(f"{key} on", key, "the expert's own score where moe_router_topk is 1", so)
    elif not renormalised and topk is not None and topk > 1:
        yield Limit(f"{key} off", key, f"scores of the {topk} experts that sum to one", so)


# Left out, it is as transformers' code has it, which knows no key for it.
_METHODS = ("greedy", "group_limited_greedy", "noaux_tc", None)


def _groups(family: Family, row: Experts, config: Config) -> Iterator[Item]:
    rule, source = row.groups, family.source
    method = config.get("topk_method")
    groups, chosen = config.get("n_group"), config.get("topk_group")
    if rule is Groups.METHOD and method not in _METHODS:
        yield NotModelled("moe_router_num_groups", "topk_method", method)
        return
    if rule is Groups.METHOD and method == "greedy":
        rule, source = Groups.NONE, "topk_method"
    if rule is Groups.NONE:
        yield Expectation("moe_router_num_groups", None, source)
        yield Expectation("moe_router_group_topk", None, source)
        return
    if "n_group" not in config or "topk_group" not in config:
        yield Unknown("moe_router_num_groups", "n_group, topk_group")
        return
    if groups in (None, 1) or groups == chosen:
        groups = chosen = None  # every group is chosen
    yield Expectation("moe_router_num_groups", groups, "n_group")
    yield Expectation("moe_router_group_topk", chosen, "topk_group")
    topk = whole(config, "num_experts_per_tok")
    if type(chosen) is not int or chosen < 1 or topk is None:
        return
    published = 1 if method == "group_limited_greedy" else 2
    if topk // chosen != published:
        yield Limit(
            f"groups of experts chosen by the sum of their {published} best",
            "topk_method" if rule is Groups.METHOD else source,
            f"a choice by the sum of their {topk // chosen} best (moe_router_topk / moe_router_group_topk)",
            "other groups are chosen",
        )


def _shared(family: Family, row: Experts, config: Config) -> Iterator[Item]:
    dest = "moe_shared_expert_intermediate_size"
    if row.shared_count:
        yield _shared_by_count(row, config, dest)
    elif row.shared_size:
        size = config.get(row.shared_size)
        yield (
            Unknown(dest, row.shared_size)
            if size is None
            else Expectation(dest, size or None, row.shared_size)
        )
    else:
        yield Expectation(dest, None, family.source)
    yield Expectation("moe_shared_expert_gate", row.shared_gate, family.source)


def _shared_by_count(row: Experts, config: Config, dest: str) -> Item:
    if row.shared_count not in config:
        return Unknown(dest, row.shared_count)
    count, size = config.get(row.shared_count), whole(config, row.size)
    if count in (None, 0):
        return Expectation(dest, None, row.shared_count)
    if type(count) is not int or size is None:
        return NotModelled(dest, row.shared_count, count)
    return Expectation(dest, count * size, f"{row.shared_count} x {row.size}")
