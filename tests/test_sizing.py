"""What the chapter can't show: the formulas on random shapes, and input that makes no sense."""
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmbook.bert import Bert, BertConfig, BertForPreTraining
from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig
from llmbook.sizing import (DEVICES, MODELS, PRECISIONS, activations, backward_flops, cache_bytes, forward_flops, kept_bytes, matmul_peak,
                            parameters, predicted, training_cost, training_flops, training_memory, training_seconds)
from llmbook.xlnet import XLNet, XLNetConfig, XLNetLM, permutation_batch


@pytest.fixture(autouse=True)
def one_thread():
    "Tiny tensors: more threads would only wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


shapes = st.builds(
    lambda head, groups, share, **kw: GPTConfig(n_head=groups * share, n_kv_head=groups, n_embd=head * groups * share, **kw),
    head=st.sampled_from([2, 4, 8]), groups=st.integers(1, 3), share=st.integers(1, 3), vocab_size=st.integers(2, 50),
    context=st.integers(1, 16), n_layer=st.integers(1, 3), n_inner=st.one_of(st.none(), st.integers(1, 40)),
    norm=st.sampled_from(["layernorm", "rmsnorm"]), mlp=st.sampled_from(["gelu", "swiglu"]),
    position=st.sampled_from(["learned", "rope"]), bias=st.booleans(), tie=st.booleans())


sizes = dict(vocab_size=st.integers(2, 50), n_layer=st.integers(1, 3), n_inner=st.one_of(st.none(), st.integers(1, 40)))
wide = st.tuples(st.sampled_from([2, 4, 8]), st.integers(1, 3))  # width of a head, heads
encoders = st.builds(lambda w, **kw: BertConfig(n_head=w[1], n_embd=w[0] * w[1], dropout=0.0, **kw), wide, **sizes,
                     context=st.integers(2, 16), segments=st.integers(1, 3))
xlnets = st.builds(lambda w, **kw: XLNetConfig(n_head=w[1], n_embd=w[0] * w[1], dropout=0.0, **kw), wide, **sizes)
families = st.one_of(shapes, encoders, xlnets)


def model_of(config):
    if isinstance(config, BertConfig):
        return BertForPreTraining(Bert(config))
    return XLNetLM(XLNet(config)) if isinstance(config, XLNetConfig) else GPT(config)


def flops_of(run):
    "FLOPs that PyTorch counts forward and backward."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        output = run()
    parts = output if isinstance(output, tuple) else (output,)
    with FlopCounterMode(display=False) as backward:
        sum(part.sum() for part in parts if isinstance(part, torch.Tensor)).backward()
    return forward.get_total_flops(), backward.get_total_flops()


@settings(max_examples=60, deadline=None)
@given(families)
def test_formula_equals_count_on_any_shape(config):
    with torch.device("meta"):
        assert sum(parameters(config).values()) == sum(p.numel() for p in model_of(config).parameters())


@settings(max_examples=15, deadline=None)
@given(families, st.integers(1, 3))
def test_kept_values_equal_the_formula_on_any_shape(config, batch):
    length = getattr(config, "context", 7)
    model, ids = model_of(config), torch.zeros(batch, length, dtype=torch.long)
    assert kept_bytes(model, lambda: model(ids)) == 4 * round(ids.numel() * sum(activations(config, length, batch=batch).values()))


@settings(max_examples=15, deadline=None)
@given(families, st.integers(1, 3))
def test_flops_equal_the_counter_on_any_shape(config, batch):
    length = getattr(config, "context", 7)
    model, ids = model_of(config), torch.zeros(batch, length, dtype=torch.long)
    parts = forward_flops(config, length, batch=batch)
    assert flops_of(lambda: model(ids)) == (round(ids.numel() * sum(parts.values())), round(ids.numel() * backward_flops(parts)))


@settings(max_examples=40, deadline=None)
@given(xlnets, st.integers(2, 30), st.integers(1, 3))
@example(XLNetConfig(11, 2, 1, 8, dropout=0.0), 6, 1)  # one head, one prediction, one sequence
@example(XLNetConfig(11, 2, 1, 8, dropout=0.0), 7, 2)
@example(XLNetConfig(11, 2, 2, 8, dropout=0.0), 6, 2)
def test_a_step_of_two_streams_is_in_the_formulas(config, length, batch):
    model, ids = model_of(config), torch.zeros(batch, length, dtype=torch.long)
    run = lambda: model.loss(**permutation_batch(ids), segments=ids)
    parts = forward_flops(config, length, training=True, batch=batch)
    assert flops_of(run) == (round(ids.numel() * sum(parts.values())), round(ids.numel() * backward_flops(parts)))
    kept = sum(activations(config, length, True, batch).values()) + predicted(config, length) * config.vocab_size
    assert 0 <= kept_bytes(model, run) // 4 - round(ids.numel() * kept) <= 3


@settings(max_examples=10, deadline=None)
@given(encoders, st.sampled_from([20, 40]))
def test_a_step_of_hidden_words_is_in_the_formulas(config, length):
    config = BertConfig(**{**vars(config), "context": length})
    model, ids = model_of(config), torch.zeros(2, length, dtype=torch.long)
    targets = ids.masked_fill(torch.arange(length) >= 0.15 * length, -100)
    parts = forward_flops(config, length, training=True)
    assert flops_of(lambda: model.loss(ids, targets, follows=ids[:, 0])) == (round(2 * length * sum(parts.values())), round(2 * length * backward_flops(parts)))


@settings(max_examples=60, deadline=None)
@given(families, st.integers(1, 64), st.integers(2, 4096), st.sampled_from(sorted(PRECISIONS)), st.booleans())
def test_memory_grows_with_the_batch_and_the_context(config, batch, length, precision, recompute):
    whole = lambda b, t: sum(training_memory(config, b, t, precision, recompute).values())
    assert 0 < whole(batch, length) <= whole(batch + 1, length) and whole(batch, length) < whole(batch, 2 * length)


@settings(max_examples=10, deadline=None)
@given(shapes, st.integers(1, 4))
def test_a_sliced_loss_keeps_no_logits(config, rows):
    model, ids = GPT(config), torch.zeros(2, config.context, dtype=torch.long)
    whole = kept_bytes(model, lambda: model.loss(ids, ids)) // 4
    model.SLICE = rows * config.vocab_size
    sliced = kept_bytes(model, lambda: model.loss(ids, ids)) // 4
    assert whole - sliced == (config.vocab_size * ids.numel() + 1 if ids.numel() > rows else 0)  # and the loss's own number


def test_cost_is_time_by_price():
    for name in ("GPT-2", "BERT-base", "XLNet-base"):
        device = DEVICES["RTX 4090"]
        assert training_cost(MODELS[name], 1e9, device) == training_seconds(MODELS[name], 1e9, device) / 3600 * device.price


def test_recomputing_costs_arithmetic_and_saves_memory():
    c = MODELS["GPT-2"]
    assert training_flops(c, recompute=True) > training_flops(c) > training_flops(c, causal=True)
    for precision in PRECISIONS:
        kept, again = (training_memory(c, 4, 512, precision, r) for r in (False, True))
        assert again["activations"] < kept["activations"] / 5 and again["weights"] == kept["weights"]


def test_shorter_contexts_cost_less():
    c = MODELS["Llama 3.1 8B"]
    assert sum(forward_flops(c, 128).values()) < sum(forward_flops(c, 1024).values())
    assert cache_bytes(c, 2048) == 2 * cache_bytes(c, 1024)


def test_peak_is_a_plausible_rate():
    assert 1e8 < matmul_peak(torch.float32, seconds=0.1, size=256) < 1e14


@pytest.mark.parametrize("call", [
    lambda: parameters(object()), lambda: forward_flops(None), lambda: activations({}),
    lambda: training_memory(MODELS["GPT-2"], 1, precision="fp7"), lambda: DEVICES["RTX 4090"].peak("fp7"),
    lambda: training_seconds(MODELS["GPT-2"], 0, DEVICES["RTX 4090"]),
    lambda: training_seconds(MODELS["GPT-2"], 1e9, DEVICES["RTX 4090"], share=2),
    lambda: forward_flops(MODELS["GPT-2"], 0), lambda: training_memory(MODELS["BERT-base"], 0), lambda: activations(MODELS["XLNet-base"], -1),
    lambda: cache_bytes(MODELS["BERT-base"]), lambda: training_cost(MODELS["XLNet-base"], -1, DEVICES["RTX 4090"]),
])
def test_senseless_input_is_refused_in_one_sentence(call):
    with pytest.raises(BookError) as e:
        call()
    assert "\n" not in str(e.value)
