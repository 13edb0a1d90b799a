"The models of the package: loadable offline, small, and only handed on from a finished run of their own recipe."
import json
import shutil
import socket

import pytest
import torch

from llmbook import training
from llmbook.corpora import BookError
from llmbook.gpt import GPT
from llmbook.pretrained import locate, shipped_models
from llmbook.pretraining import RECIPES, Recipe, recipe_trainer
from llmbook.tiny import condensed, load_tiny, ship, tiny_history
from llmbook.training import environment


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "Neither a network nor a filled cache."
    def refuse(*args, **kwargs): raise OSError("no network in this test")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("LLMBOOK_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", RECIPES)
def test_loads_by_name_without_a_network(no_network, name):
    model, tokenizer = load_tiny(name)
    assert not model.training and all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in model.parameters())
    assert tokenizer.decode(tokenizer.encode("To be, or not to be")) == "To be, or not to be"
    assert tokenizer.vocab_size == model.config.vocab_size == RECIPES[name].vocab_size


@pytest.mark.parametrize("name", RECIPES)
def test_is_small_and_complete(name):
    folder = locate(name)
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.json", "history.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "model.safetensors").stat().st_size < 12_000_000
    losses = [row["valid_loss"] for row in tiny_history(name)["evaluations"]]
    assert tiny_history(name)["evaluations"][-1]["step"] == RECIPES[name].train["steps"] and losses[-1] < losses[0] - 2
    assert f"llmbook pretrain --recipe {name}" in (folder / "README.md").read_text()


def test_only_recipes_are_shipped():
    assert set(shipped_models()) == set(RECIPES)
    with pytest.raises(BookError, match="There is no recipe 'tiny-t5'"): load_tiny("tiny-t5")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    shutil.copytree(locate("tiny-gpt"), tmp_path / "tiny-gpt")
    monkeypatch.chdir(tmp_path)
    assert locate("tiny-gpt").resolve() == (tmp_path / "tiny-gpt").resolve()


SMALL = Recipe("gpt", "next-word", dict(n_layer=1, n_head=2, n_embd=16, context=16, n_inner=24),
               dict(steps=4, batch_size=2, context=16, precision="fp32", eval_batches=1), texts=("synthetic",), vocab_size=300)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    "A run of four steps of a recipe that is small enough to be carried out here."
    monkeypatch.setitem(RECIPES, "tiny-gpt", SMALL)
    recipe_trainer(SMALL, tmp_path / "run", progress=False).fit()
    return tmp_path / "run"


def described(run, **changes):
    config = json.loads((run / "config.json").read_text())
    for part, change in changes.items(): config[part] = change if isinstance(change, list) else config[part] | change
    (run / "config.json").write_text(json.dumps(config))
    return config


def test_a_card_says_what_the_run_s_own_folder_says(finished, tmp_path):
    assert described(finished)["environments"] == [environment()]
    card = lambda: (ship("tiny-gpt", finished, tmp_path / "out", progress=False) / "README.md").read_text()
    assert "torch {torch}, Python {python}, {machine}. The".format(**environment()) in card()
    model = GPT.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a.to(torch.bfloat16).float(), b) for a, b in zip(GPT.from_pretrained(finished / "model").parameters(), model.parameters()))
    described(finished, environments=[{"torch": "9.9", "python": "2.7", "machine": "abacus"}, environment()])
    assert "torch 9.9, Python 2.7, abacus, then torch" in card()
    described(finished, environments=[])
    assert "wasn't noted" in card()


def test_an_unfinished_run_is_not_shipped(tmp_path):
    with pytest.raises(BookError, match="isn't finished"): ship("tiny-gpt", tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("part, change", [("train", {"lr": 1.0}), ("train", {"accumulate": 2}), ("model", {"n_embd": 32}), ("data", {"train": "0" * 64}), ("objective", {"name": "echo"})])
def test_another_run_is_not_shipped(finished, tmp_path, part, change):
    described(finished, **{part: change})
    with pytest.raises(BookError, match=f"isn't one of tiny-gpt, {part}.{next(iter(change))} .{next(iter(change.values()))} there"): ship("tiny-gpt", finished, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_elsewhere_notes_both(tmp_path, monkeypatch):
    trainer = recipe_trainer(SMALL, tmp_path / "run", progress=False)
    move = trainer.move
    def interrupted(lr):
        if trainer.step == 2: raise KeyboardInterrupt
        move(lr)
    trainer.move = interrupted
    trainer.fit()
    here, elsewhere = environment(), {"torch": "9.9", "python": "2.7", "machine": "abacus"}
    monkeypatch.setattr(training, "environment", lambda: elsewhere)
    for _ in range(2): recipe_trainer(SMALL, tmp_path / "run", progress=False).fit()
    assert described(tmp_path / "run")["environments"] == [here, elsewhere]
    monkeypatch.setattr(training, "environment", lambda: {"torch": "10"})
    recipe_trainer(SMALL, tmp_path / "run", progress=False).fit()  # finished: nothing was computed there
    assert described(tmp_path / "run")["environments"] == [here, elsewhere]


def test_a_log_is_condensed_to_its_evaluations():
    rows = [{"step": 0, "valid_loss": 8.0, "accuracy": 0.0}, {"step": 1, "loss": 7.0}, {"step": 2, "loss": 5.0}, {"step": 2, "valid_loss": 6.0, "accuracy": 0.1}, {"step": 3, "loss": 1.0}]
    assert condensed(rows) == [{"step": 0, "loss": None, "valid_loss": 8.0, "accuracy": 0.0}, {"step": 2, "loss": 6.0, "valid_loss": 6.0, "accuracy": 0.1}]
