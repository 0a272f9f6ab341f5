"""JumpReLU and its step function, with straight-through gradients (Rajamanoharan et al. 2024, section 3)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class JumpReLU(Function):
    """``pre · 1[pre > threshold]``; the threshold's gradient is a rectangle-kernel estimate of the given bandwidth."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # noqa: D102
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: D102
        pre, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(pre, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        pre, threshold = ctx.saved_tensors
        near = rectangle(pre, threshold, ctx.bandwidth)
        grad_threshold = -(threshold / ctx.bandwidth) * (near * grad).sum_to_size(threshold.shape)
        return torch.where(pre > threshold, grad, 0.0), grad_threshold, None


class StepFunction(Function):
    """``1[pre > threshold]``; no gradient to ``pre``, a rectangle-kernel estimate to the threshold."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # noqa: D102
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: D102
        pre, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(pre, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # noqa: D102
        pre, threshold = ctx.saved_tensors
        near = rectangle(pre, threshold, ctx.bandwidth)
        return None, -(near * grad).sum_to_size(threshold.shape) / ctx.bandwidth, None


def rectangle(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where ``pre`` lies within half a bandwidth of the threshold, else 0."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)
