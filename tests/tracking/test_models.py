"""Finished SAEs among MLflow's logged models: listed once, with metrics, and loaded by address without a copy of weights."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

import hedgelab as hl
from hedgelab.errors import UserError
from hedgelab.protocols.evaluation.evaluate import find, record
from hedgelab.protocols.evaluation.suite import Scores
from hedgelab.saes.io import save_sae
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.models import _load_pyfunc
from hedgelab.tracking.runs import resolve_run
from hedgelab.tracking.store import INTENDED, ensure_store
from hedgelab.tracking.sync import sync
from tests.saes.comparison import same_weights

DATA = {"class_path": "toys.Mine", "init_args": {"x": 3}}


@pytest.fixture
def sae(tmp_path):
    torch.manual_seed(0)
    sae = hl.TopKSAE(6, 4, k=2)
    save_sae(sae, tmp_path / "trained")
    return sae


def keep(tracker, sae, tmp_path):
    """What a fit does at its end."""
    tracker.log_hyperparams({"data": DATA})
    tracker.log_metrics({"val/l0": 2.0, "val/mse": float("inf"), "system/memory": 9.0, "latent0/norm": 1.0}, 5)
    tracker.log_artifact(tmp_path / "trained", "sae", model=sae.config())
    tracker.log_tags({"weights_sha256": "0"})
    tracker.finalize("success")


def models(client):
    return client.search_logged_models([one.experiment_id for one in client.search_experiments()])


def test_an_sae_is_listed_with_metrics_and_loads_by_address(uri, sae, tmp_path):
    tracker = MLflowTracker("toys", "a/b", uri=uri)
    keep(tracker, sae, tmp_path)
    (model,) = models(client := ensure_store(uri))
    assert (model.name, str(model.status), model.source_run_id) == ("a_b", "READY", tracker.run_id)
    assert (model.params["class"], model.params["k"]) == ("TopKSAE", "2")
    shown = [(one.key, one.value, one.step, one.dataset_name, one.run_id) for one in model.metrics]
    assert shown == [("val/l0", 2.0, 5, "Mine 3", tracker.run_id)]
    assert client.get_run(tracker.run_id).data.metrics["val/l0"] == 2.0
    for address in (f"models:/{model.model_id}", f"runs:/{tracker.run_id}/sae"):
        assert same_weights(hl.load(address), sae)
        assert same_weights(hl.load(address, cls=hl.TopKSAE), sae)
        assert resolve_run(address, with_sae=True).run_id == tracker.run_id
    folder = Path(model.artifact_location.removeprefix("file://"))
    assert (folder / "sae.safetensors").stat().st_nlink == 2  # a second name of the run's, no copy


def test_scores_of_an_evaluation_are_shown_with_the_model(uri, sae, tmp_path):
    tracker = MLflowTracker(uri=uri)
    keep(tracker, sae, tmp_path)
    (found,), above = find(f"models:/{models(ensure_store(uri))[0].model_id}")
    assert (found.run_id, above) == (tracker.run_id, None)
    record(found.run_id, "truth", "mark", Scores({"truth/mcc": 0.5}))
    assert {one.key for one in models(ensure_store(uri))[0].metrics} == {"val/l0", "truth/mcc"}


def test_a_model_registered_under_a_name_is_found(uri, sae, tmp_path):
    tracker = MLflowTracker(uri=uri)
    keep(tracker, sae, tmp_path)
    client = ensure_store(uri)
    client.create_registered_model("best")
    client.create_model_version("best", models(client)[0].artifact_location, run_id=tracker.run_id)
    client.set_registered_model_alias("best", "champion", "1")
    assert {resolve_run(f"models:/best{end}").run_id for end in ("/1", "@champion", "/latest")} == {tracker.run_id}


def test_mlflow_itself_loads_it(uri, sae, tmp_path, monkeypatch):
    import mlflow

    keep(MLflowTracker(uri=uri), sae, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{models(ensure_store(uri))[0].model_id}")
    assert same_weights(loaded.get_raw_model(), sae)
    x = np.ones((3, 6))
    expected = sae(torch.ones(3, 6)).detach().numpy()
    assert np.allclose(loaded.predict(x)["x_hat"], expected)
    assert loaded.predict(x)["codes"].shape == (3, 4)


@pytest.mark.parametrize("where", ["mlflow.utils.uri.is_local_uri", "os.link"])
def test_weights_on_a_server_stay_with_the_run(where, uri, sae, tmp_path, monkeypatch):
    with monkeypatch.context() as far:
        far.setattr(where, Mock(return_value=False, side_effect=OSError("other disk") if where == "os.link" else None))
        keep(MLflowTracker(uri=uri), sae, tmp_path)
    (model,) = models(ensure_store(uri))
    folder = Path(model.artifact_location.removeprefix("file://"))
    assert sorted(file.name for file in folder.iterdir()) == ["MLmodel", "sae.json"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert same_weights(_load_pyfunc(str(folder)).sae, sae)
    assert same_weights(hl.load(f"models:/{model.model_id}"), sae)


def test_what_an_outage_cuts_short_is_done_later_once(uri, sae, tmp_path, monkeypatch):
    tracker = MLflowTracker(uri=uri)
    client = tracker.experiment

    def fail(*_, **__):
        raise ConnectionError("gone")

    for cut in ("create_logged_model", "log_model_artifacts", "log_outputs", "finalize_logged_model"):
        with monkeypatch.context() as broken:
            broken.setattr(client, cut, fail)
            keep(tracker, sae, tmp_path)
        assert list((tmp_path / "runs" / "spool").glob("*.jsonl"))
    assert sync(uri).left == []
    (model,) = models(client)
    assert str(model.status) == "READY"
    assert [one.key for one in model.metrics] == ["val/l0"]
    assert len(client.get_run(tracker.run_id).outputs.model_outputs) == 1


def test_a_server_without_models_gets_the_rest(uri, sae, tmp_path, monkeypatch):
    tracker = MLflowTracker(uri=uri)
    client = tracker.experiment

    def unknown(*_, **__):
        raise MlflowException("404", ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(client, "search_logged_models", unknown)
    keep(tracker, sae, tmp_path)
    assert not list((tmp_path / "runs" / "spool").iterdir())
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert same_weights(hl.load(f"runs:/{tracker.run_id}/sae"), sae)


def test_a_run_kept_locally_takes_its_model_along(uri, sae, tmp_path, empty_database):
    tracker = MLflowTracker(tags={INTENDED: (other := f"sqlite:///{tmp_path}/server/mlflow.db")}, uri=uri)
    tracker.log_text("note", "notes/first.md")
    keep(tracker, sae, tmp_path)
    (tmp_path / "server").mkdir()
    shutil.copy(empty_database, tmp_path / "server" / "mlflow.db")
    assert sync(other).left == []
    (model,) = models(server := ensure_store(other))
    assert (str(model.status), model.params["k"], model.metrics[0].key) == ("READY", "2", "val/l0")
    assert sorted(one.path for one in server.list_artifacts(model.source_run_id)) == ["notes", "sae"]
    assert same_weights(_load_pyfunc(model.artifact_location.removeprefix("file://")).sae, sae)


@pytest.mark.parametrize(
    "address", ["models:/m-0", "models:/nothing/1", "models:/nothing@best", "models:/", "runs:/", "runs:/0"]
)
def test_an_address_of_nothing_is_one_line(uri, address):
    with pytest.raises(UserError) as error:
        hl.load(address)
    assert "\n" not in str(error.value)


def test_a_model_of_another_tool_is_refused(uri):
    model = ensure_store(uri).create_logged_model("0", "theirs")
    with pytest.raises(UserError, match="no run of hedgelab made this model"):
        hl.load(f"models:/{model.model_id}")
