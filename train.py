"""The fine-tuning loop (section 4 of the paper): pruned LLaMA in, adapter and merged sparse LLaMA out.

One process, a laptop or one GPU:
    python train.py --ckpt pruned.pt
Eight GPUs of one machine, each with the whole model (DDP); with --fsdp each holds an eighth of it, for 30B and up:
    torchrun --nproc_per_node=8 train.py --ckpt pruned.pt
    torchrun --nproc_per_node=8 train.py --ckpt pruned-70b --fsdp --activation_checkpointing
Two machines of eight, the first reachable as 10.0.0.1 (add NCCL_IB_DISABLE=1 in front where there is no Infiniband):
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py --ckpt ...
    torchrun --nnodes=2 --node_rank=1 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py --ckpt ...
What a run would take, on any laptop, without weights, data or GPUs:
    python train.py --preset llama-2-70b --fsdp --activation_checkpointing --dry_run 8

The defaults are the paper's, by the model's size (`PAPER`). A killed run goes on with the same command and --resume.

What differs from the authors' script. The examples of a global batch are sorted by length and cut into micro-batches
of equal work, not drawn at random and padded to their longest: the same gradient, since the loss is the mean over all
target tokens of the global batch, however they are dealt, for less than half of the arithmetic on Alpaca. The branch's
input is not dropped out (theirs is, by 5%, which the paper does not mention and the merged weight cannot express).
The frozen weights are bfloat16 where the checkpoint is float16, so that no loss scaling is needed; merging takes them
from the checkpoint, unrounded.

What a run leaves in --out_dir: config.json (settings, versions, data), log.jsonl (a line per step), step-*.pt (the
newest two states), adapter.pt (the adapter of the lowest validation loss) and merged.pt.
"""

import argparse
import concurrent.futures
import copy
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import time
import weakref
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from model import (
    PRESETS,
    Checkpoint,
    Llama,
    LlamaConfig,
    Parser,
    UserError,
    atomic,
    check_out,
    cli,
    load_tokenizer,
    open_checkpoint,
    read_json,
    save,
    sparsity_of,
    torch_load,
    write_checkpoint,
)
from prune import keep_mask, parse_sparsity
from spp import METHODS, DynamicLinear, inject, merge_checkpoint

# Section 4 and the authors' scripts, by billions of parameters; a model of another size takes the nearest row.
#          lr    micro-batch  global batch  epochs
PAPER = {
    6.7: (4e-3, 8, 128, 3),
    13.0: (2e-3, 4, 128, 3),
    32.5: (4e-3, 16, 256, 3),
    65.3: (5e-4, 8, 128, 1),
    69.0: (5e-4, 8, 128, 1),
}
PAPER_LENGTH = 512  # tokens; so a micro-batch of 8 is at most 4,096 padded tokens


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description="Fine-tune a pruned LLaMA with SPP (or a baseline) and merge the result.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt", help="the pruned model: a .pt file, a Hugging Face directory or a Meta directory")
    add("--preset", choices=PRESETS, help="in place of --ckpt: this shape with random weights (pretraining, --dry_run)")
    add("--tokenizer", help="with --preset: the tokenizer.model that the data was prepared with")
    add("--data", default="data/alpaca", help="folder that data/alpaca/prepare.py wrote")
    add("--out_dir", default="out/spp", help="where the run's files go")
    # the method
    add(
        "--method",
        default="spp",
        choices=(*METHODS, "full"),
        help="what learns",
    )
    add("--r", type=int, default=16, help="rows of alpha (SPP), or the rank of LoRA")
    add("--scale", type=float, default=2.0, help="the paper's s")
    add("--no_beta", action="store_true", help="SPP without beta (Table 4)")
    add("--zero_init", default="beta", choices=("beta", "alpha", "none", "both"), help="what starts at 0 (Table 8)")
    add("--no_residual", action="store_true", help="multiply W by the factors in place of adding W~ (Remark 1)")
    add("--sparsity", help="dynamic: the pattern to keep, such as 2:4")
    add("--mask_interval", type=int, default=10, help="dynamic: steps between two masks")
    add("--matmul", default="fused", choices=("fused", "chunked", "repeat"), help="SPP's form: see spp.py")
    # the optimizer; None: the paper's, by size
    add("--lr", type=float, help="peak learning rate (default: the paper's for this size)")
    add("--batch_size", type=int, help="examples in a global batch, over all processes (default: the paper's)")
    add("--epochs", type=float, help="passes over the training data (default: the paper's)")
    add(
        "--max_tokens",
        type=int,
        help="padded tokens in a micro-batch of one process (default: the paper's batch x 512)",
    )
    add("--weight_decay", type=float, default=0.001, help="of AdamW")
    add("--warmup", type=float, default=0.03, help="share of the steps over which the learning rate rises")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0: none")
    add("--mask_prompt", action="store_true", help="learn the answers alone, not the prompts")
    add("--seed", type=int, default=0, help="of the adapter's start and the order of the data")
    # the machine
    add(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"), help="where to run"
    )
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of frozen weights; auto: see above")
    add("--fsdp", action="store_true", help="shard the model over the processes (FSDP2)")
    add("--activation_checkpointing", action="store_true", help="keep only the blocks' inputs, recompute the rest")
    add("--compile", action="store_true", help="torch.compile each block")
    # the run
    add("--eval_interval", type=int, default=200, help="steps between validations")
    add("--save_interval", type=int, default=200, help="steps between saved states")
    add("--resume", action="store_true", help="go on from the newest state in --out_dir")
    add("--dry_run", type=int, nargs="?", const=1, metavar="N", help="print what N processes would need, and stop")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# data: examples end to end in one array, and their dealing to processes


class Examples:
    """A split of prepared data: `tokens` of all examples end to end, `offsets` (N + 1), `prompt` lengths (N)."""

    def __init__(self, folder: str | Path, split: str):
        names = [Path(folder) / f"{split}{suffix}.npy" for suffix in ("", ".offsets", ".prompt")]
        try:
            self.tokens, self.offsets, self.prompt = (np.load(name, mmap_mode="r") for name in names)
        except (OSError, ValueError) as e:
            raise UserError(
                f"--data {folder}: {split} split cannot be read ({e}); run data/alpaca/prepare.py"
            ) from None
        n = len(self.offsets) - 1
        if n < 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens) or len(self.prompt) != n:
            raise UserError(f"--data {folder}: {split}.offsets.npy and {split}.prompt.npy do not fit {split}.npy")
        # What is computed for an example: one position per target, so one less than its tokens.
        self.lengths = np.diff(self.offsets) - 1
        if n and self.lengths.min() < 1:
            raise UserError(f"--data {folder}: example {self.lengths.argmin()} of {split} has fewer than 2 tokens")

    def n_targets(self, i: int, mask_prompt: bool) -> int:
        return int(
            self.lengths[i] - (min(self.prompt[i], self.lengths[i] + 1) - 1 if mask_prompt and self.prompt[i] else 0)
        )

    def batch(self, indices: list[int], mask_prompt: bool, device) -> tuple[Tensor, Tensor]:
        """Right-padded tokens and targets, (B, T) int64; targets are -100 where nothing is to be predicted.

        No attention mask is needed: attention is causal, so real positions never see the padding behind them.
        An empty list gives one padded position: a process without work still takes part in every collective.
        """
        T = max((self.lengths[i] for i in indices), default=1)
        tokens = np.zeros((max(1, len(indices)), T), dtype=np.int64)
        targets = np.full_like(tokens, -100)
        for row, i in enumerate(indices):
            example = self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)
            tokens[row, : len(example) - 1] = example[:-1]
            targets[row, : len(example) - 1] = example[1:]
            if mask_prompt:
                targets[row, : max(0, self.prompt[i] - 1)] = -100
        return torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device)


PADDING = 0.08  # the share of wasted positions that is worth another micro-batch


def deal(indices: np.ndarray, lengths: np.ndarray, max_tokens: int, world: int) -> list[list[list[int]]]:
    """Cuts a global batch into micro-batches and deals them: a list of micro-batches for each process.

    Sorted by length, examples that lie together pad little. Every process gets the same number k of micro-batches
    (FSDP's collectives count on it): as few as max_tokens and PADDING allow. For each k the cut is made under the
    lowest limit that gives at most k x world parts, so that all are about the same work and the processes finish
    together. Part i goes to process i % world, so those that run at the same time are the most alike.
    """
    order = sorted(indices.tolist(), key=lambda i: (-lengths[i], i))

    def cut(limit: int) -> list[list[int]]:
        parts = []
        for i in order:  # the first example of a part is its longest
            if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= limit:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    count, enough = world * math.ceil(len(cut(max_tokens)) / world), lengths[order].sum() / (1 - PADDING)
    while True:
        low, high = int(lengths[order[0]]), max_tokens
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(cut(middle)) <= count else (middle + 1, high)
        parts = cut(low)
        if low == lengths[order[0]] or sum(len(part) * lengths[part[0]] for part in parts) <= enough:
            break
        count += world
    parts += [[]] * (count - len(parts))
    return [parts[rank::world] for rank in range(world)]


def padded_tokens(dealt: list[list[list[int]]], lengths: np.ndarray) -> int:
    """Positions that a dealt global batch computes, padding included."""
    return sum(len(part) * int(lengths[part].max(initial=0)) for parts in dealt for part in parts)


class Plan:
    """Which examples step s sees: a function of the seed and s alone, so that resuming needs no more than s."""

    def __init__(self, n: int, batch_size: int, epochs: float, seed: int):
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self.per_epoch = math.ceil(n / self.batch_size)
        self.steps = max(1, round(self.per_epoch * epochs))

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, i = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        return order[i * self.batch_size : (i + 1) * self.batch_size]


def read_data(args, config: LlamaConfig, ckpt: Checkpoint | None, processes: int) -> tuple[Examples, Examples]:
    """The training and the held-out examples. UserError where they are not this model's or leave a process idle."""
    data = Path(args.data)
    train, val = Examples(data, "train"), Examples(data, "val")
    if tokenizer := ckpt.tokenizer if ckpt else args.tokenizer:
        proto = load_tokenizer(tokenizer).serialized_model_proto()
        if hashlib.sha256(proto).hexdigest() != read_json(data / "meta.json", dict).get("tokenizer_sha256"):
            raise UserError(f"--data {data}: was prepared with another tokenizer than the model's; prepare it again")
    for examples in (train, val):
        if (largest := examples.tokens.max(initial=0)) >= config.vocab_size:
            raise UserError(f"--data {data}: token id {largest} is not among the model's {config.vocab_size}")
    if not len(train.lengths):
        raise UserError(f"--data {data}: holds no training example")
    longest = int(max(train.lengths.max(), val.lengths.max(initial=0)))
    config.check_length(longest, f"--data {data}")
    if longest > args.max_tokens:
        raise UserError(f"--max_tokens {args.max_tokens}: the longest example of {data} computes {longest}")
    if min(args.batch_size, len(train.lengths)) < processes:
        raise UserError(f"--batch_size {args.batch_size}: fewer examples than the {processes} processes")
    return train, val


def fingerprint(folder: Path) -> str:
    """A hash of the prepared data."""
    h = hashlib.sha256()
    for file in sorted(folder.glob("*.npy")):
        h.update(file.name.encode() + file.read_bytes())
    return h.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# the model: shapes first, then weights, whole or sharded


def spp_options(args) -> dict:
    """The ablations that the command asks for, as SPPLinear takes them."""
    if args.method != "spp":
        return {}
    given = {"beta": not args.no_beta, "zero_init": args.zero_init, "residual": not args.no_residual}
    return {k: v for k, v in given.items() if v not in (True, "beta")}


def update_masks(model: Llama, sparsity) -> None:
    """Equation 2: every dynamic layer's mask follows the magnitude of its dense weight."""
    for module in model.modules():
        if isinstance(module, DynamicLinear):
            module.mask.copy_(keep_mask(module.weight.detach().abs(), sparsity))


def build(args, config) -> Llama:
    """The model with its adapters on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = Llama(config).to(getattr(torch, args.dtype))
        if args.method != "full":
            matmul = {"matmul": args.matmul} if args.method == "spp" else {}
            inject(model, method=args.method, r=args.r, scale=args.scale, **spp_options(args), **matmul)
    model.activation_checkpointing = args.activation_checkpointing
    return model


def materialise(model: Llama, weights, seed: int, device: str, mesh=None) -> None:
    """Fills a meta model: adapters drawn from the seed, everything else from `weights` (name -> tensor).

    With a mesh the blocks and the root become FSDP units, every tensor sharded by rows, and a process touches its own
    rows of the memory-mapped checkpoint alone. Adapters are drawn whole, on the CPU, before they are sharded, so that
    the start of a run does not depend on the number of processes.
    """
    torch.manual_seed(seed)
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        fresh = {name: p for name, p in own.items() if f"{prefix}.{name}" not in weights and prefix != "lm_head"}
        for name, p in fresh.items():
            setattr(module, name, nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad))
        if fresh:
            module.reset_parameters()
    if mesh is not None:
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def local(name: str, like: Tensor) -> Tensor:
        w = weights[name]
        if mesh is None:
            return w.to(device, like.dtype)
        chunks = w.chunk(mesh.size())  # as FSDP2 does: the last may be shorter, or missing
        rows = chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else w[:0]
        rows = rows.to(device, like.dtype, copy=True)
        return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=w.shape, stride=w.stride())

    state = model.state_dict()
    model.load_state_dict({k: local(k, p) for k, p in state.items() if k in weights}, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, DynamicLinear):
            module.mask = torch.ones_like(module.weight, dtype=torch.bool)
    if mesh is None:
        model.to(device)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def learned(model: Llama) -> dict[str, Tensor]:
    """Trainable parameters and masks, whole, on the CPU of rank 0 (elsewhere empty): a collective under FSDP."""
    names = {name for name, p in model.named_parameters() if p.requires_grad} | {k for k, _ in model.named_buffers()}
    return {name: w for name, w in get_model_state_dict(model, options=STATE).items() if name in names}


# The library's own gathering and dealing of sharded states: names are the model's, whatever wraps it.
STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


# ----------------------------------------------------------------------------------------------------------------------
# what a run leaves on disk


def write_state(path: Path, state: dict) -> None:
    """Writes step-N.pt whole or not at all, and keeps the newest two."""
    with atomic(path) as tmp:
        torch.save(state, tmp)
    for old in sorted(path.parent.glob("step-*.pt"))[:-2]:
        old.unlink()


def write_adapter(path: Path, tensors: dict[str, Tensor], args, base: str) -> None:
    """The adapter file, from what `learned` returns: a dict of `adapter`, `method`, `r`, `scale`, `base`, `options`."""
    for name in [name for name in tensors if name.endswith(".mask")]:  # dynamic: what is kept of the weight
        tensors[name.replace(".mask", ".weight")] *= tensors.pop(name)
    adapter = {name.removeprefix("model."): w for name, w in tensors.items()}
    about = {"method": args.method, "r": args.r, "scale": args.scale, "base": base, "options": spp_options(args)}
    with atomic(path) as tmp:
        torch.save({"adapter": adapter} | about, tmp)


def newest_state(out_dir: Path, say) -> dict:
    """The newest state that is whole: every checksum of the zip file is compared, a damaged file is skipped."""
    for path in sorted(out_dir.glob("step-*.pt"), reverse=True):
        try:
            with zipfile.ZipFile(path) as z:
                if z.testzip() is None:
                    return torch_load(path)
        except (zipfile.BadZipFile, UserError):
            pass
        say(f"warning: {path} is truncated or damaged; going back to the state before it")
    raise UserError(f"--resume: {out_dir} holds no whole step-*.pt; start again without --resume, in a new --out_dir")


# What may change between a run and its continuation: nothing of this moves the result by more than rounding.
FREE = {
    "resume",
    "dry_run",
    "data",
    "ckpt",
    "device",
    "fsdp",
    "activation_checkpointing",
    "compile",
    "max_tokens",
    "save_interval",
}


def open_run(out_dir: Path, config: dict, resume: bool) -> None:
    """Writes config.json for a new run; for a resumed one checks that it is the same run."""
    file = out_dir / "config.json"
    if not resume:
        if file.exists():
            raise UserError(f"--out_dir {out_dir}: holds a run; --resume continues it, or name another folder")
        with atomic(file) as tmp:
            tmp.write_text(json.dumps(config, indent=2) + "\n")
        return
    if not file.exists():
        raise UserError(f"--resume: {out_dir} holds no run (no config.json)")
    old = read_json(file)
    for key in ("base", "data"):
        if old[key] != config[key]:
            raise UserError(f"--resume: {out_dir} was run with another {key} ({old[key]}, now {config[key]})")
    for key, now in config["settings"].items():
        if key not in FREE and old["settings"].get(key) != now:
            raise UserError(f"--resume: {out_dir} was run with --{key} {old['settings'].get(key)}, not {now}")


def lock_run(out_dir: Path):
    """An open file that keeps other runs out of the folder for as long as this process lives.

    A torchrun that is killed with SIGKILL leaves its workers behind, and they still write.
    """
    lock = open(out_dir / "config.json")  # noqa: SIM115  closed when the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out_dir {out_dir}: a run is at work in it; stop it, or wait for its end") from None
    except OSError:  # a file system without locks
        pass
    return lock


def trim_log(file: Path, step: int) -> None:
    """Drops the log's lines after `step`, which the resumed run writes again."""
    lines = file.read_text().splitlines() if file.exists() else []
    whole = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    with atomic(file) as tmp:
        tmp.write_text("".join(line + "\n" for line in whole))


# ----------------------------------------------------------------------------------------------------------------------
# --dry_run


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive: `now`, and at most so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(storage := x.untyped_storage()) not in self.alive:
                self.alive.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int, nbytes: int) -> None:
        self.alive.discard(key)
        self.now -= nbytes


def simulate(args, config, rows: int, T: int) -> np.ndarray:
    """Bytes alive (before a step, behind its forward pass, at its peak), for a micro-batch of rows x T tokens.

    The step is a real one, on fake tensors: they have shapes and lifetimes, but no memory.
    """
    # scaled or windowed positions would be read, which fake tensors do not have; plain ones have the same shapes
    model = build(args, dataclasses.replace(config, rope_scaling=None, sliding_window=None))
    with FakeTensorMode(), LiveBytes() as live:
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype))
        model.tie_weights()
        optimizer = torch.optim.AdamW(trainable(model))
        for _ in range(2):  # the optimizer has its moments after the first
            before = live.peak = live.now
            tokens = torch.zeros(rows, T, dtype=torch.int64)
            x = model.hidden(tokens).flatten(0, 1)[torch.arange(rows * T)]  # a copy, as that of the targets' positions
            loss = model.summed_loss(x, tokens.flatten())
            del x
            forward = live.now
            loss.backward()
            del loss
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return np.array([before, forward, live.peak])


def estimate(model: Llama, args, world: int, rows: int, T: int) -> dict[str, int]:
    """Bytes a process needs, by part, for a largest micro-batch of rows x T tokens; all of them are tensors."""
    c, shards = model.config, world if args.fsdp else 1
    if c.n_layers <= 4:
        before, forward, peak = simulate(args, c, rows, T)
    else:  # every layer beyond the second adds the same
        two, three = (simulate(args, dataclasses.replace(c, n_layers=n), rows, T) for n in (2, 3))
        before, forward, peak = two + (c.n_layers - 2) * (three - two)
    learn = 4 * sum(p.numel() for p in trainable(model))
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad}
    temporaries = peak - forward
    if shards > 1:  # the block at work, the one fetched ahead, and what lies outside of the blocks, each whole
        block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
        temporaries += 2 * block + sum(weights.values()) - c.n_layers * block
    elif world > 1:  # the buckets in which DDP exchanges gradients
        temporaries += learn
    return {
        "frozen weights": sum(weights.values()) // shards,
        "adapters": learn // shards,
        "optimizer": 2 * learn // shards,
        "activations": int(forward - before),
        "gradients, temporaries": int(temporaries),
    }


def dry_run(model: Llama, args, train: Examples | None) -> None:
    """Prints what each of --dry_run N processes would need, and how long the run is."""
    world, largest = args.dry_run, (max(1, args.max_tokens // PAPER_LENGTH), min(PAPER_LENGTH, args.max_tokens))
    if train is not None:
        plan = Plan(len(train.lengths), args.batch_size, args.epochs, args.seed)
        targets, padded, parts = 0, 0, []
        for step in range(min(plan.steps, plan.per_epoch)):
            dealt = deal(plan[step], train.lengths, args.max_tokens, world)
            targets += sum(train.n_targets(i, args.mask_prompt) for i in plan[step])
            padded += padded_tokens(dealt, train.lengths)
            parts += [(len(part), int(train.lengths[part[0]])) for part in sum(dealt, []) if part]
        largest = max(parts, key=math.prod)
    learn, total = sum(p.numel() for p in trainable(model)), sum(p.numel() for p in model.parameters())
    print(f"trainable parameters   {learn:,} ({1000 * learn / total:.2f} per mille of {total:,})")
    needs = estimate(model, args, world, *largest)
    print(f"memory of each process  ({world} in all, micro-batches of up to {largest[0]} x {largest[1]} tokens)")
    for name, n in [*needs.items(), ("together", sum(needs.values()))]:
        print(f"  {name:<22} {n / 2**30:9.3f} GiB")
    print("  beside it: Python and PyTorch, about 0.3 GiB on a CPU; the driver's context, about 0.5 GiB, on a GPU")
    if train is None:
        print(f"steps, tokens, padding: no prepared data in {args.data}")
        return
    print(f"steps                  {plan.steps:,} of {plan.batch_size} examples")
    print(f"target tokens          {int(targets * plan.steps / min(plan.steps, plan.per_epoch)):,}")
    print(f"estimated padding      {100 * (1 - targets / padded):.1f}% of the tokens computed")


# ----------------------------------------------------------------------------------------------------------------------
# the run


def resolve(args, config, ckpt: Checkpoint | None) -> None:
    """Fills what the command left open with the paper's values for a model of this size, and checks what it gave."""
    with torch.device("meta"):
        billions = sum(p.numel() for p in Llama(config).parameters()) / 1e9
    lr, micro, batch, epochs = PAPER[min(PAPER, key=lambda size: abs(math.log(size / billions)))]
    for key, value in {"lr": lr, "batch_size": batch, "epochs": epochs, "max_tokens": micro * PAPER_LENGTH}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    above_0 = (
        "lr",
        "batch_size",
        "epochs",
        "max_tokens",
        "eval_interval",
        "save_interval",
        "mask_interval",
        "r",
        "scale",
    )
    for key in (*above_0, *(["dry_run"] if args.dry_run is not None else [])):
        if not 0 < getattr(args, key) < math.inf:
            raise UserError(f"--{key} {getattr(args, key)}: must be more than 0")
    for key in ("weight_decay", "grad_clip", "seed"):
        if not 0 <= getattr(args, key) < 2**62:
            raise UserError(f"--{key} {getattr(args, key)}: must be 0 or more")
    if args.sparsity and args.method != "dynamic":
        raise UserError("--sparsity: is the pattern of --method dynamic; other methods keep the checkpoint's zeros")
    if args.tokenizer and ckpt:
        raise UserError("--tokenizer: goes with --preset; a checkpoint has its own")
    if not 0 <= args.warmup < 1:
        raise UserError(f"--warmup {args.warmup}: is a share of the steps, from 0 to below 1")
    if args.zero_init == "both":
        raise UserError(
            "--zero_init both: alpha's gradient is a multiple of beta and beta's of alpha: both stay 0 for ever"
        )
    if args.method == "dynamic":
        if not args.sparsity or args.fsdp:
            raise UserError("--method dynamic: needs --sparsity, and whole layers: no --fsdp")
        parse_sparsity(args.sparsity)
    if args.dtype == "auto":
        weights = ckpt["model.layers.0.self_attn.q_proj.weight"].dtype if ckpt else torch.float32
        args.dtype = "float32" if weights == torch.float32 else "bfloat16"


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Linear warm-up over a share of the steps, then linear decay towards 0."""
    rise = math.ceil(warmup * steps)
    return peak * min((step + 1) / (rise + 1), (steps - step) / max(1, steps - rise))


def catch_signals() -> list[int]:
    """A list that a first SIGINT or SIGTERM is put into, for the loop to see; a second one ends the process at once."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def catch(number, frame):
        caught.append(number)
        for n in numbers:
            signal.signal(n, signal.SIG_DFL)

    for n in numbers:
        signal.signal(n, catch)
    return caught


def join_processes(device: str, world: int) -> DeviceMesh:
    """The process group that torchrun has prepared, or without torchrun a group of one, as a mesh."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world == 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0"}
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (world,))
    dist.barrier()  # nobody reads the run's folder before rank 0 has checked it
    return mesh


def peak_memory(device: str) -> int:
    """Bytes, so far: the allocator's on a GPU, the process's resident pages on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's figure, which begins with what the process held that started this one.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main():
    args = parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    say = (lambda *text: tqdm.write(" ".join(map(str, text)))) if rank == 0 else (lambda *text: None)

    # --- settings: the paper's for this size, where the command names none
    if (args.ckpt is None) == (args.preset is None):
        raise UserError("give either --ckpt (a pruned model) or --preset (random weights)")
    ckpt = open_checkpoint(args.ckpt) if args.ckpt else None
    config = ckpt.config if ckpt else PRESETS[args.preset]
    resolve(args, config, ckpt)
    device, dry = args.device, args.dry_run is not None
    if device == "cuda" and not torch.cuda.is_available() and not dry:
        raise UserError("--device cuda: torch sees no GPU on this machine; --device cpu runs without one")

    # --- data and the model's shapes
    out_dir, data = Path(args.out_dir), Path(args.data)
    train = val = None
    if not dry or (data / "train.npy").exists():
        train, val = read_data(args, config, ckpt, processes=args.dry_run or world)
    model = build(args, config)
    if dry:
        return dry_run(model, args, train)
    plan = Plan(len(train.lengths), args.batch_size, args.epochs, args.seed)

    # --- the folder of the run
    base = ckpt.fingerprint() if ckpt else args.preset
    if rank == 0:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        about = {"settings": vars(args), "steps": plan.steps, "base": base, "data": fingerprint(data)}
        if out_dir.resolve() == data.resolve():
            raise UserError(f"--out_dir {out_dir}: is the --data folder; name another")
        check_out(out_dir / "merged.pt", "--out_dir")
        open_run(out_dir, about | {"world_size": world, "versions": versions}, args.resume)
        lock = lock_run(out_dir)  # noqa: F841  held until the process ends
    if ckpt:
        zeros, pattern = sparsity_of(ckpt["model.layers.0.mlp.up_proj.weight"])
        say(f"{args.ckpt}: {100 * zeros:.1f}% zeros ({pattern or 'unstructured'}) in layers.0.mlp.up_proj; they stay")

    # --- processes
    mesh = join_processes(device, world) if world > 1 or args.fsdp else None

    # --- model and optimizer
    if ckpt is None:
        torch.manual_seed(args.seed)
        weights = Llama(config).state_dict()
    materialise(model, ckpt or weights, args.seed, device, mesh if args.fsdp else None)
    if args.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=args.lr, weight_decay=args.weight_decay)
    net = DistributedDataParallel(model) if world > 1 and not args.fsdp else model
    start, best = 0, math.inf
    if args.resume:
        state = newest_state(out_dir, say)
        set_model_state_dict(model, state["model"], options=STATE)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=STATE)
        start, best = state["step"], state["best"]
        say(f"resuming after step {start} of {plan.steps}")

    def validate() -> float:
        """Mean loss over the target tokens of all held-out examples; nan where there are none."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        if not len(val.lengths):
            return math.nan
        with torch.no_grad():
            for indices in deal(np.arange(len(val.lengths)), val.lengths, args.max_tokens, world)[rank]:
                total += net(*val.batch(indices, args.mask_prompt, device)).double()
        if mesh:
            dist.all_reduce(total)
        return total.item() / sum(val.n_targets(i, args.mask_prompt) for i in range(len(val.lengths)))

    writer, written = concurrent.futures.ThreadPoolExecutor(1), []  # states are written while the next steps run

    def save_state(step: int):
        tensors, moments = learned(model), get_optimizer_state_dict(model, optimizer, options=STATE)
        if rank == 0:
            for earlier in written:
                earlier.result()
            state = copy.deepcopy({"model": tensors, "optimizer": moments, "step": step, "best": best})
            written[:] = [writer.submit(write_state, out_dir / f"step-{step:06}.pt", state)]

    # --- the loop
    stop = catch_signals()
    if rank == 0:
        trim_log(out_dir / "log.jsonl", start)
        log = open(out_dir / "log.jsonl", "a", buffering=1)  # noqa: SIM115  closed when the process ends

    def record(**line):
        if rank == 0:
            log.write(json.dumps(line) + "\n")

    if start == 0:
        val_loss = validate()
        record(step=0, val_loss=val_loss)
        say(f"step 0: validation loss {val_loss:.4f}")
    bar = tqdm(range(start, plan.steps), initial=start, total=plan.steps, disable=None if rank == 0 else True)
    for step in bar:
        t0 = time.perf_counter()
        torch.manual_seed(args.seed + 1_000_003 * (step + 1) + rank)  # so that no random state need be saved
        if args.method == "dynamic" and step % args.mask_interval == 0:
            update_masks(model, parse_sparsity(args.sparsity))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.steps, args.warmup, args.lr)
        micro_batches = deal(plan[step], train.lengths, args.max_tokens, world)[rank]
        n_targets = max(1, sum(train.n_targets(i, args.mask_prompt) for i in plan[step]))
        stats = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, asked to stop
        for i, indices in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            if args.fsdp:  # gradients are exchanged once, with the last micro-batch
                model.set_requires_gradient_sync(last)
            elif mesh:
                net.require_backward_grad_sync = last
            loss = net(*train.batch(indices, args.mask_prompt, device))
            (loss * (world / n_targets)).backward()  # DDP and FSDP take the mean over processes; we want the sum
            stats[0] += loss.detach().double()
        norm = nn.utils.clip_grad_norm_(trainable(model), args.grad_clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        stats[1] = len(stop)
        if mesh:
            dist.all_reduce(stats)
        loss, stopping = stats[0].item() / n_targets, stats[1].item() > 0
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} at step {step + 1}: a lower --lr, or --dtype float32, may help")
        seconds = time.perf_counter() - t0
        record(
            step=step + 1,
            loss=loss,
            lr=optimizer.param_groups[0]["lr"],
            grad_norm=norm.item(),
            tokens=n_targets,
            tokens_per_second=n_targets / seconds,
            peak_memory=peak_memory(device),
        )
        bar.set_postfix_str(f"loss {loss:.4f}, {n_targets / seconds:,.0f} tokens/s")

        done = step + 1 == plan.steps
        if done or (step + 1) % args.eval_interval == 0:
            val_loss = validate()
            record(step=step + 1, val_loss=val_loss)
            say(f"step {step + 1}: training loss {loss:.4f}, validation loss {val_loss:.4f}")
            if not val_loss >= best:  # nan, where nothing is held out: the last adapter is kept
                best = val_loss
                tensors = learned(model)
                if rank == 0:
                    write_adapter(out_dir / "adapter.pt", tensors, args, base)
        if done or stopping or (step + 1) % args.save_interval == 0:
            save_state(step + 1)
        if stopping and not done:
            writer.shutdown()
            say(f"stopped after step {step + 1} of {plan.steps}; the same command with --resume goes on from there")
            sys.exit(128 + stop[0] if stop else 1)
    writer.shutdown()

    # --- the result: merged from the checkpoint's own weights, whatever --dtype they were trained in
    if args.method == "full":
        model.history = [*(ckpt.history if ckpt else []), {"method": "full", "data": str(data), "steps": plan.steps}]
        tokenizer = load_tokenizer(ckpt.tokenizer if ckpt else args.tokenizer)
        save(model, out_dir / "merged.pt", tokenizer)
    elif rank == 0:
        write_checkpoint(merge_checkpoint(ckpt, out_dir / "adapter.pt"), out_dir / "merged.pt")
    if rank == 0:
        say(f"wrote {out_dir}/adapter.pt and {out_dir}/merged.pt")
    if mesh:
        dist.barrier()  # nobody leaves while another still writes
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        cli(main)
    except RuntimeError as e:  # whichever process it is: under torchrun the others are stopped
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
            raise
        wish = "--activation_checkpointing, a smaller --max_tokens, or --fsdp on several GPUs"
        print(f"train.py: error: out of memory ({str(e).splitlines()[0][:100]}); what helps: {wish}", file=sys.stderr)
        os._exit(2)  # a GPU's collectives that are under way would hold up a tidy exit
