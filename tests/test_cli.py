"""The command as a reader meets it: a process, its output, its exit status."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from llmbook.cli import main
from llmbook.cli_corpora import consecutive_pieces, file_documents
from llmbook.cli_training import streamed_text
from llmbook.corpora import BookError

COMMAND = str(Path(sys.executable).with_name("llmbook"))
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--context", "32", "--batch-size", "4", "--vocab-size", "300", "--precision", "fp32"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def llmbook(capsys):
    "The command in this process, since a process of its own for each line would take seconds."
    def run(*args): return Done(main([str(a) for a in args]), *capsys.readouterr())
    return run


def test_the_script_gives_version_and_status():
    for args, status, said in ((["--version"], 0, "llmbook "), (["corpora", "show", "shakespere"], 2, "llmbook: ")):
        done = subprocess.run([COMMAND, *args], check=False, capture_output=True, text=True)
        assert done.returncode == status and (done.stdout + done.stderr).startswith(said)


@pytest.mark.parametrize("command", [[], ["corpora"], ["corpora", "list"], ["corpora", "show"], ["corpora", "fetch"], ["pretrain"], ["generate"], ["site"], ["notebooks", "run"], ["notebooks", "check"], ["bench"], ["runs"], ["plan"], ["finetune"], ["estimate"], ["studio"], ["evaluate"], ["merge"], ["export"], ["samples"], ["quantize"], ["jobs", "list"], ["jobs", "watch"], ["jobs", "stop"], ["jobs", "resume"]], ids=" ".join)
def test_every_command_has_help_with_an_example(llmbook, command):
    done = llmbook(*command, "--help")
    assert done.returncode == 0
    if command not in ([], ["corpora"]): assert "llmbook " + " ".join(command) in " ".join(done.stdout.split()), "an example shows the command"


def test_a_wrong_option_is_answered_with_help(llmbook, tmp_path):
    done = llmbook("pretrain", "--run-dir", tmp_path, "--stepps", 3)
    assert done.returncode == 2 and "--steps" in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_faults_are_one_sentence_and_status_2(llmbook, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for name, value in {"LLMBOOK_CACHE": str(tmp_path / "none"), "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}.items(): monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    for args in (["corpora", "show", "shakespere"], ["generate", "--model", tmp_path / "none", "--prompt", "x"], ["generate", "--model", tmp_path], ["bench", "nothing"], ["plan", "--model", "none"],
                 ["pretrain", "--run-dir", tmp_path / "r", "--data", tmp_path / "empty.txt"], ["pretrain", "--run-dir", tmp_path / "r", "--data", tmp_path / "latin.txt"],
                 ["pretrain", "--run-dir", tmp_path / "r", "--data", "synthetic", "--vocab-size", 100], ["pretrain", "--run-dir", tmp_path / "r", "--recipe", "tiny"],
                 ["pretrain", "--run-dir", tmp_path / "r", "--recipe", "tiny-gpt", "--lr", "0.1"], ["corpora", "fetch", "shakespeare"], ["site"], ["notebooks", "run"]):
        done = llmbook(*args)
        assert done.returncode == 2, (args, done.stderr)
        assert "Traceback" not in done.stderr and done.stderr.strip().splitlines()[-1].startswith("llmbook: "), (args, done.stderr)
    assert not (tmp_path / "r" / "data").exists()


def test_pretrain_resumes_and_generates(llmbook, tmp_path):
    run = ["pretrain", "--run-dir", tmp_path / "run", "--data", "synthetic", "--steps", 60, *TINY]
    first = llmbook(*run)
    assert first.returncode == 0 and "llmbook generate" in first.stdout, first.stderr
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert json.loads(log.splitlines()[-1])["step"] == 60
    assert llmbook(*run).returncode == 0 and (tmp_path / "run" / "log.jsonl").read_text() == log, "a finished run is left as it is"
    other = llmbook(*run, "--lr", 1e-4)
    assert other.returncode == 2 and "lr" in other.stderr
    texts = [llmbook("generate", "--model", tmp_path / "run" / "model", "--prompt", "The ", "--max-new-tokens", 12, "--seed", 1).stdout for _ in range(2)]
    assert texts[0] == texts[1] and texts[0].startswith("The ") and len(texts[0]) > 8
    long = llmbook("generate", "--model", tmp_path / "run" / "model", "--prompt", "The cat " * 40)
    assert long.returncode == 2 and "context" in long.stderr
    assert "chat" in llmbook("generate", "--model", tmp_path / "run" / "model", "--chat", "--prompt", "hi").stderr


def test_an_interrupted_run_goes_on(tmp_path):
    run = ["pretrain", "--run-dir", tmp_path / "run", "--data", "synthetic", "--steps", 4000, *TINY]
    process = subprocess.Popen([COMMAND, *map(str, run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(300):
        if log.exists() and len(log.read_text().splitlines()) > 20: break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in err, err
    kept = [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.startswith("step-")]
    assert kept, "the interrupted step was saved"


def test_runs_are_compared(llmbook, tmp_path, monkeypatch):
    run = ["pretrain", "--data", "synthetic", "--steps", 20, *TINY]
    for name, lr in (("slow", 1e-4), ("fast", 3e-3)): assert llmbook(*run, "--run-dir", tmp_path / "runs" / name, "--lr", lr).returncode == 0
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/log.jsonl").write_text("{")
    monkeypatch.chdir(tmp_path)
    done = llmbook("runs")
    assert done.returncode == 0 and "lr 0.0001" in done.stdout and "lr 0.003" in done.stdout and done.stdout.splitlines()[-1].startswith("broken: "), done.stdout + done.stderr
    table = json.loads(llmbook("runs", tmp_path / "runs", "--json").stdout)
    assert [row["run"] for row in table] == ["broken", "fast", "slow"] and table[1]["steps"] == "20 of 20"
    nothing = llmbook("runs", tmp_path / "none")
    assert nothing.returncode == 2 and nothing.stderr.startswith("llmbook: ")


def test_files_become_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>\n two \n<|endoftext|>")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "id": 4}\n')
    assert file_documents(tmp_path) == ["one", "two", "three", "four"]
    for line in ('{"text": 3}', "[1]", "{", '{"txt": "x"}'):
        (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(BookError, match="Line 2"): file_documents(tmp_path / "b.jsonl")


def test_pieces_join_to_the_document():
    text = "".join(f"line {i}\n" for i in range(100)) + "no end"
    pieces = consecutive_pieces(text)
    assert "".join(pieces) == text and 15 <= len(pieces) <= 21


def test_letters_wait_for_all_their_bytes():
    text = "naïve 🙂 日"
    parts = list(streamed_text(iter(text.encode()), lambda ids: bytes(ids).decode(errors="replace")))
    assert "".join(parts) == text and not any("\ufffd" in p for p in parts)
    assert list(streamed_text(iter(b"a\xf0"), lambda ids: bytes(ids).decode(errors="replace"))) == ["a", "\ufffd"]


def test_main_gives_the_status(capsys):
    assert main(["corpora", "list"]) == 0 and "shakespeare" in capsys.readouterr().out
    assert main(["corpora", "show", "nope"]) == 2 and main(["--help"]) == 0
