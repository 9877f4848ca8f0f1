"""Blocks: what the publisher says of sizes, norms, biases, activations, embeddings and latent attention."""

from __future__ import annotations

from collections.abc import Iterator

from harness.families.items import (
    Config,
    Expectation,
    Item,
    LeftOut,
    Limit,
    NotModelled,
    Unknown,
    from_key,
    on_off,
    whole,
)
from harness.families.patterns import has_dense_layers
from harness.families.positions import no_rope_pattern
from harness.families.rows import Family, QKNorms
from harness.finding import Severity


def sizes(family: Family, config: Config) -> Iterator[Item]:
    if not family.hybrid:  # there the pattern has the number
        yield from_key(config, "num_layers", "num_hidden_layers")
    yield from_key(config, "hidden_size", "hidden_size")
    yield from_key(config, "num_attention_heads", "num_attention_heads")
    yield _dense_size(family, config)
    if not family.latent:
        yield _groups(config)
        yield _head_size(family, config)
    size = config.get("vocab_size")
    yield (
        Expectation("padded_vocab_size", size, "vocab_size")
        if isinstance(size, int)
        else Unknown("padded_vocab_size", "vocab_size")
    )


def _dense_size(family: Family, config: Config) -> Item:
    item = from_key(config, "ffn_hidden_size", family.dense_size)
    if isinstance(item, Expectation) and not has_dense_layers(family, config):
        why = "no layer is dense, so nothing has this size"
        return Expectation(item.dest, item.value, item.source, Severity.WARNING, why)
    return item


def _groups(config: Config) -> Item:
    groups = config.get("num_key_value_heads")
    if groups is None and "num_key_value_heads" in config:
        groups = config.get("num_attention_heads")
    if groups is None:
        return Unknown("num_query_groups", "num_key_value_heads")
    return Expectation("num_query_groups", groups, "num_key_value_heads")


def _head_size(family: Family, config: Config) -> Item:
    for key in family.head_dim:
        if isinstance(config.get(key), int):
            return Expectation("kv_channels", config[key], key)
    heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    if family.head_dim_divides and heads is not None and hidden is not None:
        return Expectation("kv_channels", hidden // heads, "hidden_size / num_attention_heads")
    # The others' code has a default of its own, which a config file does not show.
    return Unknown("kv_channels", family.head_dim[0])


def latent_attention(family: Family, config: Config) -> Iterator[Item]:
    yield Expectation("multi_latent_attention", family.latent, family.source)
    if not family.latent:
        return
    rank = "q_lora_rank"
    yield (
        Expectation(rank, config[rank], rank) if rank in config else Unknown(rank, rank)
    )  # null: no latent for queries
    yield from_key(config, "kv_lora_rank", "kv_lora_rank")
    yield from_key(config, "qk_head_dim", "qk_nope_head_dim")
    yield from_key(config, "qk_pos_emb_head_dim", "qk_rope_head_dim")
    yield from_key(config, "v_head_dim", "v_head_dim")


# Norms


def norms(family: Family, config: Config) -> Iterator[Item]:
    yield Expectation("normalization", family.normalization, family.source)
    epsilon = from_key(config, "layernorm_epsilon", *family.epsilon)
    yield epsilon
    yield Expectation("layernorm_zero_centered_gamma", family.zero_centered, family.source)
    yield from _qk_norms(family, config)
    if family.latent and isinstance(epsilon, Expectation) and epsilon.value != _LATENT_EPSILON:
        yield Limit(
            f"epsilon {_LATENT_EPSILON} in the norms of the latents",
            family.source,
            f"{epsilon.value} there as everywhere",
            "the latents differ",
        )


_LATENT_EPSILON = 1e-06  # the norms' own default, which the modeling code leaves as it is


def _qk_norms(family: Family, config: Config) -> Iterator[Item]:
    kind, source = family.qk_norm, family.source
    if family.qk_norm_key:
        # A norm over all heads its code always has.
        switched = config.get(family.qk_norm_key, True if kind is QKNorms.WIDTH else None)
        if not isinstance(switched, bool):
            yield Unknown("qk_layernorm", family.qk_norm_key)
            return
        kind, source = (kind if switched else QKNorms.NONE), family.qk_norm_key
    form = config.get("qk_norm_type")
    if kind is QKNorms.WIDTH and form not in (None, "per_layer"):
        yield NotModelled("qk_layernorm", "qk_norm_type", form)
        return
    yield Expectation("qk_layernorm", kind not in (QKNorms.NONE, QKNorms.L2), source)
    if not family.latent:
        yield Expectation("export_qk_l2_norm", kind is QKNorms.L2, source)
    if kind is QKNorms.WIDTH:
        yield Limit(
            "one norm of queries and one of keys over all heads together",
            "qk_norm_type" if form else family.source,
            "a norm for each head",
            "queries and keys differ",
        )
    if kind is QKNorms.L2:
        skips, _ = no_rope_pattern(family, config)
        if skips is None or any(skips):
            yield Limit(
                "an L2 norm on the layers with rotary positions",
                family.source,
                "one on every layer",
                "the layers without rotary positions differ",
            )


def biases(family: Family, config: Config) -> Iterator[Item]:
    """Megatron has one switch for all biases and one for queries, keys and values alone."""
    found: dict[str, bool] = {}
    for part, rule in (
        ("mlp", family.mlp_bias),
        ("output", family.output_bias),
        ("qkv", family.qkv_bias),
    ):
        if isinstance(rule, bool):
            found[part] = rule
        elif isinstance(config.get(rule), bool):
            found[part] = config[rule]
        elif part != "qkv" or not family.latent:
            yield Unknown("add_qkv_bias" if part == "qkv" else "add_bias_linear", rule)
    # The router's bias goes with them where experts have biases, as it does in gpt-oss.
    feed_forward, output = found.get("mlp"), found.get("output")
    if feed_forward is not None and output is not None and feed_forward is not output:
        key = family.output_bias if isinstance(family.output_bias, str) else family.source
        yield Limit(
            f"biases {on_off(output)} in the output of attention and {on_off(feed_forward)} in feed-forwards",
            key,
            "both or none",
            "one of them differs",
        )
    else:
        for part, rule in (("mlp", family.mlp_bias), ("output", family.output_bias)):
            if part in found:
                source = rule if isinstance(rule, str) else family.source
                yield Expectation("add_bias_linear", found[part], source)
    if family.latent:
        if found.get("output"):
            built = "projections into the latents without bias"
            yield Limit("attention_bias on", "attention_bias", built, "the latents differ")
    elif "qkv" in found:
        source = family.qkv_bias if isinstance(family.qkv_bias, str) else family.source
        yield Expectation("add_qkv_bias", found["qkv"], source)


def attention(family: Family, config: Config) -> Iterator[Item]:
    yield Expectation("softmax_type", "learnable" if family.sinks else "vanilla", family.source)
    yield Expectation("attention_output_gate", family.output_gate, family.source)


# Feed-forward

# (activation, gated) -> the argument that makes it so.
_ACTIVATIONS = {("silu", True): "swiglu", ("relu2", False): "squared_relu"}
_CLAMP = 7.0  # a constant of gpt-oss's modeling code, beside its offset of one


def activation(family: Family, config: Config) -> Iterator[Item]:
    published = config.get(family.activation)
    known = "quick_geglu" if family.clamped else _ACTIVATIONS.get((str(published), family.gated))
    source = family.source if family.clamped else family.activation
    if published is None and not family.clamped:
        yield Unknown("swiglu" if family.gated else "squared_relu", family.activation)
    else:
        for dest in ("swiglu", "squared_relu", "quick_geglu"):
            yield Expectation(dest, dest == known, source)
        if known is None:
            yield NotModelled("swiglu", family.activation, published)
    if family.gated:
        yield Expectation("glu_linear_offset", 1.0 if family.clamped else 0.0, family.source)
        clamp = config.get("swiglu_limit", _CLAMP) if family.clamped else None
        source = "swiglu_limit" if family.clamped and "swiglu_limit" in config else family.source
        yield Expectation("activation_func_clamp_value", clamp, source)


# The ends of the model


def embeddings(family: Family, config: Config) -> Iterator[Item]:
    tied = config.get("tie_word_embeddings")
    if isinstance(tied, bool):
        yield Expectation("untie_embeddings_and_output_weights", not tied, "tie_word_embeddings")
    else:
        yield Unknown("untie_embeddings_and_output_weights", "tie_word_embeddings")
    length = config.get("max_position_embeddings")
    if isinstance(length, int):
        kind = "rotary positions have" if family.rotary else "without positions there is"
        why = f"{kind} no table, so this changes no logit"
        yield Expectation("max_position_embeddings", length, "max_position_embeddings", Severity.WARNING, why)


def left_out(family: Family, config: Config) -> Iterator[Item]:
    """Parts without which a text's next token is the same."""
    for key in ("num_nextn_predict_layers", "num_mtp_modules"):
        count = config.get(key)
        if isinstance(count, int) and count > 0:
            yield LeftOut("multi-token prediction", f"{key} {count}", "mtp_num_layers")
    if config.get("vision_config"):
        yield LeftOut("vision encoder", "vision_config")


def inert(family: Family, config: Config) -> Iterator[Item]:
    """Differences that change nothing in an evaluation: warnings."""
    why = "dropout acts in training only"
    attention = config.get("attention_dropout", 0.0)
    yield Expectation("attention_dropout", attention, "attention_dropout", Severity.WARNING, why)
    hidden = config.get("hidden_dropout")
    source = family.source if hidden is None else "hidden_dropout"
    yield Expectation("hidden_dropout", hidden or 0.0, source, Severity.WARNING, why)
    dtype = config.get("torch_dtype", config.get("dtype"))
    if isinstance(dtype, str):
        why = "the weights are loaded in another precision than published"
        yield Expectation("bf16", dtype == "bfloat16", "torch_dtype", Severity.WARNING, why)
