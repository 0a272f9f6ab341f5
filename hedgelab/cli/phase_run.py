"""The work of ``hedgelab phase``: read the config, make every cell from it, train, log."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from tqdm import tqdm

import hedgelab.data.toy
import hedgelab.saes  # noqa: F401
from hedgelab.cli.compose import Tree, compose, config_files
from hedgelab.cli.diagnose import Walk
from hedgelab.cli.errors import one_line
from hedgelab.cli.explain import resolve, top_level
from hedgelab.cli.phase_cells import CellMaker
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError
from hedgelab.plots.phase import phase_diagram
from hedgelab.protocols.phase import Axis, PhaseResult, Quantity, Target, Theory, run_phase, theory_of
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.provenance import provenance_tags

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${…} across config files
_NAMES = {
    "hedging": "decoder component along feature {other}",
    "encoder": "encoder component along feature {other}",
    "absorption": "absorption of feature {other}",
    "mcc": "MCC",
    "loss_gap": "loss with true decoder - loss",
    "loss": "loss",
}


def run_phase_command(words: list[str]) -> int:
    """Parse, train, log, and say where the figure is."""
    tree = compose(words)
    config = parse(words, tree)
    name = config.name or "+".join(file.stem for file in config_files(words)) or "phase"
    tracker = MLflowTracker(experiment=config.experiment, run_name=name)
    try:
        tracker.log_config(text := make_parser().dump(config, skip_none=False))
        tracker.log_hyperparams({key: value for key, value in yaml.safe_load(text).items() if key != "config"})
        print(work(config, tracker))
    except BaseException:
        tracker.finalize("failed")
        raise
    tracker.finalize("success")
    return 0


def make_parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(prog="hedgelab phase", exit_on_error=False, parser_mode="omegaconf+")
    parser.add_argument("--config", action="config", help="Config file (YAML).")
    parser.add_subclass_arguments(ActivationDataModule, "data", help="The toy; trained on its exact population.")
    parser.add_subclass_arguments(SAE, "model", skip={"d_in"}, help="The SAE at every point.")
    parser.add_argument("--x", type=Axis, help="Horizontal axis.")
    parser.add_argument("--y", type=Axis, help="Vertical axis.")
    parser.add_argument("--quantities", type=list[Quantity], default=["hedging"], help="What is drawn, a figure each.")
    parser.add_argument(
        "--target", type=Target, default=Target(), help="The latent and the features that are looked at."
    )
    parser.add_argument("--seeds", type=int, default=3, help="SAEs a point; the one with the least loss is drawn.")
    parser.add_argument("--steps", type=int, default=2000, help="Optimiser steps.")
    parser.add_argument("--theory", type=bool, default=False, help="Draw the closed form of a single latent.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of the first SAE; later ones count up.")
    parser.add_argument("--name", type=str | None, help="Name of the run; the config file's by default.")
    parser.add_argument("--experiment", type=str, default="theory", help="MLflow experiment.")
    return parser


def parse(words: list[str], tree: Tree) -> Namespace:
    """The options, checked.

    Raises:
        UserError: What is refused, in one line.
    """
    parser = make_parser()
    try:
        config = parser.parse_args(words)
    except Exception as error:
        types: dict[str, Any] = {
            "quantities": list[Quantity],
            "model": SAE,
            "data": ActivationDataModule,
            "x": Axis,
            "y": Axis,
            "target": Target,
        }
        walk = Walk(resolve(tree), top_level(vars(parser.get_defaults()), types), frozenset({"model.d_in"}))
        raise UserError(walk.first or one_line(str(error))) from error
    for key in ("data", "model", "x", "y"):
        if config[key] is None:
            raise UserError(f"{key}: missing; see configs/theory for examples")
    for key in ("seeds", "steps"):
        if config[key] < 1:
            raise UserError(f"{key}: must be at least 1, got {config[key]}")
    return config


def work(config: Namespace, tracker: MLflowTracker) -> str:
    """Train, measure and log a diagram; what to tell the user."""
    x, y = Axis(**vars(config.x)), Axis(**vars(config.y))
    target = Target(**vars(config.target))
    quantities: list[Quantity] = list(dict.fromkeys(config.quantities))
    cells = CellMaker(config).cells(x, y)
    tracker.log_tags(provenance_tags(1))
    rounds = 2 if "loss_gap" in quantities else 1
    with tqdm(total=config.steps * rounds, desc="Training", unit="step", disable=not sys.stderr.isatty()) as bar:
        result = run_phase(cells, config.steps, quantities, target, lambda done: bar.update(done - bar.n) and None)
    theory = theory_of(cells, result.values["hedging"], target) if config.theory and "hedging" in quantities else None
    numbers = key_numbers(result, theory)
    tracker.log_metrics(numbers, config.steps)
    tracker.log_text(table(x, y, result, theory), "table.csv")
    shape = (y.points, x.points)
    for name in quantities:
        overlay = theory.deepest.reshape(shape) if theory is not None and name == "hedging" else None
        label = _NAMES[name].format(other=target.other)
        figure = phase_diagram(
            x.values(), y.values(), result.deepest(name).reshape(shape),
            f"{config.model.class_path.rpartition('.')[2]}: {label}", x.label, y.label, label,
            overlay, (x.logarithmic, y.logarithmic),
        )  # fmt: skip
        tracker.log_figure(figure, f"figures/{name}.png")
    count = result.values["loss"].size
    lines = [f"run {tracker.run_id}: {count} SAEs, {config.steps} steps each"]
    return "\n".join(
        [*lines, *(f"  {name:<26} {value:.5g}" for name, value in numbers.items()), "look at it: hedgelab ui"]
    )


def key_numbers(result: PhaseResult, theory: Theory | None) -> dict[str, float]:
    """Metrics of the run."""
    numbers = {"sae_steps/s": result.steps_per_second}
    for name in result.values:
        values = result.deepest(name)
        numbers |= {f"{name}/min": float(np.nanmin(values)), f"{name}/max": float(np.nanmax(values))}
    if theory is not None:
        known = theory.distance[np.isfinite(theory.distance)]
        numbers |= {f"theory/share_within_{limit}": float((known < limit).mean()) for limit in (1e-3, 1e-2)}
    return numbers


def table(x: Axis, y: Axis, result: PhaseResult, theory: Theory | None) -> str:
    """Every SAE as a line of CSV: where it stands, its seed's number, what was measured, what theory says."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    closed = [] if theory is None else ["closed_form", "distance_to_nearest_minimum"]
    writer.writerow([x.label, y.label, "seed", *result.values, *closed])
    places: Sequence[tuple[float, float]] = [(a, b) for b in y.values() for a in x.values()]
    for cell, (a, b) in enumerate(places):
        for seed in range(result.values["loss"].shape[1]):
            numbers = [a, b, *(values[cell, seed] for values in result.values.values())]
            if theory is not None:
                numbers += [theory.deepest[cell], theory.distance[cell, seed]]
            shown = [f"{number:.7g}" for number in numbers]
            writer.writerow([*shown[:2], seed, *shown[2:]])
    return text.getvalue()
