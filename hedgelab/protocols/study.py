"""A study is a class: its signature is its config, ``run`` does the work, and one runner does all the rest.

The runner (``hedgelab.cli.studies``) reads the config, opens the MLflow run, logs what ``run`` returns, and ends the run
whatever happens. A study of another package is a command too: by its class path (``hedgelab my_package.MyStudy --config F``),
or by a name that the package registers as an entry point of the group ``hedgelab.studies``.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from matplotlib.figure import Figure
from tqdm import tqdm

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError
from hedgelab.protocols.recipe import Recipe
from hedgelab.saes import SAE
from hedgelab.saes.ensemble import EnsembleSAE
from hedgelab.tracking import MLflowTracker

Row = Mapping[str, Any]
"""A line of a table: values by column."""


class Part(NamedTuple):
    """What becomes a child run of a study's run: its name, its parameters and its metrics."""

    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """What a study found.

    Attributes:
        metrics: Numbers, logged as MLflow metrics.
        tables: Rows by file name, such as ``table.csv``; all rows of a table have the same columns.
        figures: Figures by file name below ``figures/``, such as ``hedging.png``.
        headline: Lines for the terminal; the first follows the run's id.
        parts: Child runs.
        step: Optimiser steps after which the metrics hold.
        texts: Other files by name.
        failure: Why all that says nothing: the run keeps it and has failed.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    headline: Sequence[str] = ()
    parts: Sequence[Part] = ()
    step: int = 0
    texts: Mapping[str, str] = field(default_factory=dict)
    failure: str | None = None


class Bench:
    """What a study works with: a seed, SAEs, training, a progress bar, and the run that takes what it finds.

    ``Bench()`` needs no tracking store, so a study runs in a notebook too: ``Phase(...).run(Bench()).metrics``.

    Args:
        seed: Seed of the study (``seed_everything``).
        tracker: The study's run; None tracks nothing.
    """

    def __init__(self, seed: int = 0, tracker: MLflowTracker | None = None) -> None:
        self.seed, self.tracker = seed, tracker
        self.seconds = 0.0
        """What :meth:`train` has taken so far."""
        self._bar = tqdm(disable=True)

    @contextmanager
    def progress(self, total: int, what: str = "Training", unit: str = "step") -> Iterator[Callable[[int], Any]]:
        """A bar on a terminal, which :meth:`train` moves on; gives the function that does so by a number of units."""
        with tqdm(total=total, desc=what, unit=unit, disable=not sys.stderr.isatty()) as self._bar:
            yield self._bar.update

    def make_sae(self, recipe: Recipe[SAE], data: ToyDataModule, seed: int = 0, **arguments: Any) -> SAE:
        """An SAE for a toy, initialised on the toy's first batch, in the dtype of its activations.

        Args:
            recipe: The SAE's section of the config.
            data: The toy.
            seed: Added to the study's seed; gives the weights.
            arguments: Arguments of the SAE that replace those of the recipe.
        """
        sae = recipe.with_weights_seed(self.seed + seed)(d_in=data.d_in, **arguments)
        first = data.batch("train", 0)
        sae = sae.to(first.x.dtype)
        sae.initialize(first, data.feature_directions)
        return sae

    def train(self, saes: Sequence[SAE], batches: Batch | Callable[[int], Batch], steps: int) -> EnsembleSAE:
        """Train copies of SAEs of one architecture side by side, on one batch or on a function from step to batch."""
        ensemble = EnsembleSAE(saes)
        start = time.perf_counter()
        ensemble.fit(batches, steps, lambda _: self._bar.update())
        self.seconds += time.perf_counter() - start
        return ensemble

    def keep(self, outcome: Outcome) -> None:
        """Log a part of what the study finds now: it is kept even where the study fails later."""
        if self.tracker is None:
            return
        if outcome.metrics:
            self.tracker.log_metrics(outcome.metrics, outcome.step)
        for file, text in {**outcome.texts, **{name: as_csv(rows) for name, rows in outcome.tables.items()}}.items():
            self.tracker.log_text(text, file)
        for file, figure in outcome.figures.items():
            self.tracker.log_figure(figure, f"figures/{file}")
        for part in tqdm(outcome.parts, "Child runs", unit="run", disable=not sys.stderr.isatty()):
            child = self.tracker.child(f"{self.tracker.run_name}/{part.name}", {})
            child.log_hyperparams(part.params)
            child.log_metrics(part.metrics, outcome.step)
            child.finalize("success")


class Study(ABC):
    """An experiment that is a command.

    A subclass has a typed ``__init__``, whose docstring (``Args:``) explains each argument, and a ``run``. Arguments of type
    :class:`~hedgelab.protocols.recipe.Recipe` are sections of the config that name a class (``data``, ``model``). An argument
    that the study cannot use is refused in ``__init__`` with a :class:`~hedgelab.errors.UserError`.

    Attributes:
        experiment: MLflow experiment of its runs, unless the config names another.
        tracked: Whether it has a run at all.
        example: A config that works, named where a required key is missing.
        takes_any_config: Whether keys that it does not know are ignored, so that it reads the configs of other commands.
        writes_to: Full keys of folders that it writes to.
    """

    experiment: ClassVar[str] = "hedgelab"
    tracked: ClassVar[bool] = True
    example: ClassVar[str] = ""
    takes_any_config: ClassVar[bool] = False
    writes_to: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def run(self, bench: Bench) -> Outcome:
        """Do the work."""


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV text: floats to seven digits, sequences as numbers between spaces.

    >>> print(as_csv([{"width": 8, "loss": 0.123456789, "levels": (1, 0.5)}]), end="")
    width,loss,levels
    8,0.1234568,1 0.5
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0] if rows else ())
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return text.getvalue()


def make_toy(
    recipe: Recipe[ActivationDataModule], key: str, population: bool = False, **arguments: Any
) -> ToyDataModule:
    """The toy of the config's section ``key``, with some arguments replaced.

    Raises:
        UserError: It is something else, or does not enumerate its population where it must.
    """
    data = recipe(**arguments)
    needed = "a ToyDataModule with sampling: population" if population else "a ToyDataModule"
    if not isinstance(data, ToyDataModule) or (population and data.batch("train", 0).weight is None):
        raise UserError(f"{key}: expected {needed}, got {type(data).__name__}")
    return data


def _cell(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return " ".join(str(_cell(one)) for one in value)
    return f"{value:.7g}" if isinstance(value, float) else value
