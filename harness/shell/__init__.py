"""Shell: bash text -> assignments and words, by syntax tree, never run."""

from harness.shell.statements import (
    ARGUMENT_VARIABLES,
    MAX_BYTES,
    MAX_CODE,
    Script,
    Variable,
    Word,
    read_script,
)

__all__ = ["ARGUMENT_VARIABLES", "MAX_BYTES", "MAX_CODE", "Script", "Variable", "Word", "read_script"]
