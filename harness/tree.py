"""Tree: a folder -> its presets, and every other shell file with the reason why it is not checked.

A tree as Megatron-LM's ``conf/`` holds more than presets: *overlays*, which only set the parallel sizes,
the checkpoint and extra flags of a run, and scripts. What a file is, its text alone tells; nothing is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from harness.shell import MAX_BYTES, Variable, read_script

# What an overlay sets (Megatron-LM's ``examples/post_training/modelopt/ADVANCED.md``), besides MLM_*.
PARALLEL_SIZES = ("TP", "ETP", "EP", "PP", "CP", "DP")
OVERLAY_VARIABLES = frozenset({*PARALLEL_SIZES, "HF_MODEL_CKPT", "TOKENIZER_MODEL", "LAUNCH_SCRIPT"})

_SETS_MODEL_ARGS = re.compile(
    rb"^[^#\n]*\bMODEL_ARGS(\[[^\]\n]*\])?\+?=|^\s*(declare|typeset|export|readonly)\b[^#\n]*\bMODEL_ARGS\b",
    re.MULTILINE,
)
_DESCRIBES_A_MODEL = re.compile(rb"--(num-layers|hidden-size|num-attention-heads|hybrid-layer-pattern)\b")


class Kind(StrEnum):
    """PRESET is also what describes a model badly, and what cannot be read: both are checked, and fail."""

    PRESET = "preset"
    OVERLAY = "overlay"
    SCRIPT = "script"


@dataclass(frozen=True, slots=True)
class PresetFile:
    """A preset's name, ``Org/Model``, and where it stands."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class NotChecked:
    """A file or folder of a tree that is no preset of it, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Tree:
    """What stands in a folder. The overlays are among ``not_checked``: they are checked only when named."""

    presets: tuple[PresetFile, ...]
    overlays: tuple[PresetFile, ...]
    not_checked: tuple[NotChecked, ...]


def preset_at(path: Path) -> PresetFile:
    """The file at ``path``, named after its folder and itself."""
    return PresetFile(f"{path.absolute().parent.name}/{path.name.removesuffix('.sh')}", path)


def survey(root: Path) -> Tree:
    """Every ``.sh`` file below ``root``, by name. A link to a file is a file under its own name.

    A link to a folder is followed where it leads out of the tree, once; where it leads back into it, its
    files are there already.
    """
    presets: list[PresetFile] = []
    overlays: list[PresetFile] = []
    not_checked: list[NotChecked] = []
    for path, refused in _shell_files(root):
        if refused:
            not_checked.append(NotChecked(path, refused))
            continue
        kind, reason = what_it_is(path)
        if kind is Kind.PRESET:
            presets.append(preset_at(path))
            continue
        not_checked.append(NotChecked(path, reason))
        if kind is Kind.OVERLAY:
            overlays.append(preset_at(path))
    return Tree(_by_name(presets), _by_name(overlays), tuple(sorted(not_checked, key=lambda one: one.path)))


def _by_name(files: list[PresetFile]) -> tuple[PresetFile, ...]:
    return tuple(sorted(files, key=lambda file: (file.name.lower(), file.path)))


def _shell_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Shell files below ``root``, and folders that are not entered with the reason why."""
    entered = [Path(os.path.realpath(root))]
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            yield folder, f"cannot be read: {error.strerror or error}"
            continue
        for path in (folder / name for name in names):
            if not path.is_dir():
                if path.name.endswith(".sh"):
                    yield path, ""
            elif not path.is_symlink():
                waiting.append(path)
            elif leads_back(path, entered):
                yield path, f"a link to the folder {os.readlink(path)}, whose files are read there"
            else:
                entered.append(Path(os.path.realpath(path)))
                waiting.append(path)


def leads_back(link: Path, entered: list[Path]) -> bool:
    """Whether a link to a folder leads into one of those, or to a folder that holds one of them."""
    real = Path(os.path.realpath(link))
    return any(real.is_relative_to(folder) or folder.is_relative_to(real) for folder in entered)


def what_it_is(path: Path) -> tuple[Kind, str]:
    """What the file at ``path`` is, and, unless it is a preset, why it is not checked."""
    try:
        if not path.is_file():
            return Kind.PRESET, ""
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError:
        return Kind.PRESET, ""
    if _SETS_MODEL_ARGS.search(data) or len(data) > MAX_BYTES:
        return Kind.PRESET, ""
    script = read_script(data)
    error = next((finding for finding in script.findings if finding.is_error), None)
    if error is not None:
        if _DESCRIBES_A_MODEL.search(data):
            return Kind.PRESET, ""
        return Kind.SCRIPT, f"a script: it sets no MODEL_ARGS, and in line {error.line} {error.message}"
    if is_overlay(script.variables):
        names = ", ".join(sorted(script.variables))
        return Kind.OVERLAY, f"an overlay: it sets {names} and no MODEL_ARGS; name it to check what it gives"
    return Kind.PRESET, ""


def is_overlay(variables: Mapping[str, Variable]) -> bool:
    """Whether a file that sets ``variables`` only says how a preset is run."""
    return (
        bool(variables)
        and "MODEL_ARGS" not in variables
        and all(name in OVERLAY_VARIABLES or name.startswith("MLM_") for name in variables)
    )
