"What the failure lab's checks do with odd input, few ranks, other people's wrappers and jobs that don't come to an end."
import os
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from llmbook.corpora import BookError
from llmbook.failures import (INTERRUPTIONS, InStep, Job, digests, flip_bit, gradient_scale, padding_leak, ranks_of,
                              repair, replicas_agree, stragglers, torchrun)
from llmbook.launch import launch


def refused(call) -> str:
    try: call()
    except BookError as e: return str(e)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64])
def test_every_bit_flips_alone_and_back(dtype):
    x = torch.arange(6).to(dtype).view(2, 3)
    for bit in range(8 * x.element_size()):
        y = x.clone()
        flip_bit(y, 4, bit)
        before, after = (t.view(torch.uint8).flatten().tolist() for t in (x, y))
        assert sum(bin(a ^ b).count("1") for a, b in zip(before, after)) == 1
        assert digests(holding(x)) != digests(holding(y))
        flip_bit(y, 4, bit)
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def holding(x) -> nn.Module:
    module = nn.Module()
    module.register_buffer("x", x)
    return module


def test_digests_know_shape_and_kind():
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(3, dtype=torch.float64), torch.zeros(()), torch.zeros(0)]
    assert len({digests(holding(z))["x"] for z in zeros}) == len(zeros)
    assert digests(holding(torch.arange(6.).view(2, 3).t())) == digests(holding(torch.arange(6.).view(2, 3).t().contiguous()))


@pytest.mark.parametrize("call, said", [
    (lambda: flip_bit(torch.ones(3), 3, 0), "Bit 0 of number 3 doesn't exist"),
    (lambda: flip_bit(torch.ones(3), 0, 32), "3 numbers of 32 bits"),
    (lambda: padding_leak(torch.zeros(2, 5), 6), "vocab_size=6 doesn't fit logits with 5 columns"),
    (lambda: padding_leak(torch.zeros(2, 5), 0), "vocab_size=0"),
    (lambda: gradient_scale({"a": torch.ones(2)}, {"b": torch.ones(2)}), "aren't of one model"),
    (lambda: gradient_scale({"a": torch.ones(2)}, {"a": torch.ones(3)}), "a differs"),
    (lambda: stragglers([]), "No step was timed")])
def test_odd_calls_are_one_sentence(call, said):
    assert said in refused(call) and "\n" not in refused(call)


def test_a_gradient_is_told_from_its_multiples():
    g = {"a": torch.randn(40, 3), "b": torch.randn(())}
    times = lambda k: {name: k * t for name, t in g.items()}
    assert gradient_scale(times(1), g).ok and gradient_scale(times(1 + 1e-4), g).ok
    assert "added up over the ranks" in gradient_scale(times(8), g, 8).verdict
    assert "divided once too often" in gradient_scale(times(1 / 8), g, 8).verdict
    assert gradient_scale(times(3), g, 8).verdict == "The gradient is 3 times the serial one."
    assert not gradient_scale(times(-1), g).ok
    other = gradient_scale({name: t + 0.01 * torch.randn_like(t) for name, t in g.items()}, g)
    assert not other.ok and "points elsewhere" in other.verdict


def test_padding_that_is_masked_or_absent_leaks_nothing():
    z = torch.randn(4, 7, 10)
    assert not padding_leak(z, 9).ok
    assert padding_leak(z, 10).ok and padding_leak(z.index_fill(-1, torch.tensor([9]), float("-inf")), 9).ok


def test_llamas_table_adds_up(): assert sum(n for _, n in INTERRUPTIONS.values()) == 419


def opinions(change: dict) -> tuple:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for rank, what in change.items():
            if rank == dist.get_rank(): model.state_dict()[what].add_(1)
    finding = replicas_agree(model)
    if finding.numbers["healthy"] is not None and not finding.ok:
        repair(model, torch.optim.SGD(model.parameters()), finding.numbers["healthy"])
        finding = finding, replicas_agree(model)
    return finding


def all_opinions(): return [opinions(change) for change in ({}, {1: "0.bias"}, {0: "1.running_mean"}, {0: "0.bias", 1: "0.weight", 2: "1.num_batches_tracked"})]


def test_the_majority_names_the_odd_replica_and_mends_it():
    for fine, one, zero, chaos in launch(all_opinions, 3):
        assert fine.ok
        for (finding, after), rank, name in ((one, 1, "0.bias"), (zero, 0, "1.running_mean")):
            assert not finding.ok and finding.numbers["odd"] == [rank] and finding.numbers["first"] == name and after.ok
        assert chaos.numbers["healthy"] is None and chaos.numbers["odd"] == [0, 1, 2] and "no majority" in chaos.verdict


def two_opinions():
    finding = opinions({1: "0.bias"})
    mine = [0.1] * 3 if dist.get_rank() else [0.01] * 3
    return finding, stragglers(mine), refused(lambda: stragglers(mine[dist.get_rank():])), stragglers([0.1, 0.2])


def test_two_ranks_have_no_majority_but_a_slower_one():
    for finding, slow, uneven, same in launch(two_opinions, 2):
        assert not finding.ok and finding.numbers["healthy"] is None
        assert slow.numbers["slow"] == [1] and same.ok and 0 <= same.numbers["lost"] <= 1
        assert "timed [2, 3] steps" in uneven


def counted(work, **options) -> int | str:
    try:
        with InStep(timeout=3, **options) as watch: work()
    except BookError as e: return str(e)
    return watch.count


def all_collectives():
    rank, n = dist.get_rank(), dist.get_world_size()
    x, half = torch.ones(4), dist.new_group([0, 1])
    several = lambda: [torch.empty(4) for _ in range(n)]
    dist.all_reduce(x), dist.broadcast(x, 1), dist.barrier(), dist.reduce(x, 2), dist.all_gather(several(), x)
    dist.gather(x, several() if rank == 1 else None, dst=1), dist.scatter(x, several() if rank == 0 else None, src=0)
    dist.all_gather_object([None] * n, {"rank": rank})
    dist.send(x, 1) if rank == 0 else dist.recv(x, 0) if rank == 1 else None
    if rank < 2: dist.all_reduce(x, group=half)


def wrapped():
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3))
    with InStep(model.module, timeout=3) as watch: model(torch.ones(2, 3)).sum().backward()
    return watch.count


def other_root(): dist.broadcast(torch.ones(2), int(dist.get_rank() == 1))
def other_kind(): dist.all_reduce(torch.ones(2)) if dist.get_rank() else dist.barrier()
def other_dtype(): dist.all_reduce(torch.ones(2, dtype=torch.float64 if dist.get_rank() == 2 else torch.float32))
def one_less():
    for _ in range(1 + (dist.get_rank() != 1)): dist.all_reduce(torch.ones(2))


def watched(): return [wrapped(), *(counted(work) for work in (all_collectives, other_root, other_kind, other_dtype))]


def test_collectives_are_compared_and_messages_and_other_groups_are_not():
    for ddp, fine, root, kind, dtype in launch(watched, 3):
        assert isinstance(fine, int) and fine >= 9 and ddp >= 1
        assert "rank 0 comes with broadcast((2,) torch.float32, root 0)" in root and "rank 1 with broadcast((2,) torch.float32, root 1)" in root
        assert "rank 0 comes with barrier(" in kind and "rank 1 with allreduce(" in kind and "test_failures.py, " in kind
        assert "rank 2 with allreduce((2,) torch.float64" in dtype


def test_a_rank_that_stays_away_is_told():
    first, _, third = launch(counted, 3, one_less)
    assert "Not every rank came to collective 2, allreduce(" in first and "within 3 s" in first and "Ranks 1 failed" in first and "Not every rank came" in third


def test_nothing_of_a_job_is_left_when_the_block_is_left(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import time\ntime.sleep(600)\n")
    name = f"left-{os.getpid()}"
    with pytest.raises(RuntimeError, match="on purpose"):
        with Job(name, tmp_path / "log") as job:
            job.start(torchrun([str(script)], 2, name))
            job.until(lambda: len(ranks_of(name)) == 2, 60)
            raise RuntimeError("on purpose")
    assert not ranks_of(name) and job.agents[0].poll() is not None


def test_a_job_that_takes_too_long_shows_what_it_said(tmp_path):
    with Job("quiet", tmp_path / "log") as job:
        job.start([sys.executable, "-c", "import time; print('I wait', flush=True); time.sleep(600)"])
        job.until(lambda: "I wait" in job.said(), 20)
        assert "It said last:\nI wait" in refused(lambda: job.wait(0.2))
        assert "hadn't come so far" in refused(lambda: job.until(lambda: False, 0.1))
