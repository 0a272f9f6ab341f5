"""The hedging degree: how far old latents move out of new ones' way, a measure that needs no ground truth (SPEC section 5).

From one initial SAE of W latents, a *control* is trained on, and an *extended* SAE with N latents appended, on the same data.
With decoders folded (rows of norm 1), ``Δ = W_dec^ext[:W] - W_dec^ctl`` and Q an orthonormal basis of the new rows::

    projection p = mean_i ‖Δ_i Q Qᵀ‖ / mean_i ‖W_dec^ctl[i]‖
    baseline   b = the same with Q from as many Gaussian vectors, averaged over draws
    degree       = max(0, (p - b) / (1 - b))

(Chanin et al. 2025, arXiv 2505.11756, section 5.) Beside it stand controls: other baselines, and what reordering data moves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes, float64, fold_decoder, orthonormal_basis, total_weight
from hedgelab.seeding import generator

DRAWS = 50  # random subspaces that a baseline is averaged over


class DegreeScores(NamedTuple):
    """The hedging degree and what it is judged by, as :func:`hedging_degree` declares it: float64, NaN where not known."""

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
    rank: Tensor  # below N where the new rows are linearly dependent
    projections: Tensor  # ‖Δ_i Q Qᵀ‖ of each old latent, [W]
    delta_norms: Tensor  # ‖Δ_i‖ of each, [W]
    cosines: Tensor  # of each, old with old, [W]
    live: Tensor  # which old latents fire in both SAEs, [W] bool
    baselines: Tensor  # ‖Δ_i R Rᵀ‖ of each, mean over random subspaces R, [W]
    covariance_baselines: Tensor  # the same with those of the activations' covariance; NaN without
    residual_hedging: Tensor = torch.tensor(torch.nan)  # of the control, where it was measured too
    residual_hedging_std: Tensor = torch.tensor(torch.nan)

    def scalars(self) -> dict[str, float]:
        """Every number that is there, by name."""
        numbers = {name: float(value) for name, value in self._asdict().items() if not value.ndim}
        return {name: value for name, value in numbers.items() if value == value}


class DegreeSums(NamedTuple):
    """What batches tell of which latents live, and of the activations' covariance; those of batches and ranks add up."""

    weight: Tensor  # of the examples, scalar
    total: Tensor  # Σ x, [d_in]
    products: Tensor  # Σ x xᵀ, [d_in, d_in]
    control_fired: Tensor  # firings of each latent, [W]
    extended_fired: Tensor  # the same, [W + N]


def degree_update(x: Tensor, control: Tensor | Codes, extended: Tensor | Codes, weight: Tensor | None = None) -> DegreeSums:
    """Sums of one batch of activations ``[batch, d_in]`` and the latents of both SAEs."""
    rows = float64(x)
    weighted = rows if weight is None else rows * float64(weight)[:, None]
    fired = (float64(as_codes(codes).firing_counts()) for codes in (control, extended))
    return DegreeSums(total_weight(rows, weight), weighted.sum(0), rows.t() @ weighted, *fired)


def hedging_degree(
    control: Tensor,
    extended: Tensor,
    *,
    live: Tensor | None = None,
    live_new: Tensor | None = None,
    covariance: Tensor | None = None,
    foreign: Sequence[Tensor] = (),
    reordered: Tensor | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> DegreeScores:
    """The hedging degree with its controls, in float64; see the module.

    From 0, where old latents moved no more into the span of the new ones than into any other, to 1. Trust it only where most
    new latents fire, and above the noise floor. Decoders may have any norms: the ``control``'s ``[W, d_in]``, the
    ``extended`` SAE's ``[W + N, d_in]``, old latents first; of a control that saw the same data ``reordered``; other seeds'
    new rows (``foreign``, ``[N, d_in]`` each). ``live [W]`` and ``live_new [N]`` (bool, None for all) say which latents fire
    (in both SAEs), ``covariance [d_in, d_in]`` is that of the activations; ``seed`` draws the random subspaces.

    >>> control = torch.tensor([[0.8, 0.6, 0, 0, 0, 0, 0, 0]])  # it gives up what the new latent takes over
    >>> hedging_degree(control, torch.eye(8)[:2]).projection
    tensor(0.6000, dtype=torch.float64)

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
        hedging/live_new_latents: live new [latents] (higher): new latents that fire; without them a degree says nothing
    """
    width, d_in = control.shape
    n_new = len(extended) - width
    if not 1 <= n_new < d_in:
        raise UserError(f"hedge.n_new: must lie between 1 and d_in - 1 = {d_in - 1}, got {n_new}; more span everything")
    old = fold_decoder(control)[0]
    moved_to, new = torch.split(fold_decoder(extended)[0].to(old), [width, n_new])
    delta, basis = moved_to - old, orthonormal_basis(new)
    if not (rank := basis.shape[1]):
        raise UserError("hedge.new_norm: the new latents' decoder rows are all zero; choose a larger one")
    live = old.new_ones(width, dtype=torch.bool) if live is None else live.to(old.device)

    def moved_within(rows: Tensor) -> Tensor:  # ‖Δ_i‖ within their span, [W]
        norms: Tensor = (delta @ orthonormal_basis(rows)).norm(dim=1)
        return norms

    def at_random(root: Tensor | None) -> Tensor:  # the same of random vectors of covariance root rootᵀ, [draws, W]
        source = generator(seed, "hedging baseline")
        drawn = (torch.randn(rank, d_in, generator=source, dtype=old.dtype).to(old.device) for _ in range(draws))
        return torch.stack([moved_within(vectors if root is None else vectors @ root.t()) for vectors in drawn])

    def excess(projection: Tensor, baseline: Tensor) -> Tensor:
        return ((projection - baseline) / (1 - baseline)).clamp_min(0)

    size, live_size = old.norm(dim=1).mean(), old[live].norm(dim=1).mean()  # NaN, with what follows, where none is live
    projections, delta_norms, cosines = (delta @ basis).norm(dim=1), delta.norm(dim=1), (moved_to * old).sum(1)
    projection, random = projections.mean() / size, at_random(None)
    baselines = random.mean(1) / size
    matched, elsewhere = torch.full_like(projections, torch.nan), old.new_tensor(torch.nan)
    if covariance is not None:
        symmetric = float64(covariance).to(old)
        values, vectors = torch.linalg.eigh((symmetric + symmetric.t()) / 2)
        matched = at_random(vectors * values.clamp_min(0).sqrt()).mean(0)
    if foreign:
        elsewhere = torch.stack([moved_within(fold_decoder(rows)[0].to(old)).mean() for rows in foreign]).mean() / size
    noise = torch.full_like(old, torch.nan) if reordered is None else fold_decoder(reordered)[0].to(old) - old
    return DegreeScores(
        degree=excess(projection, baselines.mean()),
        projection=projection,
        baseline=baselines.mean(),
        baseline_std=baselines.std(),
        live_degree=excess(projections[live].mean() / live_size, random[:, live].mean() / live_size),
        live_latents=live.sum().double(),
        live_new_latents=old.new_tensor(n_new if live_new is None else int(live_new.sum())),
        covariance_baseline=matched.mean() / size,
        covariance_degree=excess(projection, matched.mean() / size),
        foreign_baseline=elsewhere,
        foreign_degree=excess(projection, elsewhere),
        noise_floor=(noise @ basis).norm(dim=1).mean() / size,
        noise_delta_norm=noise.norm(dim=1).mean(),
        delta_norm=delta_norms.mean(),
        mean_cosine=cosines.mean(),
        rank=old.new_tensor(rank),
        projections=projections,
        delta_norms=delta_norms,
        cosines=cosines,
        live=live,
        baselines=random.mean(0),
        covariance_baselines=matched,
    )
