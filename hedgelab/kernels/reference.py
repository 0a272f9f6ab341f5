"""Dense reference of every kernel: plain PyTorch with autograd, right by inspection, the yardstick of fast paths."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hedgelab.kernels.codes import Codes
from hedgelab.kernels.ranks import Share, among_largest
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, JumpReLU, ReLU, Selection, Target, Threshold, TopK


def pre_activations(x: Tensor, encoder: Encoder) -> Tensor:
    """``(x - b_dec) W_enc + b_enc``, ``[batch, d_sae]``."""
    return torch.addmm(encoder.b_enc, x - encoder.b_dec, encoder.W_enc)


class _PreActivations(Function):
    """The same for tensors of one type and without autocast: the gradient of ``b_dec`` follows from that of ``b_enc``.

    Autograd would pay a product as dear as the encoder's for it. The gradient of ``W_enc`` lies like a ``[d_sae, d_in]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
        centred = x - b_dec
        ctx.save_for_backward(centred, W_enc)
        return torch.addmm(b_enc, centred, W_enc)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc = ctx.saved_tensors
        needs_x, needs_W_enc, _, needs_b_dec = ctx.needs_input_grad
        grad_b_enc = grad.sum(0)
        grad_x = grad @ W_enc.t() if needs_x else None
        grad_W_enc = (grad.t() @ centred).t() if needs_W_enc else None
        return grad_x, grad_W_enc, grad_b_enc, -(W_enc @ grad_b_enc) if needs_b_dec else None


def encode(x: Tensor, encoder: Encoder, selection: Selection, lean: bool = False) -> Codes:
    """Codes of activations ``[batch, d_in]``; ``lean`` spares the backward pass a product, where all have one type."""
    if isinstance(selection, TopK) and selection.among is not None:
        pre = pre_activations(x, encoder.columns(selection.among))
        indices = selection.ranked(pre).topk(selection.k, dim=1).indices
        values = selection.activations(pre.gather(1, indices))
        return Codes.from_topk(selection.among[indices], values, encoder.W_enc.shape[1])
    pre = _PreActivations.apply(x, *encoder[:3]) if lean else pre_activations(x, encoder)  # type: ignore[no-untyped-call]
    match selection:
        case ReLU():
            return Codes.from_dense(pre.relu_())
        case Threshold(threshold):
            return Codes.from_dense(torch.where(pre > threshold, pre, 0.0))
        case TopK(k):
            largest = selection.ranked(_ranked(pre, encoder)).topk(k, dim=1).indices
            kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, largest, True)
            return Codes.from_dense(torch.where(kept, selection.activations(pre), 0.0))
        case BatchTopK(_, _, ranks):
            activations = pre.relu_()
            kept = _batch_topk(_ranked(activations, encoder), selection, encoder.share_of(len(x), ranks))
            return Codes.from_dense(torch.where(kept, activations, 0.0))
        case JumpReLU(threshold, bandwidth, weight):
            activations, fired = jump(pre, threshold, bandwidth)
            rates = fired.mean(0) if weight is None else weight.to(fired.dtype) @ fired
            return Codes.from_dense(activations, rates)


def _ranked(pre: Tensor, encoder: Encoder) -> Tensor:
    return (pre if encoder.scale is None else pre * encoder.scale).detach()


def _batch_topk(ranked: Tensor, selection: BatchTopK, share: Share) -> Tensor:
    """Which of ``ranked [batch, d_sae]`` are among the largest of all parts of the global batch."""
    k, weight, _ = selection
    flat, width = ranked.flatten(), ranked.shape[1]
    if weight is not None:
        kept = _first_mass(flat, weight, k, share)
    elif share.ranks.size > 1:
        single = flat.to(torch.promote_types(flat.dtype, torch.float32))
        kept = among_largest(single, lambda i: share.positions(i // width, i % width), round(k * share.rows), share.ranks)
    else:  # a fixed number of entries, so that torch.func can map it
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter(0, flat.topk(round(k * len(ranked))).indices, True)
    return kept.view_as(ranked)


def _first_mass(ranked: Tensor, weight: Tensor, k: float, share: Share) -> Tensor:
    """Which entries, largest first, weigh at most k, but for rounding; ``ranked [batch · d_sae]``, ``weight [batch]``."""
    count = len(ranked)
    parts = share.rows // len(weight)  # over these parts of the batch weights sum to 1 on average
    rounding = 4 * torch.finfo(weight.dtype).eps + count * torch.finfo(torch.float64).eps
    mass = share.ranks.cat(weight.double().repeat_interleave(count // len(weight))) / parts
    order = share.ranks.cat(ranked).argsort(descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, mass[order].cumsum(0) <= k * (1 + rounding))
    return kept[share.ranks.rank * count : (share.ranks.rank + 1) * count]


def decode(codes: Codes, decoder: Decoder) -> Tensor:
    """``a W_dec + b_dec``, ``[batch, d_in]``."""
    return torch.addmm(decoder.b_dec, codes.to_dense().reshape(-1, codes.d_sae), decoder.W_dec)


def decoder_gradient(codes: Codes, upstream: Tensor, levels: Sequence[int]) -> Tensor:
    """As :func:`hedgelab.kernels.ops.decoder_gradient`."""
    activations = codes.to_dense().reshape(-1, codes.d_sae).to(upstream.dtype)
    gradient = upstream.new_zeros(codes.d_sae, upstream.shape[2])
    for level, (start, stop) in enumerate(pairwise([0, *levels])):
        gradient[start:stop] = activations[:, start:stop].t() @ upstream[level]
    return gradient


def level_errors(
    codes: Codes, decoder: Decoder, target: Target, total: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Squared error of each level's reconstruction, and the errors; ``total`` sums what all parts of split latents add."""
    levels = target.levels
    if total is None and list(levels) == [codes.d_sae]:
        loss, error = squared_error(decode(codes, decoder), target)
        return [loss], [error]
    activations = codes.to_dense().reshape(-1, codes.d_sae)
    running, start = decoder.b_dec.expand(activations.shape[0], -1), 0
    losses, errors = list[Tensor](), list[Tensor]()
    for level, stop in enumerate(levels):
        added = activations[:, start:stop] @ decoder.W_dec[start:stop]
        added = added if total is None else total(added)
        spared = target.detach == "all_but_last" and level == len(levels) - 1
        cut = bool(target.detach) and level > 0 and not spared
        x_hat = (running.detach() if cut else running) + added
        running = running + added if cut else x_hat
        loss, error = squared_error(x_hat, target)
        losses.append(loss)
        errors.append(error)
        start = stop
    return losses, errors


def squared_error(x_hat: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Squared error, summed over ``d_in`` and averaged over the batch, and ``x_hat - x``, in at least single precision."""
    x = target.x
    error = x_hat - x if x_hat.dtype == x.dtype and x.itemsize >= 4 else x_hat.float() - x.float()
    weight = tilted(error.detach().square().sum(1), target) if target.tilt else target.weight
    if weight is not None:
        return weight.to(error.dtype) @ error.square().sum(1), error.detach()
    return error.square().sum() / max(1, x.shape[0]), error.detach()


@torch.no_grad()
def tilted(squares: Tensor, target: Target) -> Tensor:
    """The weights (see :class:`Target`) of examples of squared errors ``[..., batch]``, float64.

    Over all ranks they sum to what those of the target do.
    """
    ranks, exact = target.ranks, squares.double()
    even = 1 / max(1, exact.shape[-1])
    given = torch.full_like(exact, even) if target.weight is None else target.weight.double().expand_as(exact)
    mass = ranks.sum(given.sum(-1, keepdim=True))
    mean = ranks.sum((given * exact).sum(-1, keepdim=True)) / mass
    # An example of weight 0 has no say in what is largest, nor has a rank without examples.
    exponents = torch.where(given > 0, target.tilt * exact / mean.clamp_min(1e-300), -torch.inf)
    largest = -ranks.min(-torch.nn.functional.pad(exponents, (0, 1), value=-torch.inf).amax(-1, keepdim=True))
    shares = given * torch.exp(exponents - largest)
    return shares * (mass / ranks.sum(shares.sum(-1, keepdim=True)))


class _Jump(Function):
    """``pre · 1[pre > threshold]`` and ``1[pre > threshold]``.

    The threshold's gradients are estimates with a rectangle kernel of the given bandwidth; the second has none to ``pre``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        fired = pre > threshold
        return torch.where(fired, pre, 0.0), fired.to(pre.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pre, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(pre, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_fired: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        of_jump = -(threshold / ctx.bandwidth) * (near * grad).sum_to_size(threshold.shape)
        of_step = -(near * grad_fired).sum_to_size(threshold.shape) / ctx.bandwidth
        return torch.where(pre > threshold, grad, 0.0), of_jump + of_step, None


jump: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = _Jump.apply
