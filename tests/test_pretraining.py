"Recipes end to end on synthetic text, and what a model may know about a hidden word."
import pytest
import torch

from llmbook.corpora import BookError, TokenStream
from llmbook.gpt import GPT
from llmbook.objectives import objective
from llmbook.pretraining import RECIPES, Recipe, build, features, hidden_word, linear_probe, prepare, recipe_named, recipe_trainer, same_questions

SMALL = dict(n_layer=2, n_head=2, n_embd=16)
FAMILIES = {"gpt": ("next-word", dict(context=32, n_inner=24)), "bert": ("masked-word", dict(context=32, dropout=0.0)), "xlnet": ("permutation", dict(dropout=0.0))}


def small(family):
    name, shape = FAMILIES[family]
    return Recipe(family, name, {**SMALL, **shape}, dict(steps=4, batch_size=2, context=16, optimizer="muon", precision="fp32", eval_batches=1), texts=("synthetic",), vocab_size=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(small("gpt"), tmp_path_factory.mktemp("recipe"), progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_becomes_a_model(data, tmp_path, family):
    history = recipe_trainer(small(family), tmp_path, data, progress=False).fit()
    assert [r["step"] for r in history if "loss" in r] == [1, 2, 3, 4]
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_what_was_prepared_is_opened_again(data, tmp_path):
    first = prepare(small("gpt"), tmp_path / "data", progress=False)
    again = prepare(small("gpt"), tmp_path / "data", progress=False)
    assert first.train.sha256 == again.train.sha256 == data.train.sha256 and isinstance(again.valid, TokenStream)
    assert again.tokenizer.encode("a river") == data.tokenizer.encode("a river")


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_fit_the_limits(name):
    recipe = RECIPES[name]
    assert sum(p.numel() for p in build(recipe).parameters()) * 2 < 12e6  # bytes in bf16
    assert all(torch.equal(a, b) for a, b in zip(build(recipe).parameters(), build(recipe).parameters()))  # the seed decides


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("place", [1, 7, 15])
def test_a_hidden_word_is_hidden_and_the_right_side_only_seen_if_asked(data, family, both, place):
    if family == "gpt" and both:
        with pytest.raises(BookError, match="can't see"): hidden_word(build(small("gpt")), torch.zeros(1, 4, dtype=torch.long), 1, 0, True)
        return
    model, mask = build(small(family)).eval(), data.tokenizer.special["<mask>"]
    ids = torch.randint(256, (3, 16))
    answer = hidden_word(model, ids, place, mask, both)
    assert answer.shape == (3, 300) and torch.allclose(answer.exp().sum(-1), torch.ones(3), atol=1e-5)
    def changed(at):
        other = ids.clone()
        other[:, at] = (other[:, at] + 1) % 256
        return not torch.equal(hidden_word(model, other, place, mask, both), answer)
    assert not changed(place) and changed(place - 1)
    if place < 15: assert changed(15) == both


def test_features_do_not_depend_on_the_company(data):
    texts = ["a river", "the old man and the sea " * 3, "snow", ""]
    for family in FAMILIES:
        model = build(small(family)).eval()
        together = features(model, data.tokenizer, texts, length=16)
        alone = torch.cat([features(model, data.tokenizer, [t], length=16) for t in texts])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_probe_finds_what_is_there():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] + x[:, 1] > 0).long()
    assert linear_probe((x[:300], y[:300]), (x[300:], y[300:])).float().mean() > 0.9
    noise = torch.randint(2, (400,), generator=torch.Generator().manual_seed(1))
    assert abs(linear_probe((x[:300], noise[:300]), (x[300:], noise[300:])).float().mean() - 0.5) < 0.2


def test_the_same_questions_have_as_many_answers(data):
    for family in FAMILIES:
        model = build(small(family)).train()
        found = same_questions(model, data.valid, data.tokenizer.special["<mask>"], length=16, places=(4, 9), most=10)
        assert {k: len(v) for k, v in found.items()} == ({"left": 20} if isinstance(model, GPT) else {"left": 20, "both": 20}) and model.training


def test_unknown_names():
    with pytest.raises(BookError, match="tiny-gpt, tiny-bert, tiny-xlnet"): recipe_named("tiny")
    with pytest.raises(BookError, match="gpt, bert or xlnet"): build(Recipe("rnn", "next-word", {}, {}))
    with pytest.raises(BookError, match="next-word, masked-word or permutation"): objective("last-word", None)
