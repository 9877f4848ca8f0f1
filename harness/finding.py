"""Finding: one thing that is wrong with a preset, or with the model it describes.

A failure is a value: every stage returns findings, and an exception means that the harness itself
or the way it was called is wrong (see ``errors.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """An error fails the case; a warning is shown and does not."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, where it stands, what it is and what it should be.

    ``flag`` is spelled as in the preset (``--num-query-groups``); ``line`` and ``column`` count from
    one and are None where the finding has no place in the file; ``module`` is the Megatron module
    path for findings about a built model, ``check`` the named check of the stage that found it, if one did.
    """

    stage: str
    severity: Severity
    message: str
    flag: str | None = None
    line: int | None = None
    column: int | None = None
    module: str | None = None
    expected: Any = None
    actual: Any = None
    check: str | None = None

    @property
    def is_error(self) -> bool:
        return self.severity is Severity.ERROR


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.is_error for finding in findings)
