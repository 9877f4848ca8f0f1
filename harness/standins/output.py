"""Output: what Megatron and ModelOpt print, log and warn, kept as text instead of shown."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence what Megatron and ModelOpt warn about while they are imported.

    Missing Apex and Transformer Engine are what the stand-in records declare; the rest concerns
    their own source text.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def captured() -> Iterator[io.StringIO]:
    """Send standard output and error, logging and warnings of this process to one text buffer.

    Exceptions pass through. What a subprocess or C code writes to the descriptors is not caught.
    """
    buffer = io.StringIO()
    root = logging.getLogger()
    handler = logging.StreamHandler(buffer)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    handlers = root.handlers[:]
    root.handlers[:] = [handler]
    try:
        with redirect_stdout(buffer), redirect_stderr(buffer), warnings.catch_warnings():
            # The default display goes to sys.stderr, which is the buffer now.
            warnings.simplefilter("always")
            warnings.showwarning = _show
            yield buffer
    finally:
        root.handlers[:] = handlers


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: io.TextIOBase | None = None,
    line: str | None = None,
) -> None:
    logging.getLogger("warnings").warning("%s: %s", category.__name__, message)
