"""How W^ should be rounded to bfloat16 while it trains: a real fine-tuning, three seeds, against float32.

    make demo                      # leaves out/demo: a pretrained model pruned to 2:8, and instructions
    python bench/rounding.py

Prints the validation loss after an epoch of SPP. Evaluated in float32 with the merged float32 weight (what was learned)
and with the weight merged into bfloat16 (what a bfloat16 checkpoint keeps of it).
"""

import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from model import Parser, cli, load, number, open_llama  # noqa: E402
from spp import SPPLinear, adapter_state, inject, load_adapter, merge, spp_weight  # noqa: E402


def round_stochastically(W: torch.Tensor, seed: int) -> torch.Tensor:
    """float32 (m, n) to bfloat16, up or down at random: right on average.

    A bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half before it is cut off carries into
    the upper half with a probability of exactly what is cut off.
    """
    noise = torch.empty(W.shape, dtype=torch.int32, device=W.device)
    noise.random_(0, 1 << 16, generator=torch.Generator(W.device).manual_seed(seed))
    return noise.add_(W.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32).to(torch.bfloat16)


class StochasticLinear(SPPLinear):
    """W^ is rounded stochastically, in the backward pass as it was in the forward pass."""

    def forward(self, x):
        self.seed = int(torch.randint(1 << 62, ()))
        return super().forward(x)

    def effective_weight(self, W, alpha, beta):
        return round_stochastically(super().effective_weight(W.float(), alpha, beta), self.seed)


class SplitLinear(SPPLinear):
    """Base and branch apart, so that a small branch is not rounded away beside W: 5 units."""

    def forward(self, x):
        return F.linear(x, self.weight) + super().forward(x)

    def effective_weight(self, W, alpha, beta):
        return spp_weight(W.float(), None, alpha, beta, self.scale, residual=False)  # W~ alone


MODES = {  # what is trained: (dtype, class)
    "float32": ("float32", SPPLinear),
    "bfloat16, nearest": ("bfloat16", SPPLinear),
    "bfloat16, stochastic": ("bfloat16", StochasticLinear),
    "bfloat16, split": ("bfloat16", SplitLinear),
}


def fine_tune(args, ckpt, config, examples, seed: int, mode: str):
    dtype, layer_class = MODES[mode]
    model = train.build(train.make_parser().parse_args(["--ckpt", args.ckpt, "--dtype", dtype]), config)
    train.materialise(model, ckpt, seed, "cpu")
    for module in model.modules():
        if isinstance(module, SPPLinear):
            module.__class__ = layer_class
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, args.lr, weight_decay=0.001)
    plan = train.Plan(len(examples.lengths), args.batch_size, args.epochs, seed)
    for step in range(plan.steps):
        torch.manual_seed(1000 * seed + step)
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, plan.steps, 0.03, args.lr)
        n = examples.n_targets[plan[step]].sum()
        for part in train.split_batch(plan[step], examples.lengths, 4096, 1)[0]:
            (model(*examples.batch(part, "cpu")) / n).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.clone() for name, p in adapter_state(model).items()}


@torch.no_grad()
def losses(args, adapter, val) -> tuple[float, float]:
    model, _ = load(args.ckpt)
    load_adapter(inject(model), adapter)
    merge(model)
    out = []
    for round_weights in (False, True):
        if round_weights:
            model.to(torch.bfloat16).float()
        total = 0
        for part in train.split_batch(np.arange(len(val.lengths)), val.lengths, 4096, 1)[0]:
            total += model(*val.batch(part, "cpu")).item()
        out.append(total / val.n_targets.sum())
    return tuple(out)


def main():
    parser = Parser(description="Compare roundings of the formed weight to bfloat16.")
    parser.add_argument("--ckpt", default="out/demo/wanda_2of8.pt")
    parser.add_argument("--data", default="out/demo/alpaca")
    parser.add_argument("--lr", type=number(float, above=0), default=4e-3)
    parser.add_argument("--batch_size", type=number(int, 1), default=32)
    parser.add_argument("--epochs", type=number(float, above=0), default=1)
    parser.add_argument("--seeds", type=number(int, 1), default=3)
    args = parser.parse_args()
    ckpt, config = open_llama(args.ckpt)
    examples, val = (train.Examples(args.data, split) for split in ("train", "val"))
    print(f"validation loss after {args.epochs} epochs, lr {args.lr}, mean of {args.seeds} seeds (spread)\n")
    print("| training | learned | merged into bfloat16 |\n|---|---|---|")
    for mode in MODES:
        results = [losses(args, fine_tune(args, ckpt, config, examples, seed, mode), val) for seed in range(args.seeds)]
        cells = [f"{statistics.mean(r):.4f} ({max(r) - min(r):.4f})" for r in zip(*results, strict=True)]
        print(f"| {mode} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    cli(main)
