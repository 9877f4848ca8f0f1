#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=mistralai/Mixtral-8x7B-v0.1
    TOKENIZER_MODEL=mistralai/Mixtral-8x7B-v0.1
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
    --num-layers 32 \
    --hidden-size 4096 \
    --ffn-hidden-size 14336 \
    --num-attention-heads 32 \
    --group-query-attention \
    --num-query-groups 8 \
    --kv-channels 128 \
    --disable-bias-linear \
    --swiglu \
    --normalization RMSNorm \
    --norm-epsilon 1e-5 \
    --position-embedding-type rope \
    --rotary-percent 1.0 \
    --rotary-base 1000000 \
    --max-position-embeddings 32768 \
    --seq-length 4096 \
    --padded-vocab-size 32000 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --num-experts 8 \
    --moe-router-topk 2 \
    --moe-ffn-hidden-size 14336 \
    --moe-layer-freq 1 \
    --moe-router-score-function softmax \
    --moe-router-dtype fp32 \
    --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 0.02 \
    --moe-token-dispatcher-type alltoall \
"
