"""A disk that is really full: training goes on where it can, says so in a line, and with space again nothing is missing."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ended
from smalldisk import NoSmallDiskError, SmallDisk

from hedgelab.saes.io import weights_sha256
from hedgelab.training.checkpoints import PREVIOUS, newest_whole

pytestmark = pytest.mark.slow
SIZE, SECONDS = 8 << 20, 240
WORDS = ["fit", "--config=tiny.yaml", "--resume"]
CONFIG = """\
seed_everything: 1
trainer: {max_steps: 4000, log_every_n_steps: 20, accelerator: cpu, enable_progress_bar: false}
checkpoint: {every_n_train_steps: 200}
data:
  class_path: ToyDataModule
  init_args:
    d_in: 12
    batch_size: 8
    val_batches: 2
    firing: {class_path: CopulaFiring, init_args: {n: 9, rates: {class_path: Zipf, init_args: {total: 2}}}}
model:
  class_path: BatchTopKSAE
  init_args: {d_sae: 600, k: 2, dead_after_steps: 20}
"""


@pytest.fixture(scope="module")
def undisturbed(server, empty_store, tmp_path_factory):
    """The folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "runs").mkdir()
    shutil.copy(empty_store, folder / "runs" / "mlflow.db")
    (folder / "tiny.yaml").write_text(CONFIG)
    assert server.run(WORDS, folder) == 0, (folder / "out.txt").read_text()
    return folder


class Place:
    """A folder, part of which lies on a small disk."""

    def __init__(self, server, folder, mounted):
        self.server, self.folder = server, folder
        self.disk = SmallDisk(folder / mounted, SIZE)
        (folder / "tiny.yaml").write_text(CONFIG)

    def start(self, words=WORDS):
        return self.server.start(words, self.folder, self.disk.inside, HEDGELAB_DEBUG="0")

    def end(self, pid):
        """How a process ended, and what has been printed since the last time; one that takes too long is killed."""
        until = time.monotonic() + SECONDS
        while not ended(pid) and time.monotonic() < until:
            time.sleep(0.02)
        if not ended(pid):
            os.kill(pid, signal.SIGKILL)
        code = self.server.wait(pid)
        said = (self.folder / "out.txt").read_text()
        (self.folder / "out.txt").write_text("")
        assert "Traceback" not in said, said
        return code, said

    def run(self, words=WORDS):
        return self.end(self.start(words))

    def wait_for(self, pid, pattern):
        """Wait until a file is there on the disk; whether it came before the process ended."""
        until = time.monotonic() + SECONDS
        while not list(self.disk.path.glob(pattern)) and not ended(pid) and time.monotonic() < until:
            time.sleep(0.005)
        return bool(list(self.disk.path.glob(pattern)))


@pytest.fixture
def place(server, tmp_path, monkeypatch):
    """Makes a folder, part of which lies on a small disk."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = []

    def make(mounted):
        try:
            made.append(Place(server, tmp_path, mounted))
        except NoSmallDiskError as error:
            pytest.skip(str(error))
        return made[-1]

    yield make
    for one in made:
        one.disk.close()


def outcome(folder):
    """SHA-256 of the weights of all runs."""
    return [weights_sha256(path.parent) for path in (folder / "runs" / "artifacts").rglob("sae.safetensors")]


def test_full_while_checkpoints_are_written(place, undisturbed, empty_store, history):
    """The store lies on another disk: only checkpoints are lost."""
    at = place("runs/checkpoints")
    shutil.copy(empty_store, at.folder / "runs" / "mlflow.db")
    pid = at.start()
    assert at.wait_for(pid, "*/last.ckpt")
    at.disk.fill()
    code, said = at.end(pid)
    assert code == 0, said
    assert said.count("no checkpoint could be written at step") == 1
    assert said.count("run.json could not be written (No space left on device); --resume goes by what it said before") == 1
    (run,) = [path for path in at.disk.path.iterdir() if path.is_dir()]
    assert newest_whole(run) == run / "last.ckpt"
    assert not list(run.glob(".*partial"))
    assert outcome(at.folder) == outcome(undisturbed)
    at.disk.free()
    code, said = at.run()
    assert code == 0, said
    assert f"resume: run {run.name} goes on from" in said
    assert newest_whole(run) == run / "last.ckpt"
    assert (run / PREVIOUS).exists()
    assert outcome(at.folder) == outcome(undisturbed)
    assert history(at.folder) == history(undisturbed)
    assert "has finished; nothing is left to do" in at.run()[1]


def test_full_before_the_first_checkpoint(place, undisturbed, empty_store, history):
    at = place("runs/checkpoints")
    shutil.copy(empty_store, at.folder / "runs" / "mlflow.db")
    at.disk.fill()
    code, said = at.run()
    assert code == 0, said
    assert said.count("run.json could not be written (No space left on device); --resume will not find this run") == 2
    assert said.count("no checkpoint could be written at step 200") == 1
    assert outcome(at.folder) == outcome(undisturbed)
    assert history(at.folder) == history(undisturbed)


def test_full_for_everything(place, undisturbed, empty_store, history):
    """Store, spool, artifacts and checkpoints lie on it: what could not be kept is computed again."""
    at = place("runs")
    shutil.copy(empty_store, at.disk.path / "mlflow.db")
    pid = at.start()
    assert at.wait_for(pid, "checkpoints/*/last.ckpt")
    at.disk.fill()
    code, said = at.end(pid)
    assert code == 2, said
    lines = [line for line in said.splitlines() if not line.startswith("resume:")]
    assert len(lines) == 4, said
    assert "the tracking store does not take what is sent ((sqlite3.OperationalError) database or disk is full)" in said
    assert "the disk does not take what is logged (No space left on device)" in said
    assert said.count("no checkpoint could be written at step") == 1
    assert lines[-1].startswith("hedgelab: trainer.logger: ")
    assert lines[-1].endswith("free some space, then --resume logs them again")
    at.disk.free()
    code, said = at.run()
    assert code == 0, said
    assert "goes on from" in said
    assert at.run(["sync"])[0] == 0
    at.disk.copy_to(at.folder / "after" / "runs")
    assert history(at.folder / "after") == history(undisturbed)
    assert outcome(at.folder / "after") == outcome(undisturbed)


def test_full_for_a_while_and_killed(place, undisturbed, empty_store, history):
    """What waited in memory goes to the disk as soon as it can, and is sent by ``hedgelab sync``."""
    at = place("runs")
    shutil.copy(empty_store, at.disk.path / "mlflow.db")
    pid = at.start()
    assert at.wait_for(pid, "checkpoints/*/last.ckpt")
    at.disk.fill()
    until = time.monotonic() + SECONDS
    while "no checkpoint could be written" not in (at.folder / "out.txt").read_text() and time.monotonic() < until:
        time.sleep(0.02)
    at.disk.free()
    assert at.wait_for(pid, "spool/*.jsonl")
    os.kill(pid, signal.SIGKILL)
    assert at.end(pid)[0] == -signal.SIGKILL
    code, said = at.run(["sync"])
    assert code == 0, said
    assert "nothing waits" not in said
    assert not list(at.disk.path.glob("spool/*.jsonl"))
    code, said = at.run()
    assert code == 0, said
    assert "goes on from" in said
    at.disk.copy_to(at.folder / "after" / "runs")
    assert history(at.folder / "after") == history(undisturbed)
    assert outcome(at.folder / "after") == outcome(undisturbed)


@pytest.mark.parametrize("with_store", [False, True])
def test_full_at_the_very_start(place, undisturbed, empty_store, history, with_store):
    at = place("runs")
    if with_store:
        shutil.copy(empty_store, at.disk.path / "mlflow.db")
    at.disk.fill()
    code, said = at.run()
    assert code == 2, said
    lines = [line for line in said.splitlines() if not line.startswith("resume:")]
    assert len(lines) == 1
    assert lines[0].startswith("hedgelab: MLFLOW_TRACKING_URI: cannot use the store")
    assert ("database or disk is full" if with_store else "No space left on device") in lines[0]
    assert lines[0].endswith("free some space, or set it to another store")
    assert {path.name for path in at.disk.path.rglob("*") if path.is_file()} <= {"filler", "mlflow.db", "mlflow.db.lock"}
    if with_store:
        return
    at.disk.free()
    code, said = at.run()
    assert code == 0, said
    at.disk.copy_to(at.folder / "after" / "runs")
    assert history(at.folder / "after") == history(undisturbed)
    assert outcome(at.folder / "after") == outcome(undisturbed)
