"""data/*/prepare.py: what is written is what was read, and bad input is one line that names it."""

import dataclasses
import gzip
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import needs_shared

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "real"


def load_script(path):
    """prepare.py as a module; three files share that name, so each gets its own."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


alpaca = load_script("data/alpaca/prepare.py")

RECORDS = [
    {
        "instruction": f"Name {i} things that are {colour}.",
        "input": "in a garden" if i % 3 == 0 else "",
        "output": f"Here are {i} {colour} things: " + "leaf, " * i + "and {no} more.",
    }
    for i, colour in enumerate(["red", "green", "blue", "white"] * 6, start=1)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Path of a small sentencepiece model in LLaMA's manner."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    model = io.BytesIO()
    text = [line for r in RECORDS for line in (alpaca.prompt(r) + r["output"]).split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    path.write_bytes(model.getvalue())
    return path


def run(script, *argv):
    """Runs a script as a user would; returns (exit status, stdout, stderr)."""
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def call(module, monkeypatch, *argv):
    """Runs a script's main in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, argv)])
    module.main()


def examples(folder, split):
    tokens, offsets, prompt = (np.load(folder / f"{split}{part}.npy") for part in ("", ".offsets", ".prompt"))
    return [(tokens[a:b].tolist(), n) for a, b, n in zip(offsets[:-1], offsets[1:], prompt, strict=True)]


@pytest.fixture
def records_file(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS))
    return path


def test_prompts_are_alpacas_word_for_word():
    with_input = alpaca.prompt({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:\n"
    )
    assert alpaca.prompt({"instruction": "Add.", "input": "", "output": "3"}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )


def test_every_record_comes_back_from_the_tokens(tmp_path, monkeypatch, tokenizer, records_file):
    out = tmp_path / "out"
    call(alpaca, monkeypatch, "--tokenizer", tokenizer, "--json", records_file, "--val", 5, "--out", out)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    train, val = examples(out, "train"), examples(out, "val")
    assert (len(train), len(val)) == (len(RECORDS) - 5, 5)
    assert np.load(out / "train.npy").dtype == np.uint16
    assert np.load(out / "train.offsets.npy").dtype == np.int64
    assert np.load(out / "train.prompt.npy").dtype == np.int32
    expected = {alpaca.prompt(r) + r["output"]: r for r in RECORDS}
    seen = set()
    for tokens, n in train + val:
        assert tokens[0] == sp.bos_id() and tokens[-1] == sp.eos_id()
        whole = sp.decode(tokens[1:-1])
        seen.add(whole)
        assert sp.decode(tokens[1:n]) == alpaca.prompt(expected[whole])
    assert seen == set(expected)
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["train"], meta["val"], meta["vocab_size"]) == (len(train), len(val), sp.vocab_size())


def test_the_held_out_examples_depend_on_the_seed_alone(tmp_path, monkeypatch, tokenizer, records_file):
    folders = [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        argv = ("--tokenizer", tokenizer, "--json", records_file, "--val", 5, "--seed", seed, "--out", folder)
        call(alpaca, monkeypatch, *argv)
    a, b, c = (examples(folder, "val") for folder in folders)
    assert a == b and a != c


def test_long_examples_are_cut_at_max_len(tmp_path, monkeypatch, tokenizer, records_file):
    argv = ("--tokenizer", tokenizer, "--json", records_file, "--val", 5, "--max_len", 40, "--out", tmp_path / "out")
    call(alpaca, monkeypatch, *argv)
    for tokens, n in examples(tmp_path / "out", "train"):
        assert len(tokens) == 40 and 1 <= n <= 40


def test_a_second_run_replaces_the_folder_and_leaves_other_files(tmp_path, monkeypatch, tokenizer, records_file):
    out = tmp_path / "out"
    out.mkdir()
    (out / "prepare.py").write_text("mine")
    for val in (5, 7):
        call(alpaca, monkeypatch, "--tokenizer", tokenizer, "--json", records_file, "--val", val, "--out", out)
        assert len(examples(out, "val")) == val
    assert (out / "prepare.py").read_text() == "mine"
    assert not [f for f in out.iterdir() if f.name.startswith(".")]


def test_a_disk_that_fills_up_leaves_the_old_folder(tmp_path, monkeypatch, tokenizer, records_file):
    out = tmp_path / "out"
    call(alpaca, monkeypatch, "--tokenizer", tokenizer, "--json", records_file, "--val", 5, "--out", out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(alpaca.np, "save", full)
    with pytest.raises(alpaca.UserError, match="No space left"):
        call(alpaca, monkeypatch, "--tokenizer", tokenizer, "--json", records_file, "--val", 7, "--out", out)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_tokenizer_may_be_a_file_a_directory_or_a_checkpoint_of_ours(tmp_path, monkeypatch, tokenizer, records_file):
    from model import PRESETS, Llama, load_tokenizer, save

    model = Llama(dataclasses.replace(PRESETS["test"], vocab_size=512))
    save(model, tmp_path / "model.pt", load_tokenizer(tokenizer))
    save(model, tmp_path / "bare.pt")
    for i, source in enumerate([tokenizer, tokenizer.parent, tmp_path / "model.pt"]):
        out = tmp_path / f"out{i}"
        call(alpaca, monkeypatch, "--tokenizer", source, "--json", records_file, "--val", 5, "--out", out)
        assert examples(out, "val") == examples(tmp_path / "out0", "val")
    with pytest.raises(alpaca.UserError, match="holds no tokenizer"):
        argv = ("--tokenizer", tmp_path / "bare.pt", "--json", records_file, "--val", 5, "--out", tmp_path / "x")
        call(alpaca, monkeypatch, *argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"instruction": "a"}', "is a JSON dict, expected a list"),
        ('["a"]', "record 0 is a str"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "record 1: `output` is missing"),
        ('[{"instruction": 3, "output": "b"}]', "record 0: `instruction` is int, expected a string"),
        ('[{"instruction": "a", "input": null, "output": "b"}]', "record 0: `input` is NoneType"),
        ('[{"instruction": " ", "output": "b"}]', "record 0: `instruction` is empty"),
        ('[{"instruction": "a", "output": ""}]', "record 0: `output` is empty"),
        ('[{"instruction": "a", "output": "b"}]', "1 records, and --val 5 leaves none"),
        ("[]", "0 records"),
    ],
)
def test_bad_records_are_named(tmp_path, monkeypatch, tokenizer, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(alpaca.UserError, match=message) as e:
        call(alpaca, monkeypatch, "--tokenizer", tokenizer, "--json", path, "--val", 5, "--out", tmp_path / "out")
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    assert not (tmp_path / "out").exists()


def test_empty_records_are_left_out_when_asked_for(tmp_path, monkeypatch, capsys, tokenizer):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([*RECORDS, {"instruction": "a", "output": ""}]))
    argv = ("--tokenizer", tokenizer, "--json", path, "--val", 5, "--skip_empty", "--out", tmp_path / "out")
    call(alpaca, monkeypatch, *argv)
    assert f"1 of {len(RECORDS) + 1} records have an empty" in capsys.readouterr().out
    assert len(examples(tmp_path / "out", "train")) == len(RECORDS) - 5


def test_bad_flags_end_in_one_line_and_status_2(tmp_path, tokenizer, records_file):
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "meta.json").write_text("{}")
    good = {"--tokenizer": tokenizer, "--json": records_file, "--val": 5, "--out": tmp_path / "out"}
    for flag, value, message in [
        ("--tokenizer", tmp_path / "none.model", "none.model: cannot be read"),
        ("--tokenizer", records_file, "is not a sentencepiece model"),
        ("--json", tmp_path / "none.json", "none.json: cannot be read"),
        ("--val", 0, "--val 0: expected at least 1"),
        ("--max_len", 1, "--max_len 1: expected at least 2"),
        ("--out", tmp_path / "file", "is a file, expected a folder"),
        ("--out", tmp_path / "theirs", "that no prepare.py wrote"),
    ]:
        status, _, stderr = run("data/alpaca/prepare.py", *(x for pair in {**good, flag: value}.items() for x in pair))
        assert (status, len(stderr.splitlines())) == (2, 1), stderr
        assert message in stderr


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/real")
def test_real_alpaca_records_with_llamas_tokenizer(tmp_path, monkeypatch):
    argv = ("--tokenizer", SHARED / "llama_tokenizer.model", "--json", SHARED / "alpaca_en_demo.json", "--val", 99)
    call(alpaca, monkeypatch, *argv, "--out", tmp_path / "out")
    train, val = examples(tmp_path / "out", "train"), examples(tmp_path / "out", "val")
    assert (len(train), len(val)) == (900, 99)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / "llama_tokenizer.model"))
    texts = {alpaca.prompt(r) + r["output"] for r in json.loads((SHARED / "alpaca_en_demo.json").read_text())}
    whole = [sp.decode(t[1:-1]) for t, _ in train + val if t[-1] == sp.eos_id()]
    assert len(whole) > 900 and set(whole) <= texts


# ----------------------------------------------------------------------------------------------------------------------
# C4: calibration windows


def c4(tmp_path, *flags, lines=None):
    words = ["bada kimu dogu ruku " * 30, "bada", "ruku mina bada " * 40]
    source = tmp_path / "c4.jsonl"
    source.write_text("".join(line + "\n" for line in lines or [json.dumps({"text": text}) for text in words]))
    line = [
        sys.executable,
        ROOT / "data" / "c4" / "prepare.py",
        "--json",
        source,
        "--out",
        tmp_path / "calib.npy",
        *flags,
    ]
    return subprocess.run([str(x) for x in line], capture_output=True, text=True, timeout=60)


def test_calibration_windows_are_pieces_of_long_documents(tmp_path, tokenizer_file):
    tokenizer = sentencepiece.SentencePieceProcessor(str(tokenizer_file))
    result = c4(tmp_path, "--tokenizer", tokenizer_file, "--nsamples", 20, "--seqlen", 32)
    assert result.returncode == 0, result.stderr
    windows = np.load(tmp_path / "calib.npy")
    assert windows.shape == (20, 32) and windows.dtype == np.int32
    documents = [[1, *tokenizer.encode(text)] for text in ("bada kimu dogu ruku " * 30, "ruku mina bada " * 40)]
    for w in windows.tolist():
        assert any(w == d[i : i + 32] for d in documents for i in range(len(d) - 32))


def test_gzipped_c4_gives_the_same_windows(tmp_path, tokenizer_file):
    c4(tmp_path, "--tokenizer", tokenizer_file, "--nsamples", 4, "--seqlen", 16)
    plain = np.load(tmp_path / "calib.npy")
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress((tmp_path / "c4.jsonl").read_bytes()))
    c4(tmp_path, "--tokenizer", tokenizer_file, "--nsamples", 4, "--seqlen", 16, "--json", tmp_path / "c4.json.gz")
    assert np.array_equal(plain, np.load(tmp_path / "calib.npy"))


@pytest.mark.parametrize(
    "flags, lines, words",
    [
        (("--seqlen", 9999), None, "none of the 3 documents"),
        (("--seqlen", 0), None, "--seqlen 0"),
        (("--seqlen", 8), ["not json"], "line 1"),
        (("--seqlen", 8), ['{"txt": 1}'], "line 1"),
        (("--json", "nowhere.jsonl"), None, "nowhere.jsonl"),
        (("--tokenizer", "nowhere.model"), None, "nowhere.model"),
        (("--out", "calib.txt"), None, ".npy"),
    ],
)
def test_wrong_calibration_input_is_one_line(tmp_path, tokenizer_file, flags, lines, words):
    result = c4(tmp_path, "--tokenizer", tokenizer_file, *flags, lines=lines)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "calib.npy").exists()


# ----------------------------------------------------------------------------------------------------------------------
# lm-eval's tasks without lm-eval


def render(tmp_path, *flags):
    line = [sys.executable, ROOT / "data" / "lm_eval" / "prepare.py", "--out", tmp_path, *flags]
    return subprocess.run([str(x) for x in line], capture_output=True, text=True, timeout=60)


@needs_shared
@pytest.mark.parametrize("task", ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "openbookqa"))
@pytest.mark.parametrize("with_config", (False, True))
def test_tasks_are_rendered_as_lm_eval_does(tmp_path, task, with_config):
    samples = SHARED / "lm_eval" / "samples"
    theirs = [json.loads(x) for x in (samples / f"dummy_0shot__{task}_local.jsonl").read_text().splitlines()]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(r["doc"]) + "\n" for r in theirs))
    flags = ("--task", task, "--json", tmp_path / "docs.jsonl")
    if with_config:
        flags = ("--task", f"{task}_local", *flags[2:], "--config", samples / "dummy_0shot__results.json")
    result = render(tmp_path, *flags)
    if with_config and task in ("hellaswag", "winogrande"):
        assert result.returncode == 2 and "Python" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    ours = [json.loads(x) for x in (tmp_path / f"samples_{flags[1]}.jsonl").read_text().splitlines()]
    assert [r["arguments"] for r in ours] == [r["arguments"] for r in theirs]
    assert [r["target"] for r in ours] == [r["target"] for r in theirs]


@needs_shared
def test_mmlu_is_rendered_with_its_five_shots(tmp_path):
    theirs = [
        json.loads(x)
        for x in (SHARED / "lm_eval" / "samples" / "dummy_mmlu5__mmlu_abstract_algebra_local.jsonl")
        .read_text()
        .splitlines()
    ]
    # the shots are read back from the first context
    blocks = theirs[0]["arguments"]["gen_args_0"]["arg_0"].split("\n\n")[1:6]
    dev = []
    for block in blocks:
        question, rest = block.split("\nA. ")
        a, rest = rest.split("\nB. ")
        b, rest = rest.split("\nC. ")
        c, rest = rest.split("\nD. ")
        d, answer = rest.split("\nAnswer: ")
        dev.append(
            {
                "question": question,
                "choices": [a, b, c, d],
                "answer": "ABCD".index(answer),
                "subject": "abstract_algebra",
            }
        )
    for name, docs in (("test", [r["doc"] for r in theirs]), ("dev", dev)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    result = render(tmp_path, "--task", "mmlu", "--json", tmp_path / "test.jsonl", "--shots", tmp_path / "dev.jsonl")
    assert result.returncode == 0, result.stderr
    ours = [json.loads(x) for x in (tmp_path / "samples_mmlu_abstract_algebra.jsonl").read_text().splitlines()]
    assert [r["arguments"] for r in ours] == [r["arguments"] for r in theirs]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--task", "nope"), "--task nope"),
        (("--task", "boolq", "--json", "nowhere"), "nowhere"),
        (("--task", "boolq", "--json", __file__), "not a JSON document"),
    ],
)
def test_wrong_task_input_is_one_line(tmp_path, flags, words):
    result = render(tmp_path, *flags)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_document_of_another_task_is_named(tmp_path):
    (tmp_path / "docs.jsonl").write_text('{"question": "q"}\n')
    result = render(tmp_path, "--task", "boolq", "--json", tmp_path / "docs.jsonl")
    assert result.returncode == 2 and "document 0 is not of task boolq" in result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# the tiny world


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "world"
    status, _, stderr = run("data/tiny/prepare.py", "--seed", 3, "--pages", 1500, "--instructions", 600, "--out", out)
    assert status == 0, stderr
    return out


def test_the_questions_of_the_tiny_world_are_held_out(tiny):
    """No sentence that the model is trained, pruned or fine-tuned on answers a question in the question's words."""
    known = "".join((tiny / name).read_text() for name in ("text.txt", "heldout.txt", "calib.jsonl", "alpaca.json"))
    questions = [json.loads(line) for file in tiny.glob("samples_*.jsonl") for line in file.read_text().splitlines()]
    assert len(questions) == 308 and len(list(tiny.glob("samples_*.jsonl"))) == 6
    for q in questions:
        answer = q["doc"]["choices"][int(q["target"])]
        assert f"{q['doc']['question']} {answer}." not in known
        assert len(set(q["doc"]["choices"])) == 4


def test_the_tiny_world_reads_for_perplexity_as_it_was_trained_on(tiny):
    """One line: evaluate.py would put line breaks between two that the pages never have."""
    assert "\n" not in (tiny / "heldout.txt").read_text()
    pages = (tiny / "text.txt").read_text().split("\n")  # of prose, or of an instruction
    assert sum(len(page) > 200 and "###" not in page for page in pages) > 1000


def test_a_seed_makes_one_tiny_world(tiny, tmp_path):
    for seed, same in ((3, True), (4, False)):
        out = tmp_path / str(seed)
        run("data/tiny/prepare.py", "--seed", seed, "--pages", 1500, "--instructions", 600, "--out", out)
        for name in ("text.txt", "alpaca.json", "samples_people.jsonl", "train.npy"):
            assert ((out / name).read_bytes() == (tiny / name).read_bytes()) is same
