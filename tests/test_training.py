"""What a lesson can't show: runs that are killed, disks that are full, files that were damaged, and everything that must be refused."""
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings

import numpy as np
import pytest
import torch

from llmbook import checkpointing
from llmbook.bert import Bert, BertConfig, BertForPreTraining, load_bert
from llmbook.checkpointing import (checkpoints, damage, load_checkpoint, newest_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer)
from llmbook.corpora import BookError, TokenStream, synthetic_documents, write_stream
from llmbook.gpt import GPT, GPTConfig
from llmbook.loop import Callback, TrainConfig, precision_seconds
from llmbook.metrics import unigram_entropy
from llmbook.objectives import MaskedWord, Permutation
from llmbook.training import Trainer, check_run, differing, held_out_windows, plot_history, read_log, token_bytes
from llmbook.xlnet import XLNet, XLNetConfig, XLNetLM, load_xlnet

V = 130  # ASCII and one token that ends a document
processes = multiprocessing.get_context("forkserver" if os.name != "nt" else "spawn")
if os.name != "nt": processes.set_forkserver_preload(["llmbook.training", "llmbook.gpt"])


def stream(folder, docs):
    return write_stream(folder, docs, lambda text: list(text.encode()), eot=129, vocab_size=V, progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    docs = synthetic_documents(120)
    stream(folder / "train", docs[:100])
    stream(folder / "valid", docs[100:])
    return folder


def make(data, run_dir, steps=24, gpt=None, **changes):
    torch.manual_seed(7)
    model = GPT(GPTConfig(**{**dict(vocab_size=V, context=32, n_layer=1, n_head=2, n_embd=16, dropout=0.1), **(gpt or {})}))
    config = TrainConfig(**{**dict(steps=steps, batch_size=2, context=16, accumulate=2, lr=3e-3, eval_every=5, eval_batches=1,
                                   checkpoint_every=3, precision="fp32"), **changes})
    return Trainer(model, config, TokenStream(data / "train"), TokenStream(data / "valid"), run_dir, progress=False)


def stop_at(trainer, step):
    "Press Ctrl-C in the middle of the gradient of the step after `step`."
    gradient = trainer.gradient
    def interrupted():
        if trainer.step == step:
            trainer.sampler.next(), torch.rand(3)  # the step had begun
            raise KeyboardInterrupt
        return gradient()
    trainer.gradient = interrupted
    return trainer


def timeless(history):
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in history]


def same(run, other):
    "Same weights, same optimizer, same log, to the last bit."
    (a, a_state), (b, b_state) = (load_checkpoint(newest_checkpoint(folder / "checkpoints")) for folder in (run, other))
    assert a_state == b_state
    for stem in ("model", "optimizer"):
        assert a[stem].keys() == b[stem].keys()
        for name in a[stem]: assert torch.equal(a[stem][name], b[stem][name]), name
    assert timeless(read_log(run / "log.jsonl")) == timeless(read_log(other / "log.jsonl"))


# Killed

def worker(data, run_dir, steps, ready=None):
    torch.set_num_threads(1)
    trainer = make(data, run_dir, steps, checkpoint_every=2)
    if ready: ready.touch()
    trainer.fit()


def start(*arguments, target=worker):
    process = processes.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def begun(data, run_dir, steps, ready):
    "A process that has loaded everything and is about to train."
    process = start(data, run_dir, steps, ready)
    while process.exitcode is None and not ready.exists(): time.sleep(0.005)
    return process


def kill_later(process, log, lines, seconds, inside):
    "SIGKILL some time after the log has so many lines; `inside`: wait on for the next checkpoint that is being written. True if the process still ran."
    while process.exitcode is None and (not log.exists() or log.read_bytes().count(b"\n") < lines): time.sleep(0.001)
    process.join(seconds)
    while inside and process.exitcode is None and not any(inside.glob(".step-*")): pass
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def killed_run(data, folder, steps, kills, seed):
    "An uninterrupted run, and one that is killed at random moments, every second time inside a checkpoint's write; moments are counted in steps, since seconds depend on what else the machine does."
    rng = random.Random(seed)
    straight = begun(data, folder / "straight", steps, folder / "ready")
    began = time.perf_counter()
    straight.join()
    assert straight.exitcode == 0
    span, done, torn, reached = time.perf_counter() - began, 0, 0, []
    for i in range(kills):
        process = begun(data, folder / "killed", steps, folder / f"ready{i}")
        lines = max(reached, default=0) + rng.uniform(-2, 1.5 * steps / kills)
        done += kill_later(process, folder / "killed/log.jsonl", lines, rng.uniform(0, span / steps), folder / "killed/checkpoints" if i % 2 else None)
        torn += any((folder / "killed/checkpoints").glob(".step-*"))
        reached.append(max((step for step, _ in checkpoints(folder / "killed/checkpoints")), default=0))
    last = start(data, folder / "killed", steps)
    last.join()
    assert last.exitcode == 0
    print(f"{done} kills in a run of {span:.1f} s, {torn} of them inside a checkpoint's write, at the steps after {reached}")
    return done, torn


def check_log(folder, steps):
    rows = read_log(folder / "log.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, steps + 1))
    assert [r["step"] for r in rows if "valid_loss" in r] == sorted({0, *range(5, steps + 1, 5), steps})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("kills, steps", [(4, 120), pytest.param(20, 500, marks=pytest.mark.slow)])
def test_killed_runs_end_as_uninterrupted_ones(data, tmp_path, kills, steps):
    done, torn = killed_run(data, tmp_path, steps, kills, seed=time.time_ns())
    assert done >= kills // 2 and torn >= kills // 8
    same(tmp_path / "killed", tmp_path / "straight")
    check_log(tmp_path / "killed", steps)


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers no SIGINT to a child")
def test_a_real_ctrl_c_saves_and_ends_cleanly(data, tmp_path):
    process = start(data, tmp_path / "run", 4000)
    while not (log := tmp_path / "run/log.jsonl").exists() or log.read_bytes().count(b"\n") < 8: time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0
    step = load_checkpoint(newest_checkpoint(tmp_path / "run/checkpoints"))[1]["step"]
    assert 0 < step < 4000 and read_log(tmp_path / "run/log.jsonl")[-1]["step"] == step
    assert not (tmp_path / "run/model").exists()


# Interrupted

@pytest.mark.parametrize("step", [0, 1, 5, 17])
def test_interrupted_and_resumed(data, tmp_path, step, capsys):
    make(data, tmp_path / "straight").fit()
    stop_at(make(data, tmp_path / "twice"), step).fit()
    assert f"Stopped after step {step} of 24" in capsys.readouterr().out
    make(data, tmp_path / "twice").fit()
    same(tmp_path / "twice", tmp_path / "straight")
    check_log(tmp_path / "twice", 24)


def test_the_same_object_can_go_on(data, tmp_path):
    make(data, tmp_path / "straight").fit()
    trainer = stop_at(make(data, tmp_path / "twice"), 7)
    trainer.fit()
    trainer.gradient = type(trainer).gradient.__get__(trainer)
    history = trainer.fit()
    same(tmp_path / "twice", tmp_path / "straight")
    assert timeless(history) == timeless(read_log(tmp_path / "straight/log.jsonl"))


def test_interrupt_between_weights_and_log_falls_back(data, tmp_path):
    "While a step is half done there is nothing consistent to save: the checkpoint before stays the newest."
    make(data, tmp_path / "straight").fit()
    trainer = make(data, tmp_path / "twice")
    trainer.record = lambda row, record=trainer.record: (_ for _ in ()).throw(KeyboardInterrupt) if row["step"] == 8 else record(row)
    trainer.fit()
    assert newest_checkpoint(tmp_path / "twice/checkpoints").name == "step-000006"
    make(data, tmp_path / "twice").fit()
    same(tmp_path / "twice", tmp_path / "straight")


def test_a_finished_run_has_nothing_to_do(data, tmp_path):
    first = make(data, tmp_path)
    history = first.fit()
    shutil.rmtree(tmp_path / "model")  # killed between the last checkpoint and the export
    again = make(data, tmp_path)
    assert again.fit() == history
    assert again.evaluate() == first.evaluate()
    reloaded = make(data, tmp_path / "other")
    reloaded.model.load_state_dict(GPT.from_pretrained(tmp_path / "model").state_dict())
    assert reloaded.evaluate()["loss"] == pytest.approx(first.evaluate()["loss"], abs=1e-6)


def test_another_run_is_put_aside(data, tmp_path):
    make(data, tmp_path, steps=3).fit()
    make(data, tmp_path, steps=4).fit(resume=False)
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 4
    assert read_log(tmp_path / "before-1/log.jsonl")[-1]["step"] == 3 and (tmp_path / "before-1/model").is_dir()


# Damaged and full disks

@pytest.mark.parametrize("hurt", ["flip", "cut", "empty", "missing", "manifest", "no manifest"])
def test_damaged_newest_checkpoint(data, tmp_path, hurt):
    make(data, tmp_path / "straight").fit()
    stop_at(make(data, tmp_path / "hurt"), 8).fit()
    folder = newest_checkpoint(tmp_path / "hurt/checkpoints")
    victim = folder / ("manifest.json" if "manifest" in hurt else "optimizer.safetensors")
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 4
    if hurt in ("missing", "no manifest"): victim.unlink()
    else: victim.write_bytes({"flip": raw, "cut": raw[:-1], "empty": b"", "manifest": raw[:len(raw) // 2]}[hurt])
    with pytest.warns(UserWarning, match="of step 8 is damaged .*: the one before is used"): make(data, tmp_path / "hurt").fit()
    same(tmp_path / "hurt", tmp_path / "straight")
    check_log(tmp_path / "hurt", 24)


def test_nothing_but_damage(data, tmp_path):
    stop_at(make(data, tmp_path), 8).fit()
    for _, path in checkpoints(tmp_path / "checkpoints"): (path / "state.json").write_text("{}")
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.warns(UserWarning), pytest.raises(BookError, match="Every checkpoint in .* is damaged"): make(data, tmp_path).fit()
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_keep_one_survives_a_damaged_newer_one(tmp_path):
    "A damaged later checkpoint must not count among those that stay."
    save_checkpoint(tmp_path, 9, {"model": {"w": torch.ones(2)}}, {})
    (tmp_path / "step-000009/state.json").unlink()
    save_checkpoint(tmp_path, 7, {"model": {"w": torch.ones(2)}}, {}, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [7] and not damage(tmp_path / "step-000007")


def limited(data, run_dir, answer):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    try: make(data, run_dir).fit()
    except BookError as e: answer.put(str(e))
    else: answer.put("no error")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no RLIMIT_FSIZE")
def test_full_disk(data, tmp_path):
    make(data, tmp_path / "straight").fit()
    stop_at(make(data, tmp_path / "full"), 4).fit()
    answer = processes.Queue()
    process = start(data, tmp_path / "full", answer, target=limited)
    said = answer.get(timeout=60)
    process.join()
    assert "The checkpoint of step 6 could not be written" in said and "go on from there" in said and "\n" not in said
    assert [p.name for p in (tmp_path / "full/checkpoints").iterdir() if p.name.startswith(".")] == []
    with warnings.catch_warnings(action="error"): make(data, tmp_path / "full").fit()
    same(tmp_path / "full", tmp_path / "straight")


@pytest.mark.parametrize("name", ["replace", "fsync", "open"])
def test_a_crash_at_any_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch, name):
    "Stop dead at the first, second, … system call of a write, the old step's or the new step's checkpoint is there."
    class Dead(BaseException): pass
    for crash in range(1, 40):
        folder = tmp_path / f"{name}{crash}"
        save_checkpoint(folder, 1, {"model": {"w": torch.ones(50)}}, {})
        calls, real = [], getattr(os, name)
        def dying(*a, **k):
            calls.append(a)
            if len(calls) == crash: raise Dead
            return real(*a, **k)
        with monkeypatch.context() as patch:
            patch.setattr(checkpointing.os, name, dying)
            try: save_checkpoint(folder, 2, {"model": {"w": torch.zeros(50)}}, {}, keep=1)
            except Dead: pass
        tensors, state = load_checkpoint(newest_checkpoint(folder))
        assert tensors["model"]["w"].sum() == (50 if state["step"] == 1 else 0)
        if len(calls) < crash: break
    assert crash > 2 and state["step"] == 2


def test_a_torn_log_is_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert [r["step"] for r in read_log(path)] == [1, 2]
    assert [r["step"] for r in read_log(path, lines=1)] == [1] and path.read_text() == '{"step": 1, "loss": 2.0}\n'
    assert read_log(tmp_path / "none") == []


# Refused

@pytest.mark.parametrize("changes, names", [
    (dict(lr=1e-3), ["train.lr (0.003 there, 0.001 here)"]),
    (dict(steps=25), ["train.steps (24 there, 25 here)"]),
    (dict(gpt=dict(n_embd=32)), ["model.n_embd (16 there, 32 here)"]),
    (dict(seed=3, weight_decay=0.0), ["train.seed (0 there, 3 here)", "train.weight_decay (0.1 there, 0.0 here)"])])
def test_another_configuration_is_refused_by_name(data, tmp_path, changes, names):
    stop_at(make(data, tmp_path), 4).fit()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(BookError) as e: make(data, tmp_path, **changes).fit()
    for name in names: assert name in str(e.value)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_other_data_is_refused(data, tmp_path):
    stop_at(make(data, tmp_path / "run"), 4).fit()
    (tmp_path / "streams").mkdir()
    stream(tmp_path / "streams/train", ["another text " * 40])
    shutil.copytree(data / "valid", tmp_path / "streams/valid")
    with pytest.raises(BookError, match="data.train"): make(tmp_path / "streams", tmp_path / "run").fit()


class Stub:
    def __init__(self, **values): self.__dict__.update(values)


def test_what_does_not_fit_together(data, tmp_path):
    config, train = TrainConfig(steps=1, batch_size=2, context=16), TokenStream(data / "train")
    model = Stub(config=Stub(vocab_size=V, context=32))
    short = stream(tmp_path / "short", ["ab"])
    empty = Stub(vocab_size=V)
    empty.__class__ = type("Empty", (Stub,), {"__len__": lambda self: 0})
    check_run(model, config, {"training": train}, Stub(vocab_size=V))
    for bad, said in [((Stub(config=Stub(vocab_size=V - 1, context=32)), config, {"training": train}), "training stream has a vocabulary of 130, but the model one of 129"),
                      ((Stub(config=Stub(vocab_size=V + 9, context=32)), config, {"training": train}), "vocabulary"),
                      ((Stub(config=Stub(vocab_size=V, context=8)), config, {}), "windows have 16 tokens, but the model reads at most 8"),
                      ((model, config, {"validation": short}), "validation stream has 3 tokens, too few"),
                      ((model, config, {"validation": empty}), "validation stream has 0 tokens, too few"),
                      ((model, config, {}, Stub(vocab_size=5)), "tokenizer has a vocabulary of 5")]:
        with pytest.raises(BookError, match=said): check_run(*bad)


def test_nothing_is_left_behind_by_a_refusal(data, tmp_path):
    with pytest.raises(BookError): make(data, tmp_path / "run", context=64)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(BookError, match="choose another folder"): make(data, tmp_path / "file").fit()


@pytest.mark.parametrize("changes", [dict(steps=0), dict(batch_size=0), dict(context=-1), dict(accumulate=1.5), dict(precision="fp8"), dict(on_fault="pray"), dict(spike=0.0), dict(optimizer="adamm"), dict(clip=0.0),
                                     dict(schedule="zigzag"), dict(warmup=10), dict(min_lr=1.0), dict(keep=0), dict(eval_every=0), dict(lr=-1.0), dict(lr=math.nan)])
def test_configurations_that_make_no_sense(changes):
    with pytest.raises(BookError): TrainConfig(**{**dict(steps=10, batch_size=2, context=4), **changes})


# Batches that must not be learned from

def spoil(trainer, steps, factor):
    "Multiply the training loss of some steps."
    batch_loss = trainer.batch_loss
    trainer.batch_loss = lambda inputs: batch_loss(inputs) * (factor if trainer.step in steps and trainer.model.training else 1.0)
    return trainer


def spoil_windows(trainer, position, factor=math.nan):
    "Multiply the loss of the windows at one position of the sampler, whenever they come."
    batch_loss = trainer.batch_loss
    trainer.batch_loss = lambda inputs: batch_loss(inputs) * (factor if trainer.sampler.position == position and trainer.model.training else 1.0)
    return trainer


@pytest.mark.parametrize("poison", [math.nan, math.inf, 50.0])
def test_a_bad_batch_is_left_out_and_named(data, tmp_path, poison):
    trainer = spoil(make(data, tmp_path / "run", steps=40), {24}, poison)
    before = []
    move = trainer.move
    trainer.move = lambda lr: (move(lr), before.append([p.clone() for p in trainer.model.parameters()]))
    history = trainer.fit()
    out = [row for row in history if "skipped" in row]
    assert [row["step"] for row in out] == [25] and set(out[0]["batch"]) == {"seed", "epoch", "position"} and "loss" not in out[0]
    assert len(before) == 39 and all(p.isfinite().all() for p in trainer.model.parameters())
    assert [row["step"] for row in history if "loss" in row or "skipped" in row] == list(range(1, 41))
    trainer.sampler.load_state_dict(out[0]["batch"])
    assert trainer.sampler.next().shape == (2, 17)
    for line in (tmp_path / "run/log.jsonl").read_text().splitlines(): json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights(data, tmp_path, poison):
    trainer = spoil(make(data, tmp_path, on_fault="stop"), {4}, poison)
    with pytest.raises(BookError, match="Step 5 was stopped before it touched the weights"): trainer.fit()
    log = read_log(tmp_path / "log.jsonl")
    kept = [p.clone() for p in trainer.model.parameters()]
    assert log[-1]["step"] == 4 and all(p.isfinite().all() and p.grad is None for p in trainer.model.parameters())
    again = stop_at(make(data, tmp_path, on_fault="stop"), 4)
    again.fit()
    assert all(torch.equal(a, b) for a, b in zip(kept, again.model.parameters()))


def test_faults_without_end_stop_the_run(data, tmp_path):
    with pytest.raises(BookError, match="after 11 more such steps"): spoil(make(data, tmp_path, steps=60), set(range(9, 60)), math.nan).fit()


@pytest.mark.parametrize("stop", [None, 4, 10, 13])
def test_rolled_back_runs_resume_exactly(data, tmp_path, stop):
    "The same bad windows are met, undone and passed whether or not the run was interrupted before or after."
    def run(folder): return spoil_windows(make(data, folder, steps=24, on_fault="rollback", checkpoint_every=4), position=24)
    straight = run(tmp_path / "straight").fit()
    events = [row for row in straight if "rolled_back" in row]
    assert [(row["step"], row["from"]) for row in events] == [(4, 6)]
    assert [row["step"] for row in straight if "loss" in row] == list(range(1, 25))
    if stop is None: return
    stop_at(run(tmp_path / "twice"), stop).fit()
    run(tmp_path / "twice").fit()
    same(tmp_path / "twice", tmp_path / "straight")


def test_the_best_of_undone_steps_stays_the_best(data, tmp_path):
    "Step 4 is the best of all and is undone: what comes later is compared with it, and best/ keeps its weights."
    trainer = spoil_windows(make(data, tmp_path, steps=24, on_fault="rollback", eval_every=2, checkpoint_every=3), position=24)
    trainer.keep_best, evaluate, undone = True, trainer.evaluate, {}
    def first_time_best():
        seen = evaluate()
        if trainer.step == 4 and not undone: undone.update({k: v.clone() for k, v in trainer.model.state_dict().items()}); seen["loss"] = 0.5
        return seen
    trainer.evaluate = first_time_best
    event = next(row for row in trainer.fit() if "rolled_back" in row)
    assert (event["step"], event["undone_best"]) == (3, 0.5) and trainer.lowest() == 0.5 < min(row["valid_loss"] for row in trainer.history if "valid_loss" in row)
    best = GPT.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(best[name], undone[name]) for name in best)


def test_rolling_back_in_vain_ends_in_a_sentence(data, tmp_path):
    with pytest.raises(BookError, match="after 3 returns to"): spoil(make(data, tmp_path, on_fault="rollback"), {7}, math.nan).fit()


@pytest.mark.parametrize("stop", [3, 9])
def test_fp16_resumes_with_its_loss_scale(data, tmp_path, stop):
    def run(folder):
        trainer = make(data, folder, steps=20, precision="fp16")
        trainer.scale.factor = 2.0**20
        return trainer
    history = run(tmp_path / "straight").fit()
    assert any("overflowed fp16" in row.get("skipped", "") for row in history)
    stop_at(run(tmp_path / "twice"), stop).fit()
    run(tmp_path / "twice").fit()
    same(tmp_path / "twice", tmp_path / "straight")


@pytest.mark.parametrize("name", ["muon", "rmsprop", "sgd", "paged-adamw"])
def test_other_optimizers_resume_exactly(data, tmp_path, name):
    def run(folder): return make(data, folder, optimizer=name)
    run(tmp_path / "straight").fit()
    stop_at(run(tmp_path / "twice"), 10).fit()
    run(tmp_path / "twice").fit()
    same(tmp_path / "twice", tmp_path / "straight")


def other_family(data, run_dir, family, steps=12):
    "A BERT that fills in blanks or an XLNet that reads in random orders, through the same Trainer."
    torch.manual_seed(7)
    sizes = dict(vocab_size=V, n_layer=1, n_head=2, n_embd=16, dropout=0.1)
    if family == "bert": model, objective = BertForPreTraining(Bert(BertConfig(**sizes), pooler=False)), MaskedWord(128, V, special=(129,))
    else: model, objective = XLNetLM(XLNet(XLNetConfig(**sizes))), Permutation()
    config = TrainConfig(steps=steps, batch_size=2, context=16, accumulate=2, eval_every=4, eval_batches=2, checkpoint_every=3, precision="fp32")
    return Trainer(model, config, TokenStream(data / "train"), TokenStream(data / "valid"), run_dir, progress=False, objective=objective)


@pytest.mark.parametrize("family", ["bert", "xlnet"])
def test_other_families_and_objectives_resume_exactly(data, tmp_path, family):
    straight = other_family(data, tmp_path / "straight", family)
    history = straight.fit()
    assert "bits_per_byte" not in history[0] and straight.evaluate() == straight.evaluate()  # the same words are hidden each time
    stop_at(other_family(data, tmp_path / "twice", family), 7).fit()
    other_family(data, tmp_path / "twice", family).fit()
    same(tmp_path / "twice", tmp_path / "straight")
    load = {"bert": lambda p: load_bert(p, head=BertForPreTraining), "xlnet": lambda p: load_xlnet(p, head=XLNetLM)}[family]
    again = load(tmp_path / "twice/model")
    for name, p in straight.model.named_parameters(): assert torch.equal(p, dict(again.named_parameters())[name]), name


def test_another_objective_is_refused_by_name(data, tmp_path):
    stop_at(make(data, tmp_path), 4).fit()
    other = make(data, tmp_path)
    other.identity["objective"] = {"name": "permutation", "K": 6}
    with pytest.raises(BookError, match=r"objective.name \(next-word there, permutation here\)"): other.fit()


@pytest.mark.slow
def test_compiled_steps_are_the_same(data, tmp_path):
    plain, compiled = (make(data, tmp_path / str(c), steps=3, compile=c, gpt=dict(dropout=0.0)).fit() for c in (False, True))
    for a, b in zip(plain, compiled): assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-4)


# Who looks on

class Watcher(Callback):
    def __init__(self, stop_at=None): self.seen, self.at = [], stop_at
    def on_start(self, trainer): self.seen.append(("start", trainer.step))
    def on_row(self, trainer, row):
        self.seen.append(row)
        if row["step"] == self.at and "loss" in row: trainer.stop = "enough is enough"
    def on_end(self, trainer): self.seen.append(("end", trainer.step))


def test_callbacks_see_every_line(data, tmp_path):
    trainer, watcher = make(data, tmp_path), Watcher()
    trainer.callbacks = [watcher]
    assert watcher.seen[:0] == [] and trainer.fit() == watcher.seen[1:-1]
    assert watcher.seen[0] == ("start", 0) and watcher.seen[-1] == ("end", 24)


class Notes(Callback):
    def on_row(self, trainer, row):
        if "valid_loss" in row: trainer.record({"step": row["step"], "event": "seen"})


def test_a_callback_may_write_lines_of_its_own(data, tmp_path):
    trainer, watcher = make(data, tmp_path), Watcher()
    trainer.callbacks, trainer.keep_best = [Notes(), watcher], True
    history = trainer.fit()
    evaluations = [row for row in history if "valid_loss" in row]
    assert [row for row in watcher.seen[1:-1] if "valid_loss" in row] == evaluations and len(evaluations) == sum("event" in row for row in history) > 2
    assert (tmp_path / "best/model.safetensors").exists()


def test_a_callback_may_end_the_run_for_good(data, tmp_path):
    trainer = make(data, tmp_path)
    trainer.callbacks = [Watcher(stop_at=8)]
    history = trainer.fit()
    assert history[-1]["stopped"] == "enough is enough" and history[-1]["step"] == 8 and (tmp_path / "model").is_dir()
    assert make(data, tmp_path).fit() == history  # it stays ended, also without the callback


def test_the_best_model_is_kept(data, tmp_path):
    torch.manual_seed(7)
    trainer = make(data, tmp_path, steps=60, lr=0.3, schedule="constant", warmup=0, eval_every=5, clip=None, spike=None)  # far too fast: the end isn't the best
    trainer.keep_best = True
    history = trainer.fit()
    losses = [row["valid_loss"] for row in history if "valid_loss" in row]
    assert losses.index(min(losses)) < len(losses) - 1
    best = make(data, tmp_path / "other")
    best.model.load_state_dict(GPT.from_pretrained(tmp_path / "best").state_dict())
    assert best.evaluate()["loss"] == pytest.approx(min(losses), abs=1e-5)


def hold(data, run_dir, ready, release):
    trainer = make(data, run_dir)
    def wait(*_): ready.touch(), [time.sleep(0.02) for _ in iter(release.exists, True)]
    trainer.record = wait
    trainer.fit()


def test_one_writer_at_a_time(data, tmp_path):
    ready, release = tmp_path / "ready", tmp_path / "release"
    process = start(data, tmp_path / "run", ready, release, target=hold)
    while not ready.exists() and process.exitcode is None: time.sleep(0.02)
    try:
        with pytest.raises(BookError, match="Another process is training in"): make(data, tmp_path / "run").fit()
    finally: process.kill(), process.join()
    make(data, tmp_path / "run").fit()  # the dead process's lock is free
    check_log(tmp_path / "run", 24)


# Parts

def test_measuring_precision_leaves_no_trace(data, tmp_path):
    trainer = make(data, tmp_path)
    weights, random_numbers, position = [p.clone() for p in trainer.model.parameters()], torch.get_rng_state(), trainer.sampler.state_dict()
    took = precision_seconds(trainer, repeats=1)
    assert all(0 < s < math.inf for s in took.values()) and set(took) == {"fp32", "bf16"}
    assert torch.equal(torch.get_rng_state(), random_numbers) and trainer.sampler.state_dict() == position and trainer.precision == "fp32"
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, trainer.model.parameters()))


def test_the_measured_precision_stays_with_the_run(data, tmp_path):
    "Measured anew, a resumed run could go on in the other precision."
    stop_at(make(data, tmp_path, precision="auto"), 4).fit()
    described = json.loads((tmp_path / "config.json").read_text())
    described["precision"]["used"] = "bf16"
    (tmp_path / "config.json").write_text(json.dumps(described))
    again = make(data, tmp_path, precision="auto")
    again.fit()
    assert again.precision == "bf16"


@pytest.mark.parametrize("build", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
                                   lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5), lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True)])
def test_any_optimizer_survives_packing(build):
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
    model = torch.nn.Linear(4, 2)
    optimizer = build(model.parameters())
    step(model, optimizer)
    twin = torch.nn.Linear(4, 2)
    twin.load_state_dict(model.state_dict())
    other = build(twin.parameters())
    unpack_optimizer(other, twin, *pack_optimizer(optimizer, model))
    for _ in range(3): step(model, optimizer), step(twin, other)
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)


def test_held_out_windows_do_not_overlap_or_leave_the_stream(data):
    valid = TokenStream(data / "valid")
    for context, most in [(16, 4), (16, 10**6), (len(valid) - 1, 3), (1, 7)]:
        starts = held_out_windows(valid, context, most)
        assert len(starts) == min(most, (len(valid) - 1) // context) and (np.diff(starts) >= context).all()
        assert starts[0] == 0 and starts[-1] + context < len(valid)


def test_unigram_entropy_by_hand():
    "Three of four tokens are alike: H = ln 4 − ¾ ln 3; guessed from other frequencies it can only be more."
    valid = Stub(tokens=np.array([0, 0, 0, 1]), vocab_size=3)
    assert unigram_entropy(valid) == pytest.approx(math.log(4) - 0.75 * math.log(3))
    known = Stub(tokens=np.array([0, 2]), vocab_size=3)  # smoothed: 1.5, 0.5, 1.5 of 3.5
    assert unigram_entropy(valid, known) == pytest.approx(-0.75 * math.log(1.5 / 3.5) - 0.25 * math.log(0.5 / 3.5))


def test_differing_names_nested_values():
    assert differing({"a": {"b": 1, "c": 2}, "d": 0}, {"a": {"b": 1, "c": 3}}) == ["a.c (2 there, 3 here)", "d (0 there, None here)"]


def test_history_can_be_drawn(data, tmp_path):
    figure = plot_history(make(data, tmp_path, steps=5).fit())
    assert [len(trace.x) for trace in figure.data] == [5, 2, 5]
