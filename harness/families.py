"""Families: a Hugging Face ``config.json`` -> the Megatron arguments that mean the same model.

One row per ``model_type`` says what the family's modeling code fixes and no key tells; one table per
topic says which key gives which argument. Every source is transformers' modeling file of the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.finding import Severity


@dataclass(frozen=True, slots=True)
class Expectation:
    """The value that a Megatron argument must have, and the published key that says so."""

    dest: str
    value: Any
    source: str
    severity: Severity = Severity.ERROR
    why: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """A key that the publisher leaves out, so that ``dest`` cannot be checked."""

    dest: str
    key: str


@dataclass(frozen=True, slots=True)
class NotModelled:
    """Something that the publisher says of the model and that the harness cannot check: an error."""

    dest: str
    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class Family:
    """What the modeling code of one ``model_type`` does whatever the config says.

    The biases name the config key that decides, or are fixed. ``gated`` doubles the first
    feed-forward matrix; ``zero_centered`` norms multiply by one plus their weight.
    """

    model_type: str
    qkv_bias: bool | str
    output_bias: bool | str
    mlp_bias: bool | str
    qk_layernorm: bool
    moe: bool
    source: str
    normalization: str = "RMSNorm"
    zero_centered: bool = False
    epsilon: str = "rms_norm_eps"
    gated: bool = True


FAMILIES = (
    Family("qwen2", True, False, False, False, False, "models/qwen2/modeling_qwen2.py"),
    Family("qwen3", "attention_bias", "attention_bias", False, True, False, "models/qwen3/modeling_qwen3.py"),
    Family(
        "qwen3_moe",
        "attention_bias",
        "attention_bias",
        False,
        True,
        True,
        "models/qwen3_moe/modeling_qwen3_moe.py",
    ),
    Family(
        "llama",
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        False,
        False,
        "models/llama/modeling_llama.py",
    ),
    Family("phi3", False, False, False, False, False, "models/phi3/modeling_phi3.py"),
    Family(
        "nemotron",
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        False,
        False,
        "models/nemotron/modeling_nemotron.py",
        normalization="LayerNorm",
        zero_centered=True,
        epsilon="norm_eps",
        gated=False,
    ),
    Family("mistral", False, False, False, False, False, "models/mistral/modeling_mistral.py"),
    Family("mixtral", False, False, False, False, True, "models/mixtral/modeling_mixtral.py"),
)
_BY_TYPE = {family.model_type: family for family in FAMILIES}

# Keys that change nothing in what the model computes, and keys that another one decides.
INERT_KEYS = frozenset(
    """
    _name_or_path architectures auto_map model_type transformers_version torch_dtype dtype use_cache
    bos_token_id eos_token_id pad_token_id initializer_range attention_dropout output_router_logits
    router_aux_loss_coef router_jitter_noise max_window_layers pretraining_tp quantization_config
    output_attentions output_hidden_states return_dict embd_pdrop resid_pdrop
    original_max_position_embeddings kv_channels
    """.split()
)
# Keys that a topic below reads.
READ_KEYS = frozenset(
    """
    num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size rms_norm_eps
    norm_eps head_dim vocab_size attention_bias mlp_bias tie_word_embeddings max_position_embeddings
    rope_parameters rope_theta partial_rotary_factor rope_scaling use_sliding_window sliding_window
    layer_types hidden_act num_experts num_local_experts num_experts_per_tok moe_intermediate_size
    decoder_sparse_step mlp_only_layers norm_topk_prob
    """.split()
)

Config = Mapping[str, Any]
Item = Expectation | Unknown | NotModelled


def find_family(config: Config) -> Family | None:
    return _BY_TYPE.get(str(config.get("model_type")))


def expectations(family: Family, config: Config) -> Iterator[Item]:
    """Everything that the published ``config`` says of Megatron's arguments, topic by topic."""
    for topic in _TOPICS:
        yield from topic(family, config)


# Keys whose value is the argument's.
_PLAIN = (
    ("num_layers", "num_hidden_layers"),
    ("hidden_size", "hidden_size"),
    ("num_attention_heads", "num_attention_heads"),
    ("ffn_hidden_size", "intermediate_size"),
)


def _sizes(family: Family, config: Config) -> Iterator[Item]:
    for dest, key in _PLAIN:
        yield _from_key(config, dest, key)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    groups = config.get("num_key_value_heads")
    if groups is None and "num_key_value_heads" in config:
        groups = heads
    yield (
        Unknown("num_query_groups", "num_key_value_heads")
        if groups is None
        else Expectation("num_query_groups", groups, "num_key_value_heads")
    )
    if isinstance(config.get("head_dim"), int):
        yield Expectation("kv_channels", config["head_dim"], "head_dim")
    elif (
        family.model_type in _HEAD_DIM_DIVIDES
        and isinstance(hidden, int)
        and isinstance(heads, int)
        and heads
    ):
        yield Expectation("kv_channels", hidden // heads, "hidden_size / num_attention_heads")
    else:
        yield Unknown("kv_channels", "head_dim")
    if isinstance(config.get("vocab_size"), int):
        yield Expectation("padded_vocab_size", config["vocab_size"], "vocab_size")
    else:
        yield Unknown("padded_vocab_size", "vocab_size")


# Families whose code takes hidden_size / num_attention_heads where head_dim is absent; the others have a
# default of their own, which a config file does not show.
_HEAD_DIM_DIVIDES = frozenset({"qwen2", "llama", "phi3", "nemotron", "mistral", "mixtral"})


def _norms(family: Family, config: Config) -> Iterator[Item]:
    yield Expectation("normalization", family.normalization, family.source)
    yield _from_key(config, "layernorm_epsilon", family.epsilon)
    yield Expectation("layernorm_zero_centered_gamma", family.zero_centered, family.source)
    yield Expectation("qk_layernorm", family.qk_layernorm, family.source)


def _biases(family: Family, config: Config) -> Iterator[Item]:
    for dest, rule in (
        ("add_bias_linear", family.mlp_bias),
        ("add_bias_linear", family.output_bias),
        ("add_qkv_bias", family.qkv_bias),
    ):
        if isinstance(rule, bool):
            yield Expectation(dest, rule, family.source)
        elif isinstance(config.get(rule), bool):
            yield Expectation(dest, config[rule], rule)
        else:
            yield Unknown(dest, rule)


def _embeddings(family: Family, config: Config) -> Iterator[Item]:
    tied = config.get("tie_word_embeddings")
    if isinstance(tied, bool):
        yield Expectation("untie_embeddings_and_output_weights", not tied, "tie_word_embeddings")
    else:
        yield Unknown("untie_embeddings_and_output_weights", "tie_word_embeddings")
    yield Expectation("position_embedding_type", "rope", family.source)
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int):
        yield Expectation(
            "max_position_embeddings",
            positions,
            "max_position_embeddings",
            Severity.WARNING,
            "rotary positions have no table, so this changes no logit",
        )


def _rope(family: Family, config: Config) -> Iterator[Item]:
    # transformers 5 moved these keys into rope_parameters.
    parameters = config.get("rope_parameters")
    rope = parameters if isinstance(parameters, Mapping) else config
    base = rope.get("rope_theta")
    yield (
        Expectation("rotary_base", base, "rope_theta")
        if base is not None
        else Unknown("rotary_base", "rope_theta")
    )
    factor = rope.get("partial_rotary_factor")
    yield Expectation("rotary_percent", 1.0 if factor is None else factor, "partial_rotary_factor")
    yield Expectation("rotary_interleaved", False, family.source)
    scaling = parameters if isinstance(parameters, Mapping) else config.get("rope_scaling")
    kind = (
        scaling.get("rope_type", scaling.get("type", "default"))
        if isinstance(scaling, Mapping)
        else "default"
    )
    if kind == "default":
        yield Expectation("use_rope_scaling", False, "rope_scaling")
    elif kind == "llama3" and isinstance(scaling, Mapping):
        yield Expectation("use_rope_scaling", True, "rope_scaling")
        yield Expectation("rope_scaling_factor", scaling.get("factor"), "rope_scaling.factor")
        for key, value in _LLAMA3_SCALING.items():
            if scaling.get(key) != value:
                yield NotModelled("use_rope_scaling", f"rope_scaling.{key}", scaling.get(key))
    else:
        yield NotModelled("use_rope_scaling", "rope_scaling", kind)
    if kind != "llama3":
        yield Expectation("rotary_seq_len_interpolation_factor", None, "rope_scaling")


# megatron-core's RotaryEmbedding scales with these, whatever the preset says.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _windows(family: Family, config: Config) -> Iterator[Item]:
    # Qwen publishes a window and a switch that is off; Mistral's families have no switch.
    switched = config.get("use_sliding_window", family.model_type in _WINDOW_WITHOUT_SWITCH)
    layers = config.get("layer_types")
    layers = layers if isinstance(layers, list) else []
    if (switched and config.get("sliding_window") is not None) or "sliding_attention" in layers:
        yield NotModelled("window_size", "sliding_window", config.get("sliding_window"))


_WINDOW_WITHOUT_SWITCH = frozenset({"mistral", "mixtral"})


def _activation(family: Family, config: Config) -> Iterator[Item]:
    activation = config.get("hidden_act")
    if activation is None:
        yield Unknown("swiglu", "hidden_act")
        return
    arguments = {"swiglu": False, "squared_relu": False}
    known = _ACTIVATIONS.get((str(activation), family.gated))
    if known is not None:
        arguments[known] = True
    for dest, value in arguments.items():
        yield Expectation(dest, value, "hidden_act")
    if known is None:
        yield NotModelled("swiglu", "hidden_act", activation)


# (activation, gated) -> the argument that makes it so.
_ACTIVATIONS = {("silu", True): "swiglu", ("relu2", False): "squared_relu"}


def _experts(family: Family, config: Config) -> Iterator[Item]:
    if not family.moe:
        yield Expectation("num_experts", None, f"{family.source}: no experts")
        return
    for dest, keys in (
        ("num_experts", ("num_experts", "num_local_experts")),
        ("moe_router_topk", ("num_experts_per_tok",)),
        ("moe_ffn_hidden_size", ("moe_intermediate_size", "intermediate_size")),
    ):
        key = next((key for key in keys if key in config), None)
        yield Expectation(dest, config[key], key) if key else Unknown(dest, keys[0])
    yield from _moe_layers(family, config)
    yield Expectation("moe_router_score_function", "softmax", family.source)
    renormalised = True if family.model_type == "mixtral" else config.get("norm_topk_prob")
    if isinstance(renormalised, bool):
        # Megatron takes the softmax over the chosen logits, which is the renormalised probability,
        # unless told to take it before choosing, which leaves it as it is.
        yield Expectation("moe_router_pre_softmax", not renormalised, "norm_topk_prob")
    else:
        yield Unknown("moe_router_pre_softmax", "norm_topk_prob")
    for dest, value in _NO_SUCH_ROUTING:
        yield Expectation(dest, value, family.source)


_NO_SUCH_ROUTING = (
    ("moe_router_topk_scaling_factor", None),
    ("moe_router_enable_expert_bias", False),
    ("moe_router_num_groups", None),
    ("moe_router_group_topk", None),
    ("moe_shared_expert_intermediate_size", None),
    ("moe_shared_expert_gate", False),
)


# A published file is input too: no model has more layers.
_MOST_LAYERS = 10_000


def _moe_layers(family: Family, config: Config) -> Iterator[Item]:
    layers = config.get("num_hidden_layers")
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(layers, int) or not 0 < layers <= _MOST_LAYERS or not isinstance(dense, list):
        yield Unknown("moe_layer_freq", "which layers hold experts")
        return
    pattern = tuple(
        int(index not in dense and isinstance(step, int) and step > 0 and (index + 1) % step == 0)
        for index in range(layers)
    )
    source = "decoder_sparse_step, mlp_only_layers" if family.model_type != "mixtral" else family.source
    yield Expectation("moe_layer_freq", pattern, source)


def _inert(family: Family, config: Config) -> Iterator[Item]:
    """Differences that change nothing in an evaluation: warnings."""
    why = "dropout acts in training only"
    attention = config.get("attention_dropout", 0.0)
    yield Expectation("attention_dropout", attention, "attention_dropout", Severity.WARNING, why)
    yield Expectation("hidden_dropout", 0.0, family.source, Severity.WARNING, why)
    dtype = config.get("torch_dtype", config.get("dtype"))
    if isinstance(dtype, str):
        why = "the weights are loaded in another precision than published"
        yield Expectation("bf16", dtype == "bfloat16", "torch_dtype", Severity.WARNING, why)


_TOPICS: tuple[Callable[[Family, Config], Iterator[Item]], ...] = (
    _sizes,
    _norms,
    _biases,
    _embeddings,
    _rope,
    _windows,
    _activation,
    _experts,
    _inert,
)


def _from_key(config: Config, dest: str, key: str) -> Item:
    return Expectation(dest, config[key], key) if config.get(key) is not None else Unknown(dest, key)
