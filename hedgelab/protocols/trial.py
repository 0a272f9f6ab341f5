"""``hedgelab trial``: how well do the hedging degree and residual hedging rank SAEs by the hedging that toys let one see?

For every kind of SAE and every width the SAEs of all toys and seeds train as one ensemble, through the phases of SPEC section 5
(initial, then control and extended, with the learning rate falling to zero), and the control is measured: *true hedging*
(:mod:`hedgelab.metrics.functional.true_hedging`, decoder, mean over live latents) beside measures that know no truth.

Every score of every suite of ``hedgelab evaluate`` that runs on toys is seen through the three lenses of Chanin (*Are SAE
Benchmarks Reliable?*, arXiv 2605.18229). *Validity* is its rank correlation with the truth; *noise* how far two measurements on
other batches are apart, as a standard error of one over the mean absolute value; *discriminability* the spread between SAEs
over that error. *Claimed* is the standard error that the suite itself reports, over the one found.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor
from torch.optim.lr_scheduler import PolynomialLR

from hedgelab.batch import Batch
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.toy import CopulaFiring, ToyDataModule
from hedgelab.errors import UserError, whole_number
from hedgelab.metrics import FeatureRegression
from hedgelab.metrics.functional import true_hedging as truth
from hedgelab.metrics.functional.degree import hedging_degree
from hedgelab.metrics.functional.recovery import decoder_cosines
from hedgelab.plots.hedging import hedging_of_levels, hedging_over_width, measures_against_truth
from hedgelab.protocols.evaluation.built_in import DensitySuite, GeometrySuite, ResidualSuite, TruthSuite
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.protocols.evaluation.suite import NOISE
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Row, Study
from hedgelab.saes import SAE, MatryoshkaSAE, widen
from hedgelab.saes.widen import flat_part

_MEASURES = {
    "residual hedging": "residual/hedging",
    "hedging degree": "degree",
    "n-th decoder projection": "geometry/nth_projection",
    "pairwise cosine": "geometry/mean_absolute_cosine",
}
"""Those that are drawn and named in the summary; the others are in the table of lenses."""
_APART = "_apart"
"""Ends the name of how far two measurements of a score are apart."""


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
        val_batches: Batches of each of the two measurements.
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


@dataclass(eq=False)
class Trial(Study):
    """Judge measures of hedging on toys that know the truth.

    Args:
        data: What all toys have in common; its firing is a CopulaFiring.
        toys: Arguments of the firing by toy; with ``data.`` before their names, of the DataModule.
        kinds: SAEs by kind. Width, levels (a quarter, a half, all of it) and a k of null are filled in: k becomes the mean
            number of the most frequent features, as many as latents, that fire.
        trial: Size of the trial.
    """

    experiment = "trial"
    example = "configs/toy/degree_trial.yaml"

    data: Recipe[ActivationDataModule]
    toys: dict[str, dict[str, Any]]
    kinds: dict[str, Recipe[SAE]]
    trial: TrialOptions

    def __post_init__(self) -> None:
        for key in ("toys", "kinds"):
            if not getattr(self, key):
                raise UserError(f"{key}: missing; see {self.example}")

    def run(self, bench: Bench) -> Outcome:
        """Train and measure every SAE."""
        options, kinds = self.trial, self.kinds
        toys = {name: self.make_toy(name, bench.seed) for name in self.toys}
        for width, kind in product(options.widths, kinds):
            self.make_sae(kind, width, 0, toys)  # mistakes show before anything is trained
        total = len(options.widths) * len(kinds) * (options.steps + 2 * options.continued_steps)
        with bench.progress(total):
            scores = self.train_and_measure(bench, toys)

        def some(**fields: Any) -> list[Row]:
            return [s for s in scores if all(s[name] == value for name, value in fields.items())]

        names = dict.fromkeys(
            key for row in scores for key in row if key == "degree" or ("/" in key and not key.endswith(_APART))
        )
        lenses = [of_measure(kind, name, some(kind=kind)) for name in names if not name.endswith(NOISE) for kind in kinds]
        widths = sorted(set(options.widths))
        validity = {(row["kind"], row["measure"]): row["validity"] for row in lenses}
        ranks = {label: {k: validity[k, name] for k in kinds} for label, name in _MEASURES.items()}
        points = {
            label: {k: {t: [(s["true_hedging"], s[name]) for s in some(kind=k, toy=t)] for t in toys} for k in kinds}
            for label, name in _MEASURES.items()
        }
        curves = {
            k: {t: {w: [s["true_hedging"] for s in some(kind=k, toy=t, width=w)] for w in widths} for t in toys} for k in kinds
        }
        figures = {"against_truth.png": measures_against_truth(points, ranks), "widths.png": hedging_over_width(curves)}
        if any(score["levels"] for score in scores):
            of = {(t, w): [s["levels"] for s in some(toy=t, width=w) if s["levels"]] for t in toys for w in widths}
            levels = {t: {w: np.mean(of[t, w], axis=0).tolist() for w in widths} for t in toys}
            figures["levels.png"] = hedging_of_levels(levels)
        known = [row for row in lenses if np.isfinite(row["validity"])]
        metrics = {f"spearman/{row['measure']}/{row['kind']}": row["validity"] for row in known}
        headline = [f"{len(scores)} SAEs; Spearman's rank correlation with true hedging"]
        for label, own in ranks.items():
            headline.append(f"{label:<24}" + "".join(f"  {kind} {rank:.3f}" for kind, rank in own.items()))
        return Outcome(metrics, {"table.csv": scores, "lenses.csv": lenses}, figures, headline, step=total)

    def make_toy(self, name: str, seed: int) -> ToyDataModule:
        """A toy: the shared section with this one's own arguments."""
        places = {key: key if key.startswith("data.") else f"data.firing.init_args.{key}" for key in self.toys[name]}
        own = {places[key].replace("data.", "data.init_args.", 1): value for key, value in self.toys[name].items()}
        recipe = self.data.at(own)
        recipe.key = f"toys.{name}"
        data = recipe(seed=seed)
        if not isinstance(data, ToyDataModule) or not isinstance(data.firing, CopulaFiring):
            raise UserError("data: a trial needs a ToyDataModule with CopulaFiring")
        return data

    def make_sae(self, kind: str, width: int, seed: int, toys: Mapping[str, ToyDataModule]) -> SAE:
        """An untrained SAE of a kind, with all that its width decides."""
        first, recipe = next(iter(toys.values())), self.kinds[kind].with_weights_seed(seed)
        flat, arguments = recipe.flat_arguments, recipe.section["init_args"]
        flat["d_sae"] = width
        if flat is not arguments:
            arguments["levels"] = sorted({max(1, width // 4), max(1, width // 2), width})
        if flat.get("k", 0) is None:
            rates = cast(CopulaFiring, first.firing).rates().sort(descending=True).values
            flat["k"] = max(1, round(float(rates[:width].sum())))
        return recipe(d_in=first.d_in)

    def train_and_measure(self, bench: Bench, toys: Mapping[str, ToyDataModule]) -> list[Row]:
        """An SAE of every kind and width for every toy (all of one ``d_in`` and batch size) and seed."""
        options = self.trial
        places = [(toy, seed) for seed in range(options.seeds) for toy in toys]
        of_member = torch.tensor([list(toys).index(toy) for toy, _ in places])
        steps = range(options.steps + options.continued_steps)
        # Training batches of all toys, [toys, steps, batch, d_in]: every ensemble sees the same.
        batches = ([toy.batch("train", step).x.cpu() for step in steps] for toy in toys.values())
        stream = torch.stack([torch.stack(own) for own in batches])

        def train(saes: Sequence[SAE], x: Tensor, decays: bool) -> list[SAE]:
            schedule = partial(PolynomialLR, total_iters=options.continued_steps) if decays else None
            for sae in saes:
                sae.lr_scheduler = flat_part(sae).lr_scheduler = schedule
            ensemble = bench.train(saes, lambda step: Batch(x[:, step][of_member]), x.shape[1])
            return [ensemble.member(index) for index in range(len(saes))]

        scores: list[Row] = []
        for width, kind in product(options.widths, self.kinds):
            saes = [self.make_sae(kind, width, bench.seed + seed, toys) for _, seed in places]
            for sae, (toy, _) in zip(saes, places, strict=True):
                sae.initialize(toys[toy].batch("train", 0).to("cpu"), toys[toy].feature_directions)
            controls = train(saes, stream[:, : options.steps], decays=False)
            start = zip(controls, places, strict=True)
            wide = [widen(sae, options.n_new, options.new_norm, seed) for sae, (_, seed) in start]
            controls, wide = (train(members, stream[:, options.steps :], decays=True) for members in (controls, wide))
            placed = list(zip(places, controls, strict=True))
            of_suites = {
                toy: suite_scores(toys[toy], {str(seed): sae for (own, seed), sae in placed if own == toy}, options.val_batches)
                for toy in toys
            }
            scores += [
                {"kind": kind, "width": width, "toy": toy, "seed": seed}
                | dict(_score(toys[toy], control, extended, seed, 2 * options.val_batches))
                | of_suites[toy][str(seed)]
                for (toy, seed), control, extended in zip(places, controls, wide, strict=True)
            ]
        return scores


def suite_scores(data: ToyDataModule, saes: Mapping[str, SAE], batches: int) -> dict[str, dict[str, float]]:
    """What the suites of ``hedgelab evaluate`` say of SAEs that differ in their seed: means of two measurements.

    Each is made on so many batches; ``<name>_apart`` is how far the two are apart.
    """
    rows = batches * data.batch_size
    suites = (DensitySuite(rows), GeometrySuite(rows), ResidualSuite(rows, nulls=False), TruthSuite(batches))
    twice = [
        {name: scores.metrics for name, scores in suite.score(saes, Readings(data, first=first))}
        for suite in suites
        for first in (0, batches)
    ]
    found: dict[str, dict[str, float]] = {name: {} for name in saes}
    for (one, other), name in product(zip(twice[::2], twice[1::2], strict=True), saes):
        for key in (key for key in one[name] if key in other[name]):  # in one order, whatever the process
            values = one[name][key], other[name][key]
            found[name] |= {key: sum(values) / 2, f"{key}{_APART}": values[0] - values[1]}
    return found


@torch.no_grad()
def _score(data: ToyDataModule, control: SAE, extended: SAE, seed: int, batches: int) -> Row:
    """Measures of one SAE: true hedging is the mean over live latents, ``tracked`` how many features a latent tracks."""
    directions, width = data.feature_directions, control.d_sae
    overlap = len(directions) > data.d_in
    counts = FeatureRegression(width, len(directions))
    fired, fired_extended = torch.zeros(width), torch.zeros(extended.d_sae)
    for index in range(batches):
        x, features, _ = data.batch("val", index).to("cpu")
        codes = control.encode(x)
        if overlap:
            counts.update(codes, features)
        fired += codes.firing_counts()
        fired_extended += extended.encode(x).firing_counts()
    live, live_extended = fired > 0, fired_extended > 0
    old, new = live & live_extended[:width], live_extended[width:]
    degree = hedging_degree(control.W_dec, extended.W_dec, live=old, live_new=new, seed=seed)
    sums = counts.compute() if overlap else None
    tracked = truth.tracked_features(decoder_cosines(control.W_dec, directions), live)
    return {
        "true_hedging": float(true_hedging(control.W_dec, directions, fired, sums)[live].nanmean()),
        "degree": float(degree.degree),
        "tracked": int((tracked.feature >= 0).sum()),
        "levels": level_hedging(control, directions, fired, sums) if isinstance(control, MatryoshkaSAE) else (),
    }


def of_measure(kind: str, measure: str, rows: Sequence[Row]) -> Row:
    """A measure of SAEs of a kind through the three lenses; NaN where it never differs, or is the same when measured anew."""
    rows = [row for row in rows if measure in row]

    def column(name: str) -> np.ndarray:
        return np.array([row.get(name, np.nan) for row in rows])

    values, noise = column(measure), np.sqrt(np.mean(column(f"{measure}{_APART}") ** 2) / 2)
    with (
        np.errstate(divide="ignore", invalid="ignore"),
        warnings.catch_warnings(action="ignore", category=ConstantInputWarning),
    ):
        lenses = {
            "validity": spearmanr(values, column("true_hedging")).statistic,
            "noise": noise / np.mean(np.abs(values)),
            "discriminability": np.std(values, ddof=1) / noise,
            "claimed": np.sqrt(np.mean(column(f"{measure}{NOISE}") ** 2)) / noise,
        }
    return {"kind": kind, "measure": measure, "saes": len(rows)} | {name: float(value) for name, value in lenses.items()}


def level_hedging(
    sae: MatryoshkaSAE, directions: Tensor, fired: Tensor, sums: truth.RegressionSums | None = None
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


def true_hedging(W_dec: Tensor, directions: Tensor, fired: Tensor, sums: truth.RegressionSums | None) -> Tensor:
    """True hedging of each latent, ``[d_sae]``: of the decoder, or by regression where sums are given."""
    cosines, live = decoder_cosines(W_dec, directions), fired > 0
    tracked = truth.tracked_features(cosines, live)
    if sums is not None:
        return truth.regressed_hedging(sums, W_dec, directions, cosines, tracked, fired >= truth.FIRINGS).norm
    return truth.hedging(truth.decoder_coordinates(W_dec, directions), cosines, tracked, live).norm
