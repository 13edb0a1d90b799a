"""Adapter files: a base known by its fingerprint, peft's two files, low-rank pairs in fused matrices."""
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.adapters import CONFIG, WEIGHTS, base_tensors, check_base, family, fingerprint, fuse, read_adapter, their_name, to_ours, to_theirs, write_adapter
from llmbook.classifying import Classifier
from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig

SIZES = dict(vocab_size=50, context=16, n_layer=2, n_head=2, n_embd=8)


def small(seed=0, kind=GPTConfig.gpt2, **kw):
    torch.manual_seed(seed)
    return GPT(kind(**SIZES, **kw))


def test_a_fingerprint_is_the_same_in_every_process():
    code = f"import torch\nfrom llmbook.gpt import GPT, GPTConfig\nfrom llmbook.adapters import fingerprint\ntorch.manual_seed(0)\nprint(fingerprint(GPT(GPTConfig.gpt2(**{SIZES}))))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == fingerprint(small())


def test_a_fingerprint_sees_values_names_kinds_and_nothing_else():
    a = small()
    assert fingerprint(a) == fingerprint(a.eval().requires_grad_(False)) != fingerprint(small(1)) and fingerprint(a) != fingerprint(small().double())
    assert fingerprint(Classifier(a, ["x", "y"])) == fingerprint(a), "the head isn't the base's"
    a.layers[0].register_buffer("codes", torch.zeros(3, dtype=torch.uint8))
    assert "layers.0.codes" in base_tensors(a) and fingerprint(a) != fingerprint(small()), "quantized codes count"
    with pytest.raises(BookError, match=f"{fingerprint(small())[:12]}.*{fingerprint(a)[:12]}"): check_base(a, fingerprint(small()), "mine")
    check_base(a, None)


def test_an_adapter_is_written_and_read(tmp_path):
    weights = {"base_model.model.x.lora_A.weight": torch.randn(2, 3).T}
    write_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2}, weights, "tiny-gpt", "ab" * 32)
    config, found, base_hash = read_adapter(tmp_path / "a", "LORA")
    assert config["r"] == 2 and config["base_model_name_or_path"] == "tiny-gpt" and base_hash == "ab" * 32
    assert found.keys() == weights.keys() and all(torch.equal(found[k], w) for k, w in weights.items())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS], "nothing is left beside them"


@pytest.mark.parametrize("spoil,said", [
    (lambda f: (f / CONFIG).unlink(), "no adapter"), (lambda f: (f / CONFIG).write_text("{"), "damaged"), (lambda f: (f / CONFIG).write_text("[]"), "damaged"),
    (lambda f: (f / CONFIG).write_text('{"peft_type": "IA3"}'), "IA3"), (lambda f: (f / WEIGHTS).unlink(), "missing"), (lambda f: (f / WEIGHTS).write_bytes(b"abc"), "damaged"),
    (lambda f: ((f / WEIGHTS).unlink(), torch.save({}, f / "adapter_model.bin")), "adapter_model.bin is a pickle"), (lambda f: torch.save({}, f / WEIGHTS), "is a pickle"), (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({})), "is a pickle"),
    (lambda f: ((f / WEIGHTS).unlink(), (f / "adapter_model.bin").write_bytes(b"")), "missing"), (lambda f: (f / WEIGHTS).write_bytes(b""), "damaged")])
def test_what_is_wrong_with_a_file_is_said_in_a_sentence(tmp_path, spoil, said):
    write_adapter(tmp_path, {"peft_type": "LORA"}, {"x": torch.zeros(1)}, "b", "00")
    spoil(tmp_path)
    with pytest.raises(BookError, match=said): read_adapter(tmp_path, "LORA")


def test_a_file_is_no_folder(tmp_path):
    write_adapter(tmp_path, {"peft_type": "LORA"}, {"x": torch.zeros(1)}, "b", "00")
    with pytest.raises(BookError, match="is a file, and an adapter is a folder"): read_adapter(tmp_path / WEIGHTS, "LORA")
    torch.save({}, tmp_path / "whole.pt")
    with pytest.raises(BookError, match="whole.pt is a pickle"): read_adapter(tmp_path / "whole.pt", "LORA")


@settings(max_examples=40, deadline=None)
@given(ranks=st.dictionaries(st.sampled_from([0, 1, 2]), st.integers(1, 4), min_size=1), shared=st.booleans(), seed=st.integers(0, 99))
def test_a_fused_pair_adds_what_its_parts_add(ranks, shared, seed):
    g, D, C = torch.Generator().manual_seed(seed), 5, 7
    same = torch.randn(3, C, generator=g)
    thirds = {i: (same if shared else torch.randn(r, C, generator=g), torch.randn(D, 3 if shared else r, generator=g)) for i, r in ranks.items()}
    A, B = fuse(thirds)
    assert len(A) == (3 if shared else sum(ranks.values()))
    for i, part in enumerate((B @ A).chunk(3)): torch.testing.assert_close(part, thirds[i][1] @ thirds[i][0] if i in thirds else torch.zeros(D, C))


def test_pairs_go_there_and_back():
    names = [f"layers.1.self_attn.{p}_proj" for p in "qkvo"] + ["layers.0.mlp.up_proj"]
    pairs = {n: (torch.randn(2, 4), torch.randn(4, 2)) for n in names}
    back = to_ours(to_theirs(pairs, "gpt2"), names, "gpt2")
    assert back.keys() == pairs.keys()
    for n in names: torch.testing.assert_close(back[n][1] @ back[n][0], pairs[n][1] @ pairs[n][0])
    with pytest.raises(BookError, match="h.1.attn.c_attn"): to_ours(to_theirs(pairs, "gpt2"), names[3:], "gpt2")
    with pytest.raises(BookError, match="embed_tokens"): their_name("embed_tokens", "gpt2")


def test_families():
    assert family(small().config) == "gpt2" and family(small(kind=GPTConfig.llama).config) == "llama" and family(small(norm="rmsnorm").config) == "" and family(object()) == ""
    assert family(small(n_kv_head=1).config) == "", "GPT-2's code has no grouped queries"
