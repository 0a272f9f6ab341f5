"""Trains the SAEs at all points of a phase diagram at once, on their exact populations, and measures them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.batch import Batch
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError
from hedgelab.metrics.functional import mcc
from hedgelab.saes.base import SAE
from hedgelab.saes.ensemble import EnsembleSAE, stack_batches

Array = NDArray[np.float64]
Quantity = Literal["hedging", "encoder", "impurity", "absorption", "mcc", "loss_gap"]


class Cell(NamedTuple):
    """What is trained at one point of the diagram.

    Attributes:
        data: The toy, in population mode.
        members: An initialised SAE for each seed.
    """

    data: ToyDataModule
    members: list[SAE]


@dataclass(frozen=True)
class Target:
    """What is looked at: a latent, its own feature, and the feature that it may mix in, all counted from 0."""

    latent: int = 0
    own: int = 0
    other: int = 1


class PhaseResult(NamedTuple):
    """What came out, in the order of the cells.

    Attributes:
        values: Each quantity, and ``loss``, by name: ``[cells, seeds]``.
        steps_per_second: Optimiser steps of all SAEs together, per second of training.
    """

    values: dict[str, Array]
    steps_per_second: float

    def deepest(self, name: str) -> Array:
        """A quantity of the seed with the least loss of each cell, ``[cells]``."""
        best = self.values["loss"].argmin(1)
        return np.asarray(np.take_along_axis(self.values[name], best[:, None], 1)[:, 0])


def run_phase(
    cells: Sequence[Cell],
    steps: int,
    quantities: Sequence[Quantity],
    target: Target,
    report: Callable[[int], None] | None = None,
) -> PhaseResult:
    """Train every seed of every cell at once on its exact population, and measure.

    Args:
        cells: The points of the diagram.
        steps: Optimiser steps.
        quantities: ``hedging`` and ``encoder``: component of the latent's unit decoder row and encoder column along the other
            feature, signed so that its own counts as positive; ``impurity``: length of the decoder row's part off its own
            feature, all others together; ``absorption``: share of the latent's activation on its own feature that is lost where
            the other fires too (1: silent there); ``mcc``; ``loss_gap``: how much worse the loss would be with the decoder kept
            at the true features.
        target: The latent and the two features.
        report: Called after each step with the number of steps done, ``loss_gap``'s second training included.
    """
    members = [member for cell in cells for member in cell.members]
    seeds = len(cells[0].members)
    batches = [cell.data.batch("train", 0) for cell in cells]
    batch = stack_batches([one for one in batches for _ in range(seeds)])
    features = stack_batches([features_as_x(one) for one in batches for _ in range(seeds)]).x
    directions = torch.stack([cell.data.feature_directions for cell in cells for _ in range(seeds)])
    ensemble = EnsembleSAE(members)
    seconds = _timed(partial(ensemble.fit, batch, steps, report))
    with torch.no_grad():
        losses, activations = ensemble.losses(batch), ensemble.activations(batch)
    measured = {"loss": losses}
    decoder, encoder = _components(ensemble, directions)
    sign = decoder[:, target.latent, target.own].sign()
    for name in quantities:
        match name:
            case "hedging":
                measured[name] = decoder[:, target.latent, target.other] * sign
            case "encoder":
                measured[name] = encoder[:, target.latent, target.other] * sign
            case "impurity":
                measured[name] = (1 - decoder[:, target.latent, target.own].square()).clamp_min(0).sqrt()
            case "absorption":
                measured[name] = _absorption(activations[:, :, target.latent], features, batch.weight, target)
            case "mcc":
                measured[name] = torch.stack([mcc(own[: sae.d_sae]) for own, sae in zip(decoder, members, strict=True)])
            case "loss_gap":
                true = EnsembleSAE(_at_true_features(cells))
                later = None if report is None else partial(_report_later, report, steps)
                seconds += _timed(partial(true.fit, batch, steps, later))
                measured[name] = true.losses(batch).detach() - losses
    runs = len(members) * steps * (2 if "loss_gap" in quantities else 1)
    values = {name: value.double().reshape(len(cells), seeds).numpy() for name, value in measured.items()}
    return PhaseResult(values, runs / seconds)


def _components(ensemble: EnsembleSAE, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of decoder rows and encoder columns with the features, ``[members, d_sae, n]``."""
    folded = ensemble.folded()
    decoder = normalize(folded.W_dec, dim=2) @ directions.mT
    encoder = normalize(folded.W_enc.mT, dim=2) @ directions.mT
    return decoder, encoder


def _absorption(activations: Tensor, features: Tensor, weight: Tensor | None, target: Target) -> Tensor:
    """Share of the activation on the own feature alone that is lost where the other fires too, ``[members]``."""
    assert weight is not None
    own, other = features[..., target.own] > 0, features[..., target.other] > 0

    def mean_activation(where: Tensor) -> Tensor:
        return (weight * where * activations).sum(1) / (weight * where).sum(1)

    return 1 - mean_activation(own & other) / mean_activation(own & ~other)


def _at_true_features(cells: Sequence[Cell]) -> list[SAE]:
    """Copies of all members with the decoder fixed at the true features."""
    copies: dict[tuple[int, bytes], SAE] = {}
    result = []
    for cell in cells:
        directions = cell.data.feature_directions
        for member in cell.members:
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


def features_as_x(batch: Batch) -> Batch:
    """A toy's batch in feature coordinates."""
    assert batch.features is not None
    return Batch(batch.features, None, batch.weight)


def _report_later(report: Callable[[int], None], before: int, done: int) -> None:
    report(before + done)


def _timed(work: Callable[[], None]) -> float:
    """Seconds that it takes on one thread: such small tensors gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        work()
    finally:
        torch.set_num_threads(threads)
    return time.perf_counter() - start
