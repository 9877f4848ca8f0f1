"""Facts: the publisher's figures for one model, from a file beside its preset or from the catalogue.

A file is ``<Model>.toml`` or a raw Hugging Face ``<Model>.config.json``, in Hugging Face's own keys. In a
toml ``[config]`` is what the publisher's file says; ``[derived]`` (what follows from the exact parameter
count) and ``[architecture]`` (what the modeling code fixes) only fill in keys that it leaves out, and what
is prose in them says nothing here. No other table is read, ``[params]`` aside.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harness.families import Family, find_family
from harness.finding import Finding, Severity

_EMPTY: Mapping[str, Any] = MappingProxyType({})
_MAX_BYTES = 1 << 20
_SUFFIXES = (".toml", ".config.json")
# Files of a catalogue, each of which a worker meets again with other recipes.
_KEPT = 64
# The presets that come with the harness, where it runs from its repository.
CATALOGUE = Path(__file__).parent.parent / "presets"


@dataclass(frozen=True)
class Facts:
    """The publisher's figures for one model.

    ``config`` has Hugging Face's keys, those of a text model where it is one part of several;
    ``published`` are the keys of it that the publisher's file has. ``params`` are counts of parameters
    (``total``, ``active``), ``hf_id`` the model's name on Hugging Face, ``label`` the file's name as
    messages have it.
    """

    path: Path
    config: Mapping[str, Any]
    published: frozenset[str]
    params: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    hf_id: str | None = None
    label: str = ""

    @property
    def family(self) -> Family | None:
        return find_family(self.config)


def facts_beside(preset: Path) -> tuple[Facts | None, tuple[Finding, ...]]:
    """The facts beside a preset file, or else those of its name (Org/Model) in the harness's catalogue.

    A finding where there are none or they cannot be read.
    """
    for path, label in _candidates(preset):
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"larger than {_MAX_BYTES} bytes")
            return _said_by(path, label, path.read_bytes()), ()
        except (OSError, ValueError, RecursionError) as error:
            return None, (_finding(f"{label} cannot be read: {error}", Severity.ERROR),)
    stem = _stem(preset)
    return None, (
        _finding(
            f"no {stem}.toml or {stem}.config.json beside the preset, and the catalogue has none of that "
            "name: no value in it could be compared with what the publisher says, and the parameter counts "
            "could not be checked",
            Severity.WARNING,
        ),
    )


def _stem(preset: Path) -> str:
    return preset.name.removesuffix(".sh")


def _candidates(preset: Path) -> Iterator[tuple[Path, str]]:
    """The files that may hold a preset's facts, best first, each with its name for messages."""
    for suffix in _SUFFIXES:
        path = preset.with_name(_stem(preset) + suffix)
        if path.is_file():
            yield path, path.name
    name = f"{preset.absolute().parent.name}/{_stem(preset)}"
    path_there = _catalogue().get(name.lower())
    if path_there is not None:
        yield path_there, f"the catalogue's {path_there.parent.name}/{path_there.name}"


@cache
def _catalogue() -> Mapping[str, Path]:
    """The facts files of the catalogue by ``org/model`` in lower case; empty where there is none."""
    found: dict[str, Path] = {}
    for suffix in _SUFFIXES:
        for path in sorted(CATALOGUE.glob(f"*/*{suffix}")):
            name = f"{path.parent.name}/{path.name.removesuffix(suffix)}"
            found.setdefault(name.lower(), path)
    return MappingProxyType(found)


@lru_cache(maxsize=_KEPT)
def _said_by(path: Path, label: str, data: bytes) -> Facts:
    """What a file of these bytes says."""
    read = _read_toml if path.suffix == ".toml" else _read_json
    return read(path, label, data.decode())


def _read_toml(path: Path, label: str, text: str) -> Facts:
    data = tomllib.loads(text)
    tables = {}
    for name in ("config", "derived", "architecture", "params"):
        tables[name] = data.get(name, {})
        if not isinstance(tables[name], dict):
            raise ValueError(f"[{name}] is not a table")
    if not tables["config"]:
        raise ValueError("there is no [config] table")
    published = _text_model(_with_nulls(tables["config"]))
    config = dict(published)
    # A head size that is left out, the family's own code derives.
    for key, value in {**tables["architecture"], **tables["derived"]}.items():
        if key not in ("head_dim", "confidence") and not _is_prose(value):
            config.setdefault(key, value)
    _fill_from_architecture(config, tables["architecture"])
    return Facts(
        path,
        MappingProxyType(config),
        frozenset(published),
        MappingProxyType(tables["params"]),
        data["hf_id"] if isinstance(data.get("hf_id"), str) else None,
        label,
    )


def _with_nulls(table: Mapping[str, Any]) -> dict[str, Any]:
    """A config table with the keys that it lists as null; toml has no null of its own."""
    nulls = table.get("null_keys", [])
    if not isinstance(nulls, list) or not all(isinstance(key, str) for key in nulls):
        raise ValueError("null_keys is not a list of keys")
    config: dict[str, Any] = dict.fromkeys(nulls)
    for key, value in table.items():
        if key != "null_keys":
            config[key] = _with_nulls(value) if isinstance(value, dict) else value
    return config


def _text_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model: its own keys before those of a model that it is a part of."""
    text = config.get("text_config")
    outer = {key: value for key, value in config.items() if key != "text_config"}
    return outer | text if isinstance(text, dict) else dict(config)


def _is_prose(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and " " in value)


def _fill_from_architecture(config: dict[str, Any], architecture: Mapping[str, Any]) -> None:
    """What ``[architecture]`` says in other words than Hugging Face's."""
    # One key decides both biases of attention.
    bias = architecture.get("attention_qkv_bias")
    if isinstance(bias, bool):
        config.setdefault("attention_bias", bias)
    # The modeling code that was read is that of the family.
    read = architecture.get("read_from")
    if isinstance(read, str):
        families = {name for name in _MODELING.findall(read) if find_family({"model_type": name})}
        if len(families) == 1:
            config.setdefault("model_type", families.pop())


_MODELING = re.compile(r"\bmodels/(\w+)")


def _read_json(path: Path, label: str, text: str) -> Facts:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    config = _text_model(data)
    return Facts(path, MappingProxyType(config), frozenset(config), label=label)


def _finding(message: str, severity: Severity) -> Finding:
    return Finding("reference", severity, message)
