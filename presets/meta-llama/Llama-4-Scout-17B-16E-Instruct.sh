#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=meta-llama/Llama-4-Scout-17B-16E-Instruct
    TOKENIZER_MODEL=meta-llama/Llama-4-Scout-17B-16E-Instruct
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

# The language model alone, without the vision encoder. Megatron-LM's ModelOpt builder cannot say:
# - the published rope scaling: it always takes factor 8 with low and high frequency factors 1 and 4, where 16,
#   1 and 1 are published;
# - the L2 norm of queries and keys on the layers with rotary positions alone: it norms them on every layer;
# - the published chunked attention (attention_chunk_size 8192) and the temperature by position of the layers
#   without rotary positions: both change nothing below 8192 tokens.
MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --no-bias-swiglu-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --num-layers 48 \
    --hidden-size 5120 \
    --ffn-hidden-size 16384 \
    --num-attention-heads 40 \
    --group-query-attention \
    --num-query-groups 8 \
    --kv-channels 128 \
    --export-qk-l2-norm \
    --disable-bias-linear \
    --swiglu \
    --normalization RMSNorm \
    --norm-epsilon 1e-5 \
    --position-embedding-type rope \
    --rotary-percent 1.0 \
    --rotary-base 500000 \
    --rotary-interleaved \
    --use-rope-scaling \
    --rope-scaling-factor 16.0 \
    --no-rope-freq 4 \
    --max-position-embeddings 10485760 \
    --seq-length 4096 \
    --padded-vocab-size 202048 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --num-experts 16 \
    --moe-router-topk 1 \
    --moe-ffn-hidden-size 8192 \
    --moe-layer-freq 1 \
    --moe-router-score-function sigmoid \
    --export-moe-apply-probs-on-input \
    --moe-shared-expert-intermediate-size 8192 \
    --moe-router-dtype fp32 \
    --moe-router-load-balancing-type seq_aux_loss \
    --moe-aux-loss-coeff 1e-3 \
    --moe-token-dispatcher-type alltoall \
"
