import json
import math
import threading
import time
from pathlib import Path

import pytest

from hedgelab.tracking.spool import Operation, Spool
from hedgelab.tracking.writer import RunWriter


class FakeClient:
    """Takes what it is sent, unless it is down."""

    def __init__(self):
        self.down = False
        self.dies_after = math.inf
        self.delay = 0.0
        self.attempts = 0
        self.points, self.params, self.tags, self.files, self.ended = [], {}, {}, {}, None

    def _check(self):
        self.attempts += 1
        time.sleep(self.delay)
        if self.down or self.attempts > self.dies_after:
            raise ConnectionError("connection refused\nlong explanation")

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        self._check()
        self.points += [(m.key, m.value, m.timestamp, m.step) for m in metrics]
        self.params |= {p.key: p.value for p in params}
        self.tags |= {t.key: t.value for t in tags}

    def log_artifact(self, run_id, path, artifact_path=None):
        self._check()
        self.files[f"{artifact_path}/{Path(path).name}"] = Path(path).read_text()

    def set_terminated(self, run_id, status, end_time):
        self._check()
        self.ended = (status, end_time)


@pytest.fixture
def client():
    return FakeClient()


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool", "r1")


def steps(client):
    return [step for _, _, _, step in client.points]


def test_points_arrive_in_order_in_batches(client, spool):
    writer = RunWriter(client, "r1", spool, buffer_points=100)
    for step in range(2500):
        writer.add({"a": float(step), "b": -float(step)}, step)
    writer.close()
    assert [(key, value) for key, value, _, _ in client.points] == [
        pair for step in range(2500) for pair in (("a", float(step)), ("b", -float(step)))
    ]
    assert client.attempts < 100
    assert not spool


def test_points_do_not_wait_for_a_full_buffer(client, spool):
    writer = RunWriter(client, "r1", spool, flush_seconds=0.05)
    writer.add({"a": 1.0}, 1)
    deadline = time.monotonic() + 5
    while not client.points and time.monotonic() < deadline:
        time.sleep(0.01)
    assert steps(client) == [1]
    writer.close()


def test_adding_takes_microseconds(client, spool):
    client.delay = 0.05
    writer = RunWriter(client, "r1", spool)
    metrics = {f"m{i}": 1.0 for i in range(5)}
    costs = []
    for step in range(2000):
        start = time.perf_counter()
        writer.add(metrics, step)
        costs.append(time.perf_counter() - start)
    writer.close()
    assert sorted(costs)[1000] < 50e-6
    assert len(client.points) == 10_000


def test_what_a_dead_store_misses_is_spooled_and_sent_later_in_order(client, spool, tmp_path, caplog):
    note = tmp_path / "note.txt"
    note.write_text("kept")
    writer = RunWriter(client, "r1", spool, buffer_points=10)
    writer.add({"a": 0.0}, 0)
    writer.send(again=True)
    client.down = True
    for step in range(1, 50):
        writer.add({"a": math.nan if step == 7 else math.inf if step == 8 else float(step)}, step)
    writer.send(again=True)
    writer.keep(Operation(params={"k": "3"}))
    writer.keep(Operation(tags={"t": "v"}))
    writer.keep(Operation(source=str(note), artifact_path="notes"))
    writer.keep(Operation(status="FINISHED", end_time=5))
    writer.close()
    assert len(caplog.messages) == 1
    assert "(connection refused); training goes on" in caplog.messages[0]
    assert str(spool.path) in caplog.messages[0]
    note.unlink()
    assert steps(client) == [0]
    kept = [json.loads(line, parse_constant=pytest.fail) for line in spool.path.read_text().splitlines()]
    assert [next(iter(line)) for line in kept][-4:] == ["params", "tags", "source", "status"]

    client.down = False
    RunWriter(client, "r1", spool).send(again=True)
    assert steps(client) == list(range(50))
    assert math.isnan(client.points[7][1])
    assert math.isinf(client.points[8][1])
    assert (client.params, client.tags, client.files) == ({"k": "3"}, {"t": "v"}, {"notes/note.txt": "kept"})
    assert client.ended == ("FINISHED", 5)
    assert not spool
    assert not spool.files.exists()


def test_a_store_that_is_down_is_not_asked_again_for_every_point(client, spool):
    client.down = True
    writer = RunWriter(client, "r1", spool)
    for step in range(100):
        writer.keep(Operation([("a", 1.0, 0, step)]))
    writer.send()
    assert client.attempts == 1


def test_a_store_that_fails_half_way_through_the_spool_loses_and_repeats_nothing(client, spool):
    for step in range(10):
        spool.append(Operation([("a", 1.0, 0, step)]))
    client.dies_after = 4
    with pytest.raises(ConnectionError):
        spool.replay(client)
    assert steps(client) == [0, 1, 2, 3]
    assert spool.last_steps() == {"a": 9}
    client.dies_after = math.inf
    spool.replay(client)
    assert steps(client) == list(range(10))


def test_a_backlog_goes_to_disk_and_then_to_the_store(client, spool):
    writer = RunWriter(client, "r1", spool, buffer_points=5)
    lock = threading.Lock()
    client._check = lambda: lock.acquire() and lock.release()
    with lock:  # the store hangs
        for step in range(500):
            writer.add({"a": 1.0}, step)
    writer.close()
    assert steps(client) == list(range(500))
    assert not spool


def test_samples_are_written_along(client, spool, monkeypatch):
    monkeypatch.setattr("hedgelab.tracking.writer._SAMPLE_SECONDS", 0.0)
    writer = RunWriter(client, "r1", spool, flush_seconds=0.01, sample=lambda: Operation([("system/x", 1.0, 0, 7)]))
    writer.add({"a": 1.0}, 1)
    deadline = time.monotonic() + 5
    while not any(point[0] == "system/x" for point in client.points) and time.monotonic() < deadline:
        time.sleep(0.02)
    writer.close()
    assert ("system/x", 1.0, 0, 7) in client.points


def test_closed_writer_opens_again(client, spool):
    writer = RunWriter(client, "r1", spool)
    for step in range(3):
        writer.add({"a": 1.0}, step)
        writer.close()
    assert steps(client) == [0, 1, 2]


def test_runs_of_one_process_write_to_a_file_in_turn(tmp_path):
    busy, most = [], []

    class Slow:
        def log_batch(self, *_, **__):
            busy.append(1)
            most.append(len(busy))
            time.sleep(0.02)
            busy.pop()

    writers = [RunWriter(Slow(), f"r{i}", Spool(tmp_path, f"r{i}", "sqlite:///x.db")) for i in range(6)]
    for writer in writers:
        writer.add({"a": 1.0}, 1)
        writer.keep()
    for writer in writers:
        writer.close()
    assert max(most) == 1
    assert len(most) == 6
