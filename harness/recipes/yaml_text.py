"""YAML text: what ``yaml.safe_load`` makes of it -> the same values, each with its line.

Mappings, lists, numbers, texts, booleans and nulls: any other tag is refused, so that no text can make
Python do anything; so are a key that is there twice and a number that is not finite.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

from harness.recipes.located import Items, Place, Table, wrong

# A config is some hundred values; aliases of aliases would make more of a small file than fits in memory.
_MOST_VALUES = 100_000
_TABLE, _ITEMS = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_MERGE = "tag:yaml.org,2002:merge"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def documents(text: str, file: str) -> list[Any]:
    """Every YAML document of ``text``, which comes from ``file``. Raises UnknownRecipe with the line."""
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
        reader = _Reader(file)
        return [None if node is None else reader.value(node) for node in nodes]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1) if mark is not None else file
        raise wrong(place, f"no valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise wrong(file, f"no valid YAML: {str(error).splitlines()[0]}") from error


class _Reader:
    """Nodes -> values; counts them, and knows which it is inside of."""

    def __init__(self, file: str) -> None:
        self.file, self.count = file, 0
        self.inside: set[int] = set()
        self.scalars = yaml.SafeLoader("")

    def value(self, node: yaml.Node) -> Any:
        place = self.place(node)
        self.count += 1
        if self.count > _MOST_VALUES:
            raise wrong(place, f"more than {_MOST_VALUES:,} values: aliases of aliases?")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if node.tag not in (_TABLE, _ITEMS):
            raise wrong(place, f"the tag {node.tag!r} has no place in a recipe")
        if id(node) in self.inside:
            raise wrong(place, "an alias stands inside of what it stands for")
        self.inside.add(id(node))
        made = self.table(node) if isinstance(node, yaml.MappingNode) else self.items(node)
        self.inside.remove(id(node))
        return made

    def scalar(self, node: yaml.ScalarNode) -> Any:
        place = self.place(node)
        try:
            value = self.scalars.construct_object(node)
        except ValueError as error:
            raise wrong(place, f"{node.value!r} is no value: {error}") from error
        if not (value is None or isinstance(value, str | int | float)):
            raise wrong(place, f"{node.value!r} is a {type(value).__name__}, which has no place in a recipe")
        if isinstance(value, float) and not math.isfinite(value):
            raise wrong(place, f"{node.value!r} is no finite number")
        return value

    def table(self, node: yaml.MappingNode) -> Table:
        own = [key for key, _ in node.value if key.tag != _MERGE]
        seen: dict[Any, Place] = {}
        for key in own:
            name = self.key(key)
            if name in seen:
                raise wrong(self.place(key), f"{name!r} is there twice, first in line {seen[name].line}")
            seen[name] = self.place(key)
        if len(own) < len(node.value):
            self.scalars.flatten_mapping(node)
        values = {self.key(key): (self.value(value), self.place(key)) for key, value in node.value}
        return Table(self.place(node), values)

    def key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise wrong(self.place(node), "a key is a word or a number")
        return self.scalar(node)

    def items(self, node: yaml.Node) -> Items:
        return Items(self.place(node), [(self.value(item), self.place(item)) for item in node.value])

    def place(self, node: yaml.Node) -> Place:
        return Place(self.file, node.start_mark.line + 1)
