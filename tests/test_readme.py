"""What the README promises: it names only what exists, what it shows is what the code does, and its figures are those
that the committed results and the code give."""

import ast
import functools
import json
import os
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from test_memory import needs, together
from test_runs import linears, script

from bench import linear, memory, tables
from model import PRESETS, Llama, load
from spp import METHODS, inject

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REAL = ROOT / "assets" / "smollm2.json"
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
# every command: (file, what follows it), whether in a block or in a sentence
COMMANDS = re.findall(r"(?:python|torchrun(?: --\S+)+) ((?:\w+/)*\w+\.py)(.*)", "\n".join([SHELL, *INLINE]))


def test_files_named_in_the_readme_exist():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    scripts = re.findall(r"\bruns/\w+\.sh", README)
    tests = re.findall(r"tests/\w+\.py|data/\w+/prepare\.py", README)
    named = {
        *links,
        *scripts,
        *tests,
        *(file for file, _ in COMMANDS),
        *(f for f in INLINE if re.fullmatch(r"[\w/]+\.py", f)),
    }
    named -= {"prepare.py"}  # "the `prepare.py` scripts"
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_make_targets_shown_in_the_readme_exist():
    targets = set(re.findall(r"\bmake ([\w-]+)", SHELL + "\n".join(INLINE)))
    assert targets == set(re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split())


def test_imports_run_one_way():
    layers = {"data.checkpoint": 0, "data.tokenizer": 1, "model": 2, "prune": 3, "spp": 3, "evaluate": 3, "train": 4}
    for name, layer in layers.items():
        nodes = list(ast.walk(ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())))
        imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert [other for other in imported if layers.get(other, -1) >= layer] == [], name
        assert not {"tests", "bench"} & {other.split(".")[0] for other in imported}


@pytest.mark.parametrize("file", sorted({file for file, _ in COMMANDS}))
def test_flags_shown_in_the_readme_exist(file):
    shown = {flag for name, rest in COMMANDS if name == file for flag in re.findall(r"--[a-z_]+", rest)}
    source = (ROOT / file).read_text()  # reading it is 20 times as fast as asking --help
    if file == "bench/memory.py":  # it takes train.py's
        source += (ROOT / "train.py").read_text()
    assert [flag for flag in sorted(shown) if f'"{flag}"' not in source] == []


def test_the_code_beside_an_equation_stands_in_the_file_that_the_row_names():
    section = README.split("## The method")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| ([^|]+) \| `([^|`]+)` \|$", section, re.M)
    assert len(rows) == 8
    for where, code in rows:
        file = "prune.py" if "prune.py" in where else "spp.py"
        assert (ROOT / file).read_text().count(code) == 1, code


def test_every_method_has_its_row():
    section = README.split("## The method")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)", section, re.M) == list(METHODS)


def test_the_readmes_python_runs(random_checkpoint, tmp_path, monkeypatch):
    code = re.search(r"```python\n(import torch\nfrom model import.*?)```", README, re.S)[1]
    monkeypatch.chdir(tmp_path)
    names = {"calib": torch.randint(256, (4, 32)).numpy(), "texts": ["bada kimu dogu", "ruku"] * 3}
    exec(code.replace('load("llama-7b", torch.bfloat16)', f'load("{random_checkpoint}")'), names)
    model, tokenizer = load("merged.pt")
    zeros = [(p == 0).float().mean().item() for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    assert zeros == pytest.approx([0.5] * len(zeros)) and tokenizer is not None


# ----------------------------------------------------------------------------------------------------------------------
# figures


def real_table() -> list[str]:
    """The README's table of SmolLM2, from the committed results and, for LLaMA 7B, from the paper's figures."""
    records = tables.read([REAL])
    rows = tables.rows_of(records)
    losses = {}  # (pruner, sparsity, how tuned) -> the loss before, and the lowest, of each seed
    for record in records:
        curve = [loss for _, loss in record.get("val_loss", [])]
        if curve:
            pruner, tuned = tables.parts(record["method"])
            losses.setdefault((pruner, record["sparsity"], "pruned"), [curve[0]])
            losses.setdefault((pruner, record["sparsity"], tuned), []).append(min(curve))
    dense, cells = rows[0], {(row["pruner"], row["sparsity"], row["tuned"]): row for row in rows[1:]}
    assert dense["method"] == "dense" and [*dense["columns"]] == ["arc_easy", "openbookqa", "winogrande", "average"]
    columns = [
        (p, s) for p in ("Wanda", "SparseGPT") for s in ("0.5", "2:4", "0.75", "2:8") if (p, s, "pruned") in cells
    ]
    kinds = [kind for kind in tables.COLOURS if any(cell[2] == kind for cell in cells)]
    titles = [f"{pruner} {sparsity.replace('0.5', '50%').replace('0.75', '75%')}" for pruner, sparsity in columns]

    def block(title: str, show, kinds=kinds) -> list[str]:
        lines = [f"| **{title}** |" + " |" * len(columns)]
        return lines + [f"| {kind} | " + " | ".join(show(*column, kind) for column in columns) + " |" for kind in kinds]

    def perplexity(*cell) -> str:
        values = cells[cell]["ppl"] if cell in cells else []
        more = f" ±{statistics.stdev(values):,.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):,.1f}{more}" if values else ""

    def loss(*cell) -> str:
        return tables.spread(losses.get(cell, []), 3)

    def accuracy(*cell) -> str:
        return tables.spread(cells[cell]["columns"]["average"], 1) if cell in cells else ""

    paper = json.loads((ROOT / "bench" / "paper.json").read_text())

    def of_7b(pruner: str, sparsity: str, kind: str, column: str = "average") -> str:
        name = f"llama-7b/{pruner.lower()}_{sparsity.replace(':', 'of')}"
        name += {"pruned": "", "SPP": "-spp", "LoRA*": "-lora"}[kind]
        found = [t for t in map(paper.get, "235") if name in t["rows"] and column in t["columns"]]
        return f"{found[0]['rows'][name][found[0]['columns'].index(column)]:,.2f}" if found else ""

    average = f"average of ARC-easy, OpenBookQA and WinoGrande, %; dense {dense['columns']['average'][0]:.1f}"
    return [
        f"| | {' | '.join(titles)} |",
        "|---|" + "---|" * len(columns),
        *block(f"perplexity of WikiText-2; dense {dense['ppl'][0]:.1f}", perplexity),
        *block("loss of held-out instructions, a token, prompts included", loss),
        *block(average, accuracy),
        *block(
            f"LLaMA 7B in the paper, average of seven tasks, %; dense {paper['2']['rows']['llama-7b/dense'][-1]:.2f}",
            of_7b,
            ["pruned", "SPP", "LoRA*"],
        ),
        *block("LLaMA 7B in the paper, perplexity", functools.partial(of_7b, column="ppl"), ["pruned", "SPP"]),
    ]


def test_the_real_table_is_that_of_the_committed_results_and_of_the_paper():
    table = real_table()
    start = README.index(table[0])
    assert README[start:].split("\n\n")[0].splitlines() == table


def test_what_is_said_of_the_real_table_holds():
    text = " ".join(README.split())
    rows = {(r["pruner"], r["sparsity"], r["tuned"]): r for r in tables.rows_of(tables.read([REAL]))}
    ppl = lambda *cell: statistics.mean(rows[cell]["ppl"])
    lower = [1 - ppl("SparseGPT", sparsity, "SPP") / ppl("Wanda", sparsity, "SPP") for sparsity in ("0.75", "2:8")]
    assert "at 75% and 2:8 by {:.0%} and {:.0%}".format(*lower) in text
    assert ppl("SparseGPT", "2:4", "SPP") < ppl("Wanda", "2:4", "SPP")
    ahead = {"LoRA*": [], "masked": []}  # of SPP, in points
    for (pruner, sparsity, tuned), row in rows.items():
        if tuned in ahead:
            ahead[tuned].append(row["mean"] - rows[pruner, sparsity, "SPP"]["mean"])
    behind = f"up to {max(ahead['LoRA*']):.1f} points behind LoRA* and {max(ahead['masked']):.1f} behind masked"
    assert f"{behind}, and {-min(min(x) for x in ahead.values()):.1f} before them at best" in text
    pairs = zip(rows["Wanda", "0.75", "LoRA*"]["ppl"], rows["Wanda", "0.75", "SPP"]["ppl"], strict=True)  # by seed
    assert all(theirs > ours for theirs, ours in pairs)
    paper = json.loads((ROOT / "bench" / "paper.json").read_text())
    averages = {name: values[-1] for n in "27" for name, values in paper[n]["rows"].items()}
    tuned = [name for name in averages if re.search("/sparsegpt.*-spp", name)]
    pairs = [(averages[name], averages[name.replace("sparsegpt", "wanda")]) for name in tuned]
    assert f"{sum(a > b for a, b in pairs)} of {len(pairs)} pairs" in text and sum(a < b for a, b in pairs) == 7


def test_the_rates_searched_are_those_of_the_committed_log():
    names = {"spp": "SPP", "lora": "LoRA*", "masked": "masked"}
    lines = [line.split() for line in (ROOT / "assets" / "smollm2_search.txt").read_text().splitlines()]
    expected = {}
    for method, rate, loss in lines:
        expected.setdefault(names[method], []).extend([rate, f"{float(loss):.3f}"])
    assert {row: cells for row, *cells in rows_under("| | rate | loss |")} == expected


def rows_under(header: str) -> list[list[str]]:
    """The cells of the table whose header line begins so."""
    lines = README[README.index(f"\n{header}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def worlds() -> dict[tuple, list[dict]]:
    """(method, sparsity) -> its results in worlds 0, 1 and 2."""
    found = {}
    for record in json.loads((ROOT / "assets" / "demo-full.json").read_text())["records"]:
        record["average"] = 100 * statistics.fmean(record["acc"].values())
        found.setdefault((record["method"], record["sparsity"]), []).append(record)
    assert all(len(records) == 3 and len(records[0]["acc"]) == 6 for records in found.values())
    return found


@pytest.fixture(scope="module")
def average(worlds):
    return {key: statistics.fmean(r["average"] for r in records) for key, records in worlds.items()}


def test_every_cell_of_the_accuracy_table_is_that_of_the_committed_results(worlds):
    def cell(method: str, sparsity: str, what: str, digits: int) -> str:
        values = [record[what] for record in worlds.get((method, sparsity), [])]
        return f"{statistics.fmean(values):.{digits}f} ±{statistics.stdev(values):.{digits}f}" if values else ""

    rows = rows_under("| | dense | 0.5 |")
    methods = [re.sub(r" \(eq. \d\)", "", name) for name, *_ in rows]
    assert set(methods) == {method for method, _ in worlds} and len(methods) == 10
    assert methods[0] == "dense" and rows[0][6:] == [cell("dense", "dense", "ppl", 2).split()[0]] * 2
    for method, (_, *cells) in zip(methods, rows, strict=True):
        accuracies = [cell(method, sparsity, "average", 1) for sparsity in ("dense", "0.5", "2:4", "0.75", "2:8")]
        assert cells[:5] == accuracies, method
        if method != "dense":
            assert cells[5:] == [cell(method, sparsity, "ppl", 2) for sparsity in ("0.75", "2:8")], method


def test_what_is_won_back_at_75_percent_is_that_of_the_committed_results(average):
    text = " ".join(README.split())
    for method, verb in (("SPP", "SPP wins back"), ("LoRA*", r"lost, LoRA\*")):
        shares = []
        for pruned in [(pruner, sparsity) for pruner in ("Wanda", "SparseGPT") for sparsity in ("0.75", "2:8")]:
            lost = average["dense", "dense"] - average[pruned]
            shares.append((average[f"{pruned[0]} + {method}", pruned[1]] - average[pruned]) / lost)
        assert re.search(verb + r" (\d+% to \d+%)", text)[1] == f"{min(shares):.0%} to {max(shares):.0%}"


def test_what_is_said_of_2_of_4_and_of_the_other_methods_holds(worlds, average):
    spread = statistics.stdev(r["average"] for r in worlds["Wanda + SPP", "2:4"])
    assert 0 <= average["Wanda + LoRA*", "2:4"] - average["Wanda + SPP", "2:4"] < spread
    assert abs(average["SparseGPT + SPP", "2:4"] - average["SparseGPT", "2:4"]) < 0.5
    for sparsity in ("0.75", "2:8"):
        order = ("masked", "masked LoRA", "SPP", "dynamic")
        accuracies = [average[f"Wanda + {method}", sparsity] for method in order]
        assert accuracies == sorted(accuracies, reverse=True)
        assert max(abs(a - accuracies[2]) for a in accuracies) < 2


def test_the_demos_rows_are_those_of_world_0(worlds):
    """`make demo` is world 0 of `make demo-full`, with SPP alone."""
    methods = ("dense", "Wanda", "Wanda + SPP", "SparseGPT", "SparseGPT + SPP")
    first = [records[0] for (method, _), records in worlds.items() if method in methods]
    rows = tables.table(tables.rows_of(first)).splitlines()
    shown = re.search(r"```\n(method .*?)\n```", README, re.S)[1].splitlines()
    assert shown == [row for row in rows if re.match(r"method|dense|Wanda.* (2:4|0.75|2:8) ", row)]
    assert len(shown) == 8 and len(rows) == 1 + int(re.search(r"Of its (\d+) rows", README)[1])


def file_name(method: str, sparsity: str) -> str:
    """("Wanda + LoRA*", "2:8") as runs/demo.sh names its results: wanda_2of8-lora."""
    pruner, *tuned = method.lower().replace("*", "").replace("masked lora", "masked_lora").split(" + ")
    return "-".join([pruner if sparsity == "dense" else f"{pruner}_{sparsity.replace(':', 'of')}", *tuned])


@pytest.mark.parametrize("how", ["", "full"])
def test_the_demo_evaluates_what_its_table_shows(how, worlds, tmp_path):
    """runs/demo.sh with a python that does nothing."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nmkdir -p out/demo\n")
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    line = ["sh", str(ROOT / "runs" / "demo.sh"), *how.split()]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    evaluated = re.findall(r"\$ python evaluate.py .*/results_(.*).json", done.stdout)
    if how:
        assert sorted(evaluated) == sorted(3 * [file_name(*key) for key in worlds])
    else:
        assert len(set(evaluated)) == len(evaluated) == int(re.search(r"Of its (\d+) rows", README)[1])


def test_gpu_hours_and_trainings_are_those_of_the_scripts():
    rows = rows_under("| | models | trainings |")
    models = {}
    for table, named, trainings, hours in rows:
        number = table[len("Table ")]
        header = (ROOT / f"runs/table{number}.sh").read_text().replace("\n# ", " ")
        counts = [int(re.match(r"\d+", cell)[0]) for cell in (trainings, hours)]
        assert "{} trainings; about {} A100 GPU-hours".format(*counts) in header, table
        models[number] = re.search(r"MODELS:-(.*)}", header)[1].split()
        sizes = [model.split("-")[-1].upper() for model in models[number]]
        if number != "6":
            shown = [sizes[0], sizes[-1]] if " to " in named else sizes
            assert re.findall(r"\d+B", named) == shown and ("LLaMA-2" in named) == (number == "7"), table
    assert [table[:7] for table, *_ in rows] == [f"Table {number}" for number in range(2, 9)]
    assert models["6"] == models["2"] + models["7"]
    trainings = {table[6]: cell for table, _, cell, _ in rows}
    assert trainings["6"] == f"{int(trainings['2']) + int(trainings['7'])} (those of 2 and 7)"


def test_table_6_takes_its_evaluations_alone_after_tables_2_and_7():
    """MMLU's 2.6 million tokens, 2 FLOPs a weight, 40% of 312 TFLOP/s: the assumptions of runs/paper.sh."""
    models = [re.search(r"/(llama-[\w-]+)/", line[-1])[1] for line in script("6") if "evaluate.py" in line]
    weights = sum(models.count(model) * linears(model) for model in set(models))
    hours = weights * 2 * 2.6e6 / (0.4 * 312e12) / 3600
    assert f"; {hours:.0f} after Tables 2 and 7 |" in README


def test_sizes_are_those_of_the_presets():
    def size(module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        llama = {name: Llama(PRESETS[name]) for name in ("llama-7b", "llama-2-70b")}
    text = " ".join(README.split())
    assert f"block shapes in bfloat16 ({2 * size(llama['llama-2-70b'].model.layers[0]) / 1e9:.2f} GB each)" in text
    hessian = 4 * PRESETS["llama-2-70b"].intermediate_size ** 2  # float32, inputs x inputs
    assert f"whose Hessian of down_proj alone is {hessian / 1e9:.1f} GB" in text
    inject(llama["llama-7b"], r=16)
    learned = sum(p.numel() for p in llama["llama-7b"].parameters() if p.requires_grad)
    assert f"with r = 16 it learns {learned / size(llama['llama-7b']):.2%} of a 7B model" in text


@pytest.mark.parametrize("rows", [slice(1), pytest.param(slice(1, None), marks=pytest.mark.stress)], ids=str)
def test_memory_of_each_gpu_is_what_bench_memory_counts(rows):
    table = rows_under("| | memory of each GPU |")
    assert len(table) == 5
    for what, *cells in table[rows]:
        size = re.search(r"(\d+)B", what)[1]
        flags = ["--preset", f"llama-{'2-' * ('LLaMA-2' in what)}{size}b", "--dtype", "bfloat16", "--data", "none"]
        if "eight GPUs" in what:
            flags += ["--fsdp", "--processes", "8"]
        for cell, more in zip(cells, ([], ["--activation_checkpointing"]), strict=True):
            if cell:
                assert cell == f"{together(needs(*flags, *more)):.1f} GB", what


@pytest.mark.parametrize("columns", [slice(2, 3), pytest.param(slice(6), marks=pytest.mark.stress)], ids=str)
def test_what_fits_one_gpu_is_what_bench_memory_counts(columns):
    named = [(method, form) for method in ("spp", "masked") for form in memory.FORMS]
    table = {preset: cells for preset, *cells in rows_under("| | `spp`, dense | `spp`, packed, 2:4 |")}
    assert len(table) == 5
    presets = table if columns.start is None else ["llama-7b", "llama-2-70b"]
    for preset in presets:
        cells = [memory.cell(preset, *column) for column in named[columns]]
        assert cells == table[preset][columns], preset
    *trained, scored = rows_under("| | otherwise | so | by |")
    claimed = [(float(otherwise), float(so)) for _, otherwise, so, _ in trained]
    with torch.device("meta"):
        weights = sum(p.numel() for p in Llama(PRESETS["llama-2-70b"]).parameters()) * 2 / 1e9
    assert scored[1].startswith(f"{weights:.1f} ") and f"{scored[2]} GB for LLaMA-2 70B" in " ".join(README.split())
    cells = [("llama-2-70b", 0, 2), ("llama-7b", 0, 1), ("llama-7b", 3, 4)]
    sizes = [[float(table[preset][i].split(":")[0]) for i in (dense, packed)] for preset, dense, packed in cells]
    assert [list(pair) for pair in claimed] == sizes
    cards = [table[preset][packed].split(": ")[1] for preset, _, packed in cells]
    assert cards == ["80 GB", "12 GB", "80 GB"]  # what is claimed


def test_units_and_bytes_kept_of_a_layer_are_as_counted():
    """And its times' ratios as divided."""
    shape = re.search(r"T = ([\d,]+) tokens, n = ([\d,]+), m = ([\d,]+)", README.replace("\n", " ")).groups()
    T, n, m = (int(size.replace(",", "")) for size in shape)
    x, g = torch.randn(T, n, requires_grad=True), torch.randn(T, m)
    rows = rows_under("| | units | kept / mn |")
    floor = float(rows[1][3])
    for form, (_, units, kept, ms, ratio) in zip(linear.FORMS, rows, strict=True):
        layer = linear.make(form, m, n, torch.float32, "cpu")
        assert units == f"{linear.units(layer, x, g):.2f}", form
        assert kept == f"{linear.saved_bytes(layer, x) / (4 * m * n):.3f}", form
        assert ratio == f"{float(ms) / floor:.2f}", form


def test_ratios_to_lm_eval_are_those_of_the_times():
    rows = rows_under("| task | documents |")
    assert len(rows) == 3
    for task, _, *times, ratio in rows:
        ours, *theirs = (float(time.removesuffix(" s")) for time in times)
        # the ratio is that of the times before they were rounded to 0.1 s
        assert (min(theirs) - 0.05) / (ours + 0.05) <= float(ratio) <= (min(theirs) + 0.05) / (ours - 0.05), task


def test_requirements_are_those_named():
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert set(names) == {"torch", "numpy", "sentencepiece", "tqdm"}
    assert "PyTorch, NumPy, sentencepiece, tqdm, nothing else" in " ".join(README.split())
    loads = re.search(r"transformers ([\d.]+) loads it", README)[1]
    assert f"transformers=={loads}." in (ROOT / "requirements-dev.txt").read_text()


def test_dynamic_masks_change_as_often_as_is_said():
    default = re.search(r'"--mask_interval".*?default=(\d+)', (ROOT / "train.py").read_text(), re.S)[1]
    assert f"a new mask every {default} steps" in README
