"""What a layout asks of a model, whose limit it is, and that a shrunken model meets the same ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from broken import TREE
from published import changed, named, of_preset
from small_models import MODELS, model_of

from harness.architecture import Architecture
from harness.blocks import misfits
from harness.finding import Finding
from harness.layout import Layout
from harness.layout_rules import (
    Limit,
    Owner,
    broken_limits,
    group_split,
    limit_findings,
    why_impossible,
)
from harness.preset import PresetFile, discover
from harness.rank import ranks
from harness.recipes import RECIPES
from harness.sharding import UnevenSplit, rank_parameters
from harness.shrink import shrink
from harness.shrink.invariants import check_invariants


def _findings(model: Architecture, layout: str) -> tuple[Finding, ...]:
    return tuple(limit_findings(model, broken(model, layout)))


def broken(model: Architecture, layout: str) -> tuple[Limit, ...]:
    return broken_limits(model, Layout.parse(layout))


@pytest.mark.parametrize(
    ("name", "layout", "message", "dest"),
    [
        (
            "Qwen2.5-0.5B-Instruct",
            "tp4",
            "Megatron: 14 attention heads / tp4 is not whole",
            "num_attention_heads",
        ),
        (
            "Qwen3-8B",
            "tp3",
            "Megatron: 8 query groups / tp3 is not whole, nor is tp3 / 8 groups",
            "num_query_groups",
        ),
        (
            "phi-4",
            "tp4",
            "Megatron: 10 query groups / tp4 is not whole, nor is tp4 / 10 groups",
            "num_query_groups",
        ),
        (
            "gpt-oss-20b",
            "tp8",
            "Megatron: experts with biases go with etp1 only, not with etp8",
            "add_bias_linear",
        ),
        ("Qwen3-30B-A3B", "ep3", "Megatron: 128 experts / ep3 is not whole", "num_experts"),
        (
            "Qwen3-30B-A3B",
            "etp5",
            "Megatron: 768 channels of an expert / etp5 is not whole",
            "moe_ffn_hidden_size",
        ),
        (
            "Qwen3-30B-A3B",
            "tp2,ep2",
            "ModelOpt: tp2 beside ep2 is refused for experts one by one (TP+EP is not supported by "
            "QuantSequentialMLP): take tp1 or ep1",
            None,
        ),
        (
            "GLM-4.5",
            "tp5",
            "Megatron: 1536 channels of the shared expert / tp5 is not whole",
            "moe_shared_expert_intermediate_size",
        ),
        ("Nemotron-H-8B-Base-8K", "tp16", "Megatron: 8 Mamba groups / tp16 is not whole", "mamba_num_groups"),
        ("Nemotron-H-8B-Base-8K", "tp3", "Megatron: 128 Mamba heads / tp3 is not whole", "mamba_num_heads"),
        (
            "Nemotron-H-8B-Base-8K",
            "cp3",
            "Megatron: 8 Mamba groups per tensor rank / cp3 is not whole, nor is its inverse",
            "mamba_num_groups",
        ),
        (
            "Qwen3-Next-80B-A3B-Instruct",
            "tp16,cp2",
            "Megatron: 16 linear key heads / tp x cp = 32 is not whole",
            "linear_num_key_heads",
        ),
        (
            "Qwen3-8B",
            "pp5",
            "Megatron: 36 layers / 5 pipeline stages is not whole, or leaves one empty",
            "num_layers",
        ),
        ("Qwen3-8B", "pp37", "Megatron: 36 layers cannot fill 37 pipeline stages", "num_layers"),
        ("Qwen3-8B", "ep2", "Megatron: ep2 needs experts, and the model has none", "num_experts"),
        ("Qwen3-8B", "etp2", "Megatron: etp2 needs experts, and the model has none", "num_experts"),
    ],
)
def test_a_limit_says_whose_it_is(name: str, layout: str, message: str, dest: str | None) -> None:
    found = {limit.message: limit for limit in broken(named(name), layout)}
    assert message in found, list(found)
    limit = found[message]
    assert limit.dest == dest
    assert message.startswith(f"{limit.owner}: ")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Qwen3-30B-A3B", "tp8"),
        ("Qwen3-30B-A3B", "tp8,etp1"),
        ("Qwen3-30B-A3B", "ep8"),
        ("Qwen3-30B-A3B", "tp2,pp2"),
        ("gpt-oss-20b", "tp8,etp1"),
        ("Nemotron-H-8B-Base-8K", "tp8"),
        ("Nemotron-H-8B-Base-8K", "tp4,cp4"),
        ("Qwen3-8B", "tp2,etp1"),
    ],
)
def test_what_can_be_run_breaks_nothing(name: str, layout: str) -> None:
    assert broken(named(name), layout) == ()


@pytest.mark.parametrize(
    ("layout", "impossible"),
    [
        ("ep2", True),
        ("etp2", True),
        ("pp37", True),
        ("tp3", False),
        ("pp5", False),
        ("tp2", False),
        ("pp36", False),
    ],
)
def test_a_layout_without_a_meaning(layout: str, impossible: bool) -> None:
    reason = why_impossible(named("Qwen3-8B"), Layout.parse(layout))
    assert (reason is not None) == impossible
    assert reason is None or reason.startswith("Megatron: ")


def test_findings_stand_at_the_flag_at_fault() -> None:
    (finding,) = _findings(named("phi-4"), "tp4")
    assert (finding.stage, finding.flag, finding.actual) == ("audit", "--num-query-groups", 10)
    assert finding.is_error
    assert finding.line is not None
    (finding,) = _findings(named("Qwen3-30B-A3B"), "tp2,ep2")
    assert (finding.flag, finding.actual) == (None, "tp2,ep2")


@pytest.mark.parametrize(
    ("groups", "tp", "words"),
    [
        (8, 2, "4 groups per rank"),
        (8, 8, "1 group per rank"),
        (4, 8, "each group shared by 2 ranks"),
        (2, 8, "each group shared by 4 ranks"),
        (8, 3, "8 groups do not fall on 3 ranks"),
    ],
)
def test_how_groups_fall_on_ranks(groups: int, tp: int, words: str) -> None:
    model = changed(named("Qwen3-8B"), num_query_groups=groups)
    assert group_split(model, Layout(tp=tp)) == words
    # Shared groups are refused only where neither divides the other.
    assert any(limit.rule == "query groups" for limit in broken_limits(model, Layout(tp=tp))) == (
        "do not fall" in words
    )


def test_without_grouped_attention_no_groups_are_named() -> None:
    assert group_split(named("DeepSeek-R1"), Layout(tp=2)) is None


def test_shared_groups_whose_projection_does_not_divide() -> None:
    model = changed(named("Qwen3-8B"), num_attention_heads=1024, num_query_groups=1, kv_channels=3)
    (limit,) = (one for one in broken(model, "tp1024") if one.rule == "fused projection")
    assert limit.message == "Megatron: 3078 rows of linear_qkv / tp1024 is not whole"


def test_a_sequence_that_context_ranks_do_not_divide() -> None:
    model = changed(named("Qwen3-8B"), seq_length=4098)
    assert [limit.rule for limit in broken(model, "cp2")] == ["sequence"]
    assert broken(model, "cp1") == ()


# The rules against the arithmetic of sharding, which raises where a parameter does not divide


@pytest.mark.parametrize(
    "layout", ["tp2", "tp3", "tp4", "tp5", "tp7", "tp8", "tp16", "tp6,etp1", "ep3", "etp5"]
)
@pytest.mark.parametrize("file", discover(TREE), ids=lambda file: file.name)
def test_no_parameter_is_uneven_without_a_rule_that_says_so(file: PresetFile, layout: str) -> None:
    model, sizes = of_preset(file), Layout.parse(layout)
    if model.moe is None and (sizes.ep > 1 or sizes.etp not in (1, sizes.tp)):
        assert why_impossible(model, sizes)
        return
    assert_rules_cover(model, sizes)


def test_a_rule_left_out_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = named("Qwen2.5-0.5B-Instruct"), Layout(tp=4, etp=4)
    assert_rules_cover(model, layout)
    monkeypatch.setattr("harness.layout_rules._RULES", ())
    with pytest.raises(AssertionError):
        assert_rules_cover(model, layout)


def assert_rules_cover(model: Architecture, layout: Layout) -> None:
    """Where a parameter does not divide, some rule says so."""
    try:
        rank_parameters(one_of_each(model), layout, ranks(layout)[0])
    except UnevenSplit as error:
        assert broken_limits(model, layout), error


def one_of_each(model: Architecture) -> Architecture:
    """One layer of each kind: the shapes are the same, and quick to list."""
    return replace(model, layers=tuple(dict.fromkeys(model.layers)))


@pytest.mark.parametrize("tp", [1, 2, 4, 8], ids="tp{}".format)
@pytest.mark.parametrize("file", discover(TREE), ids=lambda file: file.name)
def test_the_shrunken_model_gets_the_verdict_of_the_original(file: PresetFile, tp: int) -> None:
    full, layout = of_preset(file), Layout(tp=tp, etp=tp)
    small = shrink(full, layout).after
    assert small != full
    assert verdict(small, layout) == verdict(full, layout)


@pytest.mark.parametrize(
    "layout", ["tp4,etp1,ep4", "ep8", "tp3", "tp6", "tp16", "cp2", "pp2", "pp3", "pp5", "pp64"]
)
@pytest.mark.parametrize(
    "name", ["Qwen3-30B-A3B", "phi-4", "gpt-oss-20b", "Nemotron-H-8B-Base-8K", "Llama-4-Scout"]
)
def test_other_layouts_get_the_same_verdict(name: str, layout: str) -> None:
    full, sizes = named(next(f.name for f in discover(TREE) if name in f.name)), Layout.parse(layout)
    assert verdict(shrink(full, sizes).after, sizes) == verdict(full, sizes)


def test_a_model_that_does_not_fall_on_its_stages_may_not_begin_to() -> None:
    full, layout = named("Qwen3-8B"), Layout(pp=5)
    small = shrink(full, layout).after
    holds = {one.name: one.holds for one in check_invariants(full, small, layout)}
    assert all(holds.values())
    staged = changed(small, num_layers=5)
    holds = {one.name: one.holds for one in check_invariants(full, staged, layout)}
    assert not holds["S6"]


def test_verdicts_tell_a_shrunken_model_that_differs() -> None:
    full, layout = named("Qwen3-30B-A3B"), Layout(tp=4, etp=4)
    small = shrink(full, layout).after
    rounder = changed(small, moe_ffn_hidden_size=1024)
    assert verdict(rounder, layout) != verdict(full, layout)
    assert verdict(changed(small, num_query_groups=3, num_attention_heads=24), layout) != verdict(
        full, layout
    )


def verdict(model: Architecture, layout: Layout) -> dict[str, Any]:
    """Rules broken and, by recipe, the dimensions at fault and the matrices that they are of."""
    rules = [
        (limit.rule, limit.owner, limit.dest, limit.impossible) for limit in broken_limits(model, layout)
    ]
    blocks = {
        recipe.name: [
            (misfit.dimension.factors, misfit.dimension.matrices, misfit.block, misfit.consequence)
            for misfit in misfits(model, layout, recipe)
        ]
        for recipe in RECIPES
    }
    return {"rules": rules, **blocks}


@pytest.mark.parametrize("name", MODELS)
def test_small_models_of_every_kind_run_on_two_ranks_unless_biased(name: str) -> None:
    rules = [limit.rule for limit in broken_limits(model_of(MODELS[name]), Layout(tp=2, etp=2))]
    assert rules == (["expert biases"] if name == "sinks and windows" else [])


def test_every_owner_is_a_word_that_a_reader_knows() -> None:
    assert [owner.value for owner in Owner] == ["Megatron", "ModelOpt"]
