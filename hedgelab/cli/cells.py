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


class ParsedCell(HedgelabCLI):
    """Parses a config; makes what it names only when asked to, and runs nothing.

    Attributes:
        folder: Where its config is, which mistakes are looked up in; gone when the cell is.
    """

    folder: tempfile.TemporaryDirectory[str]
    trainer_type = HedgeTrainer
    trainer: PhaseTrainer

    def instantiate_classes(self) -> None:
        """Not yet."""

    def make(self) -> None:
        """Make data, model and trainer."""
        super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Never."""


class FitCell(ParsedCell):
    """One cell of a sweep of fits."""

    def hedge_options(self, made: bool = True) -> HedgeOptions | None:
        """None."""
        return None


class HedgeCell(ParsedCell, HedgeCLI):
    """One cell of a sweep of hedging degrees."""

    def hedge_options(self, made: bool = True) -> HedgeOptions | None:
        """How the hedging degree is measured."""
        options: HedgeOptions = (self.config_init if made else self.config)[self.command].hedge
        return options


def parse_cell(command: str, tree: Tree, said: Sequence[str] = ()) -> FitCell | HedgeCell:
    """Parse one cell's config; ``said`` are options in which the user names folders to write to.

    Raises:
        UserError: A wrong key or value.
    """
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "cell.yaml"
    file.write_text(write_yaml(tree))
    cell = run_cli(HedgeCell if command == "hedge" else FitCell, command, ["--config", str(file), *said])
    assert isinstance(cell, FitCell | HedgeCell)
    cell.folder = folder
    return cell
