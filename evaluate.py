"""What it cost: lm-eval's accuracies from lm-eval's own files, and perplexity (section 4 of the paper, Tables 2 to 7).

    python evaluate.py --ckpt merged.pt --tasks samples_arc_easy_*.jsonl --ppl wikitext2_test.txt --out results.json
    torchrun --nproc_per_node=8 evaluate.py --ckpt merged.pt --tasks samples_*.jsonl --out results.json

--tasks takes what `lm_eval --model dummy --tasks T --num_fewshot K --log_samples` writes for any multiple-choice task,
or what data/lm_eval/prepare.py writes without lm-eval: a line per document, with the context and the continuation of
each choice. lm-eval's score of a choice is log p(continuation | context), summed over its tokens:

    tokens     c = encode(context), t = encode(context + continuation)[len(c):]       (a context's trailing spaces
    input      (c + t)[-(max_len + 1):][:-1], cut from the left                         move to the continuation)
    score      sum over t of log_softmax(logits)[t_k], where the logits that predict the token at position p
               are those of input position p - 1

    acc        the first choice of the highest score is right        acc_norm   ... of the highest score per character

lm-eval runs every choice with a copy of its context. Here a document is one row, a trunk (the longest common prefix of
its choices' inputs, so WinoGrande's two contexts share what they can) and a branch for each choice; a branch's tokens
have the positions that they would have behind the trunk, and see the trunk and themselves:

    row         t0 t1 t2 | a3 a4 | b3 b4 b5           what a query (down) sees of the keys (across):
    position     0  1  2 |  3  4 |  3  4  5                      t t t a a b b b
    branch       0  0  0 |  1  1 |  2  2  2                   a4 x x x x x . . .
                                                              b4 x x x . . x x .

What all documents of a file begin with (few-shot examples) is run once, and its keys and values serve every row. Rows
are sorted by length and batched by tokens; the output layer runs on scored positions alone, in float32 from there on.

Whether a beginning-of-sequence token is put in front (--add_bos) changes the numbers: lm-eval did not for LLaMA until
0.4.9.1, and the paper did not; since 0.4.9.2 lm-eval does. The results say which was used.

Perplexity is Wanda's: the text's lines, blank ones emptied, joined by a blank line, tokenised once with one BOS, cut
into windows of seqlen tokens (the tail is dropped), each on its own, exp(mean over windows of the mean cross-entropy of
its seqlen - 1 targets). Compare figures of one seqlen only. lm-eval's `wikitext` task (rolling log-likelihood, word
perplexity) is another number; its samples file is read too.

Known differences: sentencepiece tokenises; a Hugging Face tokenizer.json drops the first space of a text that begins
with one, so that lm-eval's rolling scores of such pages differ by about 0.03%. lm-eval rounds scores to the model's
dtype before it compares them; here they are float32.
"""

import ast
import dataclasses
import hashlib
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from tqdm import tqdm

from model import Llama, Parser, UserError, atomic, check_out, cli, load, rope_tables

SEVEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # the paper's average

# ----------------------------------------------------------------------------------------------------------------------
# read: lm-eval's samples


@dataclasses.dataclass
class Document:
    """record: lm-eval's; pairs: (context, continuation) of each choice, or one (text, None) of a rolling task; gold:
    the right choices' indices (none of them in range: always wrong)."""

    record: dict
    pairs: list[tuple[str, str | None]]
    gold: set[int]

    @property
    def n_choices(self) -> int:
        # acc_mutual_info adds each continuation once more, behind an empty context
        half = len(self.pairs) // 2
        return half if half and all(context == "" for context, _ in self.pairs[half:]) else len(self.pairs)

    @property
    def choices(self) -> list[str]:
        """The choices without the delimiter, a space, that lm-eval puts before them."""
        return [text.removeprefix(" ") for _, text in self.pairs[: self.n_choices]]


def read_task(path: str | Path) -> tuple[str, list[Document]]:
    """A samples file of lm-eval 0.4.0 to 0.4.13: (task name, documents). UserError names the line that is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    records = []
    try:
        if text.startswith("["):  # until 0.4.2: one array
            records = [(i, record) for i, record in enumerate(json.loads(text))]
        else:
            for i, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    records.append((i, json.loads(line)))
    except ValueError:
        raise UserError(f"{path}: line {len(records) + 1} is not JSON; was the file cut off?") from None
    documents, seen = [], set()
    for i, record in records:
        if not isinstance(record, dict) or not {"doc", "arguments"} <= record.keys():
            raise UserError(f"{path}: line {i} is not a sample of lm-eval's (no `doc` or `arguments`)")
        if (key := record.get("doc_id", i)) not in seen:  # a task with several filters logs a document for each
            documents.append(read_document(record, f"{path}: line {i}"))
            seen.add(key)
        if record["doc"].keys() != records[0][1]["doc"].keys() or is_rolling(documents[-1]) != is_rolling(documents[0]):
            raise UserError(f"{path}: line {i} is of another task than the first; give each task a file of its own")
    if not documents:
        raise UserError(f"{path}: holds no sample")
    name = re.sub(r"_\d{4}-\d\d-\d\dT.*$", "", path.stem.removeprefix("samples_"))
    return name, documents


def is_rolling(document: Document) -> bool:
    return document.pairs[0][1] is None


def read_document(record: dict, where: str) -> Document:
    arguments = record["arguments"]
    if isinstance(arguments, dict):
        names = [f"gen_args_{i}" for i in range(len(arguments))]
        if missing := [name for name in names if name not in arguments]:
            raise UserError(f"{where}: {missing[0]} is missing: a choice was lost")
        arguments = [[v for _, v in sorted(arguments[name].items())] for name in names]
    pairs = [(a[0], a[1] if len(a) > 1 else None) for a in arguments]
    if any(isinstance(text, dict) for _, text in pairs):
        raise UserError(f"{where}: is of a generative task; only multiple-choice and rolling tasks can be scored")
    rolling = len(pairs) == 1 and pairs[0][1] is None
    if not rolling and (len(pairs) < 2 or not all(isinstance(s, str) for pair in pairs for s in pair)):
        raise UserError(f"{where}: has {len(pairs)} choices with a context and a continuation, expected 2 or more")
    document = Document(record, pairs, set())
    if not rolling:
        listed = record["doc"].get("choices")
        listed = listed.get("text") if isinstance(listed, dict) else listed
        if isinstance(listed, list) and len(listed) > document.n_choices:
            raise UserError(f"{where}: has {document.n_choices} choices, its document {len(listed)}: a choice was lost")
        document.gold = gold(document, where)
    return document


def gold(document: Document, where: str) -> set[int]:
    """The right choices, from `target`: an index, a choice's text, or a list of either; see the notes inline."""
    choices, target = document.choices, document.record.get("target")
    if len({context for context, _ in document.pairs}) > 1 and len(set(choices)) == 1:
        target = document.record["doc"].get("answer")  # WinoGrande: contexts differ, and target is the continuation
        if str(target) not in ("1", "2"):
            raise UserError(f"{where}: contexts differ, and its document's `answer` is {target!r}, expected 1 or 2")
        return {int(target) - 1}
    if target is None or target == "":
        raise UserError(f"{where}: has no `target`: no gold answer")
    if isinstance(target, str) and target.startswith("[") and target not in choices:
        try:
            target = ast.literal_eval(target)
        except (ValueError, SyntaxError):
            raise UserError(f"{where}: target {target!r} is not a list") from None

    def index(x) -> int:
        if isinstance(x, str) and x in choices:  # "2" may be a choice's text
            return choices.index(x)
        return int(x) if re.fullmatch(r"-?\d+", str(x)) else -100  # a text that is no choice: always wrong

    return {index(x) for x in (target if isinstance(target, list) else [target])}


# ----------------------------------------------------------------------------------------------------------------------
# tokenise: one row for a document


Scored = tuple[list[int], list[int]]  # input tokens, and the target tokens that its last positions predict


def encode_pair(tokenizer, context: str, continuation: str, add_bos: bool, max_len: int) -> Scored:
    """(input, targets) of one choice: the input's last len(targets) positions predict the targets."""
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    bos = [tokenizer.bos_id()]
    c = tokenizer.encode(context) if context else []
    t = tokenizer.encode(context + continuation)[len(c) :]
    c = bos + c if add_bos or not context else c
    return (c + t)[-(max_len + 1) :][:-1], t[-max_len:]


def rolling_windows(tokens: list[int], bos: int, max_len: int) -> list[Scored]:
    """lm-eval's windows over a long text: every token is predicted once, the first from BOS, each later window's input
    being the max_len tokens before its last target."""
    windows, padded = [], [bos, *tokens]
    for start in range(0, len(tokens), max_len):
        end = min(start + max_len, len(tokens))
        windows.append((padded[max(0, end - max_len) : end], tokens[start:end]))
    return windows


def common_prefix(sequences: list[list[int]]) -> int:
    shortest, other = min(sequences), max(sequences)  # in lexicographic order the extremes differ first
    return next((i for i, (a, b) in enumerate(zip(shortest, other, strict=False)) if a != b), min(map(len, sequences)))


@dataclasses.dataclass
class Row:
    """Trunk and branches of a document end to end, behind `skip` tokens that a cache holds."""

    tokens: list[int]
    positions: list[int]
    branch: list[int]  # 0: the trunk, k + 1: choice k
    scored: list[Scored]  # of each choice: indices into the row, and the targets that they predict


def pack(choices: list[Scored], share: bool, skip: int = 0) -> Row:
    """One row for a document. share=False: no trunk, each branch a whole input (what lm-eval computes, to compare)."""
    trunk = common_prefix([x for x, _ in choices]) if share else skip
    tokens, row = choices[0][0][skip:trunk], Row([], [], [], [])
    row.tokens, row.positions, row.branch = list(tokens), list(range(skip, trunk)), [0] * len(tokens)
    for k, (x, targets) in enumerate(choices):
        start = len(row.tokens)  # row index of input position p: p - skip in the trunk, start + p - trunk in the branch
        at = [p - skip if p < trunk else start + p - trunk for p in range(len(x) - len(targets), len(x))]
        row.scored.append((at, targets))
        row.tokens += x[trunk:]
        row.positions += range(trunk, len(x))
        row.branch += [k + 1] * (len(x) - trunk)
    return row


def shared_prefix(documents: list[list[Scored]]) -> int:
    """How many tokens all inputs begin with; at most up to the first position that is scored."""
    return min(
        common_prefix([x for choices in documents for x, _ in choices]),
        min(len(x) - len(targets) for choices in documents for x, targets in choices),
    )


# ----------------------------------------------------------------------------------------------------------------------
# score


@torch.no_grad()
def score_batch(model: Llama, rows: list[Row], prefix: list[list[Tensor]] | None) -> list[list[tuple[float, bool]]]:
    """(log-likelihood, all targets are the argmax) of each choice of each row. prefix: keys and values of the shared
    tokens, as `Llama.hidden` left them."""
    device, S = model.lm_head.weight.device, max(len(row.tokens) for row in rows)
    tokens, positions, branch = (
        torch.tensor([getattr(row, name) + [fill] * (S - len(row.tokens)) for row in rows], device=device)
        for name, fill in (("tokens", 0), ("positions", 0), ("branch", -1))
    )
    q, k = branch[:, :, None], branch[:, None, :]
    mask = ((k == 0) | (k == q)).tril()[:, None]  # (B, 1, S, S)
    past = prefix[0][0].shape[2] if prefix else 0
    mask = torch.cat([mask.new_ones(len(rows), 1, S, past), mask], -1)
    cache = [list(layer) for layer in prefix] if prefix else None
    x = model.hidden(tokens, positions, mask, cache).flatten(0, 1)

    flat = [
        (b * S + i, target, b, c)
        for b, row in enumerate(rows)
        for c, s in enumerate(row.scored)
        for i, target in zip(*s, strict=True)
    ]
    result = [[[0.0, True] for _ in row.scored] for row in rows]
    for start in range(0, len(flat), 1024):
        part = flat[start : start + 1024]
        at, inverse = torch.tensor([f[0] for f in part], device=device).unique(return_inverse=True)
        logits = model.lm_head(x[at]).float()
        targets = torch.tensor([f[1] for f in part], device=device)
        ll = (logits[inverse, targets] - logits.logsumexp(-1)[inverse]).tolist()
        greedy = (logits.argmax(-1)[inverse] == targets).tolist()
        for (_, _, b, c), value, hit in zip(part, ll, greedy, strict=True):
            result[b][c][0] += value
            result[b][c][1] &= hit
    if not all(math.isfinite(value) for row in result for value, _ in row):
        raise UserError(f"a log-likelihood is not finite: {first_bad_layer(model, tokens)}")
    return [[(value, hit) for value, hit in row] for row in result]


def first_bad_layer(model: Llama, tokens: Tensor) -> str:
    """Names the first layer whose output has NaN or Inf."""
    x = model.model.embed_tokens(tokens)
    tables = rope_tables(model.config, torch.arange(tokens.shape[1], device=tokens.device), x.dtype)
    if not x.isfinite().all():
        return "embed_tokens has NaN or Inf"
    for i, block in enumerate(model.model.layers):
        x = block(x, *tables)
        if not x.isfinite().all():
            return f"the output of layers.{i} has NaN or Inf"
    return "the logits of lm_head have NaN or Inf"


def batches(rows: list[Row], batch_tokens: int) -> list[list[int]]:
    """Indices of rows, longest first, in batches of at most batch_tokens padded tokens (or one row)."""
    parts = []
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), i)):
        if parts and len(rows[parts[-1][0]].tokens) * (len(parts[-1]) + 1) <= batch_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def score(model: Llama, documents: list[list[Scored]], batch_tokens: int, share: bool, say=None):
    """Scores every choice of every document: ([(log-likelihood, greedy) of each choice] of each document, tokens run).

    Under torchrun the batches are dealt over the ranks. A batch is the same whoever runs it, so results are identical.
    say(index, scores): called as documents are done.
    """
    skip = shared_prefix(documents) if share else 0
    prefix, computed = None, skip
    if skip:
        prefix = [[] for _ in model.model.layers]
        first = torch.tensor([documents[0][0][0][:skip]], device=model.lm_head.weight.device)
        with torch.no_grad():
            model.hidden(first, cache=prefix)
    rows = [pack(choices, share, skip) for choices in documents]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    scores = {}
    for part in batches(rows, batch_tokens)[rank::world]:
        for i, s in zip(part, score_batch(model, [rows[i] for i in part], prefix), strict=True):
            scores[i] = s
            if say:
                say(i, s)
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, scores)
        scores = {i: s for part in gathered for i, s in part.items()}
    return [scores[i] for i in range(len(rows))], computed + sum(len(row.tokens) for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# metrics


def argmax(values: list[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))  # the first of equals


def judge(document: Document, scores: list[tuple[float, bool]]) -> dict[str, float]:
    """lm-eval's metrics of one document, each 0.0 or 1.0."""
    n, ll = document.n_choices, [value for value, _ in scores]
    texts = document.choices
    chosen = {
        "acc": argmax(ll[:n]),
        "acc_norm": argmax([value / max(1, len(text)) for value, text in zip(ll, texts, strict=False)]),
        "acc_bytes": argmax([value / max(1, len(text.encode())) for value, text in zip(ll, texts, strict=False)]),
    }
    if len(ll) == 2 * n:
        chosen["acc_mutual_info"] = argmax([a - b for a, b in zip(ll[:n], ll[n:], strict=True)])
    return {metric: float(choice in document.gold) for metric, choice in chosen.items()}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error; the values are 0 or 1. No error for a single document."""
    n, p = len(values), sum(values) / len(values)
    return p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def summarise(judged: list[dict[str, float]]) -> dict:
    result = {}
    for metric in judged[0]:
        result[metric], result[f"{metric}_stderr"] = mean_and_error([j[metric] for j in judged])
    return result | {"n": len(judged)}


def rolling_metrics(documents: list[Document], lls: list[float]) -> dict:
    """Word perplexity, byte perplexity and bits per byte of a rolling task, over the words of the original page."""
    pages = [d.record["doc"].get("page", d.pairs[0][0]) for d in documents]
    n_words, n_bytes = sum(len(re.split(r"\s+", p)) for p in pages), sum(len(p.encode()) for p in pages)
    total = -sum(lls)
    return {
        "word_perplexity": math.exp(total / n_words),
        "byte_perplexity": math.exp(total / n_bytes),
        "bits_per_byte": total / n_bytes / math.log(2),
        "n": len(documents),
    }


def aggregates(results: dict[str, dict]) -> dict[str, dict]:
    """The paper's seven-task average, and MMLU over its subjects: weighted by size as lm-eval does, and unweighted."""
    out = {}
    if all(task in results for task in SEVEN):
        out["average of seven"] = {"acc": sum(results[task]["acc"] for task in SEVEN) / 7, "n": 7}
    subjects = [r for task, r in results.items() if task.startswith("mmlu_")]
    if len(subjects) > 1:
        N, k = sum(r["n"] for r in subjects), len(subjects)
        pooled = sum((r["n"] - 1) * (r["acc_stderr"] or 0) ** 2 * r["n"] for r in subjects) / (N - k)
        micro = sum(r["acc"] * r["n"] for r in subjects) / N
        out["mmlu"] = {"acc": micro, "acc_stderr": math.sqrt(pooled / N), "n": N}
        out["mmlu, mean of subjects"] = {"acc": sum(r["acc"] for r in subjects) / k, "n": k}
    return out


# ----------------------------------------------------------------------------------------------------------------------
# tasks, texts, tables


def run_task(
    model: Llama,
    tokenizer: SentencePieceProcessor,
    documents: list[Document],
    add_bos: bool = False,
    batch_tokens: int = 8192,
    share: bool = True,
    name: str | None = None,
) -> tuple[dict, list]:
    """Scores a task. Returns its results and, for each document, its scores. name: show a bar of this name."""
    max_len = model.config.max_seq_len
    if is_rolling(documents[0]):
        windows = []
        for d in documents:
            tokens = [tokenizer.bos_id()] * add_bos + tokenizer.encode(d.pairs[0][0])  # lm-eval predicts it too
            windows.append(rolling_windows(tokens, tokenizer.bos_id(), max_len))
        flat, tokens = score(model, [[w] for ws in windows for w in ws], batch_tokens, share=False)
        lls = iter(s[0][0] for s in flat)
        scores = [[(sum(next(lls) for _ in ws), False)] for ws in windows]
        return rolling_metrics(documents, [s[0][0] for s in scores]) | {"tokens": tokens}, scores
    encoded = [[encode_pair(tokenizer, *pair, add_bos, max_len) for pair in d.pairs] for d in documents]
    bar = tqdm(total=len(documents), desc=name, unit="doc", disable=None if name else True)
    right = []

    def say(i, s):
        right.append(judge(documents[i], s)["acc"])
        bar.update()
        bar.set_postfix_str(f"acc {sum(right) / len(right):.3f}", refresh=False)

    scores, tokens = score(model, encoded, batch_tokens, share, say)
    bar.close()
    judged = [judge(d, s) for d, s in zip(documents, scores, strict=True)]
    return summarise(judged) | {"tokens": tokens}, scores


@torch.no_grad()
def perplexity(model: Llama, tokens: Tensor, seqlen: int, batch_tokens: int = 16384) -> tuple[float, int]:
    """Wanda's perplexity of one long token sequence (1-D, BOS in front). Returns (perplexity, tokens in windows)."""
    windows = tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = torch.zeros(len(windows), dtype=torch.float64)
    parts = list(enumerate(windows.split(max(1, batch_tokens // seqlen))))
    for i, part in tqdm(parts[rank::world], desc="perplexity", disable=None if rank == 0 else True):
        for j, window in enumerate(part):
            window = window.to(model.lm_head.weight.device)[None]
            targets = torch.cat([window[:, 1:], window.new_full((1, 1), -100)], 1)
            total[i * max(1, batch_tokens // seqlen) + j] = model(window, targets).double().cpu() / (seqlen - 1)
    if world > 1:
        total = total.to(model.lm_head.weight.device)
        dist.all_reduce(total)
    mean = total.mean().item()
    if not math.isfinite(mean):
        raise UserError(
            f"the loss is not finite: {first_bad_layer(model, windows[:1].to(model.lm_head.weight.device))}"
        )
    return math.exp(mean), windows.numel()


def read_text(path: str, tokenizer) -> Tensor:
    """A text as WikiText-2 is read: lines, blank ones emptied, joined by a blank line; BOS in front."""
    try:
        with open(path, encoding="utf-8", newline="\n") as f:
            rows = [line if line.strip() else "" for line in f]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--ppl {path}: cannot be read as UTF-8 text: {e}") from None
    return torch.tensor([tokenizer.bos_id(), *tokenizer.encode("\n\n".join(rows))])


def log_samples(folder: str, name: str, documents: list[Document], scores: list) -> None:
    """Every choice's log-likelihood in lm-eval's own shape, so that its tools read it."""
    with atomic(Path(folder) / f"samples_{name}.jsonl") as tmp, open(tmp, "w", encoding="utf-8") as f:
        for document, s in zip(documents, scores, strict=True):
            rolling = is_rolling(document)
            resps = [str(value) if rolling else [str(value), str(hit)] for value, hit in s]
            record = document.record | {"resps": [[r] for r in resps], "filtered_resps": resps}
            judged = {} if rolling else judge(document, s)
            record |= {metric: value for metric, value in judged.items() if metric in record.get("metrics", judged)}
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def sparsity(model: Llama) -> float:
    """Share of zeros in the blocks' linears."""
    linears = [m.weight for block in model.model.layers for m in block.modules() if isinstance(m, nn.Linear)]
    return sum((w == 0).sum().item() for w in linears) / sum(w.numel() for w in linears)


def to_semi_structured(model: Llama) -> None:
    """2:4 linears through the GPU's sparse matrix units, converted one at a time. UserError where that cannot be."""
    if model.lm_head.weight.device.type != "cuda" or torch.cuda.get_device_capability() < (8, 0):
        raise UserError("--semi_structured: needs an NVIDIA GPU of compute capability 8.0 or later")
    if model.lm_head.weight.dtype not in (torch.float16, torch.bfloat16):
        raise UserError("--semi_structured: needs --dtype float16 or bfloat16")
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            if (module.weight.view(-1, 4) != 0).sum(1).max() > 2:
                raise UserError(f"--semi_structured: {name} is not 2:4 (a group of 4 has more than 2 non-zeros)")
            module.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(module.weight.data), False)


def table(results: dict[str, dict], ppl: dict[str, dict]) -> str:
    lines = []
    if results:
        lines.append(f"{'task':<28} {'acc':>15} {'acc_norm':>15} {'documents':>10}")
    for task, r in results.items():
        if "word_perplexity" in r:
            lines.append(f"{task:<28} word perplexity {r['word_perplexity']:.4f} {r['n']:>20}")
            continue
        cells = []
        for metric in ("acc", "acc_norm"):
            error = r.get(f"{metric}_stderr")
            value = f"{100 * r[metric]:.2f}" if metric in r else ""
            cells.append(value + (f" ± {100 * error:.2f}" if value and error is not None else ""))
        lines.append(f"{task:<28} {cells[0]:>15} {cells[1]:>15} {r['n']:>10,}")
    for name, p in ppl.items():
        lines.append(f"{name:<28} perplexity {p['ppl']:.3f} (seqlen {p['seqlen']:,}, {p['tokens']:,} tokens)")
    return "\n".join(lines)


def main():
    parser = Parser(
        description="Score multiple-choice tasks from lm-eval's samples files, and the perplexity of texts.",
        epilog="Perplexity is Wanda's: one BOS at the very start of the text, windows of --seqlen tokens, the tail "
        "that does not fill a window dropped, each window alone, its first token not predicted.",
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="the model: a .pt file, a Hugging Face directory or a Meta directory")
    add("--tasks", nargs="+", default=[], metavar="FILE", help="samples files of lm-eval")
    add("--ppl", nargs="+", default=[], metavar="FILE", help="plain texts")
    add("--seqlen", type=int, help="tokens in a window of --ppl (default: the model's max_seq_len)")
    add("--add_bos", action="store_true", help="put BOS before contexts, as lm-eval does since 0.4.9.2 (default: not)")
    add("--log_samples", metavar="DIR", help="write every choice's log-likelihood there, in lm-eval's shape")
    add("--batch_tokens", type=int, default=8192, help="padded tokens in a batch (default: 8192)")
    add("--no_sharing", action="store_true", help="run every choice with its own context, as lm-eval does")
    add("--semi_structured", action="store_true", help="run 2:4 linears on the GPU's sparse matrix units")
    add(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"), help="where to run"
    )
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (default: the checkpoint's)")
    add("--out", required=True, help="the results, JSON; OUT.partial holds finished tasks until all are")
    args = parser.parse_args()
    if not args.tasks and not args.ppl:
        raise UserError("nothing to do: give --tasks or --ppl")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU on this machine; --device cpu runs without one")
    if args.batch_tokens < 1 or (args.seqlen is not None and args.seqlen < 2):
        raise UserError("--batch_tokens: expected 1 or more, --seqlen: 2 or more")
    if not args.out.endswith(".json"):
        raise UserError(f"--out {args.out}: must end in .json")
    out = check_out(args.out)
    rank = int(os.environ.get("RANK", 0))
    tasks = {}
    for path in args.tasks:
        name, documents = read_task(path)
        if name in tasks:
            raise UserError(f"--tasks: two files are of task {name}")
        tasks[name] = documents

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    model, tokenizer = load(args.ckpt, getattr(torch, args.dtype or "", None), args.device)
    model.requires_grad_(False)
    if tokenizer is None:
        raise UserError(f"--ckpt {args.ckpt}: has no tokenizer; put tokenizer.model beside it")
    texts = {Path(path).stem: read_text(path, tokenizer) for path in args.ppl}
    seqlen = args.seqlen or model.config.max_seq_len
    for name, tokens in texts.items():
        if len(tokens) < seqlen or seqlen < 2:
            raise UserError(f"--ppl {name}: {len(tokens)} tokens, fewer than one window; --seqlen is {seqlen}")
    about = {"ckpt": args.ckpt, "history": model.history, "sparsity": sparsity(model), "add_bos": args.add_bos}
    if args.semi_structured:
        to_semi_structured(model)

    # finished parts are kept under a key of everything they depend on, so that an interrupted command goes on
    kept = Path(f"{out}.partial")
    key = hashlib.sha256(json.dumps([about, str(args.dtype), seqlen, os.path.getmtime(args.ckpt)]).encode()).hexdigest()
    done = json.loads(kept.read_text()) if kept.exists() else {}
    done = done if done.get("key") == key else {"key": key, "results": {}, "perplexity": {}}

    def keep():
        if rank == 0:
            with atomic(kept) as tmp:
                tmp.write_text(json.dumps(done))

    for name, documents in tasks.items():
        digest = hashlib.sha256(json.dumps([d.record["arguments"] for d in documents]).encode()).hexdigest()
        if done["results"].get(name, {}).get("digest") != digest:
            settings = (args.add_bos, args.batch_tokens, not args.no_sharing, name if rank == 0 else None)
            result, scores = run_task(model, tokenizer, documents, *settings)
            if args.log_samples and rank == 0:
                log_samples(args.log_samples, name, documents, scores)
            done["results"][name] = result | {"digest": digest}
            keep()
    for name, tokens in texts.items():
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        if done["perplexity"].get(name, {}).get("digest") != digest:
            value, n = perplexity(model, tokens, seqlen, args.batch_tokens)
            done["perplexity"][name] = {"ppl": value, "seqlen": seqlen, "tokens": n, "digest": digest}
            keep()
    results, ppl = (
        {k: {m: v for m, v in done[part][k].items() if m != "digest"} for k in names}
        for part, names in (("results", tasks), ("perplexity", texts))
    )
    results |= aggregates(results)
    if rank == 0:
        with atomic(out) as tmp:
            tmp.write_text(json.dumps(about | {"results": results, "perplexity": ppl}, indent=2) + "\n")
        kept.unlink(missing_ok=True)
        print(table(results, ppl))
        print(f"BOS {'before every context' if args.add_bos else 'not added'}; wrote {out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
