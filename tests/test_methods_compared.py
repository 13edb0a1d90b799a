"""Methods compared: which run is chosen, what is sure, what a bound leaves, and that a broken comparison goes on."""
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import ANIMALS, LABELS, small_base

from llmbook import methods_compared as compared
from llmbook.corpora import BookError
from llmbook.finetuning import Plan
from llmbook.gpt import GPT
from llmbook.lora import LoRAConfig, LoRAModel
from llmbook.methods_compared import (
    PRICES,
    QUALITIES,
    Entry,
    Run,
    Way,
    advise,
    best_rate,
    compare,
    entries_of,
    gap,
    key_of,
    measure,
    measured,
    merges,
    picture,
    table_of,
)
from llmbook.prompt_tuning import prompt_model
from llmbook.qlora import prepare_qlora

DATA = {"train": ANIMALS, "valid": ANIMALS, "test": ANIMALS}


def run(name="a", lr=1.0, seed=0, valid=1.0, nats=(1.0, 2.0), **kw) -> Run:
    return Run(**{**dict(name=name, lr=lr, seed=seed, trained=10, kept=40, peak=100, seconds=0.1, merges=True, valid=valid, test=[[n, 2.0, 1.0] for n in nats]), **kw})


def entry(name, seeds, tokens=2.0, **kw) -> Entry:
    "An entry of a list of rows' nats for each seed."
    return Entry(**{**dict(name=name, lr=1.0, trained=10, kept=40, peak=100, seconds=0.1, merges=True, costs=torch.tensor([[[n, tokens, 1.0] for n in rows] for rows in seeds], dtype=torch.float64)), **kw})


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return small_base(tmp_path_factory.mktemp("base") / "model", n_head=4, n_kv_head=2)


def common(folder, **kw): return Plan(**{**dict(base=str(folder), epochs=1, batch_size=2, precision="fp32"), **kw})


def test_validation_rows_of_the_first_seed_choose_and_test_rows_have_no_say():
    runs = [run(lr=1.0, valid=2.0, nats=(0.1, 0.1)), run(lr=2.0, valid=1.0, nats=(9.0, 9.0)), run(lr=2.0, seed=1, valid=5.0), run("b", lr=7.0, valid=0.1)]
    assert best_rate(runs, "a") == 2.0
    found = {e.name: e for e in entries_of(runs)}
    assert found["a"].costs.shape == (2, 2, 3) and found["a"].lr == 2.0 and found["b"].lr == 7.0


def test_a_rate_that_broke_the_run_is_never_chosen():
    assert best_rate([run(lr=1.0, valid=math.nan), run(lr=2.0, valid=3.0), run(lr=3.0, valid=math.inf)], "a") == 2.0


def test_scores_are_ratios_of_sums_and_deviations_those_of_seeds():
    e = entry("a", [[1.0, 3.0], [2.0, 4.0]])
    assert e.scores().tolist() == [1.0, 1.5] and e.mean() == 1.25 and e.deviation() == pytest.approx(0.5 / math.sqrt(2))
    assert e.mean("tokens") == 0.5 and e.mean("answers") == 0.0
    assert entry("a", [[1.0, 3.0]], tokens=1.0).mean("answers") == 1.0 and entry("a", [[1.0]]).deviation() == 0.0


@pytest.mark.parametrize("better, worse, sure", [
    ([[1.0, 1.1, 0.9, 1.0]] * 3, [[2.0, 2.1, 1.9, 2.0]] * 3, True),                 # in each row and each seed
    ([[1.0, 5.0, 1.0, 1.0]] * 3, [[2.0, 1.0, 2.0, 2.6]] * 3, False),                # one row decides: the rows can't tell
    ([[1.0] * 4, [1.0] * 4, [2.5] * 4], [[2.0] * 4] * 3, False)])                   # one seed says otherwise
def test_sure_needs_rows_and_seeds(better, worse, sure):
    a, b = entry("a", better), entry("b", worse)
    assert gap(a, b).sure is sure
    assert not gap(b, a).sure and gap(b, a).value == pytest.approx(-gap(a, b).value)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=12), st.integers(1, 3))
def test_nothing_is_better_than_itself(rows, seeds):
    e = entry("a", [rows] * seeds)
    for quality in QUALITIES:
        g = gap(e, e, quality)
        assert g.value == 0 and not g.sure and g.wins == 0 and g.pairs == seeds**2


def test_other_rows_are_refused_by_name():
    with pytest.raises(BookError, match="a and b were judged on different rows"): gap(entry("a", [[1.0, 2.0]]), entry("b", [[1.0, 2.0, 3.0]]))
    with pytest.raises(BookError, match="different rows"): gap(entry("a", [[1.0, 2.0]]), entry("b", [[1.0, 2.0]], tokens=3.0))


ENTRIES = [entry("base", [[9.0] * 4], trained=0, kept=0, peak=0, seconds=0.0), entry("all", [[1.0] * 4] * 2, trained=1000, kept=4_000_000, peak=90_000_000, seconds=0.4),
           entry("pair", [[1.2] * 4] * 2, trained=100, kept=400_000, peak=50_000_000, seconds=0.3), entry("front", [[3.0] * 4] * 2, kept=40_000, peak=40_000_000, seconds=0.2, merges=False)]


@pytest.mark.parametrize("bounds, take, out", [
    ({}, "all", set()), ({"memory_mb": 60}, "pair", {"all"}), ({"file_mb": 0.1}, "front", {"all", "pair"}), ({"file_mb": 0.1, "must_merge": True}, "base", {"all", "pair", "front"}),
    ({"step_seconds": 0.3}, "pair", {"all"}), ({"must_merge": True}, "all", {"front"})])
def test_advice_keeps_to_every_bound(bounds, take, out):
    told = advise(ENTRIES, **bounds)
    assert told.take == take and set(told.out) == out and not set(told.out) & {told.take, *told.as_good}


def test_advice_names_what_cannot_be_told_from_the_best():
    near = entry("near", [[1.0, 1.0, 1.0, 1.1], [0.9, 1.0, 1.0, 1.0]])
    told = advise([*ENTRIES, near])
    assert {told.take, *told.as_good} == {"all", "near"} and not any("near" in r or "than all" in r for r in told.reasons)
    with pytest.raises(BookError, match="Nothing that was measured.*front: can't be merged"): advise(ENTRIES[3:], must_merge=True)


def test_pictures_and_tables_hold_every_entry():
    assert [r["way"] for r in table_of(ENTRIES)] == [e.name for e in ENTRIES]
    for price in PRICES:
        for quality in QUALITIES:
            fig = picture(ENTRIES, price, quality)
            assert [t.name for t in fig.data] == ["all", "pair", "front"] and len(fig.layout.shapes) + len(fig.layout.annotations) >= 1
    far, near = picture(ENTRIES), picture([entry("base", [[3.5] * 4], trained=0), *ENTRIES[1:]])
    assert not far.layout.shapes and far.layout.annotations[0].text == "base: 4.5" and near.layout.shapes[0].y0 == 1.75
    assert picture(ENTRIES).layout.xaxis.type == "log" and picture(ENTRIES, "seconds a step").layout.xaxis.type == "linear"


def test_what_merges_is_found_by_trying(folder):
    base = lambda: GPT.from_pretrained(folder)
    pair = LoRAModel(base(), LoRAConfig(2))
    for layer in pair.layers_with.values(): torch.nn.init.normal_(layer.lora_B["default"])
    assert merges(base()) and merges(pair)
    assert not merges(prepare_qlora(base(), rank=2)) and not merges(prompt_model(base(), 2))
    pair = LoRAModel(base(), LoRAConfig(2))
    pair.merge = lambda: pair.base.norm.weight.data.mul_(2)
    assert not merges(pair), "logits that move are no merge"


def test_a_key_changes_with_whatever_the_run_follows_from(folder):
    plan, other = common(folder), {**DATA, "train": LABELS}
    keys = [key_of(plan, "a", DATA), key_of(plan, "b", DATA), key_of(common(folder, seed=1), "a", DATA), key_of(common(folder, lr=1.0), "a", DATA), key_of(common(folder, options={"rank": 1}), "a", DATA), key_of(plan, "a", other)]
    assert len(set(keys)) == len(keys) and keys[0] == key_of(common(folder), "a", dict(DATA))


def test_a_finished_run_is_read_and_not_done_again(folder, tmp_path, monkeypatch):
    plan, asked = common(folder, method=""), []
    monkeypatch.setattr(compared, "launch", lambda fn, n, *args, **kw: asked.append(args) or [fn(*args)])
    first, again = measured(plan, "base", DATA, tmp_path), measured(plan, "base", DATA, tmp_path)
    assert first == again and len(asked) == 1 and first.trained == first.kept == 0
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["valid"] == first.valid and not list(tmp_path.glob("*.part"))
    measured(plan, "base", DATA), measured(plan, "base", DATA)
    assert len(asked) == 3, "without a folder nothing is kept"


def test_rates_first_then_seeds_at_the_best(folder, monkeypatch):
    asked = []
    def pretended(plan, name, data, folder): return asked.append((name, plan.lr, plan.seed)) or run(name, plan.lr, plan.seed, valid=abs(plan.lr - 2))
    monkeypatch.setattr(compared, "measured", pretended)
    compare(common(folder), [Way("base"), Way("a", "full", (1.0, 2.0)), Way("b", "lora", (2.0, 5.0))], DATA, seeds=[4, 5])
    assert asked == [("base", 0.0, 4), ("a", 1.0, 4), ("a", 2.0, 4), ("b", 2.0, 4), ("b", 5.0, 4), ("a", 2.0, 5), ("b", 2.0, 5)]


def test_a_run_is_measured_and_its_seed_matters(folder):
    one, again, other = (measure(common(folder, method="lora", lr=1e-2, seed=s, options={"rank": 2}), "LoRA", DATA) for s in (0, 0, 1))
    assert one.test == again.test and one.test != other.test
    assert one.trained > 0 and one.kept >= 4 * one.trained and one.seconds > 0 and one.merges and len(one.test) == len(ANIMALS)
    with pytest.raises(BookError, match="1 step can't be timed"): measure(common(folder, method="lora", batch_size=64), "LoRA", DATA)


def test_a_child_of_its_own_that_fails_says_so(folder):
    with pytest.raises(BookError, match="no method"): measured(common(folder, method="magic"), "magic", DATA)
