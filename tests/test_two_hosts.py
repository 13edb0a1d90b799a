"Two hosts, as two network namespaces joined by a virtual cable: the processes of one are killed in mid-step, and training ends as if nothing had been."
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmbook.failures import Job, ranks_of, torchrun
from llmbook.training import read_log

STEPS, PORT = 30, 29577
A, B = "10.77.1.1", "10.77.1.2"

# What each rank runs: the book's own command, and a note of every batch that is drawn.
RANK = """
import hashlib, json, os, sys
from llmbook import corpora
from llmbook.cli import main

folder, drawn = sys.argv.pop(1), corpora.WindowSampler.next
def noted(sampler):
    where, batch = sampler.state_dict(), drawn(sampler)
    line = {"process": os.getpid(), "epoch": where["epoch"], "position": where["position"], "batch": hashlib.sha256(batch.tobytes()).hexdigest()}
    with open(f"{folder}/{os.environ['RANK']}.jsonl", "a") as out: out.write(json.dumps(line) + "\\n")
    return batch
corpora.WindowSampler.next = noted
main(sys.argv[1:])
"""


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode: raise OSError(done.stderr.strip())
    return done.stdout


class Hosts:
    "Two namespaces with an address each; on leaving the `with` block they are gone, and all that ran in them."

    def __init__(self, tag: str = ""): self.names = {A: f"llmbook-{os.getpid()}{tag}-a", B: f"llmbook-{os.getpid()}{tag}-b"}

    def __enter__(self):
        try:
            for name in self.names.values():
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", self.names[A], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.names[B])
            for address, name in self.names.items():
                ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
        except BaseException: self.__exit__(); raise
        return self

    def pids(self, host: str) -> set[int]: return {int(pid) for pid in ip("netns", "pids", self.names[host]).split()}

    def on(self, host: str, command: list[str]) -> list[str]: return ["ip", "netns", "exec", self.names[host], *command]

    def __exit__(self, *_):
        for name in self.names.values():
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split(): kill(int(pid))
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def kill(pid: int):
    try: os.kill(pid, signal.SIGKILL)
    except ProcessLookupError: pass


@pytest.fixture(scope="module")
def hosts():
    if shutil.which("ip") is None:
        message = "no ip command on this machine: install iproute2"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    try: made = Hosts().__enter__()
    except OSError as e: pytest.skip(f"network namespaces aren't permitted here: {e}")
    try: yield made
    finally: made.__exit__()


class Training(Job):
    "A run of the book's command on both hosts."

    def __init__(self, hosts: Hosts, folder: Path, data: Path):
        folder.mkdir()
        super().__init__(f"{folder.name}-{os.getpid()}", folder / "said.txt", GLOO_SOCKET_IFNAME="eth0", TP_SOCKET_IFNAME="eth0")
        self.hosts, self.folder, self.run_dir = hosts, folder, folder / "run"
        (folder / "rank.py").write_text(RANK)
        shutil.copytree(data, self.run_dir / "data") if data.is_dir() else None
        self.program = [str(folder / "rank.py"), str(folder), "pretrain", "--mesh", "dp=2", "--run-dir", str(self.run_dir), "--data", str(data.parent / "text.txt"), "--vocab-size", "300", "--steps", str(STEPS),
                        "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--context", "32", "--batch-size", "4", "--precision", "fp32"]

    def start_on(self, host: str): return self.start(self.hosts.on(host, torchrun(self.program, 1, self.name, hosts=2, rendezvous=f"{A}:{PORT}", address=host)))

    def start_both(self): return self.start_on(A), self.start_on(B)

    def step(self) -> int: return max((row["step"] for row in read_log(self.run_dir / "log.jsonl") if "loss" in row), default=0)

    def rank_on(self, host: str) -> int | None: return next((pid for pid in ranks_of(self.name).values() if pid in self.hosts.pids(host)), None)

    def kill_host(self, host: str):
        "Everything on a host at once, the agent first, as a power cut does."
        agents = [a.pid for a in self.agents]
        for pid in sorted(self.hosts.pids(host), key=lambda pid: pid not in agents): kill(pid)

    def weights(self) -> str: return hashlib.sha256((self.run_dir / "model/model.safetensors").read_bytes()).hexdigest()

    def losses(self) -> dict: return {row["step"]: row["loss"] for row in read_log(self.run_dir / "log.jsonl") if "loss" in row}

    def attempts(self, rank: int) -> list[list[dict]]:
        "The batches that a rank drew, process by process."
        found = []
        for line in map(json.loads, (self.folder / f"{rank}.jsonl").read_text().splitlines()):
            if not found or line["process"] != found[-1][-1]["process"]: found.append([])
            found[-1].append(line)
        return found


def where(line: dict) -> tuple: return line["epoch"], line["position"]


def effective(attempts: list[list[dict]]) -> list[tuple]:
    "What was trained on: of each later process all, of each earlier one what came before the place where the next took up."
    order = []
    for lines in attempts: order = [line for line in order if where(line) < where(lines[0])] + lines
    return [(*where(line), line["batch"]) for line in order]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A text, and the tokens that an undisturbed run has made of it."
    folder = tmp_path_factory.mktemp("two-hosts")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(300)]
    (folder / "text.txt").write_text("<|endoftext|>".join(" ".join(rng.choices(words, k=3000)) for _ in range(8)))
    return folder / "data"


@pytest.fixture(scope="module")
def calm(hosts, data):
    "The run that nobody harms."
    with Training(hosts, data.parent / "calm", data) as run:
        run.start_both()
        assert run.wait(400) == [0, 0], run.said()
    shutil.copytree(run.run_dir / "data", data)
    return run


def as_if_nothing_had_been(run: Training, calm: Training):
    "The same weights, the same losses, and every batch trained on once and in order."
    assert run.weights() == calm.weights()
    assert run.losses() == calm.losses() and list(run.losses()) == list(range(1, STEPS + 1))
    for rank in (0, 1):
        (expected,) = calm.attempts(rank)
        assert effective(run.attempts(rank)) == [(*where(line), line["batch"]) for line in expected]
        assert len(expected) == STEPS and len(run.attempts(rank)) > 1


def harmed(run: Training, rng: random.Random, host: str, power_cut: bool = False):
    "Kill what trains on a host, or the whole host, at a random moment of a random step."
    after, moment = rng.randint(1, STEPS - 5), rng.uniform(0, 0.1)
    run.until(lambda: run.step() >= after, 120)
    time.sleep(moment)
    if power_cut: return run.kill_host(host)
    kill(run.until(lambda: run.rank_on(host), 30))


def test_a_host_loses_its_rank_in_mid_step(hosts, calm, data):
    with Training(hosts, data.parent / "once", data) as run:
        run.start_both()
        harmed(run, random.Random(0), B)
        assert run.wait(400) == [0, 0], run.said()
    as_if_nothing_had_been(run, calm)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_kills_at_random_moments(hosts, calm, data, seed):
    rng = random.Random(seed)
    with Training(hosts, data.parent / f"seed-{seed}", data) as run:
        run.start_both()
        harmed(run, rng, rng.choice([A, B]))
        assert run.wait(400) == [0, 0], run.said()
    as_if_nothing_had_been(run, calm)


@pytest.mark.slow
def test_a_host_goes_and_comes_back(hosts, calm, data):
    with Training(hosts, data.parent / "back", data) as run:
        first, second = run.start_both()
        harmed(run, random.Random(20), B, power_cut=True)
        run.until(lambda: second.poll() is not None, 30)
        run.start_on(B)
        assert run.wait(400)[0] == 0 and run.agents[2].returncode == 0 and second.returncode == -signal.SIGKILL, run.said()
    as_if_nothing_had_been(run, calm)


@pytest.mark.slow
def test_without_its_rendezvous_the_job_ends_and_the_same_command_goes_on(hosts, calm, data):
    with Training(hosts, data.parent / "again", data) as run:
        first, second = run.start_both()
        harmed(run, random.Random(30), A, power_cut=True)
        codes = run.wait(400)
        assert codes[0] == -signal.SIGKILL and codes[1] not in (0, -signal.SIGKILL), run.said()
        assert not ranks_of(run.name)
        run.start_both()
        assert run.wait(400)[2:] == [0, 0], run.said()
    as_if_nothing_had_been(run, calm)


def test_nothing_is_left_of_the_hosts_however_the_block_ends(hosts):
    with pytest.raises(RuntimeError, match="on purpose"):
        with Hosts("other") as other:
            sleeper = subprocess.Popen(other.on(B, [sys.executable, "-c", "import time; time.sleep(600)"]))
            while sleeper.pid not in other.pids(B): time.sleep(0.02)
            raise RuntimeError("on purpose")
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not set(other.names.values()) & set(ip("netns", "list").split())
