"""Recipes, read from ModelOpt's files: each is what ModelOpt makes of it, and does what ModelOpt does."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from harness.errors import UnknownRecipe, UsageError
from harness.recipes import (
    DEFAULT_RECIPES,
    RECIPES,
    Entry,
    Format,
    Recipe,
    combined,
    config_names,
    find_recipe,
    names,
    recipe_name,
    recipes,
    shipped,
)
from harness.recipes.modelopt import declared
from harness.selection import recipes_named
from harness.standins.output import captured, import_foreign

import_foreign()

import modelopt.torch.quantization as mtq  # noqa: E402
from modelopt.recipe.loader import load_recipe  # noqa: E402
from modelopt.torch.quantization import config as modelopt_config  # noqa: E402
from modelopt.torch.quantization.conversion import replace_quant_module, set_quantizer_by_cfg  # noqa: E402
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer  # noqa: E402

every_recipe = pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
every_shipped = pytest.mark.parametrize("name", shipped())

LINEAR = "decoder.layers.0.mlp.linear_fc1"


# What ModelOpt holds


def test_every_config_that_modelopt_offers() -> None:
    assert {recipe.config_name for recipe in recipes()} == modelopt_config.choices
    assert len(recipes()) == len(modelopt_config.choices) == len({recipe.name for recipe in recipes()})


@every_recipe
def test_a_config_is_modelopts(recipe: Recipe) -> None:
    assert recipe.config_name is not None
    assert recipe.to_config() == getattr(mtq, recipe.config_name)
    assert normalised(recipe.to_config()) == normalised(getattr(mtq, recipe.config_name))


def normalised(config: dict[str, Any]) -> Any:
    return modelopt_config.QuantizeConfig(**config).model_dump()


@every_shipped
def test_a_shipped_recipe_is_modelopts(name: str) -> None:
    with captured():
        whole = load_recipe(name)
    assert find_recipe(name).to_config() == whole.quantize.model_dump(exclude_unset=True)


def test_every_ptq_recipe_that_modelopt_ships() -> None:
    root = Path(sys.modules["modelopt"].__file__ or "").parent.parent / "modelopt_recipes"
    found = {
        str(path.relative_to(root).with_suffix(""))
        for path in root.rglob("*.yaml")
        if "recipe_type: ptq" in path.read_text()
    }
    assert set(shipped()) == found


def test_a_config_is_a_new_one_each_time() -> None:
    recipe = find_recipe("fp8")
    recipe.to_config()["quant_cfg"].clear()
    assert recipe.to_config() == mtq.FP8_DEFAULT_CFG


def test_words_are_those_of_modelopts_classes() -> None:
    """The fields and methods read from its source, against the classes themselves."""
    for name, fields in declared().fields.items():
        cls = getattr(modelopt_config, name)
        assert fields == frozenset(getattr(cls, "model_fields", fields)), name
    for method, name in declared().methods.items():
        assert getattr(modelopt_config, name)().method == method


# Which quantizer becomes what: asked of ModelOpt


class Layer(nn.Module):
    """Linears by the names of every kind of layer of Megatron's, and what else ModelOpt converts."""

    def __init__(self) -> None:
        super().__init__()
        attention = {name: linear() for name in "linear_qkv linear_proj linear_q_up_proj in_proj".split()}
        self.self_attention = nn.ModuleDict({**attention, "conv1d": nn.Conv1d(8, 8, 4)})
        self.mixer = nn.ModuleDict({name: linear() for name in ("in_proj", "out_proj")})
        expert = nn.ModuleDict({"linear_fc1": linear(), "linear_fc2": linear()})
        self.mlp = nn.ModuleDict(
            {
                "linear_fc1": linear(),
                "linear_fc2": linear(),
                "router": linear(),
                "fc1_latent_proj": linear(),
                "shared_experts": nn.ModuleDict({"linear_fc1": linear()}),
                "experts": nn.ModuleDict({"local_experts": nn.ModuleList([expert])}),
            }
        )


def linear() -> nn.Module:
    return nn.Linear(8, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict({"position_embeddings": nn.Embedding(8, 8)})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
        self.output_layer = linear()


CLASSES = {nn.Linear: "nn.Linear", nn.Conv1d: "nn.Conv1d", nn.Embedding: "nn.Embedding"}


def quantized_by(config: dict[str, Any]) -> nn.Module:
    model = Model()
    with captured():
        replace_quant_module(model)
        core = model.decoder["layers"][0].self_attention
        core["core_attention"] = nn.Module()
        for name in ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer"):
            setattr(core["core_attention"], name, TensorQuantizer())
        set_quantizer_by_cfg(model, config["quant_cfg"])
    return model


def found_in(model: nn.Module) -> dict[str, tuple[Format, ...]]:
    """The formats of every quantizer that is on, by its path; a container's in a row."""
    found: dict[str, tuple[Format, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SequentialQuantizer):
            found[name] = tuple(format_of(stage) for stage in module if stage.is_enabled)
        elif isinstance(module, TensorQuantizer) and not name.rpartition(".")[2].isdigit():
            found[name] = (format_of(module),) if module.is_enabled else ()
    return found


def format_of(quantizer: TensorQuantizer) -> Format:
    """Every attribute that a quantizer keeps, in the recipe's words."""
    rotate = quantizer._rotate
    return Format.of(
        {
            "num_bits": quantizer._num_bits,
            "axis": quantizer._axis,
            "block_sizes": quantizer._block_sizes,
            "type": "dynamic" if quantizer._dynamic else "static",
            "bias": quantizer._bias,
            "rotate": rotate if isinstance(rotate, bool) else rotate.model_dump(),
            "unsigned": quantizer._unsigned,
            "narrow_range": quantizer._narrow_range,
            "fake_quant": quantizer._fake_quant,
            "use_constant_amax": quantizer._use_constant_amax,
            "constant_amax": quantizer._constant_amax,
            "backend": quantizer.backend,
        }
    )


def asked_of(recipe: Recipe, model: nn.Module) -> dict[str, tuple[Format, ...]]:
    asked = {}
    for name in found_in(model):
        path, _, which = name.rpartition(".")
        module = model.get_submodule(path)
        parent = next((known for cls, known in CLASSES.items() if isinstance(module, cls)), None)
        asked[name] = tuple(without_other(each) for each in recipe.formats(path, which, parent))
    return asked


def without_other(entry: Format) -> Format:
    return Format(**{name: getattr(entry, name) for name in Format.__slots__ if name != "other"})


def assert_as_modelopt(recipe: Recipe) -> None:
    model = quantized_by(recipe.to_config())
    assert asked_of(recipe, model) == found_in(model)


@every_recipe
def test_every_quantizer_is_as_modelopt_sets_it(recipe: Recipe) -> None:
    assert_as_modelopt(recipe)


@every_shipped
def test_every_quantizer_is_as_modelopt_sets_it_by_yaml(name: str) -> None:
    assert_as_modelopt(find_recipe(name))


INT8, FP8 = {"num_bits": 8, "axis": 0}, {"num_bits": (4, 3)}
OFF = {"quantizer_name": "*", "enable": False}


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [OFF],
        [OFF, {"quantizer_name": "*weight_quantizer", "enable": True}],
        [{"quantizer_name": "*", "cfg": FP8}, {"quantizer_name": "*mlp*", "enable": False}],
        [{"quantizer_name": "*", "cfg": FP8, "enable": False}, {"quantizer_name": "*mlp*", "enable": True}],
        [OFF, {"quantizer_name": "*output_quantizer", "cfg": FP8}],
        [OFF, {"quantizer_name": "*", "cfg": INT8, "parent_class": "nn.Linear"}],
        [OFF, {"quantizer_name": "*", "cfg": INT8, "parent_class": "nn.Embedding"}],
        [OFF, {"quantizer_name": "*weight_quantizer", "cfg": [INT8, FP8]}],
        [
            {"quantizer_name": "*weight_quantizer", "cfg": [INT8, FP8]},
            {"quantizer_name": "*fc1*", "enable": False},
        ],
        [
            {"quantizer_name": "*weight_quantizer", "cfg": [INT8, FP8]},
            {"quantizer_name": "*weight_quantizer.1", "enable": False},
        ],
        [
            {"quantizer_name": "*weight_quantizer", "cfg": [INT8, FP8]},
            {"quantizer_name": "*fc1.weight_quantizer", "cfg": FP8},
        ],
        [OFF, {"quantizer_name": "*layers.1.*weight_quantizer", "cfg": INT8}],
        [OFF, {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {**FP8, "use_constant_amax": True}}],
        [OFF, {"quantizer_name": "*[!k]_bmm_quantizer", "cfg": {**FP8, "constant_amax": 3.0}}],
        [
            {"quantizer_name": "*k_bmm*", "cfg": {**FP8, "rotate": True}},
            OFF,
            {"quantizer_name": "*k_bmm*", "enable": True},
        ],
    ],
)
def test_entries_in_a_row_as_modelopt_applies_them(entries: list[dict[str, Any]]) -> None:
    assert_as_modelopt(Recipe.of({"quant_cfg": entries, "algorithm": "max"}, "mine"))


def test_a_wrong_entry_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with ModelOpt fails where the two differ in a single entry."""
    recipe = find_recipe("nvfp4_experts_only")
    config = recipe.to_config()
    config["quant_cfg"][-1]["enable"] = True
    config["quant_cfg"].append({"quantizer_name": "*shared_experts*", "enable": True})
    model = quantized_by(config)
    assert asked_of(recipe, model) != found_in(model)


def test_scopes_of_experts_only_and_of_mlp_only() -> None:
    experts, mlp = find_recipe("nvfp4_experts_only"), find_recipe("nvfp4_mlp_only")
    expert = "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1"
    shared = "decoder.layers.0.mlp.shared_experts.linear_fc1"
    proj = "decoder.layers.0.self_attention.linear_proj"
    blocks = Format((2, 1), 16, True, scale_bits=(4, 3))
    plain = [tuple(without_other(each) for each in experts.formats(path)) for path in (expert, shared, proj)]
    assert plain == [(blocks,), (), ()]
    assert [bool(mlp.formats(path, "input")) for path in (expert, shared, proj)] == [True, True, False]
    assert mlp.formats("decoder.layers.0.mlp.router") == ()


def test_a_kv_config_by_itself_leaves_every_linear_at_the_default() -> None:
    """It has no entry that turns the rest off: it is meant to be added to another."""
    assert find_recipe("fp8_kv").formats(LINEAR) == (Format(8, axis=0),)
    assert find_recipe("fp8+fp8_kv").formats(LINEAR) == (Format((4, 3)),)


def test_what_modelopt_has_no_form_of_has_no_formats() -> None:
    recipe = find_recipe("fp8_kv")
    assert recipe.formats_of("decoder.layers.0.mlp.linear_fc1") == (Format(8, axis=0),)
    assert recipe.formats_of("decoder.layers.0.self_attention.linear_kv_down_proj") == ()
    assert recipe.formats_of("decoder.layers.0.input_layernorm") == ()
    assert recipe.formats_of("embedding.position_embeddings") == (Format(8),)
    assert recipe.formats_of("embedding.position_embeddings", "input") == ()


# Formats


@pytest.mark.parametrize(
    ("recipe", "path", "which", "words"),
    [
        ("fp8", LINEAR, "weight", "e4m3, one scale"),
        ("int8", LINEAR, "weight", "int8, a scale per index of dimension 0"),
        ("nvfp4", LINEAR, "input", "e2m1, dynamic blocks of 16 under e4m3"),
        ("mxfp8", LINEAR, "weight", "e4m3, dynamic blocks of 32 under e8m0"),
        ("fp8_2d_blockwise_weight_only", LINEAR, "weight", "e4m3, static blocks of 128 x 128"),
        (
            "fp8_per_channel_per_token",
            LINEAR,
            "input",
            "e4m3, a scale over dimension -1, taken from the tensor at hand",
        ),
        ("nvfp4_four_over_six", LINEAR, "weight", "e2m1, static blocks of 16 under e4m3, four over six"),
        ("nvfp4_affine_kv", "core_attention", "k_bmm", "e2m1, dynamic blocks of 16 under e4m3, with a bias"),
        ("nvfp4_kv_rotate", "core_attention", "k_bmm", "e2m1, dynamic blocks of 16 under e4m3, rotated"),
        ("fp8_default-kv_fp8_cast", "core_attention", "v_bmm", "e4m3, one scale, amax 448"),
    ],
)
def test_formats_in_words(recipe: str, path: str, which: str, words: str) -> None:
    (found,) = find_recipe(recipe).formats(path, which)
    assert str(found) == words


def test_a_quantizer_that_is_off_may_rotate_all_the_same() -> None:
    queries = find_recipe("nvfp4_kv_rotate").quantizer("core_attention", "q_bmm")
    assert queries.formats == ()
    ((format, enabled),) = queries.stages
    assert format.rotate and not enabled


def test_which_quantizers_need_amax() -> None:
    needs = {
        recipe.name: recipe.formats(LINEAR)[0].needs_amax for recipe in recipes() if recipe.formats(LINEAR)
    }
    assert {name for name, needed in needs.items() if not needed} == {
        "mxfp4", "mxfp6", "mxfp8", "mxint8", "w4a8_mxfp4_fp8", "mxfp4_mlp_weight_only"
    }  # fmt: skip
    assert not find_recipe("fp8_per_channel_per_token").formats(LINEAR, "input")[0].needs_amax
    assert not find_recipe("fp8_default-kv_fp8_cast").formats("x", "k_bmm")[0].needs_amax


def test_attributes_without_a_field_of_their_own_are_kept() -> None:
    (weights,) = find_recipe("nvfp4").formats(LINEAR)
    assert weights.other == (("effective_bits", 4.5),)
    assert weights.plain == Format((2, 1), 16, True)


def test_bits() -> None:
    assert [Format(bits).bits for bits in (4, 8, (4, 3), (2, 1), (3, 2))] == [4, 8, 8, 4, 6]
    with pytest.raises(ValueError, match="only the backend 'mine' knows"):
        _ = Format("lut", backend="mine").bits


# Algorithms


def test_which_recipes_fold_scales() -> None:
    """``awq_clip`` only clips: ModelOpt's own ``awq`` makes no scales for it."""
    assert {recipe.name for recipe in recipes() if recipe.folds_scales} == {
        "int4_awq", "w4a8_awq_beta", "int8_smoothquant", "nvfp4_awq_lite", "nvfp4_awq_full", "nvfp4_svdquant"
    }  # fmt: skip


def test_algorithms_and_their_options() -> None:
    (awq,) = find_recipe("int4_awq").algorithms
    assert (awq.method, awq.options, awq.option("alpha_step", 1)) == ("awq_lite", (("alpha_step", 0.1),), 0.1)
    assert find_recipe("mxfp4").algorithm is None
    assert find_recipe("fp8_kv").algorithm is None  # mtq.quantize looks into the dict, which has none
    assert find_recipe("fp8+fp8_kv").algorithm == "max"
    two = Recipe.of({"quant_cfg": [], "algorithm": ["max", {"method": "awq_lite"}]}, "two")
    assert (two.algorithm, two.folds_scales) == ("max, awq_lite", True)


# Names


@every_recipe
def test_found_by_every_spelling(recipe: Recipe) -> None:
    assert recipe.config_name is not None
    for text in (recipe.name, recipe.name.upper(), recipe.config_name, recipe.config_name.lower()):
        assert find_recipe(text) is recipe
    assert recipe_name(recipe.config_name) == recipe.name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVFP4_DEFAULT_CFG", "nvfp4"),
        ("NVFP4_SVDQUANT_DEFAULT_CFG", "nvfp4_svdquant"),
        ("NVFP4_FP8_MHA_CONFIG", "nvfp4_fp8_mha"),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_2d_blockwise_weight_only"),
        (" int4-awq ", "int4_awq"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert recipe_name(text) == name
    assert find_recipe(text).name == name


def test_every_name_is_found_and_finds_its_own() -> None:
    assert len(names()) == len(set(names())) == len(config_names()) + len(shipped())
    for name in names():
        assert find_recipe(name).name == name


@pytest.mark.parametrize(
    "text",
    [
        "nvfp4_experts_only-kv_fp8",
        "general/ptq/nvfp4_experts_only-kv_fp8",
        "general/ptq/nvfp4_experts_only-kv_fp8.yaml",
        "General/PTQ/NVFP4_experts_only_kv_fp8",
    ],
)
def test_a_shipped_recipe_by_its_path_or_its_end(text: str) -> None:
    recipe = find_recipe(text)
    assert (recipe.name, recipe.config_name) == ("nvfp4_experts_only-kv_fp8", None)
    assert recipe.source == "modelopt_recipes/general/ptq/nvfp4_experts_only-kv_fp8.yaml"


def test_the_old_folder_of_recipes_of_single_checkpoints() -> None:
    old = "huggingface/models/nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16/ptq/nvfp4_w4a16"
    assert find_recipe(old) is find_recipe("nvfp4_w4a16")


def test_an_end_that_several_recipes_have_lists_them() -> None:
    with pytest.raises(UnknownRecipe) as raised:
        find_recipe("nvfp4_default-kv_fp8")
    assert str(raised.value) == (
        "'nvfp4_default-kv_fp8' is the end of several recipes: general/ptq/nvfp4_default-kv_fp8, "
        "general/qad/nvfp4_default-kv_fp8"
    )


def test_default_recipes_are_recipes() -> None:
    assert [find_recipe(name).name for name in DEFAULT_RECIPES] == list(DEFAULT_RECIPES)


def test_all_and_lists_of_names() -> None:
    assert recipes_named(["all"]) == recipes() == RECIPES
    assert set(recipes_named(["fp8", "ALL"])) == set(RECIPES)
    assert [recipe.name for recipe in recipes_named([])] == list(DEFAULT_RECIPES)
    assert [recipe.name for recipe in recipes_named(["mxfp8,default"])] == ["mxfp8", *DEFAULT_RECIPES]
    assert [recipe.name for recipe in recipes_named(["fp8,nvfp4", "fp8"])] == ["fp8", "nvfp4"]
    with pytest.raises(UsageError):
        recipes_named(["fp8,nonsense"])


def test_unknown_recipe_names_the_near_ones() -> None:
    with pytest.raises(UnknownRecipe) as raised:
        find_recipe("int4_aqw")
    assert str(raised.value).startswith("no recipe is called 'int4_aqw'; did you mean int4_awq")


def test_unknown_recipe_near_nothing_lists_all() -> None:
    with pytest.raises(UnknownRecipe) as raised:
        find_recipe("zzz")
    assert str(raised.value) == (
        f"no recipe is called 'zzz'; known: {', '.join(config_names())}, and {len(shipped())} recipes of "
        "modelopt_recipes"
    )


@pytest.mark.parametrize("text", ["", "+", "fp8+", "+fp8_kv", "fp8++fp8_kv"])
def test_no_name(text: str) -> None:
    with pytest.raises(UnknownRecipe):
        find_recipe(text)


# Combinations


@pytest.mark.parametrize("kv", ["fp8_kv", "fp8_affine_kv", "nvfp4_kv", "nvfp4_affine_kv", "nvfp4_kv_rotate"])
@pytest.mark.parametrize("name", ["fp8", "nvfp4", "mxfp4", "int4_awq"])
def test_a_kv_config_beside_another_as_modelopt_adds_it(name: str, kv: str) -> None:
    recipe, base, added = find_recipe(f"{name}+{kv}"), find_recipe(name), find_recipe(kv)
    with captured():
        entries = added.to_config()["quant_cfg"]
        expected = mtq.utils.update_quant_cfg_with_kv_cache_quant(base.to_config(), entries)
    assert recipe.to_config() == expected
    assert (recipe.name, recipe.config_name) == (f"{name}+{kv}", None)
    assert recipe.entries == (*base.entries, *added.entries)
    assert recipe.formats("core_attention", "k_bmm") == added.formats("core_attention", "k_bmm")
    assert recipe.formats(LINEAR) == base.formats(LINEAR)
    assert_as_modelopt(recipe)


def test_a_part_of_modelopts_library_beside_another() -> None:
    """Its examples name these too (``--kv_cache_qformat fp8_cast``), and no constant is one."""
    recipe = find_recipe("fp8+configs/ptq/presets/kv/fp8_cast")
    (cast,) = recipe.formats("core_attention", "k_bmm")
    assert (cast.constant_amax, recipe.formats(LINEAR)) == (448.0, (Format((4, 3)),))
    assert recipe.source.endswith("modelopt_recipes/configs/ptq/presets/kv/fp8_cast.yaml")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("general/auto_quantize/nvfp4_fp8_at_5p4bits", "auto_quantize"),
        ("general/speculative_decoding/eagle3", "speculative_eagle"),
    ],
)
def test_recipes_that_do_something_else(name: str, kind: str) -> None:
    with pytest.raises(UnknownRecipe, match=rf"{name}\.yaml:\d+: .*{kind}"):
        find_recipe(name)


def test_three_in_a_row() -> None:
    three = find_recipe("fp8+nvfp4_kv+fp8_kv")
    assert three.name == "fp8+nvfp4_kv+fp8_kv"
    assert three == combined(combined(find_recipe("fp8"), find_recipe("nvfp4_kv")), find_recipe("fp8_kv"))
    assert three.formats("core_attention", "k_bmm") == (Format((4, 3)),)


# A user's own file

MINE = """\
imports:
  off: configs/ptq/units/base_disable_all
  fp8: configs/numerics/fp8
metadata:
  recipe_type: ptq
quantize:
  algorithm: max
  quant_cfg:
    - $import: off
    - quantizer_name: '*weight_quantizer'
      cfg:
        $import: fp8
        axis: 0
"""
BARE = """\
algorithm:
  method: awq_lite
quant_cfg:
  - quantizer_name: '*'
    enable: false
  - quantizer_name: '*weight_quantizer'
    cfg: {num_bits: 4, block_sizes: {-1: 128, type: static}}
"""


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_recipe_of_the_users_own(tmp_path: Path) -> None:
    path = written(tmp_path, MINE)
    recipe = find_recipe(path)
    assert (recipe.name, recipe.config_name, recipe.source) == (path, None, path)
    assert recipe.formats(LINEAR) == (Format((4, 3), axis=0),)
    with captured():
        assert recipe.to_config() == load_recipe(path).quantize.model_dump(exclude_unset=True)
    assert recipe.entries[1].place == f"{path}:10"
    assert find_recipe(path.removesuffix(".yaml")).to_config() == recipe.to_config()


def test_a_bare_config_of_the_users_own(tmp_path: Path) -> None:
    recipe = find_recipe(written(tmp_path, BARE))
    assert (recipe.algorithm, recipe.folds_scales) == ("awq_lite", True)
    assert recipe.formats(LINEAR) == (Format(4, 128),)
    assert_as_modelopt(recipe)


@pytest.mark.parametrize("line", ["algorithm: max", ""], ids=["said", "not-said"])
def test_a_file_without_an_algorithm_is_calibrated_as_modelopt_does(line: str, tmp_path: Path) -> None:
    path = written(tmp_path, MINE.replace("algorithm: max", line))
    recipe = find_recipe(path)
    with captured():
        assert recipe.algorithm == load_recipe(path).quantize.algorithm == "max"
    assert recipe.to_config()["algorithm"] == "max"


def test_a_file_beside_a_kv_config(tmp_path: Path) -> None:
    path = written(tmp_path, MINE)
    recipe = find_recipe(f"{path}+nvfp4_kv")
    assert recipe.name == f"{path}+nvfp4_kv"
    assert recipe.formats("core_attention", "k_bmm") and recipe.formats(LINEAR)


def test_a_path_with_a_plus_is_a_path(tmp_path: Path) -> None:
    assert find_recipe(written(tmp_path, MINE, "a+b.yaml")).formats(LINEAR)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path, MINE)
    assert find_recipe(path).formats(LINEAR) == (Format((4, 3), axis=0),)
    time.sleep(0.01)
    written(tmp_path, BARE)
    assert find_recipe(path).formats(LINEAR) == (Format(4, 128),)


def test_imports_from_the_working_directory_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    schema = "# modelopt-schema: modelopt.torch.quantization.config.QuantizerAttributeConfig\n"
    written(tmp_path, schema + "num_bits: 6\n", "fp8.yml")
    own = find_recipe(written(tmp_path, MINE.replace("configs/numerics/fp8", "fp8")))
    assert own.formats(LINEAR) == (Format(6, axis=0),)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("axis: 0", "axsi: 0", ":13: 'axsi' is not among the keys of a quantizer's cfg; did you mean axis?"),
        ("axis: 0", "axis: 0\n        axis: 1", ":14: 'axis' is there twice, first in line 13"),
        ("axis: 0", "num_bits: e9m9", ":13: e9m9 is no format of ModelOpt's"),
        ("axis: 0", "num_bits: e3m2", ":13: e3m2 is only for dynamic blocks"),
        (
            "axis: 0",
            "num_bits: many",
            ":13: num_bits is a number of bits or exponent and mantissa as in e4m3",
        ),
        (
            "axis: 0",
            "axis: 0\n        block_sizes: {-1: 16}",
            ":13: axis and block_sizes exclude one another",
        ),
        ("axis: 0", "block_sizes: {-1: 16, typ: dynamic}", ":13: 'typ' is not among the block_sizes"),
        ("axis: 0", "block_sizes: {-1: -16}", ":13: -1: -16 is no dimension and size of its blocks"),
        (
            "axis: 0",
            "block_sizes: {-1: 16, -2: 16, type: dynamic}",
            ":13: dynamic blocks lie along one dimension, not 2",
        ),
        (
            "axis: 0",
            "use_constant_amax: true\n        constant_amax: 1",
            ":14: constant_amax and use_constant",
        ),
        ("axis: 0", "axis: !!python/name:os.system", ":13: no valid YAML: could not determine a constructor"),
        ("axis: 0", "axis: 2020-01-01", ":13: '2020-01-01' is a date, which has no place in a recipe"),
        ("axis: 0", "axis: .inf", ":13: '.inf' is no finite number"),
        ("axis: 0", "axis: [0", ":14: no valid YAML"),
        ("quantizer_name:", "quantiser_name:", ":10: 'quantiser_name' is not among the keys of an entry"),
        (
            "      cfg:\n        $import: fp8\n        axis: 0\n",
            "",
            ":10: the entry of '*weight_quantizer' says",
        ),
        ("$import: off", "$import: of", ":9: $import 'of' is not among the imports of this file: False, fp8"),
        ("$import: off", "'*': {enable: false}", ":9: the old form of an entry: say quantizer_name: '*'"),
        ("numerics/fp8", "numerics/fp9", ":3: the import 'fp8' is no file: configs/numerics/fp9"),
        (
            "    - $import: off",
            "    - $import: fp8",
            ":9: $import 'fp8' is a QuantizerAttributeConfig, where",
        ),
        ("recipe_type: ptq", "recipe_type: qat", ":4: a recipe of type 'qat'; only ptq quantizes by itself"),
        ("  recipe_type: ptq", "  description: x", ":4: a recipe says metadata.recipe_type"),
        ("algorithm: max", "algorithm: maxx", ":7: 'maxx' is not among the calibration algorithms; did you"),
        (
            "algorithm: max",
            "algorithm: {method: max, alpha: 1}",
            ":7: 'alpha' is not among the keys of the alg",
        ),
        (
            "quantize:",
            "quantise:",
            ":6: 'quantise' is not among the keys of a PTQ recipe; did you mean quantize?",
        ),
        ("  quant_cfg:", "  quantcfg:", ":8: 'quantcfg' is not among the keys of a quantize config"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:24],
)
def test_what_is_wrong_has_its_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in MINE
    path = written(tmp_path, MINE.replace(old, new))
    with pytest.raises(UnknownRecipe) as raised:
        find_recipe(path)
    assert f"{path}{message}" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: a quantize config without quant_cfg"),
        ("- 1\n", ": is a list, and neither a PTQ recipe nor a quantize config"),
        ("7\n", ":1: expected a mapping or a list, not 7"),
        ("a: 1\n---\nb: 2\n---\nc: 3\n", ": 3 YAML documents"),
        ("quant_cfg: &x\n  - *x\n", ":1: an alias stands inside of what it stands for"),
        ("metadata: {recipe_type: ptq}\n", ":1: a PTQ recipe without quantize"),
        ("imports: 3\nquant_cfg: []\n", ": imports maps names to files, not 3"),
        ("quant_cfg: {a: b}\n", ":1: quant_cfg is a list, not {'a': 'b'}"),
        ("[a, b]: 1\n", ":1: a key is a word or a number"),
        ("\x00", ": no valid YAML"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_files_that_are_no_recipes(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UnknownRecipe) as raised:
        find_recipe(path)
    assert f"{path}{message}" in str(raised.value)


def test_aliases_of_aliases_end(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(UnknownRecipe, match="aliases of aliases"):
        find_recipe(written(tmp_path, "\n".join(lines)))


def test_imports_that_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    schema = "# modelopt-schema: modelopt.torch.quantization.config.QuantizerCfgListConfig\n"
    written(tmp_path, schema + "imports: {b: b}\n---\n- $import: b\n", "a.yaml")
    written(tmp_path, schema + "imports: {a: a}\n---\n- $import: a\n", "b.yaml")
    path = written(tmp_path, "imports: {a: a}\nquant_cfg:\n  - $import: a\n")
    with pytest.raises(UnknownRecipe, match=r"b\.yaml:2: the import 'a' comes back to a\.yaml"):
        find_recipe(path)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("", "is imported and has no modelopt-schema comment"),
        ("# modelopt-schema: os.system\n", "os.system is no class that a quantization config is made of"),
        (
            "# modelopt-schema: modelopt.torch.quantization.config.QuantizerCfgEntry\n",
            "own.yaml:1: the old form of an entry",
        ),
    ],
    ids=["none", "foreign", "another"],
)
def test_an_import_says_what_it_is(
    first: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, first + "num_bits: 6\n", "own.yaml")
    with pytest.raises(UnknownRecipe) as raised:
        find_recipe(written(tmp_path, MINE.replace("configs/numerics/fp8", "own")))
    assert message in str(raised.value)
    assert "own.yaml" in str(raised.value)


def test_no_file_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownRecipe, match="nor is it a YAML file"):
        find_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(UnknownRecipe, match="is a folder"):
        find_recipe(f"{tmp_path}/")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"):
        with pytest.raises(UnknownRecipe):
            find_recipe(written(tmp_path, f"quant_cfg: {tag} ['{tmp_path}/made']\n"))
    assert not (tmp_path / "made").exists()


# The record


def test_a_recipe_travels_between_processes() -> None:
    for recipe in (*recipes(), find_recipe("fp8+fp8_kv")):
        again = pickle.loads(pickle.dumps(recipe))
        assert again == recipe
        assert hash(again) == hash(recipe)
        assert again.entries == recipe.entries


def test_an_entry_knows_its_line() -> None:
    entry = find_recipe("nvfp4_experts_only").entries[3]
    assert (entry.pattern, entry.enable, entry.parent_class) == ("*.experts.*weight_quantizer", True, None)
    assert entry.place.startswith("modelopt_recipes/configs/ptq/units/experts_nvfp4.yaml:")
    assert isinstance(entry, Entry)


def test_patterns_that_tell_layers_apart() -> None:
    def by_layer(pattern: str) -> bool:
        return Recipe.of({"quant_cfg": [{"quantizer_name": pattern, "enable": False}]}, "x").by_layer

    for pattern in (
        "*layers.0.*",
        "*.0.mlp*",
        "*1.mlp*",
        "*?.mlp*",
        "decoder.layers.*",
        "*[0-3].mlp*",
        "*[!a]x",
    ):
        assert by_layer(pattern), pattern
    for pattern in ("*", "*[kv]_bmm_quantizer", "*linear_fc1*", "*fc1_latent_proj*", "*mlp*weight_quantizer"):
        assert not by_layer(pattern), pattern


def test_the_old_names_of_a_plain_recipe() -> None:
    fp8, nvfp4, awq = map(find_recipe, ("fp8", "nvfp4", "w4a8_awq_beta"))
    assert (fp8.weights, fp8.inputs) == ((Format((4, 3)),), Format((4, 3)))
    assert (nvfp4.weights, nvfp4.inputs) == ((Format((2, 1), 16, True),), Format((2, 1), 16, True))
    assert (awq.weights, awq.inputs) == ((Format(4, 128), Format((4, 3))), Format((4, 3)))
    assert find_recipe("int4_awq").inputs is None


# Cost


def test_imports_without_torch_or_yaml() -> None:
    code = "import sys, harness.recipes; assert not {'torch', 'modelopt', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_without_torch() -> None:
    code = (
        "import sys, harness.recipes as found\n"
        "found.recipes(), found.find_recipe('nvfp4_default-kv_none-gptq')\n"
        "assert not {'torch', 'modelopt', 'modelopt_recipes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_modelopt_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.recipes import modelopt

    monkeypatch.setattr(modelopt, "find_spec", lambda name: None)
    with pytest.raises(UnknownRecipe, match="no package 'modelopt_recipes' is installed"):
        modelopt.library()
    monkeypatch.setattr(modelopt, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[]))
    with pytest.raises(UnknownRecipe, match="no package 'modelopt' is installed"):
        modelopt.package("modelopt")
