"Grids, decoders and schedules other than the chapter's, bad input, and mistakes that the comparison must find."
import pytest
import torch
import torch.distributed as dist

from llmbook import combined
from llmbook.combined import Combined, Grid, check_grid, grid_bytes, line_groups, rank_numbers
from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig
from llmbook.launch import LaunchError, launch
from llmbook.optimizers import AdamW
from llmbook.pipeline_parallel import gpipe, one_f_one_b

BASE = dict(context=14, n_head=4, n_embd=16)
GPT2 = GPTConfig.gpt2(vocab_size=21, n_layer=5, **BASE)
LLAMA = GPTConfig.llama(vocab_size=23, n_layer=3, n_kv_head=2, n_inner=20, **BASE)
MIXED = GPTConfig(vocab_size=24, n_layer=4, norm="rmsnorm", mlp="gelu", position="learned", bias=False, tie=False, **BASE)
PLAIN = GPTConfig(vocab_size=9, n_layer=2, norm="layernorm", mlp="swiglu", position="rope", bias=True, **BASE)
ALL = (GPT2, LLAMA, MIXED, PLAIN)


def fresh(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = GPT(config).double()
    for p in model.parameters(): p.data += 0.05 * torch.randn_like(p)
    return model.to(dtype)


def batch(config, B=8, T=8):
    torch.manual_seed(1)
    ids, targets = (torch.randint(0, config.vocab_size, (B, T)) for _ in range(2))
    targets[:2] = -100
    targets[-1, ::3] = -100
    return ids, targets


def gap(a, b):
    assert set(a) == set(b)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def check(config, dims, sequence, groups=None, m=2, schedule=one_f_one_b, steps=5, dtype=torch.float64, bound=1e-10):
    "One configuration on one grid, everything: loss, norm, gradients, bytes, weights after some steps, and that the whole model is left alone."
    (ids, targets), whole, serial, grid = batch(config), fresh(config, dtype), fresh(config, dtype), Grid(*dims)
    engine = Combined(whole, grid, m, sequence, schedule, groups)
    for k, w in serial.state_dict().items(): assert torch.equal(w, whole.state_dict()[k])
    rank, size = dist.get_rank(), torch.finfo(dtype).bits // 8
    assert sum(rank_numbers(config, grid, engine.place)) == sum(p.numel() for p in engine.stage.parameters())
    opts = [AdamW(x.parameters(), lr=1e-2) for x in (engine.stage, serial)]
    for _ in range(steps):
        engine.sent.clear()
        loss, true = engine.backward(ids, targets), serial.loss(ids, targets)
        true.backward()
        assert (loss is not None) == (engine.place.pp == grid.pp - 1)
        assert loss is None or abs(float(loss - true)) <= bound
        grads = engine.gathered(gradients=True)
        assert gap(grads, {k: p.grad for k, p in serial.named_parameters()}) <= bound
        assert abs(engine.clip(0.3) - float(torch.nn.utils.clip_grad_norm_(serial.parameters(), 0.3))) <= bound
        assert {k: v for k, v in engine.sent.items() if v} == {k: v for k, v in grid_bytes(config, grid, rank, *ids.shape, m, size, sequence).items() if v}
        for o in opts: o.step()
        opts[1].zero_grad()
    if dtype == torch.float64: assert gap(engine.gathered(), dict(serial.named_parameters())) <= bound  # in fp32 AdamW moves keys' biases by rounding alone
    assert all(torch.equal(w, whole.state_dict()[k]) for k, w in fresh(config, dtype).state_dict().items())


def many(cases):
    groups = {dims: line_groups(Grid(*dims)) for dims in dict.fromkeys(case[1] for case in cases)}
    for config, dims, sequence, m, schedule in cases: check(config, dims, sequence, groups[dims], m, schedule)
    config, dims, *_ = cases[0]
    check(config, dims, True, groups[dims], steps=2, dtype=torch.float32, bound=2e-5)


def mesh_lines():
    "The lines of torch's DeviceMesh with its axes in the grid's order."
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
    return {axis: mesh[axis].mesh.tolist() for axis in ("pp", "dp", "tp")}


def on_four(cases):
    many(cases)
    return mesh_lines()


def test_four_ranks_and_torchs_order():
    found = launch(on_four, 4, [(GPT2, (1, 4, 1), True, 4, one_f_one_b), (LLAMA, (2, 1, 2), True, 2, one_f_one_b), (PLAIN, (1, 2, 2), True, 2, gpipe), (MIXED, (2, 2, 1), False, 2, one_f_one_b)])
    assert found == [{axis: Grid(2, 1, 2).line(rank, axis) for axis in ("pp", "dp", "tp")} for rank in range(4)]


def test_eight_ranks():
    launch(many, 8, [(GPT2, (2, 2, 2), True, 2, one_f_one_b)])


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 8])
def test_all_that_fits(n):
    cases = []
    for dp in (1, 2, 4, 8):
        for pp in (1, 2, 3, 4):
            for tp in (1, 2, 4):
                if dp * pp * tp != n: continue
                cases += [(c, (dp, pp, tp), s, m, one_f_one_b) for c in ALL for s, m in ((False, 1), (True, 2))
                          if pp <= c.n_layer and (c.n_kv_head or 4) % tp == 0 and 8 % (dp * m) == 0]
    launch(many, n, cases, timeout=600)


def test_places_are_digits():
    for dp, pp, tp in ((1, 1, 1), (2, 3, 4), (3, 1, 2), (1, 5, 1)):
        grid, numbers = Grid(dp, pp, tp), torch.arange(dp * pp * tp).view(pp, dp, tp)
        assert grid.size == numbers.numel()
        for rank in range(grid.size):
            at = grid.place(rank)
            assert grid.rank(at) == rank == numbers[at.pp, at.dp, at.tp]
            assert grid.line(rank, "dp") == numbers[at.pp, :, at.tp].tolist()
            assert grid.line(rank, "pp") == numbers[:, at.dp, at.tp].tolist()
            assert grid.line(rank, "tp") == numbers[at.pp, at.dp].tolist()
            assert grid.line(rank, "tp") == sorted(grid.line(rank, "tp")) and rank in grid.line(rank, "pp")


@pytest.mark.parametrize("make, part", [
    (lambda: Grid(0, 1, 1), "dp=0"), (lambda: Grid(1, 2.0, 1), "pp=2.0"), (lambda: Grid(1, 1, "2"), "tp='2'"),
    (lambda: Grid(2, 2, 2).place(8), "no rank 8 in a grid of 8"), (lambda: Grid().place(-1), "no rank -1"),
    (lambda: check_grid(fresh(GPT2), Grid(pp=6)), "5 layers can't be split into 6"), (lambda: check_grid(fresh(LLAMA), Grid(tp=4)), "n_kv_head=2"),
    (lambda: check_grid(fresh(GPT2).requires_grad_(False), Grid()), "frozen")])
def test_what_cannot_be_laid_out(make, part):
    with pytest.raises(BookError, match=part): make()


def said(fn, *args):
    try: fn(*args)
    except BookError as e: return str(e)


def faults():
    "Refused on all ranks alike; after all of it a good batch still goes through."
    grid, (ids, targets) = Grid(1, 2, 1), batch(GPT2)
    found = [said(line_groups, Grid(2, 2, 1))]
    groups = line_groups(grid)
    engine = Combined(fresh(GPT2), grid, 2, groups=groups)
    found += [said(engine.backward, ids + 20, targets), said(engine.backward, ids, targets + 30), said(engine.backward, ids, targets[:, 1:]), said(engine.backward, ids[0], targets[0]),
              said(engine.backward, ids[:3], targets[:3]), said(engine.backward, ids[:0], targets[:0]), said(engine.backward, ids, targets * 0 - 100),
              said(engine.backward, ids.repeat(1, 2), targets.repeat(1, 2))]
    found += [said(Combined, fresh(GPT2, seed=dist.get_rank()), grid, 2, False, one_f_one_b, groups), said(Combined, fresh(GPT2), grid, 2 + dist.get_rank(), False, one_f_one_b, groups)]
    uneven = Combined(fresh(GPT2), Grid(1, 1, 2), 2, True)
    found.append(said(uneven.backward, ids[:, :7], targets[:, :7]))
    return found + [said(engine.backward, ids, targets)]


def repeated():
    "Calling backward again doesn't add to what is there, and what was sent is the same."
    grid, (ids, targets) = Grid(2, 1, 1), batch(MIXED)
    engine = Combined(fresh(MIXED), grid, 2)
    engine.backward(ids, targets)
    first, sent = engine.bucket.flat.clone(), dict(engine.sent)
    engine.stage.zero_grad()
    engine.backward(ids, targets)
    assert torch.equal(first, engine.bucket.flat) and engine.sent == {k: 2 * v for k, v in sent.items()}
    norm = engine.clip(float("inf"))
    assert torch.equal(first, engine.bucket.flat)
    assert abs(norm - float(torch.linalg.vector_norm(first))) < 1e-12


def on_two(cases):
    many(cases)
    repeated()
    return faults()


def test_two_ranks_and_bad_input():
    parts = ("has 4 ranks, and 2 were started", "A token id is outside 0…20", "A target is outside", "one target a token", "texts × tokens", "A batch of 3 can't be dealt out", "at least one of each",
             "Every target of the batch is -100", "longer than the model's context of 14", "model or grid differs from rank 0's", "model or grid differs", "7 tokens can't be shared by 2")
    for found in launch(on_two, 2, [(LLAMA, (1, 2, 1), True, 4, gpipe), (GPT2, (2, 1, 1), False, 1, one_f_one_b), (MIXED, (1, 1, 2), True, 2, one_f_one_b),
                                    (PLAIN, (1, 2, 1), False, 4, one_f_one_b), (LLAMA, (1, 1, 2), False, 1, gpipe)]):
        assert found[-1] is None and len(found) == len(parts) + 1
        for message, part in zip(found, parts): assert part in message


MISTAKES = {"dp": (2, 1, 1), "tied": (1, 2, 1), "replicated": (1, 1, 2), "norm": (1, 2, 1), "total": (2, 1, 1)}


def broken(what):
    "One mistake, which the comparison must find."
    if what == "dp": combined.all_reduce = lambda x, group=None: x
    if what == "tied": combined.sum_tied = lambda stage, ranks: 0
    if what == "replicated": combined.sum_replicated = lambda stage: None
    if what == "norm": Combined.answers_for = lambda self: [p.grad for p in self.stage.parameters()]
    if what == "total":
        run = combined.Pipeline.run
        combined.Pipeline.run = lambda self, ids, targets, total=None: run(self, ids, targets, max(1, int((targets != -100).sum())))
    check(GPT2, MISTAKES[what], True, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_found(what):
    with pytest.raises(LaunchError, match="AssertionError"): launch(broken, 2, what)
