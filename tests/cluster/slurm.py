"""A real SLURM of one node in a folder of its own: munged, slurmctld and slurmd, started here and ended again.

Needs Debian's packages slurmctld, slurmd, slurm-client and munge (or the like of them), no configuration and no service that
runs already. By hand: ``python tests/cluster/slurm.py FOLDER`` starts one, says how to talk to it, and ends it on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
SETTINGS = """\
ClusterName=hedgelab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=600
SlurmdTimeout=600
MessageTimeout=100
KillWait=30
PropagateResourceLimits=NONE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What of SLURM and munge is not installed here."""
    return [program for program in PROGRAMS if find(program) is None]


def find(program: str) -> str | None:
    """Where a program is; the daemons are often outside a user's path."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")


class Cluster:
    """A SLURM of one node.

    Args:
        folder: For its configuration, state and logs.
        cpus: Processors that it deals out.
    """

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder = folder.absolute()
        self.cpus = cpus
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the daemons, and wait until the node is ready."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key, munge = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(
            SETTINGS.format(
                host=socket.gethostname().split(".")[0],
                user=getpass.getuser(),
                folder=self.folder,
                cpus=self.cpus,
                controller_port=_free_port(),
                node_port=_free_port(),
            )
        )
        files = {"key-file": key, "socket": munge} | {
            f"{name}-file": self.folder / f"munge.{name}" for name in ("log", "pid", "seed")
        }
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items()))
        _wait_until(munge.exists, "munged")
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        _wait_until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T", check=False), "the node", self.logs)

    def stop(self) -> None:
        """End all jobs, then the daemons that were started here."""
        if len(self.daemons) == 3:
            self.run("scancel", "--user", getpass.getuser(), check=False)
            _wait_until(lambda: not self.run("squeue", "-h", check=False).strip(), "the jobs' end", error=False)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()

    def run(self, *words: str | Path, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """What a command of SLURM's says."""
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**self.environment, **environment},
            timeout=3000,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}\n{self.logs()}")
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path, **environment: str) -> int:
        """Submit a batch script with its options and arguments; the job's number."""
        return int(self.run("sbatch", "--parsable", *words, cwd=cwd, **environment).split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What SLURM knows about a job: ``JobState``, ``Restarts``, ``ExitCode`` and so on."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", str(number))))

    def wait(self, number: int, states: tuple[str, ...], seconds: float = 3000) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        _wait_until(lambda: self.job(number)["JobState"] in states, f"job {number}", self.logs, seconds)
        return self.job(number)

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}:\n" + "\n".join(file.read_text().splitlines()[-15:]) for file in files)

    def _daemon(self, program: str, *words: str) -> None:
        path = find(program)
        assert path is not None
        with (self.folder / f"{program}.out").open("wb") as output:
            self.daemons.append(
                subprocess.Popen([path, *words], env=self.environment, stdout=output, stderr=output, start_new_session=True)
            )


def _wait_until(condition, what, logs=lambda: "", seconds=900, error=True) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            if error:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}\n{logs()}")
            return
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    absent = missing_programs()
    if absent:
        sys.exit(f"not installed: {', '.join(absent)}")
    with Cluster(Path(sys.argv[1])) as cluster:
        sys.stdout.write(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}\n")
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
