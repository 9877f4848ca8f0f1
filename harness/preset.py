"""Preset: one ``.sh`` file -> its variables, flags and effective arguments; and presets by name.

Nothing in a preset is ever executed, and nothing in it raises: whatever is wrong is a finding.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from harness.arguments import Arguments, resolve
from harness.errors import UnknownPreset, UsageError
from harness.finding import Finding, Severity
from harness.flags import Flag, parse_flags
from harness.shell import ARGUMENT_VARIABLES, MAX_BYTES, Script, Variable, read_script

# What Megatron-LM's ``conf/arguments.sh`` has set before it sources a preset, at layout tp1.
SET_BEFORE = dict.fromkeys(("TP", "ETP", "EP", "PP", "CP", "DP"), "1")
# What its scripts run after it.
EXECUTED = frozenset({"LAUNCH_SCRIPT", "SCRIPT_DIR"})


@dataclass(frozen=True, slots=True)
class PresetFile:
    """A preset's name, ``Org/Model``, and where it stands."""

    name: str
    path: Path


@dataclass(frozen=True)
class Preset:
    """What one file says. ``arguments`` is None where it says nothing that could be read."""

    name: str
    path: Path
    variables: Mapping[str, Variable]
    flags: tuple[Flag, ...]
    arguments: Arguments | None
    findings: tuple[Finding, ...]


def load_preset(file: PresetFile) -> Preset:
    """Read one preset; every fault in it, down to a file that cannot be read, is a finding."""
    data, unreadable = _read(file.path)
    if unreadable is not None:
        return Preset(file.name, file.path, MappingProxyType({}), (), None, (unreadable,))
    script = read_script(data, environment=SET_BEFORE)
    variables = MappingProxyType(dict(script.variables))
    findings = [*script.findings, *_executed(script)]
    words = [
        word
        for name in ARGUMENT_VARIABLES
        if name in script.variables
        for word in script.variables[name].words
    ]
    if "MODEL_ARGS" not in script.variables:
        # A syntax fault may be why it is not set; two findings for one fault would mislead.
        if not any(finding.is_error for finding in findings):
            findings.append(_fault("the file does not set MODEL_ARGS, so it describes no model", line=1))
        return Preset(file.name, file.path, variables, (), None, tuple(findings))
    if not words:
        line = script.variables["MODEL_ARGS"].line
        findings.append(_fault("MODEL_ARGS is empty, so it describes no model", line=line))
        return Preset(file.name, file.path, variables, (), None, tuple(findings))
    flags, wrong = parse_flags(words)
    arguments, refused = resolve(flags)
    return Preset(file.name, file.path, variables, flags, arguments, (*findings, *wrong, *refused))


def _executed(script: Script) -> Iterator[Finding]:
    """Assignments that are harmless themselves and run something in the script that sources the preset."""
    for name in sorted(EXECUTED & script.variables.keys()):
        variable = script.variables[name]
        message = f"{name} is refused: Megatron-LM's scripts execute what it holds"
        yield Finding("parse", Severity.ERROR, message, name, variable.line, variable.column)


def _read(path: Path) -> tuple[bytes, Finding | None]:
    try:
        if path.is_dir():
            return b"", _fault(f"{path} is a directory, not a preset file")
        if not path.is_file():
            return b"", _fault(f"{path} is not a regular file")
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1), None
    except OSError as error:
        return b"", _fault(f"{path} cannot be read: {error.strerror or error}")


def _fault(message: str, line: int | None = None) -> Finding:
    return Finding("parse", Severity.ERROR, message, line=line)


def preset_at(path: Path) -> PresetFile:
    """The file at ``path``, named after its folder and itself."""
    return PresetFile(f"{path.absolute().parent.name}/{path.name.removesuffix('.sh')}", path)


def discover(root: Path) -> tuple[PresetFile, ...]:
    """Every ``.sh`` file below ``root``, by name. Raises UsageError where there is none."""
    if not root.is_dir():
        raise UsageError(f"{root} is not a directory of presets")
    files = tuple(sorted(map(preset_at, root.rglob("*.sh")), key=lambda file: (file.name.lower(), file.path)))
    if not files:
        raise UsageError(f"no preset (*.sh) below {root}")
    return files


def find_presets(names: Iterable[str], root: Path) -> tuple[PresetFile, ...]:
    """The presets of these names below ``root``, or the files and folders at these paths.

    A name is ``Org/Model`` or ``Model``, upper or lower case; no name means every preset. Raises
    UnknownPreset for a name that no preset or more than one has, naming the near ones.
    """
    names = tuple(names)
    if not names:
        return discover(root)
    found: dict[Path, PresetFile] = {}
    for name in names:
        for file in _find(name, root):
            found.setdefault(file.path.absolute(), file)
    return tuple(found.values())


def _find(name: str, root: Path) -> Sequence[PresetFile]:
    path = Path(name)
    if name.endswith(".sh") and os.path.lexists(path):
        return (preset_at(path),)
    if os.path.isdir(path):
        return discover(path)
    wanted = name.removesuffix(".sh").lower()
    known = discover(root)
    exact = [file for file in known if file.name == name]
    matches = exact or [
        file for file in known if wanted in (file.name.lower(), file.name.lower().rpartition("/")[2])
    ]
    if len(matches) == 1:
        return matches
    if matches:
        raise UnknownPreset(
            f"{name!r} is the name of {len(matches)} presets: {', '.join(str(file.path) for file in matches)}"
        )
    by_name = {
        key: file.name for file in known for key in (file.name.lower(), file.name.lower().rpartition("/")[2])
    }
    near = [by_name[key] for key in difflib.get_close_matches(wanted, by_name, n=5, cutoff=0.5)]
    hint = (
        f"did you mean {', '.join(dict.fromkeys(near))}?"
        if near
        else f"{len(known)} presets are below {root}"
    )
    raise UnknownPreset(f"no preset is called {name!r}; {hint}")
