"""What it cost: accuracies as lm-eval measures them, and perplexity (section 4 of the paper).

The paper reports zero-shot accuracy on seven tasks (Tables 2, 3, 4, 5, 7 and 8), perplexity on WikiText (Table 3) and
5-shot accuracy on MMLU (Table 6).

    python evaluate.py --ckpt merged.pt --tasks samples_arc_easy_*.jsonl --ppl wikitext2_test.txt --out results.json
    torchrun --nproc_per_node=8 evaluate.py --ckpt merged.pt --tasks samples_*.jsonl --out results.json

--tasks takes what `lm_eval --model dummy --tasks T --num_fewshot K --log_samples` writes for any multiple-choice task,
or what data/lm_eval/prepare.py writes without lm-eval: one document on each line, with the context and the continuation
of each choice. lm-eval's score of a choice is log p(continuation | context), summed over the continuation's tokens:

    tokens     trailing spaces of the context move to the continuation;
               c = encode(context), t = encode(context + continuation)[len(c):]
    input      (c + t)[-(max_len + 1):][:-1]        what does not fit is cut from the left
    score      the sum over t of log_softmax(logits)[t_k]; the token at position p is predicted by the logits of
               position p - 1
    acc        1 if the choice with the highest score is right (the first of equals), otherwise 0
    acc_norm   the same with score / characters of the choice
    mc2        TruthfulQA's acc: the share of the right choices in the probability of all

What a file names as its `metrics` is reported, as far as it is computed here; the rest is named and left out.

lm-eval runs every choice with its own copy of the context. Here a document is one row: first a trunk, the longest
common prefix of its choices' inputs (so WinoGrande's two contexts share what they can), then a branch for each choice.
The tokens of a branch have the positions that they would have right after the trunk, and see only the trunk and
themselves (`branch_mask`):

    row         t0 t1 t2 | a3 a4 | b3 b4 b5
    position     0  1  2 |  3  4 |  3  4  5
    branch       0  0  0 |  1  1 |  2  2  2

What all documents of a file begin with (few-shot examples) is run once, and its keys and values serve every row. Rows
are sorted by length and put into batches by their number of tokens. The output layer runs only on the positions that
predict a target, and everything after it is float32.

Whether a beginning-of-sequence token (BOS) is put in front changes the numbers. lm-eval put none before LLaMA's
contexts until 0.4.9.1, and neither did the paper; since 0.4.9.2 lm-eval does, and so does --add_bos. The results say
which was used.

Perplexity is Wanda's. The lines of the text, blank ones emptied, are joined by blank lines, tokenised once with one BOS
in front, and cut into windows of seqlen tokens; the tail that does not fill a window is dropped. Each window is run on
its own, and the perplexity is exp(mean over windows of the mean cross-entropy of its seqlen - 1 targets). Only figures
of the same seqlen can be compared. lm-eval's `wikitext` task (rolling log-likelihood, word perplexity) is a different
number; --tasks reads its samples file too.

Known differences from lm-eval. A tokenizer.model is run by sentencepiece; transformers drops the first space of a
text that begins with one, which moves lm-eval's rolling scores of such pages by about 0.03%. lm-eval rounds scores to
the model's dtype before it compares them; here they stay float32.
"""

import argparse
import ast
import dataclasses
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data.checkpoint import (
    VERSION,
    UserError,
    atomic,
    check_out,
    check_version,
    digest,
    lock,
    parse_json,
    read_bytes,
    read_json,
    read_json_lines,
    write_json,
)
from data.tokenizer import Tokenizer
from model import (
    Llama,
    Parser,
    add_device,
    check_device,
    cli,
    count_zeros,
    cut_into_batches,
    join_processes,
    load,
    number,
    open_llama,
    rope_tables,
    tokenizer_of,
)

SEVEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # the paper's average
MMLU = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security
    conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts
    high_school_biology high_school_chemistry high_school_computer_science high_school_european_history
    high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence
    logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes
    moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine
    professional_psychology public_relations security_studies sociology us_foreign_policy virology world_religions
""".split()
AGGREGATES = ("average of seven", "mmlu", "mmlu, mean of subjects")  # what stands among the results and is no task

# ----------------------------------------------------------------------------------------------------------------------
# read: lm-eval's samples


@dataclasses.dataclass
class Document:
    """One question of a multiple-choice task, or one page of a rolling task."""

    record: dict  # as lm-eval wrote it
    pairs: list[tuple[str, str | None]]  # (context, continuation) of each choice; of a rolling task one (text, None)
    gold: set[int]  # indices of the right choices; an index that is no choice's is never right
    delimiter: str = " "  # the white space that lm-eval puts before every choice of the task
    mc2: bool = False  # whether acc is TruthfulQA's: how much of the probability the right choices have

    @property
    def rolling(self) -> bool:
        return self.pairs[0][1] is None

    @property
    def mutual_info(self) -> bool:
        """Whether every choice comes once more, after an empty context, for lm-eval's acc_mutual_info."""
        wanted = self.record.get("metrics")  # since 0.4.7; what was computed stands in the record always
        return "acc_mutual_info" in self.record or isinstance(wanted, list) and "acc_mutual_info" in wanted

    @property
    def n_choices(self) -> int:
        return len(self.pairs) // 2 if self.mutual_info else len(self.pairs)

    @property
    def choices(self) -> list[str]:
        """The choices without the delimiter."""
        return [continuation.removeprefix(self.delimiter) for _, continuation in self.pairs[: self.n_choices]]

    @property
    def metrics(self) -> tuple[list[str], list[str]]:
        """Of the metrics that the record names (all, where it names none): those computed here, and the others."""
        computed = ["acc", "acc_norm", "acc_bytes"] + ["acc_mutual_info"] * self.mutual_info
        if self.mc2:
            computed = ["acc"]
        if self.rolling:
            computed = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
        wanted = self.record.get("metrics")
        if not isinstance(wanted, list):
            return computed, []
        return [m for m in computed if m in wanted], [str(m) for m in wanted if m not in computed]

    @property
    def page(self) -> str:
        """The original text of a rolling task, whose words and bytes count; what is scored may be a cleaned form."""
        return self.record["doc"].get("page", self.pairs[0][0])


def read_task(path: str | Path) -> tuple[str, list[Document]]:
    """A samples file of lm-eval 0.4.0 to 0.4.13: (task name, documents). UserError names the line that is wrong."""
    path = Path(path)
    records = read_records(path)
    if not records:
        raise UserError(f"{path}: holds no sample")
    documents, places, seen = [], [], {}
    for where, record in records:
        # A task with several filters logs each document once for each of them, with nothing else changed.
        doc_id, logged_by = str(record.get("doc_id", where)), record.get("filter")
        same = [record.get(key) for key in ("doc_hash", "doc", "arguments")]
        before, filters = seen.setdefault(doc_id, (same, []))
        if same != before or (logged_by is not None and logged_by in filters):
            raise UserError(f"{where} has the doc_id {doc_id:.40} of another line: two files were put together")
        if not filters:
            documents.append(read_document(record, where))
            places.append(where)
        filters.append(logged_by)
        first = documents[0]
        kind = [(r["doc"].keys(), r.get("metrics")) for r in (record, first.record)]
        if record is documents[-1].record and (kind[0] != kind[1] or documents[-1].rolling != first.rolling):
            raise UserError(f"{where} is of another task than the first; give each task a file of its own")
    if documents[0].rolling and not any(document.page for document in documents):
        raise UserError(f"{path}: holds no text")
    name = re.sub(r"_\d{4}-\d\d-\d\dT.*$", "", path.stem.removeprefix("samples_"))
    if not documents[0].rolling:
        read_delimiter(documents)
        read_gold(documents, places, is_mc2(name, documents, path))
    computed, others = documents[0].metrics
    if not computed:
        raise UserError(f"{path}: is scored by {', '.join(others) or 'no metric'}, which is not computed here")
    for document, where in zip(documents, places, strict=True):
        check_logged(document, where)
    return name, documents


def read_tasks(paths: list[str]) -> dict[str, list[Document]]:
    """{task name: documents} of several samples files. UserError where two are of one task."""
    tasks = {}
    for path in paths:
        name, documents = read_task(path)
        if name in tasks:
            raise UserError(f"--tasks {path}: another file is of task {name} too")
        tasks[name] = documents
    return tasks


def read_utf8(path: str | Path) -> str:
    """The text of a file, its line ends as they are. UserError where it cannot be read."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def read_records(path: Path) -> list[tuple[str, dict]]:
    """lm-eval's records, each with its place in the file, for messages: one on each line, or one JSON array
    (until 0.4.2)."""
    # A document may hold half of a surrogate pair where nothing is scored; what is scored, `is_text` looks at.
    data = read_bytes(path)
    if data.startswith(b"["):
        records = enumerate(parse_json(data, path, list, surrogates=True), 1)
        places = [(f"{path}: sample {i}", record) for i, record in records]
    else:
        places = list(read_json_lines(path, surrogates=True))
    for where, record in places:
        if not isinstance(record, dict) or not isinstance(record.get("doc"), dict) or "arguments" not in record:
            raise UserError(f"{where} is not a sample of lm-eval's (no `doc` or `arguments`)")
    return places


def read_document(record: dict, where: str) -> Document:
    """A Document from lm-eval's record, its right choices still to be read. UserError, beginning with `where`, for what
    cannot be scored."""
    document = Document(record, read_pairs(record["arguments"], where), set())
    if document.rolling:
        if not is_text(document.page):
            raise UserError(f"{where}: its `page` is not a text")
        return document
    if document.mutual_info and len(document.pairs) % 2:
        raise UserError(f"{where}: has {len(document.pairs)} contexts for acc_mutual_info, an odd number: one was lost")
    listed = record["doc"].get("choices")  # where data sets keep them: a list, or {"text": [...], "label": [...]}
    listed = listed.get("text") if isinstance(listed, dict) else listed
    if isinstance(listed, list) and len(listed) > document.n_choices:
        raise UserError(f"{where}: has {document.n_choices} choices, its document {len(listed)}: a choice was lost")
    return document


def read_pairs(arguments: Any, where: str) -> list[tuple[str, str | None]]:
    """(context, continuation) of each choice, from [[context, continuation], ...] or, since 0.4.3, from
    {"gen_args_0": {"arg_0": context, "arg_1": continuation}, "gen_args_1": ...}; of a rolling task one (text, None)."""
    if isinstance(arguments, dict):
        names = [f"gen_args_{i}" for i in range(len(arguments))]
        if missing := [name for name in names if name not in arguments]:
            raise UserError(f"{where}: {missing[0]} is missing: a choice was lost")
        arguments = [arguments[name] for name in names]
        arguments = [[a[key] for key in sorted(a)] if isinstance(a, dict) else a for a in arguments]
    if not isinstance(arguments, list) or not all(isinstance(a, list) and a for a in arguments):
        raise UserError(f"{where}: its `arguments` are not lm-eval's")
    pairs = [(a[0], a[1] if len(a) > 1 else None) for a in arguments]
    if any(isinstance(continuation, dict) for _, continuation in pairs):  # how to generate: {"until": [...]}
        raise UserError(f"{where}: is of a generative task; only multiple-choice and rolling tasks can be scored")
    rolling = len(pairs) == 1 and pairs[0][1] is None
    texts = [pairs[0][0]] if rolling else [text for pair in pairs for text in pair]
    if not all(is_text(text) for text in texts):
        raise UserError(f"{where}: a context or a continuation is not a text")
    if not rolling and len(pairs) < 2:
        raise UserError(f"{where}: has {len(pairs)} choices, expected 2 or more")
    return pairs


def is_text(x: Any) -> bool:
    """Whether x is a string of Unicode; JSON's may hold half of a surrogate pair, which no tokenizer takes."""
    return isinstance(x, str) and not re.search("[\ud800-\udfff]", x)


def read_delimiter(documents: list[Document]) -> None:
    """Sets the delimiter of a task's choices: the white space that all of its continuations begin with."""
    # without acc_mutual_info's second half, which some versions write without the delimiter
    texts = [continuation for document in documents for _, continuation in document.pairs[: document.n_choices]]
    blanks = [text[: len(text) - len(text.lstrip())] for text in texts]
    for document in documents:
        document.delimiter = blanks[0][: common_prefix(blanks)]


def is_mc2(name: str, documents: list[Document], path: Path) -> bool:
    """Whether a task is TruthfulQA's with several right choices. Its documents hold the choices of both its tasks, and
    lm-eval logs the same target and metrics for both. UserError where neither the choices nor the name tell."""
    lists = [[d.record["doc"].get(f"{kind}_targets") for d in documents] for kind in ("mc1", "mc2")]
    mc1, mc2 = (
        all(isinstance(x, dict) and x.get("choices") == d.choices for x, d in zip(targets, documents, strict=True))
        for targets in lists
    )
    if mc2 and mc1 and "mc1" not in name and "mc2" not in name:
        raise UserError(f"{path}: is of truthfulqa_mc1 or of truthfulqa_mc2; name the file samples_TASK.jsonl")
    if "mc2" in name and not mc2:
        raise UserError(f"{path}: its acc is the share of the right choices, and its documents have no mc2_targets")
    return mc2 and ("mc2" in name or not mc1)


def read_gold(documents: list[Document], places: list[str], mc2: bool) -> None:
    """Sets the right choices of a task's documents from their `target`, or where that does not hold them, from `doc`.

    Since 0.4.4 `target` is text: "1" may be an index or a choice. Which of the two is decided for the whole file: where
    every target is a whole number within its choices, they are indices, even if a choice has the same text.
    """
    targets = []  # of documents whose gold is to be read from it: (document, target, its place)
    for document, where in zip(documents, places, strict=True):
        document.mc2 = mc2
        doc, choices = document.record["doc"], document.choices
        if mc2:
            labels = doc["mc2_targets"].get("labels")
            if not isinstance(labels, list) or len(labels) != len(choices) or 1 not in labels:
                raise UserError(f"{where}: its mc2_targets have no `labels` that name the right ones of its choices")
            document.gold = {i for i, label in enumerate(labels) if label == 1}
        elif len({context for context, _ in document.pairs}) > 1 and len(set(choices)) == 1:
            # WinoGrande: contexts differ, and target is what follows both
            if str(doc.get("answer")) not in ("1", "2"):
                raise UserError(f"{where}: contexts differ, and its document's `answer` is not 1 or 2")
            document.gold = {int(doc["answer"]) - 1}
        else:
            targets.append((document, read_target(document, where)))

    texts = [(document.choices, target) for document, target in targets if isinstance(target, str)]
    numbers = all(re.fullmatch(r"-?[0-9]{1,9}", target) for _, target in texts)
    within = numbers and all(0 <= int(target) < len(choices) for choices, target in texts)
    found = [target in choices for choices, target in texts]
    booleans = all(target in ("True", "False") and len(choices) == 2 for choices, target in texts)
    for document, target in targets:
        if isinstance(target, str) and (within or (numbers and not any(found))):
            target = int(target)
        if isinstance(target, str) and booleans and not all(found):  # no choices are called True and False
            target = int(target == "True")
        wanted = target if isinstance(target, list) else [target]
        document.gold = {x if isinstance(x, int) else index_of(x, document.choices) for x in wanted}


def read_target(document: Document, where: str) -> str | int | list:
    """The `target` of a record: a text, a number (as it was until 0.4.3), or a list of either."""
    target = document.record.get("target")
    if target is None or target == "":
        raise UserError(f"{where}: has no `target`: no gold answer")
    if isinstance(target, str) and target.startswith("[") and target not in document.choices:
        try:
            target = ast.literal_eval(target)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it may raise
            raise UserError(f"{where}: target {target[:80]!r} is not a list") from None
    if not all(isinstance(x, str | int) for x in (target if isinstance(target, list) else [target])):
        raise UserError(f"{where}: target {str(target)[:80]!r} is neither an index nor a text, nor a list of them")
    return target


def index_of(text: str, choices: list[str]) -> int:
    """The place of a text among the choices; -100, as lm-eval has it, for one that is none: it is never right."""
    if text not in choices:  # what begins every choice with a space of its own counts as delimiter
        text, choices = text.lstrip(), [choice.lstrip() for choice in choices]
    return choices.index(text) if text in choices else -100


def check_logged(document: Document, where: str) -> None:
    """UserError where a document's logged acc does not follow from the scores logged with it: then the task is scored
    by a rule of its own, or its right choices are others than those read here."""
    record = document.record
    theirs, resps = record.get("acc"), record.get("filtered_resps")
    try:
        scores = [(float(value), False) for value, _ in resps]
    except (TypeError, ValueError):  # nothing was logged, or in another shape
        return
    if len(scores) != len(document.pairs) or not all(math.isfinite(value) for value, _ in scores):
        return
    ours = document_metrics(document, scores).get("acc")
    if ours is not None and isinstance(theirs, int | float) and abs(ours - theirs) > 1e-4:
        raise UserError(f"{where}: its logged acc is {theirs:g}; by the rules known here its scores give {ours:g}")


# ----------------------------------------------------------------------------------------------------------------------
# tokenise: one row for each document

# What the model is asked, lm-eval's word: input tokens, and the targets that the last len(targets) of them predict.
Request = tuple[list[int], list[int]]


def bos_id(tokenizer: Tokenizer) -> int:
    """The BOS token. UserError where the tokenizer has none."""
    if tokenizer.bos is None:
        raise UserError("the tokenizer has no BOS, which --add_bos, --ppl, rolling tasks and empty contexts need")
    return tokenizer.bos


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, add_bos: bool, max_len: int) -> Request:
    """The request of one choice, its input at most max_len tokens. UserError where the continuation has no token."""
    # Tokens such as "▁the" begin with their space: what a context ends in belongs to the word that follows.
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    c = tokenizer.encode(context) if context else []
    t = tokenizer.encode(context + continuation)[len(c) :]
    if not t:
        raise UserError(f"the choice {continuation!r} after {context[-40:]!r} has no tokens: nothing can be scored")
    if not c and t[0] == tokenizer.bos and len(t) > 1:  # written as text, "<s>" is the context
        c, t = t[:1], t[1:]
    # Without a context BOS predicts the first token; a chat template has written its own.
    if not c or (add_bos and c[0] != bos_id(tokenizer)):
        c = [bos_id(tokenizer), *c]
    # The last target is predicted, but predicts nothing: it is no input. What does not fit goes from the left.
    return (c + t)[-(max_len + 1) :][:-1], t[-max_len:]


def rolling_windows(tokens: list[int], bos: int, max_len: int) -> list[Request]:
    """lm-eval's windows over a long text. Every token is predicted once, the first from BOS; the input of each later
    window is the max_len tokens before its last target."""
    padded = [bos, *tokens]
    windows = []
    for start in range(0, len(tokens), max_len):
        end = min(start + max_len, len(tokens))
        windows.append((padded[max(0, end - max_len) : end], tokens[start:end]))
    return windows


def common_prefix(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)  # in lexicographic order: what these two share, all share
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return n


def shared_prefix(requests: list[list[Request]]) -> int:
    """How many tokens all inputs of all documents begin with, up to the first position that predicts a target."""
    return min(
        common_prefix([tokens for choices in requests for tokens, _ in choices]),
        min(len(tokens) - len(targets) for choices in requests for tokens, targets in choices),
    )


@dataclasses.dataclass
class Row:
    """The trunk and the branches of one document, end to end, after the tokens that a cache holds."""

    tokens: list[int]
    positions: list[int]
    branch: list[int]  # of each token: 0 in the trunk, k in the branch of the k-th choice
    logit_index: list[list[int]]  # of each choice: the places in the row whose logits predict its targets
    targets: list[list[int]]  # of each choice: its targets, as many


def pack_document(requests: list[Request], share: bool, skip: int = 0) -> Row:
    """One row for the choices of a document, without the first `skip` tokens of their inputs, which a cache holds.

    share=False: no trunk, every branch is a whole input. That is what lm-eval computes, for comparison.
    """
    inputs = [tokens for tokens, _ in requests]
    trunk = common_prefix(inputs) if share else skip  # its length, the skipped tokens counted
    row = Row(inputs[0][skip:trunk], list(range(skip, trunk)), [0] * (trunk - skip), [], [])
    for k, (tokens, targets) in enumerate(requests, 1):
        start = len(row.tokens)  # where this branch begins
        predicting = range(len(tokens) - len(targets), len(tokens))  # positions in the input; some may be in the trunk
        row.logit_index.append([p - skip if p < trunk else start + p - trunk for p in predicting])
        row.targets.append(targets)
        row.tokens += tokens[trunk:]
        row.positions += range(trunk, len(tokens))
        row.branch += [k] * (len(tokens) - trunk)
    return row


# ----------------------------------------------------------------------------------------------------------------------
# score: rows in batches, batches over processes


Score = tuple[float, bool]  # of a choice: log p(targets | input) in nats; whether each target is the likeliest token
Cache = list[list[Tensor]]  # of each layer: keys and values (B, key-value heads, tokens, head_dim), see `Llama.hidden`


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are: (0, 1) unless torchrun started them."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def branch_mask(branch: Tensor, past: int) -> Tensor:
    """What each query (down) sees of the keys (across). branch (B, S) -> bool (B, 1, S, past + S), True = sees.

        branch      0  0  0  1  1  2  2  2
                   t0 t1 t2 a3 a4 b3 b4 b5
               t0   x  .  .  .  .  .  .  .
               t1   x  x  .  .  .  .  .  .
               t2   x  x  x  .  .  .  .  .
               a3   x  x  x  x  .  .  .  .
               a4   x  x  x  x  x  .  .  .
               b3   x  x  x  .  .  x  .  .
               b4   x  x  x  .  .  x  x  .
               b5   x  x  x  .  .  x  x  x

    The `past` tokens of the cache, left of these, are seen by all.
    """
    query, key = branch[:, :, None], branch[:, None, :]
    mask = ((key == 0) | (key == query)).tril()[:, None]  # (B, 1, S, S)
    return torch.cat([mask.new_ones(*mask.shape[:3], past), mask], -1)


def score_targets(
    model: Llama, x: Tensor, logit_index: list[int], targets: list[int]
) -> tuple[list[float], list[bool]]:
    """log p of each target, predicted from the hidden state x[logit_index], and whether it is the likeliest token.

    x: (N, hidden_size). 1,024 targets at a time, since logits are large; a position that predicts for several choices
    (the last of the trunk) is computed once for all of them.
    """
    log_p, likeliest = [], []
    for start in range(0, len(targets), 1024):
        part = torch.tensor(targets[start : start + 1024], device=x.device)  # (n,)
        places = torch.tensor(logit_index[start : start + 1024], device=x.device)  # (n,)
        places, inverse = places.unique(return_inverse=True)  # (u,), (n,): where among the unique ones each target is
        logits = model.lm_head(x[places]).float()  # (u, vocab_size)
        log_p += (logits[inverse, part] - logits.logsumexp(-1)[inverse]).tolist()
        likeliest += (logits.argmax(-1)[inverse] == part).tolist()
    return log_p, likeliest


@torch.no_grad()
def score_batch(model: Llama, rows: list[Row], prefix: Cache | None) -> list[list[Score]]:
    """The score of each choice of each row. prefix: keys and values of the tokens that all rows begin with."""
    device = model.lm_head.weight.device
    S = max(len(row.tokens) for row in rows)

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([values + [fill] * (S - len(values)) for values in lists], device=device)  # (B, S)

    tokens = padded([row.tokens for row in rows], 0)
    positions = padded([row.positions for row in rows], 0)
    branch = padded([row.branch for row in rows], -1)  # so that no choice sees the padding
    past = prefix[0][0].shape[2] if prefix else 0
    cache = [list(layer) for layer in prefix] if prefix else None  # a copy of the lists: hidden adds this batch's own
    mask = branch_mask(branch, past)
    if not prefix and all(len(row.targets) == 1 for row in rows):
        mask = None  # one choice a row: causal attention, for which the hardware has faster kernels
    x = model.hidden(tokens, positions, mask, cache)  # (B, S, hidden_size)

    logit_index, targets, choices = [], [], []  # of each target in the batch: where it is predicted, it, (row, choice)
    for b, row in enumerate(rows):
        for k in range(len(row.targets)):
            logit_index += [b * S + i for i in row.logit_index[k]]
            targets += row.targets[k]
            choices += [(b, k)] * len(row.targets[k])
    log_p, likeliest = score_targets(model, x.flatten(0, 1), logit_index, targets)
    scores = [[(0.0, True)] * len(row.targets) for row in rows]
    for (b, k), value, hit in zip(choices, log_p, likeliest, strict=True):
        total, greedy = scores[b][k]
        scores[b][k] = (total + value, greedy and hit)
    return scores


@torch.no_grad()
def score(
    model: Llama,
    requests: list[list[Request]],
    max_tokens: int,
    share: bool,
    name: str | None = None,
) -> tuple[list[list[Score]], int]:
    """The score of each choice of each document, and how many tokens were run for them (without padding).

    requests: those of each document's choices. name: shows a bar of this name. Under torchrun each process takes its
    share of the batches. A batch is the same whoever runs it, so that results do not depend on the number of processes.
    UserError where a score is not finite.
    """
    skip = shared_prefix(requests) if share else 0
    prefix = None
    if skip:
        tokens, _ = requests[0][0]
        prefix = [[] for _ in model.model.layers]
        model.hidden(torch.tensor([tokens[:skip]], device=model.lm_head.weight.device), cache=prefix)
    rows = [pack_document(choices, share, skip) for choices in requests]
    rank, world = rank_and_world()
    scores = {}
    parts = cut_into_batches([len(row.tokens) for row in rows], max_tokens)[rank::world]
    quiet = None if name and rank == 0 else True  # None: a bar where stderr is a terminal
    for part in tqdm(parts, desc=name, unit="batch", disable=quiet):
        for i, s in zip(part, score_batch(model, [rows[i] for i in part], prefix), strict=True):
            scores[i] = s
        if not all(math.isfinite(value) for i in part for value, _ in scores[i]):
            break  # not an error yet: it must reach the other processes, which wait below
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, scores)
        scores = {i: s for part in gathered for i, s in part.items()}
    bad = [(i, k) for i, s in scores.items() for k, (value, _) in enumerate(s) if not math.isfinite(value)]
    if bad:
        i, k = min(bad)
        raise UserError(f"a log-likelihood is not finite: {first_bad_layer(model, requests[i][k][0])}")
    return [scores[i] for i in range(len(rows))], skip + sum(len(row.tokens) for row in rows)


def first_bad_layer(model: Llama, tokens: list[int]) -> str:
    """Names the first layer whose output for these tokens has NaN or Inf."""
    x = model.model.embed_tokens(torch.tensor([tokens], device=model.lm_head.weight.device))  # (1, T, hidden_size)
    tables = rope_tables(model.config, torch.arange(len(tokens), device=x.device), x.dtype)
    if not x.isfinite().all():
        return "embed_tokens has NaN or Inf"
    for i, block in enumerate(model.model.layers):
        x = block(x, *tables)
        if not x.isfinite().all():
            return f"the output of layers.{i} has NaN or Inf"
    return "the logits of lm_head have NaN or Inf"


# ----------------------------------------------------------------------------------------------------------------------
# metrics: lm-eval's


def argmax(values: list[float]) -> int:
    """The place of the largest, the first of equals."""
    return values.index(max(values))


def document_metrics(document: Document, scores: list[Score]) -> dict[str, float]:
    """Those of lm-eval's metrics of one document that its record names: each 0.0 or 1.0, but for mc2."""
    n, texts = document.n_choices, document.choices
    values = [value for value, _ in scores]
    conditional, unconditional = values[:n], values[n:]
    if document.mc2:
        p = [math.exp(value - max(values)) for value in values]  # so that long choices do not all become 0
        return {"acc": sum(p[i] for i in document.gold) / sum(p)}
    chosen = {
        "acc": argmax(conditional),
        "acc_norm": argmax([v / max(1, len(text)) for v, text in zip(conditional, texts, strict=True)]),
        "acc_bytes": argmax([v / max(1, len(text.encode())) for v, text in zip(conditional, texts, strict=True)]),
    }
    if document.mutual_info:
        chosen["acc_mutual_info"] = argmax([a - b for a, b in zip(conditional, unconditional, strict=True)])
    computed, _ = document.metrics
    return {metric: float(chosen[metric] in document.gold) for metric in computed}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error: of values that are 0 or 1, sqrt(p (1 - p) / (n - 1)). A single value has no error."""
    n, mean = len(values), sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (n - 1) / n) if n > 1 else None


def summarise(metrics: list[dict[str, float]]) -> dict:
    """A task's results from its documents' metrics: the mean and the standard error of each, and n."""
    result = {}
    for metric in metrics[0]:  # of one task: all documents have the same
        result[metric], result[f"{metric}_stderr"] = mean_and_error([m[metric] for m in metrics])
    result["n"] = len(metrics)
    return result


def rolling_metrics(documents: list[Document], log_p: list[float]) -> dict:
    """Word perplexity, byte perplexity and bits per byte of a rolling task. log_p: of each document's text, in nats.

    A perplexity is None where it is more than a float can hold (a text without spaces is one word).
    """
    n_words = sum(len(re.split(r"\s+", d.page)) for d in documents)
    n_bytes = sum(len(d.page.encode()) for d in documents)
    total = -sum(log_p)
    exp = lambda x: math.exp(x) if x < 709 else None  # e^709.8 is the largest float
    return {
        "word_perplexity": exp(total / n_words),
        "byte_perplexity": exp(total / n_bytes),
        "bits_per_byte": total / n_bytes / math.log(2),
        "n": len(documents),
    }


def aggregates(results: dict[str, dict]) -> dict[str, dict]:
    """The paper's average of seven tasks, and MMLU over its subjects: weighted by size as lm-eval does, and unweighted.

    Each only where its tasks are among the results.
    """
    results = {task: r for task, r in results.items() if "acc" in r}
    out = {}
    if all(task in results for task in SEVEN):
        out["average of seven"] = {"acc": sum(results[task]["acc"] for task in SEVEN) / 7, "n": 7}
    # mmlu_pro, mmlu_flan, mmlu_continuation and global_mmlu are other tasks, and lm-eval has averages of their own.
    subjects = [results[f"mmlu_{subject}"] for subject in MMLU if f"mmlu_{subject}" in results]
    if len(subjects) > 1:
        k, N = len(subjects), sum(r["n"] for r in subjects)
        acc = sum(r["acc"] * r["n"] for r in subjects) / N
        squares = sum((r["n"] - 1) * (r["acc_stderr"] or 0) ** 2 * r["n"] for r in subjects)
        error = math.sqrt(squares / (N - k) / N) if k < N else None  # N = k: one document in each
        out["mmlu"] = {"acc": acc, "acc_stderr": error, "n": N}
        out["mmlu, mean of subjects"] = {"acc": sum(r["acc"] for r in subjects) / k, "n": k}
    return out


# ----------------------------------------------------------------------------------------------------------------------
# a task, from documents to results


def run_task(
    model: Llama,
    tokenizer: Tokenizer,
    documents: list[Document],
    add_bos: bool = False,
    max_tokens: int = 8192,
    share: bool = True,
    name: str | None = None,
) -> tuple[dict, list[list[Score]]]:
    """Scores a task. Returns its results and the scores of each document's choices.

    max_tokens: of a batch at most, padding counted. share=False: every choice runs with its own context. name: shows
    a bar of this name.
    """
    if documents[0].rolling:
        return run_rolling(model, tokenizer, documents, add_bos, max_tokens, name)
    max_len = model.config.max_position_embeddings
    requests = [[encode_pair(tokenizer, *pair, add_bos, max_len) for pair in d.pairs] for d in documents]
    scores, n_tokens = score(model, requests, max_tokens, share, name)
    metrics = [document_metrics(d, s) for d, s in zip(documents, scores, strict=True)]
    return {**summarise(metrics), "tokens": n_tokens}, scores


def run_rolling(
    model: Llama, tokenizer: Tokenizer, documents: list[Document], add_bos: bool, max_tokens: int, name: str | None
) -> tuple[dict, list[list[Score]]]:
    """Scores a rolling task: `run_task` for documents that are whole texts."""
    bos = bos_id(tokenizer)
    windows = []
    for d in documents:
        tokens = tokenizer.encode(d.pairs[0][0])
        if add_bos and tokens[:1] != [bos]:
            tokens = [bos, *tokens]  # lm-eval predicts the added BOS too
        windows.append(rolling_windows(tokens, bos, model.config.max_position_embeddings))
    scores, n_tokens = score(model, [[window] for ws in windows for window in ws], max_tokens, False, name)
    log_p, start = [], 0
    for ws in windows:  # back from windows to documents
        log_p.append(sum(choices[0][0] for choices in scores[start : start + len(ws)]))
        start += len(ws)
    return {**rolling_metrics(documents, log_p), "tokens": n_tokens}, [[(value, False)] for value in log_p]


# ----------------------------------------------------------------------------------------------------------------------
# perplexity: Wanda's


def read_text(path: str | Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text, read as WikiText-2 is: lines, blank ones emptied, joined by blank lines; BOS in front.
    UserError where it cannot be read."""
    lines = io.StringIO(read_utf8(path), newline="\n")  # each with its "\n", and no other character ends a line
    rows = [line if line.strip() else "" for line in lines]
    # not special: the "<unk>" of WikiText's tokenised form is text, as it was for whoever cut it into words
    return [bos_id(tokenizer), *tokenizer.encode("\n\n".join(rows), special=False)]


def read_texts(paths: list[str], tokenizer: Tokenizer, seqlen: int) -> dict[str, list[int]]:
    """{name: tokens} of several texts, the name is the file's without its suffix. UserError where two have the same,
    or one is shorter than a window of seqlen tokens."""
    texts = {}
    for path in paths:
        name, tokens = Path(path).stem, read_text(path, tokenizer)
        if name in texts:
            raise UserError(f"--ppl {path}: another file is named {name} too, and the results go by name")
        if len(tokens) == 1:
            raise UserError(f"--ppl {path}: is empty")
        if len(tokens) < seqlen:
            raise UserError(f"--ppl {path}: {len(tokens)} tokens, fewer than one window; --seqlen is {seqlen}")
        texts[name] = tokens
    return texts


def perplexity(model: Llama, tokens: list[int], seqlen: int, max_tokens: int = 8192) -> tuple[float, int]:
    """Wanda's perplexity of one long text, its tokens with BOS in front. Returns (perplexity, tokens in windows).

    A window is a request without a context: all but its first token are targets. UserError where a loss is not finite.
    """
    n = len(tokens) // seqlen
    windows = [tokens[i * seqlen : (i + 1) * seqlen] for i in range(n)]
    requests = [[(window[:-1], window[1:])] for window in windows]
    scores, _ = score(model, requests, max_tokens, share=False, name="perplexity")
    mean = -sum(choices[0][0] for choices in scores) / (n * (seqlen - 1))  # nats a token
    if mean > 709:  # e^709.8 is the largest float
        raise UserError(f"the mean loss is {mean:.0f} nats a token: its perplexity is more than a float can hold")
    return math.exp(mean), n * seqlen


# ----------------------------------------------------------------------------------------------------------------------
# the model as it is measured


def share_of_zeros(model: Llama) -> float:
    """The share of zeros in the blocks' linears: the model's sparsity."""
    linears = [m.weight for block in model.model.layers for m in block.modules() if isinstance(m, nn.Linear)]
    return sum(count_zeros(w) for w in linears) / sum(w.numel() for w in linears)


def to_semi_structured(model: Llama) -> None:
    """Runs 2:4 linears on the GPU's sparse matrix units, converted one at a time. UserError for one that cannot be."""
    if model.lm_head.weight.device.type != "cuda" or torch.cuda.get_device_capability() < (8, 0):
        raise UserError("--semi_structured: needs an NVIDIA GPU of compute capability 8.0 or later")
    if model.lm_head.weight.dtype not in (torch.float16, torch.bfloat16):
        raise UserError("--semi_structured: needs --dtype float16 or bfloat16")
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            if module.in_features % 4 or (module.weight.view(-1, 4) != 0).sum(1).max() > 2:
                raise UserError(f"--semi_structured: {name} is not 2:4 (a group of 4 has more than 2 non-zeros)")
            try:
                sparse = torch.sparse.to_sparse_semi_structured(module.weight.data)
            except RuntimeError as e:  # rows or columns that are no multiple of what the units take
                raise UserError(f"--semi_structured: {name}: {e}") from None
            module.weight = nn.Parameter(sparse, False)
            # cuSPARSELt writes a transposed output, from which attention's fast kernels turn away
            module.register_forward_hook(lambda module, args, y: y.contiguous())


# ----------------------------------------------------------------------------------------------------------------------
# what a run leaves


def log_samples(path: Path, documents: list[Document], scores: list[list[Score]]) -> None:
    """Every choice's log-likelihood in lm-eval's own shape, so that its tools read it."""
    # Half a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape again
    with atomic(path) as tmp, open(tmp, "w", encoding="utf-8", errors="backslashreplace") as f:
        for document, s in zip(documents, scores, strict=True):
            resps = [str(value) if document.rolling else [str(value), str(hit)] for value, hit in s]
            metrics = {} if document.rolling else document_metrics(document, s)
            record = {**document.record, "resps": [[r] for r in resps], "filtered_resps": resps, **metrics}
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def samples_file(folder: str, name: str) -> Path:
    """Where --log_samples puts a task."""
    return Path(folder) / f"samples_{name}.jsonl"


def read_finished(file: Path) -> dict[str, dict]:
    """What an interrupted command has left: {digest of all that a result depends on: the result}."""
    if not file.exists():
        return {}
    saved = read_json(file, dict)
    check_version(saved.get("version"), file)
    finished = saved.get("finished")
    if not isinstance(finished, dict) or not all(isinstance(result, dict) for result in finished.values()):
        raise UserError(f"{file}: is damaged; remove {file.parent} to begin again")
    return finished


def table(results: dict[str, dict], ppl: dict[str, dict]) -> str:
    """The results as lines to read: accuracies and their standard errors in percent, then perplexities."""
    lines = []
    if results:
        lines.append(f"{'task':<28} {'acc':>15} {'acc_norm':>15} {'documents':>10}")
    for task, r in results.items():
        if "word_perplexity" in r:
            value = "too large" if r["word_perplexity"] is None else f"{r['word_perplexity']:.4f}"
            lines.append(f"{task:<28} word perplexity {value} {r['n']:>20}")
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


# ----------------------------------------------------------------------------------------------------------------------
# the command


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description="Score multiple-choice tasks from lm-eval's samples files, and the perplexity of texts.",
        epilog="Perplexity is Wanda's: one BOS at the very start of the text, windows of --seqlen tokens, the tail "
        "that does not fill a window dropped, each window alone, its first token not predicted.",
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="the model: a .pt file, a Hugging Face directory or a Meta directory")
    add("--tasks", nargs="+", default=[], metavar="FILE", help="samples files of lm-eval")
    add("--ppl", nargs="+", default=[], metavar="FILE", help="plain texts")
    add("--seqlen", type=number(int, 2), help="tokens in a window of --ppl (default: the model's positions)")
    add("--add_bos", action="store_true", help="put BOS before contexts, as lm-eval does since 0.4.9.2 (default: not)")
    add("--log_samples", metavar="DIR", help="write every choice's log-likelihood there, in lm-eval's shape")
    add("--max_tokens", type=number(int, 1), default=8192, help="padded tokens in a batch of one process")
    add("--no_sharing", action="store_true", help="run every choice with its own context, as lm-eval does")
    add("--semi_structured", action="store_true", help="run 2:4 linears on the GPU's sparse matrix units")
    add_device(parser)
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (default: the checkpoint's)")
    add("--out", required=True, help="the results, JSON; the folder OUT.partial holds finished tasks until all are")
    args = parser.parse_args()
    if not args.tasks and not args.ppl:
        raise UserError("nothing to do: give --tasks or --ppl")
    check_device(args.device)
    return args


def main() -> None:
    # --- what the command names, checked before any weight is read
    args = parse_args()
    tasks = read_tasks(args.tasks)
    outputs = {args.out: "--out"}
    if args.log_samples:
        for name in tasks:
            outputs[samples_file(args.log_samples, name)] = "--log_samples"
    if not args.out.endswith(".json"):
        raise UserError(f"--out {args.out}: must end in .json")
    for path, flag in outputs.items():
        check_out(path, flag, [args.ckpt, *args.tasks, *args.ppl])
    ckpt, config = open_llama(args.ckpt)
    tokenizer = tokenizer_of(ckpt)
    if tokenizer is None:
        raise UserError(f"--ckpt {args.ckpt}: has no tokenizer; put tokenizer.model or tokenizer.json beside it")
    seqlen = args.seqlen or config.max_position_embeddings
    if seqlen is None:
        raise UserError(f"--ckpt {args.ckpt}: does not tell the length that it was trained on; give it by --seqlen")
    texts = read_texts(args.ppl, tokenizer, seqlen)

    # --- the processes, and the folder OUT.partial, in which rank 0 alone reads and writes
    rank, world = join_processes(args.device)
    work = Path(f"{args.out}.partial")
    shared = [None, None]
    if rank == 0:
        held = lock(work)  # noqa: F841  until the process ends
        shared = [ckpt.fingerprint(), read_finished(work / "finished.json")]
    if world > 1:
        dist.broadcast_object_list(shared)  # so that all of them leave out the same tasks
    fingerprint, finished = shared
    limit = config.max_position_embeddings
    if rank == 0 and args.ppl and limit is not None and limit < seqlen:
        print(f"note: --seqlen {seqlen}: is more than the model's {limit} positions", file=sys.stderr)

    # --- the model
    model, _ = load(args.ckpt, getattr(torch, args.dtype) if args.dtype else None, args.device)
    model.requires_grad_(False)
    if model.config.max_position_embeddings is None:
        model.config.max_position_embeddings = seqlen  # to which contexts of --tasks are cut, too
    sparsity = share_of_zeros(model)
    head = {"ckpt": args.ckpt, "history": model.history, "sparsity": sparsity, "add_bos": args.add_bos}
    if args.semi_structured:
        to_semi_structured(model)

    # --- its results, each of which is kept once it is there. What a result depends on is its key; neither --max_tokens
    # nor --device is a part of it: when memory runs out, another one may go on.
    flags = [args.dtype, args.no_sharing, args.semi_structured, args.log_samples]
    settings = [head, fingerprint, tokenizer.fingerprint, flags, model.config.max_position_embeddings]
    results, ppl = {}, {}
    for name, documents in tasks.items():
        key = digest(settings, name, [d.record for d in documents])
        if key not in finished:
            result, scores = run_task(
                model, tokenizer, documents, args.add_bos, args.max_tokens, share=not args.no_sharing, name=name
            )
            finished[key] = result
            if rank == 0:
                if args.log_samples:
                    log_samples(samples_file(args.log_samples, name), documents, scores)
                write_json(work / "finished.json", {"version": VERSION, "finished": finished})
        results[name] = finished[key]
    for name, tokens in texts.items():
        key = digest(settings, name, seqlen, tokens)
        if key not in finished:
            value, n_tokens = perplexity(model, tokens, seqlen, args.max_tokens)
            finished[key] = {"ppl": value, "seqlen": seqlen, "tokens": n_tokens}
            if rank == 0:
                write_json(work / "finished.json", {"version": VERSION, "finished": finished})
        ppl[name] = finished[key]
    results.update(aggregates(results))
    if rank == 0:
        write_json(args.out, {"version": VERSION, **head, "results": results, "perplexity": ppl})
        shutil.rmtree(work, ignore_errors=True)
        print(table(results, ppl))
        for name, documents in tasks.items():
            _, others = documents[0].metrics
            if others:
                print(f"{name}: {', '.join(others)} is not computed here, and left out")
        print(f"BOS {'before every context' if args.add_bos else 'not added'}; wrote {args.out}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main, "a smaller --max_tokens or --seqlen, or --dtype bfloat16")
