"""Inlined: stand-ins, modules and functions of this package -> source text for a program without it."""

from __future__ import annotations

import ast
import dis
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import CodeType, GenericAlias, ModuleType
from typing import Any

from harness.reproduction.literals import literal
from harness.standins import StandIn
from harness.standins.patching import patched

_OURS = re.compile(r"^from harness\.([\w.]+) import (.+)$", re.MULTILINE)
_PACKAGE, _STAND_INS = "harness.", "harness.standins."
_PATCHING = f"{_STAND_INS}patching"


def inlined(rows: Sequence[StandIn], modules: Sequence[ModuleType] = ()) -> str:
    """A namespace for each of ``modules`` and for each module of ``rows``, what it needs first, and
    ``stand_ins()`` to enter all rows.

    All of them import nothing of this package but other such modules.
    """
    written: dict[str, str] = {}
    for name in (*(row.install.__module__ for row in rows), *(module.__name__ for module in modules)):
        _add(name, written)
    entered = [
        f"    stack.enter_context({_last(row.install.__module__)}.{row.install.__name__}())" for row in rows
    ]
    whole = [inspect.getsource(patched), *written.values()]
    whole.append(
        "\n".join(["def stand_ins(stack: contextlib.ExitStack) -> None:", *(entered or ["    pass"])])
    )
    return "\n\n".join(text.rstrip() + "\n" for text in whole)


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _add(name: str, written: dict[str, str]) -> None:
    if name in written or name == _PATCHING:
        return
    import_module(name)
    source = inspect.getsource(sys.modules[name])
    for module, names in _OURS.findall(source):
        for other in _modules(module, names):
            _add(other, written)
    source = source.replace("from __future__ import annotations\n", "")
    source = _OURS.sub(lambda match: "\n".join(_taken(match[1], match[2])), source)
    body, last = textwrap.indent(source.strip(), "    "), _last(name)
    written[name] = (
        f"def _{last}() -> types.SimpleNamespace:\n{body}\n    return types.SimpleNamespace(**locals())\n\n\n"
        f"{last} = _{last}()"
    )


def _modules(module: str, names: str) -> Iterator[str]:
    """The modules of a line that imports ``names`` from ``module``, which may be a package of them."""
    for name in names.split(","):
        inner = f"{_PACKAGE}{module}.{name.strip()}"
        package = hasattr(import_module(_PACKAGE + module), "__path__")
        yield inner if package and find_spec(inner) else _PACKAGE + module


def _taken(module: str, names: str) -> Iterator[str]:
    for name, whole in zip(names.split(","), _modules(module, names), strict=True):
        # Whole modules, and what stands at the top, go by their names already.
        if whole not in (_PATCHING, f"{_PACKAGE}{module}.{name.strip()}"):
            yield f"{name.strip()} = {_last(whole)}.{name.strip()}"


def standing_alone(function: Callable[..., Any]) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Source by name of a function and of those of this package that it calls, and the imports of them all.

    Raises NoLiteral for a global of this package that is neither a function nor a plain value.
    """
    written: dict[str, str] = {}
    imports: dict[str, None] = {}
    _follow(function, written, imports)
    return written, tuple(imports)


def _follow(function: Callable[..., Any], written: dict[str, str], imports: dict[str, None]) -> None:
    plain = inspect.unwrap(function)
    source = inspect.getsource(plain)
    written[plain.__name__] = source
    said = {*_annotations(source)}
    for name in (*_globals_of(plain.__code__), *sorted(said)):
        if name in written or name not in plain.__globals__ or name in _AT_THE_TOP:
            continue
        value = plain.__globals__[name]
        home = getattr(value, "__module__", None)
        if name in said and isinstance(value, GenericAlias):
            imports |= dict.fromkeys(("import collections.abc", "import typing"))
            written[name] = f"{name} = {value!r}\n"
            continue
        if isinstance(value, ModuleType):
            same = value.__name__ == name
            imports[f"import {name}" if same else f"import {value.__name__} as {name}"] = None
        elif callable(value) and isinstance(home, str) and home.startswith(_PACKAGE):
            _follow(value, written, imports)
        elif callable(value) and isinstance(home, str):
            imports[_importing(home, name, value)] = None
        else:
            written[name] = f"{name} = {literal(value)}\n"


def _importing(home: str, name: str, value: Any) -> str:
    """The line that imports ``value``; a module written in another language may have no name to go by."""
    for module in (home.partition("._")[0], home):
        if getattr(sys.modules.get(module), name, None) is value:
            return f"from {module} import {name}"
    package = next(
        key for key, module in sys.modules.items() if "." not in key and getattr(module, name, None) is value
    )
    return f"from {package} import {name}"


# What every program has anyway.
_AT_THE_TOP = frozenset({"patched", "torch", "contextmanager", "Any", "Iterator"})


def _annotations(source: str) -> Iterator[str]:
    """The names in annotations: no code loads them, and whoever reads a program looks for them."""
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        for name in ("annotation", "returns"):
            annotation = getattr(node, name, None)
            if isinstance(annotation, ast.expr):
                yield from (each.id for each in ast.walk(annotation) if isinstance(each, ast.Name))


def _globals_of(code: CodeType) -> Iterator[str]:
    """The globals that a function loads, its inner functions too."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)
