r"""Residual hedging: hedging read off the error's spread, without ground truth, new latents or continued training.

*What it rests on.* Let latent i track feature i, and let missing features ``m z_j f_j`` (``z_j ∈ {0, 1}`` rare, ``f_j``
orthonormal) have no latent. A decoder trained on squared error is the regression of activations on the codes c, so row i holds
``h_ij``, the coefficient of ``c_i`` in the regression of ``m z_j`` on c: omitted-variable bias. That is the hedged component.
The error ``e = x - x_hat`` shows no trace of it in its *mean*, which regression leaves uncorrelated with c, but in its
*spread*: a hedge is an average laid on every firing, while the feature fires or does not, and varies as often as it fires::

    E[(e · f_j)² | c]  =  m² p_j(c) (1 - p_j(c))
    S_i = coefficient of c_i in the regression of e eᵀ on c  ≈  Σ_j m (1 - p_ij) h_ij f_j f_jᵀ

with ``p_ij`` how often feature j fires along with latent i. Neither the Frobenius norm of ``S_i`` asks for the directions
``f_j``, nor that of the third moment ``T_i``, the same of ``e ⊗ e ⊗ e``, whose terms are those of S_i times ``m (1 - 2 p_ij)``:

    r_i = ‖T_i‖ / ‖S_i‖ = m |1 - 2 p_i|,     p_i = (1 - r_i / m) / 2,     ‖h_i‖ = ‖S_i‖ / (m (1 - p_i)) = 2 ‖S_i‖ / (m + r_i).

The magnitude m is that of a two-point variable of mean variance v whose third moment is s times that, ``m² = s² + 4 v``, both
from the whole error: ``s² = ‖E[e ⊗ e ⊗ e]‖² / ‖E[e eᵀ]‖²`` and ``v = tr C³ / tr C²`` with C its covariance. Errors of features
that *do* have a latent (a TopK latent pushed out by others) lie along decoder rows, so errors are projected off the span of the
measured latents' rows, as long as these are fewer than d_in; a missing feature loses but its hedged share. Magnitudes and rates
of missing features differ, and a few of them, or dense noise, would speak for all: the variance λ of what is left is evened out
along each principal direction, to ``2 λ v / (λ + v)`` with ``v = Σ λ² / Σ λ``.

*Noise.* With examples split in blocks and ``g(t) = Cov(c)⁻¹ (c(t) - mean c) / n``,

    q_i = Σ_{t ∈ A} Σ_{t' ∈ B} g_i(t) g_i(t') (e_t · e_t')²,       t_i the same with the cube,       for different blocks A, B,

estimate ``‖S_i‖²`` and ``‖T_i‖²``, for the sampling errors of A and B are independent; means over all pairs of blocks are
taken. One thing the blocks do share: g comes from a regression on all of them. What one block has too much of another latent's
code, the others have too little of, so where errors go with other latents (as on language models, where they go with the
activations' norm) q_i comes out too low. By how much is known: with ``M_A = blocks Σ_{t ∈ A} g(t) c(t)ᵀ``, on average about
the identity, and ``G_jk`` the same means over pairs of ``g_j(t) g_k(t')``,

    q_i  +=  (Σ_A (M_A G M_Aᵀ)_ii - blocks (M̄ G M̄ᵀ)_ii) / (blocks (blocks - 1)),       t_i likewise.

Features planted in SmolLM2's activations independently of everything came out at -.023 (at 5 % of the examples) and -.046 (at
1 %) without it; with it at -.002 ± .001 and .002 ± .002 (40 draws of 8 + 8, 8 192 rows, 256 latents).

Where errors do not depend on codes, q_i scatters about 0 by a known ``σ_i² = Var(e · e')² Σ_A Σ_B ‖g_i‖² ‖g_i'‖²`` (of
``(e · e')²`` what is left once rows and columns are centred). Root and rate bend at that scale, ``τ_i = 1.5 σ_i``::

    ‖S_i‖ = q_i / (q_i² + τ_i²)^¼,        r_i² = (max(0, q_i t_i) + m² τ_i²) / (q_i² + τ_i²),   at most m².

The root is odd, and the rate even, under the change of sign of (q_i, t_i) that noise does not feel: a latent that hedges
nothing is zero on average, of either sign. Hedging below about ``√τ_i`` is underestimated. ``Cov(c)`` is shrunk toward its
diagonal by ``W / (W + examples)``, and for more than 4096 latents it is the diagonal. Each ``h_i`` is divided by the norm that
regression gives row i, which takes out the scale of the codes. *Standard error*: the mean over latents is linearised in the
values of every pair of blocks; the variance of a mean over pairs has a part that each block brings alone and a part of the
pairs (Hoeffding 1948), both by analysis of variance, the former of either sign. It was cut at 0 up to release 0.2, which made
standard errors a seventh too large where nothing hedges.

*When to trust it.* Toys with rare, orthonormal features and SAEs narrower than d_in: the ranks agree with true hedging at
.98 and more for every kind, and the level is .03 to .04 too low, .07 in hierarchies (300 SAEs of ``hedgelab trial``). *When
not:* a missing feature that fires more rarely than the others that are missing is overestimated, since evening out raises
directions of little error: up to 1.6 times where it has a quarter of their variance. One that fires on *most* firings of a
latent (``p_i > 1/2``) is underestimated, by ``(1 - p) / p``: the sign of ``1 - 2 p_i`` is not known. Anything else that
makes the error's shape depend on a code counts as hedging, such as magnitudes that are badly reconstructed outside the
decoder's span. With more features than dimensions the projection takes about the share ``W / d_in`` of every missing
feature, so that widths between ``d_in / 2`` and ``d_in`` come out too low. On real activations, dense and overlapping,
compare SAEs of one width, and believe no level.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes, row_pointers
from hedgelab.kernels.ops import decode, decoder_gradient
from hedgelab.kernels.values import Decoder
from hedgelab.metrics.functional import accumulate
from hedgelab.metrics.functional.accumulate import as_codes, float64, fold_decoder, orthonormal_basis

BLOCKS = 16  # parts that examples are split into; errors are compared between different ones only
FIRINGS = 16  # firings that a latent needs for its hedging to be estimated
JOINT_LATENTS = 4096  # most latents whose codes are taken as correlated
_FEW = 10_000  # examples up to which products of errors are kept, 200 MB
_NOISE = 1.5  # standard deviations of the noise at which root and rate bend
_Products = Callable[[int, int], Tensor]


class ResidualHedging(NamedTuple):
    """Hedging as the errors' spread shows it; float64."""

    hedging: Tensor  # mean over measured latents; of either sign where nothing hedges, NaN where none is measured
    std: Tensor  # standard error of it over examples
    latents: Tensor  # signed hedging of each latent, [W]; NaN for those that fire too rarely to be measured
    measured: Tensor  # number of latents measured
    magnitude: Tensor  # magnitude m of what is missing


def residual_hedging(x: Tensor, error: Tensor, codes: Tensor | Codes, W_dec: Tensor, blocks: int = BLOCKS) -> ResidualHedging:
    """How much each latent hedges, from held-out activations and the SAE's errors on them; formulas, and trust, in the module.

    From about 0 (none) to 1 (a latent that is mostly other features). ``x``, ``error = x - x_hat``: ``[examples, d_in]``;
    latents are codes or dense ``[examples, W]``; ``W_dec [W, d_in]`` has any norms. Examples should be independent of one
    another and of training: ``blocks`` are successive parts of them. Needs about ``100 W²`` bytes beside (codes stay
    sparse), and ``(d_in + 4 L0 + 2 W / blocks) · examples² + 9 W³`` multiplications.

    >>> x = torch.eye(3).repeat(200, 1)[:, [0, 1, 1]]  # a perfect SAE leaves no error
    >>> residual_hedging(x, 0 * x, x[:, :1], torch.eye(3)[:1]).hedging.item()
    0.0

    Logged as:
        hedging/residual_hedging: residual hedging (lower): norm of hedged components, from the spread of errors; 0: none
        hedging/residual_hedging_std: its std. error: standard error of residual hedging over examples
    """
    with torch.autocast(W_dec.device.type, enabled=False):  # which would put products into half precision
        return _residual_hedging(x, error, as_codes(codes), W_dec, blocks)


def _residual_hedging(x: Tensor, error: Tensor, codes: Codes, W_dec: Tensor, blocks: int) -> ResidualHedging:
    if blocks < 4:
        raise UserError(f"blocks: must be at least 4, got {blocks}")
    if (size := len(x) // blocks) < 2:
        raise UserError(f"examples: need at least {2 * blocks} for {blocks} blocks, got {len(x)}")
    directions = fold_decoder(W_dec)[0]  # the scale of codes cancels: rows of the regression are in units of it too
    x, error = (rows.detach()[: size * blocks] for rows in (x, error))
    codes = codes.detach().part(slice(0, size * blocks)).to(directions.device)
    measured = codes.firing_counts() >= FIRINGS
    latents = torch.full(measured.shape, torch.nan, dtype=torch.float64, device=measured.device)
    count, nothing = measured.sum().double(), latents.new_tensor(torch.nan)
    if not bool(measured.any()):
        return ResidualHedging(nothing, nothing, latents, count, nothing)
    chosen = measured.nonzero().squeeze(1)
    directions = directions[chosen]
    error = float64(error) - float64(error).mean(0)
    if len(directions) <= directions.shape[1]:
        basis = orthonormal_basis(directions)
        error = error - (error @ basis) @ basis.t()
    if not bool(error.square().mean() > 1e-12 * float64(x.square().mean())):  # nothing is left: nothing is missing
        zero = torch.zeros_like(nothing)
        return ResidualHedging(zero, zero, torch.where(measured, 0.0, latents), count, zero)
    parts = [_of_latents(codes.part(slice(at, at + size)), chosen) for at in range(0, len(x), size)]
    mean, inverse = regression(parts)
    scale, shares, sizes = torch.zeros_like(directions[:, 0]), [], []
    for g, part, own in zip(influence(parts, mean, inverse), parts, torch.split(x, size), strict=True):
        scale += ((float64(g).t() @ float64(own)) * directions).sum(1)
        g.sub_(g.mean(0))
        _, index, values = part.csr()
        shares.append(part.with_values(float64(values) * g[part.rows(), index]).sum_per_latent())
        sizes.append(g.square().sum(0, dtype=torch.float64))
    scale, own_share = scale.abs().clamp_min(1e-30), torch.stack(shares)
    parts = [part.with_values(part.values.float()) for part in parts]
    error = evened_out(error)
    covariance = error.t() @ error / len(error)
    products = _products(torch.split(error.float(), size))
    moments, of_all, noise = _moments(products, parts, inverse, sizes)
    with torch.inference_mode(False), torch.enable_grad():  # clones: those of an inference pass know no gradients
        means = [part.clone().requires_grad_() for part in (*moments, *of_all.mean(0))]
        own, magnitude = _hedging(means, noise.clone(), covariance.clone())
        hedging = (own / scale.clone()).mean()
        slopes = torch.autograd.grad(hedging, means)
    by_pair = _by_pair(products, parts, inverse, slopes[:2]) + of_all @ torch.stack(slopes[2:])
    excess = own_share / own_share.mean(0) - 1  # of a latent's variance in a block: no error of a regression
    by_block = excess @ sum(slope * part.detach() for slope, part in zip(slopes[:2], means[:2], strict=True))
    first, second = torch.triu_indices(blocks, blocks, 1, device=own_share.device)
    latents[chosen] = (own / scale).detach()
    std = pairwise_standard_error(by_pair - by_block[first] - by_block[second], blocks)
    return ResidualHedging(hedging.detach(), std, latents, count, magnitude.detach())


def evened_out(error: Tensor) -> Tensor:
    """Centred errors ``[examples, d_in]`` with their variance λ along each principal direction made ``2 λ v / (λ + v)``.

    v is the variance along the direction of an average unit of error, ``Σ λ² / Σ λ``: directions with more of it weigh less.
    """
    variances, vectors = torch.linalg.eigh(error.t() @ error / len(error))
    variances = variances.clamp_min(0)
    usual = variances.square().sum() / variances.sum()
    evened: Tensor = error @ (vectors * (2 * usual / (variances + usual)).sqrt())
    return evened


def regression(codes: Sequence[Codes]) -> tuple[Tensor, Tensor]:
    """Mean of the codes of all blocks, and ``Cov(c)⁻¹ / examples [W, W]``, or of many latents its diagonal ``[W]``; float32."""
    examples, width = sum(part.batch_size for part in codes), codes[0].d_sae
    wide = [part.with_values(float64(part.values)) for part in codes]
    mean = torch.stack([part.sum_per_latent() for part in wide]).sum(0) / examples
    squares = torch.stack([part.with_values(part.values.square()).sum_per_latent() for part in wide]).sum(0)
    variance = (squares / examples - mean.square()).clamp_min(1e-30)
    if width > JOINT_LATENTS:
        return mean.float(), (1 / (examples * variance)).float()
    shrinkage = width / (width + examples)
    covariance = -examples * mean.outer(mean)
    for part in wide:
        accumulate.add_sum(covariance, accumulate.pair_product(part, part))
    covariance.mul_((1 - shrinkage) / examples).diagonal().add_(shrinkage * variance)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance)).div_(examples)
    return mean.float(), inverse.float().contiguous()  # it comes in columns, of which decoding is ten times as slow


def influence(codes: Sequence[Codes], mean: Tensor, inverse: Tensor) -> Iterator[Tensor]:
    """Weights g of each block, float32 ``[examples, W]``; ``gᵀ y``, summed over blocks, is the regression of y on the codes."""
    if inverse.ndim == 1:
        yield from ((part.to_dense().float() - mean) * inverse for part in codes)
    else:
        decoder = Decoder(inverse, -(mean @ inverse))
        yield from (decode(part.with_values(part.values.float()), decoder) for part in codes)


def pairwise_standard_error(values: Tensor, blocks: int) -> Tensor:
    """Standard error of the mean over all pairs of blocks of ``values [pairs]``, pairs in the order of ``combinations``.

    ``value_ab = mean + ξ_a + ξ_b + η_ab``: the variance of the mean is ``4 Var ξ / blocks + Var η / pairs``, both estimated
    without bias. Var ξ may come out negative, but takes no more than half of the other part.
    """
    first, second = torch.triu_indices(blocks, blocks, 1, device=values.device)
    table = values.new_zeros(blocks, blocks)
    table[first, second] = table[second, first] = values - values.mean()
    alone = table.sum(1) / (blocks - 2)
    left = table[first, second] - alone[first] - alone[second]
    of_pairs = left.square().sum() / (blocks * (blocks - 3) / 2)
    of_blocks = alone.square().sum() / (blocks - 1) - of_pairs / (blocks - 2)
    return (4 * of_blocks / blocks).clamp_min(-of_pairs / len(values) / 2).add(of_pairs / len(values)).sqrt()


def _of_latents(codes: Codes, chosen: Tensor) -> Codes:
    """Codes of some latents alone, as sparse ones."""
    _, latents, values = codes.csr()
    place = torch.full((codes.d_sae,), -1, device=latents.device)
    place[chosen] = torch.arange(len(chosen), device=latents.device)
    kept = (place[latents] >= 0).nonzero().squeeze(1)
    crow = row_pointers(codes.rows()[kept], codes.batch_size)
    return Codes.from_csr(crow, place[latents[kept]], values[kept], len(chosen))


def _products(errors: Sequence[Tensor]) -> _Products:
    """``e · e'`` between two blocks, the second's in rows; kept unless examples are many: 800 MB of 20 000."""

    def products(a: int, b: int) -> Tensor:
        return errors[b] @ errors[a].t()

    return cache(products) if sum(map(len, errors)) <= _FEW else products


def _along_codes(kernel: Tensor, codes: Codes) -> Tensor:
    """``codesᵀ kernel`` with rows and columns of the kernel centred, ``[W, examples]``: weights g have no mean in any block."""
    centred = kernel - kernel.mean(0)
    return decoder_gradient(codes, centred.sub_(centred.mean(1, keepdim=True))[None], (codes.d_sae,))


def _moments(
    products: _Products, codes: Sequence[Codes], inverse: Tensor, sizes: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Means over pairs of blocks of q and t of each latent, ``[W]``; those of the whole error, ``[pairs, 2]``; and σ ``[W]``.

    With ``g = inverse (c - mean)`` the sum of ``g_i g_i' kernel`` is ``(inverse M inverse)_ii``, M that of ``codesᵀ kernel
    codes'`` over all pairs: codes stay sparse. ``sizes`` are ``Σ ‖g_i‖²`` of each block.
    """
    blocks = len(codes)
    totals = [torch.zeros_like(inverse) for _ in range(2)]
    of_all, scatter, amounts = [], [], torch.zeros_like(sizes[0])
    for a in range(blocks - 1):
        sums = [codes[a].values.new_zeros(codes[a].d_sae, codes[a].batch_size) for _ in range(2)]
        for b in range(a + 1, blocks):
            product = products(a, b)
            square = product.square()
            cube = square * product
            scatter.append((square.var() - square.mean(0).var() - square.mean(1).var()).double().clamp_min(0))
            of_all.append(torch.stack([kernel.mean(dtype=torch.float64) for kernel in (square, cube)]))
            amounts += blocks**4 * sizes[a] * sizes[b]
            for own, kernel in zip(sums, (square, cube), strict=True):
                own += _along_codes(kernel, codes[b])
        for total, own in zip(totals, sums, strict=True):
            if inverse.ndim == 1:
                total += (own * codes[a].to_dense().t()).sum(1, dtype=torch.float64)
            else:
                total += decoder_gradient(codes[a], own.t().contiguous()[None], (codes[a].d_sae,))
    noise = (torch.stack(scatter).mean() * amounts).sqrt() / len(of_all)
    factor = blocks**2 / len(of_all)
    if inverse.ndim == 1:
        each = [factor * (inverse.square() * total).double() for total in totals]
    else:
        grams = [inverse @ total @ inverse for total in totals]
        grams = [(gram + gram.t()).mul_(factor / 2) for gram in grams]
        each = [gram.diagonal().double() for gram in grams]
        each = [one + shared for one, shared in zip(each, _shared(grams, codes, inverse), strict=True)]
    return each, torch.stack(of_all), noise


def _shared(grams: Sequence[Tensor], codes: Sequence[Codes], inverse: Tensor) -> list[Tensor]:
    """What products of blocks lack since all share one regression, ``[W]`` of each of ``grams [W, W]``; see the module."""
    blocks, nothing = len(codes), torch.zeros_like(inverse[0])
    scatter, lacking = torch.zeros_like(inverse, dtype=torch.float64), [nothing.double() for _ in grams]
    for part, g in zip(codes, influence(codes, nothing, inverse), strict=True):
        g = g - g.mean(0)
        means = part.sum_per_latent().double() / part.batch_size
        scatter -= part.batch_size * means.outer(means)
        accumulate.add_sum(scatter, accumulate.pair_product(part, part))
        for number, gram in enumerate(grams):
            along = decode(part, Decoder(gram, nothing)).t().contiguous()
            between = decode(part, Decoder(along, along.new_zeros(part.batch_size)))  # c G cᵀ, [examples, examples]
            lacking[number] = lacking[number] + blocks**2 * ((between.t() @ g) * g).sum(0).double()
    mean = inverse @ scatter.float()
    lacking = [one - blocks * ((mean @ gram) * mean).sum(1).double() for one, gram in zip(lacking, grams, strict=True)]
    return [one / (blocks * (blocks - 1)) for one in lacking]


def _by_pair(products: _Products, codes: Sequence[Codes], inverse: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """``Σ_i slope_i q_i`` of each pair of blocks, and the same of t, together, ``[pairs]``.

    That is the product of ``codesᵀ kernel codes'`` with ``inverse diag(slope) inverse``, entry by entry.
    """
    blocks, values = len(codes), []
    if inverse.ndim == 1:
        weights = [inverse.square() * slope.float() for slope in slopes]
    else:
        weights = [(inverse * slope.float()) @ inverse for slope in slopes]
    nothing = weights[0].new_zeros(codes[0].d_sae)
    for a in range(blocks - 1):
        if inverse.ndim == 1:
            own = [(codes[a].to_dense() * weight).t() for weight in weights]
        else:
            own = [decode(codes[a], Decoder(weight, nothing)).t() for weight in weights]
        for b in range(a + 1, blocks):
            product = products(a, b)
            square = product.square()
            kernels = square, square * product
            parts = [(_along_codes(kernel, codes[b]) * one).sum() for kernel, one in zip(kernels, own, strict=True)]
            values.append(blocks**2 * torch.stack(parts).sum(dtype=torch.float64))
    return torch.stack(values)


def _hedging(means: Sequence[Tensor], noise: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Signed ``‖h_i‖`` in units of codes, ``[W]``, and the magnitude m; the covariance is that of the errors."""
    second, third, second_of_all, third_of_all = means
    squared = covariance @ covariance
    variance = (squared * covariance).sum() / squared.diagonal().sum().clamp_min(1e-30)
    skew = (third_of_all / second_of_all.clamp_min(1e-30)).clamp_min(0)
    magnitude = (skew + 4 * variance).sqrt()
    bend = _NOISE * noise
    known = second.square() + bend.square()
    squared_ratio = ((second * third).clamp_min(0) + (magnitude * bend).square()) / known.clamp_min(1e-60)
    ratio = torch.minimum(squared_ratio.clamp_min(1e-30).sqrt(), magnitude)
    # signed, and straight where |q| is below τ
    root = second / known.clamp_min(torch.finfo(second.dtype).tiny).pow(0.25)
    return 2 * root / (magnitude + ratio), magnitude
