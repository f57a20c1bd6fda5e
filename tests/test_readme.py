"""The README names only what exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:torchrun .*?)?(?:python )?((?:[\w/]+/)?\w+\.py)((?: .*(?:\\\n.*)*)?)$", README, re.M)


def test_files_named_in_the_readme_exist():
    named = set(re.findall(r"\]\(([\w./-]+)\)", README)) | {file for file, _ in COMMANDS}
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("file", sorted({file for file, _ in COMMANDS}))
def test_flags_shown_in_the_readme_exist(file):
    shown = {flag for name, rest in COMMANDS if name == file for flag in re.findall(r"--[a-z_]+", rest)}
    assert shown or file.startswith("bench")
    text = subprocess.run([sys.executable, str(ROOT / file), "--help"], capture_output=True, text=True).stdout
    assert [flag for flag in shown if flag not in text] == []
