#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=openai/gpt-oss-120b
    TOKENIZER_MODEL=openai/gpt-oss-120b
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

# YaRN by its own flags: --enable-gpt-oss fixes the length it stretches from at 131072, where 4096 is published, and
# beside it Megatron's default position embedding would add a learned table.
MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --no-bias-gelu-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --num-layers 36 \
    --hidden-size 2880 \
    --ffn-hidden-size 2880 \
    --num-attention-heads 64 \
    --group-query-attention \
    --num-query-groups 8 \
    --kv-channels 64 \
    --softmax-type learnable \
    --window-size 127,0 \
    --window-attn-skip-freq 2 \
    --quick-geglu \
    --glu-linear-offset 1.0 \
    --activation-func-clamp-value 7.0 \
    --normalization RMSNorm \
    --norm-epsilon 1e-5 \
    --position-embedding-type yarn \
    --rotary-percent 1.0 \
    --rotary-base 150000 \
    --rotary-scaling-factor 32 \
    --yarn-original-max-position-embeddings 4096 \
    --yarn-beta-fast 32 \
    --yarn-beta-slow 1 \
    --no-yarn-correction-range-round-to-int \
    --mscale 1.0 \
    --mscale-all-dim 0.0 \
    --max-position-embeddings 131072 \
    --seq-length 4096 \
    --padded-vocab-size 201088 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --num-experts 128 \
    --moe-router-topk 4 \
    --moe-ffn-hidden-size 2880 \
    --moe-layer-freq 1 \
    --moe-router-score-function softmax \
    --moe-router-dtype fp32 \
    --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 0.0 \
    --moe-token-dispatcher-type alltoall \
"
