"The three objectives and the two losses over random shapes, shares and vocabularies, and with bad input."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.corpora import BookError
from llmbook.objectives import (IGNORE, MASK, MaskedWord, NextWord, Permutation, cross_entropy, log_softmax, mse, objective,
                                tokens_predicted, word_ends, word_starts)
from llmbook.tokenization import BPETokenizer, CharTokenizer

TEXT = "The king's men can't find 17 apples.\n'Tis strange, said \"Anne\" (twice): naïve, déjà vu!\nThe King's men. " * 30


def seeded(seed): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer(): return BPETokenizer.train(TEXT, 300, special=("<|endoftext|>", MASK), progress=False)


@st.composite
def masked_cases(draw):
    "An objective with a random vocabulary, special tokens and words; windows that hold some text; a seed."
    V = draw(st.integers(4, 60))
    special = draw(st.sets(st.integers(0, V - 1), min_size=1, max_size=V - 2))
    mask_id, seed = draw(st.sampled_from(sorted(special))), draw(st.integers(0, 2**31))
    B, T, g = draw(st.integers(1, 9)), draw(st.integers(1, 40)), seeded(seed)
    windows = torch.randint(V, (B, T + 1), generator=g)
    windows[0, 0] = min(set(range(V)) - special)
    mask = draw(st.floats(0, 1))
    words = torch.rand(V, generator=g) < 0.5 if draw(st.booleans()) else None
    return MaskedWord(mask_id, V, draw(st.floats(0.001, 0.99)), mask, draw(st.floats(0, 1 - mask)), words, tuple(special)), windows, seed


@settings(deadline=None, max_examples=150)
@given(masked_cases())
def test_masked_words_are_hidden_and_asked_about(case):
    o, windows, seed = case
    before, ids = windows.clone(), windows[:, :-1]
    out = o.batch(windows, seeded(seed))
    asked = out["targets"] != IGNORE
    assert torch.equal(windows, before)                                         # the windows themselves aren't touched
    assert out["ids"].shape == out["targets"].shape == ids.shape and out["ids"].dtype == out["targets"].dtype == torch.int64
    assert tokens_predicted(out) == asked.sum() >= 1
    assert torch.equal(out["targets"][asked], ids[asked]) and torch.equal(out["ids"][~asked], ids[~asked])
    assert not o.fixed[ids[asked]].any()                                        # no special token is asked about
    put = out["ids"][asked]
    assert ((put == o.mask_id) | ~o.fixed[put]).all()                           # and none is drawn but the mask
    if o.mask == 0: assert not (put == o.mask_id).any()
    if o.mask == 1: assert (put == o.mask_id).all()


@settings(deadline=None, max_examples=60)
@given(masked_cases())
def test_whole_words_are_hidden_or_not(case):
    o, windows, seed = case
    if o.starts is None: return
    ids, asked = windows[:, :-1], o.batch(windows, seeded(seed))["targets"] != IGNORE
    for row, hidden in zip(ids.tolist(), asked.tolist()):                       # the slow definition, token by token
        for t in range(1, len(row)):
            joined = not o.starts[row[t]] and not o.ends[row[t - 1]]
            if joined: assert hidden[t] == hidden[t - 1]


@settings(deadline=None, max_examples=60)
@given(masked_cases(), st.integers(2, 8))
def test_a_generator_repeats_and_leaves_the_global_one_alone(case, K):
    o, windows, seed = case
    for one in (o, NextWord(), *([Permutation(K)] if windows.shape[1] > 3 else [])):
        state = torch.random.get_rng_state()
        first, second = one.batch(windows, seeded(seed)), one.batch(windows, seeded(seed))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(first[k], second[k]) for k in first)
        torch.manual_seed(seed)                                                 # without one, the global state decides
        third = one.batch(windows)
        assert all(torch.equal(first[k], third[k]) for k in first)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(3, 40), st.integers(2, 9), st.integers(0, 2**31))
def test_next_word_and_permutation_ask_for_what_stands_there(B, T, K, seed):
    windows = torch.randint(50, (B, T + 1), generator=seeded(seed))
    out = NextWord().batch(windows)
    assert torch.equal(out["ids"], windows[:, :-1]) and torch.equal(out["targets"], windows[:, 1:]) and tokens_predicted(out) == B * T
    out = Permutation(K).batch(windows, seeded(seed))
    M, places = math.ceil(T / K), out["target_mapping"].argmax(-1)
    assert tokens_predicted(out) == B * M
    assert torch.equal(out["targets"], windows.gather(1, places))
    sees = out["perm_mask"].gather(1, places[..., None].expand(-1, -1, T))       # (B, M, T)
    assert not (sees & out["target_mapping"].bool()).any()                      # none sees itself
    assert torch.equal(sees.sum(-1), torch.arange(T - M, T).expand(B, M))       # each sees what came before it in the order


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("share,mask,random", [(0.15, 0.8, 0.1), (0.4, 0.5, 0.5), (0.05, 0.0, 0.0)])
def test_shares_are_what_was_asked_for(whole, share, mask, random):
    V, n = 1000, 400 * 500
    starts = torch.arange(V) % 2 == 0 if whole else None
    o, windows = MaskedWord(0, V, share, mask, random, starts, special=(0, 1)), torch.randint(2, V, (400, 501), generator=seeded(1))
    out = o.batch(windows, seeded(2))
    ids, asked = windows[:, :-1], out["targets"] != IGNORE
    hidden, put, was = int(asked.sum()), out["ids"][asked], ids[asked]
    def far(count, n, p, weight=1.0): return abs(count - n * p) / math.sqrt(n * p * (1 - p) * weight + 1e-9)
    # a word is drawn as one: tokens of a row vary together; E[length²] / E[length] = 3 for words of geometric length with mean 2
    assert far(hidden, n, share, 3.0 if whole else 1.0) < 5
    assert far(int((put == 0).sum()), hidden, mask) < 5
    assert far(int(((put != 0) & (put != was)).sum()), hidden, random * (1 - 1 / (V - 2))) < 5
    if random:                                                                  # drawn evenly from all ordinary tokens
        counts = torch.bincount(put[(put != 0) & (put != was)], minlength=V)[2:].double()
        chi2, df = float(((counts - counts.mean()) ** 2 / counts.mean()).sum()), V - 3
        assert abs(chi2 - df) / math.sqrt(2 * df) < 5


def test_one_token_is_hidden_however_small_the_share():
    o = MaskedWord(0, 10, share=1e-9)
    for seed in range(50): assert tokens_predicted(o.batch(torch.randint(1, 10, (1, 4), generator=seeded(seed)), seeded(seed))) == 1


def test_words_of_a_real_tokenizer(tokenizer):
    ids = torch.tensor([tokenizer.encode(TEXT[:len(TEXT) // 30].rstrip())])
    words = objective("masked-word", tokenizer, whole_words=True).words(ids)[0]
    found = [tokenizer.decode(ids[0][words == k]) for k in range(int(words.max()) + 1)]
    assert found == ["The", " king's", " men", " can't", " find", " 17", " apples", ".", "\n", "'", "Tis", " strange", ",", " said", ' "',
                     "Anne", '"', " (", "twice", "):", " naïve", ",", " déjà", " vu", "!", "\n", "The", " King's", " men", "."]


def test_bytes_of_one_letter_stay_together():
    t = BPETokenizer.train("plain words only", 258, special=("<|endoftext|>", MASK), progress=False)
    words = objective("masked-word", t, whole_words=True).words(torch.tensor([t.encode(" naïve été")]))[0]
    assert words.tolist() == [0] * 7 + [1] * 6


def test_ids_without_a_token_are_never_drawn():
    t = BPETokenizer.train(TEXT, 280, special=("<|endoftext|>", MASK), progress=False)
    t.special["<far>"] = 300
    t._special_names[300], t.vocab_size = "<far>", 301
    o = objective("masked-word", t)
    assert o.fixed[280:].all() and not o.fixed[:278].any() and len(o.ordinary) == 278
    assert word_starts(t)[280:].all() and word_ends(t)[280:].all()


@pytest.mark.parametrize("make,says", [
    (lambda t: objective("next", t), "next-word, masked-word or permutation"),
    (lambda t: objective("masked-word", CharTokenizer.train(TEXT)), "no <mask>"),
    (lambda t: objective("next-word", t, share=0.5), "no setting 'share': it takes none"),
    (lambda t: objective("masked-word", t, K=3), "share, mask, random, whole_words"),
    (lambda t: objective("masked-word", t, share=0.0), "share=0.0"),
    (lambda t: objective("masked-word", t, share=1), "share=1"),
    (lambda t: objective("masked-word", t, share=float("nan")), "share=nan"),
    (lambda t: objective("masked-word", t, mask=0.8, random=0.3), "make at most 1"),
    (lambda t: objective("masked-word", t, mask=-0.1), "mask=-0.1"),
    (lambda t: objective("masked-word", t, random=float("nan")), "random=nan"),
    (lambda t: objective("permutation", t, K=1), "K=1"),
    (lambda t: objective("permutation", t, K=2.5), "K=2.5"),
    (lambda t: MaskedWord(10, 10), "id 10 is outside"),
    (lambda t: MaskedWord(0, 10, special=(11,)), "id 11 is outside"),
    (lambda t: MaskedWord(0, 3, special=(1, 2)), "special"),
    (lambda t: MaskedWord(0, 10, word_starts=torch.ones(9, dtype=torch.bool)), "boolean (10,)"),
    (lambda t: MaskedWord(0, 10, word_starts=torch.ones(10)), "torch.float32"),
])
def test_bad_settings_are_refused(make, says, tokenizer):
    with pytest.raises(BookError) as e: make(tokenizer)
    assert says in str(e.value)


@pytest.mark.parametrize("windows,says", [
    (torch.zeros(3, 4), "torch.float32"), (torch.zeros(5, dtype=torch.long), "(5,)"), (torch.zeros(2, 1, dtype=torch.long), "(2, 1)"),
    (torch.zeros(0, 4, dtype=torch.long), "(0, 4)"),
])
@pytest.mark.parametrize("o", [NextWord(), MaskedWord(0, 10), Permutation()])
def test_bad_windows_are_refused(o, windows, says):
    with pytest.raises(BookError) as e: o.batch(windows)
    assert says in str(e.value)


def test_bad_batches_are_refused():
    with pytest.raises(BookError, match="none can be hidden"): MaskedWord(0, 10).batch(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(BookError, match="outside 0…9"): MaskedWord(0, 10).batch(torch.full((2, 5), 10))
    with pytest.raises(BookError, match="outside 0…9"): MaskedWord(0, 10).batch(torch.full((2, 5), -1))


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 12), st.floats(0, 1), st.floats(0, 400),
       st.sampled_from([IGNORE, 0, -1]))
def test_cross_entropy_is_torchs(seed, shape, V, smoothing, scale, ignored):
    g = seeded(seed)
    x = (torch.randn(*shape, V, generator=g, dtype=torch.float64) * scale).requires_grad_()
    y = torch.where(torch.rand(shape, generator=g) < 0.3, ignored, torch.randint(V, shape, generator=g))
    if not (y != ignored).any():
        with pytest.raises(BookError, match="No target counts"): cross_entropy(x, y, smoothing, ignored)
        return
    ours = cross_entropy(x, y, smoothing, ignored)
    theirs = F.cross_entropy(x.reshape(-1, V), y.reshape(-1), label_smoothing=smoothing, ignore_index=ignored)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)), rtol=1e-9, atol=1e-13)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=0, max_size=3))
def test_mse_is_torchs(seed, shape):
    x, y = (torch.randn(shape, generator=seeded(seed + k), dtype=torch.float64).requires_grad_() for k in (0, 1))
    torch.testing.assert_close(mse(x, y), F.mse_loss(x, y))
    for ours, theirs in zip(torch.autograd.grad(mse(x, y), (x, y)), torch.autograd.grad(F.mse_loss(x, y), (x, y))):
        torch.testing.assert_close(ours, theirs)


def test_closed_tokens_stay_closed():
    x = torch.tensor([[1.0, -math.inf, 2.0]], requires_grad=True)
    y = torch.tensor([2])
    torch.testing.assert_close(cross_entropy(x, y), F.cross_entropy(x, y))
    torch.testing.assert_close(torch.autograd.grad(cross_entropy(x, y), x), torch.autograd.grad(F.cross_entropy(x, y), x))
    assert log_softmax(x)[0, 1] == -math.inf


@pytest.mark.parametrize("call,says", [
    (lambda: cross_entropy(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long)), "one target for each row"),
    (lambda: cross_entropy(torch.zeros(2, 4), torch.tensor([0, 4])), "outside 0…3"),
    (lambda: cross_entropy(torch.zeros(2, 4), torch.tensor([0, -1])), "outside 0…3"),
    (lambda: cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), 1.5), "label_smoothing=1.5"),
    (lambda: mse(torch.zeros(3), torch.zeros(3, 1)), "differ"),
])
def test_bad_losses_are_refused(call, says):
    with pytest.raises(BookError) as e: call()
    assert says in str(e.value)
