"""What prune.py promises: the official masks, exactly the number asked for, the same bytes after any kill."""

import copy
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, needs_shared

import prune
from data.checkpoint import VERSION, UserError, lock_partial, open_checkpoint
from model import PRESETS, Block, Llama, cli, load, open_llama, rope_tables, save
from prune import METHODS, Settings, Statistics, format_sparsity, gather_statistics, keep_mask, parse_sparsity
from prune import prune_model, sparsegpt
from spp import inject


def targets(model: Llama) -> dict[str, torch.Tensor]:
    return {name: p.data for name, p in model.named_parameters() if name.endswith("_proj.weight")}


def official_mask(run, name: str) -> np.ndarray:
    """The mask, True = kept, that an official code gave a linear's weight; `run` is an .npz of packed bits."""
    shape = run[f"shape/{name}"]
    return np.unpackbits(run[f"mask/{name}"])[: shape.prod()].reshape(shape).astype(bool)


@pytest.fixture(scope="module")
def calib():
    return np.random.default_rng(0).integers(0, 200, (6, 48), dtype=np.int32)


@pytest.fixture
def model(random_checkpoint):
    return load(random_checkpoint)[0]


# ----------------------------------------------------------------------------------------------------------------------
# against the official codes, on a real model


def test_float32_means_float32_whatever_the_caller_has_set(model, calib):
    """TF32 on a GPU, bfloat16 on a CPU that has it: a Hessian would keep three digits."""
    twin = copy.deepcopy(model)
    prune_model(twin, calib, "sparsegpt", "0.5")
    torch.set_float32_matmul_precision("medium")
    try:
        prune_model(model, calib, "sparsegpt", "0.5")
        assert torch.get_float32_matmul_precision() == "medium"
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # the newer switch, after which the older one cannot be read
        prune_model(copy.deepcopy(twin), calib[:1], "wanda", "0.75")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(w.equal(targets(twin)[name]) for name, w in targets(model).items())


@needs_shared
@pytest.mark.parametrize(
    "run, method, sparsity, dsnot, agreement",
    [
        ("wanda_0.5", "wanda", "0.5", 0, 1.0),
        ("wanda_2of4", "wanda", "2:4", 0, 1.0),
        ("magnitude_2of4", "magnitude", "2:4", 0, 1.0),
        ("magnitude_0.5", "magnitude", "0.5", 0, None),  # the official threshold removes one more of each matrix
        ("sparsegpt_0.5", "sparsegpt", "0.5", 0, 0.998),
        ("sparsegpt_2of4", "sparsegpt", "2:4", 0, 0.9999),
        ("dsnot_wanda_cyc4_2of4", "wanda", "2:4", 4, 0.9999),
        ("dsnot_sparsegptfix_cyc4_2of4", "sparsegpt", "2:4", 4, 0.9999),
        ("dsnot_wanda_cyc4_0.5", "wanda", "0.5", 4, 0.975),
    ],
)
def test_masks_and_perplexity_are_the_official_codes(run, method, sparsity, dsnot, agreement):
    reference = json.loads((SHARED / "prune_reference.json").read_text())["perplexity"][run]
    model, _ = load(SHARED / "stories260K" / "hf")
    prune_model(model, np.load(SHARED / "prune" / "calib_c4.npy"), method, sparsity, dsnot)
    official = np.load(SHARED / "prune" / f"{run}.npz")
    equal, differences = [], set()
    for name, w in targets(model).items():
        mask, ours = official_mask(official, name), (w != 0).numpy()
        equal.append((mask == ours).ravel())
        differences.add(((ours & ~mask).sum(), (mask & ~ours).sum()))  # kept by us alone, by the official code alone
        if f"val/{name}" in official and (mask == ours).all():
            np.testing.assert_allclose(w.numpy()[mask], official[f"val/{name}"], atol=1e-5)
    if agreement is None:
        assert differences == {(1, 0)}
    else:
        assert np.concatenate(equal).mean() >= agreement
    for text in ("wiki", "story"):
        tokens = torch.from_numpy(np.load(SHARED / "prune" / f"eval_{text}.npy")).long()
        with torch.no_grad():
            ppl = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:]).exp().item()
        if agreement == 1.0 or sparsity == "2:4":
            assert ppl == pytest.approx(reference[text], abs=6e-4, rel=2e-6)  # printed to 3 digits; float32
        elif not dsnot:
            assert ppl == pytest.approx(reference[text], rel=0.01)


@needs_shared
@torch.no_grad()
def test_dsnot_equals_the_official_code_on_every_row_whose_lists_do_not_run_out(monkeypatch):
    """Each block is given the official run's inputs; a row is clean if both its lists hold a candidate for each cycle."""
    calls, dsnot, cycles = [], prune.dsnot, 4

    def remember(W, initial, score, s, *settings):
        d = W * s.total
        calls.append(((initial & (d > 0)).sum(1) >= cycles) & ((initial & (d < 0)).sum(1) >= cycles))
        return dsnot(W, initial, score, s, *settings)

    monkeypatch.setattr(prune, "dsnot", remember)
    official = np.load(SHARED / "prune" / "dsnot_wanda_cyc4_0.5.npz")
    model, _ = load(SHARED / "stories260K" / "hf")
    x = model.model.embed_tokens(torch.from_numpy(np.load(SHARED / "prune" / "calib_c4.npy")).long())
    tables = prune.rope_tables(model.config, torch.arange(x.shape[1]), x.dtype)
    clean_rows = rows = 0
    for i, block in enumerate(model.model.layers):
        weights = [name for name, _ in block.named_parameters() if name.endswith("_proj.weight")]
        ours = copy.deepcopy(block)
        prune.prune_block(ours, i, x.clone(), prune.Settings("wanda", 0.5, cycles), tables, 8)
        for name in weights:
            mask = torch.from_numpy(official_mask(official, f"model.layers.{i}.{name}"))
            clean = torch.ones(len(mask), dtype=torch.bool)
            if "self_attn" in name:
                clean = calls.pop(0)
                clean_rows += clean.sum().item()
                rows += len(clean)
            assert (ours.get_parameter(name) != 0)[clean].equal(mask[clean]), f"layers.{i}.{name}"
            block.get_parameter(name).mul_(mask)
        prune.run_block(block, x, tables, 8)
    assert rows == 960 and clean_rows > 800


@needs_shared
def test_sparsegpt_errs_less_than_wanda_and_wanda_less_than_magnitude():
    errors = {}
    for method in METHODS:
        model, _ = load(SHARED / "stories260K" / "hf")
        report = prune_model(model, np.load(SHARED / "prune" / "calib_c4.npy"), method, "2:4")
        errors[method] = np.mean([line["error"] for line in report if line["layer"].startswith("layers.0.")])
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


# ----------------------------------------------------------------------------------------------------------------------
# against formulas and exhaustive search


def best_rows(score: torch.Tensor, keep: int) -> torch.Tensor:
    """Of all ways to keep `keep` entries of each row the one of the largest score, by trying them all."""
    rows = []
    for row in score:
        choice = max(itertools.combinations(range(len(row)), keep), key=lambda c: sum(row[i].item() for i in c))
        rows.append([i in choice for i in range(len(row))])
    return torch.tensor(rows)


def test_masks_keep_the_best_of_all_choices():
    score = torch.rand(6, 8)
    assert keep_mask(score, 0.5).equal(best_rows(score, 4))
    assert keep_mask(score, 0.3).equal(best_rows(score, 6))
    assert keep_mask(score, (2, 4)).equal(best_rows(score.view(-1, 4), 2).view(6, 8))
    assert keep_mask(score, (1, 4)).equal(best_rows(score.view(-1, 4), 1).view(6, 8))
    assert keep_mask(score[:2], 0.5, whole=True).equal(best_rows(score[:2].view(1, -1), 8).view(2, 8))


def kept_by_rank(score: torch.Tensor, k: int) -> torch.Tensor:
    """All but the k lowest of each row, every score held against every other: a score's rank is the number of those
    that go before it, the lower ones and the equal ones to its left."""
    rows = []
    for row in score.tolist():
        ranks = [sum((b, j) < (a, i) for j, b in enumerate(row)) for i, a in enumerate(row)]
        rows.append([rank >= k for rank in ranks])
    return torch.tensor(rows)


@pytest.mark.parametrize("n, m", [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4), (2, 5), (3, 6)])
def test_of_every_group_with_ties_the_kept_are_those_of_the_highest_rank(n, m):
    """All groups of m scores out of three values, so that every way to tie is among them, side by side in one row."""
    groups = torch.tensor(list(itertools.product((0.0, 0.5, 2.0), repeat=m)))  # (3**m, m)
    expected = kept_by_rank(groups, m - n)
    assert (expected.sum(1) == n).all()
    assert keep_mask(groups, (n, m)).equal(expected)
    assert keep_mask(groups.view(1, -1), (n, m), whole=True).view(-1, m).equal(expected)
    assert keep_mask(groups.view(3, -1), (n, m)).view(-1, m).equal(expected)  # a row of groups after the other


@pytest.mark.parametrize("values", (1, 2, 5, 10**6))
def test_rows_and_whole_matrices_keep_the_highest_ranks_and_the_number_is_exact(values):
    """values: how many different scores there are but for their sign, from one (0 and -0, which tie) to so many that none
    does."""
    torch.manual_seed(0)
    score = torch.randint(values, (10, 24)) * torch.randn(10, 24).sign()
    for sparsity in (0.0, 0.01, 0.05, 0.25, 0.5, 0.7, 0.99):
        kept = keep_mask(score, sparsity)
        assert kept.equal(kept_by_rank(score, int(24 * sparsity)))
        assert ((~kept).sum(1) == int(24 * sparsity)).all()
        whole = keep_mask(score, sparsity, whole=True)
        assert whole.equal(kept_by_rank(score.view(1, -1), int(240 * sparsity)).view(10, 24))
        assert (~whole).sum() == int(240 * sparsity)


def test_groups_of_more_than_256_are_kept_exactly():
    assert keep_mask(torch.rand(4, 1024), (300, 512)).view(-1, 512).sum(1).tolist() == [300] * 8


def test_sparsegpt_equals_the_column_by_column_formula_in_float64():
    torch.manual_seed(0)
    X, W = torch.randn(200, 24) @ torch.randn(24, 24), torch.randn(10, 24)
    H = 2 * X.T @ X / 5
    U = prune.cholesky_factor(H.clone(), "test", print)
    for sparsity in (0.5, (2, 4), (2, 8), (1, 3)):  # a slab of 16 columns is no whole number of groups of 3
        ours = sparsegpt(W, torch.zeros(24, dtype=torch.bool), U, sparsity, slab=16)
        # one column after the other on the inverse of what is left of the Hessian, no factorisation
        D, w = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(24), W.double()
        keep = ours != 0
        for j in range(24):
            inverse = torch.linalg.inv(D[j:, j:])
            err = w[:, j] * ~keep[:, j] / inverse[0, 0]
            w[:, j:] -= err[:, None] * inverse[0]
            w[:, j] *= keep[:, j]
        torch.testing.assert_close(ours.double(), w, atol=1e-4, rtol=1e-3)
        if isinstance(sparsity, tuple):
            assert (keep.view(-1, sparsity[1]).sum(1) == sparsity[0]).all()
        else:
            assert [(~keep[:, a:b]).sum().item() for a, b in ((0, 16), (16, 24))] == [80, 40]


def test_dsnot_equals_the_rule_written_out_for_one_row():
    torch.manual_seed(0)
    for sparsity in (0.5, (2, 4)):
        W, square, total, variance = torch.randn(40, 32), torch.rand(32), torch.randn(32), torch.rand(32) + 0.1
        s = Statistics(square, None, total, variance)
        score = W.abs() * square.sqrt()
        mask = keep_mask(score, sparsity)
        ours = prune.dsnot(W, mask, score, s, sparsity, 6, 0.1)
        for i in range(40):
            assert ours[i].tolist() == dsnot_row(W[i], mask[i], score[i], s, sparsity, 6, 0.1)
        assert ours.sum() == mask.sum() and not ours.equal(mask)


def test_dsnot_ends_when_no_row_is_left(monkeypatch):
    def once(cycles):
        yield 0
        pytest.fail("another cycle")

    monkeypatch.setattr(prune, "range", once, raising=False)
    W = torch.randn(4, 8)
    s = Statistics(torch.rand(8), None, torch.randn(8), torch.rand(8) + 0.1)
    mask = keep_mask(W.abs(), 0.5)
    assert prune.dsnot(W, mask, W.abs(), s, 0.5, 50, math.inf).equal(mask)


def dsnot_row(w, mask, score, s, sparsity, cycles, threshold) -> list[bool]:
    """The mask of one row after DSnoT's swaps, by lists. d: what removing a weight takes from the expected output."""
    d, mask = (w * s.total).tolist(), mask.tolist()
    gain = [x / v for x, v in zip(d, s.variance.tolist(), strict=True)]
    growable = [i for i, kept in enumerate(mask) if not kept]
    prunable = [i for i, kept in enumerate(mask) if kept]
    error = sum(d[i] for i in growable)
    for _ in range(cycles):
        grow = max(growable, key=lambda i: gain[i] if error > 0 else -gain[i], default=None)  # noqa: B023
        if grow is None:
            break
        if isinstance(sparsity, tuple):
            candidates = [i for i in prunable if i // sparsity[1] == grow // sparsity[1]]
        else:
            candidates = [i for i in prunable if (d[i] < 0 if error > 0 else d[i] > 0)]
        if not candidates:
            break
        prune = min(candidates, key=lambda i: score[i].item())
        after = error + d[prune] - d[grow]
        if abs(error) <= threshold or (isinstance(sparsity, tuple) and after * error <= 0):
            break
        mask[grow], mask[prune] = True, False
        error = after
        growable.remove(grow)
        prunable.remove(prune)
    return mask


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dsnot", (0, 5))
@pytest.mark.parametrize("sparsity", ("0.5", "0.75", "0.3", "2:4", "4:8", "2:8", "1:4"))
def test_every_method_reaches_every_pattern_exactly(model, calib, method, dsnot, sparsity):
    before = {name: p.clone() for name, p in model.named_parameters() if not name.endswith("_proj.weight")}
    prune_model(model, calib, method, sparsity, dsnot)
    pattern = parse_sparsity(sparsity)
    for w in targets(model).values():
        assert not w[w == 0].signbit().any()  # a zero of the other sign would be stored as a survivor
        if isinstance(pattern, tuple):
            assert ((w.view(-1, pattern[1]) != 0).sum(1) == pattern[0]).all()
        elif method == "wanda" or dsnot:
            assert ((w == 0).sum(1) == int(w.shape[1] * pattern)).all()
        else:  # over the matrix; SparseGPT over slabs of 128 columns, which here is the same
            assert (w == 0).sum() == int(w.numel() * pattern)
    assert all(p.equal(before[name]) for name, p in model.named_parameters() if name in before)


def test_an_input_that_is_always_zero_loses_its_column(model, calib):
    model.model.layers[0].input_layernorm.weight.data[3] = 0
    prune_model(model, calib, "sparsegpt", "2:4")
    assert not model.model.layers[0].self_attn.q_proj.weight[:, 3].any()


@pytest.mark.parametrize("sparsity, pattern", [("0.5", 0.5), ("2:4", (2, 4)), (0.5, 0.5), ((2, 4), (2, 4))])
def test_sparsity_may_be_text_a_share_or_a_pair(random_checkpoint, model, calib, sparsity, pattern):
    assert parse_sparsity(sparsity) == pattern == parse_sparsity(format_sparsity(pattern))
    as_text = load(random_checkpoint)[0]
    prune_model(as_text, calib, "wanda", format_sparsity(pattern))
    prune_model(model, calib, "wanda", sparsity)
    assert all(w.equal(targets(as_text)[name]) for name, w in targets(model).items())
    assert model.history == as_text.history == [{"method": "wanda", "sparsity": format_sparsity(pattern)}]


def test_what_was_done_is_added_to_the_models_history(model, calib):
    model.history = [{"method": "full"}]
    prune_model(model, calib, "sparsegpt", lambda name: 0.5, dsnot_cycles=3, dsnot_threshold=0.2)
    step = {"method": "sparsegpt", "sparsity": "by layer", "dsnot_cycles": 3, "dsnot_threshold": 0.2}
    assert model.history == [{"method": "full"}, step]


def test_sparsity_may_be_a_function_of_the_layers_name(model, calib):
    prune_model(model, calib, "wanda", lambda name: "mlp=0.25,1:4" if "mlp" in name else (1, 4))
    for name, w in targets(model).items():
        assert (w == 0).float().mean().item() == pytest.approx(0.25 if "mlp" in name else 0.75)


def test_the_readmes_new_pruning_score_prunes_by_its_formula(model, calib):
    """The lines under "Fork it", as they stand in the README, put into prune.py where it says."""
    code = (ROOT / "README.md").read_text().split("[`prune.py`](prune.py): its name")[1].split("```python\n")[1]
    names, branch = code.split("```")[0].split("\n\n")
    before, _, rest = (ROOT / "prune.py").read_text().partition("METHODS = ")
    source = before + names + rest[rest.index("\n") :]
    before, function, rest = source.partition("def score_weights(")
    fork = types.ModuleType("fork")
    exec(before + function + rest.replace("    return ", f"{branch.rstrip()}\n    return ", 1), vars(fork))

    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.from_numpy(calib).long()))
    W = model.model.layers[0].self_attn.q_proj.weight.data.clone()
    score = W.abs() * (x.square().sum((0, 1)) / len(calib)) ** 0.25
    fork.prune_model(model, calib, "softer", "2:4")
    mask = model.model.layers[0].self_attn.q_proj.weight != 0
    assert mask.equal(keep_mask(score, (2, 4))) and not mask.equal(keep_mask(W.abs(), (2, 4)))


def test_later_blocks_see_the_pruned_blocks_before_them(model, calib):
    """Wanda on two blocks, the second's statistics taken by hand from the pruned first."""
    x = model.model.embed_tokens(torch.from_numpy(calib).long())
    original = model.model.layers[1].self_attn.q_proj.weight.data.clone()
    prune_model(model, calib, "wanda", "2:4")
    tables = prune.rope_tables(model.config, torch.arange(48), x.dtype)
    x = model.model.layers[1].input_layernorm(model.model.layers[0](x, *tables))
    score = original.abs() * x.square().sum((0, 1)).sqrt()
    assert (model.model.layers[1].self_attn.q_proj.weight != 0).equal(keep_mask(score, (2, 4)))


# ----------------------------------------------------------------------------------------------------------------------
# on disk


def command(ckpt, out, calib_file, *flags) -> list[str]:
    line = ("--ckpt", ckpt, "--calib", calib_file, "--out", out, "--device", "cpu", *flags)
    return [str(word) for word in line]


def run(*args):
    line = [sys.executable, str(ROOT / "prune.py"), *command(*args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The command in this process: a function that returns its exit status and what it printed to stderr."""

    def run_here(*args):
        monkeypatch.setattr(sys, "argv", ["prune.py", *command(*args)])
        try:
            cli(prune.main)
        except SystemExit as e:
            return e.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run_here


@pytest.fixture(scope="module")
def calib_file(tmp_path_factory, calib):
    path = tmp_path_factory.mktemp("calib") / "calib.npy"
    np.save(path, calib)
    return path


@pytest.mark.parametrize("method", ("wanda", "sparsegpt"))
def test_the_command_prunes_as_the_function_does(random_checkpoint, model, calib, calib_file, tmp_path, method):
    prune_model(model, calib, method, "2:4")
    for out in (tmp_path / "pruned.pt", tmp_path / "pruned"):
        result = run(random_checkpoint, out, calib_file, "--method", method)
        assert result.returncode == 0, result.stderr
        pruned = open_checkpoint(out)
        assert all(pruned[name].equal(w) for name, w in model.state_dict().items())
        assert pruned.history[-1]["sparsity"] == "2:4" and pruned.tokenizer
        report = json.loads((tmp_path / "pruned.json" if out.suffix else out / "prune.json").read_text())
        assert report["version"] == VERSION and len(report["layers"]) == 14
        assert report["kinds"]["q_proj"]["sparsity"] == 0.5 and "q_proj" in result.stdout
        assert not Path(f"{out}.partial").exists() and not list(tmp_path.rglob(".*"))


KILLED = """
import os, signal, sys, prune

left = int(sys.argv.pop(1))
replace = os.replace

def counted(tmp, path):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    replace(tmp, path)

os.replace = counted
prune.main()
"""


# A run renames in turn: the job; for each of two blocks its shard, then the inputs of the next; the last shard; the
# report; and a .pt result, which then are moved. A life of n is killed before its rename n + 1; 99 is the last.
@pytest.mark.parametrize(
    "name, lives",
    [
        ("killed", (3, 99)),
        ("killed.pt", (8, 99)),
        *(pytest.param(name, (n, 99), marks=pytest.mark.stress) for name in ("killed", "killed.pt") for n in range(7)),
        *(pytest.param("killed.pt", (n, 99), marks=pytest.mark.stress) for n in (7, 9)),
        pytest.param("killed", (2, 3, 2, 99), marks=pytest.mark.stress),
        pytest.param("killed.pt", (3, 4, 4, 99), marks=pytest.mark.stress),
        pytest.param("killed.pt", (*[1] * 8, 99), marks=pytest.mark.stress),
    ],
)
def test_a_run_killed_before_any_of_its_renames_ends_with_the_same_bytes(
    random_checkpoint, calib_file, tmp_path, run_here, name, lives
):
    flags = ("--method", "sparsegpt", "--sparsity", "0.5")
    out, whole = tmp_path / "one" / name, tmp_path / "two" / name
    assert run_here(random_checkpoint, whole, calib_file, *flags) == (0, "")
    statuses = []
    for life in lives:
        line = [sys.executable, "-c", KILLED, str(life), *command(random_checkpoint, out, calib_file, *flags)]
        statuses.append(subprocess.run(line, cwd=ROOT, capture_output=True, timeout=120).returncode)
    assert statuses == [-signal.SIGKILL] * (len(lives) - 1) + [0]
    ours, expected = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (out.parent, whole.parent)
    )
    assert ours.keys() == expected.keys()
    assert [file for file in ours if ours[file] != expected[file]] == []


def test_a_run_killed_while_it_clears_away_leaves_nothing_that_another_command_takes(
    random_checkpoint, calib_file, tmp_path, run_here, monkeypatch
):
    rmtree = shutil.rmtree

    def killed(folder, **options):
        if Path(folder).name != "out.pt.partial":
            return rmtree(folder, **options)  # Python's own temporary directories end here too
        (folder / "job.json").unlink()
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(prune.shutil, "rmtree", killed)
        assert run_here(random_checkpoint, tmp_path / "out.pt", calib_file, "--method", "wanda")[0] == 2
    for out in ("out.pt", "alone/out.pt"):
        assert run_here(random_checkpoint, tmp_path / out, calib_file, "--method", "magnitude") == (0, "")
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "alone" / "out.pt").read_bytes()


def test_what_is_saved_behind_the_work_is_of_its_own_block(
    random_checkpoint, calib_file, tmp_path, run_here, monkeypatch
):
    """A block overwrites its inputs; those of the last one may still be on their way to the disk."""
    save_inputs, saved = prune.save_inputs, {}

    class AtOnce(ThreadPoolExecutor):
        def submit(self, *args):
            future = super().submit(*args)
            future.result()
            return future

    def late(work, i, x, *rest):
        time.sleep(1)
        saved.setdefault(i, []).append(x.clone())
        save_inputs(work, i, x, *rest)

    monkeypatch.setattr(prune, "save_inputs", late)
    for kind, out in ((AtOnce, "one.pt"), (ThreadPoolExecutor, "two.pt")):
        monkeypatch.setattr(prune, "ThreadPoolExecutor", kind)
        assert run_here(random_checkpoint, tmp_path / out, calib_file, "--method", "wanda") == (0, "")
    assert saved and all(one.equal(two) for one, two in saved.values())


def test_inputs_that_cannot_be_saved_end_the_run_and_the_next_one_goes_on(
    random_checkpoint, calib_file, tmp_path, run_here, monkeypatch
):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    flags, out = ("--method", "wanda"), tmp_path / "out.pt"
    with monkeypatch.context() as patch:
        patch.setattr(prune, "save_inputs", full)
        status, error = run_here(random_checkpoint, out, calib_file, *flags)
    assert status == 2 and "No space left on device" in error and len(error.splitlines()) == 1 and not out.exists()
    assert run_here(random_checkpoint, out, calib_file, *flags) == (0, "")


HOLD = """
import sys
from pathlib import Path
from data.checkpoint import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_in_the_same_partial_result_is_refused(random_checkpoint, calib_file, tmp_path, run_here):
    out, work = tmp_path / "out", tmp_path / "out.partial"
    line = [sys.executable, "-c", HOLD, work]
    with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        status, error = run_here(random_checkpoint, out, calib_file)
        assert status == 2 and f"{work}: another run is at work in it" in error and len(error.splitlines()) == 1
        assert [path.name for path in work.iterdir()] == [".lock"] and not out.exists()
        first.kill()  # in whatever way it ends, the lock ends with it
    assert run_here(random_checkpoint, out, calib_file) == (0, "")


@pytest.mark.parametrize("name", ("out.pt", pytest.param("out", marks=pytest.mark.stress)))
def test_of_two_commands_at_once_one_prunes_and_the_other_says_why_it_does_not(
    random_checkpoint, calib_file, tmp_path, name
):
    line = [sys.executable, ROOT / "prune.py", *command(random_checkpoint, tmp_path / name, calib_file)]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    statuses = [process.returncode for process in both]
    assert sorted(statuses) in ([0, 2], [0, 0]), said  # 0, 0: the second began after the first had ended
    for status, error in zip(statuses, said, strict=True):
        assert len(error.splitlines()) == (status == 2), error
        assert status == 0 or "another run is at work" in error or "directory is not empty" in error
    assert open_llama(tmp_path / name)[0].history[-1]["sparsity"] == "2:4"
    left = [path.name for path in (tmp_path / f"{name}.partial").glob("*")]
    assert left in ([], [".lock"])  # the lock's file, where the second came right after the first


def test_a_result_that_another_run_has_written_meanwhile_is_seen_before_any_work(
    random_checkpoint, calib_file, tmp_path, run_here, monkeypatch
):
    def late(work, others):
        (tmp_path / "out" / "config.json").mkdir(parents=True)
        return lock_partial(work, others)

    monkeypatch.setattr(prune, "lock_partial", late)
    status, error = run_here(random_checkpoint, tmp_path / "out", calib_file)
    assert status == 2 and "the directory is not empty" in error
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == [".lock"]


BY_NAME = {  # text -> the share of zeros of each linear that is looked at
    "mlp=0.25,self_attn=1:4": {"layers.0.mlp.up_proj": 0.25, "layers.1.self_attn.k_proj": 0.75},
    "2:4,mlp=0.25,layers.1.mlp=0": {
        "layers.0.self_attn.q_proj": 0.5,
        "layers.0.mlp.up_proj": 0.25,
        "layers.1.mlp.up_proj": 0,
    },
    "layers.1.mlp=0,mlp=0.75,0.5": {"layers.1.mlp.up_proj": 0.75, "layers.1.self_attn.o_proj": 0.5},
    "up_proj=0.75, layers.0 = 0.25, 2:4": {"layers.0.mlp.up_proj": 0.25, "layers.1.mlp.up_proj": 0.75},
}


@pytest.mark.parametrize("text", BY_NAME)
def test_sparsity_may_be_given_by_name(random_checkpoint, calib_file, calib, model, tmp_path, run_here, text):
    prune_model(model, calib, "wanda", text)
    assert parse_sparsity(model.history[-1]["sparsity"]) == parse_sparsity(text)
    assert run_here(random_checkpoint, tmp_path / "out", calib_file, "--sparsity", text) == (0, "")
    ckpt = open_checkpoint(tmp_path / "out")
    assert ckpt.history[-1]["sparsity"] == model.history[-1]["sparsity"]
    for name, share in BY_NAME[text].items():
        for w in (ckpt[f"model.{name}.weight"], model.get_submodule(f"model.{name}").weight):
            assert (w == 0).float().mean().item() == share


@pytest.mark.parametrize(
    "text, words",
    [
        ("mlp=0.6", "says nothing of layers.0.self_attn.q_proj, nor of the rest"),
        ("mpl=0.6,0.5", "--sparsity mpl: is a part of no linear's name, such as layers.0.self_attn.q_proj"),
        ("layers.2=0.6,0.5", "--sparsity layers.2: is a part of no linear's name"),
        ("roj=0.6,0.5", "--sparsity roj: is a part of no linear's name"),
        ("mlp=0.6,0.5,2:4", "has two entries for the linears without a name"),
        ("0.5,mlp=0.6,mlp=0.7", "has two entries for mlp"),
        ("0.5,mlp=", "has an entry without a value, 'mlp='"),
        ("0.5,0.6", "several entries have names"),
        ("mlp=1.6,0.5", "--sparsity 1.6: expected a share of zeros"),
        ("mlp=2:3,0.5", "layers.0.mlp.gate_proj has 32 columns, no multiple of 3"),
    ],
)
def test_a_sparsity_by_name_that_is_none_is_one_line(
    random_checkpoint, calib_file, calib, model, tmp_path, run_here, text, words
):
    before = copy.deepcopy(targets(model))
    status, error = run_here(random_checkpoint, tmp_path / "out", calib_file, "--sparsity", text)
    assert status == 2 and words in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())
    with pytest.raises(UserError):
        prune_model(model, calib, "wanda", text)
    assert all(w.equal(before[name]) for name, w in targets(model).items())


def test_a_weight_too_large_for_the_dtype_is_named_before_anything_is_pruned(model, calib_file, tmp_path, run_here):
    model.lm_head.weight.data[3, 3] = 1e5  # written last
    save(model, tmp_path / "large.pt")
    status, error = run_here(tmp_path / "large.pt", tmp_path / "out", calib_file, "--dtype", "float16")
    assert status == 2 and "lm_head.weight: holds 1e+05, which is too large for float16" in error
    assert not list(tmp_path.glob("out.partial/model*"))


def test_a_model_of_unknown_length_is_pruned_without_a_note(model, calib_file, tmp_path, run_here):
    model.config.max_position_embeddings = None
    save(model, tmp_path / "model.pt")
    for out in ("out", "out.pt"):
        assert run_here(tmp_path / "model.pt", tmp_path / out, calib_file) == (0, "")
        assert open_llama(tmp_path / out)[1] == model.config


def test_what_a_link_points_to_is_written_and_the_link_stays(random_checkpoint, calib_file, tmp_path, run_here):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    (tmp_path / "link.pt").symlink_to("big.pt")  # which does not exist yet
    for name in ("link", "link.pt"):
        assert run_here(random_checkpoint, tmp_path / name, calib_file) == (0, "")
        assert (tmp_path / name).is_symlink()
        assert open_checkpoint((tmp_path / name).resolve()).history[-1]["method"] == "wanda"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "big.json", "big.pt", "link", "link.pt"]


@pytest.mark.parametrize("said", [(4, 2), (0, 4), 1.5, 1, True, -0.5, None, [2, 4], math.nan])
def test_what_a_function_says_of_a_linear_is_checked_as_the_flag_is(model, calib, said):
    before = {name: w.clone() for name, w in targets(model).items()}
    with pytest.raises(UserError, match="--sparsity .*: expected a share of zeros like 0.5, or N:M"):
        prune_model(model, calib, "wanda", lambda name: said)
    assert all(w.equal(before[name]) for name, w in targets(model).items())


def test_a_model_with_adapters_is_not_pruned(model, calib):
    with pytest.raises(UserError, match="the model has adapters: merge them before pruning"):
        prune_model(inject(model, r=2), calib)


@pytest.mark.parametrize("before, after", [("0.3", "0.5"), ("2:4", "1:4")])
def test_dsnot_on_a_sparse_model_takes_no_more_than_was_asked_for(model, calib, before, after):
    """A weight that was 0 before cannot be taken back: nothing would go in return for nothing."""
    prune_model(model, calib, "wanda", before)
    old = {name: w == 0 for name, w in targets(model).items()}
    prune_model(model, calib, "wanda", after, dsnot_cycles=20)
    for name, w in targets(model).items():
        share = {"0.5": 0.5, "1:4": 0.75}[after]
        assert (w == 0).sum(1).eq(int(w.shape[1] * share)).all() and not w[old[name]].any(), name


def test_a_pipe_among_the_pruned_blocks_is_no_block(random_checkpoint, calib_file, tmp_path, monkeypatch, run_here):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prune, "finish", interrupt)
        assert run_here(random_checkpoint, tmp_path / "out.pt", calib_file)[0] == 130
    block = next((tmp_path / "out.pt.partial").glob("model-00001*"))
    block.unlink()
    os.mkfifo(block)
    status, _ = run_here(random_checkpoint, tmp_path / "out.pt", calib_file)
    assert status == 0 and (tmp_path / "out.pt").exists()


def test_a_file_that_is_no_report_is_not_overwritten_by_one(random_checkpoint, calib_file, tmp_path, run_here):
    (tmp_path / "alpaca.json").write_text('{"precious": 1}')
    status, error = run_here(random_checkpoint, tmp_path / "alpaca.pt", calib_file)
    assert status == 2 and "alpaca.json, which is a file of another kind" in error
    assert [path.name for path in tmp_path.iterdir()] == ["alpaca.json"]


def drop(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def pretend(file: Path) -> None:
    torch.save({**torch.load(file), "block": 1}, file)


@pytest.mark.parametrize(
    "harm, file",
    [
        (drop, "model-00001"),
        (cut, "model-00001"),
        (flip, "model-00001"),
        (cut, "inputs"),
        (flip, "inputs"),
        (pretend, "inputs"),
    ],
)
def test_a_damaged_partial_result_is_made_again(
    random_checkpoint, calib_file, tmp_path, run_here, monkeypatch, harm, file
):
    def killed(*args):
        raise OSError("killed")

    for out in ("whole", "out"):
        with monkeypatch.context() as patch:
            patch.setattr(prune, "finish", killed)
            assert run_here(random_checkpoint, tmp_path / out, calib_file)[0] == 2
    harm(next((tmp_path / "out.partial").glob(f"{file}*")))
    with monkeypatch.context() as patch:  # killed once more, before the first block is done
        patch.setattr(prune, "prune_block", killed)
        assert run_here(random_checkpoint, tmp_path / "out", calib_file)[0] == 2
    assert not list((tmp_path / "out.partial").glob("inputs*"))
    assert run_here(random_checkpoint, tmp_path / "whole", calib_file) == (0, "")
    assert run_here(random_checkpoint, tmp_path / "out", calib_file)[0] == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_the_partial_result_of_another_command_is_not_taken(random_checkpoint, calib_file, tmp_path, run_here):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "job.json").write_text("{}")
    status, error = run_here(random_checkpoint, tmp_path / "out", calib_file)
    assert status == 2 and "out.partial: is in the way, and no interrupted command has left it" in error
    (tmp_path / "out.partial" / ".lock").touch()
    status, error = run_here(random_checkpoint, tmp_path / "out", calib_file)
    assert status == 2 and "out.partial: belongs to another command" in error
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == [".lock", "job.json"]


def test_windows_longer_than_the_models_positions_are_noted(random_checkpoint, tmp_path, run_here):
    np.save(tmp_path / "long.npy", np.zeros((1, 129), dtype=np.int32))
    status, said = run_here(random_checkpoint, tmp_path / "out", tmp_path / "long.npy")
    assert status == 0 and said.startswith("note: --calib ") and "long.npy" in said and "129" in said and "128" in said


def test_the_result_has_the_checkpoints_dtype_or_the_one_asked_for(random_checkpoint, calib_file, tmp_path, run_here):
    assert run_here(random_checkpoint, tmp_path / "half", calib_file, "--dtype", "bfloat16") == (0, "")
    assert {w.dtype for w in open_checkpoint(tmp_path / "half").values()} == {torch.bfloat16}
    assert run_here(tmp_path / "half", tmp_path / "twice", calib_file) == (0, "")
    assert {w.dtype for w in open_checkpoint(tmp_path / "twice").values()} == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------------------
# what a user can get wrong


@pytest.mark.parametrize("text", ("1.2", "-0.1", "4:2", "4:4", "0:4", "abc", "2:", "1", "2:4:8", ""))
def test_a_sparsity_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--sparsity"):
        parse_sparsity(text)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--method", "woodfisher"), "'magnitude', 'wanda', 'sparsegpt'"),
        (("--sparsity", "2:3"), "no multiple of 3"),
        (("--sparsity", "1.2"), "--sparsity 1.2"),
        (("--nsamples", 0), "--nsamples: expected at least 1, found 0"),
        (("--dsnot", "--dsnot_cycles", 0), "--dsnot_cycles: expected at least 1"),
        (("--dsnot", "--dsnot_threshold", "nan"), "--dsnot_threshold: expected a finite number, found nan"),
        (("--dsnot_cycles", 50), "--dsnot_cycles: goes with --dsnot"),
        (("--calib", __file__), "is not a .npy file"),
        (("--nsamples", 7), "calib.npy: holds 6 sequences, --nsamples asks for 7"),
        (("--calib", "nowhere.npy"), "nowhere.npy"),
        (("--ckpt", "nowhere"), "nowhere"),
        (("--out", "/proc/x"), "/proc/x"),
        (("--out", "/proc"), "--out /proc: is a mount point, which cannot be replaced"),
    ],
)
def test_a_wrong_flag_is_one_line(random_checkpoint, calib_file, tmp_path, run_here, flags, words):
    status, error = run_here(random_checkpoint, tmp_path / "out", calib_file, *flags)
    assert status == 2 and words in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_command_ends_with_status_2_and_one_line(random_checkpoint, calib_file, tmp_path):
    result = run(random_checkpoint, tmp_path / "out", calib_file, "--sparsity", "2:3")
    assert result.returncode == 2 and result.stderr.startswith("prune.py: error: --sparsity 2:3: ")
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def test_a_gpu_that_is_not_there_is_one_line(random_checkpoint, calib_file, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, error = run_here(random_checkpoint, tmp_path / "out", calib_file, "--device", "cuda")
    assert status == 2 and "--device cuda: torch sees no GPU" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((2, 8)), "holds float64 of shape (2, 8), expected token ids (nsamples, seqlen)"),
        (np.zeros(8, dtype=np.int32), "holds int32 of shape (8,), expected token ids (nsamples, seqlen)"),
        (np.zeros((0, 8), dtype=np.int32), "holds int32 of shape (0, 8), expected token ids (nsamples, seqlen)"),
        (np.full((2, 8), 256), "token id 256 is not among the model's 256"),
        (np.full((2, 8), -1), "token id -1 is not among the model's 256"),
    ],
)
def test_calibration_that_is_no_tokens_of_the_model_is_refused_by_its_name(
    random_checkpoint, model, tmp_path, run_here, array, words
):
    np.save(tmp_path / "bad.npy", array)
    status, error = run_here(random_checkpoint, tmp_path / "out", tmp_path / "bad.npy")
    assert status == 2 and f"bad.npy: {words}" in error and len(error.splitlines()) == 1
    with pytest.raises(UserError) as e:
        prune_model(model, array, "wanda", "2:4")
    assert str(e.value).startswith(f"calib: {words}")


def test_a_method_that_is_none_is_refused_before_anything_is_pruned(model, calib):
    before = copy.deepcopy(targets(model))
    with pytest.raises(UserError, match="--method woodfisher: expected one of magnitude, wanda, sparsegpt"):
        prune_model(model, calib, "woodfisher", "2:4")
    assert all(w.equal(before[name]) for name, w in targets(model).items())


def test_a_pattern_that_does_not_divide_a_linear_names_it(model, calib):
    with pytest.raises(UserError, match="--sparsity 1:3: layers.0.self_attn.q_proj has 32 columns, no multiple of 3"):
        prune_model(model, calib, "wanda", "1:3")


def test_nan_in_weights_or_activations_names_the_layer(model, calib):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj"):
        prune_model(model, calib, "wanda", "2:4")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 0
    model.model.embed_tokens.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="layers.0.self_attn.q_proj: its inputs hold NaN or Inf$"):
        prune_model(model, calib, "wanda", "2:4")
    with pytest.raises(UserError, match="layers.0.self_attn.q_proj: its inputs hold NaN or Inf; try --dtype bfloat16"):
        prune_model(model.half(), calib, "wanda", "2:4")


def test_a_hessian_that_is_not_positive_definite_is_damped_and_said():
    said = []
    H = torch.eye(4)
    H[0, 1] = H[1, 0] = 1.05
    U = prune.cholesky_factor(H.clone(), "layers.0.x", said.append)
    assert said == ["layers.0.x: the Hessian is not positive definite; damping it by 10% of its mean diagonal"]
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(H + 0.1 * torch.eye(4)), atol=1e-4, rtol=1e-4)


def test_a_hessian_that_no_damping_helps_is_an_error_that_names_the_input():
    said = []
    with pytest.raises(UserError, match="layers.0.x: the Hessian .* even when damped by 1000%"):
        prune.cholesky_factor(torch.tensor([[1.0, 99], [99, 1]]), "layers.0.x", said.append)
    assert [word for line in said for word in line.split() if word.endswith("%")] == ["10%", "100%", "1000%"]


def test_a_disk_that_fills_up_loses_nothing_that_was_finished(random_checkpoint, calib, tmp_path, monkeypatch):
    tokens, settings = torch.from_numpy(calib).long(), prune.Settings("wanda", (2, 4))
    write, save = prune.write_safetensors, prune.save_torch

    def full_at_the_second_shard(path, *tensors):
        if "00002" in path.name:
            raise OSError(28, "No space left on device")
        write(path, *tensors)

    def full_at_the_second_inputs(state, path):
        if "00002" in path.name:
            raise OSError(28, "No space left on device")
        save(state, path)

    def attempt():
        step, out = {"method": "wanda"}, tmp_path / "out"
        ckpt, config = open_llama(random_checkpoint)
        prune.prune_checkpoint(ckpt, config, tokens, settings, out, step, torch.device("cpu"), torch.float32)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="00002-of-00003.*No space left"):
        patch.setattr(prune, "write_safetensors", full_at_the_second_shard)
        attempt()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="inputs-00002.pt: cannot be written"):
        patch.setattr(prune, "save_torch", full_at_the_second_inputs)
        attempt()
    assert (tmp_path / "out.partial" / "inputs-00001.pt").exists() and not (tmp_path / "out").exists()
    attempt()
    assert open_checkpoint(tmp_path / "out").history == [{"method": "wanda"}]


# ----------------------------------------------------------------------------------------------------------------------
# a model that is sparse already


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dsnot", (0, 5))
@pytest.mark.parametrize("first", ("0.5", "2:4"))
@pytest.mark.parametrize("then", ("0.75", "0.3", "2:4", "1:4", "2:8"))
def test_pruning_further_brings_no_zero_back(model, calib, method, dsnot, first, then):
    prune_model(model, calib, "magnitude", first)  # over the whole matrix: some groups and rows have more zeros
    before = {name: w == 0 for name, w in targets(model).items()}
    prune_model(model, calib, method, then, dsnot)
    pattern = parse_sparsity(then)
    for name, w in targets(model).items():
        assert not w[before[name]].any()
        if isinstance(pattern, tuple):
            assert ((w.view(-1, pattern[1]) != 0).sum(1) <= pattern[0]).all()
        else:
            assert (w == 0).sum() >= int(w.numel() * pattern)


def test_sparsegpt_takes_old_zeros_first_and_makes_up_for_them_as_for_what_it_removes():
    """Against the optimum in float64: with the zeros and the mask fixed, each column's survivors are, given the columns
    to the left, those that least change the output; an old zero that an update has moved counts as removed."""
    torch.manual_seed(0)
    X, W = torch.randn(200, 24) @ torch.randn(24, 24), torch.randn(10, 24)
    old = torch.rand(10, 24) < 0.4
    old[0, :8], old[1] = True, True  # more than any pattern asks for; a row that is gone
    W[old] = 0
    H = 2 * X.T @ X / 5
    U = prune.cholesky_factor(H.clone(), "test", print)
    D = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(24)
    for sparsity in (0.6, 0.1, (2, 4), (1, 8)):
        ours = sparsegpt(W, torch.zeros(24, dtype=torch.bool), U, sparsity, slab=16)
        keep, w = ours != 0, W.double()
        assert not keep[old].any()
        for j in range(24):
            inverse = torch.linalg.inv(D[j:, j:])
            err = w[:, j] * ~keep[:, j] / inverse[0, 0]
            w[:, j:] -= err[:, None] * inverse[0]
            w[:, j] *= keep[:, j]
        torch.testing.assert_close(ours.double(), w, atol=1e-4, rtol=1e-3)
        if isinstance(sparsity, tuple):
            n, m = sparsity
            survivors = (~old).view(-1, m).sum(1).clamp_max(n)  # all that there are, or n of them
            assert keep.view(-1, m).sum(1).equal(survivors)
        else:
            for a, b in ((0, 16), (16, 24)):
                gone = max(int(10 * (b - a) * sparsity), old[:, a:b].sum().item())
                assert (~keep[:, a:b]).sum() == gone


def test_sparsegpt_once_more_with_the_same_pattern_changes_nothing(model, calib):
    prune_model(model, calib, "sparsegpt", "2:4")
    before = copy.deepcopy(targets(model))
    prune_model(model, calib, "sparsegpt", "2:4")
    assert all(w.equal(before[name]) for name, w in targets(model).items())


def test_a_mask_of_groups_over_the_end_of_a_row_is_refused():
    for score, sparsity in ((torch.rand(2, 6), (2, 4)), (torch.rand(4, 2), (1, 8)), (torch.rand(8, 172), (2, 8))):
        with pytest.raises(UserError, match=f"has {score.shape[1]} columns, no multiple of {sparsity[1]}"):
            keep_mask(score, sparsity)
        with pytest.raises(UserError, match="no multiple of"):
            keep_mask(score, sparsity, whole=True)
    with pytest.raises(UserError, match="has 4 columns, no multiple of 8"):  # the last group of SparseGPT's last slab
        sparsegpt(torch.rand(8, 12), torch.zeros(12, dtype=torch.bool), torch.eye(12), (2, 8))


@pytest.mark.parametrize("sparsity", ("4:64", lambda name: (4, 64) if name == "layers.1.mlp.gate_proj" else 0.5))
def test_a_pattern_that_fits_not_all_linears_is_refused_before_any_is_pruned(model, calib, sparsity):
    before = copy.deepcopy(targets(model))
    with pytest.raises(UserError, match=r"--sparsity 4:64: layers.\d.\w+.\w+_proj has 32 columns, no multiple of 64"):
        prune_model(model, calib, "magnitude", sparsity)
    assert all(w.equal(before[name]) for name, w in targets(model).items())


def test_the_sample_of_the_report_is_spread_over_sequences_and_positions(monkeypatch):
    """A stride that T divides would take one position of each sequence."""
    taken = []
    monkeypatch.setattr(Statistics, "add", lambda self, x, n_sequences, places: taken.append(places))
    config, (n, T, batch) = PRESETS["test"], (128, 64, 16)
    x = torch.randn(n, T, config.hidden_size)
    gather_statistics(Block(config), x, rope_tables(config, torch.arange(T), x.dtype), batch, Settings("wanda", "2:4"))
    groups = [torch.cat([i * batch * T + places for i, places in enumerate(taken[first::4])]) for first in range(4)]
    assert all(group.equal(groups[0]) for group in groups) and len(groups[0].unique()) == prune.SAMPLE
    assert len((groups[0] // T).unique()) > 100 and len((groups[0] % T).unique()) > 55
