"""Reference: what the publisher says of a model, field by field against what the preset means.

``facts.py`` finds the publisher's figures, ``families/`` says which arguments mean the same, and
``effective.py`` which arguments the model depends on. An expected value is never guessed: a key that the
publisher leaves out is reported as not checked, and what no flag of Megatron can say is reported too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.arguments import Arguments, How
from harness.arguments.effective import NO_EFFECT, effective
from harness.facts import Facts, facts_beside
from harness.families import (
    INERT_KEYS,
    Expectation,
    Family,
    Item,
    LeftOut,
    Limit,
    NotModelled,
    Reads,
    Unknown,
    expectations,
)
from harness.finding import Finding, Severity

if TYPE_CHECKING:
    from harness.shell import Variable

__all__ = ["Facts", "compare", "compare_checkpoint", "facts_beside"]


def compare(arguments: Arguments, facts: Facts) -> tuple[Finding, ...]:
    """A finding for every field in which the preset differs from the publisher, both values in it."""
    return tuple(_compare(arguments, facts))


def _compare(arguments: Arguments, facts: Facts) -> Iterator[Finding]:
    family = facts.family
    if family is None:
        yield _finding(
            f"{facts.label}: model_type {facts.config.get('model_type')!r} is a family that the harness "
            "does not know: nothing could be compared with the publisher's figures",
            Severity.ERROR,
        )
        return
    config = Reads(facts.config)
    reported: set[tuple[str, int | None]] = set()
    for item in expectations(family, config):
        finding = _judge(arguments, item, facts.label)
        if finding is None:
            continue
        # One wrong flag can decide several arguments; the reader wants it named once.
        place = (finding.flag or "", finding.line)
        if isinstance(item, Expectation) and place in reported:
            continue
        reported.add(place)
        yield finding
    yield from _vocabulary(arguments, facts.config)
    yield from _prediction(arguments)
    yield from _unread(facts, family, config.keys_read)


def _judge(arguments: Arguments, item: Item, label: str) -> Finding | None:
    match item:
        case Expectation():
            return _check(arguments, item)
        case Unknown(what, key):
            return _finding(f"{label} does not say {key}: {what} could not be checked", Severity.WARNING)
        case NotModelled(dest, key, value):
            return arguments.finding(
                dest,
                f"{key} {shown_value(dest, value)} published, and the harness does not model it: nothing "
                "here says whether the preset means the same",
                stage="reference",
                expected=value,
                actual=arguments[dest],
            )
        case Limit(published, source, built, effect):
            message = f"{published} published ({source}), which no flag can make: Megatron builds {built}, so"
            return _finding(f"{message} {effect}", Severity.WARNING, expected=published, actual=built)
        case LeftOut(what, source, dest):
            if dest and arguments[dest]:
                return None
            message = f"the published {what} ({source}) is left out: the next token does not depend on it"
            return _finding(message, Severity.WARNING)


def _unread(facts: Facts, family: Family, keys_read: set[str]) -> Iterator[Finding]:
    unread = sorted(facts.published - keys_read - INERT_KEYS - family.unused)
    if unread:
        yield _finding(
            f"{facts.label} says things that the harness does not read: {', '.join(unread)}; nothing "
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
    layers = len(expected) if isinstance(expected, tuple) else None
    actual = effective(arguments, dest, layers)
    if actual is NO_EFFECT or same_value(actual, expected):
        return None
    if dest == "padded_vocab_size" and actual is None:
        return None  # left to the tokenizer, see _vocabulary
    severity, why = expectation.severity, expectation.why
    if dest == "max_position_embeddings" and arguments["position_embedding_type"] == "learned_absolute":
        severity, why = Severity.ERROR, "the preset has a learned table of them"
    origin = arguments.origin(dest)
    published = f"{shown_value(dest, expected)} published ({expectation.source})"
    if dest == "hybrid_layer_pattern":
        message = f"{origin.flag}: {_first_difference(actual, expected)} published ({expectation.source})"
    else:
        message = {
            How.GIVEN: f"{_shown(origin.flag, dest, actual)}: {published}",
            How.DEFAULT: f"{origin.flag} is not set and Megatron's default is {shown_value(dest, actual)}: "
            f"{published}",
            How.DERIVED: f"{dest} is {shown_value(dest, actual)} ({origin.because}): {published}",
        }[origin.how]
    return arguments.finding(
        dest,
        f"{message}; {why}" if why else message,
        stage="reference",
        severity=severity,
        expected=expected,
        actual=actual,
    )


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


def _prediction(arguments: Arguments) -> Iterator[Finding]:
    """Layers of multi-token prediction that come with the pattern, where no flag of their own is judged."""
    if arguments["mtp_num_layers"] and arguments.origin("mtp_num_layers").how is How.DERIVED:
        yield arguments.finding(
            "hybrid_layer_pattern",
            "the layer pattern ends in multi-token prediction layers, and the harness does not model them: "
            "nothing here says whether they are right",
            stage="reference",
            severity=Severity.WARNING,
            actual=arguments["hybrid_layer_pattern"],
        )


# Words


def same_value(actual: Any, expected: Any) -> bool:
    """Whether both are one value of an argument; a switch is no number."""
    if isinstance(actual, bool) or isinstance(expected, bool):
        return actual is expected
    return bool(actual == expected)


def _shown(flag: str, dest: str, value: Any) -> str:
    return flag if isinstance(value, bool) else f"{flag} {shown_value(dest, value)}"


def shown_value(dest: str, value: Any) -> str:
    """A value as a reader of presets would write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) if dest == "window_size" else _runs(value)
    return "none" if value is None or value == "" else f"{value}"


def _runs(pattern: tuple[int, ...]) -> str:
    """``(0, 1, 1, 1)`` -> ``[0]*1+[1]*3``, the way Megatron's patterns are written; twice it ``(...)*2``."""
    length = len(pattern)
    for period in range(2, length // 2 + 1):
        if length % period == 0 and pattern == pattern[:period] * (length // period):
            if len(set(pattern)) == 1:
                break
            return f"({_runs(pattern[:period])})*{length // period}"
    runs: list[tuple[int, int]] = []
    for entry in pattern:
        if runs and runs[-1][0] == entry:
            runs[-1] = (entry, runs[-1][1] + 1)
        else:
            runs.append((entry, 1))
    return "+".join(f"[{entry}]*{count}" for entry, count in runs)


_SYMBOLS = {"M": "Mamba", "G": "a gated delta net", "*": "attention", "-": "an MLP", "E": "experts"}


def _first_difference(actual: str, expected: str) -> str:
    """``layer 7 is - (an MLP), * (attention)``: the first layer, counted from 0, that is another."""
    for index, (here, there) in enumerate(zip(actual, expected, strict=False)):
        if here != there:
            return f"layer {index} is {_symbol(here)}, {_symbol(there)}"
    return f"{len(actual)} layers, {len(expected)}"


def _symbol(symbol: str) -> str:
    return f"{symbol} ({_SYMBOLS.get(symbol, 'another kind')})"


def _finding(message: str, severity: Severity, expected: Any = None, actual: Any = None) -> Finding:
    return Finding("reference", severity, message, expected=expected, actual=actual)
