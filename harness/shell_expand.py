"""Bash words to the text and fields that bash makes of them, by rereading the source under bash's own rules.

The syntax tree only says where quotes and expansions begin and end. Everything between them is read
here, character by character, and whatever this reading does not know, or the tree and the reading
disagree on, is refused. Every character keeps its offset in the file through every expansion.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

from tree_sitter import Node

MAX_EXPANDED = 1 << 20  # characters that all expansions of one file may copy, together
MAX_ARITHMETIC = 200  # tokens in one arithmetic expansion
BLANKS = " \t\n"  # bash's default IFS
GLOBS = frozenset("*?[")

# Names that bash sets or obeys by itself, and names that make other programs run code.
SHELL_OWN = re.compile(
    r"_|BASH.*|COMP_.*|LC_.*|LD_.*|HIST.*|PS[0-4]|PYTHON(PATH|STARTUP|HOME|BREAKPOINT|INSPECT|WARNINGS)|IFS|PATH|HOME"
    r"|USER|LOGNAME|CDPATH|ENV|PROMPT_COMMAND|SHELL|SHELLOPTS|SHLVL|LANG|LANGUAGE|E?UID|PPID|S?RANDOM|SECONDS"
    r"|LINENO|EPOCH.*|FUNCNAME|FUNCNEST|GROUPS|DIRSTACK|OPT(ARG|IND|ERR)|PWD|OLDPWD|HOST(NAME|TYPE)|MACHTYPE|OSTYPE"
    r"|TERM|TMPDIR|POSIXLY_CORRECT|GLOBIGNORE|EXECIGNORE|FIGNORE|IGNOREEOF|TMOUT|TIMEFORMAT|COLUMNS|LINES|REPLY"
    r"|MAPFILE|COPROC|CHILD_MAX|INPUTRC|INSIDE_EMACS|MAIL.*|PIPESTATUS|READLINE_.*|TZ",
    re.ASCII,
)
INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")

_PARAMETER = re.compile(
    r"\$(?P<bare>[A-Za-z_]\w*)"
    r"|\$\{(?P<length>\#)?(?P<name>[A-Za-z_]\w*)(?P<all>\[[@*]\])?(?P<operator>:?[-=?+])?",
    re.ASCII,
)
_OTHER_EXPANSIONS = (
    (r"\$\{!", "indirect expansion"),
    (r"\$\{#?\w+\[[@*]\]\}", "the length of an array"),
    (r"\$\{#?\w+\[(?![@*]\])", "an array subscript"),
    (r"\$\{\w+(\[.\])?[#%]", "prefix or suffix removal"),
    (r"\$\{\w+(\[.\])?/", "pattern substitution"),
    (r"\$\{\w+\[.\]:?[-=?+]", "a default for an array"),
    (r"\$\{\w+(\[.\])?:", "a substring"),
    (r"\$\{\w+(\[.\])?[\^,]", "case modification"),
    (r"\$\{\w+(\[.\])?@", "parameter transformation"),
    (r"\$\{?\W|\$\{?[0-9]", "a special parameter"),
    (r"", "this expansion"),
)
_UNQUOTED = re.compile(
    r"(?P<blank>[ \t\n]+)|\\(?P<escaped>[^\n])|(?P<plain>[^ \t\n\\$`'\"&|;<>()]+|\$)|(?P<operator>&&|\|\||[&|;<>()])"
)
_IN_STRING = re.compile(r"\\(?P<escaped>[$`\"\\])|(?P<plain>[^\\$`\"]+|\\|\$)")
_IN_QUOTED_OPERAND = re.compile(r"(?P<plain>[^\\$`'\"{}]+)")
_EXPANDS_AFTER_DOLLAR = re.compile(r"[\w{(\['\"$!?*@#-]", re.ASCII)
_EXPANDS_IN_STRING = re.compile(r"[\w{(\[$!?*@#-]", re.ASCII)
_ANSI_ESCAPE = re.compile(
    r"\\(?:([0-7]{1,3})|x([0-9A-Fa-f]{1,2})|[uU]([0-9A-Fa-f]{1,4})|(.))|[^\\]", re.DOTALL
)
_ANSI_LETTERS = dict(zip("abeEfnrtv\\'\"?", "\a\b\x1b\x1b\f\n\r\t\v\\'\"?", strict=True))
_ARITHMETIC_GAP = re.compile(r"[\w \t\n+\-*/%()]*", re.ASCII)
_ARITHMETIC_TOKEN = re.compile(r"[ \t\n]*(?:([0-9]+)|([A-Za-z_]\w*)|([-+*/%()]))", re.ASCII)
_OPAQUE = frozenset(
    (
        "string",
        "raw_string",
        "ansi_c_string",
        "simple_expansion",
        "expansion",
        "arithmetic_expansion",
        "comment",
    )
)


class Refused(Exception):
    """Internal: bash's value cannot be told, or must not be; becomes one error finding."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.message, self.offset = message, offset


@dataclass(frozen=True, slots=True)
class Source:
    """Shell text with line continuations taken out, and where each character stands in the file."""

    text: str
    at: array[int]

    def of(self, node: Node) -> str:
        return self.text[node.start_byte : node.end_byte]


class Context(Enum):
    """What a stretch of literal text is part of: it decides what is special there."""

    SCALAR = auto()  # NAME=here
    WORDS = auto()  # array elements and arguments: blanks separate
    TEST = auto()  # [[ here ]]: blanks separate, && || ( ) are operators
    OPERAND = auto()  # ${NAME:-here}
    STRING = auto()  # "here"
    QUOTED_OPERAND = auto()  # "${NAME:-here}"


class Kind(Enum):
    LITERAL = auto()  # as written, unquoted
    QUOTED = auto()
    EXPANDED = auto()  # came out of an unquoted expansion: split on blanks
    BLANK = auto()  # between two written words
    LIST = auto()  # an array's elements begin: "${A[@]}" of none makes no word at all
    BREAK = auto()  # between two elements of an array
    OPERATOR = auto()


@dataclass(frozen=True, slots=True)
class Piece:
    kind: Kind
    text: str
    at: array[int]
    start: int


@dataclass(frozen=True, slots=True)
class Field:
    """One word as bash holds it: ``quoted`` if any of it was, ``globs`` if an unquoted * ? [ is in it."""

    text: str
    at: array[int]
    start: int
    quoted: bool = False
    globs: bool = False
    literal: bool = False  # neither quoted nor expanded: only such a word can be an operator of [[
    operator: bool = False


@dataclass(frozen=True, slots=True)
class Value:
    """What a variable holds; a scalar is one field. ``from_file`` is false for the caller's environment."""

    fields: tuple[Field, ...]
    is_array: bool
    start: int
    from_file: bool = True


class Expander:
    """Reads words and knows the variables so far. Nothing but its own table is ever looked at or changed.

    While ``dry`` (a branch not taken) only what is written is judged: variables are neither read nor set.
    """

    def __init__(self, source: Source, environment: Mapping[str, str]) -> None:
        self.source = source
        self.variables = {
            name: Value((Field(text, array("I"), 0),), False, 0, from_file=False)
            for name, text in environment.items()
        }
        self.readonly: set[str] = set()
        self.nounset = False
        self.dry = False
        self.broken = False  # something was refused: no value can be told any more
        self._expanded = 0

    @contextmanager
    def only_if(self, live: bool) -> Iterator[None]:
        before = self.dry
        self.dry = before or not live
        try:
            yield
        finally:
            self.dry = before or self.broken

    def undecidable(self, message: str, offset: int) -> None:
        """A fault of the values, not of the text: there is none in a branch that is not taken."""
        if not self.dry:
            raise Refused(message, offset)

    def spend(self, characters: int, offset: int) -> None:
        self._expanded += characters
        if self._expanded > MAX_EXPANDED:
            raise Refused(f"expansions grow past {MAX_EXPANDED} characters in all", offset)

    # Words

    def scalar(self, node: Node, start: int, end: int, *, braces: bool = False) -> Field:
        """The right side of NAME=...: no splitting. ``braces``: bash expands {a,b} here."""
        pieces = list(self._pieces(node, start, end, Context.SCALAR))
        self._check_literals(pieces, braces=braces)
        return _join(pieces, start)

    def elements(self, node: Node) -> list[Field]:
        return self.words(node, node.start_byte + 1, node.end_byte - 1, array=True)

    def words(
        self, node: Node, start: int, end: int, context: Context = Context.WORDS, *, array: bool = False
    ) -> list[Field]:
        """Array elements or arguments, after word splitting; in [[ ]] there is none, and operators are told apart."""
        fields: list[Field] = []
        for group in _groups(self._pieces(node, start, end, context)):
            self._check_literals(group, braces=context is Context.WORDS)
            if (
                array
                and group[0].kind is Kind.LITERAL
                and re.match(r"\[(?![\w,.+*-]*\](?!\+?=))", group[0].text)
            ):
                raise Refused("an array subscript is refused: quote the `[`", group[0].start)
            fields += _split(group) if context is Context.WORDS else [_join(group, group[0].start)]
        return fields

    def _check_literals(self, pieces: list[Piece], *, braces: bool) -> None:
        opened = False
        for index, piece in enumerate(pieces):
            if piece.kind is not Kind.LITERAL:
                continue
            tilde = re.search(r"(?:^|[:=])~" if index == 0 else r"[:=]~", piece.text)
            if tilde:
                raise Refused("tilde expansion is refused: write the path out, or quote the ~", piece.start)
            opened = opened or "{" in piece.text
            if braces and opened and "}" in piece.text:
                raise Refused(
                    "brace expansion is refused: write the words out, or quote them", pieces[0].start
                )

    def _pieces(self, node: Node, start: int, end: int, context: Context) -> Iterator[Piece]:
        position = start
        for child in _opaque(node, start, end, self.source):
            yield from self._literal(position, child.start_byte, context)
            yield from self._expand(child, context)
            position = child.end_byte
        yield from self._literal(position, end, context)

    def _literal(self, start: int, end: int, context: Context) -> Iterator[Piece]:
        """Text that the tree says holds no quote and no expansion; anything that bash would see there is refused."""
        text, position = self.source.text, start
        token = {Context.STRING: _IN_STRING, Context.QUOTED_OPERAND: _IN_QUOTED_OPERAND}.get(
            context, _UNQUOTED
        )
        quoted = token is not _UNQUOTED
        while position < end:
            match = token.match(text, position, end)
            kind = match and match.lastgroup
            after = text[position + 1 : position + 2]
            special = _EXPANDS_IN_STRING if quoted else _EXPANDS_AFTER_DOLLAR
            lone = match and match[0] == "$" and context not in (Context.WORDS, Context.OPERAND)
            if (
                not match
                or (match[0] == "$" and (not lone or special.match(after)))
                or (match[0] == "\\" and after == "\n")
            ):
                raise Refused(f"`{text[position]}` cannot be read here", position)
            if kind == "plain" and context is Context.OPERAND and set(match[0]) & set("{}"):
                raise Refused("a brace inside a default value must be quoted", position)
            if (kind == "blank" and context is Context.SCALAR) or (
                kind == "operator" and not _allowed(match[0], context)
            ):
                raise Refused(f"`{match[0].strip() or 'a blank'}` cannot stand here", position)
            yield self._piece(match, position, context, quoted)
            position = match.end()

    def _piece(self, match: re.Match[str], position: int, context: Context, quoted: bool) -> Piece:
        begin, end = match.span(match.lastgroup or 0)
        kind = Kind.QUOTED if quoted or match.lastgroup == "escaped" else Kind.LITERAL
        if context in (Context.WORDS, Context.TEST):
            kind = {"blank": Kind.BLANK, "operator": Kind.OPERATOR}.get(match.lastgroup or "", kind)
        if context is Context.TEST and "\n" in match[0]:
            raise Refused("a test must stand on one line", position)
        if context is Context.OPERAND and kind is Kind.LITERAL:
            if "~" in match[0]:
                raise Refused("tilde expansion is refused: write the path out, or quote the ~", position)
            kind = Kind.EXPANDED  # bash splits the unquoted part of a default value
        return Piece(kind, self.source.text[begin:end], self.source.at[begin:end], position)

    def _expand(self, node: Node, context: Context) -> Iterator[Piece]:
        start, end = node.start_byte, node.end_byte
        if node.type == "comment":
            if context is not Context.WORDS or not re.search(
                r"(?<!\\)[ \t\n(]$", self.source.text[:start][-2:]
            ):
                raise Refused("`#` cannot be read here", start)
            yield Piece(Kind.BLANK, "", array("I"), start)
        elif node.type in ("simple_expansion", "expansion"):
            yield from self._parameter(node, context)
        elif node.type == "arithmetic_expansion":
            kind = Kind.QUOTED if context in (Context.STRING, Context.QUOTED_OPERAND) else Kind.EXPANDED
            yield self._made(str(self.arithmetic(node)), kind, start)
        elif context in (Context.STRING, Context.QUOTED_OPERAND):
            raise Refused(
                "quotes inside a quoted default value are refused: bash reads them differently", start
            )
        elif node.type == "string":
            yield from self._string(node, start, end, context)
        elif node.type == "raw_string":
            if "'" in self.source.text[start + 1 : end - 1]:
                raise Refused("`'` cannot be read here", start)
            yield Piece(
                Kind.QUOTED, self.source.text[start + 1 : end - 1], self.source.at[start + 1 : end - 1], start
            )
        else:
            yield self._ansi(node)

    def _string(self, node: Node, start: int, end: int, context: Context) -> Iterator[Piece]:
        lists = False
        for piece in self._pieces(node, start + 1, end - 1, Context.STRING):
            lists = lists or piece.kind is Kind.LIST
            if piece.kind is Kind.BREAK and context is not Context.WORDS:
                yield Piece(Kind.QUOTED, " ", array("I", [self.source.at[piece.start]]), piece.start)
            elif piece.kind is Kind.LIST and context is Context.OPERAND:
                raise Refused("an array inside a default value is refused", piece.start)
            else:
                yield piece
        if not lists:
            yield Piece(Kind.QUOTED, "", array("I"), start)

    def _ansi(self, node: Node) -> Piece:
        text, at = "", array("I")
        if not re.fullmatch(r"\$'(?:[^'\\]|\\.)*'", self.source.of(node), re.DOTALL):
            raise Refused("`$'` cannot be read here", node.start_byte)
        for match in _ANSI_ESCAPE.finditer(self.source.text, node.start_byte + 2, node.end_byte - 1):
            octal, hexadecimal, unicode, letter = match.groups()
            code = octal or hexadecimal or unicode
            made = match[0]
            if code:
                number = int(code, 8 if octal else 16)
                if not 1 < number < 127:
                    raise Refused(
                        f"the escape `{match[0]}` is refused: only ASCII is the same everywhere",
                        match.start(),
                    )
                made = chr(number)
            elif letter in _ANSI_LETTERS:
                made = _ANSI_LETTERS[letter]
            elif letter and letter in "xuUc":
                raise Refused(f"the escape `{match[0]}` is refused", match.start())
            text += made
            at.extend([self.source.at[match.start()]] * len(made))
        return Piece(Kind.QUOTED, text, at, node.start_byte)

    # Parameters

    def lookup(self, name: str, offset: int) -> Value | None:
        value = self.variables.get(name)
        if value is None and SHELL_OWN.fullmatch(name):
            raise Refused(f"`{name}` is refused: its value depends on the machine", offset)
        return None if self.dry else value

    def _parameter(self, node: Node, context: Context) -> Iterator[Piece]:
        match, start = parameter(self.source, node), node.start_byte
        quoted = context in (Context.STRING, Context.QUOTED_OPERAND)
        kind = Kind.QUOTED if quoted else Kind.EXPANDED
        name, operator = match["bare"] or match["name"], match["operator"] or ""
        value = self.lookup(name, start)
        if match["all"]:
            yield from self._elements(value, match["all"] == "[@]" or not quoted, kind, start, context)
            return
        held = value.fields[0] if value and value.fields else None
        if held is None and self.nounset and not operator:
            self.undecidable(f"`{name}` is not set, and `set -u` makes that fatal", start)
        if match["length"]:
            if held and not held.text.isascii():
                raise Refused(f"the length of `{name}` depends on the locale: it is not ASCII", start)
            yield self._made(str(len(held.text)) if held else "0", kind, start)
            return
        present = held is not None and bool(held.text or not operator.startswith(":"))
        if operator:
            use_operand = not present if operator[-1] != "+" else present
            inner = Context.QUOTED_OPERAND if quoted else Context.OPERAND
            with self.only_if(use_operand):
                operand = list(self._pieces(node, match.end(), node.end_byte - 1, inner))
            if use_operand and operator[-1] == "?":
                message = _join(operand, start).text or "not set"
                self.undecidable(f"`{name}` must be set: {message}", start)
            elif use_operand and operator[-1] == "=":
                held = _join(operand, start)
                self.assign(name, Value((held,), False, node.start_byte), start)
            elif use_operand:
                yield from operand
                held = None
            elif operator[-1] == "+":
                held = None
        known = held if held and not self.dry else Field("", array("I"), start)
        # an empty "$X" makes a word by its quotes alone, and none beside an empty "${A[@]}"
        yield self._made(known.text, kind if known.text else Kind.EXPANDED, start, known.at)

    def _elements(
        self, value: Value | None, separate: bool, kind: Kind, start: int, context: Context
    ) -> Iterator[Piece]:
        """${A[@]} and ${A[*]}: the elements with a break between, or joined by a space where bash joins them."""
        if context in (Context.OPERAND, Context.QUOTED_OPERAND):
            raise Refused("an array inside a default value is refused", start)
        if separate:
            yield Piece(Kind.LIST, "", array("I"), start)
        for index, field in enumerate(value.fields if value else ()):
            if index and separate and context in (Context.STRING, Context.WORDS):
                yield Piece(Kind.BREAK, "", array("I"), start)
            elif index:
                yield self._made(" ", kind, start)
            yield self._made(field.text, kind, start, field.at)

    def _made(self, text: str, kind: Kind, start: int, at: array[int] | None = None) -> Piece:
        self.spend(len(text), start)
        if not at:  # not from the file: an environment variable or a number stands where it is expanded
            at = array("I", [self.source.at[start]]) * len(text)
        return Piece(kind, text, at, start)

    def assign(self, name: str, value: Value, offset: int) -> None:
        if SHELL_OWN.fullmatch(name):
            raise Refused(f"assigning `{name}` is refused: bash or the programs it starts obey it", offset)
        if name in self.readonly:
            self.undecidable(f"`{name}` is readonly", offset)
        if not self.dry:
            old = self.variables.get(name)
            if old and old.is_array and not value.is_array:
                value = Value(value.fields + old.fields[1:], True, value.start)
            self.variables[name] = value

    def appended(self, old: Value, more: Value) -> Value:
        pieces = [self._made(field.text, Kind.QUOTED, more.start, field.at) for field in old.fields]
        if more.is_array:
            kept = tuple(
                Field(p.text, p.at, f.start, f.quoted, f.globs)
                for p, f in zip(pieces, old.fields, strict=True)
            )
            return Value(kept + more.fields, True, more.start)
        first = more.fields[0]
        head = pieces[:1] + [Piece(Kind.QUOTED, first.text, first.at, first.start)]
        return Value((_join(head, more.start),), False, more.start)

    def unset(self, name: str, offset: int) -> None:
        if SHELL_OWN.fullmatch(name):
            raise Refused(f"unsetting `{name}` is refused: bash or the programs it starts obey it", offset)
        if name in self.readonly:
            self.undecidable(f"`{name}` is readonly", offset)
        if not self.dry:
            self.variables.pop(name, None)

    # Arithmetic

    def arithmetic(self, node: Node) -> int:
        start, end = node.start_byte, node.end_byte
        if not self.source.text.startswith("$((", start):
            raise Refused("`$[ ]` is refused: write $(( ))", start)
        text, position = "", start + 3
        for child in [*_opaque(node, start + 3, end - 2, self.source), None]:
            stop = child.start_byte if child else end - 2
            gap = self.source.text[position:stop]
            known = _ARITHMETIC_GAP.fullmatch(gap)
            if not known or (
                child and child.type not in ("simple_expansion", "expansion", "arithmetic_expansion")
            ):
                raise Refused("arithmetic may only use integers, variables, + - * / % and parentheses", start)
            text += gap
            if child:
                held = _join(list(self._expand(child, Context.STRING)), start).text
                text += (
                    held if INTEGER.fullmatch(held) else self._not_integer(self.source.of(child), held, start)
                )
                position = child.end_byte
        return _Arithmetic(self, text, start).value()

    def _not_integer(self, what: str, held: str, offset: int) -> str:
        self.undecidable(f"{what} is not a plain integer: it holds `{held[:40]}`", offset)
        return "1"

    def integer(self, name: str, offset: int) -> int:
        value = self.lookup(name, offset)
        held = value.fields[0].text if value and value.fields else ""
        return int(held if INTEGER.fullmatch(held) else self._not_integer(f"`{name}`", held, offset))


class _Arithmetic:
    """Recursive descent over + - * / % and parentheses, in 64 bits, division truncating as in C."""

    def __init__(self, expander: Expander, text: str, offset: int) -> None:
        self.expander, self.offset, self.index = expander, offset, 0
        found = list(_ARITHMETIC_TOKEN.finditer(text))
        self.tokens = [match.group(1) or match.group(2) or match.group(3) for match in found]
        if "--" in text or "++" in text or "**" in text:
            raise Refused("arithmetic may only use integers, variables, + - * / % and parentheses", offset)
        if len(self.tokens) > MAX_ARITHMETIC:
            raise Refused(f"arithmetic of more than {MAX_ARITHMETIC} terms is refused", offset)

    def value(self) -> int:
        result = self._sum() if self.tokens else 0  # $(( )) is 0
        if self.index < len(self.tokens):
            raise Refused(f"arithmetic cannot be read at `{self.tokens[self.index]}`", self.offset)
        return result

    def _take(self, options: str) -> str:
        token = self.tokens[self.index] if self.index < len(self.tokens) else ""
        self.index += bool(token) and token in options
        return token if token and token in options else ""

    def _sum(self) -> int:
        left = self._product()
        while operator := self._take("+-"):
            right = self._product()
            left = self._checked(left + right if operator == "+" else left - right)
        return left

    def _product(self) -> int:
        left = self._unary()
        while operator := self._take("*/%"):
            right = self._unary()
            if operator == "*":
                left = self._checked(left * right)
                continue
            if right == 0:
                self.expander.undecidable("arithmetic divides by zero", self.offset)
                right = 1
            quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
            left = self._checked(quotient if operator == "/" else left - right * quotient)
        return left

    def _unary(self) -> int:
        sign = self._take("+-")
        if sign:
            return self._unary() * (-1 if sign == "-" else 1)
        if self._take("("):
            inner = self._sum()
            if not self._take(")"):
                raise Refused("arithmetic lacks a `)`", self.offset)
            return inner
        token = self.tokens[self.index] if self.index < len(self.tokens) else ""
        self.index += 1
        if INTEGER.fullmatch(token):
            return int(token)
        if re.match(r"[A-Za-z_]", token):
            return self.expander.integer(token, self.offset)
        raise Refused(f"arithmetic cannot be read at `{token or 'its end'}`", self.offset)

    def _checked(self, number: int) -> int:
        if not -(1 << 63) < number < 1 << 63:
            self.expander.undecidable("arithmetic overflows 64 bits", self.offset)
            return 1
        return number


def parameter(source: Source, node: Node) -> re.Match[str]:
    """The parts of $NAME or ${NAME...}; anything but the supported operators is refused by its name."""
    text, start = source.of(node), node.start_byte
    match = _PARAMETER.match(source.text, start, node.end_byte)
    end = match.end() + (not match["bare"]) if match else 0
    plain = (
        match and (match["operator"] or end == node.end_byte) and not (match["length"] and match["operator"])
    )
    if match and plain and not (match["all"] and (match["operator"] or match["length"])):
        return match
    named = next(words for pattern, words in _OTHER_EXPANSIONS if re.match(pattern, text, re.ASCII))
    raise Refused(f"{named} is refused: `{text[:40]}`", start)


def _opaque(node: Node, start: int, end: int, source: Source) -> list[Node]:
    """The outermost quotes, expansions and comments inside a stretch, in order."""
    found, stack = [], list(reversed(node.children))
    while stack:
        child = stack.pop()
        if child.end_byte <= start or child.start_byte >= end:
            continue
        lone_dollar = child.type == "simple_expansion" and source.text[child.start_byte + 1] in BLANKS
        if child.type in _OPAQUE and child.start_byte >= start and not lone_dollar:
            found.append(child)
        else:
            stack.extend(reversed(child.children))
    return found


def _allowed(operator: str, context: Context) -> bool:
    if context is Context.TEST:
        return operator in ("&&", "||", "(", ")")
    return context is Context.OPERAND and operator in "();"


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces of each written word; an operator is a word by itself."""
    group: list[Piece] = []
    for piece in pieces:
        if piece.kind in (Kind.OPERATOR, Kind.BLANK):
            if group:
                yield group
            group = []
            if piece.kind is Kind.OPERATOR:
                yield [piece]
        else:
            group.append(piece)
    if group:
        yield group


def _join(pieces: list[Piece], start: int) -> Field:
    at = array("I")
    for piece in pieces:
        at.extend(piece.at)
    return Field(
        "".join(piece.text for piece in pieces),
        at,
        start,
        quoted=any(piece.kind is Kind.QUOTED for piece in pieces),
        globs=any(piece.kind is not Kind.QUOTED and GLOBS & set(piece.text) for piece in pieces),
        literal=all(piece.kind is Kind.LITERAL for piece in pieces),
        operator=any(piece.kind is Kind.OPERATOR for piece in pieces),
    )


def _split(group: list[Piece]) -> list[Field]:
    """Word splitting of one written word: at the blanks of its unquoted expansions and between array elements."""
    words: list[list[Piece]] = [[]]
    for piece in group:
        if piece.kind is Kind.BREAK:
            words.append([])
        elif piece.kind in (Kind.LITERAL, Kind.QUOTED):
            words[-1].append(piece)
        else:
            for part in re.finditer(r"[ \t\n]+|[^ \t\n]+", piece.text):
                begin, end = part.span()
                if part[0][0] in BLANKS:
                    words.append([])
                else:
                    words[-1].append(Piece(piece.kind, part[0], piece.at[begin:end], piece.start))
    return [_join(word, word[0].start) for word in words if word]
