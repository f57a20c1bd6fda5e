"""Every command against a file system that fails: at each of its calls in turn, the disk is full, breaks, or the process
is killed there. It ends in one line, or not at all, and the same command given again in the right result."""

import errno
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import forks
import numpy as np
import pytest
import torch

from model import PRESETS, Llama, save
from prune import prune_model

ROOT = Path(__file__).parents[1]
CALLS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.truncate"}
FAULTS = {"full": errno.ENOSPC, "broken": errno.EIO, "killed": None}


def run_with_fault(line: list[str], folder: str, output: Connection, calls: Path, fault: str, k: int) -> None:
    """What a forked process does: the command, whose k-th file-system call within `folder` fails. Python announces its
    own calls to audit hooks, which may raise; fsync and torch's mapping of a file are counted as they are entered."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    count = 0

    def call(error: type = OSError) -> None:
        nonlocal count
        count += 1
        if count == k and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == k:
            raise error(FAULTS[fault], os.strerror(FAULTS[fault]))

    def hook(event: str, args: tuple) -> None:
        if event in CALLS and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(folder):
            call()

    def counted(function, error: type):
        def wrapper(*args, **kwargs):
            call(error)
            return function(*args, **kwargs)

        return wrapper

    os.fsync = counted(lambda file: None, OSError)  # a disk would take its time, and no power is lost here
    torch.from_file = counted(torch.from_file, RuntimeError)
    sys.addaudithook(hook)
    sys.argv = line
    status = 0
    try:
        runpy.run_path(line[0], run_name="__main__")
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        k = -1  # what follows is the harness's
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        calls.write_text(str(count))
        os._exit(status)


def run(line: list, tmp: Path, fault: str = "full", k: int = 0, nbytes: int | None = None) -> tuple[int, str, int]:
    """(exit status, what it printed, how many calls it made). nbytes: files larger than that cannot be written."""
    calls = tmp.parent / f"{tmp.name}.calls"
    calls.unlink(missing_ok=True)
    reader, writer = forks.FORKS.Pipe(duplex=False)  # and no file: its size would be limited too
    args = ([str(x) for x in line], f"{tmp}/", writer, calls, fault, k, nbytes)
    job = forks.FORKS.Process(target=limited, args=args)
    job.start()
    writer.close()
    text = b""
    while data := os.read(reader.fileno(), 2**16):  # until the process has ended
        text += data
    job.join(60)
    assert not job.is_alive(), line
    return job.exitcode, text.decode(errors="replace"), int(calls.read_text()) if calls.exists() else 0


def limited(line: list[str], folder: str, output: Connection, calls: Path, fault: str, k: int, nbytes: int | None):
    if nbytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit is an OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
    run_with_fault(line, folder, output, calls, fault, k)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_file, tokenizer) -> Path:
    """What the commands read: a dense and a pruned model, calibration, prepared data, an adapter, samples, texts."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model = Llama(PRESETS["test"])
    save(model, folder / "dense.pt", tokenizer)
    rng = np.random.default_rng(0)
    calib = rng.integers(3, 200, (4, 16))
    np.save(folder / "calib.npy", calib.astype(np.int32))
    prune_model(model, calib, "wanda", "2:4")
    save(model, folder / "pruned.pt", tokenizer)
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    records = [{"instruction": f"Say {i}.", "output": f"bada {i}"} for i in range(40)]
    (folder / "alpaca.json").write_text(json.dumps(records))
    (folder / "c4.jsonl").write_text("".join(json.dumps({"text": "bada kimu dogu " * 20}) + "\n" for _ in range(5)))
    (folder / "text.txt").write_text("bada kimu dogu ruku " * 40)
    choices = {f"gen_args_{k}": {"arg_0": "bada", "arg_1": f" {text}"} for k, text in enumerate(("kimu", "dogu"))}
    samples = [{"doc_id": i, "doc": {"q": i}, "target": "0", "arguments": choices} for i in range(3)]
    (folder / "samples_made.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    boolq = [{"passage": "bada", "question": "kimu", "label": i % 2} for i in range(3)]
    (folder / "boolq.jsonl").write_text("".join(json.dumps(d) + "\n" for d in boolq))
    prepare = [ROOT / "data/alpaca/prepare.py", "--tokenizer", folder / "tokenizer.model"]
    prepare += ["--json", folder / "alpaca.json", "--val", 8, "--out", folder / "alpaca"]
    status, text, _ = run(prepare, folder)
    assert status == 0, text
    train = [*TRAIN, "--ckpt", folder / "pruned.pt", "--data", folder / "alpaca", "--out_dir", folder / "run"]
    status, text, _ = run(train, folder)
    assert status == 0, text
    return folder


TRAIN = [ROOT / "train.py", "--device", "cpu", "--rank", 4, "--batch_size", 16, "--epochs", 1.5, "--save_interval", 1]
TRAIN += ["--eval_interval", 2, "--resume"]
COMMANDS = {
    "convert": ["model.py", "--ckpt", "IN/dense.pt", "--out", "OUT/hf"],
    "convert to .pt": ["model.py", "--ckpt", "IN/dense.pt", "--out", "OUT/model.pt"],
    "prune": ["prune.py", "--ckpt", "IN/dense.pt", "--calib", "IN/calib.npy", "--device", "cpu", "--out", "OUT/pruned"],
    "prune to .pt": ["prune.py", "--ckpt", "IN/dense.pt", "--calib", "IN/calib.npy", "--device", "cpu"]
    + ["--out", "OUT/p.pt"],
    "merge": ["spp.py", "--ckpt", "IN/pruned.pt", "--adapter", "IN/run/adapter.pt", "--out", "OUT/merged.pt"],
    "train": [*TRAIN, "--ckpt", "IN/pruned.pt", "--data", "IN/alpaca", "--out_dir", "OUT/run"],
    "evaluate": ["evaluate.py", "--ckpt", "IN/dense.pt", "--device", "cpu", "--tasks", "IN/samples_made.jsonl"]
    + ["--ppl", "IN/text.txt", "--seqlen", "32", "--log_samples", "OUT/log", "--out", "OUT/r.json"],
    "alpaca": ["data/alpaca/prepare.py", "--tokenizer", "IN/tokenizer.model", "--json", "IN/alpaca.json"]
    + ["--val", "8", "--out", "OUT/alpaca"],
    "c4": ["data/c4/prepare.py", "--tokenizer", "IN/tokenizer.model", "--json", "IN/c4.jsonl", "--nsamples", "4"]
    + ["--seqlen", "16", "--out", "OUT/c4.npy"],
    "lm_eval": ["data/lm_eval/prepare.py", "--task", "boolq", "--json", "IN/boolq.jsonl", "--out", "OUT/tasks"],
    "tiny": ["data/tiny/prepare.py", "--pages", "100", "--instructions", "20", "--out", "OUT/world"],
}


def command(name: str, inputs: Path, out: Path) -> list[str]:
    line = [str(x).replace("IN/", f"{inputs}/").replace("OUT/", f"{out}/") for x in COMMANDS[name]]
    return [str(ROOT / line[0]) if not line[0].startswith("/") else line[0], *line[1:]]


def results(out: Path) -> dict[str, bytes]:
    """What a command has left, without times and settings: those of an interrupted run may differ."""
    found = {}
    older = sorted(out.glob("run/step-*[0-9].pt"))[:-2]  # one that could not be removed
    for file in sorted({*out.rglob("*")} - {*older}):
        name = str(file.relative_to(out))
        if file.is_dir() or file.name == ".lock" or (file.name == "config.json" and name.startswith("run/")):
            continue
        data = file.read_bytes()
        if name.endswith("log.jsonl"):
            data = re.sub(rb'"(tokens_per_second|peak_memory)": [\d.e+]+', b"", data)
        if re.search(r"/step-\d+\.pt", name):  # a tuple of AdamW's comes back as a list: other bytes, the same state
            state = torch.load(file)
            data = b"".join(w.numpy().tobytes() for w in state["model"].values()) + str(state["best"]).encode()
        found[name] = data
    return found


def check(name: str, inputs: Path, tmp: Path, expected: dict, fault: str, k: int, nbytes: int | None = None) -> str:
    """One fault: how the command ended, having seen that it ended well and that it can be given again."""
    out = tmp / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    status, text, _ = run(command(name, inputs, out), tmp, fault, k, nbytes)
    told = f"{name}, {fault} at call {k}, {nbytes} bytes: status {status}\n{text}"
    assert status in (0, 2, -signal.SIGKILL), told
    if status == 2:
        assert text.count("error: ") == 1 and "Traceback" not in text, told
    if status != 0:
        status, text, _ = run(command(name, inputs, out), tmp)
        done = "is not empty" in text  # it was killed after its last call: the result is there, and is not made again
        assert status == 0 or done, f"{told}\nagain: status {status}\n{text}"
    found = results(out)
    # .tmp: of a killed process, and for the next one to remove; r.json.partial: the results are whole, and a folder that
    # cannot be removed after them is no reason to lose them
    found = {file: data for file, data in found.items() if ".tmp" not in file and "r.json.partial" not in file}
    assert found == expected, f"{told}\nleft: {[*found]}"
    return "one line" if status == 2 else "went on"


@pytest.mark.parametrize("name", ["prune to .pt", "train", "alpaca"])
def test_a_file_system_that_fails_at_a_few_calls_costs_one_line(inputs, tmp_path, name):
    sweep(name, inputs, tmp_path, every=71)


@pytest.mark.stress
@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_system_that_fails_at_any_call_costs_one_line(inputs, tmp_path, name):
    every = 9 if name == "tiny" else 1  # it trains a tokenizer each time
    sweep(name, inputs, tmp_path, every)


def sweep(name: str, inputs: Path, tmp: Path, every: int) -> None:
    out = tmp / "out"
    out.mkdir()
    status, text, n = run(command(name, inputs, out), tmp)
    assert status == 0 and n > 3, text
    expected = results(out)
    for fault in FAULTS:
        for k in range(1, n + 1, every):
            check(name, inputs, tmp, expected, fault, k)
    largest = max(len(data) for data in expected.values())
    sizes = [0, 100, largest // 2, largest - 1] if every < 10 else [100, largest // 2]
    for nbytes in sizes:
        check(name, inputs, tmp, expected, "full", 0, nbytes)
    print(f"{name}: {n} calls, {len(FAULTS) * len(range(1, n + 1, every)) + len(sizes)} faults")
