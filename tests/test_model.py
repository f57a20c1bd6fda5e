"""What model.py promises: transformers' LLaMA to the last digits, settings that are understood or refused by name."""

import dataclasses
import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, SHARED, command, edit, hf_model, needs_shared, prune_by_magnitude, same
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig

from data.checkpoint import UserError, open_checkpoint, write_checkpoint
from data.tokenizer import load_tokenizer
from model import PRESETS, Llama, LlamaConfig, cli, config_from_dict, config_to_dict, cut_into_batches, describe
from model import generate, load, main, open_llama, rope_tables, save, sparsity_of
from spp import inject, merge

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
SHAPES["llama-3.2"] = {
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {**SHAPES["llama3"]["rope_scaling"], "factor": 32.0},
}


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
    assert same(hf.state_dict(), meta.state_dict())
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
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(PRESETS[preset]).parameters()) == count


@pytest.mark.parametrize(
    "preset, learn, per_mille",
    [
        ("llama-3-8b", 21_299_200, 2.65),
        ("llama-3-70b", 106_332_160, 1.50),
        ("llama-3.2-1b", 5_619_712, 4.53),
        ("llama-3.2-3b", 12_701_696, 3.94),
        ("smollm2-135m", 2_551_680, 18.62),
        ("smollm2-360m", 4_536_320, 12.38),
        ("smollm2-1.7b", 8_503_296, 4.94),
    ],
)
def test_spp_of_rank_16_fits_every_preset_and_learns_16_n_and_m_numbers_of_each_linear(preset, learn, per_mille):
    """As Table 1 counts; 16 divides every m, the 192 outputs of SmolLM2-135M's k_proj and v_proj among them."""
    with torch.device("meta"):
        model = inject(Llama(PRESETS[preset]), r=16)
    c = PRESETS[preset]
    kv, width, mlp = c.num_key_value_heads * c.head_dim, c.hidden_size, c.intermediate_size
    linears = [(width, width), (kv, width), (kv, width), (width, width), (mlp, width), (mlp, width), (width, mlp)]
    assert c.num_hidden_layers * sum(16 * n + m for m, n in linears) == learn
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == learn
    assert round(1000 * learn / sum(p.numel() for p in model.parameters()), 2) == per_mille


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


@pytest.mark.parametrize("frozen", (False, True), ids=("head that learns", "frozen head"))
def test_the_summed_loss_is_cross_entropys(model, frozen):
    tokens = torch.randint(0, 256, (3, 60))
    targets = tokens.roll(-1, 1).masked_fill(torch.rand(3, 60) < 0.3, -100)
    where = (targets.flatten() != -100).nonzero()[:, 0]
    model.activation_checkpointing = True
    model.lm_head.requires_grad_(not frozen)
    learning = [p for p in model.parameters() if p.requires_grad]
    expected = torch.nn.functional.cross_entropy(model(tokens).transpose(1, 2), targets, reduction="sum")
    for loss in (model(tokens, targets), model(tokens, targets.flatten()[where], where)):
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, learning), torch.autograd.grad(expected, learning, retain_graph=True)
        torch.testing.assert_close(*gradients)


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
        write_checkpoint(open_llama(SHARED / "stories260K" / layout)[0], tmp_path / layout)
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
    torch.nn.init.zeros_(model.lm_head.weight)  # 256 words alike
    for words in (1, 2, 256):
        drawn = {next(generate(model, [1], 1, temperature=1.0, top_p=words / 256)) for _ in range(60)}
        assert len(drawn) == words if words < 3 else len(drawn) > 30


def test_generation_ends_after_any_of_the_tokens_that_stop_it(model):
    torch.manual_seed(3)
    whole = list(generate(model, [1, 2], 15, temperature=2.0))
    for stop in ((whole[4],), (whole[9], whole[6]), (256,), ()):
        torch.manual_seed(3)
        end = min((whole.index(token) + 1 for token in stop if token in whole), default=15)
        assert list(generate(model, [1, 2], 15, temperature=2.0, stop=stop)) == whole[:end]


def test_batches_hold_every_sequence_once_the_longest_first_and_no_more_than_they_may():
    for lengths in itertools.product((0, 1, 2, 3, 5), repeat=5):
        batches = cut_into_batches(lengths, 6)
        order = [i for batch in batches for i in batch]
        assert order == sorted(range(5), key=lambda i: -lengths[i])  # a stable sort: equals in their order
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            assert lengths[batch[0]] * len(batch) <= 6
            assert following is None or lengths[batch[0]] * (len(batch) + 1) > 6  # none is cut before it is full
    assert cut_into_batches([9, 7], 6) == [[0], [1]]  # one alone may be longer
    assert cut_into_batches([], 6) == []


def test_weights_that_cannot_run_are_named(model, tokenizer, tmp_path):
    model.model.layers[1].mlp.up_proj.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="the logits are not finite"):
        next(generate(model, [1, 2], 1))
    model.model.norm.half()
    save(model, tmp_path / "mixed.pt", tokenizer)
    with pytest.raises(UserError, match="several dtypes .float16, float32."):
        load(tmp_path / "mixed.pt")
    assert load(tmp_path / "mixed.pt", torch.float32)[0].lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (2, 8), (4, 8)])
def test_patterns_are_recognised(n, m):
    weight = torch.randn(6, 48)
    groups = weight.view(-1, m)
    groups.scatter_(1, torch.rand_like(groups).argsort(1)[:, n:], 0)
    assert sparsity_of(weight) == (pytest.approx(1 - n / m), f"{n}:{m}")
    assert sparsity_of(torch.randn(6, 48)) == (0.0, None)


@pytest.mark.parametrize("rows, columns", [(5, 8), (130, 20), (3, 6)])  # the last two are no multiple of 8, or of 4
def test_every_zero_counts_and_a_group_ends_with_its_row(rows, columns):
    weight = torch.ones(rows, columns)
    weight[:, 1::2] = -0.0  # a zero too
    pattern = {8: "2:4", 20: "2:4", 6: None}[columns]
    assert sparsity_of(weight.bfloat16()) == (0.5, pattern)
    weight[-1, -1] = 1
    assert sparsity_of(weight) == (pytest.approx(0.5 - 1 / weight.numel(), abs=1e-12), None)


def test_a_tied_model_that_was_saved_without_its_head_loads(tmp_path):
    theirs = hf_model(tie_word_embeddings=True)
    theirs.model.save_pretrained(tmp_path / "hf")  # names without "model."
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "hf")[0](tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_directory_that_others_pruned_is_recognised(tmp_path):
    theirs = hf_model(num_key_value_heads=2)
    prune_by_magnitude(theirs, 2, 4)  # and stored dense, as Wanda's and SparseGPT's codes do
    theirs.save_pretrained(tmp_path / "hf")
    about = describe(*open_llama(tmp_path / "hf"))
    assert len(about["linears"]) == 7
    assert all(line == {"sparsity": 0.5, "pattern": "2:4"} for line in about["linears"].values())


OLD = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
NEW = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}, "dtype": "float32"}


@pytest.mark.parametrize("length, where", [(32, "inside"), (64, "outside"), (64, "inside, outside"), (256, "")])
def test_the_original_length_of_llama_3s_scaling_is_where_transformers_finds_it(tmp_path, length, where):
    """Outside before inside; where it is in neither, it is the model's own length."""
    scaling = {**SHAPES["llama3"]["rope_scaling"]}
    del scaling["original_max_position_embeddings"]
    theirs = hf_model(max_position_embeddings=256, rope_scaling={**scaling, "original_max_position_embeddings": 64})
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {**config["rope_parameters"]}
    del config["rope_parameters"]["original_max_position_embeddings"]
    if "inside" in where:
        config["rope_parameters"]["original_max_position_embeddings"] = 32
    if "outside" in where:
        config["original_max_position_embeddings"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(100)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
        ours = load(tmp_path)[0]
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=1e-4)
    assert ours.config.rope_scaling["original_max_position_embeddings"] == length


@pytest.mark.parametrize("keys", (OLD, NEW), ids=("old", "new"))
def test_old_and_new_config_keys_mean_the_same(model, tmp_path, keys):
    save(model, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "torch_dtype", "head_dim"):
        del config[key]
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **keys, "head_dim": None}))
    scaling = {"rope_type": "linear", "factor": 2.0}
    expected = dataclasses.replace(model.config, rope_theta=5000.0, rope_scaling=scaling)
    assert open_llama(tmp_path / "hf")[1] == expected


def test_the_least_that_an_old_config_says_is_enough(tmp_path):
    save(Llama(LlamaConfig(64, 32, 64, 2, 4)), tmp_path / "hf")
    keys = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({key: config[key] for key in keys}))
    assert open_llama(tmp_path / "hf")[1] == LlamaConfig(64, 32, 64, 2, 4)


def test_a_mistral_that_does_not_name_its_window_has_transformers_default(directory):
    edit(directory / "config.json", model_type="mistral")
    assert open_llama(directory)[1].sliding_window == MistralConfig().sliding_window


def test_a_head_that_differs_from_the_tied_embeddings_counts_as_in_transformers(tmp_path):
    theirs = hf_model(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", tie_word_embeddings=True)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert (load(tmp_path / "hf")[0](tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert not open_llama(tmp_path / "hf")[1].tie_word_embeddings


def test_a_null_is_taken_where_it_is_transformers_own_value(directory, model):
    nulls = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_scaling", "sliding_window"))
    save(Llama(LlamaConfig(64, 32, 64, 2, 4)), directory.parent / "plain")
    edit(directory.parent / "plain" / "config.json", **nulls)
    assert open_llama(directory.parent / "plain")[1] == LlamaConfig(64, 32, 64, 2, 4)
    edit(directory / "config.json", model_type="mistral", sliding_window=None)
    assert open_llama(directory)[1] == model.config


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_settings_come_back_from_the_dict_that_is_written_of_them(tmp_path, options):
    hf_model(**options).save_pretrained(tmp_path / "hf")
    _, config = open_llama(tmp_path / "hf")
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))), "x")
    assert again == config == LlamaConfig(**dataclasses.asdict(config))


def test_config_defaults_are_llama_7b():
    assert LlamaConfig() == PRESETS["llama-7b"]


# ----------------------------------------------------------------------------------------------------------------------
# models as they are published


def published(vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, kv=None, **more):
    """A config.json of the keys that nearly all have; those that are left out are None."""
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
    values.update(vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size)
    values.update(num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads, num_key_value_heads=kv)
    values.update(initializer_range=0.02, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
    values.update(torch_dtype="bfloat16", transformers_version="4.40.0", max_position_embeddings=2048)
    values = {key: value for key, value in {**values, **more}.items() if value is not None}
    return values


LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pretraining_tp": 1, "rope_scaling": None}
LLAMA_3 = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "attention_bias": False}
LLAMA_3.update(mlp_bias=False, attention_dropout=0.0, pretraining_tp=1, bos_token_id=128000, eos_token_id=128001)
SCALING = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
LLAMA_3_1 = {**LLAMA_3, "max_position_embeddings": 131072, "rope_scaling": {**SCALING, "rope_type": "llama3"}}
LLAMA_3_2 = {**LLAMA_3_1, "rope_scaling": {**SCALING, "factor": 32.0, "rope_type": "llama3"}, "head_dim": 64}
LLAMA_3_2["tie_word_embeddings"] = True
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 32768}
MISTRAL.update(rms_norm_eps=1e-5, pad_token_id=None)
NO_WINDOW = {"sliding_window": None}  # a null that counts: where the key is absent it is 4,096
SMOL = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_interleaved": False, "is_llama_config": True}
SMOL.update(tie_word_embeddings=True, attention_bias=False, pretraining_tp=1, rope_scaling=None)
B8 = (128256, 4096, 14336, 32, 32, 8)
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
GROUPS = {"config_groups": {"group_0": {"weights": FP8, "targets": ["Linear"]}}, "quant_method": "compressed-tensors"}
SPARSE = {"config_groups": {}, "format": "dense", "quant_method": "compressed-tensors"}
SPARSE["sparsity_config"] = {"format": "dense", "global_sparsity": 0.45, "sparsity_structure": "2:4", "ignore": []}
BITMASK = {**SPARSE, "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}}
GPTQ = {"bits": 4, "group_size": 128, "quant_method": "gptq"}
PUBLISHED = {  # from memory of their public form: with the number of parameters, or with what is said of them
    "LLaMA 7B": (published(32000, 4096, 11008, 32, 32, rms_norm_eps=1e-6), 6_738_415_616),
    "LLaMA 65B": (published(32000, 8192, 22016, 80, 64, rms_norm_eps=1e-5), 65_285_660_672),
    "LLaMA-2 13B": (published(32000, 5120, 13824, 40, 40, 40, **LLAMA_2), 13_015_864_320),
    "LLaMA-2 70B": (published(32000, 8192, 28672, 80, 64, 8, **LLAMA_2), 68_976_648_192),
    "LLaMA-3 8B": (published(*B8, **LLAMA_3), 8_030_261_248),
    "LLaMA-3.1 70B": (published(128256, 8192, 28672, 80, 64, 8, **LLAMA_3_1), 70_553_706_496),
    "LLaMA-3.2 1B": (published(128256, 2048, 8192, 16, 32, 8, **LLAMA_3_2), 1_235_814_400),
    "LLaMA-3.2 3B": (published(128256, 3072, 8192, 28, 24, 8, **{**LLAMA_3_2, "head_dim": 128}), 3_212_749_824),
    "CodeLlama 7B": (
        published(32016, 4096, 11008, 32, 32, 32, max_position_embeddings=16384, rms_norm_eps=1e-5, rope_theta=1e6),
        6_738_546_688,
    ),
    "CodeLlama 34B": (
        published(32000, 8192, 22016, 48, 64, 8, max_position_embeddings=16384, rms_norm_eps=1e-5, rope_theta=1e6),
        33_743_970_304,
    ),
    "Vicuna 7B 1.5": (published(32000, 4096, 11008, 32, 32, 32, **LLAMA_2), 6_738_415_616),
    "TinyLlama 1.1B": (published(32000, 2048, 5632, 22, 32, 4, rms_norm_eps=1e-5), 1_100_048_384),
    "OpenLLaMA 3B": (published(32000, 3200, 8640, 26, 32, rms_norm_eps=1e-6), 3_426_473_600),
    "Mistral 7B 0.1": (published(32000, 4096, 14336, 32, 32, 8, sliding_window=4096, **MISTRAL), 7_241_732_096),
    "Mistral 7B 0.2": (
        {**published(32000, 4096, 14336, 32, 32, 8, rope_theta=1e6, **MISTRAL), **NO_WINDOW},
        7_241_732_096,
    ),
    "Mistral 7B 0.3": (
        {**published(32768, 4096, 14336, 32, 32, 8, rope_theta=1e6, **MISTRAL), **NO_WINDOW},
        7_248_023_552,
    ),
    "SmolLM2 135M": (published(49152, 576, 1536, 30, 9, 3, rope_theta=100000, **SMOL), 134_515_008),
    "SmolLM2 360M": (published(49152, 960, 2560, 32, 15, 5, rope_theta=100000, **SMOL), 361_821_120),
    "SmolLM2 1.7B": (published(49152, 2048, 8192, 24, 32, 32, rope_theta=130000, **SMOL), 1_711_376_384),
    "DeepSeek-R1-Distill-Llama 8B": (published(*B8, **LLAMA_3_1), 8_030_261_248),
    "Yi 6B": (published(64000, 4096, 11008, 32, 32, 4, rms_norm_eps=1e-5, rope_theta=5e6), 6_061_035_520),
    "Yi 34B": (published(64000, 7168, 20480, 60, 56, 8, rms_norm_eps=1e-5, rope_theta=5e6), 34_388_917_248),
    "SOLAR 10.7B": (published(32000, 4096, 14336, 48, 32, 8, rms_norm_eps=1e-5), 10_731_524_096),
    "Sparse-Llama-3.1 8B 2of4": (published(*B8, **LLAMA_3_1), 8_030_261_248),
    "the same, said to be stored dense": (published(*B8, **LLAMA_3_1, quantization_config=SPARSE), 8_030_261_248),
    "the same under its older name": (published(*B8, **LLAMA_3_1, compression_config=SPARSE), 8_030_261_248),
    "Sparse-Llama-3.1 8B 2of4 in FP8": (
        published(*B8, **LLAMA_3_1, quantization_config=GROUPS),
        "quantization_config: its weights are stored by 'compressed-tensors'",
    ),
    "a 2:4 model as a bitmask": (
        published(*B8, **LLAMA_3_1, quantization_config=BITMASK),
        "quantization_config: its weights are stored by 'compressed-tensors'",
    ),
    "LLaMA-2 7B by GPTQ": (
        published(32000, 4096, 11008, 32, 32, 32, **LLAMA_2, quantization_config=GPTQ),
        "quantization_config: its weights are stored by 'gptq'",
    ),
    "Granite 3B Code": (
        published(49152, 2560, 10240, 32, 32, 32, attention_bias=True, mlp_bias=True),
        "attention_bias is True, expected False",
    ),
    "Granite 3.0 2B": (
        published(49155, 2048, 8192, 40, 32, 8, model_type="granite", logits_scaling=8.0),
        "model_type is 'granite', expected 'llama' or 'mistral'",
    ),
    "Mixtral 8x7B": (
        published(32000, 4096, 14336, 32, 32, 8, **{**MISTRAL, "model_type": "mixtral"}, num_local_experts=8),
        "model_type is 'mixtral', expected 'llama' or 'mistral'",
    ),
    "LLaMA-2 7B by YaRN": (
        published(32000, 4096, 11008, 32, 32, **{**LLAMA_2, "rope_scaling": {"type": "yarn", "factor": 16.0}}),
        "rope_scaling is .*yarn.*expected one of LLaMA's types",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_number_of_parameters_or_is_refused_for_the_true_reason(name):
    values, expected = PUBLISHED[name]
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"^config.json: config: {expected}"):
            config_from_dict(values, "config.json")
        return
    config = config_from_dict(values, "config.json")
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(config).parameters()) == expected
    for key in ("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "head_dim"):
        assert key not in values or getattr(config, key) == values[key]
    assert config.sliding_window == (4096 if name == "Mistral 7B 0.1" else None)


@pytest.mark.parametrize(
    "key, plain, other",
    [
        ("partial_rotary_factor", 1.0, 0.5),
        ("logits_scaling", 1.0, 8.0),
        ("logit_scale", 1, 0.25),
        ("attention_multiplier", 8**-0.5, 0.015625),
        ("residual_multiplier", 1.0, 0.22),
        ("embedding_multiplier", 1.0, 12.0),
        ("query_pre_attn_scalar", 8, 256),
        ("qk_norm", False, True),
        ("use_qk_norm", False, True),
        ("num_local_experts", 0, 8),
        ("num_experts", 0, 64),
        ("use_sliding_window", False, True),
        ("no_rope_layers", [], [1, 1, 1, 0]),
        ("final_logit_softcapping", None, 30.0),
        ("attn_logit_softcapping", None, 50.0),
        ("quantization_config", None, "int8"),
        ("compression_config", None, {"format": "pack-quantized"}),
        ("layer_types", ["full_attention"], ["full_attention", "sliding_attention"]),
        ("clip_qkv", None, 8.0),
        ("transformers_weights", None, "other.safetensors"),
        ("hidden_act", "swish", "relu"),
    ],
)
def test_a_setting_that_changes_the_function_is_refused_by_name_unless_it_says_what_llama_does(key, plain, other):
    values = config_to_dict(PRESETS["test"])
    for same_as_llama in (plain, None):
        assert config_from_dict({**values, key: same_as_llama}, "config.json") == PRESETS["test"]
    with pytest.raises(UserError, match=f"^config.json: config: {key}") as e:
        config_from_dict({**values, key: other}, "config.json")
    assert "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# settings that are not understood

BIG = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
HARMS = {  # what is said of config.json after it was changed so
    "model_type is 'gpt2', expected 'llama' or 'mistral'": {"model_type": "gpt2"},
    "attention_bias is True, expected False": {"attention_bias": True},
    "mlp_bias is True, expected False": {"mlp_bias": True},
    "hidden_act is 'gelu', expected 'silu'": {"hidden_act": "gelu"},
    "'yarn'.*expected one of LLaMA's types": {"rope_scaling": {"type": "yarn", "factor": 2}},
    "rope_scaling is \\[3\\]": {"rope_scaling": [3]},
    "rope_parameters is .*'yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 2}},
    "partial_rotary_factor is 0.5": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "expected factor above 0": {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "expected factor, low_freq_factor, high_freq_factor": {"rope_scaling": BIG},
    "expected a low_freq_factor below its high_freq_factor": {"rope_scaling": BIG | {"high_freq_factor": 1.0}},
    "layer_types is 5, expected a list": {"layer_types": 5},
    "rope_theta is 'x', expected a number above 0": {"rope_theta": "x"},
    "3 layers.*is missing|layers.2.*is missing": {"num_hidden_layers": 3},
    "not a LLaMA's": {"num_hidden_layers": 1},
    "1000000000.*expected a whole number from 1": {"num_hidden_layers": 10**9},
    "num_hidden_layers is True, expected a whole number": {"num_hidden_layers": True},
    "100000 layers, but only 21 tensors": {"num_hidden_layers": 10**5},
    "hidden_size is 1073741824": {"hidden_size": 2**30},
    "has shape \\[256, 32\\], its config says \\[256, 33554432\\]": {"hidden_size": 2**25},
    "its config says \\[300, 32\\]": {"vocab_size": 300},
    "hidden_size is 'x'": {"hidden_size": "x"},
    "vocab_size is None": {"vocab_size": None},
    "rms_norm_eps is -1": {"rms_norm_eps": -1},
    "rms_norm_eps is None": {"rms_norm_eps": None},
    "rms_norm_eps is nan": {"rms_norm_eps": float("nan")},
    "max_position_embeddings is None": {"max_position_embeddings": None},
    "tie_word_embeddings is 1, expected true or false": {"tie_word_embeddings": 1},
    "head_dim is 7, expected an even number": {"head_dim": 7},
    "num_attention_heads is 268435455, expected fewer": {"num_attention_heads": 2**28 - 1, "head_dim": 4},
    "num_key_value_heads is 3, expected a divisor of 4": {"num_key_value_heads": 3},
    "sliding_window is -1": {"model_type": "mistral", "sliding_window": -1},
}


@pytest.mark.parametrize("words", HARMS)
def test_a_wrong_config_is_named(directory, words):
    edit(directory / "config.json", **HARMS[words])
    with pytest.raises(UserError, match=words) as e:
        open_llama(directory)
    assert str(directory) in str(e.value) and "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# the command


def test_info_is_one_screen_and_json(random_checkpoint):
    result = command("--ckpt", random_checkpoint, "--info")
    assert result.returncode == 0 and "q_proj" in result.stdout and len(result.stdout.splitlines()) < 24
    about = json.loads(command("--ckpt", random_checkpoint, "--info", "--json").stdout)
    assert about["linears"]["q_proj"] == {"sparsity": 0.0, "pattern": None} and about["parameters"] > 0


def test_the_pattern_of_layers_that_differ_is_the_one_that_all_have(model, tmp_path):
    for i, n in enumerate((1, 2)):
        prune_by_magnitude(model.model.layers[i], n, 4)
    save(model, tmp_path / "mixed.pt")
    assert {line["pattern"] for line in describe(*open_llama(tmp_path / "mixed.pt"))["linears"].values()} == {"2:4"}


def test_a_head_that_was_learned_apart_from_tied_embeddings_is_saved(tmp_path):
    config = dataclasses.replace(PRESETS["test"], tie_word_embeddings=True)
    model = inject(Llama(config), targets=("lm_head",), r=4)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    save(merge(model), tmp_path / "model.pt")
    tokens = torch.arange(9)[None]
    assert load(tmp_path / "model.pt")[0](tokens).equal(model(tokens))


def test_a_model_without_a_tokenizer_is_given_one(model, tokenizer_file, tmp_path):
    save(model, tmp_path / "bare.pt")
    assert "no tokenizer" in command("--ckpt", tmp_path / "bare.pt", "--info").stdout
    flags = ("--ckpt", tmp_path / "bare.pt", "--tokenizer", tokenizer_file)
    assert command(*flags, "--out", tmp_path / "whole.pt").returncode == 0
    said = command("--ckpt", tmp_path / "whole.pt", "--prompt", "bada", "--max_new_tokens", 3)
    assert said.returncode == 0 and said.stdout.startswith("bada")
    assert same(open_checkpoint(tmp_path / "whole.pt"), open_checkpoint(tmp_path / "bare.pt"))
    assert "--tokenizer: goes with --out" in command(*flags, "--info").stderr


def test_a_temperature_near_0_is_greedy(model):
    tokens = [3, 5, 8]
    for temperature in (1e-42, 5e-324):  # the latter is 0 in float32
        assert [*generate(model, tokens, 9, temperature=temperature)] == [*generate(model, tokens, 9)]


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


def test_a_conversion_asks_for_the_dtype_where_the_weights_have_several(model, tmp_path):
    model.model.norm.half()
    save(model, tmp_path / "mixed.pt")
    result = command("--ckpt", tmp_path / "mixed.pt", "--out", tmp_path / "hf")
    assert result.returncode == 2 and "several dtypes (float16, float32); `model.py --dtype`" in result.stderr
    assert not (tmp_path / "hf").exists()
    assert command("--ckpt", tmp_path / "mixed.pt", "--info").returncode == 0


def test_loading_in_float16_names_a_weight_that_is_too_large_for_it(model, tmp_path):
    model.lm_head.weight.data[3, 3] = -1e5
    save(model, tmp_path / "model.pt")
    with pytest.raises(UserError, match="lm_head.weight: holds 1e.05, which is too large for float16; take --dtype bf"):
        load(tmp_path / "model.pt", torch.float16)
    assert load(tmp_path / "model.pt", torch.bfloat16)[0].lm_head.weight.isfinite().all()


def test_what_needs_a_length_asks_for_it_and_the_rest_goes_on(model, tokenizer, tmp_path):
    model.config.max_position_embeddings = None
    save(model, tmp_path / "model.pt", tokenizer)
    (tmp_path / "text.txt").write_text("bada gudo. " * 50)
    prompt = command("--ckpt", tmp_path / "model.pt", "--prompt", "bada", "--max_new_tokens", 3)
    assert prompt.returncode == 0 and prompt.stdout.startswith("bada") and not prompt.stderr
    line = [sys.executable, "evaluate.py", "--ckpt", tmp_path / "model.pt", "--ppl", tmp_path / "text.txt"]
    line += ["--out", tmp_path / "results.json"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    words = "does not tell the length that it was trained on; give it by --seqlen"
    assert result.returncode == 2 and result.stderr == f"evaluate.py: error: --ckpt {tmp_path}/model.pt: {words}\n"
    result = subprocess.run([*line, "--seqlen", "16"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "seqlen 16" in result.stdout, result.stderr


def test_conversion_changes_the_dtype_and_splits(random_checkpoint, tmp_path):
    flags = ("--dtype", "bfloat16", "--max_shard_size", "20KB")
    assert command("--ckpt", random_checkpoint, "--out", tmp_path / "hf", *flags).returncode == 0
    converted, original = open_checkpoint(tmp_path / "hf"), open_checkpoint(random_checkpoint)
    assert all(converted[name].equal(w.to(torch.bfloat16)) for name, w in original.items())
    assert max(f.stat().st_size for f in (tmp_path / "hf").glob("*.safetensors")) < 25_000


def test_the_command_converts(random_checkpoint, tmp_path):
    result = command("--ckpt", random_checkpoint, "--out", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert same(open_checkpoint(tmp_path / "hf"), open_checkpoint(random_checkpoint))


@pytest.fixture(scope="module")
def no_bos(tokenizer_file):
    """A tokenizer that has no token to begin with."""
    text, model = tokenizer_file.parent / "text.txt", io.BytesIO()
    options = {"vocab_size": 200, "model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_writer=model, bos_id=-1, **options)
    return load_tokenizer(model.getvalue())


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing to do"),
        (["--out", "OUT", "--max_shard_size", "5"], "--max_shard_size 5: expected"),
        (["--out", "OUT", "--max_shard_size", "0GB"], "--max_shard_size 0GB: expected"),
        (["--out", "OUT.pt", "--layout", "meta"], "are for a directory, and --out OUT.pt is a file"),
        (["--out", "OUT.pt", "--max_shard_size", "1GB"], "are for a directory, and --out OUT.pt is a file"),
        (["--info", "--layout", "meta"], "--layout: goes with --out"),
        (["--out", "OUT", "--json"], "--json: goes with --info"),
        (["--info", "--dtype=float16"], "--dtype: goes with --out or --prompt"),
        (["--prompt", "x", "--top_p", "0.5"], "--top_p: goes with --temperature"),
        (["--prompt", "x", "--max_new_tokens", "-1"], "--max_new_tokens: expected at least 0, found -1"),
        (["--prompt", "x", "--max_new_tokens", "1" + "0" * 400], "--max_new_tokens: expected at most 4611"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature: expected a finite number, found nan"),
        (["--prompt", "x", "--top_p", "1.5"], "--top_p: expected at least 0 and at most 1, found 1.5"),
        (["--out", "FILE"], "is a file; a name without .pt is a directory"),
        (["--out", "DIR.pt"], "is a directory, and a .pt name is a file"),
        (["--out", "FULL"], "the directory is not empty"),
        (["--out", "/proc"], "--out /proc: is a mount point"),
        (["--out", "./random.pt", "--ckpt", "random.pt"], "--out random.pt: would be overwritten, and it is an input"),
        (
            ["--prompt", "x", "--ckpt", "BARE"],
            "BARE: has no tokenizer; `model.py --ckpt BARE --tokenizer DENSE_MODEL --out NEW` gives it",
        ),
        (["--prompt", "x", "--ckpt", "WINDOW"], "more than the model's sliding window of 16"),
        (["--prompt", "", "--ckpt", "NOBOS"], "is empty, and the tokenizer has no token to begin with"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_is_done(
    random_checkpoint, tokenizer, no_bos, tmp_path, monkeypatch, capsys, flags, words
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
        save(Llama(PRESETS["test"]), tmp_path / "NOBOS", no_bos)
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
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: error: a b\n"


def test_running_out_of_memory_is_one_line_wherever_it_happens(capsys):
    for allocate in (lambda: bytearray(2**62), lambda: np.empty(2**55), lambda: torch.empty(2**55)):
        with pytest.raises(SystemExit) as e:
            cli(allocate, "less of it")
        err = capsys.readouterr().err
        assert e.value.code == 2 and "error: out of memory" in err and err.endswith("what helps: less of it\n")


def test_under_torchrun_the_rank_is_named(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")

    def fail():
        raise UserError("a")

    with pytest.raises(SystemExit) as e:
        cli(fail)
    assert e.value.code == 2
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name} (rank 3): error: a\n"


def test_a_checkpoint_that_becomes_shorter_while_it_is_mapped_is_one_line(random_checkpoint, tmp_path):
    shutil.copy(random_checkpoint, tmp_path / "model.pt")
    program = f"""
import os, sys
sys.argv = ["model.py"]
from model import cli, open_llama
def main():
    ckpt, _ = open_llama("{tmp_path}/model.pt")
    os.truncate("{tmp_path}/model.pt", 0)
    print(ckpt["model.norm.weight"].sum())
cli(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "model.py: error: a checkpoint or prepared data became shorter while it was read; is it being copied, or written anew?\n"
    )


def test_an_argument_that_is_not_utf_8_is_one_line(random_checkpoint):
    line = [sys.executable.encode(), b"model.py", b"--ckpt", str(random_checkpoint).encode(), b"--prompt", b"ab\xffcd"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "model.py: error: the argument 'ab\\udcffcd' is not UTF-8\n"


def test_a_reader_that_leaves_ends_the_command_quietly(random_checkpoint):
    line = f"{sys.executable} model.py --ckpt {random_checkpoint} --info --json | true"
    result = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr


@pytest.mark.parametrize("out", ("/proc/no/model.pt", "/dev/null/model"))
def test_an_out_that_cannot_be_written_is_refused(random_checkpoint, out):
    result = command("--ckpt", random_checkpoint, "--out", out)
    assert result.returncode == 2 and out in result.stderr and "Traceback" not in result.stderr


def test_a_directory_that_is_not_empty_is_refused(directory, random_checkpoint):
    before = sorted(p.name for p in directory.iterdir())
    result = command("--ckpt", random_checkpoint, "--out", directory)
    assert result.returncode == 2 and "not empty" in result.stderr
    assert before == sorted(p.name for p in directory.iterdir())
