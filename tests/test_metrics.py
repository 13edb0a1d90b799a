"""Metrics against scikit-learn on any input, and what they refuse."""
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.corpora import BookError
from llmbook.objectives import IGNORE
from llmbook.metrics import (Confusion, Mean, TokenScores, accuracy, average_precision, bits_per_byte, bootstrap, class_scores,
                             confusion_matrix, perplexity, precision_recall_curve, redraw_confusion)

sk = pytest.importorskip("sklearn.metrics")
pairs = st.integers(2, 7).flatmap(lambda C: st.tuples(st.just(C), st.lists(st.tuples(st.integers(0, C - 1), st.integers(0, C - 1)), min_size=1, max_size=40)))


@settings(deadline=None, max_examples=150)
@given(pairs, st.sampled_from([None, "macro", "micro", "weighted"]), st.sampled_from([0.0, 1.0, math.nan]))
def test_class_scores_equal_scikit_learn(case, average, zero):
    C, examples = case
    t, p = torch.tensor(examples).T
    table = confusion_matrix(t, p, C)
    np.testing.assert_array_equal(table, sk.confusion_matrix(t, p, labels=range(C)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's mean of nothing
        theirs = sk.precision_recall_fscore_support(t, p, labels=range(C), average=average, zero_division=zero)[:3]
    for ours, reference in zip(class_scores(table, average, zero), theirs): np.testing.assert_allclose(ours, reference, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 2**31), st.data())
def test_top_k_equals_scikit_learn_without_ties(C, n, seed, data):
    rng = np.random.default_rng(seed)
    scores, targets, k = torch.from_numpy(rng.permuted(np.tile(np.arange(C), (n, 1)), axis=1)), torch.from_numpy(rng.integers(C, size=n)), data.draw(st.integers(1, C))
    hits = np.mean([t in np.argsort(-s)[:k] for s, t in zip(scores.numpy(), targets.numpy())])
    assert accuracy(scores.double(), targets, k) == pytest.approx(hits, abs=1e-12)
    assert accuracy(scores.double(), targets) == pytest.approx(sk.accuracy_score(targets, scores.argmax(-1)), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 6), st.integers(1, 30), st.integers(0, 2**31))
def test_top_1_is_argmax_even_with_ties(C, n, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, targets = torch.randint(3, (n, C), generator=generator).float(), torch.randint(C, (n,), generator=generator)
    first = torch.tensor([row.tolist().index(max(row.tolist())) for row in scores])
    assert accuracy(scores, targets) == pytest.approx((first == targets).double().mean().item(), abs=1e-12)


def test_a_broken_model_does_not_score():
    targets = torch.tensor([0, 1])
    assert accuracy(torch.full((2, 3), math.nan), targets, k=3) == 0
    assert accuracy(torch.tensor([[1.0, math.nan, 0.0], [0.0, 1.0, 0.0]]), targets) == 0.5


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40))
def test_curve_equals_scikit_learn_with_ties(examples):
    scores, targets = torch.tensor([s / 6 for s, _ in examples], dtype=torch.float64), torch.tensor([int(t) for _, t in examples])
    if not targets.any():
        with pytest.raises(BookError): precision_recall_curve(scores, targets)
        return
    precision, recall, thresholds = sk.precision_recall_curve(targets, scores)
    for ours, reference in zip(precision_recall_curve(scores, targets), (precision[:-1], recall[:-1], thresholds)): np.testing.assert_allclose(ours.flip(0), reference, atol=1e-12)
    assert average_precision(scores, targets) == pytest.approx(sk.average_precision_score(targets, scores), abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(2, 20), st.integers(1, 9), st.floats(0, 0.95), st.integers(0, 2**31))
def test_batches_equal_one_go(B, T, V, size, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, targets = torch.randn(B, T, V, generator=generator, dtype=torch.float64), torch.randint(V, (B, T), generator=generator)
    targets[torch.rand(B, T, generator=generator) < padding] = IGNORE
    targets[0, 0] = 0
    whole, parts, other, table = TokenScores().add(scores, targets, B).value, TokenScores(), TokenScores(), Confusion(V)
    for i, (s, t) in enumerate(zip(scores.split(size), targets.split(size))):
        (parts if i % 2 else other).add(s, t, len(s))
        table.add(t, s.argmax(-1))
    assert parts.merge(other).value == pytest.approx(whole, rel=1e-12)
    assert torch.equal(table.matrix, confusion_matrix(targets, scores.argmax(-1), V))


def test_means():
    assert math.isnan(Mean().value) and Mean().add(torch.tensor([1, 2, 6])).value == 3
    assert Mean().add(torch.tensor([1.0, 5.0]), torch.tensor([3, 1])).merge(Mean(6.0, 4.0)).value == 14 / 8
    assert perplexity(2 * math.log(7), 2) == pytest.approx(7) and perplexity(1e9, 1) == math.inf
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)


def test_the_bootstrap_keeps_rows_together_and_repeats():
    x = torch.arange(50.0)
    same = bootstrap(lambda a, b: (a - b).mean(-1), x, x)
    assert same == (0, 0, 0)
    assert bootstrap(lambda a: a.mean(-1), x, seed=3) == bootstrap(lambda a: a.mean(-1), x, seed=3)
    low, high = bootstrap(lambda a: a.mean(-1), x, draws=4000)[1:]
    error = x.std(correction=0).item() / math.sqrt(50)  # of the mean; the interval is nearly normal
    assert low == pytest.approx(24.5 - 1.96 * error, abs=0.3) and high == pytest.approx(24.5 + 1.96 * error, abs=0.3)


def test_redrawn_matrices_have_the_right_mean_and_spread():
    table = torch.tensor([[40, 5], [10, 45]])
    drawn = redraw_confusion(table, 20_000).double()
    assert (drawn.sum((1, 2)) == 100).all()
    p = table / 100
    spread = (100 * p * (1 - p)).sqrt()
    assert ((drawn.mean(0) - table).abs() < 5 * spread / math.sqrt(20_000)).all()
    assert torch.allclose(drawn.std(0), spread.double(), rtol=0.03)


@pytest.mark.parametrize("wrong", [
    lambda: accuracy(torch.zeros(2, 3), torch.tensor([0, 3])), lambda: accuracy(torch.zeros(2, 3), torch.tensor([0])),
    lambda: accuracy(torch.zeros(2, 3), torch.tensor([IGNORE, IGNORE])), lambda: accuracy(torch.zeros(1, 3), torch.tensor([-1])),
    lambda: confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 2]), 2), lambda: confusion_matrix(torch.tensor([0]), torch.tensor([[0]]), 2),
    lambda: class_scores(torch.eye(2), "mean"), lambda: class_scores(torch.eye(2), zero_division=0.5),
    lambda: perplexity(0.0, 0), lambda: bits_per_byte(0.0, 0), lambda: bootstrap(lambda x: x.mean(-1), torch.zeros(1)),
    lambda: bootstrap(lambda x, y: x.mean(-1), torch.zeros(3), torch.zeros(4))])
def test_refusals_are_one_sentence(wrong):
    with pytest.raises(BookError, match=r"^[A-Za-z][^\n]*: [^\n]*\.$"): wrong()
