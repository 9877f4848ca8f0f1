"""Checkpoints: a twin as transformers' own model, whose every weight and setting matters, and on disk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.families import INERT_KEYS, find_family
from harness.inventory import counts
from harness.layout import Layout
from harness.parity import checkpoint, hf_mxfp4
from harness.parity.corrections import correct
from harness.parity.hf_sizes import size_arguments
from harness.parity.twin import NoTwin, Twin, twin
from harness.shrink import ShrinkPlan, shrink
from tests.test_parity_twin import published

transformers = pytest.importorskip("transformers", reason="uv sync --extra parity")

# One preset of each family, and of each kind that a family has: (name, whether its settings are tried).
FAMILIES = {
    "Qwen3-0.6B": True,
    "Qwen2.5-14B-Instruct": True,
    "Llama-3.1-8B-Instruct": True,
    "Qwen3-30B-A3B": True,
    "Qwen3-Next-80B-A3B-Instruct": False,
    "DeepSeek-V2-Lite": True,
    "DeepSeek-R1": True,
    "gpt-oss-20b": True,
    "Nemotron-Mini-4B-Instruct": True,
    "Nemotron-H-4B-Instruct": True,
    "NVIDIA-Nemotron-3-Super-120B-A12B-BF16": False,
    "Llama-4-Scout-17B-16E-Instruct": True,
    "phi-4": True,
    "Mixtral-8x7B-v0.1": True,
    "MiniMax-M2": False,
    "GLM-4.5": True,
}


class Built:
    """A twin, its model, and the model's logits of some tokens."""

    def __init__(self, name: str) -> None:
        self.facts, architecture = published(name)
        self.plan: ShrinkPlan = shrink(architecture, Layout())
        self.twin: Twin = twin(self.facts, self.plan)
        self.model = checkpoint.build(self.twin)
        vocabulary = self.twin.text_config["vocab_size"]
        # Longer than the one window there is; Mamba's plain scan takes the square of the length.
        shape = (5, 64) if architecture.hybrid else (2, 160)
        self.tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))
        self.logits = self.logits_of(self.model)

    def logits_of(self, model: Any) -> Tensor:
        correct(model, self.tokens.shape[1])
        return checkpoint.logits(model, self.tokens)

    def moved(self, logits: Tensor) -> float:
        """How far other logits are from its own, relative to the largest."""
        return float((logits - self.logits).abs().max() / self.logits.abs().max())


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest) -> Iterator[Built]:
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Built(request.param)
    torch.set_num_threads(threads)


# ---- the model ----


def test_it_has_the_parameters_that_arithmetic_gives_the_preset(built: Built) -> None:
    tensors = checkpoint.checkpoint_tensors(built.model, built.twin)
    numbers = 0
    for name, tensor in tensors.items():
        # Two numbers to a byte of a block; the scales are part of the numbers.
        size = 0 if name.endswith("_scales") else tensor.numel() * (2 if name.endswith("_blocks") else 1)
        numbers += size
    expected = counts(built.plan.after)
    assert numbers == expected.total + expected.buffers + over_all_heads(built)


def over_all_heads(built: Built) -> int:
    """What the norms of MiniMax-M2, over all heads together, have more than Megatron's of one head each."""
    attention = built.plan.after.attention
    if built.twin.architecture != "MiniMaxM2ForCausalLM" or attention is None:
        return 0
    each = attention.query_width + attention.kv_width - 2 * attention.kv_channels
    return each * len(built.twin.layers)


def test_its_logits_are_finite_and_of_order_one(built: Built) -> None:
    assert built.logits.shape == (*built.tokens.shape, built.twin.text_config["vocab_size"])
    assert built.logits.dtype == torch.float32
    assert built.logits.isfinite().all()
    assert 0.2 < built.logits.std() < 2


def test_it_is_the_same_twice(built: Built) -> None:
    again = built.logits_of(checkpoint.build(built.twin))
    assert torch.equal(again, built.logits)


def test_its_layers_are_those_of_the_twin(built: Built) -> None:
    layers = checkpoint.decoder_layers(built.model)
    assert len(layers) == len(built.twin.layers)
    assert layers[0] is next(iter(checkpoint.language_model(built.model).layers))  # type: ignore[arg-type, union-attr]


def test_every_weight_matters(built: Built) -> None:
    """What the logits would change by if a tensor were another, to the first order."""
    model = built.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not of_experts(name, parameter))
    logits = model(input_ids=built.tokens, use_cache=False).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * direction).sum().backward()
    idle = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert of_experts(name, parameter), name
            continue
        effect = float((parameter.grad * parameter.detach()).norm() / built.logits.norm())
        if name.startswith(built.twin.without or "\0"):
            assert not effect, name
        elif effect < 1e-3:
            idle.append((name, effect))
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    assert not idle


def of_experts(name: str, parameter: Tensor) -> bool:
    """Whether it holds the matrices of all experts: their gradients would take minutes."""
    return parameter.ndim == 3 and "conv" not in name


def test_every_expert_matters(built: Built) -> None:
    moe = built.plan.after.moe
    if moe is None:
        pytest.skip("no experts")
    found: dict[str, set[int]] = {}
    handles = []
    for name, module in built.model.named_modules():
        if name.endswith((".gate", ".router")) and not name.startswith(built.twin.without or "\0"):
            handles.append(
                module.register_forward_hook(chosen(found.setdefault(name, set()), moe.moe_router_topk))
            )
    built.logits_of(built.model)
    for handle in handles:
        handle.remove()
    assert found
    for name, experts in found.items():
        # 320 tokens do not find each of hundreds of experts; those that are not found are like the others.
        missed = moe.num_experts - len(experts)
        assert missed <= (0.05 * moe.num_experts if moe.num_experts >= 40 else 0), name
    for name, parameter in built.model.named_parameters():
        if of_experts(name, parameter) and not name.startswith(built.twin.without or "\0"):
            parameter.mul_(1.1)
            moved = built.moved(built.logits_of(built.model))
            parameter.div_(1.1)
            assert moved > 1e-3, name


def chosen(found: set[int], topk: int) -> Any:
    """A hook that gathers the experts that a router chose: the only whole numbers that it gives."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        given = output if isinstance(output, tuple) else (output,)
        whole = [tensor for tensor in given if isinstance(tensor, Tensor) and tensor.dtype == torch.int64]
        # Llama-4's router gives the scores of all experts, of which those not chosen are zero.
        indices = whole[0] if whole else given[0].topk(topk).indices
        found.update(indices.flatten().tolist())

    return hook


def test_expert_biases_matter(built: Built) -> None:
    for name, buffer in built.model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            kept = buffer.clone()
            buffer.zero_()
            moved = built.moved(built.logits_of(built.model))
            buffer.copy_(kept)
            assert moved > 1e-3, name


@pytest.mark.parametrize(("name", "mscale"), [("DeepSeek-V2-Lite", 0.707), ("DeepSeek-R1", 1.0)])
def test_latent_attention_has_the_publishers_scale(name: str, mscale: float) -> None:
    """Both publish a factor of 40; one of the two transformers gets right by itself."""
    facts, model = published(name)
    small = checkpoint.build(twin(facts, shrink(model, Layout())))
    correct(small, 24)
    scales = {module.scaling for module in small.modules() if hasattr(module, "kv_b_proj")}
    assert len(scales) == 1
    assert scales.pop() == pytest.approx((128 + 64) ** -0.5 * (0.1 * mscale * math.log(40) + 1) ** 2)


# ---- the settings ----

_LAYERS = "layers are chosen by the plan"
_FAR = "beyond the tokens of a test: the rotary tables are compared by themselves"
_OFF = "nothing reads it while use_sliding_window is off, or with a window longer than the tokens"
# Keys whose change moves no logit here, and why that is right.
WITHOUT_EFFECT: Mapping[str, str] = {
    "layer_types": _LAYERS,
    "first_k_dense_replace": _LAYERS,
    "interleave_moe_layer_step": "moe_layers says which",
    "max_position_embeddings": "rotary positions have no table",
    "attention_chunk_size": _FAR,
    "attn_temperature_tuning": _FAR,
    "floor_scale": _FAR,
    "attn_scale": _FAR,
    "max_window_layers": _OFF,
    "sliding_window": _OFF,
    "use_sliding_window": _OFF,
    "num_nextn_predict_layers": "multi-token prediction is no part of the logits",
    "initializer_range": "the weights are filled",
    "hidden_dropout": "acts in training only",
}
# Where one family's value of a setting that mostly shows does not.
_EXCEPTIONS = {("llama4_text", "rope_scaling.factor"): _FAR}


def other(value: Any) -> Any:
    """Another value of the same type, near enough to be a mistake; None where there is none to try."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 if value else None
    if isinstance(value, float):
        return (value * 2 if value < 1e-3 else value * 1.25) or None
    return None


def changes(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every published setting with another value, one at a time, by its name."""
    family = find_family(config)
    assert family is not None
    left = size_arguments(family).keys() | INERT_KEYS | family.unused
    left |= {"n_group", "topk_group", "n_shared_experts", "num_hidden_layers"}  # sizes too
    for key, value in config.items():
        if key in left:
            continue
        if isinstance(value, dict):
            for name, inner in value.items():
                if (said := other(inner)) is not None:
                    yield f"{key}.{name}", {key: {**value, name: said}}
        elif (said := other(value)) is not None:
            yield key, {key: said}


def with_config(made: Twin, change: Mapping[str, Any]) -> Twin:
    config = dict(made.config)
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], **change}
    return replace(made, config={**config, **({} if "text_config" in config else change)})


def test_every_published_setting_moves_the_logits_or_is_refused(
    built: Built, request: pytest.FixtureRequest
) -> None:
    if not FAMILIES[request.node.callspec.params["built"]]:
        pytest.skip("another preset of these settings is tried")
    text, still = built.twin.text_config, []
    for name, change in changes(text):
        try:
            model = checkpoint.build(with_config(built.twin, change))
        except NoTwin:
            continue  # said in words, not ignored
        moved = built.moved(built.logits_of(model))
        known = name in WITHOUT_EFFECT or (text["model_type"], name) in _EXCEPTIONS
        if moved < 2e-4 and not known:
            still.append((name, moved))
    assert not still


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("Qwen3-0.6B", {"no_such_key": 3}, "does not read no_such_key"),
        ("gpt-oss-20b", {"swiglu_limit": 9.0}, "swiglu_limit is 9.0, transformers' code of gpt_oss has 7.0"),
        ("DeepSeek-V2-Lite", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("Nemotron-H-4B-Instruct", {"tie_word_embeddings": True}, "does not tie them"),
        ("Nemotron-H-4B-Instruct", {"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_a_setting_that_transformers_ignores_is_refused(
    name: str, change: dict[str, Any], reason: str
) -> None:
    facts, model = published(name)
    with pytest.raises(NoTwin, match=re.escape(reason)):
        checkpoint.build(with_config(twin(facts, shrink(model, Layout())), change))


# ---- the checkpoint ----

# A tensor that the published checkpoint of each has, and its shape there in the twin's sizes.
NAMES = {
    "Qwen3-30B-A3B": "model.layers.1.mlp.experts.31.gate_proj.weight",
    "DeepSeek-R1": "model.layers.3.mlp.gate.e_score_correction_bias",
    "gpt-oss-20b": "model.layers.2.mlp.experts.gate_up_proj_blocks",
    "Nemotron-H-4B-Instruct": "backbone.embeddings.weight",
    "NVIDIA-Nemotron-3-Super-120B-A12B-BF16": "backbone.layers.1.mixer.experts.255.up_proj.weight",
    "Llama-4-Scout-17B-16E-Instruct": "language_model.model.layers.0.feed_forward.experts.gate_up_proj",
    "phi-4": "model.layers.0.self_attn.qkv_proj.weight",
    "Mixtral-8x7B-v0.1": "model.layers.0.block_sparse_moe.experts.7.w1.weight",
    "MiniMax-M2": "model.layers.0.block_sparse_moe.e_score_correction_bias",
    "Qwen3-Next-80B-A3B-Instruct": "model.layers.0.linear_attn.in_proj_qkvz.weight",
}


def test_the_checkpoint_has_the_published_names(built: Built, request: pytest.FixtureRequest) -> None:
    name = NAMES.get(request.node.callspec.params["built"], "model.layers.0.input_layernorm.weight")
    tensors = checkpoint.checkpoint_tensors(built.model, built.twin)
    assert name in tensors
    tied = built.twin.text_config.get("tie_word_embeddings", False)
    assert any(name.endswith("lm_head.weight") for name in tensors) is not tied


def test_transformers_reads_its_own_model_from_the_checkpoint(built: Built, tmp_path: Path) -> None:
    checkpoint.save(built.model, built.twin, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == json.loads(json.dumps(dict(built.twin.config)))
    if built.twin.architecture == "GptOssForCausalLM":
        pytest.skip("transformers reads MXFP4 with kernels for CUDA: see the test of the blocks")
    cls = type(built.model)
    config = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    read, loading = cls.from_pretrained(
        tmp_path,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **({"key_mapping": {"^language_model.": ""}} if "text_config" in written else {}),
    )
    assert not loading["unexpected_keys"]
    assert all(key.startswith(built.twin.without or "\0") for key in loading["missing_keys"])
    read.eval()
    for name, parameter in read.named_parameters():
        if name.startswith(built.twin.without or "\0"):
            nn.init.zeros_(parameter)
    # Beside ModelOpt transformers leaves buffers that no checkpoint holds as they were allocated.
    stored, unstored = built.model.state_dict(), dict(read.named_buffers())
    for name, buffer in built.model.named_buffers():
        if name not in stored:
            unstored[name].copy_(buffer)
    assert built.moved(built.logits_of(read)) < 1e-5


def test_blocks_hold_the_weights_exactly(built: Built) -> None:
    if built.twin.architecture != "GptOssForCausalLM":
        pytest.skip("not stored in MXFP4")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = checkpoint.checkpoint_tensors(built.model, built.twin)
    for name, parameter in built.model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
            assert torch.equal(hf_mxfp4.decode(blocks, scales).mT, parameter)
            assert torch.equal(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32), parameter)


# ---- MXFP4 ----


def test_mxfp4_takes_the_nearest_number() -> None:
    row = torch.linspace(-6, 6, 32)[None]
    assert torch.equal(hf_mxfp4.encode(row)[1], torch.tensor([[127]], dtype=torch.uint8))
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([-numbers.flip(0), numbers])
    read = hf_mxfp4.decode(*hf_mxfp4.encode(row))
    assert torch.equal((read - row).abs(), (grid[:, None] - row).abs().amin(0)[None])


def test_mxfp4_is_exact_for_what_it_gave() -> None:
    numbers = torch.randn(3, 8, 96, generator=torch.Generator().manual_seed(0)) * 1e-3
    read = hf_mxfp4.decode(*hf_mxfp4.encode(numbers))
    assert torch.equal(hf_mxfp4.decode(*hf_mxfp4.encode(read)), read)
    assert not torch.equal(read, numbers)


def test_mxfp4_wants_whole_blocks() -> None:
    with pytest.raises(ValueError, match="40 inputs are no whole blocks of 32"):
        hf_mxfp4.encode(torch.zeros(2, 40))
