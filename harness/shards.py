"""Shards: many cases or tests -> the part of them that one machine of several runs.

Which shard something is in follows from its name, the other names and the recorded durations alone, so that
machines agree without talking, whatever order they find it in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from statistics import median

from harness.case import FIRST_RANKS, Case, CaseReport, Outcome
from harness.errors import UsageError
from harness.report import read_report


@dataclass(frozen=True, slots=True)
class Shard:
    """The ``number``-th of ``count`` parts; the first is 1. ``seconds`` are recorded durations by name."""

    number: int
    count: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``2/5`` -> the second of five. Raises UsageError."""
        match = re.fullmatch(r"\s*(\d{1,6})/(\d{1,6})\s*", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"shard {text!r} is not a number and of how many, from 1/5 to 5/5")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, names: Iterable[str]) -> set[str]:
        """The names that are in this shard."""
        shards = divide(names, self.count, self.seconds)
        return {name for name, number in shards.items() if number == self.number}


def shard_named(text: str | None, report: str | None) -> Shard | None:
    """The shard of this text, balanced by the durations of a report; None where none is asked for.

    Raises UsageError and ReportError.
    """
    if text is None:
        if report is not None:
            raise UsageError("--shard-durations balances shards: say which one with --shard")
        return None
    shard = Shard.parse(text)
    return replace(shard, seconds=recorded_seconds(read_report(Path(report)))) if report else shard


def divide(names: Iterable[str], count: int, seconds: Mapping[str, float]) -> dict[str, int]:
    """Each name's shard of ``count``, from 1, so that all take about as long.

    ``seconds`` are recorded durations; a name without one is taken to last as long as the median of those
    that have one. The longest goes first, always to the shard that has least to do.
    """
    names = set(names)
    known = [seconds[name] for name in names if name in seconds]
    usual = median(known) if known else 1.0
    # By hash, as neighbours are alike: every fourth case of a catalogue is of one recipe.
    digests = {name: sha256(name.encode(errors="surrogatepass")).digest() for name in names}
    order = sorted(names, key=lambda name: (-seconds.get(name, usual), digests[name]))
    loads = [(0.0, 0, number) for number in range(1, count + 1)]
    shards = {}
    for name in order:
        load, members, number = min(loads)
        shards[name] = number
        loads[number - 1] = (load + seconds.get(name, usual), members + 1, number)
    return shards


def duration_name(case: Case) -> str:
    """What a case is called in a record of durations, which serves any device and place of the presets."""
    ranks = "" if case.ranks == FIRST_RANKS else f"-{case.ranks}"
    proofs = f"-{','.join(case.prove)}" if case.prove else ""
    return f"{case.preset}-{case.recipe}-{case.layout}{ranks}{proofs}"


def recorded_seconds(reports: Sequence[CaseReport]) -> dict[str, float]:
    """The duration of each case of a report that ran to its end."""
    return {
        duration_name(report.case): report.seconds
        for report in reports
        if report.outcome not in (Outcome.SKIPPED, Outcome.ERROR)
    }


def cases_of_shard(cases: Sequence[Case], shard: Shard) -> tuple[Case, ...]:
    """The cases that this shard runs, in their order. Raises UsageError where there is none."""
    kept = shard.of(map(duration_name, cases))
    if not kept:
        raise UsageError(f"shard {shard} is empty: there are fewer cases than shards ({len(cases)})")
    return tuple(case for case in cases if duration_name(case) in kept)
