import pytest
import torch

from hedgelab.data.llm.model import ModelFiles
from hedgelab.data.planting import PlantedActivations, TokenEvents
from hedgelab.errors import UserError


def test_width_is_known_without_weights(make_data, monkeypatch):
    monkeypatch.setattr(ModelFiles, "causal_lm", lambda *args: pytest.fail("loaded weights"))
    assert make_data().d_in == 32
    assert make_data(hook="model.layers.0.mlp.up_proj").d_in == 48
    with pytest.raises(UserError, match=r"data\.layer: the model has layers 0 to 2, got 12"):
        _ = make_data(layer=12).d_in


def test_rows_are_the_models_hidden_states(make_data, tiny_model):
    data = make_data()
    whole = ModelFiles(tiny_model).causal_lm()
    chosen = data.stream("train").context_numbers(0)
    tokens, usable = data.contexts.tokens[data._split["train"]][chosen], data.contexts.usable(1)
    states = whole(input_ids=tokens.long(), output_hidden_states=True).hidden_states[2]
    mine = data._split["train"][chosen]
    candidates = states[usable[mine]]
    nearest = torch.cdist(data.batch("train", 0).x.double(), candidates.double()).min(dim=1).values
    assert nearest.max() < 1e-5


def test_specials_and_first_positions_never_appear(make_data):
    data = make_data(skip_first=3)
    counts = data.contexts.usable(3)
    assert not counts[:, :3].any()
    assert not counts[data.contexts.tokens <= 3].any()
    assert counts.sum() == (data.contexts.tokens > 3)[:, 3:].sum()
    assert data.stream("train").usable.sum(dim=1).max() <= 13


def test_batches_are_pure_and_stages_disjoint(make_data):
    data, again = make_data(), make_data()
    last = data.batch("train", 57).x
    for stage in ("train", "val", "test"):
        for index in (0, 11, 3):
            torch.testing.assert_close(again.batch(stage, index).x, data.batch(stage, index).x, rtol=0, atol=0)
    torch.testing.assert_close(again.batch("train", 57).x, last, rtol=0, atol=0)
    assert last.shape == (32, 32)
    assert last.dtype == torch.float32
    split = data._split
    assert torch.cat(list(split.values())).sort().values.tolist() == list(range(len(data.contexts.tokens)))


def test_the_seed_moves_training_data_only(make_data):
    one, two = make_data(seed=1), make_data(seed=2)
    assert not torch.equal(one.batch("train", 0).x, two.batch("train", 0).x)
    torch.testing.assert_close(one.batch("val", 0).x, two.batch("val", 0).x, rtol=0, atol=0)


def test_prefetched_equals_direct(make_data):
    direct = make_data()
    for index, batch in enumerate(make_data().batches("train", 5, 60), start=5):
        torch.testing.assert_close(batch.x, direct.batch("train", index).x, rtol=0, atol=0)


def test_training_in_two_parts_sees_what_training_at_once_sees(make_data, fit, tmp_path):
    _, whole = fit(make_data(), 30)
    trainer, first = fit(make_data(), 11)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_data()
    _, second = fit(resumed, 30, ckpt_path=str(tmp_path / "half.ckpt"))
    assert len(whole.seen) == 30
    torch.testing.assert_close(torch.stack(first.seen + second.seen), torch.stack(whole.seen), rtol=0, atol=0)
    assert "background" not in vars(resumed)  # nothing is left running
    assert resumed.harvester._passes is None


def test_normalisation(make_data):
    plain = make_data()
    rows = plain.stream("train").block(0).rows.double()
    assert plain.activation_scale == 1
    assert plain.activation_mean is None
    scaled = make_data(normalisation="unit_norm")
    first = torch.cat([scaled.batch("train", i).x for i in range(scaled.stream("train").batches_per_block)])
    assert first.double().square().sum(dim=1).mean() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(scaled.batch("val", 1).x, plain.batch("val", 1).x * scaled.activation_scale)
    centred = make_data(normalisation="centred")
    torch.testing.assert_close(centred.activation_mean.double(), rows.mean(dim=0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(centred.batch("val", 1).x, plain.batch("val", 1).x - centred.activation_mean)


def test_norm_percentiles_report_outliers(make_data):
    plain = make_data()
    norms = plain.stream("train").block(0).norms
    reported = {key.removeprefix("data/norm/"): value for key, value in plain.describe().items()}
    assert reported["p50"] == pytest.approx(norms.quantile(0.5).item())
    assert (reported["p0"], reported["p100"], reported["dropped"]) == (norms.min().item(), norms.max().item(), 0)
    ratio = (norms.quantile(0.99) / norms.median()).item()
    assert make_data(max_norm_ratio=ratio).describe()["data/norm/dropped"] == pytest.approx(0.01, abs=0.005)
    assert plain.throughput()["data/tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts_per_block": 0}, r"data\.contexts_per_block: expected a whole number of at least 1, got 0"),
        ({"contexts_at_once": True}, r"data\.contexts_at_once: expected a whole number"),
        ({"max_contexts": 1.5}, r"data\.max_contexts: expected a whole number"),
        ({"context_length": True}, r"data\.context_length: expected a whole number"),
        ({"layer": True}, r"data\.layer: expected a whole number"),
        ({"skip_first": False}, r"data\.skip_first: expected a whole number"),
        ({"skip_first": 16}, r"data\.skip_first: must be from 0 to"),
        ({"max_norm_ratio": 0.5}, r"data\.max_norm_ratio: must be greater than 1"),
        ({"held_out": 1.0}, r"data\.held_out: 1\.0 of \d+ contexts leaves a stage without any"),
        ({"device": "cuda:77"}, r"data\.device: 'cuda:77' is not to be had"),
        ({"batch_size": 100_000}, r"data\.contexts_per_block: .* too few for a batch of 100000"),
        ({"context_length": 1_000_000, "skip_first": 0}, r"data\.text: holds \d+ tokens, too few"),
        ({"held_out": 0.001}, r"data\.held_out: 0\.001 of \d+ contexts leaves a stage without any"),
    ],
)
def test_impossible_values_are_named(make_data, options, message):
    with pytest.raises(UserError, match=message):
        make_data(**options).batch("train", 0)


@pytest.mark.parametrize("max_norm_ratio", [None, 1.2])
def test_tokens_are_those_of_the_rows(make_data, tiny_model, max_norm_ratio):
    data = make_data(hook="model.embed_tokens", max_norm_ratio=max_norm_ratio, normalisation="none")
    embedding = ModelFiles(tiny_model).causal_lm().get_input_embeddings().weight
    assert (data.stream("train").norm_percentiles()["dropped"] > 0) == (max_norm_ratio is not None)
    ids = torch.cdist(data.batch("train", 1).x, embedding).argmin(1)
    assert data.tokens("train", 1) == data.files.tokenizer().convert_ids_to_tokens(ids.tolist())


def test_features_may_be_planted_where_a_token_is(make_data):
    data = PlantedActivations(make_data(), TokenEvents(["w[0-9]", "w3.*"]), dose=[1.0, 0.0], elsewhere=[0.0, 1.0])
    batch, tokens = data.batch("train", 2), data.base.tokens("train", 2)
    on = torch.tensor([[len(token) == 2, not token.startswith("w3")] for token in tokens])
    assert torch.equal(batch.features > 0, on)
    added = batch.x - data.base.batch("train", 2).x
    torch.testing.assert_close(added, batch.features @ data.feature_directions, atol=1e-5, rtol=0)
    assert data.parents.tolist() == [-1, -1]
