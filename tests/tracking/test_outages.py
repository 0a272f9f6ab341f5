"""Stores that cannot be reached, are locked, or die; disks that are full: training goes on and nothing is lost."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import lightning as L
import pytest

from hedgelab.cli import main
from hedgelab.cli.errors import user_error
from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import VanillaSAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.spool import Operation, Spool
from hedgelab.tracking.store import INTENDED, ensure_store, same_store, without_credentials
from hedgelab.tracking.sync import LOCAL_RUN, sync
from hedgelab.tracking.writer import RunWriter

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def other(empty_database, tmp_path):
    """Tracking URI of a second store, which stands for a server."""
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    return f"sqlite:///{folder / 'mlflow.db'}"


def points(client, run_id, key):
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def test_unreachable_at_the_start_is_one_line_with_the_choice(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE.replace("//", "//user:secret@"))
    with pytest.raises(UserError) as error:
        MLflowTracker().run_id  # noqa: B018
    assert "MLFLOW_TRACKING_URI: cannot use the store http://127.0.0.1:9" in str(error.value)
    assert "trainer.logger.on_unreachable=local" in str(error.value)
    assert "secret" not in str(error.value)


def test_a_run_may_go_on_locally_and_is_sent_later_once(uri, other, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    tracker = MLflowTracker("there", "a", {"kind": "parent"}, on_unreachable="local")
    child = tracker.child("b", {"kind": "child"})
    for step in range(30):
        tracker.log_metrics({"loss": step / 7}, step)
        child.log_metrics({"loss": -step / 7}, step)
    tracker.log_hyperparams({"k": 3})
    child.log_hyperparams({"data": {"class_path": "toys.Mine"}})
    child.log_text("kept", "notes/first.md")
    assert [message for message in caplog.messages if "send it later with `hedgelab sync`" in message]
    local = ensure_store(uri)
    assert local.get_run(child.run_id).data.tags[INTENDED] == NOWHERE
    for run_id in (tracker.run_id, child.run_id):
        local.set_tag(run_id, INTENDED, other)  # the server is there, at last

    first = sync(other)
    assert (set(first.runs), first.left) == ({tracker.run_id, child.run_id}, [])
    for step in range(30, 40):
        tracker.log_metrics({"loss": step / 7}, step)
    child.finalize("success")
    tracker.finalize("success")
    assert len(sync(other).runs) == 2  # they still ran when they were sent
    assert sync(other).runs == []

    server = ensure_store(other)
    experiment = server.get_experiment_by_name("there").experiment_id
    copies = {run.data.tags["kind"]: run for run in server.search_runs([experiment])}
    assert len(server.search_runs([experiment])) == 2
    parent, below = copies["parent"], copies["child"]
    assert (parent.info.run_name, parent.info.status, parent.data.params) == ("a", "FINISHED", {"k": "3"})
    assert parent.data.tags[LOCAL_RUN] == tracker.run_id
    assert INTENDED not in parent.data.tags
    assert below.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert points(server, parent.info.run_id, "loss") == [(step, step / 7) for step in range(40)]
    assert points(server, below.info.run_id, "loss") == [(step, -step / 7) for step in range(30)]
    assert Path(server.download_artifacts(below.info.run_id, "notes/first.md")).read_text() == "kept"
    assert [one.dataset.name for one in below.inputs.dataset_inputs] == ["Mine"]


def test_sync_leaves_what_waits_for_another_server(uri, tmp_path):
    spool = Spool(tmp_path / "runs" / "spool", "abc", "http://other:5000")
    spool.append(Operation([("a", 1.0, 0, 0)]))
    (left,) = sync(uri).left
    assert "waits for http://other:5000" in left
    assert spool


def test_sync_command(uri, tmp_path, capsys):
    assert main(["sync"]) == 0
    assert "nothing waits" in capsys.readouterr().out
    tracker = MLflowTracker()
    run_id = tracker.run_id
    tracker.finalize("success")
    Spool(tmp_path / "runs" / "spool", run_id).append(Operation([("a", 1.0, 5, 7)]))
    Spool(tmp_path / "runs" / "spool", "0" * 32).append(Operation([("a", 1.0, 5, 7)]))
    assert main(["sync"]) == 2
    printed = capsys.readouterr()
    assert f"unsent operations of run {run_id}" in printed.out
    (line,) = printed.err.splitlines()
    assert "sync: 1 left" in line
    assert points(ensure_store(uri), run_id, "a") == [(7, 1.0)]


def test_credentials_are_neither_shown_nor_compared():
    assert without_credentials("https://user:word@host:50/a") == "https://host:50/a"
    assert same_store("https://user:word@host:50/", "https://host:50")
    assert not same_store("https://host:50", "https://host:51")
    assert same_store("sqlite:////tmp/x/mlflow.db", "sqlite:////tmp/x/mlflow.db")


class Lock(threading.Thread):
    """Holds a database for some seconds, as another process would."""

    def __init__(self, uri, seconds):
        super().__init__()
        self.file, self.seconds, self.held = uri.removeprefix("sqlite:///"), seconds, threading.Event()

    def run(self):
        connection = sqlite3.connect(self.file, isolation_level=None)
        connection.execute("begin exclusive")
        self.held.set()
        time.sleep(self.seconds)
        connection.execute("commit")
        connection.close()

    def __enter__(self):
        self.start()
        self.held.wait()

    def __exit__(self, *_):
        self.join()


@pytest.mark.slow
def test_a_database_locked_for_a_while_loses_nothing(uri):
    tracker = MLflowTracker()
    run_id = tracker.run_id
    with Lock(uri, 8):
        start = time.monotonic()
        for step in range(100):
            tracker.log_metrics({"a": float(step)}, step)
        assert time.monotonic() - start < 1
        tracker.save()
    tracker.finalize("success")
    assert points(ensure_store(uri), run_id, "a") == [(step, float(step)) for step in range(100)]


def test_a_run_starts_as_soon_as_the_lock_is_gone(uri):
    with Lock(uri, 3):
        assert MLflowTracker().run_id


@pytest.mark.slow
def test_a_database_locked_for_good_is_one_line(uri, monkeypatch):
    monkeypatch.setattr("hedgelab.tracking.store._BUSY_SECONDS", 0.5)
    with Lock(uri, 4), pytest.raises(Exception, match="locked") as error:
        MLflowTracker().run_id  # noqa: B018
    line = str(user_error(error.value))
    assert re.match(r"MLFLOW_TRACKING_URI: .*locked.*another process holds it", line)
    assert "\n" not in line


class Down:
    """A store that is down."""

    def __getattr__(self, name):
        def fail(*_, **__):
            raise ConnectionError("down")

        return fail


class Up(Down):
    """A store that takes everything."""

    def __init__(self):
        self.taken = []

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        self.taken += [point.step for point in metrics]


def test_what_a_full_disk_does_not_take_waits_in_memory(tmp_path, monkeypatch, caplog):
    spool = Spool(tmp_path / "spool", "r")
    writer = RunWriter(Down(), "r", spool)
    real, full = Spool.append, [True]

    def append(self, operation):
        if full[0]:
            raise OSError(28, "No space left on device")
        real(self, operation)

    monkeypatch.setattr(Spool, "append", append)
    for step in range(5):
        writer.keep(Operation([("a", 1.0, 0, step)]))
    assert writer.unkept == "5 operations (0 of them files)"
    assert len([line for line in caplog.messages if "No space left" in line]) == 1
    full[0] = False
    writer.keep(Operation([("a", 1.0, 0, 5)]))
    assert writer.unkept is None
    assert spool.last_steps() == {"a": 5}
    again = RunWriter(up := Up(), "r", spool)
    again.send(again=True)
    assert up.taken == [0, 1, 2, 3, 4, 5]


def test_a_run_whose_end_nothing_takes_says_so(uri, monkeypatch, tmp_path):
    tracker = MLflowTracker()
    tracker.log_metrics({"a": 1.0}, 1)
    tracker.save()

    def full(self, operation):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spool, "append", full)
    tracker._writer._client = Down()
    note = tmp_path / "note.txt"
    note.write_text("x")
    tracker.log_artifact(note)
    with pytest.raises(UserError, match=r"trainer\.logger: .*1 of them files.* are lost: .*--resume logs them again"):
        tracker.finalize("success")


def test_points_of_a_run_that_went_on_blindly_are_not_sent_twice(uri):
    tracker = MLflowTracker()
    run_id = tracker.run_id
    for step in range(10):
        tracker.log_metrics({"a": float(step)}, step)
    tracker.finalize("success")
    client = ensure_store(uri)
    Operation([("a", float(step), 99, step) for step in range(5, 15)], repeated=True).send(client, run_id)
    assert points(client, run_id, "a") == [(step, float(step)) for step in range(15)]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    spool = Spool(tmp_path, "r")
    spool.append(Operation([("a", 1.0, 0, 1)]))
    with spool.path.open("a") as file:
        file.write('{"op": "metrics", "metr')
    assert spool.last_steps() == {"a": 1}
    spool.append(Operation([("a", 1.0, 0, 2)]))
    assert [json.loads(line)["metrics"][0][3] for line in spool.path.read_text().splitlines()] == [1, 2]


class Server:
    """A real MLflow server on a loopback port, in a process group of its own."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--host", "127.0.0.1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", f"{self.folder}/artifacts"]
        self.process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 300
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError("the server does not answer")

    def hang(self):
        """It takes connections, and never answers."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self):
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(empty_database, tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    made = Server(folder)
    made.start()
    yield made
    made.kill()


class At(L.Callback):
    """Does something when training has come to a step."""

    def __init__(self, **acts):
        self.acts = {int(name.removeprefix("step")): act for name, act in acts.items()}

    def on_train_batch_end(self, trainer, *_):
        if (act := self.acts.pop(trainer.global_step, None)) is not None:
            trainer.logger.save()
            act()


def fit(tracker, steps, *callbacks):
    data = ToyDataModule(ConditionalFiring([0.3, 0.2]), d_in=6, batch_size=8, seed=0, val_batches=1)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        max_steps=steps, log_every_n_steps=1, logger=tracker, callbacks=list(callbacks), accelerator="cpu", **options
    )
    trainer.fit(VanillaSAE(6, 2, 0.01), datamodule=data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_server_killed_in_the_middle_of_a_fit_has_everything_after_sync(uri, server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr("hedgelab.tracking.writer._RETRY_SECONDS", 0.2)
    tracker = MLflowTracker(buffer_points=20)
    run_id = tracker.run_id
    fit(tracker, 400, At(step100=server.kill, step250=server.start, step320=server.kill))
    assert Spool(Path("runs/spool"), run_id)
    assert main(["sync"]) == 2
    assert "cannot use the store" in capsys.readouterr().err
    server.start()
    assert main(["sync"]) == 0
    assert not Spool(Path("runs/spool"), run_id)
    client = ensure_store(server.uri)
    for key in ("train/mse", "train/loss"):
        assert [step for step, _ in points(client, run_id, key)] == list(range(1, 401))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/mse"] > 0
    assert main(["sync"]) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_server_that_hangs_holds_no_training_up_and_has_everything_after_sync(uri, server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # the server is slow where the machine is busy
    monkeypatch.setattr("hedgelab.tracking.writer._RETRY_SECONDS", 0.2)
    monkeypatch.setattr("hedgelab.tracking.writer._PATIENCE", 1.0)
    tracker = MLflowTracker(buffer_points=20)
    run_id = tracker.run_id
    held_up = []

    def hang():
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        server.hang()

    def timed(act):
        def call(*values, **named):
            start = time.monotonic()
            act(*values, **named)
            held_up.append(time.monotonic() - start)

        return call

    for method in ("log_metrics", "log_text", "save"):
        monkeypatch.setattr(tracker, method, timed(getattr(tracker, method)))
    saves = {f"step{step}": lambda: None for step in (150, 200, 250, 350, 390)}
    fit(tracker, 400, At(step100=hang, step300=lambda: tracker.log_text("kept", "note.txt"), **saves))
    assert sum(held_up) < 1.0 + 1.5  # one wait in ``save``, and hundreds of calls on a busy machine
    assert Spool(Path("runs/spool"), run_id).last_steps()["train/loss"] == 400
    server.go_on()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    assert main(["sync"]) == 0
    client = ensure_store(server.uri)
    for key in ("train/mse", "train/loss"):
        history = client.get_metric_history(run_id, key)
        assert [point.step for point in history] == list(range(1, 401))
    assert client.get_run(run_id).info.status == "FINISHED"
    assert Path(client.download_artifacts(run_id, "note.txt")).read_text() == "kept"
    assert not Spool(Path("runs/spool"), run_id)
    capsys.readouterr()


def test_two_syncs_at_once(uri, other, monkeypatch, capsys):
    from filelock import FileLock

    with FileLock(Path("runs/.sync.lock")):
        assert main(["sync"]) == 2
    assert "another `hedgelab sync` is at work" in capsys.readouterr().err
    assert main(["sync"]) == 0
    capsys.readouterr()


def test_a_sync_that_was_interrupted_goes_on_in_the_same_copy(uri, other, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    tracker = MLflowTracker("there", "a", on_unreachable="local")
    for step in range(30):
        tracker.log_metrics({"loss": step / 7}, step)
    tracker.log_text("kept", "note.txt")
    tracker.finalize("success")
    ensure_store(uri).set_tag(tracker.run_id, INTENDED, other)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("mlflow.tracking.MlflowClient.log_artifacts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sync(other)
    assert sync(other) == ([tracker.run_id], [])
    server = ensure_store(other)
    (copy,) = server.search_runs([server.get_experiment_by_name("there").experiment_id])
    assert points(server, copy.info.run_id, "loss") == [(step, step / 7) for step in range(30)]
    assert copy.info.status == "FINISHED"
    assert Path(server.download_artifacts(copy.info.run_id, "note.txt")).read_text() == "kept"


def test_a_run_whose_experiment_is_deleted_there_waits_with_a_reason(uri, other, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    tracker = MLflowTracker("gone", "a", on_unreachable="local")
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finalize("success")
    ensure_store(uri).set_tag(tracker.run_id, INTENDED, other)
    server = ensure_store(other)
    experiment = server.create_experiment("gone")
    server.delete_experiment(experiment)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    sent = sync(other)
    assert sent.runs == []
    assert "experiment 'gone' is deleted" in sent.left[0]
    server.restore_experiment(experiment)
    assert sync(other).runs == [tracker.run_id]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_while_its_server_is_down(uri, server, monkeypatch):
    """Cut short, gone on with offline, sent later: no step twice, none left out."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    first = MLflowTracker()
    run_id = first.run_id
    for step in range(20):
        first.log_metrics({"a": float(step)}, step)
    first.save()
    server.kill()
    for step in range(20, 25):
        first.log_metrics({"a": float(step)}, step)
    first.save()
    second = MLflowTracker(on_unreachable="local")
    second.go_on_with(run_id)
    for step in range(15, 40):
        second.log_metrics({"a": float(step)}, step)
    second.finalize("success")
    server.start()
    assert main(["sync"]) == 0
    client = ensure_store(server.uri)
    assert points(client, run_id, "a") == [(step, float(step)) for step in range(40)]
    assert client.get_run(run_id).info.status == "FINISHED"
