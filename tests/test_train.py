"""What train.py promises: the same run however it is cut, killed, resumed or sharded."""

import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import edit, prune_by_magnitude
from forks import ROOT, Job, free_port

import train
from bench import rates
from data.checkpoint import UserError, open_checkpoint
from model import PRESETS, Llama, LlamaConfig, config_from_dict, load, open_llama, save
from spp import METHODS, adapter_state, inject, write_adapter

TRAIN = ROOT / "train.py"


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
    (folder / "meta.json").write_text(json.dumps({"version": 2, "tokenizer": "none"}))
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
        (model(*examples.batch(batch, "cpu")) / examples.lengths[batch].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save(prune_by_magnitude(model, 1, 4), folder / "pruned.pt")
    return folder


def command(world, out, *flags):
    """train.py with these flags, and with settings of the smallest size where the flags leave them open."""
    settings = {"--ckpt": world / "pruned.pt", "--data": world / "data", "--out_dir": out, "--device": "cpu"}
    settings |= {"--lr": 0.004, "--batch_size": 16, "--epochs": 2, "--max_tokens": 160}
    settings |= {"--rank": 4} if not {"masked", "dynamic"} & set(flags) else {}
    line = [x for flag, value in settings.items() if flag not in flags for x in (flag, value)]
    return [str(x) for x in [TRAIN, *line, *flags]]


def start(world, out, *flags, processes=1):
    return Job(*command(world, out, *flags), processes=processes)


def torchrun(line, *options):
    """The command under torchrun itself, each process a Python of its own."""
    line = [sys.executable, "-m", "torch.distributed.run", *options, *line]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(world, out, *flags, processes=1):
    """The adapter and the log of a run that comes to its end."""
    job = start(world, out, *flags, processes=processes)
    assert set(job.wait(240)) == {0}, job.text
    return adapter_of(out), log_of(out)


def adapter_of(out):
    return torch.load(out / "adapter.pt")["adapter"]


def log_of(out):
    """The log without what depends on the clock."""

    def refuse(word):
        raise AssertionError(f"log.jsonl holds {word}, which is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory")} for line in lines]


def error(job):
    """The line of a command that ended with an error; what it said before is not looked at."""
    assert job.wait() == [2], job.text
    *_, line = lines = job.text.splitlines()
    assert line.startswith("train.py: error: ") and sum(": error: " in x for x in lines) == 1, job.text
    return line


def refusal(world, out, *flags):
    """The one line of a command that is refused before it does anything."""
    job = start(world, out, *flags)
    line = error(job)
    assert job.text.strip() == line
    return line


def wait_for(path: Path, text: str, running) -> None:
    """Returns when the text stands in the file; running() says whether there is somebody who may yet write it."""
    end = time.monotonic() + 100
    while not (path.exists() and text in path.read_text()):
        assert running() and time.monotonic() < end, f"{text} did not come"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def alone(world):
    """The adapter and the log of one process with default settings."""
    return finished(world, world / "alone")


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# micro-batches


def test_a_checkpoint_of_several_dtypes_is_refused_whatever_the_dtype_of_the_run(world, tmp_path):
    model, _ = load(world / "pruned.pt")
    model.model.norm.half()
    save(model, tmp_path / "mixed.pt")
    line = refusal(world, tmp_path / "run", "--ckpt", tmp_path / "mixed.pt", "--dtype", "float32")
    assert "mixed.pt: holds weights of several dtypes (float16, float32)" in line


def test_every_example_is_in_one_micro_batch_and_all_of_them_fit():
    rng = np.random.default_rng(0)
    for world_size in (1, 2, 8):
        lengths = rng.integers(1, 512, 128)
        shares = train.split_batch(np.arange(128), lengths, 2048, world_size)
        assert sorted(i for parts in shares for part in parts for i in part) == list(range(128))
        assert len({len(parts) for parts in shares}) == 1, "FSDP needs the same number of micro-batches everywhere"
        assert all(len(part) * lengths[part].max(initial=0) <= 2048 for parts in shares for part in parts)


def test_processes_finish_together():
    lengths = np.random.default_rng(1).integers(20, 512, 128)
    for rounds in zip(*train.split_batch(np.arange(128), lengths, 4096, 4), strict=True):
        work = [len(part) * lengths[part].max() for part in rounds]
        assert min(work) > 0.5 * max(work)


def test_no_other_number_of_micro_batches_is_less_work():
    # Alpaca's lengths are about log-normal; padding random batches of 8 wastes half
    lengths = np.random.default_rng(0).lognormal(4.6, 0.7, 4096).clip(10, 511).astype(int)
    for world_size in (1, 8):
        plan, all_work = train.Plan(4096, 128, 1, 0), 0
        for step in range(plan.steps):
            sizes = lengths[plan[step]]
            shares = train.split_batch(plan[step], lengths, 4096, world_size)
            work = sum(train.padded_tokens(parts, lengths) + 250 * len(parts) for parts in shares)
            for count in range(world_size, 65, world_size):
                limit = train.lowest_limit(sizes.tolist(), count, 4096)
                cut = train.cut_into_batches(sizes.tolist(), limit)
                if len(cut) > count:  # --max_tokens asks for more
                    continue
                padded = sum(len(part) * sizes[part].max() for part in cut)
                assert work <= padded + 250 * world_size * math.ceil(len(cut) / world_size)
            all_work += work
        assert all_work < 1.31 * lengths.sum()


def test_an_epoch_sees_every_example_once():
    plan = train.Plan(50, 16, 2, seed=3)
    assert plan.steps == 8
    for epoch in (0, 1):
        assert sorted(np.concatenate([plan[4 * epoch + i] for i in range(4)])) == list(range(50))
    assert not np.array_equal(plan[0], plan[4])


def test_targets_are_the_next_tokens_and_prompts_can_be_masked(world):
    examples = train.Examples(world / "data", "train")
    tokens, targets, where = examples.batch([0, 1], "cpu")
    stream, (start, middle, end) = torch.from_numpy(examples.tokens.astype(np.int64)), examples.offsets[:3]
    a, b = stream[start:middle], stream[middle:end]
    assert tokens[0, : len(a) - 1].equal(a[:-1]) and tokens[1, : len(b) - 1].equal(b[:-1])
    assert targets.equal(torch.cat([a[1:], b[1:]])) and tokens.flatten()[where].equal(torch.cat([a[:-1], b[:-1]]))
    assert len(targets) == examples.lengths[:2].sum() == examples.n_targets[:2].sum()
    answers = train.Examples(world / "data", "train", mask_prompt=True)
    tokens, targets, where = answers.batch([0, 1], "cpu")
    assert len(targets) == answers.n_targets[:2].sum() < examples.n_targets[:2].sum()
    n, k = examples.prompt[:2]  # the first target is the first token of the answer
    assert targets.equal(torch.cat([a[n:], b[k:]]))
    assert tokens.flatten()[where].equal(torch.cat([a[n - 1 : -1], b[k - 1 : -1]]))


def test_padding_does_not_change_the_loss(world):
    model, _ = load(world / "pruned.pt")
    examples = train.Examples(world / "data", "train")
    together = model(*examples.batch([0, 1, 2], "cpu"))
    apart = sum(model(*examples.batch([i], "cpu")) for i in (0, 1, 2))
    tokens, targets, _ = examples.batch([0], "cpu")  # alone, it has no padding
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(model(tokens, targets), F.cross_entropy(model(tokens)[0], targets, reduction="sum"))


def test_learning_rate_rises_over_the_warmup_and_falls_to_zero():
    rates = [train.learning_rate(step, 100, 0.1, 1.0) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[99] == pytest.approx(1 / 90)


# ----------------------------------------------------------------------------------------------------------------------
# one result, however it is run


def test_one_step_of_the_loop_equals_a_step_written_by_hand(world, tmp_path):
    """Loss as a mean over all targets, AdamW with the paper's settings: against one batch, one process, no cut."""
    adapter, log = finished(world, tmp_path / "run", "--epochs", 0.34, "--max_tokens", 64)
    examples = train.Examples(world / "data", "train")
    model, _ = load(world / "pruned.pt")
    args = train.make_parser().parse_args("--preset test --rank 4 --matmul repeat --dtype float32".split())
    reference = train.build(args, model.config)
    train.materialise(reference, model.state_dict(), 0, "cpu")
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], 0.004, weight_decay=0.001)
    tokens, targets, where = examples.batch(train.Plan(48, 16, 1, 0)[0].tolist(), "cpu")
    loss = F.cross_entropy(reference(tokens).flatten(0, 1)[where], targets)
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
        pytest.param(1, ("--compile",), marks=pytest.mark.stress),
        (1, ("--activation_checkpointing", "--matmul", "chunked")),
        (2, ()),
        (2, ("--fsdp",)),
        (4, ("--fsdp", "--activation_checkpointing", "--matmul", "repeat")),
    ],
)
def test_the_adapter_does_not_depend_on_how_the_work_is_cut(world, alone, tmp_path, processes, flags):
    adapter, log = finished(world, tmp_path / "run", *flags, processes=processes)
    assert difference(adapter, alone[0]) < 1e-5
    for mine, theirs in zip(log, alone[1], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.stress
def test_masked_training_under_fsdp_sums_its_gradients_over_micro_batches(world, tmp_path):
    """They are exchanged after each, where other methods' are kept until the last."""
    flags = ("--method", "masked", "--lr", 0.003)
    one, log = finished(world, tmp_path / "one", *flags)
    two, other = finished(world, tmp_path / "two", *flags, "--fsdp", processes=2)
    assert difference(one, two) < 1e-4
    for mine, theirs in zip(log, other, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_a_process_of_fsdp_reads_and_holds_only_its_rows(tmp_path):
    """Peak resident memory of each of 4 processes grows by less than 40% of the weights' bytes."""
    model = Llama(LlamaConfig(1000, 1024, 2816, num_hidden_layers=4, num_attention_heads=8))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    save(model, tmp_path / "model.pt")
    del model
    (tmp_path / "shard.py").write_text(
        f"""
import sys, torch.distributed as dist, train
from model import open_llama
from torch.distributed.device_mesh import init_device_mesh
dist.init_process_group("gloo"); mesh = init_device_mesh("cpu", (4,))
args = train.make_parser().parse_args("--preset test --rank 4 --dtype float32".split())
ckpt, config = open_llama({str(tmp_path / "model.pt")!r})
model = train.build(args, config)
before = train.peak_memory("cpu")
train.materialise(model, ckpt, 0, "cpu", mesh)
own = sum(p.to_local().numel() for p in model.parameters())
assert own < 0.3 * sum(p.numel() for p in model.parameters())
sys.stdout.write(f"{{(train.peak_memory('cpu') - before) / {size}}}\\n")  # in one piece: four processes share it
"""
    )
    job = Job(tmp_path / "shard.py", processes=4)
    assert set(job.wait()) == {0}, job.text
    shares = [float(line) for line in job.text.splitlines() if re.fullmatch(r"0\.\d+", line)]
    assert len(shares) == 4 and 0.2 < max(shares) < 0.4, job.text


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "lora", "--rank", 8),
        ("--method", "masked", "--lr", 0.003),
        ("--method", "masked_lora", "--rank", 8),
        ("--method", "dynamic", "--sparsity", "1:4", "--mask_interval", 2, "--lr", 0.003),
        ("--no_beta",),
        ("--zero_init", "alpha"),
        ("--zero_init", "none"),
        ("--no_residual",),
        ("--rank", 16),
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


@pytest.mark.stress
def test_two_nodes_give_the_result_of_one(world, alone, tmp_path):
    """Two torchrun on this machine that meet at a loopback address, one process each."""
    line = command(world, tmp_path / "run")
    meet = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    nodes = [torchrun(line, *meet, f"--node_rank={rank}") for rank in (0, 1)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert difference(adapter_of(tmp_path / "run"), alone[0]) < 1e-5


def test_writing_an_adapter_leaves_the_model_as_it_was(world, tmp_path):
    ckpt, config = open_llama(world / "pruned.pt")
    line = "--ckpt x --method dynamic --sparsity 1:4 --dtype float32"
    model = train.build(train.make_parser().parse_args(line.split()), config)
    train.materialise(model, Llama(config).state_dict(), 0, "cpu")  # dense
    train.update_masks(model, (1, 4))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    write_adapter(tmp_path / "adapter.pt", adapter_state(model), ckpt.fingerprint(), "dynamic", 0, 1.0)
    assert all(w.equal(before[name]) for name, w in model.state_dict().items())
    layer = adapter_of(tmp_path)["layers.0.mlp.up_proj.weight"]
    assert (layer == 0).float().mean() == 0.75


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


# ----------------------------------------------------------------------------------------------------------------------
# killed and resumed


LONG = ("--epochs", 10, "--lr", 0.02, "--save_interval", 3, "--eval_interval", 4)


@pytest.fixture(scope="module")
def long(world):
    """The adapter and the log of 30 steps; states of the steps 27 and 30 are left."""
    return finished(world, world / "long", *LONG)


def killed(world, out, step, *flags):
    """Leaves the folder of a run that got SIGKILL just after this step."""
    job = start(world, out, *LONG, *flags)
    wait_for(out / "log.jsonl", f'"step": {step},', job.running)
    job.kill()
    assert job.wait() == [-signal.SIGKILL]


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


@pytest.mark.parametrize("step", (4, 11, 18))
def test_a_killed_run_resumes_bit_for_bit(world, long, tmp_path, step):
    killed(world, tmp_path / "run", step)
    adapter, log = finished(world, tmp_path / "run", *LONG, "--resume")
    assert difference(adapter, long[0]) == 0
    assert log == long[1]


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_is_killed_twenty_times_resumes_bit_for_bit(world, long, tmp_path, seed):
    """At any moment: while it reads, steps, validates, writes a state or merges, and after its end."""
    rng = np.random.default_rng(seed)
    flags = (*LONG, "--save_interval", 1, "--resume")
    for _ in range(20):
        job = start(world, tmp_path / "run", *flags)
        deadline = time.monotonic() + rng.uniform(0, 0.8)
        while job.running() and time.monotonic() < deadline:
            time.sleep(0.005)
        job.kill()
        assert job.wait()[0] in (0, -signal.SIGKILL), job.text
    adapter, log = finished(world, tmp_path / "run", *flags)
    assert difference(adapter, long[0]) == 0
    assert log == long[1]
    assert [step for step, _ in train.saved_states(tmp_path / "run")] == [30, 29]


@pytest.mark.parametrize("before", ("no folder", "an empty folder", "a run killed before its first state"))
def test_resuming_where_nothing_was_saved_starts_from_the_beginning(world, long, tmp_path, before):
    out = tmp_path / "run"
    if before == "an empty folder":
        out.mkdir()
    if before == "a run killed before its first state":
        killed(world, out, 5, "--save_interval", 1000)
        assert (out / "adapter.pt").exists() and not list(out.glob("step-*"))
    adapter, log = finished(world, out, *LONG, "--resume")
    assert difference(adapter, long[0]) == 0
    assert log == long[1]


def test_a_command_that_torchrun_starts_again_goes_on_without_resume(world, long, tmp_path):
    killed(world, tmp_path / "run", 11)
    job = Job(*command(world, tmp_path / "run", *LONG), env={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert job.wait() == [0] and "resuming after step" in job.text, job.text
    assert difference(adapter_of(tmp_path / "run"), long[0]) == 0 and log_of(tmp_path / "run") == long[1]


def test_a_command_that_torchrun_starts_again_resumes_no_run_that_it_did_not_begin(world, long, tmp_path):
    shutil.copytree(world / "long", tmp_path / "run")
    (tmp_path / "run" / "merged.pt").unlink()
    edit(tmp_path / "run" / "config.json", parent=1)  # the process that began it
    job = Job(*command(world, tmp_path / "run", *LONG), env={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert "holds config.json; --resume continues a run" in error(job)
    assert not (tmp_path / "run" / "merged.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # SIGHUP: the terminal was closed
def test_a_signal_saves_and_says_how_to_go_on(world, long, tmp_path, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup, which a training would run on under too")
    job = start(world, tmp_path / "run", *LONG, "--save_interval", 1000)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 5,', job.running)
    os.kill(job.processes[0].pid, number)
    assert job.wait() == [128 + number] and "the same command with --resume goes on from there" in job.text
    [(step, _)] = train.saved_states(tmp_path / "run")
    assert step == log_of(tmp_path / "run")[-1]["step"] < 30
    adapter, log = finished(world, tmp_path / "run", *LONG, "--resume")
    assert difference(adapter, long[0]) == 0 and log == long[1]


def test_sigterm_to_torchrun_saves_the_step_at_which_it_stopped(world, tmp_path):
    """torchrun passes the signal on; no process may leave, and take the others with it, before the state is on disk."""
    uninterrupted = finished(world, tmp_path / "uninterrupted", *LONG, processes=2)
    out = tmp_path / "run"
    line = command(world, out, *LONG, "--save_interval", 1000)
    process = torchrun(line, "--standalone", "--nproc_per_node=2")
    wait_for(out / "log.jsonl", '"step": 5,', lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and said.count("the same command with --resume goes on from there") == 1
    [(step, _)] = train.saved_states(out)
    assert step == log_of(out)[-1]["step"] < 30
    adapter, log = finished(world, out, *LONG, "--resume", processes=2)
    assert difference(adapter, uninterrupted[0]) == 0 and log == uninterrupted[1]


def test_a_second_signal_leaves_at_once_unless_it_is_the_first_one_again(tmp_path):
    (tmp_path / "signals.py").write_text(
        """
import signal, time, train
caught = train.catch_signals()
signal.raise_signal(signal.SIGINT)
signal.raise_signal(signal.SIGTERM)  # within a second
print(caught[0], flush=True)
time.sleep(1.1)
signal.raise_signal(signal.SIGTERM)
print("here still")
"""
    )
    job = Job(tmp_path / "signals.py")
    assert job.wait() == [-signal.SIGTERM]
    assert job.text == "\nstopping when this step, or the merge, is done; once more after a second ends it at once\n2\n"


def test_out_of_memory_says_which_flags_help(tmp_path):
    """6 GiB of address space are too few for an MLP of width 65,536 at 40,000 tokens."""
    config = LlamaConfig(256, 64, 65536, num_hidden_layers=1, num_attention_heads=2)
    save(Llama(config), tmp_path / "pruned.pt")
    write_long_data(tmp_path / "data", 20, 2001)
    job = start(tmp_path, tmp_path / "run", "--batch_size", 20, "--max_tokens", 40000)
    resource.prlimit(job.processes[0].pid, resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
    assert "out of memory" in error(job) and "--max_tokens" in error(job)


def test_a_run_resumes_on_another_number_of_processes(world, long, tmp_path):
    killed(world, tmp_path / "run", 18)
    adapter, log = finished(world, tmp_path / "run", *LONG, "--resume", "--fsdp", processes=2)
    assert difference(adapter, long[0]) < 1e-4
    assert [line["step"] for line in log] == [line["step"] for line in long[1]]


@pytest.mark.stress
def test_a_merge_longer_than_the_processes_wait_for_each_other_is_waited_for_by_nobody(world, tmp_path):
    """NCCL gives up after ten minutes and torchrun then ends all; merging a 70B takes twenty."""
    (tmp_path / "slow.py").write_text(
        f"""
import datetime, sys, time, torch.distributed as dist, train
join, write_result = dist.init_process_group, train.write_result
dist.init_process_group = lambda backend, timeout: join(backend, timeout=datetime.timedelta(seconds=6))
def slow(*args):
    time.sleep(9)
    write_result(*args)
train.write_result = slow
sys.argv = {command(world, tmp_path / "run", "--epochs", 0.4)}
train.main()
"""
    )
    job = Job(tmp_path / "slow.py", processes=2)
    assert set(job.wait()) == {0}, job.text
    assert (tmp_path / "run" / "merged.pt").exists()


@pytest.mark.stress
def test_when_one_process_is_killed_the_others_leave(world, tmp_path):
    line = command(world, tmp_path / "run", "--epochs", 1000)
    process = torchrun(line, "--standalone", "--nproc_per_node=2")
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 3,', lambda: process.poll() is None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_run_resumes_in_a_folder_that_was_moved(world, long, tmp_path):
    shutil.copytree(world / "long", tmp_path / "moved")
    job = start(world, tmp_path / "moved", *LONG, "--resume")
    assert job.wait() == [0] and "resuming after step 30 of 30" in job.text
    assert difference(adapter_of(tmp_path / "moved"), long[0]) == 0 and log_of(tmp_path / "moved") == long[1]


# ----------------------------------------------------------------------------------------------------------------------
# states, whole and not


ALPHA = "model.layers.1.mlp.down_proj.alpha"


def test_a_truncated_state_is_passed_over_with_a_warning(world, long, tmp_path):
    shutil.copytree(world / "long", tmp_path / "run")
    newest = tmp_path / "run" / "step-000030.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    job = start(world, tmp_path / "run", *LONG, "--resume")
    assert job.wait() == [0] and f"{newest.name}: is truncated" in job.text and "resuming after step 27" in job.text
    assert difference(adapter_of(tmp_path / "run"), long[0]) == 0 and log_of(tmp_path / "run") == long[1]


def test_a_state_with_a_flipped_bit_is_passed_over_with_a_warning(world, long, tmp_path):
    shutil.copytree(world / "long", tmp_path / "run")
    newest = tmp_path / "run" / "step-000030.pt"
    data = bytearray(newest.read_bytes())
    data[data.index(torch.load(newest)["model"][ALPHA].numpy().tobytes())] ^= 1
    newest.write_bytes(data)
    job = start(world, tmp_path / "run", *LONG, "--resume")
    assert job.wait() == [0] and f"{newest.name}: is truncated, damaged or" in job.text
    assert difference(adapter_of(tmp_path / "run"), long[0]) == 0 and log_of(tmp_path / "run") == long[1]


def test_damaged_states_do_not_push_out_those_that_are_written_after_them(world, long, tmp_path):
    shutil.copytree(world / "long", tmp_path / "run")
    for _, state in train.saved_states(tmp_path / "run"):
        state.write_bytes(state.read_bytes()[:1000])
    (tmp_path / "run" / "log.jsonl").unlink()
    job = start(world, tmp_path / "run", *LONG, "--save_interval", 2, "--resume")
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 6,', job.running)
    job.kill()
    job.wait()
    assert "going back to the state before it" in job.text and "no state is left: beginning anew" in job.text
    assert [step for step, _ in train.saved_states(tmp_path / "run")][0] in (4, 6)
    assert len(list((tmp_path / "run").glob("*.damaged"))) == 2


@pytest.mark.parametrize("step", (3, 6))
def test_a_run_that_goes_on_otherwise_has_no_adapter_of_the_steps_that_it_discards(world, tmp_path, step):
    """Killed after a validation that no state knows of, then another rate: the best adapter is one of this run's."""
    out, flags = tmp_path / "run", ("--eval_interval", 1)
    killed(world, out, 8, *flags, "--save_interval", step)
    for n, path in train.saved_states(out):
        if n != step:
            path.unlink()
    job = start(world, out, *LONG, *flags, "--save_interval", step, "--lr", 1e-9, "--resume")
    assert job.wait() == [0] and f"resuming after step {step}" in job.text
    best = min(line["val_loss"] for line in log_of(out)[1:] if line.get("val_loss"))
    assert held_out_loss(out / "merged.pt", world / "data") == pytest.approx(best, abs=1e-4)


def test_a_damaged_adapter_is_made_anew_from_the_state(world, long, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(world / "long", out)
    whole = (out / "adapter.pt").read_bytes()
    (out / "adapter.pt").write_bytes(b"PK")
    job = start(world, out, *LONG, "--resume")
    assert job.wait() == [0] and "resuming after step 30" in job.text, job.text
    assert (out / "adapter.pt").read_bytes() == whole and log_of(out) == long[1]


def test_other_files_beside_the_data_do_not_make_it_another(world, long, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    np.save(tmp_path / "data" / "calib.npy", np.zeros(3))
    shutil.copytree(world / "long", tmp_path / "run")
    assert start(world, tmp_path / "run", *LONG, "--resume", "--data", tmp_path / "data").wait() == [0]


def test_a_dense_model_and_one_without_a_tokenizer_are_said_to_be_that(world, tmp_path):
    save(Llama(PRESETS["test"]), tmp_path / "dense.pt")
    job = start(world, tmp_path / "run", "--ckpt", tmp_path / "dense.pt", "--epochs", 0.3)
    assert job.wait() == [0] and f"note: {tmp_path / 'dense.pt'} has no zeros there; if it is dense" in job.text
    assert f"note: {tmp_path / 'dense.pt'} has no tokenizer" in job.text


def test_a_checkpoint_that_is_replaced_while_a_run_is_at_work_is_refused(world, tmp_path):
    shutil.copy(world / "pruned.pt", tmp_path / "pruned.pt")
    job = start(world, tmp_path / "run", *LONG, "--ckpt", tmp_path / "pruned.pt", "--epochs", 100)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 2,', job.running)
    shutil.copy(world / "pruned.pt", tmp_path / "other.pt")
    os.replace(tmp_path / "other.pt", tmp_path / "pruned.pt")
    assert "pruned.pt: was replaced or written to while it was in use" in error(job)


def test_a_job_system_without_torchrun_is_named(world, tmp_path):
    env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    line = [sys.executable, *command(world, tmp_path / "run")]
    env = {key: value for key, value in os.environ.items() if key != "MASTER_ADDR"} | env
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "WORLD_SIZE is 2, but torchrun did not start this process" in done.stderr


def test_the_step_of_a_state_is_a_number_and_other_names_are_no_states(tmp_path):
    for name in ("step-999999", "step-1000000", "step-000012", "step-final", "step-", "step-7.old", "my-step-9"):
        (tmp_path / f"{name}.pt").write_bytes(b"nonsense")
    assert [step for step, _ in train.saved_states(tmp_path)] == [1000000, 999999, 12]
    train.write_state(tmp_path, {"step": 1000001})
    assert [step for step, _ in train.saved_states(tmp_path)] == [1000001, 1000000]
    assert (tmp_path / "step-final.pt").exists() and (tmp_path / "my-step-9.pt").exists()


def test_resuming_looks_at_no_name_that_is_no_step_number(world, long, tmp_path):
    shutil.copytree(world / "long", tmp_path / "run")
    (tmp_path / "run" / "step-final.pt").write_bytes(b"nonsense")
    job = start(world, tmp_path / "run", *LONG, "--resume")
    assert job.wait() == [0] and "step-final" not in job.text and "resuming after step 30" in job.text


def test_a_state_of_another_run_is_refused(world, long, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(world / "long" / "step-000030.pt", tmp_path / "run")
    line = refusal(world, tmp_path / "run", *LONG, "--resume", "--seed", 1)
    assert "step-000030.pt is not a state of this run; remove it" in line


def without(*keys):
    """An edit of a state: leaves out what these keys lead to, one inside of the other."""

    def edit(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return edit


def shortened(state):
    state["optimizer"]["state"][ALPHA]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    "edit",
    [
        without("model", ALPHA),
        without("optimizer", "state", ALPHA),
        without("optimizer", "state", ALPHA, "exp_avg"),
        without("optimizer", "state", ALPHA, "exp_avg_sq"),
        without("optimizer", "state", ALPHA, "step"),
        without("optimizer"),
        without("model"),
        without("first"),
        without("best"),
        without("run"),
        without("step"),
        shortened,
        lambda state: state["model"].update({ALPHA: torch.zeros(3)}),
        lambda state: state["model"].update({ALPHA: None}),
        lambda state: state["model"].update(other=torch.zeros(3)),
        without("version"),
        lambda state: state.update(version=1),
        lambda state: state.update(step=31),
    ],
)
def test_a_state_that_is_not_whole_is_refused(world, long, tmp_path, edit):
    """Every checksum is right, but a tensor or one of AdamW's moments is not there, or of another shape."""
    shutil.copytree(world / "long", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "step-000030.pt")
    edit(state)
    torch.save(state, tmp_path / "run" / "step-000030.pt")
    assert "step-000030.pt" in refusal(world, tmp_path / "run", *LONG, "--resume")


@pytest.mark.parametrize("groups", [None, [], [{"params": [ALPHA], "lr": "much", "betas": 7}]], ids=str)
def test_what_a_state_says_of_rates_and_decay_is_not_looked_at(world, long, tmp_path, groups):
    shutil.copytree(world / "long", tmp_path / "run")
    (tmp_path / "run" / "step-000030.pt").unlink()
    state = torch.load(tmp_path / "run" / "step-000027.pt")
    state["optimizer"]["param_groups"] = groups
    torch.save(state, tmp_path / "run" / "step-000027.pt")
    adapter, log = finished(world, tmp_path / "run", *LONG, "--resume")
    assert difference(adapter, long[0]) == 0 and log == long[1]


# ----------------------------------------------------------------------------------------------------------------------
# bad input: one line, exit status 2, nothing written


@pytest.mark.parametrize(
    "flags, words",
    [
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
        (("--method", "masked", "--rank", 8), "--rank: means nothing to --method masked"),
        (("--method", "dynamic"), "needs --sparsity"),
        (("--method", "dynamic", "--sparsity", "4:2"), "--sparsity 4:2: expected"),
        (("--method", "full", "--fsdp"), "--fsdp: does not go with --method full"),
        (("--tokenizer", "x"), "goes with --preset"),
        (("--ckpt", "nowhere.pt"), "nowhere.pt: cannot be read: No such file"),
        (("--data", "nowhere"), "--data nowhere: is no folder; run data/alpaca/prepare.py"),
        (("--rank", 5), "--rank 5: does not divide"),
        (("--rank", 0), "--rank: expected at least 1"),
        (("--max_tokens", 10**20), "--max_tokens: expected at most 4611686018427387904"),
        (("--epochs", "1e308"), "--epochs: expected more than 0 and at most 1000000.0"),
        (("--r", 4), "unrecognized arguments: --r 4"),
        (("--max_tokens", 20), "--max_tokens 20: the longest example"),
        (("--preset", "test"), "--preset: not allowed with argument --ckpt"),
        (("--zero_init", "both"), "--zero_init: invalid choice: 'both'"),
        (("--out_dir", "/proc/run"), "--out_dir /proc/run/merged.pt: cannot be written"),
    ],
)
def test_a_wrong_flag_is_one_line_and_writes_nothing(world, tmp_path, flags, words):
    line = refusal(world, tmp_path / "run", *flags)
    assert re.search(words, line), line
    assert not (tmp_path / "run").exists()


def test_random_weights_are_pretrained_alone_and_only_whole(world):
    assert "--preset: random weights have no mask" in error(Job(TRAIN, "--preset", "test", "--data", world / "data"))
    assert "one of the arguments --ckpt --preset is required" in error(Job(TRAIN, "--data", world / "data"))


def test_the_data_folder_is_no_place_for_a_run(world):
    before = sorted((world / "data").iterdir())
    assert "name a folder of its own" in refusal(world, world / "data")
    assert sorted((world / "data").iterdir()) == before


def test_pretraining_on_two_processes_leaves_a_model_without_a_tokenizer(world, tmp_path):
    line = ["--preset", "test", "--method", "full", "--data", world / "data", "--out_dir", tmp_path / "run"]
    job = Job(TRAIN, *line, *"--epochs 0.3 --batch_size 16 --device cpu".split(), processes=2)
    assert job.wait() == [0, 0], job.text
    model, tokenizer = load(tmp_path / "run" / "merged.pt")
    assert tokenizer is None and model.history[-1]["method"] == "full"
    assert not (tmp_path / "run" / "adapter.pt").exists() and "adapter.pt" not in job.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_asked_for_where_there_is_none_is_refused(world, tmp_path):
    assert "--device cuda" in refusal(world, tmp_path / "run", "--device", "cuda")


def test_more_processes_than_examples_of_a_batch_are_refused(world, tmp_path):
    one_of_two = {"WORLD_SIZE": "2", "RANK": "0"}
    job = Job(*command(world, tmp_path / "run", "--batch_size", 1), env=one_of_two)
    assert job.wait() == [2]
    assert job.text == "train.py (rank 0): error: --batch_size 1: fewer examples than the 2 processes\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, flags", [("log.jsonl", ()), ("merged.pt", ("--resume",)), ("log.jsonl", ("--resume",))])
def test_a_file_that_no_run_has_left_is_not_overwritten(world, tmp_path, name, flags):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    assert f"holds {name}" in refusal(world, tmp_path / "run", *flags)
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_second_run_in_the_same_folder_is_refused(world, alone, tmp_path):
    assert "holds config.json" in refusal(world, world / "alone")
    (tmp_path / "step-000100.pt").touch()  # it would count as newer than this run's own
    assert "holds step-000100.pt" in refusal(world, tmp_path)


def test_a_second_run_at_the_same_time_is_refused(world, tmp_path):
    flags = ("--epochs", 1000, "--save_interval", 1, "--resume")
    job = start(world, tmp_path / "run", *flags)
    wait_for(tmp_path / "run" / "log.jsonl", '"step": 3,', job.running)
    line = refusal(world, tmp_path / "run", *flags)
    assert job.running()
    job.kill()
    assert "another run is at work in it" in line


def test_resuming_another_run_is_refused(world, alone, tmp_path):
    line = refusal(world, world / "alone", "--resume", "--scale", 3)
    assert "was run with --scale 2.0, not 3.0" in line
    write_data(tmp_path / "other", seed=1)
    line = refusal(world, world / "alone", "--resume", "--data", tmp_path / "other")
    assert line.endswith(f"was run with other data than {tmp_path / 'other'} holds now")
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / "config.json").write_text('{"version": 2, "settings": []}')
    line = refusal(world, tmp_path / "edited", "--resume")
    assert "edited/config.json is not as train.py wrote it" in line


@pytest.mark.parametrize("preset", PRESETS)
def test_a_value_that_is_filled_in_is_as_one_that_is_given(preset):
    """Or --resume with it would be another run."""
    filled = train.make_parser().parse_args(["--preset", preset])
    train.fill_in(filled, PRESETS[preset], None)
    flags = [part for key in ("batch_size", "epochs", "max_tokens") for part in (f"--{key}", getattr(filled, key))]
    given = train.make_parser().parse_args(["--preset", preset, *map(str, flags)])
    train.fill_in(given, PRESETS[preset], None)
    assert json.dumps(vars(filled)) == json.dumps(vars(given))


def test_a_run_goes_on_with_a_lower_learning_rate_and_says_so(world, long, tmp_path):
    """What a run that diverged needs; nothing else about the optimizer may change."""
    killed(world, tmp_path / "run", 11)
    job = start(world, tmp_path / "run", *LONG, "--lr", 0.001, "--resume")
    assert job.wait() == [0] and "began with --lr 0.02, and goes on with 0.001" in job.text
    log = [line for line in log_of(tmp_path / "run") if "lr" in line]
    before = [line for line in long[1] if "lr" in line]
    [resumed_after] = map(int, re.findall(r"resuming after step (\d+) of 30", job.text))
    for mine, theirs in zip(log, before, strict=True):
        ratio = 1 if mine["step"] <= resumed_after else 0.05
        assert mine["lr"] == pytest.approx(ratio * theirs["lr"])


def read_data(data, vocab_size=256, positions=2048):
    args = argparse.Namespace(data=data, tokenizer=None, max_tokens=160, batch_size=16, mask_prompt=False)
    return train.read_data(args, LlamaConfig(vocab_size, max_position_embeddings=positions), None, 1)


def test_damaged_data_is_refused(tmp_path):
    data = write_data(tmp_path / "data")
    n_tokens = len(np.load(data / "train.npy"))
    with pytest.raises(UserError, match="token id"):
        read_data(data, vocab_size=60)
    np.save(data / "train.prompt.npy", np.full(48, 42, np.int32))
    with pytest.raises(UserError, match="a prompt longer than its example"):
        train.Examples(data, "train")
    np.save(data / "train.prompt.npy", np.zeros(48))
    with pytest.raises(UserError, match="holds float64 of shape"):
        train.Examples(data, "train")
    np.save(data / "train.prompt.npy", np.zeros(48, np.int32))
    np.save(data / "train.offsets.npy", np.array([0, 5]))
    with pytest.raises(UserError, match="do not fit"):
        train.Examples(data, "train")
    np.save(data / "train.offsets.npy", np.arange(n_tokens + 1))
    np.save(data / "train.prompt.npy", np.zeros(n_tokens, np.int32))
    with pytest.raises(UserError, match="example 0 of train has fewer than 2 tokens"):
        train.Examples(data, "train")
    (data / "val.npy").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="val.npy: is not a .npy file"):
        train.Examples(data, "val")


def test_data_without_an_example_is_refused(tmp_path):
    data = write_data(tmp_path / "data", sizes=(0, 0))
    with pytest.raises(UserError, match="holds no training example"):
        read_data(data)


def test_data_of_another_tokenizer_is_refused(world, tokenizer, tmp_path):
    model, _ = load(world / "pruned.pt")
    save(model, tmp_path / "with.pt", tokenizer)
    assert "was prepared with another tokenizer" in refusal(world, tmp_path / "run", "--ckpt", tmp_path / "with.pt")
    assert not (tmp_path / "run").exists()


def test_masked_prompts_that_leave_nothing_to_learn_are_refused(world, tmp_path):
    data = write_data(tmp_path / "data")
    np.save(data / "train.prompt.npy", np.diff(np.load(data / "train.offsets.npy")))  # every example is all prompt
    line = refusal(world, tmp_path / "run", "--data", data, "--mask_prompt")
    assert "no example has a token to learn: --mask_prompt" in line
    assert not (tmp_path / "run").exists()
    read_data(data)  # as a text it can be learned


def test_config_of_a_run_holds_what_it_takes_to_repeat_it(world, alone):
    about = json.loads((world / "alone" / "config.json").read_text())
    assert about["version"] == 2 and about["settings"]["lr"] == 0.004 and about["settings"]["seed"] == 0
    assert about["versions"]["torch"] == torch.__version__ and about["data"] and about["base"] and about["run"]
    config = torch.load(world / "pruned.pt")["config"]
    assert config_from_dict(config, "pruned.pt") == PRESETS["test"]


# ----------------------------------------------------------------------------------------------------------------------
# numbers that are none


def test_a_loss_that_is_no_number_ends_the_run(world, tmp_path):
    line = error(start(world, tmp_path / "run", "--lr", 1e30, "--grad_clip", 0))
    assert re.search(r"the loss of step \d is (nan|inf)", line) and "--resume with a lower --lr" in line
    assert log_of(tmp_path / "run")  # and none of its lines is NaN


def test_a_validation_that_is_no_number_is_null_in_the_log_and_ends_the_run(world, tmp_path):
    model, _ = load(world / "pruned.pt")
    model.model.embed_tokens.weight.data[200] = math.nan
    save(model, tmp_path / "pruned.pt")
    data = write_data(tmp_path / "data")
    held_out = np.load(data / "val.npy")
    held_out[3] = 200  # which no example of the training data has
    np.save(data / "val.npy", held_out)
    line = error(start(tmp_path, tmp_path / "run"))
    assert "pruned.pt: model.embed_tokens.weight holds NaN or Inf" in line and "loss of step 0 is nan" in line
    assert log_of(tmp_path / "run") == [{"step": 0, "val_loss": None}]
    assert not (tmp_path / "run" / "adapter.pt").exists() and not (tmp_path / "run" / "merged.pt").exists()


def test_a_validation_that_is_no_number_leaves_the_adapter_as_it_was(world, tmp_path):
    script = tmp_path / "validate.py"
    script.write_text(
        """
import sys, train
from model import cli
losses = iter(float(x) for x in sys.argv.pop().split(","))
train.validation_loss = lambda *args: next(losses)
cli(train.main)
"""
    )
    flags = command(world, tmp_path / "good", *LONG)[1:]
    good = Job(script, *flags, "3,2,5,5,5,5,5,5,5")  # of the steps 0, 4, 8, ..., 28, 30; the lowest is step 4's
    assert good.wait() == [0], good.text
    for bad in ("nan", "inf", "-inf"):
        flags = command(world, tmp_path / bad, *LONG)[1:]
        job = Job(script, *flags, f"3,2,{bad}")
        assert job.wait() == [2] and f"error: the validation loss of step 8 is {bad}" in job.text
        assert difference(adapter_of(tmp_path / bad), adapter_of(tmp_path / "good")) == 0
        assert log_of(tmp_path / bad)[-1] == {"step": 8, "val_loss": None}


@pytest.mark.parametrize("step", (0, 1))
def test_a_step_without_a_token_to_learn_changes_nothing(world, tmp_path, step):
    data = write_data(tmp_path / "data")
    prompt, lengths = np.load(data / "train.prompt.npy"), np.diff(np.load(data / "train.offsets.npy"))
    empty = train.Plan(48, 16, 2, 0)[step]  # the examples of that step become all prompt
    prompt[empty] = lengths[empty]
    np.save(data / "train.prompt.npy", prompt)
    flags = ("--data", data, "--mask_prompt", "--eval_interval", 1)
    adapter, log = finished(world, tmp_path / "run", *flags)
    steps = [line for line in log if "loss" in line]
    assert [line["loss"] is None for line in steps] == [line["tokens"] == 0 for line in steps]
    assert [line["step"] for line in steps if line["loss"] is None][0] == step + 1
    val = [line["val_loss"] for line in log if "val_loss" in line]
    assert val[step] == val[step + 1] != val[step + 2]
    # nor does it matter whether a state was written before anything was learned
    often = finished(world, tmp_path / "often", *flags, "--save_interval", 1)
    assert difference(adapter, often[0]) == 0 and log == often[1]


def test_a_checkpoint_that_holds_nan_is_named_where_nothing_is_held_out(world, tmp_path):
    model, _ = load(world / "pruned.pt")
    model.model.layers[1].mlp.up_proj.weight.data[5, 5] = math.inf
    save(model, tmp_path / "pruned.pt")
    line = error(start(tmp_path, tmp_path / "run", "--data", write_data(tmp_path / "data", sizes=(48, 0))))
    assert "pruned.pt: model.layers.1.mlp.up_proj.weight holds NaN or Inf (1 such tensors): the loss of step 1" in line
    assert log_of(tmp_path / "run") == [{"step": 0, "val_loss": None}]
    assert not (tmp_path / "run" / "adapter.pt").exists() and not list((tmp_path / "run").glob("step-*"))


def test_a_run_that_diverged_goes_on_with_a_lower_rate(world, tmp_path):
    flags = ("--epochs", 3, "--save_interval", 1, "--eval_interval", 1, "--grad_clip", 0)
    line = error(start(world, tmp_path / "run", *flags, "--lr", 1e12))
    assert "--resume with a lower --lr goes on from the newest state" in line
    for _, path in train.saved_states(tmp_path / "run"):
        assert all(w.isfinite().all() for w in torch.load(path)["model"].values())
        path.unlink()  # its factors are 1e12
    job = start(world, tmp_path / "run", *flags, "--lr", 0.01, "--resume")
    assert job.wait() == [0] and "began with --lr 1000000000000.0, and goes on with 0.01" in job.text, job.text
    adapter, log = finished(world, tmp_path / "low", *flags, "--lr", 0.01)
    assert difference(adapter_of(tmp_path / "run"), adapter) == 0 and log_of(tmp_path / "run") == log


def test_a_mean_over_no_token_is_shown_as_none_and_not_as_0(world, tmp_path):
    data = write_data(tmp_path / "data")
    for split, examples in (("val", range(8)), ("train", train.Plan(48, 16, 1, 0)[2])):  # the last step's
        prompt = np.load(data / f"{split}.prompt.npy")
        prompt[examples] = np.diff(np.load(data / f"{split}.offsets.npy"))[examples]
        np.save(data / f"{split}.prompt.npy", prompt)
    job = start(world, tmp_path / "run", "--data", data, "--mask_prompt", "--epochs", 1)
    assert job.wait() == [0], job.text
    none = "none (nothing to predict)"
    assert f"step 3: training loss {none}, validation loss {none}" in job.text and "harmed" not in job.text
    assert [line["val_loss"] for line in log_of(tmp_path / "run") if "val_loss" in line] == [None, None]


# ----------------------------------------------------------------------------------------------------------------------
# what is shown is what is written


def held_out_loss(checkpoint, data, dtype=torch.float32) -> float:
    """The mean loss of a checkpoint on the held-out examples, each on its own, by a model that no adapter was in."""
    model, _ = load(checkpoint, dtype)
    val = train.Examples(data, "val")
    with torch.no_grad():
        return sum(model(*val.batch([i], "cpu")).item() for i in range(len(val.lengths))) / val.lengths.sum()


def in_dtype(world, folder, dtype):
    """The pruned model in another dtype, as `pruned.pt` of a folder."""
    model, _ = load(world / "pruned.pt", dtype)
    save(model, folder / "pruned.pt")
    return folder / "pruned.pt"


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--matmul", "repeat"),
        ("--matmul", "chunked", "--no_beta"),
        ("--method", "lora"),
        ("--method", "masked_lora"),
        ("--method", "masked"),
        ("--method", "dynamic", "--sparsity", "2:4", "--mask_interval", 4),
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "spp",
)
@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16, torch.float16))
def test_the_lowest_validation_loss_is_that_of_the_model_that_is_written(world, tmp_path, flags, stored):
    """--dtype float32 leaves no rounding but that of what is written, which is not small in bfloat16."""
    ckpt = in_dtype(world, tmp_path, stored)
    flags = (*flags, "--ckpt", ckpt, "--dtype", "float32", "--lr", 0.02, "--eval_interval", 2)
    _, log = finished(world, tmp_path / "run", *flags)
    shown = [line["val_loss"] for line in log if "val_loss" in line]
    assert min(shown[1:]) == pytest.approx(held_out_loss(tmp_path / "run" / "merged.pt", world / "data"), abs=1e-5)
    if "dynamic" not in flags:  # which prunes further
        assert shown[0] == pytest.approx(held_out_loss(ckpt, world / "data"), abs=1e-5)


@pytest.mark.parametrize("method", ("spp", "lora", "full"))
def test_computing_in_bfloat16_shows_what_the_written_model_has_in_bfloat16(world, tmp_path, method):
    ckpt = in_dtype(world, tmp_path, torch.bfloat16)
    rank = ("--rank", 16) if method == "full" else ()
    flags = ("--method", method, *rank, "--ckpt", ckpt, "--lr", 0.005, "--epochs", 1, "--max_tokens", 40)
    assert start(world, tmp_path / "run", *flags).wait() == [0]
    merged = held_out_loss(tmp_path / "run" / "merged.pt", world / "data", torch.bfloat16)
    assert log_of(tmp_path / "run")[-1]["val_loss"] == pytest.approx(
        merged, abs=2e-3
    )  # other micro-batches, in bfloat16


def test_two_processes_show_the_loss_of_the_lora_that_is_written(world, tmp_path):
    for name, flags in (("ddp", ()), ("fsdp", ("--fsdp",))):
        _, log = finished(world, tmp_path / name, "--method", "lora", "--lr", 0.02, *flags, processes=2)
        merged = held_out_loss(tmp_path / name / "merged.pt", world / "data")
        assert log[-1]["val_loss"] == pytest.approx(merged, abs=1e-5)


@pytest.mark.parametrize("method", ("spp", "full"))
def test_a_run_that_only_harmed_says_so_in_its_last_line(world, tmp_path, method):
    rank = ("--rank", 16) if method == "full" else ()
    flags = ("--method", method, *rank, "--lr", 10, "--warmup", 0, "--epochs", 1, "--save_interval", 1)
    for resume in ((), ("--resume",)):  # the same again, from the state of the last step
        job = start(world, tmp_path / "run", *flags, *resume)
        assert job.wait() == [0], job.text
        losses = [line["val_loss"] for line in log_of(tmp_path / "run") if "val_loss" in line]
        said = f"note: the run only harmed: validation loss {losses[0]:.4f} before, {min(losses[1:]):.4f} in merged.pt"
        assert min(losses[1:]) > losses[0] and job.text.splitlines()[-1].startswith(said), job.text


def test_random_factors_are_held_against_the_pruned_model(world, long, tmp_path):
    """What counts as harm begins with the checkpoint's loss, and not with that of the factors' random start."""
    job = start(world, tmp_path / "run", "--zero_init", "none", "--scale", 20, "--epochs", 0.4, "--lr", 1e-9)
    assert job.wait() == [0], job.text
    log = log_of(tmp_path / "run")
    pruned = long[1][0]["val_loss"]
    assert log[0]["val_loss"] != pytest.approx(pruned, abs=1e-3)
    said = re.search(r"the run only harmed: validation loss ([\d.]+) before", job.text)
    assert said and float(said[1]) == pytest.approx(pruned, abs=1e-4)


def test_a_run_that_helped_does_not_say_that_it_harmed(world, long):
    job = start(world, world / "long", *LONG, "--resume")
    assert job.wait() == [0] and "harmed" not in job.text


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_full_training_keeps_the_dtype_and_changes_nothing_at_a_rate_of_nearly_0(world, tmp_path, dtype):
    ckpt = in_dtype(world, tmp_path, dtype)
    job = start(world, tmp_path / "run", "--method", "full", "--rank", 16, "--ckpt", ckpt, "--lr", 1e-12, "--epochs", 1)
    assert job.wait() == [0], job.text
    before, after = open_checkpoint(ckpt), open_checkpoint(tmp_path / "run" / "merged.pt")
    assert after.history == [*before.history, {"method": "full", "data": str(world / "data"), "steps": 3}]
    for name, w in before.items():
        torch.testing.assert_close(after[name], w, rtol=0, atol=1e-11)  # same dtype; a zero may have moved by the rate


def test_full_training_of_bfloat16_adds_up_steps_too_small_for_it(world, tmp_path):
    """Against float32 weights: at 1e-4 a single step changes a tenth of the bfloat16 weights at most."""
    moved = []
    for name, dtype in (("bfloat16", "auto"), ("float32", "float32")):
        (tmp_path / name).mkdir()
        ckpt = in_dtype(world, tmp_path / name, torch.bfloat16)
        flags = ("--method", "full", "--rank", 16, "--ckpt", ckpt, "--dtype", dtype, "--lr", 1e-4, "--epochs", 10)
        assert start(world, tmp_path / name / "run", *flags).wait() == [0]
        before, after = open_checkpoint(ckpt), open_checkpoint(tmp_path / name / "run" / "merged.pt")
        moved.append(torch.cat([(after[name].float() - w.float()).flatten() for name, w in before.items()]))
    assert (moved[0] != 0).float().mean() > 0.9 * (moved[1] != 0).float().mean()
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.8


def test_full_training_on_two_processes_is_that_of_one(world, tmp_path):
    """The validation's rounded copy leaves the weights that DDP watches as they are."""
    ckpt = in_dtype(world, tmp_path, torch.bfloat16)
    flags = ("--method", "full", "--rank", 16, "--ckpt", ckpt, "--eval_interval", 1, "--dtype", "float32")
    models = []
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        assert set(start(world, out, *flags, processes=processes).wait()) == {0}
        models.append(torch.load(train.saved_states(out)[0][1])["model"])
    assert {w.dtype for w in models[0].values()} == {torch.float32}
    apart = [(models[0][name] - models[1][name]).abs().flatten() for name in models[0]]
    # Adam moves a weight whose gradient is all rounding as far as any other: one in a thousand may be such a weight.
    assert (torch.cat(apart) > 1e-5).float().mean() < 1e-3


def test_full_training_of_a_tied_model_writes_one_matrix(world, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(256, 32, 64, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=True)
    save(Llama(config).half(), tmp_path / "pruned.pt")
    flags = ("--method", "full", "--rank", 16, "--ckpt", tmp_path / "pruned.pt", "--epochs", 1)
    assert start(world, tmp_path / "run", *flags).wait() == [0]
    merged = open_checkpoint(tmp_path / "run" / "merged.pt")
    assert {w.dtype for w in merged.values()} == {torch.float16} and "lm_head.weight" not in merged
    shown = log_of(tmp_path / "run")[-1]["val_loss"]
    assert shown == pytest.approx(held_out_loss(tmp_path / "run" / "merged.pt", world / "data"), abs=0.01)


def test_a_weight_that_float16_cannot_hold_shows_in_the_validation_loss(world, tmp_path):
    ckpt = in_dtype(world, tmp_path, torch.float16)
    args = train.make_parser().parse_args(["--ckpt", str(ckpt), "--method", "full", "--dtype", "float32"])
    ckpt, config = open_llama(ckpt)
    model = train.build(args, config)
    train.materialise(model, ckpt, 0, "cpu")
    model.model.norm.weight.data[3] = 7e4
    assert train.rounded(model, ckpt, args).model.norm.weight.isinf().sum() == 1


@pytest.mark.parametrize("rank", (0, 1))
def test_sequences_beyond_the_models_positions_are_noted_once(tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", str(rank))
    data = write_long_data(tmp_path / "data", 32, 150)
    read_data(data, positions=128)
    said = "its longest example: 149 tokens are more than the model's 128 positions"
    assert capsys.readouterr().err.count(f"note: --data {data}: {said}") == (1 if rank == 0 else 0)
    read_data(write_long_data(tmp_path / "short", 32, 129), positions=128)  # 128 computed: as many as positions
    assert "positions" not in capsys.readouterr().err


def test_groups_of_n_m_that_run_over_the_ends_of_rows_are_refused(world, tmp_path):
    config = LlamaConfig(256, 32, 44, num_hidden_layers=1, num_attention_heads=4)
    save(Llama(config), tmp_path / "dense.pt")
    flags = ("--ckpt", tmp_path / "dense.pt", "--method", "dynamic", "--sparsity", "2:8")
    line = refusal(world, tmp_path / "run", *flags)
    assert "--sparsity 2:8: layers.0.mlp.down_proj has 44 columns, no multiple of 8" in line
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# the learning rate where none is given


@pytest.mark.parametrize(
    "preset, lr",
    [
        ("llama-7b", 4e-3),
        ("llama-13b", 2e-3),
        ("llama-30b", 4e-3),
        ("llama-65b", 5e-4),
        ("llama-2-7b", 4e-3),
        ("llama-2-13b", 2e-3),
        ("llama-2-70b", 5e-4),
    ],
)
@pytest.mark.parametrize("records", (50_002, 49_942))  # with and without those that have no answer
def test_the_papers_sizes_and_steps_get_the_papers_rates(preset, lr, records):
    args = train.make_parser().parse_args(["--preset", preset])
    train.fill_in(args, PRESETS[preset], None)
    steps = train.Plan(records, args.batch_size, args.epochs, 0).steps
    size = min(train.PAPER, key=lambda size: abs(size - float(re.search(r"(\d+)b", preset)[1])))
    assert train.default_lr("spp", PRESETS[preset], steps) == (lr, f"the paper's {lr} for {size}B")


@pytest.mark.parametrize("method", (*METHODS, "full"))
def test_the_default_rate_is_within_a_factor_of_two_of_the_measured_best(method):
    lines = [json.loads(line) for line in (ROOT / "assets" / "rates.jsonl").read_text().splitlines()]
    cells = {rates.cell_of(line) for line in lines if line["method"] == method}
    assert len({width for width, _, _ in cells}) > 1 and len({steps for _, _, steps in cells}) > 1
    for cell in cells:
        width, _, steps = cell
        lr, _ = train.default_lr(method, rates.config_of(width), steps)
        ratio = lr / rates.best_of(lines, cell)["lr"]
        expected = {(48, "lora", 1000): 5, (48, "full", 1000): 1 / 20}.get(cell)  # as the README says
        assert ratio == pytest.approx(expected) if expected else 0.5 <= ratio <= 2, (cell, lr)


@pytest.mark.parametrize("method", (*METHODS, "full"))
def test_the_rates_in_the_readme_are_those_measured_and_the_defaults(method):
    lines = [json.loads(line) for line in (ROOT / "assets" / "rates.jsonl").read_text().splitlines()]
    shown = []
    for width, steps in ((48, 20), (48, 100), (48, 1000), (96, 20), (96, 100), (192, 20), (192, 100)):
        lr, _ = train.default_lr(method, rates.config_of(width), steps)
        shown.append(f"{rates.best_of(lines, (width, method, steps))['lr']:g} ({lr:g})")
    base, power = train.LR[method]
    base = "the paper's: 4e-3 at 7B" if base is None else f"{base:.0e}".replace("e-0", "e-")
    row = f"| `{method}` | {base} | {power} | {' | '.join(shown)} |"
    assert row in (ROOT / "README.md").read_text().splitlines()


@pytest.mark.parametrize("method, usual", [("lora", 2e-4), ("masked_lora", 2e-4), ("masked", 2e-5), ("full", 2e-5)])
def test_the_baselines_get_their_usual_rates_at_7b(method, usual):
    assert train.default_lr(method, PRESETS["llama-7b"], 1173) == (usual, f"the usual {usual} for {method}")


@pytest.mark.parametrize("method", (*METHODS, "full", "pretraining"))
def test_the_default_rate_rises_for_narrow_models_and_short_runs_alone(method):
    sizes = [(4096, 9999), (4096, 1173), (4096, 100), (1024, 100), (96, 100), (96, 10)]
    found = [train.default_lr(method, replace(PRESETS["llama-7b"], hidden_size=w), steps)[0] for w, steps in sizes]
    assert found[0] == found[1] and found[1:] == sorted(set(found))


def test_a_run_says_which_rate_it_chose_and_from_where_unless_it_was_given(world, tmp_path):
    line = command(world, tmp_path / "run")
    job = Job(*line[: line.index("--lr")], *line[line.index("--lr") + 2 :])
    assert job.wait() == [0], job.text
    lr, source = train.default_lr("spp", PRESETS["test"], 6)
    assert f"--lr {lr:g}: to one digit {source}\n" in job.text and "for a width of 32, x 3.7 for 6 steps" in source
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["lr"] == lr
    assert max(line["lr"] for line in log_of(tmp_path / "run") if "lr" in line) == lr
    job = start(world, tmp_path / "given", "--epochs", 1)
    assert job.wait() == [0] and "--lr" not in job.text


@pytest.mark.parametrize(
    "batch_size, epochs, notes",  # of 48 examples, 3 or 48 steps an epoch
    [
        (16, 33, ["note: 99 steps of 16 examples: below about 100, a smaller --batch_size and so more steps"]),
        (16, 34, []),
        (1, 2, []),  # there is no smaller batch
    ],
)
def test_a_run_of_few_steps_says_that_smaller_batches_make_more_of_the_data(world, tmp_path, batch_size, epochs, notes):
    flags = ("--batch_size", batch_size, "--epochs", epochs, "--eval_interval", 1000)
    job = start(world, tmp_path / "run", *flags)
    assert job.wait() == [0], job.text
    assert re.findall("note: .* and so more steps", job.text) == notes
