#!/bin/sh
# The whole method on a world that fits a laptop: `make demo`. Every command is echoed as you would type it.
set -e
W=out/demo
rm -rf $W
run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

# a world, and a small LLaMA that knows it
run python data/tiny/prepare.py --out $W/world
run python train.py --preset demo --tokenizer $W/world/tokenizer.model --data $W/world --method full \
    --lr 8e-3 --batch_size 64 --max_tokens 8192 --epochs 2 --eval_interval 1000 --out_dir $W/dense

# what it is pruned with and fine-tuned on
run python data/c4/prepare.py --tokenizer $W/world --json $W/world/calib.jsonl --nsamples 64 --seqlen 128 --out $W/calib.npy
run python data/alpaca/prepare.py --tokenizer $W/world --json $W/world/alpaca.json --val 200 --out $W/alpaca

evaluate() {
    run python evaluate.py --ckpt $1 --tasks $W/world/samples_*.jsonl --add_bos --ppl $W/world/heldout.txt --seqlen 128 --out $2
}
evaluate $W/dense/merged.pt $W/results_dense.json
for sparsity in ${SPARSITIES:-2:4 0.75 2:8}; do
    name=wanda_$(echo $sparsity | tr : of)
    run python prune.py --ckpt $W/dense/merged.pt --method wanda --sparsity $sparsity --calib $W/calib.npy --out $W/$name.pt
    run python train.py --ckpt $W/$name.pt --data $W/alpaca --out_dir $W/$name-spp --epochs 3 --batch_size 32
    evaluate $W/$name.pt $W/results_$name.json
    evaluate $W/$name-spp/merged.pt $W/results_$name-spp.json
done
run python bench/tables.py $W/results_*.json --svg $W/demo.svg
