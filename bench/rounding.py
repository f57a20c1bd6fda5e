"""How W^ should be rounded to bfloat16 while it trains: a real fine-tuning, three seeds, against float32.

    make demo                      # leaves out/demo: a pretrained model pruned to 2:8, and instructions
    python bench/rounding.py

Prints the validation loss after an epoch of SPP. Evaluated in float32 with the merged float32 weight (what was learned)
and with the weight merged into bfloat16 (what a bfloat16 checkpoint keeps of it).
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from model import load, open_checkpoint  # noqa: E402
from spp import Formed, SPPLinear, adapter_state, inject, load_adapter, merge  # noqa: E402


class SplitLinear(SPPLinear):
    """Base and branch apart, so that a small branch is not rounded away beside W: 5 units."""

    stochastic = False

    def form(self, W, alpha, beta):
        return super().form(W, alpha, beta) - W.float()

    def forward(self, x):
        return F.linear(x, self.weight) + Formed.apply(x, self, None, self.weight, self.alpha, self.beta)


def fine_tune(args, ckpt, examples, seed: int, mode: str):
    dtype = "float32" if mode == "float32" else "bfloat16"
    settings = argparse.Namespace(
        method="spp",
        r=16,
        scale=2.0,
        matmul="fused",
        dtype=dtype,
        activation_checkpointing=False,
        no_beta=False,
        zero_init="beta",
        no_residual=False,
    )
    model = train.build(settings, ckpt.config)
    train.materialise(model, ckpt, seed, "cpu")
    for module in model.modules():
        if isinstance(module, SPPLinear):
            module.stochastic = mode == "bfloat16, stochastic"
            module.__class__ = SplitLinear if mode == "bfloat16, split" else SPPLinear
            if mode == "bfloat16, split":
                module.stochastic = False
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, args.lr, weight_decay=0.001)
    plan = train.Plan(len(examples.lengths), args.batch_size, args.epochs, seed)
    for step in range(plan.steps):
        torch.manual_seed(1000 * seed + step)
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, plan.steps, 0.03, args.lr)
        n = sum(examples.n_targets(i, False) for i in plan[step])
        for part in train.deal(plan[step], examples.lengths, 4096, 1)[0]:
            (model(*examples.batch(part, False, "cpu")) / n).backward()
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
        for part in train.deal(train.np.arange(len(val.lengths)), val.lengths, 4096, 1)[0]:
            total += model(*val.batch(part, False, "cpu")).item()
        out.append(total / val.lengths.sum())
    return tuple(out)


def main():
    parser = argparse.ArgumentParser(description="Compare roundings of the formed weight to bfloat16.")
    parser.add_argument("--ckpt", default="out/demo/wanda_2o8.pt")
    parser.add_argument("--data", default="out/demo/alpaca")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    ckpt = open_checkpoint(args.ckpt)
    examples, val = (train.Examples(args.data, split, ckpt.config.vocab_size) for split in ("train", "val"))
    print(f"validation loss after {args.epochs} epochs, lr {args.lr}, mean of {args.seeds} seeds (spread)\n")
    print("| training | learned | merged into bfloat16 |\n|---|---|---|")
    for mode in ("float32", "bfloat16, nearest", "bfloat16, stochastic", "bfloat16, split"):
        results = [losses(args, fine_tune(args, ckpt, examples, seed, mode), val) for seed in range(args.seeds)]
        cells = [f"{statistics.mean(r):.4f} ({max(r) - min(r):.4f})" for r in zip(*results, strict=True)]
        print(f"| {mode} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
