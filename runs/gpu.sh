#!/bin/sh
# Everything that wants a GPU, on one of 80 GB, in about 25 minutes of an H100 (an estimate): what is right first, then what
# is fast. It goes on after a failure, and says at the end what has failed. It takes requirements-dev.txt, and torch for CUDA.
#   sh runs/gpu.sh | tee gpu.txt
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python} failed=
run() {
    printf '\n$ %s\n' "$*"
    "$@" || failed="$failed
  $*"
}
run "$PYTHON" -m pytest -q tests/test_cuda.py
run "$PYTHON" bench/linear.py --device cuda --dtype bfloat16
run "$PYTHON" bench/step.py --device cuda --dtype bfloat16 --forms fused packed lora chunked repeat
run "$PYTHON" bench/step.py --device cuda --dtype bfloat16 --activation_checkpointing --compile --forms fused lora
run "$PYTHON" bench/prune.py --device cuda --dtype bfloat16
run "$PYTHON" bench/inference.py
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" run sh runs/demo.sh # pretrains, prunes, fine-tunes, merges, evaluates
[ -z "$failed" ] || { echo "failed:$failed" && exit 1; }
