"""Cells of a sweep: configs of ``fit`` and ``hedge``, parsed as those commands do, and made when asked to."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from hedgelab.cli.hedge import HedgeCLI, HedgeTrainer
from hedgelab.cli.lightning import HedgelabCLI, run_cli
from hedgelab.config.tree import Tree
from hedgelab.plain_yaml import write_yaml
from hedgelab.protocols.hedge import HedgeOptions
from hedgelab.protocols.training_phases import PhaseTrainer


class FitCell(HedgelabCLI):
    """Parses a config of ``fit``; makes what it names only when asked to, and runs nothing."""

    folder: tempfile.TemporaryDirectory[str]  # where mistakes are looked up in the config; gone when the cell is
    trainer_type = HedgeTrainer
    trainer: PhaseTrainer

    def instantiate_classes(self) -> None:
        """Not yet."""

    def make(self) -> FitCell:
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
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "cell.yaml"
    file.write_text(write_yaml(tree))
    cell = run_cli(HedgeCell if command == "hedge" else FitCell, command, ["--config", str(file), *said])
    cell.folder = folder
    return cell
