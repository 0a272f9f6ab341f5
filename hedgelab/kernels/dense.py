"""Dense pre-activations without waste, for ReLU and JumpReLU latents of which too many fire for sparse products to pay.

Autograd would pay a product as dear as the encoder's for the gradient of ``x - b_dec``; here that of ``b_dec`` alone follows
from that of ``b_enc``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hedgelab.kernels.values import Encoder


def pre_activations(x: Tensor, encoder: Encoder) -> Tensor:
    """As :func:`hedgelab.kernels.reference.pre_activations`, for one type of all tensors."""
    pre: Tensor = PreActivations.apply(x, *encoder[:3])  # type: ignore[no-untyped-call]
    return pre


class PreActivations(Function):
    """``(x - b_dec) W_enc + b_enc``; the gradient of ``W_enc`` comes in the layout of a transposed ``[d_sae, d_in]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:  # noqa: D102
        centred = x - b_dec
        ctx.save_for_backward(centred, W_enc)
        return torch.addmm(b_enc, centred, W_enc)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        centred, W_enc = ctx.saved_tensors
        needs_x, needs_W_enc, _, needs_b_dec = ctx.needs_input_grad
        grad_b_enc = grad.sum(0)
        grad_x = grad @ W_enc.t() if needs_x else None
        grad_W_enc = (grad.t() @ centred).t() if needs_W_enc else None
        return grad_x, grad_W_enc, grad_b_enc, -(W_enc @ grad_b_enc) if needs_b_dec else None
