"""Several layers from one forward pass: every SAE of a group gets what its own layer alone would give, to the last bit."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from hedgelab.cli import main
from hedgelab.protocols.layer_data import LayerData
from hedgelab.saes import SAEGroup, TopKSAE, load_sae
from hedgelab.saes.initialization import Initialization
from hedgelab.training.steps import batch_of

from .conftest import ARCHITECTURES

OPTIONS = {"normalisation": "unit_norm", "max_norm_ratio": 2.0, "contexts_per_block": 12, "max_contexts": 80}
LAYERS = {"deep": 2, "first": 0, "also_deep": -1, "middle": 1}


def layers(make_data, **options):
    return LayerData({name: make_data(layer=layer, **OPTIONS, **options) for name, layer in LAYERS.items()})


def assert_same(data, make_data, count, **options):
    data.setup("fit")
    alone = {name: make_data(layer=layer, **OPTIONS, **options) for name, layer in LAYERS.items()}
    for stage, batches in (("train", count), ("val", 2)):
        streams = [one.batches(stage, 3, batches + 3) for one in alone.values()]
        for number, (batch, *own) in enumerate(zip(data.batches(stage, 3, batches + 3), *streams, strict=True)):
            for name, expected in zip(alone, own, strict=True):
                assert torch.equal(batch_of(batch, name).x, expected.x), (stage, number, name)
    for name, own in alone.items():
        assert data.of_member(name).source() == own.source()
        assert data.of_member(name).describe() == own.describe()
    data.teardown("fit")
    return alone


def test_batches_are_those_of_each_layer_alone(make_data):
    data = layers(make_data)
    alone = assert_same(data, make_data, 40)  # more than an epoch
    read = sum(one.tokens_read for one in data.layers)
    assert read == alone["deep"].tokens_read  # one pass over each context does for all
    assert_same(data, make_data, 5)  # also when it is begun again


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_every_architecture(make_data, architecture, name):
    assert_same(layers(make_data, model=architecture(name)), make_data, 12, model=architecture(name))


def trained(module, data, steps):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", num_sanity_val_steps=0, val_check_interval=6, **quiet)
    trainer.fit(module, datamodule=data)
    return trainer.callback_metrics


@pytest.mark.slow
def test_a_group_trains_as_each_does_alone(make_data):
    def make(name):
        return TopKSAE(32, 48, k=4, init=Initialization(b_dec="mean", seed=0))

    group = SAEGroup({name: make(name) for name in LAYERS})
    measured = trained(group, layers(make_data), 12)
    for name, layer in LAYERS.items():
        sae = make(name)
        own = trained(sae, make_data(layer=layer, **OPTIONS), 12)
        assert all(torch.equal(value, group.members[name].state_dict()[key]) for key, value in sae.state_dict().items())
        assert measured[f"{name}/val/explained_variance"] == own["val/explained_variance"]
        assert measured[f"{name}/val/mse"] == own["val/mse"]


@pytest.mark.slow
def test_a_sweep_over_layers_runs_the_model_once(tiny_model, tiny_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {
        "model": tiny_model, "layer": 0, "text": {"class_path": "TextFiles", "init_args": {"paths": tiny_text}},
        "context_length": 16, "contexts_per_block": 20, "contexts_at_once": 8, "batch_size": 32, "device": "cpu",
    }  # fmt: skip
    tree = {
        "seed_everything": 0,
        "trainer": {"max_steps": 6, "accelerator": "cpu", "enable_progress_bar": False},
        "data": {"class_path": "LLMDataModule", "init_args": data},
        "model": {"class_path": "TopKSAE", "init_args": {"d_sae": 48, "k": 4}},
    }
    for layer in (0, 2):
        data["layer"] = layer
        Path("fit.yaml").write_text(yaml.safe_dump(tree | {"name": f"alone{layer}"}))
        assert main(["fit", "--config=fit.yaml"]) == 0
    made = []
    load = LayerData.setup
    monkeypatch.setattr(LayerData, "setup", lambda self, stage: made.append(self) or load(self, stage))
    sweep = {"axes": {"data.layer": [0, 2], "seed": [0, 1]}}
    Path("sweep.yaml").write_text(yaml.safe_dump(tree | {"sweep": sweep, "name": "together"}))
    assert main(["sweep", "--config=sweep.yaml"]) == 0
    (shared,) = made
    assert sorted(one.layer for one in shared.layers) == [0, 2]
    assert [one.tokens_read > 0 for one in shared.layers] == [one.layer == 2 for one in shared.layers]
    saes = {folder.parents[2]: folder for folder in Path("runs").rglob("activations.json")}
    found = [(json.loads(file.read_text())["layer"], load_sae(file.parent)) for file in saes.values()]
    assert sorted(layer for layer, _ in found) == [0, 0, 0, 2, 2, 2]
    for layer in (0, 2):
        weights = [sae.W_enc for at, sae in found if at == layer]
        pairs = [torch.equal(one, other) for number, one in enumerate(weights) for other in weights[:number]]
        assert pairs.count(True) == 1  # the fit alone, and the sweep's cell of its seed
