"""What the chapter can't show: the one-token step on random shapes, full caches and windows, shared weights, every refusal; compiled, a model of each family."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import SHAPES, T, V

from llmbook.bert import Bert, BertConfig
from llmbook.classifying import Classifier
from llmbook.corpora import BookError
from llmbook.decoding import CompiledGPT, memory_bandwidth, token_bytes
from llmbook.gpt import GPT, GPTConfig
from llmbook.lora import LoRAConfig, LoRAModel
from llmbook.prompt_tuning import prompt_model
from llmbook.qlora import quantize_model, whole_model
from llmbook.xlnet import XLNet, XLNetConfig

LLAMA = GPTConfig.llama(vocab_size=V, context=T, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
GPT2 = GPTConfig.gpt2(vocab_size=V, context=T, n_layer=2, n_head=4, n_embd=64)


def build(config, dtype=torch.float64, seed=0):
    "A model with weights large enough that mistakes show; in fp64 rounding doesn't."
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.3)
    return model.to(dtype)


def plain(model): return CompiledGPT.of(model, compiled=False)


def along(model, ids, first=1, capacity=None):
    "Logits after the first tokens together and after each other one."
    cache = model.new_cache(capacity=capacity)
    return torch.stack([model.read(part, cache) for part in [ids[:first], *([i] for i in ids[first:])]])


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.lists(st.integers(0, V - 1), min_size=1, max_size=T), st.data())
@torch.no_grad()
def test_the_step_is_the_model_for_any_shape_up_to_the_whole_window(config, ids, data):
    model, first = build(config), data.draw(st.integers(1, len(ids)))
    got = along(plain(model), ids, first, capacity=data.draw(st.integers(len(ids), T)))
    torch.testing.assert_close(got, model(torch.tensor([ids]))[0, first - 1:], rtol=1e-9, atol=1e-9)    # fp64: sums in another order


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.lists(st.integers(0, V - 1), min_size=1, max_size=T - 1), st.integers(0, 3))
def test_samples_with_a_seed_are_the_models_own(config, prompt, seed):
    model = build(config)
    for how in (dict(temperature=0), dict(temperature=0.9, top_k=5, seed=seed), dict(top_p=0.8, seed=seed)):
        assert list(plain(model).generate(prompt, T - len(prompt), **how)) == list(model.generate(prompt, T - len(prompt), **how))


def test_what_lies_in_unused_memory_never_counts():
    step = plain(build(LLAMA))
    cache, clean = (step.new_cache() for _ in range(2))
    cache.k.fill_(math.nan), cache.v.fill_(math.nan)
    for ids in ([1, 2, 3], [4], [5]): assert torch.equal(step.read(ids, cache), step.read(ids, clean))


def test_a_stop_ends_the_text_and_prompts_of_any_length_may_follow_each_other():
    model = build(LLAMA)
    step, whole = plain(model), list(model.generate([1, 2], 9, temperature=0))
    at = whole.index(whole[4])
    assert list(step.generate([1, 2], 9, temperature=0, stop=[whole[4]])) == whole[:at]
    for prompt in ([3], [1, 2, 3, 4, 5, 6], [7, 8]): assert list(step.generate(prompt, 5, temperature=0)) == list(model.generate(prompt, 5, temperature=0))
    assert list(step.generate([1] * T, 0)) == []


def test_a_full_cache_and_a_full_window_are_refused():
    step = plain(build(LLAMA))
    cache = step.new_cache(capacity=3)
    for ids in ([1, 2], [3]): step.read(ids, cache)
    with pytest.raises(BookError, match="holds 3 tokens and 4"): step.read([4], cache)
    assert cache.length == 3
    cache = step.new_cache(capacity=T + 1)
    step.read([1] * T, cache)
    with pytest.raises(BookError, match="context of 12"): step.read([1], cache)
    with pytest.raises(BookError, match="context"): step.generate([1, 2], T)
    with pytest.raises(BookError, match="outside"): step.generate([V], 1)


def test_several_texts_in_one_cache_are_refused_before_it_is_touched():
    step = plain(build(LLAMA))
    cache = step.new_cache(batch=2)
    with pytest.raises(BookError, match="one text"): step.read([1, 2], cache)
    assert cache.length == 0


@torch.no_grad()
def test_weights_are_shared_and_the_model_keeps_its_ways():
    model = build(LLAMA)
    step, keys = plain(model), list(model.state_dict())
    assert type(model) is GPT and list(step.state_dict()) == keys and all(a is b for a, b in zip(model.parameters(), step.parameters(), strict=True))
    before = list(step.generate([1, 2], 6, temperature=0))
    for p in model.parameters(): p.add_(torch.randn_like(p))
    assert list(step.generate([1, 2], 6, temperature=0)) == list(model.generate([1, 2], 6, temperature=0)) != before


def test_the_step_never_switches_the_models_mode():
    model = build(LLAMA)
    step = plain(model)
    model.train()
    with pytest.raises(BookError, match="eval"): list(step.generate([1, 2], 3))
    step.eval()
    assert all(m.training for m in model.modules())
    model.eval()
    assert len(list(step.train().generate([1, 2], 3))) == 3 and not any(m.training for m in model.modules())


def test_other_models_are_refused_with_the_way_out():
    bert = Bert(BertConfig(vocab_size=V, context=T, n_layer=1, n_head=2, n_embd=8))
    xlnet, classifier = XLNet(XLNetConfig(vocab_size=V, n_layer=1, n_head=2, n_embd=8)), Classifier(build(LLAMA, torch.float32), ["a", "b"])
    for other in (bert, xlnet, classifier, prompt_model(build(LLAMA, torch.float32), 2)):
        with pytest.raises(BookError, match="plain GPT"): CompiledGPT.of(other)
    with pytest.raises(BookError, match="eval"): CompiledGPT.of(build(LLAMA).train())


def test_adapters_are_merged_first_and_four_bits_made_whole():
    adapted = LoRAModel(build(LLAMA, torch.float32), LoRAConfig(2)).eval()
    with torch.no_grad(): [p.add_(torch.randn_like(p)) for n, p in adapted.named_parameters() if "lora_" in n]
    with pytest.raises(BookError, match="unwrap"): CompiledGPT.of(adapted)
    with pytest.raises(BookError, match="LoRALinear.*unwrap"): CompiledGPT.of(adapted.base)
    want = list(adapted.generate([1, 2], 8, temperature=0))
    assert list(plain(adapted.unwrap()).generate([1, 2], 8, temperature=0)) == want
    small = quantize_model(build(LLAMA, torch.float32))
    with pytest.raises(BookError, match="Linear4bit.*whole_model"): CompiledGPT.of(small)
    assert list(plain(whole_model(small)).generate([1, 2], 8, temperature=0)) == list(small.generate([1, 2], 8, temperature=0))


def test_an_adapter_put_in_afterwards_is_noticed():
    step = plain(model := build(LLAMA, torch.float32))
    LoRAModel(model, LoRAConfig(2)).eval()
    with pytest.raises(BookError, match="unwrap"): list(step.generate([1, 2], 3))


def test_bytes_are_those_of_what_takes_part():
    C, head = 64, 16
    tied, untied, learned = GPT(LLAMA), GPT(GPTConfig.llama(vocab_size=V, context=T, n_layer=2, n_head=4, n_kv_head=2, n_embd=C, tie=False)), GPT(GPT2)
    assert token_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters())
    assert token_bytes(untied) == token_bytes(tied) + 4 * C                                   # one row of the table that isn't the head
    assert token_bytes(learned) == 4 * (sum(p.numel() for p in learned.parameters()) - (T - 1) * C)
    assert token_bytes(tied, 5) - token_bytes(tied) == 5 * 2 * 2 * 2 * head * 4               # keys and values, layers, heads, width, bytes
    assert token_bytes(GPT(LLAMA).bfloat16(), 5) * 2 == token_bytes(tied, 5)
    assert math.isfinite(memory_bandwidth(1, 2)) and memory_bandwidth(1, 2) > 0


@torch.no_grad()
def test_in_bf16_the_step_is_nearer_to_fp64_than_the_library():
    "Both read the same rounded weights; only the library rounds what is in motion, too."
    ids, worse, better = [i % V for i in range(T)], 0.0, 0.0
    for seed in range(8):
        model = build(LLAMA, torch.bfloat16, seed)
        exact = along(build(LLAMA, torch.bfloat16, seed).double(), ids)
        worse += (along(model, ids).double() - exact).square().mean().item()
        better += (along(plain(model), ids).double() - exact).square().mean().item()
    assert better < worse / 2


def test_without_a_compiler_there_is_one_sentence(monkeypatch):
    def broken(*a, **k): raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no g++"), None)
    monkeypatch.setattr(torch, "compile", lambda step: broken)
    with pytest.raises(BookError, match="C\\+\\+ compiler"): CompiledGPT.of(build(LLAMA))


@pytest.mark.slow
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_and_plain_agree_for_any_length(config, dtype):
    model = build(config, dtype)
    fast, slow = CompiledGPT.of(model), plain(model)
    for capacity in (5, 9, T):
        ids = [i % V for i in range(capacity)]
        torch.testing.assert_close(along(fast, ids, capacity=capacity), along(slow, ids, capacity=capacity), rtol=1e-4, atol=1e-2 if dtype == torch.bfloat16 else 1e-4)
