"""Catalogue: names -> recipes. ModelOpt's constants, the YAML recipes it ships, and a user's own files.

A constant's recipe has its name, lower-case, without ``_DEFAULT``, ``_CFG`` and ``_CONFIG``; a shipped
recipe its path (``general/ptq/nvfp4_default-kv_fp8``), or the last part of it where no other has the same.
``a+b`` is ``a`` with the entries of ``b`` after its own. Each file is read when it is asked for, once.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import UnknownRecipe
from harness.recipes.imports import config_at, find_file, shown
from harness.recipes.located import Table
from harness.recipes.modelopt import declared, library
from harness.recipes.recipe import Recipe, combined

# Per-tensor, dynamic blocks and static blocks: each takes a different path through ModelOpt.
DEFAULT_RECIPES = ("fp8", "nvfp4", "int4_awq")

_SUFFIXES = (".yml", ".yaml")
_PTQ = re.compile(r"^\s+recipe_type:\s*ptq\s*(#.*)?$", re.MULTILINE)
# Where ModelOpt kept the recipes of single checkpoints before; it still takes the path.
_MOVED = ("huggingface/models/", "models/")


def recipe_name(text: str) -> str:
    """The name that a config name or a user's spelling stands for (``NVFP4_DEFAULT_CFG`` -> ``nvfp4``)."""
    return re.sub(r"_default(?=_|$)|_(cfg|config)$", "", _folded(text))


def _folded(text: str) -> str:
    return text.strip().lower().replace("-", "_")


@cache
def config_names() -> Mapping[str, str]:
    """The name of every recipe that is a constant of ModelOpt's -> the constant, by name."""
    found = {recipe_name(name): name for name in declared().choices}
    return {name: found[name] for name in sorted(found)}


@cache
def shipped() -> Mapping[str, Path]:
    """The path name of every PTQ recipe that ModelOpt ships as YAML -> its file."""
    root = library()
    files = {
        str(path.relative_to(root).with_suffix("")): path
        for folder in sorted(root.iterdir())
        if folder.is_dir() and folder.name != "configs"
        for path in sorted(folder.rglob("*"))
        if path.suffix in _SUFFIXES and _PTQ.search(path.read_text(encoding="utf-8"))
    }
    return dict(sorted(files.items()))


@cache
def short_names() -> Mapping[str, str]:
    """Names by which a shipped recipe is found as well: the last part of its path, where it is no other's."""
    last = {path: path.rpartition("/")[2] for path in shipped()}
    times = Counter(_folded(name) for name in last.values())
    return {
        name: path
        for path, name in last.items()
        if times[_folded(name)] == 1 and _folded(name) not in config_names()
    }


def names() -> tuple[str, ...]:
    """Every name that ``find_recipe`` knows: constants, then shipped recipes, the short names first."""
    short = {path: name for name, path in short_names().items()}
    return (*config_names(), *(short.get(path, path) for path in shipped()))


def recipes() -> tuple[Recipe, ...]:
    """Every recipe that is a constant of ModelOpt's, by name: what ``all`` means."""
    return tuple(_of_config(name) for name in config_names())


def recipes_of(texts: Iterable[str]) -> tuple[Recipe, ...]:
    """The recipes of these names, each once."""
    return tuple(dict.fromkeys(map(find_recipe, texts)))


def find_recipe(text: str) -> Recipe:
    """The recipe of that name: a constant's, a shipped recipe's, a YAML file's path, or several with ``+``.

    Raises UnknownRecipe, with the near names, or with file and line of what is wrong in a file.
    """
    whole = _single(text)
    if whole is not None:
        return whole
    first, *others = text.split("+")
    if others and all(part.strip() for part in (first, *others)):
        made = find_recipe(first)
        for other in others:
            made = combined(made, find_recipe(other))
        return made
    raise UnknownRecipe(_unknown(text))


def _single(text: str) -> Recipe | None:
    name = recipe_name(text)
    if name in config_names():
        return _of_config(name)
    path = _shipped_named(text)
    if path is not None:
        return _of_shipped(path)
    return _of_file(text.strip())


def _shipped_named(text: str) -> str | None:
    wanted = _folded(text).removesuffix(".yaml").removesuffix(".yml")
    old, new = _MOVED
    wanted = new + wanted.removeprefix(old) if wanted.startswith(old) else wanted
    for path in shipped():
        if _folded(path) == wanted:
            return path
    return next((path for name, path in short_names().items() if _folded(name) == wanted), None)


@cache
def _of_config(name: str) -> Recipe:
    constant = config_names()[name]
    file = declared().choices[constant]
    path = find_file(file)
    if path is None:
        raise UnknownRecipe(f"{constant} is the file {file}, which is not there")
    source = f"modelopt.torch.quantization.config.{constant} ({shown(path)})"
    return Recipe.of(config_at(path), name, source, constant)


@cache
def _of_shipped(name: str) -> Recipe:
    path = shipped()[name]
    short = {each: given for given, each in short_names().items()}
    return Recipe.of(_with_algorithm(config_at(path)), short.get(name, name), shown(path))


def _of_file(text: str) -> Recipe | None:
    """A user's own file; its name is the path, so that the same words find it again."""
    looks_like_a_path = "/" in text or text.endswith(_SUFFIXES)
    if not looks_like_a_path:
        return None
    path = Path(text)
    found = path if path.is_file() else find_file(text)  # which also looks into ModelOpt's library
    if found is None:
        if path.is_dir():
            raise UnknownRecipe(f"{text} is a folder; name the YAML file of a recipe")
        return None
    return _file_read(text, found, found.stat().st_mtime_ns)


@cache
def _file_read(text: str, path: Path, changed: int) -> Recipe:
    return Recipe.of(_with_algorithm(config_at(path)), text, shown(path))


def _with_algorithm(config: Table) -> Mapping[str, Any]:
    """With the default of ``QuantizeConfig``, which is what ModelOpt makes of a file without an algorithm."""
    return config if "algorithm" in config else {**config, "algorithm": "max"}


def _unknown(text: str) -> str:
    every = names()
    several = [path for path in shipped() if _folded(path.rpartition("/")[2]) == _folded(text)]
    if several:
        return f"{text!r} is the end of several recipes: {', '.join(several)}"
    near = difflib.get_close_matches(recipe_name(text), every, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(config_names())}"
    rest = "" if near else f", and {len(shipped())} recipes of modelopt_recipes"
    what = "nor is it a YAML file; " if "/" in text or text.endswith(_SUFFIXES) else ""
    return f"no recipe is called {text!r}; {what}{hint}{rest}"
