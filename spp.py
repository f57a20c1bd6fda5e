"""SPP: how the surviving weights of a pruned LLaMA learn (section 3.2 of the paper), and how they are merged.

A linear layer holds W (m x n: out x in), frozen and already sparse. SPP learns alpha (r x n) and beta (m), stretches
both to the shape of W, and multiplies (equations 4 and 5; o is the elementwise product):

    (4)  W~ = W o repeat_interleave(alpha, m/r, dim=0) o beta[:, None]
    (5)  y  = x W^T + scale * x W~^T
    merged:  W <- W + scale * W~              same zeros, same shape, nothing left behind

With m = 8, n = 6, r = 4, a 2:4-sparse row of W and its learner look like this:

    W[5]     = [ 0   .3   0  -.2   .5   0 ]   row 5 belongs to block 5 // (m/r) = 2
    alpha[2] = [ a0  a1   a2  a3   a4  a5 ]   one row of alpha for the m/r = 2 rows 4 and 5
    W~[5]    = [ 0  .3 a1  0 -.2 a3 .5 a4 0 ] * beta[5]

so that the layer learns r*n + m = 32 numbers for 48 weights; at LLaMA's 4096 x 4096 and r = 16 it is 0.4%. With
r = m and beta = 1 every weight has an alpha of its own: full fine-tuning under a fixed mask. beta starts at 0, so a run
starts at the pruned model; alpha is random, since with both at 0 both gradients are 0 for ever.

The matmuls. A unit is one product of T x n by n x m, 2*T*m*n FLOPs. Equation 5 as written (`repeat`) keeps W~ and the
stretched alpha for the backward pass, 2 m x n a layer. Equation 7 (`chunked`) never makes W~, since block j of W~
is W_j (rows j*m/r to (j+1)*m/r of W) with its columns multiplied by alpha_j and its rows by beta_j:

    (7)  x W~^T = beta o concat_j( (x o alpha_j) W_j^T )

but spends 4 units a step where equation 5 spends 5 and 3 suffice. `fused`, the default:

    forward    W^ = W + scale * W~            elementwise, one m x n buffer
               y  = x W^T                     1 unit; W^ is dropped
    backward   W^ is formed again
               dx = g W^                      1 unit
               G  = g^T x                     1 unit: the gradient of the loss by W^, m x n
               G' = scale * G o W, in place, seen as (r, m/r, n):
               d beta_i  = sum_j G'_ij alpha_(i // (m/r)) j
               d alpha_kj = sum over the rows i of block k of G'_ij beta_i

What is saved is x and the parameters. Why not less than 3: dx needs all of W^, y too, and d alpha, d beta are sums
over G at the non-zeros of W, each of which is a product of T terms: a third product, unless W is sparse enough for
computing single entries to pay (about 90%). A linear that is frozen costs 2 units (y, dx), LoRA 2 and a little.

bfloat16. Adapters are float32 whatever W is; W^ is formed in float32 and rounded once, to the nearest. While
|scale * alpha * beta| is below 2^-9 that is W itself, and the network does not see what was learned so far. It costs
nothing that could be measured (bench/rounding.py): updates so small hardly move the gradient either, the float32
factors keep summing it, and soon they are seen. `stochastic` rounds up or down at random, right on average.

The other ways to learn under a mask are the same product with another W^, a few lines each (`METHODS`): all surviving
weights (`masked`, equation 3), a dense weight whose mask follows it (`dynamic`, equation 2), W + mask o BA
(`masked_lora`). LoRA itself (`lora`) is dense until it is merged under the mask: the paper's LoRA*.

    python spp.py --ckpt pruned.pt --adapter out/spp/adapter.pt --out merged.pt

What differs from the authors' code: there SPP is inside a copy of PEFT, r is fixed at 16 whatever --lora_r says, which
sets the scale instead, and the branch's input is dropped out by 5%, which the paper does not mention and a merged
weight cannot express. Here merging asserts the zeros.
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


def round_to(W: Tensor, dtype: torch.dtype, seed: int | None) -> Tensor:
    """float32 (m, n) to `dtype`; with a seed, bfloat16 is rounded stochastically: right on average.

    A bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half before it is cut off carries into
    the upper half with a probability of exactly what is cut off.
    """
    if dtype != torch.bfloat16 or seed is None:
        return W.to(dtype)
    noise = torch.empty(W.shape, dtype=torch.int32, device=W.device)
    noise.random_(0, 1 << 16, generator=torch.Generator(W.device).manual_seed(seed))
    return noise.add_(W.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32).to(dtype)


class Formed(torch.autograd.Function):
    """y = x W^^T, where W^ = layer.form(W, *factors) is made twice and kept never: 3 units (see the file's docstring).

    x (..., n), W (m, n), factors: what `layer` learns. `layer.pull(G, W, *factors)` turns the weight-sized gradient G
    (m, n), which it may overwrite, into the gradients of W (None where it is frozen) and of the factors. Nothing saved
    is a view or a cast of W, so that FSDP can free the gathered weight between the passes.
    """

    @staticmethod
    def forward(ctx, x, layer, seed, W, *factors):
        ctx.save_for_backward(x, W, *factors)
        ctx.layer, ctx.seed = layer, seed
        return F.linear(x, round_to(layer.form(W, *factors), x.dtype, seed))

    @staticmethod
    def backward(ctx, g):
        x, W, *factors = ctx.saved_tensors
        dx = g @ round_to(ctx.layer.form(W, *factors), x.dtype, ctx.seed) if ctx.needs_input_grad[0] else None
        G = g.flatten(0, -2).T @ x.flatten(0, -2)
        return dx, None, None, *ctx.layer.pull(G, W, *factors)


class SparseLinear(nn.Module):
    """A linear that keeps its weight object and learns something about it through `form` and `pull`.

    form(W, *factors) -> W^ (m, n), float32.    pull(G, W, *factors) -> gradients of W and of the factors, as a tuple.
    """

    factors: tuple[str, ...] = ()  # names of what is learned beside W
    stochastic = False  # bfloat16 only, while training: see the file's docstring

    def __init__(self, linear: nn.Linear, r: int, scale: float):
        super().__init__()
        self.weight, self.r, self.scale = linear.weight, r, scale
        self.weight.requires_grad_(False)

    def new(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*shape, dtype=torch.float32, device=self.weight.device))

    @torch.compiler.disable  # traced, the function would keep W^ for the backward pass; what lies between is compiled
    def forward(self, x: Tensor) -> Tensor:
        # The seed comes from torch's generator, so a recomputed forward (activation checkpointing) draws it again.
        rounds = self.stochastic and x.dtype == torch.bfloat16 and torch.is_grad_enabled()
        seed = int(torch.randint(1 << 62, ())) if rounds else None
        return Formed.apply(x, self, seed, self.weight, *(getattr(self, name) for name in self.factors))

    def merged(self) -> Tensor:
        """W^ in the weight's dtype, (m, n), rounded to the nearest."""
        W = self.form(self.weight.detach(), *(getattr(self, name).detach() for name in self.factors))
        return W.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, r={self.r}, scale={self.scale}"


class SPPLinear(SparseLinear):
    """Equations 4, 5 and 7: wraps an nn.Linear, freezes its weight and learns alpha (r, n) and beta (m,), float32.

    matmul: "fused", "chunked" or "repeat", the same function in three forms. The ablations of Tables 4 and 8 and of
    Remark 1: beta=False keeps beta at 1 and starts alpha at 0; zero_init says which factor starts at 0 ("beta", "alpha"
    or "none"); residual=False multiplies W by the factors, which then start at 1, in place of adding W~ to it.
    """

    factors = ("alpha", "beta")

    def __init__(
        self,
        linear: nn.Linear,
        r: int = 16,
        scale: float = 2.0,
        matmul: str = "fused",
        beta: bool = True,
        zero_init: str = "beta",
        residual: bool = True,
    ):
        super().__init__(linear, r, scale if residual else 1.0)
        m, n = self.weight.shape
        assert m % r == 0, f"r = {r} does not divide m = {m}"
        self.matmul, self.zero_init, self.residual = matmul, zero_init, residual
        self.alpha, self.beta = self.new(r, n), self.new(m)
        self.beta.requires_grad_(beta)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])  # Kaiming's for a = sqrt(5), as the authors draw alpha
        for p, name in ((self.alpha, "alpha"), (self.beta, "beta")):
            nn.init.zeros_(p) if name == self.zero_init else nn.init.uniform_(p, -bound, bound)
        if not self.residual:
            nn.init.ones_(self.alpha)
            nn.init.ones_(self.beta)
        elif not self.beta.requires_grad:
            nn.init.zeros_(self.alpha)
            nn.init.ones_(self.beta)

    def form(self, W: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        r, n = alpha.shape
        M = torch.mul((self.scale * beta).view(r, -1, 1), alpha.view(r, 1, n)).view(-1, n)  # scale * stretched factors
        return torch.addcmul(W, W, M) if self.residual else M.mul_(W)

    def pull(self, G: Tensor, W: Tensor, alpha: Tensor, beta: Tensor) -> tuple:
        r, n = alpha.shape
        G = G.mul_(W).view(r, -1, n)  # in blocks of m/r rows, one for each row of alpha
        beta = (self.scale * beta).to(G.dtype).view(r, 1, -1)
        d_alpha = torch.bmm(beta, G).view(r, n)
        d_beta = self.scale * torch.bmm(G, alpha.to(G.dtype).view(r, n, 1)).flatten()
        return None, d_alpha.float(), d_beta.float() if self.beta.requires_grad else None

    def forward(self, x: Tensor) -> Tensor:
        if self.matmul == "fused":
            return super().forward(x)
        W, alpha, beta, m = self.weight, self.alpha, self.beta, len(self.weight)
        base = F.linear(x, W) if self.residual else 0
        if self.matmul == "repeat":  # equations 4 and 5
            W_tilde = W * alpha.repeat_interleave(m // self.r, dim=0) * beta[:, None]
            return base + self.scale * F.linear(x, W_tilde.to(x.dtype))
        blocks = zip(alpha.to(x.dtype), W.chunk(self.r), strict=True)  # equation 7
        parts = [F.linear(x * alpha_j, W_j) for alpha_j, W_j in blocks]
        return base + self.scale * beta.to(x.dtype) * torch.cat(parts, -1)


class MaskedLinear(SparseLinear):
    """Equation 3: every surviving weight learns, the zeros stay. The weight is float32, rounded where it is used.

    The mask needs no memory of its own: an entry that is 0 gets no gradient, so no optimizer moves it.
    """

    def __init__(self, linear: nn.Linear, r: int = 0, scale: float = 1.0):
        super().__init__(linear, r, scale)
        self.weight = nn.Parameter(self.weight.detach().float())

    def form(self, W: Tensor) -> Tensor:
        return W

    def pull(self, G: Tensor, W: Tensor) -> tuple:
        return (G.to(W.dtype).mul_(W != 0),)


class DynamicLinear(MaskedLinear):
    """Equation 2: a dense weight learns through a mask that follows its magnitude (straight-through gradients).

    `mask` (m, n) bool is set from outside, every few steps; True = kept.
    """

    def __init__(self, linear: nn.Linear, r: int = 0, scale: float = 1.0):
        super().__init__(linear, r, scale)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))

    def form(self, W: Tensor) -> Tensor:
        return W * self.mask

    def pull(self, G: Tensor, W: Tensor) -> tuple:
        return (G.to(W.dtype),)


class LoRALinear(SparseLinear):
    """LoRA (Hu et al. 2021; equation 6): y = x W^T + scale * x A^T B^T, A (r, n), B (m, r). Merged, it is dense."""

    factors = ("A", "B")

    def __init__(self, linear: nn.Linear, r: int = 8, scale: float = 2.0):
        super().__init__(linear, r, scale)
        m, n = self.weight.shape
        self.A, self.B = self.new(r, n), self.new(m, r)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def form(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.addmm(W.float(), B, A, alpha=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return F.linear(x, self.weight) + self.scale * low


class MaskedLoRALinear(LoRALinear):
    """W + scale * mask o (B A): LoRA that is sparse while it learns, with the mask that W's zeros are."""

    forward = SparseLinear.forward

    def form(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).mul_(W != 0).mul_(self.scale).add_(W)

    def pull(self, G: Tensor, W: Tensor, A: Tensor, B: Tensor) -> tuple:
        G = G.mul_(W != 0)
        d_A, d_B = B.T.to(G.dtype) @ G, G @ A.T.to(G.dtype)
        return None, self.scale * d_A.float(), self.scale * d_B.float()


METHODS = {
    "spp": SPPLinear,
    "lora": LoRALinear,
    "masked": MaskedLinear,
    "dynamic": DynamicLinear,
    "masked_lora": MaskedLoRALinear,
}


# ----------------------------------------------------------------------------------------------------------------------
# into a model, and out of it


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def inject(
    model: nn.Module,
    method: str = "spp",
    r: int = 16,
    scale: float = 2.0,
    targets: tuple[str, ...] = TARGETS,
    **options,
) -> nn.Module:
    """Swaps the target linears for learning ones, in place, and freezes everything else. Returns the model.

    options go to the layer (SPPLinear: matmul, beta, zero_init, residual). UserError where r divides no layer's m,
    before anything is swapped.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }
    for name, linear in linears.items():
        m = linear.out_features
        if method == "spp" and (r < 1 or m % r):
            divisors = [d for d in range(1, m + 1) if m % d == 0]
            near = sorted(sorted(divisors, key=lambda d: abs(d - r))[:6])
            name = name.removeprefix("model.")
            raise UserError(
                f"--r {r}: does not divide the {m} outputs of {name}; --r {' or '.join(map(str, near))} does"
            )
    model.requires_grad_(False)
    for name, linear in linears.items():
        replace(model, name, METHODS[method](linear, r=r, scale=scale, **options))
    return model


def merge(model: nn.Module, masked: bool = True) -> nn.Module:
    """Back to plain nn.Linear that hold the merged weights, in place; asserts that every zero is a zero still.

    LoRA's sum is dense: the mask is applied to it again (LoRA*), or not, with masked=False.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SparseLinear):
            m, n = layer.weight.shape
            linear = nn.Linear(n, m, bias=False, device="meta")
            linear.weight = nn.Parameter(merged_weight(layer, masked, name))
            replace(model, name, linear)
    return model


def merged_weight(layer: SparseLinear, masked: bool, name: str) -> Tensor:
    W, zeros = layer.merged(), layer.weight == 0
    if isinstance(layer, DynamicLinear):  # its mask is its own
        return W
    if type(layer) is LoRALinear:
        return W.masked_fill_(zeros, 0) if masked else W
    assert not W[zeros].any(), f"{name}: a pruned weight came back"
    return W


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned, under Hugging Face's names without "model.": layers.0.self_attn.q_proj.alpha, ..."""
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("model."): p.detach() for name, p in model.named_parameters() if name in learned}


def load_adapter(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fills an injected model's adapters. UserError where names or shapes are not those of this model."""
    own = adapter_state(model)
    wrong = sorted(own.keys() ^ state.keys()) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise UserError(f"the adapter does not fit the model at {wrong[0]} ({len(wrong)} such)")
    for name, p in own.items():
        p.copy_(state[name])


def merge_checkpoint(ckpt: Checkpoint, path: str | Path, masked: bool = True) -> Checkpoint:
    """The checkpoint with an adapter file merged into it, each tensor when it is asked for: memory is one layer."""
    file = torch_load(Path(path))
    if not isinstance(file, dict) or not {"adapter", "method", "r", "scale", "base"} <= file.keys():
        raise UserError(f"{path}: is not an adapter file of train.py")
    if file["base"] != ckpt.fingerprint():
        raise UserError(f"{path}: was trained on checkpoint {file['base']}, not on {ckpt.path} ({ckpt.fingerprint()})")
    layers = {}  # model.layers.0.self_attn.q_proj.weight -> {"alpha": ..., "beta": ...}
    for key, w in file["adapter"].items():
        stem, _, factor = key.rpartition(".")
        layers.setdefault(f"model.{stem}.weight", {})[factor] = w
    if not layers.keys() <= ckpt.keys():
        raise UserError(f"{path}: {min(layers.keys() - ckpt.keys())} is not in {ckpt.path}")

    def get(name: str) -> Tensor:
        W, factors = ckpt[name], layers[name]
        if "weight" in factors:  # masked and dynamic: the adapter is the weight
            return factors["weight"].to(W.dtype)
        linear = nn.Linear(*W.T.shape, bias=False, device="meta")
        linear.weight = nn.Parameter(W)
        layer = METHODS[file["method"]](linear, r=file["r"], scale=file["scale"], **file.get("options", {}))
        layer.load_state_dict(factors, strict=False)
        return merged_weight(layer, masked, name)

    tensors = {name: functools.partial(get, name) for name in layers}
    method = file["method"] if file["method"] != "lora" else ("lora*" if masked else "lora (dense)")
    entry = {"method": method, "r": file["r"], "scale": file["scale"], "base": file["base"], **file.get("options", {})}
    return ckpt.changed(tensors, entry)


def main():
    parser = argparse.ArgumentParser(description="Merge an adapter into the sparse checkpoint that it was trained on.")
    parser.add_argument("--ckpt", required=True, help="the pruned model")
    parser.add_argument("--adapter", required=True, help="adapter.pt that train.py wrote")
    parser.add_argument("--out", required=True, help="a .pt file, or a new directory in Hugging Face's layout")
    parser.add_argument("--dense", action="store_true", help="LoRA only: do not apply the mask to the merged weight")
    args = parser.parse_args()
    check_out(args.out)
    write_checkpoint(merge_checkpoint(open_checkpoint(args.ckpt), args.adapter, not args.dense), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
