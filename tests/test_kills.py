"""A supervisor that gives one and the same command again until it succeeds, while processes are killed at random."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_faults import command, inputs, results  # noqa: F401  inputs is a fixture

from model import PRESETS, Llama, save
from prune import prune_model

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def alive(mark: str) -> list[int]:
    """The processes that were started with this mark in their environment, whoever their parent is by now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not zombie and f"MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def start(line: list[str], mark: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "MARK": mark}
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def strike(process: subprocess.Popen, mark: str, rng: random.Random) -> str:
    """Sends a random signal to torchrun, to one of its workers, or to all. Returns what it did."""
    number = rng.choice(SIGNALS)
    workers = [pid for pid in alive(mark) if pid != process.pid]
    target = rng.choice(("torchrun", "rank", "all"))
    victims = {
        "torchrun": [process.pid],
        "rank": [rng.choice(workers or [process.pid])],
        "all": [process.pid, *workers],
    }
    for pid in victims[target]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return f"{number.name} to {target}"


def wait_for_orphans(mark: str) -> float:
    """Seconds until the last process of this mark is gone, 30 at most."""
    begin = time.monotonic()
    while alive(mark):
        assert time.monotonic() - begin < 30, f"orphans after 30 s: {alive(mark)}"
        time.sleep(0.1)
    return time.monotonic() - begin


def outcome(folder: Path) -> tuple[bytes, bytes, bytes]:
    """The adapter, the merged model, and the log without its times."""
    log = (folder / "log.jsonl").read_bytes()
    log = re.sub(rb', "tokens_per_second.*?}', b"}", log)
    return (folder / "adapter.pt").read_bytes(), (folder / "merged.pt").read_bytes(), log


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pruned model and data for about 60 steps."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = Llama(PRESETS["test"])
    rng = np.random.default_rng(0)
    prune_model(model, rng.integers(3, 200, (4, 24)), "wanda", "2:4")
    save(model, folder / "pruned.pt")
    (folder / "data").mkdir()
    for split, n in (("train", 480), ("val", 16)):
        examples = [(3 + a + b * np.arange(rng.integers(8, 40))) % 200 + 3 for a, b in rng.integers(1, 9, (n, 2))]
        np.save(folder / "data" / f"{split}.npy", np.concatenate(examples).astype(np.uint16))
        np.save(folder / "data" / f"{split}.offsets.npy", np.cumsum([0, *map(len, examples)]))
        np.save(folder / "data" / f"{split}.prompt.npy", np.ones(n, np.int32))
    return folder


@pytest.mark.stress
@pytest.mark.parametrize("flags", ["", "--fsdp"], ids=["ddp", "fsdp"])
def test_a_supervised_training_ends_as_if_nothing_had_happened(world, tmp_path, flags):
    rng = random.Random(len(flags))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*torchrun, str(ROOT / "train.py"), "--ckpt", str(world / "pruned.pt"), "--data", str(world / "data")]
    line += "--device cpu --rank 4 --batch_size 16 --epochs 2 --save_interval 2 --eval_interval 15 --resume".split()
    line += flags.split()
    begin = time.monotonic()
    whole = start([*line, "--out_dir", str(tmp_path / "whole")], f"{tmp_path}-whole")
    text = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, text
    duration = time.monotonic() - begin
    strikes, longest, lives = [], 0.0, 0
    while len(strikes) < 16:
        folder, mark = tmp_path / f"run{lives}", f"{tmp_path}-{lives}"
        lives += 1
        while True:  # what a supervisor does
            process = start([*line, "--out_dir", str(folder)], mark)
            if len(strikes) < 16:
                try:
                    process.wait(rng.uniform(0.5, duration))
                except subprocess.TimeoutExpired:
                    strikes.append(strike(process, mark, rng))
            text = process.communicate(timeout=300)[0]
            longest = max(longest, wait_for_orphans(mark))
            if process.returncode == 0:
                break
            # torchrun prints tracebacks of its own; one of ours may only be Python's word for a signal during imports
            assert 'train.py", line' not in text or "KeyboardInterrupt" in text, text
        assert outcome(folder) == outcome(tmp_path / "whole"), strikes
        shutil.rmtree(folder)
    print(f"{len(strikes)} strikes in {lives} runs, orphans lived {longest:.1f} s at most: {', '.join(strikes)}")


@pytest.mark.stress
@pytest.mark.parametrize("name", ["prune", "evaluate", "alpaca", "lm_eval", "tiny"])
def test_a_supervised_command_ends_as_if_nothing_had_happened(inputs, tmp_path, name):  # noqa: F811
    rng = random.Random(name)
    (tmp_path / "whole").mkdir()
    line = [sys.executable, *command(name, inputs, tmp_path / "whole")]
    begin = time.monotonic()
    assert start(line, "none").wait(120) == 0
    duration = time.monotonic() - begin
    expected = results(tmp_path / "whole")
    kills = 0
    while kills < 8:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        line = [sys.executable, *command(name, inputs, out)]
        while True:
            process = start(line, "none")
            if kills < 8:
                try:
                    process.wait(rng.uniform(0.5 * duration, duration))
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
            text = process.communicate(timeout=120)[0]
            if process.returncode == 0 or "is not empty" in text:  # the result is there, and is not made again
                break
            assert process.returncode == -signal.SIGKILL, text
        assert {file: data for file, data in results(out).items() if ".tmp" not in file} == expected
