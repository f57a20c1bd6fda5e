"""What train.py promises: the same run however it is dealt, killed, resumed or sharded."""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import prune_by_magnitude

import train
from model import PRESETS, Llama, LlamaConfig, UserError, cli, load, open_checkpoint, save
from spp import inject

ROOT = Path(__file__).parents[1]


def write_data(folder: Path, sizes=(48, 8), seed=0) -> Path:
    """Prepared data as data/alpaca/prepare.py leaves it: random tokens, lengths from 4 to 40."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for split, n in zip(("train", "val"), sizes, strict=True):
        lengths = rng.integers(4, 41, n)
        # A learnable language: tokens rise by a step of 1 to 4 that is the example's own.
        examples = [(rng.integers(64) + rng.integers(1, 5) * np.arange(k)) % 64 for k in lengths]
        np.save(folder / f"{split}.npy", np.concatenate([np.zeros(0), *examples]).astype(np.uint16))
        np.save(folder / f"{split}.offsets.npy", np.cumsum([0, *lengths]))
        np.save(folder / f"{split}.prompt.npy", (lengths // 2).astype(np.int32))
    (folder / "meta.json").write_text(json.dumps({"tokenizer_sha256": "none"}))
    return folder


def write_long_data(folder: Path, n: int, length: int) -> Path:
    """Prepared data of n examples of one length, nothing held out."""
    write_data(folder, sizes=(0, 0))
    np.save(folder / "train.npy", np.random.default_rng(0).integers(0, 200, n * length).astype(np.uint16))
    np.save(folder / "train.offsets.npy", np.arange(n + 1) * length)
    np.save(folder / "train.prompt.npy", np.zeros(n, dtype=np.int32))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `data` and a model that learned it for a second and was pruned to 1:4 by magnitude, `pruned.pt`."""
    folder = tmp_path_factory.mktemp("world")
    write_data(folder / "data")
    examples = train.Examples(write_data(folder / "pretraining", (150 * 32, 0), seed=1), "train")
    torch.manual_seed(0)
    model = Llama(PRESETS["test"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(150):
        batch = range(32 * step, 32 * (step + 1))
        (model(*examples.batch(batch, False, "cpu")) / examples.lengths[batch].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save(prune_by_magnitude(model, 1, 4), folder / "pruned.pt")
    return folder


def command(world, out, *flags, processes=1):
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    line = [*python, str(ROOT / "train.py"), "--ckpt", world / "pruned.pt", "--data", world / "data", "--out_dir", out]
    settings = {"--lr": 0.004, "--batch_size": 16, "--epochs": 2, "--max_tokens": 160, "--device": "cpu"}
    given = {flag for flag in flags if str(flag).startswith("--")}
    settings |= {"--r": 4} if not {"masked", "dynamic"} & set(flags) else {}
    line += [x for flag, value in settings.items() if flag not in given for x in (flag, value)]
    return [str(x) for x in [*line, *flags]]


def run(world, out, *flags, processes=1):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    line = command(world, out, *flags, processes=processes)
    return subprocess.run(line, capture_output=True, text=True, env=env, timeout=240)


def finished(world, out, *flags, processes=1):
    result = run(world, out, *flags, processes=processes)
    assert result.returncode == 0, result.stderr
    return torch.load(out / "adapter.pt")["adapter"], losses(out)


def losses(out):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory")} for line in lines]


def refusal(world, out, *flags, processes=1):
    """The one line of a refused command (torchrun adds a report of its own)."""
    result = run(world, out, *flags, processes=processes)
    assert result.returncode == (2 if processes == 1 else 1)
    ours = [line for line in result.stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(ours) == 1, result.stderr
    assert processes > 1 or result.stderr.strip() == ours[0]
    return ours[0]


def refused_here(world, out, monkeypatch, capsys, *flags):
    """As `refusal`, in this process: for what is refused before a run begins."""
    line = command(world, out, *flags)
    monkeypatch.setattr(sys, "argv", line[line.index(str(ROOT / "train.py")) :])
    with pytest.raises(SystemExit) as e:
        cli(train.main)
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("train.py: error: ") and text.count("\n") == 1, text
    return text


@pytest.fixture(scope="module")
def alone(world):
    """The adapter and the log of one process with default settings."""
    return finished(world, world / "alone")


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# dealing


def test_every_example_is_dealt_once_in_micro_batches_that_fit():
    rng = np.random.default_rng(0)
    for world_size in (1, 2, 8):
        lengths = rng.integers(1, 512, 128)
        dealt = train.deal(np.arange(128), lengths, 2048, world_size)
        assert sorted(i for parts in dealt for part in parts for i in part) == list(range(128))
        assert len({len(parts) for parts in dealt}) == 1, "FSDP needs the same number of micro-batches everywhere"
        assert all(len(part) * lengths[part].max(initial=0) <= 2048 for parts in dealt for part in parts)


def test_processes_finish_together():
    lengths = np.random.default_rng(1).integers(20, 512, 128)
    for rounds in zip(*train.deal(np.arange(128), lengths, 4096, 4), strict=True):
        work = [len(part) * lengths[part].max() for part in rounds]
        assert min(work) > 0.5 * max(work)


def test_sorting_by_length_leaves_less_than_8_percent_padding():
    # Alpaca's lengths are about log-normal; padding random batches of 8 wastes half
    lengths = np.random.default_rng(0).lognormal(4.6, 0.7, 4096).clip(10, 511).astype(int)
    for world_size in (1, 8):
        plan, padded = train.Plan(4096, 128, 1, 0), 0
        for step in range(plan.steps):
            padded += train.padded_tokens(train.deal(plan[step], lengths, 4096, world_size), lengths)
        assert 1 - lengths.sum() / padded < 0.08


def test_an_epoch_sees_every_example_once():
    plan = train.Plan(50, 16, 2, seed=3)
    assert plan.steps == 8
    for epoch in (0, 1):
        assert sorted(np.concatenate([plan[4 * epoch + i] for i in range(4)])) == list(range(50))
    assert not np.array_equal(plan[0], plan[4])


def test_targets_are_the_next_tokens_and_prompts_can_be_masked(world):
    examples = train.Examples(world / "data", "train")
    tokens, targets = examples.batch([0, 1], False, "cpu")
    first = torch.from_numpy(examples.tokens[: examples.offsets[1]].astype(np.int64))
    assert tokens[0, : len(first) - 1].equal(first[:-1]) and targets[0, : len(first) - 1].equal(first[1:])
    assert (targets != -100).sum() == examples.lengths[:2].sum()
    _, masked = examples.batch([0, 1], True, "cpu")
    assert (masked != -100).sum() == sum(examples.n_targets(i, True) for i in (0, 1))
    n = examples.prompt[0]  # the first target is the first token of the answer
    assert masked[0, n - 1] == first[n] and (masked[0, : n - 1] == -100).all()


def test_padding_does_not_change_the_loss(world):
    model, _ = load(world / "pruned.pt")
    examples = train.Examples(world / "data", "train")
    together = model(*examples.batch([0, 1, 2], False, "cpu"))
    apart = sum(model(*examples.batch([i], False, "cpu")) for i in (0, 1, 2))
    tokens, targets = examples.batch([0], False, "cpu")
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(model(tokens, targets), F.cross_entropy(model(tokens)[0], targets[0], reduction="sum"))


def test_learning_rate_rises_over_the_warmup_and_falls_to_zero():
    rates = [train.learning_rate(step, 100, 0.1, 1.0) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[99] == pytest.approx(1 / 90)


# ----------------------------------------------------------------------------------------------------------------------
# one result, however it is run


def test_one_step_of_the_loop_equals_a_step_written_by_hand(world):
    """Loss as a mean over all targets, AdamW with the paper's settings: against one batch, one process, no dealing."""
    adapter, log = finished(world, world / "onestep", "--epochs", 0.34, "--max_tokens", 64)
    examples = train.Examples(world / "data", "train")
    model, _ = load(world / "pruned.pt")
    reference = train.build(
        train.parse_args(["--preset", "test", "--r", "4", "--matmul", "repeat", "--dtype", "float32"]),
        model.config,
    )
    train.materialise(reference, model.state_dict(), 0, "cpu")
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], 0.004, weight_decay=0.001)
    tokens, targets = examples.batch(train.Plan(48, 16, 1, 0)[0].tolist(), False, "cpu")
    loss = F.cross_entropy(reference(tokens).transpose(1, 2), targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = train.learning_rate(0, 1, 0.03, 0.004)
    optimizer.step()
    assert log[1]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    mine = {n.removeprefix("model."): p for n, p in reference.named_parameters() if p.requires_grad}
    assert difference(adapter, mine) < 1e-5


@pytest.mark.parametrize(
    "processes, flags",
    [
        (1, ("--max_tokens", 64)),
        (1, ("--compile",)),
        (1, ("--activation_checkpointing", "--matmul", "chunked")),
        (2, ()),
        (2, ("--fsdp",)),
        (4, ("--fsdp", "--activation_checkpointing", "--matmul", "repeat")),
    ],
)
def test_the_adapter_does_not_depend_on_how_the_work_is_dealt(world, alone, tmp_path, processes, flags):
    adapter, log = finished(world, tmp_path / "run", *flags, processes=processes)
    assert difference(adapter, alone[0]) < 1e-5
    for mine, theirs in zip(log, alone[1], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_a_process_of_fsdp_reads_and_holds_only_its_rows(tmp_path):
    """Peak resident memory of each of 4 processes grows by less than 40% of the weights' bytes."""
    model = Llama(LlamaConfig(1000, 1024, 2816, n_layers=4, n_heads=8))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    save(model, tmp_path / "model.pt")
    del model
    script = tmp_path / "shard.py"
    script.write_text(
        f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import re, torch, torch.distributed as dist, train
from model import open_checkpoint
from torch.distributed.device_mesh import init_device_mesh
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
dist.init_process_group("gloo"); mesh = init_device_mesh("cpu", (4,))
args = train.parse_args("--preset test --r 4 --dtype float32".split())
ckpt = open_checkpoint({str(tmp_path / "model.pt")!r})
model = train.build(args, ckpt.config)
before = peak()
train.materialise(model, ckpt, 0, "cpu", mesh)
own = sum(p.to_local().numel() for p in model.parameters())
assert own < 0.3 * sum(p.numel() for p in model.parameters())
sys.stdout.write(f"{{(peak() - before) / {size}}}\\n")  # in one piece: four processes share it
"""
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", str(script)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    shares = [float(x) for x in result.stdout.split()]
    assert len(shares) == 4 and 0.2 < max(shares) < 0.4, (shares, result.stderr)


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "lora", "--r", 8),
        ("--method", "masked", "--lr", 0.003),
        ("--method", "masked_lora", "--r", 8),
        ("--method", "dynamic", "--sparsity", "1:4", "--mask_interval", 2, "--lr", 0.003),
        ("--no_beta",),
        ("--zero_init", "alpha"),
        ("--zero_init", "none"),
        ("--no_residual",),
        ("--r", 16),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_method_and_ablation_trains_and_merges_sparse(world, tmp_path, flags):
    lr = () if "--lr" in flags else ("--lr", 0.02)
    _, log = finished(world, tmp_path / "run", *flags, *lr, "--epochs", 4, "--eval_interval", 4)
    val = [line["val_loss"] for line in log if "val_loss" in line]
    assert min(val[1:]) < val[0]
    merged, pruned = open_checkpoint(tmp_path / "run" / "merged.pt"), open_checkpoint(world / "pruned.pt")
    assert merged.history[-1]["method"] == ("lora*" if "lora" in flags else flags[1] if "--method" in flags else "spp")
    for name in pruned:
        if name.endswith("proj.weight"):
            assert ((merged[name].view(-1, 4) != 0).sum(1) <= 1).all() and not merged[name].equal(pruned[name])
            assert "dynamic" in flags or not merged[name][pruned[name] == 0].any()


def test_two_nodes_give_the_result_of_one(world, alone, tmp_path):
    """Two torchrun on this machine that meet at a loopback address, one process each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    line = command(world, tmp_path / "run", processes=2)
    at = line.index("--standalone")
    nodes = []
    for rank in (0, 1):
        meet = ["--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        here = [*line[:at], *meet, "--nproc_per_node=1", *line[at + 2 :]]
        nodes.append(subprocess.Popen(here, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL))
    assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    assert difference(torch.load(tmp_path / "run" / "adapter.pt")["adapter"], alone[0]) < 1e-5


def test_writing_an_adapter_leaves_the_model_as_it_was(world, tmp_path):
    ckpt = open_checkpoint(world / "pruned.pt")
    args = train.parse_args(["--ckpt", "x", "--method", "dynamic", "--sparsity", "1:4", "--dtype", "float32"])
    model = train.build(args, ckpt.config)
    train.materialise(model, Llama(ckpt.config).state_dict(), 0, "cpu")  # dense
    train.update_masks(model, (1, 4))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    train.write_adapter(tmp_path / "adapter.pt", train.learned(model), args, ckpt.fingerprint())
    assert all(w.equal(before[name]) for name, w in model.state_dict().items())
    layer = torch.load(tmp_path / "adapter.pt")["adapter"]["layers.0.mlp.up_proj.weight"]
    assert (layer == 0).float().mean() == 0.75


# ----------------------------------------------------------------------------------------------------------------------
# killed and resumed


def wait_for(path: Path, line: str, process):
    """Returns when the line stands in the file; looks again each time that `process` has not ended for a moment."""
    for _ in range(3000):
        if path.exists() and line in path.read_text():
            return
        try:
            process.wait(timeout=0.02)
            break
        except subprocess.TimeoutExpired:
            pass
    raise AssertionError(f"{line} did not come")


def start(world, out, *flags, processes=1):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    line = command(world, out, *flags, processes=processes)
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


LONG = ("--epochs", 10, "--lr", 0.02, "--save_interval", 3, "--eval_interval", 4)


@pytest.fixture(scope="module")
def long(world):
    return finished(world, world / "long", *LONG)


def test_training_lowers_the_validation_loss_and_keeps_what_it_must(world, long):
    _, log = long
    val = [line["val_loss"] for line in log if "val_loss" in line]
    assert val[-1] < val[0] - 0.1
    before, after = (load(path)[0].state_dict() for path in (world / "pruned.pt", world / "long" / "merged.pt"))
    for name, w in before.items():
        if name.endswith("proj.weight"):
            assert (after[name][w == 0] == 0).all() and not after[name].equal(w)
            assert ((after[name].view(-1, 4) != 0).sum(1) <= 1).all()
        else:
            assert after[name].equal(w), name


@pytest.mark.parametrize("step", (4, 11, 23))
def test_a_killed_run_resumes_bit_for_bit(world, long, tmp_path, step):
    process = start(world, tmp_path / "run", *LONG)
    wait_for(tmp_path / "run" / "log.jsonl", f'"step": {step},', process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    adapter, log = finished(world, tmp_path / "run", *LONG, "--resume")
    assert difference(adapter, long[0]) == 0
    assert log == long[1]


def test_sigterm_saves_and_says_how_to_go_on(world, long, tmp_path):
    process = start(world, tmp_path / "run", *LONG, "--save_interval", 1000)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 5,', process)
    process.send_signal(signal.SIGTERM)
    assert "--resume" in process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    adapter, log = finished(world, tmp_path / "run", *LONG, "--resume")
    assert difference(adapter, long[0]) == 0 and log == long[1]


def test_a_second_signal_leaves_at_once():
    code = "import os, signal, train; caught = train.catch_signals(); os.kill(os.getpid(), signal.SIGINT)\n"
    code += "print(caught, flush=True); os.kill(os.getpid(), signal.SIGTERM); signal.pause()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (result.stdout, result.returncode) == ("[2]\n", -signal.SIGTERM)


def test_out_of_memory_says_which_flags_help(tmp_path):
    """6 GiB of address space are too few for an MLP of width 16,384 at 40,000 tokens."""
    save(Llama(LlamaConfig(256, 64, 16384, n_layers=1, n_heads=2)), tmp_path / "pruned.pt")
    write_long_data(tmp_path / "data", 20, 2001)
    line = command(tmp_path, tmp_path / "run", "--batch_size", 20, "--max_tokens", 40000)
    limit = f"ulimit -v {6 * 2**20}; exec " + shlex.join(line)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(["sh", "-c", limit], capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 2 and "out of memory" in result.stderr and "--max_tokens" in result.stderr


def test_a_run_resumes_on_another_number_of_processes(world, long, tmp_path):
    process = start(world, tmp_path / "run", *LONG)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 7,', process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    adapter, log = finished(world, tmp_path / "run", *LONG, "--resume", "--fsdp", processes=2)
    assert difference(adapter, long[0]) < 1e-4
    assert [line["step"] for line in log] == [line["step"] for line in long[1]]


def test_a_truncated_state_is_passed_over_with_a_warning(world, long, tmp_path):
    process = start(world, tmp_path / "run", *LONG)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 12,', process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    newest = max((tmp_path / "run").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    result = run(world, tmp_path / "run", *LONG, "--resume")
    assert result.returncode == 0 and f"{newest.name} is truncated" in result.stdout + result.stderr
    assert difference(torch.load(tmp_path / "run" / "adapter.pt")["adapter"], long[0]) == 0


def test_when_one_process_is_killed_the_others_leave(world, tmp_path):
    process = start(world, tmp_path / "run", "--epochs", 1000, processes=2)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 3,', process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)


# ----------------------------------------------------------------------------------------------------------------------
# --dry_run


def test_dry_runs_memory_is_within_10_percent_of_the_measured(tmp_path):
    """Resident memory, without Python and PyTorch's own. malloc is told to give back what is freed: by itself it keeps
    up to half as much again for later."""
    save(Llama(LlamaConfig(8000, 1024, 2816, n_layers=4, n_heads=8)), tmp_path / "pruned.pt")
    write_long_data(tmp_path / "data", 6, 513)
    flags = ("--batch_size", 6, "--max_tokens", 3072, "--epochs", 1)
    text = run(tmp_path, tmp_path / "run", *flags, "--dry_run").stdout
    estimate = float(re.search(r"together +([\d.]+) GiB", text)[1])
    code = "import torch, train; (torch.ones(999, 999) @ torch.ones(999, 999)); print(train.peak_memory('cpu'))"
    alone = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = command(tmp_path, tmp_path / "run", *flags)
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    assert subprocess.run(line, capture_output=True, env=env, timeout=240).returncode == 0
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    peak = max(json.loads(line).get("peak_memory", 0) for line in lines)
    assert (peak - int(alone.stdout)) / 2**30 == pytest.approx(estimate, rel=0.1)


@pytest.mark.parametrize(
    "preset, count, per_mille",
    [
        ("llama-7b", "19,578,880", 2.90),
        ("llama-13b", "30,638,080", 2.35),
        ("llama-30b", "59,688,960", 1.83),
        ("llama-65b", "97,894,400", 1.50),
        ("llama-2-7b", "19,578,880", 2.90),
        ("llama-2-13b", "30,638,080", 2.35),
        ("llama-2-70b", "106,332,160", 1.54),
    ],
)
def test_trainable_parameters_are_those_of_table_1(preset, count, per_mille):
    with torch.device("meta"):
        model = inject(Llama(PRESETS[preset]))
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())  # Table 1 counts the adapters in
    assert f"{learn:,}" == count and round(1000 * learn / total, 2) == per_mille


def test_dry_run_of_70b_on_8_processes_needs_no_weights(tmp_path, world):
    line = [sys.executable, str(ROOT / "train.py"), "--preset", "llama-2-70b", "--fsdp", "--activation_checkpointing"]
    line += ["--dtype", "bfloat16", "--dry_run", "8", "--data", str(tmp_path), "--out_dir", str(tmp_path / "run")]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "106,332,160 (0.154%" in result.stdout
    frozen = float(re.search(r"frozen weights +([\d.]+) GiB", result.stdout)[1])
    assert frozen == pytest.approx(68.98e9 * 2 / 8 / 2**30, rel=0.01)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# bad input: one line, exit status 2, nothing written


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--dry_run", 0), "--dry_run: expected at least 1, found 0"),
        (("--dry_run", 1000), "fewer examples than the 1000 processes"),
        (("--lr", "inf"), "--lr: expected a finite number, found inf"),
        (("--lr", "fast"), "--lr: invalid float value: 'fast'"),
        (("--lr", -1), "--lr: expected more than 0"),
        (("--weight_decay", -1), "--weight_decay: expected at least 0"),
        (("--grad_clip", -1), "--grad_clip: expected at least 0"),
        (("--mask_interval", 0), "--mask_interval: expected at least 1"),
        (("--seed", -1), "--seed: expected at least 0"),
        (("--epochs", 0), "--epochs: expected more than 0"),
        (("--warmup", 1.5), "--warmup: expected at least 0 and at most 1"),
        (("--sparsity", "2:4"), "--sparsity: means nothing to --method spp"),
        (("--method", "lora", "--no_beta"), "--no_beta: means nothing to --method lora"),
        (("--method", "masked", "--r", 8), "--r: means nothing to --method masked"),
        (("--method", "dynamic"), "needs --sparsity"),
        (("--method", "dynamic", "--sparsity", "4:2"), "--sparsity 4:2: expected"),
        (("--method", "full", "--fsdp"), "--fsdp: .* --method full needs them whole"),
        (("--tokenizer", "x"), "goes with --preset"),
        (("--ckpt", "nowhere.pt"), "nowhere.pt: no such checkpoint"),
        (("--data", "nowhere"), "--data nowhere: train split cannot be read"),
        (("--r", 5), "--r 5: does not divide"),
        (("--max_tokens", 20), "--max_tokens 20: the longest example"),
        (("--resume",), "holds no run"),
        (("--preset", "test"), "--preset: not allowed with argument --ckpt"),
        (("--zero_init", "both"), "--zero_init: invalid choice: 'both'"),
        (("--out_dir", "/proc/run"), "--out_dir /proc/run/merged.pt: cannot be written"),
    ],
)
def test_a_wrong_flag_is_one_line_and_writes_nothing(world, tmp_path, monkeypatch, capsys, flags, words):
    line = refused_here(world, tmp_path / "run", monkeypatch, capsys, *flags)
    assert re.search(words, line), line
    assert not (tmp_path / "run").exists()


def test_random_weights_are_pretrained_alone_and_only_whole(world, monkeypatch, capsys):
    line = ["train.py", "--preset", "test", "--data", str(world / "data"), "--method", "spp"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit):
        cli(train.main)
    assert "--preset: random weights have no mask" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", line[:1])
    with pytest.raises(SystemExit):
        cli(train.main)
    assert "one of the arguments --ckpt --preset is required" in capsys.readouterr().err


def test_the_data_folder_is_no_place_for_a_run(world, monkeypatch, capsys):
    before = sorted((world / "data").iterdir())
    assert "name a folder of its own" in refused_here(world, world / "data", monkeypatch, capsys)
    assert sorted((world / "data").iterdir()) == before


def test_pretraining_on_two_processes_leaves_a_model_without_a_tokenizer(world, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    line += ["--preset", "test", "--method", "full", "--data", world / "data", "--out_dir", tmp_path / "run"]
    line += "--epochs 0.3 --batch_size 16 --device cpu".split()
    result = subprocess.run([str(x) for x in line], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    model, tokenizer = load(tmp_path / "run" / "merged.pt")
    assert tokenizer is None and model.history[-1]["method"] == "full"
    assert not (tmp_path / "run" / "adapter.pt").exists() and "adapter.pt" not in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_asked_for_where_there_is_none_is_refused(world, tmp_path, monkeypatch, capsys):
    assert "--device cuda" in refused_here(world, tmp_path / "run", monkeypatch, capsys, "--device", "cuda")


def test_more_processes_than_examples_of_a_batch_are_refused(world, tmp_path):
    assert "--batch_size 1" in refusal(world, tmp_path / "run", "--batch_size", 1, processes=2)


def test_a_second_run_in_the_same_folder_is_refused(world, alone, monkeypatch, capsys):
    assert "holds config.json" in refused_here(world, world / "alone", monkeypatch, capsys)


def test_a_second_run_at_the_same_time_is_refused(world, tmp_path):
    process = start(world, tmp_path / "run", "--epochs", 1000, "--save_interval", 1)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 3,', process)
    line = refusal(world, tmp_path / "run", "--epochs", 1000, "--save_interval", 1, "--resume")
    process.kill()
    process.wait()
    assert "a run is at work in it" in line


def test_resuming_another_run_is_refused(world, alone, tmp_path, monkeypatch, capsys):
    line = refused_here(world, world / "alone", monkeypatch, capsys, "--resume", "--lr", 0.5)
    assert "was run with --lr 0.004, not 0.5" in line
    write_data(tmp_path / "other", seed=1)
    line = refused_here(world, world / "alone", monkeypatch, capsys, "--resume", "--data", tmp_path / "other")
    assert "another data" in line


def test_damaged_data_is_refused(tmp_path):
    data = write_data(tmp_path / "data")
    args = argparse.Namespace(data=data, tokenizer=None, max_tokens=160, batch_size=16)
    with pytest.raises(UserError, match="token id"):
        train.read_data(args, LlamaConfig(vocab_size=60), None, 1)
    np.save(data / "train.offsets.npy", np.array([0, 5]))
    with pytest.raises(UserError, match="do not fit"):
        train.Examples(data, "train")
    np.save(data / "train.offsets.npy", np.arange(len(np.load(data / "train.npy")) + 1))
    np.save(data / "train.prompt.npy", np.zeros(len(np.load(data / "train.npy")), np.int32))
    with pytest.raises(UserError, match="example 0 of train has fewer than 2 tokens"):
        train.Examples(data, "train")
    (data / "val.npy").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="val split"):
        train.Examples(data, "val")


def test_data_without_an_example_is_refused(tmp_path):
    data = write_data(tmp_path / "data", sizes=(0, 0))
    args = argparse.Namespace(data=data, tokenizer=None, max_tokens=160, batch_size=16)
    with pytest.raises(UserError, match="holds no training example"):
        train.read_data(args, LlamaConfig(), None, 1)


def test_a_loss_that_is_no_number_ends_the_run(world, tmp_path):
    assert "the loss became" in refusal(world, tmp_path / "run", "--lr", 1e30, "--grad_clip", 0)


def test_a_run_resumes_in_a_folder_that_was_moved(world, alone, tmp_path):
    shutil.copytree(world / "alone", tmp_path / "moved")
    result = run(world, tmp_path / "moved", "--resume")
    assert result.returncode == 0 and "resuming after step" in result.stdout


def test_resuming_a_run_without_a_whole_state_is_refused(world, tmp_path, monkeypatch, capsys):
    flags = ("--epochs", 1000)
    process = start(world, tmp_path / "run", *flags)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 1,', process)
    process.kill()
    process.wait()
    assert "holds no whole step-*.pt" in refused_here(world, tmp_path / "run", monkeypatch, capsys, *flags, "--resume")


def test_data_of_another_tokenizer_is_refused(world, tokenizer, tmp_path, monkeypatch, capsys):
    model, _ = load(world / "pruned.pt")
    save(model, tmp_path / "with.pt", tokenizer)
    line = refused_here(world, tmp_path / "run", monkeypatch, capsys, "--ckpt", tmp_path / "with.pt")
    assert "was prepared with another tokenizer" in line


def test_config_of_a_run_holds_what_it_takes_to_repeat_it(world, alone):
    about = json.loads((world / "alone" / "config.json").read_text())
    assert about["settings"]["lr"] == 0.004 and about["settings"]["seed"] == 0
    assert about["versions"]["torch"] == torch.__version__ and about["data"] and about["base"]
    assert LlamaConfig(**torch.load(world / "pruned.pt")["config"]) == PRESETS["test"]
