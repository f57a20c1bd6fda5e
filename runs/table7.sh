#!/bin/sh
# Table 7: zero-shot accuracy of LLaMA-2 7B to 70B, pruned to 50% and 2:4 by SparseGPT and Wanda, and after SPP.
# 12 trainings; about 61 A100 GPU-hours (an estimate: see runs/paper.sh).
MODELS=${MODELS:-llama-2-7b llama-2-13b llama-2-70b}
. runs/paper.sh

variants() { tuned spp; }
table 7 "dense sparsegpt wanda" "0.5 2:4"
