"""Which weights go: post-training pruning, block by block (section 3.1 of the paper, equation 1).

python prune.py --ckpt llama-7b --method wanda --sparsity 2:4 --calib data/c4/calib.npy --out pruned.pt
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import Llama, UserError, check_out, cli, load, rope_tables, save


def parse_sparsity(text: str) -> float | tuple[int, int]:
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


def keep_mask(score: Tensor, sparsity: float | tuple[int, int], by_row: bool = True) -> Tensor:
    """True for what stays: the highest scores of each group (N:M), of each row, or of the whole matrix."""
    if isinstance(sparsity, tuple):
        n, m = sparsity
        groups = score.reshape(-1, m)
        removed = groups.argsort(dim=1, stable=True)[:, : m - n]
    else:
        groups = score if by_row else score.reshape(1, -1)
        removed = groups.argsort(dim=1, stable=True)[:, : int(groups.shape[1] * sparsity)]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, removed, False).view(score.shape)


@torch.no_grad()
def prune_model(model: Llama, calib, method: str = "wanda", sparsity: str = "0.5") -> Llama:
    """Prunes the seven linears of every block in place; calib: (nsamples, seqlen) token ids."""
    pattern, tokens = parse_sparsity(sparsity), torch.as_tensor(np.asarray(calib)).long()
    x = model.model.embed_tokens(tokens)
    cos, sin = rope_tables(model.config, torch.arange(tokens.shape[1]), x.dtype)
    for block in tqdm(model.model.layers, desc="pruning", unit="block", disable=None):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        square = dict.fromkeys(linears, 0.0)  # sum of x_j^2 over all tokens

        def gather(module, args, name, square=square):
            square[name] += args[0].float().pow(2).sum((0, 1))

        hooks = [
            linear.register_forward_pre_hook(functools.partial(gather, name=name)) for name, linear in linears.items()
        ]
        for part in x.split(8):
            block(part, cos, sin)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            score = linear.weight.float().abs()
            if method == "wanda":
                score = score * (square[name] / len(tokens)).sqrt()
            linear.weight.mul_(keep_mask(score, pattern, by_row=method != "magnitude"))
        x = torch.cat([block(part, cos, sin) for part in x.split(8)])
    return model


def main():
    parser = argparse.ArgumentParser(
        description="Prune a LLaMA.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="the dense model")
    parser.add_argument("--method", default="wanda", choices=("magnitude", "wanda"), help="how weights are scored")
    parser.add_argument("--sparsity", default="2:4", help="share of zeros, or N:M")
    parser.add_argument("--calib", required=True, help=".npy that data/c4/prepare.py wrote")
    parser.add_argument("--out", required=True, help="a .pt file, or a new directory in Hugging Face's layout")
    args = parser.parse_args()
    parse_sparsity(args.sparsity)
    check_out(args.out)
    model, tokenizer = load(args.ckpt)
    prune_model(model, np.load(args.calib), args.method, args.sparsity)
    entry = {"method": args.method, "sparsity": args.sparsity, "calib": Path(args.calib).name, "source": str(args.ckpt)}
    model.history = [*model.history, entry]
    save(model, args.out, tokenizer)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
