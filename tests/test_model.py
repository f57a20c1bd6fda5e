"""What model.py promises: transformers' LLaMA to the last digits, every layout to the same weights, no half file."""

import dataclasses
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import sentencepiece
import torch
from conftest import SHARED, needs_shared, prune_by_magnitude
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import LlamaConfig as HFConfig

from model import (
    HF_NAMES,
    PRESETS,
    Llama,
    LlamaConfig,
    UserError,
    cli,
    describe,
    generate,
    load,
    load_tokenizer,
    main,
    map_tensor,
    meta_params,
    open_checkpoint,
    rename,
    rope_tables,
    safetensors_index,
    save,
    sparsity_of,
    write_checkpoint,
)
from prune import Settings, prune_checkpoint
from spp import merge_checkpoint

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
    draw = lambda **kw: (torch.manual_seed(3), list(generate(model, [1, 2], 15, **kw)))[1]
    assert draw(temperature=1.0) == draw(temperature=1.0)
    assert draw(temperature=1.0, top_p=0.0) == draw() != draw(temperature=2.0)


def test_weights_that_cannot_run_are_named(model, tokenizer, tmp_path):
    model.model.layers[1].mlp.up_proj.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="the logits are not finite"):
        next(generate(model, [1, 2], 1))
    model.model.norm.half()
    save(model, tmp_path / "mixed.pt", tokenizer)
    with pytest.raises(UserError, match="several dtypes .float16, float32."):
        load(tmp_path / "mixed.pt")
    assert load(tmp_path / "mixed.pt", torch.float32)[0].lm_head.weight.dtype == torch.float32


def test_an_empty_tokenizer_file_is_named(model, tmp_path):
    save(model, tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.model").touch()
    with pytest.raises(UserError, match="tokenizer: is not a sentencepiece model"):
        open_checkpoint(tmp_path / "saved")


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (2, 8), (4, 8)])
def test_patterns_are_recognised(n, m):
    weight = torch.randn(6, 48)
    groups = weight.view(-1, m)
    groups.scatter_(1, torch.rand_like(groups).argsort(1)[:, n:], 0)
    assert sparsity_of(weight) == (pytest.approx(1 - n / m), f"{n}:{m}")
    assert sparsity_of(torch.randn(6, 48)) == (0.0, None)


def test_a_directory_that_others_pruned_is_recognised(tmp_path):
    theirs = hf_model(num_key_value_heads=2)
    prune_by_magnitude(theirs, 2, 4)  # and stored dense, as Wanda's and SparseGPT's codes do
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


def test_pruning_and_merging_keep_what_lies_beside(directory, tmp_path):
    edit(directory / "config.json", eos_token_id=[6, 7])
    (directory / "LICENSE").write_bytes(b"free")
    ckpt, settings, tokens = (
        open_checkpoint(directory),
        Settings("magnitude", (2, 4)),
        torch.zeros(1, 8, dtype=torch.long),
    )
    prune_checkpoint(ckpt, tokens, settings, tmp_path / "pruned", {"method": "magnitude"}, "cpu", torch.float32)
    pruned = open_checkpoint(tmp_path / "pruned")
    adapter = {"adapter": {}, "method": "spp", "r": 4, "scale": 2.0, "base": pruned.fingerprint()}
    torch.save(adapter, tmp_path / "adapter.pt")
    write_checkpoint(merge_checkpoint(pruned, tmp_path / "adapter.pt"), tmp_path / "merged")
    for name in ("pruned", "merged"):
        assert (tmp_path / name / "LICENSE").read_bytes() == b"free"
        assert json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] == [6, 7]
    assert [entry["method"] for entry in open_checkpoint(tmp_path / "merged").history] == ["magnitude", "spp"]


def test_other_weights_beside_the_models_are_left_alone(directory, model):
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")  # as Mistral ships them
    assert same(load(directory)[0].state_dict(), model.state_dict())


def test_info_is_one_screen_and_json(random_checkpoint):
    result = command("--ckpt", random_checkpoint, "--info")
    assert result.returncode == 0 and "q_proj" in result.stdout and len(result.stdout.splitlines()) < 24
    about = json.loads(command("--ckpt", random_checkpoint, "--info", "--json").stdout)
    assert about["linears"]["q_proj"] == {"sparsity": 0.0, "pattern": None} and about["parameters"] > 0


def test_a_prompt_goes_on_as_its_flags_say(random_checkpoint, monkeypatch, capsys):
    def says(*flags):
        line = ["model.py", "--ckpt", random_checkpoint, "--prompt", "bada", "--max_new_tokens", 9, *flags]
        monkeypatch.setattr(sys, "argv", [str(part) for part in line])
        main()
        return capsys.readouterr().out

    greedy, hot = says(), ("--temperature", 2, "--seed", 1)
    assert greedy.startswith("bada") and len(says("--max_new_tokens", 20)) > len(greedy) > len(
        says("--max_new_tokens", 0)
    )
    assert says(*hot) == says(*hot) != says("--temperature", 2, "--seed", 2)
    assert says(*hot, "--top_p", 0) == greedy != says(*hot)
    assert says("--dtype", "bfloat16").startswith("bada")


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
    params = meta_params(config)
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


MEASURE = """
import sys
from pathlib import Path
from model import open_checkpoint, write_checkpoint

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(key))

folder = Path(sys.argv[1])
open_checkpoint(folder / "hf")  # imports what torch imports late
for way in ("hf hf2 hf", "hf a.pt hf", "a.pt hf3 hf", "hf meta1 meta", "meta hf4 hf"):
    source, out, layout = way.split()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = status("VmRSS")
    write_checkpoint(open_checkpoint(folder / source), folder / out, None, 40 * 10**6, layout)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are measured as Linux has them")
def test_conversion_needs_less_memory_than_two_shards(tmp_path):
    """340 MB in shards of 40; the peak of the resident size (VmHWM, which counts mapped pages) above its start."""
    config = LlamaConfig(2000, 1024, 4096, 10, 8, max_seq_len=4096, norm_eps=1e-5)
    with torch.device("meta"):
        names = Llama(config).state_dict()
    header, at = {}, 0
    for name, w in names.items():
        header[name] = {"dtype": "BF16", "shape": list(w.shape), "data_offsets": [at, at := at + 2 * w.numel()]}
    text = json.dumps(header).encode()
    save(Llama(dataclasses.replace(config, n_layers=1, vocab_size=1)), tmp_path / "hf")  # for its config.json
    edit(tmp_path / "hf" / "config.json", num_hidden_layers=10, vocab_size=2000)
    with open(tmp_path / "hf" / "model.safetensors", "wb") as f:  # mostly holes, with random bytes in every tensor
        f.write(struct.pack("<Q", len(text)) + text)
        for entry in header.values():
            f.seek(8 + len(text) + entry["data_offsets"][0])
            f.write(random.Random(0).randbytes(2000))
        f.truncate(8 + len(text) + at)
    (tmp_path / "meta").mkdir()  # in 4 parts
    params = {"dim": 1024, "n_layers": 10, "n_heads": 8, "norm_eps": 1e-5}
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    ckpt = open_checkpoint(tmp_path / "hf")
    for i in range(4):
        part = {}
        for name, w in ckpt.items():
            dim = 1 if any(x in name for x in ("o_proj", "down_proj", "embed_tokens")) else 0
            part[rename(name, HF_NAMES)] = (w if w.dim() == 1 else w.chunk(4, dim)[i]).clone()
        torch.save(part, tmp_path / "meta" / f"consolidated.{i:02}.pth")
    line = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    peaks = [float(peak) for peak in result.stdout.split()]
    assert len(peaks) == 5 and max(peaks) < 2 * 40, (peaks, result.stderr)
    bits = lambda name: {key: w.view(torch.int16) for key, w in open_checkpoint(tmp_path / name).items()}
    assert same(bits("hf3"), bits("hf")) and same(bits("meta1"), bits("hf")) and same(bits("hf4"), bits("hf"))


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


def edit_header(path: Path, change) -> None:
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


NORM = "model.norm.weight"
BIG = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
HARMS = {  # what is done to config.json (a dict) or to model.safetensors' header (a function), and what is said of it
    "gpt2": {"model_type": "gpt2"},
    "attention_bias is true": {"attention_bias": True},
    "mlp_bias is true": {"mlp_bias": True},
    "hidden_act is 'gelu'": {"hidden_act": "gelu"},
    "'yarn'.*expected one of LLaMA's types": {"rope_scaling": {"type": "yarn", "factor": 2}},
    "rope_scaling is \\[3\\]": {"rope_scaling": [3]},
    "expected factor above 0": {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "expected factor, low_freq_factor, high_freq_factor": {"rope_scaling": BIG},
    "lm_head.weight is missing": lambda h: h.pop("lm_head.weight") and None,
    "3 layers.*is missing|layers.2.*is missing": {"num_hidden_layers": 3},
    "not a LLaMA's": {"num_hidden_layers": 1},
    "1000000000.*expected a whole number from 1": {"num_hidden_layers": 10**9},
    "100000 layers, but only 21 tensors": {"num_hidden_layers": 10**5},
    "hidden_size is 1073741824": {"hidden_size": 2**30},
    "has shape \\[256, 32\\], its config says \\[256, 33554432\\]": {"hidden_size": 2**25},
    "its config says \\[300, 32\\]": {"vocab_size": 300},
    "hidden_size is 'x'": {"hidden_size": "x"},
    "vocab_size is None": {"vocab_size": None},
    "rms_norm_eps is -1": {"rms_norm_eps": -1},
    "rms_norm_eps is None": {"rms_norm_eps": None},
    "tie_word_embeddings is 1, expected true or false": {"tie_word_embeddings": 1},
    "head_dim is 7, expected an even number": {"head_dim": 7},
    "num_attention_heads is 268435455, expected fewer": {"num_attention_heads": 2**28 - 1, "head_dim": 4},
    "num_key_value_heads is 3, expected a divisor of 4": {"num_key_value_heads": 3},
    "sliding_window is -1": {"model_type": "mistral", "sliding_window": -1},
    "norm.weight is I64; readable are F32, F16, BF16": lambda h: h[NORM].update(dtype="I64"),
    "norm.weight has no dtype, shape and data_offsets": lambda h: h[NORM].pop("dtype") and None,
    "of shape \\[4611686018427387904\\].*cannot lie": lambda h: h[NORM].update(shape=[2**62]),
    "expected to begin at": lambda h: h[NORM].update(data_offsets=[n + 4 for n in h[NORM]["data_offsets"]]),
    "header is not a JSON object": lambda h: [1],
    "has shape \\[(1, ){1000}32": lambda h: h[NORM].update(shape=[1] * 1000 + [32]),
}


@pytest.mark.parametrize("words", HARMS)
def test_a_wrong_config_or_header_is_named(directory, words):
    harm = HARMS[words]
    if callable(harm):
        edit_header(directory / "model.safetensors", harm)
    else:
        edit(directory / "config.json", **harm)
    with pytest.raises(UserError, match=words) as e:
        open_checkpoint(directory)
    assert str(directory) in str(e.value) and "\n" not in str(e.value)


DEEP = "[" * 10**5 + "]" * 10**5


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda d: shutil.rmtree(d), "no such checkpoint"),
        (lambda d: (d / "config.json").unlink(), "neither config.json"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "config.json").write_text(DEEP), "is not JSON"),
        (lambda d: (d / "config.json").write_text("[1]"), "is a JSON list, expected a dict"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "config.json: has no vocab_size"),
        (lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()), "config.json: cannot be read"),
        (lambda d: (d / "history.json").write_text("{}"), "is a JSON dict, expected a list"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1000]), "truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 100), "bytes with a header of"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{]"), "header is not JSON"),
        (lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 200000) + DEEP.encode()), "not JSON"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x16" + bytes(7) + b'{"a": null, "a": null}'), "not JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model"),
        (lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()), "cannot be read"),
        (lambda d: shutil.copy(d / "model.safetensors", d / "model-2.safetensors"), "stands in another file too"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"junk"), "sentencepiece"),
    ],
)
def test_a_damaged_directory_is_named(directory, tmp_path, harm, words):
    harm(directory)
    with pytest.raises(UserError, match=words) as e:
        open_checkpoint(directory)
    assert str(directory) in str(e.value) or "tokenizer" in str(e.value)


def part(folder: Path, i: int) -> dict:
    return torch.load(folder / f"consolidated.{i:02}.pth")


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda d: (d / "consolidated.01.pth").unlink(), "has shape|do not fit"),
        (lambda d: [f.unlink() for f in d.glob("*.pth")], "but no consolidated"),
        (lambda d: edit(d / "params.json", use_scaled_rope=True), "use_scaled_rope"),
        (lambda d: (d / "params.json").write_text('{"dim": 32}'), "has no 'n_layers'"),
        (lambda d: edit(d / "params.json", dim=30), "do not fit together|divisor|head_dim"),
        (lambda d: edit(d / "params.json", dim="x"), "dim is 'x'"),
        (lambda d: edit(d / "params.json", n_layers=10**9), "n_layers"),
        (lambda d: torch.save({}, d / "consolidated.01.pth"), "has no '"),
        (lambda d: torch.save({"output.weight": torch.ones(2)}, d / "consolidated.00.pth"), "has no 'layers.0"),
        (
            lambda d: torch.save({k: w[..., :-1] for k, w in part(d, 1).items()}, d / "consolidated.01.pth"),
            "do not fit",
        ),
        (lambda d: torch.save([1], d / "consolidated.01.pth"), "holds a list, expected a state dict"),
        (lambda d: torch.save({"x": 1}, d / "consolidated.01.pth"), "holds x, which is no plain tensor"),
    ],
)
def test_a_damaged_meta_directory_is_named(model, tmp_path, harm, words):
    write_meta(model, tmp_path / "meta", 2)
    harm(tmp_path / "meta")
    with pytest.raises(UserError, match=words) as e:
        open_checkpoint(tmp_path / "meta")
    assert str(tmp_path / "meta") in str(e.value)


DEEP_HISTORY = b"\x80\x02}(U\x06config}U\x05model}U\x07history" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"u."


@pytest.mark.parametrize(
    "change, words",
    [
        ({"config": 3}, "its config is a int"),
        ({"config": {"n_heads": 0}}, "n_heads is 0"),
        ({"config": {"width": 1}}, "config: width: unknown key"),
        ({"tokenizer": "x"}, "its tokenizer is a str"),
        ({"history": {}}, "its history is a dict"),
        ({"history": ["x"]}, "its history or config.json is damaged"),
        ({"history": [{"x": torch.ones(1)}]}, "its history or config.json is damaged"),
        ({"files": []}, "its files is a list"),
        ({"files": {"config.json": b"{"}}, "its history or config.json is damaged"),
        ({"files": {"../LICENSE": b"x"}}, "holds the file '../LICENSE'"),
        ({"files": {"LICENSE/../../x": b"x"}}, "holds the file 'LICENSE/../../x'"),
        ({"files": {".bashrc": b"x"}}, "holds the file '.bashrc'"),
        ({"files": {"LICENSE": "x"}}, "holds the file 'LICENSE'"),
        ({"model": [1]}, "holds a list, expected a state dict"),
        ({"model": {NORM: 1}}, "holds model.norm.weight, which is no plain tensor"),
        ({"model": {3: torch.ones(1)}}, "holds 3, which is no plain tensor"),
        ({"model": {NORM: torch.ones(32).to_sparse()}}, "no plain tensor"),
        ({"model": {NORM: torch.empty(32, device="meta")}}, "no plain tensor"),
        ({"model": {NORM: torch.ones(1).expand(2**40)}}, "larger than what is stored of it"),
        ({"model": {NORM: torch.ones(32, dtype=torch.float64)}}, "2 layers, but only 1 tensors"),
    ],
)
def test_a_wrong_pt_is_named(random_checkpoint, tmp_path, change, words):
    torch.save(torch.load(random_checkpoint) | change, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=words) as e:
        open_checkpoint(tmp_path / "wrong.pt")
    assert str(tmp_path / "wrong.pt") in str(e.value)


def test_a_pt_that_says_no_more_than_it_must_loads(model, tmp_path):
    config = dataclasses.asdict(model.config)
    del config["sliding_window"]  # which older files do not have
    torch.save({"config": config, "model": model.state_dict()}, tmp_path / "old.pt")
    again, tokenizer = load(tmp_path / "old.pt")
    assert same(again.state_dict(), model.state_dict()) and again.history == [] and tokenizer is None


def test_another_dtype_is_named(random_checkpoint, tmp_path):
    data = torch.load(random_checkpoint)
    data["model"][NORM] = data["model"][NORM].double()
    torch.save(data, tmp_path / "double.pt")
    with pytest.raises(UserError, match="norm.weight is torch.float64; readable are F32, F16, BF16"):
        open_checkpoint(tmp_path / "double.pt")


def grown(function) -> float:
    """MB by which the process's largest resident size rises while function() is refused."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize(
    "pickle, words",
    [
        (b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R.", "holds a bytearray"),  # a GB of zeros
        (b"\x80\x02ctorch\nFloatTensor\nJ\x00\x00\x00\x40\x85R.", "is not a checkpoint of ours"),
        (b"\x80\x02" + b"(" * 10**5 + b".", "damaged"),
        (DEEP_HISTORY, "damaged"),
    ],
)
def test_a_pickle_that_swells_is_refused(tmp_path, pickle, words):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as z:
        z.writestr("bomb/data.pkl", pickle)
        z.writestr("bomb/version", "3\n")
    with pytest.raises(UserError, match=words):
        open_checkpoint(tmp_path / "bomb.pt")
    assert grown(lambda: open_checkpoint(tmp_path / "bomb.pt")) < 20


def test_a_compressed_pt_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("bomb/data.pkl", bytes(10**8))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**6
    assert grown(lambda: open_checkpoint(tmp_path / "bomb.pt")) < 20
    with pytest.raises(UserError, match="compressed"):
        open_checkpoint(tmp_path / "bomb.pt")


def test_a_pt_that_claims_more_than_it_stores_is_refused(tmp_path):
    """The pickle is edited: the norm's 32 numbers become 2**30, in the tensor's shape and in its storage's size."""
    save(Llama(PRESETS["test"]), tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "model.pt") as z:
        entries = {name: z.read(name) for name in z.namelist() if name.endswith(("data.pkl", "version", "order"))}
        entries |= {name: b"\0" * 128 for name in z.namelist() if "/data/" in name}
    name = next(name for name in entries if name.endswith("data.pkl"))
    small, large = b"K\x20", b"J\x00\x00\x00\x40"
    assert data.count(small) > 5
    for start in [i for i in range(len(entries[name])) if entries[name].startswith(small, i)]:
        edited = entries[name][:start] + large + entries[name][start + 2 :]
        with zipfile.ZipFile(tmp_path / "edited.pt", "w") as z:
            for key, value in (entries | {name: edited}).items():
                z.writestr(key, value)
        assert grown(lambda: open_checkpoint(tmp_path / "edited.pt")) < 20


def test_whoever_asks_for_a_tokenizer_hears_what_is_missing(model, tmp_path):
    save(model, tmp_path / "model.pt")
    (tmp_path / "junk.model").write_bytes(b"junk")
    for source, words in {
        "model.pt": "holds no tokenizer",
        "absent.model": "cannot be read",
        "junk.model": "is not a sentencepiece model",
        ".": "cannot be read",
    }.items():
        with pytest.raises(UserError, match=words):
            load_tokenizer(tmp_path / source)


@pytest.mark.parametrize("key, value", [("rope_scaling", None), ("sliding_window", 64), ("head_dim", 4)])
def test_what_metas_layout_cannot_say_is_refused(tmp_path, key, value):
    change = {key: value or {"rope_type": "linear", "factor": 2.0}}
    save(Llama(dataclasses.replace(PRESETS["test"], **change)), tmp_path / "model.pt")
    ckpt = open_checkpoint(tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"no room for the model's {key}"):
        write_checkpoint(ckpt, tmp_path / "meta", layout="meta")
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing to do"),
        (["--out", "OUT", "--max_shard_size", "5"], "--max_shard_size 5: expected"),
        (["--out", "OUT", "--max_shard_size", "0GB"], "--max_shard_size 0GB: expected"),
        (["--out", "OUT.pt", "--layout", "meta"], "--layout meta: needs --out"),
        (["--info", "--layout", "meta"], "--layout meta: needs --out"),
        (["--out", "OUT", "--json"], "--json: is for --info"),
        (["--prompt", "x", "--max_new_tokens", "-1"], "--max_new_tokens: expected at least 0, found -1"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature: expected a finite number, found nan"),
        (["--prompt", "x", "--top_p", "1.5"], "--top_p: expected at least 0 and at most 1, found 1.5"),
        (["--out", "FILE"], "is a file; a name without .pt is a directory"),
        (["--out", "DIR.pt"], "is a directory, and a .pt name is a file"),
        (["--out", "FULL"], "the directory is not empty"),
        (["--prompt", "x", "--ckpt", "BARE"], "has no tokenizer.model"),
        (["--prompt", "x", "--ckpt", "WINDOW"], "more than the model's sliding window of 16"),
        (["--prompt", "", "--ckpt", "NOBOS"], "is empty, and the tokenizer has no token to begin with"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_is_done(
    random_checkpoint, tokenizer, tokenizer_file, tmp_path, monkeypatch, capsys, flags, words
):
    (tmp_path / "FILE").touch()
    (tmp_path / "DIR.pt").mkdir()
    (tmp_path / "FULL" / "of").mkdir(parents=True)
    small = Llama(dataclasses.replace(PRESETS["test"], sliding_window=16))
    if "BARE" in flags:
        save(small, tmp_path / "BARE")
    if "WINDOW" in flags:
        save(small, tmp_path / "WINDOW", tokenizer)
    if "NOBOS" in flags:
        proto = sentencepiece.SentencePieceProcessor(str(tokenizer_file))
        monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "bos_id", lambda self: -1)
        save(Llama(PRESETS["test"]), tmp_path / "NOBOS", proto)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["model.py", "--ckpt", str(random_checkpoint), *flags])
    with pytest.raises(SystemExit) as e:
        cli(main)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and not out
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_is_one_line_whatever_it_quotes(capsys):
    def fail():
        raise UserError("a\nb")

    with pytest.raises(SystemExit):
        cli(fail)
    assert capsys.readouterr().err.endswith("error: a b\n")


def test_a_reader_that_leaves_ends_the_command_quietly(random_checkpoint):
    line = f"{sys.executable} model.py --ckpt {random_checkpoint} --info --json | true"
    result = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr


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


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")))
def test_a_failed_write_leaves_nothing(model, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="model.pt: cannot be written: (No space left|unexpected pos)"):
        save(model, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def mutate(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i, kind = rng.randrange(len(data)), rng.random()
        if kind < 0.5:
            data[i] = rng.randrange(256)
        elif kind < 0.6:
            data[i] ^= 1 << rng.randrange(8)
        elif kind < 0.7:
            del data[i : i + rng.randint(1, 9)]
        else:  # what JSON and pickle give a meaning to: numbers, brackets, the largest integers
            odd = rng.choice([b"9", b"-", b"[", b'"', b"null", b"1e9", b"{", b",", b"J\xff\xff\xff\x7f", b"K\0", b"R"])
            data[i : i + rng.choice([0, len(odd)])] = odd
    return bytes(data)


TINY = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, n_layers=1, n_heads=2, max_seq_len=16)


def fuzz(path: Path, n: int, case) -> None:
    """Opens `path` after each of n rewritings of its weights: a UserError of one line, or every tensor can be read.
    No time and no memory that the file's few kB would not explain."""
    rng, refused = random.Random(0), 0
    for i in range(n):
        if i == 100:  # when everything has been imported
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        case(rng)
        start = time.monotonic()
        try:
            assert all(w.sum().dtype == w.dtype for w in open_checkpoint(path).values())
        except UserError:
            refused += 1
        assert time.monotonic() - start < 5
    assert 0.5 * n < refused < n
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


N_FUZZ = int(os.environ.get("N_FUZZ", 10_000))  # in all


def test_mutated_safetensors_headers_are_refused_or_read(tmp_path):
    save(Llama(TINY), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]

    def case(rng):
        header = mutate(data[8 : 8 + n], rng)
        length = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**40, 2**63, len(header) + 3])
        file.write_bytes(struct.pack("<Q", length) + header + data[8 + n :])

    fuzz(tmp_path / "hf", N_FUZZ * 6 // 10, case)


def test_mutated_pt_files_are_refused_or_read(tmp_path):
    save(Llama(TINY), tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    second, directory = data.index(b"PK\3\4", 4), data.index(b"PK\1\2")  # the first entry is the pickle

    def case(rng):  # mostly the pickle, at its own length; then the zip's directory; then anything
        start, end = rng.choice([(64, second), (64, second), (directory, len(data)), (0, len(data))])
        part = mutate(data[start:end], rng)
        part = (part + bytes(40))[: end - start] if end == second else part
        (tmp_path / "model.pt").write_bytes(data[:start] + part + data[end:])

    fuzz(tmp_path / "model.pt", N_FUZZ * 4 // 10, case)


def test_config_defaults_are_llama_7b():
    assert LlamaConfig() == PRESETS["llama-7b"]
