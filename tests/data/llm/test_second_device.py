"""Activations of a model on another device than the CPU: nothing of the two devices is ever mixed."""

import inspect

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.data.llm.cache_writing import write_cache
from hedgelab.data.llm.hook import SplicedModel
from hedgelab.data.llm.labelled import LabelledWords, TaggedWords
from hedgelab.data.planting import Directions, Events, PlantedActivations
from hedgelab.data.toy import IndependentFiring
from hedgelab.errors import UserError
from hedgelab.protocols.evaluation import Readings, suite_classes
from hedgelab.protocols.layer_data import LayerData
from hedgelab.saes import TopKSAE, duplicate
from hedgelab.training.steps import batch_of

from .test_evaluation_suites import labelled  # noqa: F401 (a fixture)


@pytest.mark.parametrize("options", [{"normalisation": "unit_norm", "max_norm_ratio": 3.0}, {"normalisation": "centred"}])
@pytest.mark.parametrize("cached", [False, True])
def test_batches(make_data, tmp_path, gpu, options, cached):
    if cached:
        options = options | {"cache": str(tmp_path / "cache")}
        write_cache(make_data(device="cuda"), str(tmp_path / "cache"))
    plain, other = make_data(**options), make_data(device="cuda", **options)
    for stage, index in (("train", 3), ("train", 40), ("val", 1)):
        x = other.batch(stage, index).x
        assert x.device == gpu.DEVICE
        torch.testing.assert_close(x.cpu(), plain.batch(stage, index).x)
    assert other.source().scale == pytest.approx(plain.source().scale)
    assert other.describe() == pytest.approx(plain.describe())


@pytest.mark.parametrize("cached", [False, True])
def test_training_waits_for_nothing_that_feeds_it(make_data, tmp_path, gpu, cached):
    """The model, or its cache, has a CUDA stream of its own, and what goes to the GPU goes there by itself."""
    options = {"device": "cuda", "max_norm_ratio": 3.0, "normalisation": "unit_norm"}
    if cached:
        options["cache"] = str(tmp_path / "cache")
        write_cache(make_data(), options["cache"])
    data = make_data(**options)
    data.setup("fit")
    for known in (gpu.copies, gpu.waits, gpu.streams):
        known.clear()
    for batch in data.batches("train", 0, 60):
        _ = batch.x @ batch.x.T
    assert len(gpu.streams) == 2
    assert gpu.copies == []
    assert {wait.partition(" ")[0] for wait in gpu.waits} == {"data/llm/stream.py:_compute"}  # in the background
    data.teardown("fit")


def test_several_layers(make_data, gpu):
    plain, other = (
        LayerData({f"layer{layer}": make_data(layer=layer, device=device, max_norm_ratio=3.0) for layer in (2, 0)})
        for device in ("cpu", "cuda")
    )
    for data in (plain, other):
        data.setup("fit")
    for here, there in zip(plain.batches("train", 0, 12), other.batches("train", 0, 12), strict=True):
        for name in plain.members:
            torch.testing.assert_close(batch_of(there, name).x.cpu(), batch_of(here, name).x)
    for data in (plain, other):
        data.teardown("fit")


def test_batches_of_the_cpu_go_to_a_gpu_by_themselves(make_data, gpu):
    batch = Batch(torch.randn(4, 3), torch.randn(4, 2)).to("cuda")
    assert batch.x.is_cuda
    assert batch.features.is_cuda
    for of_llm in make_data().batches("train", 0, 3):
        assert of_llm.to("cuda").x.is_cuda
    assert gpu.copies == []
    _ = torch.randn(3).to("cuda")
    assert len(gpu.copies) == 1


def test_replacing_activations(make_data, gpu):
    data = make_data()
    tokens = data.contexts.tokens[:3]
    plain = SplicedModel(data.files.causal_lm(), data.hook_path)
    other = SplicedModel(data.files.causal_lm().to(gpu.DEVICE), data.hook_path)
    expected = plain.logits(tokens, lambda rows: rows * 2)
    logits = other.logits(tokens, lambda rows: rows * 2)
    assert logits.device == gpu.DEVICE
    torch.testing.assert_close(logits.cpu(), expected)
    torch.testing.assert_close(other.activations(tokens).cpu(), plain.activations(tokens))


def subclasses(cls):
    """All of hedgelab's own, that can be made."""
    found = [one for sub in cls.__subclasses__() for one in (sub, *subclasses(sub))]
    return [one for one in found if one.__module__.startswith("hedgelab.") and not inspect.isabstract(one)]


EVENTS = {
    "LatentEvents": lambda d_in: {"sae": TopKSAE(d_in, 16, k=8), "latents": [1, 3]},
    "TokenEvents": lambda d_in: {"patterns": [r"w1\d", "w2"]}, "PlantedParents": lambda d_in: {"rates": [0.3, 0.5]},
}  # fmt: skip


DIRECTIONS = {"PrincipalDirections": {"cosine": 0.5, "rank": 8}}


def pairs():
    """Every kind of event with every kind of direction; of the fast tests each once."""
    for row, events in enumerate(subclasses(Events)):
        for column, directions in enumerate(kinds := subclasses(Directions)):
            marks = [] if column == row % len(kinds) else pytest.mark.slow
            yield pytest.param(events, directions, id=f"{events.__name__}-{directions.__name__}", marks=marks)


@pytest.mark.parametrize(("events", "directions"), pairs())
def test_planted_activations(make_data, gpu, events, directions):
    torch.manual_seed(0)
    given = EVENTS[events.__name__](32)
    made = []
    for device in ("cpu", "cuda"):
        base = make_data(device=device, batch_size=64, held_out=0.3)
        data = PlantedActivations(
            base,
            events(**given),
            dose=0.5,
            firing=IndependentFiring([0.2] * 3),
            directions=directions(**DIRECTIONS.get(directions.__name__, {})),
            seed=0,
        )
        data.setup("fit")
        made.append((data.batch("train", 1), data.feature_directions, data.null_directions, data.parents))
        data.teardown("fit")
    (here, *known), (there, *known_there) = made
    assert there.x.is_cuda
    assert there.features.is_cuda
    torch.testing.assert_close(there.x.cpu(), here.x)
    torch.testing.assert_close(there.features.cpu(), here.features)
    for one, other in zip(known_there, known, strict=True):
        torch.testing.assert_close(one.cpu(), other)


class Letters:
    """Words whose labels every probe can learn."""

    def load(self, tokenizer):
        words = torch.arange(4, 24).repeat(6)
        labels = torch.stack([words % 2 == 0, words % 2 == 1], dim=1)
        return LabelledWords(torch.tensor([5, 9, 7]), words, labels, torch.arange(120) % 3 == 0, ["a", "b"])


def suite_arguments(name, folder):
    """What a suite is made with: small, and texts of its own where it needs some."""
    text, tags = str(folder / "text.jsonl"), str(folder / "tags.jsonl")
    return {
        "density": [100], "geometry": [100], "residual": [256], "loss_recovered": [4], "absorption": [Letters()],
        "probing": [TaggedWords(text, tags, {"EVEN": ["even"]}, contexts=20, context_length=16), [1]],
    }[name]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(suite_classes().keys() - {"truth"}))  # which no text has
def test_evaluation_suites(make_data, gpu, labelled, name):  # noqa: F811
    torch.manual_seed(0)
    sae, found = TopKSAE(32, 48, 6), []
    for device in ("cpu", "cuda"):
        data = make_data(device=device, held_out=0.2)
        (suite, readings) = suite_classes()[name](*suite_arguments(name, labelled)), Readings(data)
        found.append(dict(suite.score({"one": duplicate(sae).to(device)}, readings))["one"].metrics)
        data.teardown("fit")
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4, nan_ok=True)


def test_a_device_without_float64_is_refused(make_data, monkeypatch):
    """As a Mac's GPU is: activations are measured in it."""

    def empty(*size, device=None, dtype=None, real=torch.empty, **options):
        if device == "mps" and dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return real(*size, device="cpu" if device == "mps" else device, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UserError, match=r"data\.device: 'mps' is not to be had here; expected auto, cpu or cuda"):
        make_data(device="mps")
