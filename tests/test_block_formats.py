"""Every block format that has no kernel on a CPU, against the format written out, and against the kernel."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import modelopt_recipes
import pytest
import small_models
import torch

from harness.build import build_model
from harness.layout import Layout
from harness.standins import STAND_INS, functionals, hadamard, installed, kv_cache, mx, nvfp4, nvfp4_static
from harness.standins.attention import core_attention
from harness.standins.output import captured, import_foreign
from harness.trace import forward, token_ids
from harness.world import open_world

import_foreign()

import modelopt.torch.quantization as mtq  # noqa: E402
from megatron.core.tensor_parallel import layers  # noqa: E402
from modelopt.recipe import load_recipe  # noqa: E402
from modelopt.torch.quantization import tensor_quant  # noqa: E402
from modelopt.torch.quantization.config import QuantizerAttributeConfig  # noqa: E402
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer  # noqa: E402
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor  # noqa: E402
from modelopt.torch.quantization.utils import replace_function  # noqa: E402

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# Name -> (bits, exponent bits) as ModelOpt's operator takes them.
NAMES = {
    "E4M3": (8, 4),
    "E5M2": (8, 5),
    "E3M2": (6, 3),
    "E2M3": (6, 2),
    "E2M1": (4, 2),
    "E1M2": (4, 1),
    "INT8": (8, 0),
}
every_format = pytest.mark.parametrize("name", NAMES)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The formats, written out


def numbers_of(name: str) -> list[float]:
    """Every number of the format from zero up, in the order of its bit patterns."""
    if name == "INT8":
        return [float(number) for number in range(128)]
    exponent_bits, mantissa_bits = int(name[1]), int(name[3])
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            if exponent == 0:
                numbers.append(math.ldexp(mantissa, 1 - bias - mantissa_bits))
            else:
                numbers.append(math.ldexp(2**mantissa_bits + mantissa, exponent - bias - mantissa_bits))
    # E4M3 keeps its last pattern for NaN, E5M2 its last exponent for infinity and NaN.
    return numbers[: {"E4M3": -1, "E5M2": -4}.get(name)]


def nearest(number: Fraction, numbers: list[float]) -> float:
    """The number of the format nearest to ``number``; halfway, the one with the even bit pattern."""
    magnitude = abs(number)
    _, _, index = min((abs(Fraction(each) - magnitude), i % 2, i) for i, each in enumerate(numbers))
    return math.copysign(numbers[index], number)


def power_of_two(amax: Fraction, largest: float) -> Fraction:
    """The least power of two, from 2 ** -127 on, under which ``amax`` is not beyond ``largest``."""
    exponent = -127
    while amax > Fraction(largest) * Fraction(2) ** exponent:
        exponent += 1
    return Fraction(2) ** exponent


def written_out(row: list[float], name: str, block_size: int) -> list[float]:
    """One row in an MX format. Exact, but for the last step, which float32 may not hold."""
    numbers, result = numbers_of(name), []
    for start in range(0, len(row), block_size):
        block = [Fraction(number) for number in row[start : start + block_size]]
        amax = max(abs(number) for number in block)
        scale = power_of_two(amax, numbers[-1]) if amax else Fraction(1)
        result += [float(Fraction(nearest(number / scale, numbers)) * scale) for number in block]
    return result


def test_the_numbers_of_a_format() -> None:
    assert numbers_of("E2M1") == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert numbers_of("E1M2") == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert (len(numbers_of("E3M2")), numbers_of("E3M2")[-1]) == (32, 28)
    assert (len(numbers_of("E2M3")), numbers_of("E2M3")[-1]) == (32, 7.5)
    for name, dtype in (("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)):
        patterns = torch.arange(128, dtype=torch.uint8).view(dtype).float()
        assert numbers_of(name) == patterns[torch.isfinite(patterns)].tolist()


# Numbers and their scale


@every_format
def test_every_number_and_every_tie(name: str) -> None:
    numbers = numbers_of(name)
    between = [(low + high) / 2 for low, high in pairwise(numbers)]
    beside = [math.nextafter(number, way) for number in between for way in (0, math.inf)]
    beyond = [numbers[-1] * factor for factor in (1.001, 1.5, 1e6)]
    tried = torch.tensor([*numbers, *between, *map(float, torch.tensor(beside)), *beyond])
    expected = torch.tensor([nearest(Fraction(number), numbers) for number in tried.tolist()])
    form = mx.FORMATS[NAMES[name]]
    assert torch.equal(mx.round_to(tried, form), expected)
    assert torch.equal(mx.round_to(-tried, form), -expected)


@every_format
def test_scale_is_the_least_power_of_two_that_holds_the_block(name: str) -> None:
    numbers = numbers_of(name)
    amaxes = torch.tensor(
        [
            numbers[-1] * 2.0**exponent * factor
            for exponent in (-100, -3, 0, 9)
            for factor in (1, 1.0001, 1.99)
        ]
        + [1e-45, 1e-39, 1e-38, 3e38, 1.0]
    )
    x = torch.zeros(len(amaxes), 32)
    x[:, 5] = amaxes
    found = mx.fake_quantize(x, 32, mx.FORMATS[NAMES[name]])
    expected = [written_out(row, name, 32)[5] for row in x.tolist()]
    assert torch.equal(found[:, 5], torch.tensor(expected))


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-149, 128)
    assert mx._two_to(exponents).tolist() == [2.0**exponent for exponent in exponents.tolist()]


@both_types
@every_format
@pytest.mark.parametrize("width", [64, 40, 7])
def test_mx_blocks(name: str, dtype: torch.dtype, width: int) -> None:
    x = normal(3, 2, width, dtype=dtype) * torch.tensor([1e-6, 1.0, 300.0]).view(3, 1, 1).to(dtype)
    x[1, 1, :32] = 0
    found = mx.fake_quantize(x, 32, mx.FORMATS[NAMES[name]])
    expected = [[written_out(row, name, 32) for row in rows] for rows in x.tolist()]
    assert (found.shape, found.dtype) == (x.shape, dtype)
    assert torch.equal(found, torch.tensor(expected).to(dtype))


@pytest.mark.parametrize("block_size", mx.BLOCK_SIZES)
def test_blocks_do_not_touch_each_other(block_size: int) -> None:
    form = mx.FORMATS[NAMES["E2M1"]]
    x = normal(1, 64)
    before = mx.fake_quantize(x, block_size, form)
    x[0, block_size] *= 100
    changed = (mx.fake_quantize(x, block_size, form) != before)[0].nonzero().flatten().tolist()
    assert changed and set(changed) <= set(range(block_size, 2 * block_size))


def test_a_block_size_that_the_extension_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"must be one of \{8, 16, 32\}"):
        mx.fake_quantize(torch.ones(1, 64), 64, mx.FORMATS[NAMES["E2M1"]])


@every_format
def test_what_is_not_finite(name: str) -> None:
    form = mx.FORMATS[NAMES[name]]
    x = torch.zeros(3, 32)
    x[0, 3], x[1, 3], x[2, 3] = math.nan, math.inf, -math.inf
    found = mx.fake_quantize(x, 32, form)
    assert torch.isnan(found[0, 3])
    largest = torch.finfo(torch.float32).max
    assert found[1, 3] == -found[2, 3] >= largest / 2  # it saturates


def test_two_levels_of_scales() -> None:
    """E2M1 under E4M3 is NVFP4, whose kernel is a third piece of code."""
    x, e2m1, e4m3 = normal(64, 96) * 0.05, mx.FORMATS[NAMES["E2M1"]], mx.FORMATS[NAMES["E4M3"]]
    found = mx.fake_quantize(x, 16, e2m1, e4m3, x.abs().max())
    torch.testing.assert_close(found, nvfp4.fake_quantize(x, x.abs().max()), rtol=1e-6, atol=0)
    zeros = torch.zeros(1, 16)
    assert torch.equal(mx.fake_quantize(zeros, 16, e2m1, e4m3, torch.tensor(0.0)), zeros)
    # A block so far below the tensor's amax that its scale rounds to nothing.
    x[0] = 1e-9
    assert not mx.fake_quantize(x, 16, e2m1, e4m3, x.abs().max())[0].any()


# What ModelOpt packs for export


@both_types
def test_mxfp8_is_what_modelopt_packs(dtype: torch.dtype) -> None:
    x = normal(48, 96, dtype=dtype) * 0.02
    x[2, 32:64] = 0
    packed, scale = MXFP8QTensor.quantize(x)
    assert torch.equal(mx.fake_quantize(x, 32, mx.FORMATS[NAMES["E4M3"]]), packed.dequantize(scale=scale))


@both_types
def test_mxfp4_is_what_modelopt_packs_but_for_ties(dtype: torch.dtype) -> None:
    """ModelOpt's packing sends every tie down, its extension to the even number."""
    x = normal(48, 96, seed=1, dtype=dtype)
    packed, scale = MXFP4QTensor.quantize(x, 32)
    theirs = packed.dequantize(scale=scale, block_sizes={-1: 32})
    ours = mx.fake_quantize(x, 32, mx.FORMATS[NAMES["E2M1"]])
    other = ours != theirs
    exponents = torch.exp2(scale.float() - 127).repeat_interleave(32).view(x.shape)
    scaled = (x.float() / exponents).abs()
    assert {0.75, 1.75, 3.5} >= set(scaled[other].tolist())
    assert (ours.abs() > theirs.abs())[other].all()
    # Numbers of bfloat16 fall halfway all the time.
    assert (int(other.sum()) > 20) == (dtype == torch.bfloat16)


# NVFP4 with a calibrated amax per block


def static_written_out(
    block: torch.Tensor, amax: torch.Tensor, global_amax: torch.Tensor, normalization: float
) -> torch.Tensor:
    """One block: a scale in E4M3 under the tensor's, numbers in E2M1."""
    tensor_scale = global_amax.double() / (6 * normalization)
    scale = nearest(Fraction(float(amax.double() / 6 / tensor_scale)), numbers_of("E4M3"))
    if scale == 0:
        return torch.zeros_like(block)
    scaled = block.double() / (scale * tensor_scale)
    numbers = numbers_of("E2M1")
    rounded = [nearest(Fraction(number), numbers) for number in scaled.tolist()]
    return (torch.tensor(rounded, dtype=torch.float64) * scale * tensor_scale).float()


@pytest.mark.parametrize("normalization", [448.0, 256.0], ids=["plain", "four over six"])
@pytest.mark.parametrize("factor", [1.0, 0.5, 1.5])
def test_static_nvfp4(normalization: float, factor: float) -> None:
    x = normal(40, 16, seed=2) * torch.logspace(-4, 0, 40)[:, None]
    x[7] = 0
    amax = x.abs().amax(-1) * factor
    global_amax = x.abs().max()
    found = nvfp4_static.fake_quantize(x, amax, global_amax, True, normalization)
    expected = [
        static_written_out(block, each, global_amax, normalization)
        for block, each in zip(x, amax, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)
    assert not found[7].any()


def test_static_nvfp4_is_what_modelopt_packs() -> None:
    x = normal(32, 48, seed=3)
    blocks = x.view(-1, 16)
    amax, global_amax = blocks.abs().amax(-1) * 0.8, x.abs().max()
    tensor_scale = global_amax / (6 * 448)
    scale = (amax / 6 / tensor_scale).to(torch.float8_e4m3fn).view(32, 3)
    packed, scale, tensor_scale = NVFP4QTensor.quantize(x, 16, scale, tensor_scale)
    theirs = packed.dequantize(scale=scale, double_scale=tensor_scale, block_sizes={-1: 16}, dtype=x.dtype)
    ours = nvfp4_static.fake_quantize(blocks, amax, global_amax).view(x.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_static_nvfp4_without_rounding_scales() -> None:
    x, amax = normal(4, 16, seed=4), torch.tensor([1.0, 3.0, 0.0, math.inf])
    found = nvfp4_static.fake_quantize(x, amax, quantize_block_scales=False)
    steps = found[:2] / (amax[:2, None] / 6)
    assert {round(step, 4) for step in steps.abs().flatten().tolist()} <= set(numbers_of("E2M1"))
    assert not found[2].any()
    assert torch.equal(found[3], nvfp4_static.cast(x[3]))  # the kernel takes one for an infinite scale


def test_static_nvfp4_takes_the_largest_amax_for_the_tensors() -> None:
    x, amax = normal(4, 16, seed=5), torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = nvfp4_static.fake_quantize(x, amax, torch.tensor(4.0))
    assert torch.equal(nvfp4_static.fake_quantize(x, amax), expected)


@both_types
def test_static_nvfp4_keeps_shape_and_the_dtype_asked_for(dtype: torch.dtype) -> None:
    x = normal(2, 3, 32, dtype=dtype)
    amax = torch.ones(2 * 3 * 2)
    assert nvfp4_static.fake_quantize(x, amax).dtype == dtype
    found = nvfp4_static.fake_quantize(x, amax, out_dtype=torch.float16)
    assert (found.shape, found.dtype) == (x.shape, torch.float16)
    with pytest.raises(ValueError, match="192 numbers do not split into 7 blocks"):
        nvfp4_static.fake_quantize(x, torch.ones(7))


def test_cast_to_e2m1_leaves_its_input_alone() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.75, math.nan])
    before = x.clone()
    found = nvfp4_static.cast(x)
    assert found[:-1].tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -1]
    assert torch.isnan(found[-1])
    assert torch.equal(x[:-1], before[:-1])


def test_no_stand_in_changes_its_input() -> None:
    x = normal(4, 32, seed=6)
    before = x.clone()
    mx.fake_quantize(x, 32, mx.FORMATS[NAMES["E2M1"]])
    nvfp4.fake_quantize(x, x.abs().max())
    nvfp4_static.fake_quantize(x, x.view(-1, 16).abs().amax(-1))
    hadamard.hadamard_transform(x)
    assert torch.equal(x, before)


# Hadamard


@pytest.mark.parametrize("width", [1, 2, 16, 64])
def test_hadamard_is_sylvesters(width: int) -> None:
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    x = normal(3, 5, width)
    torch.testing.assert_close(hadamard.hadamard_transform(x, 0.5), x @ matrix * 0.5)


def test_hadamard_twice_is_the_identity() -> None:
    x = normal(7, 32, dtype=torch.bfloat16)
    twice = hadamard.hadamard_transform(hadamard.hadamard_transform(x, 32**-0.5), 32**-0.5)
    assert twice.dtype == x.dtype
    torch.testing.assert_close(twice, x, rtol=0, atol=2**-6)


def test_hadamard_has_a_gradient() -> None:
    x = normal(2, 8).requires_grad_()
    hadamard.hadamard_transform(x).sum().backward()
    assert x.grad is not None and x.grad[0].tolist() == [8.0] + 7 * [0.0]


def test_hadamard_of_another_width() -> None:
    with pytest.raises(ValueError, match="not 48"):
        hadamard.hadamard_transform(torch.ones(1, 48))


def test_modelopt_finds_the_transform_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt.torch.quantization.nn import functional

    monkeypatch.delitem(sys.modules, hadamard.PACKAGE, raising=False)
    x = normal(3, 48)
    with installed(CPU):
        rotated = functional.normalized_hadamard_transform(x)
        torch.testing.assert_close(functional.normalized_hadamard_transform(rotated), x)
    assert hadamard.PACKAGE not in sys.modules
    assert not hasattr(functional, hadamard.PACKAGE)


def test_a_transform_that_is_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ModuleType(hadamard.PACKAGE)
    monkeypatch.setitem(sys.modules, hadamard.PACKAGE, real)
    with installed(CPU):
        assert sys.modules[hadamard.PACKAGE] is not real
    assert sys.modules[hadamard.PACKAGE] is real


# Quantizers of ModelOpt, as its configs make them

_PER_TENSOR = {"type": "dynamic", "scale_bits": (8, 0)}
QUANTIZERS = {
    "MXFP4": ({"num_bits": (2, 1), "block_sizes": {-1: 32, **_PER_TENSOR}}, "E2M1"),
    "MXFP6": ({"num_bits": (3, 2), "block_sizes": {-1: 32, **_PER_TENSOR}}, "E3M2"),
    "MXFP6 E2M3": ({"num_bits": (2, 3), "block_sizes": {-1: 32, **_PER_TENSOR}}, "E2M3"),
    "MXFP8": ({"num_bits": (4, 3), "block_sizes": {-1: 32, **_PER_TENSOR}}, "E4M3"),
    "MXINT8": ({"num_bits": 8, "block_sizes": {-1: 32, **_PER_TENSOR}}, "INT8"),
}


@both_types
@pytest.mark.parametrize("name", QUANTIZERS)
def test_modelopts_quantizer_reaches_the_stand_in(name: str, dtype: torch.dtype) -> None:
    config, form = QUANTIZERS[name]
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**config))
    x = normal(4, 3, 40, dtype=dtype).requires_grad_()
    with installed(CPU):
        found = quantizer(x)
    assert found.dtype == dtype
    assert torch.equal(found, mx.fake_quantize(x.detach(), 32, mx.FORMATS[NAMES[form]]))
    found.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_the_kernel_knows_no_other_block_size() -> None:
    """A recipe may say 32: ModelOpt's kernel for NVFP4 is called without it, and takes 16."""
    x = normal(4, 64, seed=8)
    with installed(CPU):
        found = tensor_quant.dynamic_block_quant(x, 32, x.abs().max(), None, (2, 1), (4, 3))
    assert torch.equal(found, nvfp4.fake_quantize(x, x.abs().max(), 16))
    assert not torch.equal(found, nvfp4.fake_quantize(x, x.abs().max(), 32))


def test_two_level_formats_reach_the_stand_in() -> None:
    x = normal(4, 64, seed=9)
    with installed(CPU):
        found = tensor_quant.dynamic_block_quant(x, 32, x.abs().max(), None, (3, 2), (4, 3))
    forms = mx.FORMATS[NAMES["E3M2"]], mx.FORMATS[NAMES["E4M3"]]
    assert torch.equal(found, mx.fake_quantize(x, 32, *forms, x.abs().max()))


def test_formats_without_stand_in_raise_as_modelopt_does() -> None:
    x = torch.ones(1, 32)
    with installed(CPU):
        with pytest.raises(RuntimeError, match="CUDA is not available"):
            tensor_quant.dynamic_block_quant(x, 32, None, None, (3, 0), (8, 0))
        with pytest.raises(NotImplementedError, match="Unsupported num_bits: 5"):
            tensor_quant.dynamic_block_quant(x, 32, None, None, 5, (8, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here ModelOpt has its kernels")
def test_without_their_stand_ins_block_formats_cannot_run() -> None:
    x = torch.ones(2, 32)
    with pytest.raises(RuntimeError, match="CUDA is not available"):
        tensor_quant.dynamic_block_quant(x, 32, None, None, (2, 1), (8, 0))
    with pytest.raises(AssertionError, match="must be a CUDA tensor"):
        tensor_quant.dynamic_block_quant(x, 16, x.amax(), None, (2, 1), (4, 3))
    for function in (
        lambda: tensor_quant.static_blockwise_fp4_fake_quant(x, x.amax(-1)),
        lambda: tensor_quant.fp4_cast_ste(x),
    ):
        with pytest.raises(RuntimeError, match="requires triton"):
            function()


def test_modelopts_static_functions_reach_the_stand_in() -> None:
    x = normal(6, 16, seed=10).requires_grad_()
    amax = x.detach().abs().amax(-1) * 0.5
    with installed(CPU):
        found = tensor_quant.static_blockwise_fp4_fake_quant(x, amax[:, None], amax.max())
        rounded = tensor_quant.fp4_cast_ste(x)
    assert torch.equal(found, nvfp4_static.fake_quantize(x.detach(), amax, amax.max()))
    assert torch.equal(rounded, nvfp4_static.cast(x.detach()))
    found.sum().backward()
    # The gradient of what was clipped is lost.
    assert x.grad is not None
    assert torch.equal(x.grad, (x.detach().abs() <= amax[:, None]).float())


# Models

COMMON = (
    "--bf16 --no-masked-softmax-fusion --disable-bias-linear --position-embedding-type rope --no-rope-fusion "
    "--normalization RMSNorm --swiglu --seq-length 64 --max-position-embeddings 96 --no-bias-swiglu-fusion "
    "--padded-vocab-size 320 --num-layers 2 --hidden-size 128 --ffn-hidden-size 384 "
    "--num-attention-heads 8 --group-query-attention --num-query-groups 2 --kv-channels 32 "
    "--untie-embeddings-and-output-weights "
)
MODELS = {**small_models.MODELS, "dense": COMMON}
KV_CONFIGS = [name for name in sorted(mtq.config.choices) if "_KV_" in name]
# In Megatron's [sequence, batch, head, channel] the bias of these is one per sequence of the calibration.
AFFINE = [name for name in KV_CONFIGS if "AFFINE" in name]


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


def build(name: str = "dense") -> Any:
    with captured():
        return build_model(small_models.model_of(MODELS[name]), Layout(), CPU, seed=1234)


def logits(model: Any, batch_size: int = 3) -> torch.Tensor:
    with captured():
        return forward(model, token_ids(320, batch_size, 24, CPU, 3))


def with_kv(weights: str, name: str) -> dict[str, Any]:
    with captured():
        merged: dict[str, Any] = mtq.utils.update_quant_cfg_with_kv_cache_quant(
            copy.deepcopy(getattr(mtq, weights)), copy.deepcopy(getattr(mtq, name))["quant_cfg"]
        )
    return merged


def quantized(model: Any, config: dict[str, Any], batch_size: int = 3) -> Any:
    with captured():
        mtq.quantize(model, config, lambda model: forward(model, token_ids(320, batch_size, 24, CPU, 3)))
    return model


def kv_quantizers(model: Any) -> dict[str, TensorQuantizer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and "_bmm_quantizer" in name
    }


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kv", KV_CONFIGS)
def test_kv_cache_is_quantized(kv: str) -> None:
    plain = logits(quantized(build(), copy.deepcopy(mtq.FP8_DEFAULT_CFG)))
    model = quantized(build(), with_kv("FP8_DEFAULT_CFG", kv))
    on = [name for name, quantizer in kv_quantizers(model).items() if quantizer.is_enabled]
    assert on == [
        f"decoder.layers.{layer}.self_attention.core_attention.{kind}_bmm_quantizer"
        for layer in (0, 1)
        for kind in ("k", "v")
    ]
    amaxes = [kv_quantizers(model)[name].amax for name in on]
    assert all(amax.numel() == 1 and amax > 0 for amax in amaxes)
    found = logits(model)
    assert torch.isfinite(found).all() and not torch.equal(found, plain)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", ["latent attention", "Mamba and MLP", "gated delta net"])
def test_kv_cache_is_quantized_in_every_attention(name: str) -> None:
    model = build(name)
    attentions = [path for path, each in model.named_modules() if isinstance(each, core_attention())]
    quantized(model, with_kv("FP8_DEFAULT_CFG", "FP8_KV_CFG"))
    assert attentions
    assert {name.rpartition(".")[0] for name in kv_quantizers(model)} == set(attentions)
    assert logits(model).isfinite().all()


@pytest.mark.usefixtures("world")
def test_kv_quantizers_see_what_attention_sees() -> None:
    """After the rotary embedding and per group of queries; broken when they are elsewhere."""
    model = quantized(build(), with_kv("FP8_DEFAULT_CFG", "FP8_KV_CFG"))
    attention = model.decoder.layers[0].self_attention.core_attention
    seen: dict[str, torch.Size] = {}
    for kind in "qkv":
        quantizer = getattr(attention, f"{kind}_bmm_quantizer")
        quantizer.register_forward_pre_hook(
            lambda module, args, kind=kind: seen.update({kind: args[0].shape})
        )
    before = logits(model)
    assert seen == {"q": (24, 3, 8, 32), "k": (24, 3, 2, 32), "v": (24, 3, 2, 32)}
    attention.v_bmm_quantizer._amax.fill_(1e-3)
    assert not torch.equal(logits(model), before)


@pytest.mark.usefixtures("world")
def test_without_the_stand_in_kv_patterns_match_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = dict(QuantModuleRegistry._registry)
    del registry[core_attention()]
    monkeypatch.setattr(QuantModuleRegistry, "_registry", registry)
    monkeypatch.setattr(QuantModuleRegistry, "_dynamic_classes", {})
    assert kv_quantizers(quantized(build(), with_kv("FP8_DEFAULT_CFG", "FP8_KV_CFG"))) == {}


@pytest.mark.usefixtures("world")
def test_affine_bias_is_one_per_sequence_of_the_calibration() -> None:
    """ModelOpt averages it over dimensions -2 and -4, positions and sequences in Hugging Face's layout."""
    model = quantized(build(), with_kv("FP8_DEFAULT_CFG", "FP8_AFFINE_KV_CFG"), batch_size=5)
    (bias, *_) = [each._bias_value for each in kv_quantizers(model).values() if each.is_enabled]
    assert bias.shape == (1, 5, 1, 32)
    assert logits(model, batch_size=5).isfinite().all()
    with pytest.raises(RuntimeError, match=r"size of tensor a \(3\) must match the size of tensor b \(5\)"):
        logits(model)


@pytest.mark.usefixtures("world")
def test_restoring_an_affine_bias_is_refused_as_by_modelopt() -> None:
    model = quantized(build(), with_kv("FP8_DEFAULT_CFG", "FP8_AFFINE_KV_CFG"))
    attention = model.decoder.layers[0].self_attention.core_attention
    with pytest.raises(NotImplementedError, match="Only scalar states"):
        attention.modelopt_post_restore()
    attention = quantized(build(), with_kv("FP8_DEFAULT_CFG", "FP8_KV_CFG"))
    attention.decoder.layers[0].self_attention.core_attention.modelopt_post_restore()


@pytest.mark.usefixtures("world")
def test_kv_amax_is_in_the_sharded_state() -> None:
    model = quantized(build(), with_kv("FP8_DEFAULT_CFG", "FP8_KV_CFG"))
    with captured():
        state = model.sharded_state_dict()
    kept = {key for key in state if "core_attention" in key and key.endswith("_amax")}
    assert kept == {
        f"decoder.layers.{layer}.self_attention.core_attention.{kind}_bmm_quantizer._amax"
        for layer in (0, 1)
        for kind in ("k", "v")
    }


@pytest.mark.usefixtures("world")
def test_a_rotation_leaves_attention_as_it_is() -> None:
    """Queries and keys are rotated alike: with quantizers off what remains is rounding."""
    before = logits(build())
    model = quantized(build(), with_kv("FP8_DEFAULT_CFG", "NVFP4_KV_ROTATE_CFG"))
    for quantizer in (each for each in model.modules() if isinstance(each, TensorQuantizer)):
        quantizer.disable()
    off = logits(model)
    assert not torch.equal(off, before)
    assert (off.float() - before.float()).norm() / before.float().norm() < 0.015


# What ModelOpt itself cannot do with a Megatron model, on any device.
REFUSED: dict[str, tuple[type[Exception], str]] = {
    "NVFP4_SVDQUANT_DEFAULT_CFG": (TypeError, "can only concatenate tuple"),
    # Alone these ask for no calibration, which their bias needs.
    **dict.fromkeys(AFFINE, (AttributeError, "has no attribute '_bias_value'")),
}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", sorted(mtq.config.choices))
def test_every_config_runs_or_is_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """On experts, Mamba, attention and latent projections at once, without a word on the terminal."""
    model = build("Mamba and latent experts")
    before = logits(model)
    config = copy.deepcopy(getattr(mtq, name))
    if name in REFUSED:
        kind, words = REFUSED[name]
        with pytest.raises(kind, match=words):
            logits(quantized(model, config))
    else:
        after = logits(quantized(model, config))
        assert after.isfinite().all()
        assert not torch.equal(after, before)
    assert capfd.readouterr() == ("", "")


RECIPE_FILES = sorted((Path(modelopt_recipes.__file__).parent / "general" / "ptq").glob("*.yaml"))


def test_there_are_recipe_files() -> None:
    assert len(RECIPE_FILES) >= 20


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_every_recipe_file_runs(
    path: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a layerwise algorithm keeps its checkpoints where it stands
    model = build("Mamba and latent experts")
    before = logits(model)
    with captured():
        config = load_recipe(str(path)).quantize.model_dump(exclude_unset=True)
    after = logits(quantized(model, config))
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    assert capfd.readouterr() == ("", "")


# A forward pass that raises

MODELOPTS_OWN = replace_function  # imported before a stand-in took its place
FUNCTION = "linear_with_grad_accumulation_and_async_allreduce"


@pytest.mark.usefixtures("world")
def test_a_forward_pass_that_raises_leaves_megatron_as_it_was() -> None:
    function = getattr(layers, FUNCTION)
    before = logits(build())
    model = quantized(build(), copy.deepcopy(mtq.FP8_DEFAULT_CFG))
    model.decoder.layers[1].mlp.linear_fc1.input_quantizer.num_bits = (5, 2)
    with pytest.raises(NotImplementedError, match="Only support E=4 & M=3"):
        logits(model)
    assert getattr(layers, FUNCTION) is function
    assert not hasattr(layers, f"_{FUNCTION}")
    assert torch.equal(logits(build()), before)


def test_modelopt_alone_does_not_put_it_back() -> None:
    """If this fails, ModelOpt has mended it, and the stand-in can go."""
    package = ModuleType("package")
    package.function = len  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError), MODELOPTS_OWN(package, "function", max):
        1 / 0  # noqa: B018
    assert package.function is max


def test_functions_are_replaced_and_at_hand_inside() -> None:
    package = ModuleType("package")
    package.function = len  # type: ignore[attr-defined]
    with functionals.replace_function(package, "function", max):
        assert (package.function, package._function) == (max, len)
    with functionals.replace_function(package, "function", max, "kept"):
        assert package.kept is len
    assert vars(package).keys() & {"function", "_function", "kept"} == {"function"}


# CUDA


def ulps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one.view(torch.int32) - other.view(torch.int32)).abs()


@pytest.mark.gpu
@needs_cuda
@both_types
@every_format
@pytest.mark.parametrize("width", [96, 40])
def test_mx_equals_the_extension(name: str, dtype: torch.dtype, width: int) -> None:
    """But for blocks whose amax its fast division may put on the other side of a power of two."""
    bits = 8 if name == "INT8" else (int(name[1]), int(name[3]))
    x = normal(64, width, seed=11, dtype=dtype) * 0.05
    x[0] = 0
    theirs = tensor_quant.dynamic_block_quant(x.cuda(), 32, None, None, bits, (8, 0)).cpu()
    form = mx.FORMATS[NAMES[name]]
    ours = mx.fake_quantize(x, 32, form)
    padded = torch.nn.functional.pad(x.float(), (0, -width % 32)).view(64, -1, 32)
    ratio = (padded.abs().amax(-1) / form.largest).clamp(min=1e-30)
    power = torch.exp2(torch.log2(ratio).round())
    near = (ulps(ratio, power) <= 2).repeat_interleave(32, -1)[:, :width]
    assert torch.equal(ours[~near], theirs[~near])
    assert (near.float().mean() < 0.2) and torch.isfinite(theirs).all()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["E4M3", "E3M2"])
def test_two_levels_equal_the_extension(name: str) -> None:
    """Within a unit of float32: the extension divides by a scale where this multiplies."""
    x = normal(64, 96, seed=12) * 0.05
    bits = (int(name[1]), int(name[3]))
    amax = x.abs().max()
    theirs = tensor_quant.dynamic_block_quant(x.cuda(), 32, amax.cuda(), None, bits, (4, 3)).cpu()
    ours = mx.fake_quantize(x, 32, mx.FORMATS[NAMES[name]], mx.FORMATS[NAMES["E4M3"]], amax)
    # A number within rounding of a tie may go to the other side.
    close = torch.isclose(ours, theirs, rtol=1e-5, atol=0)
    assert close.float().mean() > 0.999


@pytest.mark.gpu
@needs_cuda
@both_types
@pytest.mark.parametrize("normalization", [448.0, 256.0])
def test_static_nvfp4_equals_the_kernel(dtype: torch.dtype, normalization: float) -> None:
    """But for what Triton's division, good to two units in the last place, may put on a tie's other side."""
    from modelopt.torch.kernels.quantization import gemm

    x = normal(256, 16, seed=13, dtype=dtype)
    x[3] = 0
    amax, largest = x.float().abs().amax(-1) * 0.9, x.float().abs().max()
    arguments = (True, normalization)
    theirs = gemm.static_blockwise_fp4_fake_quant(x.cuda(), amax.cuda(), largest.cuda(), *arguments).cpu()
    other = nvfp4_static.fake_quantize(x, amax, largest, *arguments) != theirs
    scales = tensor_quant.scaled_e4m3_impl(amax / 6, largest * (448 / normalization) / 6)
    scaled = (x.float() / scales[:, None]).abs()[other, None]
    ties = torch.tensor([(low + high) / 2 for low, high in pairwise(numbers_of("E2M1"))])
    assert ((scaled - ties).abs().amin(-1) < 1e-6).all()
    assert torch.equal(nvfp4_static.cast(x), gemm.static_blockwise_fp4_cast(x.cuda()).cpu())


@pytest.mark.gpu
@needs_cuda
def test_scale_sweep_on_cpu_chooses_as_the_kernel() -> None:
    """ModelOpt's own loop over the stand-in against its fused kernel: but for equal losses, the same amax."""
    from modelopt.torch.kernels.quantization import gemm
    from modelopt.torch.quantization.calib.mse import NVFP4MSECalibrator

    x = normal(256, 16, seed=14)
    amax, largest = x.abs().amax(-1, keepdim=True), x.abs().max()
    calibrator = NVFP4MSECalibrator(
        amax, largest, axis=0, quant_func=lambda x, amax: nvfp4_static.fake_quantize(x, amax, largest)
    )
    calibrator.collect(x)
    theirs = gemm.nvfp4_fp8_scale_sweep(x.cuda(), largest.cuda()).cpu()
    assert torch.isclose(calibrator.compute_amax().flatten(), theirs).float().mean() > 0.99


@pytest.mark.gpu
@needs_cuda
def test_nvfp4_kernel_has_one_block_size() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    x = normal(16, 64, seed=15)
    theirs = tensor_quant.dynamic_block_quant(x.cuda(), 32, x.abs().max().cuda(), None, (2, 1), (4, 3))
    assert torch.equal(theirs.cpu(), nvfp4.fake_quantize(x, x.abs().max(), 16))


@pytest.mark.gpu
@needs_cuda
@both_types
def test_hadamard_equals_the_package(dtype: torch.dtype) -> None:
    package = pytest.importorskip(hadamard.PACKAGE, reason="needs fast_hadamard_transform")
    x = normal(16, 64, seed=16, dtype=dtype)
    theirs = package.hadamard_transform(x.cuda(), scale=0.125).cpu()
    step = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(hadamard.hadamard_transform(x, 0.125), theirs, rtol=step, atol=step)


@pytest.mark.gpu
@needs_cuda
@both_types
@pytest.mark.parametrize(
    "config",
    [
        {"num_bits": (4, 3), "axis": None},
        {"num_bits": (4, 3), "axis": 0},
        {"num_bits": (4, 3), "axis": None, "block_sizes": {-1: 128, -2: 128}},
        {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}},
        {"num_bits": 8, "axis": 0},
        {"num_bits": 8, "axis": None},
        {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
    ],
    ids=["fp8", "fp8 per channel", "fp8 2-D blocks", "fp8 per token", "int8 per channel", "int8", "int4"],
)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # ModelOpt's, of blocks it pads
def test_what_needs_no_stand_in_is_the_same_on_cuda(config: dict[str, Any], dtype: torch.dtype) -> None:
    """ModelOpt's own plain torch against its kernels, both behind its quantizer."""
    x = normal(160, 232, seed=17, dtype=dtype)

    def run(x: torch.Tensor) -> torch.Tensor:
        quantizer = TensorQuantizer(QuantizerAttributeConfig(**config)).to(x.device)
        if config.get("type") != "dynamic":
            quantizer.disable_quant()
            quantizer.enable_calib()
            quantizer(x)
            quantizer.load_calib_amax()
            quantizer.disable_calib()
            quantizer.enable_quant()
        found: torch.Tensor = quantizer(x)
        return found.cpu()

    ours, theirs = run(x), run(x.cuda())
    # A product rounded once more or less is the next number of the type, and of the format for a few at ties.
    step = 1e-6 if dtype == torch.float32 else 0.0
    assert torch.isclose(ours, theirs, rtol=step, atol=0.0).float().mean() > 0.99
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.15, atol=0.5)


def test_every_stand_in_for_a_kernel_says_so() -> None:
    modules = {row.install.__module__.rpartition(".")[2] for row in STAND_INS}
    assert {
        each.__name__.rpartition(".")[2] for each in (mx, nvfp4, nvfp4_static, hadamard, kv_cache)
    } <= modules
