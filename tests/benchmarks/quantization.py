"""Outcomes: ``python tests/benchmarks/quantization.py REPORT...`` -> ``presets/QUANTIZATION.md``.

The reports are those of ``harness check --recipe all --json REPORT``, of which every preset must have every
recipe: what is missing is an error, never an empty cell. Recipes of which all cells agree share a row, and
presets a column. ``read`` gets the outcomes back out of the text, for the test that runs some of them again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.case import CaseReport, Outcome
from harness.messages import distinct_errors
from harness.report import from_json

ROOT = Path(__file__).parent.parent.parent
TABLE = ROOT / "presets" / "QUANTIZATION.md"
PACKAGES = ("torch", "megatron-core", "nvidia-modelopt")

_LETTERS = {Outcome.UNSUPPORTED: "U", Outcome.SKIPPED: "S", Outcome.FAILED: "F", Outcome.ERROR: "E"}
_WORDS = {"U": "unsupported", "S": "skipped", "F": "failed", "E": "the harness failed"}
_NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?")
_INTRODUCTION = """\
# What quantizes

Every preset with every recipe that ModelOpt offers, shrunken: built, run, quantized, run again, and
proved. `ok` means passed. `U` is a limit of ModelOpt's or Megatron's, whatever the preset; `S` was skipped;
`F` failed. The reasons are below; of those that differ in nothing but numbers, the first.

Made by `harness check --recipe all --json REPORT`, with `--device cpu` and with `--device cuda`, and
`python tests/benchmarks/quantization.py REPORT...`; `tests/test_quantization_table.py` runs a part of each
again, on what devices there are.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """How one case ended: an outcome and, but for a passed one, why, on one line."""

    outcome: Outcome
    reason: str = ""

    @property
    def key(self) -> tuple[Outcome, str]:
        """Equal for what differs only in numbers."""
        return self.outcome, _NUMBER.sub("#", self.reason)


# By preset and recipe.
Cells = dict[tuple[str, str], Cell]
# By device and layout, as ``cpu, tp1``: of each of PACKAGES.
Versions = Mapping[str, Mapping[str, str]]


def cell_of(report: CaseReport) -> Cell:
    if report.outcome is Outcome.PASSED:
        return Cell(Outcome.PASSED)
    errors = distinct_errors(report)
    said = report.reason or (errors[0].message if errors else "")
    line = " ".join(said.splitlines()[0].split()) if said else ""
    if not line:
        raise ValueError(f"{report.case.name} is {report.outcome} without a reason")
    return Cell(report.outcome, line)


def gathered(documents: Iterable[Any]) -> tuple[Versions, dict[str, Cells]]:
    """Versions and cells, by device and layout.

    Raises ValueError for versions that differ at one of these, for a case that ended in two ways, and for
    one that is missing where its preset and its recipe are not.
    """
    versions: dict[str, dict[str, str]] = {}
    found: dict[str, Cells] = {}
    for document in documents:
        packages = {name: str(document["environment"]["packages"][name]) for name in PACKAGES}
        for report in from_json(document):
            case, cell = report.case, cell_of(report)
            title = f"{case.device.partition(':')[0]}, {case.layout}"
            cells, known = found.setdefault(title, {}), versions.setdefault(title, packages)
            for name in PACKAGES:
                if known[name] != packages[name]:
                    raise ValueError(f"{title}: reports of {name} {known[name]} and {packages[name]}")
            if cells.setdefault((case.preset, case.recipe), cell).key != cell.key:
                raise ValueError(f"{case.name} is {cells[case.preset, case.recipe]} and {cell}")
    for title, cells in found.items():
        presets, recipes = _names(cells)
        missing = [f"{p} {r}" for p in presets for r in recipes if (p, r) not in cells]
        if missing:
            raise ValueError(f"{title}: no result of {len(missing)} cases: {', '.join(missing[:3])}")
    return versions, found


def _names(cells: Cells) -> tuple[list[str], list[str]]:
    presets, recipes = ({key[index] for key in cells} for index in (0, 1))
    return sorted(presets, key=str.lower), sorted(recipes)


def written(versions: Versions, found: Mapping[str, Cells]) -> str:
    """The whole document."""
    rows = [[name, *(versions[title][name] for title in found)] for name in PACKAGES]
    blocks = [_INTRODUCTION, _table(["package", *found], rows)]
    labels: dict[tuple[Outcome, str], str] = {}
    reasons: dict[str, str] = {}
    for title, cells in found.items():
        presets, recipes = _names(cells)
        for place in sorted(cells, key=lambda place: (place[1], place[0].lower())):
            cell = cells[place]
            if cell.outcome is not Outcome.PASSED and cell.key not in labels:
                letter = _LETTERS[cell.outcome]
                label = f"{letter}{sum(each[0] == letter for each in reasons) + 1}"
                labels[cell.key], reasons[label] = label, cell.reason
        word = {place: labels.get(cell.key, "ok") for place, cell in cells.items()}
        columns = _alike({preset: tuple(word[preset, each] for each in recipes) for preset in presets})
        rows = _alike({recipe: tuple(word[each, recipe] for each in presets) for recipe in recipes})
        header = ["recipe", *(f"P{index}" for index in range(1, len(columns) + 1))]
        lines = [[", ".join(row), *(word[column[0], row[0]] for column in columns)] for row in rows]
        legend = [[label, ", ".join(column)] for label, column in zip(header[1:], columns, strict=True)]
        counts = {each: sum(each == cell.outcome for cell in cells.values()) for each in Outcome}
        said = ", ".join(f"{count} {each}" for each, count in counts.items() if count)
        blocks += [f"## {title}\n\n{len(cells)} cases: {said}.\n"]
        blocks += [_table(header, lines), _table(["column", "presets"], legend)]
    if reasons:
        lines = [[label, _WORDS[label[0]], _escaped(why)] for label, why in reasons.items()]
        blocks += ["## Reasons\n", _table(["", "", "why"], lines)]
    return "\n".join(blocks)


def _alike(contents: Mapping[str, Any]) -> list[list[str]]:
    """The names in groups of the same content."""
    groups: dict[Any, list[str]] = {}
    for name, content in contents.items():
        groups.setdefault(content, []).append(name)
    return list(groups.values())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def read(text: str) -> tuple[Versions, dict[str, Cells]]:
    """What ``written`` was given, but for numbers in reasons. Raises ValueError for any other text."""
    tables: dict[str, list[list[list[str]]]] = {"": []}
    title, inside = "", False
    for line in text.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
            tables[title] = []
        is_row = line.startswith("| ")
        if is_row and not inside:
            tables[title].append([])
        if is_row:
            tables[title][-1].append(re.split(r" (?<!\\)\| ", line[2:].removesuffix(" |")))
        inside = is_row
    reasons = {row[0]: _unescaped(row[2]) for table in tables.pop("Reasons", []) for row in table[2:]}
    outcomes = {letter: outcome for outcome, letter in _LETTERS.items()}
    found: dict[str, Cells] = {}
    try:
        (_, *titles), _, *lines = tables.pop("")[0]
        versions = {title: {row[0]: row[at] for row in lines} for at, title in enumerate(titles, 1)}
        for title, (matrix, legend) in tables.items():
            presets = {row[0]: row[1].split(", ") for row in legend[2:]}
            for names, *words in matrix[2:]:
                for label, word in zip(matrix[0][1:], words, strict=True):
                    cell = Cell(Outcome.PASSED) if word == "ok" else Cell(outcomes[word[0]], reasons[word])
                    for preset in presets[label]:
                        for recipe in names.split(", "):
                            found.setdefault(title, {})[preset, recipe] = cell
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"no table of outcomes: {error!r}") from error
    return versions, found


def main(arguments: Sequence[str]) -> None:
    """Reports, and ``--to FILE`` for another place than ``presets/QUANTIZATION.md``."""
    paths, target = list(arguments), TABLE
    if "--to" in paths:
        index = paths.index("--to")
        target = Path(paths[index + 1])
        del paths[index : index + 2]
    if not paths:
        raise SystemExit(__doc__)
    documents = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    text = written(*gathered(documents))
    target.write_text(text, encoding="utf-8")
    print(f"{target}: {len(text):,} characters")


if __name__ == "__main__":
    main(sys.argv[1:])
