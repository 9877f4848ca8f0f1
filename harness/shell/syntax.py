"""A syntax tree of bash -> the places where it holds what a preset may not.

tree-sitter-bash gives the structure. Every node that is not known to be harmless is a fault, and so is
every character between statements that the tree passed over: nothing is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Iterator

from tree_sitter import Node

from harness.shell.expand import BLANKS, ONLY, Refused, is_lone_dollar, parameter
from harness.shell.source import Source

MAX_DEPTH = 50  # levels of the syntax tree; a preset has about ten

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
}
_REFUSED_TOKENS = {"&": "a background job", ";;": "`;;` outside of `case`"}
_ONE_LINE = ("negated_command", "variable_assignments", "declaration_command", "unset_command")
_STATEMENT_NODES = "program if_statement elif_clause else_clause list redirected_statement"
_STRUCTURE = (*_ONE_LINE, *_STATEMENT_NODES.split())
_OTHER_NODES = """
    variable_assignment variable_name comment command command_name test_command test_operator word number
    string string_content raw_string ansi_c_string concatenation simple_expansion expansion array regex
    arithmetic_expansion binary_expression unary_expression parenthesized_expression extglob_pattern
"""
_KNOWN_NODES = frozenset((*_STRUCTURE, *_OTHER_NODES.split()))
_CLOSERS = ("fi", ")", "))", "}", "]", "]]", '"', "`", "done", "esac")
_COMMANDS = (":", "true", "test", "set")


def syntax_faults(root: Node, source: Source) -> Iterator[tuple[int, str]]:
    """Every place where the tree is broken, too deep, or holds what a preset may not; nothing inside one."""
    stack = [(root, root, 0)]
    while stack:
        node, parent, depth = stack.pop()
        if depth > MAX_DEPTH:
            yield source.start(node), f"syntax nested deeper than {MAX_DEPTH} levels is refused"
            return
        if fault := _fault(node, parent, source):
            yield fault
        else:
            stack.extend((child, node, depth + 1) for child in reversed(node.children))


def _fault(node: Node, parent: Node, source: Source) -> tuple[int, str] | None:
    start = source.start(node)
    if node.is_missing and node.type in _CLOSERS:
        return source.start(parent), f"syntax not understood: what opens here lacks its `{node.type}`"
    if node.is_missing:
        return start, f"syntax not understood: `{node.type}` is missing here"
    if node.type == "ERROR":
        tokens = [child for child in node.children if not child.is_named and child.type not in ";="]
        token = next(iter(tokens), node)
        return source.start(token), f"syntax not understood at `{source.of(token)[:40]}`"
    if not node.is_named:
        refused = _REFUSED_TOKENS.get(node.type) if parent.type in _STRUCTURE else None
        return (start, f"{refused} {ONLY}") if refused else None
    if node.type in ("compound_statement", "test_command") and source.text.startswith("((", start):
        return start, f"an arithmetic command {ONLY}"
    if node.type in _REFUSED_NODES and (node.type, parent.type) != ("subscript", "expansion"):
        return start, f"{_REFUSED_NODES[node.type]} {ONLY}"
    if node.type not in _KNOWN_NODES and node.type != "subscript":
        return start, f"{node.type.replace('_', ' ')} {ONLY}"
    if node.type == "comment" and source.text[max(start - 1, 0)] not in "# \t\n;&|()":
        return start, "syntax not understood at `#`"
    if node.type == "command":
        return _command_fault(node, source)
    if node.type in ("simple_expansion", "expansion") and not is_lone_dollar(node, source):
        try:
            parameter(source, node)
        except Refused as refusal:
            return refusal.index, refusal.message
    return _gap_fault(node, source) if node.type in _STRUCTURE else None


def _command_fault(node: Node, source: Source) -> tuple[int, str] | None:
    first, name = node.children[0], source.of(node.children[0])
    for child in node.children:
        if child.type.endswith("_redirect"):
            return source.start(child), f"{_REFUSED_NODES[child.type]} {ONLY}"
    if first.type == "variable_assignment":
        return source.start(node), f"an assignment before a command {ONLY}"
    if not name:
        return source.start(node), "syntax not understood: a command is missing here"
    return None if name in _COMMANDS else (source.start(node), f"the command `{name[:40]}` {ONLY}")


def _gap_fault(node: Node, source: Source) -> tuple[int, str] | None:
    """Between statements only blanks may stand: what the tree passed over is not passed over here."""
    start, end = (0, len(source.text)) if node.type == "program" else (node.start_byte, node.end_byte)
    blanks = " \t" if node.type in _ONE_LINE else BLANKS
    for begin, after in [*((child.start_byte, child.end_byte) for child in node.children), (end, end)]:
        if rest := source.text[start:begin].lstrip(blanks):
            return begin - len(rest), f"syntax not understood at `{rest[:40].strip()}`"
        start = after
    return None
