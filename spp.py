"""SPP: how the surviving weights of a pruned LLaMA learn (section 3.2 of the paper), and how they are merged.

python spp.py --ckpt pruned.pt --adapter out/spp/adapter.pt --out merged.pt
"""

import argparse
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Checkpoint, UserError, check_out, cli, open_checkpoint, torch_load, write_checkpoint

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "score")


def merged(W: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> Tensor:
    """W + scale * W o repeat_interleave(alpha, m/r) o beta[:, None], (m, n): formed in float32, rounded once."""
    r, n = alpha.shape
    M = (beta.view(r, -1, 1) * alpha[:, None]).view(-1, n)
    return M.mul_(scale).add_(1).mul_(W).to(W.dtype)


class Fused(torch.autograd.Function):
    """y = x (W + scale W~)^T with 3 products a step and nothing of W's size kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, W, alpha, beta, scale):
        ctx.save_for_backward(x, W, alpha, beta)
        ctx.scale = scale
        return F.linear(x, merged(W, alpha, beta, scale))

    @staticmethod
    def backward(ctx, g):
        x, W, alpha, beta = ctx.saved_tensors
        r, n = alpha.shape
        dx = g @ merged(W, alpha, beta, ctx.scale)
        G = (g.flatten(0, -2).T @ x.flatten(0, -2)).float().mul_(W).mul_(ctx.scale).view(r, -1, n)
        d_beta = torch.bmm(G, alpha[:, :, None]).flatten()
        d_alpha = torch.bmm(beta.view(r, 1, -1), G).view(r, n)
        return dx, None, d_alpha, d_beta, None


class SPPLinear(nn.Module):
    def __init__(self, linear: nn.Linear, r: int = 16, scale: float = 2.0, matmul: str = "fused"):
        super().__init__()
        self.weight, self.r, self.scale, self.matmul = linear.weight, r, scale, matmul
        self.weight.requires_grad_(False)
        m, n = self.weight.shape
        self.alpha = nn.Parameter(torch.empty(r, n, dtype=torch.float32, device=self.weight.device))
        self.beta = nn.Parameter(torch.empty(m, dtype=torch.float32, device=self.weight.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.alpha, a=math.sqrt(5))
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        W, r = self.weight, self.r
        if self.matmul == "repeat":  # equations 4 and 5
            M = self.alpha.repeat_interleave(len(W) // r, dim=0) * self.beta[:, None]
            return F.linear(x, W) + self.scale * F.linear(x, (W * M).to(x.dtype))
        if self.matmul == "chunked":  # equation 7
            parts = [F.linear(x * a.to(x.dtype), w) for a, w in zip(self.alpha, W.chunk(r), strict=True)]
            return F.linear(x, W) + self.scale * self.beta.to(x.dtype) * torch.cat(parts, -1)
        return Fused.apply(x, W, self.alpha, self.beta, self.scale)


def check_r(name: str, m: int, r: int) -> None:
    if m % r:
        divisors = ", ".join(str(d) for d in range(1, m + 1) if m % d == 0)
        raise UserError(f"--r {r} does not divide the {m} rows of {name}; r = {divisors} would")


def inject(model: nn.Module, method: str = "spp", r: int = 16, scale: float = 2.0, matmul: str = "fused") -> nn.Module:
    """Puts an SPPLinear in the place of every target linear and freezes everything else."""
    targets = [(name, module) for name, module in model.named_modules() if name.split(".")[-1] in TARGETS]
    for name, linear in targets:
        check_r(name.removeprefix("model."), linear.out_features, r)
    model.requires_grad_(False)
    for name, linear in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SPPLinear(linear, r, scale, matmul))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Back to plain linears that hold the merged weights; every zero is asserted to be a zero still."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SPPLinear):
            W = merged(module.weight.data, module.alpha.data, module.beta.data, module.scale)
            assert not W[module.weight == 0].any(), f"{name}: a zero was lost"
            linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(W)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


def merge_checkpoint(ckpt: Checkpoint, path: str | Path) -> Checkpoint:
    """The checkpoint with an adapter file merged in, tensor by tensor as they are asked for."""
    file = torch_load(Path(path))
    if not isinstance(file, dict) or not {"adapter", "scale", "base", "method"} <= file.keys():
        raise UserError(f"{path}: is not an adapter file")
    if file["base"] != ckpt.fingerprint():
        raise UserError(
            f"{path}: was trained on another checkpoint ({file['base']}) than {ckpt.path} ({ckpt.fingerprint()})"
        )
    adapter, tensors = file["adapter"], dict(ckpt.tensors)

    def get(name: str) -> Tensor:
        stem = name.removeprefix("model.").removesuffix(".weight")
        return merged(ckpt[name], adapter[f"{stem}.alpha"], adapter[f"{stem}.beta"], file["scale"])

    for key in adapter:
        if key.endswith(".alpha"):
            name = f"model.{key.removesuffix('.alpha')}.weight"
            tensors[name] = functools.partial(get, name)
    entry = {"method": file["method"], "r": file["r"], "scale": file["scale"]}
    return Checkpoint(ckpt.path, ckpt.config, tensors, ckpt.tokenizer, [*ckpt.history, entry])


def main():
    parser = argparse.ArgumentParser(description="Merge an adapter into the sparse checkpoint it was trained on.")
    parser.add_argument("--ckpt", required=True, help="the pruned model")
    parser.add_argument("--adapter", required=True, help="adapter.pt that train.py wrote")
    parser.add_argument("--out", required=True, help="a .pt file, or a new directory in Hugging Face's layout")
    args = parser.parse_args()
    check_out(args.out)
    write_checkpoint(merge_checkpoint(open_checkpoint(args.ckpt), args.adapter), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
