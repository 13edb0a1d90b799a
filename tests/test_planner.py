"""What the chapter can't show: the planner on random shapes and layouts, counted tensors, and input that makes no sense."""
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.bert import BertConfig
from llmbook.cli import main
from llmbook.corpora import BookError
from llmbook.gpt import GPT, GPTConfig
from llmbook.planner import (CLUSTERS, RECIPES, Assumptions, Job, Layout, bubble, check_layout, choose, evaluate, group_seconds, in_flight,
                             layout_seconds, layouts, plan, rank_activations, rank_memory, rank_parameters, rank_traffic)
from llmbook.sizing import MODELS, PRECISIONS, parameters, training_flops, training_memory

configs = st.builds(
    lambda head, groups, share, **kw: GPTConfig(n_head=4 * groups * share, n_kv_head=4 * groups, n_embd=head * 4 * groups * share, **kw),
    head=st.sampled_from([2, 8]), groups=st.integers(1, 2), share=st.integers(1, 3), vocab_size=st.integers(1, 12).map(lambda n: 4 * n),
    context=st.integers(8, 32), n_layer=st.sampled_from([4, 8, 12]), n_inner=st.sampled_from([None, 64, 96]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]), mlp=st.sampled_from(["gelu", "swiglu"]),
    position=st.sampled_from(["learned", "rope"]), bias=st.booleans(), tie=st.booleans())
cuts = st.builds(Layout, dp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 4]), tp=st.sampled_from([1, 2, 4]), zero=st.integers(0, 3),
                 micro_batches=st.sampled_from([1, 2, 4, 8]), recompute=st.booleans(), sequence=st.booleans())


def job_of(config, precision="mixed"):
    return Job(config, 32, 8, precision)


@settings(max_examples=25, deadline=None)
@given(configs, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_ranks_hold_the_tensors_of_the_real_model(config, pp, tp):
    "Counted in the model itself: what Megatron's rules copy to every tp rank, and what they cut."
    with torch.device("meta"):
        tensors = {name: p.numel() for name, p in GPT(config).named_parameters()}
    copied = sum(n for name, n in tensors.items() if "norm" in name or "positions" in name or name.endswith(("o_proj.bias", "down_proj.bias")))
    ranks = [rank_parameters(job_of(config), Layout(pp=pp, tp=tp), stage) for stage in range(pp)]
    second = config.vocab_size * config.n_embd if config.tie and pp > 1 else 0
    assert sum(own for _, own in ranks) == copied
    assert tp * sum(cut for cut, _ in ranks) == sum(tensors.values()) - copied + second


@settings(max_examples=60, deadline=None)
@given(configs, st.sampled_from([*PRECISIONS]), st.booleans(), st.integers(1, 3))
def test_one_device_is_sizing(config, precision, again, batch):
    ours = rank_memory(Job(config, batch, 8, precision), Layout(recompute=again))
    assert abs(sum(ours.values()) - sum(training_memory(config, batch, 8, precision, again).values())) < 4
    a = Assumptions()
    work = layout_seconds(Job(config, batch, 8, precision), Layout(recompute=again), CLUSTERS["h100"].of(1), a)
    peak = CLUSTERS["h100"].device.peak(precision)
    assert math.isclose(work["arithmetic"], batch * 8 * training_flops(config, 8, True, again) / peak / a.efficiency)
    assert sum(work.values()) == work["arithmetic"]


@settings(max_examples=100, deadline=None)
@given(configs, cuts, st.sampled_from([*RECIPES]))
def test_higher_stages_hold_less_state_and_send_more(config, layout, precision):
    job, state = job_of(config, precision), ("parameters", "gradients", "optimizer")
    held, sent = [], []
    for zero in range(4):
        x = replace(layout, zero=zero)
        memory = rank_memory(job, x)
        assert all(v >= 0 for v in memory.values()) and all(v >= 0 for v in rank_traffic(job, x).values())
        held.append(sum(memory[kind] for kind in state))
        sent.append(rank_traffic(job, x)["dp"])
    assert held == sorted(held, reverse=True)
    if precision in ("fp32", "mixed", "bf16"):  # equal bytes for weights and gradients
        assert sent == sorted(sent) and math.isclose(sent[0], sent[1])
    if layout.dp > 1:
        assert math.isclose(sum(memory[kind] for kind in state) * layout.dp, sum(rank_parameters(job, layout, 0)) * {"fp32": 16, "mixed": 16, "bf16": 8, "bf16 autocast": 16}[precision])


@settings(max_examples=60, deadline=None)
@given(configs, cuts)
def test_activations_fall_with_every_cut_that_should_cut_them(config, layout):
    job = job_of(config)
    now = rank_activations(job, layout, 0)
    assert rank_activations(job, replace(layout, dp=2 * layout.dp), 0) <= now
    assert rank_activations(job, replace(layout, sequence=True), 0) <= rank_activations(job, replace(layout, sequence=False), 0)
    assert rank_activations(job, replace(layout, tp=4), 0) <= rank_activations(job, replace(layout, tp=1), 0)
    assert in_flight(layout, layout.pp - 1) == 1 and in_flight(layout, 0) == min(layout.pp, layout.micro_batches)


def test_chunks_shorten_the_bubble_and_lengthen_the_queue():
    one, three = Layout(pp=8, micro_batches=64), Layout(pp=8, micro_batches=64, chunks=3)
    assert bubble(one) == 7 / 71 and bubble(three) == 7 / 199
    assert in_flight(three, 0) == 8 + 7 / 3  # Korthikanti et al. 2022, section 4.2.3: p (1 + (p-1)/(p v))


def test_a_wire_is_chosen_by_what_a_group_crosses():
    where, a = CLUSTERS["a100"].of(64), Assumptions(link=1.0)
    near, across, alone = (group_seconds(where, a, *group, 1e12, 0) for group in ((8, 1), (64, 1), (8, 8)))
    assert math.isclose(near, 1e12 / 300e9) and math.isclose(across, 1e12 / 200e9) and math.isclose(alone, 1e12 / 25e9)
    assert math.isclose(group_seconds(where, replace(a, rails=False), 64, 1, 1e12, 0), 1e12 / 25e9)
    assert group_seconds(where, a, 1, 1, 1e12, 5) == 0
    assert math.isclose(group_seconds(where, a, 64, 1, 0, 2), 2 * (7 * 14e-6 + 56 * 3.4e-6))


@pytest.mark.parametrize("model, cluster, devices, batch", [("GPT-2", "laptop", 2, 8), ("SmolLM2 1.7B", "rtx4090", 16, 64), ("Llama 2 7B", "a100", 24, 192),
                                                            ("Llama 2 70B", "h100", 512, 1024), ("GPT-3 175B", "h100", 16384, 2048)])
def test_every_plan_can_be_dealt_out_and_the_choice_is_the_fastest(model, cluster, devices, batch):
    job, where = Job(MODELS[model], batch, 1024), CLUSTERS[cluster].of(devices)
    plans = plan(job, where)
    assert len({x.layout for x in plans}) == len(plans) == len(layouts(job, where))
    for x in plans:
        check_layout(job, x.layout)
        assert x.layout.devices == devices and x.step > 0 and x.total > 0
    best, reasons = choose(plans, job, where)
    assert best.fits and best.step <= 1.01 * min(x.step for x in plans if x.fits)
    assert str(best.layout) in reasons[0] and len(reasons) > 1


def test_what_would_do_does():
    job = Job(MODELS["GPT-3 175B"], 512, 2048)
    with pytest.raises(BookError, match="Nothing fits 8 × H100") as e:
        choose(plan(job, CLUSTERS["h100"].of(8)), job, CLUSTERS["h100"].of(8))
    enough = int(str(e.value).split()[-6])
    assert plan(job, CLUSTERS["h100"].of(enough))[0].fits and not plan(job, CLUSTERS["h100"].of(enough // 2))[0].fits


@pytest.mark.parametrize("make, says", [
    (lambda: Job(BertConfig(100, 2, 2, 16), 1, 8), "GPTConfig"), (lambda: Job(MODELS["GPT-2"], 1, 8, "fp8"), "fp8"),
    (lambda: Job(MODELS["GPT-2"], 0, 8), "at least 1"), (lambda: Job(MODELS["GPT-2"], 1, 4096), "1024 positions"),
    (lambda: CLUSTERS["h100"].of(12), "nodes of 8"), (lambda: CLUSTERS["h100"].of(0), "nodes of 8"),
    (lambda: Assumptions(efficiency=0), "efficiency=0"), (lambda: Assumptions(link=1.5), "link=1.5"),
    *[(lambda x=x: check_layout(Job(MODELS["Llama 2 70B"], 16, 64), x), says) for x, says in (
        (Layout(pp=3), "80 layers"), (Layout(pp=2, chunks=3), "3 pieces"), (Layout(tp=16), "8 of keys"), (Layout(tp=3), "tp=3"), (Layout(dp=3), "dp=3"),
        (Layout(dp=8, micro_batches=4), "4 micro-batches"), (Layout(zero=4), "ZeRO stage 4"), (Layout(dp=0), "dp=0"), (Layout(zero=-1), "zero=-1"))],
    (lambda: plan(Job(MODELS["GPT-2"], 7, 64), CLUSTERS["h100"].of(4096)), "7 sequences")])
def test_nonsense_is_one_sentence(make, says):
    with pytest.raises(BookError, match=says):
        make()


def test_overlap_and_rails_only_ever_help():
    job, layout = Job(MODELS["Llama 2 7B"], 512, 4096), Layout(dp=64, zero=3, micro_batches=1)
    step = lambda **how: evaluate(job, CLUSTERS["a100"].of(64), layout, Assumptions(**how)).step
    assert step(overlap=0) > step(overlap=0.5) >= step() and step(rails=False) >= step() and step(efficiency=0.3) > step()


def test_the_command_prints_a_plan(capsys):
    assert main("plan --model llama-7b --gpus 64 --cluster h100 --top 3".split()) == 0
    text = capsys.readouterr().out
    assert "GB of 72.0" in text and "- Data parallelism alone doesn't fit" in text and text.count("yes") == 3
    assert main("plan --model gpt-3 --gpus 1024 --cluster a100 --batch 1536 --json".split()) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["layout"]["dp"] * read["layout"]["pp"] * read["layout"]["tp"] == 1024 and set(read["seconds"]) == {"arithmetic", "bubble", "tp", "pp", "dp"}
    for fault, says in (("--model llama", "names 4 of the models"), ("--model gpt-5", "none of the models"), ("--model gpt-3 --gpus 8", "would do"), ("--model gpt-2 --gpus 9", "nodes of 8")):
        assert main(["plan", *fault.split()]) == 2
        assert says in capsys.readouterr().err
