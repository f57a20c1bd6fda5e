"""Results files of evaluate.py as one table in the shape of the paper's Tables 3 and 5, and as bars.

    python bench/tables.py out/demo/results_*.json --svg demo.svg

A row is a model: what was done to it (its history), its sparsity, the accuracy of each task, their mean, perplexity.
Rows of one sparsity stand together, pruned before fine-tuned.
"""

import argparse
import json
from pathlib import Path


def describe(result: dict) -> tuple[str, str]:
    """("Wanda + SPP", "2:8") from a model's history."""
    names = {"spp": "SPP", "lora*": "LoRA*", "lora (dense)": "LoRA (dense)", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
    steps = [step for step in result["history"] if step["method"] != "full"]
    sparsity = next((step["sparsity"] for step in steps if "sparsity" in step), "dense")
    return " + ".join(names.get(step["method"], step["method"]) for step in steps) or "dense", sparsity


def read(paths: list[str]) -> list[dict]:
    rows = []
    for path in paths:
        result = json.loads(Path(path).read_text())
        method, sparsity = describe(result)
        accuracies = {task: r["acc"] for task, r in result["results"].items() if "acc_norm" in r}
        ppl = next((p["ppl"] for p in result["perplexity"].values()), None)
        mean = sum(accuracies.values()) / max(1, len(accuracies))
        rows.append(
            {
                "method": method,
                "sparsity": sparsity,
                "zeros": result["sparsity"],
                "mean": mean,
                "ppl": ppl,
                **accuracies,
            }
        )
    return sorted(
        rows,
        key=lambda r: (
            r["sparsity"] != "dense",
            r["zeros"] > 0.6,
            r["sparsity"],
            len(r["method"].split(" + ")),
            r["method"],
        ),
    )


def table(rows: list[dict]) -> str:
    tasks = [key for key in rows[0] if key not in ("method", "sparsity", "zeros", "mean", "ppl")]
    lines = [
        f"{'method':<18} {'sparsity':>8} {'zeros':>6} "
        + " ".join(f"{t:>9}" for t in tasks)
        + f" {'average':>8} {'ppl':>8}"
    ]
    for r in rows:
        cells = " ".join(f"{100 * r[task]:9.1f}" for task in tasks)
        ppl = f"{r['ppl']:8.2f}" if r["ppl"] else ""
        lines.append(
            f"{r['method']:<18} {r['sparsity']:>8} {100 * r['zeros']:5.1f}% {cells} {100 * r['mean']:8.1f} {ppl}"
        )
    return "\n".join(lines)


def bars(rows: list[dict], width: int = 50) -> str:
    return "\n".join(
        f"{r['sparsity']:>6} {r['method']:<18} {'█' * round(width * r['mean'])} {100 * r['mean']:.1f}" for r in rows
    )


def svg(rows: list[dict]) -> str:
    """The same bars as a picture; no library is needed for a dozen rectangles."""
    colours, parts = {1: "#b8b8b8", 2: "#2b6cb0"}, []
    for i, r in enumerate(rows):
        y, colour = 26 * i, "#444" if r["sparsity"] == "dense" else colours[min(2, len(r["method"].split(" + ")))]
        parts.append(f'<text x="172" y="{y + 16}" text-anchor="end">{r["sparsity"]} {r["method"]}</text>')
        parts.append(f'<rect x="180" y="{y + 3}" width="{400 * r["mean"]:.1f}" height="18" fill="{colour}"/>')
        parts.append(f'<text x="{186 + 400 * r["mean"]:.1f}" y="{y + 16}">{100 * r["mean"]:.1f}</text>')
    size = f'width="640" height="{26 * len(rows)}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>' + "".join(parts) + "</svg>\n"


def main():
    parser = argparse.ArgumentParser(description="Turn results of evaluate.py into the paper's table layout.")
    parser.add_argument("results", nargs="+", help="JSON files that evaluate.py wrote, of the same tasks")
    parser.add_argument("--svg", help="also draw the average accuracies")
    args = parser.parse_args()
    rows = read(args.results)
    print(table(rows), bars(rows), sep="\n\n")
    if args.svg:
        Path(args.svg).write_text(svg(rows))


if __name__ == "__main__":
    main()
