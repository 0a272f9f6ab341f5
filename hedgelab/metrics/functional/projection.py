"""Decoder projections: what activations hold along decoder rows, latents that do not fire included (arXiv 2508.16560).

A latent that mixes correlated features, for want of latents or of L0, has a row along which much lies that it should ignore.
"""

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes, fold_decoder

_OF_WIDTH = 3 / 8  # of d_sae, about what the measure's authors took: 12 000 of 32 768 latents


def usual_n(d_sae: int) -> int:
    """Which projection is looked at unless another is asked for: 3/8 of the width."""
    return max(1, round(_OF_WIDTH * d_sae))


def nth_decoder_projection(x: Tensor, W_dec: Tensor, b_dec: Tensor, n: int | None = None) -> Tensor:
    """The ``n · batch``-th largest of all entries ``(x - b_dec) · W_dec[i] / ‖W_dec[i]‖``, a float32 scalar.

    Of SAEs that differ in L0 alone it is smallest where L0 is right, for any n between that L0 and about half of d_sae
    (Chanin & Garriga-Alonso, arXiv 2508.16560, section 4); None is 3/8 of d_sae. ``n = d_sae`` gives the smallest entry.

    >>> nth_decoder_projection(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2), 2)
    tensor(1.)

    Logged as:
        geometry/nth_projection: n-th projection (lower): what activations hold along decoder rows that should be silent

    Raises:
        UserError: n is below 1 or above d_sae.
    """
    n = usual_n(len(W_dec)) if n is None else n
    if not 1 <= n <= len(W_dec):
        raise UserError(f"n: must be from 1 to d_sae = {len(W_dec)}, got {n}")
    entries = _projections(x, W_dec, b_dec).flatten()
    return entries.kthvalue(len(entries) - n * len(x) + 1).values


def latent_projections(x: Tensor, codes: Tensor | Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """How far each latent's row reaches into activations that the latent leaves alone, ``[d_sae]`` float32.

    Of the entries ``(x - b_dec) · W_dec[i] / ‖W_dec[i]‖`` over activations ``x [batch, d_in]`` the ``2 f``-th largest, where
    the latent fires ``f`` times (the least where there are not so many); NaN where it never fires.

    >>> x = torch.tensor([[3.0], [2.0], [0.5], [0.0]])
    >>> latent_projections(x, torch.tensor([[3.0], [0.0], [0.0], [0.0]]), torch.ones(1, 1), torch.zeros(1))
    tensor([2.])
    """
    ordered = _projections(x, W_dec, b_dec).sort(dim=0, descending=True).values
    fired = as_codes(codes).firing_counts().long()
    place = (2 * fired - 1).clamp(0, len(x) - 1)
    return torch.where(fired > 0, ordered.gather(0, place[None])[0], torch.nan)


def _projections(x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """``(x - b_dec) · W_dec[i] / ‖W_dec[i]‖``, ``[batch, d_sae]``."""
    return (x.detach().float() - b_dec.detach().float()) @ fold_decoder(W_dec)[0].float().t()
