"""Literals: values of Megatron's configuration -> Python source that makes them again.

Numbers, texts and containers are written as they are; dtypes, members of enumerations and functions by the
name under which another program imports them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from harness.build import transformer_config
from harness.standins.output import import_foreign
from harness.standins.patching import patched

if TYPE_CHECKING:
    from harness.arguments import Arguments
    from harness.layout import Layout

# Where the functions live that Megatron puts into a config; by their own word some live elsewhere.
_MODULES = ("torch.nn.functional", "megatron.core.activations", "megatron.core.fusions.fused_bias_geglu")


class NoLiteral(Exception):
    """A value that cannot be written as source text."""


def literal(value: Any) -> str:
    """Source text of one value. Raises NoLiteral."""
    if value is None or (isinstance(value, bool | int | float | str | bytes) and not isinstance(value, Enum)):
        return repr(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, set) and value:
        return "{" + ", ".join(sorted(map(literal, value))) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(f"{literal(entry)}, " for entry in value).rstrip() + ")"
    return _function(value)


def pretty(value: Any, indent: str = "") -> str:
    """A literal over as many lines as it has entries."""
    inner = indent + "    "
    if isinstance(value, Mapping) and value:
        rows = (f"{inner}{literal(key)}: {pretty(entry, inner)},\n" for key, entry in value.items())
        return "{\n" + "".join(rows) + indent + "}"
    if isinstance(value, list) and value:
        return "[\n" + "".join(f"{inner}{pretty(entry, inner)},\n" for entry in value) + indent + "]"
    return literal(value)


def _function(value: Any) -> str:
    for module in _MODULES:
        for name, known in vars(import_module(module)).items():
            if known is value and not name.startswith("_"):
                return f"{module}.{name}"
    raise NoLiteral(f"{value!r} has no name that another program could import")


def imports(text: str) -> tuple[str, ...]:
    """The modules that literals in ``text`` name."""
    enums = ("megatron.core.transformer.enums", "megatron.core.enums")
    return tuple(module for module in (*_MODULES, *enums) if f"{module}." in text)


@dataclasses.dataclass(frozen=True, slots=True)
class ConfigText:
    """Megatron's config as source: its class, what it is called with, and what is set on it afterwards."""

    kind: str
    given: Mapping[str, str]
    afterwards: Mapping[str, str]


def config_text(
    arguments: Arguments, layout: Layout, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> ConfigText:
    """The config that ``transformer_config`` makes of ``arguments``, also where Megatron refuses it.

    Raises what was raised before the config's class was called.
    """
    import_foreign()
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind: Any = MLATransformerConfig if arguments["multi_latent_attention"] else TransformerConfig
    with _recorded(kind) as seen:
        try:
            config = transformer_config(arguments.values, layout, device, dtype)
        except Exception:
            if not seen:
                raise
            config = None
    standard = {field.name: _default(field) for field in dataclasses.fields(kind)}
    given = {name: value for name, value in seen[0].items() if _differs(value, standard[name])}
    later: dict[str, str] = {}
    if config is not None:
        plain = vars(kind(**given))
        later = {
            name: literal(value)
            for name, value in vars(config).items()
            if (name not in plain or _differs(value, plain[name])) and not callable(value)
        }
    return ConfigText(kind.__name__, {name: literal(value) for name, value in given.items()}, later)


def _differs(one: Any, other: Any) -> bool:
    return type(one) is not type(other) or bool(one != other)


def _default(field: Any) -> Any:
    missing = field.default is dataclasses.MISSING
    return field.default_factory() if missing and callable(field.default_factory) else field.default


@contextmanager
def _recorded(kind: Any) -> Iterator[list[dict[str, Any]]]:
    """The fields of every config of this kind as it was called, before Megatron's own checks change them."""
    seen: list[dict[str, Any]] = []
    check = kind.__post_init__
    names = [field.name for field in dataclasses.fields(kind)]

    def post_init(config: Any) -> None:
        seen.append({name: getattr(config, name) for name in names})
        check(config)

    with patched(kind, "__post_init__", post_init):
        yield seen
