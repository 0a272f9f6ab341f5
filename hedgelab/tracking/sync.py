"""Sends to the tracking store what an outage kept from it: spools of unsent operations, and whole runs kept locally.

A run that began while its server could not be reached lives in the local store ``runs/mlflow.db``, with the tag
``hedgelab.intended_for``. Its copy on the server has the tag ``hedgelab.local_run``, which says which local run it is:
sent twice, it is brought up to date, not doubled.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from hedgelab.errors import UserError
from hedgelab.tracking import store
from hedgelab.tracking.runs import PARENT_TAG, search_runs
from hedgelab.tracking.spool import Operation, Spool

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

LOCAL_RUN = "hedgelab.local_run"


class Sent(NamedTuple):
    """Ids of the runs that something was sent of, and why something stayed behind, one line each."""

    runs: list[str]
    left: list[str]


def sync(uri: str | None = None, announce: Callable[[str], object] = str) -> Sent:
    """Send all that waits for a store (None: :func:`store.tracking_uri`); ``announce`` hears of each run as its turn comes."""
    uri, local = uri or store.tracking_uri(), store.local_uri()
    client, sent, folder = store.ensure_store(uri), Sent([], []), store.runs_dir(local)
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / ".sync.lock", timeout=0):
            _send_spools(client, uri, sent, announce)
            if (here := store.local_store()) is not None and not store.same_store(local, uri):
                _send_runs(here, client, uri, sent, announce)
    except Timeout:
        raise UserError(f"sync: another `hedgelab sync` is at work in {folder}; wait for its end") from None
    return sent


def _send_spools(client: "MlflowClient", uri: str, sent: Sent, announce: Callable[[str], object]) -> None:
    """What waits in spools, the longest waiting first."""
    paths = (store.runs_dir(uri) / "spool").glob("*.jsonl")
    for path in sorted(paths, key=lambda path: path.stat().st_ctime):
        spool = Spool(path.parent, path.stem)
        if spool.uri is not None and not store.same_store(spool.uri, uri):
            sent.left.append(f"{path}: waits for {spool.uri}; set MLFLOW_TRACKING_URI to it")
            continue
        announce(f"unsent operations of run {spool.run_id}")
        try:
            refused, failure = spool.replay(client)
            sent.left.extend(refused)
            if failure is not None:
                raise failure
            sent.runs.append(spool.run_id)
        except Exception as error:  # the store may take the next one
            sent.left.append(f"{path}: {store.reason_of(error)}")


def _send_runs(local: "MlflowClient", remote: "MlflowClient", uri: str, sent: Sent, announce: Callable[[str], object]) -> None:
    """Every local run that is meant for the store, those above others first."""
    names = store.all_experiments(local)
    found = search_runs(local, f"tags.`{store.INTENDED}` LIKE '%'", names)
    waiting = [run for run in found if store.same_store(run.data.tags[store.INTENDED], uri)]
    ids: dict[str, str] = {}
    for run in sorted(waiting, key=lambda run: (PARENT_TAG in run.data.tags, run.info.start_time)):
        own, name = run.info.run_id, f"{run.info.run_name} ({run.info.run_id[:8]})"
        announce(f"local run {name}")
        try:
            ids[own] = _send_run(local, remote, run, names[run.info.experiment_id], ids)
            if run.info.status != "RUNNING":  # one that still runs is sent again next time
                local.delete_tag(own, store.INTENDED)
            sent.runs.append(own)
        except Exception as error:
            sent.left.append(f"run {name}: {store.reason_of(error)}")


def _send_run(local: "MlflowClient", remote: "MlflowClient", run: "Run", experiment: str, ids: dict[str, str]) -> str:
    """One run, to the copy in the store that it was sent to before, or to a new one; the copy's id."""
    own = run.info.run_id
    tags = {key: value for key, value in run.data.tags.items() if key != store.INTENDED} | {LOCAL_RUN: own}
    if PARENT_TAG in tags:
        tags[PARENT_TAG] = ids.get(tags[PARENT_TAG], tags[PARENT_TAG])
    found = remote.get_experiment_by_name(experiment)
    if found is not None and found.lifecycle_stage != "active":
        raise UserError(f"experiment '{experiment}' is deleted there; restore it, and sync again")
    place = remote.create_experiment(experiment) if found is None else found.experiment_id
    earlier = remote.search_runs([place], f"tags.`{LOCAL_RUN}` = '{own}'", max_results=1)
    copy = earlier[0] if earlier else remote.create_run(place, run.info.start_time, tags, run.info.run_name)
    histories = (local.get_metric_history(own, key) for key in run.data.metrics)
    points = [(point.key, point.value, point.timestamp, point.step) for history in histories for point in history]
    with tempfile.TemporaryDirectory() as folder:
        files = local.download_artifacts(own, "", f"{folder}/all") if local.list_artifacts(own) else None
        models = run.outputs.model_outputs if run.outputs and Path(f"{files}/sae").is_dir() else ()
        said = [Operation(points, run.data.params, tags)]
        for output in models[:1]:  # sent by itself, once
            made = local.get_logged_model(output.model_id).params
            said.append(Operation(source=shutil.move(f"{files}/sae", folder), artifact_path="sae", model=made))
        ended = {} if run.info.status == "RUNNING" else {"status": run.info.status, "end_time": run.info.end_time}
        read = [one.dataset.to_dictionary() for one in (run.inputs.dataset_inputs if run.inputs else ())]
        data = [Operation(dataset={key: value for key, value in one.items() if value}) for one in read]
        for one in (*data, *said, Operation(source=files, has_model=bool(models), **ended)):
            one.send(remote, copy.info.run_id)
    return str(copy.info.run_id)
