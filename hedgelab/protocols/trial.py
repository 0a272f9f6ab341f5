"""The hedging degree and residual hedging on trial: how well do they rank SAEs by the hedging that toys let one see?

For every kind of SAE and every width the SAEs of all toys and seeds train as one ensemble, through the phases of SPEC section 5
(initial, then control and extended, with the learning rate falling to zero), and the control is measured: *true hedging*
(:mod:`hedgelab.metrics.functional.hedging`, decoder, mean over live latents) beside the two measures that know no truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, PolynomialLR

from hedgelab.batch import Batch
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError
from hedgelab.metrics.functional.hedging import decoder_coordinates, hedging, tracked_features
from hedgelab.metrics.functional.hedging_degree import hedging_degree
from hedgelab.metrics.functional.recovery import decoder_cosines
from hedgelab.metrics.residual_hedging import ResidualHedgingMetric
from hedgelab.saes import SAE, MatryoshkaSAE, widen
from hedgelab.saes.ensemble import EnsembleSAE
from hedgelab.saes.widen import flat_part


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
            if getattr(self, name) < 1:
                raise UserError(f"trial.{name}: must be at least 1, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"trial.widths: must be widths of at least 1, got {self.widths}")


class TrialScore(NamedTuple):
    """One SAE of a trial.

    Attributes:
        kind: Kind of SAE.
        width: Its latents.
        toy: The toy.
        seed: Its seed.
        true_hedging: Mean over live latents, from the known features.
        residual_hedging: What the errors' spread says.
        residual_std: Its standard error.
        degree: The hedging degree.
        tracked: Features that a latent tracks.
        levels: See :func:`level_hedging`; empty for SAEs without levels.
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


Make = Callable[[str, int, int], SAE]
"""An untrained SAE of a kind, a width and a seed."""


def run_trial(
    toys: Mapping[str, ToyDataModule],
    kinds: Sequence[str],
    make: Make,
    options: TrialOptions,
    report: Callable[[int], None] = lambda steps: None,
) -> list[TrialScore]:
    """Train and measure every SAE of the trial.

    Args:
        toys: The toys, by name; all of the same ``d_in`` and batch size.
        kinds: Kinds of SAE.
        make: Makes the SAEs.
        options: Size of the trial.
        report: Told of each ensemble's optimiser steps when it has taken them.
    """
    stream = _stream(toys, options)
    scores = []
    for width in options.widths:
        for kind in kinds:
            scores += _score_ensemble(kind, width, toys, stream, make, options, report)
    return scores


def agreement(scores: Sequence[TrialScore], measure: str) -> float:
    """Spearman's rank correlation of a measure (a field of :class:`TrialScore`) with true hedging."""
    result = spearmanr([getattr(score, measure) for score in scores], [score.true_hedging for score in scores])
    return float(result.statistic)


def _stream(toys: Mapping[str, ToyDataModule], options: TrialOptions) -> Tensor:
    """Training batches of all toys, ``[toys, steps, batch, d_in]``: every ensemble sees the same."""
    steps = options.steps + options.continued_steps
    return torch.stack([torch.stack([toy.batch("train", step).x for step in range(steps)]) for toy in toys.values()])


def _score_ensemble(
    kind: str,
    width: int,
    toys: Mapping[str, ToyDataModule],
    stream: Tensor,
    make: Make,
    options: TrialOptions,
    report: Callable[[int], None],
) -> list[TrialScore]:
    """All toys and seeds of a kind and a width."""
    places = [(toy, seed) for seed in range(options.seeds) for toy in toys]
    of_member = torch.tensor([list(toys).index(toy) for toy, _ in places])
    saes = [make(kind, width, seed) for _, seed in places]
    for sae, (toy, _) in zip(saes, places, strict=True):
        sae.initialize(toys[toy].batch("train", 0), toys[toy].feature_directions)
    initial = _trained(saes, stream[:, : options.steps], of_member, None)
    report(options.steps)
    decay = partial(PolynomialLR, total_iters=options.continued_steps)
    wide = [widen(sae, options.n_new, options.new_norm, seed) for sae, (_, seed) in zip(initial, places, strict=True)]
    rest = stream[:, options.steps :]
    controls, extended = (_trained(members, rest, of_member, decay) for members in (initial, wide))
    report(2 * options.continued_steps)
    return [
        _score(kind, width, toy, seed, toys[toy], control, extension, options)
        for (toy, seed), control, extension in zip(places, controls, extended, strict=True)
    ]


def _trained(
    saes: Sequence[SAE], stream: Tensor, of_member: Tensor, schedule: Callable[[Optimizer], LRScheduler] | None
) -> list[SAE]:
    for sae in saes:
        sae.lr_scheduler = flat_part(sae).lr_scheduler = schedule
    ensemble = EnsembleSAE(saes)
    ensemble.fit(lambda step: Batch(stream[:, step][of_member]), stream.shape[1])
    return [ensemble.member(index) for index in range(len(saes))]


@torch.no_grad()
def _score(
    kind: str, width: int, toy: str, seed: int, data: ToyDataModule, control: SAE, extended: SAE, options: TrialOptions
) -> TrialScore:
    batches = [data.batch("val", index).x for index in range(options.val_batches)]
    metric = ResidualHedgingMetric(control.W_dec)
    fired, fired_extended = torch.zeros(width), torch.zeros(width + options.n_new)
    for x in batches:
        codes = control.encode(x)
        metric.update(x, control.decode(codes), codes)
        fired += codes.firing_counts()
        fired_extended += extended.encode(x).firing_counts()
    live, folded, directions = fired > 0, control.folded(), data.feature_directions
    cosines = decoder_cosines(folded.W_dec, directions)
    tracked = tracked_features(cosines, live)
    true = hedging(decoder_coordinates(folded.W_dec, directions), cosines, tracked, live).norm
    degree = hedging_degree(
        control.W_dec, extended.W_dec, live=live & (fired_extended[:width] > 0), live_new=fired_extended[width:] > 0, seed=seed
    )  # fmt: skip
    residual = metric.compute()
    levels = level_hedging(control, folded.W_dec, directions, live) if isinstance(control, MatryoshkaSAE) else ()
    return TrialScore(
        kind, width, toy, seed,
        true_hedging=float(true[live].mean()),
        residual_hedging=float(residual.hedging),
        residual_std=float(residual.std),
        degree=float(degree.degree),
        tracked=int((tracked.feature >= 0).sum()),
        levels=levels,
    )  # fmt: skip


def level_hedging(sae: MatryoshkaSAE, W_dec: Tensor, directions: Tensor, live: Tensor) -> tuple[float, ...]:
    """True hedging of each level's own latents, innermost first: along features that no latent of *their prefix* tracks.

    An inner level must reconstruct without the latents that come after it, so it hedges on features that those track.

    Args:
        sae: Whose levels.
        W_dec: Its folded decoder, ``[d_sae, d_in]``.
        directions: True directions, ``[n, d_in]``.
        live: Latents that fire, ``[d_sae]`` bool.
    """
    coordinates, cosines = decoder_coordinates(W_dec, directions), decoder_cosines(W_dec, directions)
    values = []
    for own in sae.level_slices():
        tracked = tracked_features(cosines[: own.stop], live[: own.stop])
        true = hedging(coordinates[: own.stop], cosines[: own.stop], tracked, live[: own.stop]).norm
        values.append(float(true[own][live[own]].mean()))
    return tuple(values)
