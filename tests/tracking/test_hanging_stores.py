"""Stores that hang, refuse or take only a part: training is not held up, and everything arrives in the end, once."""

import threading
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from hedgelab.errors import UserError
from hedgelab.tracking.spool import Operation, Spool
from hedgelab.tracking.writer import RunWriter


class Store:
    """Takes what it is sent; hangs while ``gate`` is closed."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.steps, self.params, self.tags, self.files, self.ended = [], {}, {}, [], None
        self.no_files = self.fails_after_hanging = False

    def _pass(self):
        hung = not self.gate.is_set()
        assert self.gate.wait(60)
        if hung and self.fails_after_hanging:
            raise ConnectionError("timed out")

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        self._pass()
        if any(len(param.value) > 20 for param in params):
            raise MlflowException("Param value is too long", error_code=INVALID_PARAMETER_VALUE)
        self.steps += [point.step for point in metrics]
        self.params |= {param.key: param.value for param in params}
        self.tags |= {tag.key: tag.value for tag in tags}

    def log_artifact(self, run_id, path, artifact_path=None):
        self._pass()
        if self.no_files:
            raise PermissionError("no credentials for the bucket")
        self.files.append(Path(path).read_text())

    def set_terminated(self, run_id, status, end_time):
        self._pass()
        self.ended = status


@pytest.fixture
def store():
    made = Store()
    yield made
    made.gate.set()


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool", "r")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("hedgelab.tracking.writer._PATIENCE", 0.2)


def hung(store, spool, tmp_path):
    """A writer in the middle of a send that hangs, after all kinds of operations; the seconds each call took."""
    (tmp_path / "note.txt").write_text("kept")
    writer = RunWriter(store, "r", spool, buffer_points=5, flush_seconds=0.05)
    writer.add({"a": 1.0}, 0)
    writer.send()
    assert store.steps == [0]
    store.gate.clear()
    calls = []

    def timed(act, *values):
        start = time.monotonic()
        act(*values)
        calls.append(time.monotonic() - start)

    for step in range(1, 40):
        timed(writer.add, {"a": 1.0}, step)
        if step % 10 == 0:
            timed(writer.keep)
    timed(writer.keep, Operation(params={"k": "3"}))
    timed(writer.keep, Operation(source=str(tmp_path / "note.txt"), artifact_path="notes"))
    timed(writer.keep, Operation(status="FINISHED", end_time=1))
    (tmp_path / "note.txt").unlink()
    return writer, calls


def arrived(store):
    assert sorted(set(store.steps)) == list(range(40))
    assert store.params == {"k": "3"}
    assert set(store.files) == {"kept"}
    assert store.ended == "FINISHED"


@pytest.mark.parametrize("fails", [False, True])
def test_a_store_that_hangs_holds_nobody_up_for_long(store, spool, tmp_path, fails):
    store.fails_after_hanging = fails
    writer, calls = hung(store, spool, tmp_path)
    assert sum(calls) < 1.0  # one wait for what hangs, none afterwards
    assert spool.last_steps()["a"] == 39  # on the disk: a kill now would lose nothing
    assert {step for line in spool._decode(spool._lines()) for *_, step in line.metrics} == {*range(1, 40)}
    store.gate.set()
    writer.close()
    writer.send(again=True)
    arrived(store)
    assert not spool


def test_what_came_through_slowly_may_be_sent_again_but_nothing_is_left(store, spool):
    writer = RunWriter(store, "r", spool)
    store.gate.clear()
    for step in (1, 2):
        writer.keep(Operation([("a", 1.0, 0, step)]))  # given up after a while, and spooled
    assert spool.last_steps() == {"a": 2}
    store.gate.set()
    writer.close()
    assert sorted(set(store.steps)) == [1, 2]  # MLflow ignores a point that it has
    assert not spool


def test_a_store_that_hangs_is_not_waited_for_twice_at_the_end(store, spool, tmp_path):
    store.fails_after_hanging = True
    writer, _ = hung(store, spool, tmp_path)
    time.sleep(0.5)  # longer than its patience
    store.gate.set()
    deadline = time.monotonic() + 10
    while not writer._hangs and time.monotonic() < deadline:
        time.sleep(0.01)
    store.gate.clear()
    start = time.monotonic()
    writer.close()
    assert time.monotonic() - start < 1
    assert spool
    store.gate.set()
    spool.replay(store)
    arrived(store)


def test_files_that_cannot_be_uploaded_keep_nothing_else_back(store, spool, tmp_path, caplog):
    (tmp_path / "note.txt").write_text("kept")
    store.no_files = True
    writer = RunWriter(store, "r", spool)
    writer.keep(Operation(source=str(tmp_path / "note.txt")))
    for step in range(5):
        writer.keep(Operation([("a", 1.0, 0, step)]))
    writer.keep(Operation(source=str(tmp_path / "note.txt")))
    writer.keep(Operation(status="FINISHED", end_time=1))
    writer.close()
    assert (sorted(set(store.steps)), store.ended, store.files) == ([0, 1, 2, 3, 4], "FINISHED", [])
    assert all(operation.source for operation in spool._decode(spool._lines()))
    assert len([message for message in caplog.messages if "no credentials" in message]) == 1
    store.no_files = False
    writer.send(again=True)
    assert store.files == ["kept", "kept"]
    assert not spool


def test_after_an_outage_files_that_fail_keep_no_metrics_back(store, spool, tmp_path):
    (tmp_path / "note.txt").write_text("kept")
    spool.append(Operation(source=str(tmp_path / "note.txt")))
    spool.append(Operation([("a", 1.0, 0, 1)]))
    spool.append(Operation(status="FINISHED", end_time=1))
    store.no_files = True
    refused, failure = spool.replay(store)
    assert (refused, str(failure)) == ([], "no credentials for the bucket")
    assert (store.steps, store.ended) == ([1], "FINISHED")
    store.no_files = False
    spool.replay(store)
    assert (store.steps, store.files) == ([1], ["kept"])
    assert not spool


def test_what_a_store_refuses_for_good_keeps_nothing_else_back(store, spool, caplog):
    writer = RunWriter(store, "r", spool)
    writer.keep(Operation(params={"long": "x" * 30}))
    writer.keep(Operation([("a", 1.0, 0, 1)]))
    writer.send()
    assert store.steps == [1]
    assert not spool
    assert '"long"' in spool.refused.read_text()
    assert any("refuses params (Param value is too long)" in message for message in caplog.messages)

    spool.append(Operation(params={"longer": "y" * 30}))
    spool.append(Operation(tags={"t": "v"}))
    refused, failure = spool.replay(store)
    assert store.tags == {"t": "v"}
    assert (len(refused), failure) == (1, None)
    assert len(spool.refused.read_text().splitlines()) == 2
    writer.close()


# -- spools from elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        '{"op": "artifact", "source": "../../secret.txt"}',
        '{"op": "artifact", "source": "SECRET"}',
        '{"op": "artifact", "source": "link.txt"}',
        '{"op": "artifact", "source": "folder"}',
        '{"op": "artifact", "source": 3}',
        '{"op": "nonsense"}',
        '{"op": "metrics", "metrics": [["a", "x", 1, 1]]}',
        '{"op": "metrics", "metrics": [["a", "1.0", 1]]}',
        '{"op": "status", "status": "FINISHED", "end_time": 1, "more": 2}',
        "[1]",
        "{",
        "[" * 100_000,
    ],
)
def test_a_hostile_or_damaged_spool_sends_nothing_that_is_not_its_own(line, spool, store, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (spool.files / "folder").mkdir(parents=True)
    (spool.files / "folder" / "link.txt").symlink_to(secret)
    (spool.files / "link.txt").symlink_to(secret)
    spool.path.write_text(line.replace("SECRET", str(secret)) + "\n")
    with pytest.raises(UserError, match=r"r\.jsonl, line 1: damaged") as error:
        spool.replay(store)
    assert "\n" not in str(error.value)
    assert store.files == []
    assert spool
