"""Sweeps, killed at random moments and started again: every cell is trained once, and as if nothing had happened."""

import os
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ended

pytestmark = pytest.mark.slow
SECONDS = 900.0
CONFIG = """\
seed_everything: 1
trainer: {max_steps: 600, log_every_n_steps: 6, accelerator: cpu, enable_progress_bar: false}
checkpoint: {every_n_train_steps: 12}
data:
  class_path: ToyDataModule
  init_args:
    d_in: 12
    batch_size: 8
    val_batches: 2
    firing: {class_path: CopulaFiring, init_args: {n: 9, rates: {class_path: Zipf, init_args: {total: 2}}}}
model:
  class_path: BatchTopKSAE
  init_args: {d_sae: 6, k: 2, dead_after_steps: 20}
"""
SWEEPS = {
    "fit": "sweep: {command: fit, axes: {model.k: [1, 2], data.batch_size: [8, 16]}}\n",
    "hedge": "hedge: {n_new: 2, new_norm: 1}\nsweep: {command: hedge, axes: {model.k: [1, 2], data.batch_size: [8, 16]}}\n",
}
WORDS = ["sweep", "--config=tiny.yaml"]
PROCESSES = ["--sweep.executor.class_path=LocalProcesses", "--sweep.executor.init_args.at_once=2"]


def tree(folder):
    """All runs: name, the one above, how it ended, and its weights."""
    query = """
        select runs.name, above.name, runs.status, sha.value from runs
        left join tags parent on parent.run_uuid = runs.run_uuid and parent.key = 'mlflow.parentRunId'
        left join runs above on above.run_uuid = parent.value
        left join tags sha on sha.run_uuid = runs.run_uuid and sha.key = 'weights_sha256'
    """
    with closing(sqlite3.connect(folder / "runs" / "mlflow.db")) as database:
        return sorted(database.execute(query), key=str)


def said(folder):
    return (folder / "out.txt").read_text()


@pytest.fixture
def places(server, workplace):
    """Makes an undisturbed sweep's folder, and one for a sweep that is to be disturbed."""

    def make(command, words):
        both = workplace("reference"), workplace("killed")
        for folder in both:
            (folder / "tiny.yaml").write_text(CONFIG + SWEEPS[command])
        assert server.run(words, both[0]) == 0, said(both[0])
        return both

    return make


@pytest.mark.parametrize("command", SWEEPS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_one_process(command, number, places, server, history, kill_in_training):
    reference, folder = places(command, WORDS)
    dice = random.Random(f"{command}{number}")
    killed = 0
    for _ in range(4):
        code = kill_in_training(WORDS, folder, dice.uniform(0.0, 2.5), number)
        assert code in (0, -number if number == signal.SIGKILL else 128 + number), said(folder)
        if code == 0:
            break
        killed += 1
    if code != 0:
        assert server.run(WORDS, folder) == 0, said(folder)
    print(f"{command}: {killed} times {signal.Signals(number).name}")
    assert killed
    assert "Traceback" not in said(folder)
    told = "hedgelab: stopped by SIGTERM before its end; run the same command again to go on" in said(folder)
    assert told == (number == signal.SIGTERM)
    assert tree(folder) == tree(reference)
    assert history(folder) == history(reference)
    assert not list(folder.glob("runs/checkpoints/group-*"))
    assert server.run(WORDS, folder) == 0
    finished = [line for line in said(folder).splitlines() if line.endswith("cells are finished already")]
    assert finished[-1] == "sweep: 4 of 4 cells are finished already"


def at_work_in(folder):
    """Processes whose working folder this is."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_with_processes(number, places, server, history, kill_in_training):
    """The jobs of a sweep that is gone stop too; one that is started at once waits for them, and goes on."""
    words = [*WORDS, *PROCESSES]
    reference, folder = places("fit", words)
    assert kill_in_training(words, folder, 0.5, number) == (-number if number == signal.SIGKILL else 128 + number)
    pid = server.start(words, folder)
    until = time.monotonic() + SECONDS
    while not ended(pid) and time.monotonic() < until:
        time.sleep(0.1)
    if not ended(pid):
        os.kill(pid, signal.SIGKILL)
    code, left = server.wait(pid), at_work_in(folder)
    for process in left:
        process.kill()
    logs = "".join(path.read_text() for path in folder.glob("runs/sweeps/*.err"))
    assert code == 0, said(folder) + logs
    assert left == []
    if number == signal.SIGKILL:
        assert "hedgelab: the sweep that has started this job is gone; the job stops too" in logs
    assert tree(folder) == tree(reference)
    assert history(folder) == history(reference)
