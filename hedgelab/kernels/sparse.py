"""The CPU path of every kernel on sparse codes: exact, and nothing of size ``[batch, d_sae]`` kept or differentiated.

Signatures and results are those of :mod:`hedgelab.kernels.reference`. Only the encoder's product is dense; it runs without a
graph, a selection picks entries, and gradients then touch those entries alone. Products in a type narrower than single
precision (autocast, bf16 parameters) are computed in it; everything after the encoder's product is single precision, the
sparse weights being cast up for their products.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hedgelab.kernels import reference
from hedgelab.kernels.agreement import Share
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.errors import LevelErrors, SparseLevelErrors
from hedgelab.kernels.jumprelu import JumpReLU, StepFunction
from hedgelab.kernels.layout import Layout
from hedgelab.kernels.products import gather_product, sampled_product, scatter_product
from hedgelab.kernels.ranks import ALONE, Ranks
from hedgelab.kernels.selection import Encoder, Entries, select_above, select_batch_topk, select_topk


def encode_relu(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Codes:
    """As :func:`reference.encode_relu`."""
    return encode_threshold(x, W_enc, b_enc, b_dec, b_enc.new_zeros(()))


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, selection_scale: Tensor | None = None
) -> Codes:
    """As :func:`reference.encode_topk`."""
    with torch.no_grad():
        entries = select_topk(encoder(x, W_enc, b_enc, b_dec), k, selection_scale)
    pre = _pre_activations(x, W_enc, b_enc, b_dec, entries)
    return Codes.from_layout(entries.layout, pre.relu())


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
    """As :func:`reference.encode_batch_topk`, which also serves ``weight``: populations are small."""
    if weight is not None:
        return reference.encode_batch_topk(x, W_enc, b_enc, b_dec, k, selection_scale, weight, share)
    with torch.no_grad():
        entries = select_batch_topk(encoder(x, W_enc, b_enc, b_dec), k, selection_scale, share)
    return Codes.from_layout(entries.layout, _pre_activations(x, W_enc, b_enc, b_dec, entries))


def encode_columns(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, columns: Tensor, k: int) -> Codes:
    """As :func:`reference.encode_columns`."""
    with torch.no_grad():
        inside = encoder(x, W_enc.t()[columns].t(), b_enc[columns], b_dec)
        found, values = select_topk(inside, k, None)
        entries = Entries(Layout(found.crow, columns[found.latents], W_enc.shape[1]), values)
    return Codes.from_layout(entries.layout, _pre_activations(x, W_enc, b_enc, b_dec, entries).relu())


def encode_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor) -> Codes:
    """As :func:`reference.encode_threshold`."""
    with torch.no_grad():
        entries = select_above(encoder(x, W_enc, b_enc, b_dec), threshold)
    return Codes.from_layout(entries.layout, _pre_activations(x, W_enc, b_enc, b_dec, entries))


def encode_jumprelu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    log_threshold: Tensor,
    bandwidth: float,
    weight: Tensor | None = None,
) -> tuple[Codes, Tensor]:
    """As :func:`reference.encode_jumprelu`.

    Stored are all entries above the lower end of the estimate's kernel, those below the threshold with value 0.
    """
    threshold = log_threshold.exp()
    with torch.no_grad():
        entries = select_above(encoder(x, W_enc, b_enc, b_dec), threshold - bandwidth / 2)
    layout = entries.layout
    pre = _pre_activations(x, W_enc, b_enc, b_dec, entries)
    thresholds = threshold[layout.latents]
    values: Tensor = JumpReLU.apply(pre, thresholds, bandwidth)  # type: ignore[no-untyped-call]
    fired: Tensor = StepFunction.apply(pre, thresholds, bandwidth)  # type: ignore[no-untyped-call]
    share = fired / x.shape[0] if weight is None else fired * weight.to(fired.dtype)[layout.rows]
    rates = share.new_zeros(W_enc.shape[1]).index_add(0, layout.latents, share)
    return Codes.from_layout(layout, values), rates


def decode(codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """As :func:`reference.decode`; dense codes are decoded there."""
    if codes.layout is None:
        return reference.decode(codes, W_dec, b_dec)
    (x_hat,) = _decode(codes, W_dec, b_dec, (codes.d_sae,), False)
    return x_hat


def decode_levels(
    codes: Codes, W_dec: Tensor, b_dec: Tensor, levels: Sequence[int], detach: bool = False
) -> list[Tensor]:
    """As :func:`reference.decode_levels`; dense codes are decoded there."""
    if codes.layout is None or not levels:
        return reference.decode_levels(codes, W_dec, b_dec, levels, detach)
    if levels[-1] < codes.d_sae:
        codes = codes.prefix(levels[-1])
    return list(_decode(codes, W_dec, b_dec, tuple(levels), detach))


def level_errors(
    codes: Codes,
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    levels: Sequence[int],
    detach: bool = False,
    weight: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> LevelErrors:
    """As :func:`reference.level_errors`; decode and error are one kernel, and ``ranks`` may share the latents."""
    if ranks.size == 1 and (codes.layout is None or levels[-1] < codes.d_sae):
        return reference.level_errors(codes, x, W_dec, b_dec, levels, detach, weight)
    assert codes.layout is not None
    args = (codes.values, x, W_dec, b_dec, codes.layout, tuple(levels), detach, weight, ranks)
    losses, errors = SparseLevelErrors.apply(*args)  # type: ignore[no-untyped-call]
    return LevelErrors(losses.unbind(), errors.unbind())


def encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Encoder:
    """The encoder's product of some activations, in the type that autocast asks for; without a gradient."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W_enc.dtype
    centred = (x - b_dec).to(dtype)
    return Encoder(centred, W_enc.to(dtype), b_enc.to(dtype), working_dtype(dtype))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Single precision for narrower types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def _pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, entries: Entries) -> Tensor:
    pre: Tensor = SelectedPreActivations.apply(x, W_enc, b_enc, b_dec, entries.pre, entries.layout)  # type: ignore[no-untyped-call]
    return pre


def _decode(codes: Codes, W_dec: Tensor, b_dec: Tensor, levels: tuple[int, ...], detach: bool) -> tuple[Tensor, ...]:
    x_hats: tuple[Tensor, ...] = DecodeLevels.apply(codes.values, W_dec, b_dec, codes.layout, levels, detach)  # type: ignore[no-untyped-call]
    return x_hats


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


class DecodeLevels(Function):
    """Reconstructions from nested prefixes of the latents by one sparse product; one level is an ordinary decode."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, layout: Layout, levels: tuple[int, ...], detach: bool
    ) -> tuple[Tensor, ...]:
        dtype = working_dtype(W_dec.dtype)
        ctx.layout, ctx.levels, ctx.detach, ctx.out_dtype = layout, levels, detach, W_dec.dtype
        ctx.save_for_backward(values, W_dec)
        if len(levels) == 1:
            x_hat = gather_product(layout, values.to(dtype), W_dec.to(dtype), b_dec.to(dtype))
            return (x_hat.to(W_dec.dtype),)
        split = layout.by_level(levels)
        deltas = gather_product(split, values.to(dtype)[split.order], W_dec.to(dtype))
        running = deltas.view(len(levels), layout.row_count, W_dec.shape[1])
        running[0] += b_dec
        for level in range(1, len(levels)):
            running[level] += running[level - 1]
        return tuple(running.to(W_dec.dtype).unbind())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        values, W_dec = ctx.saved_tensors
        dtype = working_dtype(W_dec.dtype)
        layout: Layout = ctx.layout
        if len(grads) == 1:
            upstream = grads[0].to(dtype).unsqueeze(0)
        else:
            upstream = _suffix_sums(grads, dtype, ctx.detach)
            layout = layout.by_level(ctx.levels)
        by_row = upstream.reshape(-1, upstream.shape[-1])
        needs_values, needs_W_dec, needs_b_dec, *_ = ctx.needs_input_grad
        transposed = layout.transposed
        grad_values = grad_W_dec = None
        if needs_values:
            by_latent = sampled_product(transposed, W_dec.to(dtype), by_row)
            grad_values = torch.empty_like(by_latent).index_copy_(0, transposed.order, by_latent)
        if needs_W_dec:
            grad_W_dec = scatter_product(transposed, values.to(dtype)[transposed.order], by_row)
        return grad_values, grad_W_dec, upstream[0].sum(0) if needs_b_dec else None, None, None, None


def _suffix_sums(grads: Sequence[Tensor], dtype: torch.dtype, detach: bool) -> Tensor:
    """What each level's own latents feel, ``[levels, batch, d_in]``: all outer levels' gradients, or their own alone."""
    sums = torch.stack(list(grads)).to(dtype)
    if not detach:
        for level in range(len(grads) - 2, -1, -1):
            sums[level] += sums[level + 1]
    return sums
