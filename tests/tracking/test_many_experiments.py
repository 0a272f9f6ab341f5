"""Stores with more experiments than one page holds: everything is found all the same."""

import shutil
import sqlite3

import pytest

from hedgelab.protocols.sweep.job import CELL_TAG, run_of
from hedgelab.tracking.runs import list_runs, resolve_run, search_runs
from hedgelab.tracking.store import all_experiments, ensure_store

COUNT = 1200


@pytest.fixture(scope="module")
def crowded(tmp_path_factory, empty_database):
    """A store with 1200 experiments; its oldest, which comes last in every listing, has two runs."""
    database = tmp_path_factory.mktemp("crowded") / "mlflow.db"
    shutil.copy(empty_database, database)
    uri = f"sqlite:///{database}"
    client = ensure_store(uri)
    oldest = client.create_experiment("oldest", artifact_location=str(database.parent))
    for name, status in (("done", "FINISHED"), ("begun", "KILLED")):
        run = client.create_run(oldest, run_name=name, tags={CELL_TAG: name, "mlflow.parentRunId": "above"})
        client.set_terminated(run.info.run_id, status)
    with sqlite3.connect(database) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(experiments)")]
        first = connection.execute("SELECT * FROM experiments WHERE name = 'oldest'").fetchone()
        row = dict(zip(columns, first, strict=True))
        for number in range(COUNT):
            later = {"experiment_id": 10_000 + number, "name": f"e{number}"}
            later |= {key: row[key] + 1000 + number for key in ("creation_time", "last_update_time")}
            values = list({**row, **later}.values())
            connection.execute(f"INSERT INTO experiments VALUES ({','.join('?' * len(values))})", values)
    return uri


def test_all_experiments_of_a_store_are_seen(crowded):
    client = ensure_store(crowded)
    names = all_experiments(client)
    assert len(names) == COUNT + 2
    assert "oldest" in names.values()
    assert len(client.search_experiments()) < len(names)  # one page: what there is to miss


def test_runs_in_the_last_page_are_found(crowded, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", crowded)
    client = ensure_store(crowded)
    assert resolve_run("done").experiment == "oldest"
    assert {run.name for run in list_runs("oldest")} == {"done", "begun"}
    assert [run.info.run_name for run in search_runs(client, "attributes.status = 'FINISHED'")] == ["done"]
    assert run_of(client, "done").info.run_name == "done"
    assert run_of(client, "begun") is None
    assert run_of(client, "begun", "tags.mlflow.parentRunId = 'above'") is not None
