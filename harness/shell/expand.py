"""Bash words to the text and fields that bash makes of them, every character keeping its place in the file.

The syntax tree only says where quotes and expansions begin and end. All that stands between them is read
again here under bash's own rules; whatever these do not know, or where the two readings differ, is refused.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum, auto

from tree_sitter import Node

from harness.shell.source import Source

MAX_EXPANDED = 1 << 20  # characters that the expansions of one file may copy, all together
MAX_TERMS = 200  # numbers, names and operators in one arithmetic expansion
ONLY = "is refused: a preset may only assign variables"
BLANKS = " \t\n"  # bash's default IFS
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")  # 010 would be octal

# Names that bash sets or obeys by itself, and names by which other programs load code.
SHELL_OWN = re.compile(
    r"_|BASH.*|COMP_.*|LC_.*|LD_.*|HIST.*|PS[0-4]|PYTHON(PATH|STARTUP|HOME|BREAKPOINT|INSPECT|WARNINGS)|IFS|PATH"
    r"|HOME|USER|LOGNAME|CDPATH|ENV|PROMPT_COMMAND|SHELL|SHELLOPTS|SHLVL|LANG|LANGUAGE|E?UID|PPID|S?RANDOM|SECONDS"
    r"|LINENO|EPOCH.*|FUNCNAME|FUNCNEST|GROUPS|DIRSTACK|OPT(ARG|IND|ERR)|PWD|OLDPWD|HOST(NAME|TYPE)|MACHTYPE"
    r"|OSTYPE|TERM|TMPDIR|POSIXLY_CORRECT|GLOBIGNORE|EXECIGNORE|FIGNORE|IGNOREEOF|TMOUT|TIMEFORMAT|COLUMNS|LINES"
    r"|REPLY|MAPFILE|COPROC|CHILD_MAX|INPUTRC|MAIL.*|PIPESTATUS|READLINE_.*|TZ"
)


class Refused(Exception):
    """Internal: bash's value cannot be told, or must not be. Becomes one error finding at ``index``."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.message, self.index = message, index


# Words


class Kind(Enum):
    """What a piece of a word is to word splitting."""

    LITERAL = auto()  # as written, unquoted
    QUOTED = auto()
    EXPANDED = auto()  # out of an unquoted expansion: split on blanks
    BLANK = auto()  # between two written words
    LIST = auto()  # an array's elements begin: "${A[@]}" of none makes no word at all
    BREAK = auto()  # between two elements of an array
    OPERATOR = auto()


class Context(Enum):
    """Where text stands decides what bash makes of it."""

    SCALAR = auto()  # NAME=here
    ARGUMENTS = auto()
    ELEMENTS = auto()  # NAME=(here)
    TEST = auto()  # [[ here ]]
    DEFAULT = auto()  # ${NAME:-here}
    STRING = auto()  # "here"
    QUOTED_DEFAULT = auto()  # "${NAME:-here}"


_IN_QUOTES = (Context.STRING, Context.QUOTED_DEFAULT)
_SPLIT = (Context.ARGUMENTS, Context.ELEMENTS)
_PLAIN = r"\\(?P<escaped>[^\n])|(?P<plain>[^ \t\n\\$`'\"&|;<>()]+"
_LONE_DOLLAR = r"|\$(?![\w{(\['\"$!?*@#-])"
# What may stand between quotes and expansions. Bash does not split a word that ends in a lone dollar.
_TEXT = {
    Context.SCALAR: re.compile(f"{_PLAIN}{_LONE_DOLLAR})", re.ASCII),
    Context.ARGUMENTS: re.compile(rf"(?P<blank>[ \t]+)|{_PLAIN})"),
    Context.ELEMENTS: re.compile(rf"(?P<blank>[ \t\n]+)|{_PLAIN})"),
    Context.TEST: re.compile(rf"(?P<blank>[ \t]+)|(?P<operator>&&|\|\|)|{_PLAIN}{_LONE_DOLLAR})", re.ASCII),
    Context.DEFAULT: re.compile(r"\\(?P<escaped>[^\n])|(?P<plain>[^\\$`'\"&|<>{}~]+)"),
    Context.STRING: re.compile(
        r"\\(?P<escaped>[$`\"\\])|(?P<plain>[^\\$`\"]+|\\(?!\n)|\$(?![\w{(\[$!?*@#-]))", re.ASCII
    ),
    Context.QUOTED_DEFAULT: re.compile(r"(?P<plain>[^\\$`'\"{}]+)"),
}
_PIECE_WEIGHT = 32  # even an empty value takes room
_KINDS = {"blank": Kind.BLANK, "operator": Kind.OPERATOR, "escaped": Kind.QUOTED}
_OPAQUE = ("string", "raw_string", "ansi_c_string", "simple_expansion", "expansion", "arithmetic_expansion")
# Unquoted, these mean more than they say; \0 stands for whatever is quoted or expanded.
_HAZARDS = (
    (re.compile(r"(?:^|:|.=)~"), "tilde expansion is refused: write the path out, or quote the ~"),
    (re.compile(r"\{.*\}", re.DOTALL), "brace expansion is refused: write the words out, or quote them"),
    (re.compile(r"^\[(?![\w,.+*-]*\](?!\+?=))"), "an array subscript is refused: quote the ["),
)


@dataclass(frozen=True, slots=True)
class Piece:
    kind: Kind
    text: str
    at: array[int]
    start: int


@dataclass(frozen=True, slots=True)
class Field:
    """One word as bash holds it; ``literal`` if nothing of it was quoted or expanded."""

    text: str
    at: array[int]
    start: int
    quoted: bool = False
    globs: bool = False  # an unquoted * ? [ is in it
    literal: bool = False
    operator: bool = False


@dataclass(frozen=True, slots=True)
class Value:
    """What a variable holds; a scalar is one field. ``from_file`` is false for the caller's environment."""

    fields: tuple[Field, ...]
    is_array: bool
    start: int
    from_file: bool = True


class Expander:
    """Reads words, and holds the variables so far; it looks at nothing but these.

    While ``dry``, as in a branch not taken, only the text is judged: variables are neither read nor set.
    """

    def __init__(self, source: Source, environment: Mapping[str, str]) -> None:
        self.source = source
        self.variables = {
            name: Value((Field(text, array("I"), 0),), False, 0, from_file=False)
            for name, text in environment.items()
        }
        self.readonly: set[str] = set()
        self.nounset = False
        self.broken = False  # something was refused: no value can be told any more
        self.dry = False
        self._expanded = 0

    @contextmanager
    def only_if(self, live: bool) -> Iterator[None]:
        before = self.dry
        self.dry = before or not live
        try:
            yield
        finally:
            self.dry = before or self.broken

    def undecidable(self, message: str, index: int) -> None:
        """A fault of the values and not of the text: there is none in a branch that is not taken."""
        if not self.dry:
            raise Refused(message, index)

    def scalar(self, node: Node, start: int, end: int, *, braces: bool = False) -> Field:
        """The right side of NAME=..., never split. ``braces``: bash expands {a,b} here."""
        pieces = list(self._pieces(node, start, end, Context.SCALAR))
        _check_unquoted(pieces, _HAZARDS[: 1 + braces])
        return _join(pieces, start)

    def words(self, node: Node, start: int, end: int, context: Context) -> list[Field]:
        """Elements and arguments after word splitting; [[ ]] has none."""
        fields: list[Field] = []
        for word in _written_words(self._pieces(node, start, end, context)):
            _check_unquoted(word, _HAZARDS[: {Context.ELEMENTS: 3, Context.ARGUMENTS: 2}.get(context, 1)])
            fields += _split(word) if context in _SPLIT else [_join(word, word[0].start)]
        return fields

    def _pieces(self, node: Node, start: int, end: int, context: Context) -> Iterator[Piece]:
        position = start
        for child in _opaque(node, start, end, self.source):
            yield from self._text(position, self.source.start(child), context)
            yield from self._expand(child, context)
            position = child.end_byte
        yield from self._text(position, end, context)

    def _text(self, position: int, end: int, context: Context) -> Iterator[Piece]:
        kind = Kind.QUOTED if context in _IN_QUOTES else Kind.LITERAL
        kind = Kind.EXPANDED if context is Context.DEFAULT else kind  # bash splits it like a variable's value
        while position < end:
            match = _TEXT[context].match(self.source.text, position)
            group = (match and match.lastgroup) or ""
            if not match or (match.end() > end and group != "blank"):
                if self.source.text.startswith(("`", "$("), position):  # the grammar overlooked it
                    raise Refused(f"command substitution {ONLY}", position)
                raise Refused(f"`{self.source.text[position]}` is refused here: quote it", position)
            yield self._slice(_KINDS.get(group, kind), *match.span(group), position)
            position = match.end()

    def _slice(self, kind: Kind, begin: int, end: int, start: int) -> Piece:
        return Piece(kind, self.source.text[begin:end], self.source.at[begin:end], start)

    def _made(self, text: str, kind: Kind, start: int, at: array[int] | None = None) -> Piece:
        """What an expansion yields; a number or a value of the environment stands where it is expanded."""
        self._expanded += len(text) + _PIECE_WEIGHT
        if self._expanded > MAX_EXPANDED:
            self.undecidable(f"expansions grow past {MAX_EXPANDED} characters", start)
        return Piece(kind, text, at or array("I", [self.source.at[start]]) * len(text), start)

    def _expand(self, node: Node, context: Context) -> Iterator[Piece]:
        start, end = self.source.start(node), node.end_byte
        written = self.source.of(node)
        if node.type in ("simple_expansion", "expansion"):
            yield from self._parameter(node, context)
        elif node.type == "arithmetic_expansion":
            kind = Kind.QUOTED if context in _IN_QUOTES else Kind.EXPANDED
            yield self._made(str(self._arithmetic(node)), kind, start)
        elif node.type == "comment" and context is Context.ELEMENTS:
            if not re.search(r"(?<!\\)[ \t\n(]$", self.source.text[max(start - 2, 0) : start]):
                raise Refused("`#` is refused here: quote it", start)
            yield self._slice(Kind.BLANK, start, start, start)
        elif context in _IN_QUOTES or node.type == "comment":
            raise Refused("quotes are refused here: inside other quotes bash reads them differently", start)
        elif node.type == "string":
            yield from self._string(node, context)
        elif node.type == "raw_string" and re.fullmatch(r"'[^']*'", written):
            yield self._slice(Kind.QUOTED, start + 1, end - 1, start)
        elif node.type == "ansi_c_string" and re.fullmatch(r"\$'(?:[^'\\]|\\.)*'", written, re.DOTALL):
            yield self._ansi(node)
        else:
            raise Refused("syntax not understood: this quote is read in two ways", start)

    def _string(self, node: Node, context: Context) -> Iterator[Piece]:
        start, lists = self.source.start(node), False
        for piece in self._pieces(node, start + 1, node.end_byte - 1, Context.STRING):
            lists = lists or piece.kind is Kind.LIST
            if lists and context is Context.DEFAULT:
                raise Refused("an array inside a default is refused", piece.start)
            joins = piece.kind is Kind.BREAK and context not in _SPLIT
            yield self._made(" ", Kind.QUOTED, start) if joins else piece
        if not lists:
            yield self._slice(Kind.QUOTED, start, start, start)  # even "" makes a word

    def _ansi(self, node: Node) -> Piece:
        text, at = "", array("I")
        for match in _ANSI_ESCAPE.finditer(self.source.text, self.source.start(node) + 2, node.end_byte - 1):
            made = _ANSI_LETTERS.get(match["letter"] or "", match[0])
            digits = match["octal"] or match["hex"] or match["unicode"]
            code = int(digits, 8 if match["octal"] else 16) if digits else 0
            made = chr(code) if 1 < code < 127 else made
            if (digits and not 1 < code < 127) or made in ("\\x", "\\u", "\\U", "\\c"):
                raise Refused(f"the escape `{match[0]}` is refused: it is not plain ASCII", match.start())
            text += made
            at.extend([self.source.at[match.start()]] * len(made))
        return Piece(Kind.QUOTED, text, at, self.source.start(node))

    # Variables

    def lookup(self, name: str, index: int) -> Value | None:
        if name not in self.variables and SHELL_OWN.fullmatch(name):
            raise Refused(f"`{name}` is refused: its value depends on the machine", index)
        return None if self.dry else self.variables.get(name)

    def assign(self, name: str, value: Value | None, index: int) -> None:
        """Sets a variable, or with None unsets it. A scalar given to an array is its first element."""
        if SHELL_OWN.fullmatch(name):
            raise Refused(f"changing `{name}` is refused: bash, or what it starts, obeys it", index)
        if name in self.readonly:
            self.undecidable(f"`{name}` is readonly", index)
        if self.dry:
            return
        old = self.variables.pop(name, None)
        if value and old and old.is_array and not value.is_array:
            value = Value(value.fields + old.fields[1:], True, value.start)
        if value:
            self.variables[name] = value

    def append(self, name: str, more: Value) -> Value:
        """The value of NAME+=..."""
        old = self.lookup(name, more.start)
        if not old:
            return more
        starts = [field.start if old.from_file else more.start for field in old.fields]
        parts = zip(old.fields, starts, strict=True)
        copies = [self._made(field.text, Kind.QUOTED, start, field.at) for field, start in parts]
        if more.is_array:
            kept = zip(copies, old.fields, strict=True)
            fields = [replace(field, at=copy.at, start=copy.start) for copy, field in kept]
            return Value((*fields, *more.fields), True, more.start)
        added = Piece(Kind.QUOTED, more.fields[0].text, more.fields[0].at, more.start)
        return Value((_join([*copies[:1], added], more.start),), False, more.start)

    def _parameter(self, node: Node, context: Context) -> Iterator[Piece]:
        match, start = parameter(self.source, node), self.source.start(node)
        kind = Kind.QUOTED if context in _IN_QUOTES else Kind.EXPANDED
        name, operator = match["bare"] or match["name"], match["operator"] or ""
        value = self.lookup(name, start)
        held = value.fields[0] if value and value.fields else None
        if match["all"]:
            apart = match["all"] == "[@]" or kind is Kind.EXPANDED
            yield from self._elements(value, apart, kind, start, context)
            return
        if operator:
            present = held is not None and bool(held.text or ":" not in operator)
            wanted = present if operator[-1] == "+" else not present
            with self.only_if(wanted):
                inner = Context.QUOTED_DEFAULT if context in _IN_QUOTES else Context.DEFAULT
                default = list(self._pieces(node, match.end(), node.end_byte - 1, inner))
            if wanted and operator[-1] in "-+":
                yield from default
            elif wanted and operator[-1] == "?":
                self.undecidable(f"`{name}` must be set: {_join(default, start).text or 'it is not'}", start)
            elif wanted:
                held = _join(default, start)
                self.assign(name, Value((held,), False, start), start)
            held = None if operator[-1] == "+" or (wanted and operator[-1] == "-") else held
        elif held is None and self.nounset:
            self.undecidable(f"`{name}` is not set, and `set -u` makes that fatal", start)
        if match["length"]:
            if held and not held.text.isascii():
                self.undecidable(f"the length of `{name}` depends on the locale: it is not ASCII", start)
            held = Field(str(len(held.text) if held else 0), array("I"), start)
        known = held if held and not self.dry else Field("", array("I"), start)
        # an empty "$X" makes a word by its quotes alone, and makes none beside an empty "${A[@]}"
        yield self._made(known.text, kind if known.text else Kind.EXPANDED, start, known.at)

    def _elements(
        self, value: Value | None, apart: bool, kind: Kind, start: int, context: Context
    ) -> Iterator[Piece]:
        """${A[@]} and ${A[*]}: a break between the elements, or a space where bash joins them."""
        if context in (Context.DEFAULT, Context.QUOTED_DEFAULT):
            raise Refused("an array inside a default is refused", start)
        if apart:
            yield self._slice(Kind.LIST, start, start, start)
        for index, field in enumerate(value.fields if value else ()):
            if index:
                breaks = apart and (context is Context.STRING or context in _SPLIT)
                yield self._slice(Kind.BREAK, start, start, start) if breaks else self._made(" ", kind, start)
            yield self._made(field.text, kind, start, field.at)

    # Arithmetic: + - * / % and parentheses, 64 bits, truncating as C does

    def _arithmetic(self, node: Node) -> int:
        start, position, end = self.source.start(node), self.source.start(node) + 3, node.end_byte - 2
        text = ""
        for child in _opaque(node, position, end, self.source):
            text += self.source.text[position : self.source.start(child)]
            held = _join(list(self._expand(child, Context.STRING)), start)
            text += self._integer(self.source.of(child), held, start)
            position = child.end_byte
        text += self.source.text[position:end]
        tokens = _TERM.findall(text)[::-1]
        plain = self.source.text.startswith("$((", start) and _ARITHMETIC.fullmatch(text)
        if not plain or len(tokens) > MAX_TERMS:
            raise Refused(f"arithmetic is refused but for + - * / % ( ) and at most {MAX_TERMS} terms", start)
        result = self._binary(tokens, 1, start) if tokens else 0  # $(( )) is 0
        if tokens:
            raise Refused(f"arithmetic is refused at `{tokens[-1]}`", start)
        return result

    def _integer(self, what: str, held: Field | None, start: int) -> str:
        text = held.text if held else ""
        if INTEGER.fullmatch(text):
            return text
        self.undecidable(f"`{what}` is not a plain integer: it holds `{text[:40]}`", start)
        return "1"

    def _binary(self, tokens: list[str], least: int, start: int) -> int:
        left = self._unary(tokens, start)
        while tokens and _PRECEDENCE.get(tokens[-1], 0) >= least:
            operator = tokens.pop()
            right = self._binary(tokens, _PRECEDENCE[operator] + 1, start)
            if operator in "/%":
                if not right:
                    self.undecidable("arithmetic divides by zero", start)
                    right = 1
                quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
                left = quotient if operator == "/" else left - quotient * right
            else:
                left = left * right if operator == "*" else left + (right if operator == "+" else -right)
            if abs(left) >= 1 << 63:
                self.undecidable("arithmetic overflows 64 bits", start)
        return left

    def _unary(self, tokens: list[str], start: int) -> int:
        token = tokens.pop() if tokens else ""
        if token in ("+", "-"):
            return self._unary(tokens, start) * (-1 if token == "-" else 1)
        if token == "(":
            inner = self._binary(tokens, 1, start)
            token = tokens.pop() if tokens else ""
            if token == ")":
                return inner
        elif INTEGER.fullmatch(token):
            return int(token)
        elif NAME.fullmatch(token):
            value = self.lookup(token, start)
            return int(self._integer(token, value.fields[0] if value and value.fields else None, start))
        raise Refused(f"arithmetic is refused at `{token or 'its end'}`", start)


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "%": 2}
_TERM = re.compile(r"[0-9]+|[A-Za-z_]\w*|[-+*/%()]", re.ASCII)
_ARITHMETIC = re.compile(r"(?!.*(\+\+|--|\*\*))[\w \t\n+\-*/%()]*", re.ASCII | re.DOTALL)
_ANSI_LETTERS = dict(zip("abeEfnrtv\\'\"?", "\a\b\x1b\x1b\f\n\r\t\v\\'\"?", strict=True))
_ANSI_ESCAPE = re.compile(
    r"\\(?:(?P<octal>[0-7]{1,3})|x(?P<hex>[0-9A-Fa-f]{1,2})|u(?P<unicode>[0-9A-Fa-f]{1,4})|(?P<letter>.))|[^\\]",
    re.DOTALL,
)
_PARAMETER = re.compile(
    r"\$(?P<bare>[A-Za-z_]\w*)"
    r"|\$\{(?P<length>\#)?(?P<name>[A-Za-z_]\w*)(?P<all>\[[@*]\])?(?P<operator>:?[-=?+])?",
    re.ASCII,
)
_OTHER_EXPANSIONS = (
    (r"\$\{!", "indirect expansion"),
    (r"\$\{#\w+\[[@*]\]\}", "the length of an array"),
    (r"\$\{#?\w+\[(?![@*]\])", "an array subscript"),
    (r"\$\{\w+(\[.\])?[#%]", "prefix or suffix removal"),
    (r"\$\{\w+(\[.\])?/", "pattern substitution"),
    (r"\$\{\w+\[.\]:?[-=?+]", "the default of an array"),
    (r"\$\{\w+(\[.\])?:", "a substring"),
    (r"\$\{\w+(\[.\])?[\^,]", "case modification"),
    (r"\$\{\w+(\[.\])?@", "parameter transformation"),
    (r"\$\{?([^\w{]|\d)", "a special parameter"),
    (r"", "this expansion"),
)


def parameter(source: Source, node: Node) -> re.Match[str]:
    """The parts of $NAME or ${NAME...}; any form that is not supported is refused by its name."""
    match = _PARAMETER.match(source.text, source.start(node), node.end_byte)
    if match and len([part for part in ("length", "all", "operator") if match[part]]) <= 1:
        closed = match.end() if match["bare"] else match.end() + 1
        if closed == node.end_byte or match["operator"]:
            return match
    written = source.of(node)
    named = next(words for pattern, words in _OTHER_EXPANSIONS if re.match(pattern, written, re.ASCII))
    raise Refused(f"{named} is refused: `{written[:40]}`", source.start(node))


def _opaque(node: Node, start: int, end: int, source: Source) -> list[Node]:
    """The outermost quotes, expansions and comments of a stretch, in order."""
    found, stack = [], node.children[::-1]
    while stack:
        child = stack.pop()
        if child.end_byte <= start or source.start(child) >= end:
            continue
        if (
            child.type in (*_OPAQUE, "comment")
            and source.start(child) >= start
            and not is_lone_dollar(child, source)
        ):
            found.append(child)
        else:
            stack.extend(child.children[::-1])
    return found


def is_lone_dollar(node: Node, source: Source) -> bool:
    """The grammar takes the dollar of "5$ a" for an expansion."""
    after = source.text[source.start(node) + 1 : source.start(node) + 2]
    return node.type == "simple_expansion" and after in ("", *BLANKS)


def _check_unquoted(word: list[Piece], hazards: Iterable[tuple[re.Pattern[str], str]]) -> None:
    written = "".join(piece.text if piece.kind is Kind.LITERAL else "\0" for piece in word)
    for pattern, message in hazards:
        if pattern.search(written):
            raise Refused(message, word[0].start)


def _written_words(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    word: list[Piece] = []
    for piece in pieces:
        if piece.kind not in (Kind.BLANK, Kind.OPERATOR):
            word.append(piece)
            continue
        if word:
            yield word
        if piece.kind is Kind.OPERATOR:
            yield [piece]
        word = []
    if word:
        yield word


def _split(word: list[Piece]) -> list[Field]:
    """Word splitting: at the blanks of unquoted expansions and between the elements of an array."""
    words: list[list[Piece]] = [[]]
    for piece in word:
        if piece.kind is Kind.BREAK:
            words.append([])
        elif piece.kind in (Kind.LITERAL, Kind.QUOTED):
            words[-1].append(piece)
        elif piece.kind is Kind.EXPANDED:
            for part in re.finditer(r"[ \t\n]+|[^ \t\n]+", piece.text):
                begin, end = part.span()
                if part[0][0] in BLANKS:
                    words.append([])
                else:
                    words[-1].append(Piece(piece.kind, part[0], piece.at[begin:end], piece.start))
    return [_join(pieces, pieces[0].start) for pieces in words if pieces]


def _join(pieces: list[Piece], start: int) -> Field:
    at = array("I")
    for piece in pieces:
        at.extend(piece.at)
    return Field(
        "".join(piece.text for piece in pieces),
        at,
        start,
        quoted=any(piece.kind is Kind.QUOTED for piece in pieces),
        globs=any(piece.kind is not Kind.QUOTED and re.search(r"[*?[\\]", piece.text) for piece in pieces),
        literal=all(piece.kind is Kind.LITERAL for piece in pieces),
        operator=any(piece.kind is Kind.OPERATOR for piece in pieces),
    )
