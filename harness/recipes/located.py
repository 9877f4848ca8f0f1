"""Located: plain values of a file that know the line they stand on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import UnknownRecipe


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Table(dict[Any, Any]):
    """A mapping, where it begins, and where each of its keys stands."""

    def __init__(self, place: Place, values: Mapping[Any, tuple[Any, Place]]) -> None:
        super().__init__({key: value for key, (value, _) in values.items()})
        self.place = place
        self.places = {key: at for key, (_, at) in values.items()}

    def at(self, key: Any) -> Place:
        """Where ``key`` stands, or the table itself where it has none."""
        return self.places.get(key, self.place)

    def located(self) -> dict[Any, tuple[Any, Place]]:
        """What ``__init__`` takes."""
        return {key: (value, self.at(key)) for key, value in self.items()}


class Items(list[Any]):
    """A list, where it begins, and where each of its items stands."""

    def __init__(self, place: Place, values: list[tuple[Any, Place]]) -> None:
        super().__init__(value for value, _ in values)
        self.place = place
        self.places = [at for _, at in values]

    def located(self) -> Iterator[tuple[Any, Place]]:
        """Every item with its place."""
        return zip(self, self.places, strict=True)


def wrong(place: Place | str, what: str) -> UnknownRecipe:
    """The error to raise about a place."""
    return UnknownRecipe(f"{place}: {what}")


def plain(value: Any) -> Any:
    """The same without places: dicts, lists and scalars."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value
