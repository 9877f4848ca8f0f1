"""Shrink plans: the invariants on every preset and on random architectures, and the plans themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from broken import within
from hypothesis import given, settings
from hypothesis import strategies as st
from published import named, of_preset

from harness.architecture import Architecture, architecture
from harness.arguments import Arguments, resolve
from harness.inventory import counts
from harness.layout import Layout
from harness.preset import PresetFile, discover
from harness.shrink import shrink
from harness.shrink.invariants import check_invariants
from harness.shrink.invariants_mixers import group_split

PRESETS = discover(Path(__file__).parent.parent / "presets")
LAYOUTS = [Layout(tp=tp, etp=tp) for tp in (1, 2, 4, 8)]


def with_sizes(base: Architecture, **sizes: object) -> Architecture:
    return architecture(base.arguments.replaced(sizes))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_every_preset_keeps_every_invariant(file: PresetFile, layout: Layout) -> None:
    full = of_preset(file)
    plan = shrink(full, layout)
    assert [invariant.name for invariant in plan.invariants] == [f"S{n}" for n in range(1, 13)]
    assert all(invariant.holds for invariant in plan.invariants)
    assert plan == shrink.__wrapped__(full, layout)  # a second search, and not what is kept of the first


def test_a_plan_is_kept_for_equal_arguments_alone() -> None:
    layout = Layout()
    first, same = (of_preset(PRESETS[0]) for _ in range(2))
    other = with_sizes(first, hidden_size=2 * first.hidden_size)
    assert other.arguments.origins == first.arguments.origins
    assert shrink(same, layout) is shrink(first, layout)
    assert shrink(other, layout).before == other
    assert shrink(first, Layout(tp=2, etp=2)).layout == Layout(tp=2, etp=2)


def multiples(unit: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most).map(lambda times: unit * times)


HEADS = st.sampled_from([16, 32, 48, 64, 80, 96, 100, 112, 128, 192, 256])
WIDTHS = st.one_of(multiples(8, 1024), multiples(128, 64))


@st.composite
def attention(draw: st.DrawFn) -> dict[str, object]:
    groups = draw(st.integers(1, 16))
    return {
        "num_query_groups": groups,
        "num_attention_heads": groups * draw(st.integers(1, 16)),
        "kv_channels": draw(HEADS),
        "attention_output_gate": draw(st.booleans()),
    }


@st.composite
def latent_attention(draw: st.DrawFn) -> dict[str, object]:
    heads = draw(st.integers(1, 128))
    return {
        "multi_latent_attention": True,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": 128,
        "q_lora_rank": draw(st.none() | WIDTHS),
        "kv_lora_rank": draw(WIDTHS),
        "qk_head_dim": draw(HEADS),
        "qk_pos_emb_head_dim": draw(multiples(2, 64)),
        "v_head_dim": draw(HEADS),
    }


@st.composite
def linear_attention(draw: st.DrawFn) -> dict[str, object]:
    """Mamba and gated delta nets, for models that have either."""
    groups, keys = draw(st.integers(1, 16)), draw(st.integers(1, 32))
    return {
        "mamba_num_groups": groups,
        "mamba_num_heads": groups * draw(st.integers(1, 32)),
        "mamba_head_dim": draw(HEADS),
        "mamba_state_dim": draw(HEADS),
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * draw(st.integers(1, 4)),
        "linear_key_head_dim": draw(HEADS),
        "linear_value_head_dim": draw(HEADS),
        "linear_conv_kernel_dim": 4,
    }


@st.composite
def experts(draw: st.DrawFn, latent: bool) -> dict[str, object]:
    number = draw(st.sampled_from([2, 8, 16, 60, 64, 128, 160, 256, 384, 512]))
    sizes: dict[str, object] = {
        "num_experts": number,
        "moe_router_topk": draw(st.integers(1, min(number, 22))),
        "moe_ffn_hidden_size": draw(st.one_of(multiples(8, 512), multiples(128, 64))),
        "add_bias_linear": False,
        "add_qkv_bias": draw(st.booleans()),
    }
    if draw(st.booleans()):
        sizes["moe_shared_expert_intermediate_size"] = draw(multiples(16, 512))
    if latent and draw(st.booleans()):
        sizes["moe_latent_size"] = draw(WIDTHS)
    return sizes


def per_layer(layers: int, smallest: int = 1) -> st.SearchStrategy[object]:
    """A frequency, a prefix or any pattern over ``layers`` layers."""
    entries = st.integers(0, 1)
    return st.one_of(
        st.integers(smallest, 4),
        st.integers(0, layers).map(lambda dense: tuple(int(index >= dense) for index in range(layers))),
        st.lists(entries, min_size=layers, max_size=layers).map(tuple),
    )


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Models of every kind and any shape that Megatron would accept, sensible or not."""
    layers, hybrid = draw(st.integers(1, 100)), draw(st.booleans())
    mixer = draw(attention() if hybrid else attention() | latent_attention())
    sizes: dict[str, object] = {
        **mixer,
        "num_layers": layers,
        "hidden_size": draw(st.one_of(st.just(width_of(mixer)), WIDTHS)),
        "ffn_hidden_size": draw(st.one_of(multiples(8, 4096), multiples(128, 256))),
        "padded_vocab_size": draw(st.one_of(multiples(128, 2000), st.integers(100, 200_000))),
        "swiglu": draw(st.booleans()),
        "untie_embeddings_and_output_weights": draw(st.booleans()),
        "rotary_percent": draw(st.sampled_from([1.0, 0.5, 0.25])),
        "window_size": draw(st.none() | st.just((127, 0))),
        "window_attn_skip_freq": draw(st.none() | per_layer(layers)),
    }
    no_rope = draw(st.none() | per_layer(layers))
    if not isinstance(no_rope, int) or layers % no_rope == 0:
        sizes["no_rope_freq"] = no_rope
    symbols = "M*-"
    if draw(st.booleans()):
        sizes |= draw(experts(latent=True))
        sizes["moe_layer_freq"] = draw(per_layer(layers))
        symbols = "MG*-E"
    if hybrid:
        some = st.lists(st.sampled_from(symbols), min_size=layers, max_size=layers)
        periods = st.text(symbols, min_size=1, max_size=8).map(lambda period: (period * layers)[:layers])
        sizes |= draw(linear_attention())
        sizes["export_model_type"] = "HybridModel"
        sizes["hybrid_layer_pattern"] = draw(some.map("".join) | periods)
    arguments, _ = resolve(())
    return architecture(arguments.replaced({**SHARED, **sizes}))


def width_of(mixer: dict[str, object]) -> int:
    head = "v_head_dim" if "v_head_dim" in mixer else "kv_channels"
    return int(str(mixer["num_attention_heads"])) * int(str(mixer[head]))


SHARED = {"max_position_embeddings": 4096, "normalization": "RMSNorm", "position_embedding_type": "rope"}

ANY_LAYOUT = st.sampled_from([*LAYOUTS, *map(Layout.parse, ("tp3", "pp2", "pp4", "ep4,etp1", "tp2,etp1"))])


@settings(max_examples=300, deadline=None)
@given(architectures(), ANY_LAYOUT)
def test_random_architectures_keep_every_invariant(full: Architecture, layout: Layout) -> None:
    plan = shrink(full, layout)
    assert all(invariant.holds for invariant in plan.invariants)
    assert plan.after == shrink.__wrapped__(full, layout).after


def test_qwen3_235b_keeps_its_ratios_and_two_layers() -> None:
    after = shrink(named("Qwen3-235B-A22B"), Layout()).after
    attention, moe = after.attention, after.moe
    assert moe is not None
    assert attention.num_attention_heads == 16 * attention.num_query_groups
    assert attention.num_query_groups >= 2
    assert (moe.num_experts, moe.moe_router_topk, after.num_layers) == (32, 2, 2)


def test_deepseek_r1_keeps_its_groups_of_experts_and_its_ranks() -> None:
    after = shrink(named("DeepSeek-R1"), Layout()).after
    moe, latent = after.moe, after.latent
    assert moe is not None and latent is not None
    assert (moe.num_experts, moe.moe_router_topk, moe.num_groups, moe.group_topk) == (64, 2, 2, 1)
    assert latent.q_lora_rank == 3 * latent.kv_lora_rank
    assert [layer.kind for layer in after.layers] == ["dense", "dense", "moe", "moe"]


def test_a_missing_query_latent_stays_missing() -> None:
    plan = shrink(named("DeepSeek-V2-Lite"), Layout())
    assert plan.after.latent is not None
    assert plan.after.latent.q_lora_rank is None
    assert "no query latent" in plan.invariants[8].after


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("Nemotron-H-8B-Base-8K", "M-M*-"),
        ("Nemotron-H-47B-Reasoning-128K", "MM-M*--"),
        ("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "MEM*E"),
        ("Qwen3-Next-80B-A3B-Instruct", "GE*EG"),
    ],
)
def test_a_hybrid_keeps_each_kind_and_each_neighbour(name: str, pattern: str) -> None:
    after = shrink(named(name), Layout()).after
    assert after.arguments["hybrid_layer_pattern"] == pattern
    assert after.num_layers == after.arguments["num_layers"] == len(pattern)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("Llama-4-Maverick-17B-128E-Instruct", (128, 1)),
        ("Kimi-K2-Instruct", (96, 2)),
        ("NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", (256, 11)),
        ("gpt-oss-120b", (64, 2)),
    ],
)
def test_one_of_many_experts_only_where_it_really_is_one(name: str, experts: tuple[int, int]) -> None:
    moe = shrink(named(name), Layout()).after.moe
    assert moe is not None
    assert (moe.num_experts, moe.moe_router_topk) == experts


def test_sizes_that_are_equal_stay_equal() -> None:
    after = shrink(named("gpt-oss-20b"), Layout()).after
    assert after.moe is not None
    assert after.hidden_size == after.moe.expert.ffn_hidden_size == after.arguments["ffn_hidden_size"]


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_a_plan_runs_in_a_moment(file: PresetFile) -> None:
    """Matrix elements per quantized matrix, and layers, bound what a case costs."""
    after = shrink(of_preset(file), Layout()).after
    assert counts(after).total < 600_000_000
    assert after.hidden_size <= 2048
    assert after.num_layers <= 8
    if after.moe is not None:
        inputs = after.moe.latent_size or after.hidden_size
        assert inputs * after.moe.expert.fc1_width < 1.5e6


def test_frequencies_stay_where_they_still_say_the_same() -> None:
    gpt_oss = shrink(named("gpt-oss-120b"), Layout()).after
    assert gpt_oss.arguments["window_attn_skip_freq"] == 2
    maverick = shrink(named("Llama-4-Maverick-17B-128E-Instruct"), Layout()).after
    assert maverick.arguments["moe_layer_freq"] == (0, 1, 0, 1, 0)
    assert maverick.arguments["no_rope_freq"] == (0, 0, 0, 1, 0)


@pytest.mark.parametrize(
    ("pattern", "pp", "after"),
    [
        ("M*M*|M-M-", 2, "M*|M-M"),
        ("M*M*|M-M-", 1, "M*M-M"),
        ("M*M*M-M-", 2, "M*M-M*"),
        ("MMMM|MM", 2, "M|M"),
        ("MMMMMM/MM", 1, "MM"),
    ],
    ids=["own-stages", "other-stages", "no-stages", "one-per-stage", "without-predictions"],
)
def test_a_pattern_keeps_its_pipeline_stages(pattern: str, pp: int, after: str) -> None:
    full = named("Nemotron-H-8B-Base-8K")
    layers = len(pattern.partition("/")[0].replace("|", ""))
    full = with_sizes(full, hybrid_layer_pattern=pattern, num_layers=layers)
    assert shrink(full, Layout(pp=pp)).after.arguments["hybrid_layer_pattern"] == after


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 6, 12])
def test_layers_divide_over_stages_as_before(pp: int) -> None:
    full = with_sizes(named("DeepSeek-V2-Lite"), num_layers=24, moe_layer_freq=(0, *[1] * 23))
    after = shrink(full, Layout(pp=pp)).after
    assert after.num_layers % pp == 0
    assert after.num_layers < 24


def test_uneven_stages_have_layers_enough() -> None:
    full = with_sizes(named("Qwen3-8B"), num_layers=35)
    after = shrink(full, Layout.parse("pp3,first5")).after
    assert after.num_layers == 7


def test_a_model_without_attention_shrinks() -> None:
    full = with_sizes(named("Nemotron-H-8B-Base-8K"), hybrid_layer_pattern="M-M-M-", num_layers=6)
    plan = shrink(full, Layout())
    assert plan.invariants[0].before == plan.invariants[2].before == "no attention"
    assert plan.after.hidden_size < full.hidden_size
    assert plan.after.arguments["num_attention_heads"] == full.arguments["num_attention_heads"]


HOSTILE = {
    "hidden_size": 2**24 - 1,
    "ffn_hidden_size": 2**24 - 1,
    "num_attention_heads": 2**16,
    "num_query_groups": 2**16,
    "kv_channels": 2**16 - 1,
    "mamba_num_heads": 2**20,
    "mamba_head_dim": 2**24,
    "mamba_state_dim": 999_983,
    "padded_vocab_size": 2**24 - 1,
}


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("name", ["Nemotron-H-8B-Base-8K", "Qwen3-8B"])
def test_absurd_sizes_do_not_keep_it_busy(name: str, tp: int) -> None:
    full = with_sizes(named(name), **HOSTILE)
    with within(10):
        shrink(full, Layout(tp=tp, etp=tp))


BREAKS = {
    "S1": {"num_query_groups": 1},
    "S2": {"num_experts": 16},
    "S3": {"hidden_size": 4096},
    "S4": {"moe_ffn_hidden_size": 64},
    "S5": {"padded_vocab_size": 2560},
    "S6": {"num_layers": 1},
    "S7": {"padded_vocab_size": 128},
    "S8": {"moe_ffn_hidden_size": 2048},
    "S11": {"layernorm_epsilon": 1e-5},
    "S12": {"kv_channels": 8, "num_attention_heads": 16, "num_query_groups": 2},
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_plan_fails_its_invariant(name: str) -> None:
    full = named("Qwen3-30B-A3B")
    broken = with_sizes(shrink(full, Layout()).after, **BREAKS[name])
    if name == "S5":  # another width made equal to the fused query, key and value
        attention = broken.attention
        broken = with_sizes(broken, padded_vocab_size=attention.query_width + 2 * attention.kv_width)
    failed = {i.name for i in check_invariants(full, broken, Layout()) if not i.holds}
    assert name in failed


# Per invariant and preset: what is broken of a good plan.
MORE_BREAKS = {
    "S1-latent-heads": ("DeepSeek-R1", {"num_attention_heads": 1}),
    "S2-groups": ("DeepSeek-R1", {"moe_router_num_groups": 4}),
    "S3-latent": ("DeepSeek-R1", {"v_head_dim": 16}),
    "S4-latent-rank": ("DeepSeek-R1", {"q_lora_rank": 400}),
    "S4-down-projection": ("DeepSeek-R1", {"qk_pos_emb_head_dim": 32}),
    "S4-in-projection": ("Nemotron-H-8B-Base-8K", {"mamba_state_dim": 48}),
    "S4-expert-latent": ("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", {"moe_latent_size": 320}),
    "S4-delta-net": ("Qwen3-Next-80B-A3B-Instruct", {"linear_num_value_heads": 48}),
    "S4-keys": ("Qwen3-Next-80B-A3B-Instruct", {"kv_channels": 4}),
    "S5-latent": ("DeepSeek-R1", {"kv_lora_rank": 896}),
    "S5-conv": ("Nemotron-H-8B-Base-8K", {"ffn_hidden_size": 2176}),
    "S6-pattern": ("Nemotron-H-8B-Base-8K", {"hybrid_layer_pattern": "M-M-M", "num_layers": 5}),
    "S6-window": ("gpt-oss-20b", {"window_attn_skip_freq": 4}),
    "S6-rope": ("Llama-4-Scout-17B-16E-Instruct", {"no_rope_freq": None}),
    "S8-latent": ("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", {"moe_latent_size": 4096}),
    "S9-ranks": ("DeepSeek-R1", {"q_lora_rank": 512}),
    "S9-rank-over-hidden": ("DeepSeek-R1", {"q_lora_rank": 1536, "kv_lora_rank": 512}),
    "S9-heads": ("DeepSeek-R1", {"v_head_dim": 64}),
    "S9-rotated": ("DeepSeek-R1", {"qk_pos_emb_head_dim": 128}),
    "S9-query-latent-gone": ("DeepSeek-R1", {"q_lora_rank": None}),
    "S9-query-latent-new": ("DeepSeek-V2-Lite", {"q_lora_rank": 384}),
    "S9-attention-of-another-kind": ("DeepSeek-R1", {"multi_latent_attention": False}),
    "S10-inner": ("Nemotron-H-8B-Base-8K", {"mamba_num_heads": 64}),
    "S10-state": ("Nemotron-H-8B-Base-8K", {"mamba_state_dim": 64}),
    "S10-one-group": ("Nemotron-H-8B-Base-8K", {"mamba_num_groups": 1}),
    "S10-gone": ("Nemotron-H-8B-Base-8K", {"hybrid_layer_pattern": "-*-*-"}),
    "S10-delta-heads": ("Qwen3-Next-80B-A3B-Instruct", {"linear_num_key_heads": 32}),
    "S10-delta-head-dims": ("Qwen3-Next-80B-A3B-Instruct", {"linear_key_head_dim": 64}),
    "S12-latent": ("DeepSeek-R1", {"kv_lora_rank": 16}),
    "S12-experts": ("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", {"moe_latent_size": 16}),
}


@pytest.mark.parametrize("case", MORE_BREAKS)
def test_each_size_of_each_kind_is_held_by_an_invariant(case: str) -> None:
    name, changes = MORE_BREAKS[case]
    full = named(name)
    broken = with_sizes(shrink(full, Layout()).after, **changes)
    failed = {i.name: i for i in check_invariants(full, broken, Layout()) if not i.holds}
    assert case.partition("-")[0] in failed
    invariant = failed[case.partition("-")[0]]
    assert invariant.before != invariant.after or invariant.name in ("S8", "S12")


def test_heads_of_mamba_that_do_not_divide_over_ranks_fail() -> None:
    full, layout = named("Nemotron-H-8B-Base-8K"), Layout(tp=4, etp=4)
    broken = with_sizes(shrink(full, layout).after, mamba_num_groups=2)
    (s10,) = (i for i in check_invariants(full, broken, layout) if i.name == "S10")
    assert not s10.holds
    assert "not whole per rank" in s10.after and "not whole" not in s10.before


def test_a_pattern_with_an_empty_stage_fails() -> None:
    full = with_sizes(named("Nemotron-H-8B-Base-8K"), hybrid_layer_pattern="M*M*|M-M-", num_layers=8)
    layout = Layout(pp=2)
    broken = with_sizes(shrink(full, layout).after, hybrid_layer_pattern="M*M-M-|")
    assert "S6" in {i.name for i in check_invariants(full, broken, layout) if not i.holds}


def test_a_good_plan_fails_none() -> None:
    full = named("Qwen3-30B-A3B")
    assert all(i.holds for i in check_invariants(full, shrink(full, Layout()).after, Layout()))


@pytest.mark.parametrize(
    ("groups", "tp", "split"),
    [
        (8, 8, "whole groups per rank"),
        (4, 8, "one group shared by ranks"),
        (6, 4, "neither whole nor shared"),
    ],
)
def test_how_groups_fall_on_ranks_is_kept(groups: int, tp: int, split: str) -> None:
    assert group_split(groups, tp) == split
    full = with_sizes(named("Qwen3-8B"), num_query_groups=groups, num_attention_heads=8 * groups)
    after = shrink(full, Layout(tp=tp, etp=tp)).after
    assert group_split(after.attention.num_query_groups, tp) == split


def test_nothing_but_sizes_changes() -> None:
    full = named("Qwen3-8B")
    plan = shrink(full, Layout())
    left, right = dict(full.arguments.values), dict(plan.after.arguments.values)
    changed = {dest for dest in left if left[dest] != right[dest]}
    assert changed == set(plan.changes)
    assert "layernorm_epsilon" not in changed


def test_origins_survive_so_that_messages_can_name_lines() -> None:
    plan = shrink(named("Qwen3-8B"), Layout())
    assert plan.after.arguments.origin("hidden_size").line == plan.before.arguments.origin("hidden_size").line


def test_records_are_frozen() -> None:
    plan = shrink(named("Qwen3-8B"), Layout())
    assert replace(plan) == plan
    assert isinstance(plan.after.arguments, Arguments)
