"""Shape trace: what went into and came out of every module of a pass, in order -> the text that shows it.

Where arithmetic expected another shape, that one stands beside it. The first such line is where to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.messages import aligned

if TYPE_CHECKING:
    from harness.activations import ModuleShapes
    from harness.trace import Event, Trace

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of one rank: the stage it belongs to, what was expected and what happened.

    ``expected`` has the modules whose shapes follow from the architecture alone, by path.
    """

    stage: str
    expected: Mapping[str, ModuleShapes]
    trace: Trace


def trace_text(seen: Pass) -> str:
    """A line for each side of each module, expected shapes beside those that are others."""
    lines = aligned(("module", "side", "shapes", ""), list(_rows(seen)))
    ended = "" if seen.trace.finished else _stopped(seen.trace.stopped_in)
    title = f"{seen.stage}: every module in the order of the run"
    return "\n".join([title, *(f"  {line}" for line in lines), *([f"  {ended}"] if ended else [])])


def _stopped(module: str | None) -> str:
    return f"raised inside {module}" if module else "raised outside of every module"


def _rows(seen: Pass) -> Iterator[tuple[str, str, str, str]]:
    for event in seen.trace.events:
        wanted = _wanted(seen.expected, event)
        parted = [
            (index, shape)
            for index, shape in enumerate(wanted)
            if index >= len(event.shapes) or event.shapes[index] != shape
        ]
        note = ", ".join(
            by(shape) if len(wanted) == 1 else f"{by(shape)} as number {index}" for index, shape in parted
        )
        shapes = ", ".join(map(by, event.shapes)) or "no tensor"
        yield event.module, _SIDES[event.side], shapes, f"<-- expected {note}" if note else ""


_SIDES = {"input": "in", "output": "out"}


def _wanted(expected: Mapping[str, ModuleShapes], event: Event) -> tuple[Shape, ...]:
    shapes = expected.get(event.module)
    if shapes is None:
        return ()
    return shapes.inputs if event.side == "input" else shapes.outputs


def by(shape: Shape) -> str:
    """A shape as people write it: ``1024 x 128``."""
    return " x ".join(map(str, shape)) or "one number"
