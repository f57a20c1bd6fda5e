"""SPP: how the surviving weights of a pruned LLaMA learn (section 3.2 of the paper), and how they are merged.

A linear layer holds W (m x n: out x in), frozen and already sparse. SPP learns alpha (r x n) and beta (m), stretches
both to the shape of W, and multiplies (o is the elementwise product):

    (4)  W~ = W o repeat_interleave(alpha, m/r, dim=0) o beta[:, None]
    (5)  y  = x W^T + scale * x W~^T          scale: the paper's s, 2 by default
    merged:  W <- W + scale * W~              same zeros, same shape, nothing left behind

A zero times anything is zero, so no value of alpha and beta can bring a pruned weight back. One row of W with
m = 8, n = 8, r = 4, pruned to 2:4:

    W[5]     = [ 0    .3     0   -.2      .5      0    0    .1    ]   row 5 is in block 5 // (m/r) = 2
    alpha[2] = [ a0   a1     a2   a3      a4      a5   a6   a7    ]   which rows 4 and 5 share
    W~[5]    = [ 0    .3*a1  0   -.2*a3   .5*a4   0    0    .1*a7 ] * beta[5]

The layer learns r*n + m = 40 numbers for 64 weights; for LLaMA's 4096 x 4096 and r = 16 it is 0.4%. With r = m and
beta = 1 every weight has an alpha of its own: full fine-tuning under a fixed mask. beta starts at 0, so a run starts at
the pruned model; alpha starts random, because with both at 0 both gradients would be 0 for ever.

Three matmuls. A unit is one product of T x n by n x m: 2*T*m*n FLOPs. Equation 5 as written (`repeat`) spends 5 units
a step: x W^T and x W~^T, the gradient of x through each, and the gradient of W~. For the backward pass it keeps W~ and
W o stretched alpha, two m x n matrices a layer. The paper's equation 7 (`chunked`) never makes W~: its block k is W_k,
rows k*m/r to (k+1)*m/r of W, with columns scaled by alpha_k, and columns can be scaled in x instead. It spends 4 units,
since the gradient of alpha falls out of that of x o alpha_k:

    (7)  x W~^T = beta o concat_k( (x o alpha_k) W_k^T )

`fused`, the default, relies on y being linear in a single matrix, the effective weight W^ (W with a hat), and spends 3:

    forward    W^ = W + scale * W~            elementwise, one m x n buffer
               y  = x (W^)^T                  1 unit; W^ is dropped
    backward   W^ is formed again
               dx = g W^                      1 unit; g: the gradient of the loss with respect to y
               G  = g^T x                     1 unit: the gradient with respect to W^, m x n
               GW = G o W                     block by block; row i belongs to block k = i // (m/r)
               d beta_i   = scale * sum over j of GW_ij alpha_kj
               d alpha_kj = scale * sum over the rows i of block k of GW_ij beta_i

Only x and the parameters are saved. Fewer than 3 units will not do: y and dx need all of W^, and the last two lines
need G wherever W is not 0, each entry a sum over T tokens. For comparison: a frozen linear costs 2 units (y, dx), LoRA
2 and a little. The three forms are one function, and equal to rounding.

bfloat16. Adapters are float32, and W^ is formed in float32 and rounded once to W's dtype; G has the dtype of x. As long
as |scale * alpha * beta| is below 2^-9, at most half a step of bfloat16, rounding gives W back and the output does not
change; but the float32 factors still get their gradients, and grow past it. Rounding stochastically, or keeping base
and branch apart, ends at the same loss (bench/rounding.py).

The other methods have another W^, a few lines each (`METHODS`):

    (2)  dynamic        W^ = W o mask, of the largest |W| of a row or of M; W is dense and gets W^'s gradient as it is
    (3)  masked         W^ = W; every weight that is not 0 learns
    (6)  lora           W^ = W + scale * B A, dense until it is merged under the mask: the paper's LoRA*
         masked_lora    W^ = W + scale * mask o (B A)

(lora trains through x A^T B^T, two thin products; its W^ is for validating and merging.)

    python spp.py --ckpt pruned.pt --adapter out/spp/adapter.pt --out merged.pt

What differs from the authors' code: there SPP is inside a copy of PEFT, r is fixed at 16 whatever --lora_r says, which
sets the scale instead, and the branch's input is dropped out by 5%, which the paper does not mention and a merged
weight cannot express. Here merging asserts the zeros.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from data.checkpoint import DTYPES, VERSION, Checkpoint, UserError, atomic, brief, check_out, check_tensors
from data.checkpoint import check_version, pack, packed_size, save_torch, torch_load, unpack, unpack_mask
from data.checkpoint import write_checkpoint
from model import Parser, cli, common_dtype, open_llama

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the linears of a LLaMA block


# ----------------------------------------------------------------------------------------------------------------------
# one layer


class AdapterLinear(nn.Module):
    """A linear that uses another weight than the W (m, n) it holds: the effective weight W^, which it learns. W is
    frozen and stays the object that it was, so that nothing is copied and a mapped file stays mapped; in MaskedLinear
    and DynamicLinear W itself learns, in float32.

    What a subclass says (a new way to learn under the mask is these four; the first two only if it has factors):
        factors                            names of what is learned beside W
        reset_parameters()                 how the factors start; also called where a model was built on the meta device
        effective_weight(W, *factors)      W^ (m, n), the weight that is used: W itself, or a new tensor, which the
                                           backward pass overwrites
        factor_gradients(G, W, *factors)   a tuple: the gradient of W (None where it is frozen), then of each factor,
                                           from G = dL/dW^ (m, n), which it may overwrite
    """

    factors: tuple[str, ...] = ()

    def __init__(self, linear: nn.Linear, r: int = 0, scale: float = 1.0):
        super().__init__()
        assert linear.bias is None, "a bias would be lost; LLaMA's linears have none"
        self.weight = linear.weight  # under the name that it has in a checkpoint, so that one fills the model as before
        self.weight.requires_grad_(False)
        self.shape = linear.weight.shape  # (m, n)
        # --packed: one bit a weight, 1 where W is not 0, and `weight` holds the survivors alone. None: W is dense.
        self.register_buffer("bits", None, persistent=False)
        self.merged_dtype = linear.weight.dtype  # train.py: the checkpoint's, whatever W is held in while it learns
        self.r, self.scale = r, scale

    def factor(self, *shape: int) -> nn.Parameter:
        """An uninitialised float32 parameter on the weight's device."""
        return nn.Parameter(torch.empty(*shape, dtype=torch.float32, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m). In evaluation mode with the weight that merging would write, from which no factor
        learns: what a validation measures is then what will be in the file (to rounding, where W is held in another
        dtype than the checkpoint's, of which merging takes the unrounded weight)."""
        if not self.training:
            return F.linear(x, self.merged().to(x.dtype))
        factors = [getattr(self, name) for name in self.factors]
        # All as arguments: autograd saves only what it is given, and only that gets a gradient.
        return EffectiveMatmul.apply(x, self.effective_weight, self.factor_gradients, self.weight, self.bits, *factors)

    def pack(self, W: Tensor) -> bool:
        """Holds W (m, n), on the CPU, as a vector of its survivors and `bits`, where that takes less memory. W is then
        made in each pass, as W^ is. Returns whether it does."""
        if packed_size(W, int(W.count_nonzero())) >= W.nbytes:
            return False
        values, self.bits = pack(W)
        self.weight = nn.Parameter(values, self.weight.requires_grad)
        return True

    def dense(self) -> Tensor:
        """W (m, n), detached."""
        return unpack(self.weight.detach(), self.bits, self.shape[1])

    def merged(self) -> Tensor:
        """W^ in the checkpoint's dtype, (m, n), rounded to the nearest."""
        factors = [getattr(self, name).detach() for name in self.factors]
        return self.effective_weight(self.dense(), *factors).to(self.merged_dtype)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, r={self.r}, scale={self.scale}"


class SPPLinear(AdapterLinear):
    """Equations 4, 5 and 7: wraps an nn.Linear, freezes its weight and learns alpha (r, n) and beta (m,), float32.

    matmul: "fused", "chunked" or "repeat", the same function in three forms. The paper's ablations: beta=False keeps
    beta at 1 and starts alpha at 0 (Table 4); zero_init says which factor starts at 0, "beta", "alpha" or "none" (Table
    8); residual=False (Remark 1) leaves W~ alone, y = x (W o stretched alpha o beta)^T: both factors start at 1, and so
    is the scale, which would only rescale them.
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
        assert matmul in ("fused", "chunked", "repeat"), matmul
        assert zero_init in ("beta", "alpha", "none"), zero_init
        self.matmul, self.zero_init, self.residual = matmul, zero_init, residual
        self.alpha, self.beta = self.factor(r, n), self.factor(m)
        self.beta.requires_grad_(beta)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.residual:
            start = {"alpha": 1.0, "beta": 1.0}
        elif not self.beta.requires_grad:
            start = {"alpha": 0.0, "beta": 1.0}
        else:
            start = {self.zero_init: 0.0}  # "none" is no factor's name: both are drawn
        bound = 1 / math.sqrt(self.shape[1])  # Kaiming's for a = sqrt(5), as the authors draw alpha
        for name in self.factors:
            p = getattr(self, name)
            if name in start:
                nn.init.constant_(p, start[name])
            else:
                nn.init.uniform_(p, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        W, alpha, beta = self.weight, self.alpha, self.beta
        if not self.training:
            return super().forward(x)
        if self.matmul == "fused":
            # The same as an operator: one node of a compiled graph, which keeps no W^ between the passes. On a GPU it
            # unpacks within its kernels. Of a subclass, which may have another W^, it would know nothing.
            if type(self) is SPPLinear and (torch.compiler.is_compiling() or (W.is_cuda and self.bits is not None)):
                return spp_product(x, W, self.bits, alpha, beta, self.scale, self.residual)
            return super().forward(x)
        assert self.bits is None, "only the fused form makes W in each pass"
        m = len(W)
        dense = F.linear(x, W) if self.residual else 0
        if self.matmul == "repeat":  # equations 4 and 5
            W_tilde = W * alpha.repeat_interleave(m // self.r, dim=0) * beta[:, None]
            return dense + self.scale * F.linear(x, W_tilde.to(x.dtype))
        blocks = zip(alpha.to(x.dtype), W.chunk(self.r), strict=True)  # equation 7
        branch = torch.cat([F.linear(x * alpha_k, W_k) for alpha_k, W_k in blocks], -1)
        return dense + self.scale * beta.to(x.dtype) * branch

    def effective_weight(self, W: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        # what merging writes, of detached factors, is not to depend on a compiler, nor to wait for one
        kernel = alpha.requires_grad and has_kernels(W)
        return spp_weight(W, None, alpha, beta, self.scale, self.residual, kernel)

    def factor_gradients(self, G: Tensor, W: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor | None, ...]:
        return None, *spp_gradients(G, W, None, alpha, beta, self.scale, has_kernels(W))


# ----------------------------------------------------------------------------------------------------------------------
# three matmuls a step
#
# forward    EffectiveMatmul -> the layer's effective_weight                           (SPP's: spp_weight)
# backward   EffectiveMatmul -> effective_weight once more, then factor_gradients      (SPP's: spp_gradients)
#
# What forms W^ and reduces G is elementwise and in float32: a CPU does it a block of m/r rows at a time; a GPU in one
# compiled kernel, and so does a CPU that learns in bfloat16. The operators at the end of this section do the same for
# torch.compile, and for packed weights on a GPU; skip them at first.


class EffectiveMatmul(torch.autograd.Function):
    """y = x (W^)^T for a layer's effective weight W^, which is formed in each pass and never saved: 3 units.

    x (..., n), W (m, n) or its survivors with their bits, factors: what the layer learns; effective_weight,
    factor_gradients: its methods of these names. Nothing saved is a view or a cast of W, so that FSDP can free the
    gathered weight between the passes.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        effective_weight: Callable,
        factor_gradients: Callable | None,
        W: Tensor,
        bits: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, W, bits, *factors)
        ctx.effective_weight, ctx.factor_gradients = effective_weight, factor_gradients
        return F.linear(x, effective_weight(unpack(W, bits, x.shape[-1]), *factors).to(x.dtype))

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, bits, *factors = ctx.saved_tensors
        W = unpack(stored, bits, x.shape[-1])
        W_hat = ctx.effective_weight(W, *factors).to(x.dtype)
        g = g.to(x.dtype)  # under autocast the output, and so its gradient, has another
        dx = g @ W_hat if ctx.needs_input_grad[0] else None  # the first block's inputs come from frozen embeddings
        d_W, d_factors = None, [None] * len(factors)
        if any(ctx.needs_input_grad[1:]):
            buffer = None if W_hat is W else W_hat  # W^ may be W itself (`masked`), which G must not overwrite
            G = torch.mm(as_rows(g).T, as_rows(x), out=buffer)  # (m, T) @ (T, n), in the memory of W^
            d_W, *d_factors = ctx.factor_gradients(G, W, *factors)
        if d_W is not None and bits is not None:
            # that of the survivors; their number is known, where a boolean index would wait for a GPU to count them
            places = unpack_mask(bits, x.shape[-1]).flatten().nonzero_static(size=len(stored))
            d_W = d_W.flatten()[places.squeeze(1)]
        return dx, None, None, d_W, None, *d_factors


def as_rows(x: Tensor) -> Tensor:
    """(..., n) as (T, n); an x (n,) is one token."""
    return x.reshape(-1, x.shape[-1])


def form(W: Tensor, alpha: Tensor, beta: Tensor, residual: bool, out: Tensor | None = None) -> Tensor:
    """W^ = W + W o alpha o beta (without `residual` the product alone) of k blocks of rows that share an alpha, (k,
    m/r, n), in W's dtype. W: (k, m/r, n), alpha: (k, 1, n), beta, times the scale: (k, m/r, 1). out: for W^, by default
    a new tensor."""
    dtype, W = W.dtype, W.to(alpha.dtype)
    room = out if dtype == alpha.dtype else None  # in float32 all is made where W^ will be
    M = torch.mul(beta, alpha, out=room)  # outer products of betas with alpha_k
    W_hat = torch.addcmul(W, W, M, out=M) if residual else M.mul_(W)
    return W_hat.to(dtype) if out is None else out.copy_(W_hat)  # of itself a copy does nothing


def form_kernel(W: Tensor, bits: Tensor | None, alpha: Tensor, beta: Tensor, scale: float, residual: bool) -> Tensor:
    """W^ (r, m/r, n) from W (m, n) or its survivors, to be compiled: unpacking and forming in one kernel."""
    r, _, n = alpha.shape
    return form(unpack(W, bits, n).view(r, -1, n), alpha, scale * beta, residual)


def reduce_kernel(
    G: Tensor, W: Tensor, bits: Tensor | None, alpha: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """d alpha (r, n) and d beta (r, m/r) from G (r, m/r, n), to be compiled: unpacking, products and sums."""
    GW = G.to(alpha.dtype) * unpack(W, bits, G.shape[2]).view_as(G)
    return scale * (GW * beta).sum(1), scale * (GW * alpha).sum(2)


@functools.cache  # compiled once, at the first use
def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)  # an error, not eager, where it gives up


compile_errors: dict[str, str | None] = {}  # device -> why torch.compile does not work there; None: so far it does


def compile_error(device: str) -> str | None:
    """Why torch.compile does not work on this machine, which may lack a compiler or Python's headers; None: it does."""
    if device not in compile_errors:
        from torch import _dynamo  # before `try`: an optimizer needs it too, so that a failure has to end the run

        try:
            if _dynamo.config.disable:  # by the environment
                raise RuntimeError("it is switched off")
            compiled(lambda x: x + 1)(torch.zeros(2, device=device))
            compile_errors[device] = None
        except Exception as e:  # of torch's compiler, Triton, subprocess, ...
            compile_errors[device] = first_error(e)
    return compile_errors[device]


def first_error(e: Exception) -> str:
    """What went wrong, of what torch's compiler says in up to a thousand lines."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip() and not line.endswith("raised:")]
    return next((line for line in lines if " error: " in line), lines[0] if lines else type(e).__name__)


def has_kernels(W: Tensor) -> bool:
    """Whether SPP learns through compiled kernels: on a GPU, and on a CPU in bfloat16, where eager torch turns W into
    float32 and back in passes of their own. In float32 blocks are faster."""
    return W.is_cuda or (W.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and not compile_error("cpu"))


def check_compile(device: str) -> None:
    """UserError where --compile would not work."""
    if error := compile_error(device):
        raise UserError(f"--compile: torch.compile does not work on this machine: {error}")


def in_one_kernel(function: Callable, *args: Any) -> Any:
    """function(*args), compiled where that is possible; a warning says where it stops to be. The first argument is a
    tensor."""
    device = args[0].device.type
    # a block as a whole is being compiled, in evaluation mode; or nothing can be
    if torch.compiler.is_compiling() or compile_error(device):
        return function(*args)
    # Detached: of a parameter torch.compile takes the shape for a constant, and would compile anew for each number of
    # survivors, until it gives up.
    args = [x.detach() if isinstance(x, Tensor) else x for x in args]
    try:
        return compiled(function)(*args)
    except torch.OutOfMemoryError:  # a GPU's
        raise
    except Exception as e:  # a full disk; a damaged cache; Ctrl-C, which the C compiler gets too; a new shape too many
        compile_errors[device] = error = first_error(e)
        warnings.warn(f"torch.compile failed, so SPP goes on without its kernels: {error}", stacklevel=2)
        return function(*args)


def in_blocks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields W (r, m/r, n) and other tensors of r blocks by one block of m/r rows, so that what is made of it stays in
    a CPU's cache. Small blocks go several at a time, up to `rows` rows: at r = m a block is one row, and one by one a
    pass would take a minute."""
    at_once = max(1, rows // tensors[0].shape[1])
    return zip(*(tensor.split(at_once) for tensor in tensors), strict=True)


def spp_weight(
    W: Tensor, bits: Tensor | None, alpha: Tensor, beta: Tensor, scale: float, residual: bool, kernel: bool = False
) -> Tensor:
    """W^ (m, n), in W's dtype, by blocks of rows; or, always on a GPU, in one kernel, which reads W and writes W^: 4
    bytes a weight in bfloat16."""
    (r, n), m = alpha.shape, len(beta)
    alpha, beta = alpha[:, None, :], beta.view(r, -1, 1)
    if kernel or W.is_cuda:
        return in_one_kernel(form_kernel, W, bits, alpha, beta, scale, residual).view(m, n)
    W_hat = W.new_empty(r, m // r, n)
    # float32 is formed in place; other dtypes by two float32 buffers of half a megabyte, or of a block if it is larger
    rows = (2**19 if W.dtype == torch.float32 else 2**17) // n
    for W_k, alpha_k, beta_k, out in in_blocks(rows, unpack(W, bits, n).view_as(W_hat), alpha, scale * beta, W_hat):
        form(W_k, alpha_k, beta_k, residual, out)
    return W_hat.view(m, n)


def spp_gradients(
    G: Tensor, W: Tensor, bits: Tensor | None, alpha: Tensor, beta: Tensor, scale: float, kernel: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of alpha (r, n) and beta (m,) from G = dL/dW^ (m, n), by blocks of rows or by a kernel."""
    r, n = alpha.shape
    G, alpha, beta = G.view(r, -1, n), alpha[:, None, :], beta.view(r, -1, 1)
    if kernel:
        d_alpha, d_beta = in_one_kernel(reduce_kernel, G, W, bits, alpha, beta, scale)
        return d_alpha, d_beta.flatten()
    d_alpha, d_beta = torch.empty_like(alpha), torch.empty_like(beta)
    blocks = G, unpack(W, bits, n).view_as(G), alpha.mT, beta.mT, d_alpha, d_beta
    for G_k, W_k, alpha_k, beta_k, d_alpha_k, d_beta_k in in_blocks(64, *blocks):  # bmm is slower with more at once
        GW = G_k.to(alpha.dtype).mul_(W_k)  # (k, m/r, n); in float32 in the memory of G
        torch.bmm(beta_k, GW, out=d_alpha_k)  # (k, 1, m/r) @ (k, m/r, n)
        torch.bmm(GW, alpha_k, out=d_beta_k)  # (k, m/r, n) @ (k, n, 1)
    return scale * d_alpha.squeeze(1), scale * d_beta.flatten()


# torch.compile would trace into EffectiveMatmul, and could then keep W^ for the backward pass. An operator is one node
# to it. Operators take tensors and numbers, no methods of a layer, so only SPP has a pair; other layers are traced.


@torch.library.custom_op("spp::product", mutates_args=())
def spp_product(
    x: Tensor, W: Tensor, bits: Tensor | None, alpha: Tensor, beta: Tensor, scale: float, residual: bool
) -> Tensor:
    if not W.is_cuda:  # a GPU's kernel unpacks too
        W, bits = unpack(W, bits, x.shape[-1]), None
    return F.linear(x, spp_weight(W, bits, alpha, beta, scale, residual, has_kernels(W)).to(x.dtype))


@torch.library.custom_op("spp::gradients", mutates_args=())
def spp_product_gradients(
    g: Tensor,
    needs_dx: bool,
    x: Tensor,
    W: Tensor,
    bits: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scale: float,
    residual: bool,
) -> list[Tensor]:
    """The gradients of x, if it needs one, alpha and beta: `EffectiveMatmul.backward` of SPP."""
    if not W.is_cuda:
        W, bits = unpack(W, bits, x.shape[-1]), None  # once for both kernels
    W_hat = spp_weight(W, bits, alpha, beta, scale, residual, has_kernels(W)).to(x.dtype)
    g = g.to(x.dtype)  # see EffectiveMatmul
    dx = [g @ W_hat] if needs_dx else []
    G = torch.mm(as_rows(g).T, as_rows(x), out=W_hat)
    return [*dx, *spp_gradients(G, W, bits, alpha, beta, scale, has_kernels(W))]


def keep_inputs(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale, ctx.residual = inputs
    ctx.save_for_backward(*tensors)


def product_backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
    needs_dx = ctx.needs_input_grad[0]
    *dx, d_alpha, d_beta = spp_product_gradients(g, needs_dx, *ctx.saved_tensors, ctx.scale, ctx.residual)
    return dx[0] if needs_dx else None, None, None, d_alpha, d_beta, None, None


# shapes, for the compiler
spp_product.register_fake(lambda x, W, bits, alpha, beta, *rest: x.new_empty(*x.shape[:-1], len(beta)))
spp_product_gradients.register_fake(
    lambda g, needs_dx, x, W, bits, *factors: [t.new_empty(t.shape) for t in ((x,) if needs_dx else ()) + factors[:2]]
)
spp_product.register_autograd(product_backward, setup_context=keep_inputs)


# ----------------------------------------------------------------------------------------------------------------------
# what SPP is compared with


class MaskedLinear(AdapterLinear):
    """Equation 3: every surviving weight learns, the zeros stay. The weight is float32, rounded where it is used.

    The mask needs no memory of its own: an entry that is 0 gets no gradient, so no optimizer moves it.
    """

    def __init__(self, linear: nn.Linear, r: int = 0, scale: float = 1.0):
        super().__init__(linear)  # r and scale mean nothing here
        self.weight = nn.Parameter(self.weight.detach().float())

    def effective_weight(self, W: Tensor) -> Tensor:
        return W

    def factor_gradients(self, G: Tensor, W: Tensor) -> tuple[Tensor | None, ...]:
        return (G.to(W.dtype).mul_(W != 0),)


class DynamicLinear(MaskedLinear):
    """Equation 2: a dense weight learns through a mask that follows its magnitude (straight-through gradients).

    `mask` (m, n) bool is set from outside, every few steps (`update_masks` of train.py); True = kept.
    """

    def __init__(self, linear: nn.Linear, r: int = 0, scale: float = 1.0):
        super().__init__(linear)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))

    def effective_weight(self, W: Tensor) -> Tensor:
        return W * self.mask

    def factor_gradients(self, G: Tensor, W: Tensor) -> tuple[Tensor | None, ...]:
        return (G.to(W.dtype),)


class LoRALinear(AdapterLinear):
    """LoRA (Hu et al. 2021; equation 6): y = x W^T + scale * x A^T B^T, A (r, n), B (m, r). The sum is dense: merging
    puts it under the mask of W again (LoRA*), unless it is told not to."""

    factors = ("A", "B")

    def __init__(self, linear: nn.Linear, r: int = 8, scale: float = 2.0):
        super().__init__(linear, r, scale)
        m, n = self.weight.shape
        self.A, self.B = self.factor(r, n), self.factor(m, r)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        low = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        if self.bits is None:
            return F.linear(x, self.weight) + self.scale * low
        # packed: W is made in each pass and not saved, as W^ elsewhere; it is W^ here, and nothing of it learns
        return EffectiveMatmul.apply(x, lambda W: W, None, self.weight, self.bits) + self.scale * low

    def merged(self) -> Tensor:
        return super().merged().masked_fill_(self.dense() == 0, 0)

    def effective_weight(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.addmm(W.float(), B, A, alpha=self.scale)


class MaskedLoRALinear(LoRALinear):
    """W + scale * mask o (B A), the mask being where W is not 0: LoRA that is sparse while it learns."""

    forward = AdapterLinear.forward  # not LoRA's two thin products: the mask needs B A as a whole

    def effective_weight(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).mul_(W != 0).mul_(self.scale).add_(W)

    def factor_gradients(self, G: Tensor, W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor | None, ...]:
        G = G.mul_(W != 0)
        d_A, d_B = B.T.to(G.dtype) @ G, G @ A.T.to(G.dtype)
        return None, self.scale * d_A.float(), self.scale * d_B.float()


METHODS: dict[str, type[AdapterLinear]] = {
    "spp": SPPLinear,
    "lora": LoRALinear,
    "masked": MaskedLinear,
    "dynamic": DynamicLinear,
    "masked_lora": MaskedLoRALinear,
}


# ----------------------------------------------------------------------------------------------------------------------
# into a model, and out of it


def as_linear(W: Tensor) -> nn.Linear:
    """A plain nn.Linear that holds W (m, n) itself, not a copy."""
    linear = nn.Linear(*W.T.shape, bias=False, device="meta")
    linear.weight = nn.Parameter(W)
    return linear


def check_rank(method: str, r: int, shapes: dict[str, tuple[int, int]]) -> None:
    """UserError where r is below 1, or does not divide the outputs m of a linear, {name: (m, n)}, into SPP's blocks of
    m/r rows."""
    if r < 1:
        raise UserError(f"--rank {r}: expected at least 1")
    for name, (m, _) in shapes.items():
        if method == "spp" and m % r:
            common = math.gcd(*(outputs for outputs, _ in shapes.values()))
            divisors = [d for d in range(1, common + 1) if common % d == 0]
            nearest = sorted(sorted(divisors, key=lambda d: abs(d - r))[:6])
            fit = " or ".join(map(str, nearest))
            where = f"{m} outputs of {name.removeprefix('model.')}"
            raise UserError(f"--rank {r}: does not divide the {where}; {fit} divides those of all linears")


def inject(
    model: nn.Module, method: str = "spp", r: int = 16, scale: float = 2.0, targets: tuple = TARGETS, **options
) -> nn.Module:
    """Swaps the linears named in `targets` for learning ones, in place, and freezes the rest. Returns the model.

    options go to the layer (SPPLinear: matmul, beta, zero_init, residual). UserError, before anything is swapped, for
    a method that is none of METHODS, an r or a scale that is not above 0, an r that does not divide some target's m
    (SPP), and where there is no target: the names are wrong, or the model has adapters already.
    """
    if method not in METHODS:
        raise UserError(f"--method {method}: expected one of {', '.join(METHODS)}")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }
    if not linears:
        raise UserError(f"the model has no nn.Linear named {' or '.join(targets)}; were they swapped already?")
    if not 0 < scale < math.inf:
        raise UserError(f"--scale {scale}: expected a finite number above 0")
    check_rank(method, r, {name: linear.weight.shape for name, linear in linears.items()})
    model.requires_grad_(False)
    for name, linear in linears.items():
        model.set_submodule(name, METHODS[method](linear, r=r, scale=scale, **options))
    return model


def merge(model: nn.Module, masked: bool = True) -> nn.Module:
    """Back to plain nn.Linear that hold the merged weights, in place; asserts that every zero is a zero still. (Not of
    dynamic layers, whose zeros are their own; a masked layer has no record of its zeros but itself: `merge_checkpoint`
    holds it against the checkpoint.)

    LoRA's sum is dense: the mask is applied to it again (LoRA*), or not, with masked=False. What was merged is added to
    the model's history, but for SPP's ablations. UserError where a merged weight is not finite, and for dynamic layers
    that never had a mask.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLinear)}
    masks = [layer.mask for layer in layers.values() if isinstance(layer, DynamicLinear)]
    if masks and all(mask.all() for mask in masks):
        raise UserError("no dynamic layer has a mask yet; update_masks of train.py sets them, every few steps")
    for name, layer in layers.items():
        model.set_submodule(name, as_linear(merged_weight(layer, masked, name)))
    if layers:
        layer = next(iter(layers.values()))
        method = next((name for name, kind in METHODS.items() if type(layer) is kind), type(layer).__name__)
        model.history = [*getattr(model, "history", []), merge_step(method, layer, masked)]
    return model


def merged_weight(layer: AdapterLinear, masked: bool, name: str) -> Tensor:
    """`layer.merged()`, or LoRA's dense sum where it is not to be masked; finite, its zeros asserted."""
    if type(layer) is LoRALinear and not masked:
        W, sparse = AdapterLinear.merged(layer), False
    else:
        W, sparse = layer.merged(), not isinstance(layer, DynamicLinear)  # whose zeros are its own
    if not W.isfinite().all():
        raise UserError(f"{name}: the merged weight holds NaN or Inf, or is too large for {W.dtype}")
    assert not (sparse and W[layer.dense() == 0].any()), f"{name}: a pruned weight came back"
    return W + 0.0  # 0 in place of the -0 that a product leaves, and that a .pt would store as a survivor


def merge_step(method: str, layer: AdapterLinear, masked: bool) -> dict:
    """The history's entry for a merge; `layer` is any one of the merged."""
    step = {"method": method}
    if method == "lora":
        step["method"] = "lora*" if masked else "lora (dense)"
    if layer.r:  # 0: it knows neither r nor scale
        step.update(r=layer.r, scale=layer.scale)
    return step


# ----------------------------------------------------------------------------------------------------------------------
# the adapter file: written, and merged into the checkpoint that it was trained on


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What is learned, under Hugging Face's names without "model.": layers.0.self_attn.q_proj.alpha, ... The weight of
    a dynamic layer is what its mask keeps. Under FSDP every process has to call it: the shards are gathered."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            w = p.detach()
            if hasattr(w, "full_tensor"):  # FSDP's sharded kind
                w = w.full_tensor()
            state[name.removeprefix("model.")] = w
    for name, layer in model.named_modules():
        if isinstance(layer, DynamicLinear):
            key = f"{name.removeprefix('model.')}.weight"
            state[key] = state[key] * layer.mask  # a new tensor: the old one is the model's own
    return state


def load_adapter(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fills an injected model with the `adapter` of an adapter file, to run it unmerged or to train it on.

    For a model in one piece. Raises UserError where names or shapes are not those of this model.
    """
    learning = {name.removeprefix("model."): p for name, p in model.named_parameters() if p.requires_grad}
    state = dict(state)
    for name in learning.keys() & state.keys():
        if learning[name].dim() == 2:
            state[name] = from_survivors(state[name], learning[name].detach(), name)
    wrong = sorted(learning.keys() ^ state.keys())
    wrong += [name for name in learning if name in state and learning[name].shape != state[name].shape]
    if wrong:
        raise UserError(f"the adapter does not fit the model at {wrong[0]} ({len(wrong)} such)")
    for name, p in learning.items():
        p.data.copy_(state[name])
    for layer in model.modules():
        if isinstance(layer, DynamicLinear):
            layer.mask.copy_(layer.weight != 0)


def from_survivors(learned: Tensor, W: Tensor, where: str) -> Tensor:
    """What --method masked has learned of W (m, n), as a matrix; with --packed it is a vector of the survivors."""
    if learned.dim() != 1:
        return learned
    if learned.numel() != W.count_nonzero():
        raise UserError(f"{where}: has {learned.numel()} survivors, its checkpoint {W.count_nonzero()}")
    return unpack(learned, pack(W)[1], W.shape[1])


def write_adapter(
    path: str | Path, state: dict, base: str, method: str, r: int, scale: float, options: dict | None = None
) -> None:
    """Writes an adapter file. state: from `adapter_state`. base: the fingerprint of the checkpoint that it belongs to.
    options: the ablations that SPPLinear was made with."""
    head = {"version": VERSION, "base": base, "method": method, "r": r, "scale": float(scale), "options": options or {}}
    with atomic(path) as tmp:
        save_torch({**head, "adapter": {name: w.cpu() for name, w in state.items()}}, tmp)


def read_adapter(path: str | Path, ckpt: Checkpoint, base: str | None = None) -> dict:
    """What `write_adapter` wrote: every factor there, of the right shape and finite, for each target of the checkpoint.
    UserError for what is no adapter, or one of another checkpoint."""
    file = torch_load(path)
    check_head(file, path)
    base = base or ckpt.fingerprint()
    if file["base"] != base:
        raise UserError(f"{path}: was trained on checkpoint {file['base']}, not on {ckpt.path} ({base})")
    check_factors(file, ckpt, path)
    return file


def check_head(file: Any, path: str | Path) -> None:
    """UserError where what an adapter file says of itself is not what `write_adapter` writes."""
    kinds = {"adapter": dict, "base": str, "method": str, "r": int, "scale": float, "options": dict}
    if not isinstance(file, dict) or not {"adapter", "method"} <= file.keys():
        raise UserError(f"{path}: is not an adapter file of train.py")
    check_version(file.get("version"), path)
    for key, kind in kinds.items():
        if type(file.get(key)) is not kind:
            raise UserError(f"{path}: its {key} is a {type(file.get(key)).__name__}, expected a {kind.__name__}")
    if file["method"] not in METHODS:
        raise UserError(f"{path}: its method is {brief(file['method'])}, expected one of {', '.join(METHODS)}")
    for key, value in file["options"].items():
        known = {"beta": (False,), "zero_init": ("alpha", "none"), "residual": (False,)}.get(key, ())
        if not isinstance(value, bool | str) or value not in known:
            raise UserError(f"{path}: its option {brief(key)} is {brief(value)}, which SPP does not have")
    if not 0 < file["r"] < 2**20 or not 0 < file["scale"] < math.inf:
        raise UserError(f"{path}: its r is {file['r']}, its scale {file['scale']}")


def check_factors(file: dict, ckpt: Checkpoint, path: str | Path) -> None:
    """UserError where an adapter's tensors are not those that its method learns for the checkpoint's linears."""
    check_tensors(file["adapter"], path)
    targets = {name: w for name, w in ckpt.shapes.items() if name.split(".")[-2] in TARGETS}
    check_rank(file["method"], file["r"], {name: w.shape for name, w in targets.items()})
    expected = {}
    for name, w in targets.items():
        layer = METHODS[file["method"]](as_linear(w), r=file["r"], scale=file["scale"], **file["options"])
        stem = name.removeprefix("model.").removesuffix(".weight")
        expected.update({f"{stem}.{key}": p.shape for key, p in layer.named_parameters() if p.requires_grad})
    missing, unknown = expected.keys() - file["adapter"].keys(), file["adapter"].keys() - expected.keys()
    if missing:
        raise UserError(f"{path}: {min(missing)} is missing ({len(missing)} such)")
    if unknown:
        raise UserError(f"{path}: {min(unknown)} is of no linear of {ckpt.path} ({len(unknown)} such)")
    for key, w in file["adapter"].items():
        survivors = file["method"] == "masked" and w.dim() == 1  # of a packed weight
        if (w.shape != expected[key] and not survivors) or w.dtype not in DTYPES.values():
            found = f"{w.dtype} of shape {[*w.shape]}"
            raise UserError(f"{path}: {key} is {found}, expected floats of shape {[*expected[key]]}")
        if not w.isfinite().all():
            raise UserError(f"{path}: {key} holds NaN or Inf")


def merge_checkpoint(ckpt: Checkpoint, path: str | Path, masked: bool = True, base: str | None = None) -> Checkpoint:
    """The checkpoint with an adapter file merged into it, each tensor when it is asked for: memory is one layer.

    base: the checkpoint's fingerprint, by default computed, which reads all of it. UserError where the file is no
    adapter of this checkpoint.
    """
    file = read_adapter(path, ckpt, base)
    method, options = file["method"], file["options"]
    if not masked and method != "lora":
        raise UserError(f"--dense: means nothing to an adapter of --method {method}")
    layers = {}  # model.layers.0.self_attn.q_proj.weight -> {"alpha": ..., "beta": ...}
    for key, w in file["adapter"].items():
        stem, _, factor = key.rpartition(".")
        layers.setdefault(f"model.{stem}.weight", {})[factor] = w

    def get(name: str) -> Tensor:
        W, factors = ckpt[name], layers[name]
        layer = METHODS[method](as_linear(W), r=file["r"], scale=file["scale"], **options)
        zeros = W == 0  # before loading: a float32 masked layer holds W itself, which loading overwrites
        if "weight" in factors:
            factors = {"weight": from_survivors(factors["weight"], W, f"{path}: {name}")}
        layer.load_state_dict(factors, strict=False)  # not strict: frozen weights and masks are none of the file's
        new = merged_weight(layer, masked, f"{path}: {name}")
        # masked: the adapter is the weight itself, so its zeros are held against the checkpoint's here
        assert method != "masked" or not new[zeros].any(), f"{name}: a pruned weight came back"
        return new

    # any one of the layers, without its weight, knows its r and scale, or that the method has none
    layer = METHODS[method](as_linear(ckpt.shapes[next(iter(layers))]), r=file["r"], scale=file["scale"], **options)
    step = {**merge_step(method, layer, masked), "base": file["base"], **options}
    return ckpt.changed({name: functools.partial(get, name) for name in layers}, step)


def main() -> None:
    parser = Parser(description="Merge an adapter into the sparse checkpoint that it was trained on.")
    add = parser.add_argument
    add("--ckpt", required=True, help="the pruned model")
    add("--adapter", required=True, help="adapter.pt that train.py wrote")
    add("--out", required=True, help="a .pt file, or a new directory in Hugging Face's layout")
    add("--dense", action="store_true", help="LoRA only: do not apply the mask to the merged weight")
    args = parser.parse_args()
    check_out(args.out, inputs=[args.ckpt, args.adapter], model=True)
    ckpt, _ = open_llama(args.ckpt)
    common_dtype(ckpt)  # UserError for weights of several, here too
    write_checkpoint(merge_checkpoint(ckpt, args.adapter, not args.dense), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
