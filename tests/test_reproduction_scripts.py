"""Programs of what quantizing, proofs, comparisons and exports find: each, run without the harness, ends as
it should, also where its report has been JSON."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from asserted import asserted, read_again
from programs import alone
from test_reproduction import Broken, case_of, report_of

from harness.case import EXPORT, PARITY, CaseReport, Check, Outcome, StageReport
from harness.errors import UsageError
from harness.finding import Finding, Severity
from harness.pipeline import check
from harness.recipes import find_recipe
from harness.reproduction.script import write_script
from harness.reproduction.snippets import FUNCTIONS, snippets
from harness.standins.patching import patched

DENSE, EXPERTS = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B"
LAYER = "decoder.layers.0."
QKV = f"{LAYER}self_attention.linear_qkv"
FC2 = f"{LAYER}mlp.linear_fc2"
EXPERT = f"{LAYER}mlp.experts.local_experts.1"
DOWN = "model.layers.0.mlp.down_proj.weight"
OFF = "with every quantizer off 3 of 4 logits are not what they were"


def found(message: str, check: str = "", **more: object) -> Finding:
    stage = "parity" if check in ("", EXPORT) else "quantize"
    return Finding(stage, Severity.ERROR, message, check=check or None, **more)  # type: ignore[arg-type]


def moved(bound: str, what: str = "fp8 moves the logits by", check: str = "effect") -> Finding:
    message = f"{what} 0.9 of their size, expected at most {bound}"
    return found(message, check, expected=f"<= {bound}")


def report_with(
    folder: Path, preset: str, recipe: str, *findings: Finding, layout: str = "tp1"
) -> CaseReport:
    """As if a case had found it, and read from a document."""
    case = case_of(folder, preset, recipe=recipe, layout=layout)
    last = findings[0].stage
    stages = (*(StageReport(name, Outcome.PASSED, 0.0) for name in case.stages if name != last),)
    stages = (*stages, StageReport(last, Outcome.FAILED, 0.0))
    return read_again(CaseReport(case, Outcome.FAILED, 0.0, stages, findings))


# ---- what programs are made of ----


def test_a_program_has_every_name_that_stands_in_it() -> None:
    """In annotations, too, which nothing evaluates."""
    text, lines = snippets("\n".join(f"{name}()" for name in FUNCTIONS))
    header = "from __future__ import annotations\nimport torch\nfrom typing import Any\n"
    header += "from collections.abc import Iterator\nfrom contextlib import contextmanager\n"
    program = "\n".join((header, *lines, inspect.getsource(patched), text))
    assert {name for name in FUNCTIONS if f"def {name}(" not in text} == set()
    assert _undefined(program) == []
    assert _undefined(program.replace("import torch.nn as nn\n", ""))


def _undefined(program: str) -> list[str]:
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F811,E9", "-"]
    done = subprocess.run(
        [*command, "--output-format", "concise"], input=program, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("-:")]


@pytest.mark.parametrize("check", ["coverage", "calibration", "effect", "blocks"])
def test_words_that_are_not_known_assert_nothing(check: str) -> None:
    assert asserted([found("x  weight_quantizer is in other words", check, module=QKV)], check) == ""


# ---- what is wrong ----

WRONG = {
    "logits moved by more than the bound": (
        DENSE,
        "fp8",
        moved("1e-06"),
        "of their size, expected at most 1e-06",
    ),
    "logits moved with quantizers off": (
        DENSE,
        "nvfp4_awq_lite",
        found(OFF, "effect"),
        "with every quantizer off the logits differ in",
    ),
    "an amax of another shape": (
        DENSE,
        "fp8",
        found("x  weight_quantizer has 1 amax, expected 7", "calibration", module=QKV, expected=7),
        f"{QKV}.weight_quantizer has 1 amax, expected 7",
    ),
    "no scale per input channel": (
        DENSE,
        "fp8",
        found("x  has no pre_quant_scale, expected 128", "calibration", module=QKV, expected=[128]),
        f"{QKV} has no pre_quant_scale",
    ),
    "a scale that is split otherwise": (
        DENSE,
        "fp8",
        found(
            "x  weight_quantizer._amax is 1 of 1 in the sharded state dict, expected of 7: the weight is",
            "sharded state",
            module=QKV,
            expected=[7],
        ),
        f"{QKV}.weight_quantizer._amax is (1,) of (1,), expected of (7,)",
    ),
    "packed weights far off": (
        DENSE,
        "nvfp4",
        moved("-1.0", "packed weights move the logits by", "weights"),
        "packed weights move the logits by",
    ),
    "a weight that is packed": (
        DENSE,
        "fp8",
        found("x  weight is packed, though the config means none", "weights", module=QKV),
        f"{QKV}.weight is packed",
    ),
    "an exported tensor under another name": (
        DENSE,
        "fp8",
        found(f"{DOWN}s  is missing, expected 512 x 896 of float8_e4m3fn", EXPORT, expected="512 x 896"),
        f"{DOWN}s is missing, expected 512 x 896",
    ),
    "an exported tensor of another type": (
        DENSE,
        "fp8",
        found(f"{DOWN}  is 1 x 2 of int8, expected 2 x 1 of int8", EXPORT, expected="2 x 1 of int8"),
        "of float8_e4m3fn, expected 2 x 1 of int8",
    ),
    "an exported algorithm": (
        DENSE,
        "nvfp4",
        found("hf_quant_config.json  quant_algo is 'NVFP4', expected 'FP8'", EXPORT, expected="FP8"),
        "hf_quant_config.json has quant_algo 'NVFP4'",
    ),
    "an exported size": (
        DENSE,
        "fp8",
        found("config.json  hidden_size is 1, published 3", EXPORT, expected=3),
        "config.json has hidden_size 128",
    ),
    "a published tensor without a place": (
        DENSE,
        "fp8",
        found("x.weight  is published, and Megatron's model has no y.weight", EXPORT, expected="y.weight"),
        "x.weight is published, and Megatron's model has no y.weight",
    ),
}


@pytest.mark.parametrize(("preset", "recipe", "finding", "ending"), WRONG.values(), ids=WRONG)
def test_a_program_shows_what_was_found(
    preset: str, recipe: str, finding: Finding, ending: str, tmp_path: Path
) -> None:
    write_script(report_with(tmp_path, preset, recipe, finding), tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert ending in done.stderr


def test_a_program_shows_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ModelOpt made FP8 of what the recipe says."""
    recipe = find_recipe("int8")
    monkeypatch.setattr("harness.reproduction.quantized.find_recipe", lambda name: recipe)
    finding = found("x  weight_quantizer is e4m3, int8 makes it int8", "coverage", module=QKV)
    write_script(report_with(tmp_path, DENSE, "fp8", finding), tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert f"{QKV}.weight_quantizer has bits and blocks [((4, 3), {{}}, None, False, None, " in done.stderr


# ---- what is right ----

RIGHT = {
    "effect, along the routes of before": (EXPERTS, "fp8", (moved("0.5"), found(OFF, "effect"))),
    "tokens of experts": (
        EXPERTS,
        "fp8",
        (found("x  saw none of the 96 calibration tokens", "calibration", module=EXPERT),),
    ),
    "calibration": (
        DENSE,
        "int4_awq",
        (
            found("x  weight_quantizer has no amax: it never saw data", "calibration", module=QKV),
            found("x  pre_quant_scale is 1, expected 2", "calibration", module=QKV),
        ),
    ),
    **{
        f"a format of {recipe}": (
            DENSE,
            recipe,
            (
                found(f"x  weight_quantizer is int2, {recipe} makes it other", "coverage", module=QKV),
                found(f"x  input_quantizer is int2, {recipe} makes it other", "coverage", module=QKV),
            ),
        )
        for recipe in (
            "fp8",
            "nvfp4",
            "int8_smoothquant",
            "mxfp8",
            "w4a8_awq_beta",
            "fp8_2d_blockwise_weight_only",
            "fp8_per_channel_per_token",
        )
    },
    "stages of a quantizer": (
        DENSE,
        "w4a8_awq_beta",
        (
            found(
                "x  weight_quantizer is on, then off, w4a8_awq_beta means it on, then on",
                "coverage",
                module=QKV,
            ),
            found(
                "x  output_quantizer is on, w4a8_awq_beta means it off",
                "coverage",
                module=QKV,
            ),
        ),
    ),
    "state": (
        DENSE,
        "nvfp4",
        (
            found("x  weight_quantizer._amax is restored to another value", "state", module=QKV),
            found("3 of 4 logits of the restored model are not what they were", "state"),
        ),
    ),
    "sharded state": (
        DENSE,
        "fp8",
        (
            found("x  weight_quantizer._amax is not in the sharded state dict", "sharded state", module=QKV),
            found(
                "x  weight_quantizer._amax is not what the sharded state dict holds for it",
                "sharded state",
                module=QKV,
            ),
            found("x  weight is lost in the restored model", "sharded state", module=QKV),
        ),
    ),
    "packed weights": (
        DENSE,
        "nvfp4",
        (
            found("x  weight unpacks to numbers more than a step away", "weights", module=QKV),
            found("x  weight_quantizer._scale is 1 of x, nvfp4 makes it 2 of y", "weights", module=QKV),
            moved("0.5", "packed weights move the logits by", "weights"),
        ),
    ),
    "gradients": (DENSE, "fp8", (found("x  gradient is zero in every place", "backward", module=QKV),)),
    "an export": (
        "Qwen/Qwen3-8B",
        "fp8",
        (
            found(f"{DOWN}s  is int8, and no such tensor is expected", EXPORT),
            found(f"{DOWN}_scale  is 3, and calibration comes to 4", EXPORT, module=FC2),
            found(f"{DOWN}  stands in no file, and the index has x", EXPORT),
            found("hf_quant_config.json  exclude_modules has 'x', and no module is", EXPORT, actual="x"),
            found("hf_quant_config.json  exclude_modules has nothing of lm_head", EXPORT, expected="lm_head"),
            found("config.json  quantization_config has num_bits 4, expected 8", EXPORT, expected=8),
            found("model.norm.weight  differs from Megatron's weight in 3 of 4 places", EXPORT, module=""),
        ),
    ),
}


@pytest.mark.parametrize(("preset", "recipe", "findings"), RIGHT.values(), ids=RIGHT)
def test_a_program_of_a_right_preset_ends_well(
    preset: str, recipe: str, findings: tuple[Finding, ...], tmp_path: Path
) -> None:
    write_script(report_with(tmp_path, preset, recipe, *findings), tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 0, done.stderr


def test_a_shape_is_right_on_simulated_ranks_too(tmp_path: Path) -> None:
    finding = found("the quantized model's output is 3 x 24 x 1, expected 3 x 24 x 2", "effect")
    write_script(report_with(tmp_path, DENSE, "fp8", finding, layout="tp2"), tmp_path / "show.py")
    # What torch allocates and nothing fills is then no number.
    seed = "torch.manual_seed(1234)"
    text = (tmp_path / "show.py").read_text()
    assert text.count(seed) == 1
    text = text.replace(seed, f"{seed}; torch.use_deterministic_algorithms(True, warn_only=True)")
    (tmp_path / "show.py").write_text(text)
    done = alone(tmp_path / "show.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("nvidia/Nemotron-H-8B-Base-8K", "one_chunk(published, "),
        ("deepseek-ai/DeepSeek-V2-Lite", "latent_scale(published, "),
        ("microsoft/phi-4", "'linear_fc1': CustomModuleMapping('name_remapping', "),
        ("mistralai/Mixtral-8x7B-v0.1", "'router': CustomModuleMapping("),
        ("nvidia/Nemotron-Mini-4B-Instruct", "'linear_qkv': CustomModuleMapping('qkv_merging'"),
        ("zai-org/GLM-4.5", "'shared_experts.linear_fc1': CustomModuleMapping('gated_mlp_merging'"),
        ("openai/gpt-oss-20b", "hf_mxfp4.encode(tensor.mT)"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "no_norm_without_rotation(published, model)"),
        ("meta-llama/Llama-3.2-1B-Instruct", "published_rotation(published, model)"),
    ],
)
def test_a_program_of_a_right_comparison_finds_no_difference(preset: str, said: str, tmp_path: Path) -> None:
    """What transformers, the importer and Megatron do otherwise is put right in the program as well."""
    write_script(report_with(tmp_path, preset, PARITY, found("made up")), tmp_path / "show.py")
    assert said in (tmp_path / "show.py").read_text()
    done = alone(tmp_path / "show.py")
    assert done.returncode == 0, done.stderr


# ---- real failures, through every stage ----

COMPARED = {
    "a tensor that is not read": (
        Broken("Qwen/Qwen3-8B", (("--qk-layernorm", None),), "parity", ("--qk-layernorm",), "", PARITY),
        "AssertionError: the importer reads nothing of model.layers.0.self_attn.",
    ),
    "a tensor that the checkpoint lacks": (
        Broken("Qwen/Qwen3-8B", (("--add-qkv-bias", ""),), "parity", ("--add-qkv-bias",), "", PARITY),
        "ValueError: Key [model.layers.0.self_attn.q_proj.bias] does not exist!",
    ),
    "a parameter that nothing fills": (
        Broken(
            "Qwen/Qwen3-8B",
            (("--position-embedding-type", "learned_absolute"),),
            "parity",
            ("--position-embedding-type",),
            "",
            PARITY,
        ),
        "AssertionError: the checkpoint has nothing for embedding.position_embeddings.weight",
    ),
    "a tensor that does not fit": (
        Broken(
            "Qwen/Qwen3-8B", (("--num-query-groups", "4"),), "parity", ("--num-query-groups",), "", PARITY
        ),
        "Error",
    ),
    "an epsilon": (
        Broken("Qwen/Qwen3-8B", (("--norm-epsilon", "1e-5"),), "parity", ("--norm-epsilon",), "", PARITY),
        "AssertionError: ",
    ),
    "a factor that acts far away": (
        Broken(
            "deepseek-ai/DeepSeek-V2-Lite",
            (("--rotary-scaling-factor", "32"),),
            "parity",
            ("--rotary-scaling-factor",),
            "",
            PARITY,
        ),
        "the angles of decoder.layers.0.self_attention.rotary_pos_emb and of model.rotary_emb differ by ",
    ),
    "a Mamba hybrid": (
        Broken(
            "nvidia/Nemotron-H-8B-Base-8K",
            (("--squared-relu", None),),
            "parity",
            ("--squared-relu",),
            "",
            PARITY,
        ),
        "AssertionError: the logits differ by ",
    ),
}


@pytest.mark.parametrize(("broken", "ending"), COMPARED.values(), ids=COMPARED)
def test_what_a_comparison_finds_becomes_a_program(broken: Broken, ending: str, tmp_path: Path) -> None:
    report = report_of(tmp_path, broken)
    assert [stage.name for stage in report.stages if stage.outcome is Outcome.FAILED][-1] == "parity"
    write_script(report, tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert ending in done.stderr


NOTHING = """
metadata:
  recipe_type: ptq
quantize:
  algorithm: max
  quant_cfg:
    - quantizer_name: "*"
      enable: false
"""


def test_a_recipe_that_changes_nothing_through_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "nothing.yaml").write_text(NOTHING)
    case_of(tmp_path / "presets", DENSE)
    given = ["--recipe", "nothing.yaml", "--device", "cpu", "--json", "report.json"]
    for words in (
        ["check", "Qwen3-0.6B", *given],
        ["repro", "report.json", "Qwen3-0.6B", "--script", "show.py"],
    ):
        command = [sys.executable, "-m", "harness", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert "AssertionError: nothing.yaml changed no logit at all" in done.stderr


def limited(report: CaseReport, name: str, words: str) -> CaseReport:
    """A report of a case that passed, one of whose checks has a limit."""
    stage = "parity" if name == EXPORT else "quantize"
    checked = StageReport(stage, Outcome.PASSED, 0.0, "", (Check(name, Outcome.UNSUPPORTED, words),))
    return replace(report, outcome=Outcome.PASSED, findings=(), stages=(*report.stages[:-1], checked))


def test_what_the_exporter_raises_becomes_a_program(tmp_path: Path) -> None:
    report = report_with(tmp_path, DENSE, "fp8_per_channel_per_token", found("made up", EXPORT))
    words = "ModelOpt: RuntimeError: shape '[12, 64, 768]' is invalid for input of size 12"
    write_script(limited(report, EXPORT, words), tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert "RuntimeError: shape '[" in done.stderr


def test_a_limit_of_a_proof_becomes_a_program(tmp_path: Path) -> None:
    case = replace(case_of(tmp_path, DENSE, recipe="mxint8"), prove=("weights",))
    report = check(case)
    (limit,) = [one for stage in report.stages for one in stage.checks if one.name == "weights"]
    assert (report.outcome, limit.outcome) == (Outcome.PASSED, Outcome.UNSUPPORTED)
    write_script(report, tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert "ValueError: Unsupported MX format: num_bits=8" in done.stderr


def test_what_stops_an_import_becomes_a_program(tmp_path: Path) -> None:
    """Megatron norms queries and keys head by head, so that the published norm does not fit."""
    report = check(case_of(tmp_path, "MiniMaxAI/MiniMax-M2", recipe=PARITY))
    assert report.outcome is Outcome.UNSUPPORTED
    write_script(report, tmp_path / "show.py")
    done = alone(tmp_path / "show.py")
    assert done.returncode == 1
    assert "size mismatch for weight" in done.stderr


# ---- what no program shows ----

UNSHOWN = {
    "the audit's arithmetic": (
        found("x  input_quantizer pads dimension -1 in blocks of 16 by 2, which the audit", "blocks"),
        "tp1",
        "the harness's own arithmetic of blocks and padding",
    ),
    "numbers of several ranks": (moved("0.1"), "tp2", "it is in numbers of several ranks"),
    "what packed numbers stand for": (
        found(f"{DOWN}  decodes to other numbers than the fake-quantized weight in 3 of 4 places", EXPORT),
        "tp1",
        "what packed numbers and their scales stand for",
    ),
}


@pytest.mark.parametrize(("finding", "layout", "words"), UNSHOWN.values(), ids=UNSHOWN)
def test_what_no_program_shows_says_why(finding: Finding, layout: str, words: str, tmp_path: Path) -> None:
    report = report_with(tmp_path, DENSE, "fp8", finding, layout=layout)
    with pytest.raises(UsageError, match=f"no program shows this: .*{words}"):
        write_script(report, tmp_path / "show.py")


def test_logits_that_agree_show_nothing(tmp_path: Path) -> None:
    finding = found(
        "layer 0, queries is the first part that differs: by 1; the logits differ by 3e-06. Acting"
    )
    with pytest.raises(UsageError, match="the logits agree, and only the harness's comparison part by part"):
        write_script(report_with(tmp_path, DENSE, PARITY, finding), tmp_path / "show.py")


def test_a_limit_that_nothing_raised_says_so(tmp_path: Path) -> None:
    report = report_with(tmp_path, DENSE, "fp8", found("made up", EXPORT))
    words = "ModelOpt: the exporter writes no quantization config for this format"
    with pytest.raises(UsageError, match="nothing was raised, so there is nothing to show"):
        write_script(limited(report, EXPORT, words), tmp_path / "show.py")
