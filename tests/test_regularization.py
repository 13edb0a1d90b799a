"""What a lesson can't show: many seeds and settings, runs that die or go back in time, and everything that must be refused."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from llmbook.bert import Bert, BertConfig, BertForPreTraining, BertForTokenClassification
from llmbook.checkpointing import pack_optimizer, unpack_optimizer
from llmbook.corpora import BookError, synthetic_documents, write_stream
from llmbook.gpt import GPT, GPTConfig
from llmbook.loop import Callback, TrainConfig
from llmbook.optimizers import SGD, AdamW, Momentum
from llmbook.regularization import (Dropout, EarlyStopping, ProximalAdam, ProximalL1, ProximalMomentum, dropout, dropout_places, progress, seed_interval,
                                    set_dropout, soft_threshold, student_quantile)
from llmbook.training import Trainer
from llmbook.xlnet import XLNet, XLNetConfig, XLNetLM

# L1


@settings(max_examples=60, deadline=None)
@given(st.floats(-5, 5), st.floats(0, 3))
def test_the_soft_threshold_is_the_minimum(w, by):
    x = soft_threshold(torch.tensor(w, dtype=torch.float64), by).item()
    def cost(x): return (x - w) ** 2 / 2 + by * abs(x)
    assert all(cost(x) <= cost(x + d) + 1e-12 for d in (-1.0, -1e-3, 1e-3, 1.0)) and cost(x) <= cost(0) + 1e-12


def lasso(make, seed, steps, l1=1.0):
    g = torch.Generator().manual_seed(seed)
    X = torch.linalg.qr(torch.randn(30, 8, generator=g, dtype=torch.float64)).Q
    y, w = 2 * torch.randn(30, generator=g, dtype=torch.float64), nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = make([w])
    for _ in range(steps):
        w.grad = X.T @ (X @ w.detach() - y)
        optimizer.step()
    return w.detach(), soft_threshold(X.T @ y, l1)


@pytest.mark.parametrize("options", [dict(momentum=0.9), dict(momentum=0.9, nesterov=True), dict(momentum=0.8, dampening=0.5), dict(momentum=0.8, dampening=0.5, nesterov=True), dict(momentum=0.0)])
def test_momentum_of_any_kind_has_the_same_minimum(options):
    for seed in range(3):
        w, closed = lasso(lambda p: ProximalMomentum(p, lr=0.1, l1=1.0, **options), seed, 600)
        torch.testing.assert_close(w, closed, rtol=0, atol=1e-9)


def test_momentum_with_a_threshold_in_the_wrong_units_has_another():
    class Naive(ProximalMomentum):
        def gain(self, p, group): return 1.0
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = Naive([w], lr=0.05, l1=1.0)
    for _ in range(2000):
        w.grad = w.detach() - torch.tensor([3.0, 0.5])
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([2.9, 0.4], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ours, theirs", [(ProximalL1, SGD), (ProximalMomentum, Momentum), (lambda p, **kw: ProximalAdam(p, weight_decay=0.1, **kw), lambda p, **kw: AdamW(p, weight_decay=0.1, **kw))])
def test_without_a_penalty_nothing_changes(ours, theirs):
    paths = []
    for make in (ours, theirs):
        g, w = torch.Generator().manual_seed(0), nn.Parameter(torch.ones(5, 3))
        optimizer = make([w], lr=0.1)
        for _ in range(20):
            w.grad = torch.randn(5, 3, generator=g)
            optimizer.step()
        paths.append(w.detach())
    assert torch.equal(*paths)


def test_a_penalized_run_goes_on_exactly():
    def step(model, optimizer, seed):
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters(): p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    def build(): return (model := nn.Linear(4, 3)), ProximalAdam([{"params": [model.weight], "l1": 0.3}, {"params": [model.bias]}], lr=0.05)
    model, optimizer = build()
    for seed in range(5): step(model, optimizer, seed)
    other, fresh = build()
    other.load_state_dict(model.state_dict())
    unpack_optimizer(fresh, other, *pack_optimizer(optimizer, model))
    for seed in range(5, 9): step(model, optimizer, seed), step(other, fresh, seed)
    assert torch.equal(model.weight, other.weight) and (model.weight == 0).any() and fresh.param_groups[0]["l1"] == 0.3


def test_a_weight_without_gradient_is_left_alone():
    w = nn.Parameter(torch.ones(2))
    ProximalL1([w], lr=0.1, l1=1.0).step()
    assert w.tolist() == [1, 1]


@pytest.mark.parametrize("bad", [dict(l1=-1.0), dict(l1=math.nan), dict(l1=math.inf), dict(lr=-1.0), dict(lambda_=1.0)])
def test_bad_penalties_are_refused(bad):
    for cls in (ProximalL1, ProximalMomentum, ProximalAdam):
        with pytest.raises(BookError): cls([nn.Parameter(torch.ones(2))], **bad)


# Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropped_numbers_are_zero_or_scaled(dtype):
    x = torch.full((1000,), 2.0, dtype=dtype)
    for seed in range(5):
        out = dropout(x, 0.5, generator=torch.Generator().manual_seed(seed))
        assert out.dtype == dtype and set(out.tolist()) == {0.0, 4.0} and torch.equal(out, dropout(x, 0.5, generator=torch.Generator().manual_seed(seed)))
    assert dropout(x, 1.0).abs().sum() == 0 and dropout(x, 0.0) is x and dropout(x, 0.5, training=False) is x


def test_the_layer_listens_to_train_and_eval():
    layer, x = Dropout(0.5), torch.ones(1000)
    assert not torch.equal(layer(x), x) and layer.eval()(x) is x and "p=0.5" in repr(layer)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_shares_that_are_none_are_refused(p):
    for fn in (lambda: dropout(torch.ones(2), p), lambda: Dropout(p), lambda: set_dropout(gpt(), all=p)):
        with pytest.raises(BookError, match="share from 0"): fn()


def gpt(**kw): return GPT(GPTConfig.llama(**{**dict(vocab_size=130, context=32, n_layer=2, n_head=2, n_embd=16), **kw}))


def test_places_are_set_one_by_one():
    model = set_dropout(gpt(), embedding=0.1, attention=0.2, residual=0.3)
    assert {place: {getattr(m, a) for m, a in found} for place, found in dropout_places(model).items()} == {"embedding": {0.1}, "attention": {0.2}, "residual": {0.3}}
    assert {getattr(m, a) for found in dropout_places(set_dropout(model, all=0.0)).values() for m, a in found} == {0.0}
    bert = Bert(BertConfig(vocab_size=60, n_layer=3, n_head=2, n_embd=16, context=16))
    assert {place: len(found) for place, found in dropout_places(BertForTokenClassification(bert, 3)).items()} == {"embedding": 1, "attention": 3, "residual": 6, "head": 1}
    held = {id(m) for found in dropout_places(bert).values() for m, _ in found}
    assert all(id(m) in held for m in bert.modules() if isinstance(m, nn.Dropout)), "a place is missing"


def test_unknown_places_and_models_are_refused():
    with pytest.raises(BookError, match="embedding, attention, residual or all"): set_dropout(gpt(), heads=0.1)
    for model in (nn.Linear(2, 2), XLNetLM(XLNet(XLNetConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=16)))):
        with pytest.raises(BookError, match="GPT or the BERT"): dropout_places(model)
    assert "head" not in dropout_places(BertForPreTraining(Bert(BertConfig(vocab_size=60, n_layer=1, n_head=2, n_embd=16, context=16))))


# Stopping early


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 9), st.just(math.nan)), max_size=12), st.floats(0, 1))
def test_progress_is_what_it_says(losses, min_delta):
    best, waited = progress([{"step": i, "valid_loss": v} for i, v in enumerate(losses)] + [{"step": 99, "loss": 0.0}], min_delta)
    if best is None: assert all(map(math.isnan, losses)) and waited == len(losses)
    else:
        assert waited == len(losses) - 1 - best["step"]
        assert not any(v < best["valid_loss"] - min_delta for v in losses)


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder, docs = tmp_path_factory.mktemp("streams"), synthetic_documents(40)
    make = lambda name, texts: write_stream(folder / name, texts, lambda t: list(t.encode()), eot=129, vocab_size=130, progress=False)
    return make("train", docs[:4]), make("valid", docs[20:30])


def run(streams, folder, rule=None, steps=60, **changes):
    "A run that has its lowest held-out loss before its end."
    torch.manual_seed(7)
    config = TrainConfig(**{**dict(steps=steps, batch_size=4, context=16, lr=2e-2, warmup=1, eval_every=4, eval_batches=2, checkpoint_every=6, precision="fp32", schedule="constant", spike=None), **changes})
    rule = EarlyStopping(patience=3, min_delta=0.01) if rule is None else rule
    return Trainer(gpt(n_layer=1, dropout=0.1), config, *streams, folder, progress=False, callbacks=[rule])


class Death(Callback):
    def __init__(self, at): self.at = at

    def on_row(self, trainer, row):
        if row["step"] == self.at and "loss" in row: raise RuntimeError("down")


def weights(trainer): return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def whole(streams, tmp_path_factory):
    trainer = run(streams, tmp_path_factory.mktemp("whole"))
    trainer.fit()
    return trainer


def evaluations(history): return [(r["step"], r["valid_loss"]) for r in history if "valid_loss" in r]


def test_the_best_weights_are_back(whole):
    best, waited = progress(whole.history, 0.01)
    assert waited == 3 and whole.history[-1]["step"] < 60 and f"step {best['step']}" in whole.history[-1]["stopped"]
    assert whole.evaluate()["loss"] == pytest.approx(best["valid_loss"], abs=1e-6)
    saved = load_file(whole.run_dir / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in whole.model.named_parameters() if name in saved) and saved


def test_any_crash_ends_as_the_uninterrupted_run(streams, whole, tmp_path):
    last = whole.history[-1]["step"]
    for at in range(2, last, 5):
        folder = tmp_path / str(at)
        broken = run(streams, folder)
        broken.callbacks = [*broken.callbacks, Death(at)]
        with pytest.raises(RuntimeError): broken.fit()
        again = run(streams, folder)
        assert evaluations(again.fit()) == evaluations(whole.history) and torch.equal(weights(again), weights(whole))


def test_a_stopped_run_stays_stopped(streams, whole):
    again = run(streams, whole.run_dir)
    assert again.fit()[-1]["step"] == whole.history[-1]["step"] and torch.equal(weights(again), weights(whole))


def test_a_run_that_goes_to_its_end_gives_its_best_too(streams, tmp_path):
    trainer = run(streams, tmp_path, EarlyStopping(patience=50), steps=40)
    best = progress(trainer.fit(), 0.0).best
    assert best["step"] < 40 and trainer.evaluate()["loss"] == pytest.approx(best["valid_loss"], abs=1e-6)


def test_ctrl_c_keeps_the_weights_of_the_present(streams, tmp_path):
    trainer = run(streams, tmp_path)
    gradient = trainer.gradient
    def interrupted():
        if trainer.step == 30: raise KeyboardInterrupt
        return gradient()
    trainer.gradient = interrupted
    trainer.fit()
    stored = load_file(sorted((tmp_path / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    assert trainer.step == 30 and all(torch.equal(t, trainer.model.state_dict()[name]) for name, t in stored.items())


def test_without_restoring_nothing_is_written(streams, whole, tmp_path):
    trainer = run(streams, tmp_path, EarlyStopping(patience=3, min_delta=0.01, restore=False))
    assert evaluations(trainer.fit()) == evaluations(whole.history) and not list(tmp_path.rglob("best-*"))
    assert not torch.equal(weights(trainer), weights(whole))


def test_a_run_that_goes_back_in_time_keeps_what_it_needs(streams, tmp_path):
    "A fault after a new best; back to a checkpoint from before it, and on another way through the data."
    trainer, calls = run(streams, tmp_path, EarlyStopping(patience=2, min_delta=0.01), on_fault="rollback", checkpoint_every=7), []
    loss_of = trainer.loss_of

    def poisoned(**inputs):
        calls.append(1)
        return loss_of(**inputs) * (math.nan if len(calls) in (10, 30) else 1.0)
    trainer.loss_of = poisoned
    history = trainer.fit()
    best = progress(history, 0.01).best
    assert any("rolled_back" in r for r in history) and trainer.evaluate()["loss"] == pytest.approx(best["valid_loss"], abs=1e-6)
    assert len(list((tmp_path / "checkpoints").glob("best-*"))) <= 3


def test_who_comes_late_is_told(streams, tmp_path):
    first = run(streams, tmp_path)
    first.callbacks = [Death(20)]
    with pytest.raises(RuntimeError): first.fit()
    with pytest.raises(BookError, match="were not kept: resume with EarlyStopping") as e: run(streams, tmp_path).fit()
    assert "\n" not in str(e.value)
    assert run(streams, tmp_path, EarlyStopping(restore=False)).fit()
    fresh = run(streams, tmp_path)
    fresh.fit(resume=False)
    assert progress(fresh.history, 0.01).best


def test_losses_that_are_no_numbers_end_a_run(streams, tmp_path):
    trainer = run(streams, tmp_path)
    trainer.evaluate = lambda: {"loss": math.nan}
    assert "none of 3" in trainer.fit()[-1]["stopped"]


def test_a_full_disk_is_one_sentence(streams, tmp_path, monkeypatch):
    import llmbook.regularization as module
    trainer = run(streams, tmp_path)
    def full(path, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(BookError, match="can't be written.*No space left") as e: trainer.fit()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("bad", [dict(patience=0), dict(patience=1.5), dict(min_delta=-1.0), dict(min_delta=math.nan)])
def test_bad_rules_are_refused(bad):
    with pytest.raises(BookError, match="can't be used"): EarlyStopping(**bad)


# Few runs


def test_intervals_by_hand():
    assert student_quantile(0.95, 2) == pytest.approx(4.302653, abs=1e-5) and student_quantile(0.5, 1) == pytest.approx(1.0, abs=1e-6)
    mean, low, high = seed_interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - 2 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5) and 2 - low == pytest.approx(high - 2)
    assert np.allclose(seed_interval([5.0, 5.0]), 5.0)


@pytest.mark.parametrize("values, level, words", [([1.0], 0.95, "at least two seeds"), ([], 0.95, "at least two"), ([1.0, 2.0], 1.0, "between 0 and 1")])
def test_intervals_of_nothing_are_refused(values, level, words):
    with pytest.raises(BookError, match=words): seed_interval(values, level)


def test_a_single_run_has_no_freedom():
    with pytest.raises(BookError, match="at least one degree"): student_quantile(0.95, 0)
