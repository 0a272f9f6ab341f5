"""Finished SAEs as MLflow's logged models: listed with their metrics, and loaded by address (``models:/m-…``).

Weights are kept once. A model's folder holds ``MLmodel`` and ``sae.json``; ``sae.safetensors`` stays the artifact of the run,
and is in the model's folder as a second name (hard link) where both folders lie on this machine. Loading unpickles nothing.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from hedgelab.saes import SAE

_WEIGHTS = "sae.safetensors"
_OF_THE_RUN = ("system/", "data/", "latent")  # beginnings of metrics that say nothing about the SAE as a whole


def log_model(client: "MlflowClient", run_id: str, folder: Path, artifact_path: str, params: Mapping[str, str]) -> None:
    """List the SAE in ``folder``, which the run has as an artifact, among MLflow's models; once, however often it is called.

    A server of MLflow 2, which has no such list, is left alone.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    try:
        found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=1)
    except MlflowException as error:
        if error.error_code == "ENDPOINT_NOT_FOUND":
            return
        raise
    name = run.info.run_name.translate(dict.fromkeys(map(ord, "/:.%\"'"), "_"))
    tags = {key: text for key, text in run.data.tags.items() if key.startswith(("mlflow.user", "mlflow.source."))}
    model = found[0] if found else client.create_logged_model(experiment, name, run_id, tags, dict(params), "SAE")
    flavor = {"loader_module": __name__, "python_version": platform.python_version()}
    about: dict[str, Any] = {"model_id": model.model_id, "run_id": run_id, "mlflow_version": version("mlflow")}
    about |= {"flavors": {"python_function": flavor}, "metadata": {"sae": f"runs:/{run_id}/{artifact_path}"}}
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns(_WEIGHTS), dirs_exist_ok=True)
        Path(temporary, "MLmodel").write_text(json.dumps(about, indent=2))  # JSON is YAML
        client.log_model_artifacts(model.model_id, temporary)
    homes = f"{run.info.artifact_uri}/{artifact_path}", model.artifact_location
    if all(map(is_local_uri, homes)):
        kept, second = (Path(local_file_uri_to_path(home), _WEIGHTS) for home in homes)  # type: ignore[no-untyped-call]
        with suppress(OSError):  # without it the loader goes to the run
            second.unlink(missing_ok=True)
            os.link(kept, second)
    if not _models(run):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.finalize_logged_model(model.model_id, "READY")
    if run.info.status != "RUNNING":  # the end was sent before the files were
        link_metrics(client, run_id)


def link_metrics(client: "MlflowClient", run_id: str) -> None:
    """Show the last values of a run's metrics with its model, if it has one."""
    from mlflow.entities import Metric

    run = client.get_run(run_id)
    if not (models := _models(run)):
        return
    data = run.inputs.dataset_inputs if run.inputs else ()
    known = {"dataset_name": data[0].dataset.name, "dataset_digest": data[0].dataset.digest} if data else {}
    points = [
        Metric(one.key, one.value, one.timestamp, one.step, model_id=models[0], **known)
        for one in run.to_proto().data.metrics
        if not one.key.startswith(_OF_THE_RUN) and abs(one.value) < 1e308  # MLflow's stand-in for infinity
    ]
    client.log_batch(run_id, metrics=points[:1000])  # MLflow takes no more at once


def _models(run: "Run") -> list[str]:
    """Ids of the models that a run has made."""
    return [one.model_id for one in run.outputs.model_outputs] if run.outputs else []


class ServedSAE:
    """What ``mlflow.pyfunc.load_model`` wraps; its ``get_raw_model()`` is the SAE itself."""

    def __init__(self, sae: "SAE") -> None:
        self.sae = sae

    def get_raw_model(self) -> "SAE":
        """The SAE."""
        return self.sae

    def predict(self, model_input: Any, params: Any = None) -> dict[str, Any]:
        """Codes ``[batch, d_sae]`` and reconstructions ``[batch, d_in]`` of activations ``[batch, d_in]``."""
        import numpy as np
        import torch

        with torch.no_grad():
            codes = self.sae.encode(torch.as_tensor(np.asarray(model_input), dtype=self.sae.W_dec.dtype))
            return {"codes": codes.to_dense().numpy(), "x_hat": self.sae.decode(codes).numpy()}


def _load_pyfunc(path: str) -> ServedSAE:
    """Called by ``mlflow.pyfunc.load_model`` with the model's folder."""
    from hedgelab.saes import load_sae

    if not Path(path, _WEIGHTS).exists():
        import mlflow

        path = mlflow.artifacts.download_artifacts(json.loads(Path(path, "MLmodel").read_text())["metadata"]["sae"])
    return ServedSAE(load_sae(path).eval())
