"""What data/checkpoint.py promises: every layout to the same weights, nothing half-written, one line for what is wrong."""

import dataclasses
import errno
import fcntl
import io
import itertools
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import sentencepiece
import torch
from conftest import ROOT, command, edit, hf_model, prune_by_magnitude, same
from transformers import AutoConfig, AutoModelForCausalLM

from data import checkpoint
from data.checkpoint import HF_NAMES, VERSION, Checkpoint, UserError, atomic, check_out, hf_to_meta, identity, lock
from data.checkpoint import map_tensor, meta_to_hf, open_checkpoint, read_npy, rename, safetensors_index
from data.checkpoint import write_checkpoint, write_json, write_safetensors
from data.tokenizer import SIBLINGS, load_tokenizer
from model import PRESETS, Llama, LlamaConfig, config_from_dict, config_to_dict, give_tokenizer, load, open_llama, save
from model import rope_tables, tokenizer_of
from prune import Settings, prune_checkpoint
from spp import adapter_state, inject, merge_checkpoint, write_adapter

FORMATS = ("pt", "hf", "sharded", "meta")
NORM = "model.norm.weight"


def write_as(ckpt: Checkpoint, path: Path, form: str) -> Path:
    path = path.with_suffix(".pt") if form == "pt" else path
    size = 30_000 if form == "sharded" else 10**9
    write_checkpoint(ckpt, path, max_shard_size=size, layout="meta" if form == "meta" else "hf")
    assert form != "sharded" or len(list(path.glob("*.safetensors"))) > 1
    return path


# ----------------------------------------------------------------------------------------------------------------------
# what travels beside the weights


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
    first = write_as(open_llama(directory)[0], tmp_path / "a", through)
    write_checkpoint(open_llama(first)[0], tmp_path / "b")
    for name, data in BESIDE.items():
        there = tmp_path / "b" / name
        assert not there.exists() if b"behind" in data else there.read_bytes() == data
    config = AutoConfig.from_pretrained(tmp_path / "b")
    kept = (1, 2, None) if through == "meta" else (5, [6, 7], 0)  # it has no place for them: transformers' own
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == kept


def test_loading_and_saving_keep_what_lies_beside_and_a_tokenizer_replaces_its_own_files_alone(directory, tmp_path):
    for name, data in BESIDE.items():
        (directory / name).write_bytes(data)
    model, tokenizer = load(directory)
    save(model, tmp_path / "a", tokenizer)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(directory / "tokenizer.model", other)
    (other / "chat_template.jinja").write_bytes(b"another's")
    give_tokenizer(ckpt := open_llama(tmp_path / "a")[0], load_tokenizer(other))
    write_checkpoint(ckpt, tmp_path / "b")
    of_tokenizer = {*SIBLINGS} - {"chat_template.jinja"}
    for name, data in BESIDE.items():
        a, b = tmp_path / "a" / name, tmp_path / "b" / name
        assert not a.exists() if b"behind" in data else a.read_bytes() == data, name
        if name == "chat_template.jinja":
            assert b.read_bytes() == b"another's"
        else:
            assert b.exists() == (a.exists() and name not in of_tokenizer), name


def test_pruning_and_merging_keep_what_lies_beside(directory, tmp_path):
    edit(directory / "config.json", eos_token_id=[6, 7])
    (directory / "LICENSE").write_bytes(b"free")
    ckpt, config = open_llama(directory)
    tokens, out = torch.zeros(1, 8, dtype=torch.long), tmp_path / "pruned"
    step = {"method": "magnitude"}
    prune_checkpoint(ckpt, config, tokens, Settings("magnitude", (2, 4)), out, step, "cpu", torch.float32)
    pruned, _ = open_llama(out)
    state = adapter_state(inject(load(out)[0], r=4))
    write_adapter(tmp_path / "adapter.pt", state, pruned.fingerprint(), "spp", 4, 2.0)
    write_checkpoint(merge_checkpoint(pruned, tmp_path / "adapter.pt"), tmp_path / "merged")
    for name in ("pruned", "merged"):
        assert (tmp_path / name / "LICENSE").read_bytes() == b"free"
        assert json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] == [6, 7]
    assert [entry["method"] for entry in open_checkpoint(tmp_path / "merged").history] == ["magnitude", "spp"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_history_travels(model, tmp_path, form):
    model.history = [{"method": "wanda", "sparsity": "2:4", "seed": 0}, {"method": "spp", "scale": 2.0, "a": None}]
    save(model, tmp_path / "model.pt")
    again = open_llama(write_as(open_llama(tmp_path / "model.pt")[0], tmp_path / "again", form))[0]
    assert again.history == model.history
    if form != "pt":
        expected = {"version": VERSION, "history": model.history}
        assert json.loads((tmp_path / "again" / "history.json").read_text()) == expected


STEPS = [{"method": "wanda", "sparsity": "2:4"}, {"method": "spp"}]
OLD_OR_FOREIGN = (
    STEPS,
    [0.5, 0.4],
    [],
    {},
    {"loss": [1.0]},
    {"history": None},
    [{"loss": 1.0}],
    3,
    None,
    "x",
    [["a", "b"]],
)


@pytest.mark.parametrize("content", OLD_OR_FOREIGN)
def test_a_history_of_an_older_version_or_another_program_is_refused_and_left_alone(directory, content):
    file = directory / "history.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as e:
        open_checkpoint(directory)
    assert str(e.value) == f"{file}: is no history that this version wrote; move it away, and the model loads"
    assert json.loads(file.read_text()) == content
    file.rename(directory / "losses.json")
    assert open_llama(directory)[0].history == []


@pytest.mark.parametrize(
    "content, words",
    [
        ({"history": STEPS}, "has no version, expected 2: its layout is another"),
        ({"version": 0, "history": []}, "has version 0, expected 2"),
        ({"version": 2, "history": {}}, "its history is damaged"),
        ({"version": 2, "history": [{"sparsity": "2:4"}]}, "its history is damaged"),
        ({"version": 2, "history": [{"method": ["wanda"]}]}, "its history is damaged"),
    ],
)
def test_a_history_that_is_damaged_is_refused_by_name(directory, content, words):
    (directory / "history.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"history.json: {words}"):
        open_checkpoint(directory)


def test_other_weights_beside_the_models_are_left_alone(directory, model):
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")  # as Mistral ships them
    assert same(load(directory)[0].state_dict(), model.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# layouts


def read_safetensors(path):
    return {name: map_tensor(path, identity(path), *entry) for name, entry in safetensors_index(path).items()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_round_trips_are_bit_for_bit(model, tokenizer, tmp_path, dtype, first, second):
    model.to(dtype).history = [{"method": "wanda", "sparsity": "2:4"}]
    save(model, tmp_path / "model.pt", tokenizer)
    source, _ = open_llama(tmp_path / "model.pt")
    source.files = {"LICENSE.txt": b"do as you like", "tokenizer_config.json": b"{}"}
    fingerprint = source.fingerprint()
    for name, form in (("first", first), ("second", second), ("back", "pt")):
        again, config = open_llama(write_as(source, tmp_path / name, form))
        assert same(again, model.state_dict()) and again.fingerprint() == fingerprint
        assert config == model.config and again.history == model.history
        assert again.tokenizer == tokenizer.data
        assert again.files["LICENSE.txt"] == b"do as you like" and again.files["tokenizer_config.json"] == b"{}"
        source = again


def test_the_fingerprint_sees_every_name_shape_dtype_and_byte(model, tmp_path):
    def fingerprint(change) -> str:
        state = {name: w.clone() for name, w in model.state_dict().items()}
        change(state)
        tensors = {name: (w.to("meta"), lambda w=w: w) for name, w in state.items()}
        return Checkpoint(None, {}, tensors).fingerprint()

    last = "model.embed_tokens.weight"
    changes = [
        lambda state: None,
        lambda state: state[last][-1, -1].add_(1),
        lambda state: state[last][0, 0].add_(1),
        lambda state: state.update({NORM: state[NORM].half()}),
        lambda state: state.update({last: state[last].T}),
        lambda state: state.update({"other": state.pop(NORM)}),
    ]
    assert len({fingerprint(change) for change in changes}) == len(changes)
    assert fingerprint(changes[0]) == fingerprint(lambda state: state.update({NORM: state.pop(NORM)}))  # in any order


@pytest.mark.parametrize("form", FORMATS)
def test_tied_embeddings_survive_every_format(tmp_path, form):
    model = Llama(dataclasses.replace(PRESETS["test"], tie_word_embeddings=True))
    save(model, tmp_path / "model.pt")
    again, _ = load(write_as(open_llama(tmp_path / "model.pt")[0], tmp_path / "again", form))
    assert same(again.state_dict(), model.state_dict())
    assert again.config.tie_word_embeddings == (form != "meta")  # whose code wants both matrices


@pytest.mark.parametrize("absent", (None, "lm_head.weight", "model.embed_tokens.weight"))
def test_tied_embeddings_may_be_stored_under_either_name_or_both(tmp_path, absent):
    theirs = hf_model(tie_word_embeddings=True)
    weights = {name: w.clone() for name, w in theirs.state_dict().items() if name != absent}
    theirs.save_pretrained(tmp_path / "hf")
    safetensors.torch.save_file(weights, tmp_path / "hf" / "model.safetensors")
    ours, _ = load(tmp_path / "hf")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert same(ours.state_dict(), theirs.state_dict())


def test_a_tied_model_that_kept_its_head_alone_loads_as_in_transformers(tmp_path):
    theirs = hf_model(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "hf")
    safetensors.torch.save_model(theirs, str(tmp_path / "hf" / "model.safetensors"))  # the alphabet's first name stays
    names = safetensors_index(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" in names and "model.embed_tokens.weight" not in names
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(0, 128, (2, 60))
    for path in (tmp_path / "hf", write_as(open_llama(tmp_path / "hf")[0], tmp_path / "again", "hf")):
        with torch.no_grad():
            assert (load(path)[0](tokens) - theirs(tokens).logits).abs().max() < 1e-4


def meta_width(params: dict) -> int:
    """The MLP's width as Meta's code computes it from params.json."""
    width = int(2 * (4 * params["dim"]) / 3)
    width = int(params.get("ffn_dim_multiplier", 1) * width)
    return params["multiple_of"] * ((width + params["multiple_of"] - 1) // params["multiple_of"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("odd", (0, 1))
def test_params_json_gives_the_width_of_the_mlp(preset, odd):
    config = dataclasses.replace(PRESETS[preset], intermediate_size=PRESETS[preset].intermediate_size + odd)
    params = hf_to_meta(config_to_dict(config))
    assert meta_width(params) == config.intermediate_size
    # Meta's code knows no such key
    assert "max_seq_len" not in params or not preset.startswith("llama")


def write_meta(model: Llama, folder: Path, parts: int, rows: bool = False) -> None:
    """Meta's layout from ours, written from its description: rows of wq and wk interleaved, matrices cut in parts.
    rows: embeddings are cut along the vocabulary, as since LLaMA-3."""
    c = model.config
    folder.mkdir()
    params = {
        "dim": c.hidden_size,
        "multiple_of": 32,
        "n_heads": c.num_attention_heads,
        "n_layers": c.num_hidden_layers,
    }
    params.update(n_kv_heads=c.num_key_value_heads, norm_eps=c.rms_norm_eps, vocab_size=-1)
    (folder / "params.json").write_text(json.dumps(params))
    names = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    names.update(gate_proj="w1", down_proj="w2", up_proj="w3")
    out = [{"rope.freqs": torch.zeros(4)} for _ in range(parts)]
    for i in range(c.num_hidden_layers):  # LLaMA-1 has them in every layer
        out[0][f"layers.{i}.attention.inner_attention.rope.freqs"] = torch.zeros(4)
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
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    model = Llama(dataclasses.replace(PRESETS["test"], **shape, head_dim=8))
    write_meta(model, tmp_path / "meta", parts, rows)
    joined, _ = load(tmp_path / "meta")
    assert same(joined.state_dict(), model.state_dict())


def test_metas_layout_is_written_as_meta_has_it(model, tmp_path):
    write_meta(model, tmp_path / "theirs", 1)
    save(model, tmp_path / "model.pt")
    write_as(open_llama(tmp_path / "model.pt")[0], tmp_path / "ours", "meta")
    theirs, ours = (torch.load(tmp_path / name / "consolidated.00.pth") for name in ("theirs", "ours"))
    theirs = {name: w for name, w in theirs.items() if not name.endswith("rope.freqs")}  # Meta's code computes them
    assert same(ours, theirs)


FREQS = ["rope.freqs"]
LAYERS = [f"layers.{i}.attention.inner_attention.rope.freqs" for i in range(4)]
DIM = {"dim": 4096, "n_layers": 4, "n_heads": 32, "norm_eps": 1e-5}
SHAPE_70B = {**DIM, "dim": 8192, "n_heads": 64, "n_kv_heads": 8}


@pytest.mark.parametrize(
    "params, names, length",
    [
        ({**DIM, "norm_eps": 1e-6, "vocab_size": -1}, LAYERS, 2048),  # LLaMA 7B
        ({**DIM, "dim": 8192, "n_heads": 64}, LAYERS, 2048),  # LLaMA 65B, whose norm_eps is 1e-5
        ({**DIM, "norm_eps": 1e-6}, [*LAYERS, *FREQS], 2048),
        (DIM, FREQS, 4096),  # LLaMA-2 7B
        (SHAPE_70B, [], 4096),  # LLaMA-2 70B
        ({**DIM, "rope_theta": 1e6}, FREQS, 16384),  # CodeLlama
        ({**SHAPE_70B, "rope_theta": 1e6}, FREQS, 16384),
        ({**DIM, "n_kv_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256}, [], 8192),  # LLaMA-3
        ({**DIM, "vocab_size": 128256}, [], 8192),
        ({**SHAPE_70B, "rope_theta": 500000.0, "use_scaled_rope": True}, [], 131072),  # LLaMA-3.1
        (DIM, [], None),
        ({**DIM, "norm_eps": 1e-6}, LAYERS[:3], None),
        ({**DIM, "rope_theta": 5e6}, FREQS, None),
        ({**DIM, "head_dim": 128, "hidden_dim": 14336, "rope_theta": 1e6}, [], None),  # Mistral 0.2
        ({**DIM, "max_seq_len": 300}, FREQS, 300),  # a key of our own
    ],
)
def test_the_training_length_of_metas_layout_is_determined_or_unknown(params, names, length):
    shapes = {"output.weight": (32000, 1), "layers.0.feed_forward.w1.weight": (11008, 1)}
    part = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = meta_to_hf(params, [{**part, **dict.fromkeys(names)}])
    assert config["max_position_embeddings"] == length
    assert config_from_dict(config, "x").max_position_embeddings == length


@pytest.mark.parametrize("dim, factor", [(2048, 32.0), (3072, 32.0), (4096, 8.0), (8192, 8.0), (16384, 8.0)])
def test_use_scaled_rope_is_what_hugging_face_publishes_and_comes_back(dim, factor):
    params = {**DIM, "dim": dim, "n_kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "use_scaled_rope": True}
    width = torch.empty(4 * dim, 1, device="meta")
    config = config_from_dict(meta_to_hf(params, [{"layers.0.feed_forward.w1.weight": width}]), "x")
    assert config.rope_scaling == {**PRESETS["llama-3.2-1b"].rope_scaling, "factor": factor}
    again = hf_to_meta(config_to_dict(config))
    assert params.items() <= again.items() and "max_seq_len" not in again


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("dim, forms", [(64, FORMATS), (2048, ("hf", "meta"))], ids=("factor 8", "factor 32"))
def test_a_llama_3_survives_every_way_through_the_layouts_and_runs_as_in_transformers(tmp_path, dim, forms, tied):
    scaling = {**PRESETS["llama-3.2-1b"].rope_scaling, "factor": 8.0 if dim == 64 else 32.0}
    shape = {"hidden_size": dim, "num_key_value_heads": 2, "tie_word_embeddings": tied, "initializer_range": 2 / dim}
    length = {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": scaling}
    theirs = hf_model(**shape, **length)
    tokens, positions = torch.randint(0, 128, (2, 100)), torch.arange(0, 20000, 200)  # 8,192 at first
    with torch.no_grad():
        whole = torch.ones_like(tokens)  # without it, gaps in positions would mean several texts in one row
        logits = theirs(tokens, attention_mask=whole, position_ids=positions.expand(2, -1)).logits
    theirs.save_pretrained(tmp_path / "hf")
    published, _ = load(tmp_path / "hf")
    write_meta(published, tmp_path / "meta", 2, rows=True)
    edit(tmp_path / "meta" / "params.json", rope_theta=500000.0, use_scaled_rope=True, vocab_size=128)
    weights, path = published.state_dict(), tmp_path / "meta"
    for i, form in enumerate(form for way in itertools.permutations(forms, 2) for form in way):
        path = write_as(open_llama(path)[0], tmp_path / f"step-{i}", form)
        again, config = open_llama(path)
        assert all(again[name].equal(weights[name]) for name in again) and len(again) == len(weights)
        assert config == dataclasses.replace(published.config, tie_word_embeddings=False)  # Meta's code wants both
        assert form != "meta" or json.loads((path / "params.json").read_text())["use_scaled_rope"]
    paths = [path, write_as(open_llama(tmp_path / "hf")[0], tmp_path / "from-hf", "meta")]
    for ours in (published, *(load(path)[0] for path in paths)):
        assert same(ours.state_dict(), weights)
        with torch.no_grad():
            x, tables = ours.model.embed_tokens(tokens), rope_tables(ours.config, positions, torch.float32)
            for block in ours.model.layers:
                x = block(x, *tables)
            assert (ours.lm_head(ours.model.norm(x)) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("length", (128, 2048, 4096, 8192, None))
@pytest.mark.parametrize("theta", (10000.0, 500000.0))
def test_the_training_length_survives_every_layout_known_or_not(tmp_path, length, theta):
    model = Llama(dataclasses.replace(PRESETS["test"], max_position_embeddings=length, rope_theta=theta))
    save(model, tmp_path / "model.pt")
    for form in FORMATS:
        again = write_as(open_llama(tmp_path / "model.pt")[0], tmp_path / f"as-{form}", form)
        by_theta = 8192 if form == "meta" and theta == 500000 else None  # which Meta's layout determines by itself
        assert open_llama(again)[1].max_position_embeddings == (length or by_theta)
    assert open_llama(tmp_path / "as-hf")[1] == model.config


def test_a_directory_of_unknown_length_loads_in_transformers_and_says_so_in_info(tmp_path):
    save(Llama(dataclasses.replace(PRESETS["test"], max_position_embeddings=None)), tmp_path / "hf")
    tokens = torch.randint(0, 256, (1, 30))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert (load(tmp_path / "hf")[0](tokens) - theirs(tokens).logits).abs().max() < 1e-4
    result = command("--ckpt", tmp_path / "hf", "--info")
    assert result.returncode == 0 and "an unknown number of positions" in result.stdout


@pytest.mark.parametrize(
    "key, value",
    [
        ("moe", {"num_experts": 8, "num_experts_per_tok": 2}),
        ("quantization_args", {"scheme": "int8"}),
        ("lora_args", {"rank": 16}),
        ("qk_norm", True),
        ("attention_scale", 3),
    ],
)
def test_a_key_of_params_json_that_is_not_known_is_refused_by_name(model, tmp_path, key, value):
    write_meta(model, tmp_path / "meta", 1)
    edit(tmp_path / "meta" / "params.json", **{key: value})
    with pytest.raises(UserError, match=f"params.json: {key} is .*may change the function and is not understood"):
        open_llama(tmp_path / "meta")
    edit(tmp_path / "meta" / "params.json", **{key: None})
    assert same(load(tmp_path / "meta")[0].state_dict(), model.state_dict())


@pytest.mark.parametrize("file", ("consolidated.00.pth", "consolidated.safetensors"))
def test_mistrals_own_layout_is_honoured(tmp_path, file):
    model = Llama(dataclasses.replace(PRESETS["test"], head_dim=16, sliding_window=20, max_position_embeddings=None))
    write_meta(model, tmp_path / "own", 1)
    edit(tmp_path / "own" / "params.json", head_dim=16, sliding_window=20, hidden_dim=64, vocab_size=256)
    weights = torch.load(tmp_path / "own" / "consolidated.00.pth")
    (tmp_path / "own" / "consolidated.00.pth").unlink()
    if file.endswith(".pth"):
        torch.save(weights, tmp_path / "own" / file)
    else:
        safetensors.torch.save_file(weights, tmp_path / "own" / file)
    ours, _ = load(tmp_path / "own")
    assert ours.config == dataclasses.replace(model.config, rms_norm_eps=ours.config.rms_norm_eps)
    assert same(ours.state_dict(), model.state_dict())
    with pytest.raises(UserError, match="more than the model's sliding window of 20"):
        ours(torch.zeros(1, 21, dtype=torch.int64))
    for key in ("hidden_dim", "vocab_size"):  # what is stated is held against the matrices
        params = (tmp_path / "own" / "params.json").read_text()
        edit(tmp_path / "own" / "params.json", **{key: 60})
        with pytest.raises(UserError, match="has shape .*, its config says \\[60, 32\\]"):
            open_llama(tmp_path / "own")
        (tmp_path / "own" / "params.json").write_text(params)


def test_a_streamed_pt_is_what_torch_save_writes(model, tmp_path):
    save(model, tmp_path / "model.pt")
    for mmap in (False, True):
        data = torch.load(tmp_path / "model.pt", mmap=mmap, weights_only=True)
        assert same(data["model"], model.state_dict()) and data["version"] == VERSION
        assert data["config"] == {**config_to_dict(model.config), "bos_token_id": 1, "eos_token_id": 2}


def test_a_pt_is_parsed_once_for_all_tensors_and_gives_them_as_they_are_stored(model, tmp_path, monkeypatch):
    """However often, and whatever was done to what it gave before. Parsing it for each took a minute of SmolLM2's."""
    parsed, torch_state = [], checkpoint.torch_state
    monkeypatch.setattr(checkpoint, "torch_state", lambda *args: parsed.append(1) or torch_state(*args))
    prune_by_magnitude(model, 2, 4)  # its linears are packed
    save(model, tmp_path / "pruned.pt")
    ckpt = open_checkpoint(tmp_path / "pruned.pt")
    before = {name: w.clone() for name, w in ckpt.items()}
    assert len(parsed) == 1 and "model.norm.weight" in ckpt and "nothing" not in ckpt
    for _ in range(2):
        for name in ckpt:
            assert ckpt[name].zero_().shape == before[name].shape
    assert all(w.equal(before[name]) for name, w in ckpt.items()) and len(parsed) == 4
    for _ in range(2):
        assert ckpt["model.norm.weight"].equal(before["model.norm.weight"])
    stored = checkpoint.torch_tensors(tmp_path / "pruned.pt", "model", remap=1000)  # as a large model is walked
    expected = torch.load(tmp_path / "pruned.pt")["model"]
    assert all(get().equal(expected[name]) for name, (_, get) in stored.items()) and len(parsed) > 10


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_conversion_holds_one_tensor_at_a_time(model, tmp_path, source, target):
    """Every tensor that a checkpoint gives is watched: none is alive when the next is asked for."""
    save(model, tmp_path / "model.pt")
    ckpt, _ = open_llama(write_as(open_llama(tmp_path / "model.pt")[0], tmp_path / "source", source))
    given, alive = [], []

    def watched(get):
        def get_one():
            alive.append(sum(w() is not None for w in given))
            w = get()
            given.append(weakref.ref(w))
            return w

        return get_one

    ckpt.getters = {name: watched(get) for name, get in ckpt.getters.items()}
    write_as(ckpt, tmp_path / "target", target)
    assert len(given) == len(ckpt) and max(alive) <= 1  # the name of a loop holds one until it is given the next


MEASURE = """
import sys
from pathlib import Path
from data.checkpoint import write_checkpoint
from model import open_llama

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(key))

folder = Path(sys.argv[1])
for layout in ("hf", "meta"):
    open_llama(folder / layout)  # imports what torch imports late
for way in ("hf hf2 hf", "hf a.pt hf", "a.pt hf3 hf", "hf meta1 meta", "meta hf4 hf"):
    source, out, layout = way.split()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = status("VmRSS")
    write_checkpoint(open_llama(folder / source)[0], folder / out, None, 40 * 10**6, layout)
    print(status("VmHWM") - before)
"""


@pytest.mark.stress
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are measured as Linux has them")
def test_conversion_needs_less_memory_than_two_shards(tmp_path):
    """340 MB in shards of 40; the peak of the resident size (VmHWM, which counts mapped pages) above its start."""
    config = LlamaConfig(2000, 1024, 4096, 10, 8, max_position_embeddings=4096, rms_norm_eps=1e-5)
    with torch.device("meta"):
        names = Llama(config).state_dict()
    header, at = {}, 0
    for name, w in names.items():
        header[name] = {"dtype": "BF16", "shape": list(w.shape), "data_offsets": [at, at := at + 2 * w.numel()]}
    text = json.dumps(header).encode()
    small = dataclasses.replace(config, num_hidden_layers=1, vocab_size=1)
    save(Llama(small), tmp_path / "hf")  # for its config.json
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
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or malloc keeps some of what is freed, now more, now less
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env)
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
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        torch.save(weights, tmp_path / "bin" / f"pytorch_model-{i}.bin")
    assert same(load(tmp_path / "bin")[0].state_dict(), model.state_dict())


def as_old_bin(model, directory: Path, sharded: bool = False) -> None:
    """The directory's weights as torch saved them before 1.6."""
    (directory / "model.safetensors").unlink()
    names = list(model.state_dict())
    parts = {"pytorch_model.bin": names}
    if sharded:
        parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        weight_map = {name: file for file, part in parts.items() for name in part}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, part in parts.items():
        weights = {name: model.state_dict()[name] for name in part}
        torch.save(weights, directory / file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("sharded", (False, True))
def test_bin_files_of_before_torch_1_6_load_and_are_read_once(model, directory, monkeypatch, sharded):
    as_old_bin(model, directory, sharded)
    loads, load_file = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(options) or load_file(*args, **options))
    assert same(load(directory)[0].state_dict(), model.state_dict())
    assert len(loads) == 1 + sharded and all(options["weights_only"] for options in loads)


def test_pruning_leaves_the_weights_of_an_old_bin_file_alone(model, directory, tmp_path):
    as_old_bin(model, directory)
    ckpt, config = open_llama(directory)
    tokens, fingerprint = torch.zeros(1, 8, dtype=torch.long), ckpt.fingerprint()
    settings = Settings("magnitude", (2, 4))
    prune_checkpoint(ckpt, config, tokens, settings, tmp_path / "out", {"method": "magnitude"}, "cpu", torch.float32)
    assert ckpt.fingerprint() == fingerprint != open_llama(tmp_path / "out")[0].fingerprint()


@pytest.mark.parametrize("first", b"{<v\x80P")
def test_a_header_of_any_length_is_read_whatever_its_first_byte_looks_like(directory, model, first):
    data = (directory / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + n] + b" " * ((first - n) % 256)  # the format asks for no multiple of 8
    assert len(header) % 256 == first
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + n :])
    assert same(load(directory)[0].state_dict(), model.state_dict())


def test_an_empty_tensor_is_read_as_safetensors_has_it(tmp_path):
    weights = {"a": torch.ones(3), "b": torch.empty(0), "c": torch.ones(2), "d": torch.empty(0, 4)}
    safetensors.torch.save_file(weights, tmp_path / "x.safetensors")
    assert same(read_safetensors(tmp_path / "x.safetensors"), weights)
    safetensors.torch.save_file({"b": torch.empty(0)}, tmp_path / "y.safetensors")
    assert same(read_safetensors(tmp_path / "y.safetensors"), {"b": torch.empty(0)})


# ----------------------------------------------------------------------------------------------------------------------
# which files of a Hugging Face directory count


def split_by_index(weights: dict, folder: Path, stem: str) -> None:
    """The weights in two files and the index that names them."""
    names, weight_map = list(weights), {}
    for i, part in enumerate((names[:10], names[10:]), 1):
        file = f"{stem}-{i:05}-of-00002.safetensors"
        safetensors.torch.save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def stale(base, tuned: dict, folder: Path) -> None:
    """Shards of the base model, beside those of the fine-tuned one, which the index names."""
    base.save_pretrained(folder, max_shard_size="40KB")
    split_by_index(tuned, folder, "ft-model")


def only_tuned(base, tuned: dict, folder: Path) -> None:
    """Files of unusual names, which the index names."""
    base.config.save_pretrained(folder)
    split_by_index(tuned, folder, "ft-model")


def variant(base, tuned: dict, folder: Path) -> None:
    """A second file, in another dtype, beside model.safetensors."""
    base.save_pretrained(folder)
    half = {name: w.half() for name, w in tuned.items()}
    safetensors.torch.save_file(half, folder / "model.fp16.safetensors", metadata={"format": "pt"})


def stray(base, tuned: dict, folder: Path) -> None:
    """A shard of an older split, which the index does not name."""
    base.save_pretrained(folder, max_shard_size="40KB")
    few = dict(list(tuned.items())[:3])
    safetensors.torch.save_file(few, folder / "model-00001-of-00009.safetensors", metadata={"format": "pt"})


def single_beside_an_index(base, tuned: dict, folder: Path) -> None:
    """A whole file and an index: the file goes first."""
    base.save_pretrained(folder)
    split_by_index(tuned, folder, "model")


def old_format_beside(base, tuned: dict, folder: Path) -> None:
    """An old .bin beside the shards."""
    stale(base, tuned, folder)
    torch.save(dict(base.state_dict()), folder / "pytorch_model.bin")


@pytest.mark.parametrize("lay_out", (stale, only_tuned, variant, stray, single_beside_an_index, old_format_beside))
def test_the_files_that_count_are_those_that_transformers_takes(tmp_path, lay_out):
    base = hf_model()
    torch.manual_seed(1)
    tuned = {name: (w + 0.1 * torch.randn_like(w)).contiguous() for name, w in base.state_dict().items()}
    lay_out(base, tuned, tmp_path)
    tokens = torch.randint(0, 128, (1, 30))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert (load(tmp_path)[0](tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "weight_map, words",
    [
        ([1], "index.json: its weight_map is a list, expected a dict"),
        (None, "index.json: its weight_map is a NoneType, expected a dict"),
        ({NORM: 3}, "index.json: model.norm.weight lies in 3, expected a file of this directory"),
        ({NORM: "../x.safetensors"}, "lies in '../x.safetensors', expected a file of this directory"),
        ({NORM: "/etc/passwd"}, "lies in '/etc/passwd', expected a file of this directory"),
        ({NORM: "none.safetensors"}, "none.safetensors: cannot be read"),
        ({NORM: ""}, "is a directory, expected a file"),
        ({NORM: "part.safetensors"}, "2 layers, but only 1 tensors"),
        ({}, "2 layers, but only 0 tensors"),
    ],
)
def test_an_index_that_names_no_whole_model_is_refused(directory, weight_map, words):
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=words) as e:
        open_llama(directory)
    assert str(directory) in str(e.value) and "\n" not in str(e.value)


def test_a_tensor_that_the_index_does_not_name_is_not_there(directory):
    names = safetensors_index(directory / "model.safetensors").keys() - {NORM}
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model.norm.weight is missing .1 missing, 0 unknown names"):
        open_llama(directory)


# ----------------------------------------------------------------------------------------------------------------------
# what is wrong with a file is said in one line


def edit_header(path: Path, change) -> None:
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


HARMS = {  # what is said of model.safetensors after this was done to its header
    "truncated, damaged or no safetensors": lambda h: h.pop("lm_head.weight") and None,
    "norm.weight is I64; readable are F32, F16, BF16": lambda h: h[NORM].update(dtype="I64"),
    "norm.weight has no dtype, shape and data_offsets": lambda h: h[NORM].pop("dtype") and None,
    "of shape \\[4611686018427387904\\].*cannot lie": lambda h: h[NORM].update(shape=[2**62]),
    "expected to begin at": lambda h: h[NORM].update(data_offsets=[n + 4 for n in h[NORM]["data_offsets"]]),
    "header is not a JSON object": lambda h: [1],
    "has shape \\[(1, ){1000}32": lambda h: h[NORM].update(shape=[1] * 1000 + [32]),
    "has shape \\[0\\].*DeepSpeed ZeRO-3": lambda h: h.update(
        {NORM: {**h[NORM], "shape": [0], "data_offsets": [0, 0]}}
    ),
}


@pytest.mark.parametrize("words", HARMS)
def test_a_wrong_header_is_named(directory, words):
    if "ZeRO" in words:  # which leaves no hole
        state = {name: w.clone() for name, w in read_safetensors(directory / "model.safetensors").items()}
        safetensors.torch.save_file({**state, NORM: torch.empty(0)}, directory / "model.safetensors")
    else:
        edit_header(directory / "model.safetensors", HARMS[words])
    with pytest.raises(UserError, match=words) as e:
        open_llama(directory)
    assert str(directory) in str(e.value) and "\n" not in str(e.value)


DEEP = "[" * 10**5 + "]" * 10**5


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda d: shutil.rmtree(d), "cannot be read: No such file"),
        (lambda d: (d / "config.json").unlink(), "neither config.json"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), "is not JSON"),
        (lambda d: (d / "config.json").write_text('{"a": "\\ud83d"}'), "holds half of a surrogate pair"),
        (lambda d: (d / "config.json").write_text(DEEP), "is not JSON"),
        (lambda d: (d / "config.json").write_text("[1]"), "is a JSON list, expected a dict"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "config: has no vocab_size"),
        (lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()), "is a directory, expected a file"),
        (lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")), "is not an ordinary file"),
        (lambda d: (d / "history.json").write_text("{"), "history.json: is not JSON"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1000]), "truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 100), "bytes with a header of"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{]"), "header is not JSON"),
        (lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 200000) + DEEP.encode()), "not JSON"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes() + b"more"), "end at"),
        (lambda d: (d / "model.safetensors").unlink(), "none of model.safetensors"),
        (lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()), "is a directory"),
        (lambda d: twice(d), "stands in another file too"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"junk"), "sentencepiece"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com"), "is a Git LFS pointer"),
    ],
)
def test_a_damaged_directory_is_named(directory, harm, words):
    harm(directory)
    with pytest.raises(UserError, match=words) as e:
        open_llama(directory)
    assert str(directory) in str(e.value) or "tokenizer" in str(e.value)


def twice(folder: Path) -> None:
    """The weights in two shards that no index names."""
    for i in (1, 2):
        shutil.copy(folder / "model.safetensors", folder / f"model-{i}.safetensors")
    (folder / "model.safetensors").unlink()


def part(folder: Path, i: int) -> dict:
    return torch.load(folder / f"consolidated.{i:02}.pth")


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda d: (d / "consolidated.01.pth").unlink(), "consolidated.01.pth: cannot be read: is missing"),
        (lambda d: [f.unlink() for f in d.glob("*.pth")], "but no consolidated"),
        (lambda d: (d / "params.json").write_text('{"dim": 32}'), "has no 'n_layers'"),
        (lambda d: edit(d / "params.json", dim=30), "do not fit together|divisor|head_dim"),
        (lambda d: edit(d / "params.json", dim="x"), "do not fit together"),
        (lambda d: edit(d / "params.json", n_heads=0), "do not fit together"),
        (lambda d: edit(d / "params.json", n_layers=10**9), "num_hidden_layers is 1000000000"),
        (lambda d: torch.save({}, d / "consolidated.01.pth"), "has no '"),
        (lambda d: torch.save({"output.weight": torch.ones(2)}, d / "consolidated.00.pth"), "has no 'layers.0"),
        (
            lambda d: torch.save({k: w[..., :-1] for k, w in part(d, 1).items()}, d / "consolidated.01.pth"),
            "do not fit",
        ),
        (lambda d: torch.save([1], d / "consolidated.01.pth"), "holds a list, expected a state dict"),
        (lambda d: torch.save({"x": 1}, d / "consolidated.01.pth"), "holds 'x', which is no plain tensor"),
    ],
)
def test_a_damaged_meta_directory_is_named(model, tmp_path, harm, words):
    write_meta(model, tmp_path / "meta", 2)
    harm(tmp_path / "meta")
    with pytest.raises(UserError, match=words) as e:
        open_llama(tmp_path / "meta")
    assert str(tmp_path / "meta") in str(e.value)


DEEP_HISTORY = (
    b"\x80\x02}(U\x07versionK\x02U\x06config}U\x05model}U\x07history" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"u."
)
CONFIG = config_to_dict(PRESETS["test"])
SHARED_LISTS = [1]
for _ in range(26):
    SHARED_LISTS = [SHARED_LISTS, SHARED_LISTS]  # 2**26 when it is written out


@pytest.mark.parametrize(
    "change, words",
    [
        ({"version": None}, "has no version, expected 2"),
        ({"version": 3}, "has version 3, expected 2"),
        ({"config": 3}, "its config is a int"),
        ({"config": {**CONFIG, "num_attention_heads": 0}}, "num_attention_heads is 0"),
        ({"config": {"width": 1}}, "config: has no vocab_size"),
        ({"tokenizer": "x"}, "its tokenizer is a str"),
        ({"history": {}}, "its history is a dict"),
        ({"history": ["x"]}, "its history is damaged"),
        ({"history": [{"sparsity": "2:4"}]}, "its history is damaged"),
        ({"history": [{"method": "x", "x": torch.ones(1)}]}, "its history is damaged"),
        ({"history": [{"method": "x", "x": SHARED_LISTS}]}, "its history is damaged"),
        ({"history": [{"method": "\ud83d"}]}, "holds half of a surrogate pair"),
        ({"files": []}, "its files is a list"),
        ({"files": {"config.json": b"{"}}, "holds the file 'config.json', none that travels with a model"),
        ({"files": {"../LICENSE": b"x"}}, "holds the file '../LICENSE'"),
        ({"files": {"LICENSE/../../x": b"x"}}, "holds the file 'LICENSE/../../x'"),
        ({"files": {".bashrc": b"x"}}, "holds the file '.bashrc'"),
        ({"files": {"LICENSE": "x"}}, "holds the file 'LICENSE'"),
        ({"model": [1]}, "holds a list, expected a state dict"),
        ({"model": {NORM: 1}}, "holds 'model.norm.weight', which is no plain tensor"),
        ({"model": {3: torch.ones(1)}}, "holds 3, which is no plain tensor"),
        ({"model": {NORM: torch.ones(32).to_sparse()}}, "no plain tensor"),
        ({"model": {NORM: torch.empty(32, device="meta")}}, "no plain tensor"),
        ({"model": {NORM: torch.ones(1).expand(2**40)}}, "larger than what is stored of it"),
        ({"model": {NORM: torch.ones(32, dtype=torch.float64)}}, "2 layers, but only 1 tensors"),
    ],
)
def test_a_wrong_pt_is_named(random_checkpoint, tmp_path, change, words):
    torch.save({**torch.load(random_checkpoint), **change}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=words) as e:
        open_llama(tmp_path / "wrong.pt")
    assert str(e.value).startswith(f"{tmp_path / 'wrong.pt'}: ") and "\n" not in str(e.value)


def test_a_pt_without_a_version_is_refused_whatever_else_it_holds(model, tmp_path):
    old = {"vocab_size": 256, "n_layers": 2, "n_heads": 4}  # settings under the names of an earlier layout
    torch.save({"config": old, "model": model.state_dict(), "history": [], "files": {}}, tmp_path / "old.pt")
    result = command("--ckpt", tmp_path / "old.pt", "--info")
    words = f"{tmp_path / 'old.pt'}: has no version, expected 2: its layout is another; make it again with this code"
    assert result.returncode == 2 and result.stderr == f"model.py: error: {words}\n" and not result.stdout


def test_a_pt_that_says_no_more_than_it_must_loads(model, tmp_path):
    config = dataclasses.asdict(model.config)
    del config["sliding_window"], config["rope_scaling"], config["head_dim"]  # whose defaults are the model's own
    torch.save({"version": VERSION, "config": config, "model": model.state_dict()}, tmp_path / "least.pt")
    again, tokenizer = load(tmp_path / "least.pt")
    assert again.config == model.config and again.history == [] and tokenizer is None
    assert same(again.state_dict(), model.state_dict())


def test_another_dtype_is_named(random_checkpoint, tmp_path):
    data = torch.load(random_checkpoint)
    data["model"][NORM] = data["model"][NORM].double()
    torch.save(data, tmp_path / "double.pt")
    with pytest.raises(UserError, match="norm.weight is torch.float64; readable are F32, F16, BF16"):
        open_llama(tmp_path / "double.pt")


@pytest.mark.parametrize("out", ("half", "half.pt"))
def test_a_weight_too_large_for_float16_is_named_and_nothing_is_left(model, tmp_path, out):
    model.model.norm.weight.data[3] = 1e5
    save(model, tmp_path / "model.pt")
    ckpt, _ = open_llama(tmp_path / "model.pt")
    with pytest.raises(UserError, match="model.norm.weight: holds 1e.05, which is too large for float16"):
        write_checkpoint(ckpt, tmp_path / out, torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


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
        entries.update({name: b"\0" * 128 for name in z.namelist() if "/data/" in name})
    name = next(name for name in entries if name.endswith("data.pkl"))
    small, large = b"K\x20", b"J\x00\x00\x00\x40"
    assert data.count(small) > 5
    for start in [i for i in range(len(entries[name])) if entries[name].startswith(small, i)]:
        edited = entries[name][:start] + large + entries[name][start + 2 :]
        with zipfile.ZipFile(tmp_path / "edited.pt", "w") as z:
            for key, value in {**entries, name: edited}.items():
                z.writestr(key, value)
        assert grown(lambda: open_llama(tmp_path / "edited.pt")) < 20


def test_a_pickle_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"config": {}, "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="bomb.pt: holds Python objects .*open.*which could run code"):
        open_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin", "old.bin", "consolidated.00.pth"))
def test_a_file_of_weights_alone_says_what_to_name(directory, model, name):
    if not name.endswith(".safetensors"):
        torch.save(model.state_dict(), directory / name, _use_new_zipfile_serialization=name != "old.bin")
    with pytest.raises(UserError, match=f"{name}: is a file of weights alone; name its directory"):
        open_checkpoint(directory / name)


class Whole(torch.nn.Linear):
    """A model that is pickled as a whole, with its class."""


@pytest.mark.parametrize("new", (False, True))
@pytest.mark.parametrize("file", ("model.pt", "hf/pytorch_model.bin"))
def test_a_pickled_model_is_said_to_be_one(directory, new, file):
    path = directory.parent / file
    (directory / "model.safetensors").unlink()
    torch.save({"model": Whole(2, 2), "tokenizer": None}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match="holds Python objects .*Whole.*, which could run code; save its state_dict"):
        open_checkpoint(path if file == "model.pt" else directory)


@pytest.mark.parametrize(
    "start, words",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a Git LFS pointer, not the file itself",
        ),
        (b"<!DOCTYPE html><html></html>", "is a web page, not the file itself"),
        (b"GGUF\3\0\0\0" + bytes(100), "is a GGUF file"),
        (b'{"error": "not found"}', "is JSON and holds no weights"),
    ],
)
@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "model.pt", "x.npy"))
def test_a_file_that_is_something_else_is_said_to_be_that(directory, start, words, name):
    file = directory / name
    for weights in directory.glob("model.safetensors"):
        weights.unlink()
    file.write_bytes(start)
    if name.startswith("consolidated"):
        (directory / "config.json").rename(directory / "params.json")
        (directory / "params.json").write_text("{}")
    with pytest.raises(UserError, match=f"{name}: {words}"):
        if name == "x.npy":
            read_npy(file)
        else:
            open_checkpoint(file if name == "model.pt" else directory)


@pytest.mark.parametrize("name", ("config.json", "history.json", "tokenizer_config.json", "tokenizer.model"))
def test_a_git_lfs_pointer_is_said_to_be_one_wherever_it_stands(directory, name):
    (directory / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{name}: is a Git LFS pointer, not the file itself; `git lfs pull`"):
        open_llama(directory)


@pytest.mark.parametrize("index", (False, True))
@pytest.mark.parametrize("lost", (1, 2, 3))
def test_a_missing_shard_is_named(directory, model, index, lost):
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(model.state_dict()), {}
    for i in (1, 2, 3):
        file = f"model-{i:05}-of-00003.safetensors"
        part = {name: model.state_dict()[name] for name in names[i - 1 :: 3]}
        safetensors.torch.save_file(part, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    if index:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(load(directory)[0].state_dict(), model.state_dict())
    (directory / f"model-{lost:05}-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=f"model-{lost:05}-of-00003.safetensors: cannot be read: is missing, and model"):
        open_llama(directory)


@pytest.mark.parametrize("name", ("model.pt", "model"))
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(model, tmp_path, name):
    save(model, tmp_path / name)
    ckpt = open_checkpoint(tmp_path / name)
    before = ckpt["model.norm.weight"].clone()
    assert ckpt["model.norm.weight"].equal(before)
    save(model, tmp_path / "other.pt")
    save(model, tmp_path / "other")
    if name == "model":
        os.replace(tmp_path / "other" / "model.safetensors", tmp_path / name / "model.safetensors")
    else:
        os.replace(tmp_path / "other.pt", tmp_path / name)
    with pytest.raises(UserError, match="was replaced or written to while it was in use"):
        ckpt["model.norm.weight"]


@pytest.mark.parametrize("place", ("version", "hidden_act", "rope_type", "packed", "files"))
def test_lists_that_a_pickle_shares_are_refused_at_once(model, tmp_path, place):
    """45 lists in each other: 2**45 items to print."""
    bomb = ["x"]
    for _ in range(45):
        bomb = [bomb, bomb]
    save(model, tmp_path / "model.pt")
    data = torch.load(tmp_path / "model.pt")
    changes = {"version": bomb, "packed": {NORM: bomb}, "files": {"NOTICE": bomb}}
    config = {"hidden_act": bomb} if place == "hidden_act" else {"rope_scaling": {"rope_type": bomb}}
    torch.save(
        {**data, place: changes[place]} if place in changes else {**data, "config": {**data["config"], **config}},
        tmp_path / "bomb.pt",
    )
    done = command("--ckpt", tmp_path / "bomb.pt", "--info")  # within a minute
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_link_is_written_through_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "real.json")
    write_json(tmp_path / "link.json", 3)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "disk" / "real.json").read_text() == "3\n"


def test_a_name_that_is_too_long_to_be_written_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        check_out(tmp_path / f"{240 * 'n'}.pt")


@pytest.mark.parametrize("name", (1, NORM, None))
def test_a_packed_weight_that_is_none_is_refused(model, tmp_path, name):
    save(model, tmp_path / "model.pt")
    data = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.save({**data, "packed": {name: [2, 2]}}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"{name} is no packed weight of shape"):
        open_checkpoint(tmp_path / "model.pt")


def test_quantized_weights_are_named_before_their_dtypes(directory):
    write_safetensors(directory / "model.safetensors", {NORM: torch.ones(4)})
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"I32"'))
    edit(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="quantization_config: its weights are stored by 'gptq'"):
        open_checkpoint(directory)


def test_what_is_beside_the_point_in_a_directory_without_weights_is_said(directory):
    (directory / "model.safetensors").unlink()
    (directory / "zero_to_fp32.py").touch()
    with pytest.raises(UserError, match="holds config.json but none of .*; DeepSpeed's zero_to_fp32.py makes them"):
        open_llama(directory)
    (directory / "model.safetensors").symlink_to("blobs/gone")
    with pytest.raises(UserError, match="model.safetensors: cannot be read: No such file"):
        open_llama(directory)
    (directory / "config.json").rename(directory / "adapter_config.json")
    with pytest.raises(UserError, match="holds an adapter of PEFT's and no model; merge it"):
        open_llama(directory)


def test_a_pytorch_file_under_a_safetensors_name_is_said_to_be_one(directory, model):
    for new in (False, True):
        torch.save(model.state_dict(), directory / "model.safetensors", _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match="model.safetensors: is a PyTorch file, expected a safetensors file"):
            open_llama(directory)


def test_a_damaged_pt_is_one_line_and_status_2(random_checkpoint, tmp_path):
    data = random_checkpoint.read_bytes()
    for i, damaged in enumerate((b"", b"not a zip", data[: len(data) // 2], data[:-10])):
        (tmp_path / f"{i}.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=f"{i}.pt: is truncated, damaged or not a PyTorch file") as e:
            open_llama(tmp_path / f"{i}.pt")
        assert "\n" not in str(e.value)
    result = command("--ckpt", tmp_path / "2.pt", "--out", tmp_path / "out")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "2.pt" in result.stderr and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers


def test_an_empty_tokenizer_file_is_named(model, tmp_path):
    save(model, tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.model").touch()
    with pytest.raises(UserError, match="tokenizer: is not a sentencepiece model"):
        open_llama(tmp_path / "saved")


def test_whoever_asks_for_a_tokenizer_hears_what_is_missing(model, tmp_path):
    save(model, tmp_path / "model.pt")
    (tmp_path / "junk.model").write_bytes(b"junk")
    for source, words in {
        "model.pt": "holds no tokenizer",
        "absent.model": "cannot be read",
        "junk.model": "is not a sentencepiece model",
        ".": "has no tokenizer.model and no tokenizer.json",
    }.items():
        with pytest.raises(UserError, match=words):
            load_tokenizer(tmp_path / source)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bos, eos, ends", [(1, 2, 2), (5, 3, 3), (-1, -1, None)])
def test_what_begins_and_ends_a_text_is_the_tokenizers_own_in_every_layout(
    tokenizer_file, model, tmp_path, form, bos, eos, ends
):
    proto, options = io.BytesIO(), {"vocab_size": 200, "model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2}
    text = tokenizer_file.parent / "text.txt"
    options.update(bos_id=bos, eos_id=eos, user_defined_symbols="<pad>,<sep>,<x>")
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_writer=proto, **options)
    tokenizer = load_tokenizer(proto.getvalue())
    assert (tokenizer.bos, tokenizer.eos) == (None if bos < 0 else bos, () if eos < 0 else (eos,))
    save(model, tmp_path / "model.pt", tokenizer)
    ckpt, _ = open_llama(tmp_path / "model.pt")
    assert (ckpt.config["bos_token_id"], ckpt.config["eos_token_id"]) == (tokenizer.bos, ends)
    again = tokenizer_of(open_llama(write_as(ckpt, tmp_path / "again", form))[0])
    assert (again.bos, again.eos, again.data) == (tokenizer.bos, tokenizer.eos, tokenizer.data)
    assert again.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer, tmp_path):
    config = dataclasses.replace(PRESETS["test"], vocab_size=tokenizer.vocab_size - 1)
    save(Llama(config), tmp_path / "model.pt", tokenizer)
    with pytest.raises(UserError, match="its tokenizer has"):
        open_llama(tmp_path / "model.pt")


# ----------------------------------------------------------------------------------------------------------------------
# writing: where it goes, whole or not at all, one process at a time


@pytest.mark.parametrize("key, value", [("rope_scaling", None), ("sliding_window", 64), ("head_dim", 4)])
def test_what_metas_layout_cannot_say_is_refused(tmp_path, key, value):
    change = {key: value or {"rope_type": "linear", "factor": 2.0}}
    save(Llama(dataclasses.replace(PRESETS["test"], **change)), tmp_path / "model.pt")
    ckpt, _ = open_llama(tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"no room for the model's {key}"):
        write_checkpoint(ckpt, tmp_path / "meta", layout="meta")
    assert not (tmp_path / "meta").exists()


def test_a_failed_write_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="model.pt: cannot be written: No space left"):
        save(model, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ("file.json", "folder"))
def test_what_fails_while_it_is_written_leaves_what_was_there(tmp_path, name):
    write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises(ValueError, match="on the way"), atomic(tmp_path / name) as tmp:
        if name == "folder":
            tmp.mkdir()
            tmp = tmp / "half"
        tmp.write_text("half")
        raise ValueError("on the way")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert json.loads((tmp_path / "file.json").read_text()) == {"old": 1}


def test_files_are_on_disk_before_they_have_their_names(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda tmp, path: done.append(Path(path).name) or replace(tmp, path))
    with atomic(tmp_path / "folder") as tmp:
        tmp.mkdir()
        for name in ("a", "b"):
            (tmp / name).write_text(name)
    assert sorted(Path(path).name for path in done[:2]) == ["a", "b"] and done[2:] == ["folder"]


@pytest.mark.parametrize("name, there", [("link", "big"), ("link.pt", "big/model.pt"), ("deep", "big/new/folder")])
def test_what_a_link_points_to_is_written_and_the_link_stays(random_checkpoint, tmp_path, name, there):
    (tmp_path / "big").mkdir()  # a larger disk, say
    (tmp_path / name).symlink_to(there)
    assert check_out(tmp_path / name) == tmp_path / there
    ckpt, _ = open_llama(random_checkpoint)
    write_checkpoint(ckpt, tmp_path / name)
    assert (tmp_path / name).is_symlink() and not (tmp_path / there).is_symlink()
    assert same(open_checkpoint(tmp_path / there), ckpt)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["big", name])  # nothing beside the link


def test_a_link_to_an_input_is_refused(random_checkpoint, tmp_path):
    (tmp_path / "link.pt").symlink_to(random_checkpoint)
    with pytest.raises(UserError, match="--out .*link.pt: would be overwritten, and it is an input"):
        check_out(tmp_path / "link.pt", inputs=[random_checkpoint])


def test_a_link_to_itself_gives_way(tmp_path):
    (tmp_path / "loop.json").symlink_to("loop.json")
    write_json(check_out(tmp_path / "loop.json", inputs=[tmp_path / "loop.json" / "x"]), 3)
    assert (tmp_path / "loop.json").read_text() == "3\n"


@pytest.mark.parametrize(
    "path, words",
    [
        ("file", "is a file; a name without .pt is a directory"),
        ("folder.pt", "is a directory, and a .pt name is a file"),
        ("folder.npy", "is a directory, and a .npy name is a file"),
        ("full", "the directory is not empty; name a new one or remove it"),
        ("file/under", "cannot be written: Not a directory"),
        ("/proc/no/model.pt", "cannot be written"),
        ("/proc", "is a mount point, which cannot be replaced; name a directory inside of it"),
        ("fifo", "is not an ordinary file, and cannot be replaced by one"),
        ("fifo.pt", "is not an ordinary file, and cannot be replaced by one"),
        ("loop", "is a symbolic link that leads to itself"),
    ],
)
def test_an_out_that_could_not_be_written_is_refused_before_any_work(tmp_path, path, words):
    (tmp_path / "file").touch()
    for name in ("folder.pt", "folder.npy", "full/of"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("fifo", "fifo.pt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=words) as e:
        check_out(tmp_path / path, "--log_samples")
    assert str(e.value).startswith(f"--log_samples {tmp_path / path}: ")


def test_an_out_without_a_name_is_not_this_folder():
    with pytest.raises(UserError, match="--out: is empty"):
        check_out("")


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=".lock: is not an ordinary file"):
        lock(tmp_path)


def test_one_process_at_a_time_holds_a_folder(tmp_path):
    first = lock(tmp_path / "a" / "folder")
    with pytest.raises(UserError, match="a/folder: another run is at work in it; stop it, or wait for its end"):
        lock(tmp_path / "a" / "folder")
    lock(tmp_path / "a" / "other").close()
    first.close()
    lock(tmp_path / "a" / "folder").close()  # the file that stays is no lock
    assert [path.name for path in (tmp_path / "a" / "folder").iterdir()] == [".lock"]


HOLD = """
import sys
from pathlib import Path
from data.checkpoint import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_another_process_ends_with_it_in_whatever_way(tmp_path):
    line = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is at work"):
            lock(tmp_path)
        other.kill()
    lock(tmp_path).close()


@pytest.mark.parametrize("replaced", ("moved away", "made anew", "deleted"))
def test_a_lock_on_a_file_that_was_replaced_meanwhile_is_none(tmp_path, monkeypatch, replaced):
    """A process opens .lock while another holds it; that one ends, and its folder is moved, or made anew by a third."""
    folder, flock = tmp_path / "folder", fcntl.flock

    def late(file, operation):
        flock(file, operation)
        if replaced == "deleted":
            (folder / ".lock").unlink()
            return
        folder.rename(tmp_path / "away")
        if replaced == "made anew":
            folder.mkdir()
            (folder / ".lock").touch()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="folder: another run is at work in it"):
        lock(folder)


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    lock(tmp_path / "folder").close()


def test_a_folder_that_cannot_be_made_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/folder: cannot be written: Not a directory"):
        lock(tmp_path / "file" / "folder")
