"""Patterns: a recipe and the names of a model's quantizers -> entries that fit nothing, and misspelt ones.

An entry that fits no quantizer is no fault by itself: ModelOpt's recipes name the layers of many models, in
several naming schemes. It is misspelt where a word of it, or one star or dot, is an edit away from what the
model has, unless ModelOpt's own patterns use that word too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from harness.recipes import Entry, Recipe, find_recipe, names
from harness.roles import Role, is_part, role_of, spoken_of

_LITERAL = re.compile(r"\[[^\]]*\]|[*?.]")  # what stands between the words of a pattern
_NUMBER = re.compile(r"(?<![A-Za-z_\d])\d+(?![A-Za-z_\d])")
# Below this many letters, parts of a name between underscores are too alike to say anything.
_LEAST_LETTERS = 5


@dataclass(frozen=True, slots=True)
class Misspelt:
    """An entry that fits nothing, the pattern that is probably meant, and a quantizer that it would fit."""

    entry: Entry
    meant: str
    quantizer: str


def idle(recipe: Recipe, quantizers: Collection[str]) -> tuple[Entry, ...]:
    """The entries that turn something on and fit none of ``quantizers``, by name."""
    some = kinds(recipe, quantizers)
    return tuple(entry for entry in recipe.entries if entry.enable and not _fits(entry.pattern, some))


def misspelt(recipe: Recipe, quantizers: Collection[str]) -> tuple[Misspelt, ...]:
    """Those of the idle entries that name something ``quantizers`` have, in other letters."""
    found = []
    quantizers = kinds(recipe, quantizers)
    for entry in idle(recipe, quantizers):
        # A number that no layer has is no misspelling: a model may be shorter than the recipe's.
        if _fits(_NUMBER.sub("*", entry.pattern), quantizers):
            continue
        meant = next(_near(entry.pattern, quantizers), None)
        if meant is not None:
            found.append(Misspelt(entry, *meant))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Unreached:
    """An entry that fits nothing, what it speaks of, and such a quantizer, which no other entry names."""

    entry: Entry
    role: Role
    quantizer: str


def unreached(recipe: Recipe, quantizers: Collection[str]) -> tuple[Unreached, ...]:
    """The entries that fit nothing and speak of modules which the model has under another name.

    Not where another entry that names such modules fits them: recipes spell out one thing in several
    naming schemes. Of entries that turn off, those of the user's own whose modules are left on: ModelOpt's
    leave out the parts of many models.
    """
    quantizers = kinds(recipe, quantizers)
    found = []
    for entry in recipe.entries:
        if entry.shipped and not entry.enable:
            continue
        roles = spoken_of(entry.pattern)
        if not roles or _fits(_NUMBER.sub("*", entry.pattern), quantizers):
            continue
        attribute = entry.pattern.rpartition(".")[2].rpartition("*")[2]
        mine = {
            name: role
            for name in quantizers
            if (role := role_of(name)) in roles and (fnmatchcase(name, f"*{attribute}") or not entry.enable)
        }
        others = [
            each.pattern
            for each in recipe.entries
            if each is not entry and each.enable == entry.enable and spoken_of(each.pattern)
        ]
        if any(_fits(pattern, mine) for pattern in others):
            continue
        name = next((name for name in mine if entry.enable or _is_on(recipe, name)), None)
        if name is not None:
            found.append(Unreached(entry, mine[name], name))
    return tuple(found)


def _is_on(recipe: Recipe, quantizer: str) -> bool:
    path, _, attribute = quantizer.rpartition(".")
    return bool(recipe.formats_of(path, attribute))


def strange(recipe: Recipe, quantizers: Collection[str]) -> tuple[Entry, ...]:
    """Those of the idle entries of which some word is neither Megatron's nor in any recipe of ModelOpt's."""
    known = modelopts_words() | _words_of(tuple(kinds(recipe, quantizers)))
    return tuple(
        entry
        for entry in idle(recipe, quantizers)
        if any(not any(word in each for each in known) and not is_part(word) for word in words(entry.pattern))
    )


def kinds(recipe: Recipe, quantizers: Collection[str]) -> Collection[str]:
    """One quantizer of each kind, where no pattern tells layers and experts apart: there may be thousands."""
    if recipe.by_layer:
        return quantizers
    first: dict[str, str] = {}
    for name in quantizers:
        first.setdefault(_NUMBER.sub("*", name), name)
    return tuple(first.values())


def _fits(pattern: str, quantizers: Collection[str]) -> str | None:
    """The first quantizer that ``pattern`` matches; a member of a container counts as the container."""
    return next(
        (name for name in quantizers if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.0", pattern)), None
    )


def _near(pattern: str, quantizers: Collection[str]) -> Iterator[tuple[str, str]]:
    """(pattern, quantizer that it matches) of what could be meant, the nearest first."""
    for candidate in _candidates(pattern, _words_of(tuple(quantizers))):
        quantizer = _fits(candidate, quantizers)
        if quantizer is not None:
            yield candidate, quantizer


def _candidates(pattern: str, known: Collection[str]) -> Iterator[str]:
    strange = [word for word in words(pattern) if not any(word in each for each in known)]
    if not strange:
        # Every word is the model's: a star or a dot is too many or missing.
        yield from _restarred(pattern)
        return
    if len(strange) == 1:
        (word,) = strange
        near = [each for each in sorted(known) if _alike(word, each)]
        if near and word not in modelopts_words():
            yield from (pattern.replace(word, each) for each in near)
    elif [word for word in strange if word.lower() != word] == strange:
        yield pattern.lower()


def _restarred(pattern: str) -> Iterator[str]:
    for index in range(len(pattern) + 1):
        yield f"{pattern[:index]}*{pattern[index:]}"
    for index, letter in enumerate(pattern):
        if letter in "*.?":
            yield pattern[:index] + pattern[index + 1 :]


def words(pattern: str) -> tuple[str, ...]:
    """The words of a pattern: what stands between its dots, stars and brackets; numbers are none."""
    return tuple(word for word in _LITERAL.split(pattern) if word and not word.isdigit())


@cache
def _words_of(quantizers: tuple[str, ...]) -> frozenset[str]:
    whole = {word for name in quantizers for word in words(name)}
    parts = {part for word in whole for part in word.split("_") if len(part) >= _LEAST_LETTERS}
    return frozenset(whole | parts)


@cache
def modelopts_words() -> frozenset[str]:
    """Every word in a pattern of a recipe that ModelOpt brings along: in some model it names something."""
    recipes = map(find_recipe, names())
    return frozenset(word for each in recipes for entry in each.entries for word in words(entry.pattern))


def _alike(word: str, other: str) -> bool:
    """Whether two words differ by case, or by one letter more, less, changed, or with its neighbour."""
    word, other = word.lower(), other.lower()
    if abs(len(word) - len(other)) > 1 or min(len(word), len(other)) < 2:
        return False
    start = 0
    while start < min(len(word), len(other)) and word[start] == other[start]:
        start += 1
    left, right = word[start:], other[start:]
    swapped = left[:2] == right[1::-1] and left[2:] == right[2:]
    return left[1:] == right[1:] or left[1:] == right or left == right[1:] or swapped
