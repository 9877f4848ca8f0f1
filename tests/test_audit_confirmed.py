"""What the audit says of a layout and a recipe, confirmed on shrunken models: they pad or refuse just there.

One rank of each layout, in this process; the others are simulated.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from broken import TREE

from harness.architecture import Architecture, architecture
from harness.blocks import misfits
from harness.build import build_model
from harness.layout import Layout
from harness.layout_rules import Owner, broken_limits
from harness.preset import find_presets, load_preset
from harness.recipes import find_recipe
from harness.shrink import shrink
from harness.standins import installed
from harness.standins.output import captured, import_foreign
from harness.trace import forward, token_ids
from harness.world import open_world

import_foreign()

import modelopt.torch.quantization as mtq  # noqa: E402

CPU = torch.device("cpu")


def shrunken(name: str, layout: Layout) -> tuple[Architecture, Architecture]:
    arguments = load_preset(find_presets([name], TREE)[0]).arguments
    assert arguments is not None
    full = architecture(arguments)
    return full, shrink(full, layout).after


def matrices_at_fault(full: Architecture, layout: Layout, recipe: str) -> set[str]:
    return {
        matrix for misfit in misfits(full, layout, find_recipe(recipe)) for matrix in misfit.inputs.matrices
    }


def within_layer(module: str) -> str:
    """The path as the audit has it: without the layer, and the expert's number."""
    return re.sub(r"\.local_experts\.\d+", "", re.sub(r"^decoder\.layers\.\d+\.", "", module))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Qwen3-30B-A3B", "tp1"),
        ("Qwen3-30B-A3B", "tp4"),
        ("Qwen3-30B-A3B", "tp8"),
        ("Qwen2.5-3B-Instruct", "tp8"),
        ("DeepSeek-V2-Lite", "tp1"),
        ("DeepSeek-V2-Lite", "tp2"),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "tp1"),
        ("Qwen3-Next-80B-A3B-Instruct", "tp8"),
        ("gpt-oss-20b", "tp1"),
        ("gpt-oss-20b", "tp2,etp1"),
    ],
)
def test_modelopt_pads_the_matrices_that_the_audit_names(name: str, layout: str) -> None:
    sizes = Layout.parse(layout)
    full, small = shrunken(name, sizes)
    config = copy.deepcopy(mtq.INT4_AWQ_CFG) | {"algorithm": "max"}
    with installed(CPU), open_world(sizes, CPU), captured():
        model = build_model(small, sizes, CPU)
        tokens = token_ids(small.padded_vocab_size, 2, 16, CPU, 1)
        mtq.quantize(model, config, lambda model: forward(model, tokens))
        quantized = {
            name: module
            for name, module in model.named_modules()
            if getattr(module, "weight_quantizer", None) is not None and module.weight_quantizer.is_enabled
        }
        padded = {
            within_layer(name)
            for name, module in quantized.items()
            if hasattr(module.weight_quantizer, "_padding")
        }
        partial = {within_layer(name) for name, module in quantized.items() if module.weight.shape[-1] % 16}
    assert quantized
    assert padded == matrices_at_fault(full, sizes, "int4_awq")
    assert partial == matrices_at_fault(full, sizes, "nvfp4")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Qwen2.5-0.5B-Instruct", "tp4"),
        ("phi-4", "tp4"),
        ("phi-4", "tp8"),
        ("gpt-oss-20b", "tp2"),
        ("Nemotron-H-8B-Base-8K", "tp16"),
        ("Qwen3-30B-A3B", "ep3"),
    ],
)
def test_megatron_refuses_to_build_what_the_audit_says(name: str, layout: str) -> None:
    sizes = Layout.parse(layout)
    full, small = shrunken(name, sizes)
    assert {limit.owner for limit in broken_limits(full, sizes)} == {Owner.MEGATRON}
    with installed(CPU), open_world(sizes, CPU), captured(), pytest.raises((AssertionError, ValueError)):
        build_model(small, sizes, CPU)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Qwen2.5-3B-Instruct", "tp8"),  # two groups on eight ranks
        ("Qwen3-30B-A3B", "tp8"),  # four
        ("phi-4", "tp2"),
        ("gpt-oss-20b", "tp2,etp1"),
        ("Nemotron-H-8B-Base-8K", "tp8"),
    ],
)
def test_megatron_runs_what_the_audit_lets_pass(name: str, layout: str) -> None:
    sizes = Layout.parse(layout)
    full, small = shrunken(name, sizes)
    assert broken_limits(full, sizes) == ()
    with installed(CPU), open_world(sizes, CPU), captured():
        model = build_model(small, sizes, CPU)
        forward(model, token_ids(small.padded_vocab_size, 2, 16, CPU, 1))


def test_modelopt_refuses_tensor_with_expert_parallelism() -> None:
    sizes = Layout.parse("tp2,ep2")
    full, small = shrunken("Qwen3-30B-A3B", sizes)
    (limit,) = broken_limits(full, sizes)
    assert limit.owner is Owner.MODELOPT
    with installed(CPU), open_world(sizes, CPU), captured():
        model = build_model(small, sizes, CPU)
        with pytest.raises(ValueError, match=r"TP\+EP is not supported by QuantSequentialMLP"):
            mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), None)
