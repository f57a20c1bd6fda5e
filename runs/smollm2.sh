#!/bin/sh
# SmolLM2-135M through the whole chain: Wanda and SparseGPT, after each SPP, LoRA* and training all survivors, and what
# every model is worth then. What exists is not made again: a killed script goes on when it is started again.
#
#   sh runs/smollm2.sh SmolLM2-135M-Instruct        # 2:4, 84 steps of 4 examples, 200 documents of each task
#   sh runs/smollm2.sh SmolLM2-135M-Instruct full   # 0.5, 2:4, 0.75 and 2:8, a whole epoch, all documents and all text
#   ALPACA=alpaca.json C4=c4.json.gz TASKS=tasks WIKITEXT=wiki.test.raw sh runs/smollm2.sh SmolLM2-135M-Instruct
#
# The first argument is a Hugging Face directory. Without ALPACA and C4 their files are downloaded; tasks are taken from the
# folder TASKS, and downloaded where they are not there; WIKITEXT is WikiText-2's test set as one file (see the README).
# Results go to OUT, out/smollm2-short or out/smollm2-full by default. A GPU is used where there is one.
#
# The short form is about an hour and a half of one CPU core: an estimate, at 100 tokens a second in training (6 times
# 56,000), 230 in scoring (9 times 42,000), and a few minutes of pruning. The learning rates are those that did best
# in 84 steps at Wanda 0.75 of two or three that were tried for each method.
case "$# $2" in
"1 ") size=short sparsities=2:4 nsamples=24 seqlen=512 steps=84 documents=200 lines=220 ;; # 220 lines: 60,000 characters
"2 full") size=full sparsities="0.5 2:4 0.75 2:8" nsamples=128 seqlen=2048 steps='' documents='' lines='' ;;
*)
    echo "usage: [ALPACA=FILE] [C4=FILE] [TASKS=data/lm_eval] [WIKITEXT=FILE] [OUT=DIR] sh $0 DIR [full]" >&2
    exit 2
    ;;
esac
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

# evaluate CHECKPOINT NAME
evaluate() {
    there "$OUT/results_$2.json" ||
        run "$PYTHON" evaluate.py --ckpt "$1" --tasks "$OUT"/samples_*.jsonl --ppl "$OUT/wikitext2.txt" --seqlen 512 \
            --out "$OUT/results_$2.json"
}

# tune METHOD LR [FLAG ...]: fine-tunes $name
tune() {
    tuned=$name-$1 method=$1 lr=$2
    shift 2
    there "$OUT/$tuned/merged.pt" ||
        run "$PYTHON" train.py --ckpt "$OUT/$name.pt" --data "$OUT/alpaca" --method "$method" --lr "$lr" --batch_size 4 \
            --epochs "$epochs" --eval_interval 28 --save_interval 28 "$@" --resume --out_dir "$OUT/$tuned"
    evaluate "$OUT/$tuned/merged.pt" "$tuned"
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
    epochs=$(awk "BEGIN { print 4 * $steps / $examples }")
fi

evaluate "$dense" dense
for sparsity in $sparsities; do
    for method in wanda sparsegpt; do
        name=${method}_$(echo "$sparsity" | sed s/:/of/)
        there "$OUT/$name.pt" ||
            run "$PYTHON" prune.py --ckpt "$dense" --method "$method" --sparsity "$sparsity" --calib "$OUT/calib.npy" \
                --out "$OUT/$name.pt"
        evaluate "$OUT/$name.pt" "$name"
        tune spp 3e-2
        tune lora 5e-3 --rank 8
        tune masked 1e-3
    done
done
run "$PYTHON" bench/tables.py "$OUT"/results_*.json --save "$OUT/smollm2.json"
