"""The export round trip, and every way to break what was exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from asserted import asserted_of_export
from published import TREE, changed, named
from safetensors.torch import load_file, save_file

from harness.architecture import Architecture
from harness.build import build_model
from harness.facts import facts_beside
from harness.inventory import parameters
from harness.layout import Layout
from harness.parity import checkpoint, exporting, stored
from harness.parity.counterparts import counterpart, held
from harness.parity.expected import published_shapes
from harness.parity.exporting import Exported, export_round_trip
from harness.parity.importing import import_checkpoint
from harness.parity.stored import Kind, NotKnown, Weight
from harness.parity.twin import Twin, twin
from harness.preset import find_presets
from harness.recipes import Format, find_recipe
from harness.shrink import ShrinkPlan, shrink
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world

CPU = torch.device("cpu")
Edit = Callable[[Path], None]


@cache
def planned(name: str, **changes: Any) -> ShrinkPlan:
    return shrink(changed(named(name), **changes), Layout())


@cache
def twin_of(name: str) -> Twin:
    facts, _ = facts_beside(find_presets([name], TREE)[0].path)
    assert facts is not None
    return twin(facts, planned(name))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The published checkpoint of a twin, made once."""

    @cache
    def folder(name: str) -> Path:
        made = tmp_path_factory.mktemp(name)
        with captured():
            checkpoint.save(checkpoint.build(twin_of(name)), twin_of(name), made)
        return made

    return folder


def exported(folder: Path, name: str, recipe: str, plan: ShrinkPlan | None = None) -> Exported:
    plan = plan or planned(name)
    with captured(), installed(CPU, plan.after):
        return export_round_trip(plan, twin_of(name), find_recipe(recipe), CPU, folder)


# What is exported right


@pytest.mark.parametrize(
    ("name", "recipe", "detail"),
    [
        ("Qwen3-8B", "fp8", "53 tensors exported, 14 weights quantized"),
        ("Qwen3-8B", "nvfp4", "67 tensors exported, 14 weights quantized"),
        ("Qwen2.5-7B-Instruct", "fp8", "55 tensors exported, 14 weights quantized"),
        ("Llama-3.1-8B-Instruct", "nvfp4", "63 tensors exported, 14 weights quantized"),
        ("Nemotron-Mini-4B-Instruct", "fp8", None),
        ("Qwen3-30B-A3B", "fp8", "613 tensors exported, 200 weights quantized"),
        ("Qwen3-30B-A3B", "nvfp4", "813 tensors exported, 200 weights quantized"),
        ("DeepSeek-V2-Lite", "fp8", "647 tensors exported, 210 weights quantized"),
        ("gpt-oss-20b", "fp8", "90 tensors exported, 18 weights quantized"),
        ("Nemotron-H-4B-Instruct", "nvfp4", None),
    ],
)
def test_an_export_is_right(
    folders: Callable[[str], Path], name: str, recipe: str, detail: str | None
) -> None:
    made = exported(folders(name), name, recipe)
    assert (made.findings, made.limit) == ((), "")
    assert detail in (None, made.detail)


# What ModelOpt cannot export, or exports wrong for every model


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-30B-A3B"])
def test_a_folded_scale_is_left_out(folders: Callable[[str], Path], name: str) -> None:
    made = exported(folders(name), name, "int4_awq")
    assert made.findings == ()
    assert made.limit.startswith("ModelOpt: the exporter leaves out pre_quant_scale, the scale per input")
    assert "writes no quantization config for this format" in made.limit


def test_an_architecture_without_rules(folders: Callable[[str], Path]) -> None:
    made = exported(folders("phi-4"), "phi-4", "fp8")
    assert made.limit == "ModelOpt: the exporter has no rules for Phi3ForCausalLM"
    assert (made.findings, made.detail) == ((), "nothing exported")


@pytest.mark.parametrize(
    ("name", "recipe", "words"),
    [
        ("gpt-oss-20b", "nvfp4", "The size of tensor a"),  # experts in one tensor, scales of each
        ("Qwen3-8B", "fp8_per_channel_per_token", "shape '[12, 64, 768]' is invalid"),  # a scale a row
    ],
)
def test_what_the_exporter_raises_is_its_limit(
    folders: Callable[[str], Path], name: str, recipe: str, words: str
) -> None:
    made = exported(folders(name), name, recipe)
    assert made.findings == ()
    assert made.limit.startswith(f"ModelOpt: RuntimeError: {words}")


def test_a_size_of_the_config_that_the_exporter_overwrites(folders: Callable[[str], Path]) -> None:
    made = exported(folders("DeepSeek-R1"), "DeepSeek-R1", "fp8")
    assert made.findings == ()
    assert made.limit.startswith("ModelOpt: the exporter writes --kv-channels as head_dim")


def test_a_format_without_arithmetic(folders: Callable[[str], Path]) -> None:
    made = exported(folders("Qwen3-8B"), "Qwen3-8B", "w4a8_awq_beta")
    assert made.limit.startswith("harness: how int4, static blocks of 128, then e4m3")
    assert made.findings == ()


# What a wrong preset does: no limit excuses it


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "Qwen3-8B",
            {"qk_layernorm": False},
            "model.layers.0.self_attn.q_norm.weight  is published, and Megatron's model has no "
            "decoder.layers.0.self_attention.q_layernorm.weight",
        ),
        (
            "Qwen2.5-7B-Instruct",
            {"add_qkv_bias": False},
            "model.layers.0.self_attn.q_proj.bias  is published, and Megatron's model has no "
            "decoder.layers.0.self_attention.linear_qkv.bias",
        ),
        (
            "Llama-3.1-8B-Instruct",
            {"qk_layernorm": True},
            "decoder.layers.0.self_attention.q_layernorm.weight is Megatron's, and the published checkpoint "
            "has no tensor of it",
        ),
        (
            "Qwen3-8B",
            {"untie_embeddings_and_output_weights": False},
            "lm_head.weight  is published, and Megatron's model has no output_layer.weight",
        ),
    ],
)
def test_a_part_that_one_side_lacks(
    folders: Callable[[str], Path], name: str, changes: dict[str, Any], words: str
) -> None:
    made = exported(folders(name), name, "fp8", planned(name, **changes))
    assert made.limit == ""
    assert words in [finding.message for finding in made.findings]
    assert "in names" in (program := asserted_of_export(made.findings, "fp8", {})) or "not in dict" in program
    assert all(finding.is_error and finding.stage == "parity" for finding in made.findings)


# What breaks an exported checkpoint


def on_tensors(edit: Callable[[dict[str, torch.Tensor]], object], layer: int = 1) -> Edit:
    def edited(folder: Path) -> None:
        (file,) = folder.glob(f"model-{layer:05d}-of-*.safetensors")
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return edited


def on_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Edit:
    def edited(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        edit(config)
        (folder / name).write_text(json.dumps(config))

    return edited


def turned(tensors: dict[str, torch.Tensor]) -> None:
    """The halves of every byte of one weight the other way round."""
    weight = tensors[DOWN]
    tensors[DOWN] = (weight >> 4) | (weight << 4)


def swapped(first: str, second: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    return swap


def with_changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return on_tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
DOWN = f"{MLP}down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
HF, CONFIG, INDEX = "hf_quant_config.json", "config.json", "model.safetensors.index.json"

BREAKS: dict[str, tuple[str, Edit, str]] = {
    "a tensor left out": (
        "fp8",
        on_tensors(lambda tensors: tensors.pop(NORM)),
        f"{NORM}  is missing, expected 512 of bfloat16",
    ),
    "a scale left out": (
        "fp8",
        on_tensors(lambda tensors: tensors.pop(f"{DOWN}_scale")),
        f"{DOWN}_scale  is missing, expected one number of float32",
    ),
    "a name misspelt": (
        "fp8",
        on_tensors(lambda tensors: tensors.update({f"{DOWN}s": tensors.pop(DOWN)})),
        f"{DOWN}s  is 512 x 896 of float8_e4m3fn, and no such tensor is expected",
    ),
    "a weight's scale": (
        "fp8",
        with_changed(f"{DOWN}_scale", lambda scale: scale * 1.01),
        f"{DOWN}_scale  is ",
    ),
    "numbers under a wrong scale": (
        "fp8",
        with_changed(f"{DOWN}_scale", lambda scale: scale * 1.01),
        f"{DOWN}  decodes to other numbers than the fake-quantized weight in ",
    ),
    "an input's scale": (
        "fp8",
        with_changed(f"{MLP}up_proj.input_scale", lambda scale: scale * 448),
        f"{MLP}up_proj.input_scale  is ",
    ),
    "a type": (
        "fp8",
        with_changed(NORM, lambda norm: norm.float()),
        f"{NORM}  is 512 of float32, expected 512 of bfloat16",
    ),
    "a scale's type": (
        "nvfp4",
        with_changed(f"{DOWN}_scale", lambda scale: scale.bfloat16()),
        f"{DOWN}_scale  is 512 x 56 of bfloat16, expected 512 x 56 of float8_e4m3fn",
    ),
    "a shape": (
        "nvfp4",
        with_changed(f"{DOWN}_scale", lambda scale: scale.T.contiguous()),
        f"{DOWN}_scale  is 56 x 512 of float8_e4m3fn, expected 512 x 56 of float8_e4m3fn",
    ),
    "a scale of all blocks": (
        "nvfp4",
        with_changed(f"{DOWN}_scale_2", lambda scale: scale * 2),
        f"{DOWN}_scale_2  is ",
    ),
    "halves of bytes": (
        "nvfp4",
        on_tensors(turned),
        f"{DOWN}  decodes to other numbers than the fake-quantized weight in ",
    ),
    "halves of bytes of int4": (
        "int4_awq",
        on_tensors(turned),
        f"{DOWN}  decodes to other numbers than the fake-quantized weight in ",
    ),
    "a block's scale": (
        "int4_awq",
        with_changed(f"{DOWN}_scale", lambda scale: scale * 1.01),
        f"{DOWN}_scale  is not what calibration comes to in 3584 of 3584 places",
    ),
    "gates for what they gate": (
        "nvfp4",
        on_tensors(swapped(f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight")),
        f"{MLP}gate_proj.weight  decodes to other numbers than the fake-quantized weight in ",
    ),
    "keys for values": (
        "fp8",
        on_tensors(swapped(f"{ATTENTION}k_proj.weight", f"{ATTENTION}v_proj.weight")),
        f"{ATTENTION}k_proj.weight  decodes to other numbers than the fake-quantized weight in ",
    ),
    "norms for each other": (
        "fp8",
        on_tensors(swapped(f"{ATTENTION}q_norm.weight", f"{ATTENTION}k_norm.weight")),
        f"{ATTENTION}q_norm.weight  differs from Megatron's weight in ",
    ),
    "the index": (
        "fp8",
        on_json(INDEX, lambda index: index["weight_map"].update({NORM: "model-00002-of-00002.safetensors"})),
        f"{NORM}  stands in model-00001-of-00002.safetensors, and the index has "
        "model-00002-of-00002.safetensors",
    ),
    "the algorithm": (
        "fp8",
        on_json(HF, lambda config: config["quantization"].update(quant_algo="NVFP4")),
        f"{HF}  quant_algo is 'NVFP4', expected 'FP8'",
    ),
    "the group size": (
        "nvfp4",
        on_json(HF, lambda config: config["quantization"].update(group_size=32)),
        f"{HF}  group_size is 32, expected 16",
    ),
    "a cache that is not quantized": (
        "fp8",
        on_json(HF, lambda config: config["quantization"].update(kv_cache_quant_algo="FP8")),
        f"{HF}  kv_cache_quant_algo is 'FP8', expected None",
    ),
    "an exclusion left out": (
        "fp8",
        on_json(HF, lambda config: config["quantization"].update(exclude_modules=["model.embed_tokens"])),
        f"{HF}  exclude_modules has nothing of lm_head, which is not quantized",
    ),
    "an exclusion too many": (
        "fp8",
        on_json(HF, lambda config: config["quantization"]["exclude_modules"].append("model.layers.0.mlp*")),
        f"{HF}  exclude_modules has 'model.layers.0.mlp*', and {MLP}down_proj is quantized",
    ),
    "an exclusion of nothing": (
        "fp8",
        on_json(HF, lambda config: config["quantization"]["exclude_modules"].append("model.lm_heads")),
        f"{HF}  exclude_modules has 'model.lm_heads', and no module is called so",
    ),
    "no config": ("fp8", lambda folder: (folder / HF).unlink(), f"{HF}  is missing, and the checkpoint has"),
    "no copy of the config": (
        "fp8",
        on_json(CONFIG, lambda config: config.pop("quantization_config")),
        f"{CONFIG}  has no quantization_config",
    ),
    "another copy of the config": (
        "nvfp4",
        on_json(CONFIG, lambda config: config["quantization_config"].update(ignore=[])),
        f"{CONFIG}  quantization_config has ignore [], expected ['lm_head', 'model.embed_tokens']",
    ),
    "bits of the copy": (
        "nvfp4",
        on_json(
            CONFIG,
            lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(
                num_bits=8
            ),
        ),
        f"{CONFIG}  quantization_config has num_bits 8, expected 4",
    ),
    "a size of the model": (
        "fp8",
        on_json(CONFIG, lambda config: config.update(head_dim=128)),
        f"{CONFIG}  head_dim is 128, published 64",
    ),
}


# What packed numbers and their scales stand for no program shows.
NO_PROGRAM = ("decodes to other numbers", "is not what calibration comes to")


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_export_is_found(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    recipe, edit, words = BREAKS[what]
    judged = exporting.judged

    def broken(source: Path, target: Path, *more: Any) -> Exported:
        edit(target)
        return judged(source, target, *more)

    monkeypatch.setattr(exporting, "judged", broken)
    made = exported(folders("Qwen3-8B"), "Qwen3-8B", recipe)
    found = [finding for finding in made.findings if finding.message.startswith(words)]
    assert found, made.findings
    assert len(made.findings) <= 4, made.findings
    shown = asserted_of_export(found, recipe, dict(parameters(planned("Qwen3-8B").after)))
    assert bool(shown) is not any(each in words for each in NO_PROGRAM), shown


def test_what_the_harness_raises_is_no_limit(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("of the harness")

    monkeypatch.setattr(exporting, "_quantize", broken)
    with pytest.raises(ValueError, match="of the harness"):
        exported(folders("Qwen3-8B"), "Qwen3-8B", "fp8")


# Where a tensor stands in Megatron's model, checked by ModelOpt's importer


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen2.5-7B-Instruct", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"])
def test_counterparts_hold_what_was_imported(folders: Callable[[str], Path], name: str) -> None:
    small, folder = planned(name).after, folders(name)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    with captured(), installed(CPU, small), open_world(Layout(), CPU):
        _compare(small, folder, tensors)


def _compare(small: Architecture, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    model = build_model(small, Layout(), CPU, dtype=torch.float32)
    assert import_checkpoint(model, folder).raised is None
    parameters = dict(held(model))
    assert published_shapes(folder).keys() == tensors.keys()
    for name, tensor in tensors.items():
        made = counterpart(name, small, tensors, parameters)
        assert made is not None, name
        assert torch.equal(made.of(parameters.__getitem__), tensor.float()), name


# The formats, by their definitions


def test_e2m1_by_its_codes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    weight = Weight(Kind.NVFP4, 16, None)
    low, high = codes[::2], codes[1::2]
    found = {
        "weight": (low | (high << 4))[None],
        "weight_scale": torch.full((1, 1), 2.0).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.5),
    }
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert stored.decoded(weight, found).tolist() == [positive + [-number for number in positive]]


def test_int4_by_its_codes() -> None:
    found = {
        "weight": torch.tensor([[0x0F, 0x80, 0x71, 0x12]], dtype=torch.uint8),
        "weight_scale": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    }
    numbers = stored.decoded(Weight(Kind.INT4, 2, None), found)
    assert numbers.tolist() == [[-1, 0, 2, 4], [0, -24, 28, 4]]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (
            Weight(Kind.FP8, 0, None),
            {"weight": "8 x 32 of float8_e4m3fn", "weight_scale": "one number of float32"},
        ),
        (
            Weight(Kind.FP8_ROWS, 0, None),
            {"weight": "8 x 32 of float8_e4m3fn", "weight_scale": "8 of float32"},
        ),
        (
            Weight(Kind.NVFP4, 16, None),
            {
                "weight": "8 x 16 of uint8",
                "weight_scale": "8 x 2 of float8_e4m3fn",
                "weight_scale_2": "one number of float32",
            },
        ),
        (
            Weight(Kind.INT4, 16, None, scaled=True),
            {
                "weight": "4 x 32 of uint8",
                "weight_scale": "8 x 2 of float32",
                "pre_quant_scale": "32 of bfloat16",
            },
        ),
    ],
    ids=lambda value: str(value.kind) if isinstance(value, Weight) else "",
)
def test_what_stands_for_a_matrix(weight: Weight, expected: dict[str, str]) -> None:
    assert {part: str(each) for part, each in stored.tensors(weight, (8, 32)).items()} == expected


def test_a_format_that_is_not_known() -> None:
    with pytest.raises(NotKnown, match="e8m7"):
        stored.weight_of((Format(num_bits=(8, 7)),), (), scaled=False)
