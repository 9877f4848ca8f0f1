"""Silent bugs: one setting of a preset changed, and parity must say which, and where it acts.

Nothing here has another shape than the published model but what says so: the importer then names the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from published import TREE

from harness.architecture import architecture
from harness.facts import facts_beside
from harness.layout import Layout
from harness.parity.stage import Parity, prove_parity
from harness.preset import PresetFile, load_preset
from harness.shrink import shrink
from harness.standins.output import captured

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Bug:
    """``cut`` in the preset's text becomes ``put``; ``flag`` is to be blamed, and ``where`` named.

    That is a part of a layer, or a tensor.
    """

    what: str
    cut: str
    put: str
    flag: str
    where: str


# By preset, one for each family and setting that it has.
BUGS: dict[str, tuple[Bug, ...]] = {
    "Qwen/Qwen3-8B": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-6",
            "--norm-epsilon 1e-5",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug("norm epsilon by default", "--norm-epsilon 1e-6", "", "--norm-epsilon", "layer 0, input norm"),
        Bug(
            "rotary base",
            "--rotary-base 1000000",
            "--rotary-base 10000",
            "--rotary-base",
            "rotary frequencies",
        ),
        Bug(
            "partial rotary",
            "--rotary-percent 1.0",
            "--rotary-percent 0.5",
            "--rotary-percent",
            "rotary frequencies",
        ),
        Bug(
            "interleaved rotary",
            "--rotary-percent 1.0",
            "--rotary-interleaved",
            "--rotary-interleaved",
            "layer 0, queries of attention",
        ),
        Bug("no qk norm", "--qk-layernorm", "", "--qk-layernorm", "model.layers.0.self_attn.k_norm.weight"),
        Bug(
            "biases",
            "--disable-bias-linear",
            "--disable-bias-linear --add-qkv-bias",
            "--add-qkv-bias",
            "model.layers.0.self_attn.q_proj.bias",
        ),
        Bug(
            "tied",
            "--untie-embeddings-and-output-weights",
            "",
            "--untie-embeddings-and-output-weights",
            "lm_head.weight",
        ),
        Bug("another gated activation", "--swiglu", "--quick-geglu", "--swiglu", "layer 0, feed-forward"),
        Bug("an activation without gates", "--swiglu", "--squared-relu", "--swiglu", "size mismatch"),
        Bug(
            "learned positions by default",
            "--position-embedding-type rope",
            "",
            "--position-embedding-type",
            "embedding.position_embeddings.weight",
        ),
        Bug(
            "no positions",
            "--position-embedding-type rope",
            "--position-embedding-type none",
            "--position-embedding-type",
            "layer 0, queries of attention",
        ),
        Bug(
            "a window",
            "--attention-dropout 0.0",
            "--attention-dropout 0.0 --window-size 15,0",
            "--window-size",
            "layer 0, attention core",
        ),
        Bug(
            "a layer without rope",
            "--attention-dropout 0.0",
            "--attention-dropout 0.0 --no-rope-freq 2",
            "--no-rope-freq",
            "layer 1, queries of attention",
        ),
        Bug(
            "norm factors less one",
            "--normalization RMSNorm",
            "--normalization RMSNorm --apply-layernorm-1p",
            "--apply-layernorm-1p",
            "layer 0, input norm",
        ),
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-6",
            "--norm-epsilon 1e-5",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug(
            "rotary base",
            "--rotary-base 1000000",
            "--rotary-base 10000",
            "--rotary-base",
            "rotary frequencies",
        ),
        Bug("no biases", "--add-qkv-bias", "", "--add-qkv-bias", "model.layers.0.self_attn.k_proj.bias"),
        Bug("a qk norm", "--add-qkv-bias", "--add-qkv-bias --qk-layernorm", "--qk-layernorm", "q_layernorm"),
        Bug(
            "tied",
            "--untie-embeddings-and-output-weights",
            "",
            "--untie-embeddings-and-output-weights",
            "lm_head.weight",
        ),
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": (
        Bug(
            "untied",
            "--padded-vocab-size 151936",
            "--padded-vocab-size 151936 --untie-embeddings-and-output-weights",
            "--untie-embeddings-and-output-weights",
            "lm_head.weight",
        ),
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-5",
            "--norm-epsilon 1e-6",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug(
            "rotary base",
            "--rotary-base 500000",
            "--rotary-base 10000",
            "--rotary-base",
            "rotary frequencies",
        ),
        Bug("no rope scaling", "--use-rope-scaling", "", "--use-rope-scaling", "rotary frequencies"),
        Bug(
            "biases",
            "--disable-bias-linear",
            "",
            "--disable-bias-linear",
            "model.layers.0.self_attn.q_proj.bias",
        ),
    ),
    "Qwen/Qwen3-30B-A3B": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-6",
            "--norm-epsilon 1e-5",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug(
            "rotary base",
            "--rotary-base 1000000",
            "--rotary-base 10000",
            "--rotary-base",
            "rotary frequencies",
        ),
        Bug("no qk norm", "--qk-layernorm", "", "--qk-layernorm", "model.layers.0.self_attn.k_norm.weight"),
        Bug(
            "softmax before top-k",
            "--moe-router-topk 8",
            "--moe-router-topk 8 --moe-router-pre-softmax",
            "--moe-router-pre-softmax",
            "layer 0, router",
        ),
        Bug(
            "scores",
            "--moe-router-score-function softmax",
            "--moe-router-score-function sigmoid",
            "--moe-router-score-function",
            "layer 0, router",
        ),
        Bug(
            "experts a token",
            "--moe-router-topk 8",
            "--moe-router-topk 4",
            "--moe-router-topk",
            "layer 0, router",
        ),
        Bug(
            "a shared expert",
            "--moe-router-topk 8",
            "--moe-router-topk 8 --moe-shared-expert-intermediate-size 768",
            "--moe-shared-expert-intermediate-size",
            "shared_experts",
        ),
        Bug(
            "which layers have experts",
            "--moe-layer-freq 1",
            "--moe-layer-freq 2",
            "--moe-layer-freq",
            "model.layers.1.mlp.gate_proj.weight",
        ),
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-6",
            "--norm-epsilon 1e-5",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug(
            "rotary base",
            "--rotary-base 10000",
            "--rotary-base 50000",
            "--rotary-base",
            "layer 0, rotary frequencies",
        ),
        Bug(
            "rope scaling factor",
            "--rotary-scaling-factor 40",
            "--rotary-scaling-factor 32",
            "--rotary-scaling-factor",
            "layer 0, rotary frequencies",
        ),
        Bug(
            "no rope scaling",
            "--rope-type yarn",
            "--rope-type rope",
            "--rope-type",
            "layer 0, rotary frequencies",
        ),
        Bug("mscale", "--mscale 0.707 ", "--mscale 1.0 ", "--mscale", "layer 0, rotary frequencies"),
        Bug(
            "attention scale",
            "--mscale 0.707 \\\n    --mscale-all-dim 0.707",
            "--mscale 1.0 --mscale-all-dim 1.0",
            "--mscale",
            "layer 0, attention core",
        ),
        Bug("renormalised", "--moe-router-pre-softmax", "", "--moe-router-pre-softmax", "layer 1, router"),
        Bug(
            "routed scaling factor",
            "--moe-router-topk-scaling-factor 1.0",
            "--moe-router-topk-scaling-factor 16.0",
            "--moe-router-topk-scaling-factor",
            "layer 1, router",
        ),
        Bug(
            "shared expert size",
            "--moe-shared-expert-intermediate-size 2816",
            "--moe-shared-expert-intermediate-size 1408",
            "--moe-shared-expert-intermediate-size",
            "size mismatch",
        ),
        Bug(
            "dense layers",
            "([0]*1+[1]*26)",
            "([0]*2+[1]*25)",
            "--moe-layer-freq",
            "model.layers.0.mlp.gate_proj.weight",
        ),
    ),
    "deepseek-ai/DeepSeek-R1": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-6",
            "--norm-epsilon 1e-5",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug(
            "rotary base",
            "--rotary-base 10000",
            "--rotary-base 50000",
            "--rotary-base",
            "layer 0, rotary frequencies",
        ),
        Bug(
            "rope scaling factor",
            "--rotary-scaling-factor 40",
            "--rotary-scaling-factor 4",
            "--rotary-scaling-factor",
            "layer 0, rotary frequencies",
        ),
        Bug(
            "attention scale",
            "--mscale 1.0 \\\n    --mscale-all-dim 1.0",
            "--mscale 0.707 --mscale-all-dim 0.707",
            "--mscale",
            "layer 0, attention core",
        ),
        Bug(
            "no expert bias",
            "--moe-router-enable-expert-bias",
            "",
            "--moe-router-enable-expert-bias",
            "model.layers.2.mlp.gate.e_score_correction_bias",
        ),
        Bug(
            "routed scaling factor",
            "--moe-router-topk-scaling-factor 2.5",
            "--moe-router-topk-scaling-factor 1.0",
            "--moe-router-topk-scaling-factor",
            "layer 2, router",
        ),
        Bug(
            "groups",
            "--moe-router-group-topk 4",
            "--moe-router-group-topk 8",
            "--moe-router-num-groups",
            "layer 2, router",
        ),
        Bug(
            "shared expert size",
            "--moe-shared-expert-intermediate-size 2048",
            "--moe-shared-expert-intermediate-size 4096",
            "--moe-shared-expert-intermediate-size",
            "size mismatch",
        ),
    ),
    "openai/gpt-oss-20b": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-5",
            "--norm-epsilon 1e-6",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug(
            "rotary base",
            "--rotary-base 150000",
            "--rotary-base 10000",
            "--rotary-base",
            "rotary frequencies",
        ),
        Bug(
            "rope scaling factor",
            "--rotary-scaling-factor 32",
            "--rotary-scaling-factor 8",
            "--rotary-scaling-factor",
            "rotary frequencies",
        ),
        Bug(
            "fast beta",
            "--yarn-beta-fast 32",
            "--yarn-beta-fast 16",
            "--yarn-beta-fast",
            "rotary frequencies",
        ),
        Bug(
            "slow beta", "--yarn-beta-slow 1", "--yarn-beta-slow 2", "--yarn-beta-slow", "rotary frequencies"
        ),
        Bug(
            "length that yarn stretches from",
            "--yarn-original-max-position-embeddings 4096",
            "--yarn-original-max-position-embeddings 131072",
            "--yarn-original-max-position-embeddings",
            "rotary frequencies",
        ),
        Bug(
            "rounded range",
            "--no-yarn-correction-range-round-to-int",
            "",
            "--no-yarn-correction-range-round-to-int",
            "rotary frequencies",
        ),
        Bug(
            "window one longer",
            "--window-size 127,0",
            "--window-size 128,0",
            "--window-size",
            "layer 0, attention core",
        ),
        Bug(
            "window one shorter",
            "--window-size 127,0",
            "--window-size 126,0",
            "--window-size",
            "layer 0, attention core",
        ),
        Bug(
            "which layers have windows",
            "--window-attn-skip-freq 2",
            "--window-attn-skip-freq ([0,1]*12)",
            "--window-attn-skip-freq",
            "layer 0, attention core",
        ),
        Bug(
            "no sinks",
            "--softmax-type learnable",
            "--softmax-type vanilla",
            "--softmax-type",
            "model.layers.0.self_attn.sinks",
        ),
        Bug(
            "sinks that are constant",
            "--softmax-type learnable",
            "--softmax-type off-by-one",
            "--softmax-type",
            "decoder.layers.0.self_attention.core_attention.softmax_offset",
        ),
        Bug(
            "clamp",
            "--activation-func-clamp-value 7.0",
            "--activation-func-clamp-value 5.0",
            "--activation-func-clamp-value",
            "layer 0, feed-forward",
        ),
        Bug(
            "no clamp",
            "--activation-func-clamp-value 7.0",
            "",
            "--activation-func-clamp-value",
            "layer 0, feed-forward",
        ),
        Bug(
            "offset of the linear half",
            "--glu-linear-offset 1.0",
            "",
            "--glu-linear-offset",
            "layer 0, feed-forward",
        ),
        Bug(
            "softmax before top-k",
            "--moe-router-topk 4",
            "--moe-router-topk 4 --moe-router-pre-softmax",
            "--moe-router-pre-softmax",
            "layer 0, router",
        ),
        Bug(
            "no biases",
            "--moe-router-topk 4",
            "--moe-router-topk 4 --disable-bias-linear",
            "--disable-bias-linear",
            "model.layers.0.mlp.router.bias",
        ),
    ),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-5",
            "--norm-epsilon 1e-6",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug("activation", "--squared-relu", "", "--squared-relu", "layer 1, feed-forward"),
        Bug(
            "Mamba norm groups",
            "--mamba-num-groups 8",
            "--mamba-num-groups 4",
            "--mamba-num-groups",
            "size mismatch",
        ),
        Bug(
            "rotary positions",
            "--position-embedding-type none",
            "--position-embedding-type rope",
            "--position-embedding-type",
            "layer 3, queries of attention",
        ),
        Bug(
            "learned positions by default",
            "--position-embedding-type none",
            "",
            "--position-embedding-type",
            "embedding.position_embeddings.weight",
        ),
        Bug(
            "routed scaling factor",
            "--moe-router-topk-scaling-factor 2.5",
            "--moe-router-topk-scaling-factor 1.0",
            "--moe-router-topk-scaling-factor",
            "layer 1, router",
        ),
        Bug(
            "no expert bias",
            "--moe-router-enable-expert-bias",
            "",
            "--moe-router-enable-expert-bias",
            "backbone.layers.1.mixer.gate.e_score_correction_bias",
        ),
        Bug(
            "shared expert size",
            "--moe-shared-expert-intermediate-size 3712",
            "--moe-shared-expert-intermediate-size 1856",
            "--moe-shared-expert-intermediate-size",
            "size mismatch",
        ),
    ),
    "nvidia/Nemotron-H-4B-Instruct": (
        Bug(
            "Mamba norm groups",
            "--mamba-num-groups 8",
            "--mamba-num-groups 4",
            "--mamba-num-groups",
            "size mismatch",
        ),
        Bug("activation", "--squared-relu", "--swiglu", "--swiglu", "size mismatch"),
        Bug(
            "rotary positions",
            "--position-embedding-type none",
            "--position-embedding-type rope",
            "--position-embedding-type",
            "layer 3, queries of attention",
        ),
    ),
    "nvidia/Nemotron-Mini-4B-Instruct": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-5",
            "--norm-epsilon 1e-6",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug(
            "partial rotary",
            "--rotary-percent 0.5",
            "--rotary-percent 1.0",
            "--rotary-percent",
            "rotary frequencies",
        ),
        Bug(
            "norm factors as they are",
            "--apply-layernorm-1p",
            "",
            "--apply-layernorm-1p",
            "layer 0, input norm",
        ),
        Bug("activation", "--squared-relu", "", "--squared-relu", "layer 0, feed-forward"),
    ),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (
        Bug(
            "norm epsilon",
            "--norm-epsilon 1e-5",
            "--norm-epsilon 1e-6",
            "--norm-epsilon",
            "layer 0, input norm",
        ),
        Bug(
            "interleaved rotary",
            "--rotary-interleaved",
            "",
            "--rotary-interleaved",
            "layer 0, queries of attention",
        ),
        Bug(
            "which layers have no rope",
            "--no-rope-freq 4",
            "",
            "--no-rope-freq",
            "layer 0, queries of attention",
        ),
        Bug("no qk norm", "--export-qk-l2-norm", "", "--export-qk-l2-norm", "layer 0, queries of attention"),
        Bug(
            "where probabilities act",
            "--export-moe-apply-probs-on-input",
            "",
            "--export-moe-apply-probs-on-input",
            "layer 0, feed-forward",
        ),
        Bug(
            "scores",
            "--moe-router-score-function sigmoid",
            "--moe-router-score-function softmax",
            "--moe-router-score-function",
            "Please use --moe-router-pre-softmax",
        ),
    ),
}


def cases() -> Iterator[object]:
    for preset, bugs in BUGS.items():
        for bug in bugs:
            yield pytest.param(preset, bug, id=f"{preset.rpartition('/')[2]}-{bug.what}")


def prove(preset: str, text: str, folder: Path) -> Parity:
    """Parity of a preset of that text with what is published for ``preset``."""
    facts, _ = facts_beside(TREE / f"{preset}.sh")
    assert facts is not None
    file = folder / f"{preset}.sh"
    file.parent.mkdir()
    file.write_text(text)
    arguments = load_preset(PresetFile(preset, file)).arguments
    assert arguments is not None
    with captured():
        return prove_parity(shrink(architecture(arguments), Layout()), facts, CPU)


@pytest.mark.parametrize(("preset", "bug"), [*cases()])
def test_a_silent_bug_is_blamed_on_its_flag_and_place(preset: str, bug: Bug, tmp_path: Path) -> None:
    text = (TREE / f"{preset}.sh").read_text()
    assert text.count(bug.cut) == 1
    parity = prove(preset, text.replace(bug.cut, bug.put), tmp_path)
    errors = [finding for finding in parity.findings if finding.is_error]
    assert not parity.passed
    assert errors, parity.limit
    assert errors[0].flag == bug.flag
    assert bug.where in errors[0].message


@pytest.mark.parametrize("preset", [preset for preset in BUGS if "Llama-4" not in preset])
def test_without_a_bug_it_passes(preset: str, tmp_path: Path) -> None:
    parity = prove(preset, (TREE / f"{preset}.sh").read_text(), tmp_path)
    assert (parity.passed, parity.limit) == (True, "")
    assert parity.relative is not None
    assert parity.relative < 1e-5
