"""The sparse path of every kernel: exact, and nothing of size ``[batch, d_sae]`` is kept or differentiated.

Results are those of :mod:`hedgelab.kernels.reference`. Only the encoder's product is dense; it runs without a graph, a
selection picks entries, and gradients then touch those entries alone. Products in a type narrower than single precision
(autocast, bf16 parameters) are computed in it; what follows the encoder's product is summed in single precision.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hedgelab.kernels import products, reference, triton
from hedgelab.kernels.codes import Codes, Layout
from hedgelab.kernels.ranks import ALONE, Ranks
from hedgelab.kernels.selection import Product, select
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, Errors, JumpReLU, Selection, Target, TopK, computed_in


def products_on(tensor: Tensor) -> Any:
    """The module with the sparse products of a tensor's device; None on CUDA without Triton, where this path does not run."""
    if not tensor.is_cuda:
        return products
    if not triton.available():
        return None
    from hedgelab.kernels.triton import products as on_cuda

    return on_cuda


def encode(x: Tensor, encoder: Encoder, selection: Selection) -> Codes:
    """As :func:`reference.encode`, which also serves what is small: populations and, on CUDA, TopK among some latents.

    Of JumpReLU all entries above the lower end of the estimate's kernel are stored, those below the threshold with value 0.
    """
    among = selection.among if isinstance(selection, TopK) else None
    if (isinstance(selection, BatchTopK) and selection.weight is not None) or (among is not None and x.is_cuda):
        return reference.encode(x, encoder, selection)
    with torch.no_grad():
        used = encoder if among is None else encoder.columns(among)
        product = Product.of(x, used)
        selected = select(product, used, selection, products_on(x).select)
        layout = selected.layout
        assert layout is not None
        if among is not None:
            layout = Layout(layout.crow, among[layout.latents], encoder.W_enc.shape[1])
    # On CUDA the narrow copies that the product was made of are kept for the backward pass; elsewhere that takes the weights.
    narrow = (product.x, product.W_enc) if x.is_cuda else (None, None)
    pre: Tensor = _SelectedPreActivations.apply(x, *encoder[:3], selected.values, layout, *narrow)  # type: ignore[no-untyped-call]
    if isinstance(selection, BatchTopK):
        pre = pre.relu()  # kernels whose number of entries is fixed may store some that are not positive
    if not isinstance(selection, JumpReLU):
        return Codes(selection.activations(pre) if isinstance(selection, TopK) else pre, layout)
    threshold, bandwidth, weight = selection
    activations, fired = reference.jump(pre, threshold[layout.latents], bandwidth)
    share = fired / x.shape[0] if weight is None else fired * weight.to(fired.dtype)[layout.rows]
    return Codes(activations, layout, share.new_zeros(layout.d_sae).index_add(0, layout.latents, share))


def decode(codes: Codes, decoder: Decoder) -> Tensor:
    """As :func:`reference.decode`, of sparse codes."""
    settings = (codes.layout, (codes.d_sae,), None, ALONE)
    _, x_hats = _DecodeLevels.apply(codes.values, None, *decoder, *settings)  # type: ignore[no-untyped-call]
    x_hat: Tensor = x_hats[0].to(decoder.W_dec.dtype)
    return x_hat


def level_errors(codes: Codes, decoder: Decoder, target: Target, ranks: Ranks = ALONE) -> Errors:
    """As :func:`reference.level_errors` of sparse codes: decode and error are one kernel; ``ranks`` may share the latents."""
    if target.levels[-1] < codes.d_sae:
        codes = codes.prefix(target.levels[-1])
    settings = (codes.layout, tuple(target.levels), target, ranks)
    losses, errors = _DecodeLevels.apply(codes.values, target.x, *decoder, *settings)  # type: ignore[no-untyped-call]
    return losses.unbind(), errors.unbind()


def decoder_gradient(codes: Codes, upstream: Tensor, levels: Sequence[int]) -> Tensor:
    """As :func:`hedgelab.kernels.ops.decoder_gradient`."""
    if levels[-1] < codes.d_sae:
        codes = codes.prefix(levels[-1])
    values, kernels = codes.values.to(upstream.dtype), products_on(upstream)
    gradient: Tensor = kernels.latent_gradients(codes.layout, values, upstream, levels, upstream.dtype)[0]
    return gradient


class _SelectedPreActivations(Function):
    """Pre-activations of selected entries, computed before; this gives them their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, pre: Tensor, *known: Any) -> Tensor:
        ctx.layout, centred, weights = known
        ctx.save_for_backward(x, W_enc, b_dec, centred, weights)
        return pre.view_as(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec, centred, weights = ctx.saved_tensors
        layout, kernels = ctx.layout, products_on(grad)
        grad_x = grad_b_dec = None
        with torch.autocast(grad.device.type, enabled=False):
            centred = (x - b_dec).to(grad.dtype) if centred is None else centred
            rows, all_latents = (W_enc.to(grad.dtype) if weights is None else weights).t(), (layout.d_sae,)
            wanted = W_enc.dtype if ctx.needs_input_grad[1] else None
            grad_rows, grad_b_enc, _ = kernels.latent_gradients(layout, grad, centred[None], all_latents, wanted, bias=True)
            if ctx.needs_input_grad[0]:
                grad_x = kernels.decode_levels(layout, grad, rows, all_latents)[0]
            if ctx.needs_input_grad[3]:
                grad_b_dec = -(grad_b_enc.to(rows.dtype) @ rows)
        return grad_x, None if grad_rows is None else grad_rows.t(), grad_b_enc, grad_b_dec, None, None, None, None


class _DecodeLevels(Function):
    """Sparse decode of nested prefixes of the latents: their losses ``[levels]`` and errors ``[levels, batch, d_in]``.

    Errors accumulate from level to level, and backward gradients from the outermost level inward. Without ``x`` there are no
    losses, and in place of errors one level's reconstruction, with its gradient. ``ranks`` may share the latents.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor | None, W_dec: Tensor, b_dec: Tensor, *settings: Any
    ) -> tuple[Tensor | None, Tensor]:
        layout, levels, target, ranks = settings
        dtype = torch.promote_types(W_dec.dtype, torch.float32)
        values = values.to(dtype)
        errors = ranks.sum(products_on(values).decode_levels(layout, values, W_dec, levels))
        errors[0].add_(b_dec)
        ctx.layout, ctx.levels = layout, levels
        ctx.narrow = computed_in(W_dec) if values.is_cuda else dtype
        ctx.set_materialize_grads(False)  # else backward is given zeros as large as the errors
        if x is None:
            ctx.save_for_backward(values, W_dec, None, None)
            return None, errors
        errors[0].sub_(x)
        for level in range(1, len(levels)):
            errors[level].add_(errors[level - 1])
        ctx.mark_non_differentiable(errors)
        weight, ctx.detach = target.weight, target.detach
        if target.tilt:
            squares = torch.linalg.vecdot(errors, errors)
            weight = reference.tilted(squares, target).to(dtype)
            losses = torch.linalg.vecdot(weight, squares)
        elif weight is None:
            losses = torch.stack([torch.dot(error, error) for error in errors.flatten(1)]) / max(1, x.shape[0])
        else:
            losses = torch.stack([weight.to(dtype) @ error.square().sum(1) for error in errors])
        ctx.save_for_backward(values, W_dec, weight, errors)
        return losses, errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_x_hat: Tensor | None) -> tuple[Tensor | None, ...]:
        values, W_dec, weight, errors = ctx.saved_tensors
        upstream = grad_x_hat if grad is None else level_upstream(grad, errors, weight, ctx.detach)
        if upstream is None:
            return (None,) * 8
        needs_values, needs_x, needs_W_dec, needs_b_dec, *_ = ctx.needs_input_grad
        wanted = W_dec.dtype if needs_W_dec else None, W_dec if needs_values else None
        grad_W_dec, _, grad_values = products_on(values).latent_gradients(
            ctx.layout, values, upstream.to(ctx.narrow), ctx.levels, *wanted
        )
        grad_b_dec = upstream[0].sum(0) if needs_b_dec else None
        grad_x = -(upstream.sum(0) if ctx.detach else upstream[0]) if needs_x else None
        if grad_x is not None and ctx.detach == "all_but_last":
            grad_x += (len(upstream) - 1) * upstream[-1]  # the last level's is in all of them, and counts once
        return grad_values, grad_x, grad_W_dec, grad_b_dec, None, None, None, None


def level_upstream(grad: Tensor, errors: Tensor, weight: Tensor | None, detach: bool | str) -> Tensor:
    """The gradient of what each level adds ``[levels, batch, d_in]``, from those of the levels' losses ``[levels]``.

    Levels may weigh examples alike ``[batch]``, or each in its own way ``[levels, batch]``.
    """
    upstream = torch.empty_like(errors)
    coefficients = 2 * grad / max(1, errors.shape[1]) if weight is None else 2 * grad
    for level in reversed(range(len(errors))):
        error = errors[level]
        if weight is not None:
            error = error * (weight if weight.dim() == 1 else weight[level]).to(errors.dtype)[:, None]
        if level == len(errors) - 1 or (detach and detach != "all_but_last"):
            torch.mul(error, coefficients[level], out=upstream[level])
        else:
            outer = upstream[-1 if detach else level + 1]
            torch.addcmul(outer, error, coefficients[level], out=upstream[level])
    return upstream
