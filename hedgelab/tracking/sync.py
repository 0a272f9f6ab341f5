"""Sends to the tracking store what an outage kept from it: spools of unsent operations, and whole runs kept locally.

A run that began while its server could not be reached lives in the local store ``runs/mlflow.db``, with the tag
``hedgelab.intended_for``. Its copy on the server has the tag ``hedgelab.local_run``, which says which local run it is:
sent twice, it is brought up to date, not doubled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from hedgelab.errors import UserError
from hedgelab.tracking.runs import PARENT_TAG, search_runs
from hedgelab.tracking.spool import MOST_POINTS, Artifact, Metrics, Params, Spool, Status, Tags, pages, send
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


class Sent(NamedTuple):
    """Ids of the runs that something was sent of, and why something stayed behind, one line each."""

    runs: list[str]
    left: list[str]


def sync(uri: str | None = None, announce: Callable[[str], object] = str) -> Sent:
    """Send everything that waits for a store (None takes ``MLFLOW_TRACKING_URI``, or ``runs/mlflow.db``).

    ``announce`` hears of each run as its turn comes.
    """
    uri, local = uri or tracking_uri(), local_uri()
    client, sent = ensure_store(uri), Sent([], [])
    folder, database = runs_dir(local), sqlite_file(local)
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / ".sync.lock", timeout=0):
            _send_spools(client, uri, sent, announce)
            if database is not None and database.exists() and not same_store(local, uri):
                _send_runs(ensure_store(local), client, uri, sent, announce)
    except Timeout:
        raise UserError(f"sync: another `hedgelab sync` is at work in {folder}; wait for its end") from None
    return sent


def _send_spools(client: MlflowClient, uri: str, sent: Sent, announce: Callable[[str], object]) -> None:
    """What waits in spools, the longest waiting first."""
    paths = (runs_dir(uri) / "spool").glob("*.jsonl")
    for path in sorted(paths, key=lambda path: path.stat().st_ctime):
        spool = Spool(path.parent, path.stem)
        if spool.uri is not None and not same_store(spool.uri, uri):
            sent.left.append(f"{path}: waits for {spool.uri}; set MLFLOW_TRACKING_URI to it")
            continue
        announce(f"unsent operations of run {spool.run_id}")
        try:
            refused, failure = spool.replay(client)
        except Exception as error:  # the store may take the next one
            refused, failure = [], error
        sent.left.extend(refused)
        if failure is None:
            sent.runs.append(spool.run_id)
        else:
            sent.left.append(f"{path}: {reason_of(failure)}")


def _send_runs(
    local: MlflowClient, remote: MlflowClient, uri: str, sent: Sent, announce: Callable[[str], object]
) -> None:
    """Every local run that is meant for the store, those above others first."""
    names = all_experiments(local)
    found = search_runs(local, f"tags.`{INTENDED}` LIKE '%'", names)
    waiting = [run for run in found if same_store(run.data.tags[INTENDED], uri)]
    ids: dict[str, str] = {}
    for run in sorted(waiting, key=lambda run: (PARENT_TAG in run.data.tags, run.info.start_time)):
        name = f"{run.info.run_name} ({run.info.run_id[:8]})"
        announce(f"local run {name}")
        try:
            ids[run.info.run_id] = _send_run(local, remote, run, names[run.info.experiment_id], ids)
        except Exception as error:
            sent.left.append(f"run {name}: {reason_of(error)}")
            continue
        if run.info.status != "RUNNING":  # one that still runs is sent again next time
            local.delete_tag(run.info.run_id, INTENDED)
        sent.runs.append(run.info.run_id)


def _send_run(local: MlflowClient, remote: MlflowClient, run: Run, experiment: str, ids: dict[str, str]) -> str:
    """One run; its id in the store."""
    own = run.info.run_id
    tags = {key: value for key, value in run.data.tags.items() if key != INTENDED} | {LOCAL_RUN: own}
    if PARENT_TAG in tags:
        tags[PARENT_TAG] = ids.get(tags[PARENT_TAG], tags[PARENT_TAG])
    there = _copy_of(remote, run, experiment, tags)
    copy = str(there.info.run_id)
    send(Tags(tags), remote, copy)
    params = {key: value for key, value in run.data.params.items() if key not in there.data.params}
    send(Params(params), remote, copy)
    for key in run.data.metrics:
        points = [(m.key, m.value, m.timestamp, m.step) for m in local.get_metric_history(own, key)]
        for some in pages(points, MOST_POINTS):
            send(Metrics(some), remote, copy)
    if local.list_artifacts(own):
        with tempfile.TemporaryDirectory() as folder:
            send(Artifact(local.download_artifacts(own, "", folder)), remote, copy)
    if run.info.status != "RUNNING":
        send(Status(run.info.status, run.info.end_time), remote, copy)
    return copy


def _copy_of(remote: MlflowClient, run: Run, experiment: str, tags: dict[str, str]) -> Run:
    """The run in the store that a local run was sent to before; else a new one."""
    found = remote.get_experiment_by_name(experiment)
    if found is not None and found.lifecycle_stage != "active":
        raise UserError(f"experiment '{experiment}' is deleted there; restore it, and sync again")
    experiment_id = remote.create_experiment(experiment) if found is None else found.experiment_id
    earlier = remote.search_runs([experiment_id], f"tags.`{LOCAL_RUN}` = '{run.info.run_id}'", max_results=1)
    if earlier:
        return earlier[0]
    return remote.create_run(experiment_id, run.info.start_time, tags, run.info.run_name)
