"What the engine's chapter can't show: wrong meshes, a killed rank, torchrun, bf16, other shapes, a disk that is full."
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.nn.utils import clip_grad_norm_

from llmbook.corpora import BookError, TokenStream, write_stream
from llmbook.data_parallel import share
from llmbook.engine import (MeshTrainer, check_engine, clip_gradient, engine_of, first_does, layout_named, mesh_of, parallelize, processes, slurm_script,
                            torchrun_command, whole_weights)
from llmbook.gpt import GPT, GPTConfig
from llmbook.launch import launch
from llmbook.loop import Callback, TrainConfig
from llmbook.muon import make_optimizer
from llmbook.pretraining import Recipe, recipe_trainer
from llmbook.training import Trainer

SHAPE = dict(vocab_size=24, context=8, n_layer=2, n_head=2, n_embd=8)
RUN = dict(steps=6, batch_size=4, context=8, lr=1e-2, precision="fp32", eval_every=2, eval_batches=2, keep=9)
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
TINY = "--n-layer 2 --n-head 2 --n-embd 16 --context 16 --batch-size 4 --vocab-size 300 --precision fp32 --data synthetic".split()


@pytest.mark.parametrize("text", ["", "dp", "dp=0", "dp=-1", "dp=two", "dp=2,dp=2", "ep=2", "dp=2;tp=2", "dp=2,"])
def test_a_mesh_that_cannot_be_read(text):
    with pytest.raises(BookError, match="can't be read: write sizes from 1 up"): layout_named(text)


def test_a_mesh_as_it_is_typed():
    layout = layout_named(" tp = 2 , pp=3", micro_batches=6, recompute=True)
    assert (layout.dp, layout.pp, layout.tp, layout.micro_batches, layout.recompute) == (1, 3, 2, 6, True)
    assert layout_named("pp=4").micro_batches == 4, "as few as fill the stages"


@pytest.mark.parametrize("mesh, m, model, run, says", [
    ("pp=4", None, {}, {}, "2 layers can't be dealt out to pp=4"),
    ("tp=4", None, {}, {}, "2 heads .* can't be cut tp=4"),
    ("tp=2", None, dict(vocab_size=25), {}, "vocabulary of 25 can't be cut tp=2"),
    ("dp=3", None, {}, {}, "batch of 4 sequences can't be dealt out to dp=3"),
    ("dp=2,pp=2", 4, {}, {}, "4 sequences can't be dealt out to dp=2 replicas of 4"),
    ("pp=2", 1, {}, {}, "1 micro-batches can't fill pp=2 stages"),
    ("dp=1", None, dict(dropout=0.1), {}, "dropout=0.1 can't be used on a mesh"),
    ("dp=1", None, {}, dict(precision="fp16"), "choose bf16 or fp32"),
    ("dp=1", None, {}, dict(compile=True), "compile=True"),
])
def test_what_does_not_fit_is_refused(mesh, m, model, run, says):
    with pytest.raises(BookError, match=says): check_engine(GPTConfig.gpt2(**{**SHAPE, **model}), TrainConfig(**{**RUN, **run}), layout_named(mesh, m))


def test_accumulated_batches_fill_a_pipeline():
    check_engine(GPTConfig.gpt2(**SHAPE), TrainConfig(**{**RUN, "accumulate": 2}), layout_named("pp=2", 1))


def fresh(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = GPT(config).double()
    for p in model.parameters(): p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype)


def batch(config, seed, B=8, T=8):
    generator = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(0, config.vocab_size, (B, T), generator=generator) for _ in range(2))
    return ids, targets.masked_fill(torch.rand(B, T, generator=generator) < 0.3, -100)


def one_step(text, config, seed, m=None, recompute=False, precision="fp32"):
    "Loss, norm, gradients and weights of one clipped step on a mesh."
    layout = layout_named(text, m, recompute)
    mesh = mesh_of(layout)
    stage = parallelize(fresh(config, torch.float64 if precision == "fp32" else torch.float32, seed), mesh, recompute, precision)
    ids, targets = batch(config, seed)
    loss = engine_of(stage, mesh, layout.micro_batches).gradient(*(share(x, mesh.get_group("dp")) for x in (ids, targets)), int((targets != -100).sum()))
    grads, norm = whole_weights(stage, mesh, gradients=True), clip_gradient(stage, mesh, 0.1)
    make_optimizer("adamw", stage, lr=1e-2).step()
    return loss, norm, grads, whole_weights(stage, mesh)


def serial_step(config, seed):
    model, (ids, targets) = fresh(config, seed=seed), batch(config, seed)
    loss = model.loss(ids, targets)
    loss.backward()
    grads, norm = {name: p.grad.clone() for name, p in model.named_parameters()}, clip_grad_norm_(model.parameters(), 0.1)
    make_optimizer("adamw", model, lr=1e-2).step()
    return loss.item(), norm.item(), grads, {name: p.detach() for name, p in model.named_parameters()}


ODD = [("two stages of unequal content, biases, untied", GPTConfig.gpt2(**SHAPE, tie=False), 3),
       ("one key/value head for two", GPTConfig.llama(**{**SHAPE, "n_head": 4}, n_kv_head=2, n_inner=12), 4),
       ("norms with bias, rotary, tied", GPTConfig.gpt2(**SHAPE, position="rope"), 5)]


CASES = {2: [("dp=2", 2, True), ("pp=2", 4, True), ("tp=2", 4, False)], 4: [("dp=2,tp=2", 2, True), ("pp=2,tp=2", 4, False)]}


def odd_steps(): return [one_step(text, config, seed, m, recompute) for text, m, recompute in CASES[dist.get_world_size()] for _, config, seed in ODD]


def in_bf16(): return one_step("dp=2", ODD[0][1], 3, precision="bf16")[::2]


def refusals():
    said = []
    for fn in (lambda: mesh_of(layout_named("dp=3")), lambda: first_does(lambda: layout_named("dp=x"))):
        try: fn()
        except BookError as e: said.append(str(e))
    return said


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    generator = torch.Generator().manual_seed(0)
    for name, size in (("train", 700), ("valid", 120)):
        write_stream(folder / name, [" ".join(map(str, torch.randint(0, 23, (size,), generator=generator).tolist()))], lambda text: [int(t) for t in text.split()], 23, 24, progress=False)
    return folder


class StopsAfter(Callback):
    def __init__(self, step): self.step = step

    def on_row(self, trainer, row):
        if row["step"] == self.step and "loss" in row: trainer.stop = "seen enough"


def train(folder, run_dir, text=None, callbacks=(), **changes):
    torch.manual_seed(0)
    model, config = GPT(GPTConfig.gpt2(**SHAPE)).double(), TrainConfig(**{**RUN, **changes})
    data = [TokenStream(folder / name) for name in ("train", "valid")]
    if text is None: return Trainer(model, config, *data, run_dir, progress=False, callbacks=callbacks).fit()
    return MeshTrainer(model, config, *data, run_dir, progress=False, layout=layout_named(text), callbacks=callbacks).fit()


def full_disk(streams, run_dir):
    "Training while rank 1 can't write its part of a checkpoint."
    write = HuggingFaceStorageWriter.write_data
    def refuse(*_, **__): raise OSError(28, "No space left on device")
    if dist.get_rank() == 1: HuggingFaceStorageWriter.write_data = refuse
    try: train(streams, run_dir, "dp=2")
    except BookError as e: return str(e)
    finally: HuggingFaceStorageWriter.write_data = write


def on_two(streams, folder):
    "All that takes two ranks, in one launch."
    return {"steps": odd_steps(), "bf16": in_bf16(), "refusals": refusals(), "stopped": train(streams, folder / "stopped", "dp=2", (StopsAfter(3),)),
            "full": full_disk(streams, folder / "full"), "left": [p.name for p in (folder / "full" / "checkpoints").glob("step-*")], "again": train(streams, folder / "full", "dp=2")}


@pytest.fixture(scope="module")
def two(streams): return streams, launch(on_two, 2, streams, streams, threads=1, timeout=300)


@pytest.mark.parametrize("n", [2, 4])
def test_other_shapes_micro_batches_and_recomputation(n, two):
    want = {seed: serial_step(config, seed) for _, config, seed in ODD}
    found = two[1][0]["steps"] if n == 2 else launch(odd_steps, n, threads=1, timeout=300)[0]
    for got, (_, _, seed) in zip(found, ODD * len(CASES[n]), strict=True):
        loss, norm, grads, weights = want[seed]
        assert abs(got[0] - loss) <= 1e-12 and abs(got[1] - norm) <= 1e-12
        for mine, true in ((got[2], grads), (got[3], weights)):
            assert mine.keys() == true.keys()
            for name in true: torch.testing.assert_close(mine[name], true[name], rtol=0, atol=1e-10, msg=name)


def test_bf16_computes_in_16_bits_and_keeps_32(two):
    loss, grads = two[1][0]["bf16"]
    true = serial_step(ODD[0][1], 3)
    off = torch.cat([(grads[k].double() - true[2][k]).flatten() for k in grads]).norm() / torch.cat([g.flatten() for g in true[2].values()]).norm()
    assert 1e-4 < off < 0.05, "coarser than fp32 and no more than a few roundings to 8 bits"
    assert {g.dtype for g in grads.values()} == {torch.float32} and abs(loss - true[0]) < 0.02


def test_every_rank_hears_a_refusal(two):
    for said in (rank["refusals"] for rank in two[1]):
        assert len(said) == 2 and "takes 3 processes, and 2 were started" in said[0] and "dp=x" in said[1]


def test_a_callback_on_rank_0_stops_all(two):
    for history in (rank["stopped"] for rank in two[1]): assert history[-1]["stopped"] == "seen enough" and max(row["step"] for row in history) == 3
    assert (two[0] / "stopped" / "model" / "model.safetensors").exists(), "a run that was stopped so is finished"


def test_a_full_disk_is_one_sentence_on_every_rank(two):
    said = {rank["full"] for rank in two[1]}
    assert len(said) == 1 and "could not be written" in (text := said.pop()) and "No space left" in text
    assert two[1][0]["left"] == [], "nothing looks like a checkpoint"
    assert max(row["step"] for row in two[1][0]["again"]) == 6, "with room again the run goes on"


def test_a_serial_trainer_says_how_to_go_on_from_a_mesh(streams, tmp_path):
    with processes(): train(streams, tmp_path / "run", "dp=1")
    os.rename(tmp_path / "run" / "checkpoints" / "step-000006", tmp_path / "gone")
    with pytest.raises(BookError, match="--mesh dp=1"): train(streams, tmp_path / "run")


def test_a_recipe_on_a_mesh_is_the_recipe(tmp_path):
    "Muon over slices, dp=1 in this process, through the recipe's own trainer."
    recipe = Recipe("gpt", "next-word", dict(n_layer=2, n_head=2, n_embd=16, n_inner=32, context=16),
                    dict(steps=4, batch_size=4, context=16, optimizer="muon", lr=8e-3, precision="fp32", eval_batches=2), texts=("synthetic",), vocab_size=300)
    serial = recipe_trainer(recipe, tmp_path / "serial", progress=False).fit()
    with processes(): mesh = recipe_trainer(recipe, tmp_path / "mesh", progress=False, make=partial(MeshTrainer, layout=layout_named("dp=1"))).fit()
    for a, b in zip(serial, mesh, strict=True):
        for key in a.keys() & {"loss", "valid_loss", "grad_norm"}: assert abs(a[key] - b[key]) < 1e-4, (a["step"], key)


def llmbook(*args, n, restarts=0, **kw):
    command = [*TORCHRUN, f"--nproc-per-node={n}", f"--max-restarts={restarts}", "-m", "llmbook", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kw)


def test_the_command_under_torchrun_and_alone(tmp_path):
    run = ["pretrain", "--run-dir", tmp_path / "run", "--steps", 6, *TINY]
    first = llmbook(*run, "--mesh", "dp=2", n=2)
    out, err = first.communicate(timeout=240)
    assert first.returncode == 0 and out.count("validation loss") == 1, err
    log = (tmp_path / "run" / "log.jsonl").read_text()
    alone = subprocess.run([sys.executable, "-m", "llmbook", *map(str, run), "--mesh", "dp=1"], capture_output=True, text=True)
    assert alone.returncode == 0 and (tmp_path / "run" / "log.jsonl").read_text() == log, "a finished run is left as it is"


def test_a_process_of_torchruns_leaves_without_the_interpreters_shutdown(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\nif 'TORCHELASTIC_RUN_ID' in os.environ: atexit.register(os.abort)\n")
    for inside in (True, False):
        env = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | {"PYTHONPATH": str(tmp_path)} | ({"TORCHELASTIC_RUN_ID": "x"} if inside else {})
        done = subprocess.run([sys.executable, "-m", "llmbook", "--version"], capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout) == (0, f"llmbook {version('llmbook')}\n"), done.stderr


def test_a_wrong_number_of_processes_is_one_sentence(tmp_path):
    process = llmbook("pretrain", "--run-dir", tmp_path / "run", "--mesh", "dp=2,tp=2", *TINY, n=2)
    _, err = process.communicate(timeout=240)
    said = [line for line in err.splitlines() if line.startswith("llmbook: ")]
    assert process.returncode and len(said) == 1 and "takes 4 processes, and 2 were started" in said[0]
    assert not (tmp_path / "run").exists()


JOIN = "import sys, time, torch.distributed as dist\nfrom llmbook.engine import processes\ntime.sleep(float(sys.argv[1]))\nwith processes(): dist.barrier()\n"


def test_who_starts_again_does_not_call_the_dead():
    "One host's store serves all attempts; in the second one, rank 0 is there long before rank 1 has left its new address."
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt, late in enumerate((0, 2)):
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt), "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
        ranks = [subprocess.Popen([sys.executable, "-c", JOIN, str(late * rank)], env={**os.environ, **told, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(2)]
        for rank in ranks:
            _, err = rank.communicate(timeout=120)
            assert rank.returncode == 0, err


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_nothing_is_lost(tmp_path):
    run = ["pretrain", "--run-dir", tmp_path / "run", "--steps", 60, *TINY]
    process = llmbook(*run, "--mesh", "dp=2", n=2, restarts=1)
    log = tmp_path / "run" / "log.jsonl"
    until = time.monotonic() + 180
    while not (log.exists() and re.search(r'"step": 2\d, "loss"', log.read_text())):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "resumed after step" in out, err
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))
    assert [row["tokens"] for row in rows if "loss" in row] == [row["step"] * 64 for row in rows if "loss" in row]


def test_commands_for_hosts():
    line = torchrun_command(2, 8, "host0:29500", "pretrain --mesh dp=16", "bard", restarts=0)
    assert " torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=0 " in line and "STORE=1 torchrun" in line and line.endswith("-m llmbook pretrain --mesh dp=16")
    script = slurm_script(2, 8, "pretrain --mesh dp=16")
    assert "#SBATCH --nodes=2\n" in script and "\nexport TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in script and "srun torchrun" in script and subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
