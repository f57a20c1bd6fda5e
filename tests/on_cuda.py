"""The CUDA paths under a pretended GPU: its tensors say cuda:0, hold a CPU's values, and refuse to meet a CPU's tensors.

What it cannot show: which kernels a real build takes, what they round, NCCL, cuSPARSELt, speed. test_cuda.py runs it.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import signal
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, prune_by_magnitude
from test_evaluate import made_up, write
from test_train import write_data
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import evaluate
import model
import prune
import spp
import train
from bench import memory
from bench.memory import LiveBytes
from data.checkpoint import open_checkpoint
from model import PRESETS, Block, Llama, LlamaConfig, load, rope_tables, save

REAL = torch.version.cuda is not None  # runs/gpu.sh: the commands' results are then a real GPU's

# ----------------------------------------------------------------------------------------------------------------------
# the pretended GPU


SDPA = torch.nn.functional.scaled_dot_product_attention


class OnGpu(torch.Tensor):
    """A tensor on cuda:0, whose values are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, real: Tensor):
        layout = {"strides": real.stride(), "storage_offset": real.storage_offset(), "dtype": real.dtype}
        x = torch.Tensor._make_wrapper_subclass(cls, real.shape, device="cuda:0", **layout)
        x.held = real
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise AssertionError(f"{op} of a tensor of the GPU, which is gone")


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Gpu(TorchDispatchMode):
    """While it is entered, "cuda" is there. It counts, by the line of ours that asked: `waits` of the CPU for it,
    `copied` bytes to it, its `kernels`, and the attentions whose `scores` of all heads would stand in memory."""

    def __init__(self):
        super().__init__()
        self.waits, self.copied, self.kernels, self.scores = (collections.Counter() for _ in range(4))
        self.pinned = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, tensors = op.overloadpacket.__name__, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on, off = ([x for x in tensors if isinstance(x, OnGpu) == side] for side in (True, False))
        to_gpu = is_cuda(kwargs.get("device")) or (name == "copy_" and isinstance(args[0], OnGpu))
        to_cpu = on and kwargs.get("device") is not None and not to_gpu or (name == "copy_" and not to_gpu)
        if name == "is_pinned":
            return False
        if name == "_pin_memory":
            self.pinned.append(args[0])
            return args[0]
        if on and name not in ("copy_", "_to_copy"):
            assert all(x.dim() == 0 for x in off), f"{name}: tensors of the GPU and of the CPU, at {line()}"
        if (on and to_cpu) or (off and to_gpu and name in ("copy_", "_to_copy")):
            if to_gpu:
                self.copied[line()] += off[0].nbytes
            # what is not pinned is copied before the CPU goes on, whatever was asked for
            if to_cpu or not kwargs.get("non_blocking") or all(off[0] is not x for x in self.pinned):
                self.waits[line()] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1] if on
        )
        if on and (name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2") or by_mask):
            self.waits[line()] += 1
        if on and not op.is_view and name not in ("detach", "empty_like", "new_empty"):
            self.kernels[name] += 1

        real_args, real_kwargs = tree_map(on_cpu, args), tree_map(on_cpu, kwargs)
        real_kwargs.pop("pin_memory", None)
        if op is torch.ops.aten.mm.dtype:  # a CPU has it not
            real_args, op = [x.float() for x in real_args[:2]], torch.ops.aten.mm.default
        out = op(*real_args, **real_kwargs)
        if to_cpu or not (on or to_gpu):
            return out
        known = {id(x.held): x for x in on}
        return tree_map(lambda x: known.get(id(x), OnGpu(x)) if isinstance(x, Tensor) else x, out)

    def attention(self, q, k, v, attn_mask=None, **options):
        """By torch's rules flash takes 16 bits and no mask, the memory-efficient kernel no grouped keys."""
        in_rows = all(x.stride(-1) == 1 for x in (q, k, v))
        flash = in_rows and attn_mask is None and q.dtype != torch.float32
        efficient = in_rows and q.shape[1] == k.shape[1]
        if q.is_cuda and not flash and not efficient:
            self.scores[line()] += 1
        return SDPA(q, k, v, attn_mask=attn_mask, **options)


def on_cpu(x):
    """What stands on the CPU for an argument of an operation."""
    if isinstance(x, OnGpu):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def line() -> str:
    """The innermost line of this repository's that is at work, apart from this file's."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename and frame.filename != __file__:
            return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return "?"


class AtOnce(concurrent.futures.ThreadPoolExecutor):
    """Runs what it is given before it returns."""

    def submit(self, function, *args) -> concurrent.futures.Future:
        done = concurrent.futures.Future()
        done.set_result(function(*args))
        return done


@contextlib.contextmanager
def cuda_is_there(memory: int):
    """torch.cuda as it is beside a GPU of so many bytes."""
    state = SimpleNamespace(total_memory=memory, major=9, minor=0)
    there = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "_lazy_init": None}
    there |= {"get_device_properties": state, "get_device_name": "pretended", "get_device_capability": (9, 0)}
    there |= {"set_device": None, "max_memory_allocated": 0, "synchronize": None, "set_rng_state": None}
    there["mem_get_info"] = (memory, memory)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in there.items():
            patch.setattr(torch.cuda, name, lambda *args, value=value: value)
        patch.setattr(torch.cuda, "get_rng_state", lambda *args: torch.get_rng_state())
        # the pretended GPU has one stream, and is there for one thread
        for name in ("Stream", "current_stream"):
            patch.setattr(torch.cuda, name, lambda: SimpleNamespace(synchronize=lambda: None))
        patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        patch.setattr(model, "ThreadPoolExecutor", AtOnce)
        yield


@contextlib.contextmanager
def gpu():
    """The pretended GPU. Yields what counts."""
    with cuda_is_there(80 * 2**30), Gpu() as counted:
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") passes by
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to(): a new kind of tensor
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted.attention)
            yield counted
        torch._C._set_only_lift_cpu_tensors(False)


def run(main, *flags) -> Gpu:
    """A command's main with these flags, on the pretended GPU where they ask for it. Returns what was counted."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(sys, "argv", ["main", *map(str, flags)])
        counted = stack.enter_context(gpu()) if "cuda" in flags and not REAL else Gpu()
        main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not counted.scores, f"all scores in memory: {counted.scores}"
    return counted


# ----------------------------------------------------------------------------------------------------------------------
# every command gives what it gives on the CPU


@pytest.fixture(scope="module")
def pruned(random_checkpoint, tokenizer, tmp_path_factory) -> Path:
    """A 2:4 model, and beside it data for train.py."""
    folder = tmp_path_factory.mktemp("world")
    model, _ = load(random_checkpoint)
    save(prune_by_magnitude(model, 2, 4), folder / "pruned.pt")
    write_data(folder / "data", (24, 4))
    return folder / "pruned.pt"


def cases(*lines: str):
    """Flags to run with; all but the first line's take too long for every day."""
    return [pytest.param(x.split(), id=x, marks=[pytest.mark.stress] * (i > 0)) for i, x in enumerate(lines)]


PRUNING = ["wanda --sparsity 2:4", "wanda --sparsity 0.5 --dsnot", "magnitude --sparsity 0.5"]
PRUNING += ["sparsegpt --sparsity 2:4", "sparsegpt --dtype bfloat16", "sparsegpt --sparsity 2:4 --dsnot"]


@pytest.mark.parametrize("flags", cases(*PRUNING))
def test_prune_gives_the_masks_of_the_cpu(random_checkpoint, tmp_path, flags):
    np.save(tmp_path / "calib.npy", np.random.default_rng(0).integers(0, 200, (6, 48), dtype=np.int32))
    method = flags[0]
    flags = ["--ckpt", random_checkpoint, "--method", *flags]
    for device in ("cpu", "cuda"):
        run(prune.main, "--calib", tmp_path / "calib.npy", "--out", tmp_path / device, "--device", device, *flags)
    cpu, cuda = (open_checkpoint(tmp_path / device) for device in ("cpu", "cuda"))
    for name, w in cpu.items():
        kept_alike = ((w == 0) == (cuda[name] == 0)).float().mean()
        if "bfloat16" in flags or REAL:  # what rounds otherwise may choose otherwise, where scores are close
            assert kept_alike > 0.99, name
            continue
        assert kept_alike == 1, name
        if method == "sparsegpt":
            torch.testing.assert_close(w, cuda[name], rtol=0, atol=1e-4)
        else:  # the weights that stay are the model's
            assert w.equal(cuda[name]), name


TRAINING = ["--method spp", "--matmul chunked", "--matmul repeat", "--activation_checkpointing", "--dtype bfloat16"]
TRAINING += ["--packed", "--method lora", "--method masked_lora", "--method masked", "--method dynamic --sparsity 2:4"]
TRAINING += ["--method full"]


def training(pruned: Path, *flags) -> list:
    flags = [*flags] + (["--rank", 4] if not {"masked", "dynamic", "full"} & set(flags) else [])
    flags += ["--ckpt", pruned, "--data", pruned.parent / "data", "--lr", 0.004, "--batch_size", 8, "--epochs", 1]
    return flags + ([] if "--max_tokens" in flags else ["--max_tokens", 80])


@pytest.mark.parametrize("flags", cases(*TRAINING))
def test_train_gives_the_log_and_the_result_of_the_cpu(pruned, tmp_path, flags):
    exact = "bfloat16" not in flags
    for device in ("cpu", "cuda"):
        line = ["--device", device, "--out_dir", tmp_path / device, *training(pruned, *flags), "--save_interval", 1]
        run(train.main, *line)
        (tmp_path / device / "step-000003.pt").unlink()  # as if it had been killed before
        run(train.main, *line, "--resume")
    logs = []
    for device in ("cpu", "cuda"):
        log = [json.loads(text) for text in (tmp_path / device / "log.jsonl").read_text().splitlines()]
        logs.append([x for line in log for key, x in line.items() if key in ("step", "loss", "val_loss", "grad_norm")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4 if exact else 2e-2)
    cpu, cuda = (open_checkpoint(tmp_path / device / "merged.pt") for device in ("cpu", "cuda"))
    for name, w in cpu.items():
        torch.testing.assert_close(w, cuda[name], rtol=0, atol=1e-4 if exact else 2e-2)


def test_evaluate_gives_the_scores_of_the_cpu(random_checkpoint, tmp_path):
    tasks = write(tmp_path / "samples_made_up.jsonl", made_up())
    (tmp_path / "text.txt").write_text("Question: 0123456789 ? \n" * 60)
    results = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.json"
        flags = ["--ckpt", random_checkpoint, "--tasks", tasks, "--ppl", tmp_path / "text.txt", "--out", out]
        run(evaluate.main, *flags, "--device", device, "--log_samples", tmp_path / device)
        record = json.loads(out.read_text())
        samples = (tmp_path / device / "samples_made_up.jsonl").read_text().splitlines()
        scores = [float(x[0]) for text in samples for x in json.loads(text)["filtered_resps"]]
        results.append([record["results"]["made_up"]["acc"], record["perplexity"]["text"]["ppl"], *scores])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# budgets: what is waited for, moved and started


def test_a_gpu_computes_in_float32_without_cudnns_attention():
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(True)
    with gpu() as counted:
        model.check_device("cuda")
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.cudnn_sdp_enabled()
        assert prune.check_calib(torch.zeros(2, 3, dtype=torch.int64, device="cuda"), 9).device.type == "cpu"
        C = 8
        s = prune.Statistics(
            *(torch.zeros(n, C, device="cuda") for n in (1, 0)), hessian=torch.zeros(C, C, device="cuda")
        )
        s.add(
            torch.ones(1, 2, C, dtype=torch.bfloat16, device="cuda"),
            1,
            torch.zeros(1, dtype=torch.int64, device="cuda"),
        )
        assert counted.kernels["mm"] == 4 and not counted.kernels["addmm_"]  # by the tensor cores


def test_an_unfinished_pruning_knows_its_gpu(random_checkpoint, tmp_path, monkeypatch):
    np.save(tmp_path / "calib.npy", np.zeros((2, 48), dtype=np.int32))
    monkeypatch.setattr(prune, "prune_block", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flags = ["--calib", tmp_path / "calib.npy", "--out", tmp_path / "out", "--device", "cuda"]
        run(prune.main, "--ckpt", random_checkpoint, *flags)
    assert json.loads((tmp_path / "out.partial" / "job.json").read_text())["device"] == "pretended"


def test_a_step_waits_for_the_gpu_as_often_however_many_micro_batches_it_has(pruned, tmp_path, monkeypatch):
    adamw, waits, fused = torch.optim.AdamW, [], []
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kw: fused.append(kw["fused"]) or adamw(*args, **kw))
    for max_tokens in (80, 400):
        flags = [*training(pruned, "--max_tokens", max_tokens), "--eval_interval", 1000]
        counted = run(train.main, "--device", "cuda", "--out_dir", tmp_path / str(max_tokens), *flags)
        waits.append(sum(counted.waits.values()))
    assert waits[0] == waits[1] and fused == [True, True]
    # three steps, the loss, the norm and the flag of each; beside them two validations and what is loaded and saved
    in_steps = [
        n for text, n in counted.waits.items() if ".item()" in text and "n_targets" in text or "grad_norm" in text
    ]
    assert sum(in_steps) <= 3 * 3, counted.waits


def test_a_micro_batch_moves_its_tokens_and_targets_and_waits_for_nothing(pruned):
    examples = train.Examples(pruned.parent / "data", "train", mask_prompt=True)
    args = train.make_parser().parse_args("--preset test --rank 4 --dtype float32".split())
    kernels = []
    for layers in (1, 2):
        config = dataclasses.replace(PRESETS["test"], num_hidden_layers=layers, sliding_window=64)
        with gpu() as counted:
            model = train.build(args, config)
            train.materialise(model, Llama(config).state_dict(), 0, "cuda")
            for c in (counted.waits, counted.copied, counted.kernels):
                c.clear()
            model(*examples.batch([0, 1, 2], "cuda")).backward()
        assert not counted.waits
        tokens, targets = 3 * examples.lengths[:3].max(), examples.n_targets[:3].sum()
        assert sum(counted.copied.values()) == 8 * (tokens + 2 * targets)
        kernels.append(sum(counted.kernels.values()))
    # a block's forward and backward, its attention counted as the operations of the CPU's kernel
    assert kernels[1] - kernels[0] <= 260


def test_sparsegpt_starts_25_kernels_for_four_columns_at_most():
    with gpu() as counted:
        W, U = torch.randn(64, 128, device="cuda"), torch.eye(128, device="cuda")
        counted.kernels.clear()
        prune.sparsegpt(W, torch.zeros(128, dtype=torch.bool, device="cuda"), U, (2, 4))
    assert sum(counted.kernels.values()) <= 25 * 128 // 4 and not counted.waits


# ----------------------------------------------------------------------------------------------------------------------
# memory at full size, on fake tensors: shapes and lifetimes, no values


class Answers(TorchDispatchMode):
    """Answers what depends on values: all is finite and true, every number is 1, and a mask takes everything."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return args[0].dtype == torch.bool or 1
        if name == "index" and args[1][0].dtype == torch.bool:
            return args[0].clone()
        return op(*args, **(kwargs or {}))


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """The kernel that torch takes on a GPU, by its rules (see Gpu.attention)."""
    aten = torch.ops.aten
    if attn_mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    assert not enable_gqa, "the scores of all heads would stand in memory"
    learns = torch.is_grad_enabled() and q.requires_grad
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, learns, 0.0, is_causal)[0]


SHAPES = {name: PRESETS[f"llama-{name}"] for name in ("7b", "13b", "2-70b")}
SHAPES["mistral"] = LlamaConfig(32000, 4096, 14336, 32, 32, 8)
SHAPES["tinyllama"] = LlamaConfig(32000, 2048, 5632, 22, 32, 4)
HOW = [("magnitude", 0.5), ("wanda", (2, 4)), ("sparsegpt", (2, 4)), ("wanda", 0.5, 2)]  # the last with DSnoT
FULL_SIZE = [(name, gib, torch.bfloat16) for name in SHAPES for gib in (24, 80)]
FULL_SIZE += [("tinyllama", 24, torch.float32), ("7b", 80, torch.float32)]


@pytest.mark.stress
@pytest.mark.parametrize("name, gib, dtype", FULL_SIZE)
def test_pruning_a_block_of_full_size_fits(monkeypatch, name, gib, dtype):
    config = SHAPES[name]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    # one slab of SparseGPT's, and one group of a slab, stand for all, since they free what they take
    short = lambda *args: range(*args)[:1] if len(args) == 3 and args[2] <= 128 else range(*args)
    monkeypatch.setattr(prune, "range", short, raising=False)
    with torch.device("meta"):
        block = Block(config).requires_grad_(False)
        shapes = block.state_dict()
    for how in HOW:
        with cuda_is_there(gib * 2**30), FakeTensorMode(), LiveBytes() as live, Answers(), torch.device("cuda"):
            block.load_state_dict({k: torch.empty(w.shape, dtype=dtype) for k, w in shapes.items()}, assign=True)
            x = torch.empty(128, 2048, config.hidden_size, dtype=dtype)
            tables = rope_tables(config, torch.arange(2048), dtype)
            batch = prune.batch_size(config, x[..., 0], "cuda")
            live.peak = live.now
            prune.prune_block(block, 0, x, prune.Settings(*how), tables, batch)
        assert live.peak < (gib - 0.6) * 2**30, f"{how}: {live.peak / 2**30:.1f} GiB in batches of {batch}"


FORMS = [
    "",
    "--matmul chunked",
    "--matmul repeat",
    "--activation_checkpointing",
    "--method lora",
    "--method masked_lora",
]
FORMS += ["--packed", "--method masked", "--method dynamic --sparsity 2:4", "--method full"]


@pytest.mark.stress
@pytest.mark.parametrize("flags", FORMS)
def test_training_a_7b_takes_on_a_gpu_what_bench_memory_says(monkeypatch, flags):
    args = train.make_parser().parse_args(f"--preset llama-7b --dtype bfloat16 {flags}".split())
    config = dataclasses.replace(PRESETS["llama-7b"], num_hidden_layers=2)
    args.device, args.zeros = "cpu", 0.5
    said = memory.simulate(args, config, 8, 512)[2:].max()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, fused=True))  # train.py's, there
    args.device = "cuda"
    live = LiveBytes()

    def compiled(function):
        """One kernel, which makes its results and nothing on the way."""

        def kernel(*args):
            peak = live.peak
            results = function(*args)
            live.peak = max(peak, live.now)
            return results

        return kernel

    monkeypatch.setattr(spp, "compiled", compiled)
    monkeypatch.setattr(spp, "compile_errors", {"cuda": None})
    monkeypatch.setattr(memory, "LiveBytes", lambda: live)
    with cuda_is_there(80 * 2**30), torch.device("cuda"):
        needed = memory.simulate(args, config, 8, 512)[2:].max()
    # W^ and G of one linear, 90 MB each, may stand beside each other, which is much for two layers alone
    assert needed == pytest.approx(said, rel=0.03, abs=0.2 * 2**30)
