"""SPPLinear against its floors: FLOPs counted, bytes kept for the backward pass counted, time as a ratio of medians.

    python bench/linear.py                                   # CPU, one thread, the shapes of the README's table
    python bench/linear.py --dtype bfloat16 --compile        # each form compiled, the floors too
    python bench/linear.py --device cuda --dtype bfloat16    # LLaMA-7B's shapes at T = 4,096
    python bench/linear.py --plot assets/linear.png          # also draws time and memory (matplotlib)

All forms run in turn in one process, so that a machine that slows down slows all of them, and a ratio is the median of
the rounds' ratios. On a CPU time is the process's own, so that other processes' does not count. A unit is one product of
T x n by n x m, 2*T*m*n FLOPs. Floors: a frozen linear (2 units), and one whose weight gets a gradient (3 units).
"""

import ctypes
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Parser, check_device, cli, number  # noqa: E402
from spp import LoRALinear, SPPLinear, check_compile  # noqa: E402

FORMS = ("frozen", "floor", "lora", "fused", "chunked", "repeat")
BASES = ("floor", "lora", "chunked")  # what a form's time is divided by


def make(form: str, m: int, n: int, dtype, device) -> nn.Module:
    linear = nn.Linear(n, m, bias=False, dtype=dtype, device=device)
    linear.weight.data *= torch.rand(m, n, device=device) < 0.5
    linear.weight.requires_grad_(form == "floor")
    if form == "lora":
        layer = LoRALinear(linear, r=8)
        nn.init.normal_(layer.B, std=0.01)
        return layer
    if form in ("fused", "chunked", "repeat"):
        layer = SPPLinear(linear, r=16, matmul=form)
        nn.init.uniform_(layer.beta, -0.1, 0.1)
        return layer
    return linear


def step(layer: nn.Module, x: Tensor, g: Tensor) -> None:
    """Forward and backward; x (T, n), and g (T, m) the gradient of the loss by the output."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    layer(x).backward(g)


def units(layer: nn.Module, x: Tensor, g: Tensor) -> float:
    """FLOPs of a step, counted, in products of T x n by n x m."""
    with FlopCounterMode(display=False) as counter:
        step(layer, x, g)
    (T, n), m = x.shape, g.shape[1]
    # not bmm: `fused` reduces G to the gradients of alpha and beta by products with vectors, no multiple of T
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm] / (2 * T * m * n)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Kept for backward beyond x and what the layer holds, each storage once."""
    known, saved = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)  # noqa: F841  its graph must live while storages are told apart
    return sum(saved.values())


def clock(layer: nn.Module, x: Tensor, g: Tensor) -> float:
    """Seconds of a step: of this process on a CPU, of the clock on a GPU."""
    if x.device.type == "cpu":
        start = time.process_time()
        step(layer, x, g)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(layer, x, g)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(T: int, n: int, m: int, dtype, device, repeats: int, compiled: bool) -> dict[str, dict]:
    x = torch.randn(T, n, dtype=dtype, device=device).requires_grad_()
    g = torch.randn(T, m, dtype=dtype, device=device)
    layers = {form: make(form, m, n, dtype, device) for form in FORMS}
    rows = {form: {"units": units(layer, x, g)} for form, layer in layers.items()}
    torch._dynamo.reset()  # each shape is compiled for itself
    for form, layer in layers.items():
        if compiled:
            layer.compile()
        rows[form]["saved"] = saved_bytes(layer, x) / (m * n * dtype.itemsize)
    times = {form: [] for form in FORMS}
    for i in range(repeats + 3):
        for form, layer in layers.items():
            seconds = clock(layer, x, g)
            if i >= 3:  # warm-up
                times[form].append(seconds)
    for form in FORMS:
        rows[form]["seconds"] = statistics.median(times[form])
        for base in BASES:
            pairs = zip(times[form], times[base], strict=True)
            rows[form][base] = statistics.median(own / other for own, other in pairs)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(layers[form], x, g)
            rows[form]["peak"] = torch.cuda.max_memory_allocated() - before
    return rows


def print_table(T, n, m, rows) -> None:
    for form, row in rows.items():
        ratios = " | ".join(f"{row[base]:.2f}" for base in BASES)
        numbers = f"{row['units']:.2f} | {row['saved']:.3f} | {1000 * row['seconds']:.2f}"
        print(f"| {T}, {n}, {m} | {form} | {numbers} | {ratios} |", flush=True)


def plot(results: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    for i, (shape, rows) in enumerate(results.items()):
        for ax, key, base in ((axes[0], "seconds", rows["floor"]["seconds"]), (axes[1], "saved", 1)):
            xs = [j + 0.8 * i / len(results) for j in range(len(FORMS))]
            heights = [rows[form][key] / base for form in FORMS]
            ax.bar(xs, heights, 0.8 / len(results), label="T, n, m = {}, {}, {}".format(*shape))
    for ax, title in zip(
        axes, ("time of a step / the 3-unit floor", "kept for backward / one m x n weight"), strict=True
    ):
        ax.set_xticks([j + 0.3 for j in range(len(FORMS))], FORMS)
        ax.set_title(title, fontsize=10)
    axes[0].axhline(1, color="black", lw=0.5)
    axes[1].legend(fontsize=7)  # where nothing is kept, it hides nothing
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def main():
    parser = Parser(description="Time, FLOPs and memory of every form of SPPLinear.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=number(int, 1), default=25, help="paired repeats")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()
    check_device(args.device)
    if args.compile:
        check_compile(args.device)
    if args.device == "cpu":
        torch.set_num_threads(1)
        if sys.platform == "linux":
            # glibc keeps what is freed: it would give large tensors back, and the next form would wait for their pages.
            M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
            ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        shapes = [(T, 1024, m) for T in (64, 128, 512, 2048) for m in (1024, 2816)]
    else:
        shapes = [(4096, 4096, 4096), (4096, 4096, 11008), (4096, 11008, 4096)]
    name = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.processor() or platform.machine()}, one thread"
    )
    kind = f"{args.dtype}, compiled" if args.compile else args.dtype
    print(f"{name}, torch {torch.__version__}, {kind}, medians of {args.repeats} paired repeats\n")
    print(
        "| T, n, m | form | units | saved / mn | ms | / floor 3 | / LoRA | / chunked |\n|---|---|---|---|---|---|---|---|"
    )
    results = {}
    for T, n, m in shapes:
        results[T, n, m] = measure(T, n, m, getattr(torch, args.dtype), args.device, args.repeats, args.compile)
        print_table(T, n, m, results[T, n, m])
    if args.device == "cuda":  # the seven linears of a block of LLaMA-7B
        total = {
            form: sum(k * results[shape][form]["seconds"] for shape, k in zip(shapes, (4, 2, 1), strict=True))
            for form in FORMS
        }
        print("\n7 linears of a LLaMA-7B block: " + ", ".join(f"{form} {1000 * s:.2f} ms" for form, s in total.items()))
        print(
            f"fused / floor {total['fused'] / total['floor']:.2f}, / LoRA {total['fused'] / total['lora']:.2f}, / chunked {total['fused'] / total['chunked']:.2f}"
        )
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    cli(main)
