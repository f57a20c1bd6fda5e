"""Where the best learning rate lies: for each method, over the width of the model and the number of steps.

    make demo                                                          # leaves the tiny world's text in out/demo
    python bench/rates.py --widths 96 192 --steps 20                   # what assets/rates.jsonl holds
    python bench/rates.py --widths 96 --steps 100
    python bench/rates.py --widths 96 --steps 500 --methods spp

A model of each width is pretrained on the world's text and pruned (Wanda, 0.75). Each cell is fine-tuned at three or
more neighbouring rates of 1, 2, 5, 10, ..., on until the best of them is inside. What counts is the last validation
loss, as train.py takes it: of the merged model, LoRA's under the mask. Lines are appended to --results as they come,
and what is there is not measured again: with --results assets/rates.jsonl the table is printed, and nothing is run.
"""

import argparse
import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from data.checkpoint import UserError  # noqa: E402
from model import PRESETS, Llama, LlamaConfig, Parser, cli, load, number, save  # noqa: E402
from prune import parse_sparsity, prune_model  # noqa: E402
from spp import METHODS  # noqa: E402

SPARSITY = "0.75"
PRETRAINING = 600  # steps of 16 windows of 128 tokens
START = {"spp": 5e-2, "lora": 1e-2, "masked_lora": 1e-2}  # where the search begins; 5e-3 for any other method


def learn(model: Llama, examples: train.Examples, plan: train.Plan, lr: float, dynamic: bool = False) -> None:
    """The loop of train.py: its warm-up and decay, its clipping, its AdamW."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr, weight_decay=0.001)
    for step in range(plan.steps):
        if dynamic and step % 10 == 0:
            train.update_masks(model, parse_sparsity(SPARSITY))
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, plan.steps, 0.03, lr)
        n_targets = examples.n_targets[plan[step]].sum()
        for part in train.split_batch(plan[step], examples.lengths, 4096, 1)[0]:
            (model(*examples.batch(part, "cpu")) / n_targets).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def plan_of(examples: train.Examples, batch_size: int, steps: int) -> train.Plan:
    per_epoch = math.ceil(len(examples.lengths) / batch_size)
    return train.Plan(len(examples.lengths), batch_size, steps / per_epoch, seed=0)


def config_of(width: int) -> LlamaConfig:
    """The demo's shape, with other layers: 2 2/3 times as wide inside the MLP."""
    return replace(PRESETS["demo"], hidden_size=width, intermediate_size=width * 8 // 3)


@functools.cache
def pruned(width: int, demo: Path, out: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Shapes and weights of the pruned model of a width, which is pretrained where it is not in `out`."""
    path = out / f"dense-{width}.pt"
    if not path.exists():
        text = train.Examples(demo / "world", "train")
        torch.manual_seed(0)
        model = Llama(config_of(width))
        learn(model, text, plan_of(text, 16, PRETRAINING), 8e-3 * 96 / width)
        out.mkdir(parents=True, exist_ok=True)
        save(model, path)
    model, _ = load(path)
    prune_model(model, np.load(demo / "calib.npy"), "wanda", SPARSITY)
    return model.config, {name: p.detach() for name, p in model.state_dict().items()}


def fine_tune(args: argparse.Namespace, width: int, method: str, steps: int, lr: float) -> dict:
    """The line of a cell and a rate: the validation loss before, and after; null where it is not finite."""
    config, weights = pruned(width, args.demo, args.out)
    flags = ["--ckpt", "pruned", "--method", method, "--rank", "8" if "lora" in method else "16"]
    run = train.make_parser().parse_args([*flags, "--dtype", "float32", "--max_tokens", "4096", "--device", "cpu"])
    examples, val = (train.Examples(args.demo / "alpaca", split) for split in ("train", "val"))
    model = train.build(run, config)
    train.materialise(model, {name: w.clone() for name, w in weights.items()}, seed=0, device="cpu")
    if method == "dynamic":
        train.update_masks(model, parse_sparsity(SPARSITY))
    losses = {"before": train.validation_loss(model, val, run, None, rank=0, world=1)}
    learn(model, examples, plan_of(examples, args.batch_size, steps), lr, method == "dynamic")
    losses["val_loss"] = train.validation_loss(model, val, run, None, rank=0, world=1)
    losses = {key: round(loss, 4) if math.isfinite(loss) else None for key, loss in losses.items()}
    return {"width": width, "method": method, "steps": steps, "batch_size": args.batch_size, "lr": lr, **losses}


def rate(k: int) -> float:
    """1, 2, 5, 10, 20, ... for k = 0, 1, 2, 3, 4, ..., and .5, .2, .1, ... for k = -1, -2, -3, ..."""
    return float(f"{(1, 2, 5)[k % 3]}e{k // 3}")


def cell_of(line: dict) -> tuple[int, str, int]:
    return line["width"], line["method"], line["steps"]


def best_of(lines: list[dict], cell: tuple[int, str, int]) -> dict | None:
    found = [line for line in lines if cell_of(line) == cell and line["val_loss"] is not None]
    return min(found, key=lambda line: line["val_loss"], default=None)


def search(args: argparse.Namespace, lines: list[dict], cell: tuple[int, str, int], start: float) -> float:
    """Adds lines until the best rate of the cell has a worse neighbour on both sides. Returns it."""
    losses = {line["lr"]: line["val_loss"] for line in lines if cell_of(line) == cell}
    k = round(3 * math.log10(start))
    while True:
        three = (k, k - 1, k + 1)
        for lr in map(rate, three):
            if lr not in losses:
                line = fine_tune(args, *cell, lr)
                print(line, flush=True)
                losses[lr] = line["val_loss"]
                lines.append(line)
                with open(args.results, "a") as file:
                    file.write(json.dumps(line) + "\n")
        best = min(three, key=lambda j: math.inf if losses[rate(j)] is None else losses[rate(j)])
        if best == k:
            return rate(k)
        k = best


def main() -> None:
    parser = Parser(description="Measure the best learning rates, and print the table of those that were measured.")
    add = parser.add_argument
    add("--widths", type=number(int, 8), nargs="*", default=[], help="multiples of 8")
    add("--methods", choices=(*METHODS, "full"), nargs="*", default=[*METHODS, "full"], help="default: all")
    add("--steps", type=number(int, 1), nargs="*", default=[])
    add("--batch_size", type=number(int, 1), default=8)
    add("--demo", type=Path, default="out/demo", help="what make demo left")
    add("--out", type=Path, default="out/rates", help="folder of the pretrained models")
    add("--results", type=Path, default="out/rates/rates.jsonl")
    args = parser.parse_args()
    lines = []
    if args.results.exists():
        lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    if any(line["batch_size"] != args.batch_size for line in lines):
        raise UserError(f"--results {args.results}: holds another batch size than {args.batch_size}")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for steps in args.steps:
        for width in args.widths:
            for method in args.methods:
                known = [best["lr"] for n in (steps, 20, 100, 500) if (best := best_of(lines, (width, method, n)))]
                search(args, lines, (width, method, steps), [*known, START.get(method, 5e-3)][0])

    print(
        "| method | width | steps | loss before | best rate | loss | train.py's default |\n|---|---|---|---|---|---|---|"
    )
    for cell in sorted({cell_of(line) for line in lines}, key=lambda cell: (cell[1], cell[0], cell[2])):
        best = best_of(lines, cell)
        width, method, steps = cell
        default, _ = train.default_lr(method, config_of(width), steps)
        losses = f"{best['before']:.3f} | {best['lr']:g} | {best['val_loss']:.3f}"
        print(f"| {method} | {width} | {steps} | {losses} | {default:g} |")


if __name__ == "__main__":
    cli(main)
