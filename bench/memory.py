"""What a run of train.py would need, on any machine, without weights, data or GPUs.

    python bench/memory.py --preset llama-2-70b --dtype bfloat16 --fsdp --activation_checkpointing --processes 8
    python bench/memory.py --table      # the README's: what fits one GPU, dense and packed

Takes train.py's flags, and the number of processes; with --packed the share of zeros is the checkpoint's, or --zeros.
Where --data holds prepared data, its largest micro-batch is what is counted, and the length of the run is printed too;
otherwise it is the paper's, filled with examples of 512 tokens.

Memory is counted, not computed from formulas: a training step is run on fake tensors, which have shapes and lifetimes
but no memory. For one process that is within 10% of what was measured on a CPU. What sharding adds is computed: 0 to
10% more than was counted on a pretended mesh of eight (tests/test_memory.py).
"""

import argparse
import dataclasses
import math
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spp  # noqa: E402
import train  # noqa: E402
from data.checkpoint import UserError, packed_size  # noqa: E402
from model import PRESETS, Llama, LlamaConfig, Parser, cli, number, open_llama, sparsity_of  # noqa: E402


class LiveBytes(TorchDispatchMode):
    """Sees every operation, and counts the bytes of what is alive: `now`, and the most so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.count(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self.alive:  # a view has the storage of its tensor
            self.alive.add(key)
            self.now += size
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size


def build(args: argparse.Namespace, config: LlamaConfig) -> Llama:
    """train.py's model on the meta device, with --packed in the shapes that survivors and bits have."""
    model = train.build(args, config)
    for layer in model.modules():
        if args.packed and isinstance(layer, spp.AdapterLinear):
            m, n = layer.shape
            k = round((1 - args.zeros) * m * n)
            if packed_size(layer.weight, k) < layer.weight.nbytes:  # as AdapterLinear.pack has it
                survivors = torch.empty(k, dtype=layer.weight.dtype, device="meta")
                layer.weight = nn.Parameter(survivors, layer.weight.requires_grad)
                layer.bits = torch.empty(m, math.ceil(n / 8), dtype=torch.uint8, device="meta")
    return model


def simulate(args: argparse.Namespace, config: LlamaConfig, rows: int, T: int) -> np.ndarray:
    """Bytes alive (before a step, after its forward pass) and at the peaks of three spans: until the backward pass comes
    to the first block, in that block, and after it, for a micro-batch of rows x T tokens. Each of the five grows by the
    same with every layer, which the highest of the peaks does not: in a deeper model it may be in another span."""
    # Scaled and windowed positions look at a token's number, which a fake tensor has not; plain ones have their shapes.
    model = build(args, dataclasses.replace(config, rope_scaling=None, sliding_window=None))
    blocks = patch.object(spp, "has_kernels", lambda W: False)  # nothing compiles for fake tensors
    with blocks, FakeTensorMode(), LiveBytes() as live:
        for module in model.modules():  # from the meta device, which is not counted, to fake tensors
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype))
        model.tie_weights()
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning)
        peaks = []

        def end_of_span(gradient: torch.Tensor | None = None) -> None:
            peaks.append(live.peak)
            live.peak = live.now

        def watch(block: nn.Module, args: tuple, x: torch.Tensor) -> None:
            if x.requires_grad:
                x.register_hook(end_of_span)

        model.model.layers[0].register_forward_hook(watch)
        for _ in range(2):  # the optimizer has its moments after the first
            peaks.clear()
            before = live.peak = live.now
            tokens = torch.zeros(rows, T, dtype=torch.int64)
            with train.autocast(args):
                x = model.hidden(tokens).flatten(0, 1)
                x = x[torch.arange(rows * T)]  # a copy, as Llama.forward makes of the positions that have a target
                loss = model.summed_loss(x, tokens.flatten())
                del x
            forward = live.now
            loss.backward()
            end_of_span()
            del loss
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            end_of_span()
    return np.array([before, forward, *peaks])


def estimate(args: argparse.Namespace, model: Llama, rows: int, T: int) -> dict[str, int]:
    """Bytes of tensors that a process needs, by part, where the largest micro-batch has rows x T tokens."""
    n_layers, shards = model.config.num_hidden_layers, 1
    if n_layers <= 4:
        before, forward, *peaks = simulate(args, model.config, rows, T)
    else:  # every layer beyond the second adds the same
        shallow = [dataclasses.replace(model.config, num_hidden_layers=n) for n in (2, 3)]
        two, three = (simulate(args, config, rows, T) for config in shallow)
        before, forward, *peaks = two + (n_layers - 2) * (three - two)
    total = sum(p.nbytes for p in model.parameters())
    learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    masks = sum(b.nbytes for b in model.buffers())
    temporaries = max(peaks) - forward
    if args.fsdp and args.processes > 1:
        shards = args.processes
        # whole at the same time: the block at work, the one fetched ahead, and what lies outside of the blocks
        block = sum(p.nbytes for p in model.model.layers[0].parameters())
        temporaries += 2 * block + (total - n_layers * block)
        if args.method == "masked":  # whose gradients are sharded after each block, not after each step
            two_blocks = 2 * sum(p.nbytes for p in model.model.layers[0].parameters() if p.requires_grad)
            temporaries -= (learning - two_blocks) * (shards - 1) / shards
    elif args.processes > 1:
        temporaries += learning  # the buckets in which DDP exchanges gradients
    return {
        "frozen weights": (total - learning + masks) // shards,
        "adapters": learning // shards,
        "optimizer": 2 * learning // shards,  # AdamW's two moments
        "activations": int(forward - before),
        "gradients, temporaries": int(temporaries),
    }


CARDS = (8, 12, 24, 48, 80)  # GB, of 10^9 bytes; the driver's context takes half a one
FORMS = {"dense": [], "packed, 2:4": ["--packed", "--zeros", "0.5"], "packed, 75%": ["--packed", "--zeros", "0.75"]}


def cell(preset: str, method: str, form: str) -> str:
    """GB of training on one GPU with activation checkpointing, the paper's micro-batches, bfloat16; and what fits it."""
    line = ["--preset", preset, "--method", method, "--dtype", "bfloat16", "--activation_checkpointing"]
    args = make_parser().parse_args([*line, *FORMS[form]])
    train.fill_in(args, PRESETS[preset], None)
    rows = args.max_tokens // train.PAPER_LENGTH
    needed = sum(estimate(args, build(args, PRESETS[preset]), rows, train.PAPER_LENGTH).values()) / 1e9
    card = next((f"{size} GB" for size in CARDS if needed + 0.5 <= size), "none")
    return f"{needed:.1f}: {card}"


def print_table() -> None:
    columns = [(method, form) for method in ("spp", "masked") for form in FORMS]
    print(f"| | {' | '.join(f'`{method}`, {form}' for method, form in columns)} |", "|---" * 7 + "|", sep="\n")
    for preset in ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-2-70b"):
        print(f"| {preset} | {' | '.join(cell(preset, *column) for column in columns)} |", flush=True)


def make_parser() -> Parser:
    parser = train.make_parser()
    parser.description = "Print what each process of a run of train.py would need, and how long the run is."
    parser.add_argument("--processes", type=number(int, 1), default=1, help="of the run")
    zeros = "share of zeros in the linears of a --preset with --packed"
    parser.add_argument("--zeros", type=number(float, 0, high=1), default=0.5, help=zeros)
    return parser


def main():
    if sys.argv[1:] == ["--table"]:
        return print_table()
    parser = make_parser()
    args = parser.parse_args()
    args.device = "cpu"  # whatever was given: no device is used
    train.check_settings(argparse.Namespace(**{**vars(args), "preset": None}))  # shapes need no mask
    ckpt, config = open_llama(args.ckpt) if args.ckpt else (None, PRESETS[args.preset])
    train.fill_in(args, config, ckpt)
    if args.zeros != parser.get_default("zeros") and (not args.packed or ckpt):
        raise UserError("--zeros: goes with --preset and --packed")
    if ckpt is not None:
        args.zeros = sparsity_of(ckpt["model.layers.0.mlp.up_proj.weight"])[0]  # as a sample of all
    data = None
    if (Path(args.data) / "train.npy").exists():
        data, _ = train.read_data(args, config, ckpt, args.processes)
    model = build(args, config)

    # --- the micro-batches: all of an epoch, or without data one of the paper's
    shapes = [(max(1, args.max_tokens // train.PAPER_LENGTH), min(train.PAPER_LENGTH, args.max_tokens))]
    if data is not None:
        plan = train.Plan(len(data.lengths), args.batch_size, args.epochs, args.seed)
        steps = min(plan.steps, plan.steps_per_epoch)
        targets, padded, shapes = 0, 0, []
        for step in range(steps):
            shares = train.split_batch(plan[step], data.lengths, args.max_tokens, args.processes)
            targets += int(data.n_targets[plan[step]].sum())
            padded += sum(train.padded_tokens(share, data.lengths) for share in shares)
            shapes += [(len(part), int(data.lengths[part[0]])) for parts in shares for part in parts if part]
    rows, T = max(shapes, key=math.prod)

    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in train.build(args, config).parameters())  # zeros counted
    print(f"trainable parameters   {learning:,} ({100 * learning / total:.3f}% of {total:,})")
    print(f"memory of each process  ({args.processes} in all, micro-batches of up to {rows} x {T} tokens)")
    needs = estimate(args, model, rows, T)
    for name, size in [*needs.items(), ("together", sum(needs.values()))]:
        print(f"  {name:<22} {size / 1e9:9.3f} GB")
    print("  beside it: Python and PyTorch, about 0.3 GB on a CPU; the driver's context, about 0.5 GB, on a GPU")
    if data is None:
        print(f"steps, tokens, padding: no prepared data in {args.data}")
    else:
        print(f"steps                  {plan.steps:,} of {plan.batch_size} examples")
        print(f"target tokens          {int(targets * plan.steps / steps):,}")
        print(f"estimated padding      {100 * (1 - targets / padded):.1f}% of the tokens computed")


if __name__ == "__main__":
    cli(main)
