r"""What balances a matryoshka SAE's levels without ground truth: the credit of outer levels, and the asymmetry of inner ones.

*Two diseases, one quantity.* Let an inner latent i (the parent) fire on its feature and be affine in what else is there, its
encoder's part along child j being ``e_j``. Then ``E[a_i | i and j fire] - E[a_i | i fires, j does not] = e_j``: positive where
the inner level hedges (its narrow reconstruction pays for the child), negative where the child's latent absorbs the parent.
Summed over the children that have latents further out, and weighted by how often they fire,

    s_i = Cov(a_i, n | i fires) P(i fires) / E[a_i | i fires],    n = number of outer latents that fire:

no pairs need to be known, only sums over the batch. A level's weight raises hedging against absorption, so the weight whose
``Σ_i s_i`` is zero balances the level as well as one number can. With a level for each child, the most frequent first, each
level's sum counts one child less than the next inner one's; they all vanish only where every ``e_j`` does.

*Credit.* One number cannot serve children of different rates: hedging pulls with the child's rate, absorption with λ alone. But
the pull to hedge is there only because the level's error contains ``f_j``, which child j's latent explains. Sparing the level
what outer latents explain *outside the span of its own decoder rows* removes that pull for every child. Inside the span, where
a child's latent may write the parent's direction (absorption), nothing is spared. So a clean parent is where the level's error
is least whatever the rates; the penalty alone moves it, by O(λ).
"""

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.kernels.ranks import ALONE, Ranks


def outside_span(vectors: Tensor, rows: Tensor) -> Tensor:
    """The part of ``vectors [batch, d_in]`` orthogonal to all ``rows [m, d_in]``; zero for ``m ≥ d_in`` (rows span all)."""
    if rows.shape[0] >= rows.shape[1]:
        return torch.zeros_like(vectors)
    with torch.autocast(vectors.device.type, enabled=False):
        basis, _ = torch.linalg.qr(rows.to(vectors.dtype).T)
        rest: Tensor = vectors - (vectors @ basis) @ basis.T
    return rest


@torch.no_grad()
def asymmetry(codes: Codes, size: int, weight: Tensor | None = None, ranks: Ranks = ALONE) -> Tensor:
    """How much more (hedging) or less (absorption) a level's latents fire the more outer latents do: ``Σ_i s_i``, a scalar.

    The level's latents are the first ``size``; ``weight [batch]`` are probabilities of the examples, over all ``ranks``.
    """
    # Sizes, since a latent of either sign may be used; in double precision, since what follows is a difference of products.
    codes = codes.with_values(codes.values.detach().abs().double())
    fires = codes.with_values((codes.values > 0).double())
    if weight is None:
        weight = codes.values.new_full((codes.batch_size,), 1 / codes.batch_size)
    weight = weight.double()
    outer = (codes.active_per_example() - codes.prefix(size).active_per_example()).double()
    sums = [part.sum_per_latent(by)[:size] for part in (codes, fires) for by in (weight, weight * outer)]
    mean, mean_with, rate, rate_with = ranks.mean(torch.stack(sums)).unbind()
    return ((mean_with * rate - mean * rate_with) / torch.where(mean != 0, mean, 1.0)).sum()
