"""Inlined: the stand-ins that a case needed -> source text for a program without this package."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib import import_module

from harness.standins import StandIn
from harness.standins.patching import patched

_OURS = re.compile(r"^from harness\.standins\.(\w+) import (.+)$", re.MULTILINE)
_PACKAGE = "harness.standins."


def inlined(rows: Sequence[StandIn]) -> str:
    """A function for each module of ``rows``, what it needs first, and ``stand_ins()`` to enter them all."""
    modules: dict[str, str] = {}
    for row in rows:
        _add(_module(row), modules)
    entered = [f"    stack.enter_context({_module(row)}.{row.install.__name__}())" for row in rows]
    whole = [inspect.getsource(patched), *modules.values()]
    whole.append(
        "\n".join(["def stand_ins(stack: contextlib.ExitStack) -> None:", *(entered or ["    pass"])])
    )
    return "\n\n".join(text.rstrip() + "\n" for text in whole)


def _module(row: StandIn) -> str:
    return row.install.__module__.removeprefix(_PACKAGE)


def _add(name: str, modules: dict[str, str]) -> None:
    if name in modules or name == "patching":
        return
    import_module(_PACKAGE + name)
    source = inspect.getsource(sys.modules[_PACKAGE + name])
    for other, _ in _OURS.findall(source):
        _add(other, modules)
    source = source.replace("from __future__ import annotations\n", "")
    source = _OURS.sub(lambda match: "\n".join(_taken(match[1], match[2])), source)
    body = textwrap.indent(source.strip(), "    ")
    modules[name] = (
        f"def _{name}() -> types.SimpleNamespace:\n{body}\n    return types.SimpleNamespace(**locals())\n\n\n"
        f"{name} = _{name}()"
    )


def _taken(module: str, names: str) -> Iterator[str]:
    if module == "patching":  # stands at the top
        return
    yield from (f"{name.strip()} = {module}.{name.strip()}" for name in names.split(","))
