"""Text to token ids and back: LLaMA's and LLaMA-2's sentencepiece, and the byte-level BPE of LLaMA-3 and SmolLM2.

    tokenizer = load_tokenizer("SmolLM2-135M/")  # or tokenizer.model, tokenizer.json, a .pt of ours, a file's bytes
    ids = tokenizer.encode("Hello world")        # without BOS and EOS: these are tokenizer.bos and tokenizer.eos
    text = tokenizer.decode(ids)

Byte-level BPE. Text is UTF-8 bytes, every byte is a token, and neighbours merge: of all neighbouring pairs that are in
the list of merges, the one that stands first there (its rank; the leftmost of equals) becomes one token, until no pair
is in the list. With the merges 0: l o, 1: e r, 2: lo w,

    l o w e r  ->  lo w e r  ->  lo w er  ->  low er

No text is beyond it, for bytes are tokens themselves. Before any merge, regular expressions cut the text into words,
and no merge reaches over a cut: that keeps the work local, and lets a cache answer for most words. tokenizer.json
writes each byte as one printable character (a space is "Ġ"; see BYTE_CHARS). Meta's tiktoken file lists tokens without
merges: any two neighbours merge whose union is a token, and the token's id is the rank. A sentencepiece model that came
as a tokenizer.json alone is read too: merges of characters (CharBPE).

Ids are those of sentencepiece, of `tokenizers` 0.23 and of tiktoken 0.14 under every Python (tests/test_tokenizer.py).
Known differences: transformers 5 drops the first space of a text, which sentencepiece and we keep; Meta's own code cuts
runs of more than 25,000 characters. As in `tokenizers`, a byte that tokenizer.json has no token for (in SmolLM2 some
control characters) leaves no trace. A setting that would change ids and is not known here is refused by name.
"""

import base64
import functools
import heapq
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from data.checkpoint import UserError, brief, digest, is_json, open_checkpoint, parse_json, read_bytes

# The files beside the principal one: those that say which tokens are special, and what is not read here. BOS and EOS
# are what the first of STATES that states them says; "itself" is the principal file.
SIBLINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SIBLINGS += ("generation_config.json", "config.json", "chat_template.jinja", "chat_template.json")
STATES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "config.json", "itself")


def load_tokenizer(source: str | Path | bytes, files: Mapping[str, bytes] | None = None) -> "SentencePiece | BPE":
    """A tokenizer from a file, a directory (tokenizer.model, else tokenizer.json), a .pt of ours, or a file's bytes.

    files: name -> bytes of the SIBLINGS, where source is bytes; a path's are read from its folder. UserError, naming
    the file, where one cannot be read, is damaged, contradicts another, or has a setting that is not known here."""
    if isinstance(source, bytes):
        return from_bytes("the checkpoint's ", "tokenizer", source, files or {})
    path = Path(source)
    if path.suffix == ".pt":
        ckpt = open_checkpoint(path)
        if ckpt.tokenizer is None:
            raise UserError(f"{path}: holds no tokenizer")
        stated = {key: ckpt.config.get(key) for key in ("bos_token_id", "eos_token_id", "vocab_size")}
        files = {**ckpt.files, "config.json": json.dumps(stated, default=str).encode()}
        return from_bytes(f"{path}: its ", "tokenizer", ckpt.tokenizer, files)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).exists()]
        if not found:
            raise UserError(f"{path}: has no tokenizer.model and no tokenizer.json")
        path = found[0]
    data = read_bytes(path)
    files = {name: read_bytes(path.parent / name) for name in SIBLINGS if (path.parent / name).exists()}
    return from_bytes(f"{path.parent}/", path.name, data, files)


def from_bytes(place: str, name: str, data: bytes, files: Mapping[str, bytes]) -> "SentencePiece | BPE":
    """The tokenizer that the principal file's content asks for; errors call a file by place + its name."""
    where = place + name
    files = {n: files[n] for n in SIBLINGS if n in files and files[n] != data}  # not the principal one once more
    read = [n for n in files if not n.startswith("chat_template")]
    settings = {n: parse_json(files[n], place + n, dict, surrogates=True) for n in read}
    try:
        if name.endswith(".json") or is_json(data):
            parsed = settings["tokenizer.json"] = parse_json(data, where, dict)
            kind = CharBPE if flag(where, parsed["model"], "byte_fallback", False) else BPE
            tokenizer = kind(where, settings, *read_merges(where, parsed["model"]))
        elif re.match(rb"\S+ \d+\s*\n", data):
            vocab, ranks = read_tiktoken(where, data)
            settings = llama3_settings(len(vocab)) | settings
            tokenizer = BPE(where, settings, vocab, ranks, range(len(vocab)))
        else:
            tokenizer = SentencePiece(where, settings, data)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:  # JSON of another shape
        raise UserError(f"{where}: it or a file beside it is not laid out as expected: {e!r:.200}") from None
    tokenizer.data, tokenizer.files = data, files
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# what both kinds share: special tokens in text, and what a model's files say of BOS and EOS


class Tokenizer:
    """Text <-> ids. Subclasses add encode_text and decode_text, for text between special tokens, and `rules`, all else
    that determines ids.

    data: the principal file as it came; files: name -> bytes of the siblings used; vocab: token -> id of the model;
    special: id -> text of special and added tokens; vocab_size: the largest id + 1, added tokens that the model beside
    it has no embedding for (a `<pad>`) not counted; bos: its id or None; eos: the ids that end a text, first the one
    that training examples end with; fingerprint: a hash of all that determines ids."""

    def __init__(self, where: str, settings: dict[str, dict], vocab: dict[str, int]):
        """settings: file name -> content of the siblings; "itself": what the principal file says of special tokens."""
        self.vocab, self.texts = vocab, {id: text for text, id in vocab.items()}
        self.special, self.normalized = special_tokens(where, settings, vocab)
        self.ids = vocab | {text: id for id, text in self.special.items()}
        for id, text in self.special.items():
            if self.texts.get(id, text) != text or self.ids[text] != id or vocab.get(text, id) != id:
                raise UserError(f"{where}: ids collide: {text!r} is added as {id}, where the vocabulary has another")
        self.embedded = settings.get("config.json", {}).get("vocab_size") or math.inf  # how many ids the model knows
        if self.embedded != math.inf and (type(self.embedded) is not int or self.embedded < 1):
            raise UserError(f"{where}: config.json beside it has a vocab_size of {brief(self.embedded)}")
        self.vocab_size = 1 + max([*vocab.values(), *(id for id in self.special if id < self.embedded)])
        # the first is searched in the text as it is, the second in what is left, normalized
        self.special_patterns = [any_of(set(self.special.values()) - self.normalized), any_of(self.normalized)]

        self.bos = next(iter(self.stated(where, settings, "bos")), None)
        self.eos = tuple(self.stated(where, settings, "eos"))
        config = settings.get("tokenizer_config.json", {})
        # An instruct model states several; its training examples end with the one that the tokenizer calls its own.
        own = self.ids.get(token_text(config.get("eos_token")))
        if own in self.eos:
            self.eos = (own, *(id for id in self.eos if id != own))

    def stated(self, where: str, settings: dict[str, dict], key: str) -> list[int]:
        """The ids of key, "bos" or "eos", in the first file that names any."""
        for file, field in itertools.product(STATES, (f"{key}_token_id", f"{key}_token")):
            value = settings.get(file, {}).get(field)
            if value in (None, "", []):
                continue
            ids = value if isinstance(value, list) else [value]
            if field.endswith("_token"):
                ids = [self.ids.get(token_text(text)) for text in ids]
            if not all(type(id) is int and 0 <= id < self.vocab_size for id in ids):
                raise UserError(f"{where}: has no token {brief(value)}, which {file} beside it has as {field}")
            return ids
        return []

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest(self.rules(), sorted(self.special.items()))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of text, without BOS and EOS. special: whether "</s>" in the text is that token, or four characters.

        UserError where text has half of a surrogate pair, which JSON may hold and UTF-8 may not, or a special token
        without an embedding."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"text has half of a surrogate pair at character {e.start}: {text[e.start]!a}") from None
        ids = []
        for i, (part, is_token) in enumerate(self.cut_special(text) if special else [(self.normalize(text), False)]):
            if is_token:
                if self.ids[part] >= self.embedded:
                    raise UserError(f"text has {part!r}, token {self.ids[part]}; the model knows only {self.embedded}")
                ids.append(self.ids[part])
            elif part:
                ids += self.encode_text(part, first=i == 0)
        return ids

    def cut_special(self, text: str) -> list[tuple[str, bool]]:
        """Special tokens and the text between them, each with whether it is a token."""
        exact, normalized = self.special_patterns
        parts = []
        for i, part in enumerate(exact.split(text)):  # which returns text, token, text, token, ..., text
            if i % 2 == 1:
                parts.append((part, True))
            else:
                within = normalized.split(self.normalize(part))
                parts += [(p, j % 2 == 1) for j, p in enumerate(within) if p or len(within) == 1]
        return parts

    def normalize(self, text: str) -> str:
        """What comes before the cut into words; nothing, by default."""
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens as they are written; ids without a token leave no trace."""
        text, between, first = "", [], True
        for id in [*map(int, ids), None]:  # None: the end, where what is left between is decoded
            if id is not None and id not in self.special:
                between.append(id)
                continue
            text += self.decode_text(between, first) + self.special.get(id, "")
            between, first = [], False
        return text


def any_of(texts: Iterable[str]) -> re.Pattern:
    """An expression that finds the leftmost, longest of the texts, of which `re` takes the first that matches."""
    longest_first = sorted(map(re.escape, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(longest_first) or '(?!)'})")


def special_tokens(where: str, settings: dict[str, dict], vocab: dict[str, int]) -> tuple[dict[int, str], set[str]]:
    """id -> text of the tokens that the files list as special or added, or give a role, such as "unk_token"; and those
    texts that are looked for in normalized text."""
    listed, free = [], len(vocab)
    for file in ("itself", "tokenizer.json"):
        added = settings.get(file, {}).get("added_tokens", [])
        if not isinstance(added, list):
            raise UserError(f"{where}: its added_tokens are {brief(added)}, expected a list")
        listed += added
    numbered = len(listed)
    for id, token in (settings.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}).items():
        listed.append({"id": int(id), **token})
    for text, id in settings.get("added_tokens.json", {}).items():
        listed.append({"id": id, "content": text})
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for field, value in settings.get(file, {}).items():
            if field.endswith("_token") and token_text(value) in vocab:
                listed.append({"id": vocab[token_text(value)], "content": token_text(value)})
    special, normalized = {}, set()
    for i, token in enumerate(listed):
        id, text = token["id"], token["content"]
        if text == "":  # which is passed over
            continue
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise UserError(f"{where}: added token {text!r} has lstrip, rstrip or single_word, not known here")
        if type(id) is not int or not 0 <= id < ID_LIMIT or not text or special.get(id, text) != text:
            raise UserError(f"{where}: ids collide: added token {text!r} has id {id!r}, as has {special.get(id)!r}")
        if i < numbered and text not in vocab and id not in special:  # `tokenizers` numbers these itself
            if id != free:
                raise UserError(f"{where}: added token {text!r} has id {id}, expected {free}, the next that is free")
            free += 1
        if id not in special and flag(where, token, "normalized", False):
            normalized.add(text)
        special[id] = text
    return special, normalized


ID_LIMIT = 2**31  # ids are below it: tokens are stored in 32 bits


def flag(where: str, settings: dict, key: str, default: bool) -> bool:
    """A setting that is true or false; null is the default. UserError for anything else."""
    value = settings.get(key)
    if not isinstance(value, bool | None):
        raise UserError(f"{where}: {key} is {brief(value)}, expected true or false")
    return default if value is None else value


def token_text(value: Any) -> Any:
    """A token's text, which may stand as {"content": text, ...}; an id stays as it is."""
    return value["content"] if isinstance(value, dict) else value


def flatten(component: dict | None, children: str) -> list[dict]:
    """A component of tokenizer.json as a list: none, one, or those of (nested) Sequences."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [leaf for child in component[children] for leaf in flatten(child, children)]


# ----------------------------------------------------------------------------------------------------------------------
# sentencepiece


def check_prefix(where: str, settings: dict[str, dict]) -> None:
    """UserError where no space is to come before a text, which here one always does."""
    if settings.get("tokenizer_config.json", {}).get("add_prefix_space") is False:
        raise UserError(f"{where}: tokenizer_config.json says add_prefix_space false, which is not known here")


class SentencePiece(Tokenizer):
    """A tokenizer.model of LLaMA or LLaMA-2, run by the sentencepiece library between special tokens.

    sentencepiece puts a space before a text, so that a word is one token at the start and elsewhere. For a text after a
    special token transformers does that only where tokenizer_config.json says "legacy": true."""

    def __init__(self, where: str, settings: dict[str, dict], model: bytes):
        try:
            if not model:  # sentencepiece takes it for a model that is yet to be loaded
                raise RuntimeError
            self.spaced = SentencePieceProcessor(model_proto=model)
            # Once more, without the space: that is field 3 (0x18) of the normalizer's settings, themselves field 3
            # (0x1a) of the file; protobuf merges a second field 3 at the file's end into the first.
            self.plain = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
            pieces = [self.spaced.id_to_piece(id) for id in range(self.spaced.vocab_size())]
        except (RuntimeError, UnicodeDecodeError):  # the latter where a piece is damaged
            raise UserError(f"{where}: is not a sentencepiece model") from None
        check_prefix(where, settings)
        self.legacy = settings.get("tokenizer_config.json", {}).get("legacy") is True
        marks = [i for i in range(len(pieces)) if self.spaced.is_control(i) or self.spaced.is_unknown(i)]
        itself = {"added_tokens": [{"id": i, "content": pieces[i]} for i in marks]}
        for key, id in ("bos_token_id", self.spaced.bos_id()), ("eos_token_id", self.spaced.eos_id()):
            itself[key] = id if id >= 0 else None  # -1: it has none
        # The first LLaMA on the Hugging Face Hub, of which there are many copies, names <unk> as BOS and <s> as EOS.
        mistaken = [file for file, named in settings.items() if named.get("bos_token_id") == self.spaced.unk_id()]
        for file in mistaken:
            settings = {**settings, file: {**settings[file], "bos_token_id": None, "eos_token_id": None}}
        super().__init__(where, {"itself": itself} | settings, {piece: id for id, piece in enumerate(pieces)})

    def rules(self) -> list:
        """What determines ids besides the special tokens."""
        return [digest(self.data), self.legacy]

    def encode_text(self, text: str, first: bool) -> list[int]:
        return (self.spaced if first or self.legacy else self.plain).encode(text)

    def decode_text(self, ids: list[int], first: bool) -> str:
        return (self.spaced if first or self.legacy else self.plain).decode([id for id in ids if id in self.texts])


# ----------------------------------------------------------------------------------------------------------------------
# byte-level BPE

# How tokenizer.json writes a byte: as the character of that code where it is printable, else as one from "Ā" (256) on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNPRINTABLE = [b for b in range(256) if b not in PRINTABLE]
BYTE_CHARS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(UNPRINTABLE)}
CHAR_BYTES = {char: b for b, char in BYTE_CHARS.items()}

CACHED_WORDS, CACHED_LENGTH = 1 << 16, 32  # words, and the characters of the longest: 10 MB of English, 80 MB at worst


class BPE(Tokenizer):
    """Tokens by merges; see the top of this file. vocab: token, in BYTE_CHARS, -> id; ranks: pair of ids -> rank;
    merged: rank -> id of the union. The other settings are those of a tokenizer.json: `cuts`, the expressions that cut
    text into words, each within the words of the one before; `ignore_merges`: a word that is a token is that token,
    whatever merges make of it; `nfc`."""

    def __init__(self, where: str, settings: dict, vocab: dict[str, int], ranks: dict, merged: Sequence[int]):
        parsed = settings["tokenizer.json"]
        self.ranks, self.merged = ranks, merged
        self.ignore_merges = flag(where, parsed["model"], "ignore_merges", False)
        self.cache = {}
        super().__init__(where, settings, vocab)
        self.read_cutting(where, settings)

    def read_cutting(self, where: str, settings: dict[str, dict]) -> None:
        """Sets what `words` goes by, from tokenizer.json's normalizer and pre-tokenizer."""
        parsed = settings["tokenizer.json"]
        normalizers = flatten(parsed.get("normalizer"), "normalizers")
        self.nfc = normalizers == [{"type": "NFC"}]
        if normalizers and not self.nfc:
            raise UserError(f"{where}: its normalizer is {brief(normalizers)}, expected none or NFC")
        for token in self.normalized:
            if self.normalize(token) != token:
                raise UserError(f"{where}: added token {token!r} is normalized, and NFC changes it: not known here")
        self.cuts = read_cuts(where, flatten(parsed.get("pre_tokenizer"), "pretokenizers"))

    def rules(self) -> list:
        """What determines ids besides the special tokens."""
        pairs = [(*pair, rank, self.merged[rank]) for pair, rank in self.ranks.items()]
        cuts = [cut.pattern for cut in self.cuts]
        return [sorted(self.vocab.items()), sorted(pairs), cuts, self.ignore_merges, self.nfc]

    def encode_text(self, text: str, first: bool) -> list[int]:
        ids = []
        for word in self.words(text, first):
            word_ids = self.cache.get(word)
            if word_ids is None:
                word_ids = self.encode_word(word)
                if len(self.cache) == CACHED_WORDS:
                    self.cache.clear()
                if len(word) <= CACHED_LENGTH:
                    self.cache[word] = word_ids
            ids += word_ids
        return ids

    def words(self, text: str, first: bool) -> list[str]:
        """Cuts text. The expressions see in place of a character beyond ASCII one that stands for its class, so that
        they need not know Unicode; the words are then slices of text of the same lengths."""
        seen = text if text.isascii() else text.translate(class_table())
        words = [seen]
        for cut in self.cuts:
            words = [part for word in words for part in cut.split(word) if part]
        if seen is text:
            return words
        ends = [0, *itertools.accumulate(map(len, words))]
        return [text[start:end] for start, end in itertools.pairwise(ends)]

    def normalize(self, text: str) -> str:
        return compose(text) if self.nfc else text

    def encode_word(self, word: str) -> list[int]:
        """The ids of a word, from its bytes; one that has no token leaves its neighbours side by side."""
        spelled = word.encode().decode("latin-1").translate(BYTE_CHARS)
        if self.ignore_merges and spelled in self.vocab:
            return [self.vocab[spelled]]
        return self.merge([self.vocab[char] for char in spelled if char in self.vocab])

    def merge(self, ids: list[int]) -> list[int]:
        """Merges neighbours, lowest rank first and leftmost of equals, in O(n log n): a heap of (rank, position of the
        left one) over a list linked by `before` and `after`. A pair that lost a part to another merge stays in the
        heap, and is passed over when its turn comes."""
        n, ranks = len(ids), self.ranks
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))
        heap = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(ids)) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if j == n or ranks.get((ids[i], ids[j])) != rank:
                continue
            ids[i], ids[j] = self.merged[rank], -1  # -1: gone, and in no pair
            after[i] = after[j]
            if after[j] < n:
                before[after[j]] = i
            for left, right in (before[i], i), (i, after[i]):
                if left >= 0 and right < n and (ids[left], ids[right]) in ranks:
                    heapq.heappush(heap, (ranks[ids[left], ids[right]], left))
        return [id for id in ids if id >= 0]

    def decode_text(self, ids: list[int], first: bool) -> str:
        spelled = "".join(self.texts.get(id, "") for id in ids)
        return bytes(CHAR_BYTES[char] for char in spelled if char in CHAR_BYTES).decode(errors="replace")


BYTE_TOKENS = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}


class CharBPE(BPE):
    """A sentencepiece model as a tokenizer.json, for a directory without tokenizer.model: "▁" in place of spaces and
    before a text, merges of characters, and for a character without a token those of its bytes, such as "<0xE2>"."""

    def read_cutting(self, where: str, settings: dict[str, dict]) -> None:
        """Sets prepend: before which texts a "▁" comes; twice: before those that begin with one, too; and cuts."""
        parsed = settings["tokenizer.json"]
        steps = flatten(parsed.get("normalizer"), "normalizers")
        steps += flatten(parsed.get("pre_tokenizer"), "pretokenizers")
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        split, self.nfc = False, False
        match steps:
            case [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always" | "first" | "never" as prepend}]:
                self.prepend, self.twice, split = prepend, False, flag(where, steps[0], "split", True)
                if prepend != "never" and not flag(where, steps[0], "add_prefix_space", True):
                    raise UserError(f"{where}: its Metaspace has a prepend_scheme and no add_prefix_space")
            case [{"type": "Prepend", "prepend": "▁"}, replace] if replace == spaces:  # as it was until 2024
                self.prepend, self.twice = "always", True
            case _:
                raise UserError(f"{where}: has byte_fallback, and {brief(steps)}, which is not known here")
        check_prefix(where, settings)
        config = settings.get("tokenizer_config.json", {})
        if str(config.get("tokenizer_class")).startswith("LlamaTokenizer") and self.prepend == "always":
            # of which transformers takes no more than the vocabulary and the merges from tokenizer.json
            self.prepend, self.twice = "always" if config.get("legacy") is True else "first", False
            self.ignore_merges = False
        if self.twice and any(token.get("normalized") for token in parsed.get("added_tokens") or []):
            raise UserError(f"{where}: has an added token that is normalized, which is not known here")
        # Where no token has a space after another character, no merge reaches over a cut there, and the cache can work;
        # but what is one token without merges is a whole text.
        within = self.ignore_merges or any(re.search("[^▁]▁", self.texts[id]) for id in self.merged)
        pattern = "(▁[^▁]*)" if split else "(?!)" if within else "(▁+[^▁]*)"
        self.cuts = [re.compile(pattern)]

    def rules(self) -> list:
        return [*super().rules(), self.prepend, self.twice]

    def prepends(self, first: bool) -> bool:
        return self.prepend == "always" or (self.prepend == "first" and first)

    def words(self, text: str, first: bool) -> list[str]:
        text = text.replace(" ", "▁")
        if self.prepends(first) and (self.twice or not text.startswith("▁")):
            text = "▁" + text
        return [word for word in self.cuts[0].split(text) if word]

    def encode_word(self, word: str) -> list[int]:
        if self.ignore_merges and word in self.vocab:
            return [self.vocab[word]]
        ids = []
        for char in word:
            spelled = [char] if char in self.vocab else [f"<0x{b:02X}>" for b in char.encode()]
            if all(token in self.vocab for token in spelled):  # one without a token leaves no trace
                ids += [self.vocab[token] for token in spelled]
        return self.merge(ids)

    def decode_text(self, ids: list[int], first: bool) -> str:
        tokens = [self.texts.get(id, "") for id in ids]
        spelled = [BYTE_TOKENS.get(token, token.replace("▁", " ").encode()) for token in tokens]
        text = b"".join(spelled).decode(errors="replace")
        return text.removeprefix(" ") if self.prepends(first) else text


def read_merges(where: str, model: dict) -> tuple[dict[str, int], dict[tuple[int, int], int], list[int]]:
    """vocab, ranks and merged of BPE from the model of a tokenizer.json."""
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{where}: its model is {model['type']!r}, expected BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"{where}: its model has {key} {model[key]!r}, which is not known here")
    vocab, owners = model["vocab"], {}
    for token, id in vocab.items():
        if type(id) is not int or not 0 <= id < ID_LIMIT or id in owners:
            raise UserError(f"{where}: ids collide: {token!r} has id {id!r}, as has {owners.get(id)!r}")
        owners[id] = token
    needed = BYTE_TOKENS if model.get("byte_fallback") else CHAR_BYTES
    if model.get("unk_token") and not all(token in vocab for token in needed):
        raise UserError(f"{where}: has an unk_token and no tokens for some bytes, which is not known here")
    if not isinstance(model["merges"], list):
        raise UserError(f"{where}: its merges are {brief(model['merges'])}, expected a list")
    ranks, merged = {}, []
    for rank, merge in enumerate(model["merges"]):
        try:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            ranks[vocab[left], vocab[right]] = rank
            merged.append(vocab[left + right])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: merge {rank} is {merge!r}, expected two tokens whose union is one") from None
    return vocab, ranks, merged


GPT2_CUT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
LLAMA3_CUT += r"\s*[\r\n]+|\s+(?!\S)|\s+"


def read_cuts(where: str, steps: list[dict]) -> list[re.Pattern]:
    """The expressions of tokenizer.json's pre-tokenizers, of which the last is ByteLevel."""
    cuts = []
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        match step:
            case {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} if not last:
                cuts.append(compile_cut(where, cut))
            case {"type": "Digits", "individual_digits": bool(single)} if not last:
                cuts.append(re.compile("([0-9²³])" if single else "([0-9²³]+)"))  # see class_table
            case {"type": "ByteLevel", "add_prefix_space": False} if last:
                if flag(where, step, "use_regex", True):
                    cuts.append(compile_cut(where, GPT2_CUT))
            case _:
                raise UserError(f"{where}: its pre-tokenizer {brief(step)} is not known here, or not there")
    if not steps:
        raise UserError(f"{where}: has no pre-tokenizer, expected ByteLevel")
    return cuts


def read_tiktoken(where: str, data: bytes) -> tuple[dict[str, int], dict[tuple[int, int], int]]:
    """vocab and ranks of BPE from Meta's file: a line for each token, its bytes in base64 and its rank, from 0 on."""
    vocab = {}
    for rank, line in enumerate(line for line in data.splitlines() if line.strip()):
        try:
            token, stated = line.split()
            token = base64.b64decode(token, validate=True).decode("latin-1").translate(BYTE_CHARS)
            if not token or token in vocab or int(stated) != rank:
                raise ValueError
        except ValueError:
            found = f"line {rank + 1} is {line[:80]!r}"
            raise UserError(f"{where}: {found}, expected a new token in base64, and {rank}") from None
        vocab[token] = rank
    if not all(char in vocab for char in CHAR_BYTES):
        raise UserError(f"{where}: has no token for some bytes, expected one for each of the 256")
    ranks = {}
    for token, rank in vocab.items():
        for left, right in ((token[:i], token[i:]) for i in range(1, len(token))):
            if left in vocab and right in vocab:
                ranks[vocab[left], vocab[right]] = rank
    return vocab, ranks


def llama3_settings(n: int) -> dict[str, dict]:
    """What goes with Meta's file of n tokens and does not stand in it, as the files of a directory would say it."""
    names = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id step_id "
    names += "start_header_id end_header_id eom_id eot_id python_tag image"  # LLaMA-3.2's; 3.0 has fewer in use
    names = [*names.split(), *(f"reserved_special_token_{i}" for i in range(2, 246))]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_CUT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    tokenizer_json = {
        "model": {"ignore_merges": True},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "added_tokens": [{"id": n + i, "content": f"<|{name}|>"} for i, name in enumerate(names)],
    }
    ends = [n + names.index(name) for name in ("end_of_text", "eom_id", "eot_id")]
    return {"tokenizer.json": tokenizer_json, "itself": {"bos_token_id": n, "eos_token_id": ends}}


# ----------------------------------------------------------------------------------------------------------------------
# Unicode, the same under every Python

# What \p{L}, \p{N} of tokenizers and tiktoken match (Unicode 16) and unicodedata.category does not in Python 3.10 (13).
NEW_LETTERS = """
870-887 889-88e 8b5 8c8-8c9 c5d cdd 170d 171f 1b4c 1c89-1c8a 2c2f 2c5f 9ffd-9fff a7c0-a7c1 a7cb-a7cd a7d0-a7d1 a7d3
a7d5-a7dc a7f2-a7f4 10570-1057a 1057c-1058a 1058c-10592 10594-10595 10597-105a1 105a3-105b1 105b3-105b9 105bb-105bc
105c0-105f3 10780-10785 10787-107b0 107b2-107ba 10d4a-10d65 10d6f-10d85 10ec2-10ec4 10f70-10f81 11071-11072 11075
1123f-11240 11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 11740-11746 11ab0-11abf 11bc0-11be0 11f02 11f04-11f10
11f12-11f33 12f90-12ff0 1342f 13441-13446 13460-143fa 16100-1611d 16a70-16abe 16d40-16d6c 18cff 1aff0-1aff3 1aff5-1affb
1affd-1affe 1b11f-1b122 1b132 1b155 1df00-1df1e 1df25-1df2a 1e030-1e06d 1e290-1e2ad 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0
1e7e0-1e7e6 1e7e8-1e7eb 1e7ed-1e7ee 1e7f0-1e7fe 2a6de-2a6df 2b735-2b739 2ebf0-2ee5d 31350-323af"""
NEW_NUMBERS = """
10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16ac0-16ac9 16d70-16d79 1ccf0-1ccf9 1d2c0-1d2d3 1e4f0-1e4f9
1e5f1-1e5fa"""
DIGITS_ALONE = "11de0-11de9 16ff4-16ff6"  # numbers of Unicode 17: Digits has Rust's own table, which is newer
# Marks that NFC moves or composes, but not in tokenizers, whose table is that of Unicode 9.
NOT_COMPOSED = """
5c8-5c9 7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa a82c 105c9 105d2 105da 105e4 10d24-10d27
10d69-10d6d 10eab-10eac 10ecb-10ecf 10ef0-10efb 10efd-10eff 10f46-10f50 10f82-10f85 11070 1133b 11382-11385 1138b 1138e
11390-11391 113b8 113bb 113c2 113c5 113c7-113c9 113ce-113d0 1145e 1611e-16129 1612f 11839-1183a 11930 11935 11938
1193d-1193e 11943 119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 11f41-11f42 16d63 16d67-16d6a 16ff0-16ff1 1d127-1d128
1d250-1d252 1d25b-1d25c 1d25f 1d280-1d281 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3 1e6e6
1e6ee-1e6ef 1e6f5"""


def code_points(ranges: str) -> list[int]:
    """The code points of ranges as the tables above write them, in hex and with both ends."""
    ends = [[int(end, 16) for end in part.split("-")] for part in ranges.split()]
    return [point for end in ends for point in range(end[0], end[-1] + 1)]


@functools.cache
def class_table() -> str:
    """For str.translate: at each code point a character that stands for its class. ASCII and the two other letters that
    are s and k in lower case (a cut may ignore case) stay; "ª" is a letter, "²" a number, "³" one to Digits alone,
    U+00A0 a space, "¡" anything else."""
    table = [chr(c) for c in range(0x34000)]  # beyond are no letters, numbers and spaces
    for c in range(0x80, len(table)):
        table[c] = {"L": "ª", "N": "²"}.get(unicodedata.category(chr(c))[0], "\xa0" if chr(c).isspace() else "¡")
    for members, ranges in ("ª", NEW_LETTERS), ("²", NEW_NUMBERS), ("³", DIGITS_ALONE):
        for c in code_points(ranges):
            table[c] = members
    for c in (0x17F, 0x212A):
        table[c] = chr(c)
    return "".join(table) + "¡" * (sys.maxunicode + 1 - len(table))


# The members of a class among class_table's characters. \s of `re` would have U+001C to U+001F too.
CLASSES = {r"\p{L}": "a-zA-Zª\u017f\u212a", r"\p{N}": "0-9²", r"\s": "\t-\r \xa0", r"\S": "^\t-\r \xa0"}
# What an expression may consist of: sets, classes, groups, plain quantifiers, characters. All mean the same to `re`.
CUT_PART = (
    r"\[\^?(?:\\p\{[LN]\}|\\[srnt]|[\w '.,;:!?/<>=@#%_-])+\]|\\p\{[LN]\}|\\[sSrnt]|\(\?(?:i?:|!|=)|\)|\|"
    r"|(?:[?*+]|\{\d+(?:,\d*)?\})(?![?*+{])|[\w ',;:!<>=/@#%_-]"
)


def compile_cut(where: str, expression: str) -> re.Pattern:
    r"""An expression of a Split for Python's `re`, which has no \p, over text of class_table's characters."""
    translated = ""
    if not re.fullmatch(f"(?:{CUT_PART})+", expression, re.ASCII):
        raise UserError(f"{where}: its pre-tokenizer's expression {expression!r} has parts that are not known here")
    for part in re.findall(CUT_PART, expression, re.ASCII):
        for name, members in CLASSES.items():
            part = part.replace(name, members if part[0] == "[" else f"[{members}]")
        translated += part
    try:
        re.compile(translated)  # by itself: a parenthesis too many would close the group
        return re.compile(f"({translated})")
    except (re.error, OverflowError) as e:  # the latter: of a repetition
        raise UserError(f"{where}: its pre-tokenizer's expression {expression!r} is broken: {e}") from None


UNMOVED = re.compile(f"([{''.join(map(chr, code_points(NOT_COMPOSED)))}])")


def compose(text: str) -> str:
    """NFC as tokenizers has it."""
    parts = UNMOVED.split(text)
    return "".join(unicodedata.normalize("NFC", part) for part in parts)


# ----------------------------------------------------------------------------------------------------------------------
# many texts

POOL_FROM = 10_000_000  # characters: some five seconds on one core


def encode_all(tokenizer: Tokenizer, texts: Sequence[str], name: str) -> list[list[int]]:
    """[tokenizer.encode(text) for text in texts], on all cores where that pays, with a bar called name."""
    bar = functools.partial(tqdm, total=len(texts), desc=name, unit=" texts", disable=None)
    if cores() == 1 or sum(map(len, texts)) < POOL_FROM:
        return [tokenizer.encode(text) for text in bar(texts)]
    # A fork has the tokenizer at once; elsewhere than on Linux it is not safe, and each worker starts Python anew.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(cores(), context, start_worker, (tokenizer,))
    try:
        return list(bar(pool.map(encode_one, texts, chunksize=64)))
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_worker(tokenizer: Tokenizer) -> None:
    """Keeps the tokenizer for encode_one, and leaves when the parent is gone, even if that was killed."""

    def leave() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    encode_one.tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=leave, daemon=True).start()


def encode_one(text: str) -> list[int]:
    return encode_one.tokenizer.encode(text)
