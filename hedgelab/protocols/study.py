"""A study is a class: its signature is its config, ``run`` does the work, and one runner does all the rest.

The runner (``hedgelab.cli.studies``) reads the config, opens the MLflow run, logs what ``run`` returns, and ends the run
whatever happens. A study of another package is a command too: by its class path (``hedgelab my_package.MyStudy --config F``),
or by a name that the package registers as an entry point of the group ``hedgelab.studies``.
"""

import csv
import io
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Outcome:
    """What a study found, or a part of it."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)  # by file; all rows have the same columns
    figures: Mapping[str, Figure] = field(default_factory=dict)  # by file, below figures/
    headline: Sequence[str] = ()  # lines for the terminal; the first follows the run's id
    step: int = 0  # optimiser steps after which the metrics hold
    texts: Mapping[str, str] = field(default_factory=dict)  # other files
    failure: str | None = None  # why all that says nothing: the run keeps it and has failed


class Bench:
    """What a study works with: a seed, SAEs, training, a progress bar, and the run that takes what it finds.

    ``Bench()`` needs no tracking store, so a study runs in a notebook too: ``Phase(...).run(Bench()).metrics``.
    """

    def __init__(self, seed: int = 0, tracker: MLflowTracker | None = None) -> None:
        self.seed, self.tracker = seed, tracker
        self.seconds = 0.0
        """What :meth:`train` has taken so far."""
        self._bar = tqdm(disable=True)

    @contextmanager
    def progress(self, total: int) -> Iterator[None]:
        """A bar on a terminal, which :meth:`train` moves on by each of so many steps."""
        with tqdm(total=total, desc="Training", unit="step", disable=not sys.stderr.isatty()) as self._bar:
            yield

    def make_sae(self, recipe: Recipe[SAE], data: ToyDataModule, seed: int = 0, **arguments: Any) -> SAE:
        """An SAE for a toy, with other arguments, initialised on the toy's first batch, in the dtype of its activations.

        Its weights are those of the study's seed plus ``seed``.
        """
        sae = recipe.with_weights_seed(self.seed + seed)(d_in=data.d_in, **arguments)
        first = data.batch("train", 0)
        sae.to(first.x.dtype).initialize(first, data.feature_directions)
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


class Study(ABC):
    """An experiment that is a command.

    A subclass has a typed ``__init__``, whose docstring (``Args:``) explains each argument, and a ``run``. Arguments of type
    :class:`~hedgelab.protocols.recipe.Recipe` are sections of the config that name a class (``data``, ``model``). An argument
    that the study cannot use is refused in ``__init__`` with a :class:`~hedgelab.errors.UserError`.
    """

    experiment = "hedgelab"  # MLflow experiment of its runs, unless the config names another
    tracked = True  # whether it has a run at all
    example = ""  # a config that works, named where a required key is missing
    takes_any_config = False  # whether keys that it does not know, of other commands, are ignored
    writes_to = frozenset[str]()  # full keys of folders that it writes to

    @abstractmethod
    def run(self, bench: Bench) -> Outcome:
        """Do the work."""


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV text: floats to seven digits, sequences as numbers between spaces, empty where a row lacks a column.

    >>> print(as_csv([{"width": 8, "loss": 0.123456789}, {"width": 9, "levels": (1, 0.5)}]), end="")
    width,loss,levels
    8,0.1234568,
    9,,1 0.5
    """
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name, "")) for name in columns] for row in rows)
    return text.getvalue()


def make_toy(recipe: Recipe[ActivationDataModule], key: str, population: bool = False, **arguments: Any) -> ToyDataModule:
    """The toy of the config's section ``key``, with some arguments replaced; one that enumerates its ``population``."""
    data = recipe(**arguments)
    needed = "a ToyDataModule with sampling: population" if population else "a ToyDataModule"
    if not isinstance(data, ToyDataModule) or (population and data.batch("train", 0).weight is None):
        raise UserError(f"{key}: expected {needed}, got {type(data).__name__}")
    return data


def features_as_x(batch: Batch) -> Batch:
    """A toy's batch in feature coordinates."""
    assert batch.features is not None
    return Batch(batch.features.to_dense(), None, batch.weight)


def _cell(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return " ".join(str(_cell(one)) for one in value)
    return f"{value:.7g}" if isinstance(value, float) else value
