"""The paper's seven tasks and MMLU as lm-eval's samples files, without lm-eval.

    python data/lm_eval/prepare.py --task arc_easy --out data/lm_eval                       # downloads the documents
    python data/lm_eval/prepare.py --task boolq --json boolq.jsonl --out data/lm_eval       # or takes them from a file
    python data/lm_eval/prepare.py --task mmlu --json test.jsonl --shots dev.jsonl --out data/lm_eval
    python data/lm_eval/prepare.py --task piqa --json piqa.jsonl --config results_2026.json --out data/lm_eval

A document becomes the contexts and continuations that lm-eval (0.4.0 to 0.4.13) renders for it and evaluate.py scores.
--json holds a document a line, in the shape of the task's data set. MMLU is 5-shot, the first five documents of --shots
with the same subject, and gives a file a subject; the other tasks are zero-shot, as in the paper.

Any other multiple-choice task whose description in lm-eval's own results file (`configs`) consists of templates and
column names can be rendered with --config; one that holds Python is refused by name.
"""

import ast
import http.client
import json
import re
import resource
import signal
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.checkpoint import UserError, atomic, check_ours, check_out, parse_json_lines, read_bytes, read_json  # noqa: E402
from model import Parser, cli  # noqa: E402

NAME = r"\w[\w-]*"  # of a task, and so of its file

# A rendered document: its context, or one for each choice; the choices; the right one, by its index or its text.
Rendered = tuple[str | list[str], list[str], int | str]


def by_label(doc: dict) -> int:
    return doc["choices"]["label"].index(doc["answerKey"].strip())


def hellaswag_text(text: str) -> str:
    """WikiHow's artefacts out of a HellaSwag text, to the letter as lm-eval does it: no strip at the end."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(doc: dict) -> Rendered:
    context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
    return hellaswag_text(context), [hellaswag_text(ending) for ending in doc["endings"]], int(doc["label"])


def winogrande(doc: dict) -> Rendered:
    """Two contexts, one continuation: lm-eval's target is the continuation, the gold is the document's answer."""
    before, after = doc["sentence"].split("_", 1)
    return [before + doc["option1"], before + doc["option2"]], [after.strip()] * 2, after.strip()


def arc(doc: dict) -> Rendered:
    return f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"], by_label(doc)


def mmlu(doc: dict) -> Rendered:
    lines = [
        doc["question"].strip(),
        *(f"{letter}. {text}" for letter, text in zip("ABCD", doc["choices"], strict=True)),
    ]
    return "\n".join([*lines, "Answer:"]), list("ABCD"), doc["answer"]


# task: (data set, configuration, split, renderer)
TASKS: dict[str, tuple[str, str, str, Callable[[dict], Rendered]]] = {
    "boolq": (
        "aps/super_glue",
        "boolq",
        "validation",
        lambda d: (f"{d['passage']}\nQuestion: {d['question']}?\nAnswer:", ["no", "yes"], d["label"]),
    ),
    "rte": (
        "nyu-mll/glue",
        "rte",
        "validation",
        lambda d: (
            f"{d['sentence1']}\nQuestion: {d['sentence2']} True or False?\nAnswer:",
            ["True", "False"],
            d["label"],
        ),
    ),
    "hellaswag": ("Rowan/hellaswag", "default", "validation", hellaswag),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", winogrande),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "openbookqa": (
        "allenai/openbookqa",
        "main",
        "test",
        lambda d: (d["question_stem"], d["choices"]["text"], by_label(d)),
    ),
    "mmlu": ("cais/mmlu", "all", "test", mmlu),
}


def download(dataset: str, config: str, split: str, flag: str = "--json") -> list[dict]:
    """All rows of a data set, through the hub's rows interface, 100 at a time. flag: what takes them from a file."""
    rows, total = [], 1
    while len(rows) < total:
        query = urllib.parse.urlencode(
            {"dataset": dataset, "config": config, "split": split, "offset": len(rows), "length": 100}
        )
        try:
            with urllib.request.urlopen(f"https://datasets-server.huggingface.co/rows?{query}", timeout=60) as response:
                page = json.load(response)
            total, got = page["num_rows_total"], [row["row"] for row in page["rows"]]
            if not got:
                raise ValueError(f"{len(rows)} rows came of {total}")
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as e:
            where = f"https://huggingface.co/datasets/{dataset} ({config}, {split})"
            raise UserError(
                f"{where} cannot be downloaded ({e!r}); give its rows, one JSON object a line, as {flag} FILE"
            ) from None
        rows += got
    return rows


def read_documents(path: str) -> list[dict]:
    documents = [doc for _, doc in parse_json_lines(read_bytes(path), path)]
    if not documents:
        raise UserError(f"{path}: holds no documents")
    return documents


def from_config(config: dict, task: str) -> Callable[[dict], Rendered]:
    """A render function from a task's description in lm-eval's results file: column names and Jinja templates.

    The file may be anybody's: its templates see the document and nothing of Python, within the limits of `bounded`.
    """
    from jinja2 import StrictUndefined  # comes with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, new: re.sub(pattern, new, text)
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target", "process_docs", "process_results"):
        if str(config.get(key) or "").startswith(("def ", "<function", "functools.partial")):
            raise UserError(f"--config: {task}: {key} is Python code, not a template; let lm-eval write its samples")
    if config.get("output_type") != "multiple_choice" or config.get("num_fewshot"):
        raise UserError(f"--config: {task}: only zero-shot multiple-choice tasks can be rendered")
    for key in ("gen_prefix", "multiple_input", "multiple_target", "custom_dataset"):
        if config.get(key):
            raise UserError(f"--config: {task}: {key} is {config[key]!r:.40}, which is not rendered here")

    def text(template: str, doc: dict) -> str:
        return environment.from_string(template).render(doc)

    def choices(doc: dict) -> list[str]:
        listed = config["doc_to_choice"]
        if isinstance(listed, str):
            listed = doc[listed] if listed in doc else ast.literal_eval(text(listed, doc))
        return [*listed.values()] if isinstance(listed, dict) else [*listed]

    def target(doc: dict, of: list[str]) -> Any:
        """As indices, so that a number which is a text is none."""
        x = config["doc_to_target"]
        if isinstance(x, str) and x in doc:
            x = doc[x]
        elif isinstance(x, str):
            x = text(x, doc)
            x = ast.literal_eval(x) if x.isdigit() or x.startswith("[") else x
        index = lambda x: (of.index(x) if x in of else -100) if isinstance(x, str) else int(x)
        return [index(one) for one in x] if isinstance(x, list) else index(x)

    def render(doc: dict) -> Rendered:
        template = config["doc_to_text"]
        context = doc[template] if template in doc else text(template, doc)
        of = choices(doc)
        return text(config.get("description") or "", doc) + context, of, target(doc, of)

    return lambda doc: bounded(render, doc)


def bounded(render: Callable[[dict], Rendered], doc: dict, seconds: float = 5, nbytes: int = 2**30) -> Rendered:
    """render(doc); TimeoutError or MemoryError if that takes more than so much time, or so much more memory."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"takes longer than {seconds} seconds to render")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)  # address space
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # again and again: Jinja catches what a constant raises
    most = now + nbytes if hard == resource.RLIM_INFINITY else min(now + nbytes, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        return render(doc)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def metrics_of(config: dict, task: str) -> list[str]:
    """The names of the metrics by which a task of lm-eval's is scored, its own where it names none."""
    listed = config.get("metric_list") or [{"metric": "acc"}, {"metric": "acc_norm"}]
    if not isinstance(listed, list) or not all(
        isinstance(m, dict) and isinstance(m.get("metric"), str) for m in listed
    ):
        raise UserError(f"--config: {task}: its metric_list is not a list of metrics")
    metrics = [m["metric"] for m in listed]
    if "acc_mutual_info" in metrics:
        print(
            f"{task}: acc_mutual_info is left out: it needs each choice without a context, which is not rendered here"
        )
        metrics.remove("acc_mutual_info")
    return metrics


def line(i: int, doc: dict, rendered: Rendered, delimiter: str, metrics: list[str]) -> bytes:
    """lm-eval's sample of one document; every continuation is the delimiter and the choice."""
    contexts, choices, target = rendered
    contexts = contexts if isinstance(contexts, list) else [contexts] * len(choices)
    pairs = zip(contexts, choices, strict=True)
    arguments = {f"gen_args_{k}": {"arg_0": c, "arg_1": f"{delimiter}{text}"} for k, (c, text) in enumerate(pairs)}
    sample = {"doc_id": i, "doc": doc, "target": target, "arguments": arguments}
    sample.update(resps=[], filtered_resps=[], filter="none", metrics=metrics, target_delimiter=delimiter)
    return (json.dumps(sample, ensure_ascii=False) + "\n").encode()  # an error for half of a surrogate pair


def mmlu_shots(subject: str, documents: list[dict]) -> str:
    """The header of a subject and its first five answered examples."""
    examples = [doc for doc in documents if doc["subject"] == subject][:5]
    if len(examples) < 5:
        raise UserError(f"--shots: holds {len(examples)} documents of {subject}, expected 5")
    header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return header + "".join(f"{mmlu(doc)[0]} {'ABCD'[doc['answer']]}\n\n" for doc in examples)


def main() -> None:
    parser = Parser(description="Render documents of a task as lm-eval's samples file.")
    add = parser.add_argument
    add("--task", required=True, help=f"{', '.join(TASKS)}, or with --config any task it describes")
    add("--json", help="the documents, one a line; by default downloaded")
    add("--shots", help="mmlu: the dev split, one document a line; by default downloaded")
    add("--config", help="a results file of lm-eval that describes the task")
    add("--out", required=True, help="the folder to write samples_TASK.jsonl into")
    args = parser.parse_args()
    if not args.config and args.task not in TASKS:
        raise UserError(f"--task {args.task}: expected one of {', '.join(TASKS)}, or a --config that describes it")
    mmlus = args.task == "mmlu" and not args.config  # of many subjects, each a task with examples of its own
    if args.shots and not mmlus:
        raise UserError(f"--shots: means nothing to --task {args.task}{' with --config' * bool(args.config)}")
    if not re.fullmatch(NAME, args.task):
        raise UserError(f"--task {args.task}: expected a name of letters, digits, '_' and '-', which a file gets")
    if args.config:
        configs = read_json(args.config, dict).get("configs")
        if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
            raise UserError(f"--config {args.config}: has no `configs`, the descriptions of tasks by their names")
        if args.task not in configs:
            raise UserError(f"--config {args.config}: describes {', '.join(configs) or 'no task'}, not {args.task}")
        if not args.json:
            raise UserError(f"--config {args.config}: holds no documents; give them as --json FILE")
        render = from_config(configs[args.task], args.task)
        delimiter = configs[args.task].get("target_delimiter", " ")
        if not isinstance(delimiter, str) or delimiter.strip():
            raise UserError(f"--config: {args.task}: its target_delimiter is {delimiter!r:.40}, expected white space")
        metrics = metrics_of(configs[args.task], args.task)
    else:
        *source, render = TASKS[args.task]
        delimiter, metrics = " ", ["acc", "acc_norm"]
    inputs = [path for path in (args.json, args.shots, args.config) if path]
    check_out(Path(args.out) / f"samples_{args.task}.jsonl", inputs=inputs)
    documents = read_documents(args.json) if args.json else download(*source)
    shots = ""
    if mmlus:
        shots = read_documents(args.shots) if args.shots else download(source[0], source[1], "dev", "--shots")
    tasks = {}
    for i, doc in enumerate(documents):
        try:
            task, (context, choices, answer) = args.task, render(doc)
            if mmlus:
                if not re.fullmatch(NAME, doc["subject"]):
                    subject = f"its subject {doc['subject']!r:.80} cannot name a file"
                    raise UserError(f"{args.json or args.task}: document {i}: {subject}")
                task, context = f"mmlu_{doc['subject']}", mmlu_shots(doc["subject"], shots) + context
            if not args.config:
                answer = str(answer)  # as lm-eval writes it
            lines = tasks.setdefault(task, [])
            lines.append(line(len(lines), doc, (context, choices, answer), delimiter, metrics))
        except UserError:
            raise
        except Exception as e:  # whatever a template or a renderer does not find
            raise UserError(f"{args.json or args.task}: document {i} is not of task {args.task}: {e!r}") from None
    files = {task: check_out(Path(args.out) / f"samples_{task}.jsonl", inputs=inputs) for task in tasks}
    for path in files.values():
        check_ours(path, "arguments", f"--out {args.out}: the samples")
    for task, lines in tasks.items():
        with atomic(files[task]) as tmp:
            tmp.write_bytes(b"".join(lines))
        print(f"wrote {files[task]}: {len(lines)} documents")


if __name__ == "__main__":
    cli(main)
