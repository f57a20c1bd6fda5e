#!/bin/sh
# Table 5: LoRA* (r = 8, merged under Wanda's mask) against SPP, LLaMA 7B and 30B at 75% and 2:8.
# SPP's models are those of Table 3. 8 trainings; about 45 A100 GPU-hours (an estimate: see runs/paper.sh).
MODELS=${MODELS:-llama-7b llama-30b}
. runs/paper.sh

variants() {
    tuned lora --method lora --rank 8
    tuned spp
}
table 5 wanda "0.75 2:8"
