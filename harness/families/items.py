"""Items: what a publisher's figures say of a Megatron argument, one record for each way of saying it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.finding import Severity

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Expectation:
    """The value that a Megatron argument must have, and the published key that says so."""

    dest: str
    value: Any
    source: str
    severity: Severity = Severity.ERROR
    why: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """A key that the publisher leaves out, so that ``what`` (mostly an argument) cannot be checked."""

    what: str
    key: str


@dataclass(frozen=True, slots=True)
class NotModelled:
    """Something that the publisher says of the model and that the harness cannot check: an error."""

    dest: str
    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class Limit:
    """Something published that no flag of Megatron can say, whatever the preset: a warning.

    ``built`` is what Megatron makes in its place, ``effect`` what that comes to.
    """

    published: str
    source: str
    built: str
    effect: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part of the published model on which the next token does not depend.

    A warning, unless ``dest`` is an argument by which the preset includes it.
    """

    what: str
    source: str
    dest: str = ""


Item = Expectation | Unknown | NotModelled | Limit | LeftOut


class Reads(Mapping[str, Any]):
    """A published config that remembers which of its keys were asked for."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


# A published file is input too: no model has more layers.
_MOST_LAYERS = 10_000


def layer_count(config: Config) -> int | None:
    """The published number of decoder layers; None where there is none, or an absurd one."""
    layers = whole(config, "num_hidden_layers")
    return layers if layers is not None and layers <= _MOST_LAYERS else None


def whole(config: Config, key: str) -> int | None:
    """A published positive whole number, or None."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def on_off(value: Any) -> str:
    """A switch in words, anything else as it is."""
    return ("on" if value else "off") if isinstance(value, bool) else f"{value}"


def from_key(config: Config, dest: str, *keys: str) -> Item:
    """The value of the first of ``keys`` that is published, as the value of ``dest``."""
    for key in keys:
        if config.get(key) is not None:
            return Expectation(dest, config[key], key)
    return Unknown(dest, keys[0])
