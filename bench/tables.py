"""Results files of evaluate.py as tables in the shape of the paper's, as bars, and as the README's pictures.

    python bench/tables.py out/demo/results_*.json --svg out/demo/demo.svg          # one run: a row a model
    python bench/tables.py out/full/*/results_*.json --save assets/demo-full.json   # several seeds: mean and spread
    python bench/tables.py assets/demo-full.json --recovered assets/recovered.svg --losses assets/losses.svg
    python bench/tables.py out/paper/llama-*/*.json --paper 5                       # ours beside the paper's figures

A row is a model: what was done to it (its history), its sparsity, the accuracy of each task, their mean, perplexity, and
the share won back of the mean accuracy that pruning lost (not where it lost less than 2 points: that is noise). Files
that agree in method and sparsity are seeds of one row: mean and standard deviation. --save keeps what a table needs, and
the validation losses that training logged, in one small file that is read as the files it was made of.

--paper N reads the figures of bench/paper.json, typed from the paper as printed (in its Table 2 the ARC columns of the
dense 65B are exchanged), and takes a file for the model that its folder and name say: llama-7b/wanda_2of8-spp.json.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluate import SEVEN  # noqa: E402
from model import Parser, UserError, cli, read_json  # noqa: E402

NAMES = {
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "spp": "SPP",
    "lora*": "LoRA*",
    "lora (dense)": "LoRA (dense)",
    "masked_lora": "masked LoRA",
}
COLOURS = {"LoRA*": "#dd6b20", "SPP": "#2b6cb0", "masked LoRA": "#b7791f", "masked": "#2f855a", "dynamic": "#805ad5"}


# ----------------------------------------------------------------------------------------------------------------------
# results files to rows


def describe(result: dict) -> tuple[str, str]:
    """("Wanda + SPP", "2:8") from a model's history."""
    steps = [step for step in result["history"] if step["method"] != "full"]
    sparsity = next((step["sparsity"] for step in steps if "sparsity" in step), "dense")
    return " + ".join(NAMES.get(step["method"], step["method"]) for step in steps) or "dense", sparsity


def read(paths: Iterable[str | Path]) -> list[dict]:
    """A record a model: method, sparsity, zeros, acc {task: share}, ppl, val_loss [[step, loss], ...]."""
    records, bos = [], set()
    for path in map(Path, paths):
        result = read_json(path)
        if isinstance(result, list):  # what --save wrote
            records += result
            continue
        if not isinstance(result, dict) or not {"results", "history", "add_bos"} <= result.keys():
            raise UserError(f"{path}: is not a results file of evaluate.py")
        bos.add(result["add_bos"])
        method, sparsity = describe(result)
        acc = {task: r["acc"] for task, r in result["results"].items() if "acc_norm" in r}
        ppl = next((p["ppl"] for p in result["perplexity"].values()), None)
        record = {"method": method, "sparsity": sparsity, "zeros": result["sparsity"], "acc": acc, "ppl": ppl}
        log = Path(result["ckpt"]).parent / "log.jsonl"
        if "+" in method and log.exists():
            steps = map(json.loads, log.read_text().splitlines())
            record["val_loss"] = [[line["step"], round(line["val_loss"], 4)] for line in steps if "val_loss" in line]
        records.append(record)
    if len(bos) > 1:
        raise UserError("some results were scored with --add_bos and some without: they cannot stand in one table")
    if not records or any(r["acc"].keys() != records[0]["acc"].keys() for r in records):
        raise UserError("the results are of different tasks, or of none: they cannot stand in one table")
    return records


def order(row: dict) -> tuple:
    """Dense first, then by the share of zeros, unstructured before N:M, pruned before fine-tuned."""
    pruner, *tuned = row["method"].split(" + ")
    way = [list(COLOURS).index(m) if m in COLOURS else len(COLOURS) for m in tuned]
    return row["zeros"] > 0.1, row["zeros"] > 0.6, row["sparsity"], pruner, way


def average(record: dict) -> float:
    return statistics.fmean(record["acc"].values())


def rows_of(records: list[dict]) -> list[dict]:
    """Seeds of one method and sparsity as one row: lists of values, and the share of the loss that was won back."""
    groups = {}
    for record in records:
        groups.setdefault((record["method"], record["sparsity"]), []).append(record)
    rows = []
    for (method, sparsity), same in groups.items():
        columns = {task: [100 * r["acc"][task] for r in same] for task in same[0]["acc"]}
        columns |= {"average": [100 * average(r) for r in same]}
        ppl = [r["ppl"] for r in same if r["ppl"] is not None]
        zeros = statistics.fmean(r["zeros"] for r in same)
        rows.append({"method": method, "sparsity": sparsity, "zeros": zeros, "columns": columns, "ppl": ppl})
    mean = {(r["method"], r["sparsity"]): statistics.fmean(r["columns"]["average"]) for r in rows}
    for r in rows:
        pruned, dense = mean.get((r["method"].split(" + ")[0], r["sparsity"])), mean.get(("dense", "dense"))
        lost = None not in (pruned, dense) and "+" in r["method"] and dense - pruned
        r["won back"] = (mean[r["method"], r["sparsity"]] - pruned) / lost if lost and lost >= 2 else None
    return sorted(rows, key=order)


# ----------------------------------------------------------------------------------------------------------------------
# rows to text


def spread(values: list[float], digits: int) -> str:
    """ "85.5", or "85.5 ±1.2" for several seeds."""
    text = f"{statistics.fmean(values):.{digits}f}" if values else ""
    return f"{text} ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def table(rows: list[dict]) -> str:
    lines = [["method", "sparsity", "zeros", *rows[0]["columns"], "ppl", "won back"]]
    for r in rows:
        cells = [spread(values, 1) for values in r["columns"].values()]
        won = "" if r["won back"] is None else f"{100 * r['won back']:.0f}%"
        lines.append([r["method"], r["sparsity"], f"{100 * r['zeros']:.1f}%", *cells, spread(r["ppl"], 2), won])
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Cells in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [[cell.rjust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *row[1:]]) for line, row in zip(lines, rows, strict=True))


def bars(rows: list[dict], width: int = 50) -> str:
    wide = max(len(r["method"]) for r in rows)
    shares = [statistics.fmean(r["columns"]["average"]) / 100 for r in rows]
    return "\n".join(
        f"{r['sparsity']:>6} {r['method']:<{wide}} {'█' * round(width * x)} {100 * x:.1f}"
        for r, x in zip(rows, shares, strict=True)
    )


def beside_paper(paths: list[str], paper: dict) -> str:
    """One of the paper's tables, ours / theirs; "-" where there is no result. Accuracies in %.

    An average over fewer tasks than the paper's is none: it is left out.
    """
    columns, ours = paper["columns"], {}
    for path in map(Path, paths):
        (record,) = read([path])
        values = {k: 100 * v for k, v in record["acc"].items()} | {"ppl": record["ppl"]}
        if "mmlu" in columns:
            values["mmlu"] = 100 * json.loads(path.read_text())["results"].get("mmlu", {}).get("acc", math.nan)
        if all(task in record["acc"] for task in SEVEN):
            values["average"] = statistics.fmean(values[task] for task in SEVEN)
        ours.setdefault(f"{path.parent.name}/{path.stem}", {}).update(values)
    if not ours.keys() & paper["rows"].keys():
        raise UserError(f"no file is a row of this table, such as {next(iter(paper['rows']))}.json")
    lines = [["ours / paper's", *columns]]
    for name, figures in paper["rows"].items():
        mine = [ours.get(name, {}).get(column) for column in columns]
        shown = ["-" if x is None or math.isnan(x) else f"{x:.2f}" for x in mine]
        lines.append([name, *(f"{x} / {y:.2f}" for x, y in zip(shown, figures, strict=True))])
    return aligned(lines)


# ----------------------------------------------------------------------------------------------------------------------
# rows to pictures; no library is needed for a few rectangles and lines


def text(x: float, y: float, content: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{content}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "#222", more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {more}/>'


def picture(width: int, height: int, parts: list[str]) -> str:
    ground = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    size = f'width="{width}" height="{height}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{ground}' + "\n".join(parts) + "</svg>\n"


def legend(names: dict[str, str]) -> list[str]:
    """Squares with their names, {name: colour}, under the panels."""
    parts = []
    for i, (name, colour) in enumerate(names.items()):
        parts.append(f'<rect x="{40 + 108 * i}" y="282" width="12" height="12" fill="{colour}"/>')
        parts.append(text(56 + 108 * i, 292, name))
    return parts


def svg(rows: list[dict]) -> str:
    """The bars of the terminal."""
    parts = []
    for i, r in enumerate(rows):
        y, method, mean = 26 * i, r["method"].split(" + ")[-1], statistics.fmean(r["columns"]["average"])
        parts.append(text(192, y + 16, f"{r['sparsity']} {r['method']}" if i else "dense", "end"))
        colour = COLOURS.get(method, "#b8b8b8" if r["sparsity"] != "dense" else "#444")
        parts.append(f'<rect x="200" y="{y + 3}" width="{4 * mean:.1f}" height="18" fill="{colour}"/>')
        parts.append(text(206 + 4 * mean, y + 16, f"{mean:.1f}"))
    return picture(660, 26 * len(rows), parts)


def recovered(rows: list[dict]) -> str:
    """Average accuracy by sparsity, a panel a pruning method: pruned, and after each way to fine-tune."""
    sparsities = list(dict.fromkeys(r["sparsity"] for r in rows if r["sparsity"] != "dense"))
    pruners = sorted({r["method"].split(" + ")[0] for r in rows} - {"dense"}, reverse=True)
    dense = statistics.fmean(next(r for r in rows if r["method"] == "dense")["columns"]["average"])
    parts, wide, y0, up = [], 410, 250, lambda percent: 250 - 2.1 * percent
    for p, pruner in enumerate(pruners):
        left = 40 + p * wide
        parts.append(text(left, 20, f"{pruner}: average accuracy, %"))
        parts += [text(left - 6, up(v) + 4, str(v), "end") for v in (0, 25, 50, 75, 100)]
        parts += [line(left, up(v), left + wide - 60, up(v), "#ddd") for v in (0, 25, 50, 75, 100)]
        parts.append(line(left, up(dense), left + wide - 60, up(dense), "#444", 'stroke-dasharray="4 3"'))
        for s, sparsity in enumerate(sparsities):
            x = left + 8 + 88 * s
            parts.append(text(x + 36, y0 + 16, sparsity, "middle"))
            for r in rows:
                if r["sparsity"] == sparsity and r["method"].split(" + ")[0] == pruner:
                    values = r["columns"]["average"]
                    mean, colour = statistics.fmean(values), COLOURS.get(r["method"].split(" + ")[-1], "#b8b8b8")
                    parts.append(
                        f'<rect x="{x}" y="{up(mean):.1f}" width="12" height="{y0 - up(mean):.1f}" fill="{colour}"/>'
                    )
                    if len(values) > 1:
                        sd = statistics.stdev(values)
                        parts.append(line(x + 6, up(mean - sd), x + 6, up(min(100, mean + sd))))
                    x += 13
    parts += legend({"pruned": "#b8b8b8", **COLOURS, "dense (dashed)": "#444"})
    return picture(40 + wide * len(pruners), 304, parts)


def losses(records: list[dict]) -> str:
    """Validation loss against steps, mean of the seeds, after Wanda: a panel a sparsity.

    All start at the pruned model's loss, which is written, not drawn: the scale would show nothing else.
    """
    curves = {}
    for r in records:
        if r.get("val_loss") and r["method"].startswith("Wanda"):
            curves.setdefault(r["sparsity"], {}).setdefault(r["method"].split(" + ")[1], []).append(r["val_loss"])
    shown = [s for s in ("0.75", "2:8") if s in curves] or list(curves)
    drawn = [loss for s in shown for same in curves[s].values() for curve in same for step, loss in curve if step]
    low, top = min(drawn, default=0), max(drawn, default=1)
    parts, wide, up = [], 410, lambda loss: 250 - 215 * (loss - low) / max(1e-9, top - low)
    for p, sparsity in enumerate(shown):
        left = 40 + p * wide
        begin = statistics.fmean(curve[0][1] for same in curves[sparsity].values() for curve in same)
        parts.append(text(left, 20, f"Wanda {sparsity}: validation loss against steps (pruned: {begin:.2f})"))
        for i in range(5):
            y = low + (top - low) * i / 4
            parts += [text(left - 6, up(y) + 4, f"{y:.2f}", "end"), line(left, up(y), left + wide - 60, up(y), "#ddd")]
        last = max(curve[-1][0] for same in curves[sparsity].values() for curve in same)
        for step in range(0, last + 1, max(1, last // 5)):
            parts.append(text(left + (wide - 60) * step / max(1, last), 266, str(step), "middle"))
        for method, same in curves[sparsity].items():
            mean = [(x, statistics.fmean(c[i][1] for c in same)) for i, (x, _) in enumerate(same[0]) if x]
            points = " ".join(f"{left + (wide - 60) * x / max(1, last):.1f},{up(y):.1f}" for x, y in mean)
            colour = COLOURS.get(method, "#444")
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    parts += legend(COLOURS)
    parts.append(text(56 + 108 * len(COLOURS), 292, "LoRA*: before the mask is applied again"))
    return picture(40 + wide * len(shown), 304, parts)


def main():
    parser = Parser(description="Turn results of evaluate.py into the paper's table layout.")
    parser.add_argument("results", nargs="+", help="JSON files that evaluate.py or --save wrote, of the same tasks")
    parser.add_argument("--paper", choices="2345678", help="the layout and the figures of this table of the paper")
    parser.add_argument("--save", metavar="FILE", help="keep what the table and the pictures need")
    parser.add_argument("--svg", metavar="FILE", help="draw the bars")
    parser.add_argument("--recovered", metavar="FILE", help="draw the accuracy by sparsity")
    parser.add_argument("--losses", metavar="FILE", help="draw the validation losses against steps")
    args = parser.parse_args()
    if args.paper:
        papers = json.loads(Path(__file__).with_name("paper.json").read_text())
        print(beside_paper(args.results, papers[args.paper]))
        return
    records = sorted(read(args.results), key=order)
    rows = rows_of(records)
    print(table(rows), bars(rows), sep="\n\n")
    if args.save:
        Path(args.save).write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    for file, draw, what in ((args.svg, svg, rows), (args.recovered, recovered, rows), (args.losses, losses, records)):
        if file:
            Path(file).write_text(draw(what))


if __name__ == "__main__":
    cli(main)
