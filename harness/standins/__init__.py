"""Stand-ins: what this machine lacks -> a declared replacement, for as long as a case runs.

One table names them all. A row applies or not, by the device; what applies is put in place by
``installed`` and taken out again when it ends, and its record goes into the report. On a CUDA device
with Transformer Engine nothing applies and everything runs for real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch

from harness.case import StandInReport
from harness.standins import attention, compilation, cuda, norms, nvfp4, rng
from harness.standins.output import import_foreign


@dataclass(frozen=True, slots=True)
class StandIn:
    """A record, when it applies, and how it is put in place."""

    record: StandInReport
    applies: Callable[[torch.device], bool]
    install: Callable[[], AbstractContextManager[None]]


def no_cuda(device: torch.device) -> bool:
    return device.type != "cuda"


def no_transformer_engine(device: torch.device) -> bool:
    """Transformer Engine is missing, or its kernels cannot run on ``device``."""
    return no_cuda(device) or not have_transformer_engine()


def have_transformer_engine() -> bool:
    """Whether Megatron could import Transformer Engine in this process."""
    import_foreign()
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


STAND_INS: tuple[StandIn, ...] = (
    StandIn(
        StandInReport(
            "torch.cuda streams, events, current_device and device='cuda'",
            "no-ops on the CPU device",
            "Megatron asks for CUDA by name, and the case runs on the CPU.",
        ),
        no_cuda,
        cuda.install,
    ),
    StandIn(
        StandInReport(
            "Megatron's CUDA random number tracker",
            "Megatron's inference tracker, which forks nothing",
            "There is no CUDA generator on the CPU, and dropout is off in a case.",
        ),
        no_cuda,
        rng.install,
    ),
    StandIn(
        StandInReport(
            "torch.compile of Megatron's fused functions",
            "the same functions, not compiled",
            "Compiling takes many seconds on a CPU and changes no shape.",
        ),
        no_cuda,
        compilation.install,
    ),
    StandIn(
        StandInReport(
            "transformer_engine.pytorch RMSNorm and LayerNorm",
            "the same norms in plain torch, computed in float32",
            "Transformer Engine is not installed, or the case does not run on CUDA.",
        ),
        no_transformer_engine,
        norms.install,
    ),
    StandIn(
        StandInReport(
            "Megatron's TEDotProductAttention",
            "Megatron's DotProductAttention",
            "Transformer Engine is not installed, or the case does not run on CUDA.",
        ),
        no_transformer_engine,
        attention.install,
    ),
    StandIn(
        StandInReport(
            "ModelOpt's NVFP4 fake-quantization kernel",
            "ModelOpt's NVFP4QTensor, packed and unpacked; a partial last block is padded with zeros",
            "The kernel, which pads as well, is written for CUDA.",
        ),
        no_cuda,
        nvfp4.install,
    ),
)


def records(device: torch.device) -> tuple[StandInReport, ...]:
    """What would be replaced on ``device``."""
    return tuple(row.record for row in STAND_INS if row.applies(device))


@contextmanager
def installed(device: torch.device) -> Iterator[tuple[StandInReport, ...]]:
    """Put in place what ``device`` lacks, yield the records, and restore everything at the end.

    May be nested. Enter it before ``open_world``; a model built inside must not outlive it.
    """
    import_foreign()
    with ExitStack() as stack:
        for row in STAND_INS:
            if row.applies(device):
                stack.enter_context(row.install())
        yield records(device)
