"""Executors: every job is done and reported, those that die too; SLURM is told what was asked for."""

from pathlib import Path

import pytest

from hedgelab.errors import UserError
from hedgelab.protocols.sweep.executors import InProcess, LocalProcesses, Processes, Slurm


def work(job):
    if job == "dies":
        raise RuntimeError("boom")
    return {job: "why"} if job == "fails" else {}


def test_jobs_that_die_do_not_stop_the_rest():
    ended = list(InProcess().run(work, ["fine", "dies", "fails"], Processes()))
    assert ended == [(0, {}), (1, "RuntimeError: boom"), (2, {"fails": "why"})]


def test_an_interrupt_stops_all():
    def interrupted(job):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(InProcess().run(interrupted, ["a", "b"], Processes()))


def test_slurm_gets_the_options_in_its_own_words(tmp_path):
    slurm = pytest.importorskip("submitit.slurm.slurm", reason="needs submitit")
    executor = Slurm("short", minutes=90, gpus=2, cpus=4, memory_gb=1.5, at_once=3, extra={"account": "me"})
    script = slurm._make_sbatch_string(command="x", folder=Path(tmp_path), map_count=8, **executor.parameters(Processes()))
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")}
    assert options >= {
        "partition=short", "time=90", "gpus-per-node=2", "cpus-per-task=4", "mem=1536M", "account=me",
        "ntasks-per-node=1", "array=0-7%3",
    }  # fmt: skip
    bare = slurm._make_sbatch_string(command="x", folder=Path(tmp_path), map_count=1, **Slurm().parameters(Processes()))
    assert not any(word in bare for word in ("--partition", "--gpus-per-node", "--mem="))


def test_a_job_of_several_processes_is_a_job_of_several_tasks(tmp_path):
    slurm = pytest.importorskip("submitit.slurm.slurm", reason="needs submitit")
    parameters = Slurm(gpus=4).parameters(Processes(4, nodes=2))
    script = slurm._make_sbatch_string(command="x", folder=Path(tmp_path), map_count=2, **parameters)
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")}
    assert options >= {"ntasks-per-node=4", "nodes=2", "gpus-per-node=4", "array=0-1%2"}
    assert "--kill-on-bad-exit=1" in script


def who_am_i(job):
    import os

    from lightning.pytorch.utilities import rank_zero_only

    names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    with Path(job, os.environ["LOCAL_RANK"]).open("w") as file:
        file.write(" ".join([*(os.environ[name] for name in names), str(rank_zero_only.rank)]))
    return {"rank": os.environ["LOCAL_RANK"]}


@pytest.mark.slow
def test_local_processes_know_which_they_are(tmp_path, monkeypatch):
    """Rank zero tells how the job ended; in-process jobs of several processes get processes of their own as well."""
    pytest.importorskip("submitit", reason="needs submitit")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # the processes import this module
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert list(InProcess().run(who_am_i, [str(tmp_path)], Processes(2))) == [(0, {"rank": "0"})]
    first, second = ((tmp_path / rank).read_text().split() for rank in "01")
    port = first[4]
    assert first == ["0", "0", "2", "127.0.0.1", port, "4,6", "0"]
    assert second == ["1", "0", "2", "127.0.0.1", port, "4,6", "1"]


def only_rank_zero_says_why(job):
    import os

    if os.environ["LOCAL_RANK"] == "1":
        raise RuntimeError("boom")
    return {"cell": "why"}


@pytest.mark.slow
def test_what_rank_zero_says_counts(tmp_path):
    pytest.importorskip("submitit", reason="needs submitit")
    ended = list(LocalProcesses(1, log_dir=str(tmp_path)).run(only_rank_zero_says_why, ["job"], Processes(2)))
    assert ended == [(0, {"cell": "why"})]


@pytest.mark.parametrize(
    ("visible", "gpus", "count", "at_once", "shares"),
    [
        (None, 0, 1, 3, ["", "", ""]),
        ("4,6", None, 1, 2, ["4,6", "4,6"]),
        (None, None, 1, 1, [None]),
        (None, 2, 1, 3, ["0", "1"]),  # fewer GPUs than jobs: the third waits for one of them
        (None, 5, 2, 4, ["0,1", "2,3"]),
        ("4,6", 2, 1, 2, ["4", "6"]),
        ("4,6,7", 2, 2, 2, ["4,6"]),
        ("GPU-8f6e, MIG-11/3/0,GPU-77aa", 3, 1, 2, ["GPU-8f6e", "MIG-11/3/0"]),
    ],
)
def test_no_two_jobs_have_the_same_gpu(monkeypatch, visible, gpus, count, at_once, shares):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert LocalProcesses(at_once, gpus).shares(count) == shares


@pytest.mark.parametrize("visible", ["4", "", "GPU-8f6e"])
def test_gpus_that_are_not_visible_are_not_dealt_out(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=r"sweep\.executor\.gpus: 2 are to be dealt out, but CUDA_VISIBLE_DEVICES="):
        LocalProcesses(2, gpus=2).shares(1)


@pytest.mark.parametrize(
    ("executor", "processes", "message"),
    [
        (LocalProcesses(), Processes(2, nodes=2), r"trainer\.num_nodes: .* set sweep\.executor to Slurm"),
        (LocalProcesses(gpus=1), Processes(2), r"sweep\.executor\.gpus: 1 are too few for trainer\.devices: 2"),
    ],
)
def test_too_many_processes_name_the_key(executor, processes, message):
    with pytest.raises(UserError, match=message):
        executor.run(work, ["fine"], processes)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: LocalProcesses(at_once=0), "sweep.executor.at_once: expected a whole number of at least 1, got 0"),
        (lambda: LocalProcesses(gpus=-1), "sweep.executor.gpus: expected a whole number of at least 0, got -1"),
        (lambda: LocalProcesses(gpus=True), "sweep.executor.gpus: expected a whole number of at least 0, got True"),
        (lambda: Slurm(minutes=0), "sweep.executor.minutes: expected a whole number of at least 1, got 0"),
        (lambda: Slurm(memory_gb=-1), "sweep.executor.memory_gb: expected a number above 0, got -1"),
        (lambda: Slurm(extra={"account=x --output": "y"}), "expected the long name of an option of sbatch"),
        (lambda: Slurm(extra={"--wrap": "touch x"}), "expected the long name of an option of sbatch"),
        (lambda: Slurm(extra={"wrap": "touch x"}), "sweep.executor.extra.wrap: --wrap is set by hedgelab; remove it"),
        (lambda: Slurm(extra={"outp": "x"}), "sweep.executor.extra.outp: --output is set by hedgelab; remove it"),
        (lambda: Slurm(extra={"ntasks_per": 2}), "--ntasks-per-node is set by hedgelab; remove it"),
        (lambda: Slurm(extra={"account": None}), "sweep.executor.extra.account: must be one line"),
        (lambda: Slurm(extra={"account": ["a", "b"]}), "sweep.executor.extra.account: must be one line"),
        (lambda: Slurm("short\ntouch x"), "sweep.executor.partition: must be one line of plain text"),
        (lambda: Slurm(extra={"comment": "x\ntouch y"}), "sweep.executor.extra.comment: must be one line"),
        (lambda: Slurm(extra={"a\nb": True}), "expected the long name of an option of sbatch"),
        (lambda: Slurm(extra={"output": "elsewhere"}), "sweep.executor.extra.output: --output is set by hedgelab; remove it"),
    ],
)
def test_impossible_numbers_name_the_key(made, message):
    with pytest.raises(UserError, match=message):
        made()
