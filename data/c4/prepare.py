"""C4 as calibration windows: what Wanda and SparseGPT look at while they prune (128 x 2,048 tokens in the paper).

    python data/c4/prepare.py --tokenizer llama-7b/ --out data/c4/calib.npy                      # downloads one shard
    python data/c4/prepare.py --tokenizer llama-7b/ --json c4.json.gz --out data/c4/calib.npy    # or takes a file

--json: lines of {"text": ...}, plain or gzipped. As the official codes do: a document is picked at random, with
replacement, until its tokens (BOS first) are more than seqlen; then one window of seqlen tokens at a random start is
taken. Documents are never joined. Writes int32 (nsamples, seqlen).
"""

import gzip
import io
import json
import sys
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import Parser, UserError, atomic, check_out, cli, load_tokenizer, number  # noqa: E402

URL = "https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz"


def read_documents(source: str | None) -> list[str]:
    """The texts of a .jsonl or .json.gz file, or of C4's first shard."""
    name = source or URL
    try:
        if source:
            data = Path(source).read_bytes()
        else:
            with urllib.request.urlopen(URL, timeout=60) as response:
                data = response.read()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{name}: is a truncated or damaged gzip file") from None
    except OSError as e:
        hint = "" if source else "; fetch it elsewhere and give it as --json FILE"
        raise UserError(f"{name}: cannot be read: {e}{hint}") from None
    documents = []
    for i, line in enumerate(io.BytesIO(data), 1):
        try:
            documents.append(json.loads(line)["text"])
            documents[-1].encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{name}: line {i} is not a JSON object with a string "text"') from None
    if not documents:
        raise UserError(f"{name}: holds no document")
    return documents


def sample(
    documents: list[str], tokenizer: SentencePieceProcessor, nsamples: int, seqlen: int, seed: int
) -> np.ndarray:
    rng, tokens, long = np.random.default_rng(seed), {}, []
    bar = tqdm(total=nsamples, desc="sampling", unit="window", disable=None)
    while len(long) < nsamples:
        i = int(rng.integers(len(documents)))
        if i not in tokens:
            ids = [tokenizer.bos_id(), *tokenizer.encode(documents[i])]
            tokens[i] = ids if len(ids) > seqlen else None
            if len(tokens) == len(documents) and not any(tokens.values()):
                raise UserError(f"none of the {len(documents)} documents has more than --seqlen {seqlen} tokens")
        if tokens[i]:
            start = int(rng.integers(len(tokens[i]) - seqlen))
            long.append(tokens[i][start : start + seqlen])
            bar.update()
    return np.array(long, dtype=np.int32)


def main() -> None:
    parser = Parser(description="Make calibration windows from C4 or a file like it.")
    add = parser.add_argument
    add("--tokenizer", required=True, help="tokenizer.model, a directory that holds it, or a .pt of ours")
    add("--json", help="lines of {'text': ...}, .jsonl or .json.gz; by default C4's first shard")
    add("--nsamples", type=number(int, 1), default=128, help="windows")
    add("--seqlen", type=number(int, 1), default=2048, help="tokens in a window")
    add("--seed", type=number(int, 0), default=0, help="of the choice")
    add("--out", required=True, help="the .npy file to write")
    args = parser.parse_args()
    if not args.out.endswith(".npy"):
        raise UserError(f"--out {args.out}: must end in .npy")
    check_out(args.out)
    tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer.bos_id() < 0:
        raise UserError(f"--tokenizer {args.tokenizer}: has no BOS token, which every document begins with")
    windows = sample(read_documents(args.json), tokenizer, args.nsamples, args.seqlen, args.seed)
    with atomic(args.out) as tmp, open(tmp, "wb") as f:
        np.save(f, windows)
    print(f"wrote {args.out}: {args.nsamples} windows of {args.seqlen} tokens")


if __name__ == "__main__":
    cli(main)
