"""What pruning one block takes: time against its floor, memory against one block.

    python bench/prune.py                                  # one CPU thread, hidden 1024 / 2816, 16 x 512 tokens
    python bench/prune.py --device cuda --dtype bfloat16   # a LLaMA-7B block, 128 x 2,048 tokens
    python bench/prune.py --memory 2 4 8                   # LLaMA-2-70B's block shapes, that many blocks, on the CPU

Wanda's floor is two forward passes of the block. SparseGPT's straight form is the algorithm as it is written down: two
whole forward passes, for each of the seven linears a Hessian of its own and its factor by way of the inverse, columns of
W as they lie. Ours has four Hessians, of each the half that symmetry leaves, factors them without an inverse, stops the
first pass early, and turns a slab over so that a column lies in one piece.
"""

import copy
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prune  # noqa: E402
from data.checkpoint import Checkpoint, UserError, write_checkpoint  # noqa: E402
from model import (  # noqa: E402
    PRESETS,
    Block,
    Llama,
    LlamaConfig,
    Parser,
    check_device,
    cli,
    config_to_dict,
    number,
    rope_tables,
)


@torch.no_grad()
def straight_sparsegpt(block: Block, x, tables, batch: int) -> None:
    """SparseGPT 2:4 of one block with seven of each."""
    linears = {name: block.get_submodule(name) for names in prune.GROUPS.values() for name in names}
    hessians = {name: torch.zeros(m.in_features, m.in_features, device=x.device) for name, m in linears.items()}

    def add(module, args, output, H):
        tokens = args[0].flatten(0, 1).float()
        H.addmm_(tokens.T, tokens, alpha=2 / len(x))

    hooks = [m.register_forward_hook(lambda *a, H=hessians[name]: add(*a, H)) for name, m in linears.items()]
    for part in x.split(batch):
        block(part, *tables)
    for hook in hooks:
        hook.remove()
    for name, m in linears.items():
        H = hessians.pop(name)
        dead = H.diagonal() == 0
        H.diagonal()[dead] = 1
        H.diagonal().add_(0.01 * H.diagonal().mean())
        U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        W = m.weight.float().masked_fill(dead, 0)
        for start in range(0, W.shape[1], 128):
            end, errors = min(start + 128, W.shape[1]), []
            for j in range(start, end):
                if j % 4 == 0:
                    keep = prune.keep_mask((W[:, j : j + 4] / U.diagonal()[j : j + 4]).square(), (2, 4))
                errors.append(W[:, j].masked_fill(keep[:, j % 4], 0) / U[j, j])
                W[:, j:end] -= errors[-1][:, None] * U[j, j:end]
                W[:, j] *= keep[:, j % 4]
            W[:, end:] -= torch.stack(errors, 1) @ U[start:end, end:]
        m.weight.copy_(W)
    prune.run_block(block, x, tables, batch)


def noise(config: LlamaConfig) -> Checkpoint:
    """A LLaMA of random bfloat16 weights, each made when it is asked for."""
    with torch.device("meta"):
        meta = {name: w.bfloat16() for name, w in Llama(config).state_dict().items()}
    get = lambda w: torch.randn(w.shape, dtype=torch.bfloat16).mul_(0.02)
    return Checkpoint(None, config_to_dict(config), {name: (w, functools.partial(get, w)) for name, w in meta.items()})


def peak_memory(command: list) -> int:
    """Bytes of resident memory that a command, which has to succeed, has at most."""
    child = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise UserError(f"{Path(command[1]).name} failed")
    return usage.ru_maxrss * 1024


def memory(n_blocks: int, method: str) -> None:
    """Peak resident memory of prune.py on n blocks of LLaMA-2 70B's shapes (random bfloat16), 4 x 128 tokens."""
    config = dataclasses.replace(PRESETS["llama-2-70b"], num_hidden_layers=n_blocks, vocab_size=1000)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_checkpoint(noise(config), folder / "dense")
        np.save(folder / "calib.npy", np.random.default_rng(0).integers(0, 1000, (4, 128), dtype=np.int32))
        command = [sys.executable, prune.__file__, "--ckpt", folder / "dense", "--calib", folder / "calib.npy"]
        command += ["--method", method, "--device", "cpu", "--out", folder / "pruned"]
        start = time.perf_counter()
        peak = peak_memory(command)
        seconds = time.perf_counter() - start
        zeros = json.loads((folder / "pruned" / "prune.json").read_text())["kinds"]["down_proj"]["sparsity"]
    with torch.device("meta"):
        block = 2 * sum(w.numel() for w in Block(config).parameters())  # bytes
    sizes = f"{peak / 1e9:.2f} GB | {block / 1e9:.2f} GB"
    print(f"| {method} | {n_blocks} | {sizes} | {seconds:.0f} s | {100 * zeros:.0f}% |", flush=True)


def main():
    parser = Parser(description="Time per block of each pruning method, against its floor.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=number(int, 1), default=3)
    parser.add_argument(
        "--memory", type=number(int, 1), nargs="+", metavar="BLOCKS", help="peak memory in place of time"
    )
    parser.add_argument("--method", default="wanda", choices=prune.METHODS, help="of --memory")
    args = parser.parse_args()
    check_device(args.device)
    if args.memory:
        print("| method | blocks | peak resident memory | one block | time | zeros |\n|---|---|---|---|---|---|")
        for n in args.memory:
            memory(n, args.method)
        return
    cuda = args.device == "cuda"
    config = LlamaConfig() if cuda else LlamaConfig(hidden_size=1024, intermediate_size=2816, num_attention_heads=8)
    n, T, batch = (128, 2048, 8) if cuda else (16, 512, 4)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_device(args.device)
    block = Block(config).to(getattr(torch, args.dtype)).requires_grad_(False)
    inputs = torch.randn(n, T, config.hidden_size, dtype=getattr(torch, args.dtype))
    tables = rope_tables(config, torch.arange(T), inputs.dtype)

    def timed(function) -> float:
        own, x = copy.deepcopy(block), inputs.clone()
        if cuda:
            torch.cuda.synchronize()
        clock = time.perf_counter if cuda else time.process_time  # one thread's work, whatever else the machine does
        start = clock()
        function(own, x)
        if cuda:
            torch.cuda.synchronize()
        return clock() - start

    def two_forwards(own, x):
        with torch.no_grad():
            for part in x.split(batch):
                own(part, *tables)
            prune.run_block(own, x, tables, batch)

    def method(*settings):
        return lambda own, x: prune.prune_block(own, 0, x, prune.Settings(*settings), tables, batch)

    cases = {
        "two forward passes": two_forwards,
        "magnitude 2:4": method("magnitude", (2, 4)),
        "Wanda 2:4": method("wanda", (2, 4)),
        "Wanda 0.5": method("wanda", 0.5),
        "SparseGPT 2:4": method("sparsegpt", (2, 4)),
        "SparseGPT 2:4, straight": lambda own, x: straight_sparsegpt(own, x, tables, batch),
        "SparseGPT 0.5": method("sparsegpt", 0.5),
        "Wanda 2:4 + DSnoT": method("wanda", (2, 4), 50),
    }
    times = {case: [] for case in cases}
    for _ in range(args.repeats):
        for case, function in cases.items():
            times[case].append(timed(function))
    median = {case: statistics.median(t) for case, t in times.items()}
    name = torch.cuda.get_device_name() if cuda else "CPU, one thread"
    about = f"{name}, torch {torch.__version__}, {args.dtype}, {n} x {T} tokens"
    print(f"{about}, medians of {args.repeats} paired repeats\n")
    print("| method | seconds a block | 32 blocks | / two forward passes |\n|---|---|---|---|")
    for case, t in median.items():
        print(f"| {case} | {t:.2f} | {32 * t:.0f} | {t / median['two forward passes']:.2f} |")
    ratios = [a / b for a, b in zip(times["SparseGPT 2:4"], times["SparseGPT 2:4, straight"], strict=True)]
    print(f"\nSparseGPT / its straight form: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    cli(main)
