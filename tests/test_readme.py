"""What the README promises: it names only what exists, and what it shows is what the code does."""

import re
from pathlib import Path

import pytest
import torch

from model import load
from spp import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
# every command: (file, what follows it), whether in a block or in a sentence
COMMANDS = re.findall(r"(?:python|--) ((?:\w+/)*\w+\.py)(.*)", "\n".join([SHELL, *INLINE]))


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


@pytest.mark.parametrize("file", sorted({file for file, _ in COMMANDS}))
def test_flags_shown_in_the_readme_exist(file):
    shown = {flag for name, rest in COMMANDS if name == file for flag in re.findall(r"--[a-z_]+", rest)}
    source = (ROOT / file).read_text()  # reading it is 20 times as fast as asking --help
    assert [flag for flag in sorted(shown) if f'"{flag}"' not in source] == []


def test_the_code_beside_an_equation_stands_in_the_file_that_the_row_names():
    section = README.split("## The method")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| ([^|]+) \| `([^|`]+)` \|$", section, re.M)
    assert len(rows) == 5
    for where, code in rows:
        file = "prune.py" if "prune.py" in where else "spp.py"
        assert (ROOT / file).read_text().count(code) == 1, code


def test_every_method_has_its_row():
    section = README.split("## The method")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)", section, re.M) == list(METHODS)


def test_the_readmes_python_runs(random_checkpoint, tmp_path, monkeypatch):
    code = re.search(r"```python\n(from model import.*?)```", README, re.S)[1]
    monkeypatch.chdir(tmp_path)
    tokens = torch.randint(256, (4, 32))
    names = {"calib": tokens.numpy(), "tokens": tokens, "targets": tokens}
    exec(code.replace('load("llama-7b")', f'load("{random_checkpoint}")'), names)
    model, tokenizer = load("merged.pt")
    zeros = [(p == 0).float().mean().item() for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    assert zeros == pytest.approx([0.5] * len(zeros)) and tokenizer is not None
