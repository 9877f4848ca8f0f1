"""Importing: a checkpoint in Hugging Face's layout -> a Megatron model, by ModelOpt's own importer.

What it read and what it filled is counted: every number of the model is made to be none before, and what is
none afterwards nothing filled. Rules that the importer asks itself for and does not have are named instead
of stopping at the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from harness.errors import is_no_verdict
from harness.parity.rules import OURS, added, by_hand, words_by_hand
from harness.stages import Raised
from harness.standins.output import captured, import_foreign
from harness.standins.patching import patched


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of an import.

    ``read`` and ``unread`` are tensors of the checkpoint; ``unfilled`` parameters and expert biases of the
    model, whole or in part; ``overwritten`` tensors of the model that are no parameters, and constants where
    no import writes to them; ``ours`` rules that this package adds to the importer's, in words; ``missing``
    rules that neither has, by the importer's name for them; ``raised`` what stopped it, and ``last`` the
    tensor that it read before.
    """

    read: frozenset[str]
    unread: tuple[str, ...]
    unfilled: tuple[str, ...]
    ours: tuple[str, ...]
    missing: tuple[str, ...]
    raised: Raised | None
    last: str = ""
    overwritten: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not (self.unread or self.unfilled or self.overwritten or self.missing or self.raised)


def import_checkpoint(model: nn.Module, folder: Path) -> Imported:
    """Load the checkpoint in ``folder`` into ``model``, in float32. What cannot be loaded is in the result.

    Call it inside the world that the model was built in.
    """
    import_foreign()
    with captured():
        from modelopt.torch.export import import_mcore_gpt_from_hf

    empty(model)
    before = {name: tensor.clone() for name, tensor in constants(model)}
    asked: dict[str, None] = {}
    read: dict[str, None] = {}
    ours: dict[str, str] = {}
    raised = None
    with reading(read), _with_rules(asked, ours), captured():
        try:
            import_mcore_gpt_from_hf(model, str(folder), dtype=torch.float32)
        except Exception as error:  # the importer's, whatever it is: its words are the result
            if is_no_verdict(error):
                raise
            raised = Raised.of(error)
    return Imported(
        read=frozenset(read),
        unread=tuple(sorted(stored_names(folder) - read.keys())),
        unfilled=tuple(unfilled(model)),
        ours=tuple(ours.values()),
        missing=tuple(asked),
        raised=raised,
        last=next(reversed(read), ""),
        overwritten=tuple(
            name for name, tensor in constants(model) if differ(tensor, before.get(name, tensor))
        ),
    )


def empty(model: nn.Module) -> None:
    """Make every number that a checkpoint holds none: parameters, and the routers' expert biases."""
    with torch.no_grad():
        for _, tensor in _stored(model):
            tensor.fill_(float("nan"))


def unfilled(model: nn.Module) -> Iterator[str]:
    """What still has a number that is none."""
    return (name for name, tensor in _stored(model) if bool(torch.isnan(tensor).any()))


def _stored(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name.endswith(".expert_bias"):
            yield name, buffer


def constants(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules have as plain attributes; no checkpoint of Megatron's holds them."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}", value


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """A cache that is still as it was allocated may hold what is no number, and equals itself."""
    return one.shape != other.shape or not bool(((one == other) | (one.isnan() & other.isnan())).all())


def stored_names(folder: Path) -> set[str]:
    """The names of all tensors of a checkpoint."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


@contextmanager
def reading(read: dict[str, None]) -> Iterator[None]:
    """Note every tensor that ModelOpt takes from a checkpoint, at the one place where it opens the files."""
    from modelopt.torch.export.plugins import mcore_custom

    original = mcore_custom._get_safetensor_slices

    def slices(path: Any, key: str, *rest: Any, **named: Any) -> Any:
        tensor = original(path, key, *rest, **named)
        if tensor is not None:
            read.pop(key, None)
            read[key] = None
        return tensor

    with patched(mcore_custom, "_get_safetensor_slices", slices):
        yield


class RuleBook(dict[str, Any]):
    """The importer's rules of one architecture: one of ours that is used is noted, and one that is lacking
    is noted and does nothing."""

    def __init__(
        self,
        rules: Mapping[str, Any],
        own: Mapping[str, str],
        asked: dict[str, None],
        used: dict[str, str],
    ) -> None:
        super().__init__(rules)
        self._own, self._asked, self._used = own, asked, used

    def __getitem__(self, name: str) -> Any:
        if name in self._own:
            self._used[name] = self._own[name]
        return super().__getitem__(name)

    def __missing__(self, name: str) -> Callable[..., None]:
        self._asked[name] = None
        return lambda *args, **named: None


@contextmanager
def _with_rules(asked: dict[str, None], ours: dict[str, str]) -> Iterator[None]:
    """Add the rules of ours that the importer's book lacks, and note what both lack."""
    from modelopt.torch.export import unified_export_megatron
    from modelopt.torch.export.plugins import megatron_importer

    known: dict[str, Any] = megatron_importer.all_mcore_hf_import_mapping
    books = dict(known)
    for architecture in OURS:
        rules = added(architecture, known.get(architecture, {}))
        books[architecture] = known.get(architecture, {}) | {rule.name: rule.mapping for rule in rules}

    class Importer(megatron_importer.GPTModelImporter):  # type: ignore[misc]
        def _populate_rule_book(self) -> dict[str, Any]:
            filled = super()._populate_rule_book()
            if self.arch not in filled:
                asked[f"for {self.arch} at all"] = None
            rules = added(self.arch, known.get(self.arch, {}))
            own = {rule.name: rule.words for rule in rules}
            book = {**filled.get(self.arch, {}), **by_hand(self.arch, self)}
            return {**filled, self.arch: RuleBook(book, {**own, **words_by_hand(self.arch)}, asked, ours)}

    with ExitStack() as stack:
        stack.enter_context(patched(megatron_importer, "all_mcore_hf_import_mapping", books))
        stack.enter_context(patched(unified_export_megatron, "GPTModelImporter", Importer))
        yield


_MISSING_KEY = re.compile(r"Key \[(.+)\] does not exist!")


def absent_tensor(raised: Raised) -> str | None:
    """The tensor that the importer looked for in vain; None if it stopped for something else."""
    found = _MISSING_KEY.search(raised.words)
    return found[1] if found else None
