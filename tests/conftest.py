"""What several test files need: a tokenizer and a model so small that making them takes a second, and its pruning."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import nn

from data.tokenizer import load_tokenizer
from model import PRESETS, Llama, save

ROOT = Path(__file__).parents[1]

SHARED = Path(__file__).parents[2] / "shared" / "real"
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason=f"{SHARED} is absent: real inputs are not in the repository"
)
# Models and tokenizers that are too large for either: smollm2/, a Hugging Face directory, and llama3/tokenizer.model
REAL = Path(os.environ.get("REAL_MODELS", "/nonexistent"))


def prune_by_magnitude(model: nn.Module, n: int, m: int) -> nn.Module:
    """Keeps the n largest of every m weights of each projection, in place; the model is ours or Hugging Face's."""
    for name, p in model.named_parameters():
        if name.endswith("_proj.weight"):
            groups = p.data.view(-1, m)
            groups.scatter_(1, groups.abs().topk(m - n, largest=False).indices, 0)
    return model


def hf_model(model_type: str = "llama", **options) -> nn.Module:
    """A random model of transformers', its weights large enough that positions and heads matter."""
    import transformers  # takes seconds, and few files need it

    config, family = transformers.LlamaConfig, transformers.LlamaForCausalLM
    if model_type == "mistral":
        config, family = transformers.MistralConfig, transformers.MistralForCausalLM
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape.update(num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2)
    torch.manual_seed(0)
    return family(config(**{**shape, **options})).eval()


def same(a, b) -> bool:
    """Whether two mappings hold the same tensors under the same names, in the same dtypes."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in a)


def edit(path: Path, **changes) -> None:
    """Gives the object in a JSON file other values under some keys."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def command(*flags) -> subprocess.CompletedProcess:
    """model.py, as a user runs it."""
    line = [sys.executable, str(ROOT / "model.py"), *map(str, flags)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A sentencepiece model of at most 256 pieces, trained on words made up here."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    words = [
        "".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))) for _ in range(200)
    ]
    lines = [" ".join(rng.choices(words, k=12)).capitalize() + rng.choice(".?!:") for _ in range(400)]
    (folder / "text.txt").write_text("\n".join([*lines, "Question: Answer: Instruction Response Input 0123456789 ä €"]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=256,
        model_type="bpe",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return load_tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory, tokenizer) -> Path:
    """A .pt of a random model of the "test" preset, with the tokenizer."""
    torch.manual_seed(0)
    model = Llama(PRESETS["test"])
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(5)  # so that its predictions differ
    path = tmp_path_factory.mktemp("checkpoint") / "random.pt"
    save(model, path, tokenizer)
    return path


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(dataclasses.replace(PRESETS["test"]))  # a copy of its settings, which a test may change


@pytest.fixture
def directory(model, tokenizer, tmp_path) -> Path:
    """The model, with the tokenizer, as a Hugging Face directory."""
    save(model, tmp_path / "hf", tokenizer)
    return tmp_path / "hf"
