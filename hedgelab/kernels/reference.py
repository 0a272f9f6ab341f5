"""Dense reference of every kernel: plain PyTorch with autograd, right by inspection, the yardstick of fast paths."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hedgelab.kernels.agreement import Share, among_largest
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.errors import LevelErrors, squared_error
from hedgelab.kernels.jumprelu import jump, step
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, JumpReLU, ReLU, Selection, Target, Threshold, TopK


def pre_activations(x: Tensor, encoder: Encoder) -> Tensor:
    """``(x - b_dec) W_enc + b_enc``, ``[batch, d_sae]``."""
    return torch.addmm(encoder.b_enc, x - encoder.b_dec, encoder.W_enc)


def encode(
    x: Tensor,
    encoder: Encoder,
    selection: Selection,
    product: Callable[[Tensor, Encoder], Tensor] = pre_activations,
) -> Codes:
    """Codes of activations ``[batch, d_in]``; ``product`` computes the pre-activations."""
    if isinstance(selection, TopK) and selection.among is not None:
        values, indices = product(x, encoder.columns(selection.among)).topk(selection.k, dim=1)
        return Codes.from_topk(selection.among[indices], values.relu(), encoder.W_enc.shape[1])
    pre = product(x, encoder)
    match selection:
        case ReLU():
            return Codes.from_dense(pre.relu_())
        case Threshold(threshold):
            return Codes.from_dense(torch.where(pre > threshold, pre, 0.0))
        case TopK(k):
            ranked = pre if encoder.scale is None else pre * encoder.scale
            kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, ranked.detach().topk(k, dim=1).indices, True)
            return Codes.from_dense(torch.where(kept, pre.relu(), 0.0))
        case BatchTopK():
            return _batch_topk(pre.relu_(), encoder, selection)
        case JumpReLU(log_threshold, bandwidth, weight):
            threshold = log_threshold.exp()
            fired = step(pre, threshold, bandwidth)
            rates = fired.mean(0) if weight is None else weight.to(fired.dtype) @ fired
            return Codes.from_dense(jump(pre, threshold, bandwidth), rates)


def _batch_topk(activations: Tensor, encoder: Encoder, selection: BatchTopK) -> Codes:
    """The largest of ``activations [batch, d_sae]``; with a share, of those of all parts, as far as they lie in this one."""
    k, weight, _ = selection
    scaled = activations if encoder.scale is None else activations * encoder.scale
    ranked, share = scaled.detach().flatten(), encoder.share
    if weight is not None:
        kept = _first_mass(ranked, weight, k, share)
    elif share is not None:
        ranges = (torch.arange(n, device=activations.device) for n in activations.shape)
        positions = share.positions(*torch.meshgrid(*ranges, indexing="ij")).flatten()
        kept = among_largest(_at_least_single(ranked), positions, k * share.rows, share.ranks)
    else:
        kept = torch.zeros_like(ranked, dtype=torch.bool).scatter(0, ranked.topk(k * len(activations)).indices, True)
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


def decode(codes: Codes, decoder: Decoder) -> Tensor:
    """``a W_dec + b_dec``, ``[batch, d_in]``."""
    return torch.addmm(decoder.b_dec, codes.rows_to_dense(), decoder.W_dec)


def level_errors(codes: Codes, decoder: Decoder, target: Target) -> LevelErrors:
    """Squared error of each level's reconstruction, and the errors."""
    x, levels, detach, weight = target
    one = len(levels) == 1 and levels[0] == codes.d_sae
    x_hats = [decode(codes, decoder)] if one else decode_levels(codes, decoder, levels, detach)
    return LevelErrors.of([squared_error(x_hat, x, weight) for x_hat in x_hats])


def decode_levels(codes: Codes, decoder: Decoder, levels: Sequence[int], detach: bool = False) -> list[Tensor]:
    """Reconstructions from the first ``m`` latents for each ``m`` of ``levels``, each ``[batch, d_in]``.

    With ``detach`` the running reconstruction is detached before each level adds its own latents.
    """
    activations = codes.rows_to_dense()
    reconstructions: list[Tensor] = []
    running, start = decoder.b_dec.expand(activations.shape[0], -1), 0
    for stop in levels:
        if detach and start:
            running = running.detach()
        running = running + activations[:, start:stop] @ decoder.W_dec[start:stop]
        reconstructions.append(running)
        start = stop
    return reconstructions
