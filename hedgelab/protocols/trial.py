"""``hedgelab trial``: how well do the hedging degree and residual hedging rank SAEs by the hedging that toys let one see?

For every kind of SAE and every width the SAEs of all toys and seeds train as one ensemble, through the phases of SPEC section 5
(initial, then control and extended, with the learning rate falling to zero), and the control is measured: *true hedging*
(:mod:`hedgelab.metrics.functional.true_hedging`, decoder, mean over live latents) beside the two measures that know no truth.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, PolynomialLR

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import CopulaFiring, ToyDataModule
from hedgelab.errors import UserError, whole_number
from hedgelab.metrics import FeatureRegression, ResidualHedgingMetric
from hedgelab.metrics.functional.degree import hedging_degree
from hedgelab.metrics.functional.recovery import decoder_cosines
from hedgelab.metrics.functional.true_hedging import (
    FIRINGS,
    RegressionSums,
    decoder_coordinates,
    hedging,
    regressed_hedging,
    tracked_features,
)
from hedgelab.plots.hedging import hedging_of_levels, hedging_over_width, measures_against_truth
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Study
from hedgelab.saes import SAE, MatryoshkaSAE, widen
from hedgelab.saes.widen import flat_part

_MEASURES = {"residual hedging": "residual_hedging", "hedging degree": "degree"}
Make = Callable[[str, int, int], SAE]
"""An untrained SAE of a kind, a width and a seed."""


@dataclass(frozen=True)
class TrialOptions:
    """Size of a trial.

    Attributes:
        widths: Widths of the SAEs.
        seeds: SAEs of every kind, width and toy.
        steps: Optimiser steps of phase one.
        continued_steps: Optimiser steps of the control and of the extended SAE.
        n_new: Latents appended.
        new_norm: Decoder norm at which they start.
        val_batches: Batches that are measured on.
    """

    widths: list[int]
    seeds: int = 2
    steps: int = 1500
    continued_steps: int = 1000
    n_new: int = 16
    new_norm: float = 1.0
    val_batches: int = 64

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "continued_steps", "n_new", "val_batches"):
            whole_number(f"trial.{name}", getattr(self, name))
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"trial.widths: must be widths of at least 1, got {self.widths}")


class TrialScore(NamedTuple):
    """One SAE of a trial.

    True hedging is the mean over live latents, from the known features; ``tracked`` counts the features that a latent tracks;
    ``levels`` holds :func:`level_hedging` and is empty for SAEs without levels.
    """

    kind: str
    width: int
    toy: str
    seed: int
    true_hedging: float
    residual_hedging: float
    residual_std: float
    degree: float
    tracked: int
    levels: tuple[float, ...] = ()


class Trial(Study):
    """Judge measures of hedging on toys that know the truth.

    Args:
        data: What all toys have in common; its firing is a CopulaFiring.
        toys: Arguments of the firing by toy.
        kinds: SAEs by kind. Width, levels (a quarter, a half, all of it) and a k of null are filled in: k becomes the mean
            number of the most frequent features, as many as latents, that fire.
        trial: Size of the trial.

    Raises:
        UserError: No toys, no kinds, or one of them refuses its arguments.
    """

    experiment = "trial"
    example = "configs/toy/degree_trial.yaml"

    def __init__(
        self,
        data: Recipe[ActivationDataModule],
        toys: dict[str, dict[str, Any]],
        kinds: dict[str, Recipe[SAE]],
        trial: TrialOptions,
    ) -> None:
        for key, given in (("toys", toys), ("kinds", kinds)):
            if not given:
                raise UserError(f"{key}: missing; see {self.example}")
        self.data, self.toys, self.kinds, self.options = data, toys, kinds, trial

    def run(self, bench: Bench) -> Outcome:
        """Train and measure every SAE."""
        options = self.options
        toys = {name: self.make_toy(name, bench.seed) for name in self.toys}
        first = next(iter(toys.values()))

        def make(kind: str, width: int, seed: int) -> SAE:
            recipe = self.sized(kind, width, first).with_weights_seed(bench.seed + seed)
            return recipe(d_in=first.d_in)  # initialised on its own toy, by run_trial

        for width in options.widths:
            for kind in self.kinds:
                make(kind, width, 0)  # mistakes show before anything is trained
        total = len(options.widths) * len(self.kinds) * (options.steps + 2 * options.continued_steps)
        with bench.progress(total):
            scores = run_trial(bench, toys, list(self.kinds), make, options)
        ranks = {
            label: {kind: agreement([score for score in scores if score.kind == kind], name) for kind in self.kinds}
            for label, name in _MEASURES.items()
        }
        metrics = {
            f"spearman/{_MEASURES[label]}/{kind}": rank for label in ranks for kind, rank in ranks[label].items()
        }
        headline = [f"{len(scores)} SAEs; Spearman's rank correlation with true hedging"]
        headline += [
            f"{label:<18}" + "".join(f"  {kind} {rank:.3f}" for kind, rank in own.items())
            for label, own in ranks.items()
        ]
        rows = [score._asdict() for score in scores]
        return Outcome(metrics, {"table.csv": rows}, self._figures(scores, ranks), headline, step=total)

    def make_toy(self, name: str, seed: int) -> ToyDataModule:
        """A toy: the shared section with this one's arguments of the firing.

        Raises:
            UserError: Not a toy with copula firing, or arguments that this refuses.
        """
        section = self.data.plain()
        section["init_args"]["firing"]["init_args"].update(self.toys[name])
        data = Recipe(ActivationDataModule, section, f"toys.{name}")(seed=seed)
        if not isinstance(data, ToyDataModule) or not isinstance(data.firing, CopulaFiring):
            raise UserError("data: a trial needs a ToyDataModule with CopulaFiring")
        return data

    def sized(self, kind: str, width: int, toy: ToyDataModule) -> Recipe[SAE]:
        """The recipe of an SAE of a kind, with all that its width decides."""
        section = self.kinds[kind].plain()
        arguments = section.setdefault("init_args", {})
        flat = arguments.get("inner", section).setdefault("init_args", {})
        flat["d_sae"] = width
        if flat is not arguments:
            arguments["levels"] = sorted({max(1, width // 4), max(1, width // 2), width})
        if flat.get("k", 0) is None:
            firing = toy.firing
            assert isinstance(firing, CopulaFiring)
            flat["k"] = max(1, round(float(firing.rates().sort(descending=True).values[:width].sum())))
        return Recipe(SAE, section, self.kinds[kind].key)

    def _figures(self, scores: Sequence[TrialScore], ranks: dict[str, dict[str, float]]) -> dict[str, Figure]:
        """Measures against the truth, the truth over widths, and where there are levels, over them."""
        kinds, toys, widths = self.kinds, self.toys, sorted(set(self.options.widths))
        of = {(k, t): [s for s in scores if (s.kind, s.toy) == (k, t)] for k in kinds for t in toys}
        points = {
            label: {k: {t: [(s.true_hedging, getattr(s, name)) for s in of[k, t]] for t in toys} for k in kinds}
            for label, name in _MEASURES.items()
        }
        curves = {
            k: {t: {w: [s.true_hedging for s in of[k, t] if s.width == w] for w in widths} for t in toys} for k in kinds
        }
        figures = {
            "against_truth.png": measures_against_truth(points, ranks),
            "widths.png": hedging_over_width(curves),
        }
        if nested := [score for score in scores if score.levels]:
            by_level = {
                t: {w: zip(*(s.levels for s in nested if (s.toy, s.width) == (t, w)), strict=True) for w in widths}
                for t in toys
            }
            levels = {
                t: {w: [statistics.fmean(seeds) for seeds in one] for w, one in own.items()}
                for t, own in by_level.items()
            }
            figures["levels.png"] = hedging_of_levels(levels)
        return figures


def agreement(scores: Sequence[TrialScore], measure: str) -> float:
    """Spearman's rank correlation of a measure (a field of :class:`TrialScore`) with true hedging."""
    result = spearmanr([getattr(score, measure) for score in scores], [score.true_hedging for score in scores])
    return float(result.statistic)


def run_trial(
    bench: Bench, toys: Mapping[str, ToyDataModule], kinds: Sequence[str], make: Make, options: TrialOptions
) -> list[TrialScore]:
    """Train and measure an SAE of every kind and width for every toy (all of one ``d_in`` and batch size) and seed."""
    places = [(toy, seed) for seed in range(options.seeds) for toy in toys]
    of_member = torch.tensor([list(toys).index(toy) for toy, _ in places])
    steps = options.steps + options.continued_steps
    # Training batches of all toys, [toys, steps, batch, d_in]: every ensemble sees the same.
    stream = torch.stack([torch.stack([toy.batch("train", step).x for step in range(steps)]) for toy in toys.values()])

    def train(saes: Sequence[SAE], x: Tensor, schedule: Callable[[Optimizer], LRScheduler] | None) -> list[SAE]:
        for sae in saes:
            sae.lr_scheduler = flat_part(sae).lr_scheduler = schedule
        ensemble = bench.train(saes, lambda step: Batch(x[:, step][of_member]), x.shape[1])
        return [ensemble.member(index) for index in range(len(saes))]

    def score_all(kind: str, width: int) -> list[TrialScore]:
        saes = [make(kind, width, seed) for _, seed in places]
        for sae, (toy, _) in zip(saes, places, strict=True):
            sae.initialize(toys[toy].batch("train", 0), toys[toy].feature_directions)
        initial = train(saes, stream[:, : options.steps], None)
        decay = partial(PolynomialLR, total_iters=options.continued_steps)
        wide = [
            widen(sae, options.n_new, options.new_norm, seed) for sae, (_, seed) in zip(initial, places, strict=True)
        ]
        controls, extended = (train(members, stream[:, options.steps :], decay) for members in (initial, wide))
        return [
            _score(kind, width, toy, seed, toys[toy], control, extension, options)
            for (toy, seed), control, extension in zip(places, controls, extended, strict=True)
        ]

    return [score for width in options.widths for kind in kinds for score in score_all(kind, width)]


@torch.no_grad()
def _score(
    kind: str, width: int, toy: str, seed: int, data: ToyDataModule, control: SAE, extended: SAE, options: TrialOptions
) -> TrialScore:
    directions = data.feature_directions
    overlap = len(directions) > data.d_in
    metric, counts = ResidualHedgingMetric(control.W_dec), FeatureRegression(width, len(directions))
    fired, fired_extended = torch.zeros(width), torch.zeros(width + options.n_new)
    for index in range(options.val_batches):
        x, features, _ = data.batch("val", index)
        assert features is not None
        codes = control.encode(x)
        metric.update(x, control.decode(codes), codes)
        if overlap:
            counts.update(codes, features)
        fired += codes.firing_counts()
        fired_extended += extended.encode(x).firing_counts()
    live = fired > 0
    sums = counts.compute() if overlap else None
    true = true_hedging(control.W_dec, directions, fired, sums)
    degree = hedging_degree(
        control.W_dec, extended.W_dec, live=live & (fired_extended[:width] > 0), live_new=fired_extended[width:] > 0, seed=seed
    )  # fmt: skip
    residual = metric.compute()
    levels = level_hedging(control, directions, fired, sums) if isinstance(control, MatryoshkaSAE) else ()
    tracked = tracked_features(decoder_cosines(control.W_dec, directions), live)
    return TrialScore(
        kind, width, toy, seed,
        true_hedging=float(true[live].nanmean()),
        residual_hedging=float(residual.hedging),
        residual_std=float(residual.std),
        degree=float(degree.degree),
        tracked=int((tracked.feature >= 0).sum()),
        levels=levels,
    )  # fmt: skip


def level_hedging(
    sae: MatryoshkaSAE, directions: Tensor, fired: Tensor, sums: RegressionSums | None = None
) -> tuple[float, ...]:
    """True hedging of each level's own latents, innermost first: along features that no latent of *their prefix* tracks.

    An inner level must reconstruct without the latents that come after it, so it hedges on features that those track.
    ``fired`` counts firings of each latent; ``sums``, of the regression of features on codes, are given where features overlap.
    """
    values = []
    for own in sae.level_slices():
        prefix = None if sums is None else sums.first(own.stop)
        true = true_hedging(sae.W_dec[: own.stop], directions, fired[: own.stop], prefix)
        values.append(float(true[own][fired[own] > 0].nanmean()))
    return tuple(values)


def true_hedging(W_dec: Tensor, directions: Tensor, fired: Tensor, sums: RegressionSums | None) -> Tensor:
    """True hedging of each latent, ``[d_sae]``: of the decoder, or by regression where sums are given."""
    cosines, live = decoder_cosines(W_dec, directions), fired > 0
    tracked = tracked_features(cosines, live)
    if sums is not None:
        return regressed_hedging(sums, W_dec, directions, cosines, tracked, fired >= FIRINGS).norm
    return hedging(decoder_coordinates(W_dec, directions), cosines, tracked, live).norm
