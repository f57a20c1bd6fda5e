"""bench/tables.py: seeds become rows, rows become tables and pictures, and the paper's figures are typed as printed."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bench import tables
from data.checkpoint import UserError

ROOT = Path(__file__).parents[1]
PAPER = json.loads((ROOT / "bench" / "paper.json").read_text())
DEMO = ROOT / "assets" / "demo-full.json"


# ----------------------------------------------------------------------------------------------------------------------
# the paper's figures


def test_the_papers_averages_are_the_means_of_its_tasks():
    for number in "257":
        for name, figures in PAPER[number]["rows"].items():  # 39.116 is printed as 39.11
            assert statistics.fmean(figures[:7]) == pytest.approx(figures[7], abs=0.0063), (number, name)


def test_what_two_of_the_papers_tables_share_is_equal():
    column = {
        n: {k: v[t["columns"].index("average")] for k, v in t["rows"].items()} for n, t in PAPER.items() if n != "6"
    }
    for a, b, shared in (("3", "5", 4), ("4", "8", 8), ("2", "4", 4), ("2", "8", 4)):
        both = column[a].keys() & column[b].keys()
        assert len(both) == shared and all(column[a][k] == column[b][k] for k in both)


# ----------------------------------------------------------------------------------------------------------------------
# results files to tables


def result(
    folder: Path, name: str, acc: float, *methods: str, ppl=5.0, tasks=("sums", "pets"), add_bos=True, seqlen=64
) -> Path:
    """A results file as evaluate.py writes it."""
    history = [{"method": m} | ({"sparsity": "2:8"} if m == "wanda" else {}) for m in methods]
    scores = {task: {"acc": acc, "acc_norm": acc, "n": 10} for task in tasks}
    file = folder / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {"ckpt": str(folder / name / "merged.pt"), "history": history, "sparsity": 0.75 * ("wanda" in methods)}
    about |= {"version": 2, "add_bos": add_bos}
    file.write_text(json.dumps(about | {"results": scores, "perplexity": {"text": {"ppl": ppl, "seqlen": seqlen}}}))
    return file


@pytest.mark.parametrize("r, name", [(16, "Wanda + SPP"), (64, "Wanda + SPP r = 64")])
def test_another_rank_than_the_papers_is_a_row_of_its_own(r, name):
    history = [{"method": "full"}, {"method": "wanda", "sparsity": "2:4"}, {"method": "spp", "r": r, "scale": 2.0}]
    assert tables.describe(history) == (name, "2:4")


@pytest.fixture
def two_seeds(tmp_path) -> list[Path]:
    """A dense model, Wanda's and SPP's of two seeds, the latter with its log."""
    files = []
    for seed, (dense, pruned, tuned) in enumerate(((1.0, 0.5, 0.7), (0.9, 0.4, 0.8))):
        folder = tmp_path / str(seed)
        files += [result(folder, "dense", dense, "full"), result(folder, "wanda", pruned, "full", "wanda")]
        files += [result(folder, "spp", tuned, "full", "wanda", "spp")]
        (folder / "spp").mkdir()
        log = [{"step": 0, "val_loss": 2.0 + seed}, {"step": 1, "loss": 9.0}, {"step": 1, "val_loss": 1.0 + seed}]
        log.append({"step": 2, "val_loss": 0.5 + seed})
        (folder / "spp" / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    return files


def test_results_that_cannot_stand_in_one_table_are_refused(tmp_path):
    a = result(tmp_path, "a", 0.5)
    (tmp_path / "not.json").write_text("{}")
    with pytest.raises(UserError, match="not.json: is not a results file"):
        tables.read([a, tmp_path / "not.json"])
    (tmp_path / "old.json").write_text(a.read_text().replace('"version": 2, ', ""))
    with pytest.raises(UserError, match="old.json: has no version, expected 2"):
        tables.read([a, tmp_path / "old.json"])
    with pytest.raises(UserError, match="some results were scored with --add_bos"):
        tables.read([a, result(tmp_path, "b", 0.5, add_bos=False)])
    with pytest.raises(UserError, match="perplexities of text in windows of 128 and of text in windows of 64 cannot"):
        tables.read([a, result(tmp_path, "d", 0.5, seqlen=128)])
    with pytest.raises(UserError, match="of different tasks"):
        tables.read([a, result(tmp_path, "c", 0.5, tasks=("sums",))])


def test_seeds_become_means_spreads_and_the_share_won_back(two_seeds):
    rows = tables.rows_of(tables.read(reversed(two_seeds)))
    assert [r["method"] for r in rows] == ["dense", "Wanda", "Wanda + SPP"]
    assert [r["won back"] for r in rows] == [None, None, pytest.approx((0.75 - 0.45) / (0.95 - 0.45))]
    text = tables.table(rows)
    assert "75.0 ±7.1" in text and "60%" in text and "5.00 ±0.00" in text
    assert tables.bars(rows).splitlines()[-1] == "   2:8 Wanda + SPP " + "█" * 38 + " 75.0"


def test_perplexities_alone_are_a_table_too(tmp_path, monkeypatch, capsys):
    files = [result(tmp_path, "before", 0.5, "wanda", ppl=9.0, tasks=()), result(tmp_path, "after", 0.5, tasks=())]
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, files)])
    tables.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["method", "sparsity", "zeros", "ppl", "won", "back"],
        ["dense", "dense", "0.0%", "5.00"],
        ["Wanda", "2:8", "75.0%", "9.00"],
    ]


def test_less_than_two_points_lost_are_not_won_back(tmp_path):
    files = [result(tmp_path, "dense", 0.5), result(tmp_path, "wanda", 0.481, "wanda")]
    rows = tables.rows_of(tables.read([*files, result(tmp_path, "spp", 0.49, "wanda", "spp")]))
    assert [r["won back"] for r in rows] == [None] * 3


def test_rows_stand_by_sparsity_then_pruner_then_what_followed():
    shown = [(r["sparsity"], r["method"]) for r in tables.rows_of(tables.read([DEMO]))]
    assert list(dict.fromkeys(sparsity for sparsity, _ in shown)) == ["dense", "0.5", "2:4", "0.75", "2:8"]
    after = ["", " + LoRA*", " + SPP", " + masked LoRA", " + masked", " + dynamic"]
    assert [method for sparsity, method in shown if sparsity == "2:8"] == [
        *("SparseGPT" + x for x in after[:3]),
        *("Wanda" + x for x in after),
    ]


def test_what_save_keeps_is_read_as_the_files_it_was_made_of(two_seeds, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "saved.json"
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, two_seeds), "--save", str(saved)])
    tables.main()
    first = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tables.py", str(saved)])
    tables.main()
    assert capsys.readouterr().out == first
    assert tables.read([saved]) == tables.read(two_seeds)


@pytest.mark.parametrize("line", ["[", "3", '{"val_loss": 1}', '{"step": 1, "val_loss": "low"}'])
def test_a_log_that_was_edited_by_hand_is_refused(two_seeds, line):
    path = two_seeds[-1]
    log = Path(json.loads(path.read_text())["ckpt"]).parent / "log.jsonl"
    before = log.read_text()
    log.write_text(before + line + "\n")
    with pytest.raises(UserError, match="is not as evaluate.py wrote it, or the log beside its checkpoint"):
        tables.read([path])
    log.write_text(before)


def test_a_run_that_held_nothing_out_has_no_curve(two_seeds):
    log = two_seeds[2].parent / "spp" / "log.jsonl"
    log.write_text(re.sub(r'"val_loss": [\d.]+', '"val_loss": null', log.read_text()))
    assert [r["val_loss"] for r in tables.read(two_seeds) if "val_loss" in r][0] == []


def test_results_stand_beside_the_papers(tmp_path):
    files = [result(tmp_path / "llama-7b", "wanda_2of8-spp", 0.4, "wanda", "spp", ppl=40.0, tasks=tables.SEVEN)]
    text = tables.beside_paper(files, PAPER["3"])
    assert re.search(r"llama-7b/wanda_2of8-spp +40.00 / 38.61 +40.00 / 42.07", text)
    assert re.search(r"llama-7b/wanda_2of8 +- / 32.53 +- / 3284.43", text)


def test_an_average_over_fewer_tasks_than_the_papers_is_left_out(tmp_path):
    files = [result(tmp_path / "llama-7b", "wanda_2of8-spp", 0.4, "wanda", "spp", ppl=40.0, tasks=tables.SEVEN[:6])]
    assert re.search(r"llama-7b/wanda_2of8-spp +- / 38.61 +40.00 / 42.07", tables.beside_paper(files, PAPER["3"]))


def test_mmlu_stands_beside_the_papers(tmp_path):
    file = result(tmp_path / "llama-7b", "dense", 0.3, tasks=("mmlu_anatomy",))
    content = json.loads(file.read_text())
    content["results"]["mmlu"] = {"acc": 0.25, "n": 10}
    file.write_text(json.dumps(content))
    theirs = PAPER["6"]["rows"]["llama-7b/dense"][0]
    assert re.search(rf"llama-7b/dense +25.00 / {theirs:.2f}", tables.beside_paper([file], PAPER["6"]))


def test_results_of_other_models_than_the_tables_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no file is a row of this table, such as llama-\S+.json"):
        tables.beside_paper([result(tmp_path, "mine", 0.5)], PAPER["5"])


# ----------------------------------------------------------------------------------------------------------------------
# pictures


def test_bars_are_as_high_as_the_rows_accuracy(two_seeds):
    (ax,) = tables.recovered(tables.rows_of(tables.read(two_seeds))).axes
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([45, 75])
    (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed.get_ydata() == pytest.approx([95, 95])
    low, high = ax.collections[1].get_segments()[0][:, 1]  # the second bar's spread
    assert (high - low) / 2 == pytest.approx(statistics.stdev([70, 80]))


def test_curves_are_the_mean_of_the_seeds_after_step_0(two_seeds):
    (ax,) = tables.losses(tables.read(two_seeds)).axes
    assert ax.lines[0].get_xydata().tolist() == [[1, 1.5], [2, 1.0]]
    assert ax.get_title() == "Wanda 2:8: validation loss (pruned: 2.50)"


def test_what_has_no_bars_or_no_curves_is_refused(tmp_path):
    records = tables.read([result(tmp_path, "dense", 0.5)])
    with pytest.raises(UserError, match="--recovered: there is no pruned model"):
        tables.recovered(tables.rows_of(records))
    with pytest.raises(UserError, match="--losses: no model fine-tuned after Wanda"):
        tables.losses(records)


PICTURES = {  # results -> flag: picture, both in assets/
    "demo-full.json": {"recovered": "recovered.svg", "losses": "losses.svg"},
    "smollm2.json": {"perplexity": "smollm2.svg", "recovered": "smollm2_accuracy.svg", "losses": "smollm2_losses.svg"},
}


@pytest.mark.parametrize("results", PICTURES)
def test_the_committed_pictures_are_those_of_the_committed_results(tmp_path, monkeypatch, results):
    """Letters, colours and all that is drawn in the axes; outside them versions of matplotlib place letters differently."""
    flags = [f"--{flag}={tmp_path / name}" for flag, name in PICTURES[results].items()]
    monkeypatch.setattr(sys, "argv", ["tables.py", str(ROOT / "assets" / results), *flags])
    tables.main()
    for name in PICTURES[results].values():
        both = [(folder / name).read_text() for folder in (tmp_path, ROOT / "assets")]
        letters = [re.findall(r">([^<>]+)</text>|(?:fill|stroke): (#\w+)", svg) for svg in both]
        assert letters[0] == letters[1] and len(letters[0]) > 10
        paths = [" ".join(re.findall(r'd="([^"]+)" clip-path', svg)) for svg in both]
        numbers = [[float(x) for x in re.findall(r"[\d.]+", path)] for path in paths]
        least = 40 if name == "smollm2_losses.svg" else 100  # three curves of four points, and the grid
        assert numbers[0] == pytest.approx(numbers[1], abs=0.01) and len(numbers[0]) > least


def test_a_picture_is_the_same_file_each_time(two_seeds, tmp_path):
    rows = tables.rows_of(tables.read(two_seeds))
    for name in "ab":
        tables.draw(tables.recovered, rows, str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_matplotlib_there_is_a_table_and_a_note(tmp_path):
    """As in the environment of `make demo`."""
    code = (
        "import runpy, sys\n"
        "sys.modules['matplotlib'] = None\n"  # an import of it raises ImportError
        "runpy.run_path('bench/tables.py', run_name='__main__')"
    )
    line = [sys.executable, "-c", code, str(DEMO), "--recovered", str(tmp_path / "x.svg")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("method ") and "x.svg is not drawn" in done.stdout.splitlines()[-1]
    assert not (tmp_path / "x.svg").exists()
