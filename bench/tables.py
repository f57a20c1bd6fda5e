"""Results files of evaluate.py as tables in the shape of the paper's, as bars, and as the README's pictures.

    python bench/tables.py out/demo/results_*.json                                  # one run: a row a model
    python bench/tables.py out/full/*/results_*.json --save assets/demo-full.json   # several seeds: mean and spread
    python bench/tables.py assets/demo-full.json --recovered assets/recovered.svg --losses assets/losses.svg
    python bench/tables.py out/paper/llama-*/*.json --paper 5                       # ours beside the paper's figures

A row is a model: what was done to it (its history), its sparsity, the accuracy of each task, their mean, perplexity, and
the share won back of the mean accuracy that pruning lost (not where it lost less than 2 points: that is noise). Files
that agree in method and sparsity are seeds of one row: mean and standard deviation. --save keeps what a table needs, and
the validation losses that training logged, in one small file that is read as the files it was made of. Only the pictures
need matplotlib.

--paper N reads the figures of bench/paper.json, typed from the paper as printed (in its Table 2 the ARC columns of the
dense 65B are exchanged), and takes a file for the model that its folder and name say: llama-7b/wanda_2of8-spp.json.
"""

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError:  # `make demo` installs only what the commands need
    matplotlib = None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.checkpoint import VERSION, UserError, check_version, read_json  # noqa: E402
from evaluate import SEVEN  # noqa: E402
from model import Parser, cli  # noqa: E402

MEANS = re.compile(r"average of seven|mmlu(, | \(|$)")  # what stands among the results and is no task
NAMES = {
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "spp": "SPP",
    "lora*": "LoRA*",
    "lora (dense)": "LoRA (dense)",
    "masked_lora": "masked LoRA",
}
# what follows pruning, in the order of rows and bars
COLOURS = {"pruned": "silver", "LoRA*": "C2", "SPP": "C0", "SPP r = 64": "C9"}
COLOURS.update({"masked LoRA": "C4", "masked": "C1", "dynamic": "C3"})
# letters stay text, in the font that matplotlib brings along, so that the same data make the same file everywhere
SVG = {"svg.fonttype": "none", "svg.hashsalt": "spp", "font.sans-serif": ["DejaVu Sans"], "axes.grid.axis": "y"}
STYLE = ["seaborn-v0_8-whitegrid", "seaborn-v0_8-deep", SVG]


# ----------------------------------------------------------------------------------------------------------------------
# results files to rows


def describe(history: list[dict]) -> tuple[str, str]:
    """("Wanda + SPP", "2:8") from what was done to a model; that it was pretrained goes without saying, and that SPP's r
    was 16."""
    steps = [step for step in history if step["method"] != "full"]
    names = [NAMES.get(step["method"], step["method"]) for step in steps]
    for i, step in enumerate(steps):
        if step["method"] == "spp" and step.get("r", 16) != 16:
            names[i] += f" r = {step['r']}"
    method = " + ".join(names)
    sparsities = [step["sparsity"] for step in steps if "sparsity" in step]
    return method or "dense", sparsities[0] if sparsities else "dense"


def parts(method: str) -> tuple[str, str]:
    """("Wanda", "SPP") from "Wanda + SPP", and ("Wanda", "pruned") from "Wanda"."""
    pruner, _, tuned = method.partition(" + ")
    return pruner, tuned or "pruned"


def order(record: dict) -> tuple:
    """Dense first, then by the share of zeros, unstructured before N:M, pruned before fine-tuned."""
    pruner, tuned = parts(record["method"])
    rank = [*COLOURS, tuned].index(tuned)
    return record["zeros"] > 0.1, record["zeros"] > 0.6, record["sparsity"], pruner, rank


def record_of(path: str | Path, result: dict) -> dict:
    """What a table needs of a results file; of a fine-tuned model also its validation losses, [[step, loss], ...]."""
    if not {"results", "history", "add_bos"} <= result.keys():
        raise UserError(f"{path}: is not a results file of evaluate.py")
    check_version(result.get("version"), path)
    try:
        return fields(result)
    except (AttributeError, KeyError, TypeError, ValueError):  # edited by hand
        what = "is not as evaluate.py wrote it, or the log beside its checkpoint not as train.py did"
        raise UserError(f"{path}: {what}") from None


def fields(result: dict) -> dict:
    """The record, of whatever the file holds: an error where that is not what evaluate.py writes."""
    method, sparsity = describe(result["history"])
    record = {"method": method, "sparsity": sparsity, "zeros": result["sparsity"], "add_bos": result["add_bos"]}
    record["acc"] = {task: r["acc"] for task, r in result["results"].items() if "acc" in r and not MEANS.match(task)}
    record["ppl"], record["text"] = None, None
    for name, text in [*result["perplexity"].items()][:1]:
        record["ppl"], record["text"] = text["ppl"], f"{name} in windows of {text['seqlen']}"
    log = Path(result["ckpt"]).parent / "log.jsonl"
    if "+" in method and log.exists():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        lines = [line for line in lines if line.get("val_loss") is not None]  # null: nothing is held out
        record["val_loss"] = [[line["step"], round(line["val_loss"], 4)] for line in lines]
    return record


def read(paths: Iterable[str | Path]) -> list[dict]:
    """The records of all files, in the order of the table."""
    records = []
    for path in paths:
        content = read_json(path, dict)
        if "records" in content:  # what --save wrote
            check_version(content.get("version"), path)
            records += content["records"]
        else:
            records.append(record_of(path, content))
    if len({r["add_bos"] for r in records if "add_bos" in r}) > 1:
        raise UserError("some results were scored with --add_bos and some without: they cannot stand in one table")
    texts = {r["text"] for r in records if r.get("text")}  # of older files' texts nothing is known
    if len(texts) > 1:
        raise UserError(f"perplexities of {' and of '.join(sorted(texts))} cannot stand in one table")
    if not records or any(r["acc"].keys() != records[0]["acc"].keys() for r in records):
        raise UserError("the results are of different tasks, or of none: they cannot stand in one table")
    return sorted(records, key=order)


def row_of(seeds: list[dict]) -> dict:
    """A row from its seeds' records; columns: task -> accuracies in %, one a seed."""
    row = {"method": seeds[0]["method"], "sparsity": seeds[0]["sparsity"]}
    row["pruner"], row["tuned"] = parts(row["method"])
    row["zeros"] = np.mean([r["zeros"] for r in seeds])
    row["columns"] = {task: [100 * r["acc"][task] for r in seeds] for task in seeds[0]["acc"]}
    if row["columns"]:
        row["columns"]["average"] = [100 * np.mean(list(r["acc"].values())) for r in seeds]
    row["ppl"] = [r["ppl"] for r in seeds if r["ppl"] is not None]
    row["mean"] = np.mean(row["columns"].get("average", math.nan))
    return row


def rows_of(records: list[dict]) -> list[dict]:
    """Records of one method and sparsity as one row each, with the share of the lost accuracy that was won back."""
    groups = {}
    for record in records:
        groups.setdefault((record["method"], record["sparsity"]), []).append(record)
    rows = {key: row_of(seeds) for key, seeds in groups.items()}
    dense = rows.get(("dense", "dense"))
    for (_, sparsity), row in rows.items():
        pruned = rows.get((row["pruner"], sparsity))
        row["won back"] = None
        if dense and pruned and pruned is not row and dense["mean"] - pruned["mean"] >= 2:
            row["won back"] = (row["mean"] - pruned["mean"]) / (dense["mean"] - pruned["mean"])
    return list(rows.values())


# ----------------------------------------------------------------------------------------------------------------------
# rows to text


def spread(values: list[float], digits: int) -> str:
    """ "85.5", or "85.5 ±1.2" for several seeds; nothing for none."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ±{np.std(values, ddof=1):.{digits}f}"


def aligned(lines: list[list[str]]) -> str:
    """Cells in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(text)


def table(rows: list[dict]) -> str:
    lines = [["method", "sparsity", "zeros", *rows[0]["columns"], "ppl", "won back"]]
    for row in rows:
        accuracies = [spread(values, 1) for values in row["columns"].values()]
        won = "" if row["won back"] is None else f"{row['won back']:.0%}"
        lines.append([row["method"], row["sparsity"], f"{row['zeros']:.1%}", *accuracies, spread(row["ppl"], 2), won])
    return aligned(lines)


def bars(rows: list[dict], width: int = 50) -> str:
    """The average accuracies, for a terminal; 100% is `width` characters."""
    longest = max(len(row["method"]) for row in rows)
    lines = []
    for row in rows:
        bar = "█" * round(width * row["mean"] / 100)
        lines.append(f"{row['sparsity']:>6} {row['method']:<{longest}} {bar} {row['mean']:.1f}")
    return "\n".join(lines)


def figures(path: Path) -> dict[str, float]:
    """One model's figures by the names of the paper's columns, accuracies in %."""
    result = read_json(path, dict)
    record = record_of(path, result)
    values = {task: 100 * acc for task, acc in record["acc"].items()}
    values["ppl"] = record["ppl"]
    if "mmlu" in result["results"]:
        values["mmlu"] = 100 * result["results"]["mmlu"]["acc"]
    if all(task in values for task in SEVEN):  # an average over fewer tasks than the paper's is none
        values["average"] = np.mean([values[task] for task in SEVEN])
    return values


def beside_paper(paths: Iterable[str | Path], paper: dict) -> str:
    """One of the paper's tables, ours / theirs; "-" where there is no result. Accuracies in %."""
    ours = {}
    for path in map(Path, paths):
        ours.setdefault(f"{path.parent.name}/{path.stem}", {}).update(figures(path))
    if not ours.keys() & paper["rows"].keys():
        raise UserError(f"no file is a row of this table, such as {next(iter(paper['rows']))}.json")
    lines = [["ours / paper's", *paper["columns"]]]
    for name, theirs in paper["rows"].items():
        mine = [ours.get(name, {}).get(column) for column in paper["columns"]]
        shown = ["-" if x is None else f"{x:.2f}" for x in mine]
        lines.append([name, *(f"{x} / {y:.2f}" for x, y in zip(shown, theirs, strict=True))])
    return aligned(lines)


# ----------------------------------------------------------------------------------------------------------------------
# rows to pictures


def panels(count: int, methods: set[str], note: str) -> tuple["Figure", list]:
    """A figure of `count` panels, and under them a legend of the methods that they show."""
    figure = Figure(figsize=(9, 3.2))
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.3, top=0.92, wspace=0.03)
    axes = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in methods]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), title=note)
    return figure, axes


def recovered(rows: list[dict], perplexity: bool = False) -> "Figure":
    """Average accuracy, or perplexity, by sparsity, a panel a pruning method: pruned, and after each way to fine-tune."""
    values = lambda row: row["ppl"] if perplexity else row["columns"]["average"]
    sparse = [row for row in rows if row["sparsity"] != "dense"]
    if not sparse:
        raise UserError(f"--{'perplexity' if perplexity else 'recovered'}: there is no pruned model among the results")
    sparsities = list(dict.fromkeys(row["sparsity"] for row in sparse))
    pruners = sorted({row["pruner"] for row in sparse}, reverse=True)  # Wanda first
    note = "dashed: the dense model; lines: ± standard deviation, where there are several seeds"
    figure, axes = panels(len(pruners), {row["tuned"] for row in sparse}, note)
    for ax, pruner in zip(axes, pruners, strict=True):
        ax.set_title(f"{pruner}: {'perplexity' if perplexity else 'average accuracy, %'}")
        ax.set_xticks(range(len(sparsities)), sparsities)
        ax.set_xlabel("sparsity")
        if perplexity:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, 100)
        for x, sparsity in enumerate(sparsities):
            group = [row for row in sparse if row["pruner"] == pruner and row["sparsity"] == sparsity]
            left = x - 0.07 * (len(group) - 1)
            for i, row in enumerate(group):
                seeds, colour = values(row) or [math.nan], COLOURS.get(row["tuned"], "silver")
                error = np.std(seeds, ddof=1) if len(seeds) > 1 else None
                ax.bar(left + 0.14 * i, np.mean(seeds), 0.13, yerr=error, color=colour, ecolor="dimgray")
        for row in rows:
            if row["method"] == "dense":
                ax.axhline(np.mean(values(row)), color="dimgray", linestyle="--", linewidth=1)
    return figure


def losses(records: list[dict]) -> "Figure":
    """Validation loss against steps, mean of the seeds, after Wanda: a panel a sparsity.

    All start at the pruned model's loss, which is written, not drawn: the scale would show nothing else.
    """
    curves = {}  # sparsity -> method -> one [[step, loss], ...] a seed
    for record in records:
        pruner, tuned = parts(record["method"])
        if pruner == "Wanda" and len(record.get("val_loss", [])) > 2:  # more than the first and the last
            curves.setdefault(record["sparsity"], {}).setdefault(tuned, []).append(record["val_loss"])
    if not curves:
        raise UserError("--losses: no model fine-tuned after Wanda has a log.jsonl of several validations beside it")
    methods = {tuned for by_method in curves.values() for tuned in by_method}
    figure, axes = panels(len(curves), methods, "LoRA*: under the mask, as it is merged")
    for ax, (sparsity, by_method) in zip(axes, curves.items(), strict=True):
        for tuned, seeds in by_method.items():
            if any([step for step, _ in seed] != [step for step, _ in seeds[0]] for seed in seeds):
                raise UserError(f"--losses: the seeds of {tuned} at {sparsity} were validated after different steps")
            steps, loss = np.mean(seeds, axis=0).T
            ax.plot(steps[1:], loss[1:], color=COLOURS.get(tuned, "silver"))
        ax.set_title(f"Wanda {sparsity}: validation loss (pruned: {loss[0]:.2f})")
        ax.set_xlabel("step")
    return figure


def draw(picture: Callable, data: list[dict], file: str) -> None:
    """Writes one of the pictures above, or says that it cannot: the table is worth having without it."""
    if matplotlib is None:
        print(f"\n{file} is not drawn: that takes matplotlib (pip install -r requirements-dev.txt)")
        return
    with matplotlib.style.context(STYLE):
        picture(data).savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def main():
    parser = Parser(description="Turn results of evaluate.py into the paper's table layout.")
    parser.add_argument("results", nargs="+", help="JSON files that evaluate.py or --save wrote, of the same tasks")
    parser.add_argument("--paper", choices="2345678", help="the layout and the figures of this table of the paper")
    parser.add_argument("--save", metavar="FILE", help="keep what the table and the pictures need")
    parser.add_argument("--recovered", metavar="FILE.svg", help="draw the accuracy by sparsity")
    parser.add_argument("--perplexity", metavar="FILE.svg", help="draw the perplexity by sparsity")
    parser.add_argument("--losses", metavar="FILE.svg", help="draw the validation losses against steps")
    args = parser.parse_args()
    if args.paper:
        papers = read_json(Path(__file__).with_name("paper.json"))
        print(beside_paper(args.results, papers[args.paper]))
        return
    records = read(args.results)
    rows = rows_of(records)
    print(table(rows))
    if records[0]["acc"]:
        print("", bars(rows), sep="\n")
    if args.save:
        lines = ",\n".join(map(json.dumps, records))  # one a record, so that a diff shows which has changed
        Path(args.save).write_text(f'{{"version": {VERSION}, "records": [\n{lines}\n]}}\n')
    if args.recovered:
        draw(recovered, rows, args.recovered)
    if args.perplexity:
        draw(functools.partial(recovered, perplexity=True), rows, args.perplexity)
    if args.losses:
        draw(losses, records, args.losses)


if __name__ == "__main__":
    cli(main)
