"""``--resume``: which run ``fit`` and ``hedge`` go on with, and from which checkpoint."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

import hedgelab.version
from hedgelab.cli.lightning import HedgelabCLI
from hedgelab.config.tree import Tree, config_files, options_of
from hedgelab.errors import UserError
from hedgelab.identity import deciding
from hedgelab.protocols.ranks import say
from hedgelab.protocols.training_phases import start_time_limit_anew, was_cut
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.store import runs_dir, tracking_uri
from hedgelab.training.checkpoints import RunCheckpoint, RunFolder, newest_whole
from hedgelab.training.checkpoints.files import write_atomically
from hedgelab.training.checkpoints.folder import Match, as_option, compare, dotted, known_runs, named, show, written_keys

HELP = (
    "Go on with the newest unfinished run of this very config (kept in run.json beside the checkpoints, "
    "runs/checkpoints/<run id>/), in the same MLflow run, from its last whole checkpoint: the result is that of a run never "
    "stopped. Starts afresh, and says so, where there is none; does nothing where that run has finished: so a job that may "
    "be requeued always passes it. Keys that nobody wrote stay what they were when the run was begun, whatever a newer "
    "release has for defaults. --resume=ID takes the run of that id. --ckpt_path=last means the same."
)
_MOST_SHOWN = 3
_RELEASE = "hedgelab"
_OF_THIS_START = {"config", "ckpt_path", "resume", "retrain"}


class ResumableCLI(HedgelabCLI):
    """The commands that can go on with an earlier run: ``folder`` is that run's, None for a new one.

    ``resume`` is the id of the run to go on with, or whether to look for one, which is no part of the config.
    """

    resume: bool | str
    folder: RunFolder | None = None
    _same_experiment = True
    _callback: RunCheckpoint | None = None

    def __init__(self, command: str, words: list[str]) -> None:
        super().__init__(command, with_stored_config(words))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of every command, and ``--resume``."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--resume", type=bool | str, default=False, help=HELP)

    def parse(self, words: Sequence[str]) -> Tree:
        """Parse words, and keep apart which run to go on with."""
        tree = super().parse(words)
        self.resume, self.section.resume = self.section.resume, False
        if self.section.get("ckpt_path") == "last":
            self.resume, self.section.ckpt_path = self.resume or True, None
        return tree

    def before_instantiate_classes(self) -> None:
        """Find the run to go on with, if the user wants that."""
        if self.resume:
            self._find(self.resume)
        super().before_instantiate_classes()

    def instantiate_classes(self) -> None:
        """Make data, model and trainer, and let the trainer go on with the run that was found, from its newest checkpoint."""
        super().instantiate_classes()
        kept = (found for found in self.trainer.checkpoint_callbacks if isinstance(found, RunCheckpoint))
        self._callback = next(kept, None)
        if self._callback is not None:
            self._callback.facts, self._callback.folder = self.facts, self.folder
        if self.folder is None:
            return
        if self._callback is not None:
            self._callback.dirpath = str(self.folder.path)
        for logger in self.trainer.loggers:
            if isinstance(logger, MLflowTracker) and self.folder.run_id is not None:
                logger.go_on_with(self.folder.run_id)
        start_time_limit_anew(self.trainer)
        checkpoint = newest_whole(self.folder.path)
        start = f"from {checkpoint or 'its beginning'}" if self.command == "fit" else "with its unfinished phases"
        say(f"resume: run {self.folder.path.name} goes on {start}")
        if checkpoint is not None:
            self.config_init[self.command].ckpt_path = str(checkpoint)

    def after_fit(self) -> None:
        """Note that the run is over, or has been cut by ``max_time``."""
        self.finish(was_cut(self.trainer))

    def facts(self) -> dict[str, Any]:
        """What the run's folder says about it."""
        config = {key: value for key, value in self.resolved().items() if key not in _OF_THIS_START}
        config = json.loads(json.dumps(config, default=str))  # as the file gives it back
        written = {key: value for key, value in self.written.items() if key not in _OF_THIS_START}
        decided = deciding(config)
        return {
            "command": self.command, "name": config["name"], _RELEASE: hedgelab.version.__version__, "config": config,
            "written": sorted({*written_keys(written, config), *(["name"] if config["name"] else [])}),
            "code": decided["code"], "inputs": decided["inputs"],
        }  # fmt: skip

    def _find(self, wanted: bool | str) -> None:
        """Find the run of an id, or (``True``) the newest of this config, and claim it; where it has finished, leave."""
        if self.section.get("ckpt_path") is not None:
            raise UserError("resume: goes on from the run's own checkpoint; give either it or ckpt_path")
        if self.section.trainer.enable_checkpointing is False:
            raise UserError("resume: needs checkpoints, which trainer.enable_checkpointing=false switches off")
        now = self.facts()
        loggers = now["config"]["trainer"]["logger"]
        sections = [one for one in (loggers if isinstance(loggers, list) else [loggers]) if isinstance(one, dict)]
        tracker = next((one for one in sections if one["class_path"].endswith("MLflowTracker")), None)
        if self.command == "hedge" and tracker is None:
            raise UserError("resume: hedge finds its phases in the tracking store; list MLflowTracker in trainer.logger")
        root = _checkpoints_root(now["config"], tracker)
        match = _named(root, wanted, now) if isinstance(wanted, str) else _newest(root, now)
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

    def _keep_defaults(self, run: str, match: Match) -> None:
        """Go on with the defaults that a run was begun with."""
        changed = [f"{dotted(key)}={show(then)} (now {show(now)})" for key, (then, now) in match.defaults.items()]
        was = f"{run} was begun with other defaults: {', '.join(changed)}"
        options = [as_option(key, then, now) for key, (then, now) in match.defaults.items()]
        try:
            if None in options:
                raise UserError("names a class")
            self.parse([*self.words, *(option for option in options if option is not None)])
        except UserError as error:
            release = match.folder.about.get(_RELEASE, "of then")
            hint = f"write into the config what you want, go on with hedgelab {release}, or leave out --resume to train anew"
            raise UserError(f"{was}, with which this release does not go on ({error}): {hint}") from error
        say(f"{was}; it goes on with them (write today's into the config to train anew)")

    def begin(self, tracker: MLflowTracker | None, decides: Mapping[str, Any]) -> Mapping[str, Any]:
        """Note that a run of several fits has begun, in a folder of its own, and say by what its phases are known.

        That is what decides their numbers, as the release said it with which the run was begun.
        """
        outcome = {**decides, _RELEASE: hedgelab.version.__version__}
        if self.folder is not None and self._same_experiment:
            outcome = self.folder.about.get("outcome") or outcome
        if tracker is not None and self.trainer.is_global_zero:
            if self.folder is None:
                self.folder = RunFolder(Path(tracker.save_dir) / "checkpoints" / str(tracker.run_id))
                self.folder.claim()
            self.folder.note(**self.facts(), outcome=outcome, run_id=tracker.run_id, finished=False)
        return {key: value for key, value in outcome.items() if (key, value) != (_RELEASE, hedgelab.version.__version__)}

    @rank_zero_only
    def finish(self, cut: bool = False) -> None:
        """Note that the run is over, or has been cut by ``max_time``, and goes on at the next ``--resume``."""
        folder = self.folder or (None if self._callback is None else self._callback.folder)
        if folder is not None:
            folder.note(finished=not cut, cut=cut)
            folder.release()


def _named(root: Path, run_id: str, now: Mapping[str, Any]) -> Match:
    """The run that the user names, whatever differs."""
    folder = named(root, run_id)
    command = folder.about.get("command", now["command"])
    if command != now["command"]:
        raise UserError(f"resume: run {folder.path.name} is one of `hedgelab {command}`, not of {now['command']}")
    if not isinstance(folder.about.get("config"), dict):
        return Match(folder)
    match = compare(folder, now)
    for conflict in match.conflicts:
        say(f"resume: run {folder.path.name} differs in {conflict}")
    return match


def _newest(root: Path, now: Mapping[str, Any]) -> Match | None:
    """The newest run of the same experiment, of the very config first; None, with a line that says so, where there is none."""
    matches = [
        compare(folder, now) for folder in known_runs(root)
        if (about := folder.about).get("command") == now["command"] and isinstance(about.get("config"), dict)
    ]  # fmt: skip
    matches.sort(key=lambda one: (len(one.conflicts), bool(one.defaults or one.more_steps)))
    if matches and not matches[0].conflicts:
        return matches[0]
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
    stored = folder.path / "resumed.json"
    write_atomically(stored, lambda file: file.write(json.dumps(config, indent=1).encode()))
    return ["--config", str(stored), *words]


def _checkpoints_root(config: Mapping[str, Any], tracker: Any) -> Path:
    """Where runs of a config keep their checkpoints: beside the store, or below the trainer's folder where none is kept."""
    if folder := config["checkpoint"]["dirpath"]:
        return Path(folder)
    if tracker is None:
        return Path(config["trainer"]["default_root_dir"] or Path.cwd()) / "runs" / "checkpoints"
    return runs_dir((tracker.get("init_args") or {}).get("uri") or tracking_uri()) / "checkpoints"
