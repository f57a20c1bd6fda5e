"""LLaMA by hand, and its checkpoints in and out.

The network that SPP prunes and fine-tunes: RMSNorm, rotary positions, SwiGLU, grouped-query attention (LLaMA, Touvron
et al. 2023a, b). The classes come first and read top to bottom; below them, one function for each checkpoint layout:

    python model.py --ckpt SRC --out model.pt         # any layout -> one file of ours
    python model.py --ckpt SRC --out DIR              # any layout -> a Hugging Face directory
    python model.py --ckpt SRC --prompt "Once upon"   # what it says
    python model.py --ckpt SRC --info                 # what it is: sizes, sparsity, pattern, history

SRC is a .pt file of ours, a Hugging Face directory (config.json with *.safetensors or *.bin, sharded or not) or a Meta
directory (params.json with consolidated.*.pth). State-dict names are Hugging Face's everywhere. A checkpoint is read
through `Checkpoint`, a lazy mapping of names to memory-mapped tensors, so that a 70B model can be walked one block at
a time; it is written to a temporary name, flushed, then renamed, so that a killed run leaves no half-written file.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """Something the user can put right. `cli` prints it as one line and exits with status 2."""


def cli(main: Callable[[], None]) -> None:
    """Runs a file's main function; a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        else:  # under torchrun rank 0 speaks for all, and the first to exit has the others stopped
            time.sleep(5)
        sys.exit(2)


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

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.hidden_size // self.n_heads


PRESETS = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(hidden_size=5120, intermediate_size=13824, n_layers=40, n_heads=40),
    "llama-30b": LlamaConfig(hidden_size=6656, intermediate_size=17920, n_layers=60, n_heads=52),
    "llama-65b": LlamaConfig(hidden_size=8192, intermediate_size=22016, n_layers=80, n_heads=64),
    "llama-2-7b": LlamaConfig(max_seq_len=4096, norm_eps=1e-5),
    "llama-2-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, n_layers=40, n_heads=40, max_seq_len=4096, norm_eps=1e-5
    ),
    "llama-2-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        max_seq_len=4096,
        norm_eps=1e-5,
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
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In float32 whatever the model's dtype, and rounded before the weight, as LLaMA's own code does.
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_frequencies(config: LlamaConfig, seq_len: int, device) -> Tensor:
    """Angular frequencies of the rotary embedding, (head_dim / 2,) float32, after `rope_scaling`.

    seq_len matters to "dynamic" alone, which stretches the base once a sequence outgrows the training length.
    """
    d, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling or {}
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
    seq_len = int(positions.max()) + 1 if (config.rope_scaling or {}).get("rope_type") == "dynamic" else 0
    angles = positions[..., None].float() * rope_frequencies(config, seq_len, positions.device)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + head_dim/2}) by its position's angle: Hugging Face's order, see `meta_to_hf`."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        c, self.head_dim = config, config.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.n_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: list | None = None):
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, heads, T, head_dim)
        if cache is not None:
            if cache:
                k, v = (
                    torch.cat([cache[0].expand(B, -1, -1, -1), k], 2),
                    torch.cat([cache[1].expand(B, -1, -1, -1), v], 2),
                )
            cache[:] = [k, v]
        # A group of query heads shares one key-value head (enable_gqa). Without a mask attention is causal.
        gqa = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: list | None = None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab_size).

    `history` is the list of what was done to the weights (pruned how, fine-tuned from what); it travels with them.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.history = config, []
        self.activation_checkpointing = False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "norm": RMSNorm(config.hidden_size, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: list[list] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (B, T, hidden_size): lm_head turns those that matter into logits.

        tokens: (B, T) int64. positions: (T,) or (B, T), by default 0, 1, ... behind what the cache holds. mask: bool,
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

        def loss(x, targets):
            return F.cross_entropy(self.lm_head(x).float(), targets, reduction="sum")

        pairs = zip(x.split(1024), targets.split(1024), strict=True)
        return sum(
            (checkpoint(loss, *pair, use_reentrant=False) for pair in pairs), x.new_zeros((), dtype=torch.float32)
        )


# ----------------------------------------------------------------------------------------------------------------------
# files: written whole or not at all


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
        shutil.rmtree(tmp, ignore_errors=True) if tmp.is_dir() else tmp.unlink(missing_ok=True)


def check_out(path: str | Path) -> Path:
    """Refuses, before any work is done, an --out that could not be written after it."""
    path = Path(path)
    file = path.suffix in (".pt", ".npy", ".json")
    if file and path.is_dir():
        raise UserError(f"--out {path}: is a directory, and a {path.suffix} name is a file")
    if not file and path.is_file():
        raise UserError(f"--out {path}: is a file; a name without .pt is a directory")
    if not file and path.is_dir() and any(path.iterdir()):
        raise UserError(f"--out {path}: the directory is not empty; name a new one or remove it")
    try:
        existing = next(p for p in path.absolute().parents if p.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as e:
        raise UserError(f"--out {path}: cannot be written: {e.strerror or e}") from None
    return path


def read_json(path: str | Path):
    """Parses a JSON file; a missing or malformed one is a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path}: is not JSON: {e}") from None


def load_tokenizer(source: str | Path | bytes) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model from its bytes, a file, a directory that holds tokenizer.model, or a .pt of ours."""
    if isinstance(source, str | Path) and Path(source).suffix == ".pt":
        source = open_checkpoint(path := source).tokenizer
        if not source:
            raise UserError(f"{path}: holds no tokenizer")
    if isinstance(source, str | Path) and Path(source).is_dir():
        source = Path(source) / "tokenizer.model"
    name = "the checkpoint's tokenizer" if isinstance(source, bytes) else source
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except OSError as e:
        raise UserError(f"{name}: cannot be read: {e.strerror}") from None
    except RuntimeError:
        raise UserError(f"{name}: is not a sentencepiece model") from None


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints in


class Checkpoint(Mapping):
    """What a checkpoint holds, before any weight is read: `config`, `tokenizer` (bytes or None), `history`, and a
    mapping from Hugging Face's names to tensors, each made when it is asked for (memory-mapped where possible)."""

    def __init__(self, path, config: LlamaConfig, tensors: dict[str, Callable[[], Tensor]], tokenizer=None, history=()):
        self.path, self.config, self.tensors = path, config, tensors
        self.tokenizer, self.history = tokenizer, list(history)
        self.shapes = {}  # what is known of them without reading a tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

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
    if path.is_file():
        ckpt = open_pt(path)
    elif (path / "config.json").exists():
        ckpt = open_hf(path)
    elif (path / "params.json").exists():
        ckpt = open_meta(path)
    else:
        raise UserError(f"{path}: holds neither config.json (Hugging Face) nor params.json (Meta)")
    for field in dataclasses.fields(LlamaConfig):
        value = getattr(ckpt.config, field.name)
        if field.type is int and not (type(value) is int and 0 < value < 2**31):
            raise UserError(f"{path}: config: {field.name} is {value!r}, expected a whole number above 0")
    if ckpt.config.n_layers > len(ckpt):
        raise UserError(f"{path}: config: {ckpt.config.n_layers} layers, but only {len(ckpt)} tensors")
    with torch.device("meta"):
        model = Llama(ckpt.config)
    want = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    if ckpt.config.tie_embeddings:
        del want["lm_head.weight"]
        ckpt.tensors.pop("lm_head.weight", None)
    missing, unknown = sorted(want.keys() - ckpt.keys()), sorted(ckpt.keys() - want.keys())
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not a LLaMA's"
        raise UserError(f"{path}: {what} ({len(missing)} missing, {len(unknown)} unknown names)")
    for name, shape in want.items():
        if ckpt.shapes.get(name, shape) != shape:
            raise UserError(f"{path}: {name} has shape {ckpt.shapes[name]}, its config says {shape}")
    if ckpt.tokenizer:
        size = load_tokenizer(ckpt.tokenizer).vocab_size()
        if size > ckpt.config.vocab_size:
            raise UserError(f"{path}: its tokenizer has {size} pieces, the model only {ckpt.config.vocab_size}")
    return ckpt


def torch_load(path: Path):
    """torch.load that runs no code of the file's, memory-maps it, and says which file is not one."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except Exception as e:  # zip, pickle and torch raise a dozen kinds for a damaged file
        raise UserError(
            f"{path}: is truncated, damaged or not a PyTorch file ({str(e).splitlines()[0][:120]})"
        ) from None


def open_pt(path: Path) -> Checkpoint:
    data = torch_load(path)
    if not isinstance(data, dict) or not {"config", "model"} <= data.keys():
        raise UserError(f"{path}: is not a checkpoint of ours (a dict with `config` and `model`)")
    try:
        config = LlamaConfig(**data["config"])
    except TypeError as e:
        raise UserError(f"{path}: its config is not a LLaMA's: {e}") from None
    shapes = tensor_shapes(data["model"], path)
    # Mapped again at each access, so that pages read earlier do not stay resident while a large model is walked.
    tensors = {name: functools.partial(lambda name: torch_load(path)["model"][name], name) for name in shapes}
    ckpt = Checkpoint(path, config, tensors, data.get("tokenizer"), data.get("history", ()))
    ckpt.shapes = shapes
    return ckpt


def tensor_shapes(state, path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict, checked to be one."""
    if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
        raise UserError(f"{path}: its state dict holds what is no tensor")
    return {str(name): tuple(w.shape) for name, w in state.items()}


SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def safetensors_index(path: Path) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """The header of a .safetensors file: name -> (dtype, shape, first byte, end), each checked against the file.

    Layout: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors' bytes, to which
    the header's offsets are relative, without holes or overlaps.
    """

    def damaged(what):
        return UserError(f"{path}: {what}: the file is truncated, damaged or no safetensors file")

    size = path.stat().st_size
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0] if size >= 8 else size
        if n > min(size - 8, 100 * 2**20):  # the format's own limit
            raise damaged(f"{size} bytes with a header of {n}")
        try:
            header = json.loads(f.read(n), object_pairs_hook=unique)
        except (ValueError, RecursionError):
            raise damaged("its header is not JSON") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    start, index = 8 + n, {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(a), int(b)]}:
                if dtype not in SAFETENSORS_DTYPES:
                    raise UserError(f"{path}: {name} is {dtype}; readable are {', '.join(SAFETENSORS_DTYPES)}")
                dtype = SAFETENSORS_DTYPES[dtype]
            case _:
                raise damaged(f"{name} has no dtype, shape and data_offsets")
        if not all(type(d) is int and d >= 0 for d in shape) or b - a != math.prod(shape) * dtype.itemsize:
            raise damaged(f"{name} of shape {shape} and {dtype} cannot lie at bytes {a} to {b}")
        index[name] = (dtype, shape, start + a, start + b)
    at = start
    for name, (_, _, first, end) in sorted(index.items(), key=lambda item: item[1][2:]):
        if first != at or end > size:
            raise damaged(f"{name} lies at bytes {first} to {end} of {size}, expected to begin at {at}")
        at = end
    return index


def unique(pairs: list) -> dict:
    """A JSON object's pairs as a dict; a name that stands twice is an error."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def map_tensor(path: Path, dtype: torch.dtype, shape: list[int], first: int, end: int) -> Tensor:
    """A tensor over the bytes [first, end) of a file, read when touched and unmapped when freed."""
    data = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)[first:end]
    if first % dtype.itemsize:
        data = data.clone()  # torch cannot view an unaligned slice
    return data.view(dtype).view(shape)


def open_hf(path: Path) -> Checkpoint:
    tensors, shapes = {}, {}
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in safetensors_index(file).items():
            tensors[name], shapes[name] = functools.partial(map_tensor, file, *entry), tuple(entry[1])
    if not tensors:
        for file in sorted(path.glob("pytorch_model*.bin")):
            for name, shape in tensor_shapes(torch_load(file), file).items():
                tensors[name] = functools.partial(lambda file, name: torch_load(file)[name], file, name)
                shapes[name] = shape
    if not tensors:
        raise UserError(f"{path}: holds config.json but neither *.safetensors nor pytorch_model*.bin")
    tensors = {name: get for name, get in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    config = hf_to_config(read_json(path / "config.json"), path)
    tokenizer, history = path / "tokenizer.model", path / "history.json"
    ckpt = Checkpoint(path, config, tensors, history=read_json(history) if history.exists() else ())
    ckpt.tokenizer, ckpt.shapes = tokenizer.read_bytes() if tokenizer.exists() else None, shapes
    return ckpt


def hf_to_config(c: dict, path: Path) -> LlamaConfig:
    """Hugging Face's config.json, of any age, as a LlamaConfig."""
    if c.get("model_type") not in ("llama", "mistral"):
        raise UserError(f"{path}/config.json: model_type is {c.get('model_type')!r}, not a LLaMA's")
    for key in ("attention_bias", "mlp_bias"):
        if c.get(key):
            raise UserError(f"{path}/config.json: {key} is true; LLaMA's linears have no bias")
    # transformers 5 keeps theta and the scaling in one dict
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or c.get("rope_theta") or 10000.0
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    if rope["rope_type"] not in ("default", "linear", "dynamic", "llama3"):
        raise UserError(f"{path}/config.json: rope_scaling of type {rope['rope_type']!r} is not LLaMA's")
    try:
        return LlamaConfig(
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            n_layers=c["num_hidden_layers"],
            n_heads=c["num_attention_heads"],
            n_kv_heads=c.get("num_key_value_heads") or 0,
            head_dim=c.get("head_dim") or 0,
            max_seq_len=c.get("max_position_embeddings") or 2048,
            norm_eps=c.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            tie_embeddings=c.get("tie_word_embeddings", False),
        )
    except KeyError as e:
        raise UserError(f"{path}/config.json: has no {e}") from None
    except TypeError as e:
        raise UserError(f"{path}/config.json: a size is not a number ({e})") from None


def open_meta(path: Path) -> Checkpoint:
    """Meta's layout: params.json and consolidated.00.pth, .01.pth, ..., each a slice of every matrix."""
    p, files = read_json(path / "params.json"), sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{path}: holds params.json but no consolidated.*.pth")
    parts = [torch_load(file) for file in files]
    tokenizer = next(
        (f.read_bytes() for f in (path / "tokenizer.model", path.parent / "tokenizer.model") if f.exists()), None
    )
    try:
        config = LlamaConfig(
            vocab_size=len(parts[0]["output.weight"]) * len(parts),
            hidden_size=p["dim"],
            intermediate_size=len(parts[0]["layers.0.feed_forward.w1.weight"]) * len(parts),
            n_layers=p["n_layers"],
            n_heads=p["n_heads"],
            n_kv_heads=p.get("n_kv_heads") or 0,
            max_seq_len=p.get("max_seq_len") or (2048 if p["norm_eps"] == 1e-6 else 4096),  # LLaMA, LLaMA-2
            norm_eps=p["norm_eps"],
            rope_theta=p.get("rope_theta", 10000.0),
        )
    except KeyError as e:
        raise UserError(f"{path}: params.json or consolidated.00.pth has no {e}") from None
    names = {meta_to_hf(name): name for name in parts[0] if name != "rope.freqs"}
    tensors = {hf: functools.partial(join_meta, files, name, config) for hf, name in names.items()}
    return Checkpoint(path, config, tensors, tokenizer)


META_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def meta_to_hf(name: str) -> str:
    """ "layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, i, stem = stem.split(".", 2)
        return f"model.layers.{i}.{META_NAMES.get(stem, stem)}.weight"
    return f"{META_NAMES.get(stem, stem)}.weight"


def join_meta(files: list[Path], name: str, config: LlamaConfig) -> Tensor:
    """One whole matrix from its model-parallel slices, rows reordered where Meta rotates neighbouring pairs."""
    parts = [torch_load(file)[name] for file in files]
    if parts[0].dim() == 1 or len(parts) == 1:  # norms are replicated
        w = parts[0]
    else:  # wo and w2 are cut along their input; embeddings too, but by rows since LLaMA-3
        by_input = name.endswith(("wo.weight", "w2.weight")) or parts[0].shape[1] * len(parts) == config.hidden_size
        w = torch.cat(parts, 1 if by_input else 0)
    if name.endswith(("wq.weight", "wk.weight")):  # (x_0, x_1), (x_2, x_3), ... -> (x_0, x_{d/2}), ...: see `rotate`
        w = w.view(-1, config.head_dim // 2, 2, config.hidden_size).transpose(1, 2).reshape(w.shape)
    return w


def load(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"):
    """Loads any checkpoint. Returns (model, tokenizer); the tokenizer is None where the checkpoint has none.

    dtype: the weights' own by default. Raises UserError for what cannot be read or is no LLaMA.
    """
    ckpt = open_checkpoint(path)
    with torch.device("meta"):
        model = Llama(ckpt.config)
    tied = ckpt.config.tie_embeddings
    model.load_state_dict({name: w.to(device, dtype) for name, w in ckpt.items()}, strict=not tied, assign=True)
    model.tie_weights()
    model.history = ckpt.history
    return model, load_tokenizer(ckpt.tokenizer) if ckpt.tokenizer else None


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints out


def save(model: Llama, path: str | Path, tokenizer: sentencepiece.SentencePieceProcessor | None = None) -> None:
    """Writes `path`: ours if it ends in .pt, otherwise a Hugging Face directory. `model.history` goes with it."""
    weights = {name: functools.partial(lambda w: w, w.detach().cpu()) for name, w in model.state_dict().items()}
    if model.config.tie_embeddings:
        weights.pop("lm_head.weight")
    proto = tokenizer.serialized_model_proto() if tokenizer else None
    write_checkpoint(Checkpoint(None, model.config, weights, proto, model.history), path)


def write_checkpoint(ckpt: Checkpoint, path: str | Path, dtype: torch.dtype | None = None, max_shard_size=5 * 10**9):
    """Writes a Checkpoint to `path`, as a .pt file or as a Hugging Face directory in shards of max_shard_size bytes."""
    path = check_out(path)
    with atomic(path) as tmp:
        if path.suffix == ".pt":
            data = {
                "config": dataclasses.asdict(ckpt.config),
                "model": {k: w.to(dtype).clone() for k, w in ckpt.items()},
            }
            torch.save(data | {"tokenizer": ckpt.tokenizer, "history": ckpt.history}, tmp)
            return
        tmp.mkdir()
        shards, size = [{}], 0
        for name in ckpt:  # shapes first: the names of the shards say how many there are
            w = ckpt[name]
            nbytes = w.numel() * (dtype or w.dtype).itemsize
            if size and size + nbytes > max_shard_size:
                shards, size = [*shards, {}], 0
            shards[-1][name], size = nbytes, size + nbytes
        files = ["model.safetensors"] if len(shards) == 1 else []
        files = files or [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for file, shard in zip(files, shards, strict=True):
            write_safetensors(tmp / file, {name: ckpt[name].to(dtype) for name in shard})
        write_hf_extras(tmp, ckpt, {name: f for f, s in zip(files, shards, strict=True) for name in s}, dtype)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    dtypes = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    for name, w in tensors.items():
        end = offset + w.numel() * w.element_size()
        header[name] = {"dtype": dtypes[w.dtype], "shape": list(w.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for w in tensors.values():
            f.write(w.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_hf_extras(path: Path, ckpt: Checkpoint, weight_map: dict[str, str], dtype: torch.dtype | None = None) -> None:
    """What stands beside the shards of a Hugging Face directory: config, index, tokenizer, history."""
    c = ckpt.config
    dtype = dtype or ckpt["model.norm.weight"].dtype
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(set(weight_map.values())) > 1:
        total = sum(ckpt[name].numel() * dtype.itemsize for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if ckpt.tokenizer:
        (path / "tokenizer.model").write_bytes(ckpt.tokenizer)
    if ckpt.history:
        (path / "history.json").write_text(json.dumps(ckpt.history, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# a look at a model


@torch.no_grad()
def generate(model: Llama, tokens: list[int], n: int, temperature: float = 0.0, top_p: float = 1.0, stop: int = -1):
    """Yields up to n tokens that go on from `tokens`, one at a time, with a key-value cache.

    temperature 0 takes the likeliest token; otherwise tokens are drawn (from torch's generator) among the fewest whose
    probabilities sum to top_p. Ends after `stop`.
    """
    device, cache = model.lm_head.weight.device, [[] for _ in model.model.layers]
    new = list(tokens)
    for _ in range(n):
        x = model.hidden(torch.tensor([new], device=device), cache=cache)
        logits = model.lm_head(x[0, -1]).float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            p, order = (logits / temperature).softmax(-1).sort(descending=True)
            p[p.cumsum(0) - p > top_p] = 0  # all behind the first that reaches top_p
            token = int(order[torch.multinomial(p, 1)])
        yield token
        if token == stop:
            return
        new = [token]


def sparsity_of(weight: Tensor) -> tuple[float, str | None]:
    """The share of zeros, and the tightest of the usual N:M patterns that holds (None where none does)."""
    zeros = 1 - weight.count_nonzero().item() / weight.numel()
    for n, m in ((1, 4), (2, 8), (2, 4), (4, 8)):
        if weight.shape[1] % m == 0 and (weight.reshape(-1, m) != 0).sum(1).max() <= n:
            return zeros, f"{n}:{m}"
    return zeros, None


def describe(ckpt: Checkpoint) -> dict:
    """One screen about a checkpoint, read tensor by tensor."""
    kinds, n_parameters, size = {}, 0, 0
    for name in ckpt:
        w = ckpt[name]
        n_parameters, size = n_parameters + w.numel(), size + w.numel() * w.element_size()
        if name.endswith("_proj.weight"):
            kinds.setdefault(name.split(".")[-2], []).append((w.numel(), *sparsity_of(w)))
    family = next((name for name, c in PRESETS.items() if c == ckpt.config), "LLaMA of its own shape")
    linears = {
        kind: {
            "sparsity": sum(n * zeros for n, zeros, _ in layers) / sum(n for n, _, _ in layers),
            "pattern": layers[0][2] if len({pattern for _, _, pattern in layers}) == 1 else None,
        }
        for kind, layers in kinds.items()
    }
    dtype = str(ckpt["model.norm.weight"].dtype).removeprefix("torch.")
    about = {"family": family, "parameters": n_parameters, "bytes": size, "dtype": dtype, "linears": linears}
    return about | {
        "tokenizer": bool(ckpt.tokenizer),
        "history": ckpt.history,
        "config": dataclasses.asdict(ckpt.config),
    }


def print_description(about: dict) -> None:
    c = about["config"]
    print(f"{about['family']}: {about['parameters']:,} parameters, {about['dtype']}, {about['bytes'] / 1e9:.3f} GB")
    print(f"{c['n_layers']} layers of {c['hidden_size']} / {c['intermediate_size']}, {c['n_heads']} heads", end="")
    print(f" ({c['n_kv_heads']} key-value), vocabulary {c['vocab_size']:,}, {c['max_seq_len']:,} positions")
    for kind, line in about["linears"].items():
        print(f"  {kind:<10} {100 * line['sparsity']:6.2f}% zeros   {line['pattern'] or ''}")
    for step in about["history"]:
        print("  history: " + ", ".join(f"{key} {value}" for key, value in step.items()))


def main():
    parser = argparse.ArgumentParser(description="Convert, describe or run a LLaMA checkpoint.")
    add = parser.add_argument
    add("--ckpt", required=True, help="a .pt file, a Hugging Face directory or a Meta directory")
    add("--out", help="convert: a .pt file, or a new directory in Hugging Face's layout")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of --out or --prompt (default: the checkpoint's)")
    add("--max_shard_size", default="5GB", help="of a directory's files, such as 500MB (default: 5GB)")
    add("--info", action="store_true", help="describe the checkpoint")
    add("--json", action="store_true", help="with --info: as JSON")
    add("--prompt", help="generate text that goes on from this")
    add("--max_new_tokens", type=int, default=200, help="of --prompt (default: 200)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default: 0)")
    add("--top_p", type=float, default=1.0, help="draw among the likeliest tokens of this total (default: 1)")
    add("--seed", type=int, default=0, help="of drawing (default: 0)")
    args = parser.parse_args()
    if not (args.out or args.info or args.prompt is not None):
        raise UserError("nothing to do: give --out, --info or --prompt")
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = args.max_shard_size[:-2], args.max_shard_size[-2:].upper()
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise UserError(f"--max_shard_size {args.max_shard_size}: expected a size such as 500MB or 5GB")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    ckpt = open_checkpoint(args.ckpt)
    if args.info:
        about = describe(ckpt)
        print(json.dumps(about, indent=2)) if args.json else print_description(about)
    if args.out:
        write_checkpoint(ckpt, args.out, dtype, int(number) * units[unit])
        print(f"wrote {args.out}")
    if args.prompt is not None:
        model, tokenizer = load(args.ckpt, dtype)
        if tokenizer is None:
            raise UserError(f"--ckpt {args.ckpt}: has no tokenizer.model")
        torch.manual_seed(args.seed)
        tokens = [tokenizer.bos_id(), *tokenizer.encode(args.prompt)]
        settings = (args.max_new_tokens, args.temperature, args.top_p, tokenizer.eos_id())
        print(tokenizer.decode(tokens + list(generate(model, tokens, *settings))))


if __name__ == "__main__":
    cli(main)
