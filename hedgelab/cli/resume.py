"""``--resume``: which run a command goes on with, and from which checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

import hedgelab
from hedgelab.config.tree import config_files, options_of
from hedgelab.errors import UserError
from hedgelab.identity import deciding
from hedgelab.plain_yaml import write_yaml
from hedgelab.protocols.ranks import say
from hedgelab.protocols.training_phases import start_time_limit_anew
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.store import runs_dir, tracking_uri
from hedgelab.training.checkpoints import RunCheckpoint, RunFolder, newest_whole
from hedgelab.training.checkpoints.files import write_atomically
from hedgelab.training.checkpoints.folder import (
    Match,
    as_option,
    compare,
    dotted,
    known_runs,
    named,
    show,
    written_keys,
)

if TYPE_CHECKING:
    from hedgelab.cli.lightning import HedgelabCLI

_MOST_SHOWN = 3
_RELEASE = "hedgelab"
_OF_THIS_START = {"config", "ckpt_path", "resume", "retrain"}


class Resumption:
    """What a command goes on with: the folder of a run, or None for a new one."""

    def __init__(self, cli: HedgelabCLI) -> None:
        self._cli = cli
        self.folder: RunFolder | None = None
        self._same_experiment = True
        self._callback: RunCheckpoint | None = None

    def facts(self) -> dict[str, Any]:
        """What the run's folder says about it."""
        config = _plain({key: value for key, value in self._cli.resolved().items() if key not in _OF_THIS_START})
        written = {key: value for key, value in self._cli.written.items() if key not in _OF_THIS_START}
        decided = deciding(config)
        return {
            "command": self._cli.command, "name": config["name"], _RELEASE: hedgelab.__version__, "config": config,
            "written": sorted({*written_keys(written, config), *(["name"] if config["name"] else [])}),
            "code": decided["code"], "inputs": decided["inputs"],
        }  # fmt: skip

    def find(self, wanted: bool | str) -> None:
        """Find the run of an id, or (``True``) the newest of this config, and claim it; where it has finished, leave.

        Its defaults that have changed since become those of the config.
        """
        config = self._cli.config[self._cli.command]
        if config.get("ckpt_path") is not None:
            raise UserError("resume: goes on from the run's own checkpoint; give either it or ckpt_path")
        if config.trainer.enable_checkpointing is False:
            raise UserError("resume: needs checkpoints, which trainer.enable_checkpointing=false switches off")
        if self._cli.command == "hedge" and _tracker_section(config.trainer.logger) is None:
            raise UserError(
                "resume: hedge finds its phases in the tracking store; list an MLflowTracker in trainer.logger"
            )
        now = self.facts()
        root = _checkpoints_root(now["config"])
        match = self._named(root, wanted, now) if isinstance(wanted, str) else _newest(root, now)
        if match is None:
            return
        run = f"resume: run {match.folder.path.name}"
        if match.finished:
            defaults = ", ".join(f"{dotted(key)}={show(then)}" for key, (then, _) in match.defaults.items())
            ended = f" (with {defaults}, then the default)" if defaults else ""
            say(f"{run} has finished{ended}; nothing is left to do (leave out --resume to train again)")
            raise SystemExit(0)
        if match.more_steps is not None:
            say(f"{run} was begun with trainer.max_steps={match.more_steps[0]}; now it is {match.more_steps[1]}")
        for path in match.other_code:
            say(f"{run} was begun with other code of {path}; it goes on with today's")
        if match.defaults:
            self._keep_defaults(run, match)
        self._same_experiment = not match.conflicts
        if getattr(rank_zero_only, "rank", 0) == 0:
            match.folder.claim()
        self.folder = match.folder

    def _named(self, root: Path, run_id: str, now: Mapping[str, Any]) -> Match:
        """The run that the user names, whatever differs."""
        folder = named(root, run_id)
        about, command = folder.about, self._cli.command
        if about.get("command", command) != command:
            raise UserError(f"resume: run {folder.path.name} is one of `hedgelab {about['command']}`, not of {command}")
        if not isinstance(about.get("config"), dict):
            return Match(folder)
        match = compare(folder, now)
        for conflict in match.conflicts:
            say(f"resume: run {folder.path.name} differs in {conflict}")
        return match

    def _keep_defaults(self, run: str, match: Match) -> None:
        """Go on with the defaults that a run was begun with."""
        changed = [f"{dotted(key)}={show(then)} (now {show(now)})" for key, (then, now) in match.defaults.items()]
        was = f"{run} was begun with other defaults: {', '.join(changed)}"
        options = [as_option(key, then, now) for key, (then, now) in match.defaults.items()]
        try:
            if None in options:
                raise UserError("names a class")
            self._cli.parse([option for option in options if option is not None])
        except UserError as error:
            release = match.folder.about.get(_RELEASE, "of then")
            raise UserError(
                f"{was}, with which this release does not go on ({error}): write into the config what you want, go on with "
                f"hedgelab {release}, or leave out --resume to train anew"
            ) from error
        say(f"{was}; it goes on with them (write today's into the config to train anew)")

    def apply(self, trainer: L.Trainer) -> str | None:
        """Let a trainer go on with the run that was found; the path of the checkpoint, None to start from the beginning."""
        kept = (found for found in trainer.checkpoint_callbacks if isinstance(found, RunCheckpoint))
        self._callback = next(kept, None)
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
        checkpoint = newest_whole(self.folder.path)
        phases = self._cli.command == "hedge"
        start = "with its unfinished phases" if phases else f"from {checkpoint or 'its beginning'}"
        say(f"resume: run {self.folder.path.name} goes on {start}")
        return None if checkpoint is None else str(checkpoint)

    def begin(self, trainer: L.Trainer, decides: Mapping[str, Any]) -> Mapping[str, Any]:
        """Note that a run of several fits has begun, in a folder of its own, and say by what its phases are known.

        That is what decides their numbers, as the release said it with which the run was begun.
        """
        outcome = _plain({**decides, _RELEASE: hedgelab.__version__})
        if self.folder is not None and self._same_experiment:
            outcome = self.folder.about.get("outcome") or outcome
        tracker = next((logger for logger in trainer.loggers if isinstance(logger, MLflowTracker)), None)
        if tracker is not None and trainer.is_global_zero:
            if self.folder is None:
                self.folder = RunFolder(Path(tracker.save_dir) / "checkpoints" / str(tracker.run_id))
                self.folder.claim()
            self.folder.note(**self.facts(), outcome=outcome, run_id=tracker.run_id, finished=False)
        return {key: value for key, value in outcome.items() if (key, value) != (_RELEASE, hedgelab.__version__)}

    @rank_zero_only
    def finish(self, cut: bool = False) -> None:
        """Note that the run is over, or has been cut by ``max_time``, and goes on at the next ``--resume``."""
        folder = self.folder or (None if self._callback is None else self._callback.folder)
        if folder is not None:
            folder.note(finished=not cut, cut=cut)
            folder.release()


def _newest(root: Path, now: Mapping[str, Any]) -> Match | None:
    """The newest run of the same experiment, of the very config first; None, with a line that says so, where there is none."""
    abouts = ((folder, folder.about) for folder in known_runs(root))
    of_command = (
        folder for folder, about in abouts
        if about.get("command") == now["command"] and isinstance(about.get("config"), dict)
    )  # fmt: skip
    matches = sorted((compare(folder, now) for folder in of_command), key=lambda one: len(one.conflicts))
    same = [one for one in matches if not one.conflicts]
    if same:
        return min(same, key=lambda one: bool(one.defaults or one.more_steps))
    hint = ""
    if matches and len(matches[0].conflicts) <= _MOST_SHOWN:
        hint = f" (run {matches[0].folder.path.name} differs in {', '.join(matches[0].conflicts)})"
    say(f"resume: no earlier run of this config in {root}{hint}; starting afresh")
    return None


def with_stored_config(words: list[str]) -> list[str]:
    """The words of ``--resume=ID`` without a config file, over the config that the run of that id has left."""
    wanted = dict(options_of(words)).get("resume")
    if not wanted or wanted in ("true", "false") or config_files(words):
        return words
    folder = named(runs_dir(tracking_uri()) / "checkpoints", wanted)
    config = folder.about.get("config")
    if not isinstance(config, dict):
        raise UserError(f"resume: run {folder.path.name} has left no config; give it by --config")
    stored = folder.path / "config.yaml"
    write_atomically(stored, lambda file: file.write(write_yaml(config).encode()))
    return ["--config", str(stored), *words]


def _tracker_section(logger: Any) -> Any:
    """The section of the :class:`MLflowTracker` among the loggers of a config; None where there is none."""
    sections = logger if isinstance(logger, list) else [logger]
    found = (one for one in sections if hasattr(one, "get") and str(one.get("class_path")).endswith("MLflowTracker"))
    return next(found, None)


def _checkpoints_root(config: Mapping[str, Any]) -> Path:
    """Where runs of a config keep their checkpoints: beside the store, or below the trainer's folder where none is kept."""
    if folder := config["checkpoint"]["dirpath"]:
        return Path(folder)
    section = _tracker_section(config["trainer"]["logger"])
    if section is None:
        return Path(config["trainer"]["default_root_dir"] or Path.cwd()) / "runs" / "checkpoints"
    return runs_dir((section.get("init_args") or {}).get("uri") or tracking_uri()) / "checkpoints"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON gives it back."""
    read: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return read
