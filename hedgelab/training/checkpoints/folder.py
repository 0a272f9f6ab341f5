"""The folder of a run's checkpoints, and how a later command finds the run that it is to go on with.

``runs/checkpoints/<run id>/`` holds ``last.ckpt``, ``previous.ckpt`` and ``run.json``: the command and config that the run
came from (and their hash), which keys of it the user wrote, whether it has finished, and for a protocol the runs of its
unfinished phases.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from hedgelab.errors import UserError
from hedgelab.training.checkpoints.files import write_atomically

_logger = logging.getLogger(__name__)
_ABOUT = "run.json"


class RunFolder:
    """Checkpoints of one run, and what is known about it.

    Args:
        path: The folder; it need not exist yet.
    """

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
        found = self.about.get("run_id")
        return found if isinstance(found, str) else None

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.about.get("finished") is True

    @property
    def members(self) -> dict[str, str | None]:
        """Runs of SAEs that are trained as one group, by name; None as the id of an untracked one."""
        found = self.about.get("members")
        return found if isinstance(found, dict) else {}

    def note(self, **facts: Any) -> None:
        """Add to what is known about the run; a disk that does not take it is told of, and stops nothing."""
        text = json.dumps({"created": time.time(), **self.about, **facts}, indent=2, default=str) + "\n"
        try:
            write_atomically(self.path / _ABOUT, lambda file: file.write(text.encode()))
        except OSError as error:
            _logger.warning(
                "%s could not be written (%s); --resume %s",
                self.path / _ABOUT,
                error.strerror or error,
                "goes by what it said before" if self.about else "will not find this run",
            )

    def claim(self, patience: float = 0.0) -> bool:
        """Keep other processes from going on with this run as long as this one lives.

        Args:
            patience: Seconds in which another process may end that is at it.

        Returns:
            Whether there was one.

        Raises:
            UserError: Another process is at it.
            OSError: There can be no such folder.
        """
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk costs checkpoints, not the run
                raise
            return False
        try:
            waited = _acquire(lock, patience, self.path)
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

    def part(self, names: list[str]) -> RunFolder:
        """The folder of a part of this run (a group of phases), always the same one for the same names."""
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
        return RunFolder(self.path / f"part-{digest}")


def _acquire(lock: BaseFileLock, patience: float, path: Path) -> bool:
    """Take a lock; whether that had to be waited for."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if patience <= 0:
            raise
        _logger.warning("another process is still training %s; waiting %.0f s for it to end", path, patience)
        lock.acquire(timeout=patience)
        return True
    return False


def untracked_name() -> str:
    """Name of the folder of a run that MLflow knows nothing about."""
    return f"untracked-{uuid.uuid4().hex[:12]}"


def known_runs(root: Path) -> list[RunFolder]:
    """All runs that have left a record, newest first.

    Args:
        root: Where checkpoints are kept: ``runs/checkpoints``, or one run's own folder.
    """
    folders = [RunFolder(root), *(RunFolder(path) for path in root.glob("*/"))] if root.is_dir() else []
    found = [(folder.about.get("created"), folder) for folder in folders]
    dated = [(float(created), folder) for created, folder in found if isinstance(created, (int, float))]
    return [folder for _, folder in sorted(dated, key=lambda pair: pair[0], reverse=True)]


def is_finished(folder: RunFolder) -> bool:
    """Whether a run has reached its end; releases up to 0.1.0 took one that ``max_time`` had cut for finished."""
    about = folder.about
    trainer = (about.get("config") or {}).get("trainer") or {}
    return folder.finished and ("cut" in about or trainer.get("max_time") is None)


def named(root: Path, run_id: str) -> RunFolder:
    """The run of an id, or of its first characters.

    Raises:
        UserError: There is none, or there are several.
    """
    found = [path.parent for path in root.glob("*/run.json") if path.parent.name.startswith(run_id)]
    if len(found) != 1:
        there = "no run" if not found else f"{len(found)} runs"
        raise UserError(f"resume: {there} '{run_id}' in {root}; expected an id that `hedgelab runs` lists, or nothing")
    return RunFolder(found[0])
