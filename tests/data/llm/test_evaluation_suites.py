"""Evaluations of SAEs on a tiny random language model: every suite, against numbers made by hand, and together."""

import json

import pytest
import torch

from hedgelab.data.llm.labelled import TaggedWords
from hedgelab.data.source import ActivationSource
from hedgelab.data.tensors import TensorActivations
from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.metrics.functional.basic import explained_variance
from hedgelab.protocols.evaluation import ModelReader, Readings, suite_classes
from hedgelab.protocols.evaluation.built_in import AbsorptionSuite, DensitySuite, GeometrySuite, LossSuite, ProbingSuite
from hedgelab.protocols.evaluation.suite import choose, make_suites
from hedgelab.saes import BatchTopKSAE, TopKSAE

D_SAE = 48


@pytest.fixture(scope="module")
def data(make_data):
    return make_data(normalisation="unit_norm", skip_first=1, held_out=0.2)


@pytest.fixture(scope="module")
def readings(data):
    return Readings(data)


@pytest.fixture(scope="module")
def reader(readings):
    return readings.model


@pytest.fixture(scope="module")
def saes(data):
    made = {}
    for name, sae in (("topk", TopKSAE(32, D_SAE, 6)), ("batch", BatchTopKSAE(32, D_SAE, 6))):
        sae.initialize(data.batch("train", 0), None)
        if name == "batch":
            sae.threshold.fill_(0.05)
        made[name] = sae.eval()
    return made


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Documents with tags by the word, a kind by the words they are made of, and he or she."""
    folder = tmp_path_factory.mktemp("labelled")
    random = torch.Generator().manual_seed(0)
    with (folder / "text.jsonl").open("w") as text, (folder / "tags.jsonl").open("w") as tags:
        for doc in range(60):
            kind = doc % 2
            numbers = (torch.randint(0, 28, (60,), generator=random) + 30 * kind).tolist()
            words = [f"w{n}" for n in numbers]
            for place in range(4, 60, 8):
                words[place] = ("w58", "w59")[doc // 2 % 2]
            offsets, start = [], 0
            for word in words:
                offsets.append([start, start + len(word)])
                start += len(word) + 1
            text.write(json.dumps({"doc": doc, "text": " ".join(words), "kind": "ab"[kind]}) + "\n")
            names = ["even" if int(word[1:]) % 2 == 0 else "odd" for word in words]
            tags.write(json.dumps({"doc": doc, "tags": names, "offsets": offsets}) + "\n")
    return folder


def only(suite, saes, readings, name="topk"):
    return dict(suite.score({name: saes[name]}, readings))[name]


def test_reading_is_what_training_sees(reader, data):
    contexts = data.stage_contexts("val")
    usable = contexts.usable(1)
    rows, kept = reader.rows("test", contexts.tokens.long(), usable)
    assert kept.all()
    raw = data.harvester.rows(contexts.tokens, usable).float()
    torch.testing.assert_close(rows, raw * data.activation_scale)
    torch.testing.assert_close(reader.restore(rows), raw)
    again = ModelReader(data, ActivationSource(scale=2.0, mean=tuple([1.0] * 32)))
    torch.testing.assert_close(again.rows("test", contexts.tokens.long(), usable)[0], (raw - 1) * 2)


def test_activations_are_read_once(data, monkeypatch):
    contexts = data.stage_contexts("test")
    usable = contexts.usable(2)
    first, _ = ModelReader(data).rows("test", contexts.tokens.long(), usable)
    monkeypatch.setattr(data.harvester, "rows", lambda *_: pytest.fail("asked the model again"))
    assert torch.equal(ModelReader(data).rows("test", contexts.tokens.long(), usable)[0], first)


def test_density_and_geometry(readings, saes):
    x = readings.rows(100)
    assert len(x) >= 100
    scores = only(DensitySuite(100), saes, readings)
    codes = saes["topk"].encode(x).to_dense()
    fired = (codes > 0).double()
    assert scores.metrics["density/l0"] == pytest.approx(fired.sum(1).mean().item())
    assert scores.metrics["density/dead_fraction"] == pytest.approx((fired.sum(0) == 0).double().mean().item())
    reference = explained_variance(x, saes["topk"](x))
    assert scores.metrics["density/explained_variance"] == pytest.approx(reference.item())
    geometry = only(GeometrySuite(100), saes, readings)
    live = torch.nn.functional.normalize(saes["topk"].W_dec.detach()[fired.sum(0) > 0], dim=1)
    cosines = (live @ live.T).fill_diagonal_(-2)
    assert geometry.metrics["geometry/mean_max_cosine"] == pytest.approx(cosines.max(1).values.mean().item(), abs=1e-5)


def test_loss_recovered_is_that_of_splicing_by_hand(readings, data, saes):
    scores = dict(LossSuite(5).score(saes, readings))
    model = data.files.causal_lm()
    contexts = data.stage_contexts("test")
    tokens, usable = contexts.tokens[:5].long(), contexts.usable(1)[:5]
    caught = {}
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: caught.update(x=output))

    def losses(replacement=None):
        def hook(module, args, output):
            return None if replacement is None else torch.where(usable[..., None], replacement, output)

        handle = model.model.layers[1].register_forward_hook(hook)
        logits = model(input_ids=tokens).logits
        handle.remove()
        predicted = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return -predicted[usable[:, :-1]].mean(), logits[:, :-1][usable[:, :-1]].log_softmax(-1)

    with torch.no_grad():
        clean, clean_logs = losses()
        x = caught["x"]
        scale = data.activation_scale
        for name, sae in saes.items():
            x_hat = sae(x.reshape(-1, 32) * scale).reshape(x.shape) / scale
            spliced, logs = losses(x_hat)
            zero, _ = losses(torch.zeros_like(x))
            ablated, _ = losses(x[usable].mean(0).expand_as(x))
            kl = (clean_logs.exp() * (clean_logs - logs)).sum(-1).mean()
            metrics = scores[name].metrics
            assert metrics["loss_recovered/cross_entropy"] == pytest.approx(clean.item(), rel=1e-4)
            assert metrics["loss_recovered/cross_entropy_sae"] == pytest.approx(spliced.item(), rel=1e-4)
            assert metrics["loss_recovered/cross_entropy_zero"] == pytest.approx(zero.item(), rel=1e-4)
            assert metrics["loss_recovered/cross_entropy_mean"] == pytest.approx(ablated.item(), rel=1e-4)
            assert metrics["loss_recovered/kl_sae"] == pytest.approx(kl.item(), rel=1e-2, abs=1e-6)
            assert metrics["loss_recovered/kl_recovered_mean_noise"] > 0
    handle.remove()


def test_probing_reads_the_tagged_tokens(readings, reader, saes, labelled):
    words = TaggedWords(
        str(labelled / "text.jsonl"), str(labelled / "tags.jsonl"), {"EVEN": ["even"]}, contexts=30, context_length=16
    )
    suite = ProbingSuite(words, [1, 4])
    scores = only(suite, saes, readings)
    names = {f"probing/{kind}_k{k}" for kind in ("f1", "auc") for k in (1, 4)}
    assert set(scores.metrics) == names | {f"{name}_noise" for name in names}
    assert scores.metrics["probing/auc_k4"] >= 0.5
    assert scores.metrics == only(suite, saes, readings).metrics
    raw, (x, labels, tests) = words.load(reader.tokenizer), suite.activations(reader)
    test = tests[0]
    assert len(tests) == 3
    assert not torch.equal(tests[1], tests[2])  # other documents
    of_splits = [only(ProbingSuite(words, [4], splits=n), saes, readings).metrics["probing/f1_k4"] for n in (1, 2)]
    second = 2 * of_splits[1] - of_splits[0]
    assert scores.metrics["probing/f1_k4_noise"] > 0
    assert 0 <= second <= 1
    kept = raw.positions[:, 1] >= 1
    assert len(x) == kept.sum()
    assert labels[test].sum() == raw.labels[kept & raw.test].sum()
    # the first test row is the activation at the first tagged token behind the skipped one
    context, position = raw.positions[kept & raw.test][0].tolist()
    expected = reader.spliced.activations(raw.tokens[context : context + 1])[0, position] * reader.data.activation_scale
    torch.testing.assert_close(x[test][0], expected, rtol=1e-4, atol=1e-5)


def test_first_letters_end_to_end(readings, saes):
    class Letters:
        def load(self, tokenizer):
            from hedgelab.data.llm.labelled import LabelledWords

            words = torch.arange(4, 24).repeat(12)  # few enough for any labels to be linear
            labels = torch.stack([words % 2 == 0, words % 2 == 1], dim=1)
            return LabelledWords(torch.tensor([5, 9, 7]), words, labels, torch.arange(240) % 3 == 0, ["a", "b"])

    scores = only(AbsorptionSuite(Letters()), saes, readings)
    assert scores.metrics["absorption/probe_f1"] == pytest.approx(1.0)  # the test words are among the training words
    assert scores.metrics["absorption/letters"] == 2
    assert {f"absorption/{key}_noise" for key in ("full", "fraction", "split_latents", "f1_k1")} <= set(scores.metrics)
    of_one = only(AbsorptionSuite(Letters(), splits=1), saes, readings).metrics
    assert not any(name.endswith("_noise") for name in of_one)
    assert 0 <= scores.metrics["absorption/full"] <= 1
    assert 0 <= scores.metrics["absorption/fraction"] <= 1


def test_suites_without_their_text_are_left_out_or_refused(data):
    from hedgelab.errors import UserError

    suites = make_suites({}, suite_classes())
    toy = ToyDataModule(d_in=8, firing=IndependentFiring([0.2, 0.3]))
    of_tensor = TensorActivations(torch.randn(100, 8), batch_size=50)

    def chosen(wanted, on):
        return {suite.name for suite in choose(suites, wanted, on)[0]}

    plain = {"density", "geometry", "residual"}
    assert chosen(["all"], data) == {*plain, "absorption", "loss_recovered"}
    left_out = choose(suites, ["all"], data)[1]
    assert set(left_out) == {"probing", "truth"}
    assert chosen(["all"], toy) == {*plain, "truth"}
    assert chosen(["all"], of_tensor) == plain
    assert chosen(["geometry", "geometry"], toy) == {"geometry"}
    with pytest.raises(UserError, match=r"--suite probing: needs labelled text; set words"):
        chosen(["probing"], data)
    with pytest.raises(UserError, match=r"--suite truth: needs activations whose features are known"):
        chosen(["truth"], of_tensor)
    with pytest.raises(UserError, match=r"--suite: expected some of .* got 'nothing'"):
        chosen(["nothing"], toy)
