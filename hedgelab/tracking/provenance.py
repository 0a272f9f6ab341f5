"""Where a run came from: the code, the packages and the machine, as tags."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import hedgelab

_PACKAGES = ("hedgelab", "torch", "lightning", "mlflow")


def provenance_tags(world_size: int) -> dict[str, str]:
    """Git commit, package versions, host and hardware of this process."""
    tags = {f"version.{name}": _version(name) for name in _PACKAGES}
    tags |= {
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return hedgelab.__version__ if package == "hedgelab" else "not installed"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _git_tags() -> dict[str, str]:
    """Commit of the working directory's repository, else of the one that hedgelab is imported from; none elsewhere."""
    for folder in (Path.cwd(), Path(hedgelab.__file__).parent):
        if commit := _git(folder, "rev-parse", "HEAD"):
            dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
            return {"git_commit": commit, "git_dirty": str(dirty).lower(), "mlflow.source.git.commit": commit}
    return {}


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
