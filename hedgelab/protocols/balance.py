"""``hedgelab balance``: which weighting of a matryoshka SAE's levels leaves the parent's encoder at its true feature?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.nn.functional import normalize

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError, whole_number
from hedgelab.metrics.functional import mcc
from hedgelab.plots.theory import balance_figure
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Row, Study, make_toy
from hedgelab.saes import SAE, MatryoshkaSAE
from hedgelab.saes.ensemble import EnsembleSAE
from hedgelab.tracking.listing import aligned

Array = NDArray[np.float64]
_ELITE = 8  # one in eight of a round leads to the next
_FIRST_WEIGHTS = (0.02, 1.0)
_SHOWN = ("β = 1, plain matryoshka", "best β", "adaptive weights, one a level", "one weight a level", "credit, β = 1")


@dataclass(frozen=True)
class BetaGrid:
    """Values of β, evenly spaced in their logarithm; a second, finer grid follows around the best.

    Attributes:
        low: Smallest.
        high: Largest.
        points: How many.
    """

    low: float = 0.01
    high: float = 4.0
    points: int = 33

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise UserError(f"betas: need 0 < low < high, got {self.low} and {self.high}")
        if self.points < 3:
            raise UserError(f"betas.points: must be at least 3, got {self.points}")

    def values(self) -> Array:
        """The values, ``[points]``."""
        return np.geomspace(self.low, self.high, self.points)


@dataclass(frozen=True)
class WeightSearch:
    """Search for one weight a level: each round is drawn around the best tried so far, ever closer.

    Attributes:
        levels: Sizes of the nested prefixes, more than the model has: the more levels, the more weights.
        members: SAEs a round.
        rounds: How many.
    """

    levels: list[int]
    members: int = 64
    rounds: int = 4

    def __post_init__(self) -> None:
        if self.members < _ELITE:
            raise UserError(f"search.members: must be at least {_ELITE}, got {self.members}")
        if self.rounds < 1:
            raise UserError(f"search.rounds: must be at least 1, got {self.rounds}")


class Score(NamedTuple):
    """What came of an SAE: its levels' weights at the end, the cosines of its parent's latent with the features, and numbers.

    ``encoder_error`` is the length of the parent's unit encoder off its own feature (0: a clean parent), ``decoder_error`` that
    of its decoder row.
    """

    weights: list[float]
    encoder: list[float]
    decoder: list[float]
    encoder_error: float
    decoder_error: float
    mse: float
    mcc: float

    def numbers(self) -> dict[str, float]:
        """Errors by name."""
        return {name: getattr(self, name) for name in ("encoder_error", "decoder_error", "mse", "mcc")}


Make = Callable[..., MatryoshkaSAE]
"""Makes the config's SAE, initialised, with some arguments of its own."""
Train = Callable[[Sequence[MatryoshkaSAE]], list[Score]]
"""Trains SAEs side by side and scores each."""


class BalanceStudy(Study):
    """Find the weighting of matryoshka levels that leaves a hierarchy's parent clean.

    Compares fixed β, searched weights, weights that adapt in training, and the credit of outer levels, on the exact population.

    Args:
        data: The hierarchy, with sampling: population.
        model: The MatryoshkaSAE whose levels are weighted.
        betas: Fixed β to try.
        search: How to look for one weight a level; null for not at all.
        starts: β from which adaptive weights start.
        parent: The parent's feature, and its latent.
        steps: Optimiser steps of each SAE.

    Raises:
        UserError: Another SAE, or an impossible number.
    """

    experiment = "theory"
    example = "configs/theory/balance.yaml"

    def __init__(
        self,
        data: Recipe[ActivationDataModule],
        model: Recipe[SAE],
        betas: BetaGrid = BetaGrid(),
        search: WeightSearch | None = None,
        starts: list[float] = [1.0],  # noqa: B006 (read only; jsonargparse shows it)
        parent: int = 0,
        steps: int = 2000,
    ) -> None:
        if model.class_name != "MatryoshkaSAE":
            raise UserError(f"model: must be a MatryoshkaSAE, got {model.class_name}")
        if not starts or min(starts) <= 0:
            raise UserError(f"starts: needs values of β above 0, got {starts}")
        self.data, self.model, self.betas, self.search, self.starts = data, model, betas, search, starts
        self.steps, self.parent = whole_number("steps", steps), whole_number("parent", parent, 0)

    def run(self, bench: Bench) -> Outcome:
        """Train, measure, draw."""
        data = make_toy(self.data, "data", population=True)
        directions, batch = data.feature_directions, data.batch("train", 0)
        if self.parent >= len(directions):
            raise UserError(f"parent: must be a feature, 0 to {len(directions) - 1}, got {self.parent}")

        def make(**arguments: Any) -> MatryoshkaSAE:
            return cast(MatryoshkaSAE, bench.make_sae(self.model, data, **arguments))

        def train(members: Sequence[MatryoshkaSAE]) -> list[Score]:
            return scores(bench.train(members, batch, self.steps), batch, directions, self.parent)

        with bench.progress(fits(self.search) * self.steps):
            curves, methods = find_balance(make, train, self.betas, self.search, self.starts)
        metrics = {
            f"{method}/{name}": value for method, one in methods.items() for name, value in one.numbers().items()
        }
        lines = [
            [
                method, f"encoder error {one.encoder_error:.4f}", f"decoder error {one.decoder_error:.4f}",
                f"mse {one.mse:.2e}", f"weights {' '.join(f'{weight:.4g}' for weight in one.weights)}",
            ]
            for method, one in methods.items()
        ]  # fmt: skip
        rows: list[Row] = [
            {
                "method": method,
                **one.numbers(),
                **{f"encoder_feature{j}": value for j, value in enumerate(one.encoder)},
                **{f"decoder_feature{j}": value for j, value in enumerate(one.decoder)},
                "level_weights": one.weights,
            }
            for method, one in methods.items()
        ]
        curve_rows: list[Row] = [
            {"curve": curve, "beta": float(beta), **one.numbers()}
            for curve, found in curves.items()
            for beta, one in zip(self.betas.values(), found, strict=True)
        ]
        return Outcome(
            metrics, {"methods.csv": rows, "curves.csv": curve_rows}, {"balance.png": self._figure(curves, methods)},
            [f"{len(methods)} methods", *aligned(lines).splitlines()], step=self.steps,
        )  # fmt: skip

    def _figure(self, curves: Mapping[str, Sequence[Score]], methods: Mapping[str, Score]) -> Figure:
        """Error over β, and the parent's components."""
        adaptive = f"adaptive weights from β = {self.starts[0]:g}"
        shown = [name for name in _SHOWN if name in methods]
        shown.insert(2, adaptive)
        children = [j for j in range(len(methods[adaptive].encoder)) if j != self.parent]
        return balance_figure(
            self.betas.values(),
            {name: [one.encoder_error for one in found] for name, found in curves.items()},
            {"adaptive weight, no ground truth used": (methods[adaptive].weights[0], methods[adaptive].encoder_error)},
            {name: [methods[name].encoder[j] for j in children] for name in shown},
            [f"feature {j}" for j in children],
            "How clean is the parent's latent?",
        )


def find_balance(
    make: Make, train: Train, betas: BetaGrid, search: WeightSearch | None = None, starts: Sequence[float] = (1.0,)
) -> tuple[dict[str, list[Score]], dict[str, Score]]:
    """Train an SAE for each way to weight levels: curves over the grid of β, and the score of a single SAE by method."""
    grid = betas.values()
    plain = train([make(beta=beta) for beta in grid])
    place = plain.index(_best(plain))
    around = np.geomspace(grid[max(0, place - 1)], grid[min(len(grid) - 1, place + 1)], len(grid))
    at_one, at_zero = train([make(beta=1.0), make(beta=0.0)])
    methods = {
        "β = 0, no inner levels": at_zero,
        "β = 1, plain matryoshka": at_one,
        "best β": _best(train([make(beta=beta) for beta in around])),
    }
    if search is not None:
        methods["one weight a level"] = _search(make, search, train)
        (methods["adaptive weights, one a level"],) = train([make(levels=search.levels, beta=starts[0], adaptive=True)])
    adaptive = train([make(beta=beta, adaptive=True) for beta in starts])
    methods |= {f"adaptive weights from β = {start:g}": one for start, one in zip(starts, adaptive, strict=True)}
    credited = train([make(beta=beta, credit=1.0) for beta in grid])
    (methods["credit, β = 1"],) = train([make(beta=1.0, credit=1.0)])
    methods["credit, best β"] = _best(credited)
    (methods["credit, adaptive weights"],) = train([make(beta=1.0, credit=1.0, adaptive=True)])
    return {"β": plain, "β, credit": credited}, methods


def fits(search: WeightSearch | None) -> int:
    """How many ensembles :func:`find_balance` trains."""
    return 7 + (search.rounds + 1 if search is not None else 0)


def scores(ensemble: EnsembleSAE, batch: Batch, directions: torch.Tensor, parent: int) -> list[Score]:
    """The score of every member on the whole population."""
    folded = ensemble.folded()
    encoders = (normalize(folded.W_enc[:, :, parent], dim=1) @ directions.T).double()
    rows = normalize(folded.W_dec, dim=2) @ directions.T
    decoders = rows[:, parent].double()
    assert batch.weight is not None
    found = []
    for i, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
        member = cast(MatryoshkaSAE, ensemble.member(i))
        with torch.no_grad():
            error = member.loss(batch).error
        mse = float(error.square().sum(1) @ batch.weight.to(error))
        weights = [float(weight) for weight in member.current_weights()]
        off, off_decoder = (float((1 - one[parent].clamp(0, 1).square()).sqrt()) for one in (encoder, decoder))
        found.append(Score(weights, encoder.tolist(), decoder.tolist(), off, off_decoder, mse, float(mcc(rows[i]))))
    return found


def _best(found: Sequence[Score]) -> Score:
    """The score of the SAE with the cleanest parent."""
    return min(found, key=lambda one: math.inf if math.isnan(one.encoder_error) else one.encoder_error)


def _search(make: Make, search: WeightSearch, train: Train) -> Score:
    """The best of all rounds; the outermost level's weight is 1."""
    generator, inner = np.random.default_rng(0), len(search.levels) - 1
    low, high = map(math.log, _FIRST_WEIGHTS)
    drawn = generator.uniform(low, high, (search.members, inner))
    tried, found = np.empty((0, inner)), list[Score]()
    for number in range(search.rounds):
        saes = [make(levels=search.levels) for _ in drawn]
        for sae, logarithms in zip(saes, drawn, strict=True):
            sae.level_weights = [*np.exp(logarithms).tolist(), 1.0]
        found += train(saes)
        tried = np.concatenate([tried, drawn])
        elite = tried[np.argsort([one.encoder_error for one in found])[: search.members // _ELITE]]
        width = 0.5 ** (number + 1) * (high - low) / 4
        drawn = elite[generator.integers(len(elite), size=len(drawn))] + generator.normal(size=drawn.shape) * width
    return _best(found)
