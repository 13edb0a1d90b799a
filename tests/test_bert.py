"""What the chapter can't show: any shape, any filling, files that don't fit, input that makes no sense."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.bert import Bert, BertConfig, BertForPreTraining, BertForSequenceClassification, BertForTokenClassification, bert_shape, load_bert, save_bert
from llmbook.corpora import BookError

TINY = BertConfig(vocab_size=20, n_layer=2, n_head=2, n_embd=8, context=10, dropout=0.0)


def sentence(call) -> str:
    with pytest.raises(BookError) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) > 30
    return str(e.value)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 99))
def test_filling_changes_nothing(length, filling, seed):
    torch.manual_seed(seed)
    model, ids = Bert(TINY).eval(), torch.randint(20, (1, length))
    filling = min(filling, 10 - length)
    filled, mask = torch.cat([ids, torch.randint(20, (1, filling))], 1), torch.arange(length + filling)[None] < length
    torch.testing.assert_close(model(filled, mask=mask)[:, :length], model(ids), atol=1e-5, rtol=1e-5)


def test_every_token_sees_both_sides():
    torch.manual_seed(0)
    model, ids = Bert(TINY).eval(), torch.randint(20, (1, 6))
    before = model(ids)
    for i in range(6):
        changed = ids.clone()
        changed[0, i] = (ids[0, i] + 1) % 20
        assert ((model(changed) - before).abs().amax(-1)[0] > 1e-7).all(), "a change anywhere is felt everywhere"


def test_the_loss_is_that_of_all_logits():
    torch.manual_seed(0)
    model, ids = BertForPreTraining(Bert(TINY)), torch.randint(20, (3, 8))
    targets = torch.where(torch.rand(3, 8) < 0.4, ids, -100)
    logits, order = model(ids)
    follows = torch.tensor([0, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) + torch.nn.functional.cross_entropy(order, follows)
    torch.testing.assert_close(model.loss(ids, targets, follows=follows), expected)


@pytest.mark.parametrize("head, options", [(None, {}), (BertForPreTraining, {}), (BertForSequenceClassification, {"n_labels": 3}), (BertForTokenClassification, {"n_labels": 5})])
def test_saved_and_loaded_it_is_the_same(tmp_path, head, options):
    body = Bert(TINY)
    model = (head(body, **options) if head else body).eval()
    save_bert(model, tmp_path / "m")
    again, ids = load_bert(tmp_path / "m", head, **options), torch.randint(20, (2, 7))
    for a, b in zip(model.state_dict().values(), again.state_dict().values()): assert torch.equal(a, b)
    if head: assert torch.equal(load_bert(tmp_path / "m")(ids), body.eval()(ids)), "the body alone loads too"


@pytest.mark.parametrize("head, name", [(BertForSequenceClassification, "BertForSequenceClassification"), (BertForTokenClassification, "BertForTokenClassification")])
def test_transformers_reads_what_is_saved(tmp_path, head, name):
    hf = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'llmbook[hub]'")
    torch.manual_seed(0)
    model = head(Bert(TINY), n_labels=4).eval()
    save_bert(model, tmp_path / "m")
    theirs, ids = getattr(hf, name).from_pretrained(tmp_path / "m", num_labels=4).eval(), torch.randint(20, (2, 9))
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    save_bert(BertForSequenceClassification(Bert(TINY), n_labels=3), tmp_path / "m")
    assert "classifier" in sentence(lambda: load_bert(tmp_path / "m", BertForSequenceClassification, n_labels=4))
    assert "cls.predictions" in sentence(lambda: load_bert(tmp_path / "m", BertForPreTraining))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for change, word in (({"hidden_size": 16}, "shape"), ({"num_hidden_layers": 3}, "lacks"), ({"model_type": "roberta"}, "roberta"), ({"hidden_act": "relu"}, "relu"), ({"num_attention_heads": 3}, "heads")):
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | change))
        assert word in sentence(lambda: load_bert(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(weights[:-10])
    sentence(lambda: load_bert(tmp_path / "m"))


def test_bad_input_is_one_sentence():
    model, ids = Bert(TINY, pooler=False), torch.zeros(2, 5, dtype=torch.long)
    assert "10 positions" in sentence(lambda: model(torch.zeros(1, 11, dtype=torch.long)))
    assert "0…19" in sentence(lambda: model(ids + 20))
    assert "mask" in sentence(lambda: model(ids, mask=torch.ones(2, 4))) and "segments" in sentence(lambda: model(ids, segments=torch.zeros(5)))
    assert "pooler" in sentence(lambda: model.pool(model(ids)))
    assert "hidden" in sentence(lambda: BertForPreTraining(model).loss(ids, torch.full_like(ids, -100)))
    assert "heads" in sentence(lambda: BertConfig(20, 1, 3, 8)) and "n_layer" in sentence(lambda: BertConfig(20, 0, 2, 8))
    assert "lacks" in sentence(lambda: bert_shape({"model_type": "bert", "vocab_size": 3}))


def test_shapes_and_segments_that_make_no_sense_are_one_sentence():
    model, ids = Bert(TINY), torch.zeros(2, 3, dtype=torch.long)
    assert "texts × tokens" in sentence(lambda: model(ids[0])) and "texts × tokens" in sentence(lambda: model(ids[:, :0]))
    assert "segment" in sentence(lambda: model(ids, segments=ids + 2)) and "segment" in sentence(lambda: model(ids, segments=ids - 1))
    assert "mask" in sentence(lambda: model(ids, mask=torch.ones(2, 3, 3)))


def interleaved(w: torch.Tensor, heads: int) -> torch.Tensor:
    "Rows of a projection whose pairs are (i, i + D/2) → rows whose pairs are neighbours, as RoFormer has them."
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(w.shape)


def test_with_rotary_positions_it_is_roformer():
    transformers = pytest.importorskip("transformers")
    model = BertForPreTraining(Bert(BertConfig(20, 3, 4, 32, 48, context=16, dropout=0.0, position="rope"), pooler=False)).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)
    theirs = transformers.RoFormerForMaskedLM(transformers.RoFormerConfig(
        vocab_size=20, embedding_size=32, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16)).eval()
    weights = {k.replace("bert.", "roformer.", 1): interleaved(w, 4) if ".query." in k or ".key." in k else w for k, w in model.state_dict().items()}
    weights = {k.replace("predictions.bias", "predictions.decoder.bias"): w for k, w in weights.items()} | {k: w for k, w in weights.items() if k.endswith("predictions.bias")}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("embed_positions" in k or "decoder.weight" in k for k in missing), (missing, unexpected)
    ids, real = torch.randint(0, 20, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    real[1, 6:] = False
    with torch.no_grad(): torch.testing.assert_close(model(ids, mask=real)[0][real], theirs(ids, attention_mask=real.long()).logits[real], atol=1e-4, rtol=1e-5)


def test_rotary_shape_is_saved_with_the_model(tmp_path):
    model = Bert(BertConfig(20, 1, 2, 16, position="rope", rope_theta=50.0, init_std=0.1))
    save_bert(model, tmp_path / "m")
    again = load_bert(tmp_path / "m")
    assert again.config == model.config and "embeddings.position_embeddings.weight" not in again.state_dict()
    ids = torch.randint(0, 20, (1, 7))
    torch.testing.assert_close(again(ids), model.eval()(ids), rtol=0, atol=0)
    with pytest.raises(BookError, match="position='sideways'"): BertConfig(20, 1, 2, 16, position="sideways")
    with pytest.raises(BookError, match="no pairs to turn"): BertConfig(20, 1, 2, 6, position="rope")
