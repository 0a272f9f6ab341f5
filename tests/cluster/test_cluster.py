"""The shipped batch scripts on a real SLURM: two tasks train, are preempted, are requeued, and end as if undisturbed."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "configs" / "cluster"
CONFIG = """\
# Two ranks on a CPU.
seed_everything: 3
trainer: {max_steps: 3000, accelerator: cpu, log_every_n_steps: 50, enable_progress_bar: false}
checkpoint: {every_n_train_steps: 500}
data:
  class_path: ToyDataModule
  init_args:
    d_in: 24
    batch_size: 64
    val_batches: 2
    chunk_steps: 10
    firing: {class_path: IndependentFiring, init_args: {probabilities: [0.1, 0.2, 0.3, 0.2, 0.1, 0.05]}}
model:
  class_path: MatryoshkaSAE
  init_args:
    levels: [4, 16]
    beta: 0.5
    auxiliary_per_level: true
    inner: {class_path: BatchTopKSAE, init_args: {d_sae: 16, k: 2, dead_after_steps: 100}}
"""
VARIANTS = {
    "srun": ("srun.sbatch", ["--ntasks-per-node=2"], {}),
    "torchrun": ("torchrun.sbatch", ["--cpus-per-task=2"], {"PROCESSES_PER_NODE": "2"}),
}


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def submit(cluster, variant, folder):
    script, options, environment = VARIANTS[variant]
    folder.mkdir()
    (folder / "toy.yaml").write_text(CONFIG)
    one_cpu = [] if variant == "torchrun" else ["--cpus-per-task=1"]
    words = [*one_cpu, *options, "--gpus-per-node=0", "--time=30", SCRIPTS / script, "--config", "toy.yaml"]
    return cluster.submit(*words, cwd=folder, **environment)


def output(folder):
    """What the job has printed."""
    return "\n".join(file.read_text() for file in folder.glob("*.log"))


def runs(cluster, folder):
    listing = cluster.run("hedgelab", "runs", "--json", cwd=folder)
    return json.loads(listing)


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """The weights of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    job = submit(cluster, "srun", folder)
    state = cluster.wait(job, ENDED)
    assert state["JobState"] == "COMPLETED", output(folder)
    (run,) = runs(cluster, folder)
    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_preempted_and_requeued(cluster, undisturbed, variant, tmp_path):
    folder = tmp_path / "run"
    job = submit(cluster, variant, folder)
    end = time.monotonic() + 1500
    while not list(folder.glob("runs/checkpoints/*/last.ckpt")) and time.monotonic() < end:
        time.sleep(0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    state = cluster.wait(job, ENDED)
    assert state["JobState"] == "COMPLETED", output(folder)
    assert state["Restarts"] == "1", output(folder)
    stop = re.search(r"stopped by SIGUSR1 after step (\d+); saved", output(folder))
    assert stop, output(folder)
    assert 500 <= int(stop[1]) < 3000
    assert re.search(r"goes on from \S+last\.ckpt", output(folder))
    (run,) = runs(cluster, folder)
    assert run["status"] == "FINISHED"
    assert run["tags"]["weights_sha256"] == undisturbed["tags"]["weights_sha256"]


HEDGE = [
    "--model={class_path: BatchTopKSAE, init_args: {d_sae: 3, k: 1, dead_after_steps: 100}}",
    "--hedge.n_new=2",
    "--hedge.new_norm=1",
    "--trainer.max_steps=1500",
    "--checkpoint.every_n_train_steps=100",
]


def test_the_hedging_degree_is_preempted_and_requeued(cluster, tmp_path):
    """Of two tasks; the phases end as in two processes that nothing happens to."""
    alone, folder = tmp_path / "undisturbed", tmp_path / "preempted"
    for place in (alone, folder):
        place.mkdir()
        (place / "toy.yaml").write_text(CONFIG)
    cluster.run("hedgelab", "hedge", "--config", "toy.yaml", "--trainer.devices=2", *HEDGE, cwd=alone)
    options = ["--cpus-per-task=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=30"]
    script = SCRIPTS / "srun.sbatch"
    job = cluster.submit(*options, script, "--config", "toy.yaml", *HEDGE, cwd=folder, COMMAND="hedge")
    end = time.monotonic() + 1500
    while not list(folder.glob("runs/checkpoints/group-*/last.ckpt")) and time.monotonic() < end:
        time.sleep(0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    state = cluster.wait(job, ENDED)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), output(folder)
    assert "going on with initial/seed3" in output(folder)
    phases = [
        {run["name"]: run["tags"]["weights_sha256"] for run in runs(cluster, place) if "phase_id" in run["tags"]}
        for place in (alone, folder)
    ]
    assert phases[0] == phases[1]
    assert len(phases[0]) == 4
    assert {run["status"] for run in runs(cluster, folder)} == {"FINISHED"}


SWEEP = """\
# Three widths of a toy SAE, as one job array.
sweep:
  axes: {model.d_sae: [2, 4, 8]}
  pack: 1
  executor: {class_path: Slurm, init_args: {minutes: 30, at_once: 2}}
seed_everything: 0
trainer: {max_steps: 200, accelerator: cpu, enable_progress_bar: false}
data:
  class_path: ToyDataModule
  init_args:
    d_in: 8
    batch_size: 32
    val_batches: 2
    firing: {class_path: IndependentFiring, init_args: {probabilities: [0.1, 0.2, 0.3]}}
model:
  class_path: TopKSAE
  init_args: {k: 1}
"""


def test_a_sweep_goes_out_as_an_array_and_comes_back_as_one_tree(cluster, tmp_path):
    pytest.importorskip("submitit", reason="needs submitit")
    (tmp_path / "widths.yaml").write_text(SWEEP)
    said = cluster.run("hedgelab", "sweep", "--config", "widths.yaml", cwd=tmp_path)
    assert "3 of 3 cells" in said
    found = runs(cluster, tmp_path)
    (parent,) = [run for run in found if run["parent"] is None]
    cells = [run for run in found if run["parent"] == parent["run_id"]]
    assert len(cells) == 3
    assert {run["status"] for run in [parent, *cells]} == {"FINISHED"}
    assert len({run["tags"]["slurm.job_id"] for run in cells}) == 3
    assert "slurm.job_id" not in parent["tags"]


RANKS = """\
# Two SAEs, trained together by two tasks.
sweep:
  axes: {model.d_sae: [8, 16]}
seed_everything: 0
trainer: {max_steps: 2000, devices: 2, accelerator: cpu, log_every_n_steps: 50, enable_progress_bar: false}
checkpoint: {every_n_train_steps: 200}
data:
  class_path: ToyDataModule
  init_args:
    d_in: 24
    batch_size: 64
    val_batches: 2
    chunk_steps: 10
    firing: {class_path: IndependentFiring, init_args: {probabilities: [0.1, 0.2, 0.3, 0.2, 0.1, 0.05]}}
model:
  class_path: BatchTopKSAE
  init_args: {k: 2, dead_after_steps: 100}
"""
SLURM = "--sweep.executor={class_path: Slurm, init_args: {minutes: 30}}"


def cells_of(found):
    return {run["name"]: run["tags"]["weights_sha256"] for run in found if "sweep_cell" in run["tags"]}


def test_a_job_of_two_tasks_is_warned_requeued_and_ends_as_if_undisturbed(cluster, tmp_path):
    pytest.importorskip("submitit", reason="needs submitit")
    said = {}
    for name in ("undisturbed", "warned"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "ranks.yaml").write_text(RANKS)
        words = ["hedgelab", "sweep", "--config", "ranks.yaml", *([SLURM] if name == "warned" else [])]
        with (folder / "out.txt").open("w") as out:
            sweep = subprocess.Popen(words, cwd=folder, env=cluster.environment, stdout=out, stderr=subprocess.STDOUT)
        if name == "warned":
            end = time.monotonic() + 1500
            while not list(folder.glob("runs/checkpoints/group-*/last.ckpt")) and time.monotonic() < end:
                time.sleep(0.05)
            (job,) = set(cluster.run("squeue", "-h", "-o", "%A").split())
            cluster.run("scancel", "--signal=USR2", job)
        assert sweep.wait(1500) == 0, (folder / "out.txt").read_text()
        said[name] = "\n".join(file.read_text() for file in folder.glob("runs/sweeps/*_0_log.*"))
    assert "this job is preempted" in said["warned"], said["warned"]
    found = {name: runs(cluster, tmp_path / name) for name in said}
    assert cells_of(found["warned"]) == cells_of(found["undisturbed"])
    assert len(cells_of(found["warned"])) == 2
    assert {run["status"] for run in found["warned"]} == {"FINISHED"}
    assert len(found["warned"]) == 3
