"""CUDA stand-in: streams and events that do nothing, and ``cuda`` devices that mean the CPU.

Only what a forward pass of Megatron's models touches. ``torch.cuda.is_available`` stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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


class CudaMeansCpu(TorchFunctionMode):
    """Sends ``device="cuda"`` and ``.cuda()`` to the CPU, for code that names CUDA literally."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, torch.device) and device.type == "cuda"


@contextmanager
def install() -> Iterator[None]:
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
    )
    with ExitStack() as stack:
        for target, name, replacement in replacements:
            stack.enter_context(patched(target, name, replacement))
        stack.enter_context(CudaMeansCpu())
        yield
