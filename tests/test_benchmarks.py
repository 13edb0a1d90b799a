"""Benchmarks as a tool: the order of calls, the report, and input that makes no sense. Nothing here depends on the clock."""
import json

import pytest

from llmbook import bench_cases, benchmarks
from llmbook.bench_cases import Case, interleaved
from llmbook.benchmarks import CASES, report, run_benchmarks
from llmbook.corpora import BookError


def test_sides_take_turns_and_the_first_call_is_not_counted():
    calls = []
    ours, theirs = interleaved(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3)
    assert calls == ["a", "b"] * 4 and len(ours) == len(theirs) == 3


def test_a_report_says_what_was_met_and_missed(monkeypatch):
    monkeypatch.setattr(bench_cases, "interleaved", lambda a, b, n, on_call: ([1.0, 9.0, 2.0], [6.0, 4.0, 4.0]))
    cases = {"met": Case("met", "w", "torch", "MB", 1.9, lambda: (int, int, 10.0, {"note": 1})), "missed": Case("missed", "w", "torch", "MB", 4.0, lambda: (int, int, 10.0, {}))}
    monkeypatch.setattr(benchmarks, "CASES", cases)
    results = run_benchmarks(progress=False)
    assert results["cases"]["met"]["ratio"] == 2.0 and results["cases"]["met"]["llmbook_rate"] == 5.0
    text = report(json.loads(json.dumps(results)))
    assert "goal 1.90: met" in text and "missed by 50%" in text and "note 1" in text and "torch 2" in text


def test_a_missing_library_is_said(monkeypatch):
    def prepare(): raise ImportError("no", name="transformers")
    monkeypatch.setattr(benchmarks, "CASES", {"x": Case("x", "w", "transformers", "MB", 1.0, prepare)})
    assert "transformers is not installed" in report(run_benchmarks(progress=False))


def test_bad_input_is_a_sentence():
    with pytest.raises(BookError, match="bpe-train"): run_benchmarks(["nothing"])
    with pytest.raises(BookError, match="repeats"): run_benchmarks(repeats=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_runs(name):
    assert run_benchmarks([name], repeats=1, progress=False)["cases"][name]["ratio"] > 0
