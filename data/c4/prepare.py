"""C4 as calibration windows: what Wanda and SparseGPT look at while they prune (128 x 2,048 tokens in the paper).

    python data/c4/prepare.py --tokenizer llama-7b/ --out data/c4/calib.npy                      # downloads one shard
    python data/c4/prepare.py --tokenizer llama-7b/ --json c4.json.gz --out data/c4/calib.npy    # or takes a file

--json: lines of {"text": ...}, plain or gzipped. As the official codes do: a document is picked at random, with
replacement, until its tokens (BOS first) are more than seqlen; then one window of seqlen tokens at a random start is
taken. Documents are never joined. Writes int32 (nsamples, seqlen).
"""

import gzip
import http.client
import io
import sys
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.checkpoint import UserError, atomic, check_out, checked_file, parse_json, save_npy  # noqa: E402
from data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from model import Parser, cli, number  # noqa: E402

# bytes of a line, lines of a file, bytes of it unpacked: a shard of C4 has 356,317 lines, less than 1 GB
LONGEST, MOST, LARGEST = 2**26, 2**24, 2**33

URL = "https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz"


def read_documents(source: str | None) -> list[bytes]:
    """The texts of a .jsonl or .json.gz file, or of C4's first shard, each packed by zlib: as Python strings, most
    would take two bytes a character."""
    name = source or URL
    documents, total = [], 0
    try:
        stream = open(checked_file(source), "rb") if source else urllib.request.urlopen(URL, timeout=60)  # noqa: SIM115
        with stream, io.BufferedReader(stream) as buffered:
            unpacked = gzip.GzipFile(fileobj=buffered) if buffered.peek(2)[:2] == b"\x1f\x8b" else buffered
            # A line at a time, and none without end: a small gzip file can hold gigabytes.
            for i, line in enumerate(iter(lambda: unpacked.readline(LONGEST), b""), 1):
                where = f"{name}: line {i}"
                total += len(line)
                if len(line) == LONGEST or i > MOST or total > LARGEST:
                    limits = f"{LONGEST:,} bytes in a line, {MOST:,} lines, or {LARGEST:,} bytes in all"
                    raise UserError(f"{where}: more than {limits}; give a part of the file")
                if not line.strip():
                    continue
                text = parse_json(line, where, dict).get("text")
                if not isinstance(text, str):
                    raise UserError(f'{where} has no string "text"')
                documents.append(zlib.compress(text.encode(), 1))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{name}: is a truncated or damaged gzip file") from None
    except (OSError, http.client.HTTPException) as e:
        hint = "" if source else "; fetch it elsewhere and give it as --json FILE"
        raise UserError(f"{name}: cannot be read: {e}{hint}") from None
    if not documents:
        raise UserError(f"{name}: holds no document")
    return documents


def sample(
    documents: list[bytes], tokenizer: Tokenizer, nsamples: int, seqlen: int, seed: int
) -> tuple[np.ndarray, int]:
    """Windows (nsamples, seqlen), int32, and from how many documents they come."""
    rng = np.random.default_rng(seed)
    tokens = {}  # document -> its tokens, None where it is too short
    windows, used = [], set()
    bar = tqdm(total=nsamples, desc="sampling", unit="window", disable=None)
    while len(windows) < nsamples:
        i = int(rng.integers(len(documents)))
        if i not in tokens:
            ids = [tokenizer.bos, *tokenizer.encode(zlib.decompress(documents[i]).decode())]
            tokens[i] = ids if len(ids) > seqlen else None
            if len(tokens) == len(documents) and not any(tokens.values()):
                raise UserError(f"none of the {len(documents)} documents has more than --seqlen {seqlen} tokens")
        if tokens[i]:
            start = int(rng.integers(len(tokens[i]) - seqlen))
            windows.append(tokens[i][start : start + seqlen])
            used.add(i)
            bar.update()
    return np.array(windows, dtype=np.int32), len(used)


def main() -> None:
    parser = Parser(description="Make calibration windows from C4 or a file like it.")
    add = parser.add_argument
    add("--tokenizer", required=True, help="tokenizer.model or tokenizer.json, a directory that holds it, or our .pt")
    add("--json", help="lines of {'text': ...}, .jsonl or .json.gz; by default C4's first shard")
    add("--nsamples", type=number(int, 1), default=128, help="windows")
    add("--seqlen", type=number(int, 1), default=2048, help="tokens in a window")
    add("--seed", type=number(int, 0), default=0, help="of the choice")
    add("--out", required=True, help="the .npy file to write")
    args = parser.parse_args()
    if not args.out.endswith(".npy"):
        raise UserError(f"--out {args.out}: must end in .npy")
    check_out(args.out, inputs=[args.json] if args.json else [])
    tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer.bos is None:
        raise UserError(f"--tokenizer {args.tokenizer}: has no BOS token, which every document begins with")
    documents = read_documents(args.json)
    windows, used = sample(documents, tokenizer, args.nsamples, args.seqlen, args.seed)
    with atomic(args.out) as tmp:
        save_npy(windows, tmp)
    print(
        f"wrote {args.out}: {args.nsamples} windows of {args.seqlen} tokens, from {used} of {len(documents)} documents"
    )


if __name__ == "__main__":
    cli(main)
