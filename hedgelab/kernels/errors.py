"""The squared error of reconstructions: SPEC's loss, on any path and fused with the sparse decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hedgelab.kernels.layout import Layout
from hedgelab.kernels.products import gather_product, sampled_product, scatter_product
from hedgelab.kernels.ranks import Ranks


class LevelErrors(NamedTuple):
    """How far each level's reconstruction is off.

    Attributes:
        losses: Squared error of each level, summed over ``d_in`` and averaged over the batch; differentiable scalars.
        errors: ``x_hat - x`` of each level, ``[batch, d_in]``, detached.
    """

    losses: Sequence[Tensor]
    errors: Sequence[Tensor]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> LevelErrors:
        """Those of each level's :func:`squared_error`."""
        return cls([loss for loss, _ in pairs], [error for _, error in pairs])


def squared_error(x_hat: Tensor, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared error summed over ``d_in`` and averaged over the batch, or over ``weight [batch]``; and ``x_hat - x``.

    The difference is taken in at least single precision, so bf16 reconstructions lose nothing more here.
    """
    error = x_hat - x if x_hat.dtype == x.dtype and x.itemsize >= 4 else x_hat.float() - x.float()
    if weight is not None:
        return weight.to(error.dtype) @ error.square().sum(1), error.detach()
    return error.square().sum() / max(1, x.shape[0]), error.detach()


class SparseLevelErrors(Function):
    """Sparse decode of all levels and their squared errors, in as few passes over ``[batch, d_in]`` as there are levels.

    Errors are accumulated from level to level as reconstructions would be; backward, level gradients are summed from the
    outermost inward. The first output holds the losses ``[levels]``, the second the errors ``[levels, batch, d_in]``.

    Values and decoder may be a part of the latents, the ``ranks`` having the others: what each level adds is then summed over
    them, and accumulated as one rank would.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        values: Tensor,
        x: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        layout: Layout,
        levels: tuple[int, ...],
        detach: bool,
        weight: Tensor | None,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(W_dec.dtype, torch.float32)
        values, count = values.to(dtype), len(levels)
        split = layout.by_level(levels) if count > 1 else None
        deltas = gather_product(split or layout, values[split.order] if split else values, W_dec.to(dtype))
        errors = ranks.sum(deltas).view(count, layout.row_count, W_dec.shape[1])
        errors[0].add_(b_dec).sub_(x)
        for level in range(1, count):
            errors[level].add_(errors[level - 1])
        ctx.layout, ctx.split, ctx.detach = layout, split, detach
        ctx.save_for_backward(values, W_dec, weight, errors)
        ctx.mark_non_differentiable(errors)
        ctx.set_materialize_grads(False)  # else backward is given zeros as large as the errors
        if weight is None:
            losses = torch.stack([torch.dot(error, error) for error in errors.view(count, -1)]) / max(1, x.shape[0])
        else:
            losses = torch.stack([weight.to(dtype) @ error.square().sum(1) for error in errors])
        return losses, errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # noqa: D102
        if grad is None:
            return (None,) * 9
        values, W_dec, weight, errors = ctx.saved_tensors
        needs_values, needs_x, needs_W_dec, needs_b_dec, *_ = ctx.needs_input_grad
        count, batch, d_in = errors.shape
        upstream = torch.empty_like(errors)
        coefficients = (2 * grad / max(1, batch) if weight is None else 2 * grad).tolist()
        for level in reversed(range(count)):
            error = errors[level] if weight is None else errors[level] * weight.to(errors.dtype)[:, None]
            if ctx.detach or level == count - 1:
                torch.mul(error, coefficients[level], out=upstream[level])
            else:
                torch.add(upstream[level + 1], error, alpha=coefficients[level], out=upstream[level])
        by_row = upstream.view(count * batch, d_in)
        transposed = (ctx.split or ctx.layout).transposed
        grad_values = grad_x = grad_W_dec = grad_b_dec = None
        if needs_values:
            by_latent = sampled_product(transposed, W_dec.to(errors.dtype), by_row)
            grad_values = torch.empty_like(by_latent).index_copy_(0, transposed.order, by_latent)
        if needs_W_dec:
            grad_W_dec = scatter_product(transposed, values[transposed.order], by_row).to(W_dec.dtype)
        if needs_b_dec:
            grad_b_dec = upstream[0].sum(0).to(W_dec.dtype)
        if needs_x:
            grad_x = -(upstream.sum(0) if ctx.detach else upstream[0])
        return grad_values, grad_x, grad_W_dec, grad_b_dec, None, None, None, None, None
