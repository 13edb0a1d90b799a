"""What the chapter can't show: random configurations of failing clusters, and input that makes no sense."""
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmbook.checkpoint_interval import (FAILURES, best_interval, checkpoint_bytes, daly, expected_time, goodput, mtbf, save_hours,
                                         simulate, young)
from llmbook.corpora import BookError
from llmbook.sizing import MODELS

hours = lambda low, high: st.floats(math.log(low), math.log(high)).map(math.exp)
saves, means, intervals, restarts = hours(1e-4, 10), hours(0.1, 1000), hours(0.01, 50), st.sampled_from([0.0, 0.1, 1.0])
many = settings(max_examples=200, deadline=None)
few = settings(max_examples=25, deadline=None, derandomize=True)  # statistics: the same draws every time


@many
@given(saves, means, restarts, hours(1e-3, 1e3))
def test_best_interval_is_a_minimum_of_expected_time(save, mean, restart, ratio):
    "No other interval is better by more than rounding, and the best is below the mean time between failures."
    best = best_interval(save, mean)
    assert 0 < best <= mean  # equal only where 1 - exp(-y) rounds to 1
    assert expected_time(best, save, mean, restart) <= expected_time(best * ratio, save, mean, restart) * (1 + 1e-12)


@many
@given(saves, means, hours(1.01, 20))
def test_best_interval_grows_with_save_and_mean(save, mean, factor):
    best = best_interval(save, mean)
    assume(save * factor < 20 * mean)  # beyond, the root differs from 1 by less than a float can tell
    assert best_interval(save * factor, mean) > best
    assert best_interval(save, mean * factor) > best
    assert best_interval(save * factor, mean * factor) == pytest.approx(best * factor, rel=1e-9)  # the unit of time is free


@many
@given(hours(1e-6, 1e-2), means)
def test_formulas_agree_for_short_saves(share, mean):
    "x = sqrt(2c) - 2c/3 + ...: Young is off by sqrt(2c)/3, Daly by less than c."
    exact = best_interval(share * mean, mean)
    assert 0 < young(share * mean, mean) / exact - 1 < 0.5 * math.sqrt(2 * share)
    assert abs(daly(share * mean, mean) / exact - 1) < share


@many
@given(intervals, saves, means, restarts, st.floats(0, 1), st.sampled_from([0.5, 0.7, 1.0, 1.5, 3.0]))
def test_goodput_is_a_share(interval, save, mean, restart, part, shape):
    "Between 0 and what saving alone leaves; less with longer restarts, and less with writing that lags."
    assume(mean / (interval + save) < 1000)
    share = goodput(interval, save, mean, restart, shape=shape)
    assert 0 <= share <= interval / (interval + save) * (1 + 1e-9)
    assert goodput(interval, save, mean, restart + 0.5, shape=shape) <= share
    assert goodput(interval, save, mean, restart, part * interval, shape) <= share
    assert goodput(interval, save, math.inf, restart) == pytest.approx(interval / (interval + save))


@many
@given(intervals, saves, means, restarts)
def test_both_derivations_agree(interval, save, mean, restart):
    "The sum over valid saves for a shape that is nearly 1 against the closed form, and failures that get rarer."
    assume((interval + save + restart) / mean < 20 and mean / (interval + save) < 1000)
    assert goodput(interval, save, mean, restart, shape=1 + 1e-9) == pytest.approx(goodput(interval, save, mean, restart), rel=1e-5)
    assert expected_time(interval, save, mean, restart) > expected_time(interval, save, mean * 2, restart)
    assert expected_time(interval, save, mean, restart) > expected_time(interval, save, math.inf, restart)


@few
@given(st.floats(0.1, 4), st.floats(0.01, 1), st.floats(1.5, 50), st.floats(0, 2), st.integers(1, 12), st.integers(0, 9999))
def test_simulation_equals_the_closed_form(interval, save, mean, restart, segments, seed):
    "The mean of 2,000 jobs within 5 standard errors, where they fail often enough, 200 times, for a mean to be normal."
    assume(2000 * segments * (interval + save) / mean > 200)
    runs = simulate(interval, save, mean, restart, interval * segments, 2000, seed=seed)
    error = runs.wall.std() / math.sqrt(2000)
    assert abs(runs.wall.mean() - expected_time(interval, save, mean, restart, interval * segments)) < 5 * error


@few
@given(intervals, saves, st.floats(0.5, 50), restarts, st.floats(0, 1), st.floats(0.3, 5.5), st.sampled_from([0.5, 1.0, 2.0]))
def test_hours_and_saves_add_up(interval, save, mean, restart, part, segments, shape):
    "Every hour is of one kind, none is negative; all work is saved, whole segments once each, the last may be shorter."
    assume((interval + save + restart) / mean < 2)
    work = interval * segments
    runs = simulate(interval, save, mean, restart, work, 100, part * interval, shape, seed=3)
    assert min(x.min() for x in (runs.lost, runs.saving, runs.restarting)) > -1e-9
    assert runs.wall == pytest.approx(work + runs.lost + runs.saving + runs.restarting)
    assert (runs.saves == math.ceil(segments - 1e-9)).all()
    assert (runs.saving > runs.saves * save - 1e-9).all() and (runs.restarting <= runs.failures * restart + 1e-9).all()
    assert 0 < runs.goodput < 1


@few
@given(st.integers(0, 10_000), st.floats(0.2, 2), st.floats(0.01, 0.5), st.floats(0, 0.9), st.floats(0.5, 4.5), st.floats(0, 1))
def test_background_writes_event_by_event(seed, interval, save, restart, segments, part):
    "A plain loop over every snapshot and its validity, on the same gaps."
    write, work, mean = part * interval, segments * interval, 2.0
    gaps = iter(np.random.default_rng(seed).weibull(1.0, 5000) * mean)
    clock, kept, ready = 0.0, 0.0, 0.0
    while kept < work:
        gap, now, done, on_disk = next(gaps), ready, kept, kept
        ready = restart
        while done < work:  # snapshots until the failure
            piece = min(interval, work - done)
            now, done = now + piece + save, done + piece
            if now + write <= gap:
                on_disk = done
        kept = on_disk
        clock += now + write if kept >= work else gap
    runs = simulate(interval, save, mean, restart, work, 1, write, seed=seed)
    assert runs.wall[0] == pytest.approx(clock, abs=1e-6)


def test_failures_during_restarts():
    "A restart as long as the mean gap takes M(e - 1) on average, not M."
    runs = simulate(1, 0.1, 1, 1, 4, 4000, seed=1)
    tries = runs.restarting.mean() / (runs.failures.mean() - runs.restarting.mean())  # failures outside = failures - hours in restarts / M
    assert tries == pytest.approx(math.e - 1, rel=0.05)


def test_without_failures_there_is_only_saving():
    runs = simulate(2, 0.5, math.inf, 3, 7, 5)
    assert runs.wall.tolist() == [9.0] * 5 and not runs.failures.any() and (runs.saves == 4).all()
    assert simulate(2, 0.5, math.inf, 3, 7, 5, write=1.5).wall.tolist() == [10.5] * 5


def test_clusters():
    assert mtbf(16384, FAILURES["Llama 3"].per_gpu_hour) == pytest.approx(54 * 24 / 419)
    assert checkpoint_bytes(MODELS["GPT-2"]) == 12 * 124_439_808
    assert save_hours(3600e9, 4, per_gpu=1e9, storage=1e12) == pytest.approx(0.25)
    assert save_hours(3600e9, 4000, per_gpu=1e9, storage=1e12) == pytest.approx(0.001)  # a quarter of 4 TB/s: the storage is narrower


@pytest.mark.parametrize("call, said", [
    (lambda: young(0, 1), "save=0"), (lambda: daly(1, -1), "mtbf=-1"), (lambda: best_interval(math.nan, 1), "save=nan"),
    (lambda: best_interval("1", 1), "save='1'"), (lambda: best_interval(True, 1), "save=True"), (lambda: best_interval(1, math.inf), "finite mtbf"),
    (lambda: young(math.inf, 1), "infinite"), (lambda: expected_time(1, 1, 1, restart=-1), "restart=-1"), (lambda: mtbf(0, 1e-5), "gpus=0"),
    (lambda: goodput(1, 1, 1, write=2), "to write"), (lambda: goodput(1, 1, 1, shape=0.1), "shape=0.1"), (lambda: goodput(1e-9, 1e-9, 1, shape=0.5), "too short"),
    (lambda: simulate(1, 1, 1, runs=2.5), "whole number"), (lambda: simulate(1, 1, 1, work=0), "work=0"),
    (lambda: simulate(1, 0.1, 0.05, work=10, runs=2), "20,000 failures"), (lambda: save_hours(1, 1, storage=0), "storage=0")])
def test_senseless_input_is_refused(call, said):
    with pytest.raises(BookError, match=said):
        call()


def test_hopeless_intervals_are_worth_nothing():
    "No overflow: a thousand mean times between two saves never get through."
    assert expected_time(1000, 1, 1) == math.inf and goodput(1000, 1, 1) == 0
