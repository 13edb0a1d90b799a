"Small decoders of every shape; small tasks, a small base for them, and a power cut: what several tests share."
import pytest
import torch
from hypothesis import strategies as st

from llmbook.gpt import GPT, GPTConfig
from llmbook.pretrained import SMOLLM_SYSTEM
from llmbook.task_data import Alpaca, Chat, Completion, Labelled, TaskData
from llmbook.tokenization import BPETokenizer

V, T = 11, 12
SHAPES = st.builds(
    lambda D, groups, share, **kw: GPTConfig(vocab_size=V, context=T, n_head=groups * share, n_kv_head=groups, n_embd=D * groups * share, **kw),
    D=st.sampled_from([2, 4, 6]), groups=st.integers(1, 3), share=st.integers(1, 3), n_layer=st.integers(1, 3),
    n_inner=st.one_of(st.none(), st.integers(1, 20)), norm=st.sampled_from(["layernorm", "rmsnorm"]), mlp=st.sampled_from(["gelu", "swiglu"]),
    position=st.sampled_from(["learned", "rope"]), bias=st.booleans(), tie=st.booleans())


def task(rows):
    "Rows of one kind as a file would give them."
    format = {Completion: "completion", Labelled: "labelled", Alpaca: "alpaca", Chat: "chat"}[type(rows[0])]
    return TaskData(format, rows, list(range(1, len(rows) + 1)), sorted({r.label for r in rows}) if format == "labelled" else [], [])


ANIMALS = task([Completion(prompt=f"The {('cat', 'dog')[i % 2]} number {i} says", completion=(" meow", " woof")[i % 2]) for i in range(24)])
LABELS = task([Labelled(text=f"the {('cat', 'dog')[i % 2]} number {i}", label=("meow", "woof")[i % 2]) for i in range(24)])


def small_base(folder, context: int = 64, **shape):
    "A small decoder with its tokenizer, in a folder."
    tokenizer = BPETokenizer.train(["The cat number 1 says meow. The dog number 2 says woof. " * 20, SMOLLM_SYSTEM * 9], 400, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), progress=False)
    torch.manual_seed(0)
    GPT(GPTConfig.llama(**{**dict(vocab_size=tokenizer.vocab_size, context=context, n_layer=2, n_head=2, n_embd=32), **shape})).save_pretrained(folder, tokenizer)
    return folder


def pull_the_plug(trainer, after: int):
    "Train until the power goes after so many steps."
    step = trainer.train_step

    def dies():
        if trainer.step == after: raise RuntimeError("pulled the plug")
        return step()
    trainer.train_step = dies
    with pytest.raises(RuntimeError, match="plug"): trainer.fit()
