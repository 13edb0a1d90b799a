"""What the chapter can't show: norms of any shape, gradients against brute force for every switch, input that makes no sense."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.corpora import BookError
from llmbook.residuals import Norm, Stack, StackConfig, StackLM, gradient_by_depth, layer_norm, rms_norm, scale_by_depth

SHAPES = st.lists(st.integers(1, 5), max_size=3).flatmap(lambda lead: st.integers(1, 33).map(lambda C: (*lead, C)))
SWITCHES = [dict(norm=n, residual=r, kind=k, scaled=s) for n in ("pre", "post", "none") for r in (True, False) for k in ("layernorm", "rmsnorm") for s in (False, True)]


def sentence(call) -> str:
    with pytest.raises(BookError) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) > 30 and str(e.value).endswith(".") and ": " in str(e.value)
    return str(e.value)


def stack(depth=3, seed=0, **switches) -> Stack:
    torch.manual_seed(seed)
    return Stack(StackConfig(depth, n_embd=8, n_head=2, **switches)).double()


def batch(seed=1, B=2, T=5, C=8) -> torch.Tensor:
    return torch.randn(B, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def results(norm, *inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = norm(*inputs)
    return [out, *torch.autograd.grad((out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum(), inputs)]


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([1e-12, 1e-5, 1e-2]), st.sampled_from([1e-3, 1.0, 1e3]), st.integers(0, 999))
def test_norms_are_those_of_torch(shape, eps, size, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = size * torch.randn(shape, dtype=torch.float64, generator=g), *torch.randn(2, shape[-1], dtype=torch.float64, generator=g)
    if shape[-1] == 1: eps = 1e-2    # one component: LayerNorm divides 0 by √ε, and rounding is as large as the result
    # fp64; a gradient is a difference of terms of the size |weight|/√(variance + ε), rounded to 1e-16 of it
    room = 1e-11 * max(1, float((x.var(-1, correction=0) + eps).rsqrt().max()))
    torch.testing.assert_close(results(lambda x, w, b: layer_norm(x, w, b, eps), x, weight, bias), results(lambda x, w, b: F.layer_norm(x, shape[-1:], w, b, eps), x, weight, bias), rtol=1e-9, atol=room)
    room = 1e-11 * max(1, float((x.square().mean(-1) + eps).rsqrt().max()))
    torch.testing.assert_close(results(lambda x, w: rms_norm(x, w, eps), x, weight), results(lambda x, w: F.rms_norm(x, shape[-1:], w, eps), x, weight), rtol=1e-9, atol=room)


@pytest.mark.parametrize("dtype, room", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_norms_in_lower_precision_keep_the_type(dtype, room):
    x, ones = batch().to(dtype), torch.ones(8, dtype=dtype)
    for ours, exact in ((layer_norm(x, ones, 0 * ones), layer_norm(x.double(), ones.double(), 0 * ones.double())), (rms_norm(x, ones), rms_norm(x.double(), ones.double()))):
        assert ours.dtype == dtype
        assert ((ours - exact).abs().max() / exact.abs().max()) < room    # a few roundings of 2^-24 or 2^-9


def test_a_vector_of_zeros_stays_finite():
    x = torch.zeros(2, 8, dtype=torch.float64)
    ones = torch.ones(8, dtype=torch.float64)
    for out in (*results(lambda x: layer_norm(x, ones, 0 * ones), x), *results(lambda x: rms_norm(x, ones), x)): assert out.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 99))
def test_size_cancels_forward_and_divides_backward(factor, seed):
    x, ones = batch(seed), torch.ones(8, dtype=torch.float64)
    for norm in (lambda x: rms_norm(x, ones, 1e-16), lambda x: layer_norm(x, ones, 0 * ones, 1e-16)):
        (a, da), (b, db) = results(norm, x), results(norm, factor * x)
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)              # ε is 1e-16 beside variances of 1e-6 and more
        torch.testing.assert_close(da, factor * db, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(map(str, s.values())))
def test_gradients_are_those_of_brute_force(switches):
    model, x = stack(**switches), batch()
    up = batch(2)
    states = [s.detach() for s in model.states(x)]
    expected = []
    for l, s in enumerate(states):      # every layer's input on its own, and every number of the output on its own
        def above(s):
            for layer in model.layers[l:]: s = layer(s)
            return model.final(s)
        jacobian = torch.autograd.functional.jacobian(above, s, vectorize=True).flatten(0, 2).flatten(1)     # (BTC, BTC)
        expected.append((up.flatten() / up.norm() @ jacobian).norm())
    torch.testing.assert_close(gradient_by_depth(model, x, up), torch.stack(expected), rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(scale_by_depth(model, x), torch.stack([s.square().mean().sqrt() for s in states]))


def test_what_is_measured_leaves_no_trace():
    model, x = stack(), batch().requires_grad_()
    before = [p.clone() for p in model.parameters()]
    gradient_by_depth(model, x)
    scale_by_depth(model, x)
    assert x.grad is None and all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before))
    with torch.no_grad(): assert torch.equal(gradient_by_depth(model, x), gradient_by_depth(model, x)), "seeded, and also where gradients are switched off"


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(1, 5))
def test_only_the_direction_of_the_gradient_counts(factor, depth):
    model, x, up = stack(depth), batch(), batch(3)
    one = gradient_by_depth(model, x, up)
    assert len(one) == depth + 1
    torch.testing.assert_close(gradient_by_depth(model, x, factor * up), one)


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_scaled_shrinks_what_writes_into_the_stream_and_nothing_else(depth):
    plain, scaled = stack(depth), stack(depth, scaled=True)
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters()):
        torch.testing.assert_close(b, a / (2 * depth) ** 0.5 if name.endswith("o_proj.weight") else a)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_scaling_makes_the_size_forget_the_depth(norm):
    sizes = {s: [scale_by_depth(Stack(StackConfig(L, norm=norm, scaled=s)).double(), batch(C=32))[-1].item() for L in (4, 24)] for s in (False, True)}
    assert max(sizes[True]) < 1.6 and max(sizes[True]) / min(sizes[True]) < 1.4
    if norm != "post": assert sizes[False][1] > 1.8 * sizes[False][0]


def test_without_residual_a_zero_branch_stops_everything_and_with_it_nothing():
    for residual, expected in ((True, torch.ones(4)), (False, torch.tensor([0., 0., 0., 1.]))):
        model = stack(norm="none", residual=residual)
        for name, p in model.named_parameters():
            if "o_proj" in name: torch.nn.init.zeros_(p)
        torch.testing.assert_close(gradient_by_depth(model, batch()), expected.double())


def test_the_language_model_sees_the_past_only():
    torch.manual_seed(0)
    model, ids = StackLM(StackConfig(2, n_embd=8, n_head=2), 11, 6), torch.randint(11, (2, 6))
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % 11
    a, b = model(ids), model(changed)
    assert a.shape == (2, 6, 11)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert ((a - b)[:, 4:].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("fault, names", [
    (dict(n_layer=0), "n_layer=0"), (dict(n_layer=True), "n_layer=True"), (dict(n_layer=2.0), "n_layer=2.0"), (dict(n_embd=-8), "n_embd=-8"), (dict(n_head="4"), "n_head='4'"), (dict(n_head=3), "heads must divide"),
    (dict(norm="sandwich"), "pre or post or none"), (dict(kind="batchnorm"), "layernorm or rmsnorm"), (dict(residual="no"), "residual='no'"), (dict(scaled=1), "scaled=1")])
def test_a_bad_shape_is_refused(fault, names):
    assert names in sentence(lambda: StackConfig(**{"n_layer": 2, **fault}))


@pytest.mark.parametrize("x, names", [(torch.zeros(5, 8), "(5, 8)"), (torch.zeros(2, 5, 9), "(2, 5, 9)"), (torch.zeros(0, 5, 8), "(0, 5, 8)"), (torch.zeros(2, 5, 8), "float32"), (torch.zeros(2, 5, 8, dtype=torch.long), "int64")])
def test_a_bad_batch_is_refused(x, names):
    for call in (lambda: stack()(x), lambda: scale_by_depth(stack(), x), lambda: gradient_by_depth(stack(), x)): assert names in sentence(call)


@pytest.mark.parametrize("up, names", [(torch.ones(2, 5, 7), "(2, 5, 7)"), (torch.zeros(2, 5, 8), "length 0"), (torch.full((2, 5, 8), float("nan")), "length nan"), (torch.full((2, 5, 8), float("inf")), "length inf")])
def test_a_bad_gradient_is_refused(up, names):
    assert names in sentence(lambda: gradient_by_depth(stack(), batch(), up))


@pytest.mark.parametrize("call, names", [
    (lambda: rms_norm(torch.tensor(1.), torch.ones(1)), "()"), (lambda: rms_norm(torch.ones(2, 0), torch.ones(0)), "(2, 0)"), (lambda: layer_norm(torch.ones(4, dtype=torch.long), torch.ones(4), torch.ones(4)), "int64"),
    (lambda: rms_norm(torch.ones(4), torch.ones(4), 0), "eps=0"), (lambda: layer_norm(torch.ones(4), torch.ones(4), torch.ones(4), float("nan")), "eps=nan"),
    (lambda: layer_norm(torch.ones(2, 4), torch.ones(3), torch.ones(4)), "weight has the shape (3,)"), (lambda: layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(1)), "bias has the shape (1,)"),
    (lambda: Norm(StackConfig(1))(torch.ones(2, 4)), "weight has the shape (32,)")])
def test_a_norm_refuses_what_it_cannot_use(call, names):
    assert names in sentence(call)


@pytest.mark.parametrize("call, names", [
    (lambda: StackLM(StackConfig(1), 0, 4), "vocab_size=0"), (lambda: StackLM(StackConfig(1), 9, 2.5), "context=2.5"), (lambda: StackLM(StackConfig(1), 9, 4)(torch.zeros(1, 5, dtype=torch.long)), "(1, 5)"),
    (lambda: StackLM(StackConfig(1), 9, 4)(torch.zeros(4, dtype=torch.long)), "(4,)"), (lambda: StackLM(StackConfig(1), 9, 4)(torch.zeros(0, 3, dtype=torch.long)), "(0, 3)"),
    (lambda: StackLM(StackConfig(1), 9, 4)(torch.tensor([[9]])), "0…8"), (lambda: StackLM(StackConfig(1), 9, 4)(torch.tensor([[-1]])), "0…8"), (lambda: StackLM(StackConfig(1), 9, 4)(torch.ones(1, 2)), "float32")])
def test_the_language_model_refuses_what_it_cannot_use(call, names):
    assert names in sentence(call)
