"Quantization: sizes, values and files that a lesson can't show."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.corpora import BookError
from llmbook.quantization import LEVELS, NestedScales, Quantized4bit, decode_q4_1, decode_q8_0, from_stored, nearest, pack, quantize_4bit, stored_tensors, unpack, zero_point_int8

kinds, blocks = st.sampled_from(list(LEVELS)), st.sampled_from([2, 32, 64, 256])
sizes, dtypes = st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def drawn(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=rng) * 10 ** (torch.rand(1, generator=rng) * 4 - 3)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(sizes, dtypes, kinds, blocks, st.booleans(), st.integers(0, 99))
def test_any_shape_comes_back_within_half_a_gap(shape, dtype, kind, block, nested, seed):
    x = drawn(shape, dtype, seed)
    q = quantize_4bit(x, kind, block, nested)
    back = q.dequantize()
    assert back.shape == x.shape and back.dtype == x.dtype and len(q.codes) == math.ceil(x.numel() / 2)
    usable = LEVELS[kind][LEVELS[kind] >= -1].sort().values
    gap = float(usable.diff().max()) / 2 if usable[0] == -1 else 1.0
    exact = quantize_4bit(x, kind, block, nested=False)
    scale = exact.absmax.repeat_interleave(block)[:x.numel()].view(x.shape)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert ((exact.dequantize().float() - x.float()).abs() <= scale * (gap + rounding) + 1e-7).all()
    torch.testing.assert_close(q.absmax, exact.absmax, rtol=0.02, atol=float(exact.absmax.std(correction=0)) * 4 + 1e-7)


@settings(max_examples=40, deadline=None)
@given(sizes, st.sampled_from(["nf4", "fp4"]), st.sampled_from([64, 128, 256]), st.booleans(), st.integers(0, 99))
def test_stored_bytes_are_the_librarys(shape, kind, block, nested, seed):
    bnb = pytest.importorskip("bitsandbytes.functional")
    x = drawn(shape, torch.float32, seed)
    ours, (codes, state) = quantize_4bit(x, kind, block, nested), bnb.quantize_4bit(x, blocksize=block, quant_type=kind, compress_statistics=nested)
    assert torch.equal(ours.codes, codes.view(-1))
    if nested: assert torch.equal(ours.scales.codes, state.absmax) and torch.equal(ours.scales.absmax, state.state2.absmax) and torch.equal(ours.scales.offset, state.offset)
    else: assert torch.equal(ours.scales, state.absmax)


@settings(max_examples=30, deadline=None)
@given(sizes, dtypes, kinds, st.booleans(), st.integers(0, 99))
def test_files_bring_everything_back(shape, dtype, kind, nested, seed):
    q = quantize_4bit(drawn(shape, dtype, seed), kind, 64, nested)
    back = from_stored("w", stored_tensors("w", q))
    assert torch.equal(back.dequantize(), q.dequantize()) and (back.shape, back.dtype, back.block, back.kind, back.nbytes) == (q.shape, q.dtype, q.block, q.kind, q.nbytes)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda c: len(c) % 2 == 0))
def test_packing_is_lossless(codes):
    codes = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("kind", LEVELS)
def test_every_level_is_its_own_nearest(kind):
    levels = LEVELS[kind]
    assert torch.equal(levels[nearest(levels, levels).int()], levels)


def test_quantizing_what_was_quantized_changes_nothing():
    q = quantize_4bit(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), nested=False)
    again = quantize_4bit(q.dequantize(), nested=False)
    assert torch.equal(again.codes, q.codes) and torch.equal(again.absmax, q.absmax)


def test_zeros_stay_zero():
    for nested in (False, True): assert not quantize_4bit(torch.zeros(70, 64), nested=nested).dequantize().any()
    codes, step, zero = zero_point_int8(torch.tensor([0.0, 3.0, 9.0]))
    assert float((codes[0] - zero) * step) == 0


def test_equal_scales_survive_double_quantization():
    scales = torch.full((300,), 0.7)
    torch.testing.assert_close(NestedScales.of(scales).values(), scales, rtol=0, atol=1e-7)


def test_kernel_is_left_alone_where_blocks_span_rows(monkeypatch):
    called = []
    monkeypatch.setattr("llmbook.quantization.native_dequantize", lambda: lambda codes, *rest: called.append(rest) or torch.zeros(rest[-2], dtype=rest[-1]))
    x = torch.randn(16, 96)
    for block, kind, times in ((64, "nf4", 0), (32, "nf4", 1), (32, "int4", 1), (2, "fp4", 2)):
        quantize_4bit(x, kind, block).dequantize()
        assert len(called) == times


@pytest.mark.parametrize("weight, how, words", [
    (torch.tensor([1.0, math.inf]), {}, "infinities"), (torch.tensor([1.0, math.nan]), {}, "NaN"), (torch.zeros(0), {}, "at least one"),
    (torch.arange(4), {}, "int64"), (torch.ones(4), {"kind": "nf3"}, "nf3"), (torch.ones(4), {"block": 0}, "even"), (torch.ones(4), {"block": 5}, "even")])
def test_what_cannot_be_quantized_is_named(weight, how, words):
    with pytest.raises(BookError, match=words): quantize_4bit(weight, **how)


@pytest.mark.parametrize("harm", [
    lambda t: t.pop("w"), lambda t: t.pop("w.absmax"), lambda t: t.update(w=t["w"][:3]), lambda t: t.update({"w.absmax": t["w.absmax"][:1]}),
    lambda t: t.update(w=t["w"].float()), lambda t: t.update({"w.quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8)}), lambda t: t.pop("w.nested_absmax")])
def test_damaged_files_are_named(harm):
    tensors = stored_tensors("w", quantize_4bit(torch.randn(4, 64)))
    harm(tensors)
    with pytest.raises(BookError, match="w is damaged"): from_stored("w", tensors)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_gguf_blocks_agree_with_the_package(rows, blocks, seed):
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType as kinds
    x = drawn([rows, 32 * blocks], torch.float32, seed).numpy()
    for kind, decode in ((kinds.Q4_1, decode_q4_1), (kinds.Q8_0, decode_q8_0)):
        raw = quants.quantize(x, kind)
        assert torch.equal(decode(torch.from_numpy(raw)), torch.from_numpy(quants.dequantize(raw, kind)))


def test_bits_are_counted_with_everything():
    q = quantize_4bit(torch.randn(256, 1024))
    assert isinstance(q, Quantized4bit) and abs(q.bits - (4 + 8 / 64 + 32 / 64 / 256)) < 1e-3
    assert q.nbytes == sum(t.nbytes for k, t in stored_tensors("w", q).items() if k in ("w", "w.absmax", "w.nested_absmax")) + 4
