"""Twin: the published facts and a plan -> the config of a tiny Hugging Face model of the same family.

Sizes and layers go through the plan; everything else is as published. Nothing is read from the preset but
what the plan made of its sizes, so that a wrong setting of the preset is on one side only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.facts import Facts
from harness.families import Family, Unknown, expectations
from harness.families.items import Config, LeftOut
from harness.parity.hf_layers import kept_layers, layer_keys, published_kinds
from harness.parity.hf_sizes import tiny_sizes
from harness.parity.no_twin import NoTwin
from harness.shrink import ShrinkPlan

__all__ = ["NoTwin", "Twin", "twin"]


@dataclass(frozen=True, slots=True)
class Twin:
    """A tiny Hugging Face model, as its config.json.

    ``layers`` has the published layer that each tiny layer stands for, ``assumed`` what no publisher says,
    ``left_out`` the published parts that the twin does not have, all in words. ``without`` are the modules
    of the tiny model (as the checkpoint names them) that the Megatron model has no counterpart of: they
    are made to do nothing, and the checkpoint leaves them out.
    """

    config: Mapping[str, Any]
    architecture: str
    layers: tuple[int, ...]
    assumed: tuple[str, ...]
    left_out: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the language model alone, where it is one part of several."""
        found: Mapping[str, Any] = self.config.get("text_config", self.config)
        return found


@dataclass(frozen=True, slots=True)
class _Model:
    """A family as transformers has it: its class, and how its config.json nests the language model.

    ``aliases`` are keys that a publisher uses and transformers' configuration does not read, each with the
    key that it does read.
    """

    architecture: str
    model_type: str = ""
    nested: str = ""
    aliases: Mapping[str, str] | None = None
    note: str = ""


_NEMOTRON_H_ALIASES = {
    "rms_norm_eps": "layer_norm_epsilon",
    "norm_eps": "layer_norm_epsilon",
    "attention_head_dim": "head_dim",
    "mamba_state_dim": "ssm_state_size",
    "mamba_num_groups": "n_groups",
}
_LLAMA4 = _Model("Llama4ForConditionalGeneration", nested="llama4")
_MODELS: Mapping[str, _Model] = {
    "qwen2": _Model("Qwen2ForCausalLM"),
    "qwen3": _Model("Qwen3ForCausalLM"),
    "qwen3_moe": _Model("Qwen3MoeForCausalLM"),
    "qwen3_next": _Model("Qwen3NextForCausalLM"),
    "llama": _Model("LlamaForCausalLM"),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "phi3": _Model("Phi3ForCausalLM"),
    "nemotron": _Model("NemotronForCausalLM", aliases={"kv_channels": "head_dim"}),
    "nemotron_h": _Model("NemotronHForCausalLM", aliases=_NEMOTRON_H_ALIASES),
    "mistral": _Model("MistralForCausalLM"),
    "mixtral": _Model("MixtralForCausalLM"),
    "deepseek_v2": _Model("DeepseekV2ForCausalLM"),
    "deepseek_v3": _Model("DeepseekV3ForCausalLM"),
    "kimi_k2": _Model(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        note="model_type kimi_k2, of which transformers has no code: its publisher's own is DeepSeek-V3's",
    ),
    "gpt_oss": _Model("GptOssForCausalLM"),
    "minimax_m2": _Model("MiniMaxM2ForCausalLM"),
    "glm4_moe": _Model("Glm4MoeForCausalLM"),
}

# Published keys that say how a checkpoint is stored, used or trained, or name tokens that the smaller
# vocabulary may not have.
_DROPPED = frozenset(
    """
    _name_or_path architectures auto_map dtype torch_dtype transformers_version quantization_config
    bos_token_id eos_token_id pad_token_id use_cache text_config vision_config null_keys
    image_token_index boi_token_index eoi_token_index image_token_id boi_token_id eoi_token_id
    use_mamba_kernels mamba_ssm_cache_dtype
    """.split()
)
# Predictions of later tokens: the next one does not depend on them.
_PREDICTIONS = frozenset(
    """
    num_nextn_predict_layers num_mtp_modules mtp_transformer_layers use_mtp mtp_hybrid_override_pattern
    mtp_layers_block_type
    """.split()
)
# Keys of Hugging Face that a publisher's facts may have from elsewhere than its config file.
_FILLED = frozenset(
    """
    tie_word_embeddings attention_bias mlp_bias use_bias mamba_proj_bias use_conv_bias conv_kernel
    mlp_hidden_act hidden_act rms_norm_eps layer_norm_epsilon norm_eps rope_theta rope_scaling
    partial_rotary_factor use_qk_norm attn_temperature_tuning floor_scale attn_scale attention_head_dim
    norm_topk_prob n_group topk_group routed_scaling_factor scoring_func topk_method
    """.split()
)


def twin(facts: Facts, plan: ShrinkPlan) -> Twin:
    """The tiny model of ``facts`` at the sizes of ``plan``. Raises NoTwin."""
    family = facts.family
    if family is None:
        raise NoTwin(f"model_type {facts.config.get('model_type')} is none that the harness knows")
    model = _MODELS.get(family.model_type)
    if model is None:
        raise NoTwin(f"model_type {family.model_type}: no class of transformers is known for it")
    published = _spelled(facts, model)
    kinds = published_kinds(family, published)
    kept = kept_layers(plan, kinds)
    keys, layers = layer_keys(family, published, kinds, kept)
    config = {**published, **tiny_sizes(family, published, plan), **keys}
    config |= {"use_cache": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    for key in (_PREDICTIONS | {"layers_block_type"}) & config.keys():
        del config[key]
    if family.model_type in _PREDICT_BY_DEFAULT:
        config["num_nextn_predict_layers"] = 0
    if "rotary_dim" in config:
        config["partial_rotary_factor"] = config.pop("rotary_dim") / config["head_dim"]
    config["model_type"] = model.model_type or family.model_type
    half = family.delta_net and len(kept) % 2 == 1
    left_out = list(_left_out(family, facts.config))
    without: tuple[str, ...] = ()
    if half:
        left_out.append(f"the feed-forward of layer {layers[-1]}, of which the plan has the mixer alone")
        last = f"model.layers.{len(layers) - 1}."
        without = (f"{last}mlp.", f"{last}post_attention_layernorm.")
    return Twin(
        _nested(config, model),
        model.architecture,
        layers,
        tuple(_assumed(family, facts.config, model)),
        tuple(left_out),
        without,
    )


# transformers' configurations of these have a layer that predicts more where no key says.
_PREDICT_BY_DEFAULT = frozenset({"deepseek_v3", "kimi_k2", "glm4_moe"})


def _spelled(facts: Facts, model: _Model) -> dict[str, Any]:
    """What the publisher says of the model, in the keys that transformers reads."""
    said = {
        key: value
        for key, value in facts.config.items()
        if (key in facts.published or key in _FILLED) and key not in _DROPPED
    }
    for alias, key in (model.aliases or {}).items():
        if alias in said:
            said.setdefault(key, said.pop(alias))
    return said


def _nested(config: dict[str, Any], model: _Model) -> Mapping[str, Any]:
    own = {"architectures": [model.architecture], "torch_dtype": "float32"}
    if not model.nested:
        return config | own
    text = config | {"model_type": "llama4_text"}
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return {"model_type": model.nested, "text_config": text, **own, **tied}


def _assumed(family: Family, config: Config, model: _Model) -> Iterator[str]:
    if model.note:
        yield model.note
    for item in expectations(family, config):
        if isinstance(item, Unknown):
            yield f"{item.key} is not published: transformers' own default"


def _left_out(family: Family, config: Config) -> Iterator[str]:
    for item in expectations(family, config):
        if isinstance(item, LeftOut):
            yield f"{item.what} ({item.source})"
