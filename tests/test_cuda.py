"On a GPU: the same numbers as on the processor, bitsandbytes' kernels and paged optimizer, NCCL. All of it is skipped where torch sees no GPU."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmbook.bert import Bert, BertConfig, BertForPreTraining
from llmbook.cli import main
from llmbook.corpora import BookError, write_stream
from llmbook.finetuning import Plan, evaluate, finetune
from llmbook.gpt import GPT, GPTConfig
from llmbook.loop import TrainConfig, find_device
from llmbook.objectives import objective
from llmbook.paging import paged_adamw
from llmbook.pretraining import SPECIAL
from llmbook.qlora import quantize_model
from llmbook.quantization import quantize_4bit
from llmbook.tokenization import BPETokenizer
from llmbook.training import Trainer
from llmbook.xlnet import XLNet, XLNetConfig, XLNetLM
from shared import ANIMALS, LABELS, small_base

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

SHAPE = dict(vocab_size=280, context=32, n_layer=2, n_head=2, n_embd=64)
FAMILIES = {
    "gpt2": (lambda: GPT(GPTConfig.gpt2(**SHAPE)), "next-word"),
    "llama": (lambda: GPT(GPTConfig.llama(**SHAPE)), "next-word"),
    "bert": (lambda: BertForPreTraining(Bert(BertConfig(vocab_size=280, context=32, n_layer=2, n_head=2, n_embd=64, dropout=0.0), pooler=False)), "masked-word"),
    "xlnet": (lambda: XLNetLM(XLNet(XLNetConfig(vocab_size=280, n_layer=2, n_head=2, n_embd=64, dropout=0.0))), "permutation"),
}


TEXT = "\n\n".join(f"The cat number {i} says meow. The dog number {i} says woof." for i in range(2800))
SMALL = ["--vocab-size", "280", "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--context", "32", "--steps", "20", "--precision", "fp32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory): return small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    "A tokenizer and its tokens."
    texts = ["The cat number 1 says meow, and the dog number 2 says woof. " * 40] * 20
    tokenizer = BPETokenizer.train(texts, 280, special=SPECIAL, progress=False)
    return tokenizer, write_stream(tmp_path_factory.mktemp("stream") / "s", texts, tokenizer.encode, tokenizer.special[SPECIAL[0]], 280, progress=False)


def trainer_of(kind, text, folder, device, **settings):
    "Twelve steps, before the first one."
    torch.manual_seed(0)
    (make, asked), (tokenizer, stream) = FAMILIES[kind], text
    return Trainer(make().to(device), TrainConfig(**{**dict(steps=12, batch_size=8, context=32, precision="fp32", eval_every=6), **settings}), stream, stream, folder, tokenizer, False, objective(asked, tokenizer))


def trained(*what, **settings):
    trainer = trainer_of(*what, **settings)
    trainer.fit()
    return trainer


def losses(trainer): return torch.tensor([row["loss"] for row in trainer.history if "loss" in row])


def test_a_device_that_is_not_there_is_one_sentence():
    for name, said in (("tpu", "no device"), ("cuda:x", "no device"), ("cuda:64", "torch sees")):
        with pytest.raises(BookError, match=said): find_device(name)
    assert find_device("cpu").type == "cpu" and find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@on_gpu
@pytest.mark.parametrize("kind", FAMILIES)
def test_families_learn_as_on_the_processor(kind, text, tmp_path):
    "fp32 sums are taken in another order there, and twelve steps of AdamW carry the difference on."
    there, here = (losses(trained(kind, text, tmp_path / d, d)) for d in ("cuda", "cpu"))
    torch.testing.assert_close(there, here, rtol=2e-3, atol=2e-3)


@on_gpu
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
def test_sixteen_bits_stay_near_thirty_two(precision, text, tmp_path):
    narrow, wide = (losses(trained("llama", text, tmp_path / p, "cuda", precision=p)) for p in (precision, "fp32"))
    torch.testing.assert_close(narrow, wide, rtol=0.03, atol=0.03)


@on_gpu
@pytest.mark.parametrize("settings", [{}, {"optimizer": "paged-adamw"}, {"optimizer": "muon"}, {"recompute": True}, {"compile": True}], ids=str)
def test_a_run_goes_on_bit_for_bit(settings, text, tmp_path):
    "A compiled backward pass adds up the gradients of embeddings in the order in which threads arrive, so its last bits differ from run to run."
    whole = trained("llama", text, tmp_path / "whole", "cuda", **settings)
    for stop in (5, None):
        trainer = trainer_of("llama", text, tmp_path / "parts", "cuda", **settings)
        trainer.told_to_stop = lambda asked, trainer=trainer, stop=stop: trainer.step == stop and not asked.append(True)
        trainer.fit()
        torch.manual_seed(99)
    exact = {} if settings.get("compile") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(losses(trainer), losses(whole), **exact)
    if exact: torch.testing.assert_close(list(trainer.model.parameters()), list(whole.model.parameters()), **exact)


@on_gpu
def test_tokens_are_those_of_the_processor(base):
    model = GPT.from_pretrained(base)
    here = list(model.generate([1, 2, 3], 40, temperature=0))
    assert list(model.to("cuda").generate([1, 2, 3], 40, temperature=0)) == here


@on_gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_on_a_gpu_are_those_of_the_processor_and_nearly_bitsandbytes(kind, block, dtype):
    "NF4's codes are its CUDA kernel's. FP4's, and the codes of nested scales, are its CPU kernel's: its two kernels differ where a number lies about halfway between two levels."
    bnb = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(block)).to(dtype)
    here, there, (codes, state) = quantize_4bit(x, kind, block, nested=False), quantize_4bit(x.cuda(), kind, block, nested=False), bnb.quantize_4bit(x.cuda(), blocksize=block, quant_type=kind)
    assert there.codes.is_cuda and torch.equal(there.codes.cpu(), here.codes) and torch.equal(there.scales.cpu(), here.scales) and torch.equal(there.scales, state.absmax)
    off = (there.codes != codes.view(-1)).float().mean()
    assert off == 0 if kind == "nf4" else off < 0.01
    nested_scales, (_, theirs) = quantize_4bit(x.cuda(), kind, block, nested=True).scales, bnb.quantize_4bit(x.cuda(), blocksize=block, quant_type=kind, compress_statistics=True)
    print("differ", kind, block, dtype, float(off), float((nested_scales.codes != theirs.absmax).float().mean()))
    assert ((nested_scales.codes.int() - theirs.absmax.int()).abs() <= 1).all()
    torch.testing.assert_close(nested_scales.values(), bnb.dequantize_blockwise(theirs.absmax, theirs.state2) + theirs.offset, rtol=0.02, atol=float(there.scales.std()) / 20)
    if kind == "nf4": torch.testing.assert_close(there.dequantize(), bnb.dequantize_4bit(codes, state), rtol=0, atol=0)


@on_gpu
def test_paged_states_are_bitsandbytes_and_step_as_adamw():
    pytest.importorskip("bitsandbytes")
    models = [GPT(GPTConfig.llama(**{**SHAPE, "n_embd": 512, "n_inner": 1024})).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    paged = paged_adamw(models[0], lr=1e-3)
    plain = torch.optim.AdamW([{"params": g["params"], "weight_decay": g["weight_decay"]} for g in paged_adamw(models[1], lr=1e-3).param_groups], lr=1e-3, betas=(0.9, 0.95), eps=paged.param_groups[0]["eps"])
    ids = torch.randint(280, (8, 33), generator=torch.Generator().manual_seed(0)).cuda()
    for _ in range(20):
        for model, optimizer in zip(models, (paged, plain)):
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step(), optimizer.zero_grad()
    assert any(getattr(state["state1"], "is_paged", False) for state in paged.state.values()), "no state is paged"
    for a, b in zip(*(m.parameters() for m in models)): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prompt", "prefix"])
def test_every_method_learns_and_is_opened_anywhere(method, base, tmp_path):
    plan = Plan(base=str(base), method=method, epochs=6, batch_size=4, lr=3e-2 if method in ("prompt", "prefix") else 3e-3, share=0.3, device="cuda")
    trainer = finetune(plan, ANIMALS, tmp_path / "run", progress=False)
    assert trainer.device.type == "cuda"
    seen = [row["valid_loss"] for row in trainer.history if "valid_loss" in row]
    assert min(seen) < seen[0]
    there, here = (evaluate(tmp_path / "run", ANIMALS, device=d) for d in ("cuda", "cpu"))
    assert abs(there["loss"][0] - here["loss"][0]) < 0.02


@on_gpu
def test_a_classifier_learns_and_says_the_same_anywhere(base, tmp_path):
    finetune(Plan(base=str(base), epochs=4, lr=1e-3, share=0.3, balance=True, device="cuda"), LABELS, tmp_path / "run", progress=False)
    there, here = (evaluate(tmp_path / "run", LABELS, device=d) for d in ("cuda", "cpu"))
    assert there["confusion"] == here["confusion"] or there["accuracy"][0] == pytest.approx(here["accuracy"][0], abs=0.05)


@on_gpu
def test_a_four_bit_model_gives_one_text_anywhere(base):
    model = quantize_model(GPT.from_pretrained(base))
    ids = torch.tensor([[1, 2, 3, 4]])
    here = model(ids)
    torch.testing.assert_close(model.to("cuda")(ids.cuda()).cpu(), here, rtol=1e-3, atol=1e-3)


@on_gpu
def test_the_command_line_takes_the_gpu(tmp_path, capsys):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    (tmp_path / "text.txt").write_text(TEXT)
    main(["pretrain", *SMALL, "--data", str(tmp_path / "text.txt"), "--run-dir", str(tmp_path / "run")])
    main(["generate", "--model", str(tmp_path / "run" / "model"), "--prompt", "The cat", "--max-new-tokens", "5"])
    said = capsys.readouterr()
    assert "validation loss" in said.out, said.err
    assert torch.cuda.max_memory_allocated() > before


@on_gpu
def test_the_engine_joins_nccl_under_torchrun(tmp_path):
    "One GPU is one rank: all collectives run through NCCL, and the losses are those of a run without a mesh."
    (tmp_path / "text.txt").write_text(TEXT)
    common = ["-m", "llmbook", "pretrain", *SMALL, "--data", str(tmp_path / "text.txt")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]), "NCCL_DEBUG": "INFO"}
    meshed = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *common, "--mesh", "dp=1", "--run-dir", str(tmp_path / "mesh")], capture_output=True, text=True, env=env, timeout=300)
    plain = subprocess.run([sys.executable, *common, "--run-dir", str(tmp_path / "plain")], capture_output=True, text=True, env=env, timeout=300)
    assert meshed.returncode == 0, meshed.stderr[-2000:]
    assert plain.returncode == 0, plain.stderr[-2000:]
    assert "NCCL INFO" in meshed.stdout + meshed.stderr
    a, b = ([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("mesh", "plain"))
    torch.testing.assert_close(*(torch.tensor([row["loss"] for row in log if "loss" in row]) for log in (a, b)), rtol=2e-3, atol=2e-3)
