"""Settings: a part of a layer -> the Megatron arguments that act there, and what is published for them.

By it a difference in numbers is traced to a flag. The comparison of settings names suspects and never
decides whether there is a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from harness.arguments import Arguments, How
from harness.arguments.effective import NO_EFFECT, effective
from harness.facts import Facts
from harness.families import Expectation, Limit, Unknown, expectations
from harness.finding import Finding, Severity
from harness.parity.site import Part

_NORM = "layernorm_epsilon normalization layernorm_zero_centered_gamma"
_ROTATION = """
    rotary_base rotary_percent use_rope_scaling rope_scaling_factor rope_type
    rotary_scaling_factor rotary_seq_len_interpolation_factor mscale mscale_all_dim
    yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    position_embedding_type
"""
_TURNED = "rotary_interleaved no_rope_freq " + _ROTATION
_QK_NORM = "qk_layernorm export_qk_l2_norm " + _NORM
_CORE = """
    window_size window_attn_skip_freq softmax_type mscale mscale_all_dim rotary_scaling_factor
    rope_type kv_channels num_query_groups num_attention_heads attention_output_gate
    apply_query_key_layer_scaling attention_dropout
"""
_ROUTING = """
    moe_router_topk moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor
    moe_router_enable_expert_bias moe_router_num_groups moe_router_group_topk num_experts add_bias_linear
"""
_ACTIVATION = """
    swiglu squared_relu quick_geglu glu_linear_offset activation_func_clamp_value add_bias_linear
    ffn_hidden_size moe_ffn_hidden_size
"""
_KINDS = "moe_layer_freq hybrid_layer_pattern"
_MAMBA = "mamba_num_groups mamba_num_heads mamba_head_dim mamba_state_dim"

# The arguments that act at each part, those that most often explain a difference first.
ACTING: Mapping[Part, tuple[str, ...]] = {
    part: tuple(dict.fromkeys(dests.split()))
    for part, dests in {
        Part.EMBEDDING: "position_embedding_type padded_vocab_size",
        Part.ROTARY: _ROTATION,
        Part.INPUT_NORM: _NORM + " hybrid_layer_pattern",
        Part.PROJECTION: "add_qkv_bias add_bias_linear num_query_groups kv_channels num_attention_heads",
        Part.QUERY_DOWN: "q_lora_rank",
        Part.QUERY_UP: "q_lora_rank qk_head_dim qk_pos_emb_head_dim",
        Part.KV_DOWN: "kv_lora_rank qk_pos_emb_head_dim",
        Part.KV_UP: "kv_lora_rank qk_head_dim v_head_dim",
        Part.QUERY_NORM: _QK_NORM,
        Part.KEY_NORM: _QK_NORM,
        Part.KV_NORM: _QK_NORM,
        Part.QUERIES: _TURNED + _QK_NORM,
        Part.KEYS: _TURNED + _QK_NORM,
        Part.VALUES: "add_qkv_bias num_query_groups v_head_dim kv_channels",
        Part.CORE: _CORE,
        Part.ATTENTION: "add_bias_linear attention_output_gate hybrid_layer_pattern",
        Part.MLP_NORM: _NORM + " hybrid_layer_pattern",
        Part.ROUTER: _ROUTING + _KINDS,
        Part.SHARED: "moe_shared_expert_intermediate_size moe_shared_expert_gate " + _ACTIVATION + _KINDS,
        Part.MLP: _ACTIVATION
        + "export_moe_apply_probs_on_input moe_latent_size moe_shared_expert_intermediate_size "
        + "moe_shared_expert_gate "
        + _KINDS,
        Part.MAMBA_IN: _MAMBA,
        Part.MAMBA_NORM: _MAMBA + " layernorm_epsilon",
        Part.MAMBA: _MAMBA + " layernorm_epsilon",
        Part.DELTA: "linear_num_key_heads linear_num_value_heads layernorm_epsilon",
        Part.LAYER: _KINDS,
        Part.FINAL_NORM: _NORM,
        Part.LOGITS: "untie_embeddings_and_output_weights padded_vocab_size",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One argument that acts at a part: its flag and line in the preset, its value, and what is published.

    ``source`` is the published key, empty where none says anything of the argument; ``differs`` whether
    the published value is another.
    """

    dest: str
    flag: str
    line: int | None
    value: Any
    source: str
    published: Any
    differs: bool
    how: How

    @property
    def text(self) -> str:
        """``--rotary-base 10000 (line 33): 1000000 published (rope_theta)``."""
        where = f"line {self.line}" if self.line is not None else _HOW[self.how]
        own = f"{self.flag} {_said(self.value)} ({where})"
        return f"{own}: {_said(self.published)} published ({self.source})" if self.source else own


_HOW = {How.GIVEN: "as given", How.DEFAULT: "Megatron's default", How.DERIVED: "from other flags"}


def acting(part: Part, arguments: Arguments, facts: Facts) -> tuple[Setting, ...]:
    """The settings that act at ``part``, those that differ from the published ones first.

    What changes nothing in the model is left out.
    """
    published = _published(facts)
    found = [_setting(dest, arguments, published.get(dest)) for dest in ACTING[part]]
    settings = [setting for setting in found if setting is not None]
    return tuple(sorted(settings, key=lambda setting: not setting.differs))


def differing(arguments: Arguments, facts: Facts) -> tuple[Setting, ...]:
    """Every setting that differs from the published one."""
    published = _published(facts)
    found = [_setting(dest, arguments, item) for dest, item in published.items()]
    return tuple(setting for setting in found if setting is not None and setting.differs)


def limits(facts: Facts) -> tuple[Limit, ...]:
    """What is published and no flag of Megatron can say."""
    family = facts.family
    items = () if family is None else expectations(family, facts.config)
    return tuple(item for item in items if isinstance(item, Limit))


# Arguments whose value is the published key's, so that either stands for the other.
_SAME_VALUE = frozenset({"layernorm_epsilon", "rotary_base", "moe_router_topk_scaling_factor"})


def completed(facts: Facts, arguments: Arguments) -> tuple[Facts, tuple[Finding, ...]]:
    """The facts with what no publisher's figure says and the preset does; a warning for each.

    Nothing is known of these, so that they cannot be compared; all else can.
    """
    missing = {dest: key for dest, key in unknown(facts).items() if dest in _SAME_VALUE}
    values = {key: arguments[dest] for dest, key in missing.items()}
    warnings = tuple(
        arguments.finding(
            dest,
            f"{facts.label} does not say {key}: the published model was given the preset's, and nothing here "
            "says whether it is right",
            stage="parity",
            severity=Severity.WARNING,
            actual=arguments[dest],
        )
        for dest, key in missing.items()
    )
    config = MappingProxyType({**facts.config, **values})
    return replace(facts, config=config, published=facts.published | values.keys()), warnings


def unknown(facts: Facts) -> Mapping[str, str]:
    """The arguments of which the publisher says nothing, each with the key that would."""
    family = facts.family
    items = () if family is None else expectations(family, facts.config)
    return {item.what: item.key for item in items if isinstance(item, Unknown)}


def _published(facts: Facts) -> Mapping[str, Expectation]:
    family = facts.family
    if family is None:
        return {}
    items = expectations(family, facts.config)
    return {item.dest: item for item in items if isinstance(item, Expectation)}


def _setting(dest: str, arguments: Arguments, published: Expectation | None) -> Setting | None:
    layers = len(published.value) if published and isinstance(published.value, tuple) else None
    value = effective(arguments, dest, layers)
    if value is NO_EFFECT:
        return None
    origin = arguments.origin(dest)
    return Setting(
        dest=dest,
        flag=origin.flag,
        line=origin.line,
        value=value,
        source=published.source if published else "",
        published=published.value if published else None,
        differs=published is not None and not _equal(value, published.value),
        how=origin.how,
    )


def _equal(one: Any, other: Any) -> bool:
    """Equal, and no switch taken for a number."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        runs = ",".join(map(str, value))
        return runs if len(value) <= _SHORT else f"{','.join(map(str, value[:_SHORT]))},..."
    return "none" if value in (None, "") else f"{value}"


# Entries of a pattern that are said in full.
_SHORT = 8
