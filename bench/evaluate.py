"""evaluate.py against lm-eval's hf backend: the same documents, model, precision and threads, in turn.

    python -m venv .venv-lm-eval && .venv-lm-eval/bin/pip install torch==2.13.0 lm_eval==0.4.13 transformers accelerate
    python bench/evaluate.py --python .venv-lm-eval/bin/python --tokenizer tiny_llama --tasks samples_arc_easy.jsonl ... --add_bos
    python bench/evaluate.py --python .venv-lm-eval/bin/python --ckpt SmolLM2-135M-Instruct --tasks samples_arc_easy.jsonl ...
    python bench/evaluate.py --memory 2 4 8 --tokenizer stories260K --tasks samples_arc_easy.jsonl --limit 3

--ckpt is a Hugging Face directory. With --tokenizer, a directory that has LLaMA's tokenizer.model and tokenizer.json, a
random LLaMA of about 58M parameters is made on the spot: accuracies are chance, but the work is real. --tasks are
samples files, from lm-eval's dummy model or from data/lm_eval/prepare.py. lm-eval gets the same rendered contexts and
choices as a task of its own, with each of --batch_sizes. On either side the clock runs from rendered documents to
metrics, with the model already loaded: lm-eval's simple_evaluate, our run_task. "difference" is the largest of any
choice's log-likelihood here and there.

--memory: peak resident memory of evaluate.py on models of that many blocks of LLaMA-2 70B's shapes, random bfloat16.
"""

import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.prune import noise, peak_memory  # noqa: E402
from data.checkpoint import UserError, write_checkpoint  # noqa: E402
from data.lm_eval.samples import Document, read_task  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from evaluate import run_task  # noqa: E402
from model import PRESETS, Block, Llama, LlamaConfig, Parser, cli, load, number, save  # noqa: E402

YAML = """task: bench_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: {text}
doc_to_choice: choices
doc_to_target: {target}
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def make_model(folder: Path, tokenizer: Path) -> None:
    """Writes the random model, as a Hugging Face directory that either side loads."""
    torch.manual_seed(0)
    config = LlamaConfig(32000, 512, 1408, num_hidden_layers=8, num_attention_heads=8, rms_norm_eps=1e-5)
    save(Llama(config), folder, load_tokenizer(tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)


def write_task(folder: Path, documents: list[Document]) -> None:
    """Writes rendered documents as lm-eval's bench_task. Where contexts differ and the continuation does not, lm-eval
    takes the contexts for the choices, and doc_to_text for the right one (WinoGrande)."""
    several = len({context for context, _ in documents[0].pairs}) > 1
    with open(folder / "docs.jsonl", "w") as f:
        for d in documents:
            contexts, continuations = zip(*d.pairs, strict=True)
            doc = {"context": contexts[0], "choices": continuations, "gold": min(d.gold)}
            if several:
                doc.update(choices=contexts, continuation=continuations[0])
            f.write(json.dumps(doc) + "\n")
    text, target = ("gold", "continuation") if several else ("context", "gold")
    (folder / "bench_task.yaml").write_text(YAML.format(docs=folder / "docs.jsonl", text=text, target=target))


def lm_eval(python: str, model: Path, tasks: Path, add_bos: bool, batch: int) -> dict:
    """Runs bench_task of the folder `tasks` under lm-eval, on one thread: {"seconds", "acc", "log_p" of each choice}."""
    out = tasks / "out.json"
    code = (
        "import time, json, torch; torch.set_num_threads(1)\n"
        "from lm_eval import evaluator, tasks\n"
        "from lm_eval.models.huggingface import HFLM\n"
        f"lm = HFLM({str(model)!r}, device='cpu', dtype='float32', batch_size={batch}, add_bos_token={add_bos})\n"
        f"manager = tasks.TaskManager(include_path={str(tasks)!r})\n"
        "start = time.perf_counter()\n"
        "r = evaluator.simple_evaluate(lm, tasks=['bench_task'], task_manager=manager, bootstrap_iters=0)\n"
        "seconds = time.perf_counter() - start\n"
        "samples = sorted(r['samples']['bench_task'], key=lambda sample: sample['doc_id'])\n"
        "log_p = [float(resp[0][0]) for sample in samples for resp in sample['resps']]\n"
        "result = {'seconds': seconds, 'acc': r['results']['bench_task']['acc,none'], 'log_p': log_p}\n"
        f"json.dump(result, open({str(out)!r}, 'w'))\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"--python {python}: lm-eval ended with {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(out.read_text())


def memory(n_blocks: int, tokenizer: Path, tasks: list[Path], limit: int) -> tuple[int, int, int]:
    """Bytes of evaluate.py's peak resident memory on n blocks of LLaMA-2 70B's shapes, of one block, and the number of
    tokens that were scored: `limit` documents of each task, in the tokenizer's small vocabulary."""
    pieces = load_tokenizer(tokenizer)
    config = dataclasses.replace(PRESETS["llama-2-70b"], num_hidden_layers=n_blocks, vocab_size=pieces.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ckpt = noise(config)
        ckpt.tokenizer = pieces.data
        write_checkpoint(ckpt, folder / "model")
        files = []
        for path in tasks:
            files.append(folder / path.name)
            with open(path, newline="\n") as lines:  # no other character ends one
                files[-1].write_text("".join(itertools.islice(lines, limit)))
        command = [sys.executable, ROOT / "evaluate.py", "--ckpt", folder / "model", "--tasks", *files]
        command += ["--device", "cpu", "--out", folder / "r.json"]
        peak = peak_memory(command)
        results = json.loads((folder / "r.json").read_text())["results"]
    with torch.device("meta"):
        block = 2 * sum(w.numel() for w in Block(config).parameters())
    return peak, block, sum(result["tokens"] for result in results.values())


def main():
    parser = Parser(description="Wall time and scores of evaluate.py against lm-eval's.")
    parser.add_argument("--python", help="an interpreter that has lm_eval")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--ckpt", type=Path, help="the model, a Hugging Face directory")
    model.add_argument("--tokenizer", type=Path, help="a random model with this directory's tokenizer")
    parser.add_argument("--tasks", required=True, type=Path, nargs="+")
    parser.add_argument("--add_bos", action="store_true", help="put BOS before contexts, on either side")
    parser.add_argument("--limit", type=number(int, 1), default=100, help="documents of each task")
    parser.add_argument("--batch_sizes", type=number(int, 1), nargs="+", default=[1, 8], help="of lm-eval")
    parser.add_argument("--repeats", type=number(int, 1), default=2)
    parser.add_argument("--memory", type=number(int, 1), nargs="+", metavar="BLOCKS", help="peak memory in its place")
    args = parser.parse_args()
    if args.memory and not args.tokenizer:
        raise UserError("--memory: takes a --tokenizer, its model is random")
    if args.memory:
        print("| blocks | peak resident memory | one block | tokens |\n|---|---|---|---|")
        for n in args.memory:
            peak, block, tokens = memory(n, args.tokenizer, args.tasks, args.limit)
            print(f"| {n} | {peak / 1e9:.2f} GB | {block / 1e9:.2f} GB | {tokens:,} |", flush=True)
        return
    if not args.python:
        raise UserError("--python: is needed, an interpreter that has lm_eval")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, float32, one thread, medians of {args.repeats} paired repeats\n")
    batches = " | ".join(f"lm-eval, batch {batch}" for batch in args.batch_sizes)
    print(f"| task | documents | evaluate.py | {batches} | lm-eval's best / ours | difference | accuracy, both |")
    print("|---" * (6 + len(args.batch_sizes)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.tokenizer:
            make_model(folder / "model", args.tokenizer)
        directory = args.ckpt or folder / "model"
        model, tokenizer = load(directory, torch.float32)
        for path in args.tasks:
            name, documents = read_task(path)
            documents = documents[: args.limit]
            write_task(folder, documents)
            ours, theirs = [], {batch: [] for batch in args.batch_sizes}  # seconds of each repeat
            for _ in range(args.repeats):
                start = time.perf_counter()
                result, scores = run_task(model, tokenizer, documents, args.add_bos, max_tokens=4096)
                ours.append(time.perf_counter() - start)
                for batch, seconds in theirs.items():
                    run = lm_eval(args.python, directory, folder, args.add_bos, batch)
                    seconds.append(run["seconds"])
            own, others = statistics.median(ours), [statistics.median(seconds) for seconds in theirs.values()]
            log_p = [score for choices in scores for score, _ in choices]
            difference = max(abs(a - b) for a, b in zip(log_p, run["log_p"], strict=True))
            print(
                f"| {name} | {len(documents)} | {own:.1f} s | {' | '.join(f'{other:.1f} s' for other in others)} |",
                end="",
            )
            print(f" {min(others) / own:.2f} | {difference:.1e} | {result['acc']:.4f} {run['acc']:.4f} |", flush=True)


if __name__ == "__main__":
    cli(main)
