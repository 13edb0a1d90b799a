"""Answers: what is refused, what is rehearsed, what a run's folder holds, and that a method can be plugged in."""
import json

import numpy as np
import pytest
import torch
from shared import ANIMALS, LABELS, pull_the_plug, small_base, task

from llmbook import finetuning
from llmbook.classifying import Classifier
from llmbook.cli import main
from llmbook.corpora import BookError
from llmbook.examples import Example
from llmbook.finetuning import (
    AnswerRows,
    Forgetting,
    Method,
    Plan,
    answer_loss,
    answer_nats,
    asked_prompt,
    choice_nats,
    dealt,
    evaluate,
    fewest_places,
    fine_tuner,
    finetune,
    method_named,
    open_run,
    register,
)
from llmbook.gpt import GPT
from llmbook.objectives import IGNORE
from llmbook.pretrained import pretrained_tokenizer
from llmbook.task_data import Alpaca, Chat


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base") / "model", context=256)


def plan(base, **kw): return Plan(**{**dict(base=str(base), epochs=40, lr=1e-2, precision="fp32", share=0.25), **kw})


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_old_text_has_its_share_of_the_asked_tokens(share):
    rng = np.random.default_rng(0)
    old = np.arange(1000, 2000)
    for n in (1, 4, 9):
        examples = [Example(list(range(1, 12 + i)), [IGNORE] * 6 + list(range(8, 13 + i))) for i in range(n + 1)]
        rows = AnswerRows(examples, 2000, old, share)
        batch = rows.batch(rng.permutation(n + 1)[:n], torch.Generator().manual_seed(n))
        asked = batch["targets"] != IGNORE
        of_old = (batch["targets"] >= 1000) & asked
        assert abs(of_old.sum() - share * asked.sum()) <= 1
        assert torch.equal(batch["targets"][of_old], batch["ids"][of_old] + 1), "each old token asks for the next one"
        assert batch["ids"].shape[1] <= max(rows.lengths), "old windows make the batch no wider"


def test_a_loss_at_answers_is_the_whole_loss(base):
    model = GPT.from_pretrained(base)
    rows = AnswerRows([Example(list(range(5, 20)), [IGNORE] * 10 + list(range(16, 21))), Example(list(range(30, 37)), [IGNORE] * 2 + list(range(33, 38)))], model.config.vocab_size)
    batch = rows.batch([0, 1])
    torch.testing.assert_close(answer_loss(model)(**batch), model.loss(**batch))
    torch.testing.assert_close(answer_loss(model, most=1)(**batch), model.loss(**batch))
    costs = answer_nats(model, rows)
    assert costs[:, 1].tolist() == [5, 5]
    torch.testing.assert_close(costs[:, 0].sum() / costs[:, 1].sum(), model.loss(**batch).double(), atol=1e-5, rtol=1e-5)


def odd_examples(n: int, seed: int = 0) -> list[Example]:
    "Examples of 2 to 60 tokens of which some are asked."
    rng = np.random.default_rng(seed)
    made = [rng.integers(5, 250, size=T + 1).tolist() for T in rng.integers(2, 61, size=n)]
    return [Example(ids[:-1], [IGNORE] * (cut := int(rng.integers(len(ids) - 1))) + ids[cut + 1:]) for ids in made]


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_shared_rows_teach_what_rows_alone_teach(base, method, share):
    torch.manual_seed(0)
    model = method_named(method).prepare(GPT.from_pretrained(base))
    moving = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad(): [p.normal_(std=0.05) for p in moving if not p.any()]   # LoRA begins at zero, where half of the gradients are
    old, found = np.arange(5, 205), {}
    for room in (0, 64):
        rows = AnswerRows(odd_examples(20), model.config.vocab_size, old, share, room)
        batch = rows.batch(range(20), torch.Generator().manual_seed(0))
        loss = answer_loss(model)(**batch)
        found[room] = [loss.detach(), *torch.autograd.grad(loss, moving)], int((batch["targets"] != IGNORE).sum()), batch["ids"].numel()
    for alone, packed in zip(found[0][0], found[64][0]): torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-5)
    assert found[0][1] == found[64][1] and found[64][2] < 0.8 * found[0][2]


@pytest.mark.parametrize("room", [60, 64, 200, 1000])
def test_every_example_has_its_place_in_a_shared_row(room):
    lengths = [len(e.ids) for e in odd_examples(33, seed=room)]
    rows = fewest_places(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(33)) and max(sum(lengths[i] for i in row) for row in rows) <= room
    places = lambda rows: len(rows) * max(sum(lengths[i] for i in row) for row in rows)
    assert places(rows) <= max(lengths) * 33, "never more than without sharing"


def test_a_packed_run_goes_on_and_can_be_opened(base, tmp_path):
    kw = dict(progress=False, checkpoint_every=5, steps=12)
    whole = finetune(plan(base, pack=True), ANIMALS, tmp_path / "whole", **kw)
    broken = fine_tuner(plan(base, pack=True), ANIMALS, tmp_path / "broken", **kw)
    pull_the_plug(broken, 7)
    resumed = finetune(plan(base, pack=True), ANIMALS, tmp_path / "broken", **kw)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(a, b)
    assert evaluate(tmp_path / "whole", ANIMALS)["loss"][0] == evaluate(tmp_path / "broken", ANIMALS)["loss"][0]
    with pytest.raises(BookError, match="room"): finetune(plan(base), ANIMALS, tmp_path / "whole", **kw)


def test_a_choice_costs_its_first_token(base):
    model, tokenizer = GPT.from_pretrained(base).eval(), pretrained_tokenizer(base)
    found = choice_nats(model, tokenizer, ANIMALS.rows, [" meow", " woof"], batch=5)
    for row, costs in zip(ANIMALS.rows, found):
        logits = model(torch.tensor([asked_prompt(row, tokenizer)]))[0, -1].detach().double()
        torch.testing.assert_close(costs, logits.logsumexp(0) - logits[[tokenizer.encode(c)[0] for c in (" meow", " woof")]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("data,kind", [(ANIMALS, "completion"), (LABELS, "labelled"),
                                       (task([Alpaca(instruction=f"Say what the {('cat', 'dog')[i % 2]} number {i} says", output=("meow", "woof")[i % 2]) for i in range(24)]), "alpaca"),
                                       (task([Chat(messages=[dict(role="user", content=f"{('cat', 'dog')[i % 2]} {i}?"), dict(role="assistant", content=("meow", "woof")[i % 2])]) for i in range(24)]), "chat")], ids=lambda x: x if isinstance(x, str) else "")
def test_every_format_is_learned_kept_and_judged(base, tmp_path, data, kind):
    run = tmp_path / "run"
    done = finetune(plan(base), data, run, progress=False)
    seen = [r["valid_loss"] for r in done.history if "valid_loss" in r]
    assert min(seen) < 0.5 * seen[0]
    assert {"best", "model", "task.json", "README.md", "config.json", "log.jsonl"} <= {p.name for p in run.iterdir()}
    found = evaluate(run, data)
    assert found["accuracy"][0] > 0.6 and found["loss"][1] <= found["loss"][0] <= found["loss"][2]
    log = (run / "log.jsonl").read_bytes()
    assert finetune(plan(base), data, run, progress=False).finished() and (run / "log.jsonl").read_bytes() == log, "a finished run is left as it is"
    with pytest.raises(BookError, match="lr"): finetune(plan(base, lr=1e-4), data, run, progress=False)


def test_a_broken_run_goes_on_and_ends_alike(base, tmp_path):
    old = dict(rehearse="synthetic", rehearsed=0.3)
    kw = dict(progress=False, checkpoint_every=5, steps=16)
    whole = finetune(plan(base, **old), ANIMALS, tmp_path / "whole", **kw)
    broken = fine_tuner(plan(base, **old), ANIMALS, tmp_path / "broken", **kw)
    pull_the_plug(broken, 8)
    with pytest.raises(BookError, match="isn't finished"): open_run(tmp_path / "broken")
    resumed = finetune(plan(base, **old), ANIMALS, tmp_path / "broken", **kw)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(a, b)


def test_forgetting_is_written_down_at_each_evaluation(base, tmp_path):
    old = np.random.default_rng(0).integers(0, 250, 600)
    done = finetune(plan(base, epochs=2), ANIMALS, tmp_path / "run", progress=False, callbacks=[Forgetting(old, 32, 8)], eval_every=2)
    steps = lambda key: [r["step"] for r in done.history if key in r]
    assert steps("old_loss") == steps("valid_loss") and len(steps("old_loss")) > 2
    with pytest.raises(BookError, match="window"): Forgetting(old[:20], 32)


def test_a_method_plugs_in(base, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "METHODS", dict(finetuning.METHODS))
    def norms_only(model, scale: float = 1.0):
        for name, p in model.named_parameters(): p.requires_grad_("norm" in name)
        return model
    register(Method("norms", "only the norms move", 1e-2, norms_only, lambda folder, base: GPT.from_pretrained(folder)))
    done = finetune(plan(base, method="norms", lr=None, options={"scale": 2.0}), ANIMALS, tmp_path / "run", progress=False)
    start = dict(GPT.from_pretrained(base).named_parameters())
    assert done.config.lr == 1e-2 and {"norm" in n for n, p in done.model.named_parameters() if not torch.equal(p, start[n])} == {True}
    assert evaluate(tmp_path / "run", ANIMALS)["loss"][0] > 0 and json.loads((tmp_path / "run" / "task.json").read_text())["options"] == {"scale": 2.0}
    with pytest.raises(BookError, match="size"): finetune(plan(base, method="norms", options={"size": 2}), ANIMALS, tmp_path / "y", progress=False)


@pytest.mark.parametrize("doing,said", [
    (lambda base, tmp: method_named("adapter"), "full"),
    (lambda base, tmp: dealt(task(ANIMALS.rows[:3]), 0.1), "more rows"),
    (lambda base, tmp: dealt(ANIMALS, 1.0), "share"),
    (lambda base, tmp: finetune(plan("tiny-bert"), ANIMALS, tmp), "decoder"),
    (lambda base, tmp: finetune(plan("tiny-bart"), ANIMALS, tmp), "tiny-bart"),
    (lambda base, tmp: finetune(plan(base, rehearse="wikipeda"), ANIMALS, tmp), "wikipedia"),
    (lambda base, tmp: finetune(plan(base), ANIMALS, tmp, LABELS), "one format"),
    (lambda base, tmp: finetune(plan(base, length=500), ANIMALS, tmp), "256"),
    (lambda base, tmp: finetune(plan(base, epochs=0), ANIMALS, tmp), "epochs"),
    (lambda base, tmp: evaluate(base, LABELS), "answers"),
    (lambda base, tmp: evaluate(tmp / "none", ANIMALS), "none"),
    (lambda base, tmp: AnswerRows([Example([1, 2], [2, 3])] * 2, 10, None, 0.5), "no old text"),
    (lambda base, tmp: AnswerRows([Example([1, 2], [2, 3])] * 2, 10, np.arange(5), 1.0), "share"),
    (lambda base, tmp: finetune(plan(base, pack=True), LABELS, tmp), "leave pack out"),
    (lambda base, tmp: finetune(plan(base, pack=True, method="prefix"), ANIMALS, tmp), "leave pack out"),
    (lambda base, tmp: choice_nats(GPT.from_pretrained(base), pretrained_tokenizer(base), ANIMALS.rows, [" meow", " meow."]), "begin alike")])
def test_bad_input_is_a_sentence(base, tmp_path, doing, said):
    with pytest.raises(BookError, match=said): doing(base, tmp_path / "run")


def test_the_command_line(base, tmp_path, capsys):
    files = {}
    for name, data in (("answers", ANIMALS), ("labels", LABELS)):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(r.model_dump_json(exclude_none=True) + "\n" for r in data.rows))
    for name in files:
        run = str(tmp_path / f"run-{name}")
        assert main(["finetune", "--base", str(base), "--data", str(files[name]), "--out", run, "--epochs", "40", "--lr", "1e-2", "--share", "0.25", "--precision", "fp32"]) == 0
        assert "before" in capsys.readouterr().out
        assert main(["evaluate", run, "--data", str(files[name]), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["accuracy"][0] > 0.8 and ("confusion" in found) == (name == "labels")
    assert main(["evaluate", run, "--data", str(files["labels"])]) == 0 and "truth, said" in capsys.readouterr().out
    assert main(["evaluate", run, "--data", str(files["answers"])]) == 2 and "labels" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y", "completion": 3}\n')
    assert main(["finetune", "--data", str(tmp_path / "bad.jsonl"), "--out", run + "-x"]) == 2 and "line 1" in capsys.readouterr().err
    assert main(["finetune", "--base", str(base), "--data", str(files["answers"]), "--out", run + "-x", "--option", "rank"]) == 2 and "name=value" in capsys.readouterr().err


def test_a_decoder_can_be_a_classifier(base, tmp_path):
    done = finetune(plan(base, balance=True, precision="auto"), LABELS, tmp_path / "run", progress=False)
    assert isinstance(done.model, Classifier) and isinstance(done.model.body, GPT) and done.model.weights is not None
