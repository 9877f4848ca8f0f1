"""Report: case reports <-> one JSON document, written whole or not at all.

The text that people read is made in ``messages.py``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.case import (
    FIRST_RANKS,
    Case,
    CaseReport,
    Check,
    Mismatch,
    Outcome,
    ShrinkReport,
    Size,
    StageReport,
    StandInReport,
)
from harness.errors import HarnessError, ReportError
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.shrink.invariants import Invariant

SCHEMA = 1
PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "transformer-engine", "transformers")


def environment() -> dict[str, Any]:
    """Python, platform, package versions (None where not installed) and GPU names; imports no package."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _gpu_names(),
    }


def stand_ins(reports: Iterable[CaseReport]) -> tuple[StandInReport, ...]:
    """Every stand-in of these cases, once."""
    return tuple(dict.fromkeys(record for report in reports for record in report.stand_ins))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu_names() -> list[str]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def to_json(reports: Sequence[CaseReport], env: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The document of ``reports``: schema, environment, stand-ins (each once) and one result per case."""
    return {
        "schema": SCHEMA,
        "environment": dict(environment() if env is None else env),
        "stand_ins": _plain(stand_ins(reports)),
        "results": [result_to_json(report) for report in reports],
    }


def result_to_json(report: CaseReport) -> dict[str, Any]:
    """One entry of ``results``; its stand-ins by target only."""
    case = report.case
    return {
        "preset": case.preset,
        "path": case.path,
        "presets": case.presets,
        "recipe": case.recipe,
        "layout": str(case.layout),
        "ranks": case.ranks,
        "device": case.device,
        "prove": list(case.prove),
        "outcome": str(report.outcome),
        "seconds": round(report.seconds, 3),
        "stages": _plain(report.stages),
        "findings": _plain(report.findings),
        "stand_ins": [record.target for record in report.stand_ins],
        "shrink": _plain(report.shrink),
        "repro": case.repro,
        "reason": report.reason,
        "log": report.log,
        "mismatch": _plain(report.mismatch),
    }


def _plain(value: Any) -> Any:
    """A value, a record too, in JSON's own types; what JSON has no word for becomes text."""
    if isinstance(value, Enum):
        return str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    return str(value)


def from_json(document: Any, source: str = "report") -> tuple[CaseReport, ...]:
    """The case reports of a document. Raises ReportError, naming ``source``, where it is none."""
    if not isinstance(document, dict) or "results" not in document:
        raise ReportError(f"{source} is not a harness report: it has no 'results'")
    if not isinstance(document["results"], list):
        raise ReportError(f"{source} is not a harness report: 'results' is no list")
    if document.get("schema") != SCHEMA:
        raise ReportError(
            f"{source} has schema {document.get('schema')!r}, and this harness reads schema {SCHEMA}"
        )
    try:
        known = {entry["target"]: StandInReport(**entry) for entry in document["stand_ins"]}
    except (KeyError, TypeError) as error:
        raise ReportError(f"{source} is not a harness report: stand_ins: {_say(error)}") from error
    reports = []
    for index, result in enumerate(document["results"]):
        try:
            reports.append(result_from_json(result, known))
        except (KeyError, TypeError, ValueError, AttributeError, HarnessError) as error:
            raise ReportError(f"{source} is not a harness report: results[{index}]: {_say(error)}") from error
    return tuple(reports)


def _say(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def result_from_json(result: Mapping[str, Any], known: Mapping[str, StandInReport]) -> CaseReport:
    """One entry of ``results`` back; ``known`` are the document's stand-ins by target."""
    shrink = result["shrink"]
    return CaseReport(
        case=Case(
            preset=result["preset"],
            path=result["path"],
            recipe=result["recipe"],
            layout=Layout.parse(result["layout"]),
            device=result["device"],
            presets=result["presets"],
            ranks=result.get("ranks", FIRST_RANKS),
            prove=tuple(result.get("prove", ())),
        ),
        outcome=Outcome(result["outcome"]),
        seconds=result["seconds"],
        stages=tuple(map(_stage_from_json, result["stages"])),
        findings=tuple(
            Finding(**{**finding, "severity": Severity(finding["severity"])})
            for finding in result["findings"]
        ),
        stand_ins=tuple(known[target] for target in result["stand_ins"]),
        shrink=shrink
        and ShrinkReport(
            shrink["before"], shrink["after"], tuple(Invariant(**entry) for entry in shrink["invariants"])
        ),
        reason=result["reason"],
        log=result["log"],
        mismatch=_mismatch_from_json(result.get("mismatch")),
    )


def _mismatch_from_json(mismatch: Mapping[str, Any] | None) -> Mismatch | None:
    if mismatch is None:
        return None
    shapes = tuple((word, text) for word, text in mismatch["shapes"])
    return Mismatch(mismatch["module"], shapes, tuple(Size(**size) for size in mismatch["sizes"]))


def _stage_from_json(stage: Mapping[str, Any]) -> StageReport:
    checks = tuple(
        Check(**{**check, "outcome": Outcome(check["outcome"])}) for check in stage.get("checks", ())
    )
    return StageReport(**{**stage, "outcome": Outcome(stage["outcome"]), "checks": checks})


def read_report(path: Path) -> tuple[CaseReport, ...]:
    """The case reports in a file. Raises ReportError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"report {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ReportError(f"{path} is not a harness report: it is not JSON ({error})") from error
    return from_json(document, str(path))


def require_writable(path: Path) -> None:
    """Raise ReportError where ``write_report`` would, before hours have gone into a report."""
    folder = path.parent
    if path.is_dir():
        raise ReportError(f"report {path} cannot be written: it is a directory")
    if not folder.is_dir():
        raise ReportError(f"report {path} cannot be written: there is no directory {folder}")
    if not os.access(path if _is_special(path) else folder, os.W_OK):
        raise ReportError(f"report {path} cannot be written: permission denied")


def write_report(path: Path, document: Any) -> None:
    """Write a document whole or not at all. Raises ReportError."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    require_writable(path)
    try:
        if _is_special(path):  # a pipe or /dev/stdout: there is nothing to replace
            path.write_text(text, encoding="utf-8")
        else:
            _replace(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise ReportError(f"report {path} cannot be written: {error.strerror or error}") from error


def _is_special(path: Path) -> bool:
    return path.exists() and not stat.S_ISREG(path.stat().st_mode)


def _replace(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
            os.fchmod(stream.fileno(), path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def exit_code(reports: Iterable[CaseReport]) -> int:
    """0: what ran passed; 1: a preset has errors; 2: the harness failed, or nothing ran.

    A case that is unsupported counts no more than one that was skipped.
    """
    outcomes = {report.outcome for report in reports}
    if Outcome.ERROR in outcomes:
        return 2
    if Outcome.FAILED in outcomes:
        return 1
    return 0 if Outcome.PASSED in outcomes else 2
