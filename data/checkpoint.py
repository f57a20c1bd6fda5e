"""What comes from disk as weights: a mapping of names to tensors, and the layouts that it is read from and written to.

    ours             one .pt file: a dict of `version`, `config`, `tokenizer`, `files`, `history`, `model` (weights) and
                     `packed`, the shapes of sparse weights, of which `model` has the survivors and a bit mask
    Hugging Face's   a directory: config.json with *.safetensors or *.bin, in one file or many
    Meta's           a directory: params.json with consolidated.*.pth, each a slice of every matrix

Whatever the layout, tensors have Hugging Face's names and the config is a dict under Hugging Face's keys. What a LLaMA
is, model.py knows: it holds names, shapes and settings against its network. Of LLaMA only Meta's names are known here.

A checkpoint is never read as a whole. `Checkpoint` maps a tensor of the file when it is asked for, and writing goes
tensor by tensor, so that converting a 70B model takes the memory of its largest matrix. Files are read without running
code of theirs, and written under a temporary name, flushed, then renamed: a killed run leaves no half-written file.
"""

import contextlib
import copy
import fcntl
import fnmatch
import functools
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import reprlib
import shutil
import struct
import tempfile
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.serialization import skip_data

VERSION = 2  # of every .pt and .json whose layout is this project's; raised when one changes

# ----------------------------------------------------------------------------------------------------------------------
# the error that speaks to the user; reading and writing files with it


class UserError(Exception):
    """Something that the user can put right. A command prints it as one line and exits with status 2."""


def checked_file(path: str | Path) -> Path:
    """The path, if it is an ordinary file; UserError for what is missing, a directory, or a pipe that would block."""
    path = Path(path)
    try:
        if path.is_file():
            return path
        what = "is a directory, expected a file" if path.is_dir() else "is not an ordinary file"
        path.stat()
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        what = f"cannot be read: {getattr(e, 'strerror', None) or e}"
    raise UserError(f"{path}: {what}")


def identity(path: Path) -> tuple[int, ...]:
    """What tells a file from another that has its name later."""
    info = os.stat(path)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def check_same(path: Path, opened: tuple[int, ...]) -> None:
    """UserError unless a file is the one that was opened: a checkpoint is read a tensor at a time, over hours."""
    if identity(checked_file(path)) != opened:
        raise UserError(f"{path}: was replaced or written to while it was in use")


# What a file may turn out to be in place of what its name says, by its first bytes
LFS_POINTER = b"version https://git-lfs"
FOREIGN = {
    LFS_POINTER: "is a Git LFS pointer, not the file itself; `git lfs pull` fetches that",
    b"GGUF": "is a GGUF file, which llama.cpp reads; take the model's Hugging Face directory",
    b"<": "is a web page, not the file itself; download it again",
    b"{": "is JSON and holds no weights; name the model's directory",
}


def read_bytes(path: str | Path) -> bytes:
    """What a file holds. UserError where it cannot be read, or has more than 2 GiB."""
    path = checked_file(path)
    try:
        if path.stat().st_size > 2**31:
            raise UserError(f"{path}: has {path.stat().st_size:,} bytes, more than the {2**31:,} that it may have")
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    if data.startswith(LFS_POINTER):
        raise UserError(f"{path}: {FOREIGN[LFS_POINTER]}")
    return data


def read_head(path: str | Path) -> bytes:
    """The first bytes of a file of arrays or weights. UserError, which names it, for what is plainly something else."""
    path = checked_file(path)
    with open(path, "rb") as f:
        head = f.read(64)
    if head[4:8] == bytes(4):  # a safetensors file's: its length in 8 bytes, of which the first may look like "{"
        return head
    for start, what in FOREIGN.items():
        if head.startswith(start):
            raise UserError(f"{path}: {what}")
    return head


def parse_json(data: bytes | str, source: str | Path, kind: type = object, surrogates: bool = False) -> Any:
    """What JSON text says, a `kind` (dict, list). UserError, which names `source`, for anything else.

    JSON may spell half of a surrogate pair, which is no character: no tokenizer and no file takes it. It is refused
    unless `surrogates` says that the caller will look.
    """
    try:
        if isinstance(data, bytes):
            data = data.decode("utf-8-sig")  # without the byte-order mark that some editors put first
        value = json.loads(data)
        if not surrogates and re.search(r"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{source}: holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{source}: is not JSON: {e}") from None
    if not isinstance(value, kind):
        raise UserError(f"{source}: is a JSON {type(value).__name__}, expected a {kind.__name__}")
    return value


def is_json(data: bytes) -> bool:
    """Whether bytes look like a JSON object, perhaps after a byte-order mark."""
    return data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def read_json(path: str | Path, kind: type = object) -> Any:
    """Parses a JSON file that holds a `kind`; a missing or malformed one is a UserError that names it."""
    return parse_json(read_bytes(path), path, kind)


def utf8(data: bytes, source: str | Path) -> str:
    """The text that bytes are, its line ends as they are. UserError, which names `source`, where they are none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{source}: is not UTF-8 text") from None


def parse_json_lines(data: bytes, source: str | Path, surrogates: bool = False) -> Iterator[tuple[str, dict]]:
    """The objects of text with one JSON object a line, each with its place, "FILE: line 3", for messages. UserError for
    a line that is none; blank lines are passed over."""
    text = utf8(data, source).removeprefix("\ufeff")  # the byte-order mark that some editors put first
    lines = text.split("\n")  # not splitlines, which takes U+2028 for an end of line too
    for i, line in enumerate(lines, 1):
        if line.strip():
            where = f"{source}: line {i}"
            yield where, parse_json(line, f"{where} (an object on each line)", dict, surrogates)


def read_npy(path: str | Path) -> np.ndarray:
    """The array in a .npy file, memory-mapped. UserError where there is none."""
    read_head(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # numpy raises a dozen kinds for a damaged header, which it reads as Python
        raise UserError(f"{path}: is not a .npy file, or is damaged ({str(e).splitlines()[0]:.80})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: is an archive of arrays, expected a .npy file")
    return array


def brief(value: Any) -> str:
    """A value from a file, for a message. repr alone would take for ever with lists of lists that a pickle shares."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    return short.repr(value)


def check_version(value: Any, path: str | Path) -> None:
    """UserError unless `value`, what stands as a file's version, is this code's."""
    if type(value) is not int or value != VERSION:  # type: a bool is an int, and a tensor may be anything
        found = "no version" if value is None else f"version {brief(value):.20}"
        raise UserError(f"{path}: has {found}, expected {VERSION}: its layout is another; make it again with this code")


def temporary(path: Path) -> Path:
    """The name under which this process writes what `path` will be."""
    return path.with_name(f".{path.name}.tmp.{os.uname().nodename}.{os.getpid()}")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` (for a file or a directory); flushes and renames it if all went well."""
    path = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
    tmp = temporary(path)
    stem = tmp.name.removesuffix(str(os.getpid()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.iterdir():  # what a killed process of this machine has left
            if old.name.startswith(stem) and not Path(f"/proc/{old.name.removeprefix(stem)}").exists():
                remove(old)
        yield tmp
        for file in [*tmp.iterdir()] if tmp.is_dir() else [tmp]:
            with open(file, "rb") as f:
                os.fsync(f.fileno())  # or the new name could reach the disk before what it names
        if path.is_dir():
            path.rmdir()  # an empty directory gives way; check_out refused any other
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(OSError):  # a file where a folder should be, for one; it has been said above
            remove(tmp)


def remove(path: Path) -> None:
    """Removes a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON that a person can read, atomically."""
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def torch_file(path: Path) -> Iterator[Any]:
    """Yields a file for torch's zip writer. That one writes once more when it is destroyed, and ends the process if it
    cannot: so after a write that failed the others do nothing, and the OSError is raised here, at the end."""
    errors = []

    def guarded(method: Callable) -> Callable:
        def call(*args: Any) -> None:
            if not errors:
                try:
                    method(*args)
                except OSError as e:
                    errors.append(e)

        return call

    file = open(path, "wb")  # noqa: SIM115
    try:
        methods = {name: guarded(getattr(file, name)) for name in ("write", "seek", "flush")}
        yield types.SimpleNamespace(**methods, errors=errors)
    finally:
        guarded(file.close)()
        errors.append(None)  # nothing more goes to a file that is closed
    if errors[0] is not None:
        raise errors[0]


def save_torch(value: Any, path: Path) -> None:
    """torch.save to a name that `atomic` gave. A full disk is an OSError, as everywhere."""
    with torch_file(path) as file:
        torch.save(value, file)


def save_npy(array: np.ndarray, path: Path) -> None:
    """np.save, which by itself leaves a short file on a full disk and says nothing."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def lock(folder: Path) -> TextIO:
    """Makes the folder and keeps other processes out of it, for as long as the returned file is open. UserError where
    one is at work in it."""
    busy = UserError(f"{folder}: another run is at work in it; stop it, or wait for its end")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / ".lock").exists():
            checked_file(folder / ".lock")  # opening a pipe would wait for its other end
        file = open(folder / ".lock", "a")  # noqa: SIM115  a file that is never replaced, and open to the end
    except OSError as e:
        raise UserError(f"{folder}: cannot be written: {e.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:  # a file system without locks
        return file
    # Whoever held it may have moved the folder away at its end, and this be the lock of nothing.
    if not (folder / ".lock").exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(folder / ".lock")):
        raise busy
    return file


def lock_partial(work: Path, others: Iterable[str | Path] = ()) -> TextIO:
    """Locks OUT.partial, where a command keeps what it has done until all is: see `lock`. UserError where it is
    something else: a folder that no command has locked before, or where one of the command's `others`, paths, lies."""
    for path in others:
        real = Path(os.path.realpath(path))
        if Path(os.path.realpath(work)) in (real, *real.parents):  # which takes a link to itself, unlike resolve()
            raise UserError(f"{path}: lies in {work}, where this command keeps its unfinished work")
    if work.is_dir() and any(work.iterdir()) and not (work / ".lock").exists():
        raise UserError(f"{work}: is in the way, and no interrupted command has left it; move it or name another --out")
    return lock(work)


def check_out(path: str | Path, flag: str = "--out", inputs: Iterable[str | Path] = (), model: bool = False) -> Path:
    """Refuses, before any work is done, a path that could not be written after it, or that is one of the command's
    inputs or in one. Names with .pt, .npy, .json or .jsonl are files, all others new or empty directories. model: what
    goes there is one, a .pt file or a directory.

    Returns the path with symbolic links followed: a link to a larger disk is written there, and stays.
    """
    if not str(path):
        raise UserError(f"{flag}: is empty, expected a name")
    path = Path(path)
    target = Path(os.path.realpath(path))  # not Path.resolve, which fails at a link to itself
    for real in [Path(os.path.realpath(p)) for p in inputs]:
        if target == real or real in target.parents:
            what = "is an input" if target == real else f"lies in {real}, an input"
            raise UserError(f"{flag} {path}: would be overwritten, and it {what}")
    kind, file = path.suffix, path.suffix in (".pt", ".npy", ".json", ".jsonl")
    weights = kind in (".safetensors", ".bin", ".pth")
    ordinary = target.is_file() or target.is_dir() or not target.exists()
    refused = {
        "is a symbolic link that leads to itself": not file and target.is_symlink(),
        "is not an ordinary file, and cannot be replaced by one": not ordinary,
        f"a model is no {kind} file; name a .pt file or a directory": model and file and kind != ".pt",
        f"a {kind} name is a file of weights alone; name a .pt file or a directory": weights,
        f"is a directory, and a {kind} name is a file": file and path.is_dir(),
        "is a mount point, which cannot be replaced; name a directory inside of it": not file and os.path.ismount(path),
        "is a file; a name without .pt is a directory": not file and path.is_file(),
        "the directory is not empty; name a new one or remove it": not file and path.is_dir() and any(path.iterdir()),
    }
    for why, found in refused.items():
        if found:
            raise UserError(f"{flag} {path}: {why}")
    try:
        temporary(target).exists()  # a name may be too long
        existing = next(p for p in path.absolute().parents if p.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be written: {e.strerror or e}") from None
    return target


def check_ours(path: Path, key: str, what: str) -> None:
    """UserError, which begins with `what`, where there is a JSON file without `key` (of a .jsonl: the first line), and
    so none of the kind that would replace it."""
    if not path.exists():
        return
    if path.suffix == ".jsonl":
        _, there = next(parse_json_lines(read_bytes(path), path, surrogates=True), ("", {}))
    else:
        there = read_json(path, dict)
    if key not in there:
        raise UserError(f"{what} would overwrite {path}, which is a file of another kind")


def digest(*parts: Any) -> str:
    """The first half of a sha256 over bytes, arrays, and whatever else JSON can hold."""
    h = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes | np.ndarray) else json.dumps(part).encode()
        h.update(f"{len(data)} ".encode())  # so that two parts are not taken for one, or cut elsewhere
        h.update(data)
    return h.hexdigest()[:32]


# ----------------------------------------------------------------------------------------------------------------------
# one mapping, whatever the layout

Tensors = dict[str, tuple[Tensor, Callable[[], Tensor]]]  # name -> (shape and dtype as a meta tensor, how to get it)


class Checkpoint(Mapping):
    """A mapping from Hugging Face's names to tensors, each made when it is asked for (memory-mapped where possible).

    config      dict, Hugging Face's keys
    shapes      name -> meta tensor: shapes and dtypes, without reading a weight
    tokenizer   the tokenizer's main file, bytes, or None
    files       name -> bytes: the small files that travel with a model
    history     a list of what was done to the weights, a flat dict for each step
    """

    def __init__(self, path: Path | None, config: dict, tensors: Tensors):
        self.path, self.config = path, config
        self.shapes = {name: meta for name, (meta, _) in tensors.items()}
        self.getters = {name: get for name, (_, get) in tensors.items()}
        self.tokenizer, self.files, self.history = None, {}, []

    def __getitem__(self, name: str) -> Tensor:
        return self.getters[name]()

    def __contains__(self, name: object) -> bool:
        return name in self.getters  # Mapping's own would read the tensor

    def __iter__(self):
        return iter(self.getters)

    def __len__(self):
        return len(self.getters)

    def changed(self, tensors: dict[str, Callable[[], Tensor]], entry: dict) -> "Checkpoint":
        """A copy with other tensors of the same shapes and dtypes in place of some, and one more step of history."""
        new = copy.copy(self)
        new.getters = {**self.getters, **tensors}
        new.history = [*self.history, entry]
        return new

    def fingerprint(self) -> str:
        """A hash of every name, shape, dtype and byte: the same in every layout.

        It is limited by the disk: sha256 takes 0.6 s a GB on one core, and tensors are hashed on all of them.
        """

        def one(name: str) -> str:
            w = self[name]
            return digest(name, [*w.shape], str(w.dtype), tensor_bytes(w))

        with ThreadPoolExecutor() as pool:  # hashing and reading both let other threads run
            return digest(*pool.map(one, sorted(self)))


WEIGHTS_ALONE = "is a file of weights alone; name its directory, which holds config.json or params.json too"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens any of the three layouts. UserError for what is none of them, or damaged."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors" and path.is_file():
            safetensors_index(path)  # a pointer or half a download is said to be that
            raise UserError(f"{path}: {WEIGHTS_ALONE}")
        if not path.is_dir():
            return open_pt(checked_file(path))
        if (path / "config.json").exists():
            return open_hf(path)
        if (path / "params.json").exists():
            return open_meta(path)
        if (path / "adapter_config.json").exists():
            raise UserError(f"{path}: holds an adapter of PEFT's and no model; merge it into its base model first")
    except OSError as e:
        raise UserError(f"{e.filename or path}: cannot be read: {e.strerror}") from None
    raise UserError(f"{path}: holds neither config.json (Hugging Face) nor params.json (Meta)")


def write_checkpoint(
    ckpt: Checkpoint,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    layout: str = "hf",
) -> None:
    """Writes a Checkpoint to `path`: a .pt file, or a directory in Hugging Face's layout ("hf", in shards of at most
    max_shard_size bytes where a tensor allows) or Meta's ("meta"). One tensor at a time is in memory."""
    path = check_out(path, model=True)
    shapes = {name: w.to(dtype or w.dtype) for name, w in ckpt.shapes.items()}
    with atomic(path) as tmp:
        if path.suffix == ".pt":
            head = {"config": ckpt.config, "tokenizer": ckpt.tokenizer, "files": ckpt.files, "history": ckpt.history}
            write_torch(tmp, ckpt, shapes, head)
        elif layout == "meta":
            write_meta(tmp, ckpt, shapes)
        else:
            write_hf(tmp, ckpt, shapes, max_shard_size)


def tensor_bytes(w: Tensor) -> np.ndarray:
    """A tensor's bytes, as an array that a file can write and a hash can read."""
    return w.contiguous().reshape(-1).view(torch.uint8).numpy()


def cast(w: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype. UserError where a weight is too large for it: float16 ends at 65,504."""
    new = w.to(dtype)
    if dtype not in (w.dtype, torch.float32) and (new.isinf() & w.isfinite()).any():
        largest = w.abs()[w.isfinite()].max()
        other = "bfloat16" if dtype == torch.float16 else "float32"
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name}: holds {largest:.3g}, which is too large for {kind}; take --dtype {other}")
    return new


# ----------------------------------------------------------------------------------------------------------------------
# a sparse matrix as its survivors, in one vector, and a bit for each weight: exact for any pattern of zeros


def pack(W: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The survivors (k,) of W (m, n), row by row, and its mask, by default W != 0: uint8 (m, ceil(n / 8)), the first
    column in the lowest bit."""
    if mask is None:
        mask = W != 0
    return W[mask], torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def packed_size(W: Tensor, survivors: int) -> int:
    """Bytes of W (m, n) when it is packed."""
    return survivors * W.element_size() + len(W) * math.ceil(W.shape[1] / 8)


def unpack_mask(bits: Tensor, n: int) -> Tensor:
    """True where a weight survived, (m, n)."""
    byte, place = torch.arange(256, device=bits.device), torch.arange(8, device=bits.device)
    eight = (byte[:, None] >> place & 1).bool().view(torch.int64).flatten()  # the bits of a byte, as eight bools
    return eight[bits.int()].view(torch.bool)[:, :n]


def unpack(values: Tensor, bits: Tensor | None, n: int) -> Tensor:
    """W (m, n), from what `pack` made of it; without bits the values are W itself."""
    if bits is None:
        return values
    if values.is_cuda:  # where masked_scatter_ makes a prefix sum of 8 bytes a weight
        return unpack_by_places(values, bits, n)
    return values.new_zeros(len(bits), n).masked_scatter_(unpack_mask(bits, n), values)


def unpack_by_places(values: Tensor, bits: Tensor, n: int) -> Tensor:
    """The same by elementwise operations, of which torch.compile makes one kernel together with what uses W. A
    survivor's place is the number of bits before it, in the bytes before and in its own."""
    j = torch.arange(8, device=bits.device, dtype=torch.uint8)

    def ones(byte: Tensor) -> Tensor:  # set bits of a byte, in three shifts
        byte = byte - (byte >> 1 & 0x55)
        byte = (byte & 0x33) + (byte >> 2 & 0x33)
        return (byte + (byte >> 4)) & 0x0F

    count = ones(bits).int()
    start = (count.flatten().cumsum(0, dtype=torch.int32) - count.flatten()).view_as(bits)
    place = start[..., None] + ones(bits[..., None] & ((1 << j) - 1))
    kept = (bits[..., None] >> j & 1).bool()
    # where no survivor follows, the place is one too far
    W = torch.where(kept, values[place.clamp_max(max(0, len(values) - 1))], 0) if len(values) else kept.to(values.dtype)
    return W.flatten(1)[:, :n]


# ----------------------------------------------------------------------------------------------------------------------
# what travels with a model, besides its weights and its config


# beside the tokenizer's main file and the history
TRAVELS = """generation_config.json tokenizer*.json special_tokens_map.json added_tokens.json chat_template*
    LICEN[SC]E* USE_POLICY* NOTICE*""".split()


def travels(name: str) -> bool:
    """Whether a file of this name goes with a model from layout to layout."""
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in TRAVELS)


def checked_history(history: Any, source: str | Path) -> list[dict]:
    """A history, every step of it a flat dict. UserError otherwise."""
    scalars = (str, int, float, bool, type(None))
    steps = history if isinstance(history, list) else [None]  # None: is refused below
    for step in steps:
        flat = isinstance(step, dict) and all(isinstance(x, scalars) for pair in step.items() for x in pair)
        if not flat or not isinstance(step.get("method"), str):
            raise UserError(f"{source}: its history is damaged: expected a list of steps, each with its `method`")
        parse_json(json.dumps(step), source)  # UserError for half of a surrogate pair, which no file takes
    return history


def read_beside(path: Path, ckpt: Checkpoint) -> None:
    """Gives the checkpoint what its directory holds besides weights and config."""
    for pattern in TRAVELS:
        for file in sorted(path.glob(pattern)):
            if file.is_file():
                ckpt.files[file.name] = read_bytes(file)
    for name in ("tokenizer.model", "tokenizer.json"):
        if ckpt.tokenizer is None and (path / name).exists():
            ckpt.tokenizer = read_bytes(path / name)
    file = path / "history.json"
    if file.exists():
        found = read_json(file)
        steps = found.get("history") if isinstance(found, dict) else None
        if steps is None:  # another program's, or ours from before there were versions
            raise UserError(f"{file}: is no history that this version wrote; move it away, and the model loads")
        check_version(found.get("version"), file)
        ckpt.history = checked_history(steps, file)


def write_beside(path: Path, ckpt: Checkpoint) -> None:
    """What a directory of either layout holds besides weights and config."""
    for name, data in ckpt.files.items():
        (path / name).write_bytes(data)
    if ckpt.tokenizer:
        name = "tokenizer.json" if is_json(ckpt.tokenizer) else "tokenizer.model"
        (path / name).write_bytes(ckpt.tokenizer)
    if ckpt.history:
        text = json.dumps({"version": VERSION, "history": ckpt.history}, indent=2)
        (path / "history.json").write_text(text + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch files (.pt, .bin, .pth), and our layout


# Bytes after which a file is mapped anew: pages that were read stay in memory while a mapping lives, and a large model
# would fill it while it is walked. Mapping is parsing, a tenth of a second for 500 tensors, so it is not done for each.
# A tensor that is asked for twice is mapped anew: whoever had it first may have written into it.
REMAP = 2**24

LEGACY = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # the number with which PyTorch's files of before 1.6 begin


def is_legacy(path: Path) -> bool:
    """Whether a file has PyTorch's format of before 1.6: four pickles, then the bare weights, in no zip."""
    return LEGACY in read_head(path)[:32]


def load_legacy(path: Path) -> Any:
    """What a file of before 1.6 holds, all of it in memory."""
    with open(path, "rb") as f:
        for _ in range(4):  # the number, a version, the writer's machine, and what was saved
            if any(str(arg).endswith("bytearray") for _, arg, _ in pickletools.genops(f)):
                raise ValueError("it holds a bytearray")  # of any size, see `torch_load`
    return torch.load(path, map_location="cpu", weights_only=True)


def torch_load(path: str | Path, checksums: bool = False) -> Any:
    """torch.load that runs no code of the file's, memory-maps it, and says which file is not one. checksums: whether to
    read all of it and compare them."""
    path = checked_file(path)
    try:
        if is_legacy(path):
            return load_legacy(path)
        with zipfile.ZipFile(path) as z, warnings.catch_warnings():
            # torch.save never writes two things that can swell without end: compressed entries and sized bytearrays.
            if any(entry.compress_type for entry in z.infolist()):
                raise ValueError("it is compressed")
            if any(b"\nbytearray\n" in z.read(name) for name in z.namelist() if name.endswith("data.pkl")):
                raise ValueError("it holds a bytearray")
            if checksums and z.testzip() is not None:
                raise ValueError("a checksum is another")
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except Exception as e:  # zip, pickle and torch raise a dozen kinds for a damaged file
        found = re.search(r"GLOBAL (\S+)", str(e))
        if found and isinstance(e, pickle.UnpicklingError):
            what = f"holds Python objects ({found[1]:.80}), which could run code; save its state_dict instead"
            raise UserError(f"{path}: {what}") from None
        why = (str(e) or type(e).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: is truncated, damaged or not a PyTorch file ({why})") from None


def torch_state(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict that is in a PyTorch file, alone or under `key`: memory-mapped, and checked to hold tensors."""
    state = torch_load(path)
    if key:
        state = state[key]
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    check_tensors(state, path)
    return state


def check_tensors(state: dict, path: str | Path) -> None:
    """UserError unless everything in a dict from a PyTorch file is a plain tensor under a name, and in the file."""
    for name, w in state.items():
        plain = isinstance(w, Tensor) and w.layout == torch.strided and not (w.is_meta or w.is_quantized)
        if not isinstance(name, str) or not plain:
            raise UserError(f"{path}: its state dict holds {brief(name)}, which is no plain tensor")
        if not w.numel() * w.element_size() <= w.untyped_storage().nbytes() <= os.stat(path).st_size:
            raise UserError(f"{path}: {name} of shape {[*w.shape]} is larger than what is stored of it")


def torch_tensors(path: Path, key: str | None = None, remap: int = REMAP) -> Tensors:
    """The tensors of a PyTorch file, which is mapped anew now and then: see `REMAP`. One of before 1.6, which cannot be
    mapped, is read once and kept."""
    opened = identity(path)
    state, legacy = torch_state(path, key), is_legacy(path)
    nbytes = 0

    def get(name: str) -> Tensor:
        nonlocal state, nbytes
        if legacy:
            return state[name].clone()
        if nbytes > remap or name not in state:
            check_same(path, opened)
            state, nbytes = torch_state(path, key), 0
        w = state.pop(name)
        nbytes += w.nbytes
        # A tensor keeps its mapping, and so every page that was read through it: a block's norms would keep the block.
        return w.clone() if w.nbytes < 2**16 else w

    return {name: (w.to("meta"), functools.partial(get, name)) for name, w in state.items()}


def open_pt(path: Path) -> Checkpoint:
    """Opens a .pt of ours. UserError where it is none, or damaged."""
    data = torch_load(path)
    if isinstance(data, dict) and data and all(isinstance(w, Tensor) for w in data.values()):
        raise UserError(f"{path}: {WEIGHTS_ALONE}")
    if not isinstance(data, dict) or not {"config", "model"} <= data.keys():
        raise UserError(f"{path}: is not a checkpoint of ours (a dict with `config` and `model`)")
    check_version(data.get("version"), path)
    data = {"tokenizer": None, "history": [], "files": {}, "packed": {}, **data}
    kinds = {"config": dict, "tokenizer": bytes | None, "history": list, "files": dict, "packed": dict}
    for key, kind in kinds.items():
        if not isinstance(data[key], kind):
            raise UserError(f"{path}: its {key} is a {type(data[key]).__name__}")
    for name, content in data["files"].items():
        if not isinstance(name, str) or not travels(name) or not isinstance(content, bytes):
            raise UserError(f"{path}: holds the file {brief(name)}, none that travels with a model")
    ckpt = Checkpoint(path, data["config"], unpacked_tensors(path, torch_tensors(path, "model"), data["packed"]))
    ckpt.tokenizer, ckpt.files, ckpt.history = data["tokenizer"], data["files"], checked_history(data["history"], path)
    return ckpt


BITS = ".bits"  # what is added to a weight's name for its mask


def unpacked_tensors(path: Path, stored: Tensors, packed: dict) -> Tensors:
    """The tensors of a .pt of ours, each packed one as a dense tensor that is made when it is asked for."""

    def get(name: str, n: int) -> Tensor:
        values, bits = stored[name][1](), stored[name + BITS][1]()
        if unpack_mask(bits, n).count_nonzero() != len(values):
            raise UserError(f"{path}: {name} has another number of survivors than of bits: the file is damaged")
        return unpack(values, bits, n)

    tensors = {name: found for name, found in stored.items() if name.removesuffix(BITS) not in packed}
    for name, shape in packed.items():
        # absent: an empty vector of floats, which no bits are
        values, bits = (stored.get(key, (torch.empty(0),))[0] for key in (name, f"{name}{BITS}"))
        listed = isinstance(name, str) and isinstance(shape, list) and [*map(type, shape)] == [int, int]
        m, n = shape if listed else (0, 0)
        if min(m, n) < 1 or values.dim() != 1 or bits.dtype != torch.uint8 or bits.shape != (m, math.ceil(n / 8)):
            raise UserError(f"{path}: {name} is no packed weight of shape {brief(shape)}: the file is damaged")
        tensors[name] = torch.empty(m, n, dtype=values.dtype, device="meta"), functools.partial(get, name, n)
    return tensors


def write_torch(path: Path, tensors: Mapping[str, Tensor], shapes: dict[str, Tensor], head: dict | None = None) -> None:
    """torch.save of the tensors that `shapes` names, in its dtypes: a state dict, or with `head` that dict and the
    state dict as its `model`, in which matrices are packed where that takes less. One tensor at a time is in memory.

    The weights are written first, since what a packed one takes is known when it is there. The pickle that describes
    them comes from a file of blank tensors, which take room in it but none in memory.
    """
    written, packed = {}, {}
    with writing(path) as record:
        for name, w in shapes.items():
            parts = {name: cast(tensors[name], w.dtype, name).contiguous()}
            if head is not None and w.dim() == 2:
                W = parts[name]
                mask = W.view({2: torch.int16, 4: torch.int32}[W.element_size()]) != 0  # a negative zero is kept
                if packed_size(W, int(mask.count_nonzero())) < W.nbytes:
                    parts[name], parts[name + BITS] = pack(W, mask)
                    packed[name] = [*W.shape]
            for key, part in parts.items():
                record(f"data/{len(written)}", part)
                written[key] = part.shape, part.dtype
            parts = W = mask = part = None  # gone before the next is read
        # Not made earlier: small tensors between the large ones would hold on to memory that a weight has just left.
        blank = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in written.items()}
        if head is not None:
            blank = {"version": VERSION, **head, "packed": packed, "model": blank}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
            with skip_data():
                save_torch(blank, Path(folder) / "blank")
            with zipfile.ZipFile(Path(folder) / "blank") as z:
                for entry in z.namelist():
                    name = entry.partition("/")[2]
                    if name in ("data.pkl", "byteorder"):
                        record(name, torch.frombuffer(bytearray(z.read(entry)), dtype=torch.uint8))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Callable[[str, Tensor], None]]:
    """Yields a function that adds a tensor's bytes to a new PyTorch file. A full disk is an OSError."""
    with torch_file(path) as file:
        writer = torch._C.PyTorchFileWriter(file)

        def record(name: str, w: Tensor) -> None:
            whole = w
            if w.untyped_storage().nbytes() != w.nbytes:  # a mapped weight's storage is its whole file
                whole = w.clone()
            writer.write_record(name, whole.untyped_storage(), w.nbytes)
            if file.errors:  # now, and not after the rest of 140 GB
                raise file.errors[0]

        yield record
        writer.write_end_of_file()


# ----------------------------------------------------------------------------------------------------------------------
# .safetensors files: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors' bytes, to
# which the header's offsets are relative, without holes or overlaps


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def safetensors_index(path: Path) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """The header of a .safetensors file: name -> (dtype, shape, first byte, end), each checked against the file."""

    def damaged(what: str) -> UserError:
        return UserError(f"{path}: {what}: the file is truncated, damaged or no safetensors file")

    if is_legacy(path) or read_head(path).startswith(b"PK\3\4"):  # a zip, as torch writes since 1.6
        raise UserError(f"{path}: is a PyTorch file, expected a safetensors file; its name should end in .bin")
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0] if size >= 8 else size
        if n > min(size - 8, 2**24):  # 100 times a 70B model's
            raise damaged(f"{size} bytes with a header of {n}")
        try:
            header = json.loads(f.read(n))
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
                if dtype not in DTYPES:
                    raise UserError(f"{path}: {name} is {dtype}; readable are {', '.join(DTYPES)}")
                dtype = DTYPES[dtype]
            case _:
                raise damaged(f"{name} has no dtype, shape and data_offsets")
        if not all(type(d) is int and d >= 0 for d in shape) or b - a != math.prod(shape) * dtype.itemsize:
            raise damaged(f"{name} of shape {shape} and {dtype} cannot lie at bytes {a} to {b}")
        index[name] = (dtype, shape, start + a, start + b)
    expected = start
    for name, (_, _, first, end) in sorted(index.items(), key=lambda item: item[1][2:]):
        if first != expected or end > size:
            raise damaged(f"{name} lies at bytes {first} to {end} of {size}, expected to begin at {expected}")
        expected = end
    if expected != size:
        raise damaged(f"its tensors end at byte {expected} of {size}")
    return index


def safetensors_tensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file."""
    opened, tensors = identity(path), {}
    for name, (dtype, shape, a, b) in safetensors_index(path).items():
        meta = torch.empty(shape, dtype=dtype, device="meta")
        tensors[name] = meta, functools.partial(map_tensor, path, opened, dtype, shape, a, b)
    return tensors


def map_tensor(path: Path, opened: tuple, dtype: torch.dtype, shape: list[int], first: int, end: int) -> Tensor:
    """A tensor over the bytes [first, end) of a file, read when touched and unmapped when freed."""
    check_same(path, opened)
    try:
        data = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)[first:end]
    except RuntimeError as e:
        raise UserError(f"{path}: cannot be mapped: {str(e).splitlines()[0]}") from None
    if first % dtype.itemsize:
        data = data.clone()  # torch cannot view an unaligned slice
    return data.view(dtype).view(shape)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], shapes: dict[str, Tensor] | None = None) -> None:
    """Writes the tensors that `shapes` names, in its dtypes (all and as they are, by default), one at a time."""
    shapes = shapes or tensors
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, w in shapes.items():
        end = offset + w.numel() * w.element_size()
        header[name] = {"dtype": names[w.dtype], "shape": list(w.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, w in shapes.items():
            f.write(tensor_bytes(cast(tensors[name], w.dtype, name)))


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout


def open_hf(path: Path) -> Checkpoint:
    """config.json, with the weights that transformers takes: one file, what an index names, or a set of shards."""
    config, tensors = read_json(path / "config.json", dict), {}
    check_stored_dense(config, path)  # before the weights, whose dtypes would be refused without the cause
    for file, names in hf_files(path).items():
        found = torch_tensors(path / file) if file.endswith(".bin") else safetensors_tensors(path / file)
        for name, entry in found.items():
            if name.endswith("rotary_emb.inv_freq"):  # older checkpoints store these; they are computed
                continue
            if names is not None and name not in names:
                continue
            if name in tensors:
                raise UserError(f"{path / file}: {name} stands in another file too")
            tensors[name] = entry
    ckpt = Checkpoint(path, config, tensors)
    read_beside(path, ckpt)
    return ckpt


def check_stored_dense(config: dict, source: str | Path) -> None:
    """UserError for a config.json of quantized weights. A quantization_config may say that none is, and that sparse
    ones are stored with their zeros, as llm-compressor can leave a 2:4 model."""
    for key in ("quantization_config", "compression_config"):  # the latter is llm-compressor's older name
        match config.get(key):
            case None:
                continue
            case {"sparsity_config": {"format": "dense"}, **more} if not (
                more.get("config_groups") or more.get("kv_cache_scheme")
            ):
                continue
            case {"quant_method": method}:
                by = brief(method)
            case _:
                by = "an unknown method"
        raise UserError(
            f"{source}: config: {key}: its weights are stored by {by}, expected plain ones; decompress the model first"
        )


def hf_files(path: Path) -> dict[str, set[str] | None]:
    """The files that hold a directory's weights, each with the tensors that count in it (None: all), in transformers'
    order: a single file of the usual name, an index, and the same for .bin. Shards without an index all count."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if os.path.lexists(path / single):  # lexists: a link to nothing is an error, not another model's turn
            return {single: None}
        if os.path.lexists(index):
            files, weight_map = {}, read_json(index, dict).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index}: its weight_map is a {type(weight_map).__name__}, expected a dict")
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file:
                    raise UserError(f"{index}: {name} lies in {file!r}, expected a file of this directory")
                files.setdefault(file, set()).add(name)
            check_shards(path, files, index.name)
            return files
    for pattern in ("model-*.safetensors", "pytorch_model-*.bin"):
        if found := sorted(file.name for file in path.glob(pattern)):
            if numbers := re.fullmatch(r"(.*-)\d+(-of-(\d{1,5})\..*)", found[0]):
                before, after, n = numbers.groups()
                check_shards(path, [f"{before}{i:05}{after}" for i in range(1, int(n) + 1)], found[0])
            return dict.fromkeys(found)
    hint = "; DeepSpeed's zero_to_fp32.py makes them of its states" if (path / "zero_to_fp32.py").exists() else ""
    usual = "none of model.safetensors, model-*.safetensors, pytorch_model.bin, pytorch_model-*.bin"
    raise UserError(f"{path}: holds config.json but {usual}{hint}")


def check_shards(path: Path, files: Iterable[str], source: str) -> None:
    """UserError for the first of a directory's shards that is not there; `source` is the file that speaks of it."""
    for file in files:
        if not (path / file).exists():
            raise UserError(f"{path / file}: cannot be read: is missing, and {source} names it as a part of the model")


def write_hf(path: Path, ckpt: Checkpoint, shapes: dict[str, Tensor], max_shard_size: int) -> None:
    """Writes a Hugging Face directory, in files of up to max_shard_size bytes, or of one tensor that is larger."""
    path.mkdir()
    shards, size = [[]], 0
    for name, w in shapes.items():
        nbytes = w.numel() * w.element_size()
        if size and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_safetensors(path / file, ckpt, {name: shapes[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    write_hf_extras(path, ckpt, weight_map, shapes)


def write_hf_extras(path: Path, ckpt: Checkpoint, weight_map: dict[str, str], shapes: dict[str, Tensor]) -> None:
    """What stands beside the shards of a Hugging Face directory: config, index, tokenizer, history, licences."""
    dtype = str(shapes["model.norm.weight"].dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps({**ckpt.config, "torch_dtype": dtype}, indent=2) + "\n")
    if len(set(weight_map.values())) > 1:
        total = sum(shapes[name].numel() * shapes[name].element_size() for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_beside(path, ckpt)


# ----------------------------------------------------------------------------------------------------------------------
# Meta's layout


# The keys of params.json that are understood; any other could change the function. Mistral's three are its own.
MISTRAL_KEYS = {"head_dim", "hidden_dim", "sliding_window"}
META_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
META_KEYS |= {"rope_theta", "use_scaled_rope", "max_seq_len", "max_position_embeddings", "max_batch_size"}
META_KEYS |= MISTRAL_KEYS
# Frequencies that LLaMA's files hold beside the weights: LLaMA-1's in every layer, LLaMA-2's once
LAYER_FREQS, MODEL_FREQS = "layers.{}.attention.inner_attention.rope.freqs", "rope.freqs"
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
    """params.json and consolidated.00.pth, .01.pth, ..., each a slice of every matrix, or Mistral's one
    consolidated.safetensors."""
    params = read_json(path / "params.json", dict)
    for key in params.keys() - META_KEYS:
        if params[key] not in (None, False):
            what = f"{key} is {brief(params[key])}, which may change the function and is not understood"
            raise UserError(f"{path}/params.json: {what}; expected LLaMA's keys")
    files = sorted(path.glob("consolidated.*.pth"))
    if files:
        check_shards(path, [f"consolidated.{i:02}.pth" for i in range(len(files))], files[-1].name)
        parts = [torch_tensors(file, remap=REMAP // len(files)) for file in files]
    elif (path / "consolidated.safetensors").exists():
        parts = [safetensors_tensors(path / "consolidated.safetensors")]
    else:
        raise UserError(f"{path}: holds params.json but no consolidated.*.pth")
    try:
        config = meta_to_hf(params, [{name: meta for name, (meta, _) in part.items()} for part in parts])
        wq, _ = parts[0]["layers.0.attention.wq.weight"]  # its rows tell into how many parts it was cut
        n_parts = config["num_attention_heads"] * config["head_dim"] // max(1, len(wq))
        if files and 0 < n_parts < 100:
            check_shards(path, [f"consolidated.{i:02}.pth" for i in range(n_parts)], "params.json")
        hidden_size, head_dim = config["hidden_size"], config["head_dim"]
        get = lambda name: join_parts([part[name][1]() for part in parts], name, hidden_size, head_dim)
        tensors = {}
        for name in parts[0]:
            if name.endswith("rope.freqs"):  # computed, as Hugging Face's inv_freq
                continue
            meta = join_parts([part[name][0] for part in parts], name, hidden_size, head_dim)
            tensors[rename(name, META_NAMES)] = (meta, functools.partial(get, name))
    except (KeyError, IndexError) as e:
        raise UserError(f"{path}: params.json or consolidated.*.pth has no {e}") from None
    except (RuntimeError, TypeError, ZeroDivisionError) as e:
        raise UserError(f"{path}: the parts do not fit together: {str(e).splitlines()[0]}") from None
    ckpt = Checkpoint(path, config, tensors)
    read_beside(path, ckpt)
    if not ckpt.tokenizer and (path.parent / "tokenizer.model").exists():  # Meta's download has it there
        ckpt.tokenizer = read_bytes(path.parent / "tokenizer.model")
    return ckpt


def meta_to_hf(params: dict, parts: list[dict[str, Tensor]]) -> dict:
    """params.json under Hugging Face's keys; what it does not say is read off the matrices, meta tensors of each part.
    Where nothing tells the training length it is None, and max_seq_len says that this is no omission."""
    vocab_size, width = params.get("vocab_size"), params.get("hidden_dim")
    if not vocab_size or vocab_size == -1:  # LLaMA's own files leave it to the tokenizer
        vocab_size = len(parts[0]["output.weight"]) * len(parts)
    config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": params["dim"],
        "intermediate_size": width or len(parts[0]["layers.0.feed_forward.w1.weight"]) * len(parts),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": params.get("head_dim") or params["dim"] // params["n_heads"],
        "max_position_embeddings": meta_length({**params, "vocab_size": vocab_size}, parts[0]),
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta") or 10000.0,
    }
    if config["max_position_embeddings"] is None:
        config["max_seq_len"] = None
    if params.get("use_scaled_rope"):
        config["rope_scaling"] = llama3_scaling(params["dim"])
    if params.get("sliding_window"):
        config.update(model_type="mistral", sliding_window=params["sliding_window"])
    return config


def meta_length(params: dict, names: Iterable[str]) -> int | None:
    """The length that a model was trained on, which Meta's params.json does not hold: from what does determine it, the
    settings and the names of the tensors, or None. (norm_eps does not: LLaMA 65B has LLaMA-2's.)"""
    theta = params.get("rope_theta") or 10000.0
    for key in ("max_seq_len", "max_position_embeddings"):  # a key of our own, and one of Mistral's
        if params.get(key):
            return params[key]
    if params.get("use_scaled_rope"):  # LLaMA 3.1 to 3.3
        return 131072
    if params.keys() & MISTRAL_KEYS:  # whose theta of 1e6 stands for another length than CodeLlama's
        return None
    if theta == 500000 or params["vocab_size"] == 128256:  # LLaMA-3
        return 8192
    if theta == 1000000:  # CodeLlama
        return 16384
    if theta != 10000:
        return None
    if (params["dim"], params["n_heads"], params.get("n_kv_heads")) == (8192, 64, 8):  # LLaMA-2 70B
        return 4096
    in_layers = sum(name.endswith(LAYER_FREQS.removeprefix("layers.{}")) for name in names)
    if in_layers and in_layers == params["n_layers"]:  # LLaMA-1
        return 2048
    return 4096 if MODEL_FREQS in names else None  # LLaMA-2


def llama3_scaling(dim: int) -> dict:
    """use_scaled_rope as a rope_scaling of Hugging Face's. params.json does not hold the factor. It is 8 in LLaMA 3.1
    and 3.3, and 32 in 3.2's 1B and 3B, which their widths tell: no other model that has the flag is as narrow."""
    numbers = {"factor": 32.0 if dim in (2048, 3072) else 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_type": "llama3", **numbers, "original_max_position_embeddings": 8192}


def hf_to_meta(config: dict) -> dict:
    """Meta's params.json; UserError for what it cannot say. max_seq_len, a key of our own, is added where neither the
    settings nor the frequencies that `write_meta` adds determine the training length."""
    dim, width, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    scaled = config["rope_scaling"] == llama3_scaling(dim)
    unsaid = {"rope_scaling": config["rope_scaling"] and not scaled, "sliding_window": config.get("sliding_window")}
    unsaid["head_dim"] = config["head_dim"] * heads != dim
    for key, there in unsaid.items():
        if there:
            raise UserError(f"--layout meta: has no room for the model's {key}; --layout hf has")
    params = {
        "dim": dim,
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "multiple_of": width & -width,  # the largest power of 2 that divides it
    }
    if scaled:
        params["use_scaled_rope"] = True
    # Meta's code has the MLP's width from two thirds of 4 x dim, times a factor, rounded up to `multiple_of`.
    plain = 8 * dim // 3
    if math.ceil(plain / params["multiple_of"]) * params["multiple_of"] != width:
        params["ffn_dim_multiplier"] = (width + 0.5) / plain  # half more: Meta's code cuts the product down
    length = config.get("max_position_embeddings")
    if length is not None and meta_length(params, meta_freqs(config)) != length:
        params["max_seq_len"] = length
    return params


def meta_freqs(config: dict) -> list[str]:
    """The names under which Meta's files of a model of this training length hold frequencies. Its code computes them;
    they are written because they tell LLaMA-1 from LLaMA-2, and Meta's code takes no key of ours in params.json."""
    if config["rope_theta"] != 10000 or config["rope_scaling"]:
        return []
    layers = [LAYER_FREQS.format(i) for i in range(config["num_hidden_layers"])]
    return {2048: layers, 4096: [MODEL_FREQS]}.get(config.get("max_position_embeddings"), [])


def rename(name: str, names: dict[str, str]) -> str:
    """A tensor's name in the other layout, by META_NAMES or HF_NAMES; one that is not there stays as it is."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    i = found[1] if found else ""
    pattern = name.replace(f"layers.{i}.", "layers.{}.")
    return names[pattern].format(i) if pattern in names else name


def rotary_rows(w: Tensor, head_dim: int, to_hf: bool) -> Tensor:
    """wq or wk with its rows reordered: Meta turns the pairs (x_0, x_1), (x_2, x_3), ..., Hugging Face (x_0, x_{d/2}),
    (x_1, x_{d/2 + 1}), ..."""
    pairs = (head_dim // 2, 2) if to_hf else (2, head_dim // 2)
    return w.view(-1, *pairs, w.shape[1]).transpose(1, 2).reshape(w.shape)


def join_parts(parts: list[Tensor], name: str, hidden_size: int, head_dim: int) -> Tensor:
    """One whole matrix from its model-parallel slices, rows reordered where Meta rotates neighbouring pairs."""
    if parts[0].dim() == 1 or len(parts) == 1:  # norms are replicated
        w = parts[0]
    else:  # wo and w2 are cut along their input; embeddings too, but by rows since LLaMA-3
        by_input = name.endswith(("wo.weight", "w2.weight")) or parts[0].shape[1] * len(parts) == hidden_size
        w = torch.cat(parts, 1 if by_input else 0)
    if name.endswith(("wq.weight", "wk.weight")):
        w = rotary_rows(w, head_dim, to_hf=True)
    return w


def write_meta(path: Path, ckpt: Checkpoint, shapes: dict[str, Tensor]) -> None:
    """One part, the inverse of `open_meta`. Tied embeddings are written twice, as Meta's code asks."""
    params = hf_to_meta(ckpt.config)
    head_dim = ckpt.config["head_dim"]
    sources = {rename(name, HF_NAMES): name for name in shapes}
    sources.setdefault("output.weight", "model.embed_tokens.weight")

    def get(name: str) -> Tensor:
        w = ckpt[sources[name]]
        return rotary_rows(w, head_dim, to_hf=False) if name.endswith(("wq.weight", "wk.weight")) else w

    tensors = {name: (shapes[source], functools.partial(get, name)) for name, source in sources.items()}
    freqs = ckpt.config["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    freqs = freqs.to(shapes["model.norm.weight"].dtype)
    tensors.update({name: (freqs.to("meta"), freqs.clone) for name in meta_freqs(ckpt.config)})
    path.mkdir()
    part = Checkpoint(None, {}, tensors)
    write_torch(path / "consolidated.00.pth", part, part.shapes)
    (path / "params.json").write_text(json.dumps(params) + "\n")
    write_beside(path, ckpt)
