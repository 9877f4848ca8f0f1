#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=nvidia/Nemotron-H-4B-Instruct-128K
    TOKENIZER_MODEL=nvidia/Nemotron-H-4B-Instruct-128K
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

# The published facts are incomplete: no norm epsilon is known, so Megatron's default (1e-5) stands; the maximum
# length is the 128K of the published name.
MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --export-model-type HybridModel \
    --hybrid-layer-pattern M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M- \
    --hidden-size 3072 \
    --ffn-hidden-size 12288 \
    --num-attention-heads 32 \
    --group-query-attention \
    --num-query-groups 8 \
    --kv-channels 128 \
    --mamba-num-heads 112 \
    --mamba-head-dim 64 \
    --mamba-num-groups 8 \
    --mamba-state-dim 128 \
    --disable-bias-linear \
    --squared-relu \
    --normalization RMSNorm \
    --position-embedding-type none \
    --max-position-embeddings 131072 \
    --seq-length 4096 \
    --padded-vocab-size 131072 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
"
