"""Shrink plans: the invariants on every preset and on random architectures, and the plans themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.architecture import Architecture, architecture
from harness.arguments import Arguments, resolve
from harness.invariants import check_invariants, group_split
from harness.layout import Layout
from harness.preset import PresetFile, discover, load_preset
from harness.shrink import shortest_walk, shrink

PRESETS = discover(Path(__file__).parent.parent / "presets")
LAYOUTS = [Layout(tp=tp, etp=tp) for tp in (1, 2, 4, 8)]


def of_preset(file: PresetFile) -> Architecture:
    arguments = load_preset(file).arguments
    assert arguments is not None
    return architecture(arguments)


def named(name: str) -> Architecture:
    return of_preset(next(file for file in PRESETS if file.name.endswith(f"/{name}")))


def with_sizes(base: Architecture, **sizes: object) -> Architecture:
    return architecture(base.arguments.replaced(sizes))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_every_preset_keeps_every_invariant(file: PresetFile, layout: Layout) -> None:
    full = of_preset(file)
    plan = shrink(full, layout)
    assert [invariant.name for invariant in plan.invariants] == [f"S{n}" for n in range(1, 13)]
    assert all(invariant.holds for invariant in plan.invariants)
    assert plan == shrink(full, layout)


def multiples(unit: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most).map(lambda times: unit * times)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Dense and MoE models of any shape that Megatron would accept, sensible or not."""
    groups = draw(st.integers(1, 16))
    heads = groups * draw(st.integers(1, 16))
    channels = draw(st.sampled_from([16, 32, 48, 64, 80, 96, 100, 112, 128, 192, 256]))
    hidden = draw(st.one_of(st.just(heads * channels), multiples(8, 1024), multiples(128, 64)))
    sizes: dict[str, object] = {
        "num_layers": draw(st.integers(1, 100)),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": channels,
        "ffn_hidden_size": draw(st.one_of(multiples(8, 4096), multiples(128, 256))),
        "padded_vocab_size": draw(st.one_of(multiples(128, 2000), st.integers(100, 200_000))),
        "swiglu": draw(st.booleans()),
        "untie_embeddings_and_output_weights": draw(st.booleans()),
    }
    if draw(st.booleans()):
        experts = draw(st.sampled_from([2, 8, 16, 60, 64, 128, 160, 256, 384, 512]))
        sizes["num_experts"] = experts
        sizes["moe_router_topk"] = draw(st.integers(1, min(experts, 22)))
        sizes["moe_ffn_hidden_size"] = draw(st.one_of(multiples(8, 512), multiples(128, 64)))
        if draw(st.booleans()):
            sizes["moe_shared_expert_intermediate_size"] = draw(multiples(16, 512))
        dense = draw(st.integers(0, int(str(sizes["num_layers"]))))
        period = draw(st.integers(1, 4))
        sizes["moe_layer_freq"] = draw(
            st.sampled_from(
                [
                    period,
                    tuple(int(index >= dense) for index in range(int(str(sizes["num_layers"])))),
                    tuple(int(index % period == 0) for index in range(int(str(sizes["num_layers"])))),
                ]
            )
        )
    arguments, _ = resolve(())
    return architecture(arguments.replaced({**SHARED, **sizes}))


SHARED = {"max_position_embeddings": 4096, "normalization": "RMSNorm", "position_embedding_type": "rope"}


@settings(max_examples=300, deadline=None)
@given(architectures(), st.sampled_from(LAYOUTS))
def test_random_architectures_keep_every_invariant(full: Architecture, layout: Layout) -> None:
    plan = shrink(full, layout)
    assert all(invariant.holds for invariant in plan.invariants)
    assert plan.after == shrink(full, layout).after


def test_qwen3_235b_keeps_its_ratios_and_two_layers() -> None:
    after = shrink(named("Qwen3-235B-A22B"), Layout()).after
    attention, moe = after.attention, after.moe
    assert moe is not None
    assert attention.num_attention_heads == 16 * attention.num_query_groups
    assert attention.num_query_groups >= 2
    assert (moe.num_experts, moe.moe_router_topk, after.num_layers) == (32, 2, 2)


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


@pytest.mark.parametrize(
    ("kinds", "least", "walk"),
    [
        ([0], 1, [0]),
        ([0] * 94, 1, [0, 0]),
        ([0] * 94, 4, [0, 0, 0, 0]),
        ([0] + [1] * 26, 1, [0, 1, 1]),
        ([0] * 3 + [1] * 58, 1, [0, 0, 1, 1]),
        ([0, 1] * 24, 1, [0, 1, 0, 1]),
        ([0, 0, 0, 1] * 12, 1, [0, 0, 1, 0, 0, 1]),
    ],
    ids=["one", "alike", "one-per-stage", "dense-first", "three-dense", "alternating", "every-fourth"],
)
def test_layers_shrink_to_the_shortest_walk(kinds: list[int], least: int, walk: list[int]) -> None:
    found = shortest_walk(kinds, least)
    assert len(found) <= len(walk)
    assert found[0] == kinds[0] and found[-1] == kinds[-1]
    assert set(pairwise(found)) == set(pairwise(kinds))


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
