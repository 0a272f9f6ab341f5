"""Where the jobs of a sweep run: in this process, in processes of their own, or as a SLURM job array (submitit)."""

import os
import re
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.utilities import rank_zero_only

from hedgelab.errors import Stopped, UserError, stop_at_once, whole_number

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 30.0
_PATIENCE_SECONDS = 300
_OWN_OPTIONS = ("array", "chdir", "error", "ntasks-per-node", "open-mode", "output", "signal", "wrap")

Work = Callable[[Any], dict[str, str]]  # does a job in each of its processes; says why cells failed, by name
Ends = Generator[tuple[int, dict[str, str] | str], None, None]  # number and failures of a job, or why all of it died


class Processes(NamedTuple):
    """How many processes do a job together."""

    per_node: int = 1
    nodes: int = 1

    @property
    def several(self) -> bool:
        """Whether they are more than one."""
        return self.per_node * self.nodes > 1


class Executor(ABC):
    """Runs jobs; one that dies does not stop the others."""

    @abstractmethod
    def run(self, work: Work, jobs: Sequence[Any], processes: Processes) -> Ends:
        """Do all jobs, in any order, each by so many processes; closing the iterator stops what still runs."""


class InProcess(Executor):
    """One job after another, in this process; where several do a job together, in processes of their own."""

    def run(self, work: Work, jobs: Sequence[Any], processes: Processes) -> Ends:
        """Do all jobs in their order."""
        if processes.several:
            yield from LocalProcesses(at_once=1, gpus=None).run(work, jobs, processes)
            return
        for number, job in enumerate(jobs):
            yield number, _result(partial(work, job))


@dataclass
class LocalProcesses(Executor):
    """Every job in a process of its own on this machine, a bounded number at a time.

    Args:
        at_once: Most jobs at a time.
        gpus: GPUs of this machine to deal out, one to each process of a job; with 0 processes see none, with null all. A job
            keeps its GPUs to itself, so that no more jobs run at a time than there are GPUs for. Where
            ``CUDA_VISIBLE_DEVICES`` is set, those that it names are dealt out, by number or UUID.
        log_dir: Where submitit keeps the processes' logs.
    """

    at_once: int = 2
    gpus: int | None = 0
    log_dir: str = "runs/sweeps"

    def __post_init__(self) -> None:
        whole_number("sweep.executor.at_once", self.at_once)
        if self.gpus is not None:
            whole_number("sweep.executor.gpus", self.gpus, least=0)

    def run(self, work: Work, jobs: Sequence[Any], processes: Processes) -> Ends:
        """Keep ``at_once`` jobs going until all are done."""
        count = processes.per_node
        if processes.nodes > 1:
            raise UserError("trainer.num_nodes: a sweep reaches other nodes through SLURM; set sweep.executor to Slurm")
        if self.gpus and self.gpus < count:
            raise UserError(f"sweep.executor.gpus: {self.gpus} are too few for trainer.devices: {count}")
        executor = _submitit().LocalExecutor(folder=Path(self.log_dir).absolute())
        executor.update_parameters(timeout_min=60 * 24 * 365, tasks_per_node=count)

        def submit(job: Any, gpus: str | None) -> Any:
            port = find_free_network_port() if count > 1 else None
            return executor.submit(local_work, work, os.getpid(), gpus, port, job)

        return _ends(jobs, self.shares(count), submit)

    def shares(self, count: int) -> Sequence[str | None]:
        """The GPUs of each of the jobs that run at a time, one for each of ``count`` processes; None sets nothing."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not self.gpus:
            return [visible if self.gpus is None else ""] * self.at_once
        names = map(str, range(self.gpus)) if visible is None else map(str.strip, visible.split(","))
        there = list(filter(None, names))
        if len(there) < self.gpus:
            fewer = f"CUDA_VISIBLE_DEVICES={visible!r} shows fewer"
            raise UserError(f"sweep.executor.gpus: {self.gpus} are to be dealt out, but {fewer}")
        slots = min(self.at_once, self.gpus // count)
        return [",".join(there[slot * count : (slot + 1) * count]) for slot in range(slots)]


def local_work(work: Work, sweep: int, gpus: str | None, port: int | None, job: Any) -> dict[str, str]:
    """Do a job in a local process, which ends with a checkpoint soon after the sweep that has started it (process ``sweep``).

    ``gpus`` are those that it sees, as ``CUDA_VISIBLE_DEVICES`` has them, None for all; with a ``port``, several processes do
    the work together and find each other there.
    """
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # submitit has set it; CUDA reads it when it is first used
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    if port is not None:
        here = _submitit().JobEnvironment()
        ranks = {"LOCAL_RANK": str(here.local_rank), "NODE_RANK": "0", "WORLD_SIZE": str(here.num_tasks)}
        os.environ |= {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # Lightning has looked for it already, when it was imported.
        rank_zero_only.rank = here.global_rank  # type: ignore[attr-defined]
    threading.Thread(target=_end_with, args=[sweep], daemon=True).start()
    with stop_at_once():  # submitit ignores SIGTERM; training answers it between steps
        return work(job)


def _end_with(sweep: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(sweep)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_POLL_SECONDS)
    sys.stderr.write("hedgelab: the sweep that has started this job is gone; the job stops too, to be gone on with\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


class Requeueable:
    """Work that SLURM may preempt or time out: submitit submits it again, and it goes on where it stopped."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, job: Any) -> dict[str, str]:
        """Do it; what SLURM's warning has stopped between two steps is handed on to submitit then, which ends rank zero."""
        submit_again = signal.getsignal(signal.SIGUSR2)
        try:
            return self.work(job)
        except Stopped as stop:
            if stop.number == signal.SIGUSR2 and callable(submit_again):
                submit_again(stop.number, None)
                time.sleep(_PATIENCE_SECONDS)  # other ranks: one that ended first would have rank zero killed
            raise

    def checkpoint(self, job: Any) -> Any:
        """What to submit again."""
        return _submitit().helpers.DelayedSubmission(self, job)


@dataclass
class Slurm(Executor):
    """Every job as a task of one SLURM job array; preempted ones are submitted again and go on."""

    partition: str | None = None  # None is the cluster's default
    minutes: int = 60  # time limit of each job, to which gpus, cpus and memory belong too
    gpus: int = 0
    cpus: int = 1
    memory_gb: float | None = None  # None is the cluster's default
    at_once: int = 256  # most jobs that run at a time
    extra: dict[str, Any] | None = None  # further options of sbatch, such as {account: name}
    log_dir: str = "runs/sweeps"  # submitit's scripts and logs; all nodes must see it, and the tracking store

    def __post_init__(self) -> None:
        for name, least in (("minutes", 1), ("gpus", 0), ("cpus", 1), ("at_once", 1)):
            whole_number(f"sweep.executor.{name}", getattr(self, name), least)
        if self.memory_gb is not None and not (isinstance(self.memory_gb, (int, float)) and 0 < self.memory_gb < 1e6):
            raise UserError(f"sweep.executor.memory_gb: expected a number above 0, got {self.memory_gb!r}")
        given = {f"extra.{option}": value for option, value in (self.extra or {}).items()}
        given |= {} if self.partition is None else {"partition": self.partition}
        for name, value in given.items():
            key, option = f"sweep.executor.{name}", name.removeprefix("extra.")
            if not re.fullmatch(r"[A-Za-z][\w-]*", option, re.ASCII):
                raise UserError(f"{key!r}: expected the long name of an option of sbatch, such as account")
            # sbatch completes names
            if own := [one for one in _OWN_OPTIONS if one.startswith(option.replace("_", "-"))]:
                raise UserError(f"{key}: --{own[0]} is set by hedgelab; remove it (log_dir says where logs go)")
            # each becomes a line of the batch script
            plain = value is True or (isinstance(value, (str, int, float)) and value is not False)
            if not plain or not str(value).isprintable() or not str(value).strip():
                raise UserError(f"{key}: must be one line of plain text, a number or true, got {value!r}")

    def parameters(self, processes: Processes) -> dict[str, Any]:
        """What submitit is given."""
        given: dict[str, Any] = {
            "partition": self.partition,
            "time": self.minutes,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem": f"{round(self.memory_gb * 1024)}M" if self.memory_gb else None,
            "array_parallelism": self.at_once,
            "additional_parameters": self.extra or None,
            "ntasks_per_node": processes.per_node,
        }
        if processes.several:  # those that are left wait for one that died
            given |= {"nodes": processes.nodes, "srun_args": ["--kill-on-bad-exit=1"]}
        return {key: value for key, value in given.items() if value is not None}

    def run(self, work: Work, jobs: Sequence[Any], processes: Processes) -> Ends:
        """Submit all jobs as one array and wait for them."""
        try:
            executor = _submitit().SlurmExecutor(folder=Path(self.log_dir).absolute())
        except RuntimeError as error:  # no srun
            raise UserError(f"sweep.executor: Slurm is not to be had here ({error}); take LocalProcesses") from error
        executor.update_parameters(job_name="hedgelab", **self.parameters(processes))
        submitted = executor.map_array(Requeueable(work), list(jobs))
        return _ends(submitted, [None] * len(submitted), lambda job, _: job)


def _ends(jobs: Sequence[Any], shares: Sequence[str | None], submit: Callable[[Any, str | None], Any]) -> Ends:
    """How jobs end that are submitted as soon as one of the shares is free; closing this cancels those that still run."""
    waiting, free = list(enumerate(jobs)), list(shares)
    running: dict[int, tuple[Any, str | None]] = {}  # submitit's jobs with their shares, by number
    try:
        while waiting or running:
            while waiting and free:
                number, job = waiting.pop(0)
                share = free.pop(0)
                running[number] = submit(job, share), share
            for number, (job, share) in list(running.items()):
                if job.done():
                    del running[number]
                    free.append(share)
                    yield number, _result(job.task(0).result, job.task(0).paths.stderr)
            time.sleep(_POLL_SECONDS)
    finally:
        for job, _ in running.values():
            job.cancel()


def _result(work: Callable[[], dict[str, str]], log: Path | None = None) -> dict[str, str] | str:
    """What work says, or the last line of its exception that says something (submitit quotes whole tracebacks)."""
    try:
        return work()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
        return ": ".join([type(error).__name__, *lines[-1:]]) + (f"; log: {log}" if log else "")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError("sweep.executor: needs submitit: pip install 'hedgelab[sweep]', or take InProcess") from error
    return submitit
