"""Bash text -> the same text without line continuations, each character with its place in the file."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from dataclasses import dataclass

from tree_sitter import Node


@dataclass(frozen=True, slots=True)
class Source:
    """Shell text without its line continuations; ``at`` holds where each character stands in the file."""

    text: str
    at: array[int]
    line_starts: list[int]

    def of(self, node: Node) -> str:
        return self.text[self.start(node) : node.end_byte]

    def start(self, node: Node) -> int:
        """Where a node begins: the grammar counts the blanks before "  $A" to it."""
        blanks = _BLANKS.match(self.text, node.start_byte, node.end_byte)
        return blanks.end() if blanks else node.start_byte

    def offset(self, index: int) -> int:
        if index < len(self.at):
            return self.at[index]
        return self.at[-1] + 1 if self.at else 0

    def place(self, offset: int) -> tuple[int, int]:
        """Line and column, both from one."""
        line = bisect_right(self.line_starts, offset)
        return line, offset - self.line_starts[line - 1] + 1


_BLANKS = re.compile(r"[ \t\n]*")
_QUOTING = re.compile(
    r"""(?P<joined>\\\n)
    | (?P<escaped>\\.)
    | (?P<comment>(?<![^ \t\n;&|()<>])\#[^\n]*)
    | (?P<single>\$'(?:[^'\\]|\\.)*+' | '[^']*+')
    | (?P<double>"(?:[^"\\]|\\.)*+")
    | (?P<opened>['"])
    | (?P<plain>[^\\'"\#$]+ | [\#$\\])""",
    re.VERBOSE | re.DOTALL,
)
_SWALLOWED = re.compile(r"\n[ \t]*[A-Za-z_]\w*\+?=")  # an assignment inside a string: its end was forgotten
_EXPANSION_WEIGHT = 16  # an expansion in quotes costs as much as so many characters outside


def join_lines(text: str) -> tuple[Source, int, int | None]:
    """Takes line continuations out, as bash does before anything else.

    Also tells how much code stands outside quotes, and the offset of a quote that is never closed.
    """
    cuts: list[int] = []
    weight, position, suspect, opened = 0, 0, None, None
    while opened is None and (match := _QUOTING.match(text, position)):
        kind, found, start, position = match.lastgroup, match[0], match.start(), match.end()
        if kind == "opened":
            opened = start if suspect is None else suspect
            weight += len(text) - start
        elif kind == "joined":
            cuts.append(start)
        elif kind == "double":
            pairs = re.finditer(r"\\.", found, re.DOTALL)
            cuts += [start + pair.start() for pair in pairs if pair[0] == "\\\n"]
            weight += 2 + _EXPANSION_WEIGHT * (found.count("$") + found.count("`"))
            suspect = start if suspect is None and _SWALLOWED.search(found) else suspect
        else:
            weight += len(re.sub(r"\s+", "", found)) if kind == "plain" else 2
    at, parts, position = array("I"), [], 0
    for cut in [*cuts, len(text)]:
        at.extend(range(position, cut))
        parts.append(text[position:cut])
        position = cut + 2
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    return Source("".join(parts), at, line_starts), weight, opened
