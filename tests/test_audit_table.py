"""What ``harness audit`` prints of layouts x recipes, and what its JSON holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from broken import TREE
from published import named

from harness.architecture import architecture
from harness.audit_table import DEFAULT_LAYOUTS, Row, audit_json, audit_rows, audit_text, columns_of
from harness.layout import Layout
from harness.preset import discover
from harness.recipes import RECIPES, Recipe, find_recipe

FP8, NVFP4, INT4 = (find_recipe(name) for name in ("fp8", "nvfp4", "int4_awq"))


def row(name: str, layout: str, *recipes: Recipe) -> Row:
    (found,) = audit_rows({name: named(name)}, [Layout.parse(layout)], recipes)
    return found


@pytest.mark.parametrize(
    ("name", "layout", "verdict"),
    [
        ("Qwen3-8B", "tp8", "ok"),
        ("Qwen3-30B-A3B", "tp8", "int4_awq: blocks do not fit; each group shared by 2 ranks"),
        ("Nemotron-H-4B-Instruct", "tp8", "ok"),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "tp1", "int4_awq: blocks do not fit"),
        (
            "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            "tp8",
            "nvfp4, int4_awq: blocks do not fit; each group shared by 4 ranks",
        ),
        ("Qwen2.5-3B-Instruct", "tp8", "int4_awq: blocks do not fit; each group shared by 4 ranks"),
        ("phi-4", "tp4", "refused: query groups (Megatron)"),
        ("Qwen3-30B-A3B", "tp2,ep2", "refused: tp with ep (ModelOpt)"),
        ("Qwen3-8B", "ep2", "impossible: no experts (Megatron)"),
        ("Qwen3-8B", "pp37", "impossible: stages (Megatron)"),
        ("Qwen2.5-0.5B-Instruct", "tp4", "refused: attention heads (Megatron)"),
        ("gpt-oss-20b", "tp2", "refused: expert biases (Megatron)"),
    ],
)
def test_verdicts(name: str, layout: str, verdict: str) -> None:
    assert row(name, layout, FP8, NVFP4, INT4).verdict == verdict


def test_the_table_and_the_dimensions_at_fault() -> None:
    name = "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    rows = audit_rows({name: named(name)}, [Layout(), Layout(tp=8, etp=8)], [FP8, NVFP4])
    title, *table = audit_text(rows, [FP8, NVFP4]).split("\n\n")[0].splitlines()
    assert title == "GiB of weights on the largest rank; * where blocks do not fit, see below"
    assert table[0].split() == "preset layout parameters active bf16 fp8 nvfp4 verdict".split()
    assert [line.split()[1] for line in table[1:]] == ["tp1", "tp8"]
    assert table[1].split()[6][0] != "*"
    assert table[2].split()[6][0] == "*"
    (block,) = audit_text(rows, [FP8, NVFP4]).split("\n\n")[1:]
    first, head, *lines = block.splitlines()
    assert first == (
        "blocks that do not fit: the kernel reads zeros past its end without a word, and its blocks are not "
        "those of the whole matrix at the export"
    )
    assert head.split("  ")[0] == "preset"
    assert "--moe-ffn-hidden-size 1856 / 8 = 232, not a multiple of 16" in lines[0]
    assert lines[0].split()[1:3] == ["tp8", "nvfp4"]
    assert lines[0].endswith("mlp.experts.linear_fc2")


FIVE = tuple(map(find_recipe, "fp8 int8_smoothquant int4_awq w4a8_awq_beta nvfp4".split()))


def test_an_unsplit_dimension_is_named_once_for_all_layouts_and_recipes() -> None:
    full = named("Qwen3-8B")
    full = architecture(full.arguments.replaced({"hidden_size": 4160}))
    rows = audit_rows({"x": full}, [Layout(), Layout(tp=2, etp=2)], FIVE)
    (line,) = (line for line in audit_text(rows, FIVE).splitlines() if "--hidden-size" in line)
    assert "tp1, tp2" in line
    assert "int4_awq, w4a8_awq_beta" in line
    assert line.endswith("inputs of self_attention.linear_qkv, mlp.linear_fc1")


def test_of_many_recipes_those_of_which_all_is_the_same_share_a_column() -> None:
    full = named("Qwen3-8B")
    full = architecture(full.arguments.replaced({"hidden_size": 4160}))
    rows = audit_rows({"x": full}, [Layout()], RECIPES)
    columns = columns_of(rows, RECIPES)
    by_name = {name: column.label for column in columns for name in column.names}
    assert set(by_name) == {recipe.name for recipe in RECIPES}
    assert len(columns) < len(RECIPES) / 1.5
    assert by_name["int8"] == by_name["int8_weight_only"] != by_name["fp8"]
    assert by_name["nvfp4"] == by_name["w4a16_nvfp4"]
    assert len({by_name[name] for name in ("nvfp4", "mxfp4", "nvfp4_experts_only", "int4_awq")}) == 4
    text = audit_text(rows, RECIPES)
    table, legend, *faults = text.split("\n\n")
    assert by_name["int4_awq"] in table.splitlines()[2].rpartition("  ")[2]
    (line,) = (line for line in legend.splitlines() if line.split()[0] == by_name["nvfp4"])
    assert line.split(maxsplit=1)[1].split(", ")[0] == "nvfp4"
    assert legend.splitlines()[0].split() == ["column", "recipes"]
    wrong = [line for block in faults for line in block.splitlines() if "inputs of" in line]
    assert any(by_name["int4_awq"] in line for line in wrong)
    assert not any("int4_awq" in line for line in wrong)


def test_outputs_and_heads_say_so_in_json() -> None:
    full = named("Qwen3-8B")
    full = architecture(full.arguments.replaced({"ffn_hidden_size": 12300, "kv_channels": 72}))
    recipe = find_recipe("fp8_2d_blockwise_weight_only+nvfp4_kv")
    (entry,) = audit_json(audit_rows({"x": full}, [Layout()], [recipe]))
    said = {key for misfit in entry["misfits"] for key in misfit if key.endswith("_per_rank")}
    assert said == {"inputs_per_rank", "outputs_per_rank", "heads_per_rank"}


def test_what_modelopt_alone_refuses_has_a_size() -> None:
    assert row("Qwen3-30B-A3B", "tp2,ep2", FP8).bytes_bf16


@pytest.mark.parametrize(
    "layout", ["tp1", "tp3", "tp5", "tp8", "tp64", "ep3", "pp7", "tp2,cp3", "etp7", "ep2,pp2"]
)
def test_every_preset_has_a_row_at_every_layout(layout: str) -> None:
    models = {file.name: named(file.name) for file in discover(TREE)}
    rows = audit_rows(models, [Layout.parse(layout)], RECIPES)
    assert [one.preset for one in rows] == list(models)
    assert all((one.bytes_bf16 is None) == one.verdict.startswith(("refused", "impossible")) for one in rows)


def test_what_is_refused_has_its_flag_and_its_owner() -> None:
    text = audit_text([row("phi-4", "tp4", FP8), row("Qwen3-30B-A3B", "tp2,ep2", FP8)], [FP8])
    lines = text.split("\n\n")[1].splitlines()
    assert lines[0] == "refused"
    assert "--num-query-groups  Megatron: 10 query groups / tp4 is not whole" in lines[2]
    assert "ModelOpt: tp2 beside ep2" in lines[3]


def test_what_does_not_divide_has_no_size() -> None:
    found = row("Qwen2.5-0.5B-Instruct", "tp4", INT4)
    assert found.misfits["int4_awq"]
    assert audit_text([found], [INT4]).splitlines()[2].split()[4:6] == ["-", "-"]
    found = row("Qwen3-30B-A3B", "ep3", FP8)
    assert (found.bytes_bf16, dict(found.bytes_by_recipe)) == (None, {})
    assert audit_text([found], [FP8]).splitlines()[2].split()[4:6] == ["-", "-"]


def test_a_preset_that_cannot_be_read_has_a_line() -> None:
    line = audit_text([row("Qwen3-8B", "tp1", FP8)], [FP8], ["Org/Broken"]).splitlines()[3]
    assert line.split() == ["Org/Broken", "unreadable"]


def test_json_has_every_word_of_the_row() -> None:
    entries = audit_json([row("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "tp8", NVFP4), row("phi-4", "tp4", FP8)])
    json.dumps(entries)
    misfit = entries[0]["misfits"][0]
    assert (misfit["recipe"], misfit["flag"], misfit["block"]) == ("nvfp4", "--moe-ffn-hidden-size", 16)
    assert misfit["inputs_per_rank"] == 232
    assert misfit["message"].startswith("--moe-ffn-hidden-size 1856 / 8 = 232, not a multiple of 16: ")
    limit = entries[1]["limits"][0]
    assert (limit["owner"], limit["rule"], limit["flag"]) == (
        "Megatron",
        "query groups",
        "--num-query-groups",
    )
    assert set(entries[0]["bytes_per_rank"]) == {"bf16", "nvfp4"}
    assert entries[1]["bytes_per_rank"] == {"bf16": None}


def test_the_default_layouts() -> None:
    assert DEFAULT_LAYOUTS == ("tp1", "tp2", "tp4", "tp8")


def test_imports_without_torch() -> None:
    code = "import sys, harness.audit_table; assert not {'torch', 'modelopt', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_who_pads_tells_columns_apart() -> None:
    """Static and dynamic blocks of one size take the same bytes; where they do not fit, not the same way."""
    full = named("Qwen3-8B")
    uneven = architecture(full.arguments.replaced({"ffn_hidden_size": 12296}))
    for model, alike in ((full, True), (uneven, False)):
        columns = columns_of(audit_rows({"x": model}, [Layout()], RECIPES), RECIPES)
        (nvfp4,) = (column for column in columns if "nvfp4" in column.names)
        assert ("nvfp4_four_over_six" in nvfp4.names) == alike
