"""Cells of a sweep: configs of ``fit`` and ``hedge``, parsed as those commands do, and made when asked to."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import yaml

from hedgelab.cli.hedge import HedgeCLI, HedgeTrainer
from hedgelab.cli.lightning import run_cli
from hedgelab.cli.resume import ResumableCLI
from hedgelab.config.tree import Tree
from hedgelab.protocols.hedge import HedgeOptions
from hedgelab.protocols.training_phases import PhaseTrainer


class FitCell(ResumableCLI):
    """Parses a config of ``fit``; makes what it names only when asked to, and runs nothing."""

    trainer_type = HedgeTrainer
    trainer: PhaseTrainer

    def instantiate_classes(self) -> None:
        """Not yet."""

    def make(self) -> Self:
        """Make data, model and trainer; the cell itself."""
        super().instantiate_classes()
        return self

    def _run_subcommand(self, subcommand: str) -> None:
        """Never."""

    def hedge_options(self, made: bool = True) -> HedgeOptions | None:
        """How the hedging degree is measured, as made or as parsed; None of a plain fit."""
        options: HedgeOptions | None = (self.config_init if made else self.config)[self.command].get("hedge")
        return options


class HedgeCell(FitCell, HedgeCLI):
    """The same of ``hedge``."""


def parse_cell(command: str, tree: Tree, said: Sequence[str] = ()) -> FitCell:
    """Parse one cell's config; ``said`` are options in which the user names folders to write to."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cell.yaml"
        file.write_text(yaml.safe_dump(tree, default_style='"', sort_keys=False))  # text that looks like 1e-3 is quoted
        return run_cli(HedgeCell if command == "hedge" else FitCell, command, ["--config", str(file), *said])
