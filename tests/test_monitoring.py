"""What looks at a run: rules on made-up curves, budgets on a made-up clock, folders in any state."""
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.corpora import BookError
from llmbook.monitoring import LivePlot, OverfitWarning, TensorBoardLog, compare, overfitting, plot_runs, points, read_run, runs, seconds_of, thinned


def log_of(train, valid, every=5):
    "A log with `every` steps before each evaluation."
    rows = [{"step": 0, "valid_loss": 7.0}]
    for i, (t, v) in enumerate(zip(train, valid)):
        rows += [{"step": i * every + j + 1, "loss": float(t), "lr": 1e-3, "tokens": (i * every + j + 1) * 10, "tokens_per_s": 100.0} for j in range(every)]
        rows.append({"step": (i + 1) * every, "valid_loss": float(v), "perplexity": math.exp(v)})
    return rows


class Run:
    "As much of a Trainer as a callback sees."
    def __init__(self, run_dir, callbacks=()):
        self.run_dir, self.callbacks, self.history, self.stop, self.said = run_dir, callbacks, [], "", []

    def say(self, text): self.said.append(text)

    def record(self, row):
        self.history.append(row)
        for callback in self.callbacks: callback.on_row(self, row)


def test_the_rule():
    assert overfitting(log_of([6, 5, 4, 3, 2, 1], [6, 5, 5.1, 5.2, 5.3, 5.4])).best.step == 10
    assert overfitting(log_of([6, 5, 4, 3, 2, 1], [6, 5, 5.1, 5.2, 5.3, 5.4])).now.step == 25
    assert overfitting(log_of([6, 5, 6, 7, 8, 9], [6, 5, 5.1, 5.2, 5.3, 5.4])) is None, "training gets worse as well"
    assert overfitting(log_of([6, 5, 4, 3, 2, 1], [6, 5, 5.1, 5.2, 4.9, 5.1])) is None, "a new best starts anew"
    assert overfitting(log_of([6, 5, 4, 3, 2, 1], [6, 5, 5.001, 5.002, 5.003, 5.004])) is None, "noise"
    assert overfitting([]) is None and overfitting([{"step": 0, "valid_loss": 1.0}]) is None
    with pytest.raises(BookError): overfitting([], patience=0)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(1, 7), min_size=1, max_size=15), st.integers(1, 4))
def test_a_falling_curve_never_rings_and_a_ring_is_true(valid, patience):
    assert overfitting(log_of(range(len(valid), 0, -1), sorted(valid, reverse=True)), patience) is None
    found = overfitting(log_of(range(len(valid), 0, -1), valid), patience)
    if found:
        after = [p for p in points(log_of(range(len(valid), 0, -1), valid)) if found.now.step - 5 * patience < p.step <= found.now.step]
        assert len(after) == patience and all(p.valid >= found.best.valid + 0.01 for p in after)


def test_the_warning_comes_once_and_may_stop(tmp_path):
    rows = log_of([6, 5, 4, 3, 2, 1, 1, 1], [6, 5, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6])
    run = Run(tmp_path, [OverfitWarning(stop=True)])
    for row in rows: run.record(row)
    assert sum("event" in r for r in run.history) == 1 and len(run.said) == 1 and run.stop.startswith("Overfitting")
    again = Run(tmp_path, [OverfitWarning()])
    again.history = [r for r in run.history if r["step"] <= 30]
    for row in rows:
        if row["step"] > 30: again.record(row)
    assert sum("event" in r for r in again.history) == 1, "a resumed run doesn't warn twice"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3000), st.integers(1, 500))
def test_thinning_keeps_evaluations(steps, most):
    history = [row for i in range(steps) for row in ([{"step": i, "loss": 1.0}] + [{"step": i, "valid_loss": 2.0}] * (i % 100 == 0))]
    kept = thinned(history, most)
    assert sum("loss" in r for r in kept) <= most and sum("valid_loss" in r for r in kept) == sum("valid_loss" in r for r in history)


@pytest.mark.parametrize("step, draw", [(0.001, 0.05), (0.02, 0.03), (2.0, 0.03)])
def test_the_live_plot_keeps_its_budget(step, draw):
    now = [0.0]
    plot = LivePlot(share=0.01, clock=lambda: now[0])
    run = Run(None, [plot])
    plot.on_start(run)
    plot.widget = object()  # as if a notebook were there

    def drawing(history): now[0] += draw
    plot.draw = drawing
    for i in range(20_000):
        now[0] += step
        run.record({"step": i, "loss": 1.0})
    assert plot.draws > 0 and plot.spent <= 0.01 * now[0] + draw


def test_without_a_notebook_there_is_no_plot(tmp_path, capsys):
    plot = LivePlot()
    run = Run(tmp_path, [plot])
    plot.on_start(run), run.record({"step": 1, "loss": 1.0}), plot.on_end(run)
    assert plot.draws == 0 and capsys.readouterr().out == ""


def test_event_files_after_a_crash_and_a_return(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    def steps(): return [e.step for e in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")]
    first = Run(tmp_path, [TensorBoardLog()])
    first.callbacks[0].on_start(first)
    for i in range(1, 9): first.record({"step": i, "loss": 1.0 / i})
    second = Run(tmp_path, [TensorBoardLog()])  # the first never closed its file: it was killed
    second.history = first.history[:5]
    second.callbacks[0].on_start(second)
    for i in range(6, 13): second.record({"step": i, "loss": 1.0 / i})
    second.history = second.history[:10]
    second.record({"step": 10, "rolled_back": "the loss is nan", "from": 12})
    for i in range(11, 14): second.record({"step": i, "loss": 1.0 / i})
    second.callbacks[0].on_end(second)
    assert steps() == list(range(1, 14))


def write(folder, config, log):
    folder.mkdir(parents=True)
    if config is not None: (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if log is not None: (folder / "log.jsonl").write_text(log if isinstance(log, str) else "".join(json.dumps(r) + "\n" for r in log))


def test_one_broken_run_hides_no_other(tmp_path):
    good = {"train": {"steps": 30, "lr": 0.1}, "data": {"train": "a" * 64}, "precision": {"used": "fp32", "seconds": {"fp32": 1.0}}}
    history = log_of([6, 5, 4], [6, 5, 4.5])
    write(tmp_path / "a", good, history)
    write(tmp_path / "b", {**good, "train": {"steps": 30, "lr": 0.2}}, history)
    write(tmp_path / "sub/torn", good, "".join(json.dumps(r) + "\n" for r in history) + '{"step": 99, "lo')
    write(tmp_path / "noconfig", None, history)
    write(tmp_path / "nonsense", "[]", "3\nnull\n\xff\n")
    write(tmp_path / "empty", good, "")
    (tmp_path / "other").mkdir()
    found = {r.name: r for r in runs(tmp_path)}
    assert sorted(found) == ["a", "b", "empty", "noconfig", "nonsense", "sub/torn"]
    assert [found[n].fault for n in ("a", "b", "empty")] == ["", "", ""] and all(found[n].fault.endswith(".") for n in ("sub/torn", "noconfig", "nonsense"))
    table = {row["run"]: row for row in compare(list(found.values()))}
    assert table["a"]["best held-out loss"] == 4.5 and table["a"]["at step"] == 15 and table["a"]["steps"] == "15 of 30" and table["a"]["tokens/s"] == 100
    assert table["a"]["what differs"] == "lr 0.1" and table["b"]["what differs"] == "lr 0.2" and table["noconfig"]["what differs"] == ""
    assert len(plot_runs(list(found.values())).data) == 8
    for folder in (tmp_path / "other", tmp_path / "none"):
        with pytest.raises(BookError): runs(folder)
    assert read_run(tmp_path / "none").fault.count(".") >= 1


def test_seconds_of_logs_with_and_without_a_clock():
    assert seconds_of(log_of([1], [1]))[-1] == pytest.approx(0.5)
    assert seconds_of([{"step": 1, "tokens": 10, "tokens_per_s": 5.0, "seconds": 7.0}, {"step": 1, "valid_loss": 1.0, "seconds": 8.0}, {"step": 1, "event": "x"}]) == [7.0, 8.0, 8.0]
