"""A whole training step of a LLaMA-7B-shaped model, 2:4 pruned random weights: tokens per second and peak memory.

    python bench/step.py --device cuda --dtype bfloat16             # 32 layers, micro-batch 8 x 512
    python bench/step.py --layers 2 --batch 1 --length 256          # on a CPU

Every form of SPPLinear, and LoRA r = 8: forward, backward, clipping, AdamW. The forms run in turn, one model at a time.
"""

import argparse
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import PRESETS, Llama, LlamaConfig, Parser, check_device, cli, number  # noqa: E402
from spp import inject  # noqa: E402


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


def build(args: argparse.Namespace, form: str) -> Llama:
    config = PRESETS[args.preset]
    config = replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    model = random_2of4(config, getattr(torch, args.dtype), args.device)
    model.activation_checkpointing = args.activation_checkpointing
    if form == "lora":
        return inject(model, method="lora", r=8)
    return inject(model, matmul=form)


def main():
    parser = Parser(description="Tokens per second and peak memory of whole training steps.")
    parser.add_argument("--preset", default="llama-7b", choices=PRESETS)
    parser.add_argument("--layers", type=number(int, 1), help="fewer layers than the preset's")
    parser.add_argument("--batch", type=number(int, 1), default=8)
    parser.add_argument("--length", type=number(int, 1), default=512)
    parser.add_argument("--steps", type=number(int, 1), default=8)
    parser.add_argument("--forms", nargs="+", default=["fused", "lora", "chunked", "repeat"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    check_device(args.device)
    cuda = args.device == "cuda"
    print(
        f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, {args.dtype}, {args.batch} x {args.length} tokens"
    )
    print("| form | tokens/s | peak memory, GiB |\n|---|---|---|")
    for form in args.forms:
        try:
            model = build(args, form)
            if args.compile:
                for block in model.model.layers:
                    block.compile()
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.001)
            tokens = torch.randint(model.config.vocab_size, (args.batch, args.length + 1), device=args.device)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            times = []
            for _ in range(args.steps):
                start = time.perf_counter()
                (model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            peak = (
                torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            )
            speed = args.batch * args.length / statistics.median(times[2:] or times)
            print(f"| {form} | {speed:,.0f} | {peak / 2**30:.1f}{'' if cuda else ' (process so far)'} |", flush=True)
        except torch.OutOfMemoryError:
            print(f"| {form} | out of memory | |", flush=True)
        model = optimizer = parameters = None
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    cli(main)
