"""Rules: what ModelOpt's importer does not know of an architecture and a direct mapping of weights can say.

Each row is ours, in ModelOpt's own form: the name under which the importer asks for it, the function of the
importer that does it, and the tensor's prefix in the published checkpoint. Only what the importer lacks is
added; what needs more than a mapping stays missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Ours:
    """One rule of ours for one architecture. ``do`` is a function of ModelOpt's importer."""

    name: str
    do: str
    prefix: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mapping(self) -> Any:
        from modelopt.torch.export.plugins.mcore_custom import CustomModuleMapping

        return CustomModuleMapping(self.do, self.prefix, dict(self.options))

    @property
    def words(self) -> str:
        return f"{self.name} from {self.prefix}*"


_COPY, _QKV, _GATED = "name_remapping", "qkv_merging", "gated_mlp_merging"
_LAYER = "model.layers.{}."


def _ends() -> tuple[Ours, ...]:
    return (
        Ours("word_embeddings", _COPY, "model.embed_tokens."),
        Ours("final_layernorm", _COPY, "model.norm."),
        Ours("output_layer", _COPY, "lm_head."),
        Ours("input_layernorm", _COPY, _LAYER + "input_layernorm."),
        Ours("pre_mlp_layernorm", _COPY, _LAYER + "post_attention_layernorm."),
        Ours("linear_proj", _COPY, _LAYER + "self_attn.o_proj."),
    )


def _attention() -> tuple[Ours, ...]:
    return (*_ends(), Ours("linear_qkv", _QKV, _LAYER + "self_attn."))


def _w_experts(block: str) -> tuple[Ours, ...]:
    """Experts whose three matrices are called w1 (gate), w2 (down) and w3 (up)."""
    names = {"gate_proj_name": "w1", "up_proj_name": "w3"}
    return (
        Ours("local_experts.linear_fc1", _GATED, _LAYER + block + "experts.{}.", names),
        Ours("local_experts.linear_fc2", _COPY, _LAYER + block + "experts.{}.w2."),
    )


_LLAMA4 = "language_model.model.layers.{}.feed_forward."

OURS: Mapping[str, tuple[Ours, ...]] = {
    "Llama4ForConditionalGeneration": (
        Ours("linear_fc1", _GATED, _LLAMA4),
        Ours("linear_fc2", _COPY, _LLAMA4 + "down_proj."),
    ),
    "MixtralForCausalLM": (
        *_attention(),
        Ours("router", _COPY, _LAYER + "block_sparse_moe.gate."),
        *_w_experts("block_sparse_moe."),
    ),
    "MiniMaxM2ForCausalLM": (
        *_attention(),
        Ours("q_layernorm", _COPY, _LAYER + "self_attn.q_norm."),
        Ours("k_layernorm", _COPY, _LAYER + "self_attn.k_norm."),
        Ours(
            "router",
            _COPY,
            _LAYER + "block_sparse_moe.gate.",
            {"mapping": {"expert_bias": "../e_score_correction_bias"}},
        ),
        *_w_experts("block_sparse_moe."),
    ),
    "Phi3ForCausalLM": (
        *_ends(),
        # The gate's rows come before the others on both sides.
        Ours("linear_fc1", _COPY, _LAYER + "mlp.gate_up_proj."),
        Ours("linear_fc2", _COPY, _LAYER + "mlp.down_proj."),
    ),
    "NemotronForCausalLM": (
        *_attention(),
        Ours("linear_fc1", _COPY, _LAYER + "mlp.up_proj."),
        Ours("linear_fc2", _COPY, _LAYER + "mlp.down_proj."),
    ),
    "Glm4MoeForCausalLM": (
        *_attention(),
        Ours("q_layernorm", _COPY, _LAYER + "self_attn.q_norm."),
        Ours("k_layernorm", _COPY, _LAYER + "self_attn.k_norm."),
        Ours("linear_fc1", _GATED, _LAYER + "mlp."),
        Ours("linear_fc2", _COPY, _LAYER + "mlp.down_proj."),
        Ours(
            "router",
            _COPY,
            _LAYER + "mlp.gate.",
            {"mapping": {"expert_bias": "e_score_correction_bias"}},
        ),
        Ours("shared_experts.linear_fc1", _GATED, _LAYER + "mlp.shared_experts."),
        Ours("shared_experts.linear_fc2", _COPY, _LAYER + "mlp.shared_experts.down_proj."),
        Ours("local_experts.linear_fc1", _GATED, _LAYER + "mlp.experts.{}."),
        Ours("local_experts.linear_fc2", _COPY, _LAYER + "mlp.experts.{}.down_proj."),
    ),
}


def by_hand(architecture: str, importer: Any) -> Mapping[str, Callable[..., None]]:
    """The rules of ours that no function of the importer can do: the name and what does it."""
    if architecture not in FUSED:
        return {}

    def linear_qkv(module: Any, layer: int, **options: Any) -> None:
        importer._name_remapping(module, FUSED[architecture].format(layer))
        config = module.config
        module.weight.data.copy_(
            grouped(module.weight.data, config.num_attention_heads, config.num_query_groups)
        )

    return {"linear_qkv": linear_qkv}


def words_by_hand(architecture: str) -> Mapping[str, str]:
    """What the report says of each rule of ``by_hand``."""
    if architecture not in FUSED:
        return {}
    return {"linear_qkv": f"linear_qkv from {FUSED[architecture]}weight, its rows put group by group"}


# Queries, keys and values in one matrix, all heads of each in a row.
FUSED: Mapping[str, str] = {"Phi3ForCausalLM": _LAYER + "self_attn.qkv_proj."}


def grouped(fused: Any, heads: int, groups: int) -> Any:
    """Rows [all queries, all keys, all values] -> [group by group: its queries, its key, its value]."""
    import torch

    width = len(fused) // (heads + 2 * groups)
    rows = fused.view(heads + 2 * groups, width, -1)
    queries, keys, values = rows.split([heads, groups, groups])
    parts = queries.unflatten(0, (groups, heads // groups)), keys.unsqueeze(1), values.unsqueeze(1)
    return torch.cat(parts, dim=1).reshape(fused.shape)


def added(architecture: str, known: Mapping[str, Any]) -> tuple[Ours, ...]:
    """The rules of ours for ``architecture`` that are not among those that ModelOpt has for it."""
    return tuple(rule for rule in OURS.get(architecture, ()) if rule.name not in known)
