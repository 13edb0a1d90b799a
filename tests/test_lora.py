"""LoRA: layers, names, merging, files in peft's format, runs that keep only what they train."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import ANIMALS, LABELS, pull_the_plug, small_base
from torch import nn

from llmbook.classifying import Classifier
from llmbook.cli import main
from llmbook.corpora import BookError
from llmbook.finetuning import Plan, evaluate, fine_tuner, finetune, open_run
from llmbook.gpt import GPT, GPTConfig
from llmbook.lora import (
    LoRAConfig,
    LoRALinear,
    LoRAModel,
    find_targets,
    frozen_head_loss,
    load_lora,
    merge_adapter,
    pattern_value,
)
from llmbook.ranks import adapter_parameters, held, rank_for, singular, truncated


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base") / "model")


def alive(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n: p.copy_(torch.randn(p.shape, generator=g) / 5)
    return model


def adapted(base, *args, **kw): return alive(LoRAModel(GPT.from_pretrained(base), LoRAConfig(*args, **kw))).eval()


def plan(base, **kw): return Plan(**{**dict(base=str(base), method="lora", epochs=20, lr=2e-2, precision="fp32", share=0.25, options={"rank": 4}), **kw})


IDS = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kw,said", [(dict(rank=0), "rank=0"), (dict(rank=2.5), "rank=2.5"), (dict(alpha=0), "alpha"), (dict(dropout=1.0), "dropout"), (dict(rank=33), "at most 32"), (dict(targets="query"), "q_proj"), (dict(targets="q_(proj"), "pattern")])
def test_what_cannot_be_is_said_before_anything_is_trained(base, kw, said):
    with pytest.raises(BookError, match=said): LoRAModel(GPT.from_pretrained(base), LoRAConfig(**kw))


@pytest.mark.parametrize("targets,n", [("all-linear", 14), ("q_proj", 2), ("q_proj,v_proj", 4), (["self_attn.o_proj"], 2), (r"layers\.1\..*_proj", 7), ("layers.0.mlp.up_proj", 1)])
def test_modules_are_found_by_names_and_patterns(base, targets, n):
    model = GPT.from_pretrained(base)
    assert len(find_targets(model, targets)) == n
    adapter = LoRAModel(model, LoRAConfig(2, targets=targets))
    assert len(adapter.layers_with) == n and find_targets(model, targets) == list(adapter.layers_with), "wrapped layers keep their names"
    assert all("lora_" in k for k in adapter.trained_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_and_unmerging(base, dtype):
    model = alive(LoRAModel(GPT.from_pretrained(base, dtype), LoRAConfig(4, 3, rank_stabilized=True))).eval()
    start, seen = {n: p.clone() for n, p in model.named_parameters()}, model(IDS)
    model.merge()
    model.merge()
    torch.testing.assert_close(model(IDS), seen, atol=1e-4, rtol=1e-4)
    with pytest.raises(BookError, match="unmerge"): model.use()
    model.unmerge()
    for n, p in model.named_parameters(): torch.testing.assert_close(p, start[n], atol=0 if dtype == torch.float64 else 1e-6, rtol=0)


def test_adapters_are_switched_and_add_up(base):
    model = adapted(base, 2)
    one = model(IDS)
    model.add("other", LoRAConfig(3, targets="v_proj"))
    assert set(model.trained_state()) == {n for n, _ in model.named_parameters() if n.endswith(".other")}
    alive(model, 7)
    model.use()
    assert torch.equal(model(IDS), GPT.from_pretrained(base)(IDS)), "without adapters it is the base"
    model.use("default", "other")
    assert not torch.allclose(model(IDS), one)
    with pytest.raises(BookError, match="already"): model.add("other", LoRAConfig(2))
    with pytest.raises(BookError, match="default, other"): model.use("third")
    with pytest.raises(BookError, match="say which"): model.save_pretrained("nowhere")


class Quantized(nn.Module):
    "A layer that keeps codes."
    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("codes", (layer.weight * 1000).round().to(torch.int16))
    @property
    def weight(self): return self.codes.float() / 1000
    def forward(self, x): return x @ self.weight.T


def test_a_quantized_base_carries_adapters_and_refuses_to_merge(base):
    model = GPT.from_pretrained(base)
    model.layers[0].mlp.up_proj = Quantized(model.layers[0].mlp.up_proj)
    model = alive(LoRAModel(model, LoRAConfig(2)))
    before = {n: p.clone() for n, p in model.named_parameters()}
    model(IDS).sum().backward()
    assert model.base.layers[0].mlp.up_proj.lora_A["default"].grad.abs().sum() > 0
    with pytest.raises(BookError, match="Quantized.*quantized"): model.merge()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "nothing was changed"


def test_cast_weights_follow_the_base():
    layer = LoRALinear(nn.Linear(6, 4).requires_grad_(False))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(x)
        with torch.no_grad(): layer.base.weight.mul_(2)
        assert torch.equal(layer(x), layer.base(x)) and not torch.equal(layer(x), first)


@pytest.mark.parametrize("n", [1, 127, 300])
def test_a_frozen_head_gives_the_loss_and_its_gradient(n):
    g = torch.Generator().manual_seed(n)
    x, W, y = torch.randn(n, 16, generator=g).requires_grad_(), torch.randn(90, 16, generator=g), torch.randint(90, (n,), generator=g)
    plain = nn.functional.cross_entropy(x @ W.T, y)
    (want,) = torch.autograd.grad(plain * 3, x)
    loss = frozen_head_loss(x, W, y)
    (got,) = torch.autograd.grad(loss * 3, x)
    torch.testing.assert_close(loss, plain), torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kw", [dict(), dict(targets="q_proj,v_proj", alpha=5.0), dict(rank_stabilized=True), dict(targets=r"layers\.1\..*")], ids=str)
@pytest.mark.parametrize("kind", [GPTConfig.gpt2, GPTConfig.llama], ids=["gpt2", "llama"])
def test_a_saved_adapter_comes_back(kind, kw, tmp_path):
    torch.manual_seed(0)
    shape = kind(vocab_size=300, context=32, n_layer=2, n_head=2, n_embd=16)
    GPT(shape).save_pretrained(tmp_path / "base")
    model = alive(LoRAModel(GPT.from_pretrained(tmp_path / "base"), LoRAConfig(3, **kw))).eval()
    model.save_pretrained(tmp_path / "a")
    back = load_lora(tmp_path / "a", str(tmp_path / "base"))
    torch.testing.assert_close(back(IDS), model(IDS))
    back.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(load_lora(tmp_path / "b", str(tmp_path / "base"))(IDS), model(IDS))


def spoiled(base, folder, change=lambda weights: None, **config):
    adapted(base, 4).save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return folder


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize("change,config,said", [
    (lambda w: w.update({KEY: torch.zeros(4, 31)}), {}, r"another shape.*\(4, 31\), not \(4, 32\)"), (lambda w: w.update({KEY: torch.zeros(3, 32)}), {}, "another shape"), (lambda w: w.pop(KEY), {}, "no pair"),
    (lambda w: w.pop(KEY.replace("_A", "_B")), {}, "lacks the B"), (lambda w: w.update({"base_model.model.x": torch.zeros(1)}), {}, "no pair"),
    (lambda w: [w.update({k.replace("layers.1", "layers.9"): w.pop(k)}) for k in list(w) if "layers.1" in k], {}, "layers.9"),
    (lambda w: None, {"use_dora": True}, "DoRA"), (lambda w: None, {"bias": "all"}, "biases"), (lambda w: None, {"r": 0}, "rank"), (lambda w: None, {"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING")])
def test_a_file_that_does_not_fit_is_refused_whole(base, tmp_path, change, config, said):
    folder, model = spoiled(base, tmp_path / "a", change, **config), LoRAModel(GPT.from_pretrained(base))
    with pytest.raises(BookError, match=said): model.load(folder)
    assert not model.layers_with and not model.configs, "nothing was wrapped"


def test_another_base_is_refused_by_hash(base, tmp_path):
    adapted(base, 2).save_pretrained(tmp_path / "a")
    torch.manual_seed(5)
    GPT(GPT.from_pretrained(base).config).save_pretrained(tmp_path / "other")
    with pytest.raises(BookError, match="fingerprint [0-9a-f]{12}.*[0-9a-f]{12}"): load_lora(tmp_path / "a", str(tmp_path / "other"))


def test_patterns_of_peft():
    assert pattern_value({"c_attn": 9}, "transformer.h.0.attn.c_attn", 3) == 9 == pattern_value({r"h\.0.*": 9}, "transformer.h.0.attn.c_attn", 3) and pattern_value({"attn": 9}, "h.0.attn.c_attn", 3) == 3


def test_a_run_keeps_what_it_trains_goes_on_exactly_and_is_merged(base, tmp_path, capsys):
    kw = dict(progress=False, checkpoint_every=5, steps=16)
    whole = finetune(plan(base, options={"rank": 4, "dropout": 0.2}), ANIMALS, tmp_path / "whole", **kw)
    broken = fine_tuner(plan(base, options={"rank": 4, "dropout": 0.2}), ANIMALS, tmp_path / "broken", **kw)
    pull_the_plug(broken, 8)
    resumed = finetune(plan(base, options={"rank": 4, "dropout": 0.2}), ANIMALS, tmp_path / "broken", **kw)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(a, b)
    kept = load_file(next((tmp_path / "whole" / "checkpoints").glob("step-*/model.safetensors")))
    assert kept.keys() == whole.model.trained_state().keys() and all("lora_" in k for k in kept)
    start = dict(GPT.from_pretrained(base).named_parameters())
    assert all(torch.equal(l.base.weight, start[f"{n}.weight"]) for n, l in whole.model.layers_with.items()), "the base stayed as it was"
    assert main(["merge", str(tmp_path / "whole"), "--out", str(tmp_path / "merged")]) == 0 and "weights" in capsys.readouterr().out
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "merged")(IDS), open_run(tmp_path / "whole")[0](IDS), atol=1e-4, rtol=1e-4)
    assert main(["generate", "--model", str(tmp_path / "merged"), "--prompt", "The cat", "--max-new-tokens", "3"]) == 0


def test_a_run_whose_base_was_changed_does_not_go_on(base, tmp_path):
    GPT.from_pretrained(base).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    finetune(plan(tmp_path / "base"), ANIMALS, tmp_path / "run", progress=False, steps=2)
    model = GPT.from_pretrained(tmp_path / "base")
    with torch.no_grad(): model.norm.weight.add_(0.1)
    (tmp_path / "base" / "model.safetensors").unlink()
    save_file(dict(model.named_parameters()), tmp_path / "base" / "model.safetensors")
    with pytest.raises(BookError, match="base_hash"): finetune(plan(tmp_path / "base"), ANIMALS, tmp_path / "run", progress=False, steps=2)
    with pytest.raises(BookError, match="fingerprint"): evaluate(tmp_path / "run", ANIMALS)


def test_a_classifier_learns_by_lora_and_keeps_its_head(base, tmp_path):
    for name in (str(base), "tiny-bert"):
        run = tmp_path / name.replace("/", "-")
        done = finetune(plan(name, epochs=12, lr=5e-3), LABELS, run, progress=False)
        assert {"head" in n or "lora_" in n for n in done.model.trained_state()} == {True}
        opened, _, _ = open_run(run)
        assert opened.labels == ["meow", "woof"] and evaluate(run, LABELS)["accuracy"][0] > 0.9
        whole = merge_adapter(run, run / "merged")
        assert isinstance(whole, Classifier) and json.loads((run / "merged" / "config.json").read_text())["model_type"] == "llmbook-classifier"


@pytest.mark.parametrize("args,said", [(["merge", "{tmp}/none", "--out", "{tmp}/x"], "no adapter"), (["merge", "{tmp}/a", "--out", "{tmp}/x"], "--base"), (["finetune", "--base", "{base}", "--method", "lora", "--option", "rank=900", "--data", "{tmp}/d.jsonl", "--out", "{tmp}/r"], "at most"),
                                       (["finetune", "--base", "{base}", "--method", "lora", "--option", "rnak=9", "--data", "{tmp}/d.jsonl", "--out", "{tmp}/r"], "rnak")])
def test_faults_on_the_command_line(base, tmp_path, capsys, args, said):
    adapted(base, 2).save_pretrained(tmp_path / "a")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r.model_dump(exclude_none=True)) + "\n" for r in ANIMALS.rows))
    assert main([a.format(tmp=tmp_path, base=base) for a in args]) == 2
    assert said in capsys.readouterr().err


def test_peft_reads_and_writes_the_same_files(base, tmp_path):
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    ours = alive(LoRAModel(GPT.from_pretrained(tmp_path / "gpt2"), LoRAConfig(2, targets="q_proj,v_proj,o_proj")))
    ours.save_pretrained(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "b")
    assert load_file(tmp_path / "b" / "adapter_model.safetensors").keys() == load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    back = LoRAModel(GPT.from_pretrained(tmp_path / "gpt2"))
    back.load(tmp_path / "b")
    torch.testing.assert_close(back(IDS), ours(IDS), atol=1e-5, rtol=1e-5)


def test_ranks_and_counts():
    torch.manual_seed(0)
    low = torch.randn(20, 3) @ torch.randn(3, 9)
    values, _ = singular(low)
    assert rank_for(values, 0.999999) == 3 and held(values)[2] == pytest.approx(1)
    torch.testing.assert_close(truncated(low, 3), low, atol=1e-4, rtol=1e-4), torch.testing.assert_close(truncated(low.T, 3), low.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values, torch.linalg.svdvals(low.double()), atol=1e-6, rtol=1e-6)
    config = GPTConfig.llama(vocab_size=9, context=4, n_layer=3, n_head=2, n_kv_head=1, n_embd=8, n_inner=12)
    assert adapter_parameters(config, 2, ["q_proj", "k_proj"]) == 3 * 2 * (16 + 12)
    for rank, targets, said in ((0, "all-linear", "choose 1 to 4"), (5, ["k_proj"], "choose 1 to 4"), (2, ["query"], "a matrix 'query'")):
        with pytest.raises(BookError, match=said): adapter_parameters(config, rank, targets)
