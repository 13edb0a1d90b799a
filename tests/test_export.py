"""What is taken away from a run: the same model in other hands, the same run from its code, and nothing in a card or an archive that somebody smuggled into a name."""
import contextlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from shared import LABELS, small_base

from llmbook import export
from llmbook.bert import Bert, BertConfig, save_bert
from llmbook.classifying import predict
from llmbook.cli import main
from llmbook.corpora import BookError
from llmbook.export import BROKEN, SAMPLES, base_facts, code_of, export_base, export_run, plain_name, write_samples, write_tokenizer
from llmbook.finetuning import Plan, open_run, task_rows
from llmbook.gpt import GPT
from llmbook.job_folder import SPEC, TURN, line_up, read_json
from llmbook.job_training import carry_out, write_spec
from llmbook.jobs import run_here
from llmbook.pretrained import chat_prompt, pretrained_tokenizer
from llmbook.task_data import read_task, write_task
from llmbook.task_files import TaskDataError
from llmbook.wordpiece import WordPieceTokenizer

CHATS = "".join(json.dumps({"messages": [{"role": "user", "content": f"The {('cat', 'dog')[i % 2]} number {i} says"}, {"role": "assistant", "content": (" meow", " woof")[i % 2]}]}) + "\n" for i in range(24)).encode()
QUICK = dict(progress=False, lr=3e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return small_base(tmp_path_factory.mktemp("base") / "model", context=128, n_kv_head=1, rope_theta=5e4)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "model"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "number", *"0123456789", *(f"##{d}" for d in "0123456789")]
    vocab = {w: i for i, w in enumerate(words)}
    torch.manual_seed(0)
    save_bert(Bert(BertConfig(vocab_size=len(vocab), context=32, n_layer=1, n_head=2, n_embd=32, n_inner=64), pooler=False), folder)
    WordPieceTokenizer(vocab, {t: i for t, i in vocab.items() if t.startswith("[")}).to_tokenizer_json(folder / "tokenizer.json")
    return folder


def trained(base, folder, method="lora", rows=CHATS, **settings):
    "A short run of the job engine."
    run_here(Plan(str(base), method, epochs=4, precision="fp32", share=0.25), rows, folder, **{**QUICK, **settings})
    return folder


def says(folder: Path, words: str, monkeypatch) -> str:
    "What the lines of a card print, with somebody's words for the dots; they may name folders beside this one."
    monkeypatch.chdir(folder.parent)
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("…", words)
    with contextlib.redirect_stdout(io.StringIO()) as out: exec(lines, found := {})
    return out.getvalue(), found


@pytest.mark.parametrize("method, kind", [("lora", "adapter"), ("lora", "merged"), ("qlora", "merged"), ("full", "merged"), ("prompt", "adapter"), ("prefix", "adapter")])
def test_others_hear_the_same_model(base, tmp_path, monkeypatch, method, kind):
    pytest.importorskip("peft")
    run = trained(base, tmp_path / "run", method, lr=0.1 if method in ("prompt", "prefix") else 3e-3)
    export_run(run, tmp_path / "away", kind, archive=False)
    export_base(base, tmp_path / "model")
    _, theirs = says(tmp_path / "away", "The cat number 7 says", monkeypatch)
    model, tokenizer, _ = open_run(run)
    prompt = chat_prompt([{"role": "user", "content": "The cat number 7 says"}])
    ids = tokenizer.encode(prompt, allowed_special=tokenizer.special)
    assert theirs["ids"].input_ids[0].tolist() == ids and theirs["prompt"] == prompt
    assert theirs["tokenizer"].apply_chat_template([{"role": "user", "content": "The cat number 7 says"}], tokenize=False, add_generation_prompt=True) == prompt
    with torch.no_grad(): torch.testing.assert_close(theirs["model"](torch.tensor([ids])).logits[:, -len(ids):], model(torch.tensor([ids])), atol=1e-4, rtol=1e-4)
    ours = list(model.generate(ids, 40, temperature=0, stop=[tokenizer.special["<|im_end|>"]]))
    assert [i for i in theirs["said"].tolist() if i != tokenizer.special["<|im_end|>"]] == ours
    if kind == "merged": torch.testing.assert_close(GPT.from_pretrained(tmp_path / "away")(torch.tensor([ids])), model(torch.tensor([ids])), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which, method, kind", [("decoder", "lora", "merged"), ("decoder", "lora", "adapter"), ("encoder", "full", "merged"), ("encoder", "qlora", "merged"), ("tiny-bert", "full", "merged")])
def test_a_classifier_finds_the_same_labels(base, encoder, tmp_path, monkeypatch, which, method, kind):
    pytest.importorskip("transformers")
    write_task(tmp_path / "rows.jsonl", LABELS.rows)
    run = trained({"decoder": base, "encoder": encoder}.get(which, which), tmp_path / "run", method, tmp_path / "rows.jsonl")
    export_run(run, tmp_path / "away", kind, archive=False)
    if kind == "adapter": (tmp_path / "model").symlink_to(base)
    model, tokenizer, task = open_run(run)
    rows = task_rows(LABELS, task, tokenizer)
    for i, p in enumerate(predict(model, rows)[:2]):
        out, theirs = says(tmp_path / "away", LABELS.rows[i].text, monkeypatch)
        assert out.strip() == model.labels[int(p.argmax())]
        if "scores" in theirs: torch.testing.assert_close(theirs["scores"].softmax(-1)[0], p, atol=1e-4, rtol=1e-4)


def test_the_code_repeats_a_run_with_everything_in_it(base, tmp_path, monkeypatch):
    rows, valid = tmp_path / "rows.jsonl", tmp_path / "valid.jsonl"
    rows.write_bytes(CHATS.replace(b"}\n", b",}\n", 1)), valid.write_bytes(CHATS[:len(CHATS) // 2].rpartition(b"\n")[0] + b"\n")
    plan = Plan(str(base), "lora", epochs=2, lr=1e-2, seed=3, options={"rank": 2, "dropout": 0.1})
    job = run_here(plan, rows, tmp_path / "run", valid, repair=True, progress=False, accumulate=2, eval_every=2)
    lines = code_of(tmp_path / "run")
    assert f"precision={job.precision!r}" in lines and "repair=True" in lines and "accumulate=2" in lines and "epochs=2" in lines and "balance" not in lines
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    again, _, _ = open_run(tmp_path / "again")
    ours, _, _ = open_run(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters()))


def test_names_are_only_names(base, tmp_path):
    name = "../`x`|```\n<script>alert(1)</script>\"'.jsonl"
    run = trained(base, tmp_path / "run", name=name)
    made = export_run(run, tmp_path / "a <b> c.zip")
    with zipfile.ZipFile(made) as box:
        assert {Path(n).parts[0] for n in box.namelist()} == {"a-b-c"} and all(len(Path(n).parts) == 2 and ".." not in n for n in box.namelist())
        card = box.read("a-b-c/README.md").decode()
        assert "adapter_model.safetensors" in " ".join(box.namelist()) and str(tmp_path) not in card + box.read("a-b-c/adapter_config.json").decode()
    assert "<script" not in card and card.count("```") == 4 and read_json(run / SPEC)["data"]["sha256"] in card and read_json(run / SPEC)["base_hash"] in card
    assert plain_name("..") == "unnamed" and plain_name("a/b") == "a-b" and base_facts("smollm2-135m-instruct")["licence"] == "Apache-2.0"


@pytest.mark.parametrize("doing, said", [(lambda run, tmp: export_run(run, tmp / "x", "whole"), "adapter or merged"), (lambda run, tmp: export_run(run.parent, tmp / "x"), "no job"), (lambda run, tmp: export_run(run, run, archive=False), "isn't empty"),
                                         (lambda run, tmp: export_run(run, tmp / "file" / "x"), "can't be written"), (lambda run, tmp: export_base("tiny-bert", tmp / "x"), "no class")])
def test_faults_are_one_sentence(base, tmp_path, doing, said):
    run = trained(base, tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("in the way")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(BookError, match=said): doing(run, tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before, "nothing is left behind"


def test_a_full_disk_leaves_nothing(base, tmp_path, monkeypatch):
    run = trained(base, tmp_path / "run")
    export_run(run, tmp_path / "away.zip")
    kept = (tmp_path / "away.zip").read_bytes()

    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(export, "pack", full)
    with pytest.raises(BookError, match="No space left"): export_run(run, tmp_path / "away.zip")
    assert (tmp_path / "away.zip").read_bytes() == kept and sorted(p.name for p in tmp_path.iterdir()) == [".jobs.lock", "away.zip", "run"]


def test_what_hasnt_ended_or_has_no_model_stays(base, tmp_path):
    write_spec(tmp_path / "run", Plan(str(base)), CHATS)
    line_up(tmp_path / "run")
    with pytest.raises(BookError, match="has no model yet"): export_run(tmp_path / "run", tmp_path / "x")
    assert "Plan(base=" in code_of(tmp_path / "run"), "the code is known from the start"
    run = trained(base, tmp_path / "ended")
    (run / "task.json").unlink(), (run / TURN).unlink()     # as a killed run is left
    assert export_run(run, tmp_path / "x").exists()


def test_another_base_in_the_same_folder_is_refused(tmp_path):
    base = small_base(tmp_path / "base")
    folder = tmp_path / "run"
    write_spec(folder, Plan(str(base), epochs=1, precision="fp32"), CHATS, samples=0)
    small_base(base, n_layer=1)
    with pytest.raises(BookError, match="base in .* was changed"): carry_out(folder)
    assert write_spec(tmp_path / "named", Plan("tiny-gpt"), CHATS)["base_hash"] is None


def test_samples_are_sound_and_broken_ones_are_not(tmp_path, capsys):
    assert main(["samples", str(tmp_path / "files")]) == 0 and main(["samples", str(tmp_path / "files")]) == 0
    assert "broken" in capsys.readouterr().out
    formats = {read_task(tmp_path / "files" / name).format for name in SAMPLES}
    assert formats == {"alpaca", "chat", "completion", "labelled"}
    for name, (_, _, said, _) in BROKEN.items():
        with pytest.raises(TaskDataError, match=said): read_task(tmp_path / "files" / "broken" / name)
    (tmp_path / "in the way").write_text("")
    with pytest.raises(BookError, match="can't be written"): write_samples(tmp_path / "in the way")


def test_the_command_exports_runs_and_bases(base, tmp_path, capsys):
    run = trained(base, tmp_path / "run")
    assert main(["export", str(run), str(tmp_path / "a"), "--kind", "merged"]) == 0 and main(["export", str(base), str(tmp_path / "b")]) == 0
    assert "README.md" in capsys.readouterr().out and (tmp_path / "b" / "model.safetensors").exists()
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "c")]) == 2
    write_tokenizer(tmp_path, pretrained_tokenizer(base), 64)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
