"""What prune.py promises: the official masks, exactly the number asked for, the same bytes after any kill."""

import copy
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, needs_shared

import prune
from model import Llama, UserError, load, open_checkpoint
from prune import Statistics, keep_mask, parse_sparsity, prune_model, sparsegpt

ROOT = Path(__file__).parents[1]


def targets(model: Llama) -> dict[str, torch.Tensor]:
    return {name: p.data for name, p in model.named_parameters() if name.endswith("_proj.weight")}


@pytest.fixture(scope="module")
def calib():
    return np.random.default_rng(0).integers(0, 200, (6, 48), dtype=np.int32)


@pytest.fixture
def model(random_checkpoint):
    return load(random_checkpoint)[0]


# ----------------------------------------------------------------------------------------------------------------------
# against the official codes, on a real model


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
    official, same, total, extra = np.load(SHARED / "prune" / f"{run}.npz"), 0, 0, []
    for name, w in targets(model).items():
        shape = official[f"shape/{name}"]
        mask = np.unpackbits(official[f"mask/{name}"])[: shape.prod()].reshape(shape).astype(bool)
        ours = (w != 0).numpy()
        same, total = same + (mask == ours).sum(), total + mask.size
        extra.append((ours & ~mask).sum() - 1000 * (mask & ~ours).sum())
        if f"val/{name}" in official and (mask == ours).all():
            np.testing.assert_allclose(w.numpy()[mask], official[f"val/{name}"], atol=1e-5)
    if agreement is None:
        assert set(extra) == {1}
    else:
        assert same / total >= agreement
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
    tables, clean_rows, rows = prune.rope_tables(model.config, torch.arange(x.shape[1]), x.dtype), 0, 0
    for i, block in enumerate(model.model.layers):
        masks = {}
        for name, _ in block.named_parameters():
            if name.endswith("_proj.weight"):
                shape = official[f"shape/model.layers.{i}.{name}"]
                bits = np.unpackbits(official[f"mask/model.layers.{i}.{name}"])[: shape.prod()]
                masks[name] = torch.from_numpy(bits.reshape(shape).astype(bool))
        ours = copy.deepcopy(block)
        prune.prune_block(ours, i, x.clone(), prune.Settings("wanda", 0.5, cycles), tables, 8)
        for name, mask in masks.items():
            clean = torch.ones(len(mask), dtype=torch.bool)
            if "self_attn" in name:
                clean = calls.pop(0)
                clean_rows, rows = clean_rows + clean.sum().item(), rows + len(clean)
            assert (ours.get_parameter(name) != 0)[clean].equal(mask[clean]), f"layers.{i}.{name}"
            block.get_parameter(name).mul_(mask)
        prune.forward(block, x, tables, 8)
    assert rows == 960 and clean_rows > 800


@needs_shared
def test_sparsegpt_errs_less_than_wanda_and_wanda_less_than_magnitude():
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
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


def test_of_equal_scores_the_left_one_goes_and_the_number_is_exact():
    assert keep_mask(torch.ones(2, 6), 0.5).tolist() == [[False] * 3 + [True] * 3] * 2
    assert keep_mask(torch.zeros(3, 8), (2, 8)).sum(1).tolist() == [2, 2, 2]
    score = torch.randint(5, (30, 24)).float()
    for sparsity in (0.01, 0.25, 0.5, 0.9, (2, 4), (1, 8), (3, 12)):
        n, m = sparsity if isinstance(sparsity, tuple) else (24 - int(24 * sparsity), 24)
        order = score.view(-1, m).argsort(dim=1, stable=True)
        expected = torch.zeros(len(order), m, dtype=torch.bool).scatter_(1, order[:, m - n :], True).view(30, 24)
        assert keep_mask(score, sparsity).equal(expected)


def test_sparsegpt_equals_the_column_by_column_formula_in_float64():
    torch.manual_seed(0)
    X, W = torch.randn(200, 24) @ torch.randn(24, 24), torch.randn(10, 24)
    H = 2 * X.T @ X / 5
    U = prune.cholesky_factor(H.clone(), "test", print)
    for sparsity in (0.5, (2, 4), (2, 8)):
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
        if sparsity == 0.5:
            assert [(~keep[:, a:b]).sum().item() for a, b in ((0, 16), (16, 24))] == [80, 40]


def test_dsnot_equals_the_rule_written_out_for_one_row():
    torch.manual_seed(0)
    for sparsity in (0.5, (2, 4)):
        W, square, total, variance = torch.randn(40, 32), torch.rand(32), torch.randn(32), torch.rand(32) + 0.1
        s = Statistics(square, total, variance, None, None)
        score = W.abs() * square.sqrt()
        mask = keep_mask(score, sparsity)
        ours = prune.dsnot(W, mask, score, s, sparsity, 6, 0.1)
        for i in range(40):
            assert ours[i].tolist() == dsnot_row(W[i], mask[i], score[i], s, sparsity, 6, 0.1)
        assert ours.sum() == mask.sum() and not ours.equal(mask)


def dsnot_row(w, mask, score, s, sparsity, cycles, threshold):
    d, mask = (w * s.total).tolist(), mask.tolist()
    worth, err = (
        [x / v for x, v in zip(d, s.variance.tolist(), strict=True)],
        sum(x for x, k in zip(d, mask, strict=True) if not k),
    )
    grow, fixed = [i for i, k in enumerate(mask) if not k], [i for i, k in enumerate(mask) if k]
    for _ in range(cycles):
        up = err > 0
        g = max(grow, key=lambda i: worth[i] if up else -worth[i], default=None)
        if g is None:
            break
        if isinstance(sparsity, tuple):
            candidates = [i for i in fixed if i // sparsity[1] == g // sparsity[1]]
        else:
            candidates = [i for i in fixed if (d[i] < 0 if up else d[i] > 0)]
        if not candidates:
            break
        p = min(candidates, key=lambda i: score[i].item())
        after = err + d[p] - d[g]
        if abs(err) <= threshold or (isinstance(sparsity, tuple) and after * err <= 0):
            break
        mask[g], mask[p], err = True, False, after
        grow.remove(g)
        fixed.remove(p)
    return mask


@pytest.mark.parametrize("method", ("magnitude", "wanda", "sparsegpt"))
@pytest.mark.parametrize("dsnot", (0, 5))
@pytest.mark.parametrize("sparsity", ("0.5", "0.75", "0.3", "2:4", "4:8", "2:8", "1:4"))
def test_every_method_reaches_every_pattern_exactly(model, calib, method, dsnot, sparsity):
    before = {name: p.clone() for name, p in model.named_parameters() if not name.endswith("_proj.weight")}
    prune_model(model, calib, method, sparsity, dsnot)
    pattern = parse_sparsity(sparsity)
    for w in targets(model).values():
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


def test_sparsity_may_be_a_function_of_the_layers_name(model, calib):
    prune_model(model, calib, "wanda", lambda name: 0.25 if "mlp" in name else (1, 4))
    for name, w in targets(model).items():
        assert (w == 0).float().mean().item() == pytest.approx(0.25 if "mlp" in name else 0.75)


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


def command(ckpt, out, calib_file, *flags):
    line = [
        sys.executable,
        ROOT / "prune.py",
        "--ckpt",
        ckpt,
        "--calib",
        calib_file,
        "--out",
        out,
        "--device",
        "cpu",
        *flags,
    ]
    return [str(x) for x in line]


def run(*args):
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120)


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
        assert report["kinds"]["q_proj"]["sparsity"] == 0.5 and "q_proj" in result.stdout
        assert not Path(f"{out}.partial").exists()


@pytest.mark.parametrize("kills", (1, 2))
def test_a_killed_run_ends_with_the_same_bytes(random_checkpoint, calib_file, tmp_path, kills):
    flags = ("--method", "sparsegpt", "--sparsity", "0.5")
    assert run(random_checkpoint, tmp_path / "whole", calib_file, *flags).returncode == 0
    out, partial = tmp_path / "killed", tmp_path / "killed.partial"
    for kill in range(kills):
        process = subprocess.Popen(command(random_checkpoint, out, calib_file, *flags), stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        name = f"inputs-{kill + 1:05}.pt" if kills > 1 else "model-00001-of-00004.safetensors"
        while not (partial / name).exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = run(random_checkpoint, out, calib_file, *flags)
    assert result.returncode == 0, result.stderr
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in out.iterdir())
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


def test_the_partial_result_of_another_command_is_not_taken(random_checkpoint, calib_file, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "job.json").write_text("{}")
    result = run(random_checkpoint, tmp_path / "out", calib_file)
    assert result.returncode == 2 and "another command" in result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# what a user can get wrong


@pytest.mark.parametrize("text", ("1.2", "-0.1", "4:2", "4:4", "0:4", "abc", "2:", "1", "2:4:8", ""))
def test_a_sparsity_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--sparsity"):
        parse_sparsity(text)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--sparsity", "2:3"), "no multiple of 3"),
        (("--sparsity", "1.2"), "--sparsity 1.2"),
        (("--nsamples", 0), "--nsamples 0"),
        (("--dsnot", "--dsnot_cycles", 0), "--dsnot_cycles"),
        (("--dsnot", "--dsnot_threshold", "nan"), "--dsnot_threshold"),
        (("--dsnot_cycles", 5), "--dsnot, which is not given"),
        (("--calib", __file__), "is not a .npy file"),
        (("--nsamples", 7), "holds 6 sequences, --nsamples asks for 7"),
        (("--calib", "nowhere.npy"), "nowhere.npy"),
        (("--ckpt", "nowhere"), "nowhere"),
        (("--out", "/proc/x"), "/proc/x"),
    ],
)
def test_a_wrong_flag_is_one_line(random_checkpoint, calib_file, tmp_path, flags, words):
    result = run(random_checkpoint, tmp_path / "out", calib_file, *flags)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_calibration_tokens_outside_the_vocabulary_are_refused(model):
    with pytest.raises(UserError, match="token id 256"):
        prune_model(model, np.full((2, 8), 256), "wanda", "2:4")
    with pytest.raises(UserError, match="expected token ids"):
        prune_model(model, np.zeros((2, 8)), "wanda", "2:4")


def test_nan_in_weights_or_activations_names_the_layer(model, calib):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj"):
        prune_model(model, calib, "wanda", "2:4")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 0
    model.model.embed_tokens.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="layers.0.self_attn.q_proj: its inputs"):
        prune_model(model, calib, "wanda", "2:4")


def test_a_hessian_that_is_not_positive_definite_is_damped_and_said():
    said = []
    H = torch.eye(4)
    H[0, 1] = H[1, 0] = 1.05
    prune.cholesky_factor(H, "layers.0.x", said.append)
    assert "layers.0.x" in said[0] and "10%" in said[0]
    with pytest.raises(UserError, match="layers.0.x: the Hessian"):
        prune.cholesky_factor(torch.tensor([[1.0, 99], [99, 1]]), "layers.0.x", said.append)


def test_a_disk_that_fills_up_loses_nothing_that_was_finished(random_checkpoint, calib, tmp_path, monkeypatch):
    ckpt, write = open_checkpoint(random_checkpoint), prune.write_safetensors

    def full(path, tensors):
        if "00003" in path.name:
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(prune, "write_safetensors", full)
    tokens = torch.from_numpy(calib).long()
    settings = prune.Settings("wanda", (2, 4))
    with pytest.raises(UserError, match="No space left"):
        prune.prune_checkpoint(ckpt, tokens, settings, tmp_path / "out", {}, torch.device("cpu"), torch.float32)
    assert (tmp_path / "out.partial" / "inputs-00001.pt").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr(prune, "write_safetensors", write)
    ckpt = open_checkpoint(random_checkpoint)
    prune.prune_checkpoint(ckpt, tokens, settings, tmp_path / "out", {}, torch.device("cpu"), torch.float32)
    assert open_checkpoint(tmp_path / "out").history == [{}]
