"""Case: preset x recipe x layout x device, and the report of one.

Plain records, no torch: they cross process boundaries and become JSON (``report.py``).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from enum import StrEnum

from harness.finding import Finding
from harness.layout import Layout
from harness.shrink.invariants import Invariant

STAGES = ("parse", "reference", "audit", "config", "shrink", "build", "forward", "quantize", "parity")

# In the place of a recipe: the case that compares a preset's model with the published one's, once a preset.
PARITY = "parity"

# The check that exactly what a recipe means is quantized.
COVERAGE = "coverage"
# The check that what ModelOpt exports is the published checkpoint in the recipe's formats.
EXPORT = "export"
# Checks of a quantized model that cost more than quantizing it, and are made where they are asked for.
PROOFS = ("state", "weights", "backward", EXPORT)


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"  # the preset, or the model it describes, is wrong
    SKIPPED = "skipped"  # always with a reason
    UNSUPPORTED = "unsupported"  # nothing is wrong with the preset: ModelOpt or Megatron cannot do this
    ERROR = "error"  # the harness itself failed


# How the ranks of a layout of more than one are run, beside the names of ``rank.ranks_named``.
REAL, FIRST_RANKS = "real", "first"


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to check. ``path`` is the preset file, ``presets`` its tree where it is not the default.

    ``recipe`` is a recipe's name, or ``PARITY``, which quantizes nothing and has one rank.
    ``ranks`` are those of the layout that are simulated (``rank.ranks_named``), or ``real`` for a process
    each. ``prove`` are those of ``PROOFS`` that are asked for.
    """

    preset: str
    path: str
    recipe: str
    layout: Layout
    device: str
    presets: str | None = None
    ranks: str = FIRST_RANKS
    prove: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        ranks = "" if self.ranks == FIRST_RANKS else f"-{self.ranks}"
        return f"{self.preset}-{self.recipe}-{self.layout}{ranks}-{self.device}"

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that it goes through, in order."""
        if self.recipe == PARITY:
            return tuple(stage for stage in STAGES if stage not in ("build", "forward", "quantize"))
        return STAGES if EXPORT in self.prove else STAGES[:-1]

    @property
    def repro(self) -> str:
        """The command line that runs this case again."""
        words = ["harness", "check", self.preset, "--recipe", self.recipe]
        words += ["--layout", str(self.layout), "--device", self.device]
        words += [] if self.ranks == FIRST_RANKS else ["--ranks", self.ranks]
        words += ["--prove", ",".join(self.prove)] if self.prove else []
        return shlex.join([*words, *(["--presets", self.presets] if self.presets else [])])


@dataclass(frozen=True, slots=True)
class Check:
    """One named check of a stage. ``detail`` says what was looked at, or whose limit it is and its words."""

    name: str
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of one case. ``detail`` says what was seen, or why it was skipped.

    ``checks`` are those with a name, in the order they were made; a stage may find more than they do.
    """

    name: str
    outcome: Outcome
    seconds: float
    detail: str = ""
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, slots=True)
class StandInReport:
    """Something this machine lacks, and what took its place."""

    target: str
    replacement: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShrinkReport:
    """Sizes before and after by Megatron's argument names, parameter counts, and the invariants."""

    before: dict[str, object]
    after: dict[str, object]
    invariants: tuple[Invariant, ...]


@dataclass(frozen=True, slots=True)
class Size:
    """One size and the flag that makes it; ``small`` is the tiny model's, where that is built and another.

    ``published`` is None where it is the same, or not known.
    """

    flag: str
    line: int | None
    value: str
    small: str | None = None
    published: str | None = None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first module where shapes part: what it has, takes and gives, in words, with what was expected
    beside it; and the sizes around it. In shapes, ``s`` counts the tokens of a sequence and ``b`` sequences.
    """

    module: str
    shapes: tuple[tuple[str, str], ...]
    sizes: tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class CaseReport:
    """What happened to one case.

    ``reason`` says why it was skipped, whose limit it is that it is unsupported and in which words, or what
    the harness failed on.

    ``log`` is what Megatron and ModelOpt printed, kept for a case that did not pass; ``mismatch`` the first
    module whose shapes are wrong, where some are.
    """

    case: Case
    outcome: Outcome
    seconds: float
    stages: tuple[StageReport, ...] = ()
    findings: tuple[Finding, ...] = ()
    stand_ins: tuple[StandInReport, ...] = ()
    shrink: ShrinkReport | None = None
    reason: str = ""
    log: str = ""
    mismatch: Mismatch | None = None
