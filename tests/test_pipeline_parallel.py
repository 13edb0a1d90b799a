"Schedules of any size, stages of any cut, and the executor against one process and against torch's pipelines."
import time
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig
from llmbook.launch import launch
from llmbook.optimizers import AdamW
from llmbook.pipeline_parallel import (SCHEDULES, Op, Pipeline, SavedBytes, Stage, bubble, bubble_share, gpipe, most_kept, needs,
                                       one_f_one_b, shares, simulate, sum_tied, tag)

SIZES = dict(p=st.integers(1, 9), m=st.integers(1, 20))
kinds = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


def plans(schedule, p, m): return [schedule(p, m, r) for r in range(p)]


# ---------------------------------------------------------------- schedules

@kinds
@settings(deadline=None, max_examples=60)
@given(**SIZES)
def test_each_operation_once_and_forward_before_backward(schedule, p, m):
    for ops in plans(schedule, p, m):
        assert sorted(ops) == sorted([Op(kind, i) for kind in "FB" for i in range(m)])
        assert all(ops.index(Op("F", i)) < ops.index(Op("B", i)) for i in range(m))


@kinds
@settings(deadline=None, max_examples=60)
@given(**SIZES, t_f=st.integers(1, 5), t_b=st.integers(1, 5), t_send=st.integers(0, 3))
def test_a_timeline_respects_every_dependency(schedule, p, m, t_f, t_b, t_send):
    events = simulate(plans(schedule, p, m), t_f, t_b, t_send)
    at = {(e.kind, e.i, e.rank): e for e in events}
    assert len(at) == len(events) == 2 * p * m
    for e in events:
        assert e.end - e.start == (t_f if e.kind == "F" else t_b)
        assert all(at[n].end + t_send * (n[2] != e.rank) <= e.start for n in needs(Op(e.kind, e.i), e.rank, p))
    for r in range(p):
        own = sorted(e for e in events if e.rank == r)
        own.sort(key=lambda e: e.start)
        assert all(a.end <= b.start for a, b in zip(own, own[1:]))
        assert [Op(e.kind, e.i) for e in own] == schedule(p, m, r)


@kinds
@settings(deadline=None, max_examples=60)
@given(**SIZES, t_f=st.integers(1, 7), t_b=st.integers(1, 7))
def test_the_bubble_is_the_formulas(schedule, p, m, t_f, t_b):
    events = simulate(plans(schedule, p, m), Fraction(t_f), Fraction(t_b))
    assert bubble(events) == Fraction(p - 1, m + p - 1)
    assert max(e.end for e in events) == (m + p - 1) * (t_f + t_b)
    assert bubble_share(p, m) == pytest.approx((p - 1) / (m + p - 1), abs=1e-15)


@settings(deadline=None, max_examples=60)
@given(**SIZES)
def test_what_is_kept(p, m):
    assert [most_kept(gpipe(p, m, r)) for r in range(p)] == [m] * p
    assert [most_kept(one_f_one_b(p, m, r)) for r in range(p)] == [min(p - r, m) for r in range(p)]


@settings(deadline=None, max_examples=40)
@given(**SIZES, data=st.data())
def test_no_valid_order_keeps_fewer_than_1f1b_on_the_last_rank_or_beats_the_bubble(p, m, data):
    "A random order of each rank that the simulator accepts takes at least as long as 1F1B's."
    def shuffled():
        ops, ahead, behind = [], 0, 0
        while behind < m:
            if ahead < m and (ahead == behind or data.draw(st.booleans())): ops.append(Op("F", ahead)); ahead += 1
            else: ops.append(Op("B", behind)); behind += 1
        return ops
    mine = [shuffled() for _ in range(p)]
    try: events = simulate(mine, 1, 2)
    except BookError: return
    assert max(e.end for e in events) >= (m + p - 1) * 3
    assert most_kept(mine[-1]) >= most_kept(one_f_one_b(p, m, p - 1))


def test_times_by_rank_and_a_circle_of_waiting():
    assert max(e.end for e in simulate(plans(one_f_one_b, 2, 2), [1, 2], [1, 3])) == 1 + 2 * 5 + 1
    with pytest.raises(BookError, match="wait forever: rank 0 at B0"): simulate([[Op("B", 0), Op("F", 0)]])
    crossed = [gpipe(2, 2, 0), [Op("F", 0), Op("B", 1), Op("F", 1), Op("B", 0)]]
    with pytest.raises(BookError, match="rank 1 at B1"): simulate(crossed)
    with pytest.raises(BookError, match="wait forever"): simulate([gpipe(2, 2, 0)[1:], gpipe(2, 2, 1)])


def test_tags_differ():
    ops = gpipe(1, 50, 0)
    assert len({tag(op) for op in ops}) == len(ops)


@pytest.mark.parametrize("p, m, rank", [(0, 1, 0), (2, 0, 0), (2, 2, 2), (2, 2, -1), (2.0, 2, 0), (2, "4", 0)])
@kinds
def test_impossible_places(schedule, p, m, rank):
    with pytest.raises(BookError): schedule(p, m, rank)


# ---------------------------------------------------------------- stages

@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), p=st.integers(1, 40))
def test_shares(n, p):
    if n < p:
        with pytest.raises(BookError, match="use at most"): shares(n, p)
        return
    ranges = shares(n, p)
    assert [i for r in ranges for i in r] == list(range(n)) and len(ranges) == p
    sizes = [len(r) for r in ranges]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True) and min(sizes) >= 1


FAMILIES = {
    "gpt2": GPTConfig(vocab_size=40, context=12, n_layer=5, n_head=2, n_embd=16),
    "gpt2 untied": GPTConfig(vocab_size=40, context=12, n_layer=5, n_head=2, n_embd=16, tie=False),
    "llama": GPTConfig.llama(vocab_size=40, context=12, n_layer=5, n_head=4, n_kv_head=2, n_embd=16),
    "llama untied": GPTConfig.llama(vocab_size=40, context=12, n_layer=5, n_head=4, n_kv_head=1, n_embd=16, tie=False),
}


def model_of(config, dtype=torch.float64):
    torch.manual_seed(1)
    return GPT(config).to(dtype)


def batch_of(config, B=8, T=12, masked=True):
    g = torch.Generator().manual_seed(2)
    ids, targets = (torch.randint(config.vocab_size, (B, T), generator=g) for _ in range(2))
    if masked: targets[0] = -100; targets[3, :5] = -100
    return ids, targets


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_stages_in_a_row_are_the_model(family, p):
    model = model_of(FAMILIES[family])
    ids, targets = batch_of(FAMILIES[family])
    stages = [Stage(model, p, r) for r in range(p)]
    names = [n for s in stages for n, _ in s.named_parameters()]
    assert set(names) == {n for n, _ in model.named_parameters()}
    assert len(names) - len(set(names)) == (FAMILIES[family].tie and p > 1)
    x = ids
    for stage in stages: x = stage(x)
    torch.testing.assert_close(x, model(ids), rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("m", [1, 2, 8])
def test_one_stage_needs_no_processes(schedule, m):
    config = FAMILIES["gpt2"]
    ids, targets = batch_of(config)
    whole, stage = model_of(config), Stage(model_of(config), 1, 0)
    pipe = Pipeline(stage, schedule, m)
    loss = whole.loss(ids, targets)
    loss.backward()
    torch.testing.assert_close(pipe.step(ids, targets), loss.detach(), rtol=0, atol=1e-12)
    for name, w in whole.named_parameters(): torch.testing.assert_close(dict(stage.named_parameters())[name].grad, w.grad, rtol=0, atol=1e-12)
    assert pipe.peak == most_kept(schedule(1, m, 0)) and not pipe.kept and not sum(pipe.sent.values()) and len(pipe.events) == 2 * m


def test_bad_batches_and_orders():
    config = FAMILIES["gpt2"]
    ids, targets = batch_of(config)
    stage = Stage(model_of(config), 1, 0)
    pipe = Pipeline(stage, gpipe, 3)
    with pytest.raises(BookError, match="8 can't be cut into 3"): pipe.step(ids, targets)
    with pytest.raises(BookError, match="one target a token"): pipe.step(ids[:6], targets[:6, 1:])
    with pytest.raises(BookError, match="nothing to learn"): pipe.step(ids[:6], torch.full_like(ids[:6], -100))
    with pytest.raises(BookError, match="ids have the shape"): pipe.step(ids[:0], targets[:0])
    pipe.step(ids[:6], targets[:6])
    with pytest.raises(BookError, match="summed twice"): pipe.step(ids[:6], targets[:6])
    stage.zero_grad(set_to_none=False)
    pipe.step(ids[:6], targets[:6])
    with pytest.raises(BookError, match="5 layers can't be split into 6"): Stage(model_of(config), 6, 0)
    with pytest.raises(BookError, match="exactly once"): Pipeline(stage, lambda p, m, r: gpipe(p, m, r)[:-1], 2)
    with pytest.raises(BookError, match="wait forever"): Pipeline(stage, lambda p, m, r: gpipe(p, m, r)[::-1], 2)
    with pytest.raises(BookError, match="Stage 0 of 2 was given to rank 0 of 1"): Pipeline(Stage(model_of(config), 2, 0))
    with pytest.raises(BookError, match="no stage"): Pipeline(stage, ranks=[3, 4])


def test_saved_bytes_count_up_and_down():
    layer = torch.nn.Linear(8, 8)
    meter, x = SavedBytes(layer), torch.randn(4, 8, requires_grad=True)
    with meter.watch(): y = layer(x).tanh().exp()
    assert meter.now == meter.peak == 3 * x.nbytes          # what the matrix, tanh and exp need: input, output, output
    with meter.watch(): z = layer(x).tanh()
    assert meter.now == 4 * x.nbytes                        # x is counted once
    y.sum().backward()
    assert meter.now == 2 * x.nbytes
    torch.testing.assert_close(x.grad, torch.autograd.grad(layer(x).tanh().exp().sum(), x)[0], rtol=0, atol=0)
    del z
    assert meter.now == 0 and meter.peak == 4 * x.nbytes


# ---------------------------------------------------------------- processes

def backwards(p, m, rank): return [Op("F", i) for i in range(m)] + [Op("B", i) for i in reversed(range(m))]


def other_way(p, m, rank):
    "1F1B with the micro-batches' numbers reversed."
    return [Op(op.kind, m - 1 - op.i) for op in one_f_one_b(p, m, rank)]


ORDERS = {"GPipe": gpipe, "1F1B": one_f_one_b, "backwards": backwards, "other way": other_way}


def trained(stage, step, steps=5):
    opt, seen = AdamW(stage.parameters(), lr=1e-3), []
    for _ in range(steps):
        opt.zero_grad()
        loss = step()
        seen.append((None if loss is None else float(loss), {n: w.grad.clone() for n, w in stage.named_parameters()}))
        opt.step()
    return seen, {n: w.detach().clone() for n, w in stage.named_parameters()}


def serial(config):
    model = model_of(config)
    def step():
        loss = model.loss(*batch_of(config))
        loss.backward()
        return loss.detach()
    return trained(model, step)


def with_torch(config, kind, m):
    from torch.distributed import pipelining
    rank, p = dist.get_rank(), dist.get_world_size()
    ids, targets = batch_of(config, masked=False)
    stage = Stage(model_of(config), p, rank)
    def loss_fn(out, y): return F.cross_entropy(out.flatten(0, 1), y.flatten())
    schedule, losses = getattr(pipelining, kind)(pipelining.PipelineStage(stage, rank, p, torch.device("cpu")), m, loss_fn=loss_fn), []
    schedule.step(*([ids] if stage.first else []), **({"target": targets, "losses": losses} if stage.last else {}))
    sum_tied(stage, range(p))
    theirs = {n: w.grad.clone() for n, w in stage.named_parameters()}
    pipe = Pipeline(Stage(model_of(config), p, rank), {"ScheduleGPipe": gpipe, "Schedule1F1B": one_f_one_b}[kind], m)
    loss = pipe.step(ids, targets)
    gap = max((theirs[n] - w.grad).abs().max().item() for n, w in pipe.stage.named_parameters())
    return gap, abs(float(loss) - float(sum(losses)) / m) if stage.last else 0.0


def cases_of(cases, torch_kinds):
    rank, p, found = dist.get_rank(), dist.get_world_size(), []
    for family, order, m in cases:
        config = FAMILIES[family]
        pipe = Pipeline(Stage(model_of(config), p, rank), ORDERS[order], m)
        batch = batch_of(config)
        seen, weights = trained(pipe.stage, lambda: pipe.step(*batch))
        found.append((seen, weights, dict(pipe.sent), pipe.peak, len(pipe.kept) + len(pipe.outbox)))
    return found, [with_torch(FAMILIES["gpt2"], kind, 4) for kind in torch_kinds]


def compare(p, cases, torch_kinds):
    ranks = launch(cases_of, p, cases, torch_kinds, timeout=400)
    once = {family: serial(FAMILIES[family]) for family, *_ in cases}
    for k, (family, order, m) in enumerate(cases):
        config, (seen, weights) = FAMILIES[family], once[family]
        mine = [found[k] for found, _ in ranks]
        names = set()
        for rank, (steps, after, sent, peak, left) in enumerate(mine):
            for (loss, grads), (true_loss, true_grads) in zip(steps, seen):
                if rank == p - 1: assert abs(loss - true_loss) <= 1e-10
                else: assert loss is None
                for n, g in grads.items(): assert (g - true_grads[n]).abs().max() <= 1e-10, (family, order, rank, n)
            for n, w in after.items(): assert (w - weights[n]).abs().max() <= 1e-10, (family, order, rank, n)
            names |= set(after)
            one_way, ends = 5 * 8 * 12 * config.n_embd * 8, rank in (0, p - 1)
            assert sent.get("activations", 0) == one_way * (rank < p - 1)
            assert sent.get("gradients", 0) == one_way * (rank > 0)
            assert sent["tied"] == 5 * config.vocab_size * config.n_embd * 8 * (config.tie and ends)
            assert peak == most_kept(ORDERS[order](p, m, rank)) and left == 0
        assert names == set(weights)
        if config.tie:
            assert all(torch.equal(a["embed_tokens.weight"], b["embed_tokens.weight"]) for a, b in [(mine[0][1], mine[-1][1])])
    for _, gaps in ranks: assert all(gap <= 1e-12 and loss <= 1e-12 for gap, loss in gaps)


def test_two_ranks_equal_one_process_and_torchs_pipelines():
    compare(2, [("gpt2", "GPipe", 4), ("gpt2", "1F1B", 4), ("llama untied", "1F1B", 8), ("gpt2", "backwards", 4), ("llama", "other way", 2)],
            ["ScheduleGPipe", "Schedule1F1B"])


@pytest.mark.slow
@pytest.mark.parametrize("p", [3, 4, 5])
def test_more_ranks_equal_one_process(p):
    compare(p, [(family, order, m) for family in FAMILIES for order, m in (("GPipe", 4), ("1F1B", 8), ("1F1B", 2), ("1F1B", 1), ("backwards", 8), ("other way", 8))],
            ["ScheduleGPipe", "Schedule1F1B"] if p <= 4 else [])


def two_pipelines(m):
    "Ranks 0 and 2 are one pipeline, 3 and 1 another: each trains its own copy on its own batch."
    me, config = dist.get_rank(), FAMILIES["gpt2"]
    pair = [0, 2] if me in (0, 2) else [3, 1]
    pipe = Pipeline(Stage(model_of(config), 2, pair.index(me)), one_f_one_b, m, pair)
    ids, targets = batch_of(config)
    if pair[0]: ids = ids.flip(0)
    pipe.run(ids[:4], targets[:4])
    pipe.run(ids[4:], targets[4:])         # gradients of both are added
    sum_tied(pipe.stage, pair)
    return pair, {n: w.grad for n, w in pipe.stage.named_parameters()}


@pytest.mark.slow
def test_pipelines_beside_each_other_and_gradients_accumulated():
    found = launch(two_pipelines, 4, 2)
    for pair, grads in found:
        model, (ids, targets) = model_of(FAMILIES["gpt2"]), batch_of(FAMILIES["gpt2"])
        if pair[0]: ids = ids.flip(0)
        for part in (slice(0, 4), slice(4, 8)): model.loss(ids[part], targets[part]).backward()
        for n, w in model.named_parameters():
            if n in grads: torch.testing.assert_close(grads[n], w.grad, rtol=0, atol=1e-10)


def slow_messages():
    "The rank above starts late: sends must not be waited for, or rank 0 would stop before its warm-up is over."
    rank, config = dist.get_rank(), FAMILIES["gpt2"]
    pipe = Pipeline(Stage(model_of(config), 2, rank), gpipe, 4)
    dist.barrier()
    if rank: time.sleep(1.5)
    pipe.step(*batch_of(config))
    return [e.start for e in pipe.events if e.kind == "F"], [e.start for e in pipe.events if e.kind == "B"]


@pytest.mark.slow
def test_a_rank_works_on_while_its_messages_wait():
    (below, after), (above, _) = launch(slow_messages, 2)
    assert below[-1] < above[0] <= after[0]
