"""What the lesson on paging can't show: full disks and wrong tensors, odd shapes, and everything that layers computed twice must leave as it is."""
import copy
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbook import paging
from llmbook.bert import Bert, BertConfig, BertForPreTraining
from llmbook.cli_training import Pretrain
from llmbook.corpora import BookError, TokenStream, write_stream
from llmbook.engine import check_engine, layout_named
from llmbook.gpt import GPT, GPTConfig
from llmbook.loop import Loop, TrainConfig, recompute_layers
from llmbook.muon import make_optimizer
from llmbook.objectives import MaskedWord, Permutation
from llmbook.optimizers import untouched
from llmbook.paging import MemoryWatch, PagedAdamW, Pages, memory_now, moments
from llmbook.xlnet import XLNet, XLNetConfig, XLNetLM

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux about its pages")


def small_gpt(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig.llama(**{**dict(vocab_size=64, context=32, n_layer=2, n_head=2, n_embd=16), **changes}))


def train(model, optimizer, steps):
    for i in steps:
        ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


# Pages

@settings(deadline=None, max_examples=25)
@given(shapes=st.lists(st.lists(st.integers(1, 30), min_size=0, max_size=3), min_size=1, max_size=4), slice=st.sampled_from([16, 64, 1024, 1 << 22]),
       resident=st.sampled_from([None, 1, 5_000]), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), seed=st.integers(0, 99))
def test_any_shapes_move_as_torch_moves_them(shapes, slice, resident, dtype, seed):
    torch.manual_seed(seed)
    a = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    b = [nn.Parameter(p.detach().clone()) for p in a]
    ours, theirs = PagedAdamW(a, lr=0.1, weight_decay=0.2, eps=1e-6, resident=resident), torch.optim.AdamW(b, lr=0.1, weight_decay=0.2, eps=1e-6, fused=True)
    ours.SLICE = slice
    for _ in range(3):
        for p, q in zip(a, b): p.grad, q.grad = (g := torch.randn(p.shape, dtype=dtype)), g.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a, b):
        assert torch.equal(p, q)
        assert all(torch.equal(ours.state[p][name], theirs.state[q][name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_tensors_of_a_file_dont_overlap():
    pages = Pages(5 * 4096)
    tensors = [pages.zeros(torch.empty(n)) for n in (1, 1024, 1025, 7)]
    for i, t in enumerate(tensors): t.fill_(i + 1)
    pages.write_out()
    assert all(bool((t == i + 1).all()) for i, t in enumerate(tensors))


def test_nothing_is_left_in_the_folder(tmp_path):
    optimizer = PagedAdamW([nn.Parameter(torch.randn(3000))], folder=tmp_path)
    assert not list(tmp_path.iterdir())
    if Path("/proc/self/fd").exists():
        handle = optimizer.files[0].file.fileno()
        del optimizer
        with pytest.raises(OSError): os.fstat(handle)


@linux
def test_the_limit_on_resident_pages_holds():
    p = nn.Parameter(torch.randn(1 << 18))
    optimizer = PagedAdamW([p], resident=1 << 17)
    optimizer.SLICE = 1 << 13
    p.grad, seen = torch.randn_like(p), []
    count = optimizer.count
    def watched(nbytes):
        seen.append(optimizer.resident())
        count(nbytes)
    optimizer.count = watched
    optimizer.step()
    assert max(seen) <= 1 << 18 < 2 * p.nbytes
    optimizer.let_go()
    assert optimizer.resident() == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no RLIMIT_FSIZE")
def test_a_full_disk_is_noticed_before_the_first_step(tmp_path):
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with pytest.raises(BookError, match=r"8\.0 MB for the optimizer's memory can't be reserved in .*: choose another folder") as e:
            PagedAdamW([nn.Parameter(torch.randn(1_000_000))], folder=tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_disk_without_reservation_is_filled_with_zeros(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    pages = Pages(3_000_001, tmp_path)
    assert os.fstat(pages.file.fileno()).st_size == 3_000_001 and pages.zeros(torch.empty(700_000)).abs().sum() == 0


def test_folders_that_cant_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(BookError, match="can't be reserved in") as e: Pages(100, folder)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("tensor", [torch.empty(4, device="meta"), torch.randn(4, 6).T])
def test_tensors_that_cant_have_pages(tensor):
    with pytest.raises(BookError, match="contiguous tensors on the CPU"): PagedAdamW([nn.Parameter(tensor)])


@pytest.mark.parametrize("wrong", [dict(lr=-1.0), dict(betas=(0.9, 1.0)), dict(weight_decay=-0.1)])
def test_settings_out_of_range(wrong):
    with pytest.raises((BookError, ValueError)): PagedAdamW([nn.Parameter(torch.ones(2))], **wrong)


def test_a_trial_of_rates_puts_the_pages_back():
    expected = train(m := small_gpt(), torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True), range(6))
    model = small_gpt()
    optimizer = PagedAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    with untouched(model, optimizer): train(model, optimizer, range(10, 13))
    assert all(map(torch.equal, train(model, optimizer, range(3, 6)), expected))
    assert all(optimizer.state[p]["exp_avg"] is own["exp_avg"] for p, own in optimizer.own.items())
    fresh = PagedAdamW((m := small_gpt()).parameters(), lr=1e-2)
    with untouched(m, fresh): train(m, fresh, range(10, 13))
    assert all(map(torch.equal, train(m, fresh, range(6)), expected)), "a first step after a trial starts from zeros"


def test_a_closure_and_a_group_that_comes_later():
    a, b = (nn.Parameter(torch.ones(5)) for _ in "ab")
    optimizer = PagedAdamW([a], lr=0.1)
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    def loss():
        optimizer.zero_grad()
        (total := (a * a).sum() + (b * b).sum()).backward()
        return total
    assert optimizer.step(loss).item() == 10 and len(optimizer.files) == 2
    assert torch.allclose(b, torch.full((5,), 0.495)) and torch.allclose(a, torch.full((5,), 0.899))


def test_without_bitsandbytes_a_gpu_has_no_pages(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(BookError, match="install it, or choose adamw"): paging._bitsandbytes()


def test_by_name_with_the_groups_of_adamw():
    model = small_gpt()
    paged, plain = (make_optimizer(name, model, 1e-3, 0.3, (0.8, 0.9)) for name in ("paged-adamw", "adamw"))
    assert isinstance(paged, PagedAdamW)
    keys = ("lr", "betas", "eps", "weight_decay")
    assert [[g[k] for k in keys] for g in paged.param_groups] == [[g[k] for k in keys] for g in plain.param_groups]


# Watching

@linux
def test_the_watch_sees_what_is_taken():
    with MemoryWatch(every=0.001) as watch:
        watch.mark(phase="before")
        held = mmap.mmap(-1, 80_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # torch may hand out memory that this process has had before
        held.write(b"1" * 80_000_000)
        watch.mark(phase="after")
    assert not watch.thread.is_alive() and held[79_999_999:] == b"1"
    first, last = (next(s for s in watch.samples if s.get("phase") == phase) for phase in ("before", "after"))
    assert last["anonymous"] - first["anonymous"] > 70e6 and last["private"] - first["private"] > 70e6
    assert [s["seconds"] for s in watch.samples] == sorted(s["seconds"] for s in watch.samples)


def test_a_system_without_proc_is_answered(monkeypatch):
    def gone(self): raise FileNotFoundError
    monkeypatch.setattr(Path, "read_text", gone)
    with pytest.raises(BookError, match="use Linux"): memory_now()


@given(w=st.integers(1, 10**9), a=st.integers(0, 10**9), logits=st.integers(0, 10**6), layers=st.integers(1, 40))
def test_moments_begin_and_end_as_they_must(w, a, logits, layers):
    line = moments(dict(weights=w, gradients=w, optimizer=2 * w, activations=a, logits=logits), layers)
    assert len(line) == 2 * layers + 2 and all(m["weights"] == w and m["state"] == 2 * w for m in line)
    assert line[layers]["activations"] == a + logits and line[-1]["gradients"] == w and line[-1]["activations"] == line[-2]["activations"] == 0


# Layers computed twice

def bert(): return BertForPreTraining(Bert(BertConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=16, dropout=0.1), pooler=False)), MaskedWord(62, 64, special=(63,))


def xlnet(): return XLNetLM(XLNet(XLNetConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=16, dropout=0.1))), Permutation()


@pytest.mark.parametrize("make", [bert, xlnet])
def test_other_families_keep_their_gradients_with_dropout(make):
    def gradients(twice):
        torch.manual_seed(0)
        model, objective = make()
        if twice: recompute_layers(model)
        inputs = objective.batch(torch.randint(60, (2, 17)), torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        model.loss(**inputs).backward()
        return [p.grad for p in model.parameters()]
    for a, b in zip(gradients(False), gradients(True), strict=True): assert a is b is None or torch.equal(a, b)


def test_a_run_by_configuration_equals_the_plain_one(tmp_path):
    stream = write_stream(tmp_path / "s", ["abcdefghijklmno" * 20] * 10, lambda text: [ord(c) - 97 for c in text], eot=15, vocab_size=16, progress=False)
    def run(**changes):
        model = small_gpt(vocab_size=16, dropout=0.1)
        loop = Loop(model, TrainConfig(steps=4, batch_size=4, context=8, precision="fp32", **changes), TokenStream(tmp_path / "s"))
        torch.manual_seed(0)
        return [loop.train_step()["loss"] for _ in range(4)], [p.detach() for p in model.parameters()]
    (losses, weights), (again, same) = run(), run(recompute=True, optimizer="paged-adamw")
    assert stream is not None and losses == again and all(map(torch.equal, weights, same))


def test_wrapping_twice_copying_generating_and_saving():
    model = small_gpt()
    before, names = list(model.generate([1, 2, 3], 8, temperature=0)), list(model.state_dict())
    recompute_layers(model)
    once = [layer.forward for layer in model.layers]
    recompute_layers(model)
    assert [layer.forward for layer in model.layers] == once and list(model.state_dict()) == names
    assert list(model.generate([1, 2, 3], 8, temperature=0)) == before
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
    assert list(twin.generate([1, 2, 3], 8, temperature=0)) == before, "a copy computes with its own weights"


def test_what_cant_be_computed_twice():
    with pytest.raises(BookError, match="leave out recompute"): recompute_layers(nn.Linear(2, 2))
    recompute_layers(model := small_gpt())
    with pytest.raises(BookError, match="key/value cache"): model(torch.tensor([[1, 2]]), model.new_cache())


# Where the names meet

def test_the_mesh_refuses_both():
    config = dict(steps=2, batch_size=4, context=16)
    for wrong, why in ((dict(recompute=True), "belongs to a mesh's layout"), (dict(optimizer="paged-adamw"), "choose adamw")):
        with pytest.raises(BookError, match=why): check_engine(small_gpt().config, TrainConfig(**config, **wrong), layout_named("dp=2"))


def test_the_command_line_hands_both_on(tmp_path):
    config = Pretrain(tmp_path, optimizer="paged-adamw", recompute=True).config()
    assert config.optimizer == "paged-adamw" and config.recompute
    assert not Pretrain(tmp_path, recompute=True, mesh="dp=2").config().recompute, "on a mesh the layout has it"
    with pytest.raises(BookError, match="--micro-batches belongs to a mesh"): Pretrain(tmp_path, micro_batches=2).check_given()
    with pytest.raises(BookError, match="decides --recompute itself"): Pretrain(tmp_path, recipe="tiny-gpt", recompute=True).check_given()
    Pretrain(tmp_path, recipe="tiny-gpt", recompute=True, mesh="dp=2").check_given()
