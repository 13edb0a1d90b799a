"""What the chapter can't show: the formulas on random shapes, and input that makes no sense."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig
from llmbook.sizing import (DEVICES, MODELS, PRECISIONS, activations, cache_bytes, forward_flops, kept_bytes, matmul_peak,
                            parameters, training_flops, training_memory, training_seconds)

shapes = st.builds(
    lambda head, groups, share, **kw: GPTConfig(n_head=groups * share, n_kv_head=groups, n_embd=head * groups * share, **kw),
    head=st.sampled_from([2, 4, 8]), groups=st.integers(1, 3), share=st.integers(1, 3), vocab_size=st.integers(2, 50),
    context=st.integers(1, 16), n_layer=st.integers(1, 3), n_inner=st.one_of(st.none(), st.integers(1, 40)),
    norm=st.sampled_from(["layernorm", "rmsnorm"]), mlp=st.sampled_from(["gelu", "swiglu"]),
    position=st.sampled_from(["learned", "rope"]), bias=st.booleans(), tie=st.booleans())


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_formula_equals_count_on_any_shape(config):
    with torch.device("meta"):
        assert sum(parameters(config).values()) == sum(p.numel() for p in GPT(config).parameters())


@settings(max_examples=15, deadline=None)
@given(shapes)
def test_kept_values_equal_the_formula_on_any_shape(config):
    model, ids = GPT(config), torch.zeros(2, config.context, dtype=torch.long)
    assert kept_bytes(model, lambda: model(ids)) == 4 * ids.numel() * sum(activations(config).values())


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
])
def test_senseless_input_is_refused_in_one_sentence(call):
    with pytest.raises(BookError) as e:
        call()
    assert "\n" not in str(e.value)
