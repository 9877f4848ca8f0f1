"""Edits of a preset's text, copies with the publisher's facts beside them, and a limit of time."""

from __future__ import annotations

import json
import re
import shutil
import signal
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from harness.finding import Finding
from harness.pipeline import lint
from harness.preset import discover, preset_at

# Models that differ in what they have: biases, q/k norms, tied embeddings, experts. Every other preset
# has the same settings at other sizes.
NAMES = """
Qwen2.5-0.5B-Instruct Qwen2.5-7B-Instruct Qwen3-0.6B Qwen3-8B Qwen3-30B-A3B Qwen3-235B-A22B
""".split()
TREE = Path(__file__).parents[1] / "presets"
PRESETS = {file.path.stem: file for file in discover(TREE) if file.path.stem in NAMES}
TEXTS = {name: file.path.read_text() for name, file in PRESETS.items()}
FACTS = {name: tomllib.loads(file.path.with_suffix(".toml").read_text()) for name, file in PRESETS.items()}
CONFIGS = {
    name: {key: value for key, value in facts["config"].items() if key != "null_keys"}
    | dict.fromkeys(facts["config"].get("null_keys", ()))
    for name, facts in FACTS.items()
}
MOE = tuple(name for name in PRESETS if "num_experts" in CONFIGS[name])


def edit(text: str, flag: str, value: str | None) -> str:
    """``flag`` with another value, in its place or at the end; empty for a switch, None removes it."""
    lines = text.splitlines(keepends=True)
    new = [] if value is None else [f"    {flag} {value} \\\n".replace("  \\", " \\")]
    line = line_of(text, flag)
    if line is None:
        lines[-1:-1] = new
    else:
        lines[line - 1 : line] = new
    return "".join(lines)


def line_of(text: str, flag: str) -> int | None:
    """The line, from one, on which ``flag`` stands."""
    pattern = re.compile(rf"^\s*{flag}(?=\s)")
    return next((row for row, line in enumerate(text.splitlines(), 1) if pattern.match(line)), None)


def value_of(text: str, flag: str) -> str | None:
    match = re.search(rf"^\s*{flag} +(.*?) *\\$", text, re.MULTILINE)
    return match and match[1]


def write_copy(folder: Path, name: str, text: str | bytes, config: dict[str, Any] | None = None) -> Path:
    """The preset with this text, beside it the model's own facts, or ``config`` as Hugging Face's JSON."""
    path = folder / "Qwen" / f"{name}.sh"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if config is None:
        shutil.copy(PRESETS[name].path.with_suffix(".toml"), path.parent)
    else:
        path.with_suffix(".config.json").write_text(json.dumps(config))
    return path


def lint_copy(folder: Path, name: str, text: str | bytes, config: dict[str, Any] | None = None) -> Any:
    return lint(preset_at(write_copy(folder, name, text, config)))


def errors(findings: tuple[Finding, ...], stage: str | None = None) -> list[Finding]:
    return [finding for finding in findings if finding.is_error and stage in (None, finding.stage)]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails the test where the block takes longer."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
