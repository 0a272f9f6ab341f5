"""``hedgelab balance``: which weighting of a matryoshka SAE's levels leaves the parent's encoder at its true feature?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.nn.functional import normalize

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError, whole_number
from hedgelab.metrics.functional import mcc
from hedgelab.plots.theory import balance_figure
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Row, Study, make_toy
from hedgelab.saes import SAE, MatryoshkaSAE
from hedgelab.saes.ensemble import EnsembleSAE

Array = NDArray[np.float64]
_ELITE = 8  # one in eight of a round leads to the next
_FIRST_WEIGHTS = (0.02, 1.0)
_SHOWN = ("β = 1, plain matryoshka", "best β", "adaptive weights, one a level", "one weight a level", "credit, β = 1")
_NUMBERS = ("encoder_error", "decoder_error", "mse", "mcc")


class Make(Protocol):
    """Makes the config's SAE, initialised, with some arguments of its own."""

    def __call__(self, **arguments: Any) -> MatryoshkaSAE:
        """An SAE."""


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
        """``[points]``."""
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


class Scores(NamedTuple):
    """What came of some SAEs.

    Attributes:
        weights: Weight of each level at the end, ``[members, levels]``.
        encoder: Cosines of the parent's encoder with the features, ``[members, n]``.
        decoder: Cosines of its decoder row with them, ``[members, n]``.
        encoder_error: Length of the unit encoder's part off its own feature, ``[members]``; 0: a clean parent.
        decoder_error: The decoder row's, ``[members]``.
        mse: Squared error of the whole SAE, ``[members]``.
        mcc: Of all latents, ``[members]``.
    """

    weights: Array
    encoder: Array
    decoder: Array
    encoder_error: Array
    decoder_error: Array
    mse: Array
    mcc: Array

    def at(self, index: int) -> Scores:
        """One SAE's."""
        return Scores(*(part[index : index + 1] for part in self))

    def best(self) -> Scores:
        """The SAE's with the cleanest parent."""
        return self.at(int(np.nanargmin(self.encoder_error)))


class Balance(NamedTuple):
    """What :func:`find_balance` found.

    Attributes:
        betas: The grid, ``[points]``.
        curves: Scores over the grid, of the plain matryoshka SAE (``β``) and of that with full credit (``β, credit``).
        methods: Scores of single SAEs by method: fixed β, the best β, one weight a level, adaptive weights, credit.
    """

    betas: Array
    curves: dict[str, Scores]
    methods: dict[str, Scores]


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
        features = len(data.feature_directions)
        if self.parent >= features:
            raise UserError(f"parent: must be a feature, 0 to {features - 1}, got {self.parent}")

        def make(**arguments: Any) -> MatryoshkaSAE:
            return cast(MatryoshkaSAE, bench.make_sae(self.model, data, **arguments))

        with bench.progress(fits(self.search) * self.steps) as advance:
            found = find_balance(
                make, data, self.betas, self.steps, self.search, self.starts, self.parent, advance
            )  # fmt: skip
        metrics = {
            f"{method}/{name}": float(getattr(scores, name)[0])
            for method, scores in found.methods.items()
            for name in _NUMBERS
        }
        widest = max(map(len, found.methods))
        headline = [f"{len(found.methods)} methods"] + [
            f"{method:<{widest}}  encoder error {scores.encoder_error[0]:.4f}  decoder error {scores.decoder_error[0]:.4f}  "
            f"mse {scores.mse[0]:.2e}  weights {' '.join(f'{weight:.4g}' for weight in scores.weights[0])}"
            for method, scores in found.methods.items()
        ]
        tables = {"methods.csv": method_rows(found), "curves.csv": curve_rows(found)}
        return Outcome(metrics, tables, {"balance.png": self._figure(found)}, headline, step=self.steps)

    def _figure(self, found: Balance) -> Figure:
        """Error over β, and the parent's components."""
        features = next(iter(found.methods.values())).encoder.shape[1]
        children = [j for j in range(features) if j != self.parent]
        adaptive = {
            name: (float(scores.weights[0, 0]), float(scores.encoder_error[0]))
            for name, scores in found.methods.items()
            if name.startswith("adaptive weights from")
        }
        first = next(iter(adaptive))
        shown = [name for name in _SHOWN if name in found.methods]
        shown.insert(2, first)
        return balance_figure(
            found.betas,
            {name: curve.encoder_error for name, curve in found.curves.items()},
            {"adaptive weight, no ground truth used": adaptive[first]},
            {name: found.methods[name].encoder[0, children] for name in shown},
            [f"feature {j}" for j in children],
            "How clean is the parent's latent?",
        )


def method_rows(found: Balance) -> list[Row]:
    """A row for each method."""
    return [
        {
            "method": method,
            **{name: float(getattr(scores, name)[0]) for name in _NUMBERS},
            **{f"encoder_feature{j}": float(value) for j, value in enumerate(scores.encoder[0])},
            **{f"decoder_feature{j}": float(value) for j, value in enumerate(scores.decoder[0])},
            "level_weights": scores.weights[0].tolist(),
        }
        for method, scores in found.methods.items()
    ]


def curve_rows(found: Balance) -> list[Row]:
    """A row for each curve and β."""
    return [
        {"curve": curve, "beta": float(beta), **{name: float(getattr(scores, name)[i]) for name in _NUMBERS}}
        for curve, scores in found.curves.items()
        for i, beta in enumerate(found.betas)
    ]


def find_balance(
    make: Make,
    data: ToyDataModule,
    betas: BetaGrid,
    steps: int,
    search: WeightSearch | None = None,
    starts: Sequence[float] = (1.0,),
    parent: int = 0,
    report: Callable[[int], None] | None = None,
) -> Balance:
    """Train one SAE for each way to weight levels on the exact population, and measure the parent's latent.

    Args:
        make: Makes the SAEs.
        data: The hierarchy, in population mode.
        betas: Fixed β to try.
        steps: Optimiser steps of each SAE.
        search: How to look for one weight a level; None for not at all.
        starts: β from which adaptive weights start, each an SAE of its own; the first for one weight a level, too.
        parent: Number of the parent's feature, and of its latent.
        report: Called after each step with the number of ensemble steps taken since its last call.
    """
    batch, grid = data.batch("train", 0), betas.values()

    def train(members: Sequence[MatryoshkaSAE]) -> Scores:
        ensemble = EnsembleSAE(members)
        ensemble.fit(batch, steps, None if report is None else lambda _: report(1))
        return score(ensemble, batch, data, parent)

    plain = train([make(beta=beta) for beta in grid])
    place = int(np.nanargmin(plain.encoder_error))
    around = np.geomspace(grid[max(0, place - 1)], grid[min(len(grid) - 1, place + 1)], len(grid))
    at_one = train([make(beta=1.0), make(beta=0.0)])
    methods = {
        "β = 0, no inner levels": at_one.at(1),
        "β = 1, plain matryoshka": at_one.at(0),
        "best β": train([make(beta=beta) for beta in around]).best(),
    }
    if search is not None:
        methods["one weight a level"] = _search(make, search, train)
        methods["adaptive weights, one a level"] = train([make(levels=search.levels, beta=starts[0], adaptive=True)])
    adaptive = train([make(beta=beta, adaptive=True) for beta in starts])
    methods |= {f"adaptive weights from β = {start:g}": adaptive.at(i) for i, start in enumerate(starts)}
    credited = train([make(beta=beta, credit=1.0) for beta in grid])
    methods["credit, β = 1"] = train([make(beta=1.0, credit=1.0)])
    methods["credit, best β"] = credited.best()
    methods["credit, adaptive weights"] = train([make(beta=1.0, credit=1.0, adaptive=True)])
    return Balance(grid, {"β": plain, "β, credit": credited}, methods)


def fits(search: WeightSearch | None) -> int:
    """How many ensembles :func:`find_balance` trains."""
    return 7 + (search.rounds + 1 if search is not None else 0)


def score(ensemble: EnsembleSAE, batch: Batch, data: ToyDataModule, parent: int) -> Scores:
    """The scores of all members."""
    directions, folded = data.feature_directions, ensemble.folded()
    encoder = normalize(folded.W_enc[:, :, parent], dim=1) @ directions.T
    rows = normalize(folded.W_dec, dim=2) @ directions.T
    members = [cast(MatryoshkaSAE, ensemble.member(i)) for i in range(len(ensemble))]
    weights = [[float(weight) for weight in member.current_weights()] for member in members]
    with torch.no_grad():
        errors = torch.stack([member.loss(batch).error for member in members])
    assert batch.weight is not None
    return Scores(
        np.array(weights),
        encoder.double().numpy(),
        rows[:, parent].double().numpy(),
        _off(encoder, parent),
        _off(rows[:, parent], parent),
        (errors.square().sum(2) @ batch.weight.to(errors)).double().numpy(),
        np.array([float(mcc(cosines)) for cosines in rows]),
    )


def _off(cosines: torch.Tensor, own: int) -> Array:
    """Length of a unit vector's part off its own feature, ``[members]``; 1 where it points the other way."""
    along = cosines[:, own].double().clamp(0, 1)
    return np.asarray((1 - along.square()).sqrt().numpy())


def _search(make: Make, search: WeightSearch, train: Callable[[Sequence[MatryoshkaSAE]], Scores]) -> Scores:
    """The best of all rounds; the outermost level's weight is 1."""
    generator, inner = np.random.default_rng(0), len(search.levels) - 1
    low, high = map(math.log, _FIRST_WEIGHTS)
    tried, errors, found = np.empty((0, inner)), np.empty(0), []
    drawn = generator.uniform(low, high, (search.members, inner))
    for number in range(search.rounds):
        saes = [make(levels=search.levels) for _ in drawn]
        for sae, logarithms in zip(saes, drawn, strict=True):
            sae.level_weights = [*np.exp(logarithms).tolist(), 1.0]
        result = train(saes)
        found.append(result.best())
        tried, errors = np.concatenate([tried, drawn]), np.concatenate([errors, result.encoder_error])
        elite = tried[errors.argsort()[: search.members // _ELITE]]
        spread = 0.5 ** (number + 1) * (high - low) / 4
        drawn = elite[generator.integers(len(elite), size=len(drawn))] + generator.normal(size=drawn.shape) * spread
    return min(found, key=lambda one: float(one.encoder_error[0]))
