"""Reduction: a case that fails -> the smallest set of flags that, changed back to the reference, makes it
pass.

Every trial is the case itself, of a preset with some flags changed back. What parse, reference and audit
refuse already is not built, so most trials take milliseconds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.case import PARITY, Case, CaseReport, Outcome
from harness.finding import has_errors
from harness.messages import what_happened
from harness.pipeline import check, lint
from harness.preset import PresetFile
from harness.recipes import find_recipe
from harness.reproduction.changes import Change, Differences, differences

Chosen = tuple[int, ...]

# Up to so many flags every set is tried, smallest first; beyond, sets are halved (``_halved``).
_EVERY_SET = 8
# The stages that need torch; a failure in one of them is looked at by itself.
_HEAVY = ("config", "shrink", "build", "forward", "quantize", "parity")
_GOOD = (Outcome.PASSED, Outcome.UNSUPPORTED, Outcome.SKIPPED)


@dataclass(frozen=True, slots=True)
class Reduction:
    """What came of it. ``found`` is None where no set makes the case pass, and ``rest`` says what then fails.

    ``stage`` is the last that failed, and ``of_stage`` the smallest set that makes it pass whatever is left
    wrong; empty where that is the same set. ``whole`` says that no smaller set would do as well.
    """

    case: Case
    differences: Differences
    found: tuple[Change, ...] | None
    outcome: Outcome | None
    rest: str
    stage: str
    of_stage: tuple[Change, ...]
    whole: bool
    trials: int
    built: int


def reduce(report: CaseReport, run: Callable[[Case], CaseReport] = check) -> Reduction:
    """The smallest set for a case that did not pass. ``run`` makes one trial. Raises UsageError."""
    known = differences(report.case)
    with _trials(report.case, known, run) as trials:
        every = tuple(range(len(known.changes)))
        stage = next((s.name for s in reversed(report.stages) if s.outcome is Outcome.FAILED), "")
        if not every or not trials.passes(every):
            last = trials.report(every) if every else report
            return trials.result(None, last.outcome, what_happened(last), stage, ())
        found = _smallest(every, trials.passes)
        of_stage: Chosen = ()
        if stage in _HEAVY and len(found) > 1:
            alone = _smallest(found, lambda chosen: trials.gets_past(chosen, stage))
            of_stage = alone if len(alone) < len(found) else ()
        return trials.result(found, trials.report(found).outcome, "", stage, of_stage)


def _smallest(every: Chosen, good: Callable[[Chosen], bool]) -> Chosen:
    """A smallest good subset of ``every``, which is good; of many flags, one from which none can go."""
    if len(every) > _EVERY_SET:
        return _halved(every, good)
    sizes = range(1, len(every))
    return next((s for size in sizes for s in combinations(every, size) if good(s)), every)


def _halved(every: Chosen, good: Callable[[Chosen], bool]) -> Chosen:
    """Delta debugging (Zeller and Hildebrandt, 2002): parts are left out while what stays is good."""
    parts = 2
    while len(every) >= 2:
        step = -(-len(every) // parts)
        blocks = [every[start : start + step] for start in range(0, len(every), step)]
        rests = [tuple(one for one in every if one not in block) for block in blocks]
        smaller = next((s for s in (*blocks, *rests) if len(s) < len(every) and s and good(s)), None)
        if smaller is not None:
            every, parts = smaller, 2 if smaller in blocks else max(parts - 1, 2)
        elif parts >= len(every):
            break
        else:
            parts = min(2 * parts, len(every))
    return every


@contextmanager
def _trials(case: Case, known: Differences, run: Callable[[Case], CaseReport]) -> Iterator[_Trials]:
    with TemporaryDirectory() as folder:
        yield _Trials(case, known, run, Path(folder))


class _Trials:
    """The trials of one reduction, each made once; their presets stand in ``folder``."""

    def __init__(
        self, case: Case, known: Differences, run: Callable[[Case], CaseReport], folder: Path
    ) -> None:
        self._case, self._known, self._run = case, known, run
        self._recipe = None if case.recipe == PARITY else find_recipe(case.recipe)
        # As deep below the root as the original, since a name is the last two parts of a path.
        self._path = folder / Path(case.path).parent.name / Path(case.path).name
        self._path.parent.mkdir()
        if known.facts is not None:
            shutil.copy(known.facts, self._path.parent)
        self._linted: dict[Chosen, bool] = {}
        self._reports: dict[Chosen, CaseReport] = {}

    def passes(self, chosen: Chosen) -> bool:
        return self._clean(chosen) and self.report(chosen).outcome in _GOOD

    def gets_past(self, chosen: Chosen, stage: str) -> bool:
        """Whether ``stage`` runs and does not fail, whatever the others say."""
        outcomes = {entry.name: entry.outcome for entry in self.report(chosen).stages}
        return outcomes.get(stage) in (Outcome.PASSED, Outcome.UNSUPPORTED)

    def report(self, chosen: Chosen) -> CaseReport:
        if chosen not in self._reports:
            self._write(chosen)
            self._reports[chosen] = self._run(replace(self._case, path=str(self._path)))
        return self._reports[chosen]

    def result(
        self, found: Chosen | None, outcome: Outcome | None, rest: str, stage: str, of_stage: Chosen
    ) -> Reduction:
        changes = self._known.changes
        return Reduction(
            self._case,
            self._known,
            None if found is None else tuple(changes[index] for index in found),
            outcome,
            rest,
            stage,
            tuple(changes[index] for index in of_stage),
            len(changes) <= _EVERY_SET,
            len(self._linted.keys() | self._reports.keys()),
            len(self._reports),
        )

    def _clean(self, chosen: Chosen) -> bool:
        if chosen not in self._linted:
            self._write(chosen)
            found = lint(PresetFile(self._case.preset, self._path), self._case.layout, self._recipe).findings
            self._linted[chosen] = not has_errors(found)
        return self._linted[chosen]

    def _write(self, chosen: Chosen) -> None:
        words = self._known.with_changes(self._known.changes[index] for index in chosen)
        self._path.write_text(preset_text(words))


def preset_text(words: Sequence[str]) -> str:
    """A preset of these words and nothing else."""
    lines = "".join(f"    {_escaped(word)} \\\n" for word in words)
    return f'MODEL_ARGS=" \\\n{lines}"\n'


def _escaped(word: str) -> str:
    return "".join(f"\\{letter}" if letter in '\\"$`' else letter for letter in word)


def reduction_text(reduction: Reduction) -> str:
    """The set with lines and values, or why there is none."""
    return "\n".join(_lines(reduction))


def _lines(reduction: Reduction) -> Iterator[str]:
    path, known = reduction.case.path, reduction.differences
    if not known.references:
        yield "reduce: there is no reference: nothing published stands beside the preset, and the catalogue"
        yield "  has no preset of its name"
        return
    against = " and ".join(known.references)
    if not known.changes:
        yield f"reduce: no flag differs from {against}, so none can be changed back"
        return
    counted = f"{_flags(len(known.changes))} of {against}"
    if reduction.found is None:
        yield f"reduce: with all that differ changed back ({counted}) the case still does not pass:"
        yield f"  {reduction.rest}"
        yield from (f"  {change.text(path)}" for change in known.changes)
        return
    smallest = "the smallest set" if reduction.whole else "a set from which no flag can be left out"
    yield (
        f"reduce: {smallest} that makes the case pass, {len(reduction.found)} of {counted} that differ "
        f"(trials: {reduction.trials}, built: {reduction.built}):"
    )
    yield from (f"  {change.text(path)}" for change in reduction.found)
    if reduction.outcome is not Outcome.PASSED:
        yield f"  the case is then {reduction.outcome}"
    if reduction.of_stage:
        yield f"{reduction.stage} passes with no more than:"
        yield from (f"  {change.text(path)}" for change in reduction.of_stage)


def _flags(count: int) -> str:
    return f"{count} flag{'' if count == 1 else 's'}"
