"""What the chapter can't show: a real package index that lies, breaks off or isn't there, and streams and samplers on any shape."""
import hashlib
import io
import multiprocessing
import os
import shutil
import socket
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook import corpora
from llmbook.corpora import (CATALOGUE, BookError, Entry, TokenStream, WindowSampler, documents, extract_members, fetch, lookup, news_texts, rows,
                             split_documents, synthetic_documents, write_stream)

many = settings(max_examples=60, deadline=None)


def sentence(call) -> str:
    with pytest.raises(BookError) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) > 30
    return str(e.value)


def wheel(folder: Path, text: str) -> Path:
    "A wheel called toytext, with one text in it."
    path = folder / "toytext-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("toytext/a.txt", text)
        z.writestr("toytext-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toytext\nVersion: 1.0\n")
        z.writestr("toytext-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("toytext-1.0.dist-info/RECORD", "")
    return path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture
def index(tmp_path, monkeypatch):
    "A package index on this machine that pip asks, an empty cache, and the catalogue's entry `toy`."
    served = tmp_path / "index" / "simple" / "toytext"
    served.mkdir(parents=True)
    path = wheel(served, "Some text.\n" * 400)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "index")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [n for n in os.environ if n.startswith("PIP_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("LLMBOOK_CACHE", str(tmp_path / "cache"))
    entry = Entry("text", "a toy", "none", "toytext", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size, True, ("toytext/a.txt",))
    monkeypatch.setitem(CATALOGUE, "toy", entry)
    yield path
    server.shutdown()


def cached() -> list[str]: return sorted(p.name for p in corpora.cache_dir().iterdir()) if corpora.cache_dir().is_dir() else []


def test_fetched_once_then_offline(index, monkeypatch):
    folder = fetch("toy", progress=False)
    assert (folder / "a.txt").read_text().startswith("Some text.")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert fetch("toy", progress=False) == folder and cached() == [folder.name]


def test_an_archive_with_another_hash_is_never_opened(index, monkeypatch):
    good = index.read_bytes()
    wheel(index.parent, "Something else.")
    opened = []
    monkeypatch.setattr(corpora, "extract_members", lambda *a: opened.append(a))
    assert "sha256" in sentence(lambda: fetch("toy", progress=False)) and opened == [] and cached() == []
    monkeypatch.undo()
    assert index.exists() and good


def test_a_second_try_works(index):
    good = index.read_bytes()
    index.write_bytes(good[:-200])
    sentence(lambda: fetch("toy", progress=False))
    assert cached() == []
    index.write_bytes(good)
    assert (fetch("toy", progress=False) / "a.txt").is_file()


def test_a_download_that_breaks_off(index, monkeypatch):
    "The server promises the whole file and hangs up half way."
    whole = index.read_bytes()

    class Breaks(Quiet):
        def do_GET(self):
            if not self.path.endswith(".whl"): return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[:len(whole) // 2])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Breaks, directory=str(index.parents[2])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    good_index = os.environ["PIP_INDEX_URL"]
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    sentence(lambda: fetch("toy", progress=False))
    assert cached() == []
    server.shutdown()
    monkeypatch.setenv("PIP_INDEX_URL", good_index)
    assert fetch("toy", progress=False).is_dir()


def test_no_network_and_an_empty_cache(index, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{s.getsockname()[1]}/simple")
    assert "network" in sentence(lambda: fetch("toy", progress=False)) and cached() == []


def test_a_full_disk(index, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(corpora, "extract_members", full)
    assert "No space left" in sentence(lambda: fetch("toy", progress=False)) and cached() == []
    monkeypatch.undo()


def test_a_member_that_is_gone_or_changed(index, monkeypatch):
    entry = CATALOGUE["toy"]
    monkeypatch.setitem(CATALOGUE, "toy", Entry(**{**vars(entry), "members": ("toytext/b.txt",)}))
    assert "toytext/b.txt" in sentence(lambda: fetch("toy", progress=False))
    monkeypatch.setitem(CATALOGUE, "toy", Entry(**{**vars(entry), "hashes": {"a.txt": "0" * 64}}))
    assert "a.txt" in sentence(lambda: fetch("toy", progress=False)) and cached() == []


def _fetch_toy(entry, out):
    CATALOGUE["toy"] = entry
    out.put(str(fetch("toy", progress=False)))


def test_two_processes_fetch_at_once(index):
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    both = [context.Process(target=_fetch_toy, args=(CATALOGUE["toy"], out)) for _ in range(2)]
    for p in both: p.start()
    for p in both: p.join(60)
    assert [p.exitcode for p in both] == [0, 0] and out.get() == out.get() and len(cached()) == 1


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt"])
def test_no_member_lands_outside(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z: z.writestr(name, "x")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        member = tarfile.TarInfo(name)
        member.size = 1
        t.addfile(member, io.BytesIO(b"x"))
    for archive in ("a.zip", "a.tar.gz"): assert "outside" in sentence(lambda: extract_members(tmp_path / archive, (name,), out))
    assert list(out.iterdir()) == [] and not (tmp_path / "evil.txt").exists()


def test_a_link_in_an_archive_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        member = tarfile.TarInfo("p/evil.txt")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(member)
    sentence(lambda: extract_members(tmp_path / "a.tar.gz", ("p/evil.txt",), out))
    assert list(out.iterdir()) == []


def test_wrong_names_are_sentences():
    assert "shakespeare" in sentence(lambda: lookup("shakespere"))
    assert "smollm2-135m-instruct" in sentence(lambda: fetch("qqq"))
    assert "not a text" in sentence(lambda: documents("boolq"))
    assert "not a labelled set" in sentence(lambda: rows("shakespeare"))
    assert "made on the spot" in sentence(lambda: fetch("synthetic"))


def test_a_hub_id_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "hub" in sentence(lambda: fetch("hf:nobody/nothing", tmp_path)).lower()


@many
@given(st.lists(st.text(max_size=8), max_size=40), st.floats(0, 0.45), st.floats(0, 0.45), st.integers(0, 5))
def test_splits_part_documents_by_content(docs, valid, test, seed):
    parts = split_documents(docs, valid, test, seed)
    assert sorted(d for p in parts for d in p) == sorted(docs)
    assert not set(parts.train) & (set(parts.valid) | set(parts.test)) and not set(parts.valid) & set(parts.test)
    assert [sorted(p) for p in parts] == [sorted(p) for p in split_documents(docs[::-1], valid, test, seed)]


def test_shares_are_what_was_asked_for():
    n = 4000
    parts = split_documents(map(str, range(n)), 0.1, 0.2)
    for share, docs in ((0.1, parts.valid), (0.2, parts.test)): assert abs(len(docs) - n * share) < 5 * (n * share * (1 - share)) ** 0.5
    sentence(lambda: split_documents(["a"], 0.7, 0.5))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("abcdé", max_size=12), min_size=1, max_size=12), st.sampled_from([256, 70_000]))
def test_a_stream_gives_back_what_was_written(tmp_path_factory, docs, eot):
    stream = write_stream(tmp_path_factory.mktemp("s") / "s", docs, lambda d: list(d.encode()), eot, eot + 1, progress=False)
    assert stream.tokens.tolist() == [t for d in docs for t in (*d.encode(), eot)] and stream.tokens.dtype.itemsize == (2 if eot < 1 << 16 else 4)
    ends = [*stream.starts[1:].tolist(), len(stream)]
    assert [bytes(stream.tokens[a:b - 1].tolist()).decode() for a, b in zip(stream.starts, ends)] == docs
    stream.verify()


def test_a_damaged_stream_is_named(tmp_path):
    make = lambda: write_stream(tmp_path / "s", ["abc", "de"], lambda d: list(d.encode()), 256, 257, progress=False)
    make()
    tokens = tmp_path / "s" / "tokens.bin"
    raw = tokens.read_bytes()
    tokens.write_bytes(raw[:-2])
    assert "cut short" in sentence(lambda: TokenStream(tmp_path / "s"))
    tokens.write_bytes(b"\1" + raw[1:])
    assert "changed" in sentence(TokenStream(tmp_path / "s").verify)
    (tmp_path / "s" / "stream.json").write_text("{")
    assert "no token stream" in sentence(lambda: TokenStream(tmp_path / "s"))
    assert len(make()) == 7


def test_a_failing_write_leaves_the_old_stream(tmp_path):
    write_stream(tmp_path / "s", ["abc"], lambda d: list(d.encode()), 256, 257, progress=False)
    assert "vocabulary" in sentence(lambda: write_stream(tmp_path / "s", ["xyz"], lambda d: [999], 256, 257, progress=False))
    assert "empty" in sentence(lambda: write_stream(tmp_path / "s", [], list, 256, 257, progress=False))
    assert len(TokenStream(tmp_path / "s")) == 4 and [p.name for p in tmp_path.iterdir()] == ["s"]


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 300), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(0, 60))
def test_a_sampler_visits_each_window_once_and_resumes(tmp_path_factory, n, context, batch, seed, before):
    stream = write_stream(tmp_path_factory.mktemp("s") / "s", ["x" * (n - 1)], lambda d: list(range(len(d))), n - 1, n, progress=False)
    one = WindowSampler(stream, context, 1, seed)
    starts = [int(one.next()[0, 0]) for _ in range(one.windows)]
    assert len(set(starts)) == one.windows and all((s - starts[0]) % context == 0 for s in starts)
    sampler, again = WindowSampler(stream, context, batch, seed), WindowSampler(stream, context, batch)
    for _ in range(before): sampler.next()
    again.load_state_dict(sampler.state_dict())
    for _ in range(5): assert (sampler.next() == again.next()).all()
    batch_now = sampler.next()
    assert batch_now.shape == (batch, context + 1) and (np.diff(batch_now[:, :context]) == 1).all()


def test_a_stream_that_is_too_short(tmp_path):
    stream = write_stream(tmp_path / "s", ["abc"], lambda d: list(d.encode()), 256, 257, progress=False)
    assert "too few" in sentence(lambda: WindowSampler(stream, 100, 1))


def test_the_synthetic_corpus_needs_nothing(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert documents("synthetic") == synthetic_documents(400) and len(set(synthetic_documents(50))) == 50


def test_counting_bytes_while_folders_come_and_go(tmp_path):
    "pip makes and removes folders while its progress is measured."
    done = threading.Event()

    def churn():
        while not done.is_set():
            inner = tmp_path / "a" / "b"
            inner.mkdir(parents=True)
            (inner / "f").write_bytes(b"x" * 10)
            shutil.rmtree(tmp_path / "a")

    worker = threading.Thread(target=churn)
    worker.start()
    try: assert all(0 <= corpora._bytes_in(tmp_path) <= 10 for _ in range(2000))
    finally:
        done.set()
        worker.join()


def test_news_have_a_topic_and_a_part(tmp_path):
    folder = corpora.entry_folder("reuters-r8", tmp_path)
    folder.mkdir(parents=True)
    for part, lines in (("train", "earn\tprofit up reuter \nship\tport closed reuter \n"), ("test", "earn\tloss reuter \n")): (folder / f"reuters-r8-{part}.tab").write_text("Category\tText\nd\tstring\nclass\t\n" + lines)
    assert [(r["label"], r["part"]) for r in news_texts(tmp_path)] == [("earn", "train"), ("ship", "train"), ("earn", "test")]
    assert rows("reuters-r8", tmp_path)[1] == {"text": "port closed reuter", "label": "ship"}
