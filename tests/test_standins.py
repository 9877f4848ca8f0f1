from __future__ import annotations

import logging
import sys
import types
import warnings
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import MODELS, model_of

from harness.build import build_model
from harness.case import StandInReport
from harness.layout import Layout
from harness.standins import STAND_INS, hadamard, installed, nvfp4, records
from harness.standins.norms import LayerNorm, Norm, RMSNorm
from harness.standins.output import captured, import_foreign
from harness.standins.patching import patched
from harness.trace import forward, token_ids
from harness.world import open_world

import_foreign()

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")


# The table


def test_records_are_sentences_for_users() -> None:
    for row in STAND_INS:
        assert row.record.reason.endswith(".")
        assert row.record.replacement and row.record.target
    assert len({row.record.target for row in STAND_INS}) == len(STAND_INS)


def test_everything_is_replaced_on_a_cpu() -> None:
    assert records(CPU) == tuple(row.record for row in STAND_INS)


@pytest.fixture
def everything_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with all that Megatron can make use of, as far as its imports tell."""
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", True)
    monkeypatch.setattr("megatron.core.ssm.mamba_mixer.mamba_split_conv1d_scan_combined", object())
    monkeypatch.setattr("megatron.core.ssm.mamba_mixer.causal_conv1d_fn", object())
    monkeypatch.setattr("megatron.core.ssm.gated_delta_net.common.chunk_gated_delta_rule", object())
    package = types.ModuleType(hadamard.PACKAGE)
    package.__spec__ = ModuleSpec(hadamard.PACKAGE, None)
    monkeypatch.setitem(sys.modules, hadamard.PACKAGE, package)


COMPILED, REFUSAL, MENDED = "torch.compile", "Megatron's refusal", "ModelOpt's replace_function"


def targets(device: torch.device, name: str | None = None) -> list[str]:
    return [record.target for record in records(device, model_of(MODELS[name]) if name else None)]


@pytest.mark.usefixtures("everything_there")
def test_on_cuda_with_everything_there_only_what_is_mended() -> None:
    compiled, refusal, mended = targets(CUDA)
    assert compiled.startswith(COMPILED)
    assert refusal.startswith(REFUSAL)
    assert mended == MENDED


@pytest.mark.usefixtures("everything_there")
@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (
            "megatron.core.extensions.transformer_engine.HAVE_TE",
            [
                COMPILED,
                "RMSNorm",
                "TEDotProduct",
                "queries, keys and values",
                "ModelOpt's Linear",
                REFUSAL,
                "TELinear",
                MENDED,
            ],
        ),
        (
            "megatron.core.ssm.mamba_mixer.mamba_split_conv1d_scan_combined",
            [COMPILED, REFUSAL, "mamba-ssm", MENDED],
        ),
        ("megatron.core.ssm.mamba_mixer.causal_conv1d_fn", [COMPILED, REFUSAL, "mamba-ssm", MENDED]),
        (
            "megatron.core.ssm.gated_delta_net.common.chunk_gated_delta_rule",
            [COMPILED, REFUSAL, "flash-linear-attention", MENDED],
        ),
    ],
)
def test_on_cuda_what_is_missing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, missing: str, words: list[str]
) -> None:
    monkeypatch.setattr(missing, None)
    assert all(word in target for word, target in zip(words, targets(CUDA), strict=True))


@pytest.mark.usefixtures("everything_there")
def test_on_cuda_a_missing_hadamard_transform_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, hadamard.PACKAGE)
    monkeypatch.setattr("sys.path", [])
    assert "fast_hadamard_transform's hadamard_transform" in targets(CUDA)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("latent attention", {"TEDotProduct", "ModelOpt's Linear"}),
        (
            "latent attention without query latent",
            {"TEDotProduct", "ModelOpt's Linear", REFUSAL},
        ),
        ("sinks and windows", {"TEDotProduct"}),
        ("Mamba and latent experts", {"TEDotProduct", "TELinear", "mamba-ssm"}),
        ("gated delta net", {"TEDotProduct", "flash-linear-attention"}),
    ],
)
def test_only_what_a_models_layers_need(name: str, words: set[str]) -> None:
    of_layers = {"TEDotProduct", "ModelOpt's Linear", REFUSAL, "TELinear", "mamba-ssm", "flash-linear"}
    found = targets(CPU, name)
    expected = {word for word in of_layers if any(word in each for each in words)}
    assert {word for word in of_layers if any(word in target for target in found)} == expected


@pytest.mark.parametrize("name", MODELS)
def test_what_a_models_layers_need_is_enough(name: str) -> None:
    small = model_of(MODELS[name])
    with captured(), installed(CPU, small) as declared, open_world(Layout(), CPU):
        forward(build_model(small, Layout(), CPU), token_ids(320, 3, 24, CPU))
    assert declared == records(CPU, small)


def test_without_its_stand_in_a_mixer_cannot_be_built() -> None:
    other = model_of(MODELS["sinks and windows"])
    with captured(), installed(CPU, other), open_world(Layout(), CPU):
        for name, missing in (
            ("Mamba and MLP", "MambaSSM is not installed"),
            ("gated delta net", "FLA is not installed"),
        ):
            with pytest.raises(ImportError, match=missing):
                build_model(model_of(MODELS[name]), Layout(), CPU)


# Putting in place and taking out


def foreign_state() -> Mapping[str, Any]:
    """Everything that a stand-in replaces, as it is now."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.post_training.modelopt import layers
    from megatron.core.post_training.modelopt.gpt import model_specs
    from megatron.core.post_training.modelopt.hybrid import model_specs as hybrid
    from megatron.core.ssm import mamba_mixer
    from megatron.core.ssm.gated_delta_net import common, gdn
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import attention, multi_latent_attention
    from megatron.core.transformer.moe import moe_layer
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.plugins import custom
    from modelopt.torch.quantization.utils import core_utils
    from torch._dynamo import eval_frame

    return {
        **{f"cuda.{name}": value for name, value in vars(torch.cuda).items() if not name.startswith("__")},
        "tensors": (torch.Tensor.to, torch.Tensor.cuda, torch.empty, torch.zeros_like),
        "stance": eval_frame._stance.stance,
        "norm": layers.Norm,
        "spec norm": model_specs.Norm,
        "attention": model_specs.TEDotProductAttention,
        "tracker": random._CUDA_RNG_STATE_TRACKER,
        "tracker initialized": random._CUDA_RNG_STATE_TRACKER_INITIALIZED,
        "shared expert stream": SharedExpertMLP.stream,
        "dispatcher stream": MoEAlltoAllTokenDispatcher.cuda_dtoh_stream,
        "block formats": tensor_quant.dynamic_block_quantize_op,
        "static nvfp4": tensor_quant.triton_kernel,
        "kv cache": set(QuantModuleRegistry._registry),
        "hadamard": sys.modules.get(hadamard.PACKAGE),
        "functions": (custom.replace_function, core_utils.replace_function),
        "hybrid norms": (hybrid.Norm, hybrid_block.TENorm, attention.TENorm),
        "hybrid attention": hybrid.TEDotProductAttention,
        "latent linear": multi_latent_attention.Linear,
        "latent norms": multi_latent_attention.MLASelfAttention._resolve_qk_norm_config,
        "latent experts": (moe_layer.HAVE_TE, moe_layer.TELinear),
        "mamba": (mamba_mixer.HAVE_MAMBA_SSM, mamba_mixer.ExtendedRMSNorm),
        "scan": mamba_mixer.mamba_chunk_scan_combined,
        "delta net": (common.HAVE_FLA, common.l2norm, gdn.causal_conv1d, gdn.chunk_gated_delta_rule),
    }


def test_nothing_is_left_behind() -> None:
    before = foreign_state()
    with installed(CPU) as declared:
        inside = foreign_state()
        with installed(CPU):
            pass
        assert foreign_state() == inside
    assert declared == records(CPU)
    assert foreign_state() == before
    changed = {name for name in before if before[name] != inside[name]}
    own = {name for name in before if not name.startswith("cuda.")}
    # The streams are there only once a model ran.
    unchanged = {"shared expert stream", "dispatcher stream"}
    assert changed >= own - unchanged - {"tracker initialized"} | {"cuda.Stream", "tracker"}


def test_nothing_is_left_behind_by_an_exception() -> None:
    before = foreign_state()
    with pytest.raises(ZeroDivisionError), installed(CPU):
        1 / 0  # noqa: B018
    assert foreign_state() == before


def test_what_a_new_version_renamed_is_noticed() -> None:
    target = types.SimpleNamespace(old=1)
    with pytest.raises(AttributeError), patched(target, "new", 2):
        pass


# CUDA


def test_cuda_means_the_cpu() -> None:
    with installed(CPU):
        assert torch.ones(2, device="cuda").device == CPU
        assert torch.ones(2, device=torch.device("cuda", 3)).device == CPU
        assert torch.ones(2).to(device="cuda").device == CPU
        assert torch.ones(2).to("cuda:1", torch.bfloat16).device == CPU
        assert torch.ones(2).cuda(non_blocking=True).device == CPU
        assert torch.empty(2, device=torch.cuda.current_device()).device == CPU
        assert torch.ones(2, device="meta").device.type == "meta"


def test_streams_and_events_have_already_happened() -> None:
    with installed(CPU):
        stream = torch.cuda.Stream()
        event = stream.record_event()
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            assert event.query()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def test_fused_functions_are_not_compiled() -> None:
    compiled: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def fused(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with installed(CPU):
        assert fused(torch.zeros(1)) == 1
    assert not compiled


def test_fused_functions_run_the_hooks_of_each_model() -> None:
    @torch.compile(backend="eager")
    def fused(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x) + 1  # type: ignore[no-any-return]

    def hooked() -> tuple[torch.nn.Module, list[object]]:
        module, ran = torch.nn.Linear(1, 1), list[object]()
        module.register_forward_hook(lambda *of: ran.append(of))
        return module, ran

    fused(torch.nn.Linear(1, 1), torch.zeros(1, 1))
    module, ran = hooked()
    fused(module, torch.zeros(1, 1))
    assert not ran  # what this is for; where torch looks at the hooks by itself, the stand-in can go
    with installed(CPU):
        fused(module, torch.zeros(1, 1))
    assert len(ran) == 1


# Norms


def config(normalization: str = "RMSNorm", **changes: Any) -> Any:
    values = {
        "normalization": normalization,
        "layernorm_zero_centered_gamma": False,
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        "sequence_parallel": False,
    }
    return SimpleNamespace(**{**values, **changes})


def filled(norm: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return norm


X = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm(eps: float) -> None:
    norm = filled(Norm(config(), 32, eps=eps))
    assert isinstance(norm, RMSNorm)
    expected = torch.nn.functional.rms_norm(X, (32,), norm.weight, eps)
    torch.testing.assert_close(norm(X), expected)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_layer_norm(eps: float) -> None:
    norm = filled(Norm(config("LayerNorm"), 32, eps=eps))
    assert isinstance(norm, LayerNorm)
    expected = torch.nn.functional.layer_norm(X, (32,), norm.weight, norm.bias, eps)
    torch.testing.assert_close(norm(X), expected)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_zero_centred_gamma_is_stored_less_one(normalization: str) -> None:
    plain = filled(Norm(config(normalization), 32))
    centred = filled(Norm(config(normalization, layernorm_zero_centered_gamma=True), 32))
    with torch.no_grad():
        centred.weight.sub_(1)
    torch.testing.assert_close(centred(X), plain(X))


@pytest.mark.parametrize("centred", [False, True])
def test_norm_starts_as_the_identity_factor(centred: bool) -> None:
    norm = Norm(config(layernorm_zero_centered_gamma=centred), 32)
    assert torch.equal(norm.gamma(), torch.ones(32))


def test_norm_rounds_once_at_the_end() -> None:
    norm = filled(Norm(config(params_dtype=torch.bfloat16), 32))
    assert norm.weight.dtype == torch.bfloat16
    x = X.bfloat16()
    exact = torch.nn.functional.rms_norm(x.float(), (32,), norm.weight.float(), 1e-5)
    assert torch.equal(norm(x), exact.bfloat16())


def test_norm_is_marked_for_sequence_parallel_gradients() -> None:
    norm = Norm(config("LayerNorm", sequence_parallel=True), 32)
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [True, True]


def test_unknown_normalization() -> None:
    with pytest.raises(ValueError, match="'GroupNorm' is not one of"):
        Norm(config("GroupNorm"), 32)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norms_equal_transformer_engine(normalization: str, centred: bool) -> None:
    te = pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    ours = filled(Norm(config(normalization, layernorm_zero_centered_gamma=centred), 256)).bfloat16().cuda()
    theirs = getattr(te, normalization)(
        256, eps=1e-5, zero_centered_gamma=centred, params_dtype=torch.bfloat16
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(7, 256, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(ours(x), theirs(x), rtol=2**-7, atol=2**-7)


# NVFP4


def packed_and_unpacked(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """The format as ModelOpt exports it, by other code than its kernel."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensor_scale = amax.float() / (6 * 448)
    packed, scale, tensor_scale = NVFP4QTensor.quantize(x, 16, weights_scaling_factor_2=tensor_scale)
    unpacked: torch.Tensor = packed.dequantize(
        dtype=x.dtype, scale=scale, double_scale=tensor_scale, block_sizes={-1: 16}
    )
    return unpacked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amax_factor", [1.0, 0.25, 4.0])
def test_nvfp4_is_what_modelopt_exports(dtype: torch.dtype, amax_factor: float) -> None:
    x = (torch.randn(64, 96, generator=torch.Generator().manual_seed(2)) * 0.05).to(dtype)
    x[3, 16:32] = 0
    amax = x.abs().max() * amax_factor
    assert torch.equal(nvfp4.fake_quantize(x, amax), packed_and_unpacked(x, amax))


def test_e2m1_rounding() -> None:
    x = torch.tensor([0.2, 0.25, 0.26, 0.75, 1.25, 1.75, 1.9, 2.5, 2.6, 3.5, 3.9, 5.0, 5.1, 6.0, 0, 0])
    expected = torch.tensor([0.0, 0, 0.5, 1, 1, 2, 2, 2, 3, 4, 4, 4, 6, 6, 0, 0])
    amax = torch.tensor(6.0 * 448)  # every scale is one
    assert torch.equal(nvfp4.fake_quantize(x[None], amax)[0], expected)
    assert torch.equal(nvfp4.fake_quantize(-x[None], amax)[0], -expected)


def test_partial_last_block_counts_as_padded_with_zeros() -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(x, (0, 8))
    expected = nvfp4.fake_quantize(padded, x.abs().max())[:, :40]
    found = nvfp4.fake_quantize(x, x.abs().max())
    assert found.shape == x.shape
    assert torch.equal(found, expected)


def test_empty_blocks_and_values_beyond_amax() -> None:
    x = torch.zeros(1, 32)
    x[0, 16] = 100.0
    # One tensor scale of 1 / (6 x 448) and the largest block scale, 448, reach 1 and no further.
    found = nvfp4.fake_quantize(x, torch.tensor(1.0))
    assert torch.equal(found[0, :16], torch.zeros(16))
    torch.testing.assert_close(found[0, 16], torch.tensor(1.0))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("width", [96, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_equals_the_kernel(width: int, dtype: torch.dtype) -> None:
    from modelopt.torch.quantization import tensor_quant

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    x = (torch.randn(64, width, generator=torch.Generator().manual_seed(4)) * 0.05).to(dtype)
    x[0] = 0
    amax = x.abs().max()
    theirs = tensor_quant.dynamic_block_quant(x.cuda(), 16, amax.cuda(), None, (2, 1), (4, 3))
    assert torch.equal(nvfp4.fake_quantize(x, amax), theirs.cpu())


# Output


def test_everything_said_is_captured(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = logging.getLogger().handlers[:]
    with captured() as text:
        print("printed")
        print("to stderr", file=sys.stderr)
        logging.getLogger("some.module").warning("logged")
        for _ in range(2):
            warnings.warn("warned", UserWarning, stacklevel=1)
    assert text.getvalue().splitlines() == [
        "printed",
        "to stderr",
        "WARNING some.module: logged",
        "WARNING warnings: UserWarning: warned",
    ]
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")


def test_logging_set_up_inside_shows_again_outside(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("set.up.inside")
    with captured() as text:
        logger.addHandler(logging.StreamHandler())
        logger.warning("inside")
    logger.warning("outside")
    logger.handlers.clear()
    assert "inside" in text.getvalue() and "outside" not in text.getvalue()
    assert capfd.readouterr().err == "outside\n"


def test_a_progress_bar_is_captured(capfd: pytest.CaptureFixture[str]) -> None:
    """ModelOpt's layerwise calibration shows one."""
    from tqdm import tqdm

    with captured() as text:
        for _ in tqdm(range(3), desc="layers"):
            pass
    assert "layers: 100%" in text.getvalue()
    assert capfd.readouterr() == ("", "")


def test_exceptions_pass_through_capture() -> None:
    stdout = sys.stdout
    with pytest.raises(ZeroDivisionError), captured():
        1 / 0  # noqa: B018
    assert sys.stdout is stdout


def test_record_is_frozen() -> None:
    with pytest.raises(AttributeError):
        StandInReport("a", "b", "c.").reason = "d"  # type: ignore[misc]
