"""Decoder geometry: how directions lie to one another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.metrics.functional.accumulate import NO_FLOAT64

NEAR_DUPLICATE = 0.9
"""Cosine from which two decoder rows count as the same direction."""

_BINS = 200
_ROWS_AT_ONCE = 1024


class DecoderGeometry(NamedTuple):
    """Cosines between the decoder rows of different latents.

    Attributes:
        counts: Pairs of latents by cosine, in equal bins from -1 to 1, ``[200]`` int64.
        largest: Largest cosine of each latent with another, ``[d_sae]`` float32.
        nearest: Which latent that is, ``[d_sae]`` int64.
        mean_absolute: Mean |cosine| over pairs, float64 scalar.
        near_duplicates: Latents with another within cosine .9, int64 scalar.
    """

    counts: Tensor
    largest: Tensor
    nearest: Tensor
    mean_absolute: Tensor
    near_duplicates: Tensor


def decoder_geometry(W_dec: Tensor, live: Tensor | None = None, threshold: float = NEAR_DUPLICATE) -> DecoderGeometry:
    """Cosines between decoder rows, block by block: the ``[d_sae, d_sae]`` matrix is never held.

    Args:
        W_dec: Decoder, ``[d_sae, d_in]``, of any norms.
        live: Latents that count, ``[d_sae]`` bool; None for all. The results are of these, in their order.
        threshold: Cosine from which two latents are near-duplicates.

    Logged as:
        geometry/near_duplicates: near duplicates (lower): latents with another at almost the same direction
    """
    weights = W_dec.detach().cpu() if W_dec.device.type in NO_FLOAT64 else W_dec.detach()
    rows = normalize((weights if live is None else weights[live.to(weights.device)]).float(), dim=1)
    n = rows.shape[0]
    counts = torch.zeros(_BINS, dtype=torch.float64, device=rows.device)
    largest, nearest, total = [], [], torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        cosines = (rows[start : start + _ROWS_AT_ONCE] @ rows.T).clamp(-1, 1)
        own = torch.arange(len(cosines), device=rows.device)
        others = torch.ones_like(cosines, dtype=torch.bool)
        others[own, own + start] = False
        values = cosines[others]
        counts += torch.histc(values, _BINS, -1, 1).double()
        total += values.abs().sum(dtype=torch.float64)
        cosines[own, own + start] = -2.0
        best = cosines.max(dim=1)
        largest.append(best.values)
        nearest.append(best.indices)
    all_largest = torch.cat(largest) if largest else rows.new_zeros(0)
    pairs = max(1, n * (n - 1))
    return DecoderGeometry(
        (counts / 2).long(),
        all_largest,
        torch.cat(nearest) if nearest else torch.zeros(0, dtype=torch.int64, device=rows.device),
        total / pairs,
        (all_largest >= threshold).sum(),
    )
