"""LLaMA by hand, and its checkpoints in and out.

The network that SPP prunes and fine-tunes: RMSNorm, rotary positions, SwiGLU, grouped-query attention (LLaMA, Touvron
et al. 2023a, b). Its seven linears, q_proj to down_proj, are those that section 4 of the paper lists. The network is
the first quarter of this file and all that the method needs; the rest is files, a section for each layout, reading and
writing side by side:

    python model.py --ckpt SRC --out model.pt         # any layout -> one file of ours
    python model.py --ckpt SRC --out DIR              # any layout -> a Hugging Face directory; --layout meta: Meta's
    python model.py --ckpt SRC --prompt "Once upon"   # what it says
    python model.py --ckpt SRC --info                 # what it is: sizes, sparsity, pattern, history

SRC is a .pt file of ours, a Hugging Face directory (config.json with *.safetensors or *.bin, sharded or not) or a Meta
directory (params.json with consolidated.*.pth). State-dict names are Hugging Face's everywhere. A checkpoint is read
through `Checkpoint`, a lazy mapping of names to memory-mapped tensors, so that a 70B model can be walked one block at
a time; it is written to a temporary name, flushed, then renamed, so that a killed run leaves no half-written file.
"""

import argparse
import contextlib
import copy
import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.serialization import skip_data
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# the network


@dataclasses.dataclass
class LlamaConfig:
    """The shape of a LLaMA. The defaults are LLaMA 7B's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008  # width of the MLP between gate/up and down
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 0  # key-value heads, shared by groups of query heads; 0: as many as n_heads
    head_dim: int = 0  # 0: hidden_size / n_heads
    max_seq_len: int = 2048
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "dynamic" | "llama3", "factor": ..., ...}
    tie_embeddings: bool = False  # lm_head shares the matrix of embed_tokens
    sliding_window: int | None = None  # Mistral's: tokens that attention looks back; longer sequences are refused

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.hidden_size // self.n_heads

    def check_length(self, n: int, what: str = "a sequence") -> None:
        """UserError if n tokens exceed the sliding window: only within it is Mistral's attention LLaMA's."""
        if self.sliding_window and n > self.sliding_window:
            raise UserError(f"{what}: {n} tokens are more than the model's sliding window of {self.sliding_window}")


LLAMA2 = {"max_seq_len": 4096, "norm_eps": 1e-5}
PRESETS = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(hidden_size=5120, intermediate_size=13824, n_layers=40, n_heads=40),
    "llama-30b": LlamaConfig(hidden_size=6656, intermediate_size=17920, n_layers=60, n_heads=52),
    "llama-65b": LlamaConfig(hidden_size=8192, intermediate_size=22016, n_layers=80, n_heads=64),
    "llama-2-7b": LlamaConfig(**LLAMA2),
    "llama-2-13b": LlamaConfig(hidden_size=5120, intermediate_size=13824, n_layers=40, n_heads=40, **LLAMA2),
    "llama-2-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, n_layers=80, n_heads=64, n_kv_heads=8, **LLAMA2
    ),
    # what `make demo` pretrains in two minutes, and what the tests use
    "demo": LlamaConfig(
        vocab_size=1024, hidden_size=96, intermediate_size=256, n_layers=4, n_heads=4, max_seq_len=256, norm_eps=1e-5
    ),
    "test": LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=128
    ),
}


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


def rope_frequencies(config: LlamaConfig, seq_len: int, device: torch.device) -> Tensor:
    """Angular frequencies of the rotary embedding, (head_dim / 2,) float32, after `rope_scaling`.

    seq_len matters to "dynamic" alone, which stretches the base once a sequence outgrows the training length.
    """
    d, theta = config.head_dim, config.rope_theta
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "dynamic":
        stretch = scaling["factor"] * max(seq_len, config.max_seq_len) / config.max_seq_len - (scaling["factor"] - 1)
        theta = theta * stretch ** (d / (d - 2))
    freqs = 1.0 / theta ** (torch.arange(0, d, 2, device=device).float() / d)
    if kind == "linear":
        freqs = freqs / scaling["factor"]
    if kind == "llama3":  # long wavelengths are slowed by `factor`, short ones kept, and a ramp in between
        turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / scaling["factor"]
    return freqs


def rope_tables(config: LlamaConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each (..., T, head_dim), for positions (..., T)."""
    dynamic = (config.rope_scaling or {}).get("rope_type") == "dynamic"
    seq_len = int(positions.max()) + 1 if dynamic or config.sliding_window else 0
    config.check_length(seq_len)
    angles = positions[..., None].float() * rope_frequencies(config, seq_len, positions.device)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + head_dim/2}) by its position's angle. (Meta pairs neighbours: see `rotary_rows`.)"""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v for each head, q and k turned by their positions, then o_proj."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        c = config
        self.q_proj = nn.Linear(c.hidden_size, c.n_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        B, T, _ = x.shape  # the last is hidden_size
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, heads, T, head_dim)
        if cache is not None:
            if cache:
                k, v = (torch.cat([old.expand(B, -1, -1, -1), new], 2) for old, new in zip(cache, (k, v), strict=True))
            cache[:] = [k, v]
        # A group of query heads shares one key-value head (enable_gqa). Without a mask attention is causal.
        gqa = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
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
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab_size).

    `history` is the list of what was done to the weights (pruned how, fine-tuned from what); it travels with them.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.history = []
        self.activation_checkpointing = False
        embed = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": norm})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: list | None = None
    ) -> Tensor:
        """Hidden states after the last norm, (B, T, hidden_size): lm_head turns those that matter into logits.

        tokens: (B, T) int64. positions: (T,) or (B, T), by default 0, 1, ... after what the cache holds. mask: bool,
        broadcast to (B, heads, T, cached + T), True = may attend; causal by default. cache: one list per layer, empty
        at first, that this call fills with keys and values; a cache of batch 1 serves any B.
        """
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        if positions is None:
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        if mask is None and past:  # SDPA's own causal flag aligns the first query with the first key: not ours here
            keys = torch.arange(past + tokens.shape[1], device=tokens.device)
            mask = keys <= keys[past:, None]
        x = self.model.embed_tokens(tokens)
        cos, sin = rope_tables(self.config, positions, x.dtype)
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, head_dim): the same for every head
        for i, block in enumerate(self.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache[i] if cache is not None else None)
        return self.model.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size), or with targets (B, T), -100 where nothing is to be predicted, the summed loss."""
        x = self.hidden(tokens)
        if targets is None:
            return self.lm_head(x)
        keep = targets != -100
        return self.summed_loss(x[keep], targets[keep])

    def summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy summed (not averaged) over the targets, float32, (). x: (N, hidden_size), targets: (N,).

        Logits are made 1,024 positions at a time, and again in the backward pass: at 32,000 words they would otherwise
        be the largest tensors of a fine-tuning step.
        """

        def chunk_loss(h: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(self.lm_head(h).float(), t, reduction="sum")

        chunks = zip(x.split(1024), targets.split(1024), strict=True)
        losses = (checkpoint(chunk_loss, h, t, use_reentrant=False) for h, t in chunks)
        return sum(losses, x.new_zeros((), dtype=torch.float32))


@torch.no_grad()
def generate(
    model: Llama, tokens: list[int], n: int, temperature: float = 0.0, top_p: float = 1.0, stop: int = -1
) -> Iterator[int]:
    """Yields up to n tokens that go on from `tokens`, one at a time, with a key-value cache.

    temperature 0 takes the likeliest token; otherwise tokens are drawn (from torch's generator) among the fewest whose
    probabilities sum to top_p. Ends after `stop`. UserError where a logit is NaN or Inf.
    """
    device = model.lm_head.weight.device
    cache = [[] for _ in model.model.layers]
    new = list(tokens)
    for _ in range(n):
        x = model.hidden(torch.tensor([new], device=device), cache=cache)
        logits = model.lm_head(x[0, -1]).float()
        if not logits.isfinite().all():
            raise UserError("the logits are not finite; the weights hold NaN or Inf, or overflow their --dtype")
        if temperature == 0:
            token = int(logits.argmax())
        else:
            p, order = (logits / temperature).softmax(-1).sort(descending=True)
            p[p.cumsum(0) - p > top_p] = 0  # everything after the token that reaches top_p
            token = int(order[torch.multinomial(p, 1)])
        yield token
        if token == stop:
            return
        new = [token]


# ----------------------------------------------------------------------------------------------------------------------
# The network ends here; the rest reads and writes files. First, what every command needs


class UserError(Exception):
    """Something the user can put right. `cli` prints it as one line and exits with status 2."""


def cli(main: Callable[[], None], out_of_memory: str = "a machine with more of it") -> None:
    """Runs a file's main function. A UserError becomes one line on stderr and exit status 2, and so does running out of
    memory, where `out_of_memory` says what helps."""
    name = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: error: {' '.join(str(e).splitlines())}", file=sys.stderr)
        else:  # under torchrun rank 0 speaks for all, and the rest are stopped as soon as one exits
            time.sleep(5)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has left, as `head` does; Python must not flush the rest either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
            raise
        what = str(e).splitlines()[0][:100]
        print(f"{name}: error: out of memory ({what}); what helps: {out_of_memory}", file=sys.stderr)
        os._exit(2)  # whichever process it is; a GPU's collectives that are under way would hold up a tidy exit


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line too, that takes flags in full only, and whose help shows the defaults
    that there are."""

    def __init__(self, description: str, epilog: str | None = None):
        super().__init__(description=description, epilog=epilog, allow_abbrev=False)

    def add_argument(self, *flags: str, help: str = "", **more: Any) -> argparse.Action:
        default = more.get("default")
        if default not in (None, [], argparse.SUPPRESS) and "default" not in help:
            help += " (default: %(default)s)"
        return super().add_argument(*flags, help=help, **more)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def number(kind: type, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> Callable:
    """A type for Parser.add_argument: a finite int or float that is at least low, more than above, at most high."""

    def parse(text: str) -> int | float:
        x = kind(text)
        if not math.isfinite(x):
            raise argparse.ArgumentTypeError(f"expected a finite number, found {text}")
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
    """Refuses "cuda" where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU on this machine; --device cpu runs without one")


def take_a_gpu() -> None:
    """Gives each process of torchrun's on this machine a GPU of its own. UserError where there are too few."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise UserError(f"--nproc_per_node: more processes than the {torch.cuda.device_count()} GPUs that torch sees")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` (for a file or a directory); flushes and renames it if all went well."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        for file in [*tmp.iterdir()] if tmp.is_dir() else [tmp]:
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.is_dir():
            path.rmdir()  # an empty directory gives way; check_out refused any other
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(OSError):  # a file where a folder should be, for one; it has been said above
            shutil.rmtree(tmp) if tmp.is_dir() else tmp.unlink(missing_ok=True)


def check_out(path: str | Path, flag: str = "--out", inputs: Iterable[str | Path] = ()) -> Path:
    """Refuses, before any work is done, a path that could not be written after it, or that is one of the command's
    inputs. Names with .pt, .npy, .json or .jsonl are files, all others new or empty directories."""
    path = Path(path)
    if path.resolve() in [Path(p).resolve() for p in inputs]:
        raise UserError(f"{flag} {path}: would be overwritten, and it is an input")
    file = path.suffix in (".pt", ".npy", ".json", ".jsonl")
    if file and path.is_dir():
        raise UserError(f"{flag} {path}: is a directory, and a {path.suffix} name is a file")
    if not file and path.is_file():
        raise UserError(f"{flag} {path}: is a file; a name without .pt is a directory")
    if not file and path.is_dir() and any(path.iterdir()):
        raise UserError(f"{flag} {path}: the directory is not empty; name a new one or remove it")
    try:
        existing = next(p for p in path.absolute().parents if p.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be written: {e.strerror or e}") from None
    return path


def read_json(path: str | Path, kind: type = object) -> Any:
    """Parses a JSON file that holds a `kind` (dict, list); a missing or malformed one is a UserError that names it."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: is not JSON: {e}") from None
    if not isinstance(data, kind):
        raise UserError(f"{path}: is a JSON {type(data).__name__}, expected a {kind.__name__}")
    return data


def load_tokenizer(source: str | Path | bytes) -> SentencePieceProcessor:
    """A sentencepiece model from its bytes, a file, a directory that holds tokenizer.model, or a .pt of ours."""
    if isinstance(source, bytes):
        name, data = "the checkpoint's tokenizer", source
    elif Path(source).suffix == ".pt":
        name, data = source, open_checkpoint(source).tokenizer
        if data is None:
            raise UserError(f"{name}: holds no tokenizer")
    else:
        name = Path(source) / "tokenizer.model" if Path(source).is_dir() else source
        try:
            data = Path(name).read_bytes()
        except OSError as e:
            raise UserError(f"{name}: cannot be read: {e.strerror}") from None
    try:
        if not data:  # sentencepiece takes it for a model that is yet to be loaded
            raise RuntimeError
        return SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise UserError(f"{name}: is not a sentencepiece model") from None


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints: one mapping of names to tensors, whatever the layout


class Checkpoint(Mapping):
    """What a checkpoint holds, before any weight is read: a mapping from Hugging Face's names to tensors, each made
    when it is asked for (memory-mapped where possible); `like`, their shapes and dtypes as meta tensors; `config`,
    `tokenizer` (bytes or None), `history`, and `files` (name -> bytes), the small files that travel with a model."""

    def __init__(self, path: Path | None, config: LlamaConfig, tensors: dict[str, tuple[Tensor, Callable[[], Tensor]]]):
        self.path, self.config = path, config
        self.like = {name: like for name, (like, _) in tensors.items()}
        self.tensors = {name: get for name, (_, get) in tensors.items()}
        self.tokenizer, self.history, self.files = None, [], {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def changed(self, tensors: dict[str, Callable[[], Tensor]], entry: dict) -> "Checkpoint":
        """A copy with other tensors of the same shapes and dtypes in place of some, and one more line of history."""
        new = copy.copy(self)
        new.tensors, new.history = self.tensors | tensors, [*self.history, entry]
        return new

    def block(self, i: int) -> dict[str, Tensor]:
        """The tensors of layer i, under `Block`'s own names."""
        prefix = f"model.layers.{i}."
        return {name.removeprefix(prefix): self[name] for name in self if name.startswith(prefix)}

    def fingerprint(self) -> str:
        """A hash of names, shapes and 4,096 values of each tensor: the same in every layout, cheap for 70B."""
        h = hashlib.sha256()
        for name in sorted(self):
            w = self[name].reshape(-1)
            sample = w[len(w) // 2 :][:4096].contiguous()
            h.update(f"{name} {len(w)} {w.dtype}".encode() + sample.view(torch.uint8).numpy().tobytes())
        return h.hexdigest()[:16]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens any of the three layouts and checks that names and shapes are those of a LLaMA of its config."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if path.is_file():
            ckpt = open_pt(path)
        elif (path / "config.json").exists():
            ckpt = open_hf(path)
        elif (path / "params.json").exists():
            ckpt = open_meta(path)
        else:
            raise UserError(f"{path}: holds neither config.json (Hugging Face) nor params.json (Meta)")
    except OSError as e:
        raise UserError(f"{e.filename or path}: cannot be read: {e.strerror}") from None
    if ckpt.config.n_layers > len(ckpt):  # before Llama() below makes that many blocks
        raise UserError(f"{path}: config: {ckpt.config.n_layers} layers, but only {len(ckpt)} tensors")
    with torch.device("meta"):
        want = Llama(ckpt.config).state_dict()
    if ckpt.config.tie_embeddings:
        for names in (want, ckpt.tensors, ckpt.like):
            names.pop("lm_head.weight", None)
    missing, unknown = sorted(want.keys() - ckpt.keys()), sorted(ckpt.keys() - want.keys())
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not a LLaMA's"
        raise UserError(f"{path}: {what} ({len(missing)} missing, {len(unknown)} unknown names)")
    for name, w in ckpt.like.items():
        if w.shape != want[name].shape:
            raise UserError(f"{path}: {name} has shape {[*w.shape]}, its config says {[*want[name].shape]}")
        if w.dtype not in SAFETENSORS_DTYPES.values():
            raise UserError(f"{path}: {name} is {w.dtype}; readable are {', '.join(SAFETENSORS_DTYPES)}")
    if ckpt.tokenizer is not None:
        size = load_tokenizer(ckpt.tokenizer).vocab_size()
        if size > ckpt.config.vocab_size:
            raise UserError(f"{path}: its tokenizer has {size} pieces, the model only {ckpt.config.vocab_size}")
    return ckpt


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Llama, SentencePieceProcessor | None]:
    """Loads any checkpoint. Returns (model, tokenizer); the tokenizer is None where the checkpoint has none.

    dtype: the weights' own by default. Raises UserError for what cannot be read or is no LLaMA.
    """
    ckpt = open_checkpoint(path)
    dtypes = {w.dtype for w in ckpt.like.values()}
    if dtype is None and len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"{path}: holds weights of several dtypes ({names}); choose one with --dtype")
    with torch.device("meta"):
        model = Llama(ckpt.config)
    tied = ckpt.config.tie_embeddings
    model.load_state_dict({name: w.to(device, dtype) for name, w in ckpt.items()}, strict=not tied, assign=True)
    model.tie_weights()
    model.history = ckpt.history
    return model, load_tokenizer(ckpt.tokenizer) if ckpt.tokenizer else None


def save(model: Llama, path: str | Path, tokenizer: SentencePieceProcessor | None = None) -> None:
    """Writes `path`: ours if it ends in .pt, otherwise a Hugging Face directory. `model.history` goes with it."""
    weights = {name: w.detach() for name, w in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    tensors = {name: (w.to("meta"), functools.partial(w.to, "cpu")) for name, w in weights.items()}
    ckpt = Checkpoint(None, model.config, tensors)
    ckpt.tokenizer = tokenizer.serialized_model_proto() if tokenizer else None
    ckpt.history = model.history
    write_checkpoint(ckpt, path)


def write_checkpoint(
    ckpt: Checkpoint,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    layout: str = "hf",
) -> None:
    """Writes a Checkpoint to `path`: a .pt file, or a directory in Hugging Face's layout ("hf", in shards of at most
    max_shard_size bytes where a tensor allows) or Meta's ("meta"). One tensor at a time is in memory."""
    path = check_out(path)
    like = {name: w.to(dtype or w.dtype) for name, w in ckpt.like.items()}
    with atomic(path) as tmp:
        if path.suffix == ".pt":
            write_pt(tmp, ckpt, like)
        elif layout == "meta":
            write_meta(tmp, ckpt, like)
        else:
            write_hf(tmp, ckpt, like, max_shard_size)


LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_SCALING = {"linear": ("factor",), "dynamic": ("factor",), "llama3": LLAMA3_KEYS}  # what each kind of scaling needs


def checked_config(values: dict, source: str | Path, names: dict[str, str]) -> LlamaConfig:
    """A LlamaConfig from a file's values, every one of them checked. Errors say what `names` has for our keys."""

    def check(key: str, ok: bool, expected: str) -> None:
        if not ok:
            found = repr(values.get(key))[:80]
            raise UserError(f"{source}: config: {names.get(key, key)} is {found}, expected {expected}")

    kinds = {field.name: field.type for field in dataclasses.fields(LlamaConfig)}
    positive = lambda x, *types: type(x) in types and 0 < x < 2**28  # so that a product of two fits int64
    for name, x in values.items():
        if name not in kinds:
            raise UserError(f"{source}: config: {name}: unknown key")
        if kinds[name] is int:
            derived = name in ("n_kv_heads", "head_dim") and x == 0
            check(name, positive(x, int) or derived, "a whole number from 1 to 2**28")
        elif kinds[name] is float:
            check(name, positive(x, int, float), "a number above 0")
        elif kinds[name] is bool:
            check(name, type(x) is bool, "true or false")
    window, scaling = values.get("sliding_window"), values.get("rope_scaling")
    check("sliding_window", window is None or positive(window, int), "a whole number above 0, or null")
    if scaling is not None:
        needed = ROPE_SCALING.get(str(scaling.get("rope_type"))) if isinstance(scaling, dict) else None
        check("rope_scaling", needed, f"one of LLaMA's types, {', '.join(ROPE_SCALING)}")
        check("rope_scaling", all(positive(scaling.get(k), int, float) for k in needed), f"{', '.join(needed)} above 0")
        values = values | {"rope_scaling": {k: scaling[k] for k in ("rope_type", *needed)}}
    config = LlamaConfig(**values)
    check("head_dim", config.head_dim > 2 and config.head_dim % 2 == 0, "an even number above 2")
    check("n_heads", config.n_heads * config.head_dim < 2**28, "fewer than 2**28 / head_dim")
    check("n_kv_heads", config.n_heads % config.n_kv_heads == 0, f"a divisor of {config.n_heads}, the query heads")
    return config


# What travels with a model, besides tokenizer.model and history.json. Of config.json the special tokens' ids are kept.
TRAVELS = ("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json")
TRAVELS += ("chat_template*", "LICEN[SC]E*", "USE_POLICY*", "NOTICE*")


def read_beside(path: Path, ckpt: Checkpoint) -> None:
    """Gives the checkpoint what its directory holds besides weights and config."""
    ckpt.files = {f.name: f.read_bytes() for pattern in TRAVELS for f in sorted(path.glob(pattern)) if f.is_file()}
    ckpt.history = read_json(path / "history.json", list) if (path / "history.json").exists() else []
    if (path / "tokenizer.model").exists():
        ckpt.tokenizer = (path / "tokenizer.model").read_bytes()


def write_beside(path: Path, ckpt: Checkpoint) -> None:
    """What a directory of either layout holds besides weights and config."""
    for name, data in ckpt.files.items():
        if name != "config.json":
            (path / name).write_bytes(data)
    if ckpt.tokenizer:
        (path / "tokenizer.model").write_bytes(ckpt.tokenizer)
    if ckpt.history:
        (path / "history.json").write_text(json.dumps(ckpt.history, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# our layout, and PyTorch files: .pt, .bin, .pth


def torch_load(path: Path) -> Any:
    """torch.load that runs no code of the file's, memory-maps it, and says which file is not one."""
    try:
        with zipfile.ZipFile(path) as z, warnings.catch_warnings():
            # torch.save never writes two things that can swell without end: compressed entries and sized bytearrays.
            if any(entry.compress_type for entry in z.infolist()):
                raise ValueError("it is compressed")
            if any(b"\nbytearray\n" in z.read(name) for name in z.namelist() if name.endswith("data.pkl")):
                raise ValueError("it holds a bytearray")
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except Exception as e:  # zip, pickle and torch raise a dozen kinds for a damaged file
        why = (str(e) or type(e).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: is truncated, damaged or not a PyTorch file ({why})") from None


def torch_state(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict that is in a PyTorch file, alone or under `key`: memory-mapped, and checked to hold tensors."""
    state = torch_load(path)
    state = state[key] if key else state
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    for name, w in state.items():
        if not isinstance(name, str) or not isinstance(w, Tensor) or w.layout != torch.strided or w.is_meta:
            raise UserError(f"{path}: its state dict holds {name}, which is no plain tensor")
        if not w.numel() * w.element_size() <= w.untyped_storage().nbytes() <= path.stat().st_size:
            raise UserError(f"{path}: {name} of shape {[*w.shape]} is larger than what is stored of it")
    return state


def torch_tensors(path: Path, key: str | None = None) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
    """For each tensor of a PyTorch file its shape, as a meta tensor, and a function that maps it. The file is mapped
    anew at each call, so that pages read earlier do not stay in memory while a large model is walked."""
    get = lambda name: torch_state(path, key)[name]
    return {name: (w.to("meta"), functools.partial(get, name)) for name, w in torch_state(path, key).items()}


def open_pt(path: Path) -> Checkpoint:
    data = torch_load(path)
    if not isinstance(data, dict) or not {"config", "model"} <= data.keys():
        raise UserError(f"{path}: is not a checkpoint of ours (a dict with `config` and `model`)")
    data = {"tokenizer": None, "history": [], "files": {}} | data
    for key, kind in {"config": dict, "tokenizer": bytes | None, "history": list, "files": dict}.items():
        if not isinstance(data[key], kind):
            raise UserError(f"{path}: its {key} is a {type(data[key]).__name__}")
    for name, content in data["files"].items():
        known = any(fnmatch.fnmatch(str(name), pattern) for pattern in TRAVELS) and "/" not in str(name)
        if not known or not isinstance(content, bytes):
            raise UserError(f"{path}: holds the file {name!r}, none that travels with a model")
    try:  # whether these can be written out again
        json.dumps([dict(entry) for entry in data["history"]])
        dict(json.loads(data["files"].get("config.json", "{}")))
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: its history or config.json is damaged") from None
    ckpt = Checkpoint(path, checked_config(data["config"], path, {}), torch_tensors(path, "model"))
    ckpt.tokenizer, ckpt.history, ckpt.files = data["tokenizer"], data["history"], data["files"]
    return ckpt


def write_pt(path: Path, ckpt: Checkpoint, like: dict[str, Tensor]) -> None:
    """Our layout: one dict of `config`, `tokenizer` (bytes or None), `history`, `files` and `model`, the state dict."""
    about = {"config": dataclasses.asdict(ckpt.config), "tokenizer": ckpt.tokenizer, "history": ckpt.history}
    write_torch(path, ckpt, like, about | {"files": ckpt.files})


def write_torch(path: Path, tensors: Mapping[str, Tensor], like: dict[str, Tensor], about: dict | None = None) -> None:
    """torch.save of the tensors that `like` names, in its dtypes: a state dict, or with `about` that dict and the state
    dict as its `model`. One tensor at a time is in memory.

    Blank tensors are saved first, which take room in the file but none in memory; then each weight is written at its
    offset. The zip's checksums of the weights stay empty; torch.load does not look at them.
    """
    blank = {name: torch.empty(w.shape, dtype=w.dtype) for name, w in like.items()}
    try:
        with skip_data():
            torch.save(blank if about is None else about | {"model": blank}, path)
    except RuntimeError as e:  # torch's word for a full disk
        raise OSError(str(e).splitlines()[0]) from None
    saved = torch.load(path, map_location="meta", weights_only=True)
    saved = saved if about is None else saved["model"]
    with open(path, "r+b") as f:
        for name, w in like.items():
            f.seek(saved[name].untyped_storage()._checkpoint_offset)
            f.write(tensor_bytes(tensors[name].to(w.dtype)))


# ----------------------------------------------------------------------------------------------------------------------
# .safetensors files


SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def safetensors_index(path: Path) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """The header of a .safetensors file: name -> (dtype, shape, first byte, end), each checked against the file.

    Layout: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors' bytes, to which
    the header's offsets are relative, without holes or overlaps.
    """

    def damaged(what: str) -> UserError:
        return UserError(f"{path}: {what}: the file is truncated, damaged or no safetensors file")

    size = path.stat().st_size
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0] if size >= 8 else size
        if n > min(size - 8, 2**24):  # 100 times a 70B model's
            raise damaged(f"{size} bytes with a header of {n}")
        try:
            header = json.loads(f.read(n), object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError):
            raise damaged("its header is not JSON") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    start = 8 + n
    index = {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(a), int(b)]}:
                if dtype not in SAFETENSORS_DTYPES:
                    raise UserError(f"{path}: {name} is {dtype}; readable are {', '.join(SAFETENSORS_DTYPES)}")
                dtype = SAFETENSORS_DTYPES[dtype]
            case _:
                raise damaged(f"{name} has no dtype, shape and data_offsets")
        if not all(type(d) is int and d > 0 for d in shape) or b - a != math.prod(shape) * dtype.itemsize:
            raise damaged(f"{name} of shape {shape} and {dtype} cannot lie at bytes {a} to {b}")
        index[name] = (dtype, shape, start + a, start + b)
    at = start
    for name, (_, _, first, end) in sorted(index.items(), key=lambda item: item[1][2:]):
        if first != at or end > size:
            raise damaged(f"{name} lies at bytes {first} to {end} of {size}, expected to begin at {at}")
        at = end
    return index


def no_duplicates(pairs: list) -> dict:
    """A JSON object's pairs as a dict; ValueError for a repeated name."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a repeated name")
    return dict(pairs)


def safetensors_tensors(path: Path) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
    """For each tensor of a .safetensors file its shape, as a meta tensor, and a function that maps it."""
    return {
        name: (torch.empty(shape, dtype=dtype, device="meta"), functools.partial(map_tensor, path, dtype, shape, a, b))
        for name, (dtype, shape, a, b) in safetensors_index(path).items()
    }


def map_tensor(path: Path, dtype: torch.dtype, shape: list[int], first: int, end: int) -> Tensor:
    """A tensor over the bytes [first, end) of a file, read when touched and unmapped when freed."""
    data = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)[first:end]
    if first % dtype.itemsize:
        data = data.clone()  # torch cannot view an unaligned slice
    return data.view(dtype).view(shape)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], like: dict[str, Tensor] | None = None) -> None:
    """Writes the tensors that `like` names, in its dtypes (all and as they are, by default), one at a time."""
    like = like or tensors
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    dtypes = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    for name, w in like.items():
        end = offset + w.numel() * w.element_size()
        header[name] = {"dtype": dtypes[w.dtype], "shape": list(w.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, w in like.items():
            f.write(tensor_bytes(tensors[name].to(w.dtype)))


def tensor_bytes(w: Tensor) -> np.ndarray:
    """A tensor's bytes, as an array that a file can write."""
    return w.contiguous().reshape(-1).view(torch.uint8).numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout


# LlamaConfig's name of each setting, and config.json's
HF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "tie_embeddings": "tie_word_embeddings",
    "sliding_window": "sliding_window",
}


def open_hf(path: Path) -> Checkpoint:
    """config.json, with model*.safetensors or pytorch_model*.bin, one or many; all that hold tensors of the model."""
    tensors = {}
    for file in sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin")):
        more = torch_tensors(file) if file.suffix == ".bin" else safetensors_tensors(file)
        if twice := sorted(tensors.keys() & more.keys()):
            raise UserError(f"{file}: {twice[0]} stands in another file too")
        tensors |= {k: entry for k, entry in more.items() if not k.endswith("inv_freq")}  # see `rope_frequencies`
    if not tensors:
        raise UserError(f"{path}: holds config.json but neither model*.safetensors nor pytorch_model*.bin")
    ckpt = Checkpoint(path, hf_to_config(path / "config.json"), tensors)
    read_beside(path, ckpt)
    return ckpt


def hf_to_config(path: Path) -> LlamaConfig:
    """Hugging Face's config.json, of any age, as a LlamaConfig."""
    c = read_json(path, dict)
    if c.get("model_type") not in ("llama", "mistral"):
        raise UserError(f"{path}: model_type is {c.get('model_type')!r}, not a LLaMA's")
    for key in ("attention_bias", "mlp_bias"):
        if c.get(key):
            raise UserError(f"{path}: {key} is true; LLaMA's linears have no bias")
    if c.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {c['hidden_act']!r}; LLaMA's is silu")
    window = c.get("sliding_window", 4096) if c["model_type"] == "mistral" else None  # absent: transformers has 4,096
    defaults = {"num_key_value_heads": 0, "head_dim": 0, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    defaults |= {"tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None}
    absent = [key for key in ("num_key_value_heads", "head_dim", "rope_parameters") if c.get(key) is None]  # or null
    c = defaults | {key: value for key, value in c.items() if key not in absent} | {"sliding_window": window}
    rope = c.get("rope_parameters", c["rope_scaling"])
    if isinstance(rope, dict):  # transformers 5 keeps theta and scaling in one dict; an older name is "type"
        rope = {"rope_type": rope.get("type", "default"), "rope_theta": c["rope_theta"]} | rope
        c["rope_theta"] = rope.pop("rope_theta")
        rope.pop("type", None)
        rope = rope if rope["rope_type"] != "default" else None
    c["rope_scaling"] = rope
    if missing := [key for key in HF_KEYS.values() if key not in c]:
        raise UserError(f"{path}: has no {missing[0]}")
    return checked_config({ours: c[theirs] for ours, theirs in HF_KEYS.items()}, path, HF_KEYS)


def write_hf(path: Path, ckpt: Checkpoint, like: dict[str, Tensor], max_shard_size: int) -> None:
    """Hugging Face's layout, in shards of at most max_shard_size bytes where a tensor allows."""
    path.mkdir()
    shards, size = [[]], 0
    for name, w in like.items():
        nbytes = w.numel() * w.element_size()
        if size and size + nbytes > max_shard_size:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += nbytes
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_safetensors(path / file, ckpt, {name: like[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    write_hf_extras(path, ckpt, weight_map, like["model.norm.weight"].dtype)


def write_hf_extras(path: Path, ckpt: Checkpoint, weight_map: dict[str, str], dtype: torch.dtype) -> None:
    """What stands beside the shards of a Hugging Face directory: config, index, tokenizer, history, licences."""
    c = ckpt.config
    source = json.loads(ckpt.files.get("config.json", '{"bos_token_id": 1, "eos_token_id": 2}'))
    mistral = c.sliding_window is not None
    config = {"architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"]}
    config |= {"model_type": "mistral" if mistral else "llama", "torch_dtype": str(dtype).removeprefix("torch.")}
    config |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    config |= {theirs: getattr(c, ours) for ours, theirs in HF_KEYS.items() if mistral or ours != "sliding_window"}
    config |= {key: source[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in source}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(set(weight_map.values())) > 1:
        total = sum(ckpt.like[name].numel() * dtype.itemsize for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_beside(path, ckpt)


# ----------------------------------------------------------------------------------------------------------------------
# Meta's layout


# params.json does not hold the training length; norm_eps tells LLaMA (2,048) from LLaMA-2 (4,096)
META_SEQ_LEN = {1e-6: 2048, 1e-5: 4096}
META_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
}
HF_NAMES = {hf: meta for meta, hf in META_NAMES.items()}


def open_meta(path: Path) -> Checkpoint:
    """Meta's layout: params.json and consolidated.00.pth, .01.pth, ..., each a slice of every matrix."""
    p = read_json(path / "params.json", dict)
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{path}: holds params.json but no consolidated.*.pth")
    if p.get("use_scaled_rope"):  # its factor stands nowhere, and differs between LLaMA 3.1 and 3.2
        raise UserError(f"{path}/params.json: use_scaled_rope is true; take the model's Hugging Face directory")
    parts = [torch_state(file) for file in files]
    try:
        values = {
            "vocab_size": len(parts[0]["output.weight"]) * len(parts),
            "hidden_size": p["dim"],
            "intermediate_size": len(parts[0]["layers.0.feed_forward.w1.weight"]) * len(parts),
            "n_layers": p["n_layers"],
            "n_heads": p["n_heads"],
            "n_kv_heads": p.get("n_kv_heads") or 0,
            "max_seq_len": p.get("max_seq_len") or META_SEQ_LEN.get(p["norm_eps"], 4096),
            "norm_eps": p["norm_eps"],
            "rope_theta": p.get("rope_theta", 10000.0),
        }
        config = checked_config(values, path / "params.json", {"hidden_size": "dim"})
        get = lambda name: join_meta([torch_state(file)[name] for file in files], name, config)
        tensors = {}
        for name in [name for name in parts[0] if name != "rope.freqs"]:  # those are computed, see `rope_frequencies`
            like = join_meta([part[name].to("meta") for part in parts], name, config)
            tensors[rename(name, META_NAMES)] = (like, functools.partial(get, name))
    except (KeyError, IndexError) as e:
        raise UserError(f"{path}: params.json or consolidated.*.pth has no {e}") from None
    except (RuntimeError, TypeError) as e:
        raise UserError(f"{path}: the parts do not fit together: {str(e).splitlines()[0]}") from None
    ckpt = Checkpoint(path, config, tensors)
    read_beside(path, ckpt)
    if not ckpt.tokenizer and (above := path.parent / "tokenizer.model").exists():  # Meta's download has it there
        ckpt.tokenizer = above.read_bytes()
    return ckpt


def rename(name: str, names: dict[str, str]) -> str:
    """A tensor's name in the other layout, by META_NAMES or HF_NAMES; one that is not there stays as it is."""
    i = "".join(re.findall(r"\blayers\.(\d+)\.", name))
    pattern = name.replace(f"layers.{i}.", "layers.{}.")
    return names[pattern].format(i) if pattern in names else name


def rotary_rows(w: Tensor, head_dim: int, to_hf: bool) -> Tensor:
    """wq or wk with its rows reordered: Meta turns the pairs (x_0, x_1), (x_2, x_3), ..., Hugging Face (x_0, x_{d/2}),
    (x_1, x_{d/2 + 1}), ..."""
    pairs = (head_dim // 2, 2) if to_hf else (2, head_dim // 2)
    return w.view(-1, *pairs, w.shape[1]).transpose(1, 2).reshape(w.shape)


def join_meta(parts: list[Tensor], name: str, config: LlamaConfig) -> Tensor:
    """One whole matrix from its model-parallel slices, rows reordered where Meta rotates neighbouring pairs."""
    if parts[0].dim() == 1 or len(parts) == 1:  # norms are replicated
        w = parts[0]
    else:  # wo and w2 are cut along their input; embeddings too, but by rows since LLaMA-3
        by_input = name.endswith(("wo.weight", "w2.weight")) or parts[0].shape[1] * len(parts) == config.hidden_size
        w = torch.cat(parts, 1 if by_input else 0)
    return rotary_rows(w, config.head_dim, to_hf=True) if name.endswith(("wq.weight", "wk.weight")) else w


def meta_params(c: LlamaConfig) -> dict:
    """Meta's params.json; UserError for what it cannot say. max_seq_len, a key of our own, is added where the training
    length is not the one that norm_eps stands for."""
    missing = {"rope_scaling": c.rope_scaling, "sliding_window": c.sliding_window}
    missing["head_dim"] = c.head_dim * c.n_heads != c.hidden_size
    if keys := [key for key, there in missing.items() if there]:
        raise UserError(f"--layout meta: has no room for the model's {keys[0]}; --layout hf has")
    params = {"dim": c.hidden_size, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads}
    params |= {"vocab_size": c.vocab_size, "norm_eps": c.norm_eps, "rope_theta": c.rope_theta}
    # Meta's code has the MLP's width from two thirds of 4 x dim, times a factor, rounded up to `multiple_of`.
    width = 8 * c.hidden_size // 3
    params["multiple_of"] = c.intermediate_size & -c.intermediate_size  # the largest power of 2 that divides it
    if -(-width // params["multiple_of"]) * params["multiple_of"] != c.intermediate_size:
        params["ffn_dim_multiplier"] = (c.intermediate_size + 0.5) / width
    usual = c.max_seq_len == META_SEQ_LEN.get(c.norm_eps, 4096)
    return params if usual else params | {"max_seq_len": c.max_seq_len}


def write_meta(path: Path, ckpt: Checkpoint, like: dict[str, Tensor]) -> None:
    """Meta's layout in one part, the inverse of `open_meta`. Tied embeddings are written twice, as Meta's code asks."""
    c = ckpt.config
    params = meta_params(c)
    sources = {rename(name, HF_NAMES): name for name in like}
    if c.tie_embeddings:
        sources["output.weight"] = "model.embed_tokens.weight"

    def get(name: str) -> Tensor:
        w = ckpt[sources[name]]
        return rotary_rows(w, c.head_dim, to_hf=False) if name.endswith(("wq.weight", "wk.weight")) else w

    tensors = {name: (like[source], functools.partial(get, name)) for name, source in sources.items()}
    path.mkdir()
    part = Checkpoint(None, c, tensors)
    write_torch(path / "consolidated.00.pth", part, part.like)
    (path / "params.json").write_text(json.dumps(params) + "\n")
    write_beside(path, ckpt)


# ----------------------------------------------------------------------------------------------------------------------
# a look at a checkpoint, and the command


def sparsity_of(weight: Tensor) -> tuple[float, str | None]:
    """The share of zeros, and the tightest of the usual N:M patterns that holds (None where none does)."""
    zeros = 1 - weight.count_nonzero().item() / weight.numel()
    for n, m in ((1, 4), (2, 8), (2, 4), (4, 8)):
        if weight.shape[1] % m == 0 and (weight.reshape(-1, m) != 0).sum(1).max() <= n:
            return zeros, f"{n}:{m}"
    return zeros, None


def describe(ckpt: Checkpoint) -> dict:
    """What --info says of a checkpoint, which is read tensor by tensor."""
    sizes, zeros, patterns = {}, {}, {}  # of each kind of linear, over all layers
    for name in ckpt:
        if name.endswith("_proj.weight"):
            kind = name.split(".")[-2]
            w = ckpt[name]
            share, pattern = sparsity_of(w)
            sizes[kind] = sizes.get(kind, 0) + w.numel()
            zeros[kind] = zeros.get(kind, 0) + share * w.numel()
            patterns.setdefault(kind, set()).add(pattern)
    linears = {
        kind: {"sparsity": zeros[kind] / sizes[kind], "pattern": found.pop() if len(found) == 1 else None}
        for kind, found in patterns.items()
    }
    return {
        "family": next((name for name, c in PRESETS.items() if c == ckpt.config), "LLaMA of its own shape"),
        "parameters": sum(w.numel() for w in ckpt.like.values()),
        "bytes": sum(w.numel() * w.element_size() for w in ckpt.like.values()),
        "dtype": str(ckpt.like["model.norm.weight"].dtype).removeprefix("torch."),
        "linears": linears,
        "tokenizer": bool(ckpt.tokenizer),
        "history": ckpt.history,
        "config": dataclasses.asdict(ckpt.config),
    }


def print_description(about: dict) -> None:
    """Prints what `describe` returned on one screen."""
    c = about["config"]
    print(f"{about['family']}: {about['parameters']:,} parameters, {about['dtype']}, {about['bytes'] / 1e9:.3f} GB")
    print(f"{c['n_layers']} layers of {c['hidden_size']} / {c['intermediate_size']}, {c['n_heads']} heads", end="")
    print(f" ({c['n_kv_heads']} key-value), vocabulary {c['vocab_size']:,}, {c['max_seq_len']:,} positions")
    for kind, line in about["linears"].items():
        print(f"  {kind:<10} {100 * line['sparsity']:6.2f}% zeros   {line['pattern'] or ''}")
    for step in about["history"]:
        print("  history: " + ", ".join(f"{key} {value}" for key, value in step.items()))


def parse_size(text: str) -> int:
    """ "500MB" -> 500,000,000 bytes."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    digits, unit = text[:-2], text[-2:].upper()
    if unit not in units or not digits.isdigit() or int(digits) == 0:
        raise UserError(f"--max_shard_size {text}: expected a size such as 500MB or 5GB")
    return int(digits) * units[unit]


def complete(
    model: Llama, tokenizer: SentencePieceProcessor, prompt: str, n: int, temperature: float = 0.0, top_p: float = 1.0
) -> str:
    """The prompt and up to n tokens that go on from it, as text; see `generate`."""
    tokens = [id for id in (tokenizer.bos_id(), *tokenizer.encode(prompt)) if id >= 0]  # -1: it has no BOS
    if not tokens:
        raise UserError("--prompt: is empty, and the tokenizer has no token to begin with")
    model.config.check_length(len(tokens) + n, "--prompt and --max_new_tokens")
    if len(tokens) + n > model.config.max_seq_len:
        print(f"note: the model was trained on {model.config.max_seq_len} tokens at most", file=sys.stderr)
    return tokenizer.decode(tokens + list(generate(model, tokens, n, temperature, top_p, tokenizer.eos_id())))


def main() -> None:
    parser = Parser(description="Convert, describe or run a LLaMA checkpoint.")
    add = parser.add_argument
    add("--ckpt", required=True, help="a .pt file, a Hugging Face directory or a Meta directory")
    add("--out", help="convert: a .pt file, or a new directory")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of --out or --prompt (default: the checkpoint's)")
    add("--layout", choices=("hf", "meta"), default="hf", help="of a directory: Hugging Face's or Meta's")
    add("--max_shard_size", type=parse_size, default="5GB", help="of a directory's files, such as 500MB")
    add("--info", action="store_true", help="describe the checkpoint")
    add("--json", action="store_true", help="with --info: as JSON")
    add("--prompt", help="generate text that goes on from this")
    add("--max_new_tokens", type=number(int, 0), default=200, help="of --prompt")
    add("--temperature", type=number(float, 0), default=0.0, help="0: the likeliest token each time")
    add("--top_p", type=number(float, 0, high=1), default=1.0, help="draw among the likeliest tokens of this total")
    add("--seed", type=number(int, 0), default=0, help="of drawing")
    args = parser.parse_args()
    if not (args.out or args.info or args.prompt is not None):
        raise UserError("nothing to do: give --out, --info or --prompt")
    if args.layout == "meta" and (not args.out or args.out.endswith(".pt")):
        raise UserError("--layout meta: needs --out with the name of a new directory")
    if args.json and not args.info:
        raise UserError("--json: is for --info")
    if args.out:
        check_out(args.out, inputs=[args.ckpt])
    dtype = getattr(torch, args.dtype) if args.dtype else None
    ckpt = open_checkpoint(args.ckpt)
    if args.info:
        about = describe(ckpt)
        print(json.dumps(about, indent=2)) if args.json else print_description(about)
    if args.out:
        write_checkpoint(ckpt, args.out, dtype, args.max_shard_size, args.layout)
        print(f"wrote {args.out}")
    if args.prompt is not None:
        model, tokenizer = load(args.ckpt, dtype)
        if tokenizer is None:
            raise UserError(f"--ckpt {args.ckpt}: has no tokenizer.model")
        torch.manual_seed(args.seed)
        print(complete(model, tokenizer, args.prompt, args.max_new_tokens, args.temperature, args.top_p))


if __name__ == "__main__":
    cli(main)
