"""The fine-tuning loop (section 4 of the paper): pruned LLaMA in, adapter and merged sparse LLaMA out.

One process, a laptop or one GPU:
    python train.py --ckpt pruned.pt
Eight GPUs of one machine, each with the whole model (DDP); with --fsdp each holds an eighth of it, for 30B and up:
    torchrun --nproc_per_node=8 train.py --ckpt pruned.pt
    torchrun --nproc_per_node=8 train.py --ckpt pruned-70b --fsdp --activation_checkpointing
Two machines of eight, the first reachable as 10.0.0.1 (add NCCL_IB_DISABLE=1 in front where there is no Infiniband):
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py --ckpt ...
    torchrun --nnodes=2 --node_rank=1 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py --ckpt ...
(torchrun reads a bare --r as short for a flag of its own: put -- before train.py.)
What a run would take, on any laptop, without weights, data or GPUs:
    python train.py --preset llama-2-70b --dtype bfloat16 --fsdp --activation_checkpointing --dry_run 8

The defaults are the paper's, by the model's size (`PAPER`). A killed run goes on with the same command and --resume.

What differs from the authors' script. The examples of a global batch are sorted by length and cut into micro-batches
of equal work, instead of drawn at random and padded to the longest. The gradient is the same, since the loss is the
mean over all target tokens of the global batch however they are dealt, and on Alpaca-format instructions half as many
positions are computed (bench/padding.py). The frozen weights are bfloat16 where the checkpoint is float16, so that no
loss scaling is needed; merging takes them from the checkpoint, unrounded.

What a run leaves in --out_dir: config.json (settings, versions, data), log.jsonl (a line per step), step-*.pt (the
newest two states), adapter.pt (the adapter of the lowest validation loss) and merged.pt, the checkpoint with that
adapter merged. `--method full` trains the model itself: no adapter, and merged.pt holds the last weights.
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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

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
from torch.distributed.fsdp import FSDPModule, fully_shard
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
    add_device,
    atomic,
    check_device,
    check_out,
    cli,
    load_tokenizer,
    number,
    open_checkpoint,
    read_json,
    save,
    sparsity_of,
    take_a_gpu,
    torch_load,
    write_checkpoint,
)
from prune import Sparsity, keep_mask, parse_sparsity
from spp import METHODS, AdapterLinear, DynamicLinear, inject, merge_checkpoint

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
    parser = Parser(description="Fine-tune a pruned LLaMA with SPP (or a baseline) and merge the result.")
    add = parser.add_argument
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--ckpt", help="the pruned model: a .pt file, a Hugging Face directory or a Meta directory")
    start.add_argument("--preset", choices=PRESETS, help="this shape with random weights, to pretrain or to --dry_run")
    add("--tokenizer", help="with --preset: the tokenizer.model that the data was prepared with")
    add("--data", default="data/alpaca", help="folder that data/alpaca/prepare.py wrote")
    add("--out_dir", default="out/spp", help="where the run's files go")
    # the method
    add("--method", default="spp", choices=(*METHODS, "full"), help="what learns; full: every weight, without a mask")
    add("--r", type=number(int, 1), default=16, help="rows of alpha (SPP), or the rank of LoRA")
    add("--scale", type=number(float, above=0), default=2.0, help="the paper's s")
    add("--no_beta", action="store_true", help="SPP without beta (Table 4)")
    zero_init = "what starts at 0 (Table 8); not both: then neither would ever get a gradient"
    add("--zero_init", default="beta", choices=("beta", "alpha", "none"), help=zero_init)
    add("--no_residual", action="store_true", help="multiply W by the factors in place of adding W~ (Remark 1)")
    add("--matmul", default="fused", choices=("fused", "chunked", "repeat"), help="SPP's form: see spp.py")
    add("--sparsity", help="dynamic: the pattern to keep, such as 2:4")
    add("--mask_interval", type=number(int, 1), default=10, help="dynamic: steps between two masks")
    # the optimizer; where there is no default: the paper's, by size
    add("--lr", type=number(float, above=0), help="peak learning rate (default: the paper's for this size)")
    add("--batch_size", type=number(int, 1), help="examples in a step, over all processes (default: the paper's)")
    add("--epochs", type=number(float, above=0), help="passes over the training data (default: the paper's)")
    micro = "padded tokens in a micro-batch of one process (default: the paper's batch x 512)"
    add("--max_tokens", type=number(int, 1), help=micro)
    add("--weight_decay", type=number(float, 0), default=0.001, help="of AdamW")
    warmup = "share of the steps over which the learning rate rises"
    add("--warmup", type=number(float, 0, high=1), default=0.03, help=warmup)
    add("--grad_clip", type=number(float, 0), default=1.0, help="largest norm of the gradient; 0: none")
    add("--mask_prompt", action="store_true", help="learn the answers alone, not the prompts")
    add("--seed", type=number(int, 0, high=2**62), default=0, help="of the adapter's start and the order of the data")
    # the machine
    add_device(parser)
    dtype = "of frozen weights; auto: float32 for a float32 checkpoint, bfloat16 for any other"
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help=dtype)
    add("--fsdp", action="store_true", help="shard the model over the processes (FSDP2)")
    add("--activation_checkpointing", action="store_true", help="keep only the blocks' inputs, recompute the rest")
    add("--compile", action="store_true", help="torch.compile each block")
    # the run
    add("--eval_interval", type=number(int, 1), default=200, help="steps between validations")
    add("--save_interval", type=number(int, 1), default=200, help="steps between saved states")
    add("--resume", action="store_true", help="go on from the newest state in --out_dir")
    add("--dry_run", type=number(int, 1), nargs="?", const=1, metavar="N", help="print what N processes need, and stop")
    return parser.parse_args(argv)


def fill_in(args: argparse.Namespace, config: LlamaConfig, ckpt: Checkpoint | None) -> None:
    """Fills in the flags that were not given, with the paper's values for a model of this size."""
    with torch.device("meta"):
        billions = sum(p.numel() for p in Llama(config).parameters()) / 1e9
    lr, micro, batch, epochs = PAPER[min(PAPER, key=lambda size: abs(math.log(size / billions)))]
    for key, value in {"lr": lr, "batch_size": batch, "epochs": epochs, "max_tokens": micro * PAPER_LENGTH}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.dtype == "auto":
        stored = ckpt.like["model.layers.0.self_attn.q_proj.weight"].dtype if ckpt else torch.float32
        args.dtype = "float32" if stored == torch.float32 else "bfloat16"


def check_settings(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other, or that the method would ignore."""
    if args.tokenizer and args.ckpt:
        raise UserError("--tokenizer: goes with --preset; a checkpoint has its own")
    if args.preset and args.method != "full" and args.dry_run is None:
        raise UserError("--preset: random weights have no mask; only --method full trains them")
    if args.fsdp and args.method in ("full", "dynamic"):
        raise UserError(f"--fsdp: shards adapters and frozen weights; --method {args.method} needs them whole")
    if args.method == "dynamic" and not args.sparsity:
        raise UserError("--method dynamic: needs --sparsity, the pattern to keep")
    if args.sparsity:
        parse_sparsity(args.sparsity)
    if args.dry_run is None:
        check_device(args.device)
    knows = {"spp": ("no_beta", "zero_init", "no_residual", "matmul"), "dynamic": ("sparsity", "mask_interval")}
    ignored = [key for method, keys in knows.items() if method != args.method for key in keys]
    if args.method == "full" or not METHODS[args.method].factors:
        ignored += ["r", "scale"]
    defaults = parse_args(["--preset", "test"])
    for key in ignored:
        if getattr(args, key) != getattr(defaults, key):
            raise UserError(f"--{key}: means nothing to --method {args.method}")


# ----------------------------------------------------------------------------------------------------------------------
# data: examples end to end in one array, and their dealing to processes


class Examples:
    """A split of prepared data: `tokens` of all examples end to end, `offsets` (N + 1,), `prompt` lengths (N,), and
    `lengths` (N,), the positions that each example computes. Raises UserError where the files do not fit together."""

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
        self.lengths = np.diff(self.offsets) - 1  # one position for each target, so one less than the tokens
        if n and self.lengths.min() < 1:
            raise UserError(f"--data {folder}: example {self.lengths.argmin()} of {split} has fewer than 2 tokens")

    def n_targets(self, i: int, mask_prompt: bool) -> int:
        """How many tokens of example i are predicted: all but the first, or with mask_prompt the answer's alone."""
        masked = max(0, int(self.prompt[i]) - 1) if mask_prompt else 0
        return max(0, int(self.lengths[i]) - masked)

    def batch(self, indices: list[int], mask_prompt: bool, device: str) -> tuple[Tensor, Tensor]:
        """Right-padded tokens and targets, (B, T) int64; targets are -100 where nothing is to be predicted.

        No attention mask is needed: attention is causal, so real positions never see the padding after them.
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


MAX_PADDING = 0.08  # a larger share of wasted positions is worth another micro-batch


def deal(indices: np.ndarray, lengths: np.ndarray, max_tokens: int, world: int) -> list[list[list[int]]]:
    """Cuts a global batch into micro-batches and deals them: a list of micro-batches for each process.

    Sorted by length, examples that lie together pad little. Every process gets the same number k of micro-batches
    (FSDP's collectives count on it): as few as max_tokens and MAX_PADDING allow. For each k the cut is made under the
    lowest limit that gives at most k x world parts, so that all are about the same work and the processes finish
    together. Part i goes to process i % world, so those that run at the same time are the most alike.
    """
    order = sorted(indices.tolist(), key=lambda i: (-lengths[i], i))
    longest = int(lengths[order[0]])

    def cut(limit: int) -> list[list[int]]:
        """Parts of at most `limit` padded tokens; the first example of a part is its longest."""
        parts = []
        for i in order:
            if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= limit:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    def lowest_limit(count: int) -> int:
        """The lowest limit under which there are at most `count` parts, by bisection."""
        low, high = longest, max_tokens
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(cut(middle)) <= count else (middle + 1, high)
        return low

    enough = lengths[order].sum() / (1 - MAX_PADDING)
    count = world * math.ceil(len(cut(max_tokens)) / world)
    while True:
        limit = lowest_limit(count)
        parts = cut(limit)
        if limit == longest or sum(len(part) * lengths[part[0]] for part in parts) <= enough:
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


def read_data(
    args: argparse.Namespace, config: LlamaConfig, ckpt: Checkpoint | None, processes: int
) -> tuple[Examples, Examples]:
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


def data_fingerprint(folder: Path) -> str:
    """A hash of the prepared data."""
    h = hashlib.sha256()
    for file in sorted(folder.glob("*.npy")):
        h.update(file.name.encode() + file.read_bytes())
    return h.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# the model: shapes first, then weights, whole or sharded


def ablations(args: argparse.Namespace) -> dict:
    """The ablations of SPP that the command asks for, as SPPLinear takes them; empty for SPP itself."""
    usual = {"beta": True, "zero_init": "beta", "residual": True}
    given = {"beta": not args.no_beta, "zero_init": args.zero_init, "residual": not args.no_residual}
    return {key: value for key, value in given.items() if value != usual[key]}


def update_masks(model: Llama, sparsity: Sparsity) -> None:
    """Equation 2: every dynamic layer's mask follows the magnitude of its dense weight."""
    for module in model.modules():
        if isinstance(module, DynamicLinear):
            module.mask.copy_(keep_mask(module.weight.detach().abs(), sparsity))


def build(args: argparse.Namespace, config: LlamaConfig) -> Llama:
    """The model with its adapters on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = Llama(config).to(getattr(torch, args.dtype))
        if args.method != "full":
            options = ablations(args) | {"matmul": args.matmul} if args.method == "spp" else {}
            inject(model, method=args.method, r=args.r, scale=args.scale, **options)
    model.activation_checkpointing = args.activation_checkpointing
    return model


def materialise(
    model: Llama, weights: Mapping[str, Tensor], seed: int, device: str, mesh: DeviceMesh | None = None
) -> None:
    """Fills a meta model: adapters drawn from the seed, everything else from `weights` (name -> tensor).

    With a mesh the blocks and the root become FSDP units, every tensor sharded by rows, and a process touches its own
    rows of the memory-mapped checkpoint alone. Adapters are drawn whole, on the CPU, before they are sharded, so that
    the start of a run does not depend on the number of processes.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, AdapterLinear) and module.factors:
            for name in module.factors:
                meta = getattr(module, name)
                setattr(module, name, nn.Parameter(torch.empty_like(meta, device="cpu"), meta.requires_grad))
            module.reset_parameters()
    if mesh is not None:
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def own(w: Tensor, dtype: torch.dtype) -> Tensor:
        """What this process holds of a weight: all of it, or its rows, cut as FSDP2 cuts."""
        if mesh is None:
            return w.to(device, dtype)
        chunks = w.chunk(mesh.size())  # the last may be shorter, or missing
        rows = chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else w[:0]
        rows = rows.to(device, dtype, copy=True)
        return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=w.shape, stride=w.stride())

    state = {name: own(weights[name], p.dtype) for name, p in model.state_dict().items() if name in weights}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, DynamicLinear):
            module.mask = torch.ones_like(module.weight, dtype=torch.bool)
    if mesh is None:
        model.to(device)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [p for p in model.parameters() if p.requires_grad]


# The library's own gathering and dealing of sharded states: names are the model's, whatever wraps it.
STATE_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def learned(model: Llama) -> dict[str, Tensor]:
    """Trainable parameters and masks, whole, on the CPU of rank 0 (elsewhere empty): a collective under FSDP."""
    names = {name for name, p in model.named_parameters() if p.requires_grad} | {k for k, _ in model.named_buffers()}
    return {name: w for name, w in get_model_state_dict(model, options=STATE_OPTIONS).items() if name in names}


# ----------------------------------------------------------------------------------------------------------------------
# what a run leaves on disk


class StateWriter:
    """Writes step-N.pt in a thread while the next steps run, and keeps the newest two."""

    def __init__(self, out_dir: Path):
        self.out_dir = out_dir
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.last = None  # what is being written

    def write(self, state: dict) -> None:
        """Takes a copy of the state; waits for the one before it to be written."""
        self.wait()
        self.last = self.thread.submit(self._write, copy.deepcopy(state))

    def _write(self, state: dict) -> None:
        with atomic(self.out_dir / f"step-{state['step']:06}.pt") as tmp:
            torch.save(state, tmp)
        for old in sorted(self.out_dir.glob("step-*.pt"))[:-2]:
            old.unlink()

    def wait(self) -> None:
        """Returns when the last state is on disk; raises what writing it raised."""
        if self.last:
            self.last.result()


def write_adapter(path: Path, tensors: dict[str, Tensor], args: argparse.Namespace, base: str) -> None:
    """The adapter file, from what `learned` returns: a dict of `adapter`, `method`, `r`, `scale`, `base`, `options`."""
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith(".mask")]:  # dynamic: what is kept of the weight
        weight = name.replace(".mask", ".weight")
        tensors[weight] = tensors[weight] * tensors.pop(name)  # a new tensor: on a CPU the old one is the model's own
    adapter = {name.removeprefix("model."): w for name, w in tensors.items()}
    about = {"method": args.method, "r": args.r, "scale": args.scale, "base": base, "options": ablations(args)}
    with atomic(path) as tmp:
        torch.save({"adapter": adapter} | about, tmp)


def newest_state(out_dir: Path, say: Callable[[str], None]) -> dict:
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


# What may differ when a run goes on: none of these moves the result by more than rounding (the checkpoint and the data
# are compared by fingerprint).
MAY_DIFFER = ("resume", "out_dir", "data", "ckpt", "device", "max_tokens", "save_interval")
MAY_DIFFER += ("fsdp", "activation_checkpointing", "compile")


def open_run(out_dir: Path, args: argparse.Namespace, steps: int, base: str, world: int) -> TextIO:
    """Writes config.json for a new run; for a resumed one checks that it is the same run. Returns the folder's lock."""
    if not args.out_dir or out_dir.resolve() == Path(args.data).resolve():
        raise UserError(f"--out_dir {args.out_dir or repr('')}: name a folder of its own for the run")
    check_out(out_dir / "merged.pt", "--out_dir")
    config = {"settings": vars(args), "steps": steps, "base": base, "data": data_fingerprint(Path(args.data))}
    config["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    config["world_size"] = world
    file = out_dir / "config.json"
    if not args.resume:
        if there := [name for name in ("config.json", "adapter.pt", "merged.pt") if (out_dir / name).exists()]:
            raise UserError(f"--out_dir {out_dir}: holds {there[0]}; --resume continues a run, or name another folder")
        with atomic(file) as tmp:
            tmp.write_text(json.dumps(config, indent=2) + "\n")
        return lock_run(out_dir)
    if not file.exists():
        raise UserError(f"--resume: {out_dir} holds no run (no config.json)")
    old = read_json(file, dict)
    for key in ("base", "data"):
        if old[key] != config[key]:
            raise UserError(f"--resume: {out_dir} was run with another {key} ({old[key]}, now {config[key]})")
    for key, now in config["settings"].items():
        if key not in MAY_DIFFER and old["settings"].get(key) != now:
            raise UserError(f"--resume: {out_dir} was run with --{key} {old['settings'].get(key)}, not {now}")
    return lock_run(out_dir)


def lock_run(out_dir: Path) -> TextIO:
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
# the run


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Linear warm-up over a share of the steps, then linear decay towards 0."""
    rise = math.ceil(warmup * steps)
    return peak * min((step + 1) / (rise + 1), (steps - step) / max(1, steps - rise))


def catch_signals() -> list[int]:
    """A list that a first SIGINT or SIGTERM is put into, for the loop to see; a second one ends the process at once."""
    caught = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for n in numbers:
            signal.signal(n, signal.SIG_DFL)

    for n in numbers:
        signal.signal(n, catch)
    return caught


def join_processes(device: str, world: int) -> DeviceMesh:
    """The process group that torchrun has prepared, or without torchrun a group of one, as a mesh."""
    if device == "cuda":
        take_a_gpu()
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


def accumulate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], n: int, factor: float) -> Tensor:
    """Adds the gradient of `factor` times the summed loss over n micro-batches to .grad. Returns that sum, float64, ().

    Gradients are exchanged between the processes once, with the last micro-batch.
    """
    total = 0
    for i, (tokens, targets) in enumerate(batches):
        if isinstance(net, FSDPModule):
            net.set_requires_gradient_sync(i == n - 1)
        elif isinstance(net, DistributedDataParallel):
            net.require_backward_grad_sync = i == n - 1
        loss = net(tokens, targets)
        (loss * factor).backward()
        total += loss.detach().double()
    return total


@torch.no_grad()
def validation_loss(net: nn.Module, val: Examples, args: argparse.Namespace, rank: int, world: int) -> float:
    """Mean loss over the target tokens of all held-out examples; nan where there are none."""
    n = len(val.lengths)
    if n == 0:
        return math.nan
    total = torch.zeros((), dtype=torch.float64, device=args.device)
    for indices in deal(np.arange(n), val.lengths, args.max_tokens, world)[rank]:
        total += net(*val.batch(indices, args.mask_prompt, args.device)).double()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / max(1, sum(val.n_targets(i, args.mask_prompt) for i in range(n)))


def write_result(out_dir: Path, model: Llama, ckpt: Checkpoint | None, args: argparse.Namespace, steps: int) -> None:
    """merged.pt: the adapter merged into the checkpoint's own, unrounded weights, or with --method full the model."""
    if args.method != "full":
        write_checkpoint(merge_checkpoint(ckpt, out_dir / "adapter.pt"), out_dir / "merged.pt")
        return
    model.history = [*(ckpt.history if ckpt else []), {"method": "full", "data": str(args.data), "steps": steps}]
    tokenizer = ckpt.tokenizer if ckpt else args.tokenizer
    save(model, out_dir / "merged.pt", load_tokenizer(tokenizer) if tokenizer else None)


def main() -> None:
    args = parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    say = tqdm.write if rank == 0 else lambda text: None

    # --- settings, data and the model's shapes: whatever is wrong with them is said before the run's folder is touched
    check_settings(args)
    ckpt = open_checkpoint(args.ckpt) if args.ckpt else None
    config = ckpt.config if ckpt else PRESETS[args.preset]
    fill_in(args, config, ckpt)
    train = val = None
    if args.dry_run is None or (Path(args.data) / "train.npy").exists():
        train, val = read_data(args, config, ckpt, processes=args.dry_run or world)
    model = build(args, config)  # on the meta device: under FSDP no process ever holds all of it
    if args.dry_run is not None:
        return dry_run(model, args, train)
    plan = Plan(len(train.lengths), args.batch_size, args.epochs, args.seed)

    # --- the folder of the run, and the processes
    out_dir = Path(args.out_dir)
    base = ckpt.fingerprint() if ckpt else args.preset  # what the adapter belongs to
    if rank == 0:
        lock = open_run(out_dir, args, plan.steps, base, world)  # noqa: F841  held until the process ends
    mesh = join_processes(args.device, world) if world > 1 or args.fsdp else None
    if ckpt:
        zeros, pattern = sparsity_of(ckpt["model.layers.0.mlp.up_proj.weight"])
        stay = "; they stay" if args.method in ("spp", "masked", "masked_lora") else ""
        say(f"{args.ckpt}: {100 * zeros:.1f}% zeros ({pattern or 'unstructured'}) in layers.0.mlp.up_proj{stay}")

    # --- model and optimizer
    if ckpt is None:
        torch.manual_seed(args.seed)
    materialise(model, ckpt or Llama(config).state_dict(), args.seed, args.device, mesh if args.fsdp else None)
    if args.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)  # micro-batches differ in length
    optimizer = torch.optim.AdamW(trainable(model), lr=args.lr, weight_decay=args.weight_decay)
    net = DistributedDataParallel(model) if world > 1 and not args.fsdp else model
    start, best = 0, math.inf  # steps done, lowest validation loss
    if args.resume:
        state = newest_state(out_dir, say)
        set_model_state_dict(model, state["model"], options=STATE_OPTIONS)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=STATE_OPTIONS)
        start, best = state["step"], state["best"]
        say(f"resuming after step {start} of {plan.steps}")

    # --- the loop
    stop = catch_signals()
    writer = StateWriter(out_dir)
    if rank == 0:
        trim_log(out_dir / "log.jsonl", start)
    log = open(out_dir / "log.jsonl" if rank == 0 else os.devnull, "a", buffering=1)  # noqa: SIM115  open to the end
    if start == 0:
        val_loss = validation_loss(net, val, args, rank, world)
        log.write(json.dumps({"step": 0, "val_loss": val_loss}) + "\n")
        say(f"step 0: validation loss {val_loss:.4f}")
    bar = tqdm(range(start, plan.steps), initial=start, total=plan.steps, disable=None if rank == 0 else True)
    for step in bar:
        t0 = time.perf_counter()
        if args.method == "dynamic" and step % args.mask_interval == 0:
            update_masks(model, parse_sparsity(args.sparsity))
        lr = learning_rate(step, plan.steps, args.warmup, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the gradient of the mean over all target tokens of the global batch; DDP and FSDP take the mean over the
        # processes where we want the sum, hence the factor
        micro_batches = deal(plan[step], train.lengths, args.max_tokens, world)[rank]
        n_targets = max(1, sum(train.n_targets(i, args.mask_prompt) for i in plan[step]))
        batches = (train.batch(indices, args.mask_prompt, args.device) for indices in micro_batches)
        loss = accumulate(net, batches, len(micro_batches), world / n_targets)
        grad_norm = nn.utils.clip_grad_norm_(trainable(model), args.grad_clip or math.inf)
        grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        optimizer.step()
        optimizer.zero_grad()

        # what all processes must agree on, in one collective: the loss, and whether any was asked to stop
        sums = torch.stack([loss, loss.new_tensor(len(stop))])
        if mesh:
            dist.all_reduce(sums)
        loss, stopping = sums[0].item() / n_targets, sums[1].item() > 0
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} at step {step + 1}: a lower --lr, or --dtype float32, may help")
        speed = n_targets / (time.perf_counter() - t0)
        line = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm.item(), "tokens": n_targets}
        line |= {"tokens_per_second": speed, "peak_memory": peak_memory(args.device)}
        log.write(json.dumps(line) + "\n")
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s")

        done = step + 1 == plan.steps
        if done or (step + 1) % args.eval_interval == 0:
            val_loss = validation_loss(net, val, args, rank, world)
            log.write(json.dumps({"step": step + 1, "val_loss": val_loss}) + "\n")
            say(f"step {step + 1}: training loss {loss:.4f}, validation loss {val_loss:.4f}")
            if args.method != "full" and (val_loss < best or math.isnan(val_loss)):  # nan: nothing is held out
                best, tensors = val_loss, learned(model)
                if rank == 0:
                    write_adapter(out_dir / "adapter.pt", tensors, args, base)
        if done or stopping or (step + 1) % args.save_interval == 0:
            tensors, moments = learned(model), get_optimizer_state_dict(model, optimizer, options=STATE_OPTIONS)
            if rank == 0:
                writer.write({"model": tensors, "optimizer": moments, "step": step + 1, "best": best})
        if stopping and not done:
            writer.wait()
            say(f"stopped after step {step + 1} of {plan.steps}; the same command with --resume goes on from there")
            sys.exit(128 + stop[0] if stop else 1)
    writer.wait()

    # --- the result
    if rank == 0:
        write_result(out_dir, model, ckpt, args, plan.steps)
        say("wrote " + " and ".join(str(out_dir / f) for f in ("adapter.pt", "merged.pt") if (out_dir / f).exists()))
    if mesh:
        dist.barrier()  # nobody leaves while another still writes
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# appendix: --dry_run, what a run would need


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages: `now`, and the most so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, op: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
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


def simulate(args: argparse.Namespace, config: LlamaConfig, rows: int, T: int) -> np.ndarray:
    """Bytes alive (before a step, after its forward pass, at its peak), for a micro-batch of rows x T tokens.

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


def estimate(model: Llama, args: argparse.Namespace, world: int, rows: int, T: int) -> dict[str, int]:
    """Bytes of tensors that a process needs, by part, where the largest micro-batch has rows x T tokens."""
    c = model.config
    shards = world if args.fsdp else 1
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


def dry_run(model: Llama, args: argparse.Namespace, train: Examples | None) -> None:
    """Prints what each of --dry_run N processes would need, and how long the run is."""
    world = args.dry_run
    largest = (max(1, args.max_tokens // PAPER_LENGTH), min(PAPER_LENGTH, args.max_tokens))
    if train is not None:
        plan = Plan(len(train.lengths), args.batch_size, args.epochs, args.seed)
        targets, padded, parts = 0, 0, []
        for step in range(min(plan.steps, plan.per_epoch)):
            dealt = deal(plan[step], train.lengths, args.max_tokens, world)
            targets += sum(train.n_targets(i, args.mask_prompt) for i in plan[step])
            padded += padded_tokens(dealt, train.lengths)
            parts += [(len(part), int(train.lengths[part[0]])) for part in sum(dealt, []) if part]
        largest = max(parts, key=math.prod)
    learn = sum(p.numel() for p in trainable(model))
    total = sum(p.numel() for p in model.parameters())
    print(f"trainable parameters   {learn:,} ({100 * learn / total:.3f}% of {total:,})")
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


if __name__ == "__main__":
    cli(main, "--activation_checkpointing, a smaller --max_tokens, or --fsdp on several GPUs")
