"""The CPU path of every kernel on sparse codes: exact, and nothing of size ``[batch, d_sae]`` kept or differentiated.

Results are those of :mod:`hedgelab.kernels.reference`. Only the encoder's product is dense; it runs without a graph, a
selection picks entries, and gradients then touch those entries alone. Products in a type narrower than single precision
(autocast, bf16 parameters) are computed in it; everything after the encoder's product is single precision, the sparse weights
being cast up for their products.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hedgelab.kernels import reference
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.errors import LevelErrors, SparseLevelErrors
from hedgelab.kernels.jumprelu import jump, step
from hedgelab.kernels.layout import Layout
from hedgelab.kernels.products import gather_product, sampled_product, scatter_product
from hedgelab.kernels.ranks import ALONE, Ranks
from hedgelab.kernels.selection import Entries, Product, select_above, select_batch_topk, select_topk
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, JumpReLU, ReLU, Selection, Target, Threshold, TopK


def encode(x: Tensor, encoder: Encoder, selection: Selection) -> Codes:
    """As :func:`reference.encode`, which also serves populations: they are small.

    Of JumpReLU all entries above the lower end of the estimate's kernel are stored, those below the threshold with value 0.
    """
    if isinstance(selection, BatchTopK) and selection.weight is not None:
        return reference.encode(x, encoder, selection)
    with torch.no_grad():
        layout, values = _select(x, encoder, selection)
    pre: Tensor = SelectedPreActivations.apply(x, *encoder[:3], values, layout)  # type: ignore[no-untyped-call]
    if isinstance(selection, TopK):
        return Codes.from_layout(layout, pre.relu())
    if not isinstance(selection, JumpReLU):
        return Codes.from_layout(layout, pre)
    log_threshold, bandwidth, weight = selection
    thresholds = log_threshold.exp()[layout.latents]
    fired = step(pre, thresholds, bandwidth)
    share = fired / x.shape[0] if weight is None else fired * weight.to(fired.dtype)[layout.rows]
    rates = share.new_zeros(layout.d_sae).index_add(0, layout.latents, share)
    return Codes.from_layout(layout, jump(pre, thresholds, bandwidth), rates)


def _select(x: Tensor, encoder: Encoder, selection: Selection) -> Entries:
    """The entries of the pre-activations that codes store."""
    match selection:
        case TopK(k, among) if among is None:
            return select_topk(Product.of(x, encoder), k, encoder.scale)
        case TopK(k, among):
            assert among is not None
            found, values = select_topk(Product.of(x, encoder.columns(among)), k, None)
            return Entries(Layout(found.crow, among[found.latents], encoder.W_enc.shape[1]), values)
        case BatchTopK(k):
            return select_batch_topk(Product.of(x, encoder), k, encoder.scale, encoder.share)
        case Threshold(threshold):
            return select_above(Product.of(x, encoder), threshold)
        case ReLU():
            return select_above(Product.of(x, encoder), encoder.b_enc.new_zeros(()))
        case JumpReLU(log_threshold, bandwidth):
            return select_above(Product.of(x, encoder), log_threshold.exp() - bandwidth / 2)


def decode(codes: Codes, decoder: Decoder) -> Tensor:
    """As :func:`reference.decode`; dense codes are decoded there."""
    if codes.layout is None:
        return reference.decode(codes, decoder)
    x_hat: Tensor = Decode.apply(codes.values, *decoder, codes.layout)  # type: ignore[no-untyped-call]
    return x_hat


def level_errors(codes: Codes, decoder: Decoder, target: Target, ranks: Ranks = ALONE) -> LevelErrors:
    """As :func:`reference.level_errors`; decode and error are one kernel, and ``ranks`` may share the latents."""
    x, levels, detach, weight = target
    if codes.layout is None:
        return reference.level_errors(codes, decoder, target)
    if levels[-1] < codes.d_sae:
        codes = codes.prefix(levels[-1])
    args = (codes.values, x, *decoder, codes.layout, tuple(levels), detach, weight, ranks)
    losses, errors = SparseLevelErrors.apply(*args)  # type: ignore[no-untyped-call]
    return LevelErrors(losses.unbind(), errors.unbind())


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Single precision for narrower types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


class SelectedPreActivations(Function):
    """Pre-activations of selected entries, computed before; this gives them their gradients."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, pre: Tensor, layout: Layout
    ) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(x, W_enc, b_dec)
        return pre.view_as(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, W_enc, b_dec = ctx.saved_tensors
        layout: Layout = ctx.layout
        needs_x, needs_W_enc, _, needs_b_dec, *_ = ctx.needs_input_grad
        weights = W_enc.t().to(grad.dtype)
        transposed = layout.transposed
        by_latent = grad[transposed.order]
        grad_b_enc = grad.new_zeros(layout.d_sae).index_add_(0, layout.latents, grad)
        grad_x = grad_W_enc = grad_b_dec = None
        if needs_x:
            grad_x = gather_product(layout, grad, weights)
        if needs_W_enc:
            grad_W_enc = scatter_product(transposed, by_latent, (x - b_dec).to(grad.dtype)).t()
        if needs_b_dec:
            grad_b_dec = -(grad_b_enc @ weights)
        return grad_x, grad_W_enc, grad_b_enc, grad_b_dec, None, None


class Decode(Function):
    """Reconstructions by one sparse product."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, layout: Layout) -> Tensor:  # noqa: D102
        dtype = _working_dtype(W_dec.dtype)
        ctx.layout = layout
        ctx.save_for_backward(values, W_dec)
        return gather_product(layout, values.to(dtype), W_dec.to(dtype), b_dec.to(dtype)).to(W_dec.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        values, W_dec = ctx.saved_tensors
        dtype = _working_dtype(W_dec.dtype)
        transposed, upstream = ctx.layout.transposed, grad.to(dtype)
        needs_values, needs_W_dec, needs_b_dec, _ = ctx.needs_input_grad
        grad_values = grad_W_dec = None
        if needs_values:
            by_latent = sampled_product(transposed, W_dec.to(dtype), upstream)
            grad_values = torch.empty_like(by_latent).index_copy_(0, transposed.order, by_latent)
        if needs_W_dec:
            grad_W_dec = scatter_product(transposed, values.to(dtype)[transposed.order], upstream)
        return grad_values, grad_W_dec, upstream.sum(0) if needs_b_dec else None, None
