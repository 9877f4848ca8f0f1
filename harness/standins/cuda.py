"""CUDA stand-in: streams and events that do nothing, and ``cuda`` devices that mean the CPU.

Only what a forward pass of Megatron's models touches. ``torch.cuda.is_available`` stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from harness.standins.patching import patched

_CPU = torch.device("cpu")


class NoStream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: NoEvent | None = None) -> NoEvent:
        return event or NoEvent()

    def synchronize(self) -> None:
        pass


class NoEvent:
    """An event that has always happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


# The functions of torch that make a tensor, and may be told where. A TorchFunctionMode would catch every
# other one too, and a case's small operations would take a fifth longer.
_FACTORIES = """
    arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace ones
    ones_like rand rand_like randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices
    triu_indices zeros zeros_like
""".split()


@functools.cache  # a case wraps a score of them
def cuda_means_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with ``device="cuda"`` meaning the CPU, for code that names CUDA literally."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return call


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to``, whose device may also come first."""
    if args and _is_cuda(args[0]):
        args = (_CPU, *args[1:])
    moved: torch.Tensor = _TO(tensor, *args, **kwargs)
    return moved


_TO = cuda_means_cpu(torch.Tensor.to)


def _cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.cuda``: the tensor, which is where it should be."""
    return tensor


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """``maybe_move_tensor_to_cpu``, which turns into numpy only what it moves."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, torch.device) and device.type == "cuda"


@contextmanager
def install() -> Iterator[None]:
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    stream = NoStream()
    replacements: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda, "Stream", NoStream),
        (torch.cuda, "Event", NoEvent),
        (torch.cuda, "current_stream", lambda device=None: stream),
        (torch.cuda, "stream", lambda stream: nullcontext()),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "current_device", lambda: _CPU),
        # Both keep the first stream they make on the class, for the rest of the process.
        (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),
        (SharedExpertMLP, "stream", None),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _split_sizes),
        (torch.Tensor, "to", _to),
        (torch.Tensor, "cuda", _cuda),
        *((torch, name, cuda_means_cpu(getattr(torch, name))) for name in _FACTORIES),
    )
    with ExitStack() as stack:
        for target, name, replacement in replacements:
            stack.enter_context(patched(target, name, replacement))
        yield
