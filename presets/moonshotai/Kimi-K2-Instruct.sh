#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=moonshotai/Kimi-K2-Instruct
    TOKENIZER_MODEL=moonshotai/Kimi-K2-Instruct
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

# Not said: the published YaRN beta_fast of 1. Megatron's latent attention always takes 32, its config's own
# default, and reads no flag for it.
MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --no-bias-swiglu-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --num-layers 61 \
    --hidden-size 7168 \
    --ffn-hidden-size 18432 \
    --num-attention-heads 64 \
    --multi-latent-attention \
    --q-lora-rank 1536 \
    --kv-lora-rank 512 \
    --qk-head-dim 128 \
    --qk-pos-emb-head-dim 64 \
    --v-head-dim 128 \
    --qk-layernorm \
    --disable-bias-linear \
    --swiglu \
    --normalization RMSNorm \
    --norm-epsilon 1e-6 \
    --position-embedding-type rope \
    --rope-type yarn \
    --rotary-base 50000 \
    --rotary-scaling-factor 32 \
    --mscale 1.0 \
    --mscale-all-dim 1.0 \
    --max-position-embeddings 131072 \
    --seq-length 4096 \
    --padded-vocab-size 163840 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --num-experts 384 \
    --moe-router-topk 8 \
    --moe-ffn-hidden-size 2048 \
    --moe-layer-freq ([0]*1+[1]*60) \
    --moe-router-score-function sigmoid \
    --moe-router-enable-expert-bias \
    --moe-router-topk-scaling-factor 2.827 \
    --moe-shared-expert-intermediate-size 2048 \
    --moe-router-dtype fp32 \
    --moe-router-load-balancing-type seq_aux_loss \
    --moe-aux-loss-coeff 1e-3 \
    --moe-token-dispatcher-type alltoall \
"
