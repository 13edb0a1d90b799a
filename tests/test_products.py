"""What the chapter on products doesn't show: odd layouts, other processors, tracing, and a layer inside a model."""

import copy

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from llmbook import products
from llmbook.gpt import GPT, GPTConfig
from llmbook.products import Linear, as_torch, direct_linear, linear, maker, passes_by

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


@onednn
def test_operation_keeps_to_torchs_rules():
    "Schema, shapes under tracing and gradients, as torch checks them."
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((3, 5, 8), (6, 8), (6,)))
    for bias in (b, None): opcheck(torch.ops.llmbook.direct_linear.default, (x, w, bias), test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"))


@onednn
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1, -1)], ids=["whole", "turned", "gaps", "repeated"])
def test_layouts(change):
    "Rows in any order in memory give what torch's product gives, gradients too."
    base = torch.randn(4, 6, 32)
    found = []
    for product in (direct_linear, nn.functional.linear):
        x, w, b = (t.clone().requires_grad_(True) for t in (base, torch.arange(96.0).view(3, 32).sin(), torch.ones(3)))
        y = product(change(x), w, b)
        y.sum().backward()
        found.append((y.detach(), x.grad, w.grad, b.grad))
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@onednn
def test_second_gradients():
    "The gradient of the gradient, which some penalties ask for."
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    twice = []
    for product in (direct_linear, nn.functional.linear):
        to_x, = torch.autograd.grad(product(x, w, None).pow(3).sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(to_x.square().sum(), w)[0])
    torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-3)


@onednn
@pytest.mark.parametrize("bias", [None, torch.ones(3)], ids=["without a bias", "with one"])
def test_operations_are_counted(bias):
    "torch's counter finds the same by either library: forward, and both gradients."
    x, w, counts = torch.randn(2, 5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True), []
    for product in (direct_linear, nn.functional.linear):
        with FlopCounterMode(display=False) as counter: product(x, w, bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 10 * 8 * 3] * 2


@onednn
def test_keeps_what_gradients_need():
    "A frozen matrix keeps itself and not its input, a first layer its input alone, as torch's product does."
    for x_learns, w_learns in ((True, True), (True, False), (False, True), (False, False)):
        x, w, kept = torch.randn(10, 8, requires_grad=x_learns), torch.randn(3, 8, requires_grad=w_learns), []
        for product in (direct_linear, nn.functional.linear):
            seen = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.numel()) or t, lambda t: t): product(x, w)
            kept.append(sum(seen))
        assert kept[0] == kept[1] == 80 * w_learns + 24 * x_learns


@onednn
def test_rule_on_and_off(monkeypatch):
    "With the rule on, large products in fp32 go to oneDNN on any processor, and nothing else does; an error inside `as_torch` leaves the rule as it was."
    seen = []
    monkeypatch.setattr(products, "direct_linear", lambda *parts: seen.append(tuple(parts[0].shape)) or direct_linear(*parts))
    monkeypatch.setitem(products._rule, "direct", True)
    x, w = torch.randn(64, 512), torch.randn(512, 512)
    linear(x, w)
    assert seen == [(64, 512)]
    linear(x[:1], w), linear(x[:8], w), linear(x.double(), w.double()), linear(x.bfloat16(), w.bfloat16())
    class Spread(torch.Tensor): "A tensor of another library's kind."
    linear(x, w.as_subclass(Spread)), linear(x.as_subclass(Spread), w)
    with torch.autocast("cpu", torch.bfloat16): linear(x, w)
    with as_torch(), as_torch(): linear(x, w)
    with pytest.raises(ZeroDivisionError), as_torch(): 1 / 0
    assert len(seen) == 1
    linear(x, w)
    assert len(seen) == 2
    monkeypatch.setitem(products._rule, "direct", False)
    assert torch.equal(linear(x, w), nn.functional.linear(x, w)) and len(seen) == 2


def test_rule_needs_all(monkeypatch):
    "Another maker, older instructions or another library, and torch's own product stays."
    assert isinstance(maker(), str)
    for mkl, onednn_, capability, made, want in [(True, True, "AVX512", "AuthenticAMD", True), (True, True, "AVX512", "GenuineIntel", False), (True, True, "AVX2", "AuthenticAMD", False), (False, True, "AVX512", "AuthenticAMD", False), (True, False, "AVX512", "AuthenticAMD", False)]:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn_)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(products, "maker", lambda: made)
        assert passes_by() is want


@onednn
def test_a_model_learns_the_same(monkeypatch):
    "A step of a decoder by either library: losses and gradients agree within fp32's rounding, and what is saved is torch's own layer to others."
    torch.manual_seed(0)
    model = GPT(GPTConfig.llama(vocab_size=512, context=64, n_layer=2, n_head=4, n_embd=256))
    assert all(isinstance(m, nn.Linear) for m in model.modules() if isinstance(m, Linear)) and sum(isinstance(m, Linear) for m in model.modules()) == 14
    ids, found = torch.randint(512, (8, 65)), []
    for direct in (True, False):
        monkeypatch.setitem(products._rule, "direct", direct)
        twin = copy.deepcopy(model)
        loss = twin.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in twin.parameters())])
    assert not all(torch.equal(a, b) for a, b in zip(*found)), "both went one way"
    assert max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found)) < 1e-4


@onednn
@pytest.mark.slow
def test_compiled(monkeypatch):
    "The compiler takes the operation as it is."
    monkeypatch.setitem(products._rule, "direct", True)
    layer, x = nn.Sequential(Linear(512, 512), nn.GELU(), Linear(512, 512)), torch.randn(64, 512)
    plain, fast = layer(x), torch.compile(layer)(x)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
