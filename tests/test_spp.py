"""What spp.py promises: exact forms, exact gradients, three units, no memory of W's size, zeros that stay zeros."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import spp
import train
from model import PRESETS, Llama, UserError, load, open_checkpoint, save
from spp import (
    METHODS,
    DynamicLinear,
    LoRALinear,
    MaskedLinear,
    SPPLinear,
    adapter_state,
    inject,
    load_adapter,
    merge,
    merge_checkpoint,
)

FORMS = ("repeat", "chunked", "fused")


def sparse_linear(m: int, n: int, dtype=torch.float32, density=0.5) -> nn.Linear:
    linear = nn.Linear(n, m, bias=False, dtype=dtype)
    linear.weight.data *= torch.rand(m, n) < density
    return linear


def spp_layer(m, n, r, matmul="fused", dtype=torch.float32, scale=2.0, **options) -> SPPLinear:
    layer = SPPLinear(sparse_linear(m, n, dtype), r=r, scale=scale, matmul=matmul, **options)
    nn.init.uniform_(layer.alpha, -0.5, 0.5)
    nn.init.uniform_(layer.beta, -0.5, 0.5)
    return layer


def reference(layer: SPPLinear, x, g):
    """Equations 4 and 5 in float64, by loops over rows: output and gradients of x, alpha, beta."""
    W, alpha, beta = (p.detach().double().requires_grad_() for p in (layer.weight, layer.alpha, layer.beta))
    x, (m, _), r = x.detach().double().requires_grad_(), W.shape, len(alpha)
    rows = [W[i] + layer.scale * W[i] * alpha[i // (m // r)] * beta[i] for i in range(m)]
    y = torch.stack([x @ row for row in rows], -1)
    return y.detach(), *torch.autograd.grad(y, (x, alpha, beta), g.double())


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def errors(layer, x):
    x = x.requires_grad_()
    y = layer(x)
    g = torch.randn_like(y)
    got = y.detach(), *torch.autograd.grad(y, (x, layer.alpha, layer.beta), g)
    return [relative(a, b) for a, b in zip(got, reference(layer, x, g), strict=True)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 24), st.integers(1, 9), st.sampled_from(FORMS), st.data())
def test_every_form_has_the_outputs_and_gradients_of_equation_5(r, rows, n, tokens, matmul, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    layer = spp_layer(r * rows, n, r, matmul)  # rows = 1: r = m
    x = torch.randn(2, tokens, n)
    assert max(errors(layer, x)) < 1e-5


@pytest.mark.parametrize("matmul", FORMS)
@pytest.mark.parametrize("r", (1, 16, 64))
def test_bf16_weights_with_float32_adapters(matmul, r):
    torch.manual_seed(0)
    layer = spp_layer(64, 48, r, matmul, torch.bfloat16)
    assert layer.alpha.dtype == layer.beta.dtype == torch.float32
    assert max(errors(layer, torch.randn(5, 48, dtype=torch.bfloat16))) < 2e-2


def test_gradcheck_in_float64():
    for make in (
        lambda: spp_layer(6, 5, 3, dtype=torch.float64),
        lambda: spp_layer(6, 5, 6, dtype=torch.float64, residual=False),
        lambda: METHODS["masked_lora"](sparse_linear(6, 5, torch.float64), r=2, scale=1.5),
        lambda: METHODS["masked"](sparse_linear(6, 5, torch.float64)),
    ):
        layer = make()
        for name in layer.factors:  # the layer's own are float32
            setattr(layer, name, nn.Parameter(torch.randn_like(getattr(layer, name), dtype=torch.float64)))
        pull = layer.factor_gradients
        layer.factor_gradients = lambda *args, pull=pull: tuple(g if g is None else g.double() for g in pull(*args))
        layer.weight.data = layer.weight.data.double()
        learned = [p for p in layer.parameters() if p.requires_grad]
        x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        zeros = layer.weight == 0

        def function(x, *learned, layer=layer, zeros=zeros):
            return layer(x)

        if isinstance(layer, MaskedLinear):  # its zeros are constants: only x, and the survivors below
            assert torch.autograd.gradcheck(layer, (x,))
            (grad,) = torch.autograd.grad(layer(x).sum(), layer.weight)
            expected = x.sum(0).expand(6, 5).masked_fill(zeros, 0)
            torch.testing.assert_close(grad, expected)
        else:
            assert torch.autograd.gradcheck(function, (x, *learned))


def units(layer, T, m, n):
    x = torch.randn(T, n, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    # the two reductions of `factor_gradients` are matrix-vector products: 2 * 2 * m * n FLOPs, whatever T is
    return (counter.get_total_flops() - (4 * m * n if getattr(layer, "matmul", "") == "fused" else 0)) / (2 * T * m * n)


def test_fused_takes_3_units_chunked_4_and_equation_5_as_written_5():
    T, m, n = 64, 96, 80
    assert units(spp_layer(m, n, 16, "fused"), T, m, n) == pytest.approx(3.0, abs=1e-6)
    assert units(spp_layer(m, n, 16, "chunked"), T, m, n) == pytest.approx(4.0, abs=1e-6)
    assert units(spp_layer(m, n, 16, "repeat"), T, m, n) == pytest.approx(5.0, abs=1e-6)


def saved_bytes(layer, x):
    """Bytes kept for the backward pass, parameters and x left out, each storage once."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fused_keeps_less_than_1_percent_of_a_weight_for_backward(dtype):
    T, m, n = 32, 256, 192
    x = torch.randn(T, n, dtype=dtype, requires_grad=True)
    weight = m * n * dtype.itemsize
    assert saved_bytes(spp_layer(m, n, 16, "fused", dtype), x) < 0.01 * weight
    assert saved_bytes(spp_layer(m, n, 16, "repeat", dtype), x) >= 2 * weight
    for method in ("masked", "masked_lora"):
        assert saved_bytes(METHODS[method](sparse_linear(m, n, dtype), r=8), x) < 0.01 * weight


@pytest.mark.parametrize("matmul", FORMS)
def test_a_layer_starts_at_the_pruned_weight(matmul):
    linear = sparse_linear(32, 24)
    before, x = copy.deepcopy(linear), torch.randn(3, 24)
    layer = SPPLinear(linear, r=4, matmul=matmul)
    torch.testing.assert_close(layer(x), before(x))
    assert layer.weight is linear.weight and not layer.weight.requires_grad
    assert layer.alpha.abs().max() <= 1 / math.sqrt(24) and layer.alpha.std() > 0.5 / math.sqrt(24)


@pytest.mark.parametrize("matmul", FORMS)
def test_a_layer_composes_with_activation_checkpointing(matmul):
    layer = spp_layer(16, 12, 4, matmul, torch.bfloat16)
    x = torch.randn(5, 12, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        grads.append(torch.autograd.grad(y.sum(), (x, layer.alpha, layer.beta)))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


def test_torch_compile_gives_the_same_and_saves_no_weight():
    layer = spp_layer(64, 48, 4)
    x = torch.randn(5, 48, requires_grad=True)
    compiled = torch.compile(layer)
    for function in (layer, compiled):
        layer.zero_grad()
        function(x).sum().backward()
        if function is layer:
            expected = [p.grad.clone() for p in (layer.alpha, layer.beta)]
    torch.testing.assert_close([layer.alpha.grad, layer.beta.grad], expected)
    assert saved_bytes(layer, x) == 0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(x)
    own = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    assert all(t.numel() < 64 * 48 for t in saved if t.data_ptr() not in own)


# ----------------------------------------------------------------------------------------------------------------------
# a whole model


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    model = Llama(PRESETS["test"])
    for name, p in model.named_parameters():
        if name.endswith("proj.weight"):
            groups = p.data.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0)
    return model


def stir(model):
    """Adapters as after some training."""
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith("weight"):
            nn.init.uniform_(p, -0.3, 0.3)
        elif p.requires_grad:
            p.data += 0.1 * torch.randn_like(p) * (p != 0)


@pytest.mark.parametrize("method", ("spp", "masked", "masked_lora", "lora"))
def test_merge_keeps_every_zero_and_the_function(pruned, method):
    before = {name: w.clone() for name, w in pruned.state_dict().items()}
    tokens = torch.randint(0, 256, (2, 9))
    stir(inject(pruned, method=method, r=4))
    logits = pruned(tokens)
    merge(pruned)
    assert all(type(m) is nn.Linear for name, m in pruned.named_modules() if name.endswith("_proj"))
    if method != "lora":  # LoRA* is another function than the LoRA it comes from
        torch.testing.assert_close(pruned(tokens), logits, atol=1e-5, rtol=1e-5)
    for name, w in pruned.state_dict().items():
        if name.endswith("proj.weight"):
            assert not w[before[name] == 0].any() and not w.equal(before[name])
        else:
            assert w.equal(before[name])


def test_lora_merged_without_its_mask_is_dense(pruned):
    tokens = torch.randint(0, 256, (2, 9))
    stir(inject(pruned, method="lora", r=4))
    logits = pruned(tokens)
    merge(pruned, masked=False)
    torch.testing.assert_close(pruned(tokens), logits, atol=1e-5, rtol=1e-5)
    assert (pruned.model.layers[0].mlp.up_proj.weight != 0).float().mean() > 0.99


def test_dynamic_masks_follow_the_weight(pruned):
    inject(pruned, method="dynamic")
    layer = pruned.model.layers[0].mlp.up_proj
    assert isinstance(layer, DynamicLinear) and layer.weight.requires_grad
    layer.mask = layer.weight.abs() > layer.weight.abs().median()
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight * layer.mask))
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    torch.testing.assert_close(grad, x.sum(0).expand_as(layer.weight))  # straight through: masked entries learn too


@pytest.mark.parametrize("method", ("spp", "lora", "masked", "masked_lora"))
def test_merging_files_equals_merging_in_memory(pruned, tmp_path, method):
    save(pruned, tmp_path / "pruned.pt")
    stir(inject(pruned, method=method, r=4, scale=1.5))
    adapter = {name: p.clone() for name, p in adapter_state(pruned).items()}
    about = {"method": method, "r": 4, "scale": 1.5, "base": open_checkpoint(tmp_path / "pruned.pt").fingerprint()}
    torch.save({"adapter": adapter} | about, tmp_path / "adapter.pt")
    merged = merge_checkpoint(open_checkpoint(tmp_path / "pruned.pt"), tmp_path / "adapter.pt")
    for name, w in merge(pruned).state_dict().items():
        assert merged[name].equal(w), name
    fresh = inject(load(tmp_path / "pruned.pt")[0], method=method, r=4, scale=1.5)
    load_adapter(fresh, adapter)
    assert all(p.equal(adapter[name]) for name, p in adapter_state(fresh).items())


def test_training_with_each_form_gives_the_same_losses(pruned):
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (4, 12))
    curves = []
    for matmul in FORMS:
        model = copy.deepcopy(pruned)
        torch.manual_seed(1)
        inject(model, r=8, matmul=matmul)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
        curves.append([])
        for _ in range(15):
            loss = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0][-1] < curves[0][0] - 0.01
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-4)


def test_with_r_equal_to_m_spp_takes_the_step_of_masked_training():
    """SGD on alpha (r = m, beta = 1, W o alpha) moves the weight by lr * W^2 o G; on W under its mask by lr * G.

    With V = W o alpha and alpha = 1: dL/d alpha = W o G, so V <- V - lr * W o W o G: the same direction, each
    coordinate scaled by W^2. A step of SGD on alpha preconditioned by 1 / W^2 is therefore masked SGD's step.
    """
    linear, x, target = sparse_linear(8, 6), torch.randn(10, 6), torch.randn(10, 8)
    W = linear.weight.detach().clone()
    spp = SPPLinear(copy.deepcopy(linear), r=8, beta=False, residual=False)
    masked = MaskedLinear(copy.deepcopy(linear))
    for layer in (spp, masked):
        F.mse_loss(layer(x), target).backward()
    torch.testing.assert_close(spp.alpha.grad, W * masked.weight.grad)
    step = spp.merged() - 0.1 * W * (spp.alpha.grad / W.square()).nan_to_num(0, 0, 0)
    torch.testing.assert_close(step, masked.weight.detach() - 0.1 * masked.weight.grad)


@pytest.mark.parametrize(
    "options, alpha, beta",
    [
        ({}, False, True),
        ({"zero_init": "alpha"}, True, False),
        ({"zero_init": "none"}, False, False),
        ({"beta": False}, True, False),
    ],
)
def test_ablations_start_where_they_should(options, alpha, beta):
    layer = SPPLinear(sparse_linear(16, 12), r=4, **options)
    assert (not layer.alpha.any(), not layer.beta.any()) == (alpha, beta)
    assert layer.merged().equal(layer.weight) == (alpha or beta)
    assert layer.beta.requires_grad == options.get("beta", True)
    layer(torch.randn(3, 12)).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in (layer.alpha, layer.beta)), "nothing would ever learn"


def test_plain_multiplication_starts_at_the_pruned_weight():
    layer = SPPLinear(sparse_linear(16, 12), r=4, residual=False)
    assert layer.merged().equal(layer.weight)


# ----------------------------------------------------------------------------------------------------------------------
# what a user can get wrong


def test_an_r_that_divides_no_layer_is_refused_before_anything_changes(pruned):
    with pytest.raises(UserError, match=r"--r 5: does not divide the 32 outputs of layers.0.self_attn.q_proj.*4.*8"):
        inject(pruned, r=5)
    assert not any(isinstance(module, SPPLinear) for module in pruned.modules())


def test_an_adapter_of_another_base_or_shape_is_refused(pruned, tmp_path):
    save(pruned, tmp_path / "pruned.pt")
    ckpt = open_checkpoint(tmp_path / "pruned.pt")
    torch.save({"weights": 1}, tmp_path / "not.pt")
    with pytest.raises(UserError, match="not an adapter"):
        merge_checkpoint(ckpt, tmp_path / "not.pt")
    about = {"adapter": {}, "method": "spp", "r": 4, "scale": 2.0, "base": "another"}
    torch.save(about, tmp_path / "other.pt")
    with pytest.raises(UserError, match="was trained on checkpoint another"):
        merge_checkpoint(ckpt, tmp_path / "other.pt")
    state = {name: p.clone() for name, p in adapter_state(inject(copy.deepcopy(pruned), r=8)).items()}
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(inject(pruned, r=4), state)


def test_lora_is_lora():
    """Against its formula, and frozen in W."""
    layer = LoRALinear(sparse_linear(16, 12), r=4, scale=2.0)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), x @ (layer.weight + 2 * layer.B @ layer.A).T)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]


def test_the_readmes_new_adapter_trains_and_merges(pruned, tmp_path, monkeypatch):
    """The lines under "Fork it", as they stand in the README, through the steps of train.py."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    code = text.split("in [`spp.py`](spp.py):\n\n```python\n")[1].split("```")[0]
    monkeypatch.setattr("spp.METHODS", METHODS | {})
    exec(code, names := vars(spp) | {})
    save(pruned, tmp_path / "pruned.pt")
    ckpt = open_checkpoint(tmp_path / "pruned.pt")
    monkeypatch.setattr("train.METHODS", spp.METHODS)
    args = train.parse_args(["--ckpt", str(ckpt.path), "--method", "row_scale", "--dtype", "float32"])
    model = train.build(args, ckpt.config)
    train.materialise(model, ckpt, 0, "cpu")
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 32, requires_grad=True)
    assert type(layer) is names["RowScale"] and layer.merged().equal(pruned.model.layers[0].mlp.up_proj.weight)
    nn.init.uniform_(layer.gain, 0.5, 1.5)
    grads = torch.autograd.grad(layer(x).square().sum(), (x, layer.gain))
    y = F.linear(x, layer.weight * layer.gain[:, None])
    torch.testing.assert_close(grads, torch.autograd.grad(y.square().sum(), (x, layer.gain)))
    train.write_adapter(tmp_path / "adapter.pt", train.learned(model), args, ckpt.fingerprint())
    merged = merge_checkpoint(ckpt, tmp_path / "adapter.pt")
    for name, w in merge(model).state_dict().items():
        assert merged[name].equal(w), name
