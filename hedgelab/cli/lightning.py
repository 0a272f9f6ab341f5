"""The stock LightningCLI, set up for SAEs: defaults, links, the run's name, its saved config."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from omegaconf.errors import OmegaConfBaseException

import hedgelab.data.llm
import hedgelab.data.tensors
import hedgelab.data.toy
import hedgelab.saes  # noqa: F401
from hedgelab.cli.errors import root_cause, user_error
from hedgelab.cli.fit import summary
from hedgelab.cli.resume import Resumption, bare_flag, with_slurm_left_alone, with_stored_config
from hedgelab.config.explain import explain_construction, explain_parsing, resolve, top_level
from hedgelab.config.folders import check_folders
from hedgelab.config.tree import Tree, compose, config_files, opening_comment, without_configs
from hedgelab.config.walk import Walk
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError, one_line
from hedgelab.kernels.allocator import keep_large_blocks
from hedgelab.protocols.training_phases import was_cut
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker, RunRecord, StepProgressBar
from hedgelab.tracking.params import searchable
from hedgelab.training.checkpoints import RunCheckpoint, stop_at_once, use_verified_io
from hedgelab.training.checkpoints.peers import lost, watch
from hedgelab.training.flags import accelerator
from hedgelab.training.guard import FiniteGuard

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${…} across config files
LINKED = frozenset({"model.d_in"})
CALLBACKS = {"guard": FiniteGuard, "record": RunRecord, "progress": StepProgressBar, "checkpoint": RunCheckpoint}
SWITCHES = {"progress": "enable_progress_bar", "checkpoint": "enable_checkpointing"}
TRACKER = "hedgelab.tracking.MLflowTracker"
TYPES = {
    "model": SAE,
    "data": ActivationDataModule,
    "trainer": L.Trainer,
    "seed_everything": bool | int,
    "name": str | None,
    "experiment": str | None,
    "ckpt_path": str | None,
    "resume": bool | str,
    **CALLBACKS,
}
RESUMABLE = ("fit", "hedge")
RESUME_HELP = (
    "Go on with the newest unfinished run of this very config (kept in run.json beside the checkpoints, "
    "runs/checkpoints/<run id>/), in the same MLflow run, from its last whole checkpoint: the result is that of a run never "
    "stopped. Starts afresh, and says so, where there is none; does nothing where that run has finished: so a job that may "
    "be requeued always passes it. Keys that a newer release has added or dropped do not matter where they have their "
    "defaults; where a default has changed, the run goes on with the former one, and says so. --resume=ID takes the run of "
    "that id. --ckpt_path=last means the same."
)
TRAINER_DEFAULTS = {
    "logger": {"class_path": TRACKER},
    "devices": 1,
    "log_every_n_steps": 100,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
    "enable_progress_bar": True,
}
TRAINER_BOUNDS = {
    "num_nodes": (1, 100_000),
    "log_every_n_steps": (0, 2**63 - 1),
    "check_val_every_n_epoch": (1, 2**63 - 1),
}
CHECKPOINT_DEFAULTS = {
    "checkpoint.save_last": True,
    "checkpoint.save_top_k": 0,
    "checkpoint.every_n_train_steps": 1000,
}


class OneLineParser(LightningArgumentParser):
    """Raises what it refuses as a UserError, instead of printing usage and leaving."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Refuse the command line; parsers inside parsers report to theirs."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UserError(one_line(message)) from ex


class ConfigRecord(SaveConfigCallback):
    """Puts the resolved config into the run: as ``config.yaml``, as flat parameters, as a hash."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Called once, on rank zero."""
        text = self.parser.dump(self.config, skip_none=False)
        resolved = yaml.safe_load(text)
        resolved.pop("config", None)
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker):
                logger.log_config(text)
                logger.log_hyperparams(searchable(resolved))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the config beside the checkpoints, too, whatever the logger."""
        kept = (one.folder for one in trainer.checkpoint_callbacks if isinstance(one, RunCheckpoint))
        folder = next(kept, None)
        if trainer.is_global_zero and folder is not None and folder.path.is_dir():
            (folder.path / "config.yaml").write_text(self.parser.dump(self.config, skip_none=False))


class HedgelabCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` of any SAE on any activations.

    Attributes:
        trainer_type: The trainer, whose methods are the commands.
        types: What may stand at the top of a config.
        written: What the user wrote of it.
    """

    trainer_type: type[L.Trainer] = L.Trainer
    types: Mapping[str, Any] = TYPES
    written: Tree

    def __init__(self, command: str, words: list[str]) -> None:
        self.command, self.words = command, with_stored_config(bare_flag(words))
        self.resumption = Resumption(self)
        parser: dict[str, Any] = {"parser_mode": "omegaconf+", "allow_abbrev": False}
        super().__init__(
            model_class=SAE,
            datamodule_class=ActivationDataModule,
            trainer_class=self.trainer_type,
            save_config_callback=ConfigRecord,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"prog": "hedgelab", **parser, command: parser},
            parser_class=OneLineParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=[command, *self.words],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one subcommand that was asked for: each costs a parser of some hundred options."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name and experiment of the run, the callbacks that every run has, and the link from data to model."""
        parser.add_argument("--name", type=str | None, help="Name of the run; the config file's by default.")
        parser.add_argument("--experiment", type=str | None, help="MLflow experiment that the run belongs to.")
        if self.command in RESUMABLE:
            parser.add_argument("--resume", type=bool | str, default=False, help=RESUME_HELP)
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults(CHECKPOINT_DEFAULTS)
        parser.link_arguments("data.d_in", "model.init_args.d_in", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; what is refused, or would silently be ignored, is explained in one line with its full key."""
        try:
            self.config = parser.parse_args([self.command, *self.words])
        except (UserError, OmegaConfBaseException) as error:
            raise UserError(explain_parsing(error, self.tree(), self.walk())) from error
        self.written = self.tree()
        model = self.written.get("model")
        if isinstance(model, dict) and "d_in" in (model.get("init_args") or model):
            raise UserError("model.d_in: is taken from the data (data.d_in) and cannot be set; remove it")

    def tree(self) -> Tree:
        """What the user wrote, over the classes that stand there by default."""
        return compose(self.words, {"trainer": {"logger": {"class_path": TRACKER}}})

    def resolved(self) -> dict[str, Any]:
        """The whole config as plain values."""
        values: dict[str, Any] = yaml.safe_load(
            self._parser(self.command).dump(self.config[self.command], skip_none=False)
        )
        return values

    def reread(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A resolved config with what it lacks filled in by defaults."""
        parser = self._parser(self.command)
        values: dict[str, Any] = yaml.safe_load(parser.dump(parser.parse_object(dict(config)), skip_none=False))
        return values

    def adopt(self, sections: Mapping[str, Any]) -> None:
        """Put other values in the place of the config's own."""
        parser = self._parser(self.command)
        config = parser.parse_object(dict(sections), self.config[self.command])
        check_folders(config.as_dict(), compose(without_configs(self.words)))
        self.config[self.command] = config

    def walk(self) -> Walk:
        """A walk over what the user wrote, for explaining mistakes."""
        names = vars(self._parser(self.command).get_defaults())
        return Walk(resolve(self.tree()), top_level(names, self.types), LINKED)

    def before_instantiate_classes(self) -> None:
        """Check the checkpoint, name the run, and leave out what the trainer is told to do without."""
        config = self.config[self.command]
        check_trainer(config.trainer.as_dict())
        check_folders(config.as_dict(), compose(without_configs(self.words)))
        wanted = self.resumption.take(config)
        check_checkpoint(self.command, config.get("ckpt_path"))
        config.name = config.name or "+".join(file.stem for file in config_files(self.words)) or None
        self._name_run(config)
        if config.checkpoint.train_time_interval is not None:
            config.checkpoint.every_n_train_steps = None  # Lightning takes one of them, and this one has a default
        for callback, switch in SWITCHES.items():
            if config.trainer[switch] is False:
                self._parser(self.command).callback_keys.remove(callback)
        if self.command in RESUMABLE:
            self.resumption.find(wanted)

    def _name_run(self, config: Namespace) -> None:
        """Give name, experiment and description to every MLflowTracker among the loggers.

        Raises:
            UserError: An experiment is named, and there is none.
        """
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        trackers = [one for one in loggers if isinstance(one, Namespace) and one.class_path == TRACKER]
        if config.experiment is not None and not trackers:
            raise UserError(
                "experiment: is MLflow's, and no MLflowTracker is among trainer.logger; remove it, or add one"
            )
        for arguments in (tracker.init_args for tracker in trackers):
            arguments.run_name = arguments.run_name or config.name
            arguments.experiment = config.experiment or arguments.experiment
            arguments.description = arguments.description or opening_comment(config_files(self.words))

    def _set_seed(self) -> None:
        """Seed everything, with a number that numpy takes."""
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {one_line(str(error))}") from error

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; what a class finds impossible is told with the full key."""
        walk = self.walk()
        if walk.impossible:
            raise UserError(walk.impossible[0])
        try:
            super().instantiate_classes()
        except Exception as error:
            raise UserError(explain_construction(user_error(error) or root_cause(error), walk)) from error
        if (checkpoint := self.resumption.apply(self.trainer)) is not None:
            self.config_init[self.command].ckpt_path = checkpoint

    def after_fit(self) -> None:
        """The run is over; nothing is left to go on with."""
        self.resumption.finish(was_cut(self.trainer))

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would read a whole checkpoint here for hyper-parameters that hedgelab's never hold."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the trainer; Lightning says most impossible values with a ValueError."""
        kwargs["accelerator"] = accelerator(self.config_init[self.command].trainer.accelerator)
        try:
            trainer = super().instantiate_trainer(
                **with_slurm_left_alone(kwargs, self.config_init[self.command].trainer)
            )
            use_verified_io(trainer)
            return trainer
        except (ValueError, TypeError, ArithmeticError, MemoryError, MisconfigurationException) as error:
            raise UserError(f"trainer: {one_line(str(error)) or type(error).__name__}") from error


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Find numbers that Lightning takes and stumbles over in the middle of training.

    Raises:
        UserError: There is one.
    """
    for key, value in trainer.items():
        least, most = TRAINER_BOUNDS.get(key, (-(2**63), 2**63 - 1))
        if isinstance(value, (int, float)) and not least <= value <= most:
            raise UserError(f"trainer.{key}: must be from {least} to {most}, got {value}")


def check_checkpoint(command: str, path: str | None) -> None:
    """Find out early that there is no such checkpoint.

    Raises:
        UserError: The file is not there, or none is given to measure.
    """
    if path is None:
        if command in ("validate", "test"):
            raise UserError(
                f"ckpt_path: {command} measures a trained SAE: give --ckpt_path runs/checkpoints/.../last.ckpt"
            )
    elif not Path(path).exists():
        raise UserError(f"ckpt_path: no such file '{path}'; checkpoints are kept under runs/checkpoints/<run id>/")


def run_lightning(command: str, words: list[str]) -> int:
    """Parse, make everything, run, and say how it went."""
    keep_large_blocks()
    cli = run_cli(HedgelabCLI, command, words)
    if cli.trainer.is_global_zero:
        print(summary(cli.trainer))
    return 0


def run_cli(cli: type[HedgelabCLI], command: str, words: list[str]) -> HedgelabCLI:
    """Run a command of a CLI, quiet about what is by design."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning meets a newer torch
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")  # saved between steps
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # every run has a folder of its own
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # not every node runs its jobs
    warnings.filterwarnings("ignore", message="`max_epochs` was not set")  # the DataModule says it better
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log")  # ranks have agreed on every number
    for chatty in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    watch()
    try:
        with stop_at_once():
            return cli(command, words)
    except Exception as error:
        if (line := lost(error)) is None or os.environ.get("HEDGELAB_DEBUG", "0") not in ("", "0"):
            raise
        raise SystemExit(line) from error
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning leaves in its own way
            raise KeyboardInterrupt from stop
        raise
