#!/bin/sh
# Table 2: zero-shot accuracy of LLaMA 7B to 65B, pruned to 50% and 2:4 by SparseGPT and Wanda, and after SPP.
# 16 trainings; about 104 A100 GPU-hours (an estimate: see runs/paper.sh).
MODELS=${MODELS:-llama-7b llama-13b llama-30b llama-65b}
. runs/paper.sh

variants() { tuned spp; }
table 2 "dense sparsegpt wanda" "0.5 2:4"
