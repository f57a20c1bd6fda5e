#!/bin/sh
# Table 7: zero-shot accuracy of LLaMA-2 7B to 70B, pruned to 50% and 2:4 by SparseGPT and Wanda, and after SPP.
# 12 trainings; about 61 A100 GPU-hours (an estimate: see runs/paper.sh).
MODELS=${MODELS:-llama-2-7b llama-2-13b llama-2-70b}
. runs/paper.sh

prepare ${MODELS%% *}
for model in $MODELS; do
    dense $model
    for method in sparsegpt wanda; do
        for sparsity in 0.5 2:4; do
            pruned $model $method $sparsity
            tuned spp
        done
    done
done
collect 7
