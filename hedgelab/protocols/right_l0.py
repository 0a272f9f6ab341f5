"""``hedgelab l0``: at which L0 do latents mix least?

An SAE whose L0 is too low mixes correlated features into its latents, whatever its width; one whose L0 is too high finds
degenerate ways to use it up (Chanin & Garriga-Alonso, *Sparse but Wrong*, arXiv 2508.16560). SAEs that differ in L0 alone are
trained on one stream, and two measures that know no truth are lowest where L0 is right: the *n-th decoder projection*
(:func:`~hedgelab.metrics.functional.projection.nth_decoder_projection`) and the *mean pairwise cosine* of live decoder rows.
Where the features are known, as in toys, so is the right L0: how many of the ``d_sae`` most frequent ones fire, on average.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError, whole_number
from hedgelab.identity import deciding
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import ExplainedVariance
from hedgelab.metrics.functional.projection import nth_decoder_projection, usual_n
from hedgelab.metrics.functional.recovery import decoder_cosines, decoder_geometry
from hedgelab.plots.hedging import measures_over_l0
from hedgelab.protocols.phase_data import PhaseData
from hedgelab.protocols.planting.statistics import mean_interval
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Row, Study
from hedgelab.protocols.training_phases import Phase, PhaseRunner
from hedgelab.saes import SAE

MEASURES = {"projection": "n-th decoder projection", "cosine": "mean pairwise cosine"}


@dataclass(frozen=True)
class L0Options:
    """Size of a search.

    Attributes:
        values: Wanted L0s, rising: ``k`` of SAEs that select latents, ``target_l0`` of those that pay for them.
        steps: Optimiser steps of each SAE.
        seeds: SAEs of every L0, of different weights.
        n: Which decoder projection; null is 3/8 of d_sae. It should lie above the right L0, and at most at half of d_sae.
        batches: Validation batches that are measured on.
        checkpoint_steps: Steps from checkpoint to checkpoint; a stopped search goes on from the last.
    """

    values: list[float]
    steps: int
    seeds: int = 3
    n: int | None = None
    batches: int = 16
    checkpoint_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "batches", "checkpoint_steps"):
            whole_number(f"l0.{name}", getattr(self, name))
        if len(self.values) < 3 or self.values != sorted(set(self.values)) or not self.values[0] > 0:
            raise UserError(f"l0.values: must be three or more rising numbers above 0, got {self.values}")


@dataclass(eq=False)
class RightL0(Study):
    """Find the L0 at which latents mix least.

    Args:
        data: The activations.
        model: The SAE; its ``k`` or ``target_l0`` is filled in.
        l0: Size of the search.
    """

    experiment = "l0"
    example = "configs/toy/right_l0.yaml"

    data: Recipe[ActivationDataModule]
    model: Recipe[SAE]
    l0: L0Options

    def run(self, bench: Bench) -> Outcome:
        """Train SAEs of every L0 and seed on one stream, measure them, and look for the minima."""
        options, data = self.l0, self.data(seed=bench.seed)
        places = list(product(options.values, range(options.seeds)))
        first = self.make_sae(options.values[0], bench.seed, data.d_in)  # mistakes show before anything is trained
        d_sae = first.d_sae
        n = usual_n(d_sae) if options.n is None else options.n
        if not 1 <= n <= d_sae:
            raise UserError(f"l0.n: must be from 1 to d_sae = {d_sae}, got {n}")
        common: dict[str, Any] = {"seed": bench.seed, "steps": options.steps}
        common |= {key: deciding({key: getattr(self, key).plain}) for key in ("data", "model")}
        phases = [
            Phase(
                f"l0={value:g}/seed={seed}", {**common, "l0": value, "weights": seed},
                partial(self.make_sae, value, bench.seed + seed, data.d_in), bench.tracker,
            )
            for value, seed in places
        ]  # fmt: skip
        try:
            runner = PhaseRunner.of_study(options.steps, options.checkpoint_steps)
            trained = runner.train(phases, PhaseData(data, 0, options.steps))
            rows: list[Row] = [
                {"wanted_l0": value, "seed": seed, **measured(trained[phase.name], data, n, options.batches)}
                for (value, seed), phase in zip(places, phases, strict=True)
            ]
            right = true_l0(data, d_sae, options.batches)
        finally:
            data.teardown("fit")
        metrics = {} if right is None else {"l0/right": right}
        headline = [] if right is None else [f"right L0 of these features and {d_sae} latents: {right:.2f}"]
        for key, title in MEASURES.items():
            curves = ([(row["l0"], row[key]) for row in rows if row["seed"] == seed] for seed in range(options.seeds))
            found = [lowest(*np.transpose(curve)) for curve in curves]
            best, low, high, _ = mean_interval(found)
            metrics |= {f"l0/{key}": best, f"l0/{key}_low": low, f"l0/{key}_high": high}
            line = f"lowest {title}: L0 {best:.2f} ({low:.2f} to {high:.2f})"
            ends = [row["l0"] for row in rows if row["wanted_l0"] in (options.values[0], options.values[-1])]
            if not set(ends).isdisjoint(found):
                line += "; of a seed at the end of l0.values: go beyond it"
            headline.append(line)
        figure = measures_over_l0(rows, MEASURES, metrics, right)
        return Outcome(metrics, {"l0.csv": rows}, {"l0.png": figure}, headline, step=options.steps)

    def make_sae(self, value: float, seed: int, d_in: int) -> SAE:
        """An untrained SAE that wants this L0."""
        recipe = self.model.with_weights_seed(seed)
        arguments = recipe.flat_arguments
        if "k" in arguments:
            if not float(value).is_integer():
                raise UserError(f"l0.values: k must be whole, got {value}")
            arguments["k"] = int(value)
        else:
            arguments["target_l0"] = float(value)
        return recipe(d_in=d_in)


@torch.no_grad()
def measured(sae: SAE, data: ActivationDataModule, n: int, batches: int) -> dict[str, float]:
    """Both measures of an SAE on so many validation batches, its L0 and explained variance.

    Where features are known, ``nearest_feature`` is the mean over live latents of the largest cosine with one.
    """
    explained, fired, projections = ExplainedVariance(sae.d_in), torch.zeros(sae.d_sae), 0.0
    for index in range(batches):
        x = data.batch("val", index).x.to(sae.W_dec.device)
        codes = sae.encode(x)
        fired += codes.firing_counts().cpu()
        explained.update(x, sae.decode(codes))
        projections += float(nth_decoder_projection(x, sae.W_dec, sae.b_dec, n))
    live = fired > 0
    found = {
        "l0": float(fired.sum()) / (batches * data.batch_size),
        "projection": projections / batches,
        "cosine": float(decoder_geometry(sae.W_dec.cpu(), live).mean_absolute),
        "explained_variance": float(explained.compute()),
        "dead_fraction": float((~live).double().mean()),
    }
    if (directions := data.feature_directions) is not None:
        found["nearest_feature"] = float(decoder_cosines(sae.W_dec.cpu(), directions.cpu()).abs().amax(1)[live].mean())
    return found


def true_l0(data: ActivationDataModule, d_sae: int, batches: int) -> float | None:
    """How many of the ``d_sae`` most frequent known features fire, on average; None where features are not known."""
    fired, examples = torch.zeros(()), 0
    for index in range(batches):
        if (features := data.batch("val", index).features) is None:
            return None
        examples += data.batch_size
        counts = features.firing_counts() if isinstance(features, Codes) else (features != 0).sum(0)
        fired = fired + counts.double().cpu()
    return float(fired.sort(descending=True).values[:d_sae].sum()) / examples


def lowest(l0: ArrayLike, values: ArrayLike) -> float:
    """Where the lowest of some values lies: the vertex of the parabola, in log L0, through it and its two neighbours.

    >>> round(lowest([1.0, 2.0, 4.0, 8.0], [3.0, 1.0, 1.0, 3.0]), 3)
    2.828
    >>> lowest([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])  # at an end: the end
    1.0
    """
    at, values = np.asarray(l0, dtype=np.float64), np.asarray(values, dtype=np.float64)
    order = np.argsort(at)
    at, values = at[order], values[order]
    place = int(np.argmin(values))
    if not 0 < place < len(values) - 1:
        return float(at[place])
    near = slice(place - 1, place + 2)
    curve = np.polynomial.Polynomial.fit(np.log(at[near]), values[near], 2)
    return float(np.exp(curve.deriv().roots()[0].real))
