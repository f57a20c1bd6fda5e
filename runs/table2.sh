#!/bin/sh
# Table 2: zero-shot accuracy of LLaMA 7B to 65B, pruned to 50% and 2:4 by SparseGPT and Wanda, and after SPP.
# 16 trainings; about 104 A100 GPU-hours (an estimate: see runs/paper.sh).
# evaluate.py holds a whole model on each GPU: with GPUs of 80 GB this script stops at llama-65b. To leave it out:
#   MODELS="llama-7b llama-13b llama-30b" sh runs/table2.sh
MODELS=${MODELS:-llama-7b llama-13b llama-30b llama-65b}
. runs/paper.sh

variants() { tuned spp; }
table 2 "dense sparsegpt wanda" "0.5 2:4"
