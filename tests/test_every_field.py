"""Break every field: each argument that a preset is compared in, changed in a copy, is named.

Nothing here is written for a preset or a flag: which arguments are compared comes from the publisher's
figures, how they can be changed from the flag table. A new preset or a new row is covered as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from broken import TREE, edit, line_of

from harness.arguments import Arguments, flag_for
from harness.arguments.effective import NO_EFFECT, effective
from harness.arguments.modelled import MODELLED, unmodelled
from harness.facts import Facts, facts_beside
from harness.families import Expectation, expectations
from harness.finding import Finding, Severity
from harness.flags import FlagSpec, flag_table
from harness.preset import PresetFile, discover, load_preset
from harness.reference import compare

PRESETS = discover(TREE)

# Arguments that decide others, by the one that they decide: changed, they are named in its place.
DECIDES = {
    "group_query_attention": ("num_query_groups",),
    "use_rotary_position_embeddings": ("position_embedding_type",),
    "enable_gpt_oss": ("position_embedding_type", "yarn_original_max_position_embeddings"),
}
# Left out, these are for the tokenizer to decide, which may come to the same: see test_reference.py.
UNDECIDED = {"padded_vocab_size"}
# Arguments that are modelled and that no figure of a publisher is about.
NOT_COMPARED = {
    "encoder_num_layers": "another word for num_layers, which Megatron refuses beside it",
    "add_position_embedding": "Megatron refuses it but for rotary positions, where it changes nothing",
    "seq_length": "the length of a run",
    "encoder_seq_length": "the length of a run",
    "vocab_size": "has no effect beside --padded-vocab-size; without it, see test_reference.py",
    "make_vocab_size_divisible_by": "likewise",
    "moe_router_dtype": "the precision of a run",
    "apply_query_key_layer_scaling": "scales the scores down and up again",
    "attention_softmax_in_fp32": "the precision of a run",
}


@dataclass(frozen=True)
class Change:
    """A flag with another value, None to leave it out, and the argument that changes by it."""

    dest: str
    flag: str
    value: str | None

    def __str__(self) -> str:
        return f"{self.flag} {'left out' if self.value is None else self.value}".strip()


@dataclass
class Verdict:
    """What became of the changes of one preset."""

    named: dict[str, int] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_every_changed_field_is_named(file: PresetFile) -> None:
    verdict = judge(file)
    assert verdict.silent == []
    assert sum(verdict.named.values()) > 90, "a preset has that many ways to be wrong"


def test_every_modelled_argument_is_compared() -> None:
    compared = {dest for file in PRESETS for dest in judge(file).named}
    assert MODELLED - NOT_COMPARED.keys() - compared == set()
    assert NOT_COMPARED.keys() <= MODELLED
    assert NOT_COMPARED.keys() & compared == set()


def test_every_expected_argument_is_modelled() -> None:
    expected = {item.dest for file in PRESETS for item in published(file).values()}
    assert expected <= MODELLED


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_an_unchanged_preset_has_no_error(file: PresetFile) -> None:
    found, _ = read(file, facts_of(file))
    assert [finding.message for finding in found if finding.is_error] == []


# Changing


@cache
def judge(file: PresetFile) -> Verdict:
    """Every change of every field of one preset, tried."""
    text, facts, items = file.path.read_text(), facts_of(file), published(file)
    before, arguments = read(file, facts)
    assert arguments is not None
    known = {(finding.flag, finding.message) for finding in before}
    verdict = Verdict()
    with TemporaryDirectory() as folder:
        copy = PresetFile(file.name, Path(folder) / file.path.name)
        for change in changes(text, arguments, items):
            copy.path.write_text(edit(text, change.flag, change.value))
            after, changed = read(copy, facts)
            decided = DECIDES.get(change.dest, (change.dest,))
            if changed is not None and all(same(arguments, changed, items[dest]) for dest in decided):
                continue  # another way to say the same
            new = [finding for finding in after if (finding.flag, finding.message) not in known]
            if any(names(finding, change, {items[dest].severity for dest in decided}) for finding in new):
                verdict.named[change.dest] = verdict.named.get(change.dest, 0) + 1
            else:
                verdict.silent.append(f"{change} ({change.dest})")
    return verdict


def same(before: Arguments, after: Arguments, item: Expectation) -> bool:
    """Whether the model is the same as far as this argument goes."""
    layers = len(item.value) if isinstance(item.value, tuple) else None
    now = effective(after, item.dest, layers)
    return now is NO_EFFECT or bool(now == effective(before, item.dest, layers))


def names(finding: Finding, change: Change, severities: set[Severity]) -> bool:
    """Whether a finding, no milder than one of ``severities``, stands at the flag that was changed."""
    spellings = {name for name, spec in flag_table().items() if spec.dest == change.dest}
    return finding.flag in spellings and (finding.is_error or finding.severity in severities)


def changes(text: str, arguments: Arguments, items: Mapping[str, Expectation]) -> Iterator[Change]:
    """Each flag left out, and each given every other kind of value that its row in the table allows."""
    for dest in (*items, *DECIDES):
        if any(other not in items for other in DECIDES.get(dest, ())):
            continue
        spec = flag_table()[flag_for(dest)]
        written = [name for name, row in flag_table().items() if row.dest == dest and line_of(text, name)]
        for flag in written if dest not in UNDECIDED else ():
            yield Change(dest, flag, None)
        flag = written[0] if written else spec.name
        if spec.values == "0":
            if not written:
                yield Change(dest, flag, "")
            continue
        for value in other_values(spec, arguments, dest, items.get(dest)):
            yield Change(dest, flag, value)


def other_values(spec: FlagSpec, arguments: Arguments, dest: str, item: Expectation | None) -> Iterator[str]:
    value = arguments[dest]
    if spec.choices:
        yield from (choice for choice in spec.choices if choice != value)
    elif spec.type == "int":
        yield from (str(number) for number in (1, *near(value or 64)) if number != value and number > 0)
    elif spec.type == "float":
        yield from (repr(number) for number in (2.0 * (value or 1.0) + 0.125, (value or 0.5) / 2))
    elif spec.type == "int or list expression":
        assert item is not None
        yield from other_patterns(effective(arguments, dest, len(item.value)))
    elif spec.type == "comma-separated ints":
        left, right = value or (127, 0)
        yield from (f"{left + 1},{right}", f"{max(left - 1, 0)},{right}", f"{left},{right + 1}")
    else:
        assert dest == "hybrid_layer_pattern", f"{dest}: no rule for its type {spec.type!r}"
        yield from other_layers(value)


def near(value: int) -> tuple[int, ...]:
    return value - 1, value + 1, value // 2, 2 * value


def other_patterns(pattern: Any) -> Iterator[str]:
    """One entry flipped, at either end and in the middle; all of them; and none."""
    layers = len(pattern)
    for changed in {0, layers // 2, layers - 1}:
        entries = [entry if index != changed else 1 - entry for index, entry in enumerate(pattern)]
        yield str(entries).replace(" ", "")
    yield f"[1]*{layers}"
    yield f"[0]*{layers}"


def other_layers(pattern: str) -> Iterator[str]:
    """The first layer of each kind made another, one layer less, one more."""
    for symbol in dict.fromkeys(pattern):
        for other in dict.fromkeys(pattern + "M*-"):
            if other != symbol:
                yield pattern.replace(symbol, other, 1)
    yield pattern[:-1]
    yield pattern + pattern[0]


# Reading


def read(file: PresetFile, facts: Facts) -> tuple[list[Finding], Arguments | None]:
    """The findings of the parse and reference stages."""
    preset = load_preset(file)
    found = [*preset.findings, *unmodelled(preset.flags)]
    if preset.arguments is not None:
        found.extend(compare(preset.arguments, facts))
    return found, preset.arguments


@cache
def facts_of(file: PresetFile) -> Facts:
    facts, _ = facts_beside(file.path)
    assert facts is not None
    return facts


@cache
def published(file: PresetFile) -> Mapping[str, Expectation]:
    """What is expected of each argument on which the model depends."""
    facts = facts_of(file)
    arguments = load_preset(file).arguments
    assert facts.family is not None and arguments is not None
    items = [item for item in expectations(facts.family, facts.config) if isinstance(item, Expectation)]
    return {item.dest: item for item in items if effective(arguments, item.dest) is not NO_EFFECT}
