"""Executors: every job is done and reported, those that die too; SLURM is told what was asked for."""

from pathlib import Path

import pytest

from hedgelab.errors import UserError
from hedgelab.protocols.sweep_executors import InProcess, LocalProcesses, Outcome, Slurm


def work(job):
    if job == "dies":
        raise RuntimeError("boom")
    return {job: "why"} if job == "fails" else {}


def test_jobs_that_die_do_not_stop_the_rest():
    ended = []
    InProcess().run(work, ["fine", "dies", "fails"], ended.append)
    assert ended == [Outcome(0, {}), Outcome(1, None, "RuntimeError: boom"), Outcome(2, {"fails": "why"})]


def test_an_interrupt_stops_all():
    def interrupted(job):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InProcess().run(interrupted, ["a", "b"], pytest.fail)


def test_slurm_gets_the_options_in_its_own_words(tmp_path):
    slurm = pytest.importorskip("submitit.slurm.slurm", reason="needs submitit")
    executor = Slurm("short", minutes=90, gpus=2, cpus=4, memory_gb=1.5, at_once=3, extra={"account": "me"})
    script = slurm._make_sbatch_string(command="x", folder=Path(tmp_path), map_count=8, **executor.parameters())
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")}
    assert options >= {
        "partition=short", "time=90", "gpus-per-node=2", "cpus-per-task=4", "mem=1536M", "account=me",
        "ntasks-per-node=1", "array=0-7%3",
    }  # fmt: skip
    bare = slurm._make_sbatch_string(command="x", folder=Path(tmp_path), map_count=1, **Slurm().parameters())
    assert not any(word in bare for word in ("--partition", "--gpus-per-node", "--mem="))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: LocalProcesses(at_once=0), "sweep.executor.at_once: must be at least 1, got 0"),
        (lambda: LocalProcesses(gpus=-1), "sweep.executor.gpus: must not be negative, got -1"),
        (lambda: Slurm(minutes=0), "sweep.executor.minutes: must be at least 1, got 0"),
    ],
)
def test_impossible_numbers_name_the_key(made, message):
    with pytest.raises(UserError, match=message):
        made()
