"""Decoder projections: what activations hold along decoder rows, latents that do not fire included (arXiv 2508.16560).

A latent that mixes correlated features, for want of latents or because too few may fire, has a row along which many activations
lie that it should have nothing to do with.
"""

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes, fold_decoder


def latent_projections(x: Tensor, codes: Tensor | Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """How far each latent's row reaches into activations that the latent leaves alone, ``[d_sae]`` float32.

    Of the entries ``(x - b_dec) · W_dec[i] / ‖W_dec[i]‖`` over activations ``x [batch, d_in]`` the ``2 f``-th largest, where
    the latent fires ``f`` times (the least where there are not so many); NaN where it never fires.

    >>> x = torch.tensor([[3.0], [2.0], [0.5], [0.0]])
    >>> latent_projections(x, torch.tensor([[3.0], [0.0], [0.0], [0.0]]), torch.ones(1, 1), torch.zeros(1))
    tensor([2.])
    """
    projections = (x.detach().float() - b_dec.detach().float()) @ fold_decoder(W_dec)[0].float().t()
    ordered = projections.sort(dim=0, descending=True).values
    fired = as_codes(codes).firing_counts().long()
    place = (2 * fired - 1).clamp(0, len(x) - 1)
    return torch.where(fired > 0, ordered.gather(0, place[None])[0], torch.nan)
