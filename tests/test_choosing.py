"""What the chapter can't show: the chooser on any demand keeps every limit, never gets worse by being given more, and refuses in one sentence."""
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmbook.bert import BertConfig
from llmbook.choosing import (BESIROGLU, FAMILIES, HOFFMANN, READINGS, REPEATED, STEPS, TASKS, TUNING, Demand, answer_flops, answer_seconds,
                              choose, enough, expected_loss, families, grid, shape, sized, spoken, worth)
from llmbook.corpora import BookError
from llmbook.sizing import DEVICES, parameters, predicted, training_memory, training_seconds

demands = st.builds(
    Demand, task=st.sampled_from(list(TASKS)), text=st.floats(4, 11).map(lambda x: 10 ** x), seconds=st.floats(1, 7).map(lambda x: 10 ** x),
    device=st.sampled_from(list(DEVICES.values())), memory=st.floats(7.3, 11).map(lambda x: 10 ** x), context=st.sampled_from([64, 512, 2048]),
    vocab=st.sampled_from([1024, 50257]), words=st.integers(1, 4), latency=st.one_of(st.just(math.inf), st.floats(-4, 1).map(lambda x: 10 ** x)),
    precision=st.sampled_from(["fp32", "bf16 autocast"]), share=st.floats(0.1, 1), pretrained=st.booleans())
scratch = demands.map(lambda d: replace(d, pretrained=False))


def plan_of(demand):
    "A plan; a refusal is no example."
    try:
        return choose(demand)
    except BookError:
        assume(False)


@settings(max_examples=80, deadline=None)
@given(demands)
def test_the_choice_keeps_every_limit_and_a_refusal_is_one_sentence(demand):
    try:
        p = choose(demand)
    except BookError as e:
        assert "\n" not in str(e) and str(e).count(". ") == 0 and str(e).endswith(".")
        return
    t, c = p.trial, p.config
    assert isinstance(c, FAMILIES[p.family]) and t.candidate.n == sum(parameters(c).values())
    assert t.bytes == sum(p.memory.values()) <= demand.limit
    assert p.memory == training_memory(c, t.batch, demand.context, demand.precision, t.recompute)
    taken = training_seconds(c, t.tokens, demand.device, demand.precision, demand.share, demand.context, t.recompute)
    assert taken == pytest.approx(p.seconds) and taken <= demand.seconds * (1 + 1e-9)
    assert answer_seconds(c, demand) <= demand.latency
    if demand.pretrained:
        assert t.tokens == TUNING * demand.text and p.saves == {}
    else:
        assert STEPS * t.batch * demand.context <= t.tokens and t.tokens * predicted(c, demand.context) <= READINGS * demand.text * (1 + 1e-9)
    assert all(why for _, why in p.rejected) and all(r.number for r in p.reasons)


@settings(max_examples=80, deadline=None)
@given(scratch, st.sampled_from(["memory", "seconds", "text", "latency"]), st.floats(1, 20))
def test_more_of_anything_never_makes_the_expected_loss_worse(demand, name, times):
    before = plan_of(demand)
    after = choose(replace(demand, **{name: times * getattr(demand, name)}))
    assert after.family == before.family and after.trial.loss <= before.trial.loss
    assert all(nats >= 0 for nats in before.saves.values())


@settings(max_examples=40, deadline=None)
@given(scratch)
def test_no_other_shape_of_the_grid_is_better(demand):
    p = plan_of(demand)
    for t in grid(p.family, demand.vocab, demand.context, demand.precision):
        for batch, recompute, size in t.ways:
            tokens = min(demand.seconds * demand.rate / t.flops[recompute], READINGS * demand.text / predicted(t.config, demand.context))
            if size <= demand.limit and tokens >= STEPS * batch * demand.context and answer_seconds(t.config, demand) <= demand.latency:
                assert expected_loss(t.n, tokens * predicted(t.config, demand.context), demand.text) > p.trial.loss - 0.01 - 1e-9


@settings(max_examples=60, deadline=None)
@given(scratch)
def test_what_the_refusal_asks_for_is_enough(demand):
    try:
        choose(demand)
    except BookError:
        family = families(demand.task, demand.vocab, demand.context, demand.words)[0].name
        smallest = grid(family, demand.vocab, demand.context, demand.precision)[0]
        for _ in range(2):  # more memory may end recomputation, and with it some of the time that was asked for
            demand = replace(demand, **enough(smallest, demand))
        assert choose(demand).trial.fault == ""


def test_more_memory_takes_a_larger_published_model():
    night = Demand("generate", 1e5, 1e6, context=256, pretrained=True, device=DEVICES["H100 SXM"])
    sizes = [choose(replace(night, memory=gb * 1e9)).trial.candidate.n for gb in (5, 10, 20, 40, 80)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(0, 1e6))
def test_worth_grows_and_never_exceeds_what_was_used(unique, used, more):
    value = worth(used, unique, REPEATED)
    assert value <= used * (1 + 1e-9) and value <= worth(used + more, unique, REPEATED) * (1 + 1e-9)
    assert value <= unique * (1 + REPEATED) * (1 + 1e-9)


@pytest.mark.parametrize("fit", [HOFFMANN, BESIROGLU])
@given(exponent=st.floats(6, 13), aside=st.floats(0.2, 5))
def test_the_optimum_is_the_lowest_on_its_line_of_equal_flops(fit, exponent, aside):
    tokens = 10 ** exponent
    n = fit.optimal_parameters(tokens)
    assert fit.loss(n, tokens) <= fit.loss(n * aside, tokens / aside) + 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_longer_texts_and_more_words_never_cost_less(task):
    for family in FAMILIES:
        for vocab in (512, 32000):
            c = shape(family, 4, 4, vocab, 1024)
            price = lambda T, w: answer_flops(c, task, T, w)
            assert price(64, 1) <= price(128, 1) <= price(1024, 1) and price(128, 1) <= price(128, 3)


@pytest.mark.parametrize("call", [
    lambda: Demand("translate", 1e6, 60), lambda: Demand("generate", 0, 60), lambda: Demand("generate", 1e6, -1), lambda: Demand("generate", 1e6, 60, share=2),
    lambda: Demand("generate", 1e6, 60, memory=0), lambda: Demand("generate", 1e6, 60, precision="fp7"), lambda: Demand("generate", math.nan, 60),
    lambda: answer_flops(object(), "generate"), lambda: answer_flops(BertConfig(10, 1, 1, 8), "sing"),
    lambda: choose(Demand("generate", 1e6, 60, memory=1e6)), lambda: choose(Demand("generate", 1e6, 1e-3)), lambda: choose(Demand("generate", 10, 60)),
    lambda: choose(Demand("generate", 1e6, 60, latency=1e-12)), lambda: choose(Demand("classify", 1e6, 60, context=4096, pretrained=True)),
    lambda: choose(Demand("classify", 1e9, 60, pretrained=True)),
])
def test_senseless_or_impossible_demands_are_one_sentence(call):
    with pytest.raises(BookError) as e:
        call()
    assert "\n" not in str(e.value)


def test_units():
    assert [spoken(s) for s in (0.002, 1, 60, 86400, 3600 * 5)] == ["2 ms", "1 s", "1 minute", "1 day", "5 hours"]
    assert [sized(n) for n in (5e6, 2e9, 3e12)] == ["5 MB", "2 GB", "3 TB"]
