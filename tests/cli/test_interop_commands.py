"""``hedgelab export`` and ``hedgelab import``, and training that goes on from an imported SAE."""

from unittest.mock import create_autospec

import pytest
import torch
import yaml

from hedgelab.cli import main
from hedgelab.data.source import ActivationSource
from hedgelab.interop.saelens import export_saelens, import_saelens
from hedgelab.saes import InferenceSAE, TopKSAE, load_sae, save_sae
from tests.saes.comparison import same_weights


@pytest.fixture
def folder(config, tmp_path):
    """A folder with an SAE of the width of ``tiny.yaml``, and what it reads."""
    save_sae(TopKSAE(6, 3, k=2), tmp_path / "kept")
    ActivationSource(model="smollm2", hook="model.layers.5", layer=5, context_length=64, scale=0.5).save(tmp_path / "kept")
    return tmp_path / "kept"


def test_there_and_back(folder, capsys):
    assert main(["export", str(folder), "--to", "out"]) == 0
    assert "topk, 6 × 3" in capsys.readouterr().out
    _, source = import_saelens("out")
    assert (source.model, source.hook, source.layer) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "model.layers.5", 5)
    assert main(["import", "out", "--to", "back"]) == 0
    printed = capsys.readouterr().out
    assert "saelens → TopKSAE, 6 × 3, in back" in printed
    config = yaml.safe_load(printed.split("config:\n")[1])
    assert config["data"]["init_args"] == {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "layer": 5,
        "context_length": 64,
        "normalisation": "none",
    }
    assert config["model"]["init_args"]["init"] == {"weights": "back"}
    assert isinstance(load_sae("back"), TopKSAE)


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    assert main(["export", str(folder), "--to", str(folder)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["import", "absent", "--to", str(tmp_path / "new")]) == 2
    assert "'absent' is neither a folder nor an id of the hub" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_training_goes_on_from_an_imported_sae(folder, tmp_path, capsys):
    words = ["fit", "--config", "tiny.yaml", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    words += ["--model.init_args.init.weights", str(folder)]
    assert main([*words, "--trainer.max_steps", "1"]) == 0
    save_sae(TopKSAE(6, 4, k=2), tmp_path / "wider")
    assert main([*words[:-1], str(tmp_path / "wider")]) == 2
    assert "has d_in 6 and d_sae 4, the config 6 and 3" in capsys.readouterr().err
    assert main([*words[:-1], "nowhere"]) == 2
    assert "nowhere: holds no sae.safetensors" in capsys.readouterr().err


def test_initial_weights_are_those_on_disk(folder):
    from hedgelab.batch import Batch
    from hedgelab.saes import Initialization

    sae = TopKSAE(6, 3, k=2, init=Initialization(weights=str(folder), seed=7))
    assert not same_weights(sae, load_sae(folder))
    sae.initialize(Batch(torch.ones(4, 6)), None)
    assert same_weights(sae, load_sae(folder))


def test_the_hub_out_of_reach(folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    pytest.importorskip("huggingface_hub", reason="needs hedgelab[llm]")
    assert main(["export", str(folder), "--to", "out", "--push", "me/mine"]) == 2
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    assert main(["import", "you/yours", "--to", "in"]) == 2
    assert "cannot be reached" in capsys.readouterr().err


@pytest.fixture
def hub(monkeypatch):
    """The real client, which takes only what its methods take, and sends nothing."""
    client = pytest.importorskip("huggingface_hub", reason="needs hedgelab[llm]")
    monkeypatch.setattr(client, "HfApi", create_autospec(client.HfApi))
    monkeypatch.setattr(client, "snapshot_download", create_autospec(client.snapshot_download))
    monkeypatch.setattr("hedgelab.interop.formats.hub_problem", lambda: None)
    return client


def test_push_uploads_folder_and_card(folder, hub, capsys):
    assert main(["export", str(folder), "--to", "out", "--push", "me/mine"]) == 0
    assert "uploaded: https://huggingface.co/me/mine" in capsys.readouterr().out
    api = hub.HfApi.return_value
    api.create_repo.assert_called_once_with("me/mine", exist_ok=True)
    assert api.upload_folder.call_args.kwargs["path_in_repo"] == "out"
    card = api.upload_file.call_args.kwargs["path_or_fileobj"]
    assert b'from_pretrained("me/mine", "out")' in card


def test_fetch_takes_a_folder_of_a_repository(folder, hub, tmp_path):
    export_saelens(load_sae(folder), tmp_path / "hub" / "layer_5" / "width_3")
    hub.snapshot_download.return_value = str(tmp_path / "hub")
    assert main(["import", "you/yours/layer_5/width_3", "--to", "in"]) == 0
    asked = hub.snapshot_download.call_args
    assert asked.args == ("you/yours",)
    assert asked.kwargs["allow_patterns"][0] == "layer_5/width_3/*.json"
    assert same_weights(load_sae("in"), load_sae(folder))


MEASURED_ONLY = {
    "normalised": lambda: InferenceSAE(6, 3, normalize_activations="layer_norm"),
    "transcoder": lambda: InferenceSAE(6, 3, d_out=4, skip=True),
}


@pytest.fixture(params=MEASURED_ONLY)
def measured_only(request, config, tmp_path):
    """What kind of SAE that cannot be trained is in the folder ``kept``."""
    sae = MEASURED_ONLY[request.param]()
    for value in sae.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(value))).abs())
    save_sae(sae, tmp_path / "kept")
    return request.param


def test_what_cannot_be_trained_says_so_in_one_line(measured_only, capsys):
    fit = ["fit", "--config", "tiny.yaml", "--trainer.logger", "false"]
    own = ["--model", "InferenceSAE", "--model.d_sae", "3"]
    for words, reason in (
        ([*fit, "--model.init_args.init.weights", "kept"], "kept: InferenceSAE cannot be trained on"),
        ([*fit, *own], "InferenceSAE: is for inference and measuring, and cannot be trained"),
        (["export", "kept", "--to", "out"], "InferenceSAE: is no SAE that hedgelab widens or exports"),
    ):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert reason in told
        assert told.count("\n") == 1


def test_what_can_be_measured_is(measured_only, capsys):
    toy = ["--data.class_path=ToyDataModule", "--data.firing.class_path=IndependentFiring", "--data.d_in=6"]
    toy += ["--data.firing.init_args.probabilities=[0.1, 0.2]", "--rows=64"]
    assert main(["evaluate", "kept", *toy]) == 0
    printed = capsys.readouterr().out
    assert "density/l0" in printed
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("  density/explained_variance "))
    assert row[-1] == "1"  # the oracle's
    assert len(row) == (3 if measured_only == "normalised" else 2)
