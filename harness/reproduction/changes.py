"""Changes: a preset and what is known of its model -> the flags that differ, each with the words that set
it back.

The reference is what the publisher says, and the catalogue's preset of the same name for what no publisher
says. A change is made in the words that the preset hands to Megatron, so that what Megatron's parser refuses
can be set back too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.arguments import Arguments, How, resolve
from harness.arguments.effective import NO_EFFECT, effective
from harness.case import Case
from harness.errors import UsageError
from harness.facts import Facts, facts_beside
from harness.families import Expectation, Reads, expectations
from harness.finding import Finding
from harness.flags import Flag, FlagSpec, defaults, flag_table, parse_flags
from harness.messages import shown_path
from harness.pipeline import lint
from harness.preset import SET_BEFORE, PresetFile, find_presets
from harness.reference import same_value, shown_value
from harness.selection import default_tree
from harness.shell import ARGUMENT_VARIABLES, MAX_BYTES, Word, read_script
from harness.tree import is_overlay

_REMOVED = "Megatron's default"


@dataclass(frozen=True, slots=True)
class Change:
    """One flag set back: the words at ``removed`` go, ``added`` come at the end.

    ``before`` and ``after`` are words for people, ``source`` says who has it so.
    """

    dest: str
    flag: str
    line: int | None
    before: str
    after: str
    source: str
    removed: frozenset[int]
    added: tuple[str, ...]

    def text(self, path: str) -> str:
        """``--num-query-groups 4 (presets/Qwen/Qwen3-8B.sh:23) back to 8 (num_key_value_heads)``."""
        place = f" ({shown_path(path)}:{self.line})" if self.line else ""
        return f"{self.flag} {self.before}{place} back to {self.after} ({self.source})"


@dataclass(frozen=True, slots=True)
class Differences:
    """The words of a preset, every change towards its reference, and what that reference is."""

    words: tuple[Word, ...]
    changes: tuple[Change, ...]
    references: tuple[str, ...]
    facts: Path | None

    def with_changes(self, chosen: Iterable[Change]) -> tuple[str, ...]:
        """The words once ``chosen`` are made."""
        chosen = tuple(chosen)
        gone = {index for change in chosen for index in change.removed}
        kept = (word.text for index, word in enumerate(self.words) if index not in gone)
        return (*kept, *(word for change in chosen for word in change.added))


def differences(case: Case) -> Differences:
    """Everything in which the preset of ``case`` differs from its reference. Raises UsageError."""
    words = words_of(Path(case.path))
    flags, _ = parse_flags(words)
    arguments, _ = resolve(flags)
    facts, _ = facts_beside(Path(case.path))
    references = [facts.label] if facts is not None and facts.family is not None else []
    changes: dict[str, Change] = {}
    if facts is not None:
        for change in _published(words, flags, arguments, facts):
            changes.setdefault(change.dest, change)
    other = _catalogue(case)
    if other is not None:
        references.append(shown_path(other.path))
        for change in _of_another(words, flags, other):
            changes.setdefault(change.dest, change)
    if references:
        for change in _refused(case, words, flags):
            known = changes.get(change.dest)
            merged = replace(known, removed=known.removed | change.removed) if known else change
            changes[change.dest] = merged
    path = facts.path if facts is not None else None
    return Differences(tuple(words), tuple(changes.values()), tuple(references), path)


def words_of(path: Path) -> list[Word]:
    """The words that a preset hands to Megatron. Raises UsageError where there are none."""
    with path.open("rb") as stream:
        script = read_script(stream.read(MAX_BYTES + 1), environment=SET_BEFORE)
    if is_overlay(script.variables):
        raise UsageError(f"{path} is an overlay: reduce the preset that it goes with")
    words = [
        word
        for name in ARGUMENT_VARIABLES
        if name in script.variables
        for word in script.variables[name].words
    ]
    if not words:
        raise UsageError(f"{path} sets no flags that could be changed")
    return words


# ---- what the publisher says ----


def _published(
    words: Sequence[Word], flags: Sequence[Flag], arguments: Arguments, facts: Facts
) -> Iterator[Change]:
    if facts.family is None:
        return
    for item in expectations(facts.family, Reads(facts.config)):
        if not isinstance(item, Expectation):
            continue
        layers = len(item.value) if isinstance(item.value, tuple) else None
        actual = effective(arguments, item.dest, layers)
        if actual is NO_EFFECT or same_value(actual, item.value):
            continue
        if item.dest == "padded_vocab_size" and actual is None:
            continue  # the tokenizer gives it
        change = _towards(words, flags, arguments, item, actual)
        if change is not None:
            yield change


def _towards(
    words: Sequence[Word], flags: Sequence[Flag], arguments: Arguments, item: Expectation, actual: Any
) -> Change | None:
    """The change after which the model has ``item``'s value; None where no flag alone gives it."""
    origin = arguments.origin(item.dest)
    layers = len(item.value) if isinstance(item.value, tuple) else None
    blamed = flag_table()[origin.flag].dest if origin.flag in flag_table() else item.dest
    attempts: list[dict[str, Any]] = [{item.dest: item.value}]
    if origin.how is How.DERIVED and blamed != item.dest:
        other = arguments[blamed]
        value = not other if isinstance(other, bool) else defaults().get(blamed)
        attempts += [{blamed: value}, {item.dest: item.value, blamed: value}]
    for attempt in attempts:
        change = _setting(words, flags, attempt)
        if change is None:
            continue
        removed, added = change
        texts = [word for index, word in enumerate(words) if index not in removed]
        again, _ = parse_flags([*texts, *(Word(text, 1, 1, False) for text in added)])
        result, _ = resolve(again)
        if same_value(effective(result, item.dest, layers), item.value):
            return Change(
                item.dest,
                origin.flag,
                origin.line,
                shown_value(item.dest, actual) if origin.how is not How.DEFAULT else "(not set)",
                shown_value(item.dest, item.value),
                item.source,
                frozenset(removed),
                added,
            )
    return None


def _setting(
    words: Sequence[Word], flags: Sequence[Flag], values: Mapping[str, Any]
) -> tuple[set[int], tuple[str, ...]] | None:
    """The words to take out and to put in so that each argument has its value; None where no flag can."""
    removed: set[int] = set()
    added: list[str] = []
    for dest, value in values.items():
        for flag in flags:
            if flag.dest == dest:
                removed |= _places(words, flag)
        if value != defaults().get(dest) or isinstance(value, bool) != isinstance(defaults().get(dest), bool):
            spelt = spelling(dest, value)
            if spelt is None:
                return None
            added.extend(spelt)
    return removed, tuple(added)


def spelling(dest: str, value: Any) -> tuple[str, ...] | None:
    """The words that give ``dest`` this value; None where no flag does."""
    for name, spec in flag_table().items():
        if spec.dest != dest:
            continue
        if spec.values == "0":
            if spec.value_if_given(name) is value:
                return (name,)
        elif value is not None and not isinstance(value, bool):
            return (name, _value_text(spec, value))
    return None


def _value_text(spec: FlagSpec, value: Any) -> str:
    if isinstance(value, tuple) and "list expression" not in spec.type:
        return ",".join(map(str, value))
    return shown_value(spec.dest, value)


def _places(words: Sequence[Word], flag: Flag) -> set[int]:
    """Where a flag and its values stand among the words."""
    for index, word in enumerate(words):
        if (word.line, word.column) == (flag.line, flag.column) and word.text.partition("=")[0] == flag.name:
            return set(range(index, index + 1 + (0 if "=" in word.text else len(flag.words))))
    return set()


# ---- what the catalogue's preset says ----


def _catalogue(case: Case) -> PresetFile | None:
    """The preset of the same name that comes with the harness, where the case is of another file."""
    tree = default_tree()
    path = tree / f"{case.preset}.sh"
    if not path.is_file() or path.resolve() == Path(case.path).resolve():
        return None
    (found,) = find_presets([case.preset], tree)
    return found


def _of_another(words: Sequence[Word], flags: Sequence[Flag], other: PresetFile) -> Iterator[Change]:
    theirs, _ = parse_flags(words_of(other.path))
    ours = {flag.dest: flag for flag in flags}
    wanted = {flag.dest: flag for flag in theirs}
    for dest in dict.fromkeys((*ours, *wanted)):
        mine, their = ours.get(dest), wanted.get(dest)
        if mine is not None and their is not None and mine.value == their.value:
            continue
        shown = mine or their
        assert shown is not None
        yield Change(
            dest,
            shown.name,
            mine.line if mine else None,
            (" ".join(mine.words) or "on") if mine else "(not set)",
            (" ".join(their.words) or "on") if their else _REMOVED,
            shown_path(other.path),
            frozenset(index for flag in flags if flag.dest == dest for index in _places(words, flag)),
            (their.name, *their.words) if their else (),
        )


# ---- what is refused, and no reference has ----


def _refused(case: Case, words: Sequence[Word], flags: Sequence[Flag]) -> Iterator[Change]:
    """Flags that the parser or the reference stage finds fault with, taken out."""
    report = lint(PresetFile(case.preset, Path(case.path)))
    table = flag_table()
    starts = {min(places) for flag in flags if (places := _places(words, flag))}
    for finding in report.findings:
        if not finding.is_error or finding.stage not in ("parse", "reference"):
            continue
        index = _place_of(finding, words)
        if index is None:
            continue
        stop = index + 1
        while stop < len(words) and stop not in starts and not words[stop].text.startswith("--"):
            stop += 1
        name = words[index].text.partition("=")[0]
        dest = table[name].dest if name in table else name
        before = " ".join(word.text for word in words[index + 1 : stop]) or "on"
        yield Change(
            dest,
            name,
            finding.line,
            before,
            "nothing",
            "no reference has it",
            frozenset(range(index, stop)),
            (),
        )


def _place_of(finding: Finding, words: Sequence[Word]) -> int | None:
    for index, word in enumerate(words):
        if (word.line, word.column) == (finding.line, finding.column):
            return index
    return None
