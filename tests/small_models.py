"""Small models of every kind of layer, as flags: what the tests of the torch side build."""

from __future__ import annotations

from harness.architecture import Architecture, architecture
from harness.arguments import resolve
from harness.flags import parse_flags
from harness.shell import Word

_ANY_NORM = (
    "--bf16 --no-masked-softmax-fusion --no-rope-fusion --seq-length 64 --max-position-embeddings 96 "
    "--hidden-size 128 --num-attention-heads 4 --padded-vocab-size 320 "
    "--untie-embeddings-and-output-weights "
)
_BASE = _ANY_NORM + "--normalization RMSNorm "
_NO_BIAS = _BASE + "--disable-bias-linear "
_GATED = _NO_BIAS + "--swiglu --no-bias-swiglu-fusion "
_EXPERTS = (
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 128 --moe-router-dtype fp32 "
    "--moe-token-dispatcher-type alltoall "
)
_LATENT = (
    "--multi-latent-attention --kv-lora-rank 64 --qk-head-dim 32 --qk-pos-emb-head-dim 16 --v-head-dim 64 "
    "--qk-layernorm --position-embedding-type rope --rope-type yarn --rotary-scaling-factor 40 "
    "--mscale 0.7 --mscale-all-dim 0.7 --ffn-hidden-size 256 --num-layers 2 "
)
_HYBRID = "--export-model-type HybridModel --position-embedding-type none --ffn-hidden-size 256 "
_MAMBA = "--mamba-num-heads 8 --mamba-head-dim 32 --mamba-num-groups 2 --mamba-state-dim 16 "
_GROUPS = "--group-query-attention --num-query-groups 2 --kv-channels 32 "

MODELS: dict[str, str] = {
    "latent attention": _GATED
    + _LATENT
    + _EXPERTS
    + "--q-lora-rank 96 --moe-layer-freq [0,1] --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-num-groups 4 --moe-router-group-topk 2 "
    "--moe-router-topk-scaling-factor 2.5 --moe-shared-expert-intermediate-size 160",
    "latent attention without query latent": _GATED
    + _LATENT
    + _EXPERTS
    + "--moe-layer-freq [0,1] --moe-router-pre-softmax --moe-shared-expert-intermediate-size 256",
    # Biases everywhere, sinks, a window in every second layer, a clamped and shifted gated activation.
    "sinks and windows": _BASE
    + _GROUPS
    + _EXPERTS
    + "--num-layers 2 --ffn-hidden-size 128 --softmax-type learnable --window-size 9,0 "
    "--window-attn-skip-freq 2 --quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0 "
    "--position-embedding-type yarn --rotary-scaling-factor 32 --no-bias-gelu-fusion "
    "--yarn-original-max-position-embeddings 4096 --mscale 1.0 --mscale-all-dim 0.0",
    # L2 norms, interleaved rope that one layer skips, top-1 of experts whose probabilities come first.
    "L2 norms and no rope": _GATED
    + _GROUPS
    + "--num-layers 4 --ffn-hidden-size 256 --position-embedding-type rope --rotary-interleaved "
    "--no-rope-freq 4 --export-qk-l2-norm --num-experts 4 --moe-router-topk 1 --moe-ffn-hidden-size 128 "
    "--moe-layer-freq [0,1,0,1] --moe-router-score-function sigmoid --export-moe-apply-probs-on-input "
    "--moe-shared-expert-intermediate-size 128 --moe-router-dtype fp32 "
    "--moe-token-dispatcher-type alltoall",
    "Mamba and latent experts": _NO_BIAS
    + _GROUPS
    + _HYBRID
    + _MAMBA
    + _EXPERTS
    + "--hybrid-layer-pattern ME*E --squared-relu --moe-latent-size 64 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-topk-scaling-factor 5.0 "
    "--moe-shared-expert-intermediate-size 256",
    "Mamba and MLP": _NO_BIAS + _GROUPS + _HYBRID + _MAMBA + "--hybrid-layer-pattern M-M*- --squared-relu",
    # Query and key norms, an output gate, a gated shared expert, norm factors stored less one.
    "gated delta net": _GATED
    + _GROUPS
    + _EXPERTS
    + "--export-model-type HybridModel --hybrid-layer-pattern GE*E --qk-layernorm --attention-output-gate "
    "--linear-conv-kernel-dim 4 --linear-num-key-heads 2 --linear-key-head-dim 32 "
    "--linear-num-value-heads 4 --linear-value-head-dim 48 --apply-layernorm-1p --ffn-hidden-size 256 "
    "--position-embedding-type rope --rotary-percent 0.25 --moe-shared-expert-intermediate-size 128 "
    "--moe-shared-expert-gate",
    "LayerNorm less one": _ANY_NORM
    + _GROUPS
    + "--disable-bias-linear --num-layers 2 --ffn-hidden-size 384 --normalization LayerNorm "
    "--apply-layernorm-1p --squared-relu --position-embedding-type rope --rotary-percent 0.5",
    "hybrid with LayerNorm and biases": _ANY_NORM
    + _GROUPS
    + _HYBRID
    + _MAMBA
    + "--hybrid-layer-pattern M*- --normalization LayerNorm",
}


def model_of(flags: str) -> Architecture:
    """The architecture of ``flags``, none of which may be wrong."""
    parsed, wrong = parse_flags([Word(word, 1, 1, False) for word in flags.split()])
    arguments, refused = resolve(parsed)
    errors = [finding.message for finding in (*wrong, *refused) if finding.is_error]
    assert not errors, errors
    return architecture(arguments)


# The plainest of all: grouped attention with a gated layer after it, and with experts in its place.
DENSE = _GATED + _GROUPS + "--num-layers 2 --ffn-hidden-size 256 --position-embedding-type rope "
SPARSE = DENSE + _EXPERTS
