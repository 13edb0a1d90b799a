"""What the chapter can't show: random settings, closures, saved state, and schedules at their edges."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbook.corpora import BookError
from llmbook.optimizers import SGD, SHAPES, Adam, AdamW, Momentum, RMSprop, decay_groups, schedule

torch_optim = torch.optim


def trained(make, seed, steps=20):
    "Parameters after a few steps on random gradients."
    draw = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(3, 2, generator=draw, dtype=torch.float64)) for _ in range(2)]
    opt = make(params)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        opt.step()
    return params


@settings(max_examples=25, deadline=None)
@given(lr=st.floats(1e-5, 0.5), decay=st.floats(0, 1), momentum=st.floats(0, 0.99), nesterov=st.booleans(), seed=st.integers(0, 99))
def test_momentum_equals_torch_for_any_settings(lr, decay, momentum, nesterov, seed):
    nesterov = nesterov and momentum > 0  # torch refuses Nesterov without momentum
    same = dict(lr=lr, weight_decay=decay, momentum=momentum, nesterov=nesterov)
    for ours, theirs in zip(trained(lambda p: Momentum(p, **same), seed), trained(lambda p: torch_optim.SGD(p, **same), seed)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(lr=st.floats(1e-5, 0.5), decay=st.floats(0, 1), beta1=st.floats(0, 0.99), beta2=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_adam_and_adamw_equal_torch_for_any_settings(lr, decay, beta1, beta2, seed):
    same = dict(lr=lr, weight_decay=decay, betas=(beta1, beta2))
    for mine, reference in ((Adam, torch_optim.Adam), (AdamW, torch_optim.AdamW)):
        for ours, theirs in zip(trained(lambda p: mine(p, **same), seed), trained(lambda p: reference(p, **same), seed)):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [SGD, Momentum, RMSprop, Adam, AdamW])
def test_saved_state_continues_exactly(make):
    def run(interrupt):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5))
        opt = make([p], lr=0.05)
        for s in range(10):
            if interrupt and s == 5:
                state = opt.state_dict()
                opt = make([p], lr=0.05)
                opt.load_state_dict(state)
            opt.zero_grad()
            p.pow(2).sum().backward()
            opt.step()
        return p.detach()
    assert torch.equal(run(True), run(False))


def test_a_closure_is_called_and_its_loss_returned():
    p = nn.Parameter(torch.tensor(2.0))
    opt = SGD([p], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = p ** 2
        loss.backward()
        return loss
    assert opt.step(closure).item() == 4.0 and p.item() == pytest.approx(1.6)


def test_parameters_without_gradient_stay():
    moved, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = AdamW([moved, frozen], lr=0.1, weight_decay=0.5)
    moved.sum().backward()
    opt.step()
    assert torch.equal(frozen, torch.ones(2)) and not torch.equal(moved, torch.ones(2))


def test_decay_groups_cover_each_trainable_parameter_once():
    net = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 4, bias=True))
    net[2].weight = net[0].weight  # tied
    net[1].bias.requires_grad_(False)
    groups = decay_groups(net, 0.1)
    assert [len(g["params"]) for g in groups] == [1, 2] and [g["weight_decay"] for g in groups] == [0.1, 0.0]
    AdamW(groups)


@pytest.mark.parametrize("make, wrong", [(SGD, {"lr": -1}), (SGD, {"momentum": 0.9}), (Adam, {"betas": (0.9, 1.0)}),
                                         (AdamW, {"weight_decay": float("nan")}), (Momentum, {"momentum": 1.5})])
def test_bad_settings_are_refused(make, wrong):
    with pytest.raises(BookError, match=next(iter(wrong))):
        make([nn.Parameter(torch.ones(1))], **wrong)
    if "lr" in wrong:
        with pytest.raises(BookError, match="lr"):
            make([{"params": [nn.Parameter(torch.ones(1))], **wrong}])


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(list(SHAPES)), steps=st.integers(1, 300), share=st.floats(0, 0.99), peak=st.floats(0, 10),
       bottom=st.floats(0, 1))
def test_a_schedule_rises_to_its_peak_and_never_rises_again(name, steps, share, peak, bottom):
    warmup, floor = int(share * steps), bottom * peak
    rate = schedule(name, peak=peak, steps=steps, warmup=warmup, floor=floor)
    rates = [rate(s) for s in range(steps + 5)]
    assert rates[warmup] == pytest.approx(peak) and all(0 <= r <= peak * (1 + 1e-9) for r in rates)
    assert all(a <= b for a, b in zip(rates[:warmup], rates[1:warmup + 1]))
    assert all(b <= a + 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1:]))
    assert len(set(rates[steps:])) == 1 and min(rates[warmup:]) >= floor - 1e-12
    if name in ("linear", "cosine", "wsd"):
        assert rates[steps] == pytest.approx(floor, abs=1e-12)


@pytest.mark.parametrize("wrong, says", [
    (dict(name="cosin"), "did you mean 'cosine'"), (dict(name="xyz"), "choose one of"), (dict(warmup=10), "warm-up of 10"),
    (dict(warmup=-1), "warm-up"), (dict(steps=0), "at least 1 step"), (dict(peak=-1.0), "peak=-1.0"),
    (dict(floor=2.0), "floor=2.0"), (dict(peak=float("nan")), "peak"), (dict(gamma=0.5), "no option 'gamma'"),
    (dict(name="step", every=0), "every=0"), (dict(name="wsd", tail="round"), "tail"),
])
def test_bad_schedules_are_refused_in_one_sentence(wrong, says):
    with pytest.raises(BookError, match=says) as e:
        schedule(**(dict(name="cosine", peak=1.0, steps=10) | wrong))
    assert "\n" not in str(e.value)


def test_a_reader_can_add_a_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "inverse_sqrt", lambda t, n, k=100: (1 + t / k) ** -0.5)
    assert schedule("inverse_sqrt", peak=1.0, steps=10, k=3)(9) == pytest.approx(0.5)
