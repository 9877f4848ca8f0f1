"""The presets of the catalogue as architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.architecture import Architecture, architecture
from harness.preset import PresetFile, find_presets, load_preset

TREE = Path(__file__).parents[1] / "presets"


def of_preset(file: PresetFile) -> Architecture:
    """The architecture at full size, of a file that must describe one."""
    arguments = load_preset(file).arguments
    assert arguments is not None
    return architecture(arguments)


def named(name: str) -> Architecture:
    """The one of that name, with or without its organisation."""
    return of_preset(find_presets([name], TREE)[0])


def changed(model: Architecture, **changes: Any) -> Architecture:
    """The same with some arguments changed."""
    return architecture(model.arguments.replaced(changes))
