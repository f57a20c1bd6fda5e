"""evaluate.py against lm-eval's hf backend: the same documents, model, precision and threads, in turn.

    python -m venv .venv-lm-eval && .venv-lm-eval/bin/pip install lm_eval==0.4.13 torch transformers sentencepiece accelerate
    python bench/evaluate.py --python .venv-lm-eval/bin/python --tokenizer tiny_llama --docs arc_easy.jsonl

A random LLaMA of about 58M parameters is made on the spot (so accuracies are chance; the work is real). --tokenizer is a
directory with LLaMA's tokenizer.model and tokenizer.json; --docs holds ARC documents in their data set's shape. lm-eval
runs a local copy of the task with batch sizes 1 and 8. What is timed on either side is rendered documents to metrics, the
model being loaded: lm-eval's simple_evaluate, our run_task.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from evaluate import read_task, run_task  # noqa: E402
from model import Llama, LlamaConfig, load, load_tokenizer, save  # noqa: E402

YAML = """task: bench_arc
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def make_model(folder: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(32000, 512, 1408, n_layers=8, n_heads=8, max_seq_len=2048, norm_eps=1e-5)
    save(Llama(config), folder, load_tokenizer(tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)


def lm_eval(python: str, model: Path, tasks: Path, out: Path, batch: int) -> float:
    code = (
        "import sys, time, json, torch; torch.set_num_threads(1)\n"
        "from lm_eval import evaluator, tasks\n"
        "from lm_eval.models.huggingface import HFLM\n"
        f"lm = HFLM(pretrained={str(model)!r}, device='cpu', dtype='float32', batch_size={batch})\n"
        f"manager = tasks.TaskManager(include_path={str(tasks)!r})\n"
        "start = time.perf_counter()\n"
        "r = evaluator.simple_evaluate(lm, tasks=['bench_arc'], task_manager=manager, log_samples=False, bootstrap_iters=0)\n"
        f"json.dump({{'seconds': time.perf_counter() - start, 'acc': r['results']['bench_arc']['acc,none']}}, open({str(out)!r}, 'w'))\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([python, "-c", code], check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description="Wall time of evaluate.py against lm-eval's.")
    parser.add_argument("--python", required=True, help="an interpreter that has lm_eval")
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--docs", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_model(folder / "model", args.tokenizer)
        docs = args.docs.read_text().splitlines()[: args.limit]
        (folder / "docs.jsonl").write_text("\n".join(docs) + "\n")
        (folder / "tasks").mkdir()
        (folder / "tasks" / "bench_arc.yaml").write_text(YAML.format(docs=folder / "docs.jsonl"))
        command = [sys.executable, str(ROOT / "data" / "lm_eval" / "prepare.py"), "--task", "arc_easy"]
        subprocess.run(
            [*command, "--json", folder / "docs.jsonl", "--out", folder], check=True, stdout=subprocess.DEVNULL
        )
        model, tokenizer = load(folder / "model")
        name, documents = read_task(folder / "samples_arc_easy.jsonl")
        settings = argparse.Namespace(add_bos=True, batch_tokens=4096, no_sharing=False, rank=1)
        rows = {"evaluate.py": [], "lm-eval, batch 1": [], "lm-eval, batch 8": []}
        for _ in range(args.repeats):
            start = time.perf_counter()
            result, _scores = run_task(model, tokenizer, documents, settings, name)
            rows["evaluate.py"].append(time.perf_counter() - start)
            for batch in (1, 8):
                theirs = lm_eval(args.python, folder / "model", folder / "tasks", folder / "out.json", batch)
                rows[f"lm-eval, batch {batch}"].append(theirs["seconds"])
        print(f"{len(docs)} ARC documents, one thread; accuracy here {result['acc']:.4f}, lm-eval {theirs['acc']:.4f}")
        for row, seconds in rows.items():
            print(f"| {row} | {min(seconds):.1f} s |")
        best = min(min(rows["lm-eval, batch 1"]), min(rows["lm-eval, batch 8"]))
        print(f"lm-eval at its best / evaluate.py: {best / min(rows['evaluate.py']):.2f}")


if __name__ == "__main__":
    main()
