"Split decoders of other shapes than the chapter's, uneven vocabularies, frozen weights, subgroups, and bad input."
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from llmbook.collectives import Traffic, all_reduce
from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig
from llmbook.launch import LaunchError, launch
from llmbook.optimizers import AdamW
from llmbook.tensor_parallel import (ColumnParallelLinear, RowParallelLinear, Split, VocabParallelEmbedding,
                                     check_split, cuts,
                                     gathered, gathered_weights, split_bytes, sum_replicated, tensor_parallel,
                                     vocab_parallel_cross_entropy)

BASE = dict(context=14, n_head=4, n_embd=16)
GPT2 = GPTConfig.gpt2(vocab_size=21, n_layer=2, **BASE)
LLAMA = GPTConfig.llama(vocab_size=23, n_layer=1, n_inner=20, tie=False, **BASE)
MIXED = GPTConfig(vocab_size=24, n_layer=1, norm="layernorm", mlp="swiglu", position="rope", bias=True, n_kv_head=2,
                  **BASE)
PLAIN = GPTConfig(vocab_size=5, n_layer=1, norm="rmsnorm", mlp="gelu", position="learned", bias=False, tie=False,
                  **BASE)
BARE = GPTConfig(vocab_size=22, n_layer=1, norm="layernorm", mlp="gelu", position="learned", bias=False, **BASE)


def fresh(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = GPT(config).double()
    for p in model.parameters(): p.data += 0.05 * torch.randn_like(p)
    return model.to(dtype)


def batch(config, B=3, T=8, seed=1):
    torch.manual_seed(seed)
    ids, targets = (torch.randint(0, config.vocab_size, (B, T)) for _ in range(2))
    targets[0, ::3] = -100
    return ids, targets


def gap(a, b):
    assert set(a) == set(b)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def grads(model): return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def norm(model):
    "Norm of all gradients, replicated ones counted once: the answer to an exercise."
    where = cuts(model)
    square = lambda replicated: sum(g.square().sum() for name, g in grads(model).items()
                                    if (where[name] is None) == replicated)
    return (all_reduce(square(False).reshape(1), model.split.group) + square(True)).sqrt()


def check(config, sequence, group=None, T=8, frozen=(), steps=5, dtype=torch.float64, bound=1e-10):
    "One configuration, everything: loss, gradients, bytes, weights after some steps, replicas."
    (ids, targets), whole = batch(config, T=T), fresh(config, dtype)
    for m in frozen: whole.get_parameter(m).requires_grad_(False)
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    model = tensor_parallel(whole, group, sequence)
    split, n_bytes = model.split, torch.tensor([], dtype=dtype).element_size()
    assert gap(gathered_weights(model), dict(whole.named_parameters())) == 0 and gap(before, whole.state_dict()) == 0
    opts = [AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (whole, model)]
    for _ in range(steps):
        with Traffic() as traffic:
            loss = model.loss(ids, targets)
            loss.backward()
            sum_replicated(model)
        serial = whole.loss(ids, targets)
        serial.backward()
        assert abs(float(loss - serial)) <= bound
        assert gap(gathered_weights(model, True), grads(whole)) <= bound
        assert abs(norm(model) - sum(g.square().sum() for g in grads(whole).values()).sqrt()) <= bound
        formula = split_bytes(config, *ids.shape, n_bytes, split.rank, split.n, sequence)
        if not frozen: assert traffic.sent == sum(formula.values())
        for o in opts: o.step(), o.zero_grad()
    assert gap(gathered_weights(model), dict(whole.named_parameters())) <= bound
    fits = fresh(config, dtype, seed=5)
    fits.load_state_dict(gathered_weights(model))  # the names are the serial model's
    return {name: p.detach() for name, p in model.named_parameters() if cuts(model)[name] is None}


def same_bits(results):
    for copies in zip(*results):
        assert all(torch.equal(c[name], copies[0][name]) for c in copies for name in copies[0])


def no_error(fn, *args):
    try: fn(*args)
    except BookError as e: return str(e)


def entropy(split, V, N, scale, seed):
    "Loss and gradient against torch's, weighted by random upstream gradients."
    torch.manual_seed(seed)
    whole = (torch.randn(N, V, dtype=torch.float64) * scale).requires_grad_()
    targets, up = torch.randint(0, V, (N,)), torch.randn(N, dtype=torch.float64)
    targets[torch.rand(N) < 0.3] = -100
    logits = split.part(whole.t(), 0, pad=True).t().detach()
    if (real := V - split.rank * logits.shape[1]) < logits.shape[1]: logits[:, max(real, 0):] = 1e6   # never to be seen
    ours = vocab_parallel_cross_entropy(logits.requires_grad_(), targets, split, V)
    theirs = F.cross_entropy(whole, targets, reduction="none")
    (ours * up).sum().backward(), (theirs * up).sum().backward()
    grad = gathered(logits.grad, 1, split)
    assert (ours - theirs).abs().max() <= 1e-13 * max(1, scale)
    assert (grad[:, :V] - whole.grad).abs().max() <= 1e-13 * max(1, scale)
    assert not grad[:, V:].any() and not ours[targets == -100].any()


def layers(split):
    "Single layers with biases, against nn's."
    torch.manual_seed(3)
    column, row, table = nn.Linear(6, 8).double(), nn.Linear(8, 6).double(), nn.Embedding(7, 6).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    mine, x1, x2 = ColumnParallelLinear(column, split), x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = RowParallelLinear(row, split)(mine(x1).tanh()), row(column(x2).tanh())
    y1.square().sum().backward(), y2.square().sum().backward()
    assert (y1 - y2).abs().max() <= 1e-13 and (x1.grad - x2.grad).abs().max() <= 1e-12
    assert (gathered(mine.bias.grad, 0, split) - column.bias.grad).abs().max() <= 1e-12
    ids = torch.tensor([[0, 3, 4, 6]])
    assert torch.equal(VocabParallelEmbedding(table, split)(ids), table(ids))


def faults():
    "Bad input, refused on every rank before it waits for another."
    split, rank, (ids, targets) = Split(), dist.get_rank(), batch(GPT2)
    model, cut = tensor_parallel(fresh(GPT2)), tensor_parallel(fresh(GPT2), sequence=True)
    found = [no_error(model.loss, ids + 20, targets), no_error(model.loss, ids, targets + 30),
             no_error(model.loss, ids, targets[:, 1:]),
             no_error(model.loss, ids[:0], targets[:0]), no_error(model.loss, *batch(GPT2, T=16)),
             no_error(cut.loss, *batch(GPT2, T=7)),
             no_error(tensor_parallel, fresh(GPT2, seed=rank)), no_error(split.part, torch.zeros(3, 2), 0),
             no_error(model.loss, ids - 22, targets),
             no_error(lambda: model.layers[0].self_attn(torch.zeros(1, 2, 16).double(), cache=object()))]
    return found + [no_error(model.loss, ids, targets)]


def fast():
    split = Split()
    layers(split)
    for V, N, scale in ((9, 7, 1), (8, 1, 1e4), (1, 5, 1), (3, 6, 1e-3)): entropy(split, V, N, scale, V)
    copies = [check(GPT2, True), check(LLAMA, False), check(MIXED, True, T=6), check(PLAIN, True, steps=2),
              check(BARE, True, steps=2),
              check(GPT2, False, T=7, steps=2), check(LLAMA, True, steps=1, dtype=torch.float32, bound=1e-5),
              check(GPT2, True, steps=2, frozen=("norm.weight", "embed_positions.weight", "layers.0.mlp.up_proj.bias"))]
    return copies, faults()


def test_two_ranks_are_one():
    results = launch(fast, 2)
    same_bits([copies for copies, _ in results])
    for _, found in results:
        assert all(found[:-1]) and found[-1] is None
        for message, part in zip(found, ("token id", "target", "one target a token", "at least one", "context of 14",
                                         "7 tokens can't be shared by 2",
                                         "differs from rank 0", "size of 3", "token id", "no cache")):
            assert part in message


@pytest.mark.parametrize("change, n, part", [
    (dict(), 8, "n_head=4"), (dict(n_kv_head=2), 4, "n_kv_head=2"), (dict(n_inner=18), 4, "n_inner=18"),
    (dict(dropout=0.1), 2, "dropout=0.1")])
def test_sizes_that_cannot_be_shared(change, n, part):
    with pytest.raises(BookError, match=part): check_split(GPTConfig.gpt2(vocab_size=9, n_layer=1, **BASE, **change), n)


def broken(what):
    "One mistake, which the comparison must find."
    import llmbook.tensor_parallel as tp
    if what == "unsummed": globals()["sum_replicated"] = lambda model: None
    if what == "bias":
        tp.RowParallelLinear.forward = lambda self, x: self.split.leave(F.linear(x, self.weight, self.bias))
    if what == "entered": tp.Copy.backward = staticmethod(lambda ctx, grad: (grad, None))
    check(GPT2, what == "unsummed", steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["unsummed", "bias", "entered"])
def test_a_mistake_is_found(what):
    with pytest.raises(LaunchError, match="AssertionError"): launch(broken, 2, what)


def many():
    split = Split()
    layers(split)
    for V in range(1, 14): entropy(split, V, 6, 1, V)
    return [check(config, sequence, steps=3) for config in (GPT2, LLAMA, PLAIN, BARE) for sequence in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4])
def test_other_numbers_of_ranks(n): same_bits(launch(many, n))


def in_pairs():
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return [check(config, True, groups[dist.get_rank() // 2], steps=2) for config in (GPT2, MIXED)]


@pytest.mark.slow
def test_two_groups_of_two(): same_bits(launch(in_pairs, 4))
