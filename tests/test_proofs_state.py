from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import small_models
import torch
from asserted import asserted

from harness.build import build_model
from harness.finding import Finding, Severity
from harness.layout import Layout
from harness.layout_rules import Owner
from harness.proofs.proof import Outcome, Proof
from harness.proofs.sharding import check_sharding, sharded
from harness.proofs.state import (
    Saved,
    prove_sharded_state,
    prove_sharding,
    prove_state,
    save,
    save_shards,
)
from harness.routing import forward_along, forward_and_routes
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import forward, token_ids
from harness.world import open_world, receiving

import modelopt.torch.quantization as mtq  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip

CPU = torch.device("cpu")
QWEN3 = (
    "--bf16 --no-masked-softmax-fusion --disable-bias-linear --position-embedding-type rope --no-rope-fusion "
    "--normalization RMSNorm --swiglu --seq-length 64 --max-position-embeddings 96 "
    "--no-bias-swiglu-fusion --padded-vocab-size 320 --num-layers 2 --hidden-size 128 --ffn-hidden-size 384 "
    "--num-attention-heads 8 --group-query-attention --num-query-groups 2 --kv-channels 32 "
    "--untie-embeddings-and-output-weights --qk-layernorm "
)
MODELS = {
    **small_models.MODELS,
    "Qwen3": QWEN3,
    "Qwen3-MoE": QWEN3 + "--num-experts 8 --moe-ffn-hidden-size 128 --moe-router-topk 2 "
    "--moe-router-dtype fp32 --moe-token-dispatcher-type alltoall",
}
KINDS = ("Qwen3", "Qwen3-MoE", "latent attention", "Mamba and latent experts")
CONFIGS = ("FP8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "W4A8_AWQ_BETA_CFG", "NVFP4_DEFAULT_CFG")
QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.1.mlp.linear_fc1"
FC2 = "decoder.layers.1.mlp.linear_fc2"
both_ways = pytest.mark.parametrize("prove", [prove_state, prove_sharded_state])


@dataclasses.dataclass
class Quantized:
    """A quantized model, what it gives, and all that a proof wants of it."""

    model: Any
    fresh: Callable[[], Any]
    run: Callable[[Any], torch.Tensor]
    after: torch.Tensor

    def prove(self, prove: Callable[..., Proof] = prove_state, saved: Any = None) -> Proof:
        with captured():
            return prove(self.model, self.fresh, self.run, self.after, saved)


def quantized(name: str, config: str) -> Quantized:
    small = small_models.model_of(MODELS[name])

    def fresh(seed: int = 7) -> Any:
        return build_model(small, Layout(), CPU, seed)

    with captured():
        model = fresh(1234)
        tokens = token_ids(320, 4, 24, CPU)
        first = forward_and_routes(model, tokens)
        mtq.quantize(model, copy.deepcopy(getattr(mtq, config)), lambda model: forward(model, tokens))
        after = forward_along(model, first)
    return Quantized(model, fresh, lambda model: forward_along(model, first), after)


@pytest.fixture
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


@pytest.fixture
def quiet(world: None) -> Iterator[None]:
    """For tests that ask Megatron themselves: it warns of what it will do one day."""
    with captured():
        yield


@pytest.fixture
def fp8(quiet: None) -> Quantized:
    return quantized("Qwen3", "FP8_DEFAULT_CFG")


@pytest.fixture
def awq(quiet: None) -> Quantized:
    return quantized("Qwen3", "INT4_AWQ_CFG")


def errors(proof: Proof) -> list[Finding]:
    return [finding for finding in proof.findings if finding.is_error]


# What should go through


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", KINDS)
def test_a_model_comes_back(name: str, config: str, world: None, capfd: pytest.CaptureFixture[str]) -> None:
    case = quantized(name, config)
    for prove, way in ((prove_state, "state"), (prove_sharded_state, "sharded state")):
        proof = case.prove(prove)
        assert (proof.name, proof.outcome, errors(proof)) == (way, Outcome.PASSED, [])
        assert proof.detail.endswith("saved and restored")
    # A model that was saved is as it was.
    with captured():
        assert torch.equal(case.run(case.model), case.after)
    assert capfd.readouterr() == ("", "")


def test_what_comes_back_is_another_model(fp8: Quantized) -> None:
    """The fresh model has other numbers, so that a restoring that does nothing is seen."""
    with captured():
        assert not torch.equal(fp8.run(fp8.fresh()), fp8.after)


def test_a_checkpoint_on_disk_holds_the_same(
    awq: Quantized, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's own writer and reader give what is handed over in memory."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # It logs how much memory it takes, by way of a package that is not among the dependencies.
    monkeypatch.setattr(filesystem_async, "_process_memory", lambda: 0)
    with captured():
        dist_checkpointing.save(sharded(awq.model), str(tmp_path), ("torch_dist", 1))
        wanted = sharded(awq.model)
        loaded = dist_checkpointing.load(dict(wanted), str(tmp_path))
        shards = save_shards(awq.model).shards
    on_disk = {name: value for name, value in loaded.items() if isinstance(wanted.get(name), ShardedTensor)}
    assert len(on_disk) > 30
    for name, value in on_disk.items():
        entry = wanted[name]
        assert torch.equal(value, shards[entry.key, entry.global_offset, entry.global_shape])


# The plain way, broken


def without(saved: Saved, name: str) -> Saved:
    return Saved(saved.modelopt, {key: value for key, value in saved.tensors.items() if key != name})


def with_value(saved: Saved, name: str, value: torch.Tensor) -> Saved:
    return Saved(saved.modelopt, {**saved.tensors, name: value})


def state_of(saved: Any) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(saved.modelopt), weights_only=False)
    return state


def with_state(saved: Any, state: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return dataclasses.replace(saved, modelopt=buffer.getvalue())


@pytest.mark.parametrize("name", [f"{QKV}.input_quantizer._amax", f"{FC1}.weight"])
def test_a_lost_key_is_found(fp8: Quantized, name: str) -> None:
    proof = fp8.prove(saved=without(save(fp8.model), name))
    (finding,) = proof.findings
    module = name.partition(".input_quantizer")[0].removesuffix(".weight")
    assert proof.outcome is Outcome.FAILED
    assert (finding.stage, finding.severity, finding.module) == ("quantize", Severity.ERROR, module)
    what = name.removeprefix(f"{module}.")
    short = module.removeprefix("decoder.")
    assert finding.message == f"{short}  {what} is not in what was saved"
    assert repr(module) in asserted([finding], "state")


def test_an_amax_dropped_before_saving_is_found(fp8: Quantized) -> None:
    saved = save(fp8.model)
    metadata = (state := state_of(saved))["modelopt_state_dict"][-1][1]["metadata"]["quantizer_state"]
    metadata[f"{FC2}.input_quantizer"]["_pytorch_state_metadata"]["buffers"].clear()
    proof = fp8.prove(saved=with_state(saved, state))
    (finding,) = proof.findings
    assert finding.module == FC2
    assert finding.message.endswith(
        "input_quantizer._amax was saved, and the restored model has no place for it"
    )


def test_a_scale_zeroed_after_saving_is_found(awq: Quantized) -> None:
    name = f"{FC1}.input_quantizer._pre_quant_scale"
    saved = save(awq.model)
    proof = awq.prove(saved=with_value(saved, name, torch.zeros_like(saved.tensors[name])))
    (finding,) = proof.findings
    assert finding.module == FC1
    assert finding.message == (
        "layers.1.mlp.linear_fc1  input_quantizer._pre_quant_scale is restored to another value in "
        "128 of 128 places"
    )
    assert repr(FC1) in asserted([finding], "state", "int4_awq")


def test_an_amax_of_another_size_is_found(awq: Quantized) -> None:
    name = f"{FC1}.weight_quantizer._amax"
    proof = awq.prove(saved=with_value(save(awq.model), name, torch.ones(5)))
    (finding,) = proof.findings
    assert finding.module == FC1
    assert finding.message.endswith("was saved as 5, and the restored model makes it 768 x 1")


def test_a_quantizer_set_otherwise_is_found(fp8: Quantized) -> None:
    saved = save(fp8.model)
    state = state_of(saved)
    state["modelopt_state_dict"][-1][1]["metadata"]["quantizer_state"][f"{QKV}.weight_quantizer"][
        "_num_bits"
    ] = 8
    # The module's extra state says it again, and is believed.
    assert fp8.prove(saved=with_state(saved, state)).findings == ()
    saved = without(with_state(saved, state), f"{QKV}._extra_state")
    (finding,) = fp8.prove(saved=saved).findings
    assert finding.module == QKV
    assert finding.message.endswith("weight_quantizer has _num_bits 8 after restoring, (4, 3) before")


def test_a_state_without_a_quantizer_is_found(fp8: Quantized) -> None:
    saved = save(fp8.model)
    state = state_of(saved)
    del state["modelopt_state_dict"][-1][1]["metadata"]["quantizer_state"][f"{QKV}.weight_quantizer"]
    proof = fp8.prove(saved=with_state(saved, state))
    (finding,) = proof.findings
    assert proof.outcome is Outcome.FAILED
    assert "a fresh model cannot be restored from the state: ApplyModeError" in finding.message
    assert f"{QKV}.weight_quantizer" in finding.message


def test_a_number_outside_of_every_state_is_found(fp8: Quantized) -> None:
    """What neither state holds shows in the output alone."""
    fp8.after = fp8.after + 1
    (finding,) = fp8.prove().findings
    assert finding.message == (
        f"{fp8.after.numel()} of {fp8.after.numel()} logits of the restored model are not what they were"
    )
    assert "routed(restored, tokens, routes)[0] != after" in asserted([finding], "state")


# The sharded way, broken


def test_a_lost_shard_is_found(awq: Quantized) -> None:
    saved = save_shards(awq.model)
    lost = {
        key: value
        for key, value in saved.shards.items()
        if key[0] != f"{FC1}.input_quantizer._pre_quant_scale"
    }
    proof = awq.prove(prove_sharded_state, dataclasses.replace(saved, shards=lost))
    (finding,) = errors(proof)
    assert (proof.outcome, finding.module) == (Outcome.FAILED, FC1)
    assert finding.message.endswith("input_quantizer._pre_quant_scale is not in what was saved")


def test_a_lost_extra_state_is_found(awq: Quantized) -> None:
    """It says what a quantizer is, and so where its numbers go."""
    saved = save_shards(awq.model)
    lost = {key: value for key, value in saved.shards.items() if key[0] != f"{QKV}._extra_state"}
    proof = awq.prove(prove_sharded_state, dataclasses.replace(saved, shards=lost))
    assert {finding.module for finding in errors(proof)} == {QKV}


def test_a_shard_zeroed_is_found(awq: Quantized) -> None:
    saved = save_shards(awq.model)
    name = f"{FC2}.weight_quantizer._amax"
    zeroed = {
        key: torch.zeros_like(value) if key[0] == name else value for key, value in saved.shards.items()
    }
    (finding,) = errors(awq.prove(prove_sharded_state, dataclasses.replace(saved, shards=zeroed)))
    assert finding.module == FC2
    assert "weight_quantizer._amax is restored to another value in 384 of 384 places" in finding.message


def test_a_scale_that_is_not_sharded_is_found(awq: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = sharded(awq.model)
    del entries[f"{FC1}.input_quantizer._pre_quant_scale"]
    monkeypatch.setattr(awq.model, "sharded_state_dict", lambda: entries)
    proof = awq.prove(prove_sharded_state)
    (finding,) = errors(proof)
    assert (proof.outcome, finding.module) == (Outcome.FAILED, FC1)
    assert finding.message.endswith("input_quantizer._pre_quant_scale is not in the sharded state dict")
    program = asserted([finding], "sharded state", "int4_awq")
    assert f"assert '{FC1}.input_quantizer._pre_quant_scale' in entries" in program


def test_other_numbers_in_the_sharded_state_dict_are_found(awq: Quantized) -> None:
    entries = sharded(awq.model)
    name = f"{QKV}.weight_quantizer._amax"
    entries[name] = dataclasses.replace(entries[name], data=entries[name].data + 1)
    found = [finding for finding in check_sharding(awq.model, entries) if finding.is_error]
    assert [finding.module for finding in found] == [QKV]
    assert "torch.equal(stored, own)" in asserted(found, "sharded state", "int4_awq")


def test_gate_and_rest_stored_unlike_their_scales_is_a_warning(awq: Quantized, fp8: Quantized) -> None:
    (finding,) = awq.prove(prove_sharded_state).findings
    assert (finding.severity, finding.module, finding.actual) == (
        Severity.WARNING,
        "decoder.layers.0.mlp.linear_fc1",
        2,
    )
    assert fp8.prove(prove_sharded_state).findings == ()


def test_a_model_that_has_no_sharded_state_dict(world: None) -> None:
    """Two-dimensional blocks as large as an expert's matrix: one number, split as if it were two lists."""
    case = quantized("Qwen3-MoE", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG")
    proof = case.prove(prove_sharded_state)
    assert (proof.outcome, proof.owner, proof.findings) == (Outcome.UNSUPPORTED, Owner.MODELOPT, ())
    assert proof.limit == "IndexError: tuple index out of range"
    assert proof.detail == (
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2 has no sharded state dict"
    )
    assert case.prove().outcome is Outcome.PASSED


# Two ranks


@pytest.fixture
def halves() -> Iterator[Any]:
    """One of two tensor ranks of a small Qwen3 in int4 blocks, the other simulated."""
    layout = Layout(tp=2)
    small = small_models.model_of(MODELS["Qwen3"])
    with installed(CPU), open_world(layout, CPU), captured(), receiving():
        model = build_model(small, layout, CPU)
        tokens = token_ids(320, 3, 24, CPU)
        mtq.quantize(model, copy.deepcopy(mtq.INT4_AWQ_CFG), lambda model: forward(model, tokens))
        yield model


def test_scales_are_split_as_their_matrices(halves: Any) -> None:
    proof = prove_sharding(halves)
    assert (proof.outcome, errors(proof)) == (Outcome.PASSED, [])
    assert proof.detail.startswith("16 scales are split as their matrices; layers.0.mlp.linear_fc1  ")


def test_scales_of_experts_on_fewer_tensor_ranks() -> None:
    """ModelOpt splits them as the dense matrices are split, whatever the experts' own tensor ranks."""
    layout = Layout(tp=2, etp=1)
    small = small_models.model_of(MODELS["Qwen3-MoE"])
    with installed(CPU), open_world(layout, CPU), captured(), receiving():
        model = build_model(small, layout, CPU)
        tokens = token_ids(320, 4, 24, CPU)
        mtq.quantize(model, copy.deepcopy(mtq.INT8_DEFAULT_CFG), lambda model: forward(model, tokens))
        proof = prove_sharding(model)
    assert {finding.module for finding in errors(proof)} == {
        f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1"
        for layer in (0, 1)
        for expert in range(8)
    }
    assert errors(proof)[0].message.endswith(
        "weight_quantizer._amax is 256 x 1 of 512 x 1 in the sharded state dict, expected of 256 x 1: "
        "the weight is 256 x 128 of 256 x 128"
    )


@pytest.mark.parametrize("attribute", ["weight_quantizer._amax", "input_quantizer._pre_quant_scale"])
def test_a_scale_split_otherwise_is_found(halves: Any, attribute: str) -> None:
    entries = sharded(halves)
    name = f"{FC2}.{attribute}"
    assert entries[name].global_shape != entries[name].local_shape
    entries[name] = ShardedTensor.from_rank_offsets(name, entries[name].data)
    (finding,) = [f for f in check_sharding(halves, entries) if f.is_error]
    assert finding.module == FC2
    assert attribute in finding.message and "in the sharded state dict, expected of" in finding.message
    assert finding.message.endswith("the weight is 128 x 192 of 128 x 384")
    assert f"assert whole == {finding.expected}" in asserted([finding], "sharding", "int4_awq")
