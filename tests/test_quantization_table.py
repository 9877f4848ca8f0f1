"""The table of outcomes: what it holds, that it is current, and a part of it run again."""

from __future__ import annotations

import copy
import hashlib
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.case import Case, CaseReport, Outcome
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.pipeline import check, full_size
from harness.preset import discover
from harness.recipes import config_names
from harness.report import to_json

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import quantization  # noqa: E402
from quantization import PACKAGES, TABLE, Cell, Cells, cell_of, gathered, read, written  # noqa: E402

CPU, CUDA = "cpu, tp1", "cuda, tp1"
FILES = {file.name: file for file in discover(ROOT / "presets")}
# Recipes of one preset of each kind that are run again.
EACH = 2


def order(*words: str) -> str:
    """The same everywhere and always, and like a draw."""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def sample() -> list[tuple[str, str]]:
    """(preset, recipe) of what is run again: of the smallest model of each kind, and of each reason one."""
    sizes: dict[str, int] = {}
    kinds: dict[Any, list[str]] = {}
    for file in FILES.values():
        full = full_size(file)
        assert full is not None, file.name
        layers = frozenset((type(layer.mixer), type(layer.mlp)) for layer in full.layers)
        kinds.setdefault(layers, []).append(file.name)
        sizes[file.name] = full.moe.num_experts if full.moe else 0
    places = [
        (preset, recipe)
        for presets in kinds.values()
        for preset in sorted(presets, key=lambda preset: (sizes[preset], order(preset)))[:1]
        for recipe in sorted(config_names(), key=lambda recipe: order(preset, recipe))[:EACH]
    ]
    reasons: dict[Any, list[tuple[str, str]]] = {}
    if TABLE.is_file():
        for place, cell in read(TABLE.read_text(encoding="utf-8"))[1][CPU].items():
            if cell.outcome is not Outcome.PASSED and place[0] in FILES:
                reasons.setdefault(cell.key, []).append(place)
    places += [min(each, key=lambda place: (sizes[place[0]], order(*place))) for each in reasons.values()]
    return list(dict.fromkeys(places))


@pytest.fixture(scope="module")
def tables() -> dict[str, Cells]:
    """By device and layout."""
    assert TABLE.is_file(), f"{TABLE} is missing: make it with tests/benchmarks/quantization.py"
    return read(TABLE.read_text(encoding="utf-8"))[1]


def test_every_preset_and_every_recipe_is_in_it(tables: dict[str, Cells]) -> None:
    assert set(tables) == {CPU, CUDA}
    for table in tables.values():
        assert set(table) == {(preset, recipe) for preset in FILES for recipe in config_names()}


def test_versions_are_those_installed() -> None:
    """Of torch any: what quantizes follows from the other two."""
    versions, cells = read(TABLE.read_text(encoding="utf-8"))
    assert set(versions) == set(cells)
    for found in versions.values():
        assert set(found) == set(PACKAGES)
        for name in set(PACKAGES) - {"torch"}:
            assert found[name] == metadata.version(name)


def test_nothing_fails_and_nothing_is_without_a_reason(tables: dict[str, Cells]) -> None:
    cells = {(title, *place): cell for title, table in tables.items() for place, cell in table.items()}
    assert [place for place, cell in cells.items() if cell.outcome in (Outcome.FAILED, Outcome.ERROR)] == []
    assert all(cell.reason for cell in cells.values() if cell.outcome is not Outcome.PASSED)


@pytest.mark.parametrize(("preset", "recipe"), sample())
def test_a_part_of_it_runs_as_it_says(preset: str, recipe: str, tables: dict[str, Cells]) -> None:
    found = cell_of(check(Case(preset, str(FILES[preset].path), recipe, Layout(), "cpu")))
    assert found.key == tables[CPU][preset, recipe].key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")
@pytest.mark.parametrize(("preset", "recipe"), sample())
def test_a_part_of_it_runs_on_a_gpu_as_it_says(preset: str, recipe: str, tables: dict[str, Cells]) -> None:
    found = cell_of(check(Case(preset, str(FILES[preset].path), recipe, Layout(), "cuda:0")))
    assert found.key == tables[CUDA][preset, recipe].key


# The text itself


def reports() -> list[CaseReport]:
    def of(preset: str, recipe: str, outcome: Outcome, reason: str = "", *findings: Finding) -> CaseReport:
        return CaseReport(
            Case(preset, "p.sh", recipe, Layout(), "cpu"), outcome, 1.0, (), findings, reason=reason
        )

    wrong = Finding("quantize", Severity.ERROR, "linear_fc1  amax is 0 | *never*")
    return [
        of("A/one", "fp8", Outcome.PASSED),
        of("A/two", "fp8", Outcome.PASSED),
        of("b/three", "fp8", Outcome.PASSED),
        of("A/one", "nvfp4", Outcome.UNSUPPORTED, "modelopt: size 3 is not 12\nmore"),
        of("A/two", "nvfp4", Outcome.UNSUPPORTED, "modelopt: size 4 is not 16"),
        of("b/three", "nvfp4", Outcome.FAILED, "", wrong),
        of("A/one", "mxfp8", Outcome.PASSED),
        of("A/two", "mxfp8", Outcome.PASSED),
        of("b/three", "mxfp8", Outcome.PASSED),
    ]


ENVIRONMENT = {"packages": dict.fromkeys(PACKAGES, "1.2")}
TEXT = """\
## cpu, tp1

9 cases: 6 passed, 1 failed, 2 unsupported.

| recipe | P1 | P2 |
| --- | --- | --- |
| fp8, mxfp8 | ok | ok |
| nvfp4 | U1 | F1 |

| column | presets |
| --- | --- |
| P1 | A/one, A/two |
| P2 | b/three |

## Reasons

|  |  | why |
| --- | --- | --- |
| U1 | unsupported | modelopt: size 3 is not 12 |
| F1 | failed | linear_fc1 amax is 0 \\| \\*never\\* |
"""


def test_text() -> None:
    text = written(*gathered([to_json(reports(), ENVIRONMENT)]))
    assert text.endswith(TEXT)
    assert "| nvidia-modelopt | 1.2 |" in text


def test_text_and_back() -> None:
    versions, found = gathered([to_json(reports(), ENVIRONMENT)])
    again, cells = read(written(versions, found))
    assert again == versions
    assert {place: cell.key for place, cell in cells[CPU].items()} == {
        place: cell.key for place, cell in found[CPU].items()
    }


def test_a_table_that_says_otherwise_is_seen() -> None:
    _, found = gathered([to_json(reports(), ENVIRONMENT)])
    assert found[CPU]["A/one", "nvfp4"].key == Cell(Outcome.UNSUPPORTED, "modelopt: size 5 is not 20").key
    assert found[CPU]["A/one", "nvfp4"].key != Cell(Outcome.UNSUPPORTED, "modelopt: shape 5 is not 20").key
    assert found[CPU]["A/one", "nvfp4"].key != Cell(Outcome.FAILED, "modelopt: size 3 is not 12").key


def test_several_reports_are_one_table() -> None:
    half = len(reports()) // 2
    documents = [to_json(part, ENVIRONMENT) for part in (reports()[:half], reports()[half:])]
    assert gathered(documents) == gathered([to_json(reports(), ENVIRONMENT)])


def test_a_missing_case_is_an_error() -> None:
    with pytest.raises(ValueError, match="no result of 1 cases: A/one fp8"):
        gathered([to_json(reports()[1:], ENVIRONMENT)])


def test_two_outcomes_of_a_case_are_an_error() -> None:
    other = CaseReport(Case("A/one", "p.sh", "fp8", Layout(), "cpu"), Outcome.SKIPPED, 1.0, reason="no")
    with pytest.raises(ValueError, match=r"A/one-fp8-tp1-cpu is .*passed.* and .*skipped"):
        gathered([to_json([*reports(), other], ENVIRONMENT)])


def test_other_versions_are_an_error() -> None:
    other = copy.deepcopy(ENVIRONMENT)
    other["packages"]["torch"] = "1.3"
    with pytest.raises(ValueError, match=r"reports of torch 1\.2 and 1\.3"):
        gathered([to_json(reports(), ENVIRONMENT), to_json(reports(), other)])


def test_each_device_has_versions_of_its_own() -> None:
    on_gpu = [replace(report, case=replace(report.case, device="cuda:0")) for report in reports()]
    other = copy.deepcopy(ENVIRONMENT)
    other["packages"]["torch"] = "1.3"
    versions, found = gathered([to_json(reports(), ENVIRONMENT), to_json(on_gpu, other)])
    text = written(versions, found)
    assert "| package | cpu, tp1 | cuda, tp1 |\n| --- | --- | --- |\n| torch | 1.2 | 1.3 |\n" in text
    again, cells = read(text)
    assert again == versions
    assert {title: set(table) for title, table in cells.items()} == {
        title: set(table) for title, table in found.items()
    }


def test_no_reason_is_an_error() -> None:
    with pytest.raises(ValueError, match="is skipped without a reason"):
        cell_of(CaseReport(Case("A/one", "p.sh", "fp8", Layout(), "cpu"), Outcome.SKIPPED, 1.0))


def test_a_text_that_is_no_table() -> None:
    with pytest.raises(ValueError, match="no table of outcomes"):
        read("# What quantizes\n")


def test_the_command(tmp_path: Path) -> None:
    import json

    report, target = tmp_path / "report.json", tmp_path / "TABLE.md"
    report.write_text(json.dumps(to_json(reports(), ENVIRONMENT)))
    quantization.main([str(report), "--to", str(target)])
    assert target.read_text().endswith(TEXT)
