"""What 2:4 sparsity saves when a model runs: dense against torch's semi-structured tensors, on an NVIDIA GPU.

    python bench/inference.py                              # a LLaMA-7B shape in float16, random weights pruned 2:4
    python bench/inference.py --preset llama-2-13b

One linear of each shape, and the prefill of a whole model, for 1 and 8 sequences of 2,048 tokens. The paper quotes Wanda:
about 1.6x for linears and 1.24x end to end for LLaMA-7B (312 to 251 ms).
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.step import random_2of4  # noqa: E402
from data.checkpoint import UserError  # noqa: E402
from evaluate import to_semi_structured  # noqa: E402
from model import PRESETS, Parser, check_device, cli, number  # noqa: E402


def seconds(function, repeats: int = 20) -> float:
    """Median of repeated calls, each between two synchronisations, after three to warm up."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


@torch.no_grad()
def main():
    parser = Parser(description="Dense against 2:4, one linear and a whole prefill.")
    parser.add_argument("--preset", default="llama-7b", choices=PRESETS)
    parser.add_argument("--length", type=number(int, 1), default=2048)
    parser.add_argument("--batches", type=number(int, 1), nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("needs an NVIDIA GPU of compute capability 8.0 or later")
    check_device("cuda")
    config, dtype = PRESETS[args.preset], getattr(torch, args.dtype)
    model = random_2of4(config, dtype, "cuda").requires_grad_(False)
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, {args.preset}, {args.dtype}, {args.length} tokens a sequence\n")
    print("| what | dense | 2:4 | speed-up | relative difference |\n|---|---|---|---|---|")
    inputs = {n: torch.randint(config.vocab_size, (n, args.length), device="cuda") for n in args.batches}
    block = model.model.layers[0]
    linears = {
        name: getattr(part, name)
        for part, name in ((block.self_attn, "q_proj"), (block.mlp, "up_proj"), (block.mlp, "down_proj"))
    }
    dense = {}
    for n, tokens in inputs.items():
        for name, linear in linears.items():
            x = torch.randn(n * args.length, linear.in_features, device="cuda", dtype=dtype)
            dense[name, n] = (x, linear(x), seconds(lambda: linear(x)))  # noqa: B023  called at once
        dense["prefill", n] = (tokens, model.hidden(tokens), seconds(lambda: model.hidden(tokens), 5))  # noqa: B023
    for i, layer in enumerate(model.model.layers):
        to_semi_structured(layer, f"layers.{i}")
    for (name, n), (x, y, t) in dense.items():
        run = model.hidden if name == "prefill" else linears[name]
        difference = (run(x) - y).float().norm() / y.float().norm()
        sparse = seconds(lambda: run(x), 5 if name == "prefill" else 20)  # noqa: B023
        times = f"{1e3 * t:.2f} ms | {1e3 * sparse:.2f} ms | {t / sparse:.2f}"
        print(f"| {name}, batch {n} | {times} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    cli(main)
