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
                output error, the sum of W_ij * S_j over its removed j, towards 0. S_j = sum of x_j over all tokens /
                number of sequences. Weights never change; only q, k, v and o are swapped. The paper calls this DST.

Statistics, scores and Hessians are float32, whatever the model's dtype.

A model on disk is never loaded as a whole. One block at a time is in memory, and each finished one is written to
OUT.partial. When a run is killed, the same command goes on at its first unfinished block and ends with the same bytes.

What differs from the official codes (Wanda 8e8fc87, SparseGPT 147d215, DSnoT 4c029df): exactly the number of weights
that was asked for is removed, by rank. Their threshold, `<= sorted[k]`, removes one more, and all that tie with it.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import (
    Block,
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
    number,
    open_checkpoint,
    open_hf,
    read_json,
    rope_tables,
    torch_load,
    write_checkpoint,
    write_hf_extras,
    write_safetensors,
)

METHODS = ("magnitude", "wanda", "sparsegpt")

# The seven linears of a block by the input they share: the first one's name stands for the input.
GROUPS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}

SAMPLE = 256  # calibration tokens on which the report measures output errors

Sparsity = float | tuple[int, int]  # the share of zeros, or (N, M)
Tables = tuple[Tensor, Tensor]  # what `rope_tables` returns


def parse_sparsity(text: str) -> Sparsity:
    """ "0.5" -> 0.5, the share of zeros; "2:4" -> (2, 4), 2 kept of every 4 along the input. UserError for the rest."""
    try:
        if ":" in text:
            n, m = (int(part) for part in text.split(":"))
            if 0 < n < m:
                return n, m
        elif 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise UserError(f"--sparsity {text}: expected a share of zeros such as 0.5, or N:M such as 2:4 (2 kept of 4)")


@dataclasses.dataclass
class Settings:
    """How to prune. UserError for a method that is none of METHODS."""

    method: str = "wanda"
    sparsity: Sparsity | Callable[[str], Sparsity] = 0.5  # or a function of a linear's name, "layers.3.mlp.up_proj"
    dsnot_cycles: int = 0  # swaps that DSnoT may make in a row; 0: no DSnoT
    dsnot_threshold: float = 0.1  # a row whose expected output error is no larger than this is left alone

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: expected one of {', '.join(METHODS)}")


@dataclasses.dataclass
class Statistics:
    """What is known of an input of C numbers. Sums are over all tokens, divided by the number of sequences."""

    square: Tensor  # (C,) float32: A, the sum of x^2
    total: Tensor  # (C,) float32: S, the sum of x; for DSnoT, otherwise 0
    variance: Tensor  # (C,) float32: V, the variance within a sequence, its mean over sequences; for DSnoT, otherwise 0
    hessian: Tensor | None  # (C, C) float32: H, 2 * the sum of x x^T, its lower triangle alone; for SparseGPT
    sample: Tensor  # (SAMPLE, C), the model's dtype: some of the inputs, to measure output errors on
    U: Tensor | None = None  # (C, C) float32: the upper Cholesky factor of the damped Hessian's inverse


# ----------------------------------------------------------------------------------------------------------------------
# the walk


@torch.no_grad()
def prune_model(
    model: Llama,
    calib: np.ndarray | Tensor,
    method: str = "wanda",
    sparsity: str | float | Callable[[str], Sparsity] = "0.5",
    dsnot_cycles: int = 0,
    dsnot_threshold: float = 0.1,
) -> list[dict]:
    """Prunes the seven linears of every block of a loaded model, in place. Returns a report of each linear.

    calib: token ids (nsamples, seqlen), an array or a tensor. sparsity: "0.5", "2:4", or a function from a linear's
    name ("layers.3.mlp.up_proj") to 0.5 or (2, 4). dsnot_cycles: the swaps of DSnoT, 0 for none. A line of the report
    has the linear's name ("layer"), its zeros, its size, and the relative change of its output ("error").
    UserError for a method, sparsity or token that is none, and for weights or activations that hold NaN or Inf.
    """
    pattern = sparsity if callable(sparsity) else parse_sparsity(str(sparsity))
    settings = Settings(method, pattern, dsnot_cycles, dsnot_threshold)
    tokens = check_calib(calib, model.config.vocab_size).to(model.lm_head.weight.device)
    x = model.model.embed_tokens(tokens)  # (sequences, T, hidden_size)
    tables = rope_tables(model.config, torch.arange(tokens.shape[1], device=x.device), x.dtype)
    batch = batch_size(model.config, tokens, x.device)
    report = []
    for i, block in enumerate(tqdm(model.model.layers, desc="pruning", unit="block", disable=None)):
        report += prune_block(block, i, x, settings, tables, batch, tqdm.write)
    return report


@torch.no_grad()
def prune_block(
    block: Block,
    i: int,
    x: Tensor,
    settings: Settings,
    tables: Tables,
    batch: int,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Prunes block i in place, and replaces x (sequences, T, hidden_size), its inputs, by its outputs.

    batch: sequences run at once. say: where a remark about damping goes. Returns a report of each linear.
    """
    for name, w in block.named_parameters():
        if not all(bound.isfinite() for bound in w.aminmax()):  # the bounds of what holds a NaN are NaN
            raise UserError(f"layers.{i}.{name}: the weights hold NaN or Inf")
    stats = gather_statistics(block, x, tables, batch, settings.method == "sparsegpt", settings.dsnot_cycles > 0)
    report = []
    for first, names in GROUPS.items():
        s = stats.pop(first)  # so that it is freed after its linears: Hessians are the largest things in memory
        if not s.square.isfinite().all():
            hint = "; try --dtype bfloat16 or float32" if x.dtype == torch.float16 else ""
            raise UserError(f"layers.{i}.{first}: its inputs hold NaN or Inf{hint}")
        if s.hessian is not None:
            s.U = cholesky_factor(s.hessian, f"layers.{i}.{first}", say)
            s.hessian = None
        for name in names:
            linear = block.get_submodule(name)
            full_name = f"layers.{i}.{name}"
            sparsity = settings.sparsity(full_name) if callable(settings.sparsity) else settings.sparsity
            if isinstance(sparsity, tuple) and linear.in_features % sparsity[1]:
                raise UserError(f"{full_name}: {linear.in_features} columns are no multiple of M = {sparsity[1]}")
            swapped = name.startswith("self_attn")  # by DSnoT
            report.append({"layer": full_name, **prune_linear(linear, s, sparsity, settings, swapped)})
        del s
    run_block(block, x, tables, batch)
    return report


def gather_statistics(
    block: Block, x: Tensor, tables: Tables, batch: int, hessian: bool, moments: bool
) -> dict[str, Statistics]:
    """The first pass: statistics of a block's four inputs, by the keys of GROUPS. x (sequences, T, hidden_size) stays.

    hessian: whether to sum up Hessians. moments: whether to sum up what DSnoT needs, total and variance.
    """
    n_sequences, T, _ = x.shape
    stride = max(1, n_sequences * T // SAMPLE)
    linears = {name: block.get_submodule(name) for name in GROUPS}
    stats, hooks = {}, []
    for name, linear in linears.items():
        C = linear.in_features
        square, total, variance = torch.zeros(3, C, device=x.device)
        H = torch.zeros(C, C, device=x.device) if hessian else None
        s = stats[name] = Statistics(square, total, variance, H, x.new_empty(0, C))
        hook = lambda module, args, s=s: add_batch(s, args[0], n_sequences, moments, stride)
        hooks.append(linear.register_forward_pre_hook(hook))
    # Nobody reads what comes out of this pass, and down_proj comes last in it: once its input is seen, its matmul, a
    # fifth of a LLaMA block's work, is left out.
    linears["mlp.down_proj"].forward = lambda x: x.new_zeros(())
    for part in x.split(batch):
        block(part, *tables)
    del linears["mlp.down_proj"].forward
    for hook in hooks:
        hook.remove()
    return stats


def add_batch(s: Statistics, inputs: Tensor, n_sequences: int, moments: bool, stride: int) -> None:
    """Adds inputs (B, T, C), those of B of the n_sequences; every stride-th token is kept as a sample."""
    tokens = inputs.flatten(0, 1).float()  # (B * T, C)
    s.square += tokens.square().sum(0) / n_sequences
    if moments:
        s.total += tokens.sum(0) / n_sequences
        s.variance += inputs.float().var(1, unbiased=False).sum(0) / n_sequences
    if s.hessian is not None:
        # H is symmetric: of each quarter of its columns only the rows from the diagonal's on, 5/8 of the work.
        C = len(s.hessian)
        width = -(-C // 4)
        for a in range(0, C, width):
            b = min(a + width, C)
            s.hessian[a:, a:b].addmm_(tokens[:, a:].T, tokens[:, a:b], alpha=2 / n_sequences)
    s.sample = torch.cat([s.sample, inputs.flatten(0, 1)[::stride]])[:SAMPLE]


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
    calib = np.asarray(calib)
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
    """Sequences to run at once: 2,048 tokens on a CPU, where more are no faster; on a GPU what fits into its memory.

    The latter is counted, not tried, so that a run that goes on after a kill cuts its batches where it did before.
    """
    sequences, T = tokens.shape
    if torch.device(device).type == "cpu":
        return max(1, 2048 // T)
    hidden, mlp = config.hidden_size, config.intermediate_size
    # activations of all sequences; the largest Hessian three times (see cholesky_factor), the others, and the block
    fixed = 4 * tokens.numel() * hidden + 4 * (3 * mlp**2 + 3 * hidden**2 + 4 * hidden**2 + 3 * hidden * mlp)
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
    y = (s.sample @ W.T).float()  # (SAMPLE, R)
    # With DSnoT every linear, swapped or not, has a mask that is chosen row by row, and weights that do not change.
    dsnot_follows = settings.dsnot_cycles > 0
    if settings.method == "sparsegpt" and not dsnot_follows:
        W.copy_(sparsegpt(W, s.square == 0, s.U, sparsity))
    else:
        whole = settings.method == "magnitude" and not dsnot_follows and not isinstance(sparsity, tuple)
        # Where rows do not depend on each other, a few at a time: scores and their ranks take 20 bytes a weight.
        for rows in [W] if whole else W.split(max(1, 2**24 // W.shape[1])):
            score = score_weights(rows, s, settings.method)
            mask = keep_mask(score, sparsity, whole)
            if dsnot_follows and swapped:
                mask = dsnot(rows, mask, score, s, sparsity, settings.dsnot_cycles, settings.dsnot_threshold)
            rows.mul_(mask)
    change = ((s.sample @ W.T).float() - y).norm() / y.norm().clamp_min(1e-30)
    return {"zeros": W.numel() - W.count_nonzero().item(), "size": W.numel(), "error": change.item()}


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
    equal scores the left one goes first.
    """
    if isinstance(sparsity, tuple):
        n, m = sparsity
        groups = score.reshape(-1, m)
        keep = keep_by_comparing(groups, m - n) if m <= 8 else keep_by_rank(groups, m - n)  # beyond: too many pairs
    else:
        rows = score.reshape(1, -1) if whole else score
        keep = keep_by_rank(rows, int(rows.shape[1] * sparsity))
    return keep.reshape(score.shape)


def keep_by_rank(score: Tensor, k: int) -> Tensor:
    """All but the k lowest of each row: (rows, columns) bool."""
    if k == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = score.kthvalue(k, dim=1, keepdim=True).values  # (rows, 1): the highest score that goes
    keep = score > threshold
    places = score.shape[1] - k - keep.sum(1, keepdim=True)  # (rows, 1): how many of those that equal it stay
    if places.any():
        ties = score == threshold
        from_the_right = ties.flip(1).cumsum(1, dtype=torch.int32).flip(1)  # 1 for the rightmost tie, 2 for the next
        keep |= ties & (from_the_right <= places)
    return keep


def keep_by_comparing(score: Tensor, k: int) -> Tensor:
    """The same for very short rows, by comparing all pairs of columns: an entry stays if k or more go before it.

    Sorting many short rows is slow: on 1024 x 2816 scores and one CPU thread a stable argsort and a scatter take 3.5
    times as long for 2:4 and 2 times for 2:8, keep_by_rank 3 and 1.9 times. (topk promises no order of equal scores.)
    """
    columns = score.unbind(1)
    before = torch.zeros(len(columns), len(score), dtype=torch.uint8, device=score.device)  # how many go before it
    for right in range(len(columns)):
        for left in range(right):
            left_goes_first = columns[left] <= columns[right]
            before[right] += left_goes_first
            before[left] += ~left_goes_first
    return (before >= k).T


def sparsegpt(W: Tensor, dead: Tensor, U: Tensor, sparsity: Sparsity, slab: int = 128) -> Tensor:
    """SparseGPT's pruned and updated weight, (R, C) float32.

    W: (R, C). dead: (C,) bool, inputs that are always 0, whose columns become 0. U: (C, C), from `cholesky_factor`.
    The mask of a group of columns, M for N:M and a slab otherwise, is chosen when the group's turn comes, from the
    weights as updated by then. An update reaches the end of the slab at once, all columns beyond it at the slab's end.
    """
    W = W.float().masked_fill(dead, 0)
    if isinstance(sparsity, tuple):
        group = sparsity[1]
        slab = max(group, slab - slab % group)  # whole groups; the result does not depend on it
    else:
        group = slab
    for start in range(0, W.shape[1], slab):
        end = min(start + slab, W.shape[1])
        u = U[start:end, start:end]  # (slab, slab)
        w = W[:, start:end].T.contiguous()  # (slab, R): turned over, so that a column of W lies in one piece
        errors = torch.empty_like(w)
        for first in range(0, end - start, group):
            columns = slice(first, first + group)
            score = w[columns].T.square() / u.diagonal()[columns].square()  # (R, group)
            keep = keep_mask(score, sparsity, whole=True).T.contiguous()  # (group, R)
            for j, kept in enumerate(keep, first):
                errors[j] = w[j].masked_fill(kept, 0) / u[j, j]
                w[j:].addcmul_(u[j, j:, None], errors[j], value=-1)
                w[j].mul_(kept)
        W[:, start:end] = w.T
        W[:, end:].addmm_(errors.T, U[start:end, end:], alpha=-1)
    return W


def cholesky_factor(H: Tensor, name: str, say: Callable[[str], None]) -> Tensor:
    """U (C, C), upper, with (H + damping)^-1 = U^T U, from the lower triangle of H (C, C), whose diagonal it changes.

    With the order of rows and columns reversed, H = L L^T, and L^-1, reversed again, is U: a single factorisation, and
    no inverse of H. The damping is 1% of the mean diagonal; where that does not make H positive definite `say` is told,
    and it is ten times more, up to 1000%. UserError if that is still too little; `name` says of which input.
    """
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0: its column goes, whatever the factor says
    mean = diagonal.mean().item()
    damped = 0  # percent so far
    for percent in (1, 10, 100, 1000):
        if percent > 1:
            say(f"{name}: the Hessian is not positive definite; damping it by {percent}% of its mean diagonal")
        diagonal.add_((percent - damped) / 100 * mean)
        damped = percent
        L, info = torch.linalg.cholesky_ex(H.flip(0, 1).T)  # flip turns the lower triangle up, and .T down again
        if info == 0:
            identity = torch.eye(len(H), device=H.device)
            return torch.linalg.solve_triangular(L, identity, upper=False, out=identity).flip(0, 1)
    raise UserError(f"{name}: the Hessian is not positive definite even when damped by 1000% of its mean diagonal")


def dsnot(
    W: Tensor, mask: Tensor, score: Tensor, s: Statistics, sparsity: Sparsity, cycles: int, threshold: float
) -> Tensor:
    """DSnoT's mask, (R, C) bool, after up to `cycles` swaps in each row of the mask (R, C) it is given.

    score: (R, C), what that mask was chosen by. Removing W_ij takes its contribution, W_ij * S_j, from the expected
    output of row i. The sum over all that is removed is the row's error, which the swaps bring towards 0.
    """
    contribution = W.float() * s.total  # (R, C)
    gain_per_variance = (contribution / s.variance).nan_to_num(0)  # (R, C)
    error = (contribution * ~mask).sum(1)  # (R,)
    growable = ~mask  # (R, C): the removed weights that may still come back
    prunable = mask.clone()  # (R, C): the weights kept at first that may still go
    mask = mask.clone()
    active = torch.ones(len(W), dtype=torch.bool, device=W.device)  # (R,): rows that were never refused a swap
    rows = torch.arange(len(W), device=W.device)
    n_of_m = isinstance(sparsity, tuple)
    if n_of_m:
        m = sparsity[1]
        group = torch.arange(W.shape[1], device=W.device) // m  # (C,)
    else:
        score = score_weights(W, s, "wanda")  # whatever chose the mask
    # In one cycle a row with a positive error grows (takes back) the removed weight with the largest contribution per
    # variance, a row with a negative error the one with the most negative. In return it prunes the kept weight of the
    # lowest score: with N:M in the same group; otherwise, by Wanda's score, among those whose contribution has the
    # opposite sign to the error, so that both halves of the swap help. The swap is refused, and the row left as it is
    # for good, where a candidate is lacking, the error is within the threshold, or (N:M) it would change its sign. Both
    # candidates are used up either way.
    for _ in range(cycles):
        positive = error[:, None] > 0  # (R, 1)
        gain = torch.where(positive, gain_per_variance, -gain_per_variance)  # (R, C)
        grow = gain.masked_fill_(~growable, -torch.inf).argmax(1)  # (R,): a column for each row
        if n_of_m:
            candidates = prunable & (group == (grow // m)[:, None])  # (R, C)
        else:
            candidates = prunable & torch.where(positive, contribution < 0, contribution > 0)
        prune = score.masked_fill(~candidates, torch.inf).argmin(1)  # (R,)
        error_after = error + contribution[rows, prune] - contribution[rows, grow]
        swap = active & growable[rows, grow] & candidates[rows, prune]  # where none is left, argmax names any column
        swap &= error.abs() > threshold
        if n_of_m:
            swap &= error_after.sign() == error.sign()
        mask[rows[swap], grow[swap]] = True
        mask[rows[swap], prune[swap]] = False
        growable[rows, grow] = False
        prunable[rows, prune] = False
        error = torch.where(swap, error_after, error)
        active = swap
    return mask


# ----------------------------------------------------------------------------------------------------------------------
# a model on disk


def read_calib(path: str | Path) -> np.ndarray:
    """What a .npy file holds. UserError where it cannot be read or is none."""
    try:
        return np.load(path, allow_pickle=False)
    except OSError as e:
        raise UserError(f"--calib {path}: cannot be read: {e.strerror or e}") from None
    except (ValueError, EOFError):
        raise UserError(f"--calib {path}: is not a .npy file, or is damaged") from None


@torch.no_grad()
def prune_checkpoint(
    ckpt: Checkpoint,
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
    UserError as there, and where OUT.partial is another command's or cannot be written.
    """
    work = Path(f"{out}.partial")
    n_layers = ckpt.config.n_layers
    calib = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    job = {"base": ckpt.fingerprint(), "device": str(device), "dtype": str(dtype), "calib_sha256": calib}
    claim(work, {**entry, **job})
    start, x, report = resume(work, ckpt, tokens, device, dtype)
    tables = rope_tables(ckpt.config, torch.arange(tokens.shape[1], device=device), x.dtype)
    batch = batch_size(ckpt.config, tokens, device)
    for i in tqdm(range(start, n_layers), initial=start, total=n_layers, desc="pruning", unit="block", disable=None):
        block = load_block(ckpt, i, device, dtype)
        report += prune_block(block, i, x, settings, tables, batch, tqdm.write)
        # First the block, then the inputs of the next: a run killed in between prunes this block once more.
        with atomic(shard_file(work, i, n_layers)) as tmp:
            write_safetensors(tmp, {f"model.layers.{i}.{name}": w.cpu() for name, w in block.state_dict().items()})
        del block  # before the next is loaded
        save_inputs(work, i + 1, x, report)
    finish(work, out, ckpt, entry, report, dtype)
    return report


def claim(work: Path, job: dict) -> None:
    """Makes OUT.partial this job's folder, if it is not so yet. UserError if it is another's."""
    file = work / "job.json"
    if not file.exists():
        with atomic(file) as tmp:
            tmp.write_text(json.dumps(job))
    elif read_json(file) != job:
        raise UserError(f"{work}: belongs to another command's run; remove it, or name another --out")


def resume(
    work: Path, ckpt: Checkpoint, tokens: Tensor, device: torch.device | str, dtype: torch.dtype
) -> tuple[int, Tensor, list[dict]]:
    """The first block that is not done, its inputs (sequences, T, hidden_size), and the report of those before it."""
    if saved := sorted(work.glob("inputs-*.pt")):
        state = torch_load(saved[-1])
        return state["block"], state["x"].to(device, copy=True), state["report"]  # a copy: the file is only mapped
    return 0, ckpt["model.embed_tokens.weight"][tokens].to(device, dtype), []


def save_inputs(work: Path, i: int, x: Tensor, report: list[dict]) -> None:
    """Writes what `resume` reads, for block i, and drops what was written for the block before."""
    with atomic(work / f"inputs-{i:05}.pt") as tmp:
        try:
            torch.save({"block": i, "x": x, "report": report}, tmp)
        except RuntimeError as e:  # torch's word for a full disk
            raise OSError(str(e).splitlines()[0]) from None
    (work / f"inputs-{i - 1:05}.pt").unlink(missing_ok=True)


def load_block(ckpt: Checkpoint, i: int, device: torch.device | str, dtype: torch.dtype) -> Block:
    """Block i on the device, the only one in memory."""
    with torch.device("meta"):
        block = Block(ckpt.config)
    block.load_state_dict({name: w.to(device, dtype) for name, w in ckpt.block(i).items()}, assign=True)
    return block


def shard_file(work: Path, i: int, n_layers: int) -> Path:
    """Where block i goes, or for i = n_layers all that belongs to no block: embeddings, the last norm and lm_head."""
    return work / f"model-{i + 1:05}-of-{n_layers + 1:05}.safetensors"


def finish(work: Path, out: Path, ckpt: Checkpoint, entry: dict, report: list[dict], dtype: torch.dtype) -> None:
    """All blocks are pruned: adds what else a checkpoint holds, and turns OUT.partial into `out`."""
    n_layers = ckpt.config.n_layers
    in_block = lambda name: name.startswith("model.layers.")
    with atomic(shard_file(work, n_layers, n_layers)) as tmp:
        write_safetensors(tmp, ckpt, {name: w.to(dtype) for name, w in ckpt.like.items() if not in_block(name)})
    shard = {name: int(name.split(".")[2]) if in_block(name) else n_layers for name in ckpt}
    weight_map = {name: shard_file(work, i, n_layers).name for name, i in shard.items()}
    write_hf_extras(work, ckpt.changed({}, entry), weight_map, dtype)
    with atomic(work / "prune.json") as tmp:
        tmp.write_text(json.dumps({**entry, "kinds": summary(report), "layers": report}, indent=2) + "\n")
    if out.suffix == ".pt":
        write_checkpoint(open_hf(work), work / out.name)  # in here, where what a killed run leaves goes with the rest
        os.replace(work / "prune.json", report_file(out))
        os.replace(work / out.name, out)
        shutil.rmtree(work)
        return
    for file in (*work.glob("inputs-*.pt"), *work.glob(".*.tmp*"), work / "job.json"):  # .tmp: a killed run's
        file.unlink()
    if out.is_dir():
        out.rmdir()  # check_out has found it empty
    work.rename(out)


def report_file(out: Path) -> Path:
    """Where the report goes: beside a .pt, inside of a directory."""
    return out.with_suffix(".json") if out.suffix == ".pt" else out / "prune.json"


def summary(report: list[dict]) -> dict[str, dict]:
    """For each kind of linear, over all blocks: the sparsity reached, and the mean relative output error."""
    kinds = {}
    for line in report:
        kinds.setdefault(line["layer"].rpartition(".")[2], []).append(line)
    return {
        kind: {
            "sparsity": sum(line["zeros"] for line in lines) / sum(line["size"] for line in lines),
            "error": sum(line["error"] for line in lines) / len(lines),
        }
        for kind, lines in kinds.items()
    }


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Prune a LLaMA without training it.")
    add = parser.add_argument
    add("--ckpt", required=True, help="the dense model: a .pt file, a Hugging Face directory or a Meta directory")
    add("--method", default="wanda", choices=METHODS, help="how weights are scored")
    add("--sparsity", default="2:4", help="share of zeros, or N:M: N kept of every M along the input")
    add("--calib", required=True, help=".npy that data/c4/prepare.py wrote")
    add("--nsamples", type=number(int, 1), help="use that many of its sequences (default: all)")
    add("--dsnot", action="store_true", help="afterwards swap entries of the mask (DSnoT, the paper's DST)")
    add("--dsnot_cycles", type=number(int, 1), default=50, help="swaps a row may make")
    add("--dsnot_threshold", type=number(float, 0), default=0.1, help="output error below which a row is left alone")
    add_device(parser)
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the result (default: the checkpoint's)")
    add("--out", required=True, help="a new directory in Hugging Face's layout, or a .pt file")
    args = parser.parse_args()
    check_device(args.device)
    if not args.dsnot and (args.dsnot_cycles, args.dsnot_threshold) != (50, 0.1):
        raise UserError("--dsnot_cycles and --dsnot_threshold are settings of --dsnot, which is not given")
    return args


def main() -> None:
    args = parse_args()
    sparsity = parse_sparsity(args.sparsity)
    out = check_out(args.out, inputs=[args.ckpt])
    ckpt = open_checkpoint(args.ckpt)
    config = ckpt.config
    calib = f"--calib {args.calib}"
    tokens = check_calib(read_calib(args.calib), config.vocab_size, args.nsamples, calib)
    sequences, seqlen = tokens.shape
    config.check_length(seqlen, calib)
    if isinstance(sparsity, tuple):
        for C in (config.hidden_size, config.intermediate_size, config.n_heads * config.head_dim):
            if C % sparsity[1]:
                raise UserError(f"--sparsity {args.sparsity}: a linear has {C} columns, no multiple of {sparsity[1]}")
    if config.max_seq_len < seqlen:
        note = f"{calib}: its windows of {seqlen} tokens are longer than the model's {config.max_seq_len} positions"
        print(f"note: {note}", file=sys.stderr)

    settings = Settings(args.method, sparsity, args.dsnot_cycles if args.dsnot else 0, args.dsnot_threshold)
    entry = {"method": args.method, "sparsity": args.sparsity, "source": str(args.ckpt)}
    entry["calib"] = f"{Path(args.calib).name} ({sequences} x {seqlen})"
    if args.dsnot:
        entry |= {"dsnot_cycles": args.dsnot_cycles, "dsnot_threshold": args.dsnot_threshold}
    dtype = getattr(torch, args.dtype) if args.dtype else ckpt.like["model.norm.weight"].dtype
    report = prune_checkpoint(ckpt, tokens, settings, out, entry, torch.device(args.device), dtype)

    print(f"{'linear':<12} {'sparsity':>9} {'relative output error':>22}   (on {SAMPLE} calibration tokens)")
    for kind, line in summary(report).items():
        print(f"{kind:<12} {100 * line['sparsity']:8.2f}% {line['error']:22.4f}")
    print(f"wrote {out} and {report_file(out)}")


if __name__ == "__main__":
    cli(main, "fewer --nsamples, or --device cpu")
