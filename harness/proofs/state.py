"""State: a quantized model saved and restored -> the same model again, bit for bit.

Two ways, both Megatron-LM's. The plain one (``--ckpt-format torch``): ModelOpt's state beside the model's
``state_dict``. The sharded one (``torch_dist``): ModelOpt's state without what belongs to a module, which
goes as that module's extra state into Megatron's ``sharded_state_dict``. What is saved goes through bytes
and ModelOpt's safe loader as it would on disk, except for the sharded tensors: Megatron writes those from
a process of its own, and handing them over in memory takes the same keys, offsets and shapes.
"""

from __future__ import annotations

import copy
import io
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.build import by
from harness.errors import is_no_verdict
from harness.finding import Finding, has_errors
from harness.layout_rules import Owner
from harness.proofs.proof import Proof, finding, judged, said, unsupported
from harness.proofs.quantizers import owner_of
from harness.proofs.sharding import Shards, check_sharding, loaded_from, sharded, shards_of, tensors_of
from harness.standins.output import import_foreign

import_foreign()

import modelopt.torch.opt as mto  # noqa: E402
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import remove_per_module_state  # noqa: E402
from modelopt.torch.quantization.nn import TensorQuantizer  # noqa: E402
from modelopt.torch.utils import safe_load  # noqa: E402

NAME, NAME_SHARDED, NAME_SHARDING = "state", "sharded state", "sharding"

# What a quantizer notes down and does not go by: a type of input it saw, shapes it was last restored to.
_NOTES = {"_input_dtype", "_pytorch_state_metadata"}


@dataclass(frozen=True)
class Saved:
    """A model as it would lie on disk, plain: ModelOpt's state in bytes, and the model's tensors by name.

    The tensors are the model's own, not copies.
    """

    modelopt: bytes
    tensors: Mapping[str, Any]


@dataclass(frozen=True)
class SavedShards:
    """The same, sharded: ModelOpt's state common to all ranks, and what this rank holds."""

    modelopt: bytes
    shards: Shards


def save(model: nn.Module) -> Saved:
    """What Megatron-LM saves of ``model`` in one file. What ModelOpt raises comes through."""
    return Saved(_bytes(mto.modelopt_state(model)), model.state_dict())


def save_shards(model: nn.Module, entries: dict[str, Any] | None = None) -> SavedShards:
    """What it saves in a distributed checkpoint; ``entries`` is the sharded state dict, where it is there.

    What Megatron and ModelOpt raise comes through.
    """
    common = copy.deepcopy(mto.modelopt_state(model))
    remove_per_module_state(common)
    return SavedShards(_bytes(common), shards_of(sharded(model) if entries is None else entries))


def prove_state(
    model: nn.Module,
    fresh: Callable[[], nn.Module],
    run: Callable[[nn.Module], torch.Tensor],
    after: torch.Tensor,
    saved: Saved | None = None,
) -> Proof:
    """Save ``model``, restore it into ``fresh()`` and compare every tensor, every quantizer and the output.

    ``fresh`` makes the same model unquantized, best of other numbers; ``run`` gives a model's logits, and
    ``after`` those of ``model``. ``saved`` is what to restore, by default what ``save`` gives. ``model`` is
    left as it is. What ``fresh`` and ``run`` raise comes through.
    """
    return _prove(NAME, model, fresh, run, after, saved or save(model), [])


def prove_sharded_state(
    model: nn.Module,
    fresh: Callable[[], nn.Module],
    run: Callable[[nn.Module], torch.Tensor],
    after: torch.Tensor,
    saved: SavedShards | None = None,
) -> Proof:
    """As ``prove_state``, by way of Megatron's sharded state dict, and how every scale is sharded.

    Unsupported where that way is closed: what is raised while they make the sharded state dict is the limit.
    """
    entries, closed = _sharded_or_limit(model)
    if closed:
        return closed
    findings = [*check_sharding(model, entries)]
    saved = saved or save_shards(model, entries)
    return _prove(NAME_SHARDED, model, fresh, run, after, saved, findings)


def prove_sharding(model: nn.Module) -> Proof:
    """How the scales of a model, or of one rank's part of it, are sharded; nothing is saved or restored.

    It looks at no numbers of other ranks, so that they may be simulated. Unsupported as
    ``prove_sharded_state``.
    """
    entries, closed = _sharded_or_limit(model, NAME_SHARDING)
    if closed:
        return closed
    count = sum("_quantizer." in name for name in entries)
    detail = f"{count} scales are split as their matrices"
    found = [*check_sharding(model, entries)]
    # What matters to those who load a checkpoint on another layout is no one's concern who loads none.
    notes = [each.message for each in found if not each.is_error]
    return judged(NAME_SHARDING, [each for each in found if each.is_error], "; ".join([detail, *notes]))


def _sharded_or_limit(model: nn.Module, name: str = NAME_SHARDED) -> tuple[dict[str, Any], Proof | None]:
    try:
        return sharded(model), None
    except Exception as error:
        if is_no_verdict(error):
            raise
        words = f"{_unsharded(model)} has no sharded state dict"
        return {}, unsupported(name, _owner(error), said(error), words)


def _prove(
    name: str,
    model: nn.Module,
    fresh: Callable[[], nn.Module],
    run: Callable[[nn.Module], torch.Tensor],
    after: torch.Tensor,
    saved: Saved | SavedShards,
    findings: list[Finding],
) -> Proof:
    if not has_errors(findings):
        restored = fresh()
        try:
            findings += restore(restored, saved) or [finding(*row) for row in unlike(model, restored)]
        except Exception as error:
            if is_no_verdict(error):
                raise
            message = f"a fresh model cannot be restored from the {name}: {said(error)}"
            findings.append(finding(None, message, "restored", type(error).__name__))
        if not has_errors(findings):
            findings += check_output(after, run(restored))
    count = sum(isinstance(module, TensorQuantizer) for module in model.modules())
    return judged(
        name, findings, f"{count} quantizers and {len(tensors_of(model))} tensors saved and restored"
    )


def _unsharded(model: nn.Module) -> str:
    """Path of the first quantized module that raises when asked for its sharded state dict."""
    quantized: list[str] = [
        path for path, module in model.named_modules() if hasattr(module, "weight_quantizer")
    ]
    for path in quantized:
        module: Any = model.get_submodule(path)
        try:
            module.sharded_state_dict(prefix=f"{path}.")
        except Exception:
            return path
    return "the model"


def _owner(error: Exception) -> Owner:
    """Whose code raised it, or called what did: ModelOpt's where it had a hand in it at all."""
    frames = traceback.extract_tb(error.__traceback__)
    return Owner.MODELOPT if any("modelopt/" in frame.filename for frame in frames) else Owner.MEGATRON


def restore(model: nn.Module, saved: Saved | SavedShards) -> list[Finding]:
    """Make an unquantized ``model`` the saved one; findings where something saved does not fit or is missing.

    After findings the model is half restored.
    """
    mto.restore_from_modelopt_state(model, safe_load(io.BytesIO(saved.modelopt)))
    if isinstance(saved, Saved):
        return _load(model, saved.tensors)
    extra, missing = loaded_from(saved.shards, sharded(model, only="_extra_state"))
    wrong = [*_missing(missing)]
    model.load_state_dict(extra, strict=False)
    # torch asks a module for its extra state where its class has the method; ModelOpt gives the instance one.
    for name, module in model.named_modules():
        state = extra.get(f"{name}._extra_state")
        if state is not None and hasattr(module, "modelopt_set_extra_state_callbacks"):
            module.set_extra_state(state)
    tensors, missing = loaded_from(saved.shards, sharded(model))
    return [*wrong, *_missing(missing)] or _load(model, tensors)


def _load(model: nn.Module, tensors: Mapping[str, Any]) -> list[Finding]:
    own = tensors_of(model)
    wrong = [*_missing(name for name in own if name not in tensors), *_left_over(own, tensors)]
    wrong += _unlike_in_size(own, tensors)
    if not wrong:
        model.load_state_dict(dict(tensors), strict=False)
    return wrong


def _missing(names: Any) -> Iterator[Finding]:
    for name in names:
        module, attribute = owner_of(name)
        yield finding(module, f"{attribute} is not in what was saved", "saved", None)


def _left_over(own: Mapping[str, torch.Tensor], tensors: Mapping[str, Any]) -> Iterator[Finding]:
    for name in tensors:
        if name not in own and not name.endswith("_extra_state"):
            module, attribute = owner_of(name)
            yield finding(module, f"{attribute} was saved, and the restored model has no place for it", None)


def _unlike_in_size(own: Mapping[str, torch.Tensor], tensors: Mapping[str, Any]) -> Iterator[Finding]:
    for name, tensor in own.items():
        if name in tensors and tensors[name].numel() != tensor.numel():
            module, attribute = owner_of(name)
            expected, actual = tuple(tensors[name].shape), tuple(tensor.shape)
            what = f"{attribute} was saved as {by(expected)}, and the restored model makes it {by(actual)}"
            yield finding(module, what, expected, actual)


def unlike(model: nn.Module, restored: nn.Module) -> Iterator[tuple[str, str, Any, Any]]:
    """Tensors of ``restored`` that are not those of ``model``, and quantizers set otherwise.

    Of each the path of its module, what is wrong, what it should be and what it is.
    """
    expected, actual = tensors_of(model), tensors_of(restored)
    for name in [*expected, *(name for name in actual if name not in expected)]:
        module, attribute = owner_of(name)
        if name not in actual or name not in expected:
            side = "lost in" if name in expected else "new in"
            yield module, f"{attribute} is {side} the restored model", None, None
        elif not _same(expected[name], actual[name]):
            changed = _changed(expected[name].flatten(), actual[name].flatten())
            what = f"{attribute} is restored to another value in {changed} of {expected[name].numel()} places"
            yield module, what, 0, changed
    others = dict(restored.named_modules())
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, TensorQuantizer):
            yield from _set_otherwise(name, quantizer, others.get(name))


def _same(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    same = expected.dtype == actual.dtype and expected.numel() == actual.numel()
    return same and torch.equal(expected.flatten(), actual.flatten())


def _changed(expected: torch.Tensor, actual: torch.Tensor) -> int:
    return int((expected != actual).sum()) if expected.shape == actual.shape else expected.numel()


def _set_otherwise(name: str, quantizer: Any, other: Any) -> Iterator[tuple[str, str, Any, Any]]:
    module, attribute = owner_of(name)
    if type(other) is not type(quantizer):
        what = f"{attribute} is restored as {type(other).__name__}, saved as {type(quantizer).__name__}"
        yield module, what, type(quantizer).__name__, type(other).__name__
        return
    if not quantizer.is_enabled and not other.is_enabled:
        return  # how one that is off would quantize is not kept everywhere
    wanted = quantizer.get_modelopt_state(properties_only=True)
    found = other.get_modelopt_state(properties_only=True)
    for key in sorted((wanted.keys() | found.keys()) - _NOTES):
        before, now = wanted.get(key), found.get(key)
        # Some algorithms leave tensors in attributes of their own, which are no part of a saved state.
        if not isinstance(before, torch.Tensor) and not isinstance(now, torch.Tensor) and before != now:
            yield module, f"{attribute} has {key} {now!r} after restoring, {before!r} before", before, now


def check_output(expected: torch.Tensor, actual: torch.Tensor) -> tuple[Finding, ...]:
    """A finding where the restored model's logits are not bit for bit those of the saved one."""
    if expected.shape == actual.shape and torch.equal(expected, actual):
        return ()
    changed = _changed(expected, actual)
    what = f"{changed} of {expected.numel()} logits of the restored model are not what they were"
    return (finding(None, what, 0, changed),)


def _bytes(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
