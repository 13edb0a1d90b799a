"""Prompts and prefixes: what is refused, what a file and a checkpoint hold, that a broken run ends alike, and shapes of every kind."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shared import ANIMALS, LABELS, pull_the_plug, small_base

from llmbook.bert import Bert, BertConfig
from llmbook.checkpointing import newest_checkpoint
from llmbook.cli import main
from llmbook.corpora import BookError
from llmbook.finetuning import METHODS, Plan, evaluate, fine_tuner, finetune, method_named, open_run
from llmbook.gpt import GPT, GPTConfig
from llmbook.prompt_tuning import (
    GrowingCache,
    PrefixTuning,
    ProjectedPrefix,
    PromptTuning,
    activations,
    first_vectors,
    load_virtual,
    pack,
    prefix_model,
    prefix_width,
    prompt_model,
    side_by_side,
    unpack,
)

OPTIONS = {"prompt": dict(method="prompt", options={"tokens": 4}), "prefix": dict(method="prefix", options={"tokens": 4}), "MLP": dict(method="prefix", lr=1e-2, options={"tokens": 4, "hidden": 8})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base") / "model", n_head=4, n_kv_head=2)


@pytest.fixture
def base(folder): return GPT.from_pretrained(folder)


def plan(folder, **kw): return Plan(**{**dict(base=str(folder), epochs=8, lr=0.1, precision="fp32", share=0.25), **kw})


@pytest.mark.parametrize("how", OPTIONS)
def test_a_run_learns_and_touches_nothing_of_the_base(folder, base, tmp_path, how):
    done = finetune(plan(folder, **OPTIONS[how]), ANIMALS, tmp_path / "run", progress=False, eval_every=1000)
    losses = [r["valid_loss"] for r in done.history if "valid_loss" in r]
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), done.model.base.parameters()))
    model, _, _ = open_run(tmp_path / "run")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids), done.model.eval()(ids)), "what is kept is what was trained, the MLP dropped"
    assert type(model) in (PromptTuning, PrefixTuning) and len(list(model.generate([5, 6], 3))) == 3
    assert evaluate(tmp_path / "run", ANIMALS)["loss"].value < losses[0]
    held = load_file(newest_checkpoint(tmp_path / "run" / "checkpoints") / "model.safetensors")
    assert not any(name.startswith("base") for name in held), "a checkpoint holds what is trained"


@pytest.mark.parametrize("how", OPTIONS)
def test_a_broken_run_goes_on_and_ends_alike(folder, tmp_path, how):
    p = plan(folder, epochs=4, **OPTIONS[how])
    whole = finetune(p, ANIMALS, tmp_path / "whole", progress=False, checkpoint_every=3)
    broken = fine_tuner(p, ANIMALS, tmp_path / "broken", progress=False, checkpoint_every=3)
    pull_the_plug(broken, 5)
    again = finetune(p, ANIMALS, tmp_path / "broken", progress=False, checkpoint_every=3)
    for name, t in whole.model.trained_state().items(): assert torch.equal(t, again.model.trained_state()[name]), name


def test_the_command_line(folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(r.model_dump_json(exclude_none=True) for r in ANIMALS.rows))
    for method in ("prompt", "prefix"):
        run = tmp_path / method
        command = ["finetune", "--base", str(folder), "--data", str(rows), "--out", str(run), "--method", method, "--option", "tokens=3", "init=text", "text=Say what it says.", "--epochs", "1", "--lr", "0.1", "--precision", "fp32"]
        assert not main(command)
        assert json.loads((run / "best" / "adapter_config.json").read_text())["num_virtual_tokens"] == 3
        assert not main(["evaluate", str(run), "--data", str(rows)])
    assert "loss" in capsys.readouterr().out
    assert main([*command[:-6], "tokens=3", "colour=red", "--out", str(tmp_path / "x")]) != 0
    assert "can't be told that" in capsys.readouterr().err


SENTENCES = {
    "none": (lambda b: prompt_model(b, 0), "has room for 1 to 63"), "too many": (lambda b: prefix_model(b, 64), "has room for 1 to 63"), "not whole": (lambda b: prompt_model(b, 2.5), "tokens=2.5"),
    "unknown beginning": (lambda b: prompt_model(b, 4, "zeros"), "choose vocabulary, text or random"), "no text": (lambda b: prefix_model(b, 4, "text"), "needs one"),
    "MLP and text": (lambda b: prefix_model(b, 4, text="Hi", hidden=4), "begins at random"), "no width": (lambda b: ProjectedPrefix(b, 4, -1), "hidden=-1"),
    "an encoder": (lambda b: prompt_model(Bert(BertConfig(vocab_size=50, context=16, n_layer=1, n_head=2, n_embd=8))), "a decoder"),
    "rows shared": (lambda b: prompt_model(b, 4)(torch.ones(1, 3, dtype=torch.long), documents=torch.zeros(1, 3, dtype=torch.long)), "one text a row"),
    "two lengths": (lambda b: side_by_side([prompt_model(b, 4), prompt_model(b, 5)]), "the same number"),
    "no room for the text": (lambda b: list(prompt_model(b, 60).generate([1, 2, 3], 2)), "context of 4"),
}


@pytest.mark.parametrize("doing, said", SENTENCES.values(), ids=SENTENCES)
def test_bad_input_is_a_sentence(base, doing, said):
    with pytest.raises(BookError, match=said) as e: doing(base)
    assert "\n" not in str(e.value)


def test_rows_with_labels_and_rows_that_are_too_long_are_refused(folder, tmp_path):
    with pytest.raises(BookError, match="prompt and a completion"): finetune(plan(folder, method="prefix"), LABELS, tmp_path / "a", progress=False)
    with pytest.raises(BookError, match="length=64 is more than the 60"): finetune(plan(folder, method="prompt", options={"tokens": 4}, length=64), ANIMALS, tmp_path / "b", progress=False)
    assert fine_tuner(plan(folder, method="prompt", options={"tokens": 60}), ANIMALS, tmp_path / "c", progress=False).config.context <= 4, "rows are cut to what the prompt leaves"


def damaged(saved, how):
    "A folder with one fault."
    config, weights = json.loads((saved / "adapter_config.json").read_text()), load_file(saved / "adapter_model.safetensors")
    if how == "shape": weights = {k: w[:, :-1].contiguous() for k, w in weights.items()}
    if how == "rows": config["num_virtual_tokens"] += 1
    if how == "nothing said": del config["num_virtual_tokens"]
    if how == "name": weights = {"prompt": weights["prompt_embeddings"]}
    if how == "kind": config["peft_type"] = "LORA"
    (saved / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, saved / "adapter_model.safetensors")
    if how == "pickle": (saved / "adapter_model.safetensors").unlink(), torch.save(weights, saved / "adapter_model.bin")
    if how == "cut off": (saved / "adapter_model.safetensors").write_bytes(b"no")


@pytest.mark.parametrize("make", [prompt_model, prefix_model])
@pytest.mark.parametrize("how, said", [("shape", "another shape"), ("rows", "another shape"), ("nothing said", "tokens=None"), ("name", "lacks prompt_embeddings"), ("kind", "kind LORA"), ("pickle", "pickle"), ("cut off", "damaged")])
def test_a_damaged_file_is_a_sentence(base, tmp_path, make, how, said):
    model = make(base, 4)
    model.save_pretrained(tmp_path / "a")
    damaged(tmp_path / "a", how)
    with pytest.raises(BookError, match=said): load_virtual(tmp_path / "a", base, model.kind)


def test_another_base_is_named_by_its_hash(base, tmp_path):
    model = prompt_model(base, 4)
    model.save_pretrained(tmp_path / "a")
    torch.manual_seed(1)
    with pytest.raises(BookError, match=model.base_hash[:12]): load_virtual(tmp_path / "a", GPT(base.config), model.kind)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.sampled_from([(4, None), (4, 2), (2, 1)]), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_prefixes_of_every_shape(n_layer, heads, tokens, rows, llama):
    family = GPTConfig.llama if llama else GPTConfig.gpt2
    base = GPT(family(vocab_size=40, context=24, n_layer=n_layer, n_head=heads[0], n_kv_head=heads[1], n_embd=16)).eval()
    flat = torch.randn(tokens, prefix_width(base.config))
    assert torch.equal(pack(unpack(flat, base.config)), flat)
    ids = torch.randint(40, (rows, 7))
    for model in (PrefixTuning(base, flat), PromptTuning(base, torch.randn(tokens, 16))):
        out = model(ids)
        assert out.shape == (rows, 7, 40)
        torch.testing.assert_close(model(ids[:, :4]), out[:, :4], atol=1e-4, rtol=0)     # what stands behind, filling too, changes nothing
        cache = model.new_cache(rows, 7)
        with torch.no_grad(): parts = torch.cat([model(ids[:, :3], cache), model(ids[:, 3:], cache)], 1)
        torch.testing.assert_close(parts, out, atol=1e-4, rtol=0)


@given(st.integers(1, 30), st.integers(1, 12))
def test_a_text_is_cut_or_said_again(folder_tokens, length):
    class Words:
        def encode(self, text): return list(range(length))
    base = GPT(GPTConfig.gpt2(vocab_size=40, context=64, n_layer=1, n_head=1, n_embd=4))
    got = first_vectors(base, folder_tokens, "text", "said", Words())
    assert torch.equal(got, base.embed_tokens.weight[[i % length for i in range(folder_tokens)]].detach())


@pytest.mark.parametrize("make", [prompt_model, prefix_model])
def test_sixteen_bits(base, make):
    model, ids = make(base, 4), torch.randint(280, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16): loss = model.loss(ids, ids.roll(-1, 1))
    loss.backward()
    assert abs(loss - model.loss(ids, ids.roll(-1, 1))) < 0.05 and model.flat().grad.isfinite().all() and model.flat().grad.abs().sum() > 0


def test_the_methods_are_known():
    assert method_named("prompt") is METHODS["prompt"] and method_named("prefix").lr > 1e-2


def test_an_empty_cache_that_grows_is_no_cache(base):
    ids = torch.randint(280, (2, 9))
    assert torch.equal(base(ids, GrowingCache()), base(ids))
    assert activations(base, base.embed_tokens.weight[:3]).shape == (3, prefix_width(base.config))
