"""Which weights go: post-training pruning (section 3.1 of the paper, equation 1: W <- W o mask).

    python prune.py --ckpt llama-7b --method wanda --sparsity 2:4 --calib data/c4/calib.npy --out pruned.pt
    python prune.py --ckpt llama-2-70b --method sparsegpt --sparsity 0.5 --calib calib.npy --out pruned-70b

The walk is the same for every method. It goes block by block, and when it comes to a block, those before it are already
pruned: (1) a forward pass of the still dense block over the calibration inputs gathers statistics of what enters its
linears; (2) its seven linears are pruned; (3) a second pass, through the pruned block, makes the inputs of the next
block. Embeddings, norms and lm_head are left as they are. The linears q, k and v share one input, gate and up another,
so four statistics serve all seven.

W is R x C (out x in), x is one token's input (C numbers), and N:M means that N of every M consecutive columns are
*kept*. A method is a score and a set of weights within which it is compared; the lowest are removed. With N:M that set
is always the M weights of a group; otherwise:

    magnitude   |W_ij|                 the whole matrix
    Wanda       |W_ij| * sqrt(A_j)     one row; A_j = sum of x_j^2 over all tokens / number of sequences
    SparseGPT   W_ij^2 / U_jj^2        a slab of 128 columns; U is the upper Cholesky factor of the inverse of the
                                       Hessian H = 2 / sequences * sum of x x^T, damped by 1% of its mean diagonal.
                                       Columns are taken from left to right, and each one's error is made up for in
                                       the columns to its right, which therefore change:
                                       err_j = (removed part of column j) / U_jj;  W[:, j:] -= err_j[:, None] * U[j, j:]
    DSnoT       starts from a mask of any of the three, here always compared within a row (and without SparseGPT's
                update); then, in each row of W on its own, up to 50 swaps, each chosen to bring that row's expected
                output error, the sum of W_ij * S_j over its removed j, towards 0: the weight that helps most by
                W_ij * S_j / variance of x_j comes back, and of those whose W_ij * S_j has the other sign the one of the
                lowest Wanda score goes (with N:M: of the same group, the lowest by the score that chose the mask, and a
                swap past 0 is refused). A row ends at its first refusal. S_j = sum of x_j over all tokens / number of
                sequences. Weights never change; only q, k, v and o are swapped. The paper calls this DST.

Statistics, scores and Hessians are float32, whatever the model's dtype.

A model on disk is never loaded as a whole. One block is in memory and the next is being read, and each finished one is
written to OUT.partial. When a run is killed, the same command goes on at its first unfinished block and ends with the
same bytes.

What differs from the official codes (Wanda 8e8fc87, SparseGPT 147d215, DSnoT 4c029df): exactly the number of weights
that was asked for is removed, by rank. Their threshold, `<= sorted[k]`, removes one more, and all that tie with it.
And a weight that is 0 already stays 0, so that a sparse model can be pruned further in steps: with Wanda and magnitude
that is so by itself, their lowest score being 0, but the official SparseGPT's updates bring zeros back.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.checkpoint import VERSION, Checkpoint, UserError, atomic, check_ours, check_out, checked_file, digest
from data.checkpoint import lock_partial, open_hf, read_json, read_npy, save_torch, torch_load, write_checkpoint
from data.checkpoint import write_hf_extras, write_json, write_safetensors
from model import Block, Llama, LlamaConfig, Parser, add_device, check_device, check_dtype, cli, common_dtype
from model import number, open_llama, rope_tables, stream_blocks

METHODS = ("magnitude", "wanda", "sparsegpt")

# The seven linears of a block by the input they share: the first one's name stands for the input.
GROUPS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
LINEARS = [name for group in GROUPS.values() for name in group]

SAMPLE = 256  # calibration tokens on which the report measures output errors

Sparsity = float | tuple[int, int]  # the share of zeros, or (N, M)
ByName = list[tuple[str, Sparsity]]  # what the linears of a name have; the name "" stands for all the rest
Pattern = Sparsity | ByName | Callable[[str], Sparsity]  # the last: of a linear's name, "layers.3.mlp.up_proj"
Tables = tuple[Tensor, Tensor]  # what `rope_tables` returns


def parse_sparsity(text: str | Sparsity) -> Sparsity | ByName:
    """ "0.5" or 0.5 -> 0.5, the share of zeros; "2:4" or (2, 4) -> (2, 4), 2 kept of every 4 along the input;
    "mlp=0.6,2:4" -> [("mlp", 0.6), ("", (2, 4))]. UserError for the rest."""
    text = ":".join(map(str, text)) if isinstance(text, tuple) else str(text)  # back to text: (2, 4) is checked too
    if "=" in text:
        entries = {}
        for entry in text.split(","):
            name, _, value = (part.strip() for part in entry.rpartition("="))
            if name in entries:
                raise UserError(f"--sparsity {text}: has two entries for {name or 'the linears without a name'}")
            if not value:
                raise UserError(f"--sparsity {text}: has an entry without a value, {entry!r}")
            entries[name] = parse_sparsity(value)
        return [*entries.items()]
    try:
        if ":" in text:
            n, m = (int(part) for part in text.split(":"))
            if 0 < n < m:
                return n, m
        elif 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    several = "; several entries have names: mlp=0.6,2:4" if "," in text else ""
    raise UserError(f"--sparsity {text}: expected a share of zeros like 0.5, or N:M like 2:4 (2 kept of 4){several}")


def format_sparsity(sparsity: Sparsity | ByName) -> str:
    """The inverse of `parse_sparsity`: (2, 4) -> "2:4"."""
    if isinstance(sparsity, list):
        return ",".join(f"{name}={format_sparsity(s)}".removeprefix("=") for name, s in sparsity)
    return ":".join(map(str, sparsity)) if isinstance(sparsity, tuple) else str(sparsity)


def sparsity_of_linear(sparsity: Pattern, linear: str) -> Sparsity:
    """What the linear of this full name has: the last entry whose name is a part of it, between dots. UserError where
    there is none."""
    if callable(sparsity):
        return sparsity_of_linear(parse_sparsity(sparsity(linear)), linear)
    if not isinstance(sparsity, list):
        return sparsity
    named = [s for name, s in sparsity if name and f".{name}." in f".{linear}."]
    fitting = [s for name, s in sparsity if not name] + named
    if not fitting:
        raise UserError(f"--sparsity {format_sparsity(sparsity)}: says nothing of {linear}, nor of the rest")
    return fitting[-1]


def check_pattern(sparsity: Pattern, config: LlamaConfig) -> None:
    """UserError where an N:M pattern's groups do not fit the inputs of a linear, where a linear is not named, and for a
    name that is no linear's."""
    with torch.device("meta"):
        block = Block(config)
    linears = {}  # layers.0.self_attn.q_proj, ... -> its columns
    for i in range(config.num_hidden_layers):
        for name in LINEARS:
            linears[f"layers.{i}.{name}"] = block.get_submodule(name).in_features
    for linear, C in linears.items():
        pattern = sparsity_of_linear(sparsity, linear)
        if isinstance(pattern, tuple) and C % pattern[1]:
            n, m = pattern
            raise UserError(f"--sparsity {n}:{m}: {linear} has {C} columns, no multiple of {m}")
    if isinstance(sparsity, list):
        for name, _ in sparsity:
            if name and not any(f".{name}." in f".{linear}." for linear in linears):
                raise UserError(f"--sparsity {name}: is a part of no linear's name, such as {next(iter(linears))}")


@dataclasses.dataclass
class Settings:
    """How to prune. UserError for a method that is none of METHODS, and for a sparsity that is none."""

    method: str
    sparsity: str | Pattern  # as `prune_model` takes it; from then on as `parse_sparsity` returns it
    dsnot_cycles: int = 0  # swaps that DSnoT may make in a row; 0: no DSnoT
    dsnot_threshold: float = 0.1  # a row whose expected output error is no larger than this is left alone

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: expected one of {', '.join(METHODS)}")
        if not callable(self.sparsity):
            self.sparsity = parse_sparsity(self.sparsity)

    def entry(self) -> dict:
        """What a model's history says of it."""
        sparsity = "by layer" if callable(self.sparsity) else format_sparsity(self.sparsity)
        entry = {"method": self.method, "sparsity": sparsity}
        if self.dsnot_cycles:
            entry.update(dsnot_cycles=self.dsnot_cycles, dsnot_threshold=self.dsnot_threshold)
        return entry


@dataclasses.dataclass
class Statistics:
    """What is known of an input of C numbers. Sums are over all tokens, divided by the number of sequences.

    total and variance are DSnoT's, hessian and U are SparseGPT's: None where they are not needed.
    """

    square: Tensor  # (C,) float32: A, the sum of x^2
    sample: Tensor  # (SAMPLE, C), the model's dtype: some of the inputs, to measure output errors on
    total: Tensor | None = None  # (C,) float32: S, the sum of x
    variance: Tensor | None = None  # (C,) float32: V, the variance within a sequence, its mean over sequences
    hessian: Tensor | None = None  # (C, C) float32: H, 2 * the sum of x x^T, its lower triangle alone
    U: Tensor | None = None  # (C, C) float32: the upper Cholesky factor of the damped Hessian's inverse

    def add(self, inputs: Tensor, n_sequences: int, places: Tensor) -> None:
        """Adds inputs (B, T, C), one batch of the n_sequences. places: those of its tokens that the sample takes."""
        x = inputs.float()
        tokens = x.flatten(0, 1)  # (B * T, C)
        self.square += tokens.square().sum(0) / n_sequences
        if self.total is not None:
            self.total += tokens.sum(0) / n_sequences
            # within a sequence; var(1) takes ten times as long on a CPU
            self.variance += (x - x.mean(1, keepdim=True)).square_().mean(1).sum(0) / n_sequences
        if self.hessian is not None:
            # H is symmetric, and Cholesky reads one triangle. Four strips of columns, each from the diagonal down, are
            # 5/8 of the work of all of H; more strips would save more, but thinner products run slower.
            C = len(self.hessian)
            width = math.ceil(C / 4)
            for a in range(0, C, width):
                b = min(a + width, C)
                if inputs.is_cuda and inputs.dtype != torch.float32:
                    # the tensor cores' products of 16-bit numbers are exact in float32, in which they are summed
                    X = inputs.flatten(0, 1)
                    XX = torch.mm(X[:, a:].T, X[:, a:b], out_dtype=torch.float32)
                    self.hessian[a:, a:b].add_(XX, alpha=2 / n_sequences)
                else:
                    self.hessian[a:, a:b].addmm_(tokens[:, a:].T, tokens[:, a:b], alpha=2 / n_sequences)
        self.sample = torch.cat([self.sample, inputs.flatten(0, 1)[places]])


# ----------------------------------------------------------------------------------------------------------------------
# the walk


@torch.no_grad()
def prune_model(
    model: Llama,
    calib: np.ndarray | Tensor,
    method: str = "wanda",
    sparsity: str | Sparsity | Callable[[str], Sparsity] = "2:4",
    dsnot_cycles: int = 0,
    dsnot_threshold: float = 0.1,
) -> list[dict]:
    """Prunes the seven linears of every block of a loaded model, in place. Returns a report of each linear.

    calib: token ids (nsamples, seqlen), an array or a tensor. sparsity: "0.5", "2:4", "mlp=0.6,2:4", 0.5, (2, 4), or a
    function from a linear's name ("layers.3.mlp.up_proj") to 0.5 or (2, 4). dsnot_cycles: the swaps of DSnoT, 0 for
    none. A line of the report has the linear's name ("layer"), its zeros, its size, and the relative change of its
    output ("error"). What was done is added to the model's history.
    UserError for a method, sparsity or token that is none, and for weights or activations that hold NaN or Inf.
    """
    settings = Settings(method, sparsity, dsnot_cycles, dsnot_threshold)
    check_pattern(settings.sparsity, model.config)
    if not all(isinstance(block.get_submodule(name), nn.Linear) for block in model.model.layers for name in LINEARS):
        raise UserError("the model has adapters: merge them before pruning")
    tokens = check_calib(calib, model.config.vocab_size).to(model.lm_head.weight.device)
    precision = "highest"
    with contextlib.suppress(RuntimeError):  # of a caller who set it by torch's newer switches, which are left at this
        precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the caller may have TF32 on
    try:
        x = model.model.embed_tokens(tokens)  # (sequences, T, hidden_size)
        tables = rope_tables(model.config, torch.arange(tokens.shape[1], device=x.device), x.dtype)
        batch = batch_size(model.config, tokens, x.device)
        report = []
        for i, block in enumerate(tqdm(model.model.layers, desc="pruning", unit="block", disable=None)):
            report += prune_block(block, i, x, settings, tables, batch)
    finally:
        torch.set_float32_matmul_precision(precision)
    model.history = [*model.history, settings.entry()]
    return report


@torch.no_grad()
def prune_block(block: Block, i: int, x: Tensor, settings: Settings, tables: Tables, batch: int) -> list[dict]:
    """Prunes block i in place, and replaces x (sequences, T, hidden_size), its inputs, by its outputs.

    batch: sequences run at once. Returns a report of each linear.
    """
    for name, w in block.named_parameters():
        if not all(bound.isfinite() for bound in w.aminmax()):  # the bounds of what holds a NaN are NaN
            raise UserError(f"layers.{i}.{name}: the weights hold NaN or Inf")
    stats = gather_statistics(block, x, tables, batch, settings)
    report = []
    for first, names in GROUPS.items():
        s = stats.pop(first)  # so that it is freed after its linears: Hessians are the largest things in memory
        if not s.square.isfinite().all():
            hint = "; try --dtype bfloat16 or float32" if x.dtype == torch.float16 else ""
            raise UserError(f"layers.{i}.{first}: its inputs hold NaN or Inf{hint}")
        if s.hessian is not None:
            s.U = cholesky_factor(s.hessian, f"layers.{i}.{first}", tqdm.write)
            s.hessian = None
        for name in names:
            linear = block.get_submodule(name)
            full_name = f"layers.{i}.{name}"
            sparsity = sparsity_of_linear(settings.sparsity, full_name)
            swapped = name.startswith("self_attn")  # by DSnoT, whose official code leaves the MLP's masks alone
            report.append({"layer": full_name, **prune_linear(linear, s, sparsity, settings, swapped)})
        del s  # and with it U, before the next group's Hessian needs the memory
    run_block(block, x, tables, batch)
    return report


def gather_statistics(block: Block, x: Tensor, tables: Tables, batch: int, settings: Settings) -> dict[str, Statistics]:
    """The first pass: statistics of a block's four inputs, by the keys of GROUPS; x (sequences, T, hidden_size)."""
    n_sequences, T, _ = x.shape
    sample = torch.randperm(n_sequences * T, generator=torch.Generator().manual_seed(0))[:SAMPLE]  # places of tokens
    linears = {name: block.get_submodule(name) for name in GROUPS}
    stats, hooks = {}, []
    for name, linear in linears.items():
        C = linear.in_features
        s = stats[name] = Statistics(torch.zeros(C, device=x.device), x.new_empty(0, C))
        if settings.dsnot_cycles:
            s.total, s.variance = torch.zeros(2, C, device=x.device)
        if settings.method == "sparsegpt":
            s.hessian = torch.zeros(C, C, device=x.device)
        hook = lambda module, args, s=s: s.add(*args, n_sequences, places)  # s=s: this linear's, not the last one's
        hooks.append(linear.register_forward_pre_hook(hook))
    # A fifth of a block's work is saved by leaving out its last matmul, down_proj's: the hook sees its input, and no
    # one reads what this pass returns. An attribute hides the forward of the module's class; the block adds this 0.
    linears["mlp.down_proj"].forward = lambda x: x.new_zeros(())
    try:
        for i, part in enumerate(x.split(batch)):
            places = sample[sample // (batch * T) == i] % (batch * T)  # which the hooks read
            places = places.to(x.device, non_blocking=True)
            block(part, *tables)
    finally:  # out of memory, or Ctrl-C: the block may be a part of the caller's model
        del linears["mlp.down_proj"].forward
        for hook in hooks:
            hook.remove()
    return stats


def run_block(block: Block, x: Tensor, tables: Tables, batch: int) -> None:
    """The second pass: x (sequences, T, hidden_size), the block's inputs, is overwritten by its outputs."""
    for part in x.split(batch):
        part.copy_(block(part, *tables))


def check_calib(
    calib: np.ndarray | Tensor, vocab_size: int, nsamples: int | None = None, name: str = "calib"
) -> Tensor:
    """Calibration tokens, (sequences, seqlen) int64, from an array of token ids, of which every one is checked.

    nsamples: how many of its sequences to take, by default all. UserError, which begins with `name`, where there are
    fewer, where the array has another dtype or shape, or where a token is none of the vocabulary's.
    """
    calib = np.asarray(calib.cpu() if isinstance(calib, Tensor) else calib)
    if calib.ndim != 2 or calib.dtype.kind not in "iu" or not calib.size:
        raise UserError(f"{name}: holds {calib.dtype} of shape {calib.shape}, expected token ids (nsamples, seqlen)")
    if nsamples and len(calib) < nsamples:
        raise UserError(f"{name}: holds {len(calib)} sequences, --nsamples asks for {nsamples}")
    calib = calib[:nsamples].astype(np.int64)
    if calib.min() < 0 or calib.max() >= vocab_size:
        bad = calib.max() if calib.max() >= vocab_size else calib.min()
        raise UserError(f"{name}: token id {bad} is not among the model's {vocab_size}; was another tokenizer used?")
    return torch.from_numpy(calib)


def batch_size(config: LlamaConfig, tokens: Tensor, device: torch.device | str) -> int:
    """Sequences to run at once: 1,024 tokens on a CPU, where more are slower; on a GPU what fits into its memory.

    The latter is counted, not tried, so that a run that goes on after a kill cuts its batches where it did before.
    """
    sequences, T = tokens.shape
    if torch.device(device).type == "cpu":
        return max(1, 1024 // T)
    hidden, mlp = config.hidden_size, config.intermediate_size
    # In bytes, as if all were float32: the activations of all sequences; the largest Hessian three times (while
    # `cholesky_factor` works, its copy and the factor stand beside it), the three others once, and two blocks.
    block = 4 * hidden**2 + 3 * hidden * mlp
    fixed = 4 * tokens.numel() * hidden + 4 * (3 * mlp**2 + 3 * hidden**2 + 2 * block)
    each = 4 * T * (8 * hidden + 6 * mlp)  # what a sequence keeps alive in a block, and float32 copies
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(sequences, max(1, int(0.9 * memory - fixed) // each))


# ----------------------------------------------------------------------------------------------------------------------
# one linear


def prune_linear(linear: nn.Linear, s: Statistics, sparsity: Sparsity, settings: Settings, swapped: bool) -> dict:
    """Prunes a linear in place. s: of its input. swapped: whether DSnoT, if it is asked for, changes this one's mask.

    Returns its zeros, its size, and the relative change of its output on the sample, |x W'^T - x W^T| / |x W^T|.
    """
    W = linear.weight.data  # (R, C)
    y = (s.sample @ W.T).float()  # (SAMPLE, R), before anything is changed
    # With DSnoT every linear, swapped or not, has a mask that is chosen row by row, and weights that do not change.
    dsnot_follows = settings.dsnot_cycles > 0
    if settings.method == "sparsegpt" and not dsnot_follows:
        W.copy_(sparsegpt(W, s.square == 0, s.U, sparsity))
    else:
        # Rows do not depend on each other, but for magnitude's, which are compared in the whole matrix. A mask takes up
        # to 28 bytes a weight to make, DSnoT 44, so no more of them are made at once than 16 million.
        whole = settings.method == "magnitude" and not dsnot_follows and not isinstance(sparsity, tuple)
        rows_at_once = len(W) if whole else max(1, 2**24 // W.shape[1])
        for rows in W.split(rows_at_once):
            score = score_weights(rows, s, settings.method)
            mask = keep_mask(score, sparsity, whole)
            if dsnot_follows and swapped:
                mask = dsnot(rows, mask, score, s, sparsity, settings.dsnot_cycles, settings.dsnot_threshold)
            rows.mul_(mask).add_(0.0)  # the sum makes 0 of a product's -0, which a .pt would store as a survivor
    change = ((s.sample @ W.T).float() - y).norm() / y.norm().clamp_min(1e-30)  # a linear of zeros has y = 0
    return {"zeros": int((W == 0).sum()), "size": W.numel(), "error": change.item()}


def score_weights(W: Tensor, s: Statistics, method: str) -> Tensor:
    """What each weight is worth, (R, C) float32, from W (R, C) and the statistics of its input."""
    score = W.float().abs()
    if method == "wanda":
        score *= s.square.sqrt()
    elif method == "sparsegpt":
        score = score.div_(s.U.diagonal()).square_()
    return score


def keep_mask(score: Tensor, sparsity: Sparsity, whole: bool = False) -> Tensor:
    """What stays, (R, C) bool, True = kept: the highest of each group of M (N:M), of each row, or of the whole matrix.

    Exactly the number asked for goes, by rank: int(C * sparsity) of a row, int(R * C * sparsity) of the matrix. Of
    equal scores the left one goes first. UserError where M does not divide C: a group would run over the end of a row.
    """
    if isinstance(sparsity, tuple):
        n, m = sparsity
        if score.shape[1] % m:
            raise UserError(f"--sparsity {n}:{m}: a matrix has {score.shape[1]} columns, no multiple of {m}")
        groups = score.reshape(-1, m)
        lowest = groups.argsort(dim=1, stable=True)[:, : m - n]  # stable: of equal scores the left one comes first
        return torch.ones_like(groups, dtype=torch.bool).scatter_(1, lowest, False).reshape(score.shape)
    rows = score.reshape(1, -1) if whole else score
    # Finding the lowest that stays takes a fifth to a half of a sort's time, by a key without ties. Its high 32 bits
    # are a float32's: as an integer in order too, if a negative one's are inverted. The low 32 are the column.
    bits = (rows.float() + 0.0).view(torch.int32)  # a copy, whose -0 is 0
    bits ^= bits >> 31 & 0x7FFFFFFF
    key = bits.long().bitwise_left_shift_(32).add_(torch.arange(rows.shape[1], device=score.device))
    k = int(rows.shape[1] * sparsity)
    lowest_kept = key.topk(k + 1, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    return (key >= lowest_kept).reshape(score.shape)


def sparsegpt(W: Tensor, dead: Tensor, U: Tensor, sparsity: Sparsity, slab: int = 128) -> Tensor:
    """SparseGPT's pruned and updated weight, (R, C) float32.

    W: (R, C). dead: (C,) bool, inputs that are always 0, whose columns become 0. U: (C, C), from `cholesky_factor`.
    The mask of a group of columns, M for N:M and a slab otherwise, is chosen when the group's turn comes, from the
    weights as updated by then. An update reaches the end of the slab at once, all columns beyond it at the slab's end.
    What is 0 stays 0: a group's zeros are the first to go, and where they are more than is asked for all of them do.
    """
    W = W.float().masked_fill(dead, 0)
    # (R, C). Updates move these too: when its column's turn comes each is removed again, and what it had become is made
    # up for by the columns after it.
    zeros = W == 0
    group = slab  # the columns whose mask is chosen together
    if isinstance(sparsity, tuple):
        group = sparsity[1]
        slab = max(group, slab - slab % group)  # whole groups; the result does not depend on it
    for start in range(0, W.shape[1], slab):
        end = min(start + slab, W.shape[1])
        u = U[start:end, start:end]  # (slab, slab)
        w = W[:, start:end].T.contiguous()  # (slab, R): turned over, so that a column of W lies in one piece
        z = zeros[:, start:end].T.contiguous()  # (slab, R)
        not_zero = (~z).to(w.dtype)
        errors = torch.empty_like(w)
        for first in range(0, end - start, group):
            columns = slice(first, first + group)
            score = (w[columns].T / u.diagonal()[columns]).square_()  # (R, group)
            score.masked_fill_(z[columns].T, -1)  # below every other
            keep = keep_mask(score, sparsity, whole=True).T * not_zero[columns]  # (group, R), numbers: 1 or 0
            for j, (kept, gone) in enumerate(zip(keep, 1 - keep, strict=True), first):
                torch.mul(w[j], gone, out=errors[j]).div_(u[j, j])  # what goes, on the column's own scale
                # Column j itself becomes w_j - err_j u_jj, for what goes 0 but for rounding; mul_ makes it exactly 0.
                w[j:].addcmul_(u[j, j:, None], errors[j], value=-1)
                w[j].mul_(kept)
        W[:, start:end] = w.T + 0.0  # which makes 0 of the -0 that a product leaves
        W[:, end:].addmm_(errors.T, U[start:end, end:], alpha=-1)  # one product in place of a pass for each column
    return W


def cholesky_factor(H: Tensor, name: str, log: Callable[[str], None]) -> Tensor:
    """U (C, C), upper, with (H + damping)^-1 = U^T U, from the lower triangle of H (C, C), whose diagonal it changes.

    With the order of rows and columns reversed, H = L L^T, and L^-1, reversed again, is U: a single factorisation, and
    no inverse of H. The damping is 1% of the mean diagonal; where that does not make H positive definite `log` is told,
    and it is ten times more, up to 1000%. UserError if that is still too little; `name` says of which input.
    """
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0: its column goes, whatever the factor says
    mean = diagonal.mean().item()
    for percent in (1, 10, 100, 1000):
        if percent > 1:
            log(f"{name}: the Hessian is not positive definite; damping it by {percent}% of its mean diagonal")
        diagonal.add_((percent - percent // 10) / 100 * mean)  # a tenth of it is there already
        L, info = torch.linalg.cholesky_ex(H.flip(0, 1).T)  # flip turns the lower triangle up, and .T down again
        if info == 0:
            identity = torch.eye(len(H), device=H.device)
            return torch.linalg.solve_triangular(L, identity, upper=False, out=identity).flip(0, 1)
    raise UserError(f"{name}: the Hessian is not positive definite even when damped by 1000% of its mean diagonal")


def dsnot(
    W: Tensor, mask: Tensor, score: Tensor, s: Statistics, sparsity: Sparsity, cycles: int, threshold: float
) -> Tensor:
    """DSnoT's mask, (R, C) bool, after up to `cycles` swaps in each row of the mask (R, C) it is given.

    score: (R, C), what that mask was chosen by; with N:M it also says what goes in a swap. Removing W_ij takes its
    contribution, W_ij * S_j, from the expected output of row i. The sum over all that is removed is the row's error,
    which the swaps bring towards 0.
    """
    contribution = W.float() * s.total  # (R, C)
    error = (contribution * ~mask).sum(1)  # (R,)
    # Taken back is the removed weight that helps most, by its contribution per variance: the most negative where the
    # row's error is negative, the largest where it is positive. gains holds both, (2, R, C); -inf may not come back.
    gain = (contribution / s.variance).nan_to_num(0)  # (R, C)
    gains = torch.stack([-gain, gain]).masked_fill_(mask | (W == 0), -torch.inf)  # what was 0 before stays 0
    # In return the kept weight of the lowest score goes: with N:M one of the same group; otherwise one whose
    # contribution has the opposite sign to the error, so that both halves of the swap help.
    n_of_m = isinstance(sparsity, tuple)
    if n_of_m:
        m = sparsity[1]
        scores = score.masked_fill(~mask, torch.inf).reshape(len(W), -1, m)  # (R, groups, M)
    else:
        score = score_weights(W, s, "wanda")  # whatever chose the mask, as in the official code
        opposite = torch.stack([contribution > 0, contribution < 0])
        scores = score.where(mask & opposite, torch.inf)  # (2, R, C)
    mask = mask.clone()
    active = torch.ones(len(W), dtype=torch.bool, device=W.device)  # (R,): rows that were never refused a swap
    rows = torch.arange(len(W), device=W.device)
    for _ in range(cycles):
        side = (error > 0).long()  # (R,)
        gain, grow = gains[side, rows].max(1)  # (R,) and a column for each row
        if n_of_m:
            lowest, place = scores[rows, grow // m].min(1)
            prune = grow // m * m + place
        else:
            lowest, prune = scores[side, rows].min(1)
        error_after = error + contribution[rows, prune] - contribution[rows, grow]
        # where no candidate is left the row is refused
        swap = active & (gain > -torch.inf) & (lowest < torch.inf) & (error.abs() > threshold)  # (R,)
        if n_of_m:  # what goes may work against the swap here, so one that overshoots 0 is refused
            swap &= error_after.sign() == error.sign()
        mask[rows[swap], grow[swap]] = True
        mask[rows[swap], prune[swap]] = False
        gains[:, rows, grow] = -torch.inf  # used up, whether swapped or refused
        scores.view(-1, *W.shape)[:, rows, prune] = torch.inf
        error = torch.where(swap, error_after, error)
        active = swap  # a refusal is final for the row
        if not active.any():
            break
    return mask


# ----------------------------------------------------------------------------------------------------------------------
# a model on disk: OUT.partial holds
#     job.json              which command this is, so that another one does not go on with it
#     model-00001-of-...    the pruned blocks, from the first on, a file each; at the end also what belongs to no block
#     inputs-00001.pt       after block 1: block 2's inputs, and the report and the digests of the blocks that are done
#     prune.json            at the end: the report


@torch.no_grad()
def prune_checkpoint(
    ckpt: Checkpoint,
    config: LlamaConfig,
    tokens: Tensor,
    settings: Settings,
    out: Path,
    entry: dict,
    device: torch.device | str,
    dtype: torch.dtype,
) -> list[dict]:
    """Prunes a checkpoint block by block into OUT.partial, from which `out` is made at the end. Goes on where it was.

    tokens: (sequences, seqlen), from `check_calib`. entry: what the history of the result, and its prune.json, say of
    this run. dtype: of the calculation and the result. Returns a report of each linear, as `prune_model` does.
    UserError as there, and where OUT.partial is another command's, or another process is at work in it.
    """
    work = Path(f"{out}.partial")
    held = lock_partial(work, [ckpt.path] if ckpt.path else [])  # noqa: F841  until this function returns
    check_out(out)  # again: whoever held the lock may have ended since the command's first look
    job = {"version": VERSION, **entry, "base": ckpt.fingerprint(), "device": str(device), "dtype": str(dtype)}
    if torch.device(device).type == "cuda":
        job["device"] = torch.cuda.get_device_name(device)  # another GPU cuts other batches and rounds otherwise
    job["calib"] = digest(tokens.numpy())
    if not (work / "job.json").exists():
        write_json(work / "job.json", job)
    elif read_json(work / "job.json") != job:
        raise UserError(f"{work}: belongs to another command's run; remove it, or name another --out")

    # --- where to begin
    state = read_inputs(work, config, tokens)
    if state:
        start, report, digests = state["block"], state["report"], state["digests"]
        x = state["x"].to(device, copy=True)  # a copy: the file is only mapped, and x is overwritten
    else:
        start, report, digests = 0, [], []
        check_dtype(ckpt, dtype)
        x = ckpt["model.embed_tokens.weight"][tokens].to(device, dtype)  # (sequences, T, hidden_size)

    # --- the walk, as in prune_model
    tables = rope_tables(config, torch.arange(tokens.shape[1], device=device), x.dtype)
    batch = batch_size(config, tokens, device)
    blocks = stream_blocks(ckpt, config, device, dtype, start)
    n = config.num_hidden_layers
    bar = tqdm(desc="pruning", total=n, initial=start, unit="block", disable=None)
    with ThreadPoolExecutor(1) as thread, bar:
        saving = None
        for i in range(start, n):
            block = next(blocks)
            report += prune_block(block, i, x, settings, tables, batch)
            # First the block, then the inputs of the next: a run killed in between prunes this block once more.
            with atomic(shard_file(work, i, config)) as tmp:
                write_safetensors(tmp, {f"model.layers.{i}.{name}": w.cpu() for name, w in block.state_dict().items()})
            digests.append(digest(np.memmap(shard_file(work, i, config), mode="r")))
            if saving:
                saving.result()  # raises what went wrong
            # Gigabytes, which reach the disk while the next block is at work. A copy, since that one overwrites x.
            saving = thread.submit(save_inputs, work, i + 1, x.to("cpu", copy=True), [*report], [*digests])
            del block  # so that it is gone while the next is waited for
            bar.update()
        if saving:
            saving.result()
    finish(work, out, ckpt, config, entry, report, dtype)
    return report


def read_inputs(work: Path, config: LlamaConfig, tokens: Tensor) -> dict | None:
    """What `save_inputs` has left; None where there is nothing, or where that or a pruned block is damaged."""
    saved = sorted(work.glob("inputs-*.pt"))
    if not saved:
        return None
    try:
        state = torch_load(saved[-1], checksums=True)
        block, x, report = state["block"], state["x"], state["report"]
        whole = saved[-1].name == f"inputs-{block:05}.pt" and x.shape == (*tokens.shape, config.hidden_size)
        whole = whole and len(report) == len(LINEARS) * block
        pruned = [digest(np.memmap(checked_file(shard_file(work, i, config)), mode="r")) for i in range(block)]
        whole = whole and pruned == state["digests"]
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OSError):
        whole = False
    if whole:
        return state
    tqdm.write(f"warning: {work} is truncated or damaged; beginning again")
    for file in saved:  # or the next life would find it once more, and begin again too
        file.unlink()
    return None


def save_inputs(work: Path, i: int, x: Tensor, report: list[dict], digests: list[str]) -> None:
    """Block i's inputs, the report of those before it, and digests of their files, in place of the last such file."""
    with atomic(work / f"inputs-{i:05}.pt") as tmp:
        save_torch({"block": i, "x": x, "report": report, "digests": digests}, tmp)
    (work / f"inputs-{i - 1:05}.pt").unlink(missing_ok=True)


def shard_file(work: Path, i: int, config: LlamaConfig) -> Path:
    """Where block i goes; one more file is for all that belongs to no block: embeddings, the last norm and lm_head."""
    return work / f"model-{i + 1:05}-of-{config.num_hidden_layers + 1:05}.safetensors"


def finish(
    work: Path, out: Path, ckpt: Checkpoint, config: LlamaConfig, entry: dict, report: list[dict], dtype: torch.dtype
) -> None:
    """All blocks are pruned: adds what else a checkpoint holds, and turns OUT.partial into `out`."""
    last = config.num_hidden_layers
    in_block = lambda name: name.startswith("model.layers.")
    shapes = {name: w.to(dtype) for name, w in ckpt.shapes.items()}
    with atomic(shard_file(work, last, config)) as tmp:
        write_safetensors(tmp, ckpt, {name: w for name, w in shapes.items() if not in_block(name)})
    shard = {name: int(name.split(".")[2]) if in_block(name) else last for name in ckpt}
    weight_map = {name: shard_file(work, i, config).name for name, i in shard.items()}
    write_json(work / "prune.json", {"version": VERSION, **entry, "kinds": summary(report), "layers": report})
    try:
        write_hf_extras(work, ckpt.changed({}, entry), weight_map, shapes)
        if out.suffix == ".pt":
            write_checkpoint(open_hf(work), work / out.name)  # in here, where a killed run's rest goes with all else
            os.replace(work / "prune.json", report_file(out))
            os.replace(work / out.name, out)
        # job.json last, so that no other command goes on from the inputs; .tmp: a killed run's
        for file in (*work.glob("inputs-*.pt"), *work.glob(".*.tmp*"), work / "job.json"):
            file.unlink()
        if out.suffix == ".pt":
            shutil.rmtree(work)
            return
        if out.is_dir():
            out.rmdir()  # check_out has found it empty
        work.rename(out)
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror or e}") from None
    with contextlib.suppress(OSError):  # the result is there
        (out / ".lock").unlink()  # not before: a folder without it would be taken for nobody's


def report_file(out: Path) -> Path:
    """Where the report goes: beside a .pt, inside of a directory."""
    return out.with_suffix(".json") if out.suffix == ".pt" else out / "prune.json"


def summary(report: list[dict]) -> dict[str, dict]:
    """For each kind of linear, over all blocks: the sparsity reached, and the mean relative output error."""
    kinds = {}
    for line in report:
        kinds.setdefault(line["layer"].rpartition(".")[2], []).append(line)
    total = lambda lines, key: sum(line[key] for line in lines)
    return {
        kind: {"sparsity": total(lines, "zeros") / total(lines, "size"), "error": total(lines, "error") / len(lines)}
        for kind, lines in kinds.items()
    }


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Prune a LLaMA without training it.")
    add = parser.add_argument
    add("--ckpt", required=True, help="the dense model: a .pt file, a Hugging Face directory or a Meta directory")
    add("--method", default="wanda", choices=METHODS, help="how weights are scored")
    sparsity = "share of zeros, or N:M: N kept of every M along the input; or by linear, as in self_attn=2:4,mlp=0.6: "
    sparsity += "the last entry whose name is a part of the linear's counts, one without a name is for the rest"
    add("--sparsity", default="2:4", help=sparsity)
    add("--calib", required=True, help=".npy that data/c4/prepare.py wrote")
    add("--nsamples", type=number(int, 1), help="use that many of its sequences (default: all)")
    add("--dsnot", action="store_true", help="afterwards swap entries of the mask (DSnoT, the paper's DST)")
    dsnot = ("--dsnot",)
    add("--dsnot_cycles", type=number(int, 1), default=50, help="swaps a row may make", goes_with=dsnot)
    least = "output error below which a row is left alone"
    add("--dsnot_threshold", type=number(float, 0), default=0.1, help=least, goes_with=dsnot)
    add_device(parser)
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the result (default: the checkpoint's)")
    add("--out", required=True, help="a new directory in Hugging Face's layout, or a .pt file")
    args = parser.parse_args()
    check_device(args.device)
    return args


def main() -> None:
    args = parse_args()
    settings = Settings(args.method, args.sparsity, args.dsnot_cycles if args.dsnot else 0, args.dsnot_threshold)
    out = check_out(args.out, inputs=[args.ckpt, args.calib], model=True)
    if out.suffix == ".pt":
        beside = check_out(report_file(out), inputs=[args.ckpt, args.calib])
        check_ours(beside, "kinds", f"--out {args.out}: its report")
    ckpt, config = open_llama(args.ckpt)
    calib = f"--calib {args.calib}"
    tokens = check_calib(read_npy(args.calib), config.vocab_size, args.nsamples, calib)
    sequences, seqlen = tokens.shape
    check_pattern(settings.sparsity, config)
    config.check_length(seqlen, f"{calib}: each window")

    entry = {**settings.entry(), "source": args.ckpt, "calib": f"{Path(args.calib).name} ({sequences} x {seqlen})"}
    dtype = getattr(torch, args.dtype) if args.dtype else common_dtype(ckpt)
    report = prune_checkpoint(ckpt, config, tokens, settings, out, entry, torch.device(args.device), dtype)

    sample = min(SAMPLE, tokens.numel())
    print(f"{'linear':<12} {'sparsity':>9} {'relative output error':>22}   (on {sample} calibration tokens)")
    for kind, line in summary(report).items():
        print(f"{kind:<12} {100 * line['sparsity']:8.2f}% {line['error']:22.4f}")
    print(f"wrote {out} and {report_file(out)}")


if __name__ == "__main__":
    cli(main, "fewer --nsamples, or --device cpu")
