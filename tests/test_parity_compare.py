"""Compare: the first part that differs is the one that was changed, wherever that is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.arguments.values import defaults
from harness.build import build_model
from harness.layout import Layout
from harness.parity import checkpoint
from harness.parity.blame import part_of
from harness.parity.compare import compare, relative, relative_each
from harness.parity.corrections import correct
from harness.parity.importing import import_checkpoint
from harness.parity.recording import published_frequencies
from harness.parity.settings import ACTING
from harness.parity.site import Part
from harness.parity.twin import twin
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import token_ids
from harness.world import open_world
from tests.parity_models import CPU, plan_and_facts


@contextmanager
def _pair(name: str, folder: Path) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """Both models of a preset with the same weights, and tokens for them."""
    plan, facts = plan_and_facts(name)
    small = twin(facts, plan)
    with captured(), installed(CPU, plan.before):
        published = checkpoint.build(small)
        checkpoint.save(published, small, folder)
        with open_world(Layout(), CPU):
            model = build_model(plan.after, Layout(), CPU, dtype=torch.float32)
            assert import_checkpoint(model, folder).complete
            tokens = token_ids(plan.after.padded_vocab_size, 2, 24, CPU)
            correct(published, 24)
            yield published, model, tokens


# A parameter of the Megatron model that is made larger -> the part that differs first, and its layer.
CHANGED = {
    "Qwen3-8B": (
        ("embedding.word_embeddings.weight", Part.EMBEDDING, None),
        ("decoder.layers.0.self_attention.linear_qkv.weight", Part.PROJECTION, 0),
        ("decoder.layers.1.self_attention.linear_proj.weight", Part.ATTENTION, 1),
        ("decoder.layers.1.self_attention.k_layernorm.weight", Part.KEY_NORM, 1),
        ("decoder.layers.1.mlp.linear_fc2.weight", Part.MLP, 1),
        ("decoder.final_layernorm.weight", Part.FINAL_NORM, None),
        ("output_layer.weight", Part.LOGITS, None),
    ),
    "DeepSeek-R1": (
        ("decoder.layers.1.self_attention.linear_q_down_proj.weight", Part.QUERY_DOWN, 1),
        ("decoder.layers.1.self_attention.linear_kv_up_proj.weight", Part.KV_UP, 1),
        ("decoder.layers.2.mlp.router.weight", Part.ROUTER, 2),
        ("decoder.layers.2.mlp.shared_experts.linear_fc1.weight", Part.SHARED, 2),
        ("decoder.layers.2.mlp.experts.local_experts.5.linear_fc1.weight", Part.MLP, 2),
    ),
    "Nemotron-H-8B-Base-8K": (
        ("decoder.layers.0.mixer.in_proj.weight", Part.MAMBA_IN, 0),
        ("decoder.layers.0.mixer.A_log", Part.MAMBA_NORM, 0),
        ("decoder.layers.0.mixer.out_proj.weight", Part.MAMBA, 0),
    ),
    "gpt-oss-20b": (
        ("decoder.layers.0.self_attention.core_attention.softmax_offset", Part.CORE, 0),
        ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.bias", Part.MLP, 0),
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_the_first_part_that_differs_is_the_one_that_was_changed(name: str, tmp_path: Path) -> None:
    with _pair(name, tmp_path) as (published, model, tokens):
        parameters = dict(model.named_parameters())
        assert compare(published, model, tokens).equal
        for path, part, layer in CHANGED[name]:
            before = parameters[path].detach().clone()
            parameters[path].data.mul_(1.3)
            found = compare(published, model, tokens)
            parameters[path].data.copy_(before)
            assert found.first is not None and not found.equal
            assert (found.first.part, found.first.layer) == (part, layer), path
        assert compare(published, model, tokens).equal


def test_one_row_of_a_batch_is_enough(tmp_path: Path) -> None:
    with _pair("Qwen3-8B", tmp_path) as (published, model, tokens):
        token = int(tokens[1, 20])
        others = [*tokens[0].tolist(), *tokens[1, :20].tolist()]
        assert token not in others
        model.embedding.word_embeddings.weight.data[token] += 1
        found = compare(published, model, tokens)
    assert found.first is not None and found.first.part is Part.EMBEDDING


def test_the_scan_of_transformers_is_put_right(tmp_path: Path) -> None:
    """Once it gives the same in chunks as in one, the correction can go."""
    plan, facts = plan_and_facts("Nemotron-H-8B-Base-8K")
    with captured():
        published = checkpoint.build(twin(facts, plan))
    tokens = token_ids(256, 2, 24, CPU)
    assert len(correct(published, 24)) == 2
    whole = checkpoint.logits(published, tokens)
    for module in published.modules():
        if hasattr(module, "chunk_size"):
            assert module.chunk_size == 24
            module.chunk_size = 8
    assert relative(whole, checkpoint.logits(published, tokens)) > 1e-3


# Numbers


def test_a_difference_is_told_relative_to_the_largest_value() -> None:
    expected = torch.tensor([1.0, -4.0])
    assert relative(expected, torch.tensor([1.5, -4.0])) == 0.125
    assert relative(expected, torch.ones(3)) == math.inf
    assert relative(expected, torch.tensor([1.0, math.nan])) == math.inf
    assert relative(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative(torch.zeros(2), torch.ones(2)) == math.inf


def test_frequencies_are_told_each_for_itself() -> None:
    expected = torch.tensor([1.0, 1e-6])
    assert relative_each(expected, torch.tensor([1.0, 2e-6])) == pytest.approx(1.0)
    assert relative_each(expected, expected) == 0.0
    assert relative_each(expected, torch.tensor([1.0])) == math.inf


@pytest.mark.parametrize("form", ["doubled", "half", "complex"])
def test_a_rotary_table_gives_its_frequencies_and_its_factor(form: str) -> None:
    steps = torch.tensor([1.0, 0.1, 1e-3])
    angles = torch.outer(torch.arange(4.0), steps).unsqueeze(0)
    cos, sin = 1.5 * angles.cos(), 1.5 * angles.sin()
    output: Any = {
        "doubled": (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)),
        "half": (cos, sin),
        "complex": torch.complex(cos, sin),
    }[form]
    torch.testing.assert_close(
        published_frequencies(output), torch.tensor([1.0, 0.1, 1e-3, 1.5], dtype=torch.float64)
    )


# Tables


def test_every_part_has_settings_and_each_is_an_argument() -> None:
    assert set(ACTING) == set(Part)
    known = defaults()
    assert not [dest for dests in ACTING.values() for dest in dests if dest not in known]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_norm.weight", Part.QUERY_NORM),
        ("q_layernorm", Part.QUERY_NORM),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", Part.KV_NORM),
        ("model.layers.3.mlp.gate.e_score_correction_bias", Part.ROUTER),
        ("model.layers.3.mlp.gate_proj.weight", Part.MLP),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", Part.SHARED),
        ("decoder.layers.0.self_attention.linear_qkv.bias", Part.PROJECTION),
        ("model.layers.0.self_attn.sinks", Part.CORE),
        ("backbone.layers.0.mixer.A_log", Part.MAMBA),
        ("backbone.layers.0.norm.weight", Part.INPUT_NORM),
        ("model.norm.weight", Part.FINAL_NORM),
        ("lm_head.weight", Part.LOGITS),
        ("embedding.position_embeddings.weight", Part.EMBEDDING),
        ("something.else", None),
    ],
)
def test_a_name_tells_its_part(name: str, part: Part | None) -> None:
    assert part_of(name) is part
