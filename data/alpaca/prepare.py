"""Stanford Alpaca (Taori et al. 2023) as tokens: what the paper fine-tunes on (section 4, "Training and evaluation").

    python data/alpaca/prepare.py --tokenizer llama-2-7b/ --out data/alpaca                 # downloads 52,002 records
    python data/alpaca/prepare.py --tokenizer llama-2-7b/ --json mine.json --out data/mine  # or takes yours
    python data/alpaca/prepare.py --tokenizer llama-2-7b/ --json mine.json --val held.json --out data/mine

A record is {"instruction": ..., "input": ... (may be empty or absent), "output": ...}. It becomes BOS, prompt, answer,
EOS, cut at --max_len tokens; prompt and answer are encoded as one string, as the Alpaca trainers do. The two prompts
are Alpaca's, with the line break after "### Response:" of the Alpaca-LoRA trainer that the authors' code grew from
(Stanford's own has none).

A record may also be a conversation: {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...},
...]} as ShareGPT has it, or {"messages": [{"role": "user", "content": ...}, ...]}. Each of its exchanges becomes an
example, whose prompt holds the earlier ones, so that each answer is an answer once and a question never. A system
message takes the place of Alpaca's first sentences. A later exchange whose prompt leaves no room for its answer is left
out, and so is a last question that has no answer. A file may be one JSON list of records, or have a record on each
line.

`train.py` reads the folder:

    train.npy, val.npy                    all tokens end to end, uint16 (uint32 above 65,536 words)
    train.offsets.npy, val.offsets.npy    int64 (N + 1,): example i is tokens[offsets[i]:offsets[i + 1]]
    train.prompt.npy, val.prompt.npy      int32 (N,): how many of its first tokens are prompt, BOS included
    meta.json                             tokenizer, source, counts; written last: with it the folder is whole
"""

import codecs
import http.client
import itertools
import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.checkpoint import (  # noqa: E402
    VERSION,
    UserError,
    check_out,
    digest,
    lock,
    parse_json,
    parse_json_lines,
    read_bytes,
    save_npy,
    write_json,
)
from data.tokenizer import Tokenizer, encode_all, load_tokenizer  # noqa: E402
from model import Parser, cli, number  # noqa: E402

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def prompt(record: dict) -> str:
    """What stands before the answer."""
    return (WITH_INPUT if record.get("input") else WITHOUT_INPUT).format(**record)


# (the key of a conversation, that of a turn's speaker, that of its text), and the speakers as ShareGPT names them
CONVERSATIONS = (("conversations", "from", "value"), ("messages", "role", "content"))
SPEAKERS = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
    "developer": "system",
}

# What other programs' records may hold that would change what is learned: refused where it is not empty
NOT_READ = ("history", "system", "system_prompt", "tools", "functions", "context", "kto_tag", "chosen", "rejected")
NOT_READ += ("weight", "image", "images", "video", "videos", "audio", "audios")
NOT_READ_OF_A_TURN = ("tool_calls", "function_call", "reasoning_content", "thinking", "images")

Example = tuple[str, str]  # prompt, answer
Encoded = tuple[list[int], int]  # an example's tokens, and how many of them are prompt


def string(record: dict, key: str, where: str) -> str:
    """record[key], checked to be text that a tokenizer takes."""
    if not isinstance(record.get(key), str):
        found = type(record[key]).__name__ if key in record else "missing"
        raise UserError(f"{where}: `{key}` is {found}, expected a string")
    parse_json(json.dumps(record[key]), f"{where}: `{key}`")
    return record[key]


def text_of(turn: dict, key: str, where: str) -> str:
    """A turn's text, which may come in parts: [{"type": "text", "text": ...}, ...]."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return string(turn, key, where)
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise UserError(f"{where}: `{key}` has a part that is no text; only text can be learned")
    return "".join(string(part, "text", where) for part in parts)


def conversation_of(record: dict, where: str) -> str | None:
    """The key of a record's conversation, None where it has none. What is null or empty counts as not there."""
    listed = [name for name, _, _ in CONVERSATIONS if record.get(name) not in (None, [])]
    if len(listed) > 1 or (listed and record.get("instruction")):
        raise UserError(f"{where}: holds `{listed[0]}` and another text to learn; expected one of them")
    if not listed and record.get("instruction") is None:
        listed = [name for name, _, _ in CONVERSATIONS if name in record]
    return listed[0] if listed else None


def turns_of(record: dict, listed: str, where: str) -> list[tuple[str, str]]:
    """A conversation as (speaker, text): a system message or none, then human, gpt, human, gpt, ... No turns at all
    where there is no exchange."""
    _, by, text = next(keys for keys in CONVERSATIONS if keys[0] == listed)
    turns = record[listed] or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: `{listed}` is not a list of objects")
    if turns and "role" in turns[0]:  # today's names of the keys, under either name of the list
        _, by, text = CONVERSATIONS[1]
    for k, turn in enumerate(turns):
        unread = [key for key in NOT_READ_OF_A_TURN if turn.get(key)]
        # 1: JSON's true is equal to it
        unread += [key for key in ("weight", "train", "loss") if turn.get(key) not in (None, 1)]
        if unread:
            raise UserError(f"{where}: turn {k} has a `{unread[0]}`, which is not read; leave such records out")
    places = [f"{where}: turn {k}" for k in range(len(turns))]
    if turns and SPEAKERS.get(str(turns[0].get(by))) == "system" and not str(turns[0].get(text) or "").strip():
        turns = [{**turns[0], text: ""}, *turns[1:]]  # a template's empty system message, null too, says nothing
    turns = [(string(turn, by, at), text_of(turn, text, at)) for turn, at in zip(turns, places, strict=True)]
    first = 1 if turns and SPEAKERS.get(turns[0][0]) == "system" else 0
    for k, (speaker, _) in enumerate(turns[first:]):
        expected = ("human", "gpt")[k % 2]
        if SPEAKERS.get(speaker) != expected:
            raise UserError(f"{places[first + k]} is by {speaker!r:.40}, expected {expected}")
    return turns if len(turns) > first else []


def exchanges(turns: list[tuple[str, str]]) -> list[Example]:
    """The examples of a conversation: each answer, its prompt all that was said before it."""
    before = WITHOUT_INPUT.partition("### Instruction")[0]
    if SPEAKERS[turns[0][0]] == "system":
        if turns[0][1].strip():
            before = f"{turns[0][1].strip()}\n\n"
        turns = turns[1:]
    examples = []
    for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=False):  # a last question may have no answer
        before += f"### Instruction:\n{question}\n\n### Response:\n"
        examples.append((before, answer))
        before += f"{answer}\n\n"
    return examples


def download() -> bytes:
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"{URL}: cannot be downloaded ({e}); fetch it elsewhere and give it as --json FILE") from None


def parse(data: bytes, name: str, skip_empty: bool) -> list[list[Example]]:
    """The examples of each record of a file: one, or of a conversation one for each exchange. UserError names the first
    bad record by its index."""
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        records = [record for _, record in parse_json_lines(data, name, surrogates=True)]
    else:
        records = parse_json(data, name, list, surrogates=True)
    kept, unanswered = [], 0
    for i, record in enumerate(records):
        where = f"{name}: record {i}"
        if not isinstance(record, dict):
            raise UserError(f"{where} is a {type(record).__name__}, expected an object")
        unread = [key for key in NOT_READ if record.get(key) not in (None, "", [], "[]")]
        if unread:
            raise UserError(
                f"{where}: holds a `{unread[0]}`, which is not read; expected instruction, input and output, "
                "or a conversation with its system message as the first turn"
            )
        listed = conversation_of(record, where)
        if listed:
            turns = turns_of(record, listed, where)
            examples = exchanges(turns) if turns else []
            said = [(f"turn {k}", text) for k, (by, text) in enumerate(turns) if SPEAKERS[by] != "system"]
            empty = next((turn for turn, text in said if not text.strip()), None)
            if not examples:
                empty = empty or ("answer" if turns else listed)
            unanswered += not empty and SPEAKERS[turns[-1][0]] == "human"
        else:
            record = {**record, "input": "" if record.get("input") is None else record["input"]}
            for key in ("instruction", "input", "output"):
                string(record, key, where)
            examples = [(prompt(record), record["output"])]
            empty = next((key for key in ("instruction", "output") if not record[key].strip()), None)
        if empty and not skip_empty:
            raise UserError(f"{where}: `{empty}` is empty; fix it, or skip such records with --skip_empty")
        if not empty:
            kept.append(examples)
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} of {len(records)} records have an empty instruction or output: left out")
    if unanswered:
        print(f"{unanswered} conversations end with a question, which is left out")
    return kept


def read_tokenizer(source: str) -> Tokenizer:
    """A tokenizer that can begin and end an example: UserError where it has no BOS or no EOS."""
    tokenizer = load_tokenizer(source)
    if tokenizer.bos is None or not tokenizer.eos:
        raise UserError(f"--tokenizer {source}: has no BOS or no EOS token, which every example needs")
    return tokenizer


def encode(records: list[list[Example]], tokenizer: Tokenizer, max_len: int) -> list[list[Encoded]]:
    """The examples of each record, encoded."""
    firsts = [k == 0 for record in records for k in range(len(record))]
    prompts = encode_all(tokenizer, [p for record in records for p, _ in record], "prompts")
    wholes = encode_all(tokenizer, [p + answer for record in records for p, answer in record], "examples")
    encoded = []
    for first, p, whole in zip(firsts, prompts, wholes, strict=True):
        if first:
            encoded.append([])
        # A piece that spans the end of the prompt and the start of the answer counts as answer.
        shared = 0
        while shared < min(len(p), len(whole)) and p[shared] == whole[shared]:
            shared += 1
        tokens = [tokenizer.bos, *whole, tokenizer.eos[0]][:max_len]
        if first or 1 + shared < len(tokens):  # a later exchange without its answer would repeat the earlier ones
            encoded[-1].append((tokens, min(1 + shared, len(tokens))))
    return encoded


def drop_known(records: list[list[Encoded]], others: list[list[Encoded]], what: str) -> list[list[Encoded]]:
    """The records that share no example with the others: a validation loss on what was trained on is none. Tokens are
    compared, since records that differ only at their ends are the same once they are cut. what: says which records were
    left out."""
    known = {tuple(tokens) for record in others for tokens, _ in record}
    kept = [record for record in records if known.isdisjoint(tuple(tokens) for tokens, _ in record)]
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} of {len(records)} {what}: left out")
    return kept


SUFFIXES = ("", ".offsets", ".prompt")


def check_folder(out: str, more: tuple[str, ...] = ()) -> Path:
    """Refuses an --out that could not be written later, or that holds someone else's files under our names; more: those
    of another prepare.py beside the folder's own."""
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {out}: is a file, expected a folder")
    names = [f"{split}{suffix}.npy" for split in ("train", "val") for suffix in SUFFIXES]
    names = ["meta.json", ".tmp", *names, *more]
    theirs = [name for name in names if (path / name).exists()]
    if theirs and not (path / ".lock").exists():  # which every prepare.py leaves, however it ended
        raise UserError(f"--out {out}: holds a {theirs[0]} that no prepare.py of this version wrote")
    check_out(path / "meta.json")
    return path


def write_folder(out: Path, splits: dict[str, list[Encoded]], tokenizer: Tokenizer, meta: dict) -> None:
    """Writes {"train": examples, "val": examples}, as the folder shown above.

    Everything goes to a temporary folder inside `out` first and is renamed at the end, the old meta.json removed before
    and the new one put in last: a run that is killed leaves the old folder, or one without meta.json.
    """
    held = lock(out)  # noqa: F841  until this function returns
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    meta = {"version": VERSION, "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, **meta}
    tmp = out / ".tmp"
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # a killed run's
        tmp.mkdir()
        for split, examples in splits.items():
            meta[split] = len(examples)
            tokens = [t for tokens, _ in examples for t in tokens]
            save_npy(np.array(tokens, dtype), tmp / f"{split}.npy")
            lengths = [len(tokens) for tokens, _ in examples]
            save_npy(np.cumsum([0, *lengths], dtype=np.int64), tmp / f"{split}.offsets.npy")
            save_npy(np.array([n for _, n in examples], np.int32), tmp / f"{split}.prompt.npy")
        write_json(tmp / "meta.json", meta)
        (out / "meta.json").unlink(missing_ok=True)
        for file in sorted(tmp.iterdir(), key=lambda f: f.name == "meta.json"):
            with open(file, "rb") as f:
                os.fsync(f.fileno())
            os.replace(file, out / file.name)
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror or e}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def count_or_file(text: str) -> int | str:
    """What --val takes; a file whose name is a number can be given as ./7."""
    return number(int, 1)(text) if text.lstrip("+-").isdigit() else text


def main() -> None:
    parser = Parser(description="Turn Alpaca-format instructions into tokens for train.py.")
    add = parser.add_argument
    add("--tokenizer", required=True, help="tokenizer.model or tokenizer.json, a directory that holds it, or our .pt")
    add("--json", help="records of instruction / input / output; Stanford's is downloaded without it")
    add("--val", type=count_or_file, default=2000, help="records held out for the validation loss, or a file of them")
    add("--max_len", type=number(int, 2), default=512, help="tokens after which an example is cut")
    add("--seed", type=number(int, 0), default=0, help="of the shuffle that chooses the held-out examples")
    add("--skip_empty", action="store_true", help="leave out empty records (always done for Stanford's)")
    add("--out", required=True, help="folder to write, such as data/alpaca")
    args = parser.parse_args()

    out = check_folder(args.out)
    tokenizer = read_tokenizer(args.tokenizer)
    data = read_bytes(args.json) if args.json else download()
    records = parse(data, args.json or URL, skip_empty=args.skip_empty or not args.json)
    meta = {"max_len": args.max_len, "source": args.json or URL, "source_digest": digest(data), "seed": args.seed}
    order = np.random.default_rng(args.seed).permutation(len(records))
    records = [records[i] for i in order]
    if isinstance(args.val, str):
        data = read_bytes(args.val)
        held_out = parse(data, args.val, args.skip_empty)
        meta.update(val_source=args.val, val_digest=digest(data))
        if not held_out:
            raise UserError(f"--val {args.val}: holds no records")
    elif len(records) < args.val + 1:
        helps = (
            f"a smaller --val, such as {len(records) // 10}, or more records" if len(records) > 9 else "more records"
        )
        raise UserError(
            f"{args.json or URL}: holds {len(records)} records, no more than the {args.val} that --val holds out; "
            f"give {helps}"
        )
    else:
        held_out, records = records[: args.val], records[args.val :]
    train, val = (encode(part, tokenizer, args.max_len) for part in (records, held_out))
    lost = sum(map(len, records + held_out)) - sum(map(len, train + val))
    if isinstance(args.val, str):
        train = drop_known(train, val, "records to train on are held out too")
    else:
        val = drop_known(val, train, "held-out records are trained on too")
    if not train:
        raise UserError(f"{args.json or URL}: has no record that is not held out, and so none to train on")
    splits = {"train": [*itertools.chain(*train)], "val": [*itertools.chain(*val)]}
    write_folder(out, splits, tokenizer, meta)
    examples = splits["train"] + splits["val"]
    tokens = sum(len(t) for t, _ in splits["train"])
    cut = sum(t[-1] != tokenizer.eos[0] for t, _ in examples)
    print(
        f"wrote {out}: {len(splits['train'])} examples to train on ({tokens:,} tokens), {len(splits['val'])} held out"
    )
    print(f"{cut} of {len(examples)} were longer than {args.max_len} tokens and are cut")
    if unanswered := sum(n_prompt == len(t) for t, n_prompt in examples):
        print(f"warning: {unanswered} of these keep no token of their answer; a larger --max_len would")
    if lost:
        print(f"{lost} more were later exchanges whose prompts alone are as long: left out")


if __name__ == "__main__":
    cli(main)
