import os
import shutil
import signal
import sqlite3
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forkserver import ForkServer

from hedgelab.tracking.store import create_database

TIMINGS = ("system/", "samples/s", "data/seconds_per_batch", "data/tokens_per_s")


@pytest.fixture(scope="session")
def server():
    """Starts processes cheaply."""
    started = ForkServer()
    yield started
    started.close()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An empty SQLite store, which takes MLflow seconds to make."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    create_database(database)
    return database


@pytest.fixture
def workplace(empty_store, tmp_path, monkeypatch):
    """Makes folders with an empty store in them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(name):
        folder = tmp_path / name
        (folder / "runs").mkdir(parents=True)
        shutil.copy(empty_store, folder / "runs" / "mlflow.db")
        return folder

    return make


@pytest.fixture
def history():
    """Every point of every metric in a folder's store but timings: run, key, step, value."""

    def read(folder):
        with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
            rows = database.execute(
                "select runs.name, key, step, value, is_nan from metrics join runs on metrics.run_uuid = runs.run_uuid"
            )
            return sorted(row for row in rows if not row[1].startswith(TIMINGS))

    return read


@pytest.fixture
def kill_after(server):
    """Starts a command in a folder and kills it some time later: how it ended, and whether it was writing a checkpoint."""

    def act(words, folder, seconds, number=signal.SIGKILL):
        pid = server.start(words, folder)
        time.sleep(seconds)
        os.kill(pid, number)  # not waited for yet, so the id is still its own
        ended = server.wait(pid)
        return ended, bool(list((folder / "runs").rglob(".*.partial")))

    return act


@pytest.fixture
def kill_in_training(server):
    """Starts a command in a folder and sends it a signal some seconds after its next checkpoint: how it ended.

    A command that ends before is left alone.
    """

    def newest(folder):
        return max((path.stat().st_mtime_ns for path in (folder / "runs").rglob("last.ckpt")), default=0)

    def act(words, folder, seconds, number):
        before = newest(folder)
        pid = server.start(words, folder)
        while newest(folder) == before and not ended(pid):
            time.sleep(0.02)
        time.sleep(seconds)
        os.kill(pid, number)  # not waited for yet, so the id is still its own
        return server.wait(pid)

    return act


def ended(pid):
    """Whether a process has ended; its parent does not know yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
