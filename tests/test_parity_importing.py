"""Importing: what was read and filled, what was left over, and what is ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.architecture import Architecture
from harness.build import build_model
from harness.layout import Layout
from harness.parity import checkpoint
from harness.parity.importing import (
    Imported,
    absent_tensor,
    empty,
    import_checkpoint,
    stored_names,
    unfilled,
)
from harness.parity.rules import OURS, added, grouped
from harness.parity.twin import twin
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world
from tests.parity_models import CPU, plan_and_facts

Tensors = dict[str, torch.Tensor]


@contextmanager
def _built(small: Architecture) -> Iterator[Any]:
    with captured(), installed(CPU, small), open_world(Layout(), CPU):
        yield build_model(small, Layout(), CPU, dtype=torch.float32)


def _imported(name: str, folder: Path, edit: Callable[[Tensors], None] = lambda tensors: None) -> Imported:
    """The import of a preset's own checkpoint, some of its tensors changed."""
    plan, facts = plan_and_facts(name)
    small = twin(facts, plan)
    with captured():
        checkpoint.save(checkpoint.build(small), small, folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with _built(plan.after) as model:
        return import_checkpoint(model, folder)


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-30B-A3B", "DeepSeek-R1", "gpt-oss-20b"])
def test_every_tensor_is_read_and_every_parameter_filled(name: str, tmp_path: Path) -> None:
    found = _imported(name, tmp_path)
    assert found.complete
    assert found.read == stored_names(tmp_path)
    assert (found.unread, found.unfilled, found.ours, found.missing, found.raised) == ((), (), (), (), None)


def test_a_tensor_more_is_not_read(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    found = _imported("Qwen3-8B", tmp_path, lambda tensors: tensors.update({name: torch.zeros(2)}))
    assert found.unread == (name,) and not found.complete


def test_a_tensor_less_stops_the_importer(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    found = _imported("Qwen3-8B", tmp_path, lambda tensors: tensors.update({"x": tensors.pop(name)}))
    assert found.raised is not None and absent_tensor(found.raised) == name
    assert found.last == "model.layers.1.mlp.gate_proj.weight"
    assert "decoder.layers.1.mlp.linear_fc1.weight" in found.unfilled
    assert "decoder.layers.0.mlp.linear_fc1.weight" not in found.unfilled


def test_a_tensor_with_a_number_that_is_none_fills_nothing(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.norm.weight"][3] = float("nan")

    assert _imported("Qwen3-8B", tmp_path, spoil).unfilled == ("decoder.final_layernorm.weight",)


def test_an_expert_bias_counts_although_it_is_no_parameter(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith("e_score_correction_bias"))
        tensors[name][0] = float("nan")

    assert [name.rpartition(".")[2] for name in _imported("DeepSeek-R1", tmp_path, spoil).unfilled] == [
        "expert_bias"
    ]


def test_a_model_is_emptied_before() -> None:
    plan, _ = plan_and_facts("DeepSeek-R1")
    with _built(plan.after) as model:
        empty(model)
        names = set(unfilled(model))
    assert "decoder.layers.0.input_layernorm.weight" in names
    assert any(name.endswith("router.expert_bias") for name in names)


def test_a_rule_that_nobody_has_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    plan, facts = plan_and_facts("Qwen3-8B")
    small = twin(facts, plan)
    with captured():
        checkpoint.save(checkpoint.build(small), small, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("Qwen3ForCausalLM", "LlamaForCausalLM"))
    with _built(plan.after) as model:
        found = import_checkpoint(model, tmp_path)
    assert found.missing == ("q_layernorm", "k_layernorm")
    assert [name for name in found.unread if "layers.0" in name] == [
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ]
    assert "decoder.layers.0.self_attention.q_layernorm.weight" in found.unfilled
    assert found.raised is None


@pytest.mark.parametrize("name", ["phi-4", "Mixtral-8x7B-v0.1", "Nemotron-Mini-4B-Instruct", "GLM-4.5"])
def test_rules_of_ours_are_said_to_be_ours(name: str, tmp_path: Path) -> None:
    found = _imported(name, tmp_path)
    assert found.complete and found.ours
    assert all(" from " in words for words in found.ours)


def test_a_rule_of_modelopts_own_is_not_replaced() -> None:
    (first, *rest) = OURS["MixtralForCausalLM"]
    assert added("MixtralForCausalLM", {first.name: None}) == tuple(rest)
    assert added("Qwen3ForCausalLM", {}) == ()


def test_fused_rows_are_put_group_by_group() -> None:
    # Four queries of two groups, two rows each: q0 q1 q2 q3 k0 k1 v0 v1.
    fused = torch.arange(16.0).unsqueeze(1)
    rows = grouped(fused, heads=4, groups=2).squeeze(1).tolist()
    assert rows == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
