"""Imports: a YAML file of ModelOpt's kind -> its values, with every ``$import`` replaced by what it names.

The rules are those of ``modelopt/torch/opt/config_loader.py``. A file's ``imports`` name other files, first
below the working directory, then in ModelOpt's library; each says in a ``modelopt-schema`` comment what it
is. In a mapping ``$import`` brings the keys of one or several files, which those beside it override; alone
in a list it is the item, or the items where the file is of the list's own kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.recipes import schema as schemas
from harness.recipes.located import Items, Place, Table, plain, wrong
from harness.recipes.modelopt import LIBRARY, library
from harness.recipes.schema import CHILD_SCHEMA, ITEM_SCHEMA, check, check_keys, schema_named, with_bits

_IMPORT = "$import"
_SCHEMA = re.compile(r"\s*#\s*modelopt-schema:\s*(\S+)\s*")
_SUFFIXES = (".yml", ".yaml")


@dataclass(frozen=True)
class Raw:
    """A file as it stands: what it imports, its values, and the schema that it claims."""

    path: Path
    imports: Any
    body: Any
    schema: str | None
    schema_place: Place


@dataclass(frozen=True)
class Imported:
    """An imported file's values and what they are."""

    data: Any
    schema: str


def shown(path: Path) -> str:
    """A file as messages name it: within ModelOpt's library by its place there."""
    root = library()
    return f"{LIBRARY}/{path.relative_to(root)}" if path.is_relative_to(root) else str(path)


def find_file(name: str) -> Path | None:
    """The file that an import names, with or without its suffix; the working directory goes first."""
    names = [name] if name.endswith(_SUFFIXES) else [name + suffix for suffix in _SUFFIXES]
    for folder in (Path(), library()):
        for each in names:
            if (folder / each).is_file():
                return folder / each
    return None


def read(path: Path) -> Raw:
    """A file, nothing in it resolved. Raises UnknownRecipe."""
    from harness.recipes.yaml_text import documents  # yaml takes longer to import than most commands take

    name = shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(name, f"cannot be read: {error}") from error
    found = documents(text, name)
    start = Place(name, 1)
    schema, line = _claimed(text, name)
    if len(found) > 2:
        raise wrong(name, f"{len(found)} YAML documents, expected one, or imports and one")
    first = found[0] if found and found[0] is not None else Table(start, {})
    if len(found) == 2:
        if not isinstance(first, Table):
            raise wrong(start, "the first of two documents is a mapping with imports")
        body = found[1] if found[1] is not None else Table(start, {})
        if isinstance(body, Table):
            body = Table(body.place, first.located() | body.located())
        imports: Any = first.get("imports")
    else:
        body, imports = first, first.get("imports") if isinstance(first, Table) else None
    if not isinstance(body, Table | Items):
        raise wrong(start, f"expected a mapping or a list, not {body!r}")
    if isinstance(body, Table):
        imports = body.get("imports")
        body = Table(body.place, {key: at for key, at in body.located().items() if key != "imports"})
    return Raw(path, imports, with_bits(body), schema, Place(name, line))


def _claimed(text: str, name: str) -> tuple[str | None, int]:
    """The schema of the comments at the top of a file, and its line."""
    found: str | None = None
    at = 1
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            break
        match = _SCHEMA.fullmatch(line)
        if match and found is not None:
            raise wrong(Place(name, number), "a second modelopt-schema comment")
        if match:
            found, at = match[1], number
    return found, at


def resolved(raw: Raw, schema: str, loading: frozenset[Path] = frozenset()) -> Any:
    """The values of ``raw``, which is a ``schema``, with every import put in. Raises UnknownRecipe."""
    return _Resolver(_imports_of(raw, loading)).value(raw.body, schema)


def _imports_of(raw: Raw, loading: frozenset[Path]) -> Mapping[str, Imported]:
    if raw.imports is None:
        return {}
    if not isinstance(raw.imports, Table):
        raise wrong(shown(raw.path), f"imports maps names to files, not {plain(raw.imports)!r}")
    loading |= {raw.path.resolve()}
    found = {}
    for name, (file, place) in raw.imports.located().items():
        if not isinstance(file, str) or not file:
            raise wrong(place, f"the import {name!r} names no file")
        path = find_file(file)
        if path is None:
            raise wrong(place, f"the import {name!r} is no file: {file}")
        if path.resolve() in loading:
            raise wrong(place, f"the import {name!r} comes back to {shown(path)}")
        found[name] = imported(path, place, loading)
    return found


def imported(path: Path, place: Place, loading: frozenset[Path]) -> Imported:
    """A file that another one imports at ``place``, resolved and checked."""
    key = path.resolve()
    return _imported(path, key.stat().st_mtime_ns, loading) if key.exists() else _missing(path, place)


def _missing(path: Path, place: Place) -> Imported:
    raise wrong(place, f"{path} is gone")


@cache
def _imported(path: Path, changed: int, loading: frozenset[Path]) -> Imported:
    raw = read(path)
    if raw.schema is None:
        raise wrong(shown(path), "is imported and has no modelopt-schema comment")
    schema = schema_named(raw.schema, raw.schema_place)
    data = resolved(raw, schema, loading)
    check(data, schema, raw.schema_place)
    return Imported(data, schema)


class _Resolver:
    """Puts imports in, anywhere in a file's values."""

    def __init__(self, imports: Mapping[str, Imported]) -> None:
        self.imports = imports

    def value(self, value: Any, schema: str | None) -> Any:
        if isinstance(value, Items):
            return self.items(value, schema)
        if not isinstance(value, Table):
            return value
        if _IMPORT in value:
            return self.value(self.merged(value), schema)
        check_keys(value, schema)
        return Table(
            value.place,
            {
                key: (self.value(item, CHILD_SCHEMA.get((schema or "", key))), at)
                for key, (item, at) in value.located().items()
            },
        )

    def merged(self, table: Table) -> Table:
        names, values = table[_IMPORT], table.located()
        place = table.at(_IMPORT)
        merged: dict[Any, tuple[Any, Place]] = {}
        for name in names if isinstance(names, Items) else [names]:
            data = self.find(name, place).data
            if not isinstance(data, Table):
                raise wrong(place, f"{_IMPORT} {name!r} brings a list where a mapping is wanted")
            merged |= data.located()
        del values[_IMPORT]
        return Table(table.place, merged | values)

    def items(self, items: Items, schema: str | None) -> Items:
        made: list[tuple[Any, Place]] = []
        element = ITEM_SCHEMA.get(schema or "")
        for item, place in items.located():
            if isinstance(item, Table) and set(item) == {_IMPORT}:
                made += self.spliced(item[_IMPORT], schema, element, place)
            else:
                made.append((self.value(item, element), place))
        return Items(items.place, made)

    def spliced(
        self, name: Any, schema: str | None, element: str | None, place: Place
    ) -> list[tuple[Any, Place]]:
        found = self.find(name, place)
        if found.schema == schema and isinstance(found.data, Items):
            return list(found.data.located())
        if element is not None and found.schema == element:
            return [(found.data, place)]
        if element is None:
            raise wrong(place, f"{_IMPORT} {name!r} stands in a list that takes no imports")
        raise wrong(place, f"{_IMPORT} {name!r} is a {found.schema}, where the list holds {element}")

    def find(self, name: Any, place: Place) -> Imported:
        # Not only words: YAML reads off and on as false and true, as names too.
        if isinstance(name, Table | Items) or name not in self.imports:
            known = ", ".join(map(str, self.imports)) or "nothing"
            raise wrong(place, f"{_IMPORT} {plain(name)!r} is not among the imports of this file: {known}")
        return self.imports[name]


def config_at(path: Path) -> Table:
    """The quantize config of a file: a PTQ recipe's ``quantize``, or the file itself.

    Raises UnknownRecipe, with file and line, where ModelOpt would refuse it.
    """
    raw = read(path)
    if not isinstance(raw.body, Table):
        raise wrong(shown(path), "is a list, and neither a PTQ recipe nor a quantize config")
    start = raw.body.place
    if not {"metadata", "quantize"} & set(raw.body):
        if raw.schema is not None and schema_named(raw.schema, raw.schema_place) != schemas.CONFIG:
            raise wrong(raw.schema_place, f"{raw.schema} is not what a recipe is")
        config = resolved(raw, schemas.CONFIG)
    else:
        _check_kind(raw.body)
        whole = resolved(raw, schemas.RECIPE)
        if "quantize" not in whole:
            raise wrong(start, "a PTQ recipe without quantize")
        config = whole["quantize"]
    check(config, schemas.CONFIG, start)
    assert isinstance(config, Table)
    return config


def _check_kind(recipe: Table) -> None:
    """Raises UnknownRecipe where a recipe is not one for quantization after training."""
    metadata = recipe.get("metadata")
    kind = metadata.get("recipe_type") if isinstance(metadata, Table) else None
    if kind is None:
        raise wrong(recipe.at("metadata"), "a recipe says metadata.recipe_type")
    if kind != "ptq":
        raise wrong(recipe.at("metadata"), f"a recipe of type {kind!r}; only ptq quantizes by itself")
