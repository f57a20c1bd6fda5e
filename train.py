"""The fine-tuning loop (section 4 of the paper): pruned LLaMA in, adapter and merged sparse LLaMA out.

One process, a laptop or one GPU:
    python train.py --ckpt pruned.pt
Eight GPUs of one machine, each with the whole model (DDP); with --fsdp each holds an eighth of it, for 30B and up:
    torchrun --nproc_per_node=8 train.py --ckpt pruned.pt
    torchrun --nproc_per_node=8 train.py --ckpt pruned-70b --fsdp --activation_checkpointing
Two machines of eight, the first reachable as 10.0.0.1 (add NCCL_IB_DISABLE=1 in front where there is no Infiniband):
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py --ckpt ...
    torchrun --nnodes=2 --node_rank=1 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py --ckpt ...

The defaults are the paper's, by the model's size (`PAPER`), and the learning rate is that of the method, the width and
the number of steps (`default_lr`); bench/memory.py says what a run would need. `main` is the whole run, from settings
to merged.pt; what it calls stands below it. With --resume the same command goes on where a run was stopped, and starts
from the beginning where nothing was saved yet.

What differs from the authors' script. The examples of a global batch are sorted by length and cut into micro-batches
of equal work, instead of drawn at random and padded to the longest. The gradient is the same, since the loss is the
mean over all target tokens of the global batch however they are cut, and on Alpaca-format instructions half as many
positions are computed (bench/padding.py). The frozen weights are bfloat16 where the checkpoint is float16, so that no
loss scaling is needed; merging takes them from the checkpoint, unrounded. A validation measures what merging would
write: weights rounded to the checkpoint's dtype, LoRA's and --method dynamic's under their masks.

What a run leaves in --out_dir: config.json (settings, versions, data), log.jsonl (a line per step), step-*.pt (the
newest two states), adapter.pt (the adapter of the lowest validation loss after the start) and merged.pt, the checkpoint
with that adapter merged. `--method full` trains the model itself, in float32: no adapter, and merged.pt holds the last
weights, in the checkpoint's dtype. A loss that is not finite ends the run before anything but the log sees it.
"""

import argparse
import bisect
import contextlib
import functools
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.checkpoint import VERSION, Checkpoint, UserError, atomic, check_out, check_tensors, check_version
from data.checkpoint import checked_file, digest, lock, read_json, read_npy, save_torch, torch_load, write_checkpoint
from data.checkpoint import write_json
from data.tokenizer import load_tokenizer
from model import PRESETS, Llama, LlamaConfig, Parser, add_device, check_device, cli, common_dtype, cut_into_batches
from model import from_weights, is_first_process, join_processes, number, open_llama, save, sparsity_of, tokenizer_of
from model import world_size
from prune import Pattern, check_pattern, keep_mask, parse_sparsity, sparsity_of_linear
from spp import METHODS, AdapterLinear, DynamicLinear, SPPLinear, adapter_state, check_compile, compile_error, inject
from spp import merge_checkpoint, write_adapter

# Section 4 and the authors' scripts, by billions of parameters; a model of another size takes the nearest row.
#          lr    micro-batch  global batch  epochs
PAPER = {
    6.7: (4e-3, 8, 128, 3.0),
    13.0: (2e-3, 4, 128, 3.0),
    32.5: (4e-3, 16, 256, 3.0),
    65.3: (5e-4, 8, 128, 1.0),
    69.0: (5e-4, 8, 128, 1.0),
}
PAPER_LENGTH = 512  # tokens; so a micro-batch of 8 is at most 4,096 padded tokens
PAPER_RECORDS = 50_002  # of Alpaca, without the 2,000 that are held out

# For `default_lr`: the peak learning rate at a width of 4,096, and the power with which it rises for narrower models
LR = {
    "spp": (None, 0.65),  # the paper's, by size
    "lora": (2e-4, 0.9),  # QLoRA's for 7B
    "masked_lora": (2e-4, 0.9),
    "full": (2e-5, 0.95),  # as Alpaca was fine-tuned
    "dynamic": (2e-5, 1.2),
    "masked": (2e-5, 1.4),
    "pretraining": (3e-4, 0.9),  # LLaMA's
}


def make_parser() -> Parser:
    parser = Parser(description="Fine-tune a pruned LLaMA with SPP (or a baseline) and merge the result.")
    add = parser.add_argument
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--ckpt", help="the pruned model: a .pt file, a Hugging Face directory or a Meta directory")
    start.add_argument("--preset", choices=PRESETS, help="this shape with random weights, to pretrain")
    add("--tokenizer", help="with --preset: the tokenizer that the data was prepared with")
    add("--data", default="data/alpaca", help="folder that data/alpaca/prepare.py wrote")
    add("--out_dir", default="out/spp", help="where the run's files go")
    # the method
    add("--method", default="spp", choices=(*METHODS, "full"), help="what learns; full: every weight, without a mask")
    add("--rank", type=number(int, 1), default=16, help="rows of alpha (SPP), or the rank of LoRA")
    add("--scale", type=number(float, above=0), default=2.0, help="the paper's s")
    add("--no_beta", action="store_true", help="SPP without beta (Table 4)")
    # not both: then neither would ever get a gradient
    add("--zero_init", default="beta", choices=("beta", "alpha", "none"), help="the factor that starts at 0 (Table 8)")
    add("--no_residual", action="store_true", help="multiply W by the factors in place of adding W~ (Remark 1)")
    add("--matmul", default="fused", choices=("fused", "chunked", "repeat"), help="SPP's form: see spp.py")
    add("--sparsity", help="dynamic: the pattern to keep, such as 2:4")
    add("--mask_interval", type=number(int, 1), default=10, help="dynamic: steps between two masks")
    # the optimizer; the paper's values, where there is no default by size
    add("--lr", type=number(float, above=0), help="peak learning rate (default: by method, width and steps)")
    add("--batch_size", type=number(int, 1), help="examples in a step, over all processes (default: the paper's)")
    add("--epochs", type=number(float, above=0, high=1e6), help="passes over the training data (default: the paper's)")
    add("--max_tokens", type=number(int, 1), help="padded tokens in a micro-batch (default: the paper's batch x 512)")
    add("--weight_decay", type=number(float, 0), default=0.001, help="of AdamW")
    add("--warmup", type=number(float, 0, high=1), default=0.03, help="share of the steps in which the rate rises")
    add("--grad_clip", type=number(float, 0), default=1.0, help="largest norm of the gradient; 0: none")
    add("--mask_prompt", action="store_true", help="learn the answers alone, not the prompts")
    add("--seed", type=number(int, 0), default=0, help="of what starts random, and of the order of the data")
    # the machine
    add_device(parser)
    dtype = "of frozen weights and of matmuls; auto: float32 for a float32 checkpoint, bfloat16 for any other"
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help=dtype)
    add("--packed", action="store_true", help="hold sparse weights as survivors and bits: less memory, a little slower")
    add("--fsdp", action="store_true", help="shard the model over the processes (FSDP2)")
    add("--activation_checkpointing", action="store_true", help="keep only the blocks' inputs, recompute the rest")
    add("--compile", action="store_true", help="torch.compile each block")
    # the run
    add("--eval_interval", type=number(int, 1), default=200, help="steps between validations")
    add("--save_interval", type=number(int, 1), default=200, help="steps between saved states")
    add("--resume", action="store_true", help="go on from the newest state in --out_dir, if there is one")
    return parser


def main() -> None:
    # --- settings, data and the model's shapes: what is wrong with them is said before the run's folder is touched
    args = make_parser().parse_args()
    check_settings(args)
    world = world_size()
    if args.ckpt:
        ckpt, config = open_llama(args.ckpt)
    else:
        ckpt, config = None, PRESETS[args.preset]
    fill_in(args, config, ckpt)
    train, val = read_data(args, config, ckpt, world)
    model = build(args, config)  # on the meta device: under FSDP no process ever holds all of it
    plan = Plan(len(train.lengths), args.batch_size, args.epochs, args.seed)
    lr_source = None
    if args.lr is None:  # not before the number of steps is known
        args.lr, lr_source = default_lr(args.method if args.ckpt else "pretraining", config, plan.steps)

    # --- the folder of the run, which rank 0 alone reads, locks and writes. It does so before the processes join: an
    # error is then a single process that ends, and torchrun ends the others.
    out_dir = Path(args.out_dir)
    state = None
    # start: steps done; first: the validation loss before the run; best: that of what merged.pt will hold
    start, first, best = 0, math.inf, math.inf  # inf: none yet
    base = run_id = None  # what the adapter belongs to, and the states: rank 0 alone knows and writes it
    if is_first_process():
        check_compiler(args)
        args.resume = args.resume or restarted(out_dir)
        base = ckpt.fingerprint() if args.ckpt else args.preset
        run_id, run_lock = open_run(out_dir, args, plan.steps, base, world)  # noqa: F841  held until the process ends
        if args.resume:
            state = newest_state(out_dir, model, run_id, plan.steps)
        if state:
            start, first, best = state["step"], state["first"], state["best"]
    rank, world = join_processes(args.device)
    if world > 1:
        progress = [start, first, best]  # the others wait for what rank 0 has found, so that all resume, or none does
        dist.broadcast_object_list(progress)
        start, first, best = progress
    mesh = init_device_mesh(args.device, (world,)) if args.fsdp and world > 1 else None
    log = tqdm.write if rank == 0 else lambda text: None
    log_start(log, args, ckpt, lr_source, plan, world)

    # --- model and optimizer
    torch.manual_seed(args.seed)  # of a --preset's weights
    materialise(model, ckpt if args.ckpt else Llama(config).state_dict(), args.seed, args.device, mesh, args.packed)
    if args.packed and not list(model.buffers()):  # no layer has bits
        log(f"note: --packed: {args.ckpt} has too few zeros for it to save memory; its weights are held dense")
    if args.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)  # micro-batches differ in length
    learning = [p for p in model.parameters() if p.requires_grad]
    fused = args.device == "cuda"  # one kernel, where the default makes temporaries as large as what learns
    optimizer = torch.optim.AdamW(learning, lr=args.lr, weight_decay=args.weight_decay, fused=fused)
    net = model  # what learns; `model`, the same without a wrapper, is validated and saved
    if world > 1 and mesh is None:
        # Masks and --packed's bits are the same everywhere. Since torch 2.13 the flag that says so has another name.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        net = DistributedDataParallel(model, **{"forward_sync_buffers" if new else "broadcast_buffers": False})
    if start > 0:
        restore(model, optimizer, state, world)
        state = None  # with the method "full" it is three times the model
        log(f"resuming after step {start} of {plan.steps}")

    # --- the loop
    stop = catch_signals()
    log_path = os.devnull
    if rank == 0:
        log_path = out_dir / "log.jsonl"
        trim_log(log_path, start if start > 0 else -1)  # from the beginning: not even step 0's line stays
    log_file = open(log_path, "a", buffering=1)  # noqa: SIM115  open to the end, written a line at a time
    if start == 0:
        if args.method == "dynamic":
            update_masks(model, parse_sparsity(args.sparsity))  # or step 0 would be that of the dense model
        val_loss = validation_loss(model, val, args, ckpt, rank, world)
        write_line(log_file, {"step": 0, "val_loss": val_loss})
        log(f"step 0: validation loss {shown(val_loss)}")
        check_finite(0, {"validation loss": val_loss}, ckpt)
        if val_loss is not None:
            first = val_loss
            if args.zero_init == "none":  # random factors have changed the pruned model already
                first = pruned_loss(model, val, args, ckpt, rank, world)
    bar = tqdm(range(start, plan.steps), initial=start, total=plan.steps, disable=None if rank == 0 else True)
    for step in bar:
        started = time.perf_counter()
        if args.method == "dynamic" and step % args.mask_interval == 0:
            update_masks(model, parse_sparsity(args.sparsity))
        lr = learning_rate(step, plan.steps, args.warmup, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The gradient of the mean over all target tokens of the global batch. DDP and FSDP take the mean over the
        # processes where we want the sum, hence the factor `world`.
        examples = plan[step]  # every process cuts it alike and takes its own list: nothing has to be sent
        micro_batches = split_batch(examples, train.lengths, args.max_tokens, world)[rank]
        n_targets = int(train.n_targets[examples].sum())
        loss_sum = torch.zeros((), dtype=torch.float64, device=args.device)  # float64: of thousands of tokens
        for i, indices in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            if mesh is not None:
                # Processes exchange gradients once a step, after the last micro-batch. Until they do each holds them
                # unsharded: of `masked` that is the whole model, so there they are exchanged every time.
                model.set_requires_gradient_sync(last or args.method == "masked")
            elif world > 1:
                net.require_backward_grad_sync = last
            batch = train.batch(indices, args.device)
            with autocast(args):
                summed = net(*batch)
            # At once, so that no more than one micro-batch's activations are alive
            (summed * (world / max(1, n_targets))).backward()
            loss_sum += summed.detach()

        clip = args.grad_clip if args.grad_clip > 0 else math.inf  # inf: nothing is clipped, and the norm is returned
        grad_norm = nn.utils.clip_grad_norm_(learning, clip)
        if mesh is not None:  # under FSDP each process has the norm of its shards
            grad_norm = grad_norm.full_tensor()
        # What all processes must agree on, in one exchange: the loss, and whether any of them was asked to stop. From
        # here on the device is waited for, once a step.
        sums = torch.stack([loss_sum, loss_sum.new_tensor(len(stop))])
        if world > 1:
            dist.all_reduce(sums)
        loss = sums[0].item() / n_targets if n_targets else None  # with --mask_prompt a batch may have no target
        stopping = sums[1].item() > 0
        grad_norm = grad_norm.item()
        check_finite(step + 1, {"loss": loss, "norm of the gradient": grad_norm}, ckpt)  # before the optimizer sees it
        if n_targets:  # without a target the gradient is 0, but decay and AdamW's moments would move the weights
            optimizer.step()
        optimizer.zero_grad()

        done = step + 1 == plan.steps
        speed = n_targets / (time.perf_counter() - started)
        line = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        line.update(tokens=n_targets, tokens_per_second=speed, peak_memory=peak_memory(args.device))
        write_line(log_file, line)
        bar.set_postfix_str(f"loss {shown(loss)}, {speed:,.0f} tokens/s")

        if done or (step + 1) % args.eval_interval == 0:
            val_loss = validation_loss(model, val, args, ckpt, rank, world)
            write_line(log_file, {"step": step + 1, "val_loss": val_loss})
            log(f"step {step + 1}: training loss {shown(loss)}, validation loss {shown(val_loss)}")
            check_finite(step + 1, {"validation loss": val_loss}, ckpt)
            lowest = val_loss is None or val_loss < best  # None: nothing is held out, and the newest is taken
            if val_loss is not None and (lowest or args.method == "full"):  # full: its last weights are what is written
                best = val_loss
            if lowest and args.method != "full":
                factors = adapter_state(model)  # gathered from all processes under FSDP, so all of them call it
                if rank == 0:
                    path = out_dir / "adapter.pt"
                    write_adapter(path, factors, base, args.method, args.rank, args.scale, ablations(args))

        saving = done or stopping or (step + 1) % args.save_interval == 0
        # Before the first update there are no moments yet, and the library would make some by calling step() itself.
        if saving and optimizer.state:
            learned = gathered(model, optimizer)  # as above, all of them call it
            if rank == 0:
                write_state(out_dir, {"run": run_id, "step": step + 1, "first": first, "best": best, **learned})
            if world > 1:
                dist.barrier()  # nobody leaves, and torchrun ends nobody, before the state is on disk
        if stopping and not done:
            log(f"stopped after step {step + 1} of {plan.steps}; the same command with --resume goes on from there")
            sys.exit((128 + stop[0]) if stop else 1)  # as a shell says it; 1: another process got the signal

    # --- the result. The processes part first, so that none waits, and gives up, while rank 0 merges a 70B.
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        write_result(out_dir, model, ckpt, base, args, plan.steps)
        if first <= best < math.inf:  # inf: nothing is held out
            which = "its last weights" if args.method == "full" else "the best of it"
            log(f"note: the run only harmed: validation loss {first:.4f} before, {best:.4f} in merged.pt, {which}")


# ----------------------------------------------------------------------------------------------------------------------
# settings


def check_settings(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other, or that the method would ignore."""
    if args.tokenizer and args.ckpt:
        raise UserError("--tokenizer: goes with --preset; a checkpoint has its own, or is given one by model.py")
    if args.preset and args.method != "full":
        raise UserError("--preset: random weights have no mask; only --method full trains them")
    if args.fsdp and args.method in ("full", "dynamic"):
        why = "is saved from the live weights" if args.method == "full" else "has masks beside its weights"
        raise UserError(f"--fsdp: does not go with --method {args.method}, which {why}, and needs them whole")
    if args.packed:
        refused = (
            ("--fsdp", args.fsdp, "cuts a weight by rows, and rows have different numbers of survivors"),
            (f"--method {args.method}", args.method in ("full", "dynamic"), "lets zeros learn"),
            (f"--matmul {args.matmul}", args.matmul != "fused", "keeps the dense weight for the backward pass"),
            ("--compile", args.compile and args.method != "spp", "may keep the dense weights of this --method"),
        )
        for flag, given, why in refused:
            if given:
                raise UserError(f"--packed: does not go with {flag}, which {why}")
    if args.method == "dynamic" and not args.sparsity:
        raise UserError("--method dynamic: needs --sparsity, the pattern to keep")
    check_device(args.device)
    ignored = []
    if args.method != "spp":
        ignored += ["no_beta", "zero_init", "no_residual", "matmul"]
    if args.method != "dynamic":
        ignored += ["sparsity", "mask_interval"]
    if args.method in ("full", "masked", "dynamic"):  # which learn the weights themselves
        ignored += ["rank", "scale"]
    if args.no_residual:  # the factors then start at 1, and stand for all of W
        ignored += ["scale", "zero_init"]
    if args.no_beta:
        ignored += ["zero_init"]
    parser = make_parser()
    for key in ignored:
        if getattr(args, key) != parser.get_default(key):
            beside = [f" --{flag}" for flag in ("no_residual", "no_beta") if getattr(args, flag)]
            given = "".join(beside) if args.method == "spp" else ""
            raise UserError(f"--{key}: means nothing to --method {args.method}{given}")


def check_compiler(args: argparse.Namespace) -> None:
    """Refuses --compile where torch.compile does not work, and says so where SPP has to do without its kernels."""
    kernels = args.device == "cuda" or args.dtype == "bfloat16"
    kernels &= args.method == "spp" and args.matmul == "fused"
    if args.compile:
        check_compile(args.device)
    elif kernels and (error := compile_error(args.device)):
        tqdm.write(f"note: torch.compile does not work on this machine, so SPP is slower than it could be: {error}")


def log_start(
    log: Callable, args: argparse.Namespace, ckpt: Checkpoint | None, lr_source: str | None, plan: "Plan", world: int
) -> None:
    """Says how sparse the checkpoint is, where the learning rate comes from, and what may be an oversight."""
    if ckpt is not None:
        zeros, pattern = sparsity_of(ckpt["model.layers.0.mlp.up_proj.weight"])  # as a sample of all
        stay = "; they stay" if args.method not in ("dynamic", "full") else ""
        log(f"{args.ckpt}: {zeros:.1%} zeros ({pattern or 'unstructured'}) in layers.0.mlp.up_proj, for one{stay}")
        if stay and zeros < 0.01:
            log(f"note: {args.ckpt} has no zeros there; if it is dense, so the result will be: prune.py comes first")
        if ckpt.tokenizer is None:
            lacks = "so nothing tells whether --data fits it, and merged.pt will have none"
            log(f"note: {args.ckpt} has no tokenizer, {lacks}; model.py --tokenizer adds one")
    if lr_source:
        log(f"--lr {args.lr:g}: to one digit {lr_source}")
    if plan.steps < 100 and plan.batch_size > world:
        few = f"note: {plan.steps} step{'s' * (plan.steps > 1)} of {plan.batch_size} examples"
        log(f"{few}: below about 100, a smaller --batch_size and so more steps make more of the same data")


def fill_in(args: argparse.Namespace, config: LlamaConfig, ckpt: Checkpoint | None) -> None:
    """Fills in the flags that were not given, with the paper's values for a model of this size; but for --lr, which
    depends on the data too (`default_lr`)."""
    _, micro_batch, batch_size, epochs = PAPER[paper_size(config)]
    defaults = {"batch_size": batch_size, "epochs": epochs, "max_tokens": micro_batch * PAPER_LENGTH}
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    # With several dtypes merging would write several again, which evaluate.py refuses.
    stored = common_dtype(ckpt) if ckpt is not None else torch.float32
    if args.dtype == "auto":
        args.dtype = "float32" if stored == torch.float32 else "bfloat16"


def paper_size(config: LlamaConfig) -> float:
    """The row of PAPER that is nearest to a model of this shape."""
    with torch.device("meta"):
        billions = sum(p.numel() for p in Llama(config).parameters()) / 1e9
    return min(PAPER, key=lambda size: abs(math.log(size / billions)))


def default_lr(method: str, config: LlamaConfig, steps: int) -> tuple[float, str]:
    """The peak learning rate of a run of so many steps, to one digit, and where it comes from.

        base * (4096 / width)^power * (the paper's steps / steps)^(1/4)       no factor is below 1

    At LLaMA-7B's width or above and the paper's steps (1,173, at 30B 588, from 65B on 391) it is `base` (`LR`). The
    powers are fitted to the best rates at widths of 48, 96 and 192 and 20 to 1,000 steps (bench/rates.py): each default
    is within a factor of 2 of the best there, but for LoRA's and full's at a width of 48 and 1,000 steps, 5 times too
    high and 20 times too low. In between only SmolLM2-135M (width 576) was looked at. A method of your own takes SPP's.
    """
    size = paper_size(config)
    paper_lr, _, batch_size, epochs = PAPER[size]
    base, power = LR.get(method, LR["spp"])
    source = f"the usual {base} for {method}"
    if base is None:
        base = paper_lr
        source = f"the paper's {base} for {size}B"
        if method not in LR:
            source += f", SPP's, since LR has none for {method}"
    narrow = max(1, 4096 / config.hidden_size) ** power
    short = max(1, math.ceil(PAPER_RECORDS / batch_size) * epochs / steps) ** (1 / 4)
    if narrow > 1:
        source += f", x {narrow:.1f} for a width of {config.hidden_size}"
    if short > 1.05:  # a few records more or less than the paper's do not show in one digit
        source += f", x {short:.1f} for {steps} steps"
    return float(f"{base * narrow * short:.0e}"), source


# ----------------------------------------------------------------------------------------------------------------------
# data: examples end to end in one array, and how a global batch is cut


class Examples:
    """A split of prepared data: `tokens` of all examples end to end, `offsets` (N + 1,), `prompt` lengths (N,),
    `lengths` (N,), the positions that each example computes, and `n_targets` (N,), the tokens that it predicts.

    UserError where the files do not fit together, and for a token that is none of the vocabulary's.
    """

    SUFFIXES = ("", ".offsets", ".prompt")  # of its files' names

    def __init__(self, folder: str | Path, split: str, mask_prompt: bool = False, vocab_size: int = 2**31):
        def read(suffix: str) -> np.ndarray:
            path = Path(folder) / f"{split}{suffix}.npy"
            if not path.exists():
                what = f"has no {path.name}" if Path(folder).is_dir() else "is no folder"
                raise UserError(f"--data {folder}: {what}; run data/alpaca/prepare.py")
            array = read_npy(path)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise UserError(f"--data {path}: holds {array.dtype} of shape {array.shape}, expected a row of ints")
            return array

        self.tokens, self.offsets, self.prompt = map(read, self.SUFFIXES)
        n = len(self.offsets) - 1
        if n < 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens) or len(self.prompt) != n:
            raise UserError(f"--data {folder}: {split}.offsets.npy and {split}.prompt.npy do not fit {split}.npy")
        self.lengths = np.diff(self.offsets.astype(np.int64)) - 1  # a position predicts the next token: one less
        if n and self.lengths.min() < 1:
            raise UserError(f"--data {folder}: example {self.lengths.argmin()} of {split} has fewer than 2 tokens")
        prompt = self.prompt.astype(np.int64)
        if n and (prompt.min() < 0 or (prompt > self.lengths + 1).any()):
            raise UserError(f"--data {folder}: {split}.prompt.npy holds a prompt longer than its example, or below 0")
        self.skipped = np.maximum(prompt - 1, 0) if mask_prompt else np.zeros(n, np.int64)  # targets in the prompt
        self.n_targets = self.lengths - self.skipped
        if n and not 0 <= self.tokens.min() <= self.tokens.max() < vocab_size:
            bad = self.tokens.max() if self.tokens.max() >= vocab_size else self.tokens.min()
            raise UserError(
                f"--data {folder}: token id {bad} is not among the model's {vocab_size}; was another tokenizer used?"
            )

    def batch(self, indices: list[int], device: str) -> tuple[Tensor, Tensor, Tensor]:
        """What `Llama.forward` takes, int64: right-padded tokens (B, T); targets (N,); where in the flattened tokens
        they are to be predicted (N,): a GPU that had to find these places itself would have to be waited for.

        No attention mask is needed: attention is causal, so real positions never see the padding after them.
        An empty list gives one padded position: a process without work still takes part in every collective.
        """
        T = max((self.lengths[i] for i in indices), default=1)
        tokens = np.zeros((max(1, len(indices)), T), dtype=np.int64)
        targets, where = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for row, i in enumerate(indices):
            example = self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)
            tokens[row, : len(example) - 1] = example[:-1]
            targets.append(example[1:][self.skipped[i] :])
            where.append(row * T + np.arange(self.skipped[i], len(example) - 1))
        batch = [torch.from_numpy(x) for x in (tokens, np.concatenate(targets), np.concatenate(where))]
        if device == "cuda":  # from pinned memory the copies run beside the work before, and nobody waits for them
            batch = [x.pin_memory() for x in batch]
        return tuple(x.to(device, non_blocking=True) for x in batch)


def read_data(
    args: argparse.Namespace, config: LlamaConfig, ckpt: Checkpoint | None, world: int
) -> tuple[Examples, Examples]:
    """The training and the held-out examples. UserError where they are not this model's or leave a process idle."""
    data = Path(args.data)
    train = Examples(data, "train", args.mask_prompt, config.vocab_size)
    val = Examples(data, "val", args.mask_prompt, config.vocab_size)
    tokenizer = tokenizer_of(ckpt) if ckpt is not None else None
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer:
        meta = read_json(data / "meta.json", dict)
        check_version(meta.get("version"), data / "meta.json")
        if meta.get("tokenizer") != tokenizer.fingerprint:
            raise UserError(f"--data {data}: was prepared with another tokenizer than the model's; prepare it again")
    if not len(train.lengths):
        raise UserError(f"--data {data}: holds no training example")
    if not train.n_targets.any():
        raise UserError(f"--data {data}: no example has a token to learn: --mask_prompt, and every answer was cut away")
    longest = int(max(train.lengths.max(), val.lengths.max(initial=0)))
    config.check_length(longest, f"--data {data}: its longest example")
    if longest > args.max_tokens:
        raise UserError(f"--max_tokens {args.max_tokens}: the longest example of {data} computes {longest}")
    if min(args.batch_size, len(train.lengths)) < world:
        raise UserError(f"--batch_size {args.batch_size}: fewer examples than the {world} processes")
    return train, val


class Plan:
    """Which examples step s sees: a function of the seed and s alone, so that resuming needs no more than s."""

    def __init__(self, n: int, batch_size: int, epochs: float, seed: int):
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self.steps_per_epoch = math.ceil(n / self.batch_size)
        self.steps = max(1, round(self.steps_per_epoch * epochs))

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, i = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        return order[i * self.batch_size : (i + 1) * self.batch_size]


# What a micro-batch costs whatever its length (forming W^ and reducing G), as the number of tokens that take as long:
# about 15 on a CPU in float32 and 100 in bfloat16 (measured, bench/linear.py), 500 on an H100 (counted: 12 bytes a
# weight through its memory). One number between them, so that the cut, and with it rounding, does not depend on the
# device.
FIXED_COST = 250


def split_batch(indices: np.ndarray, lengths: np.ndarray, max_tokens: int, world: int) -> list[list[list[int]]]:
    """Cuts a global batch into micro-batches, a list of them for each process.

    Sorted by length, examples that lie together pad little. Every process gets the same number of micro-batches, since
    FSDP's collectives wait for each other. Their number is the multiple of `world` of the least work: padded tokens,
    and FIXED_COST for each micro-batch. Given a number, the cut is the most even one (`lowest_limit`).
    """
    indices = np.sort(indices)  # so that the cut does not depend on their order
    sizes = lengths[indices].tolist()
    count = world * math.ceil(len(cut_into_batches(sizes, max_tokens)) / world)
    least, parts = math.inf, []
    while sum(sizes) + count * FIXED_COST < least:  # more of them would be more work even if none had padding
        cut = cut_into_batches(sizes, lowest_limit(sizes, count, max_tokens))
        work = padded_tokens(cut, sizes) + count * FIXED_COST
        if work < least:
            least, parts = work, cut
        count += world
    parts = [[int(indices[i]) for i in part] for part in parts]
    parts += [[]] * (-len(parts) % world)  # empty ones, where some process would have one less
    # Neighbours are of about the same length: taken in turn, they give the processes equal work at the same time.
    return [parts[rank::world] for rank in range(world)]


def padded_tokens(micro_batches: list[list[int]], lengths: Sequence[int]) -> int:
    """Positions that are computed: each micro-batch is padded to its longest example."""
    return sum(len(part) * max((int(lengths[i]) for i in part), default=0) for part in micro_batches)


def lowest_limit(sizes: list[int], count: int, max_tokens: int) -> int:
    """The lowest limit under which sequences of these sizes are cut into at most `count` batches."""
    limits = range(max(sizes), max_tokens)  # if none of them will do, max_tokens
    few_enough = lambda limit: len(cut_into_batches(sizes, limit)) <= count  # False, ..., False, True, ..., True
    return limits.start + bisect.bisect_left(limits, True, key=few_enough)


# ----------------------------------------------------------------------------------------------------------------------
# the model: shapes first, then weights, whole or sharded


def ablations(args: argparse.Namespace) -> dict:
    """The ablations of SPP that the command asks for, as SPPLinear takes them; empty for SPP itself."""
    given = {"beta": not args.no_beta, "zero_init": args.zero_init, "residual": not args.no_residual}
    return {key: value for key, value in given.items() if value not in (True, "beta")}


def build(args: argparse.Namespace, config: LlamaConfig) -> Llama:
    """The model with its adapters on the meta device: shapes without memory. UserError where they do not fit it."""
    if args.sparsity:
        check_pattern(parse_sparsity(args.sparsity), config)
    with torch.device("meta"):
        # full: float32, since a step of 2e-5 is less than half a unit in the last place of most bfloat16 weights
        model = Llama(config).to(torch.float32 if args.method == "full" else getattr(torch, args.dtype))
        if args.method == "spp":
            inject(model, "spp", args.rank, args.scale, matmul=args.matmul, **ablations(args))
        elif args.method != "full":
            inject(model, args.method, args.rank, args.scale)
    model.activation_checkpointing = args.activation_checkpointing
    return model


def materialise(
    model: Llama, weights: Mapping, seed: int, device: str, mesh: DeviceMesh | None = None, packed: bool = False
) -> None:
    """Fills a meta model: adapters drawn from the seed, everything else from `weights` (name -> tensor). packed: the
    linears with an adapter hold their survivors alone, and the dense model is never in memory.

    With a mesh the blocks and the root become FSDP units, every tensor sharded by rows, and a process touches its rows
    of the memory-mapped checkpoint alone.
    """
    # Adapters are drawn whole, on the CPU, before they are sharded, so that the start of a run does not depend on the
    # number of processes, or on the device.
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, AdapterLinear) and module.factors:
            for name in module.factors:
                meta = getattr(module, name)
                setattr(module, name, nn.Parameter(torch.empty_like(meta, device="cpu"), meta.requires_grad))
            module.reset_parameters()
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        for block in model.model.layers:  # gathered when its turn comes, and freed after it
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    state = {}
    for name, p in model.state_dict().items():
        if name in weights:
            w = weights[name]
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, AdapterLinear):
                module.merged_dtype = w.dtype
                if packed and module.pack(w.to(p.dtype)):
                    module.to(device)
                    continue
            state[name] = w.to(device, p.dtype) if mesh is None else shard_rows(w, mesh, device, p.dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, DynamicLinear):
            module.mask = torch.ones_like(module.weight, dtype=torch.bool)
    if mesh is None:
        model.to(device)


def shard_rows(w: Tensor, mesh: DeviceMesh, device: str, dtype: torch.dtype) -> Tensor:
    """This process's rows of a weight, as FSDP2 cuts it: a DTensor."""
    from torch.distributed.tensor import DTensor, Shard

    chunks = w.chunk(mesh.size())  # the last may be shorter, or missing
    rank = mesh.get_local_rank()
    rows = chunks[rank] if rank < len(chunks) else w[:0]
    rows = rows.to(device, dtype, copy=True)  # a copy: the rows are a view of the mapped file
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=w.shape, stride=w.stride())


def update_masks(model: Llama, sparsity: Pattern) -> None:
    """Equation 2: every dynamic layer's mask follows the magnitude of its dense weight, within a row or M of one."""
    for name, module in model.named_modules():
        if isinstance(module, DynamicLinear):
            module.mask.copy_(keep_mask(module.weight.detach().abs(), sparsity_of_linear(sparsity, name)))


# ----------------------------------------------------------------------------------------------------------------------
# the run's folder: config.json, states, log


# What may differ when a run goes on: none of these but lr moves the result by more than rounding. The checkpoint and
# the data are compared by fingerprint, not by name; eval_interval is not here: it decides which adapter is kept.
MAY_DIFFER = ("resume", "out_dir", "data", "ckpt", "device", "max_tokens", "save_interval")
MAY_DIFFER += ("fsdp", "activation_checkpointing", "compile")
MAY_DIFFER += ("lr",)  # so that a run that diverged can go on with a lower one


def restarted(out_dir: Path) -> bool:
    """Whether torchrun (--max_restarts) has started this command again, and itself began the run in this folder."""
    file = out_dir / "config.json"
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and file.exists() and read_json(file, dict).get("parent") == os.getppid()


def open_run(out_dir: Path, args: argparse.Namespace, steps: int, base: str, world: int) -> tuple[str, object]:
    """Locks the folder, and writes config.json for a new run or holds it against this command for a resumed one.
    Returns the run's identity, which its states carry, and the lock."""
    if not args.out_dir or os.path.realpath(out_dir) == os.path.realpath(args.data):
        raise UserError(f"--out_dir {args.out_dir!r}: name a folder of its own for the run")
    check_out(out_dir / "merged.pt", "--out_dir", [path for path in (args.ckpt, args.tokenizer) if path])
    file = out_dir / "config.json"
    names = ["config.json", "adapter.pt", "merged.pt", "log.jsonl", *(path.name for _, path in saved_states(out_dir))]
    for name in names:
        if not (out_dir / name).exists():
            continue
        if not args.resume:
            raise UserError(f"--out_dir {out_dir}: holds {name}; --resume continues a run, or name another folder")
        if not file.exists() and not name.startswith("step-"):  # config.json comes first; a state says whose it is
            raise UserError(f"--out_dir {out_dir}: holds {name}, and no config.json of a run; name another folder")
    held = lock(out_dir)
    files = [f"{split}{suffix}.npy" for split in ("train", "val") for suffix in Examples.SUFFIXES]
    data = digest(*(read_npy(Path(args.data) / name) for name in files))
    config = {"version": VERSION, "settings": vars(args), "steps": steps, "base": base, "data": data}
    same = {key: value for key, value in vars(args).items() if key not in MAY_DIFFER}
    config["run"] = digest(same, base, data)
    config["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    config.update(world_size=world, parent=os.getppid())  # the parent: see `restarted`
    if not file.exists():  # with --resume too: nothing was saved yet
        write_json(file, config)
        return config["run"], held
    old = read_json(file, dict)
    check_version(old.get("version"), file)
    settings = old.get("settings")
    if not isinstance(settings, dict) or old.keys() != config.keys():
        raise UserError(f"--resume: {file} is not as train.py wrote it; name another --out_dir")
    for key, what, where in (("base", "weights", args.ckpt or args.preset), ("data", "data", args.data)):
        if old[key] != config[key]:
            raise UserError(f"--resume: {out_dir} was run with other {what} than {where} holds now")
    for key, now in same.items():
        before = settings.get(key)
        if before != now:
            raise UserError(f"--resume: {out_dir} was run with --{key} {before}, not {now}")
    if settings.get("lr") != args.lr:
        tqdm.write(f"note: --resume: {out_dir} began with --lr {settings.get('lr')}, and goes on with {args.lr}")
    return old["run"], held


STATE_DTYPES = (torch.float32, torch.bfloat16, torch.bool)  # of what learns, and of masks


def gathered(model: Llama, optimizer: torch.optim.Optimizer) -> dict:
    """{"model": what learns, and masks that follow it, "optimizer": AdamW's moments}, whole and on the CPU, under the
    model's own names, whatever wraps it. Under FSDP every process has to call it."""
    from torch.distributed.checkpoint import state_dict as dcp  # which takes a second that --help need not wait

    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, moments = dcp.get_state_dict(model, optimizer, options=options)
    named = [*model.named_parameters(), *model.named_buffers()]  # of a tied head one name, not two
    names = {name for name, _ in named}
    return {"model": {name: w for name, w in weights.items() if name in names}, "optimizer": moments}


def restore(model: Llama, optimizer: torch.optim.Optimizer, state: dict | None, world: int) -> None:
    """Puts what `gathered` returned back. state: on rank 0, which sends every process its share; elsewhere None."""
    from torch.distributed.checkpoint import state_dict as dcp

    weights, moments = {}, {}
    if state:
        weights, moments = state["model"], state["optimizer"]
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        moments["param_groups"] = [{**optimizer.param_groups[0], "params": names}]  # this command's, not the file's
    options = dcp.StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=world > 1)
    dcp.set_model_state_dict(model, weights, options=options)
    dcp.set_optimizer_state_dict(model, optimizer, moments, options=options)


def write_state(out_dir: Path, state: dict) -> None:
    """step-N.pt, with the adapter of the lowest loss so far: where a run goes on from this state, that of a later step
    is none of its own. The newest two are kept, so that one which the disk has damaged can be passed over."""
    adapter = out_dir / "adapter.pt"
    best_adapter = torch_load(adapter) if adapter.exists() else None  # mapped: it takes no memory
    with atomic(out_dir / f"step-{state['step']:06}.pt") as tmp:
        save_torch({"version": VERSION, **state, "best_adapter": best_adapter}, tmp)
    for _, old in saved_states(out_dir)[2:]:
        old.unlink()


def saved_states(out_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of the states in the folder, the newest first."""
    found = [(re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in out_dir.glob("step-*.pt")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_state(out_dir: Path, model: Llama, run: str, steps: int) -> dict | None:
    """The newest state that is whole, or None, and its best adapter as adapter.pt; a damaged one is renamed and passed
    over. UserError for a whole state of another run."""
    states = saved_states(out_dir)
    for i, (step, path) in enumerate(states, 1):
        try:
            state = torch_load(path, checksums=True)
        except UserError as e:
            way = "going back to the state before it" if i < len(states) else "no state is left: beginning anew"
            tqdm.write(f"warning: {e}; {way}")
            path.rename(path.with_suffix(".damaged"))  # or it would count as one of the two that are kept
            continue
        if isinstance(state, dict):
            check_version(state.get("version"), path)
        if step > steps or not state_is_whole(state, path, run, step, model):
            raise UserError(f"--resume: {path} is not a state of this run; remove it to go on from the one before")
        if state["best_adapter"] is not None:
            with atomic(out_dir / "adapter.pt") as tmp:
                save_torch(state["best_adapter"], tmp)
        return state
    return None


def state_is_whole(state: Any, path: Path, run: str, step: int, model: Llama) -> bool:
    """Whether a state is this run's after this step, with every tensor that the model learns and AdamW's moments of
    each, in their shapes."""
    masks = {name: mask.shape for name, mask in model.named_buffers()}
    learning = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    try:
        moments = state["optimizer"]["state"]
        parts = [state["model"], *moments.values()]
        for part in parts:
            check_tensors(part, path)
        shapes = {name: w.shape for name, w in state["model"].items()}
        for name in learning:
            if name.endswith("_proj.weight") and len(shapes[name]) == 1:  # --packed: survivors, any number of them
                learning[name] = shapes[name]
        found = {name: {key: w.shape for key, w in kept.items()} for name, kept in moments.items()}
        return (
            (state["run"], type(state["step"]), state["step"]) == (run, int, step)
            and all(isinstance(state[key], float) and not math.isnan(state[key]) for key in ("first", "best"))
            and isinstance(state["best_adapter"], dict | None)
            and shapes == masks | learning
            and found == {name: {"step": (), "exp_avg": s, "exp_avg_sq": s} for name, s in learning.items()}
            and all(w.dtype in STATE_DTYPES and w.isfinite().all() for part in parts for w in part.values())
        )
    except (KeyError, IndexError, TypeError, AttributeError, UserError):  # edited by hand
        return False


def trim_log(file: Path, step: int) -> None:
    """Drops the log's lines after `step`, which the resumed run writes again."""
    kept = ""
    lines = checked_file(file).read_text(errors="replace").splitlines() if file.exists() else []
    for line in lines:
        # a line may be cut off by a kill, or edited by hand
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)["step"] <= step:
                kept += line + "\n"
    with atomic(file) as tmp:
        tmp.write_text(kept)


def write_line(file: TextIO, line: dict) -> None:
    """A line of log.jsonl. What is not finite is null: JSON has no NaN."""
    infinite = {key for key, x in line.items() if isinstance(x, float) and not math.isfinite(x)}
    file.write(json.dumps({**line, **dict.fromkeys(infinite)}) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# one step, and what is asked between steps


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Linear warm-up over a share of the steps, then linear decay towards 0."""
    rise = math.ceil(warmup * steps)
    # Steps count from 0: the first has a rate above 0, step `rise` the peak, and the last one above 0 again.
    return peak * min((step + 1) / (rise + 1), (steps - step) / max(1, steps - rise))


def catch_signals() -> list[int]:
    """A list that a first SIGINT, SIGTERM or SIGHUP is put into, for the loop to see; a second one ends the process.

    Within a second of the first, another is the same one: torchrun sends its own to a group that was sent one.
    """
    caught, times = [], []

    def catch(number: int, frame: FrameType | None) -> None:
        if times and time.monotonic() - times[0] > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not caught and is_first_process():  # os.write: a handler may interrupt a print
            os.write(2, b"\nstopping when this step, or the merge, is done; once more after a second ends it at once\n")
        caught.append(number)
        times.append(time.monotonic())

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # the terminal is closed; under nohup that is ignored
        signal.signal(signal.SIGHUP, catch)
    return caught


def peak_memory(device: str) -> int:
    """Bytes, so far: the allocator's on a GPU, the process's resident pages on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's figure, which begins with what the process held that started this one.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def autocast(args: argparse.Namespace) -> torch.autocast:
    """The context of a training forward pass. It rounds the float32 weights of --method full where they are used; the
    other methods' layers do that themselves, or hold rounded weights."""
    return torch.autocast(args.device, torch.bfloat16, args.method == "full" and args.dtype == "bfloat16")


@torch.no_grad()
def validation_loss(
    model: Llama, val: Examples, args: argparse.Namespace, ckpt: Checkpoint | None, rank: int, world: int
) -> float | None:
    """Mean loss over the target tokens of all held-out examples, None where there are none, of the model that would be
    written now. It is called without its DDP wrapper, which has nothing to add where no gradient is exchanged."""
    n_targets = int(val.n_targets.sum())
    if n_targets == 0:
        return None
    written = model.eval()  # adapters then use the weight that merging would write
    if args.method == "full":
        written = rounded(model, ckpt, args)
    total = torch.zeros((), dtype=torch.float64, device=args.device)
    batches = split_batch(np.arange(len(val.lengths)), val.lengths, args.max_tokens, world)[rank]
    for indices in tqdm(batches, desc="validation", leave=False, disable=None if rank == 0 else True):
        total += written(*val.batch(indices, args.device)).double()
    model.train()
    if world > 1:
        dist.all_reduce(total)
    return total.item() / n_targets


def pruned_loss(model: Llama, *args: Any) -> float | None:
    """`validation_loss` of the same arguments, at a scale of 0: that of the checkpoint."""
    layers = [module for module in model.modules() if isinstance(module, SPPLinear)]
    scale = layers[0].scale
    for layer in layers:
        layer.scale = 0.0
    loss = validation_loss(model, *args)
    for layer in layers:
        layer.scale = scale
    return loss


def rounded(model: Llama, ckpt: Checkpoint | None, args: argparse.Namespace) -> Llama:
    """A copy of a fully trained model with the weights that are written, in the dtype that --dtype computes in. Its
    memory is less than that of the gradients, which are freed by now."""
    compute = getattr(torch, args.dtype)
    weights = {}
    for name, p in model.named_parameters():
        written = compute if ckpt is None else ckpt.shapes[name].dtype
        weights[name] = p.detach().to(written).to(compute)  # what overflows shows in the loss
    return from_weights(model.config, weights)


def check_finite(step: int, numbers: dict[str, float | None], ckpt: Checkpoint | None) -> None:
    """UserError where a number of this step is NaN or Inf, before it counts as the best or anything is saved; None,
    where there was nothing to measure, passes. A cause is named where it is known: a checkpoint with NaN or Inf."""
    bad = [f"the {what} of step {step} is {x}" for what, x in numbers.items() if x is not None and not math.isfinite(x)]
    if not bad:
        return
    tensors = [name for name, w in (ckpt or {}).items() if not w.isfinite().all()]
    if tensors:
        raise UserError(f"{ckpt.path}: {tensors[0]} holds NaN or Inf ({len(tensors)} such tensors): {bad[0]}")
    hint = "; --resume with a lower --lr goes on from the newest state, or begins again where there is none; "
    hint += "where that ends here too, remove the state first"
    raise UserError(" and ".join(bad) + (hint if step > 0 else ""))


def shown(loss: float | None) -> str:
    return "none (nothing to predict)" if loss is None else f"{loss:.4f}"


def write_result(
    out_dir: Path, model: Llama, ckpt: Checkpoint | None, base: str, args: argparse.Namespace, steps: int
) -> None:
    """merged.pt: the adapter merged into the checkpoint's own, unrounded weights, or with --method full the model."""
    adapter, merged = out_dir / "adapter.pt", out_dir / "merged.pt"
    if args.method != "full":
        write_checkpoint(merge_checkpoint(ckpt, adapter, base=base), merged)
        tqdm.write(f"wrote {adapter} and {merged}")
        return
    entry = {"method": "full", "data": str(args.data), "steps": steps}
    if ckpt is not None:
        weights = {name: functools.partial(p.detach().to, "cpu") for name, p in model.named_parameters()}
        write_checkpoint(ckpt.changed(weights, entry), merged)  # which rounds them to the checkpoint's dtypes
    else:
        model.history = [entry]
        save(model.to(getattr(torch, args.dtype)), merged, load_tokenizer(args.tokenizer) if args.tokenizer else None)
    tqdm.write(f"wrote {merged}")


if __name__ == "__main__":
    cli(main, "--activation_checkpointing, a smaller --max_tokens, --packed, or --fsdp on several GPUs")
