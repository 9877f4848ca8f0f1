"""ModelOpt's files: where its recipes lie, which configs it offers, and which words its configs know.

All of it is read, nothing imported: ``modelopt`` imports torch. Configs and words are those of the syntax
tree of ``modelopt/torch/quantization/config.py``, so that what a later version adds is there by itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from harness.errors import UnknownRecipe

LIBRARY = "modelopt_recipes"  # the package of its YAML files
CONFIG_MODULE = "modelopt.torch.quantization.config"
_LOADER = "_load_quantize_config_dict"


@dataclass(frozen=True)
class Declared:
    """What ModelOpt's config module declares.

    ``choices`` maps the name of each config that ModelOpt offers to its YAML, within the recipes' folder.
    ``fields`` are those of each config class, inherited ones too; ``methods`` maps the name of each
    calibration algorithm to the class of its options.
    """

    choices: Mapping[str, str]
    fields: Mapping[str, frozenset[str]]
    methods: Mapping[str, str]


def package(name: str) -> Path:
    """The folder of an installed top-level package, which is not imported. Raises UnknownRecipe."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UnknownRecipe(
            f"no package {name!r} is installed, and ModelOpt's recipes are read from its files"
        )
    return Path(spec.submodule_search_locations[0])


def library() -> Path:
    """The folder of the recipes that ModelOpt ships."""
    return package(LIBRARY)


@cache
def declared() -> Declared:
    """What the installed ModelOpt declares. Raises UnknownRecipe where it is not as expected."""
    path = package("modelopt") / "torch" / "quantization" / "config.py"
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    files = dict(_config_files(tree))
    offered = sorted(_choices(tree))
    missing = [name for name in offered if name not in files]
    if missing or not offered:
        raise UnknownRecipe(f"{path}: no YAML file is named for {', '.join(missing) or 'any config'}")
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    fields = {name: frozenset(_fields(name, classes)) for name in classes}
    methods = {method: name for name, node in classes.items() for method in _methods(node)}
    return Declared({name: files[name] for name in offered}, fields, methods)


def _config_files(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(constant, file) of every ``NAME = _load_quantize_config_dict("file")``."""
    for name, value in _constants(tree):
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == _LOADER:
            (file,) = value.args
            if isinstance(file, ast.Constant) and isinstance(file.value, str):
                yield name, file.value


def _choices(tree: ast.Module) -> Iterator[str]:
    for name, value in _constants(tree):
        if name == "choices" and isinstance(value, ast.Set):
            yield from (str(item.value) for item in value.elts if isinstance(item, ast.Constant))


def _constants(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _fields(name: str, classes: Mapping[str, ast.ClassDef]) -> Iterator[str]:
    node = classes[name]
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(base.id, classes)
    for field, annotation in _annotated(node):
        if not field.startswith("_") and not _is(annotation, "ClassVar"):
            yield field


def _methods(node: ast.ClassDef) -> Iterator[str]:
    """The words that a class allows for ``method``."""
    for field, annotation in _annotated(node):
        if field == "method" and isinstance(annotation, ast.Subscript) and _is(annotation, "Literal"):
            for word in ast.walk(annotation.slice):
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    yield word.value


def _annotated(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, line.annotation


def _is(annotation: ast.expr, name: str) -> bool:
    """Whether an annotation is ``name[...]``."""
    return isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == name
