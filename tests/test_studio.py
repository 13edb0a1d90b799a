"The studio's page, driven by its controls: bad files, hostile texts, names and sizes, pages that come and go, faults in the middle."
import asyncio
import base64
import json
import os
import random
import re
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from types import SimpleNamespace

import ipywidgets as w
import pytest
import torch
from shared import small_base
from test_task_data import MALFORMED

from llmbook import jobs, studio, studio_form
from llmbook.corpora import BookError
from llmbook.finetuning import Plan
from llmbook.job_folder import ENDED, EVENTS, SPEC, EventFile, held, read_events, read_json, status
from llmbook.jobs import lived
from llmbook.studio import Studio
from llmbook.studio_form import FAULTS, Thinker
from llmbook.studio_parts import (
    LARGEST,
    SETTINGS,
    RunView,
    asked_row,
    corrected_name,
    curve_svg,
    duration,
    judge,
    judge_path,
    judged_html,
    model_facts,
    number,
    plan_of,
)
from llmbook.task_data import damage, read_task

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")

ROWS = [{"prompt": f"The {('cat', 'dog')[i % 2]} number {i} says", "completion": (" meow", " woof")[i % 2]} for i in range(24)]
EVIL = "<script>window.hit=1</script><img src=x onerror='window.hit=1'>\"'&lt;b&gt;"
OURS = {"p", "b", "a", "i", "br", "h2", "h3", "div", "span", "style", "table", "tr", "th", "td", "svg", "text", "line", "polyline", "circle", "pre", "code"}


def jsonl(rows) -> bytes: return "".join(json.dumps(r) + "\n" for r in rows).encode()


class Tags(HTMLParser):
    "The tags and attributes of some HTML."
    def __init__(self, html): super().__init__(); self.tags, self.attributes = Counter(), set(); self.feed(html)
    def handle_starttag(self, tag, attrs): self.tags[tag] += 1; self.attributes |= {k for k, _ in attrs}


def htmls(widget) -> list[str]:
    "Everything in a page that a browser would take for HTML."
    found = [widget.value] if isinstance(widget, w.HTML) else []
    if getattr(widget, "description_allow_html", False): found.append(widget.description)
    return found + [h for child in getattr(widget, "children", ()) for h in htmls(child)]


def harmless(page):
    found = [Tags(h) for h in htmls(page.widget)]
    assert {t for f in found for t in f.tags} <= OURS and not {a for f in found for a in f.attributes if a.startswith("on")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return small_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def opened(tmp_path):
    "Opens pages on one folder; whatever still works in it is ended."
    pages, root = [], tmp_path / "runs"

    def make(at=root) -> Studio:
        pages.append(Studio(at))
        return pages[-1]
    yield make
    for page in pages: page.close()
    for s in jobs.list_jobs(root): jobs.stop(s.path, now=True)


@pytest.fixture
def here(monkeypatch):
    "A run is carried out in this process, so that a test needn't wait for another one to import everything."
    def start(plan, data, folder, name, repair):
        jobs.run_here(plan, data, folder, name=name, repair=repair, samples=1, progress=False)
        return status(folder)
    monkeypatch.setattr(jobs, "start", start)


def choose(page, base):
    page.base.choice.value, page.base.other.value = "other", str(base)
    page.settle()
    assert page.base.facts is not None, page.base.shown


def upload(page, raw: bytes, name="rows.jsonl", size=None):
    page.data.upload.file = {"name": name, "size": len(raw) if size is None else size, "content": memoryview(raw)}
    page.settle()


def ready(page, base, rows=ROWS, method="full", name="rows.jsonl", **typed):
    choose(page, base)
    upload(page, rows if isinstance(rows, bytes) else jsonl(rows), name)
    page.settings.method.value = method
    for key, text in {"epochs": "1", "lr": "1e-3", "share": "0.25", **typed}.items(): page.settings.fields[key].value = text
    page.settle()


def start(page):
    page.settings.start()
    page.settle()
    return page.settings.shown


# Files

@pytest.fixture(scope="module")
def patient(base, tmp_path_factory):
    "A page with a model, for many files."
    page = Studio(tmp_path_factory.mktemp("counting"))
    choose(page, base)
    yield page
    page.close()


@pytest.fixture
def counting(patient, monkeypatch):
    "That page, and what it would have started."
    began = []
    monkeypatch.setattr(jobs, "start", lambda plan, raw, folder, name, repair: began.append((raw, repair)))
    monkeypatch.setattr("llmbook.estimate.estimate", lambda plan, data: None)   # a second each
    return patient, began


@pytest.mark.parametrize("name", MALFORMED)
def test_no_malformed_file_starts_a_run(counting, name):
    page, began = counting
    raw, *_, certain = MALFORMED[name]
    began.clear()
    upload(page, raw, name)
    assert page.data.judged.seen.faults and "fault" in page.data.told.value
    assert re.search("fault", start(page)) and not began
    assert (page.data.repair.layout.display == "") == (page.data.judged.mended is not None)
    if not certain: assert page.data.judged.mended is None
    if page.data.judged.mended is None: assert "download" not in page.data.told.value; page.data.repair.value = True; assert start(page) and not began; return
    link = re.search(r'<a download="([^"]*)" href="data:application/octet-stream;base64,([^"]*)"', page.data.told.value)
    assert read_task(base64.b64decode(link[2])).rows == page.data.judged.mended.rows and "/" not in link[1]
    page.data.repair.value = True
    said = start(page)
    assert (began == [(raw, True)]) != ("rows leave" in said)
    harmless(page)
    assert not (page.root / FAULTS).exists()


def injured(page, began, seed, n):
    "Random injuries of a sound file: a run begins on exactly the files that are still sound and large enough."
    rng, outcome = random.Random(seed), Counter()
    page.settings.fields["share"].value = "0.4"
    for _ in range(n):
        began.clear()
        raw = damage(jsonl(ROWS), rng)
        upload(page, raw)
        said = start(page)
        sound = not judge("", raw).seen.faults
        assert not began or (sound and began == [(raw, False)])
        assert began or said
        harmless(page)
        outcome["started" if began else "small" if sound else "refused"] += 1
    assert not (page.root / FAULTS).exists() and outcome["started"] and outcome["refused"]


def test_injured_files(counting): injured(*counting, seed=1, n=40)


@pytest.mark.slow
def test_five_thousand_injured_files(counting): injured(*counting, seed=2, n=5000)


def test_size_limit_and_what_the_browser_says_of_it(opened, base, tmp_path):
    page = opened()
    choose(page, base)
    for raw, size in ((bytes(LARGEST + 1), None), (b"", LARGEST + 1)):     # sent all the same, or kept by the browser
        upload(page, jsonl(ROWS))
        upload(page, raw, size=size)
        assert "8.0 MB, and a page takes 8.0 MB at most: give its path" in page.data.shown and page.data.judged is None and page.data.told.value == ""
    for size in (-1, 5):
        upload(page, b"", size=size)
        assert "choose it again" in page.data.shown and page.data.judged is None
    upload(page, jsonl(ROWS), size=5)
    assert page.data.judged is not None, "what counts is what came"
    assert "choose a file in part 2" not in start(page) or page.data.judged
    (tmp_path / "big.jsonl").write_bytes(b"")
    os.truncate(tmp_path / "big.jsonl", 100_000_001)
    for path, said in ((str(tmp_path / "big.jsonl"), "100 MB are allowed"), (str(tmp_path), "There is no file"), ("no/such", "There is no file no/such"), ("\0", "There is no file")):
        page.data.path.value = path
        page.settle()
        assert said in page.data.shown and page.data.judged is None, path
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    page.data.path.value = str(tmp_path / "rows.jsonl")
    page.settle()
    assert len(page.data.rows()) == 24


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "", ".", "..", "job.json", "a\0b.json", "x" * 5000 + ".csv", EVIL + ".json", "\u202egnp.jsonl", "日本.jsonl"])
def test_names_cannot_leave_the_runs_folder(opened, base, here, name, tmp_path):
    page = opened()
    ready(page, base, name=name)
    page.settings.name.value = name
    before = {p for p in tmp_path.iterdir()}
    assert "fault" not in start(page)
    (run,) = jobs.list_jobs(page.root)
    assert run.path.parent == page.root and run.state == "finished" and re.fullmatch(r"data\.(json|jsonl|csv|txt)", read_json(run.path / SPEC)["data"]["file"])
    assert {p for p in tmp_path.iterdir()} == before and {p.name for p in page.root.iterdir()} - {".jobs.lock"} == {run.name}
    assert re.fullmatch(r"[\w-]+-corrected\.(json|jsonl|csv|txt)", corrected_name(name))
    harmless(page)


def test_hostile_texts_are_only_text(opened, base, here):
    page = opened()
    rows = [{"prompt": f"{EVIL} {i}", "completion": f" {EVIL}"} for i in range(16)]
    ready(page, base, rows)
    assert "this example is left out" in page.preview.told.value
    page.base.choice.value = "tiny-gpt"
    page.settle()
    assert "&lt;" in page.preview.told.value
    start(page)
    page.tick(0)
    assert page.runs.now.state == "finished", page.settings.shown
    assert "&lt;script" in page.runs.samples.value
    page.compare.compare()
    page.settle()
    page.compare.prompt.value = page.chat.text.value = EVIL
    page.compare.ask(), page.chat.send()
    page.settle()
    assert "&lt;script" in page.compare.told.value and "&lt;script" in page.chat.told.value and page.compare.own.value
    harmless(page)
    for section in page.sections: section.say(EVIL, fault=True); section.fault(RuntimeError(EVIL))
    page.base.choice.value, page.base.other.value = "other", EVIL
    page.settle()
    assert page.base.facts is None and page.base.shown
    harmless(page)


def test_samples_to_begin_with(opened):
    page = opened()
    page.data.samples()
    page.settle()
    names = dict(page.data.sample.options)
    assert len(names) > 3 and page.data.sample.layout.display == ""
    for name in [n for n in names if names[n]]:
        page.data.sample.value = names[name]
        page.settle()
        assert bool(page.data.judged.seen.faults) == name.startswith("broken"), name
    harmless(page)


def test_another_file_leaves_nothing_of_the_last(opened, base):
    page = opened()
    choose(page, base)
    upload(page, jsonl(ROWS).replace(b'"prompt"', b'"Prompt"'))
    page.data.repair.value = True
    page.data.upload.file = {"name": "a", "size": 1, "content": memoryview(jsonl(ROWS))}
    assert page.data.judged is None and not page.data.repair.value and page.data.told.value == ""
    page.data.upload.file = {"name": "b", "size": 1, "content": memoryview(b"nonsense")}
    page.settle()
    assert page.data.judged.name == "b" and "24" not in page.data.told.value


def test_the_last_model_chosen_is_the_one(opened, base):
    page = opened()
    page.base.choice.value = "tiny-gpt"
    page.base.choice.value = "tiny-bert"
    page.settle()
    assert page.base.facts.name == "tiny-bert" and "tiny-bert" in page.base.told.value
    page.base.choice.value = ""
    page.settle()
    assert page.base.facts is None and page.base.told.value == "" and "no model" in start(page)
    page.base.choice.value = "other"
    for name in ("no/such/folder", "tiny-gtp", str(base.parent), "tiny-xlnet"):
        page.base.other.value = name
        page.settle()
        assert page.base.facts is None and "fault" in page.base.said.value, name
    assert not (page.root / FAULTS).exists()


# Settings

@pytest.mark.parametrize("name", [s.name for s in SETTINGS])
@pytest.mark.parametrize("text", ["x", "-1", "0", "1e999", "nan", "inf", "9" * 5000, "1,5", "2.5.1", EVIL, "1e10"])
def test_numbers_that_cannot_be_used(name, text):
    if (name, text) == ("seed", "0"): return
    setting = next(s for s in SETTINGS if s.name == name)
    with pytest.raises(BookError, match=f"^{setting.label}: "): plan_of("tiny-gpt", (setting.methods or ("full",))[0], {name: text})


def test_empty_fields_are_the_plans_own():
    for method in ("full", "lora", "qlora", "prompt", "prefix"):
        assert plan_of("tiny-gpt", method, {}) == plan_of("tiny-gpt", method, {s.name: " " for s in SETTINGS}) == Plan("tiny-gpt", method)
    typed = {"epochs": "2", "batch_size": " 4 ", "lr": "1e-4", "length": "64", "share": ".2", "seed": "7", "rank": "3", "tokens": "5"}
    assert plan_of("x", "lora", typed) == Plan("x", "lora", 2.0, 4, 1e-4, 64, 0.2, seed=7, options={"rank": 3})
    assert plan_of("x", "prefix", typed).options == {"tokens": 5} and plan_of("x", "full", typed).options == {}
    assert number(SETTINGS[0], "") is None


@pytest.mark.parametrize("base_name,rows,method,typed,said", [("tiny-bert", ROWS, "full", {}, "writes none"), ("tiny-gpt", [{"text": f"a{i}", "label": "xy"[i % 2]} for i in range(20)], "prompt", {}, "teaches answers"),
                                                              ("tiny-gpt", ROWS, "full", {"length": "9999"}, "more than the 256"), ("tiny-gpt", ROWS[:3], "full", {}, "rows leave"), ("tiny-gpt", ROWS, "full", {"lr": "fast"}, "is no number")])
def test_what_does_not_fit_is_said_before_the_start(opened, base_name, rows, method, typed, said):
    page = opened()
    page.base.choice.value = base_name
    ready_rows = jsonl(rows)
    upload(page, ready_rows)
    page.settings.method.value = method
    for key, text in {"share": "0.25", **typed}.items(): page.settings.fields[key].value = text
    assert said in start(page) and not jobs.list_jobs(page.root) and not page.settings.go.disabled


def test_a_start_that_fails_leaves_no_folder(opened, base, monkeypatch):
    page = opened()
    ready(page, base)
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(jobs, "start", full)
    assert "disk is full" in start(page) and list(page.root.glob("*/")) == [] and not page.settings.go.disabled


# Runs and pages

def test_pages_come_and_go_while_a_run_lives(opened, base):
    first = opened()
    ready(first, base, epochs="400", method="lora")
    first.settings.start()
    assert first.settings.go.disabled, "one click, one run"
    first.settle(lambda: first.runs.now and first.runs.now.step >= 2)
    folder = first.runs.folder()
    first.close()
    second, third = opened(), opened()
    assert second.runs.folder() == third.runs.folder() == folder and held(folder / ".job.lock")
    second.settle(lambda: second.runs.now.step > 2 and "polyline" in second.runs.curve.value)
    assert not second.runs.stops.disabled and second.runs.resumes.disabled and "running" in second.runs.told.value
    second.runs.resume()
    second.settle()
    assert "Another process works" in second.runs.shown
    third.runs.stop()
    second.settle(lambda: second.runs.now.state in ENDED)
    assert second.runs.now.state == "stopped" and second.runs.stops.disabled and not second.runs.resumes.disabled
    third.compare.compare()
    third.settle()
    assert third.compare.told.value and not third.compare.shown, "a stopped run can be asked"


def test_the_list_keeps_what_was_chosen(opened, base, here):
    page = opened()
    ready(page, base)
    for _ in range(3): start(page)
    newest = page.runs.list.value
    assert newest.endswith("rows-full-3") and len(page.runs.list.options) == 3
    page.runs.list.value = page.runs.list.options[2][1]
    assert page.runs.view.folder.name == "rows-full"
    page.chat.turns = [("user", "hello")]
    start(page)
    assert page.runs.view.folder.name == "rows-full-4" and page.chat.turns == []
    shutil.rmtree(page.runs.view.folder)
    page.tick(0)
    page.tick(0)
    assert page.runs.view.folder.name == "rows-full-3" and len(page.runs.list.options) == 3
    for s in jobs.list_jobs(page.root): shutil.rmtree(s.path)
    page.tick(0)
    page.tick(0)
    assert page.runs.view is None and page.runs.curve.value == "" and page.runs.told.value == ""
    for press in (page.runs.stop, page.runs.resume, page.compare.compare, page.compare.ask, page.chat.send): press()
    assert ["no run yet" in s.shown for s in (page.runs, page.compare, page.chat)] == [True] * 3, [s.shown for s in (page.runs, page.compare, page.chat)]


def test_a_run_that_is_not_finished_cannot_be_asked(opened, base):
    page = opened()
    (page.root / "new").mkdir()
    (page.root / "new" / SPEC).write_text("{}")
    page.tick(0)
    page.chat.text.value = "hello"
    page.chat.send()
    page.settle()
    assert "fault" in page.chat.said.value and page.chat.turns == [] and page.chat.text.value == "hello", "the question is given back"


def test_measured_beside_the_estimate(opened, base, here, monkeypatch):
    asked = []
    module = SimpleNamespace(estimate=lambda plan, data, **settings: asked.append(plan) or SimpleNamespace(parameters=1000, trainable=10, memory_mb=321.0, cpu_seconds=3.0, seconds=4.0, parts={EVIL: 1.0}))
    monkeypatch.setattr(studio_form, "later", lambda name: module)
    page = opened()
    ready(page, base)
    page.settings.estimate()
    page.settle()
    assert "321 MB" in page.settings.estimated.value and not jobs.list_jobs(page.root)
    harmless(page)
    start(page)
    page.tick(0)
    assert read_json(page.runs.folder() / "estimate.json")["memory_mb"] == 321.0 and "<td>321</td>" in page.runs.measured.value
    assert len(asked) == 1, "what the reader has just asked for isn't reckoned again"
    page.settings.fields["lr"].value = "1e-2"
    assert page.settings.estimated.value == "", "an estimate of other settings is gone"
    start(page)
    assert len(asked) == 2 and asked[1].lr == 1e-2, "nor is it taken for one of these"


def test_a_run_of_several_processes_is_measured_whole(tmp_path):
    "Memory at the highest peak of all of them, time without what lay between."
    events = EventFile(tmp_path / EVENTS)
    for step, peak in ((0, 900.0), (3, 700.0)):
        events.write("begin", step=step, trainable=5)
        for k in (1, 2, 3): events.write("progress", step=step + k, loss=1.0)
        events.write("end", state="stopped", step=step + 3, peak_mb=peak, cpu_seconds=step + 7.0)
    events.close()
    one, other = RunView(tmp_path), RunView(tmp_path)
    one.read()
    found = read_events(tmp_path / EVENTS)[0]
    for k in range(len(found)): other.told, other.events = found[:k + 1], lived(found[k:k + 1], other.events)
    assert one.events == other.events == lived(found), "event by event, or all at once"
    assert all(f"<td>{n}</td>" in one.measured({}) for n in (900, 17, 5)) and "to the end" in one.measured({})


def test_the_estimate_counts_what_the_run_then_moves(opened, base, here):
    page = opened()
    ready(page, base)
    page.settings.estimate()
    page.settle()
    assert re.search(r"\d MB", page.settings.estimated.value), page.settings.shown
    start(page)
    page.tick(0)
    folder = page.runs.folder()
    view = RunView(folder)
    view.read()
    assert read_json(folder / "estimate.json")["trainable"] == view.last("begin")["trainable"]


def test_taken_away(opened, base, here, monkeypatch, tmp_path):
    archive = tmp_path / "out.zip"
    archive.write_bytes(b"PK")
    asked = []
    module = SimpleNamespace(export_run=lambda run, out, kind: asked.append((run, out, kind)) or archive, code_of=lambda run: f"finetune(Plan(base={EVIL!r}))", write_samples=lambda folder: [])
    monkeypatch.setattr(studio, "later", lambda name: module)
    page = opened()
    ready(page, base)
    start(page)
    page.export.export("adapter")
    page.export.show()
    page.settle()
    assert asked == [(page.runs.folder(), page.root / "exports" / "rows-full-adapter", "adapter")] and 'download="out.zip"' in page.export.told.value and "finetune(Plan" in page.export.code.value
    harmless(page)
    def refuses(*args): raise BookError("There is no adapter: export the run as merged.")
    module.export_run = refuses
    page.export.export("adapter")
    page.settle()
    assert page.export.shown == "There is no adapter: export the run as merged."


# Talking

def test_a_conversation(opened, base, here, monkeypatch):
    page, asked = opened(), []
    rows = [{"messages": [{"role": "user", "content": f"cat {i}?"}, {"role": "assistant", "content": "meow"}]} for i in range(20)]
    ready(page, base, rows, epochs="2")
    start(page)
    monkeypatch.setattr(studio, "asked_row", lambda format, text, turns=(): asked.append((format, text, list(turns))) or asked_row(format, text, turns))
    for text in ("cat?", "dog?"):
        page.chat.text.value, page.chat.most.value = text, 8
        page.chat.send()
        assert page.chat.told.value.endswith("…</div>") and page.chat.text.value == ""
        page.settle()
    format, text, turns = asked[-1]
    assert (format, text) == ("chat", "dog?") and [r for r, _ in turns] == ["user", "assistant"] and turns[0][1] == "cat?"
    assert [r for r, _ in page.chat.turns] == ["user", "assistant"] * 2
    page.chat.text.value = "cat " * 500
    page.chat.send()
    page.settle()
    assert "shorten it" in page.chat.shown and len(page.chat.turns) == 4 and page.chat.text.value.startswith("cat")
    page.chat.text.value = "  "
    page.chat.send()
    assert "nothing to answer" in page.chat.shown and len(page.chat.turns) == 4
    page.chat.text.value = "cat?"
    page.chat.send()
    page.chat.clear()
    page.settle()
    assert page.chat.turns == [] and page.chat.told.value == "", "an old conversation's answer isn't shown in a new one"


def test_labels_are_named_with_their_probabilities(opened, here):
    page = opened()
    page.base.choice.value = "tiny-bert"
    upload(page, b"text,label\n" + b"".join(f"the {c} film {i},{c}\n".encode() for i in range(16) for c in ("good", "bad")), "films.csv")
    page.settings.method.value = "full"
    for key, text in {"epochs": "2", "lr": "1e-3", "share": "0.3"}.items(): page.settings.fields[key].value = text
    start(page)
    page.compare.compare()
    page.chat.text.value = page.compare.prompt.value = "the good film 99"
    page.chat.send(), page.compare.ask()
    page.settle()
    shares = [float(x) for x in re.findall(r"([\d.]+)%", page.chat.turns[-1][1])]
    assert len(shares) == 2 and abs(sum(shares) - 100) < 0.2 and shares == sorted(shares, reverse=True)
    assert "always the most frequent" in page.compare.told.value and "%" in page.compare.own.value and not page.compare.shown


# Thread, clock, faults

def test_a_fault_of_the_program_is_said_and_noted_once(opened, base, here):
    page = opened()
    ready(page, base)
    start(page)
    def broken(now): raise ZeroDivisionError(EVIL)
    page.runs.view.html, page.runs.now = broken, None
    for _ in range(5): page.tick(0)
    assert "ZeroDivisionError" in page.runs.shown and FAULTS in page.runs.shown
    assert (page.root / FAULTS).read_text().count("Traceback") == 1
    page.compare.think("…", lambda: 1 / 0, lambda result: None)
    page.settle()
    assert "ZeroDivisionError" in page.compare.shown and (page.root / FAULTS).read_text().count("Traceback") == 2
    page.compare.think("…", lambda: 1, lambda result: {}["what came can't be shown"])
    page.settle()
    assert "KeyError" in page.compare.shown
    harmless(page)


def test_only_the_side_of_the_page_calls(opened):
    thinker, callers = Thinker(), []
    thinker.do(lambda: thinker.say(lambda: callers.append(threading.current_thread())), lambda _: callers.append(threading.current_thread()))
    def fails(): raise KeyboardInterrupt
    thinker.do(fails, fails=lambda e: callers.append(threading.current_thread()))
    while thinker.open: thinker.deliver()
    thinker.close()
    assert callers == [threading.main_thread()] * 3


def test_the_clock_of_a_loop(opened, base):
    async def page_in_a_loop():
        page = opened()
        page.show()
        page.base.choice.value, page.base.other.value = "other", str(base)
        while page.base.facts is None: await asyncio.sleep(0.02)
        clock = page.clock
        again = opened()
        again.show()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert clock.cancelled() and studio.OPEN[again.root] is again, "the same kernel opened the same studio again"
        again.tick = lambda: 1 / 0
        await asyncio.sleep(0.3)
        assert not again.clock.done() and "ZeroDivisionError" in (again.root / FAULTS).read_text()
        again.close()
        assert again.root not in studio.OPEN
    with ThreadPoolExecutor(1) as pool: pool.submit(lambda: asyncio.run(asyncio.wait_for(page_in_a_loop(), 60))).result()    # this thread may have a loop already, of a browser


def test_a_folder_that_cannot_be_had(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BookError, match="choose another folder"): Studio(tmp_path / "file" / "runs")


# Views

def test_a_view_of_whatever_lies_in_a_folder(tmp_path):
    view = RunView(tmp_path)
    assert not view.read() and view.curves() == {"training": ([], []), "held out": ([], [])} and view.samples() == "" and view.measured({}) == "" and view.seconds() is None
    events = [{"time": 1.0, "kind": "begin", "step": 0, "steps": 4, "trainable": 5}, {"time": 2.0, "kind": "progress", "step": 1, "loss": 2.0}, {"time": 2.5, "kind": "progress", "step": 2, "loss": float("nan")},
              {"time": 3.0, "kind": "begin", "step": 1, "steps": 4}, {"time": 5.0, "kind": "progress", "step": 2, "loss": 1.0}, {"time": 6.0, "kind": "note", "step": 2, "text": EVIL}, {"time": 7.0, "kind": "end", "step": 2, "state": "stopped", "why": EVIL, "peak_mb": 9.0}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\nrubbish\n[]\n" for e in events))
    assert view.read() and view.curves()["training"] == ([1, 2], [2.0, 1.0]) and view.seconds() == 4.0
    drawn = curve_svg({"training": ([1, 2, 3], [2.0, float("nan"), 1.0])}, 4)
    assert "nan" not in drawn.split("</svg>")[0].replace("training nan", "") and curve_svg({"training": ([1], [float("nan")])}) == ""
    assert [duration(s) for s in (None, 0.25, 42, 150, 7300)] == ["–", "0.2 s", "42 s", "2 min 30 s", "2 h 1 min"]


def test_what_a_judge_shows_is_bounded():
    raw = b"".join(b'{"prompt": "%d", "completion": 3}\n' % i for i in range(3000))
    assert len(judged_html(judge("a.jsonl", raw)).partition("<a ")[0]) < 50_000
    with pytest.raises(BookError, match="no file"): judge_path("")
    assert model_facts("tiny-gpt").writes and not model_facts("tiny-bert").writes
    with pytest.raises(BookError, match="No model is named"): model_facts(" ")


def test_imports_that_are_not_there():
    assert studio_form.later("no_such_module") is None and studio_form.later("jobs") is jobs
