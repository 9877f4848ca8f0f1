"""Witness: looks on while a case runs in this process; keeps shape traces, and may stop in a debugger."""

from __future__ import annotations

import contextlib
import pdb
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from harness import stages
from harness.reproduction.shape_trace import Pass

if TYPE_CHECKING:
    from harness.activations import ModuleShapes
    from harness.stages import Stage
    from harness.trace import Trace


class Witness(stages.Watch):
    """Keeps the pass of the unquantized model, and the last one inside ModelOpt where that raised."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []

    def traced(self, stage: Stage, expected: Mapping[str, ModuleShapes], trace: Trace) -> None:
        self.passes.append(Pass(stage.name, expected, trace))

    @contextmanager
    def quantizing(self, model: Any) -> Iterator[None]:
        """Of the many passes of a calibration only the one that raised says anything new."""
        from harness.trace import last_pass

        with last_pass(model) as recorder:
            try:
                yield
            except Exception:
                trace = recorder.trace()
                if trace.events and not trace.finished:
                    expected = self.passes[-1].expected if self.passes else {}
                    self.passes.append(Pass("quantize", _of_one_batch(expected, self.passes, trace), trace))
                raise


def _of_one_batch(
    expected: Mapping[str, ModuleShapes], before: list[Pass], trace: Trace
) -> Mapping[str, ModuleShapes]:
    """What was expected of the pass before, where this one is over as many tokens; calibration takes more."""
    first = before[-1].trace.events[:1] if before else ()
    return expected if [event.shapes for event in first] == [trace.events[0].shapes] else {}


class Debugger(Witness):
    """Opens pdb where a stage fails: at the exception where one was raised, else at the end of the stage.

    Where nothing is raised, ``stage`` is the one to stop in, or every one where it is empty. ``continue``
    goes on to the next stop, ``quit`` runs to the end. Standard input and output
    are the terminal's, as those of the process are captured while a case runs.
    """

    def __init__(self, stage: str = "", stdin: TextIO | None = None, stdout: TextIO | None = None) -> None:
        super().__init__()
        self._stage = stage
        self._stdin, self._stdout = stdin or sys.stdin, stdout or sys.stdout
        self._quitting = False
        self._stopped_in: Stage | None = None

    def raised(self, stage: Stage, error: Exception) -> None:
        self._stopped_in = stage
        self._open(f"{stage.name} raised {type(error).__name__}: {error}", None, error.__traceback__)

    def ended(self, stage: Stage) -> None:
        errors = [finding for finding in stage.findings if finding.is_error]
        if errors and self._stopped_in is not stage and self._stage in ("", stage.name):
            self._open(f"{stage.name}: {errors[0].message}", _caller(), None)

    def _open(self, why: str, frame: FrameType | None, error: TracebackType | None) -> None:
        if self._quitting:
            return
        print(f"\n{why}", file=self._stdout)
        debugger = pdb.Pdb(stdin=self._stdin, stdout=self._stdout, nosigint=True)
        # The terminal's own line editing, which pdb leaves off where it is given its streams.
        debugger.use_rawinput = self._stdin is sys.__stdin__ and sys.stdin.isatty()
        debugger.reset()
        with _shown(self._stdout) if debugger.use_rawinput else contextlib.nullcontext():
            debugger.interaction(frame, error)
        self._quitting = debugger.quitting


@contextmanager
def _shown(stdout: TextIO) -> Iterator[None]:
    """``input`` writes its prompt to standard output, which is captured while a case runs."""
    with contextlib.redirect_stdout(stdout):
        yield


def _caller() -> FrameType:
    """The frame that ran the stage: the nearest that is neither of this package's watching nor of a
    context manager."""
    passed_over = {__file__, stages.__file__, contextlib.__file__}
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename in passed_over:
        frame = frame.f_back
    if frame is None:
        raise RuntimeError(f"no stage runs outside of {', '.join(Path(name).name for name in passed_over)}")
    return frame
