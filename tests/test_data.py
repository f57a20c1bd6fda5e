"""data/*/prepare.py: what is written is what was read, and bad input is one line that names it."""

import dataclasses
import gzip
import http.client
import io
import json
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, SHARED, needs_shared
from jinja2.sandbox import SecurityError

from data.alpaca import prepare as alpaca
from data.c4 import prepare as c4
from data.checkpoint import VERSION, UserError, digest, lock
from data.lm_eval import prepare as lm_eval
from data.lm_eval.samples import read_task
from data.tiny import prepare as tiny
from data.tokenizer import load_tokenizer
from model import PRESETS, Llama, save

RECORDS = [
    {
        "instruction": f"Name {i} things that are {colour}.",
        "input": "in a garden" if i % 3 == 0 else "",
        "output": f"Here are {i} {colour} things: " + "leaf, " * i + "and {no} more.",
    }
    for i, colour in enumerate(["red", "green", "blue", "white"] * 6, start=1)
]


def train_tokenizer(path: Path, **options) -> Path:
    """A sentencepiece model of the records that gives every character back, as LLaMA's does."""
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
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def lossless(tmp_path_factory) -> Path:
    """A tokenizer.model from which every record comes back."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def call(script, monkeypatch, *argv) -> None:
    """Runs a prepare.py with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, argv)])
    script.main()


def refusal(script, monkeypatch, *argv) -> str:
    """The line in which a prepare.py refuses these arguments."""
    with pytest.raises(UserError) as e:
        call(script, monkeypatch, *argv)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


@pytest.mark.parametrize(
    "folder, flags, words",
    [
        ("alpaca", ("--tokenizer", "none.model", "--out", "out"), "none.model: cannot be read"),
        ("c4", ("--tokenizer", "none.model", "--out", "out.npy"), "none.model: cannot be read"),
        ("lm_eval", ("--task", "nope", "--out", "out"), "--task nope"),
        ("tiny", ("--pages", "5", "--out", "out"), "--pages: expected at least 100, found 5"),
    ],
)
def test_a_refusal_is_one_line_and_status_2(tmp_path, folder, flags, words):
    """The commands themselves; what else they refuse is tested in this process: to start one takes a second."""
    line = [sys.executable, str(ROOT / "data" / folder / "prepare.py"), *flags]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not [*tmp_path.iterdir()]


# ----------------------------------------------------------------------------------------------------------------------
# Alpaca


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


def test_every_record_comes_back_from_the_tokens(tmp_path, monkeypatch, lossless, records_file):
    out = tmp_path / "out"
    call(alpaca, monkeypatch, "--tokenizer", lossless, "--json", records_file, "--val", 5, "--out", out)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(lossless))
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
    assert meta["version"] == VERSION and meta["tokenizer"] == load_tokenizer(lossless).fingerprint
    assert meta["source_digest"] == digest(records_file.read_bytes())


def test_the_held_out_examples_depend_on_the_seed_alone(tmp_path, monkeypatch, lossless, records_file):
    folders = [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        argv = ("--tokenizer", lossless, "--json", records_file, "--val", 5, "--seed", seed, "--out", folder)
        call(alpaca, monkeypatch, *argv)
    a, b, c = (examples(folder, "val") for folder in folders)
    assert a == b and a != c


def test_long_examples_are_cut_at_max_len(tmp_path, monkeypatch, capsys, lossless, records_file):
    argv = ("--tokenizer", lossless, "--json", records_file, "--val", 5, "--max_len", 40, "--out", tmp_path / "out")
    call(alpaca, monkeypatch, *argv)
    for tokens, n in examples(tmp_path / "out", "train"):
        assert len(tokens) == 40 and 1 <= n <= 40
    mute = sum(n == 40 for split in ("train", "val") for _, n in examples(tmp_path / "out", split))
    assert mute and f"warning: {mute} of these keep no token of their answer" in capsys.readouterr().out


def test_a_second_run_replaces_the_folder_and_leaves_other_files(tmp_path, monkeypatch, lossless, records_file):
    out = tmp_path / "out"
    out.mkdir()
    (out / "prepare.py").write_text("mine")
    for val in (5, 7):
        call(alpaca, monkeypatch, "--tokenizer", lossless, "--json", records_file, "--val", val, "--out", out)
        assert len(examples(out, "val")) == val
    assert (out / "prepare.py").read_text() == "mine"
    assert [f.name for f in out.iterdir() if f.name.startswith(".")] == [".lock"]


def test_a_second_process_at_work_in_the_folder_is_refused(tmp_path, monkeypatch, lossless, records_file):
    argv = ("--tokenizer", lossless, "--json", records_file, "--val", 5, "--out", tmp_path / "out")
    with lock(tmp_path / "out"):
        line = refusal(alpaca, monkeypatch, *argv)
        assert line == f"{tmp_path / 'out'}: another run is at work in it; stop it, or wait for its end"
        assert [f.name for f in (tmp_path / "out").iterdir()] == [".lock"]
    inode = (tmp_path / "out" / ".lock").stat().st_ino
    call(alpaca, monkeypatch, *argv)
    assert (tmp_path / "out" / ".lock").stat().st_ino == inode  # never replaced, or two could hold one each


def test_a_disk_that_fills_up_leaves_the_old_folder(tmp_path, monkeypatch, lossless, records_file):
    out = tmp_path / "out"
    call(alpaca, monkeypatch, "--tokenizer", lossless, "--json", records_file, "--val", 5, "--out", out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(alpaca, "save_npy", full)
    argv = ("--tokenizer", lossless, "--json", records_file, "--val", 7, "--out", out)
    assert "No space left" in refusal(alpaca, monkeypatch, *argv)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_tokenizer_may_be_a_file_a_directory_or_a_checkpoint_of_ours(tmp_path, monkeypatch, lossless, records_file):
    model = Llama(dataclasses.replace(PRESETS["test"], vocab_size=512))
    save(model, tmp_path / "model.pt", load_tokenizer(lossless))
    save(model, tmp_path / "bare.pt")
    for i, source in enumerate([lossless, lossless.parent, tmp_path / "model.pt"]):
        out = tmp_path / f"out{i}"
        call(alpaca, monkeypatch, "--tokenizer", source, "--json", records_file, "--val", 5, "--out", out)
        assert examples(out, "val") == examples(tmp_path / "out0", "val")
    argv = ("--tokenizer", tmp_path / "bare.pt", "--json", records_file, "--val", 5, "--out", tmp_path / "x")
    assert "bare.pt: holds no tokenizer" in refusal(alpaca, monkeypatch, *argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("{", "line 1 (an object on each line): is not JSON"),
        ("5", "is a JSON int, expected a list"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}', "record 1: `output` is missing"),
        ('["a"]', "record 0 is a str"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "record 1: `output` is missing"),
        ('[{"instruction": 3, "output": "b"}]', "record 0: `instruction` is int, expected a string"),
        ('[{"instruction": "a", "input": 5, "output": "b"}]', "record 0: `input` is int"),
        ('[{"instruction": "a", "output": "b", "history": [["c", "d"]]}]', "record 0: holds a `history`, which is not"),
        ('[{"conversations": [], "system": "Be rude."}]', "record 0: holds a `system`, which is not read"),
        ('[{"conversations": [], "system_prompt": "Be rude."}]', "record 0: holds a `system_prompt`, which is not"),
        ('[{"messages": [{"role": "user", "content": "x", "loss": false}]}]', "record 0: turn 0 has a `loss`"),
        ('[{"messages": [{"role": "user", "content": "x", "thinking": "y"}]}]', "record 0: turn 0 has a `thinking`"),
        ('[{"instruction": "a", "output": "b", "kto_tag": false}]', "record 0: holds a `kto_tag`, which is not read"),
        ('[{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}]', "record 0: turn 0 has a `weight`"),
        ('[{"instruction": " ", "output": "b"}]', "record 0: `instruction` is empty"),
        ('[{"instruction": "a", "output": ""}]', "record 0: `output` is empty"),
        ('[{"instruction": "a", "output": "cut \\ud83d"}]', "record 0: `output`: holds half of a surrogate pair"),
        ("[" * 10**5, "is not JSON"),
        (b"\xff[]", "is not JSON"),
        (gzip.compress(b"[]", mtime=0), "is not JSON"),
        ('[{"conversations": 5}]', "record 0: `conversations` is not a list of objects"),
        ('[{"conversations": []}]', "record 0: `conversations` is empty"),
        ('[{"conversations": [{"from": "system", "value": "s"}]}]', "record 0: `conversations` is empty"),
        ('[{"messages": [{}], "conversations": [{}]}]', "record 0: holds `conversations` and another text to learn"),
        ('[{"messages": [{}], "instruction": "a"}]', "record 0: holds `messages` and another text to learn"),
        ('[{"messages": [], "images": ["x.jpg"]}]', "record 0: holds a `images`, which is not read"),
        ('[{"messages": [{"role": "user", "train": false}]}]', "record 0: turn 0 has a `train`, which is not read"),
        ('[{"conversations": [{"from": "human"}]}]', "record 0: turn 0: `value` is missing, expected a string"),
        ('[{"messages": [{"role": "user", "content": ["a"]}]}]', "record 0: turn 0: `content` has a part that is no"),
        (
            '[{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}]',
            "record 0: turn 0: `content` has a part that is no text",
        ),
        ('[{"messages": [{"role": "user", "content": [{"type": "text"}]}]}]', "record 0: turn 0: `text` is missing"),
        ('[{"messages": [{"role": "system", "content": null}]}]', "record 0: `messages` is empty"),
        ('[{"messages": [{"role": "user", "content": "\\udc00"}]}]', "record 0: turn 0: `content`: holds half of a"),
        (
            '[{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "x"},'
            ' {"role": "assistant", "content": " "}]}]',
            "record 0: `turn 2` is empty",
        ),
        ('[{"messages": [{"role": "tool", "content": "x"}]}]', "record 0: turn 0 is by 'tool', expected human"),
        ('[{"conversations": [{"from": "human", "value": "x"}]}]', "record 0: `answer` is empty"),
        (
            '[{"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}]',
            "record 0: turn 0 has a `tool_calls`",
        ),
        ('[{"instruction": "a", "output": "b"}]', "holds 1 records, no more than the 5 that --val holds out"),
        ("[]", "holds 0 records"),
    ],
)
def test_bad_records_are_named(tmp_path, monkeypatch, lossless, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = ("--tokenizer", lossless, "--json", path, "--val", 5, "--out", tmp_path / "out")
    assert f"{path}: {message}" in refusal(alpaca, monkeypatch, *argv)
    assert not (tmp_path / "out").exists()


def test_empty_records_are_left_out_when_asked_for(tmp_path, monkeypatch, capsys, lossless):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([*RECORDS, {"instruction": "a", "output": ""}]))
    argv = ("--tokenizer", lossless, "--json", path, "--val", 5, "--skip_empty", "--out", tmp_path / "out")
    call(alpaca, monkeypatch, *argv)
    assert f"1 of {len(RECORDS) + 1} records have an empty" in capsys.readouterr().out
    assert len(examples(tmp_path / "out", "train")) == len(RECORDS) - 5


def decoded(tokenizer: Path, folder: Path, split: str) -> list[tuple[str, str]]:
    """The examples of a folder as (prompt, answer)."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    pairs = [(sp.decode(tokens[1:n]), sp.decode(tokens[1:-1])) for tokens, n in examples(folder, split)]
    return [(p, whole.removeprefix(p)) for p, whole in pairs]


def test_records_that_are_trained_on_are_not_held_out(tmp_path, monkeypatch, capsys, lossless):
    """A validation loss on what was trained on is none: every record stands twice, and none on both sides."""
    path = tmp_path / "twice.json"
    path.write_text(json.dumps(RECORDS * 2))
    held_out = len(RECORDS) + 3  # more than half: some have both of their copies there
    call(alpaca, monkeypatch, "--tokenizer", lossless, "--json", path, "--val", held_out, "--out", tmp_path / "out")
    train, val = (decoded(lossless, tmp_path / "out", split) for split in ("train", "val"))
    assert len(train) == 2 * len(RECORDS) - held_out and not set(train) & set(val)
    dropped = held_out - len(val)
    assert 0 < dropped < held_out
    assert f"{dropped} of {held_out} held-out records are trained on too: left out" in capsys.readouterr().out


def test_records_that_the_cut_makes_equal_are_not_held_out(tmp_path, monkeypatch, capsys, lossless):
    """One long passage before different questions: with --max_len the same tokens."""
    records = [{"instruction": 60 * "a long passage " + f"and question {i}", "output": "x"} for i in range(20)]
    (tmp_path / "long.json").write_text(json.dumps(records))
    argv = ("--tokenizer", lossless, "--json", tmp_path / "long.json", "--val", 5, "--max_len", 100)
    call(alpaca, monkeypatch, *argv, "--out", tmp_path / "out")
    assert "5 of 5 held-out records are trained on too: left out" in capsys.readouterr().out
    assert len(np.load(tmp_path / "out" / "val.offsets.npy")) == 1


def test_a_validation_file_of_ones_own(tmp_path, monkeypatch, lossless, records_file):
    own = [{"instruction": "Name red things.", "output": "green leaf"}, RECORDS[3]]
    (tmp_path / "own.json").write_text(json.dumps(own))
    argv = ("--tokenizer", lossless, "--json", records_file, "--val", tmp_path / "own.json", "--out", tmp_path / "out")
    call(alpaca, monkeypatch, *argv)
    text = lambda r: (alpaca.prompt({"input": "", **r}), r["output"])
    assert decoded(lossless, tmp_path / "out", "val") == [text(r) for r in own]
    assert set(decoded(lossless, tmp_path / "out", "train")) == {text(r) for r in RECORDS if r != RECORDS[3]}
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["train"], meta["val"]) == (len(RECORDS) - 1, 2)
    assert meta["val_digest"] == digest((tmp_path / "own.json").read_bytes())


CHAT = [("human", "Name red things."), ("gpt", "leaf, leaf"), ("human", "Name blue things."), ("gpt", "and 2 more.")]
ALPACA = alpaca.prompt({"instruction": CHAT[0][1], "input": "", "output": ""})


def chats(*conversations) -> list[dict]:
    return [
        {"id": "x", "conversations": [{"from": by, "value": text} for by, text in turns]} for turns in conversations
    ]


@pytest.mark.parametrize("listed", ["messages", "conversations"])
def test_each_exchange_of_a_conversation_is_an_example_behind_the_earlier_ones(tmp_path, monkeypatch, lossless, listed):
    """So no question is learned under --mask_prompt, and every answer is, once."""
    system = ("system", "Here are things.")
    names = {"human": "user", "gpt": "assistant", "system": "developer" if listed == "messages" else "system"}
    messages = [{"role": names[by], "content": text} for by, text in (system, *CHAT)]
    (tmp_path / "chat.json").write_text(json.dumps([{listed: messages}]))
    (tmp_path / "val.json").write_text(json.dumps(chats(CHAT)))
    argv = ("--tokenizer", lossless, "--json", tmp_path / "chat.json", "--val", tmp_path / "val.json")
    call(alpaca, monkeypatch, *argv, "--out", tmp_path / "out")
    second = f"{ALPACA}leaf, leaf\n\n### Instruction:\nName blue things.\n\n### Response:\n"
    expected = [(ALPACA, "leaf, leaf"), (second, "and 2 more.")]  # the first as the same record in Alpaca's form
    assert decoded(lossless, tmp_path / "out", "val") == expected
    head = ALPACA.partition("### Instruction")[0]
    with_system = [(p.replace(head, "Here are things.\n\n"), answer) for p, answer in expected]
    assert decoded(lossless, tmp_path / "out", "train") == with_system


def test_an_empty_system_message_is_none_and_a_text_in_parts_is_their_sum():
    """As chat templates write the one, and today's clients the other."""
    plain = [{"role": {"human": "user", "gpt": "assistant"}[by], "content": text} for by, text in CHAT]
    parts = [{"type": "text", "text": text} for text in ("Name ", "red things.")]
    other = [{"role": "system", "content": " "}, {"role": "user", "content": parts}, *plain[1:]]
    expected, found = (alpaca.parse(json.dumps([{"messages": m}]).encode(), "x", False) for m in (plain, other))
    assert found == expected and len(found[0]) == 2
    columns = {"messages": plain, "conversations": None, "instruction": None, "weight": None}  # as a table has them
    nothing = {"messages": [{"role": "system", "content": None}], "instruction": ""}
    data = b"\xef\xbb\xbf" + json.dumps([columns, nothing]).encode()  # a byte-order mark first
    assert alpaca.parse(data, "x", True) == expected


def test_a_last_question_without_an_answer_is_left_out_and_counted(tmp_path, monkeypatch, capsys, lossless):
    """The exchanges before it stay. The file has a record on each line, as most conversations found today."""
    lines = [json.dumps(record) for record in chats(CHAT, CHAT[:3], CHAT[:1], CHAT[2:])]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    argv = ("--tokenizer", lossless, "--json", tmp_path / "chat.jsonl", "--skip_empty", "--val", 1)
    call(alpaca, monkeypatch, *argv, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "1 of 4 records have an empty" in said and "1 conversations end with a question" in said
    answers = [answer for split in ("train", "val") for _, answer in decoded(lossless, tmp_path / "out", split)]
    assert answers.count("leaf, leaf") + answers.count("and 2 more.") == len(answers) >= 3


def test_a_conversation_is_trained_on_or_held_out_as_a_whole(tmp_path, monkeypatch, lossless):
    """The prompt of its later exchanges holds the answers of the earlier ones."""
    turns = lambda i: [("human", f"{i} red"), ("gpt", f"{i} green"), ("human", "blue"), ("gpt", f"{i} white")]
    more = [*turns(0), ("human", "more"), ("gpt", "and more")]  # which begins as the first
    (tmp_path / "chat.json").write_text(json.dumps(chats(*map(turns, range(1, 9)), more)))
    (tmp_path / "val.json").write_text(json.dumps(chats(turns(0))))
    argv = ("--tokenizer", lossless, "--json", tmp_path / "chat.json")
    for val in (3, tmp_path / "val.json"):
        call(alpaca, monkeypatch, *argv, "--val", val, "--out", tmp_path / "out")
        train, val = (decoded(lossless, tmp_path / "out", split) for split in ("train", "val"))
        numbers = [{answer.split()[0] for _, answer in part} - {"and"} for part in (train, val)]
        assert train and val and not numbers[0] & numbers[1]
    assert len(train) == 16 and len(val) == 2  # without the one that begins as the held-out one


def test_a_later_exchange_without_room_for_its_answer_is_left_out(tmp_path, monkeypatch, capsys, lossless):
    (tmp_path / "chat.json").write_text(
        json.dumps(chats(CHAT, *[[("human", f"{i} red"), *CHAT[1:]] for i in range(3)]))
    )
    first = len(load_tokenizer(lossless).encode(ALPACA + "leaf, leaf")) + 2
    argv = ("--tokenizer", lossless, "--json", tmp_path / "chat.json", "--val", 1, "--max_len", first)
    call(alpaca, monkeypatch, *argv, "--out", tmp_path / "out")
    assert len(examples(tmp_path / "out", "train")) == 3 and len(examples(tmp_path / "out", "val")) == 1
    assert "4 more were later exchanges whose prompts alone are as long: left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--tokenizer", "none.model", "none.model: cannot be read"),
        ("--tokenizer", "records.json", "records.json: is a JSON list, expected a dict"),
        ("--json", "nowhere.json", "nowhere.json: cannot be read"),
        ("--val", 0, "argument --val: expected at least 1, found 0"),
        ("--val", -3, "argument --val: expected at least 1, found -3"),
        ("--val", "0.5", "0.5: cannot be read"),
        ("--val", "file", "file: is not JSON"),
        ("--val", "none.json", "none.json: holds no records"),
        ("--val", "records.json", "records.json: has no record that is not held out"),
        ("--max_len", 1, "argument --max_len: expected at least 2, found 1"),
        ("--out", "file", "--out file: is a file, expected a folder"),
        ("--out", "theirs", "--out theirs: holds a meta.json that no prepare.py of this version wrote"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, lossless, records_file, flag, value, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("none.json").write_text("[]")
    Path("theirs").mkdir()
    Path("theirs/meta.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    argv = ("--tokenizer", lossless, "--json", records_file, "--val", 5, "--out", "out", flag, value)
    assert message in refusal(alpaca, monkeypatch, *argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_permission_is_refused_at_once(monkeypatch, lossless, records_file):
    argv = ("--tokenizer", lossless, "--json", records_file, "--val", 5, "--out", "/proc/a/b")  # root cannot either
    assert "--out /proc/a/b/meta.json: cannot be written" in refusal(alpaca, monkeypatch, *argv)


@pytest.mark.parametrize(
    "script, absent, words",
    [(alpaca, "bos_id", "no BOS or no EOS"), (alpaca, "eos_id", "no BOS or no EOS"), (c4, "bos_id", "no BOS")],
    ids=("alpaca-bos", "alpaca-eos", "c4-bos"),
)
def test_a_tokenizer_without_a_token_that_is_needed_is_refused(tmp_path, monkeypatch, script, absent, words):
    path = train_tokenizer(tmp_path / "bare.model", **{absent: -1})
    argv = ("--tokenizer", path, "--json", tmp_path / "never read", "--out", tmp_path / "out.npy")
    assert f"--tokenizer {path}: has {words} token" in refusal(script, monkeypatch, *argv)


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch, lossless):
    error = OSError("no network")

    def urlopen(*_, **__):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    hint = "fetch it elsewhere and give it as --json"
    argv = ("--tokenizer", lossless, "--out", tmp_path / "out.npy")
    for script, url in ((alpaca, alpaca.URL), (c4, c4.URL)):
        line = refusal(script, monkeypatch, *argv)
        assert line.startswith(url) and "no network" in line and hint in line
    line = refusal(lm_eval, monkeypatch, "--task", "boolq", "--out", tmp_path)
    assert line.startswith("https://huggingface.co/datasets/aps/super_glue (boolq, validation) cannot be downloaded")
    assert "as --json FILE" in line
    Path(tmp_path / "mmlu.jsonl").write_text('{"question": "?"}')
    argv = ("--task", "mmlu", "--json", tmp_path / "mmlu.jsonl", "--out", tmp_path / "tasks")
    assert "as --shots FILE" in refusal(lm_eval, monkeypatch, *argv)
    (tmp_path / "mmlu.jsonl").unlink()
    error = http.client.IncompleteRead(b"", 5)  # the connection was cut
    for script in (alpaca, c4):
        assert hint in refusal(script, monkeypatch, "--tokenizer", lossless, "--out", tmp_path / "out.npy")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "page", [b"{}", b"[]", b"5", b'{"num_rows_total": 5, "rows": []}', b'{"num_rows_total": 5, "rows": [{"x": 1}]}']
)
def test_a_page_without_rows_is_no_download(tmp_path, monkeypatch, page):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(page))
    line = refusal(lm_eval, monkeypatch, "--task", "boolq", "--out", tmp_path)
    assert "(boolq, validation) cannot be downloaded (" in line and "as --json FILE" in line


def test_shots_are_for_mmlu_alone(tmp_path, monkeypatch):
    line = refusal(lm_eval, monkeypatch, "--task", "boolq", "--shots", "x", "--out", tmp_path)
    assert line == "--shots: means nothing to --task boolq"


@needs_shared
def test_real_alpaca_records_come_back_from_llamas_tokens(tmp_path, monkeypatch):
    argv = ("--tokenizer", SHARED / "llama_tokenizer.model", "--json", SHARED / "alpaca_en_demo.json", "--val", 99)
    call(alpaca, monkeypatch, *argv, "--out", tmp_path / "out")
    train, val = examples(tmp_path / "out", "train"), examples(tmp_path / "out", "val")
    held_out = [tokens for tokens, _ in val]
    assert (len(train), len(val)) == (900, 96) and not any(tokens in held_out for tokens, _ in train)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / "llama_tokenizer.model"))
    texts = {alpaca.prompt(r) + r["output"] for r in json.loads((SHARED / "alpaca_en_demo.json").read_text())}
    whole = [sp.decode(t[1:-1]) for t, _ in train + val if t[-1] == sp.eos_id()]
    assert len(whole) > 900 and set(whole) <= texts


# ----------------------------------------------------------------------------------------------------------------------
# C4: calibration windows


DOCUMENTS = ("bada kimu dogu ruku " * 30, "bada", "ruku mina bada " * 40)


@pytest.fixture
def documents_file(tmp_path) -> Path:
    path = tmp_path / "c4.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def test_calibration_windows_are_pieces_of_long_documents(
    tmp_path, monkeypatch, capsys, tokenizer_file, documents_file
):
    argv = ("--tokenizer", tokenizer_file, "--json", documents_file, "--nsamples", 20, "--seqlen", 32)
    call(c4, monkeypatch, *argv, "--out", tmp_path / "calib.npy")
    windows = np.load(tmp_path / "calib.npy")
    assert windows.shape == (20, 32) and windows.dtype == np.int32
    tokenizer = load_tokenizer(tokenizer_file)
    long = [[1, *tokenizer.encode(text)] for text in (DOCUMENTS[0], DOCUMENTS[2])]
    for w in windows.tolist():
        assert any(w == d[i : i + 32] for d in long for i in range(len(d) - 32))
    assert "20 windows of 32 tokens, from 2 of 3 documents" in capsys.readouterr().out  # one is too short


def test_gzipped_c4_gives_the_same_windows(tmp_path, monkeypatch, tokenizer_file, documents_file):
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(documents_file.read_bytes()))
    argv = ("--tokenizer", tokenizer_file, "--nsamples", 4, "--seqlen", 16)
    for source, out in ((documents_file, "plain.npy"), (tmp_path / "c4.json.gz", "gzipped.npy")):
        call(c4, monkeypatch, *argv, "--json", source, "--out", tmp_path / out)
    assert np.array_equal(np.load(tmp_path / "plain.npy"), np.load(tmp_path / "gzipped.npy"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--seqlen", 9999), "none of the 3 documents has more than --seqlen 9999 tokens"),
        (("--seqlen", 0), "--seqlen: expected at least 1, found 0"),
        (("--nsamples", 0), "--nsamples: expected at least 1, found 0"),
        (("--json", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
        (("--tokenizer", "nowhere.model"), "nowhere.model: cannot be read"),
        (("--out", "calib.txt"), "--out calib.txt: must end in .npy"),
    ],
)
def test_wrong_calibration_flags_are_refused_in_one_line(
    tmp_path, monkeypatch, tokenizer_file, documents_file, flags, words
):
    monkeypatch.chdir(tmp_path)
    argv = ("--tokenizer", tokenizer_file, "--json", documents_file, "--out", "calib.npy", *flags)
    assert words in refusal(c4, monkeypatch, *argv)
    assert [*tmp_path.iterdir()] == [documents_file]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"not json", "line 1: is not JSON"),
        (b'["text"]', "line 1: is a JSON list, expected a dict"),
        (b'{"text": "\xff"}', "line 1: is not JSON"),
        (b'{"text": "cut \\ud83d"}', "line 1: holds half of a surrogate pair"),
        (b'{"text": "a"}\n{"txt": 1}', 'line 2 has no string "text"'),
        (b'{"text": 1}', 'line 1 has no string "text"'),
        (b"", "holds no document"),
        (b"\n \n", "holds no document"),
        (b"[" * 10**5, "line 1: is not JSON"),
        (gzip.compress(b'{"text": "a"}', mtime=0)[:-4], "is a truncated or damaged gzip file"),
        (gzip.compress(b'{"text": "a"}', mtime=0)[:-12] + b"\xff" * 12, "is a truncated or damaged gzip file"),
    ],
    ids="no-json no-object no-utf-8 surrogate no-text no-string empty blank deep truncated damaged".split(),
)
def test_a_file_that_is_not_like_c4_is_refused_by_its_name(tmp_path, monkeypatch, tokenizer_file, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    argv = ("--tokenizer", tokenizer_file, "--json", path, "--seqlen", 8, "--out", tmp_path / "calib.npy")
    assert f"{path}: {words}" in refusal(c4, monkeypatch, *argv)
    assert not (tmp_path / "calib.npy").exists()


@pytest.mark.parametrize("name, value", [("LONGEST", 300), ("MOST", 2), ("LARGEST", 700)])
@pytest.mark.parametrize("pack", (lambda data: data, gzip.compress), ids=("plain", "gzipped"))
def test_a_file_larger_than_any_of_c4_is_refused(tmp_path, monkeypatch, tokenizer_file, name, value, pack):
    path = tmp_path / "large.jsonl"
    path.write_bytes(pack("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()))
    argv = ("--tokenizer", tokenizer_file, "--json", path, "--seqlen", 8, "--out", tmp_path / "calib.npy")
    monkeypatch.setattr(c4, name, value)
    assert f"{path}: line {1 if name == 'LONGEST' else 3}: more than" in refusal(c4, monkeypatch, *argv)
    assert not (tmp_path / "calib.npy").exists()


def test_a_gzip_bomb_takes_no_memory(tmp_path, tokenizer_file):
    """256 MB without an end of line, in 260 KB: the reader stops at the longest line that it takes."""
    with gzip.open(tmp_path / "bomb.json.gz", "wb", compresslevel=9) as f:
        for _ in range(256):
            f.write(b"a" * 2**20)
    line = [sys.executable, ROOT / "data" / "c4" / "prepare.py", "--tokenizer", tokenizer_file]
    line += ["--json", tmp_path / "bomb.json.gz", "--out", tmp_path / "calib.npy"]
    code = f"import resource, runpy, sys; sys.argv = {[str(x) for x in line[1:]]}\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (
        "bomb.json.gz: line 1: more than 67,108,864 bytes in a line" in done.stderr and "Traceback" not in done.stderr
    )
    alone = "import model, data.tokenizer, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    idle = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert int(done.stdout) < int(idle.stdout) + 200  # MB: the line, and a copy of it while it grows


# ----------------------------------------------------------------------------------------------------------------------
# lm-eval's tasks without lm-eval


@needs_shared
@pytest.mark.parametrize("task", ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "openbookqa"))
@pytest.mark.parametrize("with_config", (False, True))
def test_tasks_are_rendered_as_lm_eval_does(tmp_path, monkeypatch, task, with_config):
    samples = SHARED / "lm_eval" / "samples"
    theirs = [json.loads(x) for x in (samples / f"dummy_0shot__{task}_local.jsonl").read_text().splitlines()]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(r["doc"]) + "\n" for r in theirs))
    argv = ("--json", tmp_path / "docs.jsonl", "--out", tmp_path, "--task", task)
    if with_config:
        argv = (*argv[:-1], task := f"{task}_local", "--config", samples / "dummy_0shot__results.json")
    if task in ("hellaswag_local", "winogrande_local"):
        assert "is Python code, not a template" in refusal(lm_eval, monkeypatch, *argv)
        return
    call(lm_eval, monkeypatch, *argv)
    ours = [json.loads(x) for x in (tmp_path / f"samples_{task}.jsonl").read_text().splitlines()]
    assert [r["arguments"] for r in ours] == [r["arguments"] for r in theirs]
    assert [str(r["target"]) for r in ours] == [r["target"] for r in theirs]


@needs_shared
def test_mmlu_is_rendered_with_its_five_shots(tmp_path, monkeypatch):
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
    argv = ("--task", "mmlu", "--json", tmp_path / "test.jsonl", "--shots", tmp_path / "dev.jsonl", "--out", tmp_path)
    call(lm_eval, monkeypatch, *argv)
    ours = [json.loads(x) for x in (tmp_path / "samples_mmlu_abstract_algebra.jsonl").read_text().splitlines()]
    assert [r["arguments"] for r in ours] == [r["arguments"] for r in theirs]


def test_a_data_set_is_downloaded_page_by_page(tmp_path, monkeypatch):
    documents = [{"passage": f"p{i}", "question": "q", "label": i % 2} for i in range(230)]

    def urlopen(url, timeout):
        offset = int(url.split("offset=")[1].split("&")[0])
        rows = [{"row": doc} for doc in documents[offset : offset + 100]]
        return io.BytesIO(json.dumps({"num_rows_total": len(documents), "rows": rows}).encode())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    call(lm_eval, monkeypatch, "--task", "boolq", "--out", tmp_path)
    samples = [json.loads(line) for line in (tmp_path / "samples_boolq.jsonl").read_text().splitlines()]
    assert [sample["doc"] for sample in samples] == documents


def test_the_lines_of_a_file_end_where_json_has_them_end(tmp_path, monkeypatch):
    """U+2028 and U+0085 may stand in a JSON string; Python's splitlines cuts there."""
    documents = [{"passage": f"one{char}two", "question": "q", "label": 1} for char in "\u2028\u0085"]
    text = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in documents)
    (tmp_path / "docs.jsonl").write_text(text, encoding="utf-8")
    call(lm_eval, monkeypatch, "--task", "boolq", "--json", tmp_path / "docs.jsonl", "--out", tmp_path)
    samples = (tmp_path / "samples_boolq.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["doc"] for line in samples] == documents


TEMPLATE = {"doc_to_text": "{{q}}", "doc_to_choice": ["a", "b"], "doc_to_target": 0}
CONFIGS = {
    "choice": {"output_type": "multiple_choice", **TEMPLATE},
    "python": {"output_type": "multiple_choice", **TEMPLATE, "doc_to_text": "def doc_to_text(doc): ..."},
    "generates": {"output_type": "generate_until", **TEMPLATE},
    "few_shot": {"output_type": "multiple_choice", **TEMPLATE, "num_fewshot": 5},
    "mc2": {
        "output_type": "multiple_choice",
        **TEMPLATE,
        "process_results": "def process_results_mc2(doc, results): ...",
    },
    "partial": {
        "output_type": "multiple_choice",
        **TEMPLATE,
        "process_docs": "functools.partial(<function process_docs at 0x7f>, category='Business')",
    },
    "no_list": {"output_type": "multiple_choice", **TEMPLATE, "doc_to_text": "question", "doc_to_choice": "a b"},
    "delimiter": {"output_type": "multiple_choice", **TEMPLATE, "target_delimiter": "->"},
    "metrics": {"output_type": "multiple_choice", **TEMPLATE, "metric_list": ["acc"]},
    "prefix": {"output_type": "multiple_choice", **TEMPLATE, "gen_prefix": "So:"},
    "surrogate": {"output_type": "multiple_choice", **TEMPLATE, "doc_to_text": "{{ '\\ud83d' }}"},
}
MMLU = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0, "subject": "logic"}


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--task nope", "--task nope: expected one of boolq"),
        ("--task boolq --json nowhere", "nowhere: cannot be read"),
        ("--task boolq --json text", "text: line 1 (an object on each line): is not JSON"),
        ("--task boolq --json empty", "empty: holds no documents"),
        ("--task boolq --json numbers", "numbers: line 1 (an object on each line): is a JSON list, expected a dict"),
        ("--task boolq --json docs", "docs: document 0 is not of task boolq: KeyError"),
        ("--task mmlu --json mmlu --shots mmlu", "--shots: holds 1 documents of logic, expected 5"),
        ("--task other --json docs --config configs", "--config configs: describes choice, python"),
        ("--task choice --config configs", "--config configs: holds no documents; give them as --json"),
        ("--task choice --json docs --config configs", "docs: document 0 is not of task choice: UndefinedError"),
        ("--task choice --json docs --config numbers", "numbers: is a JSON list, expected a dict"),
        ("--task choice --json docs --config docs", "--config docs: has no `configs`, the descriptions of tasks"),
        ("--task choice --json docs --config null", "--config null: has no `configs`, the descriptions of tasks"),
        ("--task choice --json docs --config strings", "--config strings: has no `configs`, the descriptions of tasks"),
        ("--task ../choice --json docs --config configs", "--task ../choice: expected a name of letters, digits"),
        ("--task mmlu --json paths --shots mmlu", "paths: document 0: its subject '../logic' cannot name a file"),
        ("--task python --json docs --config configs", "python: doc_to_text is Python code"),
        ("--task generates --json docs --config configs", "generates: only zero-shot multiple-choice"),
        ("--task few_shot --json docs --config configs", "few_shot: only zero-shot multiple-choice"),
        ("--task mc2 --json docs --config configs", "mc2: process_results is Python code"),
        ("--task partial --json docs --config configs", "partial: process_docs is Python code"),
        ("--task no_list --json docs --config configs", "document 0 is not of task no_list: SyntaxError"),
        (
            "--task delimiter --json docs --config configs",
            "delimiter: its target_delimiter is '->', expected white space",
        ),
        ("--task metrics --json docs --config configs", "metrics: its metric_list is not a list of"),
        ("--task prefix --json docs --config configs", "prefix: gen_prefix is 'So:', which is not rendered here"),
        ("--task surrogate --json docs --config configs", "document 0 is not of task surrogate: UnicodeEncodeError"),
    ],
)
def test_a_task_that_cannot_be_rendered_is_refused_in_one_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    files = {"text": "no JSON", "empty": "\n", "numbers": "[3]", "docs": '{"question": "?"}', "mmlu": json.dumps(MMLU)}
    files.update(
        configs=json.dumps({"configs": CONFIGS}), null='{"configs": null}', strings='{"configs": {"choice": "x"}}'
    )
    files.update(paths=json.dumps({**MMLU, "subject": "../logic"}))
    for name, content in files.items():
        Path(name).write_text(content)
    assert words in refusal(lm_eval, monkeypatch, *flags.split(), "--out", "out")
    assert not Path("out").exists()


def test_a_config_may_describe_a_task_of_ours(tmp_path, monkeypatch):
    """Of `mmlu` too, whose subjects and examples are then none of ours."""
    for task in ("mmlu", "boolq"):
        (tmp_path / "configs.json").write_text(json.dumps({"configs": {task: CONFIGS["choice"]}}))
        (tmp_path / "docs.jsonl").write_text('{"q": "why"}\n')
        argv = ("--task", task, "--json", tmp_path / "docs.jsonl", "--config", tmp_path / "configs.json")
        call(lm_eval, monkeypatch, *argv, "--out", tmp_path / "tasks")
        assert len((tmp_path / "tasks" / f"samples_{task}.jsonl").read_text().splitlines()) == 1
        line = refusal(lm_eval, monkeypatch, *argv, "--shots", "x", "--out", tmp_path / "tasks")
        assert line == f"--shots: means nothing to --task {task} with --config"


def test_the_folder_to_write_is_looked_at_before_anything_is_downloaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(lm_eval, "download", lambda *args: pytest.fail("it asked for documents"))
    refusal(lm_eval, monkeypatch, "--task", "boolq", "--out", tmp_path / "file")


def test_a_task_keeps_its_delimiter_and_its_metrics(tmp_path, monkeypatch, capsys):
    metrics = [{"metric": name} for name in ("acc", "f1", "acc_mutual_info")]
    config = {**CONFIGS["choice"], "target_delimiter": "\n", "metric_list": metrics}
    (tmp_path / "configs.json").write_text(json.dumps({"configs": {"mine": config}}))
    (tmp_path / "docs.jsonl").write_text('{"q": "why"}\n')
    argv = ("--task", "mine", "--json", tmp_path / "docs.jsonl", "--config", tmp_path / "configs.json")
    call(lm_eval, monkeypatch, *argv, "--out", tmp_path)
    [sample] = [json.loads(x) for x in (tmp_path / "samples_mine.jsonl").read_text().splitlines()]
    assert [a["arg_1"] for a in sample["arguments"].values()] == ["\na", "\nb"]
    assert sample["metrics"] == ["acc", "f1"]
    assert "acc_mutual_info is left out" in capsys.readouterr().out


STARS = {"doc_to_text": "{{review}}:", "doc_to_choice": ["1", "2", "3", "4", "5"], "doc_to_target": "stars"}


@pytest.mark.parametrize(
    "changes, choices, gold",
    [
        ({}, ["1", "2", "3", "4", "5"], {0}),  # a text column: the choice "1", not the second choice
        ({"doc_to_target": "{{stars}}"}, ["1", "2", "3", "4", "5"], {1}),  # digits of a template are an index
        ({"doc_to_target": "{{a}}"}, ["1", "2", "3", "4", "5"], {-100}),  # no choice: never right
        ({"doc_to_choice": {"0": "no", "1": "yes"}, "doc_to_target": "label"}, ["no", "yes"], {1}),
        ({"doc_to_choice": "('{{a}}', '{{b}}')", "doc_to_target": 1}, ["x", "y"], {1}),
        ({"doc_to_choice": "{{[a, b]}}", "doc_to_target": "{{[0, 1]}}"}, ["x", "y"], {0, 1}),
        ({"doc_to_choice": [" 1", " no"], "doc_to_target": 0, "target_delimiter": ""}, [" 1", " no"], {0}),
    ],
)
def test_choices_and_targets_of_a_config_are_lm_evals(tmp_path, monkeypatch, changes, choices, gold):
    config = {"output_type": "multiple_choice", "description": "About {{subject}}.\n", **STARS, **changes}
    (tmp_path / "configs.json").write_text(json.dumps({"configs": {"mine": config}}))
    doc = {"review": "r", "stars": "1", "label": 1, "a": "x", "b": "y", "subject": "law", "self": "s"}
    (tmp_path / "docs.jsonl").write_text((json.dumps(doc) + "\n") * 2)
    argv = ("--task", "mine", "--json", tmp_path / "docs.jsonl", "--config", tmp_path / "configs.json")
    call(lm_eval, monkeypatch, *argv, "--out", tmp_path)
    _, documents = read_task(tmp_path / "samples_mine.jsonl")
    assert documents[0].choices == choices and documents[1].gold == gold
    assert documents[0].pairs[0][0] == "About law.\nr:"


@pytest.mark.parametrize(
    "template, error, words",
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TimeoutError, "0.5 seconds"),
        ("{{ 9**(9**9) }}", TimeoutError, "0.5 seconds"),  # a constant, which Jinja computes while it compiles
        ("{{ q | regex_replace('(a+)+$', '') }}", TimeoutError, "0.5 seconds"),
        ("{{ 'x' * 10**10 }}", MemoryError, None),
        ("{{ '%09999999999d' % 3 }}", MemoryError, None),
        ("{% for i in range(10**9) %}{% endfor %}", OverflowError, "Range too big"),
        ("{{ ''.__class__.__mro__ }}", SecurityError, "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id') }}", SecurityError, "unsafe"),
        ("{{ d.update(x=1) }}", SecurityError, "unsafe"),
    ],
)
def test_a_template_that_reaches_too_far_is_stopped(monkeypatch, template, error, words):
    """A results file may be anybody's."""
    monkeypatch.setattr(lm_eval.bounded, "__defaults__", (0.5, 2**28))
    render = lm_eval.from_config({**CONFIGS["choice"], "doc_to_text": template}, "choice")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    start = time.monotonic()
    with pytest.raises(error, match=words):
        render({"q": "a" * 40 + "b", "d": {}})
    assert time.monotonic() - start < 5
    assert resource.getrlimit(resource.RLIMIT_AS) == limits and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_template_is_rendered_under_a_hard_limit_of_memory_too():
    """Of a cluster's `ulimit -v`, say, which cannot be raised again: hence a process of its own."""
    code = (
        "import resource; from data.lm_eval import prepare\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))\n"
        "print(prepare.bounded(lambda doc: doc['q'], {'q': 'ok'}, nbytes=2**40))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# the tiny world


SMALL = ("--pages", 1500, "--instructions", 600)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "world"
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(tiny, monkeypatch, *SMALL, "--seed", 3, "--out", out)
    return out


def test_the_questions_of_the_tiny_world_are_held_out(world):
    """No sentence that the model is trained, pruned or fine-tuned on answers a question in the question's words."""
    known = "".join((world / name).read_text() for name in ("text.txt", "heldout.txt", "calib.jsonl", "alpaca.json"))
    questions = [json.loads(line) for file in world.glob("samples_*.jsonl") for line in file.read_text().splitlines()]
    assert len(questions) == 308 and len(list(world.glob("samples_*.jsonl"))) == 6
    for q in questions:
        answer = q["doc"]["choices"][int(q["target"])]
        assert f"{q['doc']['question']} {answer}." not in known
        assert len(set(q["doc"]["choices"])) == 4


def test_the_tiny_world_reads_for_perplexity_as_it_was_trained_on(world):
    """One line: evaluate.py would put line breaks between two that the pages never have."""
    assert "\n" not in (world / "heldout.txt").read_text()
    pages = (world / "text.txt").read_text().split("\n")  # of prose, or of an instruction
    assert sum(len(page) > 200 and "###" not in page for page in pages) > 1000


def test_a_seed_makes_one_tiny_world(world, tmp_path, monkeypatch):
    for seed, same in ((3, True), (4, False)):
        out = tmp_path / str(seed)
        call(tiny, monkeypatch, *SMALL, "--seed", seed, "--out", out)
        for name in ("text.txt", "alpaca.json", "samples_people.jsonl", "train.npy"):
            assert ((out / name).read_bytes() == (world / name).read_bytes()) is same


def test_a_world_overwrites_no_model_of_somebody_else(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"mine")
    said = refusal(tiny, monkeypatch, "--out", tmp_path)
    assert "holds a tokenizer.model that no prepare.py of this version wrote" in said
    assert (tmp_path / "tokenizer.model").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "flag, value, found",
    [
        ("--pages", 99, "--pages: expected at least 100, found 99"),
        ("--instructions", 0, "--instructions: expected at least 1, found 0"),
        ("--max_len", 1, "--max_len: expected at least 2, found 1"),
    ],
)
def test_a_world_too_small_is_refused(tmp_path, monkeypatch, flag, value, found):
    line = refusal(tiny, monkeypatch, flag, value, "--out", tmp_path / "out")
    assert line == f"argument {found}"
    assert not (tmp_path / "out").exists()
