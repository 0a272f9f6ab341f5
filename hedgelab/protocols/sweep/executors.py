"""Where the jobs of a sweep run: in this process, in processes of their own, or as a SLURM job array (submitit)."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from hedgelab.errors import Stopped, UserError, whole_number
from hedgelab.training.checkpoints.stopping import stop_at_once

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 30.0
_PATIENCE_SECONDS = 300
_OWN_OPTIONS = frozenset({"array", "chdir", "error", "ntasks-per-node", "open-mode", "output", "signal", "wrap"})


class Processes(NamedTuple):
    """How many processes do a job together.

    Attributes:
        per_node: On each node.
        nodes: Nodes.
    """

    per_node: int = 1
    nodes: int = 1

    @property
    def several(self) -> bool:
        """Whether they are more than one."""
        return self.per_node * self.nodes > 1


ONE_PROCESS = Processes()


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        job: Its number.
        failures: What went wrong with each cell that has no result, by the cell's name; None where the whole job died.
        error: Why the whole job died.
    """

    job: int
    failures: dict[str, str] | None
    error: str = ""


Work = Callable[[Any], dict[str, str]]
"""Does a job and says which of its cells failed, with the reason of each; both travel to other processes.

Where several processes do a job together each of them calls it, with the environment that a launcher would have left.
"""


class Executor(ABC):
    """Runs jobs; one that dies does not stop the others."""

    @abstractmethod
    def run(
        self, work: Work, jobs: Sequence[Any], ended: Callable[[Outcome], None], processes: Processes = ONE_PROCESS
    ) -> None:
        """Do all jobs, in any order, each by so many processes, and report each as it ends."""


class InProcess(Executor):
    """One job after another, in this process; where several do a job together, in processes of their own."""

    def run(
        self, work: Work, jobs: Sequence[Any], ended: Callable[[Outcome], None], processes: Processes = ONE_PROCESS
    ) -> None:
        """Do all jobs in their order."""
        if processes.several:
            LocalProcesses(at_once=1, gpus=None).run(work, jobs, ended, processes)
            return
        for number, job in enumerate(jobs):
            try:
                outcome = Outcome(number, work(job))
            except Exception as error:
                outcome = Outcome(number, None, _line(error))
            ended(outcome)


class LocalProcesses(Executor):
    """Every job in a process of its own on this machine, a bounded number at a time.

    Args:
        at_once: Most jobs at a time.
        gpus: GPUs of this machine to deal out, one to each process of a job; with 0 processes see none, with null all. A job
            keeps its GPUs to itself, so that no more jobs run at a time than there are GPUs for. Where
            ``CUDA_VISIBLE_DEVICES`` is set, those that it names are dealt out, by number or UUID.
        log_dir: Where submitit keeps the processes' logs.

    Raises:
        UserError: A number that is too small.
    """

    def __init__(self, at_once: int = 2, gpus: int | None = 0, log_dir: str = "runs/sweeps") -> None:
        self.at_once = whole_number("sweep.executor.at_once", at_once)
        self.gpus, self.log_dir = gpus, log_dir
        if gpus is not None:
            whole_number("sweep.executor.gpus", gpus, least=0)

    def run(
        self, work: Work, jobs: Sequence[Any], ended: Callable[[Outcome], None], processes: Processes = ONE_PROCESS
    ) -> None:
        """Keep ``at_once`` jobs going until all are done; an interrupt ends them.

        Raises:
            UserError: Several nodes, fewer GPUs than one job's processes, or fewer visible than are to be dealt out.
        """
        count = processes.per_node
        if processes.nodes > 1:
            raise UserError("trainer.num_nodes: a sweep reaches other nodes through SLURM; set sweep.executor to Slurm")
        if self.gpus and self.gpus < count:
            raise UserError(f"sweep.executor.gpus: {self.gpus} are too few for trainer.devices: {count}")
        submitit = _submitit()
        shares = self.shares(count)
        waiting = list(enumerate(jobs))
        running: dict[int, tuple[int, Any]] = {}  # by slot
        try:
            while waiting or running:
                for slot, gpus in enumerate(shares):
                    if slot not in running and waiting:
                        number, job = waiting.pop(0)
                        executor = submitit.LocalExecutor(folder=Path(self.log_dir).absolute())
                        executor.update_parameters(timeout_min=60 * 24 * 365, tasks_per_node=count)
                        task = Rank(work, _free_port()) if count > 1 else work
                        running[slot] = number, executor.submit(Attended(task, os.getpid(), gpus), job)
                for slot, (number, submitted) in list(running.items()):
                    if submitted.done():
                        del running[slot]
                        ended(_outcome(number, submitted))
                time.sleep(_POLL_SECONDS)
        except BaseException:
            for _, submitted in running.values():
                submitted.cancel()
            raise

    def shares(self, count: int) -> Sequence[str | None]:
        """What each of the jobs that run at a time sees of the GPUs, as ``CUDA_VISIBLE_DEVICES`` has it; None is not set.

        Args:
            count: Processes of a job, each of which needs a GPU.

        Raises:
            UserError: Fewer GPUs are visible than are to be dealt out.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not self.gpus:
            return [visible if self.gpus is None else ""] * self.at_once
        there = list(map(str, range(self.gpus))) if visible is None else [name.strip() for name in visible.split(",")]
        if visible is not None and len([name for name in there if name]) < self.gpus:
            raise UserError(
                f"sweep.executor.gpus: {self.gpus} are to be dealt out, but CUDA_VISIBLE_DEVICES={visible!r} shows fewer"
            )
        slots = min(self.at_once, self.gpus // count)
        return [",".join(there[slot * count : (slot + 1) * count]) for slot in range(slots)]


class Attended:
    """Work of a process that ends soon after the sweep which has started it: as if told to, with a checkpoint.

    Args:
        work: What it does.
        sweep: Id of the sweep's process.
        gpus: The GPUs that it sees, as ``CUDA_VISIBLE_DEVICES`` has them; CUDA reads that when it is first used. None is all.
    """

    def __init__(self, work: Work, sweep: int, gpus: str | None = None) -> None:
        self.work, self.sweep, self.gpus = work, sweep, gpus

    def __call__(self, job: Any) -> dict[str, str]:
        """Do it."""
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # submitit has set it
        os.environ |= {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus}
        threading.Thread(target=self._attend, name="hedgelab-sweep", daemon=True).start()
        with stop_at_once():  # submitit ignores SIGTERM; training answers it between steps
            return self.work(job)

    def _attend(self) -> None:
        with suppress(psutil.NoSuchProcess):
            sweep = psutil.Process(self.sweep)
            while sweep.is_running() and sweep.status() != psutil.STATUS_ZOMBIE:
                time.sleep(_POLL_SECONDS)
        sys.stderr.write(
            "hedgelab: the sweep that has started this job is gone; the job stops too, to be gone on with\n"
        )
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(128 + signal.SIGTERM)


class Rank:
    """Work that several local processes do together: tells each of them, in its environment, which one it is.

    Args:
        work: What they do.
        port: Where they find each other.
    """

    def __init__(self, work: Work, port: int) -> None:
        self.work, self.port = work, port

    def __call__(self, job: Any) -> dict[str, str]:
        """Do it."""
        from lightning.pytorch.utilities import rank_zero_only

        here = _submitit().JobEnvironment()
        os.environ |= {
            "LOCAL_RANK": str(here.local_rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(here.num_tasks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }
        # Lightning has looked for it already, when it was imported.
        rank_zero_only.rank = here.global_rank  # type: ignore[attr-defined]
        return self.work(job)


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


class Slurm(Executor):
    """Every job as a task of one SLURM job array; preempted ones are submitted again and go on.

    Args:
        partition: Partition; None is the cluster's default.
        minutes: Time limit of each job.
        gpus: GPUs of each job.
        cpus: Processors of each job.
        memory_gb: Memory of each job; None is the cluster's default.
        at_once: Most jobs that run at a time.
        extra: Further options of ``sbatch``, such as ``{account: name}``.
        log_dir: Where submitit keeps scripts and logs; all nodes must see it, and the tracking store.

    Raises:
        UserError: A number that is too small, or an option that would break out of the batch script.
    """

    def __init__(
        self,
        partition: str | None = None,
        minutes: int = 60,
        gpus: int = 0,
        cpus: int = 1,
        memory_gb: float | None = None,
        at_once: int = 256,
        extra: dict[str, Any] | None = None,
        log_dir: str = "runs/sweeps",
    ) -> None:
        for name, value, least in (
            ("minutes", minutes, 1),
            ("gpus", gpus, 0),
            ("cpus", cpus, 1),
            ("at_once", at_once, 1),
        ):
            whole_number(f"sweep.executor.{name}", value, least)
        if memory_gb is not None and not (isinstance(memory_gb, (int, float)) and 0 < memory_gb < 1e6):
            raise UserError(f"sweep.executor.memory_gb: expected a number above 0, got {memory_gb!r}")
        _check_option("partition", "partition" if partition is None else partition)
        for option, given in (extra or {}).items():
            _check_name(option)
            _check_option(f"extra.{option}", given)
        self.partition, self.minutes, self.gpus, self.cpus = partition, minutes, gpus, cpus
        self.memory_gb, self.at_once, self.extra, self.log_dir = memory_gb, at_once, extra or {}, log_dir

    def parameters(self, processes: Processes = ONE_PROCESS) -> dict[str, Any]:
        """What submitit is told."""
        given: dict[str, Any] = {
            "partition": self.partition,
            "time": self.minutes,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem": f"{round(self.memory_gb * 1024)}M" if self.memory_gb else None,
            "array_parallelism": self.at_once,
            "additional_parameters": self.extra or None,
        }
        if processes.several:  # those that are left wait for one that died
            given |= {"nodes": processes.nodes, "srun_args": ["--kill-on-bad-exit=1"]}
        tasks = {"ntasks_per_node": processes.per_node}
        return {**tasks, **{key: value for key, value in given.items() if value is not None}}

    def run(
        self, work: Work, jobs: Sequence[Any], ended: Callable[[Outcome], None], processes: Processes = ONE_PROCESS
    ) -> None:
        """Submit all jobs as one array and wait for them; an interrupt cancels them."""
        submitit = _submitit()
        try:
            executor = submitit.SlurmExecutor(folder=Path(self.log_dir).absolute())
        except RuntimeError as error:  # no srun
            raise UserError(f"sweep.executor: Slurm is not to be had here ({error}); take LocalProcesses") from error
        executor.update_parameters(job_name="hedgelab", **self.parameters(processes))
        submitted = executor.map_array(Requeueable(work), list(jobs))
        waiting = dict(enumerate(submitted))
        try:
            while waiting:
                for number, job in list(waiting.items()):
                    if job.done():
                        del waiting[number]
                        ended(_outcome(number, job))
                time.sleep(_POLL_SECONDS)
        except BaseException:
            for job in waiting.values():
                job.cancel()
            raise


def _check_name(option: Any) -> None:
    """See that something is the name of an option of ``sbatch`` that is the user's to set.

    Raises:
        UserError: It would set another, by what follows it in the batch script or as the beginning of a longer name.
    """
    key = f"sweep.executor.extra.{option}"
    if not isinstance(option, str) or re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", option) is None:
        raise UserError(
            f"{key!r}: expected the long name of an option of sbatch, such as account, without dashes before it"
        )
    if own := [
        name for name in sorted(_OWN_OPTIONS) if name.startswith(option.replace("_", "-"))
    ]:  # sbatch completes names
        raise UserError(f"{key}: --{own[0]} is set by hedgelab; remove it (log_dir says where logs go)")


def _check_option(key: str, value: Any) -> None:
    """See that a value can stand in one line of the batch script.

    Raises:
        UserError: It cannot.
    """
    plain = value is True or (isinstance(value, (str, int, float)) and value is not False)
    if not plain or not str(value).isprintable() or not str(value).strip():
        raise UserError(f"sweep.executor.{key}: must be one line of plain text, a number or true, got {value!r}")


def _outcome(number: int, job: Any) -> Outcome:
    """How a submitit job ended."""
    try:
        return Outcome(number, job.task(0).result())
    except Exception as error:
        return Outcome(number, None, f"{_line(error)}; log: {job.task(0).paths.stderr}")


def _line(error: Exception) -> str:
    """The last line of an exception that says something (submitit quotes whole tracebacks)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError("sweep.executor: needs submitit: pip install 'hedgelab[sweep]', or take InProcess") from error
    return submitit
