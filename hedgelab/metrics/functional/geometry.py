"""Decoder geometry: how directions lie to one another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.metrics.functional.accumulate import detached

NEAR_DUPLICATE = 0.9
"""Cosine from which two decoder rows count as the same direction."""
_BINS = 200
_ROWS_AT_ONCE = 1024


class DecoderGeometry(NamedTuple):
    """Cosines between the decoder rows of different latents."""

    counts: Tensor  # pairs of latents by cosine, in equal bins from -1 to 1, [200] int64
    largest: Tensor  # largest cosine of each latent with another, [d_sae] float32
    nearest: Tensor  # which latent that is, [d_sae] int64
    mean_absolute: Tensor  # mean |cosine| over pairs, float64 scalar
    near_duplicates: Tensor  # latents with another within cosine .9, int64 scalar


def decoder_geometry(W_dec: Tensor, live: Tensor | None = None, threshold: float = NEAR_DUPLICATE) -> DecoderGeometry:
    """Cosines between rows of ``W_dec [d_sae, d_in]``, block by block: the ``[d_sae, d_sae]`` matrix is never held.

    The results are of the latents of ``live [d_sae]`` (bool; None for all), in their order; ``threshold`` is the cosine of
    near-duplicates. Rows of dead latents are as they were drawn: leave them out.

    >>> decoder_geometry(torch.tensor([[1.0, 0], [2, 0], [0, 1]])).near_duplicates.item()
    2

    Logged as:
        geometry/near_duplicates: near duplicates (lower): latents with another at almost the same direction
    """
    weights = detached(W_dec)
    rows = normalize((weights if live is None else weights[live.to(weights.device)]).float(), dim=1)
    n = len(rows)
    counts = torch.zeros(_BINS, dtype=torch.float64, device=rows.device)
    total = counts.new_zeros(())
    largest, nearest = rows.new_zeros(n), torch.zeros(n, dtype=torch.int64, device=rows.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        cosines = (rows[part] @ rows.T).clamp(-1, 1)
        own = torch.arange(len(cosines), device=rows.device)
        others = torch.ones_like(cosines, dtype=torch.bool)
        others[own, own + start] = False
        values = cosines[others]
        counts += torch.histc(values, _BINS, -1, 1).double()
        total += values.abs().sum(dtype=torch.float64)
        cosines[own, own + start] = -2.0
        largest[part], nearest[part] = cosines.max(dim=1)
    return DecoderGeometry(
        (counts / 2).long(), largest, nearest, total / max(1, n * (n - 1)), (largest >= threshold).sum()
    )
