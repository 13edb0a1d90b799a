"""What the chapters can't show: any text, any bytes, any corpus, any cut, and input that makes no sense."""
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.bpe import BYTE_ORDER, GPT2_PATTERN, GPT4_PATTERN, SMOLLM_PATTERN, count_pieces, invisible, safe_pieces, train_fast, train_slow, visible
from llmbook.corpora import BookError, synthetic_documents
from llmbook.tokenization import BPETokenizer, CharTokenizer, WordTokenizer, load_tokenizer

CORPUS = synthetic_documents(60) + ["def f(x):\n\treturn x ** 2  # naïve café\n", "日本語 🙂 12345 don't"]
BPE = BPETokenizer.train(CORPUS, 400, progress=False)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=60) | st.text("ab '\n  1,é日🙂", max_size=60)
many = settings(max_examples=100, deadline=None)


@many
@given(texts)
def test_any_text_comes_back(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text and all(0 <= i < BPE.vocab_size for i in ids)


@many
@given(st.binary(max_size=80))
def test_any_bytes_come_back(data):
    assert BPE.decode_bytes(BPE.encode_bytes(data)) == data and invisible(visible(data)) == data


@many
@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=20), st.integers(0, 40), st.sampled_from(["lowest", "bytes"]))
def test_both_trainers_learn_the_same(words, merges, tie):
    counts = {w.encode(): words.count(w) for w in words}
    assert train_fast(counts, merges, tie) == train_slow(counts, merges, tie)


def test_the_two_rules_for_ties():
    "Three pairs occur once each; `lowest` takes the lowest ids, `bytes` the greatest bytes."
    counts = {b"ab": 1, b"cd": 1, b"zy": 1}
    assert train_slow(counts, 1, "lowest") == [(b"a", b"b")] and train_slow(counts, 1, "bytes") == [(b"z", b"y")]
    assert BYTE_ORDER.index(ord("!")) < BYTE_ORDER.index(0), "lowest means ids, and GPT-2 numbers printable bytes first"


@many
@given(texts, st.integers(1, 9), st.sampled_from([GPT2_PATTERN, GPT4_PATTERN, SMOLLM_PATTERN]))
def test_a_stream_cut_anywhere_is_the_whole(text, size, pattern):
    chunks = [text[i:i + size] for i in range(0, len(text), size)]
    tokenizer = BPETokenizer(BPE.vocab, BPE.merges, BPE.special, pattern)
    pieces = list(safe_pieces(chunks, least=1))
    assert "".join(pieces) == text
    assert [i for p in pieces for i in tokenizer.encode(p)] == tokenizer.encode(text) == list(tokenizer.encode_iterable(chunks))


def test_a_stream_takes_constant_memory():
    def peak(repeats):
        tracemalloc.start()
        total = sum(1 for _ in BPE.encode_iterable(CORPUS[0] for _ in range(repeats)))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size, total
    (small, n), (large, m) = peak(1_000), peak(8_000)
    assert m > 7 * n and large < 1.5 * small + 1_000_000


@many
@given(texts)
def test_text_never_forges_a_special_token(text):
    forged = text + "<|endoftext|>" + text
    end = BPE.special["<|endoftext|>"]
    assert end not in BPE.encode(forged) and BPE.decode(BPE.encode(forged)) == forged
    assert BPE.encode(forged, ["<|endoftext|>"]) == BPE.encode(text) + [end] + BPE.encode(text)


@pytest.mark.parametrize("tokenizer", [BPE, WordTokenizer.train(CORPUS, 100), CharTokenizer.train(CORPUS)], ids=lambda t: type(t).__name__)
def test_saved_and_loaded_it_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    again = load_tokenizer(tmp_path / "t.json")
    for text in [*CORPUS[:5], "unseen Wörter ❤ 77", ""]: assert again.encode(text) == tokenizer.encode(text)
    assert again.special == tokenizer.special and again.vocab_size == tokenizer.vocab_size
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_text_iterable_and_file_train_alike(tmp_path):
    text = " ".join(CORPUS)
    path = tmp_path / "corpus.txt"
    path.write_text(text, encoding="utf-8", newline="")
    trained = [BPETokenizer.train(source, 350, progress=False).merges for source in (text, [text], iter([text]), path)]
    assert all(m == trained[0] for m in trained)
    assert count_pieces(path, GPT2_PATTERN) == count_pieces(text, GPT2_PATTERN)


def test_tokenizers_opens_what_is_exported(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'llmbook[hub]'")
    for pattern in (GPT2_PATTERN, SMOLLM_PATTERN):
        book = BPETokenizer.train(CORPUS, 400, pattern=pattern, progress=False)
        book.to_tokenizer_json(tmp_path / "tokenizer.json")
        rust = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

        @many
        @given(texts)
        def same(text): assert rust.encode(text).ids == book.encode(text)
        same()


def test_a_long_run_without_a_space_is_no_trap():
    "Quadratic merging would take minutes for this; the heap takes a moment."
    text = "ab" * 100_000
    assert BPE.decode(BPE.encode(text)) == text


def sentence(call) -> str:
    with pytest.raises(BookError) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) > 30
    return str(e.value)


def test_bad_input_is_one_sentence(tmp_path):
    assert "256" in sentence(lambda: BPETokenizer.train("text", 200))
    assert "empty" in sentence(lambda: BPETokenizer.train([], 300)) and "empty" in sentence(lambda: WordTokenizer.train("", 10))
    assert "can't be read" in sentence(lambda: BPETokenizer.train(tmp_path / "none.txt", 300))
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert "UTF-8" in sentence(lambda: BPETokenizer.train(tmp_path / "latin.txt", 300))
    assert "tie" in sentence(lambda: BPETokenizer.train("text", 300, tie="random", progress=False))
    assert "vocabulary" in sentence(lambda: BPE.decode([10**9]))
    assert "special" in sentence(lambda: BPE.encode("<|x|>", ["<|x|>"]))
    assert "special" in sentence(lambda: BPETokenizer.train("text", 300, special=("<|a b|>",), progress=False))
    assert "can't be read" in sentence(lambda: load_tokenizer(tmp_path / "none.json"))


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"kind": "Cake"}', '{"kind": "BPETokenizer"}', '{"kind": "BPETokenizer", "vocab": 3, "merges": [], "special": {}, "pattern": "."}',
                                    '{"model": {}}', '{"model": {"type": "Unigram"}}'])
def test_a_damaged_file_is_one_sentence(tmp_path, damage):
    path = tmp_path / "t.json"
    path.write_text(damage)
    assert str(path) in sentence(lambda: load_tokenizer(path))


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    BPE.save(path)
    before = path.read_text()
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError): CharTokenizer.train("abc").save(path)
    monkeypatch.undo()
    assert path.read_text() == before and json.loads(before)["kind"] == "BPETokenizer"
