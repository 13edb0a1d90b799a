"Examples as batches over random lengths, models and forms; bad input; resuming."
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.attention import document_mask, places_in
from llmbook.corpora import BookError
from llmbook.examples import (TEMPLATES, ExampleSampler, Piece, chatml, class_weights, encode_pieces, encode_task, example_of,
                              first_fit, grouped, headings, pack_batch, pad_batch, preview, shorten, wasted)
from llmbook.gpt import GPT, GPTConfig
from llmbook.objectives import IGNORE, tokens_predicted
from llmbook.pretrained import chat_prompt
from llmbook.task_data import Alpaca, Chat, Completion, Labelled, TaskData
from llmbook.tokenization import BPETokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROWS = [Labelled(text="A warm film, and funny.", label="fresh"), Completion(prompt="Is 4 even?", completion=" yes"),
        Alpaca(instruction="Add.", input="2 and 2", output="4"), Alpaca(instruction="Say hi.", output="Hi."),
        Chat(messages=[dict(role="system", content="Be brief."), dict(role="user", content="2 + 2?"), dict(role="assistant", content="4"),
                       dict(role="user", content="And 3 more?"), dict(role="assistant", content="7")])]
ANSWERS = [[" fresh"], [" yes"], ["4"], ["Hi."], ["4", "7"]]


@pytest.fixture(scope="module")
def tokenizer(): return BPETokenizer.train("A warm film, and funny. Is 4 even? yes. ### User: Add 2 and 2 more. " * 20, 300, special=SPECIAL, progress=False)


def task(*rows, format="chat"): return TaskData(format, list(rows), list(range(1, len(rows) + 1)), [], [])


def examples(lengths, V=30, seed=0):
    rng = np.random.default_rng(seed)
    return [example_of(rng.integers(V, size=n + 1).tolist(), [False] + (rng.random(n - 1) < 0.5).tolist() + [True]) for n in lengths]


def model(family="llama", seed=0):
    torch.manual_seed(seed)
    return GPT(getattr(GPTConfig, family)(vocab_size=30, context=24, n_layer=2, n_head=2, n_embd=8)).double()


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_and_their_ends_are_learned_and_nothing_else(tokenizer, template):
    end = "<|im_end|>" if template == "chatml" else "<|endoftext|>"
    for row, answers in zip(ROWS, ANSWERS):
        ids, learn = encode_pieces(TEMPLATES[template](row), tokenizer)
        said = "".join(tokenizer.decode([i]) for i, l in zip(ids, learn) if l)
        assert said == "".join(a + end for a in answers)
        e = example_of(ids, learn)
        assert len(e.ids) == len(e.targets) == len(ids) - 1 and all(t in (IGNORE, i) for t, i in zip(e.targets, ids[1:]))


def test_pieces_are_the_chat_prompt(tokenizer):
    messages = [m.model_dump() for m in ROWS[-1].messages]
    assert "".join(p.text for p in chatml(ROWS[-1])) == chat_prompt(messages, reply=False)
    assert encode_pieces(chatml(ROWS[-1]), tokenizer)[0] == tokenizer.encode(chat_prompt(messages, reply=False), allowed_special=SPECIAL)


def test_a_text_cannot_forge_special_tokens(tokenizer):
    row = Completion(prompt="a<|endoftext|>b", completion="c<|im_end|>d<|endoftext|>")
    ids, learn = encode_pieces(headings(row), tokenizer)
    assert [i for i in ids if i in tokenizer.special.values()] == [tokenizer.special["<|endoftext|>"]] and ids[-1] == tokenizer.special["<|endoftext|>"]
    with pytest.raises(BookError, match="^Line 1: .*special token"):
        encode_task(task(Chat(messages=[dict(role="user", content="<|im_end|>"), dict(role="assistant", content="x")])), tokenizer, 64)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(0, 10**6))
def test_truncation_keeps_answers_whole_or_leaves_out(tokenizer, room, seed):
    rng = random.Random(seed)
    pieces = [Piece("".join(rng.choice("ab c.é") for _ in range(rng.randrange(30))), learn := rng.random() < 0.3, False, not learn and rng.random() < 0.7) for _ in range(6)]
    fixed = sum(len(encode_pieces([p], tokenizer)[0]) for p in pieces if not p.cut)
    kept = shorten(pieces, tokenizer, room)
    if kept is None:
        assert fixed + sum(p.cut and p.text != "" for p in pieces) > room
        return
    ids, learn = kept
    assert len(ids) == len(learn) <= max(room, 0)
    assert [i for i, l in zip(ids, learn) if l] == [i for p in pieces if p.learn for i in encode_pieces([p], tokenizer)[0]]


def test_encode_task_accounts_for_every_row(tokenizer):
    long, huge = Completion(prompt="film " * 50, completion=" yes"), Completion(prompt="a", completion=" film" * 50)
    data = task(ROWS[1], long, huge, format="completion")
    out = encode_task(data, tokenizer, 20, "headings")
    assert (out.lines, out.cut, out.left_out) == ([1, 2], [2], [3]) and max(out.lengths) == 20 and "1 prompts cut, 1 examples left out" in repr(out)
    out = encode_task(data, tokenizer, 20, "headings", too_long="leave out")
    assert (out.lines, out.cut, out.left_out) == ([1], [], [2, 3])
    with pytest.raises(BookError, match="Line 2: .* tokens are longer than the context of 20"): encode_task(data, tokenizer, 20, "headings", too_long="refuse")
    with pytest.raises(BookError, match="No example fits"): encode_task(task(huge), tokenizer, 5)
    with pytest.raises(BookError, match="no template 'x': choose one of chatml, headings"): encode_task(data, tokenizer, 20, "x")
    with pytest.raises(BookError, match="choose cut, leave out or refuse"): encode_task(data, tokenizer, 20, too_long="drop")
    plain = BPETokenizer.train("some words", 260, special=("<|endoftext|>",), progress=False)
    with pytest.raises(BookError, match="no special token <.im_start.>: choose the template headings"): encode_task(task(ROWS[-1]), plain, 99, "chatml")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(0, 99), st.sampled_from(["gpt2", "llama"]))
def test_any_batch_gives_the_loss_of_its_examples_alone(lengths, seed, family):
    made, net = examples(lengths, seed=seed), model(family, seed)
    rows = [[made[i] for i in row] for row in first_fit(lengths, 24)]
    asked = [tokens_predicted(pad_batch([e], 0)) for e in made]
    with torch.no_grad():
        alone = sum(net.loss(**pad_batch([e], 0)) * n for e, n in zip(made, asked)) / sum(asked)
        for batch in (pad_batch(made, 0), pad_batch(made, 0, "left"), pad_batch(made, 0, width=24), pack_batch(rows, 0), pack_batch(rows, 0, width=24)):
            assert tokens_predicted(batch) == sum(asked)
            torch.testing.assert_close(net.loss(**batch), alone, rtol=0, atol=1e-12)


def test_padding_is_never_looked_at():
    made, net = examples([3, 9]), model()
    for side in ("right", "left"):
        a, b = pad_batch(made, 0, side), pad_batch(made, 7, side)
        assert not torch.equal(a["ids"], b["ids"])
        with torch.no_grad(): torch.testing.assert_close(net.loss(**a), net.loss(**b), rtol=0, atol=0)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4))
def test_places_and_masks_by_their_definition(numbers):
    documents = torch.tensor(numbers)
    places, mask = places_in(documents), document_mask(documents)
    for b, row in enumerate(numbers):
        for t in range(7):
            begin = t
            while begin and row[begin - 1] == row[t]: begin -= 1
            assert places[b, t] == t - begin
            assert mask[b, 0, t].tolist() == [row[s] == row[t] and s <= t for s in range(7)]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_first_fit_places_every_example_once_in_the_first_row_with_room(lengths, room):
    rows = first_fit(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    left = [room] * len(rows)
    for i, n in enumerate(lengths):
        at = next(r for r, row in enumerate(rows) if i in row)
        assert all(free < n for free in left[:at]) and left[at] >= n
        left[at] -= n


@pytest.mark.parametrize("way", ExampleSampler.ways)
def test_sampler_gives_each_example_once_an_epoch_and_resumes(way):
    made = examples(np.random.default_rng(3).integers(2, 24, size=50).tolist())
    sampler = ExampleSampler(made, 4, 0, way, seed=5)
    first = [sampler.next() for _ in range(len(sampler))]
    targets = sorted(t for b in first for t in b["targets"].flatten().tolist() if t != IGNORE)
    assert targets == sorted(t for e in made for t in e.targets if t != IGNORE)
    assert 0 <= wasted(first, sampler.lengths) < 1
    second = sampler.next()
    assert not all(torch.equal(a, b) for a, b in zip(first[0].values(), second.values()) if a.shape == b.shape) or first[0]["ids"].shape != second["ids"].shape
    state, ahead = sampler.state_dict(), [sampler.next() for _ in range(len(sampler) + 3)]
    other = ExampleSampler(made, 4, 0, way, seed=1)
    other.load_state_dict(state)
    for batch in ahead:
        again = other.next()
        assert batch.keys() == again.keys() and all(torch.equal(batch[k], again[k]) for k in batch)


def test_grouped_batches_hold_every_example_and_are_alike_in_length():
    lengths = np.random.default_rng(0).integers(1, 300, size=1003).tolist()
    batches = grouped(lengths, 8, np.random.default_rng(1))
    assert sorted(i for b in batches for i in b) == list(range(1003)) and max(map(len, batches)) == 8
    spread = lambda bs: np.mean([max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in bs])
    order = np.random.default_rng(2).permutation(1003)
    assert spread(batches) < 0.1 * spread([order[i:i + 8] for i in range(0, 1003, 8)])


def test_class_weights_have_mean_one_and_even_out():
    for counts in ([5, 5], [90, 9, 1], [1]):
        n, w = torch.tensor(counts).double(), class_weights(counts)
        torch.testing.assert_close((n * w).sum(), n.sum())
        torch.testing.assert_close(n * w, torch.full_like(n, n.sum() / len(n)))
        torch.testing.assert_close(class_weights(counts, 0), torch.ones_like(n))
    for wrong in ([], [3, 0]):
        with pytest.raises(BookError, match="without rows has no weight"): class_weights(wrong)


def test_preview_shows_anything_as_text(tokenizer):
    html = preview(Completion(prompt="<script>alert(1)</script>\n & more", completion=" <b>yes</b>"), tokenizer).html
    assert "<script" not in html and "<b>" not in html and "&lt;" in html
    assert "cut from its prompt" in preview(Completion(prompt="film " * 50, completion=" yes"), tokenizer, 20).html
    assert "left out" in preview(Completion(prompt="film", completion=" yes" * 50), tokenizer, 20).html


def test_bad_batches_are_one_sentence():
    made = examples([3, 9])
    with pytest.raises(BookError, match="choose right or left"): pad_batch(made, 0, "middle")
    with pytest.raises(BookError, match="9 tokens doesn't fit into rows of 5"): pad_batch(made, 0, width=5)
    with pytest.raises(BookError, match="9 tokens doesn't fit into rows of 5"): first_fit([3, 9], 5)
    with pytest.raises(BookError, match="way='x' can't be used"): ExampleSampler(made, 2, 0, "x")
    with pytest.raises(BookError, match="at least one example"): ExampleSampler([], 2, 0)
    with pytest.raises(BookError, match="give one number a token"): model()(torch.zeros(1, 4, dtype=torch.long), documents=torch.zeros(1, 3, dtype=torch.long))
