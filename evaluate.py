"""What it cost: accuracies as lm-eval measures them, and perplexity (section 4 of the paper).

The paper reports zero-shot accuracy on seven tasks (Tables 2, 3, 4, 5, 7 and 8), perplexity on WikiText (Table 3) and
5-shot accuracy on MMLU (Table 6).

    python evaluate.py --ckpt merged.pt --tasks samples_arc_easy_*.jsonl --ppl wikitext2_test.txt --out results.json
    torchrun --nproc_per_node=8 evaluate.py --ckpt merged.pt --tasks samples_*.jsonl --out results.json

--tasks takes what `lm_eval --model dummy --tasks T --num_fewshot K --log_samples --output_path D` writes for any
multiple-choice task, or what data/lm_eval/prepare.py writes without lm-eval: one document on each line, with the
context and the continuation of each choice. lm-eval's score of a choice is log p(continuation | context), summed over
the continuation's tokens:

    tokens     trailing white space of the context moves to the continuation;
               c = encode(context), t = encode(context + continuation)[len(c):]
    input      (c + t)[-(max_len + 1):][:-1]        what exceeds the model's positions is cut from the left
    score      the sum over t of log_softmax(logits)[t_k]; the token at position p is predicted by the logits of
               position p - 1
    acc        1 if the choice with the highest score is right (the first of equals), otherwise 0
    acc_norm   the same with score / characters of the choice
    mc2        TruthfulQA's acc: the share of the right choices in the probability of all

and acc_bytes, acc_mutual_info. Of the `metrics` that a file lists, those computed here are reported; the others are
printed by name. A rolling task has its two perplexities and bits per byte, whatever is listed.

lm-eval runs every choice with its own copy of the context. Here a document is one row: first a trunk, the longest
common prefix of its choices' inputs (so WinoGrande's two contexts share what they can), then a branch for each choice.
The tokens of a branch have the positions that they would have right after the trunk, and see only the trunk and
themselves (`branch_mask`):

    row         t0 t1 t2 | a3 a4 | b3 b4 b5
    position     0  1  2 |  3  4 |  3  4  5
    branch       0  0  0 |  1  1 |  2  2  2

What all documents of a file begin with, few-shot examples, is one more row, whose keys and values serve all others.

A LLaMA is a list of blocks, and two of them in memory are enough. Rows of like lengths make a batch, batches a chunk,
as large as memory and `CHUNK` allow, and the chunk goes through one block after the other (`walk`):

    for block in blocks:                 # read from disk, the next one while this one works
        for batch in chunk:
            batch.x = block(batch.x)     # hidden states stay, weights pass by

So LLaMA-2-70B is scored on one GPU of 12 GB (by count). No keys and values outlive their block. The output layer runs
only on the positions that predict a target, and everything after it is float32. Each process walks with its share of
the batches.

Whether a beginning-of-sequence token (BOS) is put in front changes the numbers. lm-eval put none before LLaMA's
contexts until 0.4.9.1, and neither did the paper; since 0.4.9.2 lm-eval does, and so does --add_bos. The results say
which was used.

Perplexity is Wanda's. The lines of the text, blank ones emptied, are joined by blank lines, tokenised once with one BOS
in front, and cut into windows of seqlen tokens; the tail that does not fill a window is dropped. Each window is run on
its own, and the perplexity is exp(mean over windows of the mean cross-entropy of its seqlen - 1 targets). Only figures
of the same seqlen can be compared. lm-eval's `wikitext` task (rolling log-likelihood, word perplexity) is a different
number; --tasks reads its samples file too.

Known differences from lm-eval. A tokenizer.model is run by sentencepiece; transformers drops the first space of a
text that begins with one, which moves lm-eval's rolling scores of such pages by about 0.03%. lm-eval rounds scores to
the model's dtype before it compares them; here they stay float32.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data.checkpoint import VERSION, Checkpoint, UserError, atomic, cast, check_ours, check_out, check_version, digest
from data.checkpoint import lock_partial, read_bytes, read_json, utf8, write_json
from data.lm_eval.samples import Document, Score, document_metrics, known_metrics, n_words, read_tasks
from data.tokenizer import Tokenizer
from model import LOGITS_AT_ONCE, Block, Llama, LlamaConfig, Parser, add_device, check_device, check_dtype, cli
from model import common_dtype, cut_into_batches, join_processes, number, open_llama, rope_tables, stream_blocks
from model import tokenizer_of

SEVEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # the paper's average
MMLU = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security
    conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts
    high_school_biology high_school_chemistry high_school_computer_science high_school_european_history
    high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence
    logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes
    moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine
    professional_psychology public_relations security_studies sociology us_foreign_policy virology world_religions
""".split()

# ----------------------------------------------------------------------------------------------------------------------
# read: texts


def read_text(path: str | Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text, read as WikiText-2 is: lines, blank ones emptied, joined by blank lines; BOS in front.
    UserError where it cannot be read."""
    text = utf8(read_bytes(path), path)
    lines = io.StringIO(text, newline="\n")  # each with its "\n", and no other character ends a line
    rows = [line if line.strip() else "" for line in lines]
    # not special: the "<unk>" of WikiText's tokenised form is text like its other words
    return [bos_id(tokenizer), *tokenizer.encode("\n\n".join(rows), special=False)]


def read_texts(paths: list[str], tokenizer: Tokenizer, seqlen: int) -> dict[str, list[int]]:
    """{name: tokens} of several texts; the name is the file's, without its suffix. UserError where two have the same
    name, or a text is shorter than a window of seqlen tokens."""
    texts = {}
    for path in paths:
        name, tokens = Path(path).stem, read_text(path, tokenizer)
        if name in texts:
            raise UserError(f"--ppl {path}: another file is named {name} too, and the results go by name")
        if len(tokens) < seqlen:
            what = f"{len(tokens)} tokens, fewer than one window of --seqlen {seqlen}"
            raise UserError(f"--ppl {path}: {what}; a smaller one has to be that of all models that are compared")
        texts[name] = tokens
    return texts


# ----------------------------------------------------------------------------------------------------------------------
# tokenise: a row for each document, rows of a part

# What the model is asked, lm-eval's word: input tokens, and the targets that the last len(targets) of them predict.
Request = tuple[list[int], list[int]]


def bos_id(tokenizer: Tokenizer) -> int:
    """The BOS token. UserError where the tokenizer has none."""
    if tokenizer.bos is None:
        raise UserError("the tokenizer has no BOS, which --add_bos, --ppl, rolling tasks and empty contexts need")
    return tokenizer.bos


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, add_bos: bool) -> Request:
    """The request of one choice. UserError where the continuation has no token."""
    # Tokens such as "▁the" begin with their space: what a context ends in belongs to the word that follows.
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    c = tokenizer.encode(context) if context else []
    t = tokenizer.encode(context + continuation)[len(c) :]
    if not t:
        raise UserError(f"the choice {continuation!r} after {context[-40:]!r} has no tokens: nothing can be scored")
    if not c and t[0] == tokenizer.bos and len(t) > 1:  # written as text, "<s>" is the context
        c, t = t[:1], t[1:]
    # Without a context BOS predicts the first token; a chat template has written its own.
    if not c or (add_bos and c[0] != bos_id(tokenizer)):
        c = [bos_id(tokenizer), *c]
    # The last target is predicted, but predicts nothing: it is no input.
    return (c + t)[:-1], t


def cut(tokens: list[int], targets: list[int], max_len: int) -> Request:
    """What does not fit goes from the left."""
    return tokens[-max_len:], targets[-max_len:]


def rolling_windows(tokens: list[int], bos: int, max_len: int) -> list[Request]:
    """lm-eval's windows over a long text. Every token is predicted once, the first from BOS; the input of each later
    window is the max_len tokens before its last target."""
    padded = [bos, *tokens]
    windows = []
    for start in range(0, len(tokens), max_len):
        end = min(start + max_len, len(tokens))
        windows.append((padded[max(0, end - max_len) : end], tokens[start:end]))
    return windows


def shared_prefix(requests: list[list[Request]]) -> int:
    """How many tokens all inputs of all documents begin with, up to the first position that predicts a target."""
    inputs = [tokens for choices in requests for tokens, _ in choices]
    contexts = [len(tokens) - len(targets) for choices in requests for tokens, targets in choices]
    return min(len(os.path.commonprefix(inputs)), *contexts)


@dataclasses.dataclass
class Row:
    """The trunk and the branches of one document, end to end, after the tokens that a cache holds."""

    tokens: list[int]
    positions: list[int]
    branch: list[int]  # of each token: 0 in the trunk, k in the branch of the k-th choice
    logit_index: list[list[int]]  # of each choice: the places in the row whose logits predict its targets
    targets: list[list[int]]  # of each choice: its targets, as many


def pack_document(requests: list[Request], share: bool, skip: int = 0) -> Row:
    """One row for the choices of a document, without the first `skip` tokens of their inputs, which a cache holds.

    share=False: no trunk, every branch is a whole input. That is what lm-eval computes, for comparison.
    """
    inputs = [tokens for tokens, _ in requests]
    trunk = len(os.path.commonprefix(inputs)) if share else skip  # its length, the skipped tokens counted
    row = Row(inputs[0][skip:trunk], list(range(skip, trunk)), [0] * (trunk - skip), [], [])
    for k, (tokens, targets) in enumerate(requests, 1):
        start = len(row.tokens)  # where this branch begins
        predicting = range(len(tokens) - len(targets), len(tokens))  # positions in the input; some may be in the trunk
        row.logit_index.append([p - skip if p < trunk else start + p - trunk for p in predicting])
        row.targets.append(targets)
        row.tokens += tokens[trunk:]
        row.positions += range(trunk, len(tokens))
        row.branch += [k] * (len(tokens) - trunk)
    return row


@dataclasses.dataclass
class Part:
    """A task or a text, as rows."""

    prefix: Row | None  # tokens that all rows began with, run once, and cut from each; None: there are none
    rows: list[Row]
    document: list[int]  # row -> its document; a page and a text have a row for each window
    n_cut: int = 0  # documents with a choice whose input is longer than the model's positions, and was cut
    scores: dict[int, list[Score]] = dataclasses.field(default_factory=dict)  # row -> those of its choices, once done
    key: str = ""  # the digest of all that the scores depend on

    def past(self) -> int:
        """How many tokens of the prefix are left of each row."""
        return len(self.prefix.tokens) if self.prefix else 0


def make_part(requests: list[list[Request]], document: list[int], share: bool = True) -> Part:
    """A part from the requests of each of its rows. share=False: see `pack_document`."""
    skip = shared_prefix(requests) if share else 0
    tokens, _ = requests[0][0]
    prefix = Row(tokens[:skip], list(range(skip)), [0] * skip, [], []) if skip else None
    return Part(prefix, [pack_document(choices, share, skip) for choices in requests], document)


def encode_task(
    documents: list[Document], tokenizer: Tokenizer, add_bos: bool, max_len: int, share: bool = True
) -> Part:
    """A task as a part: a row for each document, or for each window of a page."""
    requests, numbers, n_cut = [], [], 0
    for i, document in enumerate(documents):
        if document.rolling:
            tokens = tokenizer.encode(document.pairs[0][0])
            if add_bos and tokens[:1] != [bos_id(tokenizer)]:
                tokens = [bos_id(tokenizer), *tokens]  # lm-eval predicts the added BOS too
            rows = [[window] for window in rolling_windows(tokens, bos_id(tokenizer), max_len)]
        else:
            choices = [encode_pair(tokenizer, *pair, add_bos) for pair in document.pairs]
            n_cut += any(len(tokens) > max_len for tokens, _ in choices)
            rows = [[cut(*request, max_len) for request in choices]]
        requests += rows
        numbers += [i] * len(rows)
    part = make_part(requests, numbers, share)
    part.n_cut = n_cut
    return part


def encode_text(tokens: list[int], seqlen: int) -> Part:
    """A text as a part: of each window of seqlen tokens all but the first are targets, without a context."""
    windows = [tokens[i : i + seqlen] for i in range(0, len(tokens) - seqlen + 1, seqlen)]
    return make_part([[(window[:-1], window[1:])] for window in windows], [0] * len(windows))


# ----------------------------------------------------------------------------------------------------------------------
# the model: blocks that pass by, and the little that stays


class Blocks(nn.Module):
    """A checkpoint's blocks where a Llama has its list of them. Each walk reads them anew, which costs no time: a chunk
    of N tokens is N FLOPs for each byte that is read, in 16 bits."""

    def __init__(
        self, ckpt: Checkpoint, config: LlamaConfig, device: torch.device, dtype: torch.dtype, semi_structured: bool
    ):
        super().__init__()
        self.stream = functools.partial(stream_blocks, ckpt, config, device, dtype)
        self.semi_structured = semi_structured
        with torch.device("meta"):
            self.nbytes = 2 * sum(p.numel() for p in Block(config).parameters()) * dtype.itemsize  # of two blocks
        self.n_layers = config.num_hidden_layers

    def __iter__(self) -> Iterator[Block]:
        blocks = self.stream()
        for i in range(self.n_layers):
            block = next(blocks)
            if self.semi_structured:
                to_semi_structured(block, f"layers.{i}")
            yield block
            del block  # see `stream_blocks`


def open_model(
    ckpt: Checkpoint, config: LlamaConfig, device: torch.device, dtype: torch.dtype, semi_structured: bool = False
) -> Llama:
    """A Llama whose blocks are read when they are walked. The last norm and lm_head are on the device; the embeddings
    stay in host memory, of which a chunk's tokens look up a few rows."""
    with torch.device("meta"):
        model = Llama(config)
    model.model.layers = Blocks(ckpt, config, device, dtype, semi_structured)
    rest = {name: cast(ckpt[name], dtype, name) for name in ckpt if not name.startswith("model.layers.")}
    embeddings = rest["model.embed_tokens.weight"]
    head = rest.get("lm_head.weight", embeddings)  # absent where it is tied
    model.model.embed_tokens.weight = nn.Parameter(embeddings, False)
    model.model.norm.weight = nn.Parameter(rest["model.norm.weight"].to(device), False)
    model.lm_head.weight = nn.Parameter(head.to(device), False)
    return model


def share_of_zeros(ckpt: Checkpoint) -> float:
    """The share of zeros in the blocks' linears: the model's sparsity."""
    sizes = {name: w.numel() for name, w in ckpt.shapes.items() if name.endswith("_proj.weight")}
    return 1 - sum(int(ckpt[name].count_nonzero()) for name in sizes) / sum(sizes.values())


def check_semi_structured(device: str, dtype: torch.dtype) -> None:
    """UserError where the device has no sparse matrix units, or they do not take the dtype."""
    if device != "cuda" or torch.cuda.get_device_capability() < (8, 0):
        raise UserError("--semi_structured: needs an NVIDIA GPU of compute capability 8.0 or later")
    if dtype not in (torch.float16, torch.bfloat16):
        raise UserError("--semi_structured: needs --dtype float16 or bfloat16")


def to_semi_structured(block: nn.Module, where: str) -> None:
    """Runs a block's 2:4 linears on the GPU's sparse matrix units. UserError for one that cannot be converted."""
    for name, linear in block.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if linear.in_features % 4 or (linear.weight.view(-1, 4) != 0).sum(1).max() > 2:
            raise UserError(f"--semi_structured: {where}.{name} is not 2:4 (a group of 4 has more than 2 non-zeros)")
        try:
            sparse = torch.sparse.to_sparse_semi_structured(linear.weight.data)
        except RuntimeError as e:  # rows or columns that are no multiple of what the units take
            raise UserError(f"--semi_structured: {where}.{name}: {e}") from None
        linear.weight = nn.Parameter(sparse, False)
        # cuSPARSELt writes a transposed output, which attention's fast kernels do not take
        linear.register_forward_hook(lambda module, args, y: y.contiguous())


# ----------------------------------------------------------------------------------------------------------------------
# score: a part's rows in batches, the batches of all parts in chunks, a chunk through the blocks


RowNumbers = tuple[Part, list[int]]  # the rows of a batch, by their numbers in a part

# Tokens of a chunk at most. On a GPU the work on a block then takes seconds, longer than a disk takes for the next one;
# and on either a run that is killed has lost minutes.
CHUNK = {"cpu": 2**15, "cuda": 2**19}


def score(
    model: Llama,
    parts: list[Part],
    max_tokens: int = 8192,
    save: Callable[[list[RowNumbers]], Any] = lambda chunk: None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Scores the rows of the parts that have no scores yet: the share of process `rank` of `world`.

    max_tokens: of a batch at most, padding and prefix counted. save: called with each chunk that is done. UserError
    where a score is not finite, and where a block does not fit the device.
    """
    batches = share_of_work(make_batches(parts, max_tokens), rank, world)
    chunks, home = make_chunks(model, batches)
    n_rows, total = 0, sum(len(numbers) for _, numbers in batches)
    quiet = None if rank == 0 else True  # None: a bar where stderr is a terminal
    steps = len(chunks) * model.config.num_hidden_layers
    with tqdm(desc="scoring", total=steps, unit="block", disable=quiet) as progress:
        for chunk in chunks:
            progress.set_postfix(documents=f"{n_rows:,} of {total:,}")
            walk(model, chunk, home, progress.update)
            save(chunk)
            n_rows += sum(len(numbers) for _, numbers in chunk)


def make_batches(parts: list[Part], max_tokens: int) -> list[RowNumbers]:
    """Batches of the rows that have no scores yet.

    Nothing in a batch depends on who runs it and when, so results do not depend on the number of processes, on memory,
    or on whether a run was interrupted.
    """
    batches = []
    for part in parts:
        todo = [i for i in range(len(part.rows)) if i not in part.scores]
        # The prefix counts for each row: in attention its keys and values stand beside the row's own.
        lengths = [part.past() + len(part.rows[i].tokens) for i in todo]
        batches += [(part, [todo[k] for k in batch]) for batch in cut_into_batches(lengths, max_tokens)]
    return batches


def batch_tokens(part: Part, numbers: list[int]) -> int:
    return len(numbers) * len(part.rows[numbers[0]].tokens)  # the first is the longest


def share_of_work(batches: list[RowNumbers], rank: int, world: int) -> list[RowNumbers]:
    """The batches of a process: neighbours, so that few processes run the same prefix, and as many tokens as others."""
    ends = list(itertools.accumulate(batch_tokens(*batch) for batch in batches))
    # A batch goes to the process in whose equal share of the tokens its middle lies.
    middles = [end - batch_tokens(*batch) / 2 for end, batch in zip(ends, batches, strict=True)]
    return [batch for batch, middle in zip(batches, middles, strict=True) if int(middle * world / ends[-1]) == rank]


def make_chunks(model: Llama, batches: list[RowNumbers]) -> tuple[list[list[RowNumbers]], torch.device]:
    """Chunks of batches, as large as memory allows, and where hidden states wait: on the device, or in host memory if
    that has more room. UserError where not even a block and a batch fit the device."""
    weight, blocks = model.lm_head.weight, model.model.layers
    needs = [batch_bytes(model.config, weight.dtype, part, numbers) for part, numbers in batches]
    largest = [max(sizes) for sizes in zip(*needs, strict=True)] or [0, 0]
    streamed = isinstance(blocks, Blocks)  # and not in memory already, as a model that `run_task` is given
    fixed = largest[1] + (blocks.nbytes if streamed else 0)
    free, home = free_memory(weight.device), weight.device
    if fixed + largest[0] > free:
        raise UserError(
            f"--device {home.type}: blocks and a batch take {(fixed + largest[0]) / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free; what helps: a smaller --max_tokens, --dtype bfloat16, --device cpu"
        )
    room, host = free - fixed, free_memory(torch.device("cpu")) // 2  # the other half is for what is read
    if room < min(host, sum(waiting for waiting, _ in needs)):
        room, home = host, torch.device("cpu")

    # Where each walk reads the model anew, parts share walks: MMLU has 57 of them. Otherwise each is saved alone.
    chunks, n_tokens, n_bytes = [], 0, 0
    for (part, numbers), (waiting, _) in zip(batches, needs, strict=True):
        tokens = batch_tokens(part, numbers)
        full = n_tokens + tokens > CHUNK[weight.device.type] or n_bytes + waiting > room
        other = not streamed and chunks and chunks[-1][0][0] is not part
        if not chunks or full or other:
            chunks.append([])
            n_tokens = n_bytes = 0
        chunks[-1].append((part, numbers))
        n_tokens += tokens
        n_bytes += waiting
    return chunks, home


def batch_bytes(config: LlamaConfig, dtype: torch.dtype, part: Part, numbers: list[int]) -> tuple[int, int]:
    """Bytes of a batch: while it waits for a block, and more while it is in one, or its targets are scored."""
    c, size, B, S = config, dtype.itemsize, len(numbers), len(part.rows[numbers[0]].tokens)
    keys = part.past() + S
    waiting = B * S * ((c.hidden_size + 2 * c.head_dim) * size + keys)  # x, cos, sin; a byte of the mask for each key
    working = B * S * 3 * (c.hidden_size + c.intermediate_size) * size  # the MLP's three, residual, input, output
    # keys and values, repeated where heads share them, and either while it is put together; the mask as numbers
    working += B * keys * 3 * c.num_attention_heads * c.head_dim * size + B * S * keys * 8
    logits = 3 * 4 * LOGITS_AT_ONCE * c.vocab_size
    return waiting, max(working, logits) * 4 // 3  # a third is for what is freed in one size and needed in another


def free_memory(device: torch.device) -> int:
    """Bytes that this process may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(available[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@dataclasses.dataclass
class Batch:
    """Rows of one part on their way through the blocks, padded to the longest."""

    rows: list[Row]
    x: Tensor  # (B, S, hidden_size): hidden states
    cos: Tensor  # (B, 1, S, head_dim), the same for every head
    sin: Tensor
    mask: Tensor | None  # (B, 1, S, past + S), see `branch_mask`; None: causal


@torch.no_grad()
def walk(model: Llama, chunk: list[RowNumbers], home: torch.device, tick: Callable[[], Any]) -> None:
    """Scores a chunk of batches. All of them go through a block before the next block comes.

    home: where hidden states wait for their turn. tick: called after each block. UserError, which names the layer,
    where something is not finite.
    """
    # --- in: the batches of each part, and its prefix, which is a row like others and serves them all
    device = model.lm_head.weight.device
    groups = []  # (part, the batch of its prefix or None, the batches of its rows)
    for part, numbers in chunk:
        if not groups or groups[-1][0] is not part:
            prefix = embed(model, [part.prefix], 0, home) if part.prefix else None
            groups.append((part, prefix, []))
        groups[-1][2].append(embed(model, [part.rows[i] for i in numbers], part.past(), home))

    # --- through: a list of blocks in memory, or a stream of them
    blocks = iter(model.model.layers)
    for i in range(model.config.num_hidden_layers):
        block = next(blocks)
        for _, prefix, batches in groups:
            shared = []  # the prefix's keys and values in this block
            if prefix:
                advance(block, i, prefix, device, shared)  # which fills it
            for batch in batches:
                cache = list(shared) or None  # a list of its own, since attention adds the batch's keys and values
                advance(block, i, batch, device, cache)
        tick()
        del block  # so that it is gone while the next is waited for

    # --- out
    after = [batch for _, _, batches in groups for batch in batches]
    for (part, numbers), batch in zip(chunk, after, strict=True):
        part.scores.update(zip(numbers, score_batch(model, batch, device), strict=True))


def advance(block: Block, i: int, batch: Batch, device: torch.device, cache: list[Tensor] | None) -> None:
    """Takes a batch through block i. cache: keys and values of what it follows; attention puts the batch's own after
    them, in the list itself."""
    mask = None if batch.mask is None else batch.mask.to(device)
    # All these copies are none where batches wait on the device.
    x = block(batch.x.to(device), batch.cos.to(device), batch.sin.to(device), mask, cache)
    check_activations(x, f"the output of layers.{i}")  # now, while it is known which layer it was
    batch.x = x.to(batch.x.device)


def embed(model: Llama, rows: list[Row], past: int, home: torch.device) -> Batch:
    """A batch before its first block. past: tokens of the prefix, left of it. home: where it waits."""
    S = len(rows[0].tokens)  # the longest

    def padded(lists: list[list[int]]) -> Tensor:
        """(B, S): rows filled up with what they begin with, so that padding brings no NaN that the row has not."""
        return torch.tensor([values + values[:1] * (S - len(values)) for values in lists])

    device, table = model.lm_head.weight.device, model.model.embed_tokens.weight
    x = table[padded([row.tokens for row in rows]).to(table.device)].to(device)  # (B, S, hidden_size)
    check_activations(x, "embed_tokens")
    cos, sin = rope_tables(model.config, padded([row.positions for row in rows]).to(device), x.dtype)
    mask = None  # one choice a row, or none: causal attention, for which the hardware has faster kernels
    if past or any(len(row.targets) > 1 for row in rows):
        branch = [row.branch + [-1] * (S - len(row.branch)) for row in rows]  # -1: no choice sees the padding
        mask = branch_mask(torch.tensor(branch, device=device), past).to(home)
    return Batch(rows, x.to(home), cos[:, None].to(home), sin[:, None].to(home), mask)


def check_activations(x: Tensor, where: str) -> None:
    """UserError where hidden states or logits hold NaN or Inf: neither leaves a sum finite, and a sum makes no copy."""
    if not x.sum(dtype=torch.float32).isfinite():
        hint = "; try --dtype bfloat16 or float32" if x.dtype == torch.float16 else ""
        raise UserError(f"no log-likelihood is finite: {where} has NaN or Inf{hint}")


def branch_mask(branch: Tensor, past: int) -> Tensor:
    """What each query (down) sees of the keys (across). branch (B, S) -> bool (B, 1, S, past + S), True = sees.

        branch      0  0  0  1  1  2  2  2
                   t0 t1 t2 a3 a4 b3 b4 b5
               t0   x  .  .  .  .  .  .  .
               t1   x  x  .  .  .  .  .  .
               t2   x  x  x  .  .  .  .  .
               a3   x  x  x  x  .  .  .  .
               a4   x  x  x  x  x  .  .  .
               b3   x  x  x  .  .  x  .  .
               b4   x  x  x  .  .  x  x  .
               b5   x  x  x  .  .  x  x  x

    The `past` tokens of the cache, left of these, are seen by all.
    """
    query, key = branch[:, :, None], branch[:, None, :]
    mask = ((key == 0) | (key == query)).tril()[:, None]  # (B, 1, S, S)
    return torch.cat([mask.new_ones(*mask.shape[:3], past), mask], -1)


def score_batch(model: Llama, batch: Batch, device: torch.device) -> list[list[Score]]:
    """The score of each choice of each row, from the hidden states after the last block."""
    S = batch.x.shape[1]
    places, targets, choices = [], [], []  # of each target in the batch: where it is predicted, it, (row, choice)
    for b, row in enumerate(batch.rows):
        for k in range(len(row.targets)):
            places += [b * S + i for i in row.logit_index[k]]
            targets += row.targets[k]
            choices += [(b, k)] * len(row.targets[k])
    log_p, likeliest = score_targets(model, batch.x.to(device).flatten(0, 1), places, targets)
    scores = [[(0.0, True)] * len(row.targets) for row in batch.rows]
    for (b, k), value, hit in zip(choices, log_p, likeliest, strict=True):
        total, greedy = scores[b][k]
        scores[b][k] = (total + value, greedy and hit)
    return scores


def score_targets(
    model: Llama, x: Tensor, logit_index: list[int], targets: list[int]
) -> tuple[list[float], list[bool]]:
    """log p of each target, predicted from the hidden state x[logit_index], and whether it is the likeliest token.

    x: (N, hidden_size). A position that predicts for several choices (the last of the trunk) is computed once for all.
    """
    log_p, likeliest = [], []
    for start in range(0, len(targets), LOGITS_AT_ONCE):
        part = torch.tensor(targets[start : start + LOGITS_AT_ONCE], device=x.device)  # (n,)
        places = torch.tensor(logit_index[start : start + LOGITS_AT_ONCE], device=x.device)  # (n,)
        places, inverse = places.unique(return_inverse=True)  # (u,), (n,): where among the unique ones each target is
        logits = model.lm_head(model.model.norm(x[places])).float()  # (u, vocab_size)
        check_activations(logits, "what lm_head returns")
        log_p += (logits[inverse, part] - logits.logsumexp(-1)[inverse]).tolist()
        likeliest += (logits.argmax(-1)[inverse] == part).tolist()
    return log_p, likeliest


# ----------------------------------------------------------------------------------------------------------------------
# metrics: lm-eval's


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error: of values that are 0 or 1, sqrt(p (1 - p) / (n - 1)). A single value has no error."""
    n, mean = len(values), sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (n - 1) / n) if n > 1 else None


def summarise(metrics: list[dict[str, float]]) -> dict:
    """A task's results from its documents' metrics: the mean and the standard error of each, and n."""
    result = {}
    for metric in metrics[0]:  # of one task: all documents have the same
        result[metric], result[f"{metric}_stderr"] = mean_and_error([m[metric] for m in metrics])
    result["n"] = len(metrics)
    return result


def perplexity(loss: float) -> float | None:
    """e^loss; None where it is more than a float can hold: e^709.8 is the largest."""
    return math.exp(loss) if loss < 709 else None


def rolling_metrics(documents: list[Document], log_p: list[float]) -> dict:
    """Word perplexity, byte perplexity and bits per byte of a rolling task. log_p: of each document's text, in nats.

    A perplexity is None where it is more than a float can hold (a text without spaces is one word).
    """
    words = sum(n_words(d.page) for d in documents)
    n_bytes = sum(len(d.page.encode()) for d in documents)
    total = -sum(log_p)
    return {
        "word_perplexity": perplexity(total / words),
        "byte_perplexity": perplexity(total / n_bytes),
        "bits_per_byte": total / n_bytes / math.log(2),
        "n": len(documents),
    }


def task_results(documents: list[Document], part: Part) -> tuple[dict, list[list[Score]]]:
    """A task's results, and the scores of each document's choices (of a page its one score)."""
    if documents[0].rolling:
        log_p = [0.0] * len(documents)
        for row, i in enumerate(part.document):
            log_p[i] += part.scores[row][0][0]
        result, scores = rolling_metrics(documents, log_p), [[(value, False)] for value in log_p]
    else:
        scores = [part.scores[row] for row in range(len(documents))]
        result = summarise([document_metrics(d, s) for d, s in zip(documents, scores, strict=True)])
    result["tokens"] = part.past() + sum(len(row.tokens) for row in part.rows)  # that were run, without padding
    return result, scores


def text_results(part: Part, seqlen: int) -> dict:
    """Wanda's perplexity of a text in windows of seqlen tokens."""
    n = len(part.rows)
    mean = -sum(part.scores[row][0][0] for row in range(n)) / (n * (seqlen - 1))  # nats a token
    return {"ppl": perplexity(mean), "seqlen": seqlen, "tokens": n * seqlen}


def aggregates(results: dict[str, dict]) -> dict[str, dict]:
    """The paper's average of seven tasks, and MMLU over its subjects: weighted by size as lm-eval does, and unweighted.

    Each only where its tasks are among the results.
    """
    results = {task: r for task, r in results.items() if "acc" in r}
    out = {}
    if all(task in results for task in SEVEN):
        seven = [results[task] for task in SEVEN]
        out["average of seven"] = {"acc": sum(r["acc"] for r in seven) / 7, "n": sum(r["n"] for r in seven)}
    # mmlu_pro, mmlu_flan, mmlu_continuation and global_mmlu are other tasks, and lm-eval has averages of their own.
    subjects = [results[f"mmlu_{subject}"] for subject in MMLU if f"mmlu_{subject}" in results]
    if len(subjects) > 1:
        k, N = len(subjects), sum(r["n"] for r in subjects)
        acc = sum(r["acc"] * r["n"] for r in subjects) / N
        squares = sum((r["n"] - 1) * (r["acc_stderr"] or 0) ** 2 * r["n"] for r in subjects)
        error = math.sqrt(squares / (N - k) / N) if k < N else None  # N = k: one document in each
        name = "mmlu" if k == len(MMLU) else f"mmlu ({k} of {len(MMLU)} subjects)"
        out[name] = {"acc": acc, "acc_stderr": error, "n": N}
        out[f"{name}, mean of subjects"] = {"acc": sum(r["acc"] for r in subjects) / k, "n": N}
    return out


def run_task(
    model: Llama, tokenizer: Tokenizer, documents: list[Document], add_bos: bool = False, max_tokens: int = 8192
) -> tuple[dict, list[list[Score]]]:
    """Scores one task from Python, with a model that may be in memory: see `task_results`. A model that does not state
    its positions keeps max_tokens of a context."""
    limit = model.config.max_position_embeddings or max_tokens
    part = encode_task(documents, tokenizer, add_bos, limit)
    score(model, [part], max_tokens)
    return task_results(documents, part)


# ----------------------------------------------------------------------------------------------------------------------
# what a run leaves


def log_samples(path: Path, documents: list[Document], scores: list[list[Score]]) -> None:
    """Every choice's log-likelihood in lm-eval's own shape, so that its tools read it."""
    # Half a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape again
    with atomic(path) as tmp, open(tmp, "w", encoding="utf-8", errors="backslashreplace") as f:
        for document, s in zip(documents, scores, strict=True):
            resps = [str(value) if document.rolling else [str(value), str(hit)] for value, hit in s]
            record = {**document.record, "resps": [[r] for r in resps], "filtered_resps": resps}
            for metric in known_metrics(document)[1]:  # of the model that wrote the file, and not computed here
                record.pop(metric, None)
            record.update(document_metrics(document, s))
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_scores(work: Path) -> dict[str, dict[int, list[Score]]]:
    """What an interrupted command has left in a folder: {key of a part: {row: its scores}}."""
    known = {}
    for file in sorted(work.glob("chunk-*.json")):
        saved = read_json(file, dict)
        check_version(saved.get("version"), file)
        try:
            if file.name != f"chunk-{digest(saved['scores'])}.json":  # edited by hand
                raise ValueError
            for key, rows in saved["scores"].items():
                scores = {int(row): [(float(value), bool(hit)) for value, hit in choices] for row, choices in rows}
                known.setdefault(key, {}).update(scores)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{file}: is damaged; remove {work} to begin again") from None
    return known


def percent(result: dict, metric: str) -> str:
    """A metric with its standard error, where they are there, in percent."""
    if metric not in result:
        return ""
    text, error = f"{100 * result[metric]:.2f}", result.get(f"{metric}_stderr")
    return text if error is None else f"{text} ± {100 * error:.2f}"


def table(results: dict[str, dict], ppl: dict[str, dict]) -> str:
    """The results as lines to read: accuracies, then perplexities."""
    shown = lambda ppl: "too large" if ppl is None else f"{ppl:.4f}"
    lines, width = [], max([28, *map(len, results), *map(len, ppl)])
    if results:
        lines.append(f"{'task':<{width}} {'acc':>15} {'acc_norm':>15} {'documents':>10}")
    for task, r in results.items():
        if "word_perplexity" in r:
            lines.append(f"{task:<{width}} word perplexity {shown(r['word_perplexity'])} {r['n']:>20}")
        else:
            lines.append(f"{task:<{width}} {percent(r, 'acc'):>15} {percent(r, 'acc_norm'):>15} {r['n']:>10,}")
    for name, p in ppl.items():
        lines.append(f"{name:<{width}} perplexity {shown(p['ppl'])} (seqlen {p['seqlen']:,}, {p['tokens']:,} tokens)")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# the command


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description="Score multiple-choice tasks from lm-eval's samples files, and the perplexity of texts.",
        epilog="Perplexity is Wanda's: one BOS at the very start of the text, windows of --seqlen tokens, the tail "
        "that does not fill a window dropped, each window alone, its first token not predicted.",
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="the model: a .pt file, a Hugging Face directory or a Meta directory")
    add("--tasks", nargs="+", default=[], metavar="FILE", help="samples files of lm-eval")
    add("--ppl", nargs="+", default=[], metavar="FILE", help="plain texts")
    seqlen = "tokens in a window of --ppl; also those that --tasks keep, where the model does not state its positions "
    seqlen += "(default: the positions)"
    add("--seqlen", type=number(int, 2), help=seqlen)
    tasks, bos = ("--tasks",), "put BOS before contexts, as lm-eval does since 0.4.9.2 (default: not)"
    add("--add_bos", action="store_true", help=bos, goes_with=tasks)
    samples = "write every choice's log-likelihood there, in lm-eval's shape"
    add("--log_samples", metavar="DIR", help=samples, goes_with=tasks)
    add("--max_tokens", type=number(int, 1), default=8192, help="in a batch of one process, padding counted")
    sharing = "run every choice with its own context, as lm-eval does"
    add("--no_sharing", action="store_true", help=sharing, goes_with=tasks)
    add("--semi_structured", action="store_true", help="run 2:4 linears on the GPU's sparse matrix units")
    add_device(parser)
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (default: the checkpoint's)")
    add("--out", required=True, help="the results, JSON; the folder OUT.partial holds what is scored until all is")
    args = parser.parse_args()
    if not args.tasks and not args.ppl:
        raise UserError("nothing to do: give --tasks or --ppl")
    check_device(args.device)
    return args


def main() -> None:
    # --- what the command names, checked before any weight is read
    args = parse_args()
    tasks = read_tasks(args.tasks)
    logs = {}  # where --log_samples puts each task
    if args.log_samples:
        logs = {name: Path(args.log_samples) / f"samples_{name}.jsonl" for name in tasks}
    outputs = {args.out: "--out", **dict.fromkeys(logs.values(), "--log_samples")}
    if not args.out.endswith(".json"):
        raise UserError(f"--out {args.out}: must end in .json")
    for path, flag in outputs.items():
        check_out(path, flag, [args.ckpt, *args.tasks, *args.ppl])
    for path in logs.values():
        check_ours(path, "arguments", f"--log_samples {args.log_samples}: the samples")
    check_ours(Path(args.out), "perplexity", f"--out {args.out}: the results")
    ckpt, config = open_llama(args.ckpt)
    dtype = getattr(torch, args.dtype) if args.dtype else common_dtype(ckpt)
    if args.semi_structured:
        check_semi_structured(args.device, dtype)
    tokenizer = tokenizer_of(ckpt, needed=True)
    seqlen = args.seqlen or config.max_position_embeddings
    if seqlen is None:
        raise UserError(f"--ckpt {args.ckpt}: does not tell the length that it was trained on; give it by --seqlen")
    limit = config.max_position_embeddings or seqlen  # to which contexts of --tasks are cut
    texts = read_texts(args.ppl, tokenizer, seqlen)
    if texts:
        config.check_length(seqlen, "--seqlen")

    # --- the processes, and the folder OUT.partial, which rank 0 alone reads: all must leave out the same rows
    rank, world = join_processes(args.device)
    work = Path(f"{args.out}.partial")
    shared = [None, None]
    if rank == 0:
        held = lock_partial(work, [args.ckpt, *args.tasks, *args.ppl, *outputs])  # noqa: F841  until the process ends
        known = read_scores(work)
        check_dtype(ckpt, dtype)
        shared = [ckpt.fingerprint(), known]
    if world > 1:
        dist.broadcast_object_list(shared)  # the others wait while rank 0 reads the whole checkpoint
    fingerprint, known = shared

    # --- the parts, with the scores that an interrupted command has left. What these depend on is a part's key; neither
    # --max_tokens nor --device is in it: when memory runs out, the command goes on with another one.
    flags = [args.add_bos, args.no_sharing, args.semi_structured, str(dtype)]
    settings = [fingerprint, tokenizer.fingerprint, *flags, limit]
    task_parts, text_parts = {}, {}
    for name, documents in tasks.items():
        task_parts[name] = encode_task(documents, tokenizer, args.add_bos, limit, not args.no_sharing)
        longest = max(max(row.positions) + 1 for row in task_parts[name].rows)
        config.check_window(longest, f"--tasks: a document of {name}")
        if task_parts[name].n_cut and rank == 0:
            which = f"{task_parts[name].n_cut} of {len(documents)} documents of {name}"
            print(f"note: --tasks: {which} have more than {limit} tokens: cut from the left", file=sys.stderr)
        task_parts[name].key = digest(settings, name, [d.record for d in documents])
    for name, tokens in texts.items():
        text_parts[name] = encode_text(tokens, seqlen)
        text_parts[name].key = digest(settings, name, seqlen, tokens)
    parts = [*task_parts.values(), *text_parts.values()]
    for part in parts:
        left = known.get(part.key, {})
        for i, scores in left.items():
            if not 0 <= i < len(part.rows) or len(scores) != len(part.rows[i].targets):
                raise UserError(f"{work}: its scores do not fit {args.ckpt}; remove it to begin again")
        part.scores.update(left)

    # --- the walks, each chunk's scores kept in a file of its own
    model = open_model(ckpt, config, torch.device(args.device), dtype, args.semi_structured)

    def save(chunk: list[RowNumbers]) -> None:
        scores = {}
        for part, numbers in chunk:
            scores.setdefault(part.key, []).extend((i, part.scores[i]) for i in numbers)
        write_json(work / f"chunk-{digest(scores)}.json", {"version": VERSION, "scores": scores})

    score(model, parts, args.max_tokens, save, rank, world)

    # --- the last time that processes wait for each other: rank 0 gets what the others have scored
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, [part.scores for part in parts])
        for scores in gathered:
            for part, theirs in zip(parts, scores, strict=True):
                part.scores.update(theirs)
        dist.destroy_process_group()
    if rank > 0:
        return

    # --- the results
    results, ppl = {}, {}
    for name, documents in tasks.items():
        results[name], scores = task_results(documents, task_parts[name])
        if name in logs:
            log_samples(logs[name], documents, scores)
    for name, part in text_parts.items():
        ppl[name] = text_results(part, seqlen)
    results.update(aggregates(results))
    head = {"ckpt": args.ckpt, "history": ckpt.history, "sparsity": share_of_zeros(ckpt), "add_bos": args.add_bos}
    write_json(args.out, {"version": VERSION, **head, "results": results, "perplexity": ppl})
    shutil.rmtree(work, ignore_errors=True)
    print(table(results, ppl))
    for name, documents in tasks.items():
        _, others = known_metrics(documents[0])
        if others:
            print(f"{name}: {', '.join(others)} is not computed here, and left out")
    if tasks:
        print(f"BOS {'before every context' if args.add_bos else 'not added to contexts'}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main, "a smaller --max_tokens or --seqlen, or --dtype bfloat16")
