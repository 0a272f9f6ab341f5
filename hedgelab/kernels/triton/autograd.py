"""Sparse encode and decode as autograd functions over the kernels."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hedgelab.kernels.codes import Codes
from hedgelab.kernels.layout import Layout
from hedgelab.kernels.triton.decoding import decode_rows
from hedgelab.kernels.triton.gradients import latent_gradients
from hedgelab.kernels.triton.tiles import accumulator


class AttachEncoder(Function):
    """Give selected pre-activations the gradient of the encoder that made them.

    The forward pass hands on their values. The backward pass touches selected entries only, ``sparse`` or as a dense
    product: rows of ``W_enc`` (as it lies in memory, latents first) get sums of ``grad · (x - b_dec)``, silent ones zeros.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        layout: Layout,
        values: Tensor,
        centred: Tensor,
        encoder: Tensor,
        sparse: bool,
    ) -> Tensor:
        ctx.layout, ctx.sparse = layout, sparse
        ctx.x_dtype, ctx.weight_dtype, ctx.bias_dtype = x.dtype, W_enc.dtype, b_enc.dtype
        ctx.save_for_backward(centred, encoder)
        return values.to(accumulator(values.dtype), copy=True)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        centred, encoder = ctx.saved_tensors
        layout: Layout = ctx.layout
        x_grad = b_dec_grad = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.sparse:
                weight_grad, bias_sums, _ = latent_gradients(layout, grad, centred[None], ctx.weight_dtype, bias=True)
                bias_grad = cast(Tensor, bias_sums)
            else:
                dense = Codes.from_layout(layout, grad.to(centred.dtype)).to_dense()
                weight_grad = (dense.t() @ centred).to(ctx.weight_dtype)
                bias_grad = Codes.from_layout(layout, grad).sum_per_latent()
            if ctx.needs_input_grad[0]:
                x_grad = decode_rows(layout, grad, encoder.t())[0]
                b_dec_grad = -x_grad.sum(0, dtype=accumulator(x_grad.dtype)).to(ctx.bias_dtype)
                x_grad = x_grad.to(ctx.x_dtype)
            elif ctx.needs_input_grad[3]:
                b_dec_grad = -(encoder @ bias_grad.to(encoder.dtype)).to(ctx.bias_dtype)
        return x_grad, weight_grad.t(), bias_grad.to(ctx.bias_dtype), b_dec_grad, None, None, None, None, None


class SparseDecode(Function):
    """Reconstructions from nested prefixes of the latents, innermost first.

    The gradient that reaches a latent is that of every level it takes part in: suffix sums over the levels, or with
    ``detach`` that of its own level alone. Gradients are gathered in ``gather_dtype`` and summed in at least float32.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        layout: Layout,
        levels: Sequence[int],
        detach: bool,
        gather_dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        stops = torch.tensor(levels, dtype=torch.long).to(W_dec.device, non_blocking=True)
        ctx.layout, ctx.detach, ctx.gather_dtype, ctx.bias_dtype = layout, detach, gather_dtype, b_dec.dtype
        ctx.save_for_backward(values, W_dec, stops)
        return decode_rows(layout, values, W_dec, b_dec, stops).unbind(0)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        values, W_dec, stops = ctx.saved_tensors
        source = torch.empty(len(grads), *grads[0].shape, dtype=ctx.gather_dtype, device=values.device)
        felt = grads[-1]
        source[-1] = felt
        for level in range(len(grads) - 2, -1, -1):
            felt = grads[level] if ctx.detach else felt + grads[level]
            source[level] = felt
        b_dec_grad = felt.sum(0, dtype=accumulator(felt.dtype)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        weight_grad, _, values_grad = latent_gradients(ctx.layout, values, source, W_dec.dtype, stops, W_dec)
        return cast(Tensor, values_grad).to(values.dtype), weight_grad, b_dec_grad, None, None, None, None
