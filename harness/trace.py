"""Trace: a forward pass -> the tensor shapes that went into and out of every module, in order.

The actual side of the forward stage. The expected shapes come from the inventory's arithmetic; the
first finding is the first place in the run where the two part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.build import Shape, by, short
from harness.finding import Finding, Severity
from harness.layers import Attention
from harness.layout import Layout
from harness.standins.output import import_foreign
from harness.world import simulated

import_foreign()

from megatron.core.inference.communication_utils import (  # noqa: E402
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)

if TYPE_CHECKING:
    from harness.activations import ModuleShapes
    from harness.architecture import Architecture

_ONE_RANK = Layout()

# Two unequal numbers that are no model dimension, so that a transposed pair of axes shows.
BATCH_SIZE, SEQUENCE_LENGTH = 3, 24
# Scores grow with the square of the length: beyond this a window is not reached, and its layers differ
# from full attention in no number. Windows of published models are 128 tokens, or thousands.
_LONGEST_SEQUENCE = 512


def sequence_length(architecture: Architecture, layout: Layout = _ONE_RANK) -> int:
    """Tokens of a sequence: enough to reach past the smallest sliding window, where that is short.

    A multiple of the layout's tp, for sequence parallelism.
    """
    windows = [
        layer.mixer.window[0]
        for layer in architecture.layers
        if isinstance(layer.mixer, Attention)
        and layer.mixer.window is not None
        and layer.mixer.window[0] >= 0
    ]
    # A query sees ``window[0]`` tokens before its own.
    reach = min(windows) + 1 + SEQUENCE_LENGTH // 2 if windows else 0
    length = max(SEQUENCE_LENGTH, reach) if reach <= _LONGEST_SEQUENCE else SEQUENCE_LENGTH
    # The part of one rank must not be mistaken for the batch either.
    length = max(length, (BATCH_SIZE + 1) * layout.tp)
    most = architecture.max_position_embeddings
    return min(math.ceil(length / layout.tp), most // layout.tp) * layout.tp


@dataclass(frozen=True, slots=True)
class Event:
    """A module was entered with these tensors (``"input"``) or left with these (``"output"``)."""

    module: str
    side: str
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Events in the order they happened; ``finished`` is False where the forward pass raised."""

    events: tuple[Event, ...]
    finished: bool

    @property
    def stopped_in(self) -> str | None:
        """Path of the innermost module that was entered and not left, None where all were left."""
        inside: list[str] = []
        for event in self.events:
            if event.side == "input":
                inside.append(event.module)
            else:
                inside.remove(event.module)
        return inside[-1] if inside else None


class Recorder:
    """Collects events while ``recording`` is open."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._finished = False

    def add(self, module: str, side: str, *values: Any) -> None:
        shapes: list[Shape] = []
        _add_shapes(values, shapes)
        self._events.append(Event(module, side, tuple(shapes)))

    def begin(self) -> None:
        self._events.clear()
        self._finished = False

    def finish(self) -> None:
        self._finished = True

    def trace(self) -> Trace:
        return Trace(tuple(self._events), self._finished)


def _add_shapes(value: Any, shapes: list[Shape]) -> None:
    """Add the shape of every tensor in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        shapes.append(tuple(value.shape))
    elif isinstance(value, tuple | list):
        for item in value:
            _add_shapes(item, shapes)
    elif isinstance(value, Mapping):
        _add_shapes(tuple(value.values()), shapes)


@contextmanager
def recording(model: nn.Module) -> Iterator[Recorder]:
    """Record every module of ``model`` but itself; hooks are gone at the end, also after an exception."""
    recorder = Recorder()
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(_entered(recorder, name), with_kwargs=True))
            handles.append(module.register_forward_hook(_left(recorder, name)))
    try:
        yield recorder
        recorder.finish()
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def last_pass(model: nn.Module) -> Iterator[Recorder]:
    """As ``recording``, of the last of many passes alone: each one that begins drops those before it."""
    with recording(model) as recorder:
        begun = model.register_forward_pre_hook(lambda module, args: recorder.begin())
        done = model.register_forward_hook(lambda module, args, output: recorder.finish())
        try:
            yield recorder
        finally:
            begun.remove()
            done.remove()


def _entered(recorder: Recorder, name: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.add(name, "input", args, kwargs)

    return hook


def _left(recorder: Recorder, name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        recorder.add(name, "output", output)

    return hook


def compare_trace(expected: Mapping[str, ModuleShapes], trace: Trace) -> tuple[Finding, ...]:
    """Findings in the order of the run, then the modules that were expected to run and did not.

    ``expected`` is keyed by module path and names the leading tensors of each side; a module may
    take or give more (a bias, a mask). Modules that are not in it are not looked at. Where the
    forward pass raised, modules that never ran are not findings: the exception says why.
    """
    return tuple(_differences(expected, trace))


def _differences(expected: Mapping[str, ModuleShapes], trace: Trace) -> Iterator[Finding]:
    for event in trace.events:
        if event.module not in expected:
            continue
        shapes = expected[event.module]
        wanted = shapes.inputs if event.side == "input" else shapes.outputs
        for index, shape in enumerate(wanted):
            actual = event.shapes[index] if index < len(event.shapes) else None
            if actual != shape:
                side = event.side if len(wanted) == 1 else f"{event.side} {index}"
                found = by(actual) if actual is not None else "missing"
                yield _finding(event.module, f"{side} is {found}, expected {by(shape)}", shape, actual)
    if trace.finished:
        ran = {event.module for event in trace.events}
        for module in expected:
            if module not in ran:
                yield _finding(module, "never ran", "runs", "never ran")


def _finding(module: str, what: str, expected: Any, actual: Any) -> Finding:
    message = f"{short(module)}  {what}" if module else what
    return Finding(
        "forward", Severity.ERROR, message, module=module or None, expected=expected, actual=actual
    )


def token_ids(
    vocabulary: int, batch_size: int, sequence_length: int, device: torch.device, seed: int = 1234
) -> torch.Tensor:
    """Token ids [batch, sequence] below ``vocabulary``; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch_size, sequence_length), generator=generator).to(device)


def forward(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] for token ids [batch, sequence].

    Called as ModelOpt's own prefill calls it: positions from zero, a causal mask spelt out. A later
    pipeline stage starts from the hidden states of the one before, or from made-up ones where the other
    ranks are simulated; one that is not the last sends its own on and gives them back: [sequence, batch,
    hidden], the sequence split over the tensor ranks.
    """
    batch_size, sequence_length = tokens.shape
    alone = simulated()
    if not model.pre_process:
        states = hidden_states(model, batch_size, sequence_length)
        if not alone:
            recv_from_prev_pipeline_rank_(states)
        model.set_input_tensor(states)  # type: ignore[operator]
    positions = torch.arange(sequence_length, device=tokens.device).expand(batch_size, -1)
    # True where attention is forbidden: everything after the token itself.
    mask = torch.ones(sequence_length, sequence_length, dtype=torch.bool, device=tokens.device).triu(1)
    with torch.no_grad():
        output: torch.Tensor = model(
            tokens,
            positions,
            mask.expand(batch_size, 1, -1, -1),
            runtime_gather_output=True,
        )
    if not model.post_process and not alone:
        send_to_next_pipeline_rank(output.contiguous())
    return output


def hidden_states(model: nn.Module, batch_size: int, sequence_length: int, seed: int = 1234) -> torch.Tensor:
    """What a stage before might send: [sequence / tp, batch, hidden], normal, the same on every device."""
    config: Any = model.config
    share = sequence_length // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(share, batch_size, config.hidden_size, generator=generator)
    weight = next(model.parameters())
    return states.to(weight.device, weight.dtype)


def check_shape(output: torch.Tensor, expected: Shape, what: str) -> tuple[Finding, ...]:
    """A finding where the model's output is not of the shape ``expected``."""
    actual = tuple(output.shape)
    if actual == expected:
        return ()
    return (_finding("", f"{what} are {by(actual)}, expected {by(expected)}", expected, actual),)


def check_logits(logits: torch.Tensor, tokens: torch.Tensor, vocabulary: int) -> tuple[Finding, ...]:
    """Findings where logits are not [batch, sequence, vocabulary] or not finite."""
    if wrong_shape := check_shape(logits, (*tokens.shape, vocabulary), "logits"):
        return wrong_shape
    wrong = int((~torch.isfinite(logits)).sum())
    if wrong:
        return (_finding("", f"{wrong} of {logits.numel()} logits are not finite", 0, wrong),)
    return ()
