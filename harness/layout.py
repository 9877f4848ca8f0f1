"""Layout: the parallel sizes of one run (``tp8,ep4,etp1,pp2``) and the ranks they make.

The words are Megatron's: tensor, pipeline, expert, expert-tensor and context parallel sizes. A
layout is an axis of a case; what each size must divide is checked where the dimensions are known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from harness.errors import UnknownLayout

_TERM = re.compile(r"(etp|tp|pp|ep|cp)([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Layout:
    """Parallel sizes, all at least one.

    ``etp`` is the tensor parallel size of the experts; Megatron-LM's ModelOpt scripts set it to
    ``tp`` unless told otherwise, and so does ``parse``.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise UnknownLayout(f"layout size {field.name}{getattr(self, field.name)} is not at least 1")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read ``tp2`` or ``tp8,ep4,etp1,pp2``; sizes left out are one. Raises UnknownLayout."""
        sizes: dict[str, int] = {}
        for term in text.lower().split(","):
            match = _TERM.fullmatch(term.strip())
            if match is None:
                raise UnknownLayout(
                    f"layout {text!r}: {term.strip()!r} is not a size; write tp, pp, ep, etp or cp and a "
                    "number, separated by commas, as in tp8,ep4,etp1,pp2"
                )
            name, size = match.group(1), int(match.group(2))
            if name in sizes:
                raise UnknownLayout(f"layout {text!r}: {name} is given twice")
            sizes[name] = size
        sizes.setdefault("etp", sizes.get("tp", 1))
        return cls(**sizes)

    @property
    def world_size(self) -> int:
        """Ranks that the layout needs at least: dense and expert layers share the same ranks."""
        dense, expert = self.tp * self.cp, self.etp * self.ep
        return self.pp * max(dense, expert)

    def __str__(self) -> str:
        """The shortest text that ``parse`` reads back, ``tp`` always named."""
        parts = [f"tp{self.tp}"]
        for name, default in (("pp", 1), ("ep", 1), ("etp", self.tp), ("cp", 1)):
            if getattr(self, name) != default:
                parts.append(f"{name}{getattr(self, name)}")
        return ",".join(parts)
