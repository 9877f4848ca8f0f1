"""The exception tree. A wrong preset is a Finding, never one of these.

HarnessError
  UsageError            the command line asks for something that cannot be: exit code 2
    UnknownPreset       no preset of that name, or more than one
    UnknownRecipe
    UnknownLayout
    DeviceUnavailable
  ReportError           a report file cannot be read or written: exit code 2
"""

from __future__ import annotations


class HarnessError(Exception):
    """Base of everything that the harness raises on purpose."""


class UsageError(HarnessError):
    """The caller asked for something that cannot be done."""


class UnknownPreset(UsageError):
    """No preset has that name, or several do."""


class UnknownRecipe(UsageError):
    """No recipe has that name."""


class UnknownLayout(UsageError):
    """A layout that cannot be read or cannot exist."""


class DeviceUnavailable(UsageError):
    """The device asked for is not on this machine."""


class ReportError(HarnessError):
    """A report that cannot be read or written."""
