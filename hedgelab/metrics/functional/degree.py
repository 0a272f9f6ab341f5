"""The hedging degree: how far old latents move out of new ones' way, a measure that needs no ground truth (SPEC section 5).

From one initial SAE of W latents, a *control* is trained on, and an *extended* SAE with N latents appended, on the same data.
With decoders folded (rows of norm 1), ``Δ = W_dec^ext[:W] - W_dec^ctl`` and Q an orthonormal basis of the new rows::

    projection p = mean_i ‖Δ_i Q Qᵀ‖ / mean_i ‖W_dec^ctl[i]‖
    baseline   b = the same with Q from as many Gaussian vectors, averaged over draws
    degree       = max(0, (p - b) / (1 - b))

(Chanin et al. 2025, arXiv 2505.11756, section 5.) Beside it stand controls: other baselines, and what reordering data moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.metrics.functional.accumulate import float64, fold_decoder, orthonormal_basis
from hedgelab.seeding import generator

DRAWS = 50
"""Random subspaces that a baseline is averaged over."""


class DegreeScores(NamedTuple):
    """The hedging degree and what it is judged by; float64 scalars unless a shape is given.

    Attributes:
        degree: ``max(0, (projection - baseline) / (1 - baseline))``.
        projection: How far old rows moved within the span of the new ones, mean over old latents.
        baseline: The same within random subspaces.
        baseline_std: Its standard deviation over draws.
        live_degree: The degree over those old latents that fire in both SAEs; NaN where none does.
        live_latents: Number of those.
        live_new_latents: Number of new latents that fire.
        covariance_baseline: Within subspaces drawn with the activations' covariance; NaN where that is not known.
        covariance_degree: The degree against it.
        foreign_baseline: Within the span of other seeds' new rows, mean over those seeds; NaN without any.
        foreign_degree: The degree against it.
        noise_floor: The projection of what reordering the control's data moves; NaN without a reordered control.
        noise_delta_norm: How far that moves rows in all, mean over latents.
        delta_norm: ``‖Δ_i‖``, mean over old latents.
        mean_cosine: Cosine between old rows of control and extended, mean over old latents.
        rank: Dimension of the span of the new rows; below N where they are linearly dependent.
        projections: ``‖Δ_i Q Qᵀ‖`` of each old latent, ``[W]``.
        delta_norms: ``‖Δ_i‖`` of each, ``[W]``.
        cosines: Cosine of each, ``[W]``.
        live: Which old latents fire in both, ``[W]`` bool.
        residual_hedging: Hedging of the control as its errors' spread shows it, mean over latents; of another kind than all the
            above, see :mod:`.error_spread`. NaN unless added.
        residual_hedging_std: Its standard error.
    """

    degree: Tensor
    projection: Tensor
    baseline: Tensor
    baseline_std: Tensor
    live_degree: Tensor
    live_latents: Tensor
    live_new_latents: Tensor
    covariance_baseline: Tensor
    covariance_degree: Tensor
    foreign_baseline: Tensor
    foreign_degree: Tensor
    noise_floor: Tensor
    noise_delta_norm: Tensor
    delta_norm: Tensor
    mean_cosine: Tensor
    rank: Tensor
    projections: Tensor
    delta_norms: Tensor
    cosines: Tensor
    live: Tensor
    residual_hedging: Tensor = torch.tensor(torch.nan)
    residual_hedging_std: Tensor = torch.tensor(torch.nan)

    def scalars(self) -> dict[str, float]:
        """Every number that is there, by name."""
        numbers = {name: float(value) for name, value in self._asdict().items() if not value.ndim}
        return {name: value for name, value in numbers.items() if value == value}


def hedging_degree(
    control: Tensor,
    extended: Tensor,
    *,
    live: Tensor | None = None,
    live_new: Tensor | None = None,
    covariance: Tensor | None = None,
    foreign: list[Tensor] | None = None,
    reordered: Tensor | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> DegreeScores:
    """The hedging degree with its controls, in float64; see the module.

    Args:
        control: Decoder of the control, ``[W, d_in]``; rows are folded to norm 1 here (a zero row stays zero).
        extended: Decoder of the extended SAE, ``[W + N, d_in]``, the old latents first.
        live: Old latents that fire in both SAEs, ``[W]`` bool; None for all.
        live_new: New latents that fire, ``[N]`` bool; None for all.
        covariance: Covariance of the activations, ``[d_in, d_in]``.
        foreign: Other seeds' new decoder rows, ``[N, d_in]`` each.
        reordered: Decoder of a control that saw the same data in another order, ``[W, d_in]``.
        draws: Random subspaces a baseline is averaged over.
        seed: Seed of the draws.

    Raises:
        UserError: No new latents, or so many that they may span everything, or all new rows zero.

    Logged as:
        hedging/degree: hedging degree (lower): how far old latents move into the span of new ones, above chance
        hedging/live_degree: live degree (lower): the degree over old latents that fire
        hedging/covariance_degree: degree vs covariance (lower): above subspaces drawn with the data's covariance
        hedging/foreign_degree: degree vs foreign (lower): above the span of another seed's new latents
        hedging/projection: projection: movement of old latents within the span of new ones, relative
        hedging/baseline: baseline: the same within random subspaces
        hedging/baseline_std: baseline spread: its standard deviation over draws
        hedging/covariance_baseline: covariance baseline: within random subspaces of the data's covariance
        hedging/foreign_baseline: foreign baseline: within the span of other seeds' new latents
        hedging/noise_floor: noise floor (lower): the projection of what merely reordering the data moves
        hedging/noise_delta_norm: noise movement (lower): how far reordering the data moves decoder rows
        hedging/delta_norm: movement: ‖Δ‖: how far old decoder rows moved, mean
        hedging/mean_cosine: old with old: cosine of old rows in control and extended SAE, mean
        hedging/rank: rank: dimension of the span of the new latents
        hedging/live_latents: live old [latents]: old latents that fire in both SAEs
        hedging/live_new_latents: live new [latents] (higher): new latents that fire; without them a degree says
            nothing
    """
    width, d_in = control.shape
    n_new = extended.shape[0] - width
    if not 1 <= n_new < d_in:
        raise UserError(f"hedge.n_new: must lie between 1 and d_in - 1 = {d_in - 1}, got {n_new}; more span everything")
    old, (moved_to, new) = fold_decoder(control)[0], torch.split(fold_decoder(extended)[0], [width, n_new])
    delta, basis = moved_to - old, orthonormal_basis(new)
    rank = basis.shape[1]
    if not rank:
        raise UserError("hedge.new_norm: the new latents' decoder rows are all zero; choose a larger one")
    if live is None:
        live = torch.ones(width, dtype=torch.bool, device=old.device)
    size, live_size = old.norm(dim=1).mean(), old[live].norm(dim=1).mean()  # NaN, with what follows, where none is live
    projections, delta_norms, cosines = norms_along(delta, basis), delta.norm(dim=1), (moved_to * old).sum(1)
    random = torch.stack([norms_along(delta, spanned) for spanned in _random_subspaces(rank, draws, seed, old)])
    projection, baselines = projections.mean() / size, random.mean(1) / size
    live_baseline = random[:, live].mean() / live_size
    matched = _covariance_baseline(delta, covariance, rank, draws, seed) / size
    elsewhere = (
        _mean([norms_along(delta, orthonormal_basis(fold_decoder(rows)[0])).mean() for rows in foreign or []], old)
        / size
    )
    noise = torch.full_like(old, torch.nan) if reordered is None else fold_decoder(reordered)[0] - old
    return DegreeScores(
        degree=above_baseline(projection, baselines.mean()),
        projection=projection,
        baseline=baselines.mean(),
        baseline_std=baselines.std(),
        live_degree=above_baseline(projections[live].mean() / live_size, live_baseline),
        live_latents=live.sum().double(),
        live_new_latents=_count(n_new if live_new is None else int(live_new.sum()), old),
        covariance_baseline=matched,
        covariance_degree=above_baseline(projection, matched),
        foreign_baseline=elsewhere,
        foreign_degree=above_baseline(projection, elsewhere),
        noise_floor=norms_along(noise, basis).mean() / size,
        noise_delta_norm=noise.norm(dim=1).mean(),
        delta_norm=delta_norms.mean(),
        mean_cosine=cosines.mean(),
        rank=_count(rank, old),
        projections=projections,
        delta_norms=delta_norms,
        cosines=cosines,
        live=live,
    )


def norms_along(delta: Tensor, basis: Tensor) -> Tensor:
    """Norms ``[W]`` of the parts of ``delta [W, d_in]`` in the span of an orthonormal ``basis [d_in, N]``."""
    norms: Tensor = (delta @ basis).norm(dim=1)
    return norms


def above_baseline(projection: Tensor, baseline: Tensor) -> Tensor:
    """``max(0, (projection - baseline) / (1 - baseline))``; NaN where the baseline is."""
    return ((projection - baseline) / (1 - baseline)).clamp_min(0)


def _random_subspaces(n: int, draws: int, seed: int, like: Tensor, root: Tensor | None = None) -> Iterator[Tensor]:
    """Bases of the spans of n random vectors of covariance ``root rootᵀ`` (the identity without one)."""
    source = generator(seed, "hedging baseline")
    for _ in range(draws):
        vectors = torch.randn(n, like.shape[1], generator=source, dtype=like.dtype).to(like.device)
        yield orthonormal_basis(vectors if root is None else vectors @ root.t())


def _covariance_baseline(delta: Tensor, covariance: Tensor | None, n: int, draws: int, seed: int) -> Tensor:
    """Mean motion within subspaces drawn with the activations' covariance; NaN where that is not known."""
    if covariance is None:
        return _mean([], delta)
    symmetric = float64(covariance).to(delta)
    values, vectors = torch.linalg.eigh((symmetric + symmetric.t()) / 2)
    root = vectors * values.clamp_min(0).sqrt()
    return _mean(
        [norms_along(delta, spanned).mean() for spanned in _random_subspaces(n, draws, seed, delta, root)], delta
    )


def _mean(values: list[Tensor], like: Tensor) -> Tensor:
    """Mean of scalars; NaN of none."""
    return torch.stack(values).mean() if values else torch.full((), torch.nan, dtype=like.dtype, device=like.device)


def _count(count: int, like: Tensor) -> Tensor:
    return torch.full((), count, dtype=like.dtype, device=like.device)
