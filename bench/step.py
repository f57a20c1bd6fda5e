"""A whole training step of a LLaMA-shaped model, 2:4 pruned random weights: tokens per second and peak memory.

    python bench/step.py --device cuda --dtype bfloat16             # 7B, micro-batch 8 x 512
    python bench/step.py --layers 4 --width 1024 --batch 4 --length 256 --forms fused packed checkpointed lora peft full

Forms: `fused`, `chunked`, `repeat` (spp.py's), `packed` (fused, with survivors and bits), `checkpointed` (fused, with
activation checkpointing), `lora` (ours, r = 8), and three peers on transformers' model, where it is installed: `peft`
(PEFT's LoRA, r = 8), `full` (all weights) and `equation7` (the authors' way: `chunked`, with their dropout). Forward,
backward, clipping, AdamW. Every form runs in a process of its own, which has its own peak of memory; all take their
steps in turn, so that a machine that slows down slows all of them, and the speed is the median of the rounds' ratios to
the first. On a CPU time is the process's own.
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.checkpoint import UserError  # noqa: E402
from model import PRESETS, Llama, LlamaConfig, Parser, check_device, cli, config_to_dict, number  # noqa: E402
from spp import TARGETS, AdapterLinear, SPPLinear, check_compile, inject  # noqa: E402

PEERS = ("peft", "full", "equation7")
FORMS = ("fused", "packed", "checkpointed", "chunked", "repeat", "lora", *PEERS)


class Equation7(SPPLinear):
    """What the authors' layer computes: the input of its branch is dropped out by 5%."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + super().forward(F.dropout(x, 0.05))


@torch.no_grad()
def random_2of4(config: LlamaConfig, dtype: torch.dtype, device: str) -> Llama:
    """A model of random weights, made where it is needed, with two zeros in every four of a projection's weights."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        nn.init.ones_(p) if p.dim() == 1 else nn.init.normal_(p, std=0.02)
        if name.endswith("_proj.weight"):
            p.view(-1, 4)[:, ::2] = 0
    return model


def shape(args: argparse.Namespace) -> LlamaConfig:
    config = PRESETS[args.preset]
    if args.width:  # LLaMA's proportions: heads of 128, an MLP of 11 / 4, a small vocabulary
        heads = args.width // 128
        config = LlamaConfig(8192, args.width, 11 * args.width // 4, config.num_hidden_layers, heads)
    return replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)


def build(args: argparse.Namespace, form: str) -> Llama:
    """One of our forms of the model."""
    model = random_2of4(shape(args), getattr(torch, args.dtype), args.device)
    model.activation_checkpointing = args.activation_checkpointing or form == "checkpointed"
    if form == "lora":
        inject(model, method="lora", r=8)
    else:
        inject(model, matmul=form if form in ("chunked", "repeat") else "fused")
    if form == "packed":
        for layer in model.modules():
            if isinstance(layer, AdapterLinear):
                layer.pack(layer.weight.detach().cpu())
        model.to(args.device)
    return model


def peer(args: argparse.Namespace, form: str) -> nn.Module:
    """transformers' model with the same weights: whole, under PEFT's LoRA, or with equation 7 in its linears."""
    import transformers

    model = random_2of4(shape(args), getattr(torch, args.dtype), args.device)
    config = transformers.LlamaConfig(**config_to_dict(model.config), attn_implementation="sdpa")
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    theirs.to_empty(device=args.device)
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(args.device)  # buffers are in no checkpoint
    if form == "equation7":
        inject(theirs, matmul="chunked")
        for layer in theirs.modules():
            if isinstance(layer, SPPLinear):
                layer.__class__, layer.residual = Equation7, False  # the branch alone
    if form == "peft":
        import peft

        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=16, target_modules=[*TARGETS]))
    return theirs.train()


def steps(args: argparse.Namespace, form: str) -> Iterator[float]:
    """Takes a training step at a time, and yields its seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    theirs = form in PEERS
    model = peer(args, form) if theirs else build(args, form)
    if args.compile and not theirs:
        for block in model.model.layers:
            block.compile()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, 1e-4, weight_decay=0.001, fused=args.device == "cuda")  # as in train.py
    tokens = torch.randint(shape(args).vocab_size, (args.batch, args.length + 1), device=args.device)
    while True:
        start = clock()
        if theirs:
            loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss  # shifts them itself
        else:
            loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        yield clock() - start


def peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def work(args: argparse.Namespace, form: str, pipe: Connection) -> None:
    """A process: takes a step whenever it is asked to; sends its seconds and the peak of memory, or what went wrong."""
    try:
        for seconds in steps(args, form):
            pipe.send((seconds, peak_memory(args.device)))
            pipe.recv()
    except EOFError:  # nobody asks any more
        return
    except (RuntimeError, ImportError, UserError) as e:  # out of memory, for one
        pipe.send(str(e).splitlines()[0])


def alternate(args: argparse.Namespace, forms: list[str], seconds: dict[str, list], peaks: dict[str, int]) -> None:
    """Lets the forms take their steps in turn, and notes what they took."""
    pipes = {}
    spawn = multiprocessing.get_context("spawn")
    for form in forms:
        pipe, child = spawn.Pipe()
        spawn.Process(target=work, args=(args, form, child), daemon=True).start()
        child.close()
        answer = pipe.recv()  # of the first step, which one process takes at a time
        if isinstance(answer, str):
            print(f"{form}: {answer}", flush=True)
        else:
            pipes[form], seconds[form] = pipe, []
    for i in range(args.steps + 1):
        for form, pipe in pipes.items():
            pipe.send("go on")
            taken, peaks[form] = pipe.recv()
            if i > 0:  # the second step warms up too
                seconds[form].append(taken)


def main():
    parser = Parser(description="Tokens per second and peak memory of whole training steps.")
    parser.add_argument("--preset", default="llama-7b", choices=PRESETS)
    parser.add_argument("--layers", type=number(int, 1), help="fewer layers than the preset's")
    parser.add_argument("--width", type=number(int, 128), help="a hidden size in place of the preset's shape")
    parser.add_argument("--batch", type=number(int, 1), default=8)
    parser.add_argument("--length", type=number(int, 1), default=512)
    parser.add_argument("--steps", type=number(int, 1), default=8, help="rounds, after two that warm up")
    parser.add_argument("--forms", nargs="+", default=["fused", "lora", "chunked", "repeat"], choices=FORMS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    check_device(args.device)
    if args.width and args.width % 128:
        raise UserError(f"--width {args.width}: is no multiple of 128, the size of a head")
    if args.compile:
        check_compile(args.device)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread"
    print(f"{device}, torch {torch.__version__}, {args.dtype}, {args.batch} x {args.length} tokens", flush=True)
    seconds, peaks = {}, {}
    together = [args.forms] if args.device == "cpu" else [[form] for form in args.forms]  # a GPU holds one model
    for forms in together:
        alternate(args, forms, seconds, peaks)
    if not seconds:
        raise UserError("none of --forms could run")
    first = next(iter(seconds))
    print(f"| form | tokens/s | / {first} | peak memory, GB |\n|---|---|---|---|")
    for form in seconds:
        speed = args.batch * args.length / statistics.median(seconds[form])
        pairs = zip(seconds[first], seconds[form], strict=True)
        ratio = statistics.median(its / own for its, own in pairs)
        print(f"| {form} | {speed:,.0f} | {ratio:.2f} | {peaks[form] / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    cli(main)
