#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=Qwen/Qwen3-Coder-480B-A35B-Instruct
    TOKENIZER_MODEL=Qwen/Qwen3-Coder-480B-A35B-Instruct
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --no-bias-swiglu-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --num-layers 62 \
    --hidden-size 6144 \
    --ffn-hidden-size 8192 \
    --num-attention-heads 96 \
    --group-query-attention \
    --num-query-groups 8 \
    --kv-channels 128 \
    --qk-layernorm \
    --disable-bias-linear \
    --swiglu \
    --normalization RMSNorm \
    --norm-epsilon 1e-6 \
    --position-embedding-type rope \
    --rotary-percent 1.0 \
    --rotary-base 10000000 \
    --max-position-embeddings 262144 \
    --seq-length 4096 \
    --padded-vocab-size 151936 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --num-experts 160 \
    --moe-router-topk 8 \
    --moe-ffn-hidden-size 2560 \
    --moe-layer-freq 1 \
    --moe-router-score-function softmax \
    --moe-router-dtype fp32 \
    --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 0.0 \
    --moe-token-dispatcher-type alltoall \
"
