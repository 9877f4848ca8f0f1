#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=nvidia/Nemotron-H-8B-Base-8K
    TOKENIZER_MODEL=nvidia/Nemotron-H-8B-Base-8K
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --export-model-type HybridModel \
    --hybrid-layer-pattern M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M- \
    --hidden-size 4096 \
    --ffn-hidden-size 21504 \
    --num-attention-heads 32 \
    --group-query-attention \
    --num-query-groups 8 \
    --kv-channels 128 \
    --mamba-num-heads 128 \
    --mamba-head-dim 64 \
    --mamba-num-groups 8 \
    --mamba-state-dim 128 \
    --disable-bias-linear \
    --squared-relu \
    --normalization RMSNorm \
    --norm-epsilon 1e-5 \
    --position-embedding-type none \
    --max-position-embeddings 8192 \
    --seq-length 4096 \
    --padded-vocab-size 131072 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
"
