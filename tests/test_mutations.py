"""Every file that the project reads, in thousands of damaged forms: it is read, or refused by one line. Never a traceback,
a hang, or more memory than a file of a few kB explains."""

import contextlib
import importlib.util
import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_tokenizer
import torch
from conftest import ROOT

import evaluate
import prune
import train
from data.checkpoint import UserError, read_npy
from data.lm_eval import samples
from data.tokenizer import load_tokenizer
from model import Llama, LlamaConfig, open_llama, save
from spp import adapter_state, inject, read_adapter, write_adapter

ODD = [b"9", b"-", b"[", b'"', b"null", b"1e9", b"1e999", b"NaN", b"{", b",", b"true", b"\\ud800", b"\xff"]
ODD += [b"J\xff\xff\xff\x7f", b"K\0", b"R", b"[" * 4000, b"9" * 5000, bytes(8)]  # what a pickle gives a meaning to, too


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four bytes or pieces changed, put in or taken out."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i, kind = rng.randrange(len(data) + 1), rng.random()
        if kind < 0.5:
            data[i : i + 1] = bytes([rng.randrange(256)])
        elif kind < 0.6:
            data[i : i + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[i : i + 1])
        elif kind < 0.7:
            del data[i : i + rng.choice([1, 2, 9, 10**9])]
        else:
            odd = rng.choice(ODD)
            data[i : i + rng.choice([0, len(odd)])] = odd
    return bytes(data)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """JSON, or the first of several lines of it, with one value replaced by one of another kind."""
    first, newline, rest = data.partition(b"\n") if data.count(b"\n{") else (data, b"", b"")
    value = json.loads(first)
    places, found = [], [value]
    while found:
        x = found.pop()
        for key in x if isinstance(x, dict) else range(len(x)):
            places.append((x, key))
            if isinstance(x[key], dict | list):
                found.append(x[key])
    where, key = rng.choice(places)
    where[key] = rng.choice(
        [None, True, -1, 0, 3, 2**70, 1e308, "", "a", "\ud800", [], {}, [[]], {"a": None}, ["a", 1]]
    )
    return json.dumps(value).encode() + newline + rest


def main_of(path: str) -> Callable[[], None]:
    """The main function of a data/*/prepare.py, which are no package."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


alpaca, c4, lm_eval = (main_of(f"data/{name}/prepare.py") for name in ("alpaca", "c4", "lm_eval"))


def call(main: Callable[[], None], folder: Path, flags: str) -> None:
    """A command's main function, with what its command line would be; IN/ is the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *flags.replace("IN/", f"{folder}/").split()])
        main()


PRUNE = "--ckpt IN/dense.pt --calib IN/calib.npy --device cpu --out IN/job"
TRAIN = "--ckpt IN/pruned.pt --data IN/data --out_dir IN/run --device cpu --rank 2 --batch_size 4 --epochs 2 "
TRAIN += "--max_tokens 64 --save_interval 1 --resume"
EVALUATE = "--ckpt IN/tokenized.pt --tasks IN/samples.jsonl --ppl IN/text.txt --seqlen 8 --device cpu --out IN/r.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer, tokenizer_file) -> Path:
    """A folder with a file of each kind; it was made as "good" beside it."""
    folder = tmp_path_factory.mktemp("files") / "good"
    folder.mkdir()
    torch.manual_seed(0)
    model = Llama(LlamaConfig(256, 8, 8, 1, 2, max_position_embeddings=16))
    rng = np.random.default_rng(0)
    calib = rng.integers(3, 200, (4, 8))
    np.save(folder / "calib.npy", calib.astype(np.int32))
    save(model, folder / "dense.pt")
    save(model, folder / "dense")
    save(model, folder / "tokenized.pt", tokenizer)
    prune.prune_model(model, calib, "wanda", "2:4")
    save(model, folder / "pruned.pt")
    save(model, folder / "pruned")  # with a history.json
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    (folder / "bpe").mkdir()  # not beside tokenizer.model, whose added tokens it would state
    (folder / "bpe" / "tokenizer.json").write_text(test_tokenizer.train("smollm2-like", 300).to_str())
    (folder / "tiktoken.model").write_bytes(test_tokenizer.tiktoken_file(test_tokenizer.train("llama3-like", 300)))
    (folder / "data").mkdir()
    for split in ("train", "val"):
        np.save(folder / "data" / f"{split}.npy", rng.integers(3, 200, 80).astype(np.uint16))
        np.save(folder / "data" / f"{split}.offsets.npy", np.arange(0, 81, 10))
        np.save(folder / "data" / f"{split}.prompt.npy", np.ones(8, np.int32))
    write_adapter(folder / "adapter.pt", adapter_state(inject(model, r=2)), "base", "spp", 2, 2.0)

    records = [{"instruction": "bada", "input": "", "output": "kimu"}] * 3
    (folder / "alpaca.json").write_text(json.dumps(records))
    turns = [{"from": "human", "value": "bada"}, {"from": "gpt", "value": "kimu"}]
    (folder / "turns.json").write_text(json.dumps([{"conversations": turns}] + records))
    (folder / "c4.jsonl").write_text((json.dumps({"text": "bada kimu dogu " * 3}) + "\n") * 3)
    (folder / "text.txt").write_text("bada kimu \n\n dogu ruku\n" * 3)
    choices = {f"gen_args_{k}": {"arg_0": "bada", "arg_1": f" {text}"} for k, text in enumerate(("kimu", "dogu"))}
    sample = {"doc": {"choices": ["kimu", "dogu"]}, "target": "0", "arguments": choices, "metrics": ["acc"]}
    lines = [json.dumps({"doc_id": i, **sample, "filter": "none"}) + "\n" for i in range(3)]
    (folder / "samples.jsonl").write_text("".join(lines))
    (folder / "boolq.jsonl").write_text('{"passage": "bada", "question": "kimu", "label": 1}\n' * 3)
    task = {"output_type": "multiple_choice", "doc_to_text": "{{passage}} {{question|trim}}", "doc_to_target": "label"}
    task.update(doc_to_choice=["no", "yes"], target_delimiter=" ", metric_list=[{"metric": "acc"}])
    (folder / "results.json").write_text(json.dumps({"configs": {"boolq": task}}))

    call(train.main, folder, TRAIN)
    with contextlib.suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:  # a prune.py stopped at its end
        patch.setattr(prune, "finish", interrupt)
        call(prune.main, folder, PRUNE)
    with contextlib.suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:  # and an evaluate.py
        patch.setattr(evaluate, "table", interrupt)
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)
        call(evaluate.main, folder, EVALUATE)
    (folder / "r.json").unlink()
    return folder.rename(folder.with_name("saved"))  # a copy stands at its old place, which some files name


def interrupt(*args) -> None:
    raise KeyboardInterrupt


def read_weights(path: Path) -> None:
    assert all(w.sum().dtype == w.dtype for w in open_llama(path)[0].values())


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode("bada kimu"))


def read_data(folder: Path) -> None:
    for split in ("train", "val"):
        examples = train.Examples(folder, split, vocab_size=256)
        examples.batch(list(range(len(examples.lengths))), "cpu")


def read_samples(path: Path) -> None:
    for document in samples.read_task(path)[1]:
        if not document.rolling:
            samples.document_metrics(document, [(-1.0, False)] * len(document.pairs))


ALPACA = "--tokenizer IN/tokenizer.model --val 1 --out IN/out --json IN/"
C4 = "--tokenizer IN/tokenizer.model --nsamples 2 --seqlen 4 --out IN/out.npy --json IN/c4.jsonl"
BOOLQ = "--task boolq --json IN/boolq.jsonl --out IN/out"
READERS = {  # kind of file: (the file that is damaged, what reads it)
    "safetensors": ("dense/model.safetensors", lambda folder: read_weights(folder / "dense")),
    "pt": ("pruned.pt", lambda folder: read_weights(folder / "pruned.pt")),
    "config": ("dense/config.json", lambda folder: read_weights(folder / "dense")),
    "history": ("pruned/history.json", lambda folder: read_weights(folder / "pruned")),
    "sentencepiece": ("tokenizer.model", lambda folder: read_tokenizer(folder / "tokenizer.model")),
    "bpe": ("bpe/tokenizer.json", lambda folder: read_tokenizer(folder / "bpe" / "tokenizer.json")),
    "tiktoken": ("tiktoken.model", lambda folder: read_tokenizer(folder / "tiktoken.model")),
    "calib": ("calib.npy", lambda folder: prune.check_calib(read_npy(folder / "calib.npy"), 256)),
    "tokens": ("data/train.npy", lambda folder: read_data(folder / "data")),
    "offsets": ("data/train.offsets.npy", lambda folder: read_data(folder / "data")),
    "prompts": ("data/train.prompt.npy", lambda folder: read_data(folder / "data")),
    "adapter": (
        "adapter.pt",
        lambda folder: read_adapter(folder / "adapter.pt", open_llama(folder / "pruned.pt")[0], "base"),
    ),
    "state": ("run/step-000004.pt", lambda folder: call(train.main, folder, TRAIN)),
    "settings": ("run/config.json", lambda folder: call(train.main, folder, TRAIN)),
    "log": ("run/log.jsonl", lambda folder: call(train.main, folder, TRAIN)),
    "job": ("job.partial/job.json", lambda folder: call(prune.main, folder, PRUNE)),
    "inputs": ("job.partial/inputs-00001.pt", lambda folder: call(prune.main, folder, PRUNE)),
    "scores": ("r.json.partial/chunk-*.json", lambda folder: call(evaluate.main, folder, EVALUATE)),
    "samples": ("samples.jsonl", lambda folder: read_samples(folder / "samples.jsonl")),
    "documents": ("boolq.jsonl", lambda folder: call(lm_eval, folder, BOOLQ)),
    "templates": ("results.json", lambda folder: call(lm_eval, folder, f"{BOOLQ} --config IN/results.json")),
    "instructions": ("alpaca.json", lambda folder: call(alpaca, folder, f"{ALPACA}alpaca.json")),
    "conversations": ("turns.json", lambda folder: call(alpaca, folder, f"{ALPACA}turns.json")),
    "c4": ("c4.jsonl", lambda folder: call(c4, folder, C4)),
    "text": (
        "text.txt",
        lambda folder: evaluate.read_text(folder / "text.txt", load_tokenizer(folder / "tokenizer.model")),
    ),
}


def late(number: int, frame: object) -> None:
    raise AssertionError("takes longer than 10 seconds")


@pytest.mark.parametrize("n", (40, pytest.param(1000, marks=pytest.mark.stress)))
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_or_refused_by_one_line(good, kind, n):
    pattern, read = READERS[kind]
    name = str(min(good.glob(pattern)).relative_to(good))
    folder = good.with_name("good")
    data = (good / name).read_bytes()
    rng, refused = random.Random(kind), 0
    for i in range(n):
        if i == 30:  # when everything has been imported
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        mutate = mutate_bytes
        if name.endswith((".json", ".jsonl")) and rng.random() < 0.5:
            mutate = mutate_json
        damaged = mutate(data, rng) if i > 0 else data  # first the good file, which is read
        (folder / name).write_bytes(damaged)
        signal.signal(signal.SIGALRM, late)
        signal.alarm(10)
        try:
            read(folder)
        except (UserError, OSError) as e:  # which `cli` prints as one line
            refused += 1
            assert "\n" not in str(e) and i > 0, e
        except BaseException as e:
            e.add_note(f"mutation {i} of {name}: {damaged[:500]}")
            raise
        else:
            if name.startswith("run/"):  # a damaged state or log is passed over, and what is lost made again
                assert (folder / "run" / "merged.pt").read_bytes() == (good / "run" / "merged.pt").read_bytes()
        finally:
            signal.alarm(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert refused > 0 or kind in ("state", "log", "inputs")
    print(f"{kind}: {refused} of {n} refused")
