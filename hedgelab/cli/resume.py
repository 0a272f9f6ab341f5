"""``--resume``: which run a command goes on with, and from which checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from hedgelab.checkpoints import RunCheckpoint, RunFolder, newest_whole
from hedgelab.checkpoints.folder import identity, runs_of
from hedgelab.errors import UserError
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.store import runs_dir, tracking_uri

_logger = logging.getLogger(__name__)
_NO_MATTER = {"config", "ckpt_path", "resume", "record", "progress"}
_NO_MATTER_OF_TRAINER = {
    "logger", "plugins", "strategy", "accelerator", "devices", "num_nodes", "profiler", "default_root_dir",
    "enable_progress_bar", "enable_model_summary", "enable_checkpointing",
}  # fmt: skip


class Resumption:
    """What a command goes on with.

    Args:
        command: The command.
        resolve: The resolved config, asked for when the run begins.

    Attributes:
        folder: The run gone on with; None for a new run.
    """

    def __init__(self, command: str, resolve: Callable[[], Mapping[str, Any]]) -> None:
        self.command, self._resolve = command, resolve
        self.folder: RunFolder | None = None
        self._callback: RunCheckpoint | None = None

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return self._resolve()

    def facts(self) -> dict[str, Any]:
        """What the run's folder says about it."""
        wanted = identity(self.command, what_matters(self._config))
        return {"identity": wanted, "command": self.command, "name": self._config.get("name")}

    def take(self, config: Namespace) -> bool | str:
        """What is asked for; taken out of the config, which stays that of the run as it was first started.

        Raises:
            UserError: A checkpoint is given as well, or checkpoints are switched off.
        """
        wanted: bool | str = config.get("resume", False)
        if config.get("ckpt_path") == "last":
            wanted, config.ckpt_path = wanted or True, None
        if not wanted:
            return False
        if config.get("ckpt_path") is not None:
            raise UserError("resume: goes on from the run's own checkpoint; give either it or ckpt_path")
        if config.trainer.enable_checkpointing is False:
            raise UserError("resume: needs checkpoints, which trainer.enable_checkpointing=false switches off")
        if self.command == "hedge" and config.trainer.logger is False:
            raise UserError(
                "resume: hedge finds its phases in the tracking store, which trainer.logger=false switches off"
            )
        config.resume = False
        return wanted

    def find(self, wanted: bool | str) -> None:
        """Find the run to go on with, and claim it.

        Args:
            wanted: ``True`` for the newest of this config, or the id of a run, or its first characters; ``False`` for none.

        Raises:
            UserError: There is no run of that id, or another process is training it.
            SystemExit: The run has finished: nothing is left to be done.
        """
        if not wanted:
            return
        root = checkpoints_root(self._config)
        of_this_config = runs_of(root, self.facts()["identity"])
        folder = named(root, wanted) if isinstance(wanted, str) else next(iter(of_this_config), None)
        if folder is None:
            say(f"resume: no earlier run of this config in {root}; starting afresh")
            return
        if folder.finished:
            say(
                f"resume: run {folder.path.name} has finished; nothing is left to do (leave out --resume to train again)"
            )
            raise SystemExit(0)
        if getattr(rank_zero_only, "rank", 0) == 0:
            folder.claim()
        self.folder = folder

    def apply(self, trainer: L.Trainer) -> str | None:
        """Let a trainer go on with the run that was found; the path of the checkpoint, None to start from the beginning."""
        self._callback = next(
            (found for found in trainer.checkpoint_callbacks if isinstance(found, RunCheckpoint)), None
        )
        if self._callback is not None:
            self._callback.facts, self._callback.folder = self.facts, self.folder
        if self.folder is None:
            return None
        if self._callback is not None:
            self._callback.dirpath = str(self.folder.path)
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker) and self.folder.run_id is not None:
                logger.go_on_with(self.folder.run_id)
        checkpoint = newest_whole(self.folder.path, lambda line: _logger.warning("resume: %s", line))
        start = "with its unfinished phases" if self.command == "hedge" else f"from {checkpoint or 'its beginning'}"
        say(f"resume: run {self.folder.path.name} goes on {start}")
        return None if checkpoint is None else str(checkpoint)

    def begin(self, trainer: L.Trainer) -> None:
        """Note that a run of several fits has begun, in a folder of its own."""
        tracker = next((logger for logger in trainer.loggers if isinstance(logger, MLflowTracker)), None)
        if tracker is None or not trainer.is_global_zero:
            return
        if self.folder is None:
            self.folder = RunFolder(Path(tracker.save_dir) / "checkpoints" / str(tracker.run_id))
            self.folder.claim()
        self.folder.note(**self.facts(), run_id=tracker.run_id, finished=False)

    def finish(self) -> None:
        """Note that the run is over."""
        folder = self.folder or (None if self._callback is None else self._callback.folder)
        if folder is not None:
            folder.note(finished=True)
            folder.release()


def what_matters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that tells experiments apart: not where they run, nor what they show on the way."""
    kept = {key: value for key, value in config.items() if key not in _NO_MATTER}
    if isinstance(kept.get("trainer"), dict):
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in _NO_MATTER_OF_TRAINER}
    if isinstance(kept.get("checkpoint"), dict):
        kept["checkpoint"] = {key: value for key, value in kept["checkpoint"].items() if key != "dirpath"}
    return kept


def checkpoints_root(config: Mapping[str, Any]) -> Path:
    """Where runs of a config keep their checkpoints."""
    trainer, checkpoint = config.get("trainer") or {}, config.get("checkpoint") or {}
    if checkpoint.get("dirpath"):
        return Path(checkpoint["dirpath"])
    logger = trainer.get("logger")
    if logger is False:
        return Path(trainer.get("default_root_dir") or Path.cwd()) / "runs" / "checkpoints"
    arguments = logger.get("init_args", {}) if isinstance(logger, dict) else {}
    return runs_dir(arguments.get("uri") or tracking_uri()) / "checkpoints"


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


def bare_flag(words: list[str]) -> list[str]:
    """The words with ``--resume`` alone written out, as a flag that may also have a value needs it."""
    following = [*words, "--"][1:]
    return [
        "--resume=true" if word == "--resume" and after.startswith("-") else word
        for word, after in zip(words, following, strict=True)
    ]


def with_slurm_left_alone(kwargs: dict[str, Any], trainer: Namespace) -> dict[str, Any]:
    """Trainer arguments that keep Lightning's own SIGUSR1 handler out: it saves in the middle of a step, and requeues."""
    if not SLURMEnvironment.detect() or TorchElasticEnvironment.detect():
        return kwargs
    plugins = trainer.get("plugins") or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if any(isinstance(plugin, SLURMEnvironment) for plugin in plugins):
        return kwargs
    return {**kwargs, "plugins": [*plugins, SLURMEnvironment(auto_requeue=False)]}


@rank_zero_only
def say(line: str) -> None:
    """Tell the user."""
    print(line, flush=True)
