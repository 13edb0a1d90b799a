"""The readers' test kit: what it says to functions that fail in other ways than being wrong, and to those who ask for the wrong thing."""
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.attention import attention
from llmbook.check import Entry, Gap, Listing, check, gap, judge, line_of, numbers_in
from llmbook.corpora import BookError
from llmbook.mistakes import ENTRIES


def right_attention(q, k, v, mask=None): return attention(q, k, v, mask)[0]


@pytest.mark.parametrize("name", ENTRIES)
def test_the_books_own_function_passes(name):
    report = check(name, ENTRIES[name].book)
    assert report and report.mistake is None and len(report.outcomes) == len(ENTRIES[name].cases)
    assert "is right in all" in repr(report) and "✓" in report._repr_html_() and "passed" in report._repr_html_()


def test_a_report_names_the_mistake_in_all_its_forms():
    report = check("layer_norm", ENTRIES["layer_norm"].mistakes["the variance is divided by C − 1"])
    assert not report and report.mistake == "the variance is divided by C − 1"
    assert report.mistake in repr(report) and report.mistake in report._repr_html_() and "✗" in report._repr_html_()
    assert report.smallest.numbers == min(o.numbers for o in report.failed) and report.smallest.case in repr(report)


@pytest.mark.parametrize("name", ENTRIES)
def test_cases_are_fresh_and_the_same_each_time(name):
    for make in ENTRIES[name].cases.values():
        for a, b in zip(make(), make()):
            assert a is not b or not isinstance(a, (torch.Tensor, list, dict))
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)
        assert numbers_in(make()) >= 0


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(BookError, match="did you mean 'attention'") as e: check("atention", right_attention)
    assert all(name in str(e.value) for name in ENTRIES)
    with pytest.raises(BookError, match="choose merge_word"): check("zzz", right_attention)
    with pytest.raises(BookError, match="first argument is the name"): check(right_attention)


@pytest.mark.parametrize("what", [3, "attention", torch.zeros(2)])
def test_what_cannot_be_called(what):
    with pytest.raises(BookError, match="can't be called: give the function itself"): check("attention", what)


@pytest.mark.parametrize("name, fn", [("attention", lambda q, k, v: v), ("attention", torch.matmul), ("adamw", torch.optim.SGD), ("cosine_schedule", lambda peak, n: None), ("merge_word", lambda: [])])
def test_wrong_arguments_are_told_with_the_form(name, fn):
    with pytest.raises(BookError, match="is checked as .*f\\(") as e: check(name, fn)
    assert "argument" in str(e.value) and "\n" not in str(e.value)


def test_without_a_function_the_form_is_shown():
    assert isinstance(check(), Listing) and len(check().entries) == len(ENTRIES)
    assert all(name in repr(check()) and name in check()._repr_html_() for name in ENTRIES)
    assert "softmax" not in repr(check("attention")), "the mistakes would be a hint"
    assert "q (B, H, T, D)" in repr(check("attention"))


def test_what_is_written_in_place_is_told_and_spoils_nothing():
    def in_place(q, k, v, mask):
        k.mul_(1 / math.sqrt(k.shape[-1]))
        return attention(q * math.sqrt(q.shape[-1]), k, v, mask)[0]
    report = check("attention", in_place)
    assert not report and "writes into its argument k" in report.smallest.text and report.mistake is None and check("attention", right_attention)

    def append(ids, pair, new):
        ids.append(new)
        return []
    assert "the output has the length" in check("merge_word", append).outcomes[2].text
    changed = lambda ids, pair, new: (ENTRIES["merge_word"].book(list(ids), pair, new), ids.append(0))[0]
    assert "writes into its argument ids" in check("merge_word", changed).smallest.text


def test_a_mistake_is_named_although_the_function_writes_in_place():
    def both(q, k, v, mask):
        q.mul_(math.sqrt(q.shape[-1]))
        return attention(q, k, v, mask)[0]
    assert check("attention", both).mistake == "the scores aren't divided by √D"


def test_numpy_is_fine_where_no_gradient_is_wanted():
    def pool(hidden, mask): return np.stack([h[m].mean(0) for h, m in zip(hidden.numpy(), mask.numpy())])
    report = check("mean_pool", pool)
    assert not report and "with arguments that want gradients, it raises RuntimeError" in report.smallest.text and report.mistake is None
    detached = check("mean_pool", lambda hidden, mask: pool(hidden.detach(), mask))
    assert "no gradient reaches hidden" in detached.smallest.text
    assert check("top_p", lambda logits, p: ENTRIES["top_p"].book(logits, p).numpy())
    assert check("macro_f1", lambda *a: np.float32(ENTRIES["macro_f1"].book(*a)))
    assert check("merge_word", lambda *a: np.array(ENTRIES["merge_word"].book(*a), dtype=int))
    summed = check("mean_pool", lambda hidden, mask: (hidden.numpy() * mask.numpy()[..., None]).sum(1))
    assert summed.mistake == "it is summed"


def test_exceptions_name_the_readers_line():
    def helper(x): return x.reshape(7, 13)

    def fn(q, k, v, mask):
        return helper(q)
    report = check("attention", fn)
    assert not report and len(report.failed) == len(report.outcomes) and report.mistake is None
    assert "raises RuntimeError" in report.smallest.text and "of helper: def helper(x): return x.reshape(7, 13)" in report.smallest.text
    assert "Traceback" not in repr(report) and "none of the known" not in repr(report)
    inside = check("rms_norm", lambda x, w, eps: ENTRIES["rms_norm"].book(x, w[:-1], eps))
    assert "raises BookError" in inside.smallest.text


def test_a_type_error_inside_is_no_wrong_call():
    def fn(x, w, eps): return len(3)
    assert "raises TypeError" in check("rms_norm", fn).smallest.text
    assert "'float' object is not callable" in check("cosine_schedule", lambda **kw: 0.5).smallest.text


@pytest.mark.parametrize("wrong, told", [
    (lambda x, w, eps: None, "the output is None"), (lambda x, w, eps: "x", "the output is a str"), (lambda x, w, eps: [1], "the output is a list"),
    (lambda x, w, eps: x.sum(-1), "has the shape (2,) where (2, 2)"), (lambda x, w, eps: x.double(), "has the dtype float64 where float32"),
    (lambda x, w, eps: x * math.nan, "is NaN at 4 of 4"), (lambda x, w, eps: (x, x), "the number of results is 2 where 1"), (lambda x, w, eps: x / 0, "inf where")])
def test_other_forms_of_answers(wrong, told): assert told in check("rms_norm", wrong).outcomes[0].text


def test_too_few_results():
    order_only = check("permutation_masks", lambda o: ENTRIES["permutation_masks"].book(o)[0])
    assert "the number of results is 1 where 2" in order_only.smallest.text and order_only.mistake is None


def test_the_readers_random_numbers_are_left_alone():
    torch.manual_seed(1)
    check("dropout", ENTRIES["dropout"].book)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))


def test_it_works_without_gradients_switched_on():
    with torch.no_grad(): assert check("rms_norm", ENTRIES["rms_norm"].book)


def test_names_of_what_is_checked():
    assert check("rms_norm", functools.partial(lambda x, w, eps, y: x, y=1)).name == "<lambda>"
    assert check("dropout", torch.nn.functional.dropout).name == "dropout"
    class Layer(torch.nn.Module):
        def forward(self, x, w, eps): return ENTRIES["rms_norm"].book(x, w, eps)
    assert (report := check("rms_norm", Layer())) and report.name == "Layer"


def test_exceptions_without_a_line_of_the_reader():
    try: torch.zeros(2).reshape(3)
    except RuntimeError as e: assert line_of(e, depth=1) == "" and "reshape(3)" in line_of(e, depth=0)


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-1e-3, 1e-3))
def test_the_tolerance_is_relative_to_one_more_than_the_right_value(right, by):
    found = gap(right + by, right, 1e-5)
    assert math.isclose(found.size, abs(right + by - right) / (1 + abs(right)), rel_tol=1e-9, abs_tol=1e-15)
    assert bool(found.text) == (found.size > 1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(0, 9), max_size=6))
def test_lists_are_equal_or_not(a, b):
    found = gap(a, b, 0.0)
    assert (found == Gap(0.0, "")) == (a == b) and gap(tuple(a), a, 0.0).text == "" and gap(torch.tensor(a, dtype=int), a, 0.0).text == ""


def test_gaps_of_special_numbers():
    inf, nan = math.inf, math.nan
    assert gap(torch.tensor([inf, nan, -inf]), torch.tensor([inf, nan, -inf]), 0.0) == Gap(0.0, "")
    assert "is inf where -inf" in gap(torch.tensor([inf]), torch.tensor([-inf]), 1.0).text
    assert "is 0 where nan" in gap(torch.tensor([0.0]), torch.tensor([nan]), 1.0).text
    assert gap(torch.zeros(0, 3), torch.zeros(0, 3), 0.0).text == ""
    assert gap(True, 1.0, 0.0).text and gap(1, True, 0.0).text and not gap(2, torch.tensor(2), 0.0).text


def test_a_mistake_is_not_named_for_what_merely_looks_like_it_in_some_cases():
    "Wrong in one case like a mistake, right in the others: no name."
    entry = Entry("one", "x", "f(x) → number", lambda x: x * 2, {"a": lambda: (1.0,), "b": lambda: (3.0,)}, {"it is squared, and doubled": lambda x: x * x * 2})
    assert judge(entry, lambda x: 18.0 if x == 3 else 2.0).mistake == "it is squared, and doubled"
    assert judge(entry, lambda x: 18.0 if x == 3 else 2.1).mistake is None
