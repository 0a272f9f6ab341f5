"""Studies: commands that are classes, the package's own and those of others, and how their runs end."""

import csv
import importlib
import inspect
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hedgelab import cli
from hedgelab.cli import COMMANDS, main, studies
from hedgelab.protocols.study import Bench, Outcome, Study, as_csv

ROOT = Path(__file__).parents[2]
FOREIGN = '''\
from matplotlib.figure import Figure

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import whole_number
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Study, make_toy
from hedgelab.saes import SAE


class WidthLoss(Study):
    """Loss over width, of one toy.

    Args:
        data: The toy.
        model: The SAE.
        widths: Widths that are
            trained.
        steps: Optimiser steps.
        quick: Whether to hurry.
    """

    experiment = "foreign"

    def __init__(
        self, data: Recipe[ActivationDataModule], model: Recipe[SAE], widths: list[int], steps: int = 1, quick: bool = False
    ) -> None:
        self.data, self.model, self.widths, self.quick = data, model, widths, quick
        self.steps = whole_number("steps", steps)

    def run(self, bench: Bench) -> Outcome:
        toy = make_toy(self.data, "data")
        losses = {}
        for width in self.widths:
            sae = bench.make_sae(self.model, toy, d_sae=width)
            ensemble = bench.train([sae], lambda step: toy.batch("train", step), self.steps)
            losses[width] = float(ensemble.losses(toy.batch("val", 0)))
        return Outcome(
            {f"loss/{width}": loss for width, loss in losses.items()},
            {"losses.csv": [{"width": width, "loss": loss} for width, loss in losses.items()]},
            {"losses.png": Figure()},
            ["trained", f"quick {self.quick}"],
            self.steps,
        )
'''
CONFIG = """\
# What a foreign study says about itself.
steps: 3
widths: [1, 2]
data:
  class_path: ToyDataModule
  init_args:
    d_in: 6
    batch_size: 8
    firing: {class_path: IndependentFiring, init_args: {probabilities: [0.1, 0.2, 0.3]}}
model: {class_path: VanillaSAE, init_args: {d_sae: 3, l1_coefficient: 0.1}}
"""


@pytest.fixture
def store(tmp_path, monkeypatch, empty_database):
    """A working folder with an empty store, and a study of another package in it."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("HEDGELAB_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("foreign_study.py").write_text(FOREIGN)
    Path("losses.yaml").write_text(CONFIG)
    sys.modules.pop("foreign_study", None)
    return tmp_path


def runs(store):
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def test_a_study_of_another_package_is_a_command(store, capsys):
    assert main(["foreign_study.WidthLoss", "--config", "losses.yaml", "--quick", "--seed_everything", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["  quick True", "look at it: hedgelab ui"]
    found = {run.info.run_name: run for run in runs(store)}
    parent = found["losses"]
    assert set(found) == {"losses"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert parent.data.params["steps"] == "3"
    assert parent.data.params["model.init_args.l1_coefficient"] == "0.1"
    assert parent.data.params["seed_everything"] == "4"
    assert parent.data.tags["mlflow.note.content"] == "What a foreign study says about itself."
    assert {"config_hash", "version.torch"} <= set(parent.data.tags)
    assert {"loss/1", "loss/2"} <= set(parent.data.metrics)
    (table,) = store.rglob("losses.csv")
    assert [row["width"] for row in csv.DictReader(table.open())] == ["1", "2"]
    assert list(store.rglob("figures/losses.png"))


def test_an_installed_package_names_its_study(store, capsys, monkeypatch):
    point = importlib.metadata.EntryPoint("widths", "foreign_study:WidthLoss", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [point] if group == cli.GROUP else [])
    assert main(["widths", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Widths that are trained. (required, type: list[int])" in printed
    assert "Optimiser steps. (type: int, default: 1)" in printed
    assert main(["width", "--help"]) == 2
    assert "did you mean 'widths'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps=0"], "steps: expected a whole number of at least 1, got 0"),
        (["--steps=true"], "steps: expected int, got True"),
        (["--model.k=2"], "model.k: unknown key; expected one of"),
        (["--stesp=2"], "stesp: unknown key; did you mean 'steps'?"),
        (["--widths=null"], "widths: is required, expected list[int]"),
        (["--model.d_in=3"], "model.d_in: is taken from the data"),
        (["--config=nope.yaml"], "--config: no such file 'nope.yaml'"),
    ],
)
def test_mistakes_in_a_foreign_config_are_one_line(words, message, store, capsys):
    assert main(["foreign_study.WidthLoss", "--config", "losses.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert runs(store) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.WidthLoss", "no module 'nowhere'"),
        ("foreign_study.Nothing", "expected a subclass of"),
        ("foreign_study.Figure", "expected a subclass of"),
    ],
)
def test_what_is_no_study(path, message, store, capsys):
    assert main([path]) == 2
    assert message in capsys.readouterr().err


ENDED = {
    "phase": "configs/theory/phase_correlation.yaml",
    "balance": "configs/theory/balance.yaml",
    "trial": "configs/toy/degree_trial.yaml",
    "figures": "configs/paper/toy_figures.yaml",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("command", ENDED)
def test_a_study_ended_by_a_signal_is_killed_in_the_store(command, number, store, capsys, monkeypatch):
    def run(self, bench):
        bench.keep(Outcome({"before": 1.0}))
        os.kill(os.getpid(), number)
        return Outcome()

    monkeypatch.setattr(studies.study_class(command), "run", run)
    assert main([command, "--config", str(ROOT / ENDED[command])]) == 128 + number
    assert f"stopped by {number.name}" in capsys.readouterr().err
    (ended,) = runs(store)
    assert ended.info.status == "KILLED"
    assert ended.data.metrics == {"before": 1.0} | {
        name: value for name, value in ended.data.metrics.items() if name.startswith("system/")
    }
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_study_that_fails_is_failed_in_the_store(store, capsys, monkeypatch):
    monkeypatch.setattr(studies.study_class("balance"), "run", lambda self, bench: 1 / 0)
    assert main(["balance", "--config", str(ROOT / ENDED["balance"])]) == 1
    assert [run.info.status for run in runs(store)] == ["FAILED"]


BUILT_IN = {name: f"hedgelab.{one.place}" for name, one in COMMANDS.items() if "." in one.place}


@pytest.mark.parametrize("command", BUILT_IN)
def test_the_overview_says_what_the_class_says(command):
    cls = studies.study_class(command)
    first = inspect.cleandoc(cls.__doc__).splitlines()[0].rstrip(".")
    assert COMMANDS[command].summary == first[0].lower() + first[1:]
    assert not cls.example or (ROOT / cls.example).is_file()


def test_every_study_of_the_package_has_a_command():
    for path in (ROOT / "hedgelab" / "protocols").rglob("*.py"):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    own = {f"{cls.__module__}.{cls.__name__}" for cls in subclasses(Study) if cls.__module__.startswith("hedgelab.")}
    own -= {"hedgelab.protocols.evaluation.evaluate.Evaluate", "hedgelab.protocols.leaderboard.Leaderboard"}
    # All these read their words by themselves: SAEs come first, or are listed; those of the cells' command; those of fit.
    own -= {"hedgelab.protocols.sweep.run.Sweep", "hedgelab.protocols.hedge.Hedge"}
    assert own == set(BUILT_IN.values())


def subclasses(cls):
    for below in cls.__subclasses__():
        yield below
        yield from subclasses(below)


def test_a_study_runs_without_a_store(monkeypatch, tmp_path):
    from hedgelab.protocols.figures import PaperFigures

    monkeypatch.chdir(tmp_path)
    outcome = PaperFigures(landscapes=[(0.3, 0.1)]).run(Bench())
    assert list(outcome.figures) == ["loss_landscapes.png"]
    assert list(tmp_path.iterdir()) == []


def test_tables_without_rows():
    assert as_csv([]) == "\n"
