"""Flags: the words of a preset -> typed flags, read as Megatron-LM's own parser reads them.

``megatron_flags.csv`` beside this module has one row for each of the 828 flags of Megatron-LM at tag
core_v0.19.0 (training and post-training parsers): its spellings, where its value goes, how many values
it takes, of what type, with what default, and what it means here: a role and the reason for it. A reason
that starts with ``run:`` earns a warning, one that starts with ``refused:`` an error.

``parse_flags`` accepts what argparse accepts without abbreviations, with the same values, and is stricter
where argparse lets a mistake through: a flag given twice with different values, numbers that are not
finite, list expressions that are not plain lists of whole numbers. Nothing is evaluated.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from importlib.resources import files
from operator import index
from textwrap import shorten
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness.finding import Finding, Severity

if TYPE_CHECKING:
    from harness.shell import Word


class Role(StrEnum):
    """What a flag touches: the model, the split over GPUs, one run, or nothing any more."""

    MODEL = "model"
    LAYOUT = "layout"
    RUNTIME = "runtime"
    DEPRECATED = "deprecated"


@dataclass(frozen=True, slots=True)
class FlagSpec:
    """One row of the table: ``values`` is ``0``, a count, ``+`` (one or more) or ``*`` (any number)."""

    name: str
    aliases: tuple[str, ...]
    dest: str
    values: str
    type: str
    choices: tuple[str, ...]
    default: object
    role: Role
    reason: str

    def value_if_given(self, spelling: str) -> bool:
        """What a flag without values stores; only where both are spellings does ``--no-`` mean False."""
        if self.type in ("flag: true", "flag: false"):
            return self.type == "flag: true"
        return not spelling.startswith("--no-")

    def read(self, text: str) -> object:
        """One value, converted. Raises ValueError."""
        reader, _ = _TYPES[self.type]
        value = reader(text)
        if self.choices and value not in map(reader, self.choices):
            raise ValueError(text)
        return value

    @property
    def expected(self) -> str:
        """What one value must be, in words."""
        return f"one of {', '.join(self.choices)}" if self.choices else _TYPES[self.type][1]

    @property
    def takes(self) -> str:
        """How many values the flag takes, in words."""
        return _COUNTS.get(self.values, f"{self.values} values")


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag as given; ``value`` is converted (lists are tuples), ``words`` are its values as written."""

    name: str
    dest: str
    value: object
    words: tuple[str, ...]
    line: int
    column: int
    spec: FlagSpec


@cache
def flag_table() -> Mapping[str, FlagSpec]:
    """Every flag by every spelling."""
    text = files("harness").joinpath("megatron_flags.csv").read_text(encoding="utf-8")
    specs = [_spec(row) for row in csv.DictReader(text.splitlines())]
    return MappingProxyType({name: spec for spec in specs for name in (spec.name, *spec.aliases)})


@cache
def defaults() -> Mapping[str, object]:
    """What the parser stores under each ``dest`` when no flag is given, before Megatron's validation."""
    return MappingProxyType({spec.dest: spec.default for spec in flag_table().values()})


def parse_flags(words: Sequence[Word]) -> tuple[tuple[Flag, ...], tuple[Finding, ...]]:
    """The flags that ``words`` give, in their order, and everything wrong with them, one finding a fault.

    A flag whose value is wrong is a finding and not a flag. One given twice is in the result twice; the
    last one is what argparse keeps.
    """
    table = flag_table()
    flags: list[Flag] = []
    findings: list[Finding] = []
    start = 0
    while start < len(words):
        word, stop = words[start], start + 1
        if word.text == "--":
            rest = f": {_shown(words[stop:])} would belong to no flag" if words[stop:] else ""
            findings.append(_fault(word, f"-- ends the flags{rest}; delete it", actual="--"))
            break
        while stop < len(words) and _is_value(words[stop].text, table):
            stop += 1
        values = words[start + 1 : stop]
        name, equals, explicit = (word.text, "", "") if word.text in table else word.text.partition("=")
        if name in table:
            spec = table[name]
            most = int(spec.values) if spec.values.isdigit() else len(values)
            strays = values if equals else values[most:]
            texts = [explicit] if equals else [value.text for value in values[:most]]
            if equals and spec.values == "0":
                message = f"{word.text}: {name} takes no value; write {name} alone"
                findings.append(_fault(word, message, name, expected=name, actual=word.text))
            elif len(texts) < {"*": 0, "+": 1}.get(spec.values, most):
                dashed = [next_ for next_ in words[stop : stop + 1] if _is_dashed_value(next_.text, table)]
                stop += len(dashed)
                findings.append(_too_few(word, name, spec, texts, _shown(dashed)))
            elif isinstance(read := _read(word, name, spec, texts), Flag):
                flags.append(read)
            else:
                findings.append(read)
            if strays:
                findings.append(_belongs_nowhere(strays, f"{name} before it takes {spec.takes}", name))
        elif _is_value(word.text, table):
            findings.append(_belongs_nowhere(words[start:stop], "it stands before any flag"))
        else:
            findings.append(_unknown(word, name, values))
        start = stop
    seen: dict[str, Flag] = {}
    for flag in flags:
        finding = _twice(seen[flag.dest], flag) if flag.dest in seen else _misplaced(flag)
        findings += [finding] if finding else []
        seen[flag.dest] = flag
    return tuple(flags), tuple(sorted(findings, key=lambda finding: (finding.line or 0, finding.column or 0)))


def _is_value(text: str, table: Mapping[str, FlagSpec]) -> bool:
    """argparse's rule: a dash makes a flag, but for a lone dash, a negative number and text with blanks."""
    if not text.startswith("-") or text == "-":
        return True
    if text == "--" or text in table or text.partition("=")[0] in table:
        return False
    return bool(re.match(r"-\d+$|-\d*\.\d+$", text)) or " " in text


def _is_dashed_value(text: str, table: Mapping[str, FlagSpec]) -> bool:
    """A word that argparse takes for a flag and that its writer meant as a value: ``-1,0``, ``-M*``."""
    return not (text.startswith("--") or _is_value(text, table) or _suggestion(text, cutoff=1.0))


def _read(word: Word, name: str, spec: FlagSpec, texts: Sequence[str]) -> Flag | Finding:
    values = []
    for text in texts:
        try:
            values.append(spec.read(text))
        except ValueError:
            message = f"{name} {_quoted(text)}: expected {spec.expected}{_hint(spec, text)}"
            return _fault(word, message, name, expected=spec.expected, actual=text)
    single = {"0": spec.value_if_given(name), "1": values[0] if values else None}
    value = single.get(spec.values, tuple(values))
    return Flag(name, spec.dest, value, tuple(texts), word.line, word.column, spec)


def _twice(first: Flag, again: Flag) -> Finding:
    if first.value == again.value:
        spelled = "" if first.name == again.name else f" as {first.name}"
        message = f"{again.name} is given twice with the same value, before{spelled} on line {first.line}"
        return _fault(again, message + "; delete one", again.name, Severity.WARNING, actual=again.value)
    before, here = (" ".join((flag.name, *map(_quoted, flag.words))) for flag in (first, again))
    message = f"{here} contradicts {before} on line {first.line}: Megatron keeps the last; delete one"
    return _fault(again, message, again.name, expected=first.value, actual=again.value)


def _misplaced(flag: Flag) -> Finding | None:
    name, spec = flag.name, flag.spec
    kind, _, rest = spec.reason.partition(": ")
    if spec.role is Role.DEPRECATED and kind == "refused":
        return _fault(flag, f"{name} is refused by Megatron: {rest}", name, expected=rest, actual=flag.value)
    if spec.role is Role.DEPRECATED:
        message = f"{name} is deprecated: {spec.reason}"
    elif spec.role is Role.LAYOUT and flag.value != spec.default:
        message = f"{name} is baked into a model preset ({spec.reason}): give it to the run instead"
    elif spec.role is Role.RUNTIME and kind == "run":
        message = f"{name} belongs to a run and not to a model ({rest}): give it to the run instead"
    else:
        return None
    return _fault(flag, message, name, Severity.WARNING, actual=flag.value)


def _unknown(word: Word, name: str, values: Sequence[Word]) -> Finding:
    meant = _suggestion(name)
    given = f" (with {_shown(values)})" if values else ""
    message = f"no flag {name}{given}: {f'did you mean {meant}?' if meant else 'Megatron 0.19 refuses it'}"
    return _fault(word, message, name, expected=meant, actual=_shown([word, *values]))


def _belongs_nowhere(strays: Sequence[Word], reason: str, flag: str | None = None) -> Finding:
    shown, meant = _shown(strays), _suggestion(strays[0].text, cutoff=1.0)
    message = f"{shown} belongs to no flag: {reason}{f'; did you mean {meant}?' if meant else ''}"
    return _fault(strays[0], message, flag, actual=shown)


def _too_few(word: Word, name: str, spec: FlagSpec, texts: Sequence[str], dashed: str) -> Finding:
    given = " ".join(map(_quoted, texts)) or "none"
    message = f"{name} takes {spec.takes}, given {given}"
    if dashed:
        message += f": {dashed} starts with a dash and is read as a flag; write {name}={dashed}"
    return _fault(word, message, name, expected=spec.takes, actual=dashed or given)


def _fault(
    at: Word | Flag,
    message: str,
    flag: str | None = None,
    severity: Severity = Severity.ERROR,
    **values: Any,
) -> Finding:
    return Finding("parse", severity, message, flag, at.line, at.column, **values)


def _suggestion(text: str, cutoff: float = 0.7) -> str | None:
    """The flag that was probably meant; with cutoff 1 only dashes, underscores and case may differ."""
    names = {_bare(name): name for name in flag_table()}
    close = get_close_matches(_bare(text.partition("=")[0]), names, n=1, cutoff=cutoff)
    return names[close[0]] if close else None


def _bare(name: str) -> str:
    return name.lstrip("-\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}").replace("_", "-").lower()


def _hint(spec: FlagSpec, text: str) -> str:
    """What to write instead, where that is plain."""
    if spec.choices:
        return next((f"; write {choice}" for choice in spec.choices if choice.lower() == text.lower()), "")
    if spec.type == "int" and re.fullmatch(r"-?\d{1,12}(\.\d*)?(e\+?\d)?", text, re.IGNORECASE | re.ASCII):
        return f"; write {int(float(text))}" if float(text).is_integer() else ""
    return "; write it without blanks" if "list" in spec.type and " " in text else ""


def _quoted(text: str) -> str:
    return text if text and not re.search(r"\s", text) else repr(text)


def _shown(words: Sequence[Word]) -> str:
    return shorten(" ".join(_quoted(word.text) for word in words), 80, placeholder=" ...")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _window(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.strip("()").split(",")))


_MOST = 1_000  # entries of a list expression, and the size of each; Megatron sets no limit and calls eval


def _frequency(text: str) -> int | tuple[int, ...]:
    """``4``, or a list written with +, * and brackets: ``([0]*3+[1]*45)``. Raises ValueError."""
    if "[" not in text:
        return int(text)
    if len(text) > 4 * _MOST or not re.fullmatch(r"[,0-9\[\]()+*]+", text):
        raise ValueError(text)
    try:
        return tuple(_evaluate(ast.parse(text, mode="eval").body))
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(text) from error


def _evaluate(node: ast.expr) -> Any:
    """A whole number, or a list of them, no larger than ``_MOST``."""
    value: Any = None
    match node:
        case ast.Constant(value=int(number)) if number <= _MOST:
            value = number
        case ast.List(elts=elements):
            value = [index(_evaluate(element)) for element in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            value = _evaluate(left) + _evaluate(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            value = _evaluate(left) * _evaluate(right)
    if not isinstance(value, int | list) or (len(value) if isinstance(value, list) else value) > _MOST:
        raise ValueError("too large, or neither a number nor a list")
    return value


def _spec(row: Mapping[str, str]) -> FlagSpec:
    name, dest, values, kind = row["flag"], row["dest"], row["values"], row["type"]
    aliases, choices = tuple(row["aliases"].split()), tuple(row["choices"].split())
    default = _default(row["default"], kind)
    return FlagSpec(name, aliases, dest, values, kind, choices, default, Role(row["role"]), row["reason"])


def _default(text: str, kind: str) -> object:
    """Empty is None; a list or an empty text is written as JSON."""
    if not text:
        return None
    if text[0] in '["':
        value = json.loads(text)
        return tuple(value) if isinstance(value, list) else value
    return text == "true" if text in ("true", "false") else _TYPES[kind][0](text)


_COUNTS = {"0": "no value", "1": "one value", "+": "one or more values", "*": "any number of values"}

_TYPES: Mapping[str, tuple[Callable[[str], object], str]] = {  # how each is read, and what it is in words
    "": (str, "a text"),
    "str": (str, "a text"),
    "enum name": (str, "a name"),
    "int": (int, "a whole number"),
    "float": (_finite, "a finite number"),
    "bool": (bool, "a text"),
    "int or list expression": (
        _frequency,
        f"a whole number, or a list of at most {_MOST} such as ([0]*3+[1]*45)",
    ),
    "comma-separated ints": (_window, "whole numbers with commas between, such as 127,0"),
}
