"""What the chapter can't show: any shape against transformers, any order, files that don't fit, input that makes no sense."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmbook.corpora import BookError
from llmbook.xlnet import XLNet, XLNetConfig, XLNetLM, distance_table, load_xlnet, permutation_batch, permutation_masks, rel_pick, rel_shift, save_xlnet, xlnet_shape

TINY = XLNetConfig(vocab_size=20, n_layer=2, n_head=2, n_embd=8, dropout=0.0)
ALONE = XLNetConfig(vocab_size=20, n_layer=1, n_head=2, n_embd=8, dropout=0.0)


def sentence(call) -> str:
    with pytest.raises(BookError) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) > 30
    return str(e.value)


def loud(model):
    "The same model with weights far from zero, where mistakes show."
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p), alpha=0.3)
    return model


def transformers_twin(model: XLNetLM, **more):
    hf = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'llmbook[hub]'")
    c = model.transformer.config
    theirs = hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, d_model=c.n_embd, d_inner=c.n_inner, mem_len=c.mem_len, dropout=0.0, **more))
    theirs.load_state_dict(dict(model.named_parameters()), strict=False)
    return theirs.to(next(model.parameters()).dtype)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(B=st.integers(1, 3), T=st.integers(2, 9), H=st.integers(1, 3), D=st.sampled_from([2, 6]), L=st.integers(1, 3), past=st.integers(0, 6), mem_len=st.sampled_from([None, 3]),
       queries=st.booleans(), segments=st.booleans(), filling=st.booleans(), seed=st.integers(0, 99))
def test_any_shape_is_as_in_transformers(B, T, H, D, L, past, mem_len, queries, segments, filling, seed):
    torch.manual_seed(seed)
    ours = loud(XLNetLM(XLNet(XLNetConfig(20, L, H, H * D, n_inner=7, mem_len=mem_len, dropout=0.0))))
    theirs, ids, given, words = transformers_twin(ours), torch.randint(20, (B, T)), {}, {"use_mems": True}
    if queries:
        batch = permutation_batch(ids, K=3 if T > 2 else 2)
        given |= {k: batch[k] for k in ("perm_mask", "target_mapping")}
        words |= {"perm_mask": (~batch["perm_mask"]).float(), "target_mapping": batch["target_mapping"].float()}
    if segments: given["segments"] = words["token_type_ids"] = torch.randint(4, (B, T))
    if filling and not queries:
        given["mask"] = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
        words["attention_mask"] = given["mask"].float()
    if past:
        before = torch.randint(20, (B, past))
        given["mems"], words["mems"] = ours(before)[1], theirs(before, use_mems=True).mems
    (logits, memory), reference = ours(ids, **given), theirs(ids, **words)
    torch.testing.assert_close(logits, reference.logits, atol=1e-5, rtol=1e-5)
    for a, b in zip(memory, reference.mems, strict=True): torch.testing.assert_close(a, b.transpose(0, 1), atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(logits)
    for x in (logits, reference.logits): (x * weight).mean().backward()
    for k, p in ours.named_parameters():
        other = theirs.get_parameter(k).grad
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, torch.zeros_like(p) if other is None else other, atol=1e-5, rtol=1e-4)


def test_the_loss_is_transformers_and_leaves_out_what_has_no_target():
    torch.manual_seed(0)
    ours, batch = loud(XLNetLM(XLNet(TINY))), permutation_batch(torch.randint(20, (3, 9)), K=3)
    batch["targets"][0, 1] = -100
    theirs = transformers_twin(ours)(batch["ids"], perm_mask=(~batch["perm_mask"]).float(), target_mapping=batch["target_mapping"].float(), labels=batch["targets"])
    torch.testing.assert_close(ours.loss(**batch), theirs.loss, atol=1e-5, rtol=1e-5)


def test_a_row_of_target_mapping_without_a_place_is_as_in_transformers():
    torch.manual_seed(0)
    ours, batch = loud(XLNetLM(XLNet(TINY))), permutation_batch(torch.randint(20, (2, 6)), K=2)
    mapping, memory = batch["target_mapping"], ours(batch["ids"])[1]
    mapping[0, 1] = 0
    logits, _ = ours(batch["ids"], perm_mask=batch["perm_mask"], target_mapping=mapping, mems=memory)
    reference = transformers_twin(ours)(batch["ids"], perm_mask=(~batch["perm_mask"]).float(), target_mapping=mapping.float(), mems=[m.transpose(0, 1) for m in memory], use_mems=True).logits
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)


def test_double_precision_is_double():
    torch.manual_seed(0)
    ours, ids = loud(XLNetLM(XLNet(TINY))).double(), torch.randint(20, (2, 7))
    perm_mask, segments = permutation_masks(torch.rand(2, 7).argsort(1))[1], torch.randint(2, (2, 7))
    logits, memory = ours(ids, segments, perm_mask=perm_mask)
    reference = transformers_twin(ours)(ids, token_type_ids=segments, perm_mask=(~perm_mask).double()).logits
    assert logits.dtype == memory[0].dtype == torch.float64
    torch.testing.assert_close(logits, reference, atol=1e-12, rtol=1e-12)
    assert ours.loss(**permutation_batch(ids)).dtype == torch.float64


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 99))
def test_shift_and_pick_are_what_they_say(T, past, seed):
    torch.manual_seed(seed)
    S, scores = past + T, torch.randn(2, 3, T, past + 2 * T, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([torch.stack([scores[:, :, i, T - i + j] for j in range(S)], -1) for i in range(T)], -2)
    assert torch.equal(rel_shift(scores), expected)
    places = torch.stack([torch.randperm(T), torch.randperm(T)])
    rows = scores[torch.arange(2)[:, None], :, places].transpose(1, 2)
    assert torch.equal(rel_pick(rows, places, T), expected[torch.arange(2)[:, None], :, places].transpose(1, 2))
    assert torch.autograd.gradcheck(rel_shift, scores)


def test_the_table_holds_each_distance_once():
    table = distance_table(3, 5, 4)
    assert table.shape == (8, 4)
    torch.testing.assert_close(table[:, 0], torch.tensor([5., 4, 3, 2, 1, 0, -1, -2]).sin())
    torch.testing.assert_close(table[:, 3], (torch.tensor([5., 4, 3, 2, 1, 0, -1, -2]) / 100).cos())


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)))
def test_masks_follow_the_order(order):
    content, query = permutation_masks(order)
    for turn, i in enumerate(order):
        assert sorted(query[i].nonzero().flatten().tolist()) == sorted(order[:turn])
        assert sorted(content[i].nonzero().flatten().tolist()) == sorted(order[:turn + 1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 20), st.integers(2, 8), st.integers(0, 99))
def test_a_batch_asks_for_what_nobody_shows(B, T, K, seed):
    ids = torch.randint(20, (B, T), generator=torch.Generator().manual_seed(seed))
    batch = permutation_batch(ids, K, torch.Generator().manual_seed(seed))
    M = -(-T // K)
    assert batch["targets"].shape == (B, M) and batch["target_mapping"].shape == (B, M, T)
    assert torch.equal((batch["target_mapping"] * ids[:, None]).sum(-1), batch["targets"])
    place = batch["target_mapping"].argmax(-1)
    for b in range(B):
        context = sorted(set(range(T)) - set(place[b].tolist()))
        for n, i in enumerate(place[b].tolist()):
            assert batch["perm_mask"][b, i].nonzero().flatten().tolist() == sorted(context + place[b, :n].tolist())
        for i in context: assert batch["perm_mask"][b, i].nonzero().flatten().tolist() == context


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 99))
def test_what_is_hidden_has_no_gradient_and_empty_rows_no_nan(order, seed):
    torch.manual_seed(seed)
    model, ids = loud(XLNet(TINY)), torch.arange(5)[None]
    query = permutation_masks(order)[1]
    for i in range(5):
        model.zero_grad()
        out, _ = model(ids, perm_mask=query[None], target_mapping=torch.eye(5)[None, i:i + 1])
        (out * torch.randn_like(out)).sum().backward()
        felt = model.word_embedding.weight.grad[:5].abs().amax(-1) > 0
        assert torch.equal(felt, query[i]) and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_predictions_do_not_depend_on_each_other():
    torch.manual_seed(0)
    model, batch = loud(XLNet(TINY)).eval(), permutation_batch(torch.randint(20, (2, 8)), K=2)
    ids, perm_mask, mapping = batch["ids"], batch["perm_mask"], batch["target_mapping"]
    together, _ = model(ids, perm_mask=perm_mask, target_mapping=mapping)
    for m in range(4): torch.testing.assert_close(model(ids, perm_mask=perm_mask, target_mapping=mapping[:, m:m + 1])[0][:, 0], together[:, m], atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 99))
def test_filling_changes_nothing(length, filling, seed):
    torch.manual_seed(seed)
    model, ids = loud(XLNet(TINY)).eval(), torch.randint(20, (1, length))
    filled, mask = torch.cat([ids, torch.randint(20, (1, filling))], 1), torch.arange(length + filling)[None] < length
    torch.testing.assert_close(model(filled, mask=mask)[0][:, :length], model(ids)[0], atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_with_one_layer_memory_is_the_longer_context(past, T, seed):
    torch.manual_seed(seed)
    model, ids = loud(XLNet(ALONE)).eval(), torch.randint(20, (2, past + T))
    _, memory = model(ids[:, :past])
    torch.testing.assert_close(model(ids[:, past:], mems=memory)[0], model(ids)[0][:, past:], atol=1e-5, rtol=1e-5)


def test_memory_keeps_what_the_shape_says_and_no_gradient():
    ids = torch.arange(6)[None]
    for mem_len, reuse_len, expected in ((None, None, [0, 1, 2, 3, 4, 5]), (4, None, [2, 3, 4, 5]), (None, 2, [0, 1]), (1, 2, [1]), (9, None, [0, 1, 2, 3, 4, 5])):
        model = XLNet(XLNetConfig(20, 2, 2, 8, mem_len=mem_len, reuse_len=reuse_len, dropout=0.0))
        memory = model(ids)[1]
        assert torch.equal(memory[0][0], model.word_embedding.weight[expected].detach()) and not any(m.requires_grad for m in memory)
        again = model(ids, mems=memory)[1][1]
        assert again.shape[1] == min(len(expected) + (reuse_len or 6), mem_len or 99)


def test_the_segment_vectors_have_opposite_gradients():
    torch.manual_seed(0)
    model = loud(XLNet(TINY))
    model(torch.randint(20, (2, 6)), torch.randint(2, (2, 6)))[0].square().sum().backward()
    for layer in model.layer:
        g = layer.rel_attn.seg_embed.grad
        assert g.abs().max() > 1e-4
        torch.testing.assert_close(g[0], -g[1])


def test_dropout_is_for_training_only():
    torch.manual_seed(0)
    model, batch = XLNetLM(XLNet(XLNetConfig(20, 2, 2, 8, dropout=0.3))), permutation_batch(torch.randint(20, (2, 8)))
    assert model.loss(**batch) != model.loss(**batch)
    assert model.eval().loss(**batch) == model.loss(**batch)


def test_half_precision_is_near():
    torch.manual_seed(0)
    model, batch = loud(XLNetLM(XLNet(TINY))), permutation_batch(torch.randint(20, (2, 12)))
    batch["segments"] = torch.randint(2, (2, 12))
    with torch.autocast("cpu", torch.bfloat16): near = model.loss(**batch)
    near.backward()
    assert abs(float(near.detach()) - float(model.loss(**batch).detach())) < 0.1 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("head", [None, XLNetLM])
def test_saved_and_loaded_it_is_the_same(tmp_path, head):
    torch.manual_seed(0)
    body = loud(XLNet(XLNetConfig(20, 2, 2, 8, n_inner=10, mem_len=5, reuse_len=3, norm_eps=1e-6, dropout=0.0)))
    model = (head(body) if head else body).eval()
    save_xlnet(model, tmp_path / "m")
    again, ids = load_xlnet(tmp_path / "m", head), torch.randint(20, (2, 7))
    assert (again if head is None else again.transformer).config == body.config and not again.training
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True): assert torch.equal(a, b)
    assert torch.equal(load_xlnet(tmp_path / "m")(ids)[0], body.eval()(ids)[0]), "the body alone loads too"
    if head: assert again.lm_loss.weight is again.transformer.word_embedding.weight


@pytest.mark.parametrize("name", ["XLNetModel", "XLNetLMHeadModel", "XLNetForSequenceClassification"])
def test_what_transformers_saves_loads(tmp_path, name):
    hf = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'llmbook[hub]'")
    torch.manual_seed(0)
    theirs = getattr(hf, name)(hf.XLNetConfig(vocab_size=20, d_model=8, n_layer=2, n_head=2, d_inner=12)).eval()
    theirs.save_pretrained(tmp_path / "m")
    body, ids = theirs if name == "XLNetModel" else theirs.transformer, torch.randint(20, (2, 7))
    torch.testing.assert_close(load_xlnet(tmp_path / "m")(ids)[0], body(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
    if name != "XLNetLMHeadModel": assert "lm_loss.bias" in sentence(lambda: load_xlnet(tmp_path / "m", XLNetLM))


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    save_xlnet(XLNetLM(XLNet(TINY)), tmp_path / "m")
    path, file = tmp_path / "m" / "config.json", tmp_path / "m" / "model.safetensors"
    config, weights = json.loads(path.read_text()), load_file(file)
    for change, word in (({"d_model": 16}, "shape"), ({"n_layer": 3}, "lacks"), ({"n_layer": 1}, "too many"), ({"model_type": "bert"}, "bert"), ({"ff_activation": "relu"}, "relu"), ({"attn_type": "uni"}, "uni"),
                         ({"bi_data": True}, "bi_data"), ({"clamp_len": 100}, "clamp_len=100"), ({"tie_word_embeddings": False}, "tie_word"), ({"d_head": 3}, "width 3"), ({"n_head": 3}, "heads")):
        path.write_text(json.dumps(config | change))
        assert word in sentence(lambda: load_xlnet(tmp_path / "m", XLNetLM))
    path.write_text(json.dumps(config | {"clamp_len": -1, "bi_data": False, "d_head": 4}))
    load_xlnet(tmp_path / "m", XLNetLM)
    table = weights["transformer.word_embedding.weight"]
    save_file(weights | {"lm_loss.weight": table.clone()}, file)
    load_xlnet(tmp_path / "m", XLNetLM)
    save_file(weights | {"lm_loss.weight": table + 1}, file)
    for head in (None, XLNetLM): assert "token table" in sentence(lambda: load_xlnet(tmp_path / "m", head))
    save_file({k: w for k, w in weights.items() if "mask_emb" not in k} | {"more": table.clone()}, file)
    assert "lacks transformer.mask_emb" in (fault := sentence(lambda: load_xlnet(tmp_path / "m", XLNetLM))) and "too many more" in fault
    file.write_bytes(file.read_bytes()[:-10])
    sentence(lambda: load_xlnet(tmp_path / "m"))
    assert "lacks" in sentence(lambda: xlnet_shape({"model_type": "xlnet", "vocab_size": 3}))


def test_bad_input_is_one_sentence():
    model, ids = XLNet(TINY), torch.zeros(2, 5, dtype=torch.long)
    assert "0…19" in sentence(lambda: model(ids + 20)) and "0…19" in sentence(lambda: model(ids - 1))
    assert "(5,)" in sentence(lambda: model(ids[0])) and "at least one" in sentence(lambda: model(ids[:, :0]))
    assert "mask" in sentence(lambda: model(ids, mask=torch.ones(2, 4))) and "segments" in sentence(lambda: model(ids, segments=torch.zeros(5)))
    seen, mapping = torch.ones(2, 5, 5, dtype=torch.bool), torch.eye(5).expand(2, 5, 5)
    assert "(2, 5, 5)" in sentence(lambda: model(ids, perm_mask=seen[0])) and "(2, 5, 5)" in sentence(lambda: model(ids, perm_mask=seen[:, :4]))
    assert "perm_mask == 0" in sentence(lambda: model(ids, perm_mask=seen.float()))
    for wrong in (mapping[0], mapping[:1], mapping[:, :, :4], mapping[:, :0]): assert "(2, M, 5)" in sentence(lambda: model(ids, target_mapping=wrong))
    for wrong in (mapping * 2, mapping + mapping.flip(1), mapping / 2): assert "one place" in sentence(lambda: model(ids, target_mapping=wrong))
    memory = model(ids)[1]
    assert "1 layers" in sentence(lambda: model(ids, mems=memory[:1])) and "0 layers" in sentence(lambda: model(ids, mems=[]))
    for wrong in ([m[:1] for m in memory], [m[..., :4] for m in memory], [memory[0], memory[1][:, :3]], [m[0] for m in memory]): assert "tokens, 8" in sentence(lambda: model(ids, mems=wrong))


def test_a_loss_that_teaches_nothing_is_one_sentence():
    model, batch = XLNetLM(XLNet(TINY)), permutation_batch(torch.zeros(2, 6, dtype=torch.long))
    assert "permutation_batch" in sentence(lambda: model.loss(**batch | {"perm_mask": None}))
    assert "permutation_batch" in sentence(lambda: model.loss(**batch | {"target_mapping": None}))
    assert "(2, 6)" in sentence(lambda: model.loss(**batch | {"targets": batch["ids"]}))
    assert "-100" in sentence(lambda: model.loss(**batch | {"targets": torch.full((2, 1), -100)}))
    for K in (1, 0, -3): assert f"One in {K}" in sentence(lambda: permutation_batch(batch["ids"], K=K))
    assert "longer" in sentence(lambda: permutation_batch(batch["ids"][:, :1]))


@pytest.mark.parametrize("order", [[], [1, 2], [0, 0, 1], 3, [[0, 1], [1, 1]], [0.5, 1]])
def test_an_order_that_is_none_is_one_sentence(order):
    assert "order of all places" in sentence(lambda: permutation_masks(order))


@pytest.mark.parametrize("sizes, word", [((20, 1, 3, 8), "heads"), ((20, 0, 2, 8), "n_layer"), ((20, 1, 1, 7), "odd"), ((20, 1, 2, 8, 0), "n_inner"), ((20, 1, 2, 8, None, -1), "mem_len"),
                                         ((20, 1, 2, 8, None, None, 1.5), "reuse_len"), ((20.0, 1, 2, 8), "vocab_size"), ((20, 1, 2, 8, None, None, None, 1e-12, 1.5), "dropout")])
def test_an_odd_shape_is_one_sentence(sizes, word):
    assert word in sentence(lambda: XLNetConfig(*sizes))
