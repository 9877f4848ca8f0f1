"""HF effect: a tiny config and what transformers made of it -> whether each published setting is in effect.

transformers keeps keys that its code never reads. A twin with such a key would not be the published model,
and nobody would be told.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.families import INERT_KEYS, find_family
from harness.parity.no_twin import NoTwin

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What the modeling code of a model_type (models/<model_type>/modeling_<model_type>.py of transformers 5.14)
# fixes, whatever these keys say.
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"attention_bias": True},
    "qwen3_moe": {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
    "phi3": {"attention_bias": False, "mlp_bias": False},
    "mixtral": {"attention_bias": False},
    "deepseek_v2": {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    "glm4_moe": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    "gpt_oss": {"hidden_act": "silu", "swiglu_limit": 7.0},
    "minimax_m2": {
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
    },
    "nemotron_h": {"attention_bias": False, "mamba_proj_bias": False, "n_shared_experts": 1},
}
# Keys that other files of transformers read: the configuration itself, or what builds masks and positions.
_READ_ELSEWHERE = frozenset(
    """
    tie_word_embeddings attention_chunk_size use_sliding_window max_window_layers interleave_moe_layer_step
    layer_types hybrid_override_pattern full_attention_interval num_hidden_layers max_position_embeddings
    num_nextn_predict_layers num_experts num_local_experts n_routed_experts head_dim sliding_window
    """.split()
)
# Keys of training, and what is dropped out in it.
_TRAINING = frozenset(
    "hidden_dropout router_aux_loss_coef rescale_prenorm_residual residual_in_fp32 num_logits_to_keep".split()
)
_ROPE = frozenset({"rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters"})


def check_in_effect(config: Mapping[str, Any], built: PreTrainedConfig) -> None:
    """Raises NoTwin that names the keys of a language model's ``config`` that ``built`` lacks or ignores."""
    wrong = list(_without_effect(config, built))
    if wrong:
        raise NoTwin("; ".join(wrong))


def _without_effect(config: Mapping[str, Any], built: PreTrainedConfig) -> Iterator[str]:
    kind = str(config["model_type"])
    family = find_family(config)
    unused = INERT_KEYS | _TRAINING | (family.unused if family is not None else frozenset())
    fixed, source = _FIXED.get(kind, {}), _modeling_source(built)
    for key, value in config.items():
        if key in fixed:
            if value != fixed[key]:
                yield f"{key} is {value!r}, transformers' code of {kind} has {fixed[key]!r} whatever it says"
        elif key in unused:
            continue
        elif key in _ROPE:
            yield from _rope_without_effect(key, value, built)
        elif not hasattr(built, key) or not (key in _READ_ELSEWHERE or _reads(source, key)):
            if value is not None and key not in _CONSUMED:
                yield f"transformers' code of {kind} does not read {key} (published: {value!r})"
        elif not _same(getattr(built, key), value, key, config):
            yield f"{key} is {value!r}, transformers made {getattr(built, key)!r} of it"


# The configuration makes layer_types of these and keeps no more of them.
_CONSUMED = frozenset({"full_attention_interval"})


def _reads(source: str, key: str) -> bool:
    return re.search(rf"\bconfig\.{key}\b|[\"']{key}[\"']", source) is not None


def _modeling_source(built: PreTrainedConfig) -> str:
    """The modeling code beside the configuration's class."""
    module = type(built).__module__.replace(".configuration_", ".modeling_")
    __import__(module)
    return inspect.getsource(sys.modules[module])


def _same(made: Any, value: Any, key: str, config: Mapping[str, Any]) -> bool:
    if key == "sliding_window" and config.get("use_sliding_window") is False:
        return made is None  # switched off
    if key == "num_key_value_heads" and value is None:
        return bool(made == config["num_attention_heads"])
    return list(made) == list(value) if isinstance(value, list) else bool(made == value)


def _rope_without_effect(key: str, value: Any, built: PreTrainedConfig) -> Iterator[str]:
    """transformers 5 gathers everything about rotary positions in one table."""
    rope: Any = built.rope_parameters
    wanted = {key: value}
    if key in ("rope_scaling", "rope_parameters"):
        wanted = {"rope_type" if name == "type" else name: said for name, said in (value or {}).items()}
        wanted.setdefault("rope_type", "default")
    for name, said in wanted.items():
        if rope.get(name) != said:
            yield f"{key}: {name} is {said!r}, transformers made {rope.get(name)!r} of it"
