"""``hedgelab balance``: which weighting of a matryoshka SAE's levels leaves the parent's encoder at its true feature?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError, whole_number
from hedgelab.metrics.functional import mcc
from hedgelab.plots.theory import balance_figure
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Row, Study, make_toy
from hedgelab.saes import SAE, MatryoshkaSAE
from hedgelab.tracking.listing import aligned

_ELITE = 8  # one in eight of a round leads to the next
_FIRST_WEIGHTS = (0.02, 1.0)
Train = Callable[[Sequence[dict[str, Any]]], list[Row]]
_NUMBERS = ("encoder_error", "decoder_error", "mse", "mcc")
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
        whole_number("betas.points", self.points, 3)

    def values(self) -> NDArray[np.float64]:
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
        whole_number("search.members", self.members, _ELITE)
        whole_number("search.rounds", self.rounds)


@dataclass(eq=False)
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
    """

    experiment = "theory"
    example = "configs/theory/balance.yaml"

    data: Recipe[ActivationDataModule]
    model: Recipe[SAE]
    betas: BetaGrid = BetaGrid()
    search: WeightSearch | None = None
    starts: list[float] = field(default_factory=lambda: [1.0])
    parent: int = 0
    steps: int = 2000

    def __post_init__(self) -> None:
        if self.model.class_name != "MatryoshkaSAE":
            raise UserError(f"model: must be a MatryoshkaSAE, got {self.model.class_name}")
        if not self.starts or min(self.starts) <= 0:
            raise UserError(f"starts: needs values of β above 0, got {self.starts}")
        whole_number("steps", self.steps)
        whole_number("parent", self.parent, 0)

    def run(self, bench: Bench) -> Outcome:
        """Train, measure, draw."""
        data = make_toy(self.data, "data", population=True)
        features = len(data.feature_directions)
        if self.parent >= features:
            raise UserError(f"parent: must be a feature, 0 to {features - 1}, got {self.parent}")

        train = partial(self._train, bench, data)
        ensembles = 7 if self.search is None else 8 + self.search.rounds
        with bench.progress(ensembles * self.steps):
            curves, methods = self._find(train)
        metrics = {f"{method}/{name}": one[name] for method, one in methods.items() for name in _NUMBERS}
        lines = [
            [
                method, f"encoder error {one['encoder_error']:.4f}", f"decoder error {one['decoder_error']:.4f}",
                f"mse {one['mse']:.2e}", f"weights {' '.join(f'{weight:.4g}' for weight in one['level_weights'])}",
            ]
            for method, one in methods.items()
        ]  # fmt: skip
        rows = [{"method": method, **one} for method, one in methods.items()]
        curve_rows = [
            {"curve": curve, "beta": float(beta), **{name: one[name] for name in _NUMBERS}}
            for curve, found in curves.items()
            for beta, one in zip(self.betas.values(), found, strict=True)
        ]
        adapted = f"adaptive weights from β = {self.starts[0]:g}"
        shown = [*_SHOWN[:2], adapted, *(name for name in _SHOWN[2:] if name in methods)]
        start = methods[adapted]
        children = [j for j in range(features) if j != self.parent]
        figure = balance_figure(
            self.betas.values(),
            {name: [one["encoder_error"] for one in found] for name, found in curves.items()},
            {"adaptive weight, no ground truth used": (start["level_weights"][0], start["encoder_error"])},
            {name: [methods[name][f"encoder_feature{j}"] for j in children] for name in shown},
            [f"feature {j}" for j in children],
            "How clean is the parent's latent?",
        )
        return Outcome(
            metrics, {"methods.csv": rows, "curves.csv": curve_rows}, {"balance.png": figure},
            [f"{len(methods)} methods", *aligned(lines).splitlines()], step=self.steps,
        )  # fmt: skip

    def _find(self, train: Train) -> tuple[dict[str, list[Row]], dict[str, Row]]:
        """Train an SAE for each way to weight levels: curves over the grid of β, and the scores of a single SAE by method."""
        grid = self.betas.values()
        plain = train([{"beta": beta} for beta in grid])
        place = plain.index(_best(plain))
        around = np.geomspace(grid[max(0, place - 1)], grid[min(len(grid) - 1, place + 1)], len(grid))
        at_one, at_zero = train([{"beta": 1.0}, {"beta": 0.0}])
        methods = {
            "β = 0, no inner levels": at_zero,
            "β = 1, plain matryoshka": at_one,
            "best β": _best(train([{"beta": beta} for beta in around])),
        }
        if self.search is not None:
            methods["one weight a level"] = _search(self.search, train)
            one_a_level = {"levels": self.search.levels, "beta": self.starts[0], "adaptive": True}
            (methods["adaptive weights, one a level"],) = train([one_a_level])
        adaptive = train([{"beta": beta, "adaptive": True} for beta in self.starts])
        for start, one in zip(self.starts, adaptive, strict=True):
            methods[f"adaptive weights from β = {start:g}"] = one
        credited = train([{"beta": beta, "credit": 1.0} for beta in grid])
        (methods["credit, β = 1"],) = train([{"beta": 1.0, "credit": 1.0}])
        methods["credit, best β"] = _best(credited)
        (methods["credit, adaptive weights"],) = train([{"beta": 1.0, "credit": 1.0, "adaptive": True}])
        return {"β": plain, "β, credit": credited}, methods

    def _train(self, bench: Bench, data: ToyDataModule, members: Sequence[dict[str, Any]]) -> list[Row]:
        """Train the SAE side by side with each of some arguments, or level weights, of its own, and score each.

        ``encoder_error`` is the length of the parent's unit encoder off its own feature (0: a clean parent), ``decoder_error``
        that of its decoder row; beside them stand the cosines of both with each feature, and the levels' weights at the end.
        """
        parent, directions, batch = self.parent, data.feature_directions, data.batch("train", 0)
        assert batch.weight is not None
        saes = []
        for arguments in members:
            weights = arguments.pop("level_weights", None)
            saes.append(sae := cast(MatryoshkaSAE, bench.make_sae(self.model, data, **arguments)))
            sae.level_weights = weights or sae.level_weights
        ensemble = bench.train(saes, batch, self.steps)
        folded = ensemble.folded()
        encoders = (normalize(folded.W_enc[:, :, parent], dim=1) @ directions.T).double()
        rows = normalize(folded.W_dec, dim=2) @ directions.T
        found: list[Row] = []
        for i in range(len(saes)):
            member = cast(MatryoshkaSAE, ensemble.member(i))
            with torch.no_grad():
                error = member.loss(batch).error
            parts = {"encoder": encoders[i], "decoder": rows[i, parent].double()}
            off = {f"{part}_error": float((1 - v[parent].clamp(0, 1).square()).sqrt()) for part, v in parts.items()}
            mse = float(error.square().sum(1) @ batch.weight.to(error))
            cosines = {f"{part}_feature{j}": one for part, v in parts.items() for j, one in enumerate(v.tolist())}
            final = [float(weight) for weight in member.current_weights()]
            found.append({**off, "mse": mse, "mcc": float(mcc(rows[i])), **cosines, "level_weights": final})
        return found


def _best(found: Sequence[Row]) -> Row:
    """The scores of the SAE with the cleanest parent."""
    return min(found, key=lambda one: math.inf if math.isnan(one["encoder_error"]) else one["encoder_error"])


def _search(search: WeightSearch, train: Train) -> Row:
    """The best of all rounds; the outermost level's weight is 1."""
    generator, inner = np.random.default_rng(0), len(search.levels) - 1
    low, high = map(math.log, _FIRST_WEIGHTS)
    drawn = generator.uniform(low, high, (search.members, inner))
    tried, found = np.empty((0, inner)), list[Row]()
    for number in range(search.rounds):
        found += train([{"levels": search.levels, "level_weights": [*row, 1.0]} for row in np.exp(drawn).tolist()])
        tried = np.concatenate([tried, drawn])
        elite = tried[np.argsort([one["encoder_error"] for one in found])[: search.members // _ELITE]]
        width = 0.5 ** (number + 1) * (high - low) / 4
        drawn = elite[generator.integers(len(elite), size=len(drawn))] + generator.normal(size=drawn.shape) * width
    return _best(found)
