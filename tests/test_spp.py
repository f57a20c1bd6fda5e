"""What spp.py promises: exact forms, exact gradients, three units, no memory of W's size, zeros that stay zeros."""

import copy
import functools
import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, prune_by_magnitude
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import difference, error, finished, start, wait_for, world  # noqa: F401, F811  world: a fixture
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx, metrics
from torch._inductor import config as inductor_config
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import spp
import train
from bench.linear import saved_bytes, units
from data.checkpoint import VERSION, UserError, open_checkpoint, pack, packed_size, unpack, unpack_by_places
from data.checkpoint import write_checkpoint
from model import PRESETS, Llama, cli, load, open_llama, save
from spp import METHODS, DynamicLinear, LoRALinear, MaskedLinear, MaskedLoRALinear, SPPLinear, adapter_state, inject
from spp import load_adapter, merge, merge_checkpoint, read_adapter, write_adapter

FORMS = ("repeat", "chunked", "fused")


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers whichever ran before it."""
    torch.manual_seed(0)


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


@pytest.mark.parametrize("is_compiled", (False, True))
def test_an_input_may_be_one_token_or_in_any_order_or_under_autocast(monkeypatch, is_compiled):
    monkeypatch.setattr(spp, "compiled", lambda function: function)
    layer = spp_layer(64, 48, 16)
    if is_compiled:
        torch._dynamo.reset()
        layer.compile(backend="aot_eager")
    for x in (torch.randn(48), torch.randn(48, 7).T, torch.randn(3, 2, 48).transpose(0, 1), torch.randn(0, 48)):
        assert max(errors(layer, x)) < 1e-5
    rounded = spp_layer(64, 48, 16, dtype=torch.bfloat16)
    if is_compiled:
        rounded.compile(backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert max(errors(layer, torch.randn(5, 48))) < 1e-2
        assert max(errors(rounded, torch.randn(5, 48))) < 2e-2


@pytest.mark.parametrize("matmul", FORMS)
@pytest.mark.parametrize("r", (1, 16, 64))
def test_float32_adapters_on_bf16_weights_come_within_2_percent_of_float64(matmul, r):
    layer = spp_layer(64, 48, r, matmul, torch.bfloat16)
    assert layer.alpha.dtype == layer.beta.dtype == torch.float32
    assert max(errors(layer, torch.randn(5, 48, dtype=torch.bfloat16))) < 2e-2


@pytest.mark.parametrize(
    "make",
    (
        lambda: spp_layer(6, 5, 3, dtype=torch.float64),
        lambda: spp_layer(6, 5, 6, dtype=torch.float64, residual=False),
        lambda: MaskedLoRALinear(sparse_linear(6, 5, torch.float64), r=2, scale=1.5),
    ),
    ids=("SPP", "plain product", "masked LoRA"),
)
def test_gradients_equal_finite_differences_in_float64(make):
    layer = make()
    for name in layer.factors:  # the layer's own are float32, and so are the gradients that it gives them
        setattr(layer, name, nn.Parameter(torch.randn_like(getattr(layer, name), dtype=torch.float64)))
    in_float32 = layer.factor_gradients
    layer.factor_gradients = lambda *args: tuple(g if g is None else g.double() for g in in_float32(*args))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    learned = [getattr(layer, name) for name in layer.factors]
    assert torch.autograd.gradcheck(lambda x, *learned: layer(x), (x, *learned))


def test_masked_gradients_are_those_of_the_survivors():
    layer = MaskedLinear(sparse_linear(6, 5))
    layer.double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    torch.testing.assert_close(grad, x.sum(0).expand(6, 5).masked_fill(layer.weight == 0, 0))


@pytest.mark.parametrize("matmul, expected", (("fused", 3), ("chunked", 4), ("repeat", 5)))
def test_fused_takes_3_units_chunked_4_and_equation_5_as_written_5(matmul, expected):
    x, g = torch.randn(64, 80, requires_grad=True), torch.randn(64, 96)
    assert units(spp_layer(96, 80, 16, matmul), x, g) == pytest.approx(expected, abs=1e-6)


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
    linear = sparse_linear(32, 400)
    before, x = copy.deepcopy(linear), torch.randn(3, 400)
    layer = SPPLinear(linear, r=16, matmul=matmul)
    torch.testing.assert_close(layer(x), before(x))
    assert layer.weight is linear.weight and not layer.weight.requires_grad
    assert layer.alpha.abs().max() <= 0.05  # uniform in +-1 / sqrt(400)
    assert layer.alpha.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("matmul", FORMS)
def test_a_layer_composes_with_activation_checkpointing(matmul):
    layer = spp_layer(16, 12, 4, matmul, torch.bfloat16)
    x = torch.randn(5, 12, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for recompute in (False, True):
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        grads.append(torch.autograd.grad(y.sum(), (x, layer.alpha, layer.beta)))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("method", ("spp", "masked_lora"))
def test_compiled_blocks_have_no_graph_break_and_learn_the_same(monkeypatch, method):
    """As train.py compiles them, of micro-batches of several lengths; SPP's keep no matrix of W's size."""
    monkeypatch.setattr(spp, "compiled", lambda function: function)
    torch._dynamo.reset()
    counters.clear()
    model = inject(prune_by_magnitude(Llama(PRESETS["test"]), 2, 4), method, r=4)
    plain = copy.deepcopy(model)
    for block in model.model.layers:
        block.compile(dynamic=True, backend="aot_eager")  # graphs and their cut as for a GPU, without kernels
    for T in (9, 12, 17, 24):
        tokens = torch.randint(0, 256, (2, T))
        for m in (plain, model):
            m(tokens[:, :-1], tokens[:, 1:]).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4, msg=name)
    assert not counters["graph_break"] and not counters["recompile_limit"], counters
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.stress
def test_compiled_blocks_have_no_graph_break_under_fsdp(monkeypatch):
    """Where torch knows every size of a module as a symbol."""
    monkeypatch.setattr(spp, "compiled", lambda function: function)
    torch._dynamo.reset()
    counters.clear()
    args = train.make_parser().parse_args("--preset test --rank 4 --dtype float32 --fsdp".split())
    model = train.build(args, PRESETS["test"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        train.materialise(model, Llama(PRESETS["test"]).state_dict(), 0, "cpu", init_device_mesh("cpu", (2,)))
        for block in model.model.layers:
            block.compile(dynamic=True, backend="aot_eager")
        for T in (9, 12, 17):
            tokens = torch.randint(0, 256, (2, T))
            model(tokens[:, :-1], tokens[:, 1:]).backward()
    finally:
        dist.destroy_process_group()
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"], counters


def test_compiled_spp_saves_no_weight(monkeypatch):
    monkeypatch.setattr(spp, "compiled", lambda function: function)
    layer = spp_layer(64, 48, 4)
    x = torch.randn(5, 48, requires_grad=True)
    assert saved_bytes(layer, x) == 0 and saved_bytes(torch.compile(layer, backend="aot_eager"), x) == 0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.compile(layer, backend="aot_eager")(x)
    own = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    assert kept and own >= {t.data_ptr() for t in kept}


@pytest.mark.parametrize(
    "dtype, kernels", [(torch.float32, []), (torch.bfloat16, ["form_kernel", "form_kernel", "reduce_kernel"])]
)
def test_bfloat16_learns_through_kernels_and_merges_without(dtype, kernels, monkeypatch):
    used = []
    monkeypatch.setattr(spp, "compile_error", lambda device: None)
    monkeypatch.setattr(spp, "compiled", lambda function: used.append(function.__name__) or function)
    layer = spp_layer(64, 48, 16, dtype=dtype)
    layer(torch.randn(5, 48, dtype=dtype, requires_grad=True)).sum().backward()
    layer.merged()
    layer.eval()(torch.randn(5, 48, dtype=dtype))
    assert used == kernels


@pytest.mark.stress
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_kernels_have_the_outputs_and_gradients_of_equation_5(dtype, bound):
    """What --compile makes of a layer, here for a CPU; packed it learns the same."""
    torch._dynamo.reset()
    dense = spp_layer(64, 48, 16, dtype=dtype)
    packed = copy.deepcopy(dense)
    assert packed.pack(packed.weight.detach())
    x = torch.randn(5, 48, dtype=dtype, requires_grad=True)
    dense.compile()
    packed.compile()
    assert max(errors(dense, x)) < bound
    found = [torch.autograd.grad(layer(x).sum(), (x, layer.alpha, layer.beta)) for layer in (dense, packed)]
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_where_nothing_can_be_compiled_spp_does_without_kernels_and_compile_is_refused(monkeypatch, capsys):
    def compiled(function):
        raise RuntimeError(message)

    message = "backend='inductor' raised:\nFailed to find C compiler.\nmore"
    monkeypatch.setattr(spp, "compiled", compiled)
    monkeypatch.setattr(spp, "compile_errors", {})  # those known are of other tests' compilers
    assert spp.in_one_kernel(torch.add, torch.ones(2), torch.ones(2)).tolist() == [2, 2]
    assert not spp.has_kernels(torch.ones(2, dtype=torch.bfloat16))  # a CPU takes its blocks
    args = train.make_parser().parse_args(["--preset", "test"])
    monkeypatch.setattr(torch, "zeros", lambda *args, device: None)  # the probe's input
    for args.device, args.dtype, note in (
        ("cuda", "float32", "so SPP is slower than it could be: Failed to find C compiler.\n"),
        ("cpu", "bfloat16", "so SPP is slower than it could be: Failed to find C compiler.\n"),
        ("cpu", "float32", ""),
    ):
        train.check_compiler(args)
        assert capsys.readouterr().out.removeprefix("note: torch.compile does not work on this machine, ") == note
    args.compile, spp.compile_errors = True, {}
    message = "C++ compile error\n\nmain.cpp:1: fatal error: Python.h: No such file"
    with pytest.raises(UserError, match="--compile: torch.compile does not .*: main.cpp:1: fatal error: Python.h: No"):
        train.check_compiler(args)


def test_where_a_kernel_cannot_be_compiled_after_all_blocks_do_it_and_a_warning_says_so(monkeypatch):
    """A disk that fills up, a cache that a killed run has damaged, Ctrl-C in the C compiler."""
    tried = []

    def compiled(function):
        tried.append(function)
        return lambda *args: 1 / 0

    layer, x = spp_layer(64, 48, 16, dtype=torch.bfloat16), torch.randn(5, 48, dtype=torch.bfloat16, requires_grad=True)
    gradients = []
    for errors in ({"cpu": "no compiler"}, {"cpu": None}):
        monkeypatch.setattr(spp, "compile_errors", errors)
        monkeypatch.setattr(spp, "compiled", compiled)
        with warnings.catch_warnings(record=True) as said:
            gradients.append(torch.autograd.grad(layer(x).sum(), (x, layer.alpha, layer.beta)))
    assert [str(w.message) for w in said] == [
        "torch.compile failed, so SPP goes on without its kernels: division by zero"
    ]
    assert tried == [spp.form_kernel]  # no second time
    for blocks, failed in zip(*gradients, strict=True):
        torch.testing.assert_close(failed, blocks)


def test_torch_compile_that_is_switched_off_does_not_work(monkeypatch):
    """TORCH_COMPILE_DISABLE=1: what was to be one kernel would be a dozen, with float32 matrices of W's shape between."""
    monkeypatch.setattr(spp, "compile_errors", {})
    with torch._dynamo.config.patch(disable=True):
        assert spp.compile_error("cpu") == "it is switched off"


@torch.no_grad()
def test_kernels_are_compiled_a_few_times_whatever_number_of_weights_survives(monkeypatch):
    """What a GPU takes of packed layers, all of one shape, whose sparsity differs: parameters, as a layer has them."""
    graphs = []

    @functools.cache
    def compiled(function):
        return torch.compile(function, backend=lambda graph, _: graphs.append(function) or graph.forward)

    torch._dynamo.reset()
    monkeypatch.setattr(spp, "compiled", compiled)
    monkeypatch.setattr(spp, "unpack", unpack_by_places)
    for i in range(12):
        values, bits = pack(torch.randn(32, 48) * (torch.rand(32, 48) < 0.05 * i + 0.2))
        W, alpha, beta = nn.Parameter(values), nn.Parameter(torch.randn(4, 48)), nn.Parameter(torch.randn(32))
        for args in (
            (spp.form_kernel, W, bits, alpha[:, None], beta.view(4, -1, 1), 2.0, True),
            (spp.reduce_kernel, torch.randn(4, 8, 48), W, bits, alpha[:, None], beta.view(4, -1, 1), 2.0),
        ):
            torch.testing.assert_close(spp.in_one_kernel(*args), args[0](*args[1:]))
    assert 2 <= len(graphs) <= 5


def bytes_of(function, *args) -> int:
    """What the kernels of a compiled function read and write, as torch's compiler counts it."""
    torch._dynamo.reset()
    metrics.reset()
    log = compile_fx.inductor_metrics_log
    level = log.level
    log.setLevel(logging.INFO)  # or the compiler does not count
    with inductor_config.patch(force_disable_caches=True):
        torch.compile(function)(*args)
    log.setLevel(level)
    return metrics.num_bytes_accessed


@pytest.mark.stress
def test_a_weight_costs_12_to_16_bytes_of_memory_traffic():
    """In bfloat16: W^ is formed twice, each time W is read and W^ written; the reduction reads G and W once, or in two
    kernels twice. Compiled for a CPU, which takes two."""
    r, m, n = 16, 4096, 4096
    W, G = (torch.randn(r, m // r, n).bfloat16() for _ in range(2))
    alpha, beta = torch.randn(r, 1, n), torch.randn(r, m // r, 1)
    small = 8 * (alpha.nbytes + beta.nbytes)  # the factors, and what is learned of them
    forming = bytes_of(spp.form_kernel, W, None, alpha, beta, 2.0, True)
    assert forming == pytest.approx(4 * m * n, abs=small)
    reducing = bytes_of(spp.reduce_kernel, G, W, None, alpha, beta, 2.0)
    assert 4 * m * n <= reducing <= 8 * m * n + small
    assert 12 * m * n <= 2 * forming + reducing <= 16 * m * n + 3 * small
    # Over the floor of 3 units, by the speed of a GPU's memory and of its products, at so many tokens a micro-batch. 12
    # bytes a weight would be 1.13 and 1.5 on an H100; the reduction takes two kernels.
    for bytes_per_s, flops_per_s, tokens, most in (
        (2.6e12, 650e12, 4096, 1.17),  # H100
        (2.6e12, 650e12, 1024, 1.66),
        (2.0e12, 312e12, 4096, 1.17),  # A100
        (2.0e12, 312e12, 1024, 1.66),
    ):
        floor = 3 * 2 * tokens / flops_per_s  # seconds a weight
        assert 1 + (2 * forming + reducing) / (m * n) / bytes_per_s / floor <= most


@pytest.mark.stress
@pytest.mark.parametrize("zeros, expected", [(0.5, 30), (0.75, 28)])
def test_a_packed_weight_costs_twice_as_much_memory_traffic_as_a_dense_one(monkeypatch, zeros, expected):
    """With the places of survivors, as a GPU takes them: why --packed is no default."""
    monkeypatch.setattr(spp, "unpack", unpack_by_places)
    r, m, n = 16, 1024, 1024
    W = torch.randn(m, n).bfloat16()
    values, bits = pack(W.masked_fill_(torch.rand(m, n) < zeros, 0))
    G, alpha, beta = torch.randn(r, m // r, n).bfloat16(), torch.randn(r, 1, n), torch.randn(r, m // r, 1)
    forming = bytes_of(spp.form_kernel, values, bits, alpha, beta, 2.0, True)
    reducing = bytes_of(spp.reduce_kernel, G, values, bits, alpha, beta, 2.0)
    assert (2 * forming + reducing) / (m * n) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "options, alpha_is_0, beta_is_0, at_the_pruned_weight",
    [
        ({}, False, True, True),
        ({"zero_init": "alpha"}, True, False, True),
        ({"zero_init": "none"}, False, False, False),
        ({"beta": False}, True, False, True),
        ({"residual": False}, False, False, True),
    ],
    ids=("SPP", "alpha at 0", "none at 0", "no beta", "plain product"),
)
def test_ablations_start_where_they_should(options, alpha_is_0, beta_is_0, at_the_pruned_weight):
    layer = SPPLinear(sparse_linear(16, 12), r=4, **options)
    assert (not layer.alpha.any(), not layer.beta.any()) == (alpha_is_0, beta_is_0)
    assert layer.merged().equal(layer.weight) == at_the_pruned_weight
    assert layer.beta.requires_grad == options.get("beta", True)
    layer(torch.randn(3, 12)).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in (layer.alpha, layer.beta)), "nothing would ever learn"


def test_lora_is_equation_6_and_leaves_the_weight_alone():
    layer = LoRALinear(sparse_linear(16, 12), r=4, scale=2.0)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), x @ (layer.weight + 2 * layer.B @ layer.A).T)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]


def test_with_r_equal_to_m_alphas_gradient_is_w_times_that_of_masked_training():
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


# ----------------------------------------------------------------------------------------------------------------------
# a whole model


@pytest.fixture
def pruned():
    return prune_by_magnitude(Llama(PRESETS["test"]), 2, 4)


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


@pytest.mark.parametrize("method", METHODS)
def test_merging_keeps_the_dtype_of_the_weights(pruned, method):
    stir(inject(pruned.bfloat16(), method=method, r=4))
    if method == "dynamic":
        with pytest.raises(UserError, match="no dynamic layer has a mask yet"):  # merged, it would be dense
            merge(pruned)
        train.update_masks(pruned, 0.5)
    merge(pruned)
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}


def test_a_model_is_not_injected_twice_and_not_saved_before_it_is_merged(pruned, tmp_path):
    inject(pruned, r=4)
    with pytest.raises(UserError, match="has no nn.Linear named q_proj or .*; were they swapped already?"):
        inject(pruned, r=4)
    assert any(p.requires_grad for p in pruned.parameters())
    with pytest.raises(UserError, match="model.pt: the model has model.*, which is not a LLaMA's; merge its adapters"):
        save(pruned, tmp_path / "model.pt")
    merge(pruned)
    save(pruned, tmp_path / "model.pt")
    pruned.history = [{"method": "mine", "values": [1, 2]}]
    with pytest.raises(UserError, match="its history is damaged"):  # nobody could read it
        save(pruned, tmp_path / "list.pt")


@pytest.mark.parametrize("scale", (0.0, -1.0, math.inf, math.nan))
def test_a_scale_that_is_none_is_refused(pruned, scale):
    with pytest.raises(UserError, match="--scale .*: expected a finite number above 0"):
        inject(pruned, r=4, scale=scale)


def test_survivors_that_were_learned_packed_fill_a_model_that_is_not(pruned):
    learned = inject(copy.deepcopy(pruned), "masked")
    stir(learned)
    state = adapter_state(learned)
    packed = {name: w[w != 0] for name, w in state.items()}
    load_adapter(inject(pruned, "masked"), packed)
    assert all(w.equal(state[name]) for name, w in adapter_state(pruned).items())
    packed["layers.0.mlp.up_proj.weight"] = torch.ones(3)
    with pytest.raises(UserError, match="layers.0.mlp.up_proj.weight: has 3 survivors"):
        load_adapter(pruned, packed)


def test_an_adapter_larger_than_its_file_is_refused(pruned, tmp_path):
    """11 kB that ask for 40 GB."""
    save(pruned, tmp_path / "pruned.pt")
    ckpt = open_checkpoint(tmp_path / "pruned.pt")
    state = {name: torch.zeros(1).expand(10**10) for name in adapter_state(inject(pruned, "masked"))}
    write_adapter(tmp_path / "adapter.pt", {}, ckpt.fingerprint(), "masked", 4, 2.0)
    torch.save({**torch.load(tmp_path / "adapter.pt"), "adapter": state}, tmp_path / "adapter.pt")
    with pytest.raises(UserError, match="is larger than what is stored of it"):
        read_adapter(tmp_path / "adapter.pt", ckpt)


def test_lora_merged_without_its_mask_is_dense(pruned):
    tokens = torch.randint(0, 256, (2, 9))
    stir(inject(pruned, method="lora", r=4))
    logits = pruned(tokens)
    merge(pruned, masked=False)
    torch.testing.assert_close(pruned(tokens), logits, atol=1e-5, rtol=1e-5)
    assert (pruned.model.layers[0].mlp.up_proj.weight != 0).float().mean() > 0.99


@pytest.mark.parametrize("method, options", [("spp", {"residual": False}), ("dynamic", {})])
def test_merged_zeros_have_no_sign(pruned, method, options):
    """Or a .pt would store them as survivors."""
    model = inject(copy.deepcopy(pruned), method, r=4, **options)
    for layer in model.modules():
        if isinstance(layer, SPPLinear):
            nn.init.normal_(layer.alpha)
        elif isinstance(layer, DynamicLinear):
            layer.mask.copy_(layer.weight > 0.01)
    merge(model)
    for name, w in model.named_parameters():
        assert not (w.signbit() & (w == 0)).any(), name


def test_a_loaded_dynamic_adapter_has_the_mask_that_it_was_saved_under(pruned):
    model = inject(copy.deepcopy(pruned), "dynamic")
    train.update_masks(model, (1, 4))
    again = inject(copy.deepcopy(pruned), "dynamic")
    load_adapter(again, adapter_state(model))
    for a, b in zip(merge(model).parameters(), merge(again).parameters(), strict=True):
        assert a.equal(b)


def test_a_dynamic_layer_uses_its_mask_and_learns_through_it(pruned):
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
    ckpt = open_llama(tmp_path / "pruned.pt")[0]
    write_adapter(tmp_path / "adapter.pt", adapter, ckpt.fingerprint(), method, 4, 1.5)
    merged = merge_checkpoint(ckpt, tmp_path / "adapter.pt")
    for name, w in merge(pruned).state_dict().items():
        assert merged[name].equal(w), name
    fresh = inject(load(tmp_path / "pruned.pt")[0], method=method, r=4, scale=1.5)
    load_adapter(fresh, adapter)
    assert all(p.equal(adapter[name]) for name, p in adapter_state(fresh).items())


def test_training_with_each_form_gives_the_same_losses(pruned):
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


def test_inject_swaps_its_targets_and_nothing_else(pruned):
    inject(pruned, r=4, targets=("q_proj", "down_proj"))
    linears = {name: m for name, m in pruned.named_modules() if isinstance(m, nn.Linear | SPPLinear)}
    swapped = {name for name, m in linears.items() if isinstance(m, SPPLinear)}
    assert swapped == {name for name in linears if name.endswith((".q_proj", ".down_proj"))}
    assert (
        len(swapped) == 2 * pruned.config.num_hidden_layers and len(linears) == 7 * pruned.config.num_hidden_layers + 1
    )
    learned = {name for name, p in pruned.named_parameters() if p.requires_grad}
    assert learned == {f"{name}.{factor}" for name in swapped for factor in ("alpha", "beta")}


def test_the_readmes_new_adapter_trains_and_merges(pruned, tmp_path, monkeypatch):
    """The lines under "Fork it", as they stand in the README, through the steps of train.py."""
    text = (ROOT / "README.md").read_text()
    code = text.split("after the closing brace of `METHODS` in [`spp.py`](spp.py):\n\n```python\n")[1].split("```")[0]
    monkeypatch.setattr("spp.METHODS", METHODS | {})
    exec(code, names := vars(spp) | {})
    save(pruned, tmp_path / "pruned.pt")
    ckpt, config = open_llama(tmp_path / "pruned.pt")
    monkeypatch.setattr("train.METHODS", spp.METHODS)
    args = train.make_parser().parse_args(["--ckpt", str(ckpt.path), "--method", "row_scale", "--dtype", "float32"])
    model = train.build(args, config)
    train.materialise(model, ckpt, 0, "cpu")
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 32, requires_grad=True)
    assert type(layer) is names["RowScale"] and layer.merged().equal(pruned.model.layers[0].mlp.up_proj.weight)
    nn.init.uniform_(layer.gain, 0.5, 1.5)
    grads = torch.autograd.grad(layer(x).square().sum(), (x, layer.gain))
    y = F.linear(x, layer.weight * layer.gain[:, None])
    torch.testing.assert_close(grads, torch.autograd.grad(y.square().sum(), (x, layer.gain)))
    write_adapter(tmp_path / "adapter.pt", adapter_state(model), ckpt.fingerprint(), "row_scale", args.rank, args.scale)
    merged = merge_checkpoint(ckpt, tmp_path / "adapter.pt")
    for name, w in merge(model).state_dict().items():
        assert merged[name].equal(w), name


# ----------------------------------------------------------------------------------------------------------------------
# what a user can get wrong


def test_merging_over_the_checkpoint_itself_is_refused(pruned, tmp_path, monkeypatch, capsys):
    save(pruned, tmp_path / "pruned.pt")
    before = (tmp_path / "pruned.pt").read_bytes()
    argv = ["spp.py", "--ckpt", str(tmp_path / "pruned.pt"), "--adapter", "x", "--out", f"{tmp_path}/./pruned.pt"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit):
        cli(spp.main)
    assert "would be overwritten, and it is an input" in capsys.readouterr().err
    assert (tmp_path / "pruned.pt").read_bytes() == before


def test_a_method_that_is_none_is_refused_before_anything_changes(pruned):
    with pytest.raises(UserError, match="--method dora: expected one of spp, lora, masked, dynamic, masked_lora"):
        inject(pruned, method="dora")
    assert all(p.requires_grad for p in pruned.parameters())


def test_an_r_that_divides_no_layer_is_refused_before_anything_changes(pruned):
    with pytest.raises(
        UserError,
        match=r"--rank 5: does not divide the 32 outputs of layers.0.self_attn.q_proj.*4.*8.* divides those of all linears",
    ):
        inject(pruned, r=5)
    assert not any(isinstance(module, SPPLinear) for module in pruned.modules())


@pytest.fixture
def saved(pruned, tmp_path):
    """The pruned model's checkpoint, and a function that writes an adapter of it, whole or with some keys of the file
    changed (None: left out), and returns the path."""
    save(pruned, tmp_path / "pruned.pt")
    ckpt, _ = open_llama(tmp_path / "pruned.pt")

    def write(kind: str = "spp", **changes) -> Path:
        path = tmp_path / "adapter.pt"
        model = inject(copy.deepcopy(pruned), kind, r=4)
        write_adapter(path, adapter_state(model), ckpt.fingerprint(), kind, 4, 2.0)
        file = torch.load(path)
        if "adapter" in changes:  # factors: changed, or left out
            changes["adapter"] = without_none({**file["adapter"], **changes["adapter"]})
        torch.save(without_none({**file, **changes}), path)
        return path

    return ckpt, write


def without_none(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def test_an_adapter_file_is_read_as_it_was_written(pruned, saved):
    ckpt, write = saved
    file = read_adapter(write(), ckpt)
    assert file["version"] == VERSION and file["base"] == ckpt.fingerprint()
    assert (file["method"], file["r"], file["scale"], file["options"]) == ("spp", 4, 2.0, {})
    names = {f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj.alpha", "mlp.down_proj.beta")}
    assert names < file["adapter"].keys() and len(file["adapter"]) == 2 * 7 * 2


def test_an_adapter_goes_with_its_checkpoint_through_every_layout(saved, tmp_path):
    ckpt, write = saved
    path = write()
    for name, layout in (("hf", "hf"), ("meta", "meta")):
        write_checkpoint(ckpt, tmp_path / name, layout=layout)
        merged = merge_checkpoint(open_llama(tmp_path / name)[0], path)
        assert all(w.equal(merged[name]) for name, w in merge_checkpoint(ckpt, path).items())


ALPHA = "layers.1.mlp.up_proj.alpha"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"version": None}, "has no version, expected 2: its layout is another; make it again with this code"),
        ({"version": 0}, "has version 0, expected 2"),
        ({"version": True}, "has version True, expected 2"),
        ({"method": None}, "is not an adapter file of train.py"),
        ({"method": 3}, "its method is a int, expected a str"),
        ({"method": "dora"}, "its method is 'dora', expected one of spp, lora, masked"),
        ({"base": None}, "its base is a NoneType, expected a str"),
        ({"base": "another"}, "was trained on checkpoint another, not on .*pruned.pt"),
        ({"r": 4.0}, "its r is a float, expected a int"),
        ({"r": 5}, "--rank 5: does not divide the 32 outputs of layers.0.self_attn.q_proj"),
        ({"r": 0}, "its r is 0, its scale 2.0"),
        ({"method": "lora", "r": -1}, "its r is -1, its scale 2.0"),
        ({"method": "lora", "r": 2**62}, "its r is 4611686018427387904, its scale 2.0"),
        ({"r": 8}, r"alpha is torch.float32 of shape \[4, 32\], expected floats of shape \[8, 32\]"),
        ({"scale": 2}, "its scale is a int, expected a float"),
        ({"scale": 0.0}, "its r is 4, its scale 0.0"),
        ({"scale": math.inf}, "its r is 4, its scale inf"),
        ({"scale": math.nan}, "its r is 4, its scale nan"),
        ({"options": None}, "its options is a NoneType, expected a dict"),
        ({"options": {"dropout": 0.05}}, "its option 'dropout' is 0.05, which SPP does not have"),
        ({"options": {"zero_init": "both"}}, "its option 'zero_init' is 'both', which SPP does not have"),
        ({"options": {"beta": True}}, "its option 'beta' is True, which SPP does not have"),
        ({"options": {"beta": [1]}}, "its option 'beta' is .1., which SPP does not have"),
        ({"options": {"beta": torch.zeros(2)}}, "its option 'beta' is .*, which SPP does not have"),
        ({"adapter": {ALPHA: None}}, f"{ALPHA} is missing"),
        ({"adapter": {"layers.9.mlp.up_proj.beta": torch.zeros(96)}}, "layers.9.mlp.up_proj.beta is of no linear of"),
        ({"adapter": {"lm_head.alpha": torch.zeros(4, 32)}}, "lm_head.alpha is of no linear of .*pruned.pt"),
        ({"adapter": {3: torch.zeros(1)}}, "holds 3, which is no plain tensor"),
        ({"adapter": {ALPHA: 1.0}}, f"holds '{ALPHA}', which is no plain tensor"),
        ({"adapter": {ALPHA: torch.zeros(4, 31)}}, rf"{ALPHA} is torch.float32 of shape \[4, 31\], expected floats"),
        (
            {"adapter": {ALPHA: torch.zeros(4, 32).int()}},
            rf"{ALPHA} is torch.int32 of shape \[4, 32\], expected floats",
        ),
        ({"adapter": {ALPHA: torch.full((4, 32), math.nan)}}, f"{ALPHA} holds NaN or Inf"),
        ({"adapter": {ALPHA: torch.full((4, 32), -math.inf)}}, f"{ALPHA} holds NaN or Inf"),
        ({"adapter": {ALPHA: torch.zeros(4, 32).to_sparse()}}, f"holds '{ALPHA}', which is no plain tensor"),
        ({"adapter": {ALPHA: torch.zeros(4, 32, device="meta")}}, f"holds '{ALPHA}', which is no plain tensor"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused_in_one_line(saved, changes, words):
    ckpt, write = saved
    path = write(**changes)
    with pytest.raises(UserError, match=words) as e:
        read_adapter(path, ckpt)
    assert "\n" not in str(e.value) and (str(e.value).startswith(f"{path}: ") or "--rank" in words)


def test_a_file_that_is_no_adapter_of_the_checkpoint_is_refused(saved, tmp_path):
    ckpt, _ = saved
    for i, content in enumerate(({"weights": 1}, [1], {"adapter": {}})):
        torch.save(content, tmp_path / f"{i}.pt")
        with pytest.raises(UserError, match=rf"{i}.pt: is not an adapter file of train.py"):
            merge_checkpoint(ckpt, tmp_path / f"{i}.pt")
    with pytest.raises(UserError, match="none.pt: cannot be read"):
        merge_checkpoint(ckpt, tmp_path / "none.pt")


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_any_method_that_lacks_a_factor_is_refused(saved, method):
    ckpt, write = saved
    factor = (METHODS[method].factors or ("weight",))[0]
    name = f"layers.0.self_attn.k_proj.{factor}"
    assert len(merge_checkpoint(ckpt, write(method))) == len(ckpt)
    with pytest.raises(UserError, match=f"adapter.pt: {name} is missing"):
        merge_checkpoint(ckpt, write(method, adapter={name: None}))


def test_factors_that_are_finite_and_overflow_are_named_with_their_file(saved):
    ckpt, write = saved
    huge = {ALPHA: torch.full((4, 32), 1e30), ALPHA.replace("alpha", "beta"): torch.full((64,), 1e30)}
    merged = merge_checkpoint(ckpt, write(adapter=huge))
    with pytest.raises(UserError, match="adapter.pt: model.layers.1.mlp.up_proj.weight: the merged weight holds"):
        merged["model.layers.1.mlp.up_proj.weight"]


def test_dense_is_refused_for_what_is_sparse_anyway(saved):
    ckpt, write = saved
    with pytest.raises(UserError, match="--dense: means nothing to an adapter of --method spp"):
        merge_checkpoint(ckpt, write(), masked=False)


@pytest.mark.parametrize(
    "method, masked, step",
    [
        ("spp", True, {"method": "spp", "r": 4, "scale": 1.5}),
        ("masked", True, {"method": "masked"}),
        ("lora", True, {"method": "lora*", "r": 4, "scale": 1.5}),
        ("lora", False, {"method": "lora (dense)", "r": 4, "scale": 1.5}),
    ],
)
def test_what_was_merged_is_added_to_the_history(pruned, tmp_path, method, masked, step):
    pruned.history = [{"method": "wanda", "sparsity": "2:4"}]
    save(pruned, tmp_path / "pruned.pt")
    ckpt, _ = open_llama(tmp_path / "pruned.pt")
    inject(pruned, method, r=4, scale=1.5)
    base = ckpt.fingerprint()
    write_adapter(tmp_path / "adapter.pt", adapter_state(pruned), base, method, 4, 1.5)
    merged = merge_checkpoint(ckpt, tmp_path / "adapter.pt", masked)
    assert merged.history == [*ckpt.history, {**step, "base": base}]
    assert merge(pruned, masked).history == [*ckpt.history, step]


def test_the_command_merges_and_says_what_it_wrote(saved, tmp_path, monkeypatch, capsys):
    ckpt, write = saved
    argv = ["--ckpt", ckpt.path, "--adapter", write(), "--out", tmp_path / "merged"]
    monkeypatch.setattr("sys.argv", ["spp.py", *map(str, argv)])
    cli(spp.main)
    assert capsys.readouterr().out == f"wrote {tmp_path / 'merged'}\n"
    merged = open_llama(tmp_path / "merged")[0]
    assert all(w.equal(merged[name]) for name, w in merge_checkpoint(ckpt, tmp_path / "adapter.pt").items())
    assert merged.history[-1]["method"] == "spp"


def test_an_adapter_that_does_not_fit_the_model_is_refused(pruned):
    state = {name: p.clone() for name, p in adapter_state(inject(copy.deepcopy(pruned), r=8)).items()}
    inject(pruned, r=4)
    with pytest.raises(UserError, match=r"does not fit the model at layers.0.self_attn.q_proj.alpha"):
        load_adapter(pruned, state)
    del state["layers.1.mlp.up_proj.beta"]
    with pytest.raises(UserError, match=r"does not fit the model at layers.1.mlp.up_proj.beta \(15 such\)"):
        load_adapter(pruned, state)


def test_masked_weights_that_fill_a_zero_are_caught_when_they_are_merged(pruned, saved):
    """No user can come here: train.py's masked weights keep their zeros. A bug could, and must not be written."""
    ckpt, write = saved
    name = "layers.0.mlp.up_proj.weight"
    sparse = pruned.model.layers[0].mlp.up_proj.weight.detach()
    merged = merge_checkpoint(ckpt, write("masked", adapter={name: 2 * sparse}))
    assert merged[f"model.{name}"].equal(2 * sparse)
    merged = merge_checkpoint(ckpt, write("masked", adapter={name: torch.ones_like(sparse)}))
    with pytest.raises(AssertionError, match=f"model.{name}: a pruned weight came back"):
        merged[f"model.{name}"]


# ----------------------------------------------------------------------------------------------------------------------
# evaluation mode


@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("method, options", [*((method, {}) for method in METHODS), ("spp", {"matmul": "repeat"})])
def test_in_evaluation_mode_a_model_is_the_one_that_merging_writes(pruned, method, options, stored):
    """Bit for bit, computed in float32, whatever dtype the merged weight is rounded to."""
    tokens = torch.randint(0, 256, (2, 9))
    stir(inject(pruned, method, r=4, **options))
    for layer in pruned.modules():
        if isinstance(layer, spp.AdapterLinear):
            layer.merged_dtype = stored
        if isinstance(layer, DynamicLinear):
            layer.mask = layer.weight.abs() > layer.weight.abs().median()
    logits = pruned.eval()(tokens)
    assert not logits.requires_grad  # nothing learns by mistake from a rounded weight
    learning = pruned.train()(tokens)
    assert learning.requires_grad
    assert merge(pruned).float()(tokens).equal(logits)
    if stored == torch.float32 and method != "lora":
        torch.testing.assert_close(learning, logits, atol=1e-5, rtol=1e-5)


def test_looking_in_evaluation_mode_changes_no_weight(pruned):
    stir(inject(pruned, "lora", r=4))
    before = {name: w.clone() for name, w in pruned.state_dict().items()}
    pruned.eval()(torch.randint(0, 256, (2, 9)))
    assert all(w.equal(before[name]) for name, w in pruned.train().state_dict().items())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_layer_that_is_edited_trains_on_the_weight_that_it_says(dtype, monkeypatch):
    layer, x = spp_layer(64, 48, 16, dtype=dtype), torch.randn(5, 48, dtype=dtype)
    monkeypatch.setattr(SPPLinear, "effective_weight", lambda self, W, alpha, beta: 3 * W)
    assert layer(x).equal(layer.eval()(x)) and layer(x).equal(F.linear(x, 3 * layer.weight))


@pytest.mark.parametrize("base", [SPPLinear, MaskedLinear, DynamicLinear, MaskedLoRALinear])
def test_a_subclass_trains_on_the_weight_that_it_says(base):
    """Packed too: nothing goes around `effective_weight` and `factor_gradients`."""

    class Twice(base):
        def effective_weight(self, W, *factors):
            return 2 * super().effective_weight(W, *factors)

        def factor_gradients(self, G, W, *factors):
            return super().factor_gradients(2 * G, W, *factors)

    x = torch.randn(3, 16)
    for packed in (False, True):
        found = []
        for kind in (base, Twice):
            torch.manual_seed(0)
            layer = kind(sparse_linear(8, 16, density=0.25), r=2)
            assert not packed or layer.pack(layer.weight.detach())
            y = layer(x)
            y.backward(torch.ones_like(y))
            found.append([y.detach(), *(p.grad for p in layer.parameters() if p.requires_grad)])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(2 * one, two)


def test_a_merge_without_the_mask_still_asserts_the_zeros_of_what_is_sparse_anyway(pruned, monkeypatch):
    inject(pruned, "spp", r=4)
    monkeypatch.setattr(SPPLinear, "effective_weight", lambda self, W, alpha, beta: torch.ones_like(W))
    with pytest.raises(AssertionError, match="a pruned weight came back"):
        merge(pruned, masked=False)


# ----------------------------------------------------------------------------------------------------------------------
# survivors and bits


def n_of_m(W, n, m):
    groups = W.view(-1, m)
    return groups.scatter(1, groups.abs().topk(m - n, largest=False).indices, 0).view_as(W)


def unstructured(W, sparsity):
    return W.masked_fill(torch.rand_like(W, dtype=torch.float32) < sparsity, 0)


PATTERNS = {
    "2:4": lambda W: n_of_m(W, 2, 4),
    "2:8": lambda W: n_of_m(W, 2, 8),
    "4:8": lambda W: n_of_m(W, 4, 8),
    "0.5": lambda W: unstructured(W, 0.5),
    "0.75": lambda W: unstructured(W, 0.75),
    "0.9": lambda W: unstructured(W, 0.9),
    "no zero": lambda W: W,
    "zeros": torch.zeros_like,
    "45 columns": lambda W: unstructured(W[:, :45].contiguous(), 0.6),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_packed_weight_comes_back_bit_for_bit(pattern, dtype):
    W = PATTERNS[pattern](torch.randn(24, 48, dtype=dtype))
    values, bits = pack(W)
    assert len(values) == W.count_nonzero() and bits.shape == (24, math.ceil(W.shape[1] / 8))
    for function in (unpack, unpack_by_places):  # on a CPU, and what is compiled on a GPU
        assert function(values, bits, W.shape[1]).equal(W)
    assert packed_size(W, len(values)) == values.nbytes + bits.nbytes
    assert pack(-W * (W == 0))[0].numel() == 0  # negative zeros are zeros


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("method", ("spp", "lora", "masked", "masked_lora"))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_packed_layer_is_the_dense_one_bit_for_bit_and_saves_nothing(pattern, method, dtype):
    W = PATTERNS[pattern](torch.randn(24, 48, dtype=dtype))
    dense = METHODS[method](spp.as_linear(W), r=4)
    for name in dense.factors:
        nn.init.uniform_(getattr(dense, name), -0.5, 0.5)
    packed = copy.deepcopy(dense)
    assert packed.pack(packed.weight.detach()) == (pattern != "no zero")
    x = torch.randn(2, 5, W.shape[1], dtype=dtype, requires_grad=True)
    got = []
    for layer in (dense, packed):
        y = checkpoint(layer, x, use_reentrant=False)  # as --activation_checkpointing runs it
        learning = [p for p in layer.parameters() if p.requires_grad]
        got.append([layer(x), y, *torch.autograd.grad(y.square().sum(), [x, *learning], materialize_grads=True)])
    if method == "masked" and pattern != "no zero":
        got[0][-1] = got[0][-1][W != 0]
        assert packed.weight.numel() == W.count_nonzero()  # the optimizer's moments too have as many numbers
    assert all(a.equal(b) for a, b in zip(*got, strict=True))
    assert packed.merged().equal(dense.merged()) and packed.eval()(x).equal(dense.eval()(x))
    if method != "lora":  # which keeps x's product with A, packed or not
        assert saved_bytes(packed.train(), x) == 0


LONG_RUN = ("--epochs", 4, "--save_interval", 3, "--eval_interval", 5)


@pytest.mark.parametrize("method", ("spp", "lora", "masked_lora", "masked"))
def test_packed_training_gives_the_dense_losses_and_adapters(world, tmp_path, method):  # noqa: F811
    flags = ("--method", method, "--epochs", 1)
    (dense, log), (packed, packed_log) = (
        finished(world, tmp_path / name, *flags, *more) for name, more in (("dense", ()), ("packed", ["--packed"]))
    )
    assert packed_log == log if method != "masked" else len(packed_log) == len(log)
    before = open_checkpoint(world / "pruned.pt")
    for name, w in packed.items():
        if w.dim() == 1 and method == "masked":
            torch.testing.assert_close(w, dense[name][before[f"model.{name}"] != 0], rtol=0, atol=1e-6)
        else:
            assert w.equal(dense[name]), name
    merged = [open_checkpoint(tmp_path / name / "merged.pt") for name in ("dense", "packed")]
    for name, w in merged[0].items():
        torch.testing.assert_close(merged[1][name], w, rtol=0, atol=1e-6 if method == "masked" else 0, msg=name)
        assert not w[before[name] == 0].any()


def test_a_packed_run_resumes_bit_for_bit_and_two_processes_give_the_same(world, tmp_path):  # noqa: F811
    for method in ("spp", "masked"):
        flags = ("--method", method, "--packed", *LONG_RUN)
        adapter, log = finished(world, tmp_path / method, *flags)
        job = start(world, tmp_path / "killed" / method, *flags)
        wait_for(tmp_path / "killed" / method / "log.jsonl", '"step": 7,', job.running)
        job.kill()
        job.wait()
        again, log_again = finished(world, tmp_path / "killed" / method, *flags, "--resume")
        assert difference(again, adapter) == 0 and log_again == log
        both, _ = finished(world, tmp_path / "two" / method, *flags, processes=2)
        assert difference(both, adapter) < 1e-4


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--fsdp",), "--fsdp, which cuts a weight by rows, and rows have different numbers of survivors"),
        (("--method", "dynamic", "--sparsity", "2:4"), "--method dynamic, which lets zeros learn"),
        (("--matmul", "chunked"), "--matmul chunked, which keeps the dense weight for the backward pass"),
        (("--method", "masked", "--compile"), "--compile, which may keep the dense weights"),
    ],
)
def test_what_packing_does_not_go_with_is_refused(flags, words):
    args = train.make_parser().parse_args(["--ckpt", "pruned.pt", "--packed", "--device", "cpu", *flags])
    with pytest.raises(UserError, match=f"--packed: does not go with {words}"):
        train.check_settings(args)


def test_a_model_without_zeros_is_said_and_held_dense_and_nan_ends_in_one_line(world, tmp_path):  # noqa: F811
    save(Llama(PRESETS["test"]), tmp_path / "dense.pt")
    job = start(world, tmp_path / "run", "--ckpt", tmp_path / "dense.pt", "--packed", "--epochs", 1)
    assert job.wait() == [0], job.text
    assert f"note: --packed: {tmp_path / 'dense.pt'} has too few zeros for it to save memory" in job.text
    model = load(world / "pruned.pt")[0]
    W = model.model.layers[1].mlp.up_proj.weight.data
    W[tuple(W.nonzero()[0])] = math.nan
    save(model, tmp_path / "nan.pt")
    line = error(start(world, tmp_path / "nan", "--ckpt", tmp_path / "nan.pt", "--packed"))
    assert "nan.pt: model.layers.1.mlp.up_proj.weight holds NaN or Inf (1 such tensors)" in line
