"""LLaMA by hand: the network that SPP prunes and fine-tunes, and the command that shows what a checkpoint is.

RMSNorm, rotary positions, SwiGLU, grouped-query attention (LLaMA, Touvron et al. 2023a, b). Its seven linears, q_proj
to down_proj, are those that section 4 of the paper lists (beside `score`, a classifier's). The model is a list of
blocks, each of which can be called on its own: pruning walks a checkpoint block by block. Settings and tensors have
Hugging Face's names.

    python model.py --ckpt SRC --out model.pt         # any layout -> one file of ours
    python model.py --ckpt SRC --out DIR              # any layout -> a Hugging Face directory; --layout meta: Meta's
    python model.py --ckpt SRC --prompt "Once upon"   # what it says
    python model.py --ckpt SRC --info                 # what it is: sizes, sparsity, pattern, history

SRC is a .pt file of ours, a Hugging Face directory or a Meta directory; data/checkpoint.py reads and writes them.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import functools
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from data.checkpoint import DTYPES, Checkpoint, UserError, brief, cast, check_out, check_stored_dense, checked_history
from data.checkpoint import llama3_scaling, open_checkpoint, travels, write_checkpoint
from data.tokenizer import SIBLINGS, Tokenizer, load_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# settings


@dataclasses.dataclass
class LlamaConfig:
    """The shape of a LLaMA, under the keys of Hugging Face's config.json. The defaults are LLaMA 7B's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008  # width of the MLP between gate/up and down
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # shared by groups of query heads; None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int | None = 2048  # the longest sequence that it was trained on; None: nothing tells
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "dynamic" | "llama3", "factor": ..., ...}
    tie_word_embeddings: bool = False  # lm_head shares the matrix of embed_tokens
    sliding_window: int | None = None  # Mistral's: tokens that attention looks back; longer sequences are refused

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    def check_window(self, n: int, what: str = "a sequence") -> None:
        """UserError if n tokens exceed the sliding window: only within it is Mistral's attention LLaMA's."""
        if self.sliding_window and n > self.sliding_window:
            raise UserError(f"{what}: {n} tokens are more than the model's sliding window of {self.sliding_window}")

    def check_length(self, n: int, what: str) -> None:
        """`check_window`, and a note if sequences of n tokens are longer than those that the model was trained on."""
        self.check_window(n, what)
        positions = self.max_position_embeddings
        if positions is not None and n > positions and is_first_process():
            print(f"note: {what}: {n} tokens are more than the model's {positions} positions", file=sys.stderr)


LLAMA2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA3 = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
LLAMA3_2 = {**LLAMA3, "max_position_embeddings": 131072, "tie_word_embeddings": True}
LLAMA3_2["rope_scaling"] = llama3_scaling(2048)  # the same for both widths, 2,048 (1B) and 3,072 (3B)
SMOLLM2 = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
PRESETS = {
    # vocabulary, width, MLP, layers, heads, key-value heads where they are fewer
    "llama-7b": LlamaConfig(32000, 4096, 11008, 32, 32),
    "llama-13b": LlamaConfig(32000, 5120, 13824, 40, 40),
    "llama-30b": LlamaConfig(32000, 6656, 17920, 60, 52),
    "llama-65b": LlamaConfig(32000, 8192, 22016, 80, 64, rms_norm_eps=1e-5),
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, **LLAMA2),
    "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, **LLAMA2),
    "llama-2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8, **LLAMA2),
    "llama-3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, **LLAMA3),
    "llama-3-70b": LlamaConfig(128256, 8192, 28672, 80, 64, 8, **LLAMA3),
    "llama-3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, **LLAMA3_2),
    "llama-3.2-3b": LlamaConfig(128256, 3072, 8192, 28, 24, 8, **LLAMA3_2),
    "smollm2-135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, rope_theta=100000.0, **SMOLLM2),
    "smollm2-360m": LlamaConfig(49152, 960, 2560, 32, 15, 5, rope_theta=100000.0, **SMOLLM2),
    "smollm2-1.7b": LlamaConfig(49152, 2048, 8192, 24, 32, rope_theta=130000.0, **SMOLLM2),
    # what `make demo` pretrains in two minutes, and what the tests use
    "demo": LlamaConfig(1024, 96, 256, 4, 4, max_position_embeddings=256, rms_norm_eps=1e-5),
    "test": LlamaConfig(256, 32, 64, 2, 4, num_key_value_heads=2, max_position_embeddings=128),
}

# ----------------------------------------------------------------------------------------------------------------------
# the network


# targets whose logits are made at once: with 32,000 words 131 MB in float32, and up to three tensors of that size
LOGITS_AT_ONCE = 1024


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In float32 whatever the model's dtype, and rounded before the weight, as LLaMA's own code does.
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_tables(
    config: LlamaConfig, positions: Tensor, dtype: torch.dtype, seq_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each (..., T, head_dim), for positions (..., T). seq_len: the whole
    sequence's length, by default the last position + 1."""
    d, theta, length = config.head_dim, config.rope_theta, config.max_position_embeddings
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind == "dynamic" or config.sliding_window:
        seq_len = seq_len or int(positions.max()) + 1  # only where nothing else tells it: this waits for a GPU
        config.check_window(seq_len)
    if kind == "dynamic":  # the base is stretched once a sequence outgrows the training length
        stretch = scaling["factor"] * max(seq_len, length) / length - (scaling["factor"] - 1)
        theta = theta * stretch ** (d / (d - 2))
    freqs = 1.0 / theta ** (torch.arange(0, d, 2, device=positions.device).float() / d)  # (head_dim / 2,)
    if kind == "linear":
        freqs = freqs / scaling["factor"]
    if kind == "llama3":  # long wavelengths are slowed by `factor`, short ones kept, and a ramp in between
        turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / scaling["factor"]
    # Angles are float32: in bfloat16, positions beyond 256 would run together.
    angles = positions[..., None].float() * freqs
    angles = torch.cat([angles, angles], -1)  # one for each half of a head, see `rotate`
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + head_dim/2}) by its position's angle. (Meta pairs neighbours: `rotary_rows`
    of data/checkpoint.py.)"""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v for each head, q and k turned by their positions, then o_proj."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.grouped = c.num_key_value_heads < c.num_attention_heads  # several query heads share a key-value head
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        B, T, _ = x.shape  # the last is hidden_size
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, query heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, key-value heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # the same
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            if cache:  # keys and values of the tokens before; expand: a prefix run once serves every row of a batch
                k = torch.cat([cache[0].expand(B, -1, -1, -1), k], 2)  # (B, key-value heads, past + T, head_dim)
                v = torch.cat([cache[1].expand(B, -1, -1, -1), v], 2)
            cache[:] = [k, v]
        grouped = self.grouped  # not asked of q and k, whose shapes torch.compile may know as symbols only
        if grouped and x.is_cuda and (mask is not None or x.dtype == torch.float32):
            # Flash attention takes no mask and no float32, the memory-efficient kernel no groups: with both, torch
            # would fall back on the kernel that holds the scores of every head, T x (past + T), in memory.
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (B, query heads, past + T, ...)
            grouped = False
        # Without a mask attention is causal.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. It can be called on its own: x (B, T, hidden_size), cos and sin from `rope_tables`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab_size).

    `history` is the list of what was done to the weights (pruned how, fine-tuned from what); it travels with them, and
    so do the `special_tokens` of a config.json, and `files`, name -> bytes: licences and the like.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.history, self.files = [], {}
        self.special_tokens = {"bos_token_id": 1, "eos_token_id": 2}  # LLaMA's; `load` has the checkpoint's
        self.activation_checkpointing = False
        # On the meta device nothing is drawn, or torch would import its compiler to draw nothing: a second.
        meta = torch.get_default_device().type == "meta"
        shape = config.vocab_size, config.hidden_size
        embed = nn.Embedding.from_pretrained(torch.empty(shape), freeze=False) if meta else nn.Embedding(*shape)
        layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A ModuleDict gives names Hugging Face's prefix, "model.layers.0.mlp...", without a class of its own
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": norm})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not meta:
                nn.init.normal_(module.weight, std=0.02)  # LLaMA's; it matters to pretraining alone
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens: Tensor, cache: list | None = None) -> Tensor:
        """Hidden states after the last norm, (B, T, hidden_size): lm_head turns those that matter into logits.

        tokens: (B, T) int64, at the positions after what the cache holds. cache: one list per layer, empty at first,
        that this call fills with keys and values; a cache of batch 1 serves any B.
        """
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        keys = torch.arange(past + tokens.shape[1], device=tokens.device)
        # SDPA's own causal flag aligns the first query with the first key: not ours where there is a past
        mask = keys <= keys[past:, None] if past else None
        x = self.model.embed_tokens(tokens)
        cos, sin = rope_tables(self.config, keys[past:], x.dtype, len(keys))
        for i, block in enumerate(self.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                assert cache is None, "what the backward pass runs again would fill the cache again"
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)  # keeps x alone, runs the block again
            else:
                x = block(x, cos, sin, mask, cache[i] if cache is not None else None)
        return self.model.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size), or with targets their summed loss. targets: (B, T), for each position the token
        after it (nothing is shifted here), -100 where nothing is to be predicted; or (N,), with `where` (N,), their
        places in the flattened tokens."""
        x = self.hidden(tokens)
        if targets is None:
            return self.lm_head(x)
        if where is None:  # finding the places waits for a GPU, so train.py brings them
            targets = targets.flatten()
            where = (targets != -100).nonzero().squeeze(1)
            targets = targets[where]
        x = x.flatten(0, 1).index_select(0, where)  # before lm_head, so that padding and prompts cost no logits
        return self.summed_loss(x, targets)

    def summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy summed (not averaged) over the targets, float32, (). x: (N, hidden_size), targets: (N,).

        Logits are made a few positions at a time and not kept: at 32,000 words they would otherwise be the largest
        tensors of a fine-tuning step. Where the head is frozen, `FrozenHeadLoss` forms the gradient in the same pass;
        where it learns, logits are made again in the backward pass.
        """
        head = self.lm_head.weight
        if type(self.lm_head) is nn.Linear and not head.requires_grad:  # an adapter in its place uses another weight
            return FrozenHeadLoss.apply(x, head, targets)

        def chunk_loss(h: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(self.lm_head(h).float(), t, reduction="sum")

        total = x.new_zeros((), dtype=torch.float32)
        # Without a target split still gives one empty chunk: a loss of 0 that has a gradient, as DDP and FSDP ask for.
        for h, t in zip(x.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True):
            total = total + checkpoint(chunk_loss, h, t, use_reentrant=False)
        return total


class FrozenHeadLoss(torch.autograd.Function):
    """The summed cross-entropy of x (N, hidden_size) through a frozen head (vocab_size, hidden_size). The gradient with
    respect to x is formed in the forward pass, while the logits are there: (softmax - 1 at the target) times the head.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        total, dx = x.new_zeros((), dtype=torch.float32), None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
        for i in range(0, len(x), LOGITS_AT_ONCE):
            h, t = x[i : i + LOGITS_AT_ONCE], targets[i : i + LOGITS_AT_ONCE]
            rows = torch.arange(len(t), device=t.device)
            logp = F.linear(h, head).float().log_softmax(-1)  # (n, vocab_size)
            total -= logp[rows, t].sum()
            if dx is not None:
                p = logp.exp_()
                p[rows, t] -= 1  # the gradient with respect to the logits
                torch.mm(p.to(x.dtype), head, out=dx[i : i + LOGITS_AT_ONCE])
        ctx.save_for_backward(dx)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return dx * g.to(dx.dtype), None, None  # g is one factor for all: rounding it changes no direction


@torch.no_grad()
def generate(
    model: Llama, tokens: list[int], n: int, temperature: float = 0.0, top_p: float = 1.0, stop: tuple[int, ...] = ()
) -> Iterator[int]:
    """Yields up to n tokens that go on from `tokens`, one at a time, with a key-value cache.

    temperature 0 takes the likeliest token; otherwise tokens are drawn (from torch's generator) among the fewest whose
    probabilities sum to top_p. Ends after a token of `stop`. UserError where a logit is NaN or Inf.
    """
    device = model.lm_head.weight.device
    cache = [[] for _ in model.model.layers]
    new = list(tokens)  # what the cache does not hold yet: first the whole prompt, then a token at a time
    for _ in range(n):
        x = model.hidden(torch.tensor([new], device=device), cache=cache)
        logits = model.lm_head(x[0, -1]).float()  # (vocab_size,)
        if not logits.isfinite().all():
            raise UserError("the logits are not finite; the weights hold NaN or Inf, or overflow their --dtype")
        if temperature == 0:
            token = int(logits.argmax())
        else:
            logits = (logits - logits.max()).double()  # or a temperature near 0 would make them Inf, and be 0 itself
            p, order = (logits / temperature).softmax(-1).sort(descending=True)
            p[1:][p.cumsum(0)[:-1] >= top_p] = 0  # everything after the token that reaches top_p
            token = int(order[torch.multinomial(p, 1)])
        yield token
        if token in stop:
            return
        new = [token]


def cut_into_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences in batches of at most max_tokens tokens, padding counted, or of one sequence.

    The longest come first, equals in their order: sequences that lie together pad little. The first of a batch is its
    longest, to which all others are padded.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# ----------------------------------------------------------------------------------------------------------------------
# a checkpoint as a LLaMA


# Settings of LLaMA's relatives that would change the function, by the values that they have in a LLaMA: any other is
# refused. A key that is absent or null means what LLaMA does.
PLAIN = (
    (("silu", "swish"), "hidden_act"),
    ((False,), "attention_bias attention_out_bias mlp_bias qkv_bias use_bias rope_interleaved alibi qk_norm"),
    ((False,), "use_qk_norm qk_layernorm use_sliding_window attn_temperature_tuning use_parallel_residual"),
    ((1,), "partial_rotary_factor rotary_pct embedding_multiplier residual_multiplier logits_scaling"),
    ((1,), "logit_scale scale_emb"),
    ((0,), "no_rope_layer_interval num_experts num_local_experts n_routed_experts"),
    ((), "clip_qkv attn_logit_softcapping final_logit_softcapping transformers_weights"),
)

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What each kind of rope scaling needs
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_SCALING = {"linear": ("factor",), "dynamic": ("factor",), "llama3": LLAMA3_KEYS}

# Settings that travel and that no network reads
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_to_dict(config: LlamaConfig) -> dict:
    """What a config.json says of it."""
    values = dataclasses.asdict(config)
    family = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    if config.sliding_window is None:
        del values["sliding_window"]
        family = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if config.max_position_embeddings is None:
        # transformers takes no null, and has a length of its own where the key is absent: a key of ours says it
        del values["max_position_embeddings"]
        values["max_seq_len"] = None
    return {**family, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, **values}


def config_from_dict(values: dict, source: str | Path) -> LlamaConfig:
    """The settings that a config.json of any age holds, every one of them checked. UserError, which names `source`
    and the key, for a value that is none and for a setting that would change the function."""

    def check(key: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"{source}: config: {key} is {brief(values.get(key))}, expected {expected}")

    check("model_type", values.get("model_type", "llama") in ("llama", "mistral"), "'llama' or 'mistral'")
    check_stored_dense(values, source)
    rope_key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"  # where it stands, for messages
    values = {**values, **rope_settings(values)}
    scaling = values["rope_scaling"]
    if scaling is not None:
        kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
        needed = ROPE_SCALING.get(kind) if isinstance(kind, str) else None
        check(rope_key, needed, f"one of LLaMA's types, {', '.join(ROPE_SCALING)}")
        numbers = all(is_number(scaling.get(name)) for name in needed)
        check(rope_key, numbers, f"{', '.join(needed)} above 0")
        ordered = kind != "llama3" or scaling["low_freq_factor"] < scaling["high_freq_factor"]
        check(rope_key, ordered, "a low_freq_factor below its high_freq_factor")
        values["rope_scaling"] = {name: scaling[name] for name in ("rope_type", *needed)}
    if values.get("model_type") == "mistral":
        values.setdefault("sliding_window", 4096)  # transformers' own where they are absent
        if "max_seq_len" not in values:  # see `config_to_dict`
            values.setdefault("max_position_embeddings", 131072)
    else:
        values.pop("sliding_window", None)  # which LLaMA's own code does not look at
    unknown_length = "max_seq_len" in values and values.get("max_position_embeddings") is None
    if unknown_length:  # a key of our own: see `config_to_dict`
        values["max_position_embeddings"] = values["max_seq_len"]

    given = {}
    for field in dataclasses.fields(LlamaConfig):
        key = field.name
        if key in REQUIRED and key not in values:
            raise UserError(f"{source}: config: has no {key}")
        if key not in values:
            continue
        x = given[key] = values[key]
        may_be_null = field.default is None or (key == "max_position_embeddings" and unknown_length)
        if (x is None and may_be_null) or key == "rope_scaling":
            continue
        if field.type is bool:
            check(key, type(x) is bool, "true or false")
        elif field.type is float:
            check(key, is_number(x), "a number above 0")
        else:
            check(key, is_count(x), "a whole number from 1 to 2**28")

    config = LlamaConfig(**given)
    heads, head_dim = config.num_attention_heads, config.head_dim
    even = head_dim > 2 and head_dim % 2 == 0
    check("head_dim", even, "an even number above 2, by default hidden_size / num_attention_heads")
    check("num_attention_heads", heads * head_dim < 2**28, "fewer than 2**28 / head_dim")
    check("num_key_value_heads", heads % config.num_key_value_heads == 0, f"a divisor of {heads}, the query heads")
    if unknown_length and scaling is not None and scaling["rope_type"] == "dynamic":  # it stretches what is beyond
        raise UserError(f"{source}: config: has no max_position_embeddings, which a dynamic rope_scaling needs")
    # SDPA divides scores by the root of head_dim; these two keys may say so, or that a model does it otherwise
    of_head = ((head_dim**-0.5,), "attention_multiplier"), ((head_dim,), "query_pre_attn_scalar")
    for plain, keys in PLAIN + of_head:
        expected = " or ".join(repr(x) for x in plain) or "none of it"
        for key in keys.split():
            check(key, values.get(key) is None or values[key] in plain, f"{expected}, as LLaMA's")
    check("no_rope_layers", not values.get("no_rope_layers"), "none, as LLaMA's")
    layer_types = values.get("layer_types") or []
    full = isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    check("layer_types", full, "a list of 'full_attention' alone, as LLaMA's")
    return config


def is_number(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x < 2.0**64  # type: JSON's true is no 1


def is_count(x: Any) -> bool:
    return type(x) is int and 0 < x < 2**28  # so that a product of two fits int64


def rope_settings(values: dict) -> dict:
    """{rope_theta, rope_scaling, partial_rotary_factor} of a config.json: they stand apart, or since transformers 5 in
    one dict. Where both forms are there, rope_scaling counts, and what is inside of it before the same outside, as in
    transformers."""
    rope = values.get("rope_scaling") or values.get("rope_parameters")
    apart = {"rope_theta": values.get("rope_theta"), "partial_rotary_factor": values.get("partial_rotary_factor")}
    if isinstance(rope, dict):
        rope = {"rope_type": rope.get("type", "default"), **rope}  # "type" is the older name
        if rope["rope_type"] == "llama3":
            rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
            if "original_max_position_embeddings" in values:  # the one key that counts outside
                rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        apart = {key: rope.pop(key, outside) for key, outside in apart.items()}
        if rope["rope_type"] == "default":
            rope = None
    if apart["rope_theta"] is None:
        apart["rope_theta"] = 10000.0
    return {**apart, "rope_scaling": rope}


def open_llama(path: str | Path) -> tuple[Checkpoint, LlamaConfig]:
    """Opens a checkpoint of any layout without reading a weight (but for a head beside tied embeddings), and holds its
    settings, names, shapes and tokenizer against `Llama`. UserError for what is no LLaMA."""
    ckpt = open_checkpoint(path)
    config = config_from_dict(ckpt.config, path)
    if "embed_tokens.weight" in ckpt:  # saved without its head
        for mapping in (ckpt.getters, ckpt.shapes):
            for name in [*mapping]:
                mapping[f"model.{name}"] = mapping.pop(name)
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and {embed, head} <= ckpt.keys() and not ckpt[embed].equal(ckpt[head]):
        config.tie_word_embeddings = False  # a head that was trained alone, as transformers takes it
    special_tokens = {key: ckpt.config[key] for key in SPECIAL_TOKENS if key in ckpt.config}
    ckpt.config = {**config_to_dict(config), **special_tokens}
    if config.num_hidden_layers > len(ckpt):  # before Llama() below makes that many blocks
        raise UserError(f"{path}: config: {config.num_hidden_layers} layers, but only {len(ckpt)} tensors")
    with torch.device("meta"):
        expected = Llama(config).state_dict()
    if config.tie_word_embeddings:  # one matrix under two names; a file may hold either or both
        kept = embed if embed in ckpt else head
        for mapping in (ckpt.getters, ckpt.shapes):
            if kept in mapping:
                mapping[embed] = mapping[kept]
            mapping.pop(head, None)
        del expected[head]
    missing, unknown = sorted(expected.keys() - ckpt.keys()), sorted(ckpt.keys() - expected.keys())
    if missing or unknown:
        what = [f"{name} is missing" for name in missing[:1]] + [f"{name} is not a LLaMA's" for name in unknown[:1]]
        raise UserError(f"{path}: {', '.join(what)} ({len(missing)} missing, {len(unknown)} unknown names)")
    for name, w in ckpt.shapes.items():
        if w.shape != expected[name].shape:
            hint = ": DeepSpeed ZeRO-3 saves this where it gathered nothing" if w.numel() == 0 else ""
            raise UserError(f"{path}: {name} has shape {[*w.shape]}, its config says {[*expected[name].shape]}{hint}")
        if w.dtype not in DTYPES.values():
            raise UserError(f"{path}: {name} is {w.dtype}; readable are {', '.join(DTYPES)}")
    check_vocabulary(ckpt, config)
    return ckpt, config


def check_vocabulary(ckpt: Checkpoint, config: LlamaConfig) -> None:
    """UserError for a tokenizer with tokens that the model does not have."""
    tokenizer = tokenizer_of(ckpt)
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        n = tokenizer.vocab_size
        raise UserError(f"{ckpt.path}: its tokenizer has {n} pieces, the model only {config.vocab_size}")


def tokenizer_of(ckpt: Checkpoint, needed: bool = False) -> Tokenizer | None:
    """The checkpoint's tokenizer; its files say, beside the pieces, which tokens begin and end a text. Where there is
    none None, or a UserError if it is needed."""
    if ckpt.tokenizer is None:
        if needed:
            how = f"`model.py --ckpt {ckpt.path} --tokenizer DENSE_MODEL --out NEW` gives it one"
            raise UserError(f"{ckpt.path}: has no tokenizer; {how}")
        return None
    return load_tokenizer(ckpt.tokenizer, {**ckpt.files, "config.json": json.dumps(ckpt.config).encode()})


def without_tokenizer(files: dict[str, bytes]) -> dict[str, bytes]:
    """Of the small files that travel with a model those that are not its tokenizer's: licences and the like."""
    return {name: data for name, data in files.items() if name not in SIBLINGS}


def common_dtype(ckpt: Checkpoint) -> torch.dtype:
    """The weights' dtype. UserError where they have several."""
    dtypes = {w.dtype for w in ckpt.shapes.values()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"{ckpt.path}: holds weights of several dtypes ({names}); `model.py --dtype` makes them one")
    return dtypes.pop()


def from_weights(config: LlamaConfig, weights: dict[str, Tensor]) -> Llama:
    """A Llama that holds these tensors themselves, whatever their dtype and device."""
    with torch.device("meta"):
        model = Llama(config)
    # Not strict where the head is tied: the one matrix has two names, and comes under either.
    model.load_state_dict(weights, strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    return model


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Llama, Tokenizer | None]:
    """Loads any checkpoint. Returns (model, tokenizer); the tokenizer is None where the checkpoint has none.

    dtype: the weights' own by default. Raises UserError for what cannot be read or is no LLaMA.
    """
    ckpt, config = open_llama(path)
    dtype = dtype or common_dtype(ckpt)
    model = from_weights(config, {name: cast(w, dtype, name).to(device) for name, w in ckpt.items()})
    model.history, model.files = ckpt.history, without_tokenizer(ckpt.files)
    model.special_tokens = {key: ckpt.config[key] for key in SPECIAL_TOKENS if key in ckpt.config}
    return model, tokenizer_of(ckpt)


def check_dtype(ckpt: Checkpoint, dtype: torch.dtype) -> None:
    """UserError for the first weight that is too large for the dtype: now, and not in the middle of a walk."""
    for name, w in ckpt.shapes.items():
        if dtype not in (w.dtype, torch.float32):  # which takes every weight
            cast(ckpt[name], dtype, name)


def stream_blocks(
    ckpt: Checkpoint, config: LlamaConfig, device: torch.device | str, dtype: torch.dtype, start: int = 0
) -> Iterator[Block]:
    """Yields the blocks of a checkpoint one after the other, from number `start` on. Files are mapped copy-on-write, so
    the caller may change a block.

    While the caller works with one, a thread reads the next: two are in memory, whatever the model's size. So take them
    by `block = next(blocks)` and end with `del block`: the variable of a `for` would hold the old one while the next is
    waited for. UserError where a weight is too large for the dtype.
    """
    # On a GPU copies have a stream of their own, or they would wait for the caller's kernels and these for them. It
    # also tells the thread which GPU is this process's: a thread begins with the first.
    stream = torch.cuda.Stream() if torch.device(device).type == "cuda" else None

    def read(i: int) -> Block:
        with torch.device("meta"):
            block = Block(config)
        state = {}
        with torch.cuda.stream(stream):  # without a stream this does nothing
            for name in block.state_dict():
                full_name = f"model.layers.{i}.{name}"
                w = cast(ckpt[full_name], dtype, full_name)  # one at a time: it takes memory as soon as it is read
                if stream:
                    state[name] = w.pin_memory().to(device, non_blocking=True)  # the GPU copies pinned memory by itself
                else:
                    state[name] = w
                    w.flatten()[:: 4096 // w.itemsize].sum()  # reads what is only mapped: a number of each page
        if stream:
            stream.synchronize()  # this thread waits, the caller goes on with its own block
        block.load_state_dict(state, assign=True)
        return block

    if start == config.num_hidden_layers:  # a run was killed after its last block
        return
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(read, start)
        for i in range(start, config.num_hidden_layers):
            block = ahead.result()
            if stream:  # the block before this one is freed now: first its kernels end, some of which are only queued
                torch.cuda.current_stream().synchronize()
            if i + 1 < config.num_hidden_layers:
                ahead = thread.submit(read, i + 1)
            yield block
            del block  # before the next is waited for


def save(model: Llama, path: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes `path`: ours if it ends in .pt, otherwise a Hugging Face directory. `model.history` goes with it.
    UserError for a model with adapters."""
    weights = {name: w.detach() for name, w in model.state_dict().items()}
    with torch.device("meta"):
        foreign = weights.keys() - Llama(model.config).state_dict().keys()
    if foreign:
        raise UserError(f"{path}: the model has {min(foreign)}, which is not a LLaMA's; merge its adapters first")
    # Another head than the embeddings is saved as one: it was learned, and merged.
    tied = model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    if tied:
        del weights["lm_head.weight"]
    tensors = {name: (w.to("meta"), functools.partial(w.to, "cpu")) for name, w in weights.items()}
    config = config_to_dict(dataclasses.replace(model.config, tie_word_embeddings=tied))
    ckpt = Checkpoint(None, {**config, **model.special_tokens}, tensors)
    ckpt.files = model.files
    if tokenizer is not None:
        give_tokenizer(ckpt, tokenizer)
    ckpt.history = checked_history(model.history, path)
    write_checkpoint(ckpt, path)


def give_tokenizer(ckpt: Checkpoint, tokenizer: Tokenizer) -> None:
    """Puts a tokenizer and what travels beside it into a checkpoint, whose config then names its BOS and EOS."""
    ckpt.config["bos_token_id"] = tokenizer.bos
    ends = [*tokenizer.eos] or [None]
    ckpt.config["eos_token_id"] = ends[0] if len(ends) == 1 else ends  # several are a list, as in transformers
    ckpt.tokenizer = tokenizer.data
    files = {**without_tokenizer(ckpt.files), **tokenizer.files}
    ckpt.files = {name: data for name, data in files.items() if travels(name)}


# ----------------------------------------------------------------------------------------------------------------------
# a look at a checkpoint


PATTERNS = ("1:4", "2:8", "2:4", "4:8")  # the usual ones, the tightest first


def sparsity_of(weight: Tensor) -> tuple[float, str | None]:
    """The share of zeros of a weight (m, n), and the tightest of PATTERNS that holds, or None."""
    # A byte says of eight weights of a row which are kept, and how often each of the 256 bytes is there says the rest:
    # that takes a twentieth of the time of counting within groups.
    seen = np.zeros(256, dtype=np.int64)
    for rows in weight.split(64):  # which stay in the processor's cache
        seen += np.bincount(np.packbits((rows != 0).numpy(), axis=1).ravel(), minlength=256)
    kept = {8: [byte.bit_count() for byte in range(256)]}
    kept[4] = [max((byte >> 4).bit_count(), (byte & 15).bit_count()) for byte in range(256)]  # in its fuller half
    zeros = 1 - int(seen @ kept[8]) / weight.numel()
    for pattern in PATTERNS:
        n, m = map(int, pattern.split(":"))
        fullest = max(kept[m][byte] for byte in np.flatnonzero(seen))
        if weight.shape[1] % m == 0 and fullest <= n:
            return zeros, pattern
    return zeros, None


def describe(ckpt: Checkpoint, config: LlamaConfig) -> dict:
    """What --info says of a checkpoint, which is read tensor by tensor."""
    found = {}  # of each kind of linear, what `sparsity_of` says in each layer
    for name in ckpt:
        if name.endswith("_proj.weight"):
            found.setdefault(name.split(".")[-2], []).append(sparsity_of(ckpt[name]))
    linears = {}
    for kind, layers in found.items():
        zeros, patterns = zip(*layers, strict=True)
        # each pattern implies those after it, so the loosest holds in all layers
        pattern = None if None in patterns else max(patterns, key=PATTERNS.index)
        linears[kind] = {"sparsity": sum(zeros) / len(zeros), "pattern": pattern}
    plain = dataclasses.replace(config, rms_norm_eps=float(f"{config.rms_norm_eps:.4g}"))  # it may have been float32
    family = [name for name, preset in PRESETS.items() if preset == plain]
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in ckpt.shapes.values()})
    return {
        "family": family[0] if family else "LLaMA of its own shape",
        "parameters": sum(w.numel() for w in ckpt.shapes.values()),
        "bytes": sum(w.numel() * w.element_size() for w in ckpt.shapes.values()),
        "dtype": ", ".join(dtypes),
        "linears": linears,
        "tokenizer": bool(ckpt.tokenizer),
        "history": ckpt.history,
        "config": dataclasses.asdict(config),
    }


def print_description(info: dict) -> None:
    """Prints what `describe` returned on one screen."""
    c = info["config"]
    print(f"{info['family']}: {info['parameters']:,} parameters, {info['dtype']}, {info['bytes'] / 1e9:.3f} GB")
    positions = "an unknown number of"
    if c["max_position_embeddings"] is not None:
        positions = f"{c['max_position_embeddings']:,}"
    heads = f"{c['num_attention_heads']} heads ({c['num_key_value_heads']} key-value)"
    print(f"{c['num_hidden_layers']} layers of {c['hidden_size']} / {c['intermediate_size']}, {heads}, ", end="")
    print(f"vocabulary {c['vocab_size']:,}, {positions} positions")
    for kind, line in info["linears"].items():
        print(f"  {kind:<10} {100 * line['sparsity']:6.2f}% zeros   {line['pattern'] or ''}")
    if not info["tokenizer"]:
        print("  no tokenizer: --tokenizer with --out gives it one")
    for step in info["history"]:
        print("  history: " + ", ".join(f"{key} {value}" for key, value in step.items()))


# ----------------------------------------------------------------------------------------------------------------------
# what every command of the project shares: its flags, its errors, its processes


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line too, that takes flags in full only, and whose help shows the defaults
    that there are. goes_with=("--b", "--c"): a flag that means nothing without one of these is refused."""

    def __init__(self, description: str, epilog: str | None = None):
        self.goes_with = {}
        super().__init__(description=description, epilog=epilog, allow_abbrev=False)

    def add_argument(self, *flags: str, help: str = "", goes_with: tuple = (), **more: Any) -> argparse.Action:
        self.goes_with[flags[0]] = goes_with
        default = more.get("default")
        if default not in (None, [], argparse.SUPPRESS) and "default" not in help:
            help += " (default: %(default)s)"
        return super().add_argument(*flags, help=help, **more)

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else args
        for text in args:
            if re.search("[\udc80-\udcff]", text):  # how Python spells bytes that are not UTF-8
                self.error(f"the argument {ascii(text)} is not UTF-8")
        parsed = super().parse_args(args, namespace)
        given = {text.partition("=")[0] for text in args}
        for flag, others in self.goes_with.items():
            if others and flag in given and given.isdisjoint(others):
                self.error(f"{flag}: goes with {' or '.join(others)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def number(kind: type, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> Callable:
    """A type for Parser.add_argument: a finite int or float that is at least low, more than above, at most high."""

    def parse(text: str) -> int | float:
        x = kind(text)
        if kind is float and not math.isfinite(x):
            raise argparse.ArgumentTypeError(f"expected a finite number, found {text}")
        if kind is int and x > min(high, 2**62):  # more would overflow somewhere
            raise argparse.ArgumentTypeError(f"expected at most {min(high, 2**62)}, found {text}")
        if not (low <= x <= high and above < x):
            bounds = {"at least": low, "more than": above, "at most": high}
            wanted = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if abs(bound) < math.inf)
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text}")
        return x

    parse.__name__ = kind.__name__  # which argparse names where `kind` refuses the text
    return parse


def add_device(parser: Parser) -> None:
    """The flag --device; `check_device` is for after parsing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"), help="where to run")


def check_device(device: str) -> None:
    """Refuses "cuda" where there is none, and sets what no result may depend on."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU on this machine; --device cpu runs without one")
    blind = torch.version.cuda is not None and not torch.cuda.is_available()  # most often an old driver
    if blind and is_first_process():  # a run of days would otherwise start on the CPU without a word
        print("note: torch is built for CUDA but sees no GPU; this runs on the CPU", file=sys.stderr)
    # float32 means float32: the environment may have turned on TF32, which keeps 10 bits of a product's factors
    torch.set_float32_matmul_precision("highest")
    # cuDNN's attention plans for half a second at each new shape, and a fine-tuning run has thousands of them; it is
    # not deterministic either, so a resumed run would not end with the same bits
    torch.backends.cuda.enable_cudnn_sdp(False)


def world_size() -> int:
    """The number of processes that torchrun has started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this process is rank 0, which alone prints and writes; True without torchrun."""
    return int(os.environ.get("RANK", 0)) == 0


def join_processes(device: str) -> tuple[int, int]:
    """(rank, world): joins the process group that torchrun has prepared, each process with a GPU of its own. Without
    torchrun (0, 1), and no group. UserError where there are too few GPUs."""
    world = world_size()
    if world == 1:
        return 0, 1
    if device == "cuda":
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            n = torch.cuda.device_count()
            raise UserError(f"--nproc_per_node: more processes than the {n} GPUs that torch sees")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "MASTER_ADDR" not in os.environ:  # a job system may set WORLD_SIZE too
        raise UserError(f"WORLD_SIZE is {world}, but torchrun did not start this process; start it so, or unset it")
    # The others wait while rank 0 looks at 140 GB of weights or at a state: NCCL alone gives up after ten minutes.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    return dist.get_rank(), world


class Output:
    """stdout or stderr, but a reader that leaves (`| head`) or a full disk silences it and does not end the run.

    `error` is then what happened. Characters that the terminal's encoding lacks become question marks.
    """

    def __init__(self, stream: TextIO | None):
        self.stream, self.error = stream, None
        if stream is None:  # it was closed from the start
            self.stream = open(os.devnull, "w")  # noqa: SIM115
        if hasattr(self.stream, "reconfigure"):  # a notebook's has not
            self.stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()  # so that a failure shows here, and not when Python closes the stream
        except (OSError, ValueError) as e:  # ValueError: it was closed meanwhile
            self.error = e
            self.stream = open(os.devnull, "w")  # noqa: SIM115
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def leave_with_parent() -> None:
    """Ends this process when torchrun, which started it, is gone: a worker that it leaves behind would wait for ever in
    the rendezvous, or go on beside the run that is started in its place."""
    PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that Linux sends when the parent dies
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = Path(f"/proc/{os.getppid()}/cmdline")  # it may have died before the line above: init is then in its place
    first = os.getsid(0) == os.getpid()  # of the session that torchrun gives a worker: no wrapper such as numactl's
    if first and parent.exists() and b"python" not in parent.read_bytes():
        sys.exit("torchrun, which started this process, is gone")


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def end_by_bus_error(number: int) -> None:
    """C's handler of SIGBUS: a file that is mapped has become shorter, and the program touched what was there. There is
    no way on from here, and without a word Python would end with "Bus error"."""
    why = "a checkpoint or prepared data became shorter while it was read; is it being copied, or written anew?"
    os.write(2, f"{Path(sys.argv[0]).name}: error: {why}\n".encode())
    os._exit(2)


def first_to_speak() -> bool:
    """Whether no other process of this torchrun on this machine has spoken: each tries to take one socket name, which
    the system frees when its process ends."""
    if world_size() == 1:
        return True
    global voice  # so that the socket lives as long as the process
    voice = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        voice.bind(f"\0spp-{os.getppid()}")
        return True
    return False


def cli(main: Callable[[], None], out_of_memory: str = "a machine with more of it") -> None:
    """Runs a file's main function. A UserError becomes one line on stderr and exit status 2, and so does running out of
    memory, where `out_of_memory` says what helps. Under torchrun one process of a machine speaks for all."""
    name = Path(sys.argv[0]).name
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave_with_parent()
    ctypes.CDLL(None).signal(signal.SIGBUS, end_by_bus_error)

    def tell(line: str, status: int) -> int:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        if first_to_speak():
            print(f"{name}{rank}: {line}", file=sys.stderr)
        else:  # torchrun ends all processes as soon as one exits; let it be the one that has spoken
            time.sleep(5)
        return status

    try:
        main()
        status, lost = 0, sys.stdout.error
        if isinstance(lost, OSError) and lost.errno != errno.EPIPE:  # a reader that has left wanted no more
            status = tell(f"error: standard output could not be written: {lost.strerror}", 1)
    except SystemExit as e:  # --help, or a run that was stopped
        status = e.code
    except UserError as e:
        status = tell(f"error: {' '.join(str(e).splitlines())}", 2)
    except KeyboardInterrupt:
        status = tell("interrupted", 130)
    except MemoryError:  # Python's own and NumPy's; torch's is below
        status = tell(f"error: out of memory; what helps: {out_of_memory}", 2)
    except OSError as e:  # a full disk under the log of a run, for one
        status = tell(f"error: {e.filename or 'a file'}: {e.strerror or e}", 2)
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or re.search("Connection (reset|closed) by peer", str(e)):
            status = tell("another process of this run has ended; what it said, or the system's log, says why", 1)
        elif isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e):
            status = tell(f"error: out of memory ({str(e).splitlines()[0]:.100}); what helps: {out_of_memory}", 2)
        else:
            raise
    if world_size() > 1:
        # Not tidily: torch's threads may abort or hang then, and torchrun would end the others, or wait for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    if status:
        sys.exit(status)


# ----------------------------------------------------------------------------------------------------------------------
# the command


def parse_size(text: str) -> int:
    """ "500MB" -> 500,000,000 bytes."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    digits, unit = text[:-2], text[-2:].upper()
    if unit not in units or not digits.isdigit() or int(digits) == 0:
        raise UserError(f"--max_shard_size {text}: expected a size such as 500MB or 5GB")
    return int(digits) * units[unit]


def main() -> None:
    parser = Parser(description="Convert, describe or run a LLaMA checkpoint.")
    add = parser.add_argument
    add("--ckpt", required=True, help="a .pt file, a Hugging Face directory or a Meta directory")
    add("--out", help="convert: a .pt file, or a new directory")
    out, prompt, drawn = ("--out",), ("--prompt",), ("--temperature",)
    source = "convert: the tokenizer to put into --out, a file or another model's directory"
    add("--tokenizer", help=source, goes_with=out)
    dtype = "of --out or --prompt (default: the checkpoint's)"
    add("--dtype", choices=("float32", "float16", "bfloat16"), help=dtype, goes_with=out + prompt)
    layout = "of a directory: Hugging Face's or Meta's"
    add("--layout", choices=("hf", "meta"), default="hf", help=layout, goes_with=out)
    shards = "of a directory's files, such as 500MB"
    add("--max_shard_size", type=parse_size, default="5GB", help=shards, goes_with=out)
    add("--info", action="store_true", help="describe the checkpoint")
    add("--json", action="store_true", help="with --info: as JSON", goes_with=("--info",))
    add("--prompt", help="generate text that goes on from this")
    add("--max_new_tokens", type=number(int, 0), default=200, help="of --prompt", goes_with=prompt)
    add("--temperature", type=number(float, 0), default=0.0, help="0: the likeliest token each time", goes_with=prompt)
    top_p = "draw among the likeliest tokens of this total"
    add("--top_p", type=number(float, 0, high=1), default=1.0, help=top_p, goes_with=drawn)
    add("--seed", type=number(int, 0), default=0, help="of drawing", goes_with=drawn)
    args = parser.parse_args()
    if not (args.out or args.info or args.prompt is not None):
        raise UserError("nothing to do: give --out, --info or --prompt")
    of_directories = args.layout == "meta" or args.max_shard_size != parse_size(parser.get_default("max_shard_size"))
    if of_directories and args.out.endswith(".pt"):
        raise UserError(f"--layout meta and --max_shard_size: are for a directory, and --out {args.out} is a file")
    if args.out:
        check_out(args.out, inputs=[args.ckpt], model=True)
    ckpt, config = open_llama(args.ckpt)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.out and dtype is None:
        dtype = common_dtype(ckpt)
    if args.info:
        info = describe(ckpt, config)
        if args.json:
            print(json.dumps(info, indent=2))
        else:
            print_description(info)
    if args.out:
        if args.tokenizer:
            give_tokenizer(ckpt, load_tokenizer(args.tokenizer))
            check_vocabulary(ckpt, config)
        write_checkpoint(ckpt, args.out, dtype, args.max_shard_size, args.layout)
        print(f"wrote {args.out}")
    if args.prompt is not None:
        tokenizer = tokenizer_of(ckpt, needed=True)
        prompt = tokenizer.encode(args.prompt)
        tokens = prompt if tokenizer.bos is None else [tokenizer.bos, *prompt]
        if not tokens:
            raise UserError("--prompt: is empty, and the tokenizer has no token to begin with")
        config.check_length(len(tokens) + args.max_new_tokens, "--prompt and --max_new_tokens")
        model, _ = load(args.ckpt, dtype)
        torch.manual_seed(args.seed)
        new = generate(model, tokens, args.max_new_tokens, args.temperature, args.top_p, tokenizer.eos)
        print(tokenizer.decode(prompt + [token for token in new if token not in tokenizer.eos]))


if __name__ == "__main__":
    cli(main)
