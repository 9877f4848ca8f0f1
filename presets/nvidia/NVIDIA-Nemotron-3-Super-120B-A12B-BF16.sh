#!/bin/bash

if [ -z ${HF_MODEL_CKPT} ]; then
    HF_MODEL_CKPT=nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16
    TOKENIZER_MODEL=nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16
else
    TOKENIZER_MODEL=${HF_MODEL_CKPT}
fi

# The published multi-token prediction layers (num_nextn_predict_layers) are left out: this is the main model.
MODEL_ARGS=" \
    --save-interval 100000 \
    --micro-batch-size 1 \
    --bf16 \
    --no-masked-softmax-fusion \
    --no-rope-fusion \
    --tokenizer-type HuggingFaceTokenizer \
    --export-model-type HybridModel \
    --hybrid-layer-pattern MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME \
    --hidden-size 4096 \
    --ffn-hidden-size 2688 \
    --num-attention-heads 32 \
    --group-query-attention \
    --num-query-groups 2 \
    --kv-channels 128 \
    --mamba-num-heads 128 \
    --mamba-head-dim 64 \
    --mamba-num-groups 8 \
    --mamba-state-dim 128 \
    --disable-bias-linear \
    --squared-relu \
    --normalization RMSNorm \
    --norm-epsilon 1e-5 \
    --position-embedding-type none \
    --max-position-embeddings 262144 \
    --seq-length 4096 \
    --padded-vocab-size 131072 \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --num-experts 512 \
    --moe-router-topk 22 \
    --moe-ffn-hidden-size 2688 \
    --moe-router-score-function sigmoid \
    --moe-router-enable-expert-bias \
    --moe-router-topk-scaling-factor 5.0 \
    --moe-shared-expert-intermediate-size 5376 \
    --moe-latent-size 1024 \
    --moe-router-dtype fp32 \
    --moe-router-load-balancing-type seq_aux_loss \
    --moe-aux-loss-coeff 1e-4 \
    --moe-token-dispatcher-type alltoall \
"
