#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=MiniMaxAI/MiniMax-M2
    TOKENIZER_MODEL=MiniMaxAI/MiniMax-M2
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

# Megatron cannot say the published query and key norm (qk_norm_type per_layer): one norm over all heads together.
# --qk-layernorm, one for every head, is the nearest, and not the same function. The published multi-token
# prediction modules (num_mtp_modules) are left out. The facts come from the config of MiniMax-M2.5, which has
# the same shape.
MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --no-bias-swiglu-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --num-layers 62 \
    --hidden-size 3072 \
    --ffn-hidden-size 1536 \
    --num-attention-heads 48 \
    --group-query-attention \
    --num-query-groups 8 \
    --kv-channels 128 \
    --qk-layernorm \
    --disable-bias-linear \
    --swiglu \
    --normalization RMSNorm \
    --norm-epsilon 1e-6 \
    --position-embedding-type rope \
    --rotary-percent 0.5 \
    --rotary-base 5000000 \
    --max-position-embeddings 196608 \
    --seq-length 4096 \
    --padded-vocab-size 200064 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --num-experts 256 \
    --moe-router-topk 8 \
    --moe-ffn-hidden-size 1536 \
    --moe-layer-freq 1 \
    --moe-router-score-function sigmoid \
    --moe-router-enable-expert-bias \
    --moe-router-dtype fp32 \
    --moe-router-load-balancing-type seq_aux_loss \
    --moe-aux-loss-coeff 1e-3 \
    --moe-token-dispatcher-type alltoall \
"
