"What the chapter on ZeRO can't show: rows that don't divide, other models, recomputation, evaluation, other units."
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from llmbook.collectives import Traffic, ring_bytes
from llmbook.corpora import BookError
from llmbook.data_parallel import share
from llmbook.gpt import GPT, GPTConfig
from llmbook.launch import launch
from llmbook.optimizers import AdamW
from llmbook.zero import ZeRO1, ZeRO2, ZeRO3, kept, rows_of, zero_memory

STAGES = {"1": ZeRO1, "2": ZeRO2, "3": ZeRO3}
adamw = partial(AdamW, lr=1e-2, weight_decay=0.1)


class Odd(nn.Module):
    """Sizes that four doesn't divide, a frozen layer between trainable ones, a layer used twice, one weight in two
    units, tuples, a keyword, recomputation."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(3, 7, dtype=torch.float64)
        self.layers = nn.ModuleList(Pair() for _ in range(4))
        self.layers[2].b.weight = self.layers[0].b.weight  # shared by two units: belongs to the rest
        self.layers[1].requires_grad_(False)
        self.layers[3].a.requires_grad_(False)  # backward goes through it after its unit's gradients have come
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x, recompute=False):
        def run(some, x, twice):
            for layer in some: x, twice = layer(x, twice=twice)
            return x, twice
        x, twice, order = self.start(x), None, [*self.layers, self.layers[0]]
        for some in ([order[:2], order[2:4], order[4:]] if recompute else [order]):
            with set_checkpoint_early_stop(len(some) == 1):  # stopped or not, the recomputation must free nothing
                x, twice = checkpoint(run, some, x, twice, use_reentrant=False) if recompute else run(some, x, twice)
        return ((x * self.scale + twice) ** 2).mean()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 5, dtype=torch.float64), nn.Linear(5, 7, bias=False, dtype=torch.float64)

    def forward(self, x, twice=None):
        x = x + self.b(torch.tanh(self.a(x)))
        return x, x * 2 if twice is None else x + twice


def odd(seed=0):
    torch.manual_seed(seed)
    return Odd()


def data(): return torch.randn(3, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def vectors_apart(name, p): return {"weight_decay": 0.0} if p.dim() < 2 else {}


def serial(settings=True, clip=0.05):
    model = odd()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw([{"params": [p], **(vectors_apart(name, p) if settings else {})} for name, p in named.items()])
    for x in data():
        optimizer.zero_grad()
        model(x).backward()
        nn.utils.clip_grad_norm_(named.values(), clip)
        optimizer.step()
    return {name: p.detach() for name, p in named.items()}, model(data()[0]).item()


def odd_run(stage, recompute, micro=1, units=None, clip=0.05):
    model = odd(dist.get_rank())
    engine = stage(model, adamw, working=torch.float64, master=torch.float64, settings=vectors_apart,
                   units=None if units is None else units(model))
    for x in data():
        for part in share(x).chunk(micro): (engine.loss(part, recompute=recompute) / micro).backward()
        engine.step(clip)
    with torch.no_grad(): loss = engine.loss(data()[0]).item()
    memory = kept(engine)
    return engine.weights(), loss, memory, [p.grad is None for p in model.parameters()]


def refused(make) -> str:
    try: make()
    except BookError as e: return str(e)
    return ""


def bytes_of_a_step(stage):
    "Sent in one step of the odd model, and what the formula says for its rows."
    rank, n = dist.get_rank(), dist.get_world_size()
    engine = stage(odd(), adamw, working=torch.float64, master=torch.float64)
    x = share(data()[0])
    with Traffic() as traffic:
        engine.loss(x).backward()
        engine.step()
    uses = {0: 2, 1: 1, 2: 1, 3: 1}  # the first block runs twice in forward
    want = 0
    for i, flats in enumerate(engine.of_unit):
        for flat in flats:
            b = ring_bytes(sum(flat.counts), 8, rank, n)
            gathers = uses.get(i, 1) + 1 if stage is ZeRO3 else int(flat.trainable)
            want += gathers * b["all_gather"] + (b["reduce_scatter"] if flat.trainable else 0)
    return traffic.sent, want


def bf16_llama(stage):
    "Types and memory of a Llama in bf16 between backward and step, and whether it learns one batch by heart."
    torch.manual_seed(0)
    model = GPT(GPTConfig.llama(vocab_size=61, context=16, n_layer=2, n_head=2, n_embd=24, tie=False))
    count = sum(p.numel() for p in model.parameters())
    engine, losses = stage(model, adamw), []
    ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(12):
        loss = engine.loss(share(ids)[:, :-1], share(ids)[:, 1:])
        loss.backward()
        losses.append(loss.item())
        memory = kept(engine)
        engine.step()
    fresh = GPT(model.config)
    fresh.load_state_dict({**fresh.state_dict(), **engine.weights()})
    with torch.no_grad(): exact = fresh.loss(ids[:, :-1], ids[:, 1:]).item()
    return {"memory": memory, "count": count, "dtypes": {p.dtype for p in model.parameters()}, "losses": losses,
            "exact": exact}


def faults():
    def early():
        engine = ZeRO1(odd(), adamw, working=torch.float64)
        engine.loss(data()[0]).backward()
        engine.gradients()
        engine.loss(data()[0]).backward()
    return (refused(early), refused(lambda: ZeRO3(odd().requires_grad_(False), adamw)),
            refused(lambda: ZeRO1(nn.Linear(2, 2 + dist.get_rank()), adamw)))


def everything():
    return {"runs": {(s, recompute, micro): odd_run(stage, recompute, micro) for s, stage in STAGES.items()
                     for recompute, micro in ((False, 1), (True, 3))},
            "one unit": odd_run(ZeRO3, False, units=lambda model: []),
            "bytes": [bytes_of_a_step(stage) for stage in STAGES.values()],
            "bf16": {s: bf16_llama(stage) for s, stage in STAGES.items()}, "faults": faults()}


@pytest.fixture(scope="module")
def four(): return launch(everything, 4)


def test_odd_models_with_recomputation_and_micro_batches_are_the_serial_run(four):
    weights, loss = serial()
    for result in four:
        for ours, our_loss, _, clean in [*result["runs"].values(), result["one unit"]]:
            assert ours.keys() == weights.keys() and all(clean) and abs(our_loss - loss) <= 1e-10
            for name, w in weights.items(): torch.testing.assert_close(ours[name], w, rtol=0, atol=1e-10)


def test_evaluation_leaves_nothing_gathered(four):
    count = sum(p.numel() for p in odd().parameters())
    frozen = sum(p.numel() for p in odd().parameters() if not p.requires_grad)
    for key in four[0]["runs"]:
        held = [r["runs"][key][2]["parameters"] for r in four]
        assert sum(held) == 8 * count * (1 if key[0] == "3" else 4)
        assert sum(r["runs"][key][2]["optimizer"] for r in four) == 3 * 8 * (count - frozen)


def test_bytes_sent_are_exact_for_rows_that_do_not_divide(four):
    for result in four:
        for sent, want in result["bytes"]: assert sent == want


def test_a_llama_in_bf16_learns_and_its_memory_is_the_formula(four):
    for s in STAGES:
        results = [r["bf16"][s] for r in four]
        for part, formula in zero_memory(results[0]["count"], 4, int(s)).items():
            assert sum(r["memory"][part] for r in results) == pytest.approx(4 * formula, rel=1e-12)
        for r, first in zip(results, (r["bf16"]["1"] for r in four)):
            assert r["dtypes"] == {torch.bfloat16} and r["losses"][-1] < 0.7 * r["losses"][0]
            assert r["losses"] == first["losses"]  # the same bits in all stages
            assert r["exact"] == results[0]["exact"]


def test_what_is_refused(four):
    for early, frozen, differs in (r["faults"] for r in four):
        assert "call step first" in early and "no trainable parameter" in frozen
        assert "model differs from rank 0's" in differs


def test_rows_and_formulas():
    model = odd()
    rows = rows_of(model, list(model.layers), vectors_apart)
    names = [name for _, params, _ in rows for name in params]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [unit for unit, params, _ in rows if "layers.0.b.weight" in params] == [4]
    with pytest.raises(BookError, match="share a module"):
        rows_of(model, [model.layers, model.layers[0]], vectors_apart)
    with pytest.raises(BookError, match="stage"): zero_memory(10, 2, 5)
    with pytest.raises(BookError, match="at least 1"): zero_memory(10, 0, 1)
    assert [sum(zero_memory(1, 64, stage).values()) for stage in range(4)] == [16, 4 + 12 / 64, 2 + 14 / 64, 16 / 64]


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3])
def test_other_numbers_of_ranks(n):
    weights, loss = serial()
    cases = [(stage, recompute, micro) for stage in STAGES.values() for recompute, micro in ((False, 2), (True, 1))]
    def work(): return [odd_run(*case) for case in cases], [bytes_of_a_step(s) for s in STAGES.values()]
    for runs, sent in launch(work, n):
        assert all(a == b for a, b in sent)
        for ours, our_loss, *_ in runs:
            assert abs(our_loss - loss) <= 1e-10
            for name, w in weights.items(): torch.testing.assert_close(ours[name], w, rtol=0, atol=1e-10)
