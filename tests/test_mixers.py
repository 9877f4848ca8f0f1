"""The stand-ins for attention, Mamba and gated delta nets against their definitions, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from small_models import MODELS, model_of
from torch.nn import functional

from harness.build import build_model, transformer_config
from harness.layout import Layout
from harness.standins import installed
from harness.standins.attention import core_attention
from harness.standins.delta import causal_conv1d, l2norm
from harness.standins.linear import te_linear
from harness.standins.mamba import GatedRMSNorm, chunk_scan
from harness.standins.output import captured
from harness.trace import forward, token_ids
from harness.world import open_world

CPU = torch.device("cpu")
LENGTH, BATCH = 21, 2


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with installed(CPU), open_world(Layout(), CPU):
        yield


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


# Attention


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of [sequence, batch, heads, channels], one query at a time."""
    length, batch, heads, _ = query.shape
    shared = heads // key.shape[2]
    out = torch.empty(length, batch, heads, value.shape[-1])
    for token in range(length):
        first = 0 if window is None else max(0, token - window)
        for head in range(heads):
            keys, values = (each[first : token + 1, :, head // shared] for each in (key, value))
            scores = torch.einsum("bc,kbc->bk", query[token, :, head], keys) * scale
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].expand(batch, 1)], dim=1)
            probabilities = scores.softmax(-1)[:, : keys.shape[0]]
            out[token, :, head] = torch.einsum("bk,kbc->bc", probabilities, values)
    return out.flatten(2)


def attention_of(name: str, **channels: Any) -> Any:
    """The core attention of the first layer of a small model, in float32."""
    from megatron.core.transformer.enums import AttnMaskType

    values = dict(model_of(MODELS[name]).arguments.values)
    with captured():
        config = transformer_config(values, Layout(), CPU)
        config.bf16, config.params_dtype = False, torch.float32
        module = core_attention()(config, 1, AttnMaskType.causal, "self", **channels)
    for parameter in module.parameters():
        parameter.data.copy_(randn(*parameter.shape, seed=9))
    return module.eval()


def mask() -> torch.Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).expand(BATCH, 1, -1, -1)


def run(module: Any, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = module(*inputs, mask())
    return out


def latent_inputs() -> tuple[torch.Tensor, ...]:
    return tuple(randn(LENGTH, BATCH, 4, width, seed=width) for width in (48, 48, 64))


@pytest.mark.parametrize("scale", [None, 0.3], ids=["own-scale", "given-scale"])
def test_latent_attention_has_its_own_head_sizes_and_scale(scale: float | None) -> None:
    query, key, value = latent_inputs()
    key = key.flip(0)
    module = attention_of("latent attention", softmax_scale=scale, k_channels=48, v_channels=64)
    expected = attend(query, key, value, scale or 1 / math.sqrt(48))
    assert close(run(module, query, key, value), expected)
    assert not close(run(module, query, key, value), attend(query, key, value, 1 / math.sqrt(32)))


def grouped_inputs() -> tuple[torch.Tensor, ...]:
    return tuple(randn(LENGTH, BATCH, heads, 32, seed=seed) for seed, heads in ((1, 4), (2, 2), (3, 2)))


def test_attention_with_sinks_and_a_window() -> None:
    module = attention_of("sinks and windows")
    sinks, scale = module.softmax_offset.detach(), 1 / math.sqrt(32)
    found = run(module, *grouped_inputs())
    assert close(found, attend(*grouped_inputs(), scale, sinks, window=9))
    assert not close(found, attend(*grouped_inputs(), scale, window=9))
    assert not close(found, attend(*grouped_inputs(), scale, sinks))
    assert not close(found, attend(*grouped_inputs(), scale, sinks, window=8))


# Mamba


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence as the paper defines it, one token and one head at a time; and the last state."""
    batch, length, heads, head_dim = x.shape
    state = torch.zeros(batch, heads, head_dim, B.shape[-1])
    if initial_states is not None:
        state = initial_states.clone()
    y = torch.empty_like(x)
    for token in range(length):
        for head in range(heads):
            group = head // (heads // B.shape[2])
            step = dt[:, token, head] + (dt_bias[head] if dt_bias is not None else 0)
            step = functional.softplus(step) if dt_softplus else step
            added = torch.einsum("bp,bn->bpn", x[:, token, head], B[:, token, group])
            kept = torch.exp(step * A[head])[:, None, None] * state[:, head]
            state[:, head] = kept + step[:, None, None] * added
            out = torch.einsum("bpn,bn->bp", state[:, head], C[:, token, group])
            y[:, token, head] = out + (D[head] * x[:, token, head] if D is not None else 0)
    return (y if z is None else y * functional.silu(z)), state


def scan_inputs() -> dict[str, torch.Tensor]:
    heads, groups, head_dim, state_dim = 6, 2, 8, 5
    return {
        "x": randn(BATCH, LENGTH, heads, head_dim, seed=1),
        "dt": randn(BATCH, LENGTH, heads, seed=2),
        "A": -randn(heads, seed=3).exp(),
        "B": randn(BATCH, LENGTH, groups, state_dim, seed=4),
        "C": randn(BATCH, LENGTH, groups, state_dim, seed=5),
    }


def scan_options() -> dict[str, Any]:
    return {"D": randn(6, seed=6), "dt_bias": randn(6, seed=7), "dt_softplus": True}


def scans_alike(candidate: Callable[..., Any], chunk_size: int, **options: Any) -> bool:
    found = candidate(**scan_inputs(), chunk_size=chunk_size, **options)
    return close(found, scan(**scan_inputs(), **options)[0])


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 21, 128])
def test_chunk_scan_is_the_recurrence(chunk_size: int) -> None:
    assert scans_alike(chunk_scan, chunk_size, **scan_options())


def test_chunk_scan_with_a_gate_and_a_state_before_and_after() -> None:
    before = randn(BATCH, 6, 8, 5, seed=8)
    options = {**scan_options(), "z": randn(BATCH, LENGTH, 6, 8, seed=9), "initial_states": before}
    y, state = chunk_scan(**scan_inputs(), chunk_size=8, **options, return_final_states=True)
    expected, last = scan(**scan_inputs(), **options)
    assert close(y, expected) and close(state, last)


def test_chunk_scan_rounds_once_at_the_end() -> None:
    inputs = {name: value.bfloat16() for name, value in scan_inputs().items()}
    wide = {name: value.float() for name, value in inputs.items()}
    found = chunk_scan(**inputs, chunk_size=8, **scan_options())
    assert torch.equal(found, chunk_scan(**wide, chunk_size=8, **scan_options()).bfloat16())


WRONG_SCANS = {
    "groups in turn": lambda B, C, **rest: chunk_scan(B=B.flip(2), C=C.flip(2), **rest),
    "no skip": lambda D, **rest: chunk_scan(**rest),
    "no bias": lambda dt_bias, **rest: chunk_scan(**rest),
    "no softplus": lambda dt_softplus, **rest: chunk_scan(**rest),
    "growing state": lambda A, **rest: chunk_scan(A=-A, **rest),
    "input and output changed over": lambda B, C, **rest: chunk_scan(B=C, C=B, **rest),
}


@pytest.mark.parametrize("wrong", WRONG_SCANS.values(), ids=WRONG_SCANS.keys())
def test_another_scan_is_told_apart(wrong: Callable[..., Any]) -> None:
    assert not scans_alike(wrong, 8, **scan_options())


def gated_norm(x: torch.Tensor, z: torch.Tensor | None, weight: torch.Tensor, group: int) -> torch.Tensor:
    """RMSNorm of each group of channels, after the gate."""
    gated = x if z is None else x * functional.silu(z)
    parts = [functional.rms_norm(part, (group,), eps=1e-5) for part in gated.split(group, dim=-1)]
    return torch.cat(parts, dim=-1) * weight


def norms_alike(norm: GatedRMSNorm, *, gated: bool = True) -> bool:
    x, z = randn(LENGTH, BATCH, 24, seed=1) * 3, randn(LENGTH, BATCH, 24, seed=2)
    norm.weight.data.copy_(randn(24, seed=3))
    gate = z if gated else None
    return close(norm(x, gate).detach(), gated_norm(x, gate, norm.weight.detach(), 8))


def test_gated_norm() -> None:
    norm = GatedRMSNorm(24, group_size=8, norm_before_gate=False)
    assert norms_alike(norm)
    assert norms_alike(norm, gated=False)


@pytest.mark.parametrize(
    "wrong", [{"group_size": 12}, {"group_size": None}, {"eps": 0.1}, {"norm_before_gate": True}], ids=str
)
def test_another_gated_norm_is_told_apart(wrong: dict[str, Any]) -> None:
    assert not norms_alike(GatedRMSNorm(24, **{"group_size": 8, "norm_before_gate": False, **wrong}))


def test_gated_norm_after_which_the_gate_comes() -> None:
    x, z = randn(3, 24, seed=1), randn(3, 24, seed=2)
    norm = GatedRMSNorm(24)
    assert close(norm(x, z).detach(), functional.rms_norm(x, (24,), eps=1e-5) * functional.silu(z))


def test_the_models_norm_has_groups_and_its_gate_first() -> None:
    with captured():
        model = build_model(model_of(MODELS["Mamba and MLP"]), Layout(), CPU)
    norm = model.decoder.layers[0].mixer.norm
    assert isinstance(norm, GatedRMSNorm)
    assert (norm.group_size, norm.norm_before_gate, norm.eps) == (8 * 32 // 2, False, 1e-5)


# Gated delta nets


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """The gated delta rule of [batch, length, heads, channels], one token at a time."""
    batch, length, heads, width = q.shape
    state = torch.zeros(batch, heads, width, v.shape[-1])
    out = torch.empty_like(v)
    for token in range(length):
        state = state * g[:, token].exp()[..., None, None]
        held = torch.einsum("bhkv,bhk->bhv", state, k[:, token])
        change = (v[:, token] - held) * beta[:, token].unsqueeze(-1)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, token], change)
        out[:, token] = torch.einsum("bhkv,bhk->bhv", state, q[:, token] / math.sqrt(width))
    return out


def delta_inputs() -> dict[str, torch.Tensor]:
    heads, width, values = 3, 8, 12
    return {
        "q": l2norm(randn(BATCH, LENGTH, heads, width, seed=1)),
        "k": l2norm(randn(BATCH, LENGTH, heads, width, seed=2)),
        "v": randn(BATCH, LENGTH, heads, values, seed=3),
        "g": -randn(BATCH, LENGTH, heads, seed=4).exp() * 0.2,
        "beta": randn(BATCH, LENGTH, heads, seed=5).sigmoid(),
    }


@pytest.mark.parametrize("chunk_size", [8, 64])
def test_the_delta_rule_in_use_is_the_recurrence(chunk_size: int) -> None:
    from megatron.core.ssm.gated_delta_net import gdn

    found, _ = partial(gdn.chunk_gated_delta_rule, chunk_size=chunk_size)(**delta_inputs())
    assert close(found, delta_rule(**delta_inputs()))
    without_decay = {**delta_inputs(), "g": torch.zeros(BATCH, LENGTH, 3)}
    assert not close(found, delta_rule(**without_decay))


def test_l2norm() -> None:
    x = randn(3, 5, 8, seed=1)
    assert close(l2norm(x), functional.normalize(x, dim=-1))
    assert torch.equal(l2norm(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert l2norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_convolution(activation: str | None) -> None:
    x, weight, bias = randn(BATCH, LENGTH, 6, seed=1), randn(6, 4, seed=2), randn(6, seed=3)
    expected = torch.empty_like(x)
    for token in range(LENGTH):
        total = bias.expand(BATCH, -1).clone()
        for back in range(4):
            if token >= back:
                total += x[:, token - back] * weight[:, 3 - back]
        expected[:, token] = functional.silu(total) if activation else total
    found, state = causal_conv1d(x, weight, bias, activation=activation)
    assert close(found, expected) and state is None


def test_what_the_convolution_does_not_do_is_refused() -> None:
    x, weight = randn(1, 3, 2), randn(2, 4)
    with pytest.raises(NotImplementedError):
        causal_conv1d(x, weight, output_final_state=True)
    with pytest.raises(NotImplementedError, match="activation relu"):
        causal_conv1d(x, weight, activation="relu")


# Linears


def test_modelopt_quantizes_the_stand_in_for_te_linear_as_it_does_te_linear() -> None:
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    assert te_linear() in QuantModuleRegistry
    with captured():
        model = build_model(model_of(MODELS["Mamba and latent experts"]), Layout(), CPU)
    projection = model.decoder.layers[1].mlp.fc1_latent_proj
    assert isinstance(projection, te_linear())
    x = randn(LENGTH, BATCH, 128).bfloat16()
    out, bias = projection(x)
    assert bias is None and torch.equal(out, functional.linear(x, projection.weight))


def test_modelopt_knows_no_quantized_form_of_megatrons_plain_linear() -> None:
    """Should it learn one, latent attention's down-projections count among the matrices to quantize."""
    from megatron.core.post_training.modelopt.layers import Linear
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    assert Linear not in QuantModuleRegistry


# Whole models


@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_those_after_it_and_the_ones_before_show(name: str) -> None:
    with captured():
        model = build_model(model_of(MODELS[name]), Layout(), CPU)
        tokens = token_ids(320, 3, 24, CPU)
        changed = tokens.clone()
        changed[:, 12] = (changed[:, 12] + 1) % 320
        before, after = forward(model, tokens), forward(model, changed)
    assert torch.equal(before[:, :12], after[:, :12])
    for later in (12, 13, 15):
        assert not torch.equal(before[:, later], after[:, later])
