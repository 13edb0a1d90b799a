"""The playground in a real browser: the page's script gives Python's ids on any text, and typing, choosing and stepping work without a kernel."""
import random

import pytest

from llmbook.corpora import BookError, synthetic_documents
from llmbook.playground import Playground, merge_steps, only_first_merges
from llmbook.sentencepiece_unigram import UnigramTokenizer
from llmbook.tokenization import BPETokenizer, CharTokenizer, MergingTokenizer, WordTokenizer

CORPUS = "\n".join(synthetic_documents(120)) + "\ndef f(x):\n\treturn x ** 2  # naïve café ﬁn Ⅷ\n日本語 🙂👍🏽 12345 don't WE'LL\n"
HARD = ["", " ", "\n\n  \n", "Hello  world ", "don't DON'T we'll I'D", "1234567890 12.5%", "naïve café Ω≈ç√", "日本語のテキスト", "🙂👍🏽👨‍👩‍👧", "\u200b\u00a0x\u3000y", "a\r\nb\tc", "<|endoftext|>",
        "x" * 300, "ab" * 200, "'s's ' s", "ﬁ ½ ² ①™ ～ ｶﾞ", "مرحبا بالعالم", "\x01\x7f\x85\u2028z", "A" + "\u0301" * 3, "▁ ▁a", "</script><b>&amp;", "\x1c\x1f \u180e\ufeff"]


def many_strings() -> list[str]:
    rng = random.Random(0)
    pool = [*"abc  \n\t'1é日ﬁ🙂,", "the ", " cat", "\u0301", "\u200b", "ﷺ"]
    return HARD + ["".join(rng.choices(pool, k=rng.randrange(1, 25))) for _ in range(150)]


@pytest.fixture(scope="module")
def tokenizers():
    return {"BPE": BPETokenizer.train(CORPUS, 400, progress=False), "Unigram": UnigramTokenizer.train(CORPUS, 200, progress=False), "words": WordTokenizer.train(CORPUS, 80),
            "lossless": UnigramTokenizer.train(CORPUS, 400, normalization="identity", byte_fallback=True, progress=False), "characters": CharTokenizer.train(CORPUS)}


@pytest.mark.browser
def test_the_page_s_ids_are_python_s(tokenizers, visit):
    page = visit("about:").page
    page.set_content(Playground(tokenizers, "the cat").to_html())
    texts = many_strings()
    for name, tokenizer in tokenizers.items():
        found = page.evaluate("([name, texts]) => { const root = document.querySelector('.llmbook-playground'); return texts.map(t => window.llmbookPlayground.encode(root, name, t)); }", [name, texts])
        wrong = [(t, ours, theirs) for t, ours, theirs in zip(texts, map(tokenizer.encode, texts), found) if ours != theirs]
        assert wrong == [], f"{name}: {wrong[:3]}"


def twin(m: dict):
    "Python's tokenizer for a model that rides in a page."
    pieces = [p.encode() if isinstance(p, str) else bytes(p) for p in m["pieces"]]
    if m["kind"] == "bpe":
        ids = {p: i for i, p in reversed(list(enumerate(pieces))) if p}
        return MergingTokenizer(ids, [(pieces[a], pieces[b]) for a, b in m["merges"]], {})
    own = {p: i for i, p in enumerate(m["pieces"]) if isinstance(p, str)}
    return UnigramTokenizer(own, {p: m["scores"][i] for p, i in own.items()}, {"<|unknown|>": m["unknown"]}, m["unknown"], m["byteIds"], m["normalization"])


@pytest.mark.browser
def test_on_the_site(site, visit):
    _, base = site
    v = visit(base)
    page = v.open("01c_playground.html")
    models = page.evaluate("JSON.parse(document.querySelector('.llmbook-playground script').textContent)")
    for name in [n for n, m in models.items() if m["kind"] != "words"]:
        found = page.evaluate("([name, texts]) => texts.map(t => document.querySelector('.llmbook-playground').models[name].encode(t))", [name, HARD])
        assert found == [twin(models[name]).encode(t) for t in HARD], name
    root = page.locator(".llmbook-playground")
    shown = lambda: (root.locator(".llmbook-tokens").inner_text(), root.locator(".llmbook-counts").inner_text(), root.locator("output").inner_text())
    states = [shown()]
    root.locator("textarea").fill("")
    root.locator("textarea").press_sequentially("Tokenizers <b>everywhere</b>")
    states.append(shown())
    root.locator("input").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
        states.append(shown())
    root.locator("select").select_option(label="Unigram")
    states.append(shown())
    assert len(set(states)) == len(states) and not root.locator("input").is_visible()
    assert root.locator(".llmbook-tokens b").count() == 0 and v.faults == []


def test_steps_grow_into_the_encoding(tokenizers):
    bpe = tokenizers["BPE"]
    for text in ["the cats sat on the mat", "日本語 123", *many_strings()[:40]]:
        steps = merge_steps(bpe, text)
        assert only_first_merges(bpe, steps[-1] + 1 if steps else 0).encode(text) == bpe.encode(text)
        lengths = [len(only_first_merges(bpe, r + 1).encode(text)) for r in steps]
        assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == len(lengths), "each step shortens the text"


def test_live_controls_show_what_the_page_shows(tokenizers):
    live = Playground(tokenizers, "the cat sat").live()
    text, row, boxes, counts = live.children[1], live.children[2], live.children[3], live.children[4]
    method, step, said = row.children
    before = boxes.value
    text.value = "the dogs ran"
    assert boxes.value != before and str(len(tokenizers["BPE"].encode("the dogs ran"))) in counts.value
    step.value = 0
    assert "nothing merged" in said.value
    method.value = "Unigram"
    assert step.layout.display == "none"


def test_bad_input():
    for make in (lambda: Playground({}, "x"), lambda: Playground({"x": object()}, "x")):
        with pytest.raises(BookError) as e: make()
        assert "\n" not in str(e.value)
