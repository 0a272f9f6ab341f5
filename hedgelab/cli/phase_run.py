"""The work of ``hedgelab phase``: read the config, make every cell from it, train, log."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from typing import Any, Literal

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
from hedgelab.plots.phase import Overlay, phase_diagram
from hedgelab.protocols.phase import Axis, PhaseResult, Quantity, Target, run_phase
from hedgelab.protocols.phase_theory import Theory, theory_of
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.provenance import provenance_tags

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${…} across config files
_NAMES = {
    "hedging": "decoder component along feature {other}",
    "encoder": "encoder component along feature {other}",
    "impurity": "decoder's part off feature {own}",
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
    parser.add_argument(
        "--log_members",
        type=Literal["table", "runs"],
        default="table",
        help="Every SAE as a line of table.csv, or as a child run, too.",
    )
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
    members = rows(x, y, result, theory)
    tracker.log_text(as_csv(members), "table.csv")
    if config.log_members == "runs":
        log_children(tracker, members, (x.label, y.label, "seed"), config.steps)
    shape = (y.points, x.points)
    for name in quantities:
        label = _NAMES[name].format(own=target.own, other=target.other)
        overlay = overlay_of(theory, result, shape) if theory is not None and name == "hedging" else None
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


def overlay_of(theory: Theory, result: PhaseResult, shape: tuple[int, int]) -> Overlay:
    """The closed form of the minimum that each drawn SAE is in, and whether it is a shallower one."""
    drawn = (np.arange(len(theory.deepest)), result.values["loss"].argmin(1))
    return Overlay(theory.nearest[drawn].reshape(shape), theory.shallower[drawn].reshape(shape))


def key_numbers(result: PhaseResult, theory: Theory | None) -> dict[str, float]:
    """Metrics of the run."""
    numbers = {"sae_steps/s": result.steps_per_second}
    for name in result.values:
        values = result.deepest(name)
        numbers |= {f"{name}/min": float(np.nanmin(values)), f"{name}/max": float(np.nanmax(values))}
    if theory is not None:
        known = theory.distance[np.isfinite(theory.distance)]
        numbers |= {f"theory/share_within_{limit}": float((known < limit).mean()) for limit in (1e-3, 1e-2)}
        numbers["theory/share_in_deepest"] = 1 - float(theory.shallower[np.isfinite(theory.distance)].mean())
    return numbers


def rows(x: Axis, y: Axis, result: PhaseResult, theory: Theory | None) -> list[dict[str, float]]:
    """Every SAE: where it stands, its seed's number, what was measured, what theory says."""
    places: Sequence[tuple[float, float]] = [(a, b) for b in y.values() for a in x.values()]
    found = []
    for cell, (a, b) in enumerate(places):
        for seed in range(result.values["loss"].shape[1]):
            row = {x.label: a, y.label: b, "seed": seed}
            row |= {name: values[cell, seed] for name, values in result.values.items()}
            if theory is not None:
                row |= {
                    "closed_form": theory.deepest[cell],
                    "nearest_minimum": theory.nearest[cell, seed],
                    "distance_to_nearest_minimum": theory.distance[cell, seed],
                    "nearest_minimum_above_deepest": theory.depth[cell, seed],
                }
            found.append(row)
    return found


def as_csv(members: list[dict[str, float]]) -> str:
    """Rows as a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(members[0])
    writer.writerows([f"{value:.7g}" for value in member.values()] for member in members)
    return text.getvalue()


def log_children(tracker: MLflowTracker, members: list[dict[str, float]], given: Sequence[str], step: int) -> None:
    """Every SAE as a child run: what it was given as parameters, what came out as metrics."""
    for number, member in enumerate(tqdm(members, "Child runs", unit="run", disable=not sys.stderr.isatty())):
        child = tracker.child(f"{tracker.run_name}/{number}", {})
        child.log_hyperparams({name: float(member[name]) for name in given})
        known = {name: float(value) for name, value in member.items() if name not in given and np.isfinite(value)}
        child.log_metrics(known, step)
        child.finalize("success")
