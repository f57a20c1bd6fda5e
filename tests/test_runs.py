"""runs/: every command of the paper's scripts is a real one, and their figures follow from their assumptions."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from bench.rounding import round_stochastically
from model import PRESETS, Llama

ROOT = Path(__file__).parents[1]
PAPER = json.loads((ROOT / "bench" / "paper.json").read_text())


def script(number: str, python: str = ":") -> list[list[str]]:
    """The commands of a table's script with --dry_run, as words. `python` runs the trainings: ":" does nothing."""
    env = os.environ | {"PYTHON": python, "GPUS": "8", "OUT": "out/none", "LLAMAS": "models", "TASKS": "tasks"}
    line = ["sh", f"runs/table{number}.sh", "--dry_run"]
    result = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    shown = [
        line[len("\033[1m$ ") : -len("\033[0m")] for line in result.stdout.splitlines() if line.startswith("\033[1m$ ")
    ]
    return [shlex.split(line) for line in shown]


@pytest.fixture(scope="module")
def commands():
    return {number: script(number) for number in PAPER}


def trainings(lines: list[list[str]]) -> list[list[str]]:
    return [line[line.index("train.py") + 1 :] for line in lines if "train.py" in line]


def test_a_script_makes_every_row_of_its_table(commands):
    for number, paper in PAPER.items():
        made = {
            "/".join(Path(line[-1]).with_suffix("").parts[-2:]) for line in commands[number] if "evaluate.py" in line
        }
        assert paper["rows"].keys() <= made, number


def test_flags_of_every_command_exist(commands):
    flags = {}
    for line in (line for lines in commands.values() for line in lines):
        file = next(word for word in line if word.endswith(".py"))
        flags.setdefault(file, set()).update(w for w in line[line.index(file) :] if w.startswith("--"))
    assert flags.keys() >= {"prune.py", "train.py", "evaluate.py", "data/alpaca/prepare.py", "bench/tables.py"}
    for file, shown in flags.items():  # read in the sources: each --help costs seconds
        known = set(re.findall(r'"(--[a-z_]+)"', (ROOT / file).read_text()))
        assert shown <= known, file


def test_every_training_of_every_script_passes_its_dry_run(commands, monkeypatch, capsys):
    known = set()
    for line in (line for lines in commands.values() for line in trainings(lines)):
        preset = Path(line[line.index("--ckpt") + 1]).parent.name
        flags = line[line.index("--data") + 2 : line.index("--out_dir")]
        if (key := (preset, *flags)) not in known:
            known.add(key)
            argv = ["train.py", "--preset", preset, "--dtype", "bfloat16", "--dry_run", "8", "--data", "none", *flags]
            monkeypatch.setattr(sys, "argv", argv)
            train.main()
            together = re.search(r"together +([\d.]+) GiB", capsys.readouterr().out)[1]
            assert float(together) < 80, key
    assert len(known) > 10


def test_dry_run_of_a_script_runs_each_kind_of_training_once():
    env = os.environ | {"PYTHON": sys.executable, "MODELS": "llama-7b"}
    line = ["sh", "runs/table5.sh", "--dry_run"]
    result = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trainable parameters") == 2 and "19,578,880" in result.stdout


@pytest.mark.parametrize("number", "267")
def test_a_script_says_how_to_leave_out_what_80_gb_cannot_evaluate(number):
    text = (ROOT / f"runs/table{number}.sh").read_text()
    every = re.search(r"MODELS:-(.*)}", text)[1].split()
    small = re.search(rf'#   MODELS="(.*)" sh runs/table{number}.sh', text)[1].split()
    assert small == [model for model in every if not model.endswith(("65b", "70b"))] != every


def linears(preset: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for name, p in Llama(PRESETS[preset]).named_parameters() if name.endswith("proj.weight"))


def test_gpu_hours_in_the_scripts_follow_from_their_assumptions(commands):
    """runs/paper.sh states them: 40% of 312 TFLOP/s, FLOPs per token and weight, tokens."""
    sizes = {preset: linears(preset) for preset in PRESETS if preset.startswith("llama")}
    for number, lines in commands.items():
        flops = 0
        for line in lines:
            model = next((part for word in line for part in Path(word).parts if part in sizes), None)
            if "train.py" in line:
                large = "--activation_checkpointing" in line
                epochs = 1 if re.search("65b|70b", model) else 3
                flops += sizes[model] * 50_002 * 120 * epochs * ((4 if "lora" in line else 6) + 2 * large)
            elif "prune.py" in line:
                flops += sizes[model] * 128 * 2048 * 2 * 2 * (2 if "sparsegpt" in line else 1)
            elif "evaluate.py" in line:
                flops += sizes[model] * 2 * (2.6e6 if "mmlu" in line[-1] else 3.34e6)
        hours = flops / (0.4 * 312e12) / 3600
        stated = re.search(r"about (\d+)\s+(?:# )?A100", (ROOT / f"runs/table{number}.sh").read_text())
        assert stated and int(stated[1]) == round(hours), (number, hours)
        counted = re.search(r"(\d+) trainings", (ROOT / f"runs/table{number}.sh").read_text())
        assert int(counted[1]) == len(trainings(lines))


@pytest.mark.parametrize("env, flag", [({}, "--dryrun"), ({"GPUS": "0"}, "--dry_run"), ({"GPUS": "two"}, "--dry_run")])
def test_a_script_starts_nothing_that_was_not_asked_for(env, flag):
    line = ["sh", "runs/table5.sh", flag]
    result = subprocess.run(line, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout and result.stderr.count("\n") == 1


def test_stochastic_rounding_is_right_on_average_and_exact_on_bf16_values():
    W = torch.randn(200, 50)
    mean = sum(round_stochastically(W, seed).float() for seed in range(400)) / 400
    nearest = W.to(torch.bfloat16).float()
    assert (mean - W).abs().mean() < 0.25 * (nearest - W).abs().mean()
    exact = W.to(torch.bfloat16)
    assert round_stochastically(exact.float(), 1).equal(exact)
    assert round_stochastically(W, 7).equal(round_stochastically(W, 7))
    assert not round_stochastically(torch.zeros(9, 9), 3).any()
