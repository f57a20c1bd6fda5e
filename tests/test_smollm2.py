"""A real LLaMA of today, SmolLM2-135M, runs here as in transformers.

    REAL_MODELS=models python -m pytest tests/test_smollm2.py -m "stress or not stress"     # two minutes

REAL_MODELS is a folder with smollm2/, a Hugging Face directory (see tests/test_tokenizer.py)."""

import json
import sys

import pytest
import torch
from conftest import REAL, ROOT
from test_model import their_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from model import generate, load

pytestmark = pytest.mark.skipif(
    not (REAL / "smollm2" / "config.json").exists(), reason="set REAL_MODELS to a folder that has smollm2/"
)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "<|im_start|>user\nHow many legs do three spiders have?<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8,",
)


@pytest.fixture(scope="module")
def both():
    """(model, tokenizer) here, and transformers' two."""
    folder = REAL / "smollm2"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return *load(folder), theirs, AutoTokenizer.from_pretrained(folder)


def test_logits_equal_transformers(both):
    ours, tokenizer, theirs, their_tokenizer = both
    text = (ROOT / "README.md").read_text()
    tokens = torch.tensor([tokenizer.encode(text)[:600]]).view(2, 300)
    assert tokens.flatten().tolist() == their_tokenizer(text).input_ids[:600]
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.stress
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_transformers_token_for_token(both, prompt):
    ours, tokenizer, theirs, their_tokenizer = both
    tokens = tokenizer.encode(prompt)
    assert tokens == their_tokenizer(prompt).input_ids
    new = list(generate(ours, tokens, 200))
    assert new == their_tokens(theirs, tokens, 200) and len(new) == 200
    assert tokenizer.decode(tokens + new) == their_tokenizer.decode(tokens + new)


@pytest.mark.stress
def test_perplexity_is_that_of_a_plain_script(both, tmp_path, monkeypatch):
    """Windows of 256 tokens, each with transformers' own loss, as scripts on the web have it."""
    _, _, theirs, their_tokenizer = both
    lines = (ROOT / "README.md").read_text().splitlines()[:100]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    command = ["evaluate.py", "--ckpt", REAL / "smollm2", "--ppl", tmp_path / "text.txt", "--seqlen", 256]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--out", str(tmp_path / "out.json")])
    evaluate.main()
    ours = json.loads((tmp_path / "out.json").read_text())["perplexity"]["text"]

    text = "\n\n".join(line + "\n" if line else "" for line in lines)
    ids = torch.tensor([their_tokenizer.bos_token_id, *their_tokenizer(text).input_ids])
    losses = []
    with torch.no_grad():
        for window in ids[: len(ids) // 256 * 256].view(-1, 1, 256):
            losses.append(theirs(window, labels=window).loss)
    assert ours["ppl"] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)
    assert ours["tokens"] == 256 * len(losses) >= 1024
