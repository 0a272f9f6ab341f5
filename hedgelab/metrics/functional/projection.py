"""Decoder projections: what activations hold along decoder rows, latents that do not fire included (arXiv 2508.16560).

A latent that mixes correlated features, for want of latents or because too few may fire, has a row along which many activations
lie that it should have nothing to do with. ``b_dec`` is taken off first, and rows have norm 1::

    s_n = the (n · batch)-th largest entry of (x - b_dec) W_decᵀ,      n above the L0 that features have
"""

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes, fold_decoder


def decoder_projections(x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Every activation ``x [batch, d_in]`` along every row of ``W_dec [d_sae, d_in]``, rows of norm 1: ``[batch, d_sae]``."""
    return (x.detach().float() - b_dec.detach().float()) @ fold_decoder(W_dec)[0].float().t()


def nth_decoder_projection(x: Tensor, W_dec: Tensor, b_dec: Tensor, n: int) -> Tensor:
    """``s_n`` of activations ``x [batch, d_in]``: of the SAEs of one width, that of the right L0 has the smallest.

    >>> x = torch.tensor([[3.0, 0.0], [0.0, 2.0]])  # one feature fires in either
    >>> nth_decoder_projection(x, torch.eye(2), torch.zeros(2), 1).item()
    2.0
    """
    entries = decoder_projections(x, W_dec, b_dec)
    if not 1 <= n <= entries.shape[1]:
        raise UserError(f"n: must lie between 1 and d_sae = {entries.shape[1]}, got {n}")
    return entries.flatten().topk(n * len(entries)).values[-1]


def latent_projections(x: Tensor, codes: Tensor | Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """The same of each latent, ``[d_sae]``: of as many activations as it fires on beyond those, the last largest entry.

    The ``2 f``-th largest for a latent that fires ``f`` times (the least one where there are not so many); NaN where it never
    fires. It says how far a row reaches into activations that the latent leaves alone.

    >>> x = torch.tensor([[3.0], [2.0], [0.5], [0.0]])
    >>> latent_projections(x, torch.tensor([[3.0], [0.0], [0.0], [0.0]]), torch.ones(1, 1), torch.zeros(1))
    tensor([2.])
    """
    ordered = decoder_projections(x, W_dec, b_dec).sort(dim=0, descending=True).values
    fired = as_codes(codes).firing_counts().long()
    place = (2 * fired - 1).clamp(0, len(x) - 1)
    return torch.where(fired > 0, ordered.gather(0, place[None])[0], torch.nan)
