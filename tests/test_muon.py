"The recipe's optimizer over many shapes and settings, and what it does with bad input."
import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from llmbook.bert import Bert, BertConfig, BertForPreTraining
from llmbook.checkpointing import pack_optimizer, unpack_optimizer
from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig
from llmbook.muon import OPTIMIZERS, Muon, make_optimizer, matrices_and_rest, muon_groups, orthogonal
from llmbook.recipe import keep_pages
from llmbook.xlnet import XLNet, XLNetConfig, XLNetLM


def StackedMuon(ps, lr=8e-3, momentum=0.95, weight_decay=0.1, steps=5):
    "Only the half of the optimizer that moves matrices."
    return Muon([{"params": list(ps), "muon": True, "weight_decay": weight_decay}], lr=lr, momentum=momentum, steps=steps)


def f(s): return 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.integers(0, 10**6))
def test_orthogonal_is_the_polynomial_of_the_singular_values(R, C, N, steps, seed):
    G = torch.randn(N, R, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    S = S / S.norm(dim=-1, keepdim=True)
    for _ in range(steps): S = f(S)
    torch.testing.assert_close(orthogonal(G, steps), U * S[:, None] @ Vt, rtol=1e-7, atol=1e-7)


def test_a_zero_gradient_moves_nothing():
    assert not orthogonal(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize("lr, momentum, decay", [(0.01, 0.95, 0.1), (0.02, 0.0, 0.0), (0.003, 0.5, 1.0)])
def test_steps_are_those_of_torch_within_bfloat16(lr, momentum, decay):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in ((8, 40), (40, 8), (24, 24), (8, 40))]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(5)]
    moved = []
    for make in (StackedMuon, lambda ps, **kw: torch.optim.Muon(ps, adjust_lr_fn="match_rms_adamw", **kw)):
        ps = [nn.Parameter(p.clone()) for p in start]
        optimizer = make(ps, lr=lr, momentum=momentum, weight_decay=decay)
        for step in gradients:
            for p, g in zip(ps, step): p.grad = g.clone()
            optimizer.step()
        moved.append([p.detach() - q for p, q in zip(ps, start)])
    for a, b in zip(*moved): assert (a - b).norm() < 0.05 * b.norm()


def test_heads_apart_move_like_one_matrix():
    start, grad = torch.randn(12, 3, 4), torch.randn(12, 3, 4)
    cube, flat = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    cube.grad, flat.grad = grad, grad.flatten(1)
    for p in (cube, flat): StackedMuon([p]).step()
    assert torch.equal(cube.flatten(1), flat)


def test_saved_state_goes_on_exactly():
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    a = StackedMuon(ps)
    grads = torch.randn(4, 2, 4, 6)
    def step(optimizer, ps, i):
        for p, g in zip(ps, grads[i]): p.grad = g.clone()
        optimizer.step()
    step(a, ps, 0), step(a, ps, 1)
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    b = StackedMuon(qs)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for i in (2, 3): step(a, ps, i), step(b, qs, i)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs))


def test_a_matrix_without_gradient_stays():
    still, moving = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    moving.grad = torch.randn(3, 3)
    StackedMuon([still, moving]).step()
    assert torch.equal(still, torch.ones(3, 3)) and not torch.equal(moving, still)


SIZES = dict(vocab_size=64, n_layer=2, n_head=2, n_embd=16)
@pytest.mark.parametrize("model, outside", [
    (lambda: GPT(GPTConfig.llama(context=8, **SIZES)), {"embed_tokens.weight"}),
    (lambda: GPT(GPTConfig.gpt2(context=8, tie=False, **SIZES)), {"embed_tokens.weight", "embed_positions.weight", "lm_head.weight"}),
    (lambda: BertForPreTraining(Bert(BertConfig(**SIZES), pooler=False)), {f"bert.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")} | {"cls.predictions.transform.dense.weight"}),
    (lambda: XLNetLM(XLNet(XLNetConfig(**SIZES))), {"transformer.word_embedding.weight", "transformer.mask_emb"} | {f"transformer.layer.{i}.rel_attn.{n}" for i in (0, 1) for n in ("r_w_bias", "r_r_bias", "r_s_bias", "seg_embed")})])
def test_every_parameter_is_on_one_side(model, outside):
    model = model()
    matrices, rest = matrices_and_rest(model)
    assert sorted(map(id, matrices + rest)) == sorted(map(id, model.parameters()))
    ids = {id(p) for p in rest}
    assert {name for name, p in model.named_parameters() if id(p) in ids and p.dim() > 1} == outside


@pytest.mark.parametrize("bad", [dict(lr=-1.0), dict(lr=float("nan")), dict(momentum=1.0), dict(weight_decay=-0.1), dict(steps=0)])
def test_bad_settings_are_refused(bad):
    with pytest.raises(BookError, match="can't be used"): StackedMuon([nn.Parameter(torch.ones(2, 2))], **bad)


def test_vectors_are_refused():
    with pytest.raises(BookError, match="matrices only"): StackedMuon([nn.Parameter(torch.ones(2))])


def test_pages_are_kept_or_the_answer_is_no():
    assert keep_pages() in (True, False)


def test_a_closure_is_called_before_anything_moves():
    p = nn.Parameter(torch.eye(2))
    optimizer = StackedMuon([p], weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == 2.0 and not torch.equal(p, torch.eye(2))


def small_gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig.llama(context=8, **SIZES))


def train(model, optimizer, steps):
    "Steps on batches that depend on the step alone, the rate falling, as a trainer sets it."
    for s in steps:
        for group in optimizer.param_groups: group["lr"] = 1e-2 / (1 + s) * group.get("lr_scale", 1.0)
        ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(s))
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_run_saved_by_name_goes_on_bit_for_bit(name, tmp_path):
    whole = small_gpt()
    expected = train(whole, make_optimizer(name, whole, 1e-2), range(6))
    first = small_gpt()
    optimizer = make_optimizer(name, first, 1e-2)
    train(first, optimizer, range(3))
    tensors, groups = pack_optimizer(optimizer, first)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    second = small_gpt(seed=1)
    second.load_state_dict(first.state_dict())
    fresh = make_optimizer(name, second, 1.0)
    unpack_optimizer(fresh, second, load_file(tmp_path / "optimizer.safetensors"), json.loads(json.dumps(groups)))
    assert all(map(torch.equal, train(second, fresh, range(3, 6)), expected))
    assert [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in fresh.param_groups] == \
        [{k: list(v) if isinstance(v, tuple) else v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_optimizer_by_name_moves_every_trainable_parameter_once(name):
    model = small_gpt()
    frozen = next(model.parameters()).requires_grad_(False)
    optimizer = make_optimizer(name, model, 1e-2)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters() if p is not frozen)


def test_an_unknown_optimizer_is_answered_with_the_names():
    with pytest.raises(BookError, match="adamw, muon") as e: make_optimizer("lion", small_gpt(), 1e-3)
    assert "lion" in str(e.value) and "\n" not in str(e.value)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(BookError, match="use adamw"): make_optimizer("muon", nn.Linear(2, 2), 1e-3)
