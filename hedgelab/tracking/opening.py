"""Opens a run in its store: a new one, one that goes on, or one whose server cannot be reached."""

from __future__ import annotations

import getpass
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hedgelab.errors import UserError
from hedgelab.tracking.store import (
    INTENDED,
    artifact_location,
    ensure_store,
    local_uri,
    sqlite_file,
    without_credentials,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

OnUnreachable = Literal["fail", "local"]
_logger = logging.getLogger(__name__)


def choose_store(
    uri: str, run_id: str | None, goes_on: bool, on_unreachable: OnUnreachable
) -> tuple[MlflowClient, str, dict[str, str] | None]:
    """A client of the store that a run goes to, the store, and the tags that a new run gets in addition.

    A run that goes on may have begun in the local store while its server could not be reached, and stays there. No tags
    (None) mean that the run is on a server that cannot be reached now: what is logged waits in the spool.
    """
    tags: dict[str, str] = {}
    try:
        client = ensure_store(uri)
    except UserError as error:
        if on_unreachable == "fail" or sqlite_file(uri) is not None:
            raise
        reason = str(error).partition("; start")[0].removeprefix("MLFLOW_TRACKING_URI: ")
        if run_id is not None and not _is_local(run_id):
            from mlflow.tracking import MlflowClient

            _logger.warning("%s: what is logged waits in runs/spool/ for `hedgelab sync`", reason)
            return MlflowClient(tracking_uri=uri), uri, None
        _logger.warning("%s: the run goes to runs/mlflow.db; send it later with `hedgelab sync`", reason)
        tags[INTENDED] = without_credentials(uri)
    else:
        if run_id is None or not goes_on or sqlite_file(uri) is not None or not _is_local(run_id):
            return client, uri, tags
    return ensure_store(local_uri()), local_uri(), tags


def start_run(client: MlflowClient, uri: str, experiment: str, name: str | None, tags: Mapping[str, str]) -> Run:
    """A new run in an experiment, which is made if absent."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        user = str(os.getuid())
    source = {"mlflow.user": user, "mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    return client.create_run(_experiment(client, uri, experiment), run_name=name, tags={**source, **tags})


def continue_run(client: MlflowClient, uri: str, run_id: str) -> Run:
    """A run that is there, and runs again."""
    from mlflow.exceptions import MlflowException

    where = without_credentials(uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if "database is locked" in str(error):
            raise
        raise UserError(f"trainer.logger.run_id: no run '{run_id}' in {where}; see `hedgelab runs`") from error
    if run.info.lifecycle_stage != "active":
        raise UserError(
            f"trainer.logger.run_id: run '{run_id}' is deleted in {where}: restore it there (`mlflow runs "
            f"restore --run-id {run_id}`), or leave out --resume to train anew"
        )
    client.update_run(run_id, status="RUNNING")
    return run


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment of that name, made if absent."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's view of training runs
        try:
            return str(client.create_experiment(name, artifact_location(uri, name), kind))
        except MlflowException:  # another process was quicker
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        where = without_credentials(uri)
        raise UserError(f"trainer.logger.experiment: '{name}' is deleted in {where}; restore it, or take another name")
    return str(experiment.experiment_id)


def _is_local(run_id: str) -> bool:
    """Whether the local store has a run."""
    from mlflow.exceptions import MlflowException

    database = sqlite_file(local_uri())
    if database is None or not database.exists():
        return False
    try:
        ensure_store(local_uri()).get_run(run_id)
    except MlflowException:
        return False
    return True
