#!/bin/sh
# Table 8: what starts at 0 (neither factor, alpha, or beta, the default); LLaMA 7B at 50% and 2:4.
# Shares two of three models with Table 4. 12 trainings; about 20 A100 GPU-hours (an estimate: see runs/paper.sh).
MODELS=${MODELS:-llama-7b}
. runs/paper.sh

variants() {
    tuned spp-zero_none --zero_init none
    tuned spp-zero_alpha --zero_init alpha
    tuned spp
}
table 8 "wanda sparsegpt" "2:4 0.5"
