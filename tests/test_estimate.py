"""An estimate must count what is there, grow with what is asked, and refuse in a sentence what the run would refuse."""
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from shared import ANIMALS, LABELS, small_base

from llmbook import estimate as module
from llmbook.cli import main
from llmbook.corpora import BookError
from llmbook.estimate import base_of, batch_tokens, clocks, estimate, kinds_of, known_run, line, memory_parts, pass_seconds, shape_of, smaller, taken, tensors_mb, widths, written
from llmbook.finetuning import Plan, fine_tuner, put_together
from llmbook.jobs import measured, process_settings
from llmbook.pretrained import model_shape, stored_model
from llmbook.task_data import write_task


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return str(small_base(tmp_path_factory.mktemp("base") / "model", n_layer=6))


@pytest.fixture(autouse=True)
def known_process(monkeypatch): monkeypatch.setattr(module, "bare_process", lambda threads: {"peak_mb": 400.0, "before_mb": 300.0, "cpu_seconds": 5.0, "seconds": 6.0})


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prompt", "prefix"])
def test_parts_are_what_the_run_holds(base, tmp_path, method):
    plan = Plan(base, method, epochs=2, precision="fp32", share=0.25)
    said = estimate(plan, ANIMALS)
    trainer = fine_tuner(plan, ANIMALS, tmp_path / "run", progress=False)
    moved = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.train_step()
    state = [t for s in trainer.optimizer.state.values() for t in s.values()]
    assert said.trainable == sum(p.numel() for p in moved) and said.steps == trainer.config.steps
    assert math.isclose(said.parts["weights"], tensors_mb([*trainer.model.parameters(), *trainer.model.buffers()]), rel_tol=1e-6)
    assert math.isclose(said.parts["gradients"], sum(p.nbytes for p in moved) / 1e6, rel_tol=1e-6) and math.isclose(said.parts["optimizer"], tensors_mb(state), rel_tol=1e-6)
    plain = put_together(replace(plan, method="full"), ANIMALS).model
    assert said.parameters == sum(p.numel() for p in plain.parameters()) + (said.trainable if method != "full" else 0)
    assert math.isclose(said.memory_mb, sum(said.parts.values())) and math.isclose(said.cpu_seconds, sum(said.times.values()), rel_tol=1e-6)


def test_more_takes_more(base):
    plan = Plan(base, "full", precision="fp32", share=0.25, length=5)
    small, wide, deep = (estimate(p, ANIMALS) for p in (replace(plan, batch_size=2), replace(plan, batch_size=8), replace(plan, batch_size=8, length=7)))
    assert small.parts["activations"] < wide.parts["activations"] < deep.parts["activations"]
    assert small.steps > wide.steps and estimate(replace(plan, epochs=30), ANIMALS).times["passes"] > estimate(plan, ANIMALS).times["passes"]
    assert estimate(plan, ANIMALS, recompute=True).parts["activations"] < estimate(plan, ANIMALS).parts["activations"]


def test_the_run_s_own_batches(base, tmp_path):
    plan = Plan(base, "full", epochs=3, precision="fp32", share=0.25)
    trainer = fine_tuner(plan, ANIMALS, tmp_path / "run", progress=False)
    tokens, (_, widest) = batch_tokens(trainer.objective, 8, plan.seed, trainer.config.steps)
    read = [trainer.inputs(trainer.sampler.next())["ids"].numel() for _ in range(trainer.config.steps)]
    assert tokens.tolist() == read and trainer.objective.batch(widest)["ids"].numel() == max(read)


def test_the_run_s_own_evaluations(base, tmp_path):
    trainer = fine_tuner(Plan(base, "full", batch_size=2, precision="fp32", share=0.4), ANIMALS, tmp_path / "run", progress=False)
    read = [inputs["ids"].numel() for inputs in trainer.held_out()]
    assert len(read) > 1 and widths(trainer.valid, trainer.valid.judged(2)).tolist() == read


def test_old_text_takes_its_places(base, tmp_path):
    plan = Plan(base, epochs=2, precision="fp32", share=0.25, rehearse="synthetic", rehearsed=0.7)
    trainer = fine_tuner(plan, ANIMALS, tmp_path / "run", progress=False)
    read = [trainer.inputs(trainer.sampler.next())["ids"].numel() for _ in range(trainer.config.steps)]
    assert known_run(plan, ANIMALS, None, 0, {}).tokens.tolist() == read and sum(read) > known_run(replace(plan, rehearse=""), ANIMALS, None, 0, {}).tokens.sum()
    before = torch.get_rng_state()
    estimate(plan, ANIMALS, samples=0)
    assert torch.equal(torch.get_rng_state(), before), "an estimate draws nothing that the caller would have drawn"
    with pytest.raises(BookError, match="wikipedia"): estimate(replace(plan, rehearse="wikipeda"), ANIMALS)


@pytest.mark.parametrize("tokens", ["x", None, 900, -3])
def test_no_room_behind_a_prompt_is_told_as_the_run_tells_it(base, tokens):
    plan, said = Plan(base, "prompt", precision="fp32", share=0.25, options={"tokens": tokens}), []
    for doing in (estimate, put_together):
        with pytest.raises(BookError) as e: doing(plan, ANIMALS)
        said.append(str(e.value))
    assert said[0] == said[1]


def test_every_value_of_a_base_is_counted(base):
    found = kinds_of(stored_model(base)[1])
    assert sum(n for n, _ in found) == sum(p.numel() for p in smaller(Plan(base), shape_of(base), [], 6).parameters())
    assert all(t.rows(1).shape == (1, *t.shape[1:]) for _, t in found)


@pytest.mark.slow
def test_every_value_of_a_gguf_file_is_counted():
    config, stored = stored_model("smollm2-135m-instruct")
    found = kinds_of(stored)
    with torch.device("meta"): whole = smaller(Plan("smollm2-135m-instruct"), shape_of("smollm2-135m-instruct", config), [], 30)
    assert sum(n for n, _ in found) == sum(p.numel() for p in whole.parameters()) and all(t.rows(1).shape == (1, *t.shape[1:]) for _, t in found)


def test_a_base_is_read_once_until_it_changes(base, tmp_path):
    shutil.copytree(base, own := tmp_path / "own")
    plan = Plan(str(own))
    first = base_of(plan)
    assert base_of(plan) is first and first.shape.n_layer == 6 and (first.seconds > 0).all() and first.beside > 0
    os.utime(own / "config.json", (1, 2_000_000_000))
    assert base_of(plan) is not first
    (own / "model.safetensors").write_bytes(b"torn")     # which the cache must notice, too
    with pytest.raises(BookError, match="get the file again"): base_of(plan)


def test_what_a_first_call_takes_beyond_a_later_one(monkeypatch):
    times = iter([0.0, 5.0, 5.0, 7.0, 7.0, 10.0])
    monkeypatch.setattr(module, "clocks", lambda: torch.tensor([next(times)] * 2).numpy())
    first, least = taken(lambda: None)
    assert first.tolist() == [3.0, 3.0] and least.tolist() == [2.0, 2.0]


def test_writing_is_tried_here():
    assert written().keys() == {"checkpoint", "model"} and all((v > 0).all() for v in written().values())
    assert (clocks() <= clocks()).all()


def test_what_is_written_counts(base):
    plan = Plan(base, epochs=4, precision="fp32", share=0.25)
    often, seldom = estimate(plan, ANIMALS, eval_every=1), estimate(plan, ANIMALS, eval_every=100)
    assert often.times["checkpoints"] > seldom.times["checkpoints"] > 0 and often.times["models"] > seldom.times["models"] and often.times["samples"] > seldom.times["samples"]
    assert estimate(plan, ANIMALS, samples=0).times["samples"] == 0


@pytest.mark.parametrize("beside, more", [(0.0, 0.0), (500.0, 340.0)])
def test_the_peak_may_come_before_the_first_step(monkeypatch, beside, more):
    one = {"weights": 20.0, "gradients": 10.0, "optimizer": 20.0, "activations": 50.0}
    run = SimpleNamespace(plan=Plan(), base=SimpleNamespace(shape=SimpleNamespace(vocab_size=1000), beside=beside), found={"fp32": one}, precision="fp32", labelled=True, asked=0, whole=40.0)
    parts = memory_parts(run)
    assert parts["more while loading"] == more and sum(parts.values()) == (500.0 if not beside else 840.0)


def test_lines_through_two_points():
    assert line({"a": 10.0}, {"a": 16.0}, (1, 4), 30) == {"a": 68.0} and line({"a": 10.0}, {"a": 10.0}, (1, 1), 1) == {"a": 10.0}
    found = {"narrow": torch.tensor([1.0, 2.0]).numpy(), "wide": torch.tensor([3.0, 6.0]).numpy()}
    assert pass_seconds(found, (100, 300), [100, 200, 300]).tolist() == [6.0, 12.0]
    assert pass_seconds({**found, "narrow": found["wide"] * 2}, (100, 300), [300]).tolist() == [3.0, 6.0], "noise doesn't make wide batches cheap"


def test_labels_and_shapes(base):
    said = estimate(Plan("tiny-bert", precision="fp32", share=0.25), LABELS)
    assert said.parts["logits"] == said.parts["held-out logits"] == 0 and "parameters move" in str(said)
    assert shape_of(base).n_layer == 6 and model_shape("smollm2-135m-instruct")["n_layer"] == 30
    assert smaller(Plan("tiny-gpt"), shape_of("tiny-gpt"), [], 2).config.n_layer == 2
    before = torch.get_rng_state()
    estimate(Plan(base, precision="fp32", share=0.25), ANIMALS)
    assert torch.equal(before, torch.get_rng_state()), "an estimate draws nothing from the caller's random numbers"


@pytest.mark.parametrize("change, said", [(dict(method="magic"), "no method"), (dict(length=10_000), "more than the"), (dict(method="lora", options={"rank": 900}), "at most"), (dict(method="lora", options={"rnak": 3}), "can't be told"),
                                          (dict(base="tiny-bert"), "writes none"), (dict(share=2.0), "share"), (dict(epochs=0), "epochs"), (dict(batch_size=0), "batch_size"), (dict(base="no/such/folder"), "no model folder")])
def test_what_the_run_would_refuse(base, change, said):
    with pytest.raises(BookError, match=said): estimate(replace(Plan(base, share=0.25), **change), ANIMALS)


def test_peak_is_this_process_s_own():
    held = torch.ones(60_000_000)
    assert measured()["peak_mb"] > 240 and len(held)
    assert process_settings()["LRU_CACHE_CAPACITY"] == "128"


def test_the_command(base, tmp_path, capsys):
    write_task(tmp_path / "rows.jsonl", ANIMALS.rows)
    assert main(["estimate", "--base", base, "--data", str(tmp_path / "rows.jsonl"), "--method", "lora", "--precision", "fp32", "--share", "0.25"]) == 0
    told = capsys.readouterr().out
    assert "parameters move" in told and "activations" in told
    assert main(["estimate", "--base", base, "--data", str(tmp_path / "rows.jsonl"), "--method", "magic"]) == 2
