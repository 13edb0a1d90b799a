"What the chapters on collectives and data parallelism can't show: any sizes, groups, other models, faults of one rank."
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch import nn

from llmbook.collectives import (Later, Traffic, agree, all_gather, all_reduce, broadcast, chunks, digest, gather_steps,
                                 reduce_scatter, reduce_steps, ring_bytes, ring_states)
from llmbook.corpora import BookError
from llmbook.data_parallel import DDP, bucket_names, fair, same_start, share
from llmbook.gpt import GPT, GPTConfig
from llmbook.launch import LaunchError, launch
from llmbook.optimizers import AdamW

SIZES = GPTConfig(vocab_size=64, context=16, n_layer=2, n_head=2, n_embd=32)


@given(st.integers(0, 200), st.integers(1, 17))
def test_chunks_cover_everything_evenly(length, ranks):
    parts = chunks(length, ranks)
    assert [i for c in parts for i in range(length)[c]] == list(range(length))
    sizes = [c.stop - c.start for c in parts]
    assert len(sizes) == ranks and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 12))
def test_a_ring_on_paper_sums_and_every_send_is_received(n):
    vectors = torch.randint(1000, (n, n))
    assert torch.equal(ring_states(vectors)[-1], vectors.sum(0).expand(n, n))
    for steps in (reduce_steps, gather_steps):
        for rank in range(n):
            assert [into for _, into in steps(rank, n)] == [out for out, _ in steps((rank - 1) % n, n)]


@given(st.integers(0, 500), st.integers(1, 17))
def test_bytes_of_all_ranks_add_up(length, n):
    for what, times in (("reduce_scatter", 1), ("all_gather", 1), ("all_reduce", 2)):
        assert sum(ring_bytes(length, 4, rank, n)[what] for rank in range(n)) == times * (n - 1) * length * 4


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from("ab")), min_size=1, max_size=30), st.integers(1, 80))
def test_buckets_keep_order_size_and_kind(sizes, limit):
    named = {str(i): s for i, s in enumerate(sizes)}
    buckets = bucket_names(named, limit)
    assert [name for bucket in buckets for name in bucket] == list(named)[::-1]
    for bucket in buckets:
        assert len({named[name][1] for name in bucket}) == 1
        assert len(bucket) == 1 or sum(named[name][0] for name in bucket) <= limit


def test_bad_bucket_sizes_and_digests():
    for size in (0, -1, float("nan")):
        with pytest.raises(BookError, match="bucket_bytes"): bucket_names({"a": (1, 0)}, size)
    assert digest({"a": 1, "b": 2}) != digest({"b": 2, "a": 1}) != digest({"a": 12})


def refused(make) -> str:
    try: make()
    except BookError as e: return str(e)
    return ""


def collectives_of_all_kinds():
    "Random lengths and types, in the whole group and in two halves of it; two streams of results in one order."
    rank, n, report = dist.get_rank(), dist.get_world_size(), []
    halves = [dist.new_group(list(range(i, n, 2))) for i in range(2)]
    shapes = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.int64, torch.bfloat16, torch.uint8):
        for group in (None, halves[rank % 2]):
            length = int(torch.randint(0, 41, (1,), generator=shapes))
            size, place = dist.get_world_size(group), dist.get_rank(group)
            x = torch.randint(0, 9, (length,)).to(dtype)  # small whole numbers: exact in every type
            rows = [torch.empty_like(x) for _ in range(size)]
            if length: dist.all_gather(rows, x, group=group)
            whole = torch.stack(rows)
            part = chunks(length, size)[place]
            with Traffic() as traffic: total = all_reduce(x.clone(), group)
            report.append(traffic.sent == ring_bytes(length, x.itemsize, place, size)["all_reduce"])
            report.append(torch.equal(total, whole.sum(0).to(dtype)))
            report.append(torch.equal(reduce_scatter(x.clone(), group, torch.minimum),
                                      whole.amin(0)[part] if length else x))
            report.append(torch.equal(broadcast(x.clone(), size - 1, group), rows[-1]))
            own = torch.zeros_like(x)
            own[part] = rows[0][part]
            report.append(torch.equal(all_gather(own, group), rows[0]))
    return all(report), refused(lambda: all_reduce(torch.ones(4, 3).t()))


class Odd(nn.Module):
    "Two types of numbers, a buffer, a parameter without dimensions, one used twice, and a branch that one rank takes."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn((), dtype=torch.float64))
        self.twice = nn.Linear(4, 4, dtype=torch.float32)
        self.side, self.never = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)
        self.register_buffer("offset", torch.randn(4, dtype=torch.float64))

    def forward(self, x, branch: bool):
        x = self.twice(self.twice(x.float())).double() * self.scale + self.offset
        return ((self.side(x) if branch else x) ** 2).mean()


def odd_model():
    "Averages by hand of each rank's own gradients, where the branch is taken by rank 1 only."
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model = Odd()
    ddp = DDP(model, 40, unused="zero")
    x = torch.randn(n, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    gaps = []
    for step in range(2):
        model.zero_grad()
        ddp(x[rank], rank == 1).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        alone = [torch.autograd.grad(model(x[r], r == 1), list(model.parameters()), allow_unused=True)
                 for r in range(n)]
        for i, (name, p) in enumerate(model.named_parameters()):
            grads = [g[i] for g in alone if g[i] is not None]
            if not grads: assert found[name] is None, name
            else: gaps.append((found[name] - sum(grads) / n).abs().max().item())
    return max(gaps), model.offset


def trained(config, options, ranks_model_seed, steps=3, clip=None):
    "Weights after some steps; on ranks through DDP, else on the whole batch."
    torch.manual_seed(ranks_model_seed)
    model, ids = GPT(config).double(), torch.randint(64, (steps, 8, 17), generator=torch.Generator().manual_seed(1))
    if options is not None: DDP(model, **options)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    for batch in ids:
        mine = batch if options is None else share(batch)
        model.loss(mine[:, :-1], mine[:, 1:]).backward()
        if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=ranks_model_seed % 2 == 0)  # gradients may be dropped or set to zero
    return {name: p.detach() for name, p in model.named_parameters()}


LLAMA = GPTConfig.llama(vocab_size=64, context=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, tie=False)


def everything():
    facts = {"a": 1} if dist.get_rank() else {"a": 1, "b": 2}
    one_of_each = refused(lambda: DDP(nn.Linear(3 + (dist.get_rank() == 2), 1))), refused(lambda: agree(facts))
    kinds = {"trainable": refused(lambda: DDP(nn.Linear(2, 2).requires_grad_(False))),
             "unused": refused(lambda: DDP(nn.Linear(2, 2), unused="maybe")),
             "differs": refused(lambda: DDP(nn.Linear(2, 2), bucket_bytes=8 + 16 * (dist.get_rank() == 3)))}
    return {"collectives": collectives_of_all_kinds(), "odd": odd_model(),
            "llama": trained(LLAMA, {"bucket_bytes": 10_000}, dist.get_rank(), clip=0.1),
            "frozen differently": refused(lambda: same_start(nn.Linear(2, 2).requires_grad_(dist.get_rank() == 0))),
            "faults": one_of_each, "kinds": kinds}


@pytest.fixture(scope="module")
def four(): return launch(everything, 4)


def test_collectives_of_any_length_type_and_group(four):
    for exact, refusal in (r["collectives"] for r in four): assert exact and "isn't contiguous" in refusal


def test_mixed_types_branches_and_unused_parameters(four):
    for gap, offset in (r["odd"] for r in four):
        assert gap <= 1e-6  # one layer is fp32
        torch.testing.assert_close(offset, four[0]["odd"][1], rtol=0, atol=0)


def test_llama_with_clipping_is_the_serial_run(four):
    serial = trained(LLAMA, None, 0, clip=0.1)
    for result in (r["llama"] for r in four):
        for name, w in serial.items(): torch.testing.assert_close(result[name], w, rtol=0, atol=1e-10)


def test_every_rank_hears_who_differs(four):
    for result in four:
        assert "Rank 2's model differs" in result["faults"][0] and "weight is ((1, 4)" in result["faults"][0]
        assert "b is missing there" in result["faults"][1] and "Rank 1" in result["faults"][1]
        assert "trainable" in result["frozen differently"] and "no trainable parameter" in result["kinds"]["trainable"]
        assert "choose error or zero" in result["kinds"]["unused"]
        assert "Rank 3's DDP differs" in result["kinds"]["differs"]


def one_rank_skips():
    ddp = DDP(Odd())
    ddp.module.never.requires_grad_(True)
    ddp(torch.ones(3, 4, dtype=torch.float64), dist.get_rank() == 1).backward()


def one_rank_counts_nothing():
    return refused(lambda: fair(torch.tensor(1.0), 3 * (dist.get_rank() != 1)))


@pytest.mark.slow
def test_an_unused_parameter_is_named():
    with pytest.raises(LaunchError, match="got no gradient, such as never.(bias|weight)"): launch(one_rank_skips, 2)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
def test_other_numbers_of_ranks(n):
    def work():
        loss = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        uneven = loss.split([1] * (n - 1) + [13 - n])[dist.get_rank()]
        mean = all_reduce(fair(uneven.mean(), uneven.numel()).clone()) / n
        off = (mean - loss.mean()).abs().item()
        return collectives_of_all_kinds()[0] if n > 1 else True, odd_model()[0] if n > 1 else 0, off
    for exact, gap, off in launch(work, n): assert exact and gap <= 1e-6 and off <= 1e-12


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(st.integers(100, 60_000))
def test_any_bucket_size_gives_the_serial_run(size):
    serial = trained(SIZES, None, 0)
    later = lambda: Later()
    def work():
        stream = later()
        return trained(SIZES, {"bucket_bytes": size, "reduce": lambda x, group: stream(all_reduce, x, group)},
                       dist.get_rank())
    for result in launch(work, 2):
        for name, w in serial.items(): torch.testing.assert_close(result[name], w, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_rank_that_counts_nothing_is_told_to_all():
    assert all("Rank 1 has no counted token" in said for said in launch(one_rank_counts_nothing, 2))
