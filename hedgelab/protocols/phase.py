"""``hedgelab phase``: a quantity of trained SAEs over two axes, from the exact population, beside what theory says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError, whole_number
from hedgelab.plots.theory import Overlay, phase_diagram
from hedgelab.protocols.phase_cells import Array, Cell, PhaseResult, Quantity, Target, run_phase
from hedgelab.protocols.phase_theory import Theory, theory_of
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Part, Row, Study, make_toy
from hedgelab.saes import SAE

_NAMES = {
    "hedging": "decoder component along feature {other}",
    "encoder": "encoder component along feature {other}",
    "impurity": "decoder's part off feature {own}",
    "absorption": "absorption of feature {other}",
    "mcc": "MCC",
    "loss_gap": "loss with true decoder - loss",
}


@dataclass(frozen=True)
class Axis:
    """One axis of a phase diagram.

    Attributes:
        key: Config key, or keys, that take the axis's value, written in full, list items by number
            (``data.init_args.firing.init_args.features.1.f0``).
        low: First value.
        high: Last value.
        points: Number of values.
        label: What the axis is called in figure and table.
        logarithmic: Space the values evenly in their logarithm.
        whole: The values are whole numbers, as widths must be.
    """

    key: str | list[str]
    low: float
    high: float
    points: int
    label: str
    logarithmic: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if self.points < 2:
            raise UserError(f"axes.points: must be at least 2, got {self.points}")
        if not self.low < self.high:
            raise UserError(f"axes.high: must be above low = {self.low}, got {self.high}")
        if self.logarithmic and self.low <= 0:
            raise UserError(f"axes.low: must be above 0 on a logarithmic axis, got {self.low}")
        if self.whole and not np.allclose(self._spaced(), self._spaced().round()):
            raise UserError(f"axes.points: {self.points} from {self.low:g} to {self.high:g} are not all whole numbers")

    def values(self) -> Array:
        """``[points]``."""
        return self._spaced().round() if self.whole else self._spaced()

    def config_keys(self) -> list[str]:
        """The config keys that take the axis's value."""
        return [self.key] if isinstance(self.key, str) else self.key

    def at(self, value: float) -> dict[str, float]:
        """What its keys are at one of its values."""
        return {key: int(value) if self.whole else float(value) for key in self.config_keys()}

    def _spaced(self) -> Array:
        space = np.geomspace if self.logarithmic else np.linspace
        return np.asarray(space(self.low, self.high, self.points), dtype=np.float64)


class Phase(Study):
    """Map hedging of toy SAEs over two axes, beside the closed forms.

    Every point of the diagram is a toy and an SAE with its own values of one config key (or several) per axis. All SAEs train
    at once, each on the exact population of its toy.

    Args:
        data: The toy, with sampling: population.
        model: The SAE at every point.
        x: Horizontal axis.
        y: Vertical axis.
        quantities: What is drawn, a figure each.
        target: The latent and the features that are looked at.
        seeds: SAEs at each point; the one with the least loss is drawn.
        steps: Optimiser steps.
        theory: Draw the closed form of a single latent, too.
        log_members: Every SAE as a line of table.csv, or as a child run, too.

    Raises:
        UserError: An impossible number, or an axis whose key is not one of data or model.
    """

    experiment = "theory"
    example = "configs/theory/phase_correlation.yaml"

    def __init__(
        self,
        data: Recipe[ActivationDataModule],
        model: Recipe[SAE],
        x: Axis,
        y: Axis,
        quantities: list[Quantity] = ["hedging"],  # noqa: B006 (read only; jsonargparse shows it)
        target: Target = Target(),  # noqa: B008 (frozen)
        seeds: int = 3,
        steps: int = 2000,
        theory: bool = False,
        log_members: Literal["table", "runs"] = "table",
    ) -> None:
        for name, axis in (("x", x), ("y", y)):
            for key in axis.config_keys():
                if key.partition(".")[0] not in ("data", "model"):
                    raise UserError(f"{name}.key: must start with 'data.' or 'model.', got '{key}'")
        self.data, self.model, self.x, self.y, self.target = data, model, x, y, target
        self.quantities: list[Quantity] = list(dict.fromkeys(quantities))
        self.seeds, self.steps = whole_number("seeds", seeds), whole_number("steps", steps)
        self.theory, self.log_members = theory, log_members

    def run(self, bench: Bench) -> Outcome:
        """Train, measure, draw."""
        cells, x, y, target = self.cells(bench), self.x, self.y, self.target
        rounds = 2 if "loss_gap" in self.quantities else 1
        with bench.progress(self.steps * rounds) as advance:
            result = run_phase(cells, self.steps, self.quantities, target, lambda _: advance(1))
        theory = None
        if self.theory and "hedging" in self.quantities:
            theory = theory_of(cells, result.values["hedging"], target)
        shape = (y.points, x.points)
        figures: dict[str, Figure] = {}
        for name in self.quantities:
            label = _NAMES[name].format(own=target.own, other=target.other)
            overlay = _overlay(theory, result, shape) if theory is not None and name == "hedging" else None
            figures[f"{name}.png"] = phase_diagram(
                x.values(), y.values(), result.deepest(name).reshape(shape), f"{self.model.class_name}: {label}",
                x.label, y.label, label, overlay, (x.logarithmic, y.logarithmic),
            )  # fmt: skip
        metrics, rows = key_numbers(result, theory), self.rows(result, theory)
        headline = [f"{len(rows)} SAEs, {self.steps} steps each"]
        headline += [f"{name:<26} {value:.5g}" for name, value in metrics.items()]
        parts = self._parts(rows) if self.log_members == "runs" else []
        return Outcome(metrics, {"table.csv": rows}, figures, headline, parts, self.steps)

    def cells(self, bench: Bench) -> list[Cell]:
        """All points, row by row: y rises slowly, x fast. What several points have in common is made once."""
        toys: dict[Any, ToyDataModule] = {}
        saes: dict[Any, SAE] = {}

        def cell(values: Mapping[str, float]) -> Cell:
            of_data, of_model = (_below(section, values) for section in ("data", "model"))
            if (key := tuple(of_data.items())) not in toys:
                toys[key] = make_toy(self.data.at(of_data), "data", population=True)
            data, recipe = toys[key], self.model.at(of_model)
            # Weights depend on the toy through its directions, and through its samples where b_dec starts at their centre.
            depends_on = (data.feature_directions.numpy().tobytes(), recipe.starts_at_data and id(data))
            members = []
            for seed in range(self.seeds):
                same = (tuple(of_model.items()), seed, depends_on)
                if same not in saes:
                    saes[same] = bench.make_sae(recipe, data, seed)
                members.append(saes[same])
            return Cell(data, members)

        return [cell({**self.x.at(a), **self.y.at(b)}) for b in self.y.values() for a in self.x.values()]

    def rows(self, result: PhaseResult, theory: Theory | None) -> list[Row]:
        """Every SAE: where it stands, its seed's number, what was measured, what theory says."""
        rows: list[Row] = []
        for cell, (b, a) in enumerate((b, a) for b in self.y.values() for a in self.x.values()):
            for seed in range(self.seeds):
                row = {self.x.label: float(a), self.y.label: float(b), "seed": seed}
                row |= {name: float(values[cell, seed]) for name, values in result.values.items()}
                if theory is not None:
                    row |= {
                        "closed_form": float(theory.deepest[cell]),
                        "nearest_minimum": float(theory.nearest[cell, seed]),
                        "distance_to_nearest_minimum": float(theory.distance[cell, seed]),
                        "nearest_minimum_above_deepest": float(theory.depth[cell, seed]),
                    }
                rows.append(row)
        return rows

    def _parts(self, rows: Sequence[Row]) -> list[Part]:
        """Every SAE as a child run: what it was given as parameters, what came out as metrics."""
        given = (self.x.label, self.y.label, "seed")
        return [
            Part(
                str(number),
                {name: float(row[name]) for name in given},
                {name: value for name, value in row.items() if name not in given and np.isfinite(value)},
            )
            for number, row in enumerate(rows)
        ]


def key_numbers(result: PhaseResult, theory: Theory | None) -> dict[str, float]:
    """Metrics of the run: the range of each quantity, and how well theory agrees."""
    numbers = {"sae_steps/s": result.steps_per_second}
    for name in result.values:
        values = result.deepest(name)
        numbers |= {f"{name}/min": float(np.nanmin(values)), f"{name}/max": float(np.nanmax(values))}
    if theory is not None:
        known = theory.distance[np.isfinite(theory.distance)]
        numbers |= {f"theory/share_within_{limit}": float((known < limit).mean()) for limit in (1e-3, 1e-2)}
        numbers["theory/share_in_deepest"] = 1 - float(theory.shallower[np.isfinite(theory.distance)].mean())
    return numbers


def _overlay(theory: Theory, result: PhaseResult, shape: tuple[int, int]) -> Overlay:
    """The closed form of the minimum that each drawn SAE is in, and whether it is a shallower one."""
    drawn = (np.arange(len(theory.deepest)), result.values["loss"].argmin(1))
    return Overlay(theory.nearest[drawn].reshape(shape), theory.shallower[drawn].reshape(shape))


def _below(section: str, values: Mapping[str, float]) -> dict[str, float]:
    """The values of a section's keys, its name left out."""
    return {key.partition(".")[2]: value for key, value in values.items() if key.partition(".")[0] == section}
