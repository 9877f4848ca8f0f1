"""Bash text to the variables it would set, and each variable to the words it hands to a command; nothing is run.

A preset comes from strangers, so it is only read: ``tree-sitter-bash`` gives the structure, this module
walks the assignments, tests and ifs that a preset may hold, and ``shell_expand`` reads the words. Either
the values are exactly those that bash would have, or there is an error finding and no value at all.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import tree_sitter
import tree_sitter_bash
from tree_sitter import Node

from harness.finding import Finding, Severity
from harness.shell_expand import (
    BLANKS,
    INTEGER,
    Context,
    Expander,
    Field,
    Refused,
    Source,
    Value,
    parameter,
)

ARGUMENT_VARIABLES = ("MODEL_ARGS", "MLM_EXTRA_ARGS")
MAX_BYTES = 1 << 20
MAX_DEPTH = 100  # nested syntax; a preset needs about ten
MAX_CODE = (
    8192  # characters of shell outside quotes and comments: the grammar's error recovery is quadratic in it
)


@dataclass(frozen=True, slots=True)
class Word:
    """One argument after word splitting; line and column (from one, in characters) are its first character's.

    ``quoted``: an array element written in quotes, which bash neither splits nor matches against files.
    """

    text: str
    line: int
    column: int
    quoted: bool


@dataclass(frozen=True, slots=True)
class Variable:
    """The final value of a variable, and the words that $NAME, or "${NAME[@]}" of an array, hands to a command."""

    name: str
    text: str
    words: tuple[Word, ...]
    line: int
    column: int
    is_array: bool


@dataclass(frozen=True, slots=True)
class Script:
    """The variables that a file sets, and what is wrong with it. None are told if its values cannot be."""

    variables: Mapping[str, Variable]
    findings: tuple[Finding, ...]


def read_script(data: bytes, *, environment: Mapping[str, str] | None = None) -> Script:
    """What bash would hold after sourcing ``data`` with ``environment`` set; never raises on any bytes."""
    if len(data) > MAX_BYTES:
        return _only(1, 1, f"the file is larger than {MAX_BYTES} bytes: not read")
    text = data.decode("utf-8", errors="surrogateescape")
    places = _Places(text)
    for pattern, message in _NOT_TEXT:
        if found := pattern.search(text):
            return _only(*places.of(found.start()), message)
    source, weight, opened = _join_lines(text)
    if weight > MAX_CODE:
        return _only(1, 1, f"more than {MAX_CODE} characters of shell outside quotes: too much for a preset")
    root = _parser().parse(re.sub(r"[^\x00-\x7f]", "%", source.text).encode()).root_node
    findings = _Findings(places)
    if root.has_error and opened is not None:
        findings.error(opened, f"the quote {text[opened]} that opens here is never closed")
        return Script({}, findings.all())
    for index, message in _syntax_faults(root, source):
        findings.error(_offset(source, index), message)
    if findings.all():
        return Script({}, findings.all())
    interpreter = _Interpreter(source, findings, environment or {})
    interpreter.run(root)
    held = {} if interpreter.expander.broken else interpreter.expander.variables
    variables = {
        name: _variable(name, value, places, source) for name, value in held.items() if value.from_file
    }
    for name in ARGUMENT_VARIABLES:
        if name in variables:
            _check_words(variables[name], findings)
    return Script(variables, findings.all())


# The file and its places

_NOT_TEXT = (
    (
        re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\udc80-\udcff]"),
        "not a text file: a byte that is no UTF-8 text",
    ),
    (re.compile(r"\A\ufeff"), "a byte order mark: bash takes it for a part of the first command"),
    (re.compile(r"\r"), "a carriage return: bash keeps it in the words; save the file with Unix line ends"),
)

# What quotes, comments and line continuations look like to bash, wherever they may begin.
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
_PAIR = re.compile(r"\\.", re.DOTALL)
_SWALLOWED = re.compile(
    r"\n[ \t]*[A-Za-z_]\w*\+?=", re.ASCII
)  # an assignment inside a string: a quote was forgotten
_EXPANSION_WEIGHT = 16


class _Places:
    """Offsets in the file to line and column, both from one."""

    def __init__(self, text: str) -> None:
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def of(self, offset: int) -> tuple[int, int]:
        line = bisect_right(self.starts, offset)
        return line, offset - self.starts[line - 1] + 1


class _Findings:
    """Findings in the order of the file, the same one never twice."""

    def __init__(self, places: _Places) -> None:
        self.places = places
        self.found: dict[tuple[int, int, str], Finding] = {}

    def error(self, offset: int, message: str) -> None:
        self.add(Severity.ERROR, *self.places.of(offset), message)

    def warning(self, offset: int, message: str) -> None:
        self.add(Severity.WARNING, *self.places.of(offset), message)

    def add(self, severity: Severity, line: int, column: int, message: str) -> None:
        self.found[line, column, message] = Finding("parse", severity, message, line=line, column=column)

    def all(self) -> tuple[Finding, ...]:
        return tuple(self.found[key] for key in sorted(self.found))


def _only(line: int, column: int, message: str) -> Script:
    return Script({}, (Finding("parse", Severity.ERROR, message, line=line, column=column),))


def _offset(source: Source, index: int) -> int:
    """An index in the joined text (its end included) to an offset in the file."""
    if index < len(source.at):
        return source.at[index]
    return source.at[-1] + 1 if source.at else 0


def _join_lines(text: str) -> tuple[Source, int, int | None]:
    """Takes line continuations out as bash does before anything else; also how much code there is outside
    quotes, and where a quote opens that never closes.
    """
    cuts: list[int] = []
    weight, position, suspect = 0, 0, None
    while match := _QUOTING.match(text, position):
        kind, found, start, position = match.lastgroup, match[0], match.start(), match.end()
        if kind == "opened":
            return _cut(text, cuts), weight, start if suspect is None else suspect
        if kind == "joined":
            cuts.append(start)
        elif kind == "double":
            cuts += [start + pair.start() for pair in _PAIR.finditer(found) if pair[0] == "\\\n"]
            weight += 2 + _EXPANSION_WEIGHT * (found.count("$") + found.count("`"))
            if suspect is None and _SWALLOWED.search(found):
                suspect = start
        elif kind != "comment":
            weight += sum(len(run) for run in found.split()) if kind == "plain" else 2
    return _cut(text, cuts), weight, None


def _cut(text: str, cuts: Sequence[int]) -> Source:
    at, parts, position = array("I"), [], 0
    for cut in [*cuts, len(text)]:
        at.extend(range(position, cut))
        parts.append(text[position:cut])
        position = cut + 2
    return Source("".join(parts), at)


@cache
def _parser() -> tree_sitter.Parser:
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))


# What the syntax tree may hold

_REFUSED_NODES = {
    "command_substitution": "command substitution",
    "process_substitution": "process substitution",
    "pipeline": "a pipe",
    "file_redirect": "a redirection",
    "heredoc_redirect": "a here-document",
    "herestring_redirect": "a here-string",
    "function_definition": "a function",
    "for_statement": "a loop",
    "c_style_for_statement": "a loop",
    "while_statement": "a loop",
    "case_statement": "`case`",
    "subshell": "a subshell",
    "compound_statement": "a command group",
    "translated_string": "a translated string",
    "subscript": "an array subscript",
    "brace_expression": "brace expansion",
    "&": "a background job",
    ";;": "`;;` outside of `case`",
}
_STRUCTURE = frozenset(
    "program if_statement elif_clause else_clause list negated_command redirected_statement variable_assignments "
    "declaration_command unset_command".split()
)
_KNOWN_NODES = _STRUCTURE | frozenset(
    "variable_assignment variable_name comment command command_name test_command test_operator word number string "
    "string_content raw_string ansi_c_string concatenation simple_expansion expansion arithmetic_expansion array "
    "binary_expression unary_expression parenthesized_expression extglob_pattern regex".split()
)
_CLOSERS = frozenset(("fi", ")", "))", "}", "]", "]]", '"', "`", "done", "esac"))
_COMMANDS = (":", "true", "test", "set")
_ONLY = "is refused: a preset may only assign variables"


def _syntax_faults(root: Node, source: Source) -> Iterator[tuple[int, str]]:
    """Every place where the tree is broken, too deep, or holds what a preset may not; nothing inside one twice."""
    stack = [(root, root, 0)]
    while stack:
        node, parent, depth = stack.pop()
        if depth > MAX_DEPTH:
            yield node.start_byte, f"nested deeper than {MAX_DEPTH} levels"
            return
        if fault := _fault(node, parent, source):
            yield fault
        else:
            stack.extend((child, node, depth + 1) for child in reversed(node.children))


def _fault(node: Node, parent: Node, source: Source) -> tuple[int, str] | None:
    start = node.start_byte
    if node.is_missing and node.type in _CLOSERS:
        return parent.start_byte, f"what opens here is never closed: `{node.type}` is missing"
    if node.is_missing:
        return start, f"a syntax error: `{node.type}` is missing here"
    if node.type == "ERROR":
        token = next((child for child in node.children if not child.is_named and child.type != ";"), node)
        return token.start_byte, f"a syntax error at `{source.of(token)[:40]}`"
    if node.type == "subscript" and parent.type == "expansion":
        return None
    if node.type in _REFUSED_NODES and (node.is_named or parent.type in _STRUCTURE):
        return start, f"{_REFUSED_NODES[node.type]} {_ONLY}"
    if node.is_named and node.type not in _KNOWN_NODES:
        return start, f"{node.type.replace('_', ' ')} {_ONLY}"
    if node.type == "command":
        return _command_fault(node, source)
    if node.type == "test_command" and source.text.startswith("((", start):
        return start, f"an arithmetic command {_ONLY}"
    if node.type in ("simple_expansion", "expansion"):
        return _parameter_fault(node, source)
    return _gap_fault(node, source) if node.type in _STRUCTURE else None


def _command_fault(node: Node, source: Source) -> tuple[int, str] | None:
    first = node.children[0]
    name = source.of(first)
    if first.type == "variable_assignment":
        return node.start_byte, f"an assignment before a command {_ONLY}"
    if not name:
        return node.start_byte, "a syntax error: a command is missing here"
    return None if name in _COMMANDS else (node.start_byte, f"the command `{name[:40]}` {_ONLY}")


def _parameter_fault(node: Node, source: Source) -> tuple[int, str] | None:
    if node.type == "simple_expansion" and source.text[node.start_byte + 1 :][:1] in BLANKS:
        return None  # a lone dollar, which the grammar takes for an expansion
    try:
        parameter(source, node)
    except Refused as refused:
        return refused.offset, refused.message
    return None


def _gap_fault(node: Node, source: Source) -> tuple[int, str] | None:
    """Between statements and keywords there may be blanks only: what the tree skipped is not skipped here."""
    whole = node.type == "program"
    position, end = (0, len(source.text)) if whole else (node.start_byte, node.end_byte)
    for start, stop in [*((child.start_byte, child.end_byte) for child in node.children), (end, end)]:
        gap = source.text[position:start]
        if gap.strip(BLANKS):
            return position + len(gap) - len(
                gap.lstrip(BLANKS)
            ), f"a syntax error at `{gap.strip(BLANKS)[:40]}`"
        position = stop
    return None


# Statements

_DECLARATIONS = {"declare": ("-a", "-x"), "typeset": ("-a", "-x"), "export": (), "readonly": ()}
_ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<append>\+?)=", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SET_OPTIONS = re.compile(r"([ \t]+-([eux]+|[eux]*o[ \t]+pipefail))+")


class _Interpreter:
    """Walks the statements that bash would run, in order; of those it would not, only the text is judged."""

    def __init__(self, source: Source, findings: _Findings, environment: Mapping[str, str]) -> None:
        self.source, self.findings = source, findings
        self.expander = Expander(source, environment)

    def run(self, root: Node) -> None:
        if not self._block(root.children) and not self.expander.broken:
            last = [node for node in root.children if node.is_named and node.type != "comment"][-1]
            self._warn_failing(last)

    def _warn_failing(self, node: Node) -> None:
        message = "this fails: a script that sources the preset under `set -e` ends here"
        self.findings.warning(_offset(self.source, node.start_byte), message)

    def _block(self, nodes: Sequence[Node], *, tested: bool = False) -> bool:
        status = True
        for node in nodes:
            if node.is_named and node.type != "comment":
                status = self._statement(node)
                if not status and not tested and node.type in ("test_command", "command"):
                    self._warn_failing(node)
        return status

    def _statement(self, node: Node) -> bool:
        """Runs one statement and tells its exit status; a refusal ends the reading of values, not of the text."""
        try:
            if node.type not in _STATEMENTS:
                raise Refused(f"{node.type.replace('_', ' ')} {_ONLY}", node.start_byte)
            self._check_end(node)
            return _STATEMENTS[node.type](self, node)
        except Refused as refused:
            self.findings.error(_offset(self.source, refused.offset), refused.message)
            self.expander.broken = self.expander.dry = True
            return True

    def _check_end(self, node: Node) -> None:
        after = self.source.text[node.end_byte : node.end_byte + 1]
        if after and after not in " \t\n;&|)":
            raise Refused(f"a syntax error at `{after}`", node.end_byte)

    def _if(self, node: Node) -> bool:
        taken, chosen, status = False, False, True
        for keyword, nodes in _sections(node):
            if keyword in ("if", "elif"):
                with self.expander.only_if(not taken):
                    chosen = self._block(nodes, tested=True) and not taken
            else:
                with self.expander.only_if(chosen if keyword == "then" else not taken):
                    result = self._block(nodes)
                if chosen if keyword == "then" else not taken:
                    taken, status = True, result
        return status

    def _list(self, node: Node) -> bool:
        left, operator, right = (child for child in node.children if child.type != "comment")
        status = self._statement(left)
        live = status is (operator.type == "&&")
        with self.expander.only_if(live):
            result = self._statement(right)
        return result if live else status

    def _negated(self, node: Node) -> bool:
        if self.source.text[node.start_byte + 1] not in BLANKS:
            raise Refused("a syntax error at `!`", node.start_byte)
        return not self._statement(node.children[-1])

    def _assignments(self, node: Node) -> bool:
        for child in node.children if node.type == "variable_assignments" else [node]:
            self._store(*self._assigned(child))
        return True

    def _assigned(self, node: Node, *, braces: bool = False) -> tuple[str, bool, Value]:
        match = _ASSIGNMENT.match(self.source.text, node.start_byte)
        value = node.children[-1]
        if not match:
            raise Refused("a syntax error in an assignment", node.start_byte)
        self._check_end(node)
        if value.type == "array" and value.start_byte == match.end():
            fields = self.expander.elements(value)
        else:
            fields = [self.expander.scalar(node, match.end(), node.end_byte, braces=braces)]
        return (
            match["name"],
            bool(match["append"]),
            Value(tuple(fields), value.type == "array", node.start_byte),
        )

    def _store(self, name: str, append: bool, value: Value) -> None:
        old = self.expander.lookup(name, value.start) if append else None
        if old:
            value = self.expander.appended(old, value)
        self.expander.assign(name, value, value.start)

    def _declaration(self, node: Node) -> bool:
        keyword, *rest = node.children
        if keyword.type not in _DECLARATIONS:
            raise Refused(
                f"`{keyword.type}` is refused: it has no meaning outside a function", node.start_byte
            )
        options = [self.source.of(child) for child in rest if child.type == "word"]
        assigned = [child for child in rest if child.type == "variable_assignment"]
        names = [child for child in rest if child.type == "variable_name"]
        for child in rest:
            allowed = self.source.of(child) in _DECLARATIONS[keyword.type] if child.type == "word" else True
            if not allowed or child.type not in ("word", "variable_assignment", "variable_name"):
                message = (
                    f"`{keyword.type} {self.source.of(child)[:40]}` is refused: only NAME=value is supported"
                )
                raise Refused(message, child.start_byte)
        # bash expands every argument before it assigns the first
        values = [self._assigned(child, braces=True) for child in assigned]
        arrays = sum(value.is_array for _, _, value in values)
        if (len(values) > 1 and arrays) or ("-a" in options and (names or arrays < len(values))):
            raise Refused(f"`{keyword.type}` of arrays must hold one NAME=(...) alone", node.start_byte)
        for child in rest:
            name = self.source.of(child)
            if child.type == "variable_assignment":
                name = values[0][0]
                self._store(*values.pop(0))
            if keyword.type == "readonly" and not self.expander.dry:
                self.expander.readonly.add(name)
        return True

    def _unset(self, node: Node) -> bool:
        for child in node.children[1:]:
            name = self.source.of(child)
            if name == "-v":
                continue
            if not _NAME.fullmatch(name):
                raise Refused(
                    f"`unset {name[:40]}` is refused: only variable names are supported", child.start_byte
                )
            self.expander.unset(name, child.start_byte)
        return True

    def _command(self, node: Node) -> bool:
        name, start = self.source.of(node.children[0]), node.children[0].end_byte
        if name == "set":
            return self._set(node, self.source.text[start : node.end_byte])
        fields = self.expander.words(node, start, node.end_byte)
        return self._test(fields, node.start_byte) if name == "test" else True

    def _set(self, node: Node, options: str) -> bool:
        if not _SET_OPTIONS.fullmatch(options):
            raise Refused("`set` is refused with anything but -e, -u, -x and -o pipefail", node.start_byte)
        self.findings.warning(
            _offset(self.source, node.start_byte), "`set` changes the shell that sources the preset"
        )
        if "u" in options.replace("pipefail", "") and not self.expander.dry:
            self.expander.nounset = True
        return True

    # Tests

    def _test_command(self, node: Node) -> bool:
        double = self.source.text.startswith("[[", node.start_byte)
        context = Context.TEST if double else Context.WORDS
        fields = self.expander.words(node, node.start_byte, node.end_byte, context)
        closers = [field.text for field in fields if field.literal][-1:]
        if fields[0].text != ("[[" if double else "[") or closers != ["]]" if double else "]"]:
            raise Refused("a syntax error in a test", node.start_byte)
        if not double:
            return self._test(fields[1:-1], node.start_byte)
        if lazy := re.search(r"\$\{\w+:?[=?]", self.source.of(node), re.ASCII):
            raise Refused(
                "an expansion that assigns or fails is refused inside [[ ]]", node.start_byte + lazy.start()
            )
        _check_operators(fields)
        return _Conditional(self, fields[1:-1], node.start_byte).value()

    def _test(self, fields: Sequence[Field], start: int) -> bool:
        """test and [: bash decides by the number of arguments that are left after splitting."""
        _check_operators(fields)
        for field in fields:
            if field.globs:
                self.expander.undecidable("an unquoted * ? [ in a test is matched against files", field.start)
        return self._decide([field.text for field in fields], start)

    def _decide(self, arguments: list[str], start: int) -> bool:
        if len(arguments) <= 1:
            return bool(arguments and arguments[0])
        if len(arguments) == 3 and arguments[1] in _BINARY:
            return self.binary(arguments[0], arguments[1], arguments[2], start)
        if arguments[0] == "!" and len(arguments) <= 4:
            return not self._decide(arguments[1:], start)
        if len(arguments) == 2 and arguments[0] in _UNARY:
            return self.unary(arguments[0], arguments[1], start)
        self.expander.undecidable(f"bash cannot decide the test `{' '.join(arguments)[:60]}`", start)
        return True

    def unary(self, operator: str, operand: str, start: int) -> bool:
        if operator != "-v":
            return bool(operand) is (operator == "-n")
        if "[" in operand:
            raise Refused(f"an array subscript {_ONLY}", start)
        if not _NAME.fullmatch(operand):
            self.expander.undecidable(f"`{operand[:40]}` is no variable name", start)
            return True
        value = self.expander.lookup(operand, start)
        return bool(value and value.fields)

    def binary(self, left: str, operator: str, right: str, start: int) -> bool:
        compare = _BINARY[operator]
        if operator in ("=", "==", "!="):
            return (left == right) is (operator != "!=")
        for operand in (left, right):
            if not INTEGER.fullmatch(operand):
                self.expander.undecidable(
                    f"{operator} compares integers: `{operand[:40]}` is not a plain one", start
                )
                return True
        return compare(int(left), int(right))


_BINARY: dict[str, Callable[[int, int], bool]] = {
    "=": int.__eq__,
    "==": int.__eq__,
    "!=": int.__ne__,
    "-eq": int.__eq__,
    "-ne": int.__ne__,
    "-lt": int.__lt__,
    "-le": int.__le__,
    "-gt": int.__gt__,
    "-ge": int.__ge__,
}
_UNARY = ("-z", "-n", "-v")
_FILE_TESTS = frozenset(f"-{letter}" for letter in "bcdefghkprstuwxGLNORS") | {"-nt", "-ot", "-ef"}
_OTHER_TESTS = {"-a": "-a in a test", "-o": "-o in a test", "=~": "a regular expression"}


class _Conditional:
    """Recursive descent over the words of [[ ]]; what && and || skip is not judged by its values."""

    def __init__(self, interpreter: _Interpreter, fields: Sequence[Field], start: int) -> None:
        self.interpreter, self.fields, self.start, self.index = interpreter, fields, start, 0
        if len(fields) > MAX_DEPTH:
            raise Refused(f"a test of more than {MAX_DEPTH} words is refused", start)

    def value(self) -> bool:
        result = self._any()
        if self.index < len(self.fields):
            raise Refused("a syntax error in a test", self.fields[self.index].start)
        return result

    def _is(self, text: str) -> bool:
        field = self.fields[self.index] if self.index < len(self.fields) else None
        found = bool(field and field.text == text and (field.operator or field.literal))
        self.index += found
        return found

    def _word(self) -> Field:
        if self.index >= len(self.fields) or self.fields[self.index].operator:
            raise Refused("a syntax error in a test", self.start)
        self.index += 1
        return self.fields[self.index - 1]

    def _any(self) -> bool:
        result = self._all()
        while self._is("||"):
            with self.interpreter.expander.only_if(not result):
                result = self._all() or result
        return result

    def _all(self) -> bool:
        result = self._not()
        while self._is("&&"):
            with self.interpreter.expander.only_if(result):
                result = self._not() and result
        return result

    def _not(self) -> bool:
        if self._is("!"):
            return not self._not()
        if self._is("("):
            result = self._any()
            if not self._is(")"):
                raise Refused("a syntax error in a test", self.start)
            return result
        word = self._word()
        if word.literal and word.text in _UNARY:
            return self.interpreter.unary(word.text, self._word().text, word.start)
        following = self.fields[self.index] if self.index < len(self.fields) else None
        if not following or following.operator:
            return bool(word.text)
        operator, right = self._word(), self._word()
        if not operator.literal or operator.text not in _BINARY:
            raise Refused(f"the test `{operator.text[:40]}` is refused", operator.start)
        if right.globs and operator.text in ("=", "==", "!="):
            raise Refused("a pattern match is refused: quote the right side", right.start)
        return self.interpreter.binary(word.text, operator.text, right.text, operator.start)


def _check_operators(fields: Sequence[Field]) -> None:
    for field in fields:
        if field.literal and field.text in _FILE_TESTS:
            raise Refused(
                f"the test `{field.text}` is refused: it depends on the machine's files", field.start
            )
        if field.literal and field.text in _OTHER_TESTS:
            raise Refused(
                f"{_OTHER_TESTS[field.text]} is refused: write plain tests with && or ||", field.start
            )


def _sections(node: Node) -> list[tuple[str, list[Node]]]:
    """An if statement as (keyword, statements), flat: if, then, elif, then, else."""
    sections: list[tuple[str, list[Node]]] = []
    children = list(node.children)
    for child in children:
        for part in child.children if child.type in ("elif_clause", "else_clause") else [child]:
            if not part.is_named and part.type in ("if", "then", "elif", "else"):
                sections.append((part.type, []))
            elif part.is_named and part.type != "comment":
                sections[-1][1].append(part)
    for keyword, nodes in sections:
        if not nodes:
            raise Refused(f"a syntax error: `{keyword}` without a command", node.start_byte)
    return sections


_STATEMENTS: dict[str, Callable[[_Interpreter, Node], bool]] = {
    "variable_assignment": _Interpreter._assignments,
    "variable_assignments": _Interpreter._assignments,
    "declaration_command": _Interpreter._declaration,
    "unset_command": _Interpreter._unset,
    "if_statement": _Interpreter._if,
    "list": _Interpreter._list,
    "negated_command": _Interpreter._negated,
    "command": _Interpreter._command,
    "test_command": _Interpreter._test_command,
}


# Words


def _variable(name: str, value: Value, places: _Places, source: Source) -> Variable:
    line, column = places.of(_offset(source, value.start))
    words = []
    for field in value.fields:
        if value.is_array:
            at = field.at[0] if field.at else _offset(source, field.start)
            words.append(Word(field.text, *places.of(at), field.quoted and not field.globs))
        else:
            found = re.finditer(r"[^ \t\n]+", field.text)
            words += [Word(match[0], *places.of(field.at[match.start()]), False) for match in found]
    text = " ".join(field.text for field in value.fields)
    return Variable(name, text, tuple(words), line, column, value.is_array)


def _check_words(variable: Variable, findings: _Findings) -> None:
    """Words that bash hands over as they are, and that their author cannot have meant."""
    if variable.is_array:
        message = f"{variable.name} is an array: the scripts expand ${{{variable.name}}}, which is its first element"
        findings.add(Severity.WARNING, variable.line, variable.column, message)
    for word in variable.words:
        for severity, wrong, message in _WORD_FAULTS:
            if wrong(word):
                findings.add(severity, word.line, word.column, message.format(word.text[:60]))
                if severity is Severity.ERROR:
                    break


_WORD_FAULTS: tuple[tuple[Severity, Callable[[Word], bool], str], ...] = (
    (
        Severity.ERROR,
        lambda word: (
            (word.text.endswith("\\") and not word.quoted)
            or (bool(word.text) and not word.text.strip(BLANKS))
        ),
        "a stray backslash: the blank after it keeps bash from joining the lines, and `{}` reaches Megatron",
    ),
    (
        Severity.ERROR,
        lambda word: word.text.startswith("#") and not word.quoted,
        "no comment can stand inside quotes: `{}` and what follows reach Megatron",
    ),
    (
        Severity.WARNING,
        lambda word: not word.quoted and bool(set(word.text) & set("'\"")),
        "bash does not read quotes inside a value again: `{}` reaches Megatron with its quotes",
    ),
    (
        Severity.WARNING,
        lambda word: not word.quoted and bool(set(word.text) & set("*?[")),
        "bash matches `{}` against the files of the working directory",
    ),
)
