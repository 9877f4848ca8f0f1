from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from asserted import asserted
from test_proofs_state import CPU, KINDS, Quantized, quantized

from harness.layout import Layout
from harness.layout_rules import Owner
from harness.proofs.packing import Stored, WeightFormat, packed, step, weight_format
from harness.proofs.proof import Outcome, Proof
from harness.proofs.weights import check_packed, prove_weights, rounded
from harness.standins import installed
from harness.standins.output import captured
from harness.world import open_world

import modelopt.torch.quantization as mtq  # isort: skip
from modelopt.torch.quantization.qtensor import QTensorWrapper  # isort: skip

QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.1.mlp.linear_fc1"
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
BOUND = 0.2  # above what these formats do to the logits of eight products, below an output gone wrong


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


def prove(case: Quantized, config: str, bound: float = BOUND) -> Proof:
    with captured():
        return prove_weights(case.model, getattr(mtq, config), case.run, case.after, bound)


# What should go through


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("FP8_DEFAULT_CFG", "E4M3 under one scale"),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "E4M3 with a scale a row"),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "E4M3 in blocks of 128 x 128"),
        ("INT8_SMOOTHQUANT_CFG", "int8 with a scale a row"),
        ("INT4_AWQ_CFG", "int4 in blocks of 1 x 128"),
        ("NVFP4_DEFAULT_CFG", "E2M1 in blocks of 1 x 16"),
    ],
)
@pytest.mark.parametrize("name", ["Qwen3", "Qwen3-MoE"])
def test_weights_are_packed(name: str, config: str, words: str) -> None:
    case = quantized(name, config)
    proof = prove(case, config)
    assert (proof.name, proof.findings, proof.outcome) == ("weights", (), Outcome.PASSED)
    count = 8 if name == "Qwen3" else 36
    assert proof.detail == f"{count} weights packed into {words}"
    assert sum(isinstance(weight, QTensorWrapper) for weight in case.model.parameters()) == count


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_is_packed(name: str) -> None:
    case = quantized(name, "FP8_DEFAULT_CFG")
    assert prove(case, "FP8_DEFAULT_CFG", 0.5).findings == ()


def test_only_what_a_recipe_means_is_packed() -> None:
    proof = prove(quantized("Qwen3", "NVFP4_MLP_ONLY_CFG"), "NVFP4_MLP_ONLY_CFG")
    assert (proof.findings, proof.detail) == ((), "4 weights packed into E2M1 in blocks of 1 x 16")


# What ModelOpt cannot do


def test_two_stages_have_no_real_form() -> None:
    case = quantized("Qwen3", "W4A8_AWQ_BETA_CFG")
    proof = prove(case, "W4A8_AWQ_BETA_CFG")
    assert (proof.outcome, proof.owner, proof.findings) == (Outcome.UNSUPPORTED, Owner.MODELOPT, ())
    assert proof.limit == ("its stages in a row give the matrix product a FP8QTensor in place of a tensor")
    with captured():
        assert torch.equal(case.run(case.model), case.after)  # left as it was


def test_a_format_without_a_real_form() -> None:
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    case = quantized("Qwen3", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
    for module in case.model.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer.num_bits = 6
    with captured():
        proof = prove_weights(case.model, config, case.run, case.after, BOUND)
    assert proof.outcome is Outcome.UNSUPPORTED
    assert proof.limit == "AssertionError: Real quantization not supported for this format."


def test_an_amax_that_packing_forgets() -> None:
    case = quantized("Qwen3", "INT4_AWQ_CFG")
    case.model.get_submodule(FC1).weight_quantizer._amax.mul_(0.7)
    proof = prove(case, "INT4_AWQ_CFG")
    assert (proof.outcome, proof.detail) == (
        Outcome.UNSUPPORTED,
        f"{FC1} has amax that calibration chose",
    )
    assert proof.limit is not None and proof.limit.startswith("mtq.compress takes the largest number")


# Broken on purpose


def spoilt(config: str, spoil: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> Proof:
    """The proof where packing leaves one matrix otherwise."""
    compress = mtq.compress

    def spoiling(model: Any) -> None:
        compress(model)
        spoil(model.get_submodule(FC1))

    monkeypatch.setattr(mtq, "compress", spoiling)
    return prove(quantized("Qwen3", config), config)


def in_another_type(module: Any) -> None:
    module._parameters["weight"] = QTensorWrapper(
        module.weight.data.to(torch.float8_e5m2), metadata=module.weight.metadata
    )


def unpacked(module: Any) -> None:
    real = module.weight_quantizer(module.weight)
    del module._parameters["weight"]
    dict.__setitem__(module._parameters, "weight", torch.nn.Parameter(real.detach()))


def with_one_scale_for_all(module: Any) -> None:
    module.weight_quantizer._scale = module.weight_quantizer._scale[:1]


def with_twice_the_scale(module: Any) -> None:
    module.weight_quantizer._scale *= 2


def with_a_bf16_scale(module: Any) -> None:
    module.weight_quantizer._scale = module.weight_quantizer._scale.bfloat16()


def without_its_double_scale(module: Any) -> None:
    del module.weight_quantizer._double_scale


def with_halves_swapped(module: Any) -> None:
    data = module.weight.data
    module.weight.data.copy_(data << 4 | data >> 4)


@pytest.mark.parametrize(
    ("config", "spoil", "words"),
    [
        (
            "FP8_DEFAULT_CFG",
            in_another_type,
            "weight is 768 x 128 of float8_e5m2, E4M3 under one scale makes it 768 x 128 of float8_e4m3fn",
        ),
        ("FP8_DEFAULT_CFG", unpacked, "weight is not packed, expected E4M3 under one scale"),
        (
            "INT8_SMOOTHQUANT_CFG",
            with_one_scale_for_all,
            "weight_quantizer._scale is 1 x 1 of bfloat16, int8 with a scale a row makes it "
            "768 x 1 of bfloat16",
        ),
        (
            "FP8_DEFAULT_CFG",
            with_twice_the_scale,
            "weight unpacks to numbers more than a step of E4M3 under one scale away in",
        ),
        (
            "INT4_AWQ_CFG",
            with_halves_swapped,
            "weight unpacks to numbers more than a step of int4 in blocks of 1 x 128 away in",
        ),
        (
            "NVFP4_DEFAULT_CFG",
            with_a_bf16_scale,
            "weight_quantizer._scale is 768 x 8 of bfloat16, E2M1 in blocks of 1 x 16 makes it "
            "768 x 8 of float8_e4m3fn",
        ),
        (
            "NVFP4_DEFAULT_CFG",
            without_its_double_scale,
            "weight_quantizer._double_scale is missing, E2M1 in blocks of 1 x 16",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_weight_packed_otherwise_is_found(
    config: str, spoil: Callable[[Any], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = spoilt(config, spoil, monkeypatch)
    (finding,) = proof.findings
    assert (proof.outcome, finding.module) == (Outcome.FAILED, FC1)
    assert finding.message.startswith(f"layers.1.mlp.linear_fc1  {words}")
    told = {"unpacks to": "beyond.any()", "is not packed": "isinstance(module.weight, QTensorWrapper)"}
    wanted = next((told[part] for part in told if part in words), "wanted.items()")
    program = asserted([finding], "weights", config.removesuffix("_CFG").removesuffix("_DEFAULT").lower())
    assert repr(FC1) in program and wanted in program


def test_blocks_that_run_across_rows_are_modelopts_limit() -> None:
    """ModelOpt packs int4 as one long row: of a width that blocks do not divide, others share a scale."""
    case = quantized("latent attention", "INT4_AWQ_CFG")
    proof = prove(case, "INT4_AWQ_CFG", 0.5)
    assert (proof.outcome, proof.owner, proof.findings) == (Outcome.UNSUPPORTED, Owner.MODELOPT, ())
    assert proof.limit == "mtq.compress packs all rows as one, so that blocks of 128 reach over rows of 96"
    assert proof.detail.endswith("linear_q_up_proj would share scales between rows")
    with captured():
        assert torch.equal(case.run(case.model), case.after), "left as it was"


def test_weights_that_the_config_does_not_mean_are_found() -> None:
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"].append({"quantizer_name": "*self_attention*", "enable": False})
    case = quantized("Qwen3", "FP8_DEFAULT_CFG")
    with captured():
        proof = prove_weights(case.model, config, case.run, case.after, BOUND)
    assert [finding.module for finding in proof.findings] == [
        f"decoder.layers.{layer}.self_attention.linear_{name}" for layer in (0, 1) for name in ("proj", "qkv")
    ]
    assert proof.findings[0].message.endswith("weight is packed, though the config means no weight of it")
    assert "assert not isinstance(module.weight" in asserted(proof.findings[:1], "weights")


def test_a_config_for_the_cache_alone_packs_int8() -> None:
    """It leaves ModelOpt's own eight bits on every matrix."""
    proof = prove(quantized("Qwen3", "FP8_KV_CFG"), "FP8_KV_CFG")
    assert (proof.findings, proof.detail) == ((), "9 weights packed into int8 with a scale a row")


def test_an_output_beyond_its_bound_is_found() -> None:
    case = quantized("Qwen3", "FP8_DEFAULT_CFG")
    case.after = case.after * 2
    (finding,) = prove(case, "FP8_DEFAULT_CFG").findings
    assert finding.message.startswith(
        "packed weights move the logits by 0.5 of their size, expected at most 0.2"
    )
    assert "assert error <= 0.2" in asserted([finding], "weights")


def test_a_weight_that_was_not_to_be_packed_is_found() -> None:
    case = quantized("Qwen3", "FP8_DEFAULT_CFG")
    with captured():
        before = dict(rounded(case.model, mtq.FP8_DEFAULT_CFG))
        mtq.compress(case.model)
        before.pop(QKV)
        (finding,) = check_packed(case.model, before)
    assert finding.module == QKV
    assert "assert not isinstance(module.weight" in asserted([finding], "weights")


# Arithmetic


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ("FP8_DEFAULT_CFG", {"weight": ((200, 300), E4M3), "_scale": ((), BF16)}),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", {"weight": ((200, 300), E4M3), "_scale": ((2, 3), BF16)}),
        ("INT8_WEIGHT_ONLY_CFG", {"weight": ((200, 300), torch.int8), "_scale": ((200, 1), BF16)}),
        ("INT4_AWQ_CFG", {"weight": ((200, 150), torch.uint8), "_scale": ((200, 3), BF16)}),
        (
            "NVFP4_DEFAULT_CFG",
            {
                "weight": ((200, 150), torch.uint8),
                "_scale": ((200, 19), E4M3),
                "_double_scale": ((), torch.float32),
            },
        ),
        ("MXFP8_DEFAULT_CFG", {"weight": ((200, 300), E4M3), "_scale": ((200, 10), torch.uint8)}),
        ("MXFP4_DEFAULT_CFG", {"weight": ((200, 150), torch.uint8), "_scale": ((200, 10), torch.uint8)}),
    ],
)
def test_bytes_of_a_format(config: str, stored: dict[str, Any]) -> None:
    form = weight_format(getattr(mtq, config), QKV)
    assert form is not None
    assert packed(form, (200, 300), BF16) == {name: Stored(*value) for name, value in stored.items()}


def test_format_of_a_pattern() -> None:
    own = copy.deepcopy(mtq.NVFP4_MLP_ONLY_CFG)
    assert weight_format(own, QKV) is None
    assert weight_format(own, FC1) == WeightFormat((2, 1), 1, 16, (4, 3))
    own["quant_cfg"].append({"quantizer_name": "*layers.1*", "enable": False})
    assert weight_format(own, FC1) is None
    own["quant_cfg"].append({"quantizer_name": "*layers.1*weight_quantizer", "enable": True})
    assert weight_format(own, FC1) == WeightFormat((2, 1), 1, 16, (4, 3))


def test_a_step_is_that_of_the_format() -> None:
    weight = torch.tensor([[7.0, -1.0, 0.0, 3.5]])
    near = pytest.approx(1, rel=0.05)
    assert float(step(WeightFormat(4, 1, 4), weight)[0, 2]) == near
    # E2M1 under 7 / 6: its small numbers are half of that apart, its large ones by half of themselves.
    small, large = step(WeightFormat((2, 1), 1, 4, (4, 3)), weight)[0, [2, 0]]
    assert float(small) / (7 / 12) == near and float(large) / 3.5 == near
