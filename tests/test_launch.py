"What can go wrong with processes that a notebook starts, and that nothing of them is left."
import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

from llmbook.corpora import BookError
from llmbook.launch import LaunchError, launch, packed, readable, tell, threads_for

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def alive(pid: int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


def wait_for(condition, seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until: time.sleep(0.05)
    return bool(condition())


def gather(x):
    found = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x + dist.get_rank())
    return dist.get_rank(), torch.stack(found)


def note(folder, name):
    Path(folder, f"{os.getpid()}").write_text(name)


def pids(folder): return [int(p.name) for p in Path(folder).iterdir()]


def test_results_come_in_the_order_of_ranks():
    x = torch.arange(3.0)
    for rank, (said, found) in enumerate(launch(gather, 3, x)):
        assert said == rank
        torch.testing.assert_close(found, torch.stack([x, x + 1, x + 2]))


def test_a_local_function_travels_with_what_it_refers_to():
    factor = 7
    def times(x): return x * factor + dist.get_rank()
    assert launch(times, 2, 6) == [42, 43]


def test_a_large_result_comes_whole():
    def big(): return torch.full((5_000_000,), float(dist.get_rank()))
    for rank, x in enumerate(launch(big, 2)): assert x.shape == (5_000_000,) and (x == rank).all()


def test_a_rank_with_its_work_done_leaves_without_the_interpreters_shutdown():
    "Gloo's threads may outlive their group; what they drop then must not meet an interpreter that is half gone."
    def haunted():
        atexit.register(os.abort)
        group = dist.new_group()
        return dist.get_rank(), id(group) > 0
    assert launch(haunted, 2) == [(0, True), (1, True)]


def test_environment_is_torchruns():
    def env(): return {k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | {"threads": torch.get_num_threads()}
    assert launch(env, 2, threads=1) == [{"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": "2", "threads": 1} for r in "01"]


def test_output_carries_the_rank_and_is_whole(capfd):
    def talks():
        for i in range(2000): print("line", i)
        print("no end of line", end="")
        os.write(2, "from below: ä\n".encode())
    launch(talks, 2)
    out = capfd.readouterr().out
    for rank in range(2):
        mine = [line for line in out.splitlines() if line.startswith(f"[rank {rank}]")]
        assert [line for line in mine if " line " in line] == [f"[rank {rank}] line {i}" for i in range(2000)]
        assert any("no end of line" in line for line in mine) and any("from below: ä" in line for line in mine)


def test_progress_moves_a_bar(capfd):
    def steps():
        for i in range(5): tell(i + 1, 5, loss=i)
    launch(steps, 2)
    caught = capfd.readouterr()
    assert "5/5" in caught.err and "loss=4" in caught.err and "\x1e" not in caught.out


def test_progress_is_silent_without_a_launch(capsys):
    tell(1, 2)
    assert capsys.readouterr().out == ""


def raises(folder, which):
    note(folder, "rank")
    if dist.get_rank() == which: raise RuntimeError("no such batch")
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("which", [0, 2])
def test_a_rank_that_raises_is_named_and_the_others_end(tmp_path, which):
    with pytest.raises(LaunchError, match=f"Rank {which} of 3 raised RuntimeError: no such batch") as caught: launch(raises, 3, tmp_path, which)
    assert caught.value.rank == which and "in raises" in caught.value.where and "be_a_rank" not in caught.value.where
    assert not any(map(alive, pids(tmp_path)))
    assert launch(gather, 2, torch.zeros(1))[1][0] == 1


def test_all_ranks_raise():
    def fails(): raise KeyError(dist.get_rank())
    with pytest.raises(LaunchError, match="raised KeyError"): launch(fails, 2)


def hangs(folder):
    note(folder, "rank")
    if dist.get_rank() == 0: time.sleep(600)


def test_a_rank_that_hangs_is_shown_where_it_stands(tmp_path):
    began = time.monotonic()
    launch(gather, 2, torch.zeros(1))
    timeout = max(6, round(4 * (time.monotonic() - began)))  # so that the other rank comes to its end on a busy machine, too
    with pytest.raises(LaunchError, match=f"After {timeout} s rank 0 of 2 had not come to an end") as caught: launch(hangs, 2, tmp_path, timeout=timeout)
    assert "time.sleep(600)" in caught.value.where and len(pids(tmp_path)) == 2
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.parametrize("how, said", [(lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"), (lambda: os._exit(3), "exit code 3"), (lambda: sys.exit(2), "SystemExit")])
def test_a_rank_that_ends_without_a_result(how, said):
    def ends():
        if dist.get_rank() == 1: how()
        dist.all_reduce(torch.ones(1))
    with pytest.raises(LaunchError, match=f"Rank 1 of 2.*{said}"): launch(ends, 2)


def test_what_a_rank_started_ends_with_it(tmp_path):
    def parent():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(tmp_path, str(child.pid)).touch()
    launch(parent, 1)
    assert wait_for(lambda: not any(map(alive, pids(tmp_path))), 10)


@pytest.mark.parametrize("bad", [threading.Lock(), (i for i in range(3))])
def test_what_cannot_travel_is_refused_before_anything_starts(bad):
    with pytest.raises(BookError, match="gather and its arguments can't be sent to other processes"): launch(gather, 2, bad)


def test_a_result_that_cannot_travel():
    def lock(): return threading.Lock()
    with pytest.raises(LaunchError, match="the result can't be sent back"): launch(lock, 2)


@pytest.mark.parametrize("call", [lambda: launch(3, 2), lambda: launch(gather, 0), lambda: launch(gather, 65), lambda: launch(gather, 2.0), lambda: launch(gather, 2, timeout=0)])
def test_odd_calls_are_one_sentence(call):
    with pytest.raises(BookError) as caught: call()
    assert "\n" not in str(caught.value)


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where this test runs in the background, which ignores it
from llmbook.launch import launch
def sleeps(folder):
    import os, pathlib, time
    pathlib.Path(folder, str(os.getpid())).touch()
    time.sleep(600)
launch(sleeps, 2, sys.argv[1])
"""


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_no_orphan_when_the_caller_is_interrupted_or_killed(tmp_path, sig):
    caller = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=ENV, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: len(pids(tmp_path)) == 2)
    caller.send_signal(sig)
    said = caller.communicate(timeout=30)[1]
    assert wait_for(lambda: not any(map(alive, pids(tmp_path))), 10)
    if sig == signal.SIGINT: assert "KeyboardInterrupt" in said


def test_an_interrupted_cell_in_a_real_kernel(tmp_path):
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    manager.start_kernel(env=ENV)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(60)
        cell = SCRIPT[SCRIPT.index("from llmbook"):].replace("sys.argv[1]", repr(str(tmp_path)))
        asked = client.execute(cell)
        assert wait_for(lambda: len(pids(tmp_path)) == 2)
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != asked: pass
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert wait_for(lambda: not any(map(alive, pids(tmp_path))), 10)
        client.execute_interactive("from llmbook.launch import launch\ndef one(): return 1\nassert launch(one, 2) == [1, 1]", timeout=60, output_hook=lambda m: None)
        manager.shutdown_kernel(now=True)
    finally:
        client.stop_channels()
        if manager.is_alive(): manager.shutdown_kernel(now=True)


@given(st.integers(1, 256))
@settings(max_examples=30, deadline=None)
def test_threads_never_exceed_the_cores(nprocs):
    assert threads_for(nprocs) >= 1 and (threads_for(nprocs) == 1 or threads_for(nprocs) * nprocs <= os.cpu_count())


def test_tracebacks_are_shortened():
    long = 'Traceback\n  File "/a/site-packages/torch/x.py", line 3, in f\n    g()\n  File "/tmp/ipykernel_12/34.py", line 1, in h\n  File "/q/llmbook/launch.py", line 9, in be_a_rank\n    try: fn()\n         ^^^^\nValueError: no\n'
    assert readable(long) == 'Traceback\n  File "torch/x.py", line 3, in f\n    g()\n  File "<cell>", line 1, in h\nValueError: no'
    assert packed(len, ([1],))


class Shaped:
    config = 3


def test_torchs_module_like_objects_travel_by_name():
    shaped = Shaped()
    def reads(): return dist.get_rank() + shaped.config  # the name `config` is also a submodule of torch.distributed
    fn, args, _ = __import__("cloudpickle").loads(packed(reads, ()))
    assert fn.__name__ == "reads"
    def flags(): return torch.backends.mkldnn.is_available(), torch.distributed.config
    assert packed(flags, ())
