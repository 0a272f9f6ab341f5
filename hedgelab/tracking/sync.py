"""Sends to the tracking store what an outage kept from it: spools of unsent operations, and whole runs kept locally.

A run that began while its server could not be reached lives in the local store ``runs/mlflow.db``, with the tag
``hedgelab.intended_for``; sending it makes a run of the same name, times, parameters, tags, metrics and artifacts on the
server, whose tag ``hedgelab.local_run`` says which local run it is: sent twice, it is brought up to date, not doubled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from hedgelab.errors import UserError
from hedgelab.tracking.runs import search_runs
from hedgelab.tracking.spool import Artifact, Metrics, Params, Status, Tags, spools
from hedgelab.tracking.store import (
    INTENDED,
    all_experiments,
    ensure_store,
    local_uri,
    reason_of,
    runs_dir,
    same_store,
    sqlite_file,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

LOCAL_RUN = "hedgelab.local_run"
_PARENT = "mlflow.parentRunId"
_PAGE = 1000


class Sent(NamedTuple):
    """What a synchronisation has done.

    Attributes:
        spools: Runs whose unsent operations were sent.
        runs: Local runs that were sent whole.
        left: Why something stayed behind, one line each.
    """

    spools: list[str]
    runs: list[str]
    left: list[str]


def sync(uri: str | None = None, announce: Callable[[str], None] = lambda line: None) -> Sent:
    """Send everything that waits for a store.

    Args:
        uri: Tracking URI; None takes ``MLFLOW_TRACKING_URI``, or ``runs/mlflow.db``.
        announce: Told of each run as its turn comes.

    Raises:
        UserError: The store cannot be reached.
    """
    uri = uri or tracking_uri()
    client = ensure_store(uri)
    local = local_uri()
    folder = runs_dir(local)
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / ".sync.lock", timeout=0):
            return _sync(client, uri, local, announce)
    except Timeout:
        raise UserError(f"sync: another `hedgelab sync` is at work in {folder}; wait for its end") from None


def _sync(client: MlflowClient, uri: str, local: str, announce: Callable[[str], None]) -> Sent:
    sent = Sent([], [], [])
    for spool in spools(runs_dir(uri) / "spool"):
        if spool.uri is not None and not same_store(spool.uri, uri):
            sent.left.append(f"{spool.path}: waits for {spool.uri}; set MLFLOW_TRACKING_URI to it")
            continue
        announce(f"unsent operations of run {spool.run_id}")
        try:
            spool.replay(
                lambda operation, run_id=spool.run_id: operation.send(client, run_id),  # type: ignore[misc]
                sent.left.append,
            )
            sent.spools.append(spool.run_id)
        except Exception as error:  # the store may take the next one
            sent.left.append(f"{spool.path}: {reason_of(error)}")
    database = sqlite_file(local)
    if database is not None and database.exists() and not same_store(local, uri):
        _send_runs(ensure_store(local), client, uri, sent, announce)
    return sent


def _send_runs(
    local: MlflowClient, remote: MlflowClient, uri: str, sent: Sent, announce: Callable[[str], None]
) -> None:
    """Every local run that is meant for the store, those above others first."""
    names = all_experiments(local)
    found = search_runs(local, f"tags.`{INTENDED}` LIKE '%'", names)
    waiting = [run for run in found if same_store(run.data.tags[INTENDED], uri)]
    ids: dict[str, str] = {}
    for run in sorted(waiting, key=lambda run: (_PARENT in run.data.tags, run.info.start_time)):
        announce(f"local run {run.info.run_name} ({run.info.run_id[:8]})")
        try:
            ids[run.info.run_id] = _send_run(local, remote, run, names[run.info.experiment_id], ids)
        except Exception as error:
            sent.left.append(f"run {run.info.run_name} ({run.info.run_id[:8]}): {reason_of(error)}")
            continue
        if run.info.status != "RUNNING":  # one that still runs is sent again next time
            local.delete_tag(run.info.run_id, INTENDED)
        sent.runs.append(run.info.run_id)


def _send_run(local: MlflowClient, remote: MlflowClient, run: Run, experiment: str, ids: dict[str, str]) -> str:
    """One run; its id in the store."""
    tags = {key: value for key, value in run.data.tags.items() if key != INTENDED} | {LOCAL_RUN: run.info.run_id}
    if _PARENT in tags:
        tags[_PARENT] = ids.get(tags[_PARENT], tags[_PARENT])
    there = _its_copy(remote, run, experiment, tags)
    Tags(tags).send(remote, there.info.run_id)
    Params({key: value for key, value in run.data.params.items() if key not in there.data.params}).send(
        remote, there.info.run_id
    )
    for key in run.data.metrics:
        points = [(m.key, m.value, m.timestamp, m.step) for m in local.get_metric_history(run.info.run_id, key)]
        for start in range(0, len(points), _PAGE):
            Metrics(points[start : start + _PAGE]).send(remote, there.info.run_id)
    if local.list_artifacts(run.info.run_id):
        with tempfile.TemporaryDirectory() as folder:
            path = local.download_artifacts(run.info.run_id, "", folder)
            Artifact(path).send(remote, there.info.run_id)
    if run.info.status != "RUNNING":
        Status(run.info.status, run.info.end_time).send(remote, there.info.run_id)
    return str(there.info.run_id)


def _its_copy(remote: MlflowClient, run: Run, experiment: str, tags: dict[str, str]) -> Run:
    """The run in the store that a local run was sent to before; else a new one."""
    found = remote.get_experiment_by_name(experiment)
    if found is not None and found.lifecycle_stage != "active":
        raise UserError(f"experiment '{experiment}' is deleted there; restore it, and sync again")
    experiment_id = remote.create_experiment(experiment) if found is None else found.experiment_id
    earlier = remote.search_runs([experiment_id], f"tags.`{LOCAL_RUN}` = '{run.info.run_id}'", max_results=1)
    if earlier:
        return earlier[0]
    return remote.create_run(experiment_id, run.info.start_time, tags, run.info.run_name)
