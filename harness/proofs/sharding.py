"""Sharding: a quantized model -> what of it goes into a distributed checkpoint, and whether scales go along.

A scale belongs to rows or columns of a matrix, so it must be split as the matrix is: Megatron's
``sharded_state_dict`` says how for both, and the two are compared here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harness.build import by
from harness.finding import Finding, Severity
from harness.proofs.proof import finding
from harness.proofs.quantizers import owner_of
from harness.standins.output import import_foreign

import_foreign()

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess  # noqa: E402
from modelopt.torch.quantization.nn import TensorQuantizer  # noqa: E402

# By global key and offset, as Megatron finds a shard again: the tensor or object of this rank.
Shards = Mapping[tuple[Any, ...], Any]


def sharded(model: nn.Module, only: str = "") -> dict[str, Any]:
    """Megatron's sharded state dict of ``model``, of it the entries with ``only`` in their names."""
    entries: dict[str, Any] = model.sharded_state_dict()  # type: ignore[operator]
    return {name: entry for name, entry in entries.items() if only in name}


def shards_of(entries: dict[str, Any]) -> Shards:
    """All that this rank would write of a sharded state dict, which is used up.

    Prepared by Megatron itself, which checks that the shards cover every tensor and do not overlap.
    """
    entries, _ = save_preprocess(entries)
    return {_identity(entry): entry.data for entry in entries.values() for entry in _flat(entry)}


def loaded_from(shards: Shards, entries: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A state dict as Megatron would load it for a model that asks for ``entries``; what was not found."""
    wanted, _, factories = load_preprocess(entries)
    missing = sorted(
        name for name, entry in wanted.items() if any(_identity(each) not in shards for each in _flat(entry))
    )
    found = {name: entry for name, entry in wanted.items() if name not in missing}
    dict_list_map_inplace(lambda entry: shards[_identity(entry)], found)
    kept = {name: factory for name, factory in factories.items() if name not in missing}
    loaded: dict[str, Any] = apply_factory_merges(found, kept)
    return loaded, missing


def _identity(entry: ShardedTensor | ShardedObject) -> tuple[Any, ...]:
    # A shape counts as well: Megatron refuses a stored tensor of another one.
    return (entry.key, tuple(entry.global_offset), tuple(entry.global_shape))


def _flat(entry: Any) -> Iterator[Any]:
    """The shards of an entry: a factory's product may be a list or a dict of them."""
    if isinstance(entry, Mapping):
        entry = list(entry.values())
    if isinstance(entry, list):
        for each in entry:
            yield from _flat(each)
    else:
        yield entry


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name: a state dict without extra state, which ModelOpt pickles."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def check_sharding(model: nn.Module, entries: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings where a tensor of a quantizer is not in the sharded state dict, or not split as its matrix is.

    ``entries`` is the sharded state dict of ``model``, of which every rank of a layout has its own.

    One warning for all matrices of which the weight is stored in parts, a gate apart from the rest, and
    the scales of their rows are not: right on the same layout, wrong on another.
    """
    unlike: list[str] = []
    for path, quantizer in model.named_modules():
        if not isinstance(quantizer, TensorQuantizer):
            continue
        module, attribute = owner_of(path)
        for name in quantizer.state_dict():
            entry = entries.get(f"{path}.{name}")
            what = f"{attribute}.{name}"
            if entry is None:
                yield finding(module, f"{what} is not in the sharded state dict", "sharded", None)
                continue
            yield from _other_data(module, what, quantizer.get_buffer(name), entry)
            weight = entries.get(f"{module}.weight")
            if weight is None or _stands_in(model.get_submodule(module)):
                continue
            yield from _other_split(module, what, weight, entry, _axes(attribute, name, quantizer, entry))
            if isinstance(weight, ShardedTensorFactory) and _of_rows(attribute, entry):
                unlike.append(module)
    if unlike:
        yield finding(
            unlike[0],
            f"weight_quantizer._amax, one of {len(unlike)} such, is stored whole, though the weight is "
            "stored in parts: loaded on another tensor parallel size, its rows are another row's",
            severity=Severity.WARNING,
            actual=len(unlike),
        )


def _stands_in(module: nn.Module) -> bool:
    """Whether a stand-in takes the place of the module's class: ModelOpt splits the scales of the real one
    in another way than those of the class that the stand-in is made of."""
    return any(base.__module__.startswith("harness.standins.") for base in type(module).__mro__)


def _of_rows(attribute: str, entry: Any) -> bool:
    """Whether a scale is a weight's, has a number for each row, and is stored in one piece."""
    return (
        attribute.startswith("weight_quantizer")
        and isinstance(entry, ShardedTensor)
        and entry.local_shape[:1] != (1,)
    )


def _other_data(module: str, what: str, own: torch.Tensor, entry: Any) -> Iterator[Finding]:
    stored = torch.cat([shard.data.flatten() for shard in shards_in(entry)])
    if stored.dtype != own.dtype or not torch.equal(stored, own.flatten()):
        yield finding(module, f"{what} is not what the sharded state dict holds for it")


def shards_in(entry: Any) -> list[ShardedTensor]:
    return [*_flat(entry.build() if isinstance(entry, ShardedTensorFactory) else entry)]


def _axes(attribute: str, name: str, quantizer: TensorQuantizer, entry: Any) -> tuple[int | None, ...]:
    """Of each dimension of a scale, which one of the weight it follows: 0 rows, 1 columns, None neither."""
    shape = sizes_of(entry)[0]
    if not attribute.startswith("weight_quantizer"):
        # Of an input, the channels are the weight's columns; a number for the whole tensor is everyone's.
        return tuple(1 if size > 1 or name == "_pre_quant_scale" else None for size in shape)
    blocks = quantizer.block_sizes or {}
    along = {0: blocks.get(-2, blocks.get(0)), 1: blocks.get(-1, blocks.get(1))}
    static = blocks.get("type", "static") == "static"
    return tuple(
        axis if size > 1 or (len(shape) == 2 and static and along[axis]) else None
        for axis, size in enumerate(shape)
    )


def _other_split(
    module: str, what: str, weight: Any, entry: Any, axes: tuple[int | None, ...]
) -> Iterator[Finding]:
    local, whole = sizes_of(weight)
    shape, actual = sizes_of(entry)
    expected = tuple(
        size if axis is None else size * whole[axis] // local[axis]
        for size, axis in zip(shape, axes, strict=True)
    )
    if actual != expected:
        text = (
            f"{what} is {by(shape)} of {by(actual)} in the sharded state dict, expected of {by(expected)}: "
            f"the weight is {by(local)} of {by(whole)}"
        )
        yield finding(module, text, expected, actual)


def sizes_of(entry: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape on this rank and on all; the parts of a factory counted together."""
    shards = shards_in(entry)
    first, axes = shards[0], shards[0].prepend_axis_num
    local, whole = list(first.local_shape), list(first.global_shape[axes:])
    if not local:
        return (), ()  # one number
    local[0] = sum(shard.local_shape[0] for shard in shards)
    whole[0] = sum({shard.key: shard.global_shape[axes] for shard in shards}.values())
    return tuple(local), tuple(whole)
