"""The stock LightningCLI, set up for SAEs: defaults, links, the run's name, its saved config."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import yaml
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from omegaconf.errors import OmegaConfBaseException

import hedgelab.data.llm
import hedgelab.data.planting
import hedgelab.data.tensors
import hedgelab.data.toy
import hedgelab.saes  # noqa: F401
from hedgelab.cli.errors import causes, user_error
from hedgelab.config.signatures import Parameter
from hedgelab.config.tree import Tree, compose, config_files, opening_comment, with_bare_flags
from hedgelab.config.walk import Walk, explain_construction, explain_parsing
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError, one_line, stop_at_once
from hedgelab.protocols.training_phases import was_cut
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker, RunRecord, StepProgressBar
from hedgelab.tracking.folders import check_folders
from hedgelab.tracking.params import searchable
from hedgelab.training.checkpoints import RunCheckpoint
from hedgelab.training.checkpoints.peers import lost, watch
from hedgelab.training.flags import accelerator
from hedgelab.training.guard import FiniteGuard

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${…} across config files
CALLBACKS = {"guard": FiniteGuard, "record": RunRecord, "progress": StepProgressBar, "checkpoint": RunCheckpoint}
SWITCHES = {"progress": "enable_progress_bar", "checkpoint": "enable_checkpointing"}
TRACKER = "hedgelab.tracking.MLflowTracker"
TYPES = {
    "model": SAE, "data": ActivationDataModule, "trainer": L.Trainer, "seed_everything": bool | int, "name": str | None,
    "experiment": str | None, "ckpt_path": str | None, "resume": bool | str, "retrain": bool, **CALLBACKS,
}  # fmt: skip
SUMMARY = ("loss", "mse", "explained_variance", "l0", "dead_latents", "mcc")
EXPECTED_WARNINGS = (
    ".*LeafSpec.*",  # Lightning meets a newer torch
    "Using ModelCheckpoint with manual optimization",  # saved between steps
    "The dirpath has changed",  # every run has a folder of its own
    "The `srun` command is available",  # not every node runs its jobs
    "`max_epochs` was not set",  # the DataModule says it better
    "It is recommended to use `self.log",  # ranks have agreed on every number
)
LARGEST = 2**63 - 1
BOUNDS = {
    "seed_everything": (0, 2**32 - 1), "trainer.num_nodes": (1, 100_000), "trainer.log_every_n_steps": (0, LARGEST),
    "trainer.check_val_every_n_epoch": (1, LARGEST),
}  # fmt: skip
TRAINER_DEFAULTS = {
    "logger": {"class_path": TRACKER}, "devices": 1, "log_every_n_steps": 100, "num_sanity_val_steps": 0,
    "use_distributed_sampler": False, "enable_model_summary": False, "enable_progress_bar": True,
}  # fmt: skip
CHECKPOINT_DEFAULTS = {"checkpoint.save_last": True, "checkpoint.save_top_k": 0, "checkpoint.every_n_train_steps": 1000}
C = TypeVar("C", bound="HedgelabCLI")


class ConfigRecord(SaveConfigCallback):
    """Puts the resolved config into the run (``config.yaml``, flat parameters, a hash), and beside the checkpoints."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Called once, on rank zero."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker):
                logger.log_config(text)
                logger.log_hyperparams(searchable(yaml.safe_load(text)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called on every rank when the folder of checkpoints is there."""
        text = self.parser.dump(self.config, skip_none=False)
        for one in trainer.checkpoint_callbacks if trainer.is_global_zero else ():
            if isinstance(one, RunCheckpoint) and one.folder is not None and one.folder.path.is_dir():
                one.folder.write("config.yaml", text, "the tracked run has it, too")


class HedgelabCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` of any SAE on any activations."""

    trainer_type: type[L.Trainer] = L.Trainer  # its methods are the commands
    types: Mapping[str, Any] = TYPES  # what may stand at the top of a config
    written: Tree  # what the user wrote of it
    walk: Walk  # over that, for explaining mistakes

    def __init__(self, command: str, words: list[str]) -> None:
        self.command, self.words = command, with_bare_flags(words, ["resume", "retrain"])
        parser: dict[str, Any] = {"parser_mode": "omegaconf+", "allow_abbrev": False, "exit_on_error": False}
        super().__init__(
            model_class=SAE, datamodule_class=ActivationDataModule, trainer_class=self.trainer_type,
            save_config_callback=ConfigRecord, save_config_kwargs={"save_to_log_dir": False}, trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0, parser_kwargs={"prog": "hedgelab", **parser, command: parser},
            subclass_mode_model=True, subclass_mode_data=True, auto_configure_optimizers=False, args=[command, *self.words],
        )  # fmt: skip

    @property
    def section(self) -> Namespace:
        """The config of the command."""
        section: Namespace = self.config[self.command]
        return section

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one subcommand that was asked for: each costs a parser of some hundred options."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name and experiment of the run, the callbacks that every run has, and the link from data to model."""
        parser.add_argument("--name", type=str | None, help="Name of the run; the config file's by default.")
        parser.add_argument("--experiment", type=str | None, help="MLflow experiment that the run belongs to.")
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults(CHECKPOINT_DEFAULTS)
        parser.link_arguments("data.d_in", "model.init_args.d_in", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what the user wrote."""
        self.written = self.parse(self.words)

    def parse(self, words: Sequence[str]) -> Tree:
        """Parse words, and give them as a tree; what is refused is explained in one line with its full key."""
        tree = compose([*words], {"trainer": {"logger": {"class_path": TRACKER}}})
        names = {**vars(self._parser(self.command).get_defaults()), "model": None, "data": None}
        parameters = {name: Parameter(self.types.get(name, Any), name in ("model", "data")) for name in names}
        self.walk = Walk(tree, parameters, frozenset({"model.d_in"}))
        try:
            self.config = self.parser.parse_args([self.command, *words])
        except (ArgumentError, OmegaConfBaseException) as error:
            raise UserError(explain_parsing(error, tree, self.walk)) from error
        if self.walk.impossible:
            raise UserError(self.walk.impossible[0])
        trainer = {f"trainer.{key}": value for key, value in vars(self.section.trainer).items()}
        for key, value in {**trainer, "seed_everything": self.section.seed_everything}.items():
            least, most = BOUNDS.get(key, (-LARGEST, LARGEST))  # Lightning takes these, and stumbles over them later
            if isinstance(value, (int, float)) and not least <= value <= most:
                raise UserError(f"{key}: must be from {least} to {most}, got {value}")
        check_folders(self.section.as_dict(), words)
        self.section.name = self.section.name or "+".join(file.stem for file in config_files([*words])) or None
        return tree

    def text(self) -> str:
        """The whole config."""
        text: str = self._parser(self.command).dump(self.section, skip_none=False)
        return text

    def resolved(self) -> dict[str, Any]:
        """The same as plain values."""
        values: dict[str, Any] = yaml.safe_load(self.text())
        values.pop("config", None)
        return values

    def before_instantiate_classes(self) -> None:
        """Check the checkpoint, name the run, and leave out what the trainer is told to do without."""
        config = self.section
        path = config.get("ckpt_path")
        if path is None and self.command in ("validate", "test"):
            raise UserError(f"ckpt_path: {self.command} measures a trained SAE: give --ckpt_path .../last.ckpt")
        if path is not None and not Path(path).exists():
            raise UserError(f"ckpt_path: no such file '{path}'; checkpoints are kept under runs/checkpoints/<run id>/")
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        trackers = [one.init_args for one in loggers if isinstance(one, Namespace) and one.class_path == TRACKER]
        if config.experiment is not None and not trackers:
            raise UserError("experiment: is MLflow's, and trainer.logger has no MLflowTracker; remove it, or add one")
        for arguments in trackers:
            arguments.run_name = arguments.run_name or config.name
            arguments.experiment = config.experiment or arguments.experiment
            arguments.description = arguments.description or opening_comment(config_files(self.words))
        if config.checkpoint.train_time_interval is not None:
            config.checkpoint.every_n_train_steps = None  # Lightning takes one of them, and this one has a default
        for callback, switch in SWITCHES.items():
            if config.trainer[switch] is False:
                self._parser(self.command).callback_keys.remove(callback)

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; what a class finds impossible is told with the full key."""
        try:
            super().instantiate_classes()
        except Exception as error:
            raise UserError(explain_construction(user_error(error) or list(causes(error))[-1], self.walk)) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would read a whole checkpoint here for hyper-parameters that hedgelab's never hold."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the trainer; Lightning says most impossible values with a ValueError."""
        settings = self.config_init[self.command].trainer
        kwargs["accelerator"] = accelerator(settings.accelerator)
        plugins = settings.plugins if isinstance(settings.plugins, list) else [settings.plugins]
        chosen = TorchElasticEnvironment.detect() or any(isinstance(one, ClusterEnvironment) for one in plugins)
        if SLURMEnvironment.detect() and not chosen:  # Lightning's own handler of SIGUSR1 saves in the middle of a step
            kwargs["plugins"] = [*filter(None, plugins), SLURMEnvironment(auto_requeue=False)]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, ArithmeticError, MemoryError, MisconfigurationException) as error:
            raise UserError(f"trainer: {one_line(str(error)) or type(error).__name__}") from error


def run_cli(cli: type[C], command: str, words: list[str]) -> C:
    """Run a command of a CLI, quiet about what is by design."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
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


def summary(trainer: L.Trainer) -> str:
    """Name of the run, its key numbers, and where the rest is."""
    logger = trainer.logger
    run = f"run {logger.version}" if logger is not None else "untracked run"
    cut = f" of {trainer.max_steps}, cut by max_time; go on with --resume" if was_cut(trainer) else ""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    shown = [name for last in SUMMARY for name in metrics if name.rsplit("/", 1)[-1] == last]
    width = max(map(len, shown), default=0)
    lines = [f"{run}: {trainer.global_step} steps{cut}", *(f"  {name:<{width}}  {metrics[name]:.4g}" for name in shown)]
    if checkpoint := getattr(trainer.checkpoint_callback, "last_model_path", ""):
        lines.append(f"checkpoint: {checkpoint}")
    if logger is not None:
        lines.append("look at it: hedgelab ui    compare: hedgelab runs")
    return "\n".join(lines)
