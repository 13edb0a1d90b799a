"QLoRA: shapes, precisions, files and faults that a lesson can't show."
import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from llmbook.bert import Bert, BertConfig
from llmbook.classifying import Classifier
from llmbook.cli import main
from llmbook.corpora import BookError
from llmbook.finetuning import Plan, finetune, open_run
from llmbook.gpt import GPT, GPTConfig
from llmbook.lora import LoRAConfig, merge_adapter
from llmbook.pretrained import locate
from llmbook.qlora import Linear4bit, QLoRAModel, QuantizedGPT, bytes_by_part, halved, merged_whole, prepare_qlora, quantize_model, quantized_layers, training_bytes, whole_model
from llmbook.task_data import Completion, Labelled, read_task, write_task

SHAPES = {"gpt2": GPTConfig.gpt2(vocab_size=97, context=32, n_layer=2, n_head=2, n_embd=64), "llama": GPTConfig.llama(vocab_size=97, context=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=96)}


def model_of(kind: str = "llama") -> GPT:
    torch.manual_seed(0)
    return GPT(SHAPES[kind]).eval()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(1, 4), max_size=3), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_any_shape_gives_what_the_whole_matrix_gives(n_in, n_out, batch, bias, dtype):
    torch.manual_seed(n_in)
    layer = Linear4bit.of(nn.Linear(n_in, n_out, bias=bias))
    whole = nn.Linear(n_in, n_out, bias=bias).to(dtype)
    whole.weight.data, bias and whole.bias.data.copy_(layer.bias)
    whole.weight.data = layer.quantized.dequantize(dtype)
    xs = [torch.randn(*batch, n_in, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(True) for _ in range(2)]
    ys = [layer(xs[0]), whole(xs[1])]
    assert ys[0].dtype == dtype
    torch.testing.assert_close(*ys)
    for y in ys: y.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)          # torch sums tiny products in another order where it has a bias or a vector


def test_precision_follows_autocast_and_codes_keep_theirs():
    layer = Linear4bit.of(nn.Linear(64, 32))
    before = {k: (b.dtype, b.clone()) for k, b in layer.named_buffers()}
    with torch.autocast("cpu", torch.bfloat16): assert layer(torch.randn(2, 64)).dtype == torch.bfloat16
    layer.bfloat16().double().half()
    for k, b in layer.named_buffers(): assert b.dtype == before[k][0] and torch.equal(b, before[k][1])


@pytest.mark.parametrize("kind", SHAPES)
def test_files_bring_the_same_model_back(tmp_path, kind):
    model = quantize_model(model_of(kind))
    ids = torch.arange(12).view(2, 6)
    for prepared, name in ((model, "fp32"), (halved(copy.deepcopy(model)), "bf16")):
        prepared.save_pretrained(tmp_path / name)
        again = GPT.from_pretrained(tmp_path / name)            # the one door finds the class
        assert type(again) is QuantizedGPT and torch.equal(again(ids), prepared(ids)) and bytes_by_part(again) == bytes_by_part(prepared)
    assert list(again.generate([1, 2], 3, temperature=0)) == list(prepared.generate([1, 2], 3, temperature=0))


@pytest.mark.parametrize("harm, words", [
    (lambda t: t.pop("layers.0.mlp.up_proj.weight.absmax"), "damaged"), (lambda t: t.pop("norm.weight"), "lacks"), (lambda t: t.update(stray=torch.zeros(1)), "too many"),
    (lambda t: t.update({"layers.7.mlp.up_proj.weight.quant_state.bitsandbytes__nf4": t["layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"].clone()}), "damaged|doesn't fit"),
    (lambda t: [t.pop(k) for k in [*t] if k.startswith("layers.1.self_attn.q_proj")], "lacks")])
def test_damaged_models_are_named(tmp_path, harm, words):
    quantize_model(model_of()).save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    harm(tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(BookError, match=words): QuantizedGPT.from_pretrained(tmp_path / "m")


def test_whole_again_has_the_rounded_weights_and_nothing_is_shared():
    model = quantize_model(model_of())
    whole = whole_model(copy.deepcopy(model))
    ids = torch.arange(12).view(2, 6)
    assert type(whole) is GPT and not quantized_layers(whole) and torch.equal(whole(ids), model(ids))
    assert {n for n, _ in whole.named_parameters()} == {n for n, _ in model_of().named_parameters()}


def test_only_the_adapter_moves_and_heads_learn():
    torch.manual_seed(0)
    bert = Bert(BertConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=64, context=16), pooler=False)
    model = prepare_qlora(Classifier(bert, ["a", "b"]), rank=2)
    moved = {n for n, p in model.named_parameters() if p.requires_grad}
    assert quantized_layers(model) and all("lora_" in n or ".head." in n for n in moved) and any(".head." in n for n in moved)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if n not in moved}
    model.loss(torch.randint(50, (2, 8)), torch.ones(2, 8, dtype=torch.bool), torch.tensor([0, 1])).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert all(torch.equal(t, frozen[n]) for n, t in model.state_dict().items() if n in frozen)


def test_merging_whole_gives_the_unmerged_answers_and_leaves_it_alone():
    model = QLoRAModel(quantize_model(model_of()), LoRAConfig(2))
    for n, p in model.trained_state().items(): nn.init.normal_(p, std=0.05)
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    whole = merged_whole(model)
    torch.testing.assert_close(whole(ids), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids), before) and quantized_layers(model) and not quantized_layers(whole)
    with pytest.raises(BookError, match="quantized"): model.merge()


def test_bytes_are_those_of_the_formula():
    config = SHAPES["llama"]
    model = prepare_qlora(GPT(config), half=True, rank=4)
    parts, said = bytes_by_part(model), training_bytes(config, "qlora", 4)
    assert parts["trained"] == said["trained, fp32"]
    inside = sum(layer.quantized.numel for layer in quantized_layers(model).values())
    assert abs(parts["4-bit codes"] + parts["scales"] + parts["tables"] - said["weights"]) < 0.01 * inside + 64 * len(quantized_layers(model))


def rows_file(folder, labelled: bool):
    kept = [Labelled(text=f"the {w} said {i}", label=w) for i in range(12) for w in ("cat", "dog")] if labelled else [Completion(prompt=f"The {('cat', 'dog')[i % 2]} number {i} says:", completion=(" meow", " woof")[i % 2]) for i in range(24)]
    write_task(folder / "rows.jsonl", kept)
    return read_task(folder / "rows.jsonl")


@pytest.mark.parametrize("labelled", [False, True])
def test_a_run_is_saved_loaded_and_resumed(tmp_path, labelled):
    data = rows_file(tmp_path, labelled)
    plan = Plan(base="tiny-gpt", method="qlora", epochs=1, batch_size=8, lr=1e-3, precision="fp32", length=32, options={"rank": 2, "block": 128, "half": True})
    trainer = finetune(plan, data, tmp_path / "run", progress=False)
    model, _, task = open_run(tmp_path / "run")
    assert isinstance(model, QLoRAModel) and task["method"] == "qlora" and next(iter(quantized_layers(model).values())).block == 128
    assert json.loads((tmp_path / "run" / "best" / "quantization.json").read_text()) == {"kind": "nf4", "block": 128, "nested": True, "half": True}
    kept = trainer.step
    assert finetune(plan, data, tmp_path / "run", progress=False).step == kept
    size = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*.safetensors"))
    assert size < 4_000_000, "checkpoints hold the adapter and no base"


def test_a_base_rounded_otherwise_is_refused(tmp_path):
    finetune(Plan(base="tiny-gpt", method="qlora", epochs=0.5, batch_size=8, precision="fp32", options={"rank": 2}), rows_file(tmp_path, False), tmp_path / "run", progress=False)
    path = tmp_path / "run" / "best" / "quantization.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block": 128}))
    with pytest.raises(BookError, match="fingerprint"): open_run(tmp_path / "run")
    path.write_text("{")
    with pytest.raises(BookError, match="quantization.json"): open_run(tmp_path / "run")


@pytest.mark.parametrize("options, words", [({"kind": "nf3"}, "nf3"), ({"block": 3}, "even"), ({"rank": 0}, "rank"), ({"colour": "red"}, "colour")])
def test_wrong_options_are_named(tmp_path, options, words):
    with pytest.raises(BookError, match=words): finetune(Plan(base="tiny-gpt", method="qlora", options=options), rows_file(tmp_path, False), tmp_path / "run", progress=False)


def test_the_command_quantizes_and_what_it_made_is_used(tmp_path, capsys):
    out = str(tmp_path / "four")
    assert main(["quantize", "tiny-gpt", "--out", out]) == 0
    assert "4.1" in capsys.readouterr().out
    assert type(GPT.from_pretrained(out)) is QuantizedGPT
    assert main(["generate", "--model", out, "--prompt", "The ", "--max-new-tokens", "3", "--seed", "0"]) == 0
    rows_file(tmp_path, False)
    assert main(f"finetune --base {out} --method qlora --option rank=2 --data {tmp_path / 'rows.jsonl'} --out {tmp_path / 'run'} --epochs 0.5 --precision fp32".split()) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "rows.jsonl"), "--most", "4"]) == 0
    with pytest.raises(BookError, match="quantized"): merge_adapter(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    capsys.readouterr()
    assert main(["quantize", "tiny-gpt", "--out", out]) == 2 and main(["quantize", out, "--out", str(tmp_path / "twice")]) == 2
    said = capsys.readouterr().err
    assert "isn't empty" in said and "already" in said


def test_a_model_of_the_package_loads_as_before(): assert type(GPT.from_pretrained(locate("tiny-gpt"))) is GPT
