# shellcheck shell=sh
# What the scripts of the paper's tables share. Each names its models, sources this file from the repository root, says
# what is done to a pruned model (`variants`), and makes its table:
#
#   sh runs/table2.sh --dry_run                     # every command, and what every training would need; without weights
#   GPUS=8 LLAMAS=/models OUT=out/paper sh runs/table2.sh
#
# $LLAMAS holds the dense models under the names of train.py's presets (llama-7b, llama-2-70b, ...), each a Hugging Face or
# a Meta directory. Results go to $OUT/MODEL/NAME.json, checkpoints beside them. What exists is not made again, so that a
# killed script goes on when it is started again, and tables that share models share the work. The settings are the
# paper's, by size (PAPER in train.py); 30B and larger are sharded. evaluate.py has two blocks of a model on each GPU, of
# any size. MODELS, such as "llama-7b llama-13b", are the models to take in place of a script's own.
#
# GPU-hours in the scripts are estimated, not measured: FLOPs at 40% of an A100's 312 TFLOP/s in bfloat16. Per token and
# weight of the blocks' linears: SPP 6 FLOPs (3 units), LoRA 4, and 2 more where activations are recomputed (30B and
# larger); evaluation 2, behind which blocks are read. Tokens: Alpaca 50,002 records of 120 (assumed) in each epoch; the
# seven tasks 3.0 million (assumed), MMLU with shared examples 2.6 million, WikiText-2 0.34 million; pruning runs
# 128 x 2,048 tokens twice, and SparseGPT's statistics cost about as much again. tests/test_runs.py recomputes the figures.
set -e
GPUS=${GPUS:-8} LLAMAS=${LLAMAS:-models} OUT=${OUT:-out/paper} TASKS=${TASKS:-data/lm_eval}
WIKITEXT=${WIKITEXT:-data/wikitext2_test.txt} # the raw test set as one file
PYTHON=${PYTHON:-python}
SEVEN="boolq rte hellaswag winogrande arc_easy arc_challenge openbookqa"
dry='' seen=''
case $1 in
"") ;;
--dry_run) dry=1 ;;
*)
    echo "usage: [GPUS=8] [LLAMAS=models] [OUT=out/paper] sh $0 [--dry_run]" >&2
    exit 2
    ;;
esac
case $GPUS in
*[!0-9]* | 0*)
    echo "$0: error: GPUS=$GPUS: expected a number of GPUs" >&2
    exit 2
    ;;
esac

# show WORD ...: a command as you would type it
show() {
    printf '\n\033[1m$'
    for word; do
        case $word in
        "" | *[!A-Za-z0-9_./:,=*-]*) word=\'$(printf %s "$word" | sed "s/'/'\\\\''/g")\' ;;
        esac
        printf ' %s' "$word"
    done
    printf '\033[0m\n'
}
run() {
    show "$@"
    [ "$dry" ] || "$@"
}

# there FILE: whether it is there already, and will be used as it is
there() { [ -e "$1" ] && echo "using $1, which is there already"; }

# prepare MODEL: instructions, calibration and tasks, once: all LLaMAs have the same tokenizer
prepare() {
    there data/alpaca/meta.json || run "$PYTHON" data/alpaca/prepare.py --tokenizer "$LLAMAS/$1" --out data/alpaca
    there data/c4/calib.npy ||
        run "$PYTHON" data/c4/prepare.py --tokenizer "$LLAMAS/$1" --nsamples 128 --seqlen 2048 --out data/c4/calib.npy
    for task in $SEVEN; do
        there "$TASKS/samples_$task.jsonl" || run "$PYTHON" data/lm_eval/prepare.py --task "$task" --out "$TASKS"
    done
    [ ! "$MMLU" ] || there "$TASKS/samples_mmlu_world_religions.jsonl" || # the last of the subjects
        run "$PYTHON" data/lm_eval/prepare.py --task mmlu --out "$TASKS"
}

# evaluate MODEL NAME CHECKPOINT: the seven tasks without BOS, as the paper, and perplexity; with MMLU=1 5-shot MMLU
evaluate() {
    to=$OUT/${MMLU:+mmlu/}$1/$2.json ckpt=$3
    [ -e "$to" ] && return
    [ "$dry" ] || mkdir -p "${to%/*}"
    if [ "$MMLU" ]; then
        set -- "$TASKS"/samples_mmlu_*.jsonl
    else
        set --
        for task in $SEVEN; do
            set -- "$@" "$TASKS/samples_$task.jsonl"
        done
        set -- "$@" --ppl "$WIKITEXT"
    fi
    run torchrun --nproc_per_node="$GPUS" evaluate.py --ckpt "$ckpt" --tasks "$@" --out "$to"
}

# dense MODEL
dense() { evaluate "$1" dense "$LLAMAS/$1"; }

# pruned MODEL METHOD SPARSITY [--dsnot]: prunes and evaluates; sets $name, such as wanda_2of8
pruned() {
    model=$1 name=$2_$(echo "$3" | sed s/:/of/)${4:+-dsnot}
    [ -e "$OUT/$model/$name" ] ||
        run "$PYTHON" prune.py --ckpt "$LLAMAS/$model" --method "$2" --sparsity "$3" ${4:+"$4"} --calib data/c4/calib.npy \
            --out "$OUT/$model/$name"
    evaluate "$model" "$name" "$OUT/$model/$name"
}

# tuned SUFFIX [FLAG ...]: fine-tunes what `pruned` made, and evaluates; SUFFIX names it, such as spp or spp-r4
tuned() {
    as=$name-$1 out=$OUT/$model/$name-$1
    shift
    case $model in
    *30b | *65b | *70b) set -- --fsdp --activation_checkpointing "$@" ;;
    esac
    if ! [ -e "$out/merged.pt" ]; then
        # --resume: a training that was stopped goes on, any other begins
        run torchrun --nproc_per_node="$GPUS" train.py --ckpt "$OUT/$model/$name" --data data/alpaca "$@" --resume --out_dir "$out"
        [ ! "$dry" ] || needs "$@"
    fi
    evaluate "$model" "$as" "$out/merged.pt"
}

# needs FLAG ...: what a training of $model needs, once for the same flags: another mask needs the same
needs() {
    case $seen in
    *"<$model $*>"*) return 0 ;;
    esac
    seen="$seen<$model $*>"
    "$PYTHON" bench/memory.py --preset "$model" --dtype bfloat16 --processes "$GPUS" "$@"
}

# collect N: the table, the paper's figures beside ours
collect() { run "$PYTHON" bench/tables.py --paper "$1" "$OUT"/${MMLU:+mmlu/}llama-*/*.json; }

# table N "METHOD ..." "SPARSITY ...": each of $MODELS, pruned by each method to each sparsity, and then what the script's
# `variants` does to it; a method "dense" is the model as it came
table() {
    prepare "${MODELS%% *}"
    for model in $MODELS; do
        for method in $2; do
            if [ "$method" = dense ]; then
                dense "$model"
                continue
            fi
            for sparsity in $3; do
                pruned "$model" "$method" "$sparsity"
                variants
            done
        done
    done
    collect "$1"
}
