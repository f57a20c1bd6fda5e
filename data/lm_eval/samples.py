"""lm-eval's samples files: documents with their contexts, choices and right answers, and the metrics of one document.

A file of `lm_eval --log_samples` has one document on each line (0.4.0 to 0.4.2: one JSON array), which says what was
asked, `arguments`, and which answer is right, `target`; what else stands in `doc` is the data set's own. Conventions
have changed between versions and differ between tasks. What a file does not state is not guessed: it is refused, by the
line.
"""

import ast
import codecs
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

from data.checkpoint import UserError, parse_json, parse_json_lines, read_bytes

Score = tuple[float, bool]  # of a choice: log p(targets | input) in nats; whether each target is the likeliest token


@dataclasses.dataclass
class Document:
    """One question of a multiple-choice task, or one page of a rolling task. The last four are set by `read_task`."""

    record: dict  # as lm-eval wrote it
    pairs: list[tuple[str, str | None]]  # (context, continuation) of each choice; of a rolling task one (text, None)
    rolling: bool = False  # whether it is a page, every token of which is predicted
    page: str = ""  # its original text, whose words and bytes count; what is scored may be a cleaned form
    mutual_info: bool = False  # whether each choice comes once more, after an empty context, for acc_mutual_info
    choices: list[str] | None = None  # without the white space that lm-eval puts before every choice of the task
    mc2: bool = False  # whether acc is TruthfulQA's: how much of the probability the right choices have
    gold: set[int] | None = None  # indices of the right choices; an index that is no choice's is never right
    metrics: list[str] | None = None  # of those that the record names (all, where it names none) those computed here


def read_task(path: str | Path) -> tuple[str, list[Document]]:
    """A samples file of lm-eval 0.4.0 to 0.4.13: (task name, documents). UserError names the line that is wrong."""
    path = Path(path)
    records = without_repeats(read_records(path))
    if not records:
        raise UserError(f"{path}: holds no sample")
    documents = [read_document(record, where) for where, record in records]
    places = [where for where, _ in records]
    kinds = [(d.rolling, d.record["doc"].keys(), d.record.get("metrics")) for d in documents]
    for kind, where in zip(kinds, places, strict=True):
        if kind != kinds[0]:
            raise UserError(f"{where} is of another task than the first; give each task a file of its own")
    name = re.sub(r"_\d{4}-\d\d-\d\dT.*$", "", path.stem.removeprefix("samples_"))
    if not documents[0].rolling:
        strip_delimiter(documents)
        set_mc2(name, documents, path)
        read_gold(documents, places)
    elif not any(text for document in documents for text, _ in document.pairs):
        raise UserError(f"{path}: holds no text")
    for document in documents:
        document.metrics, others = known_metrics(document)
    if not document.metrics:
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


def read_records(path: Path) -> list[tuple[str, dict]]:
    """lm-eval's records, each with its place in the file, for messages: one on each line, or one JSON array
    (until 0.4.2)."""
    # A document may hold half of a surrogate pair where nothing is scored; what is scored, `is_text` looks at.
    data = read_bytes(path)
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        records = enumerate(parse_json(data, path, list, surrogates=True), 1)
        places = [(f"{path}: sample {i}", record) for i, record in records]
    else:
        places = list(parse_json_lines(data, path, surrogates=True))
    for where, record in places:
        if not isinstance(record, dict) or not isinstance(record.get("doc"), dict) or "arguments" not in record:
            raise UserError(f"{where} is not a sample of lm-eval's (no `doc` or `arguments`)")
    return places


def without_repeats(records: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The records, but of a document that was logged for several filters only the first."""
    kept, seen = [], {}
    for where, record in records:
        doc_id, logged_by = str(record.get("doc_id", where)), record.get("filter")
        same = [record.get(key) for key in ("doc_hash", "doc", "arguments")]
        before, filters = seen.setdefault(doc_id, (same, []))
        # A task with several filters logs each document once for each of them, with nothing else changed.
        if same != before or (logged_by is not None and logged_by in filters):
            raise UserError(f"{where} has the doc_id {doc_id:.40} of another line: two files were put together")
        if not filters:
            kept.append((where, record))
        filters.append(logged_by)
    return kept


def read_document(record: dict, where: str) -> Document:
    """A Document from lm-eval's record; what only the whole file tells, `read_task` adds. UserError, beginning with
    `where`, for what cannot be scored."""
    pairs, doc = read_pairs(record["arguments"], where), record["doc"]
    if pairs[0][1] is None:
        page = pairs[0][0]
        if doc.keys() == {"page"}:  # wikitext's, of which a cleaned form is scored
            page = doc["page"]
        if not is_text(page):
            raise UserError(f"{where}: its `page` is not a text")
        return Document(record, pairs, rolling=True, page=page)
    n, wanted = len(pairs), record.get("metrics")  # since 0.4.7; what was computed stands in the record always
    mutual_info = "acc_mutual_info" in record or isinstance(wanted, list) and "acc_mutual_info" in wanted
    if mutual_info:
        if n % 2:
            raise UserError(f"{where}: has {n} contexts for acc_mutual_info, an odd number: one was lost")
        n //= 2
    listed = doc.get("choices")  # where data sets keep them: a list, or {"text": [...], "label": [...]}
    if isinstance(listed, dict):
        listed = listed.get("text")
    if isinstance(listed, list) and sum(choice is not None for choice in listed) > n:
        raise UserError(f"{where}: has {n} choices, its document {len(listed)}: a choice was lost")
    # Without the second half of acc_mutual_info, which some versions write without the delimiter
    return Document(record, pairs, mutual_info=mutual_info, choices=[continuation for _, continuation in pairs[:n]])


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
    if not rolling and len(pairs) < 2:  # LAMBADA's word
        raise UserError(f"{where}: has {len(pairs)} continuation, nothing to choose from; expected 2 or more choices")
    return pairs


def is_text(x: Any) -> bool:
    """Whether x is a string of Unicode; JSON's may hold half of a surrogate pair, which no tokenizer takes."""
    return isinstance(x, str) and not re.search("[\ud800-\udfff]", x)


def strip_delimiter(documents: list[Document]) -> None:
    """Takes the delimiter from a task's choices: the white space that all of them begin with, no more of it than the
    record states, as prepare.py's does."""
    texts = [choice for document in documents for choice in document.choices]
    n = len(os.path.commonprefix([text[: len(text) - len(text.lstrip())] for text in texts]))
    stated = documents[0].record.get("target_delimiter")
    if isinstance(stated, str):
        n = min(n, len(stated))
    for document in documents:
        document.choices = [choice[n:] for choice in document.choices]


def set_mc2(name: str, documents: list[Document], path: Path) -> None:
    """Sees whether a task is TruthfulQA's with several right choices. Its documents hold the choices of both its tasks,
    and lm-eval logs the same target and metrics for both. UserError where neither the choices nor the name tell."""

    def fits(kind: str) -> bool:
        lists = [document.record["doc"].get(f"{kind}_targets") for document in documents]
        return all(isinstance(x, dict) and x.get("choices") == d.choices for x, d in zip(lists, documents, strict=True))

    mc1, mc2 = fits("mc1"), fits("mc2")
    if mc2 and mc1 and "mc1" not in name and "mc2" not in name:
        raise UserError(f"{path}: is of truthfulqa_mc1 or of truthfulqa_mc2; name the file samples_TASK.jsonl")
    if "mc2" in name and not mc2:
        raise UserError(f"{path}: its acc is the share of the right choices, and its documents have no mc2_targets")
    for document in documents:
        document.mc2 = mc2 and ("mc2" in name or not mc1)


def read_gold(documents: list[Document], places: list[str]) -> None:
    """Sets the right choices of a task's documents: one convention after the other."""
    by_target = []  # (document, its target), where `doc` does not tell
    for document, where in zip(documents, places, strict=True):
        doc, choices = document.record["doc"], document.choices
        contexts = {context for context, _ in document.pairs}
        if document.mc2:
            # TruthfulQA's mc2: a label for each choice, 1 where it is right.
            labels = doc["mc2_targets"].get("labels")
            if not isinstance(labels, list) or len(labels) != len(choices) or 1 not in labels:
                raise UserError(f"{where}: its mc2_targets have no `labels` that name the right ones of its choices")
            document.gold = {i for i, label in enumerate(labels) if label == 1}
        elif len(contexts) > 1 and len(set(choices)) == 1:
            # WinoGrande: contexts differ, `target` is what follows both, and `answer` counts from 1.
            if str(doc.get("answer")) not in ("1", "2"):
                why = "and its document has no `answer` of 1 or 2, as WinoGrande's"
                raise UserError(f"{where}: contexts differ and not what follows, {why}: which is right is not stated")
            document.gold = {int(doc["answer"]) - 1}
        else:
            by_target.append((document, read_target(document, where)))

    # Since 0.4.4 `target` is text, and "1" may be an index or a choice. The whole file decides which.
    texts = [(document.choices, target) for document, target in by_target if isinstance(target, str)]
    numbers = all(re.fullmatch(r"-?[0-9]{1,9}", target) for _, target in texts)
    found = [target in choices for choices, target in texts]
    # Whole numbers, each within its choices, are indices, even if a choice has the same text. So are numbers that are
    # no choice anywhere: some are out of range, and never right.
    indices = numbers and (all(0 <= int(target) < len(choices) for choices, target in texts) or not any(found))
    # True and False are indices of two choices, unless these are called so.
    booleans = all(target in ("True", "False") and len(choices) == 2 for choices, target in texts) and not all(found)
    for document, target in by_target:
        if isinstance(target, str) and indices:
            target = int(target)
        elif isinstance(target, str) and booleans:
            target = int(target == "True")
        wanted = target if isinstance(target, list) else [target]  # of a list, any is right
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
            if not re.search(r"[^\W\d_]", target):  # with a letter it is a text that begins so
                raise UserError(f"{where}: target {target[:80]!r} is not a list") from None
    if not all(isinstance(x, str | int) for x in (target if isinstance(target, list) else [target])):
        raise UserError(f"{where}: target {str(target)[:80]!r} is neither an index nor a text, nor a list of them")
    return target


def index_of(text: str, choices: list[str]) -> int:
    """The place of a text among the choices; -100, as lm-eval has it, for one that is none: it is never right."""
    if text not in choices:  # what begins every choice with a space of its own counts as delimiter
        text, choices = text.lstrip(), [choice.lstrip() for choice in choices]
    return choices.index(text) if text in choices else -100


def known_metrics(document: Document) -> tuple[list[str], list[str]]:
    """Of the metrics that a record names (all, where it names none): those that are computed here, and the others."""
    computed = ["acc", "acc_norm", "acc_bytes"]
    if document.rolling:
        computed = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    elif document.mc2:
        computed = ["acc"]
    elif document.mutual_info:
        computed.append("acc_mutual_info")
    wanted = document.record.get("metrics")
    if not isinstance(wanted, list):  # until 0.4.6
        return computed, []
    return [m for m in computed if m in wanted], [str(m) for m in wanted if m not in computed]


def argmax(values: list[float]) -> int:
    """The place of the largest, the first of equals."""
    return values.index(max(values))


def document_metrics(document: Document, scores: list[Score]) -> dict[str, float | list]:
    """The metrics of one document: each 0.0 or 1.0, but for mc2; of a page [log p, words or bytes], as lm-eval's."""
    values, texts = [value for value, _ in scores], document.choices
    if document.rolling:
        return {metric: [values[0], count] for metric, count in page_counts(document).items()}
    if document.mc2:
        p = [math.exp(value - max(values)) for value in values]  # so that long choices do not all become 0
        return {"acc": sum(p[i] for i in document.gold) / sum(p)}
    n = len(texts)
    conditional, unconditional = values[:n], values[n:]
    chosen = {
        "acc": argmax(conditional),
        "acc_norm": argmax([v / max(1, len(text)) for v, text in zip(conditional, texts, strict=True)]),
        "acc_bytes": argmax([v / max(1, len(text.encode())) for v, text in zip(conditional, texts, strict=True)]),
    }
    if document.mutual_info:
        chosen["acc_mutual_info"] = argmax([a - b for a, b in zip(conditional, unconditional, strict=True)])
    return {metric: float(chosen[metric] in document.gold) for metric in document.metrics}


def n_words(page: str) -> int:
    """How many words lm-eval counts."""
    return len(re.split(r"\s+", page))


def page_counts(document: Document) -> dict[str, int]:
    """What each metric of a rolling document is a mean over: the words or the bytes of its page."""
    words, n_bytes = n_words(document.page), len(document.page.encode())
    counts = {"word_perplexity": words, "byte_perplexity": n_bytes, "bits_per_byte": n_bytes}
    return {metric: counts[metric] for metric in document.metrics}


def check_logged(document: Document, where: str) -> None:
    """UserError where a document's logged metrics do not follow from the scores logged with it: then the task is scored
    by a rule of its own, or its right choices are others than those read here."""
    record = document.record
    if document.rolling:
        for metric, n in page_counts(document).items():
            logged = record.get(metric)
            if isinstance(logged, list) and len(logged) == 2 and logged[1] != n:
                raise UserError(f"{where}: {metric} was logged over {logged[1]}, and its text has {n}")
        return
    resps = record.get("filtered_resps")
    try:
        scores = [(float(value), False) for value, _ in resps]
    except (TypeError, ValueError, OverflowError):  # nothing was logged, or in another shape
        return
    if len(scores) != len(document.pairs) or not all(math.isfinite(value) for value, _ in scores):
        return
    for metric, ours in document_metrics(document, scores).items():
        theirs = record.get(metric)
        if isinstance(theirs, int | float) and abs(ours - theirs) > 1e-4:
            why = f"its task has another rule for {metric} than is computed here, or its right choices are read wrongly"
            raise UserError(f"{where}: {why}: {metric} {theirs:g} is logged, and its logged scores give {ours:g}")
