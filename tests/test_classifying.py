"""Labels: what is refused, what survives a crash, and what holds for many seeds."""
import json

import numpy as np
import pytest
import torch
from shared import pull_the_plug

from llmbook.bert import Bert, BertConfig
from llmbook.classifying import (
    Classifier,
    GradualUnfreezing,
    LabelledRows,
    RowSampler,
    RowTrainer,
    compared,
    depth,
    layer_groups,
    load_body,
    load_classifier,
    predict,
    rows_config,
    train_top,
    worst,
)
from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig
from llmbook.tokenization import BPETokenizer
from llmbook.wordpiece import WordPieceTokenizer

SMALL = dict(vocab_size=275, n_layer=2, n_head=2, n_embd=16, context=64)


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["the cat sat on the mat and the dog ate the fish " * 20], 275, progress=False)


def body(family: str, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig.llama(**SMALL)) if family == "gpt" else Bert(BertConfig(**SMALL, dropout=0.0), pooler=False)


def rows(tokenizer, n=40):
    texts = ["the cat sat " * (1 + i % 5) if i % 2 else "a dog ate fish " * (1 + i % 3) for i in range(n)]
    return LabelledRows(texts, ["cat" if i % 2 else "dog" for i in range(n)], ["cat", "dog"], tokenizer, 32)


def trainer(tokenizer, folder, family="bert", model=None, **settings):
    data = rows(tokenizer)
    callbacks = settings.pop("callbacks", ())
    groups = settings.pop("groups", None)
    model = model or Classifier(body(family), ["cat", "dog"])
    config = rows_config(data, data, **{**dict(steps=12, batch_size=8, lr=3e-3, precision="fp32"), **settings})
    return RowTrainer(model, config, data, data, folder, tokenizer, progress=False, callbacks=callbacks, groups=groups and groups(model))


@pytest.mark.parametrize("n,batch", [(1, 4), (7, 4), (64, 4), (100, 7), (500, 16)])
def test_every_row_is_drawn_once_an_epoch_and_again_after_resuming(n, batch):
    lengths = np.random.default_rng(0).integers(1, 50, n)
    sampler, epochs = RowSampler(lengths, batch, seed=3), []
    for _ in range(2): epochs.append([sampler.next() for _ in range(-(-n // batch))])
    for drawn in epochs: assert sorted(np.concatenate(drawn)) == list(range(n))
    again = RowSampler(lengths, batch, seed=3)
    again.load_state_dict(json.loads(json.dumps(dict(epoch=0, position=1))))
    for expected in [*epochs[0][1:], *epochs[1]]: assert np.array_equal(again.next(), expected)


@pytest.mark.parametrize("family,pooling", [("bert", "mean"), ("bert", "first"), ("bert", "last"), ("gpt", "mean"), ("gpt", "last")])
def test_filling_and_neighbours_change_nothing(tokenizer, family, pooling):
    data = rows(tokenizer)
    model = Classifier(body(family), ["cat", "dog"], pooling).eval()
    together = predict(model, data)
    for i in range(0, len(data.ids), 5):
        alone = data.batch([i])
        with torch.no_grad(): torch.testing.assert_close(model(alone["ids"], alone["mask"]).softmax(-1)[0], together[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_saved_and_loaded_is_the_same(tokenizer, family, tmp_path):
    data, model = rows(tokenizer), Classifier(body(family), ["cat", "dog"], weights=[1.0, 3.0])
    model.save_pretrained(tmp_path / "m")
    again = load_classifier(tmp_path / "m")
    assert again.labels == ["cat", "dog"] and again.weights.tolist() == [1.0, 3.0] and torch.equal(predict(model, data), predict(again, data))


@pytest.mark.parametrize("options", [{}, {"callbacks": [GradualUnfreezing(4)]}, {"groups": lambda m: layer_groups(m, 0.5)}, {"accumulate": 2}], ids=["plain", "unfreezing", "groups", "accumulate"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tokenizer, tmp_path, options):
    whole = trainer(tokenizer, tmp_path / "whole", **options)
    whole.fit()
    broken = trainer(tokenizer, tmp_path / "broken", checkpoint_every=5, **options)
    pull_the_plug(broken, 7)
    resumed = trainer(tokenizer, tmp_path / "broken", checkpoint_every=5, **options)
    resumed.fit()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(a, b)
    keep = lambda t: [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in t.history]
    assert keep(whole) == keep(resumed)


def test_it_learns_and_counts_real_tokens(tokenizer, tmp_path):
    done = trainer(tokenizer, tmp_path / "run", steps=40)
    history = done.fit()
    assert done.evaluate()["accuracy"] == 1.0
    assert [r for r in history if "tokens" in r][4]["tokens"] == len(rows(tokenizer)), "five batches of eight are one epoch of forty rows"
    assert (tmp_path / "run" / "model" / "config.json").exists() and load_classifier(tmp_path / "run" / "model").labels == ["cat", "dog"]


def test_depths_cover_all_parameters_once():
    for family in ("bert", "gpt"):
        model = Classifier(body(family), ["a", "b"])
        found = {depth(n, 2) for n, _ in model.named_parameters()}
        assert found == {0, 1, 2, 3}
        assert sum(p.numel() for g in layer_groups(model, 0.5) for p in g["params"]) == sum(p.numel() for p in model.parameters())
        assert train_top(model, 0) < train_top(model, 1) < train_top(model, 2) < train_top(model, 3) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("make,said", [
    (lambda t: Classifier(body("bert"), ["a"]), "two different"),
    (lambda t: Classifier(body("bert"), ["a", "a"]), "two different"),
    (lambda t: Classifier(body("bert"), ["a", "b"], "max"), "mean"),
    (lambda t: Classifier(body("gpt"), ["a", "b"], "first"), "decoder"),
    (lambda t: Classifier(body("bert"), ["a", "b"], weights=[1.0]), "above 0"),
    (lambda t: Classifier(body("bert"), ["a", "b"], weights=[1.0, float("nan")]), "above 0"),
    (lambda t: LabelledRows(["x", "y"], ["cat", "fish"], ["cat", "dog"], t), "'fish'"),
    (lambda t: LabelledRows(["x"], ["cat"], ["cat", "dog"], t), "at least 2"),
    (lambda t: LabelledRows(["x", "y"], ["cat", "dog"], ["cat", "dog"], BPETokenizer.train(["abc"], 257, special=("<|x|>",), progress=False)), "endoftext"),
    (lambda t: layer_groups(Classifier(body("bert"), ["a", "b"]), 0.0), "decay"),
    (lambda t: GradualUnfreezing(0), "every=0"),
    (lambda t: rows_config(rows(t), rows(t), epochs=0), "epochs=0"),
    (lambda t: load_body("tiny-bart"), "tiny-bart"),
    (lambda t: WordPieceTokenizer({"a": 0}, {"[CLS]": 1}), "UNK")])
def test_bad_input_is_a_sentence(tokenizer, make, said):
    with pytest.raises(BookError, match=said): make(tokenizer)


def test_a_folder_that_is_no_classifier_is_named(tmp_path):
    body("gpt").save_pretrained(tmp_path / "gpt")
    with pytest.raises(BookError, match="not a classifier"): load_classifier(tmp_path / "gpt")
    Classifier(body("bert"), ["a", "b"]).save_pretrained(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "labels": None}))
    with pytest.raises(BookError, match="describe a classifier"): load_classifier(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "labels": ["a", "b", "c"]}))
    with pytest.raises(BookError, match="head"): load_classifier(tmp_path / "c")


def test_a_comparison_knows_a_clear_difference_from_none():
    truth = torch.randint(2, (400,), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(2, (400,), generator=torch.Generator().manual_seed(1))
    table = compared(truth, {"right": truth, "same": truth.clone(), "coin": noise}, "right")
    assert table[0]["accuracy"].startswith("100.0") and table[1]["right is better by"] == "0.0 (0.0 to 0.0)"
    low = float(table[2]["right is better by"].split("(")[1].split(" to")[0])
    assert low > 40
    assert worst(["x", "y"], [0, 1], torch.tensor([[0.9, 0.1], [0.8, 0.2]]), ["a", "b"], 1)[0]["text"] == "y"


def test_wordpiece_is_read_by_load_tokenizer(tmp_path):
    from llmbook.tokenization import load_tokenizer
    t = WordPieceTokenizer({"[UNK]": 0, "un": 1, "##able": 2}, {"[UNK]": 0})
    t.save(tmp_path / "own.json"), t.to_tokenizer_json(tmp_path / "theirs.json")
    for name in ("own.json", "theirs.json"): assert load_tokenizer(tmp_path / name).encode("UNable é") == [1, 2, 0]
    data = json.loads((tmp_path / "theirs.json").read_text())
    (tmp_path / "cased.json").write_text(json.dumps({**data, "normalizer": {"lowercase": False}}))
    with pytest.raises(BookError, match="uncased"): load_tokenizer(tmp_path / "cased.json")
    (tmp_path / "damaged.json").write_text(json.dumps({**data, "model": {"type": "WordPiece"}}))
    with pytest.raises(BookError, match="damaged"): load_tokenizer(tmp_path / "damaged.json")
