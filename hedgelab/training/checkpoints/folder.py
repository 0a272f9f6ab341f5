"""The folder of a run's checkpoints, and how a later command finds the run that it is to go on with.

``runs/checkpoints/<run id>/`` holds ``last.ckpt``, ``previous.ckpt`` and ``run.json``: the command and config that the run
came from (and their hash), which keys of it the user wrote, whether it has finished, and for a protocol the runs of its
unfinished phases.
"""

from __future__ import annotations

import errno
import json
import logging
import time
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from hedgelab.errors import UserError
from hedgelab.training.checkpoints.files import write_atomically

_logger = logging.getLogger(__name__)
_ABOUT = "run.json"


class RunFolder:
    """Checkpoints of one run, and what is known about it; the folder need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BaseFileLock | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What ``run.json`` says; nothing where it is missing or unreadable."""
        try:
            content = json.loads((self.path / _ABOUT).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None of an untracked one."""
        return self.about.get("run_id")

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end; releases up to 0.1.0 took one that ``max_time`` had cut for finished."""
        about = self.about
        max_time = ((about.get("config") or {}).get("trainer") or {}).get("max_time")
        return about.get("finished") is True and ("cut" in about or max_time is None)

    @property
    def members(self) -> dict[str, str | None]:
        """Runs of SAEs that are trained as one group, by name; None as the id of an untracked one."""
        return self.about.get("members") or {}

    def note(self, **facts: Any) -> None:
        """Add to what is known about the run."""
        outlook = "goes by what it said before" if self.about else "will not find this run"
        text = json.dumps({"created": time.time(), **self.about, **facts}, indent=2, default=str) + "\n"
        self.write(_ABOUT, text, f"--resume {outlook}")

    def write(self, name: str, text: str, otherwise: str) -> None:
        """Write a file of the folder; a disk that does not take it is named with what follows, and stops nothing."""
        try:
            write_atomically(self.path / name, lambda file: file.write(text.encode()))
        except OSError as error:
            _logger.warning("%s could not be written (%s); %s", self.path / name, error.strerror or error, otherwise)

    def claim(self, patience: float = 0.0) -> bool:
        """Keep other processes from going on with this run as long as this one lives.

        Another process that is at it may end within ``patience`` seconds; returned is whether there was one.
        """
        lock, waited = FileLock(self.path / ".lock"), False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk costs checkpoints, not the run
                raise
            return False
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                waited = patience > 0
                if waited:
                    _logger.warning(
                        "another process still trains %s; waiting %.0f s for it to end", self.path, patience
                    )
                lock.acquire(timeout=patience)
        except Timeout:
            name = self.about.get("name") or self.path.name
            raise UserError(
                f"resume: another process is training run {name} ({self.path}) right now; wait for it, or end it"
            ) from None
        except (OSError, NotImplementedError):  # a file system without locks, or without space
            return False
        self._lock = lock
        return waited

    def release(self) -> None:
        """Let others have the run."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def known_runs(root: Path) -> list[RunFolder]:
    """All runs that have left a record below ``runs/checkpoints``, or in one run's own folder, newest first."""
    paths = [path.parent for path in (*root.glob(_ABOUT), *root.glob(f"*/{_ABOUT}"))]
    created = {path: RunFolder(path).about.get("created") for path in paths}
    dated = {path: when for path, when in created.items() if isinstance(when, (int, float))}
    return [RunFolder(path) for path in sorted(dated, key=dated.__getitem__, reverse=True)]


def named(root: Path, run_id: str) -> RunFolder:
    """The one run of an id, or of its first characters."""
    found = [path.parent for path in root.glob(f"*/{_ABOUT}") if path.parent.name.startswith(run_id)]
    if len(found) != 1:
        there = "no run" if not found else f"{len(found)} runs"
        raise UserError(f"resume: {there} '{run_id}' in {root}; expected an id that `hedgelab runs` lists, or nothing")
    return RunFolder(found[0])
