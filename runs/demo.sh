#!/bin/sh
# The whole method on a world that fits a laptop. Every command is echoed as you would type it.
#   make demo        Wanda and SparseGPT at four sparsities, SPP after each; minutes on two cores
#   make demo-full   three worlds, every way to fine-tune; about 45 minutes of one core; a killed run goes on
# Both write to out/ in the current folder. Ctrl-C ends everything at once.
set -e
case $1 in
"" | full) ;;
*)
    echo "usage: sh $0 [full]" >&2
    exit 2
    ;;
esac

# The work is done by this script once more, in a process group of its own that is killed as a whole when this one ends,
# in whatever way: nothing goes on in the background.
if [ "$2" != group ]; then
    trap 'kill -s KILL -- "-$!" "$!" 2> /dev/null || :' EXIT # $! too, in case it has no group yet
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    setsid sh "$0" "$1" group &
    wait $!
    exit
fi

mkdir -p out
exec 9> out/.demo.lock # and every command below holds it too, until all have ended
if ! flock -w 2 9; then # in two seconds what was killed has ended
    echo "$0: error: another demo is at work in out/" >&2
    exit 1
fi
export OMP_NUM_THREADS=1 # threads of one process wait for each other: two processes use two cores better
run() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

# fresh FOLDER: removes what an earlier demo left there, and nothing else
fresh() {
    if [ -e "$1" ] && ! [ -e "$1/made_by_demo" ]; then
        echo "$0: error: $1 is there, and no demo made it: move it out of the way" >&2
        exit 1
    fi
    mkdir -p "$1"
    touch "$1/made_by_demo"
    (cd "$1" && rm -rf world calib.npy alpaca dense wanda_* sparsegpt* results_* recovered.*)
}

# world SEED: a world, and a small LLaMA that knows it; what it is pruned with and fine-tuned on
world() {
    fresh "$W"
    run python data/tiny/prepare.py --seed "$1" --out "$W/world"
    run python data/c4/prepare.py --tokenizer "$W/world" --json "$W/world/calib.jsonl" --nsamples 64 --seqlen 128 --out "$W/calib.npy"
    run python data/alpaca/prepare.py --tokenizer "$W/world" --json "$W/world/alpaca.json" --val 200 --out "$W/alpaca"
    run python train.py --preset demo --tokenizer "$W/world/tokenizer.model" --data "$W/world" --method full --seed "$1" \
        --lr 8e-3 --batch_size 16 --max_tokens 4096 --epochs 1 --eval_interval 500 --save_interval 1000 --out_dir "$W/dense"
    evaluate "$W/dense/merged.pt" dense
}

# evaluate CHECKPOINT NAME
evaluate() {
    run python evaluate.py --ckpt "$1" --tasks "$W"/world/samples_*.jsonl --add_bos --ppl "$W/world/heldout.txt" --seqlen 128 \
        --out "$W/results_$2.json"
}

# prune METHOD SPARSITY: sets $name, such as wanda_2of8
prune() {
    name=$1_$(echo "$2" | sed s/:/of/)
    [ -e "$W/results_$name.json" ] && return
    run python prune.py --ckpt "$W/dense/merged.pt" --method "$1" --sparsity "$2" --calib "$W/calib.npy" --out "$W/$name.pt"
    evaluate "$W/$name.pt" "$name"
}

# tune SEED METHOD LR [FLAG ...]: fine-tunes $name
tune() {
    seed=$1 tuned=$name-$2 method=$2 lr=$3
    shift 3
    [ -e "$W/results_$tuned.json" ] && return
    run python train.py --ckpt "$W/$name.pt" --data "$W/alpaca" --method "$method" --lr "$lr" --batch_size 16 --epochs 1 \
        --seed "$seed" "$@" --out_dir "$W/$tuned"
    evaluate "$W/$tuned/merged.pt" "$tuned"
}

# The learning rates: for each method the best of two to four at 2:8 in world 0.
SPP=4e-2 LORA=1e-2 MASKED=8e-3 DYNAMIC=4e-3
if [ "$1" = full ]; then
    for seed in 0 1 2; do
        W=out/full/seed$seed
        [ -e "$W/results_dense.json" ] || world "$seed"
        for sparsity in 0.5 2:4 0.75 2:8; do
            case $sparsity in
            0.5 | 2:4) high='' interval=200 ;;
            *) high=1 interval=20 ;;
            esac
            prune wanda "$sparsity"
            tune "$seed" spp "$SPP" --eval_interval "$interval" --resume
            tune "$seed" lora "$LORA" --rank 8 --eval_interval "$interval" --resume
            if [ "$high" ]; then
                tune "$seed" masked "$MASKED" --eval_interval "$interval" --resume
                tune "$seed" masked_lora "$LORA" --rank 8 --eval_interval "$interval" --resume
                tune "$seed" dynamic "$DYNAMIC" --sparsity "$sparsity" --eval_interval "$interval" --resume
            fi
            prune sparsegpt "$sparsity"
            tune "$seed" spp "$SPP" --resume
            [ ! "$high" ] || tune "$seed" lora "$LORA" --rank 8 --resume
        done
    done
    run python bench/tables.py out/full/seed*/results_*.json --save out/full/demo-full.json
    run python bench/tables.py out/full/demo-full.json --recovered out/full/recovered.svg --losses out/full/losses.svg
    exit
fi

# chain METHOD: prunes with it at every sparsity, SPP after each
chain() {
    for sparsity in 0.5 2:4 0.75 2:8; do
        prune "$1" "$sparsity"
        tune 0 spp "$SPP"
    done
}

W=out/demo
world 0
printf '\nSparseGPT goes through the same steps as Wanda on the other core; its output is in %s/sparsegpt.log\n' "$W"
chain sparsegpt > "$W/sparsegpt.log" 2>&1 &
chain wanda
printf '\nwaiting for SparseGPT\n'
if ! wait $!; then
    cat "$W/sparsegpt.log"
    exit 1
fi
grep '\$ python' "$W/sparsegpt.log"
run python bench/tables.py "$W"/results_*.json --recovered "$W/recovered.svg"
cat <<'END'

With a real LLaMA it is the same (the data first: see the README):
  python prune.py --ckpt llama-2-7b --method wanda --sparsity 2:8 --calib data/c4/calib.npy --out pruned.pt
  torchrun --nproc_per_node=8 train.py --ckpt pruned.pt --data data/alpaca --out_dir out/spp
  python evaluate.py --ckpt out/spp/merged.pt --tasks data/lm_eval/samples_*.jsonl --ppl data/wikitext2_test.txt --out out/results.json
END
