"""Which weights go: post-training pruning (section 3.1 of the paper, equation 1: W <- W o mask).

    python prune.py --ckpt llama-7b --method wanda --sparsity 2:4 --calib data/c4/calib.npy --out pruned.pt
    python prune.py --ckpt llama-2-70b --method sparsegpt --sparsity 0.5 --calib calib.npy --out pruned-70b

The walk is the same for all methods. Block by block, the blocks before it being pruned already: (1) a forward pass of
the still dense block over the calibration inputs gathers statistics of what goes into its linears, (2) its seven
linears are pruned, (3) a second pass, now pruned, makes the next block's inputs. Embeddings, norms and lm_head stay.
q, k and v have one input, gate and up another, so there are four statistics for seven linears.

W is R x C (out x in), x a token's input (C numbers), N:M means N *kept* of M consecutive columns. Each method ranks:

    magnitude   |W_ij|                 over the whole matrix
    Wanda       |W_ij| * sqrt(A_j)     within each row; A_j = sum of x_j^2 over all tokens / sequences
    SparseGPT   W_ij^2 / U_jj^2        within slabs of 128 columns, U the upper Cholesky factor of the inverse Hessian
                                       H = 2 / sequences * sum of x x^T, damped by 1% of its mean diagonal. A removed
                                       weight's error is passed on to the columns right of it: W_j: -= err_j * U_j:
    DSnoT       a mask of the above (SparseGPT's without its update), then up to 50 swaps in a row that bring the row's
                expected output error, sum over removed j of W_ij * S_j, towards 0; S_j = sum of x_j / sequences.
                Weights never change; q, k, v and o alone. The paper's "DST".

Statistics, scores and Hessians are float32 whatever the model's dtype.

A model is walked on disk: one block at a time is in memory, and what is finished lies in OUT.partial. A killed run goes
on at the first unfinished block when the same command is given again, and ends with the same bytes.

What differs from the official codes (Wanda 8e8fc87, SparseGPT 147d215, DSnoT 4c029df): exactly the number of weights
asked for is removed, by rank, where a threshold `<= sorted[k]` of theirs removes one more, and all that tie with it.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import (
    Block,
    Checkpoint,
    Llama,
    LlamaConfig,
    Parser,
    UserError,
    atomic,
    check_out,
    cli,
    open_checkpoint,
    open_hf,
    read_json,
    rope_tables,
    torch_load,
    write_checkpoint,
    write_hf_extras,
    write_safetensors,
)

Sparsity = float | tuple[int, int]
# linears that have one input, named by the first
GROUPS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def parse_sparsity(text: str) -> Sparsity:
    """ "0.5" -> 0.5, the share of zeros; "2:4" -> (2, 4): 2 kept of every 4 along the input."""
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


# ----------------------------------------------------------------------------------------------------------------------
# masks


def keep_mask(score: Tensor, sparsity: Sparsity, whole: bool = False) -> Tensor:
    """True for what stays, (R, C): the highest scores of each group of M (N:M), of each row, or of the whole matrix.

    Exactly the number asked for goes, by rank; of equal scores the left one goes first.
    """
    if isinstance(sparsity, tuple):
        (n, m), entries = sparsity, score.reshape(-1, sparsity[1]).unbind(1)
        keep = score.new_empty(len(entries[0]), m, dtype=torch.bool)
        for i, s in enumerate(entries):  # an entry stays if m - n or more of its group go before it
            before = ((other <= s) if j < i else (other < s) for j, other in enumerate(entries) if j != i)
            keep[:, i] = sum(b.byte() for b in before) >= m - n
        return keep.view(score.shape)
    rows = score.reshape(1, -1) if whole else score
    k = int(rows.shape[1] * sparsity)
    if k == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = rows.kthvalue(k, dim=1, keepdim=True).values
    keep = rows > threshold
    places = rows.shape[1] - k - keep.sum(1, keepdim=True)  # left for those that tie at the threshold: the rightmost
    if places.any():
        ties = rows == threshold
        keep |= ties & (ties.flip(1).cumsum(1, dtype=torch.int32).flip(1) <= places)
    return keep.view(score.shape)


@dataclasses.dataclass
class Statistics:
    """What a method knows of an input of C numbers; float32. Sums are over all tokens, divided by the sequences."""

    square: Tensor  # A: of x^2
    total: Tensor  # S: of x
    variance: Tensor  # V: mean over sequences of the variance within a sequence
    hessian: Tensor | None  # 2 x x^T, its lower triangle
    sample: Tensor  # some inputs, to measure the output error on
    U: Tensor | None = None  # upper Cholesky factor of the damped Hessian's inverse


def cholesky_factor(H: Tensor, name: str, say: Callable) -> Tensor:
    """U, upper, with (H + damping)^-1 = U^T U, from the lower triangle of H (C, C), whose diagonal it overwrites.

    With rows and columns in reverse order H = L L^T; then U is L^-1 in reverse again: one factorisation, no
    inverse of H. The damping is 1% of the mean diagonal, ten times more until it suffices, UserError beyond 1000%.
    """
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0: its column goes whatever the factor says
    damping = 0.01 * diagonal.mean().item()
    for attempt in range(4):
        diagonal.add_(damping if attempt == 0 else 9 * damping * 10 ** (attempt - 1))
        L, info = torch.linalg.cholesky_ex(H.flip(0, 1).T)
        if info == 0:
            identity = torch.eye(len(H), device=H.device)
            return torch.linalg.solve_triangular(L, identity, upper=False, out=identity).flip(0, 1)
        say(f"{name}: the Hessian is not positive definite; damping it by {10 ** (attempt + 1)}% of its mean diagonal")
    raise UserError(f"{name}: the Hessian is not positive definite even when damped by 1000% of its mean diagonal")


def sparsegpt(W: Tensor, dead: Tensor, U: Tensor, sparsity: Sparsity, slab: int = 128) -> Tensor:
    """SparseGPT's pruned and updated weight, (R, C) float32. dead: (C,) bool, inputs that are always 0."""
    W = W.float().masked_fill(dead, 0)
    for start in range(0, W.shape[1], slab):
        end = min(start + slab, W.shape[1])
        w, u = W[:, start:end].T.contiguous(), U[start:end, start:end]  # (slab, R): a column of W lies in one piece
        scale, errors = u.diagonal().square(), torch.empty_like(w)
        if not isinstance(sparsity, tuple):
            keep = keep_mask(W[:, start:end].square() / scale, sparsity, whole=True).T.contiguous()
        for j in range(end - start):
            if isinstance(sparsity, tuple) and j % sparsity[1] == 0:  # with the weights as updated by now
                group = slice(j, j + sparsity[1])
                keep_group = keep_mask(w[group].T.square() / scale[group], sparsity).T
            kept = keep_group[j % sparsity[1]] if isinstance(sparsity, tuple) else keep[j]
            errors[j] = w[j].masked_fill(kept, 0) / u[j, j]
            w[j:].addcmul_(u[j, j:, None], errors[j], value=-1)
            w[j].mul_(kept)
        W[:, start:end] = w.T
        W[:, end:].addmm_(errors.T, U[start:end, end:], alpha=-1)
    return W


def dsnot(
    W: Tensor, mask: Tensor, score: Tensor, s: Statistics, sparsity: Sparsity, cycles: int, threshold: float
) -> Tensor:
    """DSnoT: the mask (R, C) after up to `cycles` swaps in each row. score: the initial mask's, for N:M."""
    d = W.float() * s.total
    worth = (d / s.variance).nan_to_num(0)
    err = (d * ~mask).sum(1)
    grown, fixed = ~mask, mask.clone()  # candidates that are left: to grow, and (what was kept at first) to prune
    active = torch.ones(len(W), dtype=torch.bool, device=W.device)
    rows = torch.arange(len(W), device=W.device)
    wanda = W.float().abs() * s.square.sqrt()
    mask, inf = mask.clone(), float("inf")
    for _ in range(cycles):
        up = err > 0
        grow = torch.where(up[:, None], worth, -worth).masked_fill_(~grown, -inf).argmax(1)
        if isinstance(sparsity, tuple):  # the weakest of the same group
            group = torch.arange(W.shape[1], device=W.device) // sparsity[1]
            candidates = fixed & (group == (grow // sparsity[1])[:, None])
            prune = score.masked_fill(~candidates, inf).argmin(1)
        else:  # the weakest whose removal helps
            candidates = fixed & torch.where(up[:, None], d < 0, d > 0)
            prune = wanda.masked_fill(~candidates, inf).argmin(1)
        there = candidates[rows, prune] & grown[rows, grow] & (err != 0)
        after = err + d[rows, prune] - d[rows, grow]
        swap = active & there & (err.abs() > threshold)
        if isinstance(sparsity, tuple):
            swap &= after.sign() == err.sign()
        mask[rows[swap], grow[swap]], mask[rows[swap], prune[swap]] = True, False
        grown[rows, grow], fixed[rows, prune] = False, False
        err, active = torch.where(swap, after, err), swap
    return mask


# ----------------------------------------------------------------------------------------------------------------------
# one block


def forward(block: Block, x: Tensor, tables, batch: int) -> None:
    """Runs the block over all sequences, x (sequences, T, C) overwritten by its outputs."""
    for part in x.split(batch):
        part.copy_(block(part, *tables))


SAMPLE = 256  # calibration tokens that the output errors of the report are measured on


def gather(block: Block, x: Tensor, tables, batch: int, hessian: bool, dsnot: bool) -> dict[str, Statistics]:
    """A forward pass that keeps statistics of the four inputs instead of the outputs. x: (sequences, T, C)."""
    n, stats, stride = len(x), {}, max(1, x[..., 0].numel() // SAMPLE)
    linears = {name: block.get_submodule(name) for name in GROUPS}
    for name, linear in linears.items():
        C = linear.in_features
        square, total, variance = torch.zeros(3, C, device=x.device)
        H = torch.zeros(C, C, device=x.device) if hessian else None
        stats[name] = Statistics(square, total, variance, H, x.new_empty(0, C))

    def see(s: Statistics, inputs: Tensor) -> None:
        tokens = inputs.flatten(0, 1).float()
        s.square += tokens.square().sum(0) / n
        if dsnot:
            s.total += tokens.sum(0) / n
            s.variance += inputs.float().var(1, unbiased=False).sum(0) / n
        if hessian:  # H is symmetric: of each quarter of its columns only what is not above the diagonal
            for columns in torch.arange(len(s.hessian), device=x.device).chunk(4):
                a, b = columns[0], columns[-1] + 1
                s.hessian[a:, a:b].addmm_(tokens[:, a:].T, tokens[:, a:b], alpha=2 / n)
        s.sample = torch.cat([s.sample, inputs.flatten(0, 1)[::stride]])[:SAMPLE]

    hooks = [linears[name].register_forward_pre_hook(lambda m, args, s=s: see(s, args[0])) for name, s in stats.items()]
    # Nobody reads what comes out of this pass: it ends where its last linear would begin.
    linears["mlp.down_proj"].forward = lambda x: x.new_zeros(())
    for part in x.split(batch):
        block(part, *tables)
    del linears["mlp.down_proj"].forward
    for hook in hooks:
        hook.remove()
    return stats


@dataclasses.dataclass
class Settings:
    """method: "magnitude", "wanda" or "sparsegpt". sparsity: a Sparsity, or a function from a linear's name
    ("layers.3.mlp.up_proj") to one. dsnot: swap cycles after the mask, 0 for none."""

    method: str = "wanda"
    sparsity: Sparsity | Callable[[str], Sparsity] = 0.5
    dsnot: int = 0
    threshold: float = 0.1


def prune_linear(W: Tensor, s: Statistics, sparsity: Sparsity, settings: Settings, swaps: bool) -> None:
    """Prunes W (R, C) in place."""
    if settings.method == "sparsegpt" and not settings.dsnot:
        W.copy_(sparsegpt(W, s.square == 0, s.U, sparsity))
        return
    whole = settings.method == "magnitude" and not settings.dsnot and not isinstance(sparsity, tuple)
    # Scores and sorting take 20 bytes an entry: a few rows at a time, where rows do not depend on each other.
    for part in [W] if whole else W.split(max(1, 2**24 // W.shape[1])):
        score = part.float().abs()
        if settings.method == "wanda":
            score *= s.square.sqrt()
        elif settings.method == "sparsegpt":
            score = score.div_(s.U.diagonal()).square_()
        mask = keep_mask(score, sparsity, whole)
        if swaps:
            mask = dsnot(part, mask, score, s, sparsity, settings.dsnot, settings.threshold)
        part.mul_(mask)


@torch.no_grad()
def prune_block(
    block: Block, i: int, x: Tensor, settings: Settings, tables, batch: int, say: Callable = print
) -> list[dict]:
    """Prunes block i in place and carries x (sequences, T, C) through it, in place. Returns a report of each linear."""
    for name, p in block.named_parameters():
        if not all(bound.isfinite() for bound in p.aminmax()):
            raise UserError(f"layers.{i}.{name}: the weights hold NaN or Inf")
    stats, report = gather(block, x, tables, batch, settings.method == "sparsegpt", bool(settings.dsnot)), []
    for first, names in GROUPS.items():
        s = stats.pop(first)
        if not s.square.isfinite().all():
            hint = "; try --dtype bfloat16 or float32" if x.dtype == torch.float16 else ""
            raise UserError(f"layers.{i}.{first}: its inputs hold NaN or Inf{hint}")
        if s.hessian is not None:
            s.U = cholesky_factor(s.hessian, f"layers.{i}.{first}", say)
            s.hessian = None
        for name in names:
            linear = block.get_submodule(name)
            full = f"layers.{i}.{name}"
            sparsity = settings.sparsity(full) if callable(settings.sparsity) else settings.sparsity
            if isinstance(sparsity, tuple) and linear.in_features % sparsity[1]:
                raise UserError(f"{full}: {linear.in_features} columns are no multiple of M = {sparsity[1]}")
            swaps = bool(settings.dsnot) and name.startswith("self_attn")
            W = linear.weight.data
            y = (s.sample @ W.T).float()
            prune_linear(W, s, sparsity, settings, swaps)
            change = ((s.sample @ W.T).float() - y).norm() / y.norm().clamp_min(1e-30)
            zeros = W.numel() - W.count_nonzero().item()
            report.append({"layer": full, "zeros": zeros, "size": W.numel(), "error": change.item()})
        del s
    forward(block, x, tables, batch)
    return report


def check_calib(calib, vocab_size: int, nsamples: int | None = None) -> Tensor:
    """(sequences, seqlen) int64 from an array of token ids, each checked."""
    calib = np.asarray(calib)
    if calib.ndim != 2 or calib.dtype.kind not in "iu" or not calib.size:
        raise UserError(f"--calib: holds {calib.dtype} of shape {calib.shape}, expected token ids (nsamples, seqlen)")
    if nsamples is not None and nsamples < 1:
        raise UserError(f"--nsamples {nsamples}: expected 1 or more")
    if nsamples and len(calib) < nsamples:
        raise UserError(f"--calib: holds {len(calib)} sequences, --nsamples asks for {nsamples}")
    calib = calib[:nsamples].astype(np.int64)
    if calib.min() < 0 or calib.max() >= vocab_size:
        bad = calib.max() if calib.max() >= vocab_size else calib.min()
        raise UserError(f"--calib: token id {bad} is not among the model's {vocab_size}; was another tokenizer used?")
    return torch.from_numpy(calib)


def batch_size(config: LlamaConfig, tokens: Tensor, device) -> int:
    """Sequences run at once: 2,048 tokens on a CPU, where more are no faster; on a GPU what fits into its memory.

    That is counted, not tried, so that a run that goes on after a kill cuts its batches where it did before.
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


@torch.no_grad()
def prune_model(
    model: Llama, calib, method: str = "wanda", sparsity="0.5", dsnot: int = 0, threshold: float = 0.1
) -> list[dict]:
    """Prunes the seven linears of every block of a loaded model, in place. Returns a report of each linear.

    calib: (nsamples, seqlen) token ids. sparsity: "0.5", "2:4", or a function from a linear's name to a Sparsity.
    """
    pattern = sparsity if callable(sparsity) else parse_sparsity(str(sparsity))
    tokens = check_calib(calib, model.config.vocab_size).to(model.lm_head.weight.device)
    x = model.model.embed_tokens(tokens)
    tables = rope_tables(model.config, torch.arange(tokens.shape[1], device=x.device), x.dtype)
    report, settings = [], Settings(method, pattern, dsnot, threshold)
    batch = batch_size(model.config, tokens, x.device)
    for i, block in enumerate(tqdm(model.model.layers, desc="pruning", unit="block", disable=None)):
        report += prune_block(block, i, x, settings, tables, batch, tqdm.write)
    return report


# ----------------------------------------------------------------------------------------------------------------------
# a model on disk


@torch.no_grad()
def prune_checkpoint(
    ckpt: Checkpoint, tokens: Tensor, settings: Settings, out: Path, entry: dict, device, dtype
) -> list[dict]:
    """Walks a checkpoint block by block; writes each as a shard into OUT.partial, which becomes `out` at the end."""
    work, n = Path(f"{out}.partial"), ckpt.config.n_layers
    job = {**entry, "base": ckpt.fingerprint(), "device": str(device), "dtype": str(dtype)}
    job["calib_sha256"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    if (work / "job.json").exists():
        if read_json(work / "job.json") != job:
            raise UserError(f"{work}: belongs to another command's run; remove it, or name another --out")
    else:
        work.mkdir(parents=True, exist_ok=True)
        with atomic(work / "job.json") as tmp:
            tmp.write_text(json.dumps(job))
    shard = lambda k: work / f"model-{k + 1:05}-of-{n + 2:05}.safetensors"  # noqa: E731

    def write(k: int, tensors: dict[str, Tensor]):
        if not shard(k).exists():
            with atomic(shard(k)) as tmp:
                write_safetensors(tmp, {name: w.to("cpu", dtype) for name, w in tensors.items()})

    # embeddings, and where an earlier run stopped
    embed = ckpt["model.embed_tokens.weight"]
    write(0, {"model.embed_tokens.weight": embed})
    states = sorted(work.glob("inputs-*.pt"))
    state = torch_load(states[-1]) if states else None
    start, report = (state["block"], state["report"]) if state else (0, [])
    x = state["x"].to(device, copy=True) if state else embed[tokens].to(device, dtype)
    del embed, state
    tables = rope_tables(ckpt.config, torch.arange(tokens.shape[1], device=device), x.dtype)
    batch = batch_size(ckpt.config, tokens, device)
    for i in tqdm(range(start, n), initial=start, total=n, desc="pruning", unit="block", disable=None):
        with torch.device("meta"):
            block = Block(ckpt.config)
        block.load_state_dict({name: w.to(device, dtype) for name, w in ckpt.block(i).items()}, assign=True)
        report += prune_block(block, i, x, settings, tables, batch, tqdm.write)
        tensors = {f"model.layers.{i}.{name}": w for name, w in block.state_dict().items()}
        shard(i + 1).unlink(missing_ok=True)  # of a run killed between the two writes
        write(i + 1, tensors)
        del block, tensors
        with atomic(work / f"inputs-{i + 1:05}.pt") as tmp:
            torch.save({"block": i + 1, "x": x, "report": report}, tmp)
        (work / f"inputs-{i:05}.pt").unlink(missing_ok=True)

    ends = {"model.embed_tokens.weight": 0, "model.norm.weight": n + 1, "lm_head.weight": n + 1}
    write(n + 1, {name: ckpt[name] for name, k in ends.items() if k and name in ckpt})
    weight_map = {name: shard(ends[name] if name in ends else int(name.split(".")[2]) + 1).name for name in ckpt}
    ckpt.history = [*ckpt.history, entry]
    write_hf_extras(work, ckpt, weight_map, dtype)
    for file in (*work.glob("inputs-*.pt"), *work.glob(".*.tmp*"), work / "job.json"):  # .tmp: of killed runs
        file.unlink()
    with atomic(out.with_suffix(".json") if out.suffix == ".pt" else work / "prune.json") as tmp:
        tmp.write_text(json.dumps({**entry, "kinds": summary(report), "layers": report}, indent=2) + "\n")
    if out.suffix == ".pt":
        write_checkpoint(open_hf(work), out)
        shutil.rmtree(work)
    else:
        if out.is_dir():
            out.rmdir()
        work.rename(out)
    return report


def summary(report: list[dict]) -> dict[str, dict]:
    """Of each kind of linear over all blocks: the sparsity reached, and the mean relative output error."""
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


def main():
    parser = Parser(
        description="Prune a LLaMA without training it.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="the dense model: a .pt file, a Hugging Face directory or a Meta directory")
    add("--method", default="wanda", choices=("magnitude", "wanda", "sparsegpt"), help="how weights are scored")
    add("--sparsity", default="2:4", help="share of zeros, or N:M: N kept of every M along the input")
    add("--calib", required=True, help=".npy that data/c4/prepare.py wrote")
    add("--nsamples", type=int, help="use that many of its sequences (default: all)")
    add("--dsnot", action="store_true", help="afterwards swap entries of the mask (DSnoT, the paper's DST)")
    add("--dsnot_cycles", type=int, default=50, help="swaps a row may make")
    add("--dsnot_threshold", type=float, default=0.1, help="output error below which a row is left alone")
    add(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"), help="where to run"
    )
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the result (default: the checkpoint's)")
    add("--out", required=True, help="a new directory in Hugging Face's layout, or a .pt file")
    args = parser.parse_args()
    sparsity, out = parse_sparsity(args.sparsity), check_out(args.out)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU on this machine; --device cpu runs without one")
    ckpt = open_checkpoint(args.ckpt)
    try:
        calib = np.load(args.calib, allow_pickle=False)
    except OSError as e:
        raise UserError(f"--calib {args.calib}: cannot be read: {e.strerror or e}") from None
    except (ValueError, EOFError):
        raise UserError(f"--calib {args.calib}: is not a .npy file, or is damaged") from None
    tokens = check_calib(calib, ckpt.config.vocab_size, args.nsamples)
    ckpt.config.check_length(tokens.shape[1], f"--calib {args.calib}")
    if isinstance(sparsity, tuple):
        for C in (ckpt.config.hidden_size, ckpt.config.intermediate_size, ckpt.config.n_heads * ckpt.config.head_dim):
            if C % sparsity[1]:
                raise UserError(f"--sparsity {args.sparsity}: a linear has {C} columns, no multiple of {sparsity[1]}")
    cycles = args.dsnot_cycles if args.dsnot else 0
    if not args.dsnot and (args.dsnot_cycles, args.dsnot_threshold) != (50, 0.1):
        raise UserError("--dsnot_cycles and --dsnot_threshold are settings of --dsnot, which is not given")
    if args.dsnot_cycles < 1 or not args.dsnot_threshold >= 0:
        raise UserError("--dsnot_cycles: expected 1 or more, --dsnot_threshold: 0 or more")
    settings = Settings(args.method, sparsity, cycles, args.dsnot_threshold)
    entry = {"method": args.method, "sparsity": args.sparsity, "source": str(args.ckpt)}
    entry |= {"calib": f"{Path(args.calib).name} ({len(tokens)} x {tokens.shape[1]})"}
    if cycles:
        entry |= {"dsnot_cycles": cycles, "dsnot_threshold": args.dsnot_threshold}
    dtype = getattr(torch, args.dtype) if args.dtype else ckpt["model.norm.weight"].dtype
    report = prune_checkpoint(ckpt, tokens, settings, out, entry, torch.device(args.device), dtype)

    kinds = summary(report)
    print(f"{'linear':<12} {'sparsity':>9} {'relative output error':>22}   (on {SAMPLE} calibration tokens)")
    for kind, line in kinds.items():
        print(f"{kind:<12} {100 * line['sparsity']:8.2f}% {line['error']:22.4f}")
    print(f"wrote {out} and {out.with_suffix('.json') if out.suffix == '.pt' else out / 'prune.json'}")


if __name__ == "__main__":
    cli(main)
