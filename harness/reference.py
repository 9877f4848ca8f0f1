"""Reference: what the publisher says of a model, field by field against what the preset means.

The publisher's figures come from a file beside the preset, ``<Model>.toml`` or a raw Hugging Face
``<Model>.config.json``, in Hugging Face's own keys. What a family's modeling code fixes and no key
says (biases, q/k norms) is in ``families.py``. An expected value is never guessed: a key that the
publisher leaves out is reported as not checked.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness.architecture import moe_layers
from harness.arguments import Arguments, How
from harness.families import (
    INERT_KEYS,
    READ_KEYS,
    Expectation,
    Family,
    NotModelled,
    Unknown,
    expectations,
    find_family,
)
from harness.finding import Finding, Severity

if TYPE_CHECKING:
    from harness.shell import Variable

_EMPTY: Mapping[str, Any] = MappingProxyType({})
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Facts:
    """The publisher's figures for one model.

    ``config`` has Hugging Face's keys, ``params`` counts of parameters (``total``, ``active``), ``hf_id``
    the model's name there.
    """

    path: Path
    config: Mapping[str, Any]
    params: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    hf_id: str | None = None

    @property
    def family(self) -> Family | None:
        return find_family(self.config)


def facts_beside(preset: Path) -> tuple[Facts | None, tuple[Finding, ...]]:
    """The facts that stand beside a preset file; a finding where there are none or they cannot be read."""
    stem = preset.name.removesuffix(".sh")
    for name, read in ((f"{stem}.toml", _read_toml), (f"{stem}.config.json", _read_json)):
        path = preset.with_name(name)
        if path.is_file():
            try:
                if path.stat().st_size > _MAX_BYTES:
                    raise ValueError(f"larger than {_MAX_BYTES} bytes")
                return read(path), ()
            except (OSError, ValueError, RecursionError) as error:
                return None, (_finding(f"{name} cannot be read: {error}", Severity.ERROR),)
    return None, (
        _finding(
            f"no {stem}.toml or {stem}.config.json beside the preset: no value in it could be compared with "
            "what the publisher says, and the parameter counts could not be checked",
            Severity.WARNING,
        ),
    )


def _read_toml(path: Path) -> Facts:
    data = tomllib.loads(path.read_bytes().decode())
    tables = {}
    for name in ("config", "derived", "architecture", "params"):
        tables[name] = data.get(name, {})
        if not isinstance(tables[name], dict):
            raise ValueError(f"[{name}] is not a table")
    if not tables["config"]:
        raise ValueError("there is no [config] table")
    config = {key: value for key, value in tables["config"].items() if key != "null_keys"}
    null_keys = tables["config"].get("null_keys", [])
    if not isinstance(null_keys, list) or not all(isinstance(key, str) for key in null_keys):
        raise ValueError("null_keys is not a list of keys")
    for key in null_keys:
        config.setdefault(key, None)
    # What follows from the exact parameter count fills in what the publisher leaves out; a head size that
    # is left out, the family's own code derives.
    for key in tables["derived"].keys() & READ_KEYS - {"head_dim"}:
        config.setdefault(key, tables["derived"][key])
    # Likewise what its modeling code fixes; one key decides both biases of attention.
    bias = tables["architecture"].get("attention_qkv_bias")
    if isinstance(bias, bool):
        config.setdefault("attention_bias", bias)
    return Facts(
        path,
        MappingProxyType(config),
        MappingProxyType(tables["params"]),
        data["hf_id"] if isinstance(data.get("hf_id"), str) else None,
    )


def _read_json(path: Path) -> Facts:
    data = json.loads(path.read_bytes().decode())
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return Facts(path, MappingProxyType(data))


def compare(arguments: Arguments, facts: Facts) -> tuple[Finding, ...]:
    """A finding for every field in which the preset differs from the publisher, both values in it."""
    return tuple(_compare(arguments, facts))


def _compare(arguments: Arguments, facts: Facts) -> Iterator[Finding]:
    family = facts.family
    if family is None:
        yield _finding(
            f"{facts.path.name}: model_type {facts.config.get('model_type')!r} is a family that the harness "
            "does not know: nothing could be compared with the publisher's figures",
            Severity.ERROR,
        )
        return
    reported: set[tuple[str, int | None]] = set()
    for item in expectations(family, facts.config):
        if isinstance(item, Unknown):
            yield _finding(
                f"{facts.path.name} does not say {item.key}: {item.dest} could not be checked",
                Severity.WARNING,
            )
            continue
        if isinstance(item, NotModelled):
            yield arguments.finding(
                item.dest,
                f"{item.key} {_say(item.value)} published, and the harness does not model it: nothing here "
                "says whether the preset means the same",
                stage="reference",
                expected=item.value,
                actual=arguments[item.dest],
            )
            continue
        finding = _check(arguments, item)
        if finding is None:
            continue
        # One wrong flag can decide several arguments; the reader wants it named once.
        place = (finding.flag or "", finding.line)
        if place not in reported:
            reported.add(place)
            yield finding
    yield from _vocabulary(arguments, facts.config)
    unread = sorted(facts.config.keys() - READ_KEYS - INERT_KEYS)
    if unread:
        yield _finding(
            f"{facts.path.name} says things that the harness does not read: {', '.join(unread)}; nothing "
            "here says whether the preset means the same",
            Severity.WARNING,
        )


def compare_checkpoint(checkpoint: Variable | None, facts: Facts) -> tuple[Finding, ...]:
    """A warning where the preset's own ``HF_MODEL_CKPT`` names another model than the facts."""
    if checkpoint is None or facts.hf_id is None or not _HUB_NAME.fullmatch(checkpoint.text):
        return ()
    if checkpoint.text == facts.hf_id:
        return ()
    message = (
        f"HF_MODEL_CKPT is {checkpoint.text}, and the published figures are of {facts.hf_id}: other weights "
        "would be loaded"
    )
    return (
        Finding(
            "reference",
            Severity.WARNING,
            message,
            "HF_MODEL_CKPT",
            checkpoint.line,
            checkpoint.column,
            expected=facts.hf_id,
            actual=checkpoint.text,
        ),
    )


_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


def _check(arguments: Arguments, expectation: Expectation) -> Finding | None:
    dest, expected = expectation.dest, expectation.value
    actual = _effective(arguments, expectation)
    if _equal(actual, expected):
        return None
    origin = arguments.origin(dest)
    shown = _shown(origin.flag, actual)
    how = {
        How.GIVEN: f"{shown}: {_say(expected)} published ({expectation.source})",
        How.DEFAULT: f"{origin.flag} is not set and Megatron's default is {_say(actual)}: "
        f"{_say(expected)} published ({expectation.source})",
        How.DERIVED: f"{dest} is {_say(actual)} ({origin.because}): "
        f"{_say(expected)} published ({expectation.source})",
    }[origin.how]
    message = f"{how}; {expectation.why}" if expectation.why else how
    return arguments.finding(
        dest,
        message,
        stage="reference",
        severity=expectation.severity,
        expected=expected,
        actual=actual,
    )


def _effective(arguments: Arguments, expectation: Expectation) -> Any:
    """The value to compare: patterns layer by layer, what has no effect as published."""
    dest, value = expectation.dest, arguments[expectation.dest]
    if dest.startswith("moe_") and not arguments["num_experts"]:
        return expectation.value  # the missing experts are the finding
    if dest == "padded_vocab_size" and value is None:
        return expectation.value  # left to the tokenizer, see _vocabulary
    if dest == "moe_layer_freq":
        return _pattern(value, len(expectation.value))
    if dest == "rotary_seq_len_interpolation_factor" and value == 1:
        return None  # a factor of one interpolates nothing
    return value


def _pattern(frequency: int | Sequence[int], num_layers: int) -> tuple[int, ...] | None:
    """Which of the published number of layers hold experts, so that a wrong number is named once."""
    if isinstance(frequency, int):
        return tuple(map(int, moe_layers(frequency, num_layers))) if frequency > 0 else None
    return tuple(frequency)


def _vocabulary(arguments: Arguments, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Where no flag gives the size, the tokenizer does: between what is known of its length."""
    published = config.get("vocab_size")
    if arguments["padded_vocab_size"] is not None or not isinstance(published, int):
        return
    multiple = arguments["make_vocab_size_divisible_by"]
    if multiple < 1:
        return
    least = max(_token_ids(config), default=0) + 1
    low, high = (-(-size // multiple) * multiple for size in (least, published))
    if low == high == published:
        return
    if published in (low, high):
        yield arguments.finding(
            "make_vocab_size_divisible_by",
            f"the vocabulary is left to the tokenizer and padded to a multiple of {multiple}: it may come to "
            f"anything from {low} to {high}, {published} published (vocab_size); set --padded-vocab-size",
            stage="reference",
            severity=Severity.WARNING,
            expected=published,
            actual=f"{low} to {high}",
        )
        return
    yield arguments.finding(
        "make_vocab_size_divisible_by",
        f"a vocabulary padded to a multiple of {multiple} cannot come to {published} published (vocab_size)",
        stage="reference",
        expected=published,
        actual=f"{low} to {high}",
    )


def _token_ids(config: Mapping[str, Any]) -> Iterator[int]:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool):
                yield token


def _equal(actual: Any, expected: Any) -> bool:
    if isinstance(actual, bool) or isinstance(expected, bool):
        return actual is expected
    return bool(actual == expected)


def _shown(flag: str, value: Any) -> str:
    return flag if isinstance(value, bool) else f"{flag} {_say(value)}"


def _say(value: Any) -> str:
    """A value as a reader of presets would write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return _runs(value)
    return "none" if value is None else f"{value}"


def _runs(pattern: tuple[int, ...]) -> str:
    """``(0, 1, 1, 1)`` -> ``[0]*1+[1]*3``, the way Megatron's patterns are written."""
    runs: list[tuple[int, int]] = []
    for entry in pattern:
        if runs and runs[-1][0] == entry:
            runs[-1] = (entry, runs[-1][1] + 1)
        else:
            runs.append((entry, 1))
    return "+".join(f"[{entry}]*{length}" for entry, length in runs)


def _finding(message: str, severity: Severity) -> Finding:
    return Finding("reference", severity, message)
