"""What model.py promises: transformers' LLaMA to the last digits, every layout to the same weights, no half file."""

import dataclasses
import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import SHARED, needs_shared
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import LlamaConfig as HFConfig

from model import (
    PRESETS,
    Llama,
    LlamaConfig,
    UserError,
    describe,
    generate,
    load,
    map_tensor,
    meta_params,
    open_checkpoint,
    rope_tables,
    safetensors_index,
    save,
    sparsity_of,
    write_checkpoint,
)

ROOT = Path(__file__).parents[1]
SHAPES = {
    "llama-1": {},
    "llama-2-70b": {"num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "tinyllama": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "intermediate_size": 176},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "rope_theta": 1e6},
    "mistral with a window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 100},
    "tied": {"tie_word_embeddings": True},
    "another theta": {"rope_theta": 500000.0},
    "another head width": {"head_dim": 24},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


FORMATS = ("pt", "hf", "sharded", "meta")


def write_as(ckpt, path: Path, form: str) -> Path:
    path = path.with_suffix(".pt") if form == "pt" else path
    size = 30_000 if form == "sharded" else 10**9
    write_checkpoint(ckpt, path, max_shard_size=size, layout="meta" if form == "meta" else "hf")
    assert form != "sharded" or len(list(path.glob("*.safetensors"))) > 1
    return path


def hf_model(model_type="llama", **options):
    """A random model of transformers', its weights large enough that positions and heads matter."""
    config, family = (HFConfig, LlamaForCausalLM)
    if model_type == "mistral":
        config, family = (MistralConfig, MistralForCausalLM)
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}
    torch.manual_seed(0)
    return family(config(**(shape | options))).eval()


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_transformers(tmp_path, options):
    theirs = hf_model(**options)
    theirs.save_pretrained(tmp_path / "hf")  # with the config keys of today
    ours, _ = load(tmp_path / "hf")
    tokens = torch.randint(0, 128, (2, 100))  # beyond the 64 positions it is made for
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_a_saved_directory_loads_in_transformers(tmp_path, options):
    hf_model(**options).save_pretrained(tmp_path / "hf")
    ours, _ = load(tmp_path / "hf")
    save(ours, tmp_path / "ours")
    tokens = torch.randint(0, 128, (2, 100))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@needs_shared
def test_stories260k_equals_transformers_in_both_layouts():
    theirs = LlamaForCausalLM.from_pretrained(SHARED / "stories260K" / "hf")
    hf, _ = load(SHARED / "stories260K" / "hf")
    meta, _ = load(SHARED / "stories260K" / "meta")
    assert hf.state_dict().keys() == meta.state_dict().keys()
    assert all(w.equal(meta.state_dict()[name]) for name, w in hf.state_dict().items())
    tokens = torch.randint(0, 512, (2, 300))
    with torch.no_grad():
        assert (hf(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "preset, count",
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-30b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(PRESETS[preset]).parameters()) == count


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Llama(PRESETS["test"])


def test_a_cache_gives_the_logits_of_the_whole(model):
    tokens, cache = torch.randint(0, 256, (3, 20)), [[] for _ in model.model.layers]
    parts = [model.hidden(part, cache=cache) for part in tokens.split([7, 1, 12], dim=1)]
    torch.testing.assert_close(model.lm_head(torch.cat(parts, 1)), model(tokens))


def test_blocks_can_be_called_one_at_a_time(model):
    tokens = torch.randint(0, 256, (2, 9))
    x = model.model.embed_tokens(tokens)
    for block in model.model.layers:
        x = block(x, *rope_tables(model.config, torch.arange(9), x.dtype))
    assert model.lm_head(model.model.norm(x)).equal(model(tokens))


def test_the_summed_loss_is_cross_entropys(model):
    tokens = torch.randint(0, 256, (3, 60))
    targets = tokens.roll(-1, 1).masked_fill(torch.rand(3, 60) < 0.3, -100)
    model.activation_checkpointing = True
    loss = model(tokens, targets)
    expected = torch.nn.functional.cross_entropy(model(tokens).transpose(1, 2), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, model.lm_head.weight), torch.autograd.grad(expected, model.lm_head.weight)
    )


def their_tokens(theirs, prompt: list[int], n: int) -> list[int]:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    return theirs.generate(torch.tensor([prompt]), max_new_tokens=n, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_generation_is_transformers(tmp_path, options):
    hf_model(**options).save_pretrained(tmp_path / "hf")
    ours, _ = load(tmp_path / "hf")
    save(ours, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    prompt, n = torch.randint(0, 128, (5,)).tolist(), 90  # to the window's end, beyond the 64 it is made for
    if (ours.config.rope_scaling or {}).get("rope_type") == "dynamic":
        n = 50  # cached keys keep the angles of the length at which they were made, in any implementation
    assert list(generate(ours, prompt, n)) == their_tokens(theirs, prompt, n)


@needs_shared
def test_stories260k_goes_on_as_in_transformers(tmp_path):
    ours, tokenizer = load(SHARED / "stories260K" / "hf")
    for layout in ("hf", "meta"):
        write_checkpoint(open_checkpoint(SHARED / "stories260K" / layout), tmp_path / layout)
        prompt = [1, *tokenizer.encode("Once upon a time")]
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / layout)
        assert their_tokens(theirs, prompt, 200) == list(generate(ours, prompt, 200))


def test_a_sequence_beyond_the_sliding_window_is_refused():
    model = Llama(dataclasses.replace(PRESETS["test"], sliding_window=16))
    model(torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(UserError, match="17 tokens are more than the model's sliding window of 16"):
        model(torch.zeros(2, 17, dtype=torch.int64))
    with pytest.raises(UserError, match="sliding window"):
        list(generate(model, [1] * 10, 20))


def test_drawing_follows_top_p_and_the_seed(model):
    draw = lambda **kw: (torch.manual_seed(3), list(generate(model, [1, 2], 15, **kw)))[1]  # noqa: E731
    assert draw(temperature=1.0) == draw(temperature=1.0)
    assert draw(temperature=1.0, top_p=0.0) == draw() != draw(temperature=2.0)


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (2, 8), (4, 8)])
def test_patterns_are_recognised(n, m):
    weight = torch.randn(6, 48)
    groups = weight.view(-1, m)
    groups.scatter_(1, torch.rand_like(groups).argsort(1)[:, n:], 0)
    assert sparsity_of(weight) == (pytest.approx(1 - n / m), f"{n}:{m}")
    assert sparsity_of(torch.randn(6, 48)) == (0.0, None)


def test_a_directory_that_others_pruned_is_recognised(tmp_path):
    theirs = hf_model(num_key_value_heads=2)
    with torch.no_grad():
        for name, w in theirs.named_parameters():
            if name.endswith("_proj.weight"):  # 2:4 by magnitude, stored dense, as Wanda's and SparseGPT's codes do
                w.view(-1, 4).scatter_(1, w.view(-1, 4).abs().argsort(1)[:, :2], 0)
    theirs.save_pretrained(tmp_path / "hf")
    about = describe(open_checkpoint(tmp_path / "hf"))
    assert len(about["linears"]) == 7
    assert all(line == {"sparsity": 0.5, "pattern": "2:4"} for line in about["linears"].values())


OLD = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
NEW = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}, "dtype": "float32"}


@pytest.mark.parametrize("keys", (OLD, NEW), ids=("old", "new"))
def test_old_and_new_config_keys_mean_the_same(model, tmp_path, keys):
    save(model, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "torch_dtype", "head_dim"):
        del config[key]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | keys | {"head_dim": None}))
    scaling = {"rope_type": "linear", "factor": 2.0}
    expected = dataclasses.replace(model.config, rope_theta=5000.0, rope_scaling=scaling)
    assert open_checkpoint(tmp_path / "hf").config == expected


def test_the_least_that_an_old_config_says_is_enough(tmp_path):
    save(Llama(LlamaConfig(64, 32, 64, 2, 4)), tmp_path / "hf")
    keys = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({key: config[key] for key in keys}))
    assert open_checkpoint(tmp_path / "hf").config == LlamaConfig(64, 32, 64, 2, 4)


def test_a_mistral_that_does_not_name_its_window_has_transformers_default(directory):
    edit(directory / "config.json", model_type="mistral")
    assert open_checkpoint(directory).config.sliding_window == MistralConfig().sliding_window


@pytest.mark.parametrize("stored", (False, True))
def test_tied_embeddings_may_be_stored_once_or_twice(tmp_path, stored):
    theirs = hf_model(tie_word_embeddings=True)
    weights = {k: w.clone() for k, w in theirs.state_dict().items() if stored or k != "lm_head.weight"}
    theirs.save_pretrained(tmp_path / "hf")
    safetensors.torch.save_file(weights, tmp_path / "hf" / "model.safetensors")
    ours, _ = load(tmp_path / "hf")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert same(ours.state_dict(), theirs.state_dict())


BESIDE = {
    "generation_config.json": b'{"temperature": 0.6}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"x",
    "LICENSE.txt": b"free",
    "USE_POLICY.md": b"be good",
    "Notice": b"stays behind",
    "README.md": b"stays behind",
    "training_args.bin": b"stays behind",
}


@pytest.mark.parametrize("through", FORMATS)
def test_what_lies_beside_the_weights_travels(directory, tmp_path, through):
    edit(directory / "config.json", bos_token_id=5, eos_token_id=[6, 7], pad_token_id=0)
    for name, data in BESIDE.items():
        (directory / name).write_bytes(data)
    write_checkpoint(open_checkpoint(write_as(open_checkpoint(directory), tmp_path / "a", through)), tmp_path / "b")
    for name, data in BESIDE.items():
        there = tmp_path / "b" / name
        assert not there.exists() if b"behind" in data else there.read_bytes() == data
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    kept = (1, 2, None) if through == "meta" else (5, [6, 7], 0)  # it has no place for them
    assert tuple(config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")) == kept


def test_other_weights_beside_the_models_are_left_alone(directory, model):
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")  # as Mistral ships them
    assert same(load(directory)[0].state_dict(), model.state_dict())


def test_info_is_one_screen_and_json(random_checkpoint):
    result = command("--ckpt", random_checkpoint, "--info")
    assert result.returncode == 0 and "q_proj" in result.stdout and len(result.stdout.splitlines()) < 24
    about = json.loads(command("--ckpt", random_checkpoint, "--info", "--json").stdout)
    assert about["linears"]["q_proj"] == {"sparsity": 0.0, "pattern": None} and about["parameters"] > 0


def test_the_command_talks(random_checkpoint):
    result = command("--ckpt", random_checkpoint, "--prompt", "bada", "--max_new_tokens", 5)
    assert result.returncode == 0 and result.stdout.startswith("bada")


def test_conversion_changes_the_dtype_and_splits(random_checkpoint, tmp_path):
    flags = ("--dtype", "bfloat16", "--max_shard_size", "20KB")
    assert command("--ckpt", random_checkpoint, "--out", tmp_path / "hf", *flags).returncode == 0
    converted, original = open_checkpoint(tmp_path / "hf"), open_checkpoint(random_checkpoint)
    assert all(converted[name].equal(w.to(torch.bfloat16)) for name, w in original.items())
    assert max(f.stat().st_size for f in (tmp_path / "hf").glob("*.safetensors")) < 25_000


# ----------------------------------------------------------------------------------------------------------------------
# layouts


def read_safetensors(path):
    return {name: map_tensor(path, *entry) for name, entry in safetensors_index(path).items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_round_trips_are_bit_for_bit(model, tokenizer, tmp_path, dtype, first, second):
    model.to(dtype).history = [{"method": "wanda", "sparsity": "2:4"}]
    save(model, tmp_path / "model.pt", tokenizer)
    source = open_checkpoint(tmp_path / "model.pt")
    source.files = {"LICENSE.txt": b"do as you like", "tokenizer.json": b"{}"}
    fingerprint = source.fingerprint()
    for name, form in (("first", first), ("second", second), ("back", "pt")):
        again = open_checkpoint(write_as(source, tmp_path / name, form))
        assert same(again, model.state_dict()) and again.fingerprint() == fingerprint
        assert again.config == model.config and again.history == model.history
        assert again.tokenizer == tokenizer.serialized_model_proto()
        assert again.files["LICENSE.txt"] == b"do as you like" and again.files["tokenizer.json"] == b"{}"
        source = again


@pytest.mark.parametrize("form", FORMATS)
def test_tied_embeddings_survive_every_format(tmp_path, form):
    model = Llama(dataclasses.replace(PRESETS["test"], tie_embeddings=True))
    save(model, tmp_path / "model.pt")
    again, _ = load(write_as(open_checkpoint(tmp_path / "model.pt"), tmp_path / "again", form))
    assert same(again.state_dict(), model.state_dict())
    assert again.config.tie_embeddings == (form != "meta")  # whose code wants both matrices


def meta_width(params: dict) -> int:
    """The MLP's width as Meta's code computes it from params.json."""
    width = int(2 * (4 * params["dim"]) / 3)
    width = int(params.get("ffn_dim_multiplier", 1) * width)
    return params["multiple_of"] * ((width + params["multiple_of"] - 1) // params["multiple_of"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("odd", (0, 1))
def test_params_json_gives_the_width_of_the_mlp(preset, odd):
    config = dataclasses.replace(PRESETS[preset], intermediate_size=PRESETS[preset].intermediate_size + odd)
    params = meta_params(config, "out")
    assert meta_width(params) == config.intermediate_size
    assert "max_seq_len" not in params or not preset.startswith("llama")  # Meta's code knows no such key


def write_meta(model: Llama, folder: Path, parts: int, rows: bool = False) -> None:
    """Meta's layout from ours, written from its description: rows of wq and wk interleaved, matrices cut in parts.
    rows: embeddings are cut along the vocabulary, as since LLaMA-3."""
    c = model.config
    folder.mkdir()
    params = {"dim": c.hidden_size, "multiple_of": 32, "n_heads": c.n_heads, "n_layers": c.n_layers}
    params |= {"n_kv_heads": c.n_kv_heads, "norm_eps": c.norm_eps, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    names = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    names |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    out = [{"rope.freqs": torch.zeros(4)} for _ in range(parts)]
    for name, w in model.state_dict().items():
        name = name.removeprefix("model.").replace("self_attn.", "attention.").replace("mlp.", "feed_forward.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("input_layernorm", "attention_norm").replace("post_attention_layernorm", "ffn_norm")
        name = name.replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")
        if "wq" in name or "wk" in name:
            heads = w.view(-1, 2, c.head_dim // 2, c.hidden_size)  # (head, half, i) -> (head, i, half)
            w = heads.transpose(1, 2).reshape(w.shape)
        dim = 1 if any(x in name for x in ("wo.", "w2.", "-" if rows else "tok_emb")) else 0
        pieces = [w] * parts if w.dim() == 1 else w.chunk(parts, dim)
        for part, piece in zip(out, pieces, strict=True):
            part[name] = piece.clone()
    for i, part in enumerate(out):
        torch.save(part, folder / f"consolidated.{i:02}.pth")


@pytest.mark.parametrize("parts", (1, 2, 4, 8))
@pytest.mark.parametrize("rows", (False, True))
def test_metas_parts_are_joined(tmp_path, parts, rows):
    model = Llama(dataclasses.replace(PRESETS["test"], n_heads=8, n_kv_heads=8, hidden_size=64))
    write_meta(model, tmp_path / "meta", parts, rows)
    joined, _ = load(tmp_path / "meta")
    assert same(joined.state_dict(), model.state_dict())


def test_metas_layout_is_written_as_meta_has_it(model, tmp_path):
    write_meta(model, tmp_path / "theirs", 1)
    save(model, tmp_path / "model.pt")
    write_as(open_checkpoint(tmp_path / "model.pt"), tmp_path / "ours", "meta")
    theirs, ours = (torch.load(tmp_path / name / "consolidated.00.pth") for name in ("theirs", "ours"))
    del theirs["rope.freqs"]  # Meta's code computes it
    assert same(ours, theirs)


def test_a_streamed_pt_is_what_torch_save_writes(model, tmp_path):
    save(model, tmp_path / "model.pt")
    for mmap in (False, True):
        data = torch.load(tmp_path / "model.pt", mmap=mmap, weights_only=True)
        assert same(data["model"], model.state_dict()) and data["config"] == dataclasses.asdict(model.config)


def test_files_are_exchanged_with_the_safetensors_library(model, tmp_path):
    save(model, tmp_path / "ours")
    theirs = safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors")
    assert same(theirs, model.state_dict())
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors")
    assert same(read_safetensors(tmp_path / "theirs.safetensors"), theirs)


def test_old_bin_files_load(model, tmp_path):
    save(model, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    names = list(model.state_dict())
    for i, part in enumerate((names[:9], names[9:])):
        weights = {name: model.state_dict()[name] for name in part}
        torch.save(
            weights | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4)},
            tmp_path / "bin" / f"pytorch_model-{i}.bin",
        )
    assert same(load(tmp_path / "bin")[0].state_dict(), model.state_dict())


def test_the_command_converts(random_checkpoint, tmp_path):
    result = command("--ckpt", random_checkpoint, "--out", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert same(open_checkpoint(tmp_path / "hf"), open_checkpoint(random_checkpoint))


# ----------------------------------------------------------------------------------------------------------------------
# what is wrong with a file is said in one line; nothing is left half-written


def command(*flags):
    line = [sys.executable, str(ROOT / "model.py"), *map(str, flags)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


@pytest.fixture
def directory(model, tokenizer, tmp_path):
    save(model, tmp_path / "hf", tokenizer)
    return tmp_path / "hf"


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda d: shutil.rmtree(d), "no such checkpoint"),
        (lambda d: (d / "config.json").unlink(), "neither config.json"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (lambda d: edit(d / "config.json", model_type="gpt2"), "gpt2"),
        (lambda d: edit(d / "config.json", attention_bias=True), "attention_bias"),
        (lambda d: edit(d / "config.json", rope_scaling={"type": "yarn", "factor": 2}), "yarn"),
        (lambda d: edit(d / "config.json", num_hidden_layers=3), "is missing"),
        (lambda d: edit(d / "config.json", num_hidden_layers=1), "not a LLaMA's"),
        (lambda d: edit(d / "config.json", vocab_size=300), "has shape"),
        (lambda d: edit(d / "config.json", hidden_size="x"), "hidden_size"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1000]), "truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 100), "safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"junk"), "sentencepiece"),
    ],
)
def test_a_damaged_directory_is_named(directory, tmp_path, harm, words):
    harm(directory)
    with pytest.raises(UserError, match=words) as e:
        open_checkpoint(directory)
    assert str(directory) in str(e.value) or "tokenizer" in str(e.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer, tmp_path):
    config = dataclasses.replace(PRESETS["test"], vocab_size=tokenizer.vocab_size() - 1)
    save(Llama(config), tmp_path / "model.pt", tokenizer)
    with pytest.raises(UserError, match="its tokenizer has"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_damaged_pt_is_one_line_and_status_2(random_checkpoint, tmp_path):
    data = random_checkpoint.read_bytes()
    for i, damaged in enumerate((b"", b"not a zip", data[: len(data) // 2], data[:-10])):
        (tmp_path / f"{i}.pt").write_bytes(damaged)
        result = command("--ckpt", tmp_path / f"{i}.pt", "--out", tmp_path / "out")
        assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert f"{i}.pt" in result.stderr and not (tmp_path / "out").exists()


def test_a_pickle_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"config": {}, "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="bomb.pt"):
        open_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("out", ("/proc/no/model.pt", "/dev/null/model"))
def test_an_out_that_cannot_be_written_is_refused(random_checkpoint, out):
    result = command("--ckpt", random_checkpoint, "--out", out)
    assert result.returncode == 2 and out in result.stderr and "Traceback" not in result.stderr


def test_a_directory_that_is_not_empty_is_refused(directory, random_checkpoint):
    before = sorted(p.name for p in directory.iterdir())
    result = command("--ckpt", random_checkpoint, "--out", directory)
    assert result.returncode == 2 and "not empty" in result.stderr
    assert before == sorted(p.name for p in directory.iterdir())


def test_a_failed_write_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save(model, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def mutate(header: bytes, rng: random.Random) -> bytes:
    header = bytearray(header)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(header))
        kind = rng.random()
        if kind < 0.5:
            header[i] = rng.randrange(256)
        elif kind < 0.7:
            del header[i : i + rng.randint(1, 9)]
        else:
            header[i:i] = rng.choice([b"9", b"-", b"[", b'"', b"null", b"1e9", b"{", b","])
    return bytes(header)


def test_mutated_safetensors_headers_are_refused_or_read(model, tmp_path):
    save(model, tmp_path / "hf")
    data = (tmp_path / "hf" / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    rng, refused = random.Random(0), 0
    file = tmp_path / "mutated.safetensors"
    for _ in range(300):
        header = mutate(data[8 : 8 + n], rng)
        length = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**40, 2**63, len(header) + 3])
        file.write_bytes(struct.pack("<Q", length) + header + data[8 + n :])
        try:
            tensors = read_safetensors(file)
            assert sum(w.numel() * w.element_size() for w in tensors.values()) <= len(data)
        except UserError:
            refused += 1
    assert refused > 200


def test_config_defaults_are_llama_7b():
    assert LlamaConfig() == PRESETS["llama-7b"]
