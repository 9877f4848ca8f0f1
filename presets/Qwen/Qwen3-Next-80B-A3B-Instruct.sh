#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=Qwen/Qwen3-Next-80B-A3B-Instruct
    TOKENIZER_MODEL=Qwen/Qwen3-Next-80B-A3B-Instruct
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

# A hybrid model, since ModelOpt's layers of a GPT model have no gated delta nets: two symbols for each of the 48
# published layers. The published multi-token prediction layer is left out.
MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --no-bias-swiglu-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --export-model-type HybridModel \
    --hybrid-layer-pattern GEGEGE*EGEGEGE*EGEGEGE*EGEGEGE*EGEGEGE*EGEGEGE*EGEGEGE*EGEGEGE*EGEGEGE*EGEGEGE*EGEGEGE*EGEGEGE*E \
    --hidden-size 2048 \
    --ffn-hidden-size 5120 \
    --num-attention-heads 16 \
    --group-query-attention \
    --num-query-groups 2 \
    --kv-channels 256 \
    --qk-layernorm \
    --attention-output-gate \
    --linear-conv-kernel-dim 4 \
    --linear-num-key-heads 16 \
    --linear-key-head-dim 128 \
    --linear-num-value-heads 32 \
    --linear-value-head-dim 128 \
    --disable-bias-linear \
    --swiglu \
    --normalization RMSNorm \
    --apply-layernorm-1p \
    --norm-epsilon 1e-6 \
    --position-embedding-type rope \
    --rotary-percent 0.25 \
    --rotary-base 10000000 \
    --max-position-embeddings 262144 \
    --seq-length 4096 \
    --padded-vocab-size 151936 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --num-experts 512 \
    --moe-router-topk 10 \
    --moe-ffn-hidden-size 512 \
    --moe-router-score-function softmax \
    --moe-shared-expert-intermediate-size 512 \
    --moe-shared-expert-gate \
    --moe-router-dtype fp32 \
    --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 1e-3 \
    --moe-token-dispatcher-type alltoall \
"
