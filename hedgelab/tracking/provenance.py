"""Where a run came from (the code, the packages and the machine, as tags), and what the machine does meanwhile."""

import os
import platform
import socket
import subprocess
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import hedgelab.version
from hedgelab.tracking.spool import Operation


def provenance_tags(world_size: int) -> dict[str, str]:
    """Git commit, package versions, host and hardware of this process."""
    tags = {
        "version.hedgelab": hedgelab.version.__version__,
        **{f"version.{name}": version(name) for name in ("torch", "lightning", "mlflow")},
        "version.python": platform.python_version(),
        "host": socket.gethostname(),
        "hardware.cpu": _cpu_model(),
        "hardware.cpu_cores": str(os.cpu_count()),
        "world_size": str(world_size),
        **_git_tags(),
    }
    if torch.cuda.is_available():
        tags["hardware.gpu"] = torch.cuda.get_device_name()
    if "SLURM_JOB_ID" in os.environ:
        tags["slurm.job_id"] = os.environ["SLURM_JOB_ID"]
    return tags


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _git_tags() -> dict[str, str]:
    """Commit of the working directory's repository, else of the one that hedgelab is imported from; none elsewhere."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
    for folder in (Path.cwd(), Path(hedgelab.__file__).parent):
        with suppress(OSError, subprocess.SubprocessError):
            git = ["git", "-C", str(folder)]
            commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
            changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
            return {"git_commit": commit, "git_dirty": str(bool(changed)).lower(), "mlflow.source.git.commit": commit}
    return {}


class SystemSampler:
    """Samples processor, memory and GPU use, under names of MLflow's own monitor; steps are seconds since the run began."""

    def __init__(self, start_time_ms: int) -> None:
        self._start_time_ms = start_time_ms
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first call only starts the measurement
        self._process.cpu_percent()

    def __call__(self) -> Operation:
        """One sample of everything."""
        now = int(time.time() * 1000)
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "process_cpu_utilization_percentage": self._process.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
        }
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            free, total = torch.cuda.mem_get_info(index)
            values[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
            values[f"gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
            with suppress(Exception):  # needs NVIDIA's management library for Python, which is optional
                values[f"gpu_{index}_utilization_percentage"] = torch.cuda.utilization(index)
        step = (now - self._start_time_ms) // 1000
        return Operation([(f"system/{name}", float(value), now, step) for name, value in values.items()])
