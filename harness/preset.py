"""Preset: one ``.sh`` file -> its variables, flags and effective arguments; and presets by name.

Nothing in a preset is ever executed, and nothing in it raises: whatever is wrong is a finding. An overlay
(``tree.py``) is read as Megatron-LM's scripts read it: what it sets is there when its preset is sourced.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from harness.arguments import Arguments, resolve
from harness.errors import UnknownLayout, UnknownPreset, UsageError
from harness.finding import Finding, Severity
from harness.flags import Flag, Role, flag_table, parse_flags
from harness.layout import Layout
from harness.shell import ARGUMENT_VARIABLES, MAX_BYTES, Script, Variable, Word, read_script
from harness.tree import PARALLEL_SIZES, NotChecked, PresetFile, Tree, is_overlay, preset_at, survey

__all__ = ["Preset", "PresetFile", "discover", "find", "find_presets", "load_preset", "preset_at"]

# What Megatron-LM's ``conf/arguments.sh`` has set before it sources a preset, at layout tp1.
SET_BEFORE = dict.fromkeys(PARALLEL_SIZES, "1")
# What its scripts run after it.
EXECUTED = frozenset({"LAUNCH_SCRIPT", "SCRIPT_DIR"})

# Presets of a catalogue, each of which a worker meets again with other recipes.
_KEPT = 64


@dataclass(frozen=True)
class Preset:
    """What one file says. ``arguments`` is None where it says nothing that could be read.

    ``path`` is where the model is described, and so where its published facts stand: for an overlay, the
    preset that it goes with.
    """

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
        return _nothing(file, {}, [unreadable])
    return _described(file, data) or _overlaid(file, read_script(data))


@lru_cache(maxsize=_KEPT)
def _described(file: PresetFile, data: bytes) -> Preset | None:
    """What a file of these bytes says by itself; None for an overlay, which goes with another file."""
    script = read_script(data, environment=SET_BEFORE)
    findings = [*script.findings, *_executed(script)]
    if not any(finding.is_error for finding in script.findings) and is_overlay(script.variables):
        return None
    if "MODEL_ARGS" not in script.variables:
        # A syntax fault may be why it is not set; two findings for one fault would mislead.
        if not any(finding.is_error for finding in findings):
            findings.append(_fault("the file does not set MODEL_ARGS, so it describes no model", line=1))
        return _nothing(file, script.variables, findings)
    words = _words(script)
    if not words:
        line = script.variables["MODEL_ARGS"].line
        findings.append(_fault("MODEL_ARGS is empty, so it describes no model", line=line))
        return _nothing(file, script.variables, findings)
    flags, wrong = parse_flags(words)
    arguments, refused = resolve(flags)
    variables = MappingProxyType(dict(script.variables))
    return Preset(file.name, file.path, variables, flags, arguments, (*findings, *wrong, *refused))


def _nothing(file: PresetFile, variables: Mapping[str, Variable], findings: Iterable[Finding]) -> Preset:
    return Preset(file.name, file.path, MappingProxyType(dict(variables)), (), None, tuple(findings))


def _words(script: Script) -> list[Word]:
    """What the script's variables hand to Megatron's command line."""
    held = script.variables
    return [word for name in ARGUMENT_VARIABLES if name in held for word in held[name].words]


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
        if path.is_symlink() and not path.exists():
            return b"", _fault(f"{path} is a link to {os.readlink(path)}, which leads to no file")
        if not path.is_file():
            return b"", _fault(f"{path} is not a regular file")
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1), None
    except OSError as error:
        return b"", _fault(f"{path} cannot be read: {error.strerror or error}")


def _fault(message: str, line: int | None = None) -> Finding:
    return Finding("parse", Severity.ERROR, message, line=line)


# ---- overlays ----


def _overlaid(file: PresetFile, overlay: Script) -> Preset:
    """The preset that an overlay goes with, read with what the overlay sets, and its extra flags added.

    Findings in the preset's own text have no place: the lines of a report are the overlay's.
    """
    held = overlay.variables
    findings = [*overlay.findings, *_executed(overlay), *_parallel_sizes(held)]
    base, wanted = _base_of(file, held.get("HF_MODEL_CKPT"))
    if base is None:
        where = held.get("HF_MODEL_CKPT") or next(iter(held.values()))
        findings.append(_fault(f"an overlay, and {wanted}", where.line))
        return _nothing(file, held, findings)
    environment = SET_BEFORE | {name: variable.text for name, variable in held.items()}
    data, unreadable = _read(base.path)
    script = read_script(data, environment=environment)
    placeless = [replace(finding, line=None, column=None) for finding in script.findings]
    if unreadable is not None or "MODEL_ARGS" not in script.variables:
        message = f"an overlay of {base.path}, which describes no model"
        return _nothing(file, held, [*findings, *placeless, unreadable or _fault(message, line=1)])
    described, wrong = parse_flags(_words(script))
    extra: tuple[Flag, ...] = ()
    wrong_extra: tuple[Finding, ...] = ()
    if "MLM_EXTRA_ARGS" in held and "MLM_EXTRA_ARGS" not in script.variables:
        extra, wrong_extra = parse_flags(held["MLM_EXTRA_ARGS"].words)
    told = f"an overlay: read with {base.path}, where the flags stand that have no line here"
    findings.append(Finding("parse", Severity.WARNING, told, line=1))
    findings += placeless
    findings += [replace(finding, line=None, column=None) for finding in wrong]
    findings += [finding for finding in wrong_extra if not _is_of_a_run(finding)]
    findings += _overrides(described, extra)
    added = {flag.dest for flag in extra}
    flags = (*(replace(flag, line=0, column=0) for flag in described if flag.dest not in added), *extra)
    arguments, refused = resolve(flags)
    variables = MappingProxyType({**script.variables, **held})
    return Preset(file.name, base.path, variables, flags, arguments, (*findings, *refused))


def _is_of_a_run(finding: Finding) -> bool:
    """A warning that a flag belongs to a run: that is what an overlay is for."""
    spec = flag_table().get(finding.flag or "")
    return not finding.is_error and spec is not None and spec.role in (Role.LAYOUT, Role.RUNTIME)


def _parallel_sizes(variables: Mapping[str, Variable]) -> Iterator[Finding]:
    """The layout that an overlay asks for is the run's; what is checked is the layout of the case."""
    asked = [variables[name] for name in PARALLEL_SIZES if name in variables and name != "DP"]
    if not asked:
        return
    text = ",".join(f"{variable.name.lower()}{variable.text}" for variable in asked)
    try:
        layout = Layout.parse(text)
    except UnknownLayout as error:
        yield replace(_fault(str(error)), flag=asked[0].name, line=asked[0].line)
        return
    message = f"the overlay asks for {layout}: what is checked is the layout given with --layout, else tp1"
    yield Finding("parse", Severity.WARNING, message, asked[0].name, asked[0].line, asked[0].column)


def _base_of(file: PresetFile, checkpoint: Variable | None) -> tuple[PresetFile | None, str]:
    """The preset in the same tree that the last two parts of HF_MODEL_CKPT name, else what is missing."""
    if checkpoint is None:
        return None, "HF_MODEL_CKPT, which would name the preset that it goes with, is not set"
    parts = checkpoint.text.rstrip("/").split("/")
    if len(parts) < 2:
        return None, f"HF_MODEL_CKPT {checkpoint.text!r} names no Org/Model that it could go with"
    wanted = "/".join(parts[-2:]).lower()
    tree = survey(file.path.absolute().parent.parent)
    for preset in tree.presets:
        if preset.name.lower() == wanted:
            return preset, ""
    return None, f"no preset {'/'.join(parts[-2:])} (HF_MODEL_CKPT) is in the tree that it stands in"


def _overrides(described: Sequence[Flag], extra: Sequence[Flag]) -> Iterator[Finding]:
    before = {flag.dest: flag for flag in described}
    for flag in extra:
        old = before.get(flag.dest)
        if old is not None and old.value != flag.value:
            message = f"{flag.name} overrides the preset's {' '.join((old.name, *old.words))}"
            yield Finding(
                "parse",
                Severity.WARNING,
                message,
                flag.name,
                flag.line,
                flag.column,
                expected=old.value,
                actual=flag.value,
            )


# ---- presets by name ----


@dataclass(frozen=True, slots=True)
class Found:
    """The presets that were asked for, and what else stands in the folders that were asked for."""

    files: tuple[PresetFile, ...]
    not_checked: tuple[NotChecked, ...] = ()


def discover(root: Path) -> tuple[PresetFile, ...]:
    """Every preset below ``root``, by name. Raises UsageError where there is none."""
    return _tree(root).presets


def _tree(root: Path) -> Tree:
    if not root.is_dir():
        raise UsageError(f"{root} is not a directory of presets")
    tree = survey(root)
    if not tree.presets:
        listed = "".join(f"\n  {one.path}: {one.reason}" for one in tree.not_checked)
        raise UsageError(f"no preset (*.sh) below {root}{listed}")
    return tree


def find_presets(names: Iterable[str], root: Path) -> tuple[PresetFile, ...]:
    """The files of ``find``."""
    return find(names, root).files


def find(names: Iterable[str], root: Path) -> Found:
    """The presets of these names below ``root``, or the files and folders at these paths.

    A name is ``Org/Model`` or ``Model``, upper or lower case, of a preset or an overlay; no name means
    every preset. Raises UnknownPreset for a name that none or more than one has, naming the near ones.
    """
    names = tuple(names)
    if not names:
        tree = _tree(root)
        return Found(tree.presets, tree.not_checked)
    files: dict[Path, PresetFile] = {}
    others: dict[Path, NotChecked] = {}
    for name in names:
        found = _find(name, root)
        for file in found.files:
            files.setdefault(file.path.absolute(), file)
        for other in found.not_checked:
            others.setdefault(other.path.absolute(), other)
    # An overlay that is named is checked, whatever folder lists it.
    listed = tuple(other for path, other in others.items() if path not in files)
    return Found(tuple(files.values()), listed)


def _find(name: str, root: Path) -> Found:
    path = Path(name)
    if name.endswith(".sh") and os.path.lexists(path):
        return Found((preset_at(path),))
    if os.path.isdir(path):
        tree = _tree(path)
        return Found(tree.presets, tree.not_checked)
    wanted = name.removesuffix(".sh").lower()
    tree = _tree(root)
    known = (*tree.presets, *tree.overlays)
    exact = [file for file in known if file.name == name]
    matches = exact or [
        file for file in known if wanted in (file.name.lower(), file.name.lower().rpartition("/")[2])
    ]
    if len(matches) == 1:
        return Found(tuple(matches))
    if matches:
        raise UnknownPreset(
            f"{name!r} is the name of {len(matches)} presets: {', '.join(str(file.path) for file in matches)}"
        )
    raise UnknownPreset(f"no preset is called {name!r}; {_near(wanted, known, root)}")


def _near(wanted: str, known: Sequence[PresetFile], root: Path) -> str:
    by_name = {
        key: file.name for file in known for key in (file.name.lower(), file.name.lower().rpartition("/")[2])
    }
    near = [by_name[key] for key in difflib.get_close_matches(wanted, by_name, n=5, cutoff=0.5)]
    if near:
        return f"did you mean {', '.join(dict.fromkeys(near))}?"
    return f"{len(known)} presets are below {root}"
