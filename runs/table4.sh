#!/bin/sh
# Table 4: SPP with r = 4, 8 and 16, without beta, and with neither factor starting at 0; LLaMA 7B at 50% and 2:4.
# 20 trainings; about 34 A100 GPU-hours (an estimate: see runs/paper.sh).
MODELS=${MODELS:-llama-7b}
. runs/paper.sh

variants() {
    tuned spp-r4 --rank 4
    tuned spp-r8 --rank 8
    tuned spp-no_beta --no_beta
    tuned spp-zero_none --zero_init none
    tuned spp
}
table 4 "wanda sparsegpt" "2:4 0.5"
