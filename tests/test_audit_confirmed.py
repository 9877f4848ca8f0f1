"""What the audit says of a layout and a recipe, confirmed on shrunken models: they pad or refuse just there.

One rank of each layout, in this process; the others are simulated.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from broken import TREE
from small_models import MODELS, model_of

from harness.architecture import Architecture, architecture
from harness.blocks import misfits
from harness.build import build_model
from harness.inventory import parameters
from harness.layout import Layout
from harness.layout_rules import Owner, broken_limits
from harness.preset import find_presets, load_preset
from harness.recipes import find_recipe, recipes
from harness.shrink import shrink
from harness.standins import installed
from harness.standins.output import captured, import_foreign
from harness.trace import forward, token_ids
from harness.world import open_world

import_foreign()

import modelopt.torch.quantization as mtq  # noqa: E402
from modelopt.torch.quantization.conversion import replace_quant_module, set_quantizer_by_cfg  # noqa: E402
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer  # noqa: E402

CPU = torch.device("cpu")


def shrunken(name: str, layout: Layout) -> tuple[Architecture, Architecture]:
    arguments = load_preset(find_presets([name], TREE)[0]).arguments
    assert arguments is not None
    full = architecture(arguments)
    return full, shrink(full, layout).after


def matrices_at_fault(full: Architecture, layout: Layout, recipe: str) -> set[str]:
    return {
        matrix
        for misfit in misfits(full, layout, find_recipe(recipe))
        for matrix in misfit.dimension.matrices
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
        ("Qwen3-30B-A3B", "tp1"),
        ("Qwen3-30B-A3B", "tp8"),
        ("Qwen2.5-0.5B-Instruct", "tp2"),
        ("DeepSeek-V2-Lite", "tp2"),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "tp1"),
        ("Qwen3-Next-80B-A3B-Instruct", "tp2"),
    ],
)
def test_modelopt_pads_both_dimensions_where_the_audit_says(name: str, layout: str) -> None:
    sizes, recipe = Layout.parse(layout), find_recipe("fp8_2d_blockwise_weight_only")
    full, small = shrunken(name, sizes)
    with installed(CPU), open_world(sizes, CPU), captured():
        model = build_model(small, sizes, CPU)
        tokens = token_ids(small.padded_vocab_size, 2, 16, CPU, 1)
        mtq.quantize(model, recipe.to_config(), lambda model: forward(model, tokens))
        padded = {}
        for path, module in model.named_modules():
            # Pairs of (before, after) of the last dimension, then of the one before it.
            padding = getattr(getattr(module, "weight_quantizer", None), "_padding", ())
            axes = {axis for axis, ends in ((-1, padding[:2]), (-2, padding[2:])) if any(ends)}
            if axes:
                padded[within_layer(path)] = axes
    expected: dict[str, set[int]] = {}
    for misfit in misfits(full, sizes, recipe):
        for matrix in misfit.dimension.matrices:
            expected.setdefault(matrix, set()).add(misfit.dimension.axis)
    assert padded == expected


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_sets_the_matrices_that_the_audit_counts(name: str) -> None:
    """On Megatron's own modules, of every kind of layer."""
    architecture = model_of(MODELS[name])
    with installed(CPU), open_world(Layout(), CPU), captured():
        model = build_model(architecture, Layout(), CPU)
        replace_quant_module(model)
        seen = set()
        for recipe in recipes():
            # Of weights only numbers and blocks are compared: as good as new.
            as_new = {"quantizer_name": "*", "cfg": {"num_bits": 8}}
            set_quantizer_by_cfg(model, [as_new, *recipe.to_config()["quant_cfg"]])
            found = {
                path: [bits_and_blocks(stage) for stage in stages_of(module.weight_quantizer)]
                for path, module in model.named_modules()
                if hasattr(module, "weight_quantizer")
            }
            expected = {
                path: [(entry.num_bits, entry.blocks) for entry in recipe.formats_of(path)] for path in found
            }
            assert found == expected, recipe.name
            # And nothing that the audit counts is without a quantizer.
            counted = {
                path.removesuffix(".weight")
                for path, shape in parameters(architecture).items()
                if len(shape) == 2 and recipe.formats_of(path.removesuffix(".weight"))
            }
            assert counted == {path for path in found if found[path] and "conv" not in path}, recipe.name
            seen.add(frozenset(counted))
    assert len(seen) > 2


def stages_of(quantizer: object) -> list[TensorQuantizer]:
    stages = list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]
    return [stage for stage in stages if isinstance(stage, TensorQuantizer) and stage.is_enabled]


def bits_and_blocks(quantizer: TensorQuantizer) -> tuple[object, tuple[object, ...]]:
    blocks = quantizer.block_sizes or {}
    return quantizer.num_bits, tuple(
        sorted((axis, size) for axis, size in blocks.items() if axis in (-1, -2))
    )


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
