"""What the chapters on Unigram can't show: any word against brute force, any text, any bytes, any cut, and files that are no model."""
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.corpora import BookError, synthetic_documents
from llmbook.sentencepiece_unigram import SentencePieceTokenizer, UnigramTokenizer, unigram_of_model
from llmbook.tokenization import load_tokenizer
from llmbook.unigram import Lattices, UnigramTrainer, best_cuts, expected_counts, nmt_nfkc, sample_cut, seed_pieces, sorted_suffixes, train_unigram, viterbi

CORPUS = "\n".join(synthetic_documents(150)) + "\ndef f(x):\n\treturn x ** 2  # naïve café\n日本語 🙂 12345 don't\n"
USUAL = UnigramTokenizer.train(CORPUS, 200, progress=False)
LOSSLESS = UnigramTokenizer.train(CORPUS, 500, normalization="identity", byte_fallback=True, progress=False)
LIBRARY = SentencePieceTokenizer.train(CORPUS, 70)
PLAIN = SentencePieceTokenizer.train(CORPUS, 320, normalization="identity", byte_fallback=True)
EVERY = {"usual": USUAL, "lossless": LOSSLESS, "library": LIBRARY, "library, lossless": PLAIN}
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=60) | st.text("ab '\n  1,é日🙂", max_size=60)
many = settings(max_examples=100, deadline=None)
pieces = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.floats(-9, -0.5), min_size=1, max_size=12)


def all_cuts(word, score, unknown):
    "Every cut of a word with its log probability, by brute force."
    if not word: yield [], 0.0
    for j in range(1, len(word) + 1):
        own = score.get(word[:j], unknown if j == 1 else None)
        if own is not None: yield from (([word[:j], *rest], own + s) for rest, s in all_cuts(word[j:], score, unknown))


@many
@given(st.text("abc", min_size=1, max_size=8), pieces)
def test_the_best_cut_and_the_counts_are_those_of_brute_force(word, score):
    cuts = list(all_cuts(word, score, -20.0))
    best = max(s for _, s in cuts)
    assert math.isclose(sum(score.get(p, -20.0) for p in viterbi(word, score, 4, -20.0)), best, abs_tol=1e-9)
    assert "".join(sample_cut(word, score, 4, -20.0, 0.5, random.Random(0))) == word
    ids = {p: i for i, p in enumerate(score)}
    graph, values = Lattices([word, "ab"], ids, 4), np.array([*score.values(), -20.0])
    counts, mean = expected_counts(graph, values, np.array([1.0, 0.0]))
    total = math.log(sum(math.exp(s) for _, s in cuts))
    want = [sum(cut.count(p) * math.exp(s - total) for cut, s in cuts) for p in score]
    np.testing.assert_allclose(counts[:-1], want, atol=1e-9)
    assert math.isclose(mean, total, abs_tol=1e-9)
    found, edges, words = best_cuts(graph, values)
    assert math.isclose(found[0], best, abs_tol=1e-9) and sum(graph.end[edges[words == 0]] - graph.start[edges[words == 0]]) == len(word)


@many
@given(st.text("ab", min_size=1, max_size=40))
def test_suffixes_are_sorted(text):
    order, common = sorted_suffixes(np.array([ord(c) for c in text]), 64)
    assert [text[i:] for i in order] == sorted(text[i:] for i in range(len(text)))
    assert all(text[a:a + k] == text[b:b + k] for a, b, k in zip(order, order[1:], common[1:]))


@many
@given(st.lists(st.text("ab ", min_size=1, max_size=12), min_size=1, max_size=5))
def test_seeds_occur_twice_and_hold_no_space_inside(lines):
    lines = [x for x in map(nmt_nfkc, lines) if x]
    if not lines: return
    seeds, score = seed_pieces(lines)
    assert len(set(seeds)) == len(seeds) and math.isclose(np.exp(score).sum(), 1.0, rel_tol=1e-9)
    for p in seeds: assert " " not in p[1:] and (len(p) == 1 or sum(line.startswith(p, i) for line in lines for i in range(len(line))) >= 2)


@many
@given(texts)
def test_cleaning_is_the_library_s(text):
    "Up to the order of accents, which the library leaves as it is."
    sentencepiece = pytest.importorskip("sentencepiece")
    rule = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")
    basic = "".join(c for c in text if ord(c) < 0x300 or 0x370 <= ord(c) < 0x590 or 0x4E00 <= ord(c) < 0xA000 or 0x1F300 <= ord(c) < 0x1F6FF)
    assert nmt_nfkc(basic) == rule.normalize(basic).replace("▁", " ")


@many
@given(texts)
def test_the_lossless_give_any_text_back(text):
    assert LOSSLESS.decode(LOSSLESS.encode(text)) == text
    if "▁" not in text: assert PLAIN.decode(PLAIN.encode(text)) == text, "the library itself takes ▁ for a space"
    assert LOSSLESS.decode(LOSSLESS.sample(text, seed=1)) == text
    assert nmt_nfkc(USUAL.decode(USUAL.encode("do the same"))) == " do the same"


@many
@given(st.binary(max_size=80))
def test_the_lossless_give_any_bytes_back(data):
    assert LOSSLESS.decode_bytes(LOSSLESS.encode_bytes(data)) == data
    with pytest.raises(BookError, match="byte-level"): USUAL.encode_bytes(data)


@pytest.mark.parametrize("name", EVERY)
@many
@given(text=texts, size=st.integers(1, 9))
def test_a_stream_cut_anywhere_is_the_whole(name, text, size):
    text = text.replace("▁", " ")
    chunks = [text[i:i + size] for i in range(0, len(text), size)]
    assert list(EVERY[name].encode_iterable(chunks)) == EVERY[name].encode(text)


@pytest.mark.parametrize("name", EVERY)
def test_a_long_stream_is_the_whole(name):
    text = (CORPUS + "  twice  \u200b spaced ☃☃ ") * 12
    assert list(EVERY[name].encode_iterable(text[i:i + 1000] for i in range(0, len(text), 1000))) == EVERY[name].encode(text)


@pytest.mark.parametrize("name", EVERY)
@many
@given(text=texts)
def test_saving_changes_nothing_and_specials_are_not_forged(name, text, tmp_path_factory):
    tokenizer = EVERY[name]
    if not hasattr(test_saving_changes_nothing_and_specials_are_not_forged, name):
        path = tmp_path_factory.mktemp("t") / "t.json"
        tokenizer.save(path)
        setattr(test_saving_changes_nothing_and_specials_are_not_forged, name, load_tokenizer(path))
    again = getattr(test_saving_changes_nothing_and_specials_are_not_forged, name)
    forged = text + "<|endoftext|>" + "".join(tokenizer.special)
    assert again.encode(forged) == tokenizer.encode(forged) and again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.special["<|endoftext|>"] not in tokenizer.encode(forged)
    assert tokenizer.encode("a<|endoftext|>b", allowed_special=["<|endoftext|>"]).count(tokenizer.special["<|endoftext|>"]) == 1


@pytest.mark.parametrize("lossless", [False, True])
@many
@given(text=st.text("the cat sat on 12 é☃日\n\u2585", max_size=80))
def test_the_library_s_pieces_give_the_library_s_ids(lossless, text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"model-{lossless}.model"
    path.write_bytes((PLAIN if lossless else LIBRARY).model)
    own, library = unigram_of_model(path), SentencePieceTokenizer.load(path)
    ours, theirs = own.encode(text), library.encode(text)
    value = lambda ids: sum(own.scores.get(own.decode_bytes([i]).decode(errors="replace"), 0.0) for i in ids)
    assert ours == theirs or abs(value(ours) - value(theirs)) < 1e-3, "only a tie may be decided otherwise"


def test_pieces_with_spaces_inside_are_found():
    "A model whose pieces cross words cuts the whole text at once."
    joined = UnigramTokenizer({" a": 0, " b": 1, " a b": 2}, {" a": -1.0, " b": -1.0, " a b": -1.5}, {"<unk>": 3}, 3)
    assert joined.encode("a b a") == [2, 0]


def sentence(call) -> str:
    with pytest.raises(BookError) as e: call()
    assert len(str(e.value)) > 20 and "\n" not in str(e.value)
    return str(e.value)


def test_bad_input_is_one_sentence(tmp_path):
    whole = LIBRARY.model
    for name, data in (("garbage", b"garbage" * 100), ("short", whole[:3000]), ("empty", b""), ("text", b"<html>not found</html>")):
        (tmp_path / name).write_bytes(data)
        for load in (SentencePieceTokenizer.load, unigram_of_model): assert name in sentence(lambda load=load, name=name: load(tmp_path / name))
    assert "can't be read" in sentence(lambda: SentencePieceTokenizer.load(tmp_path / "absent.model"))
    (tmp_path / "bpe.model").write_bytes(SentencePieceTokenizer.train(CORPUS, 70, kind="bpe").model)
    assert "another kind" in sentence(lambda: unigram_of_model(tmp_path / "bpe.model"))
    for make in (lambda n: UnigramTokenizer.train(CORPUS, n, progress=False), lambda n: SentencePieceTokenizer.train(CORPUS, n)): assert "few" in sentence(lambda make=make: make(20)) or "choose" in sentence(lambda make=make: make(20))
    for empty in ("", [], ["\n", "  "]):
        assert "empty" in sentence(lambda empty=empty: UnigramTokenizer.train(empty, 300, progress=False))
        assert "empty" in sentence(lambda empty=empty: SentencePieceTokenizer.train(empty, 300))
    assert "nfc" in sentence(lambda: UnigramTokenizer.train(CORPUS, 300, normalization="nfc"))
    assert "wordy" in sentence(lambda: SentencePieceTokenizer.train(CORPUS, 300, kind="wordy"))
    for tokenizer in EVERY.values(): assert "vocabulary" in sentence(lambda tokenizer=tokenizer: tokenizer.decode([10**6]))


def test_two_trainings_are_the_same():
    "The same text gives the same vocabulary, also as an iterable or from a file's lines."
    a, b = (train_unigram(source, 60, progress=False) for source in (CORPUS, CORPUS.split("\n")))
    assert a == b and len(a) == 60


def test_pruning_never_drops_a_letter():
    trainer = UnigramTrainer([" abab abba", " baba"])
    for _ in range(2):
        trainer.round()
        trainer.prune(3)
    assert {" ", "a", "b"} >= {p for p in trainer.pieces if len(p) == 1} and all(math.isfinite(s) for s in trainer.score)
