#!/bin/sh
# Everything that wants a GPU, on one, in about 25 minutes of an H100 (an estimate): what is right first, then what is fast.
#   sh runs/gpu.sh | tee gpu.txt
set -e
run() { printf '\n$ %s\n' "$*"; "$@"; }
run python -m pytest -q tests/test_cuda.py
run python bench/linear.py --device cuda --dtype bfloat16
run python bench/step.py --device cuda --dtype bfloat16
run python bench/step.py --device cuda --dtype bfloat16 --activation_checkpointing --compile --forms fused lora
run python bench/prune.py --device cuda --dtype bfloat16
run python bench/inference.py
run sh runs/demo.sh # pretrains, prunes, fine-tunes, merges and evaluates, all of it on the GPU
