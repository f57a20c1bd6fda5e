"""Seconds that one block takes, against what it must: two forward passes, and sharing what q, k, v and gate, up share.

    python bench/prune.py                                  # one CPU thread, hidden 1024 / 2816, 16 x 512 tokens
    python bench/prune.py --device cuda --dtype bfloat16   # a LLaMA-7B block, 128 x 2,048 tokens

Wanda's floor is two forward passes of the block. SparseGPT's straight form gathers a Hessian and factorises it for each
of the seven linears; ours does it for the four inputs.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prune  # noqa: E402
from model import Block, LlamaConfig, rope_tables  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description="Time per block of each pruning method, against its floor.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    config = LlamaConfig() if cuda else LlamaConfig(hidden_size=1024, intermediate_size=2816, n_heads=8)
    n, T, batch = (128, 2048, 8) if cuda else (16, 512, 4)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_device(args.device)
    block = Block(config).to(getattr(torch, args.dtype)).requires_grad_(False)
    inputs = torch.randn(n, T, config.hidden_size, dtype=getattr(torch, args.dtype))
    tables = rope_tables(config, torch.arange(T), inputs.dtype)
    straight = {name: (name,) for names in prune.GROUPS.values() for name in names}
    shared = prune.GROUPS

    def timed(function) -> float:
        own, x = copy.deepcopy(block), inputs.clone()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function(own, x)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def two_forwards(own, x):
        with torch.no_grad():
            for part in x.split(batch):
                own(part, *tables)
            prune.forward(own, x, tables, batch)

    def method(settings, groups=shared):
        def run(own, x):
            prune.GROUPS = groups
            prune.prune_block(own, 0, x, settings, tables, batch)
            prune.GROUPS = shared

        return run

    cases = {
        "two forward passes": two_forwards,
        "magnitude 2:4": method(prune.Settings("magnitude", (2, 4))),
        "Wanda 0.5": method(prune.Settings("wanda", 0.5)),
        "Wanda 2:4": method(prune.Settings("wanda", (2, 4))),
        "SparseGPT 2:4": method(prune.Settings("sparsegpt", (2, 4))),
        "SparseGPT 2:4, seven of each": method(prune.Settings("sparsegpt", (2, 4)), straight),
        "Wanda 2:4 + DSnoT": method(prune.Settings("wanda", (2, 4), dsnot=50)),
    }
    times = {case: [] for case in cases}
    for _ in range(args.repeats):
        for case, function in cases.items():
            times[case].append(timed(function))
    median = {case: statistics.median(t) for case, t in times.items()}
    name = torch.cuda.get_device_name() if cuda else "CPU, one thread"
    print(
        f"{name}, torch {torch.__version__}, {args.dtype}, {n} x {T} tokens, medians of {args.repeats} paired repeats\n"
    )
    print("| method | seconds a block | 32 blocks | / two forward passes |\n|---|---|---|---|")
    for case, t in median.items():
        print(f"| {case} | {t:.2f} | {32 * t:.0f} | {t / median['two forward passes']:.2f} |")
    ratio = median["SparseGPT 2:4"] / median["SparseGPT 2:4, seven of each"]
    print(f"\nSparseGPT with shared Hessians / seven of each: {ratio:.2f}")


if __name__ == "__main__":
    main()
