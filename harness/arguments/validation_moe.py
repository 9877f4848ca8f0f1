"""Validation of mixtures of experts: the experts, how they are scored, and groups of them.

Checks of ``transformer_config.py``, ``moe/experts.py``, ``moe/shared_experts.py`` and ``moe/moe_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from harness.finding import Finding

if TYPE_CHECKING:
    from harness.arguments.values import Arguments


def experts(a: Arguments) -> Iterator[Finding]:
    """What Megatron refuses of the experts themselves."""
    experts, topk = a["num_experts"], a["moe_router_topk"]
    if experts is None:
        if a["moe_latent_size"] is not None:
            message = "Megatron refuses it without --num-experts"
            yield a.finding("moe_latent_size", message, expected="--num-experts", actual="not set")
        return
    if topk > experts > 0:
        message = f"--moe-router-topk is larger than --num-experts ({experts})"
        yield a.finding("moe_router_topk", message, expected=f"<= {experts}", actual=topk)
    if a["moe_shared_expert_intermediate_size"] and a["add_bias_linear"]:
        message = "Megatron refuses biases in shared experts: set --disable-bias-linear"
        yield a.finding("moe_shared_expert_intermediate_size", message)
    if a["moe_shared_expert_overlap"] and a["moe_token_dispatcher_type"] == "allgather":
        message = "Megatron refuses to overlap the shared expert with --moe-token-dispatcher-type allgather"
        yield a.finding("moe_shared_expert_overlap", message, expected="alltoall", actual="allgather")
    elif a["moe_shared_expert_overlap"] and a["moe_latent_size"] is not None:
        message = "Megatron refuses to overlap the shared expert with latent experts (--moe-latent-size)"
        yield a.finding("moe_shared_expert_overlap", message)
    if a["export_moe_apply_probs_on_input"] and topk != 1:
        message = "Megatron refuses routing weights on the input unless --moe-router-topk is 1"
        yield a.finding("export_moe_apply_probs_on_input", message, expected=1, actual=topk)


def routing(a: Arguments) -> Iterator[Finding]:
    """What Megatron refuses of how experts are scored."""
    if a["num_experts"] is None:
        return
    score, balancing = a["moe_router_score_function"], a["moe_router_load_balancing_type"]
    if a["moe_router_enable_expert_bias"] and score not in ("sigmoid", "sqrtsoftplus"):
        message = f"Megatron refuses it with --moe-router-score-function {score}: only sigmoid has a bias"
        yield a.finding("moe_router_enable_expert_bias", message, expected="sigmoid", actual=score)
    after = score == "softmax" and not a["moe_router_pre_softmax"] and "sinkhorn" not in _as_tuple(balancing)
    if after and a["moe_router_topk"] == 1:
        message = "Megatron refuses a softmax over the one chosen expert: add --moe-router-pre-softmax"
        yield a.finding("moe_router_topk", message, expected="--moe-router-pre-softmax", actual=1)
    padding = a["moe_router_padding_for_quantization"], a["moe_router_padding_for_fp8"]
    if any(padding) and a["fp8"] is None and a["fp4"] is None:
        dest = "moe_router_padding_for_quantization" if padding[0] else "moe_router_padding_for_fp8"
        yield a.finding(dest, "Megatron refuses it without --fp8-format or --fp4-format")
    coefficients = _as_tuple(a["moe_aux_loss_coeff"])
    if len(_as_tuple(balancing)) > 1 and len(_as_tuple(balancing)) != len(coefficients):
        message = "Megatron wants one --moe-aux-loss-coeff for each kind of load balancing"
        expected = len(_as_tuple(balancing))
        yield a.finding(
            "moe_router_load_balancing_type", message, expected=expected, actual=len(coefficients)
        )


def _as_tuple(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def groups_of_experts(a: Arguments) -> Iterator[Finding]:
    """Group-limited routing (``group_limited_topk`` of ``moe_utils.py``)."""
    experts, groups = a["num_experts"], a["moe_router_num_groups"]
    chosen, topk = a["moe_router_group_topk"], a["moe_router_topk"]
    if experts is None or experts < 1:
        return
    if not chosen:
        if groups:
            message = "has no effect without --moe-router-group-topk: every expert can be chosen"
            yield a.finding("moe_router_num_groups", message, expected="--moe-router-group-topk")
        return
    if not groups:
        yield a.finding("moe_router_group_topk", "Megatron refuses it without --moe-router-num-groups")
        return
    if min(groups, chosen) < 1:
        return
    if experts % groups:
        message = f"Megatron refuses it: {experts} experts / {groups} groups is not whole"
        expected = f"a divisor of {experts}"
        yield a.finding("moe_router_num_groups", message, expected=expected, actual=groups)
    elif chosen > groups:
        message = f"Megatron refuses it: larger than --moe-router-num-groups ({groups})"
        yield a.finding("moe_router_group_topk", message, expected=f"<= {groups}", actual=chosen)
    elif topk < chosen:
        message = (
            f"--moe-router-topk {topk} over {chosen} groups is less than one expert of each: Megatron would "
            "choose the groups by nothing"
        )
        yield a.finding("moe_router_group_topk", message, expected=f"<= {topk}", actual=chosen)
    elif topk > chosen * (experts // groups):
        inside = chosen * (experts // groups)
        message = f"the {chosen} chosen groups hold {inside} experts, fewer than --moe-router-topk {topk}"
        yield a.finding("moe_router_group_topk", message, expected=f"<= {inside} experts", actual=topk)
    elif topk // chosen > experts // groups:
        message = f"a group holds {experts // groups} experts, and is judged by its best {topk // chosen}"
        yield a.finding("moe_router_group_topk", message, actual=chosen)
