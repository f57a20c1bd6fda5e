"""runs/: every command of the paper's scripts is a real one, their figures follow from their assumptions, and no name
and no signal makes a script lose a file or leave a process."""

import fcntl
import collections
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.rounding import MODES, round_stochastically
from model import PRESETS, Llama
from train import Plan

ROOT = Path(__file__).parents[1]
PAPER = json.loads((ROOT / "bench" / "paper.json").read_text())


def shown(text: str) -> list[list[str]]:
    """The commands that a script has echoed, as words."""
    return [shlex.split(line) for line in re.findall(r"^\033\[1m\$ (.*)\033\[0m$", text, re.M)]


def script(number: str, **names: str) -> list[list[str]]:
    """The commands of a table's script with --dry_run. PYTHON, which says what trainings need, is one that does not."""
    env = os.environ | {"PYTHON": ":", "GPUS": "8", "OUT": "out/none", "LLAMAS": "models", "TASKS": "tasks"} | names
    line = ["sh", f"runs/table{number}.sh", "--dry_run"]
    result = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return shown(result.stdout)


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


def test_the_gpu_script_goes_on_after_a_failure_and_asks_for_flags_that_exist(scripts):
    (scripts / "runs" / "demo.sh").write_text("false")
    done = stubbed(scripts, "runs/gpu.sh")
    assert done.returncode == 1 and done.stdout.endswith("\nfailed:\n  sh runs/demo.sh\n"), done.stderr
    lines = [text.splitlines()[1:] for text in (scripts.parent / "words").read_text().split("\n\n") if text]
    assert len(lines) == 6
    for file, *flags in lines[1:]:
        shown = subprocess.run([sys.executable, ROOT / file, "--help"], capture_output=True, text=True).stdout
        assert all(flag in shown for flag in flags if flag.startswith("--")), file


def test_flags_of_every_command_exist(commands):
    flags = {}
    for line in (line for lines in commands.values() for line in lines):
        file = next(word for word in line if word.endswith(".py"))
        flags.setdefault(file, set()).update(w for w in line[line.index(file) :] if w.startswith("--"))
    assert flags.keys() >= {"prune.py", "train.py", "evaluate.py", "data/alpaca/prepare.py", "bench/tables.py"}
    for file, shown in flags.items():  # read in the sources: each --help costs seconds
        known = set(re.findall(r'"(--[a-z_]+)"', (ROOT / file).read_text()))
        assert shown <= known, file


def test_dry_run_of_a_script_says_once_what_each_kind_of_training_needs():
    env = os.environ | {"PYTHON": sys.executable, "MODELS": "llama-7b"}
    line = ["sh", "runs/table5.sh", "--dry_run"]
    result = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trainable parameters") == 2 and "19,578,880" in result.stdout


def test_no_model_is_left_out(commands):
    """Of 65B and 70B all that the paper has is made, and no script says how to do without them."""
    for number in "267":
        large = {model for line in commands[number] for model in re.findall(r"llama-\S*?(?:65|70)b", " ".join(line))}
        assert len(large) == (2 if number == "6" else 1), number
        assert 'MODELS="' not in (ROOT / f"runs/table{number}.sh").read_text()


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


# ----------------------------------------------------------------------------------------------------------------------
# names with spaces, and files that are not the script's


@pytest.fixture
def scripts(tmp_path) -> Path:
    """A repository, "a copy", of nothing but runs/, and beside it python and torchrun that write down their words and
    make an empty --out."""
    copy, stubs = tmp_path / "a copy", tmp_path / "some programs"
    shutil.copytree(ROOT / "runs", copy / "runs")
    stubs.mkdir()
    for name in ("python", "torchrun"):
        (stubs / name).write_text(
            "#!/bin/sh\n"
            f"""for word in {name} "$@"; do printf '%s\\n' "$word"; done >> ../words; echo >> ../words\n"""
            """case $word in *.json) : > "$word" ;; esac\n"""
        )
        (stubs / name).chmod(0o755)
    return copy


def stubbed(copy: Path, *line: str, **names: str) -> subprocess.CompletedProcess:
    """Runs a script in the copy, with its stubs."""
    env = os.environ | {"PATH": f"{copy.parent / 'some programs'}:{os.environ['PATH']}"} | names
    return subprocess.run(["sh", *line], cwd=copy, env=env, capture_output=True, text=True, timeout=60)


PLAIN = {"OUT": "out/none", "LLAMAS": "models", "TASKS": "tasks", "WIKITEXT": "text.txt"}
ODD = {"OUT": "a dir/with space", "LLAMAS": "my $(models)", "TASKS": "it's/my tasks", "WIKITEXT": 'a "text" *.txt'}


@pytest.mark.parametrize("number", "346")
def test_names_with_spaces_reach_every_command_whole_and_are_echoed_as_typed(scripts, number):
    ran = {}
    for kind, names in (("plain", PLAIN), ("odd", ODD)):
        python = str(scripts.parent / "some programs" / "python")
        done = stubbed(scripts, f"runs/table{number}.sh", MODELS="llama-7b", PYTHON=python, **names)
        assert done.returncode == 0, done.stderr
        words = scripts.parent / "words"
        ran[kind] = [text.splitlines()[1:] for text in words.read_text().split("\n\n") if text]
        words.unlink()
        assert [line[1:] for line in shown(done.stdout)] == ran[kind]
    starts = {PLAIN[key]: ODD[key] for key in PLAIN}
    for line in ran["plain"]:
        for old, new in starts.items():
            line[:] = [new + word.removeprefix(old) if word.startswith(old) else word for word in line]
    assert ran["odd"] == ran["plain"] and len(ran["odd"]) > 10
    # the table is made of what the evaluations wrote
    written = [line[-1] for line in ran["odd"] if line[0] == "--nproc_per_node=8" and line[1] == "evaluate.py"]
    assert ran["odd"][-1][3:] == sorted(written) and all(file.startswith("a dir/with space/") for file in written)


def test_a_script_removes_nothing(scripts):
    """Neither what lies where a space ends a name, nor what it finds where it writes."""
    run = "llama-7b/wanda_0.75-spp"
    mine = [
        f"{folder}/{name}" for folder in ("a", "dir/with", f"space/{run}", f"a dir/with space/{run}") for name in "xy"
    ]
    for file in mine:
        (scripts / file).parent.mkdir(parents=True, exist_ok=True)
        (scripts / file).write_text(file)
    before = set(scripts.rglob("*"))
    for _ in range(2):  # the second time, what the first has made
        done = stubbed(scripts, "runs/table5.sh", MODELS="llama-7b", OUT="a dir/with space")
        assert done.returncode == 0, done.stderr
    assert before <= set(scripts.rglob("*"))
    assert all((scripts / file).read_text() == file for file in mine)


def test_a_training_that_was_stopped_goes_on(scripts):
    """train.py's --resume begins where nothing was saved, and refuses a folder of other settings."""
    done = stubbed(scripts, "runs/table5.sh", MODELS="llama-7b")
    assert done.returncode == 0 and all("--resume" in line for line in trainings(shown(done.stdout)))
    done = stubbed(scripts, "runs/demo.sh", "full")
    lines = trainings(shown(done.stdout))
    assert done.returncode == 0 and len(lines) > 50
    assert all(("--resume" in line) != ("full" in line) for line in lines)  # pretraining is done anew, with its world


# ----------------------------------------------------------------------------------------------------------------------
# a LLaMA of today


@pytest.fixture
def smollm2(scripts) -> Path:
    """The repository of `scripts` with a text and tasks, and a python that makes what it is told to write. Where there is
    a file ../dies, it dies over every other command, before that has written anything."""
    python = scripts.parent / "some programs" / "python"
    python.write_text(
        "#!/bin/sh\n"
        "[ ! -e ../dies ] || { [ -e ../died ] && rm ../died; } || { touch ../died; kill -9 $$; }\n"
        """for word; do printf '%s\\n' "$word"; done >> ../words; echo >> ../words\n"""
        "script=$1\n"
        """while [ "$2" != --out ] && [ "$2" != --out_dir ] && [ "$2" != --save ]; do shift; done\n"""
        "case $script in\n"
        """*alpaca*) mkdir -p "$3" && printf '{\\n  "train": 899,\\n  "val": 97\\n}\\n' > "$3/meta.json" ;;\n"""
        """train.py) mkdir -p "$3" && echo '{"step": 42, "val_loss": 3.5}' > "$3/log.jsonl" && : > "$3/merged.pt" ;;\n"""
        """*) : > "$3" ;;\n"""
        "esac\n"
    )
    (scripts / "my tasks").mkdir()
    for task in ("arc_easy", "openbookqa", "winogrande"):
        (scripts / "my tasks" / f"samples_{task}.jsonl").write_text("{}\n" * 300)
    (scripts / "a text.txt").write_text("word\n" * 300)
    return scripts


PATTERNS = ("0.75", "2of4", "0.5", "2of8")
NAMED = {"TASKS": "my tasks", "WIKITEXT": "a text.txt", "OUT": "an out", "C4": "it's.json.gz", "ALPACA": "a b.json"}


def words_of(folder: Path) -> list[list[str]]:
    """The commands that the stub has run, and forgets."""
    words = folder.parent / "words"
    ran = [text.splitlines() for text in words.read_text().split("\n\n") if text]
    words.unlink()
    return ran


@pytest.mark.parametrize("size, seeds, steps", [("short", 1, 84), ("full", 3, 225)])
def test_smollm2_makes_every_cell_by_real_commands(smollm2, size, seeds, steps):
    done = stubbed(smollm2, "runs/smollm2.sh", "a model", *[size] * (size == "full"), **NAMED)
    assert done.returncode == 0, done.stderr
    ran = words_of(smollm2)
    assert [line[1:] for line in shown(done.stdout)] == ran
    for line in ran:
        known = set(re.findall(r'"(--[a-z_]+)"', (ROOT / line[0]).read_text()))
        assert {word for word in line if word.startswith("--")} <= known, line
    tuned = [line for line in ran if line[0] == "train.py"]
    pruned = {f"an out/{pruner}_{pattern}.pt" for pruner in ("wanda", "sparsegpt") for pattern in PATTERNS}
    cells, packed = collections.Counter(), []  # (checkpoint, method, rank, rate) -> seeds
    for line in tuned:
        value = lambda flag, line=line: line[line.index(flag) + 1] if flag in line else None
        if "--packed" in line:
            packed.append((value("--ckpt"), value("--method"), value("--seed")))
            continue
        cells[value("--ckpt"), value("--method"), value("--rank"), value("--lr")] += 1
    expected = {(ckpt, "spp", None, "3e-2") for ckpt in pruned}
    for ckpt in pruned:
        if "0.75" in ckpt or "2of4" in ckpt:
            expected |= {(ckpt, "lora", "8", "5e-3"), (ckpt, "masked", None, "2e-3")}
        if "0.75" in ckpt:
            expected.add((ckpt, "spp", "64", "4e-2"))
    assert cells == dict.fromkeys(expected, seeds)
    assert packed == [("an out/wanda_2of4.pt", method, "0") for method in ("spp", "masked")]
    assert len([line for line in ran if line[0] == "evaluate.py"]) == 1 + len(pruned) + len(tuned)
    epochs = {float(line[line.index("--epochs") + 1]) for line in tuned}
    assert [Plan(899, 4, share, 0).steps for share in epochs] == [steps]
    kept = 200 if size == "short" else 300
    assert (smollm2 / "an out" / "samples_winogrande.jsonl").read_text().count("\n") == kept
    stubbed(smollm2, "runs/smollm2.sh", "a model", *[size] * (size == "full"), **NAMED)
    assert [line[0] for line in words_of(smollm2)] == ["bench/tables.py"]  # what is there is not made again


def test_smollm2_searches_every_rate_on_one_cell_with_a_seed_of_its_own(smollm2):
    done = stubbed(smollm2, "runs/smollm2.sh", "a model", "search", **NAMED)
    assert done.returncode == 0, done.stderr
    tuned = [line for line in words_of(smollm2) if line[0] == "train.py"]
    assert {line[line.index("--ckpt") + 1] for line in tuned} == {"an out/wanda_0.75.pt"} and len(tuned) == 6
    assert {line[line.index("--seed") + 1] for line in tuned} == {"7"}
    assert [line.split() for line in (smollm2 / "an out" / "search.txt").read_text().splitlines()] == [
        [line[line.index("--method") + 1], line[line.index("--lr") + 1], "3.5"] for line in tuned
    ]


def test_smollm2_killed_over_every_command_makes_the_same(smollm2):
    assert stubbed(smollm2, "runs/smollm2.sh", "a model", **NAMED).returncode == 0
    whole = words_of(smollm2)
    shutil.rmtree(smollm2 / "an out")
    (smollm2.parent / "dies").touch()
    starts = 1
    while stubbed(smollm2, "runs/smollm2.sh", "a model", **NAMED).returncode != 0:
        starts += 1
        assert starts < 100
    assert words_of(smollm2) == whole and starts == len(whole) + 1


@pytest.mark.parametrize("words", [(), ("a", "ful"), ("a", "full", "b")])
def test_smollm2_takes_no_other_words(scripts, words):
    done = stubbed(scripts, "runs/smollm2.sh", *words)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and not (scripts / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# the demo, and Ctrl-C


def test_the_demo_replaces_what_a_demo_made_and_nothing_else(scripts):
    first = stubbed(scripts, "runs/demo.sh")
    assert first.returncode == 0, first.stderr
    old = scripts / "out" / "demo" / "results_old.json"
    mine = scripts / "out" / "demo" / "mine.txt"
    old.touch()
    mine.touch()
    assert stubbed(scripts, "runs/demo.sh").stdout == first.stdout and not old.exists() and mine.exists()
    (scripts / "out" / "demo" / "made_by_demo").unlink()
    old.touch()
    done = stubbed(scripts, "runs/demo.sh")
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "out/demo is there, and no demo made it" in done.stderr
    )
    assert old.exists()


def test_two_demos_at_the_same_time_are_one(scripts):
    assert stubbed(scripts, "runs/demo.sh").returncode == 0
    with open(scripts / "out" / ".demo.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = stubbed(scripts, "runs/demo.sh")
    assert done.returncode == 1 and not done.stdout and "another demo is at work in out/" in done.stderr


def test_the_demo_takes_no_other_word(scripts):
    done = stubbed(scripts, "runs/demo.sh", "fulll")
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and not (scripts / "out").exists()


def test_a_chain_of_the_demo_that_fails_ends_it(scripts):
    python = scripts.parent / "some programs" / "python"
    for fails in ("wanda", "sparsegpt"):
        python.write_text(f"#!/bin/sh\ncase $* in *'--method {fails}'*) echo broken >&2; exit 3 ;; esac\n")
        done = stubbed(scripts, "runs/demo.sh")
        assert done.returncode in (1, 3) and "broken" in done.stdout + done.stderr, fails
        assert "bench/tables.py" not in done.stdout


def at_work(folder: Path) -> list[str]:
    """The processes whose current folder this is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder:
                found.append(process.name)
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.mark.parametrize("whom", ["the terminal's processes", "the script alone"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_both_chains_of_the_demo_at_once(scripts, number, whom):
    """Even where what is at work does not listen: train.py ends its step first."""
    python = scripts.parent / "some programs" / "python"
    python.write_text(
        "#!/bin/sh\ntrap '' INT TERM HUP\ncase $1 in prune.py) echo $* >> ../pruning; sleep 100 ;; esac\n"
    )
    env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    demo = subprocess.Popen(
        ["env", "--default-signal", "sh", "runs/demo.sh"],  # a shell passes on what `&` or nohup told it to ignore
        cwd=scripts,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    pruning = scripts.parent / "pruning"
    end = time.monotonic() + 30
    while not pruning.exists() or pruning.read_text().count("\n") < 2:  # one in each chain
        assert time.monotonic() < end and demo.poll() is None
        time.sleep(0.01)
    if whom == "the script alone":
        demo.send_signal(number)
    else:
        os.killpg(demo.pid, number)
    assert demo.wait(timeout=1) == 128 + number
    end = time.monotonic() + 1
    while at_work(scripts):
        assert time.monotonic() < end, "a process is still at work"
        time.sleep(0.01)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    line = ["shellcheck", "-x", "-S", "style", *sorted(str(path) for path in (ROOT / "runs").glob("*.sh"))]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# bench/rounding.py


def test_stochastic_rounding_is_right_on_average_and_exact_on_bf16_values():
    W = torch.randn(200, 50)
    mean = sum(round_stochastically(W, seed).float() for seed in range(400)) / 400
    nearest = W.to(torch.bfloat16).float()
    assert (mean - W).abs().mean() < 0.25 * (nearest - W).abs().mean()
    exact = W.to(torch.bfloat16)
    assert round_stochastically(exact.float(), 1).equal(exact)
    assert round_stochastically(W, 7).equal(round_stochastically(W, 7))
    assert not round_stochastically(torch.zeros(9, 9), 3).any()


def test_layers_that_round_otherwise_train_on_what_they_round():
    W, x = torch.randn(32, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    outputs = {}
    for name, (_, layer_class) in MODES.items():
        torch.manual_seed(0)
        layer = layer_class(torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16), r=4)
        layer.weight.data.copy_(W)
        layer.beta.data.normal_(std=0.05)
        outputs[name] = layer(x)
        W_tilde = layer.effective_weight(W, layer.alpha.detach(), layer.beta.detach())  # the last: of "split"
    nearest = outputs["bfloat16, nearest"]
    assert not outputs["bfloat16, stochastic"].equal(nearest)
    torch.testing.assert_close(outputs["bfloat16, stochastic"], nearest, rtol=0.02, atol=0.2)
    assert outputs["bfloat16, split"].equal(torch.nn.functional.linear(x, W) + x @ W_tilde.bfloat16().T)
