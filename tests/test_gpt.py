"""What the chapters can't show: the decoder on random shapes, sampling by its statistics, and every kind of bad input."""
import json
import math
import resource
import signal
import weakref
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shared import SHAPES, T, V

from llmbook.attention import MultiHeadAttention, attention
from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig
from llmbook.pretrained import Stored, hand_back, load_exactly, read_folder, stored_model, take_exactly

some = settings(max_examples=40, deadline=None)


def build(config, seed=0):
    "A model with weights large enough that mistakes show, in fp64 so that rounding doesn't."
    torch.manual_seed(seed)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.3)
    return model


SHAPE = GPTConfig.llama(vocab_size=V, context=T, n_layer=2, n_head=4, n_kv_head=2, n_embd=16)


@pytest.fixture(scope="module")
def model(): return build(SHAPE)


@some
@given(SHAPES, st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
@torch.no_grad()
def test_cached_equals_uncached_for_any_chunking(config, chunks, data):
    n = min(sum(chunks), T)
    ids = torch.tensor([data.draw(st.lists(st.integers(0, V - 1), min_size=n, max_size=n)) for _ in range(2)])
    model, at, got = build(config), 0, []
    cache = model.new_cache(batch=2)
    for size in chunks:
        if at < n: got.append(model(ids[:, at:at + size], cache))
        at += size
    torch.testing.assert_close(torch.cat(got, 1), model(ids), rtol=1e-9, atol=1e-9)   # fp64: sums in another order
    assert cache.length == n


@some
@given(SHAPES, st.integers(1, T - 1), st.integers(1, V - 1))
@torch.no_grad()
def test_a_later_token_never_changes_earlier_logits(config, at, shift):
    model, ids = build(config), torch.arange(T)[None] % V
    other = ids.clone()
    other[0, at] = (other[0, at] + shift) % V
    a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :at], b[:, :at], rtol=1e-12, atol=1e-12)
    assert (a[:, at] - b[:, at]).abs().max() > 1e-9


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(0, 3))
def test_saved_and_loaded_bit_by_bit(tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = build(config, seed).float()
    model.save_pretrained(folder)
    again = GPT.from_pretrained(folder)
    assert again.config == config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    ids = torch.arange(T)[None] % V
    assert torch.equal(model(ids), again(ids))


@some
@given(SHAPES, st.lists(st.sampled_from([-100, *range(V)]), min_size=2 * T, max_size=2 * T), st.sampled_from([1, 3 * V, 1 << 24]))
def test_loss_is_torchs_cross_entropy_also_in_slices(config, targets, slice):
    targets = torch.tensor(targets).view(2, T)
    targets[0, 0] = 1                                           # at least one counts
    model, ids = build(config), torch.arange(2 * T).view(2, T) % V
    model.SLICE = slice
    want = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
    got = model.loss(ids, targets)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@some
@given(SHAPES, st.lists(st.integers(0, V - 1), min_size=1, max_size=4), st.integers(0, 99))
@torch.no_grad()
def test_greedy_topk1_and_small_topp_take_the_likeliest(config, prompt, seed):
    model, text = build(config), list(prompt)
    for _ in range(6): text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    want = text[len(prompt):]
    for how in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-9), dict(temperature=0, top_k=3, top_p=0.5)):
        assert list(model.generate(prompt, 6, seed=seed, **how)) == want


def test_a_seed_reproduces_and_seeds_differ(model):
    draw = lambda seed: tuple(model.generate([1, 2], 8, temperature=3.0, seed=seed))
    assert draw(5) == draw(5)
    assert len({draw(s) for s in range(20)}) > 10
    assert len({draw(None) for _ in range(20)}) > 10


def test_global_randomness_is_left_alone(model):
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    list(model.generate([1], 5, seed=0))
    assert torch.equal(torch.rand(4), want)


def test_stop_ends_the_text_and_is_not_given_out(model):
    free = list(model.generate([1, 2], 8, temperature=3.0, seed=1))
    for stop in set(free): assert list(model.generate([1, 2], 8, temperature=3.0, seed=1, stop=(stop,))) == free[:free.index(stop)]


def test_ids_come_one_by_one_and_training_mode_returns(monkeypatch):
    model, calls = build(SHAPE).train(), []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, ids, cache=None: calls.append(tuple(ids.shape)) or hidden(self, ids, cache))
    stream = model.generate([1, 2, 3], 5, temperature=0)
    assert calls == []
    first = next(stream)
    assert type(first) is int and calls == [(1, 3)]
    next(stream)
    assert calls == [(1, 3), (1, 1)]
    stream.close()
    assert model.training


@pytest.mark.parametrize("how", [dict(temperature=0.7), dict(temperature=1.0), dict(temperature=2.5),
                                 dict(temperature=1.5, top_k=4), dict(temperature=1.5, top_p=0.8)])
@torch.no_grad()
def test_sampling_follows_the_probabilities(model, how, N=1500, sigmas=5):
    p = (model(torch.tensor([[1, 2]]))[0, -1].float() / how["temperature"]).softmax(0)
    order = p.argsort(descending=True)
    if "top_k" in how: p[order[how["top_k"]:]] = 0
    if "top_p" in how: p[order[int((p[order].cumsum(0) < how["top_p"]).sum()) + 1:]] = 0
    p /= p.sum()
    assert (p > 0.02).sum() > 1                                  # something is left to choose
    counts = torch.tensor([next(model.generate([1, 2], 1, seed=s, **how)) for s in range(N)]).bincount(minlength=V)
    # Each count is binomial: N·p on average, with the standard deviation √(N·p·(1−p)).
    assert ((counts - N * p).abs() <= sigmas * (N * p * (1 - p)).sqrt() + 1e-3).all()


def refused(call, *words):
    "The fault is one `BookError` sentence that holds these words."
    with pytest.raises(BookError) as e: call()
    said = str(e.value)
    assert "\n" not in said and said.endswith(".") and ": " in said, said    # the fault: the fix
    for word in words: assert str(word) in said, said
    return said


bad_prompts = {
    "too long": (dict(ids=[1] * (T + 1), max_new_tokens=0), [T + 1, T]), "no room": (dict(ids=[1] * T, max_new_tokens=1), [T, "shorten"]),
    "empty": (dict(ids=[], max_new_tokens=1), ["empty"]), "id too large": (dict(ids=[1, V], max_new_tokens=1), [V, "vocab"]),
    "id negative": (dict(ids=[-1], max_new_tokens=1), [-1, "vocab"]),
    "cold": (dict(ids=[1], max_new_tokens=1, temperature=-0.1), ["temperature"]),
    "not a temperature": (dict(ids=[1], max_new_tokens=1, temperature=math.nan), ["temperature"]),
    **{f"top_p={p}": (dict(ids=[1], max_new_tokens=1, top_p=p), ["top_p"]) for p in (0, -0.5, 1.01, math.nan)},
    "top_k=0": (dict(ids=[1], max_new_tokens=1, top_k=0), ["top_k"])}


@pytest.mark.parametrize("name", bad_prompts)
def test_bad_prompts_and_settings_are_refused_before_any_work(model, name):
    arguments, words = bad_prompts[name]
    refused(lambda: model.generate(**arguments), *words)


def test_forward_and_loss_refuse_what_does_not_fit(model):
    refused(lambda: model(torch.zeros(1, T + 1, dtype=torch.long)), T + 1, T)
    refused(lambda: model(torch.tensor([[0, V]])), V, "vocab")
    refused(lambda: model.loss(torch.tensor([[0, V]]), torch.tensor([[0, 1]])), V, "vocab")


@pytest.mark.parametrize("change, words", [
    (dict(n_embd=15), ["n_embd=15", "n_head=4"]), (dict(n_kv_head=3), ["n_kv_head=3", "n_head=4"]), (dict(n_head=0), ["n_head=0"]),
    (dict(n_embd=12), ["n_embd=12", "even"]), (dict(norm="batchnorm"), ["batchnorm"]), (dict(vocab_size=0), ["vocab_size"])])
def test_shapes_that_do_not_fit_are_refused(change, words):
    refused(lambda: GPT(GPTConfig(**{**asdict(SHAPE), **change})), *words)


@pytest.fixture
def saved(tmp_path, model):
    "A good model folder, to be damaged."
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_misfitting_tensors_are_named(saved):
    edit(saved, lambda w: w.pop("norm.weight"))
    refused(lambda: GPT.from_pretrained(saved), "lacks", "norm.weight")
    edit(saved, lambda w: w.update({"norm.weight": torch.ones(16), "surplus": torch.ones(1)}))
    refused(lambda: GPT.from_pretrained(saved), "too many", "surplus")
    edit(saved, lambda w: (w.pop("surplus"), w.update({"norm.weight": torch.ones(17)})))
    refused(lambda: GPT.from_pretrained(saved), "norm.weight", "(17,)", "(16,)")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(saved, keep):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * keep) if isinstance(keep, float) else keep])
    refused(lambda: GPT.from_pretrained(saved), "model.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"model_type": "llmbook-gpt"}', '{"model_type": "mamba"}', '{"model_type": "llama"}',
                                  '{"model_type": "gpt2"}', b"\xff\xfe\x00".decode("latin-1")])
def test_damaged_config(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    refused(lambda: GPT.from_pretrained(saved))


@pytest.mark.parametrize("change", [dict(n_layer="two"), dict(surplus=1), dict(n_head=None), dict(vocab_size=-1)])
def test_senseless_fields_in_config(saved, change):
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(lambda: GPT.from_pretrained(saved), next(iter(change)))


def test_missing_folder_files_and_names(saved, tmp_path):
    refused(lambda: GPT.from_pretrained(tmp_path / "nowhere"), "nowhere")
    refused(lambda: GPT.from_pretrained("no-such-model"), "no-such-model")
    (tmp_path / "empty").mkdir()
    refused(lambda: GPT.from_pretrained(tmp_path / "empty"), "config.json")
    (saved / "model.safetensors").unlink()
    refused(lambda: GPT.from_pretrained(saved), "model.safetensors")


@pytest.mark.parametrize("index", [
    b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": null}}', b"\xff\xfe",
    b'{"weight_map": {"a": "../model.safetensors"}}', b'{"weight_map": {"a": "/etc/passwd"}}', b'{"weight_map": {"a": ".."}}'])
def test_a_damaged_index_is_one_sentence(saved, index):
    (saved / "model.safetensors.index.json").write_bytes(index)
    refused(lambda: GPT.from_pretrained(saved), "model.safetensors.index.json")


def test_an_index_names_a_missing_part(saved):
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-2.safetensors"}}')
    refused(lambda: GPT.from_pretrained(saved), "part-2.safetensors")


def test_stored_tensors_are_those_of_the_files(saved):
    (config, weights), (again, stored) = read_folder(saved), stored_model(saved)
    assert config == again and stored.keys() == weights.keys()
    for name, t in stored.items(): assert t.shape == tuple(weights[name].shape) and t.kind == "F64" and torch.equal(t.read(), weights[name]) and torch.equal(t.rows(2), weights[name][:2])
    (saved / "model.safetensors").write_bytes(b"torn")
    refused(lambda: stored_model(saved), "model.safetensors")
    refused(stored["norm.weight"].read, "model.safetensors")


def test_stored_tensors_are_read_one_at_a_time_and_none_if_one_misfits(model):
    alive, read = [], []
    def stored(name, w):
        def rows():
            assert not any(there() is not None for there in alive), "the tensor before is still in memory"
            read.append(name), alive.append(weakref.ref(copy := w.clone()))
            return copy
        return Stored("F32", tuple(w.shape), rows)
    weights = {name: stored(name, w.detach()) for name, w in model.named_parameters()}
    load_exactly(empty := GPT.empty(SHAPE).double(), weights)
    assert read == list(weights) and all(torch.equal(a, b) for a, b in zip(empty.parameters(), model.parameters()))
    read.clear()
    refused(lambda: take_exactly({"norm.weight": torch.nn.Parameter(torch.ones(16))}, {"norm.weight": weights["norm.weight"], "surplus": weights["norm.weight"]}), "too many", "surplus")
    assert not read


def test_handing_back_is_for_all_systems(monkeypatch):
    hand_back()
    for elsewhere in ("darwin", "win32"): monkeypatch.setattr("sys.platform", elsewhere), hand_back()


def test_shapes_that_make_no_sense_are_one_sentence():
    model, ids = build(SHAPE, 1).float(), torch.zeros(2, 3, dtype=torch.long)
    refused(lambda: model(ids[0]), "texts × tokens")
    refused(lambda: model(ids[:, :0]), "texts × tokens")
    refused(lambda: model.loss(ids, ids[:, :2]), "targets")
    q = torch.randn(1, 1, 3, 2)
    refused(lambda: attention(q, q, q, torch.ones(3, 3)), "booleans")
    refused(lambda: attention(q, q, q, torch.ones(2, 3, dtype=torch.bool)), "queries")
    for x in (torch.randn(2, 3, 6), torch.randn(3, 8)): refused(lambda: MultiHeadAttention(8, 2)(x), "width 8")


@contextmanager
def full_disk(limit):
    "No file may grow past `limit` bytes: the system refuses the write, as a full disk does."
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [10, 1000, 5000])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, limit, there):
    folder, old = tmp_path / "model", build(SHAPE, 1).float()
    if there: old.save_pretrained(folder)
    with full_disk(limit), pytest.raises(Exception):
        build(SHAPE, 2).save_pretrained(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["model"] * there
    if there: assert all(torch.equal(a, b) for a, b in zip(old.parameters(), GPT.from_pretrained(folder).parameters()))
