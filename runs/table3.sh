#!/bin/sh
# Table 3: zero-shot accuracy and WikiText-2 perplexity of LLaMA 7B and 30B at 75% and 2:8: Wanda, DSnoT ("DST"), SPP.
# 4 trainings; about 27 A100 GPU-hours (an estimate: see runs/paper.sh).
MODELS=${MODELS:-llama-7b llama-30b}
. runs/paper.sh

prepare "${MODELS%% *}"
for model in $MODELS; do
    for sparsity in 0.75 2:8; do
        pruned "$model" wanda "$sparsity" --dsnot
        pruned "$model" wanda "$sparsity"
        tuned spp
    done
done
collect 3
