"""What evaluate.py promises: lm-eval's numbers from lm-eval's files, contexts shared, every edge case its way."""

import gc
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from conftest import SHARED, needs_shared
from forks import FORKS, ROOT, Job

import evaluate
from bench.memory import LiveBytes
from data.checkpoint import UserError
from data.lm_eval.samples import Document, document_metrics, read_document, read_task
from data.tokenizer import load_tokenizer
from evaluate import Request, aggregates, branch_mask, cut, encode_pair, encode_text, make_part, pack_document
from evaluate import read_text
from evaluate import rolling_windows, run_task
from model import PRESETS, Llama, LlamaConfig, cli, load, save

SAMPLES = SHARED / "lm_eval" / "samples"


def record(i: int, context, choices, target="0", **more) -> dict:
    """A sample as lm-eval writes it; context: one for all choices, or a list of one each."""
    contexts = context if isinstance(context, list) else [context] * len(choices)
    pairs = zip(contexts, choices, strict=True)
    arguments = {f"gen_args_{k}": {"arg_0": c, "arg_1": f" {t}"} for k, (c, t) in enumerate(pairs)}
    return {"doc_id": i, "doc": {"q": str(i)}, "target": target, "arguments": arguments} | more


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def made_up(n=12, seed=0) -> list[dict]:
    """Samples of made-up words, all behind the same examples."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choice("bdgkmnr") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    text = lambda k: " ".join(word() for _ in range(k))
    shots = text(20)
    question = lambda: f"{shots}\n\nQuestion: {text(rng.randint(2, 9))}\nAnswer:"
    choices = lambda: [text(rng.randint(1, 4)) for _ in range(4)]
    return [record(i, question(), choices(), str(rng.randrange(4))) for i in range(n)]


@pytest.fixture(scope="module")
def model(random_checkpoint):
    return load(random_checkpoint)[0]


def score(model, requests: list[list[Request]], max_tokens: int, share: bool) -> tuple[list, int]:
    """The scores of rows made of these requests, and how many tokens were run."""
    part = make_part(requests, list(range(len(requests))), share)
    evaluate.score(model, [part], max_tokens)
    return [part.scores[i] for i in range(len(requests))], part.past() + sum(len(row.tokens) for row in part.rows)


def perplexity(model, tokens: list[int], seqlen: int, max_tokens: int = 8192) -> tuple[float, int]:
    part = encode_text(tokens, seqlen)
    evaluate.score(model, [part], max_tokens)
    results = evaluate.text_results(part, seqlen)
    return results["ppl"], results["tokens"]


def reference(model, tokenizer, context, continuation, add_bos=False):
    """log p of one continuation: one sequence, one forward, a loop over its tokens."""
    bos = [tokenizer.bos] if add_bos or not context else []
    c, whole = bos + tokenizer.encode(context), bos + tokenizer.encode(context + continuation)
    with torch.no_grad():
        logp = model(torch.tensor([whole]))[0].double().log_softmax(-1)
    return sum(logp[p - 1, whole[p]].item() for p in range(len(c), len(whole)))


def command(checkpoint, out, *flags) -> list[str]:
    line = [ROOT / "evaluate.py", "--ckpt", checkpoint, "--out", out, "--device", "cpu", *flags]
    return [str(x) for x in line]


def start(checkpoint, out, *flags, processes=1) -> Job:
    return Job(*command(checkpoint, out, *flags), processes=processes)


def run(checkpoint, out, *flags, processes=1) -> str:
    """The command in processes of its own, to its end. Returns what it said."""
    job = start(checkpoint, out, *flags, processes=processes)
    assert set(job.wait()) == {0}, job.text
    return job.text


@pytest.fixture
def main(monkeypatch):
    """main(checkpoint, out, *flags): the command without a process of its own."""

    def main(checkpoint, out, *flags):
        monkeypatch.setattr(sys, "argv", command(checkpoint, out, *flags))
        evaluate.main()

    return main


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(checkpoint, out, *flags): the line that the command ends in, having checked that it is one, and alone."""

    def refused(checkpoint, out, *flags):
        monkeypatch.setattr(sys, "argv", command(checkpoint, out, *flags))
        with pytest.raises(SystemExit) as e:
            cli(evaluate.main)
        said = capsys.readouterr()
        assert e.value.code == 2 and said.out == "" and len(said.err.splitlines()) == 1, said
        assert said.err.startswith("evaluate.py: error: ")
        del e
        gc.collect()  # the traceback, and with it the lock on OUT.partial
        return said.err

    return refused


@pytest.fixture(scope="module")
def no_bos(tmp_path_factory):
    """A tokenizer without BOS."""
    folder = tmp_path_factory.mktemp("no_bos")
    (folder / "text.txt").write_text("bada kimu dogu ruku: the quick brown fox\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        bos_id=-1,
    )
    return load_tokenizer(folder / "tokenizer.model")


# ----------------------------------------------------------------------------------------------------------------------
# against lm-eval itself


@needs_shared
@pytest.mark.parametrize("run_name", ["0shot", "0shot_nobos", "2shot", "mmlu5"])
def test_log_likelihoods_accuracies_and_errors_are_lm_evals(run_name):
    model, tokenizer = load(SHARED / "lm_eval" / "tiny_llama")
    theirs = json.loads((SAMPLES / f"hf_{run_name}__results.json").read_text())["results"]
    for path in SAMPLES.glob(f"hf_{run_name}__*.jsonl"):
        name, documents = read_task(path)
        if documents[0].rolling:
            continue
        result, scores = run_task(model, tokenizer, documents, add_bos=run_name != "0shot_nobos")
        for document, s in zip(documents, scores, strict=True):
            for (ll, greedy), (value, hit) in zip(s, document.record["filtered_resps"], strict=True):
                assert ll == pytest.approx(float(value), abs=1e-3) and str(greedy) == hit
        for metric, value in theirs[name.split("__")[1]].items():
            metric, _, kind = metric.partition(",")
            if kind == "none" and metric in result:
                assert result[metric] == pytest.approx(value, abs=1e-12), (name, metric)


@needs_shared
def test_rolling_scores_are_lm_evals():
    model, tokenizer = load(SHARED / "lm_eval" / "tiny_llama")
    _, documents = read_task(SAMPLES / "hf_0shot__wikitext_local.jsonl")
    # tokenizer.json drops the first space of a text that begins with one, sentencepiece does not: only the others
    documents = [d for d in documents if not d.pairs[0][0].startswith(" ")]
    _, scores = run_task(model, tokenizer, documents, add_bos=True)
    ours = [s[0][0] for s in scores]
    assert documents and ours == pytest.approx([float(d.record["filtered_resps"][0]) for d in documents], rel=1e-5)


@needs_shared
@pytest.mark.parametrize(
    "file, at_least",
    [
        ("0shot__arc_easy", 2.7),
        ("0shot__openbookqa", 2.3),
        ("0shot__winogrande", 1.5),
        ("mmlu5__mmlu_us_foreign_policy", 4.0),
    ],
)
def test_shared_contexts_save_the_stated_share_of_tokens(file, at_least):
    """lm-eval 0.4.13 runs each choice with its context, but one-token continuations of one context together."""
    _, tokenizer = load(SHARED / "lm_eval" / "tiny_llama")
    _, documents = read_task(SAMPLES / f"hf_{file}_local.jsonl")
    encoded = [[cut(*encode_pair(tokenizer, *pair, True), 2048) for pair in d.pairs] for d in documents]
    theirs = 0
    for choices in encoded:
        runs = {(tuple(tokens), tuple(targets) if len(targets) > 1 else ()) for tokens, targets in choices}
        theirs += sum(len(tokens) for tokens, _ in runs)
    skip = evaluate.shared_prefix(encoded)
    ours = skip + sum(len(pack_document(choices, True, skip).tokens) for choices in encoded)
    assert theirs / ours >= at_least


# ----------------------------------------------------------------------------------------------------------------------
# scoring


@pytest.mark.parametrize("add_bos", (False, True))
def test_scores_equal_one_forward_per_choice(model, tokenizer, tmp_path, add_bos):
    _, documents = read_task(write(tmp_path / "samples_t.jsonl", made_up()))
    encoded = [[cut(*encode_pair(tokenizer, *pair, add_bos), 128) for pair in d.pairs] for d in documents]
    for share in (True, False):
        scores, _ = score(model, encoded, 300, share)
        for document, s in zip(documents, scores, strict=True):
            for (ll, _), pair in zip(s, document.pairs, strict=True):
                assert ll == pytest.approx(reference(model, tokenizer, *pair, add_bos), abs=1e-4)


def test_sharing_computes_fewer_tokens(model, tokenizer, tmp_path):
    _, documents = read_task(write(tmp_path / "samples_t.jsonl", made_up()))
    encoded = [[cut(*encode_pair(tokenizer, *pair, False), 128) for pair in d.pairs] for d in documents]
    assert evaluate.shared_prefix(encoded) > 20
    assert score(model, encoded, 300, True)[1] < 0.4 * score(model, encoded, 300, False)[1]


def test_branches_see_the_trunk_and_themselves_as_drawn():
    drawn = re.findall(r"^ +[tab]\d  ((?: +[x.]){8})$", branch_mask.__doc__, re.M)
    expected = torch.tensor([[cell == "x" for cell in line.split()] for line in drawn])
    mask = branch_mask(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]), past=3)  # (1, 1, 8, 11)
    assert mask[0, 0, :, :3].all() and torch.equal(mask[0, 0, :, 3:], expected)


def test_contexts_that_differ_share_what_they_can(model, tokenizer):
    pairs = [("bada kimu, bada", " ruku"), ("bada kimu, dogi", " ruku")]  # as WinoGrande
    encoded = [cut(*encode_pair(tokenizer, *pair, False), 128) for pair in pairs]
    row = pack_document(encoded, share=True)
    assert len(row.tokens) < sum(len(x) for x, _ in encoded)
    scores, _ = score(model, [encoded], 300, True)
    assert [s[0] for s in scores[0]] == pytest.approx([reference(model, tokenizer, *pair) for pair in pairs], abs=1e-4)


@pytest.mark.parametrize(
    "pairs",
    [
        [("", " bada"), ("", " kimu dogu")],  # an empty context: BOS stands for it
        [("bada ", "kimu"), ("bada ", "dogu")],  # trailing spaces belong to the continuation
        [("bada", " kimu"), ("bada", " kimu dogu")],  # one choice begins another
        [("bada", "  kimu"), ("bada", " ä€")],
    ],
)
def test_odd_contexts_score_as_one_forward_does(model, tokenizer, pairs):
    encoded = [cut(*encode_pair(tokenizer, *pair, False), 128) for pair in pairs]
    scores, _ = score(model, [encoded], 300, True)
    for (context, continuation), (ll, _), (x, targets) in zip(pairs, scores[0], encoded, strict=True):
        stripped = context.rstrip()
        moved = context[len(stripped) :] + continuation
        assert ll == pytest.approx(reference(model, tokenizer, stripped, moved), abs=1e-4)
        assert len(x) >= len(targets) >= 1


def test_a_context_longer_than_the_model_is_cut_from_the_left(model, tokenizer):
    context, continuation = "bada kimu " * 60 + "dogu:", " ruku"
    x, targets = cut(*encode_pair(tokenizer, context, continuation, True), 128)
    whole = tokenizer.encode(context + continuation)
    assert x == whole[-129:-1] and targets == whole[-len(targets) :]
    scores, _ = score(model, [[(x, targets), (x, targets)]], 300, True)
    with torch.no_grad():
        logp = model(torch.tensor([x]))[0].double().log_softmax(-1)
    expected = sum(logp[len(x) - len(targets) + i, t].item() for i, t in enumerate(targets))
    assert scores[0][0][0] == pytest.approx(expected, abs=1e-4)


def test_special_tokens_in_a_context_are_those_tokens_and_bos_is_not_doubled(tokenizer):
    bos, eos = tokenizer.bos, tokenizer.eos[0]
    for add_bos in (False, True):
        x, targets = cut(*encode_pair(tokenizer, "<s>bada</s> kimu", " dogu", add_bos), 128)
        assert x[0] == bos and x.count(bos) == 1 and x.count(eos) == 1
        assert tokenizer.decode([*x[: len(x) + 1 - len(targets)], *targets]).split() == ["<s>bada</s>kimu", "dogu"]
    plain, _ = cut(*encode_pair(tokenizer, "bada", " dogu", True), 128)
    assert plain[0] == bos and plain.count(bos) == 1
    # without a context the one that is written takes the place of the one that is added
    assert cut(*encode_pair(tokenizer, "", "<s>bada", False), 128) == cut(
        *encode_pair(tokenizer, "<s>", "bada", False), 128
    )


def test_bos_is_not_doubled_before_a_page(model, tokenizer):
    page = lambda text: [read_document({"doc": {}, "arguments": [[text]]}, "here")]
    values = [run_task(model, tokenizer, page("<s>bada kimu"), add_bos=add_bos)[1] for add_bos in (False, True)]
    assert values[0] == values[1] != run_task(model, tokenizer, page("bada kimu"), add_bos=True)[1]


def test_rolling_windows_predict_every_token_once():
    tokens = list(range(100, 123))
    windows = rolling_windows(tokens, 1, 10)
    assert [t for _, targets in windows for t in targets] == tokens
    assert windows[0] == ([1, *tokens[:9]], tokens[:10])
    assert windows[2] == (tokens[12:22], tokens[20:23])  # the last window looks back as far as it can


def read(records: list[dict], name="x") -> list[Document]:
    """The documents of a samples file of these records."""
    with tempfile.TemporaryDirectory() as folder:
        return read_task(write(Path(folder) / f"samples_{name}.jsonl", records))[1]


def document(choices, target, context="q", **more):
    return read([record(0, context, choices, target, **more)])[0]


@pytest.mark.parametrize(
    "choices, target, gold",
    [
        (["a", "b"], "1", {1}),
        (["a", "b"], "b", {1}),
        (["1", "2", "0"], "1", {1}),  # an index, even if a choice has the same text
        (["7", "8"], "8", {1}),  # no index: a text
        (["no", "yes"], "True", {1}),  # a boolean of a two-choice task is an index
        (["no", "yes"], "False", {0}),
        (["no", "yes"], True, {1}),
        (["True", "False"], "True", {0}),  # but for a choice of that name
        (["a", "b", "c"], "True", {-100}),
        (["a", "b", "c"], "[0, 2]", {0, 2}),
        (["a", "b"], "['b']", {1}),
        (["a", "b"], "nowhere", {-100}),  # always wrong
        (["a", "b"], "7", {7}),
        (["a", "b"], 1, {1}),
    ],
)
def test_gold_is_read_from_every_form_of_target(choices, target, gold):
    assert document(choices, target).gold == gold


def test_winograndes_gold_is_its_answer():
    doc = record(0, ["x a", "x b"], ["tail", "tail"], "tail") | {"doc": {"answer": "2"}}
    assert read([doc])[0].gold == {1}


@pytest.mark.parametrize(
    "targets, golds",
    [
        (["1", "0"], [{1}, {0}]),  # within the choices of every document: indices
        (["1", "9"], [{0}, {1}]),  # not within those of the second: texts
        (["1", "seven"], [{0}, {-100}]),  # a text, so all are
        (["-100", "1"], [{-100}, {0}]),
        ([1, 9], [{1}, {9}]),  # numbers of lm-eval until 0.4.3 say themselves what they are
        ([1, "9"], [{1}, {1}]),
    ],
)
def test_whether_targets_are_indices_is_decided_for_the_whole_file(targets, golds):
    choices = [["1", "2"], ["1", "9"]]
    documents = read([record(i, "q", choices[i], target) for i, target in enumerate(targets)])
    assert [d.gold for d in documents] == golds


def test_targets_that_are_no_choices_anywhere_are_indices():
    documents = read([record(i, "q", ["a", "b"], target) for i, target in enumerate(["1", "2", "-100"])])
    assert [d.gold for d in documents] == [{1}, {2}, {-100}]  # the others are out of range, and never right


@needs_shared
def test_golds_of_real_files_are_those_of_their_documents():
    for file, gold in (
        ("arc_easy", lambda doc: doc["choices"]["label"].index(doc["answerKey"])),
        ("boolq", lambda doc: doc["label"]),
        ("hellaswag", lambda doc: int(doc["label"])),
    ):
        _, documents = read_task(SAMPLES / f"dummy_0shot__{file}_local.jsonl")
        assert [d.gold for d in documents] == [{gold(d.record["doc"])} for d in documents]


@pytest.mark.parametrize("delimiter", ("", " ", "\n", "  "))
def test_the_delimiter_is_the_white_space_that_all_continuations_begin_with(delimiter):
    arguments = [["q", f"{delimiter}{choice}"] for choice in ("bb", " aaa")]  # a choice's own space is a character
    [d] = read([record(0, "q", ["x", "y"], "bb", arguments=arguments)])
    assert d.choices == ["bb", " aaa"] and d.gold == {0}
    assert document_metrics(d, [(-2.0, False), (-3.9, False)])["acc_norm"] == 0.0  # -1 and -0.975
    assert document_metrics(d, [(-2.0, False), (-4.1, False)])["acc_norm"] == 1.0


def test_a_target_finds_its_choice_where_all_choices_begin_with_a_space():
    [d] = read([record(0, "q", ["x", "y"], " b", arguments=[["q", " a"], ["q", " b"]])])
    assert d.gold == {1}


def test_only_the_metrics_that_a_file_names_and_that_are_computed_are_reported(
    random_checkpoint, tmp_path, main, capsys
):
    write(tmp_path / "samples_f1.jsonl", [r | {"metrics": ["acc", "f1"]} for r in made_up()])
    main(random_checkpoint, tmp_path / "r.json", "--tasks", tmp_path / "samples_f1.jsonl")
    result = json.loads((tmp_path / "r.json").read_text())["results"]["f1"]
    assert result.keys() == {"acc", "acc_stderr", "n", "tokens"}
    assert "f1: f1 is not computed here, and left out" in capsys.readouterr().out


def truthful(i, labels, mc1=None, **more) -> dict:
    choices = ["aa", "bb", "cc"]
    mc1 = {"choices": mc1 or choices[:2], "labels": [1, 0]}
    doc = {"mc1_targets": mc1, "mc2_targets": {"choices": choices, "labels": labels}}
    return record(i, "q", choices, "0", doc=doc, **more)


def test_truthfulqa_with_several_right_choices_shares_their_probability():
    p = [0.5, 0.2, 0.1]
    scores = [(math.log(x), False) for x in p]
    [d] = read([truthful(0, [1, 0, 1], metrics=["acc"])])
    assert document_metrics(d, scores) == {"acc": pytest.approx(0.6 / 0.8)}
    low = [(value - 5000, False) for value, _ in scores]  # where exp gives 0 for all
    assert document_metrics(d, low) == {"acc": pytest.approx(0.6 / 0.8)}
    values = [0.3, 0.75, 0.5]
    mean, error = evaluate.mean_and_error(values)
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(3)) and mean == pytest.approx(sum(values) / 3)


def test_truthfulqas_two_tasks_are_told_apart_by_their_choices_or_the_name():
    both = [truthful(0, [1, 1, 0], mc1=["aa", "bb", "cc"])]
    assert [read(both, name)[0].mc2 for name in ("truthfulqa_mc1", "truthfulqa_mc2")] == [False, True]
    with pytest.raises(UserError, match="truthfulqa_mc1 or of truthfulqa_mc2"):
        read(both)
    first = truthful(0, [1, 1, 0])
    first["arguments"] = [["q", " aa"], ["q", " bb"]]
    assert not read([first])[0].mc2
    with pytest.raises(UserError, match="no mc2_targets"):
        read([record(0, "q", ["a", "b"])], "truthfulqa_mc2")
    with pytest.raises(UserError, match="`labels`"):
        read([truthful(0, [1, 0])])


def test_an_acc_that_lm_eval_computed_otherwise_is_refused():
    """Whatever the task is: the scores that it logged do not give the acc that it logged by the rules known here."""
    logged = {"filtered_resps": [["-1.0", "False"], ["-2.0", "False"]]}
    assert read([record(0, "q", ["a", "b"], "0", acc=1.0, **logged)])
    assert read([record(0, "q", ["a", "b"], "0", acc=1.0, filtered_resps=[[10**400, "False"], ["-2.0", "False"]])])
    with pytest.raises(UserError, match="acc 0.73 is logged, and its logged scores give 1"):
        read([record(0, "q", ["a", "b"], "0", acc=0.73, **logged)])


def test_ties_go_to_the_first_and_norm_counts_characters():
    d = document(["aa", "bbbb"], "0")
    assert document_metrics(d, [(-1.0, False), (-1.0, False)]) == {"acc": 1.0, "acc_norm": 0.0, "acc_bytes": 0.0}
    d = document(["äää", "bbbb"], "1")  # 3 characters, 6 bytes
    assert document_metrics(d, [(-3.0, False), (-3.9, False)]) == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 0.0}


def test_mutual_information_subtracts_the_unconditional():
    scores = [(value, False) for value in (-1.0, -2.0, -1.0, -5.0)]
    arguments = [["q", " a"], ["q", " b"], ["", "a"], ["", "b"]]  # not all versions write the second delimiter
    [d] = read([record(0, "", "ab", "b", arguments=arguments, metrics=["acc", "acc_mutual_info"])])
    assert document_metrics(d, scores) == {"acc": 0.0, "acc_mutual_info": 1.0}
    arguments = [["q", " a"], ["q", " b"], ["", " a"], ["", " b"]]
    [d] = read([record(0, "", "ab", "b", arguments=arguments, acc_mutual_info=0.0)])  # before there were `metrics`
    assert document_metrics(d, scores) == {"acc": 0.0, "acc_norm": 0.0, "acc_bytes": 0.0, "acc_mutual_info": 1.0}


def test_a_task_without_contexts_keeps_all_its_choices():
    d = document(["good", "bad"], "0", context="")  # as BLiMP
    assert d.choices == ["good", "bad"]
    assert document_metrics(d, [(-2.0, False), (-1.0, False)])["acc"] == 0.0


def test_aggregates_are_lm_evals():
    results = {
        f"mmlu_{subject}": evaluate.summarise([{"acc": float(k < right)} for k in range(n)])
        for subject, right, n in (("anatomy", 3, 10), ("virology", 5, 6))
    }
    for variant in ("mmlu_pro_biology", "mmlu_flan_cot_zeroshot_anatomy", "mmlu_continuation_anatomy", "mmlu_stem"):
        results[variant] = {"acc": 0.0, "acc_stderr": 0.0, "n": 1000}  # tasks of other names are other tasks
    assert len(set(evaluate.MMLU)) == 57
    mmlu = aggregates(results)
    two = "mmlu (2 of 57 subjects)"  # lm-eval's `mmlu` is all of them
    assert mmlu[two]["acc"] == pytest.approx(8 / 16) and "mmlu" not in mmlu
    assert mmlu[f"{two}, mean of subjects"]["acc"] == pytest.approx((0.3 + 5 / 6) / 2)
    se = [math.sqrt(p * (1 - p) / (n - 1)) for p, n in ((0.3, 10), (5 / 6, 6))]
    pooled = (9 * se[0] ** 2 * 10 + 5 * se[1] ** 2 * 6) / (16 - 2) / 16
    assert mmlu[two]["acc_stderr"] == pytest.approx(math.sqrt(pooled))
    assert mmlu[f"{two}, mean of subjects"]["n"] == mmlu[two]["n"] == 16
    seven = {task: {"acc": i / 10, "n": 5} for i, task in enumerate(evaluate.SEVEN)}
    assert aggregates(seven)["average of seven"] == {"acc": pytest.approx(0.3), "n": 35}
    assert len({len(line) for line in evaluate.table(mmlu, {}).splitlines()}) == 1  # however long a name is
    assert "average of seven" not in aggregates({k: v for k, v in seven.items() if k != "rte"})


def test_subjects_of_one_document_have_no_error():
    results = {f"mmlu_{name}": evaluate.summarise([{"acc": 1.0}]) for name in evaluate.MMLU}
    assert aggregates(results)["mmlu"] == {"acc": 1.0, "acc_stderr": None, "n": 57}


def test_a_word_perplexity_beyond_a_float_is_none():
    d = read_document({"doc": {}, "arguments": [["badakimu" * 100]]}, "here")  # one word
    result = evaluate.rolling_metrics([d], [-2000.0])
    assert result["word_perplexity"] is None and result["byte_perplexity"] == pytest.approx(math.exp(2.5))
    assert "too large" in evaluate.table({"pages": result}, {})


# ----------------------------------------------------------------------------------------------------------------------
# the walk


def plain(model, choices: list[Request]) -> list[float]:
    """log p of each choice's targets: one forward pass of the whole model for each, and a sum."""
    scores = []
    for tokens, targets in choices:
        with torch.no_grad():
            logp = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
        scores.append(sum(logp[p, t].item() for p, t in zip(range(-len(targets), 0), targets, strict=True)))
    return scores


@needs_shared
@pytest.mark.parametrize("limit", [2, pytest.param(40, marks=pytest.mark.stress)])
def test_every_choice_of_every_real_file_scores_as_the_whole_models_logits_say(monkeypatch, limit):
    """On the published stories260K, in memory and streamed."""
    folder = SHARED / "stories260K" / "hf"
    whole, tokenizer = load(folder, torch.float32)
    ckpt, config = evaluate.open_llama(folder)
    streamed = evaluate.open_model(ckpt, config, torch.device("cpu"), torch.float32)
    files = sorted(SAMPLES.glob("hf_*.jsonl"))
    assert len(files) > 15
    for path in files:
        _, documents = read_task(path)
        documents = documents[:limit]
        add_bos, length = "nobos" not in path.name, config.max_position_embeddings
        _, scores = run_task(whole, tokenizer, documents, add_bos)
        assert run_task(streamed, tokenizer, documents, add_bos)[1] == scores
        for document, s in zip(documents, scores, strict=True):
            if document.rolling:
                tokens = tokenizer.encode(document.pairs[0][0])
                tokens = [tokenizer.bos] * add_bos + tokens
                expected = [sum(plain(whole, rolling_windows(tokens, tokenizer.bos, length)))]
            else:
                expected = plain(whole, [cut(*encode_pair(tokenizer, *p, add_bos), length) for p in document.pairs])
            assert [value for value, _ in s] == pytest.approx(expected, rel=1e-5, abs=1e-5), path.name


@pytest.fixture
def small_smollm2(tokenizer, tmp_path) -> Path:
    """Grouped keys, tied embeddings, more blocks than are in memory: SmolLM2's shapes, an eighth as wide."""
    torch.manual_seed(0)
    config = LlamaConfig(256, 72, 192, 6, 9, 3, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True)
    model = Llama(config)
    for p in model.model.layers.parameters():
        if p.dim() == 2:
            p.data.mul_(5)
    save(model, tmp_path / "smol", tokenizer)
    return tmp_path / "smol"


def test_one_two_and_three_processes_give_the_plain_scores(small_smollm2, tmp_path):
    files = [write(tmp_path / f"samples_{n}.jsonl", made_up(n, seed=n)) for n in (7, 4)]
    flags = ("--tasks", *files, "--max_tokens", 150)
    for processes in (1, 2, 3):
        log = ("--log_samples", tmp_path / str(processes))
        run(small_smollm2, tmp_path / f"{processes}.json", *flags, *log, processes=processes)
    model, tokenizer = load(small_smollm2)
    for file in files:
        first, *others = ((tmp_path / str(n) / file.name).read_text() for n in (1, 2, 3))
        assert [first, first] == others
        for line, document in zip(first.splitlines(), read_task(file)[1], strict=True):
            ours = [float(value) for value, _ in json.loads(line)["filtered_resps"]]
            expected = plain(model, [cut(*encode_pair(tokenizer, *pair, False), 2048) for pair in document.pairs])
            assert ours == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("tokens, walks", [(1, 3), (2**15, 1)])
def test_parts_share_a_walk_where_a_chunk_has_room(random_checkpoint, tmp_path, main, monkeypatch, tokens, walks):
    files = [write(tmp_path / f"samples_{n}.jsonl", made_up(n, seed=n)) for n in (12, 9)]
    (tmp_path / "text.txt").write_text("bada kimu dogu\n" * 100)
    flags = ("--tasks", *files, "--ppl", tmp_path / "text.txt", "--seqlen", 64)
    main(random_checkpoint, tmp_path / "r.json", *flags)
    calls, walk, stream = [], evaluate.walk, evaluate.stream_blocks
    monkeypatch.setattr(evaluate, "CHUNK", {"cpu": tokens})
    monkeypatch.setattr(evaluate, "walk", lambda *args: (calls.append("walk"), walk(*args)))
    monkeypatch.setattr(evaluate, "stream_blocks", lambda *args: (calls.append("stream"), stream(*args))[1])
    main(random_checkpoint, tmp_path / "again.json", *flags)
    assert calls.count("walk") == walks and calls.count("stream") == walks
    assert (tmp_path / "again.json").read_text() == (tmp_path / "r.json").read_text()


def fixed_memory(monkeypatch, **sizes) -> None:
    """Makes so many bytes free on each kind of device."""
    monkeypatch.setattr(evaluate, "free_memory", lambda device: int(sizes[device.type]))


def on_gpu(config: LlamaConfig, dtype=torch.bfloat16) -> SimpleNamespace:
    """What `make_chunks` looks at of a model whose blocks are streamed to a GPU."""
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    blocks = evaluate.Blocks(None, config, weight.device, dtype, False)
    layers = SimpleNamespace(layers=blocks)
    return SimpleNamespace(config=config, lm_head=SimpleNamespace(weight=weight), model=layers)


def mmlu(subjects=57, documents=246, past=600, length=100) -> list[evaluate.Part]:
    """5-shot MMLU, as large as it is: one-token choices behind five examples."""
    row = lambda n, targets: evaluate.Row(
        [5] * n, list(range(past, past + n)), [0] * n, [[n - 1]] * targets, [[7]] * targets
    )
    return [evaluate.Part(row(past, 0), [row(length, 4)] * documents, []) for _ in range(subjects)]


def test_hidden_states_wait_where_there_is_room(monkeypatch):
    model, batches = on_gpu(PRESETS["llama-2-70b"]), evaluate.make_batches(mmlu(), 8192)
    states = 57 * 246 * 100 * 2 * 8192
    fixed_memory(monkeypatch, cuda=8e9 + states, cpu=1e9)
    [*chunks], home = evaluate.make_chunks(model, batches)
    assert home.type == "cuda" and len(chunks) == math.ceil(57 * 246 * 100 / evaluate.CHUNK["cuda"])
    fixed_memory(monkeypatch, cuda=8e9, cpu=2.5 * states)
    more, home = evaluate.make_chunks(model, batches)
    assert home.type == "cpu" and more == chunks
    fixed_memory(monkeypatch, cuda=8e9, cpu=1e9)
    more, home = evaluate.make_chunks(model, batches)
    assert home.type == "cuda" and len(more) > len(chunks)
    assert [batch for chunk in more for batch in chunk] == batches


def test_a_block_that_does_not_fit_is_one_line(random_checkpoint, folder, refused, monkeypatch):
    fixed_memory(monkeypatch, cpu=1e5)
    said = refused(random_checkpoint, "r.json", "--tasks", "samples_t.jsonl")
    assert re.search(
        r"--device cpu: blocks and a batch take [\d.]+ GB, and 0.00 GB are free; what helps: a smaller", said
    )


def test_processes_have_neighbouring_batches_and_like_shares():
    batches = evaluate.make_batches(mmlu(), 8192)
    shares = [evaluate.share_of_work(batches, rank, 8) for rank in range(8)]
    assert [batch for share in shares for batch in share] == batches
    tokens = [sum(evaluate.batch_tokens(*batch) for batch in share) for share in shares]
    assert max(tokens) - min(tokens) <= 2 * max(evaluate.batch_tokens(*batch) for batch in batches)
    assert evaluate.share_of_work(batches[:1], 0, 2) + evaluate.share_of_work(batches[:1], 1, 2) == batches[:1]


def test_the_prefix_does_not_multiply_memory_by_the_rows():
    """However many rows it serves: what is alive at the peak of a walk grows by no more than the rows' own states."""
    model = Llama(LlamaConfig(256, 32, 64, num_hidden_layers=2, num_attention_heads=4)).requires_grad_(False)
    peaks = []
    for n in (8, 80):
        [part] = mmlu(1, n, past=500, length=10)
        with LiveBytes() as live:
            evaluate.score(model, [part], max_tokens=4096)
        peaks.append(live.peak)
    state = 4 * (32 + 2 * 8) + 510  # of a token: x, cos and sin, and the mask
    assert peaks[1] - peaks[0] < 1.5 * 72 * 10 * state


# ----------------------------------------------------------------------------------------------------------------------
# perplexity


@pytest.mark.parametrize("max_tokens", (1, 100, 8192))
def test_perplexity_is_wandas(model, tokenizer, tmp_path, max_tokens):
    """Against a float64 loop: rows as the data set has them, one string, one tokenisation, windows, cross-entropy."""
    text = "\n bada kimu \n \ndogu ruku bada kimu\n" * 30
    (tmp_path / "text.txt").write_text(text)
    ours, n = perplexity(model, read_text(tmp_path / "text.txt", tokenizer), 32, max_tokens)
    rows = ["" if line.isspace() else line for line in text.splitlines(keepends=True)]
    tokens = [tokenizer.bos, *tokenizer.encode("\n\n".join(rows))]
    losses = []
    for i in range(len(tokens) // 32):
        window = tokens[32 * i : 32 * (i + 1)]
        with torch.no_grad():
            logp = model(torch.tensor([window]))[0].double().log_softmax(-1)
        losses += [-logp[p - 1, window[p]].item() for p in range(1, 32)]
    assert ours == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert n == len(losses) * 32 / 31 and len(tokens) % 32


def test_a_perplexity_that_no_float_holds_is_null(random_checkpoint):
    model, _ = load(random_checkpoint)
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, list(range(64)), 32) == (None, 64)
    assert "too large" in evaluate.table({}, {"text": {"ppl": None, "seqlen": 32, "tokens": 64}})


def test_the_first_window_that_is_not_finite_names_the_layer(random_checkpoint):
    model, _ = load(random_checkpoint)
    model.model.embed_tokens.weight.data[200] = math.inf
    with pytest.raises(UserError, match="embed_tokens"):
        perplexity(model, list(range(150, 214)), 32)


# ----------------------------------------------------------------------------------------------------------------------
# the command


def test_results_and_samples_have_their_documented_keys(random_checkpoint, tmp_path):
    tasks = write(tmp_path / "samples_made_up_2026-01-01T00-00-00.1.jsonl", made_up())
    (tmp_path / "text.txt").write_text("bada kimu dogu\n" * 100)
    flags = ("--tasks", tasks, "--ppl", tmp_path / "text.txt", "--seqlen", 64, "--log_samples", tmp_path / "log")
    said = run(random_checkpoint, tmp_path / "r.json", *flags)
    out = json.loads((tmp_path / "r.json").read_text())
    assert out["version"] == 2
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"} <= out["results"]["made_up"].keys()
    assert out["perplexity"]["text"].keys() == {"ppl", "seqlen", "tokens"} and out["add_bos"] is False
    assert "made_up" in said and not (tmp_path / "r.json.partial").exists()
    _, again = read_task(tmp_path / "log" / "samples_made_up.jsonl")
    assert len(again) == 12 and all(len(d.record["filtered_resps"]) == 4 for d in again)


def test_two_processes_give_identical_results_of_texts_too(random_checkpoint, tmp_path):
    tasks = write(tmp_path / "samples_t.jsonl", made_up(20))
    (tmp_path / "text.txt").write_text("bada kimu dogu\n" * 100)
    for processes in (1, 2):
        flags = ("--tasks", tasks, "--max_tokens", 200, "--ppl", tmp_path / "text.txt", "--seqlen", 64)
        log = ("--log_samples", tmp_path / str(processes))
        run(random_checkpoint, tmp_path / f"{processes}.json", *flags, *log, processes=processes)
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    assert (tmp_path / "1" / "samples_t.jsonl").read_text() == (tmp_path / "2" / "samples_t.jsonl").read_text()


@pytest.fixture
def interrupted(random_checkpoint, tmp_path, monkeypatch, main):
    """A task of 12 documents and one of 9, interrupted in the second: (the command's flags, how many documents each
    chunk had, in order)."""
    files = [write(tmp_path / f"samples_{n}.jsonl", made_up(n, seed=n)) for n in (12, 9)]
    chunks, walk = [], evaluate.walk

    def walk_or_stop(model, chunk, *args):
        chunks.append(sum(len(numbers) for _, numbers in chunk))
        if chunks == [12, 9]:
            raise KeyboardInterrupt
        walk(model, chunk, *args)

    monkeypatch.setattr(evaluate, "CHUNK", {"cpu": 1})  # a batch in each
    monkeypatch.setattr(evaluate, "walk", walk_or_stop)
    with pytest.raises(KeyboardInterrupt):
        main(random_checkpoint, tmp_path / "r.json", "--tasks", *files)
    return ("--tasks", *files), chunks


def test_an_interrupted_run_keeps_its_finished_tasks(random_checkpoint, tmp_path, main, interrupted):
    flags, chunks = interrupted
    main(random_checkpoint, tmp_path / "r.json", *flags)
    assert chunks == [12, 9, 9]
    main(random_checkpoint, tmp_path / "at_once.json", *flags)
    assert (tmp_path / "r.json").read_text() == (tmp_path / "at_once.json").read_text()


def test_an_interrupted_run_keeps_the_chunks_of_a_task_whatever_memory_is_left(
    random_checkpoint, tmp_path, main, interrupted, monkeypatch
):
    """Chunks are cut anew, batches are not: so the results are the same to the last bit."""
    flags, chunks = interrupted
    monkeypatch.setattr(evaluate, "CHUNK", {"cpu": 200})
    flags = (*flags, "--max_tokens", 100, "--log_samples", tmp_path / "log")  # another key: nothing is known
    chunks[:] = [0, 0]

    def stop(*args, walk=evaluate.walk):
        if len(chunks) > 5:
            raise KeyboardInterrupt
        walk(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "walk", stop)
        main(random_checkpoint, tmp_path / "r.json", "--no_sharing", *flags)
    before = sum(chunks)
    assert 0 < before < 12
    monkeypatch.setattr(evaluate, "CHUNK", {"cpu": 700})
    main(random_checkpoint, tmp_path / "r.json", "--no_sharing", *flags)
    assert sum(chunks) == 21 and max(chunks[6:]) > max(chunks[:6])
    monkeypatch.setattr(evaluate, "CHUNK", {"cpu": 2**15})
    log = (tmp_path / "log" / "samples_12.jsonl").read_text()
    main(random_checkpoint, tmp_path / "at_once.json", "--no_sharing", *flags)
    assert (tmp_path / "log" / "samples_12.jsonl").read_text() == log
    assert (tmp_path / "r.json").read_text() == (tmp_path / "at_once.json").read_text()


@pytest.mark.parametrize("more", [("--add_bos",), ("--dtype", "bfloat16"), ("--no_sharing",)])
def test_finished_tasks_are_not_kept_for_other_settings(random_checkpoint, tmp_path, main, interrupted, more):
    flags, chunks = interrupted
    main(random_checkpoint, tmp_path / "r.json", *flags, *more)
    assert chunks == [12, 9, 12, 9]


def test_what_is_known_is_logged_too(random_checkpoint, tmp_path, main, interrupted):
    flags, chunks = interrupted
    main(random_checkpoint, tmp_path / "r.json", *flags, "--log_samples", tmp_path / "log")
    assert chunks == [12, 9, 9] and len((tmp_path / "log" / "samples_12.jsonl").read_text().splitlines()) == 12


def test_finished_tasks_are_not_kept_for_other_documents(random_checkpoint, tmp_path, main, interrupted):
    flags, chunks = interrupted
    write(tmp_path / "samples_12.jsonl", [r | {"target": "1"} for r in made_up(12, seed=12)])
    main(random_checkpoint, tmp_path / "r.json", *flags)
    assert chunks == [12, 9, 12, 9]


def started(checkpoint, folder) -> tuple[tuple, Job]:
    """Two tasks and a text, more than one chunk takes: (the command's flags, the command once its first chunk is kept)."""
    files = [write(folder / f"samples_{name}.jsonl", made_up(40, i)) for i, name in enumerate("ab")]
    (folder / "text.txt").write_text("bada kimu dogu\n" * 7000)
    flags = ("--tasks", *files, "--max_tokens", 100, "--ppl", folder / "text.txt", "--seqlen", 32)
    job = start(checkpoint, folder / "r.json", *flags)
    while not [*(folder / "r.json.partial").glob("chunk-*.json")]:
        assert job.running(), job.text
        time.sleep(0.005)
    return flags, job


def test_a_killed_command_goes_on_when_it_is_given_again(random_checkpoint, tmp_path):
    flags, job = started(random_checkpoint, tmp_path)
    job.kill()
    assert job.wait() == [-signal.SIGKILL] and not (tmp_path / "r.json").exists()
    for out in ("r.json", "at_once.json"):
        run(random_checkpoint, tmp_path / out, *flags)
    assert (tmp_path / "r.json").read_text() == (tmp_path / "at_once.json").read_text()
    assert not (tmp_path / "r.json.partial").exists()


def streamed_in_small_chunks(line: list[str], walked: Path) -> None:
    """What a forked process does: the command with a few rows in a chunk. It notes the rows of each as it begins."""
    walk, evaluate.CHUNK = evaluate.walk, {"cpu": 150}

    def noted(model, chunk, *args):
        with open(walked, "a") as f:
            f.writelines(f"{part.key} {i}\n" for part, numbers in chunk for i in numbers)
        walk(model, chunk, *args)

    evaluate.walk, sys.argv = noted, line
    cli(evaluate.main)


@pytest.mark.stress
def test_killed_ten_times_nothing_is_scored_twice_and_the_results_are_the_same(small_smollm2, tmp_path):
    rng = random.Random(0)
    files = [write(tmp_path / f"samples_{name}.jsonl", made_up(60, i)) for i, name in enumerate("ab")]
    (tmp_path / "text.txt").write_text("bada kimu dogu\n" * 400)
    flags = ("--tasks", *files, "--ppl", tmp_path / "text.txt", "--seqlen", 64, "--max_tokens", 100)
    run(small_smollm2, tmp_path / "whole.json", *flags, "--log_samples", tmp_path / "whole")
    out, walked, kills = tmp_path / "r.json", tmp_path / "walked", 0
    line = command(small_smollm2, out, *flags, "--log_samples", tmp_path / "log")
    while not out.exists():
        known = set()
        for file in (tmp_path / "r.json.partial").glob("chunk-*.json"):
            known |= {f"{key} {i}" for key, rows in json.loads(file.read_text())["scores"].items() for i, _ in rows}
        walked.write_text("")
        process = FORKS.Process(target=streamed_in_small_chunks, args=(line, walked))
        process.start()
        while kills < 10 and process.is_alive() and not walked.read_text():  # until it is at work
            time.sleep(0.005)
        process.join(rng.uniform(0, 0.2) if kills < 10 else 120)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        lines = walked.read_text().splitlines()
        assert len(lines) == len(set(lines)) and known.isdisjoint(lines)
    assert kills == 10
    assert out.read_text() == (tmp_path / "whole.json").read_text()
    for file in files:
        assert (tmp_path / "log" / file.name).read_text() == (tmp_path / "whole" / file.name).read_text()


def test_a_second_command_with_the_same_out_at_the_same_time_is_refused(random_checkpoint, tmp_path, refused):
    flags, job = started(random_checkpoint, tmp_path)
    os.kill(job.processes[0].pid, signal.SIGSTOP)  # so that it is at work for as long as this takes
    line = refused(random_checkpoint, tmp_path / "r.json", *flags)
    assert "r.json.partial: another run is at work in it" in line
    run(random_checkpoint, tmp_path / "other.json", *flags)  # beside it there is room
    os.kill(job.processes[0].pid, signal.SIGCONT)
    assert job.wait() == [0], job.text
    assert (tmp_path / "r.json").read_text() == (tmp_path / "other.json").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# files of lm-eval, whole and broken


def test_old_array_files_are_read(tmp_path):
    old = [{"doc_id": 0, "doc": {}, "target": 1, "arguments": [["q", " a"], ["q", " b"]], "resps": [], "acc": 1.0}]
    (tmp_path / "samples_old.json").write_text("\n " + json.dumps(old))
    name, documents = read_task(tmp_path / "samples_old.json")
    assert name == "old" and documents[0].gold == {1} and documents[0].choices == ["a", "b"]


def test_logged_samples_hold_what_the_document_held(tmp_path):
    dummys = {"metrics": ["acc", "f1"], "f1": [1, 0]}  # of the model that lm-eval wrote the file with
    d = document(["a", "b"], "0", doc={"note": "half of a pair: \ud83d, and ä"}, **dummys)
    evaluate.log_samples(tmp_path / "samples_x.jsonl", [d], [[(-1.0, True), (-2.0, False)]])
    _, [again] = read_task(tmp_path / "samples_x.jsonl")
    assert again.record["doc"] == d.record["doc"] and again.pairs == d.pairs and again.record["acc"] == 1.0
    assert again.record["filtered_resps"] == [["-1.0", "True"], ["-2.0", "False"]] and "f1" not in again.record


def test_a_logged_page_has_its_own_log_likelihood_and_counts(tmp_path):
    page = with_arguments([["one two"]], doc={"page": "one  two"}, target="", word_perplexity=[-0.5, 2])
    _, documents = read_task(write(tmp_path / "samples_w.jsonl", [page]))
    evaluate.log_samples(tmp_path / "samples_v.jsonl", documents, [[(-3.0, False)]])
    [again] = read_task(tmp_path / "samples_v.jsonl")[1]
    counts = {"word_perplexity": 2, "byte_perplexity": 8, "bits_per_byte": 8}
    assert {metric: again.record[metric] for metric in counts} == {metric: [-3.0, n] for metric, n in counts.items()}


def test_a_document_logged_for_two_filters_counts_once(tmp_path):
    for more in ([{"filter": "none"}, {"filter": "strict"}], [{}, {}]):  # the name is there since 0.4.7
        records = [record(0, "q", ["a", "b"], doc_hash="h") | m for m in more]
        _, documents = read_task(write(tmp_path / "samples_x.jsonl", records))
        assert len(documents) == 1


AB = record(0, "q", ["a", "b"])


def with_arguments(arguments, **more) -> dict:
    return AB | {"arguments": arguments} | more


@pytest.mark.parametrize(
    "records, words",
    [
        ([with_arguments({"gen_args_0": {"arg_0": "q", "arg_1": {"until": ["\n"]}}})], "generative"),
        ([with_arguments({f"gen_args_{i}": {"arg_0": "q", "arg_1": "a"} for i in (0, 2)})], "gen_args_1 is missing"),
        ([with_arguments([["q", "a"], ["q", "b"], ["", "a"]], acc_mutual_info=0.0)], "odd number"),
        ([with_arguments(5)], "not lm-eval's"),
        ([with_arguments([[], "q"])], "not lm-eval's"),
        ([with_arguments([["q", "a"], ["q"]])], "not a text"),
        ([with_arguments([["q", "a"], ["q", 7]])], "not a text"),
        ([with_arguments([["q", "a"], ["q", "\ud800"]])], "not a text"),
        ([with_arguments([["text"]], doc={"page": 7})], "`page`"),
        ([with_arguments([[""]])], "holds no text"),
        ([with_arguments([[""]], doc={"page": " \n"})], "holds no text"),  # of which nothing is left to score
        ([AB, record(1, "q", ["a", "b"], doc={"other": 1})], "line 2 is of another task"),
        ([AB, with_arguments([["text"]], doc_id=1)], "line 2 is of another task"),
        ([AB, AB | {"doc": {"q": "other"}}], "line 2 has the doc_id 0 of another line: two files"),
        ([AB, AB | {"doc_hash": "other"}], "line 2 has the doc_id 0 of another line: two files"),
        ([AB, with_arguments([["shots q", " a"], ["shots q", " b"]])], "line 2 has the doc_id 0 of another line"),
        ([AB | {"filter": "none"}] * 2, "line 2 has the doc_id 0 of another line"),
        ([AB, record(1, "q", ["a", "b"], metrics=["acc"])], "line 2 is of another task"),
        ([AB | {"metrics": ["f1", "em"]}], "is scored by f1, em, which is not computed here"),
        ([AB | {"target": 0.5}], "neither an index nor a text"),
        ([AB | {"target": "[{}]"}], "neither an index nor a text"),
        ([record(0, "q", ["a"])], "has 1 continuation, nothing to choose from"),
        ([record(0, "q", ["a", "b"], doc={"choices": ["a", "b", "c"]})], "a choice was lost"),
        ([record(0, "q", ["a", "b"], doc={"choices": {"text": ["a", "b", "c"]}})], "a choice was lost"),
        ([record(0, "q", ["a", "b"], None)], "no gold"),
        ([record(0, "q", ["a", "b"], "[1,")], "not a list"),  # but "[A] z" is a text: see below
        ([record(0, "q", ["a", "b"], "[" * 10**5)], "not a list"),
        (
            [record(0, ["q a", "q b"], ["t", "t"], "t")],
            "contexts differ and not what follows, and .* no `answer` of 1 or 2",
        ),
        ([{"doc": {}}], "line 1 is not a sample"),
        ([AB | {"doc": 5}], "line 1 is not a sample"),
        ([AB, 7], r"line 2 \(an object on each line\): is a JSON int, expected a dict"),
        ([[1]], "sample 1 is not a sample"),
        ([], "no sample"),
    ],
)
def test_a_wrong_samples_file_is_refused(tmp_path, records, words):
    with pytest.raises(UserError, match=words):
        read_task(write(tmp_path / "samples_x.jsonl", records))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b'\n{"doc"', r"line 2 \(an object on each line\): is not JSON"),
        (b"[" * 10**6, "is not JSON"),
        (b'[{"doc": {}},', "is not JSON"),
    ],
)
def test_a_file_that_is_not_json_is_refused(tmp_path, content, words):
    (tmp_path / "samples_x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_task(tmp_path / "samples_x.jsonl")


def test_a_file_cut_in_mid_line_is_refused(random_checkpoint, tmp_path):
    path = write(tmp_path / "samples_x.jsonl", made_up())
    path.write_text(path.read_text()[:-30])
    job = start(random_checkpoint, tmp_path / "r.json", "--tasks", path)
    assert (
        job.wait() == [2]
        and "line 12 (an object on each line): is not JSON" in job.text
        and len(job.text.splitlines()) == 1
    )
    assert not (tmp_path / "r.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# what else can go wrong


@pytest.fixture
def folder(random_checkpoint, tmp_path, monkeypatch):
    """The current directory, with inputs of every kind."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "samples_t.jsonl", made_up())
    (tmp_path / "samples_t.json").write_text(json.dumps(made_up()))
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blob.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "samples_t.jsonl").write_text('{"mine": 1}\n')
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "text.txt").write_text("bada kimu dogu\n" * 100)
    save(load(random_checkpoint)[0], tmp_path / "no_tokenizer.pt")
    return tmp_path


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "nothing to do"),
        ("--tasks", "--tasks"),
        ("--tasks nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        ("--tasks a", "a: is a directory, expected a file"),
        ("--tasks samples_t.jsonl samples_t.json", "another file is of task t too"),
        ("--ppl nowhere.txt", "nowhere.txt: cannot be read"),
        ("--ppl a", "a: is a directory, expected a file"),
        ("--ppl blob.txt", "blob.txt: is not UTF-8"),
        ("--ppl empty.txt", "--ppl empty.txt: 1 tokens, fewer than one window"),
        ("--ppl a/text.txt b/text.txt", "another file is named text too"),
        ("--ppl a/text.txt --seqlen 1000000", "fewer than one window of --seqlen 1000000"),
        ("--ppl a/text.txt --seqlen 1", "--seqlen: expected at least 2, found 1"),
        ("--ppl a/text.txt --seqlen ten", "--seqlen"),
        ("--tasks samples_t.jsonl --max_tokens 0", "--max_tokens: expected at least 1, found 0"),
        ("--tasks samples_t.jsonl --batch_tokens 9", "unrecognized arguments: --batch_tokens 9"),
        ("--ppl a/text.txt --semi_structured", "needs an NVIDIA GPU"),
        ("--ppl a/text.txt --device cuda", "sees no GPU"),
        ("--ppl a/text.txt --dtype int8", "--dtype"),
        ("--ppl a/text.txt --ckpt nowhere.pt", "nowhere.pt"),
        ("--ppl a/text.txt --ckpt no_tokenizer.pt", "no_tokenizer.pt: has no tokenizer"),
        ("--ppl a/text.txt --out results.txt", "must end in .json"),
        ("--ppl a/text.txt --out blob.txt/r.json", "--out blob.txt/r.json: cannot be written"),
        ("--tasks samples_t.jsonl --log_samples blob.txt", "--log_samples blob.txt/samples_t.jsonl: cannot be written"),
        ("--tasks samples_t.json --out samples_t.json", "would be overwritten"),
        ("--tasks samples_t.jsonl --log_samples .", "would be overwritten"),
        ("--tasks samples_t.jsonl --log_samples c", "--log_samples c: the samples would overwrite c/samples_t.jsonl"),
        ("--ppl a/text.txt --out config.json", "--out config.json: the results would overwrite config.json, which is"),
    ],
)
def test_a_wrong_flag_is_one_line(random_checkpoint, folder, refused, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = (folder / "samples_t.json").read_bytes()
    assert words in refused(random_checkpoint, "r.json", *flags.split())
    assert not (folder / "r.json").exists() and (folder / "samples_t.json").read_bytes() == before


def test_a_text_that_begins_as_a_list_is_a_text(tmp_path):
    write(tmp_path / "samples_t.jsonl", [record(0, "q", ["a", "b"], "[A] z"), record(1, "q", ["[B] y", "b"], "[B] y")])
    _, documents = read_task(tmp_path / "samples_t.jsonl")
    assert [document.gold for document in documents] == [{-100}, {0}]


def test_a_page_is_wikitexts_and_its_words_are_those_that_were_logged(tmp_path):
    page = {"doc_id": 0, "doc": {"text": "one two three", "page": "1"}, "arguments": [["one two three"]], "target": ""}
    write(tmp_path / "samples_w.jsonl", [{**page, "word_perplexity": [-9.0, 3], "byte_perplexity": [-9.0, 13]}])
    assert read_task(tmp_path / "samples_w.jsonl")[1][0].page == "one two three"
    write(tmp_path / "samples_w.jsonl", [{**page, "word_perplexity": [-9.0, 4]}])
    with pytest.raises(UserError, match="word_perplexity was logged over 4, and its text has 3"):
        read_task(tmp_path / "samples_w.jsonl")
    write(tmp_path / "samples_w.jsonl", [{**page, "filtered_resps": [["-3.5", "False"]]}])  # in a choice's shape
    assert read_task(tmp_path / "samples_w.jsonl")[1][0].rolling


def test_contexts_that_do_not_fit_the_model_are_counted_and_bos_is_said_of_contexts_alone(
    random_checkpoint, folder, main, capsys
):
    long = made_up()
    for choice in long[0]["arguments"].values():
        choice["arg_0"] = 50 * "bada kimu " + choice["arg_0"]
    write(folder / "samples_long.jsonl", long)
    main(random_checkpoint, "r.json", "--tasks", "samples_long.jsonl", "--ppl", "a/text.txt", "--seqlen", 64)
    out, err = capsys.readouterr()
    which = f"note: --tasks: 1 of {len(long)} documents of long have more than 128 tokens: cut from the left"
    assert which in err and "BOS not added to contexts\n" in out
    main(random_checkpoint, "r.json", "--ppl", "a/text.txt", "--seqlen", 64)  # over results, which it may replace
    assert "BOS" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is not JSON"),
        ("[]", "is a JSON list, expected a dict"),
        ('{"scores": {}}', "has no version, expected 2"),
        ('{"version": 0, "scores": {}}', "has version 0, expected 2"),
        ('{"version": 2, "scores": {"key": 5}}', "is damaged; remove r.json.partial to begin again"),
        ('{"version": 2, "scores": {"key": [[0, [["x", 1]]]]}}', "is damaged; remove r.json.partial"),
        ('{"version": 2}', "is damaged; remove r.json.partial to begin again"),
        ('{"version": 2, "scores": {"key": [[0, [[NaN, true]]]]}}', "is damaged; remove r.json.partial"),
    ],
)
def test_broken_partial_results_are_one_line(random_checkpoint, folder, refused, content, words):
    (folder / "r.json.partial").mkdir()
    (folder / "r.json.partial" / ".lock").touch()
    (folder / "r.json.partial" / "chunk-0.json").write_text(content)
    assert f"chunk-0.json: {words}" in refused(random_checkpoint, "r.json", "--tasks", "samples_t.jsonl")


def test_a_folder_of_the_users_own_is_not_taken_for_partial_results(random_checkpoint, folder, refused):
    (folder / "r.json.partial").mkdir()
    (folder / "r.json.partial" / "thesis.txt").touch()
    line = refused(random_checkpoint, "r.json", "--tasks", "samples_t.jsonl")
    assert "r.json.partial: is in the way, and no interrupted command has left it" in line
    flags = ("--tasks", "samples_t.jsonl", "--log_samples", "q.json.partial")
    assert "lies in q.json.partial, where this command keeps" in refused(random_checkpoint, "q.json", *flags)
    assert [file.name for file in (folder / "r.json.partial").iterdir()] == ["thesis.txt"]


def test_a_file_where_partial_results_should_go_is_one_line(random_checkpoint, folder, refused):
    (folder / "r.json.partial").write_text("{")
    assert "r.json.partial: cannot be written" in refused(random_checkpoint, "r.json", "--tasks", "samples_t.jsonl")


def test_bos_is_missed_only_where_it_is_needed(random_checkpoint, folder, main, refused, no_bos):
    save(load(random_checkpoint)[0], folder / "no_bos.pt", no_bos)
    for flags in ("--tasks samples_t.jsonl --add_bos", "--ppl a/text.txt --seqlen 32"):
        assert "the tokenizer has no BOS" in refused("no_bos.pt", "r.json", *flags.split())
    main("no_bos.pt", "r.json", "--tasks", "samples_t.jsonl")
    assert (folder / "r.json").exists()


def test_a_choice_without_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match="has no tokens"):
        cut(*encode_pair(tokenizer, "bada", "", False), 128)


def test_nan_names_the_layer(tokenizer, random_checkpoint, folder, refused):
    model, _ = load(random_checkpoint)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    save(model, folder / "nan.pt", tokenizer)
    assert "the output of layers.1 has NaN" in refused("nan.pt", "r.json", "--tasks", "samples_t.jsonl")


def test_nan_that_only_the_second_process_meets_is_reported(tokenizer, random_checkpoint, tmp_path):
    pairs = [("bada kimu dogu ruku bada", ["kimu", "dogu"]), ("Ä?", ["ruku", "kimu"])]  # the longer is rank 0's
    path = write(tmp_path / "samples_x.jsonl", [record(i, *pair) for i, pair in enumerate(pairs)])
    own = set(tokenizer.encode("Ä?")) - set(tokenizer.encode("bada kimu dogu ruku bada kimu dogu"))
    model, _ = load(random_checkpoint)
    model.model.embed_tokens.weight.data[list(own)] = float("nan")
    save(model, tmp_path / "nan.pt", tokenizer)
    job = start(tmp_path / "nan.pt", tmp_path / "r.json", "--tasks", path, "--max_tokens", 1, processes=2)
    assert job.wait() == [1, 2]  # the first hears no more from the second, and torchrun would end it at once
    assert re.search(r"evaluate.py \(rank 1\): error: no log-likelihood is finite: embed_tokens has NaN", job.text)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="more processes than the 1 GPUs"):
        evaluate.join_processes("cuda")


@pytest.mark.parametrize(
    "dtype, pruned, words",
    [
        (torch.float32, False, "float16 or bfloat16"),
        (torch.bfloat16, False, "q_proj is not 2:4"),
        (torch.bfloat16, True, "q_proj: .*not supported"),  # torch's reason: here that the weights are on the CPU
    ],
)
def test_what_cannot_be_semi_structured_is_refused(random_checkpoint, monkeypatch, dtype, pruned, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    model, _ = load(random_checkpoint, dtype)
    for p in model.model.layers.parameters():
        if pruned and p.dim() == 2:
            p.data.view(-1, 4)[:, 2:] = 0
    with pytest.raises(UserError, match=words):
        evaluate.check_semi_structured("cuda", dtype)
        evaluate.to_semi_structured(model.model.layers[0], "layers.0")


def test_semi_structured_linears_give_contiguous_rows(random_checkpoint, monkeypatch):
    """As cuSPARSELt does, the hook before transposes what a linear writes."""
    model, _ = load(random_checkpoint)
    block, x = model.model.layers[0], torch.randn(2, 8, model.config.hidden_size)
    for linear in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
        linear.weight.data.view(-1, 4)[:, 2:] = 0
        linear.register_forward_hook(lambda module, args, y: y.mT.contiguous().mT)
    expected = block.self_attn.q_proj(x)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: w)
    evaluate.to_semi_structured(block, "layers.0")
    y = block.self_attn.q_proj(x)
    assert y.equal(expected) and y.is_contiguous() and not expected.is_contiguous()


def test_windows_longer_than_the_models_positions_are_noted_once(random_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("Question: 0123456789 ? \n" * 60)
    for seqlen, times in ((129, 1), (128, 0)):
        flags = ("--ppl", tmp_path / "text.txt", "--seqlen", seqlen)
        said = run(random_checkpoint, tmp_path / f"{seqlen}.json", *flags, processes=2)
        assert said.count("note: --seqlen: 129 tokens are more than the model's 128 positions") == times, said
