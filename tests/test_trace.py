from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import small_models
import torch

from harness.activations import ModuleShapes, activations
from harness.architecture import Architecture, architecture
from harness.build import build_model
from harness.finding import Severity
from harness.layout import Layout
from harness.standins import installed
from harness.standins.output import captured
from harness.trace import (
    BATCH_SIZE,
    SEQUENCE_LENGTH,
    Event,
    Trace,
    check_logits,
    compare_trace,
    forward,
    recording,
    sequence_length,
    token_ids,
)
from harness.world import open_world

CPU = torch.device("cpu")
VOCABULARY = 320

COMMON = (
    "--bf16 --no-masked-softmax-fusion --disable-bias-linear --position-embedding-type rope --no-rope-fusion "
    "--normalization RMSNorm --swiglu --seq-length 64 --max-position-embeddings 96 --rotary-base 1000000 "
    "--no-bias-swiglu-fusion --padded-vocab-size 320 --num-layers 2 --hidden-size 128 --ffn-hidden-size 384 "
    "--num-attention-heads 8 --group-query-attention --num-query-groups 2 --kv-channels 32 "
)
QWEN3 = COMMON + "--untie-embeddings-and-output-weights --qk-layernorm"
MODELS = {
    **small_models.MODELS,
    "Qwen3": QWEN3,
    "Qwen2.5": COMMON + "--add-qkv-bias",
    "Qwen3-MoE": QWEN3 + " --num-experts 8 --moe-ffn-hidden-size 96 --moe-router-topk 2 "
    "--moe-router-dtype fp32 --moe-token-dispatcher-type alltoall",
    "dense-then-MoE": QWEN3 + " --num-experts 4 --moe-ffn-hidden-size 96 --moe-router-topk 2 "
    "--moe-layer-freq [0,1] --moe-shared-expert-intermediate-size 160",
    "GPT-2": "--bf16 --seq-length 64 --max-position-embeddings 96 --num-layers 2 --hidden-size 128 "
    "--num-attention-heads 8 --padded-vocab-size 320",
}


def model_of(name: str) -> Architecture:
    return small_models.model_of(MODELS[name])


def build(name: str) -> Any:
    with captured():
        return build_model(model_of(name), Layout(), CPU)


def expected(name: str) -> dict[str, ModuleShapes]:
    return activations(model_of(name), sequence_length=SEQUENCE_LENGTH, batch_size=BATCH_SIZE)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


@pytest.fixture
def tokens() -> torch.Tensor:
    return token_ids(VOCABULARY, BATCH_SIZE, SEQUENCE_LENGTH, CPU)


def run(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, Trace]:
    with captured(), recording(model) as recorder:
        logits = forward(model, tokens)
    return logits, recorder.trace()


@pytest.mark.parametrize("name", MODELS)
def test_every_module_has_the_shapes_of_the_plan(name: str, tokens: torch.Tensor) -> None:
    logits, trace = run(build(name), tokens)
    assert compare_trace(expected(name), trace) == ()
    assert check_logits(logits, tokens, VOCABULARY) == ()
    assert trace.finished and trace.stopped_in is None


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("latent attention", ["self_attention.q_layernorm", "self_attention.linear_kv_up_proj"]),
        ("Mamba and latent experts", ["mixer.norm", "mixer.in_proj", "mlp.fc2_latent_proj", "mlp.router"]),
        ("gated delta net", ["self_attention.out_norm", "self_attention.k_layernorm"]),
        ("L2 norms and no rope", ["self_attention.q_layernorm", "mlp.shared_experts.linear_fc2"]),
        ("Qwen3", ["self_attention.core_attention", "mlp.linear_fc1"]),
    ],
)
def test_every_kind_of_module_is_held_to_the_plan(
    name: str, modules: list[str], tokens: torch.Tensor
) -> None:
    """Whichever side of it the plan has wrong is found, and nothing else."""
    _, trace = run(build(name), tokens)
    for path in [path for path in expected(name) for module in modules if path.endswith(module)]:
        plan = expected(name)
        right = plan[path]
        for side in ("inputs", "outputs"):
            shapes = [list(shape) for shape in getattr(right, side)]
            for shape in shapes:
                shape[-1] += 1
                plan[path] = replace(right, **{side: tuple(map(tuple, shapes))})
                findings = compare_trace(plan, trace)
                assert findings and {finding.module for finding in findings} == {path}
                shape[-1] -= 1


def test_trace_is_in_the_order_of_the_run(tokens: torch.Tensor) -> None:
    _, trace = run(build("Qwen3"), tokens)
    order = [(event.module, event.side) for event in trace.events]
    layer = "decoder.layers.0"
    places = [
        order.index(place)
        for place in (
            ("embedding", "output"),
            (layer, "input"),
            (f"{layer}.self_attention.linear_qkv", "output"),
            (f"{layer}.self_attention.core_attention", "output"),
            (f"{layer}.mlp.linear_fc2", "output"),
            (layer, "output"),
            ("output_layer", "output"),
        )
    ]
    assert places == sorted(places)


def test_hooks_are_gone(tokens: torch.Tensor) -> None:
    model = build("Qwen3")
    run(model, tokens)
    with pytest.raises(RuntimeError, match="stop"), recording(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_first_finding_is_where_shapes_part(tokens: torch.Tensor) -> None:
    """The module gives [batch, sequence, hidden]; what follows does not fit, and Megatron raises."""
    model = build("Qwen3")
    linear = model.decoder.layers[1].self_attention.linear_proj
    linear.register_forward_hook(lambda module, args, output: (output[0].transpose(0, 1), output[1]))
    with pytest.raises(RuntimeError) as raised, captured(), recording(model) as recorder:
        forward(model, tokens)
    assert "size of tensor" in str(raised.value)
    trace = recorder.trace()
    assert not trace.finished
    assert trace.stopped_in == "decoder.layers.1"
    finding, around = compare_trace(expected("Qwen3"), trace)
    assert finding.message == (
        "layers.1.self_attention.linear_proj  output is 3 x 24 x 128, expected 24 x 3 x 128"
    )
    assert around.message == "layers.1.self_attention  output is 3 x 24 x 128, expected 24 x 3 x 128"
    assert finding.module == "decoder.layers.1.self_attention.linear_proj"
    assert (finding.expected, finding.actual) == ((24, 3, 128), (3, 24, 128))
    assert (finding.stage, finding.severity) == ("forward", Severity.ERROR)


def test_a_wrong_width_is_found_on_both_sides(tokens: torch.Tensor) -> None:
    """The plan has other query groups than the model: the first finding is the module that has them."""
    wrong = architecture(model_of("Qwen3").arguments.replaced({"num_query_groups": 4}))
    plan = activations(wrong, sequence_length=SEQUENCE_LENGTH, batch_size=BATCH_SIZE)
    _, trace = run(build("Qwen3"), tokens)
    assert [finding.message for finding in compare_trace(plan, trace)][:3] == [
        "layers.0.self_attention.linear_qkv  output is 24 x 3 x 384, expected 24 x 3 x 512",
        "layers.0.self_attention.k_layernorm  input is 24 x 3 x 2 x 32, expected 24 x 3 x 4 x 32",
        "layers.0.self_attention.k_layernorm  output is 24 x 3 x 2 x 32, expected 24 x 3 x 4 x 32",
    ]


def test_a_module_that_never_ran_is_found(tokens: torch.Tensor) -> None:
    model = build("Qwen3")
    mlp = model.decoder.layers[1].mlp
    mlp.forward = lambda hidden, **kwargs: (hidden, None)
    _, trace = run(model, tokens)
    assert [finding.message for finding in compare_trace(expected("Qwen3"), trace)] == [
        "layers.1.mlp.linear_fc1  never ran",
        "layers.1.mlp.linear_fc2  never ran",
    ]


def windowed(window: int, **changes: object) -> Architecture:
    """Sinks and windows, the window in every layer, and no experts whose choice might hide it."""
    arguments = model_of("sinks and windows").arguments
    return architecture(
        arguments.replaced(
            {
                "window_size": (window, 0),
                "window_attn_skip_freq": None,
                "num_experts": None,
                "moe_ffn_hidden_size": None,
                **changes,
            }
        )
    )


@pytest.mark.parametrize(
    ("window", "positions", "length"),
    [
        (9, 96, 24),  # the usual length reaches past it
        (127, 4096, 140),
        (499, 4096, 512),
        (500, 4096, 24),  # too far
        (4095, 131072, 24),
        (-1, 4096, 24),  # no limit
        (127, 130, 130),  # no more positions than there are
    ],
)
def test_a_sequence_reaches_past_a_short_window(window: int, positions: int, length: int) -> None:
    assert sequence_length(windowed(window, max_position_embeddings=positions)) == length


def test_a_sequence_without_a_window() -> None:
    assert sequence_length(model_of("Qwen3")) == SEQUENCE_LENGTH
    short = architecture(model_of("Qwen3").arguments.replaced({"max_position_embeddings": 16}))
    assert sequence_length(short) == 16


def test_the_window_is_as_wide_as_it_says() -> None:
    """Two layers of a window of nine: the first token shows up to the eighteenth after it, and no further."""
    with captured():
        model = build_model(windowed(9), Layout(), CPU)
        tokens = token_ids(VOCABULARY, 3, 30, CPU)
        changed = tokens.clone()
        changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
        before, after = forward(model, tokens), forward(model, changed)
    differs = (before != after).any(dim=-1).any(dim=0)
    assert differs[:10].all()
    assert differs[18] and not differs[19:].any()


def test_missing_and_further_tensors() -> None:
    plan = {"a": ModuleShapes(((2,), (3,)), ((4,),))}
    trace = Trace((Event("a", "input", ((2,),)), Event("a", "output", ((4,), (5,)))), finished=True)
    (finding,) = compare_trace(plan, trace)
    assert finding.message == "a  input 1 is missing, expected 3"


def test_tokens_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = token_ids(VOCABULARY, 8, 64, CPU, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, token_ids(VOCABULARY, 8, 64, CPU, seed=5))
    assert not torch.equal(first, token_ids(VOCABULARY, 8, 64, CPU, seed=6))
    assert first.min() >= 0 and first.max() < VOCABULARY


def test_attention_is_causal(tokens: torch.Tensor) -> None:
    model = build("Qwen3")
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCABULARY
    with captured():
        before, after = forward(model, tokens), forward(model, changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(tokens: torch.Tensor, value: float) -> None:
    logits = torch.zeros(BATCH_SIZE, SEQUENCE_LENGTH, 2)
    logits[0, 0, 0] = value
    (finding,) = check_logits(logits, tokens, 2)
    assert finding.message == "1 of 144 logits are not finite"


def test_logits_of_another_shape(tokens: torch.Tensor) -> None:
    (finding,) = check_logits(torch.zeros(SEQUENCE_LENGTH, BATCH_SIZE, 2), tokens, 2)
    assert finding.message == "logits are 24 x 3 x 2, expected 3 x 24 x 2"
    assert finding.module is None
