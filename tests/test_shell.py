from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import process_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.finding import Finding, Severity
from harness.shell import MAX_BYTES, MAX_CODE, Script, Word, read_script
from harness.shell.expand import MAX_EXPANDED
from harness.shell.syntax import MAX_DEPTH

ONLY = "is refused: a preset may only assign variables"


def read(text: str, **environment: str) -> Script:
    return read_script(text.encode(), environment=environment)


def texts(text: str, **environment: str) -> dict[str, str]:
    script = read(text, **environment)
    assert not [finding for finding in script.findings if finding.is_error], script.findings
    return {name: variable.text for name, variable in script.variables.items()}


def words(text: str, name: str = "A") -> list[str]:
    script = read(text)
    assert not [finding for finding in script.findings if finding.is_error], script.findings
    return [word.text for word in script.variables[name].words]


def only(text: str | bytes, **environment: str) -> Finding:
    """The one finding of a text."""
    data = text.encode() if isinstance(text, str) else text
    (finding,) = read_script(data, environment=environment).findings
    assert finding.stage == "parse"
    return finding


# Values

VALUES = {
    "plain": ("A=b", "b"),
    "empty": ("A=", ""),
    "empty then another": ("B= A=c", "c"),
    "single quotes": (r"A='a\b $C \'", r"a\b $C \ ".rstrip()),
    "double quotes keep most backslashes": (r'A="\a\\\$\"\`"', r"\a\$" + '"`'),
    "unquoted backslash": (r"A=a\ b\\\"c", 'a b\\"c'),
    "ansi quotes": (r"A=$'a\tb\x41\101\u0042\'\q'", "a\tbAAB'\\q"),
    "concatenation": ('B=x\nA="a"\'b\'$B"${B}"c', "abxxc"),
    "line continuation in quotes": ('A="a\\\nb"', "ab"),
    "line continuation unquoted": ("A=a\\\nb", "ab"),
    "line continuation in a keyword": ("i\\\nf [ a ]; th\\\nen A=1; f\\\ni", "1"),
    "escaped backslash before a newline": ('A="a\\\\\nb"', "a\\\nb"),
    "newline in quotes": ('A="a\nb"', "a\nb"),
    "hash inside a word": ("A=a#b'c'#d", "a#bc#d"),
    "comment after": ("A=a # b", "a"),
    "blanks before an expansion": ('B=x\nA="a\n  $B\n  ${B} $B"', "a\n  x\n  x x"),
    "lone dollars": ('A="5$ a$"$', "5$ a$$"),
    "assigned twice": ("A=1\nA=2", "2"),
    "appended": ("A=1\nA+=2\nA+='3 4'", "123 4"),
    "appended to nothing": ("A+=2", "2"),
    "several at once, left to right": ("B=1 A=$B", "1"),
    "exported": ("export B=1 A=x", "x"),
    "exported at once, right sides first": ("export B=1 A=x$B", "x"),
    "export of a name alone": ("A=1\nexport A", "1"),
    "declared": ("declare -x A=1", "1"),
    "readonly": ("readonly A=1", "1"),
    "not split": ("B='x  y'\nA=$B", "x  y"),
    "unset names are empty": ("A=a${B}c$D", "ac"),
    "default": ("A=${B:-x y}", "x y"),
    "default of the empty": ("B=\nA=${B:-x}${B-y}", "x"),
    "default in quotes": ('A="${B:-x y}"', "x y"),
    "default with quotes": ('A=${B:-"x \'y"}', "x 'y"),
    "default of a default": ("A=${B:-${C:-x}}", "x"),
    "assigned default": ("A=${B:=x}$B${B:=y}", "xxx"),
    "assigned default in a no-op": (": ${A:=x y}\ntrue $A", "x y"),
    "alternative": ("B=\nA=${B+x}${B:+y}${C+z}", "x"),
    "required and set": ("B=1\nA=${B:?not there}", "1"),
    "length": ("B=abc\nA=${#B}${#C}", "30"),
    "array joined": ("B=(a 'b c')\nA=${B[@]}-${B[*]}", "a b c-a b c"),
    "array in quotes joined": ('B=(a "b c")\nA="${B[*]}-${B[@]}"', "a b c-a b c"),
    "array without an index": ("B=(a b)\nA=$B${B}", "aa"),
    "arithmetic": ("B=8\nA=$((B * 2 + ${C:-1} - (7 - 3)))", "13"),
    "arithmetic truncates": ("B=-7\nA=$((B / 2)),$((B % 2)),$((-B / -2))", "-3,-1,-3"),
    "arithmetic precedence": ("A=$((1+2*3-4/2%3))", "5"),
    "characters beyond ASCII": ("A='é\u00a0ü'\u2003x", "é\u00a0ü\u2003x"),
    "unset": ("A=1\nunset A\nA=${A:-gone}", "gone"),
    "set is passed over": ("set -euo pipefail\nA=1", "1"),
}


@pytest.mark.parametrize(("text", "value"), VALUES.values(), ids=VALUES)
def test_value(text: str, value: str) -> None:
    assert texts(text)["A"] == value


CONDITIONS = {
    "[ -z ${UNSET} ]": True,
    "[ -n ${UNSET} ]": True,
    '[ -n "${UNSET}" ]': False,
    "[ ]": False,
    "[ ${UNSET} ]": False,
    "[ x ]": True,
    "[ ! x ]": False,
    '[ "$TWO" = "2 2" ]': True,
    "[ ! a = b ]": True,
    "[ a == a ]": True,
    "[ a != a ]": False,
    "[ 3 -eq 3 ]": True,
    "[ 3 -ne 3 ]": False,
    "[ -3 -lt 3 ]": True,
    "[ 3 -le 2 ]": False,
    "[ 10 -gt 9 ]": True,
    "[ 9 -ge 10 ]": False,
    "[ -v TWO ]": True,
    "[ -v UNSET ]": False,
    "test -z a": False,
    "test a = a": True,
    "! [ a ]": False,
    "[[ -z ${UNSET} ]]": True,
    "[[ -n ${UNSET} ]]": False,
    "[[ $TWO == '2 2' ]]": True,
    "[[ $TWO ]]": True,
    "[[ ! a ]]": False,
    "[[ -v TWO && 2 -lt 10 ]]": True,
    "[[ a = b || ! -n '' && x ]]": True,
    "[[ a = a || $TWO -eq 1 ]]": True,  # what || skips is not judged
    "[ a ] && [ b ]": True,
    "[ a ] && [ '' ] || [ c ]": True,
    "[ a ] || [ b ] && [ '' ]": False,
    "true": True,
    ":": True,
}


@pytest.mark.parametrize(("condition", "outcome"), CONDITIONS.items(), ids=CONDITIONS)
def test_condition(condition: str, outcome: bool) -> None:
    text = f"TWO='2 2'\nif {condition}; then\n A=yes\nelse\n A=no\nfi"
    assert texts(text)["A"] == ("yes" if outcome else "no")


def test_the_first_branch_that_holds_is_taken() -> None:
    text = (
        "if [ $A = 1 ]; then B=one; elif [ $A = 2 ]; then B=two\nelif [ $A = 2 ]; then B=no; else B=other; fi"
    )
    assert [texts(text, A=value)["B"] for value in ("1", "2", "3")] == ["one", "two", "other"]


def test_a_test_before_an_assignment() -> None:
    assert texts("[ -z $A ] && A=1\n[ -n $A ] || B=2\n[[ $A -eq 2 ]] && C=3 || D=4") == {"A": "1", "D": "4"}


def test_values_of_a_branch_not_taken_are_not_judged() -> None:
    assert texts("if [ x ]; then A=1; else A=$((B + 1)) C=${D:?no}; [ $E -eq 1 ] && readonly A; fi\nA=2") == {
        "A": "2"
    }


def test_environment() -> None:
    assert texts("A=${A:-none} B=$B", A="mine") == {"A": "mine", "B": ""}
    assert read("A=1", B="2").variables.keys() == {"A"}
    assert texts("A+=x", A="y") == {"A": "yx"}
    assert texts("A=$HOME/x", HOME="/h") == {"A": "/h/x"}


def test_a_real_preset() -> None:
    text = (
        "#!/bin/bash\n\nif [ -z ${HF_MODEL_CKPT} ]; then\n    HF_MODEL_CKPT=Qwen/Qwen3-8B\n"
        "    TOKENIZER_MODEL=Qwen/Qwen3-8B\nelse\n    TOKENIZER_MODEL=${HF_MODEL_CKPT}\nfi\n\n"
        'MODEL_ARGS=" \\\n    --num-layers 36 \\\n    \\\n    --bf16 \\\n"\n#    --off \\\n'
    )
    assert texts(text) == {
        "HF_MODEL_CKPT": "Qwen/Qwen3-8B",
        "TOKENIZER_MODEL": "Qwen/Qwen3-8B",
        "MODEL_ARGS": "     --num-layers 36         --bf16 ",
    }
    assert texts(text, HF_MODEL_CKPT="/mine")["TOKENIZER_MODEL"] == "/mine"
    script = read(text)
    assert not script.findings
    assert script.variables["MODEL_ARGS"].words == (
        Word("--num-layers", 11, 5, False),
        Word("36", 11, 18, False),
        Word("--bf16", 13, 5, False),
    )


# Words and places

WORDS = {
    "blanks of every kind": ('A=" a\tb\n\nc  "', ["a", "b", "c"]),
    "other white space stays": ("A='a\u00a0b\u2003c'", ["a\u00a0b\u2003c"]),
    "quotes stay": ("""A='a "b c"'""", ["a", '"b', 'c"']),
    "array": ("A=(a 'b c' \"d\" e\\ f '' # comment\n g)", ["a", "b c", "d", "e f", "", "g"]),
    "array of splits": ('B=\'x y\' C=\nA=($B "$B" p$B $C "$C" ${D:-1 2})', "x,y,x y,px,y,,1,2".split(",")),
    "array of arrays": ('B=(a "b c")\nA=("${B[@]}" "x${B[@]}y" ${B[@]} "${B[*]}")', None),
    "array of an empty array": ('B=()\nA=("${B[@]}" ${B[@]} "${B[*]}")', [""]),
    "array appended": ("A=(a b)\nA+=(c)\nA+=d", ["ad", "b", "c"]),
    "scalar appended by an array": ("A='a b'\nA+=(c)", ["a b", "c"]),
    "scalar given to an array": ("A=(a b)\nA=c", ["c", "b"]),
    "expressions unquoted": ("A=([0]*3+[1]*58 ,)", ["[0]*3+[1]*58", ","]),
}
WORDS["array of arrays"] = (WORDS["array of arrays"][0], "a,b c,xa,b cy,a,b,c,a b c".split(","))


@pytest.mark.parametrize(("text", "expected"), WORDS.values(), ids=WORDS)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_words_stand_where_they_are_written() -> None:
    text = 'COMMON="--a \\\n  1"\nMODEL_ARGS="${COMMON} \\\n--é-b\n  $X"x\nMODEL_ARGS+=" --c=${COMMON}"'
    assert read(text, X="out 2").variables["MODEL_ARGS"].words == (
        Word("--a", 1, 9, False),
        Word("1", 2, 3, False),
        Word("--é-b", 4, 1, False),
        Word("out", 5, 3, False),
        Word("2x", 5, 3, False),
        Word("--c=--a", 6, 15, False),
        Word("1", 2, 3, False),
    )


def test_array_words_stand_where_they_are_written() -> None:
    variable = read("B='x y'\nA=(a 'b c'\n  \"$B\" *\"?\" '')").variables["A"]
    assert variable.words == (
        Word("a", 2, 4, False),
        Word("b c", 2, 7, True),
        Word("x y", 1, 4, True),
        Word("*?", 3, 8, False),
        Word("", 3, 13, True),
    )
    assert (variable.text, variable.line, variable.column, variable.is_array) == ("a b c x y *? ", 2, 1, True)


def test_a_variable_stands_where_it_was_last_assigned() -> None:
    variable = read("A=1\n  if [ a ]; then B=2 A=3; fi").variables["A"]
    assert (variable.line, variable.column, variable.is_array) == (2, 22, False)
    assert read("B=1\n: x ${A:=2}").variables["A"].column == 5


# Hazards: the values are told, and a finding says what nobody can have meant

STRAY = "a stray backslash: with a blank after it bash does not join the lines, and `{}` reaches Megatron"
HAZARDS = {
    "blank after the backslash": ('MODEL_ARGS="--a \\\n--b 1 \\ \n--c"', "error", 2, 7, STRAY.format("\\")),
    "no blank before the backslash": ('MODEL_ARGS="\n--b\\ \n--c"', "error", 2, 1, STRAY.format("--b\\")),
    "blank after the backslash in an array": ("MODEL_ARGS=(a \\ \n b)", "error", 1, 16, STRAY.format(" ")),
    "comment in quotes": (
        'MODEL_ARGS="--a\n  # --b \\\n"',
        "error",
        2,
        3,
        "no comment can stand inside quotes: `#` and what follows reach Megatron",
    ),
    "quotes in quotes": (
        "MLM_EXTRA_ARGS=\"\n --a 'x'\"",
        "warning",
        2,
        6,
        "bash reads no quotes inside a value: `'x'` reaches Megatron with them",
    ),
    "glob": (
        'MODEL_ARGS="--a [0]*3"',
        "warning",
        1,
        17,
        "bash matches `[0]*3` against the files of the working directory",
    ),
    "glob through a variable": (
        "X='*?'\nMODEL_ARGS=$X",
        "warning",
        1,
        4,
        "bash matches `*?` against the files of the working directory",
    ),
    "array": (
        "\n MODEL_ARGS=('*' \"it's\")",
        "warning",
        2,
        2,
        "an array: Megatron-LM's scripts expand ${MODEL_ARGS}, which is its first element alone; "
        'write one quoted text, or use a script that expands "${MODEL_ARGS[@]}"',
    ),
    "set": ("set -e", "warning", 1, 1, "`set` changes the shell of the script that sources the preset"),
    "lone test that fails": (
        "A=1\n[ $A = 2 ]\nB=1",
        "warning",
        2,
        1,
        "this fails: a script that sources the preset under `set -e` ends here",
    ),
    "last list that fails": (
        "A=1\n[ $A = 2 ] && A=3\n[ $A = 2 ] && A=3\n# end",
        "warning",
        3,
        1,
        "this fails: a script that sources the preset under `set -e` ends here",
    ),
}


@pytest.mark.parametrize(("text", "severity", "line", "column", "message"), HAZARDS.values(), ids=HAZARDS)
def test_hazard(text: str, severity: str, line: int, column: int, message: str) -> None:
    script = read(text)
    found = [(f.severity, f.line, f.column, f.message) for f in script.findings if f.message == message]
    assert found == [(Severity(severity), line, column, message)]
    others = {finding.message.split(":")[0] for finding in script.findings if finding.message != message}
    assert others <= {"an array"}
    assert script.variables or text == "set -e"


def test_hazards_are_told_of_arguments_only_and_once() -> None:
    assert not read("OTHER='* # x\"y\" \\ '").findings
    found = read("X='*'\nMODEL_ARGS=$X\nMLM_EXTRA_ARGS=\"$X '*'\"").findings
    assert [(finding.line, finding.column) for finding in found] == [(1, 4), (3, 20), (3, 20)]


# Refusals: one finding, with its place, and no value

REFUSALS = {
    # the file
    "nul": (b"A=1\nB=\0\n", 2, 3, "not a text file: this byte is no text"),
    "broken UTF-8": (b"A=\xc3\xa9\n\nB=x\xff", 3, 4, "not a text file: this byte is no text"),
    "control character": ("A=\x01", 1, 3, "not a text file: this byte is no text"),
    "carriage returns": (
        "A=1\r\nif [ a ]; then\r\nB=`x`\r\nfi\r\n",
        1,
        4,
        "a carriage return: bash keeps it in the words, so save with Unix line ends",
    ),
    "byte order mark": (
        "\ufeffA=1",
        1,
        1,
        "a byte order mark: bash takes it for a part of the first command",
    ),
    "too large": (b" " * (MAX_BYTES + 1), 1, 1, f"the file is larger than {MAX_BYTES} bytes: it is not read"),
    "too much code": (
        "A=1\n" * MAX_CODE,
        1,
        1,
        f"more than {MAX_CODE} characters outside quotes are refused: no preset has so many",
    ),
    # syntax
    "open double quote": (
        'A=1\nMODEL_ARGS="--a \\\n--b\n',
        2,
        12,
        'the quote " that opens here is never closed',
    ),
    "open single quote": ("A='x' B='y\n", 1, 9, "the quote ' that opens here is never closed"),
    "open quote before others": ('A="x\nB="y"\nC="z"\n', 1, 3, 'the quote " that opens here is never closed'),
    "open quote and much more": (
        "A='" + "a|" * MAX_CODE,
        1,
        3,
        "the quote ' that opens here is never closed",
    ),
    "no fi": ("A=1\nif [ a ]; then\n A=2\n", 2, 1, "syntax not understood: what opens here lacks its `fi`"),
    "no fi after else": (
        "A=1\nif [ a ]; then\n A=2\nelse\nA=3\n",
        2,
        1,
        "syntax not understood: what opens here lacks its `fi`",
    ),
    "no then": ("if [ a ]; A=1; fi", 1, 1, "syntax not understood at `if`"),
    "no semicolon before then": ("if [ a ] then A=1; fi", 1, 1, "syntax not understood at `if`"),
    "empty branch": ("A=1\nif [ a ]; then fi", 2, 1, "syntax not understood: `then` without a command"),
    "open array": ("A=1\nB=(a b\nC=2", 2, 3, "syntax not understood: what opens here lacks its `)`"),
    "open expansion": ("A=${X\n", 1, 3, "this expansion is refused: `${X`"),
    "open test": ("A=1\n[ a", 2, 1, "syntax not understood: what opens here lacks its `]`"),
    "bracket not apart": ("[ a]", 1, 1, "syntax not understood in a test"),
    "command missing": ("[ a ] &&", 1, 9, "syntax not understood: a command is missing here"),
    "stray parenthesis": ("A=1\nB=)", 2, 3, "syntax not understood at `)`"),
    "comment right after a test": ("[ a ]#c", 1, 6, "syntax not understood at `#`"),
    "comment right after a blank in a word": ("A=(\\ #'x'\n y)", 1, 6, "`#` is refused here: quote it"),
    "negation not apart": ("![ a ] && A=1", 1, 1, "syntax not understood at `!`"),
    "quote that ends in two places": (
        "A=$'\\'",
        1,
        3,
        "syntax not understood: this quote is read in two ways",
    ),
    "name that is none": ("1A=x", 1, 1, "syntax not understood in an assignment"),
    "nested too deep": (
        "if [ a ]; then\n" * 99 + "A=1\n" + "fi\n" * 99,
        MAX_DEPTH - 1,
        4,
        f"syntax nested deeper than {MAX_DEPTH} levels is refused",
    ),
    # commands
    "command": ("A=1\n  touch f", 2, 3, f"the command `touch` {ONLY}"),
    "blanks around the equals sign": ("A = 1", 1, 1, f"the command `A` {ONLY}"),
    "stray fi": ("A=1\nfi", 2, 1, f"the command `fi` {ONLY}"),
    "prefix assignment": ("A=1 B=2 cmd", 1, 1, f"an assignment before a command {ONLY}"),
    "background": ("A=1 & B=2", 1, 5, f"a background job {ONLY}"),
    "double semicolon": ("A=1;;", 1, 4, f"`;;` outside of `case` {ONLY}"),
    "pipe": (": | :", 1, 1, f"a pipe {ONLY}"),
    "redirection": ("A=1\n: > f", 2, 3, f"a redirection {ONLY}"),
    "redirection alone": ("> f", 1, 1, f"a redirection {ONLY}"),
    "redirected assignment": ("A=1 >f", 1, 5, f"a redirection {ONLY}"),
    "redirected test": ("[ a ] > f && A=1", 1, 7, f"a redirection {ONLY}"),
    "redirection inside a test": ("[ a > f ]", 1, 5, "`>` is refused here: quote it"),
    "here-document": (": <<E\n$(x) it's\nE\n", 1, 3, f"a here-document {ONLY}"),
    "here-string": (": <<< x", 1, 3, f"a here-string {ONLY}"),
    "function": ("f() { A=1; }", 1, 1, f"a function {ONLY}"),
    "for": ("for A in 1 2; do B=1; done", 1, 1, f"a loop {ONLY}"),
    "for in arithmetic": ("for ((;;)); do B=1; done", 1, 1, f"a loop {ONLY}"),
    "while": ("while true; do B=1; done", 1, 1, f"a loop {ONLY}"),
    "case": ("case x in x) A=1;; esac", 1, 1, f"`case` {ONLY}"),
    "subshell": ("(A=1)", 1, 1, f"a subshell {ONLY}"),
    "group": ("{ A=1; }", 1, 1, f"a command group {ONLY}"),
    "arithmetic command": ("((A=1))", 1, 1, f"an arithmetic command {ONLY}"),
    "in a branch not taken": ("if [ '' ]; then\n x\nfi", 2, 2, f"the command `x` {ONLY}"),
    "local": ("local A=1", 1, 1, "`local` is refused: it has no meaning outside a function"),
    "declare option": ("A=1; declare -i B=1", 1, 14, "`declare -i` is refused: write NAME=value"),
    "option after a name": ("declare A -x", 1, 11, "`declare -x` is refused: write NAME=value"),
    "declare of a quoted word": ("declare 'A=1'", 1, 9, "`declare 'A=1'` is refused: write NAME=value"),
    "declare of an array and more": (
        "declare A=(1) B=$A",
        1,
        1,
        "`declare` must hold names, or one array alone",
    ),
    "unset of an element": ("A=(1)\nunset 'A[0]'", 2, 7, "`unset` is refused at `'A[0]'`: write plain names"),
    "set of arguments": ("set -- a", 1, 1, "`set` is refused but for -e, -u, -x and -o pipefail"),
    "set of another option": ("set -f", 1, 1, "`set` is refused but for -e, -u, -x and -o pipefail"),
    # names
    "PROMPT_COMMAND": (
        "A=1; PROMPT_COMMAND='touch f'",
        1,
        6,
        "changing `PROMPT_COMMAND` is refused: bash, or what it starts, obeys it",
    ),
    "IFS": ("IFS=,", 1, 1, "changing `IFS` is refused: bash, or what it starts, obeys it"),
    "BASH_ENV exported": (
        "export BASH_ENV=f",
        1,
        8,
        "changing `BASH_ENV` is refused: bash, or what it starts, obeys it",
    ),
    "LD_PRELOAD by default": (
        "A=${LD_PRELOAD:=f}",
        1,
        3,
        "`LD_PRELOAD` is refused: its value depends on the machine",
    ),
    "unset IFS": ("unset IFS", 1, 7, "changing `IFS` is refused: bash, or what it starts, obeys it"),
    "RANDOM": ("A=1$RANDOM", 1, 4, "`RANDOM` is refused: its value depends on the machine"),
    "HOME": ('A="${HOME}/x"', 1, 4, "`HOME` is refused: its value depends on the machine"),
    "readonly": ("readonly A=1\nA=2", 2, 1, "`A` is readonly"),
    # expansions
    "command substitution": ("A=1 B=$(x)", 1, 7, f"command substitution {ONLY}"),
    "backticks that the grammar overlooks": ("A=${B:-`x`}", 1, 8, f"command substitution {ONLY}"),
    "backticks": ('A="`x`"', 1, 4, f"command substitution {ONLY}"),
    "process substitution": ("A=<(x)", 1, 3, f"process substitution {ONLY}"),
    "translated string": ('A=$"x"', 1, 3, f"a translated string {ONLY}"),
    "indirect": ("A=${!B}", 1, 3, "indirect expansion is refused: `${!B}`"),
    "names by prefix": ("A=${!B*}", 1, 3, "indirect expansion is refused: `${!B*}`"),
    "length of an array": ("A=${#B[@]}", 1, 3, "the length of an array is refused: `${#B[@]}`"),
    "element": ("A=${B[0]}", 1, 3, "an array subscript is refused: `${B[0]}`"),
    "element of a substitution": ("A=${B[$(x)]}", 1, 3, "an array subscript is refused: `${B[$(x)]}`"),
    "prefix removal": ("A=${B#x}", 1, 3, "prefix or suffix removal is refused: `${B#x}`"),
    "suffix removal": ("A=${B%%x}", 1, 3, "prefix or suffix removal is refused: `${B%%x}`"),
    "pattern substitution": ("A=x${B//a/b}", 1, 4, "pattern substitution is refused: `${B//a/b}`"),
    "substring": ("A=${B:1:2}", 1, 3, "a substring is refused: `${B:1:2}`"),
    "case modification": ("A=${B^^}", 1, 3, "case modification is refused: `${B^^}`"),
    "transformation": ("A=${B@P}", 1, 3, "parameter transformation is refused: `${B@P}`"),
    "default of an array": ("A=${B[@]:-x}", 1, 3, "the default of an array is refused: `${B[@]:-x}`"),
    "positional": ("A=$1", 1, 3, "a special parameter is refused: `$1`"),
    "status": ("A=${?}", 1, 3, "a special parameter is refused: `${?}`"),
    "required but unset": ("A=x\nB=${C:?give me one}", 2, 3, "`C` must be set: give me one"),
    "required without words": ("B=${C?}", 1, 3, "`C` must be set: it is not"),
    "quotes in a quoted default": (
        "A=\"${B:-'$(x)'}\"",
        1,
        9,
        "quotes are refused here: inside other quotes bash reads them differently",
    ),
    "single quotes in a quoted default": (
        "A=\"${B:-'x'}\"",
        1,
        9,
        "quotes are refused here: inside other quotes bash reads them differently",
    ),
    "brace in a default": ("A=${B:-{}", 1, 8, "`{` is refused here: quote it"),
    "array in a default": ("A=${B:-${C[@]}}", 1, 8, "an array inside a default is refused"),
    "quoted array in a default": ('A=${B:-"${C[@]}"}', 1, 9, "an array inside a default is refused"),
    "tilde": ("A=~/x", 1, 3, "tilde expansion is refused: write the path out, or quote the ~"),
    "tilde after a colon": (
        "A=/a:~/x",
        1,
        3,
        "tilde expansion is refused: write the path out, or quote the ~",
    ),
    "braces in an array": (
        "A=(x --{a,b})",
        1,
        6,
        "brace expansion is refused: write the words out, or quote them",
    ),
    "braces in a declaration": (
        "export A={a,b}",
        1,
        10,
        "brace expansion is refused: write the words out, or quote them",
    ),
    "range in an array": ("A=({1..3})", 1, 4, f"brace expansion {ONLY}"),
    "index in an array": ("A=(x [1]=c)", 1, 6, "an array subscript is refused: quote the ["),
    "index assigned": ("A[1]=c", 1, 1, f"an array subscript {ONLY}"),
    "escape beyond ASCII": (r"A=$'a\u00e9'", 1, 6, r"the escape `\u00e9` is refused: it is not plain ASCII"),
    "nul escape": (r"A=$'\0'", 1, 5, r"the escape `\0` is refused: it is not plain ASCII"),
    "control escape": (r"A=$'\cA'", 1, 5, r"the escape `\c` is refused: it is not plain ASCII"),
    "length that depends on the locale": (
        "B=é\nA=${#B}",
        2,
        3,
        "the length of `B` depends on the locale: it is not ASCII",
    ),
    "expansions that double": (
        "B=0123456789\n" + "B=$B$B\n" * 60,
        17,
        5,
        f"expansions grow past {MAX_EXPANDED} characters",
    ),
    # arithmetic
    "arithmetic of an unset name": ("A=$((B + 1))", 1, 3, "`B` is not a plain integer: it holds ``"),
    "arithmetic of words": ("B='a[$(x)]'\nA=$((B))", 2, 3, "`B` is not a plain integer: it holds `a[$(x)]`"),
    "arithmetic of an expression": (
        "B=1+1\nA=$((${B} * 2))",
        2,
        3,
        "`${B}` is not a plain integer: it holds `1+1`",
    ),
    "octal": ("A=$((010))", 1, 3, "arithmetic is refused at `010`"),
    "unfinished arithmetic": ("A=$((1 + ))", 1, 3, "syntax not understood at `$((`"),
    "division by zero": ("A=$((1 / 0))", 1, 3, "arithmetic divides by zero"),
    "overflow": ("A=$((999999999999999999 * 10))", 1, 3, "arithmetic overflows 64 bits"),
    "increment": ("A=1 B=$((A++))", 1, 10, f"postfix expression {ONLY}"),
    "power": ("A=$((2**3))", 1, 3, "arithmetic is refused but for + - * / % ( ) and at most 200 terms"),
    "hexadecimal": ("A=$((0x1F))", 1, 3, "arithmetic is refused at `x1F`"),
    "long arithmetic": (
        "A=$((" + "+".join(["(1+1)"] * 45) + "))",
        1,
        3,
        "arithmetic is refused but for + - * / % ( ) and at most 200 terms",
    ),
    "old arithmetic": ("A=$[1+2]", 1, 3, "arithmetic is refused but for + - * / % ( ) and at most 200 terms"),
    "two numbers": ("A=$((1 2))", 1, 6, "syntax not understood at `1`"),
    # tests
    "file test": ("[ -f x ] && A=1", 1, 3, "the test `-f` is refused: it depends on files"),
    "file test in test": ("test -e x", 1, 6, "the test `-e` is refused: it depends on files"),
    "file test in [[": ("[[ a && -d x ]]", 1, 9, "the test `-d` is refused: it depends on files"),
    "newer file": ("[ a -nt b ]", 1, 5, "the test `-nt` is refused: it depends on files"),
    "file test in a branch not taken": (
        "if [ '' ]; then [ -f x ]; fi",
        1,
        19,
        "the test `-f` is refused: it depends on files",
    ),
    "and inside a test": ("[ a -a b ]", 1, 5, "`-a` in a test is refused: write && or || between tests"),
    "regular expression": ("[[ a =~ b ]]", 1, 6, "`=~` in a test is refused: write && or || between tests"),
    "order of strings": ("[[ a < b ]]", 1, 6, "`<` is refused here: quote it"),
    "pattern": ("[[ a == b* ]]", 1, 9, "a pattern match is refused: quote the right side"),
    "glob in a test": ("[ a = * ]", 1, 7, "an unquoted * ? [ in a test is matched against files"),
    "too many words": ("B='x y'\n[ -z $B ]", 2, 1, "bash cannot decide the test `-z x y`"),
    "unary test unknown": ("[ -y x ]", 1, 1, "bash cannot decide the test `-y x`"),
    "test unknown in [[": ("[[ -z ]]", 1, 4, "the test `-z` is refused"),
    "words compared as integers": ("[ a -eq 1 ]", 1, 1, "-eq needs plain integers: this is `a`"),
    "subscript behind -v": ("[[ -v B[0] ]]", 1, 4, f"an array subscript {ONLY}"),
    "no name behind -v": ("[ -v 1a ]", 1, 1, "-v asks for a variable: `1a` is no name"),
    "assignment in [[": ("[[ -n ${B:=1} ]]", 1, 7, "an expansion that assigns or fails is refused in [[ ]]"),
    "unset under set -u": (
        "if [ a ]; then set -u; fi\nA=$B",
        2,
        3,
        "`B` is not set, and `set -u` makes that fatal",
    ),
}


@pytest.mark.parametrize(("text", "line", "column", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(text: str | bytes, line: int, column: int, message: str) -> None:
    script = read_script(text.encode() if isinstance(text, str) else text)
    found = [finding for finding in script.findings if not finding.message.startswith("`set` changes")]
    assert [(f.severity, f.line, f.column, f.message) for f in found] == [
        (Severity.ERROR, line, column, message)
    ]
    assert not script.variables


def test_every_fault_is_told_in_the_order_of_the_file() -> None:
    text = "A=$(x)`y`\n[ '' ] && z\nB=(<(x) $1)\n"
    assert [(finding.line, finding.column) for finding in read(text).findings] == [
        (1, 3),
        (1, 7),
        (2, 11),
        (3, 4),
        (3, 9),
    ]
    text = (
        "A=$((B))\nif [ '' ]; then C=~; fi\nD=({1,2})\nE=$((F))\n"  # after the first, only the text is judged
    )
    assert [(finding.line, finding.column) for finding in read(text).findings] == [(1, 3), (2, 19), (3, 4)]


@pytest.mark.parametrize("data", [b"", b"\n", b"#!/bin/bash", b"  # only words\n\n", b"\\\n"])
def test_an_empty_file_has_no_faults_here(data: bytes) -> None:
    assert read_script(data) == Script({}, ())


# Presets that want to run. MARK is the file that bash makes of each when it sources it.

PLANTS = {
    "command": ("touch MARK", 1, 1),
    "command after assignments": ("A=1\n  touch MARK", 2, 3),
    "command between assignments": ("A=1; touch MARK; B=2", 1, 6),
    "command in a comment's next line": ("# \\\ntouch MARK", 2, 1),
    "command split by a continuation": ("tou\\\nch MARK", 1, 1),
    "quoted command": ("'touch' MARK", 1, 1),
    "command out of a variable": ("A='touch MARK'; $A", 1, 17),
    "prefix assignment": ("A=1 touch MARK", 1, 1),
    "substitution": ("A=$(touch MARK)", 1, 3),
    "substitution in quotes": ('A="--a 1 \\\n$(touch MARK)"', 2, 1),
    "substitution in backticks": ("A=x`touch MARK`", 1, 4),
    "substitution in an array": ("A=(a\n $(touch MARK))", 2, 2),
    "substitution appended": ("A+=$(touch MARK)", 1, 4),
    "substitution exported": ("export A=$(touch MARK)", 1, 10),
    "substitution in a default": ("A=${B:-$(touch MARK)}", 1, 8),
    "substitution in an assigned default": (": ${B:=$(touch MARK)}", 1, 8),
    "substitution in a quoted default": ('A="${B:-$(touch MARK)}"', 1, 9),
    "substitution in quotes in a quoted default": ("A=\"${B:-'$(touch MARK)'}\"", 1, 9),
    "backticks in a default": ("A=${B:-`touch MARK`}", 1, 8),
    "substitution in an alternative": ("B=1 A=${B:+$(touch MARK)}", 1, 12),
    "substitution in a pattern": ("B=1 A=${B#$(touch MARK)}", 1, 7),
    "substitution in a substring": ("B=1 A=${B:$(touch MARK)0}", 1, 7),
    "substitution of a file": ("A=$(<MARK.in) B=$(touch MARK)", 1, 3),
    "substitution in arithmetic": ("A=$((1 + $(touch MARK)1))", 1, 10),
    "substitution in a subscript": ("A[$(touch MARK)0]=1", 1, 1),
    "substitution in a subscript read": ("B=(1) A=${B[$(touch MARK)0]}", 1, 9),
    "substitution in an index": ("A=([$(touch MARK)0]=1)", 1, 5),
    "substitution in an index of arithmetic": ("A=$((B[$(touch MARK)0]))", 1, 6),
    "substitution in a test": ('[ -n "$(touch MARK)" ] && A=1', 1, 7),
    "substitution in [[": ("[[ $(touch MARK) ]]", 1, 4),
    "substitution behind -v": ("[[ -v B[$(touch MARK)0] ]]", 1, 9),
    "substitution in a no-op": (": $(touch MARK)", 1, 3),
    "substitution in a here-document": (": <<E\n$(touch MARK)\nE", 1, 3),
    "substitution in a here-string": (': <<< "$(touch MARK)"', 1, 3),
    "substitution in a case": ("case $(touch MARK) in *) ;; esac", 1, 1),
    "process substitution": ("A=<(touch MARK); sleep 0.2", 1, 3),
    "name evaluated by arithmetic": ("B='C[$(touch MARK)0]'; A=$((B))", 1, 26),
    "name evaluated by [[": ("B='C[$(touch MARK)0]'; [[ $B -eq 1 ]]", 1, 27),
    "name evaluated by -v": ("B='C[$(touch MARK)0]'; [[ -v $B ]]", 1, 27),
    "name evaluated by declare": ("B='C[$(touch MARK)0]=1'; declare -a \"$B\"", 1, 37),
    "name evaluated by export": ("B='touch MARK'; export C=${B@P}; eval $B", 1, 26),
    "name evaluated indirectly": ("B='C[$(touch MARK)0]'; A=${!B}", 1, 26),
    "prompt": ("B='$(touch MARK)'; A=${B@P}", 1, 22),
    "redirection": (": > MARK", 1, 3),
    "redirection alone": ("> MARK", 1, 1),
    "redirection before": ("A=1\n>MARK :", 2, 1),
    "redirected assignment": ("A=1 > MARK", 1, 5),
    "redirected test": ("[ a > MARK ] && A=1", 1, 5),
    "redirected block": ("if [ a ]; then A=1; fi >> MARK", 1, 24),
    "pipe": ("echo touch MARK | bash", 1, 1),
    "background": ("touch MARK & wait", 1, 1),
    "function": ("f() { touch MARK; }; f", 1, 1),
    "function over a no-op": ("true() { touch MARK; }; true", 1, 1),
    "alias": ("shopt -s expand_aliases; alias A=touch\nA MARK", 1, 1),
    "trap": ("trap 'touch MARK' EXIT", 1, 1),
    "DEBUG trap": ("trap 'touch MARK' DEBUG; A=1", 1, 1),
    "eval": ("eval 'touch MARK'", 1, 1),
    "exec": ("exec touch MARK", 1, 1),
    "builtin": ("builtin eval 'touch MARK'", 1, 1),
    "source": (". /dev/stdin <<< 'touch MARK'", 1, 14),
    "printf -v": ("printf -v 'A[$(touch MARK)0]' x", 1, 1),
    "read": ("read 'A[$(touch MARK)0]' <<< 1", 1, 26),
    "let": ("let 'A[$(touch MARK)0]=1'", 1, 1),
    "mapfile": ("mapfile -C 'touch MARK' -c 1 A <<< 1", 1, 32),
    "coprocess": ("coproc touch MARK; wait", 1, 1),
    "loop": ("for A in 1; do touch MARK; done", 1, 1),
    "condition": ("if touch MARK; then A=1; fi", 1, 4),
    "subshell": ("(touch MARK)", 1, 1),
    "group": ("{ touch MARK; }", 1, 1),
    "and": ("[ a ] && touch MARK", 1, 10),
    "negated": ("! touch MARK", 1, 3),
    "timed": ("time touch MARK", 1, 1),
    "PS4": ("PS4='$(touch MARK)'; set -x; A=1", 1, 1),
    "BASH_ENV": ("export BASH_ENV=MARK.in; echo 'touch MARK' > MARK.in; bash -c :", 1, 26),
}
BASH = shutil.which("bash") or ""
needs_bash = pytest.mark.skipif(not BASH, reason="bash is not installed: nothing to compare with")


def errors(text: str) -> list[tuple[int | None, int | None]]:
    return [(finding.line, finding.column) for finding in read(text).findings if finding.is_error]


@pytest.mark.parametrize(("text", "line", "column"), PLANTS.values(), ids=PLANTS)
@needs_bash
def test_planted_command(
    text: str, line: int, column: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run([BASH, "-c", text], capture_output=True, check=False, timeout=20)
    assert Path("MARK").exists(), "bash would not run it, so this proves nothing"
    for path in tmp_path.iterdir():
        path.unlink()
    assert errors(text)[0] == (line, column)
    assert not read(text).variables
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["PROMPT_COMMAND='touch f'", "PS1='$(touch f)'", "export PYTHONSTARTUP=f"])
def test_variables_that_run_later(text: str) -> None:
    assert len(errors(text)) == 1


# Bash itself as the judge

NAMES = ("A", "B", "C", "D", "E", "X", "TWO", "MODEL_ARGS", "MLM_EXTRA_ARGS")
DRIVER = """
for file in "$@"; do (
  cd empty; PATH=
  source "../$file" 2> "../$file.err"
  set +eux; set -f
  for name in @NAMES@; do
    declare -n held=$name
    if [[ ${held@a} == *a* ]]; then printf '%s\\0' $name array ${#held[@]} "${held[@]}"
    elif [[ -v $name ]]; then split=($held); printf '%s\\0' $name "$held" ${#split[@]} "${split[@]}"; fi
    declare +n held
  done
); printf '\\1'; done
""".replace("@NAMES@", " ".join(NAMES))


@functools.cache
def bash_reason() -> str:
    """Why bash cannot judge here; empty if it can."""
    if not BASH:
        return "bash is not installed: nothing to compare with"
    version = subprocess.run(
        [BASH, "-c", "echo ${BASH_VERSINFO[0]}"], capture_output=True, text=True, check=True
    )
    return (
        "" if int(version.stdout) >= 5 else f"bash {version.stdout.strip()} is older than 5: its rules differ"
    )


def sourced(texts: Sequence[str], folder: Path) -> list[list[str]]:
    """The variables that one bash holds after sourcing each text in a subshell with an empty environment."""
    if reason := bash_reason():
        pytest.skip(reason)
    (folder / "empty").mkdir(exist_ok=True)
    names = [f"{index}.sh" for index in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        (folder / name).write_bytes(text.encode())
    command = [BASH, "--norc", "-c", DRIVER, "bash", *names]
    result = subprocess.run(command, cwd=folder, env={}, capture_output=True, check=True, timeout=60)
    complaints = {name: (folder / f"{name}.err").read_text() for name in names}
    assert not list((folder / "empty").iterdir())
    assert not any(complaints.values()), complaints
    return [held.split("\0")[:-1] for held in result.stdout.decode().split("\1")[:-1]]


def told(script: Script) -> list[str]:
    told: list[str] = []
    for variable in sorted(script.variables.values(), key=lambda variable: NAMES.index(variable.name)):
        told += [variable.name, "array" if variable.is_array else variable.text]
        told += [str(len(variable.words)), *(word.text for word in variable.words)]
    return told


def agree(texts: Sequence[str], folder: Path) -> None:
    scripts = [read(text) for text in texts]
    for text, script, held in zip(texts, scripts, sourced(texts, folder), strict=True):
        assert script.variables or not errors(text), text
        assert told(script) == held, text


def test_every_example_above_is_what_bash_makes_of_it(tmp_path: Path) -> None:
    conditions = (f"TWO='2 2'\nif {condition}; then A=yes; else A=no; fi" for condition in CONDITIONS)
    hazards = (text for text, *_ in HAZARDS.values())
    agree(
        [
            *(text for text, _ in VALUES.values()),
            *(text for text, _ in WORDS.values()),
            *conditions,
            *hazards,
        ],
        tmp_path,
    )


QUOTED = st.text(alphabet="ab1 $\n\t\\*#=~{},;é'", max_size=6)
PLAIN = st.text(alphabet="ab19-=.,/%+@^:!]é\u00a0", max_size=4)
LITERALS = st.one_of(
    PLAIN,
    QUOTED.map(lambda text: "'" + text.replace("'", "") + "'"),
    QUOTED.map(lambda text: '"' + re.sub(r'([$`"\\])', r"\\\1", text) + '"'),
    QUOTED.map(lambda text: '"' + re.sub(r"[$`\"]", "", text).rstrip("\\") + '"'),
    QUOTED.map(lambda text: "$'" + text.replace("\\", "").replace("'", "\\'") + "'"),
    st.sampled_from(["\\ ", "\\\\", "\\$", "\\\n", "\\~", "\\#", r"$'\t\x41\n'", '""', "''", '"a\\\nb"']),
)
BARE = "$A ${B} $C ${D} ${#A} ${E:-x} ${E:-$A} ${A:+y} ${E=z} ${B:=w} $((2*3)) ${C[@]} ${C[*]}"
IN_QUOTES = "$A|${B} x|${C[@]}|p${C[@]}q|${C[*]}|${E:-x y}|$((7/2))|a\n  $A"
EXPANSIONS = st.sampled_from(
    [*BARE.split(), *(f'"{inside}"' for inside in IN_QUOTES.split("|")), "${D-'p q'}"]
)
VALUE = st.lists(st.one_of(LITERALS, EXPANSIONS), max_size=5).map("".join)
ELEMENTS = st.lists(VALUE, max_size=4).map(lambda values: "( " + " ".join(values) + "\n)")
ASSIGNMENT = st.tuples(
    st.sampled_from("ABCD"), st.sampled_from(["=", "=", "+="]), st.one_of(VALUE, VALUE, ELEMENTS)
).map("".join)
OPERANDS = st.sampled_from(["$A", '"$B"', "${E}", "a", "''", '"${C[@]}"', "${D:-1}", "10"])
TESTS = st.one_of(
    st.builds("{} {}".format, st.sampled_from(["-n", "-z", "!", "! -n"]), OPERANDS),
    st.builds("{} {} {}".format, OPERANDS, st.sampled_from(["==", "!="]), OPERANDS),
)
STATEMENTS = st.one_of(
    ASSIGNMENT,
    ASSIGNMENT,
    st.builds("if [[ {} ]]; then {}; else\n{}\nfi".format, TESTS, ASSIGNMENT, ASSIGNMENT),
    st.builds("[[ {} ]] && {} || {}".format, TESTS, ASSIGNMENT, ASSIGNMENT),
    st.builds("export {}".format, st.tuples(st.sampled_from("AB"), st.just("="), VALUE).map("".join)),
    st.sampled_from(["unset A", ": ${E:=1 2}", "# a comment", "declare -x B"]),
)
SCRIPTS = st.lists(STATEMENTS, min_size=1, max_size=4).map(
    lambda statements: "A='a  b'\nC=(u 'v w' '')\n" + "\n".join(statements)
)


def test_generated_scripts_are_what_bash_makes_of_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    counted = {True: 0, False: 0}

    @given(st.lists(SCRIPTS, min_size=25, max_size=40))
    @settings(max_examples=16, deadline=None, suppress_health_check=list(HealthCheck))
    def compare(texts: list[str]) -> None:
        read_well = {text: not errors(text) for text in texts}
        for text in texts:
            counted[read_well[text]] += 1
        agree([text for text in texts if read_well[text]], tmp_path_factory.mktemp("bash"))

    compare()
    # Some of it the grammar cannot read, such as a blank escaped at a line's end; that is refused.
    assert counted[True] > 4 * counted[False]


@pytest.mark.parametrize("text", ["A=$(( ))", "[ a=b ]", "[ ! ]", "[[ a = ${B} ]]", "A=+]\\$''", "A=$"])
def test_bash_that_the_grammar_cannot_read_is_refused(text: str) -> None:
    assert len(errors(text)) == 1


# Whatever the bytes, an answer, and soon

TOKENS = (
    "A= += a 1 ( ) [ ] [[ ]] { } ${ $(( )) $( $A ` \" ' $' # ~ * ? ! \\ \\\n \n ; ;; & && | || < > << "
    "if then elif "
    "else fi test set unset export declare -a -v -z = == case in esac : é \0 \r \xa0 :- := % / - , .. @"
)
SOUP = st.lists(st.sampled_from(TOKENS.split(" ")), max_size=40)


@given(
    st.one_of(
        st.binary(),
        st.text().map(str.encode),
        SOUP.map("".join).map(str.encode),
        SOUP.map(" ".join).map(str.encode),
    )
)
@settings(max_examples=400, deadline=None)
def test_no_bytes_raise(data: bytes) -> None:
    script = read_script(data)
    lines = data.decode(errors="surrogateescape").split("\n")
    for finding in script.findings:
        assert finding.line and finding.column
        assert 1 <= finding.column <= len(lines[finding.line - 1]) + 1


MANY = 10_000
FLOODS = {
    "ifs": "if [ a ]; then\n" * MANY,
    "closed ifs": "if [ a ]; then\n" * 300 + "A=1\n" + "fi\n" * 300,
    "arithmetic": "A=" + "$((" * MANY,
    "parentheses": "A=$((" + "(" * MANY,
    "closed parentheses": "A=$((" + "(" * 2000 + "1" + ")" * 2000 + "))",
    "sums": "A=$((" + "1+" * 3000 + "1))",
    "minus signs": "A=$((" + "- " * 3000 + "1))",
    "defaults": "A=" + "${a:-" * MANY,
    "closed defaults": "A=" + "${a:-" * 1000 + "}" * 1000,
    "quoted defaults": 'A="' + "${a:-" * MANY + '"',
    "substitutions": "A=" + "$(" * MANY,
    "backticks": "A=" + "`" * MANY,
    "pipes": "a|" * 4000,
    "more pipes": "a|" * 500_000,
    "pipes behind a quote": "'" + "a|" * 500_000,
    "arrays": "A=(" * MANY,
    "negations": "! " * MANY,
    "lists": "[ a ] && " * 500 + "A=1",
    "double brackets": "[[ " + "a && " * 500 + "a ]]",
    "here-documents": ": " + "<<A " * 2000,
    "quotes": '"' * 100_001,
    "comments": "#\n" * 500_000,
    "blanks": " " * 1_000_000,
    "continuations": "\\\n" * 500_000,
    "one long string": "MODEL_ARGS='" + "x" * 1_000_000 + "'",
    "doubling": "A=0123456789\n" + "A=$A$A\n" * 60,
    "doubling by appending": "A=0123456789\n" + "A+=$A\n" * 60,
    "doubling an array": "A=(1 2)\n" + 'A+=("${A[@]}")\n' * 60,
    "doubling nothing": "A=('' '')\n" + 'A+=("${A[@]}")\n' * 60,
}


@pytest.mark.parametrize("text", FLOODS.values(), ids=FLOODS)
def test_flood(text: str) -> None:
    read(": warm")
    start = process_time()
    script = read(text)
    assert process_time() - start < 1
    assert (
        script.variables or any(finding.is_error for finding in script.findings) or not text.strip(" #\\\n")
    )


def test_the_module_loads_nothing_heavy() -> None:
    code = "import sys, harness.shell; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "megatron", "modelopt", "numpy", "rich", "typer"} & set(loaded)
