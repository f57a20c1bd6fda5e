"""What evaluate.py promises: lm-eval's numbers from lm-eval's files, contexts shared, every edge case its way."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, needs_shared

import evaluate
from evaluate import Document, aggregates, encode_pair, judge, pack, read_task, rolling_windows, score
from model import UserError, load, save

ROOT = Path(__file__).parents[1]
SAMPLES = SHARED / "lm_eval" / "samples"


def record(i: int, context, choices, target="0", **more) -> dict:
    contexts = context if isinstance(context, list) else [context] * len(choices)
    pairs = zip(contexts, choices, strict=True)
    arguments = {f"gen_args_{k}": {"arg_0": c, "arg_1": f" {t}"} for k, (c, t) in enumerate(pairs)}
    return {"doc_id": i, "doc": {"q": str(i)}, "target": target, "arguments": arguments, "metrics": ["acc"]} | more


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def made_up(n=12, seed=0):
    rng = random.Random(seed)
    word = lambda: "".join(rng.choice("bdgkmnr") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))  # noqa: E731
    text = lambda k: " ".join(word() for _ in range(k))  # noqa: E731
    shots = text(20)
    return [
        record(
            i,
            f"{shots}\n\nQuestion: {text(rng.randint(2, 9))}\nAnswer:",
            [text(rng.randint(1, 4)) for _ in range(4)],
            str(rng.randrange(4)),
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def model(random_checkpoint):
    return load(random_checkpoint)[0]


def reference(model, tokenizer, context, continuation, add_bos=False):
    """log p of one continuation: one sequence, one forward, a loop over its tokens."""
    c = ([tokenizer.bos_id()] if add_bos or not context else []) + tokenizer.encode(context)
    whole = ([tokenizer.bos_id()] if add_bos or not context else []) + tokenizer.encode(context + continuation)
    with torch.no_grad():
        logp = model(torch.tensor([whole]))[0].double().log_softmax(-1)
    return sum(logp[p - 1, whole[p]].item() for p in range(len(c), len(whole)))


def run(random_checkpoint, out, *flags, processes=1):
    line = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    line += [ROOT / "evaluate.py", "--ckpt", random_checkpoint, "--out", out, "--device", "cpu", *flags]
    return subprocess.run(
        [str(x) for x in line], capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


# ----------------------------------------------------------------------------------------------------------------------
# against lm-eval itself


@needs_shared
@pytest.mark.parametrize(
    "run_name, add_bos", [("0shot", True), ("0shot_nobos", False), ("2shot", True), ("mmlu5", True)]
)
def test_log_likelihoods_accuracies_and_errors_are_lm_evals(run_name, add_bos):
    model, tokenizer = load(SHARED / "lm_eval" / "tiny_llama")
    theirs = json.loads((SAMPLES / f"hf_{run_name}__results.json").read_text())["results"]
    for path in SAMPLES.glob(f"hf_{run_name}__*.jsonl"):
        name, documents = read_task(path)
        if evaluate.is_rolling(documents[0]):
            continue
        result, scores = evaluate.run_task(model, tokenizer, documents, add_bos)
        for document, s in zip(documents, scores, strict=True):
            for (ll, greedy), (value, hit) in zip(s, document.record["filtered_resps"], strict=True):
                assert ll == pytest.approx(float(value), abs=1e-3) and str(greedy) == hit
        for metric, value in theirs[name.split("__")[1]].items():
            metric, _, kind = metric.partition(",")
            if kind == "none" and metric in result:
                assert result[metric] == pytest.approx(value, abs=1e-12), (name, metric)


@needs_shared
def test_lm_evals_word_perplexity():
    model, tokenizer = load(SHARED / "lm_eval" / "tiny_llama")
    _, documents = read_task(SAMPLES / "hf_0shot__wikitext_local.jsonl")
    # tokenizer.json drops the first space of a text that begins with one, sentencepiece does not: only the others
    documents = [d for d in documents if not d.pairs[0][0].startswith(" ")]
    _, scores = evaluate.run_task(model, tokenizer, documents, add_bos=True)
    assert documents and all(
        s[0][0] == pytest.approx(float(d.record["filtered_resps"][0]), rel=1e-5)
        for d, s in zip(documents, scores, strict=True)
    )


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
def test_tokens_computed_against_lm_evals(file, at_least):
    """lm-eval 0.4.13 runs each choice with its context, but one-token continuations of one context together."""
    _, tokenizer = load(SHARED / "lm_eval" / "tiny_llama")
    _, documents = read_task(SAMPLES / f"hf_{file}_local.jsonl")
    encoded = [[encode_pair(tokenizer, *pair, True, 2048) for pair in d.pairs] for d in documents]
    theirs = sum(
        len(x)
        for choices in encoded
        for x in {(tuple(x), tuple(t) if len(t) > 1 else ()): x for x, t in choices}.values()
    )
    skip = evaluate.shared_prefix(encoded)
    ours = skip + sum(len(pack(choices, True, skip).tokens) for choices in encoded)
    assert theirs / ours >= at_least


# ----------------------------------------------------------------------------------------------------------------------
# scoring


@pytest.mark.parametrize("add_bos", (False, True))
def test_scores_equal_one_forward_per_choice(model, tokenizer, tmp_path, add_bos):
    _, documents = read_task(write(tmp_path / "samples_t.jsonl", made_up()))
    encoded = [[encode_pair(tokenizer, *pair, add_bos, 128) for pair in d.pairs] for d in documents]
    for share in (True, False):
        scores, _ = score(model, encoded, 300, share)
        for document, s in zip(documents, scores, strict=True):
            for (ll, _), pair in zip(s, document.pairs, strict=True):
                assert ll == pytest.approx(reference(model, tokenizer, *pair, add_bos), abs=1e-4)


def test_sharing_computes_fewer_tokens(model, tokenizer, tmp_path):
    _, documents = read_task(write(tmp_path / "samples_t.jsonl", made_up()))
    encoded = [[encode_pair(tokenizer, *pair, False, 128) for pair in d.pairs] for d in documents]
    assert evaluate.shared_prefix(encoded) > 20
    assert score(model, encoded, 300, True)[1] < 0.4 * score(model, encoded, 300, False)[1]


def test_contexts_that_differ_share_what_they_can(model, tokenizer):
    pairs = [("bada kimu, bada", " ruku"), ("bada kimu, dogi", " ruku")]  # as WinoGrande
    encoded = [encode_pair(tokenizer, *pair, False, 128) for pair in pairs]
    row = pack(encoded, True)
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
def test_edge_cases_of_encoding(model, tokenizer, pairs):
    encoded = [encode_pair(tokenizer, *pair, False, 128) for pair in pairs]
    scores, _ = score(model, [encoded], 300, True)
    for (context, continuation), (ll, _), (x, targets) in zip(pairs, scores[0], encoded, strict=True):
        stripped = context.rstrip()
        moved = context[len(stripped) :] + continuation
        assert ll == pytest.approx(reference(model, tokenizer, stripped, moved), abs=1e-4)
        assert len(x) >= len(targets) >= 1


def test_a_context_longer_than_the_model_is_cut_from_the_left(model, tokenizer):
    context, continuation = "bada kimu " * 60 + "dogu:", " ruku"
    x, targets = encode_pair(tokenizer, context, continuation, True, 128)
    whole = tokenizer.encode(context + continuation)
    assert x == whole[-129:-1] and targets == whole[-len(targets) :]
    scores, _ = score(model, [[(x, targets), (x, targets)]], 300, True)
    with torch.no_grad():
        logp = model(torch.tensor([x]))[0].double().log_softmax(-1)
    expected = sum(logp[len(x) - len(targets) + i, t].item() for i, t in enumerate(targets))
    assert scores[0][0][0] == pytest.approx(expected, abs=1e-4)


def test_rolling_windows_predict_every_token_once():
    tokens = list(range(100, 123))
    windows = rolling_windows(tokens, 1, 10)
    assert [t for _, targets in windows for t in targets] == tokens
    assert windows[0] == ([1, *tokens[:9]], tokens[:10])
    assert windows[2] == (tokens[12:22], tokens[20:23])  # the last window looks back as far as it can


def document(choices, target, context="q", **more):
    return evaluate.read_document(record(0, context, choices, target, **more), "here")


@pytest.mark.parametrize(
    "choices, target, gold",
    [
        (["a", "b"], "1", {1}),
        (["a", "b"], "b", {1}),
        (["2", "1", "0"], "1", {1}),  # a digit that is a choice is a text
        (["a", "b", "c"], "[0, 2]", {0, 2}),
        (["a", "b"], "['b']", {1}),
        (["a", "b"], "nowhere", {-100}),  # always wrong
        (["a", "b"], "7", {7}),
        (["a", "b"], 1, {1}),
    ],
)
def test_gold_answers(choices, target, gold):
    assert document(choices, target).gold == gold


def test_winograndes_gold_is_its_answer():
    doc = record(0, ["x a", "x b"], ["tail", "tail"], "tail") | {"doc": {"answer": "2"}}
    assert evaluate.read_document(doc, "here").gold == {1}


def test_ties_go_to_the_first_and_norm_counts_characters():
    d = document(["aa", "bbbb"], "0")
    assert judge(d, [(-1.0, False), (-1.0, False)]) == {"acc": 1.0, "acc_norm": 0.0, "acc_bytes": 0.0}
    d = document(["äää", "bbbb"], "1")  # 3 characters, 6 bytes
    assert judge(d, [(-3.0, False), (-3.9, False)]) == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 0.0}


def test_mutual_information_subtracts_the_unconditional():
    d = Document({}, [("q", " a"), ("q", " b"), ("", " a"), ("", " b")], {1})
    assert judge(d, [(-1.0, False), (-2.0, False), (-1.0, False), (-5.0, False)])["acc_mutual_info"] == 1.0


def test_aggregates_are_lm_evals():
    results = {
        f"mmlu_{i}": evaluate.summarise([{"acc": float(k < right)} for k in range(n)])
        for i, (right, n) in enumerate([(3, 10), (5, 6)])
    }
    mmlu = aggregates(results)
    assert mmlu["mmlu"]["acc"] == pytest.approx(8 / 16) and mmlu["mmlu, mean of subjects"]["acc"] == pytest.approx(
        (0.3 + 5 / 6) / 2
    )
    se = [math.sqrt(p * (1 - p) / (n - 1)) for p, n in ((0.3, 10), (5 / 6, 6))]
    pooled = (9 * se[0] ** 2 * 10 + 5 * se[1] ** 2 * 6) / (16 - 2) / 16
    assert mmlu["mmlu"]["acc_stderr"] == pytest.approx(math.sqrt(pooled))
    seven = {task: {"acc": i / 10} for i, task in enumerate(evaluate.SEVEN)}
    assert aggregates(seven)["average of seven"]["acc"] == pytest.approx(0.3)
    assert "average of seven" not in aggregates({k: v for k, v in seven.items() if k != "rte"})


# ----------------------------------------------------------------------------------------------------------------------
# perplexity


def test_perplexity_is_wandas(model, tokenizer, tmp_path):
    text = "\n bada kimu \n \ndogu ruku bada kimu\n" * 30
    (tmp_path / "text.txt").write_text(text)
    ours, n = evaluate.perplexity(model, evaluate.read_text(str(tmp_path / "text.txt"), tokenizer), 32, 100)
    # independently: rows as the data set has them, one string, one tokenisation, windows, cross-entropy
    rows = ["" if line.isspace() else line for line in text.splitlines(keepends=True)]
    tokens = torch.tensor([[1, *tokenizer.encode("\n\n".join(rows))]])
    nlls = []
    for i in range(tokens.shape[1] // 32):
        window = tokens[:, 32 * i : 32 * (i + 1)]
        with torch.no_grad():
            nlls.append(F.cross_entropy(model(window)[0, :-1], window[0, 1:]) * 32)
    assert ours == pytest.approx(torch.exp(torch.stack(nlls).sum() / (len(nlls) * 32)).item(), rel=1e-5)
    assert n == 32 * len(nlls)


# ----------------------------------------------------------------------------------------------------------------------
# the command


def test_the_command_writes_what_design_says(random_checkpoint, tmp_path):
    tasks = write(tmp_path / "samples_made_up_2026-01-01T00-00-00.1.jsonl", made_up())
    (tmp_path / "text.txt").write_text("bada kimu dogu\n" * 100)
    result = run(
        random_checkpoint,
        tmp_path / "r.json",
        "--tasks",
        tasks,
        "--ppl",
        tmp_path / "text.txt",
        "--seqlen",
        64,
        "--log_samples",
        tmp_path / "log",
    )
    assert result.returncode == 0, result.stderr
    out = json.loads((tmp_path / "r.json").read_text())
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"} <= out["results"]["made_up"].keys()
    assert out["perplexity"]["text"].keys() == {"ppl", "seqlen", "tokens"} and out["add_bos"] is False
    assert "made_up" in result.stdout and not (tmp_path / "r.json.partial").exists()
    _, again = read_task(tmp_path / "log" / "samples_made_up.jsonl")
    assert len(again) == 12 and all(len(d.record["filtered_resps"]) == 4 for d in again)


def test_two_processes_give_identical_results(random_checkpoint, tmp_path):
    tasks = write(tmp_path / "samples_t.jsonl", made_up(20))
    for processes in (1, 2):
        flags = ("--tasks", tasks, "--batch_tokens", 200, "--log_samples", tmp_path / str(processes))
        result = run(random_checkpoint, tmp_path / f"{processes}.json", *flags, processes=processes)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    assert (tmp_path / "1" / "samples_t.jsonl").read_text() == (tmp_path / "2" / "samples_t.jsonl").read_text()


def test_an_interrupted_run_keeps_its_finished_tasks(random_checkpoint, tmp_path, monkeypatch):
    first, second = (write(tmp_path / f"samples_{x}.jsonl", made_up(seed=i)) for i, x in enumerate("ab"))
    line = [
        "evaluate.py",
        "--ckpt",
        str(random_checkpoint),
        "--tasks",
        str(first),
        str(second),
        "--out",
        str(tmp_path / "r.json"),
    ]
    monkeypatch.setattr(sys, "argv", [*line, "--device", "cpu"])
    calls, run_task = [], evaluate.run_task

    def interrupted(*args):
        calls.append(args[-1])
        if calls == ["a", "b"]:
            raise KeyboardInterrupt
        return run_task(*args)

    monkeypatch.setattr(evaluate, "run_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main()
    evaluate.main()
    assert calls == ["a", "b", "b"]
    assert json.loads((tmp_path / "r.json").read_text())["results"].keys() == {"a", "b"}


def test_old_array_files_are_read(tmp_path):
    old = [{"doc_id": 0, "doc": {}, "target": 1, "arguments": [["q", " a"], ["q", " b"]], "resps": [], "acc": 1.0}]
    (tmp_path / "samples_old.json").write_text(json.dumps(old))
    name, documents = read_task(tmp_path / "samples_old.json")
    assert name == "old" and documents[0].gold == {1} and documents[0].choices == ["a", "b"]


@pytest.mark.parametrize(
    "records, words",
    [
        (
            [record(0, "q", ["a", "b"]) | {"arguments": {"gen_args_0": {"arg_0": "q", "arg_1": {"until": ["\n"]}}}}],
            "generative",
        ),
        ([record(0, "q", ["a", "b"]), record(1, "q", ["a", "b"]) | {"doc": {"other": 1}}], "line 2 is of another task"),
        ([record(0, "q", ["a"])], "1 choices"),
        ([record(0, "q", ["a", "b"], doc={"choices": ["a", "b", "c"]})], "a choice was lost"),
        (
            [
                record(0, "q", ["a", "b"])
                | {
                    "arguments": {
                        "gen_args_0": {"arg_0": "q", "arg_1": "a"},
                        "gen_args_2": {"arg_0": "q", "arg_1": "b"},
                    }
                }
            ],
            "gen_args_1 is missing",
        ),
        ([record(0, "q", ["a", "b"], None)], "no gold"),
        ([record(0, ["q a", "q b"], ["t", "t"], "t")], "`answer`"),
        ([{"doc": {}}], "not a sample"),
        ([[1]], "not a sample"),
        ([], "no sample"),
    ],
)
def test_a_wrong_samples_file_is_one_line(tmp_path, records, words):
    with pytest.raises(UserError, match=words):
        read_task(write(tmp_path / "samples_x.jsonl", records))


def test_a_file_cut_in_mid_line_is_refused(random_checkpoint, tmp_path):
    path = write(tmp_path / "samples_x.jsonl", made_up())
    path.write_text(path.read_text()[:-30])
    result = run(random_checkpoint, tmp_path / "r.json", "--tasks", path)
    assert result.returncode == 2 and "line 12 is not JSON" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), "nothing to do"),
        (("--tasks", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--ppl", "nowhere.txt"), "nowhere.txt"),
        (("--ppl", __file__, "--seqlen", 10**6), "fewer than one window"),
        (("--ppl", __file__, "--semi_structured"), "needs an NVIDIA GPU"),
        (("--ppl", __file__, "--ckpt", "nowhere.pt"), "nowhere.pt"),
        (("--ppl", __file__, "--out", "results.txt"), "must end in .json"),
    ],
)
def test_a_wrong_flag_is_one_line(random_checkpoint, tmp_path, flags, words):
    result = run(random_checkpoint, tmp_path / "r.json", *flags)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "r.json").exists()


def test_nan_names_the_layer(tokenizer, random_checkpoint, tmp_path):
    model, _ = load(random_checkpoint)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    save(model, tmp_path / "nan.pt", tokenizer)
    path = write(tmp_path / "samples_x.jsonl", made_up())
    result = run(tmp_path / "nan.pt", tmp_path / "r.json", "--tasks", path)
    assert result.returncode == 2 and "layers.1" in result.stderr
