#!/bin/sh
# SmolLM2-135M through the whole chain: Wanda and SparseGPT, after each SPP, at 75% and 2:4 LoRA* and training all survivors
# too, and what every model is worth then. What exists is not made again: a killed script goes on when it is started again.
#
#   sh runs/smollm2.sh SmolLM2-135M-Instruct        # 84 steps of 4 examples, 200 documents of each task
#   sh runs/smollm2.sh SmolLM2-135M-Instruct full   # three seeds, a whole epoch, all documents and text
#   sh runs/smollm2.sh SmolLM2-135M-Instruct search # the learning rates below: two for each method, on one cell
#   SEEDS="1 2" sh runs/smollm2.sh SmolLM2-135M-Instruct # more seeds of the short form
#   ALPACA=alpaca.json C4=c4.json.gz TASKS=tasks WIKITEXT=wiki.test.raw sh runs/smollm2.sh SmolLM2-135M-Instruct
#
# The first argument is a Hugging Face directory. Without ALPACA and C4 their files are downloaded; tasks are taken from the
# folder TASKS, and downloaded where they are not there; WIKITEXT is WikiText-2's test set as one file (see the README).
# Results go to OUT, out/smollm2-short or out/smollm2-full by default. A GPU is used where there is one. The cells of 75% and
# 2:4 come first; what there is when the script is stopped, bench/tables.py lays out: results_*.json.
#
# On one core of a 2-core CPU a fine-tuning of the short form takes 10 to 15 minutes and an evaluation 3, and so all of it
# about six hours, the search less than one. The rates come from earlier tries, with another tokenizer, of two or three
# for each method at Wanda 0.75, LoRA's in 21 steps of 16. The search is of 42 steps of 4, with a seed that no row of the
# table has; what it found is assets/smollm2_search.txt.
seeds=${SEEDS:-0} nsamples=24 seqlen=512 steps=84 interval=21 documents=200 lines=220 size=short
# 220 lines: 60,000 characters
case "$# $2" in
"1 ") ;;
"2 full") size=full seeds="0 1 2" nsamples=128 seqlen=2048 steps='' interval=50 documents='' lines='' ;;
"2 search") steps=42 interval=42 seeds=7 ;;
*)
    echo "usage: [ALPACA=FILE] [C4=FILE] [TASKS=data/lm_eval] [WIKITEXT=FILE] [OUT=DIR] sh $0 DIR [full | search]" >&2
    exit 2
    ;;
esac
mode=$2
dense=$1 OUT=${OUT:-out/smollm2-$size}
set -- # the arguments are read, and runs/paper.sh has its own
. runs/paper.sh

# part LINES FILE OUT: the first lines of a file, or all; whole under its name or not there
part() {
    there "$3" && return
    if [ "$1" ]; then
        head -n "$1" "$2" > "$3.tmp"
    else
        cp "$2" "$3.tmp"
    fi
    mv "$3.tmp" "$3"
}

# evaluate CHECKPOINT FILE
evaluate() {
    there "$OUT/$2.json" ||
        run "$PYTHON" evaluate.py --ckpt "$1" --tasks "$OUT"/samples_*.jsonl --ppl "$OUT/wikitext2.txt" --seqlen 512 \
            --out "$OUT/$2.json"
}

# prune METHOD SPARSITY: sets $name
prune() {
    name=$1_$(echo "$2" | sed s/:/of/)
    there "$OUT/$name.pt" ||
        run "$PYTHON" prune.py --ckpt "$dense" --method "$1" --sparsity "$2" --calib "$OUT/calib.npy" --out "$OUT/$name.pt"
}

# tune METHOD LR TO [FLAG ...]: fine-tunes $name with the seed $seed
tune() {
    method=$1 lr=$2 to=$3
    shift 3
    case $method in
    lora) set -- --rank 8 "$@" ;;
    spp64) method=spp && set -- --rank 64 "$@" ;;
    esac
    there "$to/merged.pt" ||
        run "$PYTHON" train.py --ckpt "$OUT/$name.pt" --data "$OUT/alpaca" --method "$method" --lr "$lr" --seed "$seed" \
            --batch_size 4 --epochs "$epochs" "$@" --resume --out_dir "$to"
}

mkdir -p "$OUT"
part "$lines" "$WIKITEXT" "$OUT/wikitext2.txt"
for task in arc_easy openbookqa winogrande; do
    there "$TASKS/samples_$task.jsonl" || run "$PYTHON" data/lm_eval/prepare.py --task "$task" --out "$TASKS"
    part "$documents" "$TASKS/samples_$task.jsonl" "$OUT/samples_$task.jsonl"
done
there "$OUT/calib.npy" ||
    run "$PYTHON" data/c4/prepare.py --tokenizer "$dense" ${C4:+--json "$C4"} --nsamples "$nsamples" --seqlen "$seqlen" \
        --out "$OUT/calib.npy"
there "$OUT/alpaca/meta.json" ||
    run "$PYTHON" data/alpaca/prepare.py --tokenizer "$dense" ${ALPACA:+--json "$ALPACA"} --val 100 --max_len 256 \
        --out "$OUT/alpaca"
epochs=1
if [ "$steps" ]; then # as a share of the examples that there are
    examples=$(sed -n 's/.*"train": \([0-9]*\).*/\1/p' "$OUT/alpaca/meta.json")
    epochs=$(awk "BEGIN { print $steps / int(($examples + 3) / 4) }")
fi

if [ "$mode" = search ]; then
    seed=$seeds
    prune wanda 0.75
    rm -f "$OUT/search.txt.tmp"
    for cell in spp:3e-2 spp:6e-2 lora:5e-3 lora:1e-2 masked:1e-3 masked:2e-3; do
        to=$OUT/search/${cell%:*}-${cell#*:}
        tune "${cell%:*}" "${cell#*:}" "$to" --eval_interval "$interval"
        loss=$(sed -n 's/.*"val_loss": \([0-9.]*\).*/\1/p' "$to/log.jsonl" | tail -n 1) # that of the last step
        echo "${cell%:*} ${cell#*:} $loss" >> "$OUT/search.txt.tmp"
    done
    mv "$OUT/search.txt.tmp" "$OUT/search.txt"
    cat "$OUT/search.txt"
    exit
fi

# cells SPARSITY METHOD:LR ...: the sparsity by both pruners, and each method after both
cells() {
    sparsity=$1
    shift
    for pruner in wanda sparsegpt; do
        prune "$pruner" "$sparsity"
        evaluate "$OUT/$name.pt" "results_$name"
        for seed in $seeds; do
            for cell; do
                tuned=$name-${cell%:*}-$seed
                tune "${cell%:*}" "${cell#*:}" "$OUT/$tuned" --eval_interval "$interval" --save_interval 28
                evaluate "$OUT/$tuned/merged.pt" "results_$tuned"
            done
        done
    done
}
evaluate "$dense" results_dense
cells 0.75 spp:3e-2 lora:5e-3 masked:2e-3
cells 2:4 spp:3e-2 lora:5e-3 masked:2e-3
cells 0.5 spp:3e-2
cells 2:8 spp:3e-2
cells 0.75 spp64:4e-2
# Two of them with packed weights: no rows of the table, since they should give what the same cells gave without.
name=wanda_2of4 seed=0
for cell in spp:3e-2 masked:2e-3; do
    tuned=$name-${cell%:*}-0-packed
    tune "${cell%:*}" "${cell#*:}" "$OUT/$tuned" --eval_interval "$interval" --save_interval 28 --packed
    evaluate "$OUT/$tuned/merged.pt" "packed_$tuned"
done
run "$PYTHON" bench/tables.py "$OUT"/results_*.json --save "$OUT/smollm2.json"
