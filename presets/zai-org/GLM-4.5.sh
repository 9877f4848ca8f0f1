#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=zai-org/GLM-4.5
    TOKENIZER_MODEL=zai-org/GLM-4.5
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

# The published facts are incomplete: no norm epsilon is known, so Megatron's default (1e-5) stands; the biases,
# the query and key norm, the rotary share and base are those of another project's script for the same model. The
# published multi-token prediction layer is left out.
MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --no-bias-swiglu-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --num-layers 92 \
    --hidden-size 5120 \
    --ffn-hidden-size 12288 \
    --num-attention-heads 96 \
    --group-query-attention \
    --num-query-groups 8 \
    --kv-channels 128 \
    --qk-layernorm \
    --disable-bias-linear \
    --add-qkv-bias \
    --swiglu \
    --normalization RMSNorm \
    --position-embedding-type rope \
    --rotary-percent 0.5 \
    --rotary-base 1000000 \
    --max-position-embeddings 131072 \
    --seq-length 4096 \
    --padded-vocab-size 151552 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --num-experts 160 \
    --moe-router-topk 8 \
    --moe-ffn-hidden-size 1536 \
    --moe-layer-freq ([0]*3+[1]*89) \
    --moe-router-score-function sigmoid \
    --moe-router-enable-expert-bias \
    --moe-router-topk-scaling-factor 2.5 \
    --moe-shared-expert-intermediate-size 1536 \
    --moe-router-dtype fp32 \
    --moe-router-load-balancing-type seq_aux_loss \
    --moe-aux-loss-coeff 1e-3 \
    --moe-token-dispatcher-type alltoall \
"
