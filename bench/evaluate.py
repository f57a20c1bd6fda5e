"""evaluate.py against lm-eval's hf backend: the same documents, model, precision and threads, in turn.

    python -m venv .venv-lm-eval && .venv-lm-eval/bin/pip install torch==2.13.0 lm_eval==0.4.13 transformers accelerate
    python bench/evaluate.py --python .venv-lm-eval/bin/python --tokenizer tiny_llama --tasks samples_arc_easy.jsonl ...

A random LLaMA of about 58M parameters is made on the spot: accuracies are chance, but the work is real. --tokenizer is a
directory with LLaMA's tokenizer.model and tokenizer.json; --tasks are samples files, from lm-eval's dummy model or from
data/lm_eval/prepare.py. lm-eval gets the same rendered contexts and choices as a task of its own, with batch sizes 1
and 8, and puts BOS in front, as it does by default today. On either side the clock runs from rendered documents to
metrics, with the model already loaded: lm-eval's simple_evaluate, our run_task.
"""

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
from data.tokenizer import load_tokenizer  # noqa: E402
from evaluate import read_task, run_task  # noqa: E402
from model import Llama, LlamaConfig, Parser, cli, load, number, save  # noqa: E402

YAML = """task: bench_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
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


def lm_eval(python: str, model: Path, tasks: Path, out: Path, batch: int) -> dict:
    """Runs bench_task of the folder `tasks` under lm-eval, on one thread: {"seconds", "acc"}."""
    code = (
        "import sys, time, json, torch; torch.set_num_threads(1)\n"
        "from lm_eval import evaluator, tasks\n"
        "from lm_eval.models.huggingface import HFLM\n"
        f"lm = HFLM(pretrained={str(model)!r}, device='cpu', dtype='float32', batch_size={batch})\n"
        f"manager = tasks.TaskManager(include_path={str(tasks)!r})\n"
        "start = time.perf_counter()\n"
        "r = evaluator.simple_evaluate(lm, tasks=['bench_task'], task_manager=manager, log_samples=False, bootstrap_iters=0)\n"
        f"json.dump({{'seconds': time.perf_counter() - start, 'acc': r['results']['bench_task']['acc,none']}}, open({str(out)!r}, 'w'))\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([python, "-c", code], check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def main():
    parser = Parser(description="Wall time of evaluate.py against lm-eval's.")
    parser.add_argument("--python", required=True, help="an interpreter that has lm_eval")
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--tasks", required=True, type=Path, nargs="+")
    parser.add_argument("--limit", type=number(int, 1), default=100, help="documents of each task")
    parser.add_argument("--repeats", type=number(int, 1), default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, float32, one thread, medians of {args.repeats} paired repeats\n")
    print("| task | documents | evaluate.py | lm-eval, batch 1 | batch 8 | lm-eval's best / ours | accuracy, both |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_model(folder / "model", args.tokenizer)
        (folder / "tasks").mkdir()
        model, tokenizer = load(folder / "model")
        for path in args.tasks:
            name, documents = read_task(path)
            documents = documents[: args.limit]
            with open(folder / "docs.jsonl", "w") as f:
                for d in documents:
                    choices = [continuation for _, continuation in d.pairs]
                    doc = {"context": d.pairs[0][0], "choices": choices, "gold": min(d.gold)}
                    f.write(json.dumps(doc) + "\n")
            (folder / "tasks" / "bench_task.yaml").write_text(YAML.format(docs=folder / "docs.jsonl"))
            ours, theirs = [], {1: [], 8: []}  # seconds of each repeat; of lm-eval by batch size
            for _ in range(args.repeats):
                start = time.perf_counter()
                result, _scores = run_task(model, tokenizer, documents, add_bos=True, max_tokens=4096)
                ours.append(time.perf_counter() - start)
                for batch, seconds in theirs.items():
                    run = lm_eval(args.python, folder / "model", folder / "tasks", folder / "out.json", batch)
                    seconds.append(run["seconds"])
            own, one, eight = map(statistics.median, (ours, *theirs.values()))
            print(f"| {name} | {len(documents)} | {own:.1f} s | {one:.1f} s | {eight:.1f} s |", end="")
            print(f" {min(one, eight) / own:.2f} | {result['acc']:.4f} {run['acc']:.4f} |", flush=True)


if __name__ == "__main__":
    cli(main)
