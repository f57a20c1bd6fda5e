#!/bin/sh
# Table 6: 5-shot MMLU of LLaMA 7B to 65B and LLaMA-2 7B to 70B, pruned to 50% and 2:4 by SparseGPT and Wanda, and after SPP.
# The models are those of Tables 2 and 7: what their scripts have trained is not trained again. 28 trainings; about 159
# A100 GPU-hours (an estimate: see runs/paper.sh).
MODELS=${MODELS:-llama-7b llama-13b llama-30b llama-65b llama-2-7b llama-2-13b llama-2-70b}
MMLU=1
. runs/paper.sh

variants() { tuned spp; }
table 6 "dense sparsegpt wanda" "0.5 2:4"
