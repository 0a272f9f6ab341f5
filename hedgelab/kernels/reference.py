"""Dense reference of every kernel: plain PyTorch with autograd, right by inspection, the yardstick of fast paths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hedgelab.kernels.agreement import Share, among_largest
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.errors import LevelErrors, squared_error
from hedgelab.kernels.jumprelu import JumpReLU, StepFunction


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """``(x - b_dec) W_enc + b_enc``, ``[batch, d_sae]``."""
    return torch.addmm(b_enc, x - b_dec, W_enc)


def encode_relu(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Codes:
    """Codes of a ReLU SAE."""
    return Codes.from_dense(pre_activations(x, W_enc, b_enc, b_dec).relu())


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, selection_scale: Tensor | None = None
) -> Codes:
    """Codes of the k largest pre-activations of each example, then ReLU."""
    pre = pre_activations(x, W_enc, b_enc, b_dec)
    ranked = pre if selection_scale is None else pre * selection_scale
    kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, ranked.detach().topk(k, dim=1).indices, True)
    return Codes.from_dense(torch.where(kept, pre.relu(), 0.0))


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    selection_scale: Tensor | None = None,
    weight: Tensor | None = None,
    share: Share | None = None,
) -> Codes:
    """Codes of the k · batch largest of ``relu(pre)`` over the batch.

    With ``weight`` (population mode) entries are kept, largest first, until their weight reaches k: L0 is k on average.
    With a ``share`` this is that part of a larger product, of whose batch the largest entries are kept; the codes are those
    that lie in the part. Weights then sum to 1 on average over the parts.
    """
    activations = pre_activations(x, W_enc, b_enc, b_dec).relu()
    ranked = (activations if selection_scale is None else activations * selection_scale).detach().flatten()
    if weight is not None:
        kept = _first_mass(ranked, weight, k, share)
    elif share is not None:
        rows, latents = torch.meshgrid(*(torch.arange(n, device=x.device) for n in activations.shape), indexing="ij")
        positions = share.positions(rows, latents).flatten()
        kept = among_largest(_at_least_single(ranked), positions, k * share.rows, share.ranks)
    else:
        kept = torch.zeros_like(ranked, dtype=torch.bool).scatter(0, ranked.topk(k * x.shape[0]).indices, True)
    return Codes.from_dense(torch.where(kept.view_as(activations), activations, 0.0))


def _first_mass(ranked: Tensor, weight: Tensor, k: int, share: Share | None) -> Tensor:
    """Which entries, largest first, have a summed weight of at most k; ``ranked [batch · d_sae]``, ``weight [batch]``.

    Weights are summed in double precision, and may exceed k by what rounding them, and their sums, can add.
    """
    rounding = 4 * torch.finfo(weight.dtype).eps + ranked.shape[0] * torch.finfo(torch.float64).eps
    mass = weight.double().repeat_interleave(ranked.shape[0] // weight.shape[0])
    first, last = 0, ranked.shape[0]
    if share is not None:
        first = share.ranks.rank * last
        parts = share.rows // weight.shape[0]  # of the batch; over these the weights sum to 1 on average
        ranked, mass, last = share.ranks.cat(ranked), share.ranks.cat(mass) / parts, first + last
    order = ranked.argsort(descending=True, stable=True)
    kept = torch.zeros_like(ranked, dtype=torch.bool).scatter(0, order, mass[order].cumsum(0) <= k * (1 + rounding))
    return kept[first:last]


def _at_least_single(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def encode_columns(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, columns: Tensor, k: int) -> Codes:
    """Codes of the k largest pre-activations of each example among the latents ``columns`` only, then ReLU."""
    pre = pre_activations(x, W_enc[:, columns], b_enc[columns], b_dec)
    values, indices = pre.topk(k, dim=1)
    return Codes.from_topk(columns[indices], values.relu(), W_enc.shape[1])


def encode_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor) -> Codes:
    """Codes ``pre · 1[pre > threshold]`` for a given threshold (a scalar or ``[d_sae]``), no gradient to it."""
    pre = pre_activations(x, W_enc, b_enc, b_dec)
    return Codes.from_dense(torch.where(pre > threshold, pre, 0.0))


def encode_jumprelu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    log_threshold: Tensor,
    bandwidth: float,
    weight: Tensor | None = None,
) -> tuple[Codes, Tensor]:
    """Codes of a JumpReLU SAE, and how often each latent fires on average over the batch, ``[d_sae]``.

    Both carry straight-through gradients to ``log_threshold`` (Rajamanoharan et al. 2024, section 3).
    """
    return jumprelu_codes(pre_activations(x, W_enc, b_enc, b_dec), log_threshold, bandwidth, weight)


def jumprelu_codes(pre: Tensor, log_threshold: Tensor, bandwidth: float, weight: Tensor | None) -> tuple[Codes, Tensor]:
    """What :func:`encode_jumprelu` makes of pre-activations ``[batch, d_sae]``."""
    threshold = log_threshold.exp()
    activations: Tensor = JumpReLU.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    fired: Tensor = StepFunction.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    rates = fired.mean(0) if weight is None else weight.to(fired.dtype) @ fired
    return Codes.from_dense(activations), rates


def decode(codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """``a W_dec + b_dec``, ``[batch, d_in]``."""
    return torch.addmm(b_dec, codes.to_dense(), W_dec)


def level_errors(
    codes: Codes,
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    levels: Sequence[int],
    detach: bool = False,
    weight: Tensor | None = None,
) -> LevelErrors:
    """Squared error of each level's reconstruction of ``x [batch, d_in]``, and the errors; levels as :func:`decode_levels`'."""
    if len(levels) == 1:
        loss, error = squared_error(decode(codes, W_dec, b_dec), x, weight)
        return LevelErrors([loss], [error])
    pairs = [squared_error(x_hat, x, weight) for x_hat in decode_levels(codes, W_dec, b_dec, levels, detach)]
    return LevelErrors([loss for loss, _ in pairs], [error for _, error in pairs])


def decode_levels(
    codes: Codes, W_dec: Tensor, b_dec: Tensor, levels: Sequence[int], detach: bool = False
) -> list[Tensor]:
    """Reconstructions from the first ``m`` latents for each ``m`` of ``levels``, each ``[batch, d_in]``.

    With ``detach`` the running reconstruction is detached before each level adds its own latents, so an inner level
    feels no gradient from outer ones; ``b_dec`` then learns from the innermost level alone.
    """
    activations = codes.to_dense()
    reconstructions: list[Tensor] = []
    running, start = b_dec.expand(activations.shape[0], -1), 0
    for stop in levels:
        if detach and start:
            running = running.detach()
        running = running + activations[:, start:stop] @ W_dec[start:stop]
        reconstructions.append(running)
        start = stop
    return reconstructions
