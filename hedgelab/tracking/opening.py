"""Opens a run in its store: a new one, one that goes on, or one whose server cannot be reached."""

from __future__ import annotations

import getpass
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from hedgelab.errors import UserError
from hedgelab.tracking.spool import Spool, last_steps
from hedgelab.tracking.store import (
    INTENDED,
    artifact_location,
    ensure_store,
    local_uri,
    reason_of,
    sqlite_file,
    unusable,
    without_credentials,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

T = TypeVar("T")
OnUnreachable = Literal["fail", "local"]
_PATIENCE = 30.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunToOpen:
    """What is asked for.

    Attributes:
        experiment: Name of the experiment, made if absent.
        name: Name of a new run.
        description: Text at the head of a new run's page.
        tags: Tags of a new run.
        run_id: The run to go on with; None for a new one.
    """

    experiment: str
    name: str | None
    description: str | None
    tags: Mapping[str, str]
    run_id: str | None


@dataclass(frozen=True)
class Opened:
    """What came of it.

    Attributes:
        client: Client of the store.
        uri: The store.
        run_id: The run.
        run: The same as the store has it; None where the server of a run that goes on cannot be reached.
        tags: Tags that the run got in addition.
    """

    client: MlflowClient
    uri: str
    run_id: str
    run: Run | None
    tags: Mapping[str, str] = field(default_factory=dict)


def open_run(wanted: RunToOpen, uri: str, goes_on: bool, on_unreachable: OnUnreachable) -> Opened:
    """Open a run.

    Args:
        wanted: Which.
        uri: Tracking URI.
        goes_on: It was cut short: it may have begun in the local store while the server could not be reached.
        on_unreachable: What to do where the server cannot be reached.

    Raises:
        UserError: The store cannot be reached or is locked, the experiment is deleted, or there is no such run.
    """
    run_id, tags = wanted.run_id, {}
    try:
        client = ensure_store(uri)
    except UserError as error:
        if on_unreachable == "fail" or sqlite_file(uri) is not None:
            raise
        said = str(error).partition("; start")[0].removeprefix("MLFLOW_TRACKING_URI: ")
        if run_id is not None and not _is_local(run_id):
            from mlflow.tracking import MlflowClient

            _logger.warning("%s: what is logged waits in runs/spool/ for `hedgelab sync`", said)
            return Opened(MlflowClient(tracking_uri=uri), uri, run_id, None)
        _logger.warning("%s: the run goes to runs/mlflow.db; send it later with `hedgelab sync`", said)
        tags, uri = {INTENDED: without_credentials(uri)}, local_uri()
        client = ensure_store(uri)
    if run_id is not None and goes_on and sqlite_file(uri) is None and _is_local(run_id):
        uri = local_uri()
        client = ensure_store(uri)
    if run_id is not None:
        run = _patiently(uri, lambda: _go_on(client, uri, run_id))
    else:
        new = replace(wanted, tags={**wanted.tags, **tags})
        run = _patiently(uri, lambda: _start(client, uri, new))
    return Opened(client, uri, str(run.info.run_id), run, tags)


def logged_steps(run: Run, spool: Spool) -> dict[str, int]:
    """The last step at which each metric of a run was logged, whether the store has it or the spool still does."""
    steps = last_steps(run)
    for key, step in spool.last_steps().items():
        steps[key] = max(step, steps.get(key, -1))
    return steps


def _start(client: MlflowClient, uri: str, wanted: RunToOpen) -> Run:
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "LOCAL",
    }
    if wanted.description is not None:
        tags["mlflow.note.content"] = wanted.description
    experiment = _experiment(client, uri, wanted.experiment)
    return client.create_run(experiment, run_name=wanted.name, tags={**tags, **wanted.tags})


def _user() -> str:
    """Who runs this; a container may run under a number that has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment of that name, made if absent."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            made: str = client.create_experiment(
                name,
                artifact_location=artifact_location(uri, name),
                tags={"mlflow.experimentKind": "custom_model_development"},  # the UI's view of training runs
            )
            return made
        except MlflowException:  # another process was quicker
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"trainer.logger.experiment: '{name}' is deleted in {without_credentials(uri)}; restore it, or take another name"
        )
    return str(experiment.experiment_id)


def _go_on(client: MlflowClient, uri: str, run_id: str) -> Run:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if _is_locked(error):
            raise
        where = without_credentials(uri)
        raise UserError(f"trainer.logger.run_id: no run '{run_id}' in {where}; see `hedgelab runs`") from error
    if run.info.lifecycle_stage != "active":
        raise UserError(
            f"trainer.logger.run_id: run '{run_id}' is deleted in {without_credentials(uri)}: restore it there (`mlflow runs "
            f"restore --run-id {run_id}`), or leave out --resume to train anew"
        )
    client.update_run(run_id, status="RUNNING")
    return run


def _patiently(uri: str, act: Callable[[], T]) -> T:
    """What ``act`` gives; a database that another process has locked is tried again for half a minute.

    Raises:
        UserError: It stays locked, or the store refuses.
    """
    from mlflow.exceptions import MlflowException

    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return act()
        except MlflowException as error:
            if not _is_locked(error) or time.monotonic() > end:
                raise UserError(unusable(uri, reason_of(error))) from error
        time.sleep(0.5)


def _is_locked(error: Exception) -> bool:
    return "database is locked" in str(error)


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
