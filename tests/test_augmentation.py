"""What the chapter can't show: the page's script makes Python's texts, any mixture keeps special tokens, and senseless input is refused in one sentence."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.augmentation import (OPERATIONS, Augment, AugmentViewer, Compose, Delete, Dice, Insert, Mask, OneOf, PermuteSentences, Reverse, Rotate, Sometimes,
                                  Swap, WholeWords, add_neft, as_ids, bilinear, affine_grid, flip_picture, labels_kept, neft_noise, paired_gain, shuffled, turn_picture)
from llmbook.corpora import BookError

SPECIAL = (90, 91)
shares = st.sampled_from([0.0, 0.01, 0.3, 0.99, 1.0])
simple = st.one_of(st.builds(Mask, shares, st.just(80)), st.builds(Delete, shares), st.builds(Insert, shares, st.just([81, 82])), st.builds(Swap, shares), st.builds(Reverse, shares),
                   st.just(PermuteSentences([3, 4])), st.just(Rotate()))
changes = st.recursive(simple, lambda c: st.one_of(st.lists(c, max_size=3).map(Compose), st.lists(c, min_size=1, max_size=3).map(OneOf), st.builds(Sometimes, shares, c)), max_leaves=6)
texts = st.lists(st.sampled_from([*range(6), *SPECIAL]), max_size=20)
TYPED = ["", " ", "one", "one two", "Not a bad film. The plot is thin! Is it? Yes.", "a.b ... ?! \" 'end.' (so.)", "x" * 50, "naïve 日本語 🙂👍🏽 e\u0301", "a\u00a0b\u3000c\td\r\ne\x0bf\x85g",
         "</script><b>&amp; \"quoted\" 'single'", "same same same. same", " ".join(map(str, range(120))) + "."]


@settings(max_examples=150, deadline=None)
@given(texts, changes, st.integers(0, 2**40))
def test_any_mixture_keeps_special_tokens_and_its_input(ids, change, seed):
    change = Compose([change], special=SPECIAL)
    given_, dice = np.array(ids, dtype=np.int32), Dice(seed)
    before = given_.copy()
    out = change(given_, dice)
    assert (given_ == before).all() and out.ndim == 1 and out.dtype.kind == "i"
    assert [i for i in out.tolist() if i in SPECIAL] == [i for i in ids if i in SPECIAL]
    empty = lambda x: [not part for part in "".join("|" if i in SPECIAL else "." for i in x).split("|")]
    assert empty(out.tolist()) == empty(ids), "no text appears from nothing or vanishes"
    assert np.array_equal(change(given_, Dice(seed)), out)
    if ids and hasattr(change, "parts"): assert not np.shares_memory(out, given_) or np.array_equal(out, before)
    change(given_.tolist(), np.random.default_rng(seed))    # numpy's generator serves as well


def test_numpy_and_dice_give_the_same_numbers_in_one_go_or_one_by_one():
    for seed in (0, 1, 2**32 - 1, 2**32, -5):
        one, many = Dice(seed), Dice(seed)
        assert [one.random() for _ in range(50)] == [*many.random(20), *many.random(0), *many.random(30)]
        assert one.state == many.state and all(0 <= u < 1 for u in Dice(seed).random(10_000))
    assert Dice(7).random(3).tolist() == Dice(7 + 2**32).random(3).tolist() != Dice(8).random(3).tolist()
    assert sorted(shuffled(Dice(0), 100)) == list(range(100)) and shuffled(Dice(0), 0) == [] and shuffled(Dice(0), 1) == [0]


def test_every_place_is_swapped_reversed_and_rotated_equally_often():
    rng, T, n = np.random.default_rng(0), 8, 4000
    for f, expected in ((Swap(0.1), 2 / T), (Rotate(), 1 - 1 / T)):
        moved = np.mean([f(range(T), rng) != np.arange(T) for _ in range(n)], axis=0)
        assert np.abs(moved - expected).max() < 4.5 * math.sqrt(expected * (1 - expected) / n)
    starts = np.bincount([int(np.argmax(Reverse(0.5)(range(T), rng) != np.arange(T))) for _ in range(n)], minlength=5)
    assert len(starts) == 5 and np.abs(starts / n - 0.2).max() < 4.5 * 0.4 / math.sqrt(n)


def test_whole_words_stay_whole():
    starts = np.array([True] * 5 + [False] * 5)
    rng = np.random.default_rng(0)
    for seed in range(200):
        ids = np.concatenate([[rng.integers(5), *rng.integers(5, 10, rng.integers(0, 4))] for _ in range(6)])
        words = lambda x: [tuple(w) for w in np.split(x, np.flatnonzero(starts[x])) if len(w)]
        out = WholeWords(Compose([Rotate(), Swap(0.5), Delete(0.3)]), starts)(ids, Dice(seed))
        left = words(ids)
        for w in words(out): left.remove(w)
    hidden = WholeWords(Mask(1.0, 7), starts)(np.array([0, 5, 6, 1, 8]), Dice(0))
    assert hidden.tolist() == [7, 7], "one mask for each word, not for each piece"
    assert WholeWords(Rotate(), torch.tensor(starts))([5, 6, 0], Dice(1)).size == 3


def test_noise_on_vectors_of_padded_texts():
    torch.manual_seed(0)
    mask = torch.tensor([[1] * 4 + [0] * 12, [1] * 16]).bool()
    out = torch.stack([neft_noise(torch.zeros(2, 16, 32), 5.0, mask) for _ in range(300)])
    assert (out[:, 0, 4:] == 0).all()
    assert torch.allclose(out.flatten(2).norm(dim=2).mean(0), torch.full((2,), 5 / 3**0.5), rtol=0.03)
    for dtype in (torch.bfloat16, torch.float64):
        x = torch.zeros(2, 16, 32, dtype=dtype)
        assert neft_noise(x, 5.0, mask).dtype == neft_noise(x, 5.0).dtype == dtype
    assert torch.isfinite(neft_noise(torch.zeros(2, 16, 32), 5.0, torch.zeros(2, 16, dtype=torch.bool))).all()
    table = torch.nn.Embedding(5, 3)
    with add_neft(table, 0.0): assert torch.equal(table(torch.arange(5)), table.weight)


def test_pictures_keep_gradient_channels_and_mass():
    p = torch.rand(2, 3, 9, 6, dtype=torch.float64, requires_grad=True)
    turn_picture(p, 30).sum().backward()
    assert turn_picture(p, 30).shape == p.shape and torch.isfinite(p.grad).all() and p.grad.max() <= 1.5
    torch.testing.assert_close(turn_picture(p, 360.0), p, rtol=0, atol=1e-12)
    torch.testing.assert_close(flip_picture(flip_picture(p, False), False), p, rtol=0, atol=1e-12)
    far = bilinear(p, affine_grid(torch.tensor([[1.0, 0, 5], [0, 1, 0]], dtype=torch.float64), 9, 6))
    assert (far == 0).all()


def test_gain_of_equal_runs_is_nothing_and_of_better_ones_something():
    hits = torch.rand(4, 500, generator=torch.Generator().manual_seed(0)) < 0.7
    assert paired_gain(hits, hits) == (0, 0, 0)
    better = hits | (torch.rand(4, 500, generator=torch.Generator().manual_seed(1)) < 0.3)
    gain = paired_gain(hits, better)
    assert 0 < gain.low < gain.value < gain.high and gain.value == pytest.approx(float((better.double() - hits.double()).mean()))


def test_bad_input_is_refused_in_one_sentence():
    starts, d = np.ones(5, dtype=bool), Dice()
    for call in (lambda: Mask(1.5, 0), lambda: Delete(-0.1), lambda: Insert(2, [1]), lambda: Insert(0.1, []), lambda: Swap(float("nan")), lambda: Reverse(7), lambda: Sometimes(3, Rotate()), lambda: OneOf([]),
                 lambda: Rotate()([0.5, 1.0], d), lambda: Rotate()([[1, 2]], d), lambda: Rotate()("text", d), lambda: as_ids(3), lambda: WholeWords(Rotate(), starts)([1, 9], d),
                 lambda: WholeWords(PermuteSentences([3]), starts)([1, 2], d), lambda: add_neft(torch.nn.Embedding(2, 2), -1.0), lambda: paired_gain(torch.ones(2, 3), torch.ones(2, 4)),
                 lambda: paired_gain(torch.ones(1, 3), torch.ones(1, 3)), lambda: AugmentViewer("a").codes("a b", "shout", 10, 0)):
        with pytest.raises(BookError) as e: call()
        assert "\n" not in str(e.value) and str(e.value).endswith(".")
    with pytest.raises(NotImplementedError): Augment()([1], d)
    for f in (Mask(1, 9), Delete(1), Insert(1, [9]), Swap(1), Reverse(1), PermuteSentences([1]), PermuteSentences([]), Rotate(), Compose([]), Sometimes(1, Rotate())):
        assert f([], d).size == 0 and f([3], d).size >= 1
    assert labels_kept(lambda texts: torch.tensor([len(t) for t in texts]), [np.arange(5)], Delete(1.0), d).tolist() == [False]


def test_live_controls_show_what_python_computes():
    viewer = AugmentViewer("one two three. four five.")
    live = viewer.live()
    text, row, shown = live.children[1:]
    operation, percent, seed = row.children
    for name in OPERATIONS:
        operation.value, seed.value = name, seed.value + 3
        assert shown.value == viewer.boxes(text.value, name, percent.value, seed.value)
    text.value = ""
    assert "0 words" in shown.value


@pytest.mark.browser
def test_the_page_s_texts_are_python_s(visit):
    viewer, page = AugmentViewer(TYPED[4]), visit("about:").page
    page.set_content(viewer.to_html())
    asked = [[t, name, percent, seed] for t in TYPED for name in OPERATIONS for percent in (0, 5, 30, 100) for seed in (0, 1, 77)]
    assert page.evaluate("asked => asked.map(a => window.llmbookAugment.codes(...a))", asked) == [viewer.codes(*a) for a in asked]
    assert page.evaluate("asked => asked.map(a => window.llmbookAugment.boxes(...a))", asked) == [viewer.boxes(*a) for a in asked]
    root = page.locator(".llmbook-augment")
    states = [root.locator(".llmbook-changed").inner_html()]
    def after(do):
        do()
        states.append(root.locator(".llmbook-changed").inner_html())
    after(lambda: root.locator("select").select_option(label="swap"))
    root.locator("input").nth(1).focus()
    after(lambda: page.keyboard.press("ArrowRight"))
    after(lambda: root.locator("textarea").fill("<b>One</b> two. Three four five six."))
    after(lambda: root.locator("select").select_option(label="rotate"))
    assert len(set(states)) == len(states) and root.locator(".llmbook-changed b").count() == 0 and root.locator("input").nth(0).is_disabled()
    assert "\n".join(root.locator(".llmbook-changed span").all_inner_texts()).count("<b>One</b>") == 1
