"""Layout: the parallel sizes of one run (``tp8,ep4,etp1,pp2``) and the ranks they make.

The words are Megatron's: tensor, pipeline, expert, expert-tensor and context parallel sizes. A
layout is an axis of a case; what each size must divide is checked where the dimensions are known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from math import lcm

from harness.errors import UnknownLayout

_TERM = re.compile(r"(etp|tp|pp|ep|cp|first|last)([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Layout:
    """Parallel sizes, all at least one.

    ``etp`` is the tensor parallel size of the experts; Megatron-LM's ModelOpt scripts set it to
    ``tp`` unless told otherwise, and so does ``parse``. ``first`` and ``last`` are the layers of an
    uneven first and last pipeline stage (``--decoder-first-pipeline-num-layers``), None where all
    stages are even.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if size is not None and size < 1:
                raise UnknownLayout(f"layout size {field.name}{size} is not at least 1")
        if self.pp == 1 and (self.first or self.last):
            raise UnknownLayout("an uneven first or last stage needs at least two pipeline stages (pp2)")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read ``tp2`` or ``tp8,ep4,etp1,pp2``; sizes left out are one. Raises UnknownLayout."""
        sizes: dict[str, int] = {}
        for term in text.lower().split(","):
            match = _TERM.fullmatch(term.strip())
            if match is None:
                raise UnknownLayout(
                    f"layout {text!r}: {term.strip()!r} is not a size; write tp, pp, ep, etp or cp and a "
                    "number, separated by commas, as in tp8,ep4,etp1,pp2 or pp2,first20"
                )
            name, size = match.group(1), int(match.group(2))
            if name in sizes:
                raise UnknownLayout(f"layout {text!r}: {name} is given twice")
            sizes[name] = size
        sizes.setdefault("etp", sizes.get("tp", 1))
        return cls(**sizes)

    @property
    def world_size(self) -> int:
        """The fewest ranks of the layout: dense and expert layers split the same ranks, each in its way."""
        return self.pp * lcm(self.tp * self.cp, self.etp * self.ep)

    def __str__(self) -> str:
        """The shortest text that ``parse`` reads back, ``tp`` always named."""
        parts = [f"tp{self.tp}"]
        defaults = {"pp": 1, "first": None, "last": None, "ep": 1, "etp": self.tp, "cp": 1}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                parts.append(f"{name}{getattr(self, name)}")
        return ",".join(parts)
