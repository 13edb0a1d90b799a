"""The studio's page in a real browser, served by `llmbook studio` and in JupyterLab: from a file to an answer, and whatever may be killed or smuggled in on the way."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from shared import small_base
from test_jupyterlab import lab, open_and_run  # noqa: F401
from test_serving import Server, gone

from llmbook import jobs
from llmbook.checkpointing import load_checkpoint
from llmbook.corpora import rows
from llmbook.finetuning import Plan, finetune
from llmbook.job_folder import EVENTS, LOCK, read_events, read_json, status
from llmbook.loop import Callback
from llmbook.studio_parts import LARGEST
from llmbook.task_data import read_task

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900), pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")]
EVIL = "<script>window.hit=1</script><img src=x onerror='window.hit=1'><b>bold</b>"
pytest.importorskip("voila", reason="Voilà is not installed: pip install 'llmbook[studio]'")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    "200 short film reviews, to be judged fresh or rotten."
    path = tmp_path_factory.mktemp("data") / "reviews.json"
    short = [r for r in rows("rotten-tomatoes") if len(r["text"]) < 60]
    path.write_text(json.dumps([{"prompt": f"{r['text']}\nThis film is", "completion": f" {r['label']}"} for r in random.Random(0).sample(short, 200)]))
    return path


class Reader:
    "What somebody does at the page, and what she sees there."

    def __init__(self, page): self.page = page

    def ready(self):
        self.page.get_by_label("Model", exact=True).wait_for(timeout=180_000)
        return self

    def choose(self, label: str, part: str):
        "The option of a list whose text has a part."
        box = self.page.get_by_label(label, exact=True)
        text = next(t for t in box.locator("option").all_text_contents() if part in t.replace("\xa0", " "))
        box.select_option(label=text)

    def give(self, file):
        with self.page.expect_file_chooser() as chooser: self.page.get_by_role("button", name="Choose a file").click()
        chooser.value.set_files(file)

    def write(self, label: str, text: str):
        field = self.page.get_by_label(label, exact=True)
        field.fill(text)
        field.press("Tab")

    def press(self, name: str, n: int = 0):
        "Once the button stands still: a click on one that moves away, since something above it has just arrived, is lost."
        button, seen = self.page.get_by_role("button", name=name, exact=True).nth(n), []
        button.wait_for()
        while len(seen) < 4 or len({str(box) for box in seen[-4:]}) > 1:
            seen.append(button.bounding_box())
            self.page.wait_for_timeout(150)
        button.click()

    def see(self, text: str, seconds: float = 60): self.page.locator(".studio").get_by_text(re.compile(text)).first.wait_for(state="attached", timeout=1000 * seconds)

    def run(self) -> tuple[str, int]:
        "State and step of the first run in the list."
        found = re.search(r": (\w+), step (\d+)", " ".join(self.page.get_by_label("Runs", exact=True).locator("option").all_text_contents()).replace("\xa0", " "))
        return (found[1], int(found[2])) if found else ("none", 0)

    def wait_for(self, good, what: str, seconds: float = 120):
        until = time.monotonic() + seconds
        while not (now := good()):
            if time.monotonic() > until: pytest.fail(f"{what}: not after {seconds} s, but {self.run()}; {self.page.locator('.studio .studio-fault').all_text_contents()}")
            self.page.wait_for_timeout(200)
        return now

    def points(self) -> int:
        "Of the longest curve."
        return self.page.evaluate("Math.max(0, ...[...document.querySelectorAll('.studio svg polyline')].map(p => p.getAttribute('points').trim().split(/\\s+/).length))")

    def start(self, model: str, file, **fields: str):
        self.choose("Model", model)
        self.give(file)
        self.see(r"\d+ sound rows")
        for label, text in fields.items(): self.write(label.replace("_", " "), text)
        self.see("tokens; ")
        self.press("Start")

    def answer(self, text: str) -> str:
        "Ask in the chat, and wait until the answer is whole."
        turns = self.page.locator(".studio-turn")
        before = turns.count()
        self.write("You", text)
        self.press("Send")
        last = lambda: turns.last.inner_text().removeprefix("Model:").strip() if turns.count() == before + 2 else "…"
        self.wait_for(lambda: last() != "…" and not self.page.get_by_text("The model answers …").count(), "an answer")
        return last()


CARD = """import contextlib, io, json, sys
folder, words = sys.argv[1:]
lines = open(folder + "/README.md").read().split("```python\\n")[1].split("```")[0].replace('"…"', repr(words))
with contextlib.redirect_stdout(io.StringIO()) as out: exec(lines)
print(json.dumps(out.getvalue()))"""


def elsewhere(archive: Path, words: str, folder: Path) -> str:
    "What an exported adapter answers in a process without the book: its card's own lines, run on transformers and peft."
    subprocess.run([sys.executable, "-m", "llmbook", "export", "tiny-gpt", str(folder / "tiny-gpt")], check=True, capture_output=True)
    with zipfile.ZipFile(archive) as box: box.extractall(folder)
    name, = {Path(n).parts[0] for n in zipfile.ZipFile(archive).namelist()}
    done = subprocess.run([sys.executable, "-c", CARD, name, words], cwd=folder, check=False, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def from_file_to_answer(reader: Reader, reopen, file: Path, root: Path, aside: Path):
    "Train, close the page, find the run still going, stop, resume, finish, talk, take away."
    reader.start("tiny-gpt", file, Epochs="16", Learning_rate="0.003", Name_of_the_run="reviews")
    seen = reader.wait_for(reader.points, "a curve")
    reader.wait_for(lambda: reader.points() > seen, "a curve that moves")
    at = reader.run()[1]
    reader = reopen()
    reader.wait_for(lambda: reader.run()[1] > at, "the run goes on")
    assert reader.run()[0] == status(root / "reviews").state == "running"
    reader.press("Stop")
    reader.wait_for(lambda: reader.run()[0] == "stopped", "stopped")
    assert status(root / "reviews").state == "stopped"
    reader.press("Resume")
    reader.wait_for(lambda: reader.run()[0] == "finished", "finished", 300)
    assert status(root / "reviews").step == 368
    words = json.loads(file.read_text())[0]["prompt"]
    said = reader.answer(words)
    assert said in ("fresh", "rotten"), said
    reader.press("Export the adapter")
    with reader.page.expect_download(timeout=60_000) as got: reader.page.get_by_text("download it").click()
    archive = root / "exports" / "reviews-adapter.zip"
    assert Path(got.value.path()).read_bytes() == archive.read_bytes()
    assert elsewhere(archive, words, aside).strip() == said
    assert reader.answer(words) == said, "the page lives on after a download"
    return reader


class Page:
    "The command, a browser, and the page that it shows."

    def __init__(self, folder: Path, visit):
        self.folder, self.root, self.visit, self.v = folder, folder / "runs", visit, None
        folder.mkdir()
        self.up()

    def up(self): self.server = Server(self.folder, cell=None)

    def open(self) -> Reader:
        "In a browser of its own each time, as after a restart."
        if self.v: self.v.context.close()
        self.v = self.visit(self.server.url.partition("?")[0])
        self.v.page.goto(self.server.url, wait_until="commit", timeout=180_000)     # a kernel starts first
        return Reader(self.v.page).ready()

    def reload(self) -> Reader:
        self.v.page.reload(wait_until="commit", timeout=180_000)
        return Reader(self.v.page).ready()

    def close(self):
        "As a reader closes a page: it may say goodbye."
        self.v.page.close(run_before_unload=True)

    def faults(self) -> list[str]: return [f for f in self.v.faults if f.startswith(("script error", "remote", "console error: Refused"))]


@pytest.fixture
def studio(tmp_path, visit):
    page = Page(tmp_path / "served", visit)
    yield page
    page.server.clean()
    for lock in page.root.glob(f"*/{LOCK}"): end_run(lock.parent)


def end_run(folder: Path):
    if status(folder).state in ("running", "queued", "stopping") and (pid := read_json(folder / LOCK).get("pid")): os.kill(pid, signal.SIGKILL)


def test_from_a_file_to_an_answer(studio, reviews, tmp_path):
    "Nothing but the page is used, nothing but this machine is asked, and a closed page's kernel goes."
    reader = studio.open()
    first = studio.server.kernels()
    assert len(first) == 1

    def reopen():
        studio.close()
        assert gone(first), "a closed page's kernel ends"
        assert status(studio.root / "reviews").state == "running"
        return studio.open()
    from_file_to_answer(reader, reopen, reviews, studio.root, tmp_path)
    assert studio.faults() == []


FOLDER = EVIL.replace("/", "∕")     # the same for a file system


def test_nothing_that_is_typed_or_sent_becomes_a_part_of_the_page(studio, tmp_path):
    "Markup in rows, labels, keys, names of files, bases and runs, settings and questions is shown as text: no dialog, no script, no element; no name leads out of the folder of the runs; and of 30 MB it is told that they are too much."
    small_base(tmp_path / "bases" / FOLDER, context=256)
    reader = studio.open()
    dialogs = []
    reader.page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
    before = reader.page.locator(".studio script, .studio img").count()
    line = json.dumps({"prompt": "x" * 1000, "completion": " y"}) + "\n"
    reader.give({"name": "large.jsonl", "mimeType": "application/json", "buffer": (line * (30_000_000 // len(line))).encode()})
    reader.see(f"{LARGEST / 1e6:,.1f} MB at most")
    reader.choose("Model", "another")
    reader.write("Folder or id", EVIL)
    reader.see("<script>")
    reader.write("Folder or id", str(tmp_path / "bases" / FOLDER))
    reader.see("parameters, reads")
    labels = [{"text": f"{i} {EVIL}", "label": EVIL if i % 2 else "other"} for i in range(24)]
    texts = [{"prompt": f"{i} {EVIL}", "completion": f" {EVIL}"} for i in range(24)]
    for name, rows_, said in ((f"../../{FOLDER}.json", [{"prompt": EVIL, "completion": 3}, {EVIL: EVIL}, EVIL], r"\d faults"), ("labels.json", labels, "24 sound rows"), (f"../{FOLDER}.json", texts, "completion.*24 sound rows")):
        reader.give({"name": name, "mimeType": "application/json", "buffer": json.dumps(rows_).encode()})
        reader.see(said)
    reader.write("Epochs", EVIL)
    reader.page.locator(".studio .studio-fault").get_by_text("<script>").first.wait_for()
    for label, text in (("Epochs", "1"), ("Name of the run", f"../../{EVIL}")): reader.write(label, text)
    reader.press("Start")
    reader.wait_for(lambda: reader.run()[0] == "finished", "finished")
    reader.answer(EVIL)
    assert EVIL in reader.page.locator(".studio-turn").first.inner_text()
    reader.write("Your own", EVIL)
    for name in ("Ask both", "Compare on held-out rows", "Show me the code"): reader.press(name)
    reader.see("finetune")
    reader.wait_for(lambda: not reader.page.get_by_text("Both models answer …").count(), "both answers")
    assert reader.page.evaluate("[window.hit ?? 0, [...document.querySelectorAll('.studio b')].filter(b => b.textContent == 'bold').length]") == [0, 0]
    assert reader.page.locator(".studio script, .studio img").count() == before and dialogs == [] and studio.faults() == []
    assert {p.name for p in tmp_path.iterdir()} == {"bases", "served"} and [p.name for p in studio.root.glob("*/job.json")] == ["job.json"]


UPLOAD = """from ipywidgets import HTML, FileUpload, VBox
said, upload = HTML('nothing'), FileUpload()
upload.observe(lambda _: setattr(said, 'value', 'received: %d bytes' % upload.value[0]['size']), 'value')
VBox([upload, said])"""


def test_the_server_lets_large_messages_through(tmp_path, visit):
    "30 MB at once, which tornado's own limit would answer by closing the connection."
    server = Server(tmp_path, cell=UPLOAD)
    page = visit(server.url.partition("?")[0]).page
    page.goto(server.url)
    with page.expect_file_chooser() as chooser: page.get_by_role("button", name="Upload").click()
    chooser.value.set_files({"name": "large", "mimeType": "text/plain", "buffer": b"x" * 30_000_000})
    page.get_by_text("received: 30000000 bytes").wait_for(timeout=60_000)
    server.clean()


def victims(studio, kind: str) -> list[int]:
    run = studio.root / "long"
    assert kind != "training" or status(run).state == "running"
    return {"kernel": studio.server.kernels(), "server": [studio.server.process.pid], "training": [read_json(run / LOCK).get("pid")]}[kind]


def kill_at_random(studio, reader, kinds: tuple[str, ...], rng: random.Random) -> Reader:
    "Kill at a random moment, look whether the state that is told is true, open the page again, and let a lost run go on."
    time.sleep(2 * rng.random())
    run, pids = studio.root / "long", [pid for kind in kinds for pid in victims(studio, kind)]
    for pid in pids: os.kill(pid, signal.SIGKILL)
    assert len(pids) == len(kinds) and gone(pids)
    truth = "lost" if "training" in kinds else "running"
    reader.wait_for(lambda: status(run).state == truth, truth, 5)   # a killed process's last threads take a moment to go
    if kinds != ("training",): reader.page.get_by_role("alert").get_by_text("The server can't be reached" if "server" in kinds else "Reload the page").wait_for()
    if "server" in kinds:
        assert studio.server.process.wait(10) and gone(studio.server.kernels()), "kernels find out"
        studio.up()
        reader = studio.open()
    elif "kernel" in kinds: reader = studio.reload()
    reader.wait_for(lambda: reader.run()[0] == status(run).state, "the truth")
    if "training" in kinds:
        reader.press("Resume")
        reader.wait_for(lambda: reader.run()[0] == "running" and status(run).state == "running", "resumed")
    return reader


class Until(Callback):
    "Asks a run to stop at a step, as the page's button does at whatever step it is."

    def __init__(self, step: int): self.step = step

    def on_start(self, trainer): trainer.told_to_stop = lambda asked: trainer.step >= self.step and not asked.append(True)


def killed_and_whole(studio, folder: Path, rounds: list[tuple[str, ...]], rng: random.Random):
    "Kill things while a run trains; stop it, and compare with a run that nobody disturbed: weights, optimizer, place in the data and random numbers, bit for bit."
    rows_ = "".join(json.dumps({"prompt": f"The {('cat', 'dog')[i % 2]} number {i} says", "completion": (" meow", " woof")[i % 2]}) + "\n" for i in range(24)).encode()
    plan, settings, run = Plan(str(small_base(folder / "base")), epochs=1_000_000, lr=1e-6, precision="fp32"), {"warmup": 0, "eval_every": 1000, "checkpoint_every": 20}, studio.root / "long"
    jobs.start(plan, rows_, run, **settings)
    reader = studio.open()
    reader.wait_for(lambda: reader.points() > 1, "a curve")
    for kinds in rounds: reader = kill_at_random(studio, reader, kinds, rng)
    reader.press("Stop")
    reader.wait_for(lambda: reader.run()[0] == "stopped", "stopped")
    step = status(run).step
    assert reader.run() == ("stopped", step)
    assert any(e["step"] > 0 for e in read_events(run / EVENTS)[0] if e["kind"] == "begin"), "it went on from where it was"
    finetune(plan, read_task(rows_), folder / "undisturbed", progress=False, callbacks=[Until(step)], **settings)
    (one, moment), (other, same) = (load_checkpoint(f / "checkpoints" / f"step-{step:06d}") for f in (run, folder / "undisturbed"))
    assert {k: g.keys() for k, g in one.items()} == {k: g.keys() for k, g in other.items()} and all((one[k][name] == other[k][name]).all() for k in one for name in one[k])
    assert moment == same


def test_killed_at_random_a_run_stays_true_and_whole(studio, tmp_path): killed_and_whole(studio, tmp_path, [("training",), ("kernel",), ("server", "training")], random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_twenty_times(studio, tmp_path):
    print("seed", seed := time.time_ns())
    rng = random.Random(seed)
    killed_and_whole(studio, tmp_path, rng.choices([("kernel",), ("server",), ("training",), ("kernel", "training"), ("server", "training")], k=20), rng)


@pytest.mark.slow
def test_the_same_in_jupyterlab(lab, visit, reviews, tmp_path):  # noqa: F811
    "The page in a notebook; opened again, its cell is run again."
    cell = {"cell_type": "code", "id": "studio", "execution_count": None, "metadata": {}, "outputs": [], "source": f"from pathlib import Path\nfrom llmbook.studio import Studio\nStudio(Path({str(tmp_path / 'runs')!r}))"}
    book = {"cells": [cell], "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    request = urllib.request.Request(f"{lab}api/contents/studio.ipynb", json.dumps({"type": "notebook", "content": book}).encode(), method="PUT")
    assert urllib.request.urlopen(request).status == 201

    def opened() -> Reader: return Reader(open_and_run(visit(lab), lab, "studio", 1)).ready()
    reader = opened()

    def reopen():
        reader.page.close()
        return opened()
    from_file_to_answer(reader, reopen, reviews, tmp_path / "runs", tmp_path)
