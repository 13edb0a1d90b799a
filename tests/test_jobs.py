"""Jobs as a front meets them: killed, stopped, queued, out of room, or lied to; what is shown must be true, and no run lost."""
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import small_base

from llmbook import job_training, jobs
from llmbook.checkpointing import newest_checkpoint
from llmbook.cli import main
from llmbook.corpora import BookError
from llmbook.finetuning import Plan, finetune
from llmbook.gpt import GPT
from llmbook.job_folder import (
    ENDED,
    EVENTS,
    LOCK,
    LOG,
    ROOM,
    SPEC,
    STOP,
    TURN,
    EventFile,
    ahead,
    held,
    line_up,
    read_events,
    read_json,
    status,
    take,
    write_turn,
)
from llmbook.job_training import keep_copy, read_copy, write_spec
from llmbook.task_data import read_task

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")

ROWS = "".join(json.dumps({"prompt": f"The {('cat', 'dog')[i % 2]} number {i} says", "completion": (" meow", " woof")[i % 2]}) + "\n" for i in range(24)).encode()
SETTINGS, EPOCHS = dict(eval_every=12, checkpoint_every=4), 16
PARENT = """
import os, signal, socket, sys, traceback
from pathlib import Path
import llmbook.job_training
from llmbook import jobs
server = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    folder, fds, *_ = socket.recv_fds(server, 4096, 1)
    if not folder: break
    if os.fork(): os.close(fds[0]); continue
    os.setsid()
    server.close()
    log = os.open(Path(folder.decode()) / jobs.LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    try: jobs.be_worker(Path(folder.decode()), fds[0])
    finally: sys.stdout.flush(), os._exit(0)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return small_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def parent():
    "A process that has imported everything, and forks workers: importing takes seconds, and a test kills many."
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(theirs.fileno())], pass_fds=(theirs.fileno(),), env={**os.environ, "OMP_NUM_THREADS": "1"})
    theirs.close()
    yield ours
    ours.close()
    process.wait(30)


@pytest.fixture
def forked(parent, monkeypatch):
    "Workers come from that process, with the lock in their hands as from `spawn`."
    monkeypatch.setattr(jobs, "spawn", lambda folder, lock: socket.send_fds(parent, [str(folder).encode()], [lock]))


@pytest.fixture
def root(tmp_path):
    "A folder for runs; whatever still works in it is ended."
    (tmp_path / "runs").mkdir()
    yield tmp_path / "runs"
    for s in jobs.list_jobs(tmp_path / "runs"): jobs.stop(s.path, now=True)


def plan(base, **kw): return Plan(**{**dict(base=str(base), epochs=EPOCHS, lr=1e-3, precision="fp32", share=0.25), **kw})


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it didn't come so far"
        time.sleep(0.02)
    return found


def deleted(folder):
    "Gone, though its process may write a file into it meanwhile, which whoever deletes by hand meets, too."
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def ended(folder): return until(lambda: (s := status(folder)).state in ENDED and s)


def weights(folder): return GPT.from_pretrained(folder / "model").state_dict()


def same(run, other):
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    for name in a: assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    "The same run by `finetune` alone: its folder and its history, for a number of epochs."
    folder, done = tmp_path_factory.mktemp("alone"), {}
    def run(epochs=EPOCHS):
        if epochs not in done: done[epochs] = finetune(plan(base, epochs=epochs), read_task(ROWS), folder / str(epochs), progress=False, **SETTINGS)
        return folder / str(epochs), done[epochs].history
    return run


# The engine is finetune

def test_a_run_by_the_engine_is_finetune_bit_for_bit(base, root, forked, unbroken):
    seen = jobs.start(plan(base), ROWS, root / "run", **SETTINGS)
    assert seen.state in ("queued", "running")
    events = list(jobs.watch(root / "run"))
    assert events[0]["kind"] == "queued" and events[-1]["kind"] == "end" and events[-1]["state"] == "finished" and events[-1]["peak_mb"] > 50
    alone, history = unbroken()
    same(root / "run", alone)
    told = [e for e in events if e["kind"] == "progress"]
    assert [e["loss"] for e in told] == [r["loss"] for r in history if "loss" in r] and told[-1]["left"] == 0
    assert {"begin", "validation", "sample", "checkpoint"} <= {e["kind"] for e in events}
    assert jobs.start(plan(base), ROWS, root / "run", **SETTINGS).state == "finished" and list(jobs.watch(root / "run")) == events, "a finished run is left as it is"
    here = jobs.run_here(plan(base), ROWS, root / "here", progress=False, **SETTINGS)
    same(root / "here", alone)
    assert here.finished() and status(root / "here").state == "finished"


def test_a_real_process_has_a_session_of_its_own(base, root, unbroken):
    jobs.start(plan(base, epochs=2), ROWS, root / "run", samples=0, **SETTINGS)
    me = until(lambda: read_json(root / "run" / LOCK))
    assert os.getsid(me["pid"]) == me["pid"] != os.getsid(0) and jobs.born(me["pid"]) == me["born"]
    assert held(root / "run" / LOCK) and status(root / "run").state in ("queued", "running")
    with pytest.raises(BookError, match="Another process works"): jobs.resume(root / "run")
    assert ended(root / "run").state == "finished", (root / "run" / LOG).read_text()
    same(root / "run", unbroken(2)[0])


@pytest.mark.parametrize("rows", [b"text,label\n" + b"".join(f"{c} {i},{c}\n".encode() for i in range(20) for c in ("good", "bad")),
                                  json.dumps([{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "meow"}]} for i in range(20)]).encode(),
                                  json.dumps([{"instruction": f"Say {i}", "output": "woof"} for i in range(20)]).encode()], ids=["labelled", "chat", "alpaca"])
def test_every_format_tells_samples(base, root, rows):
    done = jobs.run_here(plan(base, epochs=1, share=0.3), rows, root / "run", progress=False, samples=2)
    samples = [e for e in read_events(root / "run" / EVENTS)[0] if e["kind"] == "sample"]
    assert done.finished() and samples and all(e["asked"] and e["wanted"] and isinstance(e["said"], str) for e in samples)


# Killed

def front(doing):
    "A front end as a process that can be killed."
    pid = os.fork()
    if pid: return pid
    try: doing()
    finally: os._exit(0)


def kill(pid):
    os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)


def lives(folder) -> bool:
    "Whether a run's process lives, by other means than the engine's: the system's list of processes."
    me = read_json(folder / LOCK)
    if not me: return False
    try: state = Path(f"/proc/{me['pid']}/stat").read_text().rpartition(")")[2].split()
    except OSError: return False
    return state[19] == me["born"] and state[0] not in "ZX"


def killed_at_random(base, root, kills, seed, epochs):
    "The worker, the front or both are killed at random moments, from the very start on; after each the state shown is held against the truth."
    rng, folder, seen = random.Random(seed), root / "run", []
    def call():
        jobs.start(plan(base, epochs=epochs), ROWS, folder, samples=0, **SETTINGS)
        for _ in jobs.watch(folder): pass
    step = lambda: status(folder).step if (folder / SPEC).exists() else 0
    while len(seen) < kills:
        victim, goal = rng.choice(["worker", "front", "both"]), max(0, rng.uniform(-1, 1)) * epochs * 2 / kills
        alive, begun, before = None, time.monotonic(), step()
        if not lives(folder): alive = front(call)
        until(lambda: step() >= before + goal or (goal == 0 and time.monotonic() > begun + rng.uniform(0, 0.3)) or (folder / SPEC).exists() and status(folder).state == "finished")
        time.sleep(rng.uniform(0, 0.05))
        if alive and (victim != "worker" or not (folder / SPEC).exists()): kill(alive); alive = None
        if victim != "front" and lives(folder):
            os.kill(read_json(folder / LOCK)["pid"], signal.SIGKILL)
            until(lambda: not held(folder / LOCK), 10)      # its threads end one after another, and the last one frees the lock
            assert status(folder).state in ("lost", "finished"), f"seed {seed}"
            if alive: os.waitpid(alive, 0); alive = None      # it sees the end by itself
        elif (folder / SPEC).exists():
            time.sleep(0.02)
            before, now, after = held(folder / LOCK), status(folder).state, held(folder / LOCK)
            assert before != after or now in (("queued", "running", "finished") if before else ("lost", "finished")), f"seed {seed}"
        if alive: kill(alive)     # the worker wasn't there yet
        seen.append((victim, step()))
        if (folder / SPEC).exists() and status(folder).state == "finished": break
    if not held(folder / LOCK): jobs.start(plan(base, epochs=epochs), ROWS, folder, samples=0, **SETTINGS)
    assert ended(folder).state == "finished", (folder / LOG).read_text()
    return seen


def test_killed_at_random_moments(base, root, forked, unbroken):
    seed = time.time_ns()
    seen = killed_at_random(base, root, 6, seed, EPOCHS)
    assert len(seen) >= 2, f"seed {seed}"
    same(root / "run", unbroken()[0])


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True], ids=["forked", "real processes"])
def test_killed_twenty_times(base, root, unbroken, real, request):
    if not real: request.getfixturevalue("forked")
    seed = time.time_ns()
    seen = killed_at_random(base, root, 20, seed, 200)
    print(seed, seen)
    assert len(seen) >= 12, f"seed {seed}"
    same(root / "run", unbroken(200)[0])


@pytest.mark.slow
def test_killed_twenty_times_in_the_queue(base, root, forked, unbroken):
    "A run that waits for its turn is killed at random moments and lines up again each time; then its turn comes."
    print("seed", seed := time.time_ns())
    rng, run = random.Random(seed), root / "run"
    jobs.start(plan(base, epochs=100_000), ROWS, root / "ahead", samples=0, **SETTINGS)
    until(lambda: status(root / "ahead").state == "running")
    jobs.start(plan(base), ROWS, run, samples=0, **SETTINGS)
    for _ in range(20):
        until(lambda: lives(run))
        time.sleep(rng.uniform(0, 0.5))
        assert status(run).state == "queued" and status(run).why == "1 before it"
        os.kill(read_json(run / LOCK)["pid"], signal.SIGKILL)
        until(lambda: not held(run / LOCK), 10)
        assert status(run).state == "lost" and "before it began" in status(run).why
        jobs.resume(run)
    assert status(root / "ahead").state == "running"
    jobs.stop(root / "ahead")
    assert ended(root / "ahead").state == "stopped" and ended(run).state == "finished"
    same(run, unbroken()[0])


@pytest.mark.slow
def test_a_restarted_kernel_changes_nothing(base, root, tmp_path):
    "A kernel starts a run, is restarted, and shut down; the run goes on."
    from jupyter_client.manager import start_new_kernel
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    manager, client = start_new_kernel(env={**os.environ, "OMP_NUM_THREADS": "1"})
    code = f"from llmbook.jobs import start, status; from llmbook.finetuning import Plan; start(Plan({str(base)!r}, epochs=300, lr=1e-3, precision='fp32', share=0.25), open({str(tmp_path / 'rows.jsonl')!r}, 'rb').read(), {str(root / 'run')!r})"
    assert client.execute_interactive(code, timeout=120)["content"]["status"] == "ok"
    until(lambda: status(root / "run").step > 5, 120)
    manager.restart_kernel(now=False)
    assert status(root / "run").state == "running"
    client.stop_channels(), manager.shutdown_kernel(now=False)
    at = status(root / "run").step
    until(lambda: status(root / "run").step > at)
    jobs.stop(root / "run")
    assert ended(root / "run").state == "stopped"


def test_stopped_by_a_wish_or_a_signal_and_resumed(base, root, forked, unbroken):
    jobs.start(plan(base), ROWS, root / "run", samples=0, **SETTINGS)
    until(lambda: status(root / "run").step >= 4)
    assert jobs.stop(root / "run").state in ("stopping", "stopped")
    first = ended(root / "run")
    assert first.state == "stopped" and f"step-{first.step:06d}" == newest_checkpoint(root / "run" / "checkpoints").name
    jobs.resume(root / "run")
    until(lambda: status(root / "run").step > first.step + 3)
    os.kill(read_json(root / "run" / LOCK)["pid"], signal.SIGTERM)
    assert (second := ended(root / "run")).state == "stopped" and second.step > first.step
    jobs.start(plan(base), ROWS, root / "run", samples=0, **SETTINGS)   # the same call again
    assert ended(root / "run").state == "finished"
    same(root / "run", unbroken()[0])
    steps = [e["step"] for e in jobs.lived(read_events(root / "run" / EVENTS)[0]) if e["kind"] == "progress"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == status(root / "run").step


# No room, bad numbers, changed files

@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets another process's limits")
def test_a_full_disk_leaves_the_last_checkpoint(base, root, forked, unbroken):
    import resource
    jobs.start(plan(base), ROWS, root / "run", samples=0, **SETTINGS)
    until(lambda: status(root / "run").step >= 10)
    pid = read_json(root / "run" / LOCK)["pid"]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (6000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    seen = ended(root / "run")
    assert seen.state == "failed" and "written" in seen.why and "\n" not in seen.why
    assert newest_checkpoint(root / "run" / "checkpoints") and "Traceback" in (root / "run" / LOG).read_text()
    assert [e["kind"] for e in jobs.watch(root / "run")][-1] == "end"
    jobs.resume(root / "run")
    assert ended(root / "run").state == "finished"
    same(root / "run", unbroken()[0])


def test_numbers_that_explode_end_in_a_sentence(base, root):
    with pytest.raises(BookError, match="lower learning rate"): jobs.run_here(plan(base, lr=1e30), ROWS, root / "run", progress=False, spike=None, clip=None)
    seen = status(root / "run")
    assert seen.state == "failed" and "lower learning rate" in seen.why
    assert any("left out" in e.get("text", "") for e in read_events(root / "run" / EVENTS)[0])


@pytest.mark.parametrize("error,said", [(MemoryError(), "Memory ran out"), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "Memory ran out"), (RuntimeError("CUDA out of memory. Tried"), "Memory ran out"),
                                        (OSError(28, "No space left on device"), "disk is full"), (KeyError("lr"), LOG), (BookError("a\nb\n\nc"), "^a b$")])
def test_whatever_goes_wrong_is_one_sentence(root, monkeypatch, error, said):
    (root / "run").mkdir()
    (root / "run" / SPEC).write_text("{}")
    def breaks(*_): raise error
    monkeypatch.setattr(job_training, "carry_out", breaks)
    lock = take(root / "run" / LOCK)
    line_up(root / "run")
    with pytest.raises(type(error)): jobs.take_turn(root / "run", lock, lambda: jobs.train(root / "run"))
    os.close(lock)
    seen = status(root / "run")
    assert seen.state == "failed" and re.search(said, seen.why) and "\n" not in seen.why


def test_a_changed_copy_is_refused(base, root, forked):
    jobs.start(plan(base, epochs=1), ROWS, root / "run", samples=0, **SETTINGS)
    assert ended(root / "run").state == "finished"
    shutil.copytree(root / "run", root / "copy")
    write_turn(root / "copy", 1, 1)
    assert status(root / "copy").state == "lost"
    (root / "copy" / "data.txt").write_bytes(ROWS + b"\n")
    jobs.resume(root / "copy")
    assert "was changed" in ended(root / "copy").why
    spec = read_json(root / "copy" / SPEC)
    for file in ("../run/data.txt", "/etc/passwd"):
        with pytest.raises(BookError, match="outside"): read_copy(root / "copy", {**spec["data"], "file": file}, False)


def test_bad_rows_start_nothing(base, root):
    for rows, said in ((b'{"prompt": "x"}\n', "line 1"), (b"", "fault"), (ROWS[:200].rsplit(b"\n", 1)[0], "more rows")):
        with pytest.raises(BookError, match=said): jobs.start(plan(base), rows, root / "run")
    with pytest.raises(BookError, match="one format"): jobs.start(plan(base), ROWS, root / "run", b"text,label\na,b\nc,d\n")
    with pytest.raises(BookError, match="method"): jobs.start(plan(base, method="magic"), ROWS, root / "run")
    with pytest.raises(BookError, match="holds no job"): jobs.resume(root / "run")
    assert not list(root.iterdir())
    (root / "file").touch()
    with pytest.raises(BookError, match="can't be kept"): jobs.start(plan(base), ROWS, root / "file" / "run")


def test_another_run_is_refused_once_one_has_begun(base, root, monkeypatch):
    write_spec(root / "run", plan(base), ROWS, name="a.jsonl")
    assert write_spec(root / "run", plan(base, lr=1e-2), ROWS)["plan"]["lr"] == 1e-2, "nothing had begun"
    (root / "run" / "config.json").write_text("{}")
    assert write_spec(root / "run", plan(base, lr=1e-2), ROWS, name="b.jsonl")["plan"]["lr"] == 1e-2
    with pytest.raises(BookError, match=r"plan.lr \(0.01 there, 0.02 here\)"): write_spec(root / "run", plan(base, lr=2e-2), ROWS)
    with pytest.raises(BookError, match="data"): write_spec(root / "run", plan(base, lr=1e-2), ROWS + b"\n")
    monkeypatch.chdir(base.parent)
    assert write_spec(root / "relative", plan("model"), ROWS)["plan"]["base"] == str(base), "the process may stand elsewhere"


# The queue

def test_one_trains_at_a_time_in_order(base, root, forked):
    for name in "abc": jobs.start(plan(base, epochs=2), ROWS, root / name, samples=0, **SETTINGS)
    spans = []
    for name in "abc":
        assert ended(root / name).state == "finished"
        events = read_events(root / name / EVENTS)[0]
        spans.append((next(e["time"] for e in events if e["kind"] == "begin"), events[-1]["time"]))
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:])), spans
    table = jobs.compare(root)
    assert [row["run"] for row in table] == list("abc") and {row["state"] for row in table} == {"finished"} and not any(row["what differs"] for row in table)


def test_the_queue_goes_on_past_the_killed_the_stopped_and_the_deleted(base, root, forked):
    jobs.start(plan(base, epochs=4000), ROWS, root / "a", samples=0, **SETTINGS)
    for name in "bcde": jobs.start(plan(base, epochs=2), ROWS, root / name, samples=0, **SETTINGS)
    pids = {name: until(lambda: read_json(root / name / LOCK))["pid"] for name in "abcde"}
    assert until(lambda: status(root / "a").state == "running") and [status(root / n).state for n in "bcde"] == ["queued"] * 4 and len(ahead(root / "e")) == 4
    assert status(root / "e").why == "4 before it"
    os.kill(pids["b"], signal.SIGKILL)
    jobs.stop(root / "c")
    until(lambda: deleted(root / "d"))
    assert until(lambda: status(root / "b").state == "lost") and ended(root / "c").state == "stopped" and "before its turn" in status(root / "c").why
    until(lambda: not Path(f"/proc/{pids['d']}").exists())
    assert status(root / "e").state == "queued" and ahead(root / "e") == ["a"]
    jobs.stop(root / "a", now=True)
    assert ended(root / "a").state == "lost" and ended(root / "e").state == "finished"
    assert [s.name for s in jobs.list_jobs(root)] == list("abce")


def test_tickets_exclude_each_other(root):
    "Many threads line up at once: no ticket twice, and of all that live only one has nobody ahead."
    locks = {}
    def come(i):
        folder = root / f"run{i}"
        folder.mkdir()
        lock = take(folder / LOCK)
        (folder / SPEC).write_text("{}")
        line_up(folder)
        locks[folder] = lock
    threads = [threading.Thread(target=come, args=(i,)) for i in range(16)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(read_json(f / TURN)["ticket"] for f in locks) == list(range(1, 17))
    assert sorted(len(ahead(f)) for f in locks) == list(range(16))
    last = max(locks, key=lambda f: read_json(f / TURN)["ticket"])
    assert jobs.wait_for_turn(last, 16) and jobs.wait_for_turn(last, 0)
    threading.Timer(0.1, lambda: [os.close(lock) for f, lock in locks.items() if f != last]).start()
    assert jobs.wait_for_turn(last, 1, 0.01) and ahead(last) == []
    os.close(locks[last])


def test_those_who_ask_never_see_each_other(root):
    "A lock that nobody holds looks free to all who ask at once, and one that is held looks held."
    lock, stop, wrong = take(root / "lock"), threading.Event(), []
    os.close(lock)
    def ask():
        while not stop.is_set():
            if held(root / "lock"): wrong.append(1)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads: t.start()
    time.sleep(0.3)
    stop.set()
    for t in threads: t.join()
    assert not wrong
    lock = take(root / "lock")
    assert held(root / "lock")
    with pytest.raises(BookError, match="Another process"): take(root / "lock", 0.05)
    os.close(lock)


# Files

@given(st.lists(st.binary(max_size=40), max_size=4), st.lists(st.integers(), max_size=4))
@settings(max_examples=60, deadline=None)
def test_events_survive_whatever_stands_between_them(tmp_path_factory, junk, numbers):
    path = tmp_path_factory.mktemp("events") / EVENTS
    for i, n in enumerate(numbers):
        with open(path, "ab") as f: f.write(junk[i] if i < len(junk) else b"")
        events = EventFile(path)
        events.write("number", n=n)
        events.close()
    found, end = read_events(path)
    assert [e["n"] for e in found if e["kind"] == "number"] == numbers
    assert not path.exists() or end == path.stat().st_size and read_events(path, end) == ([], end)


@given(st.text(max_size=9000), st.integers(1, 10**9))
@settings(max_examples=60, deadline=None)
def test_the_record_has_room_for_any_sentence(tmp_path_factory, why, ticket):
    folder = tmp_path_factory.mktemp("turn")
    write_turn(folder, ticket, 1)
    write_turn(folder, ticket, 1, state="failed", why=why)
    found = read_json(folder / TURN)
    assert (folder / TURN).stat().st_size == ROOM and found["state"] == "failed" and found["ticket"] == ticket and (found["why"] == why or why.startswith(found["why"]) or "?" in found["why"])


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_names_stay_inside(tmp_path_factory, name):
    root = tmp_path_factory.mktemp("names")
    one, two = jobs.new_folder(root, name), jobs.new_folder(root, name)
    assert one.parent == two.parent == root and one != two and one.is_dir() and not one.name.startswith(".")
    entry = keep_copy(b"x", one, "data", name)
    assert [p.name for p in one.iterdir()] == [entry["file"]] and entry["file"].startswith("data.")


def test_a_run_that_was_never_begun_is_lost_and_can_be_resumed(base, root, forked):
    write_spec(root / "run", plan(base, epochs=2), ROWS, samples=0, **SETTINGS)
    assert status(root / "run").state == "lost" and "before it began" in status(root / "run").why
    (root / "run" / TURN).write_text("{broken")
    jobs.stop(root / "run")
    assert not (root / "run" / STOP).exists(), "there is nobody to stop"
    jobs.resume(root / "run")
    assert ended(root / "run").state == "finished"


# The command line

def test_the_commands(base, root, forked, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    call = ["finetune", "--base", str(base), "--data", str(tmp_path / "rows.jsonl"), "--epochs", "3", "--lr", "1e-3", "--precision", "fp32", "--share", "0.25"]
    run = str(root / "run")
    assert main([*call, "--out", run, "--detach"]) == 0 and f"llmbook jobs watch {run}" in capsys.readouterr().out
    assert main(["jobs", "watch", run]) == 0 and "finished" in capsys.readouterr().out.splitlines()[-1]
    assert main([*call, "--out", str(root / "here")]) == 0 and "at best" in capsys.readouterr().out
    same(root / "run", root / "here")
    assert main([*call, "--out", run]) == 0, "a finished run is left as it is, also by the foreground"
    capsys.readouterr()
    assert main(["jobs", "list", str(root)]) == 0 and capsys.readouterr().out.count("finished") == 2
    assert main(["jobs", "list", str(root), "--json"]) == 0 and [s["state"] for s in json.loads(capsys.readouterr().out)] == ["finished"] * 2
    assert main(["jobs", "stop", run]) == 0 and main(["jobs", "resume", run]) == 0 and capsys.readouterr().out.count("finished") == 2
    assert main([*call, "--out", run, "--seed", "3"]) == 2 and "plan.seed (0 there, 3 here)" in capsys.readouterr().err
    assert main(["jobs", "watch", str(root)]) == 2 and main(["jobs", "list", str(tmp_path / "none")]) == 2
    wrong = str(root / "wrong")
    assert main(["finetune", "--base", "tiny-bert", "--data", str(tmp_path / "rows.jsonl"), "--out", wrong, "--share", "0.25", "--detach"]) == 0
    assert main(["jobs", "watch", wrong, "--json"]) == 2 and "decoder" in capsys.readouterr().err
    assert main([*call, "--out", wrong]) == 0, "what never began doesn't stand in the way"


def test_looking_needs_nothing_heavy(root):
    code = "import sys; from llmbook.cli import main; main(['jobs', 'list', sys.argv[1]]); import llmbook.jobs; sys.exit(any(m in sys.modules for m in ('torch', 'plotly', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code, str(root)], check=False, capture_output=True).returncode == 0
