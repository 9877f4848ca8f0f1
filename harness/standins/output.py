"""Output: what Megatron and ModelOpt print, log and warn, kept as text instead of shown."""

from __future__ import annotations

import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout

# The packages whose import says much, in an order in which they load each other.
_FOREIGN = (
    "megatron.core",
    "megatron.core.models.gpt",
    "megatron.core.post_training.modelopt.gpt.model_specs",
    "megatron.core.post_training.modelopt.hybrid.model_specs",
    "megatron.core.models.hybrid.hybrid_model",
    "megatron.training.argument_utils",
    "modelopt.torch.quantization",
)


def import_foreign() -> None:
    """Import Megatron and ModelOpt without a word; costs nothing once they are loaded.

    They warn that Apex and Transformer Engine are missing, which is what the stand-in records declare;
    the rest concerns their own source text. A failing import raises as ever.
    """
    if all(name in sys.modules for name in _FOREIGN):
        return
    with captured():
        for name in _FOREIGN:
            importlib.import_module(name)


@contextmanager
def captured() -> Iterator[io.StringIO]:
    """Send standard output and error, logging and warnings of this process to one text buffer.

    A warning said again is kept once. Exceptions pass through. What a subprocess or C code writes to the
    descriptors is not caught. May be nested: the innermost buffer has it.
    """
    buffer = io.StringIO()
    logs = nullcontext() if _SINK.buffers else _logging_to_sink()
    with _SINK.into(buffer), logs, redirect_stdout(_SINK), redirect_stderr(_SINK), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _show_once()
        yield buffer


class _Sink(io.TextIOBase):
    """Writes to the innermost buffer. A library that set up its logging inside goes on writing to this one
    afterwards, which is then standard error."""

    def __init__(self) -> None:
        self.buffers: list[io.StringIO] = []

    @contextmanager
    def into(self, buffer: io.StringIO) -> Iterator[None]:
        self.buffers.append(buffer)
        try:
            yield
        finally:
            self.buffers.pop()

    def write(self, text: str) -> int:
        return (self.buffers[-1] if self.buffers else sys.stderr).write(text)

    def writable(self) -> bool:
        return True


_SINK = _Sink()


@contextmanager
def _logging_to_sink() -> Iterator[None]:
    handler = logging.StreamHandler(_SINK)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    own = {logger: logger.handlers[:] for logger in _loggers() if logger.handlers}
    for logger in own:
        # What such a logger does not show itself goes on to the root.
        logger.handlers[:] = [] if logger.propagate and logger is not logging.root else [handler]
    logging.root.handlers[:] = [handler]
    try:
        yield
    finally:
        logging.root.handlers[:] = []
        for logger, handlers in own.items():
            logger.handlers[:] = handlers


def _loggers() -> list[logging.Logger]:
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]


def _show_once() -> Callable[..., None]:
    """What ``warnings`` calls to show a warning: the same words once, however often they are said."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        text = f"{category.__name__}: {message}"
        if text not in said:
            said.add(text)
            logging.getLogger("warnings").warning("%s", text)

    return show
