"""What sorting by length saves: random batches of 8 padded to their longest, as the authors' script, against ours.

    python data/alpaca/prepare.py --tokenizer llama-7b --out data/alpaca
    python bench/padding.py --data data/alpaca                                          # a CPU: a small LLaMA
    python bench/padding.py --data data/alpaca --preset llama-7b --device cuda --dtype bfloat16

Every example of the first global batches is run forward and backward both ways, in turn; useful tokens are target tokens.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import PRESETS, Llama, LlamaConfig, Parser, check_device, cli, number  # noqa: E402
from spp import inject  # noqa: E402
from train import Examples, Plan, padded_tokens, split_batch  # noqa: E402


def main():
    parser = Parser(description="Padding, and useful tokens per second, of two ways to make batches.")
    parser.add_argument("--data", required=True, help="folder that data/alpaca/prepare.py wrote")
    parser.add_argument("--preset", choices=PRESETS, help="the model's shape (default: 6 layers of 512 / 1408)")
    parser.add_argument("--batch_size", type=number(int, 1), default=128)
    parser.add_argument("--max_tokens", type=number(int, 1), default=4096)
    parser.add_argument("--steps", type=number(int, 1), default=1, help="global batches to run")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    check_device(args.device)
    config = PRESETS[args.preset] if args.preset else LlamaConfig(32000, 512, 1408, 6, 8)
    data = Examples(args.data, "train")
    plan = Plan(len(data.lengths), args.batch_size, 1, seed=0)
    every = [plan[step] for step in range(plan.steps_per_epoch)]
    ways = {
        "random batches of 8": [[batch[i : i + 8].tolist() for i in range(0, len(batch), 8)] for batch in every],
        "sorted, cut by tokens": [split_batch(batch, data.lengths, args.max_tokens, 1)[0] for batch in every],
    }
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = inject(Llama(config).to(args.device, getattr(torch, args.dtype)))
    clock = time.perf_counter if args.device == "cuda" else time.process_time  # one thread's work
    seconds = {way: [] for way in ways}
    for step in range(-1, min(args.steps, len(every))):  # -1: to warm up
        for way, batches in ways.items():
            start = clock()
            for part in batches[max(0, step)] if step >= 0 else batches[0][:2]:
                model(*data.batch(part, args.device)).backward()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[way] += [clock() - start] if step >= 0 else []
    print(
        f"{len(data.lengths)} examples, {np.mean(data.lengths):.0f} target tokens on average, torch {torch.__version__}"
    )
    print("| batches | padding, share of computed tokens | useful tokens/s |\n|---|---|---|")
    for way, batches in ways.items():
        useful = sum(data.lengths[part].sum() for parts in batches for part in parts if len(part))
        waste = 1 - useful / sum(padded_tokens(parts, data.lengths) for parts in batches)
        speeds = [data.lengths[every[step]].sum() / t for step, t in enumerate(seconds[way])]
        print(f"| {way} | {100 * waste:.1f}% | {statistics.median(speeds):,.0f} |")


if __name__ == "__main__":
    cli(main)
