"""Quantization config: what an exported checkpoint says of its own quantization -> where that is not so.

A reader of the checkpoint goes by ``hf_quant_config.json`` or by the ``quantization_config`` of
``config.json``: which algorithm, in blocks of how many numbers, and which modules are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.finding import Finding
from harness.parity.expected import Expected, finding
from harness.parity.exported import Checkpoint
from harness.parity.stored import Kind

_FILE, _CONFIG = "hf_quant_config.json", "config.json"
MIXED = "MIXED_PRECISION"
_BITS = {Kind.NVFP4: 4, Kind.NVFP4_WEIGHTS: 4, Kind.INT4: 4}
# What is a matrix in a checkpoint and no linear in the model.
_NOT_LINEAR = ("norm", "embed", "conv1d")


def check_config(checkpoint: Checkpoint, expecteds: Sequence[Expected]) -> Iterator[Finding]:
    """Findings where the two configs do not say what was quantized and what was not."""
    layers = {one.module: one.weight for one in expecteds if one.weight is not None}
    said = checkpoint.quantization
    if said is None:
        if layers:
            yield finding(_FILE, "is missing, and the checkpoint has quantized weights", "a file", None)
        return
    kinds = {(weight.kind, weight.block) for weight in layers.values()}
    if len(kinds) == 1:
        ((kind, block),) = kinds
        wanted: dict[str, Any] = {"quant_algo": str(kind), "group_size": block or None}
    else:
        wanted = {"quant_algo": MIXED if kinds else None, "group_size": None}
    wanted["kv_cache_quant_algo"] = None
    for key, value in wanted.items():
        if said.get(key) != value:
            yield finding(_FILE, f"{key} is {said.get(key)!r}, expected {value!r}", value, said.get(key))
    if len(kinds) > 1:
        listed = said.get("quantized_layers", {})
        for module, weight in layers.items():
            algo = listed.get(module, {}).get("quant_algo")
            if algo != weight.kind:
                what = f"quantized_layers has {algo!r} for {module}, expected {str(weight.kind)!r}"
                yield finding(_FILE, what, str(weight.kind), algo)
    yield from _check_excluded(said.get("exclude_modules", []), expecteds)
    yield from _check_copy(checkpoint.config.get("quantization_config"), said, kinds)


def _check_excluded(patterns: Sequence[str], expecteds: Sequence[Expected]) -> Iterator[Finding]:
    """Every linear left as it was must be among ``patterns``, itself or what holds it, and no other."""
    modules = {one.module for one in expecteds}
    for one in expecteds:
        module, excluded = one.module, _excludes(patterns, one.module)
        if one.weight is not None and excluded:
            what = f"exclude_modules has {excluded!r}, and {module} is quantized"
            yield finding(_FILE, what, None, excluded)
        if one.weight is None and not excluded and _is_linear(one):
            what = f"exclude_modules has nothing of {module}, which is not quantized"
            yield finding(_FILE, what, module, None)
    for pattern in patterns:
        if not any(_excludes([pattern], module) for module in modules):
            what = f"exclude_modules has {pattern!r}, and no module is called so"
            yield finding(_FILE, what, None, pattern)


def _is_linear(one: Expected) -> bool:
    name = one.counterpart.name
    return name.endswith(".weight") and len(one.shape) == 2 and not any(word in name for word in _NOT_LINEAR)


def _excludes(patterns: Sequence[str], module: str) -> str | None:
    """The first pattern that is the name of ``module``, or of what holds it."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def _check_copy(
    copy: Mapping[str, Any] | None, said: Mapping[str, Any], kinds: set[tuple[Kind, int]]
) -> Iterator[Finding]:
    """The same in ``config.json``, in the words of compressed-tensors."""
    if copy is None:
        yield finding(_CONFIG, "has no quantization_config", "quantization_config", None)
        return
    wanted = {"quant_algo": said.get("quant_algo"), "ignore": said.get("exclude_modules")}
    actual = {key: copy.get(key) for key in wanted}
    if len(kinds) == 1:
        ((kind, block),) = kinds
        weights = copy.get("config_groups", {}).get("group_0", {}).get("weights", {})
        wanted |= {"num_bits": _BITS.get(kind, 8), "group_size": block or None}
        actual |= {key: weights.get(key) for key in ("num_bits", "group_size")}
    for key, value in wanted.items():
        if actual[key] != value:
            what = f"quantization_config has {key} {actual[key]!r}, expected {value!r}"
            yield finding(_CONFIG, what, value, actual[key])


def check_sizes(published: Path, exported: Path) -> Iterator[Finding]:
    """Findings where ``config.json`` does not describe the published model any more, as transformers reads
    it; the exporter writes it anew, with sizes of Megatron's."""
    from transformers import AutoConfig

    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (published, exported)]
    before, after = (_plain(config) for config in configs)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            what = f"{key} is {after.get(key)!r}, published {before.get(key)!r}"
            yield finding(_CONFIG, what, before.get(key), after.get(key))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what an export may change, those that it is made of by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping) and key != "quantization_config":
            found |= {f"{key}.{inner}": held for inner, held in _plain(value).items()}
        elif key not in _MAY_CHANGE:
            found[key] = value
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    if found.get("head_dim") is None and heads and width:
        # What every family makes of it where it is left out.
        found["head_dim"] = width // heads
    return found


_MAY_CHANGE = ("quantization_config", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
