"""A process killed while it writes to the store leaves a journal, which the next one to open the store rolls back."""

import multiprocessing
import os
import signal
import sqlite3

from hedgelab.tracking.store import ensure_store


def die_writing(database):
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")  # so that changed pages reach the file before the end
    connection.execute("BEGIN")
    for number in range(2000):
        connection.execute(
            "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (?, ?, 'active')",
            (1000 + number, f"{number}" * 50),
        )
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_store_whose_writer_was_killed_can_be_opened(workplace):
    database = workplace("killed") / "runs" / "mlflow.db"
    writer = multiprocessing.get_context("fork").Process(target=die_writing, args=(database,))
    writer.start()
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL
    journal = database.with_name("mlflow.db-journal")
    assert journal.stat().st_size > 0
    client = ensure_store(f"sqlite:///{database}")
    assert [found.name for found in client.search_experiments()] == ["Default"]
    assert not journal.exists() or journal.stat().st_size == 0
