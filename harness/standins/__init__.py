"""Stand-ins: what this machine lacks -> a declared replacement, for as long as a case runs.

One table names them all. A row applies or not, by the device and by the layers of the model; what applies
is put in place by ``installed`` and taken out again when it ends, and its record goes into the report. On
a CUDA device with everything that Megatron and ModelOpt can make use of, the real thing is used for all but
three rows, of which two mend what these do there as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from harness.architecture import Architecture
from harness.case import StandInReport
from harness.standins import (
    attention,
    compilation,
    cuda,
    delta,
    functionals,
    hadamard,
    kv_cache,
    linear,
    mamba,
    mx,
    norms,
    nvfp4,
    nvfp4_static,
    rng,
)
from harness.standins.output import import_foreign


@dataclass(frozen=True, slots=True)
class StandIn:
    """A record, on which device it applies and to which models, and how it is put in place."""

    record: StandInReport
    applies: Callable[[torch.device], bool]
    install: Callable[[], AbstractContextManager[None]]
    concerns: Callable[[Architecture], bool] = lambda architecture: True


def anywhere(device: torch.device) -> bool:
    return True


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


def no_mamba_ssm(device: torch.device) -> bool:
    """mamba-ssm or the convolution it needs is missing, or their kernels cannot run on ``device``."""
    return no_cuda(device) or not have_mamba_ssm()


def have_mamba_ssm() -> bool:
    """Whether Megatron could import mamba-ssm and causal-conv1d in this process."""
    import_foreign()
    from megatron.core.ssm import mamba_mixer

    scan = mamba_mixer.mamba_split_conv1d_scan_combined
    return scan is not None and mamba_mixer.causal_conv1d_fn is not None


def no_linear_attention(device: torch.device) -> bool:
    """flash-linear-attention is missing, or its kernels cannot run on ``device``."""
    return no_cuda(device) or not have_linear_attention()


def have_linear_attention() -> bool:
    """Whether Megatron could import flash-linear-attention in this process."""
    import_foreign()
    from megatron.core.ssm.gated_delta_net import common

    return common.chunk_gated_delta_rule is not None


def no_hadamard(device: torch.device) -> bool:
    """fast_hadamard_transform is missing, or its kernels cannot run on ``device``."""
    return no_cuda(device) or find_spec(hadamard.PACKAGE) is None


def has_core_attention(architecture: Architecture) -> bool:
    return architecture.attention is not None or architecture.latent is not None


def has_query_projection(architecture: Architecture) -> bool:
    """Latent attention that projects its queries at once, without a latent of theirs."""
    return architecture.latent is not None and architecture.latent.q_lora_rank is None


_NO_TE = "Transformer Engine is not installed, or the case does not run on CUDA."

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
            "Once compiled, one runs without the hooks of a later model, by which the harness sees what ran. "
            "Compiling takes many seconds and changes no shape.",
        ),
        anywhere,
        compilation.install,
    ),
    StandIn(
        StandInReport(
            "transformer_engine.pytorch RMSNorm and LayerNorm",
            "the same norms in plain torch, computed in float32",
            _NO_TE,
        ),
        no_transformer_engine,
        norms.install,
    ),
    StandIn(
        StandInReport(
            "Megatron's TEDotProductAttention",
            "Megatron's DotProductAttention, which also takes the two head sizes of latent attention",
            _NO_TE,
        ),
        no_transformer_engine,
        attention.install,
        has_core_attention,
    ),
    StandIn(
        StandInReport(
            "ModelOpt's quantizers of queries, keys and values in TEDotProductAttention",
            "the same quantizers in Megatron's DotProductAttention",
            f"ModelOpt has them only beside Transformer Engine. {_NO_TE}",
        ),
        no_transformer_engine,
        kv_cache.install,
        has_core_attention,
    ),
    StandIn(
        StandInReport(
            "Megatron's import of ModelOpt's Linear for latent attention",
            "that class itself",
            f"Megatron imports it only beside Transformer Engine. {_NO_TE}",
        ),
        no_transformer_engine,
        linear.install_latent_attention,
        lambda architecture: architecture.latent is not None,
    ),
    StandIn(
        StandInReport(
            "Megatron's refusal of ModelOpt's layer spec where latent attention has no --q-lora-rank",
            "the projections and the norm of the spec, without a norm of the queries",
            "The spec names a query norm, which Megatron refuses where there is no query latent to norm; "
            "published models have none there.",
        ),
        anywhere,
        attention.install_query_projection,
        has_query_projection,
    ),
    StandIn(
        StandInReport(
            "Megatron's TELinear in the latent projections of experts",
            "Megatron's ColumnParallelLinear on one rank, which ModelOpt quantizes as it does TELinear",
            _NO_TE,
        ),
        no_transformer_engine,
        linear.install_latent_moe,
        lambda architecture: architecture.moe is not None and architecture.moe.latent_size is not None,
    ),
    StandIn(
        StandInReport(
            "mamba-ssm's gated RMSNorm and chunk scan, and causal-conv1d",
            "the same norm, scan and convolution in plain torch, computed in float32",
            "mamba-ssm is not installed, or the case does not run on CUDA.",
        ),
        no_mamba_ssm,
        mamba.install,
        lambda architecture: architecture.mamba is not None,
    ),
    StandIn(
        StandInReport(
            "flash-linear-attention's l2norm, causal_conv1d and chunk_gated_delta_rule",
            "the same norm and convolution in plain torch, and Megatron's torch_chunk_gated_delta_rule",
            "flash-linear-attention is not installed, or the case does not run on CUDA.",
        ),
        no_linear_attention,
        delta.install,
        lambda architecture: architecture.delta is not None,
    ),
    StandIn(
        StandInReport(
            "ModelOpt's CUDA extension for MX and other block formats with scales from the data",
            "the same arithmetic in plain torch; a partial last block is padded with zeros",
            "The extension, which pads as well, is written for CUDA.",
        ),
        no_cuda,
        mx.install,
    ),
    StandIn(
        StandInReport(
            "ModelOpt's NVFP4 fake-quantization kernel",
            "the same arithmetic in plain torch; a partial last block is padded with zeros",
            "The kernel, which pads as well, is written for CUDA.",
        ),
        no_cuda,
        nvfp4.install,
    ),
    StandIn(
        StandInReport(
            "ModelOpt's NVFP4 kernels for weights with a calibrated amax per block",
            "the same arithmetic in plain torch",
            "The kernels are written in Triton, for CUDA.",
        ),
        no_cuda,
        nvfp4_static.install,
    ),
    StandIn(
        StandInReport(
            "fast_hadamard_transform's hadamard_transform",
            "the same transform in plain torch, computed in float32",
            "fast_hadamard_transform is not installed, or the case does not run on CUDA.",
        ),
        no_hadamard,
        hadamard.install,
    ),
    StandIn(
        StandInReport(
            "ModelOpt's replace_function",
            "the same, which also puts the function back when a forward pass raises",
            "Otherwise one failed case would spoil the later ones in its process.",
        ),
        anywhere,
        functionals.install,
    ),
)


def records(device: torch.device, architecture: Architecture | None = None) -> tuple[StandInReport, ...]:
    """What would be replaced on ``device``, for a case of ``architecture`` or for any."""
    return tuple(row.record for row in rows_of(device, architecture))


def rows_of(device: torch.device, architecture: Architecture | None) -> tuple[StandIn, ...]:
    """What ``device`` lacks of all that ``architecture``, or any, needs."""
    return tuple(
        row
        for row in STAND_INS
        if row.applies(device) and (architecture is None or row.concerns(architecture))
    )


@contextmanager
def installed(
    device: torch.device, architecture: Architecture | None = None
) -> Iterator[tuple[StandInReport, ...]]:
    """Put in place what ``device`` lacks, yield the records, and restore everything at the end.

    Of ``architecture`` only what its layers need; without one everything, for any model. May be nested.
    Enter it before ``open_world``; a model built inside must not outlive it.
    """
    import_foreign()
    rows = rows_of(device, architecture)  # before anything is replaced: a row may look for the real thing
    with ExitStack() as stack:
        for row in rows:
            stack.enter_context(row.install())
        yield tuple(row.record for row in rows)
