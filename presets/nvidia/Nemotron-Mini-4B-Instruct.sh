#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=nvidia/Nemotron-Mini-4B-Instruct
    TOKENIZER_MODEL=nvidia/Nemotron-Mini-4B-Instruct
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
    --num-layers 32 \
    --hidden-size 3072 \
    --ffn-hidden-size 9216 \
    --num-attention-heads 24 \
    --group-query-attention \
    --num-query-groups 8 \
    --kv-channels 128 \
    --disable-bias-linear \
    --squared-relu \
    --normalization LayerNorm \
    --apply-layernorm-1p \
    --norm-epsilon 1e-5 \
    --position-embedding-type rope \
    --rotary-percent 0.5 \
    --rotary-base 10000 \
    --max-position-embeddings 4096 \
    --seq-length 4096 \
    --padded-vocab-size 256000 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
"
