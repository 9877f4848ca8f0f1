from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from asserted import asserted
from test_proofs_state import CPU, KINDS, quantized

from harness.layout import Layout
from harness.layout_rules import Owner
from harness.proofs.backward import forward_with_graph, prove_backward
from harness.proofs.proof import Outcome, Proof
from harness.proofs.quantizers import expected_matrices
from harness.recipes import find_recipe
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import forward, token_ids
from harness.world import open_world

from modelopt.torch.quantization import tensor_quant  # isort: skip

QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.1.mlp.linear_fc1"
EMBEDDING = "embedding.word_embeddings"
CONFIGS = ("FP8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "W4A8_AWQ_BETA_CFG", "NVFP4_DEFAULT_CFG")
TOKENS = token_ids(320, 4, 24, CPU)


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


def prove(model: Any, config: str = "FP8_DEFAULT_CFG", tokens: torch.Tensor = TOKENS, **more: Any) -> Proof:
    with captured():
        return prove_backward(model, expected_matrices(model, find_recipe(config)), tokens, **more)


@pytest.fixture
def model() -> Any:
    return quantized("Qwen3", "FP8_DEFAULT_CFG").model


# What should go through


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", KINDS)
def test_every_matrix_gets_a_gradient(name: str, config: str) -> None:
    case = quantized(name, config)
    count = len(expected_matrices(case.model, find_recipe(config)))
    proof = prove(case.model, config)
    assert (proof.name, proof.findings, proof.outcome) == ("backward", (), Outcome.PASSED)
    assert proof.detail == f"{count + 1} weights have a gradient, the embedding among them"
    # Nothing is left behind, and nothing was changed.
    assert all(parameter.grad is None for parameter in case.model.parameters())
    with captured():
        assert torch.equal(case.run(case.model), case.after)


def test_logits_of_the_caller_are_used(model: Any) -> None:
    with captured():
        logits, seen = forward_with_graph(model, TOKENS)
        assert torch.equal(logits, forward(model, TOKENS))
    assert seen == {}
    assert prove(model, logits=logits).findings == ()


def test_gradients_of_the_caller_stay(model: Any) -> None:
    weight = model.get_parameter(f"{QKV}.weight")
    weight.grad = own = torch.ones_like(weight)
    assert prove(model).findings == ()
    assert weight.grad is own


def test_same_gradients_every_time(model: Any) -> None:
    found = []
    for _ in range(2):
        with captured():
            logits, _ = forward_with_graph(model, TOKENS)
        logits.float().square().mean().backward()
        found.append(model.get_parameter(f"{QKV}.weight").grad.clone())
        model.zero_grad()
    assert torch.equal(*found)


def test_an_expert_without_a_token_has_none() -> None:
    model = quantized("Qwen3-MoE", "FP8_DEFAULT_CFG").model
    proof = prove(model, tokens=TOKENS[:1, :2])
    assert (proof.outcome, proof.findings) == (Outcome.PASSED, ())
    assert "are of experts that saw no token" in proof.detail


def test_frozen_weights_are_counted(model: Any) -> None:
    model.get_parameter(f"{QKV}.weight").requires_grad_(False)
    proof = prove(model)
    assert proof.outcome is Outcome.PASSED
    assert proof.detail == "8 weights have a gradient, the embedding among them; 1 are frozen"


def test_all_frozen_is_a_finding(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    (finding,) = prove(model).findings
    assert finding.message == "every weight is frozen: there is nothing to train"
    assert "requires_grad" in asserted([finding], "backward")


# Broken on purpose


def test_a_detached_weight_is_found(model: Any) -> None:
    quantizer = model.get_submodule(FC1).weight_quantizer
    quantizer.register_forward_hook(lambda module, args, output: output.detach())
    proof = prove(model)
    (finding,) = proof.findings
    assert (proof.outcome, finding.module) == (Outcome.FAILED, FC1)
    assert finding.message == "layers.1.mlp.linear_fc1  weight gets no gradient"
    assert "assert gradient is not None" in asserted(proof.findings, "backward")


def test_an_expert_with_tokens_and_no_gradient_is_found() -> None:
    model = quantized("Qwen3-MoE", "FP8_DEFAULT_CFG").model
    path = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2"
    quantizer = model.get_submodule(path).weight_quantizer
    quantizer.register_forward_hook(lambda module, args, output: output.detach())
    assert [finding.module for finding in prove(model).findings] == [path]


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.0, "gradient is zero in every place"),
        (float("nan"), "gradient is not finite in 98304 of 98304 places"),
    ],
    ids=["zero", "nan"],
)
def test_a_gradient_of_no_use_is_found(model: Any, factor: float, words: str) -> None:
    model.get_parameter(f"{FC1}.weight").register_hook(lambda gradient: gradient * factor)
    (finding,) = prove(model).findings
    assert (finding.module, finding.message) == (FC1, f"layers.1.mlp.linear_fc1  {words}")
    assert f"get_parameter('{FC1}.weight').grad" in asserted([finding], "backward")


def test_everything_clipped_is_found(model: Any) -> None:
    """Where a config asks for it, a number beyond its amax passes no gradient: a tiny one stops all."""
    quantizer = model.get_submodule(FC1).weight_quantizer
    quantizer._amax.fill_(1e-30)
    assert prove(model).findings == ()
    quantizer._pass_through_bwd = False
    (finding,) = prove(model).findings
    assert (finding.module, finding.actual) == (FC1, 0.0)


def test_an_embedding_cut_off_is_found(model: Any) -> None:
    model.embedding.register_forward_hook(lambda module, args, output: output.detach().requires_grad_(True))
    (finding,) = prove(model).findings
    assert finding.module == EMBEDDING


def test_a_format_without_a_backward(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(context: Any, *gradients: Any) -> Any:
        raise NotImplementedError("no way back")

    monkeypatch.setattr(tensor_quant.ScaledE4M3Function, "backward", staticmethod(backward))
    proof = prove(model)
    assert (proof.outcome, proof.owner) == (Outcome.UNSUPPORTED, Owner.MODELOPT)
    assert proof.limit == "NotImplementedError: no way back"


def test_a_backward_that_raises_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(context: Any, *gradients: Any) -> Any:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(tensor_quant.ScaledE4M3Function, "backward", staticmethod(backward))
    (finding,) = prove(model).findings
    assert finding.message == "a gradient step raises RuntimeError: a kernel failed"


def test_a_model_that_raises_without_quantizers_too_is_megatrons_limit(model: Any) -> None:
    def spoilt(module: Any, args: Any, output: Any) -> Any:
        class Spoilt(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, given: torch.Tensor) -> torch.Tensor:
                return given.clone()

            @staticmethod
            def backward(context: Any, *gradients: Any) -> Any:
                raise RuntimeError("no gradient passes here")

        return Spoilt.apply(output)

    model.embedding.register_forward_hook(spoilt)
    weight = model.get_parameter(f"{QKV}.weight")
    weight.grad = own = torch.ones_like(weight)
    proof = prove(model)
    assert (proof.outcome, proof.owner, proof.findings) == (Outcome.UNSUPPORTED, Owner.MEGATRON, ())
    assert proof.limit == "RuntimeError: no gradient passes here"
    assert weight.grad is own
    assert model.get_submodule(FC1).weight_quantizer.is_enabled
