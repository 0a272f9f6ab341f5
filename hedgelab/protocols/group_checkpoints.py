"""Checkpoints of SAEs that are trained together, found again by what is trained: a protocol goes on inside a phase."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L

from hedgelab.errors import UserError
from hedgelab.training.checkpoints import RunCheckpoint, RunFolder, newest_whole

_PATIENCE = 60.0
_logger = logging.getLogger(__name__)


class GroupCheckpoints:
    """The checkpoints of one group of SAEs, in ``runs/checkpoints/group-<hash>/``; gone when its training has ended.

    Args:
        root: Where checkpoints are kept, ``runs/checkpoints``.
        members: What is trained: stable ids by name.
        lone: Whether the one member is trained by itself, whose checkpoints are those of an SAE and not of a group.
    """

    def __init__(self, root: Path, members: Mapping[str, str], lone: bool = False) -> None:
        self.members = dict(members)
        digest = hashlib.sha256(json.dumps(self.members, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = RunFolder(root / f"group-{digest}{'-lone' if lone else ''}")

    @classmethod
    def unfinished(cls, root: Path, members: Mapping[str, str]) -> GroupCheckpoints | None:
        """A group of some of these members whose training was cut short; None without one."""
        return next(iter(cls.all_unfinished(root, members)), None)

    @classmethod
    def all_unfinished(cls, root: Path, members: Mapping[str, str]) -> list[GroupCheckpoints]:
        """The groups of some of these members whose training was cut short."""
        found = []
        for path in sorted(root.glob("group-*/")):
            group = RunFolder(path).about.get("group")
            if isinstance(group, dict) and group and group.items() <= members.items():
                found.append(cls(root, group, path.name.endswith("-lone")))
        return found

    @classmethod
    def forget(cls, root: Path, names: Sequence[str]) -> None:
        """Remove the checkpoints of all groups whose members are these, or phases of these (``name/...``)."""
        own = tuple(f"{name}/" for name in names)
        for path in sorted(root.glob("group-*/")):
            members = RunFolder(path).about.get("group")
            if isinstance(members, dict) and all(f"{member}/".startswith(own) for member in members):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def runs(self) -> dict[str, str]:
        """The MLflow runs of the members, by name; nothing where training has not begun yet."""
        return {name: run_id for name, run_id in self.folder.members.items() if run_id is not None}

    def begin(self, trainer: L.Trainer, runs: Mapping[str, str | None]) -> Path | None:
        """Claim the folder, where a trainer writes checkpoints at all; on rank zero.

        Args:
            trainer: Has a :class:`~hedgelab.training.checkpoints.RunCheckpoint`; without one nothing is written.
            runs: The MLflow runs of the members, by name.

        Returns:
            The checkpoint to go on from; None to start from the beginning.

        Raises:
            UserError: Another process trains the same SAEs right now, and goes on doing so; or has just done it.
        """
        if _checkpoint_of(trainer) is None:
            return None
        if self.folder.claim(_PATIENCE) and not self.folder.about:
            self.folder.release()
            raise UserError(f"another process has just trained {', '.join(self.members)}; run the same command again")
        self.folder.note(group=self.members, members=dict(runs))
        return newest_whole(self.folder.path, lambda line: _logger.warning("%s", line))

    def use(self, trainer: L.Trainer) -> None:
        """Let a trainer write its checkpoints here; on every rank."""
        callback = _checkpoint_of(trainer)
        if callback is not None:
            callback.folder, callback.dirpath = self.folder, str(self.folder.path)

    def end(self) -> None:
        """Training has ended well, and what came of it is kept elsewhere."""
        self.folder.release()
        shutil.rmtree(self.folder.path, ignore_errors=True)


def _checkpoint_of(trainer: L.Trainer) -> RunCheckpoint | None:
    return next((found for found in trainer.checkpoint_callbacks if isinstance(found, RunCheckpoint)), None)
