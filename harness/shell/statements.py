"""Bash text to the variables it sets, and each variable to the words it hands to a command. Nothing is run.

Presets come from strangers, so they are only read: tree-sitter-bash gives the structure, this module walks
the assignments, tests and ifs that a preset may hold, ``shell_syntax`` refuses everything else and
``shell_expand`` reads the words. Either the values are exactly those that bash would have, or there is an
error finding and no value at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import tree_sitter
import tree_sitter_bash
from tree_sitter import Node

from harness.finding import Finding, Severity
from harness.shell.expand import (
    BLANKS,
    INTEGER,
    NAME,
    ONLY,
    Context,
    Expander,
    Field,
    Refused,
    Value,
)
from harness.shell.source import Source, join_lines
from harness.shell.syntax import syntax_faults

# What Megatron-LM's scripts expand on the command line, in this order.
ARGUMENT_VARIABLES = ("MODEL_ARGS", "MLM_EXTRA_ARGS")
MAX_BYTES = 1 << 20
MAX_CODE = 8192  # characters outside quotes and comments; recovery from errors takes their square in time


@dataclass(frozen=True, slots=True)
class Word:
    """One argument after word splitting, with the place of its first character, from one.

    ``quoted``: an array element written in quotes, which bash does not match against files.
    """

    text: str
    line: int
    column: int
    quoted: bool


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable's final value, and the words that $NAME, or "${NAME[@]}" of an array, hands to a command."""

    name: str
    text: str
    words: tuple[Word, ...]
    line: int
    column: int
    is_array: bool


@dataclass(frozen=True, slots=True)
class Script:
    """The variables that a file sets, none if a value cannot be told, and what is wrong with the file."""

    variables: Mapping[str, Variable]
    findings: tuple[Finding, ...]


def read_script(data: bytes, *, environment: Mapping[str, str] | None = None) -> Script:
    """What bash would hold after sourcing ``data`` with ``environment`` set; no input makes it raise."""
    if len(data) > MAX_BYTES:
        return Script({}, (_error(1, 1, f"the file is larger than {MAX_BYTES} bytes: it is not read"),))
    text = data.decode("utf-8", errors="surrogateescape")
    source, weight, opened = join_lines(text)
    unreadable = _unreadable(text, weight, opened)
    # one byte for each character, so that the tree's bytes count characters
    masked = "" if unreadable else re.sub(r"[^\x00-\x7f]", "%", source.text)
    root = _parser().parse(masked.encode()).root_node
    if root.has_error and opened is not None:
        unreadable = opened, _NEVER_CLOSED.format(text[opened])
    if unreadable:
        return Script({}, (_error(*source.place(unreadable[0]), unreadable[1]),))
    findings = [_at(source, index, message) for index, message in syntax_faults(root, source)]
    variables: dict[str, Variable] = {}
    if not findings:
        interpreter = _Interpreter(source, environment or {})
        interpreter.run(root)
        findings = interpreter.findings
        if not interpreter.expander.broken:
            held = interpreter.expander.variables.items()
            variables = {name: _variable(name, value, source) for name, value in held if value.from_file}
    for name in sorted(variables.keys() & set(ARGUMENT_VARIABLES)):
        findings += _word_faults(variables[name])
    ordered = sorted(dict.fromkeys(findings), key=lambda finding: (finding.line or 0, finding.column or 0))
    return Script(variables, tuple(ordered))


_NOT_TEXT = (
    (re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\udc80-\udcff]"), "not a text file: this byte is no text"),
    (re.compile(r"\A\ufeff"), "a byte order mark: bash takes it for a part of the first command"),
    (re.compile(r"\r"), "a carriage return: bash keeps it in the words, so save with Unix line ends"),
)
_NEVER_CLOSED = "the quote {} that opens here is never closed"


def _unreadable(text: str, weight: int, opened: int | None) -> tuple[int, str] | None:
    for pattern, message in _NOT_TEXT:
        if found := pattern.search(text):
            return found.start(), message
    if weight > MAX_CODE and opened is not None:
        return opened, _NEVER_CLOSED.format(text[opened])
    if weight > MAX_CODE:
        return 0, f"more than {MAX_CODE} characters outside quotes are refused: no preset has so many"
    return None


@cache
def _parser() -> tree_sitter.Parser:
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))


def _error(line: int, column: int, message: str) -> Finding:
    return Finding("parse", Severity.ERROR, message, line=line, column=column)


def _at(source: Source, index: int, message: str, severity: Severity = Severity.ERROR) -> Finding:
    line, column = source.place(source.offset(index))
    return Finding("parse", severity, message, line=line, column=column)


# Statements

_DECLARATIONS = {"declare": ("-a", "-x"), "typeset": ("-a", "-x"), "export": (), "readonly": ()}
_ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<append>\+?)=", re.ASCII)
_SET_OPTIONS = re.compile(r"([ \t]+-([eux]+|[eux]*o[ \t]+pipefail))+")
_FAILS = "this fails: a script that sources the preset under `set -e` ends here"
_LAZY = re.compile(r"\$\{\w+:?[=?]", re.ASCII)


class _Interpreter:
    """Walks the statements that bash would run; of those that it would not, only the text is judged."""

    def __init__(self, source: Source, environment: Mapping[str, str]) -> None:
        self.source = source
        self.expander = Expander(source, environment)
        self.findings: list[Finding] = []

    def run(self, root: Node) -> None:
        statements = [node for node in root.children if node.is_named and node.type != "comment"]
        if not self._block(statements):
            self._warn(statements[-1], _FAILS)

    def _warn(self, node: Node, message: str) -> None:
        self.findings.append(_at(self.source, node.start_byte, message, Severity.WARNING))

    def _block(self, statements: Sequence[Node], *, condition: bool = False) -> bool:
        status = True
        for node in statements:
            status = self._statement(node)
            if not (status or condition) and node.type in ("test_command", "command"):
                self._warn(node, _FAILS)
        return status

    def _statement(self, node: Node) -> bool:
        """Runs one and tells its exit status. A refusal ends the reading of values, not of the text."""
        try:
            if node.type not in _STATEMENTS:
                raise Refused(f"{node.type.replace('_', ' ')} {ONLY}", node.start_byte)
            self._check_end(node)
            return _STATEMENTS[node.type](self, node)
        except Refused as refused:
            self.findings.append(_at(self.source, refused.index, refused.message))
            self.expander.broken = self.expander.dry = True
            return True

    def _check_end(self, node: Node) -> None:
        after = self.source.text[node.end_byte : node.end_byte + 1]
        if after and after not in " \t\n;&|)":
            raise Refused(f"syntax not understood at `{after}`", node.end_byte)

    def _if(self, node: Node) -> bool:
        taken, chosen, status = False, False, True
        for keyword, statements in _sections(node):
            if keyword in ("if", "elif"):
                with self.expander.only_if(not taken):
                    chosen = self._block(statements, condition=True) and not taken
                continue
            chosen = chosen if keyword == "then" else not taken
            with self.expander.only_if(chosen):
                result = self._block(statements)
            taken, status = taken or chosen, result if chosen else status
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
            raise Refused("syntax not understood at `!`", node.start_byte)
        return not self._statement(node.children[-1])

    def _assignments(self, node: Node) -> bool:
        for child in node.children if node.type == "variable_assignments" else [node]:
            self._store(*self._assigned(child))
        return True

    def _assigned(self, node: Node, *, declared: bool = False) -> tuple[str, bool, Value]:
        """The name, whether it is +=, and the value."""
        match, value = _ASSIGNMENT.match(self.source.text, node.start_byte), node.children[-1]
        if not match:
            raise Refused("syntax not understood in an assignment", node.start_byte)
        self._check_end(node)
        is_array = value.type == "array" and value.start_byte == match.end()
        if is_array:
            inside = (value.start_byte + 1, value.end_byte - 1)
            fields = self.expander.words(value, *inside, Context.ELEMENTS)
        else:
            fields = [self.expander.scalar(node, match.end(), node.end_byte, braces=declared)]
        return match["name"], bool(match["append"]), Value(tuple(fields), is_array, node.start_byte)

    def _store(self, name: str, append: bool, value: Value) -> None:
        self.expander.assign(name, self.expander.append(name, value) if append else value, value.start)

    def _declaration(self, node: Node) -> bool:
        keyword, arguments = node.children[0].type, node.children[1:]
        if keyword not in _DECLARATIONS:
            raise Refused(f"`{keyword}` is refused: it has no meaning outside a function", node.start_byte)
        targets: list[tuple[str, tuple[str, bool, Value] | None]] = []
        options = set()
        for child in arguments:
            written = self.source.of(child)
            if child.type == "variable_assignment":
                assigned = self._assigned(child, declared=True)
                targets.append((assigned[0], assigned))
            elif child.type == "variable_name" and NAME.fullmatch(written):
                targets.append((written, None))
            elif child.type == "word" and written in _DECLARATIONS[keyword] and not targets:
                options.add(written)
            else:
                raise Refused(f"`{keyword} {written[:40]}` is refused: write NAME=value", child.start_byte)
        arrays = [given is not None and given[2].is_array for _, given in targets]
        if not targets or (any(arrays) and len(arrays) > 1) or ("-a" in options and not all(arrays)):
            raise Refused(f"`{keyword}` must hold names, or one array alone", node.start_byte)
        for name, given in targets:  # only now: bash expands every argument before it assigns the first
            if given:
                self._store(*given)
            if keyword == "readonly" and not self.expander.dry:
                self.expander.readonly.add(name)
        return True

    def _unset(self, node: Node) -> bool:
        for index, child in enumerate(node.children):
            name = self.source.of(child)
            if (index, name) in ((0, "unset"), (1, "-v")):
                continue
            if not index or not NAME.fullmatch(name):
                raise Refused(f"`unset` is refused at `{name[:40]}`: write plain names", child.start_byte)
            self.expander.assign(name, None, child.start_byte)
        return True

    def _command(self, node: Node) -> bool:
        name, start = self.source.of(node.children[0]), node.children[0].end_byte
        if name == "set":
            return self._set(node, self.source.text[start : node.end_byte])
        fields = self.expander.words(node, start, node.end_byte, Context.ARGUMENTS)
        return self._test(fields, node.start_byte) if name == "test" else True

    def _set(self, node: Node, options: str) -> bool:
        if not _SET_OPTIONS.fullmatch(options):
            raise Refused("`set` is refused but for -e, -u, -x and -o pipefail", node.start_byte)
        self._warn(node, "`set` changes the shell of the script that sources the preset")
        if "u" in options and not self.expander.dry:
            self.expander.nounset = True
        return True

    # Tests

    def _test_command(self, node: Node) -> bool:
        start, double = node.start_byte, self.source.text.startswith("[[", node.start_byte)
        context = Context.TEST if double else Context.ARGUMENTS
        fields = self.expander.words(node, start, node.end_byte, context)
        opener, closer = ("[[", "]]") if double else ("[", "]")
        ends = [field.text for field in fields if field.literal and field.text in (opener, closer)]
        if ends != [opener, closer] or fields[0].text != opener or fields[-1].text != closer:
            raise Refused("syntax not understood in a test", start)
        if not double:
            return self._test(fields[1:-1], start)
        if lazy := _LAZY.search(self.source.of(node)):
            raise Refused("an expansion that assigns or fails is refused in [[ ]]", start + lazy.start())
        _check_operators(fields)
        return self._any(fields[1:-1], start)

    def _test(self, fields: Sequence[Field], start: int) -> bool:
        """[ and test go by the number of arguments that splitting leaves."""
        _check_operators(fields)
        for field in fields:
            if field.globs:
                self.expander.undecidable("an unquoted * ? [ in a test is matched against files", field.start)
        return self._decide([field.text for field in fields], start)

    def _decide(self, words: Sequence[str], start: int) -> bool:
        if len(words) <= 1:
            return bool(words and words[0])
        if len(words) == 3 and words[1] in _BINARY:
            return self._compare(words[0], words[1], words[2], start)
        if words[0] == "!" and len(words) <= 4:
            return not self._decide(words[1:], start)
        if len(words) == 2 and words[0] in _UNARY:
            return self._unary(words[0], words[1], start)
        self.expander.undecidable(f"bash cannot decide the test `{' '.join(words)[:60]}`", start)
        return True

    def _any(self, fields: Sequence[Field], start: int) -> bool:
        """The inside of [[ ]]: words between && and ||; what these skip is not judged by its values."""
        result = False
        for alternative in _between(fields, "||"):
            with self.expander.only_if(not result):
                every = True
                for term in _between(alternative, "&&"):
                    with self.expander.only_if(every):
                        every = self._term(term, start) and every
                result = every or result
        return result

    def _term(self, term: Sequence[Field], start: int) -> bool:
        if len(term) > 1 and term[0].literal and term[0].text == "!":
            return not self._term(term[1:], start)
        operator = term[len(term) - 2] if len(term) in (2, 3) else None
        known = operator and operator.literal and operator.text in (_UNARY if len(term) == 2 else _BINARY)
        if (len(term) != 1 and not known) or (len(term) == 1 and term[0].literal and term[0].text[0] in "-!"):
            written = " ".join(field.text for field in term)
            raise Refused(f"the test `{written[:60]}` is refused", term[0].start if term else start)
        if len(term) == 3 and term[1].text in ("=", "==", "!=") and term[2].globs:
            raise Refused("a pattern match is refused: quote the right side", term[2].start)
        return self._decide([field.text for field in term], term[0].start)

    def _unary(self, operator: str, operand: str, start: int) -> bool:
        if operator != "-v":
            return bool(operand) is (operator == "-n")
        if "[" in operand:
            raise Refused(f"an array subscript {ONLY}", start)
        if not NAME.fullmatch(operand):
            self.expander.undecidable(f"-v asks for a variable: `{operand[:40]}` is no name", start)
        value = self.expander.lookup(operand, start)
        return bool(value and value.fields)

    def _compare(self, left: str, operator: str, right: str, start: int) -> bool:
        compare = _BINARY[operator]
        if not compare:
            return (left == right) is (operator != "!=")
        for operand in (left, right):
            if not INTEGER.fullmatch(operand):
                self.expander.undecidable(f"{operator} needs plain integers: this is `{operand[:40]}`", start)
                return True
        return compare(int(left), int(right))


_UNARY = ("-z", "-n", "-v")
_BINARY: dict[str, Callable[[int, int], bool] | None] = {
    "=": None,
    "==": None,
    "!=": None,
    "-eq": int.__eq__,
    "-ne": int.__ne__,
    "-lt": int.__lt__,
    "-le": int.__le__,
    "-gt": int.__gt__,
    "-ge": int.__ge__,
}
_FILE_TESTS = frozenset(("-nt", "-ot", "-ef", *(f"-{letter}" for letter in "bcdefghkprstuwxGLNORS")))
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


def _sections(node: Node) -> list[tuple[str, list[Node]]]:
    """An if statement laid flat: its keywords, each with the statements after it."""
    sections: list[tuple[str, list[Node]]] = []
    for child in node.children:
        for part in child.children if child.type in ("elif_clause", "else_clause") else [child]:
            if part.type in ("if", "elif", "then", "else"):
                sections.append((part.type, []))
            elif part.is_named and part.type != "comment":
                sections[-1][1].append(part)
    for keyword, statements in sections:
        if not statements:
            raise Refused(f"syntax not understood: `{keyword}` without a command", node.start_byte)
    return sections


def _between(fields: Sequence[Field], operator: str) -> list[list[Field]]:
    groups: list[list[Field]] = [[]]
    for field in fields:
        if field.operator and field.text == operator:
            groups.append([])
        else:
            groups[-1].append(field)
    return groups


def _check_operators(fields: Sequence[Field]) -> None:
    for field in fields:
        if field.literal and field.text in _FILE_TESTS:
            raise Refused(f"the test `{field.text}` is refused: it depends on files", field.start)
        if field.literal and field.text in ("-a", "-o", "=~"):
            raise Refused(f"`{field.text}` in a test is refused: write && or || between tests", field.start)


# Words


def _variable(name: str, value: Value, source: Source) -> Variable:
    words = []
    for field in value.fields:
        found = [(field.text, 0)] if value.is_array else _split_scalar(field.text)
        for text, position in found:
            offset = field.at[position] if field.at else source.offset(field.start)
            quoted = value.is_array and field.quoted and not field.globs
            words.append(Word(text, *source.place(offset), quoted))
    text = " ".join(field.text for field in value.fields)
    line, column = source.place(source.offset(value.start))
    return Variable(name, text, tuple(words), line, column, value.is_array)


def _split_scalar(text: str) -> list[tuple[str, int]]:
    return [(match[0], match.start()) for match in re.finditer(r"[^ \t\n]+", text)]


def _word_faults(variable: Variable) -> Iterator[Finding]:
    """Words that bash hands over as they are, and that nobody can have meant."""
    if variable.is_array:
        message = (
            f"an array: Megatron-LM's scripts expand ${{{variable.name}}}, which is its first element alone; "
            f'write one quoted text, or use a script that expands "${{{variable.name}[@]}}"'
        )
        yield Finding("parse", Severity.WARNING, message, line=variable.line, column=variable.column)
    for word in variable.words:
        for severity, pattern, message in _WORD_FAULTS[:1] if word.quoted else _WORD_FAULTS:
            if pattern.search(word.text):
                message = message.format(word.text[:60])
                yield Finding("parse", severity, message, line=word.line, column=word.column)
                if severity is Severity.ERROR:
                    break


_STRAY = "a stray backslash: with a blank after it bash does not join the lines, and `{}` reaches Megatron"
_WORD_FAULTS = tuple(
    (severity, re.compile(pattern), message)
    for severity, pattern, message in (
        (Severity.ERROR, r"^[ \t\n]+$", _STRAY),
        (Severity.ERROR, r"\\$", _STRAY),
        (Severity.ERROR, r"^#", "no comment can stand inside quotes: `{}` and what follows reach Megatron"),
        (Severity.WARNING, r"['\"]", "bash reads no quotes inside a value: `{}` reaches Megatron with them"),
        (Severity.WARNING, r"[*?[]", "bash matches `{}` against the files of the working directory"),
    )
)
