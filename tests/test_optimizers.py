"""What the chapter can't show: random settings, closures, saved state, and schedules at their edges."""
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from llmbook.corpora import BookError
from llmbook.optimizers import SGD, SHAPES, Adam, AdamW, Momentum, RMSprop, decay_groups, find_learning_rate, schedule

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
@example("wsd", 81, 0.0, 1.0, 0.0)
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


class Ticks:
    "A position in some data that counts batches, as a sampler does."
    def __init__(self): self.at = 0
    def state_dict(self): return {"at": self.at}
    def load_state_dict(self, state): self.at = state["at"]


def everything(model, optimizer, ticks, draw):
    "All that a trial could have moved, as one comparable list."
    tensors = [t.clone() for t in [*model.parameters(), *model.buffers()]]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    memory = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state.get(p, {}).items() if v is not None} for p in model.parameters()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    states = torch.get_rng_state(), draw.get_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    return tensors, grads, memory, groups, states, np.random.get_state()[2:], random.getstate(), ticks.at


def equal(a, b):
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def noisy(make, warm):
    "A model with dropout, batch statistics and a padding row, trained for `warm` steps, and a function that draws batches in every way."
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    optimizer, ticks, draw = make(model), Ticks(), torch.Generator().manual_seed(1)

    def loss():
        ticks.at += 1
        x = torch.randn(32, 6, generator=draw) + 0.01 * random.random() + 0.01 * np.random.rand()
        value = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long() + (x[:, 1] > 1).long())
        value.backward()
        return value.item()
    for _ in range(warm):
        optimizer.zero_grad()
        loss()
        optimizer.step()
    return model, optimizer, ticks, draw, loss


MAKES = {"SGD": lambda m: SGD(m.parameters(), lr=0.1), "Momentum": lambda m: Momentum(m.parameters(), lr=0.1), "Adam": lambda m: Adam(m.parameters()),
         "torch's AdamW": lambda m: torch_optim.AdamW(decay_groups(m, 0.1), lr=1e-3, fused=True),
         "scaled groups": lambda m: torch_optim.AdamW([{"params": [p], "lr_scale": 1.0 + i} for i, p in enumerate(m.parameters())])}


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_a_trial_leaves_no_trace(make, warm):
    model, optimizer, ticks, draw, loss = noisy(make, warm)
    before = everything(model, optimizer, ticks, draw)
    trial = find_learning_rate(loss, model, optimizer, ticks, draw, low=1e-5)
    assert 1e-5 <= trial.steepest <= trial.rates[trial.lowest] and trial.tenth == trial.rates[trial.lowest] / 10
    assert equal(before, everything(model, optimizer, ticks, draw))


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_a_run_with_a_trial_ends_where_one_without_ends(make):
    ends = []
    for tried in (False, True):
        model, optimizer, ticks, draw, loss = noisy(make, warm=3)
        if tried: find_learning_rate(loss, model, optimizer, ticks, draw, low=1e-5)
        for _ in range(5):
            optimizer.zero_grad()
            loss()
            optimizer.step()
        ends.append(everything(model, optimizer, ticks, draw))
    assert equal(*ends)


def test_a_failing_trial_leaves_no_trace():
    model, optimizer, ticks, draw, loss = noisy(MAKES["torch's AdamW"], 3)
    before, left = everything(model, optimizer, ticks, draw), iter(range(15))

    def fails():
        next(left)
        return loss()
    with pytest.raises(StopIteration): find_learning_rate(fails, model, optimizer, ticks, draw)
    assert equal(before, everything(model, optimizer, ticks, draw))


def test_a_trial_moves_each_group_at_its_own_multiple():
    model = nn.Linear(4, 2)
    optimizer, seen = SGD([{"params": [model.weight], "lr_scale": 1.0}, {"params": [model.bias], "lr_scale": 3.0}], lr=0.1), []
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def loss():
        seen.append([g["lr"] for g in optimizer.param_groups])
        value = (model(x) - x[:, :2]).square().mean()
        value.backward()
        return value.item()
    trial = find_learning_rate(loss, model, optimizer, low=1e-3)
    assert [s[0] for s in seen[1:len(trial.rates)]] == trial.rates[:len(seen) - 1][:len(trial.rates) - 1]
    assert all(b == 3 * a for a, b in seen[1:])


@pytest.mark.parametrize("bend", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("make, limit", [(SGD, 2), (lambda p: Momentum(p, momentum=0.5), 3)])
def test_the_cliff_is_where_theory_puts_it(bend, make, limit):
    "On bend·p²/2 gradient descent is stable up to 2/bend, with momentum m up to 2(1 + m)/bend: the loss turns near it, and both proposals are below."
    p = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    model = nn.ParameterList([p])

    def loss():
        value = bend * (p ** 2).sum() / 2
        value.backward()
        return value.item()
    trial = find_learning_rate(loss, model, make([p]), low=1e-4 / bend, high=100 / bend, steps=200, beta=0.0)
    stable = limit / bend
    assert stable / 3 < trial.rates[trial.lowest] < 1.5 * stable and trial.steepest < stable and trial.tenth < stable
    assert trial.rates[-1] < 100 / bend, "the trial stops when the loss diverges"


def constant_loss(p):
    p.grad = torch.zeros_like(p)
    return 1.0


@pytest.mark.parametrize("loss, options, says", [
    (constant_loss, {}, "no more than"), (lambda p: float("nan"), {}, "diverged after 0 steps"), (constant_loss, dict(low=0.0), "low=0.0"),
    (constant_loss, dict(low=1.0, high=0.1), "high=0.1"), (constant_loss, dict(steps=5), "steps=5"), (constant_loss, dict(beta=1.0), "beta=1.0"),
    (constant_loss, dict(diverged=1.0), "diverged=1.0")])
def test_a_trial_that_can_not_be_read_is_refused(loss, options, says):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(BookError, match=says) as e:
        find_learning_rate(lambda: loss(p), nn.ParameterList([p]), SGD([p]), **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("seed", range(5))
def test_an_optimizer_of_other_parameters_is_noticed(seed):
    "Noise alone isn't taken for a fall."
    model, _, ticks, draw, loss = noisy(MAKES["SGD"], 0)
    draw.manual_seed(seed)
    with pytest.raises(BookError, match="no more than batches differ"):
        find_learning_rate(loss, model, SGD([nn.Parameter(torch.ones(1))]), ticks, draw)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "paged-adamw"])
def test_the_trainers_loop_can_be_tried(name, tmp_path):
    from llmbook.corpora import write_stream
    from llmbook.gpt import GPT, GPTConfig
    from llmbook.loop import Loop, TrainConfig
    torch.manual_seed(0)
    stream = write_stream(tmp_path / "s", ["abcdefghijklmno" * 20] * 10, lambda text: [ord(c) - 97 for c in text], eot=15, vocab_size=16, progress=False)
    loops = [Loop(GPT(GPTConfig.llama(vocab_size=16, context=8, n_layer=1, n_head=2, n_embd=16)),
                  TrainConfig(steps=4, batch_size=4, context=8, optimizer=name, precision="fp32"), stream) for _ in range(2)]
    loops[1].model.load_state_dict(loops[0].model.state_dict())
    loop = loops[1]
    trial = find_learning_rate(loop.gradient, loop.model, loop.optimizer, loop.sampler)
    assert trial.tenth > 1e-6
    for loop in loops:
        for _ in range(4): loop.train_step()
    assert all(torch.equal(a, b) for a, b in zip(loops[0].model.parameters(), loops[1].model.parameters()))
