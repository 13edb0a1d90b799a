"What the page on forks can't show: many at once, from several threads, and odd requests."
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch.distributed as dist

from llmbook.corpora import BookError
from llmbook.forks import ForkServer, fork_server
from llmbook.launch import launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are relied on under Linux only")


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "forked_work.py").write_text("import os, sys, time\ndef prints(n): print('x' * n)\ndef ends(code): os._exit(code)\ndef stays(): time.sleep(600)\ndef where(): print(os.getcwd())\n")
    monkeypatch.syspath_prepend(tmp_path)
    server = ForkServer()
    yield server
    server.close()


def alive(pid):
    with suppress(OSError):
        with open(f"/proc/{pid}/stat") as f: return f.read().rpartition(")")[2].split()[0] != "Z"
    return False


def test_codes_come_back_to_whoever_asked(server, tmp_path):
    "Eight threads fork and wait at once; every one gets its own fork's code."
    def ask(code): return server.fork("forked_work:ends", [code], tmp_path / f"{code}.out", dict(os.environ)).wait()
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(ask, range(40))) == list(range(40))


def test_long_requests_and_long_outputs_are_whole(server, tmp_path):
    env = {**os.environ, "LONG": "ä\n" * 60_000}
    assert server.fork("forked_work:prints", [3_000_000], tmp_path / "out", env).wait() == 0
    assert len((tmp_path / "out").read_text()) == 3_000_001


def test_a_fork_begins_where_its_caller_stands(server, tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert server.fork("forked_work:where", [], tmp_path / "out", dict(os.environ)).wait() == 0
    assert (tmp_path / "out").read_text().strip() == str(tmp_path / "inside")


@pytest.mark.parametrize("function", ["forked_work:nothing", "no_such_module:f", "forked_work", ":"])
def test_what_cannot_be_called_fails_in_its_own_output(server, tmp_path, function):
    assert server.fork(function, [], tmp_path / "out", dict(os.environ)).wait() == 1
    assert "Error" in (tmp_path / "out").read_text()
    assert server.fork("forked_work:ends", [3], tmp_path / "out", dict(os.environ)).wait() == 3, "the server is as before"


def test_closing_ends_all(server, tmp_path):
    "Also those that were forked just now and have no process group of their own yet."
    pids = [server.fork("forked_work:stays", [], tmp_path / "out", dict(os.environ)).pid for _ in range(20)]
    assert all(map(alive, pids))
    server.close()
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until: time.sleep(0.02)
    assert not any(map(alive, pids))


def test_a_dead_server_is_one_sentence_and_then_another_server(tmp_path):
    server = fork_server()
    server.process.kill(), server.process.wait()
    with pytest.raises(BookError, match="call again"): server.fork("os:getpid", [], tmp_path / "out", dict(os.environ))
    assert fork_server() is not server and fork_server() is fork_server()


def test_an_interrupt_in_mid_request_leaves_nothing(server, tmp_path, monkeypatch):
    "The interrupt comes when the fork is there and its number isn't read yet."
    def interrupted(wait):
        time.sleep(0.5)
        raise KeyboardInterrupt
    monkeypatch.setattr(server, "hear", interrupted)
    with pytest.raises(KeyboardInterrupt): server.fork("forked_work:stays", [], tmp_path / "out", dict(os.environ))
    assert server.process.returncode in (0, -signal.SIGKILL)


def test_a_variable_that_is_read_when_torch_is_loaded_gets_a_server_of_its_own(monkeypatch):
    usual = fork_server()
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    def level(): return str(dist.get_debug_level())
    assert fork_server() is not usual and launch(level, 1) == ["DebugLevel.DETAIL"]
    monkeypatch.delenv("TORCH_DISTRIBUTED_DEBUG")
    assert fork_server() is usual and launch(level, 1) == ["DebugLevel.OFF"]
