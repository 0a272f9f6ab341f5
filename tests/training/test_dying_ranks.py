"""One of two ranks is killed in the middle of training: the other ends soon, and ``--resume`` gives what would have come."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

from hedgelab.saes.io import weights_sha256

pytestmark = pytest.mark.slow
SECONDS, SOON = 240.0, 60.0
CONFIG = """\
seed_everything: 1
trainer: {max_steps: 1500, log_every_n_steps: 10, accelerator: cpu, devices: 2, enable_progress_bar: false}
checkpoint: {every_n_train_steps: 50}
data:
  class_path: ToyDataModule
  init_args:
    d_in: 12
    batch_size: 8
    val_batches: 2
    chunk_steps: 10
    firing: {class_path: CopulaFiring, init_args: {n: 9, rates: {class_path: Zipf, init_args: {total: 2}}}}
model:
  class_path: BatchTopKSAE
  init_args: {d_sae: 6, k: 2, dead_after_steps: 20}
"""
WORDS = ["fit", "--config=tiny.yaml", "--resume=true"]
COMMANDS = {
    "fit": [sys.executable, "-m", "hedgelab"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module", "hedgelab"],
}


@contextmanager
def command(name, folder):
    """A command in a process group of its own, of which nothing is left afterwards."""
    with (folder / "out.txt").open("ab") as out:
        process = subprocess.Popen(
            [*COMMANDS[name], *WORDS],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={key: value for key, value in os.environ.items() if key != "HEDGELAB_DEBUG"} | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def make(folder, store):
    (folder / "runs").mkdir(parents=True)
    shutil.copy(store, folder / "runs" / "mlflow.db")
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def undisturbed(empty_store, tmp_path_factory):
    """The folder of a run that nothing happens to."""
    folder = make(tmp_path_factory.mktemp("undisturbed") / "run", empty_store)
    with command("fit", folder) as process:
        assert process.wait(SECONDS) == 0, (folder / "out.txt").read_text()
    return folder


def weights(folder):
    return [weights_sha256(path.parent) for path in (folder / "runs" / "artifacts").rglob("sae.safetensors")]


def ranks(process):
    """The processes of both ranks."""
    started = psutil.Process(process.pid).children(recursive=True)
    found = {int(one.environ()["LOCAL_RANK"]): one for one in started if "LOCAL_RANK" in one.environ()}
    return {0: psutil.Process(process.pid)} | found


def alive(processes):
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_is_killed(name, victim, undisturbed, empty_store, tmp_path, history, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = make(tmp_path / "run", empty_store)
    with command(name, folder) as process:
        until = time.monotonic() + SECONDS
        while not list(folder.glob("runs/checkpoints/*/previous.ckpt")) and time.monotonic() < until:
            assert process.poll() is None, (folder / "out.txt").read_text()
            time.sleep(0.02)
        both = ranks(process)
        everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert sorted(both) == [0, 1]
        began = time.monotonic()
        both[victim].kill()
        code = process.wait(SOON)
        while (left := alive(everything)) and time.monotonic() < began + SOON:
            time.sleep(0.05)
        seconds = time.monotonic() - began
    said = (folder / "out.txt").read_text()
    assert not left, said
    assert code == (-signal.SIGKILL if (name, victim) == ("fit", 0) else 1)
    print(f"{name}, rank {victim} killed: all ended after {seconds:.1f} s")
    own, _, _ = said.partition("torch.distributed.elastic")  # which tells of the end in its own way
    assert "Traceback" not in (own if name == "fit" else own.partition("Traceback")[0])
    if name == "fit":
        lines = [line for line in said.splitlines() if line.startswith("hedgelab: ")]
        assert len(lines) == 1
        assert lines[0].startswith(f"hedgelab: rank {1 - victim}: ")
        assert lines[0].endswith("; go on with --resume")
    with command(name, folder) as process:
        assert process.wait(SECONDS) == 0, (folder / "out.txt").read_text()
    assert "goes on from" in (folder / "out.txt").read_text()
    assert weights(folder) == weights(undisturbed)
    assert history(folder) == history(undisturbed)


def test_a_mistake_of_all_ranks_is_said_once(empty_store, tmp_path):
    folder = make(tmp_path / "mistaken", empty_store)
    (folder / "tiny.yaml").write_text(CONFIG.replace("batch_size: 8", "batch_size: 9"))
    with command("fit", folder) as process:
        assert process.wait(SECONDS) == 2
    said = [line for line in (folder / "out.txt").read_text().splitlines() if line.startswith("hedgelab: ")]
    assert said == ["hedgelab: data.batch_size: 9 cannot be split evenly over 2 ranks"]
