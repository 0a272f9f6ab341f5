"""``hedgelab phase``: a quantity of trained SAEs over two axes, from the exact population, beside what theory says."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError, whole_number
from hedgelab.metrics.functional import mcc
from hedgelab.plots.theory import Overlay, phase_diagram
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Part, Row, Study, make_toy
from hedgelab.saes import SAE, VanillaSAE
from hedgelab.saes.ensemble import stack_batches
from hedgelab.theory import Population, minima
from hedgelab.tracking.listing import aligned

Array = NDArray[np.float64]
Quantity = Literal["hedging", "encoder", "impurity", "absorption", "mcc", "loss_gap"]
_NAMES = {
    "hedging": "decoder component along feature {other}",
    "encoder": "encoder component along feature {other}",
    "impurity": "decoder's part off feature {own}",
    "absorption": "absorption of feature {other}",
    "mcc": "MCC",
    "loss_gap": "loss with true decoder - loss",
}
_SAME = 1e-6  # losses of one minimum, found from different active sets


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
        """The axis's values, ``[points]``."""
        return self._spaced().round() if self.whole else self._spaced()

    def at(self, value: float) -> dict[str, float]:
        """What its keys are at one of its values."""
        keys = [self.key] if isinstance(self.key, str) else self.key
        return {key: int(value) if self.whole else float(value) for key in keys}

    def _spaced(self) -> Array:
        space = np.geomspace if self.logarithmic else np.linspace
        return np.asarray(space(self.low, self.high, self.points), dtype=np.float64)


@dataclass(frozen=True)
class Target:
    """What is looked at: a latent, its own feature, and the feature that it may mix in, all counted from 0."""

    latent: int = 0
    own: int = 0
    other: int = 1


class Cell(NamedTuple):
    """What is trained at one point of the diagram: an initialised SAE for each seed, on a toy in population mode."""

    data: ToyDataModule
    members: list[SAE]


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
        target: Target = Target(),
        seeds: int = 3,
        steps: int = 2000,
        theory: bool = False,
        log_members: Literal["table", "runs"] = "table",
    ) -> None:
        for name, axis in (("x", x), ("y", y)):
            for key in axis.at(axis.low):
                if key.partition(".")[0] not in ("data", "model"):
                    raise UserError(f"{name}.key: must start with 'data.' or 'model.', got '{key}'")
        self.data, self.model, self.x, self.y, self.target = data, model, x, y, target
        self.quantities: list[Quantity] = list(dict.fromkeys(quantities))
        self.seeds, self.steps = whole_number("seeds", seeds), whole_number("steps", steps)
        self.theory, self.log_members = theory, log_members

    def run(self, bench: Bench) -> Outcome:
        """Train, measure, draw."""
        cells, x, y = self.cells(bench), self.x, self.y
        rounds = 2 if "loss_gap" in self.quantities else 1
        before = bench.seconds
        with bench.progress(self.steps * rounds), _one_thread():
            measured = train_and_measure(bench, cells, self.steps, self.quantities, self.target)
        closed = {}
        if self.theory and "hedging" in self.quantities:
            closed = closed_forms(cells, measured["hedging"], self.target)
        best = (np.arange(len(cells)), measured["loss"].argmin(1))
        drawn = {name: values[best].reshape(y.points, x.points) for name, values in {**measured, **closed}.items()}
        figures: dict[str, Figure] = {}
        for name in self.quantities:
            label = _NAMES[name].format(own=self.target.own, other=self.target.other)
            overlay = None
            if closed and name == "hedging":
                overlay = Overlay(drawn["nearest_minimum"], drawn["nearest_minimum_above_deepest"] > _SAME)
            figures[f"{name}.png"] = phase_diagram(
                x.values(), y.values(), drawn[name], f"{self.model.class_name}: {label}",
                x.label, y.label, label, overlay, (x.logarithmic, y.logarithmic),
            )  # fmt: skip
        metrics = {"sae_steps/s": measured["loss"].size * self.steps * rounds / (bench.seconds - before)}
        for key in measured:
            metrics |= {f"{key}/min": float(np.nanmin(drawn[key])), f"{key}/max": float(np.nanmax(drawn[key]))}
        if closed:
            metrics |= agreement(closed)
        rows = self._rows({**measured, **closed})
        headline = [f"{len(rows)} SAEs, {self.steps} steps each"]
        headline += aligned([[key, f"{value:.5g}"] for key, value in metrics.items()]).splitlines()
        given = (x.label, y.label, "seed")
        parts = [
            Part(
                str(number),
                {name: float(row[name]) for name in given},
                {name: value for name, value in row.items() if name not in given and np.isfinite(value)},
            )
            for number, row in enumerate(rows if self.log_members == "runs" else [])
        ]
        return Outcome(metrics, {"table.csv": rows}, figures, headline, parts, self.steps)

    def cells(self, bench: Bench) -> list[Cell]:
        """All points, row by row: y rises slowly, x fast. What several points have in common is made once."""
        toys: dict[Any, ToyDataModule] = {}
        saes: dict[Any, SAE] = {}
        cells: list[Cell] = []
        for b, a in product(self.y.values(), self.x.values()):
            values = {**self.x.at(a), **self.y.at(b)}
            of_data, of_model = (_of_section(section, values) for section in ("data", "model"))
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
            cells.append(Cell(data, members))
        return cells

    def _rows(self, values: Mapping[str, Array]) -> list[Row]:
        """Every SAE: where it stands, its seed's number, what was measured, what theory says."""
        places = product(enumerate(product(self.y.values(), self.x.values())), range(self.seeds))
        return [
            {self.x.label: float(a), self.y.label: float(b), "seed": seed}
            | {name: float(array[cell, seed]) for name, array in values.items()}
            for (cell, (b, a)), seed in places
        ]


def train_and_measure(
    bench: Bench, cells: Sequence[Cell], steps: int, quantities: Sequence[Quantity], target: Target
) -> dict[str, Array]:
    """Train every seed of every cell at once on its exact population; the loss and each quantity, ``[cells, seeds]``.

    ``hedging`` and ``encoder``: component of the latent's unit decoder row and encoder column along the other feature, signed
    so that its own counts as positive; ``impurity``: length of the decoder row's part off its own feature, all others together;
    ``absorption``: share of the latent's activation on its own feature that is lost where the other fires too (1: silent
    there); ``loss_gap``: how much worse the loss would be with the decoder kept at the true features; all train again for it.
    """
    members = [member for cell in cells for member in cell.members]
    seeds = len(cells[0].members)
    batches = [cell.data.batch("train", 0) for cell in cells]
    batch = stack_batches([one for one in batches for _ in range(seeds)])
    directions = torch.stack([cell.data.feature_directions for cell in cells for _ in range(seeds)])
    ensemble = bench.train(members, batch, steps)
    folded = ensemble.folded()
    decoder = normalize(folded.W_dec, dim=2) @ directions.mT
    encoder = normalize(folded.W_enc.mT, dim=2) @ directions.mT
    along = decoder[:, target.latent, target.own]
    with torch.no_grad():
        losses = ensemble.losses(batch)
    measured = {"loss": losses}
    for name in quantities:
        match name:
            case "hedging" | "encoder":
                components = decoder if name == "hedging" else encoder
                measured[name] = components[:, target.latent, target.other] * along.sign()
            case "impurity":
                measured[name] = (1 - along.square()).clamp_min(0).sqrt()
            case "absorption":
                features = stack_batches([features_as_x(one) for one in batches for _ in range(seeds)]).x
                activations = ensemble.activations(batch)[:, :, target.latent]
                measured[name] = _absorption(activations, features, batch.weight, target)
            case "mcc":
                measured[name] = torch.stack([mcc(own[: sae.d_sae]) for own, sae in zip(decoder, members, strict=True)])
            case "loss_gap":
                at_truth = bench.train(_at_true_features(cells), batch, steps)
                measured[name] = at_truth.losses(batch).detach() - losses
    return {name: value.double().reshape(len(cells), seeds).numpy() for name, value in measured.items()}


def features_as_x(batch: Batch) -> Batch:
    """A toy's batch in feature coordinates."""
    assert batch.features is not None
    return Batch(batch.features, None, batch.weight)


def _absorption(activations: Tensor, features: Tensor, weight: Tensor | None, target: Target) -> Tensor:
    """Share of the activation on the own feature alone that is lost where the other fires too, ``[members]``."""
    assert weight is not None
    own, other = features[..., target.own] > 0, features[..., target.other] > 0
    both, alone = (
        (weight * where * activations).sum(1) / (weight * where).sum(1) for where in (own & other, own & ~other)
    )
    return 1 - both / alone


def _at_true_features(cells: Sequence[Cell]) -> list[SAE]:
    """Copies of all members with the decoder fixed at the true features."""
    copies: dict[tuple[int, bytes], SAE] = {}
    result = []
    for directions, member in ((cell.data.feature_directions, member) for cell in cells for member in cell.members):
        key = (id(member), directions.numpy().tobytes())
        if key not in copies:
            sae = copies[key] = copy.deepcopy(member)
            if sae.d_sae > len(directions):
                raise UserError(f"quantities: loss_gap needs d_sae of at most the {len(directions)} features")
            with torch.no_grad():
                sae.W_dec.copy_(directions[: sae.d_sae])
                sae.W_enc.copy_(directions[: sae.d_sae].T)
            sae.W_dec.requires_grad_(False)
        result.append(copies[key])
    return result


def closed_forms(cells: Sequence[Cell], hedging: Array, target: Target) -> dict[str, Array]:
    """What the closed forms of a single latent say about each measured component, by column, ``[cells, seeds]`` each.

    ``closed_form``: component of the deepest minimum whose latent tracks its own feature; ``nearest_minimum``: that of the
    minimum nearest to the trained SAE; ``distance_to_nearest_minimum``; ``nearest_minimum_above_deepest``: how much higher
    its loss is than the deepest's. NaN where none is known.

    Raises:
        UserError: SAEs or features that the closed forms do not cover.
    """
    deepest, nearest, distance, depth = (np.full(hedging.shape, np.nan) for _ in range(4))
    for i, (cell, measured) in enumerate(zip(cells, hedging, strict=True)):
        sae, directions, batch = cell.members[0], cell.data.feature_directions, cell.data.batch("train", 0)
        if not isinstance(sae, VanillaSAE) or sae.d_sae != 1:
            raise UserError("theory: closed forms are known for VanillaSAE with d_sae: 1, set theory: false")
        if not torch.allclose(directions @ directions.T, torch.eye(len(directions)).to(directions), atol=1e-5):
            raise UserError("theory: closed forms need orthonormal features, set theory: false")
        found = minima(Population.from_batch(features_as_x(batch)), sae.l1_coefficient)
        if found:
            own, other = (np.array([one.direction[j] for one in found]) for j in (target.own, target.other))
            components = other * np.sign(own)
            reached = np.abs(measured[:, None] - components).argmin(1)
            nearest[i] = components[reached]
            distance[i] = np.abs(measured - nearest[i])
            depth[i] = np.array([one.loss for one in found])[reached] - found[0].loss
            tracking = np.flatnonzero(own > np.abs(other))
            deepest[i] = other[tracking[0]] if len(tracking) else np.nan
    return {
        "closed_form": deepest,
        "nearest_minimum": nearest,
        "distance_to_nearest_minimum": distance,
        "nearest_minimum_above_deepest": depth,
    }


def agreement(closed: Mapping[str, Array]) -> dict[str, float]:
    """How many trained SAEs are at a minimum that theory knows, and how many of those in the deepest."""
    distance, depth = closed["distance_to_nearest_minimum"], closed["nearest_minimum_above_deepest"]
    known = np.isfinite(distance)
    shares = {f"theory/share_within_{limit}": float((distance[known] < limit).mean()) for limit in (1e-3, 1e-2)}
    return {**shares, "theory/share_in_deepest": 1 - float((depth[known] > _SAME).mean())}


def _of_section(section: str, values: Mapping[str, float]) -> dict[str, float]:
    """The values of a section's keys, its name left out."""
    return {key.partition(".")[2]: value for key, value in values.items() if key.partition(".")[0] == section}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Such small tensors gain nothing from more threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
