"""``hedgelab phase``: a quantity of trained SAEs over two axes, from the exact population, beside what theory says."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError, whole_number
from hedgelab.metrics.functional import mcc
from hedgelab.plots.theory import phase_diagram
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Row, Study, features_as_x, make_toy
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
        whole_number("axes.points", self.points, 2)
        if not self.low < self.high:
            raise UserError(f"axes.high: must be above low = {self.low}, got {self.high}")
        if self.logarithmic and self.low <= 0:
            raise UserError(f"axes.low: must be above 0 on a logarithmic axis, got {self.low}")
        self.values()

    def values(self) -> Array:
        """The axis's values, ``[points]``."""
        space = np.geomspace if self.logarithmic else np.linspace
        values = np.asarray(space(self.low, self.high, self.points), dtype=np.float64)
        if not self.whole:
            return values
        if not np.allclose(values, values.round()):
            raise UserError(f"axes.points: {self.points} from {self.low:g} to {self.high:g} are not all whole numbers")
        return values.round()

    def at(self, value: float) -> dict[str, float]:
        """What its keys are at one of its values."""
        keys = [self.key] if isinstance(self.key, str) else self.key
        return dict.fromkeys(keys, int(value) if self.whole else float(value))


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


@dataclass(eq=False)
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
    """

    experiment = "theory"
    example = "configs/theory/phase_correlation.yaml"

    data: Recipe[ActivationDataModule]
    model: Recipe[SAE]
    x: Axis
    y: Axis
    quantities: list[Quantity] = field(default_factory=lambda: ["hedging"])
    target: Target = Target()
    seeds: int = 3
    steps: int = 2000
    theory: bool = False

    def __post_init__(self) -> None:
        for name, axis in (("x", self.x), ("y", self.y)):
            for key in axis.at(axis.low):
                if not key.startswith(("data.", "model.")):
                    raise UserError(f"{name}.key: must start with 'data.' or 'model.', got '{key}'")
        self.quantities = list(dict.fromkeys(self.quantities))
        for name in ("seeds", "steps"):
            whole_number(name, getattr(self, name))

    def run(self, bench: Bench) -> Outcome:
        """Train, measure, draw."""
        cells, x, y, target = self.cells(bench), self.x, self.y, self.target
        rounds = 2 if "loss_gap" in self.quantities else 1
        before, threads = bench.seconds, torch.get_num_threads()
        torch.set_num_threads(1)  # such small tensors gain nothing from more, and lose much on a busy machine
        try:
            with bench.progress(self.steps * rounds):
                measured = train_and_measure(bench, cells, self.steps, self.quantities, target)
        finally:
            torch.set_num_threads(threads)
        closed = {}
        if self.theory and "hedging" in self.quantities:
            closed = closed_forms(cells, measured["hedging"], target)
        columns = {**measured, **closed}
        best = (np.arange(len(cells)), measured["loss"].argmin(1))
        drawn = {name: values[best].reshape(y.points, x.points) for name, values in columns.items()}
        overlay = None
        if closed:
            overlay = (drawn["nearest_minimum"], drawn["nearest_minimum_above_deepest"] > _SAME)
        figures = {}
        for name in self.quantities:
            label = _NAMES[name].format(own=target.own, other=target.other)
            figures[f"{name}.png"] = phase_diagram(
                x.values(), y.values(), drawn[name], f"{self.model.class_name}: {label}", x.label, y.label, label,
                overlay if name == "hedging" else None, (x.logarithmic, y.logarithmic),
            )  # fmt: skip
        metrics = {"sae_steps/s": measured["loss"].size * self.steps * rounds / (bench.seconds - before)}
        for key in measured:
            metrics |= {f"{key}/min": float(np.nanmin(drawn[key])), f"{key}/max": float(np.nanmax(drawn[key]))}
        if closed:  # how many SAEs are at a minimum that theory knows, and how many of those in the deepest
            distance, above = closed["distance_to_nearest_minimum"], closed["nearest_minimum_above_deepest"]
            known = np.isfinite(distance)
            metrics |= {f"theory/share_within_{most}": float((distance[known] < most).mean()) for most in (1e-3, 1e-2)}
            metrics["theory/share_in_deepest"] = 1 - float((above[known] > _SAME).mean())
        places = product(y.values(), x.values(), range(self.seeds))
        rows: list[Row] = [
            {x.label: float(a), y.label: float(b), "seed": seed}
            | {name: float(values.flat[number]) for name, values in columns.items()}
            for number, (b, a, seed) in enumerate(places)
        ]
        headline = [f"{len(rows)} SAEs, {self.steps} steps each"]
        headline += aligned([[key, f"{value:.5g}"] for key, value in metrics.items()]).splitlines()
        return Outcome(metrics, {"table.csv": rows}, figures, headline, self.steps)

    def cells(self, bench: Bench) -> list[Cell]:
        """All points, row by row: y rises slowly, x fast. What several points have in common is made once."""
        toys: dict[str, ToyDataModule] = {}
        saes: dict[Any, SAE] = {}
        cells: list[Cell] = []
        for b, a in product(self.y.values(), self.x.values()):
            values = {**self.x.at(a), **self.y.at(b)}
            toy, model = self.data.at(values), self.model.at(values)
            if (key := repr(toy.section)) not in toys:
                toys[key] = make_toy(toy, "data", population=True)
            data = toys[key]
            # Weights depend on the toy through its directions, and through its samples where b_dec starts at their centre.
            at_samples = model.flat_arguments["init"]["b_dec"] != "zeros"
            same = (repr(model.section), data.feature_directions.numpy().tobytes(), at_samples and key)
            for seed in range(self.seeds):
                if (*same, seed) not in saes:
                    saes[*same, seed] = bench.make_sae(model, data, seed)
            cells.append(Cell(data, [saes[*same, seed] for seed in range(self.seeds)]))
        return cells


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
    batches = [batch for cell in cells for batch in [cell.data.batch("train", 0)] * len(cell.members)]
    directions = torch.stack([cell.data.feature_directions for cell in cells for _ in cell.members])
    batch = stack_batches(batches)
    ensemble = bench.train(members, batch, steps)
    folded = ensemble.folded()
    decoder = normalize(folded.W_dec, dim=2) @ directions.mT
    encoder = normalize(folded.W_enc.mT, dim=2) @ directions.mT
    along = decoder[:, target.latent, target.own]
    with torch.no_grad():
        measured = {"loss": ensemble.losses(batch)}
    for name in quantities:
        match name:
            case "hedging" | "encoder":
                components = decoder if name == "hedging" else encoder
                measured[name] = components[:, target.latent, target.other] * along.sign()
            case "impurity":
                measured[name] = (1 - along.square()).clamp_min(0).sqrt()
            case "absorption":
                weight, features = batch.weight, stack_batches([features_as_x(one) for one in batches]).x > 0
                assert weight is not None
                own, other = features[..., target.own], features[..., target.other]
                activations = ensemble.activations(batch)[:, :, target.latent]
                both, alone = (
                    (weight * where * activations).sum(1) / (weight * where).sum(1) for where in (own & other, own & ~other)
                )
                measured[name] = 1 - both / alone
            case "mcc":
                measured[name] = torch.stack([mcc(own[: sae.d_sae]) for own, sae in zip(decoder, members, strict=True)])
            case "loss_gap":
                at_truth = bench.train(_at_true_features(cells), batch, steps)
                measured[name] = at_truth.losses(batch).detach() - measured["loss"]
    return {name: value.double().reshape(len(cells), -1).numpy() for name, value in measured.items()}


def _at_true_features(cells: Sequence[Cell]) -> list[SAE]:
    """Copies of all members with the decoder fixed at the true features."""
    copies: dict[tuple[int, bytes], SAE] = {}
    keys = []
    for cell in cells:
        directions = cell.data.feature_directions
        for member in cell.members:
            keys.append((id(member), directions.numpy().tobytes()))
            if keys[-1] in copies:
                continue
            sae = copies[keys[-1]] = copy.deepcopy(member)
            if sae.d_sae > len(directions):
                raise UserError(f"quantities: loss_gap needs d_sae of at most the {len(directions)} features")
            with torch.no_grad():
                sae.W_dec.copy_(directions[: sae.d_sae])
                sae.W_enc.copy_(directions[: sae.d_sae].T)
            sae.W_dec.requires_grad_(False)
    return [copies[key] for key in keys]


def closed_forms(cells: Sequence[Cell], hedging: Array, target: Target) -> dict[str, Array]:
    """What the closed forms of a single latent say about each measured component, by column, ``[cells, seeds]`` each.

    ``closed_form``: component of the deepest minimum whose latent tracks its own feature; ``nearest_minimum``: that of the
    minimum nearest to the trained SAE; ``distance_to_nearest_minimum``; ``nearest_minimum_above_deepest``: how much higher
    its loss is than the deepest's. NaN where none is known.
    """
    names = ("closed_form", "nearest_minimum", "distance_to_nearest_minimum", "nearest_minimum_above_deepest")
    closed = np.full((len(names), *hedging.shape), np.nan)
    for i, (cell, measured) in enumerate(zip(cells, hedging, strict=True)):
        sae, directions = cell.members[0], cell.data.feature_directions
        if not isinstance(sae, VanillaSAE) or sae.d_sae != 1:
            raise UserError("theory: closed forms are known for VanillaSAE with d_sae: 1, set theory: false")
        if not torch.allclose(directions @ directions.T, torch.eye(len(directions)).to(directions), atol=1e-5):
            raise UserError("theory: closed forms need orthonormal features, set theory: false")
        found = minima(Population.from_batch(features_as_x(cell.data.batch("train", 0))), sae.l1_coefficient)
        if found:
            own, other = (np.array([one.direction[j] for one in found]) for j in (target.own, target.other))
            components = other * np.sign(own)
            reached = np.abs(measured[:, None] - components).argmin(1)
            tracking = np.flatnonzero(own > np.abs(other))
            closed[0, i] = other[tracking[0]] if len(tracking) else np.nan
            closed[1, i] = components[reached]
            closed[2, i] = np.abs(measured - components[reached])
            closed[3, i] = np.array([one.loss for one in found])[reached] - found[0].loss
    return dict(zip(names, closed, strict=True))
