"""What is measured on the first block of training activations: their norms, and the normalisation that follows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.stream import Block
from hedgelab.data.source import Normalisation, measured_normalisation

_PERCENTILES = (0.0, 0.1, 1.0, 50.0, 99.0, 99.9, 100.0)


class Measured(NamedTuple):
    """Numbers of a block.

    Attributes:
        norms: Percentiles of the norm, outliers included, not normalised: ``p0``, ``p0.1``, ``p1``, ``p50``, ``p99``,
            ``p99.9``, ``p100``; and ``dropped``, the share of outliers.
        scale: What (centred) activations are multiplied by: 1 / root mean squared norm, or 1.
        mean: What is subtracted from activations first, ``[d_in]``; None for nothing.
    """

    norms: dict[str, float]
    scale: float
    mean: Tensor | None


def measure(block: Block, normalisation: Normalisation, max_norm_ratio: float | None) -> Measured:
    """Measure a block."""
    return Measured(_percentiles(block.norms, max_norm_ratio), *measured_normalisation(block.rows, normalisation))


def _percentiles(norms: Tensor, max_norm_ratio: float | None) -> dict[str, float]:
    """Percentiles of the norm, and the share of outliers."""
    ordered = norms.double().sort().values
    places = torch.tensor(_PERCENTILES, dtype=torch.float64) / 100 * (len(ordered) - 1)
    below = ordered[places.floor().long()]
    values = torch.lerp(below, ordered[places.ceil().long()], places.frac())
    limit = float("inf") if max_norm_ratio is None else max_norm_ratio * norms.median()
    named = {f"p{p:g}": value for p, value in zip(_PERCENTILES, values.tolist(), strict=True)}
    return named | {"dropped": (norms > limit).float().mean().item()}
