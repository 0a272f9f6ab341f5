"""``--resume``: which run a command goes on with, and from which checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

import hedgelab
from hedgelab.config.plain_yaml import write_yaml
from hedgelab.config.tree import config_files, options_of
from hedgelab.errors import UserError
from hedgelab.identity import decides, deciding, stable_id, without_watchers
from hedgelab.protocols.training_phases import start_time_limit_anew
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.store import runs_dir, tracking_uri
from hedgelab.training.checkpoints import RunCheckpoint, RunFolder, newest_whole
from hedgelab.training.checkpoints.files import write_atomically
from hedgelab.training.checkpoints.folder import is_finished, known_runs, named
from hedgelab.training.checkpoints.matching import (
    Comparison,
    Difference,
    Key,
    at,
    can_be_taken_over,
    compare,
    plain,
    replaced,
    show,
    without,
    written_keys,
)

_logger = logging.getLogger(__name__)
_MOST_SHOWN = 3
_RELEASE = "hedgelab"
_OF_THIS_START = {"config", "ckpt_path", "resume", "retrain"}
_STORED = "config.yaml"


class Command(Protocol):
    """What a resumption asks of the command line."""

    @property
    def command(self) -> str:
        """Its first word."""

    @property
    def written(self) -> Mapping[str, Any]:
        """What of the config the user wrote."""

    def resolved(self) -> dict[str, Any]:
        """The whole config as plain values."""

    def reread(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A resolved config with what it lacks filled in by defaults."""

    def adopt(self, sections: Mapping[str, Any]) -> None:
        """Put other values in the place of the config's own."""


class Resumption:
    """What a command goes on with.

    Args:
        cli: The command line.

    Attributes:
        folder: The run gone on with; None for a new run.
    """

    def __init__(self, cli: Command) -> None:
        self._cli = cli
        self.folder: RunFolder | None = None
        self._same_experiment = True
        self._outcome: dict[str, Any] = {}
        self._callback: RunCheckpoint | None = None

    @property
    def command(self) -> str:
        """The command."""
        return self._cli.command

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The whole config, but for what concerns this start alone."""
        return plain({key: value for key, value in self._cli.resolved().items() if key not in _OF_THIS_START})

    @cached_property
    def _written(self) -> list[str]:
        """Keys that make the run another one than it would be by default: those that were written, and its name."""
        written = {key: value for key, value in self._cli.written.items() if key not in _OF_THIS_START}
        named = {"name": self._config["name"]} if self._config.get("name") else {}
        return written_keys({**written, **named}, self._config)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return deciding(self._config)

    def facts(self) -> dict[str, Any]:
        """What the run's folder says about it."""
        name = self._config.get("name")
        return {
            "identity": stable_id({"command": self.command, "name": name, **self._facts}), "command": self.command,
            "name": name, _RELEASE: hedgelab.__version__, "config": self._config, "written": self._written,
            "code": self._facts["code"], "inputs": self._facts["inputs"],
        }  # fmt: skip

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
        if self.command == "hedge" and not tracked(config.trainer.logger):
            raise UserError(
                "resume: hedge finds its phases in the tracking store; list an MLflowTracker in trainer.logger"
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
        chosen = self._named(root, wanted) if isinstance(wanted, str) else self._same(root)
        if chosen is None:
            return
        folder, found = chosen
        if is_finished(folder) and not self._goes_further(folder):
            ended = "".join(f" (with {one.name}={show(one.then)}, then the default)" for one in found.changed)
            say(
                f"resume: run {folder.path.name} has finished{ended}; nothing is left to do (leave out --resume to train "
                "again)"
            )
            raise SystemExit(0)
        if self._goes_further(folder):
            then, now = (at(one, ("trainer", "max_steps")) for one in (folder.about["config"], self._config))
            say(f"resume: run {folder.path.name} was begun with trainer.max_steps={then}; now it is {now}")
        for path in found.other_code:
            say(f"resume: run {folder.path.name} was begun with other code of {path}; it goes on with today's")
        self._take_over(folder, found.changed)
        self._same_experiment = not found.conflicts
        if getattr(rank_zero_only, "rank", 0) == 0:
            folder.claim()
        self.folder = folder

    def _named(self, root: Path, run_id: str) -> tuple[RunFolder, Comparison]:
        """The run that the user names: its config, with what the user has written now laid over it."""
        folder = named(root, run_id)
        if (command := folder.about.get("command", self.command)) != self.command:
            raise UserError(f"resume: run {folder.path.name} is one of `hedgelab {command}`, not of {self.command}")
        found = self._compared(folder)
        for one in found.conflicts:
            say(f"resume: run {folder.path.name} was begun with {one.name}={show(one.then)}; now it is {show(one.now)}")
        return folder, found

    def _same(self, root: Path) -> tuple[RunFolder, Comparison] | None:
        """The newest run of the same experiment: of the very config, else of one that gives the same numbers."""
        wanted = self.facts()["identity"]
        runs = [folder for folder in known_runs(root) if folder.about.get("command") in (None, self.command)]
        for folder in runs:
            if folder.about.get("identity") == wanted:
                return folder, Comparison([], [])
        nearest: tuple[RunFolder, Sequence[Difference]] | None = None
        for folder in runs:
            if not isinstance(folder.about.get("config"), dict):  # written before configs were kept
                continue
            found = self._compared(folder)
            conflicts = list(found.conflicts)
            if is_finished(folder) and not self._goes_further(folder):
                conflicts += [Difference(("code of", path), "another", "today's") for path in found.other_code]
            if not conflicts:
                return folder, found
            if nearest is None or len(conflicts) < len(nearest[1]):
                nearest = folder, conflicts
        hint = ""
        if nearest is not None and len(nearest[1]) <= _MOST_SHOWN:
            hint = f" (run {nearest[0].path.name} differs in {', '.join(one.shown for one in nearest[1])})"
        say(f"resume: no earlier run of this config in {root}{hint}; starting afresh")
        return None

    def _compared(self, folder: RunFolder) -> Comparison:
        """What separates the config of a run from today's, of all that decides numbers."""
        about = folder.about
        then, written = about.get("config"), about.get("written")
        if not isinstance(then, dict) or not isinstance(written, list):
            return Comparison([], [])
        now = self._config
        found = compare(
            without_watchers(then), [str(key) for key in written], without_watchers(now), self._written, self._is_default,
            lambda key: key == ("name",) or decides(now, key),
        )  # fmt: skip
        steps = [one for one in found.conflicts if one.key == ("trainer", "max_steps")]
        further = self._goes_further(folder)
        conflicts = [one for one in found.conflicts if not (further and one in steps)]
        inputs = about.get("inputs")
        if isinstance(inputs, dict):
            today = self._facts["inputs"]
            conflicts += [
                Difference(("content of", key), inputs[key], today[key])
                for key in sorted(inputs.keys() & today.keys())
                if inputs[key] != today[key]
            ]
        code: Any = about.get("code")
        code = code if isinstance(code, dict) else {}
        other = [
            path for path, digest in self._facts["code"].items() if path in code and not _same_code(code[path], digest)
        ]
        return Comparison(conflicts, found.changed, other)

    def _goes_further(self, folder: RunFolder) -> bool:
        """Whether a fit is to have more steps than it had: it goes on to its new end."""
        now, then = (at(config, ("trainer", "max_steps")) for config in (self._config, folder.about.get("config")))
        return self.command == "fit" and isinstance(now, int) and isinstance(then, int) and 0 <= then < now

    def _is_default(self, key: Key) -> bool:
        """Whether a key has the value that it would have had without being written."""
        try:
            return plain({"": at(self._cli.reread(without(self._config, key)), key)}) == plain(
                {"": at(self._config, key)}
            )
        except UserError:  # it must be written
            return False

    def _take_over(self, folder: RunFolder, changed: Sequence[Difference]) -> None:
        """Go on with the defaults that a run was begun with.

        Raises:
            UserError: One that cannot be put in the place of today's.
        """
        if not changed:
            return
        run = f"resume: run {folder.path.name} was begun"
        for one in changed:
            if not can_be_taken_over(one):
                raise UserError(
                    f"{run} when {one.name} was {show(one.then)} by default, now {show(one.now)}: write the former into the "
                    "config to go on with it, the latter to train anew"
                )
        names = ", ".join(f"{one.name}={show(one.then)}" for one in changed)
        try:
            self._cli.adopt(replaced(self._config, changed))
        except UserError as error:
            raise UserError(
                f"{run} with {names}, the default then, which this release refuses: go on with hedgelab "
                f"{folder.about.get(_RELEASE, 'of then')}, or leave out --resume to train anew"
            ) from error
        del self._config, self._facts
        for one in changed:
            say(
                f"{run} when {one.name} was {show(one.then)} by default, now {show(one.now)}: it goes on with "
                f"{show(one.then)} (write {one.name}: {show(one.now)} into the config to train anew with that)"
            )

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
        start_time_limit_anew(trainer)
        checkpoint = newest_whole(self.folder.path, lambda line: _logger.warning("resume: %s", line))
        start = "with its unfinished phases" if self.command == "hedge" else f"from {checkpoint or 'its beginning'}"
        say(f"resume: run {self.folder.path.name} goes on {start}")
        return None if checkpoint is None else str(checkpoint)

    def outcome(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """By what the phases of a run are known: as the release said it with which the run was begun.

        Args:
            config: What of today's config determines the outcome of training.
        """
        today = plain({**config, _RELEASE: hedgelab.__version__})
        then = None if self.folder is None or not self._same_experiment else self.folder.about.get("outcome")
        self._outcome = then if isinstance(then, dict) else today
        if self._outcome == today:
            return config
        return {key: value for key, value in self._outcome.items() if (key, value) != (_RELEASE, hedgelab.__version__)}

    def begin(self, trainer: L.Trainer) -> None:
        """Note that a run of several fits has begun, in a folder of its own."""
        tracker = next((logger for logger in trainer.loggers if isinstance(logger, MLflowTracker)), None)
        if tracker is None or not trainer.is_global_zero:
            return
        if self.folder is None:
            self.folder = RunFolder(Path(tracker.save_dir) / "checkpoints" / str(tracker.run_id))
            self.folder.claim()
        self.folder.note(**self.facts(), outcome=self._outcome, run_id=tracker.run_id, finished=False)

    @rank_zero_only
    def finish(self, cut: bool = False) -> None:
        """Note that the run is over, or has been cut by ``max_time``, and goes on at the next ``--resume``."""
        folder = self.folder or (None if self._callback is None else self._callback.folder)
        if folder is not None:
            folder.note(finished=not cut, cut=cut)
            folder.release()


def _same_code(then: Any, now: str) -> bool:
    """Whether code is the same, or hedgelab's own, of any release: runs go on across releases."""
    return then == now or (str(then).startswith("hedgelab ") and now.startswith("hedgelab "))


def tracked(logger: Any) -> bool:
    """Whether an :class:`MLflowTracker` is among the loggers of a config."""
    return tracker_section(logger) is not None


def tracker_section(logger: Any) -> Any:
    """The section of the :class:`MLflowTracker` among the loggers of a config; None where there is none."""
    sections = logger if isinstance(logger, list) else [logger]
    return next(
        (one for one in sections if hasattr(one, "get") and str(one.get("class_path")).endswith("MLflowTracker")), None
    )


def checkpoints_root(config: Mapping[str, Any]) -> Path:
    """Where runs of a config keep their checkpoints: beside the store, or below the trainer's folder where none is kept."""
    trainer, checkpoint = config.get("trainer") or {}, config.get("checkpoint") or {}
    if checkpoint.get("dirpath"):
        return Path(checkpoint["dirpath"])
    section = tracker_section(trainer.get("logger"))
    if section is None:
        return Path(trainer.get("default_root_dir") or Path.cwd()) / "runs" / "checkpoints"
    return runs_dir((section.get("init_args") or {}).get("uri") or tracking_uri()) / "checkpoints"


def with_stored_config(words: list[str]) -> list[str]:
    """The words of ``--resume=ID`` without a config file, over the config that the run of that id has left.

    Raises:
        UserError: There is no such run, or it left none.
    """
    wanted = dict(options_of(words)).get("resume")
    if not wanted or wanted in ("true", "false") or config_files(words):
        return words
    folder = named(runs_dir(tracking_uri()) / "checkpoints", wanted)
    config = folder.about.get("config")
    if not isinstance(config, dict):
        raise UserError(f"resume: run {folder.path.name} has left no config; give it by --config")
    write_atomically(folder.path / _STORED, lambda file: file.write(write_yaml(config).encode()))
    return ["--config", str(folder.path / _STORED), *words]


def bare_flag(words: list[str]) -> list[str]:
    """The words with ``--resume`` or ``--retrain`` alone written out, as flags that may also have a value need it."""
    following = [*words, "--"][1:]
    return [
        f"{word}=true" if word in ("--resume", "--retrain") and after.startswith("-") else word
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
