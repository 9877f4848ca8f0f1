"""Cases on layouts of more than one rank, each rank simulated in this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import build, rank_model
from harness.case import FIRST_RANKS, Case, CaseReport, Outcome
from harness.errors import UnknownLayout
from harness.layout import Layout
from harness.pipeline import blueprint, check
from harness.preset import preset_at
from harness.rank import Rank, ranks_named, stages
from harness.rank_model import SHAPES_ONLY
from harness.recipes import find_recipe
from harness.small_model import layout_of_plan

PRESETS = Path(__file__).parent.parent / "presets"
MOE = "Qwen/Qwen3-30B-A3B"
DENSE = "Qwen/Qwen3-0.6B"


def run(name: str, layout: str, recipe: str = "fp8", ranks: str = FIRST_RANKS) -> CaseReport:
    path = str(PRESETS / f"{name}.sh")
    return check(Case(name, path, recipe, Layout.parse(layout), "cpu", ranks=ranks))


def outcomes(report: CaseReport) -> dict[str, str]:
    return {stage.name: str(stage.outcome) for stage in report.stages}


def details(report: CaseReport) -> dict[str, str]:
    return {stage.name: stage.detail for stage in report.stages}


def numbers_in(detail: str) -> list[int]:
    """The ranks that a stage's detail speaks of: ``rank 3 of ...``, ``ranks 0-2, 5 of ...``."""
    found = []
    for text in re.findall(r"ranks? ([0-9, -]+) of ", detail):
        for part in text.split(", "):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return found


def errors(report: CaseReport) -> list[str]:
    return [finding.message for finding in report.findings if finding.is_error]


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """What torch allocates and nothing fills is no number: in memory of chance it may be one, or not."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize(
    ("name", "layout", "numbers"),
    [
        (MOE, "tp2", [0]),
        (MOE, "tp4", [0]),
        (MOE, "ep4", [0]),
        (MOE, "pp2", [0, 1]),
        pytest.param(MOE, "tp8", [0], id="two ranks share a query group"),
        pytest.param(MOE, "pp2,first30", [0, 1], id="uneven stages"),
        pytest.param("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "tp2", [0], id="hybrid"),
        pytest.param("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "tp2,pp2", [0, 2], id="hybrid in stages"),
        pytest.param("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "tp2", [0], id="latent experts"),
        pytest.param("Qwen/Qwen3-Next-80B-A3B-Instruct", "tp2", [0], id="delta nets"),
        pytest.param("deepseek-ai/DeepSeek-V2-Lite", "tp2", [0], id="latent attention"),
        pytest.param("openai/gpt-oss-20b", "tp2,etp1", [0], id="expert biases"),
    ],
)
def test_a_case_passes_at(name: str, layout: str, numbers: list[int]) -> None:
    report = run(name, layout)
    assert errors(report) == []
    assert outcomes(report) == dict.fromkeys(report.case.stages, "passed")
    seen = details(report)
    for stage in ("build", "forward", "quantize"):
        assert sorted(numbers_in(seen[stage])) == numbers
    for stage in ("forward", "quantize"):
        assert seen[stage].count(SHAPES_ONLY) == len(re.findall(r"ranks? [0-9]", seen[stage]))
    assert "relative error" not in seen["quantize"], "an error of numbers that mean nothing"


def test_the_other_ranks_are_declared_as_stood_in_for() -> None:
    assert any("process groups" in record.target for record in run(DENSE, "tp2").stand_ins)
    assert not any("process groups" in record.target for record in run(DENSE, "tp1").stand_ins)


@pytest.mark.parametrize("recipe", ["int8_smoothquant", "int4_awq", "w4a8_awq_beta", "nvfp4"])
def test_every_recipe_on_a_simulated_rank(recipe: str) -> None:
    assert errors(run(DENSE, "tp2", recipe)) == []


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        (MOE, "tp2,ep2", "ModelOpt: tp2 beside ep2 is refused"),
        ("openai/gpt-oss-20b", "tp2", "Megatron: experts with biases go with etp1 only"),
        (DENSE, "tp3", "Megatron: 16 attention heads / tp3 is not whole"),
    ],
)
def test_what_a_layout_forbids_is_said_and_not_built(name: str, layout: str, message: str) -> None:
    report = run(name, layout)
    assert report.outcome is Outcome.FAILED
    assert all(finding.stage == "audit" for finding in report.findings if finding.is_error)
    assert any(message in one for one in errors(report))
    assert {name for name, outcome in outcomes(report).items() if outcome == "skipped"} == {
        "config",
        "shrink",
        "build",
        "forward",
        "quantize",
    }


# A rank that is not as it should be


def test_a_parameter_that_is_not_split_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rank_model.rank_parameters

    def unsplit(architecture: Any, layout: Layout, rank: Rank) -> dict[str, tuple[int, ...]]:
        shapes = whole(architecture, layout, rank)
        rows, columns = shapes["output_layer.weight"]
        return shapes | {"output_layer.weight": (rows * layout.tp, columns)}

    monkeypatch.setattr(rank_model, "rank_parameters", unsplit)
    report = run(MOE, "tp2")
    assert outcomes(report)["build"] == "failed"
    (message,) = errors(report)
    assert message.startswith("output_layer  weight is ")
    assert message.endswith(" (rank 0 of tp2)")


def test_tokens_that_are_not_split_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config_of = build.transformer_config

    def without_sequence_parallel(*args: Any) -> Any:
        config = config_of(*args)
        config.sequence_parallel = False
        return config

    monkeypatch.setattr(build, "transformer_config", without_sequence_parallel)
    report = run(DENSE, "tp2")
    assert outcomes(report)["forward"] == "failed"
    first, *_ = errors(report)
    # Without sequence parallelism the embedding still stands as [batch, sequence, hidden].
    assert first.startswith("embedding.word_embeddings  output is 3 x 24 x ")
    assert "expected 12 x 3 x " in first


def test_only_the_stage_that_raised_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.gpt import GPTModel

    forward = GPTModel.forward

    def broken_last_stage(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.post_process:
            raise RuntimeError("the last stage")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPTModel, "forward", broken_last_stage)
    report = run(MOE, "pp2")
    assert outcomes(report)["forward"] == "failed"
    (message,) = errors(report)
    assert message.startswith("raised RuntimeError: the last stage") and "(rank 1 of " in message
    assert "rank 0 of tp1,pp2: 66 matrices" in details(report)["quantize"], "the first stage went on"
    assert "forward gave nothing to go on with" in details(report)["quantize"]


def test_a_quantizer_without_data_is_found_where_values_are_not_looked_at() -> None:
    from modelopt.torch.quantization.nn import TensorQuantizer

    from harness.proofs.calibration import check_amax

    def calibrated(amax: float | None) -> torch.nn.Module:
        quantizer = TensorQuantizer()
        if amax is not None:
            quantizer.amax = torch.tensor(amax)
        return torch.nn.ModuleDict({"input_quantizer": quantizer})

    missing, zero = calibrated(None), calibrated(0.0)
    fp8 = find_recipe("fp8")
    assert [len(check_amax(missing, fp8, values)) for values in (True, False)] == [1, 1]
    assert [len(check_amax(zero, fp8, values)) for values in (True, False)] == [1, 0]


# What is looked at


def test_the_first_rank_of_each_stage() -> None:
    found = ranks_named("first", Layout.parse("tp2,pp3"))
    assert [(rank.number, rank.pp, rank.tp) for rank in found] == [(0, 0, 0), (2, 1, 0), (4, 2, 0)]


@pytest.mark.parametrize(("text", "numbers"), [("all", [0, 1, 2, 3]), ("3,0", [0, 3]), ("2,2", [2])])
def test_any_ranks_are_simulated(text: str, numbers: list[int]) -> None:
    assert [rank.number for rank in ranks_named(text, Layout.parse("tp2,pp2"))] == numbers
    report = run(MOE, "tp2,pp2", ranks=text)
    assert errors(report) == []
    assert sorted(numbers_in(details(report)["quantize"])) == numbers


@pytest.mark.parametrize("text", ["4", "0,4", "-1", "1.5", "last", "", "0,"])
def test_ranks_that_are_not_there(text: str) -> None:
    with pytest.raises(UnknownLayout, match="numbers below 4 for layout tp2,pp2"):
        ranks_named(text, Layout.parse("tp2,pp2"))


def test_real_ranks_are_one_case_like_any_other() -> None:
    report = run(DENSE, "tp2", ranks="real")
    assert report.outcome is Outcome.PASSED
    assert report.case.repro.endswith("--layout tp2 --device cpu --ranks real")
    assert "ranks 0-1 of tp2" in details(report)["build"]
    assert "as tp1 to " in details(report)["forward"]
    assert not any("process groups" in record.target for record in report.stand_ins)


# Layouts that cannot be


def test_a_layout_that_cannot_be_for_a_model_is_unsupported_with_the_reason() -> None:
    report = run(DENSE, "ep2")
    assert report.outcome is Outcome.UNSUPPORTED
    assert report.reason == (
        "layout tp1,ep2 cannot be for this model: Megatron: ep2 needs experts, and the model has none"
    )
    assert report.findings == ()


def test_a_layout_that_cannot_be_hides_no_error(tmp_path: Path) -> None:
    source = (PRESETS / f"{DENSE}.sh").read_text()
    wrong = tmp_path / "Qwen" / "Qwen3-0.6B.sh"
    wrong.parent.mkdir()
    wrong.write_text(source.replace("--norm-epsilon 1e-6", "--norm-epsilon 1e-5"))
    report = check(Case(DENSE, str(wrong), "fp8", Layout.parse("ep2"), "cpu"))
    assert report.outcome is Outcome.FAILED
    assert any("norm" in finding.message for finding in report.findings if finding.is_error)


@pytest.mark.parametrize("layout", ["pp2,first30", "pp2,last3", "pp4,first1,last15", "pp3,first10"])
def test_uneven_stages_are_found_for_the_plan(layout: str) -> None:
    asked = Layout.parse(layout)
    _, plan = blueprint(preset_at(PRESETS / f"{MOE}.sh"), asked)
    assert plan is not None
    chosen = layout_of_plan(plan, asked)
    assert (chosen.first is None, chosen.last is None) == (asked.first is None, asked.last is None)
    sizes = [len(stage) for stage in stages(plan.after.num_layers, chosen)]
    assert sum(sizes) == plan.after.num_layers
    assert len(set(sizes)) > 1
