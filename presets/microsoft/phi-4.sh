#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=microsoft/phi-4
    TOKENIZER_MODEL=microsoft/phi-4
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
    --num-layers 40 \
    --hidden-size 5120 \
    --ffn-hidden-size 17920 \
    --num-attention-heads 40 \
    --group-query-attention \
    --num-query-groups 10 \
    --kv-channels 128 \
    --disable-bias-linear \
    --swiglu \
    --normalization RMSNorm \
    --norm-epsilon 1e-5 \
    --position-embedding-type rope \
    --rotary-percent 1.0 \
    --rotary-base 250000 \
    --max-position-embeddings 16384 \
    --seq-length 4096 \
    --padded-vocab-size 100352 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
"
